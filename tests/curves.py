"""Draw a run's curves from its log.jsonl, so that nobody needs to parse it: python tests/curves.py out/demo"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = 'royalblue darkorange seagreen crimson purple sienna deeppink gray olive teal black gold'.split()
CURVES = {      # of log.jsonl: the title of a panel, the name of the line
    'mae': ('error of hidden patches', 'training'),
    'val_mae': ('error of hidden patches', 'validation'),
    'co': ('alignment loss', 'training'),
    'bal': ('balance loss', 'training'),
    'bits': ('modality in first expert, bits', 'layer {}'),
    'modality_share': ('modality in features', 'layer {}'),
}

def draw_lines(path, panels):
    """Panels {title: {name of a line: [(x, y), ...]}} side by side, each from its least to its greatest numbers."""
    picture = Image.new('RGB', (330 * len(panels), 220), 'white')
    draw = ImageDraw.Draw(picture)
    for number, (title, lines) in enumerate(panels.items()):
        points = np.concatenate(list(lines.values()))       # (points, 2)
        low, span = points.min(0), np.ptp(points, 0) + 1e-9
        corner, size = (330 * number + 55, 190), (190, -150)
        draw.text((corner[0], 12), title, 'black')
        for share in (0, 1):
            x, y = low + share * span
            draw.text((corner[0] + 190 * share, 194), f'{x:.4g}', 'gray', anchor='ma')
            draw.text((corner[0] - 6, 190 - 150 * share), f'{y:.3g}', 'gray', anchor='rm')
        for row, (colour, (name, line)) in enumerate(zip(COLOURS, lines.items())):
            places = corner + size * (np.array(line) - low) / span
            draw.line([tuple(place) for place in places], colour, 2)
            draw.text((corner[0] + 198, 40 + 14 * row), name, colour)
    picture.save(path)

def draw_curves(path, entries):
    """Losses, bits and modality shares against the step, from the objects of log.jsonl."""
    panels = {}
    for entry in entries:
        for name, (title, line) in CURVES.items():
            values = entry.get(name)
            for layer, value in enumerate(values if isinstance(values, list) else [values], 1):
                if value is not None:       # not looked at in this step, or not finite
                    points = panels.setdefault(title, {}).setdefault(line.format(layer), [])
                    points.append((entry['step'] + 1, value))
    draw_lines(path, panels)

if __name__ == '__main__':
    for folder in map(Path, sys.argv[1:]):
        draw_curves(folder / 'curves.png', [json.loads(line) for line in open(folder / 'log.jsonl')])
