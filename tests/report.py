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

SHOWN = ('task', 'score', 'method', 'data', 'network', 'size', 'steps', 'batch', 'lr')     # and whatever else varies
NO_MATTER = ('seed', 'out', 'resume', 'overwrite', 'demo', 'device', 'bf16', 'log_every', 'val_every', 'save_minutes')

def tuned(folder):
    """Settings of a finished fine-tuning, and its score."""
    run = json.loads((folder / 'results.json').read_text())
    settings = {name: run[name] for name in ('task', 'method', 'steps', 'batch', 'lr', 'weight_decay', 'warmup')}
    score = 'Dice' if 'dice' in run['scores'] else 'macro-F1'
    return dict(run['config'], **settings, score=score), headline(run['scores'])

def pretrained(folder):
    """Settings of a pretraining, and L_self of its last validation, which must be that of its last step."""
    run = json.loads((folder / 'config.json').read_text())
    settings, last = run['options'], json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])
    settings['steps'] = run.get('steps', settings['steps'])     # as the epochs gave
    if last['step'] + 1 < settings['steps']:
        raise ValueError('not finished')
    network = 'masked autoencoder' if not settings['experts'] else '+ director' if settings['co'] else '+ experts'
    settings = {name: value for name, value in settings.items() if name not in NO_MATTER}
    return dict(settings, network=network), last['val_mae']

def table(runs):
    """Print runs, pairs of settings and a score; those that differ in nothing but the seed share a row."""
    varied = {name for settings, _ in runs for name, value in settings.items() if value != runs[0][0].get(name)}
    names = [name for name in dict.fromkeys((*SHOWN, *runs[0][0])) if name in runs[0][0] and name in {*SHOWN, *varied}]
    rows = {}
    for settings, score in runs:
        rows.setdefault(tuple(str(settings.get(name)) for name in names), []).append(score)
    print(f'| {" | ".join(names)} | mean ± deviation | seeds |\n|{"---|" * (len(names) + 2)}')
    for row, scores in sorted(rows.items()):
        spread = f' ± {np.std(scores, ddof=1):.3f}' if len(scores) > 1 else ''
        print('|', *(f'{item} |' for item in row), f'{np.mean(scores):.3f}{spread} | {len(scores)} |')

def report(folders):
    """Print the tables of the runs in these folders; what is neither is passed over, what is not whole is named."""
    found = {tuned: [], pretrained: []}
    for folder in sorted({*map(Path, folders)}):
        try:
            if (folder / 'results.json').exists():
                found[tuned].append(tuned(folder))
            elif (folder / 'best.pt').exists():
                raise ValueError('not finished')
            elif (folder / 'log.jsonl').exists():
                found[pretrained].append(pretrained(folder))
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            print(f'{folder}: left out, as it holds no results ({error!r})', file=sys.stderr)
    for runs in found.values():
        if runs:
            table(runs)

if __name__ == '__main__':
    if not sys.argv[1:] or {'-h', '--help'} & {*sys.argv}:
        sys.exit(__doc__)
    report(sys.argv[1:])
