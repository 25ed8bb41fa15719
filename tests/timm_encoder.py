"""An encoder of finetune.py that is not ours: any ViT of timm (pip install timm torchvision, your own install).

    python finetune.py --task fives --init tests/timm_encoder.py --adapt director

Copy it and set NAME: vit_base_patch16_dinov3.lvd1689m, vit_base_patch32_clip_224 (PLIP's network), samvit_base_patch16
(MedSAM's and LVM-Med's), a BEiT (USFM's). create_model(..., checkpoint_path=FILE) reads a file in timm's names. What a
file of your own must hold is a function encoder(size); finetune.py's own_encoder says what it returns.
"""
import timm
import torch
from torch import nn

NAME = 'vit_base_patch16_dinov3.lvd1689m'

class Encoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.trunk = timm.create_model(NAME, pretrained=True, img_size=size, num_classes=0)
        self.patch, self.width = self.trunk.patch_embed.patch_size[0], self.trunk.embed_dim
        self.depth, c = len(self.trunk.blocks), self.trunk.default_cfg
        colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), c['mean'], c['std']
        self.register_buffer('colours', torch.tensor(colours)[..., None, None])
        self.sam = NAME.startswith('sam')       # without its neck; it has no class token, for which the mean stands
        self.norm = nn.LayerNorm(self.width) if self.sam else self.trunk.norm

    def forward(self, images):      # z-scored as everywhere here; undone, and redone as the encoder's own
        mean, std, their_mean, their_std = self.colours
        images = (images * std + mean - their_mean) / their_std
        extra = {} if self.sam else dict(return_prefix_tokens=True)
        outputs = []
        for block in self.trunk.forward_intermediates(images, intermediates_only=True, **extra):
            patches, prefix = (block, None) if self.sam else block
            patches = patches.flatten(2).mT
            first = patches.mean(1, keepdim=True) if self.sam else prefix[:, :1]
            outputs.append(torch.cat([first, patches], 1))
        return self.norm(outputs[-1]), None, outputs

encoder = Encoder
