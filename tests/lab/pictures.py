"""Draw all pictures of a run, from its checkpoint and its log, while it goes on or after it.

    python -m tests.lab.pictures out/demo
    python -m tests.lab.pictures out/*

The folder of a pretraining gets
    curves.png      losses and bits against the step
    recon.png       held-out images, what the encoder sees of them, and what it guesses
    experts.png     which modality uses which expert, layer by layer (the paper's Fig. 9)
    attention.png   which patches have features like those of a chosen patch (Fig. 6)
    layout.png      groups of patches with similar features (Fig. 7)
and that of a fine-tuned segmentation
    cases.png       the best, the median and the worst test image

Letters as in model.py, and V held-out images, D modalities.
"""
import argparse
import itertools
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import finetune
import pretrain
from model import MAE, ViT, read_checkpoint
from tests.lab import predict

# --- rows of tiles --------------------------------------------------------------------------------

LEFT, GAP, LINE = 116, 4, 20    # pixels: of the rows' names, between tiles, of a line of text
FONT = ImageFont.load_default(16)

def draw_grid(path, rows, row_names, column_names, tile=(96, 96), note=''):
    """Write a picture of tiles, with names beside its rows and above its columns, and a note below.
    rows: a tensor (columns, 3, H, W) in [0, 1] for each row. tile: height and width in pixels to
    which all of them are resized."""
    height, width = tile
    strips = []
    for row in rows:
        row = F.interpolate(row.float().cpu(), tile, mode='area')
        row = F.pad(row, (GAP, 0, GAP, 0), value=1)
        strips.append(torch.cat([*row], 2))
    page = torch.cat(strips, 1)                                         # (3, height, width)
    top = LINE * max(1 + name.count('\n') for name in column_names)
    lines = wrap(note, page.shape[2])
    page = F.pad(page, (LEFT, GAP, top, GAP + LINE * len(lines)), value=1)
    page = page.clamp(0, 1).mul(255).byte()
    picture = Image.fromarray(page.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(row_names):
        middle = top + GAP + (height + GAP) * number + height / 2
        draw.text((6, middle), name, 'black', FONT, anchor='lm')
    for number, name in enumerate(column_names):
        left = LEFT + GAP + (width + GAP) * number
        draw.text((left, 2), name, 'black', FONT)
    note_top = picture.height - LINE * len(lines)
    draw.text((LEFT + GAP, note_top), '\n'.join(lines), 'dimgray', FONT)
    # A palette of 256 colours takes a third of the bytes.
    palette = picture.quantize(method=Image.Quantize.MAXCOVERAGE)
    picture.quantize(palette=palette).save(path)

def wrap(text, width):
    """The lines of a text, none wider than `width` pixels unless by a single word."""
    lines = []
    for word in text.split():
        if lines and FONT.getlength(f'{lines[-1]} {word}') <= width:
            lines[-1] += f' {word}'
        else:
            lines.append(word)
    return lines

# --- lines ----------------------------------------------------------------------------------------

PANEL, AXES = (410, 290), (230, 200)     # width and height in pixels, with names and without
CORNER = (64, 240)                       # where the axes of a panel meet
TITLE_FONT, SMALL_FONT = ImageFont.load_default(15), ImageFont.load_default(13)
LINE_COLOURS = ('royalblue', 'darkorange', 'seagreen', 'crimson', 'purple', 'sienna', 'deeppink',
                'gray', 'olive', 'teal', 'black', 'gold')
LEVEL_COLOURS = ('black', 'gray')

class Panel(NamedTuple):
    """Lines in one pair of axes. Points (x, y, deviation) are drawn as dots with bars of that
    length up and down."""
    title: str
    x_name: str
    y_name: str
    lines: dict             # {name: [(x, y), ...]}
    levels: dict = {}       # {name: y}, dashed lines from side to side
    log: bool = False       # whether the y axis is logarithmic

def draw_lines(path, panels, columns=2, same_heights=False):
    """Write a picture of panels. Each reaches from its least to its greatest numbers, or with
    same_heights all of them from the least to the greatest y of all."""
    width, height = PANEL
    count = len(panels)
    size = (width * min(columns, count), height * math.ceil(count / columns))
    picture = Image.new('RGB', size, 'white')
    limits = [limits_of(panel) for panel in panels]
    if same_heights:
        low, high = min(low for *_, low, _ in limits), max(high for *_, high in limits)
        limits = [(left, right, low, high) for left, right, _, _ in limits]
    for number, (panel, ends) in enumerate(zip(panels, limits)):
        tile = Image.new('RGB', PANEL, 'white')
        draw_panel(tile, panel, ends)
        picture.paste(tile, (width * (number % columns), height * (number // columns)))
    picture.save(path)

def limits_of(panel):
    """The least and greatest x and the least and greatest y of all that a panel shows."""
    points = [point for line in panel.lines.values() for point in line]
    xs = [point[0] for point in points]
    ys = list(panel.levels.values())
    for _, y, *deviation in points:
        ys += [y - sum(deviation), y + sum(deviation)]
    return *apart(min(xs), max(xs)), *apart(min(ys), max(ys))

def apart(low, high):
    """Two limits, with some space between them if they are equal."""
    return (low, high) if high > low else (low, low + (abs(low) or 1) / 10)

def draw_panel(tile, panel, limits):
    """Draw the title, the axes with their names, the grid, the lines and their names."""
    draw = ImageDraw.Draw(tile)
    left, bottom = CORNER
    width, height = AXES
    least_x, most_x, least_y, most_y = limits

    def place(x, y):
        """Where a point of the panel lies in the picture, in pixels."""
        across = (x - least_x) / (most_x - least_x)
        up = (y - least_y) / (most_y - least_y)
        if panel.log:
            up = math.log(y / least_y) / math.log(most_y / least_y)
        return left + across * width, bottom - up * height

    draw.text((left, 8), panel.title, 'black', TITLE_FONT)
    draw_axes(draw, panel, limits, place)
    y_name = Image.new('RGB', (height, 18), 'white')
    ImageDraw.Draw(y_name).text((height / 2, 9), panel.y_name, 'black', SMALL_FONT, anchor='mm')
    tile.paste(y_name.rotate(90, expand=True), (2, bottom - height))
    legend = []
    for colour, (name, level) in zip(LEVEL_COLOURS, panel.levels.items()):
        for start in range(0, width, 9):
            x, y = left + start, place(least_x, level)[1]
            draw.line([(x, y), (x + 4, y)], colour, 2)
        legend.append((f'{name} {level:.3g}', colour))
    for colour, (name, line) in zip(LINE_COLOURS, panel.lines.items()):
        draw.line([place(x, y) for x, y, *_ in line], colour, 2)
        for x, y, *deviation in line:
            if deviation or len(line) == 1:
                draw_dot(draw, place(x, y), place(x, y - sum(deviation)),
                         place(x, y + sum(deviation)), colour)
        legend.append((name, colour))
    for row, (name, colour) in enumerate(legend):
        y = bottom - height + 8 + 17 * row
        draw.rectangle([left + width + 8, y - 1, left + width + 18, y + 1], colour)
        draw.text((left + width + 23, y), name, 'black', SMALL_FONT, anchor='lm')

def draw_axes(draw, panel, limits, place):
    """Draw the frame, the ticks with their numbers and the grid."""
    least_x, most_x, least_y, most_y = limits
    left, bottom = CORNER
    right, top = left + AXES[0], bottom - AXES[1]
    for major, x in ticks(least_x, most_x):
        column, _ = place(x, least_y)
        draw.line([(column, bottom), (column, top if major else bottom - 4)],
                  'gainsboro' if major else 'gray')
        if major:
            draw.text((column, bottom + 5), f'{x:g}', 'black', SMALL_FONT, anchor='ma')
    for major, y in ticks(least_y, most_y, panel.log):
        _, row = place(least_x, y)
        draw.line([(left, row), (right if major else left + 4, row)],
                  'gainsboro' if major else 'gray')
        if major:
            draw.text((left - 5, row), f'{y:g}', 'black', SMALL_FONT, anchor='rm')
    draw.rectangle([left, top, right, bottom], outline='gray')
    draw.text(((left + right) / 2, bottom + 24), panel.x_name, 'black', SMALL_FONT, anchor='ma')

def ticks(low, high, log=False):
    """Where an axis has ticks, as pairs: whether the tick has a number, and its place."""
    if log:
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        all_places = [digit * 10.0 ** decade for decade in decades for digit in range(1, 10)]
        places = [place for place in all_places if low <= place <= high]
        if len(places) >= 4:
            numbered = (1, 2, 5) if len(decades) > 2 else (1, 2, 3, 4, 6, 8)
            return [(int(f'{place:e}'[0]) in numbered, round(place, 12)) for place in places]
    magnitude = 10.0 ** math.floor(math.log10((high - low) / 4))
    digit = next(digit for digit in (1, 2, 5, 10) if digit * magnitude >= (high - low) / 4)
    parts = 4 if digit == 2 else 5      # of the way between two numbers
    step = digit * magnitude / parts
    numbers = range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
    return [(number % parts == 0, round(number * step, 12)) for number in numbers]

def draw_dot(draw, middle, low, high, colour):
    """Draw a dot, and a bar between two other places."""
    x, y = middle
    draw.line([low, high], colour)
    draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)

def display_gain(images):
    """What to multiply images (B, 3, S, S) in [0, 1] by, so that dark ones, as PET, can be seen."""
    bright = images.flatten(1).quantile(0.99, 1)
    return 1 / bright.clamp(min=0.1)[:, None, None, None]

# --- curves of a pretraining ----------------------------------------------------------------------

MOST_LAYERS = 10        # whose bits are drawn; of more layers, some that lie evenly among them

def read_log(path):
    """The objects of log.jsonl. A run that goes on may be in the middle of its last line."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith('}\n')]

def line_of(entries, name, layer=None):
    """Points (steps done, value) of what the log calls `name`, in one layer if it is a list.
    Values are left out where the step was not validated, or where they were not finite."""
    points = []
    for entry in entries:
        value = entry.get(name)
        if layer is not None and value is not None:
            value = value[layer]
        if value is not None:
            points.append((entry['step'] + 1, value))
    return points

def panels_of(entries, top_k):
    """The Panels of a training's log; top_k is 0 without experts."""
    errors = {'training': line_of(entries, 'l_self'), 'validation': line_of(entries, 'val_l_self')}
    panels = [Panel('error of hidden patches', 'steps', 'L_self', errors,
                    {'flat guess': 1.0}, log=True)]     # patches are normalized to a variance of 1
    if not top_k:
        return panels
    align = {'training': line_of(entries, 'align')}
    panels.append(Panel('alignment of experts and director', 'steps', '1 - cosine', align))
    balance = {'training': line_of(entries, 'balance')}
    panels.append(Panel('balance of the experts', 'steps', 'balance loss', balance,
                        {'ideal': float(top_k)}))
    seen = [entry for entry in entries if entry.get('bits')]
    if seen:
        depth = len(seen[0]['bits'])
        chosen = np.linspace(0, depth - 1, min(depth, MOST_LAYERS)).round().astype(int).tolist()
        bits = {f'layer {layer + 1}': line_of(seen, 'bits', layer) for layer in chosen}
        levels = {'maximum': seen[0]['bits_max']}
        if seen[0]['step'] == 0:
            levels['untrained'] = sum(seen[0]['bits']) / depth
        panels.append(Panel('modality in the first expert', 'steps', 'bits', bits, levels))
        second = {f'layer {layer + 1}': line_of(seen, 'second', layer) for layer in chosen}
        panels.append(Panel('weight of the second expert', 'steps', 'median weight', second,
                            {'even': 0.5} if top_k == 2 else {}))
    return panels

def draw_curves(path, entries, top_k):
    """Draw losses and bits against the step, from the objects of log.jsonl."""
    panels = []
    for panel in panels_of(entries, top_k):
        lines = {name: line for name, line in panel.lines.items() if line}
        if lines:
            panels.append(panel._replace(lines=lines))
    if panels:
        draw_lines(path, panels)

# --- reconstructions ------------------------------------------------------------------------------

def draw_reconstructions(path, model, images, mask_noise, names, autocast=nullcontext()):
    """Draw each image, what the encoder sees of it, and the prediction in place of the rest.
    images (B, 3, S, S), normalized; mask_noise (B, N - 1) as MAE.forward takes it."""
    seen, visible, completed = reconstruct(model, images, mask_noise, autocast)
    gain = display_gain(seen)
    rows = [seen * gain, torch.where(visible, seen * gain, 0.5), completed * gain]
    draw_grid(path, rows, ['image', 'what the\nencoder sees', 'its guess\nat the rest'], names)

def denormalize(images):
    """The inverse of data.normalize: z-scores (B, 3, S, S) -> pixels in [0, 1], and beyond."""
    mean, std = torch.tensor((data.MEAN, data.STD), device=images.device)[..., None, None]
    return images * std + mean

def unpatchify(patches, P):
    """The inverse of MAE.patchify: (B, N - 1, P * P * 3) -> (B, 3, S, S)."""
    side = math.isqrt(patches.shape[1])
    patches = patches.unflatten(2, (P, P, 3)).unflatten(1, (side, side))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

def reconstruct(model, images, mask_noise, autocast=nullcontext()):
    """Images in [0, 1] (B, 3, S, S), where they are visible, and their completions.

    The network predicts normalized patches; each gets its true mean and contrast back.
    """
    with autocast:
        _, _, prediction, mask = model(images, mask_noise=mask_noise)
    _, mean, std = model.targets(images)
    P = model.config.patch
    visible = unpatchify(mask[:, :, None].expand_as(prediction), P) == 0
    guess = unpatchify(prediction * std + mean, P)
    seen = denormalize(images).clamp(0, 1)
    guess = denormalize(guess).clamp(0, 1)
    # A grey image has three guesses at one channel: show their mean.
    grey = (seen - seen[:, :1]).abs().amax((1, 2, 3), keepdim=True) < 1e-3
    guess = torch.where(grey, guess.mean(1, keepdim=True), guess)
    return seen, visible, torch.where(visible, seen, guess)

# --- experts --------------------------------------------------------------------------------------

RARE = 0.01     # a mean weight below it, of all held-out images, is next to nothing

def draw_experts(path, weights, kinds, names):
    """Draw the mean weight of each expert: a row for each modality, a strip for each layer.
    weights (L, V, R) are the images' omega, kinds (D, V) is 1 where an image is of a modality."""
    L, _, R = weights.shape
    first_expert = F.one_hot(weights.argmax(2), R).float()
    information = [pretrain.mutual_information(counts) for counts in kinds @ first_expert]
    dead = (weights.sum(1) == 0).sum(1)                                     # (L,)
    rare = (weights.mean(1) < RARE).sum(1) - dead
    titles = []
    for layer, (bits, _) in enumerate(information):
        titles.append(f'layer {layer + 1}\n{bits:.2f} bits\n{dead[layer]} dead\n'
                      f'{rare[layer]} rare')
    means = F.normalize(kinds @ weights, p=1, dim=2)                        # (L, D, R)
    shades = 0.94 - 0.94 * means
    rows = shades.movedim(1, 0)[:, :, None, None].expand(-1, -1, 3, -1, -1)     # (D, L, 3, 1, R)
    note = (f'From left to right in each strip: experts 0 to {R - 1}. The darker, the larger their '
            f'mean weight in the images of a modality, up to 1. Bits: what the first expert tells '
            f'of the modality, at most {information[0][1]:.2f}. Dead: experts that no held-out '
            f'image activates. Rare: others with a mean weight below {RARE}.')
    width = 160 if L <= 4 else 96
    draw_grid(path, rows, names, titles, (24, width), note)

# --- features -------------------------------------------------------------------------------------

GROUPS = 6      # clusters of a modality's patches

def share_between(x, kinds):
    """Share of the variance of x (L, V, C) that lies between modalities (eta squared), (L,).
    kinds (D, V) is 1 where an image is of a modality. modularity.shares is another measure, of the
    same bodies in several modalities."""
    x = x - x.mean(1, keepdim=True)
    means = kinds @ x / kinds.sum(1, keepdim=True)                          # (L, D, C)
    between = (kinds.sum(1) * means.square().sum(2)).sum(1)
    return between / x.square().sum((1, 2))

def cluster(x, k, rounds=20):
    """Centres (k, C) of a spherical k-means of features x (n, C) of length 1.
    Each centre begins where none before it is near."""
    centres = x[:1]
    while len(centres) < k:
        farthest = (x @ centres.T).amax(1).argmin()
        centres = torch.cat([centres, x[farthest, None]])
    for _ in range(rounds):
        member = F.one_hot((x @ centres.T).argmax(1), k).to(x.dtype)        # (n, k)
        centres = F.normalize(member.T @ x, dim=1)
    return centres

def worth_showing(patches):
    """Where patches (B, N - 1, P * P * 3) are not air, not paper, and not at the image's border."""
    side = math.isqrt(patches.shape[1])
    inside = torch.ones(side - 2, side - 2, device=patches.device)
    inside = F.pad(inside, (1, 1, 1, 1)).flatten() > 0      # text of scanners stands at borders
    return (patches.std(2) > 0.02) & inside

def nearest_patches(alike, patches, P):
    """The 16 patches that are most alike each centre, 4 x 4 in a tile (k, 3, 4 * P, 4 * P)."""
    best = alike.flatten(0, 1).topk(16, 0).indices.T                        # (k, 16)
    return unpatchify(patches.flatten(0, 1)[best], P)

def choose_queries(alike, shows):
    """Index of the image that shows three groups best, and of a patch of each in it, (3,)."""
    k = alike.shape[2]
    sizes = F.one_hot(alike.argmax(2), k).mul(shows[:, :, None]).sum(1)     # (B, k) patches
    image = sizes.sort(1).values[:, -3].argmax()
    largest = sizes[image].topk(3).indices
    return image, alike[image][:, largest].argmax(0)

def similarity_maps(x, image, queries):
    """The image (3, S, S), then once for each query the image in grey with similar patches in red.
    x (N - 1, C) are the patches' features of length 1, queries (3,) indices of patches."""
    size, side = image.shape[-1], math.isqrt(len(x))
    heat = (x[queries] @ x.T).view(3, 1, side, side).clamp(min=0)
    heat = F.interpolate(heat, (size, size), mode='bicubic').clamp(0, 1)
    place = F.one_hot(queries, side ** 2).float().view(3, 1, side, side)
    place = F.interpolate(place, (size, size))
    frame = place + F.max_pool2d(-place, 5, 1, 2)       # the outermost pixels of the query's square
    red = torch.tensor((1.0, 0, 0), device=image.device)[:, None, None]
    shaded = torch.lerp(image.mean(0), red, 0.8 * heat ** 2)                # (3, 3, S, S)
    return torch.cat([image[None], shaded.maximum(frame)])

def some_images(shards, modality, most=32):
    """Indices of up to `most` held-out images of a modality, spread over all of them."""
    ids = shards.val[shards.image_modality[shards.val] == modality]
    return ids[::math.ceil(len(ids) / most)]

def show_alike(model, images, tokens):
    """What is alike in normalized images (B, 3, S, S) of one modality, with tokens (B, N, C).
    Returns tiles of GROUPS groups of patches and four similarity maps, as nearest_patches and
    similarity_maps do, or None where there is next to nothing to show."""
    x = tokens[:, 1:]
    x = F.normalize(x - x.mean((0, 1)), dim=2)      # without what all patches of a modality share
    images = denormalize(images)
    images = images * display_gain(images)
    patches = model.patchify(images)
    shows = worth_showing(patches)
    if shows.sum() < 16:
        return None
    alike = x @ cluster(x[shows], GROUPS).T * shows[:, :, None]             # (B, N - 1, k)
    image, queries = choose_queries(alike, shows)
    tiles = nearest_patches(alike, patches, model.config.patch)
    return tiles, similarity_maps(x[image], images[image], queries)

def draw_features(out, model, shards, autocast=nullcontext()):
    """Draw what the last layer finds alike in the held-out images of each modality: layout.png and
    attention.png. Prints by layer how much of the features' variance lies between modalities."""
    names, layout, maps, means, kind = [], [], [], [], []
    for modality in np.unique(shards.image_modality[shards.val]):
        ids = some_images(shards, modality)
        images = shards.gather(ids).to(model.cls_token.device)
        images = data.whole_view(images, model.config.size)
        with autocast:
            tokens, _, outputs = ViT.forward(model, images)
        means.append(torch.stack([layer[:, 1:].mean(1) for layer in outputs]))      # (L, B, C)
        kind += [len(means) - 1] * len(ids)
        shown = show_alike(model, images, tokens)
        if shown:
            names.append(shards.modalities[modality])
            layout.append(shown[0])
            maps.append(shown[1])
    kinds = F.one_hot(torch.tensor(kind)).T.float()
    shares = share_between(torch.cat(means, 1).cpu(), kinds)
    text = ' '.join(f'{share:.2f}' for share in shares)
    print(f'{out}: share of the variance of features between modalities, by layer: {text}')
    if names:
        draw_layout(out / 'layout.png', layout, names)
        draw_similarity(out / 'attention.png', maps, names)

def draw_layout(path, layout, names):
    """Draw the groups of patches, tiles (GROUPS, 3, H, W) for each modality."""
    note = (f'Network of {path.parent.name}. Each tile: the 16 patches of held-out images whose '
            f'features in the last layer are nearest to the centre of a group, of {GROUPS} in each '
            f'modality. Good is a tile of one tissue or structure, from several images. A number '
            f'means nothing across columns.')
    groups = [f'group {number}' for number in range(1, GROUPS + 1)]
    draw_grid(path, torch.stack(layout, 1), groups, names, note=note)

def draw_similarity(path, maps, names):
    """Draw the similarity maps (4, 3, S, S) of each modality."""
    note = (f'Held-out images, network of {path.parent.name}. The redder a patch, the more similar '
            f'(by cosine) are its features in the last layer to those of the patch in the white '
            f'square. The image is the one with the most patches of three groups of layout.png; '
            f'the squares are the patches of it nearest to the centres of these groups.')
    labels = ['image', '', 'similarity of\nfeatures to the\nwhite square', '']
    draw_grid(path, torch.stack(maps, 1), labels, names, note=note)

# --- cases of a segmentation ----------------------------------------------------------------------

def draw_cases(path, net, task, names, confusions, device):
    """Draw the best, the median and the worst test image by mean Dice, in the classes' colours.
    names: of the test images. confusions (n, classes, classes): of the same."""
    dice = finetune.dice_of(confusions)[:, 1:].mean(1)
    order = dice.argsort(kind='stable')[:max(1, dice.count())]      # images without a Dice are last
    choice = {'best': order[-1], 'median': order[len(order) // 2], 'worst': order[0]}
    rows, row_names = [], []
    for kind, case in choice.items():
        image, truth = task.gather('test', [case])
        guess = finetune.infer(net, image.to(device), truth.shape[1:]).argmax(1).cpu()
        pixels = image[0].permute(1, 2, 0).numpy()
        overlays = [predict.overlay(pixels, mask[0].numpy()) for mask in (truth, guess)]
        tiles = torch.from_numpy(np.stack([pixels, *overlays]))
        rows.append(tiles.permute(0, 3, 1, 2) / 255)
        row_names.append(f'{kind}\n{names[case]}\nDice {dice[case]:.3f}')
    colours = itertools.cycle(predict.COLOURS)
    note = ', '.join(f'{colour} is {name}' for colour, name in zip(colours, task.classes[1:]))
    draw_grid(path, rows, row_names, ['image', 'truth', 'prediction'], (256, 256), note)

def case_names(folder, count):
    """Names of the `count` test images of a task: the ends of their files' names, or numbers where
    a file has several images."""
    files = []
    if (folder / 'split.json').exists():
        files = json.loads((folder / 'split.json').read_text()).get('test', [])
    if len(files) != count:
        return [f'image {number}' for number in range(count)]
    return [Path(file).stem[-12:] for file in files]

# --- runs -----------------------------------------------------------------------------------------

def autocast_of(bf16, device):
    """The precision in which a run computes on this device."""
    enabled = pretrain.use_bf16(bf16, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

def draw_pretraining(out, config, device):
    """Draw the curves from the log, and all else from the checkpoint if there is one yet.
    config: the Config of the network as a dictionary, from config.json."""
    top_k = config['top_k'] if config['experts'] else 0
    draw_curves(out / 'curves.png', read_log(out / 'log.jsonl'), top_k)
    if not (out / 'ckpt.pt').exists():
        print(f'{out}: curves.png; all else follows when there is a ckpt.pt (see --save_minutes)')
        return
    state, config, checkpoint = read_checkpoint(out / 'ckpt.pt')
    o = SimpleNamespace(**checkpoint['options'])
    model = MAE(config).to(device)
    model.load_state_dict(state)
    shards = data.Shards(o.data, o.val_share)
    numbers, picks, kind = np.unique(shards.image_modality[shards.val], return_index=True,
                                     return_inverse=True)
    names = [shards.modalities[number] for number in numbers]
    autocast = autocast_of(o.bf16, device)
    if config.experts:
        _, weights = pretrain.look_at_held_out(model, shards, o, device, autocast)
        kinds = F.one_hot(torch.from_numpy(kind)).T.float()                 # (D, V)
        draw_experts(out / 'experts.png', weights, kinds, names)
    images = data.whole_view(shards.gather(shards.val[picks]).to(device), o.size)
    # The masks are those of the validation.
    generator = torch.Generator().manual_seed(o.seed)
    mask_noise = torch.rand(len(shards.val), (o.size // o.patch) ** 2, generator=generator)
    mask_noise = mask_noise[picks].to(device)
    draw_reconstructions(out / 'recon.png', model, images, mask_noise, names, autocast)
    draw_features(out, model, shards, autocast)

def draw_finetuning(out, options, device):
    """Draw the cases of a segmentation."""
    if not (out / 'best.pt').exists():
        raise SystemExit(f'{out}: has no best.pt yet; its first epoch must end before')
    folder = Path(options['data'], options['task'])
    task = data.Task(folder)
    if not task.segments:
        print(f'{out}: is a classification, of which there is no picture')
        return
    net, *_ = predict.load_run(out, device)
    autocast = autocast_of(options['bf16'], device)
    _, confusions = finetune.evaluate(net, task, 'test', options['batch'], device, autocast)
    names = case_names(folder, len(confusions))
    with autocast:
        draw_cases(out / 'cases.png', net, task, names, confusions, device)

@torch.no_grad()
def draw_run(out, device):
    """Draw all pictures of the run in the folder `out`."""
    if not (out / 'config.json').exists() or not (out / 'log.jsonl').exists():
        raise SystemExit(f'{out}: holds no run of pretrain.py or finetune.py')
    run = json.loads((out / 'config.json').read_text())
    if 'task' in run['options']:
        draw_finetuning(out, run['options'], device)
    else:
        draw_pretraining(out, run.get('config') or run['model'], device)     # its older name

def main():
    """Draw the pictures of each folder; one that fails does not keep the others from theirs."""
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m tests.lab.pictures',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', type=Path, help='folders of runs, as out/demo')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='cpu, cuda or mps (default: cuda if there is one, else cpu)')
    o = parser.parse_args()
    try:
        device = torch.empty(0, device=o.device).device
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f'--device {o.device}: {str(error).splitlines()[0]}')
    failed = False
    for out in o.folders:
        try:
            draw_run(out, device)
        except SystemExit as error:
            print(error, file=sys.stderr)
            failed = True
        except OSError as error:        # a full disk, for example
            print(f'{out}: not all pictures are written ({error})', file=sys.stderr)
            failed = True
    sys.exit(failed)

if __name__ == '__main__':
    main()
