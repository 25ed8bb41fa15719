"""What a pretrained network finds alike, and how its training went: three pictures beside its checkpoint.

    python tests/pictures.py out/demo out/mine

A training calls it when it ends. curves.png: losses and bits against the step, so that nobody needs to parse log.jsonl.
attention.png and layout.png: the paper's Fig. 6 and 7, drawn from the images that were held out. On the screen: by
layer, how much of the features is modality (which Theorem A.3 argues about).
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
from model import MAE, ViT, load_weights, read_checkpoint  # noqa: E402
from pretrain import brightness, draw_grid  # noqa: E402

COLOURS = 'royalblue darkorange seagreen crimson purple sienna deeppink gray olive teal black gold'.split()
CURVES = {      # of log.jsonl: the title of a panel, the name of the line
    'mae': ('error of hidden patches', 'training'),
    'val_mae': ('error of hidden patches', 'validation'),
    'co': ('alignment loss', 'training'),
    'bal': ('balance loss', 'training'),
    'bits': ('modality in first expert, bits', 'layer {}'),
}

def draw_lines(path, panels):
    """Panels {title: {name of a line: [(x, y), ...]}} side by side, each from its least to its greatest numbers; of points
    (x, y, deviation) each is a dot, with a bar of that length up and down."""
    picture = Image.new('RGB', (330 * len(panels), 220), 'white')
    draw = ImageDraw.Draw(picture)
    for number, (title, lines) in enumerate(panels.items()):
        dotted = all(len(point) > 2 for line in lines.values() for point in line)
        lines = {name: np.array([(*point, 0)[:3] for point in line], float) for name, line in lines.items()}
        ends = np.concatenate([line[:, :2] + sign * line[:, 2:] * (0, 1) for line in lines.values() for sign in (-1, 1)])
        low, span = ends.min(0), np.ptp(ends, 0) + 1e-9
        corner, size = (330 * number + 55, 190), (190, -150)
        draw.text((corner[0], 12), title, 'black')
        for share in (0, 1):
            x, y = low + share * span
            draw.text((corner[0] + 190 * share, 194), f'{x:.4g}', 'gray', anchor='ma')
            draw.text((corner[0] - 6, 190 - 150 * share), f'{y:.3g}', 'gray', anchor='rm')
        for row, (colour, (name, line)) in enumerate(zip(COLOURS, lines.items())):
            places = corner + size * (line[:, :2] - low) / span
            draw.line([tuple(place) for place in places], colour, 2)
            for (x, y), bar in zip(places, 150 * line[:, 2] / span[1]) if dotted else ():
                draw.line([(x, y - bar), (x, y + bar)], colour)
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
            draw.text((corner[0] + 198, 40 + 14 * row), name, colour)
    picture.save(path)

def draw_curves(path, entries):
    """Losses and bits against the step, from the objects of log.jsonl."""
    panels = {}
    for entry in entries:
        for name, (title, line) in CURVES.items():
            values = entry.get(name)
            for layer, value in enumerate(values if isinstance(values, list) else [values], 1):
                if value is not None:       # not looked at in this step, or not finite
                    points = panels.setdefault(title, {}).setdefault(line.format(layer), [])
                    points.append((entry['step'] + 1, value))
    draw_lines(path, panels)

def modality_share(x, kinds):
    """Share of the variance of features x (L, images, C) that lies between modalities (L,); kinds (D, images) is 1
    where an image is of a modality."""
    x = x - x.mean(1, keepdim=True)
    means = kinds @ x / kinds.sum(1, keepdim=True)          # (L, D, C)
    return (kinds.sum(1) * means.square().sum(2)).sum(1) / x.square().sum((1, 2))

def cluster(x, k, rounds=20):
    """Spherical k-means of features x (M, C) of length 1: centres (k, C). Each begins where none before it is near."""
    centres = x[:1]
    while len(centres) < k:
        farthest = (x @ centres.T).amax(1).argmin()
        centres = torch.cat([centres, x[farthest, None]])
    for _ in range(rounds):
        member = F.one_hot((x @ centres.T).argmax(1), k).to(x.dtype)        # (M, k)
        centres = F.normalize(member.T @ x, dim=1)
    return centres

@torch.no_grad()
def draw_features(out, model, shards, k=6):
    """What the last layer finds alike in some 32 held-out images of each modality, less the modality's mean feature.

    layout.png (Fig. 7): the 16 patches nearest to each of k clusters' centres. attention.png (Fig. 6): an image, and
    how like (cosine) its patches are to three of them, of three clusters.
    """
    c, device, layout, maps, names = model.config, model.cls_token.device, [], [], []
    means, kinds = [], []       # of the patches' features (L, B, C), and the numbers of the images' modalities
    P, side = c.patch, c.size // c.patch
    for d in np.unique(shards.modality[shards.val]):
        ids = shards.val[shards.modality[shards.val] == d]
        images = data.center(shards.gather(ids[::math.ceil(len(ids) / 32)]).to(device), c.size)
        x, _, outputs = ViT.forward(model, images)
        means.append(torch.stack([layer[:, 1:].mean(1) for layer in outputs]))
        kinds += len(images) * [len(means) - 1]
        x = x[:, 1:]
        x = F.normalize(x - x.mean((0, 1)), dim=2)              # (B, N - 1, C)
        images = data.denormalize(images)
        images = images * brightness(images)
        patches = model.patchify(images)                        # (B, N - 1, P * P * 3)
        shows = patches.std(2) > 0.02                           # not air, not paper; nor the borders, with their text
        shows &= F.pad(torch.ones(side - 2, side - 2, device=device), (1, 1, 1, 1)).flatten() > 0
        if shows.sum() < 16:
            continue
        names.append(shards.modalities[d])
        alike = x @ cluster(x[shows], k).T * shows[:, :, None]          # (B, N - 1, k)
        nearest = patches.flatten(0, 1)[alike.flatten(0, 1).topk(16, 0).indices.T]          # (k, 16, P * P * 3)
        layout.append(nearest.view(k, 4, 4, P, P, 3).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))

        fills = F.one_hot(alike.argmax(2), k).mul(shows[:, :, None]).sum(1)                 # (B, k) patches
        best = fills.sort(1).values[:, -3].argmax()             # the image that shows three clusters best
        query = alike[best][:, fills[best].topk(3).indices].argmax(0)                       # (3,) patches
        heat = (x[best, query] @ x[best].T).view(3, 1, side, side).clamp(min=0)
        heat = F.interpolate(heat, (c.size, c.size), mode='bicubic').clamp(0, 1)
        place = F.interpolate(F.one_hot(query, side ** 2).float().view(3, 1, side, side), (c.size, c.size))
        frame = place + F.max_pool2d(-place, 5, 1, 2)           # the outermost pixels of the query's square
        red = torch.tensor((1.0, 0, 0), device=device)[:, None, None]
        shaded = torch.lerp(images[best].mean(0), red, 0.8 * heat ** 2)                     # (3, 3, S, S)
        maps.append(torch.cat([images[best, None], shaded.maximum(frame)]))
    shares = modality_share(torch.cat(means, 1).cpu(), F.one_hot(torch.tensor(kinds)).T.float())
    print(f'{out}: modality in the features, by layer: {" ".join(f"{share:.2f}" for share in shares)}')
    if names:
        groups = [f'group {number}' for number in range(1, k + 1)]
        draw_grid(out / 'layout.png', torch.stack(layout, 1), groups, names, (72, 72))
        like = 'redder: more\nlike the patch\nin the square'
        draw_grid(out / 'attention.png', torch.stack(maps, 1), ['image', like, like, like], names, (88, 88))

if __name__ == '__main__':
    if not sys.argv[1:] or {'-h', '--help'} & {*sys.argv}:
        sys.exit(__doc__)
    for out in map(Path, sys.argv[1:]):
        draw_curves(out / 'curves.png', [json.loads(line) for line in open(out / 'log.jsonl')])
        state, config, file = read_checkpoint(out / 'ckpt.pt')
        network = MAE(config).to(torch.accelerator.current_accelerator(check_available=True) or 'cpu')
        load_weights(network, state, out / 'ckpt.pt')
        draw_features(out, network, data.Shards(file['options']['data'], file['options']['val_share']))
