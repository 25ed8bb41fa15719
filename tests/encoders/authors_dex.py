"""Convert a checkpoint of the authors' DEX into our format.

    python -m tests.encoders.authors_dex THEIRS.pth ours.pt
    python finetune.py --task fives --init ours.pt

The names are those of the code that they released; no such file was published when this was
written. Their gate is a softmax of logits / 0.5, which equals twice the gate's weight here. Their
noise is added before that division, so pretrain further with --sigma 2 to do as they do.
"""
import argparse
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from pretrain import save
from tests.encoders.published import read_config, read_file, strip_prefixes

RENAMES = {     # regular expressions of their names in a block, and our names
    r'DEX\.router\.linear\.weight$': 'dex.gate.weight',
    r'DEX\.(router\.)?expert_activation_count$': 'dex.usage',
    r'DEX\.(director|experts)\.': r'dex.\1.',
}

def stack_experts(state, name, R):
    """Replace the parameter `name` of expert 0, and those of the others, by one of all (R, ...)."""
    parts = [state.pop(name.replace('.experts.0.', f'.experts.{expert}.')) for expert in range(R)]
    state[name.replace('.experts.0.', '.experts.')] = torch.stack(parts)

def convert(state):
    """Their state dict as (state dict in our names, Config)."""
    state = strip_prefixes(state)
    for theirs, ours in RENAMES.items():
        state = {re.sub(theirs, ours, name): value for name, value in state.items()}
    R = len(state['blocks.0.dex.gate.weight'])
    for name in list(state):
        if name.endswith('.dex.gate.weight'):
            state[name] = 2 * state[name]
        elif name.endswith('.dex.usage'):
            state[name] = F.normalize(state[name] + 1e-6, p=1, dim=0)       # counts, as shares
        elif '.experts.0.' in name:
            stack_experts(state, name, R)
    plain = {name.replace('.dex.director.', '.mlp.'): value for name, value in state.items()}
    return state, replace(read_config(plain), experts=R)

def main():
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     prog='python -m tests.encoders.authors_dex',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('theirs', help='the checkpoint as their code wrote it')
    parser.add_argument('ours', help='the file to write')
    o = parser.parse_args()
    if Path(o.ours).exists():
        raise SystemExit(f'{o.ours}: exists already; delete it, or choose another name')
    _, published = read_file(o.theirs)
    try:
        state, config = convert(published)
    except KeyError as error:
        raise SystemExit(f"{o.theirs}: has no {error}, so it is no checkpoint of the authors' DEX")
    save(Path(o.ours), dict(model=state, config=asdict(config)))
    print(f'{o.ours}: written; {config}')

if __name__ == '__main__':
    main()
