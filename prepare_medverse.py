r"""Prepare images for pretraining (paper, C.1.1) and labelled tasks for fine-tuning.

    python prepare_medverse.py --list --raw RAW     data sets of Tables 2 and 3, found or not
    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --task fives --raw RAW/fives
    python prepare_medverse.py --task mine --raw MINE --images '(.*)\.png' --masks '(.*)_truth'

RAW/<name>/** holds a data set of Table 2 as unpacked, RAW/<Modality>/<source>/** any other:
pictures, NIfTI, DICOM series, .npy, and videos (not for tasks). OUT/<source>/ appears when
complete: 00000.npy ... (uint8 (n, S, S, 1 or 3)), meta.json, dropped.csv (what is left out, why).
A task has masks, class folders or a table. Rules are regular expressions; case does not count. A
mask belongs to the image in whose path the groups ( ) find the same text: a/12, in a/12_truth.png.
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
DARK = 5  # a pixel up to this is background: 0.02 of 255, as in the paper
# How images of more than 8 bits become 8. limits: the numbers that become 0 and 255; if None, they
# are these percentiles. foreground: a slice is dropped if a smaller share of it is above DARK.
Window = namedtuple('Window', 'limits percentiles foreground')
WINDOWS = dict.fromkeys((*MODALITIES, ''), Window(None, (0, 100), 0))  # '': no --modality is given
WINDOWS['CT'] = Window((-200, 400), None, 0.05)  # Hounsfield units (HU)
WINDOWS['MR'] = Window(None, (1, 99), 0.05)
WINDOWS['PET'] = Window(None, (1, 99), 0.01)  # the paper's z-score of PET cancels in this scaling
WINDOWS['SUV'] = Window((0, 20), None, 0.01)  # standardized uptake values: PET with suv in its path
# pixels: uint8 (S, S, c), or None if dropped. single: no slice; these are compared for duplicates.
Item = namedtuple('Item', 'pixels single reason detail', defaults=(False, '', ''))
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
VIDEOS, VOLUMES = ('.avi', '.mp4'), ('.nii.gz', '.nii', '.img')  # volumes: NIfTI and Analyze
IMAGE_ENDINGS = (*PICTURES, *VIDEOS, *VOLUMES, '.npy')
UNREAD_ENDINGS = tuple('.webp .jp2 .jfif .heic .avif .tga .svs .mha .mhd .nrrd .npz'.split())
NOT_READ = ('not read: COCO, LabelMe, run lengths (draw PNG masks), YOLO (use tests.lab.convert), '
            '.npz (python -m tests.lab.convert medmnist FILE.npz TASK SOURCE)')
TOOLS = ('ffmpeg', 'ffprobe', 'dcm2niix')  # programs of others, for videos and DICOM
ENDING = re.compile('(' + '|'.join(map(re.escape, IMAGE_ENDINGS)) + ')$', re.IGNORECASE)
ZEROS = re.compile(r'(^|(?<=/))0+(?=\d+$)')  # leading zeros of 007 and a/007, but not of a/x007
HIDDEN = r'(^|/)\.[^/]'  # .git/1.png, a/._1.png; not '.', the path of RAW itself
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'other')  # why an image or file is dropped
SHARD = 256 << 20  # bytes of a full shard
Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses more than twice as many

def search(rule, name):
    """The match of a rule in a path, or None. Case does not count. An empty rule finds nothing."""
    return re.search(rule, name, re.IGNORECASE | re.DOTALL) if rule else None

def by_groups(names, rule):
    """{text of the groups ( ) of a rule: [paths]}. If a rule has no groups, each path is a key."""
    groups = {}
    for name in names:
        if match := search(rule, name):
            groups.setdefault(match.groups() or name, []).append(name)
    return groups

def has_ending(path, endings):
    return path.name.lower().endswith(endings)

def is_image(home, name):
    """Whether a path of `list_names` is an image: a DICOM folder, or a known ending, not hidden."""
    path, hidden = home / name, search(HIDDEN, name)
    return path.is_dir() or path.is_file() and has_ending(path, IMAGE_ENDINGS) and not hidden

def is_dicom(path):
    """Whether a file belongs to a DICOM series, by its name or by its mark."""
    # To open a named pipe would wait for ever. A DICOMDIR has the mark, but no image.
    if not path.is_file() or has_ending(path, ('dicomdir', *IMAGE_ENDINGS)):
        return False
    mark = b''
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        mark = file.read(132)[128:]
    return mark == b'DICM' or has_ending(path, '.dcm')

def list_names(home):
    """Sorted paths of all files below a folder, relative to it; a DICOM series is its folder."""
    paths = set()
    # A link to a folder above `home` would lead back here, so these folders count as visited.
    visited = {str(parent) for parent in home.resolve().parents}
    for folder, subfolders, files in os.walk(home, onerror=sys.exit, followlinks=True):
        subfolders.sort()  # if two links lead to a folder, the same one is followed each time
        if os.path.realpath(folder) in visited:
            subfolders.clear()  # os.walk goes no deeper
            continue
        visited.add(os.path.realpath(folder))
        for path in [Path(folder, file) for file in files]:
            paths.add(path.parent if is_dicom(path) else path)
    return [str(path.relative_to(home)) for path in sorted(paths)]

def series(folder, new, modality=''):
    """Yield the NIfTI files of this modality in a DICOM folder, converted into the folder `new`.
    At the end, raise ValueError if there were images of others, or if dcm2niix failed."""
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
    yield from [path for path, kind in kinds.items() if kind == wanted or not modality]
    last = (run.stdout + run.stderr).strip().splitlines()[-1:]
    if not kinds:
        raise ValueError(f'of DICOM only MR, CT and PET are read, save PNG; dcm2niix: {last}')
    if modality and (others := sorted({*kinds.values()} - {wanted})):
        raise ValueError(f'it has series of {", ".join(others)}, which are not of {modality}')
    if run.returncode:
        raise ValueError(f'dcm2niix ended with error {run.returncode}; some may be missing: {last}')

def read(path, draft=0, of_image=None):
    """All arrays of a file, (n, H, W) or (n, H, W, 3), upright, in its own units. draft: a JPEG may
    be decoded at a reduced size of at least this (px); of_image: of a NIfTI mask, its image."""
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
        case (3, _, _) | (_, _, 4):
            pass  # unclear: colours first, or with transparency?
        case (_, _, _) | (_, _, _, 3):
            return [array]
    raise ValueError(f'{array.shape} is unclear; save (H, W, 3), (n, H, W, 1) or (n, H, W, 3)')

def read_volume(path, of_image):
    """`read` of NIfTI and Analyze: a list with an array (n, H, W[, 3]) for each time point."""
    image = nib.load(path)
    if not np.isfinite(image.affine).all():  # with NaN, `cut` would choose any axis
        raise ValueError('its affine is not finite')
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    affine = image.affine
    if of_image is not None:
        image, affine = on_grid(image, of_image), of_image.affine  # cut along the image's axis
    voxels = np.asarray(image.dataobj, np.float32 if scaled else None)  # nibabel would give float64
    if voxels.dtype == np.uint8:  # `to_uint8` takes uint8 for a picture, which needs no window
        voxels = np.uint16(voxels)
    if voxels.dtype.names:  # colours
        return list(np.stack([cut(voxels[colour], affine) for colour in 'RGB'], -1))
    return list(cut(voxels, affine))

def on_grid(mask, image):
    """A NIfTI mask on its image's grid, within half a voxel; its axes may be in any order."""
    axes = [nib.io_orientation(either.affine) for either in (mask, image)]
    turn = nib.orientations.ornt_transform(*axes)
    turned = mask.as_reoriented(turn) if mask.ndim > 2 else mask
    shape = (*image.shape, 1, 1)[:4]  # (x, y, z, time); a missing axis has length 1
    tolerance = nib.affines.voxel_sizes(image.affine).min() / 2  # mm
    for candidate in (mask, turned):
        # A mask's voxel p lies (A - B) p off its image's. With |A - B|, the last is off the most.
        drift = np.abs(image.affine - candidate.affine) @ (*shape[:3], 1)  # mm
        if (*candidate.shape, 1, 1)[:4] == shape and drift.max() <= tolerance:
            return candidate
    raise ValueError(f'their grids differ: {image.shape} and {mask.shape}, or their affines')

def read_pages(path, draft):
    """`read` of a picture. Pages of one shape are slices: one array, with one window."""
    pages = []
    # Given a path, Pillow 13 exchanges the sides of some TIFF that EXIF turns, so it gets a file.
    with open(path, 'rb') as file, Image.open(file) as image:
        # An MPO is a JPEG with previews or a second view behind it: its first page counts alone.
        frames = [image] if image.format == 'MPO' else ImageSequence.Iterator(image)
        # Pillow gives the first page of an animated GIF as grey, the others in colour.
        animated = image.format == 'GIF' and image.is_animated
        for page in frames:
            deep = page.mode[0] in 'IF'  # I;16, I and F; all other modes of Pillow have 8 bits
            tags = getattr(page, 'tag_v2', {})  # of TIFF
            kind = tags.get(Tiff.SAMPLEFORMAT, (1,))[0]  # 1: unsigned, 2: signed
            bits = tags.get(Tiff.BITSPERSAMPLE, (1,))[0]
            misread = (kind, bits) in ((2, 8), (1, 32))  # signed 8, unsigned 32
            white_is_0 = deep and tags.get(Tiff.PHOTOMETRIC_INTERPRETATION) == 0
            cut_off = not deep and ';16' in str(page.tile)  # 8 of 16 bits are left
            if misread or white_is_0 or cut_off:  # Pillow gives wrong numbers for these
                raise ValueError('its type of numbers is not read; save 8 bits, or grey 16')
            page.draft(None, (draft, draft) if draft else None)  # fast at 1/2, 1/4 or 1/8 of JPEG
            page = ImageOps.exif_transpose(page)
            if not deep:
                grey = page.mode in ('1', 'L', 'LA') and not animated
                page = page.convert('L' if grey else 'RGB')
            is_16_bit = deep and image.format == 'PPM'  # Pillow would give 32 bits
            pages.append(np.asarray(page, np.uint16 if is_16_bit else None)[None])
    return [np.concatenate(pages)] if len({page.shape for page in pages}) == 1 else pages

def cut(volume, affine):
    """View (time, n, H, W) of an array (x, y, z[, time ...]): upright slices, cut across the axis
    of the coarsest spacing (z, if within 1% of it); anterior or superior is up."""
    turn = nib.io_orientation(affine)  # to x right, y anterior, z superior
    volume = np.atleast_3d(volume)
    volume = nib.apply_orientation(volume.reshape(*volume.shape[:3], -1), turn)  # 3 axes and time
    spacing = nib.affines.voxel_sizes(affine)[turn[:, 0].argsort()]  # mm, of the turned axes
    spacing[np.array(volume.shape[:3]) == 1] = np.inf  # an axis of length 1 is the one cut across
    axis = 2 if spacing[2] >= 0.99 * spacing.max() else spacing.argmax()
    # Across z: rows are y, columns x. Across y: rows z, columns x. Across x: rows z, columns y.
    slices = np.moveaxis(volume, (3, axis), (0, 1)).swapaxes(2, 3)  # (time, n, row, column)
    return slices[:, :, ::-1, ::-1]  # top is first; the patient's right, or front, is on the left

def to_uint8(volume, modality):
    """Yield the slices of an array (n, H, W[, 3]) as uint8, by one window (C.1.1) of WINDOWS."""
    if volume.dtype == np.uint8:
        yield from volume
        return
    limits, percentiles, _ = WINDOWS[modality]
    if modality == 'CT' and volume.dtype.kind == 'u':  # no HU, which are signed
        limits, percentiles = None, (0, 100)
        if 31000 < np.median(volume[volume > 0]) < 36000:  # HU + 32768, as in DeepLesion
            limits = np.add(WINDOWS['CT'].limits, 32768)
    if limits is None:
        step = 2 * (volume.size // 2_000_000) + 1  # odd, since an even one sees only some columns
        sample = volume.flat[::step]
        sample = sample[np.isfinite(sample)] + 0  # + 0 makes a number of bool
        limits = np.percentile(sample, percentiles) if sample.size else (0, 0)
    low, high = map(np.float32, limits)
    scale = 255 / (high - low or np.inf)  # a constant becomes 0
    for image in volume:  # NaN and infinity count as the lowest
        image = np.where(np.isfinite(image), image, low) if image.dtype.kind == 'f' else image
        yield np.uint8((image.clip(low, high) - low) * scale + 0.5)

def resize(image, size):
    """The whole image, uint8 (H, W[, 3]), low-passed, as (S, S, c); equal channels become one."""
    image = Image.fromarray(image).resize((size, size), Image.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(image).reshape(size, size, -1)
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels

def decode_video(path, size):
    """Yield every 30th frame (C.1.1) as uint8 (1, S, S, 3), while ffmpeg decodes the file."""
    # A video may be a playlist of other files: allow this alone. -xerror: stop at an error.
    only_this = ['-v', 'fatal', '-protocol_whitelist', 'file',
                 '-format_whitelist', 'avi,mov,mp4,m4a,3gp,3g2,mj2', '-i', f'file:{path}']
    command = ['ffmpeg', '-xerror', *only_this, '-fps_mode', 'passthrough', '-pix_fmt', 'rgb24',
               '-vf', f'framestep=30,scale={size}:{size}:flags=bicubic', '-f', 'rawvideo', '-']
    probe = ['ffprobe', *only_this, '-count_packets', '-select_streams', 'v:0',
             '-show_entries', 'stream=nb_frames,nb_read_packets', '-of', 'default=nw=1:nk=1']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        while len(frame := process.stdout.read(size * size * 3)) == size * size * 3:
            yield np.frombuffer(frame, np.uint8).reshape(1, size, size, 3)
    counts = subprocess.run(probe, capture_output=True, text=True).stdout.split() or ('N/A', '0')
    stated, present = counts  # frames: in the header, if it tells, and in the file
    cut_off = stated.isdigit() and int(stated) > int(present)
    if process.returncode or cut_off:
        raise ValueError('ffmpeg cannot decode it to its end')

def source_items(path, modality, size, min_side):
    """In a worker: yield an Item, of `size` px, for each image of a file; one more if corrupt."""
    is_video, count = has_ending(path, VIDEOS), 0
    try:
        with tempfile.TemporaryDirectory() as new:
            files = series(path, new, modality) if path.is_dir() else [path]
            arrays = (array for file in files for array in read(file, max(2 * size, min_side)))
            if is_video:
                arrays = decode_video(path, size)
            for array in arrays:
                single = len(array) == 1 and has_ending(path, (*PICTURES, '.npy'))
                chosen = single and array.dtype == np.uint8  # 8 bits somebody chose: kept if dark
                foreground = 0 if chosen else WINDOWS[modality].foreground
                for image in to_uint8(array, modality):
                    count += 1
                    small = min(image.shape[:2]) < min_side and not is_video
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

def find_twin(pixels, name, seen):
    """Name of an earlier picture that uint8 (S, S, c) nearly repeats. If None, it joins `seen`.
    Twins differ in at most one bit (is a cell darker than the next?) and 3 levels on average."""
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
    """Yield the file that `spill` writes for each call (path, ...). Few wait on the disk."""
    jobs, waiting = deque(), deque(calls)
    for path, *_ in tqdm(calls, title, unit='file'):
        try:
            while waiting and len(jobs) < 2 * workers:
                jobs.append(pool.submit(spill, folder, work, *waiting.popleft()))
            yield jobs.popleft().result()
        except BrokenProcessPool:
            sys.exit(f'a worker was killed at {path} or soon after: fewer --workers?')

@contextlib.contextmanager
def appearing(folder, pool):
    """Yield FOLDER.part, locked, which becomes FOLDER. On an error, stop the pool and delete it."""
    part = Path(f'{folder}.part')
    part.mkdir(parents=True, exist_ok=True)
    with open(part / 'lock', 'w') as lock:
        try:
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again if we are killed
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
    word = re.sub('[^a-z]', '', name.lower())
    return {known.lower().replace('-', ''): known for known in (*MODALITIES, 'SUV')}.get(word, name)

def find_sources(raw, out, wanted):
    """{name below OUT: (row, its folder)} of Table 2 and RAW/<Modality>/*. wanted: one, or ''."""
    found = [(row, home_of(row, raw)) for row in SOURCES if home_of(row, raw)]
    below_modality = [path for path in sorted(raw.glob('*/*'))
                      if modality_of(path.parent.name) in MODALITIES]
    found += [(Source(path.name, modality_of(path.parent.name)), path)
              for path in below_modality if path.is_dir()]
    # The folder of a modality is used if one of its sources is. RAW itself does no harm here.
    used = {folder for _, home in found for folder in (home, home.parent)}
    if unused := {*raw.glob('*'), *below_modality} - used:
        print(f'warning: {len(unused)} paths are no data sets, as {min(unused)}', file=sys.stderr)
    times, sources = Counter(row.name for row, _ in found), {}
    for row, home in found:
        name = f'{row.name}-{row.modality}' if times[row.name] > 1 else row.name
        if name in sources:
            sys.exit(f'{sources[name][1]} and {home} have the same name: rename one of them')
        if name != row.name and (out / row.name).exists():  # from when the name was of one alone
            sys.exit(f'{out / row.name}: rename it to {row.name}-<its modality>, as in {name}')
        if wanted in ('', row.name):
            sources[name] = row, home
    if not sources:
        sys.exit(f'{raw}: has no {wanted or "RAW/<name>"}, no RAW/CT/<source>; is it too deep?')
    return sources

def prepare_sources(raw, out, o, pool):
    """Prepare every source below RAW, and print the account of their files."""
    # total: images, and files without any. Each is kept, or dropped for one of REASONS.
    table = [('modality', 'source', 'files', 'total', 'kept', *REASONS)]
    sources = find_sources(raw, out, o.source)
    for name, (row, home) in sources.items():
        if meta := prepare_source(row, home, out / name, o, pool):
            kept, dropped = meta['count'], [meta['dropped'].get(reason, 0) for reason in REASONS]
            table.append((row.modality, name, meta['files'], kept + sum(dropped), kept, *dropped))
    for modality, name, *counts in table:
        print(f'{modality:<11}{name:<30}' + ''.join(f'{count:>10}' for count in counts))
    if left_out := [name for name in sources if not (out / name).exists()]:
        sys.exit(f'left out, as told above: {", ".join(left_out)}; {NOT_READ}')
    print(f'{len(sources)} sources; what each left out, and why, is in its dropped.csv; {NOT_READ}')

def prepare_source(row, home, folder, o, pool):
    """Write a source, the files below `home`, to `folder`. Returns its meta.json, or None."""
    names = list_names(home)
    if folder.exists():
        meta = json.loads((folder / 'meta.json').read_text())
        if (meta['modality'], meta['size']) != (row.modality, o.size):
            sys.exit(f'{home} and {folder}, of {meta["modality"]} and --size {meta["size"]}: '
                     'rename one, delete the second, or choose another --out')
        print(f'{folder}: finished before, of {meta["files"]} files (now {len(names)})')
        return meta
    rule, skip = o.images or row.images, o.skip or row.skip
    wanted = [name for name in names
              if search(rule, name) and not search(skip, name) and is_image(home, name)]
    with appearing(folder, pool) as part:
        kept, dropped = write_source(row, home, names, wanted, part, o, pool)
        meta = {'source': folder.name, 'modality': row.modality, 'count': kept, 'size': o.size,
                **WINDOWS[row.modality]._asdict(), 'files': len(names), 'dropped': dropped}
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    if not kept:  # the last row of dropped.csv gives an example of the reasons
        *_, last = (folder / 'dropped.csv').read_text(errors='replace').splitlines()
        print(f'{home}: no image is kept of {len(wanted)} files, as {last}; it is left out')
        shutil.rmtree(folder)
    return meta if kept else None

def write_source(row, home, names, wanted, folder, o, pool):
    """Write shards and dropped.csv. Returns how many images were kept, and dropped by reason."""
    calls = []
    for name in wanted:
        suv = row.modality == 'PET' and search('suv', f'{home.name}/{name}')
        calls.append((home / name, 'SUV' if suv else row.modality, o.size, o.min_side))
    others = sorted({*names} - {*wanted})
    dropped = dict.fromkeys(REASONS, 0) | {'other': len(others)}
    kept = 0
    paths = (folder / f'{number:05d}.npy' for number in range(100_000))
    filling = defaultdict(lambda: (next(paths), []))  # {shape: (path of a shard, its images)}
    seen = {}  # what find_twin remembers
    with open(folder / 'dropped.csv', 'w', encoding='utf-8', errors='surrogateescape') as file:
        log = csv.writer(file, lineterminator='\n')
        log.writerow(('path', 'slice', 'reason', 'detail'))
        log.writerows((name, 0, 'other', 'no image by name, or no regular file') for name in others)
        results = in_order(pool, o.workers, folder, source_items, calls, folder.stem)
        for name, result in zip(wanted, results):
            for index, item in enumerate(spilled_items(result)):
                # Neighbouring slices of a volume are alike by nature, and Table 2 keeps them.
                if item.single and (twin := find_twin(item.pixels, name, seen)):
                    item = Item(None, reason='duplicate', detail=f'of {twin}')
                if item.reason:
                    dropped[item.reason] += 1
                    log.writerow((name, index, item.reason, item.detail))
                    continue
                kept += 1
                path, images = filling[item.pixels.shape]
                images.append(item.pixels)
                if len(images) * item.pixels.size >= SHARD:
                    np.save(path, images)
                    del filling[item.pixels.shape]
            result.unlink()
    for path, images in filling.values():
        np.save(path, images)
    return kept, dropped

# Of a labelled image. masks: [(number of its rule of --masks, from 1; path)]. label: its class.
Sample = namedtuple('Sample', 'masks label patient', defaults=((), '', ''))
# What a rule or list found, without what it could not use. stops: only --partial allows that.
Entry = namedtuple('Entry', 'what count left_over stops', defaults=(True,))
# The rules without --images and --masks. They pair x/images/1.png and x/masks/1.png by the groups
# x/ and 1, and imagesTr/1_0000.nii.gz and labelsTr/1.nii.gz of nnU-Net by '' and Tr/1.
TAIL = r'(.*?)(?:_0000)?(?:\.nii)?\.\w+$'  # the second group, then the channel and the ending
IMAGE_RULE = r'(.*)images(?:/|(?=T[rs]/))' + TAIL  # images/, imagesTr/, imagesTs/
MASK_RULE = r'(.*)(?:masks/|labels(?=T[rs]/))' + TAIL
OFFICIAL = r'(^|/)(\d+[ _-]?)?({})([ _-]?(set|data|dataset|images?|imgs))?[ _-]?\d*/'
SPLITS = {'train': OFFICIAL.format('train(ing)?|(images|labels)Tr'),  # 01_train/, imagesTr/
          'val': OFFICIAL.format('val(id(ation)?)?'),
          'test': OFFICIAL.format('test(ing)?|(images|labels)Ts')}
SHARES = ('50', '20', '30')  # of these splits, if a data set has none

def find_samples(raw, o, account):
    """{path of an image below RAW: its Sample}. Each rule and list adds an Entry to `account`."""
    names = [name for name in list_names(raw) if not (search(HIDDEN, name) or search(o.skip, name))]
    mask_rules = [] if o.labels else o.masks or [MASK_RULE]
    masks = {rule: by_groups(names, rule) for rule in mask_rules}
    mask_names = {name for name in names if any(search(rule, name) for rule in mask_rules)}
    # Answers are a table if --labels is given, masks if files or options tell of them, or folders.
    has_masks = not o.labels and bool(mask_names or o.masks or o.objects or o.values)
    rule = o.images or (IMAGE_RULE if has_masks else '.')
    wanted = [name for name in names if name not in mask_names and search(rule, name)]
    images = [name for name in wanted if is_image(raw, name)]
    if o.labels:
        samples = read_table(raw, images, account, *o.labels)
    elif has_masks:
        samples = find_pairs(raw, rule, by_groups(images, rule), masks, account, o.objects)
    else:
        samples = by_folders(images, o.level)
    unread = [name for name in wanted if has_ending(raw / name, UNREAD_ENDINGS)]
    left_over = unread + [name for name in images if name not in samples]  # as imagesTs: no harm
    account.append(Entry(f'images {rule}', len(images + unread), left_over, stops=bool(unread)))
    if not samples:
        unused = ', '.join(f'{entry.what} {entry.left_over[:1]}' for entry in account)
        sys.exit(f'{raw}: no image has a class or mask; first unused: {unused}; {NOT_READ}')
    if o.patient:
        strangers = [name for name in samples if not search(o.patient, name)]
        account.append(Entry(f'--patient {o.patient}', len(samples), strangers))
    for name, sample in samples.items():
        match = search(o.patient, name)
        found = match and (match[1] if match.re.groups else match[0])
        samples[name] = sample._replace(patient=found or sample.patient or name)
    return samples

def find_pairs(raw, image_rule, images, masks, account, objects):
    """{image: Sample} of `images` {groups: paths} and `masks` {rule: {groups: paths}}."""
    for rule, found in masks.items():
        alone = [name for groups in found if groups not in images for name in found[groups]]
        account.append(Entry(f'files {rule}', sum(map(len, found.values())), alone))
    samples = {}
    for groups, names in images.items():
        its_masks = [(number, path) for number, found in enumerate(masks.values(), 1)
                     for path in found.get(groups, [])]
        many_masks = len(its_masks) > len({number for number, _ in its_masks})  # of one rule
        if len(names) > 1 or (many_masks and not objects):
            some = ', '.join([*names[:2], *(path for _, path in its_masks)][:3])
            sys.exit(f'{some} cannot be a pair: all have {groups}; mend --masks, or add --objects')
        if its_masks:
            samples[names[0]] = Sample(its_masks)
    rules = {image_rule: images, **masks}
    if not samples or not all(rules.values()):
        firsts = [f'{rule} finds {next(iter(found), "no file")}' for rule, found in rules.items()]
        sys.exit(f'{raw}: images have no masks, since each rule needs groups ( ), the same number '
                 f'of them, that find the same text, but {"; ".join(firsts)}')
    return samples

def by_folders(names, level):
    """{image: Sample}. level 1: the class is the folder, 2: the folder above it. Folders of splits
    are left out. Level 0 is 1, but ends the program if 2 is as likely."""
    own, above = {}, {}  # {image: its folder, or the folder above that}
    for name in names:
        folders = [folder for folder in Path(name).parent.parts
                   if not any(search(rule, f'{folder}/') for rule in SPLITS.values())]
        folders = folders or [Path(name).parent.name]
        own[name] = folders[-1]
        above[name] = folders[-2] if len(folders) > 1 else ''
    classes = {*own.values()}
    places = {*zip(own.values(), above.values())}
    repeated = len(places) > len(classes)  # as 1 in cat/1 and dog/1
    tiny = len(names) <= 3 * len(classes)  # as folders of patients are
    if not level and (repeated or tiny) and len({*above.values()}) > 1:
        one, two = (dict(Counter(folder.values()).most_common(9)) for folder in (own, above))
        sys.exit(f'which folders are the classes? --level 1: {one}; --level 2: {two}')
    class_of = above if level == 2 else own
    return {name: Sample(label=class_of[name]) for name in names if class_of[name]}

def read_lines(raw, file):
    """Lines of the only text below RAW whose path ends with `file`, in UTF-8, UTF-16 or cp1252."""
    names = [name for name in list_names(raw) if f'/{name}'.endswith(f'/{file}')]
    paths = [raw / name for name in names] or [raw / file]  # ./table.csv is in RAW itself
    if len(paths) > 1 or not paths[0].exists():
        sys.exit(f'{file}: is not one file of {[*map(str, paths[:2])]}; give its path, as ./{file}')
    content = paths[0].read_bytes()
    is_utf16 = content[:2] in (b'\xff\xfe', b'\xfe\xff')
    for code in ['utf-16'] if is_utf16 else ['utf-8-sig', 'cp1252', 'latin-1']:
        with contextlib.suppress(UnicodeDecodeError):
            return re.split('\r\n|\r|\n', content.decode(code))  # splitlines() knows other ends

def look_up(what, entries, names, account):
    """{entry of a table or list: its image}. b/7 means a/b/7.png, or else the only a/b/007.png."""
    by_tail = {}  # {tail of a path: [(tail with zeros, path)]}. Of a/b/007.png: a/b/7, b/7 and 7
    for name in names:
        tail = ENDING.sub('', name)
        while tail:
            by_tail.setdefault(ZEROS.sub('', tail), []).append((tail, name))
            tail = tail.partition('/')[2]
    meant, guessed = {}, []
    for entry in entries:
        tail = ENDING.sub('', entry.replace('\\', '/'))
        near = by_tail.get(ZEROS.sub('', tail), [])
        exact = [name for other, name in near if other == tail]
        if len(exact) > 1:
            sys.exit(f'{what}: {entry} may be any of {exact[:3]}; give more of its path')
        if exact:
            meant[entry] = exact[0]
        elif len(near) == 1:
            meant[entry] = near[0][1]
            guessed.append(f'{entry} is {meant[entry]}')
    if guessed:
        print(f'{len(guessed)} names are found as whole numbers: {", ".join(guessed[:3])}')
    account.append(Entry(what, len(entries), [entry for entry in entries if entry not in meant]))
    return meant

def read_table(raw, names, account, file, *columns):
    """{image: Sample} by the columns of file, class and, if named, patient of a CSV."""
    lines = read_lines(raw, file)
    regular = {}  # {separator of cells: how many lines have as many cells as the first}
    for mark in ',;\t':
        widths = [len(cells) for cells in csv.reader(lines[:99], delimiter=mark) if cells]
        regular[mark] = widths.count(widths[0]) if widths and widths[0] > 1 else 0
    table = csv.DictReader(lines, delimiter=max(regular, key=regular.get))
    head = table.fieldnames or []
    columns = columns or head[:2]
    if len(columns) < 2 or not {*columns} <= {*head}:
        sys.exit(f'{file}: has columns {head}, no {", ".join({*columns} - {*head})}; {NOT_READ}')
    print(f'{file}: file, class, patient are its columns {", ".join(columns)}; others are not read')
    rows = []
    for row in table:
        path, label, *patient = [(row[column] or '').strip() for column in columns]
        if path and label:
            rows.append((table.line_num, path, Sample((), label, *patient)))
    meant = look_up(f'rows of {file}', [path for _, path, _ in rows], names, account)
    samples = {}
    for line, path, sample in rows:
        if re.fullmatch(r'\d+( \d+){3,}', sample.label):
            sys.exit(f'{file}, line {line}: looks like run lengths; {NOT_READ}')
        if path in meant:
            before = samples.setdefault(meant[path], sample)
            if before != sample:
                sys.exit(f'{file}, line {line}: {path} has another answer above')
    return samples

def split_samples(samples, raw, o, account):
    """{split: paths} by --split: a number is a share of what the others leave, NAME.txt is a list,
    else it is a rule of images or their masks. The first split that takes an image keeps it."""
    rules = dict(zip(SPLITS, o.split or SHARES))
    there = [split for split in SPLITS if any(search(SPLITS[split], name) for name in samples)]
    by_folder = not o.split and 'train' in there and len(there) > 1
    if by_folder:  # without test/, 30% of what is not in val/ become the test
        rules = SPLITS if 'test' in there else SPLITS | {'train': '70', 'test': '30'}
    split_of = {}  # {path: split}
    shares = dict.fromkeys(SPLITS, 0)
    for split, rule in rules.items():
        if rule.isdigit():
            shares[split] = int(rule)
            continue
        if rule.endswith('.txt'):
            lines = [line.strip() for line in read_lines(raw, rule) if line.strip()]
            chosen = look_up(f'lines of {rule}', lines, samples, account).values()
        else:
            chosen = [name for name, sample in samples.items() if search(rule, name)
                      or any(search(rule, path) for _, path in sample.masks)]
        for name in chosen:
            split_of.setdefault(name, split)
    others = [name for name in samples if name not in split_of]
    if others and not any(shares.values()):
        sys.exit(f'{raw}/{others[0]}: no rule of --split takes it; give shares, or --skip it')
    split_of.update(draw_splits(samples, others, shares, np.random.default_rng(o.seed)))
    pairs = {(samples[name].patient, split) for name, split in split_of.items()}
    times = Counter(patient for patient, _ in pairs)
    if torn := sorted(patient for patient in times if times[patient] > 1):
        print(f'warning: {len(torn)} patients in more than one split: {torn[:3]}', file=sys.stderr)
    names_of = {split: sorted(n for n in samples if split_of[n] == split) for split in rules}
    counts = ', '.join(f'{split} {len(names)}' for split, names in names_of.items())
    how = 'its folders' if by_folder else ', '.join(rules.values())
    print(f'{raw}: {counts} files, split by {how}; {len(others)} of them drawn')
    return names_of

def draw_splits(samples, names, shares, rng):
    """{path: split} by shares of the patients of each class, rounded as in the paper's Table 3."""
    label_of, split_of = {}, {}  # of each patient: the class of his first image, and his split
    for name in names:
        label_of.setdefault(samples[name].patient, samples[name].label)
    for label in sorted({*label_of.values()}):
        group = [patient for patient in label_of if label_of[patient] == label]
        spare = len(group) - (shares['train'] > 0)  # training keeps at least one
        test = min(int(np.ceil(len(group) * shares['test'] / sum(shares.values()))), spare)
        val = min(len(group) * shares['val'] // sum(shares.values()), spare - test)
        drawn = np.split(rng.permutation(group), (test, test + val))
        for split, patients in zip(('test', 'val', 'train'), drawn):
            split_of.update(dict.fromkeys(patients.tolist(), split))
    return {name: split_of[samples[name].patient] for name in names}

def read_masks(path, image_path, values):
    """Masks uint8 (H, W) of a file, by `classify`, one for each slice of its image's file."""
    if not has_ending(path, IMAGE_ENDINGS):
        raise ValueError(NOT_READ)
    if has_ending(image_path, VOLUMES) != has_ending(path, VOLUMES):
        raise ValueError('one of them is NIfTI, the other is not')
    for one in (image_path, path):  # programs differ in whether they turn a mask
        if has_ending(one, PICTURES) and Image.open(one).getexif().get(0x0112, 1) not in (0, 1):
            raise ValueError(f'EXIF turns {one}; save both without this tag')
    of_image = nib.load(image_path) if has_ending(image_path, VOLUMES) else None
    masks = [mask for volume in read(path, of_image=of_image) for mask in volume]
    by_colour = '#' in ''.join(values)  # if one value is a #colour, all are: 7 is #070707
    lossy = False
    if has_ending(path, PICTURES):
        with Image.open(path) as picture:
            lossy = picture.format in ('JPEG', 'MPO') or picture.info.get('compression') == 'jpeg'
            pixels = np.asarray(picture)
            palette = np.reshape(picture.getpalette() or [], (-1, 3))
            coloured = (palette != palette[:, :1]).any()  # else it has greys, or none
            if coloured and not by_colour:
                masks = [pixels]  # its numbers are meant, not their colours
            if picture.mode in ('LA', 'RGBA'):  # what is transparent shows nothing
                masks[0][pixels[..., -1] < 128] = 0
    masks = [classify(mask, values, by_colour, lossy) for mask in masks]
    shown = {number for mask in masks for number in np.unique(mask).tolist()}
    if shown - {0} == {255}:  # all of it would go unscored
        raise ValueError('255 is its only foreground: if it is class 1, give --values 0 1+255; if '
                         'it is not to be scored, give --values 0 1 255 and two --classes')
    return masks

def classify(mask, values, by_colour, lossy):
    """Classes uint8 (H, W) of a mask (H, W[, 3]). Entry k of `values` lists the pixels of class k:
    numbers or #colours, joined by +. * is all that no entry lists. Without *, a 255 that is not
    listed stays 255, which is not scored. lossy: the nearest listed number counts."""
    grey = 0x010101 if by_colour else 1  # 7 * grey is the colour #070707, or 7
    class_of = {}
    others = None  # the class of *, if there is one
    for place, entry in enumerate(values):
        if '*' in entry:
            others = place
        for word in re.findall('[^+*]+', entry):
            number = int(word[1:], 16) if word[0] == '#' else float(word) * grey
            class_of[number] = place
    mask = np.nan_to_num(mask, posinf=0, neginf=0)
    if mask.ndim == 2:
        mask = mask * float(grey)  # float, as uint8 would overflow
    else:
        colours = mask @ np.int32((0x010000, 0x000100, 1))
        several = len(np.unique(colours[colours > 0])) > 1  # one colour on black is clear
        if several and np.ptp(mask, 2).any() and not by_colour:
            raise ValueError('it has several colours; name them in --values, as #ff0000')
        mask = colours if by_colour else mask.max(2)
    numbers, where = np.unique(mask, return_inverse=True)
    numbers = np.where(abs(numbers - np.rint(numbers)) < 1e-3, np.rint(numbers), numbers)
    if lossy:
        known = np.unique([*class_of, 255])
        if by_colour or np.diff(known).min() < 32:
            raise ValueError('it is lossy, which blurs near values and colours; save it as PNG')
        numbers = known[abs(numbers[:, None] - known).argmin(1)]
    unlisted = sorted({*numbers.tolist()} - {*class_of, 255 * grey})
    if unlisted and others is None:
        some = [f'#{int(number):06x}' if by_colour else f'{number:g}' for number in unlisted[:3]]
        raise ValueError(f'values or colours {", ".join(some)}, which --values does not name')
    default = 255 if others is None else others
    classes = np.uint8([class_of.get(number, default) for number in numbers.tolist()])
    return classes[where].reshape(mask.shape)

def task_items(path, raw, sample, o):
    """In a worker: yield (pixels uint8 (S, S, c), mask uint8 (S, S) or number of the class)."""
    try:
        with tempfile.TemporaryDirectory() as new:
            files = [*series(path, new, o.modality)] if path.is_dir() else [path]
            images = [image for file in files for array in read(file)
                      for image in to_uint8(array, o.modality)]
            layers = [(n, read_masks(raw / mask, files[0], o.values)) for n, mask in sample.masks]
        for _, masks in layers:
            if len(masks) != len(images):
                raise ValueError(f'it has {len(images)} images or slices, its mask {len(masks)}')
        for index, image in enumerate(images):
            here = [(number, masks[index]) for number, masks in layers]
            answer = lay_over(image.shape[:2], here, o) if here else o.classes.index(sample.label)
            yield resize(image, o.size), answer
    except Exception as error:  # decoders fail on broken files in every way there is
        partner = sample.label or ', '.join(mask_path for _, mask_path in sample.masks[:3])
        # SystemExit travels to the parent, whose result() raises it there: the program ends.
        sys.exit(f'{path}: cannot be used with {partner} ({type(error).__name__}: {error})')

def lay_over(shape, layers, o):
    """Mask uint8 (S, S) of [(number of the rule, mask)], the last on top."""
    mask = np.zeros(shape, np.uint8)
    for number, layer in layers:
        if layer.shape != shape:
            raise ValueError(f'their sizes differ: {shape} and {layer.shape}')
        # With several rules, 1 is the class of this one. With one rule it is class 1 anyway.
        layer = np.where(layer == 1, np.uint8(number), layer)
        mask[layer > 0] = layer[layer > 0]
    mask[mask >= len(o.classes)] = 255  # values after those of the classes are not scored
    return np.asarray(Image.fromarray(mask).resize((o.size, o.size), Image.NEAREST))

def write_split(folder, spilled, stem, o, holders):
    """Write images.npy and STEM.npy; returns how many images, and how many show each class."""
    channels = [pixels.shape[2] for path in spilled for pixels, _ in spilled_items(path)]
    shape = len(channels), o.size, o.size, max(channels, default=1)  # 3 if any has colours
    # On a full disk a write to a memory map kills the process. Masks need no more than the images.
    if shutil.disk_usage(folder).free < 2 * np.prod(shape):
        raise OSError(errno.ENOSPC, 'No space left on device')
    images = np.lib.format.open_memmap(folder / 'images.npy', 'w+', np.uint8, shape)
    answers_shape, dtype = (shape[:1], np.int64) if stem == 'labels' else (shape[:3], np.uint8)
    answers = np.lib.format.open_memmap(folder / f'{stem}.npy', 'w+', dtype, answers_shape)
    shown = Counter()
    for n, (pixels, answer) in enumerate(item for path in spilled for item in spilled_items(path)):
        images[n], answers[n] = pixels, answer
        shown.update(np.unique(answer).tolist())
        if np.ptp(pixels):  # black slices are alike
            holders.setdefault(hash(pixels.tobytes()), {})[folder.name] = True
    return len(images), shown

def prepare_task(raw, folder, o, pool):
    """Write the labelled images below RAW to `folder` as data.Task reads them."""
    if folder.exists():
        sys.exit(f'{folder}: this task is prepared; delete it, or choose another --out')
    account = []
    samples = find_samples(raw, o, account)
    labels = sorted({sample.label for sample in samples.values() if not sample.masks})
    complete_options(o, labels)
    splits = split_samples(samples, raw, o, account)
    for what, n, left, _ in account:
        print(f'{what}: {n} = {n - len(left)} used + {len(left)} left out  {", ".join(left[:3])}')
    harm = [f'{what}: {len(left)} of {n} are left over, as {", ".join(left[:3])}'
            for what, n, left, stops in account if left and stops]
    if harm and not o.partial:
        sys.exit(f'{raw}: {"; ".join(harm)}; --skip them, or allow it by --partial; {NOT_READ}')
    kind, stem = ('classification', 'labels') if labels else ('segmentation', 'masks')
    counts, shown = {}, {}  # {split: number of images}, {split: {class: images that show it}}
    holders = {}  # {hash of an image: {split that it is in: True}}
    with appearing(folder, pool) as part:
        for split, names in splits.items():
            (part / split).mkdir()
            calls = [(raw / name, raw, samples[name], o) for name in names]
            with tempfile.TemporaryDirectory(dir=part, ignore_cleanup_errors=True) as new:
                spilled = [*in_order(pool, o.workers, new, task_items, calls, split)]
                counts[split], shown[split] = write_split(part / split, spilled, stem, o, holders)
        meta = {'kind': kind, 'classes': o.classes, 'modality': o.modality,
                'size': o.size, 'counts': counts, 'sided': o.sided}
        (part / 'split.json').write_text(json.dumps(splits, indent=1))
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
        check_classes(raw, o, shown)
    twins = Counter(' and '.join(both) for both in holders.values() if len(both) > 1)
    for both, count in twins.items():
        print(f'warning: {count} images are the same in {both}', file=sys.stderr)
    print(f'{folder}: {kind}, {", ".join(o.classes)}; {counts}; window {o.modality or "min..max"}')

def complete_options(o, labels):
    """Check --classes and --values, and set them and --sided if they are not given."""
    if len({''.join(label.lower().split()) for label in labels}) < len(labels):
        sys.exit(f'classes {labels}: some differ in case or blanks alone; give them one spelling')
    named = [value or 'background' for value in o.values]  # '' lists no value: the background
    o.classes = o.classes or labels or (named if len(named) > 2 else ['background', 'foreground'])
    one_each = len(o.masks) > 1  # each rule gives one class, and its masks have two values
    if one_each and (len(o.classes) != len(o.masks) + 1 or len(o.values) not in (0, 2)):
        sys.exit('--classes: background and one for each mask; --values: outside and inside')
    inside = ['*'] if one_each or o.objects else map(str, range(1, len(o.classes)))
    o.values = o.values or ['0', *inside]
    # If classes tell left from right, images must not be mirrored. l and r count as a pair alone.
    words = {*re.findall('[a-z]+', ' '.join(o.classes).lower())}
    tells = words & {'left', 'right', 'sinister', 'dexter'}
    o.sided = bool(o.sided or tells or {'l', 'r'} <= words or {'od', 'os'} <= words)

def check_classes(raw, o, shown):
    """Print how many images of each split show each class, and stop if training lacks one."""
    print(f'{"images that show":<26}' + ''.join(f'{split:>8}' for split in shown))
    for number, name in enumerate(o.classes):
        print(f'{name:<26}' + ''.join(f'{counts[number]:>8}' for counts in shown.values()))
    unseen = [name for number, name in enumerate(o.classes) if not shown['train'][number]]
    in_test_alone = {*shown['test']} - {*shown['train'], 255}
    if not shown['test']:
        sys.exit(f'{raw}: there is no test image; mend --split')
    fault = (f'{raw}: no training image shows {", ".join(unseen[:3]) or "more"}; mend --classes, '
             '--values, --split or the order of --masks')
    if len(o.classes) - len(unseen) < 2 or in_test_alone:
        sys.exit(f'{fault}; training must show two classes, and all that test images show')
    if unseen and not o.partial and o.task not in TASKS:  # Table 3 knows its classes
        sys.exit(f'{fault}, or allow it by --partial')

# Tables 2 and 3. count: images in the paper. access: open, account, form (?: layout unseen)
FIELDS = 'name modality content count access link'
Source = namedtuple('Source', f'{FIELDS} images skip', defaults=('',) * 4 + ('.', ''))  # .: all
Task = namedtuple('Task', f'{FIELDS} options')
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
TASKS = {row.name: row for row in (Task(*line.split(' | ')) for line in r'''whs-ct | CT | heart structures | 5176 0 4096 | form | zmiclab.github.io/zxh/0/mmwhs | --images 'ct_.*/(.*)_image' --masks 'ct_.*/(.*)_label' --values 0 205 420+421 500 550 600 820 850 --classes background myocardium left-atrium left-ventricle right-atrium right-ventricle aorta pulmonary-artery
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
fhu | Ultrasound | fetal head | 499 200 300 | account | kaggle.com/datasets/ankit8467 (first: python -m tests.lab.convert fhu RAW/fhu) | --images '(.*HC)\.png' --masks 'filled/(.*HC)_Annotation' --values 0 * --patient '\d+(?=_[^/]*HC)'
autopet-org | PET | organs | 18076 6386 10465 | form | github.com/YichiZhang98/SegAnyPET | --images 'PETCT_([^/]*)/([^/]*)/SUV\.nii' --masks 'PETCT_([^_]*)_(.*)_\.nii' --values 0 1 2 3 4 5 6 7 8 9 10 11+12 --patient 'PETCT_[^/_]+' --modality SUV --classes background liver left-kidney right-kidney heart spleen aorta left-lower-lobe right-lower-lobe left-upper-lobe right-upper-lobe right-middle-lobe
slsc-s | Photo | skin lesion | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-s RAW/slsc-s) | --values 0 * --split train/ valid/ test/
slsc-c | Photo | 7 skin diseases | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-c RAW/slsc-c) | --labels classes.csv --classes BKL NV DF MEL VASC BCC AKIEC --split train/ valid/ test/'''.strip().splitlines())}

def parse(words):
    """The options of a command line, each with its help. A text or list not given is empty."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default='', allow_abbrev=False,
        usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    task('--values', nargs='+', help='of classes, as 0 420+421 #ff0000 *; unnamed 255: not scored')
    task('--partial', action='store_true', help='go on without what has no partner or no image')
    task('--sided', action='store_true', help='classes tell left from right: mirror no image')
    task('--patient', help='rule: what it finds in a path is the patient (default: the path)')
    task('--split', nargs=3, help='shares, rules or .txt (as folders say, or 50 20 30)')
    return parser.parse_args(words)

def main():
    """Prepare a task, or every source below RAW."""
    o = parse(sys.argv[1:])
    if row := TASKS.get(o.task):  # SHARES, too, so that no folders such as train/ are looked for
        words = ['--modality', row.modality, '--split', *SHARES, *shlex.split(row.options)]
        o = parse([*words, *sys.argv[1:]])
    raw, out = Path(o.raw), Path(o.out or f'data/{o.task or "medverse"}')
    if o.list:
        for row in (*SOURCES, *TASKS.values()):
            print(f'{row.name:<26}', 'found' if home_of(row, raw) else '-', *row[1:6], sep=' | ')
        return
    if min(o.size, o.workers) < 1 or min(o.min_side, o.seed) < 0:
        sys.exit('--size and --workers take 1 or more; --min_side and --seed take 0 or more')
    if any(re.fullmatch(r'\d*\.\d+', share) for share in o.split):  # else it would be a rule
        sys.exit('--split: shares are whole numbers, such as 50 20 30')
    if not o.raw or not raw.is_dir():
        sys.exit(f'--raw "{o.raw}": is no folder of <Modality>/<source>/** or a task; {NOT_READ}')
    try:
        with ProcessPoolExecutor(o.workers, initializer=follow_parent) as pool:
            (prepare_task if o.task else prepare_sources)(raw, out, o, pool)
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
