"""What programs say of finished runs: report (tables), scaling (curves), modularity (shares)."""
import json
from dataclasses import asdict

import pytest
import torch

import finetune
import pretrain
from model import MAE, Config
from tests.support import files, runs

def tables(text):
    """The rows of the markdown tables in a text, each as {column: cell}."""
    found, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if not line.startswith('|'):
            columns = None
        elif columns is None:
            columns = cells
        elif not set(line) <= set('|-'):
            found.append(dict(zip(columns, cells, strict=True)))
    return found

def write_tuned(folder, score, **changes):
    """Write what report.py reads of a fine-tuned run, and return its folder."""
    run = dict(task='a', method='DEX-E', seed=0, steps=9, batch=4, lr=0.1, weight_decay=0, warmup=1)
    config = dict(size=32, depth=changes.pop('depth', 4))
    options = vars(finetune.Options()) | changes.pop('options', {})
    run |= dict(config=config, options=options, scores=dict(dice=dict(mean=score))) | changes
    files.write(folder / 'results.json', json.dumps(run))
    return folder

def write_pretrained(folder, *validations, steps=2, **changes):
    """Write what report.py reads of a pretraining: its options, and the log of its steps."""
    options = vars(pretrain.Options()) | changes
    files.write(folder / 'config.json', json.dumps(dict(options=options, steps=steps)))
    lines = []
    for step, value in enumerate(validations):
        line = dict(step=step) if value is None else dict(step=step, val_l_self=value)
        lines.append(json.dumps(line) + '\n')
    files.write(folder / 'log.jsonl', ''.join(lines))
    return folder

# --- report: fine-tuned runs ------------------------------------------------------------------

def test_runs_that_differ_in_their_seed_alone_share_a_row(tmp_path):
    for seed, score in enumerate((0.8, 0.9)):
        write_tuned(tmp_path / f'e{seed}', score, seed=seed)
        write_tuned(tmp_path / f'd{seed}', 0.5, seed=seed, method='DEX-D')
    result = runs.program('report', *tmp_path.iterdir())
    plain, experts = tables(result.out)
    assert plain == {
        'task': 'a', 'score': 'Dice', 'method': 'DEX-D', 'size': '32', 'steps': '9', 'batch': '4',
        'lr': '0.1', 'mean ± deviation': '0.500 ± 0.000', 'seeds': '2'}
    assert experts == plain | {'method': 'DEX-E', 'mean ± deviation': '0.850 ± 0.071'}
    assert result.err == ''

def test_a_single_run_has_no_deviation(tmp_path):
    write_tuned(tmp_path / 'one', 0.8)
    row, = tables(runs.program('report', tmp_path / 'one').out)
    assert (row['mean ± deviation'], row['seeds']) == ('0.800', '1')

def test_a_classification_is_told_by_its_score_and_nothing_counts_as_zero(tmp_path):
    """The mean of no class at all is null in results.json."""
    write_tuned(tmp_path / 'b', 0, task='b', scores=dict(f1=dict(mean=None)))
    row, = tables(runs.program('report', tmp_path / 'b').out)
    assert (row['score'], row['mean ± deviation']) == ('macro-F1', '0.000')

@pytest.mark.parametrize('changes, column, values', [
    (dict(lr=9), 'lr', ['0.1', '9']),
    (dict(depth=12), 'depth', ['4', '12']),
    (dict(options=dict(tune_blocks=0)), 'tune_blocks', ['0', '100']),
    (dict(options=dict(fraction=0.5)), 'fraction', ['0.5', '1.0']),
    (dict(options=dict(pool='mean')), 'pool', ['cls', 'mean']),
])
def test_what_else_differs_has_rows_of_its_own_and_is_shown(tmp_path, changes, column, values):
    """Numbers rise from row to row. What all runs share, and is not always shown, has no column."""
    write_tuned(tmp_path / '0', 0.8)
    write_tuned(tmp_path / '1', 0.9, **changes)
    rows = tables(runs.program('report', *tmp_path.iterdir()).out)
    assert [row[column] for row in rows] == values
    assert {row['mean ± deviation'] for row in rows} == {'0.800', '0.900'}
    assert all('weight_decay' not in row for row in rows)
    for name in ('depth', 'tune_blocks', 'fraction', 'pool'):
        assert all((name in row) == (column == name) for row in rows), name

def test_what_lies_elsewhere_and_was_otherwise_looked_after_shares_a_row(tmp_path):
    """As another folder, device or data; two that were resumed."""
    write_tuned(tmp_path / '0', 0.8)
    others = dict(out='out/b', device='cuda', bf16=False, resume=True, overwrite=True, seed=1)
    write_tuned(tmp_path / '1', 0.9, seed=1, options=others | dict(data='elsewhere'))
    row, = tables(runs.program('report', *tmp_path.iterdir()).out)
    assert row['seeds'] == '2'

def test_a_run_is_told_by_its_name_whatever_its_folder_is_called(tmp_path):
    """Minus signs in it are no borders of anything."""
    write_tuned(tmp_path / 'out' / 'my-run-0.4', 0.8, method='DEX-E-my-run')
    row, = tables(runs.program('report', tmp_path / 'out' / 'my-run-0.4').out)
    assert (row['method'], row['mean ± deviation']) == ('DEX-E-my-run', '0.800')

def test_what_is_not_whole_is_named_and_what_is_no_run_is_passed_over(tmp_path):
    write_tuned(tmp_path / 'whole', 0.8)
    files.write(tmp_path / 'cut' / 'results.json', '{"task": ')
    files.write(tmp_path / 'foreign' / 'results.json', '[1]')
    files.write(tmp_path / 'unfinished' / 'best.pt')
    files.write(tmp_path / 'other' / 'notes.txt')
    result = runs.program('report', *tmp_path.iterdir())
    assert len(tables(result.out)) == 1
    named = [line.split(': left out')[0] for line in result.err.splitlines()]
    assert named == [str(tmp_path / name) for name in ('cut', 'foreign', 'unfinished')]

# --- report: pretrainings ---------------------------------------------------------------------

def test_pretrainings_are_told_by_what_was_trained_and_their_last_validation_counts(tmp_path):
    """Experts without the alignment loss have no director to speak of."""
    write_pretrained(tmp_path / 'dex0', 0.9, 0.5)
    write_pretrained(tmp_path / 'dex1', 0.8, 0.7, seed=1)
    write_pretrained(tmp_path / 'experts', 0.9, 0.4, align=0.0)
    write_pretrained(tmp_path / 'mae', 0.9, 0.3, experts=0)
    rows = tables(runs.program('report', *tmp_path.iterdir()).out)
    found = {row['network']: (row['mean ± deviation'], row['seeds']) for row in rows}
    assert found == {'+ director': ('0.600 ± 0.141', '2'), '+ experts': ('0.400', '1'),
                     'masked autoencoder': ('0.300', '1')}
    assert {row['align'] for row in rows} == {'0.1', '0.0'}
    assert {(row['size'], row['steps']) for row in rows} == {('256', '2')}

def test_pretrainings_of_other_networks_have_rows_of_their_own(tmp_path):
    write_pretrained(tmp_path / 'deep', 0.9, 0.5)
    write_pretrained(tmp_path / 'flat', 0.9, 0.2, depth=3)
    rows = tables(runs.program('report', *tmp_path.iterdir()).out)
    assert {row['depth']: row['mean ± deviation'] for row in rows} == {'0': '0.500', '3': '0.200'}

def test_a_pretraining_that_is_not_finished_is_named(tmp_path):
    """It is not at its last step, or was not validated there."""
    write_pretrained(tmp_path / 'stopped', 0.3)
    write_pretrained(tmp_path / 'blind', 0.9, None)
    result = runs.program('report', *tmp_path.iterdir())
    assert tables(result.out) == []
    assert len(result.err.splitlines()) == 2
    for name, line in zip(('blind', 'stopped'), result.err.splitlines()):
        assert line.startswith(f'{tmp_path / name}: left out')

# --- scaling ----------------------------------------------------------------------------------

def scored(folder, score, init='out/0/dex/ckpt.pt', task='a', top_k=2, experts=8, **options):
    """Write what scaling.py reads of a fine-tuned run."""
    options = vars(finetune.Options()) | dict(init=init, task=task) | options
    config = dict(top_k=top_k, depth=4, experts=experts, size=32)
    run = dict(task=task, method='DEX', init=init, options=options, config=config,
               scores=dict(f1=dict(mean=score)))
    files.write(folder / 'results.json', json.dumps(run))

def panel(folder, title):
    """What scaling.py prints of one panel for the runs in a folder: {network: its points}."""
    result = runs.program('scaling', *sorted(folder.iterdir()), cwd=folder)
    assert result.code == 0, result.err
    assert (folder / 'scaling.png').exists()
    lines = [line.partition(f': {title}, ')[2] for line in result.out.splitlines()]
    return dict(line.split(': ', 1) for line in lines if line)

def test_a_curve_takes_what_differs_in_one_option_alone(tmp_path):
    """Over the share of the images, beside runs with all of them; mean and deviation over seeds.
    What differs in anything else is left out, as is another task."""
    scored(tmp_path / '0', 0.5)
    scored(tmp_path / '1', 0.7, seed=1)
    scored(tmp_path / '2', 0.4, init='scratch')
    scored(tmp_path / '3', 0.3, fraction=0.4)
    scored(tmp_path / '4', 0.1, pool='mean')
    scored(tmp_path / '5', 0.1, adapt='director', experts=0)
    scored(tmp_path / '6', 0.1, task='b')
    scored(tmp_path / '7', 0.1, fraction=0.4, tune_blocks=1)
    scored(tmp_path / '8', 0.1, top_k=1)
    assert panel(tmp_path, 'share of the training images') == {
        'dex': '0.4: 0.300 ± 0.000, 1: 0.600 ± 0.141', 'scratch': '1: 0.400 ± 0.000'}

def test_a_run_from_a_folder_with_a_minus_has_its_place_in_a_curve(tmp_path):
    """All is read from results.json, nothing from names: one such run once disappeared."""
    for number, fraction in enumerate((0.4, 1.0)):
        scored(tmp_path / f'a-{number}', fraction / 2, 'out/my-run-2/ckpt.pt', fraction=fraction)
    scored(tmp_path / 'b', 0.6, 'encoders/dino-v2.pt')
    assert panel(tmp_path, 'share of the training images') == {
        'my-run-2': '0.4: 0.200 ± 0.000, 1: 0.500 ± 0.000', 'dino-v2': '1: 0.600 ± 0.000'}

def test_a_curve_over_blocks_has_all_of_them_at_its_end(tmp_path):
    """-1 blocks are the whole depth of four."""
    scored(tmp_path / '0', 0.5)
    scored(tmp_path / '1', 0.3, tune_blocks=0)
    points = '0: 0.300 ± 0.000, 4: 0.500 ± 0.000'
    assert panel(tmp_path, 'tuned blocks') == {'dex': points}

def test_a_curve_over_experts_has_those_of_the_network(tmp_path):
    """0 of them, by default, are as many as it was pretrained with."""
    scored(tmp_path / '0', 0.5)
    scored(tmp_path / '1', 0.3, top_k=1)
    points = '1: 0.300 ± 0.000, 2: 0.500 ± 0.000'
    assert panel(tmp_path, 'activated experts') == {'dex': points}

# --- modularity -------------------------------------------------------------------------------

def test_shares_are_those_of_simulated_components():
    """Features (modality, body, channel): deviations 2, 1 and 0.5 of modality, body and rest."""
    x = 2 * torch.randn(3, 1, 20000) + torch.randn(1, 40, 20000) + 0.5 * torch.randn(3, 40, 20000)
    shares = runs.module('modularity').shares
    whole = 4 + 1 + 0.25
    assert shares(x).tolist() == pytest.approx([4 / whole, 1 / whole, 0.25 / whole], abs=0.01)
    assert shares(torch.randn(3, 40, 20000)).tolist() == pytest.approx([0, 0, 1], abs=0.01)

def test_retrieval_is_sure_of_the_same_body_and_at_chance_in_noise():
    retrieval = runs.module('modularity').retrieval
    bodies = torch.randn(1, 40, 30)
    assert retrieval(5 * torch.randn(3, 1, 30) + bodies) == 1
    assert retrieval(torch.randn(3, 40, 30)) < 0.1

def test_one_network_does_not_take_the_place_of_another(tmp_path):
    """Of one kind and seed, while another seed makes a row of two."""
    c = Config(size=32, patch=8, width=16, depth=1, heads=2, experts=0,
               decoder_width=8, decoder_depth=1, decoder_heads=2)
    for name, seed in dict(a=0, b=1, c=0).items():
        options = dict(seed=seed, steps=9, align=0.1)
        content = dict(model=MAE(c).state_dict(), config=asdict(c), options=options)
        torch.save(content, tmp_path / f'{name}.pt')
    a, b, c = (tmp_path / f'{name}.pt' for name in 'abc')
    result = runs.program('modularity', a, b, '--bodies', 2)
    assert result.code == 0, result.err
    row = next(row for row in tables(result.out) if 'masked autoencoder' in row['network (seeds)'])
    assert row['network (seeds)'] == 'masked autoencoder, 9 steps, 1 blocks at 32 pixels (2)'
    assert row['layer'] == '1'
    result = runs.program('modularity', b, c, a, '--bodies', 2)
    runs.ends(result, naming=[a, 'another network of this kind and seed'])
