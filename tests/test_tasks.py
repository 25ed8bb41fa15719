"""prepare_medverse.py --task: miniature labelled folders in every layout, against what went in."""
import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_prepare import REAL, ROOT, call, save_nifti, texture

import data
import prepare_medverse as prep

SIZE = 64

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)

def blob(seed, side=96):
    """A mask with an ellipse of 1 on 0, uint8."""
    x, y = np.random.default_rng(seed).integers(20, side - 40, 2).tolist()
    mask = Image.new('L', (side, side))
    ImageDraw.Draw(mask).ellipse((x, y, x + 30, y + 20), 1)
    return np.asarray(mask)

def prepared(raw, out, *options):
    """Prepare the task; its data.Task and the names of the files in each split."""
    code, printed = call(raw, out, '--task', 'mini', *options)
    assert code == 0, printed
    return data.Task(out), json.loads((out / 'split.json').read_text())

def failed(raw, out, *options):
    code, printed = call(raw, out, '--task', 'mini', *options)
    assert code == 1 and not out.exists() and not list(out.parent.glob('*.part')), printed
    return printed

def nearest(mask):
    """Another nearest-neighbour reduction: the pixel at the centre of each cell."""
    places = ((np.arange(SIZE) + 0.5) * len(mask) / SIZE).astype(int)
    return mask[np.ix_(places, places)]

def test_pairs_in_given_splits(tmp_path):
    for split, n in (('train', 3), ('val', 1), ('test', 2)):
        for i in range(n):
            save(tmp_path / f'raw/{split}/images/{i}.png', texture(i, channels=3))
            save(tmp_path / f'raw/{split}/masks/{i}.png', np.where(blob(i) > 0, 1, 255 * (i == 0)).astype(np.uint8))
    task, split = prepared(tmp_path / 'raw', tmp_path / 'out', '--classes', 'background', 'blob', '--modality', 'Photo')
    assert task.meta == dict(kind='segmentation', classes=['background', 'blob'], modality='Photo', size=SIZE,
                             counts=dict(train=3, val=1, test=2))
    assert split['test'] == ['test/images/0.png', 'test/images/1.png']
    assert {name: array.shape for name, array in task.images.items()} == {
        name: (n, SIZE, SIZE, 3) for name, n in (('train', 3), ('val', 1), ('test', 2))}
    for i in range(3):
        assert np.array_equal(task.images['train'][i], prep.resize(texture(i, channels=3), SIZE))
        expected = nearest(np.where(blob(i) > 0, 1, 255 * (i == 0)))       # 255 is ignored, and stays
        assert np.array_equal(task.answers['train'][i], expected) and task.answers['train'].dtype == np.uint8

@pytest.mark.parametrize('n', [3, 11, 30])
def test_split_by_patient(tmp_path, n):
    for i in range(n):
        for eye in 'LR':
            save(tmp_path / f'raw/img{i:02d}{eye}.png', texture(i))
            save(tmp_path / f'raw/img{i:02d}{eye}_truth.png', blob(i) * 200)
    rules = ('--images', r'(.*)\.png', '--masks', '(.*)_truth', '--values', '0', '200', '--patient', r'img\d+')
    task, split = prepared(tmp_path / 'raw', tmp_path / 'out', *rules)
    patients = {part: {re.search(r'img\d+', name)[0] for name in names} for part, names in split.items()}
    test, val = -(-3 * n // 10), 2 * n // 10
    assert {part: len(found) for part, found in patients.items()} == dict(train=n - test - val, val=val, test=test)
    assert len(set.union(*patients.values())) == n and sum(map(len, split.values())) == 2 * n
    assert all(len(answers) == len(split[part]) for part, answers in task.answers.items())
    assert set(np.unique(task.answers['train'])) == {0, 1}
    other, moved = prepared(tmp_path / 'raw', tmp_path / 'other', *rules, '--seed', '1')
    assert n == 3 or moved != split

def test_slices_of_volumes_and_their_masks_agree(tmp_path):
    for i, axes in enumerate(('RAS', 'LPS', 'PIR', 'RAS')):
        grey = np.stack([texture(10 * i + z, 40, 40) for z in range(5)], 2).astype(np.float32) + 40
        grey[..., 0] = 0     # an empty slice is left out, with its mask
        mask = (grey > 150).astype(np.uint8) * 2
        save_nifti(tmp_path / f'raw/p{i}/scan.nii.gz', grey, (1, 1, 3), axes)
        save_nifti(tmp_path / f'raw/p{i}/truth.nii.gz', mask, (1, 1, 3), axes)
    task, _ = prepared(tmp_path / 'raw', tmp_path / 'out', '--images', '(.*)/scan', '--masks', '(.*)/truth', '--values', '0', '2',
                       '--modality', 'MR')
    assert [len(answers) for answers in task.answers.values()] == [10, 0, 10]
    for images, masks in zip(task.images.values(), task.answers.values()):
        assert len(masks) == 0 or masks.any()
        for image, mask in zip(images, masks):       # bright is foreground: image and mask have the same turn and place
            assert not mask.any() or image[mask == 1].min() > image[mask == 0].mean()

def test_outlines_are_filled(tmp_path):
    for i in range(4):
        box = (15 + i, 25, 75 + 5 * i, 70)
        outline, inside = Image.new('L', (96, 96)), Image.new('L', (96, 96))
        ImageDraw.Draw(outline).ellipse(box, outline=255)
        ImageDraw.Draw(inside).ellipse(box, fill=1, outline=1)
        save(tmp_path / f'raw/images/{i}.png', texture(i))
        save(tmp_path / f'raw/masks/{i}.png', np.asarray(outline))
        assert np.array_equal(prep.fill(np.asarray(outline) > 0), np.asarray(inside) > 0)
    task, split = prepared(tmp_path / 'raw', tmp_path / 'out', '--values', '0', '255', '--outline')
    assert all(mask.mean() > 0.15 for mask in task.answers['test'])

def write_classes(folder, layout, kinds=('cat', 'dog'), n=10):
    for kind in kinds:
        for i in range(n):
            save(folder / layout.format(kind=kind, i=i), texture(i + 100 * (kind == 'dog')))

def test_class_folders_and_a_table_give_the_same_task(tmp_path):
    write_classes(tmp_path / 'folders', '{kind}/{i}-{kind}.png')
    write_classes(tmp_path / 'table', 'pictures/{i}-{kind}.png')
    rows = [f'{i}-{kind}.png,{kind},7' for kind in ('dog', 'cat') for i in range(10)]
    (tmp_path / 'table/answers.csv').write_text('\n'.join(['file,kind,age', *rows]))
    first, _ = prepared(tmp_path / 'folders', tmp_path / 'a')
    second, _ = prepared(tmp_path / 'table', tmp_path / 'b', '--labels', 'answers.csv')
    _, printed = call(tmp_path / 'table', tmp_path / 'c', '--task', 'mini', '--labels', 'answers.csv')
    assert 'columns file, kind; others are not read' in printed
    for task in (first, second):
        assert task.classes == ['cat', 'dog'] and task.meta['kind'] == 'classification'
        assert task.meta['counts'] == dict(train=10, val=4, test=6) and task.answers['test'].dtype == np.int64
        for part, images in task.images.items():
            for image, label in zip(images, task.answers[part]):
                mates = [prep.resize(texture(i + 100 * label), SIZE) for i in range(10)]
                assert any(np.array_equal(image, mate) for mate in mates)

def test_class_folders_in_given_splits(tmp_path):
    for part, n in (('train', 3), ('val', 0), ('test', 2)):
        write_classes(tmp_path / 'raw', part + '/{kind}/{i}.png', n=n)
    task, _ = prepared(tmp_path / 'raw', tmp_path / 'out')
    assert {part: list(labels) for part, labels in task.answers.items()} == dict(train=[0, 0, 0, 1, 1, 1], val=[], test=[0, 0, 1, 1])
    write_classes(tmp_path / 'raw', 'valid/{kind}/{i}.png', n=1)
    _, split = prepared(tmp_path / 'raw', tmp_path / 'other')
    assert split['val'] == ['valid/cat/0.png', 'valid/dog/0.png'] and len(split['train']) == 6 and len(split['test']) == 4

def test_bad_folders_end_in_a_sentence(tmp_path):
    def pairs(name, n=4):
        for i in range(n):
            save(tmp_path / name / f'images/{i}.png', texture(i))
            save(tmp_path / name / f'masks/{i}.png', blob(i))
        return tmp_path / name

    out = tmp_path / 'out'
    save(pairs('sizes') / 'masks/1.png', blob(1, 90))
    assert re.search(r'masks/1.png.*96.*90', failed(tmp_path / 'sizes', out))
    save(pairs('values') / 'masks/1.png', blob(1) * 7)
    assert re.search(r'masks/1.png.*values or colours 7,', failed(tmp_path / 'values', out))
    (pairs('corrupt') / 'images/0.png').write_bytes(b'no picture')
    assert 'images/0.png: cannot be used' in failed(tmp_path / 'corrupt', out)
    for part, kinds in (('train', 'cat'), ('test', 'dog')):
        write_classes(tmp_path / 'unseen', part + '/{kind}/{i}.png', kinds.split(), 2)
    assert 'no training image shows dog' in failed(tmp_path / 'unseen', out)
    write_classes(tmp_path / 'halves', 'train/{kind}/{i}.png', n=2)
    assert 'all of the test images' in failed(tmp_path / 'halves', out, '--split', '.', '', '')
    prepared(tmp_path / 'halves', tmp_path / 'drawn')       # a folder alone that is called train is none of three
    assert '8 images, 0 masks' in failed(pairs('rule'), out, '--masks', 'nowhere/(.*)')
    (tmp_path / 'rule/masks').rename(tmp_path / 'rule/truth')
    assert '8 images, 0 masks' in failed(tmp_path / 'rule', out, '--values', '0', '1')      # no classification by these folders
    assert 'must show two classes' in failed(tmp_path / 'rule', out, '--images', 'images/')
    assert str(tmp_path / 'none') in failed(tmp_path / 'none', out)
    pairs('fine')
    prepared(tmp_path / 'fine', out)
    code, printed = call(tmp_path / 'fine', out, '--task', 'mini')
    assert code == 1 and 'delete it' in printed and (out / 'meta.json').exists()

def test_what_is_in_no_pair_is_left_out_with_a_warning(tmp_path):
    for i in range(6):
        save(tmp_path / f'raw/images/{i}.png', texture(i))
        save(tmp_path / f'raw/masks/{i}.png', blob(i))
    (tmp_path / 'raw/masks/2.png').unlink()
    (tmp_path / 'raw/images/5.png').unlink()
    code, printed = call(tmp_path / 'raw', tmp_path / 'out', '--task', 'mini')
    names = [name for part in json.loads((tmp_path / 'out/split.json').read_text()).values() for name in part]
    assert code == 0 and sorted(names) == [f'images/{i}.png' for i in (0, 1, 3, 4)]
    assert re.search('warning.* 2 images.*images/2.png', printed)

def test_masks_for_another_number_of_classes_are_refused(tmp_path):
    for kind in ('images', 'a', 'b'):
        for i in range(4):
            save(tmp_path / f'raw/{kind}/{i}.png', blob(i))
    rules = '--images', 'images/(.*)', '--masks', 'a/(.*)', 'b/(.*)'
    for classes in (), ('--classes', *'01'), ('--classes', *'0123'):
        assert '--classes' in failed(tmp_path / 'raw', tmp_path / 'out', *rules, *classes)

@pytest.mark.parametrize('name, modality, kind', [
    ('vessels', 'Fundus', 'segmentation'), ('organs', 'CT', 'segmentation'), ('lesion', 'Photo', 'classification')])
def test_phantom_tasks_simulate_their_own_modality(tmp_path, name, modality, kind):
    words = ['--raw', tmp_path / 'raw', '--out', tmp_path / name, '--task', f'phantom-{name}', '--count', '80' if name == 'organs' else '16',
             '--size', '32']
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'phantoms.py', *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / 'raw' / 'raw').iterdir()] == [modality]
    task = data.Task(tmp_path / name)
    assert task.meta['kind'] == kind and len(task.classes) == (11 if name == 'organs' else 2)
    assert name != 'lesion' or task.classes == ['melanoma', 'naevus']

def test_a_view_of_slices_is_written_through(tmp_path):
    """What `cut` shows of a volume can be written, and lands where it was read."""
    for axes in ('RAS', 'LPS', 'SRP', 'ALI'):
        image = nib.load(save_nifti(tmp_path / f'{axes}.nii', np.random.default_rng(0).random((5, 6, 7, 2)), (1, 2, 1), axes))
        values, copy = np.asarray(image.dataobj), np.zeros(image.shape)
        prep.cut(copy, image.affine)[:] = prep.cut(values, image.affine)
        assert np.array_equal(copy, values)

@pytest.mark.skipif(not REAL.is_dir(), reason='no real images beside the repository')
def test_real_outlines_and_one_bit_masks(tmp_path):
    tasks = REAL.parent / 'tasks'
    heads, _ = prepared(tasks / 'HC18', tmp_path / 'heads', '--images', r'(.*)\.png', '--masks', '(.*)_Annotation', '--values',
                        '0', '255', '--outline')
    assert heads.meta['counts'] == dict(train=30, val=12, test=18)
    assert all(0.02 < mask.mean() < 0.7 for mask in heads.answers['train'])
    vessels, split = prepared(tasks / 'CHASEDB1', tmp_path / 'vessels', '--images', r'(.*)\.jpg', '--masks', '(.*)_1stHO',
                              '--values', '0', '255', '--patient', r'Image_\d+')
    assert vessels.meta['counts'] == dict(train=14, val=4, test=10)
    assert 0.05 < vessels.answers['test'].mean() < 0.12

def test_masks_of_sixteen_bits_keep_their_numbers(tmp_path):
    for i in range(4):
        save(tmp_path / f'raw/images/{i}.png', texture(i))
        save(tmp_path / f'raw/masks/{i}.png', np.uint16(blob(i)) * 300)
    task, split = prepared(tmp_path / 'raw', tmp_path / 'out', '--values', '0', '300')
    assert np.array_equal(task.answers['train'], [nearest(blob(int(name[7]))) for name in split['train']])

def test_masks_that_show_none_of_a_class_are_told(tmp_path):
    for i in range(4):
        save(tmp_path / f'raw/images/{i}.png', texture(i))
        save(tmp_path / f'raw/masks/{i}.png', blob(i) * 255)     # which is not scored where --values do not name it
    printed = failed(tmp_path / 'raw', tmp_path / 'out')
    assert 'no training image shows foreground' in printed and '255 counts where named' in printed
    code, printed = call(tmp_path / 'raw', tmp_path / 'out', '--task', 'mini', '--values', '0', '255', '7', '--classes', *'abc')
    line = next(line for line in printed.splitlines() if line.startswith('c '))
    assert code == 0 and line.split() == ['c', '0', '0', '0']     # how many images of each split show it
    assert 'image shows' not in call(tmp_path / 'raw', tmp_path / 'other', '--task', 'mini', '--values', '0', '255')[1]

def test_a_palette_gives_numbers_to_its_colours(tmp_path):
    def numbers(i):     # all but the last show black and white alone, which are numbers all the same
        return blob(i) + 2 * blob(i + 4).T * np.uint8(i == 3)

    for i in range(4):
        save(tmp_path / f'raw/images/{i}.png', texture(i))
        mask = Image.fromarray(numbers(i))
        for kind, colours in (('colours', (0, 0, 0, 255, 255, 255, 0, 128, 0, 128, 128, 0)), ('greys', (0,) * 3 + (9,) * 9)):
            mask.putpalette(colours)
            (tmp_path / f'raw/{kind}').mkdir(exist_ok=True)
            mask.save(tmp_path / f'raw/{kind}/{i}.png')
    for kind, values, number in (('colours', '0123', lambda mask: mask), ('greys', '09', lambda mask: mask > 0)):
        task, split = prepared(tmp_path / 'raw', tmp_path / kind, '--images', '(.*)images/(.*)', '--masks', f'(.*){kind}/(.*)', '--values', *values)
        for name, mask in zip(split['train'], task.answers['train']):
            i = int(name[7])
            assert np.array_equal(mask, nearest(number(numbers(i))))

def test_masks_of_fewer_slices_than_the_image_are_refused(tmp_path):
    for i in range(4):
        save_nifti(tmp_path / f'raw/{i}/scan.nii', np.repeat(texture(i)[..., None], 4, 2).astype(np.int16), (1, 1, 3))
        for kind in 'ab':
            save_nifti(tmp_path / f'raw/{i}/{kind}.nii', np.repeat(blob(i)[..., None], 3, 2), (1, 1, 3))
    assert 'their grids differ' in failed(tmp_path / 'raw', tmp_path / 'out', '--images', '(.*)/scan', '--masks', '(.*)/a', '(.*)/b',
                               '--classes', 'none', 'a', 'b')

def test_bad_tables_and_splits_end_in_a_sentence(tmp_path):
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    write_classes(raw, '{kind}/{i}-{kind}.png')
    rows = [f'{i}-{kind}.png,{kind}' for kind in ('dog', 'cat') for i in range(10)]
    (raw / 'answers.csv').write_text('\ufefffile,kind\n' + '\n'.join(rows[1:]) + '\n\n', encoding='utf-8')  # as Excel writes it
    code, printed = call(raw, tmp_path / 'fine', '--task', 'mini', '--labels', 'answers.csv', 'file', 'kind')
    assert code == 0 and re.search(r'\b1 images without', printed)
    (raw / 'semicolons.csv').write_text('file;kind\n' + '\n'.join(rows).replace(',', ';'))
    prepared(raw, tmp_path / 'excel', '--labels', 'semicolons.csv')
    assert 'none.csv' in failed(raw, out, '--labels', 'none.csv')
    assert re.search("'kind'.*no breed", failed(raw, out, '--labels', 'answers.csv', 'file', 'breed'))
    (raw / 'twice.csv').write_text('\n'.join(['file,kind', *rows, '0-dog.png,cat']))
    assert '0-dog.png' in failed(raw, out, '--labels', 'twice.csv')
    (raw / 'train.txt').write_text('0-dog\n0-cat')
    for rules in ('none.txt', 'train.txt', 'train.txt'), ('train.txt',) * 3, ('0.5', '0.2', '0.3'), ('0', '0', '0'):
        assert re.search('none.txt|no rule of --split|three whole', failed(raw, out, '--split', *rules))

def test_a_patient_is_what_the_group_of_the_expression_finds_and_must_be_found(tmp_path):
    for i in range(10):
        for eye in 'LR':
            save(tmp_path / f'raw/images/child{i}_{eye}.png', texture(i))
            save(tmp_path / f'raw/masks/child{i}_{eye}.png', blob(i))
    _, split = prepared(tmp_path / 'raw', tmp_path / 'out', '--patient', 'child([0-9])_[LR]')
    patients = [{re.search(r'\d', name)[0] for name in names} for names in split.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 10
    assert 'is found in no path' in failed(tmp_path / 'raw', tmp_path / 'other', '--patient', 'chld[0-9]')
    assert 'three' in failed(tmp_path / 'raw', tmp_path / 'other', '--split', '70', '30')
