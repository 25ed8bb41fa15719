"""Draw the idea of a Director-Experts module, .github/idea.png: python tests/idea.py"""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2       # drawn twice as large, then shrunk: smooth lines
BLUE, RED, GREY, PALE = (40, 90, 200), (200, 60, 50), (110, 110, 110), (232, 238, 252)
picture = Image.new('RGB', (900 * SCALE, 330 * SCALE), 'white')
draw = ImageDraw.Draw(picture)

def text(x, y, words, colour='black', size=13, anchor='mm'):
    draw.multiline_text((x * SCALE, y * SCALE), words, colour, ImageFont.load_default(size * SCALE), anchor, align='center')

def box(x, y, w, h, words, edge=GREY, fill='white', size=13):
    draw.rounded_rectangle([SCALE * v for v in (x, y, x + w, y + h)], 6 * SCALE, fill, edge, 2 * SCALE)
    text(x + w / 2, y + h / 2, words, 'black', size)

def arrow(points, colour=GREY, dashed=False):
    """A line through points, with a head at the last."""
    for (a, b), (c, d) in zip(points, points[1:]):
        length = max(abs(c - a), abs(d - b))
        steps = range(0, int(length), 9) if dashed else (0,)
        for s in steps:
            e = min(s + 5, length) if dashed else length
            ends = [a + (c - a) * s / length, b + (d - b) * s / length, a + (c - a) * e / length, b + (d - b) * e / length]
            draw.line([SCALE * v for v in ends], colour, 2 * SCALE)
    (a, b), (c, d) = points[-2:]
    length = ((c - a) ** 2 + (d - b) ** 2) ** 0.5
    u, v = (c - a) / length, (d - b) / length
    head = [(c, d), (c - 9 * u + 4 * v, d - 9 * v - 4 * u), (c - 9 * u - 4 * v, d - 9 * v + 4 * u)]
    draw.polygon([(SCALE * p, SCALE * q) for p, q in head], colour)

text(14, 16, 'One Director-Experts module, in place of the MLP of a transformer block', size=15, anchor='lm')
box(14, 130, 96, 44, 'tokens of\none image')
arrow([(62, 130), (62, 82), (130, 82)], BLUE)
box(130, 62, 104, 40, 'gate', BLUE, PALE)
text(182, 48, 'looks at the class token', GREY, 11)
arrow([(110, 152), (290, 152)])
for number in range(8):
    used = number in (1, 4)
    x = 290 + 36 * number
    box(x, 132, 32, 40, str(number), BLUE if used else (200, 200, 200), PALE if used else 'white')
    if used:
        arrow([(234, 82), (x + 16, 82), (x + 16, 132)], BLUE)
        text(x + 30, 108, '0.7' if number == 1 else '0.3', BLUE, 11)
text(434, 186, '8 expert MLPs, of which the image uses 2; their outputs are mixed by the gate', GREY, 11)
arrow([(578, 152), (640, 152)])
box(640, 130, 110, 44, 'mixed output', BLUE, PALE)
arrow([(750, 152), (800, 152)])
text(845, 152, 'next block', GREY)
arrow([(62, 174), (62, 272), (290, 272)])
box(290, 250, 284, 44, 'director MLP: gets no gradient', RED, (252, 236, 234))
arrow([(434, 196), (434, 250)], RED, True)
text(442, 222, 'GEMA: after each step it moves towards the\nexperts, by how much each was used', RED, 11, 'lm')
arrow([(574, 272), (718, 272)], RED)
text(646, 286, 'its output', GREY, 11)
arrow([(718, 272), (718, 174)], RED, True)
text(728, 232, 'alignment loss: the\nmixed output should\npoint the same way,\nmore so in deep layers', RED, 11, 'lm')
text(14, 316, 'Experts specialise (balance loss and noise keep all in use); the director carries what they have in common.',
     GREY, 12, 'lm')
picture.resize((900, 330), Image.Resampling.LANCZOS).quantize(64).save(Path(__file__).parents[1] / '.github' / 'idea.png')
