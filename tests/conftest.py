"""Shared by the tests: seeds, what is put back after each test, the seams, and tiny sources.

The seams are the only places at which tests reach into a training while it runs."""
import builtins
import contextlib
import fnmatch
import io
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import finetune
import pretrain
from tests.support import runs, tasks
from tests.support.two_ranks import train_on_two_ranks

torch.set_num_threads(1)     # The tests' tensors are too small to share.

@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever ran before it."""
    np.random.seed(0)
    torch.manual_seed(0)

@pytest.fixture(autouse=True)
def signal_handlers():
    """A training's handlers of Ctrl-C and SIGTERM do not outlive the test."""
    with runs.kept_signals():
        yield

# --- Seams ----------------------------------------------------------------------------------------

@pytest.fixture(scope='session', autouse=True)
def skipped_pictures():
    """Trainings in this process end without the program of their pictures, which takes seconds; it
    runs where `wanted` is set. `count` is how often it did not. Predictions run in this process."""
    state, run = SimpleNamespace(wanted=False, count=0), pretrain.run_program

    def run_unless_pictures(name, *words):
        if name == 'pictures' and not state.wanted:
            state.count += 1
        elif name == 'predict':
            runs.module('predict').main([*map(str, words)])
        else:
            run(name, *words)

    with pytest.MonkeyPatch.context() as patch:
        for module in (pretrain, finetune):
            patch.setattr(module, 'run_program', run_unless_pictures)
        yield state

@pytest.fixture
def with_pictures(skipped_pictures):
    """For tests in which a training ends with its pictures."""
    skipped_pictures.wanted = True
    yield
    skipped_pictures.wanted = False

@contextlib.contextmanager
def actions_at_batches():
    """What the fixture at_batch gives, for fixtures that live longer than a test."""
    hooks, augment, augment_labelled = [], data.augment, data.augment_labelled

    def act(images):
        for hook in hooks:
            hook.seen += 1
            if hook.seen - 1 in hook.steps:
                hook.called = True
                changed = hook.action(images)
                images = images if changed is None else changed
        return images

    def changed(*arguments, **options):
        return act(augment(*arguments, **options))

    def changed_labelled(*arguments, **options):
        images, answers = augment_labelled(*arguments, **options)
        return act(images), answers

    def at_batch(step, action):
        steps = [step] if isinstance(step, int) else step
        hooks.append(SimpleNamespace(steps=steps, action=action, seen=0, called=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'augment', changed)
        patch.setattr(data, 'augment_labelled', changed_labelled)
        yield at_batch
    for hook in hooks:
        assert hook.called, f'no batch was any of {hook.steps}: at_batch is not where it was'

@pytest.fixture
def at_batch():
    """at_batch(step, action) calls action(images) with the augmented images (B, 3, S, S) of that
    batch, or of several (a list, set or range), of a training in this process, which goes on with
    what it returns, or unchanged with None. Batches are counted from 0 from this call on; of
    accumulated micro-batches each counts. A test in which no action was called fails."""
    with actions_at_batches() as at_batch:
        yield at_batch

@pytest.fixture
def signal_at(at_batch):
    """signal_at(step, number) sends this process a signal while a training computes that step."""
    def signal_at(step, number):
        at_batch(step, lambda images: os.kill(os.getpid(), number))
    return signal_at

@pytest.fixture
def at_reading(monkeypatch):
    """at_reading(action) calls action() when a training in this process begins to read its images:
    its options are read by then, nothing is written. A test in which it was not called fails."""
    hooks = []

    def hooked(read):
        def read_and_act(*arguments, **options):
            for hook in hooks:
                hook.called = True
                hook.action()
            read(*arguments, **options)
        return read_and_act

    for kind in (data.Shards, data.Task):
        monkeypatch.setattr(kind, '__init__', hooked(kind.__init__))
    yield lambda action: hooks.append(SimpleNamespace(action=action, called=False))
    assert all(hook.called for hook in hooks), 'the seam at_reading is not where it was'

class FullFile:
    """A file on a full disk: whatever is written fails; all else is the file's own."""
    def __init__(self, file):
        self.file = file

    def write(self, content):
        raise OSError(28, 'No space left on device')

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        self.file.close()

    def __iter__(self):
        return iter(self.file)

@pytest.fixture
def full_disk():
    """full_disk(path_pattern) lets this process write nothing to files whose whole path matches the
    pattern ('*/ckpt.pt.new'), as on a full disk. A test in which none was opened fails."""
    patterns, opened, real = [], set(), io.open

    def open_file(path, mode='r', *more, **others):
        file = real(path, mode, *more, **others)
        if set(mode) & set('wax+') and isinstance(path, (str, bytes, os.PathLike)):
            for pattern in patterns:
                if fnmatch.fnmatch(os.fsdecode(path), pattern):
                    opened.add(pattern)
                    return FullFile(file)
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, 'open', open_file)
        patch.setattr(io, 'open', open_file)
        yield patterns.append
    assert opened == set(patterns), f'of {patterns} only {opened} were opened for writing'

@pytest.fixture
def fake_program(tmp_path, monkeypatch):
    """fake_program(name, script) puts a shell script in the place of a program, as of ffmpeg."""
    def fake_program(name, script):
        program = tmp_path / 'bin' / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv('PATH', f'{program.parent}{os.pathsep}{os.environ["PATH"]}')
    return fake_program

# --- Sources --------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def sources(tmp_path_factory):
    """Four small sources of three modalities, grey and colour: their folder, and their images by
    source in the order in which data.Shards numbers them."""
    folder = tmp_path_factory.mktemp('prepared')
    images = [runs.write_source(folder / 'a-ct', 'CT', 20),
              runs.write_source(folder / 'b-photo', 'Photo', 17, channels=3),
              runs.write_source(folder / 'c-ct', 'CT', 9),
              runs.write_source(folder / 'd-mr', 'MR', 22)]
    return SimpleNamespace(folder=folder, images=images)

@pytest.fixture(scope='session')
def finished(sources, tmp_path_factory):
    """The folder of a pretraining of six steps on `sources`, never stopped, that validated after
    every second. Not to be changed."""
    out = tmp_path_factory.mktemp('finished')
    result = runs.pretraining(sources.folder, out, val_every=2)
    assert result.code == 0, result.err
    return out

@pytest.fixture(scope='session')
def two_ranks(tmp_path_factory):
    """The folder of pretrainings on two ranks; support/two_ranks.py says which."""
    return train_on_two_ranks(tmp_path_factory.mktemp('two-ranks'))

# --- Labelled tasks, and fine-tunings of them -----------------------------------------------------

@pytest.fixture(scope='session')
def labelled(tmp_path_factory):
    """A folder of tiny prepared tasks: find (segmentation), tell (classification), and unchecked,
    which is like tell, but without validation images."""
    return tasks.write_tasks(tmp_path_factory.mktemp('labelled'))

@pytest.fixture(scope='session')
def pretrained(tmp_path_factory):
    """A checkpoint as pretrain.py leaves it, of a tiny network with experts."""
    return tasks.write_pretrained(tmp_path_factory.mktemp('pretrained') / 'ckpt.pt')

@pytest.fixture(scope='session')
def tuned(labelled, pretrained, tmp_path_factory):
    """A folder with a finished fine-tuning of the tasks find and tell, with experts. Not to be
    changed, but for the predictions in it."""
    out = tmp_path_factory.mktemp('tuned')
    for name, epochs in (('find', 12), ('tell', 6)):
        tasks.tune(labelled / name, out / name, init=pretrained, epochs=epochs)
    return out

# --- Both trainings -------------------------------------------------------------------------------

@pytest.fixture(scope='session', params=['pretraining', 'finetuning'])
def training(request, sources, labelled, pretrained):
    """Each of both trainings in turn, of six steps: its name, and run(out, **options) -> Result."""
    def run(out, **options):
        if request.param == 'pretraining':
            return runs.pretraining(sources.folder, out, **dict(val_every=2) | options)
        options = dict(init=pretrained, epochs=2) | options
        return runs.finetuning(labelled / 'tell', out, **options)
    return SimpleNamespace(name=request.param, run=run)

@pytest.fixture(scope='session')
def whole(training, finished, tmp_path_factory):
    """The folder of a run of `training` that was never stopped. Not to be changed."""
    if training.name == 'pretraining':
        return finished
    out = tmp_path_factory.mktemp('whole')
    result = training.run(out)
    assert result.code == 0, result.err
    return out

@pytest.fixture(scope='session')
def stopped(training, tmp_path_factory):
    """The folder of a run of `training` that a signal ended in step 3 of 6. Not to be changed."""
    out = tmp_path_factory.mktemp('stopped')
    with actions_at_batches() as at_batch:
        at_batch(2, lambda images: os.kill(os.getpid(), signal.SIGTERM))
        assert training.run(out).code == 143
    return out
