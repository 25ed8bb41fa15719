r"""Prepare images for pretraining (paper, C.1.1) and labelled tasks for fine-tuning: downloads in, uint8 arrays out.

    python prepare_medverse.py --list --raw RAW         the data sets of Tables 2 and 3, and which of them lie below RAW
    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --task fives --raw RAW/fives
    python prepare_medverse.py --task mine --raw MINE --images '(.*)\.png' --masks '(.*)_truth' --values 0 255

RAW/<name>/** holds a data set of Table 2 as it was unpacked, RAW/<Modality>/<source>/** any others: PNG JPEG TIFF BMP
GIF PGM PPM, NIfTI, DICOM series, .npy, AVI and MP4. OUT/<source>/ gets, when it is whole, 00000.npy ... (uint8
(n, S, S, c): n images of side S, c = 1 grey or 3 RGB; H, W are sides as published, n also slices of a volume),
meta.json and dropped.csv (what was dropped and why). A stopped command can be started again. A task is images in pairs
with masks (segmentation) or in folders named after their classes.

Rules on names are regular expressions, searched in the path below RAW in any case. An image and its mask are a pair
where the groups ( ) of both rules find the same text: above, a/12 in a/12.png and in a/12_truth.png.

Parquet and HDF5 are not read. Eyepacs is also on Kaggle as JPEG. Save Thyroid-Cine-clip's image[::10] by h5py as .npy,
and MoNuSAC's rows by pandas as <split>/images/<row>.png and <split>/masks/<row>.png: each instance, its category.
"""
import argparse
import contextlib
import csv
import fcntl
import inspect
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter, deque, namedtuple
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageOps, ImageSequence
from tqdm import tqdm

MODALITIES = ('CT', 'PET', 'MR', 'X-ray', 'Ultrasound', 'Fundus', 'OCT', 'Pathology', 'Endoscope', 'Photo')
RULES = {  # for what is not 8 bits: values that become 0 and 255, or percentiles; least share above 0.02; in words
    'CT': ((-200, 400), (), 0.05, 'HU, or HU + 32768, clipped to [-200, 400]; else of unsigned, minimum..maximum'),
    'MR': ((), (1, 99), 0.05, '1st..99th percentile'),
    'PET': ((), (1, 99), 0.01, '1st..99th percentile; SUV in [0, 20] where the path has suv'),  # its z-score cancels
    'SUV': ((0, 20), (), 0.01, 'SUV in [0, 20]'),  # PET in standardized uptake values
    '': ((), (0, 100), 0, 'minimum..maximum')}
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
VIDEOS, NIFTI = ('.avi', '.mp4'), ('.nii.gz', '.nii')
IMAGES = (*PICTURES, *VIDEOS, *NIFTI, '.npy', '.img')
FOLDERS = {  # of official splits, as train, Training Set, test_images
    part: rf'(^|/)({names})([ _-]?(set|data|images?))?/'
    for part, names in (('train', 'train(ing)?'), ('val', 'val(id(ation)?)?'), ('test', 'test(ing)?'))}
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'other')
SHARD = 256 << 20  # bytes of a full shard
Image.MAX_IMAGE_PIXELS = 100_000_000  # a file of few bytes can claim any number; Pillow refuses twice as many as this

@dataclass
class Options:
    """The options; the comment beside each is its --help."""
    raw: str = ''  # folder of the downloads, RAW/<Modality>/<source>/**, or of one task
    out: str = ''  # folder of the prepared sources, by default data/medverse, or of the task, by default data/<task>
    list: bool = False  # print the tables of data sets instead
    source: str = ''  # prepare only this source; --images and --skip then replace those of its row
    size: int = 256  # side of the stored images, px
    min_side: int = 32  # images whose shorter side is below this are dropped, px
    workers: int = os.cpu_count()  # processes
    seed: int = 0  # of a task's split; preparing sources draws nothing
    # a labelled task: those of Table 3 bring their own rules, which these options replace
    task: str = ''  # its name
    modality: str = ''  # sets the intensity window of its volumes
    images: str = ''  # rule of the images (default, where masks are found, (.*)images/(.*), extensions apart)
    masks: tuple = ()  # rule of the masks (default (.*)masks/(.*)), or one for each class after the background
    skip: str = ''  # rule of what is neither
    labels: tuple = ()  # CSV below RAW and its columns of file, class and patient (default the first two); or as masks
    classes: tuple = ()  # names of the classes (default background foreground, or the folders' names)
    values: tuple = ()  # of each class in the masks (default 0 1 2 ...), as 0 420+421 #ff0000 *; 255 is not scored
    outline: bool = False  # masks show a closed convex outline: fill it
    frames: bool = False  # images with one mask in common are frames: take the darkest of each pixel
    patient: str = ''  # rule: what it finds in a path is the patient, whom no split shares (default the path)
    split: tuple = ()  # for train, val and test each a share (default 50 20 30), a rule or a .txt of names

def boolean(text):
    return ('false', 'no', '0', 'true', 'yes', '1').index(text.lower()) >= 3

def parse_options(defaults, words=None):
    """The dataclass instance `defaults` with what the command line, or `words`, changes: --name value, --name=value,
    --flag, --flag false. An option's help is the comment beside its field; an error is one line."""
    cls = type(defaults)
    comments = dict(re.findall(r'^    (\w+): .*?  # (.*)$', inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=inspect.getmodule(cls).__doc__, usage=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in cls.__annotations__.items():
        reading = {bool: dict(type=boolean, nargs='?', const=True), tuple: dict(nargs='+')}.get(kind, dict(type=kind))
        default = getattr(defaults, name)
        text = comments.get(name, '') + f' (default: {default})' * (default not in ('', ()))
        parser.add_argument('--' + name, default=default, help=text.replace('%', '%%'), **reading)
    values = vars(parser.parse_args(words))
    for name, value in values.items():
        if isinstance(value, (int, float)) and not 0 <= value < float('inf') and value != getattr(defaults, name):
            sys.exit(f'--{name} {value}: must be a number of 0 or more')
    return cls(**values)

# A data set of Table 2 or a task of Table 3. count: images in the paper. access: open, account or form (to apply); with
# ? where the layout is not confirmed. images: rule of its files, or a task's options. skip: masks, crops and copies.
Row = namedtuple('Row', 'name modality content count access link images skip', defaults=('', '', '', '', '.', ''))

SOURCES = [Row(*line.split(' | ')) for line in r'''
AutoPET-CT | CT | whole body | 558473 | form | autopet.grand-challenge.org/Dataset | /CT\.nii
ImageCAS | CT | heart | 257496 | account | kaggle.com/datasets/xiaoweixumedicalai/imagecas | img\.nii
TopBrain-CT | CT | brain | 5647 | open | zenodo.org/records/16623496 | imagesTr.*_ct/.*_0000\.nii
AutoPET-PET | PET | whole body | 354826 | form | autopet.grand-challenge.org/Dataset | /PET\.nii
AutoPET-SUV | PET | whole body | 351900 | form | autopet.grand-challenge.org/Dataset | /SUV\.nii
TotalSegmentator-MR | MR | whole body | 16059 | open | zenodo.org/records/14710732 | /mri\.nii
ACDC | MR | heart | 1902 | open | creatis.insa-lyon.fr/Challenge/acdc | training/.*_frame..\.nii
MRNet | MR | knee | 116624 | account | aimi.stanford.edu | \.npy
Duke-Breast-Cancer-MRI | MR | breast | 515747 | open | cancerimagingarchive.net/collection/duke-breast-cancer-mri
Prostate-MRI-US-Biopsy | MR | prostate | 97180 | open | cancerimagingarchive.net/collection/prostate-mri-us-biopsy
TopBrain-MR | MR | brain | 4604 | open | zenodo.org/records/16623496 | imagesTr.*_mr/.*_0000\.nii
BraTS-GLI | MR | brain | 802341 | account | synapse.org syn53708249 | -(t1n|t1c|t2w|t2f)\.nii
LLD-MMRI | MR | abdomen | 198918 | form | github.com/LMMMEng/LLD-MMRI-Dataset | images/.*\.nii | classification
ChestX-ray8 | X-ray | chest | 112120 | open | nihcc.app.box.com | images.*/.*\.png
CheXpert | X-ray | chest | 223648 | account | stanfordmlgroup.github.io/competitions/chexpert | \.jpg
Mammo-Bench | X-ray | breast | 71844 | account? | india-data.org | Original_Dataset/
MURA | X-ray | bone | 40005 | form | stanfordmlgroup.github.io/competitions/mura | \.png
vzrad2 | X-ray | tooth | 8188 | account | kaggle.com/henriquerezermosqur | \.jpg | _mask/
ADSD | X-ray | coronary artery | 8325 | open | data.mendeley.com/datasets/ydrm75xywg | \.bmp
ARCADE | X-ray | coronary artery | 3000 | open | zenodo.org/records/10390295 | images/.*\.png
XCAD | X-ray | coronary artery | 1621 | open? | github.com/AISIGSJTU/SSVS | train/ | trainC/
Thyroid-Cine-clip | Ultrasound | thyroid | 1737 | account | aimi.stanford.edu | \.npy
EchoNet-Dynamic | Ultrasound | heart | 63867 | form | echonet.github.io/dynamic | Videos/.*\.avi
HC18 | Ultrasound | fetal head | 1334 | open | zenodo.org/records/1327317 | HC\.png
BUSI | Ultrasound | breast | 780 | open | scholar.cu.edu.eg | \.png | _mask
UBPD | Ultrasound | brachial plexus | 955 | form? | ubpd.worldwidetracing.com:9443 | . | mask
MESSIDOR | Fundus | eye | 1200 | form? | adcis.net | \.tif
Refuge2 | Fundus | eye | 1200 | account | kaggle.com/datasets/victorlemosml/refuge2 | images/.*\.jpg
APTOS2019 | Fundus | eye | 5590 | account? | ahmadelsallab.github.io/APTOS | (train|test)_images/.*\.png
Eyepacs | Fundus | eye | 88702 | open | huggingface.co/datasets/bumbledeep/eyepacs | \.jpe?g
ROSE | OCT | eye | 229 | form | imed.nimte.ac.cn | (img|original)/
OCTA500-OCTA | OCT | eye | 600 | account | ieee-dataport.org/open-access/octa-500 | OCTA_3.*/Projection Maps/OCTA\(
OCTA500-OCT | OCT | eye | 600 | account | ieee-dataport.org/open-access/octa-500 | OCTA_3.*/Projection Maps/OCT\(
ZhangLabData-OCT | OCT | eye | 109309 | open | data.mendeley.com/datasets/rscbjbr9sj | OCT/.*\.jpeg
BBBC041v1 | Pathology | blood smears | 1328 | open | bbbc.broadinstitute.org/BBBC041 | images/
Lacuna-Malaria-Challenge | Pathology | blood smears | 3925 | account | zindi.africa | images/.*\.jpg
Lacuna-Malaria-Datasets | Pathology | blood smears | 5059 | open? | doi.org/10.7910/DVN/VEADSE | \.(jpe?g|png)
SegPath | Pathology | 8 kinds of cells | 158687 | open | dakomura.github.io/SegPath | _HE\.png
HyperKvasir | Endoscope | stomach, intestines | 110079 | open | datasets.simula.no/hyper-kvasir | labeled-images/.*\.jpg
Cataract-101 | Endoscope | eye | 42157 | open | ftp.itec.aau.at/datasets/ovid/cat-101 | videos/.*\.mp4
PitVis2023 | Endoscope | pituitary | 96272 | open | rdr.ucl.ac.uk 26531686 | video_.*\.mp4
Endoscapes-CVS | Endoscope | gall bladder | 55783 | open | github.com/CAMMA-public | (train|val|test)/.*jpg | (12_5|25)/
PSI-AVA | Endoscope | prostate | 72160 | open | github.com/BCV-Uniandes/TAPIR | keyframes/.*\.jpg
ISIC-2024 | Photo | skin | 401059 | open | challenge2024.isic-archive.com | \.jpg'''.strip().splitlines()]

TASKS = {row.split(' ')[0]: Row(*re.split(r' ?\| |\n', row, maxsplit=6)) for row in re.split(r'\n(?=\S)', r'''
whs-ct | CT | heart structures | 5176 0 4096 | form | zmiclab.github.io/zxh/0/mmwhs
    --images 'ct_.*/(.*)_image' --masks 'ct_.*/(.*)_label' --values 0 205 420+421 500 550 600 820 850
    --classes background myocardium left-atrium left-ventricle right-atrium right-ventricle aorta pulmonary-artery
kipa22 | CT | kidney cancer structures | 13846 5864 5959 | account | kipa22.grand-challenge.org
    --images '(.*)image/(.*)' --masks '(.*)label/(.*)' --classes background renal-vein kidney renal-artery tumour
sisvse | Endoscope | surgical scene | 2718 336 1456 | form | sisvse.github.io | --split 2718 336 real_val_1/
    --images 'images/real/(.*)\.jpg' --masks 'masks/real_.*_1/(.*)\.png' --patient '[^/_]+(?=_[^/]*$)'
    --classes 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
cholecseg8k | Endoscope | cholecystectomy | 4320 1120 2640 | account | kaggle.com/datasets/newslab/cholecseg8k
    --images '(.*)_endo\.png' --masks '(.*)_endo_watershed_mask' --values 0+50+255 11 21 13 12 31 23 24 25 32 22 33 5
    --patient 'video\d+' --classes background abdominal-wall liver gastrointestinal-tract fat grasper connective-tissue
    blood cystic-duct hook gallbladder hepatic-vein liver-ligament
idrid | Fundus | lesions, optic disc | 54 0 27 | account | idrid.grand-challenge.org
    --images 'Original Images/(.*)/(.*)\.jpg' --split 'Training Set/' '' 'Testing Set/'
    --masks 'truths/(.*)/.*/(.*)_OD' 'truths/(.*)/.*/(.*)_MA' 'truths/(.*)/.*/(.*)_HE' 'truths/(.*)/.*/(.*)_EX'
    'truths/(.*)/.*/(.*)_SE' --classes background optic-disc microaneurysms haemorrhages hard-exudates soft-exudates
fives | Fundus | vessels | 200 100 500 | open | figshare.com/articles/19688169
    --images '(.*)Original/(.*)' --masks '(.*)Groun?d truth/(.*)' --values 0 * --split 200 100 500
feta21 | MR | fetal brain | 5120 5120 10240 | account | feta.grand-challenge.org/feta-2021
    --images '(.*)_T2w' --masks '(.*)_dseg' --patient 'sub-\d+' --split 20 20 40
    --classes background external-fluid grey-matter white-matter ventricles cerebellum deep-grey-matter brainstem
candi | MR | brain tissues | 5120 2560 5504 | account | nitrc.org/projects/candi_share
    --images '(.*)_procimg' --masks '(.*)_seg' --split 40 20 43
    --values * 2 3 4 7 8 10 11 12 13 14 15 16 17 18 24 28 41 42 43 46 47 49 50 51 52 53 54 60
octdl | OCT | 7 diseases | 1030 411 623 | open | data.mendeley.com/datasets/sncdhf53xc
    --images '\.jpg' --labels OCTDL_labels.csv file_name disease patient_id
icf | OCT | cystoid fluid | 730 292 438 | account | kaggle.com/datasets/zeeshanahmed13/intraretinal-cystoid-fluid
    --images '(.*)/images/' --masks '(.*)/masks/' --skip 815DME_F/masks/MASK-DME511 --values 0 *
tnbc | Pathology | nuclei | 20 10 20 | open | zenodo.org/records/1175282
    --images 'Slide_(.*)' --masks 'GT_(.*)' --values 0 * --patient 'Slide_\d+'
lsc | Pathology | lymphomas | 188 73 113 | open | andrewjanowczyk.com use case 7
    --images '(CLL|FL|MCL)/.*\.tif' --patient '.*(?=_)'
bcss | Pathology | tissues | 75 30 46 | open | github.com/PathologyDataScience/BCSS
    --images '(?:images|rgbs_colorNormalized)/(.*)' --masks 'masks/(.*)' --patient 'TCGA-[^-]+-[^-]+'
    --classes background tumour stroma inflammatory necrosis other --values '' 1+19+20 2 3+10+11 4 * 0
monusac | Pathology | nuclei | 167 42 101 | open | huggingface.co/datasets/RationAI/MoNuSAC
    --split 167 42 test/ --classes background epithelial lymphocyte macrophage neutrophil
scr | X-ray | chest structures | 25 47 175 | form | jsrt.or.jp and isi.uu.nl/Research/Databases/SCR | --split 25 47 175
    --images 'All247images/(.*)\.' --classes background left-lung right-lung heart left-clavicle right-clavicle
    --masks 'left lung/(.*)\.' 'right lung/(.*)\.' 'heart/(.*)\.' 'left clavicle/(.*)\.' 'right clavicle/(.*)\.'
pdcxr | X-ray | pneumonia | 3659 1573 624 | open | data.mendeley.com/datasets/rscbjbr9sj
    --images 'chest_xray/.*\.jpeg' --patient 'person\d+' --split 3659 1573 chest_xray/test/
dca1 | X-ray | coronary arteries | 25 25 84 | account? | kaggle.com/datasets/bard2024 dca1
    --images '(.*)\.pgm' --masks '(.*)_gt\.pgm' --values 0 * --split 25 25 84
dias | X-ray | brain arteries | 30 10 20 | open? | zenodo.org/records/11637181 | --values 0 * --frames
    --images '(.*)images/image_s(.*)_i' --masks '(.*)labels/label_s(.*)\.png' --split training/ validation/ test/
dsca | X-ray | brain arteries | 112 44 68 | open? | zenodo.org/records/11255024
    --images 'images/(.*)/' --masks 'labels/(.*)\.' --values 0 * --frames
sts-tooth-2d | X-ray | teeth | 100 100 700 | open? | toothfairychallenges.github.io/miccai2023
    --images '(.*)/Labeled/Image/(.*)' --masks '(.*)/Labeled/Mask/(.*)' --values 0 * --split 100 100 700
uns | Ultrasound | nerve | 2758 1078 1799 | account | kaggle.com/c/ultrasound-nerve-segmentation
    --images '(.*)\.tif' --masks '(.*)_mask\.tif' --values 0 * --patient '\d+(?=_\d+\.tif)'
tn5000 | Ultrasound | thyroid nodule | 3500 500 1000 | open | figshare.com/articles/28455641
    --images 'JPEGImages/(.*)\.jpg' --labels 'Annotations/(.*)\.xml' --classes malignant benign --values 1 0
    --split Main/train.txt Main/val.txt Main/test.txt
fhu | Ultrasound | fetal head | 499 200 300 | account | kaggle.com/datasets/ankit8467
    --images '(.*HC)\.png' --masks '(.*HC)_Annotation' --values 0 * --outline --patient '\d+(?=_[^/]*HC)'
autopet-org | PET | organs | 18076 6386 10465 | form | github.com/YichiZhang98/SegAnyPET
    --images 'PETCT_([^/]*)/([^/]*)/SUV\.nii' --masks 'PETCT_([^_]*)_(.*)_\.nii' --values 0 1 2 3 4 5 6 7 8 9 10 11+12
    --patient 'PETCT_[^/_]+' --modality SUV --classes background liver left-kidney right-kidney heart spleen aorta
    left-lower-lobe right-lower-lobe left-upper-lobe right-upper-lobe right-middle-lobe
slsc-s | Photo | skin lesion | 6675 1911 964 | open | huggingface.co/datasets/makhresearch
    --masks '(.*)labels/(.*)\.txt' --split train/ valid/ test/
slsc-c | Photo | 7 skin diseases | 6675 1911 964 | open | huggingface.co/datasets/makhresearch
    --labels '(.*)labels/(.*)\.txt' --classes BKL NV DF MEL VASC BCC AKIEC --split train/ valid/ test/'''.strip())}

def find(rule, name):  # a match of a rule in a path, or nothing
    return rule and re.search(rule, name, re.IGNORECASE | re.DOTALL)

def by_groups(names, rule):  # {what its groups find: the names}; of a rule without groups a name stands for itself
    found = {}
    for name in names:
        if match := find(rule, name):
            found.setdefault(match.groups() or name, []).append(name)
    return found

def is_dicom(path):  # by its name or its mark, which a DICOMDIR has too
    if path.name.lower().endswith(('.dcm', 'dicomdir', *IMAGES)):
        return path.name.lower().endswith('.dcm')
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM'

def list_names(home):
    """Paths of all files below a folder, relative to it; a DICOM series is named by its folder. Links are followed, but
    no folder is visited twice, nor one that holds `home`."""
    names, visited = set(), {*map(str, home.resolve().parents)}
    for folder, folders, files in os.walk(home, followlinks=True):
        folders.sort()  # so that of two ways to a folder the same one is taken each time
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        below = Path(folder).relative_to(home)
        names |= {str(below if is_dicom(Path(folder, file)) else below / file) for file in files}
    return sorted(names, key=lambda name: name.split('/'))

def is_image(home, name):  # by its name; hidden files are none
    return name.lower().endswith(IMAGES) and '/.' not in f'/{name}' or (home / name).is_dir()

# --- from files to images --------------------------------------------------------------------------------------------
def series(folder, new):
    """NIfTI files that dcm2niix writes to the folder `new` of the MR, CT and PET images in a folder of DICOM files."""
    subprocess.run(['dcm2niix', '-d', '0', '-z', 'n', '-o', new, folder], check=True, capture_output=True)
    # Slices are wanted as they were taken: copies corrected for tilt or uneven distances have no JSON.
    texts = {path.with_suffix('.nii'): path.read_text(errors='replace') for path in sorted(Path(new).glob('*.json'))}
    found = [path for path, text in texts.items() if path.exists() and re.search('"Modality": "(MR|CT|PT)"', text)]
    if not found:
        raise ValueError('of DICOM only MR, CT and PT are read; save it as PNG')
    return found

def read(path, draft=0, affine=None):
    """All arrays of a file, each (n, H, W) or (n, H, W, 3) with upright slices, in the units of the file; uint8 where a
    picture has 8 bits. A DICOM series is its folder. draft: the side (px) that is enough of a JPEG, 0 for all of it.
    affine: what a NIfTI is cut by, if not its own."""
    name = path.name.lower()
    if path.is_dir():
        with tempfile.TemporaryDirectory() as new:  # copies, since the files will be gone
            return [array.copy() for volume in series(path, new) for array in read(volume)]
    if name.endswith(PICTURES):
        return read_pages(path, draft)
    if name.endswith('.npy'):
        array = np.load(path, mmap_mode='r')
        array = array[None] if array.shape[2:] in ((), (3,)) else array
        if array.ndim != 3 and array.shape[3:] != (3,):
            raise ValueError(f'shape {array.shape} is none of (H, W), (H, W, 3), (n, H, W), (n, H, W, 3)')
        return [array]
    if name.endswith('.img') and not has_affine(path):
        film = np.fromfile(path, '>u2').reshape(1, 1024, 2, 1024, 2)  # of JSRT, halved, as the masks of SCR are
        return [np.uint8((4095 - film.mean((2, 4)).clip(0, 4095)) * (255 / 4095) + 0.5)]  # high values are dark
    image = nib.load(path)
    affine, kind = image.affine if affine is None else affine, image.get_data_dtype()
    # get_fdata() would scale in float64; what needs no scaling stays in its 8 or 16 bits
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0) or kind in (np.uint8, np.uint16)
    voxels = np.asarray(image.dataobj, np.float32 if scaled else None)
    if kind.names:
        return list(np.stack([cut(voxels[colour], affine) for colour in 'RGB'], -1))
    return list(cut(voxels, affine))

def has_affine(path):  # as NIfTI and Analyze; .img without .hdr is a film of JSRT
    pair = any(path.with_suffix(suffix).exists() for suffix in ('.hdr', '.HDR'))
    return path.name.lower().endswith((*NIFTI, '.img')[:2 + pair])

def read_pages(path, draft):
    """`read` of a picture; its pages of more than 8 bits become one array, which gets one window."""
    pages = []
    # Given a path, Pillow 13 maps an uncompressed TIFF with its sides exchanged if EXIF turns it.
    with open(path, 'rb') as file, Image.open(file) as image:
        for page in [image] if image.format == 'MPO' else ImageSequence.Iterator(image):  # whose others are previews
            deep = page.mode[0] in 'IF'  # all modes but I;16, I and F have 8 bits
            tags = getattr(page, 'tag_v2', {})  # of TIFF
            number = tags.get(339, (1,))[0], tags.get(258, (1,))[0]  # unsigned 1, signed 2; bits
            # What Pillow without a word inverts, takes for another type or cuts down to 8 bits.
            if number in ((2, 8), (1, 32)) or (tags.get(262) == 0 if deep else ';16' in str(page.tile)):
                raise ValueError('numbers of this type are not read; save it with 8 bits, or in grey with 16, black 0')
            page.draft(None, (draft, draft) if draft else None)  # a JPEG decodes fast at 1/2, 1/4 or 1/8
            page = ImageOps.exif_transpose(page)
            if not deep:
                page = page.convert('L' if page.mode in ('1', 'L', 'LA') else 'RGB')
            pixels = np.asarray(page, np.uint16 if deep and image.format == 'PPM' else None)  # as its numbers are
            pages.append(pixels[None])
    return [np.concatenate(pages)] if deep and len({page.shape for page in pages}) == 1 else pages

def cut(volume, affine):
    """Array (x, y, z[, time ...]) as a view (time, n, H, W): slices across the coarsest spacing (within 1% of it:
    axial), anterior or superior up. What is written to the view is written to the array."""
    turn = nib.io_orientation(affine)  # to RAS: x right, y anterior, z superior
    volume = nib.apply_orientation(volume.reshape(*(*volume.shape, 1)[:3], -1), turn)
    spacing = nib.affines.voxel_sizes(affine)[turn[:, 0].argsort()]
    spacing[np.array(volume.shape[:3]) == 1] = np.inf
    axis = 2 if spacing[2] >= 0.99 * spacing.max() else spacing.argmax()
    return np.moveaxis(volume, (3, axis), (0, 1)).swapaxes(2, 3)[:, :, ::-1, ::-1]

def normalize(volume, modality):
    """Yield the slices of an array (n, H, W[, 3]) as uint8, by the rule of its modality (C.1.1), which may also be
    'SUV'; what is uint8 stays as it is. NaN and infinities count as the lowest value."""
    if volume.dtype == np.uint8:
        yield from volume
        return
    window, percentiles, *_ = RULES.get(modality, RULES[''])
    if modality == 'CT' and volume.dtype.kind == 'u':  # no HU, but maybe HU + 32768, as in DeepLesion, beside 0
        shifted = 31000 < np.median(volume[volume > 0]) < 36000
        window, percentiles = (np.add(window, 32768) if shifted else ()), (0, 100)
    if not len(window):
        sample = volume.flat[::volume.size // 1_000_000 | 1]  # odd: else a width of 2^k is sampled in a few columns
        sample = sample[np.isfinite(sample)] + 0  # a number, if it was bool
        window = np.percentile(sample, percentiles) if sample.size else (0, 0)
    low, high = map(np.float32, window)
    for image in volume:
        image = np.where(np.isfinite(image), image, low) if image.dtype.kind == 'f' else image
        yield np.uint8((image.clip(low, high) - low) * (255 / (high - low or np.inf)) + 0.5)

def resize(image, size):
    """The whole of uint8 (H, W) or (H, W, 3), low-passed, as (S, S, c); three equal channels become one."""
    if image.shape[:2] != (size, size):
        image = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = np.ascontiguousarray(image).reshape(size, size, -1)
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels

def decode_video(path, size):  # yield every 30th frame (C.1.1) as uint8 (1, S, S, 3), while ffmpeg decodes it
    command = ['ffmpeg', '-v', 'fatal', '-i', path, '-vf', f'framestep=30,scale={size}:{size}:flags=bicubic',
               '-fps_mode', 'passthrough', '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        while len(frame := process.stdout.read(size * size * 3)) == size * size * 3:
            yield np.frombuffer(frame, np.uint8).reshape(1, size, size, 3)
    if process.returncode:
        raise ValueError('ffmpeg cannot decode it to its end')

# What becomes of an image: pixels uint8 (S, S, c), or why it is dropped. picture: neither slice nor frame of a video.
Item = namedtuple('Item', 'pixels picture reason detail', defaults=(False, '', ''))

def slices(path, modality, size, min_side):
    """In a worker: yield an Item of side `size` px for each image of a file, or one that says why it is unusable."""
    film, count = path.name.lower().endswith(VIDEOS), 0
    try:
        for array in decode_video(path, size) if film else read(path, draft=max(2 * size, min_side)):
            picture = len(array) == 1 and path.name.lower().endswith((*PICTURES, '.npy'))
            least = 0 if picture and array.dtype == np.uint8 else RULES.get(modality, RULES[''])[2]
            for count, image in enumerate(normalize(array, modality), count + 1):
                small = min(image.shape[:2]) < min_side and not film
                if small or np.ptp(image) < 8 or np.count_nonzero(image > 5) < least * image.size:  # 5 is 0.02 of 255
                    yield Item(None, False, 'small' if small else 'blank', f'{image.shape[1]} x {image.shape[0]} px')
                else:
                    yield Item(resize(image, size), picture)
        if not count:
            raise ValueError('it holds no image')
    except Exception as error:  # decoders fail on broken files in every way there is; dropped.csv tells which
        yield Item(None, False, 'corrupt', f'{type(error).__name__}: {error}')

def find_twin(pixels, name, seen):
    """Name of an earlier picture that uint8 (S, S, c) nearly repeats, or None, and `seen` {hash: [(name, grid)]} learns
    it. Twins have 64-bit difference hashes (is a cell darker than its right neighbour?) that differ in one bit at most.
    Discs on black share a few hashes, so the grids must also be within 3 of 255 levels on average."""
    grid = np.int16(Image.fromarray(pixels.squeeze()).convert('L').resize((9, 8), Image.BOX))  # area means (8, 9)
    bits = int.from_bytes(np.packbits(grid[:, :-1] < grid[:, 1:]).tobytes())
    for key in bits, *(bits ^ 1 << bit for bit in range(64)):
        for twin, other in seen.get(key, ()):
            if np.abs(grid - other).mean() < 3:
                return twin
    seen.setdefault(bits, []).append((name, grid))

# --- the engine: calls in worker processes, results that wait on the disk, folders that appear when they are whole ---
def follow_parent():
    """Start of a worker: Ctrl-C is for the main process alone, and whatever ends that, even kill -9, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()

def spill(folder, work, *call):  # in a worker: path of a new file of what work(*call) yields, which may be large
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        for item in work(*call):
            pickle.dump(item, file, pickle.HIGHEST_PROTOCOL)
    return Path(file.name)

def items(path):  # what `spill` wrote
    with open(path, 'rb') as file:
        while file.peek(1):
            yield pickle.load(file)

def in_order(pool, workers, folder, work, calls, title):
    """Yield the file of what work(path, ...) yields for each of the calls (path, ...); two a worker are under way."""
    jobs = deque()
    for done in tqdm(range(len(calls)), title, unit='file'):
        try:
            jobs.extend(pool.submit(spill, folder, work, *call) for call in calls[done + len(jobs):done + 2 * workers])
            yield jobs.popleft().result()
        except BrokenProcessPool:
            names = ', '.join(str(path) for path, *_ in calls[done:done + workers])
            sys.exit(f'a worker was killed, as for its memory; take fewer --workers, or move away one of {names}')

@contextlib.contextmanager
def whole(folder, pool):
    """Yield FOLDER.part to write in, which becomes FOLDER in the end, or goes away where the program is stopped."""
    part = Path(f'{folder}.part')
    part.mkdir(parents=True, exist_ok=True)
    with open(part / 'lock', 'w') as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed program gives it up
            for old in {*part.iterdir()} - {part / 'lock'}:  # what a killed program left behind
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            yield part
            (part / 'lock').unlink()
            os.replace(part, folder)
        except BlockingIOError:
            sys.exit(f'{folder}: another program is preparing it; wait for it, or choose another --out')
        except BaseException:
            pool.shutdown(cancel_futures=True)  # so that no worker writes there any more
            shutil.rmtree(part, ignore_errors=True)
            raise

# --- sources for pretraining -----------------------------------------------------------------------------------------
def finish_shard(file, shape):  # .npy of uint8 arrays of this shape, which follow 128 bytes for the header
    count = (file.tell() - 128) // np.prod(shape).item()
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=(count, *shape)))
    file.close()

def prepare(row, home, folder, o, pool):
    """Write a source, the files below `home`, to `folder`, unless it is finished. Returns its meta.json, or None."""
    names = list_names(home)
    if folder.exists():
        meta = json.loads((folder / 'meta.json').read_text())
        if meta['size'] != o.size:
            sys.exit(f'{folder}: was prepared with --size {meta["size"]}; delete it, or choose another --out')
        print(f'{folder}: finished before, of {meta["files"]} files (now {len(names)}); delete it to redo it')
        return meta
    images, skip = o.images or row.images, o.skip or row.skip
    wanted = [name for name in names if is_image(home, name) and find(images, name) and not find(skip, name)]
    if not wanted:
        print(f'{home}: no image that can be read matches {images}; it is left out')
        return None
    calls = [(home / name, 'SUV' if row.modality == 'PET' and find('suv', f'{home.name}/{name}') else row.modality,
              o.size, o.min_side) for name in wanted]
    dropped = dict.fromkeys(REASONS, 0) | {'other': len(names) - len(wanted)}
    kept, shards, filling, seen = 0, 0, {}, {}
    with (whole(folder, pool) as part,
          open(part / 'dropped.csv', 'w', encoding='utf-8', errors='surrogateescape') as file):
        log = csv.writer(file, lineterminator='\n')
        log.writerow(('path', 'slice', 'reason', 'detail'))
        log.writerows((name, 0, 'other', 'no image by its name') for name in sorted({*names} - {*wanted}))
        for spilled, name in zip(in_order(pool, o.workers, part, slices, calls, folder.name), wanted):
            for index, item in enumerate(items(spilled)):
                # Neighbouring slices of a volume are alike by nature, and Table 2 keeps them.
                if item.picture and (twin := find_twin(item.pixels, name, seen)):
                    item = Item(None, False, 'duplicate', f'of {twin}')
                if item.reason:
                    dropped[item.reason] += 1
                    log.writerow((name, index, item.reason, item.detail))
                    continue
                shape = item.pixels.shape
                if shape not in filling:
                    filling[shape] = open(part / f'{shards:05d}.npy', 'wb')
                    filling[shape].seek(128)
                    shards += 1
                filling[shape].write(item.pixels)
                kept += 1
                if filling[shape].tell() > SHARD:
                    finish_shard(filling.pop(shape), shape)
            spilled.unlink()
        for shape, shard in filling.items():
            finish_shard(shard, shape)
        _, _, least, words = RULES.get(row.modality, RULES[''])
        meta = {'source': folder.name, 'modality': row.modality, 'count': kept, 'size': o.size,
                'normalization': f'8 bits as they are; others, by one window a file: {words}',
                'foreground': f'slices: {least} of the pixels above 0.02' if least else 'any',
                'files': len(names), 'read': kept + sum(dropped.values()), 'dropped': dropped}
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    return meta

def home_of(row, raw):  # its folder below RAW, or None; several rows may come in one download, as in RAW/AutoPET
    return max((path for path in raw.glob('*/') if f'{row.name}-'.startswith(f'{path.name}-')), default=None)

def modality_of(name):  # that a folder or option names, as Xray and x_ray do X-ray, or None
    letters = re.sub('[^a-z]', '', name.lower())
    return next((known for known in (*MODALITIES, 'SUV') if known.lower().replace('-', '') == letters), None)

def find_sources(raw, o):
    """[(row, folder below RAW, name)] of the sources: rows of Table 2, then whatever is RAW/<Modality>/<source>."""
    found = [(row, home) for row in SOURCES if (home := home_of(row, raw))]
    below = [path for path in sorted(raw.glob('*/*')) if modality_of(path.parent.name) in MODALITIES]
    found += [(Row(path.name, modality_of(path.parent.name)), path) for path in below if path.is_dir()]
    used = {folder for _, home in found for folder in (home, home.parent)}
    if others := {*raw.glob('*'), *below} - used:
        print(f'warning: no data sets are {len(others)} files and folders, as {min(others)}', file=sys.stderr)
    times = Counter(row.name for row, _ in found)
    found = [(row, home, row.name if times[row.name] == 1 else f'{row.name}-{row.modality}')
             for row, home in found if o.source in ('', row.name)]
    if not found:
        sys.exit(f'{raw}: holds no {o.source or "known data set (see --list), as RAW/BUSI, and no RAW/CT/<source>/"}, '
                 f'RAW/MR/<source>/, ...; is it too deep, or not deep enough?')
    names = Counter(name for *_, name in found)
    if twice := [str(home) for _, home, name in found if names[name] > 1]:
        sys.exit(f'{", ".join(twice)}: have the same name; rename or move one of them')
    return found

def list_tables(raw):  # of Tables 2 and 3: what lies below RAW, how to get it, whose layout is not confirmed
    print(f'{"name":<26}{"modality":<12}{"content":<26}{"in the paper":>17}  {"":<7}access, link')
    for row in (*SOURCES, *TASKS.values()):
        access, found = row.access.replace('?', ' (layout unsure)'), 'found' if home_of(row, raw) else '-'
        print(f'{row.name:<26}{row.modality:<12}{row.content:<26}{row.count:>17}  {found:<7}{access}, {row.link}')

# --- labelled tasks --------------------------------------------------------------------------------------------------
# A labelled image: its path below RAW, or those of several frames; that of its mask, or one for each class (None where
# it is absent); its class, of a classification.
Sample = namedtuple('Sample', 'frames masks label patient', defaults=((), '', ''))

def find_samples(raw, o):
    """{path of an image below RAW: its Sample}, by a table of classes, by pairs or by the names of folders."""
    names = [name for name in list_names(raw) if '/.' not in f'/{name}' and not find(o.skip, name)]
    tabled = o.labels and '(' not in o.labels[0]
    rules = () if tabled else o.labels or o.masks or (r'(.*)masks/(.*?)(?:\.nii)?\.\w+$',)
    layers = [by_groups(names, rule) for rule in rules]
    taken = {name: key for layer in layers for key, found in layer.items() for name in found}
    default = r'(.*)images/(.*?)(?:\.nii)?\.\w+$' if taken else '.'
    images = by_groups([name for name in names if name not in taken and is_image(raw, name)], o.images or default)
    singles = [name for found in images.values() for name in found]
    if tabled:
        samples = read_table(raw, singles, *o.labels)
    elif taken:
        samples = dict(pair(raw, images, layers, o))
    else:
        samples = {name: Sample((name,), label=Path(name).parent.name) for name in singles if '/' in name}
    if not samples or not (taken or tabled) and (o.masks or o.labels or o.values or o.outline):
        sys.exit(f'{raw}: {len(singles)} images, {len(taken)} masks match --images, --masks, --labels')
    lost = {name for name, key in taken.items() if key not in images}  # masks
    if lone := lost | {*singles}.difference(*(sample.frames for sample in samples.values())):
        print(f'warning: left out: {len(lone)} images without a mask or label, or masks without an image, as '
              f'{raw}/{min(lone)}', file=sys.stderr)
    patients = {name: match[match.re.groups > 0] for name in samples if (match := find(o.patient, name))}
    if o.patient and not patients:  # else every file would be a patient of its own, unasked
        sys.exit(f'--patient {o.patient}: is found in no path, as {min(samples)}')
    return {name: sample._replace(patient=patients.get(name) or sample.patient or name)
            for name, sample in samples.items()}

def pair(raw, images, layers, o):
    """Yield (first frame, Sample) of images {key: paths} and of their masks or files of labels [{key: paths}]."""
    classes = dict(zip(o.values or map(str, range(len(o.classes))), o.classes))
    for key, frames in images.items():
        masks = [layer.get(key, []) for layer in layers]
        if max(map(len, masks)) > 1 or len(frames) > 1 and not o.frames:
            sys.exit(f'{raw}: {", ".join(sum(masks, frames))} cannot be a pair; mend --images and --masks')
        if o.labels and masks[0]:  # the class of the first object of VOC's XML, or of the largest polygon
            path = raw / masks[0][0]
            found = re.findall(r'<object>.*?<name>\s*(.*?)\s*<', path.read_text(), re.DOTALL)
            if path.suffix == '.txt':
                found = [kind for kind, _ in sorted(polygons(path), key=lambda polygon: -np.ptp(polygon[1], 0).prod())]
            if not found:
                sys.exit(f'{path}: holds no label; mend or --skip it')
            yield frames[0], Sample(tuple(frames), label=classes.get(found[0], found[0]))
        elif any(masks):
            yield frames[0], Sample(tuple(frames), tuple(found[0] if found else None for found in masks))

def polygons(path):
    """Yield (class, corners (n, 2) in shares of the sides) of lines `class x1 y1 ...`; two pairs: centre and sides."""
    for kind, *numbers in map(str.split, path.read_text().splitlines()):
        corners = np.reshape(numbers, (-1, 2)).astype(float)
        if len(corners) == 2:
            corners = corners[0] + corners[1] * ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
        yield kind, corners

def read_lines(raw, end):  # of the table or list whose path ends so, in UTF-8, UTF-16 or the code page of Windows
    paths = [raw / name for name in list_names(raw) if f'/{name}'.endswith(f'/{end}')]
    content = (paths or [raw / end])[0].read_bytes()
    for code in ('utf-16',) if content[:2] in (b'\xff\xfe', b'\xfe\xff') else ('utf-8-sig', 'cp1252', 'latin-1'):
        with contextlib.suppress(UnicodeDecodeError):
            return re.split('\r\n|\r|\n', content.decode(code))  # splitlines() knows other ends

def plain(path):  # without blanks around it and without the extension of an image
    path = path.strip().replace('\\', '/')
    return next((path[:-len(end)] for end in IMAGES if path.lower().endswith(end)), path)

def by_tail(names):
    """{end of a path, of whole folders and without extension: the names that end so}."""
    found = {}
    for name in names:
        tail = plain(name)
        while tail:
            found.setdefault(tail, []).append(name)
            tail = tail.partition('/')[2]
    return found

def read_table(raw, names, end, *columns):
    """{name: Sample} by the columns of file, class and maybe patient of a CSV whose path below RAW ends with `end`."""
    lines, ends, samples = read_lines(raw, end), by_tail(names), {}
    table = csv.DictReader(lines, delimiter=max(',;\t', key=lines[0].count))  # Excel may write semicolons
    head = table.fieldnames or []
    columns = columns or head[:2]
    if len(columns) < 2 or not {*columns} <= {*head}:
        sys.exit(f'{end}: needs a column of files and one of classes, has {head}, no {", ".join({*columns} - {*head})}')
    print(f'{end}: file, class and maybe patient are its columns {", ".join(columns)}; others are not read')
    for row in table:
        path, label, *patient = [(row[column] or '').strip() for column in columns]
        found = ends.get(plain(path), []) if label else []
        sample = Sample(tuple(found), (), label, *patient)
        if len(found) > 1 or found and samples.setdefault(found[0], sample) != sample:
            sys.exit(f'{end}, line {table.line_num}: {path} has another answer above, or is several of {found}')
    return samples

def split(samples, raw, o):
    """{'train', 'val', 'test': names} by --split. A rule takes the images in whose path, or a mask's, it is found, a
    list (.txt below RAW) those it names; shares divide the other patients, n of each class: test gets ceil of its
    share and val floor, as the counts of Table 3 imply, but one is left for training."""
    rules = dict(zip(FOLDERS, o.split or ('50', '20', '30')))
    given = [part for part, rule in FOLDERS.items() if any(find(rule, name) for name in samples)]
    if not o.split and 'train' in given and len(given) > 1:
        rules = FOLDERS if 'test' in given else FOLDERS | {'train': '70', 'test': '30'}  # a test split there must be
    print(f'{raw}: split by {rules} (numbers: drawn by these shares)')
    parts, ends = {}, by_tail(samples)
    for part, rule in rules.items():
        if rule.endswith('.txt'):
            chosen = [name for line in read_lines(raw, rule) for name in ends.get(plain(line), [])]
        else:
            chosen = [name for name, sample in samples.items() if not rule.isdigit()
                      and any(find(rule, path) for path in (name, *filter(None, sample.masks)))]
        parts = dict.fromkeys(chosen, part) | parts  # the first rule decides
    shares = [int(rule) if rule.isdigit() else 0 for rule in rules.values()]
    others = [name for name in samples if name not in parts]
    if others and not sum(shares):
        sys.exit(f'{raw}/{others[0]}: no rule of --split takes it; give shares, as 8 1 1, or --skip it')
    labels, sides, rng = {}, {}, np.random.default_rng(o.seed)
    for name in others:
        labels.setdefault(samples[name].patient, samples[name].label)
    for label in sorted({*labels.values()}):
        group = [patient for patient in labels if labels[patient] == label]
        most = len(group) - (shares[0] > 0)
        test = min(-(-len(group) * shares[2] // sum(shares)), most)
        val = min(len(group) * shares[1] // sum(shares), most - test)
        for part, drawn in zip(('test', 'val', 'train'), np.split(rng.permutation(group), (test, test + val))):
            sides |= dict.fromkeys(drawn.tolist(), part)
    parts |= {name: sides[samples[name].patient] for name in others}
    times = Counter(patient for patient, _ in {(samples[name].patient, part) for name, part in parts.items()})
    if both := sorted(patient for patient in times if times[patient] > 1):
        print(f'warning: {len(both)} patients are in more than one split: {", ".join(both[:9])}', file=sys.stderr)
    return {part: sorted(name for name in parts if parts[name] == part) for part in rules}

def read_masks(path, values, shape, affine):
    """What `classify` makes of each mask of a file. A palette gives numbers, unless the values are colours; polygons
    become one mask of the shape of the image."""
    if path.suffix == '.txt':
        canvas = Image.new('L', shape[1::-1])
        for _, corners in polygons(path):
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners * canvas.size], 1)
        return [classify(np.asarray(canvas), values)]
    masks, lossy = [mask for volume in read(path, affine=affine) for mask in volume], False
    if path.name.lower().endswith(PICTURES):
        with Image.open(path) as image:
            lossy = image.format in ('JPEG', 'MPO') or image.info.get('compression') == 'jpeg'
            palette = image.mode == 'P' and np.ptp(np.reshape(image.getpalette(), (-1, 3)), 1).any()
            if palette and '#' not in ''.join(values):
                masks = [np.asarray(image)]
            if image.mode in ('LA', 'RGBA'):  # what is transparent shows nothing
                masks = [(masks[0].T * (np.asarray(image)[..., -1].T > 127)).T]
    return [classify(mask, values, lossy) for mask in masks]

def classify(mask, values, lossy=False):
    """Mask (H, W) or (H, W, 3) -> (uint8 (H, W): the place in `values` that names each pixel, what only * names). An
    entry may be several values (420+421, #ff0000) or all others (*). 255 is not scored and stays, unless it is named.
    NaN and infinity are 0. In a lossy file the nearest of the values named counts, where * is white."""
    colours = '#' in ''.join(values)
    grey = 0x010101 if colours else 1  # colours are numbers 0xrrggbb
    table, rest = {}, None
    for number, entry in enumerate(values):
        rest = number if '*' in entry else rest
        for value in re.findall(r'[^+*]+', entry):
            table[int(value[1:], 16) if value[0] == '#' else float(value) * grey] = number
    mask = np.nan_to_num(mask, posinf=0, neginf=0)
    if mask.ndim == 3:
        packed = mask @ np.int32((0x010000, 0x000100, 1))
        if not colours and np.ptp(mask, 2).any() and len(np.unique(packed[packed > 0])) > 1:
            raise ValueError('it has several colours; name them in --values, as #ff0000')
        mask = packed if colours else mask.max(2)
    elif colours:
        mask = mask * float(grey)
    found, place = np.unique(mask, return_inverse=True)
    if lossy:
        known = np.unique([*table, 255])
        if colours or np.diff(known).min() < 32:
            raise ValueError('it is lossy, which blurs colours and values near each other; save it as PNG')
        found = known[abs(found[:, None] - known).argmin(1)]
    if rest is None:
        table.setdefault(255 * grey, 255)
    others = {*found.tolist()} - {*table}
    if others and rest is None:
        names = ', '.join(f'#{int(value):06x}' if colours else f'{value:g}' for value in sorted(others)[:9])
        raise ValueError(f'values or colours {names}, which --values {" ".join(values)} does not name')
    return np.uint8([table.get(value, rest) for value in found.tolist()])[place].reshape(mask.shape), others

def fill(outline):  # bool (H, W), closed and convex, with its inside: outline on both sides in a row or column
    run = np.logical_or.accumulate
    rows, columns = (run(outline, axis) & np.flip(run(np.flip(outline, axis), axis), axis) for axis in (0, 1))
    return rows | columns

def common_affine(image, mask):
    """Affine of a NIfTI image, by which its mask is cut too. ValueError where they are not on one grid, within half a
    voxel, or where EXIF turns one of them."""
    for path in (image, mask):
        if path.name.lower().endswith(PICTURES):
            with Image.open(path) as picture:
                if picture.getexif().get(0x0112, 1) != 1:
                    raise ValueError(f'EXIF turns {path}; save both without this tag')
    if has_affine(image) != has_affine(mask):
        raise ValueError('one of them is NIfTI, the other is not')
    if has_affine(image):
        (one, A), (other, B) = (((*file.shape, 1)[:4], file.affine) for file in map(nib.load, (image, mask)))
        drift = np.abs(A - B) @ (*one[:3], 1)  # at most, of any corner, mm
        if one != other or drift.max() > nib.affines.voxel_sizes(A).min() / 2:
            raise ValueError(f'their grids differ: {one} and {other}, {A.round(3).tolist()} and {B.round(3).tolist()}')
        return A

def labelled(path, raw, sample, o):
    """In a worker: yield (pixels uint8 (S, S, c), mask uint8 (S, S) or number of the class, values that only * names)
    for each image of a file, or of several frames."""
    try:
        with tempfile.TemporaryDirectory() as new:
            files = series(path, new) if path.is_dir() else [raw / frame for frame in sample.frames]
            images = [[image for array in read(file) for image in normalize(array, o.modality)] for file in files]
            images = [np.minimum.reduce(same) for same in zip(*images, strict=True)] if o.frames else sum(images, [])
            layers = {number: read_masks(raw / mask, o.values, images[0].shape, common_affine(files[0], raw / mask))
                      for number, mask in enumerate(sample.masks, 1) if mask}
        for image, *found in zip(images, *layers.values(), strict=True):
            mask, others = np.zeros(image.shape[:2], np.uint8), set()
            for number, (layer, more) in zip(layers, found):
                if layer.shape != mask.shape:
                    raise ValueError(f'their sizes differ: {mask.shape} and {layer.shape}')
                layer = np.uint8(fill(layer > 0)) if o.outline else layer
                mask[layer > 0] = number * layer[layer > 0]  # one file: its classes; of several each is 0 or 1
                others |= more
            mask[mask >= len(o.classes)] = 255  # values after those of the classes are not scored
            square = np.asarray(Image.fromarray(mask).resize((o.size, o.size), Image.Resampling.NEAREST))
            yield resize(image, o.size), square if sample.masks else o.classes.index(sample.label), others
    except Exception as error:  # decoders fail in every way there is
        error = f'{type(error).__name__}: {error}'
        sys.exit(f'{path}: cannot be used with {sample.label or sample.masks} ({error}); mend or remove them')

def prepare_task(raw, folder, o, pool):
    """Write the labelled images below RAW to `folder` as data.Task reads them, and split.json with their files."""
    if folder.exists():
        sys.exit(f'{folder}: this task is prepared; delete it to prepare it again, or choose another --out')
    samples = find_samples(raw, o)
    kinds = sorted({sample.label for sample in samples.values() if not sample.masks})
    o.classes = o.classes or kinds or (o.values if len(o.values) > 2 else ('background', 'foreground'))
    if len(o.masks) > 1 and len(o.classes) != len(o.masks) + 1:
        sys.exit(f'--classes {" ".join(o.classes)}: must name the background and then a class for each of --masks')
    o.values = ('0', '*') if len(o.masks) > 1 else o.values or [*map(str, range(len(o.classes)))]
    kind, dtype, *sides = ('labels', np.int64) if kinds else ('masks', np.uint8, o.size, o.size)
    splits = split(samples, raw, o)
    shown, counts, holders, others = {part: Counter() for part in splits}, {}, {}, set()
    with whole(folder, pool) as part:
        for name, chosen in splits.items():
            (part / name).mkdir()
            calls = [(raw / path, raw, samples[path], o) for path in chosen]
            spilled = [*in_order(pool, o.workers, part, labelled, calls, name)]
            channels = [pixels.shape[2] for path in spilled for pixels, *_ in items(path)]
            counts[name] = len(channels)
            shape = len(channels), o.size, o.size, max(channels, default=1)  # grey has three where others are in colour
            if shutil.disk_usage(part).free < 2 * np.prod(shape):  # writing to a map of a full disk kills the program
                raise OSError(28, 'No space left on device')
            images = np.lib.format.open_memmap(part / name / 'images.npy', 'w+', np.uint8, shape)
            answers = np.lib.format.open_memmap(part / name / f'{kind}.npy', 'w+', dtype, (len(channels), *sides))
            for n, (pixels, answer, values) in enumerate(item for path in spilled for item in items(path)):
                images[n], answers[n] = pixels, answer
                shown[name].update(np.unique(answer).tolist())
                others |= values
                if np.ptp(pixels):  # black slices are alike
                    holders.setdefault(hash(pixels.tobytes()), set()).add(name)
            for path in spilled:
                path.unlink()
        meta = {'kind': 'classification' if kinds else 'segmentation', 'classes': o.classes, 'modality': o.modality,
                'size': o.size, 'counts': counts}
        (part / 'split.json').write_text(json.dumps(splits, indent=1))
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
        print(f'{"images that show":<26}' + ''.join(f'{part:>8}' for part in shown))
        for number, name in enumerate(o.classes):
            print(f'{name:<26}' + ''.join(f'{seen[number]:>8}' for seen in shown.values()))
        unseen = [name for number, name in enumerate(o.classes) if not shown['train'][number]]
        if not shown['test'] or {*shown['test']} - {*shown['train'], 255} or len(o.classes) - len(unseen) < 2:
            sys.exit(f'{raw}: training must show two classes and all of the test images, but no training image shows '
                     f'{", ".join(unseen) or "more"}; mend --classes, --values (255 counts where named) or --split')
    for parts, times in Counter(' and '.join(sorted(parts)) for parts in holders.values() if len(parts) > 1).items():
        print(f'warning: {times} images are the same in {parts}', file=sys.stderr)
    if len(others) > 3:
        print(f'note: the * of --values stands for {sorted(others)[:20]}')
    print(f'{folder}: {meta["kind"]} into {", ".join(o.classes)}; images: {counts}')

# --- the command -----------------------------------------------------------------------------------------------------
def main():
    """Prepare a task, or every source below RAW."""
    o = parse_options(Options())
    row = TASKS.get(o.task)
    if row:  # its rules, then the command line again over them
        rules = ['--modality', row.modality, '--split', '50', '20', '30', *shlex.split(row.images)]
        o = parse_options(Options(), rules + sys.argv[1:])
    if o.list:
        return list_tables(Path(o.raw))
    if o.modality:
        o.modality = modality_of(o.modality) or sys.exit(f'--modality {o.modality}: is none of {MODALITIES}, SUV')
    if o.size < 1 or len(o.split) not in (0, 3) or any(re.fullmatch(r'\d*\.\d+', rule) for rule in o.split):
        sys.exit('--size takes 1 or more, --split takes three whole shares, rules or lists: for train, val and test')
    if not (o.raw and Path(o.raw).is_dir()):
        sys.exit(f'--raw "{o.raw}": there is no such folder of <Modality>/<source>/** or of a task')
    out, raw = Path(o.out or f'data/{o.task or "medverse"}'), Path(o.raw)
    try:
        with ProcessPoolExecutor(o.workers, initializer=follow_parent) as pool:
            if o.task:
                return prepare_task(raw, out, o, pool)
            sources = find_sources(raw, o)
            metas = [prepare(row, home, out / name, o, pool) for row, home, name in sources]
    except OSError as error:
        sys.exit(f'{out}: {error}; start again, finished sources stay')
    except re.error as error:
        sys.exit(f'{error.pattern}: is no regular expression ({error}), in which any text is .* and a dot \\.')
    except KeyboardInterrupt:
        print('stopped: start again to go on with the unfinished sources', file=sys.stderr)
        sys.exit(130)
    rows = [(m['modality'], m['source'], m['files'], m['read'], m['count'], *m['dropped'].values()) for m in metas if m]
    for modality, source, *counts in (('modality', 'source', 'files', 'read', 'kept', *REASONS), *rows):
        print(f'{modality:<11}{source:<30}' + ''.join(f'{count:>10}' for count in counts))
    if left := [name for (*_, name), meta in zip(sources, metas) if not meta]:
        sys.exit(f'left out, as told above: {", ".join(left)}')
    print(f'{len(rows)} sources, every file accounted for: read = kept + dropped')

if __name__ == '__main__':
    main()
