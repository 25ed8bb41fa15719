"""modularity.py: its estimators on features whose components are known, and what it refuses."""
import sys
from dataclasses import asdict

import modularity
import pytest
import torch

from model import MAE, Config

def test_shares_are_those_of_simulated_components():
    torch.manual_seed(0)
    M, I, C = 3, 40, 20000
    x = 2 * torch.randn(M, 1, C) + torch.randn(1, I, C) + 0.5 * torch.randn(M, I, C)
    whole = 4 + 1 + 0.25
    assert modularity.shares(x).tolist() == pytest.approx([4 / whole, 1 / whole, 0.25 / whole], abs=0.01)
    assert modularity.shares(torch.randn(M, I, C)).tolist() == pytest.approx([0, 0, 1], abs=0.01)

def test_retrieval_is_sure_of_the_same_body_and_at_chance_in_noise():
    torch.manual_seed(0)
    bodies = torch.randn(1, 40, 30)
    assert modularity.retrieval(5 * torch.randn(3, 1, 30) + bodies) == 1
    assert modularity.retrieval(torch.randn(3, 40, 30)) < 0.1

def test_one_network_does_not_take_the_place_of_another(tmp_path, monkeypatch, capsys):
    """Of one kind and seed, while another seed makes a row of two."""
    c = Config(size=32, patch=8, width=16, depth=1, heads=2, experts=0, decoder_width=8, decoder_depth=1, decoder_heads=2)
    files = [tmp_path / f'{name}.pt' for name in 'abc']
    for file, seed in zip(files, (0, 1, 0)):
        torch.save(dict(model=MAE(c).state_dict(), config=asdict(c), options=dict(seed=seed, co=0.1, steps=9)), file)
    monkeypatch.setattr(sys, 'argv', ['modularity.py', *map(str, files[:2]), '--bodies', '2'])
    modularity.main()
    assert '| masked autoencoder, 9 steps, 1 blocks at 32 pixels (2) | 1 |' in capsys.readouterr().out
    sys.argv[1:3] = map(str, files[1:] + files[:1])
    with pytest.raises(SystemExit, match='a.pt: another network of this kind and seed'):
        modularity.main()
