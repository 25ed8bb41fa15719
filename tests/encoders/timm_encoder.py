"""An encoder for finetune.py that is not ours: any ViT of timm (pip install timm torchvision).

    python finetune.py --task fives --init tests/encoders/timm_encoder.py --adapt director

Copy this file and set NAME, for example to vit_base_patch16_dinov3.lvd1689m,
vit_base_patch32_clip_224 (the network of PLIP), samvit_base_patch16 (that of MedSAM and LVM-Med)
or to a BEiT (that of USFM). timm.create_model(..., checkpoint_path=FILE) reads a file in timm's
names. README.md in this folder says what an encoder of your own must return.
"""
import timm
import torch
from torch import nn

import data

NAME = 'vit_base_patch16_dinov3.lvd1689m'

class Encoder(nn.Module):
    """timm's network NAME for images (B, 3, size, size) that data.py normalized."""
    def __init__(self, size):
        super().__init__()
        self.trunk = timm.create_model(NAME, pretrained=True, img_size=size, num_classes=0)
        self.patch = self.trunk.patch_embed.patch_size[0]
        self.width = self.trunk.embed_dim
        self.depth = len(self.trunk.blocks)
        theirs = self.trunk.default_cfg
        colours = torch.tensor([data.MEAN, data.STD, theirs['mean'], theirs['std']])
        self.register_buffer('colours', colours[:, :, None, None])
        # SAM's ViT has no class token; we leave out its neck, and so need a norm of our own.
        self.is_sam = NAME.startswith('sam')
        self.norm = nn.LayerNorm(self.width) if self.is_sam else self.trunk.norm

    def forward(self, images):
        """Tokens (B, 1 + n, width), None, and the same of each block before the last norm."""
        mean, std, their_mean, their_std = self.colours
        images = (images * std + mean - their_mean) / their_std
        outputs = [self.join(patches, others) for patches, others in self.run_blocks(images)]
        return self.norm(outputs[-1]), None, outputs

    def run_blocks(self, images):
        """Of each block, the patches (B, width, rows, columns) and the other tokens or None."""
        if self.is_sam:
            outputs = self.trunk.forward_intermediates(images, intermediates_only=True)
            return [(patches, None) for patches in outputs]
        return self.trunk.forward_intermediates(images, intermediates_only=True,
                                                return_prefix_tokens=True)

    def join(self, patches, others):
        """Class token and patches (B, 1 + n, width)."""
        patches = patches.flatten(2).mT
        if others is None:
            class_token = patches.mean(1, keepdim=True)
        else:
            class_token = others[:, :1]     # registers come after it
        return torch.cat([class_token, patches], 1)

encoder = Encoder
