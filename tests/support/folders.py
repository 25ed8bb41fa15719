"""Small labelled folders as users have them, and preparations of them as a task `mini`.

A test's folder holds raw/, from which out/ is prepared. Files and stored images have sides of SIDE
pixels, so that nothing is resized."""
import re

import numpy as np

from tests.support import files, prepared, runs

SIDE = 48
KINDS = 'cat', 'dog'

# --- pictures with masks -------------------------------------------------------------------------

BLOB = files.blob(0, SIDE)                              # a mask of one class beside the background
REGIONS = np.where(BLOB, 1, 2 * files.blob(7, SIDE))    # a mask of two
REGIONS = REGIONS.astype(np.uint8)
# The same regions in colours, black for the background.
COLOURS = np.uint8([(0, 0, 0), (255, 0, 0), (0, 255, 0)])
NAMED = '#000000', '#ff0000', '#00FF00'

def write_pairs(folder, mask=BLOB, count=2, image='{}.png', name='{}.png', exif=None, **more):
    """Pictures raw/images/{number}.png, each with the same mask raw/masks/{number}.png; `exif` is
    of the pictures, `more` of the masks."""
    for number in range(count):
        files.save(folder / 'raw/images' / image.format(number), files.noise(number), exif=exif)
        files.save(folder / 'raw/masks' / name.format(number), mask, **more)

# --- volumes with masks --------------------------------------------------------------------------

ORGAN = np.zeros((SIDE, SIDE, SIDE), np.uint8)      # no turn and no mirror maps it to itself
ORGAN[5:30, 8:20, 9:24] = 1
ORGAN[25:45, 15:40, 12:16] = 1
LPS = np.diag([-1.0, -1, 3, 1])     # x to the left, y posterior, z superior; slices 3 mm apart

def scan(number):
    """A volume of HU, bright where the organ is."""
    return np.int16(50 + 200 * np.int16(ORGAN) + number)

def write_scans(folder, affine=LPS, mask_affine=LPS, mask=ORGAN, below='masks',
                image_forms=(1, 1), mask_forms=(1, 1)):
    """Two volumes raw/images/{number}.nii.gz and their masks raw/{below}/{number}.nii; forms: the
    codes of their sform and qform."""
    for number in range(2):
        sform, qform = image_forms
        files.nifti(folder / f'raw/images/{number}.nii.gz', scan(number), affine,
                    sform=sform, qform=qform)
        sform, qform = mask_forms
        files.nifti(folder / f'raw/{below}/{number}.nii', mask, mask_affine,
                    sform=sform, qform=qform)

def agree(task):
    """Whether every image of `write_scans` is bright exactly where its mask is 1."""
    images = np.concatenate(list(task.images.values()))
    masks = np.concatenate(list(task.answers.values()))
    bright = images[..., 0] > 180       # HU of 250 and more become 191, those of 50 become 106
    return masks.sum() == 2 * ORGAN.sum() and np.array_equal(bright, masks == 1)

# --- pictures of two classes ---------------------------------------------------------------------

def write_animals(folder, below='{kind}', names='012', seed=0, kinds=KINDS):
    """Pictures of cats and dogs raw/{kind}/{name}.png, no two alike."""
    for kind in kinds:
        place = folder / 'raw' / below.format(kind=kind)
        for number, name in enumerate(names):
            files.save(place / f'{name}.png', animal(kind, number, seed))

def animal(kind, number, seed=0):
    """What picture `number` of a class shows."""
    return files.noise(seed + number + 500 * (kind != 'cat'))

# --- preparations --------------------------------------------------------------------------------

def prepare(folder, *words, out='out'):
    """The Result of preparing folder/raw as a task into folder/out."""
    words = '--task', 'mini', '--size', SIDE, *words
    return prepared.prepare(folder / 'raw', folder / out, *words)

def task(folder, *words, out='out'):
    """The task that becomes of folder/raw, which must succeed; `said`: what was printed."""
    result = prepare(folder, *words, out=out)
    assert result.code == 0, prepared.said(result)
    found = prepared.task(folder / out)
    found.said = prepared.said(result)
    return found

def refused(folder, *words, naming):
    """Assert that folder/raw is refused in one sentence that names each of these words, and leaves
    nothing -> the sentence. ? in a word is the number of the first image that it names: which of
    several is read first is drawn."""
    result = prepare(folder, *words)
    assert not list(folder.glob('out*')), prepared.said(result)
    number = re.search(r'images/(\d)|$', result.sentence)[1] or '?'
    return runs.ends(result, [str(word).replace('?', number) for word in naming])
