"""Draw the idea of a Director-Experts module, idea.png beside this file.

    python .github/idea.py
"""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 445
SCALE = 2       # everything is drawn twice as large, then shrunk, so that lines are smooth
BLUE, RED, GREEN, GREY = (40, 90, 200), (200, 60, 50), (20, 125, 75), (110, 110, 110)
PALE_BLUE, PALE_RED, SILVER = (232, 238, 252), (252, 236, 234), (200, 200, 200)

picture = Image.new('RGB', (WIDTH * SCALE, HEIGHT * SCALE), 'white')
draw = ImageDraw.Draw(picture)

def scaled(*numbers):
    """The numbers in pixels of the large picture."""
    return [SCALE * number for number in numbers]

def text(x, y, words, colour='black', size=13, anchor='mm'):
    """Write words around a point, to the right of it ('lm') or to the left ('rm')."""
    font = ImageFont.load_default(size * SCALE)
    align = dict(l='left', m='center', r='right')[anchor[0]]
    draw.multiline_text(scaled(x, y), words, colour, font, anchor, align=align)

def box(x, y, width, height, words, edge=GREY, fill='white', size=13):
    """Draw a box with words in it."""
    corners = scaled(x, y, x + width, y + height)
    draw.rounded_rectangle(corners, 6 * SCALE, fill, edge, 2 * SCALE)
    text(x + width / 2, y + height / 2, words, 'black', size)

def segment(start, end, colour, dashed):
    """Draw a straight line, which runs across or down."""
    (a, b), (c, d) = start, end
    length = max(abs(c - a), abs(d - b))
    dashes = [(0, length)]
    if dashed:
        dashes = [(s, min(s + 5, length)) for s in range(0, int(length), 9)]
    for s, e in dashes:
        s, e = s / length, e / length
        line = scaled(a + (c - a) * s, b + (d - b) * s, a + (c - a) * e, b + (d - b) * e)
        draw.line(line, colour, 2 * SCALE)

def arrow(points, colour=GREY, dashed=False):
    """Draw a line through points, with a head at the last."""
    for start, end in zip(points, points[1:]):
        segment(start, end, colour, dashed)
    (a, b), (c, d) = points[-2:]
    length = ((c - a) ** 2 + (d - b) ** 2) ** 0.5
    u, v = (c - a) / length, (d - b) / length       # the direction of the line
    left = (c - 9 * u + 4 * v, d - 9 * v - 4 * u)
    right = (c - 9 * u - 4 * v, d - 9 * v + 4 * u)
    draw.polygon([tuple(scaled(*corner)) for corner in ((c, d), left, right)], colour)

def draw_input():
    """The tokens of an image, and the gate that looks at them."""
    box(14, 170, 104, 48, 'tokens of\none image')
    arrow([(66, 170), (66, 96), (140, 96)], BLUE)
    text(100, 84, 'class token', GREY, 12)
    box(140, 74, 110, 44, 'gate', BLUE, PALE_BLUE)
    text(195, 58, 'softmax, then the top K = 2', GREY, 12)
    arrow([(195, 148), (195, 118)], GREY, dashed=True)
    text(200, 167, 'noise, in training alone,\nfading to none', GREY, 12)

def draw_experts():
    """R experts, of which the gate activates K."""
    arrow([(118, 194), (310, 194)])
    for number in range(8):
        x, activated = 310 + 36 * number, number in (1, 4)
        edge, fill = (BLUE, PALE_BLUE) if activated else (SILVER, 'white')
        box(x, 174, 32, 40, str(number), edge, fill)
        if activated:
            arrow([(250, 96), (x + 16, 96), (x + 16, 174)], BLUE)
            text(x + 32, 140, '0.7' if number == 1 else '0.3', BLUE, 12)
    text(444, 272, 'R = 8 expert MLPs, all trained;\nan image activates K = 2', GREY, 12, 'rm')
    arrow([(598, 194), (650, 194)])
    box(650, 170, 130, 48, 'sum, weighted\nby the gate', BLUE, PALE_BLUE)
    arrow([(780, 194), (820, 194)])
    text(858, 194, 'next\nblock', GREY)

def draw_director():
    """The director, how the experts move it, and how its output pulls at theirs."""
    arrow([(66, 218), (66, 352), (310, 352)])
    box(310, 328, 284, 48, 'director MLP: gets no gradient', RED, PALE_RED)
    bracket = [(310, 220), (310, 230), (594, 230), (594, 220)]      # around all experts
    for start, end in zip(bracket, bracket[1:]):
        segment(start, end, RED, dashed=False)
    arrow([(452, 230), (452, 328)], RED, dashed=True)
    text(462, 272, 'GEMA, after each step:\nit moves a little towards the\nmean of all '
         'experts, weighted\nby how much each was used', RED, 12, 'lm')
    arrow([(594, 352), (650, 352)])
    box(650, 328, 130, 48, "director's output", RED, 'white')
    arrow([(715, 328), (715, 218)], GREEN, dashed=True)
    text(725, 272, 'alignment: cosine loss.\nThe sum of the experts is\npulled to where the '
         'director\npoints, harder in deep layers', GREEN, 12, 'lm')

text(14, 20, 'One Director-Experts (DEX) module. It replaces the MLP of a transformer block.',
     size=15, anchor='lm')
draw_input()
draw_experts()
draw_director()
text(14, 403, 'Experts specialise; noise and a balance loss keep them in use. '
     'The director carries what they have in common.', GREY, 12, 'lm')
text(14, 425, 'Fine-tuning takes gate and experts (DEX-E), or the director in their place: '
     'a plain vision transformer (DEX-D).', GREY, 12, 'lm')
small = picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
small.quantize(64).save(Path(__file__).with_name('idea.png'))
