"""The paper's 44 sources and 26 tasks: a miniature of each as it is published, prepared by its row, against what went in."""
import itertools
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_prepare import REAL, call, meta_of, save_nifti, texture

SIZE = 32
STUDY = 'FDG-PET-CT-Lesions/PETCT_{0a1,1b2,2c3,3d4,4e5,5f6}/{01-2003-NA u. KM-39,02-2003-NA-40}/'
BRAIN, MAPS = 'TopBrain_Data_Release_Batch1_073025/', 'OCTA_{3M,3mm}/Projection Maps/'
BREAST = 'manifest-16/Duke-Breast-Cancer-MRI/Breast_MRI_00{1,2}/01-01-1990-NA-MRI BREAST-1/'
PROSTATE = 'manifest-16/Prostate-MRI-US-Biopsy/Prostate-MRI-US-Biopsy-000{1,2}/11-1-NA-1/'
STOMACH, CYST = 'miccai2022_sisvse_dataset/', '2021-training-data-ZA/2021-training-data-ZA/'

# {a,b} and {1..3} stand for each of these in turn, $1 for what the first braces stand for; # numbers slices or frames

SOURCES = {  # name: modality, images in Table 2, where it is had (regular expression), files to keep, files to leave, options
    'AutoPET-CT': ('CT', 558473, 'autopet', [STUDY + 'CT.nii.gz'], [STUDY + '{CTres,PET,SUV,SEG}.nii.gz']),
    'AutoPET-PET': ('PET', 354826, 'autopet', [STUDY + 'PET.nii.gz'], [STUDY + '{CTres,CT,SUV,SEG}.nii.gz']),
    'AutoPET-SUV': ('SUV', 351900, 'autopet', [STUDY + 'SUV.nii.gz'], [STUDY + '{CTres,CT,PET,SEG}.nii.gz']),
    'ImageCAS': ('CT', 257496, 'xiaoweixumedicalai/imagecas', ['1-200/{1,2}.img.nii.gz', '{201,202}/img.nii.gz'],
        ['1-200/{1,2}.label.nii.gz', '{201,202}/label.nii.gz']),
    'TopBrain-CT': ('CT', 5647, '16623496', [BRAIN + 'imagesTr_topbrain_ct/t_ct_{1,2}_0000.nii.gz'],
        [BRAIN + '{imagesTr_topbrain_mr,labelsTr_topbrain_ct}/t_ct_1.nii.gz']),
    'TotalSegmentator-MR': ('MR', 16059, '14710732', ['s000{1,2}/mri.nii.gz'], ['s0001/segmentations/{liver,spleen}.nii.gz']),
    'ACDC': ('MR', 1902, 'creatis', ['database/training/patient00{1,2}/patient00$1_frame{01,12}.nii.gz'],
        ['database/training/patient00{1,2}/patient00$1_{frame01_gt,frame12_gt,4d}.nii.gz']),
    'MRNet': ('MR', 116624, 'aimi|stanford', ['MRNet-v1.0/{train,valid}/{axial,coronal,sagittal}/0000.npy'], []),
    'Duke-Breast-Cancer-MRI': ('MR', 515747, 'cancerimagingarchive|TCIA',
        [BREAST + '{3.0-ax dyn 1st,4.0-ax dyn 2nd}/1-#.dcm'], [BREAST + '300.0-SEG/1-#.dcm']),
    'Prostate-MRI-US-Biopsy': ('MR', 97180, 'cancerimagingarchive|TCIA', [PROSTATE + '5-t2/1-#.dcm'],
        [PROSTATE + '{1-US,6-SEG}/1-#.dcm']),
    'TopBrain-MR': ('MR', 4604, '16623496', [BRAIN + 'imagesTr_topbrain_mr/t_mr_{1,2}_0000.nii.gz'],
        [BRAIN + '{imagesTr_topbrain_ct,labelsTr_topbrain_mr}/t_mr_1.nii.gz']),
    'BraTS-GLI': ('MR', 802341, 'syn53708249',
        ['training/BraTS-GLI-0000{1,2}-100/BraTS-GLI-0000$1-100-{t1n,t1c,t2w,t2f}.nii.gz'],
        ['training/BraTS-GLI-0000{1,2}-100/BraTS-GLI-0000$1-100-seg.nii.gz']),
    'LLD-MMRI': ('MR', 198918, 'LMMMEng', ['images/MR1{1,2}/{5,6}/C+A {pre,post}.nii.gz'],
        ['classification_dataset/images/MR1{1,2}/{C+A,In Phase}.nii.gz']),
    'ChestX-ray8': ('X-ray', 112120, 'nihcc',
        ['images/0000000{1..6}_000.png', 'images_0{01,12}/images/0000001$1_00{1..3}.png'], []),
    'CheXpert': ('X-ray', 223648, 'stanford',
        ['CheXpert-v1.0 batch {2,3} (train {1,2})/patient0000$1/study{1,2}/view1_{frontal,lateral}.jpg',
        'CheXpert-v1.0/train/patient00009/study1/view{1,2}_frontal.jpg'], []),
    'Mammo-Bench': ('X-ray', 71844, 'india-data', ['Mammo-Bench/Preprocessed_Dataset/{ddsm,inbreast}/{1..3}.{png,jpg}'],
        ['Mammo-Bench/{Original_Dataset,Masks}/{ddsm,inbreast}/{1..3}.{png,jpg}']),
    'MURA': ('X-ray', 40005, 'mura',
        ['MURA-v1.1/{train,valid}/XR_{HAND,WRIST}/patient00001/study{1_positive,2_negative}/image1.png'], []),
    'vzrad2': ('X-ray', 8188, 'henriquerezermosqur', ['{train,valid,test}/{a,b}_jpg.rf.1.jpg'],
        ['{train,valid,test}/$1_mask/{a,b}.png']),
    'ADSD': ('X-ray', 8325, 'ydrm75xywg', ['dataset/14_002_5_001{6..9}.{bmp,BMP}'], []),
    'ARCADE': ('X-ray', 3000, '10390295', ['arcade/{syntax,stenosis}/{train,val,test}/images/{1,2}.png'], []),
    'XCAD': ('X-ray', 1621, 'SSVS', ['XCAD/train/trainB/{1..4}.png'],
        ['XCAD/train/trainC/{1..4}.png', 'XCAD/test/{images,masks}/{1,2}.png']),
    'Thyroid-Cine-clip': ('Ultrasound', 1737, 'aimi|stanford', ['clips/{1,2}.npy'], []),
    'EchoNet-Dynamic': ('Ultrasound', 63867, 'echonet', ['EchoNet-Dynamic/Videos/0X1A{1,2}.avi'], []),
    'HC18': ('Ultrasound', 1334, 'hc18|1327317', ['{training,test}_set/00{0,1}_HC.png', 'training_set/001_{2,3}HC.png'],
        ['training_set/00{0,1}_HC_Annotation.png', 'training_set/001_{2,3}HC_Annotation.png']),
    'BUSI': ('Ultrasound', 780, 'scholar.cu', ['Dataset_BUSI_with_GT/{benign,malignant,normal}/$1 ({1,2}).png'],
        ['Dataset_BUSI_with_GT/{benign,malignant,normal}/$1 ({1,2})_{mask,mask_1}.png']),
    'UBPD': ('Ultrasound', 955, 'ubpd', ['frames/{1..3}.png'], ['masks/{1..3}.png'], '--images', 'frames/'),
    'MESSIDOR': ('Fundus', 1200, 'adcis', ['Base{11,22,34}/2005_{1,2}_PP.tif'], []),
    'Refuge2': ('Fundus', 1200, 'victorlemosml/refuge2', ['REFUGE2/{train,val,test}/images/g000{1,2}.jpg'],
        ['REFUGE2/{train,test}/mask/g000{1,2}.bmp', 'REFUGE2/val/mask/g000{1,2}.png']),
    'APTOS2019': ('Fundus', 5590, 'ahmadelsallab|aptos', ['{train,test}_images/{0a1,0b2}.png'], []),
    'Eyepacs': ('Fundus', 88702, 'eyepacs|diabetic-ret', ['{train,test}/{10,13}_{left,right}.jpeg'], []),
    'ROSE': ('OCT', 229, 'imed.nimte',
        ['ROSE-1/{SVC,DVC,SVC_DVC}/{train,test}/img/{01,02}.tif', 'ROSE-2/{train,test}/original/{1,2}.png'],
        ['ROSE-1/{SVC,DVC,SVC_DVC}/{train,test}/gt/{01,02}.tif', 'ROSE-2/{train,test}/gt/{1,2}.png']),
    'OCTA500-OCTA': ('OCT', 600, 'ieee-dataport', [MAPS + 'OCTA({FULL,ILM_OPL,OPL_BM})/1030{1,2}.bmp'],
        ['OCTA_{6M,6mm}/Projection Maps/OCTA(FULL)/10001.bmp', 'OCTA_3M/OCTA/10301/{1,2}.bmp', MAPS + 'OCT(FULL)/10301.bmp']),
    'OCTA500-OCT': ('OCT', 600, 'ieee-dataport', [MAPS + 'OCT({FULL,ILM_OPL,OPL_BM})/1030{1,2}.bmp'],
        ['OCTA_{6M,6mm}/Projection Maps/OCT(FULL)/10001.bmp', 'OCTA_3M/OCT/10301/{1,2}.bmp', MAPS + 'OCTA(FULL)/10301.bmp']),
    'ZhangLabData-OCT': ('OCT', 109309, 'rscbjbr9sj',
        ['ZhangLabData/CellData/OCT/{train,test}/{CNV,DME,DRUSEN,NORMAL}/$2-1-{1,2}.jpeg'],
        ['ZhangLabData/CellData/chest_xray/{train,test}/NORMAL/IM-0001-000{1,2}.jpeg']),
    'BBBC041v1': ('Pathology', 1328, 'BBBC041', ['malaria/images/{a,b}1.{png,jpg}'], []),
    'Lacuna-Malaria-Challenge': ('Pathology', 3925, 'zindi', ['images/id_{a,b,c}.jpg'], []),
    'Lacuna-Malaria-Datasets': ('Pathology', 5059, 'VEADSE', ['thick/Uganda/{1..3}.JPG'],
        ['boxes/{1..3}.jpg'], '--images', 'thick/.*JPG'),
    'SegPath': ('Pathology', 158687, 'dakomura', ['{aSMA_SmoothMuscle,CD45RB_Leukocyte}/{001..003}_HE.png'],
        ['{aSMA_SmoothMuscle,CD45RB_Leukocyte}/{001..003}_mask.png']),
    'HyperKvasir': ('Endoscope', 110079, 'simula',
        ['labeled-images/lower-gi-tract/polyps/{a,b}.jpg', 'unlabeled-images/images/{c,d}.jpg'],
        ['segmented-images/{images,masks}/{a,b}.jpg']),
    'Cataract-101': ('Endoscope', 42157, 'itec.aau.at', ['cataract-101/videos/case_{269,270}.mp4'], []),
    'PitVis2023': ('Endoscope', 96272, '26531686', ['26531686/video_{01,02}.mp4'], []),
    'Endoscapes-CVS': ('Endoscope', 55783, 'CAMMA-public', ['endoscapes/{train,val,test}/{1,2}_14250.jpg'],
        ['endoscapes/{train_seg,val_seg,test_seg,12_5,25}/1_14250.jpg', 'endoscapes/semseg/{1,2}_14250.png']),
    'PSI-AVA': ('Endoscope', 72160, '', ['PSI-AVA/keyframes/CASE00{1,2}/0000{0,1}.jpg'], []),
    'ISIC-2024': ('Photo', 401059, 'isic', ['train-image/image/ISIC_00{1..4}.jpg'], [])}

# name: where it is had; a folder, below it the images and their masks (several: one a class; none: the class is the folder);
# classes (or their number, with the background), the raw values of each ('.' none, after '!' not scored); the patients, whom
# the split draws 50/20/30, or {splits: paths}; lone: 7 images without masks; other: files to leave; modes: of the masks
FOLDERS = {'train': '^train', 'val': '^val', 'test': '^test'}
TASKS = {
    'whs-ct': ('mmwhs', 'ct_train/ct_train_10', '{01..10}_image.nii.gz', '$1_label.nii.gz', 8,
        '0 205 420+421 500 550 600 820 850', '10..', dict(kind='CT', lone='ct_test/ct_test_200{1..7}_image.nii.gz')),
    'kipa22': ('kipa', 'train/', 'image/{0..9}.nii.gz', 'label/$1.nii.gz', 5, '0 1 2 3 4', '.*', dict(kind='CT')),
    'sisvse': ('sisvse', STOMACH,
        [f'images/real/R{{{patients}}}_{{1,2}}.jpg' for patients in ('1..12', '13..14', '3..14', '1..2')],
        [f'semantic_masks/real_{fold}/R$1_$2.png' for fold in ('train_1', 'val_1', 'train_2', 'val_2')],
        32, ' '.join(map(str, range(32))), {'train val test': ''},
        dict(patient=r'R\d+', other=STOMACH + '{images,semantic_masks}/{domain_random_syn,manual_syn}/R1_1.png')),
    'cholecseg8k': ('cholecseg8k', 'video', '{01..10}/video$1_{00080,00160}/frame_80_endo.png',
        '$1/video$1_$2/frame_80_endo_watershed_mask.png', 13, '50+255+0 11 21 13 12 31 23 24 25 32 22 33 5', r'video\d+',
        dict(modes='RGB RGBA', other='video{01..10}/video$1_00080/frame_80_endo_{mask,color_mask}.png')),
    'idrid': ('idrid', 'A. Segmentation/', '1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_{01..05}.jpg',
        '2. All Segmentation Groundtruths/$1/{5. Optic Disc/IDRiD_$2_OD,1. Microaneurysms/IDRiD_$2_MA,'
        '2. Haemorrhages/IDRiD_$2_HE,3. Hard Exudates/IDRiD_$2_EX,4. Soft Exudates/IDRiD_$2_SE}.tif', 6, '',
        {'train': 'Training', 'val': '^$', 'test': 'Testing'}, dict(modes='L RGB RGBA')),
    'fives': ('19688169', '', '{train,test}/Original/{1..5}_{A,N}.png', '$1/Ground truth/$2_$3.png', 2, '0 255', '.*',
        dict(modes='L RGB')),
    'feta21': ('feta', 'feta_2.1/sub-', '{001..006}/anat/sub-$1_rec-{mial,irtk}_T2w.nii.gz',
        '$1/anat/sub-$1_rec-$2_dseg.nii.gz', 8, '0 1 2 3 4 5 6 7', r'sub-\d+', dict(kind='MR')),
    'candi': ('candi_share', 'SchizBull_2008/', '{BPDwoPsy,BPDwPsy,HC,SS}/$1_00{1..3}/$1_00$2_procimg.nii.gz',
        '$1/$1_00$2/$1_00$2_seg.nii.gz', 29,
        '0+1+5+77+251 2 3 4 7 8 10 11 12 13 14 15 16 17 18 24 28 41 42 43 46 47 49 50 51 52 53 54 60', r'(BPD\w+|HC|SS)_\d+',
        dict(kind='MR')),
    'octdl': ('OCTDL|sncdhf53xc', 'OCTDL/', '{AMD,DME,ERM,NO,RAO,RVO,VID}/$1_{101..110}.jpg', None,
        'AMD DME ERM NO RAO RVO VID', '', lambda name: name.split('/')[1] + str((number(name) + 1) // 2), {}),
    'icf': ('intraretinal-cystoid-fluid', CYST, '{509,511,512,513,514,601,602,603,604,815}DME_F/images/DME$1.png',
        '$1DME_F/masks/$1DME_F.png', 2, '0 255', r'\d+DME', dict(other=CYST + '815DME_F/masks/MASK-DME511.png')),
    'tnbc': ('1175282|DRFNS', 'TNBC_NucleiSegmentation/', 'Slide_{01..11}/$1_{1,2}.png', 'GT_$1/$1_$2.png', 2, '0 255',
        r'Slide_\d+', dict(other='__MACOSX/TNBC_NucleiSegmentation/Slide_01/._01_{1,2}.png')),
    'lsc': ('andrewjanowczyk|malignant-lymphoma', '', '{CLL,FL,MCL}/sj-05-100{1..5}-R1_00{1,2}.tif', None, 'CLL FL MCL', '',
        r'\w+/sj-05-\d+', {}),
    'bcss': ('BCSS', '', 'images/TCGA-A1-{11..20}-DX1_xmin1_MPP-0.25.png', 'masks/TCGA-A1-$1-DX1_xmin1_MPP-0.25.png', 6,
        '. 1+19+20 2 3+10+11 4 5+6+7+8+9+12+13+15+16+17+18+21 !0', 'A1-..', {}),
    'monusac': ('RationAI/MoNuSAC', '', '{train,test}/images/TCGA-{11..20}-01Z_1.png', '$1/masks/TCGA-$2-01Z_1.png', 5,
        '0 1 2 3 4', {'train val': '^train', 'test': '^test'}, dict(val=2)),
    'scr': ('jsrt|isi.uu.nl', '', 'All247images/JPC{LN00,LN01,NN00,NN01,NN02}{1,2}.IMG',
        'scratch/fold$2/masks/{left lung,right lung,heart,left clavicle,right clavicle}/JPC$1$2.gif', 6, '', '.*', {}),
    'pdcxr': ('rscbjbr9sj', 'ZhangLabData/CellData/chest_xray/', ['train/PNEUMONIA/person{1..8}_bacteria_{1,2}.jpeg',
        'train/NORMAL/IM-{0115..0122}-0001.jpeg', 'test/{PNEUMONIA/person91_virus_,NORMAL/IM-0091-000}{1,2}.jpeg'], None,
        'NORMAL PNEUMONIA', '', {'train val': '/train/', 'test': '/test/'}, dict(patient=r'person\d+_|IM-\d+')),
    'dca1': ('dca1|cimat', 'Database_134_Angiograms/', '{1..10}.pgm', '$1_gt.pgm', 2, '0 255', '.*', {}),
    'dias': ('DIAS|11637181', '', '{training,validation,test}/images/image_s{1,2,10,11}_i#.png', '$1/labels/label_s$2.png', 2,
        '0 255', FOLDERS, {}),
    'dsca': ('DSCA|11255024', '', 'series/s{1..10}_f#.png', 'vessels/s$1.png', 2, '0 1+2', '.*',
        dict(options=('--images', 'series/(.*)_f', '--masks', r'vessels/(.*)\.png'))),
    'sts-tooth-2d': ('toothfairy|10597292', 'SD-Tooth/STS-2D-Tooth/', '{A,C}-PXI/Labeled/Image/{1..5}.png',
        '$1-PXI/Labeled/Mask/$2.png', 2, '0 1', '.*',
        dict(modes='1', other='SD-Tooth/STS-2D-Tooth/{A,C}-PXI/Unlabeled/Image/{6..9}.png')),
    'uns': ('ultrasound-nerve', 'train/', '{1..10}_{1,2}.tif', '$1_$2_mask.tif', 2, '0 255', r'/\d+',
        dict(lone='test/{1..7}.tif')),
    'tn5000': ('TN5000|28455641', 'TN5000_forReview/', 'JPEGImages/00000{1..9}.jpg', 'Annotations/00000$1.xml',
        'malignant benign', '', {'train': '[1-4].jpg', 'val': '[56].jpg', 'test': '[7-9].jpg'}, {}),
    'fhu': ('ankit8467|hc18', 'training_set/training_set/', '00{1..9}_{,2}HC.png', '00$1_$2HC_Annotation.png', 2, '', r'/\d+',
        dict(lone='test_set/test_set/00{1..7}_HC.png')),
    'autopet-org': ('SegAnyPET', '', STUDY + 'SUV.nii.gz', 'AutoPET-OrganlabelsTr/PETCT_$1_$2_.nii.gz', 12,
        '0 1 2 3 4 5 6 7 8 9 10 11+12', r'PETCT_\w+',
        dict(kind='SUV', other=STUDY + '{CT,PET,SEG}.nii.gz', lone='FDG-PET-CT-Lesions/PETCT_ff{1..7}/02-2003-NA-40/SUV.nii.gz')),
    'slsc-s': ('makhresearch', '', '{train,valid,test}/images/ISIC_{11..24}.jpg', '$1/labels/ISIC_$2.txt',
        2, '', FOLDERS, {}),
    'slsc-c': ('makhresearch', '', '{train,valid,test}/images/ISIC_{11..24}.jpg', '$1/labels/ISIC_$2.txt',
        'BKL NV DF MEL VASC BCC AKIEC', '', FOLDERS, {})}

def expand(template):
    """Each (path, choices) that a template stands for."""
    choices = [[f'{n:0{len(first)}d}' for n in range(int(first), int(last) + 1)] if first else words.split(',')
               for words, first, last in re.findall(r'{((\d+)\.\.(\d+)|.*?)}', template)]
    for chosen in itertools.product(*choices):
        words = iter(chosen)
        yield insert(re.sub('{.*?}', lambda _: next(words), template), chosen), chosen

def insert(template, chosen):
    return re.sub(r'\$(\d)', lambda found: chosen[int(found[1]) - 1], template)

def number(name):
    return int(re.findall(r'\d+', name)[-1])

SHARES = {'fives': (200, 100, 500), 'feta21': (20, 20, 40), 'candi': (40, 20, 43), 'dca1': (25, 25, 84), 'sts-tooth-2d': (100, 100, 700),
          'scr': (25, 47, 175)}  # which Table 3 has where it is not 50 / 20 / 30

# --- writers: a file by its name, with contents of its own ---------------------------------------------------------------

def write(root, name, kind=''):
    """Write an image, volume, clip or sequence; returns its images as they should arrive, uint8 (H, W[, 3])."""
    seed = zlib.crc32(name.replace('Original_', 'Preprocessed_').encode()) >> 2  # a copy has the contents of its original
    path, suffix = root / name, Path(name).suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix in ('.avi', '.mp4'):
        return write_clip(path, seed)
    if suffix in ('.gz', '.npy', '.dcm'):
        return write_volume(path, seed, kind)
    if '#' in name:  # of a sequence, which has up to 8 frames, the darkest counts
        frames = [texture(seed + n) for n in range(3 + number(name.split('_')[-2]) % 6)]
        for n, frame in enumerate(frames):
            Image.fromarray(frame).save(root / name.replace('#', str(n)))
        return [np.min(frames, axis=0)]
    if suffix == '.img':  # JSRT: 12 bits in big-endian 16, no header
        image = texture(seed, 2048, 2048)
        (image.astype(np.uint16) * 16).astype('>u2').tofile(path)
        return [image]
    image = texture(seed, 96, 128 if 'ISIC' in name else 96, channels=seed % 3 * (suffix != '.pgm'))  # 0: grey
    picture = Image.fromarray(image)
    if seed % 3 == 2 and suffix in ('.png', '.tif'):
        picture.putalpha(200)
    picture.save(path, quality=95)
    return [image]

def write_clip(path, seed):
    """61 frames, of which 0, 30 and 60 count."""
    frames = np.stack([texture(seed + n // 30 if n % 30 == 0 else seed - 1, 112, 112) for n in range(61)])
    options = ['-q:v', '2'] if path.suffix == '.avi' else ['-pix_fmt', 'yuv420p', '-crf', '12']
    source = ['-f', 'rawvideo', '-pix_fmt', 'gray', '-s', '112x112', '-r', '25', '-i', '-']
    subprocess.run(['ffmpeg', '-v', 'error', *source, *options, path], input=frames.tobytes(), check=True)
    return list(frames[::30])

def write_volume(path, seed, kind):
    """Three slices in the units of their modality; returns them by the rules of C.1.1."""
    raw = np.stack([texture(seed + n, 48, 48) for n in range(3)]) * 1.0
    raw = {'CT': raw * 4 - 400, 'SUV': raw / 8, 'PET': raw * 90, 'MR': raw * 7 + 20}.get(kind, raw)
    low, high = {'CT': (-200, 400), 'SUV': (0, 20)}.get(kind) or np.percentile(raw, (1, 99))
    if path.suffix == '.npy':
        np.save(path, np.uint8((raw - 20) / 7 if kind == 'MR' else raw))
    elif path.suffix == '.gz':
        save_volume(path, raw.astype(np.float32), seed)
    for n, image in enumerate(raw if path.suffix == '.dcm' else ()):
        write_dicom(path.with_name(f'1-{n}.dcm'), image, path.parent.name.split('-')[-1], seed, n)
    return list(np.uint8((np.clip(raw, low, high) - low) / (high - low) * 255))

def save_volume(path, slices, seed):
    """Upright slices (n, H, W), patient's right on the left, as NIfTI in one of two orientations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(path, slices[:, ::-1, ::-1].transpose(2, 1, 0), (1, 1, 3), ('RAS', 'LPS')[seed % 2])

def write_dicom(path, image, modality, series, n):
    """Slice n of an axial series, in explicit little endian: tag, representation and value. The first slice lies highest."""
    uid, modality = f'1.2.826.0.1.3680043.2.1125.{series}', modality if modality in ('SEG', 'US') else 'MR'
    elements = (f'00020010 UI 1.2.840.10008.1.2.1|00080016 UI 1.2.840.10008.5.1.4.1.1.4|00080018 UI {uid}.{n}|'
                f'00080060 CS {modality}|00180050 DS 3|0020000D UI 1.2.826.9|0020000E UI {uid}|00200011 IS 3|'
                f'00200013 IS {n + 1}|00200032 DS 0\\0\\{-3 * n}|00200037 DS 1\\0\\0\\0\\1\\0|'
                f'00280002 US 1|00280010 US {image.shape[0]}|00280011 US {image.shape[1]}|00280030 DS 1\\1|'
                '00280100 US 16|00280101 US 16|00280102 US 15|00280103 US 0').split('|')
    with open(path, 'wb') as file:
        file.write(bytes(128) + b'DICM' + struct.pack('<HH2sHI', 2, 0, b'UL', 4, 28))
        for tag, kind, value in map(str.split, elements):
            value = struct.pack('<H', int(value)) if kind == 'US' else value.encode()
            value += (b'\0' if kind == 'UI' else b' ') * (len(value) % 2)
            file.write(struct.pack('<HH2sH', int(tag[:4], 16), int(tag[4:], 16), kind.encode(), len(value)) + value)
        file.write(struct.pack('<HH2sHI', 0x7FE0, 0x10, b'OW', 0, 2 * image.size) + image.astype('<u2').tobytes())

def grid(cells, side):
    """(8, 8) as blocks that make a square: every nearest-neighbour reduction to a multiple of 8 finds the same."""
    return np.kron(cells, np.ones((side // 8, side // 8), cells.dtype))

def write_mask(root, name, mask, task, depth):
    """Write the mask of the image `name`, of so many slices; returns what should arrive, (depth, 32, 32) or a class."""
    rng, path = np.random.default_rng(zlib.crc32(name.encode())), root / str(mask)
    *_, classes, values, _, more = TASKS[task]
    mode = rng.choice(more.get('modes', 'L').split())
    if mask is None:
        return next(n for n, folder in enumerate(classes.split()) if folder in name.split('/'))
    if '{' in mask:  # one a class, the later over the earlier; a lesion without a file is absent
        cells = np.zeros((8, 8), np.uint8)
        for value, (layer, _) in enumerate(expand(mask), 1):
            there = rng.random((8, 8)) < 0.3
            if layer.endswith('.gif') or rng.random() < 0.8:
                cells[there] = value
                save_mask(root / layer, grid(there, 1024 if layer.endswith('.gif') else 96), mode)
        return grid(cells, SIZE)[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    if mask.endswith('_Annotation.png'):  # the outline of an ellipse, which may leave the image
        x, y = rng.integers((-12, 8), (30, 30)).tolist()
        outline, inside = Image.new('L', (96, 96)), Image.new('L', (96, 96))
        ImageDraw.Draw(outline).ellipse((x, y, x + 60, y + 48), outline=255, width=int(rng.integers(1, 4)))
        ImageDraw.Draw(inside).ellipse((x, y, x + 60, y + 48), fill=1)
        outline.save(path)
        return np.asarray(inside)[None, 1::3, 1::3]
    if mask.endswith('.xml'):
        path.write_text(f'<annotation><folder>1</folder><object><name>{number(name) % 2}</name></object></annotation>')
        return 1 - number(name) % 2  # '1' is malignant, the first of the classes
    if mask.endswith('.txt'):  # a large polygon and a small box (centre and sides), in either order
        kind, canvas = number(name) % 7, Image.new('L', (1024, 1024))
        corners = 0.1, 0.1, 0.7, 0.1, 0.7, 0.4, 0.4, 0.4, 0.4, 0.8, 0.1, 0.8
        lines = [' '.join(map(str, (kind, *corners))), f'{(kind + 3) % 7} 0.8 0.7 0.3 0.2'][::rng.choice((-1, 1))]
        path.write_text('\n'.join(lines) + '\n')
        for shape in corners, (0.65, 0.6, 0.95, 0.6, 0.95, 0.8, 0.65, 0.8):
            ImageDraw.Draw(canvas).polygon([1024 * x for x in shape], fill=1)
        return kind if classes != 2 else np.asarray(canvas)[None, 16::32, 16::32]
    groups = [[int(value) for value in re.findall(r'\d+', group)] for group in values.split()]
    targets = np.array([255 if group[0] == '!' else n for n, group in enumerate(values.split())], np.uint8)
    cells = rng.choice([n for n, group in enumerate(groups) if group], (depth, 8, 8))
    raw = np.vectorize(lambda n: rng.choice(groups[n]))(cells)
    if mask.endswith('.nii.gz'):
        volume = np.stack([grid(values, 48) for values in raw]).astype(np.int16)
        save_volume(path, volume, zlib.crc32(name.encode()) >> 2)
    else:
        save_mask(path, grid(raw[0].astype(np.uint8), 96), mode)
    return np.stack([grid(values, SIZE) for values in targets[cells]])

def save_mask(path, values, mode):
    """Values uint8, in equal channels of RGB, or bool, in red alone; a palette GIF has white as its first colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values > 0 if mode == '1' else values if values.dtype == np.uint8 else np.uint8(values * 255))
    if path.suffix == '.gif':
        picture = Image.fromarray(np.uint8(~values))
        picture.putpalette([255, 255, 255, 0, 0, 0])
    elif 'RGB' in mode:
        others = picture if values.dtype == np.uint8 else Image.new('L', picture.size)
        picture = Image.merge('RGB', (picture, others, others)).convert(mode)
    picture.save(path)

def put_source(root, name, leave=True):
    """Write a source in miniature; returns the images to keep as grey levels (n, 32, 32)."""
    kind, _, _, keep, others, *_ = SOURCES[name]
    program = {'.avi': 'ffmpeg', '.mp4': 'ffmpeg', '.dcm': 'dcm2niix'}.get(keep[0][-4:])
    if program and not shutil.which(program):
        pytest.skip(f'{program} is not installed')
    for file in (file for template in others * leave for file, _ in expand(template)):
        write(root, file)
    return np.stack([small(image) for template in keep for file, _ in expand(template) for image in write(root, file, kind)])

def put_task(root, name):
    """Write the folder of a task in miniature; returns {image: (its images, their masks (n, 32, 32) or its class)}."""
    _, folder, images, masks, classes, values, split, more = TASKS[name]
    for file in (file for kind in ('other', 'lone') if kind in more for file, _ in expand(more[kind])):
        write(root, file, more.get('kind', ''))
    expected = {}
    images, masks = ([found] if isinstance(found, str) else found or [] for found in (images, masks))
    for template, mask in itertools.zip_longest(images, masks):
        for file, chosen in expand(folder + template):
            mask_file = mask and folder + insert(mask, chosen)
            image = write(root, file, more.get('kind', ''))
            expected[file.replace('#', '0')] = image, write_mask(root, file, mask_file, name, len(image))
    if name == 'octdl':
        lines = [f'{Path(file).stem},{Path(file).parent.name},x,{split(file)}' for file in expected]
        (root / 'OCTDL_labels.csv').write_text('\n'.join(['file_name,disease,condition,patient_id', *lines]))
    if name == 'tn5000':
        (lists := root / 'TN5000_forReview/ImageSets/Main').mkdir(parents=True)
        for part, pattern in split.items():
            (lists / f'{part}.txt').write_text('\n'.join(Path(file).stem for file in expected if re.search(pattern, file)))
    return expected

# --- checks --------------------------------------------------------------------------------------------------------------

def small(image):
    """uint8 (H, W[, c]) as grey levels (32, 32)."""
    return np.float32(Image.fromarray(image.squeeze()).convert('L').resize((SIZE, SIZE), Image.Resampling.BICUBIC))

def prepare(raw, out, *options):
    code, printed = call(raw, out, '--size', SIZE, '--workers', 1, *options)
    assert code == 0, printed
    return printed

def check_source(out, name, keep):
    """The shards hold all that was to keep, and nothing else; returns their number of images."""
    meta = meta_of(out, name)
    found = np.stack([small(image) for path in sorted((out / name).glob('*.npy')) for image in np.load(path)])
    distance = np.abs(found[:, None] - keep).mean((2, 3))
    assert distance.min(1).max() < 10, 'an image that was not to be taken'
    assert {*distance.argmin(1).tolist()} == {*range(len(keep))}
    assert len(found) == len(keep) == meta['count']
    assert meta['modality'] == SOURCES[name][0].replace('SUV', 'PET') and not meta['dropped']['duplicate']
    return len(found)

def check_task(out, name, expected, by=None):
    """Each image is there once, upright and with its own mask or class, and the splits are those of the paper's rule."""
    split, meta = (json.loads((out / file).read_text()) for file in ('split.json', 'meta.json'))
    *_, classes, _, rule, more = TASKS[name]
    segments, drawn = isinstance(classes, int), name in ('fhu', 'slsc-s')  # drawn: up to the pixels of contours
    assert meta['kind'] == ('segmentation' if segments else 'classification') and [*split] == ['train', 'val', 'test']
    assert len(meta['classes']) == classes if segments else meta['classes'] == classes.split()
    for part, files in split.items():
        images, answers = (np.load(out / part / f'{array}.npy') for array in ('images', 'masks' if segments else 'labels'))
        truth = [small(image) for file in files for image in expected[file][0]]
        targets = [expected[file][1] for file in files]
        assert len(images) == len(answers) == len(truth)
        assert not files or np.mean(answers != (np.concatenate(targets) if segments else targets)) <= 0.03 * drawn
        for found, true in zip(map(small, images), truth):  # the dark bones of SCR may have been turned bright
            assert min(np.abs(found - true).mean(), np.abs(255 - found - true).mean() + 99 * (name != 'scr')) < 10
    given = rule if isinstance(rule, dict) else {'train val test': ''}
    by = by or (more.get('patient', '.*') if rule is given else rule)
    patient = by if callable(by) else lambda file: (re.search(by, file) or [file])[0]
    for parts, pattern in given.items():
        files = [split[part] for part in parts.split()]
        assert sorted(sum(files, [])) == sorted(file for file in expected if re.search(pattern, file))
        assert all(files) or pattern == '^$'
        patients = [{*map(patient, names)} for names in files]
        assert len(set.union(*patients)) == sum(map(len, patients)), 'a patient is on two sides'
    assert len(split['val']) == more.get('val', len(split['val']))
    labels = [None] if segments else {answer for _, answer in expected.values()}  # classes are drawn each for itself
    train, val, test = SHARES.get(name, (50, 20, 30))
    for label in labels if rule is not given else ():
        sizes = [len({patient(file) for file in files if label in (None, expected[file][1])}) for files in split.values()]
        n = sum(sizes)
        last, middle = -(-n * test // (train + val + test)), n * val // (train + val + test)
        assert sizes == [n - last - middle, middle, last]

# --- tests ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SOURCES)
def test_source(tmp_path, name):
    options = SOURCES[name][5:]
    keep = put_source(tmp_path / 'raw' / name, name)
    printed = prepare(tmp_path / 'raw', tmp_path / 'out', *(options and ['--source', name, *options]))
    count = check_source(tmp_path / 'out', name, keep)
    assert any(name in line.split() and str(count) in line.split() for line in printed.splitlines()), printed

@pytest.mark.parametrize('name', TASKS)
def test_task(tmp_path, name):
    expected = put_task(tmp_path / 'raw', name)
    printed = prepare(tmp_path / 'raw', tmp_path / 'out', '--task', name, *TASKS[name][-1].get('options', ()))
    check_task(tmp_path / 'out', name, expected)
    words = [line for line in printed.splitlines() if '%|' not in line]  # which the bars of progress have
    assert 'lone' not in TASKS[name][-1] or re.search(r'\b7\b', ' '.join(words)), 'left out without a word'

def test_list(tmp_path):
    assert (len(SOURCES), len(TASKS), sum(row[1] for row in SOURCES.values())) == (44, 26, 4_973_080)
    put_source(tmp_path / 'HC18', 'HC18')
    without = [line.split() for line in call(tmp_path / 'none', tmp_path / 'out', '--list')[1].splitlines()]
    code, printed = call(tmp_path, tmp_path / 'out', '--list')
    assert code == 0 and not (tmp_path / 'out').exists()
    lines = {name: [line for line in printed.splitlines() if name in line.split()[:2]] for name in SOURCES | TASKS}
    assert [name for name, found in lines.items() if len(found) != 1] == []
    where = {name: row[2] for name, row in SOURCES.items()} | {name: row[0] for name, row in TASKS.items()}
    assert [name for name, link in where.items() if not re.search(link, lines[name][0], re.I)] == []
    assert [name for name, found in lines.items() if found[0].split() not in without] == ['HC18']  # the one that was found
    unsure = {name for name, found in lines.items() if 'unsure' in found[0]}
    assert {'UBPD', 'APTOS2019', 'Lacuna-Malaria-Datasets', 'dsca', 'dca1', 'sts-tooth-2d'} <= unsure
    assert not unsure & {'ACDC', 'BUSI', 'HC18', 'ARCADE', 'SegPath', 'kipa22', 'cholecseg8k', 'tn5000', 'fhu', 'autopet-org'}

@pytest.mark.parametrize('folder', ['AutoPET', 'TopBrain', 'OCTA500'])
def test_rows_that_share_a_download(tmp_path, folder):
    names = [name for name in SOURCES if name.startswith(folder)]
    for name in names:
        put_source(tmp_path / 'raw' / folder, name)
    keep = {name: put_source(tmp_path / 'raw' / folder, name, leave=False) for name in names}  # over what others leave
    prepare(tmp_path / 'raw', tmp_path / 'out')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted(names)
    for name in names:
        check_source(tmp_path / 'out', name, keep[name])

def test_one_of_several_and_the_general_rule(tmp_path):
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    keep = {name: put_source(raw / name, name) for name in ('BUSI', 'ACDC', 'ARCADE')}
    scan = np.stack([small(image) for image in write(raw / 'CT/rotterdam', 'dataset00/image00.nii.gz', 'CT')])
    prepare(raw, tmp_path / 'one', '--source', 'ACDC')
    assert [path.name for path in (tmp_path / 'one').iterdir()] == ['ACDC']
    prepare(raw, out)
    for name, images in keep.items():
        check_source(out, name, images)
    found = np.stack([small(image) for image in np.load(out / 'rotterdam/00000.npy')])
    assert found.shape == scan.shape and min(np.abs(found - scan).mean(), np.abs(found[::-1] - scan).mean()) < 10
    prepare(raw, tmp_path / 'glob', '--source', 'BUSI', '--images', r'Dataset.*/(benign|normal)/.*\(.\)\.png')
    assert meta_of(tmp_path / 'glob', 'BUSI')['count'] == 4

def test_a_source_in_a_format_that_is_not_read_is_left_out_by_name(tmp_path):
    keep = put_source(tmp_path / 'raw/BUSI', 'BUSI')
    (tmp_path / 'raw/Eyepacs').mkdir()
    (tmp_path / 'raw/Eyepacs/train-0.parquet').write_bytes(b'binary')
    code, printed = call(tmp_path / 'raw', tmp_path / 'out', '--size', SIZE)
    check_source(tmp_path / 'out', 'BUSI', keep)
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['BUSI']
    assert code == 1 and 'left out, as told above: Eyepacs' in printed and 'accounted' not in printed

@pytest.mark.parametrize('name, program', [('EchoNet-Dynamic', 'ffmpeg'), ('Prostate-MRI-US-Biopsy', 'dcm2niix')])
def test_without_its_program_a_file_is_dropped_by_name(tmp_path, monkeypatch, name, program):
    for file, _ in expand(SOURCES[name][3][0].replace('#', '1')):
        (tmp_path / 'raw' / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'raw' / name / file).write_bytes(b'binary')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert call(tmp_path / 'raw', tmp_path / 'out', '--size', SIZE)[0] == 0
    rows = (tmp_path / 'out' / name / 'dropped.csv').read_text().splitlines()[1:]
    assert rows and all('corrupt' in row and program in row for row in rows)

def test_a_mask_without_its_image_is_left_out_with_a_warning(tmp_path):
    put_task(tmp_path / 'raw', 'dca1')
    (tmp_path / 'raw/Database_134_Angiograms/3.pgm').unlink()
    code, printed = call(tmp_path / 'raw', tmp_path / 'out', '--task', 'dca1')
    assert code == 0 and '3_gt.pgm' in printed and '3.pgm' not in (tmp_path / 'out/split.json').read_text()

def test_splits_by_seed_by_image_and_of_patients_with_several_diseases(tmp_path):
    expected, splits, table = put_task(tmp_path / 'raw', 'octdl'), [], tmp_path / 'raw/OCTDL_labels.csv'
    for n, options in enumerate([(), (), ('--seed', 1), ('--patient', '.*')]):
        prepare(tmp_path / 'raw', tmp_path / str(n), '--task', 'octdl', *options)
        check_task(tmp_path / str(n), 'octdl', expected, by='.*' if '--patient' in options else None)
        splits.append((tmp_path / str(n) / 'split.json').read_text())
    assert splits[0] == splits[1] and len({*splits}) == 3
    table.write_text(re.sub(r'(?<=x,)\D+', '', table.read_text()))  # now five patients have all the seven diseases
    prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'octdl')
    split = json.loads((tmp_path / 'out/split.json').read_text())
    patients = [{(number(file) + 1) // 2 for file in files} for files in split.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 5

@pytest.mark.skipif(not REAL.is_dir(), reason='no real images beside the repository')
def test_real_heads(tmp_path):
    """The filled outlines of HC18 have the areas of ellipses of the published circumferences."""
    folder, heads = tmp_path / 'raw/training_set/training_set', REAL.parent / 'tasks/HC18'
    folder.mkdir(parents=True)
    for path in (heads / 'training_set').iterdir():
        (folder / path.name).symlink_to(path)
    prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'fhu')
    rows = [line.split(',') for line in (heads / 'training_set_pixel_size_and_HC.csv').read_text().splitlines()[1:]]
    radius = {name: float(circumference) / float(pixel) / 2 / np.pi for name, pixel, circumference in rows}
    for part, files in json.loads((tmp_path / 'out/split.json').read_text()).items():
        assert len(files) == dict(train=30, val=12, test=18)[part]
        for file, mask in zip(files, np.load(tmp_path / 'out' / part / 'masks.npy')):
            assert 0.85 < mask.mean() * 800 * 540 / (np.pi * radius[Path(file).name] ** 2) < 1.05, file

@pytest.mark.skipif(not REAL.is_dir(), reason='no real images beside the repository')
def test_real_volumes(tmp_path):
    """CT, PET and MR under the names of three sources: as many slices as have their share of foreground."""
    study, name = tmp_path / 'raw/AutoPET/FDG-PET-CT-Lesions/PETCT_0a1/01-2003', 'BraTS-GLI-00001-000'
    for name, path, real, least in [
            ('AutoPET-CT', study / 'CT.nii.gz', 'CT/totalsegmentator-tests/example_ct.nii.gz', 0.05),
            ('AutoPET-PET', study / 'PET.nii.gz', 'PET/hansen-receptors/D2_raclopride_hc7_alakurtti.nii', 0.01),
            ('BraTS-GLI', tmp_path / f'raw/BraTS-GLI/{name}/{name}-t1c.nii.gz', 'MR/niivue-images/MR_Gd.nii.gz', 0.05)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.load(REAL / real), path)
        prepare(tmp_path / 'raw', tmp_path / 'out', '--source', name)
        volume = nib.as_closest_canonical(nib.load(path)).get_fdata()
        low, high = (-200, 400) if name == 'AutoPET-CT' else np.percentile(volume, (1, 99))
        share = np.mean((volume - low) / (high - low) > 0.02, (0, 1))
        assert abs(meta_of(tmp_path / 'out', name)['count'] - np.sum(share >= least)) <= 1
    assert not (tmp_path / 'out/AutoPET-SUV').exists()
