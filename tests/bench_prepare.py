"""Rate of prepare_medverse.py against the bare readers on the same files, both in two processes, and its memory.

    python tests/bench_prepare.py

Pictures: against Pillow's decode and resize of each. Volumes: against reading them with nibabel alone. The two take turns;
printed are the ratio of their rates (1 is as fast as the bare reader), its range, and the largest memory of any process.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import prepare_medverse as prep  # noqa: E402

def write_files(raw):
    """Smooth noise as pictures of 1024 px and as volumes of 256 x 256 x 160, which compress as real ones about do."""
    rng = np.random.default_rng(0)
    for i in range(240):
        small = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).resize((1024, 1024), Image.Resampling.BICUBIC)
        grain = np.clip(np.asarray(small) + rng.integers(-3, 4, (1024, 1024, 3)), 0, 255).astype(np.uint8)
        for kind in ('png', 'jpg'):
            path = raw / kind / 'Photo' / 'source' / f'{i}.{kind}'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grain).save(path)
    for i in range(40):
        coarse = rng.integers(-1000, 1000, (32, 32, 160)).repeat(8, 0).repeat(8, 1) + rng.integers(-20, 20, (256, 256, 160))
        path = raw / 'nii.gz' / 'CT' / 'source' / f'{i}.nii.gz'
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(coarse.astype(np.int16), np.diag((1, 1, 3, 1))), path)

def bare(path):
    if path.name.endswith('.nii.gz'):
        return np.asarray(nib.load(path).dataobj).size
    return np.asarray(Image.open(path).convert('RGB').resize((256, 256), Image.Resampling.BICUBIC)).size

def prepare(raw, out):
    argv = ['prepare_medverse.py', '--raw', str(raw), '--out', str(out), '--workers', '2']
    with mock.patch.object(sys, 'argv', argv), contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        prep.main()

def main():
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, 'raw')
        write_files(raw)
        for kind in ('png', 'jpg', 'nii.gz'):
            files, ratios = sorted((raw / kind).rglob(f'*.{kind}')), []
            for turn in range(5):
                start = time.perf_counter()
                with multiprocessing.Pool(2) as pool:
                    pool.map(bare, files, chunksize=1)
                middle = time.perf_counter()
                prepare(raw / kind, Path(folder, f'{kind}-{turn}'))
                ratios.append((middle - start) / (time.perf_counter() - middle))
            print(f'{kind}: {statistics.median(ratios):.2f} times the bare rate ({min(ratios):.2f} to {max(ratios):.2f}, '
                  f'{len(ratios)} turns of {len(files)} files)')
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f'largest memory of a process: {most / 1e6:.2f} GB')

if __name__ == '__main__':
    main()
