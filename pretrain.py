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
from model import MAE, layer_losses, load_weights, named_config, read_checkpoint

@dataclass
class Options:
    """Each field is an option, such as --batch 64, --resume or --no-bf16. The defaults are the
    paper's run (C.2.1) and, where it is silent, the authors' code."""
    data: str = 'data/medverse'     # folder of prepared sources
    out: str = 'out/pretrain'       # folder of this run
    init: str = ''                  # checkpoint to start from; empty: from scratch
    resume: bool = False            # continue from out's checkpoint; start fresh if there is none
    overwrite: bool = False         # start anew although out holds a run
    demo: bool = False              # a small model on phantoms, which are made if there are none
    model: str = 'base'             # tiny, small, base, large or huge
    depth: int = 0                  # blocks of the encoder; 0: as the model has
    size: int = 256                 # side of the training images in pixels
    patch: int = 16                 # side of a patch in pixels
    experts: int = 8                # R experts in every block; 0: the plain masked autoencoder
    top_k: int = 2                  # K experts activated for an image
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
    save_minutes: float = 15.0      # minutes between checkpoints

    def __post_init__(self):
        if min(self.batch, self.accumulate, self.log_every, self.steps or self.epochs) < 1:
            raise SystemExit('--batch, --accumulate, --log_every, --steps or --epochs: at least 1')
        if self.clip <= 0 or max(self.val_share, self.warmup, self.momentum) > 1:
            raise SystemExit('--clip must be above 0, --val_share, --warmup, --momentum at most 1')

DEMO = dict(data='data/phantoms-64', out='out/demo', model='tiny', depth=4, size=64, patch=8,
            batch=64, steps=400, lr=8e-3, val_share=0.2, val_every=100)
# Only these options may change at --resume. So may the number of GPUs, if GPUs * accumulate stays
# the same; rounding and the balance loss then change a little.
MAY_CHANGE = ('data', 'out', 'init', 'resume', 'overwrite', 'accumulate', 'device', 'bf16',
              'log_every', 'val_every', 'save_minutes')

# --- shared with finetune.py ----------------------------------------------------------------------
def parse_options(defaults, words=None):
    """`defaults` with what the command line, or `words`, changes. --help shows the source."""
    cls = type(defaults)
    fields, _, _ = inspect.getsource(cls).partition('\n\n')     # up to the first blank line
    parser = argparse.ArgumentParser(
        description=inspect.getmodule(cls).__doc__, epilog=fields, usage=argparse.SUPPRESS,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in cls.__annotations__.items():
        how = dict(type=kind)
        if kind is bool:        # --bf16 or --no-bf16
            how = dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            how = dict(nargs='+')
        default = getattr(defaults, name)
        parser.add_argument('--' + name, default=default, help=argparse.SUPPRESS, **how)
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

def use_bf16(on, device):
    """Whether to compute in bfloat16: if --bf16 is on, on a GPU that does so natively."""
    return on and device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)

def cosine(start, end, progress):
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

def learning_rate(step, steps, warmup, peak):
    """Linear from above 0 to the peak in `warmup` steps, then half a cosine towards 0."""
    if step < warmup:
        return peak * ((step + 1) / warmup)
    return peak * cosine(1, 0, (step - warmup) / max(1, steps - warmup))

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
    """End the program after ten steps in a row that were not finite."""
    if in_a_row >= 10:
        raise SystemExit(f'{out}: 10 steps in a row are not finite; check the images and --lr')

def on_signals(handler):
    """Set the handler of SIGTERM and SIGINT (Ctrl-C)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)

def lock(log, out):
    """Lock an open log until this process ends. Exits if another process holds it."""
    try:
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:     # on Windows
        print(f'{out}: cannot be locked on this system; start no second training in it')
    except BlockingIOError:
        raise SystemExit(f'{out}: another process trains here, perhaps of a killed torchrun')

def prepare_folder(out, o, start):
    """Make the folder of a run ready to go on at step `start`: lock it, and delete what is later.
    Returns the log. Exits if there is a run, and neither --resume nor --overwrite is given."""
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / 'log.jsonl', 'a+', newline='\n')
    lock(log, out)
    log.seek(0)
    lines = log.readlines()
    if lines and not (o.resume or o.overwrite):
        raise SystemExit(f'{out}: holds a run; give --resume, --overwrite or another --out')
    whole = [line for line in lines if line.endswith('}\n')]    # a killed run may cut its last line
    kept = [line for line in whole if json.loads(line)['step'] < start]
    # Steps rise, so the kept lines are the file's first.
    log.truncate(sum(len(line.encode()) for line in kept))
    if not start:
        for name in ('ckpt.pt', 'best.pt', 'results.json'):
            (out / name).unlink(missing_ok=True)
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

def load_run(path, identity, model, optimizer):
    """Load a run and return its checkpoint. Exits if a setting of `identity` has changed."""
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
        raise SystemExit(f'tests.lab.{name}: ended with {program.returncode}; the reason is above')

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
    The images are seen whole, without gate noise, and with the same patches hidden each time."""
    generator = torch.Generator().manual_seed(o.seed)
    mask_noise = torch.rand(len(shards.val), (o.size // o.patch) ** 2, generator=generator)
    losses, weights = [], []
    for ids, noise in zip(torch.from_numpy(shards.val).split(o.batch), mask_noise.split(o.batch)):
        images = data.whole_view(shards.gather(ids.numpy()).to(device), o.size)
        with autocast:
            l_self, routing, _, _ = model(images, mask_noise=noise.to(device))
        losses.append(l_self.cpu())
        if routing is not None:
            weights.append(routing.weights.cpu())
    return torch.cat(losses), (torch.cat(weights, 1) if weights else None)

def validate(model, shards, o, device, autocast):
    """The numbers of a validation; val_l_self is the mean over modalities, not over images."""
    losses, weights = look_at_held_out(model, shards, o, device, autocast)
    modality = torch.from_numpy(shards.image_modality[shards.val])      # (V,), an index each
    present = modality.unique().tolist()
    val = {shards.modalities[m]: losses[modality == m].mean().item() for m in present}
    entry = dict(val_l_self=sum(val.values()) / len(val), val=val)
    if weights is None:
        return entry
    first = F.one_hot(weights.argmax(2), o.experts)     # (L, V, R): 1 at the first expert
    counts = torch.stack([first[:, modality == m].sum(1) for m in present], 1)  # (L, present, R)
    bits, bits_max = zip(*map(mutual_information, counts))      # bits_max is the same in all layers
    # Median weight of an image's second expert: 0 if K = 1, and 1 if there is but one expert.
    second = weights.topk(min(2, o.experts)).values[:, :, -1].median(1).values
    dead = (weights.sum(1) == 0).sum(1)     # experts that no image activates
    return dict(entry, bits=bits, bits_max=bits_max[0], second=second.tolist(), dead=dead.tolist())

# --- training -------------------------------------------------------------------------------------
def plan_steps(o, shards, world):
    """Images in a step; steps in an epoch, in the run and its warm-up; peak of the rate (C.2.1)."""
    global_batch = o.batch * o.accumulate * world
    epoch_steps = len(shards.train) // global_batch
    if not epoch_steps or not len(shards.val):
        raise SystemExit(f'{o.data}: {len(shards.train)} images, too few for {global_batch} a step')
    steps = o.steps or o.epochs * epoch_steps
    return SimpleNamespace(global_batch=global_batch, epoch_steps=epoch_steps, steps=steps,
                           warmup=max(1, round(o.warmup * steps)), peak=o.lr * global_batch / 512)

def build_network(o, plan, identity, device):
    """Model and optimizer from scratch, --init or out's checkpoint; steps done and skipped."""
    torch.manual_seed(o.seed)
    config = named_config(o.model, o.depth, size=o.size, patch=o.patch, experts=o.experts,
                          top_k=o.top_k)
    model = MAE(config).to(device)
    optimizer = make_optimizer(model, plan.peak, o.weight_decay)
    path = Path(o.out, 'ckpt.pt')
    if o.resume and path.exists():
        checkpoint = load_run(path, identity, model, optimizer)
        return model, optimizer, checkpoint['done'], checkpoint['skipped']
    if o.init:
        state, theirs, _ = read_checkpoint(o.init)
        if theirs.heads != config.heads:        # no tensor's shape shows them
            raise SystemExit(f'{o.init}: {theirs.heads} heads, but {o.model} has {config.heads}')
        load_weights(model, state, o.init)
    return model, optimizer, 0, 0

def compile_blocks(model):
    """Compile each block alone: blocks share a graph, and DDP can send gradients block by block."""
    torch._dynamo.config.optimize_ddp = False       # it would split blocks where its buckets end
    for block in (*model.blocks, *model.decoder_blocks):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)

def build_run(o, rank, world, local, device):
    """All that a training works with, new or resumed. Exits if it is finished."""
    run = SimpleNamespace(o=o, out=Path(o.out), rank=rank, world=world, device=device, signals=[])
    run.log = None      # main opens it, on rank 0 alone
    run.shards = data.Shards(o.data, o.val_share)
    run.plan = plan_steps(o, run.shards, world)
    run.identity = {name: value for name, value in vars(o).items() if name not in MAY_CHANGE}
    run.identity.update(steps=run.plan.steps, global_batch=run.plan.global_batch,
                        images=len(run.shards.train))
    run.model, run.optimizer, run.start, skipped = build_network(o, run.plan, run.identity, device)
    if run.start == run.plan.steps:
        print(f'{run.out}: this run is finished, all {run.start} steps')
        sys.exit()
    run.skipped = torch.tensor(skipped, device=device)
    run.bf16 = use_bf16(o.bf16, device)
    run.autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.bf16)
    if run.bf16:
        compile_blocks(run.model)
    run.net = run.model     # what the loop calls: the model, or DDP around it
    if world > 1:
        run.net = DistributedDataParallel(run.model, [local] if device.type == 'cuda' else None,
                                          gradient_as_bucket_view=True)
        # gema keeps buffers equal. (As an option of the constructor this warns in torch 2.13.)
        run.net.broadcast_buffers = False
    micros = range(run.start * o.accumulate, run.plan.steps * o.accumulate)
    run.batches = data.batches(run.shards, o.seed, micros, o.batch, rank, world,
                               run.plan.epoch_steps * o.accumulate, device)
    return run

def mean_over_ranks(world, tensor):
    """The mean of a tensor over all ranks; it may be overwritten."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor / world

def loss_terms(l_self, routing, world):
    """The terms of Eq. 8 on this rank, by name, and the experts' usage (L, R) on all ranks: each
    expert's mean omega, Omega of Eq. 6. Without experts all but l_self is 0."""
    l_self = l_self.mean()
    if routing is None:
        zero = torch.zeros_like(l_self)
        return dict(l_self=l_self, align=zero, balance=zero), zero
    activated, weights = routing.activated.mean(1), routing.weights.detach().mean(1)
    load, usage = mean_over_ranks(world, torch.stack([activated, weights]))     # I and Omega
    align, balance = layer_losses(routing.align, routing.scores.mean(1), load)
    return dict(l_self=l_self, align=align, balance=balance), usage

def accumulate_gradients(run, step, sigma, factors):
    """Add up the gradients of a step's micro-batches. The loss is the sum of factor * term.
    Returns the terms and the experts' usage (L, R), both means over micro-batches and ranks."""
    o, mean_terms, batch_usage = run.o, dict.fromkeys(factors, 0), 0
    for micro in range(o.accumulate):
        images = next(run.batches)
        seed_step(o.seed, step, micro * run.world + run.rank)
        images = data.augment(images, o.size)
        run.net.require_backward_grad_sync = micro == o.accumulate - 1      # DDP sends them once
        with run.autocast:      # sigma is a tensor, or each new value would compile anew
            l_self, routing, _, _ = run.net(images, torch.full((), sigma, device=run.device))
        terms, usage = loss_terms(l_self, routing, run.world)
        loss = sum(factors[name] * term for name, term in terms.items())        # Eq. 8
        (loss / o.accumulate).backward()
        for name, term in terms.items():
            mean_terms[name] += term.detach() / o.accumulate
        batch_usage += usage / o.accumulate
    means = mean_over_ranks(run.world, torch.stack([*mean_terms.values()]))
    return dict(zip(mean_terms, means)), batch_usage

def log_validation(run, entry):
    """Validate, show the result, and add its numbers to an entry of the log."""
    found = validate(run.model, run.shards, run.o, run.device, run.autocast)
    text = f'validation: L_self {found["val_l_self"]:.3f}'
    if 'bits' in found:
        bits = ' '.join(f'{value:.2f}' for value in found['bits'])
        text += f'; bits: {bits} of {found["bits_max"]:.2f}; dead experts: {sum(found["dead"])}'
    tqdm.write(text)
    entry.update(found)

def train(run):
    """Make the steps that are left: losses, AdamW, GEMA. Returns how many steps are done."""
    o, plan, model = run.o, run.plan, run.model
    trained = [p for p in model.parameters() if p.requires_grad]
    val_every = o.val_every or max(1, plan.steps // 10)
    # A check makes the host wait for a GPU: check about every ten micro-batches.
    check_every = max(1, 10 // o.accumulate) if run.device.type == 'cuda' else 1
    on_signals(lambda number, frame: run.signals.append(number))
    in_a_row = torch.zeros_like(run.skipped)
    done_at_log, log_time, save_time = run.start, time.perf_counter(), time.perf_counter()
    bar = tqdm(range(run.start, plan.steps), initial=run.start, total=plan.steps, unit='step',
               disable=run.rank > 0)
    for step in bar:
        progress = step / plan.steps
        sigma, momentum = cosine(o.sigma, 0, progress), cosine(o.momentum, 1, progress)
        factors = dict(l_self=1, align=o.align, balance=cosine(o.balance, 0, progress))
        rate = learning_rate(step, plan.steps, plan.warmup, plan.peak)
        terms, batch_usage = accumulate_gradients(run, step, sigma, factors)
        losses_finite = torch.stack([*terms.values()]).isfinite().all()     # equal on all ranks
        norm, finite = step_if_finite(run.optimizer, rate, trained, o.clip, losses_finite)
        if o.experts:
            for block, layer_usage in zip(model.blocks, batch_usage):
                block.dex.gema(layer_usage, momentum, finite)       # Eq. 7
        run.skipped += ~finite
        in_a_row = torch.where(finite, 0, in_a_row + 1)

        done = step + 1
        last = done == plan.steps
        validating = done == 1 or last or done % val_every == 0
        logging = validating or done % o.log_every == 0
        checking = logging or done % check_every == 0   # diverged? signalled? time to save?
        if logging:
            terms = {name: term.item() for name, term in terms.items()}
            loss = sum(factors[name] * term for name, term in terms.items())
            speed = plan.global_batch * (done - done_at_log) / (time.perf_counter() - log_time)
            bar.set_postfix_str(f'loss {loss:.4f}, {speed:.0f} images/s')
            entry = dict(step=step, loss=loss, **terms, lr=rate, momentum=momentum, sigma=sigma,
                         grad_norm=norm.item(), skipped=run.skipped.item(),
                         images_per_second=speed)
            if run.rank == 0 and validating:
                log_validation(run, entry)
            if run.rank == 0:
                write_line(run.log, entry)
            done_at_log, log_time = done, time.perf_counter()
        if checking:
            end_if_diverged(run.out, in_a_row)
            signalled = torch.full((), float(len(run.signals) > 0), device=run.device)
            stop = mean_over_ranks(run.world, signalled).item() > 0     # on all ranks at once
            minutes = (time.perf_counter() - save_time) / 60
            if run.rank == 0 and (stop or last or minutes > o.save_minutes):
                save(run.out / 'ckpt.pt', dict(
                    config=asdict(model.config), options=asdict(o), identity=run.identity,
                    model=model.state_dict(), optimizer=run.optimizer.state_dict(),
                    done=done, skipped=run.skipped.item()))
                save_time = time.perf_counter()
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
        steps = run.plan.steps
        if rank == 0:
            run.log = prepare_folder(run.out, o, run.start)
            facts = dict(config=asdict(run.model.config), steps=steps, options=asdict(o))
            save(run.out / 'config.json', json.dumps(facts, indent=1))
            millions = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
            print(f'{o.out} on {world} x {device.type}, {"bfloat16" if run.bf16 else "float32"}: '
                  f'{millions:.1f} M parameters, {len(run.shards.train)} images, {steps} steps of '
                  f'{run.plan.global_batch}; pictures: python -m tests.lab.pictures {o.out}')
        done = train(run)
    except OSError as error:        # a full disk, for example
        raise SystemExit(f'{error}; the last checkpoint is whole')
    except KeyboardInterrupt:       # before the first step, when there is nothing to save
        raise SystemExit(130)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:    # if one rank fails, torchrun kills rank 0, which may still be saving
        return
    if done < steps:
        print(f'{o.out}: stopped after {done} of {steps} steps; go on with --resume')
        # It may be another rank that had the signal.
        sys.exit(128 + (run.signals[0] if run.signals else signal.SIGTERM))
    on_signals(signal.SIG_DFL)      # all is saved, so they may end the process at once
    print(f'{o.out}: all {steps} steps; ckpt.pt is the network, *.png are its pictures')
    run_program('pictures', o.out)

if __name__ == '__main__':
    main()
