"""prepare_medverse.py on files as people really have them: small synthetic ones, right values by NumPy, nibabel and
Pillow. Where the right answer is a matter of taste, a file is either refused by its name or right."""
import contextlib
import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_prepare import ROOT

import prepare_medverse as prep

S = 48      # side of the files and of what is stored, so that nothing is resized
each = pytest.mark.parametrize

# --- helpers ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def raw(tmp_path):
    (tmp_path / 'raw').mkdir()
    return tmp_path / 'raw'

def prepare(raw, *options, out='out', size=S):
    """(exit code, all that is printed, without the folder of the test) of a preparation of RAW into `out` beside it."""
    printed, code, before = io.StringIO(), 0, sys.argv
    options = '--raw', raw, '--out', raw.parent / out, '--size', size, '--workers', 1, *options
    sys.argv = ['prepare_medverse.py', *map(str, options)]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            prep.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print('' if isinstance(stop.code, int) else stop.code)
        finally:
            sys.argv = before
    return code, printed.getvalue().replace(str(raw.parent), '')

def source(raw, name='a', *options):
    """(images (n, S, S, c), rows of dropped.csv) of one of the sources below RAW."""
    code, printed = prepare(raw, '--min_side', 8, *options)
    assert code == 0, printed
    folder = raw.parent / 'out' / name
    with open(folder / 'dropped.csv', newline='', encoding='utf-8', errors='surrogateescape') as file:
        dropped = [*csv.DictReader(file)]
    shards = [np.load(path) for path in sorted(folder.glob('*.npy'))]
    return np.concatenate(shards or [np.zeros((0, S, S, 1), np.uint8)]), dropped

def stored(raw):
    """({path: its split}, images, answers) of a task; of pictures the three have one order."""
    out, images, answers = raw.parent / 'out', [], []
    splits = json.loads((out / 'split.json').read_text())
    for part in ('train', 'val', 'test'):
        images += [*np.load(out / part / 'images.npy')]
        answers += [*np.load(next(path for path in (out / part).iterdir() if path.stem in ('masks', 'labels')))]
    return {name: part for part, names in splits.items() for name in names}, images, answers

def task(raw, *options):
    """What is `stored`, and all that is printed, of a task that must be prepared."""
    code, printed = prepare(raw, '--task', 'mini', *options)
    assert code == 0, printed
    return *stored(raw), printed

def classes(raw):
    return json.loads((raw.parent / 'out/meta.json').read_text())['classes']

def refused(raw, *options, tells):
    """What is printed where a task is refused and leaves nothing; each of the expressions must be found in it."""
    code, printed = prepare(raw, '--task', 'mini', *options)
    assert code and not [*raw.parent.glob('out*')], printed
    assert all(re.search(tell, printed) for tell in tells), printed
    return printed

def right_or_refused(raw, right, *options, share=0):
    """Two masks differ from the right one in at most this share of the foreground, or a mask is refused by its name."""
    code, printed = prepare(raw, '--task', 'mini', *options)
    if code:
        return re.search(r'masks/\d\.', printed), printed
    return np.count_nonzero(stored(raw)[2] != right) <= share * 2 * np.count_nonzero(right), 'silently wrong'

def write(path, array, **more):
    """A picture by Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **more)

def texture(seed, *channels):
    """Random uint8 (S, S[, 3]) from 0 to 255."""
    return np.random.default_rng(seed).integers(0, 256, (S, S, *channels), dtype=np.uint8)

def blob(seed=0):
    """uint8 (S, S) of 1 in an ellipse, which no turn and no mirror maps to itself, else 0."""
    x, y = np.random.default_rng(seed).integers(3, 12, 2).tolist()
    picture = Image.new('L', (S, S))
    ImageDraw.Draw(picture).ellipse((x, y, x + 30, y + 12), 1)
    return np.asarray(picture)

def pairs(raw, mask, name='{}.png', image='{}.png', exif=None, **more):
    """Two images with the same mask."""
    for n in range(2):
        write(raw / 'images' / image.format(n), texture(n), exif=exif)
        write(raw / 'masks' / name.format(n), mask, **more)

def tree(raw, *folders, layout='{folder}/{kind}', names='012', first=0):
    """Pictures of two classes, cat and dog, in each of the folders."""
    for f, folder in enumerate(folders):
        for k, kind in enumerate(('cat', 'dog')):
            for n, name in enumerate(names):
                path = raw / layout.format(folder=folder, kind=kind) / f'{name}.png'
                write(path, texture(first + 100 * f + 50 * k + n))

def ramp(low, high, kind):
    """(S, S) of all values from low to high, in equal steps."""
    return np.linspace(low, high, S * S).round().reshape(S, S).astype(kind)

def differs(images, values, low, high):
    """The most by which stored images differ from the window low ... high as 0 ... 255."""
    right = (np.clip(np.float64(values), low, high) - low) / (high - low) * 255
    return np.abs(images.reshape(right.shape) - right).max() if images.size else 255

def write_tiff(path, *pages, order='<', photometric=1):
    """A plain TIFF of one strip a page, of any type of number, in either byte order; photometric 0: white is zero."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'I', 8)
    for number, page in enumerate(pages, 1):
        after = len(data) + 2 + 9 * 12 + 4
        height, width = page.shape
        tags = {256: width, 257: height, 258: 8 * page.dtype.itemsize, 259: 1, 262: photometric, 273: after,
                278: height, 279: page.nbytes, 339: ' uif'.index(page.dtype.kind)}
        data += struct.pack(order + 'H', len(tags))
        data += b''.join(struct.pack(order + 'HHII', tag, 4, 1, value) for tag, value in tags.items())
        data += struct.pack(order + 'I', (number < len(pages)) * (after + page.nbytes))
        data += page.astype(page.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(data)

def write_png(path, array, side=0):
    """A PNG of uint16 (H, W, c), c = 1 to 4; with `side` its header lies about its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, channels = array.shape
    header = struct.pack('>IIBBBBB', side or width, side or height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    data = b'\x89PNG\r\n\x1a\n'
    for name, body in (b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''):
        data += struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    path.write_bytes(data)

def write_nifti(path, array, affine, sform=1, qform=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    nib.save(image, path)

# --- images and masks on different grids ------------------------------------------------------------------------------

LPS = np.diag([-1.0, -1, 3, 1])
HALF = 2 ** -0.5
OBLIQUE = np.array([[HALF, -HALF, 0, 0], [HALF, HALF, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
ORGAN = np.zeros((S, S, S), np.uint8)       # no turn and no mirror maps it to itself
ORGAN[5:30, 8:20, 9:24] = ORGAN[25:45, 15:40, 12:16] = 1

def moved(affine, row, column, by):
    affine = affine.copy()
    affine[row, column] += by
    return affine

def scans(raw, affine, mask_affine, mask=ORGAN, forms=((1, 1), (1, 1)), folder='masks'):
    """Two CT volumes, bright where the organ is, and their masks with another affine."""
    for n in range(2):
        write_nifti(raw / f'images/{n}.nii.gz', np.int16(50 + 200 * np.int16(ORGAN) + n), affine, *forms[0])
        write_nifti(raw / f'{folder}/{n}.nii', mask, mask_affine, *forms[1])

def agree(images, masks):
    """Whether every image is bright exactly where its mask is 1."""
    shown = sum(map(np.count_nonzero, masks)) == 2 * np.count_nonzero(ORGAN)
    return shown and all(np.array_equal(image[..., 0] > 180, mask == 1) for image, mask in zip(images, masks))

OTHER = {'eye': np.eye(4), 'mirror': moved(moved(LPS, 0, 0, 2), 0, 3, 1 - S), 'shift': moved(LPS, 0, 3, 20),
         'spacing': moved(LPS, 2, 2, -0.5), 'turn': OBLIQUE @ LPS, 'swap': LPS[[1, 0, 2, 3]]}

@each('other', OTHER.values(), ids=OTHER)
@each('folder', ['masks', 'second'], ids=['one', 'one a class'])
def test_a_mask_on_another_grid_is_refused(raw, other, folder):
    scans(raw, LPS, LPS)
    scans(raw, LPS, other, folder=folder)
    rules = '--images', r'images/(.*)\.nii', '--masks', r'masks/(.*)\.nii', r'second/(.*)\.nii', '--classes', *'012'
    refused(raw, '--modality', 'CT', *rules * (folder == 'second'), tells=(r'images/\d.nii.gz', rf'{folder}/\d.nii'))

def stack(path, volume):
    """The slices from the feet up, as pages of a TIFF."""
    pages = [Image.fromarray(page) for page in np.moveaxis(volume, 2, 0)]
    pages[0].save(path, save_all=True, append_images=pages[1:])

SAVE = {'.nii': lambda path, volume: write_nifti(path, volume, LPS), '.tif': stack,
        '.img': lambda path, volume: nib.save(nib.Nifti1Pair(volume, np.eye(4)), path),
        '.npy': lambda path, volume: np.save(path, volume)}

@each('image, mask', [('.nii', '.tif'), ('.npy', '.nii'), ('.nii', '.npy'), ('.nii', '.img'), ('.img', '.nii')])
def test_an_image_and_a_mask_of_different_kinds_agree_or_are_refused(raw, image, mask):
    for n in range(2):
        (raw / 'images').mkdir(exist_ok=True)
        (raw / 'masks').mkdir(exist_ok=True)
        SAVE[image](raw / f'images/{n}{image}', np.int16(50 + 200 * np.int16(ORGAN) + n))
        SAVE[mask](raw / f'masks/{n}{mask}', ORGAN)
    options = '--modality', 'CT', '--images', r'images/(\d)\.(?!hdr)', '--masks', r'masks/(\d)\.(?!hdr)'
    code, printed = prepare(raw, '--task', 'mini', *options)
    assert re.search(r'masks/\d', printed) if code else agree(*stored(raw)[1:])

@each('shape', [(S, S, S - 1), (S, S), (S, S, S, 2)])
def test_a_mask_of_another_shape_is_refused(raw, shape):
    scans(raw, LPS, LPS, np.ones(shape, np.uint8))
    assert 'zip()' not in refused(raw, '--modality', 'CT', tells=(r'images/\d.nii.gz', r'masks/\d.nii'))

@each('affine, other', [
    (moved(OBLIQUE, 0, 0, 1e-6), moved(OBLIQUE, 1, 0, 1e-6)),       # one of the two exchanges x and y
    (np.diag([1, 1, 0.99001, 1]), np.diag([1, 1, 0.98999, 1])),     # one of the two is cut across another axis
    (LPS, moved(LPS, 0, 3, 1e-4))], ids=['45 degrees', 'thickness', 'rounding'])
def test_a_mask_is_cut_as_its_image(raw, affine, other):
    scans(raw, affine, other)
    assert agree(*task(raw, '--modality', 'CT')[1:3])

@each('forms, kind', [(((1, 0), (0, 1)), np.uint8), (((0, 1), (1, 0)), np.float32), (((2, 1), (1, 0)), np.int64)])
def test_one_grid_by_sform_or_qform_and_any_type_of_mask(raw, forms, kind):
    scans(raw, LPS, LPS, ORGAN.astype(kind), forms=forms)
    assert agree(*task(raw, '--modality', 'CT')[1:3])

@each('first, second', [(S, S - 8), (S - 8, S - 8), (S // 2, S)])
def test_one_mask_a_class_of_other_sides_is_refused(raw, first, second):
    for n in range(2):
        write(raw / f'images/{n}.png', texture(n))
        write(raw / f'first/{n}.png', blob()[:first])
        write(raw / f'second/{n}.png', blob()[:second])
    rules = '--images', r'images/(.*)\.png', '--masks', r'first/(.*)\.png', r'second/(.*)\.png', '--classes', *'012'
    refused(raw, *rules, tells=(r'/\d.png',))

# --- pictures of more than 8 bits -------------------------------------------------------------------------------------

HU = np.tile(np.repeat([-1000, -100, 0, 40, 300, 500], 8), (S, 1))      # become 0 42 85 102 212 255

@each('save', [
    lambda path: write_tiff(path.with_suffix('.tif'), np.int16(HU)),
    lambda path: write_tiff(path.with_suffix('.tif'), np.int16(HU), order='>'),
    lambda path: write_tiff(path.with_suffix('.tif'), np.int32(HU)),
    lambda path: write_tiff(path.with_suffix('.tif'), np.float32(HU)),
    lambda path: np.save(path.with_suffix('.npy'), np.int16(HU)),
    lambda path: write_nifti(path.with_suffix('.nii'), np.int16(HU).T[::-1, ::-1, None], np.diag([1, 1, 3, 1]))],
    ids=['int16', 'big-endian', 'int32', 'float', 'npy', 'nifti'])
def test_hounsfield_units_in_any_format(raw, save):
    (raw / 'CT/a').mkdir(parents=True)
    save(raw / 'CT/a/scan.png')
    assert differs(source(raw)[0], HU, -200, 400) <= 0.51

BRIGHT = ramp(0, 4095, 'u2')
BRIGHT[-1, -1] = 4200       # one pixel
PADDED = np.uint16(HU + 32768)
PADDED[:30] = 0

WINDOWS = {     # modality, pages, window
    '12 bits': ('OCT', [ramp(0, 4095, 'u2')], (0, 4095)), '14 bits': ('OCT', [ramp(0, 16383, 'u2')], (0, 16383)),
    'not 8': ('OCT', [ramp(0, 300, 'u2')], (0, 300)), '16 bits': ('OCT', [ramp(0, 65535, 'u2')], (0, 65535)),
    '32 bits': ('OCT', [ramp(-900, 99999, 'i4')], (-900, 99999)), 'one pixel': ('X-ray', [BRIGHT], (0, 4095)),
    'float': ('OCT', [ramp(-9, 9, 'f4')], (-9, 9)),
    'pages': ('OCT', [ramp(0, 4000, 'u2'), ramp(5000, 0, 'u2')], (0, 5000)),
    'percentiles': ('MR', [ramp(0, 4095, 'u2')], (41, 4054)), 'offset': ('CT', [PADDED], (32568, 33168))}

@each('order', '<>')
@each('case', WINDOWS.values(), ids=WINDOWS)
def test_one_window_a_file_by_its_own_values(raw, order, case):
    modality, pages, window = case
    write_tiff(raw / modality / 'a/ramp.tif', *pages, order=order)
    images, _ = source(raw)
    allowed = [window] if modality in ('MR', 'CT') else [window, (np.min(pages), np.max(pages))]
    assert min(differs(images, pages, *ends) for ends in allowed) <= 1.1

@each('comment', ['', '# made by hand, 7 8 9\n'])
@each('form, high, content', [('P5', 4095, 300), ('P5', 65535, 4095), ('P2', 1000, 200), ('P2', 255, 90)])
def test_pgm_by_its_own_numbers(raw, comment, form, high, content):
    values = ramp(0, content, '>u2')     # dark
    data = values.tobytes() if form == 'P5' else ' '.join(map(str, values.flat)).encode()
    (raw / 'X-ray/a').mkdir(parents=True)
    (raw / 'X-ray/a/dark.pgm').write_bytes(f'{form}\n{comment}{S} {S}\n{high}\n'.encode() + data)
    assert differs(source(raw)[0], values, 0, high if high == 255 else content) <= 1       # what has 8 bits stays

HALF_KNOWN = {      # by Pillow: page, photometric, what it shows, window
    'white is zero': (ramp(0, 65535, 'u2'), 0, ramp(65535, 0, 'u2'), (0, 65535)),
    'white is zero, 12 bits': (ramp(0, 4095, 'u2'), 0, ramp(4095, 0, 'u2'), (0, 4095)),
    'int8': (ramp(-128, 127, 'i1'), 1, ramp(-128, 127, 'i1'), (-128, 127)),
    'uint32': (ramp(0, 4e9, 'u4'), 1, ramp(0, 4e9, 'u4'), (0, 4e9)),
    'float64': (ramp(0, 4e9, 'f8'), 1, ramp(0, 4e9, 'f8'), (0, 4e9))}

@each('order', '<>')
@each('case', HALF_KNOWN.values(), ids=HALF_KNOWN)
def test_types_that_are_half_known_are_right_or_dropped_by_name(raw, order, case):
    page, photometric, right, window = case
    write_tiff(raw / 'X-ray/a/film.tif', page, order=order, photometric=photometric)
    images, dropped = source(raw)
    assert dropped[0]['path'] == 'film.tif' if dropped else differs(images, right, *window) <= 1

@each('channels', [2, 3, 4])
def test_colours_of_16_bits_are_not_silently_dark(raw, channels):
    values = ramp(0, 4095, 'u2')[..., None].repeat(channels, 2)
    write_png(raw / 'Photo/a/deep.png', values)
    images, dropped = source(raw)
    assert dropped[0]['path'] == 'deep.png' if dropped else differs(images[..., 0], values[..., 0], 0, 4095) <= 1

@each('save', [lambda path: write(path.with_suffix('.png'), blob() > 0), lambda path: np.save(path, blob() > 0)])
def test_one_bit_is_black_and_white(raw, save):
    (raw / 'X-ray/a').mkdir(parents=True)
    save(raw / 'X-ray/a/0.npy')
    assert np.array_equal(source(raw)[0][..., 0], [255 * blob()])

def test_nifti_in_colour(raw):
    voxels = np.ascontiguousarray(texture(0, 3).swapaxes(0, 1)[::-1, ::-1, None])
    voxels = voxels.view([(channel, 'u1') for channel in 'RGB'])[..., 0]
    write_nifti(raw / 'Photo/a/scan.nii.gz', voxels, np.diag([1, 1, 3, 1]))
    assert np.array_equal(source(raw)[0], [texture(0, 3)])

# --- the splits that a data set comes with ----------------------------------------------------------------------------

SPLITS = ('Training', 'Testing'), ('TRAIN', 'Test'), ('training', 'validation', 'testing'), ('train', 'Valid', 'test')

@each('folders', [*SPLITS, ('train', 'val', 'test')], ids=' '.join)
@each('layout', ['{folder}/{kind}', 'set/{folder}/{kind}'])
def test_folders_of_splits_are_taken(raw, folders, layout):
    tree(raw, *folders, layout=layout)
    where, *_, printed = task(raw)
    found = {(name.split('/')[-3], part) for name, part in where.items()}
    parts = ('train', 'val', 'test') if len(folders) == 3 else ('train', 'test')
    assert len(where) == 6 * len(folders) and 'split' in printed        # the rule is told
    assert found - {(folders[0], 'val')} == {*zip(folders, parts)}

@each('second', ['val', 'Valid', 'validation'])
def test_training_and_validation_without_a_test(raw, second):
    tree(raw, 'train', second)
    where, *_ = task(raw)
    taken = {part for name, part in where.items() if name.startswith(second)}
    assert len(where) == 12 and len(taken) == 1 and 'train' not in taken
    assert all(name.startswith(second) for name, part in where.items() if part in taken)

def test_patients_on_both_sides_of_a_given_split_are_named(raw):
    tree(raw, 'train', names=('p1_0', 'p2_0'))
    tree(raw, 'test', names=('p1_1', 'p3_0'), first=200)
    _, printed = prepare(raw, '--task', 'mini', '--patient', r'(p\d)_')
    assert 'patient' in printed and re.findall(r'\bp\d\b', printed) == ['p1']

SAME = r'\b{}\b.*(same|identical|twin|duplicate|repeat|also)'

def test_identical_pictures_in_train_and_test_are_counted(raw):
    tree(raw, 'train', 'test')
    for name in ('cat/0', 'cat/1', 'dog/2'):
        shutil.copy(raw / f'train/{name}.png', raw / f'test/{name}.png')
    Image.open(raw / 'train/dog/0.png').save(raw / 'test/dog/0.png', compress_level=1)     # other bytes
    assert re.search(SAME.format(4), task(raw)[3])

@each('twins', [False, True])
def test_identical_pictures_in_a_drawn_split_are_counted(raw, twins):
    tree(raw, 'x', names='01234567', layout='{kind}')
    for path in [*raw.glob('*/?.png')] * twins:
        shutil.copy(path, path.with_stem(path.stem + 'b'))
    where, images, _, printed = task(raw)
    train = {image.tobytes() for image, part in zip(images, where.values()) if part == 'train'}
    shared = sum(image.tobytes() in train for image, part in zip(images, where.values()) if part == 'test')
    assert (shared > 0) == twins == bool(re.search(SAME.format(shared), printed))

@each('line', ['{}.png\n', ' {} \r\n', '\ufeff{}\n', 'cat/{}.png\n'])
def test_lists_of_splits(raw, line):
    names = dict(train='case 01', val='1.2.3', test='c')
    for n, (part, name) in enumerate(names.items()):
        write(raw / f'cat/{name}.png', texture(n))
        write(raw / f'masks/{name}.png', blob())
        (raw / f'{part}.txt').write_text(line.format(name), encoding='utf-8')
    rules = '--images', r'cat/(.*)\.png', '--masks', r'masks/(.*)\.png'
    where, *_ = task(raw, *rules, '--split', 'train.txt', 'val.txt', 'test.txt')
    assert where == {f'cat/{name}.png': part for part, name in names.items()}

# --- labels -----------------------------------------------------------------------------------------------------------

def labelled(raw, rows, names, encoding='utf-8', head='file,kind', columns=()):
    """{path: its class} that a table of these rows gives to pictures of these names."""
    for n, name in enumerate(names):
        write(raw / name, texture(n))
    (raw / 'labels.csv').write_text('\n'.join([head, *rows]), encoding=encoding)
    where, _, answers, _ = task(raw, '--labels', 'labels.csv', *columns)
    return dict(zip(where, np.array(classes(raw))[np.int64(answers)].tolist()))

KINDS = 'cat', 'dog', 'cat', 'dog', 'cat', 'dog', 'cat', 'dog'
EIGHT = {f'img/{n}.png': kind for n, kind in enumerate(KINDS)}

SITES = {f'x/siteA/00{n}.png': kind for n, kind in enumerate(KINDS)}
DOTS = {f'p{n // 2}.v{n % 2}.png': kind for n, kind in enumerate(KINDS)} | {'1.3.6.4.png': 'cat', '1.3.6.5.png': 'dog'}

@each('right, row', [(SITES, 'siteA/00{n}.png,{kind}'), (SITES, 'siteA/00{n},{kind}'), (SITES, '{name},{kind}'),
                     (SITES, 'x\\siteA\\00{n}.png,{kind}'), (DOTS, '{name},{kind}'), (DOTS, '{stem},{kind}'),
                     (EIGHT, '  {name} , {kind} '), (EIGHT, '{name},{kind}\nimg/8.png,\nimg/9.png, \n,cat\n'),
                     (EIGHT, '{name},{kind}\n/etc/8.png,cat\n../../9.png,dog')])
def test_a_label_is_for_the_path_that_the_table_gives(raw, right, row):
    others = [name.replace('siteA', 'siteB') for name in right] if right is SITES else ['img/8.png', 'img/9.png']
    rows = [row.format(n=n, kind=kind, name=name, stem=name[:-4]) for n, (name, kind) in enumerate(right.items())]
    assert labelled(raw, rows, [*right, *others]) == right and classes(raw) == ['cat', 'dog']

def test_sites_have_labels_of_their_own(raw):
    right = SITES | {name.replace('siteA', 'siteB'): 'dog' if kind == 'cat' else 'cat' for name, kind in SITES.items()}
    assert labelled(raw, [f'{name},{kind}' for name, kind in right.items()], right) == right

def test_a_row_for_two_files_is_refused_by_its_name(raw):
    rows = ['000,cat', *(f'{name},{kind}' for name, kind in EIGHT.items())]
    with pytest.raises(AssertionError, match='000'):
        labelled(raw, rows, [*EIGHT, 'siteA/000.png', 'siteB/000.png'])

@each('note', ['a\u2028b', 'a\x0bb', 'a\x85b', '"a\nb"', '"a,b"'])
def test_cells_that_are_no_ends_of_lines(raw, note):
    rows = [f'{name},{note},{kind}' for name, kind in EIGHT.items()]
    assert labelled(raw, rows, EIGHT, head='file,note,kind', columns=('file', 'kind')) == EIGHT

@each('encoding', ['utf-8-sig', 'cp1252', 'utf-16'])
def test_encodings_of_tables(raw, encoding):
    right = {name: 'Ödem' if kind == 'cat' else 'normal' for name, kind in EIGHT.items()}
    assert labelled(raw, [f'{name};{kind}' for name, kind in right.items()], right, encoding, 'Bild;Art') == right

@each('table', ['file\n0.png\n1.png\n', 'file,kind\nx.png,cat\ny.png,dog\n', ''], ids=['column', 'nobody', 'empty'])
def test_tables_that_cannot_be_used_are_refused(raw, table):
    tree(raw, 'x')
    (raw / 'labels.csv').write_text(table)
    refused(raw, '--labels', 'labels.csv', '--patient', r'(\d)', tells=('label',))

def test_a_label_file_without_a_label_is_refused_by_its_name(raw):
    tree(raw, 'images', layout='{folder}')
    for n in range(3):
        (raw / f'{n}.txt').write_text('')
    rules = '--images', r'images/(\d)', '--labels', r'^(\d)\.txt', '--classes', 'cat', 'dog'
    refused(raw, *rules, tells=(r'/\d.txt',))

def test_pictures_at_the_top_belong_to_no_class(raw):
    tree(raw, 'x', layout='{kind}')
    write(raw / 'overview.png', texture(99))
    code, printed = prepare(raw, '--task', 'mini')
    assert 'overview.png' in printed if code else classes(raw) == ['cat', 'dog']

def test_images_of_each_class_and_split_are_told(raw):
    tree(raw, 'x', layout='{kind}', names='0123456789')
    for n in range(7):
        write(raw / f'handout/{n}.png', texture(900 + n))
    where, *_, printed = task(raw)
    parts = [part for name, part in where.items() if name.startswith('handout')]
    assert [parts.count(part) for part in ('train', 'val', 'test')] == [3, 1, 3]
    assert re.search(r'^\W*handout\D+3\D+1\D+3\b', printed, re.MULTILINE)

@each('few, parts', [(1, ['train']), (2, ['test', 'train']), (3, ['test', 'train', 'train'])])
def test_few_images_of_a_class_feed_training_first(raw, few, parts):
    tree(raw, 'x', layout='{kind}', names='0123456789')
    for n in range(few):
        write(raw / f'rare/{n}.png', texture(500 + n))
    where, *_, printed = task(raw)
    found = sorted(part for name, part in where.items() if name.startswith('rare'))
    assert found in (parts, ['test', 'train', 'val']) and len(found) == few and 'rare' in printed

# --- the pixels of masks ----------------------------------------------------------------------------------------------

@each('value', [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_a_mask_is_no_foreground(raw, value):
    mask = np.float32(ORGAN)
    mask[0, 0] = value
    scans(raw, LPS, LPS, mask)
    code, printed = prepare(raw, '--task', 'mini', '--modality', 'CT', '--values', '0', '*')
    assert 'masks/' in printed if code else np.count_nonzero(np.array(stored(raw)[2]) == 1) == 2 * ORGAN.sum()

COLOURS = np.uint8([[0, 0, 0], [255, 0, 0], [0, 255, 0]])
REGIONS = np.uint8(np.where(blob(), 1, 2 * blob(7)))
NAMED = '#000000', '#ff0000', '#00FF00'
PALETTE = Image.fromarray(2 - REGIONS).convert('P')
PALETTE.putpalette(COLOURS[::-1].flatten().tolist())
FILM = np.uint8(np.dstack([255 * blob()] * 3 + [np.full((S, S), 255)]))     # opaque

@each('mask, name, values', [(FILM, '{}.png', ('0', '255')), (np.float32(blob()), '{}.tif', ('0', '1')),
                             *((COLOURS[REGIONS], '{}.' + end, NAMED) for end in ('png', 'bmp', 'tif'))])
def test_masks_keep_their_numbers_and_colours(raw, mask, name, values):
    pairs(raw, mask, name)
    *_, masks, _ = task(raw, '--classes', *'012'[:len(values)], '--values', *values)
    assert all(np.array_equal(found, REGIONS if values == NAMED else blob()) for found in masks)

@each('name, form', [('{}.jpg', dict(format='JPEG')), ('{}.png', dict(format='JPEG')),
                     ('{}.tif', dict(compression='jpeg'))], ids=['jpg', 'named png', 'in a tiff'])
@each('values', ['*', '255'])
def test_lossy_masks_keep_their_area(raw, name, form, values):
    pairs(raw, 255 * blob(), name, quality=75, **form)
    good, text = right_or_refused(raw, blob(), '--values', '0', values, share=0.03)
    assert good and (raw.parent / 'out').exists(), text

@each('mask, values', [(255 * blob(), ()), (255 * blob(), ('0', '1')), (COLOURS[REGIONS], NAMED)])
def test_lossy_masks_of_near_values_or_colours_are_refused(raw, mask, values):
    pairs(raw, mask, '{}.jpg', quality=95)
    options = ('--classes', *'012'[:len(values)], '--values', *values) * bool(values)
    refused(raw, *options, tells=(r'masks/\d.jpg', 'lossy.*PNG'))

def opacity(colour, channels):
    return np.dstack([np.full((S, S, channels - 1), colour, np.uint8), 255 * blob()])

@each('mask, right, values, more', [
    (opacity(255, 4), blob(), '0*', {}), (opacity(255, 2), blob(), '0*', {}),
    (opacity((255, 0, 0), 4), blob(), ('#000000', '#ff0000'), {}),
    (PALETTE, REGIONS, NAMED, {}), (COLOURS[REGIONS], REGIONS, NAMED, dict(format='JPEG', quality=95, subsampling=0))],
    ids=['alpha', 'grey alpha', 'red alpha', 'palette', 'lossy'])
def test_masks_in_other_channels_are_right_or_refused(raw, mask, right, values, more):
    pairs(raw, blob())
    for n in range(2):
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(raw / f'masks/{n}.png', **more)
    options = '--classes', *'012'[:len(values)], '--values', *values
    good, text = right_or_refused(raw, right, *options, share=0.06 * bool(more))
    assert good, text

def test_masks_in_npy_may_be_bool(raw):
    pairs(raw, blob())
    for path in raw.glob('masks/*.png'):
        np.save(path.with_suffix('.npy'), blob() > 0)
        path.unlink()
    assert all(np.array_equal(mask, blob()) for mask in task(raw)[2])

@each('values', ['*', '255'])
@each('third', [(0, 255, 0), (255, 255, 255), (128, 0, 0)])
def test_several_colours_without_names_are_refused(raw, values, third):
    pairs(raw, np.uint8([(0, 0, 0), (255, 0, 0), third])[REGIONS])
    refused(raw, '--values', '0', values, tells=(r'masks/\d.png',))

@each('many', [False, True])
def test_a_star_that_takes_many_values_is_told(raw, many):
    pairs(raw, np.uint8(blob() * (1 + texture(5) % 60 if many else 255)))
    *_, masks, printed = task(raw, '--values', '0', '*')
    assert all(np.array_equal(mask, blob()) for mask in masks) and ('*' in printed and 'value' in printed) == many

# --- turned, linked and repeated files --------------------------------------------------------------------------------

def turned(tag):
    exif = Image.Exif()
    exif[274] = tag     # orientation; 6 is to be turned right by 90 degrees
    return exif

@each('tag, end', [(2, 'jpg'), (3, 'png'), (6, 'tif')])
@each('masks', [[r'masks/(\d)'], [r'masks/(\d)', r'more/(\d)']], ids=['one', 'one a class'])
def test_a_turned_image_whose_mask_is_not_turned_is_refused(raw, tag, end, masks):
    pairs(raw, blob(), image='{}.' + end, exif=turned(tag))
    shutil.copytree(raw / 'masks', raw / 'more')
    options = '--images', r'images/(\d)', '--masks', *masks, '--classes', *'012'[:len(masks) + 1]
    refused(raw, *options, tells=(rf'images/\d.{end}',))

@each('tag', [1, 3])
@each('mask', ['grey', 'palette', 'alpha'])
def test_images_and_masks_that_are_turned_alike(raw, tag, mask):
    saved = dict(grey=Image.fromarray(blob()), palette=PALETTE, alpha=Image.fromarray(opacity(255, 4)))[mask]
    pairs(raw, blob(), image='{}.jpg', exif=turned(tag))
    for n in range(2):
        saved.save(raw / f'masks/{n}.png', exif=turned(tag))
    options = dict(palette=('2', '1', '0'), alpha=('0', '*'), grey=('0', '1'))[mask]
    right = np.rot90(REGIONS if mask == 'palette' else blob(), 2 * (tag == 3))
    good, text = right_or_refused(raw, right, '--classes', *'012'[:len(options)], '--values', *options)
    assert good and (tag == 3 or (raw.parent / 'out').exists()), text

@each('link, target', [('loop', '.'), ('cat/up', '..'), ('cat/self', '.'), ('again', 'dog')])
def test_linked_folders_are_visited_once(raw, link, target):
    tree(raw, 'x', layout='{kind}')
    (raw / link).symlink_to(target)
    where, images, *_ = task(raw)
    assert len(where) == len(images) == 6 and classes(raw) in (['cat', 'dog'], ['again', 'cat'])

@each('name', ['line\nbreak.png', '#[0]* (1).png', os.fsdecode(b'latin\xff.png'), 'Größe.PNG'])
def test_odd_names_are_read_and_written(raw, name):
    tree(raw / 'y', 'x', layout='{kind}')
    for folder in ('Photo/a', 'y/cat', 'y/dog'):
        write(raw / folder / name, texture(len(folder)))
    write(raw / 'Photo/a' / f'small {name}', texture(0)[:4])
    images, dropped = source(raw, 'a', '--images', r'^.+\.png$')        # . is a line break too
    assert np.array_equal(images[..., 0], [texture(7)]) and [row['path'] for row in dropped] == [f'small {name}']
    assert {f'cat/{name}', f'dog/{name}'} <= task(raw / 'y')[0].keys()

# --- DICOM ------------------------------------------------------------------------------------------------------------

needs_dcm2niix = pytest.mark.skipif(not shutil.which('dcm2niix'), reason='dcm2niix is not installed')
KIND = {'CT': '2', 'MR': '4', 'CR': '1', 'DX': '1.1', 'MG': '1.2', 'US': '6.1'}     # the end of the SOP class

def write_dicom(folder, positions, modality='CT', end='.dcm', rgb=False, series=1, tilt=0):
    """A series of slices at these positions (mm along z), each a ramp of HU from a start of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, z in enumerate(positions):
        pixels = texture(n, 3) if rgb else ramp(-200, 400, 'i2') + np.int16(9 * n)
        y, bits = -24 + z * np.tan(np.radians(tilt)), 8 * pixels.itemsize
        values = [(0x20000, 'UL', 28), (0x20010, 'UI', '1.2.840.10008.1.2.1'), (0x80008, 'CS', r'ORIGINAL\PRIMARY'),
                  (0x80016, 'UI', f'1.2.840.10008.5.1.4.1.1.{KIND[modality]}'), (0x80018, 'UI', f'1.2.3.{series}.{n}'),
                  (0x80060, 'CS', modality), (0x80070, 'LO', 'SIEMENS'), (0x100020, 'LO', 'p1'), (0x180050, 'DS', '3'),
                  (0x181120, 'DS', f'{tilt}'), (0x181210, 'SH', r'Br38f\3'), (0x20000d, 'UI', '1.2.3'),
                  (0x20000e, 'UI', f'1.2.3.{series}'), (0x200011, 'IS', f'{series}'), (0x200013, 'IS', f'{n + 1}'),
                  (0x200032, 'DS', rf'-24\{y:.4f}\{z}'), (0x200037, 'DS', r'1\0\0\0\1\0'),
                  (0x280002, 'US', 1 + 2 * rgb),
                  (0x280004, 'CS', 'RGB' if rgb else 'MONOCHROME2'), (0x280010, 'US', S), (0x280011, 'US', S),
                  (0x280030, 'DS', r'1\1'), (0x280100, 'US', bits), (0x280101, 'US', bits), (0x280102, 'US', bits - 1),
                  (0x280103, 'US', 1 - rgb), (0x281052, 'DS', '0'), (0x281053, 'DS', '1'),
                  (0x7fe00010, 'OW', pixels.tobytes())]
        data = b'\0' * 128 + b'DICM'
        for tag, form, value in values:
            body = value.encode() if isinstance(value, str) else value
            body = struct.pack({'US': '<H', 'UL': '<I'}[form], value) if form in ('US', 'UL') else body
            body += (b'\0' if form == 'UI' else b' ') * (len(body) % 2)
            size = struct.pack('<HI', 0, len(body)) if form == 'OW' else struct.pack('<H', len(body))
            data += struct.pack('<HH', tag >> 16, tag & 0xffff) + form.encode() + size + body
        (folder / f'IM{n:04d}{end}').write_bytes(data)

EVEN, UNEVEN = (0, 3, 6, 9, 12, 15), (0, 3, 6, 12, 15, 21)

@needs_dcm2niix
@each('case', [dict(), dict(positions=UNEVEN), dict(tilt=15), dict(end=''), dict(end='.ima')],
      ids=['even', 'uneven', 'tilted', 'no ending', 'ima'])
def test_dicom_series(raw, case):
    write_dicom(raw / 'CT/a/p1/series', **dict(positions=EVEN) | case)
    images, dropped = source(raw)
    right = [np.clip((ramp(-200, 400, 'i4') + 9 * n + 200) / 600, 0, 1) * 255 for n in range(6)]
    assert len(images) == 6 and not dropped     # as scanned, not interpolated
    order = np.argsort(images.mean((1, 2, 3)))
    assert np.abs(images[order, ..., 0] - right).max() <= 0.51

def fake(folder, monkeypatch, name, script):
    """A program of that name, found before others."""
    (folder / 'bin').mkdir()
    (folder / 'bin' / name).write_text('#!/bin/sh\n' + script)
    (folder / 'bin' / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}/bin:{os.environ["PATH"]}')

@needs_dcm2niix
def test_a_stray_backslash_in_the_json_of_dcm2niix(raw, monkeypatch):
    mend = 'for a in "$@"; do [ -d "$a" ] && sed -i "s/f..3/f\\\\\\\\3/" "$a"/*.json; done; exit 0\n'
    write_dicom(raw / 'CT/a/p1', EVEN)
    fake(raw.parent, monkeypatch, 'dcm2niix', f'{shutil.which("dcm2niix")} "$@"\n' + mend)
    assert len(source(raw)[0]) == 6

@needs_dcm2niix
def test_nested_dicom_series_are_read_once(raw):
    for n, folder in enumerate(('p1', 'p1/thin', 'p1/thin/deep')):
        write_dicom(raw / 'CT/a' / folder, EVEN[n:], series=n + 1)
    assert len(source(raw)[0]) == 6 + 5 + 4

@needs_dcm2niix
@each('modality', ['CR', 'DX', 'MG', 'US'])
def test_dicom_of_other_kinds_is_named(raw, modality):
    write_dicom(raw / 'X-ray/a/film', (0,), modality, rgb=modality == 'US')
    write(raw / 'X-ray/a/0.png', texture(0))
    images, dropped = source(raw)
    assert len(images) == 2 or 'film' in dropped[0]['path'] and re.search(f'DICOM|{modality}|CT', dropped[0]['detail'])

# --- what stops a preparation, and what must not ----------------------------------------------------------------------

@each('program', ['ffmpeg', 'dcm2niix'])
def test_without_a_program_nothing_is_half_done(raw, monkeypatch, program):
    monkeypatch.setenv('PATH', '')
    for name in 'ab':
        write(raw / f'CT/{name}/0.png', texture(0))
    (raw / 'CT/b/x.mp4').write_bytes(b'video') if program == 'ffmpeg' else write_dicom(raw / 'CT/b/x', EVEN)
    code, printed = prepare(raw, '--min_side', 8)
    told_before = code and program in printed and not (raw.parent / 'out/a').exists()
    assert told_before or not code and program in (raw.parent / 'out/b/dropped.csv').read_text()

def test_two_preparations_into_one_folder(raw, monkeypatch):
    for n in range(3):
        write(raw / f'Endoscope/a/{n}.png', texture(n))
    (raw / 'Endoscope/a/x.mp4').write_bytes(b'video')
    go, started = raw.parent / 'go', raw.parent / 'started'     # the first run waits in ffmpeg while the second runs
    wait = f'if mkdir {started}; then while [ ! -e {go} ]; do sleep 0.05; done; fi\n'
    fake(raw.parent, monkeypatch, 'ffmpeg', wait + f'head -c {3 * S * S} /dev/urandom\n')
    options = '--raw', raw, '--out', raw.parent / 'out', '--size', str(S), '--workers', '1', '--min_side', '8'
    command = sys.executable, ROOT / 'prepare_medverse.py', *options
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not started.exists() and first.poll() is None:
        time.sleep(0.05)
    code, printed = prepare(raw, '--min_side', 8)
    go.touch()
    printed += first.communicate()[1]
    assert 0 in (code, first.returncode) and not re.search('room|full', printed), printed
    assert sum(len(np.load(path)) for path in raw.parent.glob('out/a/*.npy')) == 4

def test_only_a_full_disk_is_called_one(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    (raw.parent / 'file').write_text('in the way')
    code, printed = prepare(raw, out='file')
    assert code and '/file' in printed and not re.search('room|full', printed)

def test_a_picture_of_billions_of_pixels_is_named(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    write_png(raw / 'Photo/a/bomb.png', ramp(0, 9, 'u2')[..., None], side=60000)
    images, (row,) = source(raw)
    assert len(images) == 1 and row['path'] == 'bomb.png' and re.search('60000|60,000|large|more', row['detail'])

def test_a_mask_of_billions_of_pixels_is_refused_by_its_name(raw):
    pairs(raw, blob())
    write_png(raw / 'masks/0.png', ramp(0, 9, 'u2')[..., None].repeat(4, 2), side=60000)
    assert re.search('60000|60,000|large|more', refused(raw, tells=('masks/0.png',)))

def test_the_file_that_killed_a_worker_is_named(raw, monkeypatch):
    fake(raw.parent, monkeypatch, 'ffmpeg', 'kill -9 $PPID\n')
    write(raw / 'Endoscope/a/0.png', texture(0))
    (raw / 'Endoscope/a/x.mp4').write_bytes(b'video')
    code, printed = prepare(raw, '--min_side', 8)
    assert 'x.mp4' in (printed if code else (raw.parent / 'out/a/dropped.csv').read_text())

def test_another_size_than_before_is_refused(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    source(raw)
    code, printed = prepare(raw, '--min_side', 8, size=32)
    assert code and '/out/a' in printed and np.load(raw.parent / 'out/a/00000.npy').shape[1] == S

def test_raw_one_folder_too_deep(raw):
    write(raw / 'CT/a/0.png', texture(0))
    code, printed = prepare(raw / 'CT')
    assert code and re.search('deep|above|lies in', printed)

@each('name', ['Xray', 'x-ray', 'mr', 'ENDOSCOPE', 'suv'])
def test_modalities_are_understood_in_any_spelling(raw, name):
    pairs(raw, blob())
    task(raw, '--modality', name)
    assert json.loads((raw.parent / 'out/meta.json').read_text())['modality'] in (*prep.MODALITIES, 'SUV')

def test_a_source_left_out_is_not_called_accounted_for(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    write(raw / 'Photo/empty-one/readme.xyz', texture(0), format='PNG')
    _, printed = prepare(raw, '--min_side', 8)
    table = printed[printed.rindex('\nmodality'):]
    assert 'empty-one' in printed and ('accounted' not in table or 'empty-one' in table)

def test_meta_images_are_counted_as_not_read(raw):
    write(raw / 'CT/a/0.png', texture(0))
    for end in ('mhd', 'raw'):
        (raw / f'CT/a/x.{end}').write_text('ObjectType = Image\nNDims = 2\n')
    assert {(row['path'], row['reason']) for row in source(raw)[1]} == {('x.mhd', 'other'), ('x.raw', 'other')}

# --- options ----------------------------------------------------------------------------------------------------------

def test_a_mistyped_option_gives_one_line(raw):
    code, printed = prepare(raw, '--stepz', '3')
    assert code == 2 and printed.strip() == 'prepare_medverse.py: error: unrecognized arguments: --stepz 3'

def test_torch_is_not_imported():
    code = 'import sys, prepare_medverse; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
