"""The encoder of a user's own Python file, for `finetune.py --init FILE.py`."""
import os
import runpy
import sys

import torch

from model import Config

def own_encoder(path, size, o=None):
    """The encoder of a user's Python file; tests/encoders/timm_encoder.py is the pattern. Exits if
    `o`, the options of a fine-tuning, ask for what such an encoder does not have.
    The file's function encoder(size) returns a module with the integers patch, width and depth.
    It maps normalized images (B, 3, size, size) to what our ViT returns: tokens (B, 1 + n, width),
    the class token and then n patches row by row; None; the same of each of `depth` blocks."""
    if o and (o.adapt == 'experts' or o.top_k or o.patch or o.tune_blocks != type(o).tune_blocks):
        raise SystemExit(f'{path}: takes --adapt director; no --top_k, --patch, --tune_blocks')
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)      # the file may import its neighbours
    try:
        vit = runpy.run_path(path)['encoder'](size).eval()      # without dropout
        vit.config = Config(size=size, patch=vit.patch, width=vit.width, depth=vit.depth, heads=1,
                            experts=0)
        check_outputs(vit)
    except (Exception, SystemExit) as error:    # the file may do anything
        raise SystemExit(f'{path}: {error!r}; tests/encoders/timm_encoder.py shows what '
                         f'encoder(size) must return')
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return vit

@torch.enable_grad()
def check_outputs(vit):
    """Raise ValueError unless the encoder's outputs for two images are as they must be."""
    c = vit.config
    images = torch.linspace(-2, 2, 2 * 3 * c.size ** 2).view(2, 3, c.size, c.size)
    tokens, _, outputs = vit(images)
    wanted = (2, 1 + (c.size // c.patch) ** 2, c.width)
    if len(outputs) != c.depth:
        raise ValueError(f'{len(outputs)} outputs for {c.depth} blocks')
    for x in (tokens, *outputs):
        if x.shape != wanted:
            raise ValueError(f'returned {tuple(x.shape)}, not {wanted}')
        if x.dtype != torch.float32:
            raise ValueError(f'returned {x.dtype}, not torch.float32')
        if not x.isfinite().all():
            raise ValueError('returned numbers that are not finite')
        if not x.requires_grad:
            raise ValueError('returned tokens without a gradient, so they could not be trained')
