"""Tables in markdown of the runs in some folders: mean and deviation over seeds.

    python -m tests.lab.report out/*

One table has the fine-tuned runs with their headline score on the test images, another one the
pretrained networks with L_self of their last validation. Runs that differ in nothing but their seed
share a row. All settings are read from the runs' results.json and config.json.
"""
import json
import sys
from pathlib import Path

import numpy as np

from finetune import headline

# Columns that are always there; beside them stand the settings in which the runs differ.
SHOWN = ('task', 'score', 'method', 'data', 'network', 'size', 'steps', 'batch', 'lr')
# Options in which the runs of a row may differ.
NO_MATTER = ('seed', 'out', 'resume', 'overwrite', 'demo', 'device', 'bf16', 'log_every',
             'val_every', 'save_minutes')
# Options of a fine-tuning whose outcome stands elsewhere in results.json, or that are not of it.
OUTCOMES = ('init', 'adapt', 'model', 'depth', 'size', 'patch', 'top_k', 'epochs', 'steps',
            'warmup_epochs', 'data', 'predict')

def network_name(experts, align):
    """What a pretrained network is called in tables: by its experts and its alignment loss."""
    if not experts:
        return 'masked autoencoder'
    return '+ director' if align else '+ experts'

def tuned_settings(run):
    """The options and the sizes of a fine-tuned network, from its results.json."""
    settings = {name: value for name, value in run.get('options', {}).items()
                if name not in NO_MATTER and name not in OUTCOMES}
    return dict(settings, **run['config'])

def tuned(folder):
    """Settings of a finished fine-tuning, and its score."""
    run = json.loads((folder / 'results.json').read_text())
    settings = tuned_settings(run)
    for name in ('task', 'method', 'steps', 'batch', 'lr', 'weight_decay', 'warmup'):
        settings[name] = run[name]
    settings['score'] = 'Dice' if 'dice' in run['scores'] else 'macro-F1'
    return settings, headline(run['scores'])

def pretrained(folder):
    """Settings of a finished pretraining, and L_self of the validation at its last step."""
    run = json.loads((folder / 'config.json').read_text())
    options = run['options']
    steps = run.get('steps', options['steps'])      # as the epochs gave
    last = json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])
    if last['step'] + 1 < steps:
        raise ValueError('not finished')
    settings = {name: value for name, value in options.items() if name not in NO_MATTER}
    settings['steps'] = steps
    settings['network'] = network_name(options['experts'], options['align'])
    return settings, last['val_l_self']

def by_number(cell):
    """What the cells of a column are sorted by: numbers by their value, before words."""
    try:
        return 0, float(cell), ''
    except ValueError:
        return 1, 0.0, cell

def print_table(runs):
    """Print a table of runs, pairs of settings and a score."""
    first, _ = runs[0]
    varied = {name for settings, _ in runs for name in settings
              if settings[name] != first.get(name)}
    names = [name for name in dict.fromkeys((*SHOWN, *first))
             if name in first and (name in SHOWN or name in varied)]
    rows = {}
    for settings, score in runs:
        row = tuple(str(settings.get(name)) for name in names)
        rows.setdefault(row, []).append(score)
    print(f'| {" | ".join(names)} | mean ± deviation | seeds |')
    print('|' + '---|' * (len(names) + 2))
    for row in sorted(rows, key=lambda row: [by_number(cell) for cell in row]):
        scores = rows[row]
        mean = f'{np.mean(scores):.3f}'
        if len(scores) > 1:
            mean += f' ± {np.std(scores, ddof=1):.3f}'
        print(f'| {" | ".join(row)} | {mean} | {len(scores)} |')

def read_runs(folders):
    """The fine-tuned and the pretrained runs in these folders, two lists as print_table takes them,
    and how many were left out. Folders without a run are passed over; what is left out is named."""
    all_tuned, all_pretrained, left_out = [], [], 0
    for folder in sorted(set(map(Path, folders))):
        try:
            if (folder / 'results.json').exists():
                all_tuned.append(tuned(folder))
            elif (folder / 'best.pt').exists():
                raise ValueError('not finished')
            elif (folder / 'log.jsonl').exists():
                all_pretrained.append(pretrained(folder))
            elif not folder.exists():
                raise ValueError('no such folder')
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            print(f'{folder}: left out, as it holds no results ({error!r})', file=sys.stderr)
            left_out += 1
    return all_tuned, all_pretrained, left_out

def main():
    """Print the tables of the folders on the command line."""
    folders = sys.argv[1:]
    if not folders or {'-h', '--help'} & set(folders):
        sys.exit(__doc__)
    *tables, left_out = read_runs(folders)
    for runs in tables:
        if runs:
            print_table(runs)
    if not any(tables):
        sys.exit(left_out or 'none of these folders holds a run')

if __name__ == '__main__':
    main()
