"""What only a GPU can settle, compared with the CPU in float32 or with a loop; skipped elsewhere.

    pytest -m gpu       on a machine with a GPU, in minutes
"""
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model
import pretrain
from model import MAE
from tests.support import runs

DEVICE = 'cuda'
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'),
]

# --- Products by group ----------------------------------------------------------------------------

ROWS = {        # rows of each of four experts
    'even': (8, 8, 8, 8),
    'first without rows': (0, 17, 3, 12),
    'last without rows': (20, 5, 7, 0),     # two offsets are the number of rows
    'one with all rows': (0, 0, 32, 0),
}

def by_loop(x, weights, counts):
    """What grouped_mm computes, expert by expert in float32."""
    parts = [rows.float() @ weight.float() for rows, weight in zip(x.split(counts), weights)]
    return torch.cat(parts)

@pytest.mark.parametrize('counts', ROWS.values(), ids=ROWS)
def test_products_by_group_are_those_of_a_loop(counts):
    """Forward and backward in bfloat16; experts without rows have gradients of exactly 0."""
    x = torch.randn(32, 64, device=DEVICE).bfloat16().requires_grad_()
    weights = torch.randn(4, 48, 64, device=DEVICE).bfloat16().requires_grad_()
    upstream = torch.randn(32, 48, device=DEVICE).bfloat16()
    offsets = torch.tensor(np.cumsum(counts), dtype=torch.int32, device=DEVICE)
    y = F.grouped_mm(x, weights.mT, offs=offsets)
    found = torch.autograd.grad(y, (x, weights), upstream)
    expected_y = by_loop(x, weights.mT, counts)
    expected = torch.autograd.grad(expected_y, (x, weights), upstream.float())
    for value, other in zip((y, *found), (expected_y, *expected)):
        assert (value.float() - other.float()).norm() <= 0.01 * other.float().norm()
    for gradient, count in zip(found[1], counts):
        if not count:
            assert gradient.count_nonzero() == 0, 'see pytorch issue 172439'

def test_unused_experts_of_a_network_have_no_gradient():
    """The same through the layer of the network, under autocast."""
    torch.manual_seed(0)
    layer = model.StackedLinear(torch.nn.Linear(64, 48), 4).to(DEVICE)
    x, expert = torch.randn(6, 5, 64, device=DEVICE), torch.tensor([0, 0, 2, 2, 2, 2])
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x, expert.to(DEVICE))
    y.float().square().sum().backward()
    for parameter in (layer.weight, layer.bias):
        used = [bool(gradient.count_nonzero()) for gradient in parameter.grad]
        assert used == [True, False, True, False]

# --- A step ---------------------------------------------------------------------------------------

@pytest.fixture
def on_gpu(sources, tmp_path):
    """on_gpu(name, *words, **options): a tiny pretraining on the GPU -> its folder."""
    def run(name, *words, code=0, **options):
        options = dict(device=DEVICE) | options
        result = runs.program(
            'pretrain', *runs.pretrain_words(sources.folder, tmp_path / name, **options), *words)
        assert result.code == code, result.err
        return tmp_path / name
    return run

def test_a_steady_step_never_waits_for_the_gpu(on_gpu, at_batch):
    """The first steps compile, validate and fill the caches; every tenth looks at signals."""
    try:
        at_batch(11, lambda images: torch.cuda.set_sync_debug_mode('error'))
        at_batch(19, lambda images: torch.cuda.set_sync_debug_mode('default'))
        on_gpu('steady', steps=25, log_every=1000, val_every=1000)
    finally:
        torch.cuda.set_sync_debug_mode('default')

def test_thirty_steps_compile_two_graphs(on_gpu):
    """Noise, rate and momentum change at each step. Encoder and decoder have a graph each."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    on_gpu('compiled', steps=30)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2
    assert not torch._dynamo.utils.counters['graph_break']

def test_a_signal_is_seen_within_ten_steps_whatever_is_logged(on_gpu, signal_at):
    signal_at(12, signal.SIGTERM)
    out = on_gpu('stopped', steps=100, log_every=1000, val_every=1000, code=143)
    assert runs.weights(out / 'ckpt.pt', 'done') <= 22

def test_a_resumed_training_goes_on_with_the_same_numbers(on_gpu, signal_at):
    whole = on_gpu('whole', '--no-bf16', steps=12)
    signal_at(6, signal.SIGTERM)
    stopped = on_gpu('stopped', '--no-bf16', steps=12, code=143)
    assert len(runs.read_log(stopped)) < 12
    on_gpu('stopped', '--no-bf16', '--resume', steps=12)
    for entry, expected in zip(runs.read_log(stopped), runs.read_log(whole), strict=True):
        for name in ('step', 'l_self', 'align', 'balance', 'lr'):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5), (entry['step'], name)

# --- The same as on the CPU -----------------------------------------------------------------------

@pytest.fixture
def same_draws(monkeypatch):
    """Random numbers are drawn on the CPU, for every device."""
    rand = torch.rand

    def rand_on_cpu(*shape, device=None, **options):
        return rand(*shape, **options).to(device)

    monkeypatch.setattr(torch, 'rand', rand_on_cpu)

def on_both(function, *tensors):
    """What a function gives on the CPU and on the GPU, from the same draws."""
    results = []
    for device in ('cpu', DEVICE):
        torch.manual_seed(0)
        results.append(function(*[tensor.to(device) for tensor in tensors]))
    return results

def test_augmentation_is_that_of_the_cpu(same_draws):
    images = torch.randint(0, 256, (12, 3, 96, 96), dtype=torch.uint8)
    images[3] = 0       # drawn again and again
    expected, found = on_both(lambda images: data.augment(images, 64), images)
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=0)

def test_augmentation_of_masks_is_that_of_the_cpu(same_draws):
    """But for a few pixels that lie between two."""
    images = torch.randint(0, 256, (12, 3, 96, 96), dtype=torch.uint8)
    masks = torch.randint(0, 5, (12, 12, 12)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    expected, found = on_both(lambda *both: data.augment_labelled(*both, 64), images, masks)
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-3, rtol=0)
    assert (found[1].cpu() == expected[1]).float().mean() > 0.999

def test_a_network_in_float32_is_that_of_the_cpu():
    """Losses and gradients; the CPU's are compared with a naive version elsewhere."""
    network = MAE(runs.pretrain_config())
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    results = []
    for device in ('cpu', DEVICE):
        network = network.to(device)
        network.zero_grad()
        losses, routing, _, _ = network(images.to(device), 0.0, noise.to(device))
        (losses.mean() + routing.align.mean()).backward()
        gradients = [p.grad.cpu() for p in network.parameters() if p.requires_grad]
        results.append([losses.detach().cpu(), routing.weights.detach().cpu(), *gradients])
    for expected, found in zip(*results):
        assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-7

@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    """The folder of the demo's phantoms."""
    folder = tmp_path_factory.mktemp('phantoms')
    pretrain.run_program('phantoms', '--raw', folder / 'raw', '--out', folder / 'data')
    return folder / 'data'

def test_bfloat16_learns_as_float32_does(phantoms, tmp_path):
    """100 steps of the demo."""
    found = {}
    for precision in ('--bf16', '--no-bf16'):
        words = ['--demo', '--data', phantoms, '--out', tmp_path / precision, '--steps', 100,
                 '--val_every', 100, '--device', DEVICE, precision]
        result = runs.program('pretrain', *words)
        assert result.code == 0, result.err
        found[precision] = runs.read_log(tmp_path / precision)[-1]['val_l_self']
    assert found['--bf16'] == pytest.approx(found['--no-bf16'], abs=0.01)

# --- Pictures, and two processes ------------------------------------------------------------------

def test_validation_and_pictures_compute_as_the_training_does(on_gpu, monkeypatch):
    """float32 products by group would take a slow way on a GPU."""
    out, grouped_mm, kinds = on_gpu('run', steps=6), F.grouped_mm, []

    def watched(x, *others, **options):
        kinds.append(x.dtype)
        return grouped_mm(x, *others, **options)

    monkeypatch.setattr(model.F, 'grouped_mm', watched)
    result = runs.program('pictures', out, '--device', DEVICE)
    assert result.code == 0, result.err
    assert set(kinds) == {torch.bfloat16}
    assert {path.name for path in out.glob('*.png')} >= {'recon.png', 'experts.png'}

ONE_CARD = '''
import os
import pretrain
import torch.distributed as dist
join = dist.init_process_group
dist.init_process_group = lambda backend, device_id=None: join('gloo')
os.environ['LOCAL_RANK'] = '0'
'''

def test_two_processes_on_one_card_do_as_one_does(sources, tmp_path, on_gpu):
    """One accumulates the two halves of each batch. Without noise and balance, which differ."""
    options = dict(steps=8, sigma=0.0, balance=0.0, device=DEVICE)
    one = on_gpu('one', '--no-bf16', accumulate=2, **options)
    words = runs.pretrain_words(sources.folder, tmp_path / 'two', **options)
    process = runs.start('pretrain', *words, '--no-bf16', ranks=2,
                         before=runs.NO_PICTURES + ONE_CARD)
    result = runs.finish(process, timeout=300)
    assert result.code == 0, result.err
    pairs = zip(runs.read_log(tmp_path / 'two'), runs.read_log(one), strict=True)
    for entry, expected in pairs:
        for name in ('step', 'l_self', 'align', 'grad_norm', 'lr'):
            assert entry[name] == pytest.approx(expected[name], rel=1e-3), (entry['step'], name)

def test_two_compiled_processes_train_on_one_card(sources, tmp_path):
    words = runs.pretrain_words(sources.folder, tmp_path, steps=8, device=DEVICE)
    process = runs.start('pretrain', *words, ranks=2, before=runs.NO_PICTURES + ONE_CARD)
    result = runs.finish(process, timeout=300)
    assert result.code == 0, result.err
    assert len(runs.read_log(tmp_path)) == 8

# --- The bench ------------------------------------------------------------------------------------

def test_the_bench_measures_on_the_gpu(sources, tmp_path):
    words = runs.pretrain_words(sources.folder, tmp_path / 'out', device=DEVICE)
    result = runs.program('bench', 'run', *words)
    assert result.code == 0, result.err
    for name in ('images/s', 'peak memory', 'waits for the GPU', 'data'):
        assert name in result.out
