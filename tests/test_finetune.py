"""finetune.py and unetr.py: scores against naive loops, networks against others, and real runs on tiny tasks."""
import csv
import hashlib
import json
import math
import os
import re
import signal
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import finetune
import prepare_medverse
import pretrain
import report
import scaling
from model import MAE, SIZES, Config, ViT, read_checkpoint
from unetr import UNETR

SIDE = 32
ENCODER = Config(size=SIDE, patch=8, experts=3, **(SIZES['tiny'] | dict(depth=4)))
TINY = dict(device='cpu', batch=4, epochs=3, lr=1e-3)

# ---------------------------------------------------------------------------------------------------------------------
# Scores

def naive_dice(predicted, truth, c):
    both = sum(1 for p, t in zip(predicted, truth) if p == c and t == c)
    either = sum(1 for p, t in zip(predicted, truth) if p == c and t != 255) + sum(1 for t in truth if t == c)
    return 2 * both / either if either else None

def average(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None

def close(value):
    return None if value is None else pytest.approx(value)

@pytest.mark.parametrize('seed', range(4))
def test_dice_is_the_naive_one(seed):
    rng, n, C = np.random.default_rng(seed), 6, 4
    truth = rng.choice([0, 0, 1, 2, 255], (n, 5, 5))            # class 3 is never true
    predicted = rng.choice([0, 0, 1, 2, 3] if seed % 2 else [0, 0, 1, 2], (n, 5, 5))
    truth[0], predicted[0] = 0, 0                               # empty and empty
    truth[1], predicted[2] = 0, 0                               # in the prediction alone, in the truth alone
    predicted[3][truth[3] == 255] = 1
    found = finetune.dice_scores(finetune.confusions(torch.tensor(predicted), torch.tensor(truth), C).numpy())
    table = [[naive_dice(p.flatten(), t.flatten(), c) for c in range(1, C)] for p, t in zip(predicted, truth)]
    pooled = [naive_dice(predicted.flatten(), truth.flatten(), c) for c in range(1, C)]
    columns = list(zip(*table))
    for name, classes in (('dice', [average(column) for column in columns]), ('dice_pooled', pooled),
                          ('dice_empty_is_one', [average([1 if v is None else v for v in column]) for column in columns])):
        assert found[name]['per_class'] == [close(value) for value in classes], name
        assert found[name]['mean'] == close(average(classes))
    assert (found['dice']['per_class'][2] is None) == (seed % 2 == 0)
    json.dumps(found, allow_nan=False)

def test_dice_of_nothing_at_all():
    nothing = finetune.dice_scores(np.zeros((3, 3, 3), int))
    assert nothing['dice'] == dict(mean=None, per_class=[None, None]) and nothing['dice_empty_is_one']['mean'] == 1
    assert finetune.headline(nothing) == 0

@pytest.mark.parametrize('C', [2, 4])
def test_class_scores_are_the_naive_ones(C):
    rng = np.random.default_rng(C)
    guess, labels = rng.integers(0, min(C, 3), (2, 40))     # of 4, class 3 is never true nor predicted
    found = finetune.class_scores(finetune.confusions(torch.tensor(guess), torch.tensor(labels), C).numpy())
    f1 = []
    for c in range(C):
        hits = sum(1 for g, t in zip(guess, labels) if g == c and t == c)
        total = sum(guess == c) + sum(labels == c)
        f1.append(2 * hits / total if total else None)
    assert found['f1']['per_class'] == [close(v) for v in f1] and found['f1']['mean'] == close(average(f1))
    assert found['accuracy'] == sum(guess == labels) / 40
    for t in range(C):
        for g in range(C):
            assert found['confusion'][t][g] == sum((labels == t) & (guess == g))
    json.dumps(found, allow_nan=False)

def test_segmentation_loss():
    """Against its definition, pixel by pixel; ignored pixels change neither loss nor gradient."""
    logits, masks = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4))
    masks[0, :2] = 255
    loss = finetune.segmentation_loss(logits, masks)
    chance, valid = logits.softmax(1), [(b, y, x) for b in range(2) for y in range(4) for x in range(4) if masks[b, y, x] != 255]
    ce = -sum(chance[b, masks[b, y, x], y, x].log() for b, y, x in valid) / len(valid)
    dice = []
    for c in (1, 2):
        both = sum(chance[b, c, y, x] for b, y, x in valid if masks[b, y, x] == c)
        dice.append((2 * both + 1) / (sum(chance[b, c, y, x] for b, y, x in valid) + sum(masks[v] == c for v in valid) + 1))
    assert loss.item() == pytest.approx((ce + 1 - sum(dice) / 2).item(), rel=1e-5)
    loss.backward()
    assert logits.grad[0, :, :2].abs().max() == 0 and logits.grad.abs().max() > 0

def test_masks_are_augmented_with_their_images():
    """An image that shows its own mask still does after augmentation; outside the image nothing is learnt."""
    masks = torch.zeros(8, 64, 64, dtype=torch.long)
    masks[:, 8:40, 20:30], masks[:, 40:50, 10:60] = 1, 2
    images = (60 + 60 * masks).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    views, seen = data.augment_labelled(images, masks, 48)
    assert views.shape == (8, 3, 48, 48) and seen.shape == (8, 48, 48) and set(seen.unique().tolist()) == {0, 1, 2, 255}
    grey = data.denormalize(views)[:, 0]
    for view, mask in zip(grey, seen):
        levels = [view[mask == c].median() for c in (0, 1, 2)]
        assert levels[0] < levels[1] < levels[2]
        nearest = torch.stack([(view - level).abs() for level in levels]).argmin(0)
        assert (nearest == mask)[mask != 255].float().mean() > 0.93         # only edges differ
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 8
    again, labels = data.augment_labelled(images, torch.arange(8), 48)
    assert labels.tolist() == list(range(8))

def test_a_left_organ_stays_on_the_left_where_flips_are_off():
    masks = torch.zeros(64, 64, 64, dtype=torch.long)
    masks[:, 20:44, 8:24], masks[:, 20:44, 40:56] = 1, 2
    torch.manual_seed(0)
    left = {}
    for flips in (False, True):
        _, seen = data.augment_labelled(masks[:, None].expand(-1, 3, -1, -1).byte(), masks, 64, flips)
        columns = torch.arange(64.0)
        left[flips] = sum(bool(columns[(mask == 1).any(0)].mean() < columns[(mask == 2).any(0)].mean()) for mask in seen)
    assert left[False] == 64 and 16 < left[True] < 48

# ---------------------------------------------------------------------------------------------------------------------
# Networks

def parameters(module):
    return sum(p.numel() for p in module.parameters())

def test_unetr_has_the_public_size():
    """ViT-B, 256 pixels, 2 classes; and the count from the widths, layer by layer."""
    vit = ViT(Config(experts=0))
    unetr, f, C = UNETR(vit, 2), 16, 768
    block = lambda i, o: 9 * i * o + 9 * o * o + (i * o if i != o else 0)      # noqa: E731
    up = lambda i, o: 4 * i * o                                                 # noqa: E731
    skips = block(3, f) + up(C, 2 * f) + 2 * (up(2 * f, 2 * f) + block(2 * f, 2 * f)) + up(C, 4 * f) + up(4 * f, 4 * f) \
        + block(4 * f, 4 * f) + up(C, 8 * f)
    ladder = sum(up(i, o) + block(2 * o, o) for i, o in ((C, 8 * f), (8 * f, 4 * f), (4 * f, 2 * f), (2 * f, f)))
    assert parameters(unetr) - parameters(vit) == skips + ladder + 2 * f + 2 == 1_893_378

@pytest.mark.parametrize('patch, size', [(8, 32), (8, 40), (16, 48), (32, 64)])
@pytest.mark.parametrize('depth', [4, 6])
def test_unetr_sees_the_quarters(patch, size, depth):
    torch.manual_seed(0)
    net = UNETR(ViT(Config(size=size, patch=patch, experts=0, **(SIZES['tiny'] | dict(depth=depth)))), 5, features=4)
    outputs, inputs = {}, {}
    for number, block in enumerate(net.vit.blocks, 1):
        block.register_forward_hook(lambda _, __, out, number=number: outputs.update({number: out[0][:, 1:]}))
    for name, skip in zip(('3rd', '2nd', '1st'), net.skips):
        skip.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(2).mT}))
    assert net(torch.randn(2, 3, size, size)).shape == (2, 5, size, size)
    for name, number in zip(('1st', '2nd', '3rd'), {4: (1, 2, 3), 6: (1, 3, 4)}[depth]):
        assert torch.equal(inputs[name], outputs[number])
    assert UNETR(ViT(Config(experts=0)), 2).taps == [3, 6, 9]

class TimmBlock(nn.Module):
    """A block in timm's names, written with torch's own attention."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))
        self.heads = heads

    def forward(self, x):
        y = self.norm1(x)
        y, _ = nn.functional.multi_head_attention_forward(
            *[y.transpose(0, 1)] * 3, y.shape[2], self.heads, self.attn['qkv'].weight, self.attn['qkv'].bias, None, None, False, 0,
            self.attn['proj'].weight, self.attn['proj'].bias)
        x = x + y.transpose(0, 1)
        return x + self.mlp['fc2'](nn.functional.gelu(self.mlp['fc1'](self.norm2(x))))

class TimmViT(nn.Module):
    """vit_*_patch*_* minus its head, as timm names and shapes it, with learnt positions."""
    def __init__(self, width, depth, heads, patch, size):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, patch, patch)))
        self.blocks = nn.Sequential(*(TimmBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed['proj'](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))

@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A published-style checkpoint, at 48 pixels with patches of 16, and its network."""
    torch.manual_seed(3)
    timm = TimmViT(192, 4, 3, 16, 48)
    path = tmp_path_factory.mktemp('published') / 'vit.pth'
    torch.save(timm.state_dict() | {'head.weight': torch.zeros(10, 192), 'head.bias': torch.zeros(10)}, path)
    return path, timm

def options(**changes):
    return finetune.Options(**changes)

@pytest.mark.parametrize('adapt', ['director', 'experts'])
def test_a_published_checkpoint_has_the_same_features(published, adapt):
    """Also with experts, which start as its MLP: director and experts agree."""
    path, timm = published
    vit, source = finetune.encoder(options(init=str(path), adapt=adapt), 0)
    config, images = vit.config, torch.randn(2, 3, 48, 48)
    assert source['init'] == str(path)
    assert config.experts == (0 if adapt == 'director' else 8) and (config.size, config.patch, config.heads) == (48, 16, 3)
    torch.testing.assert_close(vit(images)[0], timm(images), atol=1e-4, rtol=1e-4)

@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A checkpoint as pretrain.py leaves it, with experts that have moved apart."""
    torch.manual_seed(5)
    model, path = MAE(ENCODER), tmp_path_factory.mktemp('pretrained') / 'ckpt.pt'
    for name, p in model.named_parameters():
        p.data += 0.02 * torch.randn_like(p)
    torch.save(dict(model=model.state_dict(), config=vars(ENCODER), step=1), path)
    return path

def script(*words, **more):
    """Run finetune.main in this process; returns its exit status, 0 or a sentence."""
    argv, sys.argv = sys.argv, ['finetune.py', *map(str, words), *(f'--{k}={v}' for k, v in more.items())]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        finetune.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0

def test_the_director_is_a_plain_vit_in_the_names_of_timm(pretrained, tmp_path):
    images = torch.randn(2, 3, SIDE, SIDE)
    ours = finetune.encoder(options(init=str(pretrained), adapt='director'), 0)[0]      # as the README exports it
    torch.save(ours.state_dict(), tmp_path / 'vit.pt')
    timm = TimmViT(192, 4, 3, 8, SIDE)
    timm.load_state_dict(torch.load(tmp_path / 'vit.pt', weights_only=True))       # strictly
    torch.testing.assert_close(timm(images), ours(images)[0], atol=1e-4, rtol=1e-4)
    again = finetune.encoder(options(init=str(tmp_path / 'vit.pt'), adapt='director'), 0)[0]
    assert torch.equal(ours(images)[0], again(images)[0])

# ---------------------------------------------------------------------------------------------------------------------
# Runs

def write_task(folder, segments, counts=dict(train=12, val=4, test=5)):
    """Bright squares on a dark ground, to be found or to be told from dark ones on a bright ground."""
    rng = np.random.default_rng(0)
    for split, n in counts.items():
        (folder / split).mkdir(parents=True)
        masks, labels = np.zeros((n, SIDE, SIDE), np.uint8), np.arange(n) % 2
        for mask in masks:
            y, x = rng.integers(2, 14, 2)
            mask[y:y + 14, x:x + 14] = 1
        shown = masks if segments else np.where(labels[:, None, None], masks, 1 - masks)
        np.save(folder / split / 'images.npy', np.uint8(shown * 150 + rng.integers(0, 60, shown.shape))[..., None])
        np.save(folder / split / ('masks.npy' if segments else 'labels.npy'), masks if segments else labels)
    classes = ['ground', 'square'] if segments else ['dark', 'bright']
    (folder / 'meta.json').write_text(json.dumps(dict(kind='segmentation' if segments else 'classification', classes=classes,
                                                      modality='Photo', size=SIDE, counts=counts)))

@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks')
    write_task(folder / 'find', True)
    write_task(folder / 'tell', False)
    write_task(folder / 'unchecked', False, dict(train=6, val=0, test=4))
    return folder

@pytest.fixture(scope='module')
def runs(tasks, pretrained, tmp_path_factory):
    """One run a task, with experts."""
    out = tmp_path_factory.mktemp('runs')
    for name, epochs in (('find', 12), ('tell', 6)):
        assert script(task=name, data=tasks, out=out / name, init=pretrained, **dict(TINY, epochs=epochs)) == 0
    return out

def results(out):
    return json.loads((out / 'results.json').read_text())

def test_results_say_what_was_done(runs, pretrained):
    for name, score, picture in (('find', 'dice', 'cases.png'), ('tell', 'f1', 'best.pt')):
        found = results(runs / name)
        assert found['scores'][score]['mean'] > 0.6 and (runs / name / picture).stat().st_size > 300
        assert found['counts'] == dict(train=12, val=4, test=5) and found['seed'] == 0
        assert found['init'] == str(pretrained) and found['sha256'] == hashlib.sha256(pretrained.read_bytes()).hexdigest()
        lines = [json.loads(line) for line in (runs / name / 'log.jsonl').read_text().splitlines()]
        assert found['validation'] == max(line['val'] for line in lines) and [line['step'] for line in lines] == list(
            range(2, 3 * len(lines), 3))
        assert found['config']['experts'] == 3 and found['options']['batch'] == 4
    assert sum(map(sum, results(runs / 'tell')['scores']['confusion'])) == 5
    assert set(results(runs / 'find')['scores']) == {'dice', 'dice_empty_is_one', 'dice_pooled'}

def test_several_organs_are_not_flipped(tasks, tmp_path, monkeypatch):
    """Among several classes there may be a left and a right one; of two (or in a classification) there is no such pair."""
    write_task(tmp_path / 'organs', True)
    meta = json.loads((tmp_path / 'organs' / 'meta.json').read_text()) | dict(classes=['ground', 'left', 'right'])
    (tmp_path / 'organs' / 'meta.json').write_text(json.dumps(meta))
    asked, augment = [], data.augment_labelled
    monkeypatch.setattr(data, 'augment_labelled', lambda *call: asked.append(call[3]) or augment(*call))
    for folder, name in ((tmp_path, 'organs'), (tasks, 'find'), (tasks, 'tell')):
        assert script(task=name, data=folder, init='scratch', depth=4, out=tmp_path / 'out' / name, **dict(TINY, steps=1)) == 0
    assert asked == [False, True, True]

def test_the_best_epoch_is_scored(tasks, runs, pretrained):
    """best.pt, applied by hand to the test images, has the scores of results.json."""
    state, config, file = read_checkpoint(runs / 'find' / 'best.pt', 'vit.cls_token')
    net = finetune.build(ViT(config), file['meta'], file['pool'])
    net.load_state_dict(state)
    task, dice = data.Task(tasks / 'find'), []
    for image, mask in zip(task.images['test'], task.answers['test']):
        x = data.normalize(torch.tensor(image).permute(2, 0, 1)[None].expand(-1, 3, -1, -1) / 255)
        with torch.no_grad():
            dice.append(naive_dice(net.eval()(x).argmax(1).flatten().tolist(), mask.flatten().tolist(), 1))
    assert results(runs / 'find')['scores']['dice']['mean'] == close(average(dice))

def test_the_shown_cases_are_named(tasks, runs, monkeypatch):
    """By file where each is one image, by number where not; a legend says which colour is which class."""
    state, config, file = read_checkpoint(runs / 'find' / 'best.pt', 'vit.cls_token')
    net = finetune.build(ViT(config), file['meta'], file['pool'])
    net.load_state_dict(state)
    task, drawn = data.Task(tasks / 'find'), []
    table = np.array([[[50, 0], [10, 10 * n]] for n in (3, 0, 4, 1, 2)])       # the more hits, the better
    monkeypatch.setattr(finetune, 'draw_grid', lambda *answer: drawn.append(answer))
    for task.files in ({}, dict(test=[f'test/{letter}.scan.png' for letter in 'abcde'])):
        finetune.draw_cases(None, net, task, table, torch.device('cpu'))
    for (_, rows, names, *_, note), expected in zip(drawn, (['image 2', 'image 4', 'image 1'], ['c.scan', 'e.scan', 'b.scan'])):
        assert [name.split('\n')[:2] for name in names] == [[*pair] for pair in zip(('best', 'median', 'worst'), expected)]
        assert note == f'lime is {task.classes[1]}'
        for row, n in zip(rows, (2, 4, 1)):
            assert torch.equal((row[0] * 255).byte(), torch.tensor(task.images['test'][n]).permute(2, 0, 1).expand(3, -1, -1))

def weights(out, name='ckpt.pt', key='model'):
    return torch.load(out / name, weights_only=True)[key]

def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def test_director_experts_and_blocks_train_as_asked(tasks, pretrained, tmp_path):
    vit = {name: value for name, value in read_checkpoint(pretrained)[0].items() if not name.startswith(('decoder', 'mask'))}
    run = dict(TINY, task='tell', data=tasks, init=pretrained, epochs=1)
    assert script(out=tmp_path / 'e', **run) == 0
    tuned = weights(tmp_path / 'e')
    assert all(torch.equal(tuned['vit.' + name], value) for name, value in vit.items() if 'director' in name)
    assert not torch.equal(tuned['vit.blocks.0.attn.qkv.weight'], vit['blocks.0.attn.qkv.weight'])
    assert script(out=tmp_path / 'd', adapt='director', tune_blocks=1, top_k=1, pool='mean', **run) == 0
    tuned = weights(tmp_path / 'd')
    for name, value in vit.items():
        if '.director.' in name or '.dex.' not in name:
            name = 'vit.' + name.replace('.dex.director.', '.mlp.')
            assert torch.equal(tuned[name], value) == (not name.startswith('vit.blocks.3.')), name
    assert results(tmp_path / 'd')['method'] == f'DEX-D-{pretrained.parent.name}-tune_blocks-1-top_k-1-pool-mean'

def test_without_validation_the_last_epoch_counts(tasks, tmp_path, capsys):
    assert script(task='unchecked', data=tasks, out=tmp_path, init='scratch', depth=4, patch=8, **TINY) == 0
    assert equal(weights(tmp_path), weights(tmp_path, 'best.pt', 'model'))
    assert results(tmp_path)['sha256'] is None and results(tmp_path)['validation'] is None
    assert 'validation' not in capsys.readouterr().err

def test_a_fraction_is_the_same_for_every_method(tasks, pretrained, tmp_path):
    seen = {}
    for adapt in ('experts', 'director'):
        ids, gather = [], data.Task.gather
        def spy(task, split, chosen, ids=ids):
            ids.extend(chosen.tolist() if split == 'train' else [])
            return gather(task, split, chosen)
        data.Task.gather = spy
        try:
            assert script(task='tell', data=tasks, out=tmp_path / adapt, init=pretrained, adapt=adapt, fraction=0.4, **TINY) == 0
        finally:
            data.Task.gather = gather
        seen[adapt] = ids
    assert sorted(seen['experts']) == sorted(seen['director']) == sorted(3 * list(set(seen['experts'])))
    assert len(seen['experts']) == 15
    assert results(tmp_path / 'experts')['counts']['train'] == 5

def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """As if the signal came during a step."""
    rate = finetune.learning_rate
    def learning_rate(now, *others):
        if now == step:
            os.kill(os.getpid(), number)
        return rate(now, *others)
    monkeypatch.setattr(finetune, 'learning_rate', learning_rate)

def log(out):
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name + ' is no JSON'))
            for line in (out / 'log.jsonl').read_text().splitlines()]

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_and_resumed_equals_never_stopped(tasks, runs, pretrained, tmp_path, monkeypatch, capsys, number, code):
    """Stopped in the middle of the second epoch, each step is done once; then the run is finished, and says so."""
    run = dict(TINY, task='tell', data=tasks, init=pretrained, epochs=6, out=tmp_path / 'cut')
    stop_at(monkeypatch, 4, number)
    assert script(**run) == code
    monkeypatch.undo()
    assert 'saved after 5 of 18 steps; go on with --resume' in capsys.readouterr().out
    assert weights(tmp_path / 'cut', key='step') == 5 and [line['step'] for line in log(tmp_path / 'cut')] == [2]
    assert '--resume' in script(**run)
    assert script('--resume', **run) == 0
    for name in ('ckpt.pt', 'best.pt'):
        assert equal(weights(runs / 'tell', name), weights(tmp_path / 'cut', name)), name
    assert results(runs / 'tell')['scores'] == results(tmp_path / 'cut')['scores']
    assert log(runs / 'tell') == log(tmp_path / 'cut')
    before = (tmp_path / 'cut' / 'results.json').read_bytes()
    capsys.readouterr()
    assert script('--resume', **run) == 0 and 'finished' in capsys.readouterr().out
    assert (tmp_path / 'cut' / 'results.json').read_bytes() == before

@pytest.mark.parametrize('listed', [True, False])
def test_no_run_goes_on_with_other_images(tasks, pretrained, tmp_path, monkeypatch, listed):
    """Prepared again, another split of as many images is told by split.json or, without one, by its answers."""
    task, run = tmp_path / 'task', dict(TINY, task='task', data=tmp_path, init=pretrained, out=tmp_path / 'out')
    write_task(task, False)
    split = dict(train=['a.png'], val=[], test=['b.png'])
    if listed:
        (task / 'split.json').write_text(json.dumps(split))
    stop_at(monkeypatch, 1)
    assert script(**run) == 143
    if listed:
        (task / 'split.json').write_text(json.dumps(split | dict(train=['b.png'], test=['a.png'])))
    else:
        np.save(task / 'train' / 'labels.npy', np.load(task / 'train' / 'labels.npy')[::-1])
    assert 'with split ' in script('--resume', **run)

def test_a_run_goes_on_as_it_began_or_anew(tasks, pretrained, tmp_path, monkeypatch):
    run = dict(TINY, task='tell', data=tasks, init=pretrained, out=tmp_path / 'out', epochs=1)
    assert script(**run) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    for name, value in dict(batch=2, steps=9, tune_blocks=1, adapt='director', task='unchecked', seed=1).items():
        assert 'as it began' in script('--resume', **dict(run, **{name: value})), name
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'ckpt.pt').write_bytes(pretrained.read_bytes())
    assert 'nor a fine-tuned run' in script('--resume', **dict(run, out=tmp_path / 'other'))      # of pretraining
    (tmp_path / 'out' / 'ckpt.pt').unlink()       # big, and no longer needed; what it left is not given up for that
    assert 'holds a run' in script(**run) and (tmp_path / 'out' / 'results.json').exists()
    monkeypatch.setattr(finetune, 'learning_rate', lambda *_: 1 / 0)        # as if killed at the first step
    try:
        script('--overwrite', **run)
    except ZeroDivisionError:
        pass
    assert not {'ckpt.pt', 'best.pt', 'results.json'} & {path.name for path in (tmp_path / 'out').iterdir()}

def test_a_step_that_is_not_finite_is_skipped(tasks, pretrained, tmp_path, monkeypatch):
    """As if one image of the second of three steps made the loss infinite; the checksum is of what was loaded."""
    init = tmp_path / 'init.pt'
    init.write_bytes(pretrained.read_bytes())
    sha256, steps, loss = hashlib.sha256(init.read_bytes()).hexdigest(), iter(range(99)), finetune.F.cross_entropy
    def poisoned(logits, answers):
        init.write_bytes(b'another')
        return loss(logits, answers) * (math.inf if next(steps) == 1 else 1)
    monkeypatch.setattr(finetune.F, 'cross_entropy', poisoned)
    assert script(task='tell', data=tasks, init=init, out=tmp_path / 'out', **dict(TINY, epochs=1)) == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / 'out').values())
    found = results(tmp_path / 'out')
    assert found['skipped'] == 1
    assert found['sha256'] == sha256 and found['method'] == 'DEX-E-init'

@pytest.mark.parametrize('from_step, advice', [(0, 'images'), (2, '--lr')])
def test_ten_steps_in_a_row_that_are_not_finite_end_it(tasks, pretrained, tmp_path, monkeypatch, from_step, advice):
    """What led there is in the log, as JSON."""
    steps, loss = iter(range(99)), finetune.F.cross_entropy
    monkeypatch.setattr(finetune.F, 'cross_entropy', lambda *x: loss(*x) * (math.nan if next(steps) >= from_step else 1))
    sentence = script(task='tell', data=tasks, init=pretrained, out=tmp_path, **dict(TINY, epochs=5))
    assert '10 steps in a row' in sentence and advice in sentence and not (tmp_path / 'results.json').exists()
    entries = log(tmp_path)
    assert next(steps) == from_step + 10 and entries[-1]['loss'] is None and entries[-1]['skipped'] == (9 if from_step == 0 else 7)

# ---------------------------------------------------------------------------------------------------------------------
# Prediction and report

def test_masks_of_new_pictures_and_volumes(runs, tmp_path, capsys):
    rng, new = np.random.default_rng(1), tmp_path / 'new'
    new.mkdir()
    picture = np.uint8(rng.integers(0, 60, (50, 70, 3)))
    picture[10:40, 20:50] += 150
    Image.fromarray(picture).save(new / 'picture.png')
    Image.fromarray(picture).save(new / 'photo.jpg', quality=95)
    volume = np.float32(rng.integers(0, 60, (40, 4, 44)))
    volume[8:28, :, 10:30] += 150
    affine = np.array([[0, 3.0, 0, 5], [-1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(volume, affine), new / 'scan.nii.gz')
    nib.save(nib.Nifti1Pair(volume, affine), new / 'pair.img')
    (new / 'broken.png').write_bytes(b'no picture')
    files = [new / name for name in ('broken.png', 'picture.png', 'photo.jpg', 'scan.nii.gz', 'pair.img', 'pair.hdr')]
    assert script('--predict', *files, out=runs / 'find', device='cpu') == 1
    assert 'broken.png' in capsys.readouterr().err
    folder = runs / 'find' / 'predictions' / new.relative_to('/')
    mask = np.asarray(Image.open(folder / 'picture.png-mask.png'))
    truth = np.zeros((50, 70), bool)
    truth[10:40, 20:50] = True
    assert mask.shape == truth.shape and naive_dice(mask.flatten(), truth.flatten(), 1) > 0.6
    assert np.mean(np.asarray(Image.open(folder / 'photo.jpg-mask.png')) == mask) > 0.95
    truth = np.zeros(volume.shape, bool)
    truth[8:28, :, 10:30] = True
    for name in ('scan.nii.gz', 'pair.img', 'pair.hdr'):
        scan = nib.load(folder / f'{name}-mask.nii.gz')
        assert scan.shape == volume.shape and np.array_equal(scan.affine, affine) and scan.get_data_dtype() == np.uint8
        assert naive_dice(np.asarray(scan.dataobj).flatten(), truth.flatten(), 1) > 0.6
    overlays = {path.name for path in folder.glob('*overlay*')}
    assert len(overlays) == 5 and Image.open(folder / 'picture.png-overlay.png').size == (70, 50)

def test_no_file_takes_the_place_of_another(runs, tmp_path, capsys, monkeypatch):
    """Where a mask lies does not depend on what else is asked for, nor on how the file is named."""
    for number, name in enumerate(('a/x.png', 'b/x.png', 'a/y.png', 'a/y.jpg')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((20 + number, 30), 200, np.uint8)).save(tmp_path / name)
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 0), np.float32), np.eye(4)), tmp_path / 'a' / 'none.nii')
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.random((20, 22, 3, 2), np.float32), np.eye(4)), tmp_path / 'a' / 'film.nii')
    files, out = sorted(tmp_path.glob('*/*')), runs / 'find' / 'predictions' / tmp_path.relative_to('/')
    assert script('--predict', *files, out=runs / 'find') == 1
    sentences = capsys.readouterr().err.splitlines()
    assert len(sentences) == 1 and 'none.nii' in sentences[0]
    for number, name in enumerate(('a/x.png', 'b/x.png', 'a/y.png', 'a/y.jpg')):
        assert Image.open(out / f'{name}-mask.png').size == (30, 20 + number)
    assert nib.load(out / 'a' / 'film.nii-mask.nii.gz').shape == (20, 22, 3, 2)
    monkeypatch.chdir(tmp_path / 'b')
    before = (out / 'a' / 'x.png-mask.png').stat().st_mtime_ns
    assert script('--predict', '../a/x.png', out=runs / 'find') == 0
    assert (out / 'a' / 'x.png-mask.png').stat().st_mtime_ns > before

def test_masks_of_volumes_in_arrays_pages_and_dicom(runs, tmp_path, capsys, monkeypatch):
    """Each voxel of the mask is that of the image: squares of one brightness are found, at their places, in each layout."""
    stack = np.uint8(np.random.default_rng(3).integers(0, 60, (3, SIDE, SIDE)))     # of the task's own side: not resized
    for n, image in enumerate(stack):
        image[4 + n:20 + n, 2 + 4 * n:18 + 4 * n] += 150
    truth = stack > 140
    np.save(tmp_path / 'stack.npy', stack)
    first, *others = map(Image.fromarray, stack)
    first.save(tmp_path / 'pages.tif', save_all=True, append_images=others)
    affine = np.array([[-2.0, 0, 0, 5], [0, -2, 0, 6], [0, 0, 7, 7], [0, 0, 0, 1]])
    def series(folder, new):        # as dcm2niix: volumes in a temporary folder
        nib.save(nib.Nifti1Image(stack.T, affine), new / 'x_1.nii')
        return [new / 'x_1.nii']
    monkeypatch.setattr(prepare_medverse, 'series', series, raising=False)
    (tmp_path / 'dicom').mkdir()
    assert script('--predict', *(tmp_path / name for name in ('stack.npy', 'pages.tif', 'dicom')), out=runs / 'find') == 0
    out = runs / 'find' / 'predictions' / tmp_path.relative_to('/')
    for name, where in (('stack.npy', np.diag([-1, -1, 1, 1])), ('pages.tif', np.diag([-1, -1, 1, 1])), ('dicom/x_1.nii', affine)):
        mask = nib.load(out / f'{name}-mask.nii.gz')
        assert np.array_equal(mask.affine, where) and mask.shape == (SIDE, SIDE, 3)
        assert naive_dice(np.asarray(mask.dataobj).T.flatten(), truth.flatten(), 1) > 0.9, name
    assert Image.open(out / 'stack.npy-overlay.png').size == (SIDE, SIDE)
    # A view that runs backwards, as cut() gives it, has no tensor.
    nib.save(nib.Nifti1Image(stack.T, np.diag([1.0, 1, 1, 1])), tmp_path / 'turned.nii')
    assert script('--predict', tmp_path / 'turned.nii', out=runs / 'find') == 0
    mask = np.asarray(nib.load(out / 'turned.nii-mask.nii.gz').dataobj)
    assert naive_dice(mask.T.flatten(), truth.flatten(), 1) > 0.9

def test_an_overlay_without_foreground_shows_the_middle(tmp_path):
    images = [np.full((4, 5), value, np.uint8) for value in (0, 100, 200)]
    finetune.write_masks(tmp_path / 'x.npy', tmp_path / 'x.npy', images, [np.zeros((4, 5), np.uint8)] * 3)
    assert (np.asarray(Image.open(tmp_path / 'x.npy-overlay.png')) == 100).all()

def test_names_that_are_not_utf8_have_a_whole_table(runs, tmp_path, capsys):
    names = [os.fsencode(tmp_path) + b'/' + name for name in (b'a.png', b'\xe9.png', b'z.png')]
    for name in names:
        with open(name, 'wb') as file:
            Image.fromarray(np.zeros((9, 9), np.uint8)).save(file, 'png')
    words = [os.fsdecode(name) for name in names]
    assert script('--predict', *words, out=runs / 'tell') == 0
    with open(runs / 'tell' / 'predictions' / 'classes.csv', errors='surrogateescape') as table:
        assert [row['file'] for row in csv.DictReader(table)] == words
    (tmp_path / 'film.mp4').write_bytes(b'frames')
    assert script('--predict', *words, tmp_path / 'film.mp4', out=runs / 'tell') == 1
    assert 'film.mp4' in capsys.readouterr().err

def test_classes_of_new_pictures(runs, tmp_path, tasks):
    task = data.Task(tasks / 'tell')
    for i, image in enumerate(task.images['test']):
        Image.fromarray(image[..., 0]).save(tmp_path / f'{i}.png')
    assert script('--predict', *(tmp_path / f'{i}.png' for i in range(5)), out=runs / 'tell') == 0
    rows = list(csv.DictReader(open(runs / 'tell' / 'predictions' / 'classes.csv')))
    assert [row['file'] for row in rows] == [str(tmp_path / f'{i}.png') for i in range(5)]
    assert all(float(row['dark']) + float(row['bright']) == pytest.approx(1) for row in rows)
    right = sum(row['class'] == task.classes[label] for row, label in zip(rows, task.answers['test']))
    assert right / 5 == results(runs / 'tell')['scores']['accuracy']

def test_report(tmp_path, capsys):
    """A row for runs that differ in their seed alone; a broken file is named, and the others stay."""
    for seed, dice in enumerate((0.8, 0.9)):
        for task, method, value in (('a', 'DEX-E', dice), ('a', 'DEX-D', 0.5), ('b', 'DEX-E', None)):
            (tmp_path / f'{task}{method}{seed}').mkdir()
            (tmp_path / f'{task}{method}{seed}' / 'results.json').write_text(json.dumps(
                dict(task=task, method=method, seed=seed, steps=9, batch=4, lr=0.1, weight_decay=0, warmup=1,
                     config=dict(size=32, depth=4), scores={'dice' if task == 'a' else 'f1': dict(mean=value)})))
    (tmp_path / 'other').mkdir()
    for name, content in (('cut', '{"task": '), ('foreign', '[1]')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').write_text(content)
    (tmp_path / 'unfinished').mkdir()
    (tmp_path / 'unfinished' / 'best.pt').touch()
    report.report(sorted(tmp_path.iterdir()))
    printed = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in printed.out.splitlines()]
    assert rows[0] == ['task', 'score', 'method', 'size', 'steps', 'batch', 'lr', 'mean ± deviation', 'seeds']
    assert rows[2:] == [['a', 'Dice', 'DEX-D', '32', '9', '4', '0.1', '0.500 ± 0.000', '2'],
                        ['a', 'Dice', 'DEX-E', '32', '9', '4', '0.1', '0.850 ± 0.071', '2'],
                        ['b', 'macro-F1', 'DEX-E', '32', '9', '4', '0.1', '0.000 ± 0.000', '2']]
    assert [word in printed.err for word in ('cut', 'foreign', 'unfinished', 'aDEX', 'other')] == [True] * 3 + [False] * 2
    odd = tmp_path / 'aDEX-E1' / 'results.json'
    odd.write_text(json.dumps(json.loads(odd.read_text()) | dict(lr=9)))
    report.report(tmp_path.glob('aDEX-E*'))
    printed = capsys.readouterr().out
    assert '| 0.1 | 0.800 | 1 |' in printed and '| 9 | 0.900 | 1 |' in printed       # one has no spread
    odd.write_text(json.dumps(json.loads(odd.read_text()) | dict(lr=0.1, config=dict(size=32, depth=12))))
    report.report(tmp_path.glob('aDEX-E*'))
    printed = capsys.readouterr().out
    assert '| 0.1 | 4 | 0.800 | 1 |' in printed and '| 0.1 | 12 | 0.900 | 1 |' in printed       # what differs is shown

def test_scaling_takes_what_differs_in_one_option_alone():
    def run(method, value, **options):
        return dict(task='a', method=method, options=dict(fraction=1.0, tune_blocks=-1) | options, config=dict(top_k=2, depth=4),
                    scores=dict(f1=dict(mean=value)))
    runs = [run('DEX-E-dex', 0.5), run('DEX-E-dex', 0.7), run('DEX-E-scratch', 0.4), run('DEX-E-dex-fraction-0.4', 0.3, fraction=0.4),
            run('DEX-E-dex-pool-mean', 0.1), run('DEX-D-dex', 0.1), run('DEX-E-mae', 0.1), run('DEX-E-dex', 0.1) | dict(task='b'),
            run('DEX-E-dex-fraction-0.4-tune_blocks-1', 0.1, fraction=0.4, tune_blocks=1)]
    found = scaling.curves(runs, 'fraction', 'a')
    assert found == dict(pretrained=[(0.4, 0.3, 0.0), (1.0, 0.6, pytest.approx(0.2 / 2 ** 0.5))], scratch=[(1.0, 0.4, 0.0)])

def test_report_of_pretraining(tmp_path, capsys):
    """The last validation's L_self by what was trained; a run that is not at its last step is not finished."""
    o = vars(pretrain.Options())
    for name, changes, values in (('0', {}, (0.9, 0.5)), ('1', dict(seed=1), (0.8, 0.7)), ('2', dict(co=0.0), (0.9, 0.4)),
                                  ('3', dict(experts=0), (0.9, None)), ('4', {}, (0.3,)), ('5', dict(depth=3), (0.9, 0.2))):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps(dict(options=o | changes, steps=2)))
        lines = [dict(step=step) | ({} if value is None else dict(val_mae=value)) for step, value in enumerate(values)]
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    report.report(sorted(tmp_path.iterdir()))
    printed = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in printed.out.splitlines()[2:]]
    assert [row[1:4] + row[6:] for row in rows] == [       # and depth and co, which vary
        ['+ director', '256', '2', '0', '0.1', '0.600 ± 0.141', '2'], ['+ director', '256', '2', '3', '0.1', '0.200', '1'],
        ['+ experts', '256', '2', '0', '0.0', '0.400', '1']]
    assert re.findall(r'(\d): left out', printed.err) == ['3', '4']

# ---------------------------------------------------------------------------------------------------------------------
# Encoders of others

OWN = '''
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.patch, self.width, self.depth = 16, 24, 4
        self.stem = nn.Conv2d(3, 24, 16, 16)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        x = self.stem(images).flatten(2).mT
        outputs = []
        for layer in self.layers:
            x = x + self.dropout(layer(x).relu())
            outputs.append(torch.cat([x.mean(1, keepdim=True), x], 1))
        return outputs[-1], None, outputs

def encoder(size):
    torch.manual_seed(0)
    return Encoder(size)
'''

@pytest.mark.parametrize('task', ['find', 'tell'])
def test_an_encoder_of_the_user_is_tuned_resumed_and_applied(task, tasks, tmp_path, monkeypatch):
    file = tmp_path / 'own.py'
    file.write_text(OWN)
    run = dict(TINY, data=tasks, task=task, init=file, adapt='director', epochs=2)
    assert script(out=tmp_path / 'whole', **run) == 0
    found = results(tmp_path / 'whole')
    assert found['sha256'] == hashlib.sha256(file.read_bytes()).hexdigest() and found['method'] == 'DEX-D-own'
    assert (found['config']['patch'], found['config']['width'], found['config']['depth']) == (16, 24, 4)

    assert not finetune.own_encoder(str(file), SIDE).training      # no dropout
    stopped = tmp_path / 'stopped'
    monkeypatch.setattr(finetune, 'stop_signals', lambda: [15])     # after the first step
    assert script(out=stopped, **run) == 143
    monkeypatch.undo()
    assert script('--resume', out=stopped, **run) == 0
    assert results(stopped)['scores'] == found['scores']
    ours, theirs = (read_checkpoint(tmp_path / name / 'ckpt.pt', 'head.weight')[0] for name in ('whole', 'stopped'))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) and 'vit.stem.weight' in ours

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)).save(tmp_path / 'a.png')
    assert script('--predict', tmp_path / 'a.png', out=stopped, device='cpu') == 0
    made = [path.name for path in (stopped / 'predictions').rglob('*') if path.is_file()]
    assert sorted(made) == (['a.png-mask.png', 'a.png-overlay.png'] if task == 'find' else ['classes.csv'])
    file.write_text(OWN + '# changed')
    assert 'is not what' in script('--predict', tmp_path / 'a.png', out=stopped, device='cpu')
    (stopped / 'results.json').unlink()
    assert 'sha256' in script('--resume', out=stopped, **run)

@pytest.mark.parametrize('old, new, words, changes', [
    ('def encoder', 'def decoder', "KeyError('encoder')", {}),
    ('self.patch, self.width, self.depth =', '_ =', "no attribute 'patch'", {}),
    ('self.depth = 16, 24, 4', 'self.depth = 16, 24, 6', 'not 1 + 6 times (2, 5, 24)', {}),
    ('torch.cat([x.mean(1, keepdim=True), x], 1)', 'x', 'are [(2, 4, 24)', {}),
    ('import torch', 'import nothing_like_it', "No module named 'nothing_like_it'", {}),
    ('', '', 'needs --adapt director', dict(adapt='experts')),
    ('', '', 'takes no --top_k, --patch and --tune_blocks', dict(tune_blocks=0)),
    ('', '', 'takes no --top_k, --patch and --tune_blocks', dict(patch=8))])
def test_an_encoder_of_the_user_is_refused_in_a_sentence(old, new, words, changes, tasks, tmp_path):
    file = tmp_path / 'own.py'
    file.write_text(OWN.replace(old, new, 1))
    sentence = script(**dict(TINY, data=tasks, task='find', init=file, adapt='director', out=tmp_path / 'out') | changes)
    assert sentence.startswith(str(file)) and words in sentence and not (tmp_path / 'out').exists()

def test_patches_of_14_reach_unetr(tasks, tmp_path):
    torch.save(TimmViT(192, 4, 3, 14, 28).state_dict(), tmp_path / 'dino.pth')
    run = dict(TINY, data=tasks, task='find', init=tmp_path / 'dino.pth', adapt='director', epochs=1)
    assert script(out=tmp_path / 'out', patch=16, **run) == 0
    found = results(tmp_path / 'out')
    assert found['config']['patch'] == 16 and found['method'] == 'DEX-D-dino-patch-16'

def test_options_tell_heads_and_normalization_of_a_published_checkpoint(published):
    plain = finetune.encoder(options(init=str(published[0]), adapt='director'), 0)[0]
    half, source = finetune.encoder(options(init=str(published[0]), adapt='director', normalization='half', heads=4), 0)
    assert half.config.heads == 4 and source['method'] == 'DEX-D-vit-heads-4-normalization-half'
    assert not torch.equal(half.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    with pytest.raises(SystemExit, match='--normalization CLIP: choose from imagenet, clip, half'):
        options(normalization='CLIP')

# ---------------------------------------------------------------------------------------------------------------------
# Wrong use

def test_errors_are_sentences(tasks, runs, pretrained, published, tmp_path):
    run = dict(TINY, data=tasks, out=tmp_path / 'out', init=pretrained)
    odd = tmp_path / 'odd.pth'
    torch.save(TimmViT(192, 4, 3, 14, 28).state_dict(), odd)
    (tmp_path / 'text.pt').write_text('no checkpoint')
    for words, changes in [(['none', 'prepare_medverse.py --task'], dict(task='none')),
                           (['patches of 8, 16', '14'], dict(task='find', init=odd, size=28)),
                           (['multiple of patch'], dict(task='tell', init=published[0], size=40)),
                           (['huge'], dict(task='tell', init='scratch', model='enormous')),
                           (['text.pt'], dict(task='tell', init=tmp_path / 'text.pt')),
                           (['best.pt', 'a fine-tuned run'], dict(task='tell', init=runs / 'tell' / 'best.pt')),
                           (['--adapt', 'experts or director'], dict(task='tell', adapt='directors')),
                           (['--fraction'], dict(task='tell', fraction=2)), (['--seed -1'], dict(task='tell', seed=-1)),
                           (['--epochs'], dict(task='tell', epochs=0)), (['tests/none', 'prepare_medverse.py --task none'], dict(data='tests', task='none')),
                           (['--pool'], dict(task='tell', pool='max')),
                           (['top_k'], dict(task='tell', top_k=9)),
                           (['holds a run', '--resume'], dict(task='tell', out=runs / 'tell'))]:
        sentence = script(**dict(run, **changes))
        assert isinstance(sentence, str) and all(word in sentence for word in words), sentence
    for folder in (tmp_path / 'out', pretrained.parent):
        sentence = script('--predict', 'a.png', out=folder)
        assert 'fine-tuned' in sentence and str(folder / 'best.pt') in sentence
    assert not (tmp_path / 'out').exists()
    assert 'needs --out' in script('--predict', 'a.png')

def test_a_forgotten_init_and_a_torchrun_are_told(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = script(task='tell', data=tasks, **TINY)
    assert all(word in sentence for word in ('out/pretrain/ckpt.pt', 'out/demo/ckpt.pt', 'pretrain first', '--init', 'scratch'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert 'one process' in script(task='tell', data=tasks, init='scratch', **TINY)

@pytest.mark.parametrize('spoil, word', [
    (lambda task: (task / 'test' / 'labels.npy').write_bytes(b'cut'), 'damaged'),
    (lambda task: [np.save(task / 'test' / f'{name}.npy', np.zeros(0, int)) for name in ('images', 'labels')],
     'train or test split is empty'),
    (lambda task: np.save(task / 'train' / 'labels.npy', np.zeros(3, int)), 'train images, answers and classes do not agree'),
    (lambda task: np.save(task / 'val' / 'labels.npy', np.arange(4)), 'val images, answers and classes do not agree')])
def test_a_spoilt_task_ends_in_a_sentence(tmp_path, spoil, word):
    write_task(tmp_path / 'task', False)
    spoil(tmp_path / 'task')
    with pytest.raises(SystemExit, match=word):
        data.Task(tmp_path / 'task')
