"""Fine-tuning: what is trained, on which images, which epoch is chosen, how it is scored, and what
is written. Its stopping and resuming is in test_resume.py, its scores are in test_scores.py."""
import hashlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model import read_checkpoint
from tests.support import files, naive, prepared, runs, tasks

pytestmark = pytest.mark.slow     # whole trainings, and many of them

ALL = range(99)         # batches of a training

def read_task(folder, split, name):
    """One array of a prepared task."""
    return np.load(folder / split / f'{name}.npy')

def chosen(out):
    """The weights that a run chose: best.pt."""
    return runs.weights(out / 'best.pt')

# --- what is written ---------------------------------------------------------------------------

@pytest.mark.parametrize('task', ['find', 'tell'])
def test_results_say_how_they_came_about(tuned, pretrained, task):
    found = runs.results(tuned / task)
    assert found['task'] == task
    assert found['counts'] == tasks.COUNTS
    assert found['seed'] == 0
    assert found['init'] == str(pretrained)
    assert found['sha256'] == hashlib.sha256(pretrained.read_bytes()).hexdigest()
    assert found['config']['experts'] == 3
    assert found['options']['batch'] == 4
    assert found['method'] == f'DEX-E-{pretrained.parent.name}'

@pytest.mark.parametrize('task, epochs', [('find', 12), ('tell', 6)])
def test_the_log_has_a_line_for_each_epoch(tuned, task, epochs):
    """The best of their validation scores is that of the results. Twelve images are three steps."""
    lines = runs.read_log(tuned / task)
    assert [line['step'] for line in lines] == [3 * epoch + 2 for epoch in range(epochs)]
    assert runs.results(tuned / task)['validation'] == max(line['val'] for line in lines)

def test_a_segmentation_is_learnt_and_has_three_dice(tuned):
    scores = runs.results(tuned / 'find')['scores']
    assert set(scores) == {'dice', 'dice_empty_is_one', 'dice_pooled'}
    assert scores['dice']['mean'] > 0.6

def test_a_classification_is_learnt_and_counts_each_test_image(tuned):
    scores = runs.results(tuned / 'tell')['scores']
    assert scores['f1']['mean'] > 0.6
    assert sum(map(sum, scores['confusion'])) == tasks.COUNTS['test']

def test_the_last_line_says_the_headline(labelled, pretrained, tmp_path):
    """Dice of a segmentation, macro-F1 of a classification; the same number as in results.json."""
    for task, name, score in (('find', 'Dice', 'dice'), ('tell', 'macro-F1', 'f1')):
        result = tasks.tune(labelled / task, tmp_path / task, init=pretrained, epochs=1)
        mean = runs.results(tmp_path / task)['scores'][score]['mean']
        assert f'test {name} {mean:.4f}' in result.out.splitlines()[-1]

def test_a_segmentation_ends_with_a_picture_of_its_cases(
        labelled, pretrained, tmp_path, with_pictures):
    tasks.tune(labelled / 'find', tmp_path / 'out', init=pretrained, epochs=1)
    picture = Image.open(tmp_path / 'out' / 'cases.png').convert('RGB')
    assert picture.width > 3 * 256 and picture.height > 3 * 256         # three tiles in three rows
    assert len(picture.getcolors(10 ** 6)) > 20

# --- which epoch is chosen, and how it is scored -----------------------------------------------

def dice_by_hand(logits, masks):
    """The mean Dice of class 1 over images, of logits (n, 2, S, S) and masks (n, S, S)."""
    guesses = logits.argmax(1).flatten(1).tolist()
    truths = masks.reshape(len(masks), -1).tolist()
    return naive.mean(naive.dice(guess, truth, 1) for guess, truth in zip(guesses, truths))

def test_the_best_epoch_by_validation_is_scored_on_the_test_images(labelled, tuned):
    """Its network, applied by hand, has the two scores of results.json. It is not the last one."""
    task, found = labelled / 'find', runs.results(tuned / 'find')
    for split, score in (('val', found['validation']), ('test', found['scores']['dice']['mean'])):
        logits = tasks.apply_by_hand(tuned / 'find', read_task(task, split, 'images'))
        assert score == pytest.approx(dice_by_hand(logits, read_task(task, split, 'masks')))
    assert found['validation'] > runs.read_log(tuned / 'find')[-1]['val']
    assert not runs.equal(chosen(tuned / 'find'), runs.weights(tuned / 'find' / 'ckpt.pt'))

def test_nothing_is_chosen_by_the_test_images(labelled, tuned, pretrained, tmp_path):
    """With other test answers the training and its choice are the same, the score is another."""
    shutil.copytree(labelled / 'tell', tmp_path / 'tell')
    labels = read_task(tmp_path / 'tell', 'test', 'labels')
    np.save(tmp_path / 'tell' / 'test' / 'labels.npy', 1 - labels)
    tasks.tune(tmp_path / 'tell', tmp_path / 'out', init=pretrained, epochs=6)
    assert runs.read_log(tmp_path / 'out') == runs.read_log(tuned / 'tell')
    assert runs.equal(chosen(tmp_path / 'out'), chosen(tuned / 'tell'))
    ours, theirs = runs.results(tmp_path / 'out'), runs.results(tuned / 'tell')
    assert ours['scores']['accuracy'] == 1 - theirs['scores']['accuracy']

def test_without_validation_images_the_last_epoch_counts(labelled, pretrained, tmp_path):
    result = tasks.tune(labelled / 'unchecked', tmp_path / 'out', init=pretrained)
    assert runs.equal(chosen(tmp_path / 'out'), runs.weights(tmp_path / 'out' / 'ckpt.pt'))
    assert runs.results(tmp_path / 'out')['validation'] is None
    assert [line['val'] for line in runs.read_log(tmp_path / 'out')] == [None] * 3
    assert 'validation' not in result.err               # that is, on the progress bar
    other = tasks.tune(labelled / 'tell', tmp_path / 'other', init=pretrained, epochs=1)
    assert 'validation' in other.err

def test_at_another_size_it_is_still_scored_at_the_stored_one(
        labelled, pretrained, tmp_path, at_batch):
    """Stored at 32 pixels, seen at 16: by hand, a pixel seen is the mean of four, and the masks are
    those of 32."""
    task, shapes = labelled / 'find', []
    at_batch(ALL, lambda images: shapes.append(tuple(images.shape)))
    tasks.tune(task, tmp_path / 'out', init=pretrained, size=16, lr=1e-2)
    assert set(shapes) == {(4, 3, 16, 16)}
    found = runs.results(tmp_path / 'out')
    assert found['config']['size'] == 16
    images = torch.tensor(read_task(task, 'test', 'images')).permute(0, 3, 1, 2).float()
    halved = F.avg_pool2d(images, 2).permute(0, 2, 3, 1).numpy()
    logits = tasks.apply_by_hand(tmp_path / 'out', halved)
    logits = F.interpolate(logits, scale_factor=2, mode='bilinear')
    dice = dice_by_hand(logits, read_task(task, 'test', 'masks'))
    assert 0.2 < dice < 1
    assert found['scores']['dice']['mean'] == pytest.approx(dice)

def test_colours_tell_the_classes_of_a_colour_task(tmp_path, pretrained):
    """The squares are as bright as their ground, so whoever averages the colours finds nothing."""
    tasks.write_task(tmp_path / 'task', segments=True, colour=True)
    images = read_task(tmp_path / 'task', 'test', 'images').astype(int)
    masks = read_task(tmp_path / 'task', 'test', 'masks')
    grey = images.mean(3)
    assert abs(grey[masks == 1].mean() - grey[masks == 0].mean()) < 3
    tasks.tune(tmp_path / 'task', tmp_path / 'out', init=pretrained, lr=1e-2)
    assert runs.results(tmp_path / 'out')['scores']['dice']['mean'] > 0.6

# --- on which images it is trained -------------------------------------------------------------

def images_seen(at_batch):
    """A list to which each training image of `write_hues` is added when the network sees it."""
    seen = []
    at_batch(ALL, lambda images: seen.extend(tasks.hues(images).tolist()))
    return seen

def test_each_epoch_shows_each_training_image_once_in_another_order(tmp_path, pretrained, at_batch):
    tasks.write_hues(tmp_path / 'hues')
    seen = images_seen(at_batch)
    tasks.tune(tmp_path / 'hues', tmp_path / 'out', init=pretrained, batch=5)
    epochs = [seen[first:first + tasks.HUES] for first in range(0, len(seen), tasks.HUES)]
    assert len(epochs) == 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(tasks.HUES))
    assert len(set(map(tuple, epochs))) == 3

def test_a_fraction_is_the_same_images_for_every_method(tmp_path, pretrained, at_batch):
    """Five of twelve at 0.4; with another seed they are others."""
    tasks.write_hues(tmp_path / 'hues')
    seen = images_seen(at_batch)
    subsets = []
    runs_to_compare = dict(experts={}, director=dict(adapt='director'), other=dict(seed=1))
    for name, options in runs_to_compare.items():
        seen.clear()
        tasks.tune(tmp_path / 'hues', tmp_path / name, init=pretrained, fraction=0.4, **options)
        subset = sorted(set(seen))
        assert len(subset) == 5
        assert sorted(seen) == sorted(3 * subset)           # in each of the three epochs
        assert runs.results(tmp_path / name)['counts']['train'] == 5
        subsets.append(subset)
    assert subsets[0] == subsets[1] != subsets[2]

@pytest.mark.parametrize('segments, classes, sided, flipped', [
    (True, ('ground', 'square'), False, True),
    (True, ('ground', 'left', 'right'), True, False),
    (False, ('dark', 'bright'), False, True),
    (False, ('dark', 'bright', 'grey'), False, True),
    (True, ('ground', 'liver', 'spleen'), False, True),
    (True, ('ground', 'square'), True, False),
    (False, ('dark', 'bright'), True, False)])
def test_only_a_task_whose_classes_have_sides_is_never_mirrored(
        segments, classes, sided, flipped, tmp_path, pretrained, at_batch):
    """A left organ would become a right one."""
    task, left_is_bright = tmp_path / 'task', []
    tasks.write_task(task, segments, classes=classes)
    meta = json.loads((task / 'meta.json').read_text())
    (task / 'meta.json').write_text(json.dumps(dict(meta, sided=sided)))
    images = np.zeros((12, tasks.SIDE, tasks.SIDE, 1), np.uint8)
    images[:, :, :tasks.SIDE // 2] = 200
    np.save(task / 'train' / 'images.npy', images)

    def look(views):
        left, right = views.chunk(2, 3)
        left_is_bright.extend((left.mean((1, 2, 3)) > right.mean((1, 2, 3))).tolist())

    at_batch(ALL, look)
    tasks.tune(task, tmp_path / 'out', init=pretrained, epochs=1)
    assert len(left_is_bright) == 12
    assert any(left_is_bright)
    assert all(left_is_bright) == (not flipped)

# --- what is trained ---------------------------------------------------------------------------

def what_moves(task, folder, **options):
    """The names of all parameters of a run, and of those that it changes: they differ from a run
    whose learning rate is 0."""
    for name, rate in dict(moving=1e-3, still=0).items():
        tasks.tune(task, folder / name, epochs=1, lr=rate, **options)
    before = runs.weights(folder / 'still' / 'ckpt.pt')
    after = runs.weights(folder / 'moving' / 'ckpt.pt')
    buffers = 'pos_embed', 'usage'
    names = {name for name in after if not name.endswith(buffers)}
    moved = {name for name in names if not torch.equal(before[name], after[name])}
    counted = sum(after[name].numel() for name in moved)
    assert runs.results(folder / 'moving')['parameters'] == counted
    return names, moved

def test_with_experts_all_is_trained_but_the_directors(labelled, pretrained, tmp_path):
    names, moved = what_moves(labelled / 'tell', tmp_path, init=pretrained)
    directors = {name for name in names if '.director.' in name}
    assert len(directors) == 4 * 4                      # weights and biases of two layers a block
    assert moved == names - directors

def test_of_a_plain_vit_all_is_trained(labelled, pretrained, tmp_path):
    names, moved = what_moves(labelled / 'tell', tmp_path, init=pretrained, adapt='director')
    assert moved == names

@pytest.mark.parametrize('task', ['find', 'tell'])
@pytest.mark.parametrize('blocks', [0, 1])
def test_tune_blocks_trains_the_last_blocks_and_the_head(
        labelled, pretrained, tmp_path, task, blocks):
    """With 0 the head alone; of a segmentation the head is the whole decoder."""
    options = dict(init=pretrained, adapt='director', tune_blocks=blocks)
    names, moved = what_moves(labelled / task, tmp_path, **options)
    head = {name for name in names if not name.startswith('vit.')}
    last = {name for name in names if name.startswith('vit.blocks.3.')}
    assert head and len(last) == 12
    assert moved == (head | last if blocks else head)

@pytest.mark.parametrize('adapt', ['experts', 'director'])
def test_the_encoder_starts_as_it_was_pretrained(labelled, pretrained, tmp_path, adapt):
    """As experts it is the whole encoder; as a plain ViT each MLP is a director."""
    tasks.tune(labelled / 'tell', tmp_path, init=pretrained, adapt=adapt, lr=0, epochs=1)
    before, after = read_checkpoint(pretrained)[0], runs.weights(tmp_path / 'ckpt.pt')
    names = [name.removeprefix('vit.') for name in after if name.startswith('vit.')]
    theirs = {name: name.replace('.mlp.', '.dex.director.') for name in names}
    assert ('blocks.0.mlp.fc1.weight' in names) == (adapt == 'director')
    assert ('blocks.0.dex.experts.fc1.weight' in names) == (adapt == 'experts')
    assert all(torch.equal(after[f'vit.{name}'], before[theirs[name]]) for name in names)
    experts = runs.results(tmp_path)['config']['experts']
    assert experts == (3 if adapt == 'experts' else 0)

# --- how it is called and what it starts from --------------------------------------------------

def test_a_run_is_named_by_what_it_does(labelled, pretrained, tmp_path):
    """By its task, its method, which is what it adapts and what it began with, and its seed. All
    options are in the results; a run with other ones does not take its place."""
    options = dict(init=pretrained, adapt='director', tune_blocks=1, epochs=1, seed=2)
    for pool in ('mean', 'cls'):
        words = runs.finetune_words(labelled / 'tell', 'OUT', pool=pool, **options)
        words.remove('--out=OUT')
        result = runs.program('finetune', *words, cwd=tmp_path)
        if pool == 'mean':
            assert result.code == 0, result.err
    method = f'DEX-D-{pretrained.parent.name}'
    found = runs.results(tmp_path / 'out' / f'tell-{method}-2')
    assert found['method'] == method
    assert (found['options']['tune_blocks'], found['options']['pool']) == (1, 'mean')
    runs.ends(result, naming=[f'out/tell-{method}-2', '--overwrite', '--out'])

def test_from_scratch_there_is_no_checkpoint_to_name(labelled, tmp_path):
    options = dict(init='scratch', depth=4, patch=8, epochs=1)
    tasks.tune(labelled / 'unchecked', tmp_path / 'out', **options)
    found = runs.results(tmp_path / 'out')
    assert found['sha256'] is None
    assert found['method'] == 'DEX-E-scratch'
    assert found['config']['patch'] == found['options']['patch'] == 8

@pytest.mark.parametrize('there, taken', [(['demo'], 'demo'), (['demo', 'pretrain'], 'pretrain')])
def test_without_any_option_it_tunes_for_vessels_what_was_pretrained(
        there, taken, pretrained, tmp_path, signal_at):
    """A bare finetune.py; it is stopped after the first step, as it would do many."""
    tasks.write_task(tmp_path / 'data' / 'phantom-vessels', segments=True)
    for name in there:
        (tmp_path / 'out' / name).mkdir(parents=True)
        shutil.copy(pretrained, tmp_path / 'out' / name / 'ckpt.pt')
    signal_at(0, signal.SIGTERM)
    result = runs.program('finetune', cwd=tmp_path)
    assert result.code == 128 + signal.SIGTERM, result.err
    out = tmp_path / 'out' / f'phantom-vessels-DEX-E-{taken}-0'
    assert runs.weights(out / 'ckpt.pt', 'done') == 1
    assert runs.weights(out / 'ckpt.pt', 'identity')['init'] == f'out/{taken}/ckpt.pt'

@pytest.mark.slow
def test_without_a_task_on_the_disk_its_phantoms_are_simulated(pretrained, tmp_path, signal_at):
    """Whole images of blood vessels and their masks, 64 pixels wide."""
    signal_at(0, signal.SIGTERM)
    result = runs.program('finetune', '--init', pretrained, '--out', 'run', cwd=tmp_path)
    assert result.code == 128 + signal.SIGTERM, result.err
    task = prepared.task(tmp_path / 'data' / 'phantom-vessels')
    assert task.kind == 'segmentation'
    assert task.images['train'].shape == (100, 64, 64, 3)
    assert 0 < (task.answers['test'] == 1).mean() < 0.5

# --- wrong use --------------------------------------------------------------------------------

@pytest.mark.parametrize('options, named', [
    (dict(size=12), ['size 12', 'multiple', 'patch 8']),
    (dict(init='scratch', model='enormous'), ['--model enormous', 'huge']),
    (dict(init='none.pt'), ['none.pt', 'No such file']),
    (dict(adapt='directors'), ['--adapt', 'experts', 'director']),
    (dict(pool='max'), ['--pool', 'cls', 'mean']),
    (dict(fraction=2), ['--fraction']),
    (dict(fraction=0), ['--fraction']),
    (dict(seed=-1), ['--seed -1']),
    (dict(epochs=0), ['--epochs', '--steps']),
    (dict(batch=0), ['--batch']),
    (dict(top_k=9), ['top_k 9', 'between', 'experts 3'])])
def test_wrong_options_end_in_a_sentence_that_names_them(
        labelled, pretrained, tmp_path, options, named):
    options = dict(init=pretrained) | options
    result = runs.finetuning(labelled / 'tell', tmp_path / 'out', **options)
    runs.ends(result, naming=named)
    assert not (tmp_path / 'out').exists()

def test_a_task_that_is_not_prepared_is_told_how(labelled, pretrained, tmp_path):
    result = runs.finetuning(labelled / 'none', tmp_path / 'out', init=pretrained)
    runs.ends(result, naming=[labelled / 'none', 'prepare_medverse.py --task'])
    assert not (tmp_path / 'out').exists()

def test_what_is_no_pretrained_network_is_refused(labelled, tuned, tmp_path):
    files.write(tmp_path / 'text.pt', 'no checkpoint')
    best = tuned / 'tell' / 'best.pt'
    for init, keyword in ((tmp_path / 'text.pt', 'damaged'), (best, 'cls_token')):
        result = runs.finetuning(labelled / 'tell', tmp_path / 'out', init=init)
        runs.ends(result, naming=[init, keyword])
    assert not (tmp_path / 'out').exists()

def test_who_has_not_pretrained_is_told_what_to_do(labelled, tmp_path):
    words = runs.finetune_words(labelled / 'tell', tmp_path / 'out')
    result = runs.program('finetune', *words, cwd=tmp_path)
    runs.ends(result, naming=['out/pretrain/ckpt.pt', '--demo', '--init'])

def test_torchrun_is_refused(labelled, pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    result = runs.finetuning(labelled / 'tell', tmp_path / 'out', init=pretrained)
    runs.ends(result, naming=['one process', 'torchrun'])
