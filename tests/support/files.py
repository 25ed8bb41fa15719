"""Writers of small files of every kind that prepare_medverse.py reads, and what they show."""
import struct
import subprocess
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw

# --- what the files show -------------------------------------------------------------------------

def texture(seed, height=96, width=96, channels=()):
    """Smooth random blobs, which survive a change of size and JPEG: uint8 (H, W), or (H, W, 3) if
    `channels` is 3 or (3,)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 10, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image) if channels else np.asarray(image)[..., 0]

def noise(seed, side=48, channels=()):
    """Independent random pixels, uint8 (side, side[, 3]): each pixel counts."""
    channels = (3,) if channels else ()
    shape = (side, side, *channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

def blob(seed=0, side=96):
    """A mask: uint8 (side, side), 1 in an ellipse that no turn or mirror maps to itself, else 0."""
    x, y = np.random.default_rng(seed).integers(side // 16, side // 4, 2).tolist()
    picture = Image.new('L', (side, side))
    ImageDraw.Draw(picture).ellipse((x, y, x + side * 5 // 8, y + side // 4), 1)
    return np.asarray(picture)

def ramp(low, high, dtype, side=48):
    """(side, side) of all values from low to high, in equal steps, row by row."""
    return np.linspace(low, high, side * side).round().reshape(side, side).astype(dtype)

def turned(tag):
    """EXIF that tells how to turn a picture: 1 not at all, 3 by 180 degrees, 6 to the right."""
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif

# --- writers: each makes the folders that are missing, and returns the path ----------------------

def save(path, array, **more):
    """Write an array in the format of the path's suffix; `more` goes to Pillow, or to `nifti`."""
    path = parent(path)
    if path.name.endswith('.npy'):
        np.save(path, array)
    elif path.name.endswith(('.nii', '.nii.gz')):
        nifti(path, array, **more)
    else:
        Image.fromarray(array).save(path, **more)
    return path

def write(path, content=''):
    """Write text or bytes."""
    path = parent(path)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path

def parent(path):
    """The path, whose folder now exists."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

def nifti(path, volume, affine=None, spacing=(1, 1, 1), axes='RAS', sform=1, qform=1, scale=None):
    """Write a volume with an affine, or with this spacing (mm). axes: the volume is given in RAS
    order (x to the right, y anterior, z superior) and stored along these axes. sform, qform: their
    codes, 0 for none. scale: (slope, intercept) of the numbers that are stored."""
    path = parent(path)
    affine = np.diag([*spacing, 1.0]) if affine is None else affine
    image = nib.Nifti1Image(volume, affine, dtype=volume.dtype)
    if axes != 'RAS':
        start, end = (nib.orientations.axcodes2ornt(codes) for codes in ('RAS', axes))
        image = image.as_reoriented(nib.orientations.ornt_transform(start, end))
    affine = image.affine.copy()    # which setting one of the forms to none changes
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    if scale:
        image.header.set_slope_inter(*scale)
    nib.save(image, path)
    return path

SOP_CLASSES = {'CT': '2', 'MR': '4', 'PT': '128', 'CR': '1', 'DX': '1.1', 'MG': '1.2', 'US': '6.1'}

def dicom(path, pixels, modality='MR', series=1, number=0, position=(0, 0, 0), more=()):
    """Write slice `number` of a DICOM series, in explicit little endian: grey of 16 bits (H, W), or
    uint8 (H, W, 3). position: of its first voxel, mm. more: other (tag, representation, value)."""
    path = parent(path)
    height, width, *colour = pixels.shape
    bits, signed = 8 * pixels.itemsize, int(pixels.dtype.kind == 'i')
    sop_class = SOP_CLASSES.get(modality, SOP_CLASSES['MR'])
    series_uid = f'1.2.826.0.1.3680043.2.1125.{series}'
    elements = [
        (0x00020000, 'UL', 28),                      # bytes of the next element
        (0x00020010, 'UI', '1.2.840.10008.1.2.1'),   # explicit little endian
        (0x00080008, 'CS', r'ORIGINAL\PRIMARY'),
        (0x00080016, 'UI', f'1.2.840.10008.5.1.4.1.1.{sop_class}'),
        (0x00080018, 'UI', f'{series_uid}.{number}'),
        (0x00080060, 'CS', modality),
        (0x00080070, 'LO', 'SIEMENS'),
        (0x00100020, 'LO', 'p1'),                    # patient
        (0x00180050, 'DS', '3'),                     # thickness, mm
        (0x00181210, 'SH', r'Br38f\3'),              # kernel; dcm2niix copies it into JSON
        (0x0020000d, 'UI', '1.2.826.9'),             # study
        (0x0020000e, 'UI', series_uid),
        (0x00200011, 'IS', f'{series}'),
        (0x00200013, 'IS', f'{number + 1}'),
        (0x00200032, 'DS', '\\'.join(f'{value:.4f}' for value in position)),
        (0x00200037, 'DS', r'1\0\0\0\1\0'),          # axial
        (0x00280002, 'US', 3 if colour else 1),
        (0x00280004, 'CS', 'RGB' if colour else 'MONOCHROME2'),
        (0x00280010, 'US', height),
        (0x00280011, 'US', width),
        (0x00280030, 'DS', r'1\1'),                  # spacing, mm
        (0x00280100, 'US', bits),
        (0x00280101, 'US', bits),
        (0x00280102, 'US', bits - 1),
        (0x00280103, 'US', signed),
        (0x00281052, 'DS', '0'),                     # intercept
        (0x00281053, 'DS', '1'),                     # slope
        (0x7fe00010, 'OW', pixels.tobytes())]
    data = bytes(128) + b'DICM'
    for tag, kind, value in sorted([*elements, *more]):
        data += dicom_element(tag, kind, value)
    path.write_bytes(data)
    return path

def dicom_element(tag, kind, value):
    """Bytes of one element: its tag, its representation, its length and its value."""
    if kind in ('US', 'UL'):
        value = struct.pack({'US': '<H', 'UL': '<I'}[kind], value)
    elif isinstance(value, str):
        value = value.encode()
    if len(value) % 2:
        value += b'\0' if kind == 'UI' else b' '
    head = struct.pack('<HH', tag >> 16, tag & 0xffff) + kind.encode()
    if kind == 'OW':
        return head + struct.pack('<HI', 0, len(value)) + value
    return head + struct.pack('<H', len(value)) + value

def dicom_series(folder, slices, positions, end='.dcm', tilt=0, **more):
    """Write slices at these positions (mm along z), through a gantry tilted by so many degrees."""
    for number, (pixels, z) in enumerate(zip(slices, positions, strict=True)):
        corner = -24, -24 + z * np.tan(np.radians(tilt)), z
        dicom(Path(folder) / f'IM{number:04d}{end}', pixels, number=number, position=corner,
              more=[(0x00181120, 'DS', f'{tilt}')], **more)

def tiff(path, *pages, order='<', photometric=1):
    """Write a plain TIFF of one strip a page, of any type of number, in either byte order;
    photometric 0: white is zero."""
    data = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(order + 'I', 8)
    for number, page in enumerate(pages, 1):
        start = len(data) + 2 + 9 * 12 + 4      # of the pixels, after a count, nine tags and a link
        height, width = page.shape
        tags = {256: width, 257: height, 258: 8 * page.itemsize, 259: 1, 262: photometric,
                273: start, 278: height, 279: page.nbytes, 339: ' uif'.index(page.dtype.kind)}
        data += struct.pack(order + 'H', len(tags))
        for tag, value in tags.items():
            data += struct.pack(order + 'HHII', tag, 4, 1, value)
        data += struct.pack(order + 'I', start + page.nbytes if number < len(pages) else 0)
        data += page.astype(page.dtype.newbyteorder(order)).tobytes()
    return write(path, data)

def png(path, array, side=0):
    """Write a PNG of uint16 (H, W, c), c = 1 to 4; with `side` its header lies about its size."""
    height, width, channels = array.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack('>IIBBBBB', side or width, side or height, 16, colour_type, 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    data = b'\x89PNG\r\n\x1a\n'
    for name, body in (b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''):
        checksum = zlib.crc32(name + body)
        data += struct.pack('>I', len(body)) + name + body + struct.pack('>I', checksum)
    return write(path, data)

def video(path, frames):
    """Write uint8 frames (n, H, W[, 3]) by ffmpeg, in good quality, as .avi or .mp4."""
    path = parent(path)
    height, width = frames.shape[1:3]
    kind = 'rgb24' if frames.ndim == 4 else 'gray'
    coded = ['-q:v', '2'] if path.suffix == '.avi' else ['-pix_fmt', 'yuv420p', '-crf', '12']
    source = ['-f', 'rawvideo', '-pix_fmt', kind, '-s', f'{width}x{height}', '-r', '25', '-i', '-']
    command = ['ffmpeg', '-y', '-v', 'error', *source, *coded, path]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path

# --- reading back --------------------------------------------------------------------------------

def contents(folder):
    """{path below the folder: bytes} of all its files."""
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
