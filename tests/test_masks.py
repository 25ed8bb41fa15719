"""Pixels of masks: which numbers are which class, in every kind of file."""
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support import files, folders, prepared, runs
from tests.support.folders import (
    BLOB, COLOURS, LPS, NAMED, ORGAN, REGIONS, SIDE, refused, task, write_pairs, write_scans)

TASKS = runs.ROOT.parent / 'shared/real/tasks'
real = pytest.mark.skipif(not TASKS.is_dir(), reason='no real images beside the repository')

def show(task, right, pictures=2, wrong=0):
    """Whether all masks of a task are right, but for so many pixels of each."""
    masks = list(task.answer.values())
    return len(masks) == pictures and all(np.sum(mask != right) <= wrong for mask in masks)

# --- numbers -------------------------------------------------------------------------------------

def test_without_values_the_numbers_of_a_mask_are_the_classes(tmp_path):
    write_pairs(tmp_path, REGIONS)
    assert show(task(tmp_path, '--classes', *'abc'), REGIONS)

@pytest.mark.parametrize('values, classes', [
    (['0', '10', '20'], [0, 1, 2]), (['0', '10+20'], [0, 1, 1]), (['10', '*'], [1, 0, 1]),
    (['*', '20'], [0, 0, 1]), (['0', '*', '10'], [0, 2, 1])])
def test_values_say_which_numbers_are_which_class(tmp_path, values, classes):
    """+ joins several, and * is all others."""
    write_pairs(tmp_path, 10 * REGIONS)
    found = task(tmp_path, '--values', *values, '--classes', *'abc'[:len(values)])
    assert show(found, np.uint8(classes)[REGIONS])

def test_255_is_not_scored_unless_it_is_named(tmp_path):
    mask = REGIONS.copy()
    mask[mask == 2] = 255
    write_pairs(tmp_path, mask)
    assert show(task(tmp_path, out='not named'), mask)
    assert show(task(tmp_path, '--values', '0', '1+255', out='named'), REGIONS > 0)

def test_the_advice_for_255_alone_leaves_it_out_of_the_scores(tmp_path):
    mask = np.uint8(255 * BLOB)
    write_pairs(tmp_path, mask)
    refused(tmp_path, naming=['0 1 255 and two --classes'])
    mask[:2, :2] = 1        # training must show two classes
    write_pairs(tmp_path, mask)
    found = task(tmp_path, '--values', '0', '1', '255', '--classes', 'a', 'b', out='advised')
    assert (mask == 255).any() and show(found, mask)

def test_values_after_those_of_the_classes_are_not_scored(tmp_path):
    write_pairs(tmp_path, REGIONS)
    found = task(tmp_path, '--values', '0', '1', '2', '--classes', 'a', 'b')
    assert show(found, np.uint8([0, 1, 255])[REGIONS])

def test_an_image_may_be_an_array_and_its_mask_a_picture(tmp_path):
    write_pairs(tmp_path, REGIONS)
    for path in tmp_path.glob('**/images/*.*'):
        np.save(path.with_suffix('.npy'), np.asarray(Image.open(path)))
        path.unlink()
    assert show(task(tmp_path, '--classes', *'abc'), REGIONS)

def test_a_mask_of_16_bits_keeps_its_numbers(tmp_path):
    write_pairs(tmp_path, np.uint16(BLOB) * 300)
    assert show(task(tmp_path, '--values', '0', '300'), BLOB)

def test_a_mask_of_floating_point_keeps_its_numbers(tmp_path):
    write_pairs(tmp_path, np.float32(BLOB), name='{}.tif')
    assert show(task(tmp_path), BLOB)

def test_a_mask_of_one_bit_is_black_and_white(tmp_path):
    write_pairs(tmp_path, BLOB > 0)
    assert show(task(tmp_path, '--values', '0', '255'), BLOB)

def test_a_mask_in_npy_may_be_bool(tmp_path):
    write_pairs(tmp_path, BLOB > 0, name='{}.npy')
    assert show(task(tmp_path), BLOB)

@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_a_mask_is_0(tmp_path, value):
    mask = np.float32(ORGAN)
    mask[0, 0] = value
    write_scans(tmp_path, LPS, LPS, mask)
    assert folders.agree(task(tmp_path, '--modality', 'CT', '--values', '0', '*'))

def test_a_star_stands_for_many_values(tmp_path):
    write_pairs(tmp_path, np.uint8(BLOB * (1 + files.noise(5) % 60)))
    assert show(task(tmp_path, '--values', '0', '*'), BLOB)

def test_a_class_that_no_mask_shows_stops_unless_allowed(tmp_path):
    write_pairs(tmp_path, BLOB * 255, count=4)
    words = '--values', '0', '255', '7', '--classes', *'abc'
    refused(tmp_path, *words, naming=['no training image shows c', '--values', '--partial'])
    found = task(tmp_path, *words, '--partial')
    row, = (line.split() for line in found.said.splitlines() if line.startswith('c '))
    assert row == ['c', '0', '0', '0']      # how many images of each split show it

def test_masks_of_255_alone_are_refused_and_told_how_to_name_it(tmp_path):
    write_pairs(tmp_path, BLOB * 255, count=4)
    refused(tmp_path, naming=['masks/?.png', '255 is its only foreground', '0 1+255'])

# --- several masks -------------------------------------------------------------------------------

def test_of_several_masks_each_is_a_class_and_later_ones_lie_over_earlier_ones(tmp_path):
    """A mask that is missing shows that its class is absent."""
    first = np.uint8(np.indices(BLOB.shape)[0] < 40)    # lies below most of the second
    write_pairs(tmp_path, first, count=4)
    for number in (0, 1, 2):
        files.save(tmp_path / f'raw/second/{number}.png', 255 * BLOB)
    rules = '--images', r'images/(\d)', '--masks', r'masks/(\d)', r'second/(\d)'
    found = task(tmp_path, *rules, '--classes', *'abc')
    assert found.classes == ['a', 'b', 'c']
    for path, mask in found.answer.items():
        assert np.array_equal(mask, np.where(BLOB, 2, first) if '3' not in path else first)

def test_a_class_that_a_later_mask_covers_everywhere_stops(tmp_path):
    write_pairs(tmp_path, BLOB, count=4)
    for number in range(4):
        files.save(tmp_path / f'raw/second/{number}.png', np.ones_like(BLOB))
    rules = '--images', r'images/(\d)', '--masks', r'masks/(\d)', r'second/(\d)'
    words = '--classes', 'none', 'lesion', 'organ'
    refused(tmp_path, *rules, *words, naming=['less than two', "'none', 'lesion'", 'order of --masks'])

@pytest.mark.parametrize('classes', [[], ['--classes', *'01'], ['--classes', *'0123']])
def test_several_masks_need_a_name_for_each_and_one_for_the_background(tmp_path, classes):
    write_pairs(tmp_path)
    rules = '--images', r'images/(\d)', '--masks', r'masks/(\d)', r'second/(\d)'
    files.save(tmp_path / 'raw/second/0.png', BLOB)
    refused(tmp_path, *rules, *classes, naming=['--classes'])

# --- colours -------------------------------------------------------------------------------------

def convert_colours(folder, *colours):
    return runs.program('convert', 'colours', folder / 'raw', 'masks/', *colours)

@pytest.mark.parametrize('end', ['png', 'bmp', 'tif'])
def test_colours_are_converted_to_numbers(tmp_path, end):
    write_pairs(tmp_path, COLOURS[REGIONS], name='{}.' + end)
    assert convert_colours(tmp_path, *NAMED).code == 0
    rules = '--images', r'images/(.*)\.', '--masks', r'numbers/masks/(.*)\.'
    assert show(task(tmp_path, *rules, '--classes', *'abc'), REGIONS)

def test_equal_channels_are_grey(tmp_path):
    opaque = np.full_like(BLOB, 255)
    write_pairs(tmp_path, np.dstack([255 * BLOB] * 3 + [opaque]))
    assert show(task(tmp_path, '--values', '0', '255'), BLOB)

def test_one_colour_beside_black_needs_no_name(tmp_path):
    write_pairs(tmp_path, COLOURS[BLOB])
    assert show(task(tmp_path, '--values', '0', '*'), BLOB)

def test_a_transparent_colour_is_converted_to_the_background(tmp_path):
    colours = COLOURS[REGIONS]
    opaque = np.full((*REGIONS.shape, 1), 255, np.uint8)
    opaque[REGIONS == 1] = 0
    write_pairs(tmp_path, np.concatenate([colours, opaque], 2))
    assert convert_colours(tmp_path, *NAMED).code == 0
    rules = '--masks', r'numbers/(.*)masks/(.*)\.'
    assert show(task(tmp_path, *rules, '--values', '0', '*'), REGIONS == 2)

def test_two_masks_that_would_become_one_file_are_refused(tmp_path):
    write_pairs(tmp_path, COLOURS[REGIONS])
    files.save(tmp_path / 'raw/masks/0.bmp', COLOURS[REGIONS])
    runs.ends(convert_colours(tmp_path, *NAMED), ['masks/0.png', 'rename one'])

@pytest.mark.parametrize('value', ['*', '255'])
@pytest.mark.parametrize('third', [(0, 255, 0), (255, 255, 255), (128, 0, 0)])
def test_several_colours_are_refused(tmp_path, value, third):
    colours = np.uint8([(0, 0, 0), (255, 0, 0), third])
    write_pairs(tmp_path, colours[REGIONS])
    refused(tmp_path, '--values', '0', value,
            naming=['masks/?.png', 'several colours', 'tests.lab.convert colours'])

def test_a_colour_without_a_name_is_refused(tmp_path):
    write_pairs(tmp_path, COLOURS[REGIONS])
    runs.ends(convert_colours(tmp_path, *NAMED[:2]), ['masks/0.png', '#00ff00'])

TRANSPARENT = {     # mask, values
    'white': (np.uint8([255] * 3), ['0', '*']), 'grey': (np.uint8([255]), ['0', '*']),
    'red': (np.uint8([255, 0, 0]), ['0', '*'])}

@pytest.mark.parametrize('name', TRANSPARENT)
def test_what_is_transparent_shows_nothing(tmp_path, name):
    colour, values = TRANSPARENT[name]
    everywhere = np.broadcast_to(colour, (SIDE, SIDE, len(colour)))
    write_pairs(tmp_path, np.dstack([everywhere, 255 * BLOB]))
    assert show(task(tmp_path, '--values', *values), BLOB)

# --- palettes ------------------------------------------------------------------------------------

def write_palette(folder, numbers, colours):
    """Masks of numbers that stand for colours."""
    picture = Image.fromarray(numbers)
    picture.putpalette(np.uint8(colours).flatten().tolist())
    write_pairs(folder, numbers)
    for number in range(2):
        picture.save(folder / f'raw/masks/{number}.png')

def test_a_palette_of_colours_gives_the_numbers(tmp_path):
    colours = [(0, 0, 0), (255, 255, 255), (0, 128, 0), (128, 128, 0)]
    write_palette(tmp_path, REGIONS, colours)
    assert show(task(tmp_path, '--values', *'012', '--classes', *'abc'), REGIONS)

def test_a_palette_of_colours_gives_the_numbers_even_if_only_black_and_white_are_shown(tmp_path):
    colours = [(0, 0, 0), (255, 255, 255), (0, 128, 0)]
    write_palette(tmp_path, BLOB, colours)
    assert show(task(tmp_path), BLOB)

def test_a_palette_of_greys_gives_the_greys(tmp_path):
    write_palette(tmp_path, REGIONS, [(0, 0, 0), (9, 9, 9), (9, 9, 9)])
    assert show(task(tmp_path, '--values', '0', '9'), REGIONS > 0)

# --- lossy files ---------------------------------------------------------------------------------

LOSSY = {'jpg': ('{}.jpg', dict(format='JPEG')), 'named png': ('{}.png', dict(format='JPEG')),
         'in a tiff': ('{}.tif', dict(compression='jpeg'))}

@pytest.mark.parametrize('kind', LOSSY)
@pytest.mark.parametrize('value', ['*', '255'])
def test_in_a_lossy_mask_the_nearest_value_counts(tmp_path, kind, value):
    name, form = LOSSY[kind]
    write_pairs(tmp_path, 255 * BLOB, name=name, quality=75, **form)
    assert show(task(tmp_path, '--values', '0', value), BLOB, wrong=0.03 * BLOB.sum())

@pytest.mark.parametrize('values', [[], ['0', '1'], ['0', '100'], ['0', '128', '255']])
@pytest.mark.parametrize('white', [255, 1, 100])
def test_lossy_masks_of_other_values_than_0_and_255_are_refused(tmp_path, values, white):
    """Also where they are 0 and 1, which would all become background."""
    write_pairs(tmp_path, white * BLOB, name='{}.jpg', quality=95)
    words = ['--values', *values] if values else []
    refused(tmp_path, *words, naming=['masks/?.jpg', 'lossy', 'PNG'])

@pytest.mark.parametrize('name', ['{}.jpg', '{}.png'])
def test_lossy_masks_of_colours_are_refused(tmp_path, name):
    write_pairs(tmp_path, COLOURS[REGIONS], name=name, format='JPEG', quality=95, subsampling=0)
    refused(tmp_path, naming=['masks/?', 'several colours'])
    runs.ends(convert_colours(tmp_path, *NAMED), ['masks/0', 'has the colour #'])

# --- real masks ----------------------------------------------------------------------------------

@real
@pytest.mark.slow
def test_real_outlines_of_heads_are_filled(tmp_path):
    shutil.copytree(TASKS / 'HC18', tmp_path / 'raw')
    assert runs.program('convert', 'outline', tmp_path / 'raw', '_Annotation').code == 0
    rules = '--images', r'(.*HC)\.png', '--masks', 'filled/(.*)_Annotation', '--values', '0', '255'
    words = '--task', 'heads', *rules
    assert prepared.prepare(tmp_path / 'raw', tmp_path / 'out', *words).code == 0
    found = prepared.task(tmp_path / 'out')
    assert found.counts == dict(train=30, val=12, test=18)
    assert all(0.02 < mask.mean() < 0.7 for mask in found.answers['train'])

@real
@pytest.mark.slow
def test_real_masks_of_one_bit_show_vessels(tmp_path):
    rules = '--images', r'(.*)\.jpg', '--masks', '(.*)_1stHO', '--values', '0', '255'
    words = '--task', 'vessels', *rules, '--patient', r'Image_\d+'
    assert prepared.prepare(TASKS / 'CHASEDB1', tmp_path / 'out', *words).code == 0
    found = prepared.task(tmp_path / 'out')
    assert found.counts == dict(train=14, val=4, test=10)
    assert 0.05 < found.answers['test'].mean() < 0.12
