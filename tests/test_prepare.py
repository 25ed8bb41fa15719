"""Checks of prepare_medverse.py against closed forms, NumPy, Pillow and killed runs."""
import contextlib
import copy
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import phantoms as simulated  # noqa: E402
import prepare_medverse as prep  # noqa: E402

REAL = ROOT.parent / 'shared' / 'real' / 'pretrain'
SIZE = 64

def command(raw, out, *options):
    script = ROOT / 'prepare_medverse.py'
    return list(map(str, (sys.executable, script, '--raw', raw, '--out', out, '--size', SIZE, *options)))

def run(raw, out, *options, **more):
    return subprocess.run(command(raw, out, *options), capture_output=True, text=True, timeout=120, **more)

def call(raw, out, *options):
    """As `run`, in this process, which spares the start of another; returns (exit code, all that is printed)."""
    printed = io.StringIO()
    with mock.patch.object(sys, 'argv', command(raw, out, *options)[1:]), \
            contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            prep.main()
        except SystemExit as stop:
            return (stop.code, printed.getvalue()) if isinstance(stop.code, int) else (1, printed.getvalue() + stop.code)
    return 0, printed.getvalue()

def meta_of(out, source):
    return json.loads((out / source / 'meta.json').read_text())

def dropped(out, source):
    with open(out / source / 'dropped.csv') as file:
        return {row['path']: row['reason'] for row in csv.DictReader(file)}

def tree(folder):
    """{relative path: bytes} of all files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}

def save_nifti(path, volume, spacing=(1, 1, 1), axes='RAS'):
    """Write a volume that is given in RAS order, stored with its axes along `axes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, np.diag([*spacing, 1.0]))
    start, end = nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(axes)
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(start, end)), path)
    return path

def texture(seed, height=96, width=96, channels=()):
    """Smooth random uint8 blobs: a picture with structure at the scale of a thumbnail."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 10, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return image if channels else image[..., 0]

def normalized(volume, modality):
    return np.stack([*prep.normalize(volume, modality)])

def kept(path, modality, size=SIZE, min_side=8):
    return [item.pixels for item in prep.slices(path, modality, size, min_side) if not item.reason]

# --- normalization -------------------------------------------------------------------------------------------------------

def test_ct_window(tmp_path):
    hounsfield = np.linspace(-1000, 1000, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE, 1).repeat(3, axis=2)
    path = save_nifti(tmp_path / 'ct.nii.gz', hounsfield.round().astype(np.int16), (1, 1, 3))
    found = kept(path, 'CT')
    expected = np.clip((hounsfield[..., 0].round().T[::-1, ::-1] + 200) / 600, 0, 1) * 255
    assert len(found) == 3
    for pixels in found:
        assert pixels.shape == (SIZE, SIZE, 1) and pixels.dtype == np.uint8
        assert np.abs(pixels[..., 0] - expected).max() <= 0.5 + 1e-4

def test_scaled_nifti_is_read_in_float32(tmp_path):
    image = nib.Nifti1Image(np.arange(SIZE * SIZE * 2).reshape(SIZE, SIZE, 2).astype(np.int16), np.diag([1, 1, 4, 1]))
    image.header.set_slope_inter(0.5, -100)
    nib.save(image, tmp_path / 'scaled.nii')
    array, = prep.read(tmp_path / 'scaled.nii')
    assert array.dtype == np.float32 and array.shape == (2, SIZE, SIZE)
    assert array.min() == -100 and array.max() == (SIZE * SIZE * 2 - 1) * 0.5 - 100

@pytest.mark.parametrize('modality', ['MR', 'PET'])
def test_percentiles_of_the_volume(modality):
    volume = np.random.default_rng(0).gamma(2, 300, (5, 40, 50)).astype(np.float32)
    low, high = np.percentile(volume, [1, 99])
    expected = (np.clip(volume, low, high) - low) / (high - low) * 255
    assert np.abs(normalized(volume, modality) - expected).max() <= 0.5 + 1e-3
    if modality == 'PET':  # the three steps of the paper: clip, z-score, min-max
        z = (np.clip(volume, low, high) - volume.mean()) / volume.std()
        assert np.abs((z - z.min()) / (z.max() - z.min()) * 255 - expected).max() < 1e-2

def test_percentiles_of_a_large_volume_see_every_column():
    volume = np.broadcast_to(np.linspace(0, 1, 128, dtype=np.float32), (256, 256, 128))  # step 8 would see 16 columns
    low, high = np.percentile(volume[0], [1, 99])
    expected = (np.clip(volume[0], low, high) - low) / (high - low) * 255
    assert np.abs(normalized(volume, 'MR')[0] - expected).max() < 2

def test_suv_window_and_other_modalities():
    volume = np.linspace(-1, 40, 4 * 8 * 8).reshape(4, 8, 8).astype(np.float32)
    assert np.abs(normalized(volume, 'SUV') - np.clip(volume, 0, 20) / 20 * 255).max() <= 0.5 + 1e-4
    assert np.abs(normalized(volume, 'OCT') - (volume + 1) / 41 * 255).max() <= 0.5 + 1e-3

def test_not_finite_is_lowest_and_one_value_is_blank():
    volume = np.linspace(-300, 500, 600).reshape(6, 10, 10).astype(np.float32)
    volume[0, 0, :3] = np.nan, np.inf, -np.inf
    assert (normalized(volume, 'CT')[0, 0, :3] == 0).all() and normalized(volume, 'CT').max() == 255
    assert (normalized(np.full((2, 9, 9), np.nan, np.float32), 'CT') == 0).all()
    for modality, value in ('MR', 7), ('OCT', np.inf):
        assert (normalized(np.full((2, 9, 9), value, np.float32), modality) == 0).all()

@pytest.mark.parametrize('modality, least', [('CT', 0.05), ('MR', 0.05), ('PET', 0.01), ('SUV', 0.01)])
def test_share_of_foreground(tmp_path, modality, least):
    low = {'CT': -200}.get(modality, 0)
    volume = np.full((2, 40, 50), low, np.float32)  # 2,000 pixels a slice
    volume[0].flat[:int(2000 * least) - 1] = 20
    volume[1].flat[:int(2000 * least) + 1] = 20
    volume = np.concatenate([volume, np.full((2, 40, 50), 20, np.float32)])  # so that the 99th percentile is foreground
    volume[2, 0] = low
    np.save(tmp_path / 'volume.npy', volume)
    reasons = [item.reason for item in prep.slices(tmp_path / 'volume.npy', modality, SIZE, 8)]
    assert reasons == ['blank', '', '', 'blank']  # the last is of one value

# --- geometry ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('axes', ['RAS', 'LPS', 'PIR', 'ASL', 'SRP'])
@pytest.mark.parametrize('thick, height, width', [(2, 50, 40), (1, 60, 40), (0, 60, 50)])
def test_upright_in_every_orientation(tmp_path, axes, thick, height, width):
    volume = np.random.default_rng(1).random((40, 50, 60)).astype(np.float32)  # x right, y anterior, z superior
    volume[-8:, -8:, -8:] = 9  # a mark at the right, anterior, superior corner
    spacing = [1.0, 1.0, 1.0]
    spacing[thick] = 3.0
    array, = prep.read(save_nifti(tmp_path / 'v.nii.gz', volume, spacing, axes))
    assert array.shape == (volume.shape[thick], height, width)
    last = array[-1]  # the slice through the mark: top is anterior or superior, left the patient's right or anterior
    assert (last[:8, :8] == 9).all() and (last == 9).sum() == 64
    first, second = [axis for axis in range(3) if axis != thick]
    for row, column in (0, 0), (3, 7), (height - 1, width - 1):
        index = [0, 0, 0]
        index[thick], index[first], index[second] = 5, width - 1 - column, height - 1 - row
        assert array[5, row, column] == volume[tuple(index)]

def test_axis_ties_and_single_slices(tmp_path):
    volume = np.random.default_rng(2).random((20, 30, 40)).astype(np.float32)
    for spacing, slices in ([1, 1, 1], 40), ([1, 1.009, 1], 40), ([1, 1.02, 1], 30), ([2, 1, 1], 20), ([1, 3, 3], 40):
        assert len(prep.read(save_nifti(tmp_path / 'v.nii', volume, spacing))[0]) == slices, spacing
    array, = prep.read(save_nifti(tmp_path / 'v.nii', volume[:1], [1, 5, 5]))
    assert array.shape == (1, 40, 30)

def test_time_points_are_volumes(tmp_path):
    volume = np.random.default_rng(3).random((32, 32, 4, 3)).astype(np.float32) * [1, 100, 10000]
    nib.save(nib.Nifti1Image(volume.astype(np.float32), np.diag([1, 1, 5, 1])), tmp_path / 'v.nii.gz')
    assert [array.shape for array in prep.read(tmp_path / 'v.nii.gz')] == [(4, 32, 32)] * 3
    found = kept(tmp_path / 'v.nii.gz', 'MR')
    assert len(found) == 12 and all(pixels.max() > 200 for pixels in found)  # each has percentiles of its own

def test_low_pass(tmp_path):
    board = (np.indices((1024, 1024)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / 'board.png')
    pixels, = kept(tmp_path / 'board.png', 'X-ray', size=100)
    assert np.abs(pixels.astype(int) - 127.5).max() < 8

def test_resize_is_close_to_plain_pillow():
    image = texture(4, 900, 700, (3,))
    plain = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    assert np.abs(prep.resize(image, SIZE).astype(int) - plain).max() <= 3

# --- readers -------------------------------------------------------------------------------------------------------------

def test_all_modes_of_pictures(tmp_path):
    colour, grey = Image.fromarray(texture(5, channels=(3,))), Image.fromarray(texture(6))
    alpha = Image.fromarray(texture(7))
    grey16 = Image.fromarray(texture(6).astype(np.uint16) * 257)
    cases = {'l.png': (grey, 1), 'la.png': (Image.merge('LA', (grey, alpha)), 1),
             'i16.png': (grey16, 1), 'i16.tif': (grey16, 1), 'i16.pgm': (grey16, 1), 'rgb.bmp': (colour, 3),
             'rgba.png': (Image.merge('RGBA', (*colour.split(), alpha)), 3), 'rgb.ppm': (colour, 3),
             'p.png': (colour.quantize(256), 3), 'p.gif': (grey.convert('P'), 1), 'cmyk.tif': (colour.convert('CMYK'), 3),
             'cmyk.jpg': (colour.convert('CMYK'), 3), 'ycbcr.jpeg': (colour, 3), 'equal.tiff': (grey.convert('RGB'), 1)}
    for name, (image, channels) in cases.items():
        image.save(tmp_path / name)
        item, = prep.slices(tmp_path / name, 'Photo', 96, 8)
        assert (item.reason, item.pixels.shape, item.picture) == ('', (96, 96, channels), True), name
        truth = texture(5, channels=(3,)) if channels == 3 else texture(6)[..., None]
        if '16' in name:  # of more than 8 bits: from the lowest to the highest value of the file
            truth = (truth - truth.min()) / np.ptp(truth) * 255
        error = np.abs(np.float64(item.pixels) - truth).mean()  # of the palette and of JPEG, not of alpha or scale
        assert error <= {'p.png': 15, 'cmyk.jpg': 15, 'ycbcr.jpeg': 15}.get(name, 0.5), (name, error)
    grey.convert('1').save(tmp_path / '1.png')
    assert (kept(tmp_path / '1.png', 'Photo', size=96)[0][..., 0] == np.asarray(grey.convert('1')) * 255).all()

def test_more_than_8_bits_have_one_window_a_file(tmp_path):
    ramp = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / 'twelve.tif', save_all=True, append_images=[Image.fromarray(ramp // 2 * 3)])
    array, = prep.read(tmp_path / 'twelve.tif')
    assert array.shape == (2, 64, 64) and array.dtype == np.uint16
    for modality, (low, high) in ('X-ray', (0, 6141)), ('MR', np.percentile(array, (1, 99))), ('CT', (0, 6141)):
        expected = (np.clip(array, low, high) - low) / (high - low) * 255
        assert np.abs(normalized(array, modality) - expected).max() <= 0.5 + 1e-3, modality  # no HU is unsigned
    assert np.abs(normalized(np.int16(array) - 1000, 'CT') - np.clip((array - 800.0) / 600, 0, 1) * 255).max() <= 0.5 + 1e-3

def test_frames_and_rotation(tmp_path):
    frames = [Image.fromarray(texture(seed)) for seed in range(3)]
    for name in 'stack.tif', 'movie.gif':
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        found = kept(tmp_path / name, 'Ultrasound', size=96)
        assert len(found) == 3
        assert all(np.abs(pixels[..., 0].astype(int) - texture(seed)).max() <= 1 for seed, pixels in enumerate(found))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise to show
    for name in 'turned.png', 'turned.tif':
        frames[0].save(tmp_path / name, exif=exif)
        assert (prep.read(tmp_path / name)[0][0] == np.rot90(texture(0), -1)).all(), name

def test_jpeg_draft_is_large_enough(tmp_path):
    Image.fromarray(texture(8, 1000, 1600, (3,))).save(tmp_path / 'large.jpg', quality=95)
    (drafted,), (whole,) = prep.read(tmp_path / 'large.jpg', 128), prep.read(tmp_path / 'large.jpg')
    assert whole.shape == (1, 1000, 1600, 3) and 128 <= min(drafted.shape[1:3]) < 1000
    assert np.abs(prep.resize(drafted[0], 64).astype(int) - prep.resize(whole[0], 64)).mean() < 1

def test_npy_shapes(tmp_path):
    for shape, expected in [((40, 50), (1, 40, 50)), ((40, 50, 3), (1, 40, 50, 3)), ((5, 40, 50), (5, 40, 50)),
                            ((5, 40, 50, 3), (5, 40, 50, 3))]:
        for dtype in np.uint8, np.int16, np.float64:
            np.save(tmp_path / 'a.npy', np.ones(shape, dtype))
            array, = prep.read(tmp_path / 'a.npy')
            assert array.shape == expected and array.dtype == dtype
    np.save(tmp_path / 'a.npy', texture(9))
    assert (kept(tmp_path / 'a.npy', 'MR', size=96)[0][..., 0] == texture(9)).all()  # uint8 is 0..255, whatever the modality
    for shape in (40,), (2, 3, 40, 50), (1, 2, 3, 40, 50):
        np.save(tmp_path / 'a.npy', np.ones(shape, np.uint8))
        assert [item.reason for item in prep.slices(tmp_path / 'a.npy', 'MR', SIZE, 8)] == ['corrupt']

# --- duplicates ----------------------------------------------------------------------------------------------------------

def test_near_duplicates():
    seen = {}
    images = {seed: texture(seed, 200, 260, (3,)) for seed in range(40)}
    assert all(prep.find_twin(prep.resize(image, SIZE), seed, seen) is None for seed, image in images.items())
    found = 0
    for seed, image in images.items():
        smaller = Image.fromarray(image).resize((180, 140), Image.Resampling.LANCZOS)
        twin = prep.find_twin(prep.resize(np.asarray(smaller), SIZE), 'smaller', dict(seen))
        assert twin in (seed, None)
        found += twin == seed
    assert found >= 36

def test_one_bit_of_the_hash():
    cells = np.random.default_rng(9).permutation(72).reshape(8, 9).astype(np.uint8) * 3
    cells[2, 3:5], cells[5, 6:8] = (100, 101), (100, 101)
    one, two = cells.copy(), cells.copy()
    one[2, 3:5] = two[2, 3:5] = two[5, 6:8] = (101, 100)
    pixels, one, two = (np.kron(grid, np.ones((9, 8), np.uint8))[..., None] for grid in (cells, one, two))  # (72, 72, 1)
    seen = {}
    assert [prep.find_twin(image, str(index), seen) for index, image in enumerate([pixels, one, two])] == [None, '0', None]

def test_same_hash_is_not_enough():
    x = np.linspace(-1, 1, 200)
    disc = np.hypot(*np.meshgrid(x, x)) < 0.95
    dark, bright = (np.uint8(disc * level) for level in (60, 200))
    seen = {}
    assert prep.find_twin(prep.resize(dark, SIZE), 'dark', seen) is None
    assert prep.find_twin(prep.resize(bright, SIZE), 'bright', seen) is None
    assert prep.find_twin(prep.resize(dark, SIZE), 'again', seen) == 'dark'

# --- the command ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    """A small RAW of four sources with everything that goes wrong."""
    raw = tmp_path_factory.mktemp('raw')
    photo, ct = raw / 'photo' / 'skin' / 'deep', raw / 'CT' / 'scans'
    for folder in photo, ct, raw / 'MR' / 'scans', raw / 'PET' / 'trial':
        folder.mkdir(parents=True)
    for seed in range(20):
        Image.fromarray(texture(seed, 300, 260, (3,))).save(photo / f'{seed:02d}.jpg', quality=95)
    Image.fromarray(texture(3, 300, 260, (3,))).resize((200, 180)).save(photo / 'a_copy.jpg', quality=80)
    Image.fromarray(texture(30)).convert('RGB').save(photo / 'grey.png')
    Image.fromarray(texture(31, 3, 5)).save(photo / 'small.png')
    Image.fromarray(texture(31, 300, 20)).save(photo / 'narrow.png')
    Image.fromarray(np.full((80, 80), 77, np.uint8)).save(photo / 'flat.png')
    (photo / 'cut.png').write_bytes((photo / 'grey.png').read_bytes()[:900])
    (photo / 'cut.jpg').write_bytes((photo / '00.jpg').read_bytes()[:2000])
    (photo / 'empty.jpg').touch()
    (photo / 'labels.csv').write_text('a,b')
    (photo / '.DS_Store').write_text('x')
    (photo / '._00.jpg').write_text('x')
    scan = np.repeat(texture(32, 48, 40)[..., None].astype(np.int16), 6, axis=2) * 3 - 300  # all slices alike
    save_nifti(ct / 'a.nii.gz', scan, (1, 1, 5))
    (ct / 'cut.nii.gz').write_bytes((ct / 'a.nii.gz').read_bytes()[:1500])
    save_nifti(ct / 'nan.nii', np.full((40, 40, 2), np.nan, np.float32), (1, 1, 5))
    save_nifti(ct / 'one_value.nii', np.full((40, 40, 2), 100, np.int16), (1, 1, 5))
    np.save(ct / 'b.npy', texture(33, 40, 40)[None].astype(np.int16) * 2)
    (ct / 'cut.npy').write_bytes((ct / 'b.npy').read_bytes()[:-100])
    save_nifti(raw / 'MR' / 'scans' / 'a.nii.gz', scan, (1, 1, 5))
    uptake = np.repeat(texture(34, 40, 40)[..., None].astype(np.float32), 2, axis=2) / 255 * 40
    save_nifti(raw / 'PET' / 'trial' / 'SUV.nii.gz', uptake, (1, 1, 5))
    save_nifti(raw / 'PET' / 'trial' / 'PET.nii.gz', uptake, (1, 1, 5))
    return raw

@pytest.fixture(scope='module')
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp('out') / 'medverse'
    result = run(raw, out, '--workers', '1')
    assert result.returncode == 0, result.stderr
    return out, result.stdout

def test_every_file_is_accounted_for(raw, prepared):
    out, table = prepared
    assert sorted(path.name for path in out.iterdir()) == ['scans-CT', 'scans-MR', 'skin', 'trial']
    skin = {path.split('/')[-1]: reason for path, reason in dropped(out, 'skin').items()}
    assert skin == {'a_copy.jpg': 'duplicate', 'small.png': 'small', 'narrow.png': 'small', 'flat.png': 'blank',
                    'cut.png': 'corrupt', 'cut.jpg': 'corrupt', 'empty.jpg': 'corrupt',
                    'labels.csv': 'other', '.DS_Store': 'other', '._00.jpg': 'other'}
    assert dropped(out, 'scans-CT') == {'cut.nii.gz': 'corrupt', 'cut.npy': 'corrupt',
                                     'nan.nii': 'blank', 'one_value.nii': 'blank'}
    for source, folder, counts in [('skin', 'photo/skin', (31, 31, 21)), ('scans-CT', 'CT/scans', (6, 13, 7)),
                                   ('scans-MR', 'MR/scans', (1, 6, 6)), ('trial', 'PET/trial', (2, 4, 4))]:
        meta = meta_of(out, source)
        assert (meta['files'], meta['read'], meta['count']) == counts, source
        assert meta['files'] == sum(path.is_file() for path in (raw / folder).rglob('*'))
        assert meta['read'] == meta['count'] + sum(meta['dropped'].values())
        shards = [np.load(path, mmap_mode='r') for path in sorted((out / source).glob('*.npy'))]
        assert meta['count'] == sum(map(len, shards)) and {images.dtype for images in shards} == {np.dtype(np.uint8)}
        assert {images.shape[1:3] for images in shards} == {(SIZE, SIZE)}
        assert [source, *map(str, counts)] in [line.split()[1:5] for line in table.splitlines()]
        assert {images.shape[3] for images in shards} == ({1, 3} if source == 'skin' else {1})
    assert meta_of(out, 'scans-MR')['modality'] == 'MR'
    assert 'every file accounted for' in table

def test_suv_by_its_path(prepared):
    raw_pet, suv = np.load(prepared[0] / 'trial' / '00000.npy')[[0, 2]].astype(int)  # PET.nii.gz, SUV.nii.gz
    assert (suv == 255).mean() > (raw_pet == 255).mean() + 0.2  # half of an uptake of 0..40 is above 20

def test_bytes_do_not_depend_on_workers(raw, prepared, tmp_path):
    assert run(raw, tmp_path, '--workers', '4').returncode == 0
    assert tree(tmp_path) == tree(prepared[0])

def test_finished_sources_are_left_alone(raw, prepared, tmp_path):
    out, before = prepared[0], tree(prepared[0])
    code, printed = call(raw, out)
    assert code == 0 and printed.count('finished before') == 4 and tree(out) == before
    assert printed.splitlines()[-6:] == prepared[1].splitlines()[-6:]  # the same table
    assert 'delete' in call(raw, out, '--size', '32')[1] and tree(out) == before

def test_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prep, 'SHARD', 1 << 20)
    big = tmp_path / 'raw' / 'Photo' / 'big'
    big.mkdir(parents=True)
    for seed in range(6):
        Image.fromarray(texture(seed, 64, 64, (3,) if seed % 2 else ())).save(big / f'{seed}.png')
    assert call(tmp_path / 'raw', tmp_path / 'out', '--size', '512')[0] == 0
    shapes = {path.name: np.load(path).shape for path in (tmp_path / 'out/big').glob('*.npy')}
    assert shapes == {'00000.npy': (3, 512, 512, 1), '00001.npy': (2, 512, 512, 3), '00002.npy': (1, 512, 512, 3)}

def children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

def suicide(*_):
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.fixture(scope='module')
def long_raw(tmp_path_factory):
    """Two sources, the second of which takes seconds."""
    raw = tmp_path_factory.mktemp('long')
    for source, count in ('a', 2), ('b', 20):
        folder = raw / 'Fundus' / source
        folder.mkdir(parents=True)
        for seed in range(count):
            Image.fromarray(texture(seed, 600, 800, (3,))).save(folder / f'{seed:02d}.png', compress_level=0)
    for path in sorted(folder.iterdir()):
        for copy in range(8):
            os.link(path, path.with_stem(f'{path.stem}_{copy:02d}'))
    return raw

def start_and_interrupt(raw, out, number):
    """Signal the command while it prepares source b; returns (exit code, stderr, its workers)."""
    process = subprocess.Popen(command(raw, out, '--workers', '2'), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    while not (out / 'b.part' / 'dropped.csv').exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    workers = children(process.pid) if Path('/proc').is_dir() else []
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does on Ctrl-C
    else:
        process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    deadline = time.time() + 10
    while any(Path(f'/proc/{pid}').is_dir() for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(Path(f'/proc/{pid}').is_dir() for pid in workers), 'orphans'
    return process.returncode, error

def test_killed_and_started_again(long_raw, tmp_path):
    assert call(long_raw, tmp_path / 'whole')[0] == 0
    code, _ = start_and_interrupt(long_raw, tmp_path / 'killed', signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert (tmp_path / 'killed' / 'b.part').is_dir() and not (tmp_path / 'killed' / 'b').exists()
    (tmp_path / 'killed' / 'b.part' / '00009.npy').write_text('left behind')
    code, printed = call(long_raw, tmp_path / 'killed')
    assert code == 0 and printed.count('finished before') == 1
    assert tree(tmp_path / 'killed') == tree(tmp_path / 'whole')

def test_interrupted(long_raw, tmp_path):
    code, error = start_and_interrupt(long_raw, tmp_path, signal.SIGINT)
    assert code == 130 and 'Traceback' not in error and error.splitlines()[-1].startswith('stopped')
    assert [path.name for path in tmp_path.iterdir()] == ['a']

def test_disk_full(long_raw, tmp_path):
    def no_large_files():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # source a has 2 images of 12 kB, source b 20
    result = run(long_raw, tmp_path, preexec_fn=no_large_files)
    assert result.returncode == 1 and 'Traceback' not in result.stderr and str(tmp_path) in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ['a']

def test_errors_are_sentences(tmp_path):
    (tmp_path / 'raw' / 'Xrays' / 'source').mkdir(parents=True)
    (tmp_path / 'file').write_text('')
    ok = tmp_path / 'ok' / 'CT' / 'source'
    ok.mkdir(parents=True)
    (ok.parent / 'loose.png').write_text('')
    Image.fromarray(texture(0)).save(ok / 'a.png')
    film = tmp_path / 'like' / 'x_Ray' / 'source'
    film.mkdir(parents=True)
    Image.fromarray(texture(0)).save(film / 'a.png')
    (tmp_path / 'empty' / 'CT' / 'nothing').mkdir(parents=True)
    for raw, out, options, code, words in [
            (tmp_path / 'none', tmp_path / 'out', [], 1, 'none'),
            (tmp_path / 'raw', tmp_path / 'out', [], 1, 'Xrays'),
            (tmp_path / 'ok', tmp_path / 'file' / 'out', [], 1, 'file/out'),
            (tmp_path / 'ok', tmp_path / 'out', ['--size', '0'], 1, '--size'),
            (tmp_path / 'ok', tmp_path / 'out', ['--sise', '3'], 2, '--sise'),
            (tmp_path / 'empty', tmp_path / 'out', [], 1, 'CT/nothing: no image'),
            (tmp_path / 'like', tmp_path / 'like/out', [], 0, 'X-ray'),
            (tmp_path / 'ok', tmp_path / 'out', [], 0, 'loose.png')]:
        found, printed = call(raw, out, *options)
        assert found == code and words in printed, printed
    result = run(tmp_path / 'none', tmp_path / 'out')
    assert result.returncode == 1 and 'Traceback' not in result.stderr and str(tmp_path / 'none') in result.stderr
    (tmp_path / 'out/source/meta.json').unlink()
    code, printed = call(tmp_path / 'ok', tmp_path / 'out')
    assert code == 1 and 'out/source/meta.json' in printed

def test_killed_worker(long_raw, tmp_path):
    with mock.patch.object(prep, 'slices', suicide):
        code, printed = call(long_raw, tmp_path, '--workers', '1')
    assert code == 1 and '--workers' in printed and list(tmp_path.iterdir()) == []

@pytest.mark.skipif(not REAL.is_dir(), reason='no real images beside the repository')
def test_real_images(tmp_path):
    for modality, source in ('MR', 'totalsegmentator-tests'), ('X-ray', 'figure1-covid-chestxray'):
        (tmp_path / 'raw' / modality).mkdir(parents=True)
        (tmp_path / 'raw' / modality / source).symlink_to(REAL / modality / source)
    assert call(tmp_path / 'raw', tmp_path / 'out')[0] == 0
    assert dropped(tmp_path / 'out', 'figure1-covid-chestxray') == {'COVID-00037.jpg': 'duplicate'}
    abdomen = np.load(tmp_path / 'out' / 'totalsegmentator-tests' / '00000.npy')
    assert abdomen.shape == (20, SIZE, SIZE, 1)
    # Upright: the spine, dark around a bright canal, lies low, so the darkest rows of the body's middle are not at the top;
    # radiological: the liver, large, is on the left of the picture and is darker than the fat on the right.
    assert abdomen[-1, 16:40, 4:28].mean() < abdomen[-1, 16:40, 36:60].mean()

# ---------------------------------------------------------------------------------------------------------------------
# Phantoms

@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp('phantoms')
    for modality in prep.MODALITIES:
        for n in (0, 1):
            simulated.write_phantom(folder, modality, n, seed=3, side=96)
    return folder

def pixels_of(path):
    return np.asarray(nib.load(path).dataobj) if path.suffix == '.gz' else np.asarray(Image.open(path))

def test_phantoms_have_masks_of_their_size_and_a_class_in_their_path(phantoms):
    images = sorted((phantoms / 'raw').rglob('000*'))
    assert {path.parts[-4] for path in images} == set(prep.MODALITIES) and len(images) == 20
    for path in images:
        modality, _, kind, name = path.parts[-4:]
        mask = pixels_of(phantoms / 'labels' / modality / kind / name)
        assert mask.shape == pixels_of(path).shape[:mask.ndim] and pixels_of(path).std() > 0
        assert kind in ('naevus', 'melanoma') if modality == 'Photo' else kind in ('normal', 'lesion')
        assert (kind in ('lesion', 'melanoma')) == name.startswith('0001')
        if modality in ('Endoscope', 'Ultrasound'):      # their masks are the lesions
            assert (mask.max() > 0) == (kind == 'lesion')

def test_phantoms_follow_their_physics(phantoms):
    def pair(image, mask, name):
        return pixels_of(phantoms / 'raw' / image / name), pixels_of(phantoms / 'labels' / mask / name)
    ct, tissue = pair('CT/phantom-ct', 'CT', 'normal/0000.nii.gz')
    assert np.median(ct[tissue == 0]) == -1000 and abs(ct[erode(tissue == 1)].mean() + 100) < 10      # air, fat
    pet, tissue = pair('PET/phantom-pet-suv', 'PET', 'lesion/0001.nii.gz')
    assert 5 * pet[tissue == 1].mean() < pet[tissue == 10].mean()      # lesions take up sugar, fat does not
    film, shadow = pair('X-ray/phantom-x-ray', 'X-ray', 'normal/0000.png')
    assert film[shadow == 4].mean() < film[shadow == 9].mean() - 40    # lungs let rays through, the heart does not

def erode(mask):
    """Voxels whose neighbours in the slice are all of the mask."""
    return np.logical_and.reduce([np.roll(mask, step, axis) for step in (-1, 0, 1) for axis in (0, 1)])

def test_a_phantom_follows_from_its_seed_and_number(phantoms, tmp_path):
    for modality in ('MR', 'Fundus'):
        simulated.write_phantom(tmp_path, modality, 1, seed=3, side=96)
        simulated.write_phantom(tmp_path / 'other', modality, 1, seed=4, side=96)
        again, other, first = (pixels_of(next((folder / 'raw' / modality).rglob('0001*')))
                               for folder in (tmp_path, tmp_path / 'other', phantoms))
        assert np.array_equal(again, first) and not np.array_equal(other, first)

def test_four_modalities_see_the_same_body(tmp_path):
    bodies = []
    def spy(rng, shape, sick):
        bodies.append(torso(copy.deepcopy(rng), (20, 20, 20), 0).tobytes())
        return torso(rng, shape, sick)
    torso = simulated.torso
    with mock.patch.object(simulated, 'torso', spy):
        for modality in prep.MODALITIES[:4]:
            simulated.write_phantom(tmp_path, modality, 1, seed=3, side=64)
    assert len(bodies) == 4 and len(set(bodies)) == 1

def test_an_eleventh_modality_takes_its_rows_and_a_function(tmp_path, monkeypatch):
    def sonar(rng, side, sick):
        return np.float32(rng.integers(0, 101, (side, side, 2))), np.zeros((side, side, 2), np.uint8)
    monkeypatch.setattr(prep, 'MODALITIES', (*prep.MODALITIES, 'Sonar'))
    monkeypatch.setitem(prep.RULES, 'Sonar', ((0, 50), (), 0, 'echoes in [0, 50]'))
    monkeypatch.setitem(simulated.PHANTOMS, 'Sonar', (2, sonar))
    for modality in prep.MODALITIES:
        simulated.write_phantom(tmp_path, modality, 0, seed=3, side=64)
    code, printed = call(tmp_path / 'raw', tmp_path / 'out')
    assert code == 0 and '11 sources' in printed, printed
    meta = meta_of(tmp_path / 'out', 'phantom-sonar')
    assert meta['count'] == 2 and 'echoes in [0, 50]' in meta['normalization']
    assert np.mean(np.load(tmp_path / 'out/phantom-sonar/00000.npy') > 127) > 0.6     # 25 of 100 becomes the middle

# ---------------------------------------------------------------------------------------------------------------------
# What users' folders and options hold

def test_a_file_of_an_odd_kind_does_not_stop_the_others(tmp_path):
    folder = tmp_path / 'raw/MR/odd'
    save_nifti(folder / 'a.nii.gz', texture(1, 40, 40)[..., None].repeat(3, 2).astype(np.int16), (1, 1, 5))
    nib.save(nib.Nifti1Image(np.ones((40, 40, 3), np.complex64), np.eye(4)), folder / 'complex.nii.gz')
    np.save(folder / 'none.npy', np.ones((0, 40, 40), np.uint8))
    assert call(tmp_path / 'raw', tmp_path / 'out')[0] == 0
    assert meta_of(tmp_path / 'out', 'odd')['count'] == 3
    assert dropped(tmp_path / 'out', 'odd')['complex.nii.gz'] == dropped(tmp_path / 'out', 'odd')['none.npy'] == 'corrupt'

def test_an_analyze_pair_is_no_film(tmp_path):
    volume = np.random.default_rng(0).integers(0, 900, (256, 256, 64)).astype(np.int16)  # as many bytes as a film of JSRT
    nib.save(nib.AnalyzeImage(volume, np.diag([1, 1, 3, 1])), tmp_path / 'scan.img')
    array, = prep.read(tmp_path / 'scan.img')
    assert array.shape == (64, 256, 256) and array.max() == volume.max()

def test_linked_folders_are_followed(tmp_path):
    (tmp_path / 'disk').mkdir()
    Image.fromarray(texture(0)).save(tmp_path / 'disk/0.png')
    (tmp_path / 'raw/Photo/skin').mkdir(parents=True)
    (tmp_path / 'raw/Photo/skin/more').symlink_to(tmp_path / 'disk')
    assert call(tmp_path / 'raw', tmp_path / 'out')[0] == 0
    assert meta_of(tmp_path / 'out', 'skin')['count'] == 1

def test_two_folders_of_one_name_are_not_mixed_up(tmp_path):
    for folder in 'ACDC', 'MR/ACDC':
        save_nifti(tmp_path / 'raw' / folder / 'training/a_frame01.nii.gz', texture(0)[..., None].astype(np.int16))
    code, printed = call(tmp_path / 'raw', tmp_path / 'out')
    assert code == 1 and 'raw/ACDC' in printed and 'MR/ACDC' in printed and not (tmp_path / 'out').exists()

def test_other_folders_in_out_are_left_alone(tmp_path):
    (tmp_path / 'raw/Photo/skin').mkdir(parents=True)
    Image.fromarray(texture(0)).save(tmp_path / 'raw/Photo/skin/0.png')
    (tmp_path / 'out/other.part').mkdir(parents=True)  # of another process, or not ours at all
    assert call(tmp_path / 'raw', tmp_path / 'out')[0] == 0
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['other.part', 'skin']

def test_here_as_out(tmp_path, monkeypatch):
    (tmp_path / 'raw/Photo/skin').mkdir(parents=True)
    Image.fromarray(texture(0)).save(tmp_path / 'raw/Photo/skin/0.png')
    monkeypatch.chdir(tmp_path)
    assert call('raw', '.')[0] == 0 and (tmp_path / 'skin/meta.json').exists()

def test_results_do_not_wait_in_memory(tmp_path):
    """A long volume leaves the worker slice by slice, and comes back so."""
    np.save(tmp_path / 'long.npy', np.random.default_rng(0).integers(0, 256, (300, 16, 16), np.uint8))
    tracemalloc.start()
    path = prep.spill(tmp_path, prep.slices, tmp_path / 'long.npy', 'MR', 256, 8)
    assert path.stat().st_size > 300 * 256 ** 2
    assert sum(item.pixels.size for item in prep.items(path)) == 300 * 256 ** 2
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 * 256 ** 2

@pytest.mark.parametrize('options, words', [
    (['--task', 'mine', '--modality', 'cat'], '--modality cat: .*CT'), (['--task', 'mine', '--patient', '['], r'\[: is no regular expression'),
    (['--images', '*.png'], r'\*\.png: is no regular expression'), (['--size', '0'], '--size'),
    (['--task', 'mine', '--split', '0.5', '0.2', '0.3'], '--split takes three')])
def test_options_that_cannot_be_meant(tmp_path, options, words):
    (tmp_path / 'raw/Photo/skin').mkdir(parents=True)
    Image.fromarray(texture(0)).save(tmp_path / 'raw/Photo/skin/0.png')
    code, printed = call(tmp_path / 'raw', tmp_path / 'out', *options)
    assert code == 1 and re.search(words, printed) and not (tmp_path / 'out').exists(), printed

