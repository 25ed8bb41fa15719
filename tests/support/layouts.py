"""Checkpoints of random weights in the layouts of published encoders, and their true features.

`vit` makes an encoder's state dict, `features` are its outputs by the published definitions, and
LAYOUTS wraps the one as each publisher does. A new layout is a function that returns a Layout, and
a row of LAYOUTS. `convert` and `convert_authors` call the project's converters.
"""
import argparse
from dataclasses import dataclass

import torch

from tests.support import runs

# One encoder for most tests: side is the patches in a row, so images have PATCH * SIDE pixels.
WIDTH, DEPTH, HEADS, PATCH, SIDE = 128, 2, 2, 4, 5
SIZE = PATCH * SIDE

NORMALIZATIONS = {      # mean and deviation of the colours by which images are z-scored
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    'half': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

def convert(path, heads=0, normalization=''):
    """A published checkpoint in our names: (state dict, Config). The tests' only way to it."""
    return runs.module('published').convert(path, heads, normalization)

def convert_authors(state):
    """A state dict of the authors' DEX in our names: (state dict, Config)."""
    return runs.module('authors_dex').convert(state)

def normalized(pixels, name='imagenet'):
    """Pixels (B, 3, S, S) in [0, 1], z-scored; ours are by ImageNet's numbers."""
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS[name])
    return (pixels - mean) / std

# ----------------------------------------------------------------------------------------
# An encoder's parameters, in the names of MAE and timm

def random(*shape):
    return 0.3 * torch.randn(*shape)

def linear(name, outputs, inputs):
    weight = 3 * random(outputs, inputs) / inputs ** 0.5
    return {f'{name}.weight': weight, f'{name}.bias': random(outputs)}

def norm(name, width):
    return {f'{name}.weight': 1 + random(width), f'{name}.bias': random(width)}

def mlp(name, width, ratio=4):
    return linear(f'{name}.fc1', ratio * width, width) | linear(f'{name}.fc2', width, ratio * width)

def authors_dex(name, width, experts=3):
    """The MLP's place in the authors' DEX: a director, a router and a list of experts."""
    state = mlp(f'{name}.DEX.director', width)
    state[f'{name}.DEX.router.linear.weight'] = random(experts, width)
    for expert in range(experts):
        state |= mlp(f'{name}.DEX.experts.{expert}', width)
    state[f'{name}.DEX.expert_activation_count'] = torch.tensor([10, 20, 10])
    return state

def block(name, width, ratio, scale, keys_have_bias, dex):
    """One block; scale names the two LayerScales, with {} for 1 and 2."""
    state = norm(f'{name}.norm1', width) | norm(f'{name}.norm2', width)
    state |= linear(f'{name}.attn.qkv', 3 * width, width)
    state |= linear(f'{name}.attn.proj', width, width)
    if not keys_have_bias:
        del state[f'{name}.attn.qkv.bias']
        state |= {f'{name}.attn.q_bias': random(width), f'{name}.attn.v_bias': random(width)}
    if scale:
        state |= {f'{name}.{scale.format(number)}': random(width) for number in (1, 2)}
    return state | (authors_dex(name, width) if dex else mlp(f'{name}.mlp', width, ratio))

def vit(width=WIDTH, depth=DEPTH, patch=PATCH, side=SIDE, ratio=4, scale='', keys_have_bias=True,
        class_position=True, dex=False):
    """A ViT's state dict; with dex, its MLPs are the authors' DEX."""
    state = {
        'cls_token': random(1, 1, width),
        'pos_embed': random(1, side ** 2 + class_position, width),
        'patch_embed.proj.weight': random(width, 3, patch, patch),
        'patch_embed.proj.bias': random(width),
    } | norm('norm', width)
    for number in range(depth):
        state |= block(f'blocks.{number}', width, ratio, scale, keys_have_bias, dex)
    return state

# ----------------------------------------------------------------------------------------
# An encoder's features

def apply(s, name, x):
    return x @ s[f'{name}.weight'].T + s[f'{name}.bias']

def normalize(s, name, x):
    variance = x.var(-1, unbiased=False, keepdim=True)
    x = (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    return x * s[f'{name}.weight'] + s[f'{name}.bias']

def apply_mlp(s, name, x):
    x = apply(s, f'{name}.fc1', x)
    return apply(s, f'{name}.fc2', 0.5 * x * (1 + torch.erf(x / 2 ** 0.5)))

def apply_authors_dex(s, name, x):
    """Two experts for each image, by a softmax with temperature 0.5."""
    scores = (x[:, 0] @ s[f'{name}.router.linear.weight'].T / 0.5).softmax(-1)
    result = torch.zeros_like(x)
    for image, row in enumerate(scores.tolist()):
        best = sorted(range(len(row)), key=row.__getitem__)[-2:]
        for expert in best:
            share = row[expert] / sum(row[other] for other in best)
            result[image] += share * apply_mlp(s, f'{name}.experts.{expert}', x[image])
    return result

def attend(s, name, x, heads):
    queries, keys, values = (x @ s[f'{name}.qkv.weight'].T).chunk(3, -1)
    if f'{name}.q_bias' in s:       # BEiT's keys have no bias
        queries, values = queries + s[f'{name}.q_bias'], values + s[f'{name}.v_bias']
    else:
        biases = s[f'{name}.qkv.bias'].chunk(3)
        queries, keys, values = (x + b for x, b in zip((queries, keys, values), biases))
    outputs = []
    for q, k, v in zip(*(x.chunk(heads, -1) for x in (queries, keys, values))):
        outputs.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return apply(s, f'{name}.proj', torch.cat(outputs, -1))

def scale_of(s, name, number):
    """LayerScale as DINOv2 names it, or as DeiT III and BEiT do; else 1."""
    return s.get(f'{name}.ls{number}.gamma', s.get(f'{name}.gamma_{number}', 1))

def features(s, images, heads=HEADS):
    """Class token and patches (B, 1 + n, C) after the last norm; s is the encoder's state dict."""
    kernel = s['patch_embed.proj.weight']
    P = kernel.shape[-1]
    patches = images.unfold(2, P, P).unfold(3, P, P).movedim(1, 3).flatten(3).flatten(1, 2)
    x = patches @ kernel.flatten(1).T + s['patch_embed.proj.bias']
    positions, token = s['pos_embed'], s['cls_token'].expand(len(x), -1, -1)
    if positions.shape[1] > x.shape[1]:
        x = torch.cat([token, x], 1) + positions
    else:       # the class token has none
        x = torch.cat([token, x + positions], 1)
    depth = sum(name.endswith('.norm1.weight') for name in s)
    for block in (f'blocks.{number}' for number in range(depth)):
        h = attend(s, f'{block}.attn', normalize(s, f'{block}.norm1', x), heads)
        x = x + scale_of(s, block, 1) * h
        h = normalize(s, f'{block}.norm2', x)
        if f'{block}.mlp.fc1.weight' in s:
            h = apply_mlp(s, f'{block}.mlp', h)
        else:
            h = apply_authors_dex(s, f'{block}.DEX', h)
        x = x + scale_of(s, block, 2) * h
    return normalize(s, 'norm', x)

# ----------------------------------------------------------------------------------------
# Files

@dataclass
class Layout:
    """A published file, with what it stands for."""
    encoder: dict           # as `features` takes it
    file: dict              # as the publisher saves it
    normalization: str      # of the images that the encoder takes
    tells: bool = True      # whether the names and the wrapping tell whose file it is

class Code:
    """An object in whose pickle is code, which writes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')

def decoder(side=SIDE):
    """What a masked autoencoder adds."""
    state = {'mask_token': random(1, 1, 8), 'decoder_pos_embed': random(1, side ** 2 + 1, 8)}
    for name in ('decoder_embed', 'decoder_pred'):
        state |= {f'{name}.weight': random(3), f'{name}.bias': random(3)}
    return state

def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}

def mae():
    state = vit()
    return Layout(state, dict(model=state | decoder(), optimizer={}, epoch=800), 'imagenet')

def fixed_positions(width=WIDTH, side=SIDE):
    """MAE's sines and cosines (1, 1 + side * side, width), with zeros for the class token."""
    rates = 10000 ** (-torch.arange(width // 4) / (width / 4))
    positions = [torch.zeros(width)]
    for row in range(side):
        for column in range(side):
            x, y = column * rates, row * rates
            positions.append(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]))
    return torch.stack(positions)[None]

def mae_encoder():
    """MAE's without its decoder, of which only the positions tell what it is."""
    state = vit() | dict(pos_embed=fixed_positions())
    return Layout(state, dict(model=state), 'imagenet')

def retfound():
    """MAE's, with the options of its training beside the weights."""
    state = vit()
    options = argparse.Namespace(lr=0.1, out='x')
    return Layout(state, dict(model=state | decoder(), args=options), 'imagenet')

def dinov2():
    state = vit(scale='ls{}.gamma')
    return Layout(state, state | {'mask_token': random(1, WIDTH)}, 'imagenet')

def dinov2_in_training():
    state = vit(scale='ls{}.gamma')
    teacher = under('backbone.', state) | {'dino_head.last': random(3)}
    return Layout(state, dict(teacher=teacher), 'imagenet')

def dino():
    """With the student, whose weights are not taken."""
    state = vit()
    teacher = under('backbone.', state) | {'head.last_layer.weight': random(3)}
    student = under('module.backbone.', vit())
    return Layout(state, dict(student=student, teacher=teacher, epoch=100), 'imagenet')

def deit():
    """With the head of ImageNet's thousand classes."""
    state = vit()
    return Layout(state, dict(model=state | linear('head', 1000, WIDTH)), 'imagenet')

def deit3():
    state = vit(scale='gamma_{}', class_position=False)
    return Layout(state, dict(model=state | linear('head', 5, WIDTH)), 'imagenet')

def deit3_in_timm():
    state = vit(scale='ls{}.gamma', class_position=False)
    return Layout(state, state | linear('head', 5, WIDTH), 'imagenet')

def conch():
    state = vit()
    others = {'logit_scale': random(1), 'text.cls_emb': random(WIDTH),
              'visual.attn_pool_contrast.query': random(1, WIDTH)}
    return Layout(state, under('visual.trunk.', state) | others, 'clip')

def panderm():
    state = vit(scale='gamma_{}', keys_have_bias=False)
    others = {'encoder.mask_token': random(1, 1, WIDTH), 'decoder.norm.bias': random(WIDTH),
              'teacher.cls_token': random(1, 1, WIDTH)}
    return Layout(state, dict(model=under('encoder.', state) | others), 'imagenet')

def bare():
    """A ViT of timm and nothing else."""
    state = vit()
    return Layout(state, state, 'imagenet', tells=False)

def wrapped_by_ddp():
    state = vit()
    file = dict(state_dict=under('module.', under('backbone.', state)), epoch=1)
    return Layout(state, file, 'imagenet', tells=False)

def float16():
    """DINOv2's with half the bits."""
    half = {name: value.half() for name, value in dinov2().file.items()}
    return Layout({name: value.float() for name, value in half.items()}, half, 'imagenet')

LAYOUTS = {
    'MAE': mae,
    'MAE, encoder alone': mae_encoder,
    'RETFound': retfound,
    'DINOv2': dinov2,
    'DINOv2 in training': dinov2_in_training,
    'DINO': dino,
    'DeiT': deit,
    'DeiT III': deit3,
    'DeiT III in timm': deit3_in_timm,
    'CONCH': conch,
    'PanDerm': panderm,
    'bare': bare,
    'DDP': wrapped_by_ddp,
    'float16': float16,
}
