"""What may go wrong while either training runs: steps that are not finite, a second training in the
same folder, and a full disk."""
import fcntl
import hashlib
import math
import resource
import signal

import pytest
import torch

import pretrain
from model import MAE
from tests.support import runs
from tests.support.runs import ends, equal, pretrain_words, read_log, weights

pytestmark = pytest.mark.slow     # whole trainings, and many of them

def nan(images):
    return images * math.nan

def infinity(images):
    return images * math.inf

# --- Steps that are not finite --------------------------------------------------------------------

@pytest.mark.parametrize('spoil', [nan, infinity])
def test_a_step_that_is_not_finite_changes_nothing(
        training, stopped, tmp_path, at_batch, signal_at, spoil):
    """Neither weights, directors and usage, nor the optimizer's moments. It is counted."""
    at_batch(3, spoil)
    signal_at(3, signal.SIGTERM)
    assert training.run(tmp_path).code == 143
    before, after = (weights(out / 'ckpt.pt', None) for out in (stopped, tmp_path))
    assert (before['done'], after['done']) == (3, 4)
    assert equal(before['model'], after['model'])
    assert equal(before['optimizer']['state'], after['optimizer']['state'])
    assert (before['skipped'], after['skipped']) == (0, 1)

def test_a_first_step_that_is_not_finite_leaves_the_network_as_it_was_made(
        sources, tmp_path, at_batch, signal_at):
    at_batch(0, nan)
    signal_at(0, signal.SIGTERM)
    assert runs.pretraining(sources.folder, tmp_path).code == 143
    torch.manual_seed(0)
    made = MAE(runs.pretrain_config()).state_dict()
    assert equal(weights(tmp_path / 'ckpt.pt'), made)

def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is_finite(
        sources, finished, tmp_path, monkeypatch):
    """The fourth gradient of one parameter is infinite; the steps before it are as ever."""
    numbers = iter(range(6))

    def make_network(config):
        network = MAE(config)
        network.norm.weight.register_hook(lambda g: g * math.inf if next(numbers) == 3 else g)
        return network

    monkeypatch.setattr(pretrain, 'MAE', make_network)
    assert runs.pretraining(sources.folder, tmp_path, val_every=2).code == 0
    log = read_log(tmp_path)
    assert [entry['skipped'] for entry in log] == [0, 0, 0, 1, 1, 1]
    losses = [[entry['loss'] for entry in entries[:4]] for entries in (log, read_log(finished))]
    assert losses[0] == losses[1]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / 'ckpt.pt').values())

def test_training_goes_on_after_a_step_that_is_not_finite(
        training, whole, stopped, tmp_path, at_batch):
    at_batch([0, 3], nan)
    assert training.run(tmp_path).code == 0
    found = weights(tmp_path / 'ckpt.pt', None)
    assert found['skipped'] == 2
    assert all(tensor.isfinite().all() for tensor in found['model'].values())
    for other in (whole, stopped):
        assert not equal(found['model'], weights(other / 'ckpt.pt'))

def test_the_log_counts_skipped_steps_and_has_no_nan(sources, tmp_path, at_batch):
    """JSON does not know NaN: such a loss is null."""
    at_batch([0, 3], nan)
    assert runs.pretraining(sources.folder, tmp_path).code == 0
    log = read_log(tmp_path)
    assert [entry['skipped'] for entry in log] == [1, 1, 1, 2, 2, 2]
    assert [entry['loss'] is None for entry in log] == [True, False, False, True, False, False]

def test_the_count_of_skipped_steps_survives_a_stop(training, tmp_path, at_batch, signal_at):
    at_batch(0, nan)
    signal_at(1, signal.SIGTERM)
    assert training.run(tmp_path).code == 143
    assert training.run(tmp_path, resume=True).code == 0
    assert weights(tmp_path / 'ckpt.pt', 'skipped') == 1
    assert read_log(tmp_path)[-1]['skipped'] == 1
    if (tmp_path / 'results.json').exists():
        assert runs.results(tmp_path)['skipped'] == 1

LONG = dict(steps=30)

def test_ten_steps_in_a_row_that_are_not_finite_end_a_training(training, tmp_path, at_batch):
    spoilt = []
    at_batch(range(4, 30), lambda images: spoilt.append(1) or nan(images))
    result = training.run(tmp_path, **LONG)
    ends(result, naming=[tmp_path, '10', 'in a row', '--lr'])
    assert len(spoilt) == 10
    assert not (tmp_path / 'results.json').exists()

def test_ten_steps_that_are_not_finite_but_not_in_a_row_end_nothing(training, tmp_path, at_batch):
    at_batch([0, 1, 2, 3, 4, 5, 7, 8, 9, 10], nan)
    assert training.run(tmp_path, steps=12).code == 0
    assert weights(tmp_path / 'ckpt.pt', 'skipped') == 10

def test_the_log_says_what_led_to_the_end(sources, tmp_path, at_batch):
    at_batch(range(4, 30), infinity)
    ends(runs.pretraining(sources.folder, tmp_path, **LONG), naming='--lr')
    last = read_log(tmp_path)[-1]
    assert (last['step'], last['skipped'], last['loss']) == (13, 10, None)

@pytest.mark.parametrize('first, skipped', [(0, 9), (2, 7)])
def test_a_finetuning_that_is_no_longer_finite_says_what_to_look_at(
        labelled, pretrained, tmp_path, at_batch, first, skipped):
    """The log has a line an epoch, of three steps: the last of them is before the end."""
    at_batch(range(first, 15), nan)
    result = runs.finetuning(labelled / 'tell', tmp_path, init=pretrained, epochs=5)
    ends(result, naming=[tmp_path, '10', 'in a row', 'images', '--lr'])
    last = read_log(tmp_path)[-1]
    assert (last['step'], last['skipped'], last['loss']) == (8, skipped, None)

@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_both(two_ranks):
    """Rank 1 had NaN in the last of three steps: both are where another run stopped after two."""
    expected = weights(two_ranks / 'stopped' / 'ckpt.pt')
    for rank in (0, 1):
        assert equal(weights(two_ranks / f'poisoned-rank{rank}.pt'), expected), rank
    assert equal(weights(two_ranks / 'poisoned' / 'ckpt.pt'), expected)
    last = read_log(two_ranks / 'poisoned')[-1]
    assert (last['step'], last['skipped'], last['loss']) == (2, 1, None)

# --- Files that change meanwhile ------------------------------------------------------------------

def test_the_checksum_of_a_finetuning_is_of_the_checkpoint_it_loaded(
        labelled, pretrained, tmp_path, at_batch):
    """Not of what has taken its place since."""
    init = tmp_path / 'init.pt'
    init.write_bytes(pretrained.read_bytes())

    def replace(images):
        init.write_bytes(b'another')

    at_batch(1, replace)
    assert runs.finetuning(labelled / 'tell', tmp_path / 'out', init=init, epochs=1).code == 0
    expected = hashlib.sha256(pretrained.read_bytes()).hexdigest()
    assert runs.results(tmp_path / 'out')['sha256'] == expected

SCORING_FOREVER = """
import finetune, time
def score_test(run):
    (run.out / 'scoring').touch()
    time.sleep(600)
finetune.score_test = score_test
"""

@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_test_images_are_scored_ends_it_and_resume_scores_them(
        labelled, pretrained, tmp_path, number):
    words = runs.finetune_words(labelled / 'tell', tmp_path, init=pretrained, epochs=1)
    process = runs.start('finetune', *words, before=SCORING_FOREVER)
    runs.wait_for(tmp_path / 'scoring', process)
    process.send_signal(number)
    assert runs.finish(process).code == -number
    assert not (tmp_path / 'results.json').exists()
    assert runs.program('finetune', *words, '--resume').code == 0
    assert (tmp_path / 'results.json').exists()

# --- Two trainings in one folder ------------------------------------------------------------------

@pytest.mark.parametrize('options', [dict(), dict(overwrite=True), dict(resume=True)], ids=str)
def test_a_folder_in_which_another_trains_is_refused(training, stopped, options):
    before = (stopped / 'ckpt.pt').read_bytes()
    with open(stopped / 'log.jsonl') as log:        # as a training holds it
        fcntl.flock(log, fcntl.LOCK_EX)
        ends(training.run(stopped, **options), naming=[stopped, 'another process'])
    assert (stopped / 'ckpt.pt').read_bytes() == before

@pytest.mark.slow
def test_a_training_holds_its_folder_until_it_is_killed(sources, tmp_path):
    endless = dict(steps=10 ** 6, val_every=10 ** 6, log_every=10 ** 6)
    process = runs.start('pretrain', *pretrain_words(sources.folder, tmp_path, **endless))
    runs.wait_for(tmp_path / 'config.json', process)
    try:
        result = runs.pretraining(sources.folder, tmp_path, overwrite=True, steps=1)
        ends(result, naming=[tmp_path, 'another process'])
    finally:
        runs.kill(process)
    assert runs.pretraining(sources.folder, tmp_path, overwrite=True, steps=1).code == 0

# --- A full disk ----------------------------------------------------------------------------------

def test_a_disk_that_fills_up_leaves_the_checkpoint_before(sources, tmp_path, at_batch):
    """The system itself refuses to write more than half of a second one."""
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill_the_disk(images):
        before.append((tmp_path / 'ckpt.pt').read_bytes())
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) // 2, limits[1]))

    at_batch(1, fill_the_disk)
    try:
        result = runs.pretraining(sources.folder, tmp_path, steps=3, save_minutes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ends(result, naming=tmp_path / 'ckpt.pt')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before[0]
    assert not list(tmp_path.glob('*.new'))

def test_a_full_disk_ends_a_training_in_a_sentence(training, tmp_path, full_disk):
    full_disk('*/ckpt.pt.new')
    result = training.run(tmp_path)
    ends(result, naming=[tmp_path / 'ckpt.pt', 'No space left'])
    assert not list(tmp_path.glob('*.new'))

def test_a_full_disk_in_the_log_ends_a_training_in_a_sentence(training, tmp_path, full_disk):
    full_disk('*/log.jsonl')
    ends(training.run(tmp_path), naming='No space left')

@pytest.mark.parametrize('name', ['best.pt', 'results.json'])
def test_a_full_disk_at_the_end_of_a_finetuning_is_named(
        labelled, pretrained, tmp_path, full_disk, name):
    full_disk(f'*/{name}.new')
    result = runs.finetuning(labelled / 'tell', tmp_path, init=pretrained, epochs=1)
    ends(result, naming=[tmp_path / name, 'No space left'])
    assert not list(tmp_path.glob('*.new'))

@pytest.mark.parametrize('content', ['text', dict(step=1)], ids=str)
def test_what_cannot_be_saved_leaves_what_was_there(tmp_path, full_disk, content):
    file = tmp_path / 'ckpt.pt'
    file.write_text('before')
    full_disk('*/ckpt.pt.new')
    with pytest.raises(SystemExit) as error:
        pretrain.save(file, content)
    ends(error, naming=[file, 'No space left'])
    assert file.read_text() == 'before'
    assert list(tmp_path.iterdir()) == [file]
