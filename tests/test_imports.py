"""What imports what: a training does not need the preparation, which needs nothing of ours."""
import subprocess
import sys

import pytest

from tests.support import files, runs

OURS = {'model', 'unetr', 'data', 'pretrain', 'finetune', 'tests'}

def imported(*modules):
    """The names of all modules that are there in a new Python when it has imported these."""
    code = f'import sys, {", ".join(modules)}; print(*sys.modules)'
    command = [sys.executable, '-c', code]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())

@pytest.mark.slow
def test_a_training_does_not_import_the_preparation():
    """Nor what it alone needs, nor the programs."""
    found = imported('pretrain', 'finetune')
    assert {'pretrain', 'finetune', 'model', 'unetr', 'data'} <= found
    assert not {'prepare_medverse', 'nibabel', 'PIL', 'tests.lab'} & found

def test_the_preparation_imports_nothing_of_ours():
    """Nor torch, so that its workers start quickly and need little memory."""
    found = imported('prepare_medverse')
    assert 'prepare_medverse' in found
    assert not (OURS | {'torch'}) & found

@pytest.mark.slow
def test_a_folder_tests_where_the_user_works_is_not_ours(tmp_path, monkeypatch, with_pictures):
    """The program that draws is the project's, although Python looks into that folder first."""
    for name in ('__init__', 'lab/__init__', 'lab/__main__', 'lab/pictures'):
        files.write(tmp_path / 'tests' / f'{name}.py', 'raise SystemExit(0)')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:        # as ours does of a folder without a run
        runs.draw_pictures(tmp_path / 'none')
    runs.ends(error, naming='pictures')
