"""Our checkpoints: what is saved, what is read, what fits which network, and what is refused."""
import argparse
import pickle

import pytest
import torch
import torch.nn.functional as F

from model import MAE, ViT, load_weights, read_checkpoint, resize_positions
from tests.support import layouts
from tests.support.networks import network
from tests.support.runs import ends, equal

def checkpoint(model, **more):
    """What pretrain.py saves of a network, with more entries."""
    return dict(model=model.state_dict(), config=vars(model.config)) | more

# ----------------------------------------------------------------------------------------
# A network and its file

def test_a_network_is_what_was_saved(tmp_path):
    """Also what GEMA moves, and what else is in the file."""
    saved, other = network(MAE, experts=3), network(MAE, seed=2, experts=3)
    saved.blocks[0].dex.usage.copy_(torch.tensor([0.5, 0.3, 0.2]))
    torch.save(checkpoint(saved, done=7), tmp_path / 'ckpt.pt')
    state, config, file = read_checkpoint(tmp_path / 'ckpt.pt')
    load_weights(other, state, 'ckpt.pt')
    assert config == saved.config and file['done'] == 7
    assert equal(other.state_dict(), saved.state_dict())

def test_a_plain_vit_becomes_the_director_and_every_expert():
    plain, dex = network(experts=0), network(seed=2, experts=3)
    load_weights(dex, plain.state_dict(), 'vit.pt')
    for block, old in zip(dex.blocks, plain.blocks, strict=True):
        for name, value in old.mlp.named_parameters():
            assert torch.equal(block.dex.director.get_parameter(name), value)
            assert torch.equal(block.dex.experts.get_parameter(name), value.expand(3, *value.shape))

def test_with_experts_a_plain_vit_has_the_features_it_had():
    plain, dex = network(experts=0), network(seed=2, experts=3)
    load_weights(dex, plain.state_dict(), 'vit.pt')
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(dex(images)[0], plain(images)[0])

def test_the_gates_that_a_plain_vit_does_not_have_stay_as_they_were():
    dex = network(experts=3)
    before = {name: value.clone() for name, value in dex.state_dict().items() if 'gate' in name}
    load_weights(dex, network(seed=2, experts=0).state_dict(), 'vit.pt')
    assert len(before) == 3
    assert all(torch.equal(dex.state_dict()[name], value) for name, value in before.items())

def test_a_plain_vit_takes_the_directors():
    """As fine-tuning with --adapt director does."""
    dex, plain = network(MAE, experts=3), network(seed=2, experts=0)
    load_weights(plain, dex.state_dict(), 'ckpt.pt')
    for name, value in plain.state_dict().items():
        assert torch.equal(value, dex.state_dict()[name.replace('.mlp.', '.dex.director.')]), name

@pytest.mark.parametrize('file, wanted, left_out, new', [
    (dict(kind=MAE, experts=3), dict(kind=ViT, experts=3), {'decoder', 'mask_token'}, set()),
    (dict(kind=MAE, experts=3), dict(kind=MAE, experts=0), {'experts', 'gate', 'usage'}, set()),
    (dict(kind=MAE, experts=0), dict(kind=MAE, experts=3), set(), {'gate', 'usage'}),
    (dict(kind=ViT, experts=0), dict(kind=MAE, experts=0), set(), {'decoder', 'mask_token'}),
])
def test_a_line_says_what_is_left_out_and_what_is_new(file, wanted, left_out, new, capsys):
    load_weights(network(**wanted), network(**file).state_dict(), 'a.pt')
    line = capsys.readouterr().out
    assert line.count('\n') == 1 and line.startswith('a.pt')
    parts = {'decoder', 'mask_token', 'experts', 'gate', 'usage'}
    for half, named in zip(line.split('; not in it'), (left_out, new), strict=True):
        assert {part for part in parts if part in half} == named, half

# ----------------------------------------------------------------------------------------
# What does not fit

@pytest.mark.parametrize('experts', [0, 3])
@pytest.mark.parametrize('name', ['blocks.1.norm1.bias', 'patch_embed.proj.weight'])
def test_what_is_missing_in_a_plain_vit_is_named(name, experts):
    state = dict(network(experts=0).state_dict())
    del state[name]
    with pytest.raises(SystemExit) as error:
        load_weights(network(experts=experts), state, 'the/file.pt')
    ends(error, naming=['the/file.pt', name])

@pytest.mark.parametrize('experts', [0, 3])
@pytest.mark.parametrize('name, shape, named', [
    ('blocks.9.norm1.bias', (16,), 'blocks.9.norm1.bias'),      # which three blocks leave over
    ('blocks.0.attn.gate.weight', (16, 16), 'blocks.0.attn.gate.weight'),   # no gate of ours
    ('norm.weight', (17,), 'norm.weight'),
    ('blocks.0.mlp.fc1.weight', (60, 16), 'fc1.weight'),
])
def test_what_is_left_over_or_has_another_shape_is_named(name, shape, named, experts):
    """Where an MLP becomes experts, by the name of the experts' layer."""
    state = network(experts=0).state_dict() | {name: torch.zeros(*shape)}
    with pytest.raises(SystemExit) as error:
        load_weights(network(experts=experts), state, 'the/file.pt')
    assert 'the/file.pt' in str(error.value) and named in str(error.value)

def test_experts_that_a_file_with_a_director_lacks_are_told_to_be_new(capsys):
    state = network(experts=3).state_dict()
    del state['blocks.1.dex.experts.fc2.bias']
    load_weights(network(experts=3), state, 'ckpt.pt')
    assert capsys.readouterr().out.endswith('so new: .dex.experts\n')

# ----------------------------------------------------------------------------------------
# Other sizes

def test_another_image_size_resizes_the_positions():
    small, large = network(experts=2), network(seed=2, experts=2, size=20)
    load_weights(large, small.state_dict(), 'ckpt.pt')
    torch.testing.assert_close(large.pos_embed, resize_positions(small.pos_embed, 5, 5))

def test_another_patch_size_resizes_the_kernels():
    """A flat patch gives what it gave, and a slope in a kernel stays one."""
    small, large = network(experts=2), network(seed=2, experts=2, size=40, patch=8)
    ramp = torch.linspace(-1, 1, 4)
    slope = ramp[:, None] + 2 * ramp
    height = 0.1 + torch.rand(16, 3, 1, 1)
    small.patch_embed.proj.weight.data = torch.randn(16, 3, 1, 1) + height * slope
    load_weights(large, small.state_dict(), 'ckpt.pt')
    old, new = small.patch_embed.proj.weight, large.patch_embed.proj.weight
    torch.testing.assert_close(new.sum((2, 3)), old.sum((2, 3)))
    assert (new.diff(dim=2) > 0).all() and (new.diff(dim=3) > 0).all()

def test_positions_of_equal_size_are_not_touched():
    positions = torch.randn(1, 1 + 16, 8)
    assert torch.equal(resize_positions(positions, 4, 4), positions)

@pytest.mark.parametrize('height, width', [(3, 5), (7, 7), (14, 9)])
def test_resized_positions_have_the_target_size_and_keep_the_class_row(height, width):
    positions = torch.randn(1, 1 + 16, 8)
    resized = resize_positions(positions, height, width)
    assert resized.shape == (1, 1 + height * width, 8)
    assert torch.equal(resized[:, 0], positions[:, 0])

def test_resized_positions_keep_rows_and_columns_apart():
    """Each position's value is the number of its column."""
    columns = torch.arange(4.0).repeat(4)
    positions = F.pad(columns, (1, 0))[None, :, None]
    wide = resize_positions(positions, 4, 8)[0, 1:, 0].view(4, 8)
    assert (wide.diff(dim=1) > 0).all()
    assert wide.diff(dim=0).abs().max() < 1e-6

def stripes():
    """A grid of 37 rows, every second of them 1, and its positions with a class row of 7."""
    grid = torch.zeros(37, 37)
    grid[::2] = 1
    return grid, F.pad(grid.flatten(), (1, 0), value=7)[None, :, None]

def test_positions_that_shrink_are_averaged():
    """Stripes become grey, where plain bicubic interpolation would leave every second one out."""
    grid, positions = stripes()
    shrunk = resize_positions(positions, 16, 16)
    assert shrunk[0, 0] == 7 and shrunk[0, 1:].std() < 0.15
    assert F.interpolate(grid[None, None], (16, 16), mode='bicubic').std() > 0.3

def test_positions_that_grow_are_interpolated():
    grid, positions = stripes()
    grown = F.interpolate(grid[None, None], (50, 50), mode='bicubic').flatten()
    torch.testing.assert_close(resize_positions(positions, 50, 50)[0, 1:, 0], grown)

# ----------------------------------------------------------------------------------------
# Files that are refused

def filled(value):
    """A whole checkpoint, but for one number."""
    file = checkpoint(network())
    file['model']['norm.bias'][3] = value
    return file

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('content, keyword', [
    pytest.param(b'', 'damaged', id='empty'),
    pytest.param(b'hello\nworld', 'damaged', id='text'),
    pytest.param(b'<html>', 'damaged', id='page'),
    pytest.param((8).to_bytes(8, 'little') + b'{"a": 1}' + bytes(64), 'damaged', id='safetensors'),
    pytest.param(torch.zeros(3), 'damaged', id='tensor'),
    pytest.param(checkpoint(network(), config=dict(hidden=16)), 'damaged', id='other config'),
    pytest.param(checkpoint(network(), done=argparse.ArgumentParser), 'damaged', id='class'),
    pytest.param(filled(float('nan')), 'NaN', id='nan'),
    pytest.param(filled(float('inf')), 'infinity', id='infinity'),
])
def test_what_is_no_checkpoint_of_a_pretraining_is_refused(content, keyword, tmp_path):
    path = tmp_path / 'file.pt'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(SystemExit) as error:
        read_checkpoint(path)
    assert ends(error, naming=keyword).startswith(str(path))

def test_a_fine_tuned_network_is_no_start(tmp_path):
    state = {'vit.' + name: value for name, value in network().state_dict().items()}
    with pytest.raises(SystemExit) as error:
        load_weights(network(), state, tmp_path / 'best.pt')
    assert ends(error, naming='cls_token').startswith(str(tmp_path / 'best.pt'))

@pytest.mark.parametrize('wrap', ['', 'model', 'state_dict', 'teacher'])
def test_a_file_of_others_is_refused_and_its_converter_named(wrap, tmp_path):
    """By the command that reads it. It may be a ViT, or anything else."""
    path, state = tmp_path / 'file.pt', network(experts=0).state_dict()
    torch.save({wrap: state} if wrap else state, path)
    with pytest.raises(SystemExit) as error:
        read_checkpoint(path)
    sentence = ends(error, naming=f'python -m tests.encoders.published {path} ')
    assert sentence.startswith(str(path))

@pytest.mark.parametrize('share', [0.3, 0.5, 0.9])
def test_a_cut_file_is_refused(share, tmp_path):
    path = tmp_path / 'file.pt'
    torch.save(checkpoint(network()), path)
    read_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(SystemExit) as error:
        read_checkpoint(path)
    ends(error, naming=[path, 'damaged'])

@pytest.mark.filterwarnings('ignore')
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / 'ViT-B-32.pt'
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(SystemExit) as error:
        read_checkpoint(path)
    ends(error, naming=[path, 'damaged'])

@pytest.mark.parametrize('name, keyword', [('missing.pt', 'No such file'), ('.', 'directory')])
def test_a_missing_file_or_a_folder_is_told(name, keyword, tmp_path):
    with pytest.raises(SystemExit) as error:
        read_checkpoint(tmp_path / name)
    ends(error, naming=[tmp_path / name, keyword])

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('plain', [False, True])
def test_code_in_a_file_does_not_run(plain, tmp_path):
    """In a file of torch.save, or in a plain pickle, also behind options that may be read."""
    options = argparse.Namespace(code=layouts.Code(tmp_path / 'ran'))
    content, path = checkpoint(network(), args=options), tmp_path / 'file.pt'
    if plain:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(SystemExit) as error:
        read_checkpoint(path)
    ends(error, naming=[path, 'code'])
    assert not (tmp_path / 'ran').exists()
