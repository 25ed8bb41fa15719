"""Pretrain a Director-Experts masked autoencoder on prepared images of many modalities.

    python pretrain.py --demo                           phantoms and a small model, minutes on a laptop's CPU
    torchrun --nproc_per_node=2 pretrain.py             the paper's run, on two GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py   on each of two

Writes to --out: config.json, log.jsonl (one object a line), ckpt.pt, at a validation two, at the end five pictures.
Ctrl-C and SIGTERM save first; the same command with --resume goes on from there as if nothing had happened.
"""
import ctypes
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import MAE, flops, layer_losses, load_weights, named_config, read_checkpoint
from prepare_medverse import parse_options

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
    # looking after it
    log_every: int = 10             # steps between lines of log.jsonl
    val_every: int = 0              # steps between validations; 0: ten a run
    val_share: float = 0.05         # share of each source held out (its tail, 1 to 200 images) for validation
    save_minutes: float = 15.0      # between checkpoints

    def __post_init__(self):
        few = min(self.batch, self.accumulate, self.log_every) < 1 or not self.clip or not (self.steps or self.epochs)
        if few or max(self.val_share, self.warmup, self.momentum) > 1:
            raise SystemExit('--batch, --accumulate, --log_every, and --epochs or --steps are 1 or more, --clip is '
                             'above 0, and --val_share, --warmup and --momentum are at most 1')

DEMO = dict(data='data/phantoms-64', out='out/demo', model='tiny', depth=4, size=64, patch=8, batch=64, steps=400,
            lr=8e-3, val_share=0.2, val_every=100)
PEAK = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, '4090': 165}     # bfloat16 TFLOP/s
MAX_SKIPPED = 10        # steps in a row that are not finite end a training
FREE = ('data', 'out', 'init', 'resume', 'overwrite', 'accumulate', 'device', 'bf16', 'log_every', 'val_every',
        'save_minutes')     # options that a resumed run may change; accumulate, device and bf16 round otherwise

# --- shared with finetune.py ------------------------------------------------------------------------------------------
def cosine(start, end, progress):       # half of one, from start at progress 0 to end at 1
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

def learning_rate(step, steps, warmup, peak):   # linear from above 0 to the peak, then half a cosine towards 0
    return peak * min((step + 1) / warmup, cosine(1, 0, max(0, step - warmup) / max(1, steps - warmup)))

def seed_step(seed, step, rank):    # from which alone every draw of a step follows: augmentation, mask, gate noise
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))

def setup(kind):
    """Join torchrun's processes if there are any: (rank, world size, rank on this machine, device). '' is the best."""
    rank, world, local = (int(os.environ.get(*pair)) for pair in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    kind = kind or (torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')).type
    try:
        device = torch.empty(0, device=f'cuda:{local}' if kind == 'cuda' else kind).device
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f'--device {kind}: {str(error).splitlines()[0]}')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # what fades of an idle expert's moments would slow AdamW on a CPU to a tenth
    if sys.platform == 'linux':     # glibc would give each big tensor back to the system, and faulting in the stacked
        for option, value in ((-4, 0), (-1, -1)):       # gradients anew would cost a fifth of a step on the CPU
            ctypes.CDLL(None).mallopt(option, value)    # M_MMAP_MAX, M_TRIM_THRESHOLD
    if world > 1:
        gpu = device.type == 'cuda'
        dist.init_process_group('nccl' if gpu else 'gloo', device_id=device if gpu else None)
    return rank, world, local, device

def make_optimizer(model, lr, weight_decay):
    """AdamW, decay on matrices and kernels; none on norms, biases (stacked ones are two-dimensional) and tokens."""
    groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name.endswith('.weight') and 'norm' not in name
            groups[not decays]['params'].append(parameter)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)

def resume(path, about, model, optimizer, token='cls_token'):
    """Load a run into model and optimizer, if it is the one that `about` describes; returns what else its file has."""
    state, _, file = read_checkpoint(path, token)
    was = file.get('about', {})
    if changed := [f'{name} {was.get(name)!s:.40} (not {value!s:.40})' for name, value in about.items()
                   if was.get(name) != value]:
        raise SystemExit(f'{path}: a run goes on as it began, with {", ".join(changed)}; a new one can --init from it')
    model.load_state_dict(state)
    optimizer.load_state_dict(file['optimizer'])
    return {name: value for name, value in file.items() if name not in ('model', 'optimizer')}      # gigabytes less

def run_script(name, *options):
    """Run a script of tests/ as a process of its own, until it ends."""
    script = Path(__file__).with_name('tests') / name
    if subprocess.run([sys.executable, script, *options]).returncode:
        raise SystemExit(f'{script}: has not finished; the reason is above')

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

def write_line(log, entry):     # to log.jsonl; NaN and infinity, which JSON does not know, become null
    entry = json.loads(json.dumps(entry), parse_constant=lambda name: None)
    print(json.dumps(entry), file=log, flush=True)

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

# --- validation and pictures ------------------------------------------------------------------------------------------
def mutual_information(counts):
    """Mutual information in bits between row and column of a table of counts (D, R), and its maximum, the smaller of
    the rows' entropy and log2 R. Where experts ignore the modality, few images still give about DR / 1.4 / images."""
    joint = counts.double() / counts.sum()
    rows, columns, both = (torch.special.entr(p).sum().item() / math.log(2)
                           for p in (joint.sum(1), joint.sum(0), joint))
    return rows + columns - both, min(rows, math.log2(counts.shape[1]))

@torch.no_grad()
@torch.compiler.set_stance('force_eager')       # its shapes are not worth compiling for
def validate(model, shards, o, device, autocast):
    """Look at the whole held-out images without gate noise: draw recon.png, experts.png; print and return the rest."""
    names = np.array(shards.modalities)[shards.modality[shards.val]]
    names, picks, kinds = np.unique(names, return_index=True, return_inverse=True)
    kinds = F.one_hot(torch.from_numpy(kinds)).T.float()        # (D, images)
    # one fixed draw (images, N - 1), so that each image has the same mask at every validation
    noise = torch.rand(kinds.shape[1], (o.size // o.patch) ** 2, generator=torch.Generator().manual_seed(o.seed))
    losses, weights = [], []
    for ids, part in zip(torch.from_numpy(shards.val).split(o.batch), noise.split(o.batch)):
        images = data.center(shards.gather(ids.numpy()).to(device), o.size)
        with autocast:
            loss, routing, _, _ = model(images, 0.0, part.to(device))
        losses.append(loss.cpu())
        if o.experts:
            weights.append(routing.weights.unflatten(1, (len(ids), -1)).mean(2).cpu())        # omega (L, B, R)
    losses = kinds @ torch.cat(losses) / kinds.sum(1)
    entry = dict(val_mae=losses.mean().item(), val=dict(zip(names, losses.tolist())))
    text = f'validation: L_self {entry["val_mae"]:.3f}'
    if o.experts:
        weights = torch.cat(weights, 1)
        first = kinds @ F.one_hot(weights.argmax(2), o.experts).float()      # counts of first choices (L, D, R)
        bits, (most, *_) = zip(*map(mutual_information, first))
        dead = [f'{layer + 1}.{expert}' for layer, expert in (weights.sum(1) == 0).nonzero().tolist()]
        entry |= dict(bits=bits, bits_max=most, dead=dead)
        text += f'; modality in first expert {" ".join(f"{b:.2f}" for b in bits)} of {most:.2f} bits; {len(dead)} dead'
        heads = [f'layer {layer}: {b:.2f} bits' for layer, b in enumerate(bits, 1)]
        shares = 0.94 - 0.94 * F.normalize(kinds @ weights, 1, 2)     # Fig. 9: a row a modality, a strip a layer
        rows = shares.movedim(1, 0)[:, :, None, None].expand(-1, -1, 3, -1, -1)
        note = f'in each strip experts 0 to {o.experts - 1}: the darker, the larger their mean weight, up to 1'
        draw_grid(Path(o.out, 'experts.png'), rows, names, heads, (24, 96), note)
    images = data.center(shards.gather(shards.val[picks]).to(device), o.size)
    draw_reconstructions(Path(o.out, 'recon.png'), model, images, noise[picks].to(device), names)
    tqdm.write(text)
    return entry

def brightness(images):     # what to multiply images (B, 3, S, S) in [0, 1] by, so that dark ones, as PET, are seen
    return 1 / images.flatten(1).quantile(0.99, 1).clamp(min=0.1)[:, None, None, None]

def draw_grid(path, rows, names, heads, size=(96, 96), note=''):
    """Rows of tiles (n, 3, H, W) in [0, 1] with a name before each row, a head over each column, a note below."""
    rows = [F.pad(F.interpolate(row.float().cpu(), size, mode='area'), (4, 0, 4, 0), value=1) for row in rows]
    page = torch.cat([torch.cat([*row], 2) for row in rows], 1)         # (3, rows, columns) of pixels
    page = F.pad(page, (90, 4, 20, 24 if note else 4), value=1).clamp(0, 1).mul(255).byte()
    picture = Image.fromarray(page.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(names):
        draw.text((6, 24 + (size[0] + 4) * number + size[0] / 2), name, 'black', anchor='lm')
    for number, head in enumerate(heads):
        draw.text((94 + (size[1] + 4) * number, 14), head, 'black', anchor='lm')
    draw.text((94, picture.height - 12), note, 'gray', anchor='lm')
    picture.quantize(palette=picture.quantize(method=Image.Quantize.MAXCOVERAGE)).save(path)    # a third of the bytes

def draw_reconstructions(path, model, images, noise, names):
    """Of images (B, 3, S, S) with mask noise (B, N - 1) each image, what the encoder sees, and the prediction in place
    of the rest, with the per-patch normalization undone (so a patch's mean and contrast come from the truth)."""
    _, _, prediction, mask = model(images, 0.0, noise)
    _, mean, std = model.targets(images)
    hidden = model.unpatchify(mask[:, :, None].expand_as(prediction)) > 0
    seen, guess = (data.denormalize(x).clamp(0, 1) for x in (images, model.unpatchify(prediction * std + mean)))
    grey = (seen - seen[:, :1]).abs().amax((1, 2, 3), keepdim=True) < 1e-3
    guess = torch.where(grey, guess.mean(1, keepdim=True), guess)       # of three guesses at one channel the mean
    gain = brightness(seen)
    rows = [seen * gain, torch.where(hidden, 0.5, seen * gain), torch.where(hidden, guess, seen) * gain]
    draw_grid(path, rows, ['image', 'what the\nencoder sees', 'its guess\nat the rest'], names)

# --- training ---------------------------------------------------------------------------------------------------------
def set_up(o, rank, world, local, device):
    """All that a training works with: data, schedule, network and optimizer, new or as --out's checkpoint has them."""
    gpu, out = device.type == 'cuda', Path(o.out)
    bf16 = gpu and o.bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
    shards = data.Shards(o.data, o.val_share)
    global_batch = o.batch * o.accumulate * world
    epoch_steps = len(shards.train) // global_batch
    if not epoch_steps or not len(shards.val):
        raise SystemExit(f'{o.data}: {len(shards.train)} + {len(shards.val)} images are too few to train on, '
                         f'{global_batch} a step, and to validate')
    steps = o.steps or o.epochs * epoch_steps
    warmup, peak = max(1, round(o.warmup * steps)), o.lr * global_batch / 512       # linear scaling, C.2.1

    torch.manual_seed(o.seed)
    model = MAE(named_config(o.model, o.depth, size=o.size, patch=o.patch, experts=o.experts, top_k=o.top_k,
                             routing=o.routing)).to(device)
    optimizer = make_optimizer(model, peak, o.weight_decay)
    about = {name: value for name, value in vars(o).items() if name not in FREE}
    about |= dict(steps=steps, global_batch=global_batch, training_images=len(shards.train))
    first = skipped = 0
    if o.resume and (out / 'ckpt.pt').exists():
        file = resume(out / 'ckpt.pt', about, model, optimizer)
        first, skipped = file['step'], file['skipped']
        if first == steps:
            print(f'{out}: this run is finished, all {steps} steps')
            sys.exit(0)
    elif o.init:
        state, config, _ = read_checkpoint(o.init)
        if config.heads != model.config.heads:
            raise SystemExit(f'{o.init}: has {config.heads} heads of attention, --model {o.model} {model.config.heads}')
        load_weights(model, state, o.init)
    # by block: one graph serves all of a kind, and DDP need not wait for the gradients of the whole network
    for block in (*model.blocks, *model.decoder_blocks) if bf16 else ():
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    net = model
    if world > 1:       # sends the gradients of a block while those of the block below are computed
        torch._dynamo.config.optimize_ddp = False       # which would cut a block's graph once more
        net = DistributedDataParallel(model, [local] if gpu else None, broadcast_buffers=False,
                                      gradient_as_bucket_view=True)
    log = None
    if rank == 0:
        log = open_run(out, o, first, dict(options=asdict(o), model=asdict(model.config), steps=steps))
        if not first:
            (out / 'ckpt.pt').unlink(missing_ok=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        print(f'{o.model}: {len(model.blocks)} blocks, {trained:.1f} M parameters, {world} x {device.type}, '
              f'{"bfloat16" if bf16 else "float32"}; {len(shards.train)} + {len(shards.val)} images of {shards.side} '
              f'pixels, seen at {o.size}; {steps} steps ({steps / epoch_steps:.1f} epochs) of {o.batch} x '
              f'{o.accumulate} x {world} = {global_batch} images, learning rate up to {peak:.2e} after {warmup} steps')
    batches = data.batches(shards, o.seed, range(first * o.accumulate, steps * o.accumulate), o.batch, rank, world,
                           epoch_steps * o.accumulate, device)
    chip = torch.cuda.get_device_name() if gpu else ''
    return SimpleNamespace(
        o=o, rank=rank, world=world, device=device, out=out, log=log, signals=stop_signals(),
        shards=shards, batches=batches, model=model, net=net, optimizer=optimizer,
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=bf16), about=about, warmup=warmup, peak=peak,
        chip_flops=next((1e12 * value for name, value in PEAK.items() if name in chip), math.inf),
        first=first, last=steps, skipped=torch.tensor(skipped, device=device))

def save_run(run, step):
    save(run.out / 'ckpt.pt', dict(
        model=run.model.state_dict(), optimizer=run.optimizer.state_dict(), step=step, skipped=run.skipped.item(),
        config=asdict(run.model.config), options=asdict(run.o), about=run.about))

def pack(mae, routing, signals):
    """What a step adds up over its ranks as one table (L, 3 R + 3); a row for each layer."""
    means = [tensor.mean(1) for tensor in (routing.scores, routing.chosen, routing.weights)]        # 3 of (L, R)
    others = torch.stack([routing.co, mae.expand_as(routing.co), torch.full_like(routing.co, len(signals))], 1)
    return torch.cat([*means, others], 1).detach()

def unpack(table):
    """Mean scores, load and usage (L, R); alignment losses (L,), L_self (), and whether there was a signal to stop."""
    R = table.shape[1] // 3 - 1
    scores, load, usage, others = table.split([R, R, R, 3], 1)
    return scores, load, usage, others[:, 0], others[0, 1], others[0, 2] > 0

def train(run):
    """The steps from run.first to run.last: losses (Eq. 8), AdamW, GEMA (Eq. 7). Returns how many steps are done."""
    o, model, optimizer, master, gpu = run.o, run.model, run.optimizer, run.rank == 0, run.device.type == 'cuda'
    steps, global_batch = run.about['steps'], run.about['global_batch']
    trained = [p for p in model.parameters() if p.requires_grad]
    in_a_row = torch.zeros_like(run.skipped)
    logged, logged_at, saved_at = run.first, time.perf_counter(), time.perf_counter()
    bar = tqdm(range(run.first, run.last), initial=run.first, total=steps, unit='step', disable=not master)
    for step in bar:
        sigma = cosine(o.sigma, 0, step / steps)
        balance = cosine(o.balance, 0, step / steps)
        momentum = cosine(o.momentum, 1, step / steps)
        rate = learning_rate(step, steps, run.warmup, run.peak)
        for group in optimizer.param_groups:
            group['lr'] = rate
        losses = usage = 0      # of the global batch: L_self, the layer sums of L_co and L_bal (3,); Omega (L, R)
        for micro in range(o.accumulate):
            images = next(run.batches)
            seed_step(o.seed, step, run.rank * o.accumulate + micro)
            images = data.augment(images, o.size)
            run.net.require_backward_grad_sync = micro == o.accumulate - 1      # DDP's gradients travel once a step
            with run.autocast:
                mae, routing, _, _ = run.net(images, torch.full((), sigma, device=run.device))
            mae = mae.mean()
            table = pack(mae, routing, run.signals)
            if run.world > 1:       # the one small all-reduce of a step
                dist.all_reduce(table)
                table /= run.world
            scores, load, omega, all_co, all_mae, stopping = unpack(table)
            co, bal = layer_losses(routing.co, routing.scores.mean(1), load)
            ((mae + o.co * co + balance * bal) / o.accumulate).backward()       # Eq. 8
            losses = losses + torch.stack([all_mae, *layer_losses(all_co, scores, load)]) / o.accumulate
            usage = usage + omega / o.accumulate

        norm = nn.utils.clip_grad_norm_(trained, o.clip)
        finite = norm.isfinite() & losses.isfinite().all()      # the same on every rank
        optimizer.found_inf = (~finite).float()                 # fused AdamW skips the step, and the host need not know
        optimizer.step()
        optimizer.zero_grad()
        for block, omega in zip(model.blocks, usage if o.experts else ()):
            block.dex.gema(omega, momentum, finite)
        run.skipped, in_a_row = run.skipped + ~finite, (in_a_row + 1) * ~finite

        done = step + 1
        looking = done in (1, steps) or done % (o.val_every or max(1, steps // 10)) == 0
        logging = looking or done % o.log_every == 0
        if gpu and not logging:     # what follows waits for the device; a steady step never does
            continue
        if logging:
            mae, co, bal = losses.tolist()
            speed = global_batch * (done - logged) / (time.perf_counter() - logged_at)
            entry = dict(step=step, loss=mae + o.co * co + balance * bal, mae=mae, co=co, bal=bal, lr=rate,
                         momentum=momentum, sigma=sigma, grad_norm=norm.item(), skipped=run.skipped.item(),
                         images_per_second=speed, mfu=speed * flops(model.config) / (run.world * run.chip_flops))
            bar.set_postfix_str(f'loss {entry["loss"]:.4f}, {speed:.0f} images/s' + f', MFU {entry["mfu"]:.2f}' * gpu)
            if master:
                if looking:
                    entry |= validate(model, run.shards, o, run.device, run.autocast)
                write_line(run.log, entry)
            logged, logged_at = done, time.perf_counter()
        if in_a_row >= MAX_SKIPPED:
            raise SystemExit(f'{run.out}: {MAX_SKIPPED} steps in a row were not finite; lower --lr')
        if master and (stopping or done == steps or time.perf_counter() - saved_at > 60 * o.save_minutes):
            save_run(run, done)
            saved_at = time.perf_counter()
        if stopping:
            break
    return done

def main():
    """Options, processes, the phantoms of a demo; then train."""
    o = parse_options(Options())
    if o.demo:
        o = parse_options(Options(demo=True, **DEMO))
    rank, world, local, device = setup(o.device)
    try:
        if o.demo and rank == 0 and len([*Path(o.data).glob('phantom-*/meta.json')]) < 10:
            run_script('phantoms.py', '--out', o.data, '--size', str(o.size))
        if world > 1:
            dist.barrier()
        run = set_up(o, rank, world, local, device)
        done, steps = train(run), run.about['steps']
    except OSError as error:        # a full disk, say
        raise SystemExit(f'{error}; the last checkpoint is whole')
    except KeyboardInterrupt:       # before the first step, when there is nothing to save
        raise SystemExit(130)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:       # other ranks leave with 0 in any case, or torchrun would kill this one while it saves
        stopped = '; go on with --resume' if done < steps else ''
        print(f'{o.out}: {done} of {steps} steps; ckpt.pt is the network, *.png are its pictures{stopped}')
        if stopped:
            sys.exit(128 + (run.signals or [signal.SIGTERM])[0])
        run_script('pictures.py', o.out)

if __name__ == '__main__':
    main()
