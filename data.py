"""Shards, batches and augmentation: everything between the prepared files and the model.

    data/medverse/<source>/00000.npy ...   uint8 (n, S, S, c), written by prepare_medverse.py
    data/medverse/<source>/meta.json       its modality, counts and normalization

Letters: B images of a batch, S stored side in pixels, c channels as stored (1 or 3).
"""
import functools
import json
import math
import mmap
import resource
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet's, as MAE and the paper (C.2.1) use them

class Shards:
    """The images of all prepared sources below a folder, numbered through; the tail of each source is for validation.
    Files are mapped into memory when first touched, never read whole."""
    def __init__(self, folder, val_share=0.05, val_most=200):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
        self.files, lengths, sides, modalities, counts = [], [], set(), [], []
        for source in sorted(path.parent for path in Path(folder).glob('*/meta.json') if path.parent.suffix != '.part'):
            try:
                meta = json.loads((source / 'meta.json').read_text())
                if 'kind' in meta:
                    raise SystemExit(f'{source}: a labelled task, for finetune.py; --data takes the folder of sources')
                files = sorted(source.glob('*.npy'))
                arrays = [np.load(file, mmap_mode='r') for file in files]
                sides |= {side for array in arrays for side in array.shape[1:3]}
                count = sum(len(array) for array in arrays if array.dtype == np.uint8 and array.ndim == 4)
                if count != meta['count'] or len(sides) > 1:
                    raise ValueError(f'{count} images uint8 (n, S, S, c) of {meta["count"]}, sides S {sorted(sides)}')
                self.files += files
                lengths += map(len, arrays)
                modalities.append(meta['modality'])
                counts.append(count)
            except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
                raise SystemExit(f'{source}: damaged, cut short, or of another size than the sources before it '
                                 f'({error!r}); move it away, or delete it and prepare it again')
        if not lengths:
            raise SystemExit(f'{folder}: no prepared images here; make some with python prepare_medverse.py --raw RAW '
                             f'--out {folder}, or try python pretrain.py --demo')
        self.side, self.starts = sides.pop(), np.cumsum([0, *lengths])      # shard s begins at starts[s]
        names, number = np.unique(modalities, return_inverse=True)
        self.modalities, self.modality = names.tolist(), np.repeat(number, counts)      # (images,) index into the names
        counts = np.array(counts)
        held_out = np.clip((counts * val_share).astype(int), 1, np.minimum(val_most, counts - 1))
        in_tail = np.arange(counts.sum()) >= np.repeat(counts.cumsum() - held_out, counts)
        self.train, self.val = np.flatnonzero(~in_tail), np.flatnonzero(in_tail)

    @functools.lru_cache(4096)      # each keeps a file open: the paper's data are some 2,000 shards
    def map(self, shard):
        return np.load(self.files[shard], mmap_mode='r')

    def gather(self, ids):
        """Images (numbers) -> uint8 tensor (n, 3, S, S); grey fills the three channels."""
        shards = np.searchsorted(self.starts, ids, side='right') - 1
        places = list(zip(shards.tolist(), (ids - self.starts[shards]).tolist()))
        for shard, row in places:       # announced before the first is read, cold pages come together, not one by one
            array = self.map(shard)
            begin, size = array.offset + row * array.strides[0], array.strides[0]
            page = begin % mmap.PAGESIZE        # ranges begin at a page
            array.base.madvise(mmap.MADV_WILLNEED, begin - page, size + page)
        images = torch.empty(len(ids), self.side, self.side, 3, dtype=torch.uint8)
        for image, (shard, row) in zip(images.numpy(), places):
            pixels = self.map(shard)[row]
            c = pixels.shape[2]
            for first in range(0, 3, c):        # grey three times over: much faster than to broadcast it
                image[..., first:first + c] = pixels
        return images.permute(0, 3, 1, 2)

    def plan(self, seed, number, batch, rank, world, epoch_micros):
        """The images of one rank's micro-batch `number`, sorted, a slice of the epoch's permutation: it follows from
        the arguments alone, so a resumed run goes on alike, and no image comes twice in an epoch."""
        epoch, slot = divmod(number, epoch_micros)
        first = (slot * world + rank) * batch
        return np.sort(self.permutation(seed, epoch)[first:first + batch])

    @functools.lru_cache(2)
    def permutation(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(self.train)

class Task:
    """A labelled task, as prepare_medverse.py --task writes it: images with masks or labels in three splits."""
    def __init__(self, folder):
        if not (folder / 'meta.json').exists():
            raise SystemExit(f'{folder}: not prepared; make it: prepare_medverse.py --task {folder.name} --raw RAW')
        try:
            self.meta = json.loads((folder / 'meta.json').read_text())
            self.classes, self.segments = self.meta['classes'], self.meta['kind'] == 'segmentation'
            file, kind, parts = folder / 'split.json', 'masks' if self.segments else 'labels', ('train', 'val', 'test')
            self.files = json.loads(file.read_text()) if file.exists() else {}      # of the splits, in their order
            self.images = {part: np.load(folder / part / 'images.npy', mmap_mode='r') for part in parts}
            self.answers = {part: np.load(folder / part / f'{kind}.npy', mmap_mode='r') for part in parts}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise SystemExit(f'{folder}: no labelled task, or damaged ({error!r}); delete it and prepare it again')
        for split, answers in self.answers.items():
            most = max((answer[answer != 255].max(initial=0) for answer in answers), default=0)
            if len(answers) != len(self.images[split]) or most >= len(self.classes):
                raise SystemExit(f'{folder}: its {split} images, answers and classes do not agree; prepare it again')
        if not len(self.images['train']) or not len(self.images['test']):
            raise SystemExit(f'{folder}: its train or test split is empty; prepare it again with another --split')

    def gather(self, split, ids):
        """uint8 images (n, 3, S, S), and masks (n, S, S) or labels (n,) as int64."""
        images, answers = self.images[split][ids], self.answers[split][ids].astype(np.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1), torch.from_numpy(answers)

def prefetch(load, numbers, threads=2, ahead=4):
    """Yield load(number) for each of `numbers` in order, while threads prepare the next `ahead` of them. Threads, not
    processes: gathering from a memory map is one copy, during which numpy releases the lock."""
    pool, numbers = ThreadPoolExecutor(threads), iter(numbers)
    try:
        queue = [pool.submit(load, number) for number in islice(numbers, 1 + ahead)]
        while queue:
            yield queue.pop(0).result()
            queue += [pool.submit(load, number) for number in islice(numbers, 1)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

def batches(shards, seed, numbers, batch, rank, world, epoch_micros, device):
    """Yield images (B, 3, S, S) of one rank's micro-batches `numbers`, as Shards.plan has them, on the device."""
    copies = torch.cuda.Stream() if device.type == 'cuda' else None

    def load(number):       # on CUDA it is this thread that waits for the copy, while the training computes
        images = shards.gather(shards.plan(seed, number, batch, rank, world, epoch_micros))
        if copies:
            torch.cuda.set_device(device)       # a thread begins on the first GPU
            with torch.cuda.stream(copies):
                images = images.pin_memory().to(device, non_blocking=True)
                copies.record_event().synchronize()
        return images.to(device)

    for images in prefetch(load, numbers):
        if copies:      # the memory is not free for another copy before this stream has done with it
            images.record_stream(torch.cuda.current_stream())
        yield images

def matrices(u, w, h):
    """Flip, rotation and crop as one matrix (count, 2, 3) from output to input coordinates in [-1, 1], of uniform draws
    u (4, count) and the sides w, h (count,) of the crop, 1 for the whole image; it lies anywhere inside."""
    x, y = (2 * u[0] - 1) * (1 - w), (2 * u[1] - 1) * (1 - h)           # centre of the crop
    angle = (2 * u[2] - 1) * math.radians(15)
    flip, cos, sin = torch.where(u[3] < 0.5, -1.0, 1.0), angle.cos(), angle.sin()
    rows = [flip * cos * w, -flip * sin * h, flip * (cos * x - sin * y), sin * w, cos * h, sin * x + cos * y]
    return torch.stack(rows, 1).view(-1, 2, 3)

def draw_views(count, zoom, device):
    """Matrices of random horizontal flips, rotations of up to 15 degrees and resized crops (aspect 3/4 to 4/3). zoom is
    output side / stored side. A crop has at least half of the output's own pixels: where images are trained on as they
    are stored, 0.5 to 1 of the area, and the paper's 0.2 to 1 where they are stored 1.6 times as large."""
    u = torch.rand(6, count, device=device)
    smallest = min(max(0.2, 0.5 * zoom ** 2), 1)
    area, aspect = smallest + (1 - smallest) * u[4], torch.exp((2 * u[5] - 1) * math.log(4 / 3))
    return matrices(u, (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))

def views(images, size, where):
    """Sample uint8 images (B, 3, S, S) through matrices (B, 2, 3) -> float (B, 3, size, size) in [0, 1]."""
    if images.device.type == 'cpu' and len(images) > 4:     # whole batches fault in tens of megabytes of temporaries
        return torch.cat([views(part, size, matrix) for part, matrix in zip(images.split(4), where.split(4))])
    images = images.float() / 255
    while images.shape[-1] > 2 * size:      # bilinear sampling alone would skip pixels
        images = F.avg_pool2d(images, 2)
    grid = F.affine_grid(where, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)

@functools.cache        # made once for a device: making them anew would have the host wait for it
def scale(device):
    return torch.tensor((MEAN, STD), device=device)[..., None, None]

def normalize(images):
    """(B, 3, S, S) in [0, 1] -> z-scores by ImageNet's mean and deviation."""
    mean, std = scale(images.device)
    return (images - mean) / std

def denormalize(images):    # the inverse of normalize
    mean, std = scale(images.device)
    return images * std + mean

def center(images, size):       # uint8 (B, 3, S, S) -> the whole images, normalised, (B, 3, size, size)
    return normalize(views(images, size, torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)))

def augment(images, size):
    """uint8 (B, 3, S, S) -> normalised random views (B, 3, size, size); nearly black ones are drawn again, thrice."""
    zoom, stride = size / images.shape[-1], max(images.shape[-1] // 32, 1)
    where = draw_views(len(images), zoom, images.device)
    for _ in range(3):      # judged on 16 x 16 samples of every few pixels, and without asking the host
        black = views(images[..., ::stride, ::stride], 16, where).mean((1, 2, 3)) < 0.02
        where = torch.where(black[:, None, None], draw_views(len(images), zoom, images.device), where)
    return normalize(views(images, size, where))

def augment_labelled(images, answers, size, flips=True):
    """Flips, rotations up to 15 degrees, zoom up to 1.25, contrast and brightness within 20%, at random: uint8
    (B, 3, S, S) and masks (B, S, S) or labels (B,) -> normalised (B, 3, size, size), and masks alike (255 outside)."""
    u = torch.rand(7, len(images), device=images.device)
    u[3] = u[3] if flips else 1
    side, (contrast, brightness) = 1 - 0.2 * u[4], 0.8 + 0.4 * u[5:, :, None, None, None]
    where = matrices(u[:4], side, side)
    images = views(images, size, where)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean * brightness).clamp(0, 1)
    if answers.dim() == 3:      # 255 - mask: what lies outside is sampled as 0; float32 holds class numbers exactly
        grid = F.affine_grid(where, (len(images), 1, size, size), align_corners=False)
        answers = 255 - F.grid_sample(255 - answers[:, None].float(), grid, 'nearest', align_corners=False)[:, 0].long()
    return normalize(images), answers
