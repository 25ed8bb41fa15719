"""How fast it is; whatever is compared takes turns, step by step.

    python tests/bench.py run               real steps of pretrain.py against the plain masked autoencoder's: images/s, MFU,
                                            phases; with any option of pretrain.py, also under torchrun
    python tests/bench.py gates             image-wise against token-wise gate and dispatch (the paper's Fig. 8)
    python tests/bench.py step              a training step against the obvious one, ViT-B width, 3 blocks, batch 8, float32
    python tests/bench.py step bf16         the same under bfloat16 autocast
    python tests/bench.py ranks 32          two processes of one thread against one of two, at 32 images a step in all
    python tests/bench.py data FOLDER 40    images/s from 40 shards (20,000 images, written to FOLDER, 4 GB), warm and cold
    python tests/bench.py memory            what a step keeps at ViT-B size, computed, and the batches that fit

`run` without --data, where data/medverse does not exist, takes phantoms. On a laptop: run --device cpu --depth 3 --batch 8.
Phases are data (waiting for it), forward (with the augmentation), backward, optimizer (with clipping) and GEMA.

The obvious implementation of `step` keeps a Python list of expert MLPs, gathers the images of each expert in a loop, adds
their outputs with index_add_, lets AdamW loop over its many small parameters as it does by default, and stacks the experts'
parameters for GEMA. Each has a process of its own; all start from the same weights and draw the same noise, so their
losses must agree.
"""
import copy
import json
import math
import mmap
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import pretrain  # noqa: E402
from model import DEX, MAE, Config, Routing, flops, layer_losses  # noqa: E402

GATES = ((128, 8), (256, 8), (512, 8), (1024, 8), (256, 1), (256, 32), (256, 128))      # pixels of a side, images

def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f'{middle:.3f} (quartiles {low:.3f} to {high:.3f})'

# --- the real loop ----------------------------------------------------------------------------------------------------

def turns(o, place, marks, now):
    """A training of which each next() is one step; yields its Config and the marks, (phase, moment of its end)."""
    def mark(phase, call):
        def marked(*arguments, **options):
            result = call(*arguments, **options)
            marks.append((phase, now()))
            return result
        return marked

    run = pretrain.set_up(o, *place)
    run.batches = iter(mark('data', run.batches.__next__), None)
    run.optimizer.zero_grad = mark('optimizer', run.optimizer.zero_grad)
    for block in run.model.blocks if o.experts else ():
        block.dex.gema = mark('GEMA', block.dex.gema)
    for step in range(run.last):
        marks[:] = [('start', now())]
        run.first, run.last = step, step + 1
        pretrain.train(run)
        yield run.model.config, marks.copy()

def spent(marks):
    """Seconds of each phase."""
    seconds = Counter()
    for (_, begin), (phase, end) in zip(marks, marks[1:]):
        seconds[phase] += end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
    return seconds

def real_steps(words, warm=5, count=20):
    """Steps of a training with the options `words`, in turns with those of the plain masked autoencoder of its size."""
    o = replace(pretrain.parse_options(pretrain.Options(), words), steps=10 ** 6, log_every=10 ** 6, val_every=10 ** 6,
                val_share=0.0, save_minutes=1e6, resume=False)
    place = rank, world, _, device = pretrain.setup(o.device)
    if o.data == pretrain.Options.data and not Path(o.data).exists():
        o = replace(o, data=f'data/phantoms-{o.size}')
        if rank == 0:
            pretrain.run_script('phantoms.py', '--out', o.data, '--size', str(o.size))
    if world > 1:
        torch.distributed.barrier()
    gpu, marks, backward = device.type == 'cuda', [], torch.Tensor.backward

    def now():      # on CUDA an event in the queue of work, which the host does not wait for
        event = torch.cuda.Event(enable_timing=True) if gpu else None
        return torch.cuda.current_stream().record_event(event) if gpu else time.perf_counter()

    def marked_backward(loss):
        marks.append(('forward', now()))
        backward(loss)
        marks.append(('backward', now()))

    torch.Tensor.backward, pretrain.validate = marked_backward, lambda *_: {}
    pretrain.tqdm = lambda steps, **_: tqdm(steps, disable=True)
    with tempfile.TemporaryDirectory() as out:
        dex, mae = (turns(replace(o, experts=R, out=f'{out}/{R}'), place, marks, now) for R in (o.experts, 0))
        list(islice(dex, warm))
        unit = 1 if sys.platform == 'darwin' else 1024
        memory = torch.cuda.max_memory_allocated() if gpu else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        list(islice(mae, warm))
        steps = list(islice(zip(dex, mae), count))
    torch.Tensor.backward = backward
    if gpu:
        torch.cuda.synchronize()
    if rank > 0:
        return
    chip = torch.cuda.get_device_name() if gpu else ''
    peak = world * next((value for name, value in pretrain.PEAK.items() if name in chip), math.inf)
    speeds = []
    for name, column in zip(('DEX', 'MAE'), zip(*steps)):
        work, phases = flops(column[0][0]) / 1e12, [spent(marks) for _, marks in column]
        seconds = np.array([step.total() for step in phases])
        images = o.batch * o.accumulate * world / seconds
        speeds.append(work * images)        # TFLOP/s
        shares = [f'{phase} {100 * np.median([step[phase] for step in phases] / seconds):.1f}%' for phase in phases[0]]
        print(f'{name}: {quartiles(images)} images/s, {1000 * work:.1f} GFLOP an image, MFU '
              f'{np.median(speeds[-1]) / peak:.3f}; a step {quartiles(seconds)} s: {", ".join(shares)}')
    print(f'FLOP-normalised efficiency of DEX against MAE {quartiles(speeds[0] / speeds[1])}; DEX takes {memory / 1e9:.1f} GB')

def gates(c=Config()):
    """Fig. 8: one layer without its experts' work, so the gate, the gathering and the mixing."""
    device = pretrain.setup('')[3]
    for (side, batch), routing in product(GATES, ('image', 'token')):
        x = torch.randn(batch, (side // c.patch) ** 2 + 1, c.width, device=device)
        dex = DEX(replace(c, routing=routing)).to(device).requires_grad_(False)
        dex.experts.forward = lambda x, expert: x
        timer = Timer('dex(x)', globals=dict(dex=dex, x=x), num_threads=torch.get_num_threads())
        units = batch if routing == 'image' else x[:, :, 0].numel()
        seconds = timer.blocked_autorange(min_run_time=0.5).median
        print(f'{routing}-wise gate and dispatch of a layer, {batch} images of {side} pixels: '
              f'{2e-6 * units * c.width * c.experts:.3f} MFLOP, {1000 * seconds:.2f} ms')

# --- against the obvious implementation -------------------------------------------------------------------------------

class ObviousDEX(nn.Module):
    def __init__(self, dex):
        super().__init__()
        self.gate, self.director, self.top_k, self.usage = dex.gate, dex.director, dex.top_k, dex.usage.clone()
        self.experts = nn.ModuleList(copy.deepcopy(dex.director).requires_grad_() for _ in range(len(dex.usage)))

    def forward(self, x, sigma):
        with torch.autocast('cpu', enabled=False):
            logits = self.gate(x[:, 0].float())
        scores = (logits + sigma * (torch.randn_like(logits) + 1 - self.usage / self.usage.sum())).softmax(-1)
        top, chosen = scores.topk(self.top_k)
        weights = torch.zeros_like(scores).scatter(1, chosen, top / top.sum(-1, keepdim=True))
        y = torch.zeros_like(x)
        for r, expert in enumerate(self.experts):
            images = (chosen == r).any(1).nonzero()[:, 0]
            if len(images):
                y.index_add_(0, images, expert(x[images]) * weights[images, r, None, None])
        with torch.no_grad():
            target = self.director(x)
        co = 1 - torch.cosine_similarity(y, target.float(), dim=-1).mean()
        return y, Routing(co, scores, (weights > 0).float(), weights)

    @torch.no_grad()
    def gema(self, usage, momentum, finite):
        for parameters in zip(self.director.parameters(), *(expert.parameters() for expert in self.experts)):
            average = (torch.stack(parameters[1:]) * usage.view(-1, *[1] * parameters[0].dim())).sum(0)
            parameters[0].mul_(momentum).add_(average, alpha=1 - momentum)
        self.usage = 0.99 * self.usage + 0.01 * usage

def step(model, trained, optimizer, images, seed, ours, bf16):
    """One step: its loss, its seconds, those of GEMA and of clipping in it, and the CPU's (which others prolong less)."""
    torch.manual_seed(seed)
    begin, cpu = time.perf_counter(), time.process_time()
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        losses, routing, _, _ = model(images, torch.tensor(0.5))
    loss = losses.mean()
    if routing.scores.numel():
        co, balance = layer_losses(routing.co, routing.scores.mean(1), routing.chosen.mean(1))
        loss = loss + 0.1 * co + 0.001 * balance
    loss.backward()
    clipping = time.perf_counter()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    clipped = time.perf_counter()
    if ours:        # as pretrain.py has it
        optimizer.found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()
    optimizer.zero_grad()
    before = time.perf_counter()
    if routing.scores.numel():
        for block, usage in zip(model.blocks, routing.weights.detach().mean(1)):
            block.dex.gema(usage, 0.99, torch.tensor(True))
    end = time.perf_counter()
    return loss.item(), end - begin, end - before, clipped - clipping, time.process_time() - cpu

def step_worker(name, pipe, batch, bf16):
    """Build one of the implementations, then do a step for each seed that comes."""
    torch.manual_seed(0)
    ours = name in ('ours', 'dense')
    if ours:
        pretrain.setup('cpu')        # what pretrain.py does at its start
    model = MAE(Config(depth=3, experts=0 if name == 'dense' else 8))
    if not ours:
        for block in model.blocks:
            block.dex = ObviousDEX(block.dex)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = pretrain.make_optimizer(model, 1e-5, 1e-6) if ours else torch.optim.AdamW(
        trained, 1e-5, weight_decay=1e-6, fused='fused' in name or None)
    images = torch.randn(batch, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    pipe.send(flops(model.config) if ours else None)
    while (seed := pipe.recv()) is not None:
        pipe.send(step(model, trained, optimizer, images, seed, ours, bf16))

def steps(bf16=False, count=12, warmup=2, batch=8):
    names, pipes, work = ['ours', 'obvious', 'obvious, fused AdamW', 'dense'], {}, {}
    context = multiprocessing.get_context('spawn')
    for name in names:      # a process each, so that none lives on memory that another has made warm
        pipes[name], theirs = context.Pipe()
        context.Process(target=step_worker, args=(name, theirs, batch, bf16), daemon=True).start()
        work[name] = pipes[name].recv()
    seconds, gema, clip, cpu = ({name: [] for name in names} for _ in range(4))
    for number in range(warmup + count):
        for name in names:      # one at a time, in turn
            pipes[name].send(number)
            loss, whole, part, clipping, busy = pipes[name].recv()
            if number == 0:
                print(f'{name}: loss {loss:.6f} at the first step', flush=True)
            if number >= warmup:
                seconds[name].append(whole)
                gema[name].append(100 * part / whole)
                clip[name].append(100 * clipping / whole)
                cpu[name].append(busy)
    for name in names:
        pipes[name].send(None)
        print(f'{name:<22} step {quartiles(seconds[name])} s, GEMA {quartiles(gema[name])}% of it, clipping '
              f'{quartiles(clip[name])}%')
    for what, times in (('seconds', seconds), ('CPU seconds', cpu)):
        for name in names[1:3]:
            ratio = quartiles([a / b for a, b in zip(times['ours'], times[name])])
            medians = statistics.median(times['ours']) / statistics.median(times[name])
            print(f'{what}, ours / {name}: {ratio}, of the medians {medians:.3f}; {count} steps each')
        gain = [work['ours'] / work['dense'] * b / a for a, b in zip(times['ours'], times['dense'])]
        print(f'{what}, FLOP-normalised efficiency against dense: {quartiles(gain)}')

def rank_worker(rank, world, threads, port, batch, pipe):
    """One process of a group: a step of the real loop whenever something comes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='localhost', MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'data', 'noise')
        source.mkdir(parents=True)
        np.save(source / '0.npy', np.random.default_rng(0).integers(0, 256, (4 * batch + 1, 256, 256, 3), np.uint8))
        (source / 'meta.json').write_text(json.dumps(dict(modality='noise', count=4 * batch + 1)))
        pretrain.validate, pretrain.tqdm = lambda *_: {}, lambda steps, **_: tqdm(steps, disable=True)
        o = replace(pretrain.Options(), data=folder + '/data', out=folder + '/out', depth=3, batch=batch // world,
                    steps=1000, val_share=0.0)
        run = pretrain.set_up(o, *pretrain.setup('cpu'))
        while (step := pipe.recv()) is not None:
            begin = time.perf_counter()
            run.first, run.last = step, step + 1
            pretrain.train(run)
            pipe.send(time.perf_counter() - begin)
        os._exit(0)

def ranks(batch, count=6, warmup=1):
    groups, context = {1: [], 2: []}, multiprocessing.get_context('spawn')
    for world in groups:
        with socket.socket() as free:
            free.bind(('localhost', 0))
            port = free.getsockname()[1]
        for rank in range(world):
            ours, theirs = context.Pipe()
            context.Process(target=rank_worker, args=(rank, world, 3 - world, port, batch, theirs), daemon=True).start()
            groups[world].append(ours)
    seconds = {1: [], 2: []}
    for number in range(warmup + count):
        for world, pipes in groups.items():
            for pipe in pipes:
                pipe.send(number)
            seconds[world].append(max(pipe.recv() for pipe in pipes))
    for pipe in (*groups[1], *groups[2]):
        pipe.send(None)
    one, two = (times[warmup:] for times in seconds.values())
    print(f'{batch} images a step: one process of two threads {quartiles(one)} s, two of one thread {quartiles(two)} s; '
          f'throughput of two / of one {quartiles([a / b for a, b in zip(one, two)])}, {count} steps each')

def images_per_second(folder, files, count=20000, batch=224):
    """Random batches through the two prefetching threads, as training takes them."""
    pretrain.setup('cpu')
    source = Path(folder, 'noise')
    if not source.exists():
        source.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (count // files, 256, 256, 3), np.uint8)
        for number in range(files):
            np.save(source / f'{number:05d}.npy', noise)
        (source / 'meta.json').write_text(json.dumps(dict(modality='noise', count=count)))
    shards, rounds = data.Shards(folder), {'cold': [], 'warm': []}
    each = len(shards.train) // batch // 8
    for epoch in range(8):
        for state, rates in rounds.items():
            for number, path in enumerate(shards.files):
                with open(path, 'rb') as file:
                    if state == 'cold':
                        shards.map(number).base.madvise(mmap.MADV_DONTNEED)     # a page in use cannot be dropped
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    else:
                        while file.read(1 << 24):
                            pass

            def load(number):
                return shards.gather(shards.plan(epoch, number, batch, 0, 1, 10 ** 6))

            begin, busy, seen = time.perf_counter(), time.process_time(), 0
            for images in data.prefetch(load, range(each)):
                seen += len(images)
            rates.append((seen / (time.perf_counter() - begin), seen / (time.process_time() - busy)))
    print(f'3 channels at 256 pixels, {files} shards, {each} batches of {batch} in each of 8 rounds')
    for state, rates in rounds.items():
        print(f'{state}: {quartiles([a for a, _ in rates])} images/s, {quartiles([b for _, b in rates])} per CPU second')

def memory(batches=(1, 3)):
    """Bytes kept for the backward pass of DEX-B under bfloat16 autocast, without compiling; two batches give a line."""
    model, kept = MAE(Config()), []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for batch in batches:
        seen = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast('cpu', torch.bfloat16):
            losses = model(torch.randn(batch, 3, 256, 256), torch.tensor(0.5))
        kept.append(sum(seen.values()))
        del losses
    image = (kept[1] - kept[0]) / (batches[1] - batches[0])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 16 * trained + 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad) + kept[0] - batches[0] * image
    print(f'weights, gradients, moments and bfloat16 copies {fixed / 1e9:.2f} GB, and {image / 1e6:.1f} MB an image')
    print(', '.join(f'{size} GB: {max(0, int((size * 1e9 * 0.92 - fixed) / image))}' for size in (16, 24, 40, 80)),
          'images, with 8% left for the rest')

if __name__ == '__main__':
    if sys.argv[1:2] == ['run']:
        real_steps(sys.argv[2:])
    elif sys.argv[1:2] == ['gates']:
        gates()
    elif sys.argv[1:2] == ['step']:
        steps('bf16' in sys.argv)
    elif sys.argv[1:2] == ['ranks']:
        ranks(int(sys.argv[2]))
    elif sys.argv[1:2] == ['data']:
        images_per_second(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ['memory']:
        memory()
    else:
        print(__doc__)
