"""Fine-tuning of other people's encoders: published checkpoints, and the user's Python file."""
import hashlib
import signal
import sys

import numpy as np
import pytest
import torch

from tests.support import files, layouts, runs, tasks

pytestmark = pytest.mark.slow     # whole trainings, and many of them

# --- published checkpoints ----------------------------------------------------------------------

def write_published(folder, *options, **shapes):
    """Write a ViT as its publisher saves it, with a head that is not ours, and convert it to
    folder/vit.pt: its state dict, and what the converter printed."""
    state = layouts.vit(**dict(width=64, depth=4, patch=16, side=3) | shapes)
    head = {'head.weight': torch.zeros(10, 64), 'head.bias': torch.zeros(10)}
    torch.save(state | head, folder / 'vit.pth')
    options = options or ('--normalization', 'imagenet')
    result = runs.program('published', folder / 'vit.pth', folder / 'vit.pt', *options)
    assert result.code == 0, result.err
    return state, result.out

@pytest.mark.parametrize('adapt', ['director', 'experts'])
def test_a_published_encoder_keeps_its_features(tmp_path, adapt):
    """Also with eight experts, which start as copies of its MLP, so that it does not matter which
    of them an image activates."""
    state, said = write_published(tmp_path)
    assert f'--init {tmp_path / "vit.pt"}' in said
    found = tasks.encoder(init=str(tmp_path / 'vit.pt'), adapt=adapt)
    assert found.init == str(tmp_path / 'vit.pt')
    assert found.config.experts == (0 if adapt == 'director' else 8)
    assert (found.config.size, found.config.patch, found.config.heads) == (48, 16, 1)
    images = torch.randn(2, 3, 48, 48)
    expected = layouts.features(state, images, heads=1)
    torch.testing.assert_close(found.vit(images)[0], expected, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('script', ['pretrain', 'finetune'])
def test_a_published_encoder_that_is_not_converted_is_told_how(
        sources, labelled, tmp_path, script):
    write_published(tmp_path)
    if script == 'pretrain':
        result = runs.pretraining(sources.folder, tmp_path / 'out', init=tmp_path / 'vit.pth')
    else:
        result = runs.finetuning(labelled / 'tell', tmp_path / 'out', init=tmp_path / 'vit.pth')
    command = f'python -m tests.encoders.published {tmp_path / "vit.pth"}'
    runs.ends(result, naming=[tmp_path / 'vit.pth', command])
    assert not (tmp_path / 'out').exists()

def test_what_is_converted_takes_no_file_s_place(tmp_path):
    write_published(tmp_path)
    before = (tmp_path / 'vit.pt').read_bytes()
    for ours in ('vit.pt', 'vit.pth'):
        result = runs.program('published', tmp_path / 'vit.pth', tmp_path / ours)
        runs.ends(result, naming=[tmp_path / ours, 'exists'])
    assert (tmp_path / 'vit.pt').read_bytes() == before

def test_a_director_is_a_plain_vit_in_the_names_of_timm(pretrained, tmp_path):
    """So others can read what is exported as the README does, and we ourselves can."""
    vit = tasks.encoder(init=str(pretrained), adapt='director').vit
    assert vit.state_dict().keys() == layouts.vit(width=64, depth=4).keys()
    images = torch.randn(2, 3, tasks.SIDE, tasks.SIDE)
    expected = layouts.features(vit.state_dict(), images, heads=1)
    torch.testing.assert_close(vit(images)[0], expected, atol=1e-4, rtol=1e-4)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    words = tmp_path / 'vit.pth', tmp_path / 'vit.pt', '--normalization', 'imagenet'
    assert runs.program('published', *words).code == 0
    again = tasks.encoder(init=str(tmp_path / 'vit.pt'), adapt='director').vit
    assert torch.equal(vit(images)[0], again(images)[0])

def test_patches_of_14_reach_unetr_when_their_kernels_are_resized(labelled, tmp_path):
    """As those of DINOv2."""
    write_published(tmp_path, patch=14, side=2)
    options = dict(init=tmp_path / 'vit.pt', adapt='director', epochs=1)
    tasks.tune(labelled / 'find', tmp_path / 'out', patch=16, **options)
    found = runs.results(tmp_path / 'out')
    assert found['config']['patch'] == 16
    assert found['method'] == 'DEX-D-vit'

def test_heads_and_normalization_of_a_published_encoder_are_options_of_the_converter(tmp_path):
    found = []
    for name, options in dict(plain=(), other=('--heads', 4, '--normalization', 'half')).items():
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        write_published(tmp_path / name, *options)
        found.append(tasks.encoder(init=str(tmp_path / name / 'vit.pt'), adapt='director'))
    plain, other = found
    assert (plain.config.heads, other.config.heads) == (1, 4)
    assert torch.equal(plain.vit.blocks[0].mlp.fc1.weight, other.vit.blocks[0].mlp.fc1.weight)
    ratio = other.vit.patch_embed.proj.weight / plain.vit.patch_embed.proj.weight
    deviations = torch.tensor([0.229, 0.224, 0.225])[:, None, None] / 0.5
    torch.testing.assert_close(ratio, deviations.expand_as(ratio))

def test_a_normalization_that_nobody_knows_is_refused(tmp_path):
    torch.save(layouts.vit(), tmp_path / 'vit.pth')
    words = tmp_path / 'vit.pth', tmp_path / 'vit.pt', '--normalization', 'CLIP'
    runs.ends(runs.program('published', *words), naming=['--normalization', 'imagenet', 'half'])
    assert not (tmp_path / 'vit.pt').exists()

# --- a file of the user's -----------------------------------------------------------------------

OWN = '''
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.patch, self.width, self.depth = 16, 24, 4
        self.stem = nn.Conv2d(3, 24, 16, 16)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        x = self.stem(images).flatten(2).mT
        outputs = []
        for layer in self.layers:
            x = x + self.dropout(layer(x).relu())
            outputs.append(torch.cat([x.mean(1, keepdim=True), x], 1))
        return outputs[-1], None, outputs

def encoder(size):
    torch.manual_seed(0)
    return Encoder(size)
'''

@pytest.fixture
def own(tmp_path):
    """The file of an encoder."""
    return files.write(tmp_path / 'own.py', OWN)

@pytest.fixture(scope='module', params=['find', 'tell'])
def own_run(request, labelled, tmp_path_factory):
    """A finished fine-tuning of the encoder: its task, its file, its folder."""
    folder = tmp_path_factory.mktemp('own')
    file, out = files.write(folder / 'own.py', OWN), folder / 'out'
    tasks.tune(labelled / request.param, out, init=file, adapt='director', epochs=2)
    return request.param, file, out

def test_results_say_which_file_the_encoder_was(own_run):
    _, file, out = own_run
    found = runs.results(out)
    assert found['method'] == 'DEX-D-own'
    assert found['sha256'] == hashlib.sha256(file.read_bytes()).hexdigest()
    config = found['config']
    assert (config['patch'], config['width'], config['depth']) == (16, 24, 4)

def test_its_weights_are_trained_with_the_head(own_run):
    _, _, out = own_run
    before = tasks.encoder(tasks.SIDE, init=str(out.parent / 'own.py'), adapt='director').vit
    after = runs.weights(out / 'ckpt.pt')
    for name, value in before.state_dict().items():
        assert not torch.equal(after[f'vit.{name}'], value), name

def test_it_has_no_dropout(own):
    vit = tasks.encoder(tasks.SIDE, init=str(own), adapt='director').vit
    images = torch.randn(2, 3, tasks.SIDE, tasks.SIDE)
    assert torch.equal(vit(images)[0], vit(images)[0])

def test_stopped_and_resumed_it_is_as_never_stopped(labelled, own_run, tmp_path, signal_at):
    task, file, whole = own_run
    options = dict(init=file, adapt='director', epochs=2)
    signal_at(0, signal.SIGTERM)
    result = runs.finetuning(labelled / task, tmp_path, **options)
    assert result.code == 128 + signal.SIGTERM
    assert runs.weights(tmp_path / 'ckpt.pt', 'done') == 1
    tasks.tune(labelled / task, tmp_path, resume=True, **options)
    assert runs.results(tmp_path)['scores'] == runs.results(whole)['scores']
    assert runs.equal(runs.weights(tmp_path / 'ckpt.pt'), runs.weights(whole / 'ckpt.pt'))

def test_it_predicts(own_run, tmp_path):
    task, _, out = own_run
    image = np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8)
    files.save(tmp_path / 'a.png', image)
    result = runs.program('finetune', '--predict', tmp_path / 'a.png', '--out', out)
    assert result.code == 0, result.err
    made = sorted(path.name for path in (out / 'predictions').rglob('*') if path.is_file())
    assert made == (['a.png-mask.png', 'a.png-overlay.png'] if task == 'find' else ['classes.csv'])

def test_a_run_goes_on_and_predicts_only_with_the_file_it_began_with(
        labelled, own, tmp_path, signal_at):
    options = dict(init=own, adapt='director', out=tmp_path / 'out')
    signal_at(0, signal.SIGTERM)
    runs.finetuning(labelled / 'tell', **options)
    tasks.tune(labelled / 'tell', resume=True, **options)
    own.write_text(OWN + '# changed')
    predicted = runs.program('finetune', '--predict', 'a.png', '--out', tmp_path / 'out')
    runs.ends(predicted, naming=[own, 'is not what', tmp_path / 'out' / 'best.pt'])
    (tmp_path / 'out' / 'results.json').unlink()
    resumed = runs.finetuning(labelled / 'tell', resume=True, **options)
    runs.ends(resumed, naming=[tmp_path / 'out' / 'ckpt.pt', 'sha256'])

@pytest.mark.parametrize('old, new, named', [
    ('def encoder', 'def decoder', "KeyError('encoder')"),
    ('self.patch, self.width, self.depth =', '_ =', "no attribute 'patch'"),
    ('self.depth = 16, 24, 4', 'self.depth = 16, 24, 6', '4 outputs for 6 blocks'),
    ('torch.cat([x.mean(1, keepdim=True), x], 1)', 'x', '(2, 4, 24)'),
    ('outputs.append(', 'outputs.append(x.new_tensor(float("nan")) * ', 'finite'),
    ('return outputs[-1]', 'outputs[1] = outputs[1] / 0\n        return outputs[-1]', 'finite'),
    ('return outputs[-1]', 'outputs[2] = outputs[2].double()\n        return outputs[-1]',
     'float32'),
    ('return outputs[-1]', 'return outputs[-1].half()', 'float32'),
    ('return outputs[-1]', 'outputs[0] = outputs[0].detach()\n        return outputs[-1]',
     'gradient'),
    ('outputs.append(', 'x = x.detach()\n            outputs.append(', 'gradient'),
    ('import torch', 'import nothing_like_it', "No module named 'nothing_like_it'")])
def test_a_file_that_is_no_encoder_is_refused(labelled, own, tmp_path, old, new, named):
    """Without the function, without a size, of fewer blocks or tokens than it says, of outputs that
    are not finite, of another precision or without a gradient, or broken. The sentence names the
    file that is the pattern."""
    assert old in OWN
    own.write_text(OWN.replace(old, new, 1))
    result = runs.finetuning(labelled / 'find', tmp_path / 'out', init=own, adapt='director')
    runs.ends(result, naming=[own, named, 'tests/encoders/timm_encoder.py'])
    assert not (tmp_path / 'out').exists()

@pytest.fixture
def with_helper(own):
    """The same file, which takes its number of blocks from another file beside it."""
    files.write(own.parent / 'helper_of_own.py', 'DEPTH = 4\n')
    own.write_text(OWN.replace('24, 4\n', '24, DEPTH\n').replace(
        'import torch\n', 'import torch\nfrom helper_of_own import DEPTH\n', 1))
    yield own
    sys.modules.pop('helper_of_own', None)

def test_a_file_may_import_what_lies_beside_it(with_helper, labelled, tmp_path):
    """Also where another folder is worked in; when it is loaded, the path is as before."""
    before = list(sys.path)
    init = dict(init=with_helper, adapt='director', epochs=1)
    result = runs.program('finetune', *runs.finetune_words(labelled / 'tell', 'out', **init),
                          cwd=files.parent(tmp_path / 'elsewhere' / 'out').parent)
    assert result.code == 0, result.err
    assert sys.path == before

@pytest.mark.parametrize('options', [
    dict(adapt='experts'), dict(tune_blocks=0), dict(patch=8), dict(top_k=1)])
def test_options_that_mean_nothing_to_a_file_are_refused(labelled, own, tmp_path, options):
    options = dict(adapt='director') | options
    result = runs.finetuning(labelled / 'find', tmp_path / 'out', init=own, **options)
    runs.ends(result, naming=[own, '--adapt director', '--top_k', '--patch', '--tune_blocks'])
    assert not (tmp_path / 'out').exists()
