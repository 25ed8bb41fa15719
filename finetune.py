"""Fine-tune a pretrained network for a labelled task, score it, and apply it to new images.

    python finetune.py                                              phantom vessels, from what pretrain.py --demo left
    python finetune.py --task fives --init out/pretrain/ckpt.pt     segmentation (UNETR) or classification, as the task is
    python finetune.py --task fives --init scratch --model tiny     without pretraining
    torchrun --nproc_per_node=2 finetune.py --task fives            on two GPUs
    python finetune.py --report out/*                               one table of all runs: mean and deviation over seeds
    python finetune.py --predict a.png b.nii.gz --out out/fives     masks or class probabilities of new images
    python finetune.py --export vit.pt --adapt director             the pretrained director as a plain ViT in timm's names

A task is a folder data/<task> that prepare_medverse.py --task wrote. Writes to --out: results.json, log.jsonl, best.pt,
ckpt.pt (for --resume) and a picture, cases.png or confusion.png.

Letters: B images, S side in pixels, C classes; in masks 0 is the background and 255 is left out of loss and scores.
"""
import csv
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import prepare_medverse
from model import ViT, load_weights, named_config, read_checkpoint
from pretrain import check_numbers, claim, draw_tables, learning_rate, make_optimizer, reopen, save, seed_step, setup
from unetr import UNETR

@dataclass
class Options:
    """The options; the comment beside each is its --help."""
    # files
    task: str = 'phantom-vessels'   # folder below data that holds the prepared task
    data: str = 'data'              # folder of the tasks
    out: str = ''                   # folder of this run; empty: out/<task>-<method>-<seed>
    init: str = ''                  # checkpoint, or 'scratch'; empty: out/pretrain/ckpt.pt, else out/demo/ckpt.pt
    resume: bool = False            # continue from out's checkpoint; start fresh where there is none
    overwrite: bool = False         # start anew although out holds a run
    # instead of training
    predict: tuple = ()             # files to apply the run in --out to
    report: tuple = ()              # folders of runs to tabulate
    export: str = ''                # file to write the pretrained encoder to, as --adapt and --size say
    # network
    adapt: str = 'experts'          # experts (DEX-E) or director (DEX-D, a plain ViT)
    top_k: int = 0                  # activated experts; 0: as pretrained
    tune_blocks: int = -1           # train only the last N blocks and the head; -1: everything
    pool: str = 'cls'               # what a classifier looks at: cls (class token) or mean (of the patches)
    size: int = 0                   # side of the images in pixels; 0: as stored
    model: str = 'tiny'             # from scratch only: tiny, small, base, large or huge
    depth: int = 0                  # from scratch only: blocks; 0: as the model has
    patch: int = 0                  # from scratch only: side of a patch in pixels; 0: 16
    # training (Appendix C.2.2)
    batch: int = 16                 # images per process
    epochs: int = 100               # passes over the training images
    steps: int = 0                  # optimizer steps; 0: as the epochs give
    warmup_epochs: float = 10.0     # epochs in which the learning rate rises, at most half of all
    lr: float = 1e-4                # peak learning rate
    weight_decay: float = 0.01      # on weight matrices only
    fraction: float = 1.0           # share of the training images used; the same ones for every method at one seed
    positive: str = ''              # of two classes, that of f1_positive; empty: the second
    # machine
    device: str = ''                # cpu, cuda or mps; empty: the best there is
    seed: int = 0                   # of the head, the order and the augmentation
    bf16: bool = True               # bfloat16 autocast, on CUDA only

class Classifier(nn.Module):
    """A linear head on the class token or on the mean of the patches: images (B, 3, S, S) -> logits (B, C)."""
    def __init__(self, vit, classes, pool):
        super().__init__()
        self.vit, self.pool, self.head = vit, pool, nn.Linear(vit.config.width, classes)

    def forward(self, images):
        tokens, _, _ = self.vit(images)
        return self.head(tokens[:, 0] if self.pool == 'cls' else tokens[:, 1:].mean(1))

def build(vit, meta, pool):
    """The network of a task on a ViT: UNETR for segmentation, else a linear classifier."""
    C = len(meta['classes'])
    return UNETR(vit, C) if meta['kind'] == 'segmentation' else Classifier(vit, C, pool)

def encoder(o, size):
    """The ViT that --init, --adapt and --top_k ask for, at `size` pixels (0: as pretrained), and its provenance."""
    path = o.init or ('out/pretrain/ckpt.pt' if os.path.exists('out/pretrain/ckpt.pt') else 'out/demo/ckpt.pt')
    if path == 'scratch':
        config, state = named_config(o.model, o.depth, size=size or 256, patch=o.patch or 16), None
    else:
        state, config, _ = read_checkpoint(path)
    if o.patch not in (0, config.patch):
        raise SystemExit(f'{path}: has patches of {config.patch} pixels, not {o.patch}; leave out --patch')
    experts = 0 if o.adapt == 'director' else config.experts or 8
    vit = ViT(replace(config, size=size or config.size, experts=experts, top_k=o.top_k or config.top_k))
    if state:
        load_weights(vit, state, path)
    file = Path(path).absolute()
    origin = file.parent.name if file.name == 'ckpt.pt' else file.name.removesuffix('.pt')
    method = f'DEX-{"E" if experts else "D"}-{origin}' + ''.join(
        f'-{name}-{getattr(o, name)}' for name in ('fraction', 'tune_blocks', 'top_k', 'pool')
        if getattr(o, name) != getattr(Options, name))
    return vit, dict(method=method, init=path, sha256=state and hashlib.sha256(file.read_bytes()).hexdigest())

def segmentation_loss(logits, masks):
    """Dice, over the batch and averaged over the foreground classes, plus cross-entropy (C.2.2): logits (B, C, S, S), masks
    (B, S, S) of classes, 255 left out of both."""
    valid = (masks != 255)[:, None]
    ce = F.cross_entropy(logits, masks, ignore_index=255, reduction='sum') / valid.sum().clamp(min=1)
    chance, truth = logits.softmax(1) * valid, F.one_hot(masks * valid[:, 0], logits.shape[1]).movedim(3, 1) * valid
    both, either = (chance * truth).sum((0, 2, 3)), (chance + truth).sum((0, 2, 3))
    return ce + 1 - ((2 * both + 1) / (either + 1))[1:].mean()

def confusions(predicted, masks, C):
    """Of each image its pixels (B, C, C), truth by prediction, from two tensors (B, S, S) of classes; 255 counts nowhere."""
    cells = C * C * torch.arange(len(masks), device=masks.device)[:, None, None] + C * masks + predicted
    return torch.bincount(cells[masks != 255], minlength=C * C * len(masks)).view(-1, C, C)

def dice_of(confusion):
    """Dice, which is F1, of each class (..., C) from confusion (..., C, C); masked where it is in neither."""
    return np.ma.divide(2 * confusion.diagonal(0, -2, -1), confusion.sum(-1) + confusion.sum(-2))

def summary(scores):
    """Scores (C,) and the mean of those that are not masked; None stands for none (JSON knows no NaN)."""
    return dict(mean=scores.mean().tolist(), per_class=scores.tolist())

def dice_scores(confusion):
    """Three averages of the Dice of the foreground classes, from the confusion (n, C, C) of each image: 'dice' (the
    headline) over the images where a class is in truth or prediction; 'dice_empty_is_one' over all images, 1 where it is
    in neither; 'dice_pooled' of the pixels of all images together."""
    dice = dice_of(confusion)[:, 1:]
    return dict(dice=summary(dice.mean(0)), dice_empty_is_one=summary(dice.filled(1).mean(0)),
                dice_pooled=summary(dice_of(confusion.sum(0))[1:]))

def class_scores(chances, labels, positive):
    """Scores from chances (n, C) and labels (n,); of two classes, `positive` has the 'f1_positive'. Means are over the
    classes that have a value: one in neither truth nor prediction has no F1, one never or always true no AUROC."""
    n, C = chances.shape
    confusion = np.bincount(labels * C + chances.argmax(1), minlength=C * C).reshape(C, C)     # truth by prediction
    f1, true, below = summary(dice_of(confusion)), confusion.sum(1), []
    for c in range(C):      # the pairs, one of the class and one of the rest, in the right order, twice; ties count once
        rest = np.sort(chances[labels != c, c])
        below.append(sum(np.searchsorted(rest, chances[labels == c, c], side).sum() for side in ('left', 'right')))
    return dict(f1=f1, auroc=summary(np.ma.divide(below, 2 * true * (n - true))), accuracy=confusion.trace() / n,
                confusion=confusion.tolist(), f1_positive=f1['per_class'][positive] if C == 2 else None)

def headline(scores):
    return scores['dice' if 'dice' in scores else 'f1']['mean'] or 0.0

def infer(net, images, shape):
    """uint8 (B, 3, S, S) -> logits (B, C), or of a segmentation (B, C, *shape), whatever size the network sees."""
    logits = net(data.center(images, net.vit.config.size)).float()
    return F.interpolate(logits, size=shape, mode='bilinear') if logits.dim() == 4 else logits

@torch.no_grad()
def evaluate(net, task, split, o, device, autocast):
    """Scores of a split and the table (n, ...) they come from. Every rank goes through the whole split: that takes no
    longer than waiting for one that does, and there are no shares to pad or to add up."""
    answers, table, C = task.answers[split], [], len(task.classes)
    pieces = np.array_split(np.arange(len(answers)), math.ceil(len(answers) / o.batch))
    for images, truth in data.prefetch(lambda piece: task.gather(split, piece), pieces):
        with autocast:
            logits = infer(net, images.to(device), truth.shape[1:])
        table.append(confusions(logits.argmax(1), truth.to(device), C) if task.segments else logits.softmax(1))
    table = torch.cat(table).cpu().numpy()
    if task.segments:
        return dice_scores(table), table
    return class_scores(table, answers, task.classes.index(o.positive or task.classes[-1])), table

def overlay(image, mask):
    """uint8 image (H, W) or (H, W, 3) under the classes of mask (H, W) in colours; 0 and 255 are clear."""
    names = 'lime red dodgerblue gold magenta cyan orange purple green pink sienna teal'.split()
    colours = np.array([ImageColor.getrgb(name) for name in names])[(mask.astype(int) - 1) % len(names)]
    image, shown = image.reshape(*mask.shape, -1), (mask > 0) & (mask < 255)
    return np.where(shown[..., None], image * 0.45 + colours * 0.55, image).astype(np.uint8)

@torch.no_grad()
def draw_cases(path, net, task, table, device):
    """Best, median and worst test image by mean Dice, one a row: image, truth, prediction."""
    dice = dice_of(table)[:, 1:].mean(1)
    order = dice.argsort(kind='stable')[:max(1, dice.count())]      # those without a Dice come last
    cases = order[[-1, len(order) // 2, 0]]
    images, truth = task.gather('test', cases)
    guess = infer(net, images.to(device), truth.shape[1:]).argmax(1).cpu().numpy()
    rows = [np.hstack([image, overlay(image, mask), overlay(image, predicted)])
            for image, mask, predicted in zip(images.permute(0, 2, 3, 1).numpy(), truth.numpy(), guess)]
    picture = Image.fromarray(np.vstack(rows)).resize((768, 768))
    for row, (name, case) in enumerate(zip(('best', 'median', 'worst'), cases)):
        text = f'{name}: test image {case}, Dice {dice[case]:.3f}'
        ImageDraw.Draw(picture).text((6, 256 * row + 4), text, 'white', stroke_width=2, stroke_fill='black')
    picture.save(path)

def train(o):
    """Train on the training images, choose the epoch by validation (without any: the last), score the test images once."""
    rank, world, local, device = setup(o.device)
    master, gpu, folder = rank == 0, device.type == 'cuda', Path(o.data, o.task)
    bf16 = gpu and o.bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if world == 1 and o.task.startswith('phantom-') and not folder.exists():
        script = Path(__file__).with_name('prepare_medverse.py')
        subprocess.run([sys.executable, script, '--task', o.task, '--out', folder, '--size', '64'], check=True)
    task = data.Task(folder)
    if o.positive not in ('', *task.classes):
        raise SystemExit(f'--positive {o.positive}: the classes of {o.task} are {", ".join(task.classes)}')
    torch.manual_seed(o.seed)
    vit, source = encoder(o, o.size or task.meta['size'])
    config, model = vit.config, build(vit, task.meta, o.pool).to(device)
    out = Path(o.out or f'out/{o.task}-{source["method"]}-{o.seed}')
    checkpoint, best_file, results_file = products = [out / name for name in ('ckpt.pt', 'best.pt', 'results.json')]

    counts = {split: len(answers) for split, answers in task.answers.items()}
    images = np.random.default_rng(o.seed).permutation(counts['train'])[:max(1, round(o.fraction * counts['train']))]
    epoch_steps = math.ceil(len(images) / (o.batch * world))
    steps = o.steps or o.epochs * epoch_steps
    warmup = max(1, min(round(o.warmup_epochs * epoch_steps), steps // 2))
    if o.tune_blocks >= 0:
        for part in (vit.cls_token, vit.patch_embed, vit.norm, *vit.blocks[:-o.tune_blocks or None]):
            part.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    about = dict(task=o.task, classes=task.classes, counts=counts | dict(train=len(images)), **source, seed=o.seed,
                 steps=steps, batch=o.batch, processes=world, lr=o.lr, weight_decay=o.weight_decay, warmup=warmup,
                 parameters=sum(p.numel() for p in trained), config=asdict(config))

    optimizer = make_optimizer(model, o.lr, o.weight_decay)
    first, best, minutes, skipped = 0, -1.0, 0.0, 0
    if o.resume and checkpoint.exists():
        weights, _, file = read_checkpoint(checkpoint, 'vit.cls_token')
        if others := [name for name in about if about[name] != file.get('about', {}).get(name)]:
            raise SystemExit(f'{checkpoint}: a run goes on as it began, but these options change its {", ".join(others)}')
        model.load_state_dict(weights)
        optimizer.load_state_dict(file['optimizer'])
        first, best, minutes, skipped = (file[name] for name in ('step', 'best', 'minutes', 'skipped'))
        del weights, file       # gigabytes
    net = DistributedDataParallel(model, [local] if gpu else None, broadcast_buffers=False) if world > 1 else model
    if master:
        claim(out, o)
        for product in products if o.overwrite and not first else ():
            product.unlink(missing_ok=True)
        log = reopen(out, first, about | dict(options=asdict(o)))
        print(f'{out} on {device.type}:', *(f'{name} {value}' for name, value in about.items()), sep='\n  ')

    def load(step):
        epoch, slot = divmod(step, epoch_steps)
        batch = np.array_split(np.random.default_rng((o.seed, epoch)).permutation(images), epoch_steps)[slot]
        return task.gather('train', np.array_split(batch, world)[rank % len(batch)])        # at least one image a rank

    run = dict(model=model.state_dict(), config=asdict(config), meta=task.meta, pool=o.pool)
    began, saved = time.perf_counter() - 60 * minutes, minutes
    batches = data.prefetch(load, range(first, steps))
    bar = tqdm(range(first, steps), initial=first, total=steps, unit='step', disable=not master)
    for step in bar:
        inputs, answers = next(batches)
        seed_step(o.seed, step, rank)
        inputs, answers = data.augment_labelled(inputs.to(device), answers.to(device), config.size)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, warmup, o.lr)
        with autocast:
            logits = net(inputs)
        loss = (segmentation_loss if task.segments else F.cross_entropy)(logits.float(), answers)
        loss.backward()
        finite = nn.utils.clip_grad_norm_(trained, 1.0).isfinite().item()       # the same on every rank
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        skipped += not finite
        done = step + 1
        if done % epoch_steps and done < steps:
            continue
        value = headline(evaluate(model, task, 'val', o, device, autocast)[0]) if counts['val'] else None
        if not master:
            continue
        with open(log, 'a') as file:
            file.write(json.dumps(dict(step=step, loss=loss.item(), val=value, skipped=skipped)) + '\n')
        if value is None or value > best:       # without validation every epoch is the best so far
            best = value
            save(best_file, run)
        bar.set_postfix_str(f'loss {loss.item():.3f}, validation {value or 0:.3f}')
        minutes = (time.perf_counter() - began) / 60
        if done == steps or minutes > saved + 1:
            save(checkpoint, run | dict(about=about, optimizer=optimizer.state_dict(), step=done, best=best, minutes=minutes,
                                        skipped=skipped))
            saved = minutes
    if world > 1:
        dist.destroy_process_group()
    if not master:
        return
    model.load_state_dict(read_checkpoint(best_file, 'vit.cls_token')[0])
    scores, table = evaluate(model, task, 'test', o, device, autocast)
    results = dict(scores=scores, validation=best, skipped=skipped, minutes=minutes, options=asdict(o))
    save(results_file, json.dumps(about | results, indent=1))
    if task.segments:
        draw_cases(out / 'cases.png', model, task, table, device)
    else:
        numbers = torch.tensor(scores['confusion'])[None]       # (1, C, C)
        shares = F.normalize(numbers.float(), 1, 2)
        draw_tables(out / 'confusion.png', shares, task.classes, ['truth (rows) by prediction'], numbers)
    print(f'{out}: test {"Dice" if task.segments else "macro-F1"} {headline(scores):.4f}; all scores are in results.json')

@torch.no_grad()
def predict(o):
    """Apply the run in --out to new files, into its folder predictions: masks and overlays, or classes.csv. A file that
    fails is named and the others still get theirs."""
    state, config, file = read_checkpoint(Path(o.out, 'best.pt'), 'vit.cls_token')
    meta, device, folder, rows, failed = file['meta'], setup(o.device)[3], Path(o.out, 'predictions'), [], 0
    net = build(ViT(config), meta, file['pool']).to(device)
    net.load_state_dict(state)
    folder.mkdir(exist_ok=True)
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in o.predict])
    for name in o.predict:
        try:
            images = [image for volume in prepare_medverse.read(Path(name))
                      for image in prepare_medverse.normalize(volume, meta['modality'])]        # (H, W) or (H, W, 3)
            answers = []        # masks (H, W) or chances (C,)
            for image in images:
                pixels = torch.tensor(prepare_medverse.resize(image, meta['size'])).permute(2, 0, 1).expand(1, 3, -1, -1)
                logits = infer(net, pixels.to(device), image.shape[:2])[0]
                answers.append((logits.softmax(0) if logits.dim() == 1 else logits.argmax(0).byte()).cpu().numpy())
            if meta['kind'] == 'segmentation':
                write_masks(folder / os.path.relpath(name, shared), name, images, answers)
            else:
                rows += [(name, i, meta['classes'][c.argmax()], *c.tolist()) for i, c in enumerate(answers)]
        except Exception as error:      # decoders fail in every way there is; memory and disks run out
            print(f'{name}: gets no prediction ({type(error).__name__}: {error})', file=sys.stderr)
            failed += 1
    if rows:
        with open(folder / 'classes.csv', 'w', newline='') as table:
            csv.writer(table).writerows([('file', 'image', 'class', *meta['classes']), *rows])
    print(f'{folder}: predictions of {len(o.predict) - failed} of {len(o.predict)} files')
    sys.exit(failed > 0)

def write_masks(target, name, images, masks):
    """Beside `target`: the masks as one NIfTI or, one below the other, a PNG; the overlay with the most foreground."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image, mask = max(zip(images, masks), key=lambda pair: np.count_nonzero(pair[1]))
    Image.fromarray(overlay(image, mask)).save(f'{target}-overlay.png')
    if not name.lower().endswith(('.nii', '.nii.gz')):
        Image.fromarray(np.vstack(masks)).save(f'{target}-mask.png')
    else:
        source = nib.load(name)
        volume = np.zeros(source.shape, np.uint8)
        view = prepare_medverse.cut(volume, source.affine)      # written in the order in which it was read
        view[:] = np.reshape(masks, view.shape)
        nib.save(nib.Nifti1Image(volume, source.affine, source.header, dtype=np.uint8), f'{target}-mask.nii.gz')

def report(o):
    """Print one Markdown table of the runs' headline scores: tasks by methods, mean ± deviation (number of seeds)."""
    files, found, settings = [Path(folder, 'results.json') for folder in sorted({*map(Path, o.report)})], {}, {}
    for run in [json.loads(file.read_text()) for file in files if file.exists()]:
        task = f'{run["task"]} ({"Dice" if "dice" in run["scores"] else "macro-F1"})'
        found.setdefault(task, {}).setdefault(run['method'], []).append(headline(run['scores']))
        setting = str([run.get(name) for name in ('lr', 'steps', 'batch', 'config')])
        if settings.setdefault((task, run['method']), setting) != setting:
            print(f'{task}, {run["method"]}: these runs differ in more than their seed', file=sys.stderr)
    if not found:
        raise SystemExit(f'{" ".join(o.report)}: no results.json in any of these folders')
    methods = sorted({method for row in found.values() for method in row})
    print(f'| task | {" | ".join(methods)} |\n|---{"|---" * len(methods)}|')
    for task, row in found.items():
        cells = [f'{np.mean(v):.3f}{f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else ""} ({len(v)})' if v else ''
                 for v in map(row.get, methods)]
        print(f'| {task} | {" | ".join(cells)} |')

def export(o):
    """Write the pretrained encoder at --size pixels: the director alone in timm's names, or with its experts in ours."""
    path = Path(o.export)
    if path.exists() and not o.overwrite:
        raise SystemExit(f'{path}: is here already; choose another name, or --overwrite')
    vit, _ = encoder(o, o.size)
    config, state = vit.config, vit.state_dict()
    save(path, dict(model=state, config=asdict(config)) if config.experts else state)
    print(f'{path}: {"encoder with experts" if config.experts else "plain ViT"} at {config.size} pixels')

def main():
    """Train, or what else the options ask for."""
    o = data.parse_options(Options())
    check_numbers(o)
    for holds, rule in [(o.adapt in ('experts', 'director'), '--adapt must be experts or director'),
                        (o.pool in ('cls', 'mean'), '--pool must be cls or mean'),
                        (0 < o.fraction <= 1, '--fraction must be above 0 and at most 1'),
                        (o.out or not o.predict, '--predict needs --out, the folder of a fine-tuned run')]:
        if not holds:
            raise SystemExit(rule)
    work = report if o.report else predict if o.predict else export if o.export else train
    try:
        work(o)
    except OSError as error:
        raise SystemExit(f'{error}; what was saved before is whole')
    except KeyboardInterrupt:
        print('stopped; --resume goes on from ckpt.pt, which is written once a minute, or else begins anew', file=sys.stderr)
        sys.exit(130)

if __name__ == '__main__':
    main()
