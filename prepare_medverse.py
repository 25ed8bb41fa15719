"""Prepare images for pretraining (paper, C.1.1) and labelled tasks for fine-tuning: raw downloads in, uint8 arrays out.

    python prepare_medverse.py --list --raw RAW         the data sets of Tables 2 and 3, and which of them lie below RAW
    python prepare_medverse.py --raw RAW --out data/medverse
    python prepare_medverse.py --phantoms 200 --out data/phantoms-64 --size 64
    python prepare_medverse.py --task fives --raw RAW/fives
    python prepare_medverse.py --task mine --raw MINE --images '*scans/*.png' --masks '*masks/*.png' --values 0 255

RAW/<name>/** holds a data set of Table 2 as it was unpacked, RAW/<Modality>/<source>/** any others: PNG JPEG TIFF BMP GIF PGM
PPM, NIfTI, MetaImage (.mhd), DICOM series, .npy, AVI and MP4. <Modality> is CT, PET, MR, X-ray, Ultrasound, Fundus, OCT,
Pathology, Endoscope or Photo. OUT/<source>/ gets 00000.npy ... (uint8 (n, S, S, c), c = 1 grey or 3 RGB), meta.json (counts,
normalization) and dropped.csv (what was dropped and why). Until whole it is OUT/<source>.part, so the command can be stopped
at any moment and started again. A task is images in pairs with masks (segmentation) or in folders named after their classes.

Letters: H, W sides as published, S side as stored, c channels, n slices of a volume or images of a shard.
"""
import argparse
import contextlib
import csv
import functools
import glob
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
from collections import deque
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageOps, ImageSequence
from tqdm import tqdm


Image.MAX_IMAGE_PIXELS = None  # slides and fundus photographs are large, not decompression bombs
MODALITIES = ('CT', 'PET', 'MR', 'X-ray', 'Ultrasound', 'Fundus', 'OCT', 'Pathology', 'Endoscope', 'Photo')
RULES = {  # of volumes: values that become 0 and 255, else percentiles; least share of a slice above 0.02 of them; in words
    'CT': ((-200, 400), (), 0.05, 'HU clipped to [-200, 400]'),
    'MR': ((), (1, 99), 0.05, '1st..99th percentile'),
    # The paper's z-score of PET cancels in its min-max.
    'PET': ((), (1, 99), 0.01, '1st..99th percentile; SUV in [0, 20] where the path has suv'),
    'SUV': ((0, 20), (), 0.01, 'SUV in [0, 20]'),  # PET in standardized uptake values
    '': ((), (0, 100), 0, 'minimum..maximum')}
PICTURES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.pgm', '.ppm')
VIDEOS = ('.avi', '.mp4')
IMAGES = (*PICTURES, *VIDEOS, '.nii', '.nii.gz', '.npy', '.mhd', '.img')
SHARD = 256 << 20  # bytes of a full shard
REASONS = ('corrupt', 'small', 'blank', 'duplicate', 'other')

def boolean(text):
    return ('false', 'no', '0', 'true', 'yes', '1').index(text.lower()) >= 3

def parse_options(defaults, words=None):
    """The dataclass instance `defaults` with what the command line, or `words`, changes: --name value, --name=value, --flag.

    The help of an option is the comment beside its field; unknown names and wrong types end the program with a sentence.
    """
    cls = type(defaults)
    comments = dict(re.findall(r'^    (\w+): .*?  # (.*)$', inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=inspect.getmodule(cls).__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in cls.__annotations__.items():
        reading = {bool: dict(type=boolean, nargs='?', const=True), tuple: dict(nargs='+')}.get(kind, dict(type=kind))
        text = comments.get(name, '').replace('%', '%%')
        text += ' (default: %(default)s)' * (getattr(defaults, name) not in ('', ()))
        parser.add_argument('--' + name, metavar='ITEM' if kind is tuple else kind.__name__.upper(), help=text, **reading)
    parser.set_defaults(**vars(defaults))
    return cls(**vars(parser.parse_args(words)))

@dataclass
class Config:
    """The options; the comment beside each is its --help."""
    raw: str = ''  # folder of the downloads: RAW/<Modality>/<source>/**, or of one task; with --phantoms where to write them
    out: str = ''  # folder of the prepared sources, by default data/medverse, or of the task, by default data/<task>
    list: bool = False  # print the tables of data sets instead
    source: str = ''  # prepare only this source; --images and --skip then replace those of its row
    size: int = 256  # side of the stored images, px
    min_side: int = 32  # images whose shorter side is below this are dropped, px
    workers: int = 0  # processes, 0 = one per core
    phantoms: int = 0  # simulate this many images a modality under RAW/raw, their masks under RAW/labels, and prepare them
    seed: int = 0  # of the phantoms and of a task's split; preparing sources draws nothing
    # a labelled task: those of Table 3 and the phantom tasks bring their own rules, which these options replace
    task: str = ''  # its name
    modality: str = ''  # sets the intensity window of its volumes
    images: str = ''  # glob of the images below RAW (default *images/*.** where masks are found, else all)
    masks: tuple = ()  # glob of the masks (default *masks/*.**), pairs where the *'s agree, or a glob for each class
    skip: str = ''  # glob of what is neither
    labels: tuple = ()  # CSV below RAW and its columns of file, class and patient (default the first two); or a glob as masks
    classes: tuple = ()  # names of the classes (default background foreground, or the folders' names)
    values: tuple = ()  # of each class in the masks (default 0 1 2 ...), as 0 205 420+421 *; 255 is not scored
    outline: bool = False  # masks show a closed convex outline: fill it
    frames: bool = False  # images with one mask in common are frames: take the darkest of each pixel
    patient: str = ''  # regular expression: what it finds in a path is the patient, whom no split shares (default the path)
    split: tuple = ()  # for train, val and test each a share (default 50 20 30), a glob or a .txt of names

class Row(NamedTuple):
    """A data set of Table 2, below RAW/<name>/, or any RAW/<Modality>/<name>/; or a task of Table 3."""
    name: str
    modality: str
    content: str = ''
    count: str = ''  # kept images, or images of train, val and test, by the paper
    access: str = ''  # open, account or form (an application); with ? where the layout could not be confirmed
    link: str = ''
    images: str = '**'  # glob of its files, see `pattern`; of a task, options of this script
    skip: str = ''  # glob of those among them to leave: masks, crops, copies

SOURCES = [Row(*line.split(' | ')) for line in '''\
AutoPET-CT | CT | whole body | 558473 | form | autopet.grand-challenge.org/Dataset | **/CT.nii.gz
ImageCAS | CT | heart | 257496 | account | kaggle.com/datasets/xiaoweixumedicalai/imagecas | **img.nii.gz
TopBrain-CT | CT | brain | 5647 | open | zenodo.org/records/16623496 | **imagesTr*_ct/*_0000.nii.gz
AutoPET-PET | PET | whole body | 354826 | form | autopet.grand-challenge.org/Dataset | **/PET.nii.gz
AutoPET-SUV | PET | whole body | 351900 | form | autopet.grand-challenge.org/Dataset | **/SUV.nii.gz
TotalSegmentator-MR | MR | whole body | 16059 | open | zenodo.org/records/14710732 | **/mri.nii.gz
ACDC | MR | heart | 1902 | open | creatis.insa-lyon.fr/Challenge/acdc | **training/**_frame??.nii.gz
MRNet | MR | knee | 116624 | account | aimi.stanford.edu | **.npy
Duke-Breast-Cancer-MRI | MR | breast | 515747 | open | cancerimagingarchive.net/collection/duke-breast-cancer-mri | **
Prostate-MRI-US-Biopsy | MR | prostate | 97180 | open | cancerimagingarchive.net/collection/prostate-mri-us-biopsy | **
TopBrain-MR | MR | brain | 4604 | open | zenodo.org/records/16623496 | **imagesTr*_mr/*_0000.nii.gz
BraTS-GLI | MR | brain | 802341 | account | synapse.org syn53708249 | **-{t1n,t1c,t2w,t2f}.nii.gz
LLD-MMRI | MR | abdomen | 198918 | form | github.com/LMMMEng/LLD-MMRI-Dataset | **images/**.nii.gz | **classification**
ChestX-ray8 | X-ray | chest | 112120 | open | nihcc.app.box.com | **images/*.png
CheXpert | X-ray | chest | 223648 | account | stanfordmlgroup.github.io/competitions/chexpert | **.jpg
Mammo-Bench | X-ray | breast | 71844 | account? | india-data.org | **Original_Dataset/**
MURA | X-ray | bone | 40005 | form | stanfordmlgroup.github.io/competitions/mura | **.png
vzrad2 | X-ray | tooth | 8188 | account | kaggle.com/henriquerezermosqur | **.jpg | **_mask/**
ADSD | X-ray | coronary artery | 8325 | open | data.mendeley.com/datasets/ydrm75xywg | **.bmp
ARCADE | X-ray | coronary artery | 3000 | open | zenodo.org/records/10390295 | **images/*.png
XCAD | X-ray | coronary artery | 1621 | open? | github.com/AISIGSJTU/SSVS | **train/** | **trainC/**
Thyroid-Cine-clip | Ultrasound | thyroid | 1737 | account | aimi.stanford.edu | **.npy
EchoNet-Dynamic | Ultrasound | heart | 63867 | form | echonet.github.io/dynamic | **Videos/*.avi
HC18 | Ultrasound | fetal head | 1334 | open | zenodo.org/records/1327317 | **HC.png
BUSI | Ultrasound | breast | 780 | open | scholar.cu.edu.eg | **.png | **_mask**
UBPD | Ultrasound | brachial plexus | 955 | form? | ubpd.worldwidetracing.com:9443 | ** | **mask**
MESSIDOR | Fundus | eye | 1200 | form? | adcis.net | **.tif
Refuge2 | Fundus | eye | 1200 | account | kaggle.com/datasets/victorlemosml/refuge2 | **images/*.jpg
APTOS2019 | Fundus | eye | 5590 | account? | ahmadelsallab.github.io/APTOS | **{train,test}_images/*.png
Eyepacs | Fundus | eye | 88702 | open | huggingface.co/datasets/bumbledeep/eyepacs | **.{jpeg,jpg}
ROSE | OCT | eye | 229 | form | imed.nimte.ac.cn | **{img,original}/*
OCTA500-OCTA | OCT | eye | 600 | account | ieee-dataport.org/open-access/octa-500 | **OCTA_3**/Projection Maps/OCTA(*)/*.bmp
OCTA500-OCT | OCT | eye | 600 | account | ieee-dataport.org/open-access/octa-500 | **OCTA_3**/Projection Maps/OCT(*)/*.bmp
ZhangLabData-OCT | OCT | eye | 109309 | open | data.mendeley.com/datasets/rscbjbr9sj | **OCT/**.jpeg
BBBC041v1 | Pathology | blood smears | 1328 | open | bbbc.broadinstitute.org/BBBC041 | **images/*
Lacuna-Malaria-Challenge | Pathology | blood smears | 3925 | account | zindi.africa | **images/*.jpg
Lacuna-Malaria-Datasets | Pathology | blood smears | 5059 | open? | doi.org/10.7910/DVN/VEADSE | **.{jpg,jpeg,png}
SegPath | Pathology | 8 kinds of cells | 158687 | open | dakomura.github.io/SegPath | **_HE.png
HyperKvasir | Endoscope | stomach, intestines | 110079 | open | datasets.simula.no/hyper-kvasir | **labeled-images/**.jpg
Cataract-101 | Endoscope | eye | 42157 | open | ftp.itec.aau.at/datasets/ovid/cat-101 | **videos/*.mp4
PitVis2023 | Endoscope | pituitary | 96272 | open | rdr.ucl.ac.uk 26531686 | **video_*.mp4
Endoscapes-CVS | Endoscope | gall bladder | 55783 | open | github.com/CAMMA-public | **{train,val,test}/*.jpg | **{12_5,25}/**
PSI-AVA | Endoscope | prostate | 72160 | open | github.com/BCV-Uniandes/TAPIR | **keyframes/**.jpg
ISIC-2024 | Photo | skin | 401059 | open | challenge2024.isic-archive.com | **.jpg'''.splitlines()]

TASKS = {row.split(' ')[0]: Row(*re.split(r' ?\| ?|\n', row, maxsplit=6)) for row in re.split(r'\n(?=\S)', '''\
whs-ct | CT | heart structures | 5176 0 4096 | form | zmiclab.github.io/zxh/0/mmwhs
    --images **ct_**/*_image.nii.gz --masks **ct_**/*_label.nii.gz --values 0 205 420+421 500 550 600 820 850
    --classes background myocardium left-atrium left-ventricle right-atrium right-ventricle aorta pulmonary-artery
kipa22 | CT | kidney cancer structures | 13846 5864 5959 | account | kipa22.grand-challenge.org
    --images *image/* --masks *label/* --classes background renal-vein kidney renal-artery tumour
sisvse | Endoscope | surgical scene | 2718 336 1456 | form | sisvse.github.io
    --images **images/real/*.jpg --masks **semantic_masks/real_{train,val}_1/*.png --patient [^/_]+(?=_[^/]*$)
    --classes 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    --split 2718 336 **/real_val_1/**
cholecseg8k | Endoscope | cholecystectomy | 4320 1120 2640 | account | kaggle.com/datasets/newslab/cholecseg8k
    --images *_endo.png --masks *_endo_watershed_mask.png --values 0+50+255 11 21 13 12 31 23 24 25 32 22 33 5
    --patient video[0-9]+ --classes background abdominal-wall liver gastrointestinal-tract fat grasper connective-tissue
    blood cystic-duct hook gallbladder hepatic-vein liver-ligament
idrid | Fundus | lesions, optic disc | 54 0 27 | account | idrid.grand-challenge.org
    --images '**Original Images/*/*.jpg' --split '**Training Set/**' '' '**Testing Set/**'
    --masks **truths/*/**/*_OD.tif **truths/*/**/*_MA.tif **truths/*/**/*_HE.tif **truths/*/**/*_EX.tif **truths/*/**/*_SE.tif
    --classes background optic-disc microaneurysms haemorrhages hard-exudates soft-exudates
fives | Fundus | vessels | 200 100 500 | open | figshare.com/articles/19688169
    --images *Original/* --masks '*{Ground,Groud} truth/*' --values 0 * --split 200 100 500
feta21 | MR | fetal brain | 5120 5120 10240 | account | feta.grand-challenge.org/feta-2021
    --images **/*_T2w.nii.gz --masks **/*_dseg.nii.gz --patient sub-[0-9]+ --split 20 20 40
    --classes background external-fluid grey-matter white-matter ventricles cerebellum deep-grey-matter brainstem
candi | MR | brain tissues | 5120 2560 5504 | account | nitrc.org/projects/candi_share
    --images **/*_procimg.nii.gz --masks **/*_seg.nii.gz
    --values * 2 3 4 7 8 10 11 12 13 14 15 16 17 18 24 28 41 42 43 46 47 49 50 51 52 53 54 60 --split 40 20 43
octdl | OCT | 7 diseases | 1030 411 623 | open | data.mendeley.com/datasets/sncdhf53xc
    --images **.jpg --labels OCTDL_labels.csv file_name disease patient_id
icf | OCT | cystoid fluid | 730 292 438 | account | kaggle.com/datasets/zeeshanahmed13/intraretinal-cystoid-fluid
    --images */images/** --masks */masks/** --skip **815DME_F/masks/MASK-DME511.png --values 0 *
tnbc | Pathology | nuclei | 20 10 20 | open | zenodo.org/records/1175282
    --images **Slide_*/*.png --masks **GT_*/*.png --values 0 * --patient Slide_[0-9]+
lsc | Pathology | lymphomas | 188 73 113 | open | andrewjanowczyk.com use case 7
    --images **{CLL,FL,MCL}/*.tif --patient .*(?=_)
bcss | Pathology | tissues | 75 30 46 | open | github.com/PathologyDataScience/BCSS
    --images **{images,rgbs_colorNormalized}/*.png --masks **masks/*.png --patient TCGA-[^-]+-[^-]+
    --classes background tumour stroma inflammatory necrosis other --values '' 1+19+20 2 3+10+11 4 * 0
monusac | Pathology | nuclei | 167 42 101 | open | huggingface.co/datasets/RationAI/MoNuSAC
    --images *images/*.png --masks *masks/*.png --classes background epithelial lymphocyte macrophage neutrophil
    --split 167 42 **test/**
scr | X-ray | chest structures | 25 47 175 | form | jsrt.or.jp and isi.uu.nl/Research/Databases/SCR
    --images **All247images/*.IMG --classes background left-lung right-lung heart left-clavicle right-clavicle
    --masks '**/left lung/*.gif' '**/right lung/*.gif' **/heart/*.gif '**/left clavicle/*.gif' '**/right clavicle/*.gif'
    --split 25 47 175
pdcxr | X-ray | pneumonia | 3659 1573 624 | open | data.mendeley.com/datasets/rscbjbr9sj
    --images **chest_xray/**.jpeg --patient person[0-9]+ --split 3659 1573 **chest_xray/test/**
dca1 | X-ray | coronary arteries | 25 25 84 | account? | kaggle.com/datasets/bard2024 dca1
    --images **/*.pgm --masks **/*_gt.pgm --values 0 * --split 25 25 84
dias | X-ray | brain arteries | 30 10 20 | open? | zenodo.org/records/11637181
    --images *images/image_s*_i**.png --masks *labels/label_s*.png --values 0 * --frames
    --split **training/** **validation/** **test/**
dsca | X-ray | brain arteries | 112 44 68 | open? | zenodo.org/records/11255024
    --images **images/*/** --masks **labels/*.** --values 0 * --frames
sts-tooth-2d | X-ray | teeth | 100 100 700 | open? | toothfairychallenges.github.io/miccai2023
    --images */Labeled/Image/*.png --masks */Labeled/Mask/*.png --values 0 * --split 100 100 700
uns | Ultrasound | nerve | 2758 1078 1799 | account | kaggle.com/c/ultrasound-nerve-segmentation
    --images **/*.tif --masks **/*_mask.tif --values 0 * --patient [0-9]+(?=_[0-9]+.tif)
tn5000 | Ultrasound | thyroid nodule | 3500 500 1000 | open | figshare.com/articles/28455641
    --images **JPEGImages/*.jpg --labels **Annotations/*.xml --classes malignant benign --values 1 0
    --split Main/train.txt Main/val.txt Main/test.txt
fhu | Ultrasound | fetal head | 499 200 300 | account | kaggle.com/datasets/ankit8467
    --images *HC.png --masks *HC_Annotation.png --values 0 * --outline --patient [0-9]+(?=_[^/]*HC)
autopet-org | PET | organs | 18076 6386 10465 | form | github.com/YichiZhang98/SegAnyPET
    --images **PETCT_*/*/SUV.nii.gz --masks **PETCT_*_*_.nii.gz --values 0 1 2 3 4 5 6 7 8 9 10 11+12
    --patient PETCT_[^/_]+ --modality SUV --classes background liver left-kidney right-kidney heart spleen aorta
    left-lower-lobe right-lower-lobe left-upper-lobe right-upper-lobe right-middle-lobe
slsc-s | Photo | skin lesion | 6675 1911 964 | open | huggingface.co/datasets/makhresearch
    --images *images/*.jpg --masks *labels/*.txt --split **train/** **valid/** **test/**
slsc-c | Photo | 7 skin diseases | 6675 1911 964 | open | huggingface.co/datasets/makhresearch
    --images *images/*.jpg --labels *labels/*.txt --classes BKL NV DF MEL VASC BCC AKIEC
    --split **train/** **valid/** **test/**
phantom-vessels | Fundus | vessels | | | this script | --images raw/Fundus/phantom-fundus/* --masks labels/Fundus/*
phantom-organs | CT | organs | | | this script
    --images raw/CT/phantom-ct/* --masks labels/CT/* --classes air fat muscle gut lung liver kidney spleen bone blood lesion
phantom-lesion | Photo | naevus or melanoma | | | this script | --images raw/Photo/**''')}
HINTS = {  # for copies in formats that are not read here: which other to take, or how to convert it
    'Thyroid-Cine-clip': 'HDF5 is not read: convert it by python -c "import h5py, numpy; '
                         'numpy.save(\'clips.npy\', h5py.File(\'dataset.hdf5\')[\'image\'][::10])"',
    'Eyepacs': 'parquet is not read: take the original from Kaggle (train/*.jpeg, test/*.jpeg), of which this copy is a part',
    'monusac': 'parquet is not read: make {train,test}/{images,masks}/*.png of it by the lines in the README'}

@functools.cache
def pattern(glob):
    """Regular expression of a glob on whole paths: * stands for any text, and an image and its mask are a pair where theirs
    stand for the same; ** for any text, ? for one character and {a,b} for a or b, none of which are compared."""
    rule = ''
    for part in re.split(r'(\*\*|\*|\?|\{.*?\})', glob):
        choices = '|'.join(map(re.escape, part[1:-1].split(',')))
        rule += {'*': '(.*?)', '**': '.*', '?': '.'}.get(part) or (f'(?:{choices})' if part[:1] == '{' else re.escape(part))
    return re.compile(rule, re.I)

def matches(names, glob):
    """{what the stars stand for: the names} of those that match the glob; without stars a name stands for itself."""
    found = {}
    for name in names:
        if match := pattern(glob).fullmatch(name):
            found.setdefault(match.groups() or name, []).append(name)
    return found

def list_names(home):
    """Paths of all files below a folder, relative to it, links followed; a series of DICOM files is named by its folder."""
    names = {name.rpartition('/')[0] or '.' if name.lower().endswith('.dcm') else name
             for name in glob.glob('**', root_dir=home, recursive=True, include_hidden=True) if (home / name).is_file()}
    return sorted(names, key=lambda name: name.split('/'))

def is_image(home, name):
    """Whether it is to be read as images, by its name; hidden files are not."""
    return (home / name).is_dir() or name.lower().endswith(IMAGES) and '/.' not in f'/{name}'

def find_program(name):
    """Its path; without it nothing can be read, so the program ends (Debian has both)."""
    return shutil.which(name) or sys.exit(f'videos and DICOM series need {name}, which is missing: apt-get install {name}')

# --- from files to images -------------------------------------------------------------------------------------------------

def read(path, draft=0):
    """All arrays of a file, each (n, H, W) or (n, H, W, 3) with upright slices, in the units of the file; a picture is uint8,
    uint16 or float32 with n = 1. draft: the side (px) that is enough of a JPEG, 0 for all of it. A DICOM series is its
    folder, of which dcm2niix makes volumes."""
    name = path.name.lower()
    if path.is_dir():
        if not any(name.lower().endswith('.dcm') for name in os.listdir(path)):
            raise ValueError('it is a folder, but no series of *.dcm files')
        with tempfile.TemporaryDirectory() as new:
            subprocess.run([find_program('dcm2niix'), '-z', 'n', '-o', new, path], check=True, capture_output=True)
            volumes = [volume for volume in sorted(Path(new).glob('*.nii'))  # other kinds of files may lie among them
                       if json.loads(volume.with_suffix('.json').read_text()).get('Modality') in ('MR', 'CT', 'PT')]
            return [array.copy() for volume in volumes for array in read(volume)]  # a copy, since the file will be gone
    if name.endswith('.npy'):
        array = np.load(path, mmap_mode='r')
        array = array[None] if array.shape[2:] in ((), (3,)) else array
        if array.ndim != 3 and array.shape[3:] != (3,):
            raise ValueError(f'shape {array.shape} is none of (H, W), (H, W, 3), (n, H, W), (n, H, W, 3)')
        return [array]
    if name.endswith('.mhd'):
        return list(cut(*read_meta_image(path)))
    if name.endswith('.img') and not any(map(os.path.exists, (path.with_suffix('.hdr'), path.with_suffix('.HDR')))):
        film = np.fromfile(path, '>u2').reshape(1, 2048, 2048)  # of JSRT: no header, 12 bits in 16, high values are dark
        return [4095 - film.clip(0, 4095)]
    if not name.endswith(PICTURES):
        image = nib.load(path)  # get_fdata() would scale in float64; what needs no scaling stays in its 8 or 16 bits
        scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0) or image.get_data_dtype() in (np.uint8, np.uint16)
        return list(cut(np.asarray(image.dataobj, dtype=np.float32 if scaled else None), image.affine))
    frames = []
    with Image.open(path) as image:
        image.draft(None, (draft, draft) if draft else None)  # a JPEG decodes fast at 1/2, 1/4 or 1/8
        for frame in [image] if image.format == 'MPO' else ImageSequence.Iterator(image):  # whose others are previews
            frame = ImageOps.exif_transpose(frame)
            if frame.mode[0] not in 'IF':  # everything but I;16, I and F has 8 bits
                frame = frame.convert('L' if frame.mode in ('1', 'L', 'LA') else 'RGB')
            pixels = np.asarray(frame)[None]
            frames.append(pixels if pixels.dtype in (np.uint8, np.float32) else pixels.clip(0, 65535).astype(np.uint16))
    return frames

def read_meta_image(path):
    """(array (x, y, z), affine to RAS in mm) of a MetaImage header (.mhd) and the raw file that it names."""
    header = dict(re.findall(r'^(\w+) *= *(.*?)\s*$', path.read_text(), re.M))
    kind = {'MET_UCHAR': 'u1', 'MET_SHORT': 'i2', 'MET_USHORT': 'u2', 'MET_INT': 'i4', 'MET_FLOAT': 'f4'}[header['ElementType']]
    turn = np.reshape(header.get('TransformMatrix', '1 0 0 0 1 0 0 0 1').split(), (3, 3)).astype(float)
    affine = np.diag([-1.0, -1, 1, 1])  # MetaImage is LPS
    affine[:3, :3] @= turn.T * np.float64(header['ElementSpacing'].split())
    array = np.fromfile(path.with_name(header['ElementDataFile']), '<' + kind)
    return array.reshape(np.int64(header['DimSize'].split()), order='F'), affine

def cut(volume, affine):
    """Array (x, y[, z[, time ...]]) as a view (time, n, H, W): slices across the coarsest spacing (within 1% of it: axial),
    anterior or superior up. What is written to the view is written to the array."""
    turn = nib.io_orientation(affine)
    volume = nib.apply_orientation(volume.reshape(*(*volume.shape, 1)[:3], -1), turn)  # RAS: x right, y anterior, z superior
    spacing = nib.affines.voxel_sizes(affine)[turn[:, 0].argsort()]
    spacing[np.array(volume.shape[:3]) == 1] = np.inf
    axis = 2 if spacing[2] >= 0.99 * spacing.max() else spacing.argmax()
    return np.moveaxis(volume, (3, axis), (0, 1)).swapaxes(2, 3)[:, :, ::-1, ::-1]

def normalize(volume, modality):
    """Yield the slices of a volume or picture (n, H, W[, 3]) as uint8, by the rule of its modality (C.1.1), which may also be
    'SUV'; what is uint8 stays as it is. NaN and infinities count as the lowest value."""
    if volume.dtype == np.uint8:
        yield from volume
        return
    window, percentiles, *_ = RULES.get(modality, RULES[''])
    if volume.dtype == np.uint16 and len(volume) == 1:  # a picture; many detectors deliver 12 bits in a 16-bit file
        window = 0, 4095 if volume.max() < 4096 else 65535
    elif not window:
        sample = volume.flat[::volume.size // 1_000_000 | 1]  # odd: a width of 2^k would be sampled in a few columns only
        sample = sample[np.isfinite(sample)]
        window = np.percentile(sample, percentiles) if sample.size else (0, 0)
    low, high = map(np.float32, window)
    for image in volume:
        image = np.where(np.isfinite(image), image, low) if image.dtype.kind == 'f' else image
        yield np.uint8((image.clip(low, high) - low) * (255 / (high - low or np.inf)) + 0.5)

def resize(image, size):
    """The whole of uint8 (H, W) or (H, W, 3), low-passed, as (S, S, c); three equal channels become one."""
    if image.shape[:2] != (size, size):
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))
    pixels = image.reshape(size, size, -1)
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels

def frames(path, size):
    """Yield every 30th frame (C.1.1) of a video as uint8 (1, S, S, 3), while ffmpeg decodes it once from start to end."""
    command = [find_program('ffmpeg'), '-v', 'fatal', '-i', path, '-vf', f'framestep=30,scale={size}:{size}:flags=bicubic',
               '-fps_mode', 'passthrough', '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        while len(frame := process.stdout.read(size * size * 3)) == size * size * 3:
            yield np.frombuffer(frame, np.uint8).reshape(1, size, size, 3)
    if process.returncode:
        raise ValueError('ffmpeg cannot decode it to its end')

def slices(path, modality, size, min_side):
    """In a worker: yield (reason, detail, pixels, picture) for each image of a file, one alone for an unusable file. Kept are
    those without a reason, as pixels uint8 (S, S, c); `picture` is false for the slices of a volume and frames of a video."""
    film, count = path.name.lower().endswith(VIDEOS), 0
    try:
        for array in frames(path, size) if film else read(path, draft=max(2 * size, min_side)):
            volume = array.dtype not in (np.uint8, np.uint16) or len(array) > 1
            least = RULES.get(modality, RULES[''])[2] if volume else 0
            for count, image in enumerate(normalize(array, modality), count + 1):
                blank = np.ptp(image) < 8 or np.count_nonzero(image > 5) < least * image.size  # 5 is 0.02 of 255
                reason = 'small' if min(image.shape[:2]) < min_side and not film else 'blank' if blank else ''
                pixels = None if reason else resize(image, size)
                yield reason, f'{image.shape[1]} x {image.shape[0]} px', pixels, not (reason or volume or film)
        if not count:
            raise ValueError('it holds no image')
    except Exception as error:  # decoders fail on broken files in every way there is; dropped.csv tells which
        yield 'corrupt', f'{type(error).__name__}: {error}', None, False

def find_twin(pixels, name, seen):
    """Name of an earlier picture that uint8 (S, S, c) nearly repeats, or None; then `seen` {hash: [(name, grid)]} learns it.
    Twins have 64-bit difference hashes (is a cell darker than its right neighbour?) that differ in one bit at most. Discs on
    black share a few hashes, whatever eye they show, so the grids must also be within 3 of 255 levels on average."""
    grid = np.int16(Image.fromarray(pixels.squeeze()).convert('L').resize((9, 8), Image.BOX))  # area means (8, 9)
    bits = int.from_bytes(np.packbits(grid[:, :-1] < grid[:, 1:]).tobytes())
    for key in bits, *(bits ^ 1 << bit for bit in range(64)):
        for twin, other in seen.get(key, ()):
            if np.abs(grid - other).mean() < 3:
                return twin
    seen.setdefault(bits, []).append((name, grid))

# --- the engine: calls in worker processes, results that wait on the disk, folders that appear when they are whole --------

def follow_parent():
    """Start of a worker: Ctrl-C is for the main process alone, and whatever ends that, even kill -9, ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()

def spill(folder, work, *call):
    """In a worker: write what work(*call) yields to a file below `folder`, item by item, and return the file's path."""
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        for item in work(*call):
            pickle.dump(item, file, pickle.HIGHEST_PROTOCOL)
    return Path(file.name)

def items(path):
    """Yield what `spill` wrote."""
    with open(path, 'rb') as file:
        while file.peek(1):
            yield pickle.load(file)

def in_order(pool, workers, folder, work, calls, title):
    """Yield for each of the calls, in their order, the file of what work(*call) yields; two a worker are under way."""
    jobs = deque()
    for done in tqdm(range(len(calls)), title, unit='file'):
        jobs.extend(pool.submit(spill, folder, work, *call) for call in calls[done + len(jobs):done + 2 * workers])
        yield jobs.popleft().result()

class Stack:
    """A .npy file of arrays of one shape, written one by one; numpy's header has the same length for every count."""
    def __init__(self, path, shape, dtype=np.uint8):
        self.file, self.shape, self.dtype, self.count = open(path, 'wb'), shape, np.dtype(dtype), 0
        self.write_header()

    def write_header(self):
        self.file.seek(0)
        header = {'descr': self.dtype.str, 'fortran_order': False, 'shape': (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, array):
        self.file.write(np.ascontiguousarray(np.broadcast_to(array, self.shape), self.dtype).data)
        self.count += 1

    def close(self):
        self.write_header()
        self.file.close()

@contextlib.contextmanager
def whole(folder, pool):
    """Yield FOLDER.part to write in, which becomes FOLDER in the end, or goes away where the program is stopped."""
    part = Path(f'{folder}.part')
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left behind
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, folder)
    except BaseException:
        pool.shutdown(cancel_futures=True)  # so that no worker writes there any more
        shutil.rmtree(part, ignore_errors=True)
        raise

# --- sources for pretraining ----------------------------------------------------------------------------------------------

def prepare(row, home, folder, config, pool):
    """Write a source, the files below `home`, to `folder`. Returns its meta.json as a dict, None where there is nothing to
    read; a finished source is left alone."""
    names = list_names(home)
    wanted = [name for name in names if pattern(row.images).fullmatch(name) and not pattern(row.skip).fullmatch(name)
              and is_image(home, name)]
    if not wanted:
        print(f'{home}: {HINTS.get(row.name, "no image that can be read matches " + row.images)}; it is left out')
        return None
    if folder.exists():
        try:
            meta = json.loads((folder / 'meta.json').read_text())
        except (OSError, ValueError) as error:
            sys.exit(f'{folder}: is no finished source ({error}); move it away or delete it')
        note = 'warning: ' * (len(names) != meta['files'])
        print(f'{note}{folder}: finished before, {meta["files"]} files (now {len(names)}), {meta["size"]} px; delete to redo')
        return meta
    calls = [(home / name, 'SUV' if row.modality == 'PET' and 'suv' in f'{home.name}/{name}'.lower() else row.modality,
              config.size, config.min_side) for name in wanted]
    dropped, shards, filling, seen, chosen = dict.fromkeys(REASONS, 0), [], {}, {}, {*wanted}
    with whole(folder, pool) as part, open(part / 'dropped.csv', 'w', encoding='utf-8', errors='surrogateescape') as file:
        log = csv.writer(file, lineterminator='\n')
        log.writerow(('path', 'slice', 'reason', 'detail'))
        log.writerows((name, 0, 'other', 'no image by its name') for name in names if name not in chosen)
        dropped['other'] = len(names) - len(wanted)
        for path, name in zip(in_order(pool, config.workers, part, slices, calls, folder.name), wanted):
            for index, (reason, detail, pixels, picture) in enumerate(items(path)):
                # Neighbouring slices of a volume are alike by nature, and Table 2 keeps them.
                if picture and (twin := find_twin(pixels, name, seen)):
                    reason, detail = 'duplicate', f'of {twin}'
                if reason:
                    dropped[reason] += 1
                    log.writerow((name, index, reason, detail))
                    continue
                channels = pixels.shape[2]
                if channels not in filling:
                    filling[channels] = Stack(part / f'{len(shards):05d}.npy', pixels.shape)
                    shards.append(filling[channels])
                filling[channels].append(pixels)
                if filling[channels].count * pixels.nbytes >= SHARD:
                    filling.pop(channels).close()
            path.unlink()
        for stack in filling.values():
            stack.close()
        _, _, least, words = RULES.get(row.modality, RULES[''])
        count = sum(stack.count for stack in shards)
        meta = {'source': folder.name, 'modality': row.modality, 'count': count, 'size': config.size,
                'channels': sorted({stack.shape[2] for stack in shards}),
                'normalization': f'volumes: {words}; pictures: / 255, 16 bits / 4095 or 65535',
                'foreground': f'slices: {least} of the pixels above 0.02' if least else 'any',
                'files': len(names), 'read': count + sum(dropped.values()), 'dropped': dropped}
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
    return meta

def home_of(row, raw):
    """The folder of a row of Table 2 or 3 below RAW, or None; some rows come in one download, as RAW/AutoPET."""
    shared = [name for name in ('AutoPET', 'TopBrain', 'OCTA500') if row.name.startswith(name + '-')]
    return next((raw / name for name in (row.name, *shared) if (raw / name).is_dir()), None)

def plain(name):  # so that Xray and x_ray are X-ray
    return re.sub('[^a-z]', '', name.lower())

def find_sources(raw, config):
    """[(row of a source, its folder below RAW, its name)]: the rows of Table 2, then whatever is RAW/<Modality>/<source>."""
    known = {plain(name): name for name in MODALITIES}
    found = [(row, home) for row in SOURCES if (home := home_of(row, raw))]
    below = [path for path in sorted(raw.glob('*/*')) if plain(path.parent.name) in known]
    found += [(Row(path.name, known[plain(path.parent.name)]), path) for path in below if path.is_dir()]
    used = {folder for _, home in found for folder in (home, home.parent)}
    if others := {*raw.glob('*')} - used | {path for path in below if path.is_file()}:
        print(f'warning: {len(others)} files and folders are no known data set RAW/<name>/ and no RAW/<Modality>/<source>/, '
              f'as {min(others)}', file=sys.stderr)
    names = [row.name for row, _ in found]
    found = [(row._replace(images=config.images or row.images, skip=config.skip or row.skip), home,
              row.name if names.count(row.name) == 1 else f'{row.name}-{row.modality}') for row, home in found]
    found = [source for source in found if config.source in ('', source[0].name)]
    if not found:
        sys.exit(f'no images: --raw {raw} has no folder {config.source or "of a known data set (see --list)"} and no '
                 f'<Modality>/<source>/, with <Modality> of {", ".join(MODALITIES)}')
    if len({name for *_, name in found}) < len(found):
        sys.exit(f'two folders would both be {max(names, key=names.count)}: rename or move one of '
                 f'{", ".join(str(home) for row, home, _ in found if names.count(row.name) > 1)}')
    return found

def list_tables(raw):
    """Print the rows of Tables 2 and 3: whether they lie below RAW, how to get them, and whose layout is not confirmed."""
    print(f'{"name":<26}{"modality":<12}{"content":<26}{"images":>17}  {"":<7}access, link (images: kept in the paper, or of '
          'train, val and test)')
    for row in (*SOURCES, *TASKS.values()):
        unsure = ' (layout unsure: give --images, --masks)' if row.access.endswith('?') else ''
        print(f'{row.name:<26}{row.modality:<12}{row.content:<26}{row.count:>17}  {"found" if home_of(row, raw) else "-":<7}'
              f'{row.access.strip("?")}{unsure}, {row.link}')

# --- labelled tasks -------------------------------------------------------------------------------------------------------

def find_labelled(raw, config):
    """{path of an image below RAW: (its frames, its answer, its patient)}. The answer is a class, or the paths of its masks,
    None for an absent one."""
    names = [name for name in list_names(raw) if '/.' not in f'/{name}' and not pattern(config.skip).fullmatch(name)]
    layers = [matches(names, rule) for rule in config.masks or ('*masks/*.**',)]
    taken = {name for layer in layers for found in layer.values() for name in found}
    images = matches([name for name in names if name not in taken and is_image(raw, name)],
                     config.images or ('*images/*.**' if taken else '**'))
    table = read_labels(raw, names, config)
    needed = config.masks or (config.values or config.outline) and not config.labels
    if not images or needed and not taken or config.labels and not table:
        text = f'{len(images)} images, {len(taken)} masks, {len(table)} labels match --images, --masks, --labels'
        sys.exit(f'{raw}: {HINTS.get(config.task, text)}')
    singles = [name for found in images.values() for name in found]
    if config.labels:
        answers = {name: ([name], table[Path(name).stem][0]) for name in singles if Path(name).stem in table}
    else:
        answers = pair(raw, images, layers, config) if taken else {name: ([name], Path(name).parent.name) for name in singles}
    if missing := len(singles) - sum(len(frames) for frames, _ in answers.values()):
        print(f'{raw}: {missing} images without a mask or label are left out')
    patients = {name: table.get(Path(name).stem, ())[1:] for name in answers}
    if config.patient:
        found = {name: re.search(config.patient, name) for name in answers}
        if not any(found.values()):  # else every file would be a patient of its own, unasked
            sys.exit(f'--patient {config.patient}: is found in no path, as {min(found)}')
        patients = {name: match and [match[1] if match.re.groups else match[0]] for name, match in found.items()}
    return {name: (*answer, (patients[name] or [name])[0]) for name, answer in answers.items()}

def pair(raw, images, layers, config):
    """{first frame: (frames, masks)} of images {key: names} and layers of masks [{key: names}], which belong together where
    their keys are the same. Of the tasks of Table 3, images without a mask are left out."""
    answers = {}
    for key in dict.fromkeys(key for group in (images, *layers) for key in group):
        frames, masks = images.get(key, []), [layer.get(key, []) for layer in layers]
        if any(masks) and frames and max(map(len, masks)) == 1 and (len(frames) == 1 or config.frames):
            answers[frames[0]] = frames, tuple(found[0] if found else None for found in masks)
        elif any(masks) or config.task not in TASKS:
            trouble = 'no image' if not frames else 'no mask' if not any(masks) else 'more than one image or mask'
            sys.exit(f'{raw}/{", ".join(sum(masks, frames))}: {trouble} goes with it; complete the pairs or mend the globs')
    return answers

def find_file(raw, end):
    """The file below RAW whose path ends so."""
    found = (raw / name for name in list_names(raw) if f'/{name}'.endswith(f'/{end}'))
    return next(found, None) or sys.exit(f'{raw}: there is no file {end} here; mend --labels or --split')

def read_labels(raw, names, config):
    """{stem of an image: [its class, its patient if a third column tells it]} of --labels: a CSV file, or a file for each
    image, which holds in VOC's XML the class of an object, or in lines of numbers polygons, of which the largest decides."""
    rule, *columns = config.labels or ('',)
    table, classes = {}, dict(zip(config.values or map(str, range(len(config.classes))), config.classes))
    if '*' in rule or not rule:
        for name in filter(pattern(rule).fullmatch, names):
            value = (ElementTree.parse(raw / name).findtext('object/name') if name.endswith('.xml')
                     else max(polygons(raw / name), key=lambda polygon: np.ptp(polygon[1], 0).prod())[0])
            table[Path(name).stem] = [classes.get(value, value)]
        return table
    path = find_file(raw, rule)
    with open(path, newline='', encoding='utf-8-sig') as file:  # Excel begins a file with a mark and may write semicolons
        head = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter=max(',;\t', key=head.count))
        for row in reader:
            name, *answer = (row.get(column) for column in columns or reader.fieldnames[:2])
            if None in (name, *answer) or table.setdefault(Path(name).stem, answer) != answer:
                sys.exit(f'{path}, line {reader.line_num}: {name} has no {" or no ".join(columns)}, or another one than above; '
                         f'the columns are {reader.fieldnames}')
    return table

def polygons(path):
    """[(class, corners (n, 2) in shares of width and height)] of lines `class x1 y1 x2 y2 ...`; two pairs are the centre and
    the sides of a box."""
    found = []
    for number, *numbers in map(str.split, path.read_text().splitlines()):
        corners = np.reshape(numbers, (-1, 2)).astype(float)
        if len(corners) == 2:
            corners = corners[0] + corners[1] * ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
        found.append((number, corners))
    return found

def split(files, raw, config):
    """{'train', 'val', 'test': names} by the three rules of --split. A glob takes the images it matches or whose masks it
    matches, a list (.txt below RAW) those whose stems it holds; numbers share out the other patients, n of each class: to
    test ceil of its share and to val floor, as the counts of Table 3 imply."""
    splits, others, groups = {'train': [], 'val': [], 'test': []}, {}, {}
    given = {'test'} <= {name.split('/')[0].lower() for name in files} <= {*splits, 'valid', 'validation'}
    rules = dict(zip(splits, config.split or (('train/**', 'val{,id,idation}/**', 'test/**') if given else ('50', '20', '30'))))
    shares = [int(rule) if rule.isdigit() else 0 for rule in rules.values()]
    lists = {part: {*find_file(raw, rule).read_text().split()} for part, rule in rules.items() if rule.endswith('.txt')}
    for name, (_, answer, patient) in files.items():
        paths = [name] if isinstance(answer, str) else [name, *filter(None, answer)]
        for part, rule in rules.items():
            if Path(name).stem in lists.get(part, ()) or any(map(pattern(rule).fullmatch, paths)):
                splits[part].append(name)
                break
        else:
            others.setdefault(patient, []).append(name)
    if others and not sum(shares):
        sys.exit(f'{raw / min(others.values())[0]}: no rule of --split takes it; give globs, lists or shares, as 80 10 10')
    for patient, names in others.items():
        answer = files[names[0]][1]
        groups.setdefault(answer if isinstance(answer, str) else '', []).append(patient)
    rng = np.random.default_rng(config.seed)
    for _, group in sorted(groups.items()):
        val, test = len(group) * shares[1] // sum(shares), -(-len(group) * shares[2] // sum(shares))
        for part, drawn in zip(('test', 'val', 'train'), np.split(rng.permutation(group), (test, test + val))):
            splits[part] += [name for patient in drawn for name in others[patient]]
    return {part: sorted(names) for part, names in splits.items()}

def read_masks(path, shape):
    """All masks (H, W) of a file; where a palette gives the classes colours, their numbers in it, of other colours the largest
    of the three values. The polygons of a .txt become one mask of the shape of the image."""
    if path.suffix == '.txt':
        canvas = Image.new('L', shape[1::-1])
        for _, corners in polygons(path):
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners * canvas.size], 1)
        return [np.asarray(canvas)]
    if path.name.lower().endswith(PICTURES):
        with Image.open(path) as image:
            if image.mode == 'P' and np.ptp(np.reshape(image.getpalette(), (-1, 3)), 1).any():
                return [np.asarray(image)]
    masks = [mask for volume in read(path) for mask in volume]
    return [mask.max(2) if mask.ndim == 3 else mask for mask in masks]

def classify(mask, config):
    """Values (H, W) as classes uint8 by --values, where a class may have several values (420+421) or all others (*); what
    stands after the last class is not scored, nor is 255, unless it is given a class."""
    table = {'255': 255}
    for number, entry in enumerate(config.values or map(str, range(len(config.classes)))):
        table |= dict.fromkeys(entry.split('+'), number if number < len(config.classes) else 255)
    if '*' in table and '255' not in config.values:
        del table['255']
    values, place = np.unique(mask, return_inverse=True)
    numbers = {value: table.get(f'{value:g}', table.get('*')) for value in values.tolist()}
    if strange := [value for value, number in numbers.items() if number is None]:
        raise ValueError(f'values {strange[:9]}, while --classes and --values know {[*table]}')
    return np.uint8([*numbers.values()])[place].reshape(mask.shape)

def fill(outline):
    """bool (H, W) of a closed convex outline -> with its inside: all that has outline on both sides in its row or column."""
    run = np.logical_or.accumulate
    rows, columns = (run(outline, axis) & np.flip(run(np.flip(outline, axis), axis), axis) for axis in (0, 1))
    return rows | columns

def labelled(raw, frames, answer, config):
    """In a worker: yield (pixels uint8 (S, S, c), mask uint8 (S, S) or number of the class) for each image or slice."""
    try:
        images = [[image for volume in read(raw / frame) for image in normalize(volume, config.modality)] for frame in frames]
        images = [np.minimum.reduce(same) for same in zip(*images)]  # of several frames, the darkest of each pixel
        if isinstance(answer, str):
            yield from ((resize(image, config.size), config.classes.index(answer)) for image in images)
            return
        layers = [read_masks(raw / path, images[0].shape) if path else [None] * len(images) for path in answer]
        for image, *masks in zip(images, *layers, strict=True):
            if len(masks) == 1:
                mask = classify(masks[0], config)
                mask = np.uint8(fill(mask > 0)) if config.outline else mask
                if mask.shape != image.shape[:2]:
                    raise ValueError(f'a mask of {mask.shape} for an image of {image.shape}')
            else:  # a file for each class, painted in their order
                shown = {number: layer > 0 for number, layer in enumerate(masks, 1) if layer is not None}
                mask = np.zeros(next(iter(shown.values())).shape, np.uint8)
                for number, place in shown.items():
                    mask[place] = number
            square = Image.fromarray(mask).resize((config.size, config.size), Image.Resampling.NEAREST)
            yield resize(image, config.size), np.asarray(square)
    except Exception as error:  # decoders fail in every way there is
        sys.exit(f'{raw / frames[0]}: cannot be read with {answer} ({type(error).__name__}: {error}); mend or remove them')

def prepare_task(config, raw, folder, pool):
    """Write the labelled images below RAW to `folder`: {train,val,test}/images.npy and masks.npy or labels.npy, meta.json,
    and split.json with the files of each split."""
    if folder.exists():
        sys.exit(f'{folder}: this task is prepared; delete it to prepare it again, or choose another --out')
    files = find_labelled(raw, config)
    kinds = {answer for _, answer, _ in files.values() if isinstance(answer, str)}
    config.classes = config.classes or (tuple(sorted(kinds)) if kinds else config.values if len(config.values) > 2 else
                                        ('background', 'foreground'))
    if len(config.classes) < 2:
        sys.exit(f'{raw}: {config.classes[0]} is the only class, so there is nothing to learn; give --masks or --labels')
    answers = ('labels', (), np.int64) if kinds else ('masks', (config.size, config.size), np.uint8)
    splits, counts, shown = split(files, raw, config), {}, set()
    with whole(folder, pool) as part:
        for name, chosen in splits.items():
            (part / name).mkdir()
            calls = [(raw, *files[file][:2], config) for file in chosen]
            paths = [*in_order(pool, config.workers, part, labelled, calls, name)]
            # Grey images get three channels where others are in colour.
            channels = max((pixels.shape[2] for path in paths for pixels, _ in items(path)), default=1)
            images = ('images', (config.size, config.size, channels), np.uint8)
            stacks = [Stack(part / name / f'{kind}.npy', *form) for kind, *form in (images, answers)]
            for pixels, answer in (pair for path in paths for pair in items(path)):
                stacks[0].append(pixels)
                stacks[1].append(answer)
                shown.update(np.unique(answer).tolist())
            for stack in stacks:
                stack.close()
            for path in paths:
                path.unlink()
            counts[name] = stacks[0].count
        meta = {'kind': 'classification' if kinds else 'segmentation', 'classes': config.classes, 'modality': config.modality,
                'size': config.size, 'counts': counts}
        (part / 'split.json').write_text(json.dumps(splits, indent=1))
        (part / 'meta.json').write_text(json.dumps(meta, indent=1))
        if missing := [name for number, name in enumerate(config.classes) if number not in shown]:
            text = f'no image shows {", ".join(missing)}; mend --classes or --values (255 counts where named: --values 0 255)'
            if len(missing) > len(config.classes) - 2:
                sys.exit(f'{raw}: {text}')
            print(f'warning: {text}?', file=sys.stderr)
        from data import Task
        Task(part)
    paper = TASKS[config.task].count if config.task in TASKS else ''
    print(f'{folder}: {meta["kind"]} into {", ".join(config.classes)}; images: {counts}'
          + f', in the paper {paper}' * bool(paper))

# --- phantoms: ten modalities simulated from their physics, with masks and classes ---------------------------------------
# Tissues = mask classes: air 0, fat 1, muscle 2, gut 3, lung 4, liver 5, kidney 6, spleen 7, bone 8, blood 9, lesion 10
HOUNSFIELD = np.array([-1000, -100, 50, 20, -820, 80, 130, 100, 600, 140, 40])  # attenuation of X-rays
T1 = np.array([1, 350, 1000, 1600, 1200, 650, 1250, 1150, 450, 1500, 1300])  # relaxation times, ms
T2 = np.array([1, 90, 40, 130, 8, 45, 95, 85, 15, 150, 110])  # short in lung and bone, which are dark
UPTAKE = np.array([0, 0.4, 0.8, 1.5, 0.5, 2.5, 6, 2, 1.5, 2.2, 10])  # of FDG, SUV
# Organs as ellipsoids, in painting order: tissue, centre, radii in cm (x to the right, y anterior, z superior)
ORGANS = ((1, 0, 0, 0, 17, 12, 99), (2, 0, 0, 0, 15, 10, 99), (1, 0, 2, -16, 13, 7, 9), (3, 3, 4, -15, 5, 3, 4),
          (4, 8, 0, 10, 7, 8, 14), (4, -8, 0, 10, 7, 8, 14), (5, 5, 2, -4, 9, 7, 7), (7, -11, -3, -4, 3, 5, 5),
          (3, -6, 3, -4, 5, 5, 4), (6, 6, -4, -10, 3, 4, 6), (6, -6, -4, -9, 3, 4, 6), (9, -3, 3, 4, 6, 5, 6),
          (8, 0, -6, 0, 4, 2, 99), (9, -2, -2, 0, 1.4, 1.4, 99))

def zoom(picture, side):  # to (side, side) by cubic interpolation, averaged where it shrinks
    return np.asarray(Image.fromarray(np.float32(picture)).resize((side, side), Image.BICUBIC))

def field(rng, side, *details):  # a smooth random picture around 0, of so many details down and across
    return zoom(rng.standard_normal(details), side)

def plane(rng, side, shake=0.0):  # the pixels as complex numbers, x + iy from -1 to 1, shaken smoothly out of their places
    line = np.linspace(-1, 1, side)
    return line + 1j * line[:, None] + shake * (field(rng, side, 6, 6) + 1j * field(rng, side, 6, 6))

def light(*layers):  # RGB of white light after layers, each an amount (S, S) times what it absorbs of red, green and blue
    return 255 * np.exp(-sum(np.multiply.outer(*layer) for layer in layers))

def torso(rng, shape, sick):
    """Tissue of each voxel of a random body, 40 cm along each axis; the sick have lesions in lung, liver or spleen."""
    x, y, z = np.ogrid[-20:20:shape[0] * 1j, -20:20:shape[1] * 1j, -20:20:shape[2] * 1j]
    z += rng.uniform(0, 6)  # bodies lie higher or lower
    tissue = np.zeros(shape, np.uint8)
    ellipsoid = lambda a, b, c, p, q, r: ((x - a) / p) ** 2 + ((y - b) / q) ** 2 + ((z - c) / r) ** 2  # 1 on its surface
    for organ, *place in ORGANS:
        tissue[ellipsoid(*place * rng.normal(1, 0.07, 6)) < 1] = organ
    tissue[(abs(ellipsoid(0, 0, 6, 14, 9.5, 20) - 1) < 0.1) & (np.cos(2.2 * z + y) > 0) & (z > -8)] = 8  # sloping ribs
    for i, j, k in rng.choice(np.argwhere(np.isin(tissue, (4, 5, 7))), sick * rng.integers(1, 4)):
        tissue[ellipsoid(x.flat[i], y.flat[j], z.flat[k], *rng.uniform(1, 3, 3)) < 1] = 10
    return tissue

def ct(rng, side, tissue):  # attenuation in Hounsfield units (air -1000, water 0), with the noise of the detector
    return np.int16(HOUNSFIELD[tissue] + rng.normal(0, 20, tissue.shape).round()), tissue

def pet(rng, side, tissue):  # tracer uptake in SUV; the coarse bins of the detector count decays (Poisson)
    uptake = (UPTAKE * rng.uniform(0.6, 1.6, len(UPTAKE)))[tissue]
    return np.stack([zoom(rng.poisson(50 * abs(zoom(image, side // 4))) / 50, side) for image in uptake.T]).T, tissue

def mr(rng, side, tissue):  # spin echo: (1 - exp(-TR / T1)) exp(-TE / T2), under a smooth coil bias, with Rician noise
    repetition, echo = rng.choice(((500, 12), (3000, 70))) * rng.uniform(0.7, 1.4, 2)  # T1- or T2-weighted, ms
    signal = ((1 - np.exp(-repetition / T1)) * np.exp(-echo / T2))[tissue] * np.exp(0.3 * field(rng, side, 3, 3))[..., None]
    return np.float32(abs(1000 * signal + rng.normal(0, 15, (*tissue.shape, 2)) @ (1, 1j)) * (tissue > 0)), tissue

def xray(rng, side, tissue):  # photons fall as exp(-attenuation from back to front); the film shows -log of them
    tissue = tissue.T[::-1, :, ::-1]  # from head to foot, back to front, the patient's right to left
    film = zoom((1 + HOUNSFIELD / 1000)[tissue].sum(1), side).clip(0)
    mask = np.select([(tissue == organ).sum(1) > 4 for organ in (9, 4)], (9, 4))
    return 255 * (film / film.max()) ** rng.uniform(1, 2), mask.repeat(2, 0).repeat(2, 1)

def ultrasound(rng, side, sick):  # log of echoes, with Rayleigh speckle, which fade along each beam; shown as a fan
    lesion = sick & (abs(plane(rng, side, 0.06) - rng.uniform(-0.4, 0.3, 2) @ (1, 1j)) < rng.uniform(0.2, 0.35))
    echo = np.where(lesion, rng.choice((-3.5, -1.4, 1.6)), 0.8 * field(rng, side, 16, 4))  # a cyst, a tumour or a stone
    echo += np.log(rng.rayleigh(1, echo.shape)) - np.cumsum(2 * np.exp(echo), 0) / side  # what scatters more absorbs more
    z = plane(rng, side) + 1.3j  # from the probe
    fan = tuple(np.int64(side * np.clip((abs(z) / 1.9 - 0.2, np.angle(z / 1j) / 1.1 + 0.5), 0, 0.999)))
    return np.pad(210 + 46 * echo[1:-1, 1:-1], 1)[fan], lesion[fan]  # black borders, so outside the fan

def fundus(rng, side, sick):  # blood absorbs green and blue; its vessels follow circles through the disc
    eye, z, disc = abs(plane(rng, side)) < 0.95, plane(rng, side, 0.03), rng.choice((-0.5, 0.5))
    centres = disc + np.exp(1j * rng.normal(0, 0.5, 9)) / rng.uniform(-1.4, 1.4, 9)
    vessels = np.min([abs(abs(z - c) - abs(disc - c)) for c in centres], 0) < 0.025 - 0.015 * abs(z - disc)
    blood = vessels + 0.6 * np.exp(-abs(4 * z + disc) ** 2)  # the macula is dark
    white = np.exp(-abs((z - disc) / 0.2) ** 4) + sick * (field(rng, side, 30, 30) > 1.8)  # exudates
    return light((blood, (0.3, 1, 0.8)), (white, (-0.2, -0.8, -0.9)), (1, rng.uniform((-0.1, 0.7, 1.5), (0.3, 1.4, 3))),
                 (0.6 * abs(z) ** 2 + 0.1 * field(rng, side, 5, 5) + 9 * ~eye, (1, 1, 1))), eye & vessels

def oct_scan(rng, side, sick):  # reflectivity of the retina's layers around the pit, with speckle; drusen lift the lowest
    z, floor = plane(rng, side), 0.2 + 0.1 * field(rng, side, 1, 3)
    top = floor - 0.7 + 0.35 * np.exp(-abs((z.real - rng.uniform(-0.4, 0.4)) / rng.uniform(0.15, 0.35)) ** 2)
    layer = (z.imag - top) / (floor - sick * 0.12 * field(rng, side, 1, 16).clip(0) - top)  # from 0, the top, to 1
    echo = np.interp(10 * layer, range(18), (0, 180, 100, 120, 60, 130, 50, 50, 190, 80, 230, 120, 110, 90, 70, 50, 20, 0))
    return echo * rng.rayleigh(1, echo.shape) ** 0.5, (layer > 0) & (layer < 1)

def pathology(rng, side, sick):  # haematoxylin stains nuclei blue, eosin the rest pink; glands have a lumen and a dense wall
    gland, z = field(rng, side, 7, 7), rng.uniform(17, 23) * plane(rng, side, 0.05)
    level = np.select([gland > 1.3, gland > 0.2], [9, 0.45], 0.9 - 0.4 * sick) + 0.2 * field(rng, side, 16, 16)
    nuclei = np.cos(z.real) * np.cos(z.imag) > level.clip(0.3)  # the bumps of a warped egg crate
    blue, pink = rng.uniform(0.7, 1.4, (2, 1)) * ((0.9, 0.95, 0.4), (0.1, 0.9, 0.3))
    return light((nuclei, blue), ((gland < 1.3) * (0.5 + 0.15 * field(rng, side, 60, 10)), pink)), nuclei

def endoscope(rng, side, sick):  # light from the camera fades with distance into a wet tube; folds ring it, water glints
    z, lumen, polyp = plane(rng, side, 0.05), *rng.uniform(-0.4, 0.4, (2, 2)) @ (1, 1j)
    tube, bump = abs(z - lumen), abs(z - polyp) / rng.uniform(0.25, 0.5)
    folds = 0.4 * tube * np.cos(rng.uniform(9, 16) * tube ** 0.6 + rng.uniform(0, 6))
    shade = -np.log(np.where(sick & (bump < 1), 0.85 - 0.5 * bump ** 2, tube / (tube + 0.4) * (1.1 + folds)))
    view = 9 * (abs(plane(rng, side)) > 1.2) - 2 * (field(rng, side, 50, 50) > 2)  # dark corners, glints
    tint = rng.uniform((-0.2, 0.4, 0.5), (0, 0.8, 1))
    return light((shade, (1, 1.4, 1.5)), (view, (1, 1, 1)), (1, tint)), sick & (bump < 1)

def photo(rng, side, sick):  # melanin absorbs blue most; in melanoma it is ragged and of several colours
    z, lesion = plane(rng, side), abs(plane(rng, side, 0.03 + 0.07 * sick)) / rng.uniform(0.3, 0.65)
    melanin = (1.2 + (0.1 + 0.3 * sick) * field(rng, side, 10, 10)) / (1 + np.exp(12 * (lesion - 1)))
    hue, skin = melanin * sick * field(rng, side, 6, 6), rng.uniform(0.3, 0.8) + 0.1 * field(rng, side, 3, 3)
    hairs = sum(abs(abs(z - 4 * np.exp(1j * a)) - r) < 0.01 for a, r in rng.uniform((0, 3), (6, 5), (rng.integers(9), 2)))
    return light((melanin + skin, (0.6, 1, 1.2)), (hue, (0.2, 0, -0.2)), (hairs, (1, 1, 1))), lesion < 1

def write_phantom(folder, modality, n, seed, side=160):
    """Subject n, every other one sick: an image, or of CT, PET and MR a volume of 8 slices, to folder/raw/<Modality>/
    <source>/<class>; its mask to folder/labels/<Modality>/<class>. CT, PET, MR and X-ray see the same body."""
    number, sick, rng = MODALITIES.index(modality), n % 2, np.random.default_rng((seed, n))
    shape = (side // 2, 40, side // 2) if modality == 'X-ray' else (side, side, 8)
    draw = (ct, pet, mr, xray, ultrasound, fundus, oct_scan, pathology, endoscope, photo)[number]
    image, mask = draw(rng, side, torso(rng, shape, sick) if number < 4 else sick)
    kind = (('naevus', 'melanoma') if modality == 'Photo' else ('normal', 'lesion'))[sick]
    source = 'phantom-' + modality.lower() + '-suv' * (modality == 'PET')
    for place, array in ((folder / 'raw' / modality / source / kind, image), (folder / 'labels' / modality / kind, mask)):
        place.mkdir(parents=True, exist_ok=True)
        if number < 3:
            nib.save(nib.Nifti1Image(array, np.diag((400 / side, 400 / side, 50, 1))), place / f'{n:04d}.nii.gz')  # mm
        else:
            Image.fromarray(np.uint8(np.clip(array, 0, 255))).save(place / f'{n:04d}.png')

# --- the command ----------------------------------------------------------------------------------------------------------

def report_overlaps(home):
    """Tell which prepared tasks below `home` test on images of prepared sources, which a network would have seen before."""
    for task, source in (('fhu', 'HC18'), *(('autopet-org', f'AutoPET-{kind}') for kind in ('CT', 'PET', 'SUV'))):
        if (home / task).exists() and (home / 'medverse' / source).exists():
            print(f'note: the images of {home / task} are also in {home / "medverse" / source}, so a network pretrained '
                  'there has seen the test images, though not their masks')

def print_counts(rows, metas):
    """Print a table of what was read, kept and dropped of each source, beside what the paper kept."""
    table = [(m['modality'], m['source'], m['files'], m['read'], m['count'], *m['dropped'].values()) for m in metas]
    papers = [f'{int(row.count):>10}{m["count"] - int(row.count):>+10}' if row.count else '' for row, m in zip(rows, metas)]
    titles = ('modality', 'source', 'files', 'read', 'kept', *REASONS)
    total = ('all', f'{len(table)} sources', *map(sum, list(zip(*table))[2:]))
    for line, paper in zip((titles, *table, total), (f'{"paper":>10}{"more":>10}' * any(papers), *papers, '')):
        print(f'{line[0]:<11}{line[1]:<30}' + ''.join(f'{cell:>10}' for cell in line[2:]) + paper)
    print('every file accounted for: read = kept + dropped')

def main():
    """Simulate the phantoms if they are asked for, then prepare a task or every source below RAW."""
    config = parse_options(Config())
    if row := TASKS.get(config.task):  # its rules, then the command line again over them
        defaults = replace(Config(), modality=row.modality, split=('50', '20', '30'))
        config = parse_options(parse_options(defaults, shlex.split(row.images)))
    if config.modality not in ('', 'SUV', *MODALITIES):
        sys.exit(f'--modality {config.modality}: it must be SUV or one of {", ".join(MODALITIES)}')
    if config.size < 1 or config.workers < 0:
        sys.exit('--size must be 1 or more, --workers 0 or more')
    if len(config.split) not in (0, 3):
        sys.exit('--split takes three globs, lists or shares: for train, val and test')
    if config.list:
        return list_tables(Path(config.raw))
    if config.raw and not config.phantoms and not Path(config.raw).is_dir():
        sys.exit(f'--raw {config.raw}: there is no such folder')
    if not (config.raw or config.phantoms or config.task.startswith('phantom-')):
        sys.exit('where are the images? give --raw RAW, a folder of <Modality>/<source>/** or of a task, or --phantoms N')
    config.workers = config.workers or os.cpu_count()
    out, home = Path(config.out or f'data/{config.task or "medverse"}'), Path(config.raw or 'data/phantoms')
    if config.task.startswith('phantom-'):
        config.phantoms = config.phantoms or 200 * (not config.raw)  # anew: an earlier run may have been stopped half-way
    pool = ProcessPoolExecutor(config.workers, initializer=follow_parent)
    try:
        calls = [(home, modality, n, config.seed) for modality in MODALITIES
                 for n in range(-(-config.phantoms // (8 if modality in RULES else 1)))]
        deque(tqdm(pool.map(write_phantom, *zip(*calls)), 'phantoms', len(calls), disable=not calls), 0)  # runs them all
        if config.task:
            prepare_task(config, home, out, pool)
        else:
            found = [(row, prepare(row, folder, out / name, config, pool))
                     for row, folder, name in find_sources(home / 'raw' if config.phantoms else home, config)]
            if not (done := [pair for pair in found if pair[1]]):
                sys.exit(1)
            print_counts(*zip(*done))
    except BrokenProcessPool:
        sys.exit('a worker was killed, most likely for its memory: start again with fewer --workers; finished sources stay')
    except OSError as error:
        sys.exit(f'{error}: make room in {out} or choose another --out, and start again; finished sources stay')
    except re.error as error:
        sys.exit(f'--patient {config.patient}: no regular expression ({error})')
    except KeyboardInterrupt:
        print('stopped: start again to go on with the unfinished sources', file=sys.stderr)
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)
    report_overlaps(out.parent)

if __name__ == '__main__':
    main()
