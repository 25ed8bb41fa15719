"""Shared by the tests: the repository on the path, one thread, and tiny prepared sources."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)     # the tests' tensors are too small to share

def write_source(folder, modality, count, channels=1, size=32, shard=16):
    """A prepared source in the layout that pretraining reads; returns its images (count, size, size, channels)."""
    folder.mkdir(parents=True)
    images = np.random.default_rng(count).integers(0, 256, (count, size, size, channels), np.uint8)
    for number, first in enumerate(range(0, count, shard)):
        np.save(folder / f'{number:05d}.npy', images[first:first + shard])
    meta = dict(source=folder.name, modality=modality, count=count, channels=channels, normalization='none')
    (folder / 'meta.json').write_text(json.dumps(meta))
    return images

@pytest.fixture(scope='session')
def sources(tmp_path_factory):
    """A folder of four small sources of three modalities, grey and colour, and their images in the order of numbering."""
    folder = tmp_path_factory.mktemp('prepared')
    kinds = [('a-ct', 'CT', 20, 1), ('b-photo', 'Photo', 17, 3), ('c-ct', 'CT', 9, 1), ('d-mr', 'MR', 22, 1)]
    return folder, [write_source(folder / name, *rest) for name, *rest in kinds]
