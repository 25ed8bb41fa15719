"""What programs say of finished runs: report (tables), scaling (curves), modularity (shares)."""
import json
from dataclasses import asdict

import pytest
import torch

import pretrain
from model import MAE, Config
from tests.support import files, runs

ALIGN = runs.OPTION_NAMES.get('align', 'align')
LOG_NAMES = {ours: theirs for theirs, ours in runs.LOG_NAMES.items()}
VALIDATION = LOG_NAMES.get('val_l_self', 'val_l_self')

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
    run |= dict(config=config, scores=dict(dice=dict(mean=score))) | changes
    files.write(folder / 'results.json', json.dumps(run))
    return folder

def write_pretrained(folder, *validations, steps=2, **changes):
    """Write what report.py reads of a pretraining: its options, and the log of its steps."""
    options = vars(pretrain.Options()) | changes
    files.write(folder / 'config.json', json.dumps(dict(options=options, steps=steps)))
    lines = []
    for step, value in enumerate(validations):
        line = dict(step=step) if value is None else {'step': step, VALIDATION: value}
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
    (dict(lr=9), 'lr', ['0.1', '9']), (dict(depth=12), 'depth', ['12', '4'])])
def test_what_else_differs_has_rows_of_its_own_and_is_shown(tmp_path, changes, column, values):
    """What all runs share, and is not always shown, has no column."""
    write_tuned(tmp_path / '0', 0.8)
    write_tuned(tmp_path / '1', 0.9, **changes)
    rows = tables(runs.program('report', *tmp_path.iterdir()).out)
    assert [row[column] for row in rows] == values
    assert {row['mean ± deviation'] for row in rows} == {'0.800', '0.900'}
    assert all('weight_decay' not in row for row in rows)
    assert all(('depth' in row) == (column == 'depth') for row in rows)

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
    write_pretrained(tmp_path / 'experts', 0.9, 0.4, **{ALIGN: 0.0})
    write_pretrained(tmp_path / 'mae', 0.9, 0.3, experts=0)
    rows = tables(runs.program('report', *tmp_path.iterdir()).out)
    found = {row['network']: (row['mean ± deviation'], row['seeds']) for row in rows}
    assert found == {'+ director': ('0.600 ± 0.141', '2'), '+ experts': ('0.400', '1'),
                     'masked autoencoder': ('0.300', '1')}
    assert {row[ALIGN] for row in rows} == {'0.1', '0.0'}
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

def scored(method, score, task='a', **options):
    """The results of a run, as scaling.py reads them."""
    options = dict(fraction=1.0, tune_blocks=-1) | options
    return dict(task=task, method=method, options=options, config=dict(top_k=2, depth=4),
                scores=dict(f1=dict(mean=score)))

def test_a_curve_takes_what_differs_in_one_option_alone():
    """Over the share of the images, beside runs with all of them; mean and deviation over seeds."""
    taken = [scored('DEX-E-dex', 0.5), scored('DEX-E-dex', 0.7), scored('DEX-E-scratch', 0.4),
             scored('DEX-E-dex-fraction-0.4', 0.3, fraction=0.4)]
    passed_over = [
        scored('DEX-E-dex-pool-mean', 0.1), scored('DEX-D-dex', 0.1), scored('DEX-E-mae', 0.1),
        scored('DEX-E-dex', 0.1, task='b'),
        scored('DEX-E-dex-fraction-0.4-tune_blocks-1', 0.1, fraction=0.4, tune_blocks=1)]
    found = runs.module('scaling').curves(taken + passed_over, 'fraction', 'a')
    deviation = pytest.approx(0.2 / 2 ** 0.5)
    assert found == dict(pretrained=[(0.4, 0.3, 0.0), (1.0, 0.6, deviation)],
                         scratch=[(1.0, 0.4, 0.0)])

def test_a_curve_over_blocks_has_all_of_them_at_its_end():
    """-1 blocks are the whole depth of four."""
    taken = [scored('DEX-E-dex', 0.5), scored('DEX-E-dex-tune_blocks-0', 0.3, tune_blocks=0)]
    found = runs.module('scaling').curves(taken, 'tune_blocks', 'a')
    assert found == dict(pretrained=[(0, 0.3, 0.0), (4, 0.5, 0.0)])

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
        options = {'seed': seed, 'steps': 9, ALIGN: 0.1}
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
