"""Runs of our scripts: in this process, or as processes of their own; tiny trainings of both kinds;
logs and weights read back."""
import contextlib
import importlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = ('pretrain', 'finetune', 'prepare_medverse')
PACKAGES = {    # where the programs lie
    'tests.lab': ('phantoms', 'pictures', 'report', 'scaling', 'modularity', 'bench',
                  'bench_prepare', 'predict', 'probe', 'convert', 'token_routing'),
    'tests.encoders': ('published', 'authors_dex'),
    'tests.support': ('two_ranks',),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)

# --- Programs -------------------------------------------------------------------------------------

@dataclass
class Result:
    """What a program left: its exit code, and what it wrote to stdout and stderr."""
    code: int
    out: str
    err: str

    @property
    def sentence(self):
        """The last line on stderr: the sentence in which a program says why it ended."""
        return (self.err.strip().splitlines() or [''])[-1]

def module_name(name):
    """The module in which a script or program lies."""
    if name in SCRIPTS:
        return name
    for package, programs in PACKAGES.items():
        if name in programs:
            return f'{package}.{name}'
    raise ValueError(f'{name} is in no table of tests/support/runs.py')

def module(name):
    """The imported module of a script or program, as `program` runs it."""
    return importlib.import_module(module_name(name))

@contextlib.contextmanager
def kept_signals():
    """Puts the handlers of Ctrl-C and SIGTERM back, which a training replaces."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

def program(name, *words, cwd=None):
    """Run a script's or program's main in this process, with words of a command line -> Result.

    As Python does it, SystemExit becomes a code and its sentence on stderr, and another exception
    1 and a traceback. Signal handlers, the working directory and sys.argv are as before."""
    streams = [io.TextIOWrapper(io.BytesIO(), 'utf-8', errors, newline='', write_through=True)
               for errors in ('strict', 'backslashreplace')]
    out, err = streams
    code, argv, folder = 0, sys.argv, os.getcwd()
    found = module(name)
    sys.argv = [f'{name}.py', *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_signals():
            os.chdir(cwd or folder)
            if hasattr(found, 'main'):
                found.main()
            else:
                runpy.run_module(module_name(name), run_name='__main__')
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=err)
            code = 1
    except Exception:
        traceback.print_exc(file=err)
        code = 1
    finally:
        sys.argv = argv
        os.chdir(folder)
    return Result(code, *(stream.buffer.getvalue().decode('utf-8') for stream in streams))

def ends(result, naming=()):
    """Assert that a program ended in one sentence that names each of these words -> the sentence.

    It takes a Result, or what pytest.raises(SystemExit) gave."""
    if isinstance(result, Result):
        assert result.code != 0, f'it did not fail; stdout: {result.out}'
        assert 'Traceback' not in result.err, result.err
        sentence = result.sentence
    else:
        sentence = result.value.code
        assert isinstance(sentence, str), f'no sentence: {sentence!r}'
        assert '\n' not in sentence.strip(), f'more than a sentence: {sentence}'
    assert sentence, 'it ended without a word'
    for word in [naming] if isinstance(naming, (str, Path)) else naming:
        assert str(word) in sentence, f'{word!s} is not named in: {sentence}'
    return sentence

# --- Processes ------------------------------------------------------------------------------------

NO_PICTURES = '''
import finetune
import pretrain
for found in (pretrain, finetune):
    assert found.run_program, 'what starts the program of the pictures has another name'
    found.run_program = lambda *words: print('no pictures')
'''
CALL = '''
import importlib
found = importlib.import_module({name!r})
found.main()
'''

def take_ctrl_c():
    """In a new process: Ctrl-C ends it, also where it is ignored here, as in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

def start(name, *words, before='', ranks=0, machines=('--standalone',), **popen):
    """Start a script as a process (group) of its own -> Popen, for `wait_for` and `finish`.

    `before` is Python that runs in it first; `ranks` are processes under torchrun, 0 for none;
    `machines` are torchrun's words that say with which machines, by default none.
    Its output goes to files, so that it never waits for a reader."""
    name = module_name(name)
    command = [sys.executable, '-m', name]
    if before or ranks:
        command = [sys.executable, '-c', before + CALL.format(name=name)]
    if ranks:
        launch = [sys.executable, '-m', 'torch.distributed.run', *machines]
        command = [*launch, f'--nproc_per_node={ranks}', '--no-python', *command]
    ours = dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    popen['env'] = {**os.environ, **ours, **popen.get('env', {})}
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    usual = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                 preexec_fn=take_ctrl_c)
    process = subprocess.Popen([*command, *map(str, words)], **{**usual, **popen})
    process.streams = out, err
    return process

def written(process):
    """What a process has written so far: stdout, stderr."""
    texts = []
    for stream in process.streams:
        stream.seek(0)
        texts.append(stream.read().decode('utf-8', 'replace'))
    return texts

def kill(process):
    """End a process of `start`, and its children, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

def wait_for(condition, process, timeout=120):
    """Wait until a file exists, or a condition() holds, while the process runs; otherwise kill the
    process, and fail."""
    happened = condition if callable(condition) else Path(condition).exists
    end = time.monotonic() + timeout
    try:
        while not happened():
            if process.poll() is not None:
                code = process.returncode
                pytest.fail(f'ended with {code} before {condition}: {written(process)}')
            if time.monotonic() > end:
                pytest.fail(f'no {condition} after {timeout} s: {written(process)}')
            time.sleep(0.01)
    except BaseException:
        kill(process)
        raise

def finish(process, timeout=120):
    """Wait for the end of a process of `start` -> Result; after `timeout` kill it, and fail."""
    try:
        code = process.wait(timeout)
    except BaseException as error:
        kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            pytest.fail(f'no end after {timeout} s: {written(process)}')
        raise
    return Result(code, *written(process))

# --- Tiny trainings -------------------------------------------------------------------------------

PRETRAINING = dict(model='tiny', depth=2, experts=4, size=32, patch=8, batch=4, steps=6,
                   warmup=0.34, lr=0.1, log_every=1, device='cpu')
FINETUNING = dict(batch=4, epochs=3, lr=1e-3, device='cpu')

def words(**options):
    """Options as words of a command line; True is a bare flag, False the flag that denies it."""
    found = []
    for name, value in options.items():
        if isinstance(value, bool):
            found.append(f'--{name}' if value else f'--no-{name}')
        else:
            found.append(f'--{name}={value}')
    return found

def pretrain_words(folder, /, out, **options):
    return words(**{**PRETRAINING, 'data': folder, 'out': out, **options})

def pretrain_options(folder, /, **options):
    """The Options of such a run, for what compares with it."""
    import pretrain
    return pretrain.parse_options(pretrain.Options(), pretrain_words(folder, 'out', **options))

def pretrain_config(**options):
    """The Config of such a run's network."""
    from model import named_config
    o = {**PRETRAINING, **options}
    names = ('size', 'patch', 'experts', 'top_k')
    return named_config(o['model'], o['depth'], **{name: o[name] for name in names if name in o})

def pretraining(folder, /, out, **options):
    """A tiny run of pretrain.py on the sources in `folder` -> Result."""
    return program('pretrain', *pretrain_words(folder, out, **options))

def finetune_words(task, /, out, **options):
    return words(**{**FINETUNING, 'data': task.parent, 'task': task.name, 'out': out, **options})

def finetuning(task, /, out, **options):
    """A tiny run of finetune.py on the task in the folder `task` -> Result."""
    return program('finetune', *finetune_words(task, out, **options))

def write_source(folder, modality, count, channels=1, size=32, shard=16):
    """A prepared source of noise, as pretraining reads it; returns its images (count, size, size,
    channels)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, size, size, channels), np.uint8)
    for number, first in enumerate(range(0, count, shard)):
        np.save(folder / f'{number:05d}.npy', images[first:first + shard])
    meta = dict(source=folder.name, modality=modality, count=count, channels=channels)
    (folder / 'meta.json').write_text(json.dumps(meta | dict(normalization='none')))
    return images

def draw_pictures(out):
    """Start the program of the pictures as a training does when it ends; see with_pictures."""
    import pretrain
    pretrain.run_program('pictures', out)

# --- What a run left ------------------------------------------------------------------------------

TIMES = ('images_per_second',)

def no_constant(name):
    raise AssertionError(f'{name} is no JSON')

def read_log(out, timed=False):
    """The objects of a run's log.jsonl, by default without what depends on the machine's speed."""
    entries = []
    for line in (Path(out) / 'log.jsonl').read_text().splitlines():
        entry = json.loads(line, parse_constant=no_constant)
        entries.append({name: value for name, value in entry.items()
                        if timed or name not in TIMES})
    return entries

def results(out):
    """A fine-tuned run's results.json."""
    return json.loads((Path(out) / 'results.json').read_text(), parse_constant=no_constant)

def weights(file, key='model'):
    """One entry of a checkpoint, loaded as plain values; None as key gives all of them."""
    content = torch.load(file, weights_only=True)
    return content if key is None else content[key]

def equal(a, b):
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return False
        return all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
