"""Files of MedMNIST: labelled tasks with their own splits, and sources that hold these back."""
import json
import re
import shutil

import numpy as np
import pytest

from tests.support import files, prepared, runs
from tests.support.prepared import Prepared, prepare

REAL = runs.ROOT.parent / 'shared/real/tasks/PneumoniaMNIST/pneumoniamnist.npz'
real = pytest.mark.skipif(not REAL.is_file(), reason='no real images beside the repository')
COUNTS = dict(train=12, val=4, test=6)

def write(path, side=64, channels=(), columns=1, **others):
    """A file of MedMNIST; returns {split: images}. `others` replace its members."""
    rng, members = np.random.default_rng(0), {}
    for part, count in COUNTS.items():
        shape = (count, side, side, *channels)
        members[f'{part}_images'] = rng.integers(0, 256, shape, np.uint8)
        members[f'{part}_labels'] = np.uint8(np.arange(count * columns).reshape(count, columns) % 2)
    np.savez_compressed(files.parent(path), **members | others)
    return {part: members[f'{part}_images'] for part in COUNTS}

def task(folder, *words):
    """The Result of preparing folder/lungs.npz as a task."""
    return prepare(folder / 'lungs.npz', folder / 'out', '--task', 'lungs', *words)

# --- as a task -----------------------------------------------------------------------------------

@pytest.mark.parametrize('channels', [(), (3,)], ids=['grey', 'colour'])
def test_a_task_has_the_images_labels_and_splits_of_the_file(tmp_path, channels):
    images = write(tmp_path / 'lungs.npz', channels=channels)
    assert task(tmp_path, '--classes', 'normal', 'pneumonia').code == 0
    found = prepared.task(tmp_path / 'out')
    assert found.kind == 'classification'
    assert found.counts == COUNTS and found.classes == ['normal', 'pneumonia']
    for part, count in COUNTS.items():
        order = [*range(0, count, 2), *range(1, count, 2)]      # by class, then as in the file
        stored = found.images[part] if channels else found.images[part][..., 0]
        assert np.array_equal(stored, images[part][order])
        assert found.answers[part].tolist() == [number % 2 for number in order]
        assert [int(re.search(r'(\d+)\.', path)[1]) for path in found.split[part]] == order

def test_without_names_the_classes_are_the_numbers(tmp_path):
    write(tmp_path / 'lungs.npz')
    assert task(tmp_path).code == 0
    assert prepared.task(tmp_path / 'out').classes == ['0', '1']

def test_another_number_of_classes_is_refused(tmp_path):
    write(tmp_path / 'lungs.npz')
    runs.ends(task(tmp_path, '--classes', *'abc'), ['no training image shows c'])
    runs.ends(task(tmp_path, '--classes', 'a'), ['lungs.npz', 'not one label of 1 --classes'])

def test_several_labels_of_an_image_are_refused(tmp_path):
    write(tmp_path / 'lungs.npz', columns=14)
    runs.ends(task(tmp_path), ['lungs.npz', 'not one label of 2 --classes'])

@pytest.mark.parametrize('content', [b'', b'no archive'], ids=['empty', 'text'])
def test_a_file_that_is_no_archive_is_named(tmp_path, content):
    files.write(tmp_path / 'lungs.npz', content)
    runs.ends(task(tmp_path), ['lungs.npz', 'one label'])

def test_an_archive_of_other_arrays_is_named(tmp_path):
    np.savez(tmp_path / 'lungs.npz', x=np.zeros(3))
    runs.ends(task(tmp_path), ['lungs.npz', 'one label', 'train_labels'])

def test_images_without_labels_are_refused(tmp_path):
    write(tmp_path / 'lungs.npz', train_labels=np.zeros((11, 1), np.uint8))
    runs.ends(task(tmp_path), ['lungs.npz', 'one label'])
    assert not list(tmp_path.glob('out*'))

def test_images_in_two_splits_are_told(tmp_path):
    images = write(tmp_path / 'lungs.npz')
    images['val'][1] = images['train'][5]
    write(tmp_path / 'lungs.npz', val_images=images['val'])
    assert '1 images are the same in train and val' in task(tmp_path).err

# --- as a source ---------------------------------------------------------------------------------

def test_a_source_takes_the_training_images_and_counts_the_others(tmp_path):
    images = write(tmp_path / 'raw/X-ray/lungs/lungs.npz')
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 0 and 'held out' in result.out
    found = Prepared(tmp_path / 'out')
    assert np.array_equal(found.images('lungs')[..., 0], images['train'])
    meta = found.meta('lungs')
    assert (meta['count'], meta['dropped']['held out']) == (12, 10)
    details = [row['detail'] for row in found.dropped('lungs')]
    assert details == 4 * ['val, for a task'] + 6 * ['test, for a task']

def test_a_source_drops_images_that_are_too_small_or_seen_before(tmp_path):
    images = np.stack([files.texture(number, 28, 28) for number in (0, 1, 1, 2)])
    write(tmp_path / 'raw/X-ray/lungs/lungs.npz', side=28, train_images=images)
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 1 and 'is kept of 1 files, as lungs.npz' in result.out
    assert prepare(tmp_path / 'raw', tmp_path / 'all', '--min_side', 28).code == 0
    meta = Prepared(tmp_path / 'all').meta('lungs')
    assert (meta['count'], meta['dropped']['duplicate']) == (3, 1)

def test_a_source_of_another_archive_is_corrupt(tmp_path):
    np.savez(files.parent(tmp_path / 'raw/CT/a/a.npz'), x=np.zeros((9, 64, 64), np.uint8))
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 1 and 'a.npz,0,corrupt' in result.out

def test_a_source_that_was_prepared_before_there_was_this_reason_is_counted(tmp_path):
    write(tmp_path / 'raw/X-ray/lungs/lungs.npz')
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    path = tmp_path / 'out/lungs/meta.json'
    meta = json.loads(path.read_text())
    del meta['dropped']['held out']
    path.write_text(json.dumps(meta))
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    row, = (line.split() for line in result.out.splitlines() if line.startswith('X-ray'))
    assert row == ['X-ray', 'lungs', '1', '12', '12', '0', '0', '0', '0', '0', '0']

# --- a real file ---------------------------------------------------------------------------------

@real
@pytest.mark.slow
def test_a_real_file_gives_its_images_and_holds_back_what_is_a_task(tmp_path):
    words = '--task', 'pneumonia', '--size', 28, '--classes', 'normal', 'pneumonia'
    assert prepare(REAL, tmp_path / 'task', *words).code == 0
    found = prepared.task(tmp_path / 'task')
    with np.load(REAL) as members:
        for part in found.counts:
            labels = members[f'{part}_labels'].ravel()
            order = labels.argsort(kind='stable')
            assert np.array_equal(found.images[part][..., 0], members[f'{part}_images'][order])
            assert np.array_equal(found.answers[part], labels[order])
    shutil.copy(REAL, files.parent(tmp_path / 'raw/X-ray/lungs/lungs.npz'))
    assert prepare(tmp_path / 'raw', tmp_path / 'out', '--min_side', 28).code == 0
    meta = Prepared(tmp_path / 'out').meta('lungs')
    assert meta['count'] + sum(meta['dropped'].values()) == 3882 + 524 + 624
    assert meta['dropped']['held out'] == 524 + 624
