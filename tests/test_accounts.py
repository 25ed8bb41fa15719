"""The account of a task: of each rule, table and list how much it had, used and left over."""
import re

from tests.support import files, prepared, runs
from tests.support.prepared import prepare

def labelled(folder, count=20, ending='png', odd=None):
    """Pictures 000, 001, ... of two classes and the table answers.csv; `odd` is another ending."""
    rows = ['file,kind']
    for number in range(count):
        name = f'{number:03d}.{odd if odd and number % 2 else ending}'
        files.save(folder / 'raw/pictures' / name, files.texture(number))
        rows.append(f'{name},{"cat" if number < count // 2 else "dog"}')
    files.write(folder / 'raw/answers.csv', '\n'.join(rows))

def pairs(folder, names, layer='masks'):
    for number, name in enumerate(names):
        files.save(folder / f'raw/images/{name}.png', files.texture(number))
        files.save(folder / f'raw/{layer}/{name}.png', files.blob(number))

def task(folder, *words):
    """The Result of a preparation of the task in folder/raw."""
    return prepare(folder / 'raw', folder / 'out', '--task', 'mini', *words)

def account(result):
    """{rule, table or list: (had, used, left)} as it was printed."""
    found = {}
    for line in result.out.splitlines():
        if match := re.match(r'(.*): (\d+) = (\d+) used \+ (\d+) left out', line):
            found[match[1]] = tuple(map(int, match.groups()[1:]))
    return found

# --- tables --------------------------------------------------------------------------------------

def test_images_of_a_table_in_formats_that_are_not_read_stop(tmp_path):
    labelled(tmp_path, odd='webp')
    result = task(tmp_path, '--labels', 'answers.csv')
    runs.ends(result, ['formats of images: 10 of 20', '001.webp', '--partial'])
    assert not (tmp_path / 'out').exists()

def test_partial_goes_on_with_what_has_a_partner(tmp_path):
    labelled(tmp_path, odd='webp')
    result = task(tmp_path, '--labels', 'answers.csv', '--partial')
    assert result.code == 0, result.err
    assert account(result)['rows of answers.csv'] == (20, 10, 10)
    assert len(prepared.task(tmp_path / 'out').where) == 10

def test_images_in_class_folders_in_formats_that_are_not_read_stop(tmp_path):
    for number in range(12):
        ending = 'webp' if number % 2 else 'png'
        folder = tmp_path / 'raw' / ('cat', 'dog')[number // 6]
        files.save(folder / f'{number}.{ending}', files.texture(number))
    runs.ends(task(tmp_path), ['6 of 12', 'cat/1.webp'])

# --- rules and lists -----------------------------------------------------------------------------

def test_names_in_a_list_that_no_image_has_are_named_and_stop(tmp_path):
    pairs(tmp_path, [f'im{number:02d}_A' for number in range(20)])
    names = [f'{"IM" if number % 2 else "im"}{number:02d}_A.png' for number in range(12)]
    files.write(tmp_path / 'raw/test.txt', '\n'.join(names))
    runs.ends(task(tmp_path, '--split', '80', '20', 'test.txt'), ['test.txt: 6 of 12', 'IM01_A'])

def test_a_rule_of_masks_that_takes_no_file_is_named(tmp_path):
    pairs(tmp_path, '0123')
    words = '--masks', '(.*)masks/(.*)', '(.*)splen/(.*)', '--classes', *'abc'
    runs.ends(task(tmp_path, '--images', '(.*)images/(.*)', *words), '(.*)splen/(.*) finds no file')

def test_masks_without_an_image_stop(tmp_path):
    pairs(tmp_path, '0123')
    (tmp_path / 'raw/images/3.png').unlink()
    runs.ends(task(tmp_path), ['1 of 4', 'masks/3.png'])

def test_an_image_without_a_mask_is_counted_and_does_no_harm(tmp_path):
    pairs(tmp_path, '0123')
    (tmp_path / 'raw/masks/3.png').unlink()
    result = task(tmp_path)
    assert result.code == 0, result.err
    assert (4, 3, 1) in account(result).values() and 'images/3.png' in result.out

def test_images_in_which_no_patient_is_found_stop(tmp_path):
    for number in range(12):
        name = f'P{number:02d}_a' if number % 2 else f'p{number:02d}-a'
        folder = tmp_path / 'raw' / ('cat', 'dog')[number // 6]
        files.save(folder / f'{name}.png', files.texture(number))
    runs.ends(task(tmp_path, '--patient', r'P\d+_'), [r'--patient P\d+_: 6 of 12', 'p00-a'])
