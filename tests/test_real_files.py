"""prepare_medverse.py on files as people really have them: small synthetic ones, whose right values are worked out here by
NumPy, nibabel and Pillow. Where the right answer is a matter of taste, a file is either refused by its name or right."""
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

# --- helpers --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def raw(tmp_path):
    (tmp_path / 'raw').mkdir()
    return tmp_path / 'raw'

def prepare(raw, *options, out='out', size=S):
    """(exit code, all that is printed, without the folder of the test) of a preparation of RAW into its neighbour `out`."""
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
    return np.concatenate(shards) if shards else np.zeros((0, S, S, 1), np.uint8), dropped

def task(raw, *options):
    """({path: its split}, images, answers, all that is printed) of a task; of pictures the three are in the same order."""
    code, printed = prepare(raw, '--task', 'mini', *options)
    assert code == 0, printed
    out, images, answers = raw.parent / 'out', [], []
    splits = json.loads((out / 'split.json').read_text())
    for part in ('train', 'val', 'test'):
        images += [*np.load(out / part / 'images.npy')]
        answers += [*np.load(next(path for path in (out / part).iterdir() if path.stem in ('masks', 'labels')))]
    return {name: part for part, names in splits.items() for name in names}, images, answers, printed

def classes(raw):
    return json.loads((raw.parent / 'out/meta.json').read_text())['classes']

def refused(raw, *tells, options=('--task', 'mini')):
    """What is printed where a preparation must be refused, leave nothing behind and name all of `tells`."""
    code, printed = prepare(raw, *options)
    assert code and not [*raw.parent.glob('out*')], printed
    assert all(tell in printed for tell in tells), printed
    return printed

def right_or_refused(raw, right, *tells, options=()):
    """Either every mask equals `right` or the preparation ends with a sentence that names all of `tells`."""
    code, printed = prepare(raw, '--task', 'mini', *options)
    assert all(tell in printed for tell in tells) if code else True, printed
    for path in raw.parent.glob('out/*/masks.npy'):
        assert np.array_equal(np.load(path), np.broadcast_to(right, np.load(path).shape)), f'{path} is silently wrong'

def write(path, array, **more):
    """A picture by Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **more)

def texture(seed, *channels):
    """Random uint8 (S, S[, 3]) from 0 to 255."""
    return np.random.default_rng(seed).integers(0, 256, (S, S, *channels), dtype=np.uint8)

def blob(seed=0):
    """bool (S, S), true in an ellipse that is no mirror image or turn of itself."""
    x, y = np.random.default_rng(seed).integers(3, 12, 2).tolist()
    picture = Image.new('1', (S, S))
    ImageDraw.Draw(picture).ellipse((x, y, x + 30, y + 12), 1)
    return np.asarray(picture)

def pairs(raw, mask, name='{}.png', **more):
    """Two images with the same mask."""
    for n in range(2):
        write(raw / f'images/{n}.png', texture(n))
        write(raw / 'masks' / name.format(n), mask, **more)

def ramp(low, high, kind):
    """(S, S) of all values from low to high, in equal steps."""
    return np.linspace(low, high, S * S).round().reshape(S, S).astype(kind)

def linear(array, low, high):
    """From the window low ... high to 0 ... 255."""
    return ((np.clip(np.float64(array), low, high) - low) / (high - low) * 255)[..., None]

def write_tiff(path, *pages, order='<', photometric=1):
    """A plain TIFF of one strip a page: any type of number, either byte order, with or without white as zero."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'I', 8)
    for number, page in enumerate(pages, 1):
        kind, bits = {'u': 1, 'i': 2, 'f': 3}[page.dtype.kind], 8 * page.dtype.itemsize
        after = len(data) + 2 + 9 * 12 + 4
        tags = {256: page.shape[1], 257: page.shape[0], 258: bits, 259: 1, 262: photometric, 273: after, 278: page.shape[0],
                279: page.nbytes, 339: kind}
        data += struct.pack(order + 'H', len(tags)) + b''.join(struct.pack(order + 'HHII', tag, 4, 1, value)
                                                               for tag, value in tags.items())
        data += struct.pack(order + 'I', (number < len(pages)) * (after + page.nbytes))
        data += page.astype(page.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(data)

def write_png(path, array, side=0):
    """A PNG of 16 bits of grey, or with alpha, or RGB, or RGBA; with `side` its header lies about its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = array.reshape(*array.shape[:2], -1)
    header = struct.pack('>IIBBBBB', side or array.shape[1], side or len(array), 16, (0, 4, 2, 6)[array.shape[2] - 1], 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body)) for name, body in chunks))

def write_nifti(path, array, affine, sform=1, qform=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    nib.save(image, path)

def organ(shape=(S, S, S)):
    """uint8 volume of two boxes of 1 on 0 that no mirror and no turn maps to themselves."""
    mask = np.zeros(shape, np.uint8)
    mask[5:30, 8:20, shape[2] // 5:shape[2] // 2] = 1
    mask[25:45, 15:40, shape[2] // 4:shape[2] // 3] = 1
    return mask

def scans(raw, affine, other, mask=None, ends=('.nii.gz', '.nii'), forms=((1, 1), (1, 1)), folders=('masks',), shape=(S, S, S)):
    """Two CT volumes, bright where the organ is, and their masks with another affine."""
    bright = np.int16(50 + 200 * np.int16(organ(shape)))
    for n in range(2):
        write_nifti(raw / f'images/{n}{ends[0]}', np.int16(bright + n), affine, *forms[0])
        for folder in folders:
            write_nifti(raw / f'{folder}/{n}{ends[1]}', organ(shape) if mask is None else mask, other, *forms[1])

# --- images and masks on different grids ----------------------------------------------------------------------------------

LPS = np.diag([-1.0, -1, 3, 1])
OBLIQUE = np.array([[2 ** -0.5, -2 ** -0.5, 0, 0], [2 ** -0.5, 2 ** -0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
CT = '--task', 'mini', '--modality', 'CT'

def moved(affine, **entries):
    """The affine with some entries replaced, as x_w=10 (the last column of its first row)."""
    affine = affine.copy()
    for name, value in entries.items():
        affine['xyz'.index(name[0]), 'xyzw'.index(name[2])] = value
    return affine

@pytest.mark.parametrize('other', [np.eye(4), moved(LPS, x_x=1, x_w=1 - S), moved(LPS, x_w=20), moved(LPS, z_z=2.5),
                                   OBLIQUE @ LPS, LPS[[1, 0, 2, 3]]], ids=['eye', 'mirror', 'shift', 'spacing', 'turn', 'swap'])
def test_a_mask_on_another_grid_is_refused(raw, other):
    scans(raw, LPS, other)
    refused(raw, 'images/0.nii.gz', 'masks/0.nii', options=CT)

def test_a_mask_of_other_sides_is_refused(raw):
    scans(raw, LPS, LPS, organ((S, S, S - 1)))
    refused(raw, 'images/0.nii.gz', 'masks/0.nii', options=CT)

@pytest.mark.parametrize('affine, other', [
    (moved(OBLIQUE, x_x=2 ** -0.5 + 1e-6), moved(OBLIQUE, y_x=2 ** -0.5 + 1e-6)),   # x and y are exchanged by one of the two
    (np.diag([1, 1, 0.99001, 1]), np.diag([1, 1, 0.98999, 1])),                     # and cut across another axis
    (LPS, moved(LPS, x_w=1e-4))], ids=['45 degrees', 'thickness', 'rounding'])
@pytest.mark.parametrize('ends', [('.nii.gz', '.nii'), ('.nii', '.nii.gz')])
def test_a_mask_is_cut_as_its_image(raw, affine, other, ends):
    scans(raw, affine, other, ends=ends)
    agree(*task(raw, *CT)[1:3])

def agree(images, masks):
    """Every image is bright exactly where its mask is 1."""
    assert sum(map(np.count_nonzero, masks)) == 2 * np.count_nonzero(organ())
    assert all(np.array_equal(image[..., 0] > 180, mask == 1) for image, mask in zip(images, masks))

@pytest.mark.parametrize('forms', [((1, 0), (0, 1)), ((0, 1), (1, 0)), ((2, 1), (1, 0))])
@pytest.mark.parametrize('kind', [np.uint8, np.float32, np.int64])
def test_one_grid_by_sform_or_qform_and_any_type_of_mask(raw, forms, kind):
    scans(raw, LPS, LPS, organ().astype(kind), forms=forms)
    agree(*task(raw, *CT)[1:3])

@pytest.mark.parametrize('other', [np.eye(4), moved(LPS, x_w=20)], ids=['eye', 'shift'])
def test_one_mask_a_class_on_another_grid_is_refused(raw, other):
    scans(raw, LPS, LPS, folders=('first',))
    scans(raw, LPS, other, folders=('second',))
    masks = '--masks', r'first/(.*)\.nii', r'second/(.*)\.nii', '--images', r'images/(.*)\.nii'
    refused(raw, 'images/0.nii.gz', 'second/0.nii', options=(*CT, *masks, '--classes', 'none', 'first', 'second'))

@pytest.mark.parametrize('sides', [((S, S), (S - 8, S)), ((S - 8, S), (S - 8, S)), ((S // 2, S // 2), (S, S))])
def test_one_mask_a_class_of_other_sides_is_refused(raw, sides):
    for n in range(2):
        write(raw / f'images/{n}.png', texture(n))
        for folder, side in zip(('first', 'second'), sides):
            write(raw / f'{folder}/{n}.png', np.pad(np.uint8([[255]]), [(3, side[0] - 4), (4, side[1] - 5)]))
    masks = '--masks', r'first/(.*)\.png', r'second/(.*)\.png', '--images', r'images/(.*)\.png'
    refused(raw, '0.png', options=('--task', 'mini', *masks, '--classes', 'none', 'first', 'second'))

def test_a_mask_of_three_axes_for_an_image_of_four(raw):
    for n in range(2):
        write_nifti(raw / f'images/{n}.nii', np.stack([ramp(0, 200, 'i2')[..., None].repeat(3, 2)] * 2, 3), LPS)
        write_nifti(raw / f'masks/{n}.nii', organ((S, S, 3)), LPS)
    assert 'zip()' not in refused(raw, '0.nii', options=CT)

# --- pictures of more than 8 bits -----------------------------------------------------------------------------------------

HU = np.tile(np.repeat([-1000, -100, 0, 40, 300, 500], 8), (S, 1))

@pytest.mark.parametrize('save', [
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
    (image,), _ = source(raw)
    assert np.abs(image - linear(HU, -200, 400)).max() <= 0.51      # 0 42 85 102 212 255

@pytest.mark.parametrize('end, values', [('png', np.uint16(HU + 32768)), ('pgm', np.uint16(HU + 32768))])
def test_hounsfield_units_with_an_offset_are_not_silently_lost(raw, end, values):
    write(raw / f'CT/a/scan.{end}', values)
    images, dropped = source(raw)
    if len(images):
        assert np.abs(images[0] - linear(HU, -200, 400)).max() <= 0.51
    else:       # what its values are must be told, since "48 x 48 px" explains nothing
        assert dropped[0]['path'] == f'scan.{end}' and re.search(r'\d{5}|HU|offset|window', dropped[0]['detail'])

@pytest.mark.parametrize('kind, high', [('u2', 4095), ('u2', 16383), ('u2', 65535), ('u2', 300), ('i4', 100000), ('f4', 1)])
@pytest.mark.parametrize('order', '<>')
def test_the_range_of_a_picture_is_its_own(raw, kind, high, order):
    values = ramp(0, high, kind) if kind != 'f4' else np.float32(ramp(0, 10000, 'f4') / 10000)
    write_tiff(raw / 'OCT/a/ramp.tif', values, order=order)
    if (kind, order) == ('u2', '<'):
        Image.fromarray(values[::-1]).save(raw / 'OCT/a/ramp.png')
    images, _ = source(raw)
    assert len(images) == 1 + ((kind, order) == ('u2', '<'))
    assert np.abs(images[-1] - linear(values, 0, high)).max() <= 0.51

def test_one_bright_pixel_beyond_12_bits(raw):
    values = ramp(0, 4095, 'u2')
    values[-1, -1] = 4200
    write(raw / 'X-ray/a/ramp.png', values)
    assert np.abs(source(raw)[0] - linear(values, 0, 4200)).max() <= 0.51

def test_percentiles_of_an_mr_picture(raw):
    values = ramp(0, 4095, 'u2')
    write(raw / 'MR/a/ramp.png', values)
    assert np.abs(source(raw)[0] - linear(values, *np.percentile(values, [1, 99]))).max() <= 0.51

def test_the_pages_of_a_file_share_a_window(raw):
    pages = ramp(0, 4000, 'u2'), ramp(5000, 0, 'u2')
    write_tiff(raw / 'OCT/a/stack.tif', *pages)
    images, _ = source(raw)
    assert [image.max() for image in images] == [204, 255]
    assert np.abs(images - linear(pages, 0, 5000)).max() <= 0.51

@pytest.mark.parametrize('header, kind, high', [(b'P5', '>u2', 4095), (b'P2', '', 1000), (b'P5', '>u2', 65535), (b'P5', 'u1', 100)])
def test_the_maximum_of_a_pgm_is_honoured(raw, header, kind, high):
    (raw / 'CT/a').mkdir(parents=True)
    values = ramp(0, 90, 'u2')      # dark content
    data = values.astype(kind).tobytes() if kind else ' '.join(map(str, values.flat)).encode()
    (raw / 'CT/a/dark.pgm').write_bytes(header + f'\n{S} {S}\n{high}\n'.encode() + data)
    right = linear(values, -200, 400) if high > 255 else linear(values, 0, high)        # what has 8 bits stays as it is
    assert np.abs(source(raw)[0] - right).max() <= 0.51 + (high < 256)

@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('kind, high', [('u2', 65535), ('u2', 4095), ('u1', 255)])
def test_white_may_be_zero(raw, order, kind, high):
    values = ramp(0, high, kind)
    write_tiff(raw / 'X-ray/a/film.tif', values, order=order, photometric=0)
    assert np.abs(source(raw)[0] - linear(values, high, 0)).max() <= 0.51

@pytest.mark.parametrize('channels', [2, 3, 4])
def test_colours_of_16_bits_are_not_silently_dark(raw, channels):
    values = ramp(0, 4095, 'u2')[..., None].repeat(channels, 2)
    values[..., 3:] = 65535
    write_png(raw / 'Photo/a/deep.png', values)
    images, dropped = source(raw)
    assert len(images) and images.max() > 250 or dropped[0]['path'] == 'deep.png'

def test_a_mask_of_16_bits_keeps_its_numbers(raw):
    pairs(raw, np.uint16(blob() * 300 + blob(1) * 1000))
    _, _, masks, _ = task(raw, '--values', '0', '300', '1000+1300', '--classes', 'none', 'first', 'second')
    assert all(np.array_equal(mask, np.where(blob(1), 2, blob())) for mask in masks)

@pytest.mark.parametrize('end', ['npy', 'png', 'gif', 'tif'])
def test_one_bit_is_black_and_white(raw, end):
    (raw / 'X-ray/a').mkdir(parents=True)
    np.save(raw / 'X-ray/a/0.npy', blob()) if end == 'npy' else write(raw / f'X-ray/a/0.{end}', blob())
    assert np.array_equal(source(raw)[0], 255 * blob()[None, ..., None])

def test_masks_in_npy_may_be_bool(raw):
    pairs(raw, texture(0))
    for n in range(2):
        (raw / f'masks/{n}.png').unlink()
        np.save(raw / f'masks/{n}.npy', blob())
    assert all(np.array_equal(mask, blob()) for mask in task(raw)[2])

def test_nifti_in_colour(raw):
    colours = texture(0, 3)
    pixels = np.ascontiguousarray(colours.swapaxes(0, 1)[::-1, ::-1, None]).view([(c, 'u1') for c in 'RGB'])[..., 0]
    write_nifti(raw / 'Photo/a/scan.nii.gz', pixels, np.diag([1, 1, 3, 1]))
    assert np.array_equal(source(raw)[0], colours[None])

# --- the splits that a data set comes with --------------------------------------------------------------------------------

def tree(raw, *folders, layout='{folder}/{kind}', names='012', first=0):
    """Pictures of two classes, cat and dog, in each of the folders."""
    for f, folder in enumerate(folders):
        for k, kind in enumerate(('cat', 'dog')):
            for n, name in enumerate(names):
                write(raw / layout.format(folder=folder, kind=kind) / f'{name}.png', texture(first + 100 * f + 10 * k + n))

@pytest.mark.parametrize('folders', [('Training', 'Testing'), ('training', 'testing'), ('TRAIN', 'Test'), ('train', 'test'),
                                     ('Train', 'Valid', 'Test'), ('training', 'validation', 'testing'), ('train', 'val', 'test')])
@pytest.mark.parametrize('layout', ['{folder}/{kind}', 'set/{folder}/{kind}'])
def test_folders_of_splits_are_taken(raw, folders, layout):
    tree(raw, *folders, layout=layout)
    where, _, _, printed = task(raw)
    given = {name: name.split('/')[-3] for name in where}
    assert len(where) == 6 * len(folders) and classes(raw) == ['cat', 'dog']
    assert {given[name] for name, part in where.items() if part == 'test'} == {folders[-1]}
    assert all(part == 'test' for name, part in where.items() if given[name] == folders[-1])
    assert {part for name, part in where.items() if given[name] == folders[0]} <= {'train', 'val'}
    if len(folders) == 3:
        assert {(given[name], part) for name, part in where.items()} == {*zip(folders, ('train', 'val', 'test'))}
    assert folders[-1].lower() in re.sub('/raw[^ :]*', '', printed).lower()     # the rule is told

@pytest.mark.parametrize('second', ['val', 'Valid', 'validation'])
def test_training_and_validation_without_a_test(raw, second):
    tree(raw, 'train', second)
    where, *_ = task(raw)
    assert len(where) == 12
    taken = {part for name, part in where.items() if name.startswith(second)}
    assert len(taken) == 1 and 'train' not in taken
    assert all(name.startswith(second) for name, part in where.items() if part in taken)

def test_patients_on_both_sides_of_a_given_split_are_named(raw):
    tree(raw, 'train', names=('p1_0', 'p2_0'))
    tree(raw, 'test', names=('p1_1', 'p3_0'), first=50)
    code, printed = prepare(raw, '--task', 'mini', '--patient', r'(p\d)_')
    assert 'p1' in printed and 'patient' in printed and 'p2' not in printed and 'p3' not in printed

def test_identical_pictures_in_train_and_test_are_counted(raw):
    tree(raw, 'train', 'test')
    for name in ('cat/0', 'cat/1', 'dog/2'):
        shutil.copy(raw / f'train/{name}.png', raw / f'test/{name}.png')
    Image.open(raw / 'train/dog/0.png').save(raw / 'test/dog/0.png', compress_level=1)     # other bytes, the same picture
    *_, printed = task(raw)
    assert re.search(r'\b4\b.*(same|identical|twin|duplicate|repeat|also)', printed), printed

@pytest.mark.parametrize('twins', [False, True])
def test_identical_pictures_in_a_drawn_split_are_counted(raw, twins):
    tree(raw, 'x', names='01234567', layout='{kind}')
    if twins:
        for path in [*raw.glob('*/?.png')]:
            shutil.copy(path, path.with_stem(path.stem + 'b'))
    where, images, _, printed = task(raw)
    train = {image.tobytes() for image, part in zip(images, where.values()) if part == 'train'}
    shared = sum(image.tobytes() in train for image, part in zip(images, where.values()) if part == 'test')
    assert (shared > 0) == twins == bool(re.search(rf'\b{shared}\b.*(same|identical|twin|duplicate|repeat|also)', printed))

@pytest.mark.parametrize('lines', ['{}.png\n', ' {} \r\n', '\ufeff{}\n', 'cat/{}.png\n'])
def test_lists_of_splits(raw, lines):
    tree(raw, 'x', names=('case 01', '1.2.3', 'c'), layout='{kind}')
    shutil.rmtree(raw / 'dog')
    (raw / 'names.csv').write_text('name,kind\ncase 01,x\n1.2.3,x\nc,x\n')
    for part, name in zip(('train', 'val', 'test'), ('case 01', '1.2.3', 'c')):
        (raw / f'{part}.txt').write_text(lines.format(name), encoding='utf-8')
    for n, name in enumerate(('case 01', '1.2.3', 'c')):
        write(raw / f'masks/{name}.png', np.uint8(blob(n)))
    options = '--images', r'cat/(.*)\.png', '--masks', r'masks/(.*)\.png', '--split', 'train.txt', 'val.txt', 'test.txt'
    assert task(raw, *options)[0] == {'cat/case 01.png': 'train', 'cat/1.2.3.png': 'val', 'cat/c.png': 'test'}

# --- labels ---------------------------------------------------------------------------------------------------------------

def labelled(raw, table, *names, encoding='utf-8'):
    """{path: its class} that a table gives to pictures of these paths."""
    for n, name in enumerate(names):
        write(raw / name, texture(n))
    (raw / 'labels.csv').write_text(table, encoding=encoding)
    where, _, answers, _ = task(raw, '--labels', 'labels.csv')
    return dict(zip(where, np.array(classes(raw))[np.int64(answers)].tolist()))

@pytest.mark.parametrize('row', ['siteA/00{}.png,{}', 'siteA/00{},{}', 'x/siteA/00{}.png,{}', 'x/siteA/00{},{}', 'x\\siteA\\00{}.png,{}'])
def test_a_label_is_for_the_path_that_the_table_gives(raw, row):
    table = '\n'.join(['file,kind', *(row.format(n, ('cat', 'dog')[n % 2]) for n in range(4))])
    names = [f'x/site{site}/00{n}.png' for n in range(4) for site in 'AB']
    assert labelled(raw, table, *names) == {f'x/siteA/00{n}.png': ('cat', 'dog')[n % 2] for n in range(4)}

def test_sites_have_labels_of_their_own(raw):
    rows = [f'{site}/00{n},{kind}' for site, kind in (('siteA', 'cat'), ('siteB', 'dog')) for n in range(4)]
    right = {f'{row.split(",")[0]}.png': row.split(',')[1] for row in rows}
    assert labelled(raw, '\n'.join(['file,kind', *rows]), *right) == right

def test_a_row_for_two_files_is_not_silent(raw):
    for n, name in enumerate(('siteA/000', 'siteB/000', 'siteA/001', 'siteA/002', 'siteA/003', 'siteA/004')):
        write(raw / f'{name}.png', texture(n))
    (raw / 'labels.csv').write_text('file,kind\n000,cat\n001,cat\n002,dog\n003,dog\n004,cat\n')
    _, printed = prepare(raw, '--task', 'mini', '--labels', 'labels.csv')
    assert '000' in printed

def test_rows_of_other_folders_label_nothing(raw):
    names = [f'img/{n}.png' for n in range(10)]
    table = '\n'.join(['file,kind', *(f'img/{n}.png,{("cat", "dog")[n % 2]}' for n in range(8)), '/etc/8.png,cat', '../../9.png,dog'])
    assert labelled(raw, table, *names) == {f'img/{n}.png': ('cat', 'dog')[n % 2] for n in range(8)}

@pytest.mark.parametrize('end', ['', '.png'])
def test_names_with_dots(raw, end):
    right = {f'p{n // 2}.v{n % 2}': ('cat', 'dog')[n % 2] for n in range(8)} | {'1.3.6.1.4': 'cat', '1.3.6.1.5': 'dog'}
    table = '\n'.join(['file,kind', *(f'{name}{end},{kind}' for name, kind in right.items())])
    assert labelled(raw, table, *(f'{name}.png' for name in right)) == {f'{name}.png': kind for name, kind in right.items()}

def test_cells_with_blanks_around_them_and_empty_ones(raw):
    right = {f'{n}.png': ('cat', 'dog')[n % 2] for n in range(8)}
    rows = [f' {name} , {kind}  ' for name, kind in right.items()]
    table = '\n'.join([' file , kind ', *rows, '8.png,', '9.png,  ', ',cat', ''])
    assert labelled(raw, table, *right, '8.png', '9.png') == right and classes(raw) == ['cat', 'dog']

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'cp1252', 'utf-16'])
def test_encodings_of_tables(raw, encoding):
    right = {f'{n}.png': ('Ödem', 'normal')[n % 2] for n in range(8)}
    assert labelled(raw, '\n'.join(['Bild;Art', *(f'{name};{kind}' for name, kind in right.items())]), *right, encoding=encoding) == right

def test_a_table_of_one_column_is_refused(raw):
    tree(raw, 'x')
    (raw / 'labels.csv').write_text('file\n0.png\n1.png\n')
    refused(raw, 'labels.csv', options=('--task', 'mini', '--labels', 'labels.csv'))

def test_a_table_that_names_no_image_is_refused(raw):
    tree(raw, 'x')
    (raw / 'labels.csv').write_text('file,kind\nother.png,cat\nanother.png,dog\n')
    refused(raw, 'label', options=('--task', 'mini', '--labels', 'labels.csv', '--patient', r'(\d)'))

def test_pictures_at_the_top_belong_to_no_class(raw):
    tree(raw, 'x', layout='{kind}')
    write(raw / 'overview.png', texture(99))
    code, printed = prepare(raw, '--task', 'mini')
    assert 'overview.png' in printed if code else classes(raw) == ['cat', 'dog']

def test_images_of_each_class_and_split_are_told(raw):
    tree(raw, 'x', layout='{kind}', names='0123456789abcdefghi')
    for n in range(7):
        write(raw / f'handout/{n}.png', texture(900 + n))
    where, _, answers, printed = task(raw)
    line = next(line for line in printed.splitlines() if 'handout' in line and re.search(r'\d', line))
    counts = [sum(name.startswith('handout') and part == wanted for name, part in where.items()) for wanted in ('train', 'val', 'test')]
    assert counts == [3, 1, 3] and re.findall(r'\d+', line[line.index('handout'):])[:3] == ['3', '1', '3']

@pytest.mark.parametrize('few, parts', [(1, ['train']), (2, ['test', 'train']), (3, ['test', 'train', 'train'])])
def test_few_images_of_a_class_feed_training_first(raw, few, parts):
    tree(raw, 'x', layout='{kind}', names='0123456789')
    for n in range(few):
        write(raw / f'rare/{n}.png', texture(500 + n))
    where, *_, printed = task(raw)
    found = sorted(part for name, part in where.items() if name.startswith('rare'))
    assert found in (parts, ['test', 'train', 'val']) and len(found) == few and (few > 1 or 'rare' in printed)

# --- the pixels of masks --------------------------------------------------------------------------------------------------

def test_nan_in_a_mask_is_no_foreground(raw):
    mask = np.float32(organ())
    mask[0, 0] = np.nan
    scans(raw, LPS, LPS, mask)
    code, printed = prepare(raw, *CT, '--values', '0', '*')
    masks = [*map(np.load, raw.parent.glob('out/*/masks.npy'))]
    assert 'masks/0.nii' in printed if code else sum(np.count_nonzero(found == 1) for found in masks) == 2 * organ().sum()

@pytest.mark.parametrize('name', ['{}.jpg', '{}.png'], ids=['jpg', 'named png'])
@pytest.mark.parametrize('values', [('0', '*'), ('0', '255')])
@pytest.mark.parametrize('quality', [50, 75, 95])
def test_lossy_masks_keep_their_area(raw, name, values, quality):
    pairs(raw, np.uint8(255 * blob()), name, format='JPEG', quality=quality)
    *_, masks, _ = task(raw, '--values', *values)
    assert all(np.count_nonzero((mask == 1) != blob()) <= 0.03 * np.count_nonzero(blob()) for mask in masks)

@pytest.mark.parametrize('white', [0, 255])
@pytest.mark.parametrize('channels', [2, 4])
def test_a_mask_in_the_alpha_channel(raw, white, channels):
    mask = np.full((S, S, channels), white, np.uint8)
    mask[..., -1] = 255 * blob()
    pairs(raw, mask)
    right_or_refused(raw, blob(), '0.png', options=('--values', '0', '*'))

def test_an_opaque_alpha_channel_changes_nothing(raw):
    pairs(raw, np.dstack([255 * np.uint8(blob())] * 3 + [np.full((S, S), 255, np.uint8)]))
    assert all(np.array_equal(mask, blob()) for mask in task(raw, '--values', '0', '255')[2])

COLOURS = np.uint8([[0, 0, 0], [255, 0, 0], [0, 255, 0]])
REGIONS = np.where(blob(), 1, np.where(blob(7), 2, 0))
NAMED = '--classes', 'none', 'red', 'green', '--values', '#000000', '#ff0000', '#00FF00'

@pytest.mark.parametrize('end', ['png', 'bmp', 'tif'])
def test_values_may_name_colours(raw, end):
    pairs(raw, COLOURS[REGIONS], '{}.' + end)
    assert all(np.array_equal(mask, REGIONS) for mask in task(raw, *NAMED)[2])

def test_colours_of_a_palette_and_of_a_lossy_file(raw):
    pairs(raw, COLOURS[REGIONS])
    palette = Image.fromarray(np.uint8(2 - REGIONS), 'P')
    palette.putpalette(COLOURS[::-1].flatten().tolist())
    for n in range(2):
        palette.save(raw / f'masks/{n}.png')
    right_or_refused(raw, REGIONS, '0.png', options=NAMED)

def test_lossy_colours(raw):
    pairs(raw, COLOURS[REGIONS], '{}.jpg', quality=95, subsampling=0)
    code, printed = prepare(raw, '--task', 'mini', *NAMED)
    masks = [*map(np.load, raw.parent.glob('out/*/masks.npy'))]
    assert 'masks/0.jpg' in printed if code else all((found != REGIONS).mean() < 0.03 for found in masks)

@pytest.mark.parametrize('values', [('0', '*'), ('0', '255')])
def test_several_colours_without_names_are_refused(raw, values):
    pairs(raw, COLOURS[REGIONS])
    refused(raw, 'masks/0.png', options=('--task', 'mini', '--values', *values))

@pytest.mark.parametrize('many', [False, True])
def test_a_star_that_takes_many_values_is_told(raw, many):
    pairs(raw, np.uint8(blob() * (1 + texture(5) % 60 if many else 255)))
    *_, masks, printed = task(raw, '--values', '0', '*')
    assert all(np.array_equal(mask, blob()) for mask in masks) and ('*' in printed and 'value' in printed) == many

# --- turned, linked and repeated files ------------------------------------------------------------------------------------

@pytest.mark.parametrize('turn', [2, 3, 6, 8])
@pytest.mark.parametrize('end', ['jpg', 'png', 'tif'])
def test_a_turned_image_whose_mask_is_not_turned_is_refused(raw, turn, end):
    exif = Image.Exif()
    exif[274] = turn
    for n in range(2):
        write(raw / f'images/{n}.{end}', np.uint8(55 + 200 * blob()), exif=exif)
        write(raw / f'masks/{n}.png', np.uint8(blob()))
    refused(raw, f'images/0.{end}')

@pytest.mark.parametrize('turn, both', [(1, False), (1, True), (6, True)])
def test_images_and_masks_that_are_turned_alike(raw, turn, both):
    exif = Image.Exif()
    exif[274] = turn
    for n in range(2):
        write(raw / f'images/{n}.png', np.uint8(55 + 200 * blob()), exif=exif)
        write(raw / f'masks/{n}.png', np.uint8(blob()), **dict(exif=exif) if both else {})
    right_or_refused(raw, np.rot90(blob(), 3) if turn == 6 else blob(), '0.png')
    assert turn == 6 or (raw.parent / 'out').exists()

def test_a_turned_photograph_of_a_class_is_upright(raw):
    exif = Image.Exif()
    exif[274] = 6
    tree(raw, 'x', layout='{kind}')
    write(raw / 'cat/9.png', texture(77), exif=exif)
    where, images, *_ = task(raw)
    assert np.array_equal(dict(zip(where, images))['cat/9.png'][..., 0], np.rot90(texture(77), 3))

@pytest.mark.parametrize('link, target', [('loop', '.'), ('cat/up', '..'), ('cat/self', '.'), ('again', 'dog')])
def test_linked_folders_are_visited_once(raw, link, target):
    tree(raw, 'x', layout='{kind}')
    (raw / link).symlink_to(target)
    where, images, *_ = task(raw)
    assert len(where) == len(images) == 6 and classes(raw) in (['cat', 'dog'], ['again', 'cat'])

def test_a_linked_folder_elsewhere_is_followed(raw):
    tree(raw.parent / 'disk', 'x', layout='{kind}')
    (raw / 'Photo').mkdir()
    (raw / 'Photo/a').symlink_to(raw.parent / 'disk/cat')
    (raw / 'Photo/b').mkdir()
    (raw / 'Photo/b/dogs').symlink_to(raw.parent / 'disk/dog')
    (raw / 'Photo/b/dogs/loop').symlink_to('..')
    assert len(source(raw, 'a')[0]) == len(np.load(raw.parent / 'out/b/00000.npy')) == 3

@pytest.mark.parametrize('name', ['line\nbreak.png', 'bl ank.png', '#[0]*.png', os.fsdecode(b'latin\xff.png'), 'Größe.PNG'])
def test_odd_names_are_read_and_written(raw, name):
    for folder in ('Photo/a/x', 'y/cat', 'y/dog'):
        write(raw / folder / name, texture(len(folder)))
    for n in range(3):
        write(raw / f'y/cat/{n}.png', texture(100 + n))
        write(raw / f'y/dog/{n}.png', texture(200 + n))
    write(raw / 'Photo/a/x/small.png', texture(0)[:4])
    images, dropped = source(raw)
    assert np.array_equal(images[..., 0], [texture(len('Photo/a/x'))]) and [row['path'] for row in dropped] == ['x/small.png']
    assert {f'cat/{name}', f'dog/{name}'} <= task(raw / 'y')[0].keys()

# --- DICOM ----------------------------------------------------------------------------------------------------------------

needs_dcm2niix = pytest.mark.skipif(not shutil.which('dcm2niix'), reason='dcm2niix is not installed')

def write_dicom(folder, positions, modality='CT', end='.dcm', kernel='B30f', rgb=False, series=1, tilt=0):
    """A series of slices at these positions (mm along z), each a ramp of HU and a number of its own, as explicit little endian."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {'CT': '2', 'MR': '4', 'CR': '1', 'DX': '1.1', 'MG': '1.2', 'US': '6.1'}
    for n, z in enumerate(positions):
        pixels = texture(n, 3) if rgb else np.int16(ramp(-200, 400, 'i2') + n)
        uid, kind = f'1.2.3.{series}.{n}', f'1.2.840.10008.5.1.4.1.1.{kinds[modality]}'
        slope = np.tan(np.radians(tilt))
        values = [(0x20010, 'UI', '1.2.840.10008.1.2.1'), (0x80008, 'CS', r'ORIGINAL\PRIMARY\AXIAL'), (0x80016, 'UI', kind),
                  (0x80018, 'UI', uid), (0x80060, 'CS', modality), (0x80070, 'LO', 'SIEMENS'), (0x100020, 'LO', 'p1'),
                  (0x180050, 'DS', '3'), (0x181120, 'DS', f'{tilt}'), (0x181210, 'SH', kernel), (0x20000d, 'UI', '1.2.3'),
                  (0x20000e, 'UI', f'1.2.3.{series}'), (0x200011, 'IS', f'{series}'), (0x200013, 'IS', f'{n + 1}'),
                  (0x200032, 'DS', rf'-24\{-24 + slope * z:.4f}\{z}'), (0x200037, 'DS', r'1\0\0\0\1\0'),
                  (0x280002, 'US', 3 if rgb else 1), (0x280004, 'CS', 'RGB' if rgb else 'MONOCHROME2'), (0x280010, 'US', S),
                  (0x280011, 'US', S), (0x280030, 'DS', r'1\1'), (0x280100, 'US', 8 * pixels.itemsize),
                  (0x280101, 'US', 8 * pixels.itemsize), (0x280102, 'US', 8 * pixels.itemsize - 1), (0x280103, 'US', 1 - rgb),
                  (0x281052, 'DS', '0'), (0x281053, 'DS', '1'), (0x7fe00010, 'OW', pixels.tobytes())]
        data = b'\0' * 128 + b'DICM'
        for tag, form, value in values:
            body = struct.pack('<H', value) if form == 'US' else value.encode() if isinstance(value, str) else value
            body += (b'\0' if form == 'UI' else b' ') * (len(body) % 2)
            size = struct.pack('<HI', 0, len(body)) if form == 'OW' else struct.pack('<H', len(body))
            data += struct.pack('<HH', tag >> 16, tag & 0xffff) + form.encode() + size + body
        (folder / f'IM{n:04d}{end}').write_bytes(data)

EVEN, UNEVEN = (0, 3, 6, 9, 12, 15), (0, 3, 6, 12, 15, 21)

@needs_dcm2niix
@pytest.mark.parametrize('case', [dict(positions=EVEN), dict(positions=UNEVEN), dict(positions=EVEN, tilt=15),
                                  dict(positions=EVEN, kernel=r'Br38f\3'), dict(positions=EVEN, end=''),
                                  dict(positions=EVEN, end='.ima')], ids=['even', 'uneven', 'tilt', 'backslash', 'no end', 'ima'])
def test_dicom_series(raw, case):
    write_dicom(raw / 'CT/a/p1/series', **case)
    images, dropped = source(raw)
    assert len(images) == 6 and not dropped     # the slices as scanned, none of them interpolated
    right = sorted(linear(ramp(-200, 400, 'i2') + n, -200, 400).mean() for n in range(6))
    assert np.abs(np.sort(images.mean((1, 2, 3))) - right).max() < 0.3

@needs_dcm2niix
def test_nested_dicom_series_are_read_once(raw):
    write_dicom(raw / 'CT/a/p1', EVEN)
    write_dicom(raw / 'CT/a/p1/thin', EVEN[:4], series=2)
    write_dicom(raw / 'CT/a/p1/thin/deep', EVEN[:5], series=3)
    assert len(source(raw)[0]) == 15

@needs_dcm2niix
@pytest.mark.parametrize('modality, rgb', [('CR', False), ('DX', False), ('MG', False), ('US', True)])
def test_dicom_of_other_kinds_is_named(raw, modality, rgb):
    write_dicom(raw / 'X-ray/a/film', (0,), modality, rgb=rgb)
    write(raw / 'X-ray/a/0.png', texture(0))
    images, dropped = source(raw)
    assert len(images) == 2 or 'film' in dropped[0]['path'] and re.search(f'DICOM|{modality}|CT', dropped[0]['detail'])

def test_files_beside_a_dicom_series_are_accounted_for(raw, monkeypatch):
    monkeypatch.setenv('PATH', '')
    write_dicom(raw / 'CT/a/p1', EVEN)
    write(raw / 'CT/b/0.png', texture(0))
    code, printed = prepare(raw, '--min_side', 8)
    told_before = code and 'dcm2niix' in printed and not (raw.parent / 'out/b').exists()
    assert told_before or 'dcm2niix' in (raw.parent / 'out/a/dropped.csv').read_text()

# --- what stops a preparation, and what must not --------------------------------------------------------------------------

def fake_ffmpeg(folder, monkeypatch, script):
    (folder / 'bin').mkdir()
    (folder / 'bin/ffmpeg').write_text('#!/bin/sh\n' + script)
    (folder / 'bin/ffmpeg').chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}/bin:{os.environ["PATH"]}')

def test_two_preparations_into_one_folder(raw, monkeypatch):
    for n in range(3):
        write(raw / f'Endoscope/a/{n}.png', texture(n))
    (raw / 'Endoscope/a/x.mp4').write_bytes(b'video')
    go, run = raw.parent / 'go', raw.parent / 'runs'
    frame = f'head -c {3 * S * S} /dev/urandom'      # the first run waits here, whatever the second does meanwhile
    fake_ffmpeg(raw.parent, monkeypatch, f'if mkdir {run}; then while [ ! -e {go} ]; do sleep 0.05; done; fi; {frame}\n')
    first = subprocess.Popen([sys.executable, ROOT / 'prepare_medverse.py', '--raw', raw, '--out', raw.parent / 'out', '--size',
                              str(S), '--workers', '1', '--min_side', '8'], stderr=subprocess.PIPE, text=True)
    while not run.exists() and first.poll() is None:
        time.sleep(0.05)
    code, printed = prepare(raw, '--min_side', 8)
    go.touch()
    told = printed + first.communicate()[1]
    assert 0 in (code, first.returncode) and not re.search('room|full', told), told
    assert sum(len(np.load(path)) for path in raw.parent.glob('out/a/*.npy')) == 4
    assert code == 0 or 'out' in printed

def test_only_a_full_disk_is_called_one(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    (raw.parent / 'file').write_text('in the way')
    code, printed = prepare(raw, out='file')
    assert code and '/file' in printed and not re.search('room|full', printed)

def test_a_picture_of_billions_of_pixels_is_named(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    write_png(raw / 'Photo/a/bomb.png', ramp(0, 9, 'u2'), side=60000)
    images, (row,) = source(raw)
    assert len(images) == 1 and row['path'] == 'bomb.png' and re.search('60000|pixels|large', row['detail'])

def test_videos_without_ffmpeg(raw, monkeypatch):
    monkeypatch.setenv('PATH', '')
    write(raw / 'Photo/a/0.png', texture(0))
    write(raw / 'Photo/b/0.png', texture(0))
    (raw / 'Photo/b/x.mp4').write_bytes(b'video')
    code, printed = prepare(raw, '--min_side', 8)
    told_before = code and 'ffmpeg' in printed and not (raw.parent / 'out/a').exists()
    assert told_before or not code and 'x.mp4' in (raw.parent / 'out/b/dropped.csv').read_text()

def test_the_file_that_killed_a_worker_is_named(raw, monkeypatch):
    fake_ffmpeg(raw.parent, monkeypatch, 'kill -9 $PPID\n')
    write(raw / 'Endoscope/a/0.png', texture(0))
    (raw / 'Endoscope/a/x.mp4').write_bytes(b'video')
    code, printed = prepare(raw, '--min_side', 8)
    assert 'x.mp4' in (printed if code else (raw.parent / 'out/a/dropped.csv').read_text())

def test_another_size_than_before_is_refused(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    source(raw)
    code, printed = prepare(raw, '--min_side', 8, size=32)
    assert code and '/out/a' in printed and '32' in printed
    assert np.load(raw.parent / 'out/a/00000.npy').shape[1] == S

def test_raw_one_folder_too_deep(raw):
    write(raw / 'CT/a/0.png', texture(0))
    code, printed = prepare(raw / 'CT')
    assert code and re.search('deep|above|--raw /?raw( |$|:|,)|one folder (up|higher)', printed.replace(str(raw), 'raw')), printed

@pytest.mark.parametrize('name', ['Xray', 'x-ray', 'X-ray', 'mr', 'ENDOSCOPE'])
def test_modalities_are_understood_in_any_spelling(raw, name):
    pairs(raw, np.uint8(blob()))
    task(raw, '--modality', name)
    assert json.loads((raw.parent / 'out/meta.json').read_text())['modality'] in prep.MODALITIES

def test_a_source_left_out_is_not_called_accounted_for(raw):
    write(raw / 'Photo/a/0.png', texture(0))
    write(raw / 'Photo/empty-one/readme.xyz', texture(0), format='PNG')
    code, printed = prepare(raw, '--min_side', 8)
    assert 'empty-one' in printed and ('accounted' not in printed or 'empty-one' in printed[printed.rindex('\nmodality'):])

def test_meta_images_are_counted_as_not_read(raw):
    write(raw / 'CT/a/0.png', texture(0))
    for end in ('mhd', 'raw'):
        (raw / f'CT/a/x.{end}').write_text('ObjectType = Image\nNDims = 2\n')
    _, dropped = source(raw)
    assert {(row['path'], row['reason']) for row in dropped} == {('x.mhd', 'other'), ('x.raw', 'other')}

# --- options --------------------------------------------------------------------------------------------------------------

def test_pairs_are_what_the_groups_of_two_expressions_share(raw):
    for site in 'ab':
        for n in range(2):
            write(raw / f'{site}/Scan_{n}_HC.PNG', texture(n))
            write(raw / f'{site}/Scan_{n}_HC_Annotation.png', np.uint8(blob(n + 2 * (site == 'b'))))
    write(raw / 'a/Scan_9_HC.PNG_old', texture(9), format='PNG')
    where, _, masks, _ = task(raw, '--images', r'(.*)\.png$', '--masks', '(.*)_annotation', '--split', '1', '0', '^b/')
    right = {f'{site}/Scan_{n}_HC.PNG': blob(n + 2 * (site == 'b')) for site in 'ab' for n in range(2)}
    assert where == {name: 'test' if name[0] == 'b' else 'train' for name in right}
    assert all(np.array_equal(mask, right[name]) for name, mask in zip(where, masks))

def test_two_images_for_one_mask_are_named(raw):
    pairs(raw, np.uint8(blob()))
    write(raw / 'images/other/0.png', texture(5))
    refused(raw, 'images/0.png', 'images/other/0.png',
            options=('--task', 'mini', '--images', r'images/.*?(\d)\.png', '--masks', r'masks/(\d)\.png'))

def test_images_and_skip_of_a_source_are_searched_in_the_path(raw):
    for n, name in enumerate(('x/keep 1.png', 'x/KEEP 2.png', 'x/keep mask.png', 'x/other.png')):
        write(raw / 'Photo/a' / name, texture(n))
    images, dropped = source(raw, 'a', '--images', r'keep .*\.png$', '--skip', 'mask')
    assert len(images) == 2 and {row['path'] for row in dropped} == {'x/keep mask.png', 'x/other.png'}

def test_a_mistyped_option_gives_one_line(raw):
    code, printed = prepare(raw, '--stepz', '3')
    assert code == 2 and printed.strip() == 'prepare_medverse.py: error: unrecognized arguments: --stepz 3 (see --help)'

def test_torch_is_not_imported():
    code = 'import sys, prepare_medverse; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0

def test_all_data_sets_are_listed(raw):
    lines = {line.split(' ')[0] for line in prepare(raw, '--list')[1].splitlines()}
    assert {'AutoPET-SUV', 'HC18', 'OCTA500-OCT', 'ISIC-2024', 'whs-ct', 'scr', 'slsc-c', 'phantom-lesion'} <= lines
    assert len(prep.SOURCES) == 44 and len([name for name in prep.TASKS if not name.startswith('phantom-')]) == 26

def test_one_phantom_task_simulates_its_own_modality(raw):
    code, printed = prepare(raw, '--task', 'phantom-lesion', '--phantoms', 8)
    assert code == 0, printed
    assert [path.name for path in (raw / 'raw').iterdir()] == ['Photo'] and len([*raw.glob('raw/**/*.png')]) == 8
