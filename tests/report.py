"""Markdown tables of runs, mean and deviation over seeds: python tests/report.py out/*

One of fine-tuned runs, of their headline score on the test images, and one of pretrained networks, of their last
validation's L_self.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetune import headline  # noqa: E402

TUNED = ('task', 'score', 'method', 'size', 'steps', 'batch', 'lr')
PRETRAINED = ('data', 'network', 'size', 'steps', 'batch', 'lr', 'top_k', 'routing', 'balance', 'momentum', 'sigma')

def tuned(folder):
    """What a finished fine-tuning was but for its seed, in the order of TUNED, and its score."""
    run = json.loads((folder / 'results.json').read_text())
    score = 'Dice' if 'dice' in run['scores'] else 'macro-F1'
    about = run['task'], score, run['method'], run['config']['size'], run['steps'], run['batch'], run['lr']
    return about, headline(run['scores'])

def pretrained(folder):
    """What a pretraining was but for its seed, in the order of PRETRAINED, and L_self of the last validation, or None."""
    o = json.loads((folder / 'config.json').read_text())['options']
    network = 'masked autoencoder' if not o['experts'] else '+ director' if o['co'] else '+ experts'
    last = json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])
    done = last['step'] + 1
    return tuple(dict(o, network=network, steps=done)[name] for name in PRETRAINED), last.get('val_mae')

def table(columns, found):
    print(f'| {" | ".join(columns)} | mean ± deviation | seeds |\n|{"---|" * (len(columns) + 2)}')
    for setting, values in sorted(found.items()):
        spread = f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''
        print('|', *(f'{item} |' for item in setting), f'{np.mean(values):.3f}{spread} | {len(values)} |')

def report(folders):
    """Print the tables of the runs in these folders; what is neither is passed over, what is not whole is named."""
    found = {TUNED: {}, PRETRAINED: {}}     # scores by what a run was but for its seed
    for folder in sorted({*map(Path, folders)}):
        try:
            if (folder / 'results.json').exists():
                columns, (setting, value) = TUNED, tuned(folder)
            elif (folder / 'best.pt').exists():
                raise ValueError('not finished')
            elif (folder / 'log.jsonl').exists():
                columns, (setting, value) = PRETRAINED, pretrained(folder)
            else:
                continue
            if value is None:
                raise ValueError('not finished')
            found[columns].setdefault(setting, []).append(value)
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            print(f'{folder}: left out, as it holds no results ({error!r})', file=sys.stderr)
    for columns, rows in found.items():
        if rows:
            table(columns, rows)

if __name__ == '__main__':
    if not sys.argv[1:] or {'-h', '--help'} & {*sys.argv}:
        sys.exit(__doc__)
    report(sys.argv[1:])
