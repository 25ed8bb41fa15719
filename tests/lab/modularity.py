"""How modular are a network's features? CT, PET and MR of the phantoms show the same bodies.

    python -m tests.lab.modularity out/demo/ckpt.pt
    python -m tests.lab.modularity out/*/ckpt.pt --bodies 100

For each layer it prints two kinds of numbers. The first are shares of the features' variance, by a
two-way analysis: mean + modality + body + rest. They come from the mean squares, so a factor
without influence has a share near 0. The second is retrieval. Take each modality's mean away: is an
image's nearest neighbour (by cosine) in another modality the same body? Chance is 1 / bodies.

Both are measured at one level of the body at a time (chest, liver, ...), for otherwise the level
would count as body; the table has the mean over levels. Features are `mean`, the mean of an image's
patches, which tells what is seen but not where; and `place`, all its patches one after another.

Checkpoints that differ only in their seed make one row, with the deviation over them. Beside them
stand plain networks with random weights and, where there are experts, the director alone. The
bodies have a seed that no phantom of the demo has.
"""
import argparse
import tempfile
from collections import defaultdict
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import prepare_medverse
from model import ViT, load_weights, read_checkpoint
from tests.lab import phantoms
from tests.lab.report import network_name

MODALITIES = ('CT', 'PET', 'MR')
UNITS = ('CT', 'SUV', 'MR')     # what prepare_medverse.to_uint8 calls their intensities
LEVELS = (2, 3, 4, 5)           # slices of a volume
SEED = 1000

def draw_bodies(count, size):
    """New bodies, prepared as for pretraining: uint8 (levels, modalities, count, 3, size, size)."""
    images = np.empty((len(LEVELS), len(MODALITIES), count, size, size), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for m, n in np.ndindex(len(MODALITIES), count):
            phantoms.write_phantom(Path(folder), MODALITIES[m], n, SEED)
            file = next(Path(folder, 'raw', MODALITIES[m]).rglob(f'{n:04d}.nii.gz'))
            (volume,) = prepare_medverse.read(file)
            slices = list(prepare_medverse.to_uint8(volume, UNITS[m]))
            for number, level in enumerate(LEVELS):
                images[number, m, n] = prepare_medverse.resize(slices[level], size)[..., 0]
    return torch.from_numpy(images)[:, :, :, None].expand(-1, -1, -1, 3, -1, -1)

@torch.no_grad()
def patch_features(vit, images):
    """Patch features of uint8 images (..., 3, S, S) after each block, (L, ..., N - 1, C)."""
    parts = []
    for part in images.flatten(0, -4).split(64):
        _, _, outputs = vit(data.whole_view(part, vit.config.size))
        parts.append(torch.stack(outputs)[:, :, 1:])
    return torch.cat(parts, 1).unflatten(1, images.shape[:-3])

def shares(x):
    """Shares (3,) of modality, body and rest in the variance of features x (modalities, bodies, C).
    They are components of a random-effects model with one observation a cell, by the method of
    moments, summed over channels. pictures.share_between is another measure, of other images."""
    D, bodies, _ = x.shape
    x = x - x.mean((0, 1))
    modality = x.mean(1, keepdim=True)
    body = x.mean(0, keepdim=True)
    # Mean squares: sums of squares over degrees of freedom.
    rest = (x - modality - body).square().sum() / ((D - 1) * (bodies - 1))
    between_modalities = bodies * modality.square().sum() / (D - 1)
    between_bodies = D * body.square().sum() / (bodies - 1)
    components = [(between_modalities - rest) / bodies, (between_bodies - rest) / D, rest]
    components = torch.stack(components).clamp(min=0)
    return components / components.sum()

def retrieval(x):
    """Share of the images whose nearest neighbour in another modality is the same body.
    x are features (modalities, bodies, C)."""
    x = F.normalize(x - x.mean(1, keepdim=True), dim=2)
    hits = []
    for a, b in permutations(range(len(x)), 2):
        nearest = (x[a] @ x[b].T).argmax(1)
        hits.append(nearest == torch.arange(len(nearest)))
    return torch.stack(hits).float().mean()

def measure(vit, images):
    """Shares of modality, body and rest, and the retrieval: (L, 2, 4), for `mean` and `place`."""
    rows = []
    for layer in patch_features(vit.eval(), images):    # (levels, modalities, bodies, N - 1, C)
        for x in (layer.mean(3), layer.flatten(3)):
            levels = [torch.cat([shares(level), retrieval(level)[None]]) for level in x]
            rows.append(torch.stack(levels).mean(0))
    return torch.stack(rows).unflatten(0, (-1, 2))

def variants(path):
    """Networks to measure for a checkpoint: {title: ViT}, and the seed of its training."""
    state, config, checkpoint = read_checkpoint(path)
    try:
        options = checkpoint['options']
        name = network_name(config.experts, options['align'])
        steps, seed = checkpoint.get('step', options['steps']), options['seed']
    except KeyError:
        raise SystemExit(f'{path}: does not tell how it was trained; give a ckpt.pt of pretrain.py')
    plain = replace(config, experts=0)
    chosen = {'random weights': (plain, None), f'{name}, {steps} steps': (config, state)}
    if config.experts:
        chosen[f'{name}, its director alone, {steps} steps'] = (plain, state)
    networks = {}
    for title, (ours, weights) in chosen.items():
        torch.manual_seed(seed)
        vit = ViT(ours)
        if weights:
            load_weights(vit, weights, path)
        networks[f'{title}, {config.depth} blocks at {config.size} pixels'] = vit
    return networks, seed

def print_table(found):
    """Print found, {title: {seed: what measure returns}}."""
    columns = [f'{kind}: {what}' for kind in ('mean', 'place')
               for what in ('modality', 'body', 'rest', 'retrieved')]
    print(f'| network (seeds) | layer | {" | ".join(columns)} |')
    print('|---|---' + '|---' * len(columns) + '|')
    for title, runs in found.items():
        values = torch.stack(list(runs.values())).flatten(2)        # (seeds, L, 8)
        for number, layer in enumerate(values.unbind(1), 1):
            cells = []
            for numbers in layer.T:
                cell = f'{numbers.mean():.3f}'
                if len(numbers) > 1:
                    cell += f' ± {numbers.std():.3f}'
                cells.append(cell)
            print(f'| {title} ({len(runs)}) | {number} | {" | ".join(cells)} |')

def main():
    """Measure the checkpoints on the command line, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m tests.lab.modularity',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoints', nargs='+', help='ckpt.pt of pretrainings')
    parser.add_argument('--bodies', type=int, default=60,
                        help='how many bodies to simulate, 2 or more (default: %(default)s)')
    o = parser.parse_args()
    if o.bodies < 2:
        raise SystemExit(f'--bodies {o.bodies}: must be 2 or more')
    found, images = defaultdict(dict), {}
    for path in o.checkpoints:
        networks, seed = variants(path)
        for title, vit in networks.items():
            size = vit.config.size
            if size not in images:
                images[size] = draw_bodies(o.bodies, size)
            if seed not in found[title]:
                found[title][seed] = measure(vit, images[size])
            elif 'random weights' not in title:
                raise SystemExit(f'{path}: another network of this kind and seed came before; '
                                 f'measure one at a time')
    print(f'\n{o.bodies} bodies, so the chance of retrieval is {1 / o.bodies:.3f}')
    print_table(found)

if __name__ == '__main__':
    main()
