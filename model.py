"""The Director-Experts (DEX) vision transformer and its masked autoencoder, from the paper's equations.

A ViT whose every MLP is replaced by a DEX module: R expert MLPs, of which a gate activates K for the whole image, and
one director MLP that follows the experts' average and pulls them together. `Config(experts=0)` is the plain ViT.
Parameter names are those of MAE and timm, so that published ViT checkpoints load without renaming.

Letters, also the paper's: B images, N tokens (class token first), C width, H hidden width of an MLP, R experts,
K activated experts, L layers, P pixels of a patch's side, M routed units (B images, or B*N tokens if routing='token').
"""
import argparse
import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # encoder, then the masked autoencoder's decoder; base to huge as in MAE, tiny and small as in DeiT
    'tiny':  dict(width=192,  depth=12, heads=3,  decoder_width=128, decoder_depth=2, decoder_heads=4),
    'small': dict(width=384,  depth=12, heads=6,  decoder_width=256, decoder_depth=4, decoder_heads=8),
    'base':  dict(width=768,  depth=12, heads=12, decoder_width=512, decoder_depth=8, decoder_heads=16),
    'large': dict(width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=8, decoder_heads=16),
    'huge':  dict(width=1280, depth=32, heads=16, decoder_width=512, decoder_depth=8, decoder_heads=16),
}

@dataclass
class Config:
    """Architecture of a network; the defaults are the paper's DEX-B at 256 pixels."""
    size: int = 256             # side of the input image in pixels
    patch: int = 16             # side P of a patch in pixels
    width: int = 768            # C
    depth: int = 12             # L
    heads: int = 12             # of attention, C / heads channels each
    mlp_ratio: int = 4          # H / C
    experts: int = 8            # R; 0 is the plain ViT
    top_k: int = 2              # K
    routing: str = 'image'      # 'image': one choice for all tokens (the paper's); 'token': one for each (its Fig. 8)
    mask_ratio: float = 0.75    # share of the patches that the masked autoencoder hides
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def __post_init__(self):
        for rule, holds in {
                'size must be a multiple of patch': 0 < self.patch <= self.size and self.size % self.patch == 0,
                'width must be a multiple of heads': self.heads > 0 and self.width % self.heads == 0,
                'top_k must lie between 1 and experts': not self.experts or 1 <= self.top_k <= self.experts,
                'routing must be image or token': self.routing in ('image', 'token'),
                'mask_ratio must lie between 0 and 1': 0 < self.mask_ratio < 1}.items():
            if not holds:
                values = {name: value for name, value in vars(self).items() if name in rule.split()}
                raise SystemExit(f'{rule}: {values}')

def named_config(model, depth=0, **others):
    """The Config of a row of SIZES; with another depth where it is not 0."""
    if model not in SIZES:
        raise SystemExit(f"--model {model}: there is no such size; choose from {', '.join(SIZES)}")
    return Config(**SIZES[model] | (dict(depth=depth) if depth else {}) | others)

class Linear(nn.Linear):    # which starts as MAE's do
    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

class Attention(nn.Module):
    """Self-attention of all tokens, x (B, N, C) -> (B, N, C)."""
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = Linear(c.width, 3 * c.width)
        self.proj = Linear(c.width, c.width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))     # (B, N, 3, heads, C/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # 3 of (B, heads, N, C/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """Two linear layers, x (..., C) -> (..., C) by way of H."""
    def __init__(self, c):
        super().__init__()
        self.fc1 = Linear(c.width, c.mlp_ratio * c.width)
        self.fc2 = Linear(c.mlp_ratio * c.width, c.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class StackedLinear(nn.Module):
    """R linear layers, which start as copies of one: weights (R, out, in) and biases (R, out)."""
    def __init__(self, linear, R):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().repeat(R, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(R, 1))

    def forward(self, x, expert):
        """Rows of x (M, N, in), sorted by expert, through the layers number `expert` (M,) -> (M, N, out)."""
        if torch.is_autocast_enabled(x.device.type):        # which does not know grouped_mm: cast by hand, once a step
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ends = torch.searchsorted(expert, torch.arange(len(self.weight), device=x.device), right=True)      # (R,)
        # one kernel in bfloat16 on an H100 or newer, and the host need not wait for the groups' sizes; elsewhere a loop
        y = F.grouped_mm(x.flatten(0, 1), self.weight.to(x.dtype).mT, offs=(ends * x.shape[1]).int())
        # index_select: the gradient of self.bias[expert] would add up in the order in which threads happen to arrive
        bias = self.bias.index_select(0, expert)[:, None]
        return y.unflatten(0, x.shape[:2]) + bias.to(x.dtype)       # cast last, so that gradients add up in float32

class Experts(nn.Module):
    """R MLPs, which start as copies of one. Stacked, so that DDP, AdamW and GEMA see 4 tensors, not 4 R."""
    def __init__(self, mlp, R):
        super().__init__()
        self.fc1 = StackedLinear(mlp.fc1, R)
        self.fc2 = StackedLinear(mlp.fc2, R)

    def forward(self, x, expert):
        """Rows of x (M, N, C), sorted by expert, through the MLPs number `expert` (M,)."""
        return self.fc2(F.gelu(self.fc1(x, expert)), expert)

class Routing(NamedTuple):
    """What a DEX module decided; a network stacks its layers' along a first axis L."""
    co: torch.Tensor        # () alignment loss
    scores: torch.Tensor    # (M, R) softmax scores s, with gradient
    chosen: torch.Tensor    # (M, R) 1 where the expert is activated, else 0: I of Eq. 18
    weights: torch.Tensor   # (M, R) omega of Eq. 5, 0 where not activated

class DEX(nn.Module):
    """Director-Experts module (Sec. 3.2, 3.3): the K best experts for each image, mixed; a director that follows them.

    Experts start as copies of the director: to average parameters (Eq. 7) means something only among MLPs that start
    alike, with one common order of hidden units.
    """
    def __init__(self, c):
        super().__init__()
        self.top_k, self.routing = c.top_k, c.routing
        self.gate = Linear(c.width, c.experts, bias=False)                      # pi of Eq. 2
        self.director = MLP(c).requires_grad_(False)                            # moved by GEMA alone
        self.experts = Experts(self.director, c.experts)
        self.register_buffer('usage', torch.full((c.experts,), 1 / c.experts))  # c of Eq. 20

    def forward(self, x, sigma=None):
        """x (B, N, C) -> (B, N, C), and with the noise level sigma >= 0 the Routing; None is fine-tuning, inference."""
        # (M, N, C): with a choice for each token, a token is an image of one token
        units = x if self.routing == 'image' else x.flatten(0, 1)[:, None]
        with torch.autocast(x.device.type, enabled=False):      # float32: in bf16, ties would change the top-K set
            logits = self.gate(units[:, 0].float())             # (M, R), from the class token
            if sigma is not None:       # Eq. 21: noise, shifted in favour of the experts that are seldom used
                logits = logits + sigma * (torch.randn_like(logits) + 1 - self.usage / self.usage.sum())
            scores = logits.softmax(-1)                         # s
            top, chosen = scores.topk(self.top_k)               # (M, K)
            weights = top / top.sum(-1, keepdim=True)           # omega of Eq. 5; 1 where K = 1: no gradient to the gate
        expert, order = chosen.flatten().sort(stable=True)      # (M*K,) pairs of unit and expert, grouped by expert
        unit = order // self.top_k
        y = self.experts(units.index_select(0, unit), expert)
        y = y * weights.flatten().index_select(0, order)[:, None, None]
        y = torch.zeros_like(units, dtype=y.dtype).index_add(0, unit, y).view_as(x)     # f^E of Eq. 2 and 5
        if sigma is None:
            return y, None
        target = self.director(x.detach())                                              # f^D, without gradient
        co = 1 - F.cosine_similarity(y.float(), target.float(), dim=-1).mean()          # Eq. 3 and 15
        zeros = torch.zeros_like(scores)
        return y, Routing(co, scores, zeros.scatter(1, chosen, 1), zeros.scatter(1, chosen, weights))

    @torch.no_grad()
    def gema(self, omega, momentum, finite):
        """Group exponential moving average, once after the optimizer's step. omega (R,), the mean of the images' in the
        global batch, is Omega of Eq. 6 and c-hat of Eq. 19; where `finite` (bool) is False, nothing changes."""
        omega = torch.where(finite, omega, self.usage)      # NaN times a weight of 0 would still be NaN
        for director, experts in zip(self.director.parameters(), self.experts.parameters()):
            average = (omega @ experts.flatten(1)).view_as(director)
            director.lerp_(average, (1 - momentum) * finite)            # Eq. 7
        self.usage.lerp_(omega, 0.01 * finite)                          # Eq. 20 with mu = 0.99

class Block(nn.Module):
    """Pre-norm transformer block; with experts, its MLP is a DEX module."""
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6)
        self.attn = Attention(c)
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6)
        if c.experts:
            self.dex = DEX(c)
        else:
            self.mlp = MLP(c)

    def forward(self, x, sigma=None):
        """x (B, N, C) -> (B, N, C), and where sigma is given the Routing, without experts one of R = 0."""
        x = x + self.attn(self.norm1(x))
        if hasattr(self, 'dex'):
            y, routing = self.dex(self.norm2(x), sigma)
        else:
            y, none = self.mlp(self.norm2(x)), x.new_zeros(1, 0, dtype=torch.float32)
            routing = None if sigma is None else Routing(none.sum(), none, none, none)
        return x + y, routing

def sincos_positions(width, side):
    """Fixed sine-cosine positions (1, 1 + side * side, width): column, row, as in MAE; zeros for the class token."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega               # (side, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], 1).float()                       # (side, width / 2)
    table = torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], 1)   # row by row, (side * side, width)
    return F.pad(table, (0, 0, 1, 0))[None]

class ViT(nn.Module):
    """Vision transformer with a DEX module, or without experts an MLP, in every block."""
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, c.width, c.patch, c.patch)})
        nn.init.xavier_uniform_(self.patch_embed['proj'].weight.flatten(1))     # as the linear layer that it is
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, c.width))
        self.register_buffer('pos_embed', sincos_positions(c.width, c.size // c.patch))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)

    def forward(self, images, sigma=None, kept=None):
        """images (B, 3, size, size), normalised; kept (B, n) numbers the patches to look at, None is all N-1 of them.
        Returns tokens (B, 1 + n, C), the stacked Routing or None, and all blocks' outputs, before the last norm."""
        x = self.patch_embed['proj'](images).flatten(2).mT + self.pos_embed[:, 1:]
        if kept is not None:
            x = x.take_along_dim(kept[:, :, None], 1)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        outputs, routings = [], []
        for block in self.blocks:
            x, routing = block(x, sigma)
            outputs.append(x)
            routings.append(routing)
        routing = None if sigma is None else Routing(*map(torch.stack, zip(*routings)))
        return self.norm(x), routing, outputs

class MAE(ViT):
    """Masked autoencoder on a ViT: L_self of Eq. 8."""
    def __init__(self, c: Config):
        super().__init__(c)
        plain = replace(c, width=c.decoder_width, heads=c.decoder_heads, experts=0)
        self.decoder_embed = Linear(c.width, c.decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, c.decoder_width))
        self.register_buffer('decoder_pos_embed', sincos_positions(c.decoder_width, c.size // c.patch))
        self.decoder_blocks = nn.ModuleList(Block(plain) for _ in range(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.decoder_pred = Linear(c.decoder_width, c.patch ** 2 * 3)

    def patchify(self, images):
        """(B, 3, S, S) -> (B, N-1, P * P * 3), rows of a patch first, colours last, as in MAE."""
        P = self.config.patch
        return images.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches):      # the inverse of patchify
        P, side = self.config.patch, self.config.size // self.config.patch
        patches = patches.unflatten(2, (P, P, 3)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def targets(self, images):
        """Patches of mean 0 and variance 1, and their means and deviations. A constant patch (air) becomes zeros."""
        patches = self.patchify(images.float())
        var, mean = torch.var_mean(patches, -1, keepdim=True)
        std = (var + 1e-6).sqrt()
        return (patches - mean) / std, mean, std

    def forward(self, images, sigma=0.0, noise=None):
        """Hide patches of images (B, 3, S, S), encode those whose noise (B, N-1) is lowest, predict the hidden. Returns
        L_self (B,), the mean squared error of each image's hidden patches, the stacked Routing or None, the
        prediction (B, N-1, P * P * 3) and the mask (B, N-1), 1 where hidden."""
        if noise is None:
            noise = torch.rand(len(images), self.pos_embed.shape[1] - 1, device=images.device)
        kept = noise.argsort(1)[:, :int(noise.shape[1] * (1 - self.config.mask_ratio))]
        mask = torch.ones_like(noise).scatter(1, kept, 0)
        x, routing, _ = super().forward(images, sigma, kept)
        x = self.decoder_embed(x)
        patches = self.mask_token.to(x.dtype).expand(*mask.shape, -1)
        patches = patches.scatter(1, kept[:, :, None].expand_as(x[:, 1:]), x[:, 1:])
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x, _ = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        error = (prediction.float() - self.targets(images)[0]).square().mean(-1)        # (B, N-1)
        return (error * mask).sum(1) / mask.sum(1), routing, prediction, mask

def layer_losses(co, scores, load):
    """(sum of alpha^l L_co^l, sum of L_bal^l) / L, the two layer sums of Eq. 8, from the layers' alignment losses co
    (L,), the mean scores (L, R), and load (L, R), the share of the global batch's images that activate each expert."""
    L, R = scores.shape
    alpha = 1 / torch.arange(L, 0, -1, device=co.device)        # alpha^l = 1 / (L - (l - 1))
    balance = R * (scores * load).sum(1)                        # Eq. 18, (L,)
    return (alpha * co).sum() / L, balance.sum() / L

def flops(c):
    """Operations in the matrix products of MAE(c)'s training step for one image: two for each weight and token in the
    forward pass and, where both the weight and what goes into it have a gradient, four in the backward pass."""
    patches, pixels, C, D = (c.size // c.patch) ** 2, 3 * c.patch ** 2, c.width, c.decoder_width
    seen, tokens = int(patches * (1 - c.mask_ratio)) + 1, patches + 1

    def block(tokens, C, mlps):         # queries, keys, values, projection; scores and mixing of attention; MLPs
        return tokens * C * (4 * C + 2 * tokens + mlps * 2 * c.mlp_ratio * C)

    gate = C * c.experts * (seen if c.routing == 'token' else 1)
    director = seen * 2 * c.mlp_ratio * C ** 2 if c.experts else 0
    encoder = c.depth * (block(seen, C, c.top_k if c.experts else 1) + gate)
    decoder = c.decoder_depth * block(tokens, D, 1) + D * (seen * C + tokens * pixels)
    return 6 * (encoder + decoder) + 4 * patches * pixels * C + 2 * c.depth * director

# --- checkpoints ------------------------------------------------------------------------------------------------------
NORMALIZATIONS = {      # mean and deviation of red, green and blue by which an encoder's images were z-scored
    'imagenet': [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)],     # and ours are
    'clip': [(0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)],
    'half': [(0.5, 0.5, 0.5), (0.5, 0.5, 0.5)],
}
RENAMES = {     # regular expressions of published names, and ours or what `translate` folds
    r'(ls1\.gamma|gamma_1)$': 'attn.proj.gamma',        # LayerScale, in DINOv2; DeiT III, BEiT
    r'(ls2\.gamma|gamma_2)$': 'mlp.fc2.gamma',
}

def translate(state, heads, normalization):
    """State dict of a published ViT -> (that of a ViT of ours with the same features, its Config)."""
    for published, ours in RENAMES.items():
        state = {re.sub(published, ours, name): value for name, value in state.items()}
    for name in list(state):
        if name.endswith('.gamma'):
            gamma, weight, bias = state.pop(name), name.replace('gamma', 'weight'), name.replace('gamma', 'bias')
            state[weight], state[bias] = gamma[:, None] * state[weight], gamma * state[bias]
        elif name.endswith('q_bias'):       # keys have none
            q, v = state.pop(name), state.pop(name.replace('q_bias', 'v_bias'))
            state[name.replace('q_bias', 'qkv.bias')] = torch.cat([q, torch.zeros_like(q), v])
    if 'decoder_embed.weight' not in state:
        state.pop('mask_token', None)       # the encoder's; ours is the decoder's
    kernel, positions = state['patch_embed.proj.weight'], state['pos_embed']
    C, P, side = len(kernel), kernel.shape[3], math.isqrt(positions.shape[1])
    if kernel.shape != (C, 3, P, P) or positions.shape[1] > side ** 2 + 1:
        raise KeyError('a square grid of patches in three colours')
    if positions.shape[1] == side ** 2:     # none for the class token
        state['pos_embed'] = F.pad(positions, (0, 0, 1, 0))
    ours, theirs = (torch.tensor(NORMALIZATIONS[name])[..., None, None] for name in ('imagenet', normalization))
    shift, scale = (ours[0] - theirs[0]) / theirs[1], ours[1] / theirs[1]
    state['patch_embed.proj.bias'] = state['patch_embed.proj.bias'] + (kernel * shift).sum((1, 2, 3))
    state['patch_embed.proj.weight'] = kernel * scale
    hidden = next((bias.shape[-1] for name, bias in state.items() if name.endswith('fc1.bias')), 4 * C)
    return state, Config(
        size=P * side, patch=P, width=C, mlp_ratio=hidden // C, experts=0,
        depth=sum(name.startswith('blocks.') and name.endswith('.norm1.bias') for name in state),
        heads=heads or (16 if C == 1280 else max(1, C // 64)))      # 64 channels each, but for ViT-H

def read_checkpoint(path, token='cls_token', heads=0, normalization=''):
    """A checkpoint of ours or a published ViT: (state dict in our names, Config, everything in the file).

    `token` is a parameter that it must have. Where the file names no Config (the published do not), it follows from
    the shapes, but for `heads` (0: of 64 channels) and `normalization` ('': CLIP's for CONCH, else ImageNet's).
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # in which MAE and RETFound keep their options
            file = torch.load(path, map_location='cpu', weights_only=True)
        state = dict(file.get('model', file.get('state_dict', file.get('teacher', file))))
        config = Config(**file['config']) if 'config' in file else None
    except Exception as error:      # torch raises a dozen types for a damaged zip or a pickle with code in it
        trouble = f'damaged, or no state dict of torch.save without code in it: {type(error).__name__}'
        raise SystemExit(f'{path}: {getattr(error, "strerror", None) or trouble}')
    if config and (heads or normalization):
        raise SystemExit(f'{path}: says itself what it is; leave out --heads and --normalization')
    layout = 'clip' if any('visual.trunk.' in name for name in state) else 'imagenet'
    for prefix in ('module.', 'backbone.', 'encoder.', 'visual.trunk.'):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)} or state
    state = {name: value.float() for name, value in state.items() if torch.is_tensor(value)}
    if token not in state and 'meta' in file:
        raise SystemExit(f'{path}: a fine-tuned run; --init takes a pretrained checkpoint, --predict the run itself')
    try:
        if state[token] is not None and not config:
            state, config = translate(state, heads, normalization or layout)
            print(f'{path}: read as {config.heads} heads, images z-scored as {normalization or layout}')
    except KeyError as error:
        raise SystemExit(f'{path}: it has no {error}, so is not a ViT as MAE or timm names it, nor a fine-tuned run')
    if not all(value.isfinite().all() for value in state.values()):
        raise SystemExit(f'{path}: its weights hold NaN or infinity; the run that wrote it diverged')
    return state, config, file

def resize_positions(positions, height, width):
    """Positions (1, 1 + n, C) of a square grid -> (1, 1 + height * width, C); identity at equal size."""
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].mT.unflatten(2, (side, side)).float()
    grid = F.interpolate(grid, size=(height, width), mode='bicubic', antialias=min(height, width) < side)
    return torch.cat([positions[:, :1], grid.flatten(2).mT], 1)

def load_weights(model, state, path):
    """Put a state dict, read from `path`, into a ViT or MAE, with or without experts on either side.
    Positions and patch kernels are resized; a plain MLP becomes the director and every expert, a director a plain MLP.
    A line names decoder, head, gate and experts that only one side has; what else does not fit ends the program.
    """
    c, fitting = model.config, {}
    for name, value in state.items():
        if name.endswith('pos_embed'):
            value = resize_positions(value, c.size // c.patch, c.size // c.patch)
        elif name == 'patch_embed.proj.weight':
            gain = (value.shape[2] / c.patch) ** 2      # the same response to a flat patch
            value = gain * F.interpolate(value.float(), size=(c.patch, c.patch), mode='bicubic', antialias=True)
        elif c.experts and name.startswith('blocks.') and '.mlp.' in name:
            fitting[name.replace('.mlp.', '.dex.experts.')] = value.expand(c.experts, *value.shape)
            name = name.replace('.mlp.', '.dex.director.')
        elif not c.experts:
            name = name.replace('.dex.director.', '.mlp.')
        fitting[name] = value
    optional = re.compile(r'decoder\w*|mask_token|head|fc_norm|gate|usage' + '|experts' * (not c.experts))
    try:
        new, left = model.load_state_dict(fitting, strict=False)
        if wrong := [name for name in (*new, *left) if not optional.search(name)]:
            raise RuntimeError('missing or left over: ' + ', '.join(wrong))
    except RuntimeError as error:       # torch's own names all that has another shape
        raise SystemExit(f'{path}: does not fit this network: {error}')
    left, new = (', '.join(sorted({optional.search(name)[0] for name in names})) or 'nothing' for names in (left, new))
    print(f'{path}: loaded; left out: {left}; not in it, so new: {new}')
