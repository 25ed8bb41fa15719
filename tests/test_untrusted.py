"""Files that are cut off, lie about what they are, or are no files."""
import os
import subprocess

import nibabel as nib
import numpy as np
import pytest

from tests.support import files, prepared, runs
from tests.support.prepared import Prepared, prepare

def write_video(path):
    """240 frames, of which each 30th is kept; an MP4 has its index in front."""
    frames = np.stack([files.texture(number // 30, 64, 64, 3) for number in range(240)])
    files.video(path, frames)
    if path.suffix == '.mp4':
        moved = path.with_name('moved.mp4')
        command = ['ffmpeg', '-v', 'error', '-i', path, '-c', 'copy', '-movflags', '+faststart']
        subprocess.run([*command, moved], check=True)
        os.replace(moved, path)
    return path

@pytest.mark.parametrize('ending', ['avi', 'mp4'])
def test_a_video_that_is_cut_in_half_says_so(tmp_path, ending):
    path = write_video(tmp_path / f'x.{ending}')
    assert [item.reason for item in prepared.outcomes(path, 'Endoscope')] == 8 * ['']
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    reasons = [item.reason for item in prepared.outcomes(path, 'Endoscope')]
    assert len(reasons) < 8 and reasons[-1] == 'corrupt'

def cut_between_packets(path, count):
    """Cut a video behind its first packets, where no packet is broken."""
    words = '-select_streams', 'v', '-show_entries', 'packet=pos,size', '-of', 'csv=p=0'
    told = subprocess.check_output(['ffprobe', '-v', 'error', *words, path], text=True)
    packets = sorted(tuple(map(int, line.split(',')))[::-1] for line in told.split())
    start, size = packets[count - 1]
    path.write_bytes(path.read_bytes()[:start + size])

@pytest.mark.parametrize('ending', ['avi', 'mp4'])
def test_a_video_that_ends_between_two_packets_says_so(tmp_path, ending):
    path = write_video(tmp_path / f'x.{ending}')
    cut_between_packets(path, 100)
    reasons = [item.reason for item in prepared.outcomes(path, 'Endoscope')]
    assert reasons == ['', '', '', '', 'corrupt']

def test_a_video_that_was_trimmed_without_coding_is_whole(tmp_path):
    """Its list of edits hides frames before the start, back to one that stands alone."""
    path = write_video(tmp_path / 'x.mp4')
    command = ['ffmpeg', '-v', 'error', '-ss', '1.3', '-i', path, '-c', 'copy', tmp_path / 'y.mp4']
    subprocess.run(command, check=True)
    assert {item.reason for item in prepared.outcomes(tmp_path / 'y.mp4', 'Endoscope')} == {''}

LISTS = {'playlist': '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{}\n#EXT-X-ENDLIST\n',
         'concatenation': 'ffconcat version 1.0\nfile {}\n'}

@pytest.mark.parametrize('kind', LISTS)
def test_a_video_that_names_another_file_is_dropped(tmp_path, kind):
    other = write_video(tmp_path / 'elsewhere.avi')
    path = files.write(tmp_path / 'x.avi', LISTS[kind].format(other))
    assert [item.reason for item in prepared.outcomes(path, 'Endoscope')] == ['corrupt']

@pytest.mark.parametrize('offset', [32768, 1024])
def test_unsigned_ct_has_one_window_in_nifti_and_npy(tmp_path, offset):
    ramp = np.linspace(-1000, 1000, 64 * 64).reshape(64, 64)
    slices = np.stack(5 * [ramp + offset]).astype(np.uint16)
    upright = slices.transpose(2, 1, 0)[:, ::-1]     # y goes up in NIfTI
    path = files.nifti(tmp_path / 'x.nii.gz', upright[::-1], spacing=(1, 1, 3))
    one = prepared.kept(path, 'CT')
    other = prepared.kept(files.save(tmp_path / 'x.npy', slices), 'CT')
    assert np.array_equal(one, other) and np.ptp(one[0]) == 255

def write_nan(path, volume):
    """A NIfTI whose affine has a number that is none."""
    files.nifti(path, volume)
    data = bytearray(path.read_bytes())
    data[280:284] = np.float32(np.nan).tobytes()     # srow_x[0]
    path.write_bytes(data)

def test_a_mask_whose_affine_is_not_finite_is_refused(tmp_path):
    for number in range(3):
        volume = np.stack([files.texture(number, 32, 32)] * 4, 2).astype(np.int16)
        mask = np.uint8(volume > 150)
        files.nifti(tmp_path / f'raw/images/{number}.nii', volume)
        files.nifti(tmp_path / f'raw/masks/{number}.nii', mask)
        write_nan(tmp_path / f'raw/masks/{number}.nii', mask)
    assert np.isnan(nib.load(tmp_path / 'raw/masks/0.nii').affine).any()
    result = prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'mini', '--modality', 'MR')
    runs.ends(result, ['masks/0.nii', 'not finite'])

def test_a_pipe_is_counted_and_not_read(tmp_path):
    files.save(tmp_path / 'raw/Photo/a/0.png', files.texture(0))
    for name in 'pipe', 'pipe.png', 'pipe.dcm':
        os.mkfifo(tmp_path / 'raw/Photo/a' / name)
    words = '--raw', tmp_path / 'raw', '--out', tmp_path / 'out', '--size', 64, '--workers', 1
    assert runs.finish(runs.start('prepare_medverse', *words), timeout=60).code == 0
    meta = Prepared(tmp_path / 'out').meta('a')
    assert (meta['files'], meta['count'], meta['dropped']['other']) == (4, 1, 3)

def test_a_folder_that_cannot_be_read_stops(tmp_path, monkeypatch):
    files.save(tmp_path / 'raw/Photo/a/0.png', files.texture(0))
    files.save(tmp_path / 'raw/Photo/a/locked/1.png', files.texture(1))
    scan = os.scandir

    def refuse(path='.'):
        if 'locked' in os.fspath(path):
            raise PermissionError(13, 'Permission denied', os.fspath(path))
        return scan(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    runs.ends(prepare(tmp_path / 'raw', tmp_path / 'out'), ['Permission denied', 'a/locked'])

def test_what_dcm2niix_wrote_counts_though_it_ends_with_an_error(tmp_path, fake_program):
    files.dicom(tmp_path / 'raw/MR/a/0.dcm', files.ramp(0, 999, 'i2'))
    files.nifti(tmp_path / 'volume.nii', np.stack([files.ramp(0, 999, 'i2')] * 3, 2))
    fake_program('dcm2niix', f'''
        while [ "$1" != -o ]; do shift; done
        cp {tmp_path}/volume.nii "$2/x.nii"
        echo '{{"Modality": "MR"}}' > "$2/x.json"
        exit 1''')
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    found = Prepared(tmp_path / 'out')
    row, = found.dropped('a')
    assert found.meta('a')['count'] == 3 and (row['slice'], row['reason']) == ('3', 'corrupt')
    assert 'dcm2niix ended with error 1' in row['detail']

def test_the_last_words_of_dcm2niix_are_the_reason_if_it_wrote_nothing(tmp_path, fake_program):
    files.dicom(tmp_path / 'raw/MR/a/scan/0.dcm', files.ramp(0, 999, 'i2'))
    fake_program('dcm2niix', 'echo JPEG-LS is not supported; exit 2')
    files.save(tmp_path / 'raw/MR/a/0.png', files.texture(0))
    prepare(tmp_path / 'raw', tmp_path / 'out')
    row, = Prepared(tmp_path / 'out').dropped('a')
    assert row['reason'] == 'corrupt' and 'JPEG-LS is not supported' in row['detail']
