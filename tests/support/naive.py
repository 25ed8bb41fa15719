"""What tests compare with: the method as plain loops, one image, patch and expert at a time.

The functions read the parameters of the product's modules and call nothing else of the product.
`training` alone takes its order of images, its augmentation and its seeds from there.
"""
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

from tests.lab.token_routing import TokenDEX

# ----------------------------------------------------------------------------------------
# Images

def denormalized(images):
    """Normalized images (B, 3, S, S) in [0, 1] again; they are z-scored by ImageNet's numbers."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return images * std + mean

# ----------------------------------------------------------------------------------------
# Layers

def gelu(x):
    return x * (1 + torch.erf(x / 2 ** 0.5)) / 2

def linear(layer, x):
    return x @ layer.weight.T + layer.bias

def mlp(layers, x):
    return linear(layers.fc2, gelu(linear(layers.fc1, x)))

def layer_norm(layer, x):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * layer.weight + layer.bias

def attention(attn, x):
    """x (N, C), one head after another, with an explicit softmax."""
    C = x.shape[1]
    size = C // attn.heads
    queries, keys, values = linear(attn.qkv, x).split(C, 1)
    outputs = []
    for head in range(attn.heads):
        own = slice(head * size, (head + 1) * size)
        share = torch.softmax(queries[:, own] @ keys[:, own].T / size ** 0.5, 1)
        outputs.append(share @ values[:, own])
    return linear(attn.proj, torch.cat(outputs, 1))

def block(layers, x):
    """A transformer block without experts, x (N, C) -> (N, C)."""
    x = x + attention(layers.attn, layer_norm(layers.norm1, x))
    return x + mlp(layers.mlp, layer_norm(layers.norm2, x))

# ----------------------------------------------------------------------------------------
# The Director-Experts module

class Decisions(NamedTuple):
    """What a DEX module decides, in the order of the product's Routing."""
    alignment: torch.Tensor     # () the module's alignment loss
    scores: torch.Tensor        # (M, R) softmax of the gate's logits
    activated: torch.Tensor     # (M, R) 1 for an activated expert, else 0
    weights: torch.Tensor       # (M, R) omega of Eq. 5, 0 for an expert that is not activated

def expert(experts, r, x):
    """Rows x (..., C) through expert number r."""
    hidden = gelu(x @ experts.fc1.weight[r].T + experts.fc1.bias[r])
    return hidden @ experts.fc2.weight[r].T + experts.fc2.bias[r]

def dex_of_an_image(module, tokens):
    """Of one image's tokens (N, C): output (N, C), the tokens' alignment losses, s, I, omega."""
    scores = torch.softmax(tokens[0] @ module.gate.weight.T, 0)     # the class token decides
    ranking = sorted(range(len(scores)), key=lambda r: -scores[r].item())
    best = ranking[:module.top_k]
    total = sum(scores[r] for r in best)
    weights = [scores[r] / total if r in best else 0 * scores[r] for r in range(len(scores))]
    output = sum(weights[r] * expert(module.experts, r, tokens) for r in best)      # Eq. 5
    target = mlp(module.director, tokens).detach()
    losses = []
    for ours, theirs in zip(output, target):
        losses.append(1 - (ours @ theirs) / (ours.norm() * theirs.norm()))          # Eq. 3 and 15
    activated = torch.tensor([float(r in best) for r in range(len(scores))])
    return output, losses, scores, activated, torch.stack(weights)

def dex(module, x):
    """Sec. 3.2 and 3.3 without noise: x (B, N, C) -> (B, N, C) and the Decisions."""
    by_token = isinstance(module, TokenDEX)
    images = x.reshape(-1, 1, x.shape[2]) if by_token else x    # as images of one token each
    outputs, losses, *decisions = zip(*(dex_of_an_image(module, tokens) for tokens in images))
    alignment = torch.stack([loss for image in losses for loss in image]).mean()
    decisions = [torch.stack(decision) for decision in decisions]
    if by_token:
        decisions = [decision.view(*x.shape[:2], -1).mean(1) for decision in decisions]
    return torch.cat(outputs).view_as(x), Decisions(alignment, *decisions)

def layer_losses(alignment, scores, activated):
    """The two sums over layers of Eq. 8, from alignment (L,), scores and activated (L, M, R)."""
    L, _, R = scores.shape
    align = balance = 0
    for layer in range(1, L + 1):
        alpha = 1 / (L - (layer - 1))
        align = align + alpha * alignment[layer - 1] / L
        for r in range(R):      # Eq. 18
            mean_score = scores[layer - 1, :, r].mean()
            frequency = activated[layer - 1, :, r].mean()
            balance = balance + R * mean_score * frequency / L
    return align, balance

def usage_of(weights):
    """Omega of Eq. 6: each expert's share (R,) of the weights (M, R) that images gave."""
    return weights.sum(0) / weights.sum()

def gema(module, usage, momentum):
    """What Eq. 7 and 20 make of a DEX module: the director's parameters by name, and 'usage'."""
    new = {'usage': 0.99 * module.usage + 0.01 * usage}
    for name, director in module.director.named_parameters():
        experts = module.experts.get_parameter(name)
        average = sum(usage[r] * experts[r] for r in range(len(usage)))
        new[name] = momentum * director + (1 - momentum) * average
    return {name: value.detach() for name, value in new.items()}

# ----------------------------------------------------------------------------------------
# The vision transformer and its masked autoencoder, after He et al. (2022)

def patches_of(image, P):
    """Squares (3, P, P) of an image (3, S, S), row by row."""
    side = image.shape[1] // P
    corners = [(P * row, P * column) for row in range(side) for column in range(side)]
    return [image[:, y:y + P, x:x + P] for y, x in corners]

def vit(model, image, seen=None):
    """Tokens (1 + n, C) of one image (3, S, S) by a ViT without experts, of the patches `seen`."""
    kernel = model.patch_embed.proj
    patches = patches_of(image, model.config.patch)
    tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
    for n in range(len(patches)) if seen is None else seen:
        response = (kernel.weight * patches[n]).sum((1, 2, 3)) + kernel.bias
        tokens.append(response + model.pos_embed[0, 1 + n])
    x = torch.stack(tokens)
    for layers in model.blocks:
        x = block(layers, x)
    return layer_norm(model.norm, x)

def mae(model, image, noise):
    """Loss, prediction (N-1, P * P * 3) and mask (N-1,) of one image with mask noise (N-1,)."""
    patches = patches_of(image, model.config.patch)
    ranking = sorted(range(len(patches)), key=lambda n: noise[n].item())
    seen = ranking[:int(len(patches) * (1 - model.config.mask_ratio))]
    encoded = linear(model.decoder_embed, vit(model, image, seen))
    tokens = [encoded[0]]
    for n in range(len(patches)):
        tokens.append(encoded[1 + seen.index(n)] if n in seen else model.mask_token[0, 0])
    x = torch.stack(tokens) + model.decoder_pos_embed[0]
    for layers in model.decoder_blocks:
        x = block(layers, x)
    prediction = linear(model.decoder_pred, layer_norm(model.decoder_norm, x))[1:]
    errors = []
    for n in ranking[len(seen):]:
        target = patches[n].permute(1, 2, 0).flatten()
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append((prediction[n] - target).square().mean())
    mask = torch.tensor([float(n not in seen) for n in range(len(patches))])
    return sum(errors) / len(errors), prediction, mask

# ----------------------------------------------------------------------------------------
# Training

def cosine(start, end, share):
    """From start at share 0 to end at share 1 along half a wave."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

def learning_rate(step, steps, warmup, peak):
    """Linear over the first `warmup` steps, of which the last has the peak; then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, 0, (step - warmup) / (steps - warmup))

def decays(name):
    return name.endswith('weight') and 'norm' not in name

def training(folder, o, config, parts):
    """What pretrain.py with options o does, with one network of `config` and without gate noise.

    The images of all parts (ranks, or micro-batches) of a step are in one batch. Losses, schedules,
    clipping and GEMA are written out. Returns `weights`, a state dict, and `log`, of each step a
    dict of l_self, align, balance, loss and grad_norm.
    """
    import data
    import pretrain
    from model import MAE
    assert o.sigma == 0
    shards = data.Shards(folder, o.val_share)
    epoch_steps = len(shards.train) // (o.batch * parts)
    peak = o.lr * o.batch * parts / 512
    warmup = max(1, round(o.warmup * o.steps))
    torch.manual_seed(o.seed)
    model = MAE(config)
    trained = {name: p for name, p in model.named_parameters() if '.director.' not in name}
    optimizer = torch.optim.AdamW([
        dict(params=[p], weight_decay=o.weight_decay if decays(name) else 0)
        for name, p in trained.items()], lr=1)
    log = []
    for step in range(o.steps):
        images, noise = [], []
        for part in range(parts):
            ids = shards.batch_ids(o.seed, step, o.batch, part, parts, epoch_steps)
            pretrain.seed_step(o.seed, step, part)
            images.append(data.augment(shards.gather(ids), o.size))
            noise.append(torch.rand(o.batch, (config.size // config.patch) ** 2))
        losses, routing, _, _ = model(torch.cat(images), 0.0, torch.cat(noise))
        decisions = Decisions(*routing)
        align, balance = layer_losses(*decisions[:3])
        l_self = losses.mean()
        weight = cosine(o.balance, 0, step / o.steps)
        loss = l_self + o.align * align + weight * balance      # Eq. 8
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        for p in trained.values():
            p.grad *= min(1, o.clip / norm)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, o.steps, warmup, peak)
        optimizer.step()
        momentum = cosine(o.momentum, 1, step / o.steps)
        for layers, weights in zip(model.blocks, decisions.weights.detach()):
            new = gema(layers.dex, usage_of(weights), momentum)
            layers.dex.usage.copy_(new.pop('usage'))
            layers.dex.director.load_state_dict(new)
        values = dict(l_self=l_self, align=align, balance=balance, loss=loss, grad_norm=norm)
        log.append({name: value.item() for name, value in values.items()})
    return SimpleNamespace(weights=model.state_dict(), log=log)

# ----------------------------------------------------------------------------------------
# Scores

def dice(predicted, truth, c):
    """Dice of class c, one pixel after another; None where c is in neither.

    predicted and truth are flat sequences of classes; 255 in truth counts nowhere.
    """
    both = either = 0
    for p, t in zip(predicted, truth):
        if t == 255:
            continue
        both += p == c and t == c
        either += (p == c) + (t == c)
    return 2 * both / either if either else None

def mean(values):
    """The mean of those that are not None; None of nothing."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None
