"""The scores and losses of fine-tuning: Dice, F1, accuracy, the headline, the segmentation loss."""
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import finetune
from tests.support import naive

@dataclass
class Case:
    """Truth and prediction of some images, and the three averages of Dice over them.

    An image is a word, a pixel a letter: 0 is the background, - is left out of the scores.
    """
    says: str
    truth: str
    guess: str
    dice: float | None              # over the images that have the class in truth or prediction
    empty_is_one: float             # over all images; one without the class counts as 1
    pooled: float | None            # of the pixels of all images together

CASES = [
    Case('all is found', '0011', '0011', dice=1, empty_is_one=1, pooled=1),
    Case('half is found', '0011', '0110', dice=1/2, empty_is_one=1/2, pooled=1/2),
    Case('nothing is found', '0011', '0000', dice=0, empty_is_one=0, pooled=0),
    Case('a false positive', '0000', '0001', dice=0, empty_is_one=0, pooled=0),
    Case('nothing is there', '0000', '0000', dice=None, empty_is_one=1, pooled=None),
    Case('an ignored pixel', '011-', '0111', dice=1, empty_is_one=1, pooled=1),
    Case('all the class is ignored', '00--', '0011', dice=None, empty_is_one=1, pooled=None),
    Case('one image without the class', '0011 0000', '0110 0000',
         dice=1/2, empty_is_one=3/4, pooled=1/2),
    Case('one image with a false positive', '0011 0000', '0011 0010',
         dice=1/2, empty_is_one=1/2, pooled=4/5),
    Case('a big one found, a small one missed', '1111 0001', '1111 0010',
         dice=1/2, empty_is_one=1/2, pooled=4/5),
    Case('all three averages differ', '1111 0001 0000', '1111 0010 0000',
         dice=1/2, empty_is_one=2/3, pooled=4/5),
    Case('every image is empty', '0000 0000', '0000 0000',
         dice=None, empty_is_one=1, pooled=None)]

def pixels(words):
    """The classes of images written as words: (images, 1, length)."""
    return torch.tensor([[[255 if c == '-' else int(c) for c in word]] for word in words.split()])

def dice_scores(truth, guess, classes):
    """The scores of predicted masks, as fine-tuning computes them; they must be plain JSON."""
    found = finetune.dice_scores(finetune.confusions(guess, truth, classes).numpy())
    return json.loads(json.dumps(found, allow_nan=False))

def close(values):
    """The same numbers, or None, up to rounding."""
    return [value if value is None else pytest.approx(value) for value in values]

def naive_dice(guess, truth, c):
    """Dice of class c, pixel by pixel, of arrays of any shape."""
    return naive.dice(guess.flatten().tolist(), truth.flatten().tolist(), c)

# --- Dice --------------------------------------------------------------------------------------

@pytest.mark.parametrize('case', CASES, ids=lambda case: case.says)
def test_dice_of_one_class(case):
    found = dice_scores(pixels(case.truth), pixels(case.guess), 2)
    for name, value in (('dice', case.dice), ('dice_empty_is_one', case.empty_is_one),
                        ('dice_pooled', case.pooled)):
        assert found[name]['per_class'] == close([value]), name
        assert found[name]['mean'] == close([value])[0], name

def test_dice_of_several_classes_is_their_mean():
    """A class in neither truth nor prediction has no Dice, and the mean is that of the others."""
    found = dice_scores(pixels('0012'), pixels('0112'), 4)
    assert found['dice'] == dict(per_class=close([2/3, 1, None]), mean=pytest.approx(5/6))
    assert found['dice_pooled'] == found['dice']
    assert found['dice_empty_is_one'] == dict(per_class=close([2/3, 1, 1]), mean=pytest.approx(8/9))

@pytest.mark.parametrize('seed', range(4))
def test_dice_of_random_masks_is_the_naive_one(seed):
    rng = np.random.default_rng(seed)
    shape, C = (6, 5, 5), 4
    truth = rng.choice([0, 0, 1, 2, 255], shape)        # class 3 is never true
    guess = rng.choice([0, 0, 1, 2, 3], shape)
    truth[0], guess[0] = 0, 0
    truth[1], guess[2] = 0, 0
    found = dice_scores(torch.tensor(truth), torch.tensor(guess), C)
    for c in range(1, C):
        each = [naive_dice(g, t, c) for g, t in zip(guess, truth)]
        empty_is_one = [1 if value is None else value for value in each]
        expected = naive.mean(each), naive.mean(empty_is_one), naive_dice(guess, truth, c)
        names = 'dice', 'dice_empty_is_one', 'dice_pooled'
        assert [found[name]['per_class'][c - 1] for name in names] == close(expected)
    for name, scores in found.items():
        assert scores['mean'] == pytest.approx(naive.mean(scores['per_class'])), name

# --- classification ----------------------------------------------------------------------------

def test_scores_of_a_small_classification():
    truth, guess = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 0])
    found = finetune.class_scores(finetune.confusions(guess, truth, 3).numpy())
    assert found['confusion'] == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]      # truth by prediction
    assert found['accuracy'] == 3/5
    assert found['f1'] == dict(per_class=close([2/3, 1/2, None]), mean=pytest.approx(7/12))
    json.dumps(found, allow_nan=False)

@pytest.mark.parametrize('C', [2, 4])
def test_class_scores_are_the_naive_ones(C):
    """Of four classes the last is never true nor predicted."""
    guess, truth = np.random.default_rng(C).integers(0, min(C, 3), (2, 40))
    table = finetune.confusions(torch.tensor(guess), torch.tensor(truth), C).numpy()
    found = finetune.class_scores(table)
    f1 = [naive_dice(guess, truth, c) for c in range(C)]
    assert found['f1'] == dict(per_class=close(f1), mean=pytest.approx(naive.mean(f1)))
    assert found['accuracy'] == sum(guess == truth) / 40
    for t in range(C):
        for g in range(C):
            assert found['confusion'][t][g] == sum((truth == t) & (guess == g))
    json.dumps(found, allow_nan=False)

# --- the headline ------------------------------------------------------------------------------

def test_the_headline_of_a_segmentation_is_the_mean_over_images():
    """Neither that of all pixels together nor that in which an empty image counts as found."""
    case = next(case for case in CASES if case.says == 'all three averages differ')
    scores = dice_scores(pixels(case.truth), pixels(case.guess), 2)
    assert finetune.headline(scores) == pytest.approx(case.dice)
    assert len({case.dice, case.empty_is_one, case.pooled}) == 3

def test_the_headline_of_a_classification_is_macro_f1():
    truth, guess = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0])
    scores = finetune.class_scores(finetune.confusions(guess, truth, 2).numpy())
    assert finetune.headline(scores) == pytest.approx((6/7 + 0) / 2)
    assert scores['accuracy'] == 3/4

def test_the_headline_of_nothing_is_zero():
    """Where no image has a class, the mean is None, which could not be compared."""
    scores = dice_scores(pixels('0000'), pixels('0000'), 3)
    assert scores['dice'] == dict(mean=None, per_class=[None, None])
    assert scores['dice_empty_is_one']['mean'] == 1
    assert finetune.headline(scores) == 0

# --- the loss ----------------------------------------------------------------------------------

def naive_segmentation_loss(logits, masks):
    """Cross-entropy and Dice of the foreground classes, pixel by pixel."""
    chance, counted = logits.softmax(1), (masks != 255).nonzero().tolist()
    entropies = [-chance[b, masks[b, y, x], y, x].log() for b, y, x in counted]
    dice = []
    for c in range(1, logits.shape[1]):
        both = sum(chance[b, c, y, x] for b, y, x in counted if masks[b, y, x] == c)
        either = sum(chance[b, c, y, x] + (masks[b, y, x] == c) for b, y, x in counted)
        dice.append((2 * both + 1) / (either + 1))
    return sum(entropies) / len(entropies) + 1 - sum(dice) / len(dice)

def masked_example():
    """Random logits (2, 3, 4, 4), and masks of which the first two rows are ignored."""
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.randint(0, 3, (2, 4, 4))
    masks[0, :2] = 255
    return logits, masks

def test_the_segmentation_loss_is_cross_entropy_and_dice():
    logits, masks = masked_example()
    loss = finetune.segmentation_loss(logits, masks).item()
    assert loss == pytest.approx(naive_segmentation_loss(logits, masks).item(), rel=1e-5)

def test_ignored_pixels_change_neither_loss_nor_gradient():
    logits, masks = masked_example()
    loss = finetune.segmentation_loss(logits, masks)
    loss.backward()
    assert logits.grad[0, :, :2].abs().max() == 0
    assert logits.grad[0, :, 2:].abs().min() > 0
    other = logits.detach().clone()
    other[0, :, :2] += 5 * torch.randn(3, 2, 4)
    assert finetune.segmentation_loss(other, masks).item() == pytest.approx(loss.item(), rel=1e-6)

def test_the_loss_of_a_batch_that_is_ignored_is_finite():
    """Cross-entropy has nothing to divide by; the Dice of nothing is 1."""
    logits, masks = masked_example()
    loss = finetune.segmentation_loss(logits, torch.full_like(masks, 255))
    assert loss.item() == pytest.approx(0)
