"""Augmentation in data.py: views through a matrix, random crops, masks cut with their images."""
import math

import pytest
import torch

import data
from tests.support.naive import denormalized

def draw_crops(count, zoom):
    """Matrices (count, 2, 3) of random crops, at output side / stored side = zoom."""
    return data.draw_crops(count, zoom, 'cpu')

def whole_view(images, size):
    """The whole images in [0, 1], as a validation sees them."""
    return denormalized(data.whole_view(images, size))

def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)

# --- Views ----------------------------------------------------------------------------------------

def bilinear(image, x, y):
    """Value of an image (3, S, S) at (x, y), whose edges are at -1 and 1; 0 outside."""
    S = image.shape[1]
    column, row = ((x + 1) * S - 1) / 2, ((y + 1) * S - 1) / 2
    value = torch.zeros(3)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < S and 0 <= j < S:
                value += (1 - abs(row - i)) * (1 - abs(column - j)) * image[:, i, j]
    return value

def test_a_view_samples_bilinearly_through_its_matrix():
    images, size = noise(6, 3, 20, 20), 16      # more than one chunk of four
    matrices = draw_crops(6, 16 / 20)
    views = data.sample(images, size, matrices)
    for b, i, j in [(0, 0, 0), (1, 15, 3), (2, 7, 8), (4, 0, 15), (5, 11, 2)]:
        place = torch.tensor([(2 * j + 1) / size - 1, (2 * i + 1) / size - 1, 1])
        expected = bilinear(images[b] / 255, *(matrices[b] @ place).tolist())
        torch.testing.assert_close(views[b, :, i, j], expected, atol=1e-4, rtol=0)

def test_the_whole_view_is_the_image():
    images = noise(5, 3, 24, 24)
    torch.testing.assert_close(whole_view(images, 24), images / 255, atol=1e-5, rtol=0)

def test_a_much_smaller_view_averages_pixels_first():
    """Every fourth column is bright; bilinear sampling alone would look between two dark ones."""
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::4] = 200
    grey = torch.full((1, 3, 16, 16), 50 / 255)
    torch.testing.assert_close(whole_view(stripes, 16), grey, atol=1e-5, rtol=0)

def test_normalize_takes_the_mean_and_deviation_of_imagenet():
    images = torch.rand(2, 3, 5, 5)
    normalized = data.normalize(images)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        torch.testing.assert_close(normalized[:, channel], (images[:, channel] - mean) / std)

# --- Random crops ---------------------------------------------------------------------------------

def taken_apart(matrices):
    """Matrices (n, 2, 3) as flip (n,), angle (n,) in degrees, sides w and h (n,), shear (n,), and
    centre (2, n) of the crop before its rotation."""
    flip = matrices[:, 0, 0].sign()
    m = matrices.clone()
    m[:, 0] *= flip[:, None]
    angle = torch.atan2(m[:, 1, 0], m[:, 0, 0])
    w, h = torch.hypot(m[:, 0, 0], m[:, 1, 0]), torch.hypot(m[:, 0, 1], m[:, 1, 1])
    shear = torch.atan2(-m[:, 0, 1], m[:, 1, 1]) - angle
    x, y = m[:, 0, 2], m[:, 1, 2]
    centre = [angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x]
    return flip, angle.rad2deg(), w, h, shear, torch.stack(centre)

@pytest.fixture(params=[0.25, 0.5, 0.8, 1.0])
def zoom(request):
    """Side of the output / side of the stored image."""
    return request.param

def test_half_of_the_crops_are_mirrored(zoom):
    flip, *_ = taken_apart(draw_crops(4000, zoom))
    assert 0.45 < (flip < 0).float().mean() < 0.55

def test_crops_are_turned_by_up_to_15_degrees_and_not_sheared(zoom):
    _, angle, _, _, shear, _ = taken_apart(draw_crops(4000, zoom))
    assert 14.9 < angle.max() < 15.001 and -15.001 < angle.min() < -14.9
    assert angle.mean().abs() < 1
    assert shear.abs().max() < 1e-4

@pytest.mark.parametrize('zoom, smallest', [(0.25, 0.2), (0.5, 0.2), (0.8, 0.32), (1.0, 0.5)])
def test_a_crop_has_a_fifth_of_the_area_and_half_of_the_output_s_own_pixels(zoom, smallest):
    """The paper's fifth where images are stored large enough, else zoom^2 / 2."""
    _, _, w, h, _, _ = taken_apart(draw_crops(4000, zoom))
    area = w * h
    assert smallest - 1e-5 < area.min() < smallest + 0.01
    assert area.max() > 0.9
    assert max(w.max(), h.max()) < 1 + 1e-5

def test_crops_have_an_aspect_of_three_to_four_to_four_to_three(zoom):
    _, _, w, h, _, _ = taken_apart(draw_crops(4000, zoom))
    aspect = (w / h)[w * h < 0.7]       # a larger one may be cut off at the image's side
    assert 0.75 - 1e-4 < aspect.min() < 0.78
    assert 1.29 < aspect.max() < 4 / 3 + 1e-4

def test_crops_lie_anywhere_inside_the_image(zoom):
    _, _, w, h, _, centre = taken_apart(draw_crops(4000, zoom))
    slack = 1 - torch.stack([w, h])
    assert (centre.abs() < slack + 1e-4).all()
    assert (centre > 0.9 * slack).any(1).all() and (centre < -0.9 * slack).any(1).all()

def test_nearly_black_crops_are_drawn_again():
    """One corner is lit. About half of the crops miss it, and few of four draws all miss it."""
    images = torch.zeros(120, 3, 64, 64, dtype=torch.uint8)
    images[:, :, :22, :22] = 255

    def share_of_black(views):
        return (views.mean((1, 2, 3)) < 0.02).float().mean()

    once = share_of_black(data.sample(images, 32, draw_crops(120, 0.5)))
    augmented = share_of_black(denormalized(data.augment(images, 32)))
    assert once > 0.1
    assert augmented < once ** 4 + 0.02

def test_a_black_image_is_taken_as_it_is():
    views = denormalized(data.augment(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), 32))
    torch.testing.assert_close(views, torch.zeros(4, 3, 32, 32), atol=1e-6, rtol=0)

def test_augmentation_follows_the_seed():
    images, views = noise(5, 3, 32, 32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(data.augment(images, 24))
    assert views[0].shape == (5, 3, 24, 24)
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])

def test_images_of_a_batch_are_augmented_each_in_its_own_way():
    views = data.augment(noise(1, 3, 32, 32).expand(2, -1, -1, -1), 24)
    assert not torch.equal(views[0], views[1])

# --- With labels ----------------------------------------------------------------------------------

@pytest.fixture
def drawn_masks():
    """Images (8, 3, 64, 64) that show two bars in three levels of grey, and their masks."""
    masks = torch.zeros(8, 64, 64, dtype=torch.long)
    masks[:, 8:40, 20:30] = 1
    masks[:, 40:50, 10:60] = 2
    images = (60 + 60 * masks).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    return images, masks

def test_masks_are_augmented_with_their_images(drawn_masks):
    """An image that shows its own mask still does after augmentation."""
    views, masks = data.augment_labelled(*drawn_masks, 48)
    assert views.shape == (8, 3, 48, 48) and masks.shape == (8, 48, 48)
    for view, mask in zip(denormalized(views)[:, 0], masks):
        levels = [view[mask == c].median() for c in (0, 1, 2)]
        assert levels[0] < levels[1] < levels[2]
        nearest = torch.stack([(view - level).abs() for level in levels]).argmin(0)
        assert (nearest == mask)[mask != 255].float().mean() > 0.93         # only edges differ

def test_what_lies_outside_of_the_image_is_not_learnt(drawn_masks):
    """A white image is black outside of itself, and only there its mask says 255."""
    _, masks = drawn_masks
    white = torch.full((8, 3, 64, 64), 255, dtype=torch.uint8)
    views, masks = data.augment_labelled(white, masks, 64)
    assert masks.unique().tolist() == [0, 1, 2, 255]
    outside = denormalized(views)[:, 0] < 0.5
    assert outside.any()
    assert (outside == (masks == 255)).float().mean() > 0.99        # but for the border itself

def test_each_mask_of_a_batch_is_augmented_in_its_own_way(drawn_masks):
    _, masks = data.augment_labelled(*drawn_masks, 48)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 8

def test_labels_stay_as_they_are(drawn_masks):
    images, _ = drawn_masks
    _, labels = data.augment_labelled(images, torch.arange(8), 48)
    assert labels.tolist() == list(range(8))

@pytest.mark.parametrize('flips', [True, False])
def test_a_left_organ_stays_on_the_left_where_flips_are_off(flips):
    masks = torch.zeros(64, 64, 64, dtype=torch.long)
    masks[:, 20:44, 8:24], masks[:, 20:44, 40:56] = 1, 2
    images = masks[:, None].expand(-1, 3, -1, -1).byte()
    _, seen = data.augment_labelled(images, masks, 64, flips)
    columns = torch.arange(64.0)
    places = [[columns[(mask == organ).any(0)].mean() for organ in (1, 2)] for mask in seen]
    kept = sum(bool(left < right) for left, right in places)
    assert 16 < kept < 48 if flips else kept == 64

def places_seen(count, size=96):
    """Where each pixel of a view comes from: (count, size, size), columns and rows of the image.

    A mask whose class is the column (or the row) tells it. Same seed, same views."""
    columns = torch.arange(size).expand(size, size)
    seen = []
    for mask in (columns, columns.T):
        torch.manual_seed(1)
        images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
        _, masks = data.augment_labelled(images, mask.expand(count, size, size), size)
        seen.append(masks.float())
    return seen

def test_labelled_images_are_zoomed_by_up_to_a_quarter_and_turned_by_up_to_15_degrees():
    columns, rows = places_seen(300)
    right = columns[:, 48, 72] - columns[:, 48, 24]     # 48 pixels further in the view
    down = rows[:, 48, 72] - rows[:, 48, 24]
    side = torch.hypot(right, down) / 48
    assert 0.78 < side.min() < 0.82 and 0.98 < side.max() < 1.02
    angle = torch.atan(down / right).rad2deg()
    assert 14 < angle.max() < 16 and -16 < angle.min() < -14

def test_brightness_changes_by_a_fifth_at_most():
    """Of an even picture, where a view shows nothing from outside of it."""
    images = torch.full((2000, 3, 32, 32), 100, dtype=torch.uint8)
    views, masks = data.augment_labelled(images, torch.zeros(2000, 32, 32, dtype=torch.long), 32)
    inside = (masks != 255).flatten(1).all(1)
    change = denormalized(views)[inside, 0, 16, 16] * 255 / 100
    assert inside.sum() > 100
    assert 0.8 - 1e-4 < change.min() < 0.82 and 1.18 < change.max() < 1.2 + 1e-4

def test_contrast_changes_by_a_fifth_at_most():
    """Of a picture of two levels of grey, 40 apart: so far apart are they times the contrast."""
    masks = torch.zeros(500, 32, 32, dtype=torch.long)
    masks[:, 16:] = 1
    images = (100 + 40 * masks)[:, None].expand(-1, 3, -1, -1).byte()
    views, masks = data.augment_labelled(images, masks, 32)
    grey = denormalized(views)[:, 0] * 255
    apart = [view[mask == 1].median() - view[mask == 0].median() for view, mask in zip(grey, masks)]
    change = torch.stack(apart) / 40
    assert 0.8 - 1e-3 < change.min() < 0.82 and 1.18 < change.max() < 1.2 + 1e-3
