"""Published encoders: files in their layouts, made here by hand, give the features of an independent forward pass."""
import argparse
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import authors_dex
import data
from model import MAE, NORMALIZATIONS, ViT, load_weights, read_checkpoint, resize_positions

C, L, P, SIDE, HEADS, SIZE = 128, 2, 4, 5, 2, 20     # width, blocks, patch, patches in a row, heads, pixels in a row

def random(*shape):
    return 0.3 * torch.randn(*shape)

def linear(name, outputs, inputs):
    return {f'{name}.weight': random(outputs, inputs) / inputs ** 0.5 * 3, f'{name}.bias': random(outputs)}

def norm(name):
    return {f'{name}.weight': 1 + random(C), f'{name}.bias': random(C)}

def encoder(scale='', qkv_bias=True, class_position=True, registers='', mlp=lambda block: mlp_of(f'{block}.mlp')):
    """A ViT as MAE and timm write it, with what others add to it."""
    torch.manual_seed(1)
    state = {'cls_token': random(1, 1, C), 'pos_embed': random(1, SIDE ** 2 + class_position, C),
             'patch_embed.proj.weight': random(C, 3, P, P), 'patch_embed.proj.bias': random(C)} | norm('norm')
    if registers:
        state[registers] = random(1, 4, C)
    for block in (f'blocks.{i}' for i in range(L)):
        state |= norm(f'{block}.norm1') | norm(f'{block}.norm2') | linear(f'{block}.attn.qkv', 3 * C, C)
        state |= linear(f'{block}.attn.proj', C, C) | mlp(block)
        if not qkv_bias:
            del state[f'{block}.attn.qkv.bias']
            state |= {f'{block}.attn.q_bias': random(C), f'{block}.attn.v_bias': random(C)}
        if scale:
            state |= {f'{block}.{scale.format(1)}': random(C), f'{block}.{scale.format(2)}': random(C)}
    return state

def mlp_of(name):
    return linear(f'{name}.fc1', 4 * C, C) | linear(f'{name}.fc2', C, 4 * C)

def dex_of(block):
    """The authors' module of three experts."""
    state = mlp_of(f'{block}.DEX.director') | {f'{block}.DEX.router.linear.weight': random(3, C)}
    for expert in range(3):
        state |= mlp_of(f'{block}.DEX.experts.{expert}')
    return state | {f'{block}.DEX.expert_activation_count': torch.tensor([10, 20, 10])}

def decoder():
    """What a masked autoencoder adds."""
    return {'mask_token': random(1, 1, 8), 'decoder_pos_embed': random(1, SIDE ** 2 + 1, 8)} | {
        f'{name}.{kind}': random(3) for name in ('decoder_embed', 'decoder_pred') for kind in ('weight', 'bias')}

def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}

def features(s, images):
    """Class token and patches (B, 1 + n, C) after the last norm, by the published definitions, a head at a time."""
    def apply(name, x):
        return x @ s[f'{name}.weight'].T + s[f'{name}.bias']

    def normalize(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * s[f'{name}.weight'] + s[f'{name}.bias']

    def mlp(name, x):
        x = apply(f'{name}.fc1', x)
        return apply(f'{name}.fc2', 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))

    def dex(name, x):
        scores = (x[:, 0] @ s[f'{name}.router.linear.weight'].T / 0.5).softmax(-1)
        result = torch.zeros_like(x)
        for image, row in enumerate(scores.tolist()):
            best = sorted(range(3), key=row.__getitem__)[1:]
            for expert in best:
                result[image] += row[expert] / sum(row[e] for e in best) * mlp(f'{name}.experts.{expert}', x[image])
        return result

    patches = images.unfold(2, P, P).unfold(3, P, P).movedim(1, 3).flatten(3).flatten(1, 2)       # (B, n, 3 * P * P)
    x = patches @ s['patch_embed.proj.weight'].flatten(1).T + s['patch_embed.proj.bias']
    positions, token = s['pos_embed'], s['cls_token'].expand(len(x), -1, -1)
    if positions.shape[1] > x.shape[1]:
        x = torch.cat([token, x], 1) + positions
    else:
        x = torch.cat([token, x + positions], 1)
    for registers in (s[name] for name in ('register_tokens', 'reg_token') if name in s):
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for block in (f'blocks.{i}' for i in range(L)):
        h = normalize(f'{block}.norm1', x)
        q, k, v = (h @ s[f'{block}.attn.qkv.weight'].T).split(C, -1)
        if f'{block}.attn.q_bias' in s:
            q, v = q + s[f'{block}.attn.q_bias'], v + s[f'{block}.attn.v_bias']
        else:
            q, k, v = (part + bias for part, bias in zip((q, k, v), s[f'{block}.attn.qkv.bias'].split(C)))
        heads = [(a @ b.mT / math.sqrt(C / HEADS)).softmax(-1) @ c
                 for a, b, c in zip(*(part.split(C // HEADS, -1) for part in (q, k, v)))]
        scale = [next((s[f'{block}.{name}'] for name in (f'ls{n}.gamma', f'gamma_{n}') if f'{block}.{name}' in s), 1)
                 for n in (1, 2)]
        x = x + scale[0] * apply(f'{block}.attn.proj', torch.cat(heads, -1))
        h = normalize(f'{block}.norm2', x)
        x = x + scale[1] * (mlp(f'{block}.mlp', h) if f'{block}.mlp.fc1.bias' in s else dex(f'{block}.DEX', h))
    x = normalize('norm', x)
    return torch.cat([x[:, :1], x[:, -SIDE ** 2:]], 1)

def load(path, kind=ViT, **options):
    state, config, _ = read_checkpoint(path, **options)
    torch.manual_seed(2)
    model = kind(config)
    load_weights(model, state, path)
    return model

half = {name: value.half() for name, value in encoder('ls{}.gamma').items()}
LAYOUTS = {     # the encoder, the file that holds it, and how its publishers normalize images
    'MAE': (encoder(), lambda s: dict(model=s | decoder(), optimizer={}, epoch=800), 'imagenet'),
    'RETFound': (encoder(), lambda s: dict(model=s | decoder(), args=argparse.Namespace(lr=0.1, out='x')), 'imagenet'),
    'DINOv2': (encoder('ls{}.gamma'), lambda s: s | {'mask_token': random(1, C)}, 'imagenet'),
    'DINOv2 in training': (encoder('ls{}.gamma'), lambda s: dict(
        teacher=under('backbone.', s) | {'dino_head.last': random(3)}), 'imagenet'),
    'DeiT III': (encoder('gamma_{}', class_position=False), lambda s: dict(model=s | linear('head', 5, C)), 'imagenet'),
    'DeiT III in timm': (encoder('ls{}.gamma', class_position=False), lambda s: s | linear('head', 5, C), 'imagenet'),
    'CONCH': (encoder(), lambda s: under('visual.trunk.', s) | {
        'logit_scale': random(1), 'text.cls_emb': random(C), 'visual.attn_pool_contrast.query': random(1, C)}, 'clip'),
    'PanDerm': (encoder('gamma_{}', qkv_bias=False), lambda s: dict(model=under('encoder.', s) | {
        'encoder.mask_token': random(1, 1, C), 'decoder.norm.bias': random(C),
        'teacher.cls_token': random(1, 1, C)}), 'imagenet'),
    'DDP': (encoder(), lambda s: dict(state_dict=under('module.', under('backbone.', s)), epoch=1), 'imagenet'),
    'float16': ({name: value.float() for name, value in half.items()}, lambda s: half, 'imagenet'),
}

@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_file_in_a_published_layout_gives_the_published_features(layout, tmp_path, capsys):
    state, file, normalization = LAYOUTS[layout]
    torch.save(file(state), tmp_path / 'file.pth')
    model = load(tmp_path / 'file.pth')
    assert f'2 heads, images z-scored as {normalization}' in capsys.readouterr().out
    pixels = torch.rand(3, 3, SIZE, SIZE)
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS[normalization])
    tokens, _, outputs = model(ours(pixels))
    torch.testing.assert_close(tokens, features(state, (pixels - mean) / std), rtol=1e-5, atol=1e-5)
    assert all(output.shape == tokens.shape for output in outputs)
    torch.testing.assert_close(model.norm(outputs[-1]), tokens)

@pytest.mark.parametrize('name', ['register_tokens', 'reg_token'])
def test_registers_are_refused_by_name(name, tmp_path):
    torch.save(encoder('ls{}.gamma', registers=name, class_position=False), tmp_path / 'file.pth')
    with pytest.raises(SystemExit, match=f'file.pth: does not fit this network: missing or left over: {name}'):
        load(tmp_path / 'file.pth')

def ours(pixels):
    """Pixels (B, 3, S, S) in [0, 1] as data.py z-scores them."""
    return (pixels - torch.tensor(data.MEAN)[:, None, None]) / torch.tensor(data.STD)[:, None, None]

@pytest.mark.parametrize('name, mean, std', [
    ('imagenet', data.MEAN, data.STD),
    ('clip', [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    ('half', [0.5] * 3, [0.5] * 3)])
def test_an_option_names_the_normalization_of_the_images(name, mean, std, tmp_path):
    state, pixels = encoder(), torch.rand(2, 3, SIZE, SIZE)
    torch.save(state, tmp_path / 'timm.pth')
    theirs = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    model = load(tmp_path / 'timm.pth', normalization=name)
    torch.testing.assert_close(model(ours(pixels))[0], features(state, theirs), rtol=1e-5, atol=1e-5)

def test_an_option_names_the_heads(tmp_path, monkeypatch):
    state, pixels = encoder(), torch.rand(2, 3, SIZE, SIZE)
    torch.save(state, tmp_path / 'timm.pth')
    monkeypatch.setattr('test_checkpoints.HEADS', 4)
    model = load(tmp_path / 'timm.pth', heads=4)
    torch.testing.assert_close(model(pixels)[0], features(state, pixels), rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit, match='width must be a multiple of heads'):
        read_checkpoint(tmp_path / 'timm.pth', heads=3)

def test_a_checkpoint_that_says_what_it_is_takes_no_options(tmp_path):
    torch.save(dict(model=encoder(), config=dict(width=C, depth=L, heads=HEADS, size=SIZE, patch=P, experts=0)), tmp_path / 'a.pt')
    for options in (dict(heads=4), dict(normalization='clip')):
        with pytest.raises(SystemExit, match='a.pt: says itself what it is'):
            read_checkpoint(tmp_path / 'a.pt', **options)

def test_the_authors_dex_is_converted(tmp_path):
    state, config = authors_dex.convert(under('module.', encoder(mlp=dex_of) | decoder()))
    torch.save(dict(model=state, config=vars(config)), tmp_path / 'dex.pt')
    model, pixels = load(tmp_path / 'dex.pt'), torch.rand(3, 3, SIZE, SIZE)
    torch.testing.assert_close(model(pixels)[0], features(encoder(mlp=dex_of), pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.blocks[1].dex.usage, torch.tensor([0.25, 0.5, 0.25]))

@pytest.mark.parametrize('layout', ['MAE', 'DINOv2', 'PanDerm'])
def test_pretraining_starts_from_a_published_encoder(layout, tmp_path, capsys):
    state, file, _ = LAYOUTS[layout]
    torch.save(file(state), tmp_path / 'file.pth')
    weights, config, _ = read_checkpoint(tmp_path / 'file.pth')
    model = MAE(replace(config, decoder_width=8, decoder_depth=1, decoder_heads=1, experts=3))
    fresh = model.mask_token.detach().clone()
    if layout == 'MAE':
        weights = {name: value for name, value in weights.items() if not name.startswith('decoder_')}
    load_weights(model, weights, 'file.pth')
    assert torch.equal(model.mask_token, fresh) == (layout != 'MAE')
    pixels = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(ViT.forward(model, pixels)[0], features(state, pixels), rtol=1e-5, atol=1e-5)
    assert model(pixels)[0].isfinite().all()

def test_positions_that_shrink_are_averaged():
    grid = torch.zeros(37, 37)
    grid[::2] = 1       # stripes, of which every second would be left out
    positions = F.pad(grid.reshape(1, -1, 1), (0, 0, 1, 0), value=7)
    shrunk = resize_positions(positions, 16, 16)
    assert shrunk[0, 0] == 7 and shrunk[0, 1:].std() < 0.15
    assert F.interpolate(grid[None, None], (16, 16), mode='bicubic').std() > 0.3
    assert torch.equal(resize_positions(positions, 37, 37), positions)
    grown = F.interpolate(grid[None, None], (50, 50), mode='bicubic').flatten()
    torch.testing.assert_close(resize_positions(positions, 50, 50)[0, 1:, 0], grown)

class Code:
    """Writes a file when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')

def clip():
    """As OpenAI's, with a mask of infinities in the text tower."""
    visual = {'visual.class_embedding': random(C), 'visual.conv1.weight': random(C, 3, P, P)}
    return visual | {'attn_mask': torch.full((3, 3), -math.inf)}

def without(*names):
    return {name: value for name, value in encoder().items() if name not in names}

@pytest.mark.parametrize('content, sentence', [
    (b'hello\nworld', 'damaged, or no state dict'),
    (b'', 'damaged, or no state dict'),
    ((8).to_bytes(8, 'little') + b'{"a": 1}' + bytes(64), 'damaged, or no state dict'),         # safetensors
    (torch.zeros(3), 'damaged, or no state dict'),
    (dict(model=encoder(), config=dict(hidden_size=16)), 'damaged, or no state dict'),
    (clip(), "it has no 'cls_token', so is not a ViT as MAE or timm names it"),
    ({'conv1.weight': random(8, 3, 7, 7), 'bn1.running_mean': random(8)}, "no 'cls_token', so is not a ViT"),    # a CNN
    (dict(state_dict=without('pos_embed')), "no 'pos_embed'"),
    (without('patch_embed.proj.bias'), "no 'patch_embed.proj.bias'"),
    (without('pos_embed') | {'pos_embed': random(1, SIDE ** 2 + 2, C)}, 'no .a square grid of patches'),
    (without('patch_embed.proj.weight') | {'patch_embed.proj.weight': random(C, 1, P, P)}, 'no .* in three colours'),
    (encoder(qkv_bias=False) | {'blocks.0.attn.v_bias': None}, "no 'blocks.0.attn.v_bias'"),
    (without('norm.bias') | {'norm.bias': torch.full((C,), math.nan)}, 'hold NaN or infinity; the run .* diverged'),
    (without('norm.bias') | {'norm.bias': torch.full((C,), math.inf)}, 'hold NaN or infinity; the run .* diverged'),
    (dict(model=under('vit.', encoder()), meta={}, config={}), 'a fine-tuned run; --init takes a pretrained'),
])
def test_what_does_not_load_is_told_in_a_sentence(content, sentence, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / 'file.pt').write_bytes(content)
    else:
        torch.save(content, tmp_path / 'file.pt')
    with pytest.raises(SystemExit, match=sentence) as error:
        read_checkpoint(tmp_path / 'file.pt')
    assert str(error.value).startswith(str(tmp_path / 'file.pt')) and '\n' not in str(error.value)

@pytest.mark.parametrize('cut', [0.3, 0.9])
def test_a_cut_file_is_told(cut, tmp_path):
    torch.save(encoder(), tmp_path / 'file.pt')
    whole = (tmp_path / 'file.pt').read_bytes()
    (tmp_path / 'file.pt').write_bytes(whole[:int(cut * len(whole))])
    with pytest.raises(SystemExit, match='file.pt: damaged, or no state dict'):
        read_checkpoint(tmp_path / 'file.pt')

def test_torchscript_is_told(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'ViT-B-32.pt')
    with pytest.raises(SystemExit, match='ViT-B-32.pt: damaged, or no state dict'):
        read_checkpoint(tmp_path / 'ViT-B-32.pt')

@pytest.mark.parametrize('plain', [False, True])
def test_code_in_a_file_does_not_run(plain, tmp_path):
    content = encoder() | dict(args=argparse.Namespace(code=Code(tmp_path / 'ran')))
    if plain:
        (tmp_path / 'file.pt').write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / 'file.pt')
    with pytest.raises(SystemExit, match='damaged, or no state dict of torch.save without code in it'):
        read_checkpoint(tmp_path / 'file.pt')
    assert not (tmp_path / 'ran').exists()

@pytest.mark.parametrize('name', ['missing.pt', '.'])
def test_a_missing_file_is_told(name, tmp_path):
    with pytest.raises(SystemExit, match='No such file|Is a directory'):
        read_checkpoint(tmp_path / name)

@pytest.mark.parametrize('extra, named', [
    ({'blocks.0.attn.relative_position_bias_table': random(9, 2)}, 'relative_position_bias_table'),       # BEiT's own
    ({'norm_pre.weight': random(C)}, 'norm_pre'),                                                       # CLIP in timm
    ({'blocks.0.DEX.router.linear.bias': random(3)}, 'router.linear.bias'),
    ({'blocks.1.attn.q_norm.weight': random(64)}, 'q_norm')])
def test_a_part_that_we_do_not_have_is_refused(extra, named, tmp_path):
    torch.save(encoder() | extra, tmp_path / 'file.pth')
    with pytest.raises(SystemExit, match=f'does not fit this network: missing or left over: .*{named}'):
        load(tmp_path / 'file.pth')
