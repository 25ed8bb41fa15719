"""Pictures read back: the tiles of a grid, and where in a panel a line is."""
import numpy as np
import torch
from PIL import Image

from tests.support import runs

def load(path):
    """A picture (H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert('RGB'))) / 255

def tiles_of(path, rows, height=96, width=96, heads=1):
    """The tiles (rows, columns, height, width, 3) of a grid whose columns have names of so many
    lines. Below may be a note, of any number of lines."""
    pictures, picture = runs.module('pictures'), load(path)
    gap, line, left = pictures.GAP, pictures.LINE, pictures.LEFT
    columns, aside = divmod(picture.shape[1] - left - gap, width + gap)
    below = picture.shape[0] - line * heads - rows * (height + gap) - gap
    assert aside == 0 and below >= 0 and below % line == 0, (
        f'{path}: no such tiles make {tuple(picture.shape)}')
    tiles = torch.zeros(rows, columns, height, width, 3)
    for r in range(rows):
        for c in range(columns):
            y, x = line * heads + gap + r * (height + gap), left + gap + c * (width + gap)
            tiles[r, c] = picture[y:y + height, x:x + width]
    return tiles

def drawn_in(path, colour=(65, 105, 225), number=0):
    """Where a colour (royalblue, that of the first line) is in panel `number` of a row of panels:
    points (n, 2), from (0, 0) where the axes meet to (1, 1) at their ends. The legend is left
    out."""
    pictures = runs.module('pictures')
    picture = np.asarray(Image.open(path).convert('RGB')).astype(int)
    left, bottom = pictures.CORNER
    left += number * pictures.PANEL[0]
    width, height = pictures.AXES
    y, x = (picture == colour).all(2).nonzero()
    inside = (x >= left - 5) & (x <= left + width + 5) & (y <= bottom + 5)
    return np.stack([(x[inside] - left) / width, (bottom - y[inside]) / height], 1)
