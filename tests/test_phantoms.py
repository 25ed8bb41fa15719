"""Phantoms: ten modalities simulated from their physics, with masks and classes."""
import copy
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.support import prepared, runs

simulated = runs.module('phantoms')
preparation = runs.module('prepare_medverse')

HEALTHY, SICK = 0, 1     # numbers of subjects: every other one is sick
AIR, FAT, LUNG, HEART, LESION = 0, 1, 4, 9, 10     # numbers of masks of CT, PET, MR and X-ray

def pixels_of(path):
    if path.suffix == '.gz':
        return np.asarray(nib.load(path).dataobj)
    return np.asarray(Image.open(path))

class Phantom:
    """Subject `number` of a modality as files below a folder, read back."""

    def __init__(self, folder, modality, number, seed=3, side=96):
        simulated.write_phantom(folder, modality, number, seed, side)
        path, = (folder / 'raw' / modality).glob(f'*/*/{number:04d}.*')
        self.image, self.kind = pixels_of(path), path.parent.name
        self.mask = pixels_of(folder / 'labels' / modality / self.kind / path.name)

@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    """A healthy and a sick subject of each modality: {(modality, number): Phantom}."""
    folder = tmp_path_factory.mktemp('phantoms')
    return {(modality, number): Phantom(folder, modality, number)
            for modality in preparation.MODALITIES for number in (HEALTHY, SICK)}

def inside(mask):
    """Voxels whose neighbours in the slice are all of the mask."""
    shifted = [np.roll(mask, step, axis) for step in (-1, 0, 1) for axis in (0, 1)]
    return np.logical_and.reduce(shifted)

@pytest.mark.parametrize('modality', preparation.MODALITIES)
def test_a_phantom_has_a_mask_of_its_size_and_its_class_as_folder(phantoms, modality):
    classes = ('naevus', 'melanoma') if modality == 'Photo' else ('normal', 'lesion')
    for number in HEALTHY, SICK:
        phantom = phantoms[modality, number]
        assert phantom.kind == classes[number]
        assert phantom.mask.shape == phantom.image.shape[:phantom.mask.ndim]
        assert phantom.image.std() > 0

@pytest.mark.parametrize('modality', ['Endoscope', 'Ultrasound'])
def test_masks_of_endoscopes_and_ultrasound_show_the_lesion_of_the_sick(phantoms, modality):
    assert phantoms[modality, HEALTHY].mask.max() == 0
    assert phantoms[modality, SICK].mask.max() > 0

def test_ct_shows_air_and_fat_at_their_hounsfield_units(phantoms):
    ct = phantoms['CT', HEALTHY]
    assert np.median(ct.image[ct.mask == AIR]) == -1000
    assert abs(ct.image[inside(ct.mask == FAT)].mean() + 100) < 10

def test_pet_lesions_take_up_more_sugar_than_fat(phantoms):
    pet = phantoms['PET', SICK]
    assert 5 * pet.image[pet.mask == FAT].mean() < pet.image[pet.mask == LESION].mean()

def test_lungs_let_more_x_rays_through_than_the_heart(phantoms):
    film = phantoms['X-ray', HEALTHY]
    assert film.image[film.mask == LUNG].mean() < film.image[film.mask == HEART].mean() - 40

@pytest.mark.parametrize('modality', ['MR', 'Fundus'])
def test_a_phantom_follows_from_its_seed_and_number_alone(phantoms, tmp_path, modality):
    first = phantoms[modality, SICK]
    again = Phantom(tmp_path / 'again', modality, SICK)
    other = Phantom(tmp_path / 'other', modality, SICK, seed=4)
    assert np.array_equal(again.image, first.image) and np.array_equal(again.mask, first.mask)
    assert not np.array_equal(other.image, first.image)

def test_ct_pet_mr_and_x_ray_see_the_same_body(tmp_path, monkeypatch):
    """Each asks for a body on a grid of its own; on one grid the four are equal."""
    torso, bodies = simulated.torso, []

    def spy(rng, shape, sick):
        bodies.append(torso(copy.deepcopy(rng), (20, 20, 20), 0))
        return torso(rng, shape, sick)
    monkeypatch.setattr(simulated, 'torso', spy)
    for modality in 'CT', 'PET', 'MR', 'X-ray':
        simulated.write_phantom(tmp_path, modality, SICK, seed=3, side=64)
    assert len(bodies) == 4
    assert all(np.array_equal(body, bodies[0]) for body in bodies)

def test_an_eleventh_modality_takes_a_name_a_window_and_a_function(tmp_path, monkeypatch):
    """Echoes of 0 to 100 by a window from 0 to 50: those above 25 become more than 127."""
    def sonar(rng, side, sick):
        echoes = rng.integers(0, 101, (side, side, 2)).astype(np.float32)
        return echoes, np.zeros((side, side, 2), np.uint8)

    names = *preparation.MODALITIES, 'Sonar'
    window = preparation.Window((0, 50), None, 0)
    monkeypatch.setattr(preparation, 'MODALITIES', names)
    monkeypatch.setitem(preparation.WINDOWS, 'Sonar', window)
    monkeypatch.setitem(simulated.PHANTOMS, 'Sonar', (2, sonar))
    for modality in names:
        simulated.write_phantom(tmp_path, modality, HEALTHY, seed=3, side=64)
    result = prepared.prepare(tmp_path / 'raw', tmp_path / 'out')
    assert result.code == 0 and '11 sources' in result.out
    found = prepared.Prepared(tmp_path / 'out')
    meta = found.meta('phantom-sonar')
    assert meta['count'] == 2 and meta['limits'] == [0, 50]
    assert np.mean(found.images('phantom-sonar') > 127) > 0.6

# --- their tasks ---------------------------------------------------------------------------------

TASKS = [
    SimpleNamespace(name='vessels', modality='Fundus', kind='segmentation', count=16, classes=2),
    SimpleNamespace(name='organs', modality='CT', kind='segmentation', count=80, classes=11),
    SimpleNamespace(name='lesion', modality='Photo', kind='classification', count=16, classes=2)]

@pytest.mark.parametrize('row', TASKS, ids=lambda row: row.name)
def test_a_task_of_phantoms_is_simulated_and_prepared_at_once(tmp_path, row):
    """Of its own modality alone. `count` is of images, of which a volume of CT has several."""
    words = '--raw', tmp_path / 'raw', '--out', tmp_path / 'out', '--task', f'phantom-{row.name}'
    result = runs.program('phantoms', *words, '--count', row.count, '--size', 32)
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / 'raw/raw').iterdir()] == [row.modality]
    task = prepared.task(tmp_path / 'out')
    assert task.kind == row.kind and len(task.classes) == row.classes
    assert sum(task.counts.values()) == row.count
    if row.name == 'lesion':
        assert task.classes == ['melanoma', 'naevus']
