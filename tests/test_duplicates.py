"""Near-duplicates: a picture that repeats an earlier one of its source is dropped
(paper, C.1.1)."""
import numpy as np
import pytest
from PIL import Image

from tests.support import files, prepared, runs

SIZE = prepared.SIZE

def twins(*pictures):
    """Which earlier one each of the pictures, uint8 (S, S), repeats: its number, or None."""
    twin_or_add, seen = runs.module('prepare_medverse').twin_or_add, {}
    return [twin_or_add(np.reshape(picture, (*np.shape(picture), 1)), number, seen)
            for number, picture in enumerate(pictures)]

def thumbnail(image, width=SIZE, height=SIZE):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))

def test_smaller_copies_of_a_picture_are_found_and_other_pictures_are_not():
    images = [files.texture(seed, 200, 260) for seed in range(40)]
    copies = [thumbnail(image, 180, 140) for image in images]
    found = twins(*map(thumbnail, [*images, *copies]))
    assert found[:40] == [None] * 40
    assert all(twin in (None, number) for number, twin in enumerate(found[40:]))
    assert found[40:].count(None) <= 4

def test_pictures_whose_hashes_differ_in_one_bit_are_twins_and_in_two_bits_are_not():
    """A hash has a bit for each of 8 x 8 pairs of neighbouring cells: is the left one darker?"""
    cells = np.random.default_rng(9).permutation(72).reshape(8, 9).astype(np.uint8) * 3
    cells[2, 3:5] = cells[5, 6:8] = 100, 101
    one_bit = cells.copy()
    one_bit[2, 3:5] = 101, 100
    two_bits = one_bit.copy()
    two_bits[5, 6:8] = 101, 100
    squares = [np.kron(grid, np.ones((9, 8), np.uint8)) for grid in (cells, one_bit, two_bits)]
    assert twins(*squares) == [None, 0, None]

def test_pictures_of_one_hash_must_also_be_alike():
    """Discs on black have few hashes."""
    line = np.linspace(-1, 1, SIZE)
    disc = np.hypot(*np.meshgrid(line, line)) < 0.95
    dark, bright = np.uint8(disc * 60), np.uint8(disc * 200)
    assert twins(dark, bright, dark) == [None, None, 0]

def test_slices_of_a_volume_may_repeat_each_other_and_pictures_may_not(tmp_path):
    """Neighbouring slices are alike by nature, and Table 2 of the paper counts them all."""
    image = files.texture(0)
    files.save(tmp_path / 'raw/MR/a/stack.npy', np.stack([image] * 4))
    files.save(tmp_path / 'raw/MR/a/x.png', image)
    files.save(tmp_path / 'raw/MR/a/y.png', image)
    assert prepared.prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    found = prepared.Prepared(tmp_path / 'out')
    assert len(found.images('a')) == 5
    assert found.dropped('a') == [
        dict(path='y.png', slice='0', reason='duplicate', detail='of x.png')]

@pytest.mark.parametrize('name', ['stack.tif', 'stack.gif'])
def test_pages_of_a_stack_of_8_bits_are_slices_which_may_repeat_each_other(tmp_path, name):
    pages = [Image.fromarray(files.texture(0) // 2 + number) for number in range(4)]
    pages[0].save(files.parent(tmp_path / 'raw/OCT/a' / name), save_all=True,
                  append_images=pages[1:])
    assert prepared.prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    found = prepared.Prepared(tmp_path / 'out')
    assert len(found.images('a')) == 4 and found.dropped('a') == []
