"""pretrain.py: the log and its schedules, the checkpoint, validation, and steps against a naive
training: in one process, in micro-batches and on two ranks. Stops and mishaps: test_resume.py."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import pretrain
from model import MAE, Config
from tests.support import naive, runs
from tests.support.runs import ends, read_log, weights, write_source
from tests.support.two_ranks import QUARTERS, STEP

pytestmark = pytest.mark.slow     # whole trainings, and many of them

FIELDS = {'step', 'loss', 'l_self', 'align', 'balance', 'lr', 'momentum', 'sigma', 'grad_norm',
          'skipped', 'images_per_second'}

def network_of(out):
    """The network of a run's checkpoint."""
    network = MAE(Config(**weights(out / 'ckpt.pt', 'config')))
    network.load_state_dict(weights(out / 'ckpt.pt'))
    return network

# --- One run --------------------------------------------------------------------------------------

def test_the_log_has_a_line_a_step_with_every_field(finished):
    log = read_log(finished, timed=True)
    assert [entry['step'] for entry in log] == [0, 1, 2, 3, 4, 5]
    assert all(FIELDS <= entry.keys() for entry in log)
    assert all(entry['images_per_second'] > 0 for entry in log)

def test_a_run_learns(finished):
    log = read_log(finished)
    assert log[5]['l_self'] < log[0]['l_self']

def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_cosine(finished):
    """A third of six steps are warm-up; the peak of 0.1 is for 512 images a step; here are 4."""
    peak = 0.1 * 4 / 512
    expected = [peak / 2, peak]
    expected += [peak * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [entry['lr'] for entry in read_log(finished)] == pytest.approx(expected)

def test_noise_and_momentum_follow_a_cosine_over_the_run(finished):
    for step, entry in enumerate(read_log(finished)):
        left = (1 + math.cos(math.pi * step / 6)) / 2
        assert entry['sigma'] == pytest.approx(left)                    # from 1 to 0
        assert entry['momentum'] == pytest.approx(1 - 0.01 * left)      # from 0.99 to 1

def test_the_loss_is_the_weighted_sum_of_its_parts(finished):
    """The weight of the balance loss falls along a cosine from 0.001."""
    for step, entry in enumerate(read_log(finished)):
        weight = 0.001 * (1 + math.cos(math.pi * step / 6)) / 2
        parts = entry['l_self'] + 0.1 * entry['align'] + weight * entry['balance']
        assert entry['loss'] == pytest.approx(parts)

def test_lines_are_written_as_often_as_asked(sources, tmp_path):
    """And at the first and last step and at each validation, whatever was asked."""
    options = dict(steps=9, log_every=3, val_every=4)
    assert runs.pretraining(sources.folder, tmp_path / 'out', **options).code == 0
    log = read_log(tmp_path / 'out')
    assert [entry['step'] for entry in log] == [0, 2, 3, 5, 7, 8]
    assert [entry['step'] for entry in log if 'val' in entry] == [0, 3, 7, 8]

@pytest.mark.parametrize('minutes, found', [(0, [1, 2, 3]), (15, [])])
def test_checkpoints_are_saved_as_often_as_asked(sources, tmp_path, at_batch, minutes, found):
    """Of which the next step sees how many steps they hold; a quarter of an hour does not pass."""
    steps = []

    def look(images):
        if (tmp_path / 'ckpt.pt').exists():
            steps.append(weights(tmp_path / 'ckpt.pt', 'done'))

    at_batch([1, 2, 3], look)
    assert runs.pretraining(sources.folder, tmp_path, steps=4, save_minutes=minutes).code == 0
    assert steps == found
    assert weights(tmp_path / 'ckpt.pt', 'done') == 4

def test_epochs_give_the_steps(sources, tmp_path):
    """Of 64 images 16 a step, two epochs have eight steps; --steps, if given, wins."""
    for name, options in (('epochs', dict(epochs=2, steps=0)), ('steps', dict(epochs=99, steps=8))):
        options |= dict(batch=16, val_every=99)
        result = runs.pretraining(sources.folder, tmp_path / name, **options)
        assert result.code == 0 and 'all 8 steps' in result.out
    assert json.loads((tmp_path / 'epochs' / 'config.json').read_text())['steps'] == 8
    assert read_log(tmp_path / 'epochs') == read_log(tmp_path / 'steps')

def test_the_checkpoint_is_plain_and_complete(finished):
    file = torch.load(finished / 'ckpt.pt', weights_only=True)
    config = Config(**file['config'])
    assert config == runs.pretrain_config()
    assert file['model'].keys() == MAE(config).state_dict().keys()
    assert file['done'] == 6 and file['skipped'] == 0
    assert not list(finished.glob('*.new'))

def test_config_json_has_the_options_of_the_checkpoint(finished, sources):
    file = torch.load(finished / 'ckpt.pt')
    config = json.loads((finished / 'config.json').read_text())
    assert config['options'] == file['options']
    assert config['options']['data'] == str(sources.folder) and config['options']['batch'] == 4
    assert config['config'] == file['config']

def test_a_run_that_ends_starts_the_program_of_its_pictures(sources, tmp_path, skipped_pictures):
    before = skipped_pictures.count
    assert runs.pretraining(sources.folder, tmp_path / 'out', steps=1).code == 0
    assert skipped_pictures.count == before + 1

@pytest.mark.parametrize('options', [
    dict(experts=0),
    dict(top_k=1, accumulate=2),
    dict(top_k=4),
], ids=str)
def test_variants_train(sources, tmp_path, options):
    out = tmp_path / 'out'
    assert runs.pretraining(sources.folder, out, steps=2, val_every=100, **options).code == 0
    assert all(tensor.isfinite().all() for tensor in weights(out / 'ckpt.pt').values())
    log = read_log(out)
    assert [entry['skipped'] for entry in log] == [0, 0]
    assert log[-1]['val'].keys() == {'CT', 'Photo', 'MR'}
    plain = options.get('experts') == 0
    assert all((entry['loss'] == entry['l_self']) == plain for entry in log)
    assert ('bits' in log[-1]) != plain

def test_a_source_of_a_single_image_only_trains(tmp_path):
    write_source(tmp_path / 'data' / 'a', 'CT', 12)
    write_source(tmp_path / 'data' / 'b', 'PET', 1)
    assert runs.pretraining(tmp_path / 'data', tmp_path / 'out', steps=1).code == 0
    assert read_log(tmp_path / 'out')[-1]['val'].keys() == {'CT'}

def test_init_starts_from_the_weights_of_a_checkpoint(sources, finished, tmp_path):
    """Also of an encoder alone. Without a learning rate what was loaded is what is saved."""
    whole = torch.load(finished / 'ckpt.pt')
    encoder = {name: value for name, value in whole['model'].items()
               if not name.startswith(('decoder', 'mask_token'))}
    torch.save(dict(model=encoder, config=whole['config']), tmp_path / 'encoder.pt')
    for name, path in (('whole', finished / 'ckpt.pt'), ('encoder', tmp_path / 'encoder.pt')):
        out = tmp_path / name
        result = runs.pretraining(sources.folder, out, init=path, steps=1, lr=0, momentum=1)
        assert result.code == 0 and f'{path}: loaded' in result.out
        found = weights(out / 'ckpt.pt')
        assert all(torch.equal(found[key], value) for key, value in encoder.items()
                   if 'usage' not in key)
        assert torch.equal(found['mask_token'], whole['model']['mask_token']) == (name == 'whole')

def test_init_is_refused_where_the_heads_of_attention_differ(sources, finished, tmp_path):
    file = torch.load(finished / 'ckpt.pt')
    file['config']['heads'] *= 2
    torch.save(file, tmp_path / 'other.pt')
    result = runs.pretraining(sources.folder, tmp_path / 'out', init=tmp_path / 'other.pt')
    ends(result, naming=[tmp_path / 'other.pt', '6 heads', 'tiny has 3'])

def test_every_trained_parameter_is_in_one_group_of_the_optimizer():
    """Weight decay is for matrices and kernels; the directors are not trained."""
    model = MAE(Config(size=32, patch=8, depth=2, experts=4))
    optimizer = pretrain.make_optimizer(model, 1e-3, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group['weight_decay']: [names[id(p)] for p in group['params']]
              for group in optimizer.param_groups}
    trained = [name for name in names.values() if '.director.' not in name]
    assert groups.keys() == {0.1, 0.0} and len(optimizer.param_groups) == 2
    assert sorted(groups[0.1] + groups[0.0]) == sorted(trained)
    plain = {name for name in trained if 'norm' in name or 'bias' in name or 'token' in name}
    assert set(groups[0.0]) == plain
    assert 'blocks.0.dex.experts.fc1.bias' in plain and 'blocks.0.dex.gate.weight' in groups[0.1]

# --- Validation -----------------------------------------------------------------------------------

def test_validation_equals_one_image_at_a_time(finished, sources):
    """Without noise of the gate, with the same mask each time; by modality, and their mean."""
    shards, network = data.Shards(sources.folder), network_of(finished)
    noise = torch.rand(len(shards.val), 16, generator=torch.Generator().manual_seed(0))
    losses, used = {}, (set(), set())
    first = torch.zeros(2, 3, 4)        # counts of first choices (layer, modality, expert)
    second = ([], [])                   # weights of the second of two experts, by layer
    for image, own_noise in zip(shards.val, noise):
        kind = shards.image_modality[image]
        pixels = data.normalize(shards.gather(np.array([image])) / 255)
        with torch.no_grad():
            loss, routing, _, _ = network(pixels, 0.0, own_noise[None])
        losses.setdefault(shards.modalities[kind], []).append(loss.item())
        for layer in range(2):
            first[layer, kind, routing.scores[layer, 0].argmax()] += 1
            second[layer].append(routing.weights[layer, 0].topk(2).values[1].item())
            used[layer].update(routing.scores[layer, 0].topk(2).indices.tolist())
    entry = read_log(finished)[-1]
    expected = {name: sum(values) / len(values) for name, values in losses.items()}
    assert entry['val'] == pytest.approx(expected)
    assert entry['val_l_self'] == pytest.approx(sum(expected.values()) / 3)
    bits, most = zip(*map(pretrain.mutual_information, first))
    assert entry['bits'] == pytest.approx(bits) and entry['bits_max'] == pytest.approx(most[0])
    medians = [sorted(values)[(len(values) - 1) // 2] for values in second]   # the lower of two
    assert entry['second'] == pytest.approx(medians, abs=1e-6)
    assert entry['dead'] == [4 - len(experts) for experts in used]
    assert sum(entry['dead'])       # or this would say nothing

def test_mutual_information_of_known_tables():
    """In bits, and the most that it can be: of rows alone, or of as many columns."""
    independent = torch.outer(torch.tensor([1.0, 2, 5]), torch.tensor([3.0, 1, 4, 2]))
    entropy = -sum(p * math.log2(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert pretrain.mutual_information(independent) == pytest.approx((0, entropy), abs=1e-9)
    assert pretrain.mutual_information(torch.eye(4) * 7) == pytest.approx((2, 2))
    two_columns_a_row = torch.eye(8).repeat_interleave(2, 1)
    two_rows_a_column = torch.eye(2).repeat(4, 1)
    assert pretrain.mutual_information(two_columns_a_row) == pytest.approx((3, 3))
    assert pretrain.mutual_information(two_rows_a_column) == pytest.approx((1, 1))

# --- Steps, against a naive training --------------------------------------------------------------

def naive_training(folder, parts, **options):
    """The images of all parts (ranks, or micro-batches) in one batch; see support/naive.py."""
    o, config = runs.pretrain_options(folder, **options), runs.pretrain_config(**options)
    return naive.training(folder, o, config, parts)

def assert_trained_alike(out, expected, *columns):
    """A run's weights and these columns of its log are those of a naive training."""
    log = read_log(out)
    for name in columns:
        ours, theirs = ([entry[name] for entry in entries] for entries in (log, expected.log))
        assert ours == pytest.approx(theirs, rel=1e-4), name
    ours = weights(out / 'ckpt.pt')
    assert ours.keys() == expected.weights.keys()       # no 'module.' in names
    for name, value in expected.weights.items():
        found = ours[name]
        if name.endswith('attn.qkv.bias'):      # softmax ignores that of keys: rounding moves it
            found, value = (torch.cat(torch.tensor_split(x, 3)[::2]) for x in (found, value))
        # AdamW makes a whole step of a gradient that is rounding: one element in a hundred may be.
        assert torch.isclose(found, value, atol=5e-5, rtol=1e-5).float().mean() > 0.99, name

LOGGED = ('l_self', 'align', 'balance', 'loss', 'grad_norm')

def test_three_steps_equal_a_naive_loop(sources, tmp_path):
    """Losses, schedules, clipping, AdamW and GEMA, each with weights that let an error be seen."""
    assert runs.pretraining(sources.folder, tmp_path, **STEP).code == 0
    assert_trained_alike(tmp_path, naive_training(sources.folder, 1, **STEP), *LOGGED)

def test_two_micro_batches_equal_one_batch_in_a_naive_loop(sources, tmp_path):
    """But for the balance loss, which balances within each of them."""
    options = STEP | dict(balance=0)
    assert runs.pretraining(sources.folder, tmp_path, accumulate=2, **options).code == 0
    expected = naive_training(sources.folder, 2, **options)
    assert_trained_alike(tmp_path, expected, 'l_self', 'align', 'loss', 'grad_norm')

@pytest.mark.slow
def test_two_ranks_equal_one_process_with_both_batches(two_ranks):
    """Also what rank 0 writes to the log is of both, and so is the balance loss."""
    expected = naive_training(two_ranks / 'data', 2, **STEP)
    assert_trained_alike(two_ranks / 'whole', expected, *LOGGED)
    assert [entry['step'] for entry in read_log(two_ranks / 'whole')] == [0, 1, 2]

@pytest.mark.slow
def test_two_ranks_hold_the_same_network_to_the_last_bit(two_ranks):
    first, second = (weights(two_ranks / f'whole-rank{rank}.pt') for rank in (0, 1))
    assert runs.equal(first, second)
    assert runs.equal(first, weights(two_ranks / 'whole' / 'ckpt.pt'))

@pytest.mark.slow
def test_two_ranks_with_two_micro_batches_equal_one_process_with_four(two_ranks, tmp_path):
    """Images, crops, masks and gate noise of each micro-batch are the same."""
    options = dict(QUARTERS, accumulate=4)
    assert runs.pretraining(two_ranks / 'data', tmp_path, **options).code == 0
    expected = SimpleNamespace(log=read_log(tmp_path), weights=weights(tmp_path / 'ckpt.pt'))
    assert_trained_alike(two_ranks / 'quarters', expected, 'l_self', 'align', 'loss', 'grad_norm')

def test_the_log_of_accumulated_steps_holds_the_mean_over_micro_batches(sources, tmp_path):
    """Which is what is optimised: the balance loss, a product, is not that of the means."""
    options = dict(accumulate=3, steps=1, sigma=9)
    assert runs.pretraining(sources.folder, tmp_path, **options).code == 0
    o, shards = runs.pretrain_options(sources.folder, **options), data.Shards(sources.folder)
    torch.manual_seed(o.seed)
    network = MAE(runs.pretrain_config())
    micros = []
    for micro in range(3):
        ids = shards.batch_ids(o.seed, micro, o.batch, 0, 1, len(shards.train) // 12 * 3)
        pretrain.seed_step(o.seed, 0, micro)
        images = data.augment(shards.gather(ids), o.size)
        losses, routing, _, _ = network(images, torch.tensor(9.0))
        _, balance = naive.layer_losses(*naive.Decisions(*routing)[:3])
        micros.append((losses.mean().item(), balance.item()))
    entry = read_log(tmp_path)[0]
    for name, values in zip(('l_self', 'balance'), zip(*micros)):
        assert entry[name] == pytest.approx(sum(values) / 3, rel=1e-4), name
        assert max(values) > min(values) + 0.01
