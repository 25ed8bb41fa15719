"""modularity.py: its estimators on features whose components are known."""
import modularity
import pytest
import torch

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
