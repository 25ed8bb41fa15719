"""How fast the code is. What is compared takes turns, step by step.

    python -m tests.lab.bench run               steps of pretrain.py against those without experts
    python -m tests.lab.bench gates             gates of images against gates of tokens (Fig. 8)
    python -m tests.lab.bench step              a training step against the obvious one
    python -m tests.lab.bench step bf16         the same under bfloat16 autocast
    python -m tests.lab.bench ranks 32          two processes against one, at 32 images a step
    python -m tests.lab.bench data FOLDER 40    reading from 40 shards, warm and cold
    python -m tests.lab.bench memory            memory of a step of DEX, computed

`run` takes any option of pretrain.py, and torchrun may start it. It prints images a second, the
share of the GPU's peak (MFU, if the peak is known), the milliseconds of each phase of a step, how
often the host waits for the GPU, and the peak memory beside the one that `memory` computes. Phases
are data (waiting for images), forward (with the augmentation), backward, optimizer (with clipping)
and GEMA. On a laptop, add --device cpu --depth 3 --batch 8. Where data/medverse does not exist, it
simulates phantoms.

`step` measures three blocks of ViT-B's width at batch 8. The obvious implementation keeps a list of
expert MLPs, gathers the images of each expert in a loop, lets AdamW loop over its many parameters,
and stacks the experts' parameters for GEMA. Each implementation has a process of its own. All start
from the same weights and draw the same noise, so their losses must agree.

`data` writes 20,000 images (4 GB) to FOLDER and leaves them there.
"""
import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import data
import pretrain
from model import DEX, MAE, Config, Routing, layer_losses, named_config
from tests.lab.token_routing import TokenDEX

PEAK = {        # a part of the GPU's name, and its peak in bfloat16 TFLOP/s; the first match counts
    'B200': 2250,
    'H200 NVL': 835,
    'H200': 989,
    'H100 NVL': 835,
    'H100 PCIe': 756,
    'H100': 989,
    'A100': 312,
    '4090': 165,
}
GATES = (       # side of the images in pixels, and how many
    (128, 8), (256, 8), (512, 8), (1024, 8),
    (256, 1), (256, 32), (256, 128),
)

def quartiles(values):
    """The median of some values and their quartiles, as text."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f'{middle:.3f} (quartiles {low:.3f} to {high:.3f})'

def mlp_products(tokens, width, ratio):
    """Multiplications of an MLP's forward pass."""
    return tokens * 2 * ratio * width ** 2

def attention_products(tokens, width):
    """Multiplications of queries, keys, values and projection; then of scores and mixing."""
    return tokens * 4 * width ** 2 + tokens * 2 * tokens * width

def tuning_cost(config):
    """Computing of the blocks of DEX-E on a whole image, as a multiple of a plain ViT's."""
    tokens = (config.size // config.patch) ** 2 + 1
    mlp = mlp_products(tokens, config.width, config.mlp_ratio)
    attention = attention_products(tokens, config.width)
    return (attention + config.top_k * mlp) / (attention + mlp)

def flops(config):
    """Floating-point operations of one image's training step of MAE(config), in matrix products.
    A weight costs two operations a token in the forward pass and, where both the weight and its
    input have a gradient, four in the backward pass."""
    patches = (config.size // config.patch) ** 2
    visible = int(patches * (1 - config.mask_ratio)) + 1        # with the class token
    pixels = 3 * config.patch ** 2

    C, D, ratio = config.width, config.decoder_width, config.mlp_ratio
    decoder_block = attention_products(patches + 1, D) + mlp_products(patches + 1, D, ratio)
    decoder = config.decoder_depth * decoder_block + D * (visible * C + (patches + 1) * pixels)
    attention, mlp = attention_products(visible, C), mlp_products(visible, C, ratio)
    block, director = attention + mlp, 0
    if config.experts:
        block = attention + config.top_k * mlp + C * config.experts
        director = mlp      # it has no gradient, and its input is detached
    trained = config.depth * block + decoder
    patch_embed = patches * pixels * C  # images have no gradient
    return 6 * trained + 4 * patch_embed + 2 * config.depth * director

# --- the real loop --------------------------------------------------------------------------------

class Clock:
    """Marks the moments at which the phases of a training step end."""
    def __init__(self, device):
        self.gpu = device.type == 'cuda'
        self.marks = []         # (phase, moment of its end)

    def now(self):
        """This moment; on a GPU an event in its queue of work, so that the host need not wait."""
        if not self.gpu:
            return time.perf_counter()
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    def mark(self, phase):
        """Mark the end of a phase."""
        self.marks.append((phase, self.now()))

    def marking(self, phase, call):
        """The function `call`, at whose end the clock marks the end of a phase."""
        def call_and_mark(*arguments, **options):
            result = call(*arguments, **options)
            self.mark(phase)
            return result
        return call_and_mark

def spent(marks):
    """Seconds of each phase, from marks (phase, moment of its end)."""
    seconds = Counter()
    for (_, begin), (phase, end) in itertools.pairwise(marks):
        if isinstance(end, float):
            seconds[phase] += end - begin
        else:
            seconds[phase] += begin.elapsed_time(end) / 1000
    return seconds

@contextlib.contextmanager
def bare_trainings(clock):
    """While it lasts, trainings log nothing, show no bar, and mark their backward passes."""
    backward = torch.Tensor.backward

    def marked_backward(loss):
        clock.mark('forward')
        backward(loss)
        clock.mark('backward')

    def no_bar(steps, **_):
        return tqdm(steps, disable=True)

    with mock.patch.object(torch.Tensor, 'backward', marked_backward), \
            mock.patch.object(pretrain, 'tqdm', no_bar):
        yield

def training_steps(o, place, clock):
    """A training of which each next() makes one step; yields its Config and the step's marks."""
    run = pretrain.build_run(o, *place)
    run.optimizer.zero_grad = clock.marking('optimizer', run.optimizer.zero_grad)
    if o.experts:
        for block in run.model.blocks:
            block.dex.gema = clock.marking('GEMA', block.dex.gema)
    load = clock.marking('data', run.batches.__next__)
    for step in itertools.count(1):     # the first step of a training would validate
        clock.marks = [('start', clock.now())]
        run.start = step
        # The training stops when it asks for a batch of the next step.
        run.batches = (load() for _ in range(o.accumulate))
        with contextlib.suppress(StopIteration):
            pretrain.train(run)
        yield run.model.config, clock.marks

def endless(o):
    """The options of a training of so many steps that it neither ends nor saves by itself."""
    return replace(o, steps=10 ** 6, log_every=10 ** 6, val_every=10 ** 6, val_share=0.0,
                   save_minutes=1e6, resume=False)

def real_steps(words, warm=5, count=20):
    """Steps of a training with the options `words`, in turns with steps of a training without
    experts; prints on one screen what is to be known of both."""
    o = endless(pretrain.parse_options(pretrain.Options(), words))
    place = pretrain.set_up_process(o.device)
    rank, world, _, device = place
    if o.data == pretrain.Options.data and not Path(o.data).exists():
        o = replace(o, data=f'data/phantoms-{o.size}')
        if rank == 0:
            pretrain.run_program('phantoms', '--out', o.data, '--size', o.size)
    if world > 1:
        torch.distributed.barrier()
    clock, trainings, peaks, waits = Clock(device), [], [], []
    with tempfile.TemporaryDirectory() as out, bare_trainings(clock):
        for experts in (o.experts, 0):
            measured = replace(o, out=f'{out}/{experts}', experts=experts)
            training = training_steps(measured, place, clock)
            before = held_memory(device)
            for _ in range(warm):
                next(training)
            peaks.append(used_memory(device) - before)
            waits.append(host_waits(training, device))
            trainings.append(training)
        turns = [[next(training) for training in trainings] for _ in range(count)]
    if clock.gpu:
        torch.cuda.synchronize()
    if rank == 0:
        print_run(o, device, world, list(zip(*turns)), peaks, waits)

def held_memory(device):
    """Bytes of the GPU that are in use, from which its peak is counted anew; 0 on a CPU."""
    if device.type != 'cuda':
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()

def used_memory(device):
    """The most bytes that were used so far: of the GPU, or by this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:     # on Windows
        return math.nan
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def host_waits(training, device, steps=10):
    """How often the host waits for the GPU in ten steps, one of which looks at signals."""
    if device.type != 'cuda':
        return 'no GPU'
    torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(steps):
            next(training)
    torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(warning.message) for warning in caught)

def peak_of(device):
    """Peak of a GPU in bfloat16 TFLOP/s; None where it is not known."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name()
        for part, peak in PEAK.items():
            if part in name:
                return peak
    return None

def print_run(o, device, world, columns, peaks, waits):
    """Print the table of a run: of DEX and MAE, steps as training_steps yields them, the peaks of
    their memory in bytes, and how often the host waits."""
    chip = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'
    bf16 = pretrain.use_bf16(o.bf16, device)
    precision = 'bfloat16, compiled' if bf16 else 'float32'
    images = o.batch * o.accumulate * world
    print(f'{world} x {chip}, {precision}; {images} images a step, {len(columns[0])} steps each')
    table, speeds = [], []
    for steps, peak_memory, waited in zip(columns, peaks, waits):
        config, _ = steps[0]
        phases = [spent(marks) for _, marks in steps]
        seconds = np.array([phase.total() for phase in phases])
        speeds.append(flops(config) * images / seconds / 1e12)
        fixed, image = computed_memory(config, bf16)
        column = {
            'images/s': quartiles(images / seconds),
            'GFLOP an image': f'{flops(config) / 1e9:.1f}',
            'TFLOP/s': f'{np.median(speeds[-1]):.2f}',
        }
        if peak_of(device):
            column['MFU'] = f'{np.median(speeds[-1]) / peak_of(device) / world:.3f}'
        column['a step, ms'] = f'{1000 * np.median(seconds):.1f}'
        for name in ('data', 'forward', 'backward', 'optimizer', 'GEMA'):
            spent_here = np.array([phase[name] for phase in phases])
            column[f'  {name}'] = f'{1000 * np.median(spent_here):.1f}'
        waiting = np.median([phase['data'] for phase in phases] / seconds)
        column['waiting for data'] = f'{100 * waiting:.1f}%'
        column['host waits for the GPU in ten steps'] = str(waited)
        column['peak memory, GB'] = f'{peak_memory / 1e9:.2f}'
        column['the same, computed'] = f'{(fixed + image * o.batch) / 1e9:.2f}'
        table.append(column)
    if device.type != 'cuda':   # the process has one peak, of both
        table[1]['peak memory, GB'] = ''
    print(f'{"":<38}{"DEX":<42}MAE')
    for name in table[0]:
        print(f'{name:<38}{table[0][name]:<42}{table[1][name]}')
    print(f'FLOP-normalised efficiency of DEX against MAE {quartiles(speeds[0] / speeds[1])}')

def gates(config=None):
    """Time a layer without its experts' work: the gate, the gathering and the mixing."""
    config = config or Config()
    *_, device = pretrain.set_up_process('')
    for (side, batch), Module in itertools.product(GATES, (DEX, TokenDEX)):
        routing = 'image' if Module is DEX else 'token'
        tokens = (side // config.patch) ** 2 + 1
        x = torch.randn(batch, tokens, config.width, device=device)
        dex = Module(config).to(device).requires_grad_(False)
        dex.experts.forward = lambda x, expert: x
        timer = Timer('dex(x)', globals=dict(dex=dex, x=x), num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=0.5).median
        units = batch if routing == 'image' else batch * tokens
        operations = 2 * units * config.width * config.experts
        print(f'{routing}-wise gate and dispatch of a layer, {batch} images of {side} pixels: '
              f'{operations / 1e6:.3f} MFLOP, {1000 * seconds:.2f} ms')

# --- against the obvious implementation -----------------------------------------------------------

class ObviousDEX(nn.Module):
    """A DEX module as one would write it first: a list of experts, and a loop over it."""
    def __init__(self, dex):
        super().__init__()
        self.gate, self.director = dex.gate, dex.director
        self.top_k, self.usage = dex.top_k, dex.usage.clone()
        self.experts = nn.ModuleList()
        for _ in range(len(dex.usage)):
            self.experts.append(copy.deepcopy(dex.director).requires_grad_())

    def forward(self, x, sigma, with_director):
        """x (B, N, C) -> y (B, N, C) and the Routing."""
        with torch.autocast('cpu', enabled=False):
            logits = self.gate(x[:, 0].float())
        noise = torch.randn_like(logits) + 1 - self.usage / self.usage.sum()
        scores = (logits + sigma * noise).softmax(-1)
        top_scores, top_experts = scores.topk(self.top_k)
        top_weights = top_scores / top_scores.sum(-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(1, top_experts, top_weights)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            images = (top_experts == number).any(1).nonzero()[:, 0]
            if len(images):
                y.index_add_(0, images, expert(x[images]) * weights[images, number, None, None])
        with torch.no_grad():
            target = self.director(x)
        align = 1 - torch.cosine_similarity(y, target.float(), dim=-1).mean()
        return y, Routing(align, scores, (weights > 0).float(), weights)

    @torch.no_grad()
    def gema(self, batch_usage, momentum, finite):
        """Move the director by the mean of the stacked experts."""
        experts = zip(*(expert.parameters() for expert in self.experts))
        for director, parts in zip(self.director.parameters(), experts):
            weights = batch_usage.view(-1, *[1] * director.dim())
            average = (torch.stack(parts) * weights).sum(0)
            director.mul_(momentum).add_(average, alpha=1 - momentum)
        self.usage = 0.99 * self.usage + 0.01 * batch_usage

def step(model, trained, optimizer, images, seed, ours, bf16):
    """Make one step. Returns its loss, its seconds, those of the optimizer with clipping and those
    of GEMA in it, and its seconds on the CPU, which other processes prolong less."""
    torch.manual_seed(seed)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        l_self, routing, _, _ = model(images, torch.tensor(0.5))
    loss = l_self.mean()
    if routing is not None:
        load = routing.activated.mean(1)
        align, balance = layer_losses(routing.align, routing.scores.mean(1), load)
        loss = loss + 0.1 * align + 0.001 * balance
    loss.backward()
    computed = time.perf_counter()
    if ours:
        lr = optimizer.param_groups[0]['lr']
        _, finite = pretrain.step_if_finite(optimizer, lr, trained, 1.0)
    else:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        finite = torch.tensor(True)
    optimized = time.perf_counter()
    if routing is not None:
        for block, batch_usage in zip(model.blocks, routing.weights.detach().mean(1)):
            block.dex.gema(batch_usage, 0.99, finite)
    end, cpu_end = time.perf_counter(), time.process_time()
    return loss.item(), end - begin, optimized - computed, end - optimized, cpu_end - cpu_begin

def step_worker(pipe, name, batch, bf16):
    """Build one of the implementations, then make a step for each seed that comes."""
    torch.manual_seed(0)
    ours = name in ('ours', 'dense')
    if ours:
        pretrain.set_up_process('cpu')      # it sets up the CPU, too
    model = MAE(Config(depth=3, experts=0 if name == 'dense' else 8))
    if not ours:
        for block in model.blocks:
            block.dex = ObviousDEX(block.dex)
    trained = [p for p in model.parameters() if p.requires_grad]
    if ours:
        optimizer = pretrain.make_optimizer(model, 1e-5, 1e-6)
    else:
        fused = True if 'fused' in name else None
        optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=1e-6, fused=fused)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 256, 256, generator=generator)
    pipe.send(flops(model.config))
    while True:
        seed = pipe.recv()
        if seed is None:
            return
        pipe.send(step(model, trained, optimizer, images, seed, ours, bf16))

def start_process(work, *arguments):
    """Start a process that does work(pipe, *arguments); returns our end of the pipe."""
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(theirs, *arguments), daemon=True).start()
    return ours

def steps(bf16=False, count=12, warm=2, batch=8):
    """Compare steps of our implementation with obvious ones, and with a dense network."""
    names = ('ours', 'obvious', 'obvious, fused AdamW', 'dense')
    pipes, work = {}, {}
    for name in names:      # a process each, so that none profits from memory that another warmed
        pipes[name] = start_process(step_worker, name, batch, bf16)
        work[name] = pipes[name].recv()
    measured = {name: [] for name in names}
    for number in range(warm + count):
        for name in names:      # one at a time, in turn
            pipes[name].send(number)
            loss, *seconds = pipes[name].recv()
            if number == 0:
                print(f'{name}: loss {loss:.6f} at the first step', flush=True)
            if number >= warm:
                measured[name].append(seconds)
    for name in names:
        pipes[name].send(None)
    print_steps({name: np.array(rows).T for name, rows in measured.items()}, work)

def print_steps(measured, work):
    """Print what steps measured: of each implementation (whole, optimizer, GEMA, CPU; steps)."""
    for name, (whole, optimizer, gema, _) in measured.items():
        print(f'{name:<22} step {quartiles(whole)} s; optimizer with clipping '
              f'{quartiles(100 * optimizer / whole)}% of it, GEMA {quartiles(100 * gema / whole)}%')
    for what, column in (('seconds', 0), ('CPU seconds', 3)):
        times = {name: columns[column] for name, columns in measured.items()}
        for name in ('obvious', 'obvious, fused AdamW'):
            medians = np.median(times['ours']) / np.median(times[name])
            print(f'{what}, ours / {name}: {quartiles(times["ours"] / times[name])}, of the '
                  f'medians {medians:.3f}; {len(times[name])} steps each')
        gain = work['ours'] / work['dense'] * times['dense'] / times['ours']
        print(f'{what}, FLOP-normalised efficiency against dense: {quartiles(gain)}')

# --- one process or two ---------------------------------------------------------------------------

def write_noise(folder, count, files=1):
    """Write a prepared source of `count` random images, 3 x 256 x 256, in so many shards."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (count // files, 256, 256, 3), np.uint8)
    for number in range(files):
        np.save(folder / f'{number:05d}.npy', noise)
    (folder / 'meta.json').write_text(json.dumps(dict(modality='noise', count=count)))

def rank_worker(pipe, rank, world, port, batch):
    """One process of a group, with two threads in all: a training step whenever a word comes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='localhost',
                      MASTER_PORT=str(port))
    torch.set_num_threads(2 // world)
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder, 'data', 'noise'), 4 * batch + 1)
        o = endless(pretrain.Options(data=f'{folder}/data', out=f'{folder}/out', depth=3,
                                     batch=batch // world))
        place = pretrain.set_up_process('cpu')
        clock = Clock(place[-1])
        with bare_trainings(clock):
            training = training_steps(o, place, clock)
            while pipe.recv():
                begin = time.perf_counter()
                next(training)
                pipe.send(time.perf_counter() - begin)
    os._exit(0)     # without waiting for the other rank

def ranks(batch, count=6, warm=1):
    """Compare one process of two threads with two of one thread, at `batch` images a step."""
    groups = {1: [], 2: []}
    for world, pipes in groups.items():
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = free.getsockname()[1]
        for rank in range(world):
            pipes.append(start_process(rank_worker, rank, world, port, batch))
    seconds = {1: [], 2: []}
    for _ in range(warm + count):
        for world, pipes in groups.items():
            for pipe in pipes:
                pipe.send(True)
            seconds[world].append(max(pipe.recv() for pipe in pipes))
    for pipe in (*groups[1], *groups[2]):
        pipe.send(False)
    one, two = np.array(seconds[1][warm:]), np.array(seconds[2][warm:])
    print(f'{batch} images a step: one process of two threads {quartiles(one)} s, two of one '
          f'thread {quartiles(two)} s; throughput of two / of one {quartiles(one / two)}, '
          f'{count} steps each')

# --- reading --------------------------------------------------------------------------------------

def forget(path):
    """Drop a file from the system's memory, so that it is read from the disk again."""
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def remember(path):
    """Bring a file into the system's memory."""
    with open(path, 'rb') as file:
        while file.read(1 << 24):
            pass

def images_per_second(folder, files, count=20000, batch=224):
    """Time random batches through 1, 2 and 4 prefetching threads, as training takes them."""
    pretrain.set_up_process('cpu')
    source = Path(folder, 'noise')
    if not source.exists():
        write_noise(source, count, files)
    shards = data.Shards(folder)
    rounds = {kind: [] for kind in itertools.product(('cold', 'warm'), (1, 2, 4))}
    batches = len(shards.train) // batch // 8
    for epoch in range(8):
        for (state, threads), rates in rounds.items():
            for path in source.glob('*.npy'):
                if state == 'cold':
                    forget(path)
                else:
                    remember(path)

            def load(number):
                return shards.gather(shards.batch_ids(epoch, number, batch, 0, 1, 10 ** 6))

            begin, cpu_begin, seen = time.perf_counter(), time.process_time(), 0
            for images in data.prefetch(load, range(batches), threads):
                seen += len(images)
            rates.append((seen / (time.perf_counter() - begin),
                          seen / (time.process_time() - cpu_begin)))
    print(f'3 channels at 256 pixels, {files} shards, {batches} batches of {batch} in each of 8 '
          f'rounds')
    for (state, threads), rates in rounds.items():
        by_clock, by_cpu = zip(*rates)
        print(f'{state}, {threads} threads: {quartiles(by_clock)} images/s, '
              f'{quartiles(by_cpu)} per CPU second')

# --- memory ---------------------------------------------------------------------------------------

def kept_for_backward(model, batch, bf16=True):
    """Bytes that a forward pass of so many images keeps for the backward pass, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        size = model.config.size
        losses = model(torch.randn(batch, 3, size, size), torch.tensor(0.5))
    total = sum(seen.values())
    del losses      # until here it kept the tensors alive, so that no two had one address
    return total

def computed_memory(config, bf16=True):
    """Bytes of a step of MAE(config) without compiling: those of no image, and of each image.
    They grow with the batch along a line, so two batches give it."""
    model = MAE(config)
    one, three = kept_for_backward(model, 1, bf16), kept_for_backward(model, 3, bf16)
    image = (three - one) / 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # Weights, gradients and two moments take 16 bytes; `one - image` are the bfloat16 copies.
    return 16 * trained + 4 * others + one - image, image

def memory():
    """Print computing and memory of a step under bfloat16 autocast, and the batches that fit."""
    for name in ('tiny', 'small', 'base'):
        config = named_config(name)
        fixed, image = computed_memory(config)
        fits = []
        for size in (16, 24, 40, 80):
            images = max(0, int((size * 1e9 * 0.92 - fixed) / image))   # 8% are left for the rest
            fits.append(f'{images} in {size} GB')
        print(f'{name}: {flops(config) / 1e9:.1f} GFLOP an image; {fixed / 1e9:.1f} GB (weights, '
              f'gradients, moments, bfloat16 copies) and {image / 1e6:.0f} MB an image; images '
              f'that fit: {", ".join(fits)}; DEX-E is tuned at {tuning_cost(config):.2f} times the '
              f'computing of DEX-D')

def main():
    """Do the measurement that the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ('-h', '--help'):
        print(__doc__)
    elif words[0] == 'run':
        real_steps(words[1:])
    elif words == ['gates']:
        gates()
    elif words in (['step'], ['step', 'bf16']):
        steps('bf16' in words)
    elif words[0] == 'ranks' and len(words) == 2 and words[1].isdigit():
        ranks(int(words[1]))
    elif words[0] == 'data' and len(words) == 3 and words[2].isdigit():
        images_per_second(words[1], int(words[2]))
    elif words == ['memory']:
        memory()
    else:
        raise SystemExit(f'bench {" ".join(words)}: there is no such measurement; '
                         f'python -m tests.lab.bench lists them')

if __name__ == '__main__':
    main()
