"""Names and links as users have them: any name of a file, folders that link in circles."""
import os

import pytest

from tests.support import files, prepared, runs
from tests.support.prepared import Prepared, prepare

def write_animals(folder):
    """Three pictures of cats and three of dogs."""
    for number in range(6):
        files.save(folder / ('cat', 'dog')[number % 2] / f'{number}.png', files.texture(number))

ODD_NAMES = ['line\nbreak.png', '#[0]* (1).png', os.fsdecode(b'latin\xff.png'), 'Größe.PNG']

@pytest.mark.parametrize('name', ODD_NAMES, ids=ascii)
def test_odd_names_of_files_are_read_and_written(tmp_path, name):
    """A point in a rule is a line break too."""
    folder = tmp_path / 'raw/Photo/a'
    files.save(folder / name, files.texture(7), format='PNG')
    files.save(folder / f'small {name}', files.texture(0)[:4], format='PNG')
    assert prepare(tmp_path / 'raw', tmp_path / 'out', '--images', r'^.+\.png$').code == 0
    found = Prepared(tmp_path / 'out')
    assert len(found.images('a')) == 1
    assert found.reasons('a') == {f'small {name}': 'small'}

@pytest.mark.parametrize('name', ODD_NAMES, ids=ascii)
def test_odd_names_of_files_are_read_and_written_in_a_task(tmp_path, name):
    write_animals(tmp_path / 'raw')
    for kind in 'cat', 'dog':
        files.save(tmp_path / 'raw' / kind / name, files.texture(7), format='PNG')
    assert prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'mini').code == 0
    assert {f'cat/{name}', f'dog/{name}'} <= prepared.task(tmp_path / 'out').where.keys()

def test_linked_folders_are_followed(tmp_path):
    files.save(tmp_path / 'raw/Photo/skin/0.png', files.texture(0))
    files.save(tmp_path / 'disk/1.png', files.texture(1))
    (tmp_path / 'raw/Photo/skin/more').symlink_to(tmp_path / 'disk')
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    assert Prepared(tmp_path / 'out').meta('skin')['count'] == 2

LINKS = [('loop', '.'), ('cat/up', '..'), ('cat/self', '.'), ('again', 'dog')]

@pytest.mark.parametrize('words', [(), ('--task', 'mini')])
@pytest.mark.parametrize('link, target', LINKS)
def test_a_folder_that_can_be_reached_twice_is_refused(tmp_path, link, target, words):
    raw = tmp_path / 'raw/Photo/animals'
    write_animals(raw)
    (raw / link).symlink_to(target)
    result = prepare(raw if words else tmp_path / 'raw', tmp_path / 'out', *words)
    runs.ends(result, [raw, 'links lead to this folder twice'])
    assert not (tmp_path / 'out').exists()
