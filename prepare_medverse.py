r"""Prepare images for pretraining (paper, C.1.1) and labelled tasks for fine-tuning.

    python prepare_medverse.py --list --raw RAW     data sets of Tables 2 and 3, found or not
    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --task fives --raw RAW/fives
    python prepare_medverse.py --task mine --raw MINE --images '(.*)\.png' --masks '(.*)_truth'

RAW/<name>/** holds a data set of Table 2 as unpacked, RAW/<Modality>/<source>/** any other:
pictures, NIfTI, DICOM series, .npy, and videos (not for tasks). OUT/<source>/
appears when complete: 00000.npy ... (uint8 (n, S, S, 1 or 3)), meta.json, dropped.csv (what is left
out, and why). A task has masks, class folders or a table. Rules are regular expressions, searched
in paths in any case. An image and its mask pair if the groups ( ) of both rules find the same text:
above, a/12 of a/12_truth.png. Without ( ) none pair. Later masks lie over earlier ones.
"""
import argparse, csv, json, os, pickle, re, shlex, sys
import contextlib, errno, multiprocessing, shutil, signal, subprocess, tempfile, threading
from collections import Counter, deque, namedtuple
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageOps, ImageSequence
from tqdm import tqdm

MODALITIES = tuple('CT PET MR X-ray Ultrasound Fundus OCT Pathology Endoscope Photo'.split())
# How images of more than 8 bits become 8. limits: the numbers that become 0 and 255; if None, they
# are these percentiles. foreground: a slice is dropped if a smaller share of it is above 0.02.
Window = namedtuple('Window', 'limits percentiles foreground')
WINDOWS = dict.fromkeys((*MODALITIES, ''), Window(None, (0, 100), 0))  # '': no --modality is given
WINDOWS['CT'] = Window((-200, 400), None, 0.05)  # Hounsfield units (HU)
WINDOWS['MR'] = Window(None, (1, 99), 0.05)
WINDOWS['PET'] = Window(None, (1, 99), 0.01)  # the paper's z-score of PET cancels in this scaling
WINDOWS['SUV'] = Window((0, 20), None, 0.01)  # standardized uptake values: PET with suv in its path
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
VIDEOS, VOLUMES = ('.avi', '.mp4'), ('.nii.gz', '.nii', '.img')  # volumes: NIfTI and Analyze
IMAGES = (*PICTURES, *VIDEOS, *VOLUMES, '.npy')
UNREAD = ('.webp', '.jp2', '.jfif', '.heic', '.avif', '.tga', '.svs', '.mha', '.mhd', '.nrrd',
          '.npz')
TOOLS = ('ffmpeg', 'ffprobe', 'dcm2niix')  # programs of others, for videos and DICOM
ENDING = re.compile('(' + '|'.join(map(re.escape, IMAGES)) + ')$', re.IGNORECASE)
ZEROS = re.compile(r'(^|(?<=/))0+(?=\d+$)')  # leading zeros of 007 and a/007, but not of a/x007
HIDDEN = r'(^|/)\.[^/]'  # .git/1.png, a/._1.png; not '.', which is a DICOM series in RAW itself
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'other')  # why it is dropped
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
    return path.is_dir() or path.is_file() and has_ending(path, IMAGES) and not hidden

def is_dicom(path):
    """Whether a file belongs to a DICOM series, by its name or by its mark."""
    # To open a named pipe would wait for ever. A DICOMDIR has the mark, but no image.
    if not path.is_file() or has_ending(path, ('dicomdir', *IMAGES)):
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

# --- from files to images ---
def series(folder, new, modality=''):
    """Convert a DICOM folder to NIfTI in the folder `new`, and yield the files of this modality.
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
    others = sorted({*kinds.values()} - {wanted})
    if others and modality:
        raise ValueError(f'it has series of {", ".join(others)}, which are not of {modality}')
    if run.returncode:
        raise ValueError(f'dcm2niix ended with error {run.returncode}; images may lack: {last}')

def read(path, draft=0, grid=None):
    """All arrays of a file, (n, H, W) or (n, H, W, 3), upright, in its own units. draft: a JPEG may
    be decoded at a reduced size of at least this (px); grid: the NIfTI image of a NIfTI mask."""
    if has_ending(path, PICTURES):
        return read_pages(path, draft)
    return [read_array(path)] if has_ending(path, '.npy') else read_volume(path, grid)

def read_array(path):
    """The array of an .npy file, (n, H, W) or (n, H, W, 3)."""
    array = np.load(path, mmap_mode='r')
    match array.shape:
        case (_, _) | (_, _, 3):  # one image
            return array[None]
        case (_, _, _, 1):
            return array[..., 0]
        case (_, _, _, 3):
            return array
        case (n, _, width) if n != 3 and width != 4:  # else it may be colours
            return array
    raise ValueError(f'{array.shape} is unclear; save (H, W, 3), (n, H, W, 1) or (n, H, W, 3)')

def read_volume(path, grid):
    """`read` of NIfTI and Analyze: a volume for each time point."""
    image = nib.load(path)
    if not np.isfinite(image.affine).all():  # with NaN, `cut` would choose any axis
        raise ValueError('its affine is not finite')
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    affine = image.affine
    if grid is not None:
        image, affine = on_grid(image, grid), grid.affine
    voxels = np.asarray(image.dataobj, np.float32 if scaled else None)  # nibabel has float64
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
    shape = (*image.shape, 1, 1)[:4]  # (x, y, z, time); an axis that lacks has length 1
    tolerance = nib.affines.voxel_sizes(image.affine).min() / 2  # mm
    for candidate in (mask, turned):
        # With absolute values, the far corner bounds how far any voxel is from its image's.
        drift = np.abs(image.affine - candidate.affine) @ (*shape[:3], 1)  # mm
        if (*candidate.shape, 1, 1)[:4] == shape and drift.max() <= tolerance:
            return candidate
    raise ValueError(f'their grids differ: {image.shape} and {mask.shape}, or their affines')

def read_pages(path, draft):
    """`read` of a picture. Pages of one shape are slices: one array, with one window."""
    pages = []
    # Given a path, Pillow 13 exchanges the sides of some TIFF that EXIF turns, so it gets a file.
    with open(path, 'rb') as file, Image.open(file) as image:
        frames = ImageSequence.Iterator(image)
        for page in [image] if image.format == 'MPO' else frames:  # others of an MPO are previews
            deep = page.mode[0] in 'IF'  # I;16, I and F; all other modes of Pillow have 8 bits
            tags = getattr(page, 'tag_v2', {})  # of TIFF
            kind = tags.get(339, (1,))[0]  # of numbers: 1 is unsigned, 2 is signed
            bits = tags.get(258, (1,))[0]
            inverted = deep and tags.get(262) == 0  # white is 0
            cut_off = not deep and ';16' in str(page.tile)  # 8 of 16 bits are left
            if (kind, bits) in ((2, 8), (1, 32)) or inverted or cut_off:  # Pillow misreads these
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
    volume = np.atleast_3d(volume)
    volume = nib.apply_orientation(volume.reshape(*volume.shape[:3], -1), turn)  # 3 axes and time
    spacing = np.empty(3)  # mm, of the turned axes
    spacing[turn[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    spacing[np.array(volume.shape[:3]) == 1] = np.inf  # an axis of length 1 is the one cut across
    axis = 2 if spacing[2] >= 0.99 * spacing.max() else spacing.argmax()
    slices = np.moveaxis(volume, (3, axis), (0, 1)).swapaxes(2, 3)  # (time, n, H, W), top is last
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
            limits = (32768 - 200, 32768 + 400)
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
    if image.shape[:2] != (size, size):
        image = Image.fromarray(image).resize((size, size), Image.BICUBIC, reducing_gap=3.0)
    pixels = np.ascontiguousarray(image).reshape(size, size, -1)
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels

def decode_video(path, size):
    """Yield every 30th frame (C.1.1) as uint8 (1, S, S, 3), while ffmpeg decodes the file."""
    # A video may be a list of other files or addresses: allow this one. -xerror: stop at an error.
    only_this = ['-v', 'fatal', '-protocol_whitelist', 'file',
                 '-format_whitelist', 'avi,mov,mp4,m4a,3gp,3g2,mj2', '-i', f'file:{path}']
    command = ['ffmpeg', '-xerror', *only_this, '-fps_mode', 'passthrough', '-pix_fmt', 'rgb24',
               '-vf', f'framestep=30,scale={size}:{size}:flags=bicubic', '-f', 'rawvideo', '-']
    probe = ['ffprobe', *only_this, '-count_packets', '-select_streams', 'v:0',
             '-show_entries', 'stream=nb_frames,nb_read_packets', '-of', 'default=nw=1:nk=1']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        while len(frame := process.stdout.read(size * size * 3)) == size * size * 3:
            yield np.frombuffer(frame, np.uint8).reshape(1, size, size, 3)
    counts = subprocess.run(probe, capture_output=True, text=True).stdout.split()
    stated, present = counts or ('N/A', '0')  # nb_frames, which may be N/A, and nb_read_packets
    if process.returncode or stated.isdigit() and int(stated) > int(present):  # it is cut off
        raise ValueError('ffmpeg cannot decode it to its end')

# pixels: uint8 (S, S, c), or None if it is dropped for a reason. picture: it is a file of its own.
Item = namedtuple('Item', 'pixels picture reason detail', defaults=(False, '', ''))

def source_items(path, modality, size, min_side):
    """In a worker: yield an Item, of `size` px, for each image of a file; one more if corrupt."""
    is_video, count = has_ending(path, VIDEOS), 0
    try:
        with tempfile.TemporaryDirectory() as new:
            files = series(path, new, modality) if path.is_dir() else [path]
            arrays = (array for file in files for array in read(file, max(2 * size, min_side)))
            for array in decode_video(path, size) if is_video else arrays:
                picture = len(array) == 1 and has_ending(path, (*PICTURES, '.npy'))
                chosen = picture and array.dtype == np.uint8  # by somebody, as was its window
                foreground = 0 if chosen else WINDOWS[modality].foreground
                for image in to_uint8(array, modality):
                    count += 1
                    small = min(image.shape[:2]) < min_side and not is_video
                    dark = np.count_nonzero(image > 5) < foreground * image.size  # 5 is 0.02 of 255
                    if small or dark or np.ptp(image) < 8:
                        sides = f'{image.shape[1]} x {image.shape[0]} px'
                        yield Item(None, reason='small' if small else 'blank', detail=sides)
                    else:
                        yield Item(resize(image, size), picture)
        if not count:
            raise ValueError('it holds no image')
    except Exception as error:  # decoders fail on broken files in every way there is
        if isinstance(error, OSError) and (error.errno == errno.ENOSPC or error.filename in TOOLS):
            raise  # a full disk or a missing program, which harm every file
        yield Item(None, reason='corrupt', detail=f'{type(error).__name__}: {error}')

def find_twin(pixels, name, seen):
    """Name of an earlier picture that uint8 (S, S, c) nearly repeats, or None; `seen` learns it.
    Twins differ in at most one bit (is a cell darker than the next?) and 3 levels on average."""
    grey = Image.fromarray(pixels.squeeze()).convert('L')
    cells = np.int16(grey.resize((9, 8), Image.BOX))  # means of areas, (8, 9)
    bits = int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes())
    for key in [bits, *(bits ^ (1 << bit) for bit in range(64))]:
        for twin, twin_cells in seen.get(key, ()):
            if np.abs(cells - twin_cells).mean() < 3:
                return twin
    seen.setdefault(bits, []).append((name, cells))

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
    """Yield the file of `spill` of each call (path, ...). At most two a worker are under way."""
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
    """Yield FOLDER.part, locked. It becomes FOLDER. On an error, end `pool`, then delete it."""
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
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(part, ignore_errors=True)
            raise

# --- sources for pretraining ---
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
    """{name below OUT: (row, its folder below RAW)} of Table 2, then of RAW/<Modality>/*.
    A name of several modalities becomes <name>-<Modality>. wanted: one name, or '' for all."""
    found = [(row, home_of(row, raw)) for row in SOURCES if home_of(row, raw)]
    below_modality = [path for path in sorted(raw.glob('*/*'))
                      if modality_of(path.parent.name) in MODALITIES]
    found += [(Source(path.name, modality_of(path.parent.name)), path)
              for path in below_modality if path.is_dir()]
    used = {folder for _, home in found for folder in (home, home.parent)}
    if unused := {*raw.glob('*'), *below_modality} - used:
        print(f'warning: no data sets: {len(unused)} paths, as {min(unused)}', file=sys.stderr)
    times, sources = Counter(row.name for row, _ in found), {}
    for row, home in found:
        name = f'{row.name}-{row.modality}' if times[row.name] > 1 else row.name
        if name in sources:
            sys.exit(f'{sources[name][1]} and {home} have the same name: rename one of them')
        if name != row.name and (out / row.name).exists():  # of a run before there were several
            sys.exit(f'{out / row.name}: rename it to {row.name}-<its modality>, as in {name}')
        if wanted in ('', row.name):
            sources[name] = row, home
    if not sources:
        sys.exit(f'{raw}: has no {wanted or "RAW/<name>"}, no RAW/CT/<source>; is it too deep?')
    return sources

def prepare_sources(raw, out, o, pool):
    """Prepare every source below RAW, and print the account of their files."""
    # found: all images, and all files that are none. Each is kept, or dropped for one of REASONS.
    table = [('modality', 'source', 'files', 'found', 'kept', *REASONS)]
    sources = find_sources(raw, out, o.source)
    for name, (row, home) in sources.items():
        if meta := prepare_source(row, home, out / name, o, pool):
            kept, dropped = meta['count'], [meta['dropped'].get(reason, 0) for reason in REASONS]
            table.append((row.modality, name, meta['files'], kept + sum(dropped), kept, *dropped))
    for modality, name, *counts in table:
        print(f'{modality:<11}{name:<30}' + ''.join(f'{count:>10}' for count in counts))
    if left_out := [name for name in sources if not (out / name).exists()]:
        sys.exit(f'left out, as told above: {", ".join(left_out)}')
    print(f'{len(sources)} sources; what each left out, and why, is in its dropped.csv')

def prepare_source(row, home, folder, o, pool):
    """Write a source, the files below `home`, to `folder`. Returns its meta.json, or None."""
    names = list_names(home)
    if folder.exists():
        meta = json.loads((folder / 'meta.json').read_text())
        if meta['modality'] != row.modality:
            sys.exit(f'{home} and {folder}, of {meta["modality"]}: rename one of them')
        if meta['size'] != o.size:
            sys.exit(f'{folder}: has --size {meta["size"]}; delete it, or choose another --out')
        print(f'{folder}: finished before, of {meta["files"]} files (now {len(names)})')
        return meta
    images, skip = o.images or row.images, o.skip or row.skip
    wanted = [name for name in names
              if search(images, name) and not search(skip, name) and is_image(home, name)]
    with appearing(folder, pool) as part:
        kept, dropped = write_source(row, home, names, wanted, part, o, pool)
        meta = {'source': folder.name, 'modality': row.modality, 'count': kept, 'size': o.size,
                **WINDOWS[row.modality]._asdict(), 'files': len(names), 'dropped': dropped}
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    if not kept:  # the last row of dropped.csv gives an example of the reasons
        *_, last = (folder / 'dropped.csv').read_text(errors='replace').splitlines()
        print(f'{home}: no image is kept of {len(wanted)} files, as {last}; it is left out; {NOT_READ}')
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
    kept = shards = 0
    filling = {}  # {shape of images: (path of the shard that takes them, these images)}
    seen = {}  # what find_twin remembers
    with open(folder / 'dropped.csv', 'w', encoding='utf-8', errors='surrogateescape') as file:
        log = csv.writer(file, lineterminator='\n')
        log.writerow(('path', 'slice', 'reason', 'detail'))
        for name in others:
            known = has_ending(home / name, UNREAD)
            detail = NOT_READ if known else 'no image by name, or no regular file'
            log.writerow((name, 0, 'other', detail))
        results = in_order(pool, o.workers, folder, source_items, calls, folder.stem)
        for name, result in zip(wanted, results):
            for index, item in enumerate(spilled_items(result)):
                # Neighbouring slices of a volume are alike by nature, and Table 2 keeps them.
                if item.picture and (twin := find_twin(item.pixels, name, seen)):
                    item = Item(None, reason='duplicate', detail=f'of {twin}')
                if item.reason:
                    dropped[item.reason] += 1
                    log.writerow((name, index, item.reason, item.detail))
                    continue
                kept += 1
                shape = item.pixels.shape
                if shape not in filling:
                    filling[shape] = (folder / f'{shards:05d}.npy', [])
                    shards += 1
                path, images = filling[shape]
                images.append(item.pixels)
                if len(images) * item.pixels.size >= SHARD:
                    np.save(path, images)
                    del filling[shape]
            result.unlink()
    for path, images in filling.values():
        np.save(path, images)
    return kept, dropped

# --- labelled tasks: which images, with which answers ---
# masks: for each rule of --masks, the paths of this image's masks. label: the name of its class.
Sample = namedtuple('Sample', 'masks label patient', defaults=((), '', ''))
# The rules without --images and --masks. They pair x/images/1.png and x/masks/1.png by the groups
# x/ and 1, and imagesTr/1_0000.nii.gz and labelsTr/1.nii.gz of nnU-Net by '' and Tr/1.
IMAGES_BESIDE = r'(.*)images(?:/|(?=T[rs]/))(.*?)(?:_0000)?(?:\.nii)?\.\w+$'
MASKS = r'(.*)(?:masks/|labels(?=T[rs]/))(.*?)(?:_0000)?(?:\.nii)?\.\w+$'
OFFICIAL = r'(^|/)(\d+[ _-]?)?({})([ _-]?(set|data|dataset|images?|imgs))?[ _-]?\d*/'
SPLITS = {'train': OFFICIAL.format('train(ing)?|(images|labels)Tr'),  # 01_train/, imagesTr/
          'val': OFFICIAL.format('val(id(ation)?)?'),
          'test': OFFICIAL.format('test(ing)?|(images|labels)Ts')}
SHARES = ('50', '20', '30')  # of these splits, if a data set has none
NOT_READ = ('not read: COCO, LabelMe, run lengths (draw PNG masks), YOLO (use tests.lab.convert), '
            '.npz (python -m tests.lab.convert medmnist FILE.npz TASK SOURCE)')

def find_samples(raw, o, account):
    """{path of an image below RAW: its Sample}: by a table, by pairs with masks, or by folders.
    Adds to `account`: (what, how many, those left over, whether these stop the preparation)."""
    names = [name for name in list_names(raw) if not (search(HIDDEN, name) or search(o.skip, name))]
    mask_rules = [] if o.labels else o.masks or [MASKS]
    masks = {rule: by_groups(names, rule) for rule in mask_rules}
    mask_names = {name for name in names if any(search(rule, name) for rule in mask_rules)}
    has_masks = not o.labels and bool(mask_names or o.masks or o.objects or o.values)
    rule = o.images or (IMAGES_BESIDE if has_masks else '.')
    wanted = [name for name in names if name not in mask_names and search(rule, name)]
    images = [name for name in wanted if is_image(raw, name)]
    if o.labels:
        samples = read_table(raw, images, account, *o.labels)
    elif has_masks:
        samples = find_pairs(raw, rule, by_groups(images, rule), masks, account, o.objects)
    else:
        samples = by_folders(images, o.level)
    alone = [name for name in images if name not in samples]
    account.append((f'images {rule}', len(images), alone, False))  # as in imagesTs, without answers
    if unread := [name for name in wanted if has_ending(raw / name, UNREAD)]:
        what = f'formats of {rule} ({NOT_READ})'
        account.append((what, len(images + unread), unread, True))
    if not samples:
        unused = ', '.join(f'{what} {left[:1]}' for what, _, left, _ in account)
        sys.exit(f'{raw}: no image has a class or mask; first unused: {unused}; {NOT_READ}')
    if o.patient:
        strangers = [name for name in samples if not search(o.patient, name)]
        account.append((f'--patient {o.patient}', len(samples), strangers, True))
    for name, sample in samples.items():
        match = search(o.patient, name)
        shown = match and match[1 if match.re.groups else 0]  # its first group, or all it found
        samples[name] = sample._replace(patient=shown or sample.patient or name)
    return samples

def find_pairs(raw, image_rule, images, masks, account, objects):
    """{image: Sample} of `images` {groups: paths} and `masks` {rule: {groups: paths}}."""
    for rule, found in masks.items():
        alone = [name for groups in found if groups not in images for name in found[groups]]
        account.append((f'files {rule}', sum(map(len, found.values())), alone, True))
    samples = {}
    for groups, names in images.items():
        its_masks = [found.get(groups, []) for found in masks.values()]  # a list for each rule
        if len(names) > 1 or max(map(len, its_masks)) > 1 and not objects:
            some = ', '.join([*names[:2], *sum(its_masks, [])][:3])
            sys.exit(f'{some} cannot be a pair: all have {groups}; mend --masks, or add --objects')
        if any(its_masks):
            samples[names[0]] = Sample(its_masks)
    rules = {image_rule: images, **masks}
    if not samples or not all(rules.values()):
        firsts = [f'{rule} finds {next(iter(found), "no file")}' for rule, found in rules.items()]
        sys.exit(f'{raw}: images have no masks, since each rule needs groups ( ), the same number '
                 f'of them, that find the same text, but {"; ".join(firsts)}')
    return samples

def by_folders(names, level):
    """{image: Sample}. Its class is its folder (level 1), or the one above (2); splits are none."""
    own, above = {}, {}  # {image: folder}
    for name in names:
        folders = [folder for folder in Path(name).parent.parts
                   if not any(search(rule, f'{folder}/') for rule in SPLITS.values())]
        folders = folders or [Path(name).parent.name]
        own[name] = folders[-1]
        above[name] = folders[-2] if len(folders) > 1 else ''
    classes = {*own.values()}
    repeated = len({*zip(above.values(), own.values())}) > len(classes)  # as cat/a and dog/a
    tiny = len(names) <= 3 * len(classes)
    if not level and (repeated or tiny) and len({*above.values()}) > 1:
        one, two = (dict(Counter(folder.values()).most_common(9)) for folder in (own, above))
        sys.exit(f'which folders are the classes? --level 1: {one}; --level 2: {two}')
    class_of = above if level == 2 else own
    return {name: Sample(label=class_of[name]) for name in names if class_of[name]}

def read_lines(raw, end):
    """Lines of the text whose path below RAW ends so, in UTF-8, UTF-16 or Windows' code page."""
    names = [name for name in list_names(raw) if f'/{name}'.endswith(f'/{end}')]
    paths = [raw / name for name in names] or [raw / end]  # no name ends with ./table.csv
    if len(paths) > 1 or not paths[0].exists():
        sys.exit(f'{end}: is not one file of {[*map(str, paths[:2])]}; give its path, as ./{end}')
    content = paths[0].read_bytes()
    is_utf16 = content[:2] in (b'\xff\xfe', b'\xfe\xff')
    for code in ['utf-16'] if is_utf16 else ['utf-8-sig', 'cp1252', 'latin-1']:
        with contextlib.suppress(UnicodeDecodeError):
            return re.split('\r\n|\r|\n', content.decode(code))  # splitlines() knows other ends

def look_up(what, entries, names, account):
    """{entry of a table or list: its image}. b/7 means a/b/7.png, or else the only a/b/007.png."""
    by_tail = {}  # {end of a path, without ending and zeros: [(this end with zeros, path)]}
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
    account.append((what, len(entries), [entry for entry in entries if entry not in meant], True))
    return meant

def read_table(raw, names, account, end, *columns):
    """{image: Sample} by the columns of file, class and, if named, patient of a CSV."""
    lines = read_lines(raw, end)
    regular = {}  # {separator of cells: how many lines have as many cells as the first}
    for mark in ',;\t':
        widths = [len(cells) for cells in csv.reader(lines[:99], delimiter=mark) if cells]
        regular[mark] = widths.count(widths[0]) if widths and widths[0] > 1 else 0
    table = csv.DictReader(lines, delimiter=max(regular, key=regular.get))
    head = table.fieldnames or []
    columns = columns or head[:2]
    if len(columns) < 2 or not {*columns} <= {*head}:
        sys.exit(f'{end}: has the columns {head}, no {", ".join({*columns} - {*head})}; {NOT_READ}')
    print(f'{end}: file, class, patient are its columns {", ".join(columns)}; others are not read')
    rows = []
    for row in table:
        path, label, *patient = [(row[column] or '').strip() for column in columns]
        if path and label:
            rows.append((table.line_num, path, Sample((), label, *patient)))
    meant = look_up(f'rows of {end}', [path for _, path, _ in rows], names, account)
    samples = {}
    for line, path, sample in rows:
        if re.fullmatch(r'\d+( \d+){3,}', sample.label):
            sys.exit(f'{end}, line {line}: looks like run lengths; {NOT_READ}')
        if path in meant:
            before = samples.setdefault(meant[path], sample)
            if before != sample:
                sys.exit(f'{end}, line {line}: {path} has another answer above')
    return samples

def split_samples(samples, raw, o, account):
    """{split: paths} by --split: a number is a share of what the others leave, NAME.txt is a list,
    else it is a rule of images or their masks. The first split that takes an image keeps it."""
    rules = dict(zip(SPLITS, o.split or SHARES))
    given = [split for split in SPLITS if any(search(SPLITS[split], name) for name in samples)]
    official = not o.split and 'train' in given and len(given) > 1
    if official:  # without images for testing, these are drawn from those for training
        rules = SPLITS if 'test' in given else SPLITS | {'train': '70', 'test': '30'}
    split_of = {}
    for split, rule in rules.items():
        if rule.endswith('.txt'):
            lines = [line.strip() for line in read_lines(raw, rule) if line.strip()]
            chosen = look_up(f'lines of {rule}', lines, samples, account).values()
        else:
            chosen = [name for name, sample in samples.items() if not rule.isdigit()
                      and any(search(rule, path) for path in (name, *sum(sample.masks, [])))]
        for name in chosen:
            split_of.setdefault(name, split)
    others = [name for name in samples if name not in split_of]
    shares = [int(rule) if rule.isdigit() else 0 for rule in rules.values()]
    if others and not sum(shares):
        sys.exit(f'{raw}/{others[0]}: no rule of --split takes it; give shares, or --skip it')
    split_of.update(draw_splits(samples, others, shares, np.random.default_rng(o.seed)))
    pairs = {(samples[name].patient, split) for name, split in split_of.items()}
    times = Counter(patient for patient, _ in pairs)
    if torn := sorted(patient for patient in times if times[patient] > 1):
        print(f'warning: {len(torn)} patients in more than one split: {torn[:3]}', file=sys.stderr)
    how = 'its folders' if official else ', '.join(rules.values())
    splits = {split: sorted(name for name in split_of if split_of[name] == split)
              for split in rules}
    counts = ', '.join(f'{split} {len(names)}' for split, names in splits.items())
    print(f'{raw}: {counts} files, split by {how}; {len(others)} of them drawn')
    return splits

def draw_splits(samples, names, shares, rng):
    """{path: split} by shares of the patients of each class, rounded as in the paper's Table 3."""
    train_share, val_share, test_share = shares
    labels, split_of = {}, {}  # of each patient: the class of his first image, and his split
    for name in names:
        labels.setdefault(samples[name].patient, samples[name].label)
    for label in sorted({*labels.values()}):
        group = [patient for patient in labels if labels[patient] == label]
        spare = len(group) - (train_share > 0)  # training keeps at least one
        test = min(int(np.ceil(len(group) * test_share / sum(shares))), spare)
        val = min(len(group) * val_share // sum(shares), spare - test)
        drawn = np.split(rng.permutation(group), (test, test + val))
        for split, patients in zip(('test', 'val', 'train'), drawn):
            split_of.update(dict.fromkeys(patients.tolist(), split))
    return {name: split_of[samples[name].patient] for name in names}

def read_masks(path, image_path, values):
    """Masks uint8 (H, W) of a file, by `classify`, one for each slice of its image's file."""
    if not has_ending(path, IMAGES):
        raise ValueError(NOT_READ)
    if has_ending(image_path, VOLUMES) != has_ending(path, VOLUMES):
        raise ValueError('one of them is NIfTI, the other is not')
    for one in (image_path, path):  # programs differ in whether they turn a mask
        if has_ending(one, PICTURES) and Image.open(one).getexif().get(0x0112, 1) not in (0, 1):
            raise ValueError(f'EXIF turns {one}; save both without this tag')
    grid = nib.load(image_path) if has_ending(image_path, VOLUMES) else None
    masks, lossy = [mask for volume in read(path, grid=grid) for mask in volume], False
    if has_ending(path, PICTURES):
        with Image.open(path) as picture:
            lossy = picture.format in ('JPEG', 'MPO') or picture.info.get('compression') == 'jpeg'
            pixels = np.asarray(picture)
            palette = np.reshape(picture.getpalette() or [], (-1, 3))  # its colours, or none
            if np.ptp(palette, 1).any() and '#' not in ''.join(values):
                masks = [pixels]  # the places of the colours in the palette are the classes
            if picture.mode in ('LA', 'RGBA'):  # what is transparent shows nothing
                masks[0] = masks[0].copy()
                masks[0][pixels[..., -1] < 128] = 0
    masks = [classify(mask, values, lossy) for mask in masks]
    shown = {number for mask in masks for number in np.unique(mask).tolist()}
    if shown - {0} == {255}:
        raise ValueError('255 is its only foreground: values 0 1+255, or 0 1 255 and two --classes')
    return masks

def classify(mask, values, lossy=False):
    """Mask (H, W[, 3]) -> uint8 (H, W) of classes, which are places in `values`: of numbers or
    #colours joined by +, or of * for all others. An unnamed 255 stays, and is not scored."""
    by_colour = '#' in ''.join(values)
    grey = 0x010101 if by_colour else 1  # colours are numbers 0xrrggbb; beside them 7 is #070707
    class_of, default = {}, 255
    for place, entry in enumerate(values):
        if '*' in entry:
            default = place
        for word in re.findall('[^+*]+', entry):
            number = int(word[1:], 16) if word[0] == '#' else float(word) * grey
            class_of[number] = place
    mask = np.nan_to_num(mask, posinf=0, neginf=0)
    if mask.ndim == 2:
        mask = mask * float(grey) if by_colour else mask
    else:
        colours = mask @ np.int32((0x010000, 0x000100, 1))
        if not by_colour and np.ptp(mask, 2).any() and len(np.unique(colours[colours > 0])) > 1:
            raise ValueError('it has several colours; name them in --values, as #ff0000')
        mask = colours if by_colour else mask.max(2)
    numbers, where = np.unique(mask, return_inverse=True)
    numbers = np.where(abs(numbers - np.rint(numbers)) < 1e-3, np.rint(numbers), numbers)
    if lossy:  # the nearest counts, of the numbers named and 255
        known = np.unique([*class_of, 255])
        if by_colour or np.diff(known).min() < 32:
            raise ValueError('it is lossy, which blurs near values and colours; save it as PNG')
        numbers = known[abs(numbers[:, None] - known).argmin(1)]
    unnamed = sorted({*numbers.tolist()} - {*class_of, 255 * grey})
    if unnamed and default == 255:
        some = [f'#{int(number):06x}' if by_colour else f'{number:g}' for number in unnamed[:3]]
        raise ValueError(f'values or colours {", ".join(some)}, which --values does not name')
    classes = np.uint8([class_of.get(number, default) for number in numbers.tolist()])
    return classes[where].reshape(mask.shape)

def task_items(path, raw, sample, o):
    """In a worker: yield (pixels uint8 (S, S, c), mask uint8 (S, S) or number of the class)."""
    try:
        with tempfile.TemporaryDirectory() as new:
            files = [*series(path, new, o.modality)] if path.is_dir() else [path]
            images = [image for file in files for array in read(file)
                      for image in to_uint8(array, o.modality)]
            layers = [(number, read_masks(raw / mask_path, files[0], o.values))
                      for number, paths in enumerate(sample.masks, 1) for mask_path in paths]
        for _, masks in layers:
            if len(masks) != len(images):
                raise ValueError(f'it has {len(images)} images or slices, its mask {len(masks)}')
        for index, image in enumerate(images):
            here = [(number, masks[index]) for number, masks in layers]
            answer = lay_over(image.shape[:2], here, o) if here else o.classes.index(sample.label)
            yield resize(image, o.size), answer
    except Exception as error:  # decoders fail in every way there is; the parent ends with this
        partner = sample.label or ', '.join(sum(sample.masks, [])[:3])
        sys.exit(f'{path}: cannot be used with {partner} ({type(error).__name__}: {error})')

def lay_over(shape, layers, o):
    """Mask uint8 (S, S) of [(number of the rule, mask)], the last on top."""
    mask = np.zeros(shape, np.uint8)
    for number, layer in layers:
        if layer.shape != shape:
            raise ValueError(f'their sizes differ: {shape} and {layer.shape}')
        mask[layer > 0] = layer[layer > 0]
        mask[layer == 1] = number  # the class of the rule, if there are several
    mask[mask >= len(o.classes)] = 255  # values after those of the classes are not scored
    return np.asarray(Image.fromarray(mask).resize((o.size, o.size), Image.Resampling.NEAREST))

def write_split(folder, spilled, stem, size):
    """Write images.npy and STEM.npy; return how many images, how many of each class, and hashes."""
    channels = [pixels.shape[2] for path in spilled for pixels, _ in spilled_items(path)]
    shape = len(channels), size, size, max(channels, default=1)  # grey gets three beside colours
    if shutil.disk_usage(folder).free < 2 * np.prod(shape):  # masks, too; maps crash if it is full
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
    account, counts, shown = [], {}, {}  # counts and shown: of each split
    samples = find_samples(raw, o, account)
    labels = sorted({sample.label for sample in samples.values() if not sample.masks})
    complete_options(o, labels)
    splits = split_samples(samples, raw, o, account)
    for what, n, left, _ in account:
        print(f'{what}: {n} = {n - len(left)} used + {len(left)} left out  {", ".join(left[:3])}')
    harm = [f'{what}: {len(left)} of {n} are left over, as {", ".join(left[:3])}'
            for what, n, left, stops in account if left and stops]
    if harm and not o.partial:
        sys.exit(f'{raw}: {"; ".join(harm)}; mend this, --skip them, or allow it by --partial')
    kind, stem = ('classification', 'labels') if labels else ('segmentation', 'masks')
    holders = {}  # {hash of an image: the splits that it is in}
    with appearing(folder, pool) as part:
        for split, names in splits.items():
            (part / split).mkdir()
            calls = [(raw / name, raw, samples[name], o) for name in names]
            spilled = [*in_order(pool, o.workers, part, task_items, calls, split)]
            counts[split], shown[split], hashes = write_split(part / split, spilled, stem, o.size)
            for key in hashes:
                holders.setdefault(key, []).append(split)
            for path in spilled:
                path.unlink()
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
    if not o.classes:
        named = [value or 'background' for value in o.values]
        o.classes = labels or (named if len(named) > 2 else ['background', 'foreground'])
    one_each = len(o.masks) > 1  # a mask a class, of an outside and an inside
    if one_each and (len(o.classes) != len(o.masks) + 1 or len(o.values) not in (0, 2)):
        sys.exit('--classes: background and one for each mask; --values: outside and inside')
    inside = ['*'] if one_each or o.objects else map(str, range(1, len(o.classes)))
    o.values = o.values or ['0', *inside]
    # Names of classes that tell left from right, some as two of a pair, forbid to mirror images.
    words = {*re.findall('[a-z]+', ' '.join(o.classes).lower())}
    tells = words & {'left', 'right', 'sinister', 'dexter'}
    o.sided = bool(o.sided or tells or {'l', 'r'} <= words or {'od', 'os'} <= words)

def check_classes(raw, o, shown):
    """Print how many images of each split show each class, and stop if training lacks one."""
    print(f'{"images that show":<26}' + ''.join(f'{split:>8}' for split in shown))
    for number, name in enumerate(o.classes):
        print(f'{name:<26}' + ''.join(f'{images[number]:>8}' for images in shown.values()))
    unseen = [name for number, name in enumerate(o.classes) if not shown['train'][number]]
    in_test_alone = {*shown['test']} - {*shown['train'], 255}
    too_few = len(o.classes) - len(unseen) < 2
    may_lack = o.partial or o.task in TASKS  # whose classes are known
    if in_test_alone or too_few or not shown['test'] or unseen and not may_lack:
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
fhu | Ultrasound | fetal head | 499 200 300 | account | kaggle.com/datasets/ankit8467 (first: python -m tests.lab.convert fhu RAW/fhu) | --images '(.*HC)\.png' --masks 'filled/(.*HC)_Annotation' --values 0 * --patient '\d+(?=_[^/]*HC)'
autopet-org | PET | organs | 18076 6386 10465 | form | github.com/YichiZhang98/SegAnyPET | --images 'PETCT_([^/]*)/([^/]*)/SUV\.nii' --masks 'PETCT_([^_]*)_(.*)_\.nii' --values 0 1 2 3 4 5 6 7 8 9 10 11+12 --patient 'PETCT_[^/_]+' --modality SUV --classes background liver left-kidney right-kidney heart spleen aorta left-lower-lobe right-lower-lobe left-upper-lobe right-upper-lobe right-middle-lobe
slsc-s | Photo | skin lesion | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-s RAW/slsc-s) | --values 0 * --split train/ valid/ test/
slsc-c | Photo | 7 skin diseases | 6675 1911 964 | open | huggingface.co/datasets/makhresearch (first: python -m tests.lab.convert slsc-c RAW/slsc-c) | --labels classes.csv --classes BKL NV DF MEL VASC BCC AKIEC --split train/ valid/ test/'''.strip().splitlines())}

# --- the command ---
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
    task = parser.add_argument_group('a labelled task, also over the rules of Table 3').add_argument
    several = dict(nargs='+', default=[])
    task('--task', help='its name')
    task('--modality', type=modality_of, choices=(*MODALITIES, 'SUV'), help='window of volumes')
    task('--images', help='rule of the images (default, beside masks: (.*)images/(.*))')
    task('--masks', **several, help='rule ((.*)masks/(.*)), or one for each class after the first')
    task('--objects', action='store_true', help='several masks of an image are objects: unite them')
    task('--skip', help='rule of files, images or masks or both, to leave out')
    task('--labels', **several, help='CSV, and its columns of file, class, patient (first two)')
    task('--level', type=int, default=0, choices=(0, 1, 2), help='class: 1 the folder, 2 one above')
    task('--classes', **several, help='names in order (default: background foreground or as found)')
    task('--values', **several, help='of classes, as 0 420+421 #ff0000 *; unnamed 255: not scored')
    task('--partial', action='store_true', help='go on without what has no partner or no image')
    task('--sided', action='store_true', help='classes tell left from right: mirror no image')
    task('--patient', help='rule: what it finds in a path is the patient (default: the path)')
    task('--split', nargs=3, default=[], help='shares, rules or .txt (as folders say, or 50 20 30)')
    return parser.parse_args(words)

def main():
    """Prepare a task, or every source below RAW."""
    o = parse(sys.argv[1:])
    if o.task in TASKS:  # splits are drawn unless its row names them; the command line comes last
        defaults = ['--modality', TASKS[o.task].modality, '--split', *SHARES]
        o = parse([*defaults, *shlex.split(TASKS[o.task].options), *sys.argv[1:]])
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
        sys.exit(f'--raw "{o.raw}": there is no such folder of <Modality>/<source>/** or of a task; '
                 f'{NOT_READ}')
    prepare = prepare_task if o.task else prepare_sources
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
