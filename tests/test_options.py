"""The options of the scripts: how they are written, what is refused, what --help says."""
import ast
import dataclasses
import re
from dataclasses import dataclass

import pytest

import finetune
import pretrain
from pretrain import parse_options
from tests.support import runs
from tests.support.runs import ends, program

@dataclass
class Settings:
    name: str = 'base'      # a word
    count: int = 3          # a number, 100% whole
    rate: float = 1e-4      # any number
    fast: bool = False      # yes or no
    files: tuple = ()       # as many as there are

def parse(line):
    return parse_options(Settings(), line.split())

# --- Values ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('line, field, value', [
    ('--count 5', 'count', 5),
    ('--count=5', 'count', 5),
    ('--count 0', 'count', 0),
    ('--rate 3', 'rate', 3.0),
    ('--rate 2e-3', 'rate', 0.002),
    ('--name big', 'name', 'big'),
    ('--name a=b=c', 'name', 'a=b=c'),
    ('--name=a=b=c', 'name', 'a=b=c'),
    ('--name=', 'name', ''),
    ('--fast', 'fast', True),
    ('--no-fast', 'fast', False),
    ('--fast --no-fast', 'fast', False),
])
def test_an_option_is_set_as_name_and_value(line, field, value):
    options = vars(parse(line))
    assert type(options[field]) is type(value)
    assert options == vars(Settings()) | {field: value}

def test_a_list_takes_all_words_up_to_the_next_option():
    options = parse('--files a.png b.nii --count 2')
    assert list(options.files) == ['a.png', 'b.nii']
    assert options.count == 2

def test_the_command_line_is_read_where_no_words_are_given(monkeypatch):
    monkeypatch.setattr('sys.argv', ['script.py', '--count', '7'])
    assert parse_options(Settings()).count == 7

def test_options_change_the_defaults_that_they_are_given():
    """As in the demo, whose defaults are not those of the class."""
    options = parse_options(Settings(name='demo', count=9), ['--rate', '1'])
    assert options == Settings(name='demo', count=9, rate=1.0)

# --- What is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize('line, named', [
    ('--count 0.5', '--count'),
    ('--count=three', '--count'),
    ('--rate fast', '--rate'),
    ('--fast=maybe', '--fast'),
    ('--fast=false', '--fast'),
    ('--fast false', 'false'),
    ('--no-count', '--no-count'),
    ('--cuont 5', '--cuont'),
    ('--coun 5', '--coun'),
    ('--count', '--count'),
    ('stray', 'stray'),
])
def test_a_wrong_option_ends_the_program_and_is_named(capsys, line, named):
    with pytest.raises(SystemExit) as error:
        parse(line)
    assert error.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]

@pytest.mark.parametrize('line, named', [
    ('--count -5', ('--count', '-5')),
    ('--rate=-1e-3', ('--rate', '-0.001')),
    ('--rate nan', ('--rate', 'nan')),
    ('--rate inf', ('--rate', 'inf')),
])
def test_a_number_below_zero_or_without_end_is_refused(line, named):
    with pytest.raises(SystemExit) as error:
        parse(line)
    ends(error, naming=named)

@pytest.mark.parametrize('script', runs.SCRIPTS)
@pytest.mark.parametrize('words, named', [
    (['--cuont', 5], '--cuont'),
    (['--see', 5], '--see'),        # no short forms: --seed is meant today, and another tomorrow
    (['--seed', 'x'], '--seed'),
    (['--seed'], '--seed'),
    (['--seed', -1], '--seed'),
    (['stray'], 'stray'),
])
def test_each_script_names_the_option_that_is_wrong(script, words, named, tmp_path):
    ends(program(script, *words, cwd=tmp_path), naming=named)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('options, named', [
    (dict(batch=0), '--batch'),
    (dict(accumulate=0), '--accumulate'),
    (dict(log_every=0), '--log_every'),
    (dict(clip=0), '--clip'),
    (dict(steps=0, epochs=0), ('--epochs', '--steps')),
    (dict(val_share=1.5), '--val_share'),
    (dict(warmup=1.5), '--warmup'),
    (dict(momentum=3), '--momentum'),
    (dict(lr='nan'), ('--lr', 'nan')),
    (dict(warmup='inf'), ('--warmup', 'inf')),
    (dict(device='gpu'), ('--device', 'gpu')),
    (dict(device='cuda:99'), ('--device', 'cuda:99')),
    (dict(model='giant'), ('giant', 'tiny')),
    (dict(size=30), ('size', '30', 'patch')),
    (dict(top_k=5), 'top_k'),
    (dict(batch=100), ('64', '100')),       # of 64 training images not even one step can be made
    (dict(init='missing.pt'), 'missing.pt'),
])
def test_a_pretraining_that_cannot_work_ends_in_a_sentence(sources, tmp_path, options, named):
    ends(runs.pretraining(sources.folder, tmp_path / 'out', **options), naming=named)
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('options, named', [
    (dict(batch=0), '--batch'),
    (dict(epochs=0), ('--epochs', '--steps')),
    (dict(adapt='directors'), ('--adapt', 'experts', 'director')),
    (dict(pool='max'), ('--pool', 'cls', 'mean')),
    (dict(fraction=0), '--fraction'),
    (dict(fraction=2), '--fraction'),
])
def test_a_finetuning_that_cannot_work_ends_in_a_sentence(labelled, tmp_path, options, named):
    result = runs.finetuning(labelled / 'tell', tmp_path / 'out', init='scratch', **options)
    ends(result, naming=named)
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('option', ['--heads', '--normalization'])
def test_what_the_converter_of_encoders_asks_is_no_option_of_a_finetuning(option, tmp_path):
    ends(program('finetune', option, 'half', cwd=tmp_path), naming=option)
    assert not list(tmp_path.iterdir())

def test_limits_themselves_are_allowed():
    pretrain.Options(batch=1, accumulate=1, log_every=1, val_share=1.0, warmup=1.0, momentum=1.0)
    pretrain.Options(steps=0, epochs=1)
    pretrain.Options(steps=1, epochs=0)
    finetune.Options(batch=1, fraction=1.0)

# --- Help -----------------------------------------------------------------------------------------

def test_help_shows_the_options_with_their_defaults_and_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        parse('--help')
    assert stop.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    for shown in ("name: str = 'base' # a word", 'count: int = 3 # a number, 100% whole',
                  'rate: float = 1e-4 # any number', 'fast: bool = False # yes or no',
                  'files: tuple = () # as many as there are'):
        assert shown in text

@pytest.mark.parametrize('script', runs.SCRIPTS)
def test_help_of_a_script_opens_with_its_commands(script):
    result = program(script, '--help')
    assert result.code == 0
    assert result.out.startswith(runs.module(script).__doc__.split('\n')[0])
    assert f'python {script}.py' in result.out

@pytest.mark.parametrize('script', ['pretrain', 'finetune'])
def test_help_explains_each_option_of_a_training(script):
    """An option without a comment beside it would have no help. What comes behind the options,
    their checks, is not shown."""
    text = program(script, '--help').out
    for field in dataclasses.fields(runs.module(script).Options):
        line, = re.findall(rf'^    {field.name}: .*', text, re.M)
        code, _, comment = line.partition('  # ')
        assert ast.literal_eval(code.split(' = ')[1].strip()) == field.default
        assert len(comment.split()) >= 3, f'--{field.name} is not explained: {comment}'
    assert 'def ' not in text
