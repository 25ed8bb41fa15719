"""Pretrain a Director-Experts masked autoencoder on prepared images of many modalities.

    python pretrain.py --demo                           phantoms and a small model, minutes on a CPU
    torchrun --nproc_per_node=2 pretrain.py             the paper's run, on two GPUs

Writes to --out: config.json, log.jsonl (one JSON object a line), ckpt.pt, and pictures at the end.
Ctrl-C and SIGTERM save first; the same command with --resume goes on as if nothing had happened.
"""
import argparse
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('GOMP_SPINCOUNT', '1000')     # waiting threads spin less: for busy laptops
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import MAE, Config, layer_losses, load_weights, named_config, read_checkpoint

@dataclass
class Options:
    """The options; each comment is its --help. Defaults are the paper's (C.2.1) or the authors'."""
    data: str = 'data/medverse'     # folder of prepared sources
    out: str = 'out/pretrain'       # folder of this run
    init: str = ''                  # checkpoint to start from; empty: from scratch
    resume: bool = False            # continue from out's checkpoint; start fresh if there is none
    overwrite: bool = False         # start anew although out holds a run
    demo: bool = False              # a small model on phantoms, which are made if there are none
    model: str = 'base'             # tiny, small, base, large or huge
    depth: int = 0                  # blocks of the encoder; 0: as the model has
    size: int = Config.size         # side of the training images in pixels
    patch: int = Config.patch       # side of a patch in pixels
    experts: int = Config.experts   # R experts in every block; 0: the plain masked autoencoder
    top_k: int = Config.top_k       # K experts activated for an image
    routing: str = Config.routing   # image: one choice for a whole image; token: one for each token
    batch: int = 224                # images per process and micro-batch
    accumulate: int = 1             # micro-batches per optimizer step
    epochs: int = 100               # passes over the training images
    steps: int = 0                  # optimizer steps; 0: as many as --epochs makes
    warmup: float = 0.1             # share of the steps in which the learning rate rises
    lr: float = 1e-4                # peak learning rate for 512 images a step; scales with them
    weight_decay: float = 1e-6      # on weight matrices only
    clip: float = 1.0               # largest norm of the gradient
    align: float = 0.1              # weight of the alignment loss (Eq. 8)
    balance: float = 0.001          # weight of the balance loss at the start (Eq. 8), cosine to 0
    momentum: float = 0.99          # of the directors at the start (Eq. 7), cosine to 1
    sigma: float = 1.0              # deviation of the gate noise at the start (Eq. 21), cosine to 0
    device: str = ''                # cpu, cuda or mps; empty: cuda, or cpu where there is none
    seed: int = 0                   # of weights, order, augmentation, masks and noise
    bf16: bool = True               # on CUDA: bfloat16, and compiled unless TORCHDYNAMO_DISABLE=1
    log_every: int = 10             # steps between lines of log.jsonl
    val_every: int = 0              # steps between validations; 0: ten a run
    val_share: float = 0.05         # share of each source held out: its tail, 1 to 200 images
    save_minutes: float = 15.0      # between checkpoints

    def __post_init__(self):
        if min(self.batch, self.accumulate, self.log_every, self.steps or self.epochs) < 1:
            raise SystemExit('--batch, --accumulate, --log_every, --steps or --epochs: at least 1')
        if self.clip <= 0 or max(self.val_share, self.warmup, self.momentum) > 1:
            raise SystemExit('--clip must be above 0, --val_share, --warmup, --momentum at most 1')

DEMO = dict(data='data/phantoms-64', out='out/demo', model='tiny', depth=4, size=64, patch=8,
            batch=64, steps=400, lr=8e-3, val_share=0.2, val_every=100)
TERMS = ('l_self', 'align', 'balance')      # of the loss (Eq. 8), in this order
MAX_SKIPPED = 10    # steps in a row that are not finite end a training
# Only these options may change at --resume. The product GPUs * accumulate must stay the same;
# another split of it (4 * 1 for 2 * 2) changes rounding and the balance loss a little.
MAY_CHANGE = ('data', 'out', 'init', 'resume', 'overwrite', 'accumulate', 'device', 'bf16',
              'log_every', 'val_every', 'save_minutes')

# --- shared with finetune.py ----------------------------------------------------------------------
def parse_options(defaults, words=None):
    """`defaults` with what the command line, or `words`, changes. Help is each field's comment."""
    cls = type(defaults)
    comments = dict(re.findall(r'^    (\w+): .*?  # (.*)$', inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(
        description=inspect.getmodule(cls).__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in cls.__annotations__.items():
        how = dict(type=kind)
        if kind is bool:        # --bf16 or --no-bf16
            how = dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            how = dict(nargs='+')
        default = getattr(defaults, name)
        text = comments[name].replace('%', '%%')
        if default not in ('', ()):
            text += f' (default: {default})'
        parser.add_argument('--' + name, default=default, help=text, **how)
    values = vars(parser.parse_args(words))
    for name, value in values.items():
        if type(value) in (int, float) and not 0 <= value < math.inf:
            raise SystemExit(f'--{name} {value}: must be a number of 0 or more')
    return cls(**values)

def set_up_process(device_name):
    """Set up this process, torchrun's or alone: (rank, world size, local rank, device)."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    local = int(os.environ.get('LOCAL_RANK', 0))
    name = device_name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:        # whether there is such a device
        device = torch.empty(0, device=f'cuda:{local}' if name == 'cuda' else name).device
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f'--device {name}: {str(error).splitlines()[0]}')
    # The moments of idle experts fade to denormal numbers, on which a CPU is ten times as slow.
    torch.set_flush_denormal(True)
    gpu = device.type == 'cuda'
    if gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group('nccl' if gpu else 'gloo', device_id=device if gpu else None)
    return rank, world, local, device

def computes_bf16(device):
    """Whether the device is a GPU that computes in bfloat16 natively."""
    return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)

def cosine(start, end, progress):
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

def learning_rate(step, steps, warmup, peak):
    """Linear from above 0 to the peak in `warmup` steps, then half a cosine towards 0."""
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, cosine(1, 0, progress))

def seed_step(seed, step, place):
    """Seed torch for the micro-batch at this place of a step: its crops, masks and noise."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, place)).generate_state(1)[0]))

def make_optimizer(model, lr, weight_decay):
    """AdamW that decays matrices and kernels only, told by name: stacked biases are 2-D, too."""
    pairs = [(name.endswith('.weight') and 'norm' not in name, p)
             for name, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for decays, p in pairs if decays], weight_decay=weight_decay),
              dict(params=[p for decays, p in pairs if not decays], weight_decay=0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)

def step_if_finite(optimizer, lr, parameters, clip, losses_finite=True):
    """Set the rate, clip, let AdamW step unless something is not finite, and clear the gradients.
    Returns the norm, and whether the step was made; the host need not wait for them."""
    for group in optimizer.param_groups:
        group['lr'] = lr
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    finite = norm.isfinite() & losses_finite
    optimizer.found_inf = (~finite).float()     # GradScaler's flag: at 1, fused AdamW does nothing
    optimizer.step()
    optimizer.zero_grad()
    return norm, finite

def end_if_diverged(out, in_a_row):
    """End the program after MAX_SKIPPED steps in a row that were not finite."""
    if in_a_row >= MAX_SKIPPED:
        raise SystemExit(f'{out}: {MAX_SKIPPED} steps in a row not finite; check images and --lr')

def catch_signals(signals):
    """Have SIGTERM and SIGINT (Ctrl-C) join the list `signals` instead of ending the process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))

def release_signals():
    """Let SIGTERM and SIGINT end the process again."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)

def open_run(out, o, start, facts):
    """Open a run's log.jsonl, cut to the steps before `start`, and write config.json. With start 0
    the files of an older run are deleted. Until this process ends the log is locked for others."""
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / 'log.jsonl', 'a+', newline='\n')
    try:
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:     # on Windows
        print(f'{out}: cannot be locked on this system; start no second training in it')
    except BlockingIOError:
        raise SystemExit(f'{out}: another process trains here, perhaps of a killed torchrun')
    log.seek(0)
    lines = log.readlines()
    if lines and not (o.resume or o.overwrite):
        raise SystemExit(f'{out}: holds a run; give --resume, --overwrite or another --out')
    whole = [line for line in lines if line.endswith('}\n')]    # a killed run may cut its last line
    kept = [line for line in whole if json.loads(line)['step'] < start]
    # Steps rise, so `kept` is the file's beginning, and JSON is ASCII, so a character is a byte.
    log.truncate(len(''.join(kept)))
    if not start:
        for name in ('ckpt.pt', 'best.pt', 'results.json'):
            (out / name).unlink(missing_ok=True)
    save(out / 'config.json', json.dumps(dict(facts, options=asdict(o)), indent=1))
    return log

def write_line(log, entry):
    """Add a line to log.jsonl. NaN and infinity, unknown to JSON, become null."""
    entry = json.loads(json.dumps(entry), parse_constant=lambda name: None)
    print(json.dumps(entry), file=log, flush=True)

def save(path, content):
    """Write text or a checkpoint beside the old file, then move it into place."""
    new = path.with_name(path.name + '.new')
    try:
        with open(new, 'wb') as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        why = error.__context__ or error    # torch hides 'no space left on device' behind its own
        raise SystemExit(f'{path}: could not be saved ({why}); what was there before is untouched')

def resume(path, identity, model, optimizer):
    """Load a run that began with the same `identity`, and return its checkpoint."""
    state, _, checkpoint = read_checkpoint(path)
    was = checkpoint.get('identity', {})
    changed = [f'{name} {was.get(name)!s:.40} (not {value!s:.40})'
               for name, value in identity.items() if was.get(name) != value]
    if changed:
        raise SystemExit(f'{path}: a run goes on as it began, with {", ".join(changed)}')
    model.load_state_dict(state)
    optimizer.load_state_dict(checkpoint['optimizer'])
    return checkpoint

def run_program(name, *words):
    """Run a program of tests/lab in a process of its own, which never outlives this one."""
    path = Path(__file__).resolve().parent / 'tests' / 'lab' / '__main__.py'
    # When we end, even by kill -9, the pipe closes. Then __main__.py ends the program.
    command = [sys.executable, path, name, *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as program:
        program.wait()
    if program.returncode:
        raise SystemExit(f'tests.lab.{name}: has not finished; the reason is above')

# --- validation -----------------------------------------------------------------------------------
def mutual_information(counts):
    """Mutual information in bits of the rows and columns of a table of counts, and its maximum:
    the smaller of the rows' entropy and log2 of the number of columns."""
    joint = counts.double() / counts.sum()
    row_bits, column_bits, joint_bits = [torch.special.entr(shares).sum().item() / math.log(2)
                                         for shares in (joint.sum(1), joint.sum(0), joint)]
    return row_bits + column_bits - joint_bits, min(row_bits, math.log2(counts.shape[1]))

@torch.no_grad()
@torch.compiler.set_stance('force_eager')       # its shapes are not worth compiling for
def look_at_held_out(model, shards, o, device, autocast):
    """L_self (V,) of the V held-out images and, with experts, their weights omega (L, V, R).
    The images are seen whole, without gate noise, under the same masks each time."""
    generator = torch.Generator().manual_seed(o.seed)
    mask_noise = torch.rand(len(shards.val), (o.size // o.patch) ** 2, generator=generator)
    losses, weights = [], []
    for ids, noise in zip(torch.from_numpy(shards.val).split(o.batch), mask_noise.split(o.batch)):
        images = data.whole_view(shards.gather(ids.numpy()).to(device), o.size)
        with autocast:
            l_self, routing, _, _ = model(images, mask_noise=noise.to(device))
        losses.append(l_self.cpu())
        if routing is not None:     # (L, M, R) -> (L, B, R): mean over an image's units
            weights.append(routing.weights.unflatten(1, (len(ids), -1)).mean(2).cpu())
    return torch.cat(losses), (torch.cat(weights, 1) if weights else None)

def validate(model, shards, o, device, autocast):
    """The numbers of a validation; val_l_self is the mean over modalities, not over images."""
    losses, weights = look_at_held_out(model, shards, o, device, autocast)
    present, place = np.unique(shards.image_modality[shards.val], return_inverse=True)
    belongs = F.one_hot(torch.from_numpy(place)).T.float()        # (present modalities, V)
    means = belongs @ losses / belongs.sum(1)
    names = [shards.modalities[modality] for modality in present]
    entry = dict(val_l_self=means.mean().item(), val=dict(zip(names, means.tolist())))
    if weights is None:
        return entry
    first = F.one_hot(weights.argmax(2), o.experts).float()     # (L, V, R): 1 at the first expert
    counts = belongs @ first                                # (L, modalities, R), in images
    bits, bits_max = zip(*map(mutual_information, counts))  # of each layer; the same max in all
    second = weights.topk(min(2, o.experts)).values[:, :, -1].median(1).values      # (L,)
    dead = (weights.sum(1) == 0).nonzero().tolist()         # named 2.3: layer from 1, expert from 0
    return dict(entry, bits=bits, bits_max=bits_max[0], second=second.tolist(),
                dead=[f'{layer + 1}.{expert}' for layer, expert in dead])

# --- training -------------------------------------------------------------------------------------
def plan_steps(o, shards, world):
    """Images of a step, steps of an epoch and of all, and the learning rate's warm-up and peak."""
    global_batch = o.batch * o.accumulate * world
    epoch_steps = len(shards.train) // global_batch
    if not epoch_steps or not len(shards.val):
        raise SystemExit(f'{o.data}: {len(shards.train)} images, too few for {global_batch} a step')
    steps = o.steps or o.epochs * epoch_steps
    return SimpleNamespace(
        global_batch=global_batch, epoch_steps=epoch_steps, steps=steps,
        warmup=max(1, round(o.warmup * steps)), peak=o.lr * global_batch / 512)     # C.2.1

def build_network(o, plan, identity, device):
    """Model and optimizer from scratch, --init or out's checkpoint; steps done and skipped."""
    torch.manual_seed(o.seed)
    config = named_config(o.model, o.depth, size=o.size, patch=o.patch, experts=o.experts,
                          top_k=o.top_k, routing=o.routing)
    model = MAE(config).to(device)
    optimizer = make_optimizer(model, plan.peak, o.weight_decay)
    path = Path(o.out, 'ckpt.pt')
    if o.resume and path.exists():
        checkpoint = resume(path, identity, model, optimizer)
        return model, optimizer, checkpoint['done'], checkpoint['skipped']
    if o.init:
        state, theirs, _ = read_checkpoint(o.init)
        if theirs.heads != config.heads:        # no tensor's shape shows them
            raise SystemExit(f'{o.init}: {theirs.heads} heads, but {o.model} has {config.heads}')
        load_weights(model, state, o.init)
    return model, optimizer, 0, 0

def compile_blocks(model):
    """Compile each block alone: equal ones share a graph, and DDP sends gradients as they come."""
    torch._dynamo.config.optimize_ddp = False       # it would split blocks where its buckets end
    for block in (*model.blocks, *model.decoder_blocks):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)

def announce(run):
    """Say what will happen, before it does."""
    millions = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    print(f'{run.out} on {run.world} x {run.device.type}, {"bfloat16" if run.bf16 else "float32"}: '
          f'{millions:.1f} M parameters, {len(run.shards.train)} + {len(run.shards.val)} images, '
          f'{run.plan.steps} steps of {run.plan.global_batch}, learning rate up to '
          f'{run.plan.peak:.2e}\npictures at any time: python -m tests.lab.pictures {run.out}')

def build_run(o, rank, world, local, device):
    """All that a training works with, new or of --out's checkpoint. Exits if that is finished."""
    out, shards = Path(o.out), data.Shards(o.data, o.val_share)
    plan = plan_steps(o, shards, world)
    identity = {name: value for name, value in vars(o).items() if name not in MAY_CHANGE}
    identity.update(steps=plan.steps, global_batch=plan.global_batch, images=len(shards.train))
    model, optimizer, start, skipped = build_network(o, plan, identity, device)
    if start == plan.steps:
        print(f'{out}: this run is finished, all {start} steps')
        sys.exit()
    bf16 = o.bf16 and computes_bf16(device)
    if bf16:
        compile_blocks(model)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, [local] if device.type == 'cuda' else None,
                                      gradient_as_bucket_view=True)
        # The constructor has sent rank 0's buffers. From now on gema keeps them equal on all ranks.
        net.broadcast_buffers = False
    micros = range(start * o.accumulate, plan.steps * o.accumulate)
    batches = data.batches(shards, o.seed, micros, o.batch, rank, world,
                           plan.epoch_steps * o.accumulate, device)
    run = SimpleNamespace(
        o=o, rank=rank, world=world, device=device, out=out, shards=shards, plan=plan, bf16=bf16,
        model=model, net=net, optimizer=optimizer, batches=batches, start=start,
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        header=dict(config=asdict(model.config), options=asdict(o), identity=identity),
        skipped=torch.tensor(skipped, device=device), signals=[])
    if rank == 0:
        run.log = open_run(out, o, start, dict(config=asdict(model.config), steps=plan.steps))
        announce(run)
    return run

def mean_over_ranks(world, *tensors):
    """Means of tensors over all ranks, by one all-reduce for all of them."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if world > 1:
        dist.all_reduce(flat)
    parts = (flat / world).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]

def loss_terms(l_self, routing, world):
    """This rank's TERMS of Eq. 8, (3,), and the usage of the experts, (L, R); 0 if there are none.
    The usage, Omega of Eq. 6, is each expert's mean omega over all ranks' images."""
    l_self = l_self.mean()
    if routing is None:
        zero = torch.zeros_like(l_self)
        return torch.stack([l_self, zero, zero]), 0
    activated, weights = routing.activated.mean(1), routing.weights.detach().mean(1)
    load, usage = mean_over_ranks(world, activated, weights)
    align, balance = layer_losses(routing.align, routing.scores.mean(1), load)
    return torch.stack([l_self, align, balance]), usage

def accumulate_gradients(run, step, sigma, factors):
    """Gradients of a step's micro-batches, where a loss is the sum of the TERMS times factors (3,).
    Returns the terms (3,) and the usage (L, R), both as means over the micro-batches."""
    o, mean_terms, batch_usage = run.o, 0, 0
    for micro in range(o.accumulate):
        images = next(run.batches)
        seed_step(o.seed, step, micro * run.world + run.rank)
        images = data.augment(images, o.size)
        run.net.require_backward_grad_sync = micro == o.accumulate - 1      # DDP sends them once
        with run.autocast:      # sigma is a tensor, or each new value would compile anew
            l_self, routing, _, _ = run.net(images, torch.full((), sigma, device=run.device))
        terms, usage = loss_terms(l_self, routing, run.world)
        loss = sum(factor * term for factor, term in zip(factors, terms))       # Eq. 8
        (loss / o.accumulate).backward()
        mean_terms = mean_terms + terms.detach() / o.accumulate
        batch_usage = batch_usage + usage / o.accumulate
    return mean_terms, batch_usage

def validation_line(found):
    """What the terminal shows of a validation."""
    text = f'validation: L_self {found["val_l_self"]:.3f}'
    if 'bits' in found:
        bits = ' '.join(f'{value:.2f}' for value in found['bits'])
        text += f'; bits: {bits} of {found["bits_max"]:.2f}; dead experts: {len(found["dead"])}'
    return text

def train(run):
    """Make the steps that are left: losses, AdamW, GEMA. Returns how many steps are done."""
    o, plan, model = run.o, run.plan, run.model
    trained = [p for p in model.parameters() if p.requires_grad]
    val_every = o.val_every or max(1, plan.steps // 10)
    # Reading numbers makes the host wait for a GPU, so do it about every ten micro-batches.
    read_every = max(1, 10 // o.accumulate) if run.device.type == 'cuda' else 1
    catch_signals(run.signals)
    in_a_row = torch.zeros_like(run.skipped)
    logged, logged_at, saved_at = run.start, time.perf_counter(), time.perf_counter()
    bar = tqdm(range(run.start, plan.steps), initial=run.start, total=plan.steps, unit='step',
               disable=run.rank > 0)
    for step in bar:
        progress = step / plan.steps
        sigma, momentum = cosine(o.sigma, 0, progress), cosine(o.momentum, 1, progress)
        factors = (1, o.align, cosine(o.balance, 0, progress))      # of TERMS
        rate = learning_rate(step, plan.steps, plan.warmup, plan.peak)
        terms, batch_usage = accumulate_gradients(run, step, sigma, factors)
        signalled = torch.full((), float(len(run.signals) > 0), device=run.device)
        terms, signalled = mean_over_ranks(run.world, terms, signalled)
        stop = signalled > 0        # on all ranks, if one had a signal
        losses_finite = terms.isfinite().all()                  # the same on every rank
        norm, finite = step_if_finite(run.optimizer, rate, trained, o.clip, losses_finite)
        if o.experts:
            for block, layer_usage in zip(model.blocks, batch_usage):
                block.dex.gema(layer_usage, momentum, finite)       # Eq. 7
        run.skipped += ~finite
        in_a_row = torch.where(finite, 0, in_a_row + 1)

        done = step + 1
        validating = done in (1, plan.steps) or done % val_every == 0
        logging = validating or done % o.log_every == 0
        if not (logging or done % read_every == 0):     # below, numbers are read: to log, end, save
            continue
        if logging:
            loss = sum(factor * term for factor, term in zip(factors, terms.tolist()))
            speed = plan.global_batch * (done - logged) / (time.perf_counter() - logged_at)
            bar.set_postfix_str(f'loss {loss:.4f}, {speed:.0f} images/s')
            entry = dict(step=step, loss=loss, **dict(zip(TERMS, terms.tolist())), lr=rate,
                         momentum=momentum, sigma=sigma, grad_norm=norm.item(),
                         skipped=run.skipped.item(), images_per_second=speed)
            if run.rank == 0 and validating:
                found = validate(model, run.shards, o, run.device, run.autocast)
                tqdm.write(validation_line(found))
                entry.update(found)
            if run.rank == 0:
                write_line(run.log, entry)
            logged, logged_at = done, time.perf_counter()
        end_if_diverged(run.out, in_a_row)
        saving = stop or done == plan.steps or time.perf_counter() - saved_at > 60 * o.save_minutes
        if run.rank == 0 and saving:
            save(run.out / 'ckpt.pt', dict(
                run.header, model=model.state_dict(), optimizer=run.optimizer.state_dict(),
                done=done, skipped=run.skipped.item()))
            saved_at = time.perf_counter()
        if stop:
            break
    return done

def main():
    """Read the options, make the phantoms of a demo, train, and draw."""
    o = parse_options(Options())
    if o.demo:
        o = parse_options(Options(demo=True, **DEMO))       # the command line wins over DEMO
    rank, world, local, device = set_up_process(o.device)
    try:
        if o.demo and rank == 0 and len(list(Path(o.data).glob('phantom-*/meta.json'))) < 10:
            run_program('phantoms', '--out', o.data, '--size', o.size)
        if world > 1:
            dist.barrier()
        run = build_run(o, rank, world, local, device)
        done, steps = train(run), run.plan.steps
    except OSError as error:        # a full disk, for example
        raise SystemExit(f'{error}; the last checkpoint is whole')
    except KeyboardInterrupt:       # before the first step, when there is nothing to save
        raise SystemExit(130)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:    # with another status than 0, torchrun would kill rank 0 while it saves
        return
    if done < steps:
        print(f'{o.out}: stopped after {done} of {steps} steps; go on with --resume')
        number = run.signals[0] if run.signals else signal.SIGTERM      # another rank had it
        sys.exit(128 + number)
    release_signals()       # all is saved
    print(f'{o.out}: all {steps} steps; ckpt.pt is the network, *.png are its pictures')
    run_program('pictures', o.out)

if __name__ == '__main__':
    main()
