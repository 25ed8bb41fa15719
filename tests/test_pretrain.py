"""pretrain.py: real runs on tiny sources, against each other and against a naive training loop."""
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import bench
import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT, write_source
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model
import pretrain
from model import MAE, SIZES, Config, flops, layer_losses, read_checkpoint

TINY = dict(model='tiny', depth=2, experts=4, size=32, patch=8, batch=4, steps=6, warmup=0.34, lr=0.1, log_every=1,
            device='cpu')
MODEL = Config(size=32, patch=8, experts=4, **(SIZES['tiny'] | dict(depth=2)))
FIELDS = {'step', 'loss', 'mae', 'co', 'bal', 'lr', 'momentum', 'sigma', 'images_per_second', 'mfu'}

@pytest.fixture(autouse=True)
def keep_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

def arguments(folder, out, **options):
    return [f'--{name}={value}' for name, value in dict(TINY, data=folder, out=out, **options).items()]

def train(folder, out, **options):
    """Run the script's main in this process; returns its final checkpoint."""
    argv, sys.argv = sys.argv, ['pretrain.py', *arguments(folder, out, **options)]
    try:
        pretrain.main()
    finally:
        sys.argv = argv
    return read_checkpoint(out / 'ckpt.pt')[2]

def log(out, timed=False):
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if timed or k not in ('images_per_second', 'mfu')} for line in lines]

def same(a, b):
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def same_run(ours, theirs):
    """Two runs' folders hold the same weights, optimizer state and log, but for the times in it."""
    a, b = (read_checkpoint(out / 'ckpt.pt')[2] for out in (ours, theirs))
    assert a['step'] == b['step'] and same(a['model'], b['model']) and same(a['optimizer'], b['optimizer'])
    assert log(ours) == log(theirs)

@pytest.fixture(scope='module')
def finished(sources, tmp_path_factory):
    """A run of six steps, never stopped, that looked at its validation images after every second."""
    out = tmp_path_factory.mktemp('finished')
    train(sources[0], out, val_every=2)
    return out

# ---------------------------------------------------------------------------------------------------------------------
# One run

def test_schedules_and_log_follow_their_closed_forms(finished):
    lines = log(finished, timed=True)
    assert [line['step'] for line in lines if 'val' in line] == [0, 1, 3, 5]
    assert [line['step'] for line in lines] == list(range(6)) and all(FIELDS <= line.keys() for line in lines)
    peak = 0.1 * 4 / 512
    for s, line in enumerate(lines):
        half = (1 + math.cos(math.pi * s / 6)) / 2
        rate = peak * (s + 1) / 2 if s < 2 else peak * (1 + math.cos(math.pi * (s - 2) / 4)) / 2
        assert line['lr'] == pytest.approx(rate) and line['lr'] > 0
        assert line['sigma'] == pytest.approx(half) and line['momentum'] == pytest.approx(1 - 0.01 * half)
        assert line['loss'] == pytest.approx(line['mae'] + 0.1 * line['co'] + 0.001 * half * line['bal'])
    assert lines[5]['mae'] < lines[0]['mae']

def test_the_checkpoint_is_plain_and_complete(finished, sources):
    file = torch.load(finished / 'ckpt.pt', weights_only=True)
    assert file['model'].keys() == MAE(MODEL).state_dict().keys() and Config(**file['config']) == MODEL
    assert file['step'] == 6 and json.loads((finished / 'config.json').read_text())['options'] == file['options']
    assert not list(finished.glob('*.new'))

def test_validation_equals_one_image_at_a_time(finished, sources):
    shards, model = data.Shards(sources[0]), MAE(MODEL)
    model.load_state_dict(read_checkpoint(finished / 'ckpt.pt')[0])
    noise, losses = torch.rand(len(shards.val), 16, generator=torch.Generator().manual_seed(0)), {}
    counts = torch.zeros(2, 3, 4)
    for k, image in enumerate(shards.val):
        pixels = data.normalize(shards.gather(np.array([image])) / 255)
        with torch.no_grad():
            loss, routing, _, _ = model(pixels, 0.0, noise[k:k + 1])
        losses.setdefault(shards.modalities[shards.modality[image]], []).append(loss.item())
        for layer in range(2):
            counts[layer, shards.modality[image], routing.scores[layer, 0].argmax()] += 1
    entry = log(finished)[-1]
    naive = {name: sum(values) / len(values) for name, values in losses.items()}
    assert entry['val'] == pytest.approx(naive) and entry['val_mae'] == pytest.approx(sum(naive.values()) / 3)
    assert entry['bits'] == pytest.approx([pretrain.mutual_information(table)[0] for table in counts])

def test_reconstructions_show_what_is_seen_and_predicted(finished, sources, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pretrain, 'draw_grid', lambda path, rows, names, heads: drawn.append(torch.stack(rows)))
    shards, network = data.Shards(sources[0]), MAE(MODEL)
    network.load_state_dict(read_checkpoint(finished / 'ckpt.pt')[0])
    pixels = data.center(shards.gather(shards.val[[3, 1]]), 32)      # MR and Photo hold one out
    noise = torch.rand(2, 16)
    with torch.no_grad():
        pretrain.draw_reconstructions(tmp_path / 'recon.png', network, pixels, noise, ['MR', 'Photo'])
        prediction, mask = network(pixels, 0.0, noise)[2:]
    image, seen, shown = drawn[0]
    _, mean, std = network.targets(pixels)
    undone = data.denormalize(network.unpatchify(prediction * std + mean)).clamp(0, 1)
    undone[0] = undone[0].mean(0)       # MR is grey
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(2, 3, 32, 32) > 0
    gain = [1 / stored.quantile(0.99).item() for stored in data.denormalize(pixels).clamp(0, 1)]
    for k, stored in enumerate((sources[1][3][-1], sources[1][1][-1])):
        truth = gain[k] * torch.from_numpy(stored).permute(2, 0, 1).expand(3, 32, 32) / 255
        torch.testing.assert_close(image[k], truth, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shown[k], torch.where(hidden[k], gain[k] * undone[k], truth), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen[k], torch.where(hidden[k], torch.tensor(0.5), truth), atol=1e-5, rtol=1e-5)
    assert hidden.float().mean() == 0.75

def test_a_grid_puts_each_tile_where_its_names_say(tmp_path):
    tiles = torch.rand(2, 3, 3, 1, 1).expand(2, 3, 3, 8, 8)
    pretrain.draw_grid(tmp_path / 'grid.png', tiles, ['a', 'b'], ['x', 'y', 'z'], (16, 16))
    picture = torch.from_numpy(np.array(Image.open(tmp_path / 'grid.png').convert('RGB'))) / 255
    assert picture.shape == (24 + 2 * 20, 94 + 3 * 20, 3)
    for r, c in np.ndindex(2, 3):
        shown = picture[26 + 20 * r:34 + 20 * r, 96 + 20 * c:104 + 20 * c].mean((0, 1))
        torch.testing.assert_close(shown, tiles[r, c, :, 0, 0], atol=0.03, rtol=0)

def test_a_run_and_what_looks_at_it_leave_five_pictures(sources, tmp_path, monkeypatch):
    train(sources[0], tmp_path, steps=2, val_share=0.5)
    with monkeypatch.context() as under_torchrun:       # which is no affair of the script's
        under_torchrun.setenv('WORLD_SIZE', '2')
        pretrain.run_script('pictures.py', tmp_path)
    for name in ('recon', 'experts', 'attention', 'layout', 'curves'):
        picture = Image.open(tmp_path / f'{name}.png')
        assert min(picture.size) > 90 and len(picture.convert('RGB').getcolors(1 << 20)) > 2, name
    with pytest.raises(SystemExit, match='pictures.py: has not finished'):
        pretrain.run_script('pictures.py', tmp_path / 'none')

def test_clusters_of_features_in_known_directions_are_found():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 8))[0][:4]
    x = torch.nn.functional.normalize(directions.repeat_interleave(20, 0) + 0.1 * torch.randn(80, 8), dim=1)
    centres = pictures.cluster(x[torch.randperm(80)], 4)
    assert sorted((centres @ directions.T).argmax(1).tolist()) == [0, 1, 2, 3]
    assert (centres @ directions.T).amax(1).min() > 0.98

def test_modality_share_is_the_share_of_variance_between_groups():
    torch.manual_seed(0)
    parts = [torch.randn(2, n, 5) + shift for n, shift in ((7, 0), (4, 2), (9, -1))]
    kinds = torch.eye(3).repeat_interleave(torch.tensor([7, 4, 9]), 1)
    shares = pictures.modality_share(torch.cat(parts, 1), kinds)
    for layer in range(2):
        everything = torch.cat([part[layer] for part in parts])
        within = sum((row - part[layer].mean(0)).square().sum() for part in parts for row in part[layer])
        whole = (everything - everything.mean(0)).square().sum()
        assert shares[layer].item() == pytest.approx(1 - (within / whole).item(), rel=1e-5)

def test_lines_are_drawn_from_the_least_to_the_greatest_number(tmp_path):
    pictures.draw_lines(tmp_path / 'lines.png', {'title': dict(up=[(1, 0), (2, 2), (5, 8)])})
    picture = np.asarray(Image.open(tmp_path / 'lines.png')).astype(int)
    blue = np.argwhere(abs(picture[:, :250] - (65, 105, 225)).sum(2) == 0)     # royalblue, without the legend
    assert abs(blue.min(0) - (40, 55)).max() <= 1 and abs(blue.max(0) - (190, 245)).max() <= 1
    middle = blue[blue[:, 1] == 55 + round(190 / 4)][:, 0].mean()       # a quarter of the way at x = 2, y = 2
    assert abs(middle - (190 - 150 / 4)) <= 2
    pictures.draw_lines(tmp_path / 'bars.png', {'title': dict(up=[(1, 3, 1), (2, 4, 2)])})      # from 2 to 6
    picture = np.asarray(Image.open(tmp_path / 'bars.png')).astype(int)
    blue = np.argwhere(abs(picture[:, :250] - (65, 105, 225)).sum(2) == 0)
    for column, least, most in ((55, 2, 4), (245, 2, 6)):
        rows = blue[abs(blue[:, 1] - column) <= 1][:, 0]
        assert abs(rows.max() - (190 - 150 * (least - 2) / 4)) <= 1 and abs(rows.min() - (190 - 150 * (most - 2) / 4)) <= 1

def test_mutual_information_of_known_tables():
    independent = torch.outer(torch.tensor([1.0, 2, 5]), torch.tensor([3.0, 1, 4, 2]))
    entropy = -sum(p * math.log2(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert pretrain.mutual_information(independent) == pytest.approx((0, entropy), abs=1e-9)
    assert pretrain.mutual_information(torch.eye(4) * 7) == pytest.approx((2, 2))
    assert pretrain.mutual_information(torch.eye(8).repeat_interleave(2, 1)) == pytest.approx((3, 3))
    assert pretrain.mutual_information(torch.eye(2).repeat(4, 1)) == pytest.approx((1, 1))       # two columns

def test_every_trained_parameter_is_in_one_optimizer_group():
    model = MAE(MODEL)
    optimizer = pretrain.make_optimizer(model, 1e-3, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group['weight_decay']: [names[id(p)] for p in group['params']] for group in optimizer.param_groups}
    trained = [name for name in names.values() if '.director.' not in name]
    assert sorted(groups[0.1] + groups[0.0]) == sorted(trained) and len(optimizer.param_groups) == 2
    plain = {name for name in trained if 'norm' in name or 'bias' in name or 'token' in name}
    assert set(groups[0.0]) == plain and 'blocks.0.dex.experts.fc1.bias' in plain and 'blocks.0.dex.gate.weight' not in plain

@pytest.mark.parametrize('options', [dict(experts=0), dict(routing='token'), dict(top_k=1, accumulate=2), dict(top_k=4)])
def test_variants_train(sources, tmp_path, options):
    checkpoint = train(sources[0], tmp_path, steps=2, val_every=100, **options)
    lines = log(tmp_path)
    assert all(tensor.isfinite().all() for tensor in checkpoint['model'].values())
    assert [line['step'] for line in lines] == [0, 1]
    assert all(math.isfinite(line['loss']) and line['skipped'] == 0 for line in lines)
    assert all((line['loss'] == line['mae']) == (options.get('experts') == 0) for line in lines)
    assert lines[-1]['val'].keys() == {'CT', 'Photo', 'MR'}

def test_a_source_of_a_single_image_only_trains(tmp_path):
    write_source(tmp_path / 'data' / 'a', 'CT', 12)
    write_source(tmp_path / 'data' / 'b', 'PET', 1)
    train(tmp_path / 'data', tmp_path / 'out', steps=1)
    assert math.isfinite(log(tmp_path / 'out')[-1]['val_mae'])

# ---------------------------------------------------------------------------------------------------------------------
# The step: two ranks, two micro-batches, and one naive loop over both parts' images at once

def naive_training(folder, parts, **options):
    """Weights after three steps without gate noise: all parts' images in one batch; losses, clipping and GEMA by hand."""
    o, shards = replace(pretrain.Options(), **dict(TINY, **options)), data.Shards(folder)
    torch.manual_seed(o.seed)
    model, norms = MAE(MODEL), []
    trained = {name: p for name, p in model.named_parameters() if '.director.' not in name}
    groups = [dict(params=[p], weight_decay=o.weight_decay if name.endswith('weight') and 'norm' not in name else 0)
              for name, p in trained.items()]
    optimizer = torch.optim.AdamW(groups, lr=1)
    for step in range(3):
        images, noise, half = [], [], (1 + math.cos(math.pi * step / 3)) / 2
        for part in range(parts):
            ids = shards.plan(o.seed, step, o.batch, part, parts, len(shards.train) // (o.batch * parts))
            pretrain.seed_step(o.seed, step, part)
            images.append(data.augment(shards.gather(ids), o.size))
            noise.append(torch.rand(o.batch, 16))
        losses, routing, _, _ = model(torch.cat(images), 0.0, torch.cat(noise))
        loss = losses.mean()
        for layer in range(2):
            loss = loss + o.co / 2 * routing.co[layer] / (2 - layer)
            frequency = routing.chosen[layer].mean(0)
            loss = loss + o.balance * half / 2 * 4 * (routing.scores[layer].mean(0) * frequency).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        norms.append(norm.item())
        for p in trained.values():
            p.grad *= min(1, o.clip / norm)
        for group in optimizer.param_groups:
            group['lr'] = o.lr * o.batch * parts / 512 * (1 if step == 0 else (1 + math.cos(math.pi * (step - 1) / 2)) / 2)
        optimizer.step()
        momentum = 1 - (1 - o.momentum) * half
        for block, weights in zip(model.blocks, routing.weights.detach()):
            omega = weights.sum(0) / weights.sum()
            block.dex.usage.mul_(0.99).add_(omega, alpha=0.01)
            for name, director in block.dex.director.named_parameters():
                average = sum(omega[r] * block.dex.experts.get_parameter(name)[r] for r in range(4))
                director.data = momentum * director.data + (1 - momentum) * average
    return model.state_dict(), norms

STEP = dict(steps=3, sigma=0.0, momentum=0.5, weight_decay=10.0, clip=0.3)

def close(out, naive, norms):
    ours = read_checkpoint(out / 'ckpt.pt')[0]
    assert ours.keys() == naive.keys()      # no 'module.' in names
    assert [line['grad_norm'] for line in log(out)] == pytest.approx(norms, rel=1e-4)
    for name, value in naive.items():
        if name.endswith('attn.qkv.bias'):      # softmax ignores the keys' bias: its gradient is nothing but rounding
            ours[name], value = (torch.cat(torch.tensor_split(t, 3)[::2]) for t in (ours[name], value))
        # AdamW makes a whole step of a gradient that is nothing but rounding: one element in a hundred may be such
        assert torch.isclose(ours[name], value, atol=5e-5, rtol=1e-5).float().mean() > 0.99, name

def test_the_log_of_accumulated_steps_holds_the_loss_that_is_optimised(sources, tmp_path, monkeypatch):
    products, losses = [], pretrain.layer_losses

    def watch(co, scores, load):
        if scores.requires_grad:        # the one that is optimised
            products.append(4 * (scores * load).sum(1).mean().item())
        return losses(co, scores, load)
    monkeypatch.setattr(pretrain, 'layer_losses', watch)
    train(sources[0], tmp_path, accumulate=3, steps=2, sigma=9)
    assert [line['bal'] for line in log(tmp_path)] == pytest.approx([sum(products[:3]) / 3, sum(products[3:]) / 3])
    assert len(products) == 6 and max(products) > min(products) + 0.01      # the product of the means would be another

@pytest.mark.parametrize('parts', [1, 2])
def test_accumulated_micro_batches_equal_one_batch_in_a_naive_loop(sources, tmp_path, parts):
    options = dict(STEP, balance=0.5 if parts == 1 else 0.0)      # balanced within a micro-batch
    train(sources[0], tmp_path, accumulate=parts, **options)
    close(tmp_path, *naive_training(sources[0], parts, **options))

WRAPPER = '''
import os, sys
sys.path.insert(0, {root!r})
import torch
import pretrain
models, MAE = [], pretrain.MAE
pretrain.MAE = lambda config: models.append(MAE(config)) or models[0]
pretrain.main()
torch.save(models[0].state_dict(), os.path.join({out!r}, 'rank' + os.environ['RANK'] + '.pt'))
'''

@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    """Two processes under torchrun, on a source with one validation image, so that one of them has none."""
    folder = tmp_path_factory.mktemp('two')
    write_source(folder / 'data' / 'a', 'CT', 30)
    (folder / 'script.py').write_text(WRAPPER.format(root=str(ROOT), out=str(folder)))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', folder / 'script.py']
    command += arguments(folder / 'data', folder / 'out', balance=0.5, **STEP)
    group = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = group.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(group.pid, signal.SIGKILL)
        pytest.fail('two ranks wait for each other for ever')
    assert group.returncode == 0, output
    return folder

def test_two_ranks_equal_one_process_with_both_batches(two_ranks):
    close(two_ranks / 'out', *naive_training(two_ranks / 'data', 2, balance=0.5, **STEP))
    assert [line['step'] for line in log(two_ranks / 'out')] == [0, 1, 2]

def test_two_ranks_hold_the_same_network_to_the_last_bit(two_ranks):
    ranks = [torch.load(two_ranks / f'rank{rank}.pt', weights_only=True) for rank in (0, 1)]
    assert same(*ranks) and same(ranks[0], read_checkpoint(two_ranks / 'out' / 'ckpt.pt')[0])

# ---------------------------------------------------------------------------------------------------------------------
# What may go wrong

@pytest.fixture
def at_batch(monkeypatch):
    """at_batch(f) calls f(number, images) with every augmented batch of this process and trains on what it returns."""
    def at_batch(change):
        augment, numbers = data.augment, iter(range(10 ** 6))
        monkeypatch.setattr(data, 'augment', lambda images, size: change(next(numbers), augment(images, size)))
    return at_batch

def test_killed_and_resumed_equals_never_stopped(sources, tmp_path):
    options = dict(save_minutes=0, steps=30, val_every=10)
    command = [sys.executable, ROOT / 'pretrain.py', *arguments(sources[0], tmp_path / 'killed', **options)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {'OMP_NUM_THREADS': '1'})
    while not (tmp_path / 'killed' / 'ckpt.pt').exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    step = read_checkpoint(tmp_path / 'killed' / 'ckpt.pt')[2]['step']
    assert process.returncode == -signal.SIGKILL and 0 < step < 30
    with open(tmp_path / 'killed' / 'log.jsonl', 'a') as file:
        file.write('{"step": 29, "loss": 1}\n{"step": 3')       # logged after the checkpoint, and cut off
    options['save_minutes'] = 15
    train(sources[0], tmp_path / 'killed', resume=True, **options)
    train(sources[0], tmp_path / 'whole', resume=True, **options)      # nothing to resume: starts fresh
    same_run(tmp_path / 'killed', tmp_path / 'whole')

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_one_never_stopped(sources, finished, tmp_path, at_batch, number):
    at_batch(lambda step, images: (step == 2 and os.kill(os.getpid(), number)) or images)
    with pytest.raises(SystemExit, match=f'^{128 + number}$'):
        train(sources[0], tmp_path, val_every=2)
    assert read_checkpoint(tmp_path / 'ckpt.pt')[2]['step'] in (3, 4)
    train(sources[0], tmp_path, val_every=2, resume=True)
    same_run(tmp_path, finished)

def test_a_step_that_is_not_finite_changes_nothing(sources, tmp_path, at_batch, monkeypatch):
    at_batch(lambda step, images: images * math.nan if step in (0, 3) else images)
    saved, save = [], pretrain.save

    def keep(path, content):
        save(path, content)
        if path.name == 'ckpt.pt':
            saved.append(read_checkpoint(path)[2])
    monkeypatch.setattr(pretrain, 'save', keep)
    train(sources[0], tmp_path, save_minutes=0)
    assert [file['step'] for file in saved] == [1, 2, 3, 4, 5, 6]
    torch.manual_seed(0)
    assert same(saved[0]['model'], MAE(Config(**saved[0]['config'])).state_dict())
    assert same(saved[3]['model'], saved[2]['model'])
    assert same(saved[3]['optimizer']['state'], saved[2]['optimizer']['state'])
    for before, after in ((0, 1), (1, 2), (3, 4)):
        assert not same(saved[after]['model'], saved[before]['model'])
    assert [line['skipped'] for line in log(tmp_path)] == [1, 1, 1, 2, 2, 2]
    assert [line['loss'] is None for line in log(tmp_path)] == [True, False, False, True, False, False]     # JSON has no NaN
    assert all(tensor.isfinite().all() for tensor in saved[5]['model'].values())

def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(sources, tmp_path, at_batch):
    at_batch(lambda step, images: images * math.inf if step > 3 else images)
    with pytest.raises(SystemExit, match='10 steps in a row'):
        train(sources[0], tmp_path, steps=40)
    assert log(tmp_path)[-1]['step'] == 13 and log(tmp_path)[-1]['skipped'] == 10

def test_a_run_is_not_overwritten_unasked(sources, finished, tmp_path):
    before = (finished / 'ckpt.pt').read_bytes()
    with pytest.raises(SystemExit, match='--resume.*--overwrite'):
        train(sources[0], finished)
    others = ((dict(experts=2), r'experts 4 \(not 2\)'), (dict(batch=2), r'global_batch 4 \(not 2\)'),
              (dict(seed=1, lr=9.0), r'lr [0-9.]+ \(not 9.0\), seed 0 \(not 1\)'), (dict(steps=99), r'steps 6 \(not 99\)'))
    for other, sentence in others:
        with pytest.raises(SystemExit, match=sentence):
            train(sources[0], finished, resume=True, **other)
    assert (finished / 'ckpt.pt').read_bytes() == before and len(log(finished)) == 6
    for _ in range(2):
        train(sources[0], tmp_path, steps=1, overwrite=True)
    assert [line['step'] for line in log(tmp_path)] == [0]

def test_two_trainings_do_not_write_to_one_folder(sources, finished, tmp_path):
    options = dict(steps=10 ** 6, val_every=10 ** 6, log_every=10 ** 6)
    command = [sys.executable, ROOT / 'pretrain.py', *arguments(sources[0], tmp_path / 'run', **options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (tmp_path / 'run' / 'config.json').exists() and process.poll() is None:
            time.sleep(0.01)
        for options in (dict(), dict(overwrite=True), dict(resume=True)):
            with pytest.raises(SystemExit, match='run: another process trains here'):
                train(sources[0], tmp_path / 'run', steps=1, **options)
    finally:
        process.kill()
        process.wait()
    train(sources[0], tmp_path / 'run', steps=1, overwrite=True)     # what a killed run held is free again

def test_a_finished_run_says_so_and_other_data_are_refused(sources, finished, tmp_path, capsys):
    with pytest.raises(SystemExit, match='^0$'):
        train(sources[0], finished, resume=True)
    assert 'finished, all 6 steps' in capsys.readouterr().out
    write_source(tmp_path / 'data' / 'a', 'CT', 40)
    with pytest.raises(SystemExit, match=r'training_images 64 \(not 38\)'):
        train(tmp_path / 'data', finished, resume=True)

def test_a_new_run_over_an_old_one_leaves_nothing_of_it_to_resume(sources, tmp_path, at_batch):
    train(sources[0], tmp_path, steps=2)
    at_batch(lambda step, images: images if step == 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(sources[0], tmp_path, steps=2, overwrite=True)
    assert not (tmp_path / 'ckpt.pt').exists()
    with pytest.raises(ZeroDivisionError):      # what did not come to its first step is in nobody's way
        train(sources[0], tmp_path, steps=2)
    with pytest.raises(SystemExit, match='holds a run'):        # which may be under way, before its first checkpoint
        train(sources[0], tmp_path, steps=2)

def test_a_full_disk_in_a_picture_or_the_log_ends_in_a_sentence(sources, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pretrain, 'draw_grid', full)
    with pytest.raises(SystemExit, match='No space left'):
        train(sources[0], tmp_path / 'out')
    (tmp_path / 'log.jsonl').write_text('{"step": 0, "loss": 1}\n{"step": 1, "lo')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(SystemExit, match='log.jsonl: could not be saved.*untouched'):
        pretrain.save(tmp_path / 'log.jsonl', '')
    monkeypatch.undo()
    assert (tmp_path / 'log.jsonl').read_text() and not list(tmp_path.glob('*.new'))
    pretrain.open_run(tmp_path, pretrain.Options(resume=True), 1, {})
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 0, "loss": 1}\n'

def test_a_full_disk_leaves_the_checkpoint_before(sources, tmp_path, at_batch):
    (soft, hard), before = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill_the_disk(step, images):
        if step == 1:       # after the first checkpoint
            before.append((tmp_path / 'ckpt.pt').read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) // 2, hard))
        return images

    at_batch(fill_the_disk)
    try:
        with pytest.raises(SystemExit, match='ckpt.pt: could not be saved'):
            train(sources[0], tmp_path, steps=3, save_minutes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / 'ckpt.pt').read_bytes() == before[0] and not list(tmp_path.glob('*.new'))

@pytest.mark.parametrize('options, sentence', [
    (dict(batch=100), '64 . 4 images are too few.*100'), (dict(model='giant'), 'giant.*tiny'), (dict(size=30), '30'),
    (dict(seed=-1), '--seed -1'), (dict(lr='nan'), '--lr nan'), (dict(warmup='inf'), '--warmup inf'), (dict(steps=0, epochs=0), '--epochs'),
    (dict(init='missing.pt'), 'missing.pt'), (dict(device='gpu'), '--device gpu'), (dict(device='cuda:1'), '--device cuda:1'),
    (dict(val_share=2), '--val_share'), (dict(momentum=3), '--momentum')])
def test_options_that_cannot_work_end_in_a_sentence(sources, tmp_path, options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        train(sources[0], tmp_path, **options)

def test_a_published_encoder_starts_a_run(sources, finished, tmp_path):
    state = {name: value for name, value in read_checkpoint(finished / 'ckpt.pt')[0].items()
             if not name.startswith(('decoder', 'mask_token'))}
    torch.save(dict(model=state), tmp_path / 'encoder.pth')
    ours = train(sources[0], tmp_path / 'out', init=tmp_path / 'encoder.pth', steps=1, lr=0)
    assert same(ours['model']['blocks.1.attn.qkv.weight'], state['blocks.1.attn.qkv.weight'])

# ---------------------------------------------------------------------------------------------------------------------
# How fast it is

@pytest.mark.parametrize('change', [dict(experts=0), dict(top_k=1), dict(top_k=3, routing='token'), dict(mask_ratio=0.5)])
def test_counted_operations_are_those_that_torch_counts(change, monkeypatch):
    def loop(x, weights, offs):         # torch counts no grouped_mm, and of attention its plain form alone
        return torch.cat([rows @ weight for rows, weight in zip(x.tensor_split(offs[:-1].tolist()), weights)])

    monkeypatch.setattr(model.F, 'grouped_mm', loop)
    network = MAE(replace(MODEL, **change))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses, routing, _, _ = network(torch.randn(6, 3, 32, 32))
        (losses.mean() + layer_losses(routing.co, routing.scores.mean(1), routing.chosen.mean(1))[1]).backward()
    assert counter.get_total_flops() == 6 * flops(network.config)

def test_operations_of_the_known_sizes():
    assert flops(Config(experts=0)) == pytest.approx(77.0e9, rel=1e-3)
    assert flops(Config()) == pytest.approx(106.5e9, rel=1e-3)

@pytest.mark.parametrize('change', [dict(), dict(routing='token'), dict(experts=0)])
def test_blocks_compile_in_bf16_with_the_same_results_and_gradients_as_they_come(change):
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network, images, found, order = MAE(replace(MODEL, **change)), torch.randn(4, 3, 32, 32), [], []
    blocks = [*network.blocks, *network.decoder_blocks]
    for number, block in enumerate(blocks):     # in the backward pass: when it comes to a block, and to its weights' gradients
        block.norm1.weight.register_post_accumulate_grad_hook(lambda _, number=number: order.append(number))
    for compiled in (False, True):
        for block in blocks if compiled else ():        # as pretrain.py has it
            block.forward = torch.compile(block.forward, fullgraph=True, backend='aot_eager')

        def watch(block, inputs, outputs):
            outputs[0].register_hook(lambda _: order.append('first'))

        handle = network.blocks[0].register_forward_hook(watch)
        torch.manual_seed(1)
        network.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            losses, routing, _, _ = network(images, torch.full((), 0.5), torch.rand(4, 16))
        (losses.mean() + layer_losses(routing.co, routing.scores.mean(1), routing.chosen.mean(1))[0]).backward()
        handle.remove()
        found.append([losses.detach()] + [p.grad for p in network.parameters() if p.requires_grad])
        assert order == [3, 2, 1, 'first', 0]       # so DDP can send the others' while the first block computes its own
        order.clear()
    assert all((a - b).norm() <= 0.01 * a.norm() for a, b in zip(*found))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2      # one for all blocks of the encoder, one for the rest

def test_the_bench_times_both_networks_and_both_gates(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'GATES', ((32, 2), (64, 1)))
    monkeypatch.setattr(pretrain, 'tqdm', pretrain.tqdm)        # what the bench replaces comes back after the test
    monkeypatch.setattr(pretrain, 'validate', pretrain.validate)
    bench.real_steps(arguments(sources[0], tmp_path / 'out'), warm=2, count=4)
    bench.gates(MODEL)
    lines = capsys.readouterr().out.splitlines()
    dex, mae = (next(line for line in lines if line.startswith(name)) for name in ('DEX:', 'MAE:'))
    for line, config, phases in ((dex, MODEL, 5), (mae, replace(MODEL, experts=0), 4)):
        assert f'{flops(config) / 1e9:.1f} GFLOP' in line and 'MFU 0.000' in line      # no chip, no guess
        shares = [float(word) for word in re.findall(r'([0-9.]+)%', line)]
        assert len(shares) == phases and 60 < sum(shares) < 140     # medians need not add up
    assert 'efficiency' in lines[-5]
    gates = [re.search(r'(\w+)-wise.* (\d+) images of (\d+) pixels: ([0-9.]+) MFLOP', line).groups() for line in lines[-4:]]
    assert [gate[:3] for gate in gates] == [(kind, *rest) for rest in (('2', '32'), ('1', '64')) for kind in ('image', 'token')]
    assert float(gates[1][3]) == pytest.approx(17 * float(gates[0][3]), rel=0.1)      # as many as an image has tokens
    assert not (tmp_path / 'out').exists()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_steady_step_never_waits_for_the_gpu(sources, tmp_path):
    o = replace(pretrain.Options(), **dict(TINY, data=str(sources[0]), out=str(tmp_path), device='cuda', steps=1000, log_every=1000))
    run = pretrain.set_up(o, *pretrain.setup('cuda'))
    run.last = 5        # compiles, validates, fills the caches
    pretrain.train(run)
    run.first, run.last = 5, 15
    torch.cuda.set_sync_debug_mode('error')
    try:
        pretrain.train(run)
    finally:
        torch.cuda.set_sync_debug_mode('default')
