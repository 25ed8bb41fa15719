"""The commands of README.md, of the scripts' first lines and of experiments.sh, and their parsing.

`in_markdown` and `in_docstring` find commands in texts, `run_recording` those of a shell script;
`parse` has each parsed by the program that it calls, and `parse_fragment` an option or two without
their command. A command is a list of words. What does not parse is a ValueError.
"""
import argparse
import contextlib
import functools
import os
import re
import shlex
import subprocess
from pathlib import Path
from unittest import mock

from torch.distributed.run import get_args_parser

from tests.support import runs

STARTERS = 'python', 'python3', 'torchrun', 'bash', 'pip', 'pytest'
WITHOUT_OPTIONS = 'report', 'scaling', 'bench_prepare', 'idea', 'convert'
BENCHMARKS = 'run', 'gates', 'step', 'ranks', 'data', 'memory'

# --- finding ----------------------------------------------------------------------------------

def split(line):
    """The words of a line if it is a command of ours, else none. A comment is left out."""
    first = line.split(' ')[0]
    if first.endswith('.py') and first != line:         # as `pretrain.py --experts 0`
        line = f'python {line}'
    elif first not in STARTERS:
        return []
    return shlex.split(line, comments=True)

def inline_code(text):
    """What stands between `single backticks` in a markdown text."""
    return re.findall(r'`([^`\n]+)`', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S))

def in_markdown(text):
    """The commands in code blocks and in inline code."""
    blocks = re.findall(r'^```\w*\n(.*?)^```', text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
    return [words for words in map(split, lines + inline_code(text)) if words]

def in_docstring(text):
    """The commands on lines of their own; what follows after two blanks says what they do."""
    indented = [line.strip() for line in text.splitlines() if line.startswith('    ')]
    lines = [re.split(r'\s{2,}', line)[0] for line in indented]
    return [words for words in map(split, lines) if words]

def fragments(text):
    """The options that stand in inline code without their command; of `--name a|b` one for each."""
    found = []
    for code in inline_code(text):
        if code.startswith('--'):
            rest, last = code.rpartition(' ')[::2]
            found += [shlex.split(f'{rest} {choice}') for choice in last.split('|')]
    return found

RECORDER = '''#!/usr/bin/env bash
# Stands for python: writes down its words, and makes the folder that it is to write to.
{ printf '%s\\n' "$#"; printf '%s\\0' "$@"; } >> "$RECORDED"
while [ $# -gt 0 ]; do
    [ "$1" = --out ] && mkdir -p "$2"
    shift
done
'''

def run_recording(script, folder, *words, **environment):
    """Run a copy of a shell script of ours in `folder`, in which python only writes down its words:
    the commands, as lists of words."""
    copy = folder / script.relative_to(runs.ROOT)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(script.read_bytes())
    python = folder / 'bin' / 'python'
    python.parent.mkdir()
    python.write_text(RECORDER)
    python.chmod(0o755)
    recorded = folder / 'recorded'
    path = f'{python.parent}{os.pathsep}{os.environ["PATH"]}'
    variables = os.environ | dict(PATH=path, RECORDED=str(recorded)) | environment
    subprocess.run(['bash', copy, *words], check=True, env=variables, capture_output=True)
    commands, rest = [], recorded.read_bytes()
    while rest:
        count, _, rest = rest.partition(b'\n')
        *found, rest = rest.split(b'\0', int(count))
        commands.append(['python', *map(os.fsdecode, found)])
    return commands

# --- parsing ----------------------------------------------------------------------------------

class Parsed(BaseException):
    """Ends a program when it has parsed its options: their values, and the names of all options."""

def parsed(program, words):
    """Have a program parse words with its own parser: (values by name, names of all options)."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *more):
        names = {word for action in parser._actions for word in action.option_strings}
        raise Parsed(vars(parse_args(parser, *more)), names)

    with mock.patch.object(argparse.ArgumentParser, 'parse_args', parse_and_stop):
        try:
            result = runs.program(program, *words)
        except Parsed as stop:
            values, names = stop.args
        else:
            raise ValueError(f'{program} {shlex.join(words)}: {result.err.strip()}')
    options = getattr(runs.module(program), 'Options', None)
    if options and values.keys() == vars(options()).keys():
        try:
            options(**values)       # which refuses what is no choice
        except SystemExit as stop:
            raise ValueError(f'{program} {shlex.join(words)}: {stop}')
    return values, names

@functools.cache
def options_of(program):
    """The names of all its options."""
    return parsed(program, [])[1]

def parse_fragment(words):
    """Check options that stand without their command: one program must have them all, and take the
    values that are written behind them. A capital, as N, stands for any value."""
    names = {word for word in words if word.startswith('--')}
    whole = len(words) == 2 * len(names) and not any(word.isupper() for word in words)
    for program in ('pretrain', 'finetune', 'prepare_medverse'):
        if names <= options_of(program):
            with contextlib.suppress(ValueError):
                parsed(program, words if whole else [])
                return program
    raise ValueError(f'{shlex.join(words)}: no program takes these options')

def must_exist(file):
    if not (runs.ROOT / file).is_file():
        raise ValueError(f'{file}: there is no such file')

def script_of(words):
    """Of the words behind `python`, the program, and the words for it. The file must exist."""
    if words[0] == '-m':
        file, rest = words[1].replace('.', '/') + '.py', words[2:]
    else:
        file, rest = words[0], words[1:]
    must_exist(file)
    return Path(file).stem, rest

def parse(words):
    """Check a command: its program parses all of its words. Returns the program's name."""
    starter, *words = words
    if starter == 'torchrun':
        try:
            launch = get_args_parser().parse_args(words)
        except SystemExit:
            raise ValueError(f'torchrun {shlex.join(words)}: its options are wrong')
        words = [launch.training_script, *launch.training_script_args]
    elif starter in ('pip', 'pytest'):
        for word in words:
            if word.endswith('.txt'):
                must_exist(word)
        return starter
    elif starter == 'bash':
        must_exist(words[0])
        return words[0]
    if words[0] == '-c':
        compile(words[1], '-c', 'exec')
        return '-c'
    program, words = script_of(words)
    options = [word for word in words if word.startswith('-')]
    if program == 'bench' and words[:1] == ['run']:
        parsed('pretrain', words[1:])
    elif program == 'token_routing':
        parsed(words[0], words[1:])
    elif program == 'bench' and (words[0] not in BENCHMARKS or options):
        raise ValueError(f'bench has no {shlex.join(words)}')
    elif program in WITHOUT_OPTIONS and options:
        raise ValueError(f'{program} has no {options[0]}')
    elif program not in ('bench', 'token_routing', *WITHOUT_OPTIONS):
        parsed(program, words)
    return program
