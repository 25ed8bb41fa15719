"""Films, files of labels, frames and outlines become files that the preparation reads. What comes of
the tasks that need it is among the tests of medverse."""
import numpy as np
from PIL import Image, ImageDraw

from tests.support import files, folders, runs
from tests.support.folders import SIDE, refused, task, write_animals

def convert(folder, *words):
    """Convert folder/raw, which must succeed."""
    result = runs.program('convert', words[0], folder / 'raw', *words[1:])
    assert result.code == 0, result.err

def test_a_film_of_jsrt_becomes_a_picture_of_half_its_side(tmp_path):
    """12 bits in big-endian 16, high values dark."""
    film = np.uint16(files.texture(2, 2048, 2048)) * 16
    film[:2] = [[5000] * 2048, [4000] * 2048]     # some films hold more than 12 bits
    files.write(tmp_path / 'raw/All247images/JPCLN001.IMG', film.astype('>u2').tobytes())
    convert(tmp_path, 'scr')
    pixels = np.asarray(Image.open(tmp_path / 'raw/All247images/JPCLN001.png'))
    halved = film.reshape(1024, 2, 1024, 2).mean((1, 3))
    assert pixels.dtype == np.uint8 and pixels.shape == (1024, 1024)
    assert np.abs(pixels - 255 * (1 - halved.clip(0, 4095) / 4095)).max() <= 0.51

def test_the_darkest_of_the_frames_of_a_sequence_counts_pixel_by_pixel(tmp_path):
    for number in range(2):
        for frame in range(3):
            picture = files.noise(10 * number + frame)
            files.save(tmp_path / f'raw/series/{number}_{frame}.png', picture)
        files.save(tmp_path / f'raw/masks/{number}.png', folders.BLOB)
    convert(tmp_path, 'dsca', r'series/(\d)_')
    found = task(tmp_path, '--images', 'darkest/(.*)', '--masks', 'masks/(.*)')
    assert sorted(found.image) == ['darkest/0.png', 'darkest/1.png']
    for path, image in found.image.items():
        number = int(path[len('darkest/')])
        darkest = np.min([files.noise(10 * number + frame) for frame in range(3)], axis=0)
        assert np.array_equal(image[..., 0], darkest)

def test_an_outline_is_filled(tmp_path):
    right = {}
    for number in range(4):
        box = 7 + number, 12, 30 + 4 * number, 35
        outline, inside = (Image.new('L', (SIDE, SIDE)) for _ in range(2))
        ImageDraw.Draw(outline).ellipse(box, outline=255)
        ImageDraw.Draw(inside).ellipse(box, fill=1, outline=1)
        files.save(tmp_path / f'raw/images/{number}.png', files.noise(number))
        files.save(tmp_path / f'raw/outlines/{number}.png', np.asarray(outline))
        right[f'images/{number}.png'] = np.asarray(inside)
    convert(tmp_path, 'outline', 'outlines/')
    rules = '--images', 'images/(.*)', '--masks', 'filled/outlines/(.*)'
    found = task(tmp_path, *rules, '--values', '0', '255')
    assert found.answer.keys() == right.keys()
    for path, mask in found.answer.items():
        assert np.array_equal(mask, right[path])

def test_an_outline_that_exif_turns_is_filled_and_still_refused_as_a_mask(tmp_path):
    for number in range(2):
        files.save(tmp_path / f'raw/images/{number}.png', files.noise(number))
        outline = Image.new('L', (SIDE, SIDE))
        ImageDraw.Draw(outline).ellipse((7, 12, 30, 35), outline=255)
        files.save(tmp_path / f'raw/outlines/{number}.png', np.asarray(outline),
                   exif=files.turned(3))
    convert(tmp_path, 'outline', 'outlines/')
    rules = '--images', 'images/(.*)', '--masks', 'filled/outlines/(.*)', '--values', '0', '255'
    refused(tmp_path, *rules, naming=['filled/outlines/', 'EXIF turns'])

def test_a_file_without_a_label_is_named(tmp_path):
    write_animals(tmp_path, below='images', kinds=['cat'])
    for number in range(3):
        files.write(tmp_path / f'raw/labels/{number}.txt')
    runs.ends(runs.program('convert', 'slsc-c', tmp_path / 'raw'), ['labels/0.txt', 'no label'])

def test_a_name_or_a_folder_that_is_not_known_is_named(tmp_path):
    (tmp_path / 'raw').mkdir()
    runs.ends(runs.program('convert', 'fives', tmp_path / 'raw'), ['fives', 'is none of', 'tn5000'])
    runs.ends(runs.program('convert', 'scr', tmp_path / 'raw'), [tmp_path / 'raw', 'scr'])

