"""Measurements beside `pretrain.py --bench`, on the CPU; whatever is compared takes turns step by step.

    python tests/bench.py step              a training step against the obvious one, ViT-B width, 3 blocks, batch 8, float32
    python tests/bench.py step bf16         the same under bfloat16 autocast
    python tests/bench.py ranks 32          two processes of one thread against one of two, at 32 images a step in all
    python tests/bench.py data FOLDER 40    images/s from 40 shards (20,000 images, written to FOLDER, 4 GB), warm and cold
    python tests/bench.py memory            what a step keeps at ViT-B size, computed, and the batches that fit

The obvious implementation keeps a Python list of expert MLPs, gathers the images of each expert in a loop, adds their
outputs with index_add_, lets AdamW loop over its many small parameters as it does by default, and stacks the experts'
parameters for GEMA. Each has a process of its own; all start from the same weights and draw the same noise, so their
losses must agree.
"""
import copy
import json
import mmap
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import pretrain  # noqa: E402
from model import MAE, Config, Routing, layer_losses  # noqa: E402

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
    """One training step: its loss, its seconds, those of GEMA in it, and the CPU's (which others on the machine prolong less)."""
    torch.manual_seed(seed)
    begin, cpu = time.perf_counter(), time.process_time()
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        losses, routing, _, _ = model(images, torch.tensor(0.5))
    loss = losses.mean()
    if routing:
        co, balance = layer_losses(routing, routing.chosen.mean(1))
        loss = loss + 0.1 * co + 0.001 * balance
    loss.backward()
    if ours:        # as pretrain.py has it
        norm = pretrain.total_norm([p.grad for p in trained])
        optimizer.grad_scale, optimizer.found_inf = norm.clamp(min=1), (~torch.isfinite(norm)).float()
    else:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    before = time.perf_counter()
    if routing:
        model.update_directors(routing.weights.detach().mean(1), 0.99, torch.tensor(True))
    end = time.perf_counter()
    return loss.item(), end - begin, end - before, time.process_time() - cpu

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
    pipe.send(pretrain.flops(model.config) if ours else None)
    while (seed := pipe.recv()) is not None:
        pipe.send(step(model, trained, optimizer, images, seed, ours, bf16))

def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f'{middle:.3f} (quartiles {low:.3f} to {high:.3f})'

def steps(bf16=False, count=12, warmup=2, batch=8):
    names, pipes, work = ['ours', 'obvious', 'obvious, fused AdamW', 'dense'], {}, {}
    context = multiprocessing.get_context('spawn')
    for name in names:      # a process each, so that none lives on memory that another has made warm
        pipes[name], theirs = context.Pipe()
        context.Process(target=step_worker, args=(name, theirs, batch, bf16), daemon=True).start()
        work[name] = pipes[name].recv()
    seconds, gema, cpu = ({name: [] for name in names} for _ in range(3))
    for number in range(warmup + count):
        for name in names:      # one at a time, in turn
            pipes[name].send(number)
            loss, whole, part, busy = pipes[name].recv()
            if number == 0:
                print(f'{name}: loss {loss:.6f} at the first step', flush=True)
            if number >= warmup:
                seconds[name].append(whole)
                gema[name].append(part)
                cpu[name].append(busy)
    for name in names:
        pipes[name].send(None)
        share = quartiles([100 * a / b for a, b in zip(gema[name], seconds[name])])
        print(f'{name:<22} step {quartiles(seconds[name])} s, GEMA {share}% of it')
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
        o = replace(pretrain.Options(), data=folder + '/data', out=folder + '/out', depth=3, batch=batch // world, steps=1000,
                    val_share=0.0, bench=True)
        run = pretrain.train(o, *pretrain.setup('cpu'))
        while pipe.recv() is not None:
            begin = time.perf_counter()
            next(run)
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
    if sys.argv[1:2] == ['step']:
        steps('bf16' in sys.argv)
    elif sys.argv[1:2] == ['ranks']:
        ranks(int(sys.argv[2]))
    elif sys.argv[1:2] == ['data']:
        images_per_second(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ['memory']:
        memory()
    else:
        print(__doc__)
