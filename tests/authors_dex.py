"""Turn a checkpoint of the authors' DEX into one of ours: python tests/authors_dex.py THEIRS.pth OURS.pt

Nobody outside has such a file yet; the names are those of the code that they released. Their gate is a softmax of
logits / 0.5, that is of twice its weight; their noise comes before that division, so to pretrain further as they would,
give --sigma 2.
"""
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import translate  # noqa: E402

RENAMES = {     # of each block
    r'DEX\.router\.linear\.weight$': 'dex.gate.weight',
    r'DEX\.(router\.)?expert_activation_count$': 'dex.usage',
    r'DEX\.(director|experts)\.': r'dex.\1.',
}

def convert(state):
    """Their state dict -> ours, with its Config."""
    state = {name.removeprefix('module.'): value.float() for name, value in state.items()}
    for theirs, ours in RENAMES.items():
        state = {re.sub(theirs, ours, name): value for name, value in state.items()}
    R = len(state['blocks.0.dex.gate.weight'])
    for name in list(state):
        if name.endswith('.dex.gate.weight'):
            state[name] = 2 * state[name]
        elif name.endswith('.dex.usage'):
            state[name] = F.normalize(state[name] + 1e-6, 1, 0)
        elif '.experts.0.' in name:
            stack = [state.pop(name.replace('.experts.0.', f'.experts.{expert}.')) for expert in range(R)]
            state[name.replace('.experts.0.', '.experts.')] = torch.stack(stack)
    plain = {name.replace('.dex.director.', '.mlp.'): value for name, value in state.items()}
    return state, replace(translate(plain, 0, 'imagenet')[1], experts=R)

if __name__ == '__main__':
    if not sys.argv[1:] or {'-h', '--help'} & {*sys.argv}:
        sys.exit(__doc__)
    theirs, ours = sys.argv[1:]
    file = torch.load(theirs, map_location='cpu', weights_only=True)
    state, config = convert(file.get('model', file))
    torch.save(dict(model=state, config=asdict(config)), ours)
    print(f'{ours}: {config}')
