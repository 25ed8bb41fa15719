"""Classes of labelled tasks: which folders name them, their spelling, sides and values."""
import numpy as np
import pytest

from tests.support import files, prepared, runs
from tests.support.prepared import prepare

def write(folder, kinds, below='{}', count=10):
    for start, kind in enumerate(kinds):
        for number in range(count):
            name = f'{start}-{number}.png'
            picture = files.texture(99 * start + number)
            files.save(folder / 'raw' / below.format(kind) / name, picture)

def write_pairs(folder, masks, ending='png', **more):
    """Images 0, 1, ... with these masks."""
    for number, mask in enumerate(masks):
        files.save(folder / f'raw/images/{number}.png', files.texture(number, *mask.shape))
        files.save(folder / f'raw/masks/{number}.{ending}', mask, **more)

def task(folder, *words):
    return prepare(folder / 'raw', folder / 'out', '--task', 'mini', *words)

@pytest.mark.parametrize('kinds', [('Normal', 'normal'), ('Sick', 'Sick '), ('no DR', 'noDR')])
def test_classes_that_differ_in_case_or_blanks_alone_stop(tmp_path, kinds):
    write(tmp_path, ['cat', *kinds])
    runs.ends(task(tmp_path), [*kinds, 'one spelling'])

@pytest.mark.parametrize('kinds, sided', [
    (('kidney-left', 'kidney-right'), True), (('lung L', 'lung R'), True), (('OD', 'OS'), True),
    (('oculus dexter', 'oculus sinister'), True),
    (('cat', 'dog'), False), (('grade-l', 'grade-m'), False)])
def test_classes_that_name_sides_are_told_to_fine_tuning(tmp_path, kinds, sided):
    write(tmp_path, kinds)
    assert task(tmp_path).code == 0
    assert prepared.task(tmp_path / 'out').meta['sided'] is sided

def test_sides_can_be_told_by_an_option(tmp_path):
    write(tmp_path, ['cat', 'dog'])
    assert task(tmp_path, '--sided').code == 0
    assert prepared.task(tmp_path / 'out').meta['sided'] is True

def test_255_among_masks_of_1_stops_and_says_how_to_name_it(tmp_path):
    masks = [files.blob(number) * np.uint8(255 if number % 2 else 1) for number in range(6)]
    write_pairs(tmp_path, masks)
    runs.ends(task(tmp_path), ['masks/', '255', '0 1+255'])

@pytest.mark.parametrize('values, answers', [
    (('0', '1+255'), {0, 1}), (('0', '1', '255'), {0, 1, 255})])
def test_255_may_be_named_as_the_class_or_as_not_scored(tmp_path, values, answers):
    masks = [files.blob(number) * np.uint8(255 if number % 2 else 1) for number in range(8)]
    write_pairs(tmp_path, masks)
    words = '--values', *values, '--classes', 'none', 'organ', '--split', '100', '0', '10'
    result = task(tmp_path, *words)
    assert result.code == 0, result.err
    assert {*np.unique(prepared.task(tmp_path / 'out').answers['train'])} == answers

def test_numbers_that_rounding_changed_are_whole(tmp_path):
    for number in range(4):
        mask = np.stack([files.blob(number, 48)] * 4, 2) * np.float32(0.99999994)
        volume = np.stack([files.texture(number, 48, 48)] * 4, 2).astype(np.int16)
        files.nifti(tmp_path / f'raw/images/{number}.nii', volume, spacing=(1, 1, 3))
        files.nifti(tmp_path / f'raw/masks/{number}.nii', mask, spacing=(1, 1, 3))
    result = task(tmp_path, '--modality', 'MR')
    assert result.code == 0, result.err

def test_values_hold_for_each_of_several_masks(tmp_path):
    """The first is outside, the second inside, whatever the numbers are."""
    for number in range(4):
        files.save(tmp_path / f'raw/images/{number}.png', files.texture(number, 64, 64))
        for kind, seed in ('a', 3), ('b', 5):
            path = files.parent(tmp_path / f'raw/{kind}/{number}.png')
            files.save(path, np.where(files.blob(seed, 64) > 0, 7, 9).astype(np.uint8))
    words = '--images', 'images/(.*)', '--masks', 'a/(.*)', 'b/(.*)', '--classes', *'xyz'
    assert task(tmp_path, *words, '--values', '9', '7').code == 0
    mask = prepared.task(tmp_path / 'out').answers['train'][0]
    expected = np.where(files.blob(5, 64) > 0, 2, files.blob(3, 64))
    assert np.array_equal(mask, expected)

def test_exif_of_value_0_does_not_turn_an_image(tmp_path):
    for number in range(4):
        for kind, array in ('images', files.texture(number)), ('masks', files.blob(number)):
            files.save(tmp_path / f'raw/{kind}/{number}.png', array, exif=files.turned(0))
    assert task(tmp_path).code == 0

@pytest.mark.parametrize('axes', ['LPS', 'ASR', 'SRP'])
def test_a_mask_in_another_order_of_axes_lies_where_its_image_does(tmp_path, axes):
    for number in range(4):
        volume = np.stack([files.texture(7 * number + z, 48, 40) for z in range(5)], 2)
        volume = volume.astype(np.int16)
        place = dict(spacing=(1, 1, 3))
        files.nifti(tmp_path / f'raw/images/{number}.nii', volume, **place)
        mask = np.uint8(volume > 150)
        files.nifti(tmp_path / f'raw/masks/{number}.nii', mask, axes=axes, **place)
    result = task(tmp_path, '--modality', 'MR', '--size', '48')
    assert result.code == 0, result.err
    found = prepared.task(tmp_path / 'out')
    for image, mask in zip(found.images['train'], found.answers['train']):
        inside, outside = image[..., 0][mask == 1], image[..., 0][mask == 0]
        assert inside.mean() > outside.mean() + 40

# --- splits of their own -------------------------------------------------------------------------

NAMES = [('TrainDataset/images', 'TestDataset/images'), ('TRAIN1', 'TEST1'),
         ('01_train', '02_test'), ('train_imgs', 'test_imgs'), ('imagesTr', 'imagesTs')]

@pytest.mark.parametrize('names', NAMES, ids=' '.join)
def test_folders_that_name_a_split_are_it(tmp_path, names):
    for start, name in enumerate(names):
        write(tmp_path, ['cat', 'dog'], f'{name}/{{}}', count=4 + 2 * start)
    result = task(tmp_path)
    assert result.code == 0, result.err
    found = prepared.task(tmp_path / 'out')
    assert found.counts == dict(train=8, val=0, test=12)
    assert "{'train': 8, 'val': 0, 'test': 12}" in result.out
    assert {path.split('/')[0] for path in found.split['test']} == {names[1].split('/')[0]}

def test_the_layout_of_nnunet_needs_no_rule(tmp_path):
    for start, part in enumerate(('Tr', 'Ts')):
        for number in range(3):
            volume = np.stack([files.texture(number + 9 * start, 40, 40)] * 3, 2).astype(np.int16)
            name = f'case_{number:03d}'
            image, mask = f'images{part}/{name}_0000.nii.gz', f'labels{part}/{name}.nii.gz'
            files.nifti(tmp_path / 'raw' / image, volume, spacing=(1, 1, 3))
            files.nifti(tmp_path / 'raw' / mask, np.uint8(volume > 150), spacing=(1, 1, 3))
    result = task(tmp_path, '--modality', 'MR')
    assert result.code == 0, result.err
    assert prepared.task(tmp_path / 'out').counts == dict(train=9, val=0, test=9)
