"""data.py: prepared sources and labelled tasks are read, in which order, and ahead of time.
Augmentation has a file of its own."""
import json
import os
import threading
import time

import numpy as np
import pytest
import torch

import data
from tests.support.runs import ends, write_source
from tests.support.tasks import write_task

# --- Shards ---------------------------------------------------------------------------------------

def test_images_are_numbered_through_and_know_their_modality(sources):
    shards = data.Shards(sources.folder)
    assert shards.modalities == ['CT', 'MR', 'Photo']
    assert shards.image_modality.tolist() == [0] * 20 + [2] * 17 + [0] * 9 + [1] * 22
    assert shards.side == 32

def test_the_tail_of_each_source_is_held_out(sources):
    """A tenth of 20, 17, 9 and 22 images, rounded down, but one at least."""
    shards = data.Shards(sources.folder, val_share=0.1)
    assert shards.val.tolist() == [18, 19, 36, 45, 66, 67]
    assert sorted([*shards.train, *shards.val]) == list(range(68))

def test_no_more_images_than_asked_for_are_held_out(sources):
    shards = data.Shards(sources.folder, val_share=0.5, val_most=2)
    assert shards.val.tolist() == [18, 19, 35, 36, 44, 45, 66, 67]

def test_a_source_of_one_image_is_trained_on_and_none_of_it_held_out(tmp_path):
    write_source(tmp_path / 'a', 'CT', 3)
    write_source(tmp_path / 'b', 'CT', 1)
    shards = data.Shards(tmp_path)
    assert (shards.train.tolist(), shards.val.tolist()) == ([0, 1, 3], [2])

def test_gather_equals_indexing_the_images_one_by_one(sources):
    """Over borders of shards and of sources; grey fills three channels."""
    one_by_one = [image for source in sources.images for image in source]
    ids = np.array([0, 3, 15, 16, 19, 20, 35, 36, 40, 46, 67])
    batch = data.Shards(sources.folder).gather(ids)
    assert batch.dtype == torch.uint8 and batch.shape == (11, 3, 32, 32)
    for image, number in zip(batch, ids):
        colours = np.broadcast_to(one_by_one[number], (32, 32, 3))
        assert np.array_equal(image.permute(1, 2, 0), colours)

def test_no_file_stays_open(sources):
    """Neither when sources are looked at nor when images are read: there may be thousands."""
    if not os.path.isdir('/proc/self/fd'):
        pytest.skip('this system does not list the open files of a process')

    def opened():
        links = [f'/proc/self/fd/{number}' for number in os.listdir('/proc/self/fd')]
        paths = [os.readlink(link) for link in links if os.path.exists(link)]
        return [path for path in paths if path.endswith('.npy')]

    before = opened()
    shards = data.Shards(sources.folder)
    assert opened() == before
    shards.gather(np.array([1, 30]))
    assert opened() == before

def test_there_may_be_more_shards_than_files_may_be_open(tmp_path):
    resource = pytest.importorskip('resource')
    images = write_source(tmp_path / 'a', 'CT', 600, size=8, shard=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, limits[1]))
    try:
        shards = data.Shards(tmp_path)
        for first in range(0, 600, 50):
            part = shards.gather(np.arange(first, first + 50))
            assert np.array_equal(part[:, 0], images[first:first + 50, ..., 0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

# --- Sources that are damaged ---------------------------------------------------------------------

def said_of(folder, error):
    """What a sentence says after the folder with which it begins; its path may hold any number."""
    begin = f'{folder}: '
    sentence = ends(error)
    assert sentence.startswith(begin), sentence
    return sentence.removeprefix(begin)

def cut_short(source):
    shard = source / '00001.npy'
    shard.write_bytes(shard.read_bytes()[:-100])

def a_shard_is_missing(source):
    (source / '00001.npy').unlink()

def meta_is_cut_short(source):
    (source / 'meta.json').write_text('{"mod')

def meta_is_a_list(source):
    (source / 'meta.json').write_text('[]')

def no_modality(source):
    (source / 'meta.json').write_text('{"count": 30}')

def miscounted(source):
    (source / 'meta.json').write_text(json.dumps(dict(modality='CT', count=31)))

def shard_of(*shape, dtype=np.uint8, order='C'):
    def spoil(source):
        np.save(source / '00001.npy', np.ones(shape, dtype, order))
    return spoil

@pytest.mark.parametrize('spoil, named', [
    pytest.param(cut_short, [], id='cut short'),
    pytest.param(a_shard_is_missing, ['16', '30'], id='a shard is missing'),
    pytest.param(meta_is_cut_short, [], id='meta.json is cut short'),
    pytest.param(meta_is_a_list, [], id='meta.json is a list'),
    pytest.param(no_modality, ['modality'], id='no modality'),
    pytest.param(miscounted, ['30', '31'], id='miscounted'),
    pytest.param(shard_of(14, 32, 32, 1, dtype=float), ['uint8'], id='float'),
    pytest.param(shard_of(14, 32, 16, 1), ['16', '32'], id='not square'),
    pytest.param(shard_of(14, 32, 32), ['(n, S, S, c)'], id='without channels'),
    pytest.param(shard_of(14, 32, 32, 3, order='F'), [], id='stored column by column'),
])
def test_a_damaged_source_is_named(tmp_path, spoil, named):
    write_source(tmp_path / 'a-whole', 'CT', 5)
    write_source(tmp_path / 'b-spoilt', 'CT', 30)
    data.Shards(tmp_path)
    spoil(tmp_path / 'b-spoilt')
    with pytest.raises(SystemExit) as error:
        data.Shards(tmp_path)
    reason = said_of(tmp_path / 'b-spoilt', error)
    assert all(word in reason for word in named), reason

def test_a_labelled_task_is_no_source(tmp_path):
    write_task(tmp_path / 'task', segments=True)
    with pytest.raises(SystemExit) as error:
        data.Shards(tmp_path)
    ends(error, naming=[tmp_path / 'task', 'finetune.py', '--data'])

@pytest.mark.parametrize('folder', ['.', 'missing'])
def test_a_folder_without_sources_tells_how_to_make_some(tmp_path, folder):
    with pytest.raises(SystemExit) as error:
        data.Shards(tmp_path / folder)
    ends(error, naming=[tmp_path / folder, 'prepare_medverse.py', '--demo'])

def test_sources_without_images_are_as_none(tmp_path):
    write_source(tmp_path / 'empty', 'CT', 0)
    with pytest.raises(SystemExit) as error:
        data.Shards(tmp_path)
    ends(error, naming=[tmp_path, 'prepare_medverse.py'])

def test_a_source_that_is_not_finished_is_passed_over(tmp_path):
    write_source(tmp_path / 'a', 'CT', 3)
    write_source(tmp_path / 'b.part', 'MR', 3)
    assert data.Shards(tmp_path).modalities == ['CT']

def test_sources_of_two_sizes_are_refused_and_the_second_is_named(tmp_path):
    write_source(tmp_path / 'a', 'CT', 3, size=32)
    write_source(tmp_path / 'b', 'CT', 3, size=16)
    with pytest.raises(SystemExit) as error:
        data.Shards(tmp_path)
    reason = said_of(tmp_path / 'b', error)
    assert '16' in reason and '32' in reason

# --- The order of images --------------------------------------------------------------------------

def epoch(shards, number, batch, world=1, accumulate=1, seed=0):
    """One epoch's images, [step][rank * accumulate + micro-batch] -> list of numbers."""
    steps = len(shards.train) // (batch * world * accumulate)
    micros = steps * accumulate
    found = []
    for step in range(steps):
        parts = []
        for rank in range(world):
            for micro in range(accumulate):
                slot = number * micros + step * accumulate + micro
                parts.append(shards.batch_ids(seed, slot, batch, rank, world, micros).tolist())
        found.append(parts)
    return found

def drawn(steps):
    """All images of an epoch in one list."""
    return [image for parts in steps for part in parts for image in part]

@pytest.mark.parametrize('number', range(3))
def test_no_image_comes_twice_in_an_epoch_over_ranks_and_micro_batches(sources, number):
    shards = data.Shards(sources.folder)
    steps = epoch(shards, number, batch=5, world=2, accumulate=2)
    images = drawn(steps)
    assert len(images) == 3 * 4 * 5 and len(set(images)) == len(images)
    assert set(images) <= set(shards.train)
    assert all(part == sorted(part) for parts in steps for part in parts)

def test_every_training_image_comes_once_in_an_epoch(sources):
    shards = data.Shards(sources.folder)        # 64 images: sixteen batches of four, nothing over
    assert sorted(drawn(epoch(shards, 0, batch=4))) == sorted(shards.train)

def test_two_ranks_take_the_images_of_one_large_batch(sources):
    shards = data.Shards(sources.folder)
    two = epoch(shards, 1, batch=4, world=2)
    large = epoch(shards, 1, batch=8)
    assert [sorted(sum(parts, [])) for parts in two] == [parts[0] for parts in large]

def test_two_micro_batches_take_the_images_of_two_ranks(sources):
    shards = data.Shards(sources.folder)
    assert epoch(shards, 1, batch=4, accumulate=2) == epoch(shards, 1, batch=4, world=2)

def test_each_epoch_has_an_order_of_its_own(sources):
    shards = data.Shards(sources.folder)
    assert epoch(shards, 0, batch=4) != epoch(shards, 1, batch=4)

def test_an_epoch_asked_for_at_once_is_that_which_comes_after_others(sources):
    """As a resumed run asks for it."""
    first, second = data.Shards(sources.folder), data.Shards(sources.folder)
    for number in range(3):
        last = epoch(first, number, batch=4)
    assert epoch(second, 2, batch=4) == last

def test_seed_and_epoch_are_not_mixed_up(sources):
    """Were the order that of seed + epoch, one run would train on another's epochs."""
    shards = data.Shards(sources.folder)
    orders = [drawn(epoch(shards, number, batch=4, seed=seed)) for seed in (0, 1, 2)
              for number in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 9

# --- Ahead of time --------------------------------------------------------------------------------

def test_prefetch_loads_each_once_and_keeps_the_order():
    asked = []

    def load(number):
        asked.append(number)
        return number ** 2

    assert list(data.prefetch(load, range(20))) == [number ** 2 for number in range(20)]
    assert sorted(asked) == list(range(20))

def test_prefetch_stays_as_far_ahead_as_asked():
    """Of what is loaded the first is handed out, and the next four are waiting."""
    asked, enough = [], threading.Semaphore(0)

    def load(number):
        asked.append(number)
        enough.release()
        return number

    batches = data.prefetch(load, range(20), threads=2, ahead=4)
    next(batches)
    for _ in range(5):
        assert enough.acquire(timeout=60)
    time.sleep(0.02)        # in which a loader without a limit would go on
    assert sorted(asked) == [0, 1, 2, 3, 4]
    batches.close()

def test_prefetch_passes_exceptions_on():
    def load(number):
        if number == 3:
            raise OSError('the disk is gone')
        return number

    batches = data.prefetch(load, range(9))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match='the disk is gone'):
        next(batches)

# --- Labelled tasks -------------------------------------------------------------------------------

def test_a_task_holds_the_images_and_answers_of_its_splits(tmp_path):
    write_task(tmp_path / 'task', segments=True, colour=True)
    task = data.Task(tmp_path / 'task')
    assert task.segments and task.classes == ['ground', 'square']
    for split, count in (('train', 12), ('val', 4), ('test', 5)):
        stored = np.load(tmp_path / 'task' / split / 'images.npy')
        masks = np.load(tmp_path / 'task' / split / 'masks.npy')
        images, answers = task.gather(split, [count - 1, 0])
        assert images.dtype == torch.uint8 and answers.dtype == torch.int64
        assert np.array_equal(images.permute(0, 2, 3, 1), stored[[count - 1, 0]])
        assert np.array_equal(answers, masks[[count - 1, 0]])

def test_a_task_of_labels_fills_three_channels_with_grey(tmp_path):
    write_task(tmp_path / 'task', segments=False)
    task = data.Task(tmp_path / 'task')
    images, labels = task.gather('test', np.arange(5))
    assert not task.segments and labels.tolist() == [0, 1, 0, 1, 0]
    assert images.shape == (5, 3, 32, 32) and torch.equal(images[:, 0], images[:, 2])

def array_is_cut(task):
    (task / 'test' / 'labels.npy').write_bytes(b'cut')

def array_is_missing(task):
    (task / 'val' / 'images.npy').unlink()

def meta_without_classes(task):
    (task / 'meta.json').write_text('{"kind": "classification"}')

def no_test_images(task):
    for name in ('images', 'labels'):
        np.save(task / 'test' / f'{name}.npy', np.zeros(0, int))

def too_few_answers(task):
    np.save(task / 'train' / 'labels.npy', np.zeros(3, int))

def a_class_without_a_name(task):
    np.save(task / 'val' / 'labels.npy', np.arange(4))

@pytest.mark.parametrize('spoil, named', [
    pytest.param(array_is_cut, ['damaged'], id='cut'),
    pytest.param(array_is_missing, ['damaged'], id='missing'),
    pytest.param(meta_without_classes, ['classes'], id='no classes'),
    pytest.param(no_test_images, ['test', 'empty', '--split'], id='no test images'),
    pytest.param(too_few_answers, ['train', 'answers'], id='too few answers'),
    pytest.param(a_class_without_a_name, ['val', 'classes'], id='a class without a name'),
])
def test_a_spoilt_task_ends_in_a_sentence(tmp_path, spoil, named):
    write_task(tmp_path / 'task', segments=False)
    spoil(tmp_path / 'task')
    with pytest.raises(SystemExit) as error:
        data.Task(tmp_path / 'task')
    reason = said_of(tmp_path / 'task', error)
    assert all(word in reason for word in named), reason

def test_pixels_that_are_not_scored_are_no_class(tmp_path):
    write_task(tmp_path / 'task', segments=True)
    masks = np.load(tmp_path / 'task' / 'train' / 'masks.npy')
    masks[0, 0] = 255
    np.save(tmp_path / 'task' / 'train' / 'masks.npy', masks)
    assert data.Task(tmp_path / 'task').gather('train', [0])[1].max() == 255

def test_a_task_that_is_not_prepared_tells_how_to_prepare_it(tmp_path):
    with pytest.raises(SystemExit) as error:
        data.Task(tmp_path / 'fives')
    ends(error, naming=[tmp_path / 'fives', 'prepare_medverse.py --task'])
