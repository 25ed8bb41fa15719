"""Pretrain a Director-Experts masked autoencoder on prepared images of many modalities.

    python pretrain.py --demo                           phantoms and a small model, minutes on a laptop's CPU
    python pretrain.py --model tiny --size 128 --batch 32 --device cpu
    torchrun --nproc_per_node=2 pretrain.py             the paper's run, on two GPUs
    python pretrain.py --bench --device cpu --depth 3 --batch 8      how fast a step is, and what it is spent on
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py   on each of two

Writes to --out: config.json, log.jsonl (one object a line), ckpt.pt, recon.png, experts.png. Ctrl-C and SIGTERM save
first; the same command with --resume goes on from there as if nothing had happened.
"""
import ctypes
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from model import DEX, MAE, Routing, layer_losses, load_weights, named_config, read_checkpoint

@dataclass
class Options:
    """The options, by default the paper's run; the comment beside each is its --help."""
    # files
    data: str = 'data/medverse'     # folder of prepared sources
    out: str = 'out/pretrain'       # folder of this run
    init: str = ''                  # checkpoint to start from: ours, MAE's or timm's; empty: from scratch
    resume: bool = False            # continue from out's checkpoint; start fresh where there is none
    overwrite: bool = False         # start anew although out holds a run
    demo: bool = False              # make phantoms if there are none, and train a small model on them
    # model
    model: str = 'base'             # tiny, small, base, large or huge
    depth: int = 0                  # blocks of the encoder; 0: as the model has
    size: int = 256                 # side of the training images in pixels
    patch: int = 16                 # side of a patch in pixels
    experts: int = 8                # R experts in every block; 0: the plain masked autoencoder
    top_k: int = 2                  # K experts activated for an image
    routing: str = 'image'          # image: one choice for the whole image; token: one for each token
    # optimization (Appendix C.2.1 and the published supplement)
    batch: int = 224                # images per process and micro-batch
    accumulate: int = 1             # micro-batches per optimizer step
    epochs: int = 100               # passes over the training images
    steps: int = 0                  # optimizer steps; 0: as the epochs give
    warmup: float = 0.1             # share of the steps in which the learning rate rises
    lr: float = 1e-4                # peak learning rate for a global batch of 512; scales with the batch
    weight_decay: float = 1e-6      # on weight matrices only
    clip: float = 1.0               # largest norm of the gradient
    # DEX
    co: float = 0.1                 # weight of the alignment loss (Eq. 8)
    balance: float = 0.001          # weight of the balance loss at the start (Eq. 8), cosine to 0
    momentum: float = 0.99          # of the directors at the start (Eq. 7), cosine to 1
    sigma: float = 1.0              # deviation of the gate noise at the start (Eq. 21), cosine to 0
    # machine
    device: str = ''                # cpu, cuda or mps; empty: the best there is
    seed: int = 0                   # of weights, order, augmentation, masks and noise
    bf16: bool = True               # bfloat16 autocast and torch.compile, on CUDA only
    checkpoint: bool = False        # compute activations anew in the backward pass: less memory, a third more time
    bench: bool = False             # time steps of this run, and of the plain masked autoencoder, instead of training
    # looking after it
    log_every: int = 10             # steps between lines of log.jsonl
    val_every: int = 0              # steps between validations; 0: ten a run
    val_share: float = 0.05         # share of each source held out for validation (its tail, at most 200 images)
    save_minutes: float = 15.0      # between checkpoints

DEMO = dict(data='data/phantoms-64', out='out/demo', model='tiny', depth=4, size=64, patch=8, batch=64, steps=400,
            lr=8e-3, val_share=0.2, val_every=100)

def cosine(start, end, progress):
    """Half a cosine from `start` at progress 0 to `end` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

def learning_rate(step, steps, warmup, peak):
    """Linear from above 0 to the peak in `warmup` steps, then half a cosine towards 0."""
    return peak * min((step + 1) / warmup, cosine(1, 0, max(0, step - warmup) / max(1, steps - warmup)))

def seed_step(seed, step, rank):
    """Every draw of a step (augmentation, mask, gate noise) follows from these three numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))

def setup(kind):
    """Join torchrun's processes if there are any: (rank, world size, rank on this machine, device). kind: '' is the best."""
    rank, world, local = (int(os.environ.get(*pair)) for pair in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    kind = kind or ('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    if kind not in ('cpu', 'cuda', 'mps'):
        raise SystemExit(f'--device {kind}: must be cpu, cuda or mps; CUDA_VISIBLE_DEVICES chooses among several GPUs')
    try:
        device = torch.empty(0, device=f'cuda:{local}' if kind == 'cuda' else kind).device
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f'--device {kind}: {str(error).splitlines()[0]}')
    if kind == 'cuda':
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # what fades of an idle expert's moments would slow AdamW on a CPU to a tenth
    if sys.platform == 'linux':     # glibc would return each big tensor to the system (M_MMAP_MAX, M_TRIM_THRESHOLD), and
        libc = ctypes.CDLL(None)    # faulting in the stacked gradients anew would cost a fifth of a step on the CPU
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    if world > 1:
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', device_id=device if kind == 'cuda' else None)
    return rank, world, local, device

def check_numbers(o):
    """End the program where a number is negative, infinite (but for --clip) or none at all, that is not so by default, and
    where there is nothing to train on or for."""
    for name, value in vars(o).items():
        fine = not isinstance(value, (int, float)) or 0 <= value < math.inf or name == 'clip' and value == math.inf
        if not fine and value != getattr(type(o), name):
            raise SystemExit(f'--{name} {value}: must be a number of 0 or more')
    if o.batch < 1 or not (o.steps or o.epochs):
        raise SystemExit('--batch must be 1 or more, and --epochs or --steps above 0')

def claim(out, o):
    """Refuse to write over another run unasked."""
    log = out / 'log.jsonl'
    if log.exists() and log.stat().st_size and not (o.resume or o.overwrite):
        raise SystemExit(f'{out}: holds a run already; go on with --resume, start anew with --overwrite, or choose --out')

def make_optimizer(model, lr, weight_decay):
    """AdamW with decay on weight matrices and kernels; none on norms, biases (stacked ones are two-dimensional) and tokens."""
    trained = [(name.endswith('.weight') and 'norm' not in name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for matrix, p in trained if matrix], weight_decay=weight_decay),
              dict(params=[p for matrix, p in trained if not matrix], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)

def total_norm(gradients):
    """Norm of all gradients together. On a CPU by dot products, which read them faster and lose fewer digits than norms."""
    if gradients[0].device.type == 'cpu':
        return torch.stack([g.flatten().dot(g.flatten()) for g in gradients]).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)

def save(path, content):
    """Write text or a checkpoint beside the old file, then move it into place: at any moment there is a whole one."""
    new = path.with_name(path.name + '.new')
    try:
        with open(new, 'wb') as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        why = error.__context__ or error        # torch hides 'no space left on device' behind an error of its own
        raise SystemExit(f'{path}: could not be saved ({why}); what was there before is untouched')
    finally:
        new.unlink(missing_ok=True)

def reopen(out, first, config):
    """Make the run's folder, with config.json and a log.jsonl of the steps before `first` (none: no checkpoint either)."""
    out.mkdir(parents=True, exist_ok=True)
    save(out / 'config.json', json.dumps(config, indent=1))
    log = out / 'log.jsonl'
    lines = re.findall(r'^({"step": (\d+),.*}\n)', log.read_text() if log.exists() else '', re.M)    # none that was cut short
    save(log, ''.join(line for line, step in lines if int(step) < first))
    if not first:
        (out / 'ckpt.pt').unlink(missing_ok=True)
    return log

MAX_SKIPPED = 10        # steps in a row that are not finite end a training

def stop_signals():
    """A list to which SIGTERM and SIGINT (Ctrl-C) add their numbers from now on, so that a training can save first."""
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals

def open_run(out, o, first, config):
    """Open a run's log.jsonl, cut to the steps before `first`, and write config.json. The log stays locked until this
    process ends, however it ends, so that no two trainings (or --resume, and workers that outlived their torchrun)
    write to one folder."""
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / 'log.jsonl', 'a+')
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f'{out}: another process trains here (a killed torchrun leaves workers); end it first')
    log.seek(0)
    lines = log.readlines()
    if lines and not (o.resume or o.overwrite):
        raise SystemExit(f'{out}: holds a run; go on with --resume, start anew with --overwrite, or choose --out')
    whole = [line for line in lines if line.endswith('}\n') and json.loads(line)['step'] < first]
    log.truncate(len(''.join(whole)))       # ASCII, so characters are bytes; the last line may have been cut short
    save(out / 'config.json', json.dumps(config, indent=1))
    return log

def write_line(log, entry):
    """Add a line to log.jsonl; NaN and infinity, which JSON does not know, become null."""
    entry = json.loads(json.dumps(entry), parse_constant=lambda name: None)
    print(json.dumps(entry), file=log, flush=True)

# --- validation and pictures --------------------------------------------------------------------------------------------

def mutual_information(counts):
    """Mutual information in bits between row and column of a table of counts (D, R), and its maximum, the smaller of
    the rows' entropy and log2 R. 0: experts ignore the modality; the maximum: they tell as much of it as they can."""
    joint = counts.double() / counts.sum()
    rows, columns, both = (torch.special.entr(p).sum().item() / math.log(2) for p in (joint.sum(1), joint.sum(0), joint))
    return rows + columns - both, min(rows, math.log2(counts.shape[1]))

@torch.no_grad()
def validate(model, shards, o, device, autocast):
    """Look at the whole held-out images without gate noise: draw recon.png and experts.png, print and return the rest."""
    present, picks, kinds = np.unique(shards.modality[shards.val], return_index=True, return_inverse=True)
    names, kinds = [shards.modalities[d] for d in present], F.one_hot(torch.from_numpy(kinds)).T.float()     # (D, images)
    # one fixed draw (images, N - 1), so that each image has the same mask at every validation
    noise = torch.rand(kinds.shape[1], (o.size // o.patch) ** 2, generator=torch.Generator().manual_seed(o.seed))
    losses, usage = [], []
    for ids, part in zip(torch.from_numpy(shards.val).split(o.batch), noise.split(o.batch)):
        images = data.center(shards.gather(ids.numpy()).to(device), o.size)
        with autocast:
            loss, routing, _, _ = model(images, 0.0, part.to(device))
        losses.append(loss.cpu())
        if routing:
            usage.append(routing.weights.unflatten(1, (len(ids), -1)).mean(2).cpu())     # omega (L, B, R)
    losses = kinds @ torch.cat(losses) / kinds.sum(1)
    entry = dict(val_mae=losses.mean().item(), val=dict(zip(names, losses.tolist())))
    text = f'validation: L_self {entry["val_mae"]:.3f}'
    if usage:
        usage = torch.cat(usage, 1)
        first = kinds @ F.one_hot(usage.argmax(2), usage.shape[2]).float()      # counts of first choices (L, D, R)
        bits, (most, *_) = zip(*map(mutual_information, first))
        dead = [f'{layer + 1}.{expert}' for layer, expert in (usage.sum(1) == 0).nonzero().tolist()]
        entry |= dict(bits=bits, bits_max=most, dead=dead)
        text += (f'; modality in the first expert, by layer: {" ".join(f"{b:.2f}" for b in bits)} of {most:.2f} bits; experts '
                 f'(layer.number) that no image activates: {" ".join(dead) or "none"}')
        titles = [f'layer {layer}: {b:.2f} bits' for layer, b in enumerate(bits, 1)]
        draw_tables(Path(o.out, 'experts.png'), F.normalize(kinds @ usage, 1, 2), names, titles)        # Fig. 9
    images = data.center(shards.gather(shards.val[picks]).to(device), o.size)
    draw_reconstructions(Path(o.out, 'recon.png'), model, images, noise[picks].to(device), names)
    tqdm.write(text)
    return entry

def draw_reconstructions(path, model, images, noise, names):
    """Of images (B, 3, S, S) with mask noise (B, N - 1) each image, what the encoder sees, and the prediction in place of
    what it does not see, with the per-patch normalization undone (so a patch's mean and contrast come from the truth)."""
    _, _, prediction, mask = model(images, 0.0, noise)
    _, mean, std = model.targets(images)
    hidden = model.unpatchify(mask[:, :, None].expand_as(prediction)) > 0
    seen, guess = (data.denormalize(x).clamp(0, 1) for x in (images, model.unpatchify(prediction * std + mean)))
    grey = (seen - seen[:, :1]).abs().amax((1, 2, 3), keepdim=True) < 1e-3      # three guesses at one channel: their mean
    guess = torch.where(grey, guess.mean(1, keepdim=True), guess)
    rows = torch.stack([seen, torch.where(hidden, 0.5, seen), torch.where(hidden, guess, seen)])
    pixels = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).mul(255).byte().cpu().numpy()      # (3 S, B S, 3)
    zoom = max(1, 128 // images.shape[3])
    pixels = pixels.repeat(zoom, 0).repeat(zoom, 1)
    picture = Image.fromarray(np.pad(pixels, ((16, 0), (0, 0), (0, 0)), constant_values=255))       # with room for the names
    for column, name in enumerate(names):
        ImageDraw.Draw(picture).text((column * zoom * images.shape[3] + 4, 2), name, 'black')
    picture.save(path)

def draw_tables(path, tables, names, titles, counts=None):
    """Tables (L, D, R) of numbers from 0 (white) to 1 (blue), four in a row, with titles, row names and column numbers.
    Numbers `counts` (L, D, R) are written into the cells, which are then larger, and the columns have the names."""
    (L, D, R), longest = tables.shape, math.ceil(max(map(ImageFont.load_default().getlength, names)))
    cell, heads = (16, range(R)) if counts is None else (max(48, 8 + longest), names)
    left = max(80, 14 + longest)
    width, height = left + R * cell, 34 + D * cell
    picture = Image.new('RGB', (width * min(L, 4) + 10, height * math.ceil(L / 4) + 10), 'white')
    draw = ImageDraw.Draw(picture)
    for l, d, r in np.ndindex(L, D, R):
        x, y = width * (l % 4) + left + r * cell, height * (l // 4) + 34 + d * cell
        light = int(255 - 255 * tables[l, d, r].nan_to_num())
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), (light, light, 255 - (255 - light) // 4))
        if counts is not None:
            draw.text((x + 4, y + cell // 2 - 6), str(int(counts[l, d, r])), 'black' if light > 127 else 'white')
        if r == 0:
            draw.text((x - left + 8, y + cell // 2 - 6), names[d], 'black')
        if d == 0:
            draw.text((x + 4, y - 14), str(heads[r]), 'gray')
        if d == r == 0:
            draw.text((x, y - 30), titles[l], 'black')
    picture.save(path)

# --- training -----------------------------------------------------------------------------------------------------------

def resume(path, o, images, model, optimizer):
    """Load a run of `images` a step into model and optimizer, if the options are those of its numbers: (steps, skipped)."""
    state, _, file = read_checkpoint(path)
    free = 'data out init resume overwrite batch accumulate device bf16 checkpoint log_every val_every save_minutes'.split()
    was, now = file['options'] | dict(images=file.get('images')), vars(o) | dict(images=images)
    if changed := [f'{n} {was.get(n)} (not {now[n]})' for n in now if n not in free and was.get(n) != now[n]]:
        raise SystemExit(f'{path}: a run goes on as it began, with {", ".join(changed)}; a new one can --init from it')
    model.load_state_dict(state)
    optimizer.load_state_dict(file['optimizer'])
    return file['step'], file['skipped']

def train(o, rank, world, local, device):
    """One run. Yields the Config and each step's marks, (phase that ends, moment), so that --bench can take turns."""
    master, gpu, path = rank == 0, device.type == 'cuda', Path(o.out, 'ckpt.pt')
    bf16 = gpu and o.bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    claim(path.parent, o)
    shards = data.Shards(o.data, o.val_share)
    global_batch = o.batch * o.accumulate * world
    epoch_steps = len(shards.train) // global_batch
    if not epoch_steps or not len(shards.val):
        raise SystemExit(f'{o.data}: {len(shards.train)} + {len(shards.val)} images are too few to train on, {global_batch} a '
                         'step, and to validate')
    steps = o.steps or o.epochs * epoch_steps
    warmup, peak = max(1, round(o.warmup * steps)), o.lr * global_batch / 512      # linear scaling, C.2.1

    config = named_config(o.model, o.depth, size=o.size, patch=o.patch, experts=o.experts, top_k=o.top_k, routing=o.routing)
    L, R = config.depth, config.experts
    torch.manual_seed(o.seed)
    model = MAE(config).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, peak, o.weight_decay)
    first = skipped = 0
    if o.resume and path.exists():
        first, skipped = resume(path, o, global_batch, model, optimizer)
    elif o.init:
        load_weights(model, read_checkpoint(o.init)[0], o.init)
    if bf16:
        torch._dynamo.config.optimize_ddp = False       # which would cut a block's graph once more
    for block in (*model.blocks, *model.decoder_blocks):
        if bf16:        # by block: one graph serves all of a kind, and DDP need not wait for the gradients of the whole
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        if o.checkpoint:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    net = model
    if world > 1:       # sends the gradients of a block while those of the block below are computed
        net = DistributedDataParallel(model, [local] if gpu else None, broadcast_buffers=False, gradient_as_bucket_view=True)
        mine = torch.tensor([first, len(shards.train)], device=device)
        dist.broadcast(theirs := mine.clone(), 0)
        if not torch.equal(mine, theirs):
            raise SystemExit(f'{o.out}, {o.data}: not the same on every machine; put both on a disk that all of them share')
    if master:
        log = reopen(path.parent, first, dict(options=asdict(o), model=asdict(config)))
        print(f'{o.model}: {L} blocks, {sum(p.numel() for p in trained) / 1e6:.1f} M parameters trained; {o.data}: '
              f'{len(shards.train)} + {len(shards.val)} images of {len(shards.modalities)} modalities, {shards.side} pixels, '
              f'seen at {o.size}\n{steps} steps ({steps / epoch_steps:.1f} epochs) of {o.batch} x {o.accumulate} x {world} = '
              f'{global_batch} images, learning rate up to {peak:.2e} after {warmup} steps, on {world} x {device.type} in '
              f'{"bfloat16" if bf16 else "float32"}')
    stop = []       # signals that came
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))
    copies = torch.cuda.Stream() if gpu else None
    # a moment: on CUDA an event in the queue of work, which the host does not wait for
    now = (lambda: torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))) if gpu else time.perf_counter

    def load(number):
        """Images (B, 3, S, S) on the device. On CUDA it is this thread that waits for the copy, while the loop computes."""
        images = shards.gather(shards.plan(o.seed, number, o.batch, rank, world, epoch_steps * o.accumulate))
        if gpu:
            torch.cuda.set_device(device)       # a thread begins on the first GPU
            with torch.cuda.stream(copies):
                images = images.pin_memory().to(device, non_blocking=True)
                copies.record_event().synchronize()
        return images.to(device)

    batches = data.prefetch(load, range(first * o.accumulate, steps * o.accumulate))
    no_experts = Routing(torch.zeros(L, device=device), *3 * [torch.zeros(L, 1, 0, device=device)])
    in_a_row = torch.zeros((), device=device)
    skipped, logged, saved = in_a_row + skipped, (first, time.perf_counter()), time.perf_counter()
    bar = tqdm(range(first, steps), initial=first, total=steps, unit='step', disable=o.bench or not master)
    for step in bar:
        sigma, balance, momentum = (cosine(*ends, step / steps) for ends in ((o.sigma, 0), (o.balance, 0), (o.momentum, 1)))
        for group in optimizer.param_groups:
            group['lr'] = rate = learning_rate(step, steps, warmup, peak)
        marks = [('start', now())]
        stats = 0       # means over the global batch: L_self, whether to stop, L_co (L,); scores, load, usage (L, R) each
        for micro in range(o.accumulate):
            images = next(batches)
            if gpu:     # the memory is not free for another copy before this stream has done with it
                images.record_stream(torch.cuda.current_stream())
            marks.append(('data', now()))
            seed_step(o.seed, step, rank * o.accumulate + micro)
            images = data.augment(images, o.size)
            net.require_backward_grad_sync = micro == o.accumulate - 1      # DDP's gradients travel with the last one only
            with autocast:
                losses, routing, _, _ = net(images, torch.full((), sigma, device=device))
            loss, routing = losses.mean(), routing or no_experts
            uses = torch.stack([routing.scores, routing.chosen, routing.weights]).mean(2)       # (3, L, R)
            stopping = torch.full((1,), float(len(stop)), device=device)
            part = torch.cat([loss[None], stopping, routing.co, uses.flatten()]).detach()
            if world > 1:       # the one small all-reduce of a step
                dist.all_reduce(part)
                part /= world
            # Eq. 8; the load of Eq. 18 is the global batch's, or with accumulation the micro-batch's
            co, bal = layer_losses(routing, part[2 + L:].view(3, L, R)[1])
            marks.append(('forward', now()))
            ((loss + o.co * co + balance * bal) / o.accumulate).backward()
            marks.append(('backward', now()))
            stats = stats + part / o.accumulate

        norm = total_norm([p.grad for p in trained])
        finite = torch.isfinite(norm) & torch.isfinite(stats).all()         # the same on every rank
        # fused AdamW divides by the one and skips the step for the other, without another pass over the gradients
        optimizer.grad_scale, optimizer.found_inf = (norm / o.clip).clamp(min=1), (~finite).float()
        if device.type == 'mps':        # whose AdamW looks at neither
            torch._foreach_div_([p.grad for p in trained], optimizer.grad_scale)
        if device.type != 'mps' or finite:
            optimizer.step()
        optimizer.zero_grad()
        marks.append(('optimizer', now()))
        mae, stopping, co, uses = stats.split([1, 1, L, 3 * L * R])
        scores, load_share, usage = uses.view(3, L, R)
        if R:
            model.update_directors(usage, momentum, finite)
        marks.append(('GEMA', now()))
        skipped, in_a_row = skipped + ~finite, (in_a_row + 1) * ~finite

        done = step + 1
        looking = done in (1, steps) or done % (o.val_every or max(1, steps // 10)) == 0
        if looking or done % o.log_every == 0:      # the only place that waits for the device
            co, bal = layer_losses(Routing(co, scores[:, None], None, None), load_share)
            mae, co, bal = torch.stack([mae[0], co, bal]).tolist()
            speed = global_batch * (done - logged[0]) / (time.perf_counter() - logged[1])
            entry = dict(step=step, loss=mae + o.co * co + balance * bal, mae=mae, co=co, bal=bal, lr=rate, momentum=momentum,
                         sigma=sigma, grad_norm=norm.item(), skipped=int(skipped), images_per_second=speed)
            bar.set_postfix_str(f'loss {entry["loss"]:.4f}, {speed:.0f} images/s')
            if master:
                if looking:
                    with torch.compiler.set_stance('force_eager'):      # its shapes are not worth compiling for
                        entry |= validate(model, shards, o, device, autocast)
                with open(log, 'a') as file:
                    file.write(json.dumps(entry) + '\n')
            logged = done, time.perf_counter()
        if (not gpu or done == logged[0]) and in_a_row >= 10:
            raise SystemExit(f'{o.out}: ten steps in a row had a loss or gradient that is not finite; lower --lr')
        # a signal reaches ranks at different steps: they act on the shared flag, and where reading it costs no extra wait
        stopping = (not gpu or done % o.log_every == 0) and stopping > 0
        if master and not o.bench and (stopping or done == steps or time.perf_counter() - saved > 60 * o.save_minutes):
            save(path, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=done, skipped=int(skipped),
                            images=global_batch, config=asdict(config), options=asdict(o)))
            saved = time.perf_counter()
        if (stopping or done == steps) and master and not o.bench:
            print(f'\n{path}: saved after {done} of {steps} steps' + '; go on with --resume' * (done < steps))
        if stopping:        # the others leave with 0: at any other code torchrun would kill the rank that saves, 30 s later
            sys.exit(128 + (stop or [signal.SIGTERM])[0] if master else 0)
        yield config, marks

# --- how fast it is -----------------------------------------------------------------------------------------------------

GATES = ((128, 8), (256, 8), (512, 8), (1024, 8), (256, 1), (256, 32), (256, 128))      # pixels of a side, images
PEAK = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'L40S': 362, '4090': 165}   # TFLOP/s in bfloat16

def flops(c):
    """Operations in the matrix products of MAE(c)'s training step for one image: two for each weight and token in the forward
    pass, and as many again in each of two backward passes, but for what learns nothing."""
    patches, pixels, top_k = (c.size // c.patch) ** 2, 3 * c.patch ** 2, c.top_k if c.experts else 1
    seen, tokens = int(patches * (1 - c.mask_ratio)) + 1, patches + 1

    def block(tokens, width, mlps):         # queries, keys, values, projection; MLPs; scores and mixing of attention
        return tokens * width * (4 * width + 8 * width * mlps + 2 * tokens)

    encoder = c.depth * (block(seen, c.width, top_k) + c.width * c.experts * (seen if c.routing == 'token' else 1))
    decoder = c.decoder_depth * block(tokens, c.decoder_width, 1) + c.decoder_width * (seen * c.width + tokens * pixels)
    embedding, director = patches * pixels * c.width, c.depth * seen * 8 * c.width ** 2 * (c.experts > 0)
    return 6 * (encoder + decoder) + 4 * embedding + 2 * director       # images have no gradient, directors do not learn

def spent(marks):
    """Seconds of each phase."""
    seconds = Counter()
    for (_, begin), (phase, end) in zip(marks, marks[1:]):
        seconds[phase] += end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
    return seconds

def spread(values):
    return '{1:.3f} (quartiles {0:.3f} to {2:.3f})'.format(*np.percentile(values, (25, 50, 75)))

def bench(o, rank, world, local, device, warm=5, count=20):
    """Time the real loop, in turns with that of the plain masked autoencoder of the same size, then both gates (Fig. 8)."""
    gpu = device.type == 'cuda'
    with tempfile.TemporaryDirectory() as out:
        o = replace(o, steps=1000, val_share=0.0, resume=False)
        dex, mae = (train(replace(o, experts=R, out=f'{out}/{R}'), rank, world, local, device) for R in (o.experts, 0))
        list(islice(dex, warm))
        unit = 1 if sys.platform == 'darwin' else 1024
        memory = torch.cuda.max_memory_allocated() if gpu else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        list(islice(mae, warm))
        steps = list(islice(zip(dex, mae), count))
    if gpu:
        torch.cuda.synchronize()
    if rank > 0:
        return
    peak = world * next((value for name, value in PEAK.items() if gpu and name in torch.cuda.get_device_name()), math.inf)
    speeds = []
    for name, column in zip(('DEX', 'MAE'), zip(*steps)):
        c, phases = column[0][0], [spent(marks) for _, marks in column]
        work, seconds = flops(c) / 1e12, np.array([step.total() for step in phases])
        images = o.batch * o.accumulate * world / seconds
        speeds.append(work * images)        # TFLOP/s
        shares = [f'{phase} {100 * np.median([step[phase] for step in phases] / seconds):.1f}%' for phase in phases[0]]
        print(f'{name}: {spread(images)} images/s, {1000 * work:.1f} GFLOP an image, MFU '
              f'{np.median(speeds[-1]) / peak:.3f}; a step {spread(seconds)} s: {", ".join(shares)}')
    print(f'FLOP-normalised efficiency of DEX against MAE {spread(speeds[0] / speeds[1])}; DEX takes {memory / 1e9:.1f} GB')
    for (side, batch), routing in product(GATES if o.experts else (), ('image', 'token')):
        x = torch.randn(batch, (side // c.patch) ** 2 + 1, c.width, device=device)
        dex = DEX(c.width, o.experts, o.top_k, routing).to(device).requires_grad_(False)
        dex.experts.forward = lambda x, expert: x       # what is left is the gate, the gathering and the mixing
        timer = Timer('dex(x)', globals=dict(dex=dex, x=x), num_threads=torch.get_num_threads())
        units, seconds = batch if routing == 'image' else x[:, :, 0].numel(), timer.blocked_autorange(min_run_time=0.5).median
        print(f'{routing}-wise gate and dispatch of a layer, {batch} images of {side} pixels: '
              f'{2e-6 * units * c.width * o.experts:.3f} MFLOP, {1000 * seconds:.2f} ms')

def main():
    """Options, processes, and the phantoms of a demo or a benchmark; then train, or measure."""
    o = data.parse_options(Options())
    if o.demo:
        o = data.parse_options(Options(demo=True, **DEMO))
    check_numbers(o)
    if min(o.accumulate, o.log_every) < 1 or o.clip <= 0:
        raise SystemExit('--accumulate and --log_every must be 1 or more, --clip above 0 (inf: off)')
    place = rank, world, _, _ = setup(o.device)
    if without := o.bench and o.data == Options.data and not Path(o.data).exists():
        o = replace(o, data=f'data/phantoms-{o.size}')
    try:
        if (o.demo or without) and rank == 0 and not any(Path(o.data).glob('*')):
            script, part = Path(__file__).with_name('prepare_medverse.py'), f'{Path(o.data)}.part'
            shutil.rmtree(part, ignore_errors=True)     # of a run that was stopped: in the end all are there or none
            subprocess.run([sys.executable, script, '--phantoms', '200', '--out', part, '--size', str(o.size)], check=True)
            os.replace(part, o.data)
        if world > 1:
            dist.barrier()
        if o.bench:
            bench(o, *place)
        else:
            for _ in train(o, *place):
                pass
    except OSError as error:        # a full disk, say
        raise SystemExit(f'{error}; the last checkpoint is whole')
    except (subprocess.CalledProcessError, KeyboardInterrupt):
        raise SystemExit(f'{o.data}: its phantoms are not finished; start again')
    if world > 1:
        dist.destroy_process_group()

if __name__ == '__main__':
    main()
