"""An image and its mask must lie on one grid, and are cut alike; else they are refused by name."""
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.support import files, prepared
from tests.support.folders import (
    BLOB, LPS, ORGAN, SIDE, agree, refused, scan, task, write_pairs, write_scans)

CT = '--modality', 'CT'
DIAGONAL = 2 ** -0.5
OBLIQUE = np.array([[DIAGONAL, -DIAGONAL, 0, 0], [DIAGONAL, DIAGONAL, 0, 0],
                    [0, 0, 1, 0], [0, 0, 0, 1]])

def changed(affine, row, column, by):
    affine = affine.copy()
    affine[row, column] += by
    return affine

# --- other grids ---------------------------------------------------------------------------------

OTHER = {
    'none': np.eye(4),
    'shifted by 20 mm': changed(LPS, 0, 3, 20),
    'slices closer': changed(LPS, 2, 2, -0.5),
    'turned': OBLIQUE @ LPS}

@pytest.mark.parametrize('grid', OTHER)
def test_a_mask_on_another_grid_is_refused(tmp_path, grid):
    write_scans(tmp_path, LPS, OTHER[grid])
    refused(tmp_path, *CT, naming=['images/?.nii.gz', 'masks/?.nii', 'their grids differ'])

@pytest.mark.parametrize('grid', OTHER)
def test_one_mask_of_several_on_another_grid_is_refused(tmp_path, grid):
    write_scans(tmp_path)
    write_scans(tmp_path, LPS, OTHER[grid], below='second')
    rules = ['--images', r'images/(.*)\.nii', '--classes', 'none', 'a', 'b']
    rules += ['--masks', r'masks/(.*)\.nii', r'second/(.*)\.nii']
    refused(tmp_path, *CT, *rules,
            naming=['images/?.nii.gz', 'second/?.nii', 'their grids differ'])

SHAPES = {'a slice less': (SIDE, SIDE, SIDE - 1), 'one slice': (SIDE, SIDE),
          'two time points': (SIDE, SIDE, SIDE, 2)}

@pytest.mark.parametrize('shape', SHAPES)
def test_a_mask_of_another_shape_is_refused(tmp_path, shape):
    write_scans(tmp_path, mask=np.ones(SHAPES[shape], np.uint8))
    refused(tmp_path, *CT, naming=['images/?.nii.gz', 'masks/?.nii', 'their grids differ'])

def test_two_masks_of_fewer_slices_than_the_image_are_refused(tmp_path):
    short = ORGAN[..., :-1]
    write_scans(tmp_path, mask=short, below='a')
    write_scans(tmp_path, mask=short, below='b')
    rules = '--images', r'images/(\d)', '--masks', r'a/(\d)', r'b/(\d)', '--classes', *'0ab'
    refused(tmp_path, *CT, *rules, naming=['images/?.nii.gz', 'a/?.nii', 'their grids differ'])

# --- one grid ------------------------------------------------------------------------------------

GRIDS = {
    'one of the two exchanges x and y': [
        changed(OBLIQUE, 0, 0, 1e-6), changed(OBLIQUE, 1, 0, 1e-6)],
    'alone they would be cut across different axes': [
        np.diag([1, 1, 0.99001, 1]), np.diag([1, 1, 0.98999, 1])],
    'rounded': [LPS, changed(LPS, 0, 3, 1e-4)]}

@pytest.mark.parametrize('grid', GRIDS)
def test_a_mask_is_cut_as_its_image_where_their_grids_differ_by_rounding(tmp_path, grid):
    write_scans(tmp_path, *GRIDS[grid])
    assert agree(task(tmp_path, *CT))

@pytest.mark.parametrize('image_forms, mask_forms', [
    ((1, 0), (0, 1)), ((0, 1), (1, 0)), ((2, 1), (1, 0))])
def test_a_grid_may_be_told_by_sform_or_qform(tmp_path, image_forms, mask_forms):
    write_scans(tmp_path, image_forms=image_forms, mask_forms=mask_forms)
    assert agree(task(tmp_path, *CT))

@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_the_numbers_of_a_mask_may_have_any_type(tmp_path, dtype):
    write_scans(tmp_path, mask=ORGAN.astype(dtype))
    assert agree(task(tmp_path, *CT))

@pytest.mark.parametrize('axes', ['RAS', 'LPS', 'PIR', 'SRP'])
def test_slices_of_a_volume_and_of_its_mask_are_the_same_however_they_are_stored(tmp_path, axes):
    for number in range(2):
        for path, volume in ('images/{}.nii.gz', scan(number)), ('masks/{}.nii', ORGAN):
            files.nifti(tmp_path / 'raw' / path.format(number), volume, LPS, axes=axes)
    assert agree(task(tmp_path, *CT))

@pytest.mark.parametrize('axes', ['RAS', 'PIR', 'SRP', 'ASL'])
def test_a_mask_may_store_the_grid_of_its_image_in_another_order_of_axes(tmp_path, axes):
    """As 3D Slicer and ITK write it."""
    for number in range(2):
        files.nifti(tmp_path / f'raw/images/{number}.nii.gz', scan(number), LPS, axes='LPS')
        files.nifti(tmp_path / f'raw/masks/{number}.nii', ORGAN, LPS, axes=axes)
    assert agree(task(tmp_path, *CT))

@pytest.mark.parametrize('axes', [(), (None,), (None, None)], ids=len)
def test_axes_of_length_one_do_not_make_another_grid(tmp_path, axes):
    for number in range(2):
        picture = files.noise(number).astype(np.int16)
        files.nifti(tmp_path / f'raw/images/{number}.nii', picture[:, :, None, None], LPS)
        files.nifti(tmp_path / f'raw/masks/{number}.nii', BLOB[(..., *axes)], LPS)
    for mask in task(tmp_path, *CT).answer.values():
        assert np.array_equal(mask, BLOB.T)

def test_a_slice_without_contents_stays_with_its_mask(tmp_path):
    """Unlike in pretraining: every slice of a test volume counts."""
    for number in range(2):
        volume = scan(number)
        volume[..., 0] = 0
        files.nifti(tmp_path / f'raw/images/{number}.nii.gz', volume, LPS)
        files.nifti(tmp_path / f'raw/masks/{number}.nii', ORGAN, LPS)
    assert task(tmp_path, *CT).counts == dict(train=SIDE, val=0, test=SIDE)

def test_what_is_written_to_the_view_of_slices_lies_where_it_was_read(tmp_path):
    """So predicted masks get the grid of their volume."""
    for axes in 'RAS', 'LPS', 'SRP', 'ALI':
        volume = np.random.default_rng(0).random((5, 6, 7, 2))
        path = files.nifti(tmp_path / f'{axes}.nii', volume, spacing=(1, 2, 1), axes=axes)
        image = nib.load(path)
        values, copy = np.asarray(image.dataobj), np.zeros(image.shape)
        prepared.upright(copy, image.affine)[:] = prepared.upright(values, image.affine)
        assert np.array_equal(copy, values)

# --- volumes in other formats --------------------------------------------------------------------

def write_volume(path, volume):
    """In the format of the path's suffix, on the grid LPS or without one."""
    files.parent(path)
    if path.suffix == '.nii':
        files.nifti(path, volume, LPS)
    elif path.suffix == '.img':
        nib.save(nib.Nifti1Pair(volume, np.eye(4)), path)
    elif path.suffix == '.tif':     # slices from the feet up
        pages = [Image.fromarray(page) for page in np.moveaxis(volume, 2, 0)]
        pages[0].save(path, save_all=True, append_images=pages[1:])
    else:
        files.save(path, volume)

FORMATS = [     # of the image, of the mask, and why they are refused
    ('.nii', '.tif', 'one of them is NIfTI, the other is not'),
    ('.npy', '.nii', 'one of them is NIfTI, the other is not'),
    ('.nii', '.npy', 'one of them is NIfTI, the other is not'),
    ('.nii', '.img', 'their grids differ'),
    ('.img', '.nii', 'their grids differ')]

@pytest.mark.parametrize('image, mask, told', FORMATS)
def test_an_image_and_a_mask_of_which_one_has_no_grid_are_refused(tmp_path, image, mask, told):
    for number in range(2):
        write_volume(tmp_path / f'raw/images/{number}{image}', scan(number))
        write_volume(tmp_path / f'raw/masks/{number}{mask}', ORGAN)
    rules = '--images', r'images/(\d)\.(?!hdr)', '--masks', r'masks/(\d)\.(?!hdr)'
    refused(tmp_path, *CT, *rules, naming=[f'images/?{image}', f'masks/?{mask}', told])

@pytest.mark.parametrize('end', ['.npy', '.img'])
def test_an_image_and_a_mask_in_one_format_agree(tmp_path, end):
    for number in range(2):
        write_volume(tmp_path / f'raw/images/{number}{end}', scan(number))
        write_volume(tmp_path / f'raw/masks/{number}{end}', ORGAN)
    rules = '--images', r'images/(\d)\.(?!hdr)', '--masks', r'masks/(\d)\.(?!hdr)'
    assert agree(task(tmp_path, *CT, *rules))

# --- pictures ------------------------------------------------------------------------------------

MASKS = {'one mask': [r'masks/(\d)'], 'a mask for each class': [r'masks/(\d)', r'more/(\d)']}

@pytest.mark.parametrize('tag, end', [(2, 'jpg'), (3, 'png'), (6, 'tif')])
@pytest.mark.parametrize('masks', MASKS)
def test_a_picture_that_exif_turns_is_refused_since_its_mask_is_not_turned(
        tmp_path, tag, end, masks):
    write_pairs(tmp_path, image='{}.' + end, exif=files.turned(tag))
    for path in (tmp_path / 'raw/masks').iterdir():
        files.write(tmp_path / 'raw/more' / path.name, path.read_bytes())
    rules = '--images', r'images/(\d)', '--masks', *MASKS[masks]
    more = '--classes', *'012'[:len(MASKS[masks]) + 1]
    refused(tmp_path, *rules, *more, naming=[f'images/?.{end}', 'EXIF turns'])

@pytest.mark.parametrize('mode', ['L', 'P', 'LA'])
def test_a_picture_and_a_mask_that_exif_turns_alike_are_refused_too(tmp_path, mode):
    """Programs that draw masks differ in whether they turn the picture that they show."""
    mask = Image.fromarray(255 * BLOB).convert(mode)
    write_pairs(tmp_path, image='{}.jpg', exif=files.turned(3))
    for number in range(2):
        mask.save(tmp_path / f'raw/masks/{number}.png', exif=files.turned(3))
    refused(tmp_path, '--values', '0', '*', naming=['images/?.jpg', 'EXIF turns'])

def test_a_mask_alone_that_exif_turns_is_refused(tmp_path):
    write_pairs(tmp_path)
    for path in (tmp_path / 'raw/masks').iterdir():
        Image.open(path).save(path, exif=files.turned(3))
    refused(tmp_path, naming=['masks/?.png', 'EXIF turns'])

@pytest.mark.parametrize('mode', ['L', 'P', 'LA'])
def test_exif_that_says_upright_does_no_harm(tmp_path, mode):
    write_pairs(tmp_path, image='{}.jpg', exif=files.turned(1))
    for path in (tmp_path / 'raw/masks').iterdir():
        Image.fromarray(255 * BLOB).convert(mode).save(path, exif=files.turned(1))
    for mask in task(tmp_path, '--values', '0', '*').answer.values():
        assert np.array_equal(mask, BLOB)

@pytest.mark.parametrize('first, second', [(SIDE, SIDE - 8), (SIDE - 8, SIDE - 8), (24, SIDE)])
def test_one_mask_of_several_with_other_sides_is_refused(tmp_path, first, second):
    for number in range(2):
        files.save(tmp_path / f'raw/images/{number}.png', files.noise(number))
        for kind, height in ('first', first), ('second', second):
            mask = files.blob(0, SIDE)[:height]
            files.save(tmp_path / f'raw/{kind}/{number}.png', mask)
    rules = '--images', r'images/(\d)', '--masks', r'first/(\d)', r'second/(\d)'
    refused(tmp_path, *rules, '--classes', *'012',
            naming=['images/?.png', 'first/?.png', 'second/?.png', 'sizes differ'])
