"""Stopping and resuming both trainings: signals and kills, what a resumed run may change, and how a
folder that holds a run is kept. Steps that are not finite, locks and disks: test_mishaps.py."""
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

import pretrain
from tests.support import runs
from tests.support.runs import ends, equal, pretrain_words, read_log, weights
from tests.support.tasks import write_task
from tests.support.two_ranks import STEP

pytestmark = pytest.mark.slow     # whole trainings, and many of them

def fail(images):
    raise RuntimeError('as if it had been killed')

def reason(result, file):
    """What a refusal says after the file with which it begins; a path may hold any word."""
    sentence = ends(result)
    assert sentence.startswith(f'{file}: '), sentence
    return sentence.removeprefix(f'{file}: ')

def assert_same_run(ours, theirs):
    """Two runs' folders hold the same weights, optimizer, counts, log and scores."""
    first, second = (weights(out / 'ckpt.pt', None) for out in (ours, theirs))
    for name in ('done', 'skipped', 'model', 'optimizer'):
        assert equal(first[name], second[name]), name
    assert read_log(ours) == read_log(theirs)
    if (theirs / 'best.pt').exists():
        assert equal(weights(ours / 'best.pt'), weights(theirs / 'best.pt'))
        assert runs.results(ours)['scores'] == runs.results(theirs)['scores']

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

# --- Stopped, and gone on with --------------------------------------------------------------------

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_resumed_a_run_equals_one_never_stopped(
        training, whole, tmp_path, signal_at, number):
    """The step under way is finished and saved; the exit code is the signal's, as in a shell."""
    signal_at(3, number)
    result = training.run(tmp_path)
    assert result.code == 128 + number
    assert '4 of 6 steps' in result.out and '--resume' in result.out
    assert weights(tmp_path / 'ckpt.pt', 'done') == 4
    assert training.run(tmp_path, resume=True).code == 0
    assert_same_run(tmp_path, whole)

def test_what_was_logged_after_the_checkpoint_is_cut_off(training, whole, tmp_path, signal_at):
    """As after a kill: steps that are done again, and half a line."""
    signal_at(3, signal.SIGTERM)
    assert training.run(tmp_path).code == 143
    with open(tmp_path / 'log.jsonl', 'a') as log:
        log.write('{"step": 4, "loss": 1}\n{"step": 5, "loss": 1}\n{"step": 6')
    assert training.run(tmp_path, resume=True).code == 0
    assert read_log(tmp_path) == read_log(whole)

@pytest.mark.slow
def test_killed_and_resumed_a_pretraining_equals_one_never_stopped(sources, tmp_path):
    """Killed for good, wherever it is: each step is saved here, and one of many is the last."""
    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    options = dict(steps=20, val_every=10)
    words = pretrain_words(sources.folder, killed, save_minutes=0, **options)
    process = runs.start('pretrain', *words)
    runs.wait_for(killed / 'ckpt.pt', process)
    runs.kill(process)
    assert process.returncode == -signal.SIGKILL
    assert 0 < weights(killed / 'ckpt.pt', 'done') < 20
    for out in (killed, whole):
        assert runs.pretraining(sources.folder, out, resume=True, **options).code == 0
    assert_same_run(killed, whole)

def test_resume_starts_fresh_where_there_is_nothing_to_resume(training, whole, tmp_path):
    assert training.run(tmp_path / 'new', resume=True).code == 0
    assert_same_run(tmp_path / 'new', whole)

def test_a_finished_run_says_so_and_stays_as_it_is(training, whole):
    before = contents(whole)
    result = training.run(whole, resume=True)
    assert result.code == 0 and f'{whole}: this run is finished' in result.out
    assert contents(whole) == before

def test_ctrl_c_before_the_first_step_leaves_nothing(training, tmp_path, at_reading):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    at_reading(lambda: os.kill(os.getpid(), signal.SIGINT))
    result = training.run(tmp_path / 'out')
    assert result.code == 130
    assert 'Traceback' not in result.err
    assert not (tmp_path / 'out').exists()

# --- What a resumed run may change ----------------------------------------------------------------

MAY_CHANGE = dict(log_every=2, val_every=3, save_minutes=0, bf16=False, init='none.pt')
MAY_NOT_CHANGE = dict(
    model='small', depth=3, size=64, patch=16, experts=2, top_k=1, batch=2, steps=99, warmup=0.5,
    lr=9.0, weight_decay=0.5, clip=0.5, align=0.5, balance=0.5, momentum=0.5, sigma=0.5, seed=1,
    val_share=0.5)
ELSEWHERE = {'data', 'out', 'device', 'accumulate', 'resume', 'overwrite', 'demo', 'epochs'}

def test_each_option_of_pretraining_is_known_to_be_free_to_change_or_not():
    names = {field.name for field in dataclasses.fields(pretrain.Options)}
    assert {*MAY_CHANGE, *MAY_NOT_CHANGE} | ELSEWHERE == names

@pytest.mark.parametrize('name, value', MAY_NOT_CHANGE.items())
def test_a_pretraining_goes_on_as_it_began(sources, finished, name, value):
    before = contents(finished)
    options = {'resume': True, 'val_every': 2, name: value}
    result = runs.pretraining(sources.folder, finished, **options)
    words = reason(result, finished / 'ckpt.pt')
    assert name in words and str(value) in words
    assert contents(finished) == before

def test_a_pretraining_may_be_moved_and_looked_after_otherwise(
        sources, finished, tmp_path, signal_at):
    signal_at(2, signal.SIGTERM)
    assert runs.pretraining(sources.folder, tmp_path / 'here', val_every=2).code == 143
    shutil.move(tmp_path / 'here', tmp_path / 'there')
    shutil.copytree(sources.folder, tmp_path / 'data')
    options = dict(MAY_CHANGE, resume=True)
    assert runs.pretraining(tmp_path / 'data', tmp_path / 'there', **options).code == 0
    assert equal(weights(tmp_path / 'there' / 'ckpt.pt'), weights(finished / 'ckpt.pt'))
    assert [entry['step'] for entry in read_log(tmp_path / 'there')] == [0, 1, 2, 3, 5]

def test_a_pretraining_keeps_its_global_batch(sources, finished):
    """Twice the micro-batches are twice the batch; with half the ranks they would be the same."""
    result = runs.pretraining(sources.folder, finished, val_every=2, resume=True, accumulate=2)
    words = reason(result, finished / 'ckpt.pt')
    assert 'global_batch 4' in words and '8' in words

def test_a_pretraining_keeps_its_micro_batches(sources, finished):
    """Two of two images are as many as one of four, but each draws its own noise."""
    options = dict(val_every=2, resume=True, batch=2, accumulate=2)
    result = runs.pretraining(sources.folder, finished, **options)
    assert 'batch 4' in reason(result, finished / 'ckpt.pt')

def test_a_pretraining_does_not_go_on_with_other_images(finished, tmp_path):
    runs.write_source(tmp_path / 'data' / 'a', 'CT', 40)
    result = runs.pretraining(tmp_path / 'data', finished, val_every=2, resume=True)
    words = reason(result, finished / 'ckpt.pt')
    assert 'images 64' in words and '38' in words

@pytest.mark.parametrize('options, named', [
    (dict(batch=2), 'batch'),
    (dict(steps=9), 'steps'),
    (dict(lr=1), 'lr'),
    (dict(weight_decay=0.5), 'weight_decay'),
    (dict(warmup_epochs=0), 'warmup'),
    (dict(seed=1), 'seed'),
    (dict(tune_blocks=1), 'parameters'),
    (dict(adapt='director'), 'method'),
    (dict(top_k=1), 'top_k'),
    (dict(pool='mean'), 'pool'),
    (dict(fraction=0.5), 'counts'),
    (dict(size=64), 'config'),
    (dict(init='scratch', depth=4), 'init'),
    (dict(task='unchecked'), 'task'),
], ids=str)
def test_a_finetuning_goes_on_as_it_began(tuned, pretrained, labelled, options, named):
    out = tuned / 'tell'
    before = contents(out)
    options = dict(init=pretrained, epochs=6, resume=True) | options
    result = runs.finetuning(labelled / 'tell', out, **options)
    assert named in reason(result, out / 'ckpt.pt')
    assert contents(out) == before

@pytest.mark.parametrize('listed', [True, False])
def test_a_finetuning_does_not_go_on_with_another_split(pretrained, tmp_path, signal_at, listed):
    """Of as many images: told by split.json or, without one, by the answers themselves."""
    task, options = tmp_path / 'task', dict(init=pretrained)
    write_task(task, segments=False)
    split = dict(train=['a.png'], val=[], test=['b.png'])
    if listed:
        (task / 'split.json').write_text(json.dumps(split))
    signal_at(1, signal.SIGTERM)
    assert runs.finetuning(task, tmp_path / 'out', **options).code == 143
    if listed:
        split = dict(train=['b.png'], val=[], test=['a.png'])
        (task / 'split.json').write_text(json.dumps(split))
    else:
        labels = np.load(task / 'train' / 'labels.npy')
        np.save(task / 'train' / 'labels.npy', labels[::-1])
    result = runs.finetuning(task, tmp_path / 'out', resume=True, **options)
    assert 'task_sha256' in reason(result, tmp_path / 'out' / 'ckpt.pt')

def test_a_checkpoint_that_does_not_say_what_it_began_with_is_refused(training, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / 'out')
    file = torch.load(out / 'ckpt.pt')
    del file['identity']
    torch.save(file, out / 'ckpt.pt')
    assert 'seed' in reason(training.run(out, resume=True), out / 'ckpt.pt')

def test_a_finetuning_does_not_go_on_from_a_pretraining(labelled, pretrained, tmp_path):
    shutil.copy(pretrained, tmp_path / 'ckpt.pt')
    result = runs.finetuning(labelled / 'tell', tmp_path, init=pretrained, resume=True)
    ends(result, naming=[tmp_path / 'ckpt.pt', 'task'])

# --- A folder that holds a run --------------------------------------------------------------------

def test_a_run_is_not_overwritten_unasked(training, whole):
    before = contents(whole)
    ends(training.run(whole), naming=[whole, '--resume', '--overwrite'])
    assert contents(whole) == before

def test_what_a_run_left_is_safe_without_its_checkpoint(training, whole, tmp_path):
    """A checkpoint is big, and who is done with a run deletes it."""
    out = shutil.copytree(whole, tmp_path / 'out')
    (out / 'ckpt.pt').unlink()
    before = contents(out)
    ends(training.run(out), naming=[out, '--resume', '--overwrite'])
    assert contents(out) == before

def test_overwrite_starts_anew(training, whole, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / 'out')
    assert training.run(out, overwrite=True).code == 0
    assert_same_run(out, whole)

def test_a_new_run_over_an_old_one_leaves_nothing_of_it_to_resume(
        training, whole, tmp_path, at_batch):
    out = shutil.copytree(whole, tmp_path / 'out')
    at_batch(0, fail)
    assert 'as if it had been killed' in training.run(out, overwrite=True).err
    assert not {'ckpt.pt', 'best.pt', 'results.json'} & contents(out).keys()

def test_what_did_not_come_to_its_first_line_is_in_nobody_s_way(
        training, whole, tmp_path, at_batch):
    at_batch(0, fail)
    assert 'as if it had been killed' in training.run(tmp_path / 'out').err
    assert training.run(tmp_path / 'out').code == 0
    assert_same_run(tmp_path / 'out', whole)

def test_a_run_before_its_first_checkpoint_is_not_overwritten(sources, tmp_path, at_batch):
    at_batch(1, fail)
    assert 'as if it had been killed' in runs.pretraining(sources.folder, tmp_path).err
    ends(runs.pretraining(sources.folder, tmp_path), naming=[tmp_path, '--resume', '--overwrite'])

# --- Two ranks ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_saves(two_ranks):
    """Rank 1 had it in step 2. It leaves with 0, or torchrun would kill rank 0 while it saves."""
    assert weights(two_ranks / 'stopped' / 'ckpt.pt', 'done') == 2
    assert [entry['step'] for entry in read_log(two_ranks / 'stopped')] == [0, 1]
    codes = [weights(two_ranks / f'stopped-rank{rank}.pt', 'code') for rank in (0, 1)]
    assert codes == [143, 0]

@pytest.mark.slow
def test_two_ranks_resumed_equal_two_never_stopped(two_ranks):
    assert_same_run(two_ranks / 'resumed', two_ranks / 'whole')
    for rank in (0, 1):
        ours, theirs = (weights(two_ranks / f'{run}-rank{rank}.pt') for run in ('resumed', 'whole'))
        assert equal(ours, theirs)

@pytest.mark.slow
def test_one_process_goes_on_for_two_ranks_with_twice_the_micro_batches(two_ranks, tmp_path):
    """The global batch is the same, and so are images, masks and losses of the next step."""
    out = shutil.copytree(two_ranks / 'stopped', tmp_path / 'out')
    options = STEP | dict(resume=True, accumulate=2)
    assert runs.pretraining(two_ranks / 'data', out, **options).code == 0
    ours, theirs = read_log(out), read_log(two_ranks / 'whole')
    assert ours[:2] == theirs[:2]
    for name in ('l_self', 'align', 'lr', 'momentum'):
        assert ours[2][name] == pytest.approx(theirs[2][name], rel=1e-4), name
