"""Splits of labelled tasks: those that a data set comes with, and those that are drawn."""
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support import files, folders
from tests.support.folders import refused, task, write_animals, write_pairs

def patients_of(task, expression):
    """{split: the set of its patients}, whom the expression finds in the paths."""
    return {part: {re.search(expression, path)[0] for path in paths}
            for part, paths in task.split.items()}

def write_eyes(folder, patients):
    """A picture of each eye of patients 0, 1, ..., and its mask."""
    for number in range(patients):
        for eye in 'LR':
            picture = files.noise(2 * number + (eye == 'R'))
            files.save(folder / f'raw/images/p{number:02d}{eye}.png', picture)
            files.save(folder / f'raw/masks/p{number:02d}{eye}.png', folders.BLOB)

# --- folders that a data set comes with ----------------------------------------------------------

OFFICIAL = [('Training', 'Testing'), ('TRAIN', 'Test'), ('Training Set', 'test_images'),
            ('training', 'validation', 'testing'), ('train', 'Valid', 'test'),
            ('train', 'val', 'test')]

@pytest.mark.parametrize('names', OFFICIAL, ids=' '.join)
@pytest.mark.parametrize('below', ['{part}/{kind}', 'set/{part}/{kind}'])
def test_folders_of_splits_are_taken_as_they_are(tmp_path, names, below):
    for number, name in enumerate(names):
        place = below.replace('{part}', name)
        write_animals(tmp_path, place, seed=50 * number)
    found = task(tmp_path)
    parts = ('train', 'val', 'test') if len(names) == 3 else ('train', 'test')
    assert {(path.split('/')[-3], part) for path, part in found.where.items()} == {
        *zip(names, parts)}
    assert len(found.where) == 6 * len(names)

@pytest.mark.parametrize('second', ['val', 'Valid', 'validation'])
def test_where_no_folder_is_for_testing_that_part_can_be_drawn_from_training(tmp_path, second):
    write_animals(tmp_path, 'train/{kind}', names='0123456789')
    write_animals(tmp_path, second + '/{kind}', seed=50)
    refused(tmp_path, naming=['no image is for testing', '--split'])
    found = task(tmp_path, '--split', '70', f'^{second}/', '30')
    assert found.counts == dict(train=14, val=6, test=6)
    assert {path.split('/')[0] for path in found.split['val']} == {second}
    assert {path.split('/')[0] for path in found.split['test']} == {'train'}

def test_a_folder_alone_that_is_called_train_is_none_of_three(tmp_path):
    write_animals(tmp_path, 'train/{kind}', names='0123456789')
    found = task(tmp_path)
    assert found.counts == dict(train=10, val=4, test=6)
    assert "{'train': 10, 'val': 4, 'test': 6}" in found.said

def test_patients_in_two_splits_that_a_data_set_comes_with_are_named(tmp_path):
    write_animals(tmp_path, 'train/{kind}', names=['p1_0', 'p2_0'])
    write_animals(tmp_path, 'test/{kind}', names=['p1_1', 'p3_0'], seed=50)
    warning, = re.findall('warning.*patients.*', task(tmp_path, '--patient', r'(p\d)_').said)
    assert re.findall(r'\bp\d\b', warning) == ['p1'] and 'more than one split' in warning

# --- rules and lists -----------------------------------------------------------------------------

def test_a_rule_is_searched_in_the_path_of_the_image_or_of_its_mask(tmp_path):
    for number in range(4):
        files.save(tmp_path / f'raw/images/{number}.png', files.noise(number))
        kind = 'one' if number < 3 else 'two'
        files.save(tmp_path / f'raw/masks/{kind}/{number}.png', folders.BLOB)
    rules = ['--images', r'images/(\d)', '--masks', r'masks/.*/(\d)']
    rules += ['--split', '[01].png', '', 'TWO']
    refused(tmp_path, *rules, naming=['images/2.png', 'no rule of --split'])
    found = task(tmp_path, *rules, '--skip', '2.png')
    assert found.where == {'images/0.png': 'train', 'images/1.png': 'train', 'images/3.png': 'test'}

def test_of_two_rules_that_find_an_image_the_first_decides(tmp_path):
    write_pairs(tmp_path, count=4)
    found = task(tmp_path, '--split', '[01]', '[12]', '.')
    assert {part: len(paths) for part, paths in found.split.items()} == dict(train=2, val=1, test=1)
    assert found.where['images/1.png'] == 'train'

def test_shares_divide_what_no_rule_takes(tmp_path):
    write_pairs(tmp_path, count=10)
    found = task(tmp_path, '--split', '1', '1', 'images/[0-5]')
    assert found.counts == dict(train=2, val=2, test=6)
    assert found.split['test'] == [f'images/{number}.png' for number in range(6)]

@pytest.mark.parametrize('line', ['{}.png\n', ' {} \r\n', '\ufeff{}\n', 'cat/{}.png\n'], ids=ascii)
def test_a_list_names_the_images_of_a_split(tmp_path, line):
    names = dict(train='case 01', val='1.2.3', test='c')
    for number, (part, name) in enumerate(names.items()):
        files.save(tmp_path / f'raw/cat/{name}.png', files.noise(number))
        files.save(tmp_path / f'raw/masks/{name}.png', folders.BLOB)
        files.write(tmp_path / f'raw/{part}.txt', line.format(name))
    rules = '--images', r'cat/(.*)\.png', '--masks', r'masks/(.*)\.png'
    found = task(tmp_path, *rules, '--split', 'train.txt', 'val.txt', 'test.txt')
    assert found.where == {f'cat/{name}.png': part for part, name in names.items()}

def test_a_line_of_a_list_that_names_two_images_is_refused(tmp_path):
    write_animals(tmp_path)
    files.write(tmp_path / 'raw/test.txt', 'cat/1\n2\n')
    refused(tmp_path, '--split', '1', '0', 'test.txt',
            naming=['test.txt', '2 ', 'cat/2.png', 'dog/2.png'])

@pytest.mark.parametrize('rules, named', [
    (['none.txt', 'train.txt', 'train.txt'], ['none.txt']),
    (['train.txt'] * 3, ['no rule of --split']),
    (['0', '0', '0'], ['no rule of --split']),
    (['0.5', '0.2', '0.3'], ['no rule of --split']),
    (['70', '30'], ['--split', '3 arguments'])])
def test_a_split_that_cannot_be_meant_is_refused(tmp_path, rules, named):
    write_animals(tmp_path)
    files.write(tmp_path / 'raw/train.txt', 'cat/0\ndog/0')
    refused(tmp_path, '--split', *rules, naming=named)

# --- drawn by patient ----------------------------------------------------------------------------

@pytest.mark.parametrize('patients', [3, 11, 30])
def test_20_and_30_percent_of_the_patients_are_drawn_for_validation_and_test(tmp_path, patients):
    """Of the share for testing the ceiling, of that for validation the floor: Table 3's counts."""
    write_eyes(tmp_path, patients)
    found = task(tmp_path, '--patient', r'p\d+')
    drawn = patients_of(found, r'p\d+')
    test, val = int(np.ceil(patients * 0.3)), int(patients * 0.2)
    assert {part: len(them) for part, them in drawn.items()} == dict(
        train=patients - test - val, val=val, test=test)
    assert len(set.union(*drawn.values())) == patients      # nobody is in two
    assert found.counts == {part: 2 * len(them) for part, them in drawn.items()}

def test_another_seed_draws_another_split(tmp_path):
    write_eyes(tmp_path, 11)
    words = '--patient', r'p\d+'
    first = task(tmp_path, *words, out='first').split
    assert task(tmp_path, *words, out='again').split == first
    assert task(tmp_path, *words, '--seed', 1, out='other').split != first

def test_a_patient_is_what_the_group_of_the_rule_finds(tmp_path):
    for number in range(10):
        for eye in 'LR':
            files.save(tmp_path / f'raw/images/child{number}_{eye}.png', files.noise(number))
            files.save(tmp_path / f'raw/masks/child{number}_{eye}.png', folders.BLOB)
    drawn = patients_of(task(tmp_path, '--patient', 'child([0-9])_[LR]'), r'\d')
    assert {part: len(them) for part, them in drawn.items()} == dict(train=5, val=2, test=3)
    assert len(set.union(*drawn.values())) == 10

def test_a_rule_of_patients_that_finds_nobody_is_refused(tmp_path):
    write_eyes(tmp_path, 3)
    refused(tmp_path, '--patient', 'chld[0-9]', naming=['--patient', '6 of 6 are left over', 'p00L'])

@pytest.mark.parametrize('few, counts', [
    (1, dict(train=1, val=0, test=0)), (2, dict(train=1, val=0, test=1)),
    (3, dict(train=2, val=0, test=1))])
def test_of_a_class_of_few_images_one_is_left_for_training(tmp_path, few, counts):
    write_animals(tmp_path, names='0123456789')
    write_animals(tmp_path, names='012'[:few], kinds=['rare'], seed=900)
    found = task(tmp_path)
    assert counts == {part: sum(path.startswith('rare') for path in paths)
                      for part, paths in found.split.items()}

# --- the same picture in two splits --------------------------------------------------------------

def test_pictures_that_are_the_same_in_training_and_test_are_counted(tmp_path):
    """Their files may differ."""
    write_animals(tmp_path, 'train/{kind}')
    write_animals(tmp_path, 'test/{kind}', seed=50)
    for name in ('cat/0', 'cat/1', 'dog/2'):
        shutil.copy(tmp_path / f'raw/train/{name}.png', tmp_path / f'raw/test/{name}.png')
    copy = Image.open(tmp_path / 'raw/train/dog/0.png')
    copy.save(tmp_path / 'raw/test/dog/0.png', compress_level=1)
    warning, = re.findall('warning.* the same in .*', task(tmp_path).said)
    assert '4 images' in warning and 'train' in warning and 'test' in warning

@pytest.mark.parametrize('twins', [False, True])
def test_pictures_that_a_drawn_split_parts_from_their_twins_are_counted(tmp_path, twins):
    write_animals(tmp_path, names='01234567')
    for path in [*(tmp_path / 'raw').glob('*/?.png')] if twins else []:
        shutil.copy(path, path.with_stem(path.stem + 'b'))
    found = task(tmp_path)
    holders = {}
    for part, images in found.images.items():
        for image in images:
            holders.setdefault(image.tobytes(), set()).add(part)
    shared = sum(len(parts) > 1 for parts in holders.values())
    told = re.findall(r'warning: (\d+) images are the same', found.said)
    assert (shared > 0) == twins and sum(map(int, told)) == shared

def test_a_patient_that_a_rule_finds_as_nothing_is_none(tmp_path):
    """Of alternatives only one takes part; the others are no patient of all the rest."""
    for number in range(16):
        part = 'a' if number < 8 else 'b'
        files.save(tmp_path / f'raw/{part}/{part}{number % 8}_0.png', files.noise(number))
    refused(tmp_path, '--patient', r'/a(\d)_|/b(\d)_', naming=['--patient', 'b/b0_0.png'])
