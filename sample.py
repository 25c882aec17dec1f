"""Look at what a trained model sees and reads, in the terminal and in a picture.

    python sample.py --phase=3                       # test canvases, figures, and out/phase3/sample.png
    python sample.py --phase=3 --mistakes            # only what it reads wrong, worst first
    python sample.py --phase=3 --canvas_size=128 --max_digits=16      # larger canvases than it was trained on
    python sample.py --phase=3 --attention           # where it looked for each digit: out/phase3/attention.png
    python sample.py --phase=3 --image page.png --digit_height=60     # your own pictures: out/phase3/image.png
    python sample.py --curves --out_dir out/a out/b  # how runs went: out/a/curves.png (needs matplotlib)
"""
import argparse
import io
import itertools
import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from vit import ViT

MOST_PIXELS = 64_000_000    # of a picture that is read
LONGEST_SIDE = 1024         # px, of a canvas that is read in a picture
MOST_PATCHES = 16_384       # of a canvas: attention's cost grows with the square of them, a window's mask takes 1 GB
MOST_GAZED = 4096           # patches of a canvas whose attention is shown: its maps take 2 GB
TILE = 256                  # px, about the side of a canvas in a picture
GREEN, RED, WHITE = (90, 220, 110), (255, 95, 85), (255, 255, 255)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, default=3, help="whose checkpoint to take, out/phase<phase> (default: 3)")
    parser.add_argument("--out_dir", nargs="+", help="the folder of ckpt.pt, in place of out/phase<phase>; several with --curves")
    parser.add_argument("--data_dir", help="folder of the digits' files (default: that of the run)")
    parser.add_argument("--canvas_size", type=int, help="px, side of the test canvases (default: that of the run)")
    parser.add_argument("--max_digits", type=int, help="phase 3: most digits on a test canvas (default: that of the run)")
    parser.add_argument("--min_distance", type=int, help="px, phase 3: between digits' centres (default: that of the run)")
    parser.add_argument("--test_canvases", type=int, help="how many to read (default: 10,000, or in phase 1 each test digit once)")
    parser.add_argument("--start", type=int, default=0, help="the first test canvas to show (default: 0)")
    parser.add_argument("--count", type=int, help="how many to show (default: 4 in the terminal, 16 in the picture)")
    parser.add_argument("--mistakes", action="store_true", help="show only canvases with mistakes, worst first")
    parser.add_argument("--attention", action="store_true", help="show where the cell of each digit looked, in attention.png")
    parser.add_argument("--curves", action="store_true", help="draw metrics.jsonl into curves.png, with matplotlib")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="read these: .npy and .pgm, others through Pillow")
    parser.add_argument("--digit_height", type=float, help="px, height of the digits in --image, where they are found anywhere "
                        "(default: 20, MNIST's)")
    return parser.parse_args(arguments)


def load(path):
    """The model of a checkpoint, and what the checkpoint says of its phase, its canvases, the kind of its digits and
    their folder."""
    if not path.exists():
        raise OSError(f"there is no checkpoint {path}: train one with train.py")
    model = ViT.load(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    try:
        phase, canvas, kind = checkpoint["phase"], checkpoint["canvas"], checkpoint["data"]
        folder = checkpoint["settings"]["data_dir"]
        fits = model.config.cell == data.PHASES[phase].cell and canvas["size"] in (None, model.config.image_size) and \
            model.config.num_classes == canvas["classes"] + data.has_empty_cells(phase) and kind in data.KINDS and \
            canvas.keys() == {"size", "max_digits", "min_distance", "classes"} and isinstance(folder, str)
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is not a checkpoint of train.py: what it says of its canvases does not fit its model")
    return model, phase, canvas, kind, folder


@torch.no_grad()
def logits_of(model, canvases):
    patches = canvases[0].numel() // model.config.patch_size**2
    if patches > MOST_PATCHES:
        raise ValueError(f"a canvas of {canvases.shape[2]} x {canvases.shape[1]} px has {patches:,} patches, "
                         f"at most {MOST_PATCHES:,} will do")
    return torch.cat([model(data.to_input(batch)) for batch in canvases.split(data.at_once(canvases))])


def compare(reading, truth, empty):
    """(row, column, digit there or None, digit read or None, confidence) for each cell that has one or the other.

    truth: (gh, gw) cell labels, or None where nobody knows: then what is read passes for what is there.
    """
    read = {(row, column): (digit, confidence) for digit, row, column, confidence in reading}
    if truth is None:
        there = {place: digit for place, (digit, _) in read.items()}
    else:
        there = {(row, column): digit for row, line in enumerate(truth.tolist()) for column, digit in enumerate(line)
                 if digit != empty}
    return [(*place, there.get(place), *read.get(place, (None, None))) for place in sorted(read.keys() | there.keys())]


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal


def draw(canvas, colour):
    """A canvas, uint8 (H, W), as lines of text in a frame: two pixels a character, the upper in front of the lower."""
    lines = ["┌" + "─" * canvas.shape[1] + "┐"]
    canvas = F.pad(canvas, (0, 0, 0, canvas.shape[0] % 2))                  # an odd last row in front of paper
    for upper, lower in zip(canvas[0::2].tolist(), canvas[1::2].tolist()):
        if colour:
            ink = "".join(f"\033[38;2;{u};{u};{u}m\033[48;2;{v};{v};{v}m▀" for u, v in zip(upper, lower)) + "\033[0m"
        else:
            ink = "".join(" ▄▀█"[2 * (u > 100) + (v > 100)] for u, v in zip(upper, lower))
        lines.append(f"│{ink}│")
    return lines + ["└" + "─" * canvas.shape[1] + "┘"]


def describe(findings, known, colour):
    """A line for each finding of `compare`: place, truth where it is known, reading, confidence."""
    lines = []
    for row, column, there, digit, confidence in findings:
        line = f"  row {row} column {column}: " + (f"{'nothing' if there is None else there}, read as " if known else "")
        line += "nothing" if digit is None else f"{digit} ({100 * confidence:.1f}%)"
        if there != digit:
            line = f"\033[1;31m{line}   <-- wrong\033[0m" if colour else f"{line}   <-- wrong"
        lines.append(line)
    return lines or ["  nothing there, nothing read" if known else "  nothing"]


def found_nearby(truth, best, empty):
    """How many digits are found and read: pairs of one that is there and one that is read, alike, in the same cell or one
    that touches it. Each is in one pair at most; the nearest pair first. truth, best: (n, gh, gw) labels of cells."""
    there, read, pairs = F.pad(truth, [1] * 4, value=empty), F.pad(best, [1] * 4, value=empty), 0
    for step in sorted(itertools.product((-1, 0, 1), repeat=2), key=lambda step: step[0]**2 + step[1]**2):
        pair = (there != empty) & (there == read.roll(step, (1, 2)))        # what rolls around is the edge, which is empty
        pairs += pair.sum().item()
        there = there.masked_fill(pair, empty)
        read = read.masked_fill(pair.roll((-step[0], -step[1]), (1, 2)), empty)
    return pairs


def figures(truth, best, classes, mark=""):
    """Confusion matrix, precision and recall, accuracy by number of digits: lines of at most 80 columns.

    truth, best: (n, gh, gw) labels of cells and the model's; classes: how many are digits, the next one is "empty"; mark:
    what is to be said of the digits.
    """
    size = max(truth.max().item(), best.max().item(), classes - 1) + 1      # with "empty", where there is such a thing
    confusion = torch.bincount((truth * size + best).flatten(), minlength=size * size).view(size, size)
    right, there, read = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    names = [str(i) for i in range(classes)] + ["empty"] * (size > classes)

    def count(n):  # in 5 columns
        return "." if n == 0 else f"{n}" if n < 10_000 else f"{n / 1000:.0f}k"

    def share(part, whole):
        return f"{100 * part / whole:.2f}%" if whole else "-"

    lines = ["", f"Cells{mark}" + ": what is there (rows) and what is read (columns)" * (size <= 11)]
    columns = range(size) if size <= 11 else []                             # more do not fit
    wide = [6 if j >= classes else 5 for j in columns]                      # 80 columns with the other three
    lines.append(" " * 5 + "".join(f"{names[j]:>{wide[j]}}" for j in columns) + "   recall precision")
    for i in range(size):
        cells = "".join(f"{count(confusion[i, j].item()):>{wide[j]}}" for j in columns)
        recall, precision = share(right[i].item(), there[i].item()), share(right[i].item(), read[i].item())
        lines.append(f"{names[i]:>5}{cells}{recall:>9}{precision:>10}")
    digit = truth < classes
    number, exact = digit.flatten(1).sum(1), (truth == best).flatten(1).all(1)
    lines += ["", f"{'digits on a canvas':>18}{'canvases':>10}{'all right':>11}{'digits right':>14}"]
    for n in number.unique().tolist():
        of = number == n
        lines.append(f"{n:>18}{of.sum().item():>10,}{share(exact[of].sum().item(), of.sum().item()):>11}"
                     f"{share((digit & (truth == best))[of].sum().item(), digit[of].sum().item()):>14}")
    if size > classes:
        pairs, digits_there, digits_read = found_nearby(truth, best, classes), digit.sum().item(), (best < classes).sum().item()
        lines += ["", f"Digits, at most one cell off: recall {share(pairs, digits_there)}, precision {share(pairs, digits_read)}, "
                  f"F1 {share(2 * pairs, digits_there + digits_read)}"]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# In a picture: uint8 (height, width, 3)

FONT = {letter: [int(row) for row in rows] for letter, rows in (glyph.split("=") for glyph in (  # 3 x 5 px, a digit a row
    "0=75557 1=26227 2=71747 3=71717 4=55711 5=74717 6=74757 7=71122 8=75757 9=75717 A=25755 B=65656 C=34443 D=65556 "
    "E=74647 F=74644 G=34553 H=55755 I=72227 J=11152 K=55655 L=44447 M=57755 N=65555 O=25552 P=65644 Q=25573 R=65655 "
    "S=34216 T=72222 U=55557 V=55552 W=55775 X=55255 Y=55222 Z=71247 .=00002 :=02020 -=00700 _=00007 ?=71302").split())}


def write(picture, top, left, words, colour, scale=2):
    """Words into a picture, in letters of 3 x 5 px times scale, on a dark ground; moved to where they fit."""
    height, width = 7 * scale, scale * (4 * len(words) + 1)
    top, left = max(0, min(top, picture.shape[0] - height)), max(0, min(left, picture.shape[1] - width))
    picture[top:top + height, left:left + width] = 24
    for i, letter in enumerate(words.upper()):
        bits = np.array([[row >> 2 & 1, row >> 1 & 1, row & 1] for row in FONT.get(letter, [0] * 5)], dtype=bool)
        glyph = picture[top + scale:, left + scale * (4 * i + 1):][:5 * scale, :3 * scale]
        bits = bits.repeat(scale, 0).repeat(scale, 1)[:glyph.shape[0], :glyph.shape[1]]     # a picture may be too low for it
        glyph[bits] = colour


def outline(picture, top, left, side, colour, dashed):
    """A square frame 2 px wide, dashed where something is wrong with what is in it."""
    line = (np.arange(side) // 4 % 2 == 0) if dashed else np.ones(side, dtype=bool)
    square = picture[top:top + side, left:left + side]
    for edge in (square[:, :2], square[:, -2:], square.swapaxes(0, 1)[:, :2], square.swapaxes(0, 1)[:, -2:]):
        edge[line] = colour


def tile(canvas, findings, cell, caption, heat=None):
    """A canvas enlarged, the cell of each finding framed and marked with what is read there; below, in words, a caption
    and each mistake. heat: float (rows, columns) from 0 to 1, laid over it in orange."""
    scale = max(1, TILE // max(canvas.shape))
    picture = np.repeat(canvas.numpy().repeat(scale, 0).repeat(scale, 1)[:, :, None], 3, axis=2)
    if heat is not None:
        warm = F.interpolate(heat[None, None], picture.shape[:2], mode="bilinear")[0, 0, :, :, None].numpy()
        picture = ((1 - 0.6 * warm) * picture + 0.6 * warm * np.array([255, 140, 0])).astype(np.uint8)
    side, mistakes = cell * scale, []
    for row, column, there, digit, _ in findings:
        wrong = there != digit
        outline(picture, row * side, column * side, side, RED if wrong else GREEN, wrong)
        beside = side + 2 if side < 64 and not wrong and (column + 1) * side + 16 < picture.shape[1] else 4
        write(picture, row * side + 4, column * side + beside, "-" if digit is None else str(digit), RED if wrong else GREEN)
        if wrong:
            was, reading = ("empty" if label is None else label for label in (there, digit))
            mistakes.append(f"row {row} column {column}: {was} read as {reading}")
    lines = [caption] + mistakes
    height, width = picture.shape[0] + 14 * len(lines) + 10, max(picture.shape[1], 10 + 8 * max(map(len, lines)))
    whole = np.full((height, width, 3), 24, dtype=np.uint8)
    whole[:picture.shape[0], :picture.shape[1]] = picture
    for i, line in enumerate(lines):
        write(whole, picture.shape[0] + 5 + 14 * i, 0, line, RED if i else WHITE)
    return whole


def verdict(findings, known):
    mistakes = sum(there != digit for _, _, there, digit, _ in findings)
    if not known:
        return f"{len(findings)} read"
    return f"{mistakes} wrong" if mistakes else "all right" if findings else "nothing there"


def sheet(rows):
    """Rows of tiles -> one picture."""
    height = max(tile.shape[0] for row in rows for tile in row) + 8
    width = max(tile.shape[1] for row in rows for tile in row) + 8
    picture = np.full((height * len(rows) + 8, width * max(map(len, rows)) + 8, 3), 60, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            picture[8 + i * height:, 8 + j * width:][:one.shape[0], :one.shape[1]] = one
    return picture


def save_png(path, picture):
    """uint8 (H, W, 3) -> a PNG file (W3C PNG specification, colour type 2, filter 0)."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    height, width = picture.shape[:2]
    lines = np.concatenate((np.zeros((height, 1), np.uint8), picture.reshape(height, -1)), axis=1)
    data.write_whole(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b""))
    print(f"wrote {path}")


@torch.no_grad()
def gaze(model, canvas):
    """Where each cell looked, from 0 to 1: (gh, gw, rows, columns of patches). Attention rollout (Abnar 2020,
    arXiv:2005.00928): the maps of all blocks multiplied, half of every one passed by on the residual stream."""
    patch, cell = model.config.patch_size, model.config.cell
    if canvas.numel() > MOST_GAZED * patch**2:
        raise ValueError(f"--attention is for canvases of up to {MOST_GAZED:,} patches, this is one of {tuple(canvas.shape)} px")
    maps = model.attention_maps(data.to_input(canvas[None]))[:, 0].mean(1)  # (depth, N, N), the mean over heads
    flow = torch.eye(maps.shape[-1])
    for block in maps:
        flow = (block + torch.eye(len(flow))) / 2 @ flow
    rows, columns, k = canvas.shape[0] // patch, canvas.shape[1] // patch, cell // patch
    flow = flow.view(rows // k, k, columns // k, k, rows, columns).mean((1, 3))
    return flow / flow.amax((2, 3), keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Your own pictures


def load_picture(path):
    """A file -> float tensor (H, W), 0 black to 1 white. Raises ValueError for what is no picture or too large."""
    def check(height, width):
        if not 0 < height * width <= MOST_PIXELS:
            raise ValueError(f"it has {width:,} x {height:,} px, allowed are 1 to {MOST_PIXELS:,} in all")

    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.dtype.kind not in "buif":
                raise ValueError("expected numbers (H, W), (H, W, 3) or (H, W, 4)")
            check(*array.shape[:2])
        elif path.suffix.lower() == ".pgm":
            with open(path, "rb") as file:
                header = re.match(rb"P([25])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s", file.read(65536))
                if not header:
                    raise ValueError("it does not begin like a PGM file, P5 or P2")
                width, height, most = (int(n) for n in header.groups()[1:])
                check(height, width)
                file.seek(header.end())
                kind = np.dtype(">u2" if most > 255 else "u1")
                array = np.frombuffer(file.read(height * width * kind.itemsize), kind) if header[1] == b"5" else \
                    np.array(file.read(8 * height * width + 65536).split()[:height * width], dtype=np.int64)
                array = array.reshape(height, width) / max(most, 1)
        else:
            try:
                from PIL import Image, ImageOps
            except ImportError:
                raise ValueError("only .npy and .pgm are read without Pillow: pip install pillow") from None
            Image.MAX_IMAGE_PIXELS = None                                   # `check` has its say before pixels are read
            with Image.open(path) as image:
                check(image.height, image.width)
                image = ImageOps.exif_transpose(image)
                array = np.asarray(image if image.mode[0] in "IF" else image.convert("RGBA"))
        return grey(torch.from_numpy(np.array(array, dtype=np.float32)), array.dtype)
    except MemoryError:
        raise ValueError(f"{path} cannot be read: it takes more memory than there is") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # each format has many kinds of them for a broken file
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def grey(pixels, dtype):
    """float (H, W) or (H, W, channels) of a NumPy dtype -> (H, W) from 0 to 1: colour by its luma (ITU-R BT.601), what is
    transparent on white, or on black where what is drawn is light."""
    if not pixels.isfinite().all():
        raise ValueError("some of its values are not finite")
    if dtype in (np.uint8, np.uint16):                                      # 1, 8, 12 or 16 bits in use
        most = int(pixels.max())
        pixels = pixels / (255 if dtype == np.uint8 and most > 1 else max(2 ** most.bit_length() - 1, 1))
    elif pixels.max() > 1 or pixels.min() < 0:                              # other numbers: the darkest 0, the lightest 1
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-9)
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] not in (1, 3, 4):
        raise ValueError(f"expected (H, W, 1, 3 or 4 channels), not {tuple(pixels.shape)}")
    if pixels.shape[2] == 1:
        return pixels[:, :, 0]
    luma = pixels[:, :, :3] @ torch.tensor([0.299, 0.587, 0.114])
    if pixels.shape[2] == 3:
        return luma
    alpha = pixels[:, :, 3]
    ground = 0.0 if alpha.min() < 1 and (luma * alpha).sum() > 0.5 * alpha.sum() else 1.0
    return luma * alpha + ground * (1 - alpha)


def resize(picture, height, width):
    return F.interpolate(picture[None, None], (height, width), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def ink_of(picture):
    """float (H, W) -> ink from 0 to 1, whichever of ink and paper is darker, whatever the light on the paper."""
    middle = picture.median()
    if (picture - middle).clamp(min=0).square().sum() < (middle - picture).clamp(min=0).square().sum():
        picture = 1 - picture                                               # dark ink: now it is light
    # Paper around each place: what is dark among the means of 7 x 7 blocks of 8 px
    coarse = resize(picture, *(-(-side // 8) for side in picture.shape))
    around = F.unfold(F.pad(coarse[None, None], [3] * 4, mode="replicate"), 7).quantile(0.2, dim=1).view_as(coarse)
    difference = picture - resize(around, *picture.shape)
    noise = 1.4826 * difference.abs().median()
    full = difference.flatten().topk(min(20, difference.numel())).values.mean()     # fully inked pixels, a few at least
    if full < max(0.1, 5 * noise):                                          # nothing but paper
        return torch.zeros_like(picture)
    low = min(4 * noise / full, 0.5)                                        # noise is no ink
    return ((difference / full - low) / (1 - low)).clamp(0, 1)


def without_specks(ink):
    """Ink, float (H, W), without pieces of less than a tenth of the largest one."""
    there = ink > 0.05
    label = torch.arange(1.0, ink.numel() + 1).view_as(ink) * there
    while True:                                                             # the largest number in a piece spreads over it
        spread = F.max_pool2d(label[None, None], 3, stride=1, padding=1)[0, 0] * there
        if torch.equal(spread, label):
            break
        label = spread
    mass = torch.bincount(label.long().flatten(), ink.flatten())
    mass[0] = 0
    return ink * (mass >= mass.max() / 10)[label.long()] * there


def with_margins(picture):
    """float (H, W) -> about (2 H, 2 W): in even light, and with paper around it.

    How the light changes is a plane fitted to the edges, most of which is paper: with the least sum of absolute differences,
    which ink disturbs little, by weighted least squares."""
    row, column = (torch.linspace(-1, 1, side) for side in picture.shape)
    terms = torch.stack(torch.broadcast_tensors(torch.ones(()), row[:, None], column), dim=-1)      # (H, W, 3)
    edge = torch.ones_like(picture, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    known, light = terms[edge], picture[edge]                               # (E, 3), (E,)
    weight = torch.ones_like(light)
    for _ in range(20):
        plane = torch.linalg.lstsq(known * weight[:, None], light * weight).solution
        weight = (light - known @ plane).abs().clamp(min=1e-3).rsqrt()
    height, width = (side // 2 for side in picture.shape)
    return F.pad(picture - terms[..., 1:] @ plane[1:], (width, width, height, height), value=plane[0].item())


def as_mnist(picture):
    """One digit, float (H, W) -> uint8 (28, 28) as MNIST has them: ink fitted to 20 x 20 px, its mass in the middle."""
    scale = min(1, 200 / max(picture.shape))
    picture = resize(picture, *(max(1, round(side * scale)) for side in picture.shape))
    ink = without_specks(ink_of(with_margins(picture)))                     # where it is cut close, there is little paper
    rows, columns = (ink > 0.3).any(1).nonzero(), (ink > 0.3).any(0).nonzero()
    if not len(rows):
        raise ValueError("no ink was found where a digit should be")
    ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = resize(ink, height, width)
    ink /= ink.max()
    top, left = (round(data.FRAME / 2 - ((torch.arange(len(mass)) + 0.5) * mass).sum().item() / mass.sum().item())
                 for mass in (ink.sum(1), ink.sum(0)))
    top, left = max(0, min(top, data.FRAME - height)), max(0, min(left, data.FRAME - width))
    frame = torch.zeros(data.FRAME, data.FRAME)
    frame[top:top + height, left:left + width] = ink
    return (255 * frame).round().byte()


def as_canvas(picture, phase, size, digit_height):
    """A picture, float (H, W) -> a uint8 canvas of a phase. Where every cell holds a digit, the picture is cut into the
    grid of a canvas of `size` px; elsewhere any size will do, filled up with paper to whole cells."""
    cell = data.PHASES[phase].cell
    if not data.has_empty_cells(phase):
        grid = size // cell
        if min(picture.shape) < grid:
            raise ValueError(f"it is too small for a grid of {grid} x {grid} digits")
        return torch.cat([torch.cat([as_mnist(part) for part in band.tensor_split(grid, dim=1)], dim=1)
                          for band in picture.tensor_split(grid)])
    scale = 20 / (digit_height or 20)
    height, width = (max(1, round(side * scale)) for side in picture.shape)
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"it makes a canvas of {width} x {height} px, at most {LONGEST_SIDE} will do: give the height of its "
                         f"digits as --digit_height, or cut it")
    ink = ink_of(resize(picture, height, width))
    return (255 * F.pad(ink, (0, -width % cell, 0, -height % cell))).round().byte()


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def curves(folders):
    """Draw the metrics of runs over each other, by steps and by seconds, into curves.png of the first."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--curves needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(12, 11), layout="constrained")
    panels = figure.subplots(3, 2, sharex="col", sharey="row")
    for number, folder in enumerate(folders):
        path = Path(folder) / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            training, evaluations = ([line for line in lines if line["event"] == event] for event in ("train", "eval"))
            if not training:
                raise ValueError("nothing was logged yet")
            name = f"{folder} (drawn digits)" if any("drawn" in line["data"] for line in evaluations) else folder
            for axis, column in (("step", 0), ("seconds", 1)):
                for row, key in ((0, "loss"), (1, "lr")):
                    panels[row, column].plot([line[axis] for line in training], [line[key] for line in training],
                                             color=f"C{number}", linewidth=1, label=f"{name}, training")
                panels[0, column].plot([line[axis] for line in evaluations], [line["loss"] for line in evaluations], "o--",
                                       color=f"C{number}", label=f"{name}, evaluation")
                for key, style in (("digit_accuracy", "o-"), ("exact_match", "s--")):
                    shares = np.array([line[key] for line in evaluations], dtype=float)     # None, where there are no digits: NaN
                    panels[2, column].plot([line[axis] for line in evaluations], 100 * shares, style, color=f"C{number}",
                                           label=f"{name}, {key.replace('_', ' ')}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a metrics file of train.py: {type(error).__name__}: {error}") from None
    for row, title in enumerate(("cross entropy of cells", "learning rate", "accuracy, %")):
        panels[row, 0].set_ylabel(title)
        for panel in panels[row]:
            panel.set_yscale("linear" if row else "log")
            panel.grid(alpha=0.3)
    panels[2, 0].set_xlabel("step")
    panels[2, 1].set_xlabel("seconds, evaluation included")
    for row in (0, 2):
        panels[row, 0].legend(fontsize=8)
    path = Path(folders[0]) / "curves.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    data.write_whole(path, picture.getbuffer())
    print(f"wrote {path}")


def main(arguments=None):
    flags = parse(arguments)
    try:
        run(flags)
    except BrokenPipeError:  # nobody reads on, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("sample.py: stopped", file=sys.stderr)
        raise SystemExit(130)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(1)


def run(flags):
    folders = flags.out_dir or [f"out/phase{flags.phase}"]
    if flags.curves:
        return curves(folders)
    if len(folders) > 1:
        raise ValueError("several folders in --out_dir are for --curves")
    if flags.count is not None and flags.count < 1 or flags.start < 0:
        raise ValueError(f"--count must be above 0 and --start at least 0, not {flags.count} and {flags.start}")
    if flags.test_canvases is not None and not 1 <= flags.test_canvases <= 10**6:
        raise ValueError(f"--test_canvases must be from 1 to 1000000, not {flags.test_canvases}")
    if flags.digit_height is not None and not 1 <= flags.digit_height <= 10_000:
        raise ValueError(f"--digit_height must be from 1 to 10000 px, not {flags.digit_height}")
    out = Path(folders[0])
    model, phase, options, kind, folder = load(out / "ckpt.pt")
    classes = options["classes"]
    empty = classes if data.has_empty_cells(phase) else None
    sys.stdout.reconfigure(errors="replace")  # a terminal without half blocks gets question marks, not a traceback
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    # What to show: pictures of one's own, or test canvases and how the whole test set is read
    if flags.image:
        shown = []
        for name in flags.image:
            try:
                canvas = as_canvas(load_picture(Path(name)), phase, model.config.image_size, flags.digit_height)
                shown.append((Path(name).name, canvas, None, logits_of(model, canvas[None])[0]))
            except ValueError as error:
                raise ValueError(error if name in str(error) else f"{name}: {error}") from None
            if not flags.digit_height and max(canvas.shape) > 2 * model.config.image_size:
                print(f"{name}: its digits are taken to be 20 px high; if they are not, say so with --digit_height", file=sys.stderr)
    else:
        asked = {"size": flags.canvas_size, "max_digits": flags.max_digits, "min_distance": flags.min_distance}
        options |= {name: value for name, value in asked.items() if value is not None}
        images, labels, _ = data.load_digits(kind, flags.data_dir or folder, "test")
        canvases, truth = data.test_canvases(phase, images, labels, flags.test_canvases, **options)
        mark = "" if kind == "mnist" else f" ({kind} digits)"
        print(f"reading {len(canvases):,} test canvases of {canvases.shape[1]} x {canvases.shape[2]} px{mark}", flush=True)
        logits = logits_of(model, canvases)
        best = logits.argmax(-1)
        order = torch.arange(len(canvases))
        if flags.mistakes:
            loss = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), reduction="none").view(len(truth), -1).sum(1)
            wrong = (best != truth).flatten(1).any(1)
            order = order[wrong][loss[wrong].argsort(descending=True, stable=True)]
        if flags.start >= len(order) > 0:
            raise ValueError(f"--start={flags.start}, but there are {len(order)} such canvases")
        shown = [(f"test canvas {i}{mark}", canvases[i], truth[i], logits[i])
                 for i in order[flags.start:flags.start + (flags.count or 16)].tolist()]

    tiles, gazes = [], []
    for number, (name, canvas, cells, scores) in enumerate(shown):
        known = cells is not None
        findings = compare(data.read(scores[None], empty)[0], cells, empty)
        tiles.append(tile(canvas, findings, model.config.cell, f"{name}: {verdict(findings, known)}"))
        if flags.image or number < (flags.count or 4):
            print(f"\n{name}", *draw(canvas, colour), *describe(findings, known, colour), sep="\n")
            if flags.attention and any(digit is not None for _, _, _, digit, _ in findings):
                looked = gaze(model, canvas)
                gazes.append([tiles[-1]] + [
                    tile(canvas, [one], model.config.cell, f"where {one[3]} looked", looked[one[0], one[1]])
                    for one in findings if one[3] is not None])
    if not flags.image:
        print(*figures(truth, best, classes, mark), "", sep="\n")
    if not shown:
        return print("no sample.png: nothing is read wrong")
    save_png(out / ("image.png" if flags.image else "sample.png"), sheet([tiles[i:i + 4] for i in range(0, len(tiles), 4)]))
    if gazes:
        save_png(out / "attention.png", sheet(gazes))
    elif flags.attention:
        print("no attention.png: no digit was read")


if __name__ == "__main__":
    main()
