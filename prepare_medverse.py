"""Prepare images for pretraining (paper, C.1.1) and labelled tasks for fine-tuning: raw downloads in, uint8 arrays out.

    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --phantoms 200 --out data/phantoms-64 --size 64
    python prepare_medverse.py --task fives --raw RAW/FIVES --images '(.*)Original/(.*)' --masks '(.*)Truth/(.*)' --values 0,255

RAW/<Modality>/<source>/** holds files as published: PNG JPEG TIFF BMP GIF PGM PPM, NIfTI (.nii .nii.gz) and .npy. <Modality>
is CT, PET, MR, X-ray, Ultrasound, Fundus, OCT, Pathology, Endoscope or Photo. OUT/<source>/ gets 00000.npy ... (uint8
(n, S, S, c), c = 1 grey or 3 RGB), meta.json (counts, normalization) and dropped.csv (what was dropped and why). A source is
written to OUT/<source>.part and renamed when whole, so the command can be stopped at any moment and started again.

A task is a folder of images in pairs with masks (segmentation) or in folders named after their classes (classification).

Letters: H, W sides as published, S side as stored, c channels, n slices of a volume or images of a shard.
"""
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from data import Task, parse_options

Image.MAX_IMAGE_PIXELS = None  # slides and fundus photographs are large, not decompression bombs

MODALITIES = ('CT', 'PET', 'MR', 'X-ray', 'Ultrasound', 'Fundus', 'OCT', 'Pathology', 'Endoscope', 'Photo')
VOLUMES = ('CT', 'PET', 'MR')
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
IMAGES = (*PICTURES, '.nii', '.nii.gz', '.npy')
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'other')
WINDOW = {'CT': (-200, 400), 'SUV': (0, 20)}  # HU; PET in standardized uptake values
PERCENTILES = {'MR': (1, 99), 'PET': (1, 99)}  # of a volume; the z-score of raw PET cancels in the min-max after it
FOREGROUND = {'CT': 0.05, 'MR': 0.05, 'PET': 0.01, 'SUV': 0.01}  # least share of a slice that is above 0.02 of the range
RULES = {'CT': 'HU clipped to [-200, 400]', 'MR': '1st..99th percentile',
         'PET': "1st..99th percentile, or SUV clipped to [0, 20] where the path says 'suv'"}

@dataclasses.dataclass
class Config:
    raw: str = ''  # folder of the raw downloads: RAW/<Modality>/<source>/**, or of one task; with --phantoms where to write them
    out: str = ''  # folder of the prepared sources, by default data/medverse, or of the task, by default data/<task>
    size: int = 256  # side of the stored images, px
    min_side: int = 32  # images whose shorter side is below this are dropped, px
    shard: int = 256  # size of a shard file, MiB (one of grey and one of colour images are held in memory)
    workers: int = 0  # processes, 0 = one per core
    phantoms: int = 0  # simulate this many images a modality under RAW/raw, their masks under RAW/labels, and prepare them
    seed: int = 0  # of the phantoms and of a task's split; preparing sources draws nothing
    # a labelled task
    task: str = ''  # its name; 'phantom-vessels', 'phantom-organs' and 'phantom-lesion' need no other option
    modality: str = ''  # sets the intensity window of its volumes
    images: str = ''  # regular expression of the images' paths below RAW (default (.*)images/(.*)\. where masks are found)
    masks: str = ''  # and of their masks' (default (.*)masks/(.*)\.); the groups of a pair are equal; no mask: classification
    labels: str = ''  # CSV below RAW with file names and classes in its first two columns, instead of class folders
    classes: str = 'background,foreground'  # of a segmentation
    values: str = ''  # the value of each class in the masks (default 0,1,2 ...); 255, unless a class has it, is not scored
    outline: bool = False  # masks show a closed convex outline: fill it
    patient: str = ''  # regular expression: what it finds in a path is the patient, whom no split shares (default the path)

def read(path, draft=0):
    """All arrays of a file, each (n, H, W) or (n, H, W, 3) with upright slices: float32 in the units of the file, or uint8
    grey levels. A uint8 array with n = 1 is a picture. draft: the side (px) that is enough of a JPEG, 0 for all of it."""
    if path.name.lower().endswith(PICTURES):
        return read_picture(path, draft)
    if not path.name.lower().endswith('.npy'):
        return read_nifti(path)
    array = np.load(path, allow_pickle=False)
    array = array[None] if array.ndim == 2 or array.ndim == 3 and array.shape[-1] == 3 else array
    if array.ndim != 3 and array.shape[3:] != (3,):
        raise ValueError(f'shape {array.shape} is none of (H, W), (H, W, 3), (n, H, W), (n, H, W, 3)')
    return [array if array.dtype == np.uint8 else array.astype(np.float32)]

def read_picture(path, draft):
    """The frames of a picture, (1, H, W) or (1, H, W, 3) each: uint8, or float32 where they are measurements."""
    frames = []
    with Image.open(path) as image:
        image.draft(None, (draft, draft) if draft else None)  # a JPEG decodes fast at 1/2, 1/4 or 1/8
        # The further frames of an MPO, the JPEG of telephones, are previews and depth maps.
        for index in range(1 if image.format == 'MPO' else getattr(image, 'n_frames', 1)):
            image.seek(index)
            frame = ImageOps.exif_transpose(image)
            if frame.mode[0] not in 'IF':  # everything but I;16, I and F has 8 bits
                frame = frame.convert('L' if frame.mode in ('1', 'L', 'LA') else 'RGB')
            frames.append(np.asarray(frame)[None])
    if frames[0].dtype.kind == 'f' or frames[0].dtype == np.uint8:
        return frames
    highest = max(frame.max() for frame in frames)
    white = 4095 if highest < 4096 else max(highest, 65535)  # many detectors deliver 12 bits in a 16-bit file
    return [np.rint(frame.clip(0) * np.float32(255 / white)).astype(np.uint8) for frame in frames]

def read_nifti(path):
    """One volume (n, H, W) a time point."""
    image = nib.load(path)
    return list(cut(np.asarray(image.dataobj, dtype=np.float32), image.affine))  # get_fdata() would scale in float64

def cut(volume, affine):
    """Array (x, y[, z[, time ...]]) as a view (time, n, H, W): slices across the coarsest spacing (within 1% of it: axial),
    anterior or superior up. What is written to the view is written to the array."""
    volume = volume.reshape(*(*volume.shape, 1)[:3], -1)
    turn = nib.io_orientation(affine)
    volume = nib.apply_orientation(volume, turn)  # RAS: x right, y anterior, z superior
    spacing = nib.affines.voxel_sizes(affine)[turn[:, 0].argsort()]
    spacing[np.array(volume.shape[:3]) == 1] = np.inf
    axis = 2 if spacing[2] >= 0.99 * spacing.max() else spacing.argmax()
    return np.moveaxis(volume, (3, axis), (0, 1)).swapaxes(2, 3)[:, :, ::-1, ::-1]

def normalize(volume, modality):
    """Map (n, H, W[, 3]) to uint8 by the rule of its modality (C.1.1), which may also be 'SUV'; uint8 stays as it is.

    NaN and infinities count as the lowest value; where there is nothing but one value, all becomes 0.
    """
    if volume.dtype == np.uint8:
        return volume
    pixels = np.zeros(volume.shape, np.uint8)
    sample = volume.flat[::volume.size // 1_000_000 | 1]  # odd: a width of 2^k would be sampled in a few columns only
    sample = sample[np.isfinite(sample)]
    if sample.size == 0 or sample.min() == sample.max():
        return pixels
    low, high = map(float, WINDOW.get(modality) or np.percentile(sample, PERCENTILES.get(modality, (0, 100))))
    for i, image in enumerate(volume):  # slice by slice, which bounds the memory
        image = np.nan_to_num(image, nan=low, posinf=low, neginf=low) - low
        pixels[i] = np.rint((image / (high - low or np.inf)).clip(0, 1) * 255)
    return pixels

def resize(image, size):
    """The whole of uint8 (H, W) or (H, W, 3), low-passed, as (S, S, c); three equal channels become one."""
    image = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    grey = len({band.tobytes() for band in image.split()}) == 1
    return np.asarray(image.getchannel(0) if grey else image).reshape(size, size, -1)

def slices(path, modality, size, min_side):
    """All that a file holds, in a worker: a list of (reason, detail, pixels, picture), one alone for an unusable file.

    Kept are those without a reason, as pixels uint8 (S, S, c); `picture` is false for the slices of a volume.
    """
    if path.name.startswith('.') or not path.name.lower().endswith(IMAGES):
        return [('other', 'no image by its name', None, False)]
    try:
        arrays = read(path, draft=max(2 * size, min_side))
    except Exception as error:  # decoders fail on broken files in every way there is; dropped.csv tells which
        return [('corrupt', f'{type(error).__name__}: {error}', None, False)]
    found = []
    for array in arrays:
        picture = array.dtype == np.uint8 and len(array) == 1
        least = 0 if picture else FOREGROUND.get(modality, 0)
        for image in normalize(array, modality):
            blank = np.mean(image > 0.02 * 255) < least if least else np.ptp(image) < 8
            reason = 'small' if min(image.shape[:2]) < min_side else 'blank' if blank else ''
            pixels = None if reason else resize(image, size)
            found.append((reason, f'{image.shape[1]} x {image.shape[0]} px', pixels, picture))
    return found or [('corrupt', 'holds no image', None, False)]

def follow_parent():
    """Start of a worker: Ctrl-C is for the main process alone, and whatever ends that, even kill -9, ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()

def find_twin(pixels, name, seen):
    """Name of an earlier picture that uint8 (S, S, c) nearly repeats, or None; then `seen` {hash: [(name, grid)]} learns it.

    Twins have 64-bit difference hashes (is a cell darker than its right neighbour?) that differ in one bit at most. Discs on
    black share a few hashes, whatever eye they show, so the grids must also be within 3 of 255 levels on average.
    """
    image = Image.fromarray(pixels.squeeze()).convert('L')
    grid = np.asarray(image.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)  # area means (8, 9)
    bits = int.from_bytes(np.packbits(grid[:, :-1] < grid[:, 1:]).tobytes())
    for key in bits, *(bits ^ 1 << bit for bit in range(64)):
        for twin, other in seen.get(key, ()):
            if np.abs(grid - other).mean() < 3:
                return twin
    seen.setdefault(bits, []).append((name, grid))

def prepare(modality, source, out, config, pool):
    """Write the folder RAW/<Modality>/<source> to OUT/<source>, or OUT/<source>-<Modality> if another modality has the name.

    Returns its meta.json as a dict; a finished source is left alone. Results are taken in the order of the files, so the
    bytes do not depend on the number of workers. Raises OSError (disk full) and BrokenProcessPool (a worker was killed).
    """
    files = sorted(path for path in source.rglob('*') if path.is_file())
    for folder in out / source.name, out / f'{source.name}-{modality}':
        meta = json.loads((folder / 'meta.json').read_text()) if folder.exists() else {}
        if meta.get('modality', modality) == modality:
            break
    if meta:
        same = (meta['files'], meta['size']) == (len(files), config.size)
        print(f'{folder.name}: finished before, {meta["files"]} files at {meta["size"]} px' + ('' if same else
              f'; now there are {len(files)} files, wanted at {config.size} px: delete {folder} to prepare it again'))
        return meta
    part = folder.with_name(folder.name + '.part')
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left behind
    part.mkdir()
    buffers, shards, dropped, seen = {1: [], 3: []}, [], dict.fromkeys(REASONS, 0), {}
    window, pending, ahead = 2 * (config.workers or os.cpu_count()), deque(), iter(files)

    def flush(images):
        shards.append({'file': f'{len(shards):05d}.npy', 'count': len(images), 'channels': images[0].shape[2]})
        np.save(part / shards[-1]['file'], np.stack(images))  # (n, S, S, c)
        images.clear()

    with open(part / 'dropped.csv', 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        log = csv.writer(file)
        log.writerow(('path', 'slice', 'reason', 'detail'))
        for path in tqdm(files, desc=folder.name, unit='file'):
            for job in islice(ahead, window - len(pending)):
                suv = modality == 'PET' and 'suv' in job.relative_to(source.parent).as_posix().lower()
                pending.append(pool.submit(slices, job, 'SUV' if suv else modality, config.size, config.min_side))
            name = path.relative_to(source).as_posix()
            for index, (reason, detail, pixels, picture) in enumerate(pending.popleft().result()):
                # Neighbouring slices of a volume are alike by nature, and Table 2 keeps them.
                if picture and not reason and (twin := find_twin(pixels, name, seen)):
                    reason, detail = 'duplicate', f'of {twin}'
                if reason:
                    dropped[reason] += 1
                    log.writerow((name, index, reason, detail))
                    continue
                images = buffers[pixels.shape[2]]
                images.append(pixels)
                if len(images) * pixels.nbytes >= config.shard << 20:
                    flush(images)
    for images in filter(None, buffers.values()):
        flush(images)
    count = sum(shard['count'] for shard in shards)
    meta = {'source': folder.name, 'modality': modality, 'count': count, 'size': config.size,
            'channels': sorted({shard['channels'] for shard in shards}),
            'normalization': f'volumes: {RULES.get(modality, "minimum..maximum")}; pictures: / 255, 16 bits / 4095 or 65535',
            'foreground': f'slices: {FOREGROUND[modality]} of the pixels above 0.02' if modality in FOREGROUND else 'any',
            'files': len(files), 'read': count + sum(dropped.values()), 'dropped': dropped, 'shards': shards}
    (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    os.replace(part, folder)
    return meta

def find_sources(raw):
    """The pairs (modality, source folder) under RAW; names what else lies there, ends the program if it is all there is."""
    names = {name.lower(): name for name in MODALITIES}
    sources = [path for path in sorted(raw.glob('*/*')) if path.is_dir() and path.parent.name.lower() in names]
    others = sorted({*raw.glob('*'), *raw.glob('*/*')} - {*sources, *(path.parent for path in sources)})
    if others:
        print(f'warning: {len(others)} files and folders are no RAW/<Modality>/<source>/, as {others[0]}', file=sys.stderr)
    if not sources:
        sys.exit(f'no images: --raw {raw} has no folder <Modality>/<source>/, with <Modality> of {", ".join(MODALITIES)}')
    return [(names[path.parent.name.lower()], path) for path in sources]

# ---------------------------------------------------------------------------------------------------------------------
# Labelled tasks

PHANTOM_TASKS = {  # from what --phantoms writes
    'phantom-vessels': dict(images='raw/Fundus/phantom-fundus/(.*)', masks='labels/Fundus/(.*)', classes='background,vessel'),
    'phantom-organs': dict(images='raw/CT/phantom-ct/(.*)', masks='labels/CT/(.*)', modality='CT',
                           classes='air,fat,muscle,gut,lung,liver,kidney,spleen,bone,blood,lesion'),
    'phantom-lesion': dict(images='raw/Photo/phantom-photo/')}

def find_labelled(raw, config):
    """{path of an image below RAW: path of its mask or name of its class}, and whether it is masks."""
    names = sorted(path.relative_to(raw).as_posix() for path in raw.rglob('[!.]*') if path.name.lower().endswith(IMAGES))
    pattern = config.masks or r'(.*)masks/(.*)\.'
    masks = {found.groups(): name for name in names if (found := re.match(pattern, name))}
    if masks:
        images = {found.groups(): name for name in names if name not in masks.values()
                  and (found := re.match(config.images or r'(.*)images/(.*)\.', name))}
        for lone in sorted(images.keys() ^ masks.keys())[:1]:
            sys.exit(f'{raw / (images | masks)[lone]}: {"no mask" if lone in images else "no image"} goes with it; complete the '
                     'pair, or pair the files by --images and --masks, regular expressions whose groups agree')
        return {name: masks[key] for key, name in images.items()}, True
    names = [name for name in names if re.match(config.images, name)]
    if not names or config.masks:
        sys.exit(f'{raw}: no path below it matches --{"masks" if config.masks else "images"} {config.masks or config.images}')
    if not config.labels:
        return {name: Path(name).parent.name for name in names}, False
    with open(raw / config.labels, newline='') as file:
        classes = {Path(row[0]).stem: row[1] for row in csv.reader(file) if len(row) > 1}
    return {name: classes[Path(name).stem] for name in names if Path(name).stem in classes}, False

def split(names, config):
    """{'train', 'val', 'test': names}: as the first folder of each says, else 50 / 20 / 30 by patient, of whom there are n;
    test = ceil(0.3 n) and val = floor(0.2 n), as the counts of Table 3 imply."""
    splits, patients = {'train': [], 'val': [], 'test': []}, {}
    if {name.split('/')[0] for name in names} <= splits.keys():
        return {part: [name for name in names if name.split('/')[0] == part] for part in splits}
    for name in names:
        found = config.patient and re.search(config.patient, name)
        patients.setdefault(found[0] if found else name, []).append(name)
    n, groups = len(patients), list(patients.values())
    order = np.random.default_rng(config.seed).permutation(n)
    for part, chosen in zip(splits, np.split(order, np.cumsum([n + -3 * n // 10 - n // 5, n // 5]))):
        splits[part] = sorted(name for index in chosen for name in groups[index])
    return splits

def labelled(raw, name, answer, classes, config):
    """In a worker: all (pixels uint8 (S, S, c), mask uint8 (S, S)) of an image or volume; without `answer` a mask of None."""
    volumes, truths = ([], [])
    for path, into in ((name, volumes), (answer, truths)):
        try:
            into += read(raw / path) if path else [None] * len(volumes)
        except Exception as error:  # decoders fail in every way there is
            sys.exit(f'{raw / path}: cannot be read ({type(error).__name__}: {error}); mend it or remove the pair')
    values, found = [int(value) for value in config.values.split(',')] if config.values else [*range(len(classes))], []
    for volume, truth in zip(volumes, truths):
        volume = normalize(volume, config.modality)
        if truth is None:
            found += [(resize(image, config.size), None) for image in volume]
            continue
        truth = truth[..., 0] if truth.ndim == 4 and (truth == truth[..., :1]).all() else truth  # grey stored as colour
        if truth.shape != volume.shape[:3] or len(truths) != len(volumes):
            sys.exit(f'{raw / answer}: the mask is {truth.shape}, but its image {raw / name} is {volume.shape[:3]} (slices, '
                     'rows, columns)')
        if strange := set(np.unique(truth).tolist()) - {*values, 255}:
            sys.exit(f'{raw / answer}: holds the values {sorted(strange)[:9]}, but those of the classes are {values}; name '
                     'them all by --classes and their --values')
        for image, mask in zip(volume, truth):
            if len(volume) == 1 or np.mean(image > 0.02 * 255) >= FOREGROUND.get(config.modality, 0):
                mask = np.select([mask == value for value in values], range(len(values)), 255).astype(np.uint8)
                mask = Image.fromarray(fill(mask > 0) if config.outline else mask)
                mask = mask.resize((config.size, config.size), Image.Resampling.NEAREST)  # no new values arise
                found.append((resize(image, config.size), np.asarray(mask, np.uint8)))
    return found

def fill(outline):
    """bool (H, W) of a closed convex outline -> with its inside: all that has outline on both sides in its row or column."""
    run = np.logical_or.accumulate
    rows, columns = (run(outline, axis) & np.flip(run(np.flip(outline, axis), axis), axis) for axis in (0, 1))
    return rows | columns

def prepare_task(config, raw, folder, pool):
    """Write the labelled images below RAW to `folder`: {train,val,test}/images.npy and masks.npy or labels.npy, meta.json,
    and split.json with the files of each split."""
    if folder.exists():
        sys.exit(f'{folder}: this task is prepared; delete it to prepare it again, or choose another --out')
    answers, segments = find_labelled(raw, config)
    classes = config.classes.split(',') if segments else sorted(set(answers.values()))
    splits, counts = split(answers, config), {}
    part = folder.with_name(folder.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    for name, files in splits.items():
        jobs = [pool.submit(labelled, raw, file, segments and answers[file], classes, config) for file in files]
        images, targets = [], []
        for file, job in zip(tqdm(files, desc=f'{folder.name} {name}', unit='file'), jobs):
            for pixels, mask in job.result():
                images.append(pixels)
                targets.append(mask if segments else classes.index(answers[file]))
        counts[name], c = len(images), max((pixels.shape[2] for pixels in images), default=1)
        (part / name).mkdir(parents=True)
        images = [np.broadcast_to(pixels, (*pixels.shape[:2], c)) for pixels in images]  # grey fills the channels of colour
        shape = (config.size, config.size)
        np.save(part / name / 'images.npy', np.array(images, np.uint8).reshape(-1, *shape, c))
        np.save(part / name / ('masks.npy' if segments else 'labels.npy'),
                np.array(targets, np.uint8).reshape(-1, *shape) if segments else np.array(targets, np.int64))
    meta = {'kind': 'segmentation' if segments else 'classification', 'classes': classes, 'modality': config.modality,
            'size': config.size, 'counts': counts}
    (part / 'split.json').write_text(json.dumps(splits, indent=1))
    (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    Task(part)  # would find_labelled's classes and splits do for training? ends the program if not
    os.replace(part, folder)
    print(f'{folder}: {meta["kind"]} into {", ".join(classes)}; images: {counts}')

# ---------------------------------------------------------------------------------------------------------------------
# Phantoms: ten modalities simulated from their physics, with masks and classes

# Tissues = mask classes: air 0, fat 1, muscle 2, gut 3, lung 4, liver 5, kidney 6, spleen 7, bone 8, blood 9, lesion 10
HOUNSFIELD = np.array([-1000, -100, 50, 20, -820, 80, 130, 100, 600, 140, 40])  # attenuation of X-rays
T1 = np.array([1, 350, 1000, 1600, 1200, 650, 1250, 1150, 450, 1500, 1300])  # relaxation times, ms
T2 = np.array([1, 90, 40, 130, 40, 45, 95, 85, 60, 150, 110])
PROTONS = np.array([0, 0.9, 0.8, 0.9, 0.15, 0.8, 0.9, 0.9, 0.4, 0.8, 0.9])  # density, water = 1
UPTAKE = np.array([0, 0.4, 0.8, 1.5, 0.5, 2.5, 6, 2, 1.5, 2.2, 10])  # of FDG, SUV
# Organs as ellipsoids, in painting order: tissue, centre, radii in cm (x to the right, y anterior, z superior)
ORGANS = ((1, 0, 0, 0, 17, 12, 99), (2, 0, 0, 0, 15, 10, 99), (1, 0, 2, -16, 13, 7, 9), (4, 8, 0, 10, 7, 8, 14),
          (4, -8, 0, 10, 7, 8, 14), (5, 6, 1, -4, 8, 8, 7), (5, 0, 4, -4, 7, 4, 4), (3, -6, 3, -4, 5, 5, 4),
          (0, -6, 5, -4, 3, 2, 2), (7, -11, -3, -4, 3, 5, 5), (6, 6, -4, -10, 3, 4, 6), (6, -6, -4, -9, 3, 4, 6),
          (3, 6, 4, -15, 3, 3, 4), (3, -4, 4, -14, 4, 2, 4), (9, -3, 3, 4, 6, 5, 6), (0, 0, 0, 22, 1, 1, 9),
          (8, 0, -7, 0, 4, 1, 99), (8, 0, -5, 0, 3, 2, 99), (9, -2, -2, 0, 1.4, 1.4, 99))

def blur(image, sigma):
    """Gaussian point spread along rows and columns, as a product of spectra; sigma in pixels, one or a pair."""
    waves = [2 * (np.pi * s * np.fft.fftfreq(n)) ** 2 for n, s in zip(image.shape, np.broadcast_to(sigma, 2))]
    return np.fft.ifft2(np.fft.fft2(image.T) * np.exp(-np.add.outer(*waves)).T).T.real  # .T: fft2 takes the last axes

def field(rng, side, size):
    """A smooth random picture of mean 0 and deviation 1; size = that of its details, as a part of the side."""
    picture = blur(rng.standard_normal((side, side)), np.multiply(size, side))
    return (picture - picture.mean()) / picture.std()

def ellipse(rng, side, x, y, radius, wobble=0.0, stretch=1.4):
    """Squared distance from (x, y), in radii, of a tilted ellipse with a wobbly outline; the picture spans -1 to 1."""
    row, column = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    turned = (column - x + 1j * (row - y)) * np.exp(1j * rng.uniform(0, np.pi)) / radius
    return turned.real ** 2 + (rng.uniform(1, stretch) * turned.imag) ** 2 + wobble * field(rng, side, 0.06)

def branches(rng, side, tips, fork=0.1):
    """Lines that wander, thin and fork (vessels, hairs), in [0, 1]; a tip is its x, y, angle, width and bend."""
    canvas, tips = Image.new('L', (2 * side, 2 * side)), list(tips)
    while tips:
        x, y, angle, width, bend = tips.pop()
        end = x + 0.06 * np.cos(angle), y + 0.06 * np.sin(angle)
        ImageDraw.Draw(canvas).line([side * (v + 1) for v in (x, y, *end)], 255, round(width * side) + 1)
        if width > 0.008 and max(map(abs, end)) < 1.1:
            tips += [(*end, angle + rng.normal(bend, turn), width * (0.94 - turn / 3), bend)
                     for turn in (0.1, 0.6)[:1 + (rng.random() < fork)]]
    return np.asarray(canvas.resize((side, side), Image.BOX)) / 255

def torso(rng, shape, bottom, height, sick):
    """Tissue of each voxel of a random body, 40 x 40 cm wide; the sick have lesions in lung, liver or spleen."""
    x, y, z = np.ogrid[-20:20:shape[0] * 1j, -20:20:shape[1] * 1j, bottom:bottom + height:shape[2] * 1j]
    x, y = x * rng.uniform(0.9, 1.1) + np.sin(y / 5 + rng.uniform(0, 6)), y + np.sin(x / 4 + rng.uniform(0, 6))
    tissue = np.zeros(shape, np.uint8)
    for organ, *place in ORGANS:
        a, b, c, p, q, r = place * rng.normal(1, 0.07, 6)
        tissue[((x - a) / p) ** 2 + ((y - b) / q) ** 2 + ((z - c) / r) ** 2 < 1] = organ
    cage = abs((x / 14.5) ** 2 + (y / 9.8) ** 2 + ((z - 6) / 20) ** 2 - 0.94) < 0.1
    tissue[cage & (np.cos(2.2 * z + y + rng.uniform(0, 6)) > 0) & (z > -8)] = 8  # sloping ribs
    for i, j, k in rng.choice(np.argwhere(np.isin(tissue, (4, 5, 7))), sick * rng.integers(1, 4)):
        tissue[(x - x[i, j]) ** 2 + (y - y[i, j]) ** 2 + (z - z[..., k]) ** 2 < rng.uniform(1, 3) ** 2] = 10
    return tissue

def ct(rng, side, tissue):
    """Attenuation in Hounsfield units (air -1000, water 0), with the noise of the detector."""
    image = blur(HOUNSFIELD[tissue] + rng.normal(0, 40, tissue.shape) * (tissue > 0), 0.7)
    return np.rint(image).astype(np.int16), tissue

def pet(rng, side, tissue):
    """Uptake of the tracer in SUV: decays are counted (Poisson) through a point spread of about 10 mm."""
    activity = blur((UPTAKE * rng.uniform(0.6, 1.6, len(UPTAKE)))[tissue], side / 90).clip(0)
    return blur(rng.poisson(20 * activity) / 20, side / 160).clip(0).astype(np.float32), tissue

def mr(rng, side, tissue):
    """Spin echo: protons (1 - exp(-TR / T1)) exp(-TE / T2), under a smooth coil bias, with Rician noise."""
    repetition, echo = rng.choice(((500, 12), (3000, 70))) * rng.uniform(0.7, 1.4, 2)  # T1- or T2-weighted, ms
    signal = 1000 * PROTONS * (1 - np.exp(-repetition / T1)) * np.exp(-echo / T2)
    image = signal[tissue] * np.exp(0.25 * field(rng, side, 0.2))[..., None]
    return (abs(image + rng.normal(0, 15, (*tissue.shape, 2)) @ (1, 1j)) * (tissue > 0)).astype(np.float32), tissue

def xray(rng, side, tissue):
    """Beer-Lambert: photons fall as exp(-attenuation summed from front to back); the film shows their negative log."""
    tissue = tissue.T[::-1, :, ::-1].repeat(2, 0).repeat(2, 2)
    path = blur((0.2 * (1 + HOUNSFIELD / 1000))[tissue].sum(1), 0.8)  # water absorbs 0.2 / cm, a voxel is 1 cm deep
    film = 1 - np.log(1 + rng.poisson(1e6 * np.exp(-path))) / np.log(1e6)
    heart, lungs = (tissue == 9).sum(1) > 4, (tissue == 4).sum(1) > 4
    return 255 * (film / np.quantile(film, 0.97)).clip(0) ** rng.uniform(1, 2), np.where(heart, 9, 4 * lungs)

def ultrasound(rng, side, sick):
    """Echoes with Rayleigh speckle fade by exp(-attenuation) along each beam, are log-compressed and shown as a fan."""
    lesion = sick & (ellipse(rng, side, *rng.uniform(-0.5, 0.4, 2), rng.uniform(0.2, 0.4), 0.1) < 1)
    scatter, loss = ((0.03, 0), (0.25, 2.5), (5, 12))[rng.integers(3)]  # a cyst, a tumour or a stone with its shadow
    echo = np.where(lesion, scatter, np.exp(0.7 * field(rng, side, (0.03, 0.12))))
    speckle = np.hypot(field(rng, side, (0.004, 0.01)), field(rng, side, (0.004, 0.01))) ** 0.7
    echo *= speckle * np.exp(-np.cumsum(np.where(lesion, loss, 2.5), 0) / side)
    grey = np.pad(210 + 105 * np.log10(echo[1:-1, 1:-1] + 1e-3), 1)  # black borders, and so outside the fan
    y, x = np.mgrid[0.2:1:side * 1j, -0.75:0.75:side * 1j]
    fan = tuple(np.int64(side * np.clip((np.hypot(x, y) / 0.75 - 0.33, np.arctan2(x, y) / 1.3 + 0.5), 0, 0.999)))
    return grey[fan], lesion[fan]

def fundus(rng, side, sick):
    """White light back from the retina, after the blood in its branching vessels has absorbed green and blue."""
    x, y, nose = rng.uniform(0.4, 0.6), rng.normal(0, 0.08), rng.choice((-1, 1))
    tips = [(x * nose, y, up * rng.uniform(0.8, 2.2), rng.uniform(0.02, 0.05), 0.06 * up * nose) for up in (-1, 1) * 3]
    vessels, spots = branches(rng, side, tips), sick * field(rng, side, 0.02)  # spots: haemorrhages > 0 > exudates
    eye, disc = ellipse(rng, side, 0, 0, 0.95, 0, 1), ellipse(rng, side, x * nose, y, 0.2)
    blood = vessels + (spots > 2.2) + 0.6 * np.exp(-ellipse(rng, side, (x - 0.6) * nose, y, 0.3))  # the macula is dark
    light = np.exp(0.1 * field(rng, side, 0.2) - 0.6 * eye)[..., None] * rng.uniform((0.7, 0.25, 0.05), (1.1, 0.5, 0.2))
    light += (np.exp(-disc ** 4) + (spots < -2.2))[..., None] * (0.2, 0.4, 0.2)
    return 255 * light * np.exp(-blood[..., None] * (0.3, 1, 0.8)) * (eye < 1)[..., None], (vessels > 0.4) & (eye < 1)

def oct_scan(rng, side, sick):
    """Reflectivity of the retina's layers around the foveal pit, with speckle; drusen lift the lowest layers."""
    x = np.linspace(-1, 1, side)
    pit = np.exp(-((x - rng.uniform(-0.4, 0.4)) / rng.uniform(0.15, 0.35)) ** 2)
    arch = rng.uniform(0.5, 0.75) + rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.15, 0.15) * x ** 2
    top = arch - rng.uniform(0.25, 0.4) * (1 - 0.5 * pit)
    bottom = arch - sick * 0.06 * field(rng, side, 0.04)[0].clip(0)
    layer = (np.linspace(0, 1, side)[:, None] - top) / (bottom - top)  # 0 at the top of the retina, 1 at its bottom
    light = np.interp(layer, (0, .02, .12, .15, .32, .35, .45, .48, .55, .6, .78, .8, .83, .86, .9, .92, 1, 1.03, 2.2),
                      (0, 190, 170, 100, 120, 60, 60, 130, 120, 50, 50, 180, 180, 80, 80, 230, 230, 120, 0))
    return light * np.hypot(field(rng, side, 0.005), field(rng, side, 0.005)) ** 0.5, (layer > 0) & (layer < 1)

def pathology(rng, side, sick):
    """Two stains absorb light: RGB = exp(-haematoxylin x its spectrum - eosin x its spectrum)."""
    gland, cells = field(rng, side, rng.uniform(0.06, 0.11)), rng.integers(11, 16)
    tissue, wall = gland < 1.3 + 0.5 * sick, gland > 0.2  # a gland has a lumen, and a wall crowded with nuclei
    row, column = cells * np.mgrid[0:0.999:side * 1j, 0:0.999:side * 1j] + 0.3 * field(rng, side, 0.05)
    nucleus = rng.uniform((0.35, 0.35, 0.2, 0.2, 0), (0.65, 0.65, 0.4, 0.4, 1), (cells, cells, 5))  # one in a grid cell
    y, x, tall, wide, chance = np.moveaxis(nucleus[np.int64(row) % cells, np.int64(column) % cells], -1, 0)
    nuclei = tissue & (chance < np.where(wall, 0.95, 0.35 + 0.3 * sick))
    nuclei &= ((row % 1 - y) / tall) ** 2 + ((column % 1 - x) / wide) ** 2 < 1 + 0.6 * sick
    blue, pink = blur(nuclei, 0.7) + 0.2 * (wall & tissue), tissue * (0.5 + 0.15 * field(rng, side, (0.01, 0.06)))
    spectra = rng.uniform(0.7, 1.4, (2, 1)) * ((0.9, 0.95, 0.4), (0.1, 0.9, 0.3))  # absorption of red, green, blue
    return 255 * np.exp(-np.stack([blue, pink], -1) @ spectra), nuclei

def endoscope(rng, side, sick):
    """A wet pink tube lit from the camera: light fades with distance into the lumen, folds ring it, water glints."""
    tube = np.sqrt(abs(ellipse(rng, side, *rng.uniform(-0.4, 0.4, 2), 1, 0.02)))
    folds = np.cos(rng.uniform(9, 16) * tube ** 0.6 + rng.uniform(0, 6) + 0.9 * field(rng, side, 0.12))
    polyp = ellipse(rng, side, *rng.uniform(-0.5, 0.5, 2), rng.uniform(0.25, 0.5), 0.05) + 9 * (not sick)
    light = np.where(polyp < 1, 0.35 + 0.5 * np.sqrt(abs(1 - polyp)), tube / (tube + 0.4) * (1.1 + 0.3 * folds * tube))
    light *= ellipse(rng, side, 0, 0, 1.2, 0, 1) < 1  # the dark corners of the view
    colour = light[..., None] ** (1, 1.4, 1.5) * rng.uniform((1, 0.45, 0.35), (1.2, 0.7, 0.6))
    return 255 * (colour + ((field(rng, side, 0.015) > 2.2) & (light > 0.6))[..., None]), polyp < 1

def photo(rng, side, sick):
    """Skin in uneven light; melanin absorbs as exp(-melanin x spectrum), in melanoma ragged and of several colours."""
    lesion = ellipse(rng, side, *rng.normal(0, 0.15, 2), rng.uniform(0.3, 0.65), 0.04 + 0.2 * sick)
    melanin = (rng.uniform(0.8, 1.4) + (0.1 + 0.4 * sick) * field(rng, side, 0.07)) / (1 + np.exp(6 * (lesion - 1)))
    spectrum = (0.7, 1.1, 1.3) + 0.2 * sick * field(rng, side, 0.1)[..., None] * (1, 0, -1)
    hairs = branches(rng, side, rng.uniform((-1, -1, 0, .009, -.05), (1, 1, 6, .015, .05), (rng.integers(12), 5)), 0)
    light = np.exp(0.15 * field(rng, side, 0.3) + 0.03 * field(rng, side, 0.01)) * rng.uniform(0.5, 1)
    skin = light[..., None] * rng.uniform((0.95, 0.65, 0.5), (1, 0.8, 0.75))
    return 255 * skin * np.exp(-melanin[..., None] * spectrum - hairs[..., None]), lesion < 1

PHANTOMS = {'CT': ct, 'PET': pet, 'MR': mr, 'X-ray': xray, 'Ultrasound': ultrasound, 'Fundus': fundus, 'OCT': oct_scan,
            'Pathology': pathology, 'Endoscope': endoscope, 'Photo': photo}

def write_phantom(folder, modality, n, seed, side=160):
    """Subject n, every other one sick: an image, or of CT, PET and MR a volume of 8 slices, to folder/raw/<Modality>/
    <source>/<class>; its mask to folder/labels/<Modality>/<class>. CT, PET, MR and X-ray see the same body."""
    rng, body = np.random.default_rng((seed, MODALITIES.index(modality), n)), np.random.default_rng((seed, n))
    sick, volume, inside = n % 2, modality in VOLUMES, None
    if volume:
        inside = torso(body, (side, side, 8), rng.uniform(-18, 2), 14, sick)
    elif modality == 'X-ray':
        inside = torso(body, (side // 2, 40, side // 2), -12, 36, sick)
    image, mask = PHANTOMS[modality](rng, side, sick if inside is None else inside)
    names = ('naevus', 'melanoma') if modality == 'Photo' else ('normal', 'lesion')
    source = 'phantom-' + modality.lower() + '-suv' * (modality == 'PET')
    for place, array in ((folder / 'raw' / modality / source, image), (folder / 'labels' / modality, mask)):
        path = place / names[sick] / (f'{n:04d}.nii.gz' if volume else f'{n:04d}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        if volume:
            nib.save(nib.Nifti1Image(array, np.diag((400 / side, 400 / side, 20, 1))), path)  # mm
        else:
            Image.fromarray(np.uint8(np.clip(array, 0, 255))).save(path)

# ---------------------------------------------------------------------------------------------------------------------

def main():
    """Simulate the phantoms if they are asked for, then prepare a task or every source below RAW."""
    config = parse_options(Config())
    if min(config.size, config.min_side, config.shard) < 1 or config.workers < 0:
        sys.exit('--size, --min_side and --shard must be 1 or more, --workers 0 or more')
    out, home = Path(config.out or f'data/{config.task or "medverse"}'), Path(config.raw or 'data/phantoms')
    if config.task in PHANTOM_TASKS:
        config = dataclasses.replace(config, **PHANTOM_TASKS[config.task])
        config.phantoms = config.phantoms or 200 * (not home.exists())
    elif not config.raw and not config.phantoms:
        sys.exit('where are the images? give --raw RAW, a folder of <Modality>/<source>/** or of a task, or --phantoms N')
    pool = ProcessPoolExecutor(config.workers or os.cpu_count(), initializer=follow_parent)
    try:
        jobs = [pool.submit(write_phantom, home, modality, n, config.seed) for modality in PHANTOMS
                for n in range(math.ceil(config.phantoms / (8 if modality in VOLUMES else 1)))]
        for job in tqdm(jobs, desc='phantoms', unit='file', disable=not jobs):
            job.result()
        if config.task:
            return prepare_task(config, home, out, pool)
        sources = find_sources(home / 'raw' if config.phantoms else home)
        out.mkdir(parents=True, exist_ok=True)
        metas = [prepare(modality, source, out, config, pool) for modality, source in sources]
    except BrokenProcessPool:
        sys.exit('a worker was killed, most likely for its memory: start again with fewer --workers; finished sources stay')
    except OSError as error:
        sys.exit(f'{error}: make room in {out} or choose another --out, and start again; finished sources stay')
    except KeyboardInterrupt:
        print('stopped: start again to go on with the unfinished sources', file=sys.stderr)
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)
        for part in [*out.glob('*.part'), out.with_name(out.name + '.part')]:
            shutil.rmtree(part, ignore_errors=True)
    rows = [(meta['modality'], meta['source'], meta['files'], meta['read'], meta['count'], *meta['dropped'].values())
            for meta in metas]
    rows.append(('all', f'{len(rows)} sources', *map(sum, list(zip(*rows))[2:])))
    for row in [('modality', 'source', 'files', 'read', 'kept', *REASONS), *rows]:
        print(f'{row[0]:<11}{row[1]:<30}' + ''.join(f'{cell:>10}' for cell in row[2:]))
    print('every file accounted for: read = kept + dropped')

if __name__ == '__main__':
    main()
