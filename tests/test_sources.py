"""Sources for pretraining: what lies below RAW becomes shards, and every file is accounted for."""
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.support import files, prepared, runs
from tests.support.prepared import Prepared, prepare, said

SIZE = prepared.SIZE
REAL = runs.ROOT.parent / 'shared/real/pretrain'

@pytest.fixture
def photos(tmp_path):
    """RAW with one source of one photo, and a folder beside it for the result."""
    files.save(tmp_path / 'raw/Photo/skin/0.png', files.texture(0))
    return SimpleNamespace(raw=tmp_path / 'raw', skin=tmp_path / 'raw/Photo/skin',
                           out=tmp_path / 'out')

# --- the account of a RAW in which everything goes wrong -----------------------------------------

def write_photos(folder):
    """31 files, of which 21 are images to keep."""
    for seed in range(20):
        files.save(folder / f'{seed:02d}.jpg', files.texture(seed, 300, 260, 3), quality=95)
    copy = Image.fromarray(files.texture(3, 300, 260, 3)).resize((200, 180))
    copy.save(folder / 'a_copy.jpg', quality=80)
    Image.fromarray(files.texture(30)).convert('RGB').save(folder / 'grey.png')
    files.save(folder / 'small.png', files.texture(31, 3, 5))
    files.save(folder / 'narrow.png', files.texture(31, 300, 20))
    files.save(folder / 'flat.png', np.full((80, 80), 77, np.uint8))
    files.write(folder / 'cut.png', (folder / 'grey.png').read_bytes()[:900])
    files.write(folder / 'cut.jpg', (folder / '00.jpg').read_bytes()[:2000])
    files.write(folder / 'empty.jpg')
    for name in 'labels.csv', '.DS_Store', '._00.jpg':
        files.write(folder / name, 'a,b')

def write_scans(folder):
    """Six files, of which two hold seven slices to keep; the slices of a volume may be alike."""
    spacing = 1, 1, 5
    volume = files.texture(32, 48, 40)[..., None].repeat(6, 2).astype(np.int16) * 3 - 300
    whole = files.nifti(folder / 'a.nii.gz', volume, spacing=spacing)
    files.write(folder / 'cut.nii.gz', whole.read_bytes()[:1500])
    empty, even = np.full((40, 40, 2), np.nan, np.float32), np.full((40, 40, 2), 100, np.int16)
    files.nifti(folder / 'nan.nii', empty, spacing=spacing)
    files.nifti(folder / 'one_value.nii', even, spacing=spacing)
    whole = files.save(folder / 'b.npy', files.texture(33, 40, 40)[None].astype(np.int16) * 2)
    files.write(folder / 'cut.npy', whole.read_bytes()[:-100])
    return volume

@pytest.fixture(scope='module')
def everything(tmp_path_factory):
    """A RAW of three sources with all that goes wrong, and its preparation."""
    folder = tmp_path_factory.mktemp('everything')
    raw, out = folder / 'raw', folder / 'out/medverse'
    write_photos(raw / 'photo/skin/deep')
    volume = write_scans(raw / 'CT/scans')
    files.nifti(raw / 'MR/scans/a.nii.gz', volume, spacing=(1, 1, 5))
    result = prepare(raw, out)
    assert result.code == 0, result.err
    return SimpleNamespace(raw=raw, out=out, result=result, found=Prepared(out))

ACCOUNT = {     # of each source: its folder, and how many files, images, kept images and channels
    'skin': dict(folder='photo/skin', files=31, found=31, count=21, channels={1, 3}),
    'scans-CT': dict(folder='CT/scans', files=6, found=13, count=7, channels={1}),
    'scans-MR': dict(folder='MR/scans', files=1, found=6, count=6, channels={1})}

def test_sources_of_one_name_get_their_modality_in_it(everything):
    assert sorted(path.name for path in everything.out.iterdir()) == sorted(ACCOUNT)
    assert everything.found.meta('scans-MR')['modality'] == 'MR'
    assert everything.found.meta('scans-CT')['modality'] == 'CT'

def test_every_dropped_picture_is_named_with_its_reason(everything):
    reasons = everything.found.reasons('skin')
    assert {path.removeprefix('deep/'): reason for path, reason in reasons.items()} == {
        'a_copy.jpg': 'duplicate', 'small.png': 'small', 'narrow.png': 'small', 'flat.png': 'blank',
        'cut.png': 'corrupt', 'cut.jpg': 'corrupt', 'empty.jpg': 'corrupt',
        'labels.csv': 'other', '.DS_Store': 'other', '._00.jpg': 'other'}

def test_every_dropped_volume_is_named_with_its_reason(everything):
    assert everything.found.reasons('scans-CT') == {
        'cut.nii.gz': 'corrupt', 'cut.npy': 'corrupt', 'nan.nii': 'blank', 'one_value.nii': 'blank'}

@pytest.mark.parametrize('source', ACCOUNT)
def test_every_file_is_accounted_for(everything, source):
    """Files as on the disk, images as in the shards, a row for each other, and the same numbers in
    the table that is printed."""
    right = ACCOUNT[source]
    meta = everything.found.meta(source)
    counts = right['files'], right['found'], right['count']
    assert (meta['files'], meta['count']) == (right['files'], right['count'])
    below = (everything.raw / right['folder']).rglob('*')
    assert meta['files'] == sum(path.is_file() for path in below)
    dropped = Counter(row['reason'] for row in everything.found.dropped(source))
    assert {reason: count for reason, count in meta['dropped'].items() if count} == dropped
    assert right['found'] == len(everything.found.dropped(source)) + sum(
        map(len, everything.found.shards(source)))
    lines = [line.split()[1:5] for line in everything.result.out.splitlines()]
    assert [source, *map(str, counts)] in lines
    assert '3 sources; what each left out, and why' in everything.result.out

@pytest.mark.parametrize('source', ACCOUNT)
def test_shards_hold_what_is_kept_in_grey_or_colour(everything, source):
    shards = everything.found.shards(source)
    assert sum(map(len, shards)) == ACCOUNT[source]['count']
    assert {shard.dtype for shard in shards} == {np.dtype(np.uint8)}
    assert {shard.shape[1:3] for shard in shards} == {(SIZE, SIZE)}
    assert {shard.shape[3] for shard in shards} == ACCOUNT[source]['channels']

def test_the_result_does_not_depend_on_the_number_of_workers(everything, tmp_path):
    assert prepare(everything.raw, tmp_path / 'out', '--workers', 4).code == 0
    assert files.contents(tmp_path / 'out') == files.contents(everything.out)

def test_finished_sources_are_left_alone_and_told_in_the_same_table(everything):
    before = files.contents(everything.out)
    again = prepare(everything.raw, everything.out)
    assert again.code == 0 and again.out.count('finished before') == len(ACCOUNT)
    table = everything.result.out.splitlines()[-len(ACCOUNT) - 2:]
    assert table[0].startswith('modality') and again.out.splitlines()[-len(table):] == table
    assert files.contents(everything.out) == before

def test_another_size_than_before_is_refused(everything):
    before = files.contents(everything.out)
    result = prepare(everything.raw, everything.out, '--size', 32)
    runs.ends(result, [everything.out / 'scans-CT', '--size', 'delete'])
    assert files.contents(everything.out) == before

def test_shards_are_closed_when_they_are_full(tmp_path, monkeypatch):
    """Six images of 512 px, grey and colour in turn, in shards of 1 MiB or a bit more."""
    monkeypatch.setattr(runs.module('prepare_medverse'), 'SHARD', 1 << 20)
    images = [files.texture(seed, 64, 64, 3 * (seed % 2)) for seed in range(6)]
    for seed, image in enumerate(images):
        files.save(tmp_path / f'raw/Photo/big/{seed}.png', image)
    assert prepare(tmp_path / 'raw', tmp_path / 'out', '--size', 512).code == 0
    shards = Prepared(tmp_path / 'out').shards('big')
    assert [(len(shard), shard.shape[3]) for shard in shards] == [(3, 1), (2, 3), (1, 3)]
    assert {shard.shape[1:3] for shard in shards} == {(512, 512)}

@pytest.mark.parametrize('first, second', [('CT', 'MR'), ('MR', 'CT')])
def test_a_finished_source_is_renamed_by_hand_when_a_namesake_comes(tmp_path, first, second):
    """Nothing is prepared twice, which would count double in training."""
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    files.save(raw / first / 'hospital/0.png', files.texture(0))
    assert prepare(raw, out).code == 0
    before = files.contents(out)
    files.save(raw / second / 'hospital/0.png', files.texture(1))
    runs.ends(prepare(raw, out), [out / 'hospital', 'rename it to hospital-<'])
    assert files.contents(out) == before
    (out / 'hospital').rename(out / f'hospital-{first}')
    for _ in range(2):
        assert prepare(raw, out).code == 0
        found = Prepared(out)
        assert {name: found.meta(name)['modality'] for name in found.names} == {
            f'hospital-{first}': first, f'hospital-{second}': second}

def test_two_folders_of_one_modality_and_name_are_named(tmp_path):
    raw = tmp_path / 'raw'
    files.save(raw / 'X-ray/hospital/0.png', files.texture(0))
    files.save(raw / 'xray/hospital/0.png', files.texture(1))
    both = [raw / 'X-ray/hospital', raw / 'xray/hospital', 'rename one of them']
    runs.ends(prepare(raw, tmp_path / 'out'), both)
    assert not (tmp_path / 'out').exists()

def test_a_source_is_not_taken_for_a_finished_one_of_another_modality(tmp_path):
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    files.save(raw / 'CT/hospital/0.png', files.texture(0))
    assert prepare(raw, out).code == 0
    before = files.contents(out)
    (raw / 'MR').mkdir()
    (raw / 'CT/hospital').rename(raw / 'MR/hospital')
    runs.ends(prepare(raw, out), [raw / 'MR/hospital', out / 'hospital', 'CT', 'rename'])
    assert files.contents(out) == before

# --- which files are taken -----------------------------------------------------------------------

@pytest.fixture
def mixed(tmp_path):
    """A source of pictures and of crops of them, beside another source."""
    for number, name in enumerate(['a.png', 'b.png', 'crops/a.png', 'crops/b.jpg']):
        files.save(tmp_path / 'raw/Photo/mixed' / name, files.texture(number))
    files.save(tmp_path / 'raw/Photo/other/a.png', files.texture(0))
    return SimpleNamespace(raw=tmp_path / 'raw', out=tmp_path / 'out')

@pytest.mark.parametrize('options, left_out', [
    (['--skip', 'crops/'], {'crops/a.png', 'crops/b.jpg'}),
    (['--skip', r'B\.'], {'b.png', 'crops/b.jpg'}),
    (['--images', r'\.png'], {'crops/b.jpg'}),
    (['--images', r'\.png', '--skip', '^crops'], {'crops/a.png', 'crops/b.jpg'})])
def test_rules_of_images_and_skip_choose_files_by_their_path(mixed, options, left_out):
    """They are searched in the path below the source, in any case."""
    assert prepare(mixed.raw, mixed.out, '--source', 'mixed', *options).code == 0
    found = Prepared(mixed.out)
    assert found.names == ['mixed']
    assert found.reasons('mixed') == dict.fromkeys(left_out, 'other')
    assert len(found.images('mixed')) == 4 - len(left_out)

def test_skip_replaces_the_rule_of_a_known_source(tmp_path):
    """BUSI's own rule leaves out its masks."""
    mask, normal = 'benign (1)_mask.png', 'normal (1).png'
    for number, name in enumerate([mask, normal, 'benign (1).png']):
        files.save(tmp_path / 'raw/BUSI' / name, files.texture(number))
    for options, left_out in ([], mask), (['--skip', 'normal'], normal):
        out = tmp_path / left_out
        assert prepare(tmp_path / 'raw', out, '--source', 'BUSI', *options).code == 0
        assert Prepared(out).reasons('BUSI') == {left_out: 'other'}

def test_files_of_a_kind_that_is_not_read_are_counted(photos):
    for name in 'x.mhd', 'x.raw':
        files.write(photos.skin / name, 'ObjectType = Image\nNDims = 2\n')
    assert prepare(photos.raw, photos.out).code == 0
    assert Prepared(photos.out).reasons('skin') == {'x.mhd': 'other', 'x.raw': 'other'}

def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path):
    folder = tmp_path / 'raw/MR/odd'
    volume = files.texture(1, 40, 40)[..., None].repeat(3, 2).astype(np.int16)
    files.nifti(folder / 'a.nii.gz', volume, spacing=(1, 1, 5))
    files.nifti(folder / 'complex.nii.gz', np.ones((40, 40, 3), np.complex64))
    files.save(folder / 'none.npy', np.ones((0, 40, 40), np.uint8))
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    found = Prepared(tmp_path / 'out')
    assert found.meta('odd')['count'] == 3
    assert found.reasons('odd') == {'complex.nii.gz': 'corrupt', 'none.npy': 'corrupt'}

def test_the_rows_of_dropped_csv_say_which_image_of_a_file_and_why(tmp_path):
    volume = np.stack([files.texture(1, 40, 40), np.zeros((40, 40))]).astype(np.int16)
    files.save(tmp_path / 'raw/MR/a/x.npy', volume)
    files.save(tmp_path / 'raw/MR/a/y.png', files.texture(1, 3, 5))
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    assert Prepared(tmp_path / 'out').dropped('a') == [
        dict(path='x.npy', slice='1', reason='blank', detail='40 x 40 px'),
        dict(path='y.png', slice='0', reason='small', detail='5 x 3 px')]

# --- where sources lie, and where they go --------------------------------------------------------

def test_two_folders_of_one_name_are_not_mixed_up(tmp_path):
    for folder in 'ACDC', 'MR/ACDC':
        volume = files.texture(0)[..., None].astype(np.int16)
        files.nifti(tmp_path / 'raw' / folder / 'training/a_frame01.nii.gz', volume)
    runs.ends(prepare(tmp_path / 'raw', tmp_path / 'out'), ['raw/ACDC', 'MR/ACDC', 'name'])
    assert not (tmp_path / 'out').exists()

def test_other_folders_in_out_are_left_alone(photos):
    (photos.out / 'other.part').mkdir(parents=True)     # of another process, or not ours at all
    assert prepare(photos.raw, photos.out).code == 0
    assert sorted(path.name for path in photos.out.iterdir()) == ['other.part', 'skin']

def test_the_current_folder_may_be_out(photos):
    result = runs.program('prepare_medverse', '--raw', 'raw', '--out', '.', cwd=photos.out.parent)
    assert result.code == 0
    assert (photos.out.parent / 'skin/meta.json').exists()
    assert not photos.out.exists()

# --- what cannot be meant ------------------------------------------------------------------------

@pytest.mark.parametrize('options, named', [
    (['--size', '0'], ['--size']),
    (['--workers', '0'], ['--workers', '1']),
    (['--task', 'mine', '--level', '3'], ['--level', '2']),
    (['--images', '*.png'], ['*.png', 'regular expression']),
    (['--source', 'hair'], ['hair', 'raw']),
    (['--task', 'mine', '--modality', 'cat'], ['--modality', 'cat', 'CT']),
    (['--task', 'mine', '--patient', '['], ['[', 'regular expression']),
    (['--task', 'mine', '--split', '0.5', '0.5'], ['--split', '3 arguments']),
    (['--task', 'mine', '--split', '0.5', '0.2', '0.3'], ['--split', 'shares'])])
def test_an_option_that_cannot_be_meant_is_named(photos, options, named):
    runs.ends(prepare(photos.raw, photos.out, *options), named)
    assert not photos.out.exists()

def test_a_mistyped_option_is_named_in_one_line(photos):
    result = prepare(photos.raw, photos.out, '--stepz', '3')
    assert result.code == 2
    assert len(said(result).splitlines()) == 1 and '--stepz' in said(result)

def test_a_raw_that_is_not_there_is_named(tmp_path):
    runs.ends(prepare(tmp_path / 'none', tmp_path / 'out'), [tmp_path / 'none', '--raw'])

def test_a_raw_without_a_known_modality_shows_how_it_must_look(tmp_path):
    (tmp_path / 'raw/Xrays/source').mkdir(parents=True)
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    runs.ends(result, [tmp_path / 'raw', 'RAW/CT/'])
    assert 'Xrays' in result.err

def test_a_raw_that_is_one_folder_too_deep_is_told_so(tmp_path):
    files.save(tmp_path / 'raw/CT/a/0.png', files.texture(0))
    runs.ends(prepare(tmp_path / 'raw/CT', tmp_path / 'out'), [tmp_path / 'raw/CT', 'deep'])

def test_a_loose_file_beside_the_sources_is_told(photos):
    files.write(photos.skin.parent / 'loose.png')
    result = prepare(photos.raw, photos.out)
    assert result.code == 0 and 'loose.png' in result.err

def test_an_out_that_lies_in_a_file_is_named(photos):
    files.write(photos.out, 'in the way')
    for out in photos.out, photos.out / 'medverse':
        sentence = runs.ends(prepare(photos.raw, out), [out])
        assert 'full' not in sentence and 'space' not in sentence

def test_a_source_without_an_image_is_left_out_by_name(photos):
    files.write(photos.raw / 'CT/empty-one/readme.xyz', 'text')
    result = prepare(photos.raw, photos.out)
    runs.ends(result, ['empty-one'])
    assert 'CT/empty-one: no image' in result.out
    assert 'sources; what each left out' not in result.out
    assert Prepared(photos.out).names == ['skin']

def test_a_finished_source_without_its_meta_json_is_named(photos):
    assert prepare(photos.raw, photos.out).code == 0
    (photos.out / 'skin/meta.json').unlink()
    runs.ends(prepare(photos.raw, photos.out), ['skin/meta.json'])

@pytest.mark.parametrize('name', ['x_Ray', 'xray', 'X-RAY', 'X Ray'])
def test_the_folder_of_a_modality_may_be_spelt_in_any_way(tmp_path, name):
    files.save(tmp_path / 'raw' / name / 'film/0.png', files.texture(0))
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    assert Prepared(tmp_path / 'out').meta('film')['modality'] == 'X-ray'

@pytest.mark.parametrize('name, modality', [
    ('Xray', 'X-ray'), ('x-ray', 'X-ray'), ('mr', 'MR'), ('ENDOSCOPE', 'Endoscope'),
    ('suv', 'SUV')])
def test_the_modality_of_a_task_may_be_spelt_in_any_way(tmp_path, name, modality):
    for number in range(2):
        files.save(tmp_path / f'raw/images/{number}.png', files.texture(number))
        files.save(tmp_path / f'raw/masks/{number}.png', files.blob())
    result = prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'mini', '--modality', name)
    assert result.code == 0
    assert prepared.task(tmp_path / 'out').meta['modality'] == modality

# --- the program as a whole ----------------------------------------------------------------------

def test_the_preparation_does_not_import_torch():
    code = 'import sys, prepare_medverse; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=runs.ROOT).returncode == 0

@pytest.mark.skipif(not REAL.is_dir(), reason='no real images beside the repository')
def test_real_images_are_upright_and_their_duplicate_is_found(tmp_path):
    """In the last slice of this abdomen the liver, large and darker than fat, is on the left of the
    picture: on the patient's right, as radiologists look at it."""
    for source in 'MR/totalsegmentator-tests', 'X-ray/figure1-covid-chestxray':
        (tmp_path / 'raw' / source).parent.mkdir(parents=True)
        (tmp_path / 'raw' / source).symlink_to(REAL / source)
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    found = Prepared(tmp_path / 'out')
    assert found.reasons('figure1-covid-chestxray') == {'COVID-00037.jpg': 'duplicate'}
    abdomen = found.images('totalsegmentator-tests')
    assert abdomen.shape == (20, SIZE, SIZE, 1)
    assert abdomen[-1, 16:40, 4:28].mean() < abdomen[-1, 16:40, 36:60].mean()
