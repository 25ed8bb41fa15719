"""Labelled tasks: pictures with masks, or in class folders, become what fine-tuning reads."""
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from tests.support import files, folders, runs
from tests.support.folders import animal, refused, task, write_animals, write_pairs

SIDE = folders.SIDE

# --- pictures with masks -------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """A task of coloured pictures, 96 px a side, and masks in folders of splits, stored with 64."""
    folder = tmp_path_factory.mktemp('pairs')
    right = {}
    for split, count in dict(train=3, val=1, test=2).items():
        for number in range(count):
            path = f'{split}/images/{number}.png'
            picture = files.texture(len(right), channels=3)
            mask = np.where(files.blob(len(right)), 1, 255 if number == 0 else 0).astype(np.uint8)
            files.save(folder / 'raw' / path, picture)
            files.save(folder / 'raw' / f'{split}/masks/{number}.png', mask)
            right[path] = SimpleNamespace(picture=picture, mask=mask)
    words = '--classes', 'background', 'blob', '--modality', 'Photo', '--size', 64
    return SimpleNamespace(task=task(folder, *words), out=folder / 'out', right=right)

def test_the_task_says_what_it_holds(pairs):
    assert pairs.task.meta == dict(
        kind='segmentation', classes=['background', 'blob'], modality='Photo', size=64,
        counts=dict(train=3, val=1, test=2), sided=False)

def test_the_task_names_the_files_of_each_split_in_the_order_of_its_images(pairs):
    assert pairs.task.split['test'] == ['test/images/0.png', 'test/images/1.png']
    assert sorted(pairs.task.where) == sorted(pairs.right)
    assert {part: images.shape for part, images in pairs.task.images.items()} == {
        'train': (3, 64, 64, 3), 'val': (1, 64, 64, 3), 'test': (2, 64, 64, 3)}

def test_images_are_made_smaller_as_pillow_does_it(pairs):
    for path, true in pairs.right.items():
        small = Image.fromarray(true.picture).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(pairs.task.image[path], small)

def test_masks_take_the_nearest_pixel_and_keep_255(pairs):
    """Here the nearest is the one at the centre of each cell."""
    places = ((np.arange(64) + 0.5) * 96 / 64).astype(int)
    for path, true in pairs.right.items():
        assert np.array_equal(pairs.task.answer[path], true.mask[np.ix_(places, places)])
        assert pairs.task.answer[path].dtype == np.uint8

def test_fine_tuning_reads_what_was_written(pairs):
    read = data.Task(pairs.out)
    assert read.meta == pairs.task.meta
    for part in ('train', 'val', 'test'):
        assert np.array_equal(read.images[part], pairs.task.images[part])
        assert np.array_equal(read.answers[part], pairs.task.answers[part])

def test_grey_pictures_beside_coloured_ones_get_three_equal_channels(tmp_path):
    write_pairs(tmp_path, count=4)
    files.save(tmp_path / 'raw/images/3.png', files.noise(3, channels=3))
    found = task(tmp_path, '--split', '[013]', '', '2')
    assert found.images['train'].shape == (3, SIDE, SIDE, 3)
    assert found.images['test'].shape == (1, SIDE, SIDE, 1)
    assert np.array_equal(found.image['images/0.png'], files.noise(0)[..., None].repeat(3, 2))
    assert np.array_equal(found.image['images/3.png'], files.noise(3, channels=3))

def test_a_mask_without_its_image_stops_unless_allowed(tmp_path):
    write_pairs(tmp_path, count=6)
    (tmp_path / 'raw/masks/2.png').unlink()
    (tmp_path / 'raw/images/5.png').unlink()
    refused(tmp_path, naming=['1 of 5 are left over', 'masks/5.png', '--partial'])
    found = task(tmp_path, '--partial')
    assert sorted(found.where) == [f'images/{number}.png' for number in (0, 1, 3, 4)]
    assert re.search('5 = 4 used . 1 left out  images/2.png', found.said)

def test_skip_leaves_out_images_and_masks_by_their_path(tmp_path):
    """Without it the second mask of each picture makes the pairs ambiguous."""
    write_pairs(tmp_path, count=4)
    shutil.copytree(tmp_path / 'raw/masks', tmp_path / 'raw/copies/masks')
    files.save(tmp_path / 'raw/copies/images/0.png', files.noise(9))
    rules = '--images', r'images/(\d)', '--masks', r'masks/(\d)'
    refused(tmp_path, *rules, naming=['cannot be a pair', 'copies/masks/0.png', '--masks'])
    found = task(tmp_path, *rules, '--skip', '^COPIES/')
    assert sorted(found.where) == [f'images/{number}.png' for number in range(4)]
    assert re.findall(r'(\d+) left out', found.said) == ['0', '0', '0']

# --- class folders -------------------------------------------------------------------------------

def test_the_folder_of_a_picture_is_its_class(tmp_path):
    write_animals(tmp_path, names='0123456789')
    found = task(tmp_path)
    assert found.kind == 'classification' and found.classes == ['cat', 'dog']
    assert found.counts == dict(train=10, val=4, test=6)
    assert found.answers['test'].dtype == np.int64
    assert len(found.where) == 20
    for path, label in found.answer.items():
        kind, name = path.split('/')
        assert found.classes[label] == kind
        assert np.array_equal(found.image[path][..., 0], animal(kind, int(name[0])))

def test_a_picture_beside_the_class_folders_is_left_out_and_told(tmp_path):
    write_animals(tmp_path)
    files.save(tmp_path / 'raw/overview.png', files.noise(99))
    found = task(tmp_path)
    assert found.classes == ['cat', 'dog'] and len(found.where) == 6
    assert '7 = 6 used + 1 left out  overview.png' in found.said

def test_images_of_each_class_and_split_are_told(tmp_path):
    write_animals(tmp_path, names='0123456789')
    write_animals(tmp_path, names='0123456', kinds=['handout'], seed=900)
    found = task(tmp_path)
    parts = [part for path, part in found.where.items() if path.startswith('handout')]
    assert [parts.count(part) for part in ('train', 'val', 'test')] == [3, 1, 3]
    row, = (line.split() for line in found.said.splitlines() if line.startswith('handout '))
    assert row == ['handout', '3', '1', '3']

# --- folders that cannot be used -----------------------------------------------------------------

def test_a_mask_of_another_size_is_named(tmp_path):
    write_pairs(tmp_path, count=4)
    files.save(tmp_path / 'raw/masks/1.png', files.blob(1, 40))
    refused(tmp_path, naming=['images/1.png', 'masks/1.png', 'sizes', SIDE, '40'])

def test_a_mask_with_another_value_is_named(tmp_path):
    write_pairs(tmp_path, count=4)
    files.save(tmp_path / 'raw/masks/1.png', 7 * folders.BLOB)
    refused(tmp_path, naming=['masks/1.png', 'values 7,', '--values'])

def test_a_damaged_picture_is_named(tmp_path):
    write_pairs(tmp_path, count=4)
    files.write(tmp_path / 'raw/images/0.png', 'no picture')
    refused(tmp_path, naming=['images/0.png', 'cannot be used'])

def test_a_class_that_no_training_image_shows_is_named(tmp_path):
    write_animals(tmp_path, 'train/{kind}', kinds=['cat'])
    write_animals(tmp_path, 'test/{kind}', kinds=['dog'])
    refused(tmp_path, naming=['less than two', "'cat', 'dog'"])

def test_a_task_without_a_test_image_is_refused(tmp_path):
    write_animals(tmp_path, 'train/{kind}')
    refused(tmp_path, '--split', '.', '', '', naming=['no image is for testing', '--split'])

@pytest.mark.parametrize('words', [['--masks', 'nowhere/(.*)'], ['--values', '0', '1'],
                                   ['--objects']])
def test_options_of_masks_do_not_make_a_classification_of_folders(tmp_path, words):
    write_pairs(tmp_path, count=4)
    (tmp_path / 'raw/masks').rename(tmp_path / 'raw/truth')
    refused(tmp_path, *words, naming=[tmp_path / 'raw', '(.*)', 'finds no file'])

def test_a_task_of_one_class_is_refused(tmp_path):
    write_pairs(tmp_path, count=4)
    (tmp_path / 'raw/masks').rename(tmp_path / 'raw/truth')
    refused(tmp_path, '--images', 'images/', naming=['less than two'])

def test_a_raw_that_is_not_there_is_named(tmp_path):
    refused(tmp_path, naming=[tmp_path / 'raw', '--raw'])

def test_a_prepared_task_is_not_prepared_again(tmp_path):
    write_pairs(tmp_path)
    task(tmp_path)
    before = files.contents(tmp_path / 'out')
    runs.ends(folders.prepare(tmp_path), [tmp_path / 'out', 'delete it'])
    assert files.contents(tmp_path / 'out') == before

# --- stopped, and on a full disk -----------------------------------------------------------------

@pytest.fixture
def halted(tmp_path, fake_program):
    """start(): a preparation that has written its training images, and waits in a DICOM series of
    its test images until `go` exists. A program stands in for dcm2niix."""
    go, started = tmp_path / 'go', tmp_path / 'started'
    volume = files.nifti(tmp_path / 'made.nii', np.int16(files.texture(9, SIDE, SIDE))[..., None])
    made = files.write(tmp_path / 'made.json', '{"Modality": "MR"}')
    fake_program('dcm2niix', f'''
        touch {started}
        until [ -e {go} ]; do sleep 0.02; done
        while [ "$1" != -o ]; do shift; done
        cp {volume} {made} "$2"''')
    write_animals(tmp_path, 'train/{kind}')
    write_animals(tmp_path, 'test/{kind}', seed=50)
    files.dicom(tmp_path / 'raw/test/cat/scan/0.dcm', files.ramp(0, 400, 'i2'))
    rules = '--split', '^train/', '', '^test/', '--labels', 'classes.csv'
    rows = [f'{path.relative_to(tmp_path / "raw")},{path.parent.name}'
            for path in sorted((tmp_path / 'raw').rglob('*.png'))]
    files.write(tmp_path / 'raw/classes.csv', '\n'.join(['file,kind', *rows, 'scan,cat']))
    processes = []

    def start():
        words = '--raw', tmp_path / 'raw', '--out', tmp_path / 'out', '--task', 'mini'
        more = '--size', SIDE, '--workers', 2, *rules
        processes.append(runs.start('prepare_medverse', *words, *more))
        runs.wait_for(started, processes[-1])
        assert (tmp_path / 'out.part/train/images.npy').exists()
        return processes[-1]

    yield SimpleNamespace(start=start, go=go, rules=rules)
    go.touch()      # so that the stand-in does not outlive the test
    for process in processes:
        if process.poll() is None:
            runs.kill(process)

def test_an_interrupted_task_leaves_nothing(halted, tmp_path):
    process = halted.start()
    os.killpg(process.pid, signal.SIGINT)
    halted.go.touch()
    result = runs.finish(process)
    assert result.code == 130
    assert 'stopped' in runs.ends(result)
    assert not list(tmp_path.glob('out*'))

def test_a_killed_task_is_none_and_a_second_run_completes_it(halted, tmp_path):
    process = halted.start()
    runs.kill(process)
    assert not (tmp_path / 'out').exists()
    with pytest.raises(SystemExit) as error:
        data.Task(tmp_path / 'out.part')
    runs.ends(error, ['out.part', 'prepare_medverse.py'])
    halted.go.touch()
    shutil.rmtree(tmp_path / 'out.part')
    found = task(tmp_path, *halted.rules)
    assert found.counts == dict(train=6, val=0, test=7)
    task(tmp_path, *halted.rules, out='never stopped')
    assert files.contents(tmp_path / 'out') == files.contents(tmp_path / 'never stopped')
    assert not list(tmp_path.glob('*.part'))

def test_a_task_on_a_full_disk_leaves_nothing_and_a_second_run_completes_it(tmp_path):
    """No file may become larger than 50 kB: 30 training images of 2.3 kB are."""
    resource = pytest.importorskip('resource')
    write_animals(tmp_path, names='abcdefghijklmnopqrstuvwxyz0123')

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    words = '--raw', tmp_path / 'raw', '--out', tmp_path / 'out', '--task', 'mini'
    more = '--size', SIDE, '--workers', 2
    result = runs.finish(runs.start('prepare_medverse', *words, *more, preexec_fn=limit))
    runs.ends(result, [tmp_path / 'out', 'start again'])
    assert not list(tmp_path.glob('out*'))
    assert task(tmp_path).counts == dict(train=30, val=12, test=18)

def test_a_disk_with_too_little_room_is_told_before_it_is_written_to(tmp_path, monkeypatch):
    """Writing to a memory map on a full disk would kill the program without a word."""
    write_pairs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=SIDE * SIDE))
        refused(tmp_path, naming=[tmp_path / 'out', 'No space left on device'])
    assert task(tmp_path).counts == dict(train=1, val=0, test=1)

@pytest.mark.parametrize('image, mask, rule', [
    ('images/{}.png', 'seg/{}.png', ['--masks', r'(.*)seg/(.*)\.png']),
    ('scans/{}.png', 'masks/{}.png', ['--images', r'(.*)scans/(.*)\.png']),
    ('images/imagesTr/{}_0000.nii', 'images/labelsTr/{}.nii', [])])
def test_one_rule_is_enough_where_the_other_is_as_by_default(tmp_path, image, mask, rule):
    """Also nnU-Net's folders in one whose name ends in images."""
    for number in range(4):
        for path, pixels in (image, files.noise(number)), (mask, folders.BLOB):
            target = tmp_path / 'raw' / path.format(number)
            write = files.nifti if target.suffix == '.nii' else files.save
            write(target, pixels[..., None] if target.suffix == '.nii' else pixels)
    found = task(tmp_path, *rule)
    assert sorted(found.where) == [image.format(number) for number in range(4)]

@pytest.mark.parametrize('file', ['split.json', 'meta.json'])
def test_a_task_whose_last_files_do_not_fit_on_the_disk_leaves_nothing(tmp_path, full_disk, file):
    write_pairs(tmp_path)
    full_disk(f'*/{file}')
    refused(tmp_path, naming=[tmp_path / 'out', 'No space left on device'])
