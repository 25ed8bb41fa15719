"""Fine-tune a pretrained network for a labelled task, score it, and apply it to new images.

    python finetune.py                                            phantom vessels, from out/demo
    python finetune.py --task fives --init out/pretrain/ckpt.pt   segmentation or classification
    python finetune.py --predict a.png b.nii.gz --out out/fives   masks or classes of new images

A task is a folder data/<task> that prepare_medverse.py --task wrote. Segmentation is a UNETR on the
encoder, classification a linear layer. Writes to --out: results.json, log.jsonl, best.pt, ckpt.pt
and, for segmentation, cases.png. Ctrl-C and SIGTERM save first; --resume goes on from there.
Letters as in model.py. In masks 0 is the background, and 255 is left out of loss and scores.
"""
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('GOMP_SPINCOUNT', '1000')     # before torch, as in pretrain.py
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from model import ViT, load_weights, named_config, read_checkpoint
from pretrain import end_if_diverged, learning_rate, load_run, make_optimizer, on_signals
from pretrain import parse_options, prepare_folder, run_program, save, seed_step, set_up_process
from pretrain import step_if_finite, use_bf16, write_line
from unetr import UNETR

STARTS = ('out/pretrain/ckpt.pt', 'out/demo/ckpt.pt')    # without --init, the first that exists

@dataclass
class Options:
    """Each field is an option, such as --task fives. The defaults follow Appendix C.2.2."""
    task: str = 'phantom-vessels'   # folder below data that holds the prepared task
    data: str = 'data'              # folder of the tasks
    out: str = ''                   # folder of this run; empty: out/<task>-<method>-<seed>
    init: str = ''                  # a checkpoint, scratch, or your own FILE.py; empty: see STARTS
    resume: bool = False            # continue from out's checkpoint; start fresh if there is none
    overwrite: bool = False         # start anew although out holds a run
    predict: tuple = ()             # do not train, apply the run in --out to files or DICOM folders
    adapt: str = 'experts'          # experts (DEX-E) or director (DEX-D, a plain ViT)
    top_k: int = 0                  # activated experts; 0: as pretrained
    tune_blocks: int = 100          # train the last N blocks and the head; all, if there are fewer
    pool: str = 'cls'               # what a classifier sees: cls (class token) or mean (of patches)
    size: int = 0                   # side of the images in pixels; 0: as stored
    model: str = 'tiny'             # from scratch only: tiny, small, base, large or huge
    depth: int = 0                  # from scratch only: blocks; 0: as the model has
    patch: int = 0                  # side of a patch in pixels; 0: as pretrained, or 16
    batch: int = 16                 # images per step
    epochs: int = 100               # passes over the training images
    steps: int = 0                  # optimizer steps; 0: as many as --epochs makes
    warmup_epochs: float = 10.0     # epochs of a rising learning rate, at most half of all
    lr: float = 1e-4                # peak learning rate
    weight_decay: float = 0.01      # on weight matrices only
    fraction: float = 1.0           # share of the training images used, the same for every method
    device: str = ''                # cpu, cuda or mps; empty: cuda, or cpu where there is none
    seed: int = 0                   # of the head, the order and the augmentation
    bf16: bool = True               # bfloat16 autocast, on CUDA only

    def __post_init__(self):
        if min(self.batch, self.steps or self.epochs) < 1 or not 0 < self.fraction <= 1:
            raise SystemExit('--batch, --epochs, --steps: at least 1; --fraction: above 0, up to 1')
        if self.adapt not in ('experts', 'director') or self.pool not in ('cls', 'mean'):
            raise SystemExit('--adapt is experts or director, --pool is cls or mean')

class Classifier(nn.Module):
    """A linear head on the class token or the mean patch: images (B, 3, S, S) -> (B, classes)."""
    def __init__(self, vit, classes, pool):
        super().__init__()
        self.vit, self.pool = vit, pool
        self.head = nn.Linear(vit.config.width, classes)

    def forward(self, images):
        tokens, _, _ = self.vit(images)
        return self.head(tokens[:, 0] if self.pool == 'cls' else tokens[:, 1:].mean(1))

def add_head(vit, meta, pool):
    """The network of a task with this meta.json: a UNETR for segmentation, else a Classifier."""
    if meta['kind'] == 'segmentation':
        return UNETR(vit, len(meta['classes']))
    return Classifier(vit, len(meta['classes']), pool)

def build_encoder(init, o, size):
    """The ViT that --init, --adapt, --top_k and --patch ask for, at `size` pixels."""
    if init.endswith('.py'):
        from tests.encoders.own import own_encoder      # a user's own file: not part of the method
        return own_encoder(init, size, o)
    state, config = None, named_config(o.model, o.depth)        # from scratch
    if init != 'scratch':
        state, config, _ = read_checkpoint(init)
    experts = 0
    if o.adapt == 'experts':
        experts = config.experts or 8       # a plain network gets 8 copies of its MLP
    vit = ViT(replace(config, size=size, patch=o.patch or config.patch, experts=experts,
                      top_k=o.top_k or config.top_k))
    if state:
        load_weights(vit, state, init)
    return vit

def method_name(vit, init):
    """DEX-E-<start> with experts, DEX-D-<start> without, such as DEX-E-demo of out/demo/ckpt.pt."""
    file = Path(init).absolute()
    start = file.parent.name if file.name == 'ckpt.pt' else file.stem
    return f'DEX-{"E" if vit.config.experts else "D"}-{start}'

# --- loss and scores ------------------------------------------------------------------------------
def segmentation_loss(logits, masks):
    """Cross-entropy plus Dice loss of the foreground classes, over a whole batch (C.2.2).
    logits (B, classes, S, S), masks (B, S, S)."""
    valid = (masks != 255)[:, None]     # below, 255 becomes class 0, and is then multiplied by 0
    ce = F.cross_entropy(logits, masks, ignore_index=255, reduction='sum')
    ce = ce / valid.sum().clamp(min=1)
    probability = logits.softmax(1) * valid                         # (B, classes, S, S)
    truth = F.one_hot(masks.where(valid[:, 0], 0), logits.shape[1]).movedim(3, 1) * valid
    both = (probability * truth).sum((0, 2, 3))
    sizes = (probability + truth).sum((0, 2, 3))
    dice = (2 * both + 1) / (sizes + 1)
    return ce + 1 - dice[1:].mean()

def confusions(predicted, truth, classes):
    """Confusion matrix of each image, (B, classes, classes) as [truth, prediction].
    predicted, truth: masks (B, S, S) or labels (B,). Where truth is 255, nothing is counted."""
    predicted, truth = predicted.reshape(len(truth), -1), truth.reshape(len(truth), -1)
    image = torch.arange(len(truth), device=truth.device)[:, None]
    cells = (image * classes + truth) * classes + predicted
    counts = torch.bincount(cells[truth != 255], minlength=len(truth) * classes ** 2)
    return counts.view(-1, classes, classes)

def dice_of(confusion):
    """Dice (the same as F1) of each class, masked where it is in neither truth nor prediction.
    confusion (..., classes, classes) -> masked array (..., classes)."""
    both = confusion.diagonal(0, -2, -1)
    sizes = confusion.sum(-1) + confusion.sum(-2)       # in truth and in prediction
    return np.ma.masked_where(sizes == 0, 2 * both / np.maximum(sizes, 1))

def summary(scores):
    """Mean and values of a masked array. tolist() makes None of what is masked, null in JSON."""
    return dict(mean=scores.mean().tolist(), per_class=scores.tolist())

def dice_scores(confusion):
    """Dice of each foreground class in three ways, from images' confusions (n, classes, classes).
    dice, the headline: mean over images, without those that neither have nor predict the class.
    dice_pooled: of all pixels together. dice_empty_is_one: as dice, but such images count as 1."""
    of_images = dice_of(confusion)[:, 1:]           # (n, foreground), masked where in neither
    of_pixels = dice_of(confusion.sum(0))[1:]       # (foreground,)
    return dict(dice=summary(of_images.mean(0)), dice_pooled=summary(of_pixels),
                dice_empty_is_one=summary(of_images.filled(1).mean(0)))

def class_scores(confusion):
    """F1, accuracy and confusion of all images together, from their confusions (n, ...)."""
    confusion = confusion.sum(0)
    return dict(f1=summary(dice_of(confusion)), accuracy=confusion.trace() / confusion.sum(),
                confusion=confusion.tolist())

def headline(scores):
    """The number that chooses the best epoch: mean Dice or macro-F1; 0 if no class has a score."""
    return scores['dice' if 'dice' in scores else 'f1']['mean'] or 0.0

def infer(net, images, shape):
    """uint8 (B, 3, S, S) -> logits (B, classes) or, of a segmentation, (B, classes, *shape)."""
    logits = net(data.whole_view(images, net.vit.config.size)).float()
    return F.interpolate(logits, size=shape, mode='bilinear') if logits.dim() == 4 else logits

@torch.no_grad()
def evaluate(net, task, split, batch, device, autocast):
    """Scores of a split and, for the pictures, its images' confusions (n, classes, classes)."""
    count, tables = len(task.answers[split]), []
    parts = np.array_split(np.arange(count), math.ceil(count / batch))
    for images, truth in data.prefetch(lambda ids: task.gather(split, ids), parts):
        with autocast:
            logits = infer(net, images.to(device), truth.shape[1:])
        tables.append(confusions(logits.argmax(1), truth.to(device), len(task.classes)))
    confusion = torch.cat(tables).cpu().numpy()
    scores = dice_scores(confusion) if task.segments else class_scores(confusion)
    return scores, confusion

# --- training -------------------------------------------------------------------------------------
def plan_steps(o, count):
    """Which of `count` images a run takes, and the steps of an epoch, the run and its warm-up."""
    ids = np.random.default_rng(o.seed).permutation(count)
    ids = ids[:max(1, round(o.fraction * len(ids)))]
    epoch_steps = math.ceil(len(ids) / o.batch)
    steps = o.steps or o.epochs * epoch_steps
    warmup = max(1, min(round(o.warmup_epochs * epoch_steps), steps // 2))
    return SimpleNamespace(ids=ids, epoch_steps=epoch_steps, steps=steps, warmup=warmup)

def build_network(o, init, meta, device):
    """The network of the task with this meta.json, and the optimizer of what is trained."""
    torch.manual_seed(o.seed)
    vit = build_encoder(init, o, o.size or meta['size'])
    net = add_head(vit, meta, o.pool).to(device)
    if o.tune_blocks < vit.config.depth:    # the norm before the head is frozen, too
        frozen = vit.blocks[:vit.config.depth - o.tune_blocks]
        for part in (vit.cls_token, vit.patch_embed, *frozen, vit.norm):
            part.requires_grad_(False)
    return net, make_optimizer(net, o.lr, o.weight_decay)

def run_identity(run):
    """What makes a run what it is: --resume refuses to go on if any of this has changed.
    run.origin: the method's name, and the path and hash of --init."""
    o, task, plan, config = run.o, run.task, run.plan, run.net.vit.config
    content = [answers.tobytes() for answers in task.answers.values()]
    content += [path.read_bytes() for path in sorted(Path(o.data, o.task).glob('*.json'))]
    counts = {split: len(answers) for split, answers in task.answers.items()}
    return dict(
        task=o.task, classes=task.classes, counts=dict(counts, train=len(plan.ids)),
        task_sha256=hashlib.sha256(b''.join(content)).hexdigest(), **run.origin,
        seed=o.seed, steps=plan.steps, batch=o.batch, lr=o.lr, weight_decay=o.weight_decay,
        warmup=plan.warmup, top_k=config.top_k, pool=o.pool, config=asdict(config),
        parameters=sum(p.numel() for p in run.net.parameters() if p.requires_grad))

def build_run(o):
    """All that a fine-tuning works with, new or of --out's checkpoint. Exits if it is finished."""
    *_, device = set_up_process(o.device)
    init = o.init or next(filter(os.path.exists, STARTS), STARTS[0])
    run = SimpleNamespace(o=o, device=device, task=data.Task(Path(o.data, o.task)))
    run.plan = plan_steps(o, len(run.task.answers['train']))
    run.net, run.optimizer = build_network(o, init, run.task.meta, device)
    sha256 = None if init == 'scratch' else hashlib.sha256(Path(init).read_bytes()).hexdigest()
    run.origin = dict(method=method_name(run.net.vit, init), init=init, sha256=sha256)
    run.identity = run_identity(run)
    run.out = Path(o.out or f'out/{o.task}-{run.origin["method"]}-{o.seed}')
    run.autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(o.bf16, device))
    begun = dict(done=0, best=-1.0, skipped=0)
    if o.resume and (run.out / 'ckpt.pt').exists():
        begun = load_run(run.out / 'ckpt.pt', run.identity, run.net, run.optimizer)
    run.start, run.best, run.skipped = begun['done'], begun['best'], begun['skipped']
    if o.resume and (run.out / 'results.json').exists():
        print(f'{run.out}: this run is finished; its scores are in results.json')
        sys.exit()
    return run

def network_state(run):
    """The content of best.pt: all that a prediction needs."""
    return dict(config=asdict(run.net.vit.config), meta=run.task.meta, pool=run.o.pool,
                **run.origin, model=run.net.state_dict())

def batches_left(run):
    """Yield images and answers of the steps that are left, on the device."""
    def load(step):
        epoch, slot = divmod(step, run.plan.epoch_steps)
        order = np.random.default_rng((run.o.seed, epoch)).permutation(run.plan.ids)
        return run.task.gather('train', np.array_split(order, run.plan.epoch_steps)[slot])
    for images, answers in data.prefetch(load, range(run.start, run.plan.steps)):
        yield images.to(run.device), answers.to(run.device)

def train(run):
    """Make the steps that are left; after each epoch validate, and keep the best network."""
    o, net, task, plan = run.o, run.net, run.task, run.plan
    size = net.vit.config.size
    trained = [p for p in net.parameters() if p.requires_grad]
    loss_of = segmentation_loss if task.segments else F.cross_entropy
    signals, in_a_row, saved_at = [], 0, time.perf_counter()
    on_signals(lambda number, frame: signals.append(number))
    bar = tqdm(range(run.start, plan.steps), initial=run.start, total=plan.steps, unit='step')
    for step, (images, answers) in zip(bar, batches_left(run)):
        seed_step(o.seed, step, 0)
        images, answers = data.augment_labelled(images, answers, size, flips=not task.sided)
        with run.autocast:
            logits = net(images)
        loss = loss_of(logits.float(), answers)
        loss.backward()
        rate = learning_rate(step, plan.steps, plan.warmup, o.lr)
        _, finite = step_if_finite(run.optimizer, rate, trained, clip=1.0)
        run.skipped += int(not finite)
        in_a_row = 0 if finite else in_a_row + 1
        done = step + 1
        end_if_diverged(run.out, in_a_row)
        if done % plan.epoch_steps == 0 or done == plan.steps:
            score = end_epoch(run, step, loss.item())
            shown = '' if score is None else f', validation {score:.3f}'
            bar.set_postfix_str(f'loss {loss.item():.3f}{shown}')
        if signals or done == plan.steps or time.perf_counter() - saved_at > 60:
            save(run.out / 'ckpt.pt', dict(
                network_state(run), optimizer=run.optimizer.state_dict(), identity=run.identity,
                done=done, best=run.best, skipped=run.skipped))
            saved_at = time.perf_counter()
        if signals:
            print(f'\n{run.out}: saved after {done} of {plan.steps} steps; go on with --resume')
            sys.exit(128 + signals[0])

def end_epoch(run, step, loss):
    """Score the validation images, log the score, and keep the network if it is the best."""
    score = None        # Without validation images every network counts as the best.
    if len(run.task.answers['val']):
        scores, _ = evaluate(run.net, run.task, 'val', run.o.batch, run.device, run.autocast)
        score = headline(scores)
    write_line(run.log, dict(step=step, loss=loss, val=score, skipped=run.skipped))
    if score is None or score > run.best:
        run.best = score
        save(run.out / 'best.pt', network_state(run))
    return score

def score_test(run):
    """Score the best network once on the test images, and write results.json."""
    state, _, _ = read_checkpoint(run.out / 'best.pt')
    run.net.load_state_dict(state)
    scores, _ = evaluate(run.net, run.task, 'test', run.o.batch, run.device, run.autocast)
    results = dict(run.identity, scores=scores, validation=run.best, skipped=run.skipped,
                   options=asdict(run.o))
    save(run.out / 'results.json', json.dumps(results, indent=1))
    name = 'Dice' if run.task.segments else 'macro-F1'
    print(f'{run.out}: test {name} {headline(scores):.4f}; all are in results.json')

def main():
    """Train, or apply a trained network to new images."""
    o = parse_options(Options())
    if os.environ.get('WORLD_SIZE', '1') != '1':
        raise SystemExit('finetune.py is one process: start it by python, not by torchrun')
    try:
        if o.predict:       # by tests/lab/predict.py, which alone needs prepare_medverse
            return run_program('predict', o.out, *o.predict, '--device', o.device)
        if o.task.startswith('phantom-') and not Path(o.data, o.task).exists():
            run_program('phantoms', '--out', f'{o.data}/{o.task}', '--task', o.task, '--size', 64)
        run = build_run(o)
        run.log = prepare_folder(run.out, o, run.start)
        facts = dict(run.identity, options=asdict(o))
        save(run.out / 'config.json', json.dumps(facts, indent=1))
        print(f'{run.out} on {run.device}: {len(run.plan.ids)} images, {run.plan.steps} steps, '
              f'pictures at any time: python -m tests.lab.pictures {run.out}')
        train(run)
        on_signals(signal.SIG_DFL)      # all is saved, so they may end the process at once
        score_test(run)
        if run.task.segments:
            run_program('pictures', run.out)
    except OSError as error:
        raise SystemExit(f'{error}; what was saved before is whole')
    except KeyboardInterrupt:       # before the training, or in a prediction: nothing to save
        sys.exit(130)

if __name__ == '__main__':
    main()
