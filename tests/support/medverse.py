"""The 44 sources of the paper's Table 2 and the 26 tasks of its Table 3, as they are published: the
paths of each in miniature, and what should come out of it. miniatures.py writes them.

In paths {a,b} and {1..3} stand for each of these in turn, $1 for what the first braces stand for,
and # for the number of a slice or frame.
"""
from dataclasses import dataclass

@dataclass
class Source:
    """A data set for pretraining."""
    name: str
    modality: str
    count: int          # images in Table 2
    link: str           # expression that is found in where it is had
    keep: list          # paths of its images
    gives: int          # images that come out of it, with 3 of a volume or video, and 4 of .npy
    leave: tuple = ()   # paths of what lies beside them and must not be taken
    units: str = ''     # of its volumes, where they are not those of the modality
    options: tuple = () # of the command line, where the layout is not known

STUDY = 'FDG-PET-CT-Lesions/PETCT_{0a1,1b2,2c3,3d4,4e5,5f6}/{01-2003-NA u. KM-39,02-2003-NA-40}/'
TOPBRAIN = 'TopBrain_Data_Release_Batch1_073025/'
MAPS = 'OCTA_{3M,3mm}/Projection Maps/'
BREAST = 'manifest-16/Duke-Breast-Cancer-MRI/Breast_MRI_00{1,2}/01-01-1990-NA-MRI BREAST-1/'
PROSTATE = 'manifest-16/Prostate-MRI-US-Biopsy/Prostate-MRI-US-Biopsy-000{1,2}/11-1-NA-1/'
GLIOMA = 'training/BraTS-GLI-0000{1,2}-100/BraTS-GLI-0000$1-100-'
BONES = 'MURA-v1.1/{train,valid}/XR_{HAND,WRIST}/patient00001/'
CHEXPERT = 'CheXpert-v1.0 batch {2,3} (train {1,2})/patient0000$1/study{1,2}/'

SOURCES = [
    Source('AutoPET-CT', modality='CT', count=558473, link='autopet', gives=36,
           keep=[STUDY + 'CT.nii.gz'],
           leave=[STUDY + '{CTres,PET,SUV,SEG}.nii.gz']),
    Source('AutoPET-PET', modality='PET', count=354826, link='autopet', gives=36,
           keep=[STUDY + 'PET.nii.gz'],
           leave=[STUDY + '{CTres,CT,SUV,SEG}.nii.gz']),
    Source('AutoPET-SUV', modality='PET', units='SUV', count=351900, link='autopet', gives=36,
           keep=[STUDY + 'SUV.nii.gz'],
           leave=[STUDY + '{CTres,CT,PET,SEG}.nii.gz']),
    Source('ImageCAS', modality='CT', count=257496, link='xiaoweixumedicalai/imagecas', gives=12,
           keep=['1-200/{1,2}.img.nii.gz', '{201,202}/img.nii.gz'],
           leave=['1-200/{1,2}.label.nii.gz', '{201,202}/label.nii.gz']),
    Source('TopBrain-CT', modality='CT', count=5647, link='16623496', gives=6,
           keep=[TOPBRAIN + 'imagesTr_topbrain_ct/t_ct_{1,2}_0000.nii.gz'],
           leave=[TOPBRAIN + '{imagesTr_topbrain_mr,labelsTr_topbrain_ct}/t_ct_1.nii.gz']),
    Source('TotalSegmentator-MR', modality='MR', count=16059, link='14710732', gives=6,
           keep=['s000{1,2}/mri.nii.gz'],
           leave=['s0001/segmentations/{liver,spleen}.nii.gz']),
    Source('ACDC', modality='MR', count=1902, link='creatis', gives=12,
           keep=['database/training/patient00{1,2}/patient00$1_frame{01,12}.nii.gz'],
           leave=['database/training/patient00{1,2}/patient00$1_{frame01_gt,frame12_gt}.nii.gz',
                  'database/training/patient00{1,2}/patient00$1_4d.nii.gz']),
    Source('MRNet', modality='MR', count=116624, link='aimi|stanford', gives=24,
           keep=['MRNet-v1.0/{train,valid}/{axial,coronal,sagittal}/0000.npy']),
    Source('Duke-Breast-Cancer-MRI', modality='MR', count=515747, link='cancerimagingarchive',
           gives=12,
           keep=[BREAST + '{3.0-ax dyn 1st,4.0-ax dyn 2nd}/1-#.dcm'],
           leave=[BREAST + '300.0-SEG/1-#.dcm']),
    Source('Prostate-MRI-US-Biopsy', modality='MR', count=97180, link='cancerimagingarchive',
           gives=6,
           keep=[PROSTATE + '5-t2/1-#.dcm'],
           leave=[PROSTATE + '{1-US,6-SEG}/1-#.dcm']),
    Source('TopBrain-MR', modality='MR', count=4604, link='16623496', gives=6,
           keep=[TOPBRAIN + 'imagesTr_topbrain_mr/t_mr_{1,2}_0000.nii.gz'],
           leave=[TOPBRAIN + '{imagesTr_topbrain_ct,labelsTr_topbrain_mr}/t_mr_1.nii.gz']),
    Source('BraTS-GLI', modality='MR', count=802341, link='syn53708249', gives=24,
           keep=[GLIOMA + '{t1n,t1c,t2w,t2f}.nii.gz'],
           leave=[GLIOMA + 'seg.nii.gz']),
    Source('LLD-MMRI', modality='MR', count=198918, link='LMMMEng', gives=24,
           keep=['images/MR1{1,2}/{5,6}/C+A {pre,post}.nii.gz'],
           leave=['classification_dataset/images/MR1{1,2}/{C+A,In Phase}.nii.gz']),
    Source('ChestX-ray8', modality='X-ray', count=112120, link='nihcc', gives=12,
           keep=['images/0000000{1..6}_000.png', 'images_0{01,12}/images/0000001$1_00{1..3}.png']),
    Source('CheXpert', modality='X-ray', count=223648, link='stanford', gives=18,
           keep=[CHEXPERT + 'view1_{frontal,lateral}.jpg',
                 'CheXpert-v1.0/train/patient00009/study1/view{1,2}_frontal.jpg']),
    Source('Mammo-Bench', modality='X-ray', count=71844, link='india-data', gives=12,
           keep=['Mammo-Bench/Original_Dataset/{ddsm,inbreast}/{1..3}.{png,jpg}'],
           leave=['Mammo-Bench/{Preprocessed_Dataset,Masks}/{ddsm,inbreast}/{1..3}.{png,jpg}']),
    Source('MURA', modality='X-ray', count=40005, link='mura', gives=8,
           keep=[BONES + '{study1_positive,study2_negative}/image1.png']),
    Source('vzrad2', modality='X-ray', count=8188, link='henriquerezermosqur', gives=6,
           keep=['{train,valid,test}/{a,b}_jpg.rf.1.jpg'],
           leave=['{train,valid,test}/$1_mask/{a,b}.png']),
    Source('ADSD', modality='X-ray', count=8325, link='ydrm75xywg', gives=8,
           keep=['dataset/14_002_5_001{6..9}.{bmp,BMP}']),
    Source('ARCADE', modality='X-ray', count=3000, link='10390295', gives=12,
           keep=['arcade/{syntax,stenosis}/{train,val,test}/images/{1,2}.png']),
    Source('XCAD', modality='X-ray', count=1621, link='SSVS', gives=4,
           keep=['XCAD/train/trainB/{1..4}.png'],
           leave=['XCAD/train/trainC/{1..4}.png', 'XCAD/test/{images,masks}/{1,2}.png']),
    Source('Thyroid-Cine-clip', modality='Ultrasound', count=1737, link='aimi|stanford', gives=8,
           keep=['clips/{1,2}.npy']),
    Source('EchoNet-Dynamic', modality='Ultrasound', count=63867, link='echonet', gives=6,
           keep=['EchoNet-Dynamic/Videos/0X1A{1,2}.avi']),
    Source('HC18', modality='Ultrasound', count=1334, link='hc18|1327317', gives=6,
           keep=['{training,test}_set/00{0,1}_HC.png', 'training_set/001_{2,3}HC.png'],
           leave=['training_set/00{0,1}_HC_Annotation.png',
                  'training_set/001_{2,3}HC_Annotation.png']),
    Source('BUSI', modality='Ultrasound', count=780, link='scholar.cu', gives=6,
           keep=['Dataset_BUSI_with_GT/{benign,malignant,normal}/$1 ({1,2}).png'],
           leave=['Dataset_BUSI_with_GT/{benign,malignant,normal}/$1 ({1,2})_{mask,mask_1}.png']),
    Source('UBPD', modality='Ultrasound', count=955, link='ubpd', gives=3,
           keep=['frames/{1..3}.png'],
           leave=['masks/{1..3}.png'],
           options=['--images', 'frames/']),
    Source('MESSIDOR', modality='Fundus', count=1200, link='adcis', gives=6,
           keep=['Base{11,22,34}/2005_{1,2}_PP.tif']),
    Source('Refuge2', modality='Fundus', count=1200, link='victorlemosml/refuge2', gives=6,
           keep=['REFUGE2/{train,val,test}/images/g000{1,2}.jpg'],
           leave=['REFUGE2/{train,test}/mask/g000{1,2}.bmp', 'REFUGE2/val/mask/g000{1,2}.png']),
    Source('APTOS2019', modality='Fundus', count=5590, link='ahmadelsallab|aptos', gives=4,
           keep=['{train,test}_images/{0a1,0b2}.png']),
    Source('Eyepacs', modality='Fundus', count=88702, link='eyepacs|diabetic-ret', gives=8,
           keep=['{train,test}/{10,13}_{left,right}.jpeg']),
    Source('ROSE', modality='OCT', count=229, link='imed.nimte', gives=16,
           keep=['ROSE-1/{SVC,DVC,SVC_DVC}/{train,test}/img/{01,02}.tif',
                 'ROSE-2/{train,test}/original/{1,2}.png'],
           leave=['ROSE-1/{SVC,DVC,SVC_DVC}/{train,test}/gt/{01,02}.tif',
                  'ROSE-2/{train,test}/gt/{1,2}.png']),
    Source('OCTA500-OCTA', modality='OCT', count=600, link='ieee-dataport', gives=12,
           keep=[MAPS + 'OCTA({FULL,ILM_OPL,OPL_BM})/1030{1,2}.bmp'],
           leave=['OCTA_{6M,6mm}/Projection Maps/OCTA(FULL)/10001.bmp',
                  'OCTA_3M/OCTA/10301/{1,2}.bmp',
                  MAPS + 'OCT(FULL)/10301.bmp']),
    Source('OCTA500-OCT', modality='OCT', count=600, link='ieee-dataport', gives=12,
           keep=[MAPS + 'OCT({FULL,ILM_OPL,OPL_BM})/1030{1,2}.bmp'],
           leave=['OCTA_{6M,6mm}/Projection Maps/OCT(FULL)/10001.bmp',
                  'OCTA_3M/OCT/10301/{1,2}.bmp',
                  MAPS + 'OCTA(FULL)/10301.bmp']),
    Source('ZhangLabData-OCT', modality='OCT', count=109309, link='rscbjbr9sj', gives=16,
           keep=['ZhangLabData/CellData/OCT/{train,test}/{CNV,DME,DRUSEN,NORMAL}/$2-1-{1,2}.jpeg'],
           leave=['ZhangLabData/CellData/chest_xray/{train,test}/NORMAL/IM-0001-000{1,2}.jpeg']),
    Source('BBBC041v1', modality='Pathology', count=1328, link='BBBC041', gives=4,
           keep=['malaria/images/{a,b}1.{png,jpg}']),
    Source('Lacuna-Malaria-Challenge', modality='Pathology', count=3925, link='zindi', gives=3,
           keep=['images/id_{a,b,c}.jpg']),
    Source('Lacuna-Malaria-Datasets', modality='Pathology', count=5059, link='VEADSE', gives=3,
           keep=['thick/Uganda/{1..3}.JPG'],
           leave=['boxes/{1..3}.jpg'],
           options=['--images', 'thick/.*JPG']),
    Source('SegPath', modality='Pathology', count=158687, link='dakomura', gives=6,
           keep=['{aSMA_SmoothMuscle,CD45RB_Leukocyte}/{001..003}_HE.png'],
           leave=['{aSMA_SmoothMuscle,CD45RB_Leukocyte}/{001..003}_mask.png']),
    Source('HyperKvasir', modality='Endoscope', count=110079, link='simula', gives=4,
           keep=['labeled-images/lower-gi-tract/polyps/{a,b}.jpg',
                 'unlabeled-images/images/{c,d}.jpg'],
           leave=['segmented-images/{images,masks}/{a,b}.jpg']),
    Source('Cataract-101', modality='Endoscope', count=42157, link='itec.aau.at', gives=6,
           keep=['cataract-101/videos/case_{269,270}.mp4']),
    Source('PitVis2023', modality='Endoscope', count=96272, link='26531686', gives=6,
           keep=['26531686/video_{01,02}.mp4']),
    Source('Endoscapes-CVS', modality='Endoscope', count=55783, link='CAMMA-public', gives=6,
           keep=['endoscapes/{train,val,test}/{1,2}_14250.jpg'],
           leave=['endoscapes/{train_seg,val_seg,test_seg,12_5,25}/1_14250.jpg',
                  'endoscapes/semseg/{1,2}_14250.png']),
    Source('PSI-AVA', modality='Endoscope', count=72160, link='TAPIR', gives=4,
           keep=['PSI-AVA/keyframes/CASE00{1,2}/0000{0,1}.jpg']),
    Source('ISIC-2024', modality='Photo', count=401059, link='isic', gives=4,
           keep=['train-image/image/ISIC_00{1..4}.jpg'])]

@dataclass
class Task:
    """A labelled data set."""
    name: str
    link: str           # expression that is found in where it is had
    images: list        # paths of its images
    classes: list       # their names, or the number of classes with the background
    patients: tuple     # how many get into train, val and test
    masks: tuple = ()   # of each of `images`; with braces again where each class has a file
    answers: str = 'values'     # what tells the classes: see ANSWERS of miniatures.py
    values: dict = None         # {value in a mask: number of its class}; 255 is not scored
    patient: str = '.*'         # what it finds in a path is the patient
    given: dict = None          # {splits: expression of the paths that get into them}
    of_each_class: tuple = ()   # patients of each class in train, val and test
    lone: tuple = ()            # paths of 7 images without a mask, left out with a warning
    leave: tuple = ()           # paths of what lies beside them and must not be taken
    units: str = ''             # of volumes: CT, MR or SUV
    modes: tuple = ('L',)       # of Pillow, in which masks are written
    side: tuple = (96, 96)      # of the pictures: height and width
    becomes: tuple = None       # of a converted task: what is found in a path, what replaces it
    rule: tuple = ()            # of its frames, for tests.lab.convert, where the layout is not known
    options: tuple = ()         # of the command line, where the layout is not known

def numbered(*groups):
    """{value: place of its group}, of values or lists of values."""
    lists = [group if isinstance(group, list) else [group] for group in groups]
    return {value: place for place, group in enumerate(lists) for value in group}

def same(count):
    """Values that are the numbers of their classes."""
    return {value: value for value in range(count)}

BLACK_WHITE = {0: 0, 255: 1}
OFFICIAL = {'train': '^train', 'val': '^val', 'test': '^test'}
STOMACH = 'miccai2022_sisvse_dataset/'
FUNDUS = 'A. Segmentation/'
LESIONS = ('5. Optic Disc/IDRiD_$2_OD,1. Microaneurysms/IDRiD_$2_MA,2. Haemorrhages/IDRiD_$2_HE,'
           '3. Hard Exudates/IDRiD_$2_EX,4. Soft Exudates/IDRiD_$2_SE')
BONE_NAMES = 'left lung,right lung,heart,left clavicle,right clavicle'
CYSTS = '2021-training-data-ZA/2021-training-data-ZA/'
CHEST = 'ZhangLabData/CellData/chest_xray/'
TEETH = 'SD-Tooth/STS-2D-Tooth/'
TISSUES = (2, 3, 4, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 28,
           41, 42, 43, 46, 47, 49, 50, 51, 52, 53, 54, 60)
STRUCTURES = (11, 21, 13, 12, 31, 23, 24, 25, 32, 22, 33, 5)

TASKS = [
    Task('whs-ct', link='mmwhs', classes=8, patients=(5, 2, 3), units='CT',
         images=['ct_train/ct_train_10{01..10}_image.nii.gz'],
         masks=['ct_train/ct_train_10$1_label.nii.gz'],
         values=numbered(0, 205, [420, 421], 500, 550, 600, 820, 850),
         lone=['ct_test/ct_test_200{1..7}_image.nii.gz']),
    Task('kipa22', link='kipa', classes=5, patients=(5, 2, 3), units='CT', values=same(5),
         images=['train/image/{0..9}.nii.gz'],
         masks=['train/label/$1.nii.gz']),
    Task('sisvse', link='sisvse', classes=32, patients=(11, 1, 2), patient=r'R\d+', values=same(32),
         images=[STOMACH + 'images/real/R{1..12}_{1,2}.jpg',
                 STOMACH + 'images/real/R{13..14}_{1,2}.jpg'],
         masks=[STOMACH + 'semantic_masks/real_train_1/R$1_$2.png',
                STOMACH + 'semantic_masks/real_val_1/R$1_$2.png'],
         given={'train val': r'R(\d|10|11|12)_', 'test': 'R1[34]_'},
         leave=[STOMACH + 'semantic_masks/real_train_2/R{3..14}_{1,2}.png',
                STOMACH + 'semantic_masks/real_val_2/R{1..2}_{1,2}.png',
                STOMACH + '{images,semantic_masks}/{domain_random_syn,manual_syn}/R1_1.png']),
    Task('cholecseg8k', link='cholecseg8k', classes=13, patients=(5, 2, 3), patient=r'video\d+',
         images=['video{01..10}/video$1_{00080,00160}/frame_80_endo.png'],
         masks=['video$1/video$1_$2/frame_80_endo_watershed_mask.png'], modes=['RGB', 'RGBA'],
         values=numbered([50, 255, 0], *STRUCTURES),
         leave=['video{01..10}/video$1_00080/frame_80_endo_{mask,color_mask}.png']),
    Task('idrid', link='idrid', classes=6, patients=(5, 0, 5), answers='layers',
         images=[FUNDUS + '1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_{01..05}.jpg'],
         masks=[FUNDUS + '2. All Segmentation Groundtruths/$1/{' + LESIONS + '}.tif'],
         modes=['L', 'RGB', 'RGBA'],
         given={'train': 'Training', 'test': 'Testing'}),
    Task('fives', link='19688169', classes=2, patients=(5, 2, 13), values=BLACK_WHITE,
         images=['{train,test}/Original/{1..5}_{A,N}.png'],
         masks=['$1/Ground truth/$2_$3.png'], modes=['L', 'RGB']),
    Task('feta21', link='feta', classes=8, patients=(2, 1, 3), units='MR', values=same(8),
         images=['feta_2.1/sub-{001..006}/anat/sub-$1_rec-{mial,irtk}_T2w.nii.gz'],
         patient=r'sub-\d+',
         masks=['feta_2.1/sub-$1/anat/sub-$1_rec-$2_dseg.nii.gz']),
    Task('candi', link='candi_share', classes=29, patients=(4, 2, 6), units='MR',
         images=['SchizBull_2008/{BPDwoPsy,BPDwPsy,HC,SS}/$1_00{1..3}/$1_00$2_procimg.nii.gz'],
         masks=['SchizBull_2008/$1/$1_00$2/$1_00$2_seg.nii.gz'],
         values=numbered([0, 1, 5, 77, 251], *TISSUES), patient=r'(BPD\w+|HC|SS)_\d+'),
    Task('octdl', link='OCTDL|sncdhf53xc', patients=(14, 7, 14), of_each_class=(2, 1, 2),
         images=['OCTDL/{AMD,DME,ERM,NO,RAO,RVO,VID}/$1-{1..5}_{1,2}.jpg'], patient=r'[A-Z]+-\d',
         answers='table', classes=['AMD', 'DME', 'ERM', 'NO', 'RAO', 'RVO', 'VID']),
    Task('icf', link='intraretinal-cystoid-fluid', classes=2, patients=(5, 2, 3),
         images=[CYSTS + '{509,511,512,513,514,601,602,603,604,815}DME_F/images/DME$1.png'],
         masks=[CYSTS + '$1DME_F/masks/$1DME_F.png'], values=BLACK_WHITE,
         leave=[CYSTS + '815DME_F/masks/MASK-DME511.png']),
    Task('tnbc', link='1175282|DRFNS', classes=2, patients=(5, 2, 4), patient=r'Slide_\d+',
         images=['TNBC_NucleiSegmentation/Slide_{01..11}/$1_{1,2}.png'],
         masks=['TNBC_NucleiSegmentation/GT_$1/$1_$2.png'], values=BLACK_WHITE,
         leave=['__MACOSX/TNBC_NucleiSegmentation/Slide_01/._01_{1,2}.png']),
    Task('lsc', link='andrewjanowczyk|malignant-lymphoma', patients=(6, 3, 6),
         images=['{CLL,FL,MCL}/sj-05-100{1..5}-R1_00{1,2}.tif'], patient=r'\w+/sj-05-\d+',
         answers='folder', classes=['CLL', 'FL', 'MCL'], of_each_class=(2, 1, 2)),
    Task('bcss', link='BCSS', classes=6, patients=(5, 2, 3), patient='A1-..',
         images=['images/TCGA-A1-{11..20}-DX1_xmin1_MPP-0.25.png'],
         masks=['masks/TCGA-A1-$1-DX1_xmin1_MPP-0.25.png'],
         values={0: 255} | numbered([], [1, 19, 20], 2, [3, 10, 11], 4,
                                    [5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 18, 21])),
    Task('monusac', link='RationAI/MoNuSAC', classes=5, patients=(8, 2, 10), values=same(5),
         images=['{train,test}/images/TCGA-{11..20}-01Z_1.png'],
         masks=['$1/masks/TCGA-$2-01Z_1.png'],
         given={'train val': '^train', 'test': '^test'}),
    Task('scr', link='jsrt|isi.uu.nl', classes=6, patients=(1, 1, 6), answers='layers',
         images=['All247images/JPC{LN,NN}{00,01}{1,2}.IMG'], becomes=('IMG$', 'png'),
         masks=['scratch/fold$3/masks/{' + BONE_NAMES + '}/JPC$1$2$3.gif']),
    Task('pdcxr', link='rscbjbr9sj', patients=(12, 4, 3), patient=r'person\d+_|IM-\d+',
         images=[CHEST + 'train/PNEUMONIA/person{1..8}_bacteria_{1,2}.jpeg',
                 CHEST + 'train/NORMAL/IM-{0115..0122}-0001.jpeg',
                 CHEST + 'test/PNEUMONIA/person91_virus_{1,2}.jpeg',
                 CHEST + 'test/NORMAL/IM-009{1,2}-0001.jpeg'],
         answers='folder', classes=['NORMAL', 'PNEUMONIA'],
         given={'train val': '/train/', 'test': '/test/'}),
    Task('dca1', link='dca1|cimat', classes=2, patients=(2, 1, 7), values=BLACK_WHITE,
         images=['Database_134_Angiograms/{1..10}.pgm'],
         masks=['Database_134_Angiograms/$1_gt.pgm']),
    Task('dias', link='DIAS|11637181', classes=2, patients=(4, 4, 4), values=BLACK_WHITE,
         images=['{training,validation,test}/images/image_s{1,2,10,11}_i#.png'],
         masks=['$1/labels/label_s$2.png'],
         becomes=(r'(.*)images/image_s(\d+)_i0', r'darkest/\1\2'),
         given={'train': '/train', 'val': '/val', 'test': '/test'}),
    Task('dsca', link='DSCA|11255024', classes=2, patients=(5, 2, 3), values={0: 0, 1: 1, 2: 1},
         images=['series/s{1..10}_f#.png'],
         masks=['vessels/s$1.png'],
         becomes=('series/(.*)_f0', r'darkest/\1'), rule=['series/(.*)_f'],
         options=['--masks', r'vessels/(.*)\.png']),
    Task('sts-tooth-2d', link='toothfairy|10597292', classes=2, patients=(1, 1, 8),
         images=[TEETH + '{A,C}-PXI/Labeled/Image/{1..5}.png'],
         masks=[TEETH + '$1-PXI/Labeled/Mask/$2.png'], values=same(2), modes=['1'],
         leave=[TEETH + '{A,C}-PXI/Unlabeled/Image/{6..9}.png']),
    Task('uns', link='ultrasound-nerve', classes=2, patients=(5, 2, 3), patient=r'/\d+',
         images=['train/{1..10}_{1,2}.tif'],
         masks=['train/$1_$2_mask.tif'], values=BLACK_WHITE,
         lone=['test/{1..7}.tif']),
    Task('tn5000', link='TN5000|28455641', patients=(4, 2, 3), answers='xml',
         images=['TN5000_forReview/JPEGImages/00000{1..9}.jpg'],
         masks=['TN5000_forReview/Annotations/00000$1.xml'],
         classes=['malignant', 'benign'], becomes=('', ''),
         given={'train': '[1-4].jpg', 'val': '[56].jpg', 'test': '[7-9].jpg'}),
    Task('fhu', link='ankit8467|hc18', classes=2, patients=(5, 1, 3), patient=r'/\d+',
         images=['training_set/training_set/00{1..9}_{,2}HC.png'],
         masks=['training_set/training_set/00$1_$2HC_Annotation.png'], answers='outline',
         becomes=('', ''), lone=['test_set/test_set/00{1..7}_HC.png']),
    Task('autopet-org', link='SegAnyPET', classes=12, patients=(3, 1, 2), units='SUV',
         images=[STUDY + 'SUV.nii.gz'],
         masks=['AutoPET-OrganlabelsTr/PETCT_$1_$2_.nii.gz'],
         values=same(12) | {12: 11}, patient=r'PETCT_\w+',
         lone=['FDG-PET-CT-Lesions/PETCT_ff{1..7}/02-2003-NA-40/SUV.nii.gz'],
         leave=[STUDY + '{CT,PET,SEG}.nii.gz']),
    Task('slsc-s', link='makhresearch', classes=2, patients=(14, 14, 14), side=(96, 128),
         images=['{train,valid,test}/images/ISIC_{11..24}.jpg'],
         masks=['$1/labels/ISIC_$2.txt'], given=OFFICIAL, answers='polygons',
         becomes=('', '')),
    Task('slsc-c', link='makhresearch', patients=(14, 14, 14), side=(96, 128),
         images=['{train,valid,test}/images/ISIC_{11..24}.jpg'],
         masks=['$1/labels/ISIC_$2.txt'], given=OFFICIAL, answers='largest polygon', becomes=('', ''),
         classes=['BKL', 'NV', 'DF', 'MEL', 'VASC', 'BCC', 'AKIEC'])]
