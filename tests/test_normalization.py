"""Intensities: by which window the values of each modality become 0 to 255 (paper, C.1.1).

What has 8 bits stays as it is; all else gets one window a file, from closed forms by NumPy here."""
import numpy as np
import pytest

from tests.support import files, prepared

SIDE = 48     # of the files and of what is stored, so that nothing is resized

def stretched(values, low, high):
    """Values from low to high as 0 to 255; those outside are clipped."""
    return (np.clip(np.float64(values), low, high) - low) / (high - low) * 255

def most(found, expected):
    """The largest difference of two arrays; half a level is what rounding makes."""
    return np.abs(np.squeeze(found) - np.squeeze(expected)).max()

ROUNDING = 0.51

# --- windows of the modalities -------------------------------------------------------------------

def test_ct_is_cut_to_hounsfield_units_from_minus_200_to_400(tmp_path):
    units = np.linspace(-1000, 1000, SIDE * SIDE).round().reshape(SIDE, SIDE).astype(np.int16)
    volume = units.T[::-1, ::-1, None].repeat(3, axis=2)     # upright slices, from their voxels
    path = files.nifti(tmp_path / 'ct.nii.gz', volume, spacing=(1, 1, 3))
    found = prepared.kept(path, 'CT', SIDE)
    assert len(found) == 3
    for pixels in found:
        assert pixels.shape == (SIDE, SIDE, 1) and pixels.dtype == np.uint8
        assert most(pixels, stretched(units, -200, 400)) <= ROUNDING

@pytest.mark.parametrize('modality', ['MR', 'PET'])
def test_mr_and_pet_are_cut_to_the_1st_and_99th_percentile_of_the_volume(modality):
    volume = np.random.default_rng(0).gamma(2, 300, (5, 40, 50)).astype(np.float32)
    low, high = np.percentile(volume, [1, 99])
    assert most(prepared.to_uint8(volume, modality), stretched(volume, low, high)) <= ROUNDING

def test_pet_is_the_papers_three_steps_in_one():
    """Clipping, z-score and stretching to [0, 1]: the z-score cancels."""
    volume = np.random.default_rng(0).gamma(2, 300, (5, 40, 50)).astype(np.float32)
    clipped = np.clip(volume, *np.percentile(volume, [1, 99]))
    scores = (clipped - volume.mean()) / volume.std()
    paper = (scores - scores.min()) / np.ptp(scores) * 255
    assert most(prepared.to_uint8(volume, 'PET'), paper) <= ROUNDING

def test_percentiles_of_a_large_volume_see_every_column():
    """A sample of every 8th voxel of rows of 128 would see 16 columns only."""
    row = np.linspace(0, 1, 128, dtype=np.float32)
    volume = np.broadcast_to(row, (256, 256, 128))
    expected = stretched(volume[0], *np.percentile(volume[0], [1, 99]))
    assert most(prepared.to_uint8(volume, 'MR')[0], expected) < 2

def test_suv_is_cut_to_0_to_20():
    volume = np.linspace(-1, 40, 4 * 8 * 8).reshape(4, 8, 8).astype(np.float32)
    assert most(prepared.to_uint8(volume, 'SUV'), stretched(volume, 0, 20)) <= ROUNDING

def test_other_modalities_are_stretched_from_minimum_to_maximum():
    volume = np.linspace(-1, 40, 4 * 8 * 8).reshape(4, 8, 8).astype(np.float32)
    assert most(prepared.to_uint8(volume, 'OCT'), stretched(volume, -1, 40)) <= ROUNDING

def test_pet_is_suv_where_its_path_says_so(tmp_path):
    uptake = files.texture(34, 40, 40).astype(np.float32) / 255 * 40
    for name in 'PET', 'SUV':
        volume = uptake[..., None].repeat(2, axis=2)
        files.nifti(tmp_path / f'raw/PET/trial/{name}.nii.gz', volume, spacing=(1, 1, 5))
    assert prepared.prepare(tmp_path / 'raw', tmp_path / 'out', '--size', 40).code == 0
    images = prepared.Prepared(tmp_path / 'out').images('trial')
    assert len(images) == 4
    upright = uptake.T[::-1, ::-1]
    assert most(images[0], stretched(upright, *np.percentile(uptake, [1, 99]))) <= ROUNDING
    assert most(images[2], stretched(upright, 0, 20)) <= ROUNDING

@pytest.mark.parametrize('modality', ['CT', 'PET', 'MR', 'X-ray', 'Photo'])
def test_what_has_8_bits_stays_whatever_the_modality(tmp_path, modality):
    path = files.save(tmp_path / 'a.npy', files.texture(9))
    pixels, = prepared.kept(path, modality, 96)
    assert np.array_equal(pixels[..., 0], files.texture(9))

# --- values that are no numbers, and slices that show nothing ------------------------------------

def test_what_is_not_finite_is_the_lowest_value():
    volume = np.linspace(-300, 500, 600).reshape(6, 10, 10).astype(np.float32)
    volume[0, 0, :3] = np.nan, np.inf, -np.inf
    found = prepared.to_uint8(volume, 'CT')
    assert (found[0, 0, :3] == 0).all() and found.max() == 255

@pytest.mark.parametrize('modality, value', [('CT', np.nan), ('MR', 7), ('OCT', np.inf)])
def test_a_volume_of_one_value_is_black(modality, value):
    volume = np.full((2, 9, 9), value, np.float32)
    assert (prepared.to_uint8(volume, modality) == 0).all()

FOREGROUND = dict(CT=0.05, MR=0.05, PET=0.01, SUV=0.01)

@pytest.mark.parametrize('modality', FOREGROUND)
def test_a_slice_with_too_small_a_share_of_foreground_is_dropped(tmp_path, modality):
    """Of four slices of 2,000 pixels: one below the share, one above it, one full (so that the 99th
    percentile is foreground) and one of a single value."""
    low = -200 if modality == 'CT' else 0
    share = int(2000 * FOREGROUND[modality])
    volume = np.full((4, 40, 50), low, np.float32)
    volume[0].flat[:share - 1] = 20
    volume[1].flat[:share + 1] = 20
    volume[2:] = 20
    volume[2, 0] = low
    found = prepared.outcomes(files.save(tmp_path / 'volume.npy', volume), modality)
    assert [item.reason for item in found] == ['blank', '', '', 'blank']

def test_a_picture_of_8_bits_may_have_any_share_of_foreground(tmp_path):
    film = np.zeros((SIDE, SIDE), np.uint8)
    film[0, :5] = 200
    assert len(prepared.kept(files.save(tmp_path / 'film.png', film), 'CT', SIDE)) == 1

# --- more than 8 bits ----------------------------------------------------------------------------

UNITS = np.tile(np.repeat([-1000, -100, 0, 40, 300, 500], 8), (SIDE, 1))     # Hounsfield units

HOUNSFIELD = {     # how a slice of CT may be saved
    'int16': lambda path: files.tiff(path / 'scan.tif', np.int16(UNITS)),
    'big-endian': lambda path: files.tiff(path / 'scan.tif', np.int16(UNITS), order='>'),
    'int32': lambda path: files.tiff(path / 'scan.tif', np.int32(UNITS)),
    'float': lambda path: files.tiff(path / 'scan.tif', np.float32(UNITS)),
    'npy': lambda path: files.save(path / 'scan.npy', np.int16(UNITS)),
    'nifti': lambda path: files.nifti(path / 'scan.nii', np.int16(UNITS).T[::-1, ::-1, None],
                                      spacing=(1, 1, 3))}

@pytest.mark.parametrize('name', HOUNSFIELD)
def test_hounsfield_units_are_the_same_in_every_format(tmp_path, name):
    pixels, = prepared.kept(HOUNSFIELD[name](tmp_path), 'CT', SIDE)
    assert most(pixels, stretched(UNITS, -200, 400)) <= ROUNDING

PADDED = np.uint16(UNITS + 32768)     # as in DeepLesion, with a border of 0
PADDED[:30] = 0
ONE_BRIGHT_PIXEL = files.ramp(0, 4095, 'u2')
ONE_BRIGHT_PIXEL[-1, -1] = 4200
TWO_PAGES = [files.ramp(0, 4095, 'u2'), files.ramp(0, 6141, 'u2')]

DEEP = {     # a modality, the pages of a file, the window that is used for all of them
    '12 bits': ('OCT', [files.ramp(0, 4095, 'u2')], (0, 4095)),
    '14 bits': ('OCT', [files.ramp(0, 16383, 'u2')], (0, 16383)),
    'hardly 9 bits': ('OCT', [files.ramp(0, 300, 'u2')], (0, 300)),
    '16 bits': ('OCT', [files.ramp(0, 65535, 'u2')], (0, 65535)),
    '32 bits': ('OCT', [files.ramp(-900, 99999, 'i4')], (-900, 99999)),
    'float': ('OCT', [files.ramp(-9, 9, 'f4')], (-9, 9)),
    'one bright pixel': ('X-ray', [ONE_BRIGHT_PIXEL], (0, 4200)),
    'pages': ('OCT', [files.ramp(0, 4000, 'u2'), files.ramp(5000, 0, 'u2')], (0, 5000)),
    'percentiles of all pages': ('MR', TWO_PAGES, np.percentile(TWO_PAGES, (1, 99))),
    'unsigned CT': ('CT', [files.ramp(0, 4095, 'u2')], (0, 4095)),
    'unsigned CT with an offset': ('CT', [PADDED], (32568, 33168))}

@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('name', DEEP)
def test_more_than_8_bits_get_one_window_a_file_by_its_own_values(tmp_path, name, order):
    modality, pages, window = DEEP[name]
    path = files.tiff(tmp_path / 'ramp.tif', *pages, order=order)
    found = prepared.kept(path, modality, SIDE)
    assert most(found, stretched(pages, *window)) <= 1

def test_pages_of_more_than_8_bits_are_one_array_as_they_are(tmp_path):
    array, = prepared.read(files.tiff(tmp_path / 'twelve.tif', *TWO_PAGES))
    assert array.dtype == np.uint16 and np.array_equal(array, TWO_PAGES)

@pytest.mark.parametrize('modality', ['X-ray', 'CT'])
@pytest.mark.parametrize('comment', ['', '# made by hand, 7 8 9\n'])
@pytest.mark.parametrize('magic, named, highest, white', [
    ('P5', 4095, 300, 300), ('P5', 65535, 4095, 4095),
    ('P2', 1000, 200, 200), ('P2', 255, 90, 255)])
def test_a_pgm_is_stretched_by_its_own_values(
        tmp_path, modality, comment, magic, named, highest, white):
    """Not by the highest value that its header names, nor in CT as Hounsfield units, since it holds
    no negative numbers; but what has 8 bits stays as it is."""
    values = files.ramp(0, highest, '>u2')
    text = ' '.join(map(str, values.flat))
    head = f'{magic}\n{comment}{SIDE} {SIDE}\n{named}\n'
    data = values.tobytes() if magic == 'P5' else text.encode()
    path = files.write(tmp_path / 'dark.pgm', head.encode() + data)
    pixels, = prepared.kept(path, modality, SIDE)
    assert most(pixels, stretched(values, 0, white)) <= 1
