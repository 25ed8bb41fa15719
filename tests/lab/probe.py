"""How much do frozen features know? Linear readers of them, without any fine-tuning.

    python -m tests.lab.probe out/mine/ckpt.pt --task eyes      a task prepared in data/eyes
    python -m tests.lab.probe out/*/ckpt.pt                     phantoms, of bodies never trained on
    python -m tests.lab.probe out/*/ckpt.pt --layers            each layer in rows of its own

A reader is a ridge regression on one-hot answers, all classes of equal weight. It has a closed
form, so that the only spread between seeds is that of pretraining. Its strength, the layer and, for
whole images, class token or mean of patches are those with the lowest error on the validation part.
Scores are macro-F1 and, of `height` and `place`, the explained variance R^2. Beside each network
stand the director alone (DEX-D), random weights, and the pixels: an image shrunk to 16 x 16, or a
patch. Untrained experts are copies of one MLP, so random weights are those of a plain network.
Checkpoints that differ only in their seed make one row, with the deviation over seeds.

Columns for phantoms. A subject is in the training, the validation or the test part (2 : 1 : 2):
lesion      sick or healthy, mean of the ten modalities; a pair is shown at one level of the body
modality    which of the ten
body        which of 40 bodies, seen in CT, PET and MR at other levels than those fitted on
height      of a slice in the body, in cm; mean of CT, PET and MR, as are the columns below
tissue      which of ten a patch mostly shows (those of lesions aside)
across      the same, fitted on one modality and tested on another, each centred at its own mean;
            mean of six pairs
alike       gut, liver, kidney, spleen or blood, in patches that show little else
border      a patch of two soft organs, or of one
place       of a patch in the body, in cm, in three directions
`height` and all columns after it see random crops, where position embeddings do not tell the place.
"""
import argparse
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from finetune import confusions, dice_of
from model import ViT, load_weights, read_checkpoint
from tests.lab.exams import phantom_exams, task_exam

STRENGTHS = 10.0 ** np.arange(-5, 3)
NO_MATTER = ('seed', 'out', 'resume', 'overwrite', 'device', 'log_every', 'save_minutes')
PIXELS, CHOSEN = 'pixels', 'chosen on validation'

# --- readers --------------------------------------------------------------------------------------

def targets(answers, classes):
    """Answers as float (n, k), and weights (n,) that sum to 1, in equal parts for each class."""
    if not classes:
        return answers.float(), torch.full((len(answers),), 1 / len(answers))
    counts = answers.bincount(minlength=classes)
    weights = 1 / counts[answers] / (counts > 0).sum()
    return F.one_hot(answers, classes).float(), weights

class Reader(NamedTuple):
    """A linear function of features x (rows, D) -> answers (rows, k)."""
    mean: torch.Tensor
    scale: torch.Tensor
    coefficients: torch.Tensor
    centre: torch.Tensor

    def __call__(self, x):
        return (x - self.mean) / self.scale @ self.coefficients + self.centre

def fit(x, y, weights):
    """Readers of x (rows, D) for y (rows, k) by ridge regression, one for each of STRENGTHS."""
    mean, centre = weights @ x, weights @ y
    x = x - mean
    scale = (weights @ x.square()).sqrt()
    scale = scale.clamp(min=0.1 * scale.mean() + 1e-6)      # a border of air varies in few images
    x = x / scale
    weighted = x * weights[:, None]
    values, vectors = torch.linalg.eigh((weighted.T @ x).double())      # correlations (D, D)
    projected = vectors.T @ (weighted.T @ (y - centre)).double()
    readers = []
    for strength in STRENGTHS:
        coefficients = vectors @ (projected / (values.clamp(min=0) + strength)[:, None])
        readers.append(Reader(mean, scale, coefficients.float(), centre))
    return readers

def ask(x, exam):
    """Validation error of the best reader of x (rows, D), and its answers (n, k) to the test."""
    rows, answers = exam.train
    readers = fit(x[rows], *targets(answers, exam.classes))
    val_rows, val_answers = exam.val
    truth, weights = targets(val_answers, exam.classes)
    errors = [weights @ (reader(x[val_rows]) - truth).square().sum(1) for reader in readers]
    best = int(torch.stack(errors).argmin())
    test = x[exam.test[0]]
    if exam.own_rows is not None:
        test = test - x[exam.own_rows].mean(0) + x[rows].mean(0)
    return errors[best].item(), readers[best](test)

def score(exam, answers):
    """Macro-F1, or the explained variance R^2, of answers (n, k) to the test."""
    truth = exam.test[1]
    if exam.classes:
        cells = truth * exam.classes + answers.argmax(1)
        table = cells.bincount(minlength=exam.classes ** 2).view(exam.classes, exam.classes)
        return float(dice_of(table.numpy()).mean())
    rest = (truth - answers).square().sum(0)
    return (1 - rest / (truth - truth.mean(0)).square().sum(0)).mean().item()

def confusion_of_images(exam, answers):
    """Confusion (images, C, C) of answers (n, k) to the test of a task, for `interval`."""
    table = confusions(answers.argmax(1), exam.test[1], exam.classes)
    return table.view(exam.test_images, -1, exam.classes, exam.classes).sum(1).numpy()

def examine(features, exams, judge=score):
    """What `judge` says of the answers to each exam: {(column, candidate): [judgement, ...]}.
    features: {kind: {candidate: (rows, D)}}. The best candidate is there as CHOSEN, too."""
    found = defaultdict(list)
    for exam in exams:
        best = math.inf
        for candidate, x in features[exam.kind].items():
            error, answers = ask(x, exam)
            judgement = judge(exam, answers)
            found[exam.column, candidate].append(judgement)
            if error < best:
                best, chosen = error, judgement
        found[exam.column, CHOSEN].append(chosen)
    return found

def interval(confusion, measure, draws=1000):
    """Bootstrap interval (95%) of the mean over seeds of an accuracy or macro-F1.
    confusion (seeds, n, C, C) is that of each test image; all seeds are drawn the same images."""
    n = confusion.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)      # (draws, n)
    drawn = np.einsum('dn,snij->dsij', counts, confusion, optimize=True)
    return np.percentile(np.ma.filled(measure(drawn).mean(1), 0), (2.5, 97.5))

def macro_f1(confusion):
    """Macro-F1 of confusions (..., C, C)."""
    return dice_of(confusion).mean(-1)

def accuracy(confusion):
    """Accuracy of confusions (..., C, C)."""
    return confusion.trace(axis1=-2, axis2=-1) / confusion.sum((-2, -1))

def seeds_needed(deviation, difference=0.02):
    """Seeds of each of two networks that show a difference (two-sided 5%, in 80% of the cases)."""
    return max(2, math.ceil(2 * ((1.96 + 0.84) * deviation / difference) ** 2))

# --- features -------------------------------------------------------------------------------------

@torch.no_grad()
def features_of(vit, config, views):
    """{kind: {candidate: (rows, D)}} of normalized images {'whole' or 'crop': (n, 3, S, S)}.
    Of crops there are patches, too, row by row. Without a ViT, features are the pixels."""
    found = defaultdict(dict)
    for kind, images in views.items():
        if vit is None:
            P = config.patch
            found[kind][PIXELS] = F.adaptive_avg_pool2d(images, 16).flatten(1)
            if kind == 'crop':
                found['patch'][PIXELS] = F.unfold(images, P, stride=P).mT.flatten(0, 1)
            continue
        parts = [torch.stack(vit(part)[2]) for part in images.split(64)]
        layers = F.layer_norm(torch.cat(parts, 1), (config.width,))     # as the next block sees it
        for number, tokens in enumerate(layers, 1):
            found[kind][f'layer {number}, class token'] = tokens[:, 0]
            found[kind][f'layer {number}, mean of patches'] = tokens[:, 1:].mean(1)
            if kind == 'crop':
                found['patch'][f'layer {number}, patches'] = tokens[:, 1:].flatten(0, 1)
    return found

def networks(paths):
    """Yield (group, title, seed, config, ViT or None for pixels) of checkpoints, each once."""
    seen = set()
    for path in map(Path, paths):
        state, config, checkpoint = read_checkpoint(path)
        options, step = checkpoint['options'], checkpoint.get('done', checkpoint.get('step'))
        seed = options['seed']
        kept = {name: value for name, value in options.items() if name not in NO_MATTER}
        run = json.dumps([kept, step, checkpoint['config']], sort_keys=True)
        name = path.parent.name if path.stem == 'ckpt' else f'{path.parent.name}, step {step}'
        plain = replace(config, experts=0, top_k=1)     # no expert, no choice
        view = f'{config.size} px in patches of {config.patch}'
        variants = [(PIXELS + view, f'{PIXELS}, {view}', 0, None),
                    (repr(plain), f'random weights, {view}', seed, None), (run, name, seed, config)]
        if config.experts:
            variants.append((f'{run} director', f'{name}, director alone', seed, plain))
        for group, title, seed, weights in variants:
            if (group, seed) in seen and weights:
                raise SystemExit(f'{path}: a network with these options and this seed came before')
            if (group, seed) in seen:
                continue
            seen.add((group, seed))
            torch.manual_seed(seed)
            vit = None if title.startswith(PIXELS) else ViT(weights or plain).eval()
            if weights:
                load_weights(vit, state, path)
            yield group, title, seed, config, vit

# --- the table ------------------------------------------------------------------------------------

def spread(values):
    """Mean and, of several values, deviation in words."""
    text = f'{np.mean(values):.3f}'
    return text + (f' ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else '')

def show_scores(rows, columns):
    """Print a table of rows (title, candidate, [{(column, candidate): [score, ...]}, one a seed]).
    Its last row takes the mean of all rows' variances."""
    print(f'| network (seeds) | {" | ".join(columns)} |\n|---{"|---" * len(columns)}|')
    variances = defaultdict(list)
    for title, candidate, runs in rows:
        cells = []
        for column in columns:
            values = [np.mean(run[column, candidate]) for run in runs if (column, candidate) in run]
            cells.append(spread(values) if values else '')
            if len(values) > 1 and candidate == CHOSEN:
                variances[column].append(np.var(values, ddof=1))
        where = '' if candidate == CHOSEN else f', {candidate}'
        print(f'| {title}{where} ({len(runs)}) | {" | ".join(cells)} |')
    if variances:
        needed = [str(seeds_needed(np.mean(variances[column]) ** 0.5)) for column in columns]
        print(f'| seeds that a difference of 0.02 needs | {" | ".join(needed)} |')

def show_task(rows, column):
    """Print accuracy and macro-F1 on a task, of rows as in `show_scores` with confusions."""
    print(f'| network (seeds) | {column}: accuracy [95% of bootstrap] | macro-F1 |\n|---|---|---|')
    for title, candidate, runs in rows:
        confusion = np.stack([run[column, candidate][0] for run in runs])   # (seeds, n, C, C)
        cells = []
        for measure in (accuracy, macro_f1):
            low, high = interval(confusion, measure)
            cells.append(f'{spread(measure(confusion.sum(1)))} [{low:.3f}, {high:.3f}]')
        where = '' if candidate == CHOSEN else f', {candidate}'
        print(f'| {title}{where} ({len(runs)}) | {" | ".join(cells)} |')

def main():
    """Probe each checkpoint and what stands beside it; print one table."""
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m tests.lab.probe',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoints', nargs='+')
    parser.add_argument('--task', help='folder below --data of a labelled task')
    parser.add_argument('--data', default='data', help='folder of the tasks (default: data)')
    parser.add_argument('--subjects', type=int, default=300,
                        help='phantoms of each modality (default: %(default)s)')
    parser.add_argument('--layers', action='store_true', help='a row for each layer, too')
    o = parser.parse_args()
    made, found, titles = {}, defaultdict(list), {}
    for group, title, seed, config, vit in networks(o.checkpoints):
        view = config.size, config.patch
        if view not in made and o.task:
            made[view] = task_exam(Path(o.data, o.task), *view)
        elif view not in made:
            made[view] = phantom_exams(o.subjects, *view)
        images, exams = made[view]
        judge = confusion_of_images if o.task else score
        found[group].append(examine(features_of(vit, config, images), exams, judge))
        titles.setdefault(group, title)
    rows = []
    for group, runs in found.items():
        names = dict.fromkeys(name for run in runs for _, name in run)
        for name in names:
            if name == CHOSEN or (o.layers and name != PIXELS):
                rows.append((titles[group], name, runs))
    columns = list(dict.fromkeys(exam.column for exam in exams))
    print()
    if o.task:
        show_task(rows, columns[0])
    else:
        show_scores(rows, columns)

if __name__ == '__main__':
    torch.set_num_threads(1)
    main()
