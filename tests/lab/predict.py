"""Masks or classes of new files, by the best network of a fine-tuned run.

    python finetune.py --predict new/*.png scan.nii.gz --out out/fives      starts this program
    python -m tests.lab.predict out/fives new/*.png scan.nii.gz

Writes to the folder `predictions` of the run, below each file's full path: masks with the numbers
of the classes, an overlay in colours beside each, and classes.csv with class probabilities.
"""
import argparse
import csv
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image, ImageColor

import finetune
from model import ViT, read_checkpoint
from prepare_medverse import VOLUMES, cut, has_ending, read, resize, series, to_uint8
from pretrain import set_up_process
from tests.encoders.own import own_encoder

# The colours of the classes from 1 on.
COLOURS = ('lime', 'red', 'dodgerblue', 'gold', 'magenta', 'cyan', 'orange', 'purple', 'green',
           'pink', 'sienna', 'teal')

def overlay(image, mask):
    """uint8 (height, width[, 3]) with the classes of mask (height, width) painted over it.
    0 and 255 are clear. Returns uint8 (height, width, 3)."""
    palette = np.array([ImageColor.getrgb(name) for name in COLOURS])
    colours = palette[(mask.astype(int) - 1) % len(palette)]
    image = image.reshape(*mask.shape, -1)
    shown = (mask > 0) & (mask < 255)
    return np.where(shown[..., None], image * 0.45 + colours * 0.55, image).astype(np.uint8)

def load_run(out, device):
    """The best network of a fine-tuned run, its task's meta.json, its Config and its file."""
    best = Path(out, 'best.pt')
    if not best.exists():
        raise SystemExit(f'{best}: is not there; give --out the folder of a fine-tuned (not a '
                         f'pretrained) run')
    state, config, checkpoint = read_checkpoint(best)
    path = checkpoint['init']
    if path.endswith('.py'):
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() != checkpoint['sha256']:
            raise SystemExit(f'{path}: is not what {best} was fine-tuned with')
        vit = own_encoder(path, config.size)
    else:
        vit = ViT(config)
    net = finetune.add_head(vit, checkpoint['meta'], checkpoint['pool']).to(device)
    net.load_state_dict(state)
    return net, checkpoint['meta'], config, checkpoint

def predict_image(net, image, size, device):
    """Mask (height, width) or chances (classes,) of uint8 (height, width[, 3])."""
    pixels = resize(image, size).transpose(2, 0, 1).copy()  # torch takes no flip
    images = torch.from_numpy(pixels).expand(1, 3, -1, -1).to(device)
    logits = finetune.infer(net, images, image.shape[:2])[0]
    answer = logits.argmax(0).byte() if logits.dim() == 3 else logits.softmax(0)
    return answer.cpu().numpy()

def write_masks(target, path, images, masks):
    """Write the masks of a file, and beside them an overlay of the one with the most foreground.
    One mask of a picture becomes a PNG, everything else NIfTI. Pages of a picture become voxels
    (x, y, page), x to the left and y to the back, as other programs take them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    foreground = [np.count_nonzero(mask) for mask in masks]
    shown = np.argmax(foreground) if any(foreground) else len(masks) // 2
    Image.fromarray(overlay(images[shown], masks[shown])).save(f'{target}-overlay.png')
    is_scan = has_ending(path, ('.hdr', *VOLUMES))
    if len(masks) == 1 and not is_scan:
        Image.fromarray(masks[0]).save(f'{target}-mask.png')
        return
    pages = np.stack(masks).T
    scan = nib.load(path) if is_scan else nib.Nifti1Image(pages, np.diag([-1, -1, 1, 1]))
    volume = np.zeros(scan.shape, np.uint8)
    slices = cut(volume, scan.affine)      # a view, in the order of reading
    slices[:] = np.reshape(masks, slices.shape)
    mask = nib.Nifti1Image(volume, scan.affine, scan.header, dtype=np.uint8)
    nib.save(mask, f'{target}-mask.nii.gz')

def predict_file(name, net, meta, device, target):
    """Predict the images of a file or DICOM folder. Writes masks, or returns rows of classes.csv.
    Masks lie below the file's full path, so that none takes another's place."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        is_folder = os.path.isdir(name)     # of DICOM, converted to NIfTI files
        paths = series(Path(name), Path(scratch)) if is_folder else [Path(name)]
        for path in paths:
            label = os.path.join(name, path.name) if is_folder else name
            images = [image for volume in read(path)
                      for image in to_uint8(volume, meta['modality'])]
            answers = [predict_image(net, image, meta['size'], device) for image in images]
            if meta['kind'] == 'segmentation':
                write_masks(target / os.path.abspath(label)[1:], path, images, answers)
                continue
            for number, chances in enumerate(answers):
                best = meta['classes'][chances.argmax()]
                rows.append((label, number, best, *chances.tolist()))
    return rows

@torch.no_grad()
def predict(out, names, device):
    """Apply the fine-tuned run in the folder `out` to files. A file that fails is named; the
    others get their prediction. Returns how many failed."""
    net, meta, _, _ = load_run(out, device)
    target = Path(out, 'predictions')
    target.mkdir(exist_ok=True)
    rows, failed = [], 0
    for name in names:
        try:
            rows += predict_file(name, net, meta, device, target)
        except (Exception, SystemExit) as error:        # decoders fail in every way; disks run full
            print(f'{name}: gets no prediction ({type(error).__name__}: {error})', file=sys.stderr)
            failed += 1
    if rows:        # names of files need not be UTF-8
        with open(target / 'classes.csv', 'w', newline='', errors='surrogateescape') as table:
            csv.writer(table).writerows([('file', 'image', 'class', *meta['classes']), *rows])
    print(f'{target}: predictions of {len(names) - failed} of {len(names)} files')
    return failed

def main(words=None):
    """Read the command line, or `words`, and predict; the status is 1 if a file failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='folder of a fine-tuned run')
    parser.add_argument('names', nargs='+', metavar='FILE', help='images, or folders of DICOM')
    parser.add_argument('--device', default='', help='cpu, cuda or mps (default: as finetune.py)')
    o = parser.parse_args(words)
    if not o.run:
        raise SystemExit('--predict needs --out, the folder of a fine-tuned run')
    try:
        *_, device = set_up_process(o.device)
        sys.exit(predict(o.run, o.names, device) > 0)
    except OSError as error:
        raise SystemExit(f'{error}; predictions that were written before are whole')
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == '__main__':
    main()
