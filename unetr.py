"""UNETR in two dimensions: a convolutional decoder on the outputs of a ViT's blocks (Hatamizadeh et al., 2022).

Letters: B images, C width of the ViT, S side of the image in pixels, P side of a patch.
"""
import torch
import torch.nn.functional as F
from torch import nn

class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with instance norm and leaky ReLU; a 1 x 1 one on the shortcut where widths differ."""
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
    return nn.ConvTranspose2d(inputs, outputs, factor, factor, bias=False)

def ladder(inputs, outputs, doublings, first):
    """Bring tokens to a skip's resolution: `first` times in one step, then `doublings` times by two, with a block."""
    steps = [upsample(inputs, outputs, first)]
    for _ in range(doublings):
        steps += [upsample(outputs, outputs), ResidualBlock(outputs, outputs)]
    return nn.Sequential(*steps)

class UNETR(nn.Module):
    """Segmentation: images (B, 3, S, S) -> logits (B, classes, S, S).

    Skips come from the image and from the ends of the first three quarters of the blocks (3, 6 and 9 of 12, counted
    from one); the normalised output of the last is the bottom. UNETR's paper has P = 16: with 8 or 32, the step that
    leaves the token grid enlarges P / 8 times instead of twice.
    """
    def __init__(self, vit, classes, features=16):
        super().__init__()
        C, P, L = vit.config.width, vit.config.patch, vit.config.depth
        if P not in (8, 16, 32) or L < 4:
            raise SystemExit(f'UNETR takes patches of 8, 16 or 32 pixels and 4 blocks or more, not {P} and {L}')
        self.vit, self.taps, first = vit, [L * quarter // 4 for quarter in (1, 2, 3)], P // 8
        self.skips = nn.ModuleList([ladder(C, features * 8, 0, first), ladder(C, features * 4, 1, first),
                                    ladder(C, features * 2, 2, first), ResidualBlock(3, features)])   # S/8, S/4, S/2, S
        widths = [C, features * 8, features * 4, features * 2, features]
        self.up = nn.ModuleList(map(upsample, widths, widths[1:], [first, 2, 2, 2]))
        self.mix = nn.ModuleList(ResidualBlock(2 * width, width) for width in widths[1:])
        self.head = nn.Conv2d(features, classes, 1)

    def forward(self, images):
        tokens, _, outputs = self.vit(images)
        x, *grids = (x[:, 1:].mT.unflatten(2, (-1, images.shape[3] // self.vit.config.patch))
                     for x in (tokens, *(outputs[number - 1] for number in self.taps)))
        for up, mix, skip, source in zip(self.up, self.mix, self.skips, (*reversed(grids), images)):
            x = mix(torch.cat([up(x), skip(source)], 1))
        return self.head(x)
