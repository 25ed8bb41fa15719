"""Mistakes of a first try: each ends in a sentence that says which one it is and what to do, or is
understood as it was meant and told."""
import numpy as np
import pytest

from tests.support import files, folders
from tests.support.folders import BLOB, SIDE, refused, task, write_animals, write_pairs

IMAGES, MASKS = r'images/(.*)\.', r'masks/(.*)\.'

# --- ids of a table or list ----------------------------------------------------------------------

def write_numbers(folder, names, rows, head='file,kind'):
    """Pictures with these names, and the table labels.csv."""
    for number, name in enumerate(names):
        files.save(folder / f'raw/img/{name}.png', files.noise(number))
    files.write(folder / 'raw/labels.csv', '\n'.join([head, *rows]))

def test_ids_that_lost_their_leading_zeros_are_found_and_told(tmp_path):
    names = [f'{number:03d}' for number in range(95, 105)]
    rows = [f'{int(name)},{"cat" if int(name) % 2 else "dog"}' for name in names]
    write_numbers(tmp_path, names, rows)
    found = task(tmp_path, '--labels', 'labels.csv')
    assert {path: found.classes[label] for path, label in found.answer.items()} == {
        f'img/{name}.png': 'cat' if int(name) % 2 else 'dog' for name in names}
    assert 'rows of labels.csv: 10 = 10 used + 0 left out' in found.said

@pytest.mark.parametrize('names, entry', [(['03', '3'], '3'), (['004', '04'], '4')])
def test_an_id_that_two_names_have_but_for_zeros_is_refused(tmp_path, names, entry):
    write_numbers(tmp_path, ['001', *names], ['001,cat', f'{entry},dog'])
    refused(tmp_path, '--labels', 'labels.csv', naming=['labels.csv', f'{entry} may be any of'])

def test_lists_may_lack_leading_zeros_too(tmp_path):
    write_pairs(tmp_path, count=4, image='00{}.png', name='00{}.png')
    files.write(tmp_path / 'raw/test.txt', '1\n3\n')
    found = task(tmp_path, '--split', '1', '0', 'test.txt')
    assert found.split['test'] == ['images/001.png', 'images/003.png']

def test_each_row_of_a_table_is_counted_also_if_it_is_there_twice(tmp_path):
    rows = [f'{number},{kind}' for number, kind in enumerate(['cat', 'dog'] * 4)]
    write_numbers(tmp_path, '01234567', [*rows, rows[0], rows[0], rows[5]])
    found = task(tmp_path, '--labels', 'labels.csv')
    assert 'rows of labels.csv: 11 = 11 used + 0 left out' in found.said

# --- folders of classes --------------------------------------------------------------------------

def write_patients(folder, count=3):
    """Images of two classes, in folders of patients 0 to 3: patients 0 and 1 have both names."""
    for kind in folders.KINDS:
        for patient in (0, 1):
            write_animals(folder, f'{kind}/patient{patient}', names='012'[:count], kinds=[kind],
                          seed=10 * patient)

def test_class_folders_one_level_too_deep_stop_and_show_both_readings(tmp_path):
    write_patients(tmp_path)
    sentence = refused(tmp_path, naming=['--level 1: {\'patient0\': 6, ', '--level 2: {\'cat\': 6'])
    assert "'dog': 6" in sentence
    found = task(tmp_path, '--level', 2)
    assert found.classes == ['cat', 'dog'] and len(found.where) == 12
    assert all(found.classes[label] == path[:3] for path, label in found.answer.items())
    assert task(tmp_path, '--level', 1, out='near').classes == ['patient0', 'patient1']

def test_classes_a_third_as_many_as_images_stop(tmp_path):
    for number in range(6):
        kind = folders.KINDS[number % 2]
        write_animals(tmp_path, f'{kind}/p{number}', names='012', kinds=[kind], seed=10 * number)
    refused(tmp_path, naming=["'p0': 3, 'p2': 3", "2: {'cat': 9, 'dog': 9}"])

@pytest.mark.parametrize('below', ['{kind}', 'set/{kind}', '{kind}/train', 'train/{kind}'])
def test_class_folders_elsewhere_than_below_each_other_need_no_level(tmp_path, below):
    write_animals(tmp_path, below)
    assert task(tmp_path).classes == ['cat', 'dog']

def test_images_without_folders_are_told_to_need_a_class(tmp_path):
    for number in range(3):
        files.save(tmp_path / f'raw/{number}.png', files.noise(number))
    refused(tmp_path, naming=['no image has a class', '0.png', 'COCO'])

# --- rules of pairs ------------------------------------------------------------------------------

@pytest.mark.parametrize('rules, told', [
    ((r'images/.*\.png', MASKS), ['groups ( )', r'images/.*\.png finds images/0.png;']),
    ((r'(images)/(.*)\.', MASKS), ["finds ('images', '0')", "finds ('0',)"]),
    ((r'pictures/(.*)\.', MASKS), ['pictures/(.*)\\. finds no file'])])
def test_the_rule_that_cannot_pair_is_named(tmp_path, rules, told):
    write_pairs(tmp_path)
    refused(tmp_path, '--images', rules[0], '--masks', rules[1], naming=told)

@pytest.mark.parametrize('names, told', [
    (('{}.png', '00{}.png'), ["('0',)", "('000',)"]),
    (('case{}.png', 'Case{}.png'), ["('case0',)", "('Case0',)"]),
    (('{}.png', '{}_seg.png'), ["('0',)", "('0_seg',)"])])
def test_names_that_nearly_pair_are_shown_beside_each_other(tmp_path, names, told):
    write_pairs(tmp_path, image=names[0], name=names[1])
    refused(tmp_path, '--images', IMAGES, '--masks', MASKS, naming=['images have no masks', *told])

def test_many_files_of_one_pair_are_not_all_named(tmp_path):
    write_pairs(tmp_path, count=28)
    rules = '--images', r'(.)/0\.', '--masks', r'mask(.)/'
    sentence = refused(tmp_path, *rules, naming=['cannot be a pair', 'images/0.png', '--objects'])
    assert sentence.count('.png') == 3

# --- several masks of an image -------------------------------------------------------------------

def write_objects(folder):
    """Two images with three masks each, one an object, of 255; returns what they unite to."""
    union = np.zeros((SIDE, SIDE), np.uint8)
    for thing in range(3):
        union[10 * thing:10 * thing + 8, 5:30] = 1
        for number in range(2):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[10 * thing:10 * thing + 8, 5:30] = 255
            files.save(folder / f'raw/masks/{number}/{thing}.png', mask)
    for number in range(2):
        files.save(folder / f'raw/images/{number}.png', files.noise(number))
    return union

def test_masks_of_single_objects_are_united(tmp_path):
    union = write_objects(tmp_path)
    rules = '--images', r'images/(\d)', '--masks', r'masks/(\d)/'
    refused(tmp_path, *rules, naming=['--objects'])
    found = task(tmp_path, *rules, '--objects')
    assert len(found.answer) == 2
    assert all(np.array_equal(mask, union) for mask in found.answer.values())
    assert 'used + 0 left out' in found.said and '6 = 6' in found.said

def test_objects_of_several_classes_keep_their_classes(tmp_path):
    union = write_objects(tmp_path)
    for number in range(2):
        files.save(tmp_path / f'raw/others/{number}/0.png', 255 * BLOB)
    rules = '--images', r'images/(\d)', '--masks', r'masks/(\d)/', r'others/(\d)/'
    found = task(tmp_path, *rules, '--objects', '--classes', *'abc')
    right = np.where(BLOB, 2, union)
    assert all(np.array_equal(mask, right) for mask in found.answer.values())

# --- masks and tables that are not read ----------------------------------------------------------

def test_slices_without_a_mask_are_counted(tmp_path):
    for number in range(2):
        files.save(tmp_path / f'raw/images/{number}.npy', np.stack([files.noise(number)] * 6))
        files.save(tmp_path / f'raw/masks/{number}.npy', np.stack([BLOB] * 5))
    refused(tmp_path, naming=['it has 6 images or slices, its mask 5'])

def test_a_damaged_volume_is_named(tmp_path):
    for number in range(2):
        files.write(tmp_path / f'raw/images/{number}.nii', 'no volume')
        files.write(tmp_path / f'raw/masks/{number}.nii', 'no volume')
    refused(tmp_path, naming=['.nii', 'Cannot work out file type'])

def test_masks_in_json_are_told_not_to_be_read(tmp_path):
    write_pairs(tmp_path, name='{}.png')
    for number in range(2):
        (tmp_path / f'raw/masks/{number}.png').rename(tmp_path / f'raw/masks/{number}.json')
    refused(tmp_path, naming=['masks/?.json', 'LabelMe', 'draw PNG masks'])

def test_a_table_of_json_is_told_not_to_be_read(tmp_path):
    write_animals(tmp_path)
    files.write(tmp_path / 'raw/instances.json', '{"images": [{"id": 1}], "annotations": []}')
    refused(tmp_path, '--labels', 'instances.json',
            naming=['no image has a class', 'COCO', 'draw PNG'])

