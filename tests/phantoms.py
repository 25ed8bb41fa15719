"""Phantoms: ten modalities simulated from their physics, with masks and classes, for the demo, for tests and to try things.

    python tests/phantoms.py --out data/phantoms-64 --size 64                   the ten sources of pretrain.py --demo
    python tests/phantoms.py --task phantom-vessels --out data/phantom-vessels  or phantom-organs, phantom-lesion

Simulates files as a hospital would have them below --raw (its folders raw and labels), and has prepare_medverse.py prepare
them as it does any others. An eleventh modality takes its name and rule there, and a function and a row of PHANTOMS here.
"""
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from prepare_medverse import parse_options  # noqa: E402

TASKS = {  # the modality that is simulated, and options of prepare_medverse.py
    'phantom-vessels': ('Fundus', ['--images', 'phantom-fundus/(.*)', '--masks', 'labels/Fundus/(.*)']),
    'phantom-organs': ('CT', ['--images', 'phantom-ct/(.*)', '--masks', 'labels/CT/(.*)', '--classes', *'''
        air fat muscle gut lung liver kidney spleen bone blood lesion'''.split()]),
    'phantom-lesion': ('Photo', ['--images', 'raw/Photo/']),
}

@dataclass
class Options:
    """The options; the comment beside each is its --help."""
    raw: str = 'data/phantoms'  # folder of the simulated files
    out: str = ''  # folder of the prepared sources, or of the task
    task: str = ''  # simulate and prepare a labelled task instead
    size: int = 64  # side of the prepared images, px
    count: int = 200  # images of each modality
    seed: int = 0  # of the bodies and of a task's split

# Tissues = mask classes: air 0, fat 1, muscle 2, gut 3, lung 4, liver 5, kidney 6, spleen 7, bone 8, blood 9, lesion 10
HOUNSFIELD = np.array([-1000, -100, 50, 20, -820, 80, 130, 100, 600, 140, 40])  # attenuation of X-rays
T1 = np.array([1, 350, 1000, 1600, 1200, 650, 1250, 1150, 450, 1500, 1300])  # relaxation times, ms
T2 = np.array([1, 90, 40, 130, 8, 45, 95, 85, 15, 150, 110])  # short in lung and bone, which are dark
UPTAKE = np.array([0, 0.4, 0.8, 1.5, 0.5, 2.5, 6, 2, 1.5, 2.2, 10])  # of FDG, SUV
# Organs as ellipsoids, in painting order: tissue, centre, radii in cm (x to the right, y anterior, z superior)
ORGANS = ((1, 0, 0, 0, 17, 12, 99), (2, 0, 0, 0, 15, 10, 99), (1, 0, 2, -16, 13, 7, 9), (3, 3, 4, -15, 5, 3, 4),
          (4, 8, 0, 10, 7, 8, 14), (4, -8, 0, 10, 7, 8, 14), (5, 5, 2, -4, 9, 7, 7), (7, -11, -3, -4, 3, 5, 5),
          (3, -6, 3, -4, 5, 5, 4), (6, 6, -4, -10, 3, 4, 6), (6, -6, -4, -9, 3, 4, 6), (9, -3, 3, 4, 6, 5, 6),
          (8, 0, -6, 0, 4, 2, 99), (9, -2, -2, 0, 1.4, 1.4, 99))

def zoom(picture, side):  # to (side, side) by cubic interpolation, averaged where it shrinks
    return np.asarray(Image.fromarray(np.float32(picture)).resize((side, side), Image.BICUBIC))

def field(rng, side, *details):  # a smooth random picture around 0, of so many details down and across
    return zoom(rng.standard_normal(details), side)

def plane(rng, side, shake=0.0):  # the pixels as complex numbers, x + iy from -1 to 1, shaken smoothly
    line = np.linspace(-1, 1, side)
    return line + 1j * line[:, None] + shake * (field(rng, side, 6, 6) + 1j * field(rng, side, 6, 6))

def light(*layers):  # RGB of white light after layers: each an amount (S, S), and what that absorbs of red, green, blue
    return 255 * np.exp(-sum(np.multiply.outer(*layer) for layer in layers))

def torso(rng, shape, sick):  # tissues of a random body, 40 cm a side; the sick have lesions in lung, liver or spleen
    x, y, z = np.ogrid[-20:20:shape[0] * 1j, -20:20:shape[1] * 1j, -20:20:shape[2] * 1j]
    z += rng.uniform(0, 6)  # bodies lie higher or lower
    tissue = np.zeros(shape, np.uint8)
    def ellipsoid(a, b, c, p, q, r):  # 1 on its surface
        return ((x - a) / p) ** 2 + ((y - b) / q) ** 2 + ((z - c) / r) ** 2
    for organ, *place in ORGANS:
        tissue[ellipsoid(*place * rng.normal(1, 0.07, 6)) < 1] = organ
    tissue[(abs(ellipsoid(0, 0, 6, 14, 9.5, 20) - 1) < 0.1) & (np.cos(2.2 * z + y) > 0) & (z > -8)] = 8  # sloping ribs
    for i, j, k in rng.choice(np.argwhere(np.isin(tissue, (4, 5, 7))), sick * rng.integers(1, 4)):
        tissue[ellipsoid(x.flat[i], y.flat[j], z.flat[k], *rng.uniform(1, 3, 3)) < 1] = 10
    return tissue

def ct(rng, side, sick):  # attenuation in Hounsfield units (air -1000, water 0), with the noise of the detector
    tissue = torso(rng, (side, side, 8), sick)
    return np.int16(HOUNSFIELD[tissue] + rng.normal(0, 20, tissue.shape).round()), tissue

def pet(rng, side, sick):  # tracer uptake in SUV; the coarse bins of the detector count decays (Poisson)
    tissue = torso(rng, (side, side, 8), sick)
    uptake = (UPTAKE * rng.uniform(0.6, 1.6, len(UPTAKE)))[tissue]
    return np.stack([zoom(rng.poisson(50 * abs(zoom(image, side // 4))) / 50, side) for image in uptake.T]).T, tissue

def mr(rng, side, sick):  # spin echo: (1 - exp(-TR / T1)) exp(-TE / T2), under a smooth coil bias, with Rician noise
    tissue = torso(rng, (side, side, 8), sick)
    repetition, echo = rng.choice(((500, 12), (3000, 70))) * rng.uniform(0.7, 1.4, 2)  # T1- or T2-weighted, ms
    bias = np.exp(0.3 * field(rng, side, 3, 3))[..., None]
    signal = 1000 * bias * ((1 - np.exp(-repetition / T1)) * np.exp(-echo / T2))[tissue]
    return np.float32(abs(signal + rng.normal(0, 15, (*tissue.shape, 2)) @ (1, 1j)) * (tissue > 0)), tissue

def xray(rng, side, sick):  # photons fall as exp(-attenuation from back to front); the film shows -log of them
    tissue = torso(rng, (side // 2, 40, side // 2), sick).T[::-1, :, ::-1]  # head to foot, back to front, right to left
    film = zoom((1 + HOUNSFIELD / 1000)[tissue].sum(1), side).clip(0)
    mask = np.select([(tissue == organ).sum(1) > 4 for organ in (9, 4)], (9, 4))
    return 255 * (film / film.max()) ** rng.uniform(1, 2), mask.repeat(2, 0).repeat(2, 1)

def ultrasound(rng, side, sick):  # log of echoes, with Rayleigh speckle, which fade along each beam; shown as a fan
    lesion = sick & (abs(plane(rng, side, 0.06) - rng.uniform(-0.4, 0.3, 2) @ (1, 1j)) < rng.uniform(0.2, 0.35))
    echo = np.where(lesion, rng.choice((-3.5, -1.4, 1.6)), 0.8 * field(rng, side, 16, 4))  # a cyst, a tumour or a stone
    shade = np.cumsum(2 * np.exp(echo), 0) / side  # what scatters more absorbs more
    echo += np.log(rng.rayleigh(1, echo.shape)) - shade
    z = plane(rng, side) + 1.3j  # from the probe
    fan = tuple(np.int64(side * np.clip((abs(z) / 1.9 - 0.2, np.angle(z / 1j) / 1.1 + 0.5), 0, 0.999)))
    return np.pad(210 + 46 * echo[1:-1, 1:-1], 1)[fan], lesion[fan]  # black borders, so outside the fan

def fundus(rng, side, sick):  # blood absorbs green and blue; its vessels follow circles through the disc
    eye, z, disc = abs(plane(rng, side)) < 0.95, plane(rng, side, 0.03), rng.choice((-0.5, 0.5))
    centres = disc + np.exp(1j * rng.normal(0, 0.5, 9)) / rng.uniform(-1.4, 1.4, 9)
    vessels = np.min([abs(abs(z - c) - abs(disc - c)) for c in centres], 0) < 0.025 - 0.015 * abs(z - disc)
    blood = vessels + 0.6 * np.exp(-abs(4 * z + disc) ** 2)  # the macula is dark
    white = np.exp(-abs((z - disc) / 0.2) ** 4) + sick * (field(rng, side, 30, 30) > 1.8)  # exudates
    return light((blood, (0.3, 1, 0.8)), (white, (-0.2, -0.8, -0.9)), (1, rng.uniform((-0.1, 0.7, 1.5), (0.3, 1.4, 3))),
                 (0.6 * abs(z) ** 2 + 0.1 * field(rng, side, 5, 5) + 9 * ~eye, (1, 1, 1))), eye & vessels

def oct_scan(rng, side, sick):  # reflectivity of the retina's layers around the pit; drusen lift the lowest
    z, floor = plane(rng, side), 0.2 + 0.1 * field(rng, side, 1, 3)
    top = floor - 0.7 + 0.35 * np.exp(-abs((z.real - rng.uniform(-0.4, 0.4)) / rng.uniform(0.15, 0.35)) ** 2)
    layer = (z.imag - top) / (floor - sick * 0.12 * field(rng, side, 1, 16).clip(0) - top)  # from 0, the top, to 1
    levels = (0, 180, 100, 120, 60, 130, 50, 50, 190, 80, 230, 120, 110, 90, 70, 50, 20, 0)
    echo = np.interp(10 * layer, range(18), levels)
    return echo * rng.rayleigh(1, echo.shape) ** 0.5, (layer > 0) & (layer < 1)

def pathology(rng, side, sick):  # haematoxylin stains nuclei blue, eosin the rest pink; glands have a dense wall
    gland, z = field(rng, side, 7, 7), rng.uniform(17, 23) * plane(rng, side, 0.05)
    level = np.select([gland > 1.3, gland > 0.2], [9, 0.45], 0.9 - 0.4 * sick) + 0.2 * field(rng, side, 16, 16)
    nuclei = np.cos(z.real) * np.cos(z.imag) > level.clip(0.3)  # the bumps of a warped egg crate
    blue, pink = rng.uniform(0.7, 1.4, (2, 1)) * ((0.9, 0.95, 0.4), (0.1, 0.9, 0.3))
    return light((nuclei, blue), ((gland < 1.3) * (0.5 + 0.15 * field(rng, side, 60, 10)), pink)), nuclei

def endoscope(rng, side, sick):  # light of the camera fades into a wet tube; folds ring it, water glints
    z, lumen, polyp = plane(rng, side, 0.05), *rng.uniform(-0.4, 0.4, (2, 2)) @ (1, 1j)
    tube, bump = abs(z - lumen), abs(z - polyp) / rng.uniform(0.25, 0.5)
    folds = 0.4 * tube * np.cos(rng.uniform(9, 16) * tube ** 0.6 + rng.uniform(0, 6))
    shade = -np.log(np.where(sick & (bump < 1), 0.85 - 0.5 * bump ** 2, tube / (tube + 0.4) * (1.1 + folds)))
    view = 9 * (abs(plane(rng, side)) > 1.2) - 2 * (field(rng, side, 50, 50) > 2)  # dark corners, glints
    tint = rng.uniform((-0.2, 0.4, 0.5), (0, 0.8, 1))
    return light((shade, (1, 1.4, 1.5)), (view, (1, 1, 1)), (1, tint)), sick & (bump < 1)

def photo(rng, side, sick):  # melanin absorbs blue most; in melanoma it is ragged and of several colours
    z, lesion = plane(rng, side), abs(plane(rng, side, 0.03 + 0.07 * sick)) / rng.uniform(0.3, 0.65)
    melanin = (1.2 + (0.1 + 0.3 * sick) * field(rng, side, 10, 10)) / (1 + np.exp(12 * (lesion - 1)))
    hue, skin = melanin * sick * field(rng, side, 6, 6), rng.uniform(0.3, 0.8) + 0.1 * field(rng, side, 3, 3)
    arcs = rng.uniform((0, 3), (6, 5), (rng.integers(9), 2))  # direction of their centres, radii
    hairs = sum(abs(abs(z - 4 * np.exp(1j * angle)) - radius) < 0.01 for angle, radius in arcs)
    return light((melanin + skin, (0.6, 1, 1.2)), (hue, (0.2, 0, -0.2)), (hairs, (1, 1, 1))), lesion < 1

PHANTOMS = {'CT': (8, ct), 'PET': (8, pet), 'MR': (8, mr), 'X-ray': (1, xray), 'Ultrasound': (1, ultrasound),
            'Fundus': (1, fundus), 'OCT': (1, oct_scan), 'Pathology': (1, pathology), 'Endoscope': (1, endoscope),
            'Photo': (1, photo)}  # images in a file, and what draws its image or volume, and mask, by (rng, side, sick)

def write_phantom(folder, modality, n, seed, side=160):
    """Subject n, every other one sick: an image or volume to folder/raw/<Modality>/<source>/<class>, its mask to
    folder/labels/<Modality>/<class>. CT, PET, MR and X-ray see the same body."""
    depth, draw = PHANTOMS[modality]
    image, mask = draw(np.random.default_rng((seed, n)), side, n % 2)
    kind = (('naevus', 'melanoma') if modality == 'Photo' else ('normal', 'lesion'))[n % 2]
    source = 'phantom-' + modality.lower() + '-suv' * (modality == 'PET')
    raw, labels = folder / 'raw' / modality / source / kind, folder / 'labels' / modality / kind
    for place, array in ((raw, image), (labels, mask)):
        place.mkdir(parents=True, exist_ok=True)
        if depth > 1:
            nib.save(nib.Nifti1Image(array, np.diag((400 / side, 400 / side, 50, 1))), place / f'{n:04d}.nii.gz')  # mm
        else:
            Image.fromarray(np.uint8(np.clip(array, 0, 255))).save(place / f'{n:04d}.png')

def main():
    """Simulate, then have prepare_medverse.py do its work."""
    o = parse_options(Options())
    if o.task and o.task not in TASKS or not o.out:
        sys.exit(f'--out says where to; --task is one of {", ".join(TASKS)}')
    modality, words = TASKS.get(o.task, ('', []))
    calls = [(name, n) for name, (depth, _) in PHANTOMS.items() if modality in ('', name)
             for n in range(-(-o.count // depth))]
    with ProcessPoolExecutor() as pool:
        written = pool.map(write_phantom, repeat(Path(o.raw)), *zip(*calls), repeat(o.seed))
        for _ in tqdm(written, 'phantoms', len(calls), unit='file'):
            pass
    raw, words = (o.raw, ['--task', o.task, '--modality', modality, *words]) if modality else (f'{o.raw}/raw', [])
    command = [sys.executable, ROOT / 'prepare_medverse.py', '--raw', raw, '--out', o.out, '--size', str(o.size),
               '--seed', str(o.seed), *words]
    sys.exit(subprocess.run(command).returncode)

if __name__ == '__main__':
    main()
