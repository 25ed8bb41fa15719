"""Prepare MedVerse for pretraining (paper, C.1.1): raw downloads in, uint8 shards out.

    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --phantoms 200 --out data/phantoms-64 --size 64

RAW/<Modality>/<source>/** holds files as published: PNG JPEG TIFF BMP GIF PGM PPM, NIfTI (.nii .nii.gz) and .npy. <Modality>
is CT, PET, MR, X-ray, Ultrasound, Fundus, OCT, Pathology, Endoscope or Photo. OUT/<source>/ gets 00000.npy ... (uint8
(n, S, S, c), c = 1 grey or 3 RGB), meta.json (counts, normalization) and dropped.csv (what was dropped and why). A source is
written to OUT/<source>.part and renamed when whole, so the command can be stopped at any moment and started again.

Letters: H, W sides as published, S side as stored, c channels, n slices of a volume or images of a shard.
"""
import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from data import parse_options

Image.MAX_IMAGE_PIXELS = None  # slides and fundus photographs are large, not decompression bombs

MODALITIES = ('CT', 'PET', 'MR', 'X-ray', 'Ultrasound', 'Fundus', 'OCT', 'Pathology', 'Endoscope', 'Photo')
VOLUMES = ('CT', 'PET', 'MR')
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'other')
WINDOW = {'CT': (-200, 400), 'SUV': (0, 20)}  # HU; PET in standardized uptake values
PERCENTILES = {'MR': (1, 99), 'PET': (1, 99)}  # of a volume; the z-score of raw PET cancels in the min-max after it
FOREGROUND = {'CT': 0.05, 'MR': 0.05, 'PET': 0.01, 'SUV': 0.01}  # least share of a slice that is above 0.02 of the range
RULES = {'CT': 'HU clipped to [-200, 400]', 'MR': '1st..99th percentile',
         'PET': "1st..99th percentile, or SUV clipped to [0, 20] where the path says 'suv'"}

@dataclass
class Config:
    raw: str = ''  # folder of the raw downloads: RAW/<Modality>/<source>/**; with --phantoms where to write them
    out: str = 'data/medverse'  # folder of the prepared sources
    size: int = 256  # side of the stored images, px
    min_side: int = 32  # images whose shorter side is below this are dropped, px
    shard: int = 256  # size of a shard file, MiB (one of grey and one of colour images are held in memory)
    workers: int = 0  # processes, 0 = one per core
    phantoms: int = 0  # simulate this many images a modality under RAW/raw, their masks under RAW/labels, and prepare them
    seed: int = 0  # of the phantoms; preparing sources draws nothing

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
    """One volume a time point, cut across the coarsest spacing (within 1% of it: axially); anterior or superior is up."""
    image = nib.load(path)
    volume = np.asarray(image.dataobj, dtype=np.float32)  # get_fdata() would scale in float64
    volume = volume.reshape(*(*volume.shape, 1)[:3], -1)  # 2D to 5D -> (x, y, z, time)
    image = nib.as_closest_canonical(nib.Nifti1Image(volume, image.affine))  # RAS: x right, y anterior, z superior
    volume = np.asarray(image.dataobj)
    spacing = np.where(np.array(volume.shape[:3]) == 1, np.inf, nib.affines.voxel_sizes(image.affine))
    axis = 2 if spacing[2] >= 0.99 * spacing.max() else spacing.argmax()
    volume = np.moveaxis(volume, (3, axis), (0, 1))  # (time, n, the two other axes)
    return list(volume.swapaxes(2, 3)[:, :, ::-1, ::-1])

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
    if path.name.startswith('.') or not path.name.lower().endswith((*PICTURES, '.nii', '.nii.gz', '.npy')):
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

def prepare(modality, source, config, pool):
    """Write the folder RAW/<Modality>/<source> to OUT/<source>, or OUT/<source>-<Modality> if another modality has the name.

    Returns its meta.json as a dict; a finished source is left alone. Results are taken in the order of the files, so the
    bytes do not depend on the number of workers. Raises OSError (disk full) and BrokenProcessPool (a worker was killed).
    """
    files = sorted(path for path in source.rglob('*') if path.is_file())
    for folder in Path(config.out, source.name), Path(config.out, f'{source.name}-{modality}'):
        meta = json.loads((folder / 'meta.json').read_text()) if folder.exists() else {}
        if meta.get('modality', modality) == modality:
            break
    if meta:
        print(f'{folder.name}: finished before, {meta["files"]} files at {meta["size"]} px')
        if (meta['files'], meta['size']) != (len(files), config.size):
            print(f'    now there are {len(files)} files, wanted at {config.size} px: delete {folder} to prepare it again')
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
    """The pairs (modality, source folder) under RAW; warns of what it leaves out, ends the program if nothing remains."""
    names, sources = {name.lower(): name for name in MODALITIES}, []
    for folder in sorted(raw.iterdir()) if raw.is_dir() else []:
        if folder.name.lower() not in names or not folder.is_dir():
            print(f'warning: {folder} is left out: it is no folder of {", ".join(MODALITIES)}', file=sys.stderr)
            continue
        inside = sorted(folder.iterdir())
        sources += [(names[folder.name.lower()], source) for source in inside if source.is_dir()]
        if loose := sum(path.is_file() for path in inside):
            print(f'warning: {loose} files in {folder} are left out: move them to {folder}/<source>/', file=sys.stderr)
    if not sources:
        sys.exit(f'no images: --raw {raw} has no folder <Modality>/<source>/, with <Modality> of {", ".join(MODALITIES)}')
    return sources

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
    """Simulate the phantoms if they are asked for, then prepare every source below RAW and print what became of it."""
    config = parse_options(Config())
    out = Path(config.out)
    if min(config.size, config.min_side, config.shard) < 1 or config.workers < 0:
        sys.exit('--size, --min_side and --shard must be 1 or more, --workers 0 or more')
    if not config.raw and not config.phantoms:
        sys.exit('where are the images? give --raw RAW, a folder of <Modality>/<source>/**, or --phantoms N to make some')
    raw = Path(config.raw or 'data/phantoms', 'raw') if config.phantoms else Path(config.raw)
    pool = ProcessPoolExecutor(config.workers or os.cpu_count(), initializer=follow_parent)
    try:
        jobs = [pool.submit(write_phantom, raw.parent, modality, n, config.seed) for modality in PHANTOMS
                for n in range(math.ceil(config.phantoms / (8 if modality in VOLUMES else 1)))]
        for job in tqdm(jobs, desc='phantoms', unit='file', disable=not jobs):
            job.result()
        sources = find_sources(raw)
        out.mkdir(parents=True, exist_ok=True)
        metas = [prepare(modality, source, config, pool) for modality, source in sources]
    except BrokenProcessPool:
        sys.exit('a worker was killed, most likely for its memory: start again with fewer --workers; finished sources stay')
    except OSError as error:
        sys.exit(f'{error}: make room in {out} or choose another --out, and start again; finished sources stay')
    except KeyboardInterrupt:
        print('stopped: start again to go on with the unfinished sources', file=sys.stderr)
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)
        for part in out.glob('*.part'):
            shutil.rmtree(part)
    rows = [(meta['modality'], meta['source'], meta['files'], meta['read'], meta['count'], *meta['dropped'].values())
            for meta in metas]
    rows.append(('all', f'{len(rows)} sources', *map(sum, list(zip(*rows))[2:])))
    for row in [('modality', 'source', 'files', 'read', 'kept', *REASONS), *rows]:
        print(f'{row[0]:<11}{row[1]:<30}' + ''.join(f'{cell:>10}' for cell in row[2:]))
    print('every file accounted for: read = kept + dropped')

if __name__ == '__main__':
    main()
