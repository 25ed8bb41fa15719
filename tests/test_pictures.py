"""What pictures show: grids, curves, reconstructions, what patches have in common, cases. The
program that draws them of a run: test_pictured_runs.py."""
import json

import numpy as np
import pytest
import torch

import data
from model import MAE, Config, ViT, read_checkpoint
from tests.support import files, naive, networks, runs
from tests.support.pictures import drawn_in, tiles_of
from unetr import UNETR

pictures = runs.module('pictures')

# --- Grids and lines ------------------------------------------------------------------------------

@pytest.mark.parametrize('note', ['', 'a note', 20 * 'a note that is long '])
@pytest.mark.parametrize('heads', [['x', 'y', 'z'], ['x\nof two lines', 'y', 'z']])
def test_a_grid_puts_each_tile_where_its_names_say(tmp_path, note, heads):
    colours = torch.rand(2, 3, 3, 1, 1)
    rows = colours.expand(2, 3, 3, 8, 8)
    pictures.draw_grid(tmp_path / 'grid.png', rows, ['a', 'b'], heads, (16, 16), note)
    tiles = tiles_of(tmp_path / 'grid.png', 2, 16, 16, heads[0].count('\n') + 1)
    assert tiles.shape == (2, 3, 16, 16, 3)
    expected = colours.permute(0, 1, 3, 4, 2).expand_as(tiles)
    torch.testing.assert_close(tiles, expected, atol=0.03, rtol=0)      # a picture has 256 colours

def draw(path, *lines, **options):
    """Draw panels of one line each, side by side; `options` are those of the panels."""
    panels = [pictures.Panel('title', 'steps', 'error', dict(up=line), **options) for line in lines]
    pictures.draw_lines(path, panels, columns=len(panels), same_heights=len(panels) > 1)

def heights_at(points, x):
    """The heights of what is drawn at x."""
    return points[abs(points[:, 0] - x) < 0.006][:, 1]

def test_a_line_is_drawn_from_the_least_to_the_greatest_number(tmp_path):
    line = [(1, 0), (2, 2), (5, 8)]
    draw(tmp_path / 'lines.png', line)
    blue = drawn_in(tmp_path / 'lines.png')
    assert abs(blue.min(0)).max() < 0.01 and abs(blue.max(0) - 1).max() < 0.01
    for x, y in line:
        assert abs(heights_at(blue, (x - 1) / 4).mean() - y / 8) < 0.015

def test_a_logarithmic_axis_has_each_factor_of_the_same_height(tmp_path):
    draw(tmp_path / 'lines.png', [(0, 0.1), (1, 1), (2, 10)], log=True)
    assert abs(heights_at(drawn_in(tmp_path / 'lines.png'), 0.5).mean() - 0.5) < 0.015

def test_a_bar_shows_the_deviation_of_a_dot(tmp_path):
    """Two dots, 3 with a deviation of 1 and 4 with one of 2: all between 2 and 6."""
    draw(tmp_path / 'bars.png', [(1, 3, 1), (2, 4, 2)])
    blue = drawn_in(tmp_path / 'bars.png')
    for x, least, most in ((0, 2, 4), (1, 2, 6)):
        heights = heights_at(blue, x)
        assert abs(heights.min() - (least - 2) / 4) < 0.01
        assert abs(heights.max() - (most - 2) / 4) < 0.01

def test_a_level_is_a_dashed_line_from_side_to_side(tmp_path):
    """In black, as the first level is; the numbers of the axes begin at it."""
    draw(tmp_path / 'levels.png', [(1, 3), (2, 4)], levels=dict(ideal=2.0))
    black = drawn_in(tmp_path / 'levels.png', (0, 0, 0))
    dashes = black[(abs(black[:, 1]) < 0.01) & (black[:, 0] >= 0)]
    assert dashes[:, 0].min() < 0.01 and dashes[:, 0].max() > 0.95
    assert 0.2 < len(set(dashes[:, 0])) / pictures.AXES[0] < 0.8

def test_panels_of_one_height_can_be_compared(tmp_path):
    """Both reach from the least to the greatest number of all."""
    draw(tmp_path / 'two.png', [(1, 0), (2, 1)], [(1, 1), (2, 4)])
    low, high = (drawn_in(tmp_path / 'two.png', number=number)[:, 1] for number in (0, 1))
    assert abs(low.max() - 0.25) < 0.015 and abs(high.min() - 0.25) < 0.015

# --- Curves ---------------------------------------------------------------------------------------

@pytest.fixture
def panels_drawn(monkeypatch):
    """draw_curves(entries, top_k) -> the panels that it draws."""
    def panels_drawn(entries, top_k):
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr(pictures, 'draw_lines', lambda path, panels: drawn.extend(panels))
            pictures.draw_curves('curves.png', entries, top_k)
        return drawn
    return panels_drawn

def test_curves_show_every_number_of_the_log(finished, panels_drawn):
    """Against the steps done; training and validation in one panel, bits of each layer in one."""
    log = runs.read_log(finished)
    seen = [entry for entry in log if 'val' in entry]
    drawn = [panel.lines for panel in panels_drawn(log, top_k=2)]

    def curve(entries, value):
        return [(entry['step'] + 1, value(entry)) for entry in entries]

    errors = dict(training=curve(log, lambda entry: entry['l_self']),
                  validation=curve(seen, lambda entry: entry['val_l_self']))
    align, balance = (dict(training=curve(log, lambda entry: entry[name]))
                      for name in ('align', 'balance'))
    bits = {f'layer {layer}': curve(seen, lambda entry, layer=layer: entry['bits'][layer - 1])
            for layer in (1, 2)}
    second = {f'layer {layer}': curve(seen, lambda entry, layer=layer: entry['second'][layer - 1])
              for layer in (1, 2)}
    assert drawn == [errors, align, balance, bits, second]

def test_curves_are_beside_what_they_are_to_be_compared_with(finished, panels_drawn):
    """A flat guess, the balance of equal use, the most bits, and those before training."""
    first = next(entry for entry in runs.read_log(finished) if 'val' in entry)
    levels = [panel.levels for panel in panels_drawn(runs.read_log(finished), top_k=2)]
    untrained = pytest.approx(sum(first['bits']) / 2)
    assert levels == [{'flat guess': 1}, {}, {'ideal': 2},
                      {'maximum': first['bits_max'], 'untrained': untrained}, {'even': 0.5}]

def test_curves_of_many_layers_show_some_from_the_first_to_the_last(panels_drawn):
    entry = dict(step=0, l_self=1.0, align=1.0, balance=1.0, bits=[0.1] * 32, bits_max=3.0,
                 second=[0.5] * 32)
    *_, bits, second = panels_drawn([entry], top_k=2)
    assert 5 <= len(bits.lines) <= 12
    assert [*bits.lines][0] == 'layer 1' and [*bits.lines][-1] == 'layer 32'
    assert [*second.lines] == [*bits.lines]

def test_curves_without_experts_are_the_errors_alone(panels_drawn):
    entry = dict(step=0, l_self=2.0, val_l_self=3.0, align=0.0, balance=0.0)
    panel, = panels_drawn([entry], top_k=0)
    assert panel.lines == dict(training=[(1, 2.0)], validation=[(1, 3.0)])

def test_curves_leave_out_what_is_not_finite(panels_drawn):
    panel, = panels_drawn([dict(step=0, l_self=2.0), dict(step=1, l_self=None)], top_k=2)
    assert panel.lines == dict(training=[(1, 2.0)])

# --- Patches --------------------------------------------------------------------------------------

def test_patches_are_put_back_where_they_were():
    model, images = MAE(networks.config()), torch.randn(2, 3, 16, 16)
    assert torch.equal(pictures.unpatchify(model.patchify(images), 4), images)

# --- Reconstructions ------------------------------------------------------------------------------

@pytest.fixture
def reconstructed(sources, tmp_path, monkeypatch):
    """What is drawn of a grey and a colour image (2, 3, 32, 32), as `rows`; and what it must show:
    `stored`, the images in [0, 1] times what makes them bright, `hidden`, and a naive `guess`."""
    drawn = []

    def keep(path, rows, *names):
        drawn.append(torch.stack(list(rows)))

    monkeypatch.setattr(pictures, 'draw_grid', keep)
    network = MAE(Config(size=32, patch=8, width=64, heads=2, depth=2, experts=0, decoder_width=32,
                         decoder_heads=2, decoder_depth=1))
    grey, colour = sources.images[3][0] // 8, sources.images[1][0]      # the first as dark as PET
    grey = np.broadcast_to(grey, colour.shape)
    stored = torch.from_numpy(np.stack([grey, colour])).permute(0, 3, 1, 2) / 255
    pixels, noise = data.normalize(stored), torch.rand(2, 16)
    with torch.no_grad():
        pictures.draw_reconstructions(tmp_path / 'recon.png', network, pixels, noise, ['a', 'b'])
        found = [naive.mae(network, image, own) for image, own in zip(pixels, noise)]
    hidden, guess = torch.zeros(2, 3, 32, 32, dtype=torch.bool), torch.zeros(2, 3, 32, 32)
    for b, (_, prediction, mask) in enumerate(found):
        for n, patch in enumerate(naive.patches_of(pixels[b], 8)):
            values = prediction[n] * (patch.var() + 1e-6).sqrt() + patch.mean()
            y, x = n // 4 * 8, n % 4 * 8
            guess[b, :, y:y + 8, x:x + 8] = values.view(8, 8, 3).permute(2, 0, 1)
            hidden[b, :, y:y + 8, x:x + 8] = mask[n] > 0
    guess = naive.denormalized(guess).clamp(0, 1)
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

def test_the_share_between_modalities_is_that_of_variance_between_groups():
    groups = [torch.randn(2, n, 5) + shift for n, shift in ((7, 0), (4, 2), (9, -1))]
    kinds = torch.eye(3).repeat_interleave(torch.tensor([7, 4, 9]), 1)
    shares = pictures.share_between(torch.cat(groups, 1), kinds)
    for layer in range(2):
        everything = torch.cat([group[layer] for group in groups])
        within = sum((group[layer] - group[layer].mean(0)).square().sum() for group in groups)
        whole = (everything - everything.mean(0)).square().sum()
        assert shares[layer].item() == pytest.approx(1 - (within / whole).item(), rel=1e-5)

def test_experts_that_no_image_activates_are_dead_and_some_are_rare(monkeypatch):
    """Of four experts; 400 held-out images of two modalities, of which each has one expert."""
    weights, drawn = torch.zeros(1, 400, 4), []
    weights[0, :200, 0], weights[0, 200:, 1] = 1, 1
    weights[0, 0] = torch.tensor([0, 0, 1.0, 0])
    kinds = torch.eye(2).repeat_interleave(200, 1)
    monkeypatch.setattr(pictures, 'draw_grid', lambda *answer: drawn.extend(answer))
    pictures.draw_experts('experts.png', weights, kinds, ['CT', 'MR'])
    title, = drawn[3]
    assert title.split('\n') == ['layer 1', '1.00 bits', '1 dead', '1 rare']

# --- Cases of a segmentation ----------------------------------------------------------------------

def test_test_images_are_named_by_their_files_where_each_is_one_image(tmp_path):
    assert pictures.case_names(tmp_path, 2) == ['image 0', 'image 1']
    names = ['test/a.scan.png', 'test/b.png']
    files.write(tmp_path / 'split.json', json.dumps(dict(train=['c.png'], test=names)))
    assert pictures.case_names(tmp_path, 2) == ['a.scan', 'b']
    assert pictures.case_names(tmp_path, 3) == ['image 0', 'image 1', 'image 2']

def test_pictures_of_cases_are_named_and_ordered_by_dice(labelled, tuned, monkeypatch):
    """Best, median and worst; a legend says which colour is which class."""
    task, drawn = data.Task(labelled / 'find'), []
    state, config, _ = read_checkpoint(tuned / 'find' / 'best.pt')
    net = UNETR(ViT(config), len(task.classes))
    net.load_state_dict(state)
    hits = 3, 0, 4, 1, 2        # of five images: the more, the better
    table = np.array([[[50, 0], [10, 10 * n]] for n in hits])
    monkeypatch.setattr(pictures, 'draw_grid', lambda *answer: drawn.extend(answer))
    pictures.draw_cases(None, net, task, [*'abcde'], table, torch.device('cpu'))
    _, rows, names, *_, note = drawn
    lines = [name.split('\n') for name in names]
    assert [line[:2] for line in lines] == [['best', 'c'], ['median', 'e'], ['worst', 'b']]
    assert [line[2] for line in lines] == ['Dice 0.889', 'Dice 0.800', 'Dice 0.000']
    assert note == 'lime is square'
    for row, number in zip(rows, (2, 4, 1), strict=True):
        image = torch.tensor(task.images['test'][number]).permute(2, 0, 1).expand(3, -1, -1)
        assert torch.equal((row[0] * 255).round().byte(), image)
