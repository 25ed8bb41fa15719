"""model.py against the paper's equations, written again as plain loops."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from model import DEX, MAE, MLP, Config, Experts, Linear, Routing, StackedLinear, ViT, layer_losses, load_weights
from model import read_checkpoint, resize_positions, sincos_positions

TINY = dict(size=16, patch=4, width=16, depth=3, heads=2, decoder_width=8, decoder_depth=2, decoder_heads=2)

def shake(module, scale=0.3):
    """Give every parameter, also those that start as zeros, ones or copies, a value of its own."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module

def make_dex(top_k=2, routing='image', experts=4):
    torch.manual_seed(top_k)
    return shake(DEX(Config(**dict(TINY, width=8), experts=experts, top_k=top_k, routing=routing)))

def gelu(x):
    return x * (1 + torch.erf(x / 2 ** 0.5)) / 2

def naive_expert(experts, r, f):
    return gelu(f @ experts.fc1.weight[r].T + experts.fc1.bias[r]) @ experts.fc2.weight[r].T + experts.fc2.bias[r]

def naive_dex(dex, x):
    """Sec. 3.2 and 3.3, one image (or token) and one expert at a time, without noise."""
    outputs, co, scores, chosen, weights = [], [], [], [], []
    director = dex.director
    for f in x if dex.routing == 'image' else x.flatten(0, 1)[:, None]:
        s = torch.softmax(f[0] @ dex.gate.weight.T, 0)
        best = sorted(range(len(s)), key=lambda r: -s[r].item())[:dex.top_k]
        omega = [s[r] / sum(s[k] for k in best) if r in best else s[r] * 0 for r in range(len(s))]
        y = sum(omega[r] * naive_expert(dex.experts, r, f) for r in best)                              # Eq. 5
        target = (gelu(f @ director.fc1.weight.T + director.fc1.bias) @ director.fc2.weight.T + director.fc2.bias).detach()
        co += [1 - (a @ b) / (a.norm() * b.norm()) for a, b in zip(y, target)]
        outputs.append(y)
        scores.append(s)
        chosen.append(torch.tensor([float(r in best) for r in range(len(s))]))
        weights.append(torch.stack(omega))
    return torch.cat(outputs).view_as(x), Routing(torch.stack(co).mean(), *map(torch.stack, (scores, chosen, weights)))

@pytest.mark.parametrize('routing', ['image', 'token'])
@pytest.mark.parametrize('top_k', [1, 2, 4])        # 4 of 4: the dense weighted sum
def test_dex_equals_loops_over_images_and_experts(top_k, routing):
    dex = make_dex(top_k, routing)
    x = torch.randn(5, 3, 8, requires_grad=True)
    coefficients = torch.randn(5, 3, 8)
    inputs = [x, *(p for p in dex.parameters() if p.requires_grad)]
    results = []
    for y, routing in (dex(x, 0.0), naive_dex(dex, x)):
        loss = (y * coefficients).sum() + 3 * routing.co + (routing.scores * torch.arange(4)).sum()
        results.append([y, *routing, *torch.autograd.grad(loss, inputs)])
    assert len(inputs) == 6 and results[0][3].sum() == top_k * len(results[0][3])
    for ours, naive in zip(*results):
        torch.testing.assert_close(ours, naive, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(dex(x)[0], results[1][0], atol=2e-5, rtol=2e-5)        # inference: the same without Routing

@pytest.mark.parametrize('top_k, learns', [(1, False), (2, True)])
def test_one_activated_expert_gives_the_gate_no_task_gradient(top_k, learns):
    dex = make_dex(top_k)
    dex(torch.randn(6, 3, 8), 0.0)[0].square().sum().backward()
    assert bool(dex.gate.weight.grad.abs().max() > 1e-4) == learns

def test_bf16_autocast_keeps_every_choice_and_is_within_its_error():
    dex, x = make_dex(), torch.randn(4000, 1, 8)
    y, routing = dex(x, 0.0)
    with torch.autocast('cpu', torch.bfloat16):
        low, low_routing = dex(x, 0.0)
        assert dex.director(x).dtype == torch.bfloat16
    assert torch.equal(low_routing.chosen, routing.chosen) and torch.equal(low_routing.weights, routing.weights)
    assert 1e-5 < (low - y).norm() / y.norm() < 0.01

def test_the_gradients_of_biases_add_up_in_float32():
    layer = StackedLinear(Linear(8, 8), 2)
    with torch.autocast('cpu', torch.bfloat16):     # in which a sum of ones would end at 256
        layer(torch.randn(4000, 1, 8), torch.arange(4000) // 2000).float().sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((2, 8), 2000.0))

def test_two_threads_on_a_busy_machine_give_the_same_gradients_every_time():
    layer, expert = StackedLinear(Linear(8, 768), 8), torch.arange(64) // 8     # of bias[expert] some might differ
    x, gradient = torch.randn(64, 5, 8), torch.randn(64, 5, 768)
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(2)]
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad(layer(x, expert), layer.bias, gradient)[0] for _ in range(50)]
    finally:
        torch.set_num_threads(1)
        for process in busy:
            process.kill()
            process.wait()
    assert all(torch.equal(other, found[0]) for other in found)

def test_no_gradient_passes_through_an_index():
    """tensor[index] adds gradients up in the order in which threads arrive; index_select and gather do not."""
    losses, routing, _, _ = MAE(Config(**TINY, experts=3))(torch.randn(4, 3, 16, 16))
    co, balance = layer_losses(routing.co, routing.scores.mean(1), routing.chosen.mean(1))
    nodes, names = [(losses.mean() + co + balance).grad_fn], set()
    for node in nodes:
        names.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent and parent not in nodes]
    assert 'IndexBackward0' not in names and {'IndexSelectBackward0', 'GatherBackward0', 'AccumulateGrad'} & names

@pytest.mark.parametrize('dtype, error', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_stacked_experts_equal_a_loop_over_rows(dtype, error):
    torch.manual_seed(0)
    experts = shake(Experts(MLP(Config(**TINY)), 4))
    expert = torch.tensor([0, 0, 0, 1, 3, 3])       # expert 2 has nothing to do
    x = torch.randn(6, 5, 16, dtype=experts.fc1.weight.dtype, requires_grad=True)
    coefficients, inputs = torch.randn(6, 5, 16), [x, *experts.parameters()]

    def naive(row, r):
        return F.linear(F.gelu(F.linear(row, experts.fc1.weight[r], experts.fc1.bias[r])), experts.fc2.weight[r], experts.fc2.bias[r])

    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = experts(x, expert)
    assert ours.dtype == dtype
    ours, loop = ours.to(x.dtype), torch.stack([naive(row, r) for row, r in zip(x, expert)])
    assert (ours - loop).norm() < error * loop.norm()
    for a, b in zip(*(torch.autograd.grad((y * coefficients).sum(), inputs) for y in (ours, loop))):
        assert (a - b).norm() < error * b.norm()

def test_an_expert_without_images_has_a_gradient_of_zero():
    dex = make_dex()
    with torch.no_grad():
        dex.gate.weight[3] = -9
    x = torch.rand(5, 3, 8)
    y, routing = dex(x, 0.0)
    (y.square().mean() + routing.co).backward()
    assert routing.chosen[:, 3].sum() == 0
    for parameter in dex.experts.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad[3].abs().max() == 0 and parameter.grad[:3].abs().max() > 0

def test_noise_favours_seldom_used_experts_as_in_equation_21():
    dex, sigma = make_dex(routing='token'), 0.5
    dex.usage.copy_(torch.tensor([6.0, 2.0, 1.5, 0.5]))        # normalised: 0.6, 0.2, 0.15, 0.05
    logs = dex(torch.zeros(200, 200, 8), torch.tensor(sigma))[1].scores.log()       # the gate says 0 for all
    difference = logs[:, 1:] - logs[:, :1]      # sigma * (eps_r - eps_0 + delta_r - delta_0)
    shift = sigma * torch.tensor([0.4, 0.45, 0.55])
    error = sigma * 2 ** 0.5 / 200      # of a mean of 40000 draws
    torch.testing.assert_close(difference.mean(0), shift, atol=5 * error, rtol=0)
    torch.testing.assert_close(difference.std(0), torch.full((3,), sigma * 2 ** 0.5), atol=5 * error, rtol=0)
    assert torch.equal(dex(torch.zeros(3, 2, 8), 0.0)[1].scores, torch.full((6, 4), 0.25))

@pytest.mark.parametrize('kind', [ViT, MAE])
def test_experts_start_as_copies_of_the_director(kind):
    torch.manual_seed(0)
    model = kind(Config(**TINY, experts=3))
    for block in model.blocks:
        for name, director in block.dex.director.named_parameters():
            experts = block.dex.experts.get_parameter(name)
            assert experts.shape[0] == 3 and all(torch.equal(expert, director) for expert in experts)
            assert (director.abs().max() > 0) == name.endswith('weight')
    x = torch.randn(4, 5, 16)
    y, routing = model.blocks[0].dex(x, 0.0)
    torch.testing.assert_close(y, model.blocks[0].dex.director(x))
    assert routing.co.abs() < 1e-6
    assert not torch.equal(model.blocks[0].dex.gate.weight[0], model.blocks[0].dex.gate.weight[1])

def test_layer_losses_are_equations_8_and_18():
    torch.manual_seed(0)
    L, B, R = 3, 5, 4
    scores, chosen = torch.rand(L, B, R).softmax(-1).requires_grad_(), (torch.rand(L, B, R) < 0.5).float()
    co = torch.rand(L)
    aligned, balance = layer_losses(co, scores.mean(1), chosen.mean(1))
    naive_co = sum(co[i - 1].item() / (L - (i - 1)) for i in (1, 2, 3)) / L
    naive_balance = 0
    for i in range(L):
        for r in range(R):
            naive_balance += R / L * sum(scores[i, :, r].tolist()) / B * sum(chosen[i, :, r].tolist()) / B
    assert aligned.item() == pytest.approx(naive_co, rel=1e-5) and balance.item() == pytest.approx(naive_balance, rel=1e-5)
    gradient, = torch.autograd.grad(balance, scores)
    torch.testing.assert_close(gradient[1, 0], R * chosen[1].mean(0) / B / L)

def test_gema_is_equations_7_and_20():
    dex = make_dex()
    dex.usage.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    omega = dex(torch.randn(6, 3, 8), 0.0)[1].weights
    usage = omega.detach().sum(0) / omega.detach().sum()        # Eq. 6 and 19
    before = {name: p.clone() for name, p in dex.director.named_parameters()}
    experts = {name: p.clone() for name, p in dex.experts.named_parameters()}
    dex.gema(usage, 0.7, torch.tensor(True))
    for name, new in dex.director.named_parameters():
        average = sum(usage[r] * experts[name][r] for r in range(4))
        torch.testing.assert_close(new, 0.7 * before[name] + 0.3 * average)
        assert torch.equal(dex.experts.get_parameter(name), experts[name])
    torch.testing.assert_close(dex.usage, 0.99 * torch.tensor([0.1, 0.2, 0.3, 0.4]) + 0.01 * usage)

def test_gema_after_a_step_that_is_not_finite_changes_no_bit():
    dex = make_dex()
    for usage in (torch.full((4,), math.nan), torch.tensor([math.inf, 0, 0, 0]), torch.rand(4)):
        before = {name: value.clone() for name, value in dex.state_dict().items()}
        dex.gema(usage, 0.5, torch.tensor(False))
        assert all(torch.equal(value, before[name]) for name, value in dex.state_dict().items())

def test_the_director_gets_no_gradient():
    model = MAE(Config(**TINY, experts=3))
    losses, routing, _, _ = model(torch.randn(4, 3, 16, 16))
    (losses.mean() + routing.co.sum() + routing.scores.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ('.director.' in name) == (not parameter.requires_grad), name

# ---------------------------------------------------------------------------------------------------------------------
# Masked autoencoder

def naive_block(block, x):
    """x (N, C): pre-norm block with an explicit softmax for each head."""
    def norm(layer, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * layer.weight + layer.bias

    qkv = block.attn.qkv(norm(block.norm1, x))
    C, heads = x.shape[1], []
    for h in range(block.attn.heads):
        d = C // block.attn.heads
        q, k, v = (qkv[:, i * C + h * d:i * C + (h + 1) * d] for i in range(3))
        heads.append(torch.softmax(q @ k.T / d ** 0.5, 1) @ v)
    x = x + block.attn.proj(torch.cat(heads, 1))
    return x + block.mlp.fc2(gelu(block.mlp.fc1(norm(block.norm2, x))))

def naive_patches(image, P):
    side = image.shape[1] // P
    return [image[:, i * P:(i + 1) * P, j * P:(j + 1) * P] for i in range(side) for j in range(side)]

def naive_mae(model, image, noise):
    """Loss, prediction (N-1, P * P * 3) and mask of one image, after He et al. (2022)."""
    P, kernel = model.config.patch, model.patch_embed.proj
    patches = naive_patches(image, P)
    visible = sorted(range(len(patches)), key=lambda n: noise[n].item())[:int(len(patches) * (1 - model.config.mask_ratio))]
    tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
    for n in visible:
        tokens.append((kernel.weight * patches[n]).sum((1, 2, 3)) + kernel.bias + model.pos_embed[0, 1 + n])
    x = torch.stack(tokens)
    for block in model.blocks:
        x = naive_block(block, x)
    x = model.decoder_embed(model.norm(x))
    tokens = [x[1 + visible.index(n)] if n in visible else model.mask_token[0, 0] for n in range(len(patches))]
    x = torch.stack([x[0], *tokens]) + model.decoder_pos_embed[0]
    for block in model.decoder_blocks:
        x = naive_block(block, x)
    prediction = model.decoder_pred(model.decoder_norm(x))[1:]
    errors = []
    for n in set(range(len(patches))) - set(visible):
        target = patches[n].permute(1, 2, 0).flatten()
        target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
        errors.append((prediction[n] - target).square().mean())
    return sum(errors) / len(errors), prediction, torch.tensor([float(n not in visible) for n in range(len(patches))])

def test_plain_mae_equals_a_naive_one():
    torch.manual_seed(0)
    model = shake(MAE(Config(**TINY, experts=0)), 0.5)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    losses, routing, prediction, mask = model(images, noise=noise)
    assert routing.scores.shape == (3, 1, 0) and not routing.co.any() and model(images, None)[1] is None
    for b in range(3):
        for ours, naive in zip((losses[b], prediction[b], mask[b]), naive_mae(model, images[b], noise[b])):
            torch.testing.assert_close(ours, naive, atol=2e-5, rtol=2e-5)

@pytest.mark.parametrize('ratio', [0.5, 0.6, 0.75, 0.9])
def test_masks_differ_per_image_and_keep_the_stated_number(ratio):
    torch.manual_seed(0)
    model = MAE(Config(**TINY, experts=0, mask_ratio=ratio))
    mask = model(torch.randn(32, 3, 16, 16))[3]
    assert (mask == 0).sum(1).tolist() == [int(16 * (1 - ratio))] * 32
    assert len({tuple(row) for row in mask.tolist()}) > 8

def test_the_loss_looks_at_hidden_patches_only():
    model = MAE(Config(**TINY, experts=2))
    losses, _, prediction, mask = model(torch.randn(3, 3, 16, 16))
    gradient, = torch.autograd.grad(losses.sum(), prediction)
    assert torch.equal(gradient.abs().sum(2) > 0, mask == 1)

def test_constant_patches_stay_finite():
    model = MAE(Config(**TINY, experts=2))
    images = torch.zeros(2, 3, 16, 16)
    images[:, :, :4] = torch.randn(2, 3, 4, 16)
    losses, routing, _, _ = model(images)
    (losses.mean() + routing.co.mean()).backward()
    assert losses.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.targets(images)[0][:, 4:].abs().max() == 0

def test_patches_are_cut_row_by_row_and_put_back():
    model, images = MAE(Config(**TINY)), torch.randn(2, 3, 16, 16)
    naive = torch.stack([torch.stack([p.permute(1, 2, 0).flatten() for p in naive_patches(image, 4)]) for image in images])
    assert torch.equal(model.patchify(images), naive) and torch.equal(model.unpatchify(naive), images)
    normalized, mean, std = model.targets(images)
    torch.testing.assert_close(model.unpatchify(normalized * std + mean), images)       # as recon.png undoes it

def test_positions_are_those_of_mae():
    width, side = 12, 3
    table = sincos_positions(width, side)
    naive = torch.zeros(1, 1 + side * side, width)
    for row in range(side):
        for column in range(side):
            for half, position in enumerate((column, row)):        # He et al.: "here w goes first"
                for k in range(width // 4):
                    angle = position / 10000 ** (k / (width / 4))
                    naive[0, 1 + row * side + column, half * 6 + k] = math.sin(angle)
                    naive[0, 1 + row * side + column, half * 6 + 3 + k] = math.cos(angle)
    torch.testing.assert_close(table, naive)

def test_resized_positions_have_the_target_size_and_keep_the_class_row():
    positions = torch.randn(1, 1 + 16, 8)
    assert torch.equal(resize_positions(positions, 4, 4), positions)
    for height, width in ((3, 5), (7, 7), (14, 9)):
        resized = resize_positions(positions, height, width)
        assert resized.shape == (1, 1 + height * width, 8) and torch.equal(resized[:, 0], positions[:, 0])
    columns = torch.arange(4.0).repeat(4)[None, :, None]        # a value that says its column
    wide = resize_positions(torch.cat([torch.zeros(1, 1, 1), columns], 1), 4, 8)[0, 1:, 0].view(4, 8)
    assert (wide.diff(dim=1) > 0).all() and wide.diff(dim=0).abs().max() < 1e-6

def test_all_blocks_outputs_and_the_normalised_last():
    model, outputs = ViT(Config(**TINY, experts=2)), {}
    for number, block in enumerate(model.blocks, 1):
        block.register_forward_hook(lambda block, inputs, output, number=number: outputs.update({number: output[0]}))
    tokens, _, ours = model(torch.randn(2, 3, 16, 16))
    assert len(ours) == 3 and all(torch.equal(ours[number - 1], output) for number, output in outputs.items())
    assert torch.equal(tokens, model.norm(outputs[3])) and tokens.shape == (2, 17, 16)

@pytest.mark.parametrize('wrong', [dict(size=30), dict(top_k=0), dict(top_k=9), dict(routing='pixel'),
                                   dict(mask_ratio=0), dict(mask_ratio=1)])
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(SystemExit, match=str(*wrong.values())):
        Config(**wrong)

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def network(kind=ViT, seed=1, **changes):
    torch.manual_seed(seed)
    return shake(kind(Config(**(TINY | changes))))

def test_a_network_is_what_was_saved(tmp_path):
    saved, other = network(MAE, experts=3), network(MAE, 2, experts=3)
    saved.blocks[0].dex.usage.copy_(torch.tensor([0.5, 0.3, 0.2]))
    torch.save(dict(model=saved.state_dict(), config=vars(saved.config), step=7), tmp_path / 'ckpt.pt')
    state, config, file = read_checkpoint(tmp_path / 'ckpt.pt')
    load_weights(other, state, 'ckpt.pt')
    assert config == saved.config and file['step'] == 7
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in other.state_dict().items())

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: dict(model=s), lambda s: dict(state_dict=s, epoch=3)])
def test_a_published_vit_becomes_the_director_and_every_expert(wrap, tmp_path):
    plain, dex = network(experts=0), network(seed=2, experts=3)
    gate = dex.blocks[1].dex.gate.weight.clone()
    published = plain.state_dict() | {'head.weight': torch.zeros(5, 16), 'head.bias': torch.zeros(5)}
    torch.save(wrap(published), tmp_path / 'vit.pth')
    state, config, _ = read_checkpoint(tmp_path / 'vit.pth')
    load_weights(dex, state, 'vit.pth')
    assert all(getattr(config, name) == getattr(plain.config, name) for name in ('size', 'patch', 'width', 'depth', 'experts'))
    assert torch.equal(dex.blocks[1].dex.gate.weight, gate)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(dex(images)[0], plain(images)[0])
    for block, old in zip(dex.blocks, plain.blocks):
        for name, value in old.mlp.named_parameters():
            assert torch.equal(block.dex.director.get_parameter(name), value)
            assert all(torch.equal(expert, value) for expert in block.dex.experts.get_parameter(name))

def test_a_plain_vit_takes_the_directors():
    dex, plain = network(MAE, experts=3), network(seed=2, experts=0)
    load_weights(plain, dex.state_dict(), 'ckpt.pt')
    for name, value in plain.state_dict().items():
        assert torch.equal(value, dex.state_dict()[name.replace('.mlp.', '.dex.director.')]), name

def test_what_is_left_out_and_what_is_new_is_printed(capsys):
    dex, plain = network(MAE, experts=3), network(MAE, experts=0)
    for state, model, left, new in (
            (dex.state_dict(), network(experts=3), 'decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, '
             'decoder_pred, mask_token', 'nothing'),
            (dex.state_dict(), plain, 'experts, gate, usage', 'nothing'),
            (plain.state_dict(), dex, 'nothing', 'gate, usage'),
            (network(experts=0).state_dict() | {'head.bias': torch.zeros(5)}, plain, 'head', 'decoder_blocks, decoder_embed, '
             'decoder_norm, decoder_pos_embed, decoder_pred, mask_token')):
        load_weights(model, state, 'a.pt')
        assert capsys.readouterr().out == f'a.pt: loaded; left out: {left}; not in it, so new: {new}\n'

def test_another_image_and_patch_size_resizes_positions_and_kernels():
    small, large = network(experts=2), network(seed=2, experts=2, size=40, patch=8)
    slope = torch.linspace(-1, 1, 4)[:, None] + 2 * torch.linspace(-1, 1, 4)
    small.patch_embed.proj.weight.data = torch.randn(16, 3, 1, 1) + torch.rand(16, 3, 1, 1) * slope
    load_weights(large, small.state_dict(), 'ckpt.pt')
    torch.testing.assert_close(large.pos_embed, resize_positions(small.pos_embed, 5, 5))
    old, new = small.patch_embed.proj.weight, large.patch_embed.proj.weight
    torch.testing.assert_close(new.sum((2, 3)), old.sum((2, 3)))        # a flat patch gives what it gave
    assert (new.diff(dim=2) > 0).all() and (new.diff(dim=3) > 0).all()

@pytest.mark.parametrize('spoil, named', [
    (lambda s: s.pop('blocks.1.norm1.bias'), 'blocks.1.norm1.bias'),
    (lambda s: s.pop('patch_embed.proj.weight'), 'patch_embed.proj.weight'),
    (lambda s: s.update({'blocks.9.norm1.bias': torch.zeros(16)}), 'blocks.9.norm1.bias'),
    (lambda s: s.update({'norm.weight': torch.zeros(17)}), 'norm.weight'),
    (lambda s: s.update({'blocks.0.mlp.fc1.weight': torch.zeros(60, 16)}), 'fc1.weight')])
@pytest.mark.parametrize('experts', [0, 3])
def test_what_does_not_fit_is_named(spoil, named, experts):
    state = dict(network(experts=0).state_dict())
    spoil(state)
    with pytest.raises(SystemExit, match=named) as error:
        load_weights(network(experts=experts), state, 'the/file.pt')
    assert 'the/file.pt' in str(error.value)

def test_a_director_without_its_experts_is_refused():
    state = network(experts=3).state_dict()
    del state['blocks.1.dex.experts.fc2.bias']
    with pytest.raises(SystemExit, match='missing or left over: blocks.1.dex.experts.fc2.bias'):
        load_weights(network(experts=3), state, 'ckpt.pt')

def test_unreadable_checkpoints_end_in_a_sentence_with_their_name(tmp_path):
    torch.save(dict(model=network().state_dict()), tmp_path / 'whole.pt')
    whole = (tmp_path / 'whole.pt').read_bytes()
    contents = {'empty.pt': b'', 'cut.pt': whole[:len(whole) // 2], 'text.pt': b'hello\nworld', 'page.pt': b'<html>'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save(dict(model=network().state_dict(), done=tmp_path), tmp_path / 'classes.pt')
    torch.save(dict(weight=torch.zeros(3)), tmp_path / 'other.pt')
    torch.save(torch.zeros(3), tmp_path / 'tensor.pt')
    torch.save(dict(model=network().state_dict(), config=dict(hidden_size=16)), tmp_path / 'foreign.pt')
    for name in [*contents, 'classes.pt', 'other.pt', 'tensor.pt', 'foreign.pt', 'missing.pt']:
        with pytest.raises(SystemExit, match=name):
            read_checkpoint(tmp_path / name)
    read_checkpoint(tmp_path / 'whole.pt')
