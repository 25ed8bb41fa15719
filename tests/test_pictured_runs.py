"""The program that draws all pictures of a run: which ones, of which run, at which moment, and what
it says where it cannot. What they show in detail is in test_pictures.py."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
from model import MAE, read_checkpoint
from tests.support import naive, runs
from tests.support.runs import ends
from tests.support.pictures import load, tiles_of

OF_PRETRAINING = {'curves.png', 'recon.png', 'experts.png', 'attention.png', 'layout.png'}

def drawn(folder):
    """The names of the pictures in a folder."""
    return {path.name for path in folder.glob('*.png')}

def copy(run, folder, *names):
    """A folder with these files of a run, or with all but its pictures."""
    names = names or [path.name for path in run.iterdir() if path.suffix != '.png']
    folder.mkdir(parents=True)
    for name in names:
        if (run / name).is_file():
            shutil.copy(run / name, folder / name)
    return folder

# --- All pictures of a pretraining ----------------------------------------------------------------

@pytest.fixture(scope='module')
def pictured(sources, tmp_path_factory, skipped_pictures):
    """The folder of a finished run with its pictures. WORLD_SIZE is torchrun's, and no affair of
    the program that draws."""
    out = tmp_path_factory.mktemp('pictured')
    assert runs.pretraining(sources.folder, out, steps=2, val_share=0.5).code == 0
    skipped_pictures.wanted = True
    with pytest.MonkeyPatch.context() as under_torchrun:
        under_torchrun.setenv('WORLD_SIZE', '2')
        runs.draw_pictures(out)
    skipped_pictures.wanted = False
    return out

@pytest.mark.slow
@pytest.mark.parametrize('name, rows, side', [
    ('recon', 3, 96), ('attention', 4, 96), ('layout', 6, 96)])
def test_a_picture_has_a_column_for_each_modality(pictured, name, rows, side):
    """Image, seen and guess; an image and three patches like it; six groups of patches."""
    tiles = tiles_of(pictured / f'{name}.png', rows, side, side)
    assert tiles.shape[:2] == (rows, 3)
    for tile in tiles.flatten(0, 1):
        assert tile.flatten(0, 1).std(0).max() > 0.05, 'a tile without content'
    for first in range(3):
        for second in range(first):
            assert not torch.equal(tiles[:, first], tiles[:, second])

@pytest.mark.slow
def test_the_picture_of_the_experts_is_the_darker_the_larger_their_weight(pictured, sources):
    """A row for each modality, a tile for each layer, a strip for each expert."""
    state, config, _ = read_checkpoint(pictured / 'ckpt.pt')
    network, shards = MAE(config), data.Shards(sources.folder, val_share=0.5)
    network.load_state_dict(state)
    noise = torch.rand(len(shards.val), 16, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(3, 2, 4)
    for image, own_noise in zip(shards.val, noise):
        pixels = data.normalize(shards.gather(np.array([image])) / 255)
        with torch.no_grad():
            routing = network(pixels, 0.0, own_noise[None])[1]
        weights[shards.image_modality[image]] += naive.Decisions(*routing).weights[:, 0]
    tiles = tiles_of(pictured / 'experts.png', 3, 24, 160, heads=4)
    assert tiles.shape[:2] == (3, 2)
    strips = tiles[:, :, 12, 20::40].mean(3)
    expected = 0.94 * (1 - weights / weights.sum(2, keepdim=True))
    torch.testing.assert_close(strips, expected, atol=0.03, rtol=0)

@pytest.mark.slow
def test_curves_have_five_panels_in_two_columns(pictured):
    width, height = runs.module('pictures').PANEL
    assert Image.open(pictured / 'curves.png').size == (2 * width, 3 * height)

@pytest.mark.slow
def test_a_program_of_pictures_that_fails_is_named(tmp_path, with_pictures):
    with pytest.raises(SystemExit) as error:
        runs.draw_pictures(tmp_path / 'none')
    ends(error, naming='pictures')

# --- Which run, and when --------------------------------------------------------------------------

def test_a_validation_draws_nothing(finished):
    """It computes numbers; the program draws."""
    assert not drawn(finished)

def test_a_training_says_at_its_start_how_to_draw_its_pictures(training, tmp_path, at_batch):
    """Before the first step, so that one can look while it goes on."""
    def fail(images):
        raise RuntimeError

    at_batch(0, fail)
    result = training.run(tmp_path / 'out')
    assert f'python -m tests.lab.pictures {tmp_path / "out"}' in result.out

def test_pictures_are_drawn_of_a_finished_pretraining(tmp_path):
    for number, modality in enumerate(('CT', 'Photo')):
        folder = tmp_path / 'data' / modality
        runs.write_source(folder, modality, count=20 + number, size=64)
    options = dict(size=64, val_share=0.2, depth=2)
    assert runs.pretraining(tmp_path / 'data', tmp_path / 'out', **options).code == 0
    result = runs.program('pictures', tmp_path / 'out')
    assert result.code == 0, result.err
    for name in ('curves.png', 'attention.png', 'layout.png'):
        picture = Image.open(tmp_path / 'out' / name).convert('RGB')
        assert len(picture.getcolors(10 ** 6)) > 3, name
    line, = [line for line in result.out.splitlines() if 'between modalities' in line]
    shares = line.rpartition(':')[2].split()
    assert len(shares) == 2 and all(0 <= float(share) <= 1 for share in shares)


def test_before_the_first_checkpoint_there_are_the_curves_alone(finished, tmp_path):
    """Of a run that is in the middle of a line of its log."""
    out = copy(finished, tmp_path / 'out', 'config.json', 'log.jsonl')
    with open(out / 'log.jsonl', 'a') as log:
        log.write('{"step": 6, "lo')
    result = runs.program('pictures', out)
    assert result.code == 0, result.err
    assert drawn(out) == {'curves.png'}
    assert 'ckpt.pt' in result.out

def test_a_run_without_experts_has_no_picture_of_them(sources, tmp_path):
    out = tmp_path / 'out'
    assert runs.pretraining(sources.folder, out, experts=0, steps=1, val_share=0.5).code == 0
    assert runs.program('pictures', out).code == 0
    assert drawn(out) == OF_PRETRAINING - {'experts.png'}

def test_a_segmentation_has_a_picture_of_its_cases(tuned, labelled, tmp_path):
    out = copy(tuned / 'find', tmp_path / 'out')
    result = runs.program('pictures', out)
    assert result.code == 0, result.err
    assert drawn(out) == {'cases.png'}
    assert load(out / 'cases.png').shape[0] > 3 * 256         # three tiles in a column

def test_a_classification_has_none_and_says_so(tuned, tmp_path):
    out = copy(tuned / 'tell', tmp_path / 'out')
    result = runs.program('pictures', out)
    assert result.code == 0 and 'classification' in result.out
    assert not drawn(out)

def test_a_segmentation_in_its_first_epoch_is_told_to_wait(tuned, tmp_path):
    out = copy(tuned / 'find', tmp_path / 'out', 'config.json', 'log.jsonl')
    ends(runs.program('pictures', out), naming=[out, 'best.pt'])

def test_a_folder_without_a_run_does_not_keep_others_from_their_pictures(finished, tmp_path):
    """It is named, and the program fails."""
    out = copy(finished, tmp_path / 'out', 'config.json', 'log.jsonl')
    (tmp_path / 'empty').mkdir()
    result = runs.program('pictures', tmp_path / 'empty', tmp_path / 'none', out)
    assert result.code == 1
    assert [line.split(': ')[0] for line in result.err.splitlines()] == [
        str(tmp_path / 'empty'), str(tmp_path / 'none')]
    assert drawn(out) == {'curves.png'}

# --- What goes wrong ------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['curves.png', 'recon.png'])
def test_a_full_disk_in_a_picture_ends_in_a_sentence(finished, tmp_path, full_disk, name):
    """Which a training repeats: its pictures are the last that it does."""
    out = copy(finished, tmp_path / 'out')
    full_disk(f'*/{name}')
    ends(runs.program('pictures', out), naming='No space left')

@pytest.mark.slow
def test_what_a_training_found_is_safe_where_its_pictures_fail(
        sources, finished, tmp_path, with_pictures):
    """It says that they failed, in a sentence; its last checkpoint is there."""
    (tmp_path / 'curves.png').mkdir()
    result = runs.pretraining(sources.folder, tmp_path, val_every=2)
    ends(result, naming='pictures')
    assert runs.equal(runs.weights(tmp_path / 'ckpt.pt'), runs.weights(finished / 'ckpt.pt'))
