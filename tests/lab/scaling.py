"""Draw Fig. 5 from fine-tuned runs: the score against three options of finetune.py.

    python -m tests.lab.scaling out/tune/*

The options are --top_k, --fraction and --tune_blocks; each has a panel. It writes scaling.png and
prints its numbers, means and deviations over seeds. A line is a network that was fine-tuned: from
scratch, or named as its checkpoint. All settings are read from results.json. A panel shows runs
that differ in its option, in network and seed alone; other runs are counted and left out. Where the
runs belong to several tasks, it takes the one in which most values of the options were tried.
"""
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from finetune import headline
from tests.lab.pictures import Panel, draw_lines
from tests.lab.report import tuned_settings

PANELS = {      # an option of finetune.py, and what it counts
    'top_k': 'activated experts',
    'fraction': 'share of the training images',
    'tune_blocks': 'tuned blocks',
}

def network_of(run):
    """What the fine-tuning began with: scratch, or the name of a checkpoint."""
    path = Path(run['init'])
    return path.absolute().parent.name if path.name == 'ckpt.pt' else path.stem

def value_of(run, option):
    """The value of an option as it was. Of blocks no more than all are tuned; -1 once meant all."""
    if option == 'top_k':
        return run['config']['top_k']
    value = run['options'][option]
    if option == 'tune_blocks':
        depth = run['config']['depth']
        return depth if value == -1 else min(value, depth)
    return value

def other_settings(run, option):
    """All that must be the same in the runs of a panel, as text."""
    settings = tuned_settings(run)
    for name in ('epochs', 'steps', 'warmup_epochs'):
        settings[name] = run['options'][name]
    for name in PANELS:
        settings[name] = value_of(run, name)
    del settings[option]
    return json.dumps(settings, sort_keys=True)

def largest_group(runs, option):
    """Those runs that differ in nothing but network, seed and option, with the most values of the
    option in them."""
    groups = defaultdict(list)
    for run in runs:
        groups[other_settings(run, option)].append(run)

    def size(group):
        return len({value_of(run, option) for run in group}), len(group)

    return max(groups.values(), key=size)

def curves(runs, option):
    """{network: [(value of the option, mean score, deviation over seeds), ...]}."""
    scores = defaultdict(lambda: defaultdict(list))
    for run in runs:
        scores[network_of(run)][value_of(run, option)].append(headline(run['scores']))
    lines = {}
    for network, found in sorted(scores.items()):
        lines[network] = []
        for value, ours in sorted(found.items()):
            deviation = statistics.stdev(ours) if len(ours) > 1 else 0.0
            lines[network].append((value, statistics.mean(ours), deviation))
    return lines

def choose_task(runs):
    """The task in whose runs most values of the three options were tried."""
    tried = defaultdict(set)
    for run in runs:
        for option in PANELS:
            tried[run['task']].add((option, value_of(run, option)))
    return max(tried, key=lambda task: len(tried[task]))

def read_runs(folders):
    """The contents of results.json of all finished fine-tunings in these folders."""
    runs = []
    for folder in folders:
        path = Path(folder, 'results.json')
        if path.exists():
            try:
                runs.append(json.loads(path.read_text()))
            except ValueError as error:
                raise SystemExit(f'{path}: is no JSON ({error}); leave this folder out')
    if not runs:
        raise SystemExit('none of these folders holds a finished fine-tuning')
    return runs

def main():
    """Draw the panels of the folders on the command line, and print their numbers."""
    folders = sys.argv[1:]
    if not folders or {'-h', '--help'} & set(folders):
        sys.exit(__doc__)
    runs = read_runs(folders)
    task = choose_task(runs)
    runs = [run for run in runs if run['task'] == task]
    segments = 'dice' in runs[0]['scores']
    panels = []
    for option, title in PANELS.items():
        group = largest_group(runs, option)
        lines = curves(group, option)
        panels.append(Panel(task, title, 'Dice' if segments else 'macro-F1', lines))
        for name, points in lines.items():
            numbers = ', '.join(f'{x:g}: {y:.3f} ± {bar:.3f}' for x, y, bar in points)
            print(f'{task}: {title}, {name}: {numbers}')
        if len(group) < len(runs):
            print(f'{task}: {title}: {len(runs) - len(group)} runs with other settings left out')
    draw_lines('scaling.png', panels, same_heights=True)
    print('scaling.png: drawn')

if __name__ == '__main__':
    main()
