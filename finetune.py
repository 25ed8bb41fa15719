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
from contextlib import nullcontext
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
from pretrain import claim, learning_rate, make_optimizer, reopen, save, seed_step, setup
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
    predict: tuple = ()             # files to apply a run to: that in --out, or where --init names its best.pt, that
    report: tuple = ()              # folders of runs to tabulate
    export: str = ''                # file to write the pretrained encoder to, as --adapt and --size say
    # network
    adapt: str = 'experts'          # experts (DEX-E) or director (DEX-D, a plain ViT)
    top_k: int = 0                  # activated experts; 0: as pretrained
    tune_blocks: int = -1           # train only the last N blocks and the head; -1: everything
    pool: str = 'cls'               # what a classifier looks at: cls (class token) or mean (of the patches)
    features: int = 16              # UNETR's features at full resolution
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

def build(config, meta, pool, features):
    """The network of a task: UNETR for segmentation, else a linear classifier, on a ViT of this config."""
    vit, C = ViT(config), len(meta['classes'])
    return UNETR(vit, C, features) if meta['kind'] == 'segmentation' else Classifier(vit, C, pool)

def encoder(o, size):
    """What --init, --adapt and --top_k ask for, at `size` pixels (0: as pretrained): Config, state dict or None, path."""
    path = o.init or next(filter(os.path.exists, ('out/pretrain/ckpt.pt', 'out/demo/ckpt.pt')), '')
    if not path:
        raise SystemExit('nothing is pretrained yet: run python pretrain.py --demo, or give --init FILE or --init scratch')
    if path == 'scratch':
        state, config = None, named_config(o.model, o.depth, size=size or 256, patch=o.patch or 16)
    else:
        state, config, _ = read_checkpoint(path)
        if o.depth not in (0, config.depth) or o.patch not in (0, config.patch):
            raise SystemExit(f'{path}: has {config.depth} blocks and patches of {config.patch} pixels; leave out --depth '
                             'and --patch')
    experts = 0 if o.adapt == 'director' else config.experts or 8
    return replace(config, size=size or config.size, experts=experts, top_k=o.top_k or config.top_k), state, path

def segmentation_loss(logits, masks):
    """Dice, over the batch and averaged over the foreground classes, plus cross-entropy (C.2.2): logits (B, C, S, S), masks
    (B, S, S) of classes, 255 left out of both."""
    valid = (masks != 255)[:, None]
    ce = F.cross_entropy(logits, masks, ignore_index=255, reduction='sum') / valid.sum().clamp(min=1)
    chance, truth = logits.softmax(1) * valid, F.one_hot(masks * valid[:, 0], logits.shape[1]).movedim(3, 1) * valid
    both, either = (chance * truth).sum((0, 2, 3)), (chance + truth).sum((0, 2, 3))
    return ce + 1 - ((2 * both + 1) / (either + 1))[1:].mean()

# --- scores -------------------------------------------------------------------------------------------------------------

def overlaps(predicted, masks, classes):
    """(B, 3, C - 1) pixels of each foreground class in both, in the prediction, in the truth; 255 counts nowhere."""
    foreground = torch.arange(1, classes, device=masks.device)[:, None, None]
    p, t = ((values[:, None] == foreground) & (masks != 255)[:, None] for values in (predicted, masks))
    return torch.stack([(p & t).sum((2, 3)), p.sum((2, 3)), t.sum((2, 3))], 1)

def dice_of(counts):
    """Dice, which is F1, of counts (..., 3, C) of both, predicted, true -> (..., C); NaN where a class is in neither."""
    both, predicted, true = np.moveaxis(np.asarray(counts, float), -2, 0)
    return np.divide(2 * both, predicted + true, out=np.full(both.shape, np.nan), where=predicted + true > 0)

def summary(values):
    """Scores per class, and their mean over the classes that have one; None stands for none (JSON knows no NaN)."""
    values = [None if value is None or math.isnan(value) else float(value) for value in values]
    known = [value for value in values if value is not None]
    return dict(mean=sum(known) / len(known) if known else None, per_class=values)

def dice_scores(counts):
    """Three averages of the Dice of the foreground classes, from counts (n, 3, C - 1): 'dice' (the headline) over the images
    where a class is in truth or prediction; 'dice_empty_is_one' over all images, 1 where it is in neither; 'dice_pooled' of
    the pixels of all images together."""
    dice = dice_of(counts)
    return dict(dice=summary(summary(column)['mean'] for column in dice.T), dice_pooled=summary(dice_of(counts.sum(0))),
                dice_empty_is_one=summary(np.nan_to_num(dice, nan=1).mean(0)))

def class_scores(chances, labels, positive):
    """Scores from chances (n, C) and labels (n,); of two classes, `positive` has the 'f1_positive'. Means are over the
    classes that have a value: one in neither truth nor prediction has no F1, one never or always true no AUROC."""
    C = chances.shape[1]
    confusion = np.bincount(labels * C + chances.argmax(1), minlength=C * C).reshape(C, C)     # truth by prediction
    f1, auroc = summary(dice_of([confusion.diagonal(), confusion.sum(0), confusion.sum(1)])), []
    for c in range(C):      # the share of pairs, one of the class and one of the rest, in the right order; ties count half
        true, rest = chances[labels == c, c], np.sort(chances[labels != c, c])
        below = sum(np.searchsorted(rest, true, side).sum() for side in ('left', 'right'))
        auroc.append(below / (2 * len(true) * len(rest)) if len(true) and len(rest) else math.nan)
    return dict(f1=f1, auroc=summary(auroc), accuracy=confusion.trace() / confusion.sum(), confusion=confusion.tolist(),
                f1_positive=f1['per_class'][positive] if C == 2 else None)

def headline(scores):
    return scores['dice' if 'dice' in scores else 'f1']['mean'] or 0.0

def infer(net, images, shape=None):
    """uint8 (B, 3, S, S) -> logits (B, C), or of a segmentation (B, C, *shape), whatever size the network sees."""
    logits = net(data.center(images, net.vit.config.size)).float()
    return F.interpolate(logits, size=shape, mode='bilinear') if logits.dim() == 4 else logits

@torch.no_grad()
def evaluate(net, task, split, o, device, autocast):
    """Scores of a split and the table (n, ...) they come from. Every rank goes through the whole split: that takes no
    longer than waiting for one that does, and there are no shares to pad or to add up."""
    n, table = len(task.answers[split]), []
    pieces = np.array_split(np.arange(n), math.ceil(n / o.batch))
    for images, truth in data.prefetch(lambda piece: task.gather(split, piece), pieces):
        with autocast:
            logits = infer(net, images.to(device), truth.shape[1:])
        table.append(overlaps(logits.argmax(1), truth.to(device), len(task.classes)) if task.segments else logits.softmax(1))
    table = torch.cat(table).cpu().numpy()
    return dice_scores(table) if task.segments else class_scores(
        table, np.asarray(task.answers[split]), task.classes.index(o.positive)), table

# --- training -----------------------------------------------------------------------------------------------------------

def overlay(image, mask):
    """uint8 image (H, W) or (H, W, 3) under the classes of mask (H, W) in colours; class 0 is clear, 255 grey."""
    image = image if image.ndim == 3 else image[..., None].repeat(3, 2)
    names = 'lime red dodgerblue gold magenta cyan orange purple green pink sienna teal'.split()
    colours = np.array([ImageColor.getrgb(name) for name in names])[(mask.astype(int) - 1) % len(names)]
    colours[mask == 255] = 128
    return np.where((mask > 0)[..., None], image * 0.45 + colours * 0.55, image).astype(np.uint8)

@torch.no_grad()
def draw_cases(path, net, task, table, device):
    """Best, median and worst test image by mean Dice, one a row: image, truth, prediction."""
    means = [summary(row)['mean'] for row in dice_of(table)]
    order = sorted((mean, i) for i, mean in enumerate(means) if mean is not None) or [(0, 0)]
    rows = []
    for name, (mean, index) in zip(('best', 'median', 'worst'), (order[-1], order[len(order) // 2], order[0])):
        pixels, truth = task.gather('test', np.array([index]))
        mask = infer(net, pixels.to(device), truth.shape[1:]).argmax(1)[0].cpu().numpy()
        image = pixels[0].permute(1, 2, 0).cpu().numpy()
        row = Image.fromarray(np.hstack([image, overlay(image, truth[0].numpy()), overlay(image, mask)]))
        row = row.resize((768, 256), Image.Resampling.NEAREST) if row.height < 256 else row
        ImageDraw.Draw(row).text((6, 4), f'{name}: test image {index}, Dice {mean:.3f}', 'white', stroke_width=2,
                                 stroke_fill='black')
        rows.append(row)
    Image.fromarray(np.vstack(rows)).save(path)

def draw_confusion(path, confusion, classes):
    """Numbers of test images, truth by prediction; the bluer, the larger a share of its row."""
    picture = Image.new('RGB', (150 + 64 * len(classes), 48 + 64 * len(classes)), 'white')
    draw = ImageDraw.Draw(picture)
    draw.text((4, 4), 'truth (rows) by prediction (columns)', 'black')
    for t, row in enumerate(confusion):
        draw.text((4, 68 + 64 * t), classes[t][:18], 'black')
        draw.text((110 + 64 * t, 28), classes[t][:10], 'black')
        for p, count in enumerate(row):
            x, y, light = 110 + 64 * p, 44 + 64 * t, 255 - 255 * count // max(1, sum(row))
            draw.rectangle((x, y, x + 62, y + 62), (light, light, 191 + light // 4), 'lightgray')
            draw.text((x + 24, y + 24), str(count), 'black' if light > 127 else 'white')
    picture.save(path)

def train(o):
    """Train on the training images, choose the epoch by validation (without any: the last), score the test images once."""
    rank, world, local, device = setup(o.device)
    master, gpu, folder = rank == 0, device.type == 'cuda', Path(o.data, o.task)
    autocast = torch.autocast('cuda', torch.bfloat16) if gpu and o.bf16 else nullcontext()
    if master and o.task.startswith('phantom-') and not folder.exists():
        script = Path(__file__).with_name('prepare_medverse.py')
        subprocess.run([sys.executable, script, '--task', o.task, '--out', folder, '--size', '64'], check=True)
    if world > 1:
        dist.barrier()
    task = data.Task(folder)
    if o.positive and o.positive not in task.classes:
        raise SystemExit(f"--positive {o.positive}: the classes of {o.task} are {', '.join(task.classes)}")
    o = replace(o, positive=o.positive or task.classes[-1])
    config, state, path = encoder(o, o.size or task.meta['size'])
    file = Path(path).absolute()
    method = f'DEX-{"E" if config.experts else "D"}-{file.parent.name if file.name == "ckpt.pt" else file.stem}' + ''.join(
        f'-{name}-{getattr(o, name)}' for name in ('fraction', 'tune_blocks', 'top_k', 'pool')
        if getattr(o, name) != getattr(Options, name))
    out = Path(o.out or f'out/{o.task}-{method}-{o.seed}')
    checkpoint, best_file, results_file = products = [out / name for name in ('ckpt.pt', 'best.pt', 'results.json')]
    for product in products:
        claim(product, replace(o, resume=o.resume and (checkpoint.exists() or not results_file.exists())))

    torch.manual_seed(o.seed)
    model = build(config, task.meta, o.pool, o.features).to(device)
    if state is not None:
        load_weights(model.vit, state, path)
    if o.tune_blocks >= 0:
        vit = model.vit
        for part in (vit.cls_token, vit.patch_embed, vit.norm, *vit.blocks[:max(0, config.depth - o.tune_blocks)]):
            part.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, o.lr, o.weight_decay)
    first, best, minutes, skipped = 0, -1.0, 0.0, torch.zeros((), dtype=torch.long, device=device)
    sha256 = state and hashlib.sha256(file.read_bytes()).hexdigest()
    if o.resume and checkpoint.exists():
        weights, _, file = read_checkpoint(checkpoint, 'vit.cls_token')
        changed = [f'--{name} is {getattr(o, name)} and was {value}' for name, value in file['options'].items()
                   if getattr(o, name) != value and name not in ('data', 'out', 'resume', 'overwrite', 'device', 'bf16')]
        if changed:
            raise SystemExit(f'{checkpoint}: a run goes on as it began, but {", ".join(changed)}; --overwrite starts anew')
        model.load_state_dict(weights)
        optimizer.load_state_dict(file['optimizer'])
        first, best, minutes, skipped = file['step'], file['best'], file['minutes'], skipped + file['skipped']
    elif master:
        for product in products:
            product.unlink(missing_ok=True)
    net = DistributedDataParallel(model, [local] if gpu else None, broadcast_buffers=False) if world > 1 else model

    counts = {split: len(answers) for split, answers in task.answers.items()}
    images = np.random.default_rng(o.seed).permutation(counts['train'])[:max(1, round(o.fraction * counts['train']))]
    counts['train'] = len(images)
    epoch_steps = math.ceil(len(images) / (o.batch * world))
    steps = o.steps or o.epochs * epoch_steps
    warmup = max(1, min(round(o.warmup_epochs * epoch_steps), steps // 2))
    if master:
        log = reopen(out, first, dict(options=asdict(o), model=asdict(config)))
        print(f'{o.task}: {task.meta["kind"]} into {", ".join(task.classes)}; images {counts}, seen at {config.size} pixels')
        print(f'{method}: {config.depth} blocks of width {config.width}, patches of {config.patch} pixels, '
              f'{sum(p.numel() for p in trained) / 1e6:.1f} M parameters trained; {steps} steps of {o.batch} x {world} images '
              f'({steps / epoch_steps:.1f} epochs), learning rate up to {o.lr:.1e}, on {world} x {device.type}')

    def load(step):
        epoch, slot = divmod(step, epoch_steps)
        order = np.random.default_rng((o.seed, epoch)).permutation(images)
        shares = np.array_split(np.array_split(order, epoch_steps)[slot], world)
        return task.gather('train', shares[rank] if len(shares[rank]) else shares[0])       # fewer images than ranks

    run = dict(model=model.state_dict(), config=asdict(config), meta=task.meta, pool=o.pool, features=o.features)
    saved = time.perf_counter()
    began = saved - 60 * minutes
    batches = data.prefetch(load, range(first, steps))
    for step in tqdm(range(first, steps), initial=first, total=steps, unit='step', disable=not master):
        inputs, answers = next(batches)
        seed_step(o.seed, step, rank)
        inputs, answers = data.augment_labelled(inputs.to(device), answers.to(device), config.size)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, warmup, o.lr)
        with autocast:
            logits = net(inputs)
        loss = (segmentation_loss if task.segments else F.cross_entropy)(logits.float(), answers)
        loss.backward()
        finite = torch.isfinite(torch.nn.utils.clip_grad_norm_(trained, 1.0))       # the same on every rank
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()         # fused AdamW skips the step by itself
        if device.type != 'mps' or finite:      # whose AdamW skips nothing
            optimizer.step()
        optimizer.zero_grad()
        skipped += ~finite
        if (step + 1) % epoch_steps and step + 1 < steps:
            continue
        value = headline(evaluate(model, task, 'val', o, device, autocast)[0]) if counts['val'] else None
        if not master:
            continue
        with open(log, 'a') as file:
            file.write(json.dumps(dict(step=step, loss=loss.item(), val=value, skipped=int(skipped))) + '\n')
        if value is None or value > best:       # without validation every epoch is the best so far
            best = value
            save(best_file, **run)
        now = time.perf_counter()
        if step + 1 == steps or now - saved > 60:
            save(checkpoint, **run, optimizer=optimizer.state_dict(), step=step + 1, best=best, skipped=int(skipped),
                 minutes=(now - began) / 60, options=asdict(o))
            saved = now
    if world > 1:
        dist.destroy_process_group()
    if not master:
        return
    model.load_state_dict(read_checkpoint(best_file, 'vit.cls_token')[0])
    scores, table = evaluate(model, task, 'test', o, device, autocast)
    results = dict(task=o.task, method=method, seed=o.seed, scores=scores, validation=best, classes=task.classes,
                   counts=counts, init=path, sha256=sha256, skipped=int(skipped),
                   minutes=(time.perf_counter() - began) / 60, config=asdict(config), options=asdict(o))
    (out / 'results.new').write_text(json.dumps(results, indent=1))
    os.replace(out / 'results.new', results_file)
    if task.segments:
        draw_cases(out / 'cases.png', model, task, table, device)
    else:
        draw_confusion(out / 'confusion.png', scores['confusion'], task.classes)
    print(f'{out}: test {"Dice" if task.segments else "macro-F1"} {headline(scores):.4f}; all scores are in results.json'
          + f'; {skipped} steps skipped, as their gradient was not finite' * bool(skipped))

# --- using and comparing runs -------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(o):
    """Apply a run to new files: a mask in each image's own size (NIfTI keeps its affine and shape) with an overlay, or
    classes.csv; files of several folders keep these below the one they share. A file that fails is named and the others
    still get theirs; returns how many failed."""
    run = Path(o.init or Path(o.out, 'best.pt'))
    folder = Path(o.out) if o.init and o.out else run.parent / 'predictions'
    state, config, file = read_checkpoint(run, 'vit.cls_token')
    files = [Path(path).absolute() for path in o.predict]
    if any(folder.absolute() in path.parents for path in files):
        raise SystemExit(f'{folder}: some of the files lie here and could be overwritten; choose another --out')
    meta, device = file['meta'], setup(o.device)[3]
    net = build(config, meta, file['pool'], file['features']).to(device)
    net.load_state_dict(state)
    segments, shared = meta['kind'] == 'segmentation', os.path.commonpath([path.parent for path in files])
    rows, made, failed = [], {}, 0

    def answer(image):
        """uint8 (H, W) or (H, W, 3) -> its mask (H, W) or chances (C,)."""
        pixels = torch.tensor(prepare_medverse.resize(image, meta['size'])).permute(2, 0, 1)[None].expand(1, 3, -1, -1)
        logits = infer(net, pixels.to(device), image.shape[:2])
        return (logits.argmax(1).byte() if segments else logits.softmax(1))[0].cpu().numpy()

    for name, path in zip(o.predict, files):
        try:
            images = [image for volume in prepare_medverse.read(path)
                      for image in prepare_medverse.normalize(volume, meta['modality'])]     # (H, W) or (H, W, 3)
            target = folder / path.parent.relative_to(shared) / Path(path.name.removesuffix('.gz')).stem
            if segments and made.setdefault(target, path) != path:
                raise ValueError(f'its mask would take the place of that of {made[target].name}')
            answers = [answer(image) for image in images]
            if segments:
                write_masks(target, path, images, answers)
            else:
                rows += [(name, i, meta['classes'][c.argmax()], *c.tolist()) for i, c in enumerate(answers)]
        except Exception as error:      # decoders fail in every way there is; memory and disks run out
            print(f'{name}: gets no prediction ({type(error).__name__}: {error})', file=sys.stderr)
            failed += 1
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'classes.csv', 'w', newline='') as table:
            csv.writer(table).writerows([('file', 'image', 'class', *meta['classes']), *rows])
    print(f'{folder}: predictions of {len(files) - failed} of {len(files)} files')
    return failed

def write_masks(target, path, images, masks):
    """Masks of the file `path`: one NIfTI, or a PNG an image; and the overlay of the one with the most foreground."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image, mask = max(zip(images, masks), key=lambda pair: np.count_nonzero(pair[1]))
    Image.fromarray(overlay(image, mask)).save(f'{target}-overlay.png')
    if path.name.endswith(('.nii', '.nii.gz')):
        source = nib.load(path)
        volume = np.zeros(source.shape, np.uint8)
        view = prepare_medverse.cut(volume, source.affine)      # written in the order in which it was read
        view[:] = np.reshape(masks, view.shape)
        nib.save(nib.Nifti1Image(volume, source.affine), target.with_name(path.name))
    else:
        for number, mask in enumerate(masks):
            Image.fromarray(mask).save(f'{target}{f"-{number}" * (len(masks) > 1)}.png')

def report(folders):
    """Print one Markdown table of the runs' headline scores: tasks by methods, mean ± deviation (number of seeds)."""
    lacking = [folder for folder in folders if not Path(folder, 'results.json').exists()]
    runs = [json.loads(Path(folder, 'results.json').read_text()) for folder in sorted({*folders} - {*lacking})]
    if not runs:
        raise SystemExit(f'{" ".join(folders)}: no results.json in any of these folders')
    if lacking:
        print(f'{" ".join(lacking)}: no results.json yet, so left out', file=sys.stderr)
    found = {}
    for run in runs:
        task = f'{run["task"]} ({"Dice" if "dice" in run["scores"] else "macro-F1"})'
        found.setdefault(task, {}).setdefault(run['method'], []).append(headline(run['scores']))
    methods = list(dict.fromkeys(run['method'] for run in runs))
    print(f'| task | {" | ".join(methods)} |\n|---{"|---" * len(methods)}|')
    for task, row in found.items():
        cells = [f'{np.mean(v):.3f}{f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else ""} ({len(v)})' if v else ''
                 for v in (row.get(method) for method in methods)]
        print(f'| {task} | {" | ".join(cells)} |')

def export(o):
    """Write the pretrained encoder at --size pixels: the director alone in timm's names, or with its experts in ours."""
    path = Path(o.export)
    if path.exists() and not o.overwrite:
        raise SystemExit(f'{path}: there is such a file; choose another name, or --overwrite')
    config, state, source = encoder(o, o.size)
    vit = ViT(config)
    load_weights(vit, state or vit.state_dict(), source)
    save(path, **dict(model=vit.state_dict(), config=asdict(config)) if config.experts else vit.state_dict())
    print(f'{path}: {"encoder with experts" if config.experts else "plain ViT"} at {config.size} pixels')

def main():
    """Train, or what else the options ask for."""
    o = data.parse_options(Options())
    for name, allowed in (('adapt', ('experts', 'director')), ('pool', ('cls', 'mean'))):
        if getattr(o, name) not in allowed:
            raise SystemExit(f'--{name} {getattr(o, name)}: must be {" or ".join(allowed)}')
    if min(o.batch, o.epochs, o.features) < 1 or min(o.steps, o.size, o.depth, o.patch) < 0 or not 0 < o.fraction <= 1:
        raise SystemExit('--batch, --epochs and --features must be 1 or more, --steps, --size, --depth and --patch not '
                         'negative, --fraction above 0 and at most 1')
    if bool(o.predict) + bool(o.report) + bool(o.export) > 1:
        raise SystemExit('--predict, --report and --export: one at a time')
    try:
        if o.report:
            report(o.report)
        elif o.predict:
            sys.exit(predict(o) > 0)
        elif o.export:
            export(o)
        else:
            train(o)
    except OSError as error:
        raise SystemExit(f'{error}; what was saved before is whole')
    except KeyboardInterrupt:
        print('stopped; training goes on with --resume, from the end of an epoch', file=sys.stderr)
        sys.exit(130)

if __name__ == '__main__':
    main()
