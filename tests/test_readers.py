"""Readers of prepare_medverse.py: pictures, NIfTI, .npy and videos come out as they went in.

The right values come from Pillow, nibabel and NumPy. What cannot be read rightly is refused by its
name, never guessed."""
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.support import files, prepared

SIDE = 96
GREY = files.texture(6)
COLOUR = files.texture(5, channels=3)

# --- pictures ------------------------------------------------------------------------------------

def with_opacity(*channels):
    """A picture of these channels and one that says how opaque each pixel is."""
    opacity = Image.fromarray(files.texture(7))
    return Image.merge('RGBA' if len(channels) == 3 else 'LA', (*channels, opacity))

def palette_picture():
    """A picture of numbers, each of which stands for a colour, and the colours that it shows."""
    numbers = GREY // 16
    colours = np.random.default_rng(0).integers(0, 256, (16, 3), np.uint8)
    picture = Image.fromarray(numbers, 'P')
    picture.putpalette(colours.tobytes())
    return picture, colours[numbers]

PICTURES = {     # what is saved, what must come out, by how much a pixel may differ on average
    'grey.png': (Image.fromarray(GREY), GREY, 0),
    'grey-opacity.png': (with_opacity(Image.fromarray(GREY)), GREY, 0),
    'grey.gif': (Image.fromarray(GREY).convert('P'), GREY, 0),
    'three-equal-channels.tiff': (Image.fromarray(GREY).convert('RGB'), GREY, 0),
    'one-bit.png': (Image.fromarray(GREY > 127), 255 * np.uint8(GREY > 127), 0),
    'colour.bmp': (Image.fromarray(COLOUR), COLOUR, 0),
    'colour.ppm': (Image.fromarray(COLOUR), COLOUR, 0),
    'colour-opacity.png': (with_opacity(*Image.fromarray(COLOUR).split()), COLOUR, 0),
    'palette.png': (*palette_picture(), 0),
    'palette.gif': (*palette_picture(), 0),
    'cmyk.tif': (Image.fromarray(COLOUR).convert('CMYK'), COLOUR, 0.5),
    'cmyk.jpg': (Image.fromarray(COLOUR).convert('CMYK'), COLOUR, 2),
    'lossy.jpeg': (Image.fromarray(COLOUR), COLOUR, 4)}

@pytest.mark.parametrize('name', PICTURES)
def test_a_picture_of_8_bits_keeps_its_pixels(tmp_path, name):
    """Opacity is not blended in; three equal channels are stored as one."""
    picture, shown, tolerance = PICTURES[name]
    picture.save(tmp_path / name)
    item, = prepared.outcomes(tmp_path / name, 'Photo', SIDE)
    shown = np.float64(shown.reshape(SIDE, SIDE, -1))
    assert (item.reason, item.single) == ('', True)
    assert item.pixels.dtype == np.uint8 and item.pixels.shape == shown.shape
    assert np.abs(item.pixels - shown).mean() <= tolerance

@pytest.mark.parametrize('name', ['deep.png', 'deep.tif', 'deep.pgm'])
def test_grey_of_16_bits_is_stretched_from_its_lowest_to_its_highest_value(tmp_path, name):
    files.save(tmp_path / name, GREY.astype(np.uint16) * 257)
    item, = prepared.outcomes(tmp_path / name, 'Photo', SIDE)
    stretched = (GREY - float(GREY.min())) / np.ptp(GREY) * 255
    assert item.single and np.abs(item.pixels[..., 0] - stretched).max() <= 0.51

def test_a_bool_array_is_black_and_white(tmp_path):
    path = files.save(tmp_path / 'mask.npy', files.blob() > 0)
    pixels, = prepared.kept(path, 'X-ray', SIDE)
    assert np.array_equal(pixels[..., 0], 255 * files.blob())

@pytest.mark.parametrize('name', ['stack.tif', 'movie.gif'])
def test_each_page_is_an_image(tmp_path, name):
    pages = [files.texture(seed) for seed in range(3)]
    rest = [Image.fromarray(page) for page in pages[1:]]
    files.save(tmp_path / name, pages[0], save_all=True, append_images=rest)
    found = prepared.kept(tmp_path / name, 'Ultrasound', SIDE)
    assert np.array_equal([pixels[..., 0] for pixels in found], pages)

def test_the_previews_in_a_jpeg_of_a_camera_are_no_images(tmp_path):
    """Cameras write MPO, a JPEG of several pictures, under the name of a JPEG."""
    preview = [Image.fromarray(files.texture(1))]
    path = files.save(tmp_path / 'x.jpg', GREY, format='MPO', save_all=True, append_images=preview)
    assert Image.open(path).format == 'MPO'
    pixels, = prepared.kept(path, 'Photo', SIDE)
    assert np.abs(pixels[..., 0] - np.float64(GREY)).mean() < 4

WIDE = files.texture(6, height=60, width=80)
TURNS = {1: WIDE, 2: WIDE[:, ::-1], 3: WIDE[::-1, ::-1], 4: WIDE[::-1], 5: WIDE.T,
         6: np.rot90(WIDE, -1), 7: WIDE[::-1, ::-1].T, 8: np.rot90(WIDE)}

@pytest.mark.parametrize('tag', TURNS)
@pytest.mark.parametrize('name, more', [('x.png', {}), ('x.tif', dict(compression='tiff_lzw'))])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, name, more, tag):
    path = files.save(tmp_path / name, WIDE, exif=files.turned(tag), **more)
    assert np.array_equal(prepared.read(path)[0][0], TURNS[tag])

@pytest.mark.parametrize('tag', [3, 5, 6, 7, 8])
def test_a_tiff_without_compression_is_turned_as_its_exif_says(tmp_path, tag):
    path = files.save(tmp_path / 'x.tif', WIDE, exif=files.turned(tag))
    assert np.array_equal(prepared.read(path)[0][0], TURNS[tag])

def test_a_large_jpeg_is_decoded_at_a_lower_resolution_that_is_enough(tmp_path):
    path = files.save(tmp_path / 'x.jpg', files.texture(8, 1000, 1600, channels=3), quality=95)
    whole, = prepared.read(path)
    drafted, = prepared.read(path, draft=128)
    assert whole.shape == (1, 1000, 1600, 3)
    assert 128 <= min(drafted.shape[1:3]) < 1000
    small, right = (Image.fromarray(array[0]).resize((64, 64)) for array in (drafted, whole))
    assert np.abs(np.float64(small) - np.float64(right)).mean() < 1

HALF_KNOWN = {     # Pillow inverts, mistakes or cannot open them: a page, its photometric tag
    'white is zero, 16 bits': (files.ramp(0, 65535, 'u2'), 0),
    'white is zero, 12 bits': (files.ramp(0, 4095, 'u2'), 0),
    'signed, 8 bits': (files.ramp(-128, 127, 'i1'), 1),
    'unsigned, 32 bits': (files.ramp(0, 4e9, 'u4'), 1),
    'float, 64 bits': (files.ramp(0, 4e9, 'f8'), 1)}

@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('name', HALF_KNOWN)
def test_a_tiff_of_a_type_that_pillow_mistakes_is_dropped(tmp_path, name, order):
    page, photometric = HALF_KNOWN[name]
    path = files.tiff(tmp_path / 'film.tif', page, order=order, photometric=photometric)
    assert prepared.dropped(path, 'X-ray')[0] == 'corrupt'

@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('photometric', [0, 1])
def test_white_may_be_zero_in_a_tiff_of_8_bits(tmp_path, photometric, order):
    path = files.tiff(tmp_path / 'film.tif', GREY, order=order, photometric=photometric)
    pixels, = prepared.kept(path, 'X-ray', SIDE)
    assert np.array_equal(pixels[..., 0], GREY if photometric else 255 - GREY)

@pytest.mark.parametrize('channels', [2, 3, 4])
def test_colour_or_opacity_of_16_bits_is_dropped_and_says_how_to_save_it(tmp_path, channels):
    """Pillow would cut 12 bits in 16 down to nearly black."""
    values = files.ramp(0, 4095, 'u2')[..., None].repeat(channels, 2)
    reason, detail = prepared.dropped(files.png(tmp_path / 'deep.png', values), 'Photo')
    assert reason == 'corrupt' and '8 bits' in detail

def test_grey_of_16_bits_in_a_png_is_read(tmp_path):
    """The counterpart of the test above: not every PNG by our own writer is refused."""
    values = files.ramp(0, 4095, 'u2')[..., None]
    pixels, = prepared.kept(files.png(tmp_path / 'deep.png', values), 'Photo', 48)
    assert np.abs(pixels - values / 4095 * 255).max() <= 0.51

# --- change of size ------------------------------------------------------------------------------

def test_fine_stripes_become_grey_and_not_coarse_stripes(tmp_path):
    board = np.uint8(np.indices((1024, 1024)).sum(axis=0) % 2 * 255)
    pixels, = prepared.kept(files.save(tmp_path / 'board.png', board), 'X-ray', size=100)
    assert np.abs(pixels - 127.5).max() < 8

def test_the_whole_picture_is_shown_at_the_new_size(tmp_path):
    image = files.texture(4, 900, 700, channels=3)
    pixels, = prepared.kept(files.save(tmp_path / 'x.png', image), 'Photo', size=64)
    plain = Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(pixels - np.float64(plain)).max() <= 3

# --- .npy and .img -------------------------------------------------------------------------------

NPY_SHAPES = {(40, 50): (1, 40, 50), (40, 50, 3): (1, 40, 50, 3),
              (5, 40, 50): (5, 40, 50), (5, 40, 50, 3): (5, 40, 50, 3),
              (3, 40, 50, 1): (3, 40, 50), (3, 40, 50, 3): (3, 40, 50, 3)}

@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.float64])
@pytest.mark.parametrize('shape', NPY_SHAPES, ids=str)
def test_an_array_is_an_image_or_a_stack_in_grey_or_colour(tmp_path, shape, dtype):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    array, = prepared.read(files.save(tmp_path / 'a.npy', values))
    assert array.dtype == dtype
    assert np.array_equal(array, values.reshape(NPY_SHAPES[shape]))

@pytest.mark.parametrize('shape', [(40,), (2, 3, 40, 50), (1, 2, 3, 40, 50), (0, 40, 40)], ids=str)
def test_an_array_that_is_no_image_is_dropped(tmp_path, shape):
    path = files.save(tmp_path / 'a.npy', np.ones(shape, np.uint8))
    assert prepared.dropped(path, 'MR')[0] == 'corrupt'

@pytest.mark.parametrize('shape', [(3, 40, 50), (40, 50, 4)], ids=str)
def test_an_array_that_may_be_colours_or_slices_is_dropped_and_told(tmp_path, shape):
    path = files.save(tmp_path / 'a.npy', np.ones(shape, np.uint8))
    reason, detail = prepared.dropped(path, 'MR')
    assert reason == 'corrupt' and str(shape) in detail and '(n, H, W, 1)' in detail

def test_an_img_file_with_a_header_beside_it_is_an_analyze_volume(tmp_path):
    volume = np.random.default_rng(0).integers(0, 900, (256, 256, 64)).astype(np.int16)
    nib.save(nib.AnalyzeImage(volume, np.diag([1, 1, 3, 1])), tmp_path / 'scan.img')
    array, = prepared.read(tmp_path / 'scan.img')
    assert array.shape == (64, 256, 256) and array.max() == volume.max()

# --- NIfTI ---------------------------------------------------------------------------------------

THICK = {     # axis of the thickest voxels: axes of a slice's rows and columns
    0: dict(rows=2, columns=1), 1: dict(rows=2, columns=0), 2: dict(rows=1, columns=0)}

@pytest.mark.parametrize('axes', ['RAS', 'LPS', 'PIR', 'ASL', 'SRP'])
@pytest.mark.parametrize('thick', THICK)
def test_slices_are_upright_however_a_volume_is_stored(tmp_path, axes, thick):
    """They are cut across the thickest axis; anterior or superior is up; the patient's right, or in
    sagittal slices anterior, is left."""
    volume = np.random.default_rng(1).random((40, 50, 60)).astype(np.float32)
    volume[-8:, -8:, -8:] = 9     # a mark in the right, anterior, superior corner
    spacing = [1.0, 1.0, 1.0]
    spacing[thick] = 3.0
    array, = prepared.read(files.nifti(tmp_path / 'v.nii.gz', volume, spacing=spacing, axes=axes))
    rows, columns = THICK[thick]['rows'], THICK[thick]['columns']
    assert array.shape == (volume.shape[thick], volume.shape[rows], volume.shape[columns])
    assert (array[-1][:8, :8] == 9).all() and (array[-1] == 9).sum() == 64
    for row, column in (0, 0), (3, 7), (array.shape[1] - 1, array.shape[2] - 1):
        voxel = [0, 0, 0]
        voxel[thick] = 5
        voxel[rows] = volume.shape[rows] - 1 - row
        voxel[columns] = volume.shape[columns] - 1 - column
        assert array[5, row, column] == volume[tuple(voxel)]

@pytest.mark.parametrize('spacing, count', [
    ((1, 1, 1), 40), ((1, 1.009, 1), 40), ((1, 1.02, 1), 30), ((2, 1, 1), 20), ((1, 3, 3), 40)])
def test_axial_slices_are_preferred_where_spacings_are_within_1_percent(tmp_path, spacing, count):
    volume = np.random.default_rng(2).random((20, 30, 40)).astype(np.float32)
    array, = prepared.read(files.nifti(tmp_path / 'v.nii', volume, spacing=spacing))
    assert len(array) == count

def test_a_single_slice_is_cut_as_it_is(tmp_path):
    volume = np.random.default_rng(2).random((1, 30, 40)).astype(np.float32)
    array, = prepared.read(files.nifti(tmp_path / 'v.nii', volume, spacing=(1, 5, 5)))
    assert array.shape == (1, 40, 30)

def test_each_time_point_is_a_volume_with_a_window_of_its_own(tmp_path):
    volume = np.random.default_rng(3).random((32, 32, 4, 3)) * [1, 100, 10000]
    affine = np.diag([1, 1, 5, 1])
    path = files.nifti(tmp_path / 'v.nii.gz', volume.astype(np.float32), affine)
    assert [array.shape for array in prepared.read(path)] == [(4, 32, 32)] * 3
    found = prepared.kept(path, 'MR')
    assert len(found) == 12
    assert all(pixels.max() > 200 for pixels in found)

def test_a_scaled_volume_is_read_in_float32(tmp_path):
    numbers = np.arange(64 * 64 * 2).reshape(64, 64, 2).astype(np.int16)
    path = files.nifti(tmp_path / 'v.nii', numbers, spacing=(1, 1, 4), scale=(0.5, -100))
    array, = prepared.read(path)
    assert array.dtype == np.float32 and array.shape == (2, 64, 64)
    assert array.min() == -100 and array.max() == 0.5 * numbers.max() - 100

def test_a_volume_without_scaling_keeps_its_type(tmp_path):
    """16 bits take half the memory of float32."""
    path = files.nifti(tmp_path / 'v.nii', np.zeros((9, 9, 3), np.int16), spacing=(1, 1, 3))
    assert prepared.read(path)[0].dtype == np.int16

def test_a_volume_in_colour_is_dropped(tmp_path):
    image = files.noise(0, 48, channels=3)
    voxels = np.ascontiguousarray(image.swapaxes(0, 1)[::-1, ::-1, None])
    voxels = voxels.view([('R', 'u1'), ('G', 'u1'), ('B', 'u1')])[..., 0]
    path = files.nifti(tmp_path / 'scan.nii.gz', voxels, spacing=(1, 1, 3))
    assert prepared.dropped(path, 'Photo')[0] == 'corrupt'

def test_a_volume_of_complex_numbers_is_dropped(tmp_path):
    path = files.nifti(tmp_path / 'x.nii.gz', np.ones((40, 40, 3), np.complex64))
    assert prepared.dropped(path, 'MR')[0] == 'corrupt'

# --- videos --------------------------------------------------------------------------------------

@pytest.mark.programs
@pytest.mark.parametrize('name', ['clip.avi', 'clip.mp4'])
def test_every_30th_frame_of_a_video_is_an_image(tmp_path, name):
    """Frames 0, 30 and 60 of 61; all others show something else."""
    frames = np.stack([files.texture(9)] * 61)
    frames[::30] = [files.texture(seed) for seed in range(3)]
    path = files.video(tmp_path / name, frames)
    found = prepared.outcomes(path, 'Endoscope', SIDE)
    assert [(item.reason, item.single) for item in found] == [('', False)] * 3
    for seed, item in enumerate(found):
        assert np.abs(item.pixels.mean(2) - files.texture(seed)).mean() < 5

def test_a_video_whose_decoder_fails_keeps_its_frames_and_tells_that_some_are_lost(
        tmp_path, fake_program):
    fake_program('ffmpeg', f'head -c {2 * SIDE * SIDE * 3} /dev/urandom; exit 1')
    found = prepared.outcomes(files.write(tmp_path / 'x.mp4', b'video'), 'Endoscope', SIDE)
    assert [item.reason for item in found] == ['', '', 'corrupt']
    assert 'ffmpeg' in found[-1].detail and 'end' in found[-1].detail

def test_half_a_frame_at_the_end_of_a_video_is_no_image(tmp_path, fake_program):
    fake_program('ffmpeg', f'head -c {SIDE * SIDE * 3 * 3 // 2} /dev/urandom')
    fake_program('ffprobe', 'echo N/A; echo 1')
    found = prepared.outcomes(files.write(tmp_path / 'x.mp4', b'video'), 'Endoscope', SIDE)
    assert [item.reason for item in found] == ['']

def test_a_video_without_a_frame_is_dropped(tmp_path, fake_program):
    fake_program('ffmpeg', 'exit 0')
    fake_program('ffprobe', 'echo 0; echo 0')
    path = files.write(tmp_path / 'x.avi', b'video')
    assert prepared.dropped(path, 'Endoscope') == ('corrupt', 'ValueError: it holds no image')
