"""DICOM: a folder of slices becomes the volume that was scanned, by dcm2niix."""
import shutil

import numpy as np
import pytest

from tests.support import files, prepared, runs

pytestmark = [pytest.mark.programs,
              pytest.mark.skipif(not shutil.which('dcm2niix'), reason='dcm2niix is not installed')]

SIDE = 48     # of the slices and of what is stored, so that nothing is resized
EVEN = 0, 3, 6, 9, 12, 15
UNEVEN = 0, 3, 6, 12, 15, 21

def units(number):
    """Hounsfield units of a slice, each from a start of its own."""
    return files.ramp(-200, 400, 'i2', SIDE) + np.int16(9 * number)

def write_series(folder, positions=EVEN, **more):
    slices = [units(number) for number in range(len(positions))]
    files.dicom_series(folder, slices, positions, **{'modality': 'CT'} | more)

@pytest.fixture
def source(tmp_path):
    """Prepare the source RAW/<modality>/a, and read it back: its images and rows of dropped.csv."""
    def prepare():
        out = tmp_path / 'out'
        result = prepared.prepare(tmp_path / 'raw', out, '--size', SIDE, '--min_side', 8)
        assert result.code == 0, result.err
        found = prepared.Prepared(out)
        return found.images('a'), found.dropped('a')
    return prepare

@pytest.mark.parametrize('case', [
    dict(), dict(positions=UNEVEN), dict(tilt=15), dict(end=''), dict(end='.ima')],
    ids=['even', 'uneven', 'tilted', 'no ending', 'ima'])
def test_slices_are_stored_as_they_were_scanned(tmp_path, source, case):
    """dcm2niix also writes copies, corrected for tilt or distances, which are not taken."""
    write_series(tmp_path / 'raw/CT/a/p1/series', **case)
    images, dropped = source()
    assert len(images) == 6 and not dropped
    images = images[np.argsort(images.mean((1, 2, 3)))]
    for number, image in enumerate(images):
        expected = np.clip((units(number) + 200) / 600, 0, 1) * 255
        assert np.abs(image[..., 0] - expected).max() <= 0.51

@pytest.mark.parametrize('modality', ['MR', 'PT'])
def test_mr_and_pet_are_read_too(tmp_path, source, modality):
    folder = {'MR': 'MR', 'PT': 'PET'}[modality]
    write_series(tmp_path / 'raw' / folder / 'a/p1', modality=modality)
    images, dropped = source()
    assert len(images) == 6 and not dropped

def test_every_file_of_a_series_stands_for_its_folder(tmp_path, source):
    """The account is of images, so a folder of slices is one file."""
    write_series(tmp_path / 'raw/CT/a/p1')
    source()
    meta = prepared.Prepared(tmp_path / 'out').meta('a')
    assert (meta['files'], meta['count']) == (1, 6)

def test_a_stray_backslash_in_the_json_of_dcm2niix_does_no_harm(tmp_path, source, fake_program):
    r"""It copies the kernel's name, as Br38f\3, into JSON unescaped, depending on its version."""
    write_series(tmp_path / 'raw/CT/a/p1')
    mend = r'for a in "$@"; do [ -d "$a" ] && sed -i "s/f..3/f\\\\3/" "$a"/*.json; done; exit 0'
    fake_program('dcm2niix', f'{shutil.which("dcm2niix")} "$@"\n{mend}')
    images, _ = source()
    assert len(images) == 6

def test_a_series_in_a_folder_of_another_is_read_once(tmp_path, source):
    for number, folder in enumerate(['p1', 'p1/thin', 'p1/thin/deep']):
        write_series(tmp_path / 'raw/CT/a' / folder, EVEN[number:], series=number + 1)
    images, _ = source()
    assert len(images) == 6 + 5 + 4

@pytest.mark.parametrize('modality', ['CR', 'DX', 'MG', 'US'])
def test_other_dicom_is_dropped_by_its_name_and_says_how_to_save_it(tmp_path, source, modality):
    colour = files.noise(0, SIDE, channels=3)
    film = colour if modality == 'US' else units(0)
    files.dicom(tmp_path / 'raw/X-ray/a/film/IM0000.dcm', film, modality)
    files.save(tmp_path / 'raw/X-ray/a/0.png', files.texture(0))
    images, (row,) = source()
    assert len(images) == 1
    assert (row['path'], row['reason']) == ('film', 'corrupt')
    assert 'DICOM' in row['detail'] and 'PNG' in row['detail']

@pytest.mark.parametrize('below', ['p1', 'p2'], ids=['one folder', 'two folders'])
@pytest.mark.parametrize('home, modality, other', [('PET', 'PT', 'CT'), ('CT', 'CT', 'MR')])
def test_a_series_of_another_modality_is_dropped(tmp_path, source, home, modality, other, below):
    """As of PET/CT studies, whose archives hold both."""
    write_series(tmp_path / f'raw/{home}/a/p1', modality=modality)
    slices = [units(number) for number in range(6)]
    files.dicom_series(tmp_path / f'raw/{home}/a/{below}', slices, EVEN, end='.ima',
                       modality=other, series=2)
    images, (row,) = source()
    assert len(images) == 6
    assert row['path'] == below and f'series of {other}' in row['detail']

def test_a_series_of_another_modality_than_a_tasks_is_refused(tmp_path):
    for number in range(4):
        folder = tmp_path / f'raw/{"ab"[number % 2]}/p{number}'
        write_series(folder, modality='CT' if number else 'PT', series=number)
    words = '--task', 'mini', '--level', 1, '--size', SIDE
    result = prepared.prepare(tmp_path / 'raw', tmp_path / 'out', *words, '--modality', 'CT')
    runs.ends(result, ['a/p0', 'series of PT'])
    assert not (tmp_path / 'out').exists()
    assert prepared.prepare(tmp_path / 'raw', tmp_path / 'all', *words).code == 0
