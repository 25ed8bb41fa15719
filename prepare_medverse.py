r"""Prepare images for pretraining (paper, C.1.1) and labelled tasks for fine-tuning.

    python prepare_medverse.py --list --raw RAW     data sets of Tables 2 and 3, found or not
    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --task fives --raw RAW/fives
    python prepare_medverse.py --task mine --raw MINE --images '(.*)\.png' --masks '(.*)_truth'
    python prepare_medverse.py --task pneumonia --raw pneumoniamnist_64.npz

RAW/<name>/** holds a data set of Table 2 as it was unpacked, RAW/<Modality>/<source>/** any other:
pictures, NIfTI, DICOM series, .npy, .npz of MedMNIST, and videos (for pretraining only). The folder
OUT/<source>/ appears when complete: 00000.npy ... (uint8 (n, S, S, c), c = 1 for grey or 3),
meta.json, dropped.csv (what is left out, and why). A task has masks, class folders or a table.

Rules are regular expressions, searched in paths below the folder of a source or task; upper and
lower case are the same. An image and its mask are a pair if the groups ( ) of both rules find the
same text: above, a/12 of a/12_truth.png. Without ( ) none pair. Later masks lie over earlier ones.
"""
import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter, deque, namedtuple
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageOps, ImageSequence
from tqdm import tqdm

MODALITIES = tuple('CT PET MR X-ray Ultrasound Fundus OCT Pathology Endoscope Photo'.split())
# How more than 8 bits become 8. limits: the values that become 0 and 255, or else the percentiles
# that do. foreground: slices with a smaller share of pixels above 0.02 are dropped.
Window = namedtuple('Window', 'limits percentiles foreground words')
WINDOWS = {
    **dict.fromkeys((*MODALITIES, ''), Window(None, (0, 100), 0, 'minimum..maximum')),
    'CT': Window((-200, 400), None, 0.05, 'HU [-200, 400], also + 32768; other unsigned min..max'),
    'MR': Window(None, (1, 99), 0.05, '1st..99th percentile'),
    # The paper's z-score of PET cancels in the scaling to 0..255 that follows it.
    'PET': Window(None, (1, 99), 0.01, '1st..99th percentile; SUV in [0, 20] if its path has suv'),
    'SUV': Window((0, 20), None, 0.01, 'SUV in [0, 20]')}  # PET in standardized uptake values
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
TOOLS = ('ffmpeg', 'ffprobe', 'dcm2niix')  # programs of others, for videos and DICOM
VIDEOS, VOLUMES = ('.avi', '.mp4'), ('.nii.gz', '.nii', '.img')  # of NIfTI and Analyze
IMAGES = (*PICTURES, *VIDEOS, *VOLUMES, '.npy', '.npz')
UNREAD = ('.webp', '.jp2', '.jfif', '.heic', '.avif', '.tga', '.svs', '.mha', '.mhd', '.nrrd')
ENDING = re.compile(f'({"|".join(map(re.escape, IMAGES))})$', re.IGNORECASE)
ZEROS = re.compile(r'(?<![^/])0+(?=\d+$)')  # leading zeros of 007 and a/007, but not of a/x007
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'held out', 'other')  # why it is dropped
SHARD, HEADER = 256 << 20, 128  # bytes of a full shard, and of the header of .npy
Image.MAX_IMAGE_PIXELS = 100_000_000  # a small file can claim any number; Pillow allows the double

def search(rule, name):
    """The match of a rule in a path, or None, as of an empty rule; case does not count."""
    return re.search(rule, name, re.IGNORECASE | re.DOTALL) if rule else None

def by_groups(names, rule):
    """{what the groups of a rule find: names}. Without groups, a name stands for itself."""
    found = {}
    for name in names:
        if match := search(rule, name):
            found.setdefault(match.groups() or name, []).append(name)
    return found

def has_ending(path, endings):
    return path.name.lower().endswith(endings)

def is_image(home, name):
    """Whether a path below `home` is an image: a DICOM folder, or a known ending, not hidden."""
    path, hidden = home / name, '/.' in f'/{name}'
    return path.is_dir() or path.is_file() and has_ending(path, IMAGES) and not hidden

def is_dicom(path):
    """Whether a file belongs to a DICOM series, by its name or by its mark."""
    if not path.is_file() or has_ending(path, ('dicomdir', *IMAGES)):  # to read a pipe never ends
        return False  # a DICOMDIR has the mark and no image
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return has_ending(path, '.dcm') or file.read(132)[128:] == b'DICM'
    return has_ending(path, '.dcm')

def list_names(home):
    """Sorted paths of all files below a folder, relative to it; a DICOM series is its folder."""
    names, visited = set(), {str(parent) for parent in home.resolve().parents}
    for folder, folders, files in os.walk(home, onerror=sys.exit, followlinks=True):
        folders.sort()  # so that of two ways to a folder the same one is taken each time
        if os.path.realpath(folder) in visited:  # through a link
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        below = Path(folder).relative_to(home)
        names |= {str(below if is_dicom(Path(folder, file)) else below / file) for file in files}
    return sorted(names, key=lambda name: name.split('/'))

# --- from files to images ---
def series(folder, new, modality=''):
    """Yield NIfTI files of the images of this modality in a DICOM folder, written to the folder
    `new`. Other images in it, or an error of dcm2niix, are a ValueError after them."""
    run = subprocess.run(['dcm2niix', '-d', '0', '-z', 'n', '-o', new, folder],
                         capture_output=True, text=True, errors='replace')
    if shutil.disk_usage(new).free < 1 << 20:  # then dcm2niix says that all went well
        raise OSError(28, 'No space left on device', new)
    # By JSON, which its tilt-corrected second copies lack.
    kinds = {path.with_suffix('.nii'): kind for path in sorted(Path(new).glob('*.json'))
             for kind in re.findall('"Modality": "(MR|CT|PT)"', path.read_text(errors='replace'))}
    wanted = {'': ('CT', 'MR', 'PT'), 'PET': ('PT',), 'SUV': ('PT',)}.get(modality, (modality,))
    yield from (path for path, kind in kinds.items() if kind in wanted)
    last = (run.stdout + run.stderr).strip().splitlines()[-1:]
    if not kinds:
        raise ValueError(f'of DICOM only MR, CT and PET are read, save PNG; dcm2niix: {last}')
    if others := sorted({*kinds.values()} - {*wanted}):
        raise ValueError(f'it has series of {", ".join(others)}, which are not of {modality}')
    if run.returncode:
        raise ValueError(f'dcm2niix ended with error {run.returncode}; images may lack: {last}')

def read(path, draft=0, grid=None):
    """All arrays of a file, (n, H, W) or (n, H, W, 3), upright, in its own units.
    draft: the side (px) that is enough of a JPEG; grid: the NIfTI image whose mask this is."""
    if has_ending(path, PICTURES):
        return read_pages(path, draft)
    if has_ending(path, '.npz'):  # of MedMNIST; its other images are for testing
        return np.load(path)['train_images'][:, None]
    return [read_array(path)] if has_ending(path, '.npy') else read_volume(path, grid)

def read_array(path):
    """The array of an .npy file, (n, H, W) or (n, H, W, 3)."""
    array = np.load(path, mmap_mode='r')
    shape, ndim = array.shape, array.ndim
    if ndim == 3 and (shape[2] == 4 or shape[0] == 3 and shape[2] > 3):  # RGBA, or (3, H, W)
        raise ValueError(f'{shape} may be colours, (H, W, 3), or slices, (n, H, W, 1)')
    if ndim == 2 or ndim == 3 and shape[2] == 3:  # one image
        return array[None]
    if ndim != 3 and (ndim != 4 or shape[3] not in (1, 3)):
        raise ValueError(f'{shape} is none of (H, W), (H, W, 3), (n, H, W), (n, H, W, 3)')
    return array[..., 0] if ndim == 4 and shape[3] == 1 else array

def read_volume(path, grid):
    """`read` of NIfTI and Analyze: a volume for each time point."""
    try:
        image = nib.load(path)
    except nib.filebasedimages.ImageFileError:
        raise ValueError('it is no NIfTI or Analyze file, or damaged') from None
    if not np.isfinite(image.affine).all():  # no comparison with NaN would fail
        raise ValueError('its affine is not finite')
    kind, scaled = image.get_data_dtype(), (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    # get_fdata() would scale in float64; uint8 would pass to_uint8 untouched, as a picture's.
    dtype = np.float32 if scaled else np.uint16 if kind == np.uint8 else None
    image, affine = (image, image.affine) if grid is None else (on_grid(image, grid), grid.affine)
    voxels = np.asarray(image.dataobj, dtype)
    if kind.names:
        return list(np.stack([cut(voxels[colour], affine) for colour in 'RGB'], -1))
    return list(cut(voxels, affine))

def on_grid(mask, image):
    """A NIfTI mask (x, y, z[, t]) on its image's grid, within half a voxel; axes in any order."""
    shape, size = (*image.shape, 1, 1)[:4], nib.affines.voxel_sizes(image.affine).min()
    turns = [nib.io_orientation(either.affine) for either in (mask, image)]
    turned = mask.as_reoriented(nib.orientations.ornt_transform(*turns)) if mask.ndim > 2 else mask
    for candidate in (mask, turned):
        drift = np.abs(image.affine - candidate.affine) @ (*shape[:3], 1)  # mm; no corner has more
        if (*candidate.shape, 1, 1)[:4] == shape and drift.max() <= size / 2:
            return candidate
    raise ValueError(f'their grids differ: {image.shape} and {mask.shape}, or their affines')

def read_pages(path, draft):
    """`read` of a picture. Pages of one shape are slices: one array, with one window."""
    pages = []
    # Given a path, Pillow 13 maps an uncompressed TIFF with its sides exchanged if EXIF turns it.
    with open(path, 'rb') as file, Image.open(file) as image:
        for page in [image] if image.format == 'MPO' else ImageSequence.Iterator(image):
            deep = page.mode[0] in 'IF'  # I;16, I and F; all other modes of Pillow have 8 bits
            tags = getattr(page, 'tag_v2', {})  # TIFF: 339 kind of number, 258 bits, 262 colours
            int8_uint32 = (tags.get(339, (1,))[0], tags.get(258, (1,))[0]) in ((2, 8), (1, 32))
            white_is_zero, cut_off = tags.get(262) == 0, ';16' in str(page.tile)  # to 8 bits
            if int8_uint32 or deep and white_is_zero or not deep and cut_off:  # Pillow misreads
                raise ValueError('its type of numbers is not read; save 8 bits, or grey 16')
            page.draft(None, (draft, draft) if draft else None)  # fast at 1/2, 1/4 or 1/8 of JPEG
            page = ImageOps.exif_transpose(page)
            if not deep:
                mixed = image.format == 'GIF' and image.is_animated  # grey first, then in colour
                page = page.convert('L' if page.mode in ('1', 'L', 'LA') and not mixed else 'RGB')
            dtype = np.uint16 if deep and image.format == 'PPM' else None  # Pillow has 32 bits
            pages.append(np.asarray(page, dtype)[None])
    return [np.concatenate(pages)] if len({page.shape for page in pages}) == 1 else pages

def cut(volume, affine):
    """View (time, n, H, W) of an array (x, y, z[, time ...]): upright slices, cut across the axis
    of the coarsest spacing (z, if within 1% of it); anterior or superior is up."""
    turn = nib.io_orientation(affine)  # to x right, y anterior, z superior
    volume = volume.reshape(*(*volume.shape, 1)[:3], -1)  # (x, y, z, time), 1 where one lacks
    volume = nib.apply_orientation(volume, turn)
    spacing = nib.affines.voxel_sizes(affine)[turn[:, 0].argsort()]
    spacing[np.array(volume.shape[:3]) == 1] = np.inf  # an axis of length 1 is the one cut across
    axis = 2 if spacing[2] >= 0.99 * spacing.max() else spacing.argmax()
    slices = np.moveaxis(volume, (3, axis), (0, 1))  # (time, n, W, H)
    return slices.swapaxes(2, 3)[:, :, ::-1, ::-1]  # the patient's right, or front, on the left

def to_uint8(volume, modality):
    """Yield the slices of an array (n, H, W[, 3]) as uint8, by one window (C.1.1) of WINDOWS."""
    if volume.dtype == np.uint8:
        yield from volume
        return
    limits, percentiles, _, _ = WINDOWS[modality]
    if modality == 'CT' and volume.dtype.kind == 'u':  # no HU
        shifted = 31000 < np.median(volume[volume > 0]) < 36000  # HU + 32768, as in DeepLesion
        limits, percentiles = ((32568, 33168) if shifted else None), (0, 100)
    if not limits:
        sample = volume.flat[::(volume.size // 1_000_000 | 1)]  # an even step sees few columns
        sample = sample[np.isfinite(sample)] + 0  # + 0 makes a number of bool
        limits = np.percentile(sample, percentiles) if sample.size else (0, 0)
    low, high = map(np.float32, limits)
    scale = 255 / (high - low or np.inf)  # a constant becomes 0
    for image in volume:  # NaN and infinity count as the lowest
        image = np.where(np.isfinite(image), image, low) if image.dtype.kind == 'f' else image
        yield np.uint8((image.clip(low, high) - low) * scale + 0.5)

def resize(image, size):
    """The whole image, uint8 (H, W[, 3]), low-passed, as (S, S, c); equal channels become one."""
    if image.shape[:2] != (size, size):
        image = Image.fromarray(image).resize((size, size), Image.BICUBIC, reducing_gap=3.0)
    pixels = np.ascontiguousarray(image).reshape(size, size, -1)
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels

def decode_video(path, size):
    """Yield every 30th frame (C.1.1) as uint8 (1, S, S, 3), while ffmpeg decodes the file."""
    # A download is not trusted, since it may name other files. -xerror: what is cut off fails.
    trusted = ['-v', 'fatal', '-protocol_whitelist', 'file',
               '-format_whitelist', 'avi,mov,mp4,m4a,3gp,3g2,mj2', '-i', f'file:{path}']
    command = ['ffmpeg', '-xerror', *trusted, '-fps_mode', 'passthrough', '-pix_fmt', 'rgb24',
               '-vf', f'framestep=30,scale={size}:{size}:flags=bicubic', '-f', 'rawvideo', '-']
    probe = ['ffprobe', *trusted, '-count_packets', '-select_streams', 'v:0',
             '-show_entries', 'stream=nb_frames,nb_read_packets', '-of', 'default=nw=1:nk=1']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        while len(frame := process.stdout.read(size * size * 3)) == size * size * 3:
            yield np.frombuffer(frame, np.uint8).reshape(1, size, size, 3)
    stated, found = subprocess.run(probe, capture_output=True, text=True).stdout.split() or ('', 0)
    if process.returncode or stated.isdigit() and int(stated) > int(found):  # it is cut off
        raise ValueError('ffmpeg cannot decode it to its end')

# pixels: uint8 (S, S, c), or None with a reason. picture: no slice of a volume, no video's frame.
Item = namedtuple('Item', 'pixels picture reason detail', defaults=(False, '', ''))

def source_items(path, modality, size, min_side):
    """In a worker: yield an Item, of `size` px, for each image of a file; one more if corrupt."""
    film, count = has_ending(path, VIDEOS), 0
    try:
        with tempfile.TemporaryDirectory() as new:
            files = series(path, new, modality) if path.is_dir() else [path]
            arrays = (array for file in files for array in read(file, max(2 * size, min_side)))
            for array in decode_video(path, size) if film else arrays:
                picture = len(array) == 1 and has_ending(path, (*PICTURES, '.npy', '.npz'))
                least = 0 if picture and array.dtype == np.uint8 else WINDOWS[modality].foreground
                for image in to_uint8(array, modality):
                    count += 1
                    small = min(image.shape[:2]) < min_side and not film
                    bright = np.count_nonzero(image > 5)  # above 0.02 of 255
                    if small or np.ptp(image) < 8 or bright < least * image.size:  # flat or dark
                        sides = f'{image.shape[1]} x {image.shape[0]} px'
                        yield Item(None, False, 'small' if small else 'blank', sides)
                    else:
                        yield Item(resize(image, size), picture)
        for part in ('val', 'test') if has_ending(path, '.npz') else ():
            for _ in np.load(path)[f'{part}_labels']:
                yield Item(None, False, 'held out', f'{part}, for a task')
        if not count:
            raise ValueError('it holds no image')
    except Exception as error:  # decoders fail on broken files in every way there is
        if isinstance(error, OSError) and (error.errno == 28 or error.filename in TOOLS):
            raise  # a full disk or a missing program, which harm every file
        yield Item(None, False, 'corrupt', f'{type(error).__name__}: {error}')

def find_twin(pixels, name, seen):
    """Name of an earlier picture that uint8 (S, S, c) nearly repeats, or None; `seen` learns it.
    Twins differ in at most one bit (is a cell darker than the next?) and 3 levels on average."""
    grey = Image.fromarray(pixels.squeeze()).convert('L')
    grid = np.int16(grey.resize((9, 8), Image.BOX))  # means of areas, (8, 9)
    bits = int.from_bytes(np.packbits(grid[:, :-1] < grid[:, 1:]).tobytes())
    for key in [bits, *(bits ^ (1 << bit) for bit in range(64))]:
        for twin, other in seen.get(key, ()):
            if np.abs(grid - other).mean() < 3:
                return twin
    seen.setdefault(bits, []).append((name, grid))

# --- the engine: workers, results that wait on the disk, folders that appear when complete ---
def follow_parent():
    """Start of a worker: Ctrl-C is for its parent alone, and it ends when its parent does."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()

def spill(folder, work, *call):
    """In a worker: path of a new file of what work(*call) yields, which may be large."""
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        for item in work(*call):
            pickle.dump(item, file, pickle.HIGHEST_PROTOCOL)
    return Path(file.name)

def spilled_items(path):
    """Yield what `spill` wrote."""
    with open(path, 'rb') as file:
        while file.peek(1):
            yield pickle.load(file)

def in_order(pool, workers, folder, work, calls, title):
    """Yield for each call (path, ...) the file of work(path, ...); two a worker are under way."""
    jobs, waiting = deque(), deque(calls)
    for done in tqdm(range(len(calls)), title, unit='file'):
        try:
            while waiting and len(jobs) < 2 * workers:
                jobs.append(pool.submit(spill, folder, work, *waiting.popleft()))
            yield jobs.popleft().result()
        except BrokenProcessPool:
            sys.exit(f'a worker was killed at {calls[done][0]} or soon after: fewer --workers?')

@contextlib.contextmanager
def appearing(folder, pool):
    """Yield FOLDER.part, locked, to write in. It becomes FOLDER, or goes away on any error."""
    part = Path(f'{folder}.part')
    part.mkdir(parents=True, exist_ok=True)
    with open(part / 'lock', 'w') as lock:
        try:
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed program gives it up
        except ImportError:
            print(f'{folder}: not locked, as this system has no fcntl')
            lock.close()  # Windows neither deletes nor moves an open file
        except BlockingIOError:
            sys.exit(f'{folder}: another program is preparing it; wait, or choose another --out')
        try:
            for old in {*part.iterdir()} - {part / 'lock'}:  # what a killed program left behind
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            yield part
            (part / 'lock').unlink()
            os.replace(part, folder)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # so that no worker writes there any more
            shutil.rmtree(part, ignore_errors=True)
            raise

# --- sources for pretraining ---
def prepare_source(row, home, folder, o, pool):
    """Write a source, the files below `home`, to `folder`. Returns its meta.json, or None."""
    names = list_names(home)
    if folder.exists():
        meta = json.loads((folder / 'meta.json').read_text())
        if meta['size'] != o.size:
            sys.exit(f'{folder}: has --size {meta["size"]}; delete it, or choose another --out')
        print(f'{folder}: finished before, of {meta["files"]} files (now {len(names)})')
        return meta
    images, skip = o.images or row.images, o.skip or row.skip
    wanted = [name for name in names
              if search(images, name) and not search(skip, name) and is_image(home, name)]
    _, _, least, words = WINDOWS[row.modality]
    with appearing(folder, pool) as part:
        kept, dropped = write_source(row, home, names, wanted, part, o, pool)
        meta = {'source': folder.name, 'modality': row.modality, 'count': kept, 'size': o.size,
                'normalization': f'8 bits as they are; others by one window a volume: {words}',
                'foreground': f'slices: {least} of the pixels above 0.02' if least else 'any',
                'files': len(names), 'dropped': dropped}
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    if not kept:
        *_, last = (folder / 'dropped.csv').read_text(errors='replace').splitlines()
        print(f'{home}: no image is kept of {len(wanted)} files, as {last}; it is left out')
        shutil.rmtree(folder)
    return meta if kept else None

def write_source(row, home, names, wanted, part, o, pool):
    """Write shards and dropped.csv. Returns how many images were kept, and dropped by reason."""
    calls = []
    for name in wanted:
        suv = row.modality == 'PET' and search('suv', f'{home.name}/{name}')
        calls.append((home / name, 'SUV' if suv else row.modality, o.size, o.min_side))
    others = sorted({*names} - {*wanted})
    kept, dropped = 0, dict.fromkeys(REASONS, 0) | {'other': len(others)}
    shards, filling, seen = 0, {}, {}  # how many; {shape: the open one}; pictures for find_twin
    with open(part / 'dropped.csv', 'w', encoding='utf-8', errors='surrogateescape') as file:
        log = csv.writer(file, lineterminator='\n')
        log.writerow(('path', 'slice', 'reason', 'detail'))
        log.writerows((name, 0, 'other', 'no image by name, or no regular file') for name in others)
        results = in_order(pool, o.workers, part, source_items, calls, part.stem)
        for name, result in zip(wanted, results):
            for index, item in enumerate(spilled_items(result)):
                # Neighbouring slices of a volume are alike by nature, and Table 2 keeps them.
                if item.picture and (twin := find_twin(item.pixels, name, seen)):
                    item = Item(None, False, 'duplicate', f'of {twin}')
                if item.reason:
                    dropped[item.reason] += 1
                    log.writerow((name, index, item.reason, item.detail))
                    continue
                shape = item.pixels.shape
                if shape not in filling:
                    filling[shape] = open(part / f'{shards:05d}.npy', 'wb')
                    filling[shape].seek(HEADER)  # which `finish_shard` writes
                    shards += 1
                filling[shape].write(item.pixels)
                kept += 1
                if filling[shape].tell() > SHARD:
                    finish_shard(filling.pop(shape), shape)
            result.unlink()
    for shape, shard in filling.items():
        finish_shard(shard, shape)
    return kept, dropped

def finish_shard(file, shape):
    """Write the header of .npy before the images of this shape in a file, and close it."""
    count = (file.tell() - HEADER) // np.prod(shape).item()
    file.seek(0)
    header = dict(descr='|u1', fortran_order=False, shape=(count, *shape))
    np.lib.format.write_array_header_1_0(file, header)
    file.close()

def home_of(row, raw):
    """The folder of a row below RAW, or None: RAW/AutoPET-CT, else RAW/AutoPET of several rows."""
    parts = row.name.split('-')
    homes = [raw / '-'.join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((home for home in homes if home.is_dir()), None)

def modality_of(name):
    """The modality that a folder or option names, as Xray and x_ray name X-ray, or itself."""
    word = re.sub('[^a-z]', '', name.lower())
    return {known.lower().replace('-', ''): known for known in (*MODALITIES, 'SUV')}.get(word, name)

def find_sources(raw, out, o):
    """{name: (row, folder below RAW)} of the sources: rows of Table 2, then RAW/<Modality>/*."""
    found = [(row, home_of(row, raw)) for row in SOURCES if home_of(row, raw)]
    deep = [path for path in sorted(raw.glob('*/*')) if modality_of(path.parent.name) in MODALITIES]
    found += [(Source(path.name, modality_of(path.parent.name)), path)
              for path in deep if path.is_dir()]
    used = {folder for _, home in found for folder in (home, home.parent)}
    if others := {*raw.glob('*'), *deep} - used:
        print(f'warning: no data sets: {len(others)} paths, as {min(others)}', file=sys.stderr)
    times, sources = Counter(row.name for row, _ in found), {}
    for row, home in found:
        short, long = row.name, f'{row.name}-{row.modality}'  # long, if another has the short
        metas = [out / known / 'meta.json' for known in (long, short)]  # of both, the short wins
        finished = {json.loads(meta.read_text())['modality']: meta.parent.name
                    for meta in metas if meta.exists()}
        name = finished.get(row.modality, long if finished or times[row.name] > 1 else short)
        if name in sources:
            sys.exit(f'{sources[name][1]}, {home}: have the same name; rename or move one of them')
        if o.source in ('', row.name):
            sources[name] = row, home
    if not sources:
        sys.exit(f'{raw}: holds no {o.source or "RAW/BUSI (--list)"}, no RAW/CT/<source>/; deeper?')
    return sources

def prepare_sources(raw, out, o, pool):
    """Prepare every source below RAW, and print the account of their files."""
    rows = [('modality', 'source', 'files', 'found', 'kept', *REASONS)]
    sources = find_sources(raw, out, o)
    for name, (row, home) in sources.items():
        if meta := prepare_source(row, home, out / name, o, pool):
            kept, dropped = meta['count'], [meta['dropped'].get(reason, 0) for reason in REASONS]
            counts = meta['files'], kept + sum(dropped), kept, *dropped
            rows.append((meta['modality'], meta['source'], *counts))
    for modality, source, *counts in rows:
        print(f'{modality:<11}{source:<30}' + ''.join(f'{count:>10}' for count in counts))
    if left_out := [name for name in sources if not (out / name).exists()]:
        sys.exit(f'left out, as told above: {", ".join(left_out)}')
    print(f'{len(rows) - 1} sources; what each left out, and why, is in its dropped.csv')

# --- labelled tasks: which images, with which answers ---
# masks: a list for each rule of --masks, of the paths of this image's masks. label: its class.
Sample = namedtuple('Sample', 'masks label patient', defaults=((), '', ''))
# By default masks/ beside images/, or nnU-Net's labelsTr/ beside imagesTr/, of groups as x/, Tr/1.
MASKS = r'(.*)(?:masks/|labels(?=T[rs]/))(.*?)(?:_0000)?(?:\.nii)?\.\w+$'
IMAGES_BESIDE = r'(.*)images(?:/|(?=T[rs]/))(.*?)(?:_0000)?(?:\.nii)?\.\w+$'
SPLITS = {  # each split, and the rule of its official folders: Training Set, 01_train, imagesTr
    part: rf'(^|/)(\d+[ _-]?)?({words})([ _-]?(set|data|dataset|images?|imgs))?[ _-]?\d*/'
    for part, words in dict(train='train(ing)?|(images|labels)Tr', val='val(id(ation)?)?',
                            test='test(ing)?|(images|labels)Ts').items()}
NOT_READ = 'not read: COCO, LabelMe, run lengths (draw PNG masks), YOLO (use tests.lab.convert)'

def find_samples(raw, o, account):
    """{path of an image below RAW: its Sample, with its patient}: by a table, pairs or folders.
    Adds to `account`: (what, how many, those left over, whether these stop the preparation)."""
    names = [name for name in list_names(raw)
             if (name == '.' or '/.' not in f'/{name}') and not search(o.skip, name)]
    masks = {rule: by_groups(names, rule) for rule in (() if o.labels else o.masks or [MASKS])}
    partners = {name for found in masks.values() for same in found.values() for name in same}
    pairs = not o.labels and (partners or o.masks or o.outline or o.objects or o.values)
    rule = o.images or (IMAGES_BESIDE if pairs else '.')
    wanted = [name for name in names if name not in partners and search(rule, name)]
    images = [name for name in wanted if is_image(raw, name)]
    if o.labels:
        samples = read_table(raw, images, account, *o.labels)
    elif pairs:
        samples = find_pairs(raw, rule, by_groups(images, rule), masks, account, o.objects)
    else:
        samples = by_folders(images, o.level)
    unread = [name for name in wanted if has_ending(raw / name, UNREAD)]  # these stop it
    alone = [name for name in images if name not in samples]  # these do not (imagesTs)
    account.append((f'images {rule}', len(images + unread), unread + alone, bool(unread)))
    if not samples:
        unused = ', '.join(f'{what} {left[:1]}' for what, _, left, _ in account)
        sys.exit(f'{raw}: no image has a class or mask; first unused: {unused}; {NOT_READ}')
    if o.patient:
        strangers = [name for name in samples if not search(o.patient, name)]
        account.append((f'--patient {o.patient}', len(samples), strangers, True))
    for name, sample in samples.items():
        match = search(o.patient, name)
        shown = (match.groups() or match)[0] if match else ''  # its first group, or all it found
        samples[name] = sample._replace(patient=shown or sample.patient or name)
    return samples

def print_account(raw, account, partial):
    """Print what each rule, table and list of `account` used and left over; some leftovers stop."""
    for what, n, left, _ in account:
        print(f'{what}: {n} = {n - len(left)} used + {len(left)} left out  {", ".join(left[:3])}')
    harm = [f'{what}: {len(left)} of {n} are left over, as {", ".join(left[:3])}'
            for what, n, left, harmful in account if left and harmful]
    if harm and not partial:
        sys.exit(f'{raw}: {"; ".join(harm)}; mend this, --skip them, or allow it by --partial')

def find_pairs(raw, rule, images, masks, account, objects):
    """Samples of `images` {groups: paths} and `masks` {rule of masks: {groups: paths}}."""
    samples = {}
    for mask_rule, found in masks.items():
        left = [name for groups in found if groups not in images for name in found[groups]]
        account.append((f'files {mask_rule}', sum(map(len, found.values())), left, True))
    for groups, same in images.items():
        partners = [found.get(groups, []) for found in masks.values()]
        if len(same) > 1 or max(map(len, partners)) > 1 and not objects:
            names = ', '.join([*same[:2], *sum(partners, [])][:3])
            sys.exit(f'{raw}: {names} cannot be a pair, as all have the groups {groups}; mend the '
                     'rules --images and --masks, or unite masks of single objects by --objects')
        if any(partners):
            samples[same[0]] = Sample(partners)
    rules = {rule: images, **masks}
    if not samples or not all(rules.values()):
        firsts = [f'{rule} finds {next(iter(rules[rule]), "no file")}' for rule in rules]
        sys.exit(f'{raw}: images have no masks, since each rule needs groups ( ), the same number '
                 f'of them, that find the same text, but {"; ".join(firsts)}')
    return samples

def by_folders(names, level):
    """Samples whose class is their folder (level 1) or the one above (2), of no split's name."""
    near, above = {}, {}  # {name: folder}
    for name in names:
        folders = [folder for folder in reversed(Path(name).parent.parts)
                   if not any(search(rule, f'{folder}/') for rule in SPLITS.values())]
        near[name], above[name] = [*(folders or [Path(name).parent.name]), ''][:2]
    kinds, parted = {*near.values()}, {*zip(near.values(), above.values())}
    # Unsure: a name lies below several (cat/a, dog/a), or has at most 3 images on average.
    unsure = len(parted) > len(kinds) or len(names) <= 3 * len(kinds)
    if not level and unsure and len({*above.values()}) > 1:
        one, two = (dict(Counter(found.values()).most_common(9)) for found in (near, above))
        sys.exit(f'which folders are the classes? --level 1: {one}; --level 2: {two}')
    found = above if level == 2 else near
    return {name: Sample(label=found[name]) for name in names if found[name]}

def read_lines(raw, end):
    """Lines of the table or list whose path below RAW ends so, in UTF or Windows' code page."""
    paths = [raw / name for name in list_names(raw) if f'/{name}'.endswith(f'/{end}')]
    if len(paths) > 1 or not (paths or [raw / end])[0].exists():
        sys.exit(f'{end}: {raw} has {[*map(str, paths[:2])]}; give a path below it, as ./{end}')
    content = (paths or [raw / end])[0].read_bytes()
    wide = content[:2] in (b'\xff\xfe', b'\xfe\xff')
    for code in ['utf-16'] if wide else ['utf-8-sig', 'cp1252', 'latin-1']:
        with contextlib.suppress(UnicodeDecodeError):
            return re.split('\r\n|\r|\n', content.decode(code))  # splitlines() knows other ends

def look_up(what, paths, names, account):
    """{path in a table or list: the image whose path, without ending, ends so by whole folders, or
    ''}. If none does, leading zeros of a number are ignored, where that leaves a single image."""
    tails, found, guessed = {}, {}, []
    for name in names:
        tail = ENDING.sub('', name)
        while tail:
            tails.setdefault(ZEROS.sub('', tail), []).append((tail, name))
            tail = tail.partition('/')[2]
    for path in paths:
        tail = ENDING.sub('', path.replace('\\', '/'))
        near = tails.get(ZEROS.sub('', tail), [])
        exact = [name for other, name in near if other == tail]
        if len(exact) > 1:
            sys.exit(f'{what}: {path} may be any of {exact[:3]}; give more of its path')
        if not exact and len(near) == 1:
            guessed.append(f'{path} is {near[0][1]}')
        found[path] = exact[0] if exact else near[0][1] if len(near) == 1 else ''
    if guessed:
        print(f'{len(guessed)} names are found as whole numbers: {", ".join(guessed[:3])}')
    account.append((what, len(paths), [path for path in paths if not found[path]], True))
    return found

def read_table(raw, names, account, end, *columns):
    """Samples by the columns of file, class and maybe patient of a CSV whose path ends so."""
    def agreement(mark):  # how many lines it cuts into as many cells as the first
        widths = [len(cells) for cells in csv.reader(lines[:99], delimiter=mark) if cells]
        return widths.count(widths[0]) if widths and widths[0] > 1 else 0
    lines, samples = read_lines(raw, end), {}
    table = csv.DictReader(lines, delimiter=max(',;\t', key=agreement))
    head = table.fieldnames or []
    columns = columns or head[:2]
    if len(columns) < 2 or not {*columns} <= {*head}:
        sys.exit(f'{end}: needs columns of files and classes, has {head}, no '
                 f'{", ".join({*columns} - {*head})}; {NOT_READ}')
    print(f'{end}: file, class, patient are its columns {", ".join(columns)}; others are not read')
    rows = [(table.line_num, *((row[column] or '').strip() for column in columns)) for row in table]
    rows = [(line, path, label, *more) for line, path, label, *more in rows if path and label]
    found = look_up(f'rows of {end}', [path for _, path, *_ in rows], names, account)
    for line, path, label, *patient in rows:
        if re.fullmatch(r'\d+( \d+){3,}', label):
            sys.exit(f'{end}, line {line}: looks like run lengths; {NOT_READ}')
        sample = Sample((), label, *patient)
        if found[path] and samples.setdefault(found[path], sample) != sample:
            sys.exit(f'{end}, line {line}: {path} has another answer above')
    return samples

def split_samples(samples, raw, o, account):
    """{split: names}. A rule takes the images in whose path, or a mask's, it is found; a .txt below
    RAW those it lists; the first split to take one keeps it. Shares draw the rest, by patient."""
    rules = dict(zip(SPLITS, o.split or ('50', '20', '30')))
    given = [part for part in SPLITS if any(search(SPLITS[part], name) for name in samples)]
    if official := not o.split and 'train' in given and len(given) > 1:  # without tests, draw them
        rules = SPLITS if 'test' in given else {**SPLITS, 'train': '70', 'test': '30'}
    parts = {}
    for part, rule in rules.items():
        if rule.endswith('.txt'):
            lines = [line.strip() for line in read_lines(raw, rule) if line.strip()]
            chosen = filter(None, look_up(f'lines of {rule}', lines, samples, account).values())
        else:
            chosen = [name for name, sample in samples.items() if not rule.isdigit()
                      and any(search(rule, path) for path in (name, *sum(sample.masks, [])))]
        parts = dict.fromkeys(chosen, part) | parts
    others = [name for name in samples if name not in parts]
    shares = [int(rule) if rule.isdigit() else 0 for rule in rules.values()]
    if others and not sum(shares):
        sys.exit(f'{raw}/{others[0]}: no rule of --split takes it; give shares, or --skip it')
    parts.update(draw_splits(samples, others, shares, o.seed))
    times = Counter(patient for patient, _ in {(samples[one].patient, parts[one]) for one in parts})
    if both := sorted(patient for patient in times if times[patient] > 1):
        print(f'warning: {len(both)} patients in more than one split: {both[:3]}', file=sys.stderr)
    how = 'its folders' if official else ', '.join(rules.values())
    splits = {part: sorted(name for name in parts if parts[name] == part) for part in rules}
    counts = ', '.join(f'{part} {len(names)}' for part, names in splits.items())
    print(f'{raw}: {counts} files, split by {how}; {len(others)} of them drawn')
    return splits

def draw_splits(samples, names, shares, seed):
    """{name: part} by shares of the patients of each class, rounded as in the paper's Table 3."""
    labels, sides, rng = {}, {}, np.random.default_rng(seed)
    for name in names:
        labels.setdefault(samples[name].patient, samples[name].label)
    for label in sorted({*labels.values()}):
        group = [patient for patient in labels if labels[patient] == label]
        spare = len(group) - (shares[0] > 0)  # training keeps one; test is rounded up, val down
        test = min((len(group) * shares[2] + sum(shares) - 1) // sum(shares), spare)
        val = min(len(group) * shares[1] // sum(shares), spare - test)
        drawn = np.split(rng.permutation(group), (test, test + val))
        for part, patients in zip(('test', 'val', 'train'), drawn):
            sides.update(dict.fromkeys(patients.tolist(), part))
    return {name: sides[samples[name].patient] for name in names}

def read_masks(path, image, values):
    """Masks uint8 (H, W) of the file `path`, by `classify`, for each image or slice of `image`."""
    if not has_ending(path, IMAGES):
        raise ValueError(NOT_READ)
    if has_ending(image, VOLUMES) != has_ending(path, VOLUMES):
        raise ValueError('one of them is NIfTI, the other is not')
    grid = nib.load(image) if has_ending(image, VOLUMES) else None
    masks, lossy = [mask for volume in read(path, grid=grid) for mask in volume], False
    for one in (image, path):
        if has_ending(one, PICTURES) and Image.open(one).getexif().get(0x0112, 1) not in (0, 1):
            raise ValueError(f'EXIF turns {one}; save both without this tag')
    if has_ending(path, PICTURES):
        with Image.open(path) as picture:
            lossy = picture.format in ('JPEG', 'MPO') or picture.info.get('compression') == 'jpeg'
            palette = np.reshape(picture.getpalette() or [], (-1, 3))  # colours; none: (0, 3)
            if np.ptp(palette, 1).any() and '#' not in ''.join(values):
                masks = [np.asarray(picture)]  # the numbers of the colours
            if picture.mode in ('LA', 'RGBA'):  # what is transparent shows nothing
                masks[0] = masks[0].copy()
                masks[0][np.asarray(picture)[..., -1] < 128] = 0
    masks = [classify(mask, values, lossy) for mask in masks]
    if {value for mask in masks for value in np.unique(mask).tolist()} - {0} == {255}:
        raise ValueError('255 is its only foreground: give --values 0 1+255 if it is a class, or '
                         '0 1 255 and two --classes if it is not to be scored')
    return masks

def classify(mask, values, lossy=False):
    """Mask (H, W[, 3]) -> uint8 (H, W): places in `values`, where 1+2 is either and * all others.
    An unnamed 255 stays and is not scored. In a lossy file the nearest counts, and * is white."""
    colours = '#' in ''.join(values)
    grey = 0x010101 if colours else 1  # beside colours, grey 7 is #070707
    table, rest = {}, None  # {value: its place in `values`}; the place of *
    for place, entry in enumerate(values):
        rest = place if '*' in entry else rest
        for value in re.findall(r'[^+*]+', entry):  # colours are numbers 0xrrggbb
            table[int(value[1:], 16) if value[0] == '#' else float(value) * grey] = place
    mask = np.nan_to_num(mask, posinf=0, neginf=0)
    if mask.ndim == 3:
        packed = mask @ np.int32((0x010000, 0x000100, 1))
        if not colours and np.ptp(mask, 2).any() and len(np.unique(packed[packed > 0])) > 1:
            raise ValueError('it has several colours; name them in --values, as #ff0000')
        mask = packed if colours else mask.max(2)
    elif colours:
        mask = mask * float(grey)
    found, place = np.unique(mask, return_inverse=True)
    found = np.where(abs(found - np.rint(found)) < 1e-3, np.rint(found), found)  # 0.99999994 is 1
    if lossy:
        known = np.unique([*table, 255])
        if colours or np.diff(known).min() < 32:
            raise ValueError('it is lossy, which blurs near values and colours; save it as PNG')
        found = known[abs(found[:, None] - known).argmin(1)]
    others = sorted({*found.tolist()} - {*table, 255 * grey})
    if others and rest is None:
        names = [f'#{int(value):06x}' if colours else f'{value:g}' for value in others]
        raise ValueError(f'values or colours {", ".join(names[:3])}, which --values does not name')
    places = np.uint8([table.get(value, 255 if rest is None else rest) for value in found.tolist()])
    return places[place].reshape(mask.shape)

def fill_outline(outline):
    """A closed convex outline, bool (H, W), filled: it lies on both sides in a row or a column."""
    run = np.logical_or.accumulate  # from one side; flipped: from the other
    rows, columns = (run(outline, axis) & np.flip(run(np.flip(outline, axis), axis), axis)
                     for axis in (0, 1))
    return rows | columns

def task_items(path, raw, sample, o):
    """In a worker: yield (pixels uint8 (S, S, c), mask uint8 (S, S) or number of the class)."""
    try:
        with tempfile.TemporaryDirectory() as new:
            files = [*series(path, new, o.modality)] if path.is_dir() else [path]
            images = [image for file in files for array in read(file)
                      for image in to_uint8(array, o.modality)]
            layers = [(number, read_masks(raw / mask, files[0], o.values))
                      for number, masks in enumerate(sample.masks, 1) for mask in masks]
        for _, masks in layers:
            if len(masks) != len(images):
                raise ValueError(f'it has {len(images)} images or slices, its mask {len(masks)}')
        for place, image in enumerate(images):
            here = [(number, masks[place]) for number, masks in layers]
            answer = lay_over(image.shape[:2], here, o) if here else o.classes.index(sample.label)
            yield resize(image, o.size), answer
    except Exception as error:  # of any decoder; the pool hands this exit on
        partner = sample.label or ', '.join(sum(sample.masks, [])[:3])
        sys.exit(f'{path}: cannot be used with {partner} ({type(error).__name__}: {error})')

def lay_over(shape, layers, o):
    """Mask uint8 (S, S) of [(number of a rule, mask)]: 1 becomes the number; later ones on top."""
    mask = np.zeros(shape, np.uint8)
    for number, layer in layers:
        if layer.shape != shape:
            raise ValueError(f'their sizes differ: {shape} and {layer.shape}')
        if o.outline:
            layer = np.uint8(fill_outline(layer > 0))
        mask[layer > 0] = np.where(layer == 1, number, layer)[layer > 0]
    mask[mask >= len(o.classes)] = 255  # values after those of the classes are not scored
    return np.asarray(Image.fromarray(mask).resize((o.size, o.size), Image.Resampling.NEAREST))

def write_split(folder, spilled, array, size):
    """Write a split. Returns how many images it has, how many show each class, and hashes."""
    channels = [pixels.shape[2] for path in spilled for pixels, _ in spilled_items(path)]
    shape = len(channels), size, size, max(channels, default=1)  # grey gets three beside colours
    if shutil.disk_usage(folder).free < 2 * np.prod(shape):  # with masks; a full disk kills maps
        raise OSError(28, 'No space left on device')
    images = np.lib.format.open_memmap(folder / 'images.npy', 'w+', np.uint8, shape)
    dtype, sides = (np.int64, ()) if array == 'labels' else (np.uint8, (size, size))
    answers = np.lib.format.open_memmap(folder / f'{array}.npy', 'w+', dtype, (shape[0], *sides))
    shown, hashes = Counter(), set()
    for n, (pixels, answer) in enumerate(item for path in spilled for item in spilled_items(path)):
        images[n], answers[n] = pixels, answer
        shown.update(np.unique(answer).tolist())
        if np.ptp(pixels):  # black slices are alike
            hashes.add(hash(pixels.tobytes()))
    return len(images), shown, hashes

def prepare_medmnist(path, folder, o, pool):
    """`prepare_task` of a MedMNIST file, whose images become files in folders of their classes."""
    with tempfile.TemporaryDirectory() as new:
        try:
            file = np.load(path)
            o.classes = o.classes or [str(n) for n in range(file['train_labels'].max() + 1)]
            for part in SPLITS:
                labels = file[f'{part}_labels'].squeeze(1)  # ends if an image has several labels
                for place, image in enumerate(file[f'{part}_images']):
                    kind = Path(new, part, o.classes[labels[place]])
                    kind.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(kind / f'{place:06d}.ppm')
        except Exception as error:  # decoders fail in every way there is
            sys.exit(f'{path}: has not one label of {len(o.classes)} --classes for each image, as '
                     f'files of MedMNIST have ({type(error).__name__}: {error})')
        prepare_task(Path(new), folder, o, pool)

def prepare_task(raw, folder, o, pool):
    """Write the labelled images below RAW to `folder` as data.Task reads them."""
    if folder.exists():
        sys.exit(f'{folder}: this task is prepared; delete it, or choose another --out')
    account, counts, shown, holders = [], {}, {}, {}
    samples = find_samples(raw, o, account)
    labels = sorted({sample.label for sample in samples.values() if not sample.masks})
    name_classes(o, labels)
    splits = split_samples(samples, raw, o, account)
    print_account(raw, account, o.partial)
    words = {*re.findall('[a-z]+', ' '.join(o.classes).lower())}
    sides = 'left', 'right', 'sinister', 'dexter', 'l r', 'od os'  # then nothing is mirrored
    sided = bool(o.sided) or any({*side.split()} <= words for side in sides)
    array, kind = ('labels', 'classification') if labels else ('masks', 'segmentation')
    with appearing(folder, pool) as part:
        for name, chosen in splits.items():
            (part / name).mkdir()
            calls = [(raw / path, raw, samples[path], o) for path in chosen]
            spilled = [*in_order(pool, o.workers, part, task_items, calls, name)]
            counts[name], shown[name], hashes = write_split(part / name, spilled, array, o.size)
            for key in hashes:
                holders.setdefault(key, []).append(name)
            for path in spilled:
                path.unlink()
        meta = {'kind': kind, 'classes': o.classes, 'modality': o.modality,
                'size': o.size, 'counts': counts, 'sided': sided}
        (part / 'split.json').write_text(json.dumps(splits, indent=1))
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
        check_classes(raw, o, shown)
    twins = Counter(' and '.join(parts) for parts in holders.values() if len(parts) > 1)
    for parts, times in twins.items():
        print(f'warning: {times} images are the same in {parts}', file=sys.stderr)
    print(f'{folder}: {kind}, {", ".join(o.classes)}; {counts}; window {o.modality or "min..max"}')

def name_classes(o, labels):
    """Set --classes and --values if they are not given."""
    if len({''.join(label.lower().split()) for label in labels}) < len(labels):
        sys.exit(f'classes {labels}: some differ in case or blanks alone; give them one spelling')
    if not o.classes:
        named = [value or 'background' for value in o.values]
        o.classes = labels or (named if len(named) > 2 else ['background', 'foreground'])
    if len(o.masks) > 1 and (len(o.classes) != len(o.masks) + 1 or len(o.values) not in (0, 2)):
        sys.exit('--classes: background and one for each mask; --values: outside and inside')
    inside = ['*'] if len(o.masks) > 1 or o.objects else map(str, range(1, len(o.classes)))
    o.values = o.values or ['0', *inside]

def check_classes(raw, o, shown):
    """Print how many images of each split show each class, and stop if training lacks one."""
    print(f'{"images that show":<26}' + ''.join(f'{part:>8}' for part in shown))
    for number, name in enumerate(o.classes):
        print(f'{name:<26}' + ''.join(f'{times[number]:>8}' for times in shown.values()))
    unseen = [name for number, name in enumerate(o.classes) if not shown['train'][number]]
    new = {*shown['test']} - {*shown['train'], 255}  # classes of test images alone
    allowed = o.partial or o.task in TASKS  # whose classes are known
    if new or not shown['test'] or len(o.classes) - len(unseen) < 2 or (unseen and not allowed):
        sys.exit(f'{raw}: training must show two classes, all of the test images and all of '
                 f'--classes; no training image shows {", ".join(unseen[:3]) or "more"}; mend '
                 '--classes, --values, --split or the order of --masks, or allow it by --partial')

# --- the data sets of Table 2 and the tasks of Table 3 ---
# count: images in the paper. access: open, account or form; ?: its layout is not confirmed.
FIELDS = 'name modality content count access link'
Source = namedtuple('Source', f'{FIELDS} images skip', defaults=('', '', '', '', '.', ''))
Task = namedtuple('Task', f'{FIELDS} options')
SOURCES = [Source(*line.split(' | ')) for line in r'''
AutoPET-CT | CT | whole body | 558473 | form | autopet.grand-challenge.org/Dataset | /CT\.nii
ImageCAS | CT | heart | 257496 | account | kaggle.com/datasets/xiaoweixumedicalai/imagecas | img\.nii
TopBrain-CT | CT | brain | 5647 | open | zenodo.org/records/16623496 | imagesTr.*_ct/.*_0000\.nii
AutoPET-PET | PET | whole body | 354826 | form | autopet.grand-challenge.org/Dataset | /PET\.nii
AutoPET-SUV | PET | whole body | 351900 | form | autopet.grand-challenge.org/Dataset | /SUV\.nii
TotalSegmentator-MR | MR | whole body | 16059 | open | zenodo.org/records/14710732 | /mri\.nii
ACDC | MR | heart | 1902 | open | creatis.insa-lyon.fr/Challenge/acdc | training/.*_frame..\.nii
MRNet | MR | knee | 116624 | account | aimi.stanford.edu | \.npy
Duke-Breast-Cancer-MRI | MR | breast | 515747 | open | cancerimagingarchive.net/collection/duke-breast-cancer-mri
Prostate-MRI-US-Biopsy | MR | prostate | 97180 | open | cancerimagingarchive.net/collection/prostate-mri-us-biopsy
TopBrain-MR | MR | brain | 4604 | open | zenodo.org/records/16623496 | imagesTr.*_mr/.*_0000\.nii
BraTS-GLI | MR | brain | 802341 | account | synapse.org syn53708249 | -(t1n|t1c|t2w|t2f)\.nii
LLD-MMRI | MR | abdomen | 198918 | form | github.com/LMMMEng/LLD-MMRI-Dataset | images/.*\.nii | classification
ChestX-ray8 | X-ray | chest | 112120 | open | nihcc.app.box.com | images.*/.*\.png
CheXpert | X-ray | chest | 223648 | account | stanfordmlgroup.github.io/competitions/chexpert | \.jpg
Mammo-Bench | X-ray | breast | 71844 | account? | india-data.org | Original_Dataset/
MURA | X-ray | bone | 40005 | form | stanfordmlgroup.github.io/competitions/mura | \.png
vzrad2 | X-ray | tooth | 8188 | account | kaggle.com/henriquerezermosqur | \.jpg | _mask/
ADSD | X-ray | coronary artery | 8325 | open | data.mendeley.com/datasets/ydrm75xywg | \.bmp
ARCADE | X-ray | coronary artery | 3000 | open | zenodo.org/records/10390295 | images/.*\.png
XCAD | X-ray | coronary artery | 1621 | open? | github.com/AISIGSJTU/SSVS | train/ | trainC/
Thyroid-Cine-clip | Ultrasound | thyroid | 1737 | account | aimi.stanford.edu (HDF5 is not read: save image[::10] as .npy) | \.npy
EchoNet-Dynamic | Ultrasound | heart | 63867 | form | echonet.github.io/dynamic | Videos/.*\.avi
HC18 | Ultrasound | fetal head | 1334 | open | zenodo.org/records/1327317 | HC\.png
BUSI | Ultrasound | breast | 780 | open | scholar.cu.edu.eg | \.png | _mask
UBPD | Ultrasound | brachial plexus | 955 | form? | ubpd.worldwidetracing.com:9443 | . | mask
MESSIDOR | Fundus | eye | 1200 | form? | adcis.net | \.tif
Refuge2 | Fundus | eye | 1200 | account | kaggle.com/datasets/victorlemosml/refuge2 | images/.*\.jpg
APTOS2019 | Fundus | eye | 5590 | account? | ahmadelsallab.github.io/APTOS | (train|test)_images/.*\.png
Eyepacs | Fundus | eye | 88702 | open | huggingface.co/datasets/bumbledeep/eyepacs (Parquet is not read: take the JPEG of kaggle.com/c/diabetic-retinopathy-detection) | \.jpe?g
ROSE | OCT | eye | 229 | form | imed.nimte.ac.cn | (img|original)/
OCTA500-OCTA | OCT | eye | 600 | account | ieee-dataport.org/open-access/octa-500 | OCTA_3.*/Projection Maps/OCTA\(
OCTA500-OCT | OCT | eye | 600 | account | ieee-dataport.org/open-access/octa-500 | OCTA_3.*/Projection Maps/OCT\(
ZhangLabData-OCT | OCT | eye | 109309 | open | data.mendeley.com/datasets/rscbjbr9sj | OCT/.*\.jpeg
BBBC041v1 | Pathology | blood smears | 1328 | open | bbbc.broadinstitute.org/BBBC041 | images/
Lacuna-Malaria-Challenge | Pathology | blood smears | 3925 | account | zindi.africa | images/.*\.jpg
Lacuna-Malaria-Datasets | Pathology | blood smears | 5059 | open? | doi.org/10.7910/DVN/VEADSE | \.(jpe?g|png)
SegPath | Pathology | 8 kinds of cells | 158687 | open | dakomura.github.io/SegPath | _HE\.png
HyperKvasir | Endoscope | stomach, intestines | 110079 | open | datasets.simula.no/hyper-kvasir | labeled-images/.*\.jpg
Cataract-101 | Endoscope | eye | 42157 | open | ftp.itec.aau.at/datasets/ovid/cat-101 | videos/.*\.mp4
PitVis2023 | Endoscope | pituitary | 96272 | open | rdr.ucl.ac.uk 26531686 | video_.*\.mp4
Endoscapes-CVS | Endoscope | gall bladder | 55783 | open | github.com/CAMMA-public | (train|val|test)/.*jpg | (12_5|25)/
PSI-AVA | Endoscope | prostate | 72160 | open | github.com/BCV-Uniandes/TAPIR | keyframes/.*\.jpg
ISIC-2024 | Photo | skin | 401059 | open | challenge2024.isic-archive.com | \.jpg'''.strip().splitlines()]
TASKS = {row.name: row for row in (Task(*line.split(' | ')) for line in r'''
whs-ct | CT | heart structures | 5176 0 4096 | form | zmiclab.github.io/zxh/0/mmwhs | --images 'ct_.*/(.*)_image' --masks 'ct_.*/(.*)_label' --values 0 205 420+421 500 550 600 820 850 --classes background myocardium left-atrium left-ventricle right-atrium right-ventricle aorta pulmonary-artery
kipa22 | CT | kidney cancer structures | 13846 5864 5959 | account | kipa22.grand-challenge.org | --images '(.*)image/(.*)' --masks '(.*)label/(.*)' --classes background renal-vein kidney renal-artery tumour
sisvse | Endoscope | surgical scene | 2718 336 1456 | form | sisvse.github.io | --split 2718 336 real_val_1/ --images 'images/real/(.*)\.jpg' --masks 'masks/real_.*_1/(.*)\.png' --patient '[^/_]+(?=_[^/]*$)' --classes 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
cholecseg8k | Endoscope | cholecystectomy | 4320 1120 2640 | account | kaggle.com/datasets/newslab/cholecseg8k | --images '(.*)_endo\.png' --masks '(.*)_endo_watershed_mask' --values 0+50+255 11 21 13 12 31 23 24 25 32 22 33 5 --patient 'video\d+' --classes background abdominal-wall liver gastrointestinal-tract fat grasper connective-tissue blood cystic-duct hook gallbladder hepatic-vein liver-ligament
idrid | Fundus | lesions, optic disc | 54 0 27 | account | idrid.grand-challenge.org | --images 'Original Images/(.*)/(.*)\.jpg' --split 'Training Set/' '' 'Testing Set/' --masks 'truths/(.*)/.*/(.*)_OD' 'truths/(.*)/.*/(.*)_MA' 'truths/(.*)/.*/(.*)_HE' 'truths/(.*)/.*/(.*)_EX' 'truths/(.*)/.*/(.*)_SE' --classes background optic-disc microaneurysms haemorrhages hard-exudates soft-exudates
fives | Fundus | vessels | 200 100 500 | open | figshare.com/articles/19688169 | --images '(.*)Original/(.*)' --masks '(.*)Groun?d truth/(.*)' --values 0 * --split 200 100 500
feta21 | MR | fetal brain | 5120 5120 10240 | account | feta.grand-challenge.org/feta-2021 | --images '(.*)_T2w' --masks '(.*)_dseg' --patient 'sub-\d+' --split 20 20 40 --classes background external-fluid grey-matter white-matter ventricles cerebellum deep-grey-matter brainstem
candi | MR | brain tissues | 5120 2560 5504 | account | nitrc.org/projects/candi_share | --images '(.*)_procimg' --masks '(.*)_seg' --split 40 20 43 --sided --values * 2 3 4 7 8 10 11 12 13 14 15 16 17 18 24 28 41 42 43 46 47 49 50 51 52 53 54 60
octdl | OCT | 7 diseases | 1030 411 623 | open | data.mendeley.com/datasets/sncdhf53xc | --images '\.jpg' --labels OCTDL_labels.csv file_name disease patient_id
icf | OCT | cystoid fluid | 730 292 438 | account | kaggle.com/datasets/zeeshanahmed13/intraretinal-cystoid-fluid | --images '(.*)/images/' --masks '(.*)/masks/' --skip 815DME_F/masks/MASK-DME511 --values 0 *
tnbc | Pathology | nuclei | 20 10 20 | open | zenodo.org/records/1175282 | --images 'Slide_(.*)' --masks 'GT_(.*)' --values 0 * --patient 'Slide_\d+'
lsc | Pathology | lymphomas | 188 73 113 | open | andrewjanowczyk.com use case 7 | --images '(CLL|FL|MCL)/.*\.tif' --patient '.*(?=_)'
bcss | Pathology | tissues | 75 30 46 | open | github.com/PathologyDataScience/BCSS | --images '(?:images|rgbs_colorNormalized)/(.*)' --masks 'masks/(.*)' --patient 'TCGA-[^-]+-[^-]+' --classes background tumour stroma inflammatory necrosis other --values '' 1+19+20 2 3+10+11 4 * 0
monusac | Pathology | nuclei | 167 42 101 | open | huggingface.co/datasets/RationAI/MoNuSAC (save its rows as <split>/images/<row>.png and <split>/masks/<row>.png, each instance by the number of its category) | --split 167 42 test/ --classes background epithelial lymphocyte macrophage neutrophil
scr | X-ray | chest structures | 25 47 175 | form | jsrt.or.jp and isi.uu.nl/Research/Databases/SCR (first: python -m tests.lab.convert scr RAW/scr) | --split 25 47 175 --images 'All247images/(.*)\.png' --classes background left-lung right-lung heart left-clavicle right-clavicle --masks 'left lung/(.*)\.' 'right lung/(.*)\.' 'heart/(.*)\.' 'left clavicle/(.*)\.' 'right clavicle/(.*)\.'
pdcxr | X-ray | pneumonia | 3659 1573 624 | open | data.mendeley.com/datasets/rscbjbr9sj | --images 'chest_xray/.*\.jpeg' --patient 'person\d+|[^/]*IM-.*' --split 3659 1573 chest_xray/test/
dca1 | X-ray | coronary arteries | 25 25 84 | account? | kaggle.com/datasets/bard2024 dca1 | --images '(.*)\.pgm' --masks '(.*)_gt\.pgm' --values 0 * --split 25 25 84
dias | X-ray | brain arteries | 30 10 20 | open? | zenodo.org/records/11637181 (first: python -m tests.lab.convert dias RAW/dias) | --values 0 * --images 'darkest/(.*/)(.*)\.png' --masks '(.*)labels/label_s(.*)\.png' --split training/ validation/ test/
dsca | X-ray | brain arteries | 112 44 68 | open? | zenodo.org/records/11255024 (first: python -m tests.lab.convert dsca RAW/dsca) | --images 'darkest/(.*)\.png' --masks 'labels/(.*)\.' --values 0 *
sts-tooth-2d | X-ray | teeth | 100 100 700 | open? | toothfairychallenges.github.io/miccai2023 | --images '(.*)/Labeled/Image/(.*)' --masks '(.*)/Labeled/Mask/(.*)' --values 0 * --split 100 100 700
uns | Ultrasound | nerve | 2758 1078 1799 | account | kaggle.com/c/ultrasound-nerve-segmentation | --images '(.*)\.tif' --masks '(.*)_mask\.tif' --values 0 * --patient '\d+(?=_\d+\.tif)'
tn5000 | Ultrasound | thyroid nodule | 3500 500 1000 | open | figshare.com/articles/28455641 (first: python -m tests.lab.convert tn5000 RAW/tn5000) | --images 'JPEGImages/(.*)\.jpg' --labels classes.csv --classes malignant benign --split Main/train.txt Main/val.txt Main/test.txt
fhu | Ultrasound | fetal head | 499 200 300 | account | kaggle.com/datasets/ankit8467 | --images '(.*HC)\.png' --masks '(.*HC)_Annotation' --values 0 * --outline --patient '\d+(?=_[^/]*HC)'
autopet-org | PET | organs | 18076 6386 10465 | form | github.com/YichiZhang98/SegAnyPET | --images 'PETCT_([^/]*)/([^/]*)/SUV\.nii' --masks 'PETCT_([^_]*)_(.*)_\.nii' --values 0 1 2 3 4 5 6 7 8 9 10 11+12 --patient 'PETCT_[^/_]+' --modality SUV --classes background liver left-kidney right-kidney heart spleen aorta left-lower-lobe right-lower-lobe left-upper-lobe right-upper-lobe right-middle-lobe
slsc-s | Photo | skin lesion | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-s RAW/slsc-s) | --values 0 * --split train/ valid/ test/
slsc-c | Photo | 7 skin diseases | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-c RAW/slsc-c) | --labels classes.csv --classes BKL NV DF MEL VASC BCC AKIEC --split train/ valid/ test/'''.strip().splitlines())}

# --- the command ---
def parse(words):
    """The options of a command line, each with its help. What is not given is empty."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, argument_default='', allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--raw', help='folder of the downloads, or of one task, or a file of MedMNIST')
    add('--out', help='folder to write (default: data/medverse, or data/<task>)')
    add('--list', action='store_true', help='print the tables of data sets (?: layout unsure)')
    add('--source', help='prepare this one alone; --images and --skip replace its rules')
    add('--size', type=int, default=256, help='side of the stored images, px (default: 256)')
    add('--min_side', type=int, default=32, help='drop images with a smaller side, px (32)')
    add('--workers', type=int, default=os.cpu_count(), help='processes (default: one a core)')
    add('--seed', type=int, default=0, help="of a task's split (default: 0)")
    task = parser.add_argument_group('a labelled task, also over the rules of Table 3').add_argument
    task('--task', help='its name')
    task('--modality', type=modality_of, choices=(*MODALITIES, 'SUV'), help='window of volumes')
    task('--images', help='rule of the images (default, beside masks: (.*)images/(.*))')
    task('--masks', nargs='+', help='rule ((.*)masks/(.*)), or one for each class after the first')
    task('--objects', action='store_true', help='several masks of an image are objects: unite them')
    task('--skip', help='rule of files, images or masks or both, to leave out')
    task('--labels', nargs='+', help='CSV, and its columns of file, class, patient (first two)')
    task('--level', type=int, default=0, choices=(0, 1, 2), help='class: 1 the folder, 2 one above')
    task('--classes', nargs='+', help='names in order (default: background foreground or as found)')
    task('--values', nargs='+', help='of classes, as 0 420+421 #ff0000 *; unnamed 255: not scored')
    task('--outline', action='store_true', help='masks show a closed convex outline: fill it')
    task('--partial', action='store_true', help='go on without what has no partner or no image')
    task('--sided', action='store_true', help='classes tell left from right: mirror no image')
    task('--patient', help='rule: what it finds in a path is the patient (default: the path)')
    task('--split', nargs='+', help='3 shares (50 20 30), rules, .txt; else folders, maybe no val')
    return parser.parse_args(words)

def main():
    """Prepare a task, or every source below RAW."""
    o = parse(sys.argv[1:])
    if o.task in TASKS:  # its options, then those of the command line over them
        defaults = ['--modality', TASKS[o.task].modality, '--split', '50', '20', '30']
        o = parse([*defaults, *shlex.split(TASKS[o.task].options), *sys.argv[1:]])
    raw, out = Path(o.raw), Path(o.out or f'data/{o.task or "medverse"}')
    if o.list:
        for row in (*SOURCES, *TASKS.values()):
            print(f'{row.name:<26}', 'found' if home_of(row, raw) else '-', *row[1:6], sep=' | ')
        return
    if min(o.size, o.workers) < 1 or min(o.min_side, o.seed) < 0:
        sys.exit('--size and --workers take 1 or more; --min_side and --seed take 0 or more')
    if len(o.split) not in (0, 3) or any(re.fullmatch(r'\d*\.\d+', rule) for rule in o.split):
        sys.exit('--split takes three whole shares, rules or lists: for train, val and test')
    medmnist = o.task and has_ending(raw, '.npz') and raw.is_file()
    if not o.raw or not raw.is_dir() and not medmnist:
        sys.exit(f'--raw "{o.raw}": there is no such folder of <Modality>/<source>/** or of a task')
    prepare = prepare_medmnist if medmnist else prepare_task if o.task else prepare_sources
    try:
        with ProcessPoolExecutor(o.workers, initializer=follow_parent) as pool:
            prepare(raw, out, o, pool)
    except OSError as error:
        hint = f'; apt, brew or conda install {error.filename}' if error.filename in TOOLS else ''
        sys.exit(f'{out}: {error}{hint}; start again, finished sources stay')
    except re.error as error:
        sys.exit(f'{error.pattern}: is no regular expression ({error}); any text is .* in one')
    except KeyboardInterrupt:
        print('stopped: start again to go on with the unfinished sources', file=sys.stderr)
        sys.exit(130)

if __name__ == '__main__':
    main()
