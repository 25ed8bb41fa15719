"""Phantoms: simulated images of ten modalities, with masks and classes.

    python -m tests.lab.phantoms --out data/phantoms-64                     as pretrain.py --demo
    python -m tests.lab.phantoms --task phantom-vessels --out data/phantom-vessels

Each image follows from the physics of its modality, in a few lines. The files are written as a
hospital would have them, below --raw: images to its folder raw, masks to its folder labels. Then
prepare_medverse.py prepares them as it does any others. CT, PET, MR and X-ray see the same bodies.

An eleventh modality needs a function and a row of PHANTOMS here, and its name and intensity rule
in prepare_medverse.py.
"""
import argparse
import contextlib
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

import prepare_medverse

AIR, FAT, MUSCLE, GUT, LUNG, LIVER, KIDNEY, SPLEEN, BONE, BLOOD, LESION = range(11)
TISSUES = {     # attenuation of X-rays (HU), T1 and T2 (ms), uptake of FDG (SUV)
    'air': (-1000, 1, 1, 0),
    'fat': (-100, 350, 90, 0.4),
    'muscle': (50, 1000, 40, 0.8),
    'gut': (20, 1600, 130, 1.5),
    'lung': (-820, 1200, 8, 0.5),       # T2 is short in lung and bone, so both are dark
    'liver': (80, 650, 45, 2.5),
    'kidney': (130, 1250, 95, 6),
    'spleen': (100, 1150, 85, 2),
    'bone': (600, 450, 15, 1.5),
    'blood': (140, 1500, 150, 2.2),
    'lesion': (40, 1300, 110, 10),
}
HOUNSFIELD, T1, T2, UPTAKE = np.array(list(TISSUES.values())).T
ORGANS = (      # ellipsoids in painting order: tissue, centre and radii in cm,
                # x to the right, y to the front, z to the head
    (FAT, (0, 0, 0), (17, 12, 99)),
    (MUSCLE, (0, 0, 0), (15, 10, 99)),
    (FAT, (0, 2, -16), (13, 7, 9)),
    (GUT, (3, 4, -15), (5, 3, 4)),
    (LUNG, (8, 0, 10), (7, 8, 14)),
    (LUNG, (-8, 0, 10), (7, 8, 14)),
    (LIVER, (5, 2, -4), (9, 7, 7)),
    (SPLEEN, (-11, -3, -4), (3, 5, 5)),
    (GUT, (-6, 3, -4), (5, 5, 4)),
    (KIDNEY, (6, -4, -10), (3, 4, 6)),
    (KIDNEY, (-6, -4, -9), (3, 4, 6)),
    (BLOOD, (-3, 3, 4), (6, 5, 6)),     # heart
    (BONE, (0, -6, 0), (4, 2, 99)),     # spine
    (BLOOD, (-2, -2, 0), (1.4, 1.4, 99)),       # aorta
)

# --- tools ----------------------------------------------------------------------------------------

def zoom(picture, side):
    """A picture resized to (side, side) by cubic interpolation, averaged where it shrinks."""
    picture = Image.fromarray(np.float32(picture))
    return np.asarray(picture.resize((side, side), Image.BICUBIC))

def field(rng, side, down, across):
    """A smooth random picture (side, side) around 0 with so many details down and across."""
    return zoom(rng.standard_normal((down, across)), side)

def plane(rng, side, shake=0.0):
    """The pixels as complex numbers x + iy, each from -1 to 1, shaken smoothly."""
    line = np.linspace(-1, 1, side)
    shaken = field(rng, side, 6, 6) + 1j * field(rng, side, 6, 6)
    return line + 1j * line[:, None] + shake * shaken

def point(rng, low, high):
    """A random complex number."""
    return complex(*rng.uniform(low, high, 2))

def light(*layers):
    """Red, green and blue (S, S, 3) of white light behind layers that absorb it.

    A layer is an amount (S, S), and how much of it absorbs red, green and blue.
    """
    absorbed = sum(np.multiply.outer(amount, colour) for amount, colour in layers)
    return 255 * np.exp(-absorbed)

# --- four modalities of one body ------------------------------------------------------------------
# Each function of a modality takes a random generator, the side of its image in pixels, and 1 for a
# sick or 0 for a healthy subject. It returns an image or a volume, and a mask.

def torso(rng, shape, sick):
    """Tissues of a random body, 40 cm a side; the sick have lesions in lung, liver or spleen."""
    x, y, z = np.ogrid[-20:20:shape[0] * 1j, -20:20:shape[1] * 1j, -20:20:shape[2] * 1j]
    z += rng.uniform(0, 6)      # bodies lie higher or lower

    def ellipsoid(centre, radii):
        """1 on its surface, less inside."""
        squares = [((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), centre, radii)]
        return squares[0] + squares[1] + squares[2]

    tissue = np.zeros(shape, np.uint8)
    for organ, centre, radii in ORGANS:
        spread = rng.normal(1, 0.07, 6)
        tissue[ellipsoid(centre * spread[:3], radii * spread[3:]) < 1] = organ
    cage = abs(ellipsoid((0, 0, 6), (14, 9.5, 20)) - 1) < 0.1
    tissue[cage & (np.cos(2.2 * z + y) > 0) & (z > -8)] = BONE      # sloping ribs
    places = np.argwhere(np.isin(tissue, (LUNG, LIVER, SPLEEN)))
    for i, j, k in rng.choice(places, sick * rng.integers(1, 4)):
        centre = x.flat[i], y.flat[j], z.flat[k]
        tissue[ellipsoid(centre, rng.uniform(1, 3, 3)) < 1] = LESION
    return tissue

def ct(rng, side, sick):
    """Attenuation in Hounsfield units (air -1000, water 0), with the noise of the detector."""
    tissue = torso(rng, (side, side, 8), sick)
    noise = rng.normal(0, 20, tissue.shape).round()
    return np.int16(HOUNSFIELD[tissue] + noise), tissue

def pet(rng, side, sick):
    """Tracer uptake in SUV; the coarse bins of the detector count decays (Poisson)."""
    tissue = torso(rng, (side, side, 8), sick)
    uptake = (UPTAKE * rng.uniform(0.6, 1.6, len(UPTAKE)))[tissue]
    slices = []
    for image in uptake.T:
        counts = rng.poisson(50 * abs(zoom(image, side // 4)))
        slices.append(zoom(counts / 50, side))
    return np.stack(slices).T, tissue

def mr(rng, side, sick):
    """Spin echo: (1 - exp(-TR / T1)) exp(-TE / T2), under a smooth bias of the coil and Rician
    noise."""
    tissue = torso(rng, (side, side, 8), sick)
    t1_weighted, t2_weighted = (500, 12), (3000, 70)    # repetition and echo time, ms
    repetition, echo = rng.choice((t1_weighted, t2_weighted)) * rng.uniform(0.7, 1.4, 2)
    bias = np.exp(0.3 * field(rng, side, 3, 3))[..., None]
    contrast = (1 - np.exp(-repetition / T1)) * np.exp(-echo / T2)
    signal = 1000 * bias * contrast[tissue]
    noise = rng.normal(0, 15, (*tissue.shape, 2)) @ (1, 1j)
    return np.float32(abs(signal + noise) * (tissue > 0)), tissue

def xray(rng, side, sick):
    """Photons fall as exp(-attenuation from back to front); the film shows -log of them."""
    tissue = torso(rng, (side // 2, 40, side // 2), sick)
    tissue = tissue.T[::-1, :, ::-1]    # head to foot, back to front, right to left
    film = zoom((1 + HOUNSFIELD / 1000)[tissue].sum(1), side).clip(0)
    organs = (BLOOD, LUNG)
    mask = np.select([(tissue == organ).sum(1) > 4 for organ in organs], organs)
    return 255 * (film / film.max()) ** rng.uniform(1, 2), mask.repeat(2, 0).repeat(2, 1)

# --- six others -----------------------------------------------------------------------------------

def ultrasound(rng, side, sick):
    """Log of echoes with Rayleigh speckle, which fade along each beam; shown as a fan."""
    distance = abs(plane(rng, side, 0.06) - point(rng, -0.4, 0.3))
    lesion = sick & (distance < rng.uniform(0.2, 0.35))
    cyst, tumour, stone = -3.5, -1.4, 1.6
    echo = np.where(lesion, rng.choice((cyst, tumour, stone)), 0.8 * field(rng, side, 16, 4))
    shade = np.cumsum(2 * np.exp(echo), 0) / side       # what scatters more absorbs more
    echo += np.log(rng.rayleigh(1, echo.shape)) - shade
    beams = np.pad(210 + 46 * echo[1:-1, 1:-1], 1)      # black at its borders, so outside the fan
    z = plane(rng, side) + 1.3j     # from the probe
    depth, angle = abs(z) / 1.9 - 0.2, np.angle(z / 1j) / 1.1 + 0.5
    fan = tuple(np.int64(side * np.clip((depth, angle), 0, 0.999)))
    return beams[fan], lesion[fan]

def fundus(rng, side, sick):
    """Blood absorbs green and blue; its vessels follow circles through the optic disc."""
    eye = abs(plane(rng, side)) < 0.95
    z = plane(rng, side, 0.03)
    disc = rng.choice((-0.5, 0.5))
    centres = disc + np.exp(1j * rng.normal(0, 0.5, 9)) / rng.uniform(-1.4, 1.4, 9)
    distance = np.min([abs(abs(z - c) - abs(disc - c)) for c in centres], 0)
    vessels = distance < 0.025 - 0.015 * abs(z - disc)
    macula = 0.6 * np.exp(-abs(4 * z + disc) ** 2)
    exudates = sick * (field(rng, side, 30, 30) > 1.8)
    white = np.exp(-abs((z - disc) / 0.2) ** 4) + exudates
    tint = rng.uniform((-0.1, 0.7, 1.5), (0.3, 1.4, 3))
    shade = 0.6 * abs(z) ** 2 + 0.1 * field(rng, side, 5, 5) + 9 * ~eye
    image = light((vessels + macula, (0.3, 1, 0.8)), (white, (-0.2, -0.8, -0.9)), (1, tint),
                  (shade, (1, 1, 1)))
    return image, eye & vessels

def oct_scan(rng, side, sick):
    """Reflectivity of the retina's layers around the pit; drusen lift the lowest."""
    z = plane(rng, side)
    floor = 0.2 + 0.1 * field(rng, side, 1, 3)
    from_pit = (z.real - rng.uniform(-0.4, 0.4)) / rng.uniform(0.15, 0.35)
    top = floor - 0.7 + 0.35 * np.exp(-abs(from_pit) ** 2)
    drusen = sick * 0.12 * field(rng, side, 1, 16).clip(0)
    layer = (z.imag - top) / (floor - drusen - top)     # 0 at the top, 1 at the bottom
    levels = (0, 180, 100, 120, 60, 130, 50, 50, 190, 80, 230, 120, 110, 90, 70, 50, 20, 0)
    echo = np.interp(10 * layer, range(len(levels)), levels)
    return echo * rng.rayleigh(1, echo.shape) ** 0.5, (layer > 0) & (layer < 1)

def pathology(rng, side, sick):
    """Haematoxylin stains nuclei blue, eosin the rest pink; glands have a dense wall."""
    gland = field(rng, side, 7, 7)
    z = rng.uniform(17, 23) * plane(rng, side, 0.05)
    inside, wall = gland > 1.3, gland > 0.2
    level = np.select([inside, wall], [9, 0.45], 0.9 - 0.4 * sick)
    level = level + 0.2 * field(rng, side, 16, 16)
    nuclei = np.cos(z.real) * np.cos(z.imag) > level.clip(0.3)      # bumps of a warped egg crate
    blue, pink = rng.uniform(0.7, 1.4, (2, 1)) * ((0.9, 0.95, 0.4), (0.1, 0.9, 0.3))
    rest = (gland < 1.3) * (0.5 + 0.15 * field(rng, side, 60, 10))
    return light((nuclei, blue), (rest, pink)), nuclei

def endoscope(rng, side, sick):
    """Light of the camera fades into a wet tube; folds ring it, water glints."""
    z = plane(rng, side, 0.05)
    lumen, polyp = point(rng, -0.4, 0.4), point(rng, -0.4, 0.4)
    tube, bump = abs(z - lumen), abs(z - polyp) / rng.uniform(0.25, 0.5)
    polyp = sick & (bump < 1)
    folds = 0.4 * tube * np.cos(rng.uniform(9, 16) * tube ** 0.6 + rng.uniform(0, 6))
    wall = tube / (tube + 0.4) * (1.1 + folds)
    shade = -np.log(np.where(polyp, 0.85 - 0.5 * bump ** 2, wall))
    corners = abs(plane(rng, side)) > 1.2
    glints = field(rng, side, 50, 50) > 2
    tint = rng.uniform((-0.2, 0.4, 0.5), (0, 0.8, 1))
    image = light((shade, (1, 1.4, 1.5)), (9 * corners - 2 * glints, (1, 1, 1)), (1, tint))
    return image, polyp

def photo(rng, side, sick):
    """Melanin absorbs blue most; a melanoma is ragged and of several colours."""
    z = plane(rng, side)
    lesion = abs(plane(rng, side, 0.03 + 0.07 * sick)) / rng.uniform(0.3, 0.65)
    melanin = 1.2 + (0.1 + 0.3 * sick) * field(rng, side, 10, 10)
    melanin = melanin / (1 + np.exp(12 * (lesion - 1)))
    hue = melanin * sick * field(rng, side, 6, 6)
    skin = rng.uniform(0.3, 0.8) + 0.1 * field(rng, side, 3, 3)
    hairs = 0
    for angle, radius in rng.uniform((0, 3), (6, 5), (rng.integers(9), 2)):     # arcs of circles
        hairs = hairs + (abs(abs(z - 4 * np.exp(1j * angle)) - radius) < 0.01)
    image = light((melanin + skin, (0.6, 1, 1.2)), (hue, (0.2, 0, -0.2)), (hairs, (1, 1, 1)))
    return image, lesion < 1

# --- files ----------------------------------------------------------------------------------------

PHANTOMS = {    # images in a file, and the function that draws it
    'CT': (8, ct),
    'PET': (8, pet),
    'MR': (8, mr),
    'X-ray': (1, xray),
    'Ultrasound': (1, ultrasound),
    'Fundus': (1, fundus),
    'OCT': (1, oct_scan),
    'Pathology': (1, pathology),
    'Endoscope': (1, endoscope),
    'Photo': (1, photo),
}
TASKS = {       # the modality that is simulated, and options of prepare_medverse.py
    'phantom-vessels': ('Fundus', ['--images', 'phantom-fundus/(.*)',
                                   '--masks', 'labels/Fundus/(.*)']),
    'phantom-organs': ('CT', ['--images', 'phantom-ct/(.*)', '--masks', 'labels/CT/(.*)',
                              '--classes', *TISSUES]),
    'phantom-lesion': ('Photo', ['--images', 'raw/Photo/']),
}

def write_phantom(folder, modality, n, seed, side=160):
    """Write subject n; every other one is sick.

    Its image or volume goes to folder/raw/<Modality>/<source>/<class>, its mask to
    folder/labels/<Modality>/<class>.
    """
    depth, draw = PHANTOMS[modality]
    sick = n % 2
    image, mask = draw(np.random.default_rng((seed, n)), side, sick)
    classes = ('naevus', 'melanoma') if modality == 'Photo' else ('normal', 'lesion')
    source = f'phantom-{modality.lower()}'
    if modality == 'PET':
        source += '-suv'        # tells prepare_medverse.py the unit
    save(folder / 'raw' / modality / source / classes[sick], n, image, depth)
    save(folder / 'labels' / modality / classes[sick], n, mask, depth)

def save(folder, n, array, depth):
    """Write an array as file number n: a volume of 40 cm a side as NIfTI, an image as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    if depth > 1:
        pixel = 400 / len(array)        # mm; slices are 50 mm apart
        scan = nib.Nifti1Image(array, np.diag((pixel, pixel, 50, 1)))
        nib.save(scan, folder / f'{n:04d}.nii.gz')
    else:
        picture = Image.fromarray(np.uint8(np.clip(array, 0, 255)))
        picture.save(folder / f'{n:04d}.png')

def simulate(raw, modalities, count, seed):
    """Write the files of `count` images of each modality below `raw`, a process a core."""
    calls = []
    for modality in modalities:
        depth, _ = PHANTOMS[modality]
        files = -(-count // depth)      # rounded up
        calls += [(modality, n) for n in range(files)]
    with ProcessPoolExecutor(initializer=prepare_medverse.follow_parent) as pool:
        written = pool.map(write_phantom, repeat(raw), *zip(*calls), repeat(seed))
        for _ in tqdm(written, 'phantoms', len(calls), unit='file'):
            pass

@contextlib.contextmanager
def alone(raw):
    """Wait until no other program makes phantoms below `raw`, and keep others from it.

    Yields whether it had to wait. The lock ends with the process, however that ends.
    """
    path = Path(f'{raw}.lock')
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    with open(path, 'w') as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            print(f'{raw}: not locked, as this system has no fcntl')
        except BlockingIOError:
            print(f'{raw}: another program makes phantoms here; waiting for it', flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            waited = True
        yield waited

def is_finished(o):
    """Whether another program has made what these options ask for."""
    if o.task:
        return Path(o.out, 'meta.json').exists()
    return len(list(Path(o.out).glob('phantom-*/meta.json'))) == len(PHANTOMS)

def parse():
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m tests.lab.phantoms',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--raw', default='data/phantoms',
                        help='folder of the simulated files (default: %(default)s)')
    parser.add_argument('--out', required=True,
                        help='folder of the prepared sources, or of the task')
    parser.add_argument('--task', choices=TASKS, help='make a labelled task instead')
    parser.add_argument('--size', type=int, default=64,
                        help='side of the prepared images in pixels (default: %(default)s)')
    parser.add_argument('--count', type=int, default=200,
                        help='images of each modality (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0,
                        help="of the bodies and of a task's split (default: %(default)s)")
    o = parser.parse_args()
    if o.count < 1:
        raise SystemExit(f'--count {o.count}: must be 1 or more')
    return o

def main():
    """Simulate, then have prepare_medverse.py do its work."""
    o = parse()
    with alone(o.raw) as waited:
        if waited and is_finished(o):
            return
        words = ['--out', o.out, '--size', str(o.size), '--seed', str(o.seed)]
        if o.task:
            modality, rules = TASKS[o.task]
            simulate(Path(o.raw), [modality], o.count, o.seed)
            words += ['--raw', o.raw, '--task', o.task, '--modality', modality, *rules]
        else:
            simulate(Path(o.raw), PHANTOMS, o.count, o.seed)
            words += ['--raw', f'{o.raw}/raw']
        sys.argv[1:] = words
        prepare_medverse.main()

if __name__ == '__main__':
    main()
