"""How fast prepare_medverse.py is beside the bare readers, and its memory.

    python -m tests.lab.bench_prepare

Pictures are compared with decoding and resizing them in Pillow, volumes with reading them in
nibabel. Both use two processes on the same files, and take turns. It prints the ratio of their
rates (1 is as fast as the bare reader), the range of that ratio, and the largest memory of any
process.
"""
import contextlib
import io
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
from PIL import Image

import prepare_medverse

def write_files(raw):
    """Write smooth noise, which compresses about as real files do.
    It becomes pictures of 1024 x 1024 pixels and volumes of 256 x 256 x 160 voxels."""
    rng = np.random.default_rng(0)
    for number in range(240):
        small = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
        smooth = np.asarray(small.resize((1024, 1024), Image.Resampling.BICUBIC))
        grain = rng.integers(-3, 4, smooth.shape)
        picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        for kind in ('png', 'jpg'):
            path = raw / kind / 'Photo' / 'source' / f'{number}.{kind}'
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    for number in range(40):
        coarse = rng.integers(-1000, 1000, (32, 32, 160))
        smooth = coarse.repeat(8, 0).repeat(8, 1)
        volume = (smooth + rng.integers(-20, 20, smooth.shape)).astype(np.int16)
        path = raw / 'nii.gz' / 'CT' / 'source' / f'{number}.nii.gz'
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume, np.diag((1, 1, 3, 1))), path)

def read_bare(path):
    """Read a file as simply as its library can; returns how many numbers it holds."""
    if path.name.endswith('.nii.gz'):
        return np.asarray(nib.load(path).dataobj).size
    picture = Image.open(path).convert('RGB')
    return np.asarray(picture.resize((256, 256), Image.Resampling.BICUBIC)).size

def prepare(raw, out):
    """Prepare a folder in two processes, without a word; raises RuntimeError if that fails."""
    words = ['prepare_medverse.py', '--raw', str(raw), '--out', str(out), '--workers', '2']
    printed = io.StringIO()
    with mock.patch.object(sys, 'argv', words), contextlib.redirect_stdout(printed), \
            contextlib.redirect_stderr(printed):
        try:
            prepare_medverse.main()
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f'prepare_medverse.py failed: {stop.code}')

def compare(files, raw, out):
    """Seconds of the bare readers / seconds of the preparation, for the same files."""
    begin = time.perf_counter()
    with multiprocessing.Pool(2) as pool:
        pool.map(read_bare, files, chunksize=1)
    middle = time.perf_counter()
    prepare(raw, out)
    return (middle - begin) / (time.perf_counter() - middle)

def main():
    """Write the files, let both read them five times, and print the ratios."""
    if sys.argv[1:]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, 'raw')
        write_files(raw)
        for kind in ('png', 'jpg', 'nii.gz'):
            files = sorted((raw / kind).rglob(f'*.{kind}'))
            ratios = []
            for turn in range(5):
                ratios.append(compare(files, raw / kind, Path(folder, f'{kind}-{turn}')))
            print(f'{kind}: {statistics.median(ratios):.2f} times the bare rate '
                  f'({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} turns of {len(files)} '
                  f'files)', flush=True)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1 if sys.platform == 'darwin' else 1024
    most = unit * max(usage.ru_maxrss for usage in usages)
    print(f'largest memory of a process: {most / 1e9:.2f} GB')

if __name__ == '__main__':
    main()
