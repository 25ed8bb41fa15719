"""The pictures of a pretraining: grids, curves, reconstructions, what patches have in common."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import pretrain
from model import MAE, Config, read_checkpoint
from tests.support import naive, runs
from tests.support.runs import ends

pictures = runs.module('pictures')
# Where reconstructions are drawn: in the training, until all drawing is in one program.
drawing = pretrain if hasattr(pretrain, 'draw_reconstructions') else pictures

def load(path):
    """A picture (H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert('RGB'))) / 255

def tiles_of(path, height=96, width=96, note=False):
    """The tiles (rows, columns, height, width, 3) of a grid: 4 pixels apart, with 90 for the names
    on the left, 20 for the heads above, and 4, or 24 for a note, below."""
    picture = load(path)
    rows, over = divmod(picture.shape[0] - 20 - (24 if note else 4), height + 4)
    columns, aside = divmod(picture.shape[1] - 90 - 4, width + 4)
    assert (over, aside) == (0, 0), f'{path}: no such tiles make {tuple(picture.shape)}'
    tiles = torch.zeros(rows, columns, height, width, 3)
    for r in range(rows):
        for c in range(columns):
            y, x = 24 + r * (height + 4), 94 + c * (width + 4)
            tiles[r, c] = picture[y:y + height, x:x + width]
    return tiles

# --- Grids and lines ------------------------------------------------------------------------------

@pytest.mark.parametrize('note', ['', 'a note'])
def test_a_grid_puts_each_tile_where_its_names_say(tmp_path, note):
    colours = torch.rand(2, 3, 3, 1, 1)
    rows = colours.expand(2, 3, 3, 8, 8)
    pictures.draw_grid(tmp_path / 'grid.png', rows, ['a', 'b'], ['x', 'y', 'z'], (16, 16), note)
    tiles = tiles_of(tmp_path / 'grid.png', 16, 16, bool(note))
    assert tiles.shape == (2, 3, 16, 16, 3)
    expected = colours.permute(0, 1, 3, 4, 2).expand_as(tiles)
    torch.testing.assert_close(tiles, expected, atol=0.03, rtol=0)      # a picture has 256 colours

def blue_pixels(path):
    """Rows and columns (n, 2) of the first line of the first panel, without its legend."""
    picture = np.asarray(Image.open(path)).astype(int)[:, :250]
    return np.argwhere((picture == (65, 105, 225)).all(2))      # royalblue

LEFT, RIGHT, TOP, BOTTOM = 55, 245, 40, 190      # of a panel's frame, in pixels

def test_a_line_is_drawn_from_the_least_to_the_greatest_number(tmp_path):
    points = [(1, 0), (2, 2), (5, 8)]
    pictures.draw_lines(tmp_path / 'lines.png', {'title': dict(up=points)})
    blue = blue_pixels(tmp_path / 'lines.png')
    assert abs(blue.min(0) - (TOP, LEFT)).max() <= 1
    assert abs(blue.max(0) - (BOTTOM, RIGHT)).max() <= 1
    for x, y in points:
        column = LEFT + (RIGHT - LEFT) * (x - 1) / 4
        row = BOTTOM - (BOTTOM - TOP) * y / 8
        drawn = blue[abs(blue[:, 1] - column) <= 1][:, 0]
        assert abs(drawn.mean() - row) <= 2

def test_a_bar_shows_the_deviation_of_a_dot(tmp_path):
    """Two dots, 3 with a deviation of 1 and 4 with one of 2: all between 2 and 6."""
    pictures.draw_lines(tmp_path / 'bars.png', {'title': dict(up=[(1, 3, 1), (2, 4, 2)])})
    blue = blue_pixels(tmp_path / 'bars.png')
    for column, least, most in ((LEFT, 2, 4), (RIGHT, 2, 6)):
        rows = blue[abs(blue[:, 1] - column) <= 1][:, 0]
        assert abs(rows.max() - (BOTTOM - (BOTTOM - TOP) * (least - 2) / 4)) <= 1
        assert abs(rows.min() - (BOTTOM - (BOTTOM - TOP) * (most - 2) / 4)) <= 1

def test_curves_show_every_number_of_the_log(finished, monkeypatch):
    """Against the steps done; training and validation in one panel, bits of each layer in one."""
    drawn = []
    monkeypatch.setattr(pictures, 'draw_lines', lambda path, panels: drawn.append(panels))
    lines = (finished / 'log.jsonl').read_text().splitlines()
    pictures.draw_curves('curves.png', [json.loads(line) for line in lines])
    log = runs.read_log(finished)
    seen = [entry for entry in log if 'val' in entry]
    panels = [list(panel.values()) for panel in drawn[0].values()]

    def curve(entries, value):
        return [(entry['step'] + 1, value(entry)) for entry in entries]

    errors = [curve(log, lambda entry: entry['l_self']),
              curve(seen, lambda entry: entry['val_l_self'])]
    bits = [curve(seen, lambda entry, layer=layer: entry['bits'][layer]) for layer in (0, 1)]
    align, balance = ([curve(log, lambda entry: entry[name])] for name in ('align', 'balance'))
    for expected in (errors, align, balance, bits):
        assert expected in panels
    assert len(panels) == 4

def test_curves_leave_out_what_is_not_finite(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, 'draw_lines', lambda path, panels: drawn.append(panels))
    name = next(iter(pictures.CURVES))
    pictures.draw_curves('curves.png', [{'step': 0, name: 2.0}, {'step': 1, name: None}])
    (panel,) = drawn[0].values()
    assert list(panel.values()) == [[(1, 2.0)]]

# --- Reconstructions ------------------------------------------------------------------------------

@pytest.fixture
def reconstructed(sources, tmp_path, monkeypatch):
    """What is drawn of a grey and a colour image (2, 3, 32, 32), as `rows`; and what it must show:
    `stored`, the images in [0, 1] times what makes them bright, `hidden`, and a naive `guess`."""
    drawn = []

    def keep(path, rows, *names):
        drawn.append(torch.stack(list(rows)))

    monkeypatch.setattr(drawing, 'draw_grid', keep)
    network = MAE(Config(size=32, patch=8, width=64, heads=2, depth=2, experts=0, decoder_width=32,
                         decoder_heads=2, decoder_depth=1))
    grey, colour = sources.images[3][0] // 8, sources.images[1][0]      # the first as dark as PET
    grey = np.broadcast_to(grey, colour.shape)
    stored = torch.from_numpy(np.stack([grey, colour])).permute(0, 3, 1, 2) / 255
    pixels, noise = data.normalize(stored), torch.rand(2, 16)
    with torch.no_grad():
        drawing.draw_reconstructions(tmp_path / 'recon.png', network, pixels, noise, ['a', 'b'])
        found = [naive.mae(network, image, own) for image, own in zip(pixels, noise)]
    hidden, guess = torch.zeros(2, 3, 32, 32, dtype=torch.bool), torch.zeros(2, 3, 32, 32)
    for b, (_, prediction, mask) in enumerate(found):
        for n, patch in enumerate(naive.patches_of(pixels[b], 8)):
            values = prediction[n] * (patch.var() + 1e-6).sqrt() + patch.mean()
            y, x = n // 4 * 8, n % 4 * 8
            guess[b, :, y:y + 8, x:x + 8] = values.view(8, 8, 3).permute(2, 0, 1)
            hidden[b, :, y:y + 8, x:x + 8] = mask[n] > 0
    guess = data.denormalize(guess).clamp(0, 1)
    guess[0] = guess[0].mean(0)     # of a grey image the mean of three guesses
    gain = [1 / max(0.1, image.quantile(0.99).item()) for image in stored]
    gain = torch.tensor(gain)[:, None, None, None]
    return dict(rows=drawn[0], stored=stored * gain, hidden=hidden, guess=guess * gain)

def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

def test_the_first_row_shows_the_images_made_bright(reconstructed):
    close(reconstructed['rows'][0], reconstructed['stored'])

def test_the_second_row_shows_what_the_encoder_sees(reconstructed):
    """A quarter of the patches; the others are grey."""
    hidden, stored = reconstructed['hidden'], reconstructed['stored']
    assert hidden.float().mean() == 0.75
    close(reconstructed['rows'][1], torch.where(hidden, 0.5, stored))

def test_the_third_row_shows_the_prediction_in_place_of_the_rest(reconstructed):
    """With the normalization of each patch undone; of a grey image in grey."""
    hidden, stored, guess = (reconstructed[name] for name in ('hidden', 'stored', 'guess'))
    close(reconstructed['rows'][2], torch.where(hidden, guess, stored))

# --- What patches have in common ------------------------------------------------------------------

def test_clusters_of_features_in_known_directions_are_found():
    directions = torch.linalg.qr(torch.randn(8, 8))[0][:4]
    x = directions.repeat_interleave(20, 0) + 0.1 * torch.randn(80, 8)
    x = torch.nn.functional.normalize(x, dim=1)
    centres = pictures.cluster(x[torch.randperm(80)], 4)
    likeness = centres @ directions.T
    assert sorted(likeness.argmax(1).tolist()) == [0, 1, 2, 3]
    assert likeness.amax(1).min() > 0.98

def test_modality_share_is_the_share_of_variance_between_groups():
    groups = [torch.randn(2, n, 5) + shift for n, shift in ((7, 0), (4, 2), (9, -1))]
    kinds = torch.eye(3).repeat_interleave(torch.tensor([7, 4, 9]), 1)
    shares = pictures.modality_share(torch.cat(groups, 1), kinds)
    for layer in range(2):
        everything = torch.cat([group[layer] for group in groups])
        within = sum((group[layer] - group[layer].mean(0)).square().sum() for group in groups)
        whole = (everything - everything.mean(0)).square().sum()
        assert shares[layer].item() == pytest.approx(1 - (within / whole).item(), rel=1e-5)

# --- All pictures of a run ------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pictured(sources, tmp_path_factory, skipped_pictures):
    """The folder of a finished run with its pictures. WORLD_SIZE is torchrun's, and no affair of
    the program that draws."""
    out = tmp_path_factory.mktemp('pictured')
    assert runs.pretraining(sources.folder, out, steps=2, val_share=0.5).code == 0
    skipped_pictures.wanted = True
    with pytest.MonkeyPatch.context() as under_torchrun:
        under_torchrun.setenv('WORLD_SIZE', '2')
        runs.draw_pictures(out)
    skipped_pictures.wanted = False
    return out

@pytest.mark.slow
@pytest.mark.parametrize('name, rows, side', [
    ('recon', 3, 96), ('attention', 4, 88), ('layout', 6, 72)])
def test_a_picture_has_a_column_for_each_modality(pictured, name, rows, side):
    """Image, seen and guess; an image and three patches like it; six groups of patches."""
    tiles = tiles_of(pictured / f'{name}.png', side, side)
    assert tiles.shape[:2] == (rows, 3)
    for tile in tiles.flatten(0, 1):
        assert tile.flatten(0, 1).std(0).max() > 0.05, 'a tile without content'
    for first in range(3):
        for second in range(first):
            assert not torch.equal(tiles[:, first], tiles[:, second])

@pytest.mark.slow
def test_the_picture_of_the_experts_is_the_darker_the_larger_their_weight(pictured, sources):
    """A row for each modality, a tile for each layer, a strip for each expert."""
    state, config, _ = read_checkpoint(pictured / 'ckpt.pt')
    network, shards = MAE(config), data.Shards(sources.folder, val_share=0.5)
    network.load_state_dict(state)
    noise = torch.rand(len(shards.val), 16, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(3, 2, 4)
    for image, own_noise in zip(shards.val, noise):
        pixels = data.normalize(shards.gather(np.array([image])) / 255)
        with torch.no_grad():
            routing = network(pixels, 0.0, own_noise[None])[1]
        weights[shards.modality[image]] += naive.Decisions(*routing).weights[:, 0]
    tiles = tiles_of(pictured / 'experts.png', 24, 96, note=True)
    assert tiles.shape[:2] == (3, 2)
    strips = tiles[:, :, 12, 12::24].mean(3)
    expected = 0.94 * (1 - weights / weights.sum(2, keepdim=True))
    torch.testing.assert_close(strips, expected, atol=0.03, rtol=0)

@pytest.mark.slow
def test_curves_have_four_panels(pictured):
    assert Image.open(pictured / 'curves.png').size == (4 * 330, 220)

@pytest.mark.slow
def test_a_program_of_pictures_that_fails_is_named(tmp_path, with_pictures):
    with pytest.raises(SystemExit) as error:
        runs.draw_pictures(tmp_path / 'none')
    ends(error, naming='pictures')

def test_a_full_disk_in_a_picture_ends_a_training_in_a_sentence(sources, tmp_path, full_disk):
    full_disk('*/recon.png')
    ends(runs.pretraining(sources.folder, tmp_path), naming='No space left')
