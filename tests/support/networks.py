"""Tiny networks in which every parameter has a value of its own."""
import torch

from model import DEX, Config, ViT
from tests.lab.token_routing import TokenDEX

TINY = dict(size=16, patch=4, width=16, depth=3, heads=2,
            decoder_width=8, decoder_depth=2, decoder_heads=2)

def config(**changes):
    """A Config of three blocks of width 16 on images of 16 patches."""
    return Config(**{**TINY, **changes})

def shake(module, scale=0.3):
    """Draw all parameters anew, also those that start as zeros, ones or copies of each other."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module

def network(kind=ViT, seed=1, **changes):
    """A ViT or MAE; another seed gives other weights."""
    torch.manual_seed(seed)
    return shake(kind(config(**changes)))

def dex(top_k=2, routing='image', experts=4):
    """A DEX module of width 8."""
    module = TokenDEX if routing == 'token' else DEX
    return shake(module(config(width=8, experts=experts, top_k=top_k)))
