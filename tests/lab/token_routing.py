"""Train with a choice of experts for each token instead of each image (the paper's Fig. 8).

    python -m tests.lab.token_routing pretrain --demo --out out/token
    python -m tests.lab.token_routing finetune --init out/token/ckpt.pt

The options are those of pretrain.py and finetune.py. Their checkpoints hold a mark, `by_token`, so
that no other program takes them for networks of images. Pictures are not drawn of such runs.
"""
import sys

import torch

import finetune
import model
import pretrain
from tests.lab import predict

class TokenDEX(model.DEX):
    """DEX that takes each token for an image of one token. Its Routing holds the means over the
    tokens of each image, which leaves the losses and the usage what they are."""
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('by_token', torch.tensor(True))

    def forward(self, x, sigma=None, with_director=False):
        """x (B, N, C) -> y (B, N, C) and, as of DEX.forward, a Routing (B, R) or None."""
        y, routing = super().forward(x.flatten(0, 1)[:, None], sigma, with_director)
        if routing is not None:
            align, *of_tokens = routing
            of_images = [table.unflatten(0, x.shape[:2]).mean(1) for table in of_tokens]
            routing = model.Routing(align, *of_images)
        return y.view_as(x), routing

def main():
    """Run a training whose networks are made of TokenDEX modules."""
    programs = dict(pretrain=pretrain, finetune=finetune)
    if len(sys.argv) < 2 or sys.argv[1] not in programs:
        sys.exit(__doc__)
    model.DEX = TokenDEX
    run_program = pretrain.run_program

    def run_unless_pictures(name, *words):
        if name == 'predict':       # another process would know nothing of TokenDEX
            predict.main([*map(str, words)])
        elif name != 'pictures':
            run_program(name, *words)

    pretrain.run_program = finetune.run_program = run_unless_pictures
    program = programs[sys.argv.pop(1)]
    program.main()

if __name__ == '__main__':
    main()
