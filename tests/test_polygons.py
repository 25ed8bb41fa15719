"""Polygons and boxes in text files, as YOLO writes them, become masks by tests.lab.convert."""
import numpy as np

from tests.support import files, prepared, runs
from tests.support.prepared import prepare

LINES = '0 .1 .1 .4 .1 .4 .4 .1 .4\n1 .6 .6 .9 .6 .9 .9 .6 .9\n'

def task(folder, *words, lines=LINES):
    """The Result for eight images of 64 x 64 pixels, each with these lines."""
    for number in range(8):
        files.save(folder / f'raw/images/{number}.png', files.texture(number, 64, 64))
        files.write(folder / f'raw/labels/{number}.txt', lines)
    assert runs.program('convert', 'yolo', folder / 'raw').code == 0
    return prepare(folder / 'raw', folder / 'out', '--task', 'mini', *words)

def areas(folder):
    """Pixels of each class in the first mask of training."""
    masks = prepared.task(folder / 'out').answers['train']
    return np.bincount(masks[0].ravel(), minlength=3).tolist()

def test_the_number_of_a_line_is_its_class(tmp_path):
    assert task(tmp_path, '--classes', 'none', 'a', 'b').code == 0
    _, first, second = areas(tmp_path)
    assert abs(first - 400) < 30 and abs(second - 400) < 30

def test_the_number_of_a_line_is_a_value_of_the_mask(tmp_path):
    assert task(tmp_path, '--values', '0', '2', '1', '--classes', 'none', 'b', 'a').code == 0
    mask = prepared.task(tmp_path / 'out').answers['train'][0]
    assert (mask[10, 10], mask[50, 50]) == (2, 1)

def test_a_star_takes_all_numbers(tmp_path):
    assert task(tmp_path, '--values', '0', '*').code == 0
    assert abs(areas(tmp_path)[1] - 800) < 60

def test_a_number_without_a_class_is_named(tmp_path):
    result = task(tmp_path, lines=LINES.replace('\n1 ', '\n7 '))
    runs.ends(result, ['masks/0.png', 'values 8,'])

def test_two_pairs_of_numbers_are_the_centre_and_the_sides_of_a_box(tmp_path):
    assert task(tmp_path, lines='0 .25 .5 .25 .5\n').code == 0
    mask = prepared.task(tmp_path / 'out').answers['train'][0]
    assert mask[17:47, 9:23].all() and abs(int(mask.sum()) - 16 * 32) < 60

def test_masks_of_lines_are_told_how_to_be_drawn(tmp_path):
    task(tmp_path)
    rules = '--images', r'images/(.*)\.', '--masks', r'labels/(.*)\.'
    result = prepare(tmp_path / 'raw', tmp_path / 'two', '--task', 'mini', *rules)
    runs.ends(result, ['labels/', '.txt', 'YOLO (use tests.lab.convert)'])
