"""The programs of tests/ each do their work once, and every command that is written down is one
that its program understands."""
import ast
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pretrain
from model import MAE, Config
from tests.support import commands, files, layouts, prepared, runs, tasks

# All that is written for users, as one text.
READMES = [runs.ROOT / 'README.md', *sorted((runs.ROOT / 'tests').glob('**/*.md'))]
README = READMES[0].read_text()
EVERYTHING = '\n'.join(path.read_text() for path in READMES)

def find(name):
    """A file of tests/ or .github/, in whichever of their folders it lies."""
    found, = [*(runs.ROOT / 'tests').rglob(name), *(runs.ROOT / '.github').rglob(name)]
    return found

# --- every command is understood --------------------------------------------------------------

def check(found, parse=commands.parse):
    """Have commands parsed: how often each program is called, and what is wrong, a line each."""
    called, errors = Counter(), []
    for words in found:
        try:
            called[parse(words)] += 1
        except ValueError as error:
            errors.append(str(error))
    return called, errors

def test_every_command_of_the_readmes_is_understood():
    called, errors = check(commands.in_markdown(EVERYTHING))
    assert errors == []
    assert called['prepare_medverse'] >= 5 and called['finetune'] >= 4 and called['pretrain'] >= 4
    programs = {name for names in runs.PACKAGES.values() for name in names}
    assert called.keys() >= {'pip', 'pytest', *programs - {'predict', 'two_ranks', 'phantoms'}}

def test_each_readme_has_commands():
    assert {path.parent.name for path in READMES} >= {'tests', 'encoders'}
    for path in READMES:
        assert commands.in_markdown(path.read_text()), path

def test_every_option_that_the_readme_names_exists():
    """Those in running text and in tables, with their values, where they have values."""
    found = commands.fragments(README)
    assert len(found) >= 10
    assert check(found, commands.parse_fragment)[1] == []

def test_every_file_that_the_readme_names_exists():
    inline = commands.inline_code(README)
    named = [code for code in inline if code.endswith(('.py', '.sh')) and ' ' not in code]
    assert len(named) >= 6
    assert check(named, commands.must_exist)[1] == []

def test_every_command_in_the_first_lines_of_a_script_is_understood():
    scripts = [path for folder in ('.', 'tests/lab', 'tests/encoders', '.github')
               for path in (runs.ROOT / folder).glob('*.py')]
    found = {}
    for script in scripts:
        docstring = ast.get_docstring(ast.parse(script.read_text()), clean=False) or ''
        found[script.stem] = commands.in_docstring(docstring)
    programs = {name for names in runs.PACKAGES.values() for name in names}
    for name in {*runs.SCRIPTS, *programs, 'timm_encoder'} - {'two_ranks'}:
        assert found[name], name
    assert check(sum(found.values(), []))[1] == []

@pytest.fixture(scope='module')
def experiments(tmp_path_factory):
    """The commands of experiments.sh for one seed, run by a python that only writes them down."""
    folder = tmp_path_factory.mktemp('experiments')
    return commands.run_recording(find('experiments.sh'), folder, 'REAL', SEEDS='0')

def test_every_command_of_the_experiments_is_understood(experiments):
    """Two trainings keep snapshots, by Python that takes the options of pretrain.py."""
    keeping = [words for words in experiments if words[1] == '-c']
    found = experiments + [['python', 'pretrain.py', *words[3:]] for words in keeping]
    called, errors = check(found)
    assert errors == []
    assert called['prepare_medverse'] == 5
    assert called['pretrain'] == 16 and called['-c'] == 2
    assert called['finetune'] > 50
    assert called['modularity'] == 1
    assert called['probe'] == 8

def test_no_run_of_the_experiments_takes_the_place_of_another(experiments):
    """What has options of its own has a folder of its own."""
    tunings = {tuple(words) for words in experiments if 'finetune.py' in words}
    folders = {words[words.index('--out') + 1] for words in tunings}
    assert len(folders) == len(tunings)

def test_a_rehearsal_of_the_experiments_has_the_same_runs_but_shorter(experiments, tmp_path):
    """It touches no run of theirs: all that it writes, tasks aside, lies in a folder of its own."""
    script = find('experiments.sh')
    rehearsal = commands.run_recording(script, tmp_path, 'REAL', SEEDS='0', REHEARSAL='10')
    assert len(rehearsal) == len(experiments)
    assert check(rehearsal)[1] == []
    for words, long in zip(rehearsal, experiments):
        assert words[1] == long[1]
        if {'pretrain.py', 'finetune.py', '-c'} & set(words):
            assert words[words.index('--out') + 1].startswith('out/rehearsal-10/')
            for option in {'--steps', '--epochs'} & set(words):
                count, most = [int(w[w.index(option) + 1]) for w in (words, long)]
                assert 1 <= count <= most // 8 or option == '--epochs' and count == 1

def test_the_experiments_keep_the_networks_of_a_fifth_and_half_of_the_steps(
        experiments, sources, tmp_path, monkeypatch, signal_at):
    """They are those at which the same training stops, and the training goes on unchanged."""
    code, = {words[2] for words in experiments if words[1] == '-c'}
    out = tmp_path / 'whole'
    words = runs.pretrain_words(sources.folder, out, steps=10)
    for name in ('train', 'write_line'):        # monkeypatch puts them back afterwards
        monkeypatch.setattr(pretrain, name, getattr(pretrain, name))
    monkeypatch.setattr(sys, 'argv', ['-c', *words])
    with runs.kept_signals():
        exec(code, {})
    monkeypatch.undo()
    assert {path.name for path in out.glob('step-*')} == {'step-2.pt', 'step-5.pt'}
    signal_at(4, signal.SIGTERM)
    stopped = tmp_path / 'stopped'
    assert runs.pretraining(sources.folder, stopped, steps=10).code == 143
    kept, there = [runs.weights(path, None) for path in (out / 'step-5.pt', stopped / 'ckpt.pt')]
    assert kept['done'] == there['done'] == 5 and kept['config'] == there['config']
    assert runs.equal(kept['model'], there['model'])
    assert runs.pretraining(sources.folder, stopped, steps=10, resume=True).code == 0
    assert runs.equal(runs.weights(out / 'ckpt.pt'), runs.weights(stopped / 'ckpt.pt'))

@pytest.mark.parametrize('command', [
    'python finetune.py --epoch 8', 'python finetune.py --epochs eight',
    'python finetune.py --adapt directors', 'python pretrain.py --demo=perhaps',
    'torchrun --nproc_per_nodes=2 pretrain.py', 'python prepare_medverse.py --raw RAW --outlines',
    'python tests/none.py out/*', 'python -m tests.lab.none out/*',
    'python -m tests.lab.pictures --colour out/demo', 'python -m tests.lab.report --seeds out/*',
    'python -m tests.encoders.published a.pth b.pt --normalization CLIP',
    'python -m tests.encoders.published a.pth', 'pip install -r requirement.txt'])
def test_a_typo_in_a_command_is_found(command):
    """That is, the tests above can fail."""
    words, = commands.in_markdown(f'Text, then `{command}`, and text.')
    assert len(check([words])[1]) == 1

@pytest.mark.parametrize('code', ['--fractions 0.4', '--adapt directors', '--pool cls|max'])
def test_a_typo_in_an_option_is_found(code):
    found = commands.fragments(f'Text, then `{code}`.')
    assert len(check(found, commands.parse_fragment)[1]) == 1

def test_a_readme_exports_the_encoder_as_a_plain_vit(pretrained, tmp_path, monkeypatch):
    """Its one-line program, run as it is, writes a file in timm's names."""
    code, = [words[2] for words in commands.in_markdown(EVERYTHING) if words[1:2] == ['-c']]
    (tmp_path / 'out' / 'demo').mkdir(parents=True)
    shutil.copy(pretrained, tmp_path / 'out' / 'demo' / 'ckpt.pt')
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    state = torch.load('vit.pt', weights_only=True)
    assert state.keys() == layouts.vit(depth=4).keys()

# --- the programs -----------------------------------------------------------------------------

def test_phantoms_are_ten_modalities(tmp_path):
    words = '--raw', tmp_path / 'raw', '--out', tmp_path / 'out', '--size', 32, '--count', 2
    assert runs.program('phantoms', *words).code == 0
    out = prepared.Prepared(tmp_path / 'out')
    assert len(out.names) == 10
    assert {out.meta(name)['modality'] for name in out.names} >= {'CT', 'PET', 'MR', 'Fundus'}
    for name in out.names:
        assert out.images(name).shape[1:3] == (32, 32)
        assert out.images(name).std() > 5, name

def test_phantoms_say_which_tasks_they_have():
    result = runs.program('phantoms', '--task', 'phantom-none', '--out', 'x')
    runs.ends(result, naming=['--task', 'phantom-vessels', 'phantom-organs', 'phantom-lesion'])

def test_report_makes_a_table_of_real_runs(tuned):
    result = runs.program('report', *tuned.iterdir())
    assert result.code == 0 and result.err == ''
    assert len(result.out.splitlines()) == 4
    for name, score in (('find', 'dice'), ('tell', 'f1')):
        mean = runs.results(tuned / name)['scores'][score]['mean']
        line, = [line for line in result.out.splitlines() if line.startswith(f'| {name} |')]
        assert line.endswith(f'| {mean:.3f} | 1 |')

def test_scaling_draws_its_curves(tuned, tmp_path):
    """Of runs that differ in the share of the images, in blocks and in activated experts."""
    found = runs.results(tuned / 'tell')
    variants = dict(all={}, some=dict(fraction=0.4), one=dict(tune_blocks=1), single=dict(top_k=1))
    network = Path(found['init']).parent.name
    for name, changes in variants.items():
        run = found | dict(options=found['options'] | changes)
        if 'top_k' in changes:
            run['config'] = found['config'] | changes
        files.write(tmp_path / name / 'results.json', json.dumps(run))
    result = runs.program('scaling', *(tmp_path / name for name in variants), cwd=tmp_path)
    assert result.code == 0, result.err
    width, height = runs.module('pictures').PANEL
    assert Image.open(tmp_path / 'scaling.png').size == (2 * width, 2 * height)
    score = found['scores']['f1']['mean']
    for what, first, second in (('activated experts', 1, 2), ('tuned blocks', 1, 4),
                                ('share of the training images', 0.4, 1)):
        points = f'{first}: {score:.3f} ± 0.000, {second}: {score:.3f} ± 0.000'
        assert f'tell: {what}, {network}: {points}' in result.out

def test_scaling_without_runs_ends_in_a_sentence(tmp_path):
    runs.ends(runs.program('scaling', tmp_path), naming='fine-tuning')

@pytest.mark.parametrize('experts', [0, 3])
def test_modularity_has_a_row_for_each_layer_of_each_network(tmp_path, experts):
    """Also of random weights and, where there are experts, of the director alone."""
    path = tasks.write_pretrained(tmp_path / 'ckpt.pt', experts=experts)
    content = runs.weights(path, None)
    options = dict(seed=0, steps=9, align=0.1)
    torch.save(content | dict(options=options), path)
    result = runs.program('modularity', path, '--bodies', 3)
    assert result.code == 0, result.err
    rows = [line for line in result.out.splitlines() if line.startswith('| ')][1:]
    assert len(rows) == 4 * (3 if experts else 2)
    assert sum('random weights' in row for row in rows) == 4
    assert sum('its director alone' in row for row in rows) == (4 if experts else 0)

# --- benchmarks -------------------------------------------------------------------------------

SMALL = dict(width=48, heads=3, depth=2, decoder_width=24, decoder_heads=2, decoder_depth=1)

@pytest.mark.slow
def test_bench_runs_the_real_steps(sources):
    """As a process of its own, since it puts clocks into torch."""
    sizes = dict(model='tiny', depth=1, size=32, patch=8, batch=4)
    words = runs.words(data=sources.folder, device='cpu', **sizes)
    result = runs.finish(runs.start('bench', 'run', *words))
    assert result.code == 0, result.err
    *lines, last = result.out.splitlines()
    names = {line.strip().split('  ')[0] for line in lines}
    assert {'DEX', 'images/s', 'data', 'forward', 'backward', 'optimizer', 'GEMA'} <= names
    assert last.startswith('FLOP-normalised efficiency of DEX against MAE')

def test_the_obvious_implementation_of_bench_has_our_losses():
    """Also in the second step, after a first with AdamW and GEMA."""
    bench, losses = runs.module('bench'), {True: [], False: []}
    images = torch.randn(3, 3, 32, 32)
    for ours in (True, False):
        torch.manual_seed(0)
        model = MAE(Config(size=32, patch=8, experts=4, **SMALL))
        if not ours:
            for block in model.blocks:
                block.dex = bench.ObviousDEX(block.dex)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=1e-6, fused=ours)
        for seed in (0, 1):
            loss, *_ = bench.step(model, trained, optimizer, images, seed, ours, bf16=False)
            losses[ours].append(loss)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][0] != losses[True][1]

def test_bench_compares_gates_and_measures_data_and_memory(tmp_path, monkeypatch, capsys):
    """At sizes that take no time, of a small network."""
    bench = runs.module('bench')
    monkeypatch.setattr(bench, 'GATES', ((64, 2),))
    bench.gates(Config(**SMALL))
    bench.images_per_second(tmp_path, files=2, count=200, batch=4)
    monkeypatch.setattr(bench, 'named_config', lambda name: Config(**SMALL))
    bench.memory()
    out = capsys.readouterr().out
    assert 'image-wise gate' in out and 'token-wise gate' in out
    assert all(f'{state}, {threads} threads: ' in out
               for state in ('cold', 'warm') for threads in (1, 2, 4))
    assert all(f'{name}: ' in out for name in ('tiny', 'small', 'base'))

def test_bench_says_what_it_can_measure():
    listed = [words[3] for words in commands.in_docstring(runs.program('bench').out)]
    assert {*commands.BENCHMARKS} <= {*listed}

@pytest.mark.parametrize('words', [('runs',), ('step', 'fp16'), ('ranks',), ('data', 'x')], ids=str)
def test_bench_names_what_it_cannot_measure(words):
    runs.ends(runs.program('bench', *words), naming=words)

def test_bench_prepare_compares_with_the_bare_readers(monkeypatch):
    """On a few small files."""
    def write_few(raw):
        for kind in ('png', 'jpg'):
            files.save(raw / kind / 'Photo' / 'source' / f'0.{kind}', files.texture(0))
        volume = np.stack([files.ramp(-200, 400, 'i2')] * 6, 2)
        files.nifti(raw / 'nii.gz' / 'CT' / 'source' / '0.nii.gz', volume)

    bench_prepare = runs.module('bench_prepare')
    monkeypatch.setattr(bench_prepare, 'write_files', write_few)
    result = runs.program('bench_prepare')
    assert result.code == 0, result.err
    kinds = [line.split(':')[0] for line in result.out.splitlines()]
    assert kinds == ['png', 'jpg', 'nii.gz', 'largest memory of a process']
    assert result.out.count('times the bare rate') == 3

# --- other people's encoders, and the picture of the idea ---------------------------------------

def test_a_checkpoint_of_the_authors_becomes_one_of_ours(tmp_path):
    theirs, ours = layouts.vit(dex=True), tmp_path / 'ours.pt'
    torch.save(theirs, tmp_path / 'theirs.pth')
    result = runs.program('authors_dex', tmp_path / 'theirs.pth', ours)
    assert result.code == 0, result.err
    found = tasks.encoder(init=str(ours))
    assert found.config.experts == 3
    images = torch.randn(2, 3, layouts.SIZE, layouts.SIZE)
    expected = layouts.features(theirs, images)
    torch.testing.assert_close(found.vit(images)[0], expected, rtol=1e-4, atol=1e-4)

class Trunk(nn.Module):
    """What timm_encoder.py uses of a ViT of timm, with images z-scored by 0.5 and 0.5."""
    embed_dim, default_cfg = 24, dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 24, 16, 16)
        self.patch_embed.patch_size = 16, 16
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.norm = nn.LayerNorm(24)

    def forward_intermediates(self, images, intermediates_only, return_prefix_tokens):
        self.seen = images
        x, outputs = self.patch_embed(images), []
        for block in self.blocks:
            x = x + block(x.movedim(1, 3)).movedim(3, 1)
            outputs.append((x, x.mean((2, 3))[:, None]))
        return outputs

def test_a_vit_of_timm_is_an_encoder(labelled, tmp_path, monkeypatch):
    """With a stand-in for timm, which is not among our packages: the pixels reach it z-scored as it
    wants them, and what it returns is fine-tuned."""
    timm = ModuleType('timm')
    timm.create_model = lambda name, **options: Trunk()
    monkeypatch.setitem(sys.modules, 'timm', timm)
    init = dict(init=str(find('timm_encoder.py')), adapt='director')
    vit = tasks.encoder(tasks.SIDE, **init).vit
    pixels = torch.rand(2, 3, tasks.SIDE, tasks.SIDE)
    tokens, _, outputs = vit(layouts.normalized(pixels))
    torch.testing.assert_close(vit.trunk.seen, (pixels - 0.5) / 0.5)
    torch.testing.assert_close(tokens, vit.trunk.norm(outputs[-1]))
    tasks.tune(labelled / 'find', tmp_path, epochs=1, **init)
    assert runs.results(tmp_path)['method'] == 'DEX-D-timm_encoder'

def test_the_picture_of_the_idea_is_what_its_program_draws(tmp_path):
    script = find('idea.py')
    copy = tmp_path / script.relative_to(runs.ROOT)
    (tmp_path / '.github').mkdir()
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(script, copy)
    subprocess.run([sys.executable, copy], check=True)
    pictures = [Image.open(root / '.github' / 'idea.png') for root in (runs.ROOT, tmp_path)]
    ours, drawn = (np.asarray(picture.convert('RGB'), int) for picture in pictures)
    assert ours.shape == drawn.shape
    assert np.abs(ours - drawn).mean() < 1

# --- experts for each token -----------------------------------------------------------------------

def test_token_routing_trains_tunes_and_is_taken_for_no_other_network(
        sources, labelled, tmp_path):
    """Each program of its own is in a process of its own, since it changes model.DEX."""
    def start(program, *words):
        command = [sys.executable, '-m', 'tests.lab.token_routing', program, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT)

    out = tmp_path / 'out'
    result = start('pretrain', *runs.pretrain_words(sources.folder, out, steps=2))
    assert result.returncode == 0, result.stderr
    found = runs.weights(out / 'ckpt.pt')
    assert found['blocks.1.dex.by_token'] and runs.read_log(out)[-1]['bits']
    words = runs.finetune_words(labelled / 'tell', tmp_path / 'tuned', init=out / 'ckpt.pt', steps=1)
    runs.ends(runs.program('finetune', *words), naming=[out / 'ckpt.pt', 'dex.by_token'])
    result = start('finetune', *words)
    assert result.returncode == 0, result.stderr
    assert 'vit.blocks.1.dex.by_token' in runs.weights(tmp_path / 'tuned' / 'best.pt')
    files.save(tmp_path / 'x.png', np.zeros((9, 9), np.uint8))
    result = start('finetune', '--predict', tmp_path / 'x.png', '--out', tmp_path / 'tuned')
    assert result.returncode == 0, result.stderr
