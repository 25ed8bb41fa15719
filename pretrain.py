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
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
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
    mask_ratio: float = 0.75        # share of hidden patches
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
    bf16: bool = True               # bfloat16 autocast, on CUDA only
    compile: bool = True            # torch.compile, on CUDA in bfloat16 only
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
    rank, world, local = (int(os.environ.get(name, alone)) for name, alone in
                          (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    kind = kind or ('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    if kind == 'cuda':
        torch.cuda.set_device(local)
    elif sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        # glibc would return each big tensor to the system (M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1), and faulting in the
        # stacked gradients anew would cost a fifth of a step on the CPU
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    if world > 1:
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
    return rank, world, local, torch.device(kind, local) if kind == 'cuda' else torch.device(kind)

def claim(checkpoint, o):
    """Refuse to write over another run's checkpoint unasked."""
    if checkpoint.exists() and not (o.resume or o.overwrite):
        raise SystemExit(f'{checkpoint}: is here already; go on with --resume, start anew with --overwrite, or choose --out')

def make_optimizer(model, lr, weight_decay):
    """AdamW with decay on weight matrices and kernels; none on norms, biases and tokens, told apart by name
    (stacked expert biases are two-dimensional)."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decayed if name.endswith('.weight') and 'norm' not in name else plain).append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)

def total_norm(gradients):
    """Norm of all gradients together. On a CPU by dot products, which read them faster and lose fewer digits than norms."""
    if gradients[0].device.type == 'cpu':
        return torch.stack([g.flatten().dot(g.flatten()) for g in gradients]).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)

def save(path, **content):
    """Write a checkpoint beside the old one, then move it into place: at any moment there is a whole one."""
    new = path.with_suffix('.new')
    try:
        torch.save(content, new)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        raise SystemExit(f'{path}: could not be saved ({str(error).splitlines()[0]}); what it was before is untouched')

def reopen(out, first, config):
    """Make the run's folder, with config.json and a log.jsonl that forgets what came after step `first`: its path."""
    out.mkdir(parents=True, exist_ok=True)
    (out / 'config.json').write_text(json.dumps(config, indent=1))
    log = out / 'log.jsonl'
    lines = log.read_text().splitlines() if first and log.exists() else []
    steps = [re.match(r'\{"step": (\d+),.*\}$', line) for line in lines]      # none of a last line that was cut short
    log.write_text(''.join(step[0] + '\n' for step in steps if step and int(step[1]) < first))
    return log

# ---------------------------------------------------------------------------------------------------------------------
# Validation and pictures

def mutual_information(counts):
    """Mutual information in bits between row and column of a table of counts (D, R), and its maximum, the smaller of
    the rows' entropy and log2 R. 0: experts ignore the modality; the maximum: they tell as much of it as they can."""
    joint = counts.double() / counts.sum()
    rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    bits = torch.xlogy(joint, joint / (rows * columns)).nan_to_num(0).sum() / math.log(2)
    return bits.item(), min(-torch.xlogy(rows, rows).sum().item() / math.log(2), math.log2(counts.shape[1]))

@torch.no_grad()
def validate(model, shards, o, device, autocast, done):
    """Look at the whole held-out images without gate noise: draw recon.png and experts.png, say what was found, and return
    it for log.jsonl. One rank does it for all, in seconds."""
    D, R, modality = len(shards.modalities), model.config.experts, shards.modality[shards.val]
    # one fixed draw (images, N - 1), so that each image has the same mask at every validation
    noise = torch.rand(len(modality), (o.size // o.patch) ** 2, generator=torch.Generator().manual_seed(o.seed))
    kinds = F.one_hot(torch.from_numpy(modality), D).float()
    losses = first = weights = 0        # sums over images or routed units: L_self (D,); first choices, omega (L, D, R)
    pieces = np.split(np.arange(len(modality)), range(o.batch, len(modality), o.batch))
    for piece, images in zip(pieces, data.prefetch(lambda piece: shards.gather(shards.val[piece]), pieces)):
        images, kind = data.center(images.to(device), o.size), kinds[piece].to(device)
        with autocast:
            loss, routing, _, _ = model(images, 0.0, noise[piece].to(device))
        losses = losses + kind.T @ loss
        if R:
            kind = kind.repeat_interleave(routing.weights.shape[1] // len(piece), 0)        # (M, D)
            first = first + kind.T @ F.one_hot(routing.weights.argmax(2), R).float()
            weights = weights + kind.T @ routing.weights
    losses = losses.cpu() / kinds.sum(0)        # not a number where no image is held out
    entry = dict(val_mae=losses.nanmean().item(),
                 val={name: loss for name, loss in zip(shards.modalities, losses.tolist()) if math.isfinite(loss)})
    text = f'step {done}: validation L_self {entry["val_mae"]:.4f}'
    if R:
        bits, most = zip(*map(mutual_information, first.cpu()))
        dead = [f'{layer + 1}.{expert}' for layer, expert in (weights.sum(1) == 0).nonzero().tolist()]
        entry |= dict(bits=bits, bits_max=most[0], dead=dead)
        text += (f', modality in the first expert {" ".join(f"{b:.2f}" for b in bits)} of {most[0]:.2f} bits, '
                 f'dead experts (layer.expert, for no validation image activated): {" ".join(dead) or "none"}')
        titles = [f'layer {layer}: {b:.2f} bits' for layer, b in enumerate(bits, 1)]
        draw_tables(Path(o.out, 'experts.png'), F.normalize(weights, 1, 2).cpu(), shards.modalities, titles)     # Fig. 9
    tqdm.write(text)
    shown, picks = np.unique(modality, return_index=True)
    images = data.center(shards.gather(shards.val[picks]).to(device), o.size)
    draw_reconstructions(Path(o.out, 'recon.png'), model, images, noise[picks], [shards.modalities[d] for d in shown])
    return entry

def draw_reconstructions(path, model, images, noise, names):
    """Of images (B, 3, S, S) with mask noise (B, N - 1) each image, what the encoder sees, and the prediction in place of
    what it does not see, with the per-patch normalization undone (so a patch's mean and contrast come from the truth)."""
    _, _, prediction, mask = model(images, 0.0, noise.to(images.device))
    _, mean, std = model.targets(images)
    hidden = model.unpatchify(mask[:, :, None].expand_as(prediction)) > 0
    seen = data.denormalize(images).clamp(0, 1)
    guess = data.denormalize(model.unpatchify(prediction * std + mean)).clamp(0, 1)
    grey = (seen - seen[:, :1]).abs().amax((1, 2, 3), keepdim=True) < 1e-3      # three guesses at one channel: their mean
    guess = torch.where(grey, guess.mean(1, keepdim=True), guess)
    rows = torch.stack([seen, torch.where(hidden, 0.5, seen), torch.where(hidden, guess, seen)])
    pixels = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).mul(255).byte().cpu().numpy()      # (3 S, B S, 3)
    zoom = max(1, 128 // images.shape[3])
    pixels = np.pad(pixels.repeat(zoom, 0).repeat(zoom, 1), ((16, 0), (0, 0), (0, 0)), constant_values=255)
    picture = Image.fromarray(pixels)
    for column, name in enumerate(names):
        ImageDraw.Draw(picture).text((column * zoom * images.shape[3] + 4, 2), name, fill='black')
    picture.save(path)

def draw_tables(path, tables, names, titles):
    """Tables (L, D, R) of numbers from 0 (white) to 1 (blue) side by side, with the names of their rows and titles."""
    (L, D, R), cell, left, top = tables.shape, 16, 80, 34
    across, width, height = min(L, 4), left + R * cell, top + D * cell
    picture = Image.new('RGB', (width * across + 10, height * math.ceil(L / across) + 10), 'white')
    draw = ImageDraw.Draw(picture)
    colours = (255 - tables[..., None] * torch.tensor([255, 255, 64])).byte().numpy()
    for number, table in enumerate(colours):
        x, y = width * (number % across) + left, height * (number // across) + top
        picture.paste(Image.fromarray(table).resize((R * cell, D * cell), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y - 30), titles[number], fill='black')
        for d in range(D):
            draw.text((x - left + 8, y + d * cell + 2), names[d][:12], fill='black')
        for r in range(R):
            draw.text((x + r * cell + 4, y - 14), str(r), fill='gray')
    picture.save(path)

# ---------------------------------------------------------------------------------------------------------------------
# Training

def now(gpu):
    """This moment; on CUDA an event in the queue of work, which the host does not wait for."""
    moment = torch.cuda.Event(enable_timing=True) if gpu else time.perf_counter()
    if gpu:
        moment.record()
    return moment

def spent(marks):
    """Seconds of each phase, from marks [(phase that ends here, moment)]."""
    seconds = {}
    for (_, begin), (phase, end) in zip(marks, marks[1:]):
        passed = end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
        seconds[phase] = seconds.get(phase, 0) + passed
    return seconds

def train(o, rank, world, local, device):
    """One run, from the options to the last checkpoint. Yields the Config and each step's marks, so that
    --bench can take turns."""
    master, gpu, path = rank == 0, device.type == 'cuda', Path(o.out, 'ckpt.pt')
    bf16 = gpu and o.bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    claim(path, o)
    shards = data.Shards(o.data, o.val_share)
    if not len(shards.val) and not o.bench:
        raise SystemExit(f'{o.data}: no image can be held out for validation; at least one source needs two images')
    global_batch = o.batch * o.accumulate * world
    epoch_steps = len(shards.train) // global_batch
    if not epoch_steps:
        raise SystemExit(f'{o.data}: its {len(shards.train)} training images are fewer than the {global_batch} of one step')
    steps = o.steps or o.epochs * epoch_steps
    warmup, lr = max(1, round(o.warmup * steps)), o.lr * global_batch / 512      # linear scaling, C.2.1
    val_every = o.val_every or max(1, steps // 10)

    config = named_config(o.model, o.depth, size=o.size, patch=o.patch, experts=o.experts, top_k=o.top_k,
                          routing=o.routing, mask_ratio=o.mask_ratio)
    L, R = config.depth, config.experts
    torch.manual_seed(o.seed)
    model = MAE(config).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, lr, o.weight_decay)
    first = skipped = 0
    if o.resume and path.exists():
        state, old, file = read_checkpoint(path)
        if old != config:
            raise SystemExit(f'{path}: was trained as {old}, not as these options ask ({config})')
        load_weights(model, state, path)
        optimizer.load_state_dict(file['optimizer'])
        first, skipped = file['step'], file['skipped']
    elif o.init:
        load_weights(model, read_checkpoint(o.init)[0], o.init)
    for block in (*model.blocks, *model.decoder_blocks) if o.checkpoint else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    net = torch.compile(model, fullgraph=True) if bf16 and o.compile else model
    if world > 1:       # sends the gradients of a block while those of the block below are computed
        net = DistributedDataParallel(net, [local] if gpu else None, broadcast_buffers=False, gradient_as_bucket_view=True)
    if master:
        log = reopen(path.parent, first, dict(options=asdict(o), model=asdict(config)))
        if not first:
            path.unlink(missing_ok=True)
        count, millions = sum(p.numel() for p in trained) / 1e6, sum(p.numel() for p in model.parameters()) / 1e6
        print(f'{o.model}: {L} blocks, {count:.1f} M parameters trained, {millions - count:.1f} M in directors; {o.data}: '
              f'{len(shards.train)} + {len(shards.val)} images of {len(shards.modalities)} modalities\n{steps} steps '
              f'({steps / epoch_steps:.1f} epochs) of {o.batch} x {o.accumulate} x {world} = {global_batch} images, learning '
              f'rate up to {lr:.2e} after {warmup} steps, on {world} x {device.type} in {"bfloat16" if bf16 else "float32"}')
    stop = []       # signals that came
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))

    copies = torch.cuda.Stream() if gpu else None

    def load(number):
        """Images (B, 3, S, S) on the device, on CUDA copied while earlier ones are computed, and the event of their arrival."""
        images = shards.gather(shards.plan(o.seed, number, o.batch, rank, world, epoch_steps * o.accumulate))
        if not gpu:
            return images.to(device), None
        torch.cuda.set_device(device)       # a thread begins on the first GPU
        with torch.cuda.stream(copies):     # from pinned memory the host need not wait for a copy
            return images.pin_memory().to(device, non_blocking=True), copies.record_event()

    batches = data.prefetch(load, range(first * o.accumulate, steps * o.accumulate))
    no_experts = Routing(torch.zeros(L, device=device), *3 * [torch.zeros(L, 1, 0, device=device)])
    in_a_row = torch.zeros((), device=device)
    skipped, history, logged, saved = in_a_row + skipped, [], (first, time.perf_counter()), time.perf_counter()
    bar = tqdm(range(first, steps), initial=first, total=steps, unit='step', disable=o.bench or not master)
    for step in bar:
        progress = step / steps
        sigma, balance = cosine(o.sigma, 0, progress), cosine(o.balance, 0, progress)
        rate, momentum = learning_rate(step, steps, warmup, lr), cosine(o.momentum, 1, progress)
        for group in optimizer.param_groups:
            group['lr'] = rate

        marks = [('between', now(gpu))]
        stats = 0       # means over the global batch: L_self, whether to stop, L_co (L,); scores, load, usage (L, R) each
        for micro in range(o.accumulate):
            images, arrived = next(batches)
            if gpu:
                torch.cuda.current_stream().wait_event(arrived)
                images.record_stream(torch.cuda.current_stream())       # its memory is not free before this stream is done
            marks.append(('data', now(gpu)))
            seed_step(o.seed, step, rank * o.accumulate + micro)
            images = data.augment(images, o.size)
            net.require_backward_grad_sync = micro == o.accumulate - 1      # DDP's gradients travel with the last one only
            with autocast:
                losses, routing, _, _ = net(images, torch.full((), sigma, device=device))
            loss, routing = losses.mean(), routing or no_experts
            uses = torch.stack([routing.scores, routing.chosen, routing.weights]).mean(2)       # (3, L, R)
            stopping = torch.full((), float(len(stop)), device=device)
            part = torch.cat([loss[None], stopping[None], routing.co, uses.flatten()]).detach()
            if world > 1:       # the one small all-reduce of a step
                dist.all_reduce(part)
                part /= world
            # Eq. 8; the load of Eq. 18 is the global batch's, or with accumulation the micro-batch's
            co, bal = layer_losses(routing, part[2 + L:].view(3, L, R)[1])
            marks.append(('forward', now(gpu)))
            ((loss + o.co * co + balance * bal) / o.accumulate).backward()
            marks.append(('backward', now(gpu)))
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
        marks.append(('optimizer', now(gpu)))
        scores, load_share, usage = stats[2 + L:].view(3, L, R)
        if R:
            model.update_directors(usage, momentum, finite)
        marks.append(('GEMA', now(gpu)))
        history += marks
        skipped, in_a_row = skipped + ~finite, (in_a_row + 1) * ~finite

        done = step + 1
        looking = done == 1 or done % val_every == 0 or done == steps
        if looking or done % o.log_every == 0:      # the only place that waits for the device
            mae, seconds = stats[0].item(), time.perf_counter() - logged[1]
            co, bal = (x.item() for x in layer_losses(Routing(stats[2:2 + L], scores[:, None], None, None), load_share))
            entry = dict(step=step, loss=mae + o.co * co + balance * bal, mae=mae, co=co, bal=bal, lr=rate, momentum=momentum,
                         sigma=sigma, grad_norm=norm.item(), skipped=int(skipped),
                         images_per_second=global_batch * (done - logged[0]) / seconds, waiting=spent(history)['data'] / seconds)
            bar.set_postfix_str(f'loss {entry["loss"]:.4f}, {entry["images_per_second"]:.0f} images/s')
            if master:
                if looking:
                    entry |= validate(model, shards, o, device, autocast, done)
                with open(log, 'a') as file:
                    file.write(json.dumps(entry) + '\n')
            if in_a_row >= 10:
                raise SystemExit(f'{o.out}: ten steps in a row had a loss or gradient that is not finite; lower --lr')
            history, logged = [], (done, time.perf_counter())
        # a signal reaches ranks at different steps: they act on the shared flag, and where reading it costs no extra wait
        stopping = (not gpu or done % o.log_every == 0) and stats[1] > 0
        if master and not o.bench and (stopping or done == steps or time.perf_counter() - saved > 60 * o.save_minutes):
            save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=done, skipped=int(skipped),
                 config=asdict(config), options=asdict(o))
            saved = time.perf_counter()
        if stopping:
            if world > 1:       # torchrun would kill the rank that saves, 30 s after another has left
                dist.barrier()
            if master and not o.bench:
                print(f'\n{path}: saved after {done} of {steps} steps; go on with --resume')
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
        yield config, marks

# ---------------------------------------------------------------------------------------------------------------------
# How fast it is

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

def spread(values):
    return '{1:.3f} (quartiles {0:.3f} to {2:.3f})'.format(*np.percentile(values, (25, 50, 75)))

def bench(o, rank, world, local, device, warm=5, count=20):
    """Time the real loop, in turns with that of the plain masked autoencoder of the same size, then both gates (Fig. 8)."""
    gpu, memory = device.type == 'cuda', []
    with tempfile.TemporaryDirectory() as folder:
        o = replace(o, steps=1000, val_share=0.0, resume=False)
        if not list(Path(o.data).glob('*/meta.json')):      # noise does as well
            number, source = 4 * o.batch * o.accumulate * world + 1, Path(folder, 'data', 'noise')
            source.mkdir(parents=True)
            np.save(source / '0.npy', np.random.default_rng(0).integers(0, 256, (number, o.size, o.size, 3), np.uint8))
            (source / 'meta.json').write_text(json.dumps(dict(modality='noise', count=number)))
            o = replace(o, data=f'{folder}/data')
        runs = [train(replace(o, experts=R, out=f'{folder}/{R}'), rank, world, local, device) for R in (o.experts, 0)]
        for run in runs:
            for _ in range(warm):
                next(run)
            rss = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory.append(torch.cuda.max_memory_allocated() if gpu else rss)
        steps = [[next(run) for run in runs] for _ in range(count)]
    if gpu:
        torch.cuda.synchronize()
    if rank > 0:
        return
    peak = world * next((value for name, value in PEAK.items() if gpu and name in torch.cuda.get_device_name()), math.inf)
    speeds = []
    for name, column in zip(('DEX', 'MAE'), zip(*steps)):
        work, phases = flops(column[0][0]) / 1e12, [spent(marks) for _, marks in column]
        seconds = np.array([sum(step.values()) for step in phases])
        images = o.batch * o.accumulate * world / seconds
        speeds.append(work * images)        # TFLOP/s
        shares = [f'{phase} {100 * np.median([step[phase] for step in phases] / seconds):.1f}%' for phase in phases[0]]
        print(f'{name}: {spread(images)} images/s, {1000 * work:.1f} GFLOP an image, MFU '
              f'{np.median(speeds[-1]) / peak:.3f}; a step {spread(seconds)} s: {", ".join(shares)}')
    print(f'FLOP-normalised efficiency of DEX against MAE {spread(speeds[0] / speeds[1])}; DEX takes {memory[0] / 1e9:.1f} GB')
    print('gate and dispatch in one layer: pixels, images; MFLOP and milliseconds image-wise; the same token-wise')
    c = column[0][0]
    for side, batch in GATES if o.experts else ():
        x, cells = torch.randn(batch, (side // c.patch) ** 2 + 1, c.width, device=device), []
        for routing, units in (('image', batch), ('token', batch * x.shape[1])):
            dex = DEX(c.width, o.experts, o.top_k, routing).to(device).requires_grad_(False)
            dex.experts.forward = lambda x, expert: x       # what is left is the gate, the gathering and the mixing
            timer = Timer('dex(x)', globals=dict(dex=dex, x=x), num_threads=torch.get_num_threads())
            seconds = timer.blocked_autorange(min_run_time=0.5).median
            cells.append(f'{2e-6 * units * c.width * o.experts:10.3f} {1000 * seconds:8.2f}')
        print(f'{side:5} {batch:4}', *cells)

def main():
    """Options, processes and the demo's data; then train, or measure."""
    o = data.parse_options(Options())
    if o.demo:
        o = data.parse_options(Options(demo=True, **DEMO))
    if min(o.batch, o.accumulate, o.log_every) < 1 or o.clip <= 0 or o.seed < 0:
        raise SystemExit('--batch, --accumulate and --log_every must be 1 or more, --clip above 0 (inf: off) and --seed not '
                         'negative')
    place = rank, world, _, _ = setup(o.device)
    if o.demo and rank == 0 and not list(Path(o.data).glob('*/meta.json')):
        script = Path(__file__).with_name('prepare_medverse.py')
        subprocess.run([sys.executable, script, '--phantoms', '200', '--out', o.data, '--size', str(o.size)], check=True)
    if world > 1:
        dist.barrier()
    if o.bench:
        bench(o, *place)
    else:
        for _ in train(o, *place):
            pass
    if world > 1:
        dist.destroy_process_group()

if __name__ == '__main__':
    main()
