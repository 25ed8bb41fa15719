"""The plain vision transformer and the masked autoencoder: patches, positions, masks, the loss."""
import math

import pytest
import torch

from model import MAE, ViT, sincos_positions
from tests.support import naive, networks
from tests.support.runs import ends

def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)

def images(count):
    return torch.randn(count, 3, 16, 16)

# ----------------------------------------------------------------------------------------
# The network

def test_a_plain_vit_equals_a_naive_one():
    model, batch = networks.network(ViT, experts=0), images(3)
    close(model(batch)[0], torch.stack([naive.vit(model, image) for image in batch]))

def test_a_plain_masked_autoencoder_equals_a_naive_one():
    """Loss, prediction and mask, with the noise that says which patches to hide."""
    model, batch = networks.network(MAE, experts=0), images(3)
    noise = torch.rand(3, 16)
    losses, _, predictions, masks = model(batch, mask_noise=noise)
    for image, row, *ours in zip(batch, noise, losses, predictions, masks, strict=True):
        for value, theirs in zip(ours, naive.mae(model, image, row), strict=True):
            close(value, theirs)

def test_a_network_without_experts_reports_none():
    model, batch = networks.network(MAE, experts=0), images(3)
    assert model(batch)[1] is None
    assert model(batch, None)[1] is None

def test_a_vit_returns_the_outputs_of_all_blocks_and_the_normalised_last():
    model, seen = ViT(networks.config(experts=2)), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output[0]))
    tokens, _, outputs = model(images(2))
    assert len(outputs) == len(seen) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, seen))
    assert torch.equal(tokens, model.norm(seen[-1]))
    assert tokens.shape == (2, 17, 16)

@pytest.mark.parametrize('name, value', [('size', 30), ('patch', 0), ('patch', 5), ('patch', 32)])
def test_an_impossible_configuration_is_refused(name, value):
    """Of 16 pixels and patches of 4."""
    with pytest.raises(SystemExit) as error:
        networks.config(**{name: value})
    ends(error, naming=[name, value])

# ----------------------------------------------------------------------------------------
# Patches and positions

def test_patches_are_cut_row_by_row_with_the_colours_last():
    model, batch = MAE(networks.config()), images(2)
    rows = []
    for image in batch:
        patches = naive.patches_of(image, 4)
        rows.append(torch.stack([patch.permute(1, 2, 0).flatten() for patch in patches]))
    assert torch.equal(model.patchify(batch), torch.stack(rows))

def test_the_normalization_of_patches_can_be_undone():
    """As the pictures of reconstructions do."""
    model, batch = MAE(networks.config()), images(2)
    targets, mean, deviation = model.targets(batch)
    torch.testing.assert_close(targets * deviation + mean, model.patchify(batch))

def test_positions_are_the_sines_and_cosines_of_mae():
    """Of column, then row ("here w goes first"), and zeros for the class token."""
    width, side = 12, 3
    table = torch.zeros(1, 1 + side * side, width)
    for row in range(side):
        for column in range(side):
            position = table[0, 1 + row * side + column]
            for k in range(3):
                rate = 10000 ** (-k / 3)
                position[k] = math.sin(column * rate)
                position[3 + k] = math.cos(column * rate)
                position[6 + k] = math.sin(row * rate)
                position[9 + k] = math.cos(row * rate)
    torch.testing.assert_close(sincos_positions(width, side), table)

# ----------------------------------------------------------------------------------------
# Masks and the loss

@pytest.mark.parametrize('ratio, seen', [(0.5, 8), (0.6, 6), (0.75, 4), (0.9, 1)])
def test_masks_differ_between_images_and_keep_the_stated_number(ratio, seen):
    """Of 16 patches int(16 * (1 - ratio)) stay visible."""
    model = MAE(networks.config(experts=0, mask_ratio=ratio))
    mask = model(images(32))[3]
    assert ((mask == 0).sum(1) == seen).all()
    assert ((mask == 0) | (mask == 1)).all()
    assert len({tuple(row) for row in mask.tolist()}) > 8

def test_the_loss_looks_at_hidden_patches_only():
    model = MAE(networks.config(experts=2))
    losses, _, prediction, mask = model(images(3))
    gradient, = torch.autograd.grad(losses.sum(), prediction)
    assert torch.equal(gradient.abs().sum(2) > 0, mask == 1)

def test_hidden_patches_do_not_reach_the_encoder():
    """Other pixels in hidden patches change no prediction."""
    model, batch, noise = networks.network(MAE, experts=2), images(2), torch.rand(2, 16)
    _, _, prediction, mask = model(batch, mask_noise=noise)
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    others = torch.where(hidden == 1, images(2), batch)
    assert torch.equal(model(others, mask_noise=noise)[2], prediction)

def test_a_network_that_predicts_nothing_has_a_loss_of_one():
    """Because patches are normalized; with the unbiased variance, of one less than 48 numbers."""
    model = MAE(networks.config(experts=2))
    torch.nn.init.zeros_(model.decoder_pred.weight)
    losses = model(images(3))[0]
    torch.testing.assert_close(losses, torch.full((3,), 47 / 48), atol=1e-5, rtol=0)

def test_constant_patches_stay_finite_and_become_zeros():
    """Air, in CT and PET."""
    model, batch = MAE(networks.config(experts=2)), torch.zeros(2, 3, 16, 16)
    batch[:, :, :4] = torch.randn(2, 3, 4, 16)
    losses, (alignment, _, _, _), _, _ = model(batch)
    (losses.mean() + alignment.mean()).backward()
    assert losses.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.targets(batch)[0][:, 4:].abs().max() == 0
