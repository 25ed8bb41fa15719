"""Pretrain a Director-Experts masked autoencoder on prepared images of many modalities.

    python pretrain.py --demo                           phantoms and a small model, minutes on a laptop's CPU
    python pretrain.py --model tiny --size 128 --batch 32 --device cpu
    torchrun --nproc_per_node=2 pretrain.py             the paper's run, on two GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py   on each of two

Writes to --out: config.json, log.jsonl (one object a line), ckpt.pt, recon.png, experts.png. Ctrl-C and SIGTERM save
first; the same command with --resume goes on from there as if nothing had happened.
"""
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import MAE, Routing, layer_losses, load_weights, named_config, read_checkpoint

@dataclass
class Options:
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
    compile: bool = True            # torch.compile, on CUDA only
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
    log.write_text(''.join(line + '\n' for line in lines if line.endswith('}') and json.loads(line)['step'] < first))
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

def main():
    """One run, from the options to the last checkpoint."""
    o = data.parse_options(Options())
    if o.demo:
        o = data.parse_options(Options(demo=True, **DEMO))
    if min(o.batch, o.accumulate, o.log_every) < 1:
        raise SystemExit('--batch, --accumulate and --log_every must be 1 or more')
    rank, world, local, device = setup(o.device)
    master, gpu, checkpoint = rank == 0, device.type == 'cuda', Path(o.out, 'ckpt.pt')
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=gpu and o.bf16)
    claim(checkpoint, o)

    if o.demo and master and not list(Path(o.data).glob('*/meta.json')):
        script = Path(__file__).with_name('prepare_medverse.py')
        subprocess.run([sys.executable, script, '--phantoms', '200', '--out', o.data, '--size', str(o.size)], check=True)
    if world > 1:
        dist.barrier()
    shards = data.Shards(o.data, o.val_share)
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
    if o.resume and checkpoint.exists():
        state, old, file = read_checkpoint(checkpoint)
        if old != config:
            raise SystemExit(f'{checkpoint}: was trained as {old}, not as these options ask ({config})')
        load_weights(model, state, checkpoint)
        optimizer.load_state_dict(file['optimizer'])
        first, skipped = file['step'], file['skipped']
    elif o.init:
        load_weights(model, read_checkpoint(o.init)[0], o.init)
    net = torch.compile(model) if gpu and o.compile else model
    if world > 1:
        net = DistributedDataParallel(net, device_ids=[local] if gpu else None, broadcast_buffers=False)
    if master:
        log = reopen(checkpoint.parent, first, dict(options=asdict(o), model=asdict(config)))
        if not first:
            checkpoint.unlink(missing_ok=True)
        millions = [sum(p.numel() for p in model.parameters() if p.requires_grad == kind) / 1e6 for kind in (True, False)]
        print(f'{o.model}: {L} blocks, {millions[0]:.1f} M parameters trained, {millions[1]:.1f} M in directors; {o.data}: '
              f'{len(shards.train)} + {len(shards.val)} images of {len(shards.modalities)} modalities\n{steps} steps '
              f'({steps / epoch_steps:.1f} epochs) of {o.batch} x {o.accumulate} x {world} = {global_batch} images, learning rate '
              f'up to {lr:.2e} after {warmup} steps, on {world} x {device.type} in {"bfloat16" if gpu and o.bf16 else "float32"}')
    stop = []       # signals that came
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stop.append(number))

    def load(number):
        images = shards.gather(shards.plan(o.seed, number, o.batch, rank, world, epoch_steps * o.accumulate))
        return images.pin_memory() if gpu else images       # the copy to the GPU then waits for nothing

    batches = data.prefetch(load, range(first * o.accumulate, steps * o.accumulate))
    no_experts = Routing(torch.zeros(L, device=device), *3 * [torch.zeros(L, 1, 0, device=device)])
    in_a_row = torch.zeros((), device=device)
    skipped, waited, logged, saved = in_a_row + skipped, 0, (first, time.perf_counter()), time.perf_counter()
    bar = tqdm(range(first, steps), initial=first, total=steps, unit='step', disable=not master, dynamic_ncols=True)
    for step in bar:
        progress = step / steps
        sigma, balance = cosine(o.sigma, 0, progress), cosine(o.balance, 0, progress)
        rate, momentum = learning_rate(step, steps, warmup, lr), cosine(o.momentum, 1, progress)
        for group in optimizer.param_groups:
            group['lr'] = rate

        stats = 0       # means over the global batch: L_self, whether to stop, L_co (L,); scores, load, usage (L, R) each
        for micro in range(o.accumulate):
            before = time.perf_counter()
            images = next(batches)
            waited += time.perf_counter() - before
            seed_step(o.seed, step, rank * o.accumulate + micro)
            images = data.augment(images.to(device, non_blocking=True), o.size)
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
            ((loss + o.co * co + balance * bal) / o.accumulate).backward()
            stats = stats + part / o.accumulate

        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        finite = torch.isfinite(norm) & torch.isfinite(stats).all()         # the same on every rank
        # fused AdamW divides by the one and skips the step for the other, without another pass over the gradients
        optimizer.grad_scale, optimizer.found_inf = (norm / o.clip).clamp(min=1), (~finite).float()
        optimizer.step()
        optimizer.zero_grad()
        scores, load_share, usage = stats[2 + L:].view(3, L, R)
        if R:
            model.update_directors(usage, momentum, finite)
        skipped, in_a_row = skipped + ~finite, (in_a_row + 1) * ~finite

        done = step + 1
        looking = done == 1 or done % val_every == 0 or done == steps
        if looking or done % o.log_every == 0:      # the only place that waits for the device
            mae, seconds = stats[0].item(), time.perf_counter() - logged[1]
            co, bal = (x.item() for x in layer_losses(Routing(stats[2:2 + L], scores[:, None], None, None), load_share))
            entry = dict(step=step, loss=mae + o.co * co + balance * bal, mae=mae, co=co, bal=bal, lr=rate, momentum=momentum,
                         sigma=sigma, grad_norm=norm.item(), skipped=int(skipped),
                         images_per_second=global_batch * (done - logged[0]) / seconds, waiting=waited / seconds)
            bar.set_postfix_str(f'loss {entry["loss"]:.4f}, {entry["images_per_second"]:.0f} images/s')
            if master:
                if looking:
                    entry |= validate(model, shards, o, device, autocast, done)
                with open(log, 'a') as file:
                    file.write(json.dumps(entry) + '\n')
            if in_a_row >= 10:
                raise SystemExit(f'{o.out}: ten steps in a row had a loss or gradient that is not finite; lower --lr')
            waited, logged = 0, (done, time.perf_counter())
        # a signal reaches ranks at different steps: they act on the shared flag, and where reading it costs no extra wait
        stopping = (not gpu or done % o.log_every == 0) and stats[1] > 0
        if master and (stopping or done == steps or time.perf_counter() - saved > 60 * o.save_minutes):
            save(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), step=done, skipped=int(skipped),
                 config=asdict(config), options=asdict(o))
            saved = time.perf_counter()
        if stopping:
            if master:
                print(f'\n{checkpoint}: saved after {done} of {steps} steps; go on with --resume')
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    if world > 1:
        dist.destroy_process_group()

if __name__ == '__main__':
    main()
