"""One Markdown table of fine-tuned runs, mean and deviation over seeds: python tests/report.py out/*"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetune import headline  # noqa: E402

def report(folders):
    """Print a Markdown table of the runs' headline scores: mean ± deviation over the seeds of one task and setting."""
    found = {}      # scores by what a run was but for its seed
    for folder in sorted({*map(Path, folders)}):
        file = folder / 'results.json'
        if not file.exists():
            if (folder / 'best.pt').exists():
                print(f'{folder}: left out, as it is not finished', file=sys.stderr)
            continue
        try:
            run = json.loads(file.read_text())
            score = 'Dice' if 'dice' in run['scores'] else 'macro-F1'
            setting = run['task'], score, run['method'], run['config']['size'], run['steps'], run['batch'], run['lr']
            found.setdefault(setting, []).append(headline(run['scores']))
        except (ValueError, KeyError, TypeError) as error:
            print(f'{file}: left out, as these are no results ({error!r})', file=sys.stderr)
    print('| task | score | method | size | steps | batch | lr | mean ± deviation | seeds |\n' + '|---' * 9 + '|')
    for setting, values in sorted(found.items()):
        spread = f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else ''
        print('|', *(f'{item} |' for item in setting), f'{np.mean(values):.3f}{spread} | {len(values)} |')

if __name__ == '__main__':
    if not sys.argv[1:] or {'-h', '--help'} & {*sys.argv}:
        sys.exit(__doc__)
    report(sys.argv[1:])
