"""Time a training step of the DEX network against its obvious implementation, alternating in one run.

    python tests/bench.py                   ViT-B width, 3 blocks, batch 8, float32, on the CPU

The obvious one keeps a Python list of expert MLPs, gathers the images of each expert in a loop, adds their outputs
with index_add_, lets AdamW loop over its many small parameters as it does by default, and stacks the experts'
parameters for GEMA. Each has a process of its own; all start from the same weights and draw the same noise, so their
losses must agree.
"""
import copy
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import MAE, Config, Routing, layer_losses  # noqa: E402
from pretrain import make_optimizer, setup  # noqa: E402

class ObviousDEX(nn.Module):
    def __init__(self, dex):
        super().__init__()
        self.gate, self.director, self.top_k, self.usage = dex.gate, dex.director, dex.top_k, dex.usage.clone()
        self.experts = nn.ModuleList(copy.deepcopy(dex.director).requires_grad_() for _ in range(len(dex.usage)))

    def forward(self, x, sigma):
        logits = self.gate(x[:, 0])
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
        co = 1 - torch.cosine_similarity(y, target, dim=-1).mean()
        return y, Routing(co, scores, (weights > 0).float(), weights)

    @torch.no_grad()
    def gema(self, usage, momentum, finite):
        for parameters in zip(self.director.parameters(), *(expert.parameters() for expert in self.experts)):
            average = (torch.stack(parameters[1:]) * usage.view(-1, *[1] * parameters[0].dim())).sum(0)
            parameters[0].mul_(momentum).add_(average, alpha=1 - momentum)
        self.usage = 0.99 * self.usage + 0.01 * usage

def step(model, optimizer, images, seed, ours):
    """One training step: its loss, its seconds, and those of GEMA in it."""
    torch.manual_seed(seed)
    begin = time.perf_counter()
    losses, routing, _, _ = model(images, torch.tensor(0.5))
    co, balance = layer_losses(routing, routing.chosen.mean(1))
    loss = losses.mean() + 0.1 * co + 0.001 * balance
    loss.backward()
    if ours:
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])
        optimizer.grad_scale, optimizer.found_inf = norm.clamp(min=1), (~torch.isfinite(norm)).float()
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    before = time.perf_counter()
    model.update_directors(routing.weights.detach().mean(1), 0.99, torch.tensor(True))
    end = time.perf_counter()
    return loss.item(), end - begin, end - before

def worker(name, pipe, batch):
    """Build one of the implementations, then do a step for each seed that comes."""
    torch.manual_seed(0)
    if name == 'ours':
        setup('cpu')        # what pretrain.py does at its start
    model = MAE(Config(depth=3))
    if name != 'ours':
        for block in model.blocks:
            block.dex = ObviousDEX(block.dex)
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = torch.optim.AdamW(trained, 1e-5, weight_decay=1e-6, fused='fused' in name or None)
    optimizer = make_optimizer(model, 1e-5, 1e-6) if name == 'ours' else fused
    images = torch.randn(batch, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    while (seed := pipe.recv()) is not None:
        pipe.send(step(model, optimizer, images, seed, name == 'ours'))

def main(steps=12, warmup=1, batch=8):
    names, pipes = ['ours', 'obvious', 'obvious, fused AdamW'], {}
    context = multiprocessing.get_context('spawn')
    for name in names:      # a process each, so that none lives on memory that another has made warm
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(name, theirs, batch), daemon=True).start()
    seconds, gema = {name: [] for name in names}, {name: [] for name in names}
    for number in range(warmup + steps):
        for name in names:      # one at a time, in turn
            pipes[name].send(number)
            loss, whole, part = pipes[name].recv()
            if number == 0:
                print(f'{name}: loss {loss:.6f} at the first step', flush=True)
            if number >= warmup:
                seconds[name].append(whole)
                gema[name].append(part)
    for name in names:
        pipes[name].send(None)
        q = statistics.quantiles(seconds[name], n=4)
        share = 100 * statistics.median(gema[name]) / q[1]
        print(f'{name:<22} step {q[1]:.3f} s (quartiles {q[0]:.3f} to {q[2]:.3f}), GEMA {share:.1f}% of it')
    for name in names[1:]:
        q = statistics.quantiles([a / b for a, b in zip(seconds['ours'], seconds[name])], n=4)
        print(f'ours / {name}: {q[1]:.2f} (quartiles {q[0]:.2f} to {q[2]:.2f}), {steps} steps each')

if __name__ == '__main__':
    main()
