"""The Director-Experts module: gate, experts, director, GEMA, noise and the losses of Eq. 8."""
import math

import pytest
import torch

from model import MAE, MLP, Experts, Linear, StackedLinear, ViT, layer_losses
from tests.support import naive, networks
from tests.support.runs import ends

def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)

# ----------------------------------------------------------------------------------------
# The gate and the experts

every_routing = pytest.mark.parametrize('routing', ['image', 'token'])
every_number = pytest.mark.parametrize('top_k', [1, 2, 4])      # of four experts

@every_routing
@every_number
def test_a_dex_module_equals_a_loop_over_images_and_experts(top_k, routing):
    """Output (Eq. 2 and 5), alignment loss (Eq. 3 and 15), scores, choice and weights."""
    dex, x = networks.dex(top_k, routing), torch.randn(5, 3, 8)
    y, ours = dex(x, with_director=True)
    expected, decisions = naive.dex(dex, x)
    close(y, expected)
    for value, theirs in zip(ours, decisions, strict=True):
        close(value, theirs)
    activated = ours[2]
    assert (activated.sum(1) == top_k).all()

@every_routing
@every_number
def test_gradients_of_a_dex_module_are_those_of_the_loop(top_k, routing):
    dex, x = networks.dex(top_k, routing), torch.randn(5, 3, 8, requires_grad=True)
    inputs = [x, *(p for p in dex.parameters() if p.requires_grad)]
    assert len(inputs) == 6     # the gate's weights, and weights and biases of the experts' layers
    direction = torch.randn(5, 3, 8)
    found = []
    for y, (alignment, scores, _, _) in (dex(x, with_director=True), naive.dex(dex, x)):
        loss = (y * direction).sum() + 3 * alignment + (scores * torch.arange(4)).sum()
        found.append(torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(*found):
        close(ours, theirs)

@every_routing
def test_inference_gives_the_output_of_training_without_noise(routing):
    dex, x = networks.dex(routing=routing), torch.randn(5, 3, 8)
    y, nothing = dex(x)
    assert nothing is None and torch.equal(y, dex(x, with_director=True)[0])

def test_all_experts_activated_are_the_dense_weighted_sum():
    dex, x = networks.dex(top_k=4), torch.randn(5, 3, 8)
    shares = (x[:, 0] @ dex.gate.weight.T).softmax(1)
    dense = sum(shares[:, r, None, None] * naive.expert(dex.experts, r, x) for r in range(4))
    close(dex(x)[0], dense)

def test_the_class_token_alone_chooses_an_images_experts():
    dex, x = networks.dex(), torch.randn(20, 3, 8)
    others = torch.cat([x[:, :1], torch.randn(20, 2, 8)], 1)
    one, other = [dex(images, with_director=True)[1][1:] for images in (x, others)]
    for ours, theirs in zip(one, other):
        assert torch.equal(ours, theirs)

@pytest.mark.parametrize('top_k, learns', [(1, False), (2, True)])
def test_one_activated_expert_gives_the_gate_no_task_gradient(top_k, learns):
    """Its weight is 1 whatever the gate says; with two, the gate learns from the task."""
    dex = networks.dex(top_k)
    y, _ = dex(torch.randn(6, 3, 8), with_director=True)
    y.square().sum().backward()
    assert bool(dex.gate.weight.grad.abs().max() > 1e-4) == learns

def test_an_expert_without_images_has_a_gradient_of_zero():
    dex, x = networks.dex(), torch.rand(5, 3, 8)
    with torch.no_grad():
        dex.gate.weight[3] = -9
    y, (alignment, _, activated, _) = dex(x, with_director=True)
    (y.square().mean() + alignment).backward()
    assert activated[:, 3].sum() == 0
    for parameter in dex.experts.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad[3].abs().max() == 0
        assert parameter.grad[:3].abs().max() > 0

@pytest.mark.parametrize('dtype, error', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_stacked_experts_equal_a_loop_over_rows(dtype, error):
    """Output and gradients, also where an expert (number 2) has no rows, and under autocast."""
    experts = networks.shake(Experts(MLP(networks.config()), 4))
    expert = torch.tensor([0, 0, 0, 1, 3, 3])
    x, direction = torch.randn(6, 5, 16, requires_grad=True), torch.randn(6, 5, 16)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = experts(x, expert)
    loop = torch.stack([naive.expert(experts, r, row) for row, r in zip(x, expert)])
    assert ours.dtype == dtype
    found = []
    for y in (ours.float(), loop):
        gradients = torch.autograd.grad((y * direction).sum(), [x, *experts.parameters()])
        found.append([y, *gradients])
    for value, theirs in zip(*found):
        assert (value - theirs).norm() < error * theirs.norm()

@pytest.mark.parametrize('name, value', [
    ('top_k', 0), ('top_k', -1), ('top_k', 9)])
def test_an_impossible_choice_of_experts_is_refused(name, value):
    """Of eight experts."""
    with pytest.raises(SystemExit) as error:
        networks.config(**{name: value})
    ends(error, naming=[name, value])

# ----------------------------------------------------------------------------------------
# The start

@pytest.mark.parametrize('kind', [ViT, MAE])
def test_experts_start_as_copies_of_the_director(kind):
    model = kind(networks.config(experts=3))
    for block in model.blocks:
        for name, director in block.dex.director.named_parameters():
            experts = block.dex.experts.get_parameter(name)
            assert len(experts) == 3
            assert all(torch.equal(expert, director) for expert in experts), name

def test_a_new_dex_module_gives_what_its_director_gives():
    dex, x = ViT(networks.config(experts=3)).blocks[0].dex, torch.randn(4, 5, 16)
    y, (alignment, _, _, _) = dex(x, with_director=True)
    close(y, dex.director(x))
    assert alignment.abs() < 1e-6

def test_a_new_dex_module_has_random_weights_and_biases_of_zero():
    dex = ViT(networks.config(experts=3)).blocks[0].dex
    for name, value in dex.director.named_parameters():
        assert (value.std() > 0) == name.endswith('weight'), name
    assert not torch.equal(dex.gate.weight[0], dex.gate.weight[1])

# ----------------------------------------------------------------------------------------
# Noise

def test_noise_favours_seldom_used_experts_as_in_equation_21():
    """The gate says 0 for all. So the logs of two scores differ by sigma times the difference of
    their noises and usages, which is normal; 40,000 draws tell its mean and deviation."""
    dex, sigma = networks.dex(), 0.5
    dex.usage.copy_(torch.tensor([6.0, 2.0, 1.5, 0.5]))     # shares of 0.6, 0.2, 0.15, 0.05
    _, (_, scores, _, _) = dex(torch.zeros(40_000, 1, 8), torch.tensor(sigma), True)
    logs = scores.log()
    difference = logs[:, 1:] - logs[:, :1]
    mean = sigma * torch.tensor([0.4, 0.45, 0.55])
    deviation = sigma * torch.full((3,), 2.0).sqrt()
    error = 5 * deviation[0].item() / 200
    torch.testing.assert_close(difference.mean(0), mean, atol=error, rtol=0)
    torch.testing.assert_close(difference.std(0), deviation, atol=error, rtol=0)

def test_a_noise_level_of_zero_is_no_noise():
    dex = networks.dex()
    dex.usage.copy_(torch.tensor([6.0, 2.0, 1.5, 0.5]))
    _, (_, scores, _, _) = dex(torch.zeros(6, 2, 8), with_director=True)
    assert torch.equal(scores, torch.full((6, 4), 0.25))

# ----------------------------------------------------------------------------------------
# Losses

def random_decisions(layers=3, images=5, experts=4):
    """Alignment losses (L,), scores and activated experts (L, B, R)."""
    scores = torch.rand(layers, images, experts).softmax(-1).requires_grad_()
    return torch.rand(layers), scores, (torch.rand_like(scores) < 0.5).float()

def test_layer_losses_are_equations_8_and_18():
    alignment, scores, activated = random_decisions()
    ours = layer_losses(alignment, scores.mean(1), activated.mean(1))
    for value, theirs in zip(ours, naive.layer_losses(alignment, scores, activated), strict=True):
        close(value, theirs)

def test_the_balance_loss_pushes_down_the_scores_of_experts_that_are_often_activated():
    alignment, scores, activated = random_decisions()
    _, balance = layer_losses(alignment, scores.mean(1), activated.mean(1))
    gradient, = torch.autograd.grad(balance, scores)
    L, B, R = scores.shape
    frequency = activated.mean(1, keepdim=True)
    close(gradient, (R * frequency / B / L).expand(L, B, R))

@pytest.mark.parametrize('top_k', [1, 2])
def test_the_balance_loss_of_experts_in_equal_use_is_their_activated_number(top_k):
    scores, load = torch.full((3, 8), 1 / 8), torch.full((3, 8), top_k / 8)
    _, balance = layer_losses(torch.zeros(3), scores, load)
    assert balance.item() == pytest.approx(top_k)

# ----------------------------------------------------------------------------------------
# The director

def test_the_director_gets_no_gradient():
    model = MAE(networks.config(experts=3))
    losses, (alignment, scores, _, _), _, _ = model(torch.randn(4, 3, 16, 16))
    (losses.mean() + alignment.sum() + scores.square().sum()).backward()
    for name, parameter in model.named_parameters():
        of_director = '.director.' in name
        assert parameter.requires_grad == (not of_director), name
        assert (parameter.grad is None) == of_director, name

def test_gema_moves_the_director_to_the_experts_average_and_the_usage_to_the_batchs():
    """Equations 7 and 20; the experts stay where they are."""
    dex = networks.dex()
    dex.usage.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    _, (_, _, _, weights) = dex(torch.randn(6, 3, 8), with_director=True)
    usage = naive.usage_of(weights.detach())
    expected = naive.gema(dex, usage, 0.7)
    experts = {name: value.clone() for name, value in dex.experts.named_parameters()}
    dex.gema(usage, 0.7, torch.tensor(True))
    close(dex.usage, expected.pop('usage'))
    directors = dict(dex.director.named_parameters())
    assert directors.keys() == expected.keys()
    for name, value in directors.items():
        close(value, expected[name])
        assert torch.equal(dex.experts.get_parameter(name), experts[name])

@pytest.mark.parametrize('usage', [[math.nan] * 4, [math.inf, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]])
def test_gema_after_a_step_that_is_not_finite_changes_no_bit(usage):
    dex = networks.dex()
    before = {name: value.clone() for name, value in dex.state_dict().items()}
    dex.gema(torch.tensor(usage), 0.5, torch.tensor(False))
    for name, value in dex.state_dict().items():
        assert torch.equal(value, before[name]), name

# ----------------------------------------------------------------------------------------
# Precision and repeatability

def test_autocast_in_bfloat16_keeps_every_choice_and_is_within_its_error():
    dex, x = networks.dex(), torch.randn(4000, 1, 8)
    y, (_, _, *choice) = dex(x, with_director=True)
    with torch.autocast('cpu', torch.bfloat16):
        low, (_, _, *low_choice) = dex(x, with_director=True)
        assert dex.director(x).dtype == torch.bfloat16
    for value, theirs in zip(low_choice, choice, strict=True):      # activated, weights
        assert torch.equal(value, theirs)
    assert 1e-5 < (low - y).norm() / y.norm() < 0.01

def test_gradients_of_biases_add_up_in_float32():
    """2001 has more digits than bfloat16; added up there one by one, ones would end at 256."""
    layer = StackedLinear(Linear(8, 8), 2)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(torch.randn(4002, 1, 8), torch.arange(4002) // 2001)
    y.float().sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((2, 8), 2001.0))

@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)

def test_two_threads_give_the_same_gradients_every_time(two_threads):
    """Both add to the same bias, of one expert that has all rows, enough for two threads."""
    layer, expert = StackedLinear(Linear(8, 768), 2), torch.zeros(128, dtype=torch.long)
    x, direction = torch.randn(128, 5, 8), torch.randn(128, 5, 768)
    gradients = []
    for _ in range(20):
        gradients += torch.autograd.grad(layer(x, expert), layer.bias, direction)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)

def backward_pass(output):
    """All nodes of the graph that leads from an output back to its parameters."""
    nodes = [output.grad_fn]
    for node in nodes:
        for parent, _ in node.next_functions:
            if parent is not None and parent not in nodes:
                nodes.append(parent)
    return nodes

def test_no_gradient_passes_through_an_index():
    """The gradient of tensor[index] adds up in the order in which threads arrive; that of
    index_select and gather does not."""
    model = MAE(networks.config(experts=3))
    losses, (alignment, scores, activated, _), _, _ = model(torch.randn(4, 3, 16, 16))
    align, balance = layer_losses(alignment, scores.mean(1), activated.mean(1))
    nodes = backward_pass(losses.mean() + align + balance)
    reached = {node.variable for node in nodes if hasattr(node, 'variable')}
    assert reached == {p for p in model.parameters() if p.requires_grad}
    indexed = backward_pass(model.cls_token[torch.tensor([0])].sum())
    assert 'IndexBackward0' in {node.name() for node in indexed}
    assert 'IndexBackward0' not in {node.name() for node in nodes}
