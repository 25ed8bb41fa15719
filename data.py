"""Options, shards, batches and augmentation: everything between the prepared files and the model.

    data/medverse/<source>/00000.npy ...   uint8 (n, S, S, c), written by prepare_medverse.py
    data/medverse/<source>/meta.json       its modality, counts and normalization

Letters: B images of a batch, S stored side in pixels, c channels as stored (1 or 3).
"""
import argparse
import dataclasses
import functools
import inspect
import json
import math
import mmap
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet's, as MAE and the paper (C.2.1) use them

def boolean(text):
    """'true', 'yes', '1' or 'false', 'no', '0' -> bool; anything else is a ValueError."""
    return ('false', 'no', '0', 'true', 'yes', '1').index(text.lower()) >= 3

def parse_options(defaults, words=None):
    """Set the fields of the dataclass instance `defaults` from the command line or `words`: --name value, --name=value, --flag.

    The help of an option is the comment beside its field. Unknown names and values of the wrong type end the program
    with one sentence and exit code 2. Returns a new instance.
    """
    cls = type(defaults)
    comments = dict(re.findall(r'^    (\w+): .*?  # (.*)$', inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        default = getattr(defaults, field.name)
        kind = {bool: dict(type=boolean, nargs='?', const=True), tuple: dict(nargs='+')}.get(field.type, dict(type=field.type))
        text = f'{comments.get(field.name, "")} (default: {default})'.replace('%', '%%')
        parser.add_argument('--' + field.name, default=default, metavar=field.type.__name__.upper(), help=text, **kind)
    return cls(**vars(parser.parse_args(words)))

class Shards:
    """The images of all prepared sources below a folder, numbered through; the tail of each source is for validation.

    Files are mapped into memory, never read whole, and only when first touched, so after a fork.
    """
    def __init__(self, folder, val_share=0.05, val_most=200):
        sources = {path.parent: json.loads(path.read_text()) for path in sorted(Path(folder).glob('*/meta.json'))
                   if path.parent.suffix != '.part'}
        if not sources:
            raise SystemExit(f'{folder}: no prepared images here; make some with python prepare_medverse.py --raw RAW '
                             f'--out {folder}, or try python pretrain.py --demo')
        self.files, starts, sides = [], [0], set()
        for source, meta in sources.items():
            first = starts[-1]
            for file in sorted(source.glob('*.npy')):
                try:
                    n, side, *_ = np.load(file, mmap_mode='r').shape
                except (ValueError, OSError, EOFError) as error:
                    raise SystemExit(f'{file}: this shard is damaged or cut short ({error}); delete its folder and prepare '
                                     'the source again')
                self.files.append(file)
                starts.append(starts[-1] + n)
                sides.add(side)
            if starts[-1] - first != meta['count']:
                raise SystemExit(f'{source}: its shards hold {starts[-1] - first} images but meta.json says {meta["count"]}; '
                                 'delete this folder and prepare the source again')
        if len(sides) > 1:
            raise SystemExit(f'{folder}: sources of different sizes, {sorted(sides)} pixels; prepare them with one --size')
        self.side, self.starts = sides.pop(), np.array(starts)      # shard s holds starts[s] ... starts[s + 1] - 1
        counts = np.array([meta['count'] for meta in sources.values()])
        names, number = np.unique([meta['modality'] for meta in sources.values()], return_inverse=True)
        self.modalities, self.modality = names.tolist(), np.repeat(number, counts)      # (images,) index into the names
        held_out = np.clip((counts * val_share).astype(int), 1, np.minimum(val_most, counts - 1))
        in_tail = np.arange(starts[-1]) >= np.repeat(counts.cumsum() - held_out, counts)
        self.train, self.val = np.flatnonzero(~in_tail), np.flatnonzero(in_tail)

    @functools.lru_cache(256)       # each keeps a file open, and systems allow some 1,000
    def map(self, shard):
        return np.load(self.files[shard], mmap_mode='r')

    def gather(self, ids):
        """Images (numbers) -> uint8 tensor (n, 3, S, S); grey fills the three channels.

        All their ranges are announced to the system before the first is read: it then fetches cold pages together
        instead of one after the other.
        """
        shards = np.searchsorted(self.starts, ids, side='right') - 1
        places = list(zip(shards.tolist(), (ids - self.starts[shards]).tolist()))
        for shard, row in places:
            array = self.map(shard)
            begin, size = array.offset + row * array.strides[0], array.strides[0]
            page = begin % mmap.PAGESIZE        # ranges begin at a page
            array.base.madvise(mmap.MADV_WILLNEED, begin - page, size + page)
        images = torch.empty(len(ids), self.side, self.side, 3, dtype=torch.uint8)
        for image, (shard, row) in zip(images.numpy(), places):
            pixels = self.map(shard)[row]
            if pixels.shape[2] == 3:
                image[:] = pixels
            else:
                for channel in range(3):        # several times faster than to broadcast along the last axis
                    image[..., channel] = pixels[..., 0]
        return images.permute(0, 3, 1, 2)

    def plan(self, seed, number, batch, rank, world, steps_in_epoch):
        """The images of one rank's micro-batch `number`, sorted: a slice of the epoch's permutation.

        It follows from its arguments alone, so a resumed run goes on with the same images, and no image comes twice in
        an epoch over all ranks.
        """
        epoch, slot = divmod(number, steps_in_epoch)
        first = (slot * world + rank) * batch
        return np.sort(self.permutation(seed, epoch)[first:first + batch])

    @functools.lru_cache(2)
    def permutation(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(self.train)

class Task:
    """A labelled task, as prepare_medverse.py --task writes it: images with masks or labels in three splits."""
    def __init__(self, folder):
        try:
            self.meta = json.loads((folder / 'meta.json').read_text())
            self.classes, self.segments = self.meta['classes'], self.meta['kind'] == 'segmentation'
            self.images, self.answers = ({split: np.load(folder / split / f'{name}.npy', mmap_mode='r')
                                          for split in ('train', 'val', 'test')}
                                         for name in ('images', 'masks' if self.segments else 'labels'))
            seen = {split: set(np.unique(answers).tolist()) - {255} for split, answers in self.answers.items()}
            for split, answers in self.answers.items():
                images, most = len(self.images[split]), max(seen[split], default=0)
                if not len(answers) and split != 'val':
                    raise ValueError(f'its {split} split is empty')
                if len(answers) != images or most >= len(self.classes):
                    raise ValueError(f'its {split} split has {len(answers)} answers, up to class {most}, for {images} images '
                                     f'of {len(self.classes)} classes')
            if unseen := ', '.join(self.classes[c] for c in sorted(seen['test'] - seen['train'])):
                raise ValueError(f'no training image shows {unseen}, which the test split has')
        except FileNotFoundError as error:
            raise SystemExit(f'{error.filename}: no such file; python prepare_medverse.py --task NAME --raw RAW makes a task')
        except (ValueError, KeyError, EOFError) as error:
            raise SystemExit(f'{folder}: damaged or not fit to learn from: {error}; delete this task and prepare it again')

    def gather(self, split, ids):
        """uint8 images (n, 3, S, S), and masks (n, S, S) or labels (n,) as int64."""
        images, answers = self.images[split][ids], self.answers[split][ids].astype(np.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1), torch.from_numpy(answers)

def prefetch(load, numbers, threads=2, ahead=4):
    """Yield load(number) for each of `numbers` in order, while threads prepare the next `ahead` of them.

    Threads, not processes: gathering from a memory map is one copy, during which numpy releases the lock.
    """
    pool, queue = ThreadPoolExecutor(threads), deque()
    try:
        for number in numbers:
            queue.append(pool.submit(load, number))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def matrices(u, w, h):
    """Flip, rotation and crop as one matrix (count, 2, 3) from output to input coordinates in [-1, 1].

    u (4, count) uniform draws; w, h (count,) sides of the crop, 1 for the whole image; the crop lies anywhere inside.
    """
    x, y = (2 * u[0] - 1) * (1 - w), (2 * u[1] - 1) * (1 - h)           # centre of the crop
    angle = (2 * u[2] - 1) * math.radians(15)
    flip, cos, sin = torch.where(u[3] < 0.5, -1.0, 1.0), angle.cos(), angle.sin()
    rows = [flip * cos * w, -flip * sin * h, flip * (cos * x - sin * y), sin * w, cos * h, sin * x + cos * y]
    return torch.stack(rows, 1).view(-1, 2, 3)

def draw_views(count, zoom, device):
    """Matrices of random horizontal flips, rotations of up to 15 degrees and resized crops (area 0.2 to 1, aspect 3/4 to
    4/3). zoom is output side / stored side; a crop has at least half of the output's own pixels."""
    u = torch.rand(6, count, device=device)
    smallest = min(max(0.2, 0.5 * zoom ** 2), 1)
    area, aspect = smallest + (1 - smallest) * u[4], torch.exp((2 * u[5] - 1) * math.log(4 / 3))
    return matrices(u, (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))

def views(images, size, where):
    """Sample uint8 images (B, 3, S, S) through matrices (B, 2, 3) -> float (B, 3, size, size) in [0, 1]."""
    # on a CPU in chunks of 4: whole batches would fault in tens of megabytes of temporaries at each step
    chunk = 4 if images.device.type == 'cpu' else len(images)
    out = []
    for part, matrix in zip(images.split(chunk), where.split(chunk)):
        part = part.float() / 255
        while part.shape[-1] > 2 * size:        # bilinear sampling alone would skip pixels
            part = F.avg_pool2d(part, 2)
        grid = F.affine_grid(matrix, (len(part), 3, size, size), align_corners=False)
        out.append(F.grid_sample(part, grid, align_corners=False))
    return torch.cat(out)

@functools.cache        # made once for a device: making them anew would have the host wait for it
def scale(device):
    return [torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD)]

def normalize(images):
    """(B, 3, S, S) in [0, 1] -> z-scores by ImageNet's mean and deviation."""
    mean, std = scale(images.device)
    return (images - mean) / std

def denormalize(images):
    """Inverse of normalize."""
    mean, std = scale(images.device)
    return images * std + mean

def augment(images, size):
    """uint8 (B, 3, S, S) -> normalised random views (B, 3, size, size); nearly black ones are drawn again, three times."""
    zoom, stride = size / images.shape[-1], max(images.shape[-1] // 32, 1)
    where = draw_views(len(images), zoom, images.device)
    for _ in range(3):      # judged on 16 x 16 samples of every few pixels, and without asking the host
        black = views(images[..., ::stride, ::stride], 16, where).mean((1, 2, 3)) < 0.02
        where = torch.where(black[:, None, None], draw_views(len(images), zoom, images.device), where)
    return normalize(views(images, size, where))

def center(images, size):
    """uint8 (B, 3, S, S) -> the whole images, normalised, (B, 3, size, size)."""
    return normalize(views(images, size, torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)))

def augment_labelled(images, answers, size):
    """Random flip, rotation of up to 15 degrees, zoom of up to 1.25, contrast and brightness within 20%: uint8
    (B, 3, S, S) and masks (B, S, S) or labels (B,) -> normalised (B, 3, size, size) and the masks seen alike (255 outside)."""
    u = torch.rand(7, len(images), device=images.device)
    side, (contrast, brightness) = 1 - 0.2 * u[4], 0.8 + 0.4 * u[5:, :, None, None, None]
    where = matrices(u[:4], side, side)
    images = views(images, size, where)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean * brightness).clamp(0, 1)
    if answers.dim() == 3:      # 255 - mask: what lies outside is sampled as 0; float32 holds class numbers exactly
        grid = F.affine_grid(where, (len(images), 1, size, size), align_corners=False)
        answers = 255 - F.grid_sample(255 - answers[:, None].float(), grid, 'nearest', align_corners=False)[:, 0].long()
    return normalize(images), answers
