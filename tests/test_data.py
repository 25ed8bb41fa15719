"""data.py: options, shards, the order of images, and augmentation."""
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import write_source

import data
from prepare_medverse import parse_options

@dataclass
class Settings:
    name: str = 'base'      # a word
    count: int = 3          # a number, 100% whole
    rate: float = 1e-4      # any number
    fast: bool = False      # yes or no

@pytest.fixture
def parse(monkeypatch):
    def parse(line):
        monkeypatch.setattr(sys, 'argv', ['script.py', *line.split()])
        return parse_options(Settings())
    return parse

@pytest.mark.parametrize('line, field, value', [
    ('--count 5', 'count', 5), ('--count=5', 'count', 5), ('--rate 3', 'rate', 3.0),
    ('--name a=b=c', 'name', 'a=b=c'), ('--name=a=b=c', 'name', 'a=b=c'),
    ('--name=', 'name', ''), ('--fast', 'fast', True), ('--fast true', 'fast', True), ('--fast=1', 'fast', True),
    ('--fast False', 'fast', False), ('--fast=no', 'fast', False)])
def test_options_are_set_as_name_and_value(parse, line, field, value):
    changed = vars(parse(line))
    assert changed[field] == value and type(changed[field]) is type(value)
    assert {name: v for name, v in changed.items() if name != field} == \
           {name: v for name, v in vars(Settings()).items() if name != field}

@pytest.mark.parametrize('line, named', [
    ('--count 0.5', '--count'), ('--count=three', '--count'), ('--rate fast', '--rate'), ('--fast=maybe', '--fast'),
    ('--cuont 5', '--cuont'), ('--coun 5', '--coun'), ('--count', '--count'), ('stray', 'stray')])
def test_wrong_options_end_the_program_and_are_named(parse, capsys, line, named):
    with pytest.raises(SystemExit) as error:
        parse(line)
    assert error.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]

@pytest.mark.parametrize('line', ['--count -5', '--rate=-1e-3', '--rate nan', '--rate inf'])
def test_numbers_below_zero_or_without_end_are_refused(parse, line):
    with pytest.raises(SystemExit, match='--(count|rate) .*: must be a number of 0 or more'):
        parse(line)

def test_help_shows_each_comment_and_default(parse, capsys):
    with pytest.raises(SystemExit):
        parse('--help')
    text = capsys.readouterr().out
    assert 'a number, 100% whole (default: 3)' in text and 'yes or no (default: False)' in text

# ---------------------------------------------------------------------------------------------------------------------
# Shards

def test_modalities_and_held_out_tails_follow_the_sources(sources):
    shards = data.Shards(sources[0], val_share=0.1)
    assert shards.modalities == ['CT', 'MR', 'Photo'] and shards.side == 32
    assert shards.modality.tolist() == [0] * 20 + [2] * 17 + [0] * 9 + [1] * 22
    assert shards.val.tolist() == [18, 19, 36, 45, 66, 67]
    assert sorted([*shards.train, *shards.val]) == list(range(68))
    few = data.Shards(sources[0], val_share=0.5, val_most=2)
    assert few.val.tolist() == [18, 19, 35, 36, 44, 45, 66, 67]

def test_gather_equals_indexing_the_images_one_by_one(sources):
    folder, images = sources
    flat = [np.broadcast_to(image, (32, 32, 3)) for source in images for image in source]
    ids = np.array([0, 3, 15, 16, 19, 20, 35, 36, 40, 46, 67])
    batch = data.Shards(folder).gather(ids)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, torch.from_numpy(np.stack([flat[i].transpose(2, 0, 1) for i in ids])))

def test_no_file_is_open_before_the_first_gather(sources):
    def opened():
        return sorted(os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')
                      if os.path.exists(f'/proc/self/fd/{fd}') and os.readlink(f'/proc/self/fd/{fd}').endswith('.npy'))
    if not os.path.isdir('/proc/self/fd'):
        pytest.skip('this system does not list open files')
    before = opened()
    shards = data.Shards(sources[0])
    assert opened() == before
    shards.gather(np.array([1, 30]))
    assert len(opened()) == len(before) + 2

def test_more_shards_than_files_that_may_be_open(tmp_path):
    resource = pytest.importorskip('resource')
    images = write_source(tmp_path / 'a', 'CT', 600, size=8, shard=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        shards = data.Shards(tmp_path)
        for first in range(0, 600, 50):
            part = shards.gather(np.arange(first, first + 50))
            assert np.array_equal(part, np.broadcast_to(images[first:first + 50].transpose(0, 3, 1, 2), (50, 3, 8, 8)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

def epoch(shards, number, batch, world, accumulate=1):
    """One epoch's images: lists [step][rank * accumulate + micro-batch]."""
    steps = len(shards.train) // (batch * world * accumulate)
    slots = np.arange(steps * accumulate) + number * steps * accumulate
    plans = [[shards.plan(0, slot, batch, rank, world, len(slots)).tolist() for rank in range(world)] for slot in slots]
    return [sum(plans[first:first + accumulate], []) for first in range(0, len(plans), accumulate)]

def test_no_image_comes_twice_in_an_epoch_over_ranks_and_micro_batches(sources):
    shards = data.Shards(sources[0])
    for number in range(3):
        batches = sum(epoch(shards, number, 5, world=2, accumulate=2), [])
        drawn = sum(batches, [])
        assert len(batches) == 3 * 4 and all(len(batch) == 5 and batch == sorted(batch) for batch in batches)
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(shards.train.tolist())

def test_two_ranks_two_micro_batches_and_one_large_batch_take_the_same_images(sources):
    shards = data.Shards(sources[0])
    kinds = [epoch(shards, 1, 4, world=2), epoch(shards, 1, 4, world=1, accumulate=2), epoch(shards, 1, 8, world=1)]
    assert kinds[0] == kinds[1]         # micro-batch by micro-batch
    assert [sorted(sum(step, [])) for step in kinds[0]] == [step[0] for step in kinds[2]]

def test_the_order_follows_seed_and_epoch_alone(sources):
    first, second = data.Shards(sources[0]), data.Shards(sources[0])
    assert epoch(first, 0, 4, 1) != epoch(first, 1, 4, 1)
    assert {i for step in epoch(first, 0, 4, 1) for i in step[0]} == set(first.train.tolist())      # 64 images: nothing over
    assert epoch(second, 1, 4, 1) == epoch(first, 1, 4, 1)      # asked for epoch 1 at once, as a resumed run does
    assert first.plan(1, 0, 4, 0, 1, 9).tolist() != first.plan(0, 0, 4, 0, 1, 9).tolist()

def cut(source):
    path = source / '00001.npy'
    path.write_bytes(path.read_bytes()[:-100])

def miscount(source):
    (source / 'meta.json').write_text(json.dumps(dict(modality='CT', count=31)))

@pytest.mark.parametrize('spoil, named', [(cut, 'a: .*cut short'), (miscount, 'a: .*30.*31'),
                                          (lambda source: (source / '00001.npy').unlink(), 'a: .*16.*30'),
                                          (lambda source: (source / 'meta.json').write_text('{"mod'), 'a: .*JSON'),
                                          (lambda source: (source / 'meta.json').write_text('[]'), 'a: .*TypeError'),
                                          (lambda source: np.save(source / '00001.npy', np.ones((14, 32, 32, 1))), 'a: .*uint8'),
                                          (lambda source: np.save(source / '00001.npy', np.ones((14, 32, 16, 1), np.uint8)), 'a: .*S, S'),
                                          (lambda source: np.save(source / '00001.npy', np.ones((14, 32, 32), np.uint8)), 'a: .*S, S'),
                                          (lambda source: (source / 'meta.json').write_text('{"kind": ""}'), "a: a labelled task, for finetune.py"),
                                          (lambda source: (source / 'meta.json').write_text('{"count": 30}'), "a: .*'modality'")])
def test_damaged_sources_are_named(tmp_path, spoil, named):
    write_source(tmp_path / 'a', 'CT', 30)
    data.Shards(tmp_path)
    spoil(tmp_path / 'a')
    with pytest.raises(SystemExit, match=named):
        data.Shards(tmp_path)

def test_nothing_prepared_and_mixed_sizes_end_in_a_sentence(tmp_path):
    for folder in (tmp_path, tmp_path / 'missing'):
        with pytest.raises(SystemExit, match=f'{folder}: .*prepare_medverse'):
            data.Shards(folder)
    write_source(tmp_path / 'empty', 'CT', 0)
    with pytest.raises(SystemExit, match='no prepared images'):
        data.Shards(tmp_path)
    write_source(tmp_path / 'a', 'CT', 3, size=32)
    assert data.Shards(tmp_path).val.tolist() == [2]
    write_source(tmp_path / 'b', 'CT', 3, size=16)
    with pytest.raises(SystemExit, match=r'b: .*\[16, 32\]'):
        data.Shards(tmp_path)

def test_prefetch_keeps_the_order_and_stays_ahead():
    asked = []
    batches = data.prefetch(lambda number: asked.append(number) or number ** 2, range(20), threads=2, ahead=4)
    assert next(batches) == 0
    time.sleep(0.05)
    assert max(asked) <= 4
    assert list(batches) == [number ** 2 for number in range(1, 20)] and sorted(asked) == list(range(20))

def test_prefetch_passes_exceptions_on():
    def load(number):
        if number == 3:
            raise OSError('the disk is gone')
        return number
    batches = data.prefetch(load, range(9))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match='the disk is gone'):
        next(batches)

# ---------------------------------------------------------------------------------------------------------------------
# Augmentation

def pixel(image, x, y):
    """Bilinear value of image (3, S, S) at (x, y) in [-1, 1] (edges of the outermost pixels); black outside."""
    S = image.shape[1]
    column, row = ((x + 1) * S - 1) / 2, ((y + 1) * S - 1) / 2
    value = torch.zeros(3)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < S and 0 <= j < S:
                value += (1 - abs(row - i)) * (1 - abs(column - j)) * image[:, i, j]
    return value

def test_views_sample_bilinearly_through_the_matrix():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8)       # more than one chunk of four
    matrices, size = data.draw_views(6, 16 / 20, 'cpu'), 16
    out = data.views(images, size, matrices)
    for b, i, j in [(0, 0, 0), (1, 15, 3), (2, 7, 8), (4, 0, 15), (5, 11, 2)]:
        point = torch.tensor([(2 * j + 1) / size - 1, (2 * i + 1) / size - 1, 1])
        x, y = (matrices[b] @ point).tolist()
        torch.testing.assert_close(out[b, :, i, j], pixel(images[b] / 255, x, y), atol=1e-4, rtol=0)

def test_the_identity_view_is_the_image():
    images = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    torch.testing.assert_close(data.denormalize(data.center(images, 24)), images / 255, atol=1e-5, rtol=0)

def test_much_smaller_views_average_pixels_first():
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 200
    grey = torch.full((1, 3, 16, 16), 100 / 255)
    torch.testing.assert_close(data.denormalize(data.center(stripes, 16)), grey, atol=1e-5, rtol=0)

def test_draws_are_a_flip_a_small_rotation_and_a_crop_inside_the_image():
    torch.manual_seed(0)
    for zoom, smallest in ((0.25, 0.2), (0.5, 0.2), (0.8, 0.32), (1.0, 0.5)):
        m = data.draw_views(4000, zoom, 'cpu')
        flip = torch.sign(m[:, 0, 0])
        m[:, 0] *= flip[:, None]
        (a, b, x), (c, d, y) = m.transpose(0, 2).transpose(0, 1)
        angle, w, h = torch.atan2(c, a), torch.hypot(a, c), torch.hypot(b, d)
        assert (torch.atan2(-b, d) - angle).abs().max() < 1e-4      # no shear
        assert 0.45 < (flip < 0).float().mean() < 0.55
        assert 14.9 < angle.abs().max().rad2deg() < 15.001 and angle.mean().abs().rad2deg() < 1
        assert smallest - 1e-5 < (w * h).min() < smallest + 0.01 and max(w.max(), h.max()) < 1 + 1e-5 and (w * h).max() > 0.9
        assert 0.75 - 1e-4 < (w / h)[w * h < 0.7].min() < 0.78 and 1.29 < (w / h)[w * h < 0.7].max() < 4 / 3 + 1e-4
        centre = torch.stack([angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x])        # rotated back
        slack = 1 - torch.stack([w, h])
        assert (centre.abs() < slack + 1e-4).all() and (centre.abs() > 0.9 * slack).any()

def test_normalize_is_undone_by_denormalize():
    images = torch.rand(2, 3, 5, 5)
    normalized = data.normalize(images)
    torch.testing.assert_close(normalized[1, 2, 3, 4], (images[1, 2, 3, 4] - 0.406) / 0.225)
    torch.testing.assert_close(data.denormalize(normalized), images)

def test_nearly_black_views_are_drawn_again():
    images = torch.zeros(120, 3, 64, 64, dtype=torch.uint8)
    images[:, :, :22, :22] = 255        # one lit corner, which about half of the crops miss
    torch.manual_seed(0)
    once = (data.views(images, 32, data.draw_views(120, 0.5, 'cpu')).mean((1, 2, 3)) < 0.02).float().mean()
    black = (data.denormalize(data.augment(images, 32)).mean((1, 2, 3)) < 0.02).float().mean()
    assert once > 0.1 and black < once ** 4 + 0.02
    assert data.augment(torch.zeros_like(images[:4]), 32).isfinite().all()        # nothing else to draw: taken as it is

def test_augmentation_follows_the_seed():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(data.augment(images, 24))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert views[0].shape == (5, 3, 24, 24) and not torch.equal(*data.augment(images[:1].expand(2, -1, -1, -1), 24))
