"""The paper's 44 sources and 26 tasks: a miniature of each, as it is published, is prepared by its
row of prepare_medverse.py's tables and compared with what went in."""
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.support import files, medverse, miniatures, runs
from tests.support.miniatures import SIZE, shown, write_source, write_task
from tests.support.prepared import Prepared, prepare, said, task
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow     # a data set each, and many of them

REAL = ROOT.parent / 'shared/real'
real = pytest.mark.skipif(not REAL.is_dir(), reason='no real images beside the repository')
SOURCES = {row.name: row for row in medverse.SOURCES}
TASKS = {row.name: row for row in medverse.TASKS}

def marked(row):
    """A row as a parameter; some need a program, or are slow."""
    program = {'.avi': 'ffmpeg', '.mp4': 'ffmpeg', '.dcm': 'dcm2niix'}
    needed = program.get(Path(row.keep[0]).suffix) if isinstance(row, medverse.Source) else None
    marks = [pytest.mark.slow] if row.name == 'scr' else []
    if needed:
        missing = pytest.mark.skipif(not shutil.which(needed), reason=f'{needed} is not installed')
        marks = [pytest.mark.programs, missing]
    return pytest.param(row, marks=marks, id=row.name)

def must_prepare(raw, out, *words):
    """All that a preparation says that must succeed."""
    result = prepare(raw, out, '--size', SIZE, *words)
    assert result.code == 0, said(result)
    return said(result)

def check_source(out, row, right):
    """The shards hold all that was to be taken, and nothing else."""
    shards = Prepared(out).shards(row.name)
    found = np.stack([shown(image) for shard in shards for image in shard])
    distance = np.abs(found[:, None] - right).mean((2, 3))
    assert distance.min(1).max() < 10, 'an image that was not to be taken'
    assert sorted(distance.argmin(1)) == list(range(len(right)))
    meta = Prepared(out).meta(row.name)
    assert (meta['count'], meta['modality']) == (len(right), row.modality)
    assert meta['dropped']['duplicate'] == 0

def check_task(out, row, right, patient=None):
    """Every image is there once, upright, with its answer, and in a split by the paper's rule."""
    found = task(out)
    segments = isinstance(row.classes, int)
    assert found.kind == ('segmentation' if segments else 'classification')
    assert (len(found.classes) if segments else found.classes) == row.classes
    assert [*found.split] == ['train', 'val', 'test']
    assert sorted(found.where) == sorted(right)
    for part, paths in found.split.items():
        check_images(found.images[part], [image for path in paths for image in right[path].images])
        check_answers(row, found.answers[part], [right[path].answer for path in paths])
    check_split(row, found, patient or row.patient)

def check_images(images, right):
    assert len(images) == len(right)
    for image, true in zip(images, right):
        assert np.abs(shown(image) - true).mean() < 10

def check_answers(row, answers, right):
    if not right or not isinstance(row.classes, int):
        assert answers.tolist() == right
        return
    right = np.concatenate(right)
    assert answers.shape == right.shape
    tolerance = 0.03 if row.answers in ('outline', 'polygons') else 0      # pixels of contours
    assert np.mean(answers != right) <= tolerance

def check_split(row, found, patient):
    """No patient is in two splits, the splits have the right sizes, and given ones their files."""
    patients = {part: {(re.search(patient, path) or [path])[0] for path in paths}
                for part, paths in found.split.items()}
    sizes = tuple(map(len, patients.values()))
    assert len(set.union(*patients.values())) == sum(sizes), 'a patient is in two splits'
    if patient == row.patient:
        assert sizes == row.patients
    for parts, expression in (row.given or {}).items():
        there = {path for part in parts.split() for path in found.split[part]}
        assert there == {path for path in found.where if re.search(expression, path)}
    if row.of_each_class:
        for name in row.classes:
            assert row.of_each_class == tuple(
                len({found for found in group if name in found.split('/')[0]})
                for group in patients.values())

# --- every row of the two tables ----------------------------------------------------------------

@pytest.mark.parametrize('row', [marked(row) for row in medverse.SOURCES])
def test_a_source_of_table_2_is_prepared_by_its_row(tmp_path, row):
    right = write_source(tmp_path / 'raw' / row.name, row)
    assert len(right) == row.gives
    words = ['--source', row.name, *row.options] if row.options else []
    told = must_prepare(tmp_path / 'raw', tmp_path / 'out', *words)
    check_source(tmp_path / 'out', row, right)
    line, = (line.split() for line in told.splitlines() if row.name in line.split())
    modality, name, _, _, kept, *_ = line
    assert (modality, name, kept) == (row.modality, row.name, str(row.gives))

@pytest.mark.parametrize('row', [marked(row) for row in medverse.TASKS])
def test_a_task_of_table_3_is_prepared_by_its_row(tmp_path, row):
    right = write_task(tmp_path / 'raw', row)
    if row.becomes:
        result = runs.program('convert', row.name, tmp_path / 'raw', *row.rule)
        assert result.code == 0, result.err
        right = {re.sub(*row.becomes, path): true for path, true in right.items()}
    told = must_prepare(tmp_path / 'raw', tmp_path / 'out', '--task', row.name, *row.options)
    check_task(tmp_path / 'out', row, right)
    left_out = {*re.findall(r'(\d+) left out', told)}
    assert left_out == ({'0', '7'} if row.lone else {'0'})

def test_the_list_has_every_row_with_its_count_and_where_it_is_had(tmp_path):
    listed = prepare(tmp_path, tmp_path / 'out', '--list')
    assert listed.code == 0 and not (tmp_path / 'out').exists()
    rows = medverse.SOURCES + medverse.TASKS
    lines = {row.name: [line for line in listed.out.splitlines() if line.split()[0] == row.name]
             for row in rows}
    assert [name for name, found in lines.items() if len(found) != 1] == []
    assert len(listed.out.splitlines()) == 44 + 26
    assert [row.name for row in rows if not re.search(row.link, lines[row.name][0], re.I)] == []
    for row in medverse.SOURCES:
        assert str(row.count) in lines[row.name][0].split()
    assert sum(row.count for row in medverse.SOURCES) == 4_973_080     # as Table 2 says

def test_the_list_says_which_data_sets_lie_in_raw(tmp_path):
    write_source(tmp_path / 'HC18', SOURCES['HC18'])
    without = prepare(tmp_path / 'none', tmp_path / 'out', '--list').out.splitlines()
    found = [line for line in prepare(tmp_path, tmp_path / 'out', '--list').out.splitlines()
             if line not in without]
    assert len(found) == 1 and found[0].startswith('HC18') and 'found' in found[0]

def test_the_list_says_whose_layout_is_not_confirmed(tmp_path):
    lines = prepare(tmp_path, tmp_path / 'out', '--list').out.splitlines()
    unsure = {line.split()[0] for line in lines
              if line.split(' | ')[5].endswith('?')}
    assert unsure == {'Mammo-Bench', 'XCAD', 'UBPD', 'MESSIDOR', 'APTOS2019',
                      'Lacuna-Malaria-Datasets', 'dca1', 'dias', 'dsca', 'sts-tooth-2d'}

# --- several rows at once -----------------------------------------------------------------------

@pytest.mark.parametrize('folder', ['AutoPET', 'TopBrain', 'OCTA500'])
def test_rows_that_share_a_download_take_each_their_own(tmp_path, folder):
    rows = [row for name, row in SOURCES.items() if name.startswith(folder)]
    home = tmp_path / 'raw' / folder
    for row in rows:
        write_source(home, row)
    right = {}
    for n, row in enumerate(rows):      # now over what the others leave
        right[row.name] = write_source(home, row, first=1000 * n, leave=False)
    must_prepare(tmp_path / 'raw', tmp_path / 'out')
    assert Prepared(tmp_path / 'out').names == sorted(right)
    for row in rows:
        check_source(tmp_path / 'out', row, right[row.name])

def test_data_sets_of_the_table_and_others_are_prepared_at_once(tmp_path):
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    right = {name: write_source(raw / name, SOURCES[name]) for name in ('BUSI', 'ACDC', 'ARCADE')}
    scan = miniatures.write_image(raw / 'CT/rotterdam/dataset00/image00.nii.gz', 0, 'CT')
    must_prepare(raw, out)
    assert Prepared(out).names == ['ACDC', 'ARCADE', 'BUSI', 'rotterdam']
    for name, images in right.items():
        check_source(out, SOURCES[name], images)
    found = [shown(image) for image in Prepared(out).images('rotterdam')]
    assert np.abs(np.stack(found) - [shown(image) for image in scan]).mean((1, 2)).max() < 10

def test_one_source_alone_and_a_rule_of_ones_own(tmp_path):
    raw = tmp_path / 'raw'
    write_source(raw / 'ACDC', SOURCES['ACDC'])
    write_source(raw / 'BUSI', SOURCES['BUSI'])
    must_prepare(raw, tmp_path / 'one', '--source', 'ACDC')
    assert Prepared(tmp_path / 'one').names == ['ACDC']
    rule = r'Dataset.*/(benign|normal)/.*\(.\)\.png'
    must_prepare(raw, tmp_path / 'rule', '--source', 'BUSI', '--images', rule)
    assert Prepared(tmp_path / 'rule').meta('BUSI')['count'] == 4

def test_a_source_in_a_format_that_is_not_read_is_left_out_by_name(tmp_path):
    right = write_source(tmp_path / 'raw/BUSI', SOURCES['BUSI'])
    files.write(tmp_path / 'raw/Eyepacs/train-0.parquet', 'binary')
    result = prepare(tmp_path / 'raw', tmp_path / 'out', '--size', SIZE)
    check_source(tmp_path / 'out', SOURCES['BUSI'], right)
    assert Prepared(tmp_path / 'out').names == ['BUSI']
    assert result.code == 1 and 'left out' in result.sentence and 'Eyepacs' in result.sentence
    assert 'sources; what each left out' not in said(result)

@pytest.mark.parametrize('name, program', [('EchoNet-Dynamic', 'ffmpeg'),
                                           ('Prostate-MRI-US-Biopsy', 'dcm2niix')])
def test_without_its_program_a_source_stops_and_names_it(tmp_path, monkeypatch, name, program):
    for path in miniatures.paths(SOURCES[name].keep):
        files.write(tmp_path / 'raw' / name / path.replace('#', '1'), 'binary')
    monkeypatch.setenv('PATH', str(tmp_path))
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    runs.ends(result, [f"'{program}'", f'conda install {program}'])
    assert Prepared(tmp_path / 'out').names == []

# --- tasks --------------------------------------------------------------------------------------

def test_a_mask_without_its_image_is_left_out_where_this_is_allowed(tmp_path):
    write_task(tmp_path / 'raw', TASKS['dca1'])
    (tmp_path / 'raw/Database_134_Angiograms/3.pgm').unlink()
    told = must_prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'dca1', '--partial')
    assert re.search('1 left out .*3_gt.pgm', told)
    assert 'Database_134_Angiograms/3.pgm' not in task(tmp_path / 'out').where

def test_a_drawn_split_follows_from_its_seed_and_from_what_a_patient_is(tmp_path):
    row, splits = TASKS['octdl'], {}
    right = write_task(tmp_path / 'raw', row)
    cases = {'first': [], 'again': [], 'seed': ['--seed', 1], 'by image': ['--patient', '.*']}
    for name, words in cases.items():
        must_prepare(tmp_path / 'raw', tmp_path / name, '--task', 'octdl', *words)
        if name == 'by image':      # of 10 images a class 3 are for testing, 2 for validation
            assert task(tmp_path / name).counts == dict(train=35, val=14, test=21)
            found = task(tmp_path / name)
            assert sorted(found.where) == sorted(right)
        else:
            check_task(tmp_path / name, row, right)
        splits[name] = task(tmp_path / name).split
    assert splits['first'] == splits['again']
    assert splits['seed'] != splits['first'] != splits['by image']

def test_a_patient_with_several_diseases_is_in_one_split(tmp_path):
    write_task(tmp_path / 'raw', TASKS['octdl'])
    table = tmp_path / 'raw/OCTDL_labels.csv'
    table.write_text(re.sub(r'x,[A-Z]+', 'x,', table.read_text()))      # patients -1 to -5 have all
    must_prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'octdl')
    patients = [{re.search(r'-\d', path)[0] for path in paths}
                for paths in task(tmp_path / 'out').split.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 5

# --- real files ---------------------------------------------------------------------------------

@real
@pytest.mark.slow
def test_filled_outlines_of_real_heads_have_the_areas_of_their_ellipses(tmp_path):
    """HC18 publishes the circumference of each head (mm) and the size of its pixels (mm)."""
    heads = REAL / 'tasks/HC18'
    folder = tmp_path / 'raw/training_set/training_set'
    folder.mkdir(parents=True)
    for path in (heads / 'training_set').iterdir():
        (folder / path.name).symlink_to(path)
    assert runs.program('convert', 'fhu', tmp_path / 'raw').code == 0
    must_prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'fhu')
    radius = {}
    for line in (heads / 'training_set_pixel_size_and_HC.csv').read_text().splitlines()[1:]:
        name, pixel, circumference = line.split(',')
        radius[name] = float(circumference) / float(pixel) / (2 * np.pi)
    found = task(tmp_path / 'out')
    assert found.counts == dict(train=30, val=12, test=18)
    for path, mask in found.answer.items():
        area = mask.mean() * 800 * 540
        assert 0.85 < area / (np.pi * radius[Path(path).name] ** 2) < 1.05, path

REAL_VOLUMES = {
    'AutoPET-CT': dict(to='AutoPET/FDG-PET-CT-Lesions/PETCT_0a1/01-2003/CT.nii.gz', least=0.05,
                       file='CT/totalsegmentator-tests/example_ct.nii.gz'),
    'AutoPET-PET': dict(to='AutoPET/FDG-PET-CT-Lesions/PETCT_0a1/01-2003/PET.nii.gz', least=0.01,
                        file='PET/hansen-receptors/D2_raclopride_hc7_alakurtti.nii'),
    'BraTS-GLI': dict(to='BraTS-GLI/BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1c.nii.gz', least=0.05,
                      file='MR/niivue-images/MR_Gd.nii.gz')}

@real
@pytest.mark.slow
@pytest.mark.parametrize('name', REAL_VOLUMES)
def test_of_a_real_volume_the_slices_with_their_share_of_foreground_are_kept(tmp_path, name):
    case = REAL_VOLUMES[name]
    image = nib.load(REAL / 'pretrain' / case['file'])
    nib.save(image, files.parent(tmp_path / 'raw' / case['to']))
    must_prepare(tmp_path / 'raw', tmp_path / 'out', '--source', name)
    volume = nib.as_closest_canonical(image).get_fdata()
    low, high = (-200, 400) if name == 'AutoPET-CT' else np.percentile(volume, (1, 99))
    share = np.mean((volume - low) / (high - low) > 0.02, (0, 1))
    assert abs(Prepared(tmp_path / 'out').meta(name)['count'] - np.sum(share >= case['least'])) <= 1
    assert Prepared(tmp_path / 'out').names == [name]
