"""finetune.py --predict: masks and class probabilities of new files, and where they lie."""
import csv
import os
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import files, naive, runs, tasks

SIDE = tasks.SIDE
NIFTI_OF_PAGES = np.diag([-1, -1, 1, 1])    # x to the left, y to the back, one page after another

def predict(run, *paths):
    """Apply a finished fine-tuning to files: the Result."""
    return runs.program('finetune', '--predict', *paths, '--out', run, '--device', 'cpu')

def predicted(run, *paths):
    """The folder of the predictions; every file must get one."""
    result = predict(run, *paths)
    assert result.code == 0, result.err
    return run / 'predictions'

def place(run, path):
    """The folder in which the prediction of a file in the folder `path` lies."""
    return run / 'predictions' / path.relative_to('/')

def squares(*shape, top, left, size=14, seed=1):
    """Dark noise (H, W[, 3]) with a bright square, as the task `find` has them; and the square."""
    pixels = np.random.default_rng(seed).integers(0, 60, shape).astype(np.uint8)
    truth = np.zeros(shape[:2], np.uint8)
    truth[top:top + size, left:left + size] = 1
    pixels[truth == 1] += 150
    return pixels, truth

def slices():
    """Three images (3, SIDE, SIDE), each with its square elsewhere, and their masks."""
    pairs = [squares(SIDE, SIDE, top=4 + n, left=2 + 4 * n, size=16, seed=n) for n in range(3)]
    return [np.stack(arrays) for arrays in zip(*pairs)]

def dice(mask, truth):
    assert mask.shape == truth.shape
    return naive.dice(mask.flatten().tolist(), truth.flatten().tolist(), 1)

def read_mask(folder, name):
    """The mask of a file: an array, and what NIfTI says of it."""
    if (folder / f'{name}-mask.png').exists():
        return np.asarray(Image.open(folder / f'{name}-mask.png')), None
    image = nib.load(folder / f'{name}-mask.nii.gz')
    return np.asarray(image.dataobj), image

def read_classes(run):
    """The rows of classes.csv."""
    with open(run / 'predictions' / 'classes.csv', errors='surrogateescape') as table:
        return list(csv.DictReader(table))

@pytest.fixture(scope='module')
def finder(tuned):
    """A fine-tuned segmentation."""
    return tuned / 'find'

@pytest.fixture(scope='module')
def teller(tuned):
    """A fine-tuned classification."""
    return tuned / 'tell'

# --- masks ------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['picture.png', 'photo.jpg'])
def test_a_picture_gets_a_mask_of_its_own_size(finder, tmp_path, name):
    pixels, truth = squares(50, 70, 3, top=10, left=20, size=30)
    files.save(tmp_path / name, pixels)
    predicted(finder, tmp_path / name)
    mask, _ = read_mask(place(finder, tmp_path), name)
    assert mask.dtype == np.uint8
    assert dice(mask, truth) > 0.6
    overlay = Image.open(place(finder, tmp_path) / f'{name}-overlay.png')
    assert overlay.size == (70, 50)

@pytest.mark.parametrize('name', ['scan.nii.gz', 'pair.img', 'pair.hdr'])
def test_a_volume_gets_a_mask_with_its_affine(finder, tmp_path, name):
    volume = np.random.default_rng(1).integers(0, 60, (40, 4, 44)).astype(np.float32)
    truth = np.zeros(volume.shape, np.uint8)
    truth[8:28, :, 10:30] = 1
    volume += 150 * truth
    affine = np.array([[0, 3.0, 0, 5], [-1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    kind = nib.Nifti1Pair if name.startswith('pair') else nib.Nifti1Image
    nib.save(kind(volume, affine), tmp_path / name)
    predicted(finder, tmp_path / name)
    mask, image = read_mask(place(finder, tmp_path), name)
    assert np.array_equal(image.affine, affine)
    assert image.get_data_dtype() == np.uint8
    assert dice(mask, truth) > 0.6

@pytest.mark.parametrize('axes', ['RAS', 'LAS', 'LPS', 'SPL'])
def test_a_voxel_of_the_mask_is_that_of_the_image(finder, tmp_path, axes):
    """However the volume is stored, also where slices are read backwards."""
    pixels, masks = slices()
    for name, array in (('x.nii', pixels), ('truth.nii', masks)):
        files.nifti(tmp_path / name, array.T.copy(), spacing=(2, 2, 7), axes=axes)
    truth = nib.load(tmp_path / 'truth.nii')
    predicted(finder, tmp_path / 'x.nii')
    mask, image = read_mask(place(finder, tmp_path), 'x.nii')
    assert nib.aff2axcodes(image.affine) == tuple(axes)
    assert np.array_equal(image.affine, truth.affine)
    assert dice(mask, np.asarray(truth.dataobj)) > 0.9

@pytest.mark.parametrize('name', ['stack.npy', 'pages.tif'])
def test_arrays_and_pages_become_volumes(finder, tmp_path, name):
    """Voxels are (x, y, page)."""
    pixels, masks = slices()
    if name.endswith('.npy'):
        np.save(tmp_path / name, pixels[..., None])     # (3, H, W) might be colours
    else:
        first, *others = map(Image.fromarray, pixels)
        first.save(tmp_path / name, save_all=True, append_images=others)
    predicted(finder, tmp_path / name)
    mask, image = read_mask(place(finder, tmp_path), name)
    assert np.array_equal(image.affine, NIFTI_OF_PAGES)
    assert dice(mask, masks.T) > 0.9

def test_a_film_in_four_dimensions_gets_a_mask_of_four(finder, tmp_path):
    files.nifti(tmp_path / 'film.nii', np.random.default_rng(0).random((20, 22, 3, 2), np.float32))
    predicted(finder, tmp_path / 'film.nii')
    mask, _ = read_mask(place(finder, tmp_path), 'film.nii')
    assert mask.shape == (20, 22, 3, 2)

@pytest.mark.programs
@pytest.mark.skipif(not shutil.which('dcm2niix'), reason='dcm2niix is not installed')
def test_a_folder_of_dicom_gets_a_mask_of_the_volume_it_becomes(finder, tmp_path):
    """Compared with the volume that dcm2niix makes when it is called by hand."""
    pixels, _ = slices()
    files.dicom_series(tmp_path / 'dicom', pixels.astype(np.int16), positions=(0, 5, 10))
    (tmp_path / 'by-hand').mkdir()
    command = ['dcm2niix', '-z', 'n', '-o', tmp_path / 'by-hand', tmp_path / 'dicom']
    subprocess.run(command, check=True)
    volume = nib.load(next((tmp_path / 'by-hand').glob('*.nii')))
    predicted(finder, tmp_path / 'dicom')
    found, = place(finder, tmp_path / 'dicom').glob('*-mask.nii.gz')
    mask = nib.load(found)
    assert np.array_equal(mask.affine, volume.affine)
    truth = np.asarray(volume.dataobj) > 140
    assert truth.sum() == 3 * 16 * 16
    assert dice(np.asarray(mask.dataobj), truth) > 0.9

# --- overlays ---------------------------------------------------------------------------------

def test_an_overlay_shows_the_slice_with_most_foreground(finder, tmp_path):
    """Where the mask is, in the first class's colour, lime; elsewhere as it was."""
    pixels, _ = slices()
    pixels[[0, 2]] = 30
    np.save(tmp_path / 'x.npy', pixels[..., None])
    predicted(finder, tmp_path / 'x.npy')
    shown = np.asarray(Image.open(place(finder, tmp_path) / 'x.npy-overlay.png'))
    mask = read_mask(place(finder, tmp_path), 'x.npy')[0].T[1]
    assert shown.shape == (SIDE, SIDE, 3) and 0 < mask.sum() < mask.size
    assert (shown[mask == 0] == pixels[1][mask == 0][:, None]).all()
    expected = pixels[1][mask == 1][:, None] * 0.45 + np.array([0, 255, 0]) * 0.55
    assert np.abs(shown[mask == 1] - expected).max() <= 1

def test_an_overlay_without_foreground_shows_the_middle(tmp_path):
    images = [np.full((4, 5), value, np.uint8) for value in (0, 100, 200)]
    nothing = [np.zeros((4, 5), np.uint8)] * 3
    runs.module('predict').write_masks(tmp_path / 'x.npy', tmp_path / 'x.npy', images, nothing)
    assert (np.asarray(Image.open(tmp_path / 'x.npy-overlay.png')) == 100).all()

# --- where they lie ---------------------------------------------------------------------------

def test_no_mask_takes_the_place_of_another(finder, tmp_path):
    """Files of one name in two folders, or of two types with one stem."""
    names = ['a/x.png', 'b/x.png', 'a/y.png', 'a/y.jpg']
    for height, name in enumerate(names, 20):
        files.save(tmp_path / name, np.full((height, 30), 200, np.uint8))
    predicted(finder, *(tmp_path / name for name in names))
    for height, name in enumerate(names, 20):
        mask, _ = read_mask(place(finder, tmp_path), name)
        assert mask.shape == (height, 30)

def test_where_a_mask_lies_does_not_depend_on_how_its_file_is_named(finder, tmp_path):
    files.save(tmp_path / 'a' / 'x.png', np.full((20, 30), 200, np.uint8))
    mask = place(finder, tmp_path) / 'a' / 'x.png-mask.png'
    predicted(finder, tmp_path / 'a' / 'x.png')
    mask.unlink()
    (tmp_path / 'b').mkdir()
    words = '--predict', '../a/x.png', '--out', finder
    assert runs.program('finetune', *words, cwd=tmp_path / 'b').code == 0
    assert mask.exists()

def test_a_file_that_fails_is_named_and_the_others_get_theirs(finder, tmp_path):
    files.write(tmp_path / 'broken.png', 'no picture')
    files.nifti(tmp_path / 'empty.nii', np.zeros((9, 9, 0), np.float32))
    files.save(tmp_path / 'x.png', np.full((20, 30), 200, np.uint8))
    result = predict(finder, *(tmp_path / name for name in ('broken.png', 'empty.nii', 'x.png')))
    assert result.code == 1
    first, second = result.err.splitlines()
    assert 'broken.png' in first and 'empty.nii' in second
    assert [path.name for path in place(finder, tmp_path).glob('*-mask*')] == ['x.png-mask.png']
    assert '1 of 3 files' in result.out

def test_the_command_has_the_status_of_the_program_that_it_starts(finder, tmp_path):
    """Elsewhere in these tests predictions run in the process of the test."""
    files.save(tmp_path / 'x.png', np.full((20, 30), 200, np.uint8))
    for names, code in ((['x.png'], 0), (['none.png', 'x.png'], 1)):
        shutil.rmtree(finder / 'predictions', ignore_errors=True)
        process = runs.start('finetune', '--predict', *names, '--out', finder, cwd=tmp_path)
        result = runs.finish(process)
        assert result.code == code, result.err
        assert 'Traceback' not in result.err and ('none.png' in result.err) == bool(code)
        masks = place(finder, tmp_path).glob('*-mask*')
        assert [path.name for path in masks] == ['x.png-mask.png']

# --- classes ----------------------------------------------------------------------------------

def test_classes_of_the_test_images_are_as_right_as_the_results_say(labelled, teller, tmp_path):
    images = np.load(labelled / 'tell' / 'test' / 'images.npy')
    paths = [files.save(tmp_path / f'{n}.png', image[..., 0]) for n, image in enumerate(images)]
    predicted(teller, *paths)
    rows = read_classes(teller)
    assert [row['file'] for row in rows] == list(map(str, paths))
    labels = np.load(labelled / 'tell' / 'test' / 'labels.npy')
    right = [row['class'] == ['dark', 'bright'][label] for row, label in zip(rows, labels)]
    assert np.mean(right) == runs.results(teller)['scores']['accuracy']

@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_probabilities_are_those_of_the_network_applied_by_hand(
        labelled, pretrained, tmp_path, pool):
    """Of the class token, or with --pool mean of the patches' mean. The class is the likeliest."""
    tasks.tune(labelled / 'tell', tmp_path / 'out', init=pretrained, pool=pool, epochs=1)
    images = np.load(labelled / 'tell' / 'test' / 'images.npy')
    paths = [files.save(tmp_path / f'{n}.png', image[..., 0]) for n, image in enumerate(images)]
    predicted(tmp_path / 'out', *paths)
    chances = tasks.apply_by_hand(tmp_path / 'out', images, pool).softmax(1)
    rows = read_classes(tmp_path / 'out')
    found = torch.tensor([[float(row['dark']), float(row['bright'])] for row in rows])
    torch.testing.assert_close(found, chances, rtol=1e-4, atol=1e-5)
    assert [row['class'] for row in rows] == [['dark', 'bright'][n] for n in chances.argmax(1)]

def test_each_image_of_a_file_has_a_row(labelled, teller, tmp_path):
    """Numbered from 0; the images of one file need not be of one class."""
    images = np.load(labelled / 'tell' / 'test' / 'images.npy')[:4, ..., 0]
    np.save(tmp_path / 'stack.npy', images)
    stack = tmp_path / 'stack.npy'
    single = [files.save(tmp_path / f'{n}.png', image) for n, image in enumerate(images)]
    predicted(teller, stack, *single)
    rows = read_classes(teller)
    assert [row['file'] for row in rows] == [str(path) for path in (*[stack] * 4, *single)]
    assert [row['image'] for row in rows] == ['0', '1', '2', '3', '0', '0', '0', '0']
    assert [row['dark'] for row in rows[:4]] == [row['dark'] for row in rows[4:]]
    assert len({row['dark'] for row in rows}) == 4

def test_names_that_are_not_utf8_have_a_whole_table(teller, tmp_path):
    names = [os.fsencode(tmp_path) + b'/' + name for name in (b'a.png', b'\xe9.png', b'z.png')]
    for name in names:
        with open(name, 'wb') as file:
            Image.fromarray(np.zeros((9, 9), np.uint8)).save(file, 'png')
    words = list(map(os.fsdecode, names))
    predicted(teller, *words)
    assert [row['file'] for row in read_classes(teller)] == words

def test_a_film_that_is_none_is_named_and_has_no_row(teller, tmp_path):
    files.save(tmp_path / 'a.png', np.zeros((9, 9), np.uint8))
    files.write(tmp_path / 'film.mp4', 'frames')
    result = predict(teller, tmp_path / 'film.mp4', tmp_path / 'a.png')
    assert result.code == 1
    assert 'film.mp4' in result.err
    assert [row['file'] for row in read_classes(teller)] == [str(tmp_path / 'a.png')]

# --- wrong use --------------------------------------------------------------------------------

def test_only_the_folder_of_a_fine_tuned_run_can_predict(pretrained, tmp_path):
    for folder in (tmp_path / 'none', pretrained.parent):
        result = predict(folder, 'a.png')
        runs.ends(result, naming=['fine-tuned', folder / 'best.pt'])
    assert not (tmp_path / 'none').exists()

def test_predicting_needs_a_run():
    runs.ends(runs.program('finetune', '--predict', 'a.png'), naming='--out')
