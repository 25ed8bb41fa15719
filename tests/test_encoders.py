"""Published encoders: files in their layouts give the features of an independent forward pass."""
import argparse
import math
from dataclasses import replace

import pytest
import torch

import data
from model import MAE, ViT, load_weights, read_checkpoint
from tests.support import layouts
from tests.support.layouts import DEPTH, HEADS, LAYOUTS, PATCH, SIDE, SIZE, WIDTH, normalized
from tests.support.runs import ends

def network(path, **options):
    """The ViT of a published file, converted and loaded; other weights are drawn first."""
    state, config = layouts.convert(path, **options)
    model = ViT(config)
    load_weights(model, state, path)
    return model

@pytest.fixture
def path(tmp_path):
    return tmp_path / 'file.pth'

@pytest.fixture(params=LAYOUTS)
def layout(request, path):
    """Each published layout, saved in `path`; `options` are what the file does not tell."""
    found = LAYOUTS[request.param]()
    torch.save(found.file, path)
    found.options = {} if found.tells else dict(normalization=found.normalization)
    return found

def pixels(count=2, size=SIZE):
    return torch.rand(count, 3, size, size)

def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

# ----------------------------------------------------------------------------------------
# Features

def test_a_file_in_a_published_layout_gives_the_published_features(layout, path):
    """Also at the ends of the blocks, where segmentation takes them."""
    model, images = network(path, **layout.options), pixels()
    tokens, _, outputs = model(normalized(images))
    same(tokens, layouts.features(layout.encoder, normalized(images, layout.normalization)))
    assert len(outputs) == DEPTH
    assert all(output.shape == tokens.shape for output in outputs)
    assert torch.equal(model.norm(outputs[-1]), tokens)

def test_what_was_read_of_a_file_is_printed(layout, path, capsys):
    """Depth, width, heads, patches, their grid, and how images are normalized; also whether the
    class token has a position, as 25 positions are those of 5 x 5 patches, or its own and those of
    4 x 6."""
    layouts.convert(path, **layout.options)
    text = capsys.readouterr().out
    assert all(line.startswith(f'{path}: ') for line in text.splitlines())
    has_position = layout.encoder['pos_embed'].shape[1] == SIDE ** 2 + 1
    for words in (f'{DEPTH} blocks', f'width {WIDTH}', f'{HEADS} heads', f'{PATCH} pixels',
                  f'{SIDE} x {SIDE} patches', f'normalized as {layout.normalization}',
                  f'class token has {"a" if has_position else "no"} position'):
        assert words in text, words

@pytest.mark.parametrize('depth, warned', [(12, False), (11, True)])
def test_a_depth_width_and_heads_of_no_known_vit_are_warned_of(depth, warned, path, capsys):
    """As where the last block is missing: what is left looks like a whole ViT."""
    state = layouts.vit(width=192, depth=12, side=2)
    last = {name: value for name, value in state.items() if name.startswith(f'blocks.{depth}.')}
    torch.save({name: value for name, value in state.items() if name not in last}, path)
    _, config = layouts.convert(path, normalization='imagenet')
    text = capsys.readouterr().out
    assert config.depth == depth and f'{depth} blocks' in text
    assert ('warning' in text) == warned

def test_a_classifiers_head_is_left_out_and_named(path, capsys):
    torch.save(layouts.deit3().file, path)
    network(path)
    assert 'left out: head' in capsys.readouterr().out

@pytest.mark.parametrize('wrap', ['model', 'state_dict'])
def test_a_wrapped_state_dict_is_found(wrap, path):
    state, images = layouts.vit(), normalized(pixels())
    torch.save({wrap: state, 'epoch': 3}, path)
    same(network(path, normalization='imagenet')(images)[0], layouts.features(state, images))

def test_the_authors_dex_is_converted(path):
    """Gate, experts, director, and the counts that become the usage."""
    encoder, images = layouts.vit(dex=True), normalized(pixels(3))
    theirs = layouts.under('module.', encoder | layouts.decoder())
    state, config = layouts.convert_authors(theirs)
    torch.save(dict(model=state, config=vars(config)), path)
    state, config, _ = read_checkpoint(path)
    model = ViT(config)
    load_weights(model, state, path)
    same(model(images)[0], layouts.features(encoder, images))
    same(model.blocks[1].dex.usage, torch.tensor([0.25, 0.5, 0.25]))
    for name, value in model.blocks[1].dex.director.named_parameters():
        assert torch.equal(value, encoder[f'blocks.1.DEX.director.{name}'])

@pytest.mark.parametrize('name', ['MAE', 'DINOv2', 'PanDerm'])
def test_pretraining_starts_from_a_published_encoder(name, path):
    """It becomes director and experts; the decoder, and so the mask token, is new unless MAE's."""
    found = LAYOUTS[name]()
    torch.save(found.file, path)
    state, config = layouts.convert(path)
    model = MAE(replace(config, decoder_width=8, decoder_depth=1, decoder_heads=1, experts=3))
    fresh = model.mask_token.detach().clone()
    # The decoder of this miniature is not a whole one.
    state = {name: value for name, value in state.items() if not name.startswith('decoder_')}
    load_weights(model, state, path)
    images = normalized(pixels())
    assert torch.equal(model.mask_token, fresh) == (name != 'MAE')
    same(ViT.forward(model, images)[0], layouts.features(found.encoder, images))
    assert model(images)[0].isfinite().all()

def test_the_sizes_of_a_network_follow_from_the_shapes(path):
    torch.save(layouts.vit(width=192, depth=3, patch=8, side=6, ratio=2), path)
    _, config = layouts.convert(path, normalization='imagenet')
    found = {name: getattr(config, name) for name in ('size', 'patch', 'width', 'depth')}
    assert found == dict(size=48, patch=8, width=192, depth=3)
    assert (config.heads, config.mlp_ratio, config.experts) == (3, 2, 0)

# ----------------------------------------------------------------------------------------
# What the shapes do not tell: heads, and the normalization of images

def test_our_images_are_z_scored_by_imagenets_numbers():
    """So a converted encoder of others has its own folded into its patch kernels."""
    images = pixels()
    torch.testing.assert_close(data.normalize(images), normalized(images, 'imagenet'))

@pytest.mark.parametrize('name', ['imagenet', 'clip', 'half'])
def test_the_normalization_of_the_images_can_be_named(name, path):
    state, images = layouts.vit(), pixels()
    torch.save(state, path)
    model = network(path, normalization=name)
    same(model(normalized(images))[0], layouts.features(state, normalized(images, name)))

@pytest.mark.parametrize('name', [name for name in LAYOUTS if not LAYOUTS[name]().tells])
def test_a_file_that_does_not_tell_its_normalization_needs_the_option(name, path):
    """A bare ViT of timm may want any: features by a wrong one are several deviations off."""
    torch.save(LAYOUTS[name]().file, path)
    with pytest.raises(SystemExit) as error:
        layouts.convert(path)
    ends(error, naming=[path, '--normalization', *layouts.NORMALIZATIONS])

def test_the_option_wins_over_what_a_layout_tells(path):
    found, images = LAYOUTS['DeiT'](), pixels()
    torch.save(found.file, path)
    ours = network(path, normalization='half')(normalized(images))[0]
    same(ours, layouts.features(found.encoder, normalized(images, 'half')))

def test_the_heads_can_be_named(path):
    state, images = layouts.vit(), normalized(pixels())
    torch.save(state, path)
    model = network(path, heads=4, normalization='imagenet')
    same(model(images)[0], layouts.features(state, images, heads=4))

@pytest.mark.parametrize('heads', [3, 256, -2])
def test_heads_that_do_not_divide_the_width_are_refused(heads, path):
    torch.save(layouts.vit(), path)
    with pytest.raises(SystemExit) as error:
        layouts.convert(path, heads=heads, normalization='imagenet')
    ends(error, naming=[path, 'width', 'heads', heads])

def test_a_width_of_1280_has_16_heads_of_80_channels(path):
    """ViT-H's; every smaller published ViT has 64 channels a head."""
    state = layouts.vit(width=1280, depth=1, side=2, ratio=1)
    torch.save(state, path)
    model, images = network(path, normalization='imagenet'), normalized(pixels(1, 2 * PATCH))
    ours = model(images)[0]
    assert model.config.heads == 16
    same(ours, layouts.features(state, images, heads=16))
    assert (ours - layouts.features(state, images, heads=20)).abs().max() > 0.01

@pytest.mark.parametrize('options', [
    dict(), dict(heads=4), dict(normalization='clip')], ids=str)
def test_our_own_checkpoint_is_not_converted_again(options, path):
    """It says itself what it is, and it reads images as ours."""
    config = dict(width=WIDTH, depth=DEPTH, heads=HEADS, size=SIZE, patch=PATCH, experts=0)
    torch.save(dict(model=layouts.vit(), config=config), path)
    read_checkpoint(path)
    with pytest.raises(SystemExit) as error:
        layouts.convert(path, **options)
    assert 'damaged' not in ends(error, naming=[path, '--init'])

# ----------------------------------------------------------------------------------------
# What is refused

@pytest.mark.parametrize('name, shape', [
    pytest.param('register_tokens', (1, 4, WIDTH), id='registers of DINOv2'),
    pytest.param('reg_token', (1, 4, WIDTH), id='registers in timm'),
    pytest.param('blocks.0.attn.relative_position_bias_table', (9, 2), id='BEiT'),
    pytest.param('norm_pre.weight', (WIDTH,), id='CLIP in timm'),
    pytest.param('blocks.0.DEX.router.linear.bias', (3,), id='authors'),
    pytest.param('blocks.1.attn.q_norm.weight', (64,), id='normalized queries'),
    pytest.param('blocks.0.attn.gate.weight', (WIDTH, WIDTH), id='gated attention'),
    pytest.param('blocks.1.attn.head_scale', (1, HEADS, 1, 1), id='scaled heads'),
    pytest.param('blocks.1.attn.norm.head.weight', (64,), id='a head inside'),
    pytest.param('blocks.0.attn.mask_token', (1, 1, WIDTH), id='a mask token inside'),
])
def test_a_part_that_our_network_does_not_have_is_refused_by_name(name, shape, path):
    torch.save(layouts.vit() | {name: layouts.random(*shape)}, path)
    with pytest.raises(SystemExit) as error:
        network(path, normalization='imagenet')
    ends(error, naming=[path, name])

def changed(name, value=None):
    """A ViT with another tensor of that name, or without it."""
    state = layouts.vit()
    del state[name]
    return state if value is None else state | {name: value}

def openai_clip():
    """Of the vision tower; with it, a mask of infinities in the text tower."""
    return {'visual.class_embedding': layouts.random(WIDTH),
            'visual.conv1.weight': layouts.random(WIDTH, 3, PATCH, PATCH),
            'attn_mask': torch.full((3, 3), -math.inf)}

def convolutional():
    return {'conv1.weight': layouts.random(8, 3, 7, 7), 'bn1.running_mean': layouts.random(8)}

def one_bias_of_two():
    return layouts.vit(keys_have_bias=False) | {'blocks.0.attn.v_bias': None}

def grey():
    return changed('patch_embed.proj.weight', layouts.random(WIDTH, 1, PATCH, PATCH))

def oblong():
    return changed('pos_embed', layouts.random(1, SIDE ** 2 + 2, WIDTH))

def filled(value):
    return lambda: changed('norm.bias', torch.full((WIDTH,), value))

@pytest.mark.parametrize('content, named', [
    pytest.param(openai_clip, 'cls_token', id='CLIP'),
    pytest.param(convolutional, 'cls_token', id='CNN'),
    pytest.param(lambda: dict(state_dict=changed('pos_embed')), 'pos_embed', id='no positions'),
    pytest.param(lambda: changed('patch_embed.proj.bias'), 'patch_embed.proj.bias', id='no bias'),
    pytest.param(oblong, 'square grid', id='oblong'),
    pytest.param(grey, 'colours', id='grey'),
    pytest.param(one_bias_of_two, 'blocks.0.attn', id='no v_bias'),
    pytest.param(filled(math.nan), 'NaN', id='NaN'),
    pytest.param(filled(math.inf), 'infinity', id='infinity'),
])
def test_what_is_no_plain_vit_is_refused(content, named, path):
    torch.save(content(), path)
    with pytest.raises(SystemExit) as error:
        layouts.convert(path, normalization='imagenet')
    assert ends(error, naming=named).startswith(str(path))

def test_a_cut_file_is_refused(path):
    torch.save(layouts.mae().file, path)
    layouts.convert(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SystemExit) as error:
        layouts.convert(path)
    ends(error, naming=path)

def test_code_among_the_options_of_a_published_file_does_not_run(path, tmp_path):
    options = argparse.Namespace(lr=0.1, code=layouts.Code(tmp_path / 'ran'))
    torch.save(layouts.mae().file | dict(args=options), path)
    with pytest.raises(SystemExit) as error:
        layouts.convert(path)
    ends(error, naming=[path, 'code'])
    assert not (tmp_path / 'ran').exists()
