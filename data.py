"""Shards, batches and augmentation: everything between the prepared files and the model.

    data/medverse/<source>/00000.npy ...   uint8 (n, S, S, c), written by prepare_medverse.py
    data/medverse/<source>/meta.json       its modality, counts and window
Letters: B images of a batch, S side of an image in pixels, c colour channels as stored (1 or 3).
"""
import functools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, as in the paper (C.2.1)

def read_source(folder):
    """Modality and count of a prepared source, and its shards: (path, offset of pixels, shape)."""
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        if 'kind' in meta:
            raise SystemExit(f'{folder}: a labelled task, for finetune.py; --data takes sources')
        modality, shards, count = meta['modality'], [], 0
        for path in sorted(folder.glob('*.npy')):
            array = np.load(path, mmap_mode='r')
            if array.dtype != np.uint8 or array.ndim != 4 or not array.flags.c_contiguous:
                raise ValueError(f'{path.name} is not uint8 (n, S, S, c)')
            shards.append((path, array.offset, array.shape))
            count += len(array)
        if count != meta['count']:
            raise ValueError(f'it has {count} images of {meta["count"]}')
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise SystemExit(f'{folder}: no prepared source, or damaged ({error!r}); prepare it anew')
    return modality, count, shards

class Shards:
    """The images of all prepared sources below a folder, under one running index.
    The tail of each source is held out for validation: `val_share` of its images, but at least 1,
    at most `val_most`, and never all. `train` and `val` are the indices of both parts. Image i
    shows modality modalities[image_modality[i]]."""
    def __init__(self, folder, val_share=0.05, val_most=200):
        modality_of = []        # of each image
        sides = set()
        self.shards, train, val, start = [], [], [], 0
        for source in sorted(path.parent for path in Path(folder).glob('*/meta.json')):
            if source.suffix == '.part':        # its preparation has not finished
                continue
            modality, count, shards = read_source(source)
            self.shards += shards
            sides.update(side for _, _, shape in shards for side in shape[1:3])
            if len(sides) > 1:      # not square, or not all of one size
                raise SystemExit(f'{source}: sides {sorted(sides)}; prepare all with one --size')
            end = start + count
            held_out = min(max(int(count * val_share), 1), val_most, max(count - 1, 0))
            train.append(np.arange(start, end - held_out))
            val.append(np.arange(end - held_out, end))
            modality_of += [modality] * count
            start = end
        if not modality_of:
            raise SystemExit(f'{folder}: no prepared images; try python pretrain.py --demo, or '
                             f'python prepare_medverse.py --raw RAW --out {folder}')
        self.side = sides.pop()     # S, of all images
        counts = [shape[0] for _, _, shape in self.shards]
        self.starts = np.cumsum([0, *counts])           # index of each shard's first image
        names, self.image_modality = np.unique(modality_of, return_inverse=True)
        self.modalities = names.tolist()
        self.train, self.val = np.concatenate(train), np.concatenate(val)

    def gather(self, ids):
        """Images by their indices -> uint8 tensor (n, 3, S, S); grey fills the three channels."""
        images = torch.empty(len(ids), self.side, self.side, 3, dtype=torch.uint8)
        numbers = np.searchsorted(self.starts, ids, side='right') - 1   # of each image's shard
        rows = ids - self.starts[numbers]
        for image, number, row in zip(images.numpy(), numbers, rows):
            path, offset, (_, *shape) = self.shards[number]     # shape of an image: (S, S, c)
            size = math.prod(shape)
            # One read an image: no file stays open, and all its pages come at once.
            pixels = np.fromfile(path, np.uint8, size, offset=offset + row * size)
            pixels = pixels.reshape(shape)
            for channel in range(3):    # one by one, as a broadcast of grey is slow
                image[..., channel] = pixels[..., channel if shape[2] == 3 else 0]
        return images.permute(0, 3, 1, 2)

    def batch_ids(self, seed, micro, batch, rank, world, epoch_micros):
        """Indices (batch,) of a rank's images in micro-batch `micro`, counted over the whole run.
        An epoch has epoch_micros of these. Sorted, so that a disk is read in one direction."""
        epoch, slot = divmod(micro, epoch_micros)
        start = (slot * world + rank) * batch
        return np.sort(self.permutation(seed, epoch)[start:start + batch])

    @functools.lru_cache(2)     # threads begin the next epoch before this one ends
    def permutation(self, seed, epoch):
        """The indices of the training images in the order of an epoch."""
        return np.random.default_rng((seed, epoch)).permutation(self.train)

class Task:
    """A labelled task that prepare_medverse.py --task wrote: images and answers in three splits.
    Answers are masks (255 is no answer) if it `segments`, else labels."""
    def __init__(self, folder):
        try:
            self.meta = json.loads((folder / 'meta.json').read_text())
            self.classes = self.meta['classes']
            self.segments = self.meta['kind'] == 'segmentation'
            self.sided = self.meta['sided']     # left and right are told apart: mirror no image
            file = 'masks.npy' if self.segments else 'labels.npy'
            self.images, self.answers = {}, {}
            for split in ('train', 'val', 'test'):
                images = np.load(folder / split / 'images.npy', mmap_mode='r')
                answers = np.load(folder / split / file, mmap_mode='r')
                if len(images) != len(answers):
                    raise ValueError(f'{split}: {len(images)} images, {len(answers)} answers')
                for answer in answers:      # one at a time, as masks may exceed the memory
                    if np.any((answer >= len(self.classes)) & (answer != 255)):
                        raise ValueError(f'{split}: answers that are none of its classes')
                self.images[split], self.answers[split] = images, answers
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise SystemExit(f'{folder}: no labelled task, or damaged ({error!r}); '
                             f'python prepare_medverse.py --task makes it')
        if not len(self.answers['train']) or not len(self.answers['test']):
            raise SystemExit(f'{folder}: train or test is empty; prepare it with another --split')

    def gather(self, split, ids):
        """uint8 images (n, 3, S, S), and int64 masks (n, S, S) or labels (n,)."""
        images = torch.from_numpy(self.images[split][ids]).permute(0, 3, 1, 2)
        answers = torch.from_numpy(self.answers[split][ids].astype(np.int64))
        return images.expand(-1, 3, -1, -1), answers

def prefetch(load, items, threads=2, ahead=4):
    """Yield load(item) for each item in order, while threads prepare the next `ahead`."""
    pool, items = ThreadPoolExecutor(threads), iter(items)
    try:
        queue = [pool.submit(load, item) for item in islice(items, 1 + ahead)]
        while queue:
            yield queue.pop(0).result()
            for item in islice(items, 1):       # the next, if there is one
                queue.append(pool.submit(load, item))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def batches(shards, seed, micros, batch, rank, world, epoch_micros, device):
    """Yield a rank's micro-batches with the numbers `micros`: uint8 (B, 3, S, S), on the device."""
    def load(micro):
        images = shards.gather(shards.batch_ids(seed, micro, batch, rank, world, epoch_micros))
        return images.pin_memory() if device.type == 'cuda' else images
    for images in prefetch(load, micros):
        yield images.to(device, non_blocking=True)      # the host need not wait for a pinned copy

# --- augmentation ---------------------------------------------------------------------------------
def crop_matrices(draws, w, h, flips=True):
    """Matrices (n, 2, 3) for affine_grid: a point of the output shows the image's point
    flip(rotate(centre + sides * point)). Coordinates are from -1 to 1.
    draws: four (n,) in [0, 1], for the centre's x and y, the rotation and the flip.
    w, h: sides (n,) of the crop, as shares of the image's. flips: whether half are mirrored."""
    x, y, turn, mirror = draws
    sides = torch.stack([w, h], 1)                              # (n, 2)
    centre = (2 * torch.stack([x, y], 1) - 1) * (1 - sides)     # unrotated, the crop lies inside
    angle = (2 * turn - 1) * math.radians(15)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    # rotate(centre + sides * point) = rotation @ diag(sides) @ point + rotation @ centre
    theta = torch.cat([rotation @ torch.diag_embed(sides), rotation @ centre[:, :, None]], 2)
    if flips:
        theta[:, 0] *= torch.where(mirror < 0.5, -1, 1)[:, None]
    return theta

def draw_crops(count, ratio, device):
    """Matrices (count, 2, 3) of random horizontal flips, rotations up to 15 degrees and crops of
    20% or more of the area. ratio: side of the output / side of the stored image."""
    x, y, turn, mirror, area_draw, aspect_draw = torch.rand(6, count, device=device)
    # A crop that is enlarged much looks blurred. So it holds at least half as many stored pixels
    # as the output has: area * S^2 >= (ratio * S)^2 / 2.
    smallest = min(max(0.2, 0.5 * ratio ** 2), 1)
    area = smallest + (1 - smallest) * area_draw
    aspect = torch.exp((2 * aspect_draw - 1) * math.log(4 / 3))         # 3 / 4 to 4 / 3
    w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    return crop_matrices((x, y, turn, mirror), w, h)

def sample(images, size, theta):
    """uint8 (B, 3, S, S) through matrices theta (B, 2, 3) -> (B, 3, size, size) in [0, 1]."""
    images = images.float() / 255
    while images.shape[-1] > 2 * size:      # bilinear sampling alone would skip pixels
        images = F.avg_pool2d(images, 2)
    grid = F.affine_grid(theta, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)

def normalize(images):
    """(B, 3, S, S) in [0, 1] -> z-scores by ImageNet's mean and deviation."""
    # By plain numbers, since the host would wait for the copy of a tensor to a GPU.
    return torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)

def whole_view(images, size):
    """uint8 (B, 3, S, S) -> the whole images, normalized, (B, 3, size, size)."""
    identity = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    return normalize(sample(images, size, identity))

def augment(images, size):
    """uint8 (B, 3, S, S) -> normalized random crops (B, 3, size, size).
    Crops that are nearly black are drawn again up to three times."""
    ratio, stride = size / images.shape[-1], max(images.shape[-1] // 32, 1)
    theta = draw_crops(len(images), ratio, images.device)
    for _ in range(3):
        # The image is thinned to 32 x 32 pixels, and a crop of it is judged by 16 x 16 samples.
        samples = sample(images[..., ::stride, ::stride], 16, theta)
        black = samples.mean((1, 2, 3)) < 0.02
        # New ones are drawn for all, as `if black.any()` would make the host wait for a GPU.
        again = draw_crops(len(images), ratio, images.device)
        theta = torch.where(black[:, None, None], again, theta)
    return normalize(sample(images, size, theta))

def augment_labelled(images, answers, size, flips=True):
    """Random flips, rotations up to 15 degrees, zoom up to 1.25, contrast and brightness +- 20%.
    uint8 images (B, 3, S, S) and masks (B, S, S) or labels (B,) -> normalized images
    (B, 3, size, size), and the masks in the same view (255 outside of the image) or the labels."""
    count, device = len(images), images.device
    x, y, turn, mirror, zoom, contrast, brightness = torch.rand(7, count, device=device)
    side = 1 - 0.2 * zoom
    theta = crop_matrices((x, y, turn, mirror), side, side, flips)
    contrast = (0.8 + 0.4 * contrast)[:, None, None, None]
    brightness = (0.8 + 0.4 * brightness)[:, None, None, None]
    images = sample(images, size, theta)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean * brightness).clamp(0, 1)
    if answers.dim() == 3:      # outside is sampled as 0, so sample 255 - mask
        grid = F.affine_grid(theta, (len(images), 1, size, size), align_corners=False)
        inverse = 255 - answers[:, None].float()        # float32 holds class numbers exactly
        inverse = F.grid_sample(inverse, grid, 'nearest', align_corners=False)
        answers = 255 - inverse[:, 0].long()
    return normalize(images), answers
