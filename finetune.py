"""Fine-tune a pretrained network for a labelled task, score it, and apply it to new images.

    python finetune.py                                            phantom vessels, from what pretrain.py --demo left
    python finetune.py --task fives --init out/pretrain/ckpt.pt   segmentation (UNETR) or classification, as the task is
    python finetune.py --task fives --init scratch --model tiny   without pretraining
    python finetune.py --predict a.png b.nii.gz --out out/fives   masks or class probabilities of new images

A task is a folder data/<task> that prepare_medverse.py --task wrote. Writes to --out: results.json, log.jsonl, best.pt,
ckpt.pt and, of a segmentation, cases.png. Ctrl-C and SIGTERM save first; --resume goes on from there.

Letters: B images, S side in pixels, C classes; in masks 0 is the background, 255 is left out of loss and scores.
"""
import csv
import hashlib
import json
import math
import os
import runpy
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import nn
from tqdm import tqdm

import data
import prepare_medverse
from model import NORMALIZATIONS, Config, ViT, load_weights, named_config, read_checkpoint
from pretrain import MAX_SKIPPED, draw_grid, learning_rate, make_optimizer, open_run, resume, run_script
from pretrain import save, seed_step, setup, stop_signals, write_line
from unetr import UNETR

@dataclass
class Options:
    """The options; the comment beside each is its --help."""
    # files
    task: str = 'phantom-vessels'   # folder below data that holds the prepared task
    data: str = 'data'              # folder of the tasks
    out: str = ''                   # folder of this run; empty: out/<task>-<method>-<seed>
    init: str = ''                  # checkpoint, FILE.py or scratch; empty: out/pretrain/ckpt.pt, else out/demo/ckpt.pt
    resume: bool = False            # continue from out's checkpoint; start fresh where there is none
    overwrite: bool = False         # start anew although out holds a run
    predict: tuple = ()             # instead of training: files, or folders of DICOM, to apply the run in --out to
    # network
    adapt: str = 'experts'          # experts (DEX-E) or director (DEX-D, a plain ViT)
    top_k: int = 0                  # activated experts; 0: as pretrained
    tune_blocks: int = -1           # train only the last N blocks and the head; -1: everything
    pool: str = 'cls'               # what a classifier looks at: cls (class token) or mean (of the patches)
    size: int = 0                   # side of the images in pixels; 0: as stored
    model: str = 'tiny'             # from scratch only: tiny, small, base, large or huge
    depth: int = 0                  # from scratch only: blocks; 0: as the model has
    patch: int = 0                  # side of a patch in pixels, to which kernels are resized; 0: as pretrained, or 16
    heads: int = 0                  # of a published checkpoint, which does not tell; 0: of 64 channels each
    normalization: str = ''         # likewise, of images: imagenet, clip or half; empty: clip for CONCH, else imagenet
    # training (Appendix C.2.2)
    batch: int = 16                 # images per step
    epochs: int = 100               # passes over the training images
    steps: int = 0                  # optimizer steps; 0: as the epochs give
    warmup_epochs: float = 10.0     # epochs in which the learning rate rises, at most half of all
    lr: float = 1e-4                # peak learning rate
    weight_decay: float = 0.01      # on weight matrices only
    fraction: float = 1.0           # share of the training images used, the same for every method at one seed
    # machine
    device: str = ''                # cpu, cuda or mps; empty: the best there is
    seed: int = 0                   # of the head, the order and the augmentation
    bf16: bool = True               # bfloat16 autocast, on CUDA only

    def __post_init__(self):
        if self.batch < 1 or not (self.steps or self.epochs):
            raise SystemExit('--batch, and --epochs or --steps, must be 1 or more')
        if self.adapt not in ('experts', 'director') or self.pool not in ('cls', 'mean') or not 0 < self.fraction <= 1:
            raise SystemExit('--adapt is experts or director, --pool cls or mean, --fraction above 0 and at most 1')
        if self.normalization not in ('', *NORMALIZATIONS):
            raise SystemExit(f'--normalization {self.normalization}: choose from {", ".join(NORMALIZATIONS)}')

class Classifier(nn.Module):
    """A linear head on the class token or on the mean of the patches: images (B, 3, S, S) -> logits (B, C)."""
    def __init__(self, vit, classes, pool):
        super().__init__()
        self.vit, self.pool, self.head = vit, pool, nn.Linear(vit.config.width, classes)

    def forward(self, images):
        tokens, _, _ = self.vit(images)
        return self.head(tokens[:, 0] if self.pool == 'cls' else tokens[:, 1:].mean(1))

def build(vit, meta, pool):     # the network of a task: UNETR for segmentation, else a linear classifier
    C = len(meta['classes'])
    return UNETR(vit, C) if meta['kind'] == 'segmentation' else Classifier(vit, C, pool)

def own_encoder(path, size):
    """The encoder of a user's Python file, whose function encoder(size) returns a module with the integers patch, width
    and depth. It maps images (B, 3, size, size), z-scored by ImageNet's mean and deviation, to what our ViT returns:
    tokens (B, 1 + n, width), the class token, then n patches row by row; None; the same of each of `depth` blocks."""
    try:
        vit = runpy.run_path(path)['encoder'](size).eval()      # without dropout
        vit.config = Config(size=size, patch=vit.patch, width=vit.width, depth=vit.depth, heads=1, experts=0)
        tokens, _, outputs = vit(torch.zeros(2, 3, size, size))
        shapes, wanted = [tuple(x.shape) for x in (tokens, *outputs)], (2, 1 + (size // vit.patch) ** 2, vit.width)
        if shapes != [wanted] * (1 + vit.depth):
            raise ValueError(f'tokens and outputs of blocks are {shapes}, not 1 + {vit.depth} times {wanted}')
    except Exception as error:      # it may be any code
        raise SystemExit(f'{path}: {error!r}; the README shows what encoder(size) returns')
    return vit

def encoder(o, size):
    """The encoder that --init, --adapt and --top_k ask for at `size` pixels (0: as pretrained); where it is from."""
    path = o.init or next(filter(os.path.exists, ('out/pretrain/ckpt.pt', 'out/demo/ckpt.pt')), None)
    if not path:
        raise SystemExit('no out/pretrain/ckpt.pt or out/demo/ckpt.pt: pretrain first, or give --init FILE or scratch')
    if path.endswith('.py'):
        if o.adapt == 'experts' or o.top_k or o.patch or o.tune_blocks >= 0:
            raise SystemExit(f'{path}: needs --adapt director, and takes no --top_k, --patch and --tune_blocks')
        vit, experts = own_encoder(path, size), 0
    else:
        if path == 'scratch':
            state, config = None, named_config(o.model, o.depth)
        else:
            state, config, _ = read_checkpoint(path, heads=o.heads, normalization=o.normalization)
        experts = 0 if o.adapt == 'director' else config.experts or 8
        vit = ViT(replace(config, size=size or config.size, patch=o.patch or config.patch, experts=experts,
                          top_k=o.top_k or config.top_k))
        if state:
            load_weights(vit, state, path)
    sha256 = None if path == 'scratch' else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    file = Path(path).absolute()
    method = f'DEX-{"E" if experts else "D"}-{file.parent.name if file.name == "ckpt.pt" else file.stem}'
    for name in ('fraction', 'tune_blocks', 'top_k', 'pool', 'patch', 'heads', 'normalization'):
        method += f'-{name}-{getattr(o, name)}' if getattr(o, name) != getattr(Options, name) else ''
    return vit, dict(method=method, init=path, sha256=sha256)

def segmentation_loss(logits, masks):
    """Cross-entropy and Dice of a batch's foreground (C.2.2), of logits (B, C, S, S) and masks (B, S, S) of classes."""
    valid = (masks != 255)[:, None]
    ce = F.cross_entropy(logits, masks, ignore_index=255, reduction='sum') / valid.sum().clamp(min=1)
    chance = logits.softmax(1) * valid
    truth = F.one_hot(masks * valid[:, 0], logits.shape[1]).movedim(3, 1) * valid       # (B, C, S, S)
    both, either = (chance * truth).sum((0, 2, 3)), (chance + truth).sum((0, 2, 3))
    return ce + 1 - ((2 * both + 1) / (either + 1))[1:].mean()

def confusions(predicted, truth, C):
    """Of each image its pixels, or its one label, as (B, C, C), truth by prediction, from two tensors (B, ...) of
    classes; what is 255 in truth counts nowhere."""
    image = torch.arange(len(truth), device=truth.device).view(-1, *[1] * (truth.dim() - 1))
    cells = C * C * image + C * truth + predicted
    return torch.bincount(cells[truth != 255], minlength=C * C * len(truth)).view(-1, C, C)

def dice_of(confusion):
    """Dice, which is F1, of each class (..., C) from confusion (..., C, C); masked where it is in neither."""
    return np.ma.divide(2 * confusion.diagonal(0, -2, -1), confusion.sum(-1) + confusion.sum(-2))

def summary(scores):
    """Scores (C,) and the mean of those that are not masked; None stands for none (JSON knows no NaN)."""
    return dict(mean=scores.mean().tolist(), per_class=scores.tolist())

def dice_scores(confusion):
    """Dice of the foreground classes from the confusions (n, C, C) of images, as three averages: 'dice' (the headline)
    over the images that have a class in truth or prediction; over all, 1 where in neither; of all pixels together."""
    dice = dice_of(confusion)[:, 1:]
    return dict(dice=summary(dice.mean(0)), dice_empty_is_one=summary(dice.filled(1).mean(0)),
                dice_pooled=summary(dice_of(confusion.sum(0))[1:]))

def class_scores(confusion):
    """F1 of the classes, accuracy and the confusion (C, C) of all images, from those (n, C, C) of each."""
    confusion = confusion.sum(0)
    accuracy = confusion.trace() / confusion.sum()
    return dict(f1=summary(dice_of(confusion)), accuracy=accuracy, confusion=confusion.tolist())

def headline(scores):
    return scores['dice' if 'dice' in scores else 'f1']['mean'] or 0.0

def infer(net, images, shape):
    """uint8 (B, 3, S, S) -> logits (B, C), or of a segmentation (B, C, *shape), whatever size the network sees."""
    logits = net(data.center(images, net.vit.config.size)).float()
    return F.interpolate(logits, size=shape, mode='bilinear') if logits.dim() == 4 else logits

@torch.no_grad()
def evaluate(net, task, split, batch, device, autocast):    # scores of a split, and its images' confusions (n, C, C)
    count, tables = len(task.answers[split]), []
    pieces = np.array_split(np.arange(count), math.ceil(count / batch))
    for images, truth in data.prefetch(lambda piece: task.gather(split, piece), pieces):
        with autocast:
            logits = infer(net, images.to(device), truth.shape[1:])
        tables.append(confusions(logits.argmax(1), truth.to(device), len(task.classes)))
    table = torch.cat(tables).cpu().numpy()
    return dice_scores(table) if task.segments else class_scores(table), table

def train(o):
    """Train on the training images, choose the epoch by validation (or the last), score the test images once."""
    *_, device = setup(o.device)
    bf16 = device.type == 'cuda' and o.bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    folder = Path(o.data, o.task)
    if o.task.startswith('phantom-') and not folder.exists():
        run_script('phantoms.py', '--out', folder, '--task', o.task, '--size', '64')
    task = data.Task(folder)
    torch.manual_seed(o.seed)
    vit, source = encoder(o, o.size or task.meta['size'])
    config, model = vit.config, build(vit, task.meta, o.pool).to(device)
    if o.tune_blocks >= 0:
        for part in (vit.cls_token, vit.patch_embed, vit.norm, *vit.blocks[:-o.tune_blocks or None]):
            part.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, o.lr, o.weight_decay)

    counts = {split: len(answers) for split, answers in task.answers.items()}
    flips = not task.segments or len(task.classes) == 2      # of several organs, a left would become a right one
    images = np.random.default_rng(o.seed).permutation(counts['train'])[:max(1, round(o.fraction * counts['train']))]
    counts['train'] = len(images)
    content = [answers.tobytes() for answers in task.answers.values()]
    content += [path.read_bytes() for path in sorted(folder.glob('*.json'))]        # meta.json, split.json
    epoch_steps = math.ceil(len(images) / o.batch)
    steps = o.steps or o.epochs * epoch_steps
    warmup = max(1, min(round(o.warmup_epochs * epoch_steps), steps // 2))
    about = dict(task=o.task, classes=task.classes, counts=counts, split=hashlib.sha256(b''.join(content)).hexdigest(),
                 **source, seed=o.seed, steps=steps, batch=o.batch, lr=o.lr, weight_decay=o.weight_decay, warmup=warmup,
                 parameters=sum(p.numel() for p in trained), config=asdict(config))

    out = Path(o.out or f'out/{o.task}-{source["method"]}-{o.seed}')
    checkpoint, best_file, results_file = (out / name for name in ('ckpt.pt', 'best.pt', 'results.json'))
    first, best, skipped, in_a_row = 0, -1.0, 0, 0
    if o.resume and checkpoint.exists():
        file = resume(checkpoint, about, model, optimizer, 'head.weight')
        first, best, skipped = file['step'], file['best'], file['skipped']
    if o.resume and results_file.exists():
        return print(f'{out}: this run is finished; its scores are in results.json')
    log = open_run(out, o, first, about | dict(options=asdict(o)))
    for product in (checkpoint, best_file, results_file) if o.overwrite and not first else ():
        product.unlink(missing_ok=True)
    print(f'{out} on {device.type}:', *(f'{name} {value}' for name, value in about.items()), sep='\n  ')

    def load(step):
        epoch, slot = divmod(step, epoch_steps)
        order = np.random.default_rng((o.seed, epoch)).permutation(images)
        return task.gather('train', np.array_split(order, epoch_steps)[slot])

    run = dict(model=model.state_dict(), config=asdict(config), meta=task.meta, pool=o.pool, **source)
    saved_at, signals = time.perf_counter(), stop_signals()
    batches = data.prefetch(load, range(first, steps))
    bar = tqdm(range(first, steps), initial=first, total=steps, unit='step')
    for step in bar:
        inputs, answers = next(batches)
        seed_step(o.seed, step, 0)
        inputs, answers = data.augment_labelled(inputs.to(device), answers.to(device), config.size, flips)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, warmup, o.lr)
        with autocast:
            logits = model(inputs)
        loss = (segmentation_loss if task.segments else F.cross_entropy)(logits.float(), answers)
        loss.backward()
        finite = nn.utils.clip_grad_norm_(trained, 1.0).isfinite().item()
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        done, skipped, in_a_row = step + 1, skipped + (not finite), 0 if finite else in_a_row + 1
        if in_a_row == MAX_SKIPPED:
            cause = 'from the first on: look at the images' if skipped == done else 'lower --lr'
            raise SystemExit(f'{out}: {MAX_SKIPPED} steps in a row had no finite loss and gradient, {cause}')
        if done % epoch_steps == 0 or done == steps:
            value = headline(evaluate(model, task, 'val', o.batch, device, autocast)[0]) if counts['val'] else None
            write_line(log, dict(step=step, loss=loss.item(), val=value, skipped=skipped))
            if value is None or value > best:       # without validation every epoch is the best so far
                best = value
                save(best_file, run)
            bar.set_postfix_str(f'loss {loss.item():.3f}' + ('' if value is None else f', validation {value:.3f}'))
        if signals or done == steps or time.perf_counter() - saved_at > 60:
            progress = dict(about=about, optimizer=optimizer.state_dict(), step=done, best=best, skipped=skipped)
            save(checkpoint, run | progress)
            saved_at = time.perf_counter()
        if signals:
            print(f'\n{checkpoint}: saved after {done} of {steps} steps; go on with --resume')
            sys.exit(128 + signals[0])

    model.load_state_dict(read_checkpoint(best_file, 'head.weight')[0])
    scores, table = evaluate(model, task, 'test', o.batch, device, autocast)
    if task.segments:
        draw_cases(out / 'cases.png', model, task, table, device)
    results = about | dict(scores=scores, validation=best, skipped=skipped, options=asdict(o))
    save(results_file, json.dumps(results, indent=1))
    print(f'{out}: test {"Dice" if task.segments else "macro-F1"} {headline(scores):.4f}; all are in results.json')

COLOURS = 'lime red dodgerblue gold magenta cyan orange purple green pink sienna teal'.split()      # of classes from 1

def overlay(image, mask):   # uint8 (H, W) or (H, W, 3) under the classes of mask (H, W); 0 and 255 are clear
    colours = np.array([ImageColor.getrgb(name) for name in COLOURS])[(mask.astype(int) - 1) % len(COLOURS)]
    image, shown = image.reshape(*mask.shape, -1), (mask > 0) & (mask < 255)
    return np.where(shown[..., None], image * 0.45 + colours * 0.55, image).astype(np.uint8)

@torch.no_grad()
def draw_cases(path, net, task, table, device):
    """Best, median and worst test image by mean Dice of the confusions, a row each, in the classes' colours."""
    dice = dice_of(table)[:, 1:].mean(1)
    order = dice.argsort(kind='stable')[:max(1, dice.count())]      # those without a Dice come last
    rows, names, files = [], [], task.files.get('test', ())
    for kind, case in zip(('best', 'median', 'worst'), order[[-1, len(order) // 2, 0]]):
        image, truth = task.gather('test', [case])
        guess = infer(net, image.to(device), truth.shape[1:]).argmax(1).cpu()
        pixels = image[0].permute(1, 2, 0).numpy()
        tiles = np.stack([pixels, overlay(pixels, truth[0].numpy()), overlay(pixels, guess[0].numpy())])
        rows.append(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255)
        name = Path(files[case]).stem[-14:] if len(files) == len(table) else f'image {case}'    # a slice of a volume
        names.append(f'{kind}\n{name}\nDice {dice[case]:.3f}')
    note = ', '.join(map('{} is {}'.format, COLOURS, task.classes[1:]))
    draw_grid(path, rows, names, ['image', 'truth', 'prediction'], (256, 256), note)

@torch.no_grad()
def predict(o):
    """Apply the run in --out to new files, into its folder predictions: classes.csv, or masks below the files' full
    paths, so that none takes another's place. A file that fails is named, and the others still get theirs."""
    best, target, rows, failed = Path(o.out, 'best.pt'), Path(o.out, 'predictions'), [], 0
    if not o.out or not best.exists():
        raise SystemExit(f'--predict needs --out, the folder of a fine-tuned (not a pretrained) run, with {best}')
    state, config, file = read_checkpoint(best, 'head.weight')
    meta, path, (*_, device) = file['meta'], file.get('init', ''), setup(o.device)
    if path.endswith('.py') and hashlib.sha256(Path(path).read_bytes()).hexdigest() != file['sha256']:
        raise SystemExit(f'{path}: is not what {best} was fine-tuned with')
    vit = own_encoder(path, config.size) if path.endswith('.py') else ViT(config)
    net = build(vit, meta, file['pool']).to(device)
    net.load_state_dict(state)
    target.mkdir(exist_ok=True)
    for name in o.predict:
        try:
            with tempfile.TemporaryDirectory() as new:
                folder = os.path.isdir(name)        # of DICOM, which becomes NIfTI files
                for path in prepare_medverse.series(Path(name), Path(new)) if folder else [Path(name)]:
                    label = os.path.join(name, path.name) if folder else name
                    images = [image for volume in prepare_medverse.read(path)
                              for image in prepare_medverse.normalize(volume, meta['modality'])]
                    answers = [apply(net, image, meta['size'], device) for image in images]
                    if meta['kind'] == 'segmentation':
                        write_masks(target / os.path.abspath(label)[1:], path, images, answers)
                    else:
                        for i, chances in enumerate(answers):
                            rows.append((label, i, meta['classes'][chances.argmax()], *chances.tolist()))
        except (Exception, SystemExit) as error:        # decoders fail in every way there is; memory and disks run out
            print(f'{name}: gets no prediction ({type(error).__name__}: {error})', file=sys.stderr)
            failed += 1
    if rows:        # names of files need not be UTF-8
        with open(target / 'classes.csv', 'w', newline='', errors='surrogateescape') as table:
            csv.writer(table).writerows([('file', 'image', 'class', *meta['classes']), *rows])
    print(f'{target}: predictions of {len(o.predict) - failed} of {len(o.predict)} files')
    sys.exit(failed > 0)

def apply(net, image, size, device):    # mask (H, W) of uint8 (H, W) or (H, W, 3), or chances (C,) of the classes
    pixels = prepare_medverse.resize(image, size).transpose(2, 0, 1).copy()     # torch takes no flipped view
    logits = infer(net, torch.from_numpy(pixels).expand(1, 3, -1, -1).to(device), image.shape[:2])[0]
    return (logits.argmax(0).byte() if logits.dim() == 3 else logits.softmax(0)).cpu().numpy()

def write_masks(target, path, images, masks):
    """Beside `target`: the overlay with the most foreground, and the mask as a PNG or, if there are several, as NIfTI.
    Pages of a picture become voxels (x, y, page), x to the left and y to the back, as other programs take them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    foreground = [np.count_nonzero(mask) for mask in masks]
    shown = np.argmax(foreground) if any(foreground) else len(masks) // 2
    Image.fromarray(overlay(images[shown], masks[shown])).save(f'{target}-overlay.png')
    nifti = path.name.lower().endswith('.hdr') or prepare_medverse.has_affine(path)
    if len(masks) == 1 and not nifti:
        return Image.fromarray(masks[0]).save(f'{target}-mask.png')
    scan = nib.load(path) if nifti else nib.Nifti1Image(np.stack(masks).T, np.diag([-1, -1, 1, 1]))
    volume = np.zeros(scan.shape, np.uint8)
    view = prepare_medverse.cut(volume, scan.affine)        # written in the order in which it was read
    view[:] = np.reshape(masks, view.shape)
    nib.save(nib.Nifti1Image(volume, scan.affine, scan.header, dtype=np.uint8), f'{target}-mask.nii.gz')

def main():
    """Train, or what else the options ask for."""
    o = prepare_medverse.parse_options(Options())
    if os.environ.get('WORLD_SIZE', '1') != '1':
        raise SystemExit('finetune.py is one process: start it by python, not by torchrun')
    try:
        predict(o) if o.predict else train(o)
    except OSError as error:
        raise SystemExit(f'{error}; what was saved before is whole')
    except KeyboardInterrupt:       # before the first step, or in what is quickly done again
        sys.exit(130)

if __name__ == '__main__':
    main()
