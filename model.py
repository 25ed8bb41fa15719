"""The Director-Experts (DEX) vision transformer and its masked autoencoder.

DEX is a ViT whose every MLP is replaced by a DEX module: R expert MLPs, of which a gate activates K
for the whole image, and one director MLP that follows the experts' average and pulls them together.
`Config(experts=0)` is the plain ViT. Parameters are named as in MAE and timm.
Letters, the same in all files: B images, N tokens (class token first), C their width, R experts,
K activated experts, L layers (blocks), S and P sides of image and patch in pixels.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {   # base, large and huge have the decoder of Config's defaults, as in MAE
    'tiny': dict(width=192, depth=12, heads=3, decoder_width=128, decoder_depth=2, decoder_heads=4),
    'small': dict(width=384, depth=12, heads=6,
                  decoder_width=256, decoder_depth=4, decoder_heads=8),
    'base': dict(width=768, depth=12, heads=12),
    'large': dict(width=1024, depth=24, heads=16),
    'huge': dict(width=1280, depth=32, heads=16),
}

@dataclass
class Config:
    """Architecture of a network; the defaults are those of DEX-B at 256 pixels."""
    size: int = 256             # S
    patch: int = 16             # P
    width: int = 768            # C
    depth: int = 12             # L
    heads: int = 12             # of attention, each with C / heads channels
    mlp_ratio: int = 4          # hidden width of an MLP / C
    experts: int = 8            # R; 0 is the plain ViT
    top_k: int = 2              # K
    mask_ratio: float = 0.75    # share of the patches that the masked autoencoder hides
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def __post_init__(self):
        if self.patch < 1 or self.size < self.patch or self.size % self.patch:
            raise SystemExit(f'size {self.size} must be a multiple of patch {self.patch}')
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise SystemExit(f'top_k {self.top_k} must lie between 1 and experts {self.experts}')

def named_config(name, depth=0, **others):
    """The Config of a row of SIZES, with another depth if it is given."""
    if name not in SIZES:
        raise SystemExit(f'--model {name}: there is no such size; choose from {", ".join(SIZES)}')
    config = Config(**SIZES[name], **others)
    return replace(config, depth=depth or config.depth)

class Linear(nn.Linear):
    """nn.Linear with MAE's initialization."""
    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

class Attention(nn.Module):
    """Self-attention of all tokens: x (B, N, C) -> (B, N, C)."""
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))     # (B, N, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # each (B, heads, N, C / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """Two linear layers: x (..., C) -> (..., C)."""
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_ratio * config.width)
        self.fc2 = Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class StackedLinear(nn.Module):
    """R linear layers in one: weights (R, out, in), biases (R, out). All start as copies of one."""
    def __init__(self, linear, R):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().repeat(R, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(R, 1))

    def forward(self, x, expert):
        """x (n, N, in) -> (n, N, out). expert (n,): each image's expert, in ascending order."""
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not cover grouped_mm, so cast by hand.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        counts = F.one_hot(expert, len(self.weight)).sum(0)         # (R,): each expert's images
        ends = (counts.cumsum(0) * x.shape[1]).int()                # where its tokens end
        # This is one kernel in bfloat16 on an H100 or newer, and the host need not wait for it.
        y = F.grouped_mm(x.flatten(0, 1), self.weight.to(x.dtype).mT, offs=ends)
        # self.bias[expert] would do the same, but a CPU sums its gradient in no fixed order.
        # The cast comes after the selection, so that the gradient is summed in float32.
        bias = self.bias.index_select(0, expert)[:, None].to(x.dtype)
        return y.unflatten(0, x.shape[:2]) + bias

class Experts(nn.Module):
    """R MLPs that start as copies of one. Stacked, they are 4 tensors for DDP, AdamW and GEMA."""
    def __init__(self, mlp, R):
        super().__init__()
        self.fc1 = StackedLinear(mlp.fc1, R)
        self.fc2 = StackedLinear(mlp.fc2, R)

    def forward(self, x, expert):
        """x (n, N, C) -> (n, N, C). expert (n,): each image's expert, in ascending order."""
        return self.fc2(F.gelu(self.fc1(x, expert)), expert)

class Routing(NamedTuple):
    """What a DEX module did, for pretraining's losses; ViT.forward stacks those of L modules."""
    align: torch.Tensor         # () alignment loss; stacked, (L,)
    scores: torch.Tensor        # (B, R) softmax scores s, with gradient; stacked, (L, B, R)
    activated: torch.Tensor     # (B, R) indicator I of Eq. 18: 1 where the expert is activated
    weights: torch.Tensor       # (B, R) omega of Eq. 5: 0 where the expert is not activated

class DEX(nn.Module):
    """Director-Experts module (Sec. 3.2 and 3.3): K experts an image and a director for all.
    Averaging weights (Eq. 7) makes sense only if neuron i means the same in every expert.
    Hence all experts start as copies of the director."""
    def __init__(self, config):
        super().__init__()
        R, self.top_k = config.experts, config.top_k
        self.gate = Linear(config.width, R, bias=False)                 # pi of Eq. 2
        self.director = MLP(config).requires_grad_(False)               # moved by GEMA alone
        self.experts = Experts(self.director, R)
        self.register_buffer('usage', torch.full((R,), 1 / R))          # c of Eq. 20, moved by gema

    def forward(self, x, sigma=None, with_director=False):
        """x (B, N, C) -> y (B, N, C), the experts' mixed output, and a Routing or None.
        sigma: deviation of the gate's noise; None is no noise, as in validation and fine-tuning.
        with_director: also run the director, and return the Routing that pretraining needs."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 ties would change the top K
            logits = self.gate(x[:, 0].float())                 # (B, R), from the class token
            if sigma is not None:
                # Eq. 21: the noise is shifted in favour of experts that are seldom used.
                noise = torch.randn_like(logits) + 1 - self.usage / self.usage.sum()
                logits = logits + sigma * noise
            scores = logits.softmax(-1)                         # s
            top_scores, top_experts = scores.topk(self.top_k)   # both (B, K)
            # omega of Eq. 5. It is 1 if K = 1, and then the task teaches the gate nothing.
            top_weights = top_scores / top_scores.sum(-1, keepdim=True)

        # Flattened, top_experts holds the K choices of image 0, then those of image 1 ... Sorting
        # brings an expert's choices together, as grouped_mm wants them. order: where they were.
        expert, order = top_experts.flatten().sort(stable=True)         # both (B * K,)
        image = order // self.top_k                                     # which image chose
        weight = top_weights.flatten().index_select(0, order)           # with which omega
        outputs = self.experts(x.index_select(0, image), expert)        # (B * K, N, C)
        outputs = outputs * weight[:, None, None]
        y = torch.zeros_like(x, dtype=outputs.dtype).index_add(0, image, outputs)   # f^E, Eq. 2, 5
        if not with_director:
            return y, None

        target = self.director(x.detach())                                      # f^D, no gradient
        align = 1 - F.cosine_similarity(y.float(), target.float(), dim=-1).mean()   # Eq. 3 and 15
        activated = torch.zeros_like(scores).scatter(1, top_experts, 1)
        weights = torch.zeros_like(scores).scatter(1, top_experts, top_weights)
        return y, Routing(align, scores, activated, weights)

    @torch.no_grad()
    def gema(self, batch_usage, momentum, finite):
        """Move the director (Eq. 7) and the usage (Eq. 20), once after the optimizer's step.
        batch_usage (R,): each expert's mean omega in the global batch. It is both Omega of Eq. 6
        and c-hat of Eq. 19. finite: bool tensor (); if it is False, nothing moves."""
        director_rate = torch.where(finite, 1 - momentum, 0.0)
        usage_rate = torch.where(finite, 0.01, 0.0)             # 1 - mu, mu = 0.99
        # A rate of 0 does not stop NaN, as 0 * NaN is NaN. So the old usage takes its place.
        batch_usage = torch.where(finite, batch_usage, self.usage)
        for director, experts in zip(self.director.parameters(), self.experts.parameters()):
            average = (batch_usage @ experts.flatten(1)).view_as(director)
            director.lerp_(average, director_rate)              # Eq. 7
        self.usage.lerp_(batch_usage, usage_rate)               # Eq. 20

class Block(nn.Module):
    """Pre-norm transformer block; with experts, a DEX module takes the place of the MLP."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        if config.experts:
            self.dex = DEX(config)
        else:
            self.mlp = MLP(config)

    def forward(self, x, sigma=None, with_director=False):
        """x (B, N, C) -> (B, N, C), and DEX.forward's Routing or None."""
        x = x + self.attn(self.norm1(x))
        if not hasattr(self, 'dex'):
            return x + self.mlp(self.norm2(x)), None
        y, routing = self.dex(self.norm2(x), sigma, with_director)
        return x + y, routing

def sincos_positions(width, side):
    """Fixed sine-cosine positions (1, 1 + side * side, width) as in MAE, zeros for the class token.
    The first half of the channels encodes a patch's column, the second half its row."""
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * 10000.0 ** -exponents
    axis = torch.cat([angles.sin(), angles.cos()], 1).float()           # (side, width / 2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    return F.pad(torch.cat([columns, rows], 1), (0, 0, 1, 0))[None]

class ViT(nn.Module):
    """Vision transformer with a DEX module, or without experts an MLP, in every block."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        projection = nn.Conv2d(3, config.width, config.patch, config.patch)
        nn.init.xavier_uniform_(projection.weight.flatten(1))   # it is a linear layer on patches
        self.patch_embed = nn.ModuleDict({'proj': projection})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, config.width))
        positions = sincos_positions(config.width, config.size // config.patch)
        self.register_buffer('pos_embed', positions)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, images, sigma=None, visible=None, with_director=False):
        """images (B, 3, S, S), normalized -> tokens (B, 1 + n, C), routing, outputs.
        visible: indices (B, n) of the patches to look at; None looks at all.
        routing: the stacked Routing of all layers; None without experts or director.
        outputs: the list of all L blocks' outputs, before the last norm."""
        x = self.patch_embed['proj'](images).flatten(2).mT + self.pos_embed[:, 1:]
        if visible is not None:
            x = x.take_along_dim(visible[:, :, None], 1)
        cls_token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(len(x), -1, -1), x], 1)
        outputs, routings = [], []
        for block in self.blocks:
            x, routing = block(x, sigma, with_director)
            outputs.append(x)
            routings.append(routing)
        stacked = None
        if self.config.experts and with_director:
            stacked = Routing(*[torch.stack(field) for field in zip(*routings)])
        return self.norm(x), stacked, outputs

class MAE(ViT):
    """Masked autoencoder on a ViT: L_self of Eq. 8."""
    def __init__(self, config):
        super().__init__(config)
        width = config.decoder_width
        plain = replace(config, width=width, heads=config.decoder_heads, experts=0)
        self.decoder_embed = Linear(config.width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        positions = sincos_positions(width, config.size // config.patch)
        self.register_buffer('decoder_pos_embed', positions)
        self.decoder_blocks = nn.ModuleList(Block(plain) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = Linear(width, config.patch ** 2 * 3)

    def patchify(self, images):
        """(B, 3, S, S) -> (B, N - 1, P * P * 3): row by row, colours last, as in MAE."""
        P = self.config.patch
        patches = images.unfold(2, P, P).unfold(3, P, P)        # (B, 3, S / P, S / P, P, P)
        return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def targets(self, images):
        """Patches (B, N - 1, P * P * 3) of mean 0 and variance 1, their means and deviations.
        A constant patch (air) becomes zeros."""
        patches = self.patchify(images.float())
        var, mean = torch.var_mean(patches, -1, keepdim=True)
        std = (var + 1e-6).sqrt()
        return (patches - mean) / std, mean, std

    def forward(self, images, sigma=None, mask_noise=None):
        """Hide patches of images (B, 3, S, S), encode the others, and predict the hidden ones.
        mask_noise (B, N - 1): the patches with the lowest values stay visible; None draws it.
        Returns L_self (B,), the mean squared error of each image's hidden patches; the Routing or
        None; the prediction (B, N - 1, P * P * 3); the mask (B, N - 1), 1 where hidden."""
        count = self.pos_embed.shape[1] - 1
        if mask_noise is None:
            mask_noise = torch.rand(len(images), count, device=images.device)
        visible = mask_noise.argsort(1)[:, :int(count * (1 - self.config.mask_ratio))]
        mask = torch.ones_like(mask_noise).scatter(1, visible, 0)
        x, routing, _ = super().forward(images, sigma, visible, with_director=True)

        x = self.decoder_embed(x)
        tokens = self.mask_token.to(x.dtype).expand(*mask.shape, -1)
        tokens = tokens.scatter(1, visible[:, :, None].expand_as(x[:, 1:]), x[:, 1:])
        x = torch.cat([x[:, :1], tokens], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x, _ = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        error = (prediction.float() - self.targets(images)[0]).square().mean(-1)    # (B, N - 1)
        return (error * mask).sum(1) / mask.sum(1), routing, prediction, mask

def layer_losses(align, scores, load):
    """The layer sums of Eq. 8: (sum of alpha^l L_co^l) / L and (sum of L_bal^l) / L.
    align (L,): alignment loss of each layer.
    scores (L, R): mean scores of this rank's images, whose gradients DDP averages over ranks.
    load (L, R): share of all ranks' images that activate each expert; it has no gradient."""
    L, R = scores.shape
    alpha = 1 / torch.arange(L, 0, -1, device=align.device)     # alpha^l = 1 / (L - (l - 1))
    balance = R * (scores * load).sum(1)                        # Eq. 18, (L,)
    return (alpha * align).sum() / L, balance.sum() / L

# --- checkpoints ----------------------------------------------------------------------------------
def read_checkpoint(path):
    """A checkpoint of pretrain.py or finetune.py: (state dict, Config, the whole file)."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        state, config = checkpoint['model'], dict(checkpoint['config'])
        if config.pop('routing', 'image') != 'image':       # by an older commit
            raise SystemExit(f'{path}: its experts are chosen for each token; pretrain it anew')
        config = Config(**config)
    except OSError as error:
        raise SystemExit(f'{path}: {error.strerror}; pretrain (--demo), or give another --init')
    except Exception as error:  # torch raises a dozen types for a damaged zip or a pickle with code
        raise SystemExit(f'{path}: damaged, or not written by nanoDEX ({error!r:.60}); convert a '
                         f'published encoder by python -m tests.encoders.published {path} OURS.pt')
    if not all(value.isfinite().all() for value in state.values()):
        raise SystemExit(f'{path}: its weights hold NaN or infinity; its training diverged')
    return state, config, checkpoint

def resize_positions(positions, height, width):
    """Positions (1, 1 + n, C) of a square grid -> (1, 1 + height * width, C)."""
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].mT.unflatten(2, (side, side)).float()
    grid = F.interpolate(grid, (height, width), mode='bicubic', antialias=min(height, width) < side)
    return torch.cat([positions[:, :1], grid.flatten(2).mT], 1)

def resize_kernel(kernel, patch):
    """Patch kernel (C, 3, P, P) -> (C, 3, patch, patch) with the same response to a flat patch."""
    gain = (kernel.shape[2] / patch) ** 2
    return gain * F.interpolate(kernel.float(), size=(patch, patch), mode='bicubic', antialias=True)

# Parameters with one of these in their names may be missing from a checkpoint, or left over.
OPTIONAL = ('decoder_', 'mask_token', '.dex.gate', '.dex.usage', '.dex.experts')

def parts_in(names):
    """The OPTIONAL parts that occur in names, as text."""
    found = [part for part in OPTIONAL if any(part in name for name in names)]
    return ', '.join(found) or 'nothing'

def load_weights(model, state, path):
    """Put a state dict, read from `path`, into a ViT or MAE; either may have experts or none.
    Positions and patch kernel are resized. A plain MLP becomes director and experts; in a plain
    network a director becomes the MLP. Prints which OPTIONAL parts are left out or new."""
    config, fitted = model.config, {}
    side = config.size // config.patch
    for name, value in state.items():
        if name.endswith('pos_embed'):
            fitted[name] = resize_positions(value, side, side)
        elif name == 'patch_embed.proj.weight':
            fitted[name] = resize_kernel(value, config.patch)
        elif config.experts and name.startswith('blocks.') and '.mlp.' in name:
            copies = value.expand(config.experts, *value.shape)
            fitted[name.replace('.mlp.', '.dex.experts.')] = copies
            fitted[name.replace('.mlp.', '.dex.director.')] = value
        elif not config.experts and '.dex.director.' in name:
            fitted[name.replace('.dex.director.', '.mlp.')] = value
        else:
            fitted[name] = value
    try:
        missing, unexpected = model.load_state_dict(fitted, strict=False)
    except RuntimeError as error:       # it names everything that has another shape
        raise SystemExit(f'{path}: does not fit this network: {error}')
    for name in (*missing, *unexpected):
        if not any(part in name for part in OPTIONAL):
            raise SystemExit(f'{path}: does not fit this network: {name} is missing or left over')
    left_out, new = parts_in(unexpected), parts_in(missing)
    print(f'{path}: loaded; left out: {left_out}; not in it, so new: {new}')
