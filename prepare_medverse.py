r"""Prepare images for pretraining (paper, C.1.1) and labelled tasks for fine-tuning.

    python prepare_medverse.py --list --raw RAW     the data sets of Tables 2 and 3, found or not
    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --task fives --raw RAW/fives
    python prepare_medverse.py --task mine --raw MINE --images '(.*)\.png' --masks '(.*)_truth'

RAW/<name>/ holds a data set of Table 2 as it was unpacked, RAW/<Modality>/<source>/ your own
pictures, NIfTI, DICOM, .npy and videos. Each becomes a folder OUT/<source>/ of 00000.npy ... (uint8
(n, S, S, 1 or 3)), meta.json and dropped.csv, which lists what is left out, and why.
A task has masks, class folders or a table, and no videos. --images and --masks are regular
expressions, searched in paths; case does not count. An image and a mask are a pair if the groups
( ) find the same text: above, a/12 in a/12.png and a/12_truth.png. What --masks finds is no image.
"""
import argparse
import contextlib
import csv
import errno
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
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
import nibabel as nib
import numpy as np
from PIL import Image, ImageOps, ImageSequence, TiffImagePlugin as Tiff
from tqdm import tqdm

MODALITIES = tuple('CT PET MR X-ray Ultrasound Fundus OCT Pathology Endoscope Photo'.split())
NOT_SCORED = 255  # in masks: left out of the loss and the scores
DARK = 5  # a pixel up to this is background: 0.02 of 255, as in the paper
# How images of more than 8 bits become 8. Two numbers become 0 and 255: `limits` or, if None, two
# percentiles. foreground: the least share of pixels above DARK; a slice with less is dropped.
Window = namedtuple('Window', 'limits percentiles foreground')
WINDOWS = dict.fromkeys((*MODALITIES, ''), Window(None, (0, 100), 0))  # '': no --modality is given
WINDOWS['CT'] = Window((-200, 400), None, 0.05)  # Hounsfield units (HU)
WINDOWS['MR'] = Window(None, (1, 99), 0.05)
WINDOWS['PET'] = Window(None, (1, 99), 0.01)  # the paper's z-score of PET cancels in this scaling
WINDOWS['SUV'] = Window((0, 20), None, 0.01)  # standardized uptake values: PET with suv in its path
# Rows of Tables 2 and 3. access: with ? if we have not seen its folders. images: . finds all.
FIELDS = 'name modality content count access link'
Source = namedtuple('Source', f'{FIELDS} images skip', defaults=('', '', '', '', '.', ''))
Task = namedtuple('Task', f'{FIELDS} options')
# pixels: uint8 (S, S, c), or None if dropped. single: no slice; only these are compared.
Item = namedtuple('Item', 'pixels single reason detail', defaults=(False, '', ''))
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
VIDEOS, VOLUMES = ('.avi', '.mp4'), ('.nii.gz', '.nii', '.img')  # volumes: NIfTI and Analyze
IMAGE_ENDINGS = (*PICTURES, *VIDEOS, *VOLUMES, '.npy')
UNREAD_ENDINGS = tuple('.webp .jp2 .jfif .heic .avif .tga .svs .mha .mhd .nrrd .npz'.split())
NOT_READ = ('not read: COCO, LabelMe, run lengths (draw PNG masks), YOLO (use tests.lab.convert), '
            '.npz (python -m tests.lab.convert medmnist FILE.npz TASK SOURCE)')
TOOLS = ('ffmpeg', 'ffprobe', 'dcm2niix')  # external programs, for videos and DICOM
ENDING = re.compile('(' + '|'.join(map(re.escape, IMAGE_ENDINGS)) + ')$', re.IGNORECASE)
ZEROS = re.compile(r'(^|(?<=/))0+(?=\d+$)')  # leading zeros of 007 and a/007, but not of a/x007
HIDDEN = r'(^|/)\.[^/]'  # .git/1.png, a/._1.png; not '.', the path of RAW itself
SHARD = 256 << 20  # bytes of a full shard
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'other')  # why an image or file is dropped

# Below, a name is a path relative to RAW or to a source's folder, as text. A path is a Path.
def search(rule, name):
    """The match of a rule in a name, or None. Case does not count. An empty rule finds nothing."""
    return re.search(rule, name, re.IGNORECASE | re.DOTALL) if rule else None

def by_groups(names, rule):
    """{text of the groups ( ) of a rule: [names]}. If a rule has no groups, each name is a key."""
    groups = {}
    for name in names:
        if match := search(rule, name):
            groups.setdefault(match.groups() or name, []).append(name)
    return groups

def has_ending(path, endings):
    return path.name.lower().endswith(endings)

def is_image(home, name):
    """Whether a name of `list_names` is a DICOM folder, or a file of a known ending, not hidden."""
    known = has_ending(home / name, IMAGE_ENDINGS) and not search(HIDDEN, name)
    return (home / name).is_dir() or (known and (home / name).is_file())

def is_dicom(path):
    """Whether a file belongs to a DICOM series, by its name or by its mark."""
    # To open a named pipe would wait for ever. A DICOMDIR has the mark, but no image.
    if not path.is_file() or has_ending(path, ('dicomdir', *IMAGE_ENDINGS)):
        return False
    with open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM' or has_ending(path, '.dcm')

def list_names(home):
    """Sorted names of all files below a folder. A DICOM series counts as its folder."""
    paths, visited = set(), set()
    for folder, _, files in os.walk(home, onerror=sys.exit, followlinks=True):
        if os.path.realpath(folder) in visited:
            sys.exit(f'{folder}: links lead to this folder twice; its files would count twice')
        visited.add(os.path.realpath(folder))
        for path in [Path(folder, file) for file in files]:
            paths.add(path.parent if is_dicom(path) else path)
    return [str(path.relative_to(home)) for path in sorted(paths)]

def series(folder, new, modality=''):
    """Convert a DICOM folder into the folder `new`. Yield the NIfTI files of this modality, and
    only then raise ValueError if there were images of others, or if dcm2niix failed."""
    command = ['dcm2niix', '-d', '0', '-z', 'n', '-o', new, folder]
    run = subprocess.run(command, capture_output=True, text=True, errors='replace')
    if shutil.disk_usage(new).free < 1 << 20:  # on a full disk dcm2niix says that all went well
        raise OSError(errno.ENOSPC, 'No space left on device', new)
    # dcm2niix writes a .json beside each image, but none beside a second, tilt-corrected copy.
    kinds = {}  # {NIfTI file: CT, MR or PT}
    for path in sorted(Path(new).glob('*.json')):  # their JSON is not always valid
        if match := re.search('"Modality": "(MR|CT|PT)"', path.read_text(errors='replace')):
            kinds[path.with_suffix('.nii')] = match[1]
    wanted = 'PT' if modality in ('PET', 'SUV') else modality
    yield from [path for path, kind in kinds.items() if modality == '' or kind == wanted]
    if modality and (others := sorted({*kinds.values()} - {wanted})):
        raise ValueError(f'it has series of {", ".join(others)}, which are not of {modality}')
    if run.returncode or not kinds:
        raise ValueError('of DICOM only MR, CT and PET are read, save others as PNG; '
                         f'dcm2niix ended with error {run.returncode}: {run.stdout[-80:]!r}')

def read(path, draft=0, of_image=None):
    """All arrays of a file, (n, H, W) or (n, H, W, 3), upright, in its own units. draft: a JPEG may
    be decoded at a lower resolution, down to this (px). of_image: the image of a NIfTI mask."""
    if has_ending(path, PICTURES):
        return read_pages(path, draft)
    if not has_ending(path, '.npy'):
        return read_volume(path, of_image)
    array = np.load(path, mmap_mode='r')
    match array.shape:
        case (_, _) | (_, _, 3):  # one image
            return [array[None]]
        case (_, _, _, 1):
            return [array[..., 0]]
        case (_, _, _, 3):
            return [array]
        case (n, _, width) if n != 3 and width != 4:  # (3, H, W), (n, H, 4) may be in colours
            return [array]
    raise ValueError(f'{array.shape} is unclear; save (H, W, 3), (n, H, W, 1) or (n, H, W, 3)')

def read_volume(path, of_image):
    """`read` of NIfTI and Analyze: a list with an array (n, H, W) for each time point."""
    volume = nib.load(path)
    affine = volume.affine
    if not np.isfinite(affine).all():  # with NaN, `cut` would choose any axis
        raise ValueError('its affine is not finite')
    scaled = (volume.dataobj.slope, volume.dataobj.inter) != (1, 0)
    if of_image is not None:  # a mask is cut as its image, even if their affines differ a bit
        volume = on_grid(volume, of_image)
        affine = of_image.affine
    voxels = np.asarray(volume.dataobj, np.float32 if scaled else None)  # instead of float64
    if voxels.dtype == np.uint8:  # `to_uint8` takes uint8 for a picture, which needs no window
        voxels = np.uint16(voxels)
    return list(cut(voxels, affine))

def on_grid(mask, image):
    """A NIfTI mask, its axes in the order of its image's. Raise ValueError unless it then has the
    image's shape, and its corners within half a voxel."""
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(mask.affine), nib.io_orientation(image.affine))
    shape = (*image.shape, 1, 1)[:4]  # x, y, z, time
    corners = np.array(list(np.ndindex(2, 2, 2))) * shape[:3]
    tolerance = nib.affines.voxel_sizes(image.affine).min() / 2  # mm
    turned = mask.as_reoriented(turn) if mask.ndim > 2 else mask
    for candidate in (mask, turned):  # oblique grids, of which `turn` is a guess, may agree as is
        here, there = [nib.affines.apply_affine(one.affine, corners) for one in (candidate, image)]
        if (*candidate.shape, 1, 1)[:4] == shape and np.abs(here - there).max() <= tolerance:
            return candidate
    raise ValueError(f'their grids differ: {image.shape} and {mask.shape}, or their affines')

def read_pages(path, draft):
    """`read` of a picture. Pages of one shape are slices: one array, with one window."""
    pages = []
    # From a path, Pillow 13 swaps width and height of some TIFFs that EXIF turns: open them here.
    with open(path, 'rb') as file, Image.open(file) as image:
        # An MPO is a JPEG with previews or a second view behind it: its first page counts alone.
        frames = [image] if image.format == 'MPO' else ImageSequence.Iterator(image)
        for frame in frames:
            deep = frame.mode.startswith(('I', 'F'))  # I;16, I, F: more than 8 bits
            check_numbers(frame, deep)
            frame.draft(None, (draft, draft) if draft else None)  # fast at 1/2, 1/4 or 1/8 of JPEG
            page = ImageOps.exif_transpose(frame)
            if not deep:
                # Pillow gives the first page of a grey GIF as grey, but the others in colour.
                grey = page.mode in ('1', 'L', 'LA') and image.format != 'GIF'
                page = page.convert('L' if grey else 'RGB')
            widened = deep and image.format == 'PPM'  # Pillow gives a PGM of 16 bits as 32
            pages.append(np.asarray(page, np.uint16 if widened else None)[None])
    return [np.concatenate(pages)] if len({page.shape for page in pages}) == 1 else pages

def check_numbers(page, deep):
    """Raise ValueError if Pillow would give wrong numbers for a page."""
    tags = getattr(page, 'tag_v2', {})  # of TIFF
    kind = tags.get(Tiff.SAMPLEFORMAT, (1,))[0]  # 1: unsigned, 2: signed
    bits = tags.get(Tiff.BITSPERSAMPLE, (1,))[0]
    misread = (kind, bits) in ((2, 8), (1, 32))  # signed 8, unsigned 32
    inverted = deep and tags.get(Tiff.PHOTOMETRIC_INTERPRETATION) == 0  # 0 is white
    # page.tile tells how the file stores a page: from RGB;16B, say, Pillow keeps 8 of 16 bits.
    cut_off = not deep and ';16' in str(page.tile)
    if misread or inverted or cut_off:
        raise ValueError('its type of numbers is not read; save 8 bits, or grey 16')

def cut(volume, affine):
    """View (time, n, H, W) of an array (x, y, z[, time ...]): upright slices, cut across the axis
    of the coarsest spacing (z, if within 1% of it); anterior or superior is up."""
    volume = np.atleast_3d(volume)
    volume = volume.reshape(*volume.shape[:3], -1)  # 3 axes and time
    orientation = nib.io_orientation(affine)  # (3, 2): the new place of each axis, and its sign
    volume = nib.apply_orientation(volume, orientation)  # to x right, y anterior, z superior
    spacing = np.empty(3)  # mm, along x, y and z
    spacing[np.int64(orientation[:, 0])] = nib.affines.voxel_sizes(affine)
    spacing[np.array(volume.shape[:3]) == 1] = np.inf  # an axis of length 1 is the one cut across
    x, y, z, time = range(4)
    axis = z if spacing[z] >= 0.99 * spacing.max() else spacing.argmax()
    rows, columns = {z: (y, x), y: (z, x), x: (z, y)}[axis]
    slices = volume.transpose(time, axis, rows, columns)
    return slices[:, :, ::-1, ::-1]  # rows run down, and the patient's right (or front) is left

def limits_of(volume, modality):
    """The two numbers of a volume that become 0 and 255, by WINDOWS."""
    unsigned_ct = modality == 'CT' and volume.dtype.kind == 'u'  # Hounsfield units are signed
    if unsigned_ct and 31000 < np.median(volume[volume > 0]) < 36000:  # HU + 32768: DeepLesion
        return np.add(WINDOWS['CT'].limits, 32768)
    window = WINDOWS['' if unsigned_ct else modality]  # '': from the minimum to the maximum
    if window.limits:
        return window.limits
    step = 2 * (volume.size // 2_000_000) + 1  # odd, since an even one sees only some columns
    sample = volume.flat[::step]
    sample = sample[np.isfinite(sample)] + 0  # + 0 makes a number of bool
    return np.percentile(sample, window.percentiles) if sample.size else (0, 0)

def to_uint8(volume, modality):
    """Yield the slices of an array (n, H, W[, 3]) as uint8, all by one window (C.1.1)."""
    if volume.dtype == np.uint8:  # pictures of 8 bits
        yield from volume
        return
    low, high = map(np.float32, limits_of(volume, modality))
    scale = 255 / (high - low) if high > low else 0
    for image in volume:
        if image.dtype.kind == 'f':  # NaN and infinity count as the lowest
            image = np.where(np.isfinite(image), image, low)
        yield np.uint8((image.clip(low, high) - low) * scale + 0.5)

def resize(image, size):
    """The whole image, uint8 (H, W[, 3]), low-passed, as (S, S, c); equal channels become one."""
    resized = Image.fromarray(image).resize((size, size), Image.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(resized).reshape(size, size, -1)
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels

def decode_video(path, size):
    """Yield every 30th frame (C.1.1) as uint8 (1, S, S, 3), while ffmpeg decodes the file."""
    # A file may be a playlist of others: only real videos are opened. -xerror: stop at an error.
    video = ['-v', 'fatal', '-protocol_whitelist', 'file',
             '-format_whitelist', 'avi,mov,mp4,m4a,3gp,3g2,mj2', '-i', f'file:{path}']
    decode = ['ffmpeg', '-xerror', *video, '-fps_mode', 'passthrough', '-pix_fmt', 'rgb24',
              '-vf', f'framestep=30,scale={size}:{size}:flags=bicubic', '-f', 'rawvideo', '-']
    with subprocess.Popen(decode, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        while len(frame := process.stdout.read(size * size * 3)) == size * size * 3:
            yield np.frombuffer(frame, np.uint8).reshape(1, size, size, 3)
    if process.returncode:
        raise ValueError('ffmpeg cannot decode it to its end')
    count = ['ffprobe', *video, '-count_packets', '-select_streams', 'v:0',
             '-show_entries', 'stream=nb_frames,nb_read_packets', '-of', 'default=nw=1:nk=1']
    stated, present = subprocess.run(count, capture_output=True, text=True).stdout.split()
    if stated.isdigit() and int(stated) > int(present):  # frames; not every header states them
        raise ValueError(f'its header states {stated} frames, but it has {present}')

def source_items(path, modality, size, min_side):
    """In a worker: yield an Item, of `size` px, for each image of a file; one more if corrupt."""
    is_video, count = has_ending(path, VIDEOS), 0
    try:
        with tempfile.TemporaryDirectory() as new:
            if is_video:
                arrays = decode_video(path, size)
            else:
                files = series(path, new, modality) if path.is_dir() else [path]
                arrays = (array for file in files for array in read(file, max(2 * size, min_side)))
            for array in arrays:
                foreground = WINDOWS[modality].foreground
                single = len(array) == 1 and has_ending(path, (*PICTURES, '.npy'))
                if single and array.dtype == np.uint8:
                    foreground = 0  # somebody chose to save this slice: keep it even if it is dark
                for image in to_uint8(array, modality):
                    count += 1
                    small = min(image.shape[:2]) < min_side and not is_video  # frames are resized
                    dark = np.count_nonzero(image > DARK) < foreground * image.size
                    if small or dark or np.ptp(image) < 8:
                        sides = f'{image.shape[1]} x {image.shape[0]} px'
                        yield Item(None, reason='small' if small else 'blank', detail=sides)
                    else:
                        yield Item(resize(image, size), single)
        if not count:
            raise ValueError('it holds no image')
    except Exception as error:  # decoders fail on broken files in every way there is
        if isinstance(error, OSError) and (error.errno == errno.ENOSPC or error.filename in TOOLS):
            raise  # a full disk or a missing program, which harm every file
        yield Item(None, reason='corrupt', detail=f'{type(error).__name__}: {error}')

def twin_or_add(pixels, name, seen):
    """Name of an earlier picture in `seen` that `pixels` nearly repeat. If none does, they join it.
    Twins differ in one bit of a difference hash (dHash) at most, and by 3 of 255 on average."""
    grey = Image.fromarray(pixels.squeeze()).convert('L')
    cells = np.int16(grey.resize((9, 8), Image.BOX))  # means of areas, (8, 9)
    bits = int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes())
    for key in [bits, *(bits ^ (1 << bit) for bit in range(64))]:
        for twin, twin_cells in seen.get(key, ()):
            if np.abs(cells - twin_cells).mean() < 3:
                return twin
    seen.setdefault(bits, []).append((name, cells))

def follow_parent():
    """Start of a worker: Ctrl-C is for its parent alone, and it ends when its parent does."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()

def spill(folder, work, *call):
    """In a worker: the path of a new file with all that work(*call) yields: memory may be small."""
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
    """Yield the file that `spill` writes for each call (path, ...), in the order of the calls."""
    waiting, jobs = deque(calls), deque()
    for path, *_ in tqdm(calls, title, unit='file'):
        try:
            while waiting and len(jobs) < 2 * workers:  # more would fill the disk with their files
                jobs.append(pool.submit(spill, folder, work, *waiting.popleft()))
            yield jobs.popleft().result()
        except BrokenProcessPool:
            sys.exit(f'a worker was killed at {path} or soon after: fewer --workers?')

@contextlib.contextmanager
def appearing(folder, pool):
    """Yield FOLDER.part, which becomes FOLDER. An error stops the pool and deletes FOLDER.part."""
    part = Path(f'{folder}.part')
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f'{part}: another program writes it (wait, or change --out) or died (delete it)')
    try:
        yield part
        os.replace(part, folder)
    except BaseException:
        pool.shutdown(cancel_futures=True)  # its workers may still write to `part`
        shutil.rmtree(part, ignore_errors=True)
        raise

def home_of(row, raw):
    """The folder of a row, or None: for AutoPET-CT, RAW/AutoPET-CT or a shared RAW/AutoPET."""
    words = row.name.split('-')
    homes = [raw / '-'.join(words[:count]) for count in range(len(words), 0, -1)]
    return next((home for home in homes if home.is_dir()), None)

def modality_of(name):
    """The modality that a folder or option names, as Xray and x_ray name X-ray. Else the name."""
    by_letters = {re.sub('[^a-z]', '', known.lower()): known for known in (*MODALITIES, 'SUV')}
    return by_letters.get(re.sub('[^a-z]', '', name.lower()), name)

def find_sources(raw, out, wanted):
    """{name below OUT: (row, its folder)} of Table 2 and RAW/<Modality>/*. wanted: one, or ''."""
    found = [(row, home_of(row, raw)) for row in SOURCES if home_of(row, raw)]
    below_modality = [path for path in sorted(raw.glob('*/*'))
                      if modality_of(path.parent.name) in MODALITIES]
    found += [(Source(path.name, modality_of(path.parent.name)), path)
              for path in below_modality if path.is_dir()]
    used = {home for _, home in found}
    used |= {home.parent for home in used}  # RAW/CT is used if RAW/CT/mine is
    if unused := {*raw.glob('*'), *below_modality} - used:
        print(f'warning: {len(unused)} paths are no data sets, as {min(unused)}', file=sys.stderr)
    times, sources = Counter(row.name for row, _ in found), {}
    for row, home in found:
        shared = times[row.name] > 1  # as mine is by RAW/CT/mine and RAW/MR/mine
        name = f'{row.name}-{row.modality}' if shared else row.name
        if shared and (out / row.name).exists():  # an earlier run saw only one of them
            sys.exit(f'{out / row.name}: rename it to {row.name}-<its modality>, as in {name}')
        if name in sources:
            sys.exit(f'{sources[name][1]} and {home} have the same name: rename one of them')
        if wanted in ('', row.name):
            sources[name] = row, home
    if not sources:
        sys.exit(f'{raw}: has no {wanted or "RAW/<name>"}, no RAW/CT/<source>; is it too deep?')
    return sources

def prepare_sources(raw, out, o, pool):
    """Prepare every source below RAW, and print the account of their files."""
    # total = images + files that give none (broken, or of another kind) = kept + dropped.
    table = [('modality', 'source', 'files', 'total', 'kept', *REASONS)]
    sources = find_sources(raw, out, o.source)
    for name, (row, home) in sources.items():
        if meta := prepare_source(row, home, out / name, o, pool):
            dropped = [meta['dropped'].get(reason, 0) for reason in REASONS]
            total = meta['count'] + sum(dropped)
            table.append((row.modality, name, meta['files'], total, meta['count'], *dropped))
    for modality, name, *counts in table:
        print(f'{modality:<11}{name:<30}' + ''.join(f'{count:>10}' for count in counts))
    if empty := [name for name in sources if not (out / name).exists()]:
        sys.exit(f'left out, as told above: {", ".join(empty)}; {NOT_READ}')
    print(f'{len(sources)} sources; what each left out, and why, is in its dropped.csv; {NOT_READ}')

def prepare_source(row, home, folder, o, pool):
    """Write a source, the files below `home`, to `folder`. Returns its meta.json, or None."""
    names = list_names(home)
    if folder.exists():
        meta = json.loads((folder / 'meta.json').read_text())
        if (meta['modality'], meta['size']) != (row.modality, o.size):
            sys.exit(f'{folder}: was prepared as {meta["modality"]} by --size {meta["size"]}; '
                     f'delete it, rename {home}, or choose another --out')
        print(f'{folder}: finished before, of {meta["files"]} files (now {len(names)})')
        return meta
    wanted = [name for name in names if search(o.images or row.images, name)
              and not search(o.skip or row.skip, name) and is_image(home, name)]
    with appearing(folder, pool) as part:
        kept, dropped = write_source(row, home, names, wanted, part, o, pool)
        meta = {'source': folder.name, 'modality': row.modality, 'count': kept, 'size': o.size,
                **WINDOWS[row.modality]._asdict(), 'files': len(names), 'dropped': dropped}
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    if kept:
        return meta
    shutil.rmtree(folder)
    print(f'{home}: no image is kept of {len(wanted)} files; dropped: {dropped}; it is left out')

def write_source(row, home, names, wanted, part, o, pool):
    """Write shards and dropped.csv. Returns how many images were kept, and dropped by reason."""
    calls = []
    for name in wanted:
        suv = row.modality == 'PET' and search('suv', f'{home.name}/{name}')
        calls.append((home / name, 'SUV' if suv else row.modality, o.size, o.min_side))
    others = sorted({*names} - {*wanted})
    dropped = dict.fromkeys(REASONS, 0) | {'other': len(others)}
    kept = 0
    paths = (part / f'{number:05d}.npy' for number in range(100_000))
    filling = {}  # {shape: (path of a shard that is not full, its images)}
    seen = {}  # of twin_or_add: {bits: [(name, cells)]}
    with open(part / 'dropped.csv', 'w', encoding='utf-8', errors='surrogateescape') as file:
        log = csv.writer(file, lineterminator='\n')
        log.writerow(('path', 'slice', 'reason', 'detail'))
        log.writerows((name, 0, 'other', 'no image by name, or no regular file') for name in others)
        spilled = in_order(pool, o.workers, part, source_items, calls, home.name)
        for name, path_of_items in zip(wanted, spilled):
            for index, item in enumerate(spilled_items(path_of_items)):
                # Neighbouring slices of a volume are alike by nature, and Table 2 keeps them.
                if item.single and (twin := twin_or_add(item.pixels, name, seen)):
                    item = Item(None, reason='duplicate', detail=f'of {twin}')
                if item.reason:
                    dropped[item.reason] += 1
                    log.writerow((name, index, item.reason, item.detail))
                    continue
                kept += 1
                if item.pixels.shape not in filling:
                    filling[item.pixels.shape] = (next(paths), [])
                path, images = filling[item.pixels.shape]
                images.append(item.pixels)
                if len(images) * item.pixels.size >= SHARD:
                    np.save(path, images)
                    del filling[item.pixels.shape]
            path_of_items.unlink()
    for path, images in filling.values():
        np.save(path, images)
    return kept, dropped

# --- labelled tasks -------------------------------------------------------------------------------
# What is known of an image. label: the name of its class. masks: pairs (k, name), where the k-th
# rule of --masks finds the file `name`. With several rules, what the k-th finds is class k. With
# one rule k is 1, and the numbers in the mask are the classes.
Sample = namedtuple('Sample', 'masks label patient', defaults=((), '', ''))
# The rules without --images and --masks: their groups ( ) find 'x/' and '1' in x/images/1.png and
# x/masks/1.png, '' and 'Tr/1' in nnU-Net's imagesTr/1_0000.nii.gz and labelsTr/1.nii.gz: (?=...)
# looks ahead for Tr/, and leaves it to the next group.
STEM = r'(.*?)(?:_0000)?(?:\.nii)?\.\w+$'  # without the number of the channel and the ending
IMAGE_RULE = r'(.*)images(?:/|(?=T[rs]/))' + STEM
MASK_RULE = r'(.*)(?:masks/|labels(?=T[rs]/))' + STEM
# Folders of a split in a path: 01_train/, Training Set/, test_images2/ or imagesTr/ of nnU-Net.
SPLIT_FOLDER = r'(^|/)(\d+[ _-]?)?({})([ _-]?(set|data|dataset|images?|imgs))?[ _-]?\d*/'
SPLITS = {'train': SPLIT_FOLDER.format('train(ing)?|(images|labels)Tr'),
          'val': SPLIT_FOLDER.format('val(id(ation)?)?'),
          'test': SPLIT_FOLDER.format('test(ing)?|(images|labels)Ts')}
SHARES = ('50', '20', '30')  # % of train, val and test, if neither --split nor folders decide

def check_used(what, count, unused, partial):
    """Print how many of `count` are used. Stop if some are left over, unless `partial`."""
    n, few = len(unused), ', '.join(unused[:3])
    print(f'{what}: {count} = {count - n} used + {n} left out  {few}')
    if unused and not partial:
        sys.exit(f'{what}: {n} of {count} are left over ({few}); --skip or --partial; {NOT_READ}')

def find_samples(raw, o):
    """{name of an image: Sample}, by --labels, masks if found or asked for, or else folders."""
    names = [name for name in list_names(raw) if not (search(HIDDEN, name) or search(o.skip, name))]
    mask_rules = [] if o.labels else (o.masks or [MASK_RULE])
    masks = {rule: by_groups(names, rule) for rule in mask_rules}
    mask_names = {name for name in names if any(search(rule, name) for rule in mask_rules)}
    wants_masks = bool(mask_names or o.masks or o.objects or o.values) and not o.labels
    rule = o.images or (IMAGE_RULE if wants_masks else '.')  # . finds every name
    wanted = [name for name in names if search(rule, name) and name not in mask_names]
    images = [name for name in wanted if is_image(raw, name)]
    unread = [name for name in wanted if has_ending(raw / name, UNREAD_ENDINGS)]
    check_used('formats of images', len(images) + len(unread), unread, o.partial)
    if o.labels:
        samples = read_table(raw, images, o, *o.labels)
    elif wants_masks:
        samples = find_pairs(raw, rule, by_groups(images, rule), masks, o)
    else:
        samples = by_folders(images, o.level)
    if not samples:
        sys.exit(f'{raw}: no image has a class or mask, such as {images[:1]}; {NOT_READ}')
    unused = [name for name in images if name not in samples]
    check_used(f'images {rule}', len(images), unused, partial=True)  # as in imagesTs/
    return samples

def find_pairs(raw, image_rule, images, masks, o):
    """{image: Sample}, by equal groups. images: {groups: names}; masks: {rule: {groups: names}}."""
    samples = {}
    for groups, names in images.items():
        by_rule = [found.get(groups, []) for found in masks.values()]
        its_masks = [(k, name) for k, same in enumerate(by_rule, 1) for name in same]
        are_many = max(map(len, by_rule)) > 1  # masks of one rule
        if len(names) > 1 or (are_many and not o.objects):
            some = ', '.join([*names[:2], *(name for _, name in its_masks)][:3])
            sys.exit(f'{some} cannot be a pair: all have {groups}; mend --masks, or add --objects')
        if its_masks:
            samples[names[0]] = Sample(its_masks)
    found_by = {image_rule: images, **masks}
    if not samples or not all(found_by.values()):  # no pair, or a rule that finds no file
        firsts = [f'{rule} finds {next(iter(them), "no file")}' for rule, them in found_by.items()]
        sys.exit(f'{raw}: images have no masks; groups ( ) must be the same: {"; ".join(firsts)}')
    for rule, found in masks.items():
        alone = [name for groups, names in found.items() if groups not in images for name in names]
        check_used(f'files {rule}', sum(map(len, found.values())), alone, o.partial)
    return samples

def by_folders(names, level):
    """{image: Sample}. Level 1: the class is the folder; level 2: the folder above it. Level 0: as
    1, but stop if the folders above differ. Folders of splits do not count."""
    own, above = {}, {}  # {image: its folder, or the folder above that}
    for name in names:
        folders = [folder for folder in Path(name).parent.parts
                   if not any(search(rule, f'{folder}/') for rule in SPLITS.values())]
        own[name] = folders[-1] if folders else Path(name).parent.name  # else a split's
        above[name] = folders[-2] if len(folders) > 1 else ''
    if level == 0 and len({*above.values()}) > 1:
        one, two = [dict(Counter(found.values()).most_common(9)) for found in (own, above)]
        sys.exit(f'which folders are the classes? --level 1: {one}; --level 2: {two}')
    class_of = above if level == 2 else own
    return {name: Sample(label=class_of[name]) for name in names if class_of[name]}

def read_lines(raw, file):
    """Lines of the only text below RAW whose path ends with `file`, in UTF-8."""
    paths = [raw / name for name in list_names(raw) if f'/{name}'.endswith(f'/{file}')]
    if not paths:  # as for ./table.csv, which is in RAW itself
        paths = [raw / file]
    if len(paths) > 1 or not paths[0].exists():
        sys.exit(f'{file}: is not one file of {[*map(str, paths[:2])]}; give its path, as ./{file}')
    try:
        return paths[0].read_text('utf-8-sig').split('\n')  # splitlines() knows other ends
    except UnicodeDecodeError:
        sys.exit(f'{paths[0]}: is not in UTF-8; save it so (Excel: as CSV UTF-8)')

def look_up(what, entries, names, o):
    """{entry of a table or list: its image}. b/7 names a/b/7.png or a/b/007.png."""
    by_tail = defaultdict(list)  # {end of a name, without ending and zeros: images}
    for name in names:
        tail = ENDING.sub('', name)
        while tail:
            by_tail[ZEROS.sub('', tail)].append(name)
            tail = tail.partition('/')[2]
    meant = {}
    for entry in entries:
        tail = ENDING.sub('', entry.replace('\\', '/'))
        found = by_tail[ZEROS.sub('', tail)]
        if len(found) > 1:
            sys.exit(f'{what}: {entry} may be any of {found[:3]}; give more of its path')
        if found:
            meant[entry] = found[0]
    check_used(what, len(entries), [entry for entry in entries if entry not in meant], o.partial)
    return meant

def read_table(raw, names, o, file, *columns):
    """{image: Sample} of a CSV. columns: those of the image's file, class and, if any, patient."""
    lines = read_lines(raw, file)
    table = csv.DictReader(lines, delimiter=max(',;\t', key=lines[0].count))
    head = table.fieldnames or []
    columns = columns or head[:2]
    if len(columns) < 2 or not {*columns} <= {*head}:
        sys.exit(f'{file}: has columns {head}, no {", ".join({*columns} - {*head})}; {NOT_READ}')
    print(f'{file}: file, class, patient are its columns {", ".join(columns)}; others are not read')
    rows = []  # [(number of the line, image as it is named there, Sample)]
    for row in table:
        entry, label, *patient = [(row[column] or '').strip() for column in columns]
        if entry and label:
            rows.append((table.line_num, entry, Sample((), label, *patient)))
    meant = look_up(f'rows of {file}', [entry for _, entry, _ in rows], names, o)
    samples = {}
    for line, entry, sample in rows:
        if entry in meant:
            before = samples.get(meant[entry], sample)
            if before != sample:
                sys.exit(f'{file}, line {line}: {entry} has another answer above')
            samples[meant[entry]] = sample
    return samples

def find_patients(samples, o):
    """{image: patient}: what --patient finds, else what the table says, else the image's path."""
    patients, strangers = {}, []
    for name, sample in samples.items():
        match = search(o.patient, name)
        found = match and (match[1] if match.re.groups else match[0])
        patients[name] = found or sample.patient or name
        if not found:
            strangers.append(name)
    if o.patient:
        check_used(f'--patient {o.patient}', len(samples), strangers, o.partial)
    return patients

def split_samples(samples, raw, o):
    """{split: names}, by --split or by the folders that a data set has for its splits. The first
    split that takes an image keeps it, and those with a share divide what the others leave."""
    there = [split for split in SPLITS if any(search(SPLITS[split], name) for name in samples)]
    by_folder = 'train' in there and len(there) > 1 and not o.split
    rules = SPLITS if by_folder else dict(zip(SPLITS, o.split or SHARES))
    shares = dict.fromkeys(SPLITS, 0)  # of rules that are digits; others are .txt or searched
    split_of = {}  # {name: split}
    for split, rule in rules.items():
        if rule.isdigit():
            shares[split] = int(rule)
        else:
            for name in chosen_by(rule, samples, raw, o):
                split_of.setdefault(name, split)
    others = [name for name in samples if name not in split_of]
    if others and not any(shares.values()):
        sys.exit(f'{raw}/{others[0]}: no rule of --split takes it; give shares, or --skip it')
    patient_of = find_patients(samples, o)
    split_of |= draw_splits(samples, others, patient_of, shares, o.seed)
    pairs = {(patient_of[name], split) for name, split in split_of.items()}
    times = Counter(patient for patient, _ in pairs)  # {patient: in how many splits}
    if torn := sorted(patient for patient in times if times[patient] > 1):
        print(f'warning: {len(torn)} patients in more than one split: {torn[:3]}', file=sys.stderr)
    names_of = {split: sorted(n for n in samples if split_of[n] == split) for split in SPLITS}
    if not names_of['test']:
        sys.exit(f'{raw}: no image is for testing; give another --split, such as 70 val/ 30')
    return names_of

def chosen_by(rule, samples, raw, o):
    """The images in the list NAME.txt, or those in whose name, or masks' names, a rule is found."""
    if rule.endswith('.txt'):
        lines = [line.strip() for line in read_lines(raw, rule) if line.strip()]
        return look_up(f'lines of {rule}', lines, samples, o).values()
    return [name for name, sample in samples.items()
            if any(search(rule, one) for one in [name, *(mask for _, mask in sample.masks)])]

def draw_splits(samples, names, patient_of, shares, seed):
    """{name: split}. Draws patients class by class: test rounded up as in Table 3, val down."""
    rng = np.random.default_rng(seed)
    class_of = {}  # {patient: class of his first image}
    for name in names:
        class_of.setdefault(patient_of[name], samples[name].label)
    drawn = {}  # {patient: split}
    for label in sorted({*class_of.values()}):
        patients = [patient for patient in class_of if class_of[patient] == label]
        count, total = len(patients), sum(shares.values())
        spare = count - 1 if shares['train'] else count  # training keeps at least one
        test = min(int(np.ceil(count * shares['test'] / total)), spare)
        val = min(count * shares['val'] // total, spare - test)
        parts = np.split(rng.permutation(patients), (test, test + val))
        for split, part in zip(('test', 'val', 'train'), parts):
            drawn |= dict.fromkeys(part.tolist(), split)
    return {name: drawn[patient_of[name]] for name in names}

def read_masks(path, image_path, values):
    """Masks uint8 (H, W) of a file, by `classify`, one for each slice of its image's file."""
    if not has_ending(path, IMAGE_ENDINGS):
        raise ValueError(NOT_READ)
    if has_ending(path, VOLUMES) != has_ending(image_path, VOLUMES):
        raise ValueError('one of them is NIfTI, the other is not')
    for one in (image_path, path):  # programs differ in whether they turn a mask
        if has_ending(one, PICTURES) and Image.open(one).getexif().get(0x0112, 1) not in (0, 1):
            raise ValueError(f'EXIF turns {one}; save both without this tag')
    lossy = False
    if has_ending(path, PICTURES):
        masks, lossy = read_picture_mask(path)
    else:
        image = nib.load(image_path) if has_ending(path, VOLUMES) else None
        masks = [mask for volume in read(path, of_image=image) for mask in volume]
    masks = [classify(mask, values, lossy) for mask in masks]
    shown = {number for mask in masks for number in np.unique(mask).tolist()}
    if shown - {0} == {NOT_SCORED}:
        raise ValueError('255 is its only foreground: if it is class 1, give --values 0 1+255; if '
                         'it is not to be scored, give --values 0 1 255 and two --classes')
    return masks

def read_picture_mask(path):
    """The pages of a picture, (H, W[, 3]), and whether they are JPEG, which blurs them."""
    pages = [page for array in read(path) for page in array]
    with Image.open(path) as picture:
        lossy = picture.format in ('JPEG', 'MPO') or picture.info.get('compression') == 'jpeg'
        pixels = np.asarray(picture)
        palette = np.reshape(picture.getpalette() or [], (-1, 3))  # (0, 3) if it has none
    if (palette != palette[:, :1]).any():  # its colours are a display, its indices the classes
        return [pixels], lossy
    if picture.mode in ('LA', 'RGBA'):
        pages[0][pixels[..., -1] < 128] = 0  # what is transparent shows nothing
    return pages, lossy

def parse_values(values):
    """Two results: {number of a pixel: class}, and the class of all other numbers, or None. Entry k
    of `values` lists the numbers of class k, as 420+421, or *. Without *, 255 is not scored."""
    words = {word: k for k, entry in enumerate(values) for word in entry.split('+') if word}
    others = words.pop('*', None)
    class_of = {float(word): k for word, k in words.items()}
    if others is None:
        class_of.setdefault(255, NOT_SCORED)
    return class_of, others

def classify(mask, values, lossy):
    """Classes uint8 (H, W) of a mask: numbers (H, W), or grey or one colour on black (H, W, 3)."""
    mask = np.nan_to_num(mask, posinf=0, neginf=0)
    if mask.ndim == 3:
        foreground = mask[mask.any(2)]
        is_one_colour = (foreground == foreground[:1]).all()
        is_grey = (mask == mask[..., :1]).all()
        if not is_one_colour and not is_grey:
            raise ValueError('it has several colours; number them by tests.lab.convert colours')
        mask = mask.max(2)
    numbers, where = np.unique(mask, return_inverse=True)
    whole = np.rint(numbers)
    numbers = np.where(abs(numbers - whole) < 1e-3, whole, numbers)  # NIfTI may scale 3 to 2.9999
    class_of, others = parse_values(values)
    if lossy:
        if not {*class_of} <= {0, 255}:
            raise ValueError('it is lossy: give --values 0 255 or 0 *, or save it as PNG')
        numbers = np.where(numbers < 128, 0, 255)
    unlisted = [number for number in numbers.tolist() if number not in class_of]
    if unlisted and others is None:
        some = ', '.join(f'{number:g}' for number in unlisted[:3])
        raise ValueError(f'values {some}, which --values does not name')
    classes = np.uint8([class_of.get(number, others) for number in numbers.tolist()])
    return classes[where].reshape(mask.shape)

def task_items(path, raw, sample, o):
    """In a worker: yield (pixels uint8 (S, S, c), mask uint8 (S, S) or number of the class)."""
    try:
        with tempfile.TemporaryDirectory() as new:
            files = [*series(path, new, o.modality)] if path.is_dir() else [path]
            images = [image for file in files for array in read(file)
                      for image in to_uint8(array, o.modality)]
            layers = [(number, read_masks(raw / mask_path, files[0], o.values))
                      for number, mask_path in sample.masks]
        for _, masks in layers:
            if len(masks) != len(images):
                raise ValueError(f'it has {len(images)} images or slices, its mask {len(masks)}')
        for index, image in enumerate(images):
            if layers:
                here = [(number, masks[index]) for number, masks in layers]
                answer = lay_over(image.shape[:2], here, o)
            else:
                answer = o.classes.index(sample.label)
            yield resize(image, o.size), answer
    except Exception as error:  # decoders fail on broken files in every way there is
        partner = sample.label or ', '.join(mask_path for _, mask_path in sample.masks[:3])
        # SystemExit travels to the parent, whose result() raises it there: the program ends.
        sys.exit(f'{path}: cannot be used with {partner} ({type(error).__name__}: {error})')

def lay_over(shape, layers, o):
    """Mask uint8 (S, S) of [(number of the rule, mask)] of one image, the last on top."""
    united = np.zeros(shape, np.uint8)
    for number, mask in layers:
        if mask.shape != shape:
            raise ValueError(f'their sizes differ: {shape} and {mask.shape}')
        if len(o.masks) > 1:  # each rule is a class, and its masks hold 0, 1 and NOT_SCORED
            mask = np.where(mask == 1, np.uint8(number), mask)
        united[mask > 0] = mask[mask > 0]
    united[united >= len(o.classes)] = NOT_SCORED  # --values may list more than --classes
    return np.asarray(Image.fromarray(united).resize((o.size, o.size), Image.NEAREST))

def write_split(folder, spilled, stem, size):
    """Write images.npy and STEM.npy. Returns their count, {class: images with it} and hashes."""
    channels = [pixels.shape[2] for path in spilled for pixels, _ in spilled_items(path)]
    shape = len(channels), size, size, max(channels, default=1)  # 3 if any has colours
    # On a full disk a write to a memory map kills the process. Masks need no more than the images.
    if shutil.disk_usage(folder).free < 2 * np.prod(shape):
        raise OSError(errno.ENOSPC, 'No space left on device')
    images = np.lib.format.open_memmap(folder / 'images.npy', 'w+', np.uint8, shape)
    answers_shape, dtype = (shape[:1], np.int64) if stem == 'labels' else (shape[:3], np.uint8)
    answers = np.lib.format.open_memmap(folder / f'{stem}.npy', 'w+', dtype, answers_shape)
    shown, hashes = Counter(), set()
    for n, (pixels, answer) in enumerate(item for path in spilled for item in spilled_items(path)):
        images[n], answers[n] = pixels, answer
        shown.update(np.unique(answer).tolist())
        if np.ptp(pixels):  # black slices are alike
            hashes.add(hash(pixels.tobytes()))
    return len(images), shown, hashes

def prepare_task(raw, folder, o, pool):
    """Write the labelled images below RAW to `folder` as data.Task reads them."""
    if folder.exists():
        sys.exit(f'{folder}: this task is prepared; delete it, or choose another --out')
    samples = find_samples(raw, o)
    labels = sorted({sample.label for sample in samples.values() if not sample.masks})
    complete_options(o, labels)
    splits = split_samples(samples, raw, o)
    kind, stem = ('classification', 'labels') if labels else ('segmentation', 'masks')
    counts, shown, hashes = {}, {}, {}  # {split: what `write_split` returns}
    with appearing(folder, pool) as part:
        for split, names in splits.items():
            (part / split).mkdir()
            calls = [(raw / name, raw, samples[name], o) for name in names]
            with tempfile.TemporaryDirectory(dir=part, ignore_cleanup_errors=True) as new:
                spilled = [*in_order(pool, o.workers, new, task_items, calls, split)]
                written = write_split(part / split, spilled, stem, o.size)
            counts[split], shown[split], hashes[split] = written
        meta = {'kind': kind, 'classes': o.classes, 'modality': o.modality,
                'size': o.size, 'counts': counts, 'sided': o.sided}
        (part / 'split.json').write_text(json.dumps(splits, indent=1))
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
        check_classes(raw, o, shown)  # if it stops, `appearing` deletes all this
    for one, other in (('train', 'val'), ('train', 'test'), ('val', 'test')):
        if same := hashes[one] & hashes[other]:
            print(f'warning: {len(same)} images are the same in {one} and {other}', file=sys.stderr)
    print(f'{folder}: {kind}, {", ".join(o.classes)}; {counts}; window {o.modality or "min..max"}')

def complete_options(o, labels):
    """Check --classes and --values, and set them and --sided if they are not given."""
    if len({''.join(label.lower().split()) for label in labels}) < len(labels):
        sys.exit(f'classes {labels}: some differ in case or blanks alone; give them one spelling')
    # Without --classes, more than two values are names, and two are background and foreground.
    names = [value or 'background' for value in o.values]  # '' lists no value
    o.classes = o.classes or labels or (names if len(names) > 2 else ['background', 'foreground'])
    several = len(o.masks) > 1  # then each rule is a class, and its masks have two values
    if several and (len(o.classes) != len(o.masks) + 1 or len(o.values) not in (0, 2)):
        sys.exit('--classes: background and one for each mask; --values: outside and inside')
    usual = ['0', '*'] if several or o.objects else [str(k) for k in range(len(o.classes))]
    o.values = o.values or usual  # *: a mask of one class or object shows it by any number
    # Images must not be mirrored if classes tell left from right. l and r do so only together.
    words = {*re.findall('[a-z]+', ' '.join(o.classes).lower())}
    sides = {'left', 'right', 'sinister', 'dexter'}
    o.sided = bool(o.sided or words & sides or {'l', 'r'} <= words or {'od', 'os'} <= words)

def check_classes(raw, o, shown):
    """Print how many images of each split show each class, and stop if training lacks one."""
    print(f'{"images that show":<26}' + ''.join(f'{split:>8}' for split in shown))
    for number, name in enumerate(o.classes):
        print(f'{name:<26}' + ''.join(f'{counts[number]:>8}' for counts in shown.values()))
    unseen = [number for number in range(len(o.classes)) if not shown['train'][number]]
    names = ', '.join(o.classes[number] for number in unseen[:3])
    advice = 'mend --classes, --values, --split or the order of --masks'
    if len(o.classes) - len(unseen) < 2:
        sys.exit(f'{raw}: training images show less than two classes of {o.classes[:3]}; {advice}')
    if any(shown['test'][number] for number in unseen):
        sys.exit(f'{raw}: test images show classes that no training image shows: {names}; {advice}')
    if unseen and not o.partial and o.task not in TASKS:  # those of Table 3 may lack one
        sys.exit(f'{raw}: no training image shows {names}; {advice}, or allow it by --partial')

SOURCES = [Source(*line.split(' | ')) for line in r'''AutoPET-CT | CT | whole body | 558473 | form | autopet.grand-challenge.org/Dataset | /CT\.nii
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
TASKS = {row.name: row for row in (Task(*line.split(' | ')) for line in r'''whs-ct | CT | heart structures | 5176 0 4096 | form | zmiclab.github.io/zxh/0/mmwhs | --images 'ct_.*/(.*)_image' --masks 'ct_.*/(.*)_label' --values 0 205 420+421 500 550 600 820 850 --classes background myocardium left-atrium left-ventricle right-atrium right-ventricle aorta pulmonary-artery --split 50 20 30
kipa22 | CT | kidney cancer structures | 13846 5864 5959 | account | kipa22.grand-challenge.org | --images '(.*)image/(.*)' --masks '(.*)label/(.*)' --classes background renal-vein kidney renal-artery tumour --split 50 20 30
sisvse | Endoscope | surgical scene | 2718 336 1456 | form | sisvse.github.io | --split 2718 336 real_val_1/ --images 'images/real/(.*)\.jpg' --masks 'masks/real_.*_1/(.*)\.png' --patient '[^/_]+(?=_[^/]*$)' --classes 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
cholecseg8k | Endoscope | cholecystectomy | 4320 1120 2640 | account | kaggle.com/datasets/newslab/cholecseg8k | --images '(.*)_endo\.png' --masks '(.*)_endo_watershed_mask' --values 0+50+255 11 21 13 12 31 23 24 25 32 22 33 5 --patient 'video\d+' --classes background abdominal-wall liver gastrointestinal-tract fat grasper connective-tissue blood cystic-duct hook gallbladder hepatic-vein liver-ligament --split 50 20 30
idrid | Fundus | lesions, optic disc | 54 0 27 | account | idrid.grand-challenge.org | --images 'Original Images/(.*)/(.*)\.jpg' --split 'Training Set/' '' 'Testing Set/' --masks 'truths/(.*)/.*/(.*)_OD' 'truths/(.*)/.*/(.*)_MA' 'truths/(.*)/.*/(.*)_HE' 'truths/(.*)/.*/(.*)_EX' 'truths/(.*)/.*/(.*)_SE' --classes background optic-disc microaneurysms haemorrhages hard-exudates soft-exudates
fives | Fundus | vessels | 200 100 500 | open | figshare.com/articles/19688169 | --images '(.*)Original/(.*)' --masks '(.*)Groun?d truth/(.*)' --values 0 * --split 200 100 500
feta21 | MR | fetal brain | 5120 5120 10240 | account | feta.grand-challenge.org/feta-2021 | --images '(.*)_T2w' --masks '(.*)_dseg' --patient 'sub-\d+' --split 20 20 40 --classes background external-fluid grey-matter white-matter ventricles cerebellum deep-grey-matter brainstem
candi | MR | brain tissues | 5120 2560 5504 | account | nitrc.org/projects/candi_share | --images '(.*)_procimg' --masks '(.*)_seg' --split 40 20 43 --sided --values * 2 3 4 7 8 10 11 12 13 14 15 16 17 18 24 28 41 42 43 46 47 49 50 51 52 53 54 60
octdl | OCT | 7 diseases | 1030 411 623 | open | data.mendeley.com/datasets/sncdhf53xc | --images '\.jpg' --labels OCTDL_labels.csv file_name disease patient_id --split 50 20 30
icf | OCT | cystoid fluid | 730 292 438 | account | kaggle.com/datasets/zeeshanahmed13/intraretinal-cystoid-fluid | --images '(.*)/images/' --masks '(.*)/masks/' --skip 815DME_F/masks/MASK-DME511 --values 0 * --split 50 20 30
tnbc | Pathology | nuclei | 20 10 20 | open | zenodo.org/records/1175282 | --images 'Slide_(.*)' --masks 'GT_(.*)' --values 0 * --patient 'Slide_\d+' --split 50 20 30
lsc | Pathology | lymphomas | 188 73 113 | open | andrewjanowczyk.com use case 7 | --images '(CLL|FL|MCL)/.*\.tif' --patient '.*(?=_)' --split 50 20 30
bcss | Pathology | tissues | 75 30 46 | open | github.com/PathologyDataScience/BCSS | --images '(?:images|rgbs_colorNormalized)/(.*)' --masks 'masks/(.*)' --patient 'TCGA-[^-]+-[^-]+' --classes background tumour stroma inflammatory necrosis other --values '' 1+19+20 2 3+10+11 4 * 0 --split 50 20 30
monusac | Pathology | nuclei | 167 42 101 | open | huggingface.co/datasets/RationAI/MoNuSAC (save its rows as <split>/images/<row>.png and <split>/masks/<row>.png, each instance by the number of its category) | --split 167 42 test/ --classes background epithelial lymphocyte macrophage neutrophil
scr | X-ray | chest structures | 25 47 175 | form | jsrt.or.jp and isi.uu.nl/Research/Databases/SCR (first: python -m tests.lab.convert scr RAW/scr) | --split 25 47 175 --images 'All247images/(.*)\.png' --classes background left-lung right-lung heart left-clavicle right-clavicle --masks 'left lung/(.*)\.' 'right lung/(.*)\.' 'heart/(.*)\.' 'left clavicle/(.*)\.' 'right clavicle/(.*)\.'
pdcxr | X-ray | pneumonia | 3659 1573 624 | open | data.mendeley.com/datasets/rscbjbr9sj | --images 'chest_xray/.*\.jpeg' --patient 'person\d+|[^/]*IM-.*' --split 3659 1573 chest_xray/test/
dca1 | X-ray | coronary arteries | 25 25 84 | account? | kaggle.com/datasets/bard2024 dca1 | --images '(.*)\.pgm' --masks '(.*)_gt\.pgm' --values 0 * --split 25 25 84
dias | X-ray | brain arteries | 30 10 20 | open? | zenodo.org/records/11637181 (first: python -m tests.lab.convert dias RAW/dias) | --values 0 * --images 'darkest/(.*/)(.*)\.png' --masks '(.*)labels/label_s(.*)\.png' --split training/ validation/ test/
dsca | X-ray | brain arteries | 112 44 68 | open? | zenodo.org/records/11255024 (first: python -m tests.lab.convert dsca RAW/dsca) | --images 'darkest/(.*)\.png' --masks 'labels/(.*)\.' --values 0 * --split 50 20 30
sts-tooth-2d | X-ray | teeth | 100 100 700 | open? | toothfairychallenges.github.io/miccai2023 | --images '(.*)/Labeled/Image/(.*)' --masks '(.*)/Labeled/Mask/(.*)' --values 0 * --split 100 100 700
uns | Ultrasound | nerve | 2758 1078 1799 | account | kaggle.com/c/ultrasound-nerve-segmentation | --images '(.*)\.tif' --masks '(.*)_mask\.tif' --values 0 * --patient '\d+(?=_\d+\.tif)' --split 50 20 30
tn5000 | Ultrasound | thyroid nodule | 3500 500 1000 | open | figshare.com/articles/28455641 (first: python -m tests.lab.convert tn5000 RAW/tn5000) | --images 'JPEGImages/(.*)\.jpg' --labels classes.csv --classes malignant benign --split Main/train.txt Main/val.txt Main/test.txt
fhu | Ultrasound | fetal head | 499 200 300 | account | kaggle.com/datasets/ankit8467 (first: python -m tests.lab.convert fhu RAW/fhu) | --images '(.*HC)\.png' --masks 'filled/(.*HC)_Annotation' --values 0 * --patient '\d+(?=_[^/]*HC)' --split 50 20 30
autopet-org | PET | organs | 18076 6386 10465 | form | github.com/YichiZhang98/SegAnyPET | --images 'PETCT_([^/]*)/([^/]*)/SUV\.nii' --masks 'PETCT_([^_]*)_(.*)_\.nii' --values 0 1 2 3 4 5 6 7 8 9 10 11+12 --patient 'PETCT_[^/_]+' --modality SUV --classes background liver left-kidney right-kidney heart spleen aorta left-lower-lobe right-lower-lobe left-upper-lobe right-upper-lobe right-middle-lobe --split 50 20 30
slsc-s | Photo | skin lesion | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-s RAW/slsc-s) | --values 0 * --split train/ valid/ test/
slsc-c | Photo | 7 skin diseases | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-c RAW/slsc-c) | --labels classes.csv --classes BKL NV DF MEL VASC BCC AKIEC --split train/ valid/ test/'''.strip().splitlines())}

def parse(words):
    """The options of a command line, each with its help. A text or list not given is empty."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default='', allow_abbrev=False,
        usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(masks=[], labels=[], classes=[], values=[], split=[])
    add = parser.add_argument
    add('--raw', help='folder of the downloads, or of one task')
    add('--out', help='folder to write (default: data/medverse, or data/<task>)')
    add('--list', action='store_true', help='print the tables of data sets (?: layout unsure)')
    add('--source', help='prepare this one alone; --images and --skip replace its rules')
    add('--size', type=int, default=256, help='side of the stored images, px (default: 256)')
    add('--min_side', type=int, default=32, help='drop images with a smaller side, px (32)')
    add('--workers', type=int, default=os.cpu_count(), help='processes (default: one a core)')
    add('--seed', type=int, default=0, help="of a task's split (default: 0)")
    task = parser.add_argument_group('a labelled task, instead of what Table 3 says').add_argument
    task('--task', help='its name')
    task('--modality', type=modality_of, choices=(*MODALITIES, 'SUV'), help='window of volumes')
    task('--images', help='rule of the images (default, beside masks: (.*)images/(.*))')
    task('--masks', nargs='+', help='rule ((.*)masks/(.*)), or one for each class after the first')
    task('--objects', action='store_true', help='several masks of an image are objects: unite them')
    task('--skip', help='rule of files, images or masks or both, to leave out')
    task('--labels', nargs='+', help='CSV, and its columns of file, class, patient (first two)')
    task('--level', type=int, default=0, choices=(0, 1, 2), help='class: 1 the folder, 2 one above')
    task('--classes', nargs='+', help='names in order (default: background foreground or as found)')
    task('--values', nargs='+', help='of classes, as 0 420+421 *; unnamed 255: not scored')
    task('--partial', action='store_true', help='go on without what has no partner or no image')
    task('--sided', action='store_true', help='classes tell left from right: mirror no image')
    task('--patient', help='rule: what it finds in a path is the patient (default: the path)')
    task('--split', nargs=3, help='shares, rules or .txt (as folders say, or 50 20 30)')
    return parser.parse_args(words)

def main():
    """Prepare a task, or every source below RAW."""
    o = parse(sys.argv[1:])
    if row := TASKS.get(o.task):  # argparse takes the last of equal options: the user's
        o = parse(['--modality', row.modality, *shlex.split(row.options), *sys.argv[1:]])
    raw, out = Path(o.raw), Path(o.out or f'data/{o.task or "medverse"}')
    if o.list:
        for row in (*SOURCES, *TASKS.values()):
            print(f'{row.name:<26}', 'found' if home_of(row, raw) else '-', *row[1:6], sep=' | ')
        return
    if min(o.size, o.workers) < 1 or min(o.min_side, o.seed) < 0:
        sys.exit('--size and --workers take 1 or more; --min_side and --seed take 0 or more')
    if not o.raw or not raw.is_dir():
        sys.exit(f'--raw "{o.raw}": is no folder of <Modality>/<source>/** or a task; {NOT_READ}')
    try:
        with ProcessPoolExecutor(o.workers, initializer=follow_parent) as pool:
            prepare = prepare_task if o.task else prepare_sources
            prepare(raw, out, o, pool)
    except OSError as error:
        hint = f'; apt, brew or conda install {error.filename}' if error.filename in TOOLS else ''
        sys.exit(f'{out}: {error}{hint}; start again, finished sources stay')
    except re.error as error:
        sys.exit(f'{error.pattern}: is no regular expression ({error}); .* is what * is in a shell')
    except KeyboardInterrupt:
        print('stopped: start again to go on with the unfinished sources', file=sys.stderr)
        sys.exit(130)

if __name__ == '__main__':
    main()
