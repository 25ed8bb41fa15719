"""What stops a preparation, and what it leaves: whole sources, no processes, and one sentence.

A program that stands in for ffmpeg waits until the test lets it go on, so that a preparation is
stopped in the midst of its second source, however fast the machine is."""
import os
import shutil
import signal
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support import files, prepared, processes, runs
from tests.support.prepared import Prepared, prepare

SIZE = prepared.SIZE

@pytest.fixture
def halted(tmp_path, fake_program):
    """RAW with the sources a (two pictures) and b (two videos, then pictures).

    Each worker that decodes a video writes its number to `started` and waits for `go`."""
    raw, go, started = tmp_path / 'raw', tmp_path / 'go', tmp_path / 'started'
    started.mkdir()
    fake_program('ffmpeg', f'''
        touch {started}/$PPID
        until [ -e {go} ]; do sleep 0.02; done
        yes | head -c {2 * SIZE * SIZE * 3}''')
    for seed in range(2):
        files.save(raw / f'Fundus/a/{seed}.png', files.texture(seed, channels=3))
        files.write(raw / f'Fundus/b/{seed}.avi', 'video')
    for seed in range(60):
        files.save(raw / f'Fundus/b/picture-{seed:02d}.png', files.texture(seed, channels=3))

    processes = []

    def launch(out):
        """A preparation as a process of its own, with three workers."""
        words = '--raw', raw, '--out', out, '--size', SIZE, '--workers', 3
        processes.append(runs.start('prepare_medverse', *words))
        return processes[-1]

    def start(out):
        """The same, when two of its workers wait in source b; and the numbers of these."""
        process = launch(out)
        runs.wait_for(lambda: len(list(started.iterdir())) == 2, process)
        assert (out / 'a').is_dir() and (out / 'b.part').is_dir() and not (out / 'b').exists()
        return process, [int(path.name) for path in started.iterdir()]

    yield SimpleNamespace(raw=raw, go=go, launch=launch, start=start)
    go.touch()     # so that no stand-in outlives the test
    for process in processes:
        if process.poll() is None:
            runs.kill(process)

# --- killed, interrupted, started again ----------------------------------------------------------

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_preparation_takes_its_workers_along(halted, tmp_path, number):
    """They end although they wait in a decoder, which goes on."""
    process, workers = halted.start(tmp_path / 'out')
    process.send_signal(number)
    assert runs.finish(process).code == -number
    processes.await_end(workers)

def test_a_killed_preparation_that_is_started_again_gives_the_same_bytes(halted, tmp_path):
    """What it had begun is deleted by hand, since it could be of another program."""
    process, _ = halted.start(tmp_path / 'killed')
    process.kill()
    runs.finish(process)
    halted.go.touch()
    runs.ends(prepare(halted.raw, tmp_path / 'killed'), [tmp_path / 'killed/b.part', 'delete it'])
    shutil.rmtree(tmp_path / 'killed/b.part')
    again = prepare(halted.raw, tmp_path / 'killed')
    assert again.code == 0 and again.out.count('finished before') == 1
    assert prepare(halted.raw, tmp_path / 'whole').code == 0
    assert files.contents(tmp_path / 'killed') == files.contents(tmp_path / 'whole')
    assert len(Prepared(tmp_path / 'whole').images('b')) == 64

def test_ctrl_c_ends_in_a_sentence_and_leaves_the_finished_sources(halted, tmp_path):
    """A terminal sends it to the workers too, of which one has nothing to do."""
    process, workers = halted.start(tmp_path / 'out')
    os.killpg(process.pid, signal.SIGINT)
    halted.go.touch()
    result = runs.finish(process)
    assert result.code == 130
    assert 'stopped' in runs.ends(result)
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['a']
    processes.await_end(workers)

def test_two_preparations_into_one_folder_do_not_meet(halted, tmp_path):
    """The second is told so; the first finishes as if it were alone."""
    process, _ = halted.start(tmp_path / 'out')
    second = runs.finish(halted.launch(tmp_path / 'out'))
    halted.go.touch()
    assert runs.finish(process).code == 0
    runs.ends(second, [tmp_path / 'out/b', 'another program', '--out'])
    assert prepare(halted.raw, tmp_path / 'alone').code == 0
    assert files.contents(tmp_path / 'out') == files.contents(tmp_path / 'alone')

# --- the machine's limits ------------------------------------------------------------------------

def test_a_full_disk_ends_in_a_sentence_and_leaves_the_finished_sources(tmp_path):
    """No file may become larger than 100 kB; source a has 2 images of 12 kB, source b has 20."""
    resource = pytest.importorskip('resource')
    for source, count in ('a', 2), ('b', 20):
        for seed in range(count):
            image = files.texture(seed, channels=3)
            files.save(tmp_path / f'raw/Fundus/{source}/{seed}.png', image)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    out = tmp_path / 'out'
    words = '--raw', tmp_path / 'raw', '--out', out, '--size', SIZE, '--workers', 2
    result = runs.finish(runs.start('prepare_medverse', *words, preexec_fn=limit))
    runs.ends(result, [out, 'start again'])
    assert result.code == 1 and [path.name for path in out.iterdir()] == ['a']

def test_the_file_that_killed_a_worker_is_named(tmp_path, fake_program):
    """As the system does where memory runs out."""
    fake_program('ffmpeg', 'kill -9 $PPID')
    files.save(tmp_path / 'raw/Endoscope/a/0.png', files.texture(0))
    files.write(tmp_path / 'raw/Endoscope/a/x.mp4', 'video')
    runs.ends(prepare(tmp_path / 'raw', tmp_path / 'out'), ['killed', '--workers', 'a/x.mp4'])
    assert list((tmp_path / 'out').iterdir()) == []

def test_a_long_volume_does_not_wait_in_memory(tmp_path):
    """It leaves the worker slice by slice, and comes back so."""
    module = runs.module('prepare_medverse')
    noise = np.random.default_rng(0).integers(0, 256, (300, 16, 16), np.uint8)
    volume = files.save(tmp_path / 'long.npy', noise)
    tracemalloc.start()
    try:
        path = module.spill(tmp_path, module.source_items, volume, 'MR', 256, 8)
        size = path.stat().st_size
        pixels = sum(item.pixels.size for item in module.spilled_items(path))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 300 * 256 ** 2 and pixels == 300 * 256 ** 2
    assert most < 10 * 256 ** 2

# --- files that would stop it --------------------------------------------------------------------

def write_bomb(path, channels):
    """A PNG of few bytes whose header claims 60,000 x 60,000 pixels."""
    return files.png(path, files.ramp(0, 9, 'u2')[..., None].repeat(channels, 2), side=60000)

def test_a_picture_of_billions_of_pixels_is_dropped_and_told(tmp_path):
    files.save(tmp_path / 'raw/Photo/a/0.png', files.texture(0))
    write_bomb(tmp_path / 'raw/Photo/a/bomb.png', channels=1)
    assert prepare(tmp_path / 'raw', tmp_path / 'out').code == 0
    found = Prepared(tmp_path / 'out')
    row, = found.dropped('a')
    assert len(found.images('a')) == 1
    assert row['path'] == 'bomb.png' and '3600000000 pixels' in row['detail']

def test_a_mask_of_billions_of_pixels_is_refused_by_its_name(tmp_path):
    for number in range(2):
        files.save(tmp_path / f'raw/images/{number}.png', files.texture(number))
        files.save(tmp_path / f'raw/masks/{number}.png', files.blob())
    write_bomb(tmp_path / 'raw/masks/0.png', channels=4)
    result = prepare(tmp_path / 'raw', tmp_path / 'out', '--task', 'mini')
    runs.ends(result, ['masks/0.png', '3600000000 pixels'])
    assert not list(tmp_path.glob('out*'))

@pytest.mark.parametrize('program', ['ffmpeg', 'ffprobe', 'dcm2niix'])
def test_a_missing_program_stops_in_a_sentence_that_says_how_to_install_it(
        tmp_path, monkeypatch, fake_program, program):
    """Its source is not finished, and those before it stay."""
    monkeypatch.setenv('PATH', '/bin-without-anything')
    for source in 'ab':
        files.save(tmp_path / f'raw/CT/{source}/0.png', files.texture(0))
    if program == 'dcm2niix':
        files.dicom(tmp_path / 'raw/CT/b/x/0.dcm', files.ramp(-200, 400, 'i2'), 'CT')
    else:
        files.write(tmp_path / 'raw/CT/b/x.mp4', 'video')
    if program == 'ffprobe':
        fake_program('ffmpeg', 'exit 0')
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    runs.ends(result, [f"'{program}'", f'conda install {program}'])
    assert Prepared(tmp_path / 'out').names == ['a']

def test_a_full_temporary_disk_stops_although_dcm2niix_says_that_all_went_well(
        tmp_path, monkeypatch, fake_program):
    """Version 1.0.2022 does so, and writes an empty JSON."""
    fake_program('dcm2niix', 'exit 0')
    for source in 'ab':
        files.save(tmp_path / f'raw/CT/{source}/0.png', files.texture(0))
    files.dicom(tmp_path / 'raw/CT/b/x/0.dcm', files.ramp(-200, 400, 'i2'), 'CT')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=0))
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    runs.ends(result, ['No space left on device', 'start again'])
    assert Prepared(tmp_path / 'out').names == ['a']

def test_a_source_of_which_nothing_is_kept_is_not_finished(tmp_path):
    """It is left out by name with a reason; the others are prepared."""
    files.write(tmp_path / 'raw/Photo/a/x.png', 'no picture')
    files.save(tmp_path / 'raw/Photo/b/0.png', files.texture(0))
    result = prepare(tmp_path / 'raw', tmp_path / 'out')
    runs.ends(result, ['left out', 'a'])
    assert "Photo/a: no image is kept of 1 files; dropped: {'corrupt': 1" in result.out
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['b']
