"""How fast it is: counted operations, compiled blocks, the bench, and steps that never wait for a
GPU. No test measures time."""
import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
import pretrain
from model import MAE, Config, ViT, layer_losses
from tests.support import runs

bench = runs.module('bench')
flops = bench.flops
MODEL = runs.pretrain_config()

def backward(network, images, *noise):
    """A forward and a backward pass through all losses -> the images' losses."""
    losses, routing, _, _ = network(images, *noise)
    loss = losses.mean()
    if network.config.experts:
        align, scores, activated, _ = routing
        loss = loss + sum(layer_losses(align, scores.mean(1), activated.mean(1)))
    loss.backward()
    return losses.detach()

# --- Operations -----------------------------------------------------------------------------------

@pytest.mark.parametrize('change', [
    dict(experts=0),
    dict(top_k=1),
    dict(top_k=3),
    dict(mask_ratio=0.5),
], ids=str)
def test_counted_operations_are_those_that_torch_counts(change, monkeypatch):
    """It counts no grouped_mm, so a loop replaces it here, and only the plain form of attention."""
    called = []

    def loop(x, weights, offs):
        called.append(len(weights))
        groups = x.tensor_split(offs[:-1].tolist())
        return torch.cat([rows @ weight for rows, weight in zip(groups, weights)])

    monkeypatch.setattr(model.F, 'grouped_mm', loop)
    network = MAE(replace(MODEL, **change))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backward(network, torch.randn(6, 3, 32, 32))
    assert counter.get_total_flops() == 6 * flops(network.config)
    assert bool(called) == bool(network.config.experts)

def test_tuning_costs_what_torch_counts(monkeypatch):
    """Of a whole image's blocks: without the patches' embedding and the gates."""
    def loop(x, weights, offs):
        groups = x.tensor_split(offs[:-1].tolist())
        return torch.cat([rows @ weight for rows, weight in zip(groups, weights)])

    monkeypatch.setattr(model.F, 'grouped_mm', loop)
    counted, patches = {}, (MODEL.size // MODEL.patch) ** 2
    for experts in (0, MODEL.experts):
        network = ViT(replace(MODEL, experts=experts))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network(torch.randn(1, 3, MODEL.size, MODEL.size))
        embedding = 2 * patches * 3 * MODEL.patch ** 2 * MODEL.width
        gates = 2 * MODEL.depth * MODEL.width * experts
        counted[experts] = counter.get_total_flops() - embedding - gates
    ours = bench.tuning_cost(MODEL)
    assert ours == pytest.approx(counted[MODEL.experts] / counted[0])
    assert bench.tuning_cost(Config()) == pytest.approx(1.63, abs=0.005)

@pytest.mark.parametrize('config, gigaflops', [
    pytest.param(Config(experts=0), 77.0, id='masked autoencoder'),
    pytest.param(Config(), 106.5, id='DEX'),
])
def test_operations_of_the_base_network(config, gigaflops):
    assert flops(config) == pytest.approx(gigaflops * 1e9, rel=1e-3)

# --- Compiled blocks ------------------------------------------------------------------------------

VARIANTS = [dict(), dict(experts=0)]

@pytest.fixture
def compiling(monkeypatch):
    """torch.compile without generating code, which would take long: its calls; fresh counters."""
    compile, calls = torch.compile, []

    def compile_fast(function, **options):
        calls.append(function)
        return compile(function, **options, backend='aot_eager')

    monkeypatch.setattr(torch, 'compile', compile_fast)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield calls
    torch._dynamo.reset()

def compiled_copy(network, calls):
    twin = copy.deepcopy(network)
    pretrain.compile_blocks(twin)
    assert len(calls) == len(network.blocks) + len(network.decoder_blocks)
    return twin

def bf16_backward(network):
    """Losses, and gradients by name, of four images under bfloat16 autocast, with all noise."""
    torch.manual_seed(1)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    with torch.autocast('cpu', torch.bfloat16):
        losses = backward(network, images, torch.full((), 0.5), noise)
    trained = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return trained | dict(losses=losses)

@pytest.mark.slow
@pytest.mark.parametrize('change', VARIANTS, ids=str)
def test_compiled_blocks_have_the_same_results_and_gradients(change, compiling):
    network = MAE(replace(MODEL, **change))
    twin = compiled_copy(network, compiling)
    plain, compiled = bf16_backward(network), bf16_backward(twin)
    assert plain.keys() == compiled.keys()
    for name, expected in plain.items():
        assert expected.norm() > 0, name
        assert (compiled[name] - expected).norm() <= 0.01 * expected.norm(), name

@pytest.mark.slow
@pytest.mark.parametrize('change', VARIANTS, ids=str)
def test_one_graph_serves_all_blocks_of_the_encoder_and_one_those_of_the_decoder(change, compiling):
    bf16_backward(compiled_copy(MAE(replace(MODEL, **change)), compiling))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2

@pytest.mark.slow
@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('change', VARIANTS, ids=str)
def test_gradients_of_later_blocks_are_there_before_the_first_block_computes_its_own(
        change, compiled, compiling):
    """So DDP can send them meanwhile. The blocks of the decoder are numbers 2 and 3."""
    network, order = MAE(replace(MODEL, **change)), []
    if compiled:
        network = compiled_copy(network, compiling)
    for number, block in enumerate([*network.blocks, *network.decoder_blocks]):
        def gradient_is_there(_, number=number):
            order.append(number)
        block.norm1.weight.register_post_accumulate_grad_hook(gradient_is_there)

    def watch(block, inputs, outputs):
        outputs[0].register_hook(lambda _: order.append('first block begins'))

    network.blocks[0].register_forward_hook(watch)
    bf16_backward(network)
    assert order == [3, 2, 1, 'first block begins', 0]

# --- The bench ------------------------------------------------------------------------------------

def test_the_bench_prints_speed_and_phases_of_both_networks(sources, tmp_path, capsys):
    """And when it is done, trainings log and show their bars as before."""
    before, backward = dict(vars(pretrain)), torch.Tensor.backward
    bench.real_steps(runs.pretrain_words(sources.folder, tmp_path / 'out'), warm=2, count=4)
    screen = capsys.readouterr().out.split('1 x CPU, float32')[1]
    table = {}
    for line in screen.splitlines()[2:]:
        name, *values = re.split('  +', line.strip())
        table[name] = values
    work = [f'{flops(config) / 1e9:.1f}' for config in (MODEL, replace(MODEL, experts=0))]
    assert table['GFLOP an image'] == work
    assert 'MFU' not in table       # a CPU's peak is not known, and not guessed
    step, *phases = [np.array(table[name], float) for name in (
        'a step, ms', 'data', 'forward', 'backward', 'optimizer', 'GEMA')]
    assert np.all(sum(phases) < 1.5 * step) and phases[-1][0] > 0 == phases[-1][1]
    assert float(table['peak memory, GB'][0]) > float(table['the same, computed'][0]) > 0
    assert 'efficiency' in screen.splitlines()[-1]
    assert not (tmp_path / 'out').exists()
    assert vars(pretrain) == before and torch.Tensor.backward is backward

def test_the_bench_gives_each_phase_the_time_since_the_mark_before():
    marks = [('start', 10.0), ('data', 11.0), ('forward', 13.0), ('backward', 16.0),
             ('forward', 20.0), ('GEMA', 20.5)]
    assert bench.spent(marks) == dict(data=1.0, forward=2.0 + 4.0, backward=3.0, GEMA=0.5)

@pytest.mark.slow
def test_the_bench_times_both_gates(capsys, monkeypatch):
    """The gate of an image costs what that of a token does, and an image of 32 pixels has 17."""
    monkeypatch.setattr(bench, 'GATES', ((32, 2), (64, 1)))
    bench.gates(MODEL)
    pattern = r'(\w+)-wise.* (\d+) images of (\d+) pixels: ([0-9.]+) MFLOP'
    gates = [re.search(pattern, line).groups() for line in capsys.readouterr().out.splitlines()]
    assert [gate[:3] for gate in gates] == [('image', '2', '32'), ('token', '2', '32'),
                                            ('image', '1', '64'), ('token', '1', '64')]
    image, token = (float(gate[3]) for gate in gates[:2])
    assert token == pytest.approx(17 * image, rel=0.1)

def test_our_step_in_the_bench_is_that_of_the_obvious_implementation():
    """Losses of three steps and the directors after them, with a list of experts and a loop."""
    torch.manual_seed(0)
    ours = MAE(MODEL)
    obvious = copy.deepcopy(ours)
    for block in obvious.blocks:
        block.dex = bench.ObviousDEX(block.dex)
    images, losses = torch.randn(4, 3, 32, 32), {}
    for network in (ours, obvious):
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, fused=network is ours or None)
        losses[network] = []
        for seed in range(3):
            loss, *_ = bench.step(network, trained, optimizer, images, seed, network is ours, False)
            losses[network].append(loss)
    assert losses[ours] == pytest.approx(losses[obvious], rel=1e-4)
    for block, twin in zip(ours.blocks, obvious.blocks):
        for value, expected in zip(block.dex.director.parameters(), twin.dex.director.parameters()):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
