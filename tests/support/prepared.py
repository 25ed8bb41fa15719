"""Preparations in this process, and what they leave on the disk read back."""
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.support import runs

SIZE = 64   # side of what is stored where a test says nothing else, px

def prepare(raw, out, *words):
    """The Result of a preparation of RAW into OUT; `words` win over those given here."""
    words = '--raw', raw, '--out', out, '--size', SIZE, '--workers', 1, *words
    return runs.program('prepare_medverse', *words)

def said(result):
    """All that a program printed: its output, then its warnings and its error."""
    return result.out + result.err

class Prepared:
    """The sources in a folder that was prepared for pretraining."""

    def __init__(self, out):
        self.out = Path(out)

    @property
    def names(self):
        """Of the sources, sorted."""
        return sorted(path.parent.name for path in self.out.glob('*/meta.json'))

    def shards(self, source):
        """The arrays uint8 (n, S, S, c) of a source, file by file."""
        return [np.load(path) for path in sorted((self.out / source).glob('*.npy'))]

    def images(self, source):
        """All images of a source (n, S, S, c); n may be 0."""
        shards = self.shards(source)
        if not shards:
            return np.zeros((0, SIZE, SIZE, 1), np.uint8)
        return np.concatenate(shards)

    def meta(self, source):
        return json.loads((self.out / source / 'meta.json').read_text())

    def dropped(self, source):
        """The rows of dropped.csv as dicts with path, reason, detail."""
        file = self.out / source / 'dropped.csv'
        with open(file, newline='', encoding='utf-8', errors='surrogateescape') as lines:
            return list(csv.DictReader(lines))

    def reasons(self, source):
        """{path: reason} of what was dropped."""
        return {row['path']: row['reason'] for row in self.dropped(source)}

def task(folder):
    """A prepared task read back by NumPy alone: meta, kind, classes, counts; split, images and
    answers, each by the name of the split; `where` {path: its split}; of pictures, which give one
    image a file, also `image` and `answer` {path: array}."""
    folder = Path(folder)
    meta = json.loads((folder / 'meta.json').read_text())
    split = json.loads((folder / 'split.json').read_text())
    array = 'masks' if meta['kind'] == 'segmentation' else 'labels'
    images = {part: np.load(folder / part / 'images.npy') for part in split}
    answers = {part: np.load(folder / part / f'{array}.npy') for part in split}
    where = {path: part for part, paths in split.items() for path in paths}
    found = SimpleNamespace(meta=meta, kind=meta['kind'], classes=meta['classes'],
                            counts=meta['counts'], split=split, images=images, answers=answers,
                            where=where, image={}, answer={})
    for part, paths in split.items():
        if len(paths) == len(images[part]):     # one image a file, in the order of the paths
            found.image |= dict(zip(paths, images[part]))
            found.answer |= dict(zip(paths, answers[part]))
    return found

# --- one file, without a preparation around it ---

def read(path, **more):
    """The arrays of a file in its own units, each (n, H, W) or (n, H, W, 3), upright."""
    return runs.module('prepare_medverse').read(path, **more)

def upright(volume, affine):
    """The view of an array (x, y, z[, time ...]) as upright slices (time, n, H, W)."""
    return runs.module('prepare_medverse').cut(volume, affine)

def to_uint8(volume, modality):
    """A volume (n, H, W) in 8 bits, by the window of its modality."""
    return np.stack([*runs.module('prepare_medverse').to_uint8(volume, modality)])

def outcomes(path, modality, size=SIZE, min_side=8):
    """What becomes of each image of a file: pixels (or None), single, reason ('' where it is kept)
    and detail."""
    return [*runs.module('prepare_medverse').source_items(path, modality, size, min_side)]

def kept(path, modality, size=SIZE):
    """The stored images of a file (S, S, c); the file holds no others."""
    found = outcomes(path, modality, size)
    assert not any(item.reason for item in found), found
    return [item.pixels for item in found]

def dropped(path, modality, size=SIZE):
    """(reason, detail) of a file of which no image is kept."""
    item, = outcomes(path, modality, size)
    assert item.pixels is None
    return item.reason, item.detail
