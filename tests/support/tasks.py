"""Tiny labelled tasks, a tiny pretrained checkpoint, and fine-tunings of them.

The fixtures `labelled`, `pretrained` and `tuned` of conftest.py hold what most tests share: three
prepared tasks, one checkpoint, and one finished run of each kind of task.
"""
import json
from types import SimpleNamespace

import numpy as np
import torch

import data
import finetune
from model import MAE, Config, ViT, read_checkpoint
from tests.support import naive, runs
from unetr import UNETR

SIDE = 32                           # of the stored images, in pixels
COUNTS = dict(train=12, val=4, test=5)
ENCODER = dict(size=SIDE, patch=8, width=64, heads=1, depth=4, experts=3,
               decoder_width=32, decoder_heads=2, decoder_depth=1)

# --- what lies on the disk ---------------------------------------------------------------------

def write_task(folder, segments, counts=COUNTS, classes=(), colour=False, side=SIDE):
    """Write a prepared task: bright squares on a dark ground, which a segmentation has to find;
    a classification has to tell them from dark squares on a bright ground.

    More than two names in `classes` add classes that no image shows. With `colour` the squares
    are as bright as their ground: only their red tells them.
    """
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        masks = np.zeros((count, side, side), np.uint8)
        labels = np.arange(count) % 2
        for mask in masks:
            y, x = rng.integers(2, 14, 2)
            mask[y:y + 14, x:x + 14] = 1
        shown = masks if segments else np.where(labels[:, None, None], masks, 1 - masks)
        noise = rng.integers(0, 60, shown.shape)
        images = [shown * 150 + noise]
        if colour:
            images = [shown * 150 + noise, 150 - shown * 150 + noise, noise]
        np.save(folder / split / 'images.npy', np.stack(images, 3).astype(np.uint8))
        answers = dict(masks=masks) if segments else dict(labels=labels)
        for name, values in answers.items():
            np.save(folder / split / f'{name}.npy', values)
    names = ['ground', 'square'] if segments else ['dark', 'bright']
    meta = dict(kind='segmentation' if segments else 'classification', sided=False,
                classes=list(classes) or names, modality='Photo', size=side, counts=counts)
    (folder / 'meta.json').write_text(json.dumps(meta))

def write_tasks(folder):
    """The three tasks of the fixture: find a square, tell its kind, and one without validation."""
    write_task(folder / 'find', segments=True)
    write_task(folder / 'tell', segments=False)
    write_task(folder / 'unchecked', segments=False, counts=dict(train=6, val=0, test=4))
    return folder

HUES = 12

def write_hues(folder):
    """Write a classification of flat images, each in its own of HUES colours around the circle."""
    write_task(folder, segments=False, counts=dict(train=HUES, val=4, test=5))
    angles = 2 * np.pi * np.arange(HUES) / HUES
    red, green, blue = 128 + 60 * np.cos(angles), 128 + 60 * np.sin(angles), np.full(HUES, 128)
    colours = np.stack([red, green, blue], 1).round().astype(np.uint8)
    images = np.broadcast_to(colours[:, None, None], (HUES, SIDE, SIDE, 3))
    for split in ('train', 'val', 'test'):
        count = len(np.load(folder / split / 'labels.npy'))
        np.save(folder / split / 'images.npy', images[:count])
    return folder

def hues(images):
    """The numbers of images of `write_hues` (B, 3, S, S), which no augmentation confuses."""
    centre = naive.denormalized(images)[:, :, SIDE // 2, SIDE // 2]
    angles = torch.atan2(centre[:, 1] - centre[:, 2], centre[:, 0] - centre[:, 2])
    return (angles * HUES / (2 * torch.pi)).round().long() % HUES

def write_pretrained(path, **changes):
    """Write a checkpoint as pretrain.py leaves it, with experts that have moved apart."""
    torch.manual_seed(5)
    config = Config(**ENCODER | changes)
    model = MAE(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(dict(model=model.state_dict(), config=vars(config), done=1), path)
    return path

# --- runs --------------------------------------------------------------------------------------

def tune(task, out, **options):
    """A tiny fine-tuning, which must succeed: its Result. `task` is the task's folder."""
    result = runs.finetuning(task, out, **options)
    assert result.code == 0, result.err
    return result

def apply_by_hand(out, images, pool='cls'):
    """Logits of a run's chosen network for uint8 images (n, S, S, c), of the size that it sees."""
    state, config, file = read_checkpoint(out / 'best.pt')
    classes = len(file['meta']['classes'])
    pixels = torch.tensor(np.array(images)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 255
    if file['meta']['kind'] == 'segmentation':
        net = UNETR(ViT(config), classes)
        net.load_state_dict(state)
        with torch.no_grad():
            return net(data.normalize(pixels))
    weight, bias = state.pop('head.weight'), state.pop('head.bias')
    vit = ViT(config)
    vit.load_state_dict({name.removeprefix('vit.'): value for name, value in state.items()})
    with torch.no_grad():
        tokens, _, _ = vit(data.normalize(pixels))
    looked_at = tokens[:, 0] if pool == 'cls' else tokens[:, 1:].mean(1)
    return looked_at @ weight.T + bias

# --- the encoder that fine-tuning starts from --------------------------------------------------

def encoder(size=0, **options):
    """The network that --init, --adapt and the others ask for, at its own size or another, and how
    the run is called."""
    o = finetune.Options(**options)
    path = o.init
    vit = finetune.build_encoder(path, o, size or read_checkpoint(path)[1].size)
    method = finetune.method_name(vit, path)
    return SimpleNamespace(vit=vit, config=vit.config, method=method, init=path)
