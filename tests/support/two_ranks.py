"""Several tiny pretrainings one after another on two ranks, so that processes start only once.

`train_on_two_ranks(folder)` is what the fixture `two_ranks` calls; run as a program under torchrun,
this file is one of its ranks.
"""
import json
import math
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch

from tests.support import runs

# Gate noise differs between one batch and its parts, so there is none. All else is so large that an
# error in it is seen within three steps.
STEP = dict(steps=3, sigma=0.0, momentum=0.5, weight_decay=10.0, clip=0.3, balance=0.5)

# Two ranks with two micro-batches draw the noise of one process with four, and balance within each.
QUARTERS = dict(STEP, sigma=1.0, balance=0.0, batch=1)

# The last image of the source is held out, so rank 1 has nothing to validate.
PLAN = [
    dict(name='whole'),
    dict(name='stopped', at_step=1, action='signal'),           # of rank 1 alone
    dict(name='resumed', goes_on_from='stopped'),
    dict(name='poisoned', at_step=2, action='not finite'),      # of rank 1 alone
    dict(name='quarters', options=dict(QUARTERS, accumulate=2)),
]

def free_port():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]

def train_on_two_ranks(folder):
    """Train all runs of PLAN below `folder` -> `folder`, with a folder NAME for each run. Beside it
    are NAME-rank0.pt and NAME-rank1.pt: that rank's weights, and how its program ended."""
    runs.write_source(folder / 'data' / 'a', 'CT', 30)
    plan = [run | dict(port=free_port()) for run in PLAN]
    (folder / 'plan.json').write_text(json.dumps(plan))
    process = runs.start('two_ranks', folder, ranks=2)
    result = runs.finish(process)
    assert result.code == 0, result.err
    return folder

def hook(run, rank):
    """Have rank 1 do as the plan says in the step `at_step`."""
    import data
    augment, steps = data.augment, iter(range(10 ** 6))

    def augment_and_act(images, size):
        images, step = augment(images, size), next(steps)
        if rank == 1 and step == run.get('at_step'):
            if run['action'] == 'signal':
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                images = images * math.nan
        return images

    data.augment = augment_and_act
    return augment

def main():
    """One rank: train one run of the plan after another."""
    import data
    import pretrain
    folder, rank = Path(sys.argv[1]), int(os.environ['RANK'])
    exec(runs.NO_PICTURES)
    plan, networks, MAE = json.loads((folder / 'plan.json').read_text()), [], pretrain.MAE

    def make_network(config):
        networks.append(MAE(config))
        return networks[-1]

    pretrain.MAE = make_network
    for number, run in enumerate(plan):
        out, options = folder / run['name'], dict(run.get('options', STEP))
        if number:      # torchrun's own port serves the first alone
            os.environ.pop('TORCHELASTIC_USE_AGENT_STORE', None)
            os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(run['port']))
        if 'goes_on_from' in run:
            options['resume'] = True
            if rank == 0:
                shutil.copytree(folder / run['goes_on_from'], out)
        augment, code = hook(run, rank), 0
        sys.argv = ['pretrain.py', *runs.pretrain_words(folder / 'data', out, **options)]
        try:
            pretrain.main()
        except SystemExit as stop:
            code = stop.code
        data.augment = augment
        torch.save(dict(model=networks[-1].state_dict(), code=code), f'{out}-rank{rank}.pt')

if __name__ == '__main__':
    main()
