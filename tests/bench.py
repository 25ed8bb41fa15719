"""Time a training step of the DEX network against its obvious implementation, alternating in one run.

    python tests/bench.py                   ViT-B width, 3 blocks, batch 8, float32, on the CPU

The obvious one keeps a Python list of expert MLPs, gathers the images of each expert in a loop, adds their outputs
with index_add_, lets AdamW loop over its many small parameters as it does by default, and stacks the experts'
parameters for GEMA. Both start from the same weights, draw the same noise, and must agree in their losses.
"""
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import MAE, Config, Routing, layer_losses  # noqa: E402
from pretrain import make_optimizer  # noqa: E402

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

def step(model, optimizer, images, seed):
    """One training step: its loss, its seconds, and those of GEMA in it."""
    torch.manual_seed(seed)
    begin = time.perf_counter()
    losses, routing, _, _ = model(images, torch.tensor(0.5))
    co, balance = layer_losses(routing, routing.chosen.mean(1))
    loss = losses.mean() + 0.1 * co + 0.001 * balance
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    before = time.perf_counter()
    model.update_directors(routing.weights.detach().mean(1), 0.99, torch.tensor(True))
    end = time.perf_counter()
    return loss.item(), end - begin, end - before

def main(steps=12, warmup=2, batch=8):
    torch.manual_seed(0)
    ours = MAE(Config(depth=3))
    obvious = copy.deepcopy(ours)
    for block in obvious.blocks:
        block.dex = ObviousDEX(block.dex)
    runs = {'ours': (ours, make_optimizer(ours, 1e-5, 1e-6)),
            'obvious': (obvious, torch.optim.AdamW([p for p in obvious.parameters() if p.requires_grad], 1e-5, weight_decay=1e-6)),
            'obvious, fused AdamW': (obvious, torch.optim.AdamW([p for p in obvious.parameters() if p.requires_grad], 1e-5, fused=True))}
    images, seconds, gema = torch.randn(batch, 3, 256, 256), {name: [] for name in runs}, {name: [] for name in runs}
    for number in range(warmup + steps):
        for name, (model, optimizer) in runs.items():
            loss, whole, part = step(model, optimizer, images, number)
            if number == 0 and name != 'obvious, fused AdamW':
                print(f'{name}: loss {loss:.6f} at the first step')
            if number >= warmup:
                seconds[name].append(whole)
                gema[name].append(part)
    for name in runs:
        q = statistics.quantiles(seconds[name], n=4)
        print(f'{name:<22} step {q[1]:.3f} s (quartiles {q[0]:.3f} to {q[2]:.3f}), GEMA {100 * statistics.median(gema[name]) / q[1]:.1f}% of it')
    for name in list(runs)[1:]:
        ratios = [a / b for a, b in zip(seconds['ours'], seconds[name])]
        q = statistics.quantiles(ratios, n=4)
        print(f'ours / {name}: {q[1]:.2f} (quartiles {q[0]:.2f} to {q[2]:.2f}) over {steps} steps each, {torch.get_num_threads()} threads')

if __name__ == '__main__':
    main()
