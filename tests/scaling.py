"""Draw Fig. 5 from fine-tuned runs: the score against activated experts, share of the training images and tuned blocks.

    python tests/scaling.py out/tune/*              writes scaling.png and prints its numbers: means, deviations over seeds

Takes the runs that pretrain.py's checkpoints `dex` and, for the share of the images, `scratch` began, of one task.
"""
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from pictures import draw_lines  # which puts the repository on the path
from finetune import headline  # noqa: E402

PANELS = dict(top_k='activated experts', fraction='share of the training images', tune_blocks='tuned blocks')

def curves(runs, option, task):
    """{name: [(x, mean, deviation)]} of the runs of a task whose method differs in this option alone or in none."""
    scores = defaultdict(lambda: defaultdict(list))     # of each pretraining, by the option's value, one a seed
    for run in runs:
        options, (_, adapt, start, *changed) = run['options'], run['method'].split('-')
        if run['task'] != task or adapt != 'E' or start not in ('dex', 'scratch') or changed[::2] not in ([], [option]):
            continue
        value = run['config']['top_k'] if option == 'top_k' else options[option]
        value = run['config']['depth'] if value == -1 else value        # all blocks
        scores['pretrained' if start == 'dex' else 'scratch'][value].append(headline(run['scores']))
    return {name: [(x, statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for x, v in sorted(found.items())]
            for name, found in scores.items()}

def main():
    files = [Path(folder, 'results.json') for folder in sys.argv[1:]]
    if not any(file.exists() for file in files):
        sys.exit('none of these folders holds a finished fine-tuning')
    runs = [json.loads(file.read_text()) for file in files if file.exists()]
    task = max((run['task'] for run in runs), key=[run['task'] for run in runs if '-top_k-' in run['method']].count)
    panels = {f'{task}: {title}': curves(runs, option, task) for option, title in PANELS.items()}
    draw_lines('scaling.png', panels)
    for title, lines in panels.items():
        for name, points in lines.items():
            print(f'{title}, {name}:', ', '.join(f'{x:g}: {y:.3f} ± {bar:.3f}' for x, y, bar in points))

if __name__ == '__main__':
    if not sys.argv[1:] or {'-h', '--help'} & {*sys.argv}:
        sys.exit(__doc__)
    main()
