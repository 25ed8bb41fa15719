"""Files of MedMNIST: `convert` makes them class folders with their own splits, and sources without
the images for validation and testing. The preparation reads these as it reads any others."""
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support import files, prepared, runs
from tests.support.prepared import Prepared, prepare

REAL = runs.ROOT.parent / 'shared/real/tasks/PneumoniaMNIST/pneumoniamnist.npz'
real = pytest.mark.skipif(not REAL.is_file(), reason='no real images beside the repository')
COUNTS = dict(train=12, val=4, test=6)
COMMAND = 'python -m tests.lab.convert medmnist'

def write(path, side=64, channels=(), columns=1, **others):
    """A file of MedMNIST; returns {split: images}. `others` replace its members."""
    rng, members = np.random.default_rng(0), {}
    for part, count in COUNTS.items():
        shape = (count, side, side, *channels)
        members[f'{part}_images'] = rng.integers(0, 256, shape, np.uint8)
        members[f'{part}_labels'] = np.uint8(np.arange(count * columns).reshape(count, columns) % 2)
    np.savez_compressed(files.parent(path), **members | others)
    return {part: members[f'{part}_images'] for part in COUNTS}

def convert(folder, *names, file=None):
    """The Result of converting folder/lungs.npz to folder/task and folder/raw/X-ray/lungs."""
    words = file or folder / 'lungs.npz', folder / 'task', folder / 'raw/X-ray/lungs', *names
    return runs.program('convert', 'medmnist', *words)

def converted(folder, *names, file=None):
    """Convert it, which must succeed."""
    result = convert(folder, *names, file=file)
    assert result.code == 0, result.err
    return result

def refused(folder, naming, *names):
    """Converting it ends in a sentence that names the file and these words, and leaves nothing."""
    before = sorted(folder.rglob('*'))
    runs.ends(convert(folder, *names), ['lungs.npz', *naming])
    assert sorted(folder.rglob('*')) == before

def task(folder, *words):
    """The Result of preparing what was converted as a task."""
    return prepare(folder / 'task', folder / 'out', '--task', 'lungs', *words)

# --- as a task -----------------------------------------------------------------------------------

@pytest.mark.parametrize('channels', [(), (3,)], ids=['grey', 'colour'])
def test_a_task_has_the_images_labels_and_splits_of_the_file(tmp_path, channels):
    images = write(tmp_path / 'lungs.npz', channels=channels)
    converted(tmp_path, 'normal', 'pneumonia')
    assert task(tmp_path).code == 0
    found = prepared.task(tmp_path / 'out')
    assert found.kind == 'classification'
    assert found.counts == COUNTS and found.classes == ['normal', 'pneumonia']
    for part, count in COUNTS.items():
        order = [*range(0, count, 2), *range(1, count, 2)]      # by class, then as in the file
        stored = found.images[part] if channels else found.images[part][..., 0]
        assert np.array_equal(stored, images[part][order])
        assert found.answers[part].tolist() == [number % 2 for number in order]
        names = [f'{part}/{found.classes[n % 2]}/{n + 1:06d}.png' for n in order]
        assert found.split[part] == names

def test_without_names_the_classes_are_the_numbers(tmp_path):
    write(tmp_path / 'lungs.npz')
    converted(tmp_path)
    assert task(tmp_path).code == 0
    assert prepared.task(tmp_path / 'out').classes == ['0', '1']

def test_more_than_ten_classes_are_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path / 'lungs.npz', train_labels=np.uint8(np.arange(12)[:, None]))
    converted(tmp_path)
    assert task(tmp_path).code == 0
    found = prepared.task(tmp_path / 'out')
    assert found.classes == [f'{number:02d}' for number in range(12)]
    assert found.answers['train'].tolist() == list(range(12))

def test_another_number_of_classes_is_refused(tmp_path):
    write(tmp_path / 'lungs.npz')
    refused(tmp_path, ['2 classes', '3 names', 'b'], *'abc')
    refused(tmp_path, ['2 classes', '1 names'], 'a')

def test_several_labels_of_an_image_are_refused(tmp_path):
    write(tmp_path / 'lungs.npz', columns=14)
    refused(tmp_path, ['one label', '(12, 14)'])

def test_volumes_are_refused(tmp_path):
    write(tmp_path / 'lungs.npz', channels=(64,))
    refused(tmp_path, ['train_images', '(12, 64, 64, 64)'])

@pytest.mark.parametrize('content', [b'', b'no archive'], ids=['empty', 'text'])
def test_a_file_that_is_no_archive_is_named(tmp_path, content):
    files.write(tmp_path / 'lungs.npz', content)
    refused(tmp_path, ['one label'])

def test_an_archive_of_other_arrays_is_named(tmp_path):
    np.savez(tmp_path / 'lungs.npz', x=np.zeros(3))
    refused(tmp_path, ['one label', 'train_images'])

def test_images_without_labels_are_refused(tmp_path):
    write(tmp_path / 'lungs.npz', train_labels=np.zeros((11, 1), np.uint8))
    refused(tmp_path, ['one label', '(11, 1)'])

def test_a_folder_that_is_there_is_not_changed(tmp_path):
    write(tmp_path / 'lungs.npz')
    for place in ('task', 'raw/X-ray/lungs'):
        files.write(tmp_path / place / 'notes.txt', b'mine')
        runs.ends(convert(tmp_path), [tmp_path / place, 'is there'])
        assert [path.name for path in (tmp_path / place).iterdir()] == ['notes.txt']
        shutil.rmtree(tmp_path / place)

def test_on_a_full_disk_nothing_half_written_stays(tmp_path, monkeypatch):
    write(tmp_path / 'lungs.npz')
    save = Image.Image.save

    def save_some(image, target):
        if target.name == '000003.png':
            raise OSError(28, 'No space left on device')
        save(image, target)

    monkeypatch.setattr(Image.Image, 'save', save_some)
    runs.ends(convert(tmp_path), ['lungs.npz', 'No space left'])
    assert not (tmp_path / 'task').exists() and not (tmp_path / 'raw/X-ray/lungs').exists()

def test_a_file_that_is_not_there_is_told(tmp_path):
    runs.ends(convert(tmp_path), COMMAND)
    runs.ends(runs.program('convert', 'medmnist'), COMMAND)

def test_images_in_two_splits_are_told(tmp_path):
    images = write(tmp_path / 'lungs.npz')
    images['val'][1] = images['train'][5]
    write(tmp_path / 'lungs.npz', val_images=images['val'])
    converted(tmp_path)
    assert '1 images are the same in train and val' in task(tmp_path).err

# --- as a source ---------------------------------------------------------------------------------

def test_a_source_has_the_training_images_alone(tmp_path):
    images = write(tmp_path / 'lungs.npz')
    converted(tmp_path)
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 0, result.err
    found = Prepared(tmp_path / 'out')
    assert np.array_equal(found.images('lungs')[..., 0], images['train'])
    assert found.meta('lungs')['count'] == found.meta('lungs')['files'] == 12

def test_a_source_drops_images_that_are_too_small_or_seen_before(tmp_path):
    images = np.stack([files.texture(number, 28, 28) for number in (0, 1, 1, 2)])
    labels = np.uint8([[0], [1], [0], [1]])
    write(tmp_path / 'lungs.npz', side=28, train_images=images, train_labels=labels)
    converted(tmp_path)
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 1 and 'is kept of 4 files; dropped' in result.out
    assert "'small': 4" in result.out
    assert prepare(tmp_path / 'raw', tmp_path / 'all', '--min_side', 28).code == 0
    meta = Prepared(tmp_path / 'all').meta('lungs')
    assert (meta['count'], meta['dropped']['duplicate']) == (3, 1)

# --- as it is downloaded -------------------------------------------------------------------------

def test_who_gives_the_file_itself_is_told_the_command(tmp_path):
    write(tmp_path / 'lungs.npz')
    runs.ends(prepare(tmp_path / 'lungs.npz', tmp_path / 'out', '--task', 'lungs'), COMMAND)
    runs.ends(prepare(tmp_path / 'lungs.npz', tmp_path / 'out'), COMMAND)

def test_who_puts_the_file_below_raw_is_told_the_command(tmp_path):
    write(tmp_path / 'raw/X-ray/chest/lungs.npz')
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 1
    assert "'other': 1" in result.out
    runs.ends(result, ['chest', COMMAND])

def test_who_puts_the_file_beside_pictures_is_told_the_command(tmp_path):
    write(tmp_path / 'raw/X-ray/chest/lungs.npz')
    files.save(tmp_path / 'raw/X-ray/chest/0.png', files.texture(0))
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 0 and COMMAND in result.out
    assert Prepared(tmp_path / 'out').reasons('chest') == {'lungs.npz': 'other'}

@pytest.mark.parametrize('pictures', [0, 6])
def test_who_puts_the_file_into_the_folder_of_a_task_is_told_the_command(tmp_path, pictures):
    write(tmp_path / 'task/lungs.npz')
    for number in range(pictures):
        files.save(tmp_path / f'task/{"ab"[number % 2]}/{number}.png', files.texture(number))
    runs.ends(task(tmp_path), ['lungs.npz', COMMAND])

# --- a real file ---------------------------------------------------------------------------------

@real
@pytest.mark.slow
def test_a_real_file_gives_its_images_and_holds_back_what_is_a_task(tmp_path):
    converted(tmp_path, 'normal', 'pneumonia', file=REAL)
    assert task(tmp_path, '--size', 28).code == 0
    found = prepared.task(tmp_path / 'out')
    assert found.classes == ['normal', 'pneumonia']
    with np.load(REAL) as members:
        for part in found.counts:
            labels = members[f'{part}_labels'].ravel()
            order = labels.argsort(kind='stable')
            assert np.array_equal(found.images[part][..., 0], members[f'{part}_images'][order])
            assert np.array_equal(found.answers[part], labels[order])
    assert prepare(tmp_path / 'raw', tmp_path / 'sources', '--min_side', 28).code == 0
    meta = Prepared(tmp_path / 'sources').meta('lungs')
    training = len(found.answers['train'])
    assert meta['count'] + sum(meta['dropped'].values()) == meta['files'] == training
