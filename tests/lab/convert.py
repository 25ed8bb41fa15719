r"""What prepare_medverse.py does not read of some tasks of Table 3, as files that it reads.

    python -m tests.lab.convert scr RAW/scr           films of JSRT as PNG beside them
    python -m tests.lab.convert tn5000 RAW/tn5000     classes of VOC's XML as RAW/tn5000/classes.csv
    python -m tests.lab.convert slsc-c RAW/slsc-c     classes of the largest polygons, the same way
    python -m tests.lab.convert slsc-s RAW/slsc-s     polygons of labels/**.txt as masks/**.png
    python -m tests.lab.convert yolo RAW/mine         the same of your own polygons and boxes
    python -m tests.lab.convert dias RAW/dias         darkest of the frames, as RAW/dias/darkest/**
    python -m tests.lab.convert dsca RAW/dsca 'images/(.*)/'
    python -m tests.lab.convert fhu RAW/fhu           outlines, filled, as RAW/fhu/filled/**.png
    python -m tests.lab.convert outline RAW/mine '_Annotation'      the same of your own outlines
    python -m tests.lab.convert colours RAW/mine 'masks/' '#000000' '#ff0000' '#00ff00'
    python -m tests.lab.convert medmnist FILE.npz TASK SOURCE       a file of MedMNIST as PNG
    python -m tests.lab.convert medmnist FILE.npz TASK SOURCE normal pneumonia

The word after the folder is a rule, searched in paths: of the frames, of which those whose groups
( ) are the same text are one sequence, or of the masks that show colours or closed convex outlines.
In masks of polygons 0 is the background, and class n of a line is n + 1. Masks of colours become
RAW/mine/numbers/**.png, in which 0 stands for the first colour that is given, 1 for the second, ...
Of MedMNIST, the folder TASK holds all images, as TASK/<train|val|test>/<class>/000001.png, where
<class> is the number of the class, or the name that is given for it. The folder SOURCE holds the
training images alone, for pretraining, so that no network sees the other images before its test.
The files that were there stay as they are.
"""
import csv
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from prepare_medverse import PICTURES, SPLITS, list_names, read, search, to_uint8

NODULES = {'1': 'malignant', '0': 'benign'}
LESIONS = dict(enumerate(('BKL', 'NV', 'DF', 'MEL', 'VASC', 'BCC', 'AKIEC')))
FRAMES = {'dias': '(.*)images/image_s(.*)_i', 'dsca': 'images/(.*)/'}
OUTLINES = {'fhu': 'HC_Annotation', 'outline': '_Annotation'}

def read_film(path):
    """A film of JSRT, 12 bits and high values dark, at half its side, as the masks of SCR are."""
    pixels = np.fromfile(path, '>u2').reshape(1024, 2, 1024, 2).mean((1, 3))
    return np.uint8((4095 - pixels.clip(0, 4095)) * (255 / 4095) + 0.5)

def write_films(raw):
    """Write each film X.IMG as X.png beside it; returns the paths of the new files."""
    written = []
    for path in sorted(raw.rglob('*')):
        if path.suffix.lower() == '.img' and not has_header(path):
            Image.fromarray(read_film(path)).save(path.with_suffix('.png'))
            written.append(path.with_suffix('.png'))
    return written

def has_header(path):
    """Whether an .img file is a volume of Analyze, whose header is a file of its own."""
    return path.with_suffix('.hdr').exists() or path.with_suffix('.HDR').exists()

def class_of_object(path):
    """The class of the first object of an XML file of VOC, or None."""
    found = re.search(r'<object>.*?<name>\s*(.*?)\s*<', path.read_text(), re.DOTALL)
    return found and NODULES.get(found[1], found[1])

def polygons(path):
    """[(class, corners (n, 2) as shares of the sides)] of lines `class x1 y1 x2 y2 ...`. Two pairs
    of numbers are a box: its centre and its sides."""
    found = []
    for kind, *numbers in map(str.split, path.read_text().splitlines()):
        corners = np.reshape(numbers, (-1, 2)).astype(float)
        if len(corners) == 2:
            corners = corners[0] + corners[1] * ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
        found.append((int(kind), corners))
    return found

def class_of_polygon(path):
    """The class of the polygon with the largest bounding box, or None."""
    found = sorted(polygons(path), key=lambda polygon: -np.ptp(polygon[1], 0).prod())
    return LESIONS[found[0][0]] if found else None

def write_masks(raw):
    """Paint the polygons of each labels/**.txt on masks/**.png, for the picture images/**."""
    written = []
    for path in sorted(raw.rglob('labels/**/*.txt')):
        *before, after = path.relative_to(raw).as_posix().rpartition('labels/')
        stem = raw / before[0]
        pictures = [picture for picture in (stem / 'images' / after).parent.glob(f'{path.stem}.*')
                    if picture.suffix.lower() in PICTURES]
        if len(pictures) != 1:
            sys.exit(f'{path}: is the label of {len(pictures)} pictures in {stem / "images"}')
        canvas = Image.new('L', Image.open(pictures[0]).size)
        for kind, corners in polygons(path):
            points = [tuple(corner) for corner in corners * canvas.size]
            ImageDraw.Draw(canvas).polygon(points, kind + 1)
        target = (stem / 'masks' / after).with_suffix('.png')
        target.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(target)
        written.append(target)
    return written

def write_classes(raw, folders, class_of):
    """Write RAW/classes.csv of the images whose labels lie in a folder beside them. folders: the
    names of that of the labels, with their ending, and of that of the images."""
    labels, ending, images = folders
    rows = []
    for path in sorted(raw.rglob(f'{labels}/*{ending}')):
        name = class_of(path)
        if name is None:
            sys.exit(f'{path}: holds no label; mend it, or move it away')
        image = path.parent.parent / images / path.stem
        rows.append((image.relative_to(raw).as_posix(), name))
    with open(raw / 'classes.csv', 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([('file', 'class'), *rows])
    return rows

def write_darkest(raw, rule):
    """Write the darkest of the frames of each sequence, pixel by pixel, as RAW/darkest/**.png."""
    darkest = {}
    for path in sorted(raw.rglob('*')):
        name = path.relative_to(raw).as_posix()
        match = search(rule, name)
        if not match or not path.is_file() or name.startswith('darkest/'):
            continue
        for array in read(path):
            for frame in to_uint8(array, 'X-ray'):
                before = darkest.setdefault(match.groups(), frame)
                darkest[match.groups()] = np.minimum(before, frame)
    for groups, frame in darkest.items():
        path = Path(raw, 'darkest', *(group.strip('/') for group in groups)).with_suffix('.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path)
    return darkest

def fill_outline(outline):
    """Fill a closed convex outline, bool (H, W): a pixel is inside if the outline is on both sides of
    it in its row, or in its column."""
    inside = np.zeros_like(outline)
    for axis in (0, 1):
        before = np.logical_or.accumulate(outline, axis)
        after = np.flip(np.logical_or.accumulate(np.flip(outline, axis), axis), axis)
        inside |= before & after
    return inside

def write_filled(raw, rule):
    """Write each outline that a rule finds, filled with 255, as RAW/filled/**.png."""
    written = []
    for name in list_names(raw):
        path = raw / name
        if not search(rule, name) or not path.is_file() or name.startswith('filled/'):
            continue
        mask = read(path)[0][0]
        outline = mask.max(2) > 0 if mask.ndim == 3 else mask > 0
        target = (raw / 'filled' / name).with_suffix('.png')
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:       # whose EXIF stays, so that a turned mask is refused
            filled = Image.fromarray(255 * np.uint8(fill_outline(outline)))
            filled.save(target, exif=picture.getexif())
        written.append(target)
    return written

def write_numbers(raw, rule, colours):
    """Write each mask that a rule finds, with the numbers of its colours, as RAW/numbers/**.png.
    Returns the set of these files."""
    written = set()
    for name in list_names(raw):
        path = raw / name
        if not search(rule, name) or not path.is_file() or name.startswith('numbers/'):
            continue
        with Image.open(path) as picture:       # whose EXIF stays, so that a turned mask is refused
            pixels, exif = np.asarray(picture.convert('RGBA')), picture.getexif()
        known = pixels[..., 3] < 128            # what is transparent shows nothing: the background
        pixels = np.where(known[..., None], ImageColor.getrgb(colours[0]), pixels[..., :3])
        numbers = np.zeros(known.shape, np.uint8)
        for number, colour in enumerate(colours):
            has_it = (pixels == ImageColor.getrgb(colour)).all(2)
            numbers[has_it] = number
            known |= has_it
        if not known.all():
            red, green, blue = pixels[~known][0]
            sys.exit(f'{path}: has the colour #{red:02x}{green:02x}{blue:02x}, which is not given')
        target = (raw / 'numbers' / name).with_suffix('.png')
        if target in written:
            sys.exit(f'{path}: {target} is of another mask already; rename one of the two')
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers).save(target, exif=exif)
        written.add(target)
    return written

def read_medmnist(path, names):
    """[(split, class, number in the split, image uint8 (H, W) or (H, W, 3))] of a file of MedMNIST.
    A class is called by its number, or by its name if there are names."""
    try:
        file = np.load(path)
        images = {split: file[f'{split}_images'] for split in SPLITS}
        labels = {split: file[f'{split}_labels'] for split in SPLITS}
        for split in SPLITS:
            count = len(images[split])
            if labels[split].size != count or len(labels[split]) != count:
                raise ValueError(f'{split}_labels has the shape {labels[split].shape}')
            if images[split].dtype != np.uint8 or images[split].shape[3:] not in ((), (3,)):
                raise ValueError(f'{split}_images has the shape {images[split].shape}')
        classes = 1 + max(int(labels[split].max()) for split in SPLITS)
    except Exception as error:      # NumPy fails in many ways on what is no such file
        sys.exit(f'{path}: is no file of MedMNIST with one label for each image ({error!r})')
    width = len(str(classes - 1))       # with zeros before them, names are in the order of numbers
    names = names or [f'{number:0{width}}' for number in range(classes)]
    if len(names) != classes:
        sys.exit(f'{path}: has {classes} classes, but {len(names)} names are given: {names}')
    found = []
    for split in SPLITS:
        pairs = zip(images[split], labels[split].ravel().tolist())
        found += [(split, names[label], number, image)
                  for number, (image, label) in enumerate(pairs, 1)]
    return found

def write_medmnist(path, task, source, names):
    """Write the images of a file of MedMNIST below `task`, and those for training in `source`, too.
    Returns the paths below `task`."""
    for folder in (task, source):
        if folder.exists():
            sys.exit(f'{folder}: is there; delete it, or give another folder')
    images = read_medmnist(path, names)
    written = []
    try:
        source.mkdir(parents=True)
        for split, name, number, image in images:
            target = task / split / name / f'{number:06d}.png'
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target)
            written.append(target)
            if split == 'train':
                shutil.copy(target, source)
    except BaseException as error:      # on Ctrl-C, too, nothing half-written stays
        shutil.rmtree(task, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
        if isinstance(error, OSError):
            sys.exit(f'{path}: cannot be written as PNG ({error})')
        raise
    return written

def convert_medmnist(words):
    """Convert the file of MedMNIST that the words of the command line name."""
    if len(words) < 3 or not Path(words[0]).is_file():
        sys.exit('give a file and two new folders: '
                 'python -m tests.lab.convert medmnist FILE.npz TASK SOURCE')
    path, task, source = map(Path, words[:3])
    written = write_medmnist(path, task, source, words[3:])
    print(f'{path}: {len(written)} images are in {task}, for python prepare_medverse.py '
          f'--task {path.stem} --raw {task}; those for training are also in {source}')

def main():
    """Convert the data set that the first word names, in the folder of the second."""
    if sys.argv[1:2] == ['medmnist']:
        convert_medmnist(sys.argv[2:])
        return
    if len(sys.argv) < 3 or not Path(sys.argv[2]).is_dir():
        sys.exit('give a task and its folder: python -m tests.lab.convert yolo RAW (or scr, tn5000, '
                 'slsc-c, slsc-s, dias, dsca, fhu, outline, colours, medmnist)')
    name, raw = sys.argv[1], Path(sys.argv[2])
    if name == 'scr':
        written = write_films(raw)
    elif name == 'tn5000':
        written = write_classes(raw, ('Annotations', '.xml', 'JPEGImages'), class_of_object)
    elif name == 'slsc-c':
        written = write_classes(raw, ('labels', '.txt', 'images'), class_of_polygon)
    elif name in ('slsc-s', 'yolo'):
        written = write_masks(raw)
    elif name in FRAMES:
        written = write_darkest(raw, [FRAMES[name], *sys.argv[3:]][-1])
    elif name in OUTLINES:
        written = write_filled(raw, [OUTLINES[name], *sys.argv[3:]][-1])
    elif name == 'colours':
        if len(sys.argv) < 5:
            sys.exit('give a rule of the masks, and their colours, the background first')
        written = write_numbers(raw, sys.argv[3], sys.argv[4:])
    else:
        sys.exit(f'{name}: is none of scr, tn5000, slsc-c, slsc-s, yolo, dias, '
                 'dsca, fhu, outline, colours and medmnist')
    if not written:
        sys.exit(f'{raw}: holds nothing that is converted for {name}')
    if name == 'colours':
        print(f'{raw}: {len(written)} masks became numbers below {raw}/numbers; put numbers/ '
              "before their rule, as in --masks 'numbers/(.*)masks/(.*)\\.'")
        return
    print(f'{raw}: {len(written)} images of {name} converted; new files lie beside them, for '
          f'python prepare_medverse.py --task {name} --raw {raw}')

if __name__ == '__main__':
    main()
