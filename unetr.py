"""UNETR in two dimensions: a convolutional decoder on a ViT's blocks (Hatamizadeh et al., 2022).
Letters as in model.py: B images, C width and L blocks of the ViT, S and P sides of image and patch.
"""
import torch
import torch.nn.functional as F
from torch import nn

class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with instance norm and leaky ReLU, and a shortcut."""
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x):
        shortcut = x if self.shortcut is None else F.instance_norm(self.shortcut(x))
        x = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01)
        return F.leaky_relu(F.instance_norm(self.conv2(x)) + shortcut, 0.01)

def upsample(inputs, outputs, factor=2):
    """A transposed convolution that makes a feature map `factor` times as large."""
    return nn.ConvTranspose2d(inputs, outputs, factor, factor, bias=False)

def skip_path(inputs, outputs, factor, doublings):
    """Enlarge the token grid by `factor` in one step, then double it `doublings` times."""
    steps = [upsample(inputs, outputs, factor)]
    for _ in range(doublings):
        steps += [upsample(outputs, outputs), ResidualBlock(outputs, outputs)]
    return nn.Sequential(*steps)

class UNETR(nn.Module):
    """Segmentation: images (B, 3, S, S) -> logits (B, classes, S, S).
    The decoder starts from the ViT's normalized tokens. Its skips are the outputs of the blocks at
    one, two and three quarters of the depth (3, 6 and 9 of 12, counted from one) and the image.
    One step of factor P / 8 leads from the token grid, side S / P, to side S / 8."""
    def __init__(self, vit, classes, features=16):
        super().__init__()
        C, P, L = vit.config.width, vit.config.patch, vit.config.depth
        if P not in (8, 16, 32) or L < 4:
            raise SystemExit(f'UNETR takes patches of 8, 16, 32 px, 4 blocks or more; not {P}, {L}')
        self.vit, factor = vit, P // 8
        self.taps = [L // 4, L * 2 // 4, L * 3 // 4]        # blocks, counted from one
        self.skips = nn.ModuleList([                        # from coarse to fine
            skip_path(C, features * 8, factor, 0),          # side S / 8, from the last tap
            skip_path(C, features * 4, factor, 1),          # S / 4
            skip_path(C, features * 2, factor, 2),          # S / 2
            ResidualBlock(3, features),                     # S, from the image
        ])
        widths = [C, features * 8, features * 4, features * 2, features]
        self.up = nn.ModuleList(map(upsample, widths[:-1], widths[1:], [factor, 2, 2, 2]))
        self.mix = nn.ModuleList(ResidualBlock(2 * width, width) for width in widths[1:])
        self.head = nn.Conv2d(features, classes, 1)

    def grid(self, tokens):
        """Tokens (B, N, C) -> the patches' tokens in their places (B, C, S / P, S / P)."""
        side = self.vit.config.size // self.vit.config.patch
        return tokens[:, 1:].mT.unflatten(2, (side, side))

    def forward(self, images):
        tokens, _, outputs = self.vit(images)
        x = self.grid(tokens)
        sources = [self.grid(outputs[tap - 1]) for tap in reversed(self.taps)] + [images]
        for up, skip, mix, source in zip(self.up, self.skips, self.mix, sources):
            x = mix(torch.cat([up(x), skip(source)], 1))
        return self.head(x)
