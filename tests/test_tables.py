"""Classes of pictures from tables as people write them."""
import re

import pytest

from tests.support import files
from tests.support.folders import refused, task, write_animals

EIGHT = ['cat', 'dog'] * 4      # classes of the pictures of most tests here

def write_table(folder, rows, pictures, head='file,kind', encoding='utf-8'):
    """The table raw/labels.csv, and pictures beside it."""
    for number, path in enumerate(pictures):
        files.save(folder / 'raw' / path, files.noise(number))
    files.write(folder / 'raw/labels.csv', '\n'.join([head, *rows]).encode(encoding))

def classes_of(task):
    """{path of a picture: name of its class}."""
    return {path: task.classes[label] for path, label in task.answer.items()}

def by_table(folder, *columns):
    """What the table says: {path of a picture: name of its class}."""
    return classes_of(task(folder, '--labels', 'labels.csv', *columns))

# --- rows that mean a picture --------------------------------------------------------------------

IN_SITES = {f'x/siteA/00{number}.png': kind for number, kind in enumerate(EIGHT)}
IN_FOLDER = {f'img/{number}.png': kind for number, kind in enumerate(EIGHT)}
WITH_POINTS = {f'p{number // 2}.v{number % 2}.png': kind for number, kind in enumerate(EIGHT)}
WITH_POINTS |= {'1.3.6.4.png': 'cat', '1.3.6.5.png': 'dog'}
ROWS = {
    'end of the path': dict(right=IN_SITES, row='{end},{kind}'),
    'end of the path without ending': dict(right=IN_SITES, row='{end_stem},{kind}'),
    'whole path': dict(right=IN_SITES, row='{path},{kind}'),
    'path of Windows': dict(right=IN_SITES, row='{windows},{kind}'),
    'name with points': dict(right=WITH_POINTS, row='{path},{kind}'),
    'name with points without ending': dict(right=WITH_POINTS, row='{stem},{kind}'),
    'blanks': dict(right=IN_FOLDER, row='  {path} , {kind} '),
    'rows without a class or a file': dict(
        right=IN_FOLDER, row='{path},{kind}\nimg/8.png,\nimg/9.png, \n,cat\n')}

@pytest.mark.parametrize('name', ROWS)
def test_a_row_gives_a_class_to_the_picture_that_it_names_and_no_other(tmp_path, name):
    right, row = ROWS[name]['right'], ROWS[name]['row']
    others = ['img/8.png', 'img/9.png']
    if right is IN_SITES:
        others = [path.replace('siteA', 'siteB') for path in right]
    rows = []
    for path, kind in right.items():
        end = '/'.join(path.split('/')[-2:])
        rows.append(row.format(
            path=path, stem=path[:-len('.png')], end=end, end_stem=end[:-len('.png')], kind=kind,
            windows=path.replace('/', '\\')))
    write_table(tmp_path, rows, [*right, *others])
    assert by_table(tmp_path) == right

def test_pictures_of_one_name_in_two_folders_have_classes_of_their_own(tmp_path):
    other = dict(cat='dog', dog='cat')
    right = IN_SITES | {path.replace('siteA', 'siteB'): other[kind]
                        for path, kind in IN_SITES.items()}
    write_table(tmp_path, [f'{path},{kind}' for path, kind in right.items()], right)
    assert by_table(tmp_path) == right

def test_a_file_may_have_several_equal_rows(tmp_path):
    rows = [f'{path},{kind}' for path, kind in IN_FOLDER.items()]
    write_table(tmp_path, [*rows, rows[0], rows[3]], IN_FOLDER)
    assert by_table(tmp_path) == IN_FOLDER

def test_a_table_and_class_folders_give_the_same_task(tmp_path):
    names = '0123456789'
    write_animals(tmp_path / 'by folder', names=names)
    write_animals(tmp_path / 'by table', names=names)
    rows = [f'{kind}/{name},{kind},7' for kind in ('dog', 'cat') for name in names]
    files.write(tmp_path / 'by table/raw/labels.csv', '\n'.join(['file,kind,age', *rows]))
    by_folder = task(tmp_path / 'by folder')
    by_row = task(tmp_path / 'by table', '--labels', 'labels.csv')
    assert by_row.meta == by_folder.meta
    assert classes_of(by_row) == classes_of(by_folder)
    assert re.search('columns file, kind; others are not read', by_row.said)

# --- tables as programs write them ---------------------------------------------------------------

NOTES = ['a\u2028b', 'a\x0bb', 'a\x85b', '"a\nb"', '"a,b"']

@pytest.mark.parametrize('note', NOTES, ids=ascii)
def test_what_is_no_end_of_a_line_does_not_end_a_row(tmp_path, note):
    rows = [f'{path},{note},{kind}' for path, kind in IN_FOLDER.items()]
    write_table(tmp_path, rows, IN_FOLDER, 'file,note,kind')
    assert by_table(tmp_path, 'file', 'kind') == IN_FOLDER

def test_excel_may_have_written_a_table_with_semicolons(tmp_path):
    right = {path: 'Ödem' if kind == 'cat' else 'normal' for path, kind in IN_FOLDER.items()}
    rows = [f'{path};{kind}' for path, kind in right.items()]
    write_table(tmp_path, rows, right, 'Bild;Art', 'utf-8-sig')
    assert by_table(tmp_path) == right

@pytest.mark.parametrize('encoding', ['cp1252', 'utf-16'])
def test_a_table_that_is_not_in_utf_8_is_refused(tmp_path, encoding):
    """As Excel may write it; names of classes would lose their letters."""
    right = {path: 'Ödem' if kind == 'cat' else 'normal' for path, kind in IN_FOLDER.items()}
    rows = [f'{path};{kind}' for path, kind in right.items()]
    write_table(tmp_path, rows, right, 'Bild;Art', encoding)
    refused(tmp_path, '--labels', 'labels.csv', naming=['labels.csv', 'UTF-8'])

def test_the_columns_may_be_named(tmp_path):
    rows = [f'7,{kind},{path}' for path, kind in IN_FOLDER.items()]
    write_table(tmp_path, rows, IN_FOLDER, 'age,kind,file')
    assert by_table(tmp_path, 'file', 'kind') == IN_FOLDER

def test_a_third_column_is_the_patient_whom_no_split_shares(tmp_path):
    rows = [f'{path},{kind},{number // 4}{kind}'
            for number, (path, kind) in enumerate(IN_FOLDER.items())]
    write_table(tmp_path, rows, IN_FOLDER, 'file,kind,person')
    where = task(tmp_path, '--labels', 'labels.csv', 'file', 'kind', 'person').where
    for first in 0, 1, 4, 5:        # two pictures further is the same person again
        assert where[f'img/{first}.png'] == where[f'img/{first + 2}.png']
    assert where['img/0.png'] != where['img/4.png']

def test_pictures_without_a_row_are_left_out_with_a_warning(tmp_path):
    rows = [f'{path},{kind}' for path, kind in IN_FOLDER.items()]
    write_table(tmp_path, [*rows[1:], '', ''], IN_FOLDER)
    found = task(tmp_path, '--labels', 'labels.csv')
    assert 'img/0.png' not in found.where
    assert re.search('images .*: 8 = 7 used . 1 left out  img/0.png', found.said)

def test_rows_that_name_no_picture_below_raw_stop_unless_allowed(tmp_path):
    others = ['img/8.png', 'img/9.png']
    rows = [f'{path},{kind}' for path, kind in IN_FOLDER.items()]
    rows += ['/etc/8.png,cat', '../../9.png,dog']
    write_table(tmp_path, rows, [*IN_FOLDER, *others])
    refused(tmp_path, '--labels', 'labels.csv', naming=['2 of 10', '/etc/8.png', '--partial'])
    assert by_table(tmp_path, '--partial') == IN_FOLDER

# --- tables that cannot be used ------------------------------------------------------------------

def test_a_row_that_names_two_files_is_refused(tmp_path):
    pictures = [*IN_FOLDER, 'siteA/000.png', 'siteB/000.png']
    rows = [f'{path},{kind}' for path, kind in IN_FOLDER.items()]
    write_table(tmp_path, ['000,cat', *rows], pictures)
    refused(tmp_path, '--labels', 'labels.csv',
            naming=['labels.csv', '000 ', 'siteA/000.png', 'siteB/000.png'])

def test_two_classes_of_one_picture_are_refused(tmp_path):
    rows = [f'{path},{kind}' for path, kind in IN_FOLDER.items()]
    write_table(tmp_path, [*rows, 'img/0.png,dog'], IN_FOLDER)
    refused(tmp_path, '--labels', 'labels.csv',
            naming=['labels.csv, line 10', 'img/0.png', 'another answer'])

def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    write_table(tmp_path, ['img/0.png,cat'], IN_FOLDER)
    refused(tmp_path, '--labels', 'labels.csv', 'file', 'breed',
            naming=['labels.csv', "'kind'", 'no breed'])

@pytest.mark.parametrize('table, told', [
    ('file\n0.png\n1.png\n', r'columns \[.file.\], no'),
    ('file,kind\nx.png,cat\ny.png,dog\n', r'rows of labels.csv: 2 of 2 are left over \(x.png'),
    ('', 'column')], ids=['one column', 'nobody', 'empty'])
def test_a_table_without_a_class_for_any_picture_is_refused(tmp_path, table, told):
    write_animals(tmp_path)
    files.write(tmp_path / 'raw/labels.csv', table)
    sentence = refused(tmp_path, '--labels', 'labels.csv', '--patient', r'(\d)', naming=[])
    assert re.search(told, sentence)

def test_several_tables_of_one_name_are_named(tmp_path):
    rows = [f'{path},{kind}' for path, kind in IN_FOLDER.items()]
    write_table(tmp_path, rows, IN_FOLDER)
    files.write(tmp_path / 'raw/test/labels.csv', (tmp_path / 'raw/labels.csv').read_bytes())
    refused(tmp_path, '--labels', 'labels.csv', naming=['raw/labels.csv', 'raw/test/labels.csv'])
    assert classes_of(task(tmp_path, '--labels', 'test/labels.csv')) == IN_FOLDER
    found = task(tmp_path, '--labels', './labels.csv', out='top')
    assert classes_of(found) == IN_FOLDER

def test_a_table_that_is_not_there_is_named(tmp_path):
    write_animals(tmp_path)
    refused(tmp_path, '--labels', 'none.csv', naming=['none.csv'])
