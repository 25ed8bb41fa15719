"""How modular are a network's features? Measured on phantoms, where CT, PET and MR see the same bodies.

    python tests/modularity.py out/demo/ckpt.pt
    python tests/modularity.py out/*/ckpt.pt --bodies 100

By layer, a two-way analysis of variance of the features of each body in each modality, mean + modality + body + rest:
how much of the variance each of the three explains, in shares that add up to 1. They come from the mean squares, so a
factor that has no influence has a share near 0, not the one that its degrees of freedom would give it.
Then retrieval: with each modality's mean taken away, is an image's nearest neighbour by cosine, among the images of all
bodies in another modality, the same body? Chance is 1 / bodies.

Each is measured within one level of the body at a time (chest, liver, ...; otherwise the level would count as body) and
averaged over levels. Features: `mean` of an image's patches, which knows what is seen but not where, and `place`, all
its patches one after another. Checkpoints that differ only in their seed make one row, with the deviation over them.
Beside them are measured plain networks with random weights and, of those with experts, the director alone. The bodies
are drawn from a seed that no phantom of the demo has.
"""
import argparse
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import phantoms  # noqa: E402
import prepare_medverse  # noqa: E402
from model import ViT, load_weights, read_checkpoint  # noqa: E402

MODALITIES, LEVELS, SEED = ('CT', 'PET', 'MR'), (2, 3, 4, 5), 1000

def bodies(count, size):
    """uint8 images (levels, modalities, count, 3, size, size) of `count` new bodies, prepared as for pretraining."""
    images = np.empty((len(LEVELS), len(MODALITIES), count, size, size), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for m, n in np.ndindex(len(MODALITIES), count):
            phantoms.write_phantom(Path(folder), MODALITIES[m], n, SEED)
            file = next(Path(folder, 'raw', MODALITIES[m]).rglob(f'{n:04d}.nii.gz'))
            volume, = prepare_medverse.read(file)
            slices = list(prepare_medverse.normalize(volume, 'SUV' if MODALITIES[m] == 'PET' else MODALITIES[m]))
            for l, level in enumerate(LEVELS):
                images[l, m, n] = prepare_medverse.resize(slices[level], size)[..., 0]
    return torch.from_numpy(images)[:, :, :, None].expand(-1, -1, -1, 3, -1, -1)

@torch.no_grad()
def features(vit, images):
    """Patch features of images (..., 3, S, S) after each block, (L, ..., N - 1, C)."""
    layers = []
    for part in images.flatten(0, -4).split(64):
        _, _, outputs = vit(data.center(part, vit.config.size))
        layers.append(torch.stack(outputs)[:, :, 1:])
    return torch.cat(layers, 1).unflatten(1, images.shape[:-3])

def shares(x):
    """Of features x (M, I, C), of I bodies in M modalities: shares (3,) of modality, body and rest in the variance.

    Components of a random-effects model with one observation a cell, by the method of moments, summed over channels.
    """
    M, I, _ = x.shape
    x = x - x.mean((0, 1))
    modality, body = x.mean(1, keepdim=True), x.mean(0, keepdim=True)
    rest = (x - modality - body).square().sum() / ((M - 1) * (I - 1))       # mean squares
    between = I * modality.square().sum() / (M - 1), M * body.square().sum() / (I - 1)
    parts = torch.stack([(between[0] - rest) / I, (between[1] - rest) / M, rest]).clamp(min=0)
    return parts / parts.sum()

def retrieval(x):
    """Of features x (M, I, C): share of the images whose nearest among the I of another modality is the same body."""
    x = F.normalize(x - x.mean(1, keepdim=True), dim=2)
    hits = [(x[a] @ x[b].T).argmax(1) == torch.arange(len(x[a])) for a, b in permutations(range(len(x)), 2)]
    return torch.stack(hits).float().mean()

def measure(vit, images):
    """(L, 2, 4): by layer and kind of feature, shares of modality, body and rest, and the retrieval."""
    rows = []
    for layer in features(vit.eval(), images):
        for x in (layer.mean(3), layer.flatten(3)):
            rows.append(torch.stack([torch.cat([shares(level), retrieval(level)[None]]) for level in x]).mean(0))
    return torch.stack(rows).unflatten(0, (-1, 2))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoints', nargs='+')
    parser.add_argument('--bodies', type=int, default=60)
    o = parser.parse_args()
    found, images = defaultdict(dict), {}       # results of each network by the seed of its pretraining
    for path in o.checkpoints:
        state, config, file = read_checkpoint(path)
        options = file['options']
        if config.size not in images:
            images[config.size] = bodies(o.bodies, config.size)
        name = 'masked autoencoder' if not config.experts else '+ experts' if not options['co'] else '+ director'
        variants = [('random weights', replace(config, experts=0), None), (name, config, state)]
        if config.experts:
            variants.append((f'{name}, its director alone', replace(config, experts=0), state))
        for title, c, weights in variants:
            torch.manual_seed(options['seed'])
            vit = ViT(c)
            if weights:
                load_weights(vit, weights, path)
                title += f', {options["steps"]} steps'
            title += f', {c.depth} blocks at {c.size} pixels'
            if weights and options['seed'] in found[title]:
                sys.exit(f'{path}: another network of this kind and seed came before; measure one at a time')
            found[title][options['seed']] = measure(vit, images[c.size])
    columns = [f'{kind}: {what}' for kind in ('mean', 'place') for what in ('modality', 'body', 'rest', 'retrieved')]
    print(f'\n{o.bodies} bodies, so the chance of retrieval is {1 / o.bodies:.3f}')
    print(f'| network (seeds) | layer | {" | ".join(columns)} |\n|---|---{"|---" * len(columns)}|')
    for title, runs in found.items():
        values = torch.stack(list(runs.values())).flatten(2)        # (seeds, L, 8)
        for l in range(values.shape[1]):
            cells = [f'{v.mean():.3f}' + (f' ± {v.std():.3f}' if len(v) > 1 else '') for v in values[:, l].T]
            print(f'| {title} ({len(runs)}) | {l + 1} | {" | ".join(cells)} |')

if __name__ == '__main__':
    main()
