"""Writes the data sets of medverse.py in miniature, and says what should come out of them.

File number n of a data set shows files.texture(100 * n), its slices and frames the next ones; masks
are coarse squares. Images are compared as small grey ones: some come through JPEG or a video."""
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

from tests.support import files

SIZE = 32           # side of the stored images, px
BESIDE = 10_000     # number of the first of the files that must not be taken
FRAMES = 3          # slices of a volume, and frames of a video that count

def expand(template):
    """Each (path, words chosen) that a template of paths stands for."""
    choices = []
    for words, first, last in re.findall(r'{((\d+)\.\.(\d+)|.*?)}', template):
        words = words.split(',')
        if first:
            words = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        choices.append(words)
    for chosen in itertools.product(*choices):
        words = iter(chosen)
        yield insert(re.sub('{.*?}', lambda _: next(words), template), chosen), chosen

def insert(template, chosen):
    """The template with the words that were chosen for $1, $2, ..."""
    return re.sub(r'\$(\d)', lambda found: chosen[int(found[1]) - 1], template)

def paths(templates):
    """All paths that some templates stand for."""
    return [path for template in templates for path, _ in expand(template)]

def shown(image):
    """An image (H, W[, c]) as grey levels (SIZE, SIZE), float32."""
    grey = Image.fromarray(image.squeeze()).convert('L')
    return np.float32(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

# --- images -------------------------------------------------------------------------------------

def write_image(path, number, units, side=(96, 96)):
    """Write file `number`, or the files of a series; return its images, uint8 (H, W[, 3])."""
    seed, suffix = 100 * number, path.suffix.lower()
    if suffix in ('.avi', '.mp4'):
        return write_video(path, seed)
    if suffix == '.npy':
        slices = [*textures(seed, 48), files.texture(seed + FRAMES, 48, 48)]
        files.save(path, np.stack(slices))      # of three, they might be the colours of one image
        return slices
    if suffix in ('.gz', '.dcm'):
        return write_volume(path, seed, number, units)
    if suffix == '.img':
        return write_film(path, seed)
    if '#' in path.name:
        return write_frames(path, seed, number)
    colour = number % 3 if suffix != '.pgm' else 0      # grey, in colour, in colour with opacity
    picture = Image.fromarray(files.texture(seed, *side, channels=colour))
    if colour == 2 and suffix in ('.png', '.tif'):
        picture.putalpha(200)
    picture.save(files.parent(path), quality=95)
    return [files.texture(seed, *side, channels=colour)]

def textures(seed, side):
    return np.stack([files.texture(seed + n, side, side) for n in range(FRAMES)])

def write_video(path, seed):
    """61 frames, of which 0, 30 and 60 count."""
    frames = textures(seed, 112)
    clip = np.repeat(files.texture(seed + 50, 112, 112)[None], 61, 0)
    clip[::30] = frames
    files.video(path, clip)
    return list(frames)

def write_volume(path, seed, number, units):
    """Slices in the units of their modality, as NIfTI or DICOM; return them by paper C.1.1."""
    grey = np.float32(textures(seed, 48))
    values = {'CT': 4 * grey - 400, 'SUV': grey / 8, 'PET': 90 * grey, 'MR': 7 * grey + 20}[units]
    if path.suffix == '.gz':
        files.nifti(path, to_voxels(values), spacing=(1, 1, 3), axes=('RAS', 'LPS')[number % 2])
    else:
        modality = re.search('SEG|US|$', path.parent.name)[0] or 'MR'
        for n, image in enumerate(values):      # the first slice lies highest
            slice_path = path.with_name(path.name.replace('#', str(n)))
            files.dicom(slice_path, np.uint16(image), modality, series=number, number=n,
                        position=(0, 0, -3 * n))
    low, high = {'CT': (-200, 400), 'SUV': (0, 20)}.get(units) or np.percentile(values, (1, 99))
    return list(np.uint8((np.clip(values, low, high) - low) / (high - low) * 255))

def to_voxels(slices):
    """Upright slices (n, H, W), with the patient's right on the left, as a volume in RAS order."""
    return slices[:, ::-1, ::-1].transpose(2, 1, 0)

def write_film(path, seed):
    """A film of JSRT: 12 bits in big-endian 16, no header, high values dark."""
    image = np.kron(files.texture(seed, 64, 64), np.ones((32, 32), np.uint8))
    files.write(path, (16 * np.uint16(255 - image)).astype('>u2').tobytes())
    return [image]

def write_frames(path, seed, number):
    """A sequence of 3 to 8 frames with dark vessels, of which the darkest of each pixel counts."""
    frames = [files.texture(seed + n) for n in range(3 + number % 6)]
    for n, frame in enumerate(frames):
        files.save(path.with_name(path.name.replace('#', str(n))), frame)
    return [np.min(frames, axis=0)]

# --- answers ------------------------------------------------------------------------------------
# Each function writes the answer to image `number` of a task, and returns what should come of it:
# masks (slices, SIZE, SIZE) or the number of a class. mask: the paths of the image's masks.

def write_values(task, mask, number, slices):
    """A mask of values, each of which is there, in random squares of 8 by 8."""
    values = np.resize([*task.values], max(64, len(task.values)))
    rng = np.random.default_rng(number)
    cells = np.stack([rng.permutation(values)[:64].reshape(8, 8) for _ in range(slices)])
    if mask[0].suffix == '.gz':
        volume = np.stack([enlarge(grid, 48) for grid in cells]).astype(np.int16)
        files.nifti(mask[0], to_voxels(volume), spacing=(1, 1, 3), axes=('RAS', 'LPS')[number % 2])
    else:
        write_mask(mask[0], enlarge(np.uint8(cells[0]), 96), task.modes[number % len(task.modes)])
    right = np.vectorize(task.values.get)(cells).astype(np.uint8)
    return np.stack([enlarge(grid, SIZE) for grid in right])

def enlarge(cells, side):
    """(8, 8) as squares: every nearest-neighbour reduction to a multiple of 8 finds the same."""
    return np.kron(cells, np.ones((side // 8, side // 8), cells.dtype))

def write_mask(path, values, mode):
    """Values in one channel, in equal channels of RGB, or as bits."""
    picture = Image.fromarray(values > 0 if mode == '1' else values)
    picture.convert(mode).save(files.parent(path))

def write_layers(task, mask, number, slices):
    """A file for each class, the later over the earlier. Every third TIFF is missing, as a lesion
    that an eye does not have; of the bones of a chest, in GIF, none is."""
    cells = np.zeros((8, 8), np.uint8)
    for place, path in enumerate(mask, 1):
        there = np.random.default_rng([number, place]).random((8, 8)) < 0.3
        if path.suffix == '.tif' and (number + place) % 3 == 0:
            continue
        if path.suffix == '.gif':
            write_gif(path, enlarge(there, 1024))
        else:
            write_red(path, enlarge(there, 96), task.modes[number % len(task.modes)])
        cells[there] = place
    return enlarge(cells, SIZE)[None]

def write_gif(path, there):
    """A palette picture whose first colour is white."""
    picture = Image.fromarray(np.uint8(~there))
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(files.parent(path))

def write_red(path, there, mode):
    """White, or, in colour, red."""
    white, black = Image.fromarray(np.uint8(there) * 255), Image.new('L', there.shape)
    picture = white if mode == 'L' else Image.merge('RGB', (white, black, black)).convert(mode)
    picture.save(files.parent(path))

def write_outline(task, mask, number, slices):
    """The outline of an ellipse, which leaves the image on the left in every second one."""
    x, y = 15 + number if number % 2 else -12, 10 + number
    box = x, y, x + 60, y + 48
    outline, inside = Image.new('L', (96, 96)), Image.new('L', (96, 96))
    ImageDraw.Draw(outline).ellipse(box, outline=255, width=1 + number % 3)
    ImageDraw.Draw(inside).ellipse(box, fill=1)
    outline.save(files.parent(mask[0]))
    return np.asarray(inside)[None, 1::3, 1::3]

CORNERS = 0.1, 0.1, 0.7, 0.1, 0.7, 0.4, 0.4, 0.4, 0.4, 0.8, 0.1, 0.8     # x, y: shares of the sides
BOX = 0.65, 0.6, 0.95, 0.6, 0.95, 0.8, 0.65, 0.8

def write_polygons(task, mask, number, slices):
    """A large polygon and a smaller box, given by its centre and sides, in either order."""
    kind = number % 7
    polygon = ' '.join(map(str, (kind, *CORNERS)))
    box = f'{(kind + 3) % 7} 0.8 0.7 0.3 0.2'
    lines = (polygon, box) if number % 2 else (box, polygon)
    files.write(mask[0], '\n'.join(lines) + '\n')
    canvas = Image.new('L', (1024, 1024))
    for corners in CORNERS, BOX:
        ImageDraw.Draw(canvas).polygon([1024 * share for share in corners], fill=1)
    return np.asarray(canvas)[None, 16::32, 16::32]

def write_largest(task, mask, number, slices):
    """The same file; its largest polygon has the class."""
    write_polygons(task, mask, number, slices)
    return number % 7

def write_xml(task, mask, number, slices):
    """An object of VOC; its name 1 means malignant, the first of the classes."""
    name = number % 2
    thing = f'<object><name>{name}</name></object>'
    files.write(mask[0], f'<annotation><folder>1</folder>{thing}</annotation>')
    return 1 - name

ANSWERS = {'values': write_values, 'layers': write_layers, 'outline': write_outline,
           'polygons': write_polygons, 'largest polygon': write_largest, 'xml': write_xml}

# --- data sets ----------------------------------------------------------------------------------

def write_source(root, source, first=0, leave=True):
    """Write a source; return what should come out of it, as `shown` (n, SIZE, SIZE). first: the
    number of its first file. leave: also write what must not be taken."""
    units = source.units or source.modality
    beside = paths(source.leave) if leave else []
    for number, path in enumerate(beside, BESIDE):
        write_image(root / path, number, units)
    images = []
    for number, path in enumerate(paths(source.keep), first):
        images += write_image(root / path, number, units)
    return np.stack([shown(image) for image in images])

def write_task(root, task):
    """Write a task; return {path of an image: its images as `shown`, and its answer}."""
    for number, path in enumerate(paths([*task.lone, *task.leave]), BESIDE):
        write_image(root / path, number, task.units)
    right = {}
    for images, masks in itertools.zip_longest(task.images, task.masks):
        for path, chosen in expand(images):
            number = len(right)
            found = write_image(root / path, number, task.units, task.side)
            if masks:
                mask = [root / file for file, _ in expand(insert(masks, chosen))]
                answer = ANSWERS[task.answers](task, mask, number, len(found))
            else:
                answer = task.classes.index(Path(path).parent.name)
            images_shown = [shown(image) for image in found]
            right[path.replace('#', '0')] = SimpleNamespace(images=images_shown, answer=answer)
    if task.name == 'octdl':
        write_table(root, task, right)
    if task.name == 'tn5000':
        write_lists(root, task, right)
    return right

def write_table(root, task, right):
    """The table of OCTDL: file, class, something else, patient."""
    rows = ['file_name,disease,condition,patient_id']
    for path in map(Path, right):
        patient = re.search(task.patient, str(path))[0]
        rows.append(f'{path.stem},{path.parent.name},x,{patient}')
    files.write(root / 'OCTDL_labels.csv', '\n'.join(rows))

def write_lists(root, task, right):
    """The lists of TN5000: names without an ending."""
    for part, expression in task.given.items():
        names = [Path(path).stem for path in right if re.search(expression, path)]
        files.write(root / f'TN5000_forReview/ImageSets/Main/{part}.txt', '\n'.join(names))
