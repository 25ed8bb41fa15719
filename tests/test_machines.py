"""Machines without Unix's modules, several machines, and programs that end with their parents."""
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

import pretrain
from tests.support import files, processes, runs
from tests.support.two_ranks import free_port

pytestmark = pytest.mark.slow     # whole trainings, and many of them

def without(*names):
    """Python that replaces what the programs of tests/lab with these names do."""
    return f'''
import finetune, pretrain
run_program = pretrain.run_program
def run_all_others(name, *words):
    if name not in {names}:
        run_program(name, *words)
pretrain.run_program = finetune.run_program = run_all_others
'''

# --- Without Unix's modules -----------------------------------------------------------------------

HIDDEN = '''
import mmap
import sys
sys.modules['fcntl'] = sys.modules['resource'] = None
for name in list(vars(mmap)):
    if name.startswith('MADV_'):
        delattr(mmap, name)
'''
STOP_AT_5 = '''
import data, signal
seen, augment = [], data.augment
def augment_or_stop(*arguments):
    seen.append(1)
    if len(seen) == 5:
        signal.raise_signal(signal.SIGINT)
    return augment(*arguments)
data.augment = augment_or_stop
'''

@pytest.fixture
def elsewhere(tmp_path):
    """elsewhere(name, *words, before) runs a script where fcntl, resource and madvise are hidden,
    also from all processes that it starts -> Result."""
    (tmp_path / 'hidden').mkdir()
    (tmp_path / 'hidden/sitecustomize.py').write_text(HIDDEN)
    path = os.pathsep.join([str(tmp_path / 'hidden'), str(runs.ROOT)])

    def run(name, *words, before=''):
        process = runs.start(name, *words, before=before, cwd=tmp_path,
                             env=dict(PYTHONPATH=path))
        return runs.finish(process, timeout=300)
    return run

def succeeds(result):
    assert result.code == 0, result.err
    return result.out

@pytest.mark.slow
def test_a_preparation_needs_no_module_of_unix(tmp_path, elsewhere):
    for seed in range(3):
        files.save(tmp_path / f'raw/Fundus/eyes/{seed}.png', files.texture(seed, channels=3))
    succeeds(elsewhere('prepare_medverse', '--raw', 'raw', '--out', 'data/eyes'))
    assert (tmp_path / 'data/eyes/eyes/meta.json').exists()
    assert not list(tmp_path.glob('data/eyes/*.part'))

@pytest.mark.slow
def test_trainings_need_no_module_of_unix(tmp_path, elsewhere, labelled):
    """The demo makes its phantoms, is stopped in the midst of ten steps, and goes on; then a
    fine-tuning starts from it."""
    demo = ['--demo', '--steps', 10, '--log_every', 1, '--batch', 8]
    first = elsewhere('pretrain', *demo, before=without('pictures') + STOP_AT_5)
    assert first.code == 130, first.err
    assert len(runs.read_log(tmp_path / 'out/demo')) == 5
    resumed = succeeds(elsewhere('pretrain', *demo, '--resume', before=without('pictures')))
    assert [entry['step'] for entry in runs.read_log(tmp_path / 'out/demo')] == list(range(10))
    words = runs.finetune_words(labelled / 'tell', tmp_path / 'tuned', epochs=1)
    tuned = succeeds(elsewhere('finetune', *words))
    assert runs.results(tmp_path / 'tuned')['scores']
    for said in (first.out, resumed, tuned):
        assert 'cannot be locked' in said

# --- As macOS and Python 3.14 start processes -----------------------------------------------------

STARTS = """
import multiprocessing, os
multiprocessing.set_start_method(os.environ['STARTS'], force=True)
"""

@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_the_preparation_is_the_same_by_every_start_method(tmp_path, method):
    for seed in range(3):
        files.save(tmp_path / f'raw/Fundus/eyes/{seed}.png', files.texture(seed, channels=3))
    (tmp_path / 'starts').mkdir()
    (tmp_path / 'starts/sitecustomize.py').write_text(STARTS)
    script, path = runs.ROOT / 'prepare_medverse.py', tmp_path / 'starts'
    shards = []
    for way in ('fork', method):
        command = [sys.executable, script, '--raw', 'raw', '--out', way, '--workers', '2']
        environment = dict(os.environ, PYTHONPATH=str(path), STARTS=way)
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        shards.append((tmp_path / way / 'eyes/00000.npy').read_bytes())
    assert shards[0] == shards[1]

# --- What a command starts ends with it -----------------------------------------------------------

def demo(folder, out='out/demo', before=''):
    return runs.start('pretrain', '--demo', '--steps', 2, '--out', out, cwd=folder, before=before)

STAGES = {      # of a demo's phantoms: the files that show it
    'simulated': 'data/phantoms/raw/*/*/*/*',
    'prepared': 'data/phantoms-64/*',
}

@pytest.mark.slow
@pytest.mark.parametrize('stage, number', [
    ('simulated', signal.SIGTERM),
    ('simulated', signal.SIGINT),
    ('simulated', signal.SIGKILL),
    ('prepared', signal.SIGTERM),
])
def test_the_program_of_the_phantoms_ends_with_the_demo(tmp_path, stage, number):
    """The signal goes to the demo alone, as schedulers and editors send it."""
    process = demo(tmp_path)
    runs.wait_for(lambda: list(tmp_path.glob(STAGES[stage]))
                  and len(processes.descendants(process.pid)) > 1, process)
    started = processes.descendants(process.pid)
    process.send_signal(number)
    runs.finish(process)
    processes.await_end(started)
    assert len(list(tmp_path.glob('data/phantoms-64/phantom-*/meta.json'))) < 10

@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_the_program_of_the_pictures_ends_with_the_training(sources, tmp_path, number):
    process = runs.start('pretrain', *runs.pretrain_words(sources.folder, tmp_path))
    runs.wait_for(lambda: processes.children(process.pid), process)
    started = processes.descendants(process.pid)
    process.send_signal(number)
    assert runs.finish(process).code == -number
    processes.await_end(started)
    assert (tmp_path / 'ckpt.pt').exists() and not list(tmp_path.glob('*.png'))

@pytest.mark.slow
def test_the_second_of_two_demos_waits_for_the_phantoms_of_the_first(tmp_path):
    first = demo(tmp_path, 'out/first', without('pictures'))
    runs.wait_for(lambda: list(tmp_path.glob(STAGES['simulated'])), first)
    second = demo(tmp_path, 'out/second', without('pictures'))
    said = succeeds(runs.finish(second))
    succeeds(runs.finish(first))
    assert 'waiting' in said
    assert runs.equal(*(runs.weights(tmp_path / 'out' / name / 'ckpt.pt')
                        for name in ('first', 'second')))

# --- Several machines -----------------------------------------------------------------------------

SLOW = '''
import data, time
from torch.nn.parallel import DistributedDataParallel
assert callable(DistributedDataParallel._sync_buffers)
def hidden_broadcast(*arguments):
    raise AssertionError('DDP broadcasts the buffers in each step')
DistributedDataParallel._sync_buffers = hidden_broadcast
augment = data.augment
def augment_slowly(*arguments):
    time.sleep(0.1)
    return augment(*arguments)
data.augment = augment_slowly
'''

def start_machines(folder, out, *words):
    """Two agents of torchrun, each with one process, as on two machines -> their Popens."""
    words = [*runs.pretrain_words(folder, out, steps=16, save_minutes=0), *words]
    meeting = f'--rdzv_endpoint=127.0.0.1:{free_port()}'
    machines = ('--nnodes=2', '--rdzv_backend=c10d', meeting, '--local_addr=127.0.0.1')
    options = dict(before=without('pictures') + SLOW, ranks=1, machines=machines,
                   env=dict(GLOO_SOCKET_IFNAME='lo'))
    return [runs.start('pretrain', *words, **options) for _ in range(2)]

@pytest.fixture(scope='module')
def two_machines(sources, tmp_path_factory):
    """The folder of a training of 16 steps on two machines, and what the machines wrote."""
    out = tmp_path_factory.mktemp('two-machines')
    results = [runs.finish(process) for process in start_machines(sources.folder, out)]
    assert [result.code for result in results] == [0, 0], results
    return out, results

@pytest.mark.slow
def test_two_machines_train_together_without_a_warning(two_machines):
    out, results = two_machines
    assert [entry['step'] for entry in runs.read_log(out)] == list(range(16))
    for result in results:
        assert 'Warning' not in result.err, result.err

@pytest.mark.slow
def test_machines_of_which_one_went_away_resume_to_the_same_numbers(
        two_machines, sources, tmp_path):
    """The other notices, ends, and both are started again."""
    machines = start_machines(sources.folder, tmp_path)
    log = tmp_path / 'log.jsonl'
    runs.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 5, machines[0])
    gone = machines[1]
    processes.kill([gone.pid, *processes.descendants(gone.pid)])
    assert runs.finish(gone).code == -signal.SIGKILL
    assert runs.finish(machines[0]).code > 0
    done = runs.weights(tmp_path / 'ckpt.pt', 'done')
    assert 5 <= done < 16
    for machine in start_machines(sources.folder, tmp_path, '--resume'):
        succeeds(runs.finish(machine))
    out, _ = two_machines
    assert runs.read_log(tmp_path) == runs.read_log(out)
    assert runs.equal(runs.weights(tmp_path / 'ckpt.pt'), runs.weights(out / 'ckpt.pt'))

# --- As on a GPU ----------------------------------------------------------------------------------

class LikeGPU(str):
    """A name of the CPU that a training takes for a GPU, so that it does not wait at each step."""
    type = 'cuda'

@pytest.mark.parametrize('accumulate, most', [(1, 10), (4, 2)])
def test_on_a_gpu_a_signal_is_seen_soon_whatever_is_logged(
        sources, tmp_path, at_batch, accumulate, most):
    """After ten micro-batches at most."""
    o = runs.pretrain_options(sources.folder, steps=40, accumulate=accumulate, log_every=1000,
                              val_every=1000)
    o = replace(o, out=str(tmp_path))
    run = pretrain.build_run(o, *pretrain.set_up_process('cpu'))
    run.log = pretrain.prepare_folder(run.out, o, run.start)
    run.device = LikeGPU('cpu')
    at_batch(12 * accumulate, lambda images: run.signals.append(signal.SIGTERM))
    done = pretrain.train(run)
    assert 12 < done <= 12 + most
    assert runs.weights(tmp_path / 'ckpt.pt', 'done') == done
