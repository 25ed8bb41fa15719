"""The segmentation decoder UNETR: its size, the blocks that it looks at, its parts."""
import pytest
import torch
from torch import nn

from model import Config, ViT
from tests.support import runs
from unetr import UNETR, ResidualBlock

def vit(depth=4, patch=8, size=32, width=48):
    """A small plain ViT."""
    c = Config(size=size, patch=patch, depth=depth, width=width, heads=3, experts=0)
    return ViT(c)

def numbers_in(module):
    """How many numbers the parameters of a module hold."""
    return sum(parameter.numel() for parameter in module.parameters())

def test_its_size_is_the_published_one():
    """On a ViT-B at 256 pixels with two classes; counted layer by layer from the widths."""
    C, f = 768, 16
    encoder = ViT(Config(experts=0))

    def block(i, o):                # two 3 x 3 convolutions, and a shortcut where widths differ
        return 9 * i * o + 9 * o * o + (i * o if i != o else 0)

    def up(i, o):                   # a transposed 2 x 2 convolution
        return 4 * i * o

    image = block(3, f)
    first = up(C, 2*f) + 2 * (up(2*f, 2*f) + block(2*f, 2*f))
    second = up(C, 4*f) + up(4*f, 4*f) + block(4*f, 4*f)
    third = up(C, 8*f)
    decoder = 0
    for i, o in ((C, 8*f), (8*f, 4*f), (4*f, 2*f), (2*f, f)):
        decoder += up(i, o) + block(2*o, o)
    head = 2*f + 2
    expected = image + first + second + third + decoder + head
    assert expected == 1_893_378
    assert numbers_in(UNETR(encoder, 2)) - numbers_in(encoder) == expected

def test_a_residual_block_is_that_of_torchs_own_layers():
    """Instance norm without parameters, leaky ReLU of slope 0.01, a projected shortcut."""
    for inputs, outputs in ((3, 6), (6, 6)):
        ours = ResidualBlock(inputs, outputs)
        x = torch.randn(2, inputs, 8, 8)
        norm, relu = nn.InstanceNorm2d(outputs), nn.LeakyReLU(0.01)
        shortcut = norm(ours.shortcut(x)) if inputs != outputs else x
        expected = relu(norm(ours.conv2(relu(norm(ours.conv1(x))))) + shortcut)
        torch.testing.assert_close(ours(x), expected)

def what_the_skips_see(net, images):
    """The patches after each block, by its number from 1, and what goes into each skip, deepest
    first, as tokens (B, N - 1, C)."""
    outputs, inputs, handles = {}, [], []

    def record_output(number):
        def hook(module, arguments, out):
            outputs[number] = out[0][:, 1:]
        return hook

    def record_input(module, arguments):
        inputs.append(arguments[0].flatten(2).mT)

    for number, block in enumerate(net.vit.blocks, 1):
        handles.append(block.register_forward_hook(record_output(number)))
    for skip in list(net.skips)[:3]:
        handles.append(skip.register_forward_pre_hook(record_input))
    net(images)
    for handle in handles:
        handle.remove()
    return outputs, inputs

@pytest.mark.parametrize('depth, quarters', [(4, (3, 2, 1)), (6, (4, 3, 1)), (12, (9, 6, 3))])
def test_its_skips_come_from_the_ends_of_the_first_three_quarters(depth, quarters):
    """Blocks counted from one: 3, 6 and 9 of 12, not 4, 7 and 10."""
    net = UNETR(vit(depth), 5, features=4)
    outputs, inputs = what_the_skips_see(net, torch.randn(2, 3, 32, 32))
    assert len(inputs) == 3
    for seen, number in zip(inputs, quarters):
        assert torch.equal(seen, outputs[number])

@pytest.mark.parametrize('patch, size', [(8, 32), (8, 40), (16, 48), (32, 64)])
def test_its_logits_have_the_size_of_the_image(patch, size):
    net = UNETR(vit(patch=patch, size=size), 5, features=4)
    assert net(torch.randn(2, 3, size, size)).shape == (2, 5, size, size)

def test_the_order_of_patches_is_that_of_the_image():
    """With the skip from the image switched off, a change in a corner shows up in that corner."""
    net = UNETR(vit(size=64), 2, features=4).eval()
    for parameter in net.skips[3].parameters():         # the skip from the image itself
        nn.init.zeros_(parameter)
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, :8, 56:] += 3                         # the top right patch
    with torch.no_grad():
        difference = (net(changed) - net(images)).abs().sum(1)[0]
    assert difference[:8, 56:].mean() > 2 * difference[:8, :8].mean()
    assert difference[:8, 56:].mean() > 2 * difference[56:, 56:].mean()
    assert difference[:8, 56:].mean() > 2 * difference[56:, :8].mean()

@pytest.mark.parametrize('depth, patch, named', [(4, 14, '14'), (3, 16, '3'), (4, 4, '4')])
def test_what_it_cannot_take_ends_in_a_sentence(depth, patch, named):
    """Patches of other sides than 8, 16 and 32, and networks without four quarters."""
    with pytest.raises(SystemExit) as stop:
        UNETR(vit(depth, patch, size=2 * patch), 2)
    runs.ends(stop, naming=['patches of 8, 16', named])
