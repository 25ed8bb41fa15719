"""The questions that probe.py puts to features: exams on phantoms, and on a prepared task.

Letters: B images, N tokens (class token first), S side of an image in pixels, n subjects.
"""
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from prepare_medverse import cut, resize, to_uint8
from tests.lab import phantoms

SEED = 1000             # of the bodies; those that networks are trained on have seed 0
SIDE = 160              # of a phantom as it is drawn, in pixels
SCANS = ('CT', 'PET', 'MR')
ORGANS = (phantoms.GUT, phantoms.LIVER, phantoms.KIDNEY, phantoms.SPLEEN, phantoms.BLOOD)
SOFT = (phantoms.MUSCLE, *ORGANS)

class Exam(NamedTuple):
    """A question to features. A part is a pair of rows of the features and their answers:
    classes (rows,) as int64 or, where `classes` is 0, values (rows, k)."""
    column: str             # of the table, where exams of one name are averaged
    kind: str               # of the features: 'whole' or 'crop' (of an image), or 'patch'
    classes: int
    train: tuple
    val: tuple
    test: tuple
    test_images: int = 0    # of a task
    own_rows: object = None     # rows whose mean the test takes in place of that of `train`

# --- phantoms -------------------------------------------------------------------------------------

def draw(modality, n, size):
    """Subject n as uint8 slices (depth, 3, S, S), and of a scan its tissues (depth, SIDE, SIDE)."""
    depth, simulate = phantoms.PHANTOMS[modality]
    slices, mask = simulate(np.random.default_rng((SEED, n)), SIDE, n % 2)
    if depth == 1:
        slices = np.uint8(np.clip(slices, 0, 255))[None]
    else:
        affine = np.diag((400 / SIDE, 400 / SIDE, 50, 1))
        slices = to_uint8(cut(slices, affine)[0], 'SUV' if modality == 'PET' else modality)
        mask = cut(mask, affine)[0]
    pixels = [torch.tensor(resize(image, size)).permute(2, 0, 1) for image in slices]
    return torch.stack([image.expand(3, -1, -1) for image in pixels]), mask

def parts(rows, answers, when):
    """Rows and answers of the training, validation and test part, as `when` (n,) in [0, 1) says."""
    splits = when < 0.4, (when >= 0.4) & (when < 0.6), when >= 0.6
    return [(rows[split], answers[split]) for split in splits]

def lesion_exams(subjects):
    """Images (10 * count, 3, S, S), one of each subject, and the exams `lesion` and `modality`."""
    images, exams = [], []
    for drawn in subjects.values():
        for (healthy, _), (sick, mask) in zip(drawn[::2], drawn[1::2]):
            lesion = (mask == phantoms.LESION).sum((-2, -1))    # where it shows most of it
            level = lesion.argmax() if len(sick) > 1 else 0
            images += [healthy[level], sick[level]]
    count = len(images) // len(subjects)
    rows = torch.arange(len(images)).view(-1, count)
    when = torch.arange(count) / count
    for ours in rows:
        exams.append(Exam('lesion', 'whole', 2, *parts(ours, ours % 2, when)))
    modality = torch.arange(len(rows)).repeat_interleave(count)
    when = when.repeat(len(rows))
    exams.append(Exam('modality', 'whole', len(rows), *parts(rows.flatten(), modality, when)))
    return torch.stack(images), exams

def body_exam(subjects, first):
    """Images of six levels of 40 bodies in each scan, and the exam; its rows begin at `first`."""
    scans = [[slices[1:7] for slices, _ in subjects[name][:40]] for name in SCANS]
    images = torch.stack([torch.stack(scan) for scan in scans])     # (3, 40, 6, 3, S, S)
    body = torch.arange(images.shape[1])[:, None].expand(images.shape[:3])
    when = torch.tensor((0.0, 0.5, 0.0, 0.9, 0.0, 0.5)).expand(images.shape[:3]).flatten()
    rows = first + torch.arange(len(when))
    exam = Exam('body', 'whole', images.shape[1], *parts(rows, body.flatten(), when))
    return images.flatten(0, 2), exam

def patch_questions(tissues, theta, height, grid):
    """{column: (classes, which patches it asks, answers of all)} on crops of a slice of each body.
    tissues (n, SIDE, SIDE); theta (n, 2, 3) crops them; height (n,) in cm; grid: patches a side."""
    n = len(tissues)
    view = F.affine_grid(theta, (n, 1, 8 * grid, 8 * grid), align_corners=False)
    cropped = F.grid_sample(tissues[:, None].float(), view, 'nearest', align_corners=False)
    cells = F.unfold(cropped, 8, stride=8).mT.long()                        # (n, N - 1, 64)
    share = F.one_hot(cells, len(phantoms.TISSUES)).float().mean(2).flatten(0, 1)
    most, tissue = share.max(1)

    organs = torch.tensor(ORGANS)
    is_organ = tissue[:, None] == organs
    alike = is_organ.any(1) & (most >= 0.6)
    soft = share[:, SOFT].sort(1).values
    two = (soft.sum(1) >= 0.95) & (soft[:, -2] >= 0.2)
    border = two | (soft[:, -1] >= 0.95)
    centres = 20 * F.affine_grid(theta, (n, 1, grid, grid), align_corners=False).flatten(0, 2)
    place = torch.cat([centres, height.repeat_interleave(grid ** 2)[:, None]], 1)
    inside = share[:, phantoms.AIR] < 0.5
    return dict(tissue=(phantoms.LESION, tissue != phantoms.LESION, tissue),   # the last class
                alike=(len(organs), alike, is_organ.int().argmax(1)),
                border=(2, border, two.long()), place=(0, inside, place))

def crop_exams(subjects, rng, grid):
    """Crops (3 * n, 3, S, S), of each body at two levels in each scan, and the exams on them."""
    count = len(subjects['CT'])
    body = np.arange(count).repeat(2)
    n, levels = len(body), rng.integers(1, 7, len(body))
    u = torch.from_numpy(rng.uniform(size=(5, n))).float()
    u[2:4] = torch.tensor([[0.5], [1.0]])       # no rotation, no flip
    side = (0.5 + 0.5 * u[4]).sqrt()            # as in pretraining without a zoom
    theta = data.crop_matrices(u[:4], side, side)
    images = torch.stack([subjects[name][i][0][level]
                          for name in SCANS for i, level in zip(body, levels)])
    images = data.sample(images, images.shape[-1], theta.repeat(3, 1, 1))
    tissues = torch.stack([torch.from_numpy(subjects['CT'][i][1][level].copy())
                           for i, level in zip(body, levels)])
    shift = [np.random.default_rng((SEED, i)).uniform(0, 6) for i in body]  # torso's first draw
    height = (torch.linspace(-20, 20, 8)[levels] + torch.tensor(shift)).float()

    exams, rows, when = [], torch.arange(n), torch.from_numpy(body) / count
    patch_when = when.repeat_interleave(grid ** 2)
    for m in range(len(SCANS)):
        exams.append(Exam('height', 'crop', 0, *parts(m * n + rows, height[:, None], when)))
    for column, (classes, asked, answers) in patch_questions(tissues, theta, height, grid).items():
        rows, answers = asked.nonzero()[:, 0], answers[asked]
        scans = [parts(m * len(asked) + rows, answers, patch_when[asked])
                 for m in range(len(SCANS))]
        exams += [Exam(column, 'patch', classes, *scan) for scan in scans]
        if column == 'tissue':
            exams += [Exam('across', 'patch', classes, a[0], a[1], b[2], own_rows=b[0][0])
                      for a, b in permutations(scans, 2)]
    return data.normalize(images), exams

def phantom_exams(count, size, patch):
    """Views of `count` new subjects in each modality, {'whole' or 'crop': images}; the exams."""
    subjects = {name: [draw(name, n, size) for n in range(count)]
                for name in tqdm(phantoms.PHANTOMS, 'phantoms')}
    images, exams = lesion_exams(subjects)
    bodies, body = body_exam(subjects, len(images))
    crops, more = crop_exams(subjects, np.random.default_rng(SEED), size // patch)
    whole = data.whole_view(torch.cat([images, bodies]), size)
    exams += [body, *more]
    for exam in exams:
        for rows, _ in (exam.train, exam.val, exam.test):
            if not len(rows):
                raise SystemExit(f'{count} subjects in patches of {patch} px at {size} px leave no '
                                 f'answers for {exam.column}: give more --subjects')
    return dict(whole=whole, crop=crops), exams

# --- labelled tasks -------------------------------------------------------------------------------

def task_exam(folder, size, patch):
    """Views of a prepared task's images and its exam: their class, or what a patch mostly shows."""
    task = data.Task(folder)
    if not len(task.answers['val']):
        raise SystemExit(f'{folder}: has no validation images; prepare it again with --split')
    images, splits, first = [], [], 0
    for split in ('train', 'val', 'test'):
        pixels, answers = task.gather(split, np.arange(len(task.answers[split])))
        images.append(data.whole_view(pixels, size))
        if task.segments:
            side = answers.shape[1] // (size // patch)      # of a patch, in the mask's pixels
            cells = F.unfold(answers[:, None].float(), side, stride=side).mT.flatten(0, 1)
            counts = torch.stack([(cells == c).sum(1) for c in range(len(task.classes))], 1)
            answers = counts.argmax(1).where(counts.any(1), 255)
        rows = torch.arange(first, first + len(answers))
        first += len(answers)
        known = (answers != 255) | (split == 'test')        # in the test, 255 is not counted
        splits.append((rows[known], answers[known]))
    kind = 'crop' if task.segments else 'whole'
    exam = Exam(folder.name, 'patch' if task.segments else kind, len(task.classes), *splits,
                len(task.answers['test']))
    return {kind: torch.cat(images)}, [exam]
