"""The probe: what readers find in made features, its exams on phantoms, its command line."""
import sys

import numpy as np
import pytest
import torch

import prepare_medverse
from model import MAE, Config
from tests.lab import exams, phantoms, probe
from tests.support import tasks

def made_exam(answers, classes, column='made'):
    """An exam whose rows are in order: half of the answers to train on, a quarter, a quarter."""
    n = len(answers)
    rows, ends = torch.arange(n), (0, n // 2, 3 * n // 4, n)
    splits = [(rows[a:b], answers[a:b]) for a, b in zip(ends, ends[1:])]
    return exams.Exam(column, 'patch', classes, *splits)

def chosen(x, exam):
    """The score of the probe on features x (rows, D), or on several {candidate: features}."""
    candidates = x if isinstance(x, dict) else {'only': x}
    found = probe.examine({'patch': candidates}, [exam])
    return found[exam.column, probe.CHOSEN][0]

# --- readers --------------------------------------------------------------------------------------

@pytest.mark.parametrize('classes', [2, 5])
def test_planted_classes_are_found_and_noise_is_not(classes):
    answers = torch.randint(classes, (2000,))
    noise = torch.randn(2000, 30)
    planted = noise.clone()
    planted[:, :classes] += 5 * torch.nn.functional.one_hot(answers, classes)
    exam = made_exam(answers, classes)
    assert chosen(planted, exam) > 0.95
    assert abs(chosen(noise, exam) - 1 / classes) < 0.1
    assert chosen(dict(noise=noise, planted=planted, other=noise), exam) > 0.95

def test_planted_values_are_found_and_noise_is_not():
    x = torch.randn(1000, 20)
    answers = x[:, :3] @ torch.randn(3, 2) + 0.01 * torch.randn(1000, 2)
    assert chosen(x, made_exam(answers, 0)) > 0.99
    assert abs(chosen(torch.randn(1000, 20), made_exam(answers, 0))) < 0.1

def test_a_feature_that_hardly_varies_is_not_blown_up():
    """As a border of air, in which few of the images show anything, or nothing at all."""
    x = torch.randn(400, 20)
    x[:, 0] = 7
    x[:, 1] *= 1e-4
    reader = probe.fit(x, x[:, 2:3], torch.full((400,), 1 / 400))[0]
    assert reader.scale[:2].tolist() == pytest.approx([0.09, 0.09], abs=0.01)
    assert reader(x).isfinite().all()

def test_a_reader_is_a_ridge_regression_on_standardized_features():
    x, y = torch.randn(50, 4) * torch.tensor([1.0, 2, 3, 1]) + 3, torch.randn(50, 2)
    readers = probe.fit(x, y, torch.full((50,), 1 / 50))
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double().numpy()
    for strength, reader in zip(probe.STRENGTHS, readers, strict=True):
        gram = z.T @ z / 50 + strength * np.eye(4)
        w = np.linalg.solve(gram, z.T @ (y - y.mean(0)).double().numpy() / 50)
        np.testing.assert_allclose(reader(x), z @ w + y.mean(0).numpy(), atol=1e-4)

def test_a_rare_class_weighs_as_much_as_a_frequent_one():
    """So more copies of its rows change nothing."""
    x, answers = torch.randn(60, 5), torch.arange(60) // 10 // 5    # 50 of class 0, 10 of class 1
    rows = torch.cat([torch.arange(60), torch.arange(50, 60).repeat(3)])
    plain = probe.fit(x, *probe.targets(answers, 2))
    copied = probe.fit(x[rows], *probe.targets(answers[rows], 2))
    for a, b in zip(plain, copied, strict=True):
        torch.testing.assert_close(a(x), b(x), atol=1e-4, rtol=0)

def test_across_modalities_the_offset_of_the_other_modality_is_taken_away():
    answers = torch.randint(3, (800,))
    x = torch.randn(800, 6)
    x[:, :3] += 4 * torch.nn.functional.one_hot(answers, 3)
    here = made_exam(answers, 3)
    both = torch.cat([x, x + torch.linspace(-50, 50, 6)])
    rows, truth = here.test
    other = here._replace(test=(rows + 800, truth))
    assert chosen(both, here._replace(column='made')) > 0.9
    assert chosen(both, other) < 0.5
    assert chosen(both, other._replace(own_rows=here.train[0] + 800)) == chosen(both, here)

# --- intervals ------------------------------------------------------------------------------------

@pytest.mark.parametrize('measure', [probe.accuracy, probe.macro_f1])
def test_the_bootstrap_interval_contains_the_truth(measure):
    """In about 95 of 100 tests of 150 images of which each class is told with a chance of 0.8."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        truth = rng.integers(2, size=(1, 150))
        told = np.where(rng.random((1, 150)) < 0.8, truth, 1 - truth)
        confusion = np.zeros((1, 150, 2, 2))
        np.put_along_axis(confusion.reshape(1, 150, 4), (2 * truth + told)[..., None], 1, 2)
        low, high = probe.interval(confusion, measure, draws=200)
        hits += low <= 0.8 <= high
    assert 86 <= hits <= 100

def test_the_seeds_that_a_difference_needs():
    assert probe.seeds_needed(0.02) == 16       # 2 (1.96 + 0.84)^2 = 15.7
    assert probe.seeds_needed(0.01) == 4
    assert probe.seeds_needed(0.0) == 2

# --- phantoms -------------------------------------------------------------------------------------

@pytest.mark.parametrize('modality', ['CT', 'PET', 'MR', 'Photo'])
def test_a_subject_is_what_the_preparation_makes_of_its_file(modality, tmp_path):
    phantoms.write_phantom(tmp_path, modality, 3, exams.SEED)
    file, = (path for path in (tmp_path / 'raw').rglob('*.*') if path.is_file())
    volume, = prepare_medverse.read(file)
    slices = prepare_medverse.to_uint8(volume, 'SUV' if modality == 'PET' else modality)
    images, mask = exams.draw(modality, 3, 32)
    for image, truth in zip(images, slices, strict=True):
        pixels = np.broadcast_to(prepare_medverse.resize(truth, 32), (32, 32, 3))
        assert np.array_equal(image.permute(1, 2, 0), pixels)
    if modality != 'Photo':
        label, = (path for path in (tmp_path / 'labels').rglob('*.*') if path.is_file())
        assert np.array_equal(prepare_medverse.read(label)[0], mask)

@pytest.fixture(scope='module')
def phantom():
    """Views of 20 subjects of each modality at 32 pixels in patches of 4, and the exams on them."""
    return exams.phantom_exams(20, 32, 4)

@pytest.mark.slow
def test_no_subject_is_in_two_parts(phantom):
    views, questions = phantom
    columns = {exam.column for exam in questions}
    assert columns == {'lesion', 'modality', 'body', 'height', 'tissue', 'across', 'alike',
                       'border', 'place'}
    assert len(views['whole']) == 10 * 20 + 3 * 20 * 6
    assert len(views['crop']) == 3 * 20 * 2
    for exam in questions:
        rows_of_subject = dict(whole=1, crop=2, patch=2 * 64)[exam.kind]
        subjects = [set((rows // rows_of_subject % 20).tolist())
                    for rows, _ in (exam.train, exam.val, exam.test)]
        if exam.column == 'body':
            levels = [set((rows - 200).remainder(6).tolist())
                      for rows, _ in (exam.train, exam.val, exam.test)]
            assert levels == [{0, 2, 4}, {1, 5}, {3}]
        else:
            places = set(range(8)), set(range(8, 12)), set(range(12, 20))
            assert all(map(set.issubset, subjects, places)), exam.column
            assert exam.column in ('alike', 'border') or subjects == [*places], exam.column

def test_the_answers_for_patches_are_those_of_loops():
    """On two whole slices in 20 x 20 patches, so that the samples of a patch are its pixels."""
    _, mask = exams.draw('CT', 1, 32)
    slices, heights = [mask[2], mask[3]], [2.0, 5.0]
    theta = torch.eye(2, 3).expand(2, 2, 3)
    asked = exams.patch_questions(torch.tensor(np.stack(slices)), theta, torch.tensor(heights), 20)
    for i in range(800):
        row, column = divmod(i % 400, 20)
        cells = slices[i // 400][8 * row:8 * row + 8, 8 * column:8 * column + 8]
        share = np.bincount(cells.flatten(), minlength=11) / 64
        soft = sorted(share[list(exams.SOFT)])
        is_two = sum(soft) >= 0.95 and soft[-2] >= 0.2
        _, told, tissue = asked['tissue']
        assert share[tissue[i]] == share.max() and told[i] == (tissue[i] != phantoms.LESION)
        _, told, organ = asked['alike']
        assert told[i] == (tissue[i] in exams.ORGANS and share.max() >= 0.6)
        assert not told[i] or exams.ORGANS[organ[i]] == tissue[i]
        _, told, border = asked['border']
        assert told[i] == (is_two or soft[-1] >= 0.95) and border[i] == is_two
        _, told, place = asked['place']
        assert told[i] == (share[phantoms.AIR] < 0.5)
        truth = [2 * column - 19, 2 * row - 19, heights[i // 400]]
        assert place[i].tolist() == pytest.approx(truth)

def test_a_patch_of_a_task_has_the_class_that_it_mostly_shows(tmp_path):
    """255 is never mostly shown, and in the test it is not counted."""
    tasks.write_task(tmp_path / 'find', segments=True, side=32)
    file = tmp_path / 'find' / 'test' / 'masks.npy'
    masks = np.load(file)
    masks[0, :8, :8] = 255
    np.save(file, masks)
    _, (exam,) = exams.task_exam(tmp_path / 'find', 64, 16)
    _, answers = exam.test
    cells = masks.reshape(len(masks), 4, 8, 4, 8).swapaxes(2, 3).reshape(-1, 64)
    ones = (cells == 1).sum(1) > (cells == 0).sum(1)
    assert answers[0] == 255 and answers[1:].tolist() == ones[1:].tolist()

# --- the command line -----------------------------------------------------------------------------

def write_checkpoint(path, seed, lr=0.1, **changes):
    """A checkpoint of a tiny network, with the options that tell runs apart; returns its path."""
    torch.manual_seed(seed)
    config = Config(**tasks.ENCODER | changes)
    options = dict(seed=seed, out=str(path), lr=lr)
    path.parent.mkdir(parents=True)
    torch.save(dict(model=MAE(config).state_dict(), config=vars(config), options=options, done=1),
               path)
    return path

def run(monkeypatch, *words):
    """The probe with these words of a command line."""
    monkeypatch.setattr(sys, 'argv', ['probe', *map(str, words)])
    probe.main()

@pytest.fixture
def checkpoints(tmp_path):
    """Two seeds of one network."""
    return [write_checkpoint(tmp_path / str(seed) / 'net' / 'ckpt.pt', seed) for seed in (0, 1)]

@pytest.mark.parametrize('segments', [True, False])
def test_a_task_has_a_row_for_pixels_random_weights_network_and_director(
        segments, checkpoints, tmp_path, monkeypatch, capsys):
    counts = dict(train=40, val=20, test=30)
    tasks.write_task(tmp_path / 'squares', segments, counts=counts)
    run(monkeypatch, *checkpoints, '--task', 'squares', '--data', tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')][2:]
    names = [row.split('|')[1].strip() for row in rows]
    view = '32 px in patches of 8'
    assert names == [f'pixels, {view} (1)', f'random weights, {view} (2)', 'net (2)',
                     'net, director alone (2)']
    for row in rows:        # squares are bright, so that everybody sees them
        assert float(row.split('|')[3].split()[0]) > 0.8

def test_networks_with_other_options_have_rows_of_their_own_though_their_folders_have_one_name(
        checkpoints, tmp_path, monkeypatch, capsys):
    other = write_checkpoint(tmp_path / 'other' / 'net' / 'ckpt.pt', 0, lr=0.2, experts=0)
    tasks.write_task(tmp_path / 'tell', segments=False)
    run(monkeypatch, *checkpoints, other, '--task', 'tell', '--data', tmp_path)
    output = capsys.readouterr().out
    assert '| net (2) |' in output and '| net (1) |' in output

def test_networks_that_differ_in_their_gate_alone_share_the_row_of_random_weights(
        checkpoints, tmp_path, monkeypatch, capsys):
    """Those have no experts among which a gate chooses."""
    others = [write_checkpoint(tmp_path / 'k' / 'one' / 'ckpt.pt', 0, top_k=1),
              write_checkpoint(tmp_path / 'k' / 'three' / 'ckpt.pt', 0, top_k=3)]
    tasks.write_task(tmp_path / 'tell', segments=False)
    run(monkeypatch, checkpoints[0], *others, '--task', 'tell', '--data', tmp_path)
    output = capsys.readouterr().out
    assert output.count('| random weights') == output.count('| pixels') == 1
    assert '| net (1) |' in output and '| one (1) |' in output and '| three (1) |' in output

def test_two_runs_of_one_seed_and_a_task_without_validation_are_refused(
        checkpoints, tmp_path, monkeypatch):
    again = write_checkpoint(tmp_path / 'again' / 'net' / 'ckpt.pt', 0)
    tasks.write_tasks(tmp_path)
    with pytest.raises(SystemExit, match='this seed came before'):
        run(monkeypatch, checkpoints[0], again, '--task', 'tell', '--data', tmp_path)
    with pytest.raises(SystemExit, match='no validation images'):
        run(monkeypatch, checkpoints[0], '--task', 'unchecked', '--data', tmp_path)

@pytest.mark.slow
def test_phantoms_have_a_row_for_each_layer_and_the_seeds_that_a_difference_needs(
        tmp_path, monkeypatch, capsys):
    paths = [write_checkpoint(tmp_path / str(seed) / 'net' / 'ckpt.pt', seed, patch=4)
             for seed in (0, 1)]
    run(monkeypatch, *paths, '--subjects', 20, '--layers')
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert rows[0].count('|') == 11
    assert sum('net, layer 4, ' in row for row in rows) == 3
    assert rows[-1].startswith('| seeds that a difference of 0.02 needs')
