"""Convert a published vision transformer's checkpoint into our format.

    python -m tests.encoders.published dinov2_vitb14_pretrain.pth dinov2.pt
    python -m tests.encoders.published pytorch_model.bin ours.pt --normalization half
    python finetune.py --task fives --init dinov2.pt --adapt director --patch 16

It reads plain ViTs whose tensors have the names of MAE and timm: those of MAE, RETFound, DINOv2,
DeiT, CONCH and PanDerm, and what timm's VisionTransformer saves. The features stay the same.

Two things do not stand in such a file. One is the number of attention heads: they are taken to have
64 channels each (ViT-H has 16 heads), unless --heads says otherwise. The other is the mean and
deviation by which its images were normalized. Ours are ImageNet's, and the patch kernel of an
encoder that wants others is changed accordingly. Some layouts tell whose file it is and so its
normalization; for all others --normalization must be given.
"""
import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from model import SIZES, Config, ViT, sincos_positions
from pretrain import save

NORMALIZATIONS = {      # mean and deviation of red, green and blue, for pixels from 0 to 1
    'imagenet': (data.MEAN, data.STD),
    'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    'half': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
STATES = ('model', 'state_dict', 'teacher')     # the first that a file has holds its tensors
PREFIXES = ('module.', 'backbone.', 'encoder.', 'visual.trunk.')
LAYER_SCALES = {        # of each block, and the linear layer whose output they multiply
    'ls1.gamma': 'attn.proj', 'gamma_1': 'attn.proj',
    'ls2.gamma': 'mlp.fc2', 'gamma_2': 'mlp.fc2',
}
NEEDED = ('cls_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias',
          'blocks.0.mlp.fc1.weight')

# --- reading --------------------------------------------------------------------------------------

def read_file(path):
    """A file of torch.save: (everything in it, its state dict). Code in the file is not run."""
    try:
        # MAE and RETFound keep their options as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = dict(torch.load(path, map_location='cpu', weights_only=True))
        keys = [key for key in STATES if key in content]
        state = dict(content[keys[0]]) if keys else content
    except OSError as error:
        raise SystemExit(f'{path}: {error.strerror or error}')
    except Exception as error:      # torch raises a dozen types for a damaged file
        raise SystemExit(f'{path}: is damaged, or no state dict of torch.save '
                         f'({type(error).__name__}); safetensors and code are not read')
    return content, state

def strip_prefixes(state):
    """The encoder's tensors in float32, without the prefixes that lead to them."""
    for prefix in PREFIXES:
        inside = [name for name in state if name.startswith(prefix)]
        if inside:
            state = {name.removeprefix(prefix): state[name] for name in inside}
    return {name: value.float() for name, value in state.items() if torch.is_tensor(value)}

def has_fixed_positions(state):
    """Whether the positions are MAE's sines and cosines, which training does not change."""
    positions = state['pos_embed']
    fixed = sincos_positions(positions.shape[2], math.isqrt(positions.shape[1]))
    return positions.shape == fixed.shape and torch.allclose(positions, fixed, atol=1e-3)

def recognize(content, published, state):
    """What the layout tells about the images: (a name in NORMALIZATIONS, why), or ('', '').

    content: everything in the file. published, state: its tensors before and after strip_prefixes.
    """
    if any('visual.trunk.' in name for name in published):
        return 'clip', 'it has a visual.trunk, as in CONCH'
    if 'decoder_embed.weight' in state or has_fixed_positions(state):
        return 'imagenet', 'it is a masked autoencoder, as MAE and RETFound'
    if any(name.endswith(('.ls1.gamma', '.gamma_1')) for name in state):
        return 'imagenet', 'it has LayerScale, as DINOv2, DeiT III and PanDerm'
    if 'teacher' in content:
        return 'imagenet', 'it has a teacher, as DINO and DINOv2'
    if list(content) == ['model'] and len(state.get('head.weight', ())) == 1000:
        return 'imagenet', 'it has a model with 1,000 classes, as DeiT'
    return '', ''

# --- translating ----------------------------------------------------------------------------------

def drop_heads(state):
    """Remove what is no part of the encoder and of no use to a decoder; returns the names."""
    dropped = [name for name in state if name.startswith(('head.', 'head_dist.', 'fc_norm.'))]
    if 'mask_token' in state and 'decoder_embed.weight' not in state:
        dropped.append('mask_token')        # the encoder's; our mask token is the decoder's
    for name in dropped:
        del state[name]
    return dropped

def fold_layer_scales(state):
    """Multiply each LayerScale into the linear layer before it."""
    for name in list(state):
        for scale, layer in LAYER_SCALES.items():
            target = name.removesuffix(scale) + layer
            if name.endswith('.' + scale) and f'{target}.bias' in state:
                gamma = state.pop(name)
                state[f'{target}.weight'] = gamma[:, None] * state[f'{target}.weight']
                state[f'{target}.bias'] = gamma * state[f'{target}.bias']

def join_biases(state):
    """Join the biases of queries and values, as in BEiT and PanDerm; their keys have none."""
    for name in list(state):
        attention = name.removesuffix('q_bias')
        if name.endswith('.q_bias') and f'{attention}v_bias' in state:
            q = state.pop(f'{attention}q_bias')
            v = state.pop(f'{attention}v_bias')
            state[f'{attention}qkv.bias'] = torch.cat([q, torch.zeros_like(q), v])

def read_config(state, heads=0):
    """The Config that the shapes give, without experts; 0 heads mean one for each 64 channels."""
    width, channels, height, patch = state['patch_embed.proj.weight'].shape
    positions = state['pos_embed'].shape[1]
    side = math.isqrt(positions)
    if channels != 3 or height != patch or positions not in (side ** 2, side ** 2 + 1):
        raise SystemExit(f'patches of {height} x {patch} pixels in {channels} colours at '
                         f'{positions} positions are no square patches in a square grid')
    if not heads:
        heads = 16 if width == 1280 else max(1, width // 64)
    if heads < 0 or width % heads:
        raise SystemExit(f'{heads} heads do not divide its width of {width} channels; give their '
                         f'right number by --heads')
    hidden = len(state['blocks.0.mlp.fc1.weight'])
    blocks = [name for name in state if name.startswith('blocks.') and name.endswith('.norm1.bias')]
    return Config(size=patch * side, patch=patch, width=width, depth=len(blocks), heads=heads,
                  mlp_ratio=hidden // width, experts=0)

def pad_positions(state):
    """Give the class token a position of zeros if it has none; returns whether it had one.

    The count decides: n * n positions are a square grid. They could also be a class token's and
    those of (n - 1) x (n + 1) patches, so the grid that was read is printed.
    """
    positions = state['pos_embed']
    had_one = positions.shape[1] != math.isqrt(positions.shape[1]) ** 2
    if not had_one:
        state['pos_embed'] = F.pad(positions, (0, 0, 1, 0))
    return had_one

def change_normalization(state, normalization):
    """Let the patch kernel take images that are normalized by ImageNet's mean and deviation.

    If z is a pixel of ours, the encoder wants (z * our_std + our_mean - their_mean) / their_std.
    """
    our_mean, our_std = colours('imagenet')
    their_mean, their_std = colours(normalization)
    kernel, bias = state['patch_embed.proj.weight'], state['patch_embed.proj.bias']
    shift = (our_mean - their_mean) / their_std
    state['patch_embed.proj.bias'] = bias + (kernel * shift).sum((1, 2, 3))
    state['patch_embed.proj.weight'] = kernel * (our_std / their_std)

def colours(normalization):
    """Mean and deviation of the three colours, each (3, 1, 1)."""
    return torch.tensor(NORMALIZATIONS[normalization])[:, :, None, None]

def check(state, config):
    """End the program unless the tensors are those of ViT(config), but for a decoder's."""
    with torch.device('meta'):
        wanted = ViT(config).state_dict()
    found = {name for name in state if not name.startswith('decoder_') and name != 'mask_token'}
    misfits = sorted(found.symmetric_difference(wanted))
    if misfits:
        raise SystemExit(f'it is no plain ViT; missing or left over: {first_ones(misfits)}')
    misfits = [f'{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}'
               for name, tensor in wanted.items() if state[name].shape != tensor.shape]
    if misfits:
        raise SystemExit(f'it is no plain ViT; of another shape: {first_ones(misfits)}')
    if not all(value.isfinite().all() for value in state.values()):
        raise SystemExit('its weights hold NaN or infinity; its training diverged')

def first_ones(texts, most=4):
    """A line of the first texts, and how many more there are."""
    line = ', '.join(texts[:most])
    return line if len(texts) <= most else f'{line} and {len(texts) - most} more'

def describe(path, config, has_position, dropped):
    """Print what was read, and a warning if no known ViT has this depth, width and heads."""
    side = config.size // config.patch
    print(f'{path}: {config.depth} blocks of width {config.width} with {config.heads} heads; '
          f'a grid of {side} x {side} patches of {config.patch} pixels; the class token has '
          f'{"a" if has_position else "no"} position')
    if dropped:
        print(f'{path}: left out: {", ".join(dropped)}')
    known = [(row['depth'], row['width'], row['heads']) for row in SIZES.values()]
    if (config.depth, config.width, config.heads) not in known:
        print(f'{path}: warning: no ViT that we know has this depth, width and number of heads; '
              'make sure that the file is whole, and that --heads is right')

def convert(path, heads=0, normalization=''):
    """A published checkpoint as (state dict in our names, Config); prints what was read."""
    content, published = read_file(path)
    config = content.get('config')
    if isinstance(config, dict) and 'experts' in config:
        raise SystemExit(f'{path}: is a checkpoint of ours; give it to --init as it is')
    state = strip_prefixes(published)
    for name in NEEDED:
        if name not in state:
            raise SystemExit(f'{path}: has no {name}, so it is no ViT as MAE or timm names it')
    known, reason = recognize(content, published, state)
    if normalization:
        reason = 'as --normalization says'
    elif known:
        normalization = known
    else:
        raise SystemExit(f'{path}: does not tell how its images were normalized; give '
                         f'--normalization {" or ".join(NORMALIZATIONS)}')
    dropped = drop_heads(state)
    fold_layer_scales(state)
    join_biases(state)
    try:
        config = read_config(state, heads)
        has_position = pad_positions(state)
        check(state, config)
    except SystemExit as error:     # Config refuses some sizes by itself
        raise SystemExit(f'{path}: {error}')
    change_normalization(state, normalization)
    describe(path, config, has_position, dropped)
    print(f'{path}: images are normalized as {normalization}: {reason}')
    return state, config

def main():
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m tests.encoders.published',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('theirs', help='the checkpoint as it was downloaded')
    parser.add_argument('ours', help='the file to write')
    parser.add_argument('--heads', type=int, default=0, help='of attention; 0: of 64 channels each')
    parser.add_argument('--normalization', choices=NORMALIZATIONS, default='',
                        help='of the images; needed where the layout does not tell')
    o = parser.parse_args()
    if Path(o.ours).exists():
        raise SystemExit(f'{o.ours}: exists already; delete it, or choose another name')
    state, config = convert(o.theirs, o.heads, o.normalization)
    save(Path(o.ours), dict(model=state, config=asdict(config)))
    print(f'{o.ours}: written; start from it with --init {o.ours}')

if __name__ == '__main__':
    main()
