"""Show what a trained model reads, in the terminal and in PNG files.

    python sample.py --phase=3                       # test canvases, figures, and out/phase3/sample.png
    python sample.py --phase=3 --mistakes            # only canvases with mistakes, worst first
    python sample.py --phase=3 --canvas_size=128 --max_digits=16      # larger canvases than in training
    python sample.py --phase=3 --attention           # what each digit's cell attended to: out/phase3/attention.png
    python sample.py --phase=3 --image page.jpg       # your own pictures, as text and in out/phase3/image.png
    python sample.py --phase=3 --page                # a page that reads what you draw on it: out/phase3/page.html
    python sample.py --curves --out_dir out/a out/b  # training curves of runs: out/a/curves.png (needs matplotlib)
"""
import argparse
import base64
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import struct
import sys
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # Ctrl-C while torch is imported
    sys.excepthook = lambda kind, *rest: print("sample.py: stopped", file=sys.stderr) \
        if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

import numpy as np
import torch
import torch.nn.functional as F

import data
import train

MOST_PIXELS = 64_000_000    # in a picture file
WORKING = 8_000_000         # px that a picture is shrunk to when it is read; 12 megapixels keep digits of 30 px legible
HEIGHT = 20                 # px, of MNIST's digits
RENDERED = 32               # px of a digit's height when its ink is told from the paper
FAINT = 25                  # of 255: what is less is no ink, since MNIST's paper is exactly 0
LOWEST = 0.45               # of digits' height: what is less high is a sign
SMALLEST = 8                # px, height of digits that can be read
MOST_PIECES = 5000          # of ink in a picture
MOST_ATTENTION = 16         # canvases of a picture whose attention is shown
UNSURE = 0.6                # a digit of less confidence is written as "?"
SCALES = (1.0, 0.85, 1.18)  # of the digits' height, as measured in the ink, among which the model chooses
MOST_PATCHES = 16_384       # on a canvas: attention is quadratic in them, and the mask of a window takes 1 GB
MOST_ROLLOUT = 4096         # patches on a canvas whose attention is shown: the maps take 2 GB
TILE = 256                  # px, approximate side of a canvas in a PNG file
GREEN, RED, WHITE = (90, 220, 110), (255, 95, 85), (255, 255, 255)


def fail(message, code):
    """End the program with one clear line."""
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--phase", type=int, help="show the run in out/phase<phase> (default: 3)")
    flag("--out_dir", nargs="+", help="folder of ckpt.pt (default: out/phase<phase>); with --curves, one or more")
    flag("--data_dir", help="folder of the digits' files (default: that of the run)")
    flag("--canvas_size", type=int, help="side of the test canvases, px (default: that of the run)")
    flag("--max_digits", type=int, help="maximum number of digits on a test canvas (default: that of the run)")
    flag("--min_distance", type=int, help="minimum distance of digits' centres, px (default: that of the run)")
    flag("--test_canvases", type=int, help="test canvases to read (default: 10,000; in phase 1, each test digit once)")
    flag("--start", type=int, default=0, help="first test canvas to show (default: 0)")
    flag("--count", type=int, help="test canvases to show (default: 4 in the terminal, 16 in sample.png)")
    flag("--mistakes", action="store_true", help="show only canvases with mistakes, worst first")
    flag("--attention", action="store_true", help="show what each digit's cell attended to, in attention.png")
    flag("--curves", action="store_true", help="plot metrics.jsonl into curves.png (needs matplotlib)")
    flag("--page", action="store_true", help="write page.html, one file that reads in a browser what is drawn on it")
    flag("--page_dtype", choices=("float16", "float32"), default="float16",
         help="of the weights on the page: float32 doubles its size (default: float16)")
    flag("--image", nargs="+", metavar="FILE", help="read these pictures: .npy, .pgm, or any format of Pillow")
    flag("--digit_height", type=float, help="height of digits anywhere in an --image, px (default: as measured)")
    flag("--json", action="store_true", help="print what is read in an --image as one JSON object a line")
    flag("--device", default="cpu", help="cuda, mps, xpu, cpu, or auto: the accelerator if there is one (default: cpu)")
    parser.error = lambda message: fail(f"{message} (see --help)", 2)
    return parser.parse_args(arguments)


@torch.no_grad()
def logits_of(model, canvases):
    """uint8 canvases (n, H, W) -> float logits (n, gh, gw, classes). ValueError for canvases that are too large."""
    patches = canvases[0].numel() // model.config.patch_size**2
    if patches > MOST_PATCHES:
        raise ValueError(f"a canvas of {canvases.shape[2]} x {canvases.shape[1]} px has {patches:,} patches, "
                         f"at most {MOST_PATCHES:,} will do")
    device = model.head.weight.device
    batches = canvases.split(data.at_once(canvases))
    return torch.cat([model(data.to_input(batch.to(device))).cpu() for batch in batches])


def compare(reading, truth, empty):
    """A reading of `data.read` against the truth: a list of findings (row, column, true digit, digit read, confidence),
    one for each cell that has a digit or is read as one; None stands for no digit.

    truth: classes of the cells, (gh, gw), or None where they are unknown: then what is read is taken to be true.
    """
    read = {(row, column): (digit, confidence) for digit, row, column, confidence in reading}
    if truth is None:
        true = {cell: digit for cell, (digit, _) in read.items()}
    else:
        true = {(row, column): digit for row, line in enumerate(truth.tolist()) for column, digit in enumerate(line)
                if digit != empty}
    return [(*cell, true.get(cell), *read.get(cell, (None, None))) for cell in sorted(read.keys() | true.keys())]


# ---------------------------------------------------------------------------------------------------------------------
# In the terminal

def draw(canvas, colour):
    """A uint8 canvas (H, W) as lines of text in a frame, with two pixels, one above the other, in each character."""
    lines = ["┌" + "─" * canvas.shape[1] + "┐"]
    canvas = F.pad(canvas, (0, 0, 0, canvas.shape[0] % 2))                  # an odd last row is paired with paper
    for upper, lower in zip(canvas[0::2].tolist(), canvas[1::2].tolist()):
        if colour:
            text = "".join(f"\033[38;2;{u};{u};{u}m\033[48;2;{v};{v};{v}m▀" for u, v in zip(upper, lower)) + "\033[0m"
        else:
            text = "".join(" ▄▀█"[2 * (u > 100) + (v > 100)] for u, v in zip(upper, lower))
        lines.append(f"│{text}│")
    return lines + ["└" + "─" * canvas.shape[1] + "┘"]


def describe(findings, colour):
    """Findings of `compare` as lines of text: cell, truth, digit read, confidence."""
    lines = []
    for row, column, true, digit, confidence in findings:
        line = f"  row {row} column {column}: {'nothing' if true is None else true}, read as "
        line += "nothing" if digit is None else f"{digit} ({100 * confidence:.1f}%)"
        if true != digit:
            line = f"\033[1;31m{line}   <-- wrong\033[0m" if colour else f"{line}   <-- wrong"
        lines.append(line)
    return lines or ["  nothing there, nothing read"]


def found_nearby(truth, best, empty):
    """The number of digits that are found: pairs of a true digit and the same digit read in the same cell or one that
    touches it. A digit is in at most one pair, nearer pairs first. truth, best: classes of cells (n, gh, gw)."""
    true, read, pairs = F.pad(truth, [1] * 4, value=empty), F.pad(best, [1] * 4, value=empty), 0
    for step in sorted(itertools.product((-1, 0, 1), repeat=2), key=lambda step: step[0]**2 + step[1]**2):
        pair = (true != empty) & (true == read.roll(step, (1, 2)))          # only the empty padding wraps around
        pairs += pair.sum().item()
        true = true.masked_fill(pair, empty)
        read = read.masked_fill(pair.roll((-step[0], -step[1]), (1, 2)), empty)
    return pairs


def measure(truth, best, classes):
    """The figures of what was read, a dict of plain values, which the terminal and the page show.

    truth, best: true and most probable classes of cells, int64 (n, gh, gw). classes: the number of digit classes; the
    class after them is "empty".
    """
    size = max(truth.max().item(), best.max().item(), classes - 1) + 1      # includes "empty" where it occurs
    confusion = torch.bincount((truth * size + best).flatten(), minlength=size * size).view(size, size)
    score, by_count = data.score(best, truth, classes), []
    for n in score.digits.unique().tolist():
        exact, right = score.exact[score.digits == n], score.digits_right[score.digits == n]
        by_count.append((n, len(exact), exact.sum().item(), right.sum().item()))
    return {"names": [str(i) for i in range(classes)] + ["empty"] * (size > classes),
            "confusion": confusion.tolist(),                                # true classes are rows, read ones columns
            "by_count": by_count}                                           # digits, canvases, all right, digits right


def figures(truth, best, classes, note=""):
    """What `measure` finds, precision, recall and digits found nearby, in lines of at most 80 columns. note: a remark
    on the digits for the heading."""
    found = measure(truth, best, classes)
    names, confusion, size = found["names"], found["confusion"], len(found["names"])
    true, read = list(map(sum, confusion)), list(map(sum, zip(*confusion)))

    def count(n):  # in 5 columns
        return "." if n == 0 else f"{n}" if n < 10_000 else f"{n / 1000:.0f}k"

    def share(part, whole):
        return f"{100 * part / whole:.2f}%" if whole else "-"

    occur = [i for i in range(size) if true[i] or read[i]]
    columns = {i: 6 if i >= classes else 5 for i in occur} if len(occur) <= 11 else {}      # widths; 80 in all
    lines = ["", f"Cells{note}" + ": what is there (rows) and what is read (columns)" * bool(columns)]
    lines.append(" " * 5 + "".join(f"{names[i]:>{width}}" for i, width in columns.items()) + "   recall precision")
    for i in occur:
        cells = "".join(f"{count(confusion[i][j]):>{width}}" for j, width in columns.items())
        right = confusion[i][i]
        lines.append(f"{names[i]:>5}{cells}{share(right, true[i]):>9}{share(right, read[i]):>10}")

    lines += ["", f"{'digits on a canvas':>18}{'canvases':>10}{'all right':>11}{'digits right':>14}"]
    for n, canvases, exact, right in found["by_count"]:
        lines.append(f"{n:>18}{canvases:>10,}{share(exact, canvases):>11}{share(right, n * canvases):>14}")
    if size > classes:
        pairs, true, read = found_nearby(truth, best, classes), sum(true[:classes]), sum(read[:classes])
        lines += ["", f"Digits, at most one cell off: recall {share(pairs, true)}, precision {share(pairs, read)}, "
                  f"F1 {share(2 * pairs, true + read)}"]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# In PNG files: pictures are uint8 arrays (height, width, 3)

# Letters of 3 x 5 px: each octal digit is a row, its bits the pixels
FONT = {letter: [int(row) for row in rows] for letter, rows in (glyph.split("=") for glyph in (
    "0=75557 1=26227 2=71747 3=71717 4=55711 5=74717 6=74757 7=71122 8=75757 9=75717 A=25755 B=65656 C=34443 D=65556 "
    "E=74647 F=74644 G=34553 H=55755 I=72227 J=11152 K=55655 L=44447 M=57755 N=65555 O=25552 P=65644 Q=25573 R=65655 "
    "S=34216 T=72222 U=55557 V=55552 W=55775 X=55255 Y=55222 Z=71247 .=00002 :=02020 -=00700 _=00007 ?=71302").split())}


def write_text(picture, top, left, text, colour, scale=2):
    """Write text into a picture on a dark ground, in letters of 3 x 5 px times scale, moved to where it fits."""
    height, width = 7 * scale, scale * (4 * len(text) + 1)
    top, left = max(0, min(top, picture.shape[0] - height)), max(0, min(left, picture.shape[1] - width))
    picture[top:top + height, left:left + width] = 24
    for i, letter in enumerate(text.upper()):
        bits = np.array([[row >> 2 & 1, row >> 1 & 1, row & 1] for row in FONT.get(letter, [0] * 5)], dtype=bool)
        glyph = picture[top + scale:, left + scale * (4 * i + 1):][:5 * scale, :3 * scale]
        bits = bits.repeat(scale, 0).repeat(scale, 1)[:glyph.shape[0], :glyph.shape[1]]     # clipped at the edges
        glyph[bits] = colour


def draw_frame(picture, top, left, height, width, colour, dashed=False):
    """Draw a frame, 2 px wide."""
    box = picture[top:top + height, left:left + width]
    for side in (box, box.swapaxes(0, 1)):
        line = np.arange(side.shape[1]) // 4 % 2 == 0 if dashed else np.ones(side.shape[1], dtype=bool)
        side[:2, line] = side[-2:, line] = colour


def tile(canvas, findings, cell, caption, heat=None):
    """An enlarged uint8 canvas (H, W). The cell of each finding has a frame, dashed where it is wrong, and
    shows the digit read. Below are the caption and the mistakes. heat: float (rows, columns), 0 to 1, overlaid in
    orange."""
    scale = max(1, TILE // max(canvas.shape))
    picture = np.repeat(canvas.numpy().repeat(scale, 0).repeat(scale, 1)[:, :, None], 3, axis=2)
    if heat is not None:
        heat = F.interpolate(heat[None, None], picture.shape[:2], mode="bilinear")[0, 0, :, :, None].numpy()
        picture = ((1 - 0.6 * heat) * picture + 0.6 * heat * np.array([255, 140, 0])).astype(np.uint8)
    side, lines = cell * scale, [caption]
    for row, column, true, digit, _ in findings:
        wrong = true != digit
        colour = RED if wrong else GREEN
        draw_frame(picture, row * side, column * side, side, side, colour, dashed=wrong)
        outside = side < 64 and not wrong and (column + 1) * side + 16 < picture.shape[1]   # to the right of the frame
        text = "-" if digit is None else str(digit)
        write_text(picture, row * side + 4, column * side + (side + 2 if outside else 4), text, colour)
        if wrong:
            true, digit = ("empty" if label is None else label for label in (true, digit))
            lines.append(f"row {row} column {column}: {true} read as {digit}")
    height, width = picture.shape[0] + 14 * len(lines) + 10, max(picture.shape[1], 10 + 8 * max(map(len, lines)))
    captioned = np.full((height, width, 3), 24, dtype=np.uint8)
    captioned[:picture.shape[0], :picture.shape[1]] = picture
    for i, line in enumerate(lines):
        write_text(captioned, picture.shape[0] + 5 + 14 * i, 0, line, RED if i else WHITE)
    return captioned


def verdict(findings):
    mistakes = sum(true != digit for _, _, true, digit, _ in findings)
    return f"{mistakes} wrong" if mistakes else "all right" if findings else "nothing there"


def reading_tile(reading, largest):
    """The picture of a Reading, at most `largest` px a side: each digit in a frame with its reading, red and dashed
    where it is unsure."""
    height, width = reading.picture.shape
    scale = min(1, largest / max(height, width))
    grey = resize(reading.picture, max(1, round(height * scale)), max(1, round(width * scale)))
    picture = np.repeat((255 * grey).byte().numpy()[:, :, None], 3, axis=2)
    for digit in reading.record["digits"]:
        left, top, width, height = (round(scale * side / reading.shrunk) for side in digit["box"])
        unsure = digit["confidence"] < UNSURE
        colour = RED if unsure else GREEN
        draw_frame(picture, max(0, top - 3), max(0, left - 3), height + 6, width + 6, colour, dashed=unsure)
        write_text(picture, top - 18, left - 3, str(digit["digit"]), colour)
    return picture


def sheet(rows):
    """Rows of tiles -> one picture."""
    height = max(tile.shape[0] for row in rows for tile in row) + 8
    width = max(tile.shape[1] for row in rows for tile in row) + 8
    picture = np.full((height * len(rows) + 8, width * max(map(len, rows)) + 8, 3), 60, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            picture[8 + i * height:, 8 + j * width:][:tile.shape[0], :tile.shape[1]] = tile
    return picture


def save_png(path, picture):
    """Save uint8 (H, W, 3) as a PNG file (W3C PNG specification, colour type 2, filter 0). Raises OSError."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    height, width = picture.shape[:2]
    lines = np.concatenate((np.zeros((height, 1), np.uint8), picture.reshape(height, -1)), axis=1)
    data.write_whole(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b""))
    print(f"wrote {path}")


@torch.no_grad()
def attention_rollout(model, canvas):
    """How much each cell of a uint8 canvas (H, W) attends to each patch, relative to its maximum: float (gh, gw, rows,
    columns). Attention rollout (Abnar 2020, arXiv:2005.00928): the product of all blocks' attention maps, each averaged
    with the identity, which stands for the residual connection."""
    patch, cell = model.config.patch_size, model.config.cell
    if canvas.numel() > MOST_ROLLOUT * patch**2:
        raise ValueError(f"--attention is for canvases of up to {MOST_ROLLOUT:,} patches, this is one of "
                         f"{tuple(canvas.shape)} px")
    inputs = data.to_input(canvas[None]).to(model.head.weight.device)
    maps = model.attention_maps(inputs)[:, 0].mean(1).cpu()                 # (depth, N, N), the mean over heads
    rollout = identity = torch.eye(maps.shape[-1])
    for attention in maps:
        rollout = (attention + identity) / 2 @ rollout
    rows, columns, k = canvas.shape[0] // patch, canvas.shape[1] // patch, cell // patch
    rollout = rollout[model.prefix:, model.prefix:]                         # from patches, to patches
    rollout = rollout.reshape(rows // k, k, columns // k, k, rows, columns).mean((1, 3))
    return rollout / rollout.amax((2, 3), keepdim=True)


def attention_tiles(model, canvas, findings):
    """A tile for each digit read on a canvas, with the attention of its cell overlaid."""
    read = [finding for finding in findings if finding[3] is not None]
    rollout = attention_rollout(model, canvas) if read else None
    return [tile(canvas, [finding], model.config.cell, f"where {finding[3]} looked", rollout[finding[:2]])
            for finding in read]


# ---------------------------------------------------------------------------------------------------------------------
# Your own pictures

def load_picture(path, digit_height=None):
    """A picture file -> float (H, W), 0 black to 1 white, and px of the file for one of its px. Raises ValueError if it
    cannot be read or is too large.

    One above WORKING px is shrunk by a whole number, while it is read if the format can, so that 64 megapixels take
    seconds; half as far if digits of a known height would become lower than MNIST's."""
    read = {".npy": read_npy, ".pgm": read_pgm}.get(path.suffix.lower(), read_with_pillow)
    data.check_regular(path)

    def shrinking(height, width):
        check_size(height, width)
        least, most = (math.ceil(math.sqrt(height * width / px)) for px in (2 * WORKING, WORKING))
        return min(most, max(least, int(digit_height / HEIGHT))) if digit_height else most

    try:
        array, factor, shrunk = read(path, shrinking)
        bands = range(0, len(array), 64 * factor)
        with np.errstate(over="ignore"):        # what is too large becomes infinite, which to_grey refuses
            pixels = torch.cat([shrink(np.array(array[row:row + 64 * factor], dtype=np.float32), factor)
                                for row in bands])
        return to_grey(pixels, array.dtype), shrunk
    except MemoryError:
        raise ValueError(f"{path} cannot be read: it takes more memory than there is") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a broken file raises different exceptions in each format
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def shrink(array, factor):
    """float (H, W) or (H, W, channels), each block of factor x factor px by its mean: a tensor."""
    pixels = torch.from_numpy(array)
    if factor == 1:
        return pixels
    channels = pixels.view(*pixels.shape[:2], -1).movedim(2, 0)[:, None]
    return F.avg_pool2d(channels, factor, ceil_mode=True)[:, 0].movedim(0, 2).squeeze(2)


def check_size(height, width):
    """Raise ValueError for a picture without pixels or with too many, before it takes memory."""
    if not 0 < height * width <= MOST_PIXELS:
        raise ValueError(f"it has {width:,} x {height:,} px, allowed are 1 to {MOST_PIXELS:,} in all")


def read_npy(path, shrinking):
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise ValueError("expected numbers (H, W), (H, W, 3) or (H, W, 4)")
    return array, *2 * (shrinking(*array.shape[:2]),)


def read_pgm(path, shrinking):
    """A PGM file, binary (P5) or text (P2; https://netpbm.sourceforge.net/doc/pgm.html) -> float64 (H, W), 0 to 1."""
    with open(path, "rb") as file:
        header = re.match(rb"P([25])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s", file.read(65536))
        if not header:
            raise ValueError("it does not begin like a PGM file, P5 or P2")
        width, height, white = (int(n) for n in header.groups()[1:])
        factor = shrinking(height, width)
        file.seek(header.end())
        if header[1] == b"5":
            dtype = np.dtype(">u2" if white > 255 else "u1")
            values = np.frombuffer(file.read(height * width * dtype.itemsize), dtype)
        else:
            text = file.read(8 * height * width + 65536)
            values = np.array(text.split()[:height * width], dtype=np.int64)
    return values.reshape(height, width) / max(white, 1), factor, factor


def read_with_pillow(path, shrinking):
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError("only .npy and .pgm are read without Pillow: pip install pillow") from None
    if path.suffix.lower() in (".heic", ".heif"):                           # photographs of iPhones
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("HEIC is read with pillow-heif: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
    Image.MAX_IMAGE_PIXELS = None                                           # check_size sets the limit instead
    with Image.open(path) as image:
        factor, size = shrinking(image.height, image.width), image.size
        image.draft(image.mode, [side // factor for side in size])          # a JPEG can be read at half its size
        factor = max(1, round(factor * image.width / size[0]))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            return np.asarray(image), factor, factor
        if image.mode not in ("L", "RGB", "RGBA"):
            image = image.convert("RGBA")
        image = image.reduce(factor).convert("RGBA")
        return np.asarray(image), 1, math.sqrt(size[0] * size[1] / (image.width * image.height))


def to_grey(pixels, dtype):
    """float (H, W) or (H, W, channels), read from a NumPy dtype -> (H, W) from 0 to 1.

    Colours become luma (ITU-R BT.601). What is transparent is paper: like the median of the opaque pixels where these
    are most of the picture, else white, or black where the drawing is light."""
    if not pixels.isfinite().all():
        raise ValueError("some of its values are not finite")
    if dtype in (np.uint8, np.uint16):                                      # 1, 8, 12 or 16 bits in use
        largest = math.ceil(pixels.max())
        pixels = pixels / (255 if dtype == np.uint8 and largest > 1 else max(2 ** largest.bit_length() - 1, 1))
    elif pixels.max() > 1 or pixels.min() < 0:                              # an unknown range: stretch it to 0 to 1
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-9)
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] not in (1, 3, 4):
        raise ValueError(f"expected (H, W, 1, 3 or 4 channels), not {tuple(pixels.shape)}")
    if pixels.shape[2] == 1:
        return pixels[:, :, 0]
    luma = pixels[:, :, :3] @ torch.tensor([0.299, 0.587, 0.114])
    if pixels.shape[2] == 3 or pixels[:, :, 3].min() == 1:
        return luma
    alpha = pixels[:, :, 3]
    opaque = luma[alpha > 0.5]
    if 2 * len(opaque) > alpha.numel():
        paper = opaque.median()
    else:
        paper = ((luma * alpha).sum() <= 0.5 * alpha.sum()).float()
    return luma * alpha + paper * (1 - alpha)


def resize(picture, height, width):
    return F.interpolate(picture[None, None], (height, width), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def ink_of(picture, height):
    """float (H, W) -> ink from 0 to 1, whether the ink is dark or light, in light that changes gradually.

    height: of digits, px, roughly. Paper and ink are told apart within about three of it."""
    block, fine = max(1, round(0.4 * height)), max(1, round(height / 16))
    coarse = resize(picture, *(-(-side // block) for side in picture.shape))
    nearby = F.unfold(F.pad(coarse[None, None], [3] * 4, mode="replicate"), 7)[0]           # (7 * 7, blocks)
    off = picture - resize(nearby.median(0).values.view_as(coarse), *picture.shape)
    noise = max(neighbour_noise(picture), 1e-4)
    off = off * (off.abs() > 3 * noise)
    dark = off.clamp(max=0).square().sum() > off.clamp(min=0).square().sum()
    if dark:
        picture, nearby = 1 - picture, 1 - nearby
    paper = nearby.quantile(0.2, dim=0).view_as(coarse)
    difference = picture - resize(paper, *picture.shape)
    full = difference.flatten().topk(min(20, difference.numel())).values.mean().item()      # of fully inked pixels
    if full < max(0.06, 5 * noise):                                         # nothing but paper
        return torch.zeros_like(picture)
    # Ink that is fainter than elsewhere on the page is brought to the same strength, up to twice
    strongest = F.avg_pool2d(difference[None, None], fine, ceil_mode=True)
    strongest = F.max_pool2d(strongest, 2 * block // fine, ceil_mode=True)
    strongest = resize(F.max_pool2d(strongest, 5, 1, 2)[0, 0].clamp(0, 1), *picture.shape).clamp(min=full / 2)
    threshold = (4 * noise / strongest).clamp(max=0.5)
    return ((difference / strongest - threshold) / (1 - threshold)).clamp(0, 1)


def neighbour_noise(picture):
    """The standard deviation of a picture's noise, from the differences of pixels side by side: uneven light and ink
    hardly change it."""
    difference = (picture[:, 1:] - picture[:, :-1]).abs()
    return 1.4826 * difference.median().item() / 2**0.5 if difference.numel() else 0.0


def row_runs(mask):
    """The runs of pixels side by side in the rows of a mask, bool (H, W): its changes, int8 (H, W + 1), 1 where a run
    begins and -1 one past its end; of each run, in reading order, the row, its begin, and one past its end."""
    changes = np.diff(np.pad(mask.numpy().astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row, begin = np.nonzero(changes == 1)
    _, end = np.nonzero(changes == -1)
    return changes, row, begin, end


def pieces(mask):
    """The connected pieces of a mask, bool (H, W), with neighbours across corners: int64 (H, W), 0 outside of the mask,
    elsewhere a number for each piece.

    Runs of pixels in a row are joined to those that they touch in the row above, by union-find over all of them at
    once: a round halves the way to the root, so that even a spiral takes few rounds.
    """
    height, width = mask.shape
    _, row, begin, end = row_runs(mask)
    line = width + 2                                                        # longer than a row, so that rows stay apart
    lowest = np.searchsorted(row * line + end, (row - 1) * line + begin)    # the runs above that a run touches
    highest = np.searchsorted(row * line + begin, (row - 1) * line + end, side="right")
    count = (highest - lowest).clip(min=0)
    below = np.repeat(np.arange(len(row)), count)
    above = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + np.repeat(lowest, count)
    root = np.arange(len(row))
    while (root[above] != root[below]).any():
        low, high = np.minimum(root[above], root[below]), np.maximum(root[above], root[below])
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]
    label = np.zeros(height * width, dtype=np.int64)
    label[mask.flatten().numpy()] = np.repeat(root + 1, end - begin)
    return torch.from_numpy(label).view(height, width)


def without_specks(ink):
    """Ink, float (H, W), without connected pieces that have less than a tenth of the ink of the largest."""
    label = pieces(ink > 0.05)
    mass = torch.bincount(label.flatten(), (ink * (ink > 0.3)).flatten())      # faint noise joins into large pieces
    mass[0] = 0
    return ink * (mass >= mass.max() / 10)[label] * (label > 0)


def with_margins(picture):
    """float (H, W) -> about (2 H, 2 W), in even light and with paper around it.

    The light is modelled as a plane, fitted to the pixels at the edges, most of which are paper. The fit minimises the
    sum of absolute differences, which ink disturbs little, by iteratively reweighted least squares."""
    row, column = (torch.linspace(-1, 1, side) for side in picture.shape)
    terms = torch.stack(torch.broadcast_tensors(torch.ones(()), row[:, None], column), dim=-1)      # (H, W, 3)
    edge = torch.ones_like(picture, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    edge_terms, light = terms[edge], picture[edge]                          # (E, 3), (E,)
    weight = torch.ones_like(light)
    for _ in range(20):
        plane = torch.linalg.lstsq(edge_terms * weight[:, None], light * weight).solution
        weight = (light - edge_terms @ plane).abs().clamp(min=1e-3).rsqrt()
    height, width = (side // 2 for side in picture.shape)
    return F.pad(picture - terms[..., 1:] @ plane[1:], (width, width, height, height), value=plane[0].item())


def as_mnist(picture):
    """A picture of one digit, float (H, W) -> uint8 (28, 28) as in MNIST: ink fitted to 20 x 20 px, centred by mass.
    And its box (top, left, bottom, right), px. Raises ValueError if there is no ink."""
    scale, whole = min(1, 200 / max(picture.shape)), picture.shape
    picture = resize(picture, *(max(1, round(side * scale)) for side in picture.shape))
    ink = without_specks(ink_of(with_margins(picture), HEIGHT))             # a close crop shows too little paper
    rows, columns = (ink > 0.3).any(1).nonzero(), (ink > 0.3).any(0).nonzero()
    if not len(rows):
        raise ValueError("no ink was found where a digit should be")
    margins = [side // 2 for side in picture.shape]
    box = [min(max((line.item() - margin) / scale, 0), side) for line, margin, side in zip(
        (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1), 2 * margins, 2 * whole)]
    ink = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = resize(ink, height, width)
    ink /= ink.max()
    top, left = (round(data.FRAME / 2 - ((torch.arange(len(mass)) + 0.5) * mass).sum().item() / mass.sum().item())
                 for mass in (ink.sum(1), ink.sum(0)))
    top, left = max(0, min(top, data.FRAME - height)), max(0, min(left, data.FRAME - width))
    frame = torch.zeros(data.FRAME, data.FRAME)
    frame[top:top + height, left:left + width] = ink
    return (255 * frame).round().byte(), box


def boxes(label):
    """Pieces as `pieces` numbers them -> their ink boxes (top, left, bottom, right), px, ends excluded: int64 (n, 4),
    and their numbers: int64 (n,)."""
    row, column = label.nonzero().unbind(1)
    numbers, index = label[row, column].unique(return_inverse=True)
    ends = torch.zeros(4, len(numbers), dtype=torch.int64)
    for end, values, how in zip(ends, (row, column, row + 1, column + 1), ("amin", "amin", "amax", "amax")):
        end.scatter_reduce_(0, index, values, how, include_self=False)
    return ends.T, numbers


def runs(mask, length):
    """Where a bool (H, W) mask is set in at least `length` px side by side in a row: bool (H, W)."""
    changes, row, begin, end = row_runs(mask)
    short = end - begin < length
    changes[row[short], begin[short]] = changes[row[short], end[short]] = 0
    return torch.from_numpy(changes[:, :-1].cumsum(1, dtype=np.int8) > 0)


def without_rules(ink, across, down):
    """Ink, float (H, W), without frames, as `strokes` finds them, and without straight lines: rules, squares. They are
    at least `across` px long along rows, `down` px along columns.

    A line may slope by a px here and there. A stroke that crosses it stays: there, the ink is higher than a line is."""
    label, _, number = strokes(ink)
    ink = ink * (torch.isin(label, number) | (label == 0))
    rules = torch.zeros_like(ink, dtype=torch.bool)
    for turned, out, length in ((ink, rules, across), (ink.T, rules.T, down)):
        mask = turned > 0.2
        thick = mask.clone()
        thick[1:] |= mask[:-1]
        thick[:-1] |= mask[1:]
        out |= runs(thick, length) & (turned > 0) & ~runs(mask.T, max(3, length // 9)).T
    return ink * ~rules


class Piece(NamedTuple):
    """A connected piece of ink."""
    top: int                # px, of its box
    left: int
    ink: torch.Tensor       # float (height, width)


def strokes(ink):
    """The pieces of ink, float (H, W), that may be digits: `pieces`, their `boxes` and numbers. Frames are left out,
    and in a noisy picture all but the MOST_PIECES with most ink. A piece is a frame if those within its box have a
    sixth of its ink or more."""
    label = pieces(ink > 0.3)
    box, number = boxes(label)
    mass = torch.bincount(label.flatten(), ink.flatten())[number]
    most = mass.argsort(descending=True)[:MOST_PIECES].sort().values
    box, number, mass = box[most], number[most], mass[most]
    tallest = (box[:, 2] - box[:, 0]).argsort(descending=True)[:500]
    sign = torch.tensor([1, 1, -1, -1])
    within = (sign * box[tallest, None] < sign * box).all(2)                # (tallest, pieces)
    keep = torch.ones(len(box), dtype=torch.bool)
    keep[tallest] = within.to(mass.dtype) @ mass < mass[tallest] / 6
    return label, box[keep], number[keep]


def height_of(picture):
    """The height of the digits in a picture, float (H, W), px: the median over its pieces that are at least LOWEST
    times as high as the tallest. Pieces that touch the picture's edge, such as shadows and the table beside the page,
    count only if there are no others. None if there is no ink."""
    ink, height = ink_of(picture, max(max(picture.shape) / 8, 16)), None
    down, across = (round(0.75 * side) for side in picture.shape)
    for _ in range(2):                          # more rules are found once digits' height bounds their length
        _, box, _ = strokes(without_rules(ink, across, down))
        if not len(box) and height is None:     # in a close crop, a 1 is as long as a rule
            _, box, _ = strokes(ink)
            box = box[box[:, 2] - box[:, 0] > box[:, 3] - box[:, 1]]
        if not len(box):
            break
        inside = (box[:, :2] > 0).all(1) & (box[:, 2:] < torch.tensor(picture.shape)).all(1)
        box = box[inside] if inside.any() else box
        tall = box[:, 2] - box[:, 0]
        height = tall[tall >= LOWEST * tall.max()].float().median().item()
        across = down = round(2.25 * height)
    return height


def pieces_of(ink, height):
    """The Pieces of ink that may be digits of a height, px, or several that touch. A lower one belongs to the piece
    next to it, as the bar of a 5 may, or is a sign or a speck."""
    label, box, number = strokes(ink)
    tall, wide = (box[:, 2:] - box[:, :2]).unbind(1)
    fits = (tall >= LOWEST * height) & (tall <= 3 * height) & (wide <= 12 * height)
    reach = torch.tensor([-1, -1, 1, 1]) * max(1, round(0.1 * height))
    found = []
    for (top, left, bottom, right), own in zip(box[fits].tolist(), number[fits]):
        near = ~fits & (box[:, 0] < bottom + reach[3]) & (box[:, 2] > top - reach[3]) & (
            box[:, 1] < right + reach[3]) & (box[:, 3] > left - reach[3]) & (tall <= LOWEST * height) & (wide <= height)
        group = box[near].tolist() + [(top, left, bottom, right)]
        top, left, bottom, right = (how(ends) for how, ends in zip((min, min, max, max), zip(*group)))
        mine = torch.isin(label[top:bottom, left:right], torch.cat((number[near], own[None])))
        found.append(Piece(top, left, ink[top:bottom, left:right] * mine))
    return found


def canvas_of(piece, height, cell, size, scale):
    """A Piece on a uint8 canvas of its own, of the size px at least, as in MNIST: its longer side becomes HEIGHT px, or
    its height where it may be several digits, times `scale`; but it is not taken for a digit far from the page's
    height. Its box is centred in a cell. Returns the canvas, px of it per px of the ink, and the piece's corner, px."""
    tall, wide = piece.ink.shape
    own = tall if wide > 1.3 * tall else max(tall, wide)
    scale *= HEIGHT / min(max(own, 0.5 * height), 1.7 * height)
    shape = [max(1, round(side * scale)) for side in piece.ink.shape]
    sides = [max(size, cell * ((side + 2 * cell - 1) // cell | 1)) for side in shape]
    corner = [(whole - side) // 2 for whole, side in zip(sides, shape)]
    canvas = torch.zeros(sides)
    canvas[corner[0]:corner[0] + shape[0], corner[1]:corner[1] + shape[1]] = 255 * resize(piece.ink, *shape)
    canvas[canvas <= FAINT] = 0
    return canvas.round().byte(), scale, corner


def read_pieces(model, found, height, scale):
    """What a model reads in Pieces whose digits have a height, px: for each piece its canvas, logits, and a list of
    (digit, confidence, box), the box as (top, left, bottom, right) in px of the ink."""
    cell, empty = model.config.cell, model.config.num_classes - 1
    framed = [canvas_of(piece, height, cell, 7 * cell, scale) for piece in found]
    by_shape, results = {}, [None] * len(found)
    for index, (canvas, _, _) in enumerate(framed):
        by_shape.setdefault(canvas.shape, []).append(index)
    for indices in by_shape.values():
        logits = logits_of(model, torch.stack([framed[index][0] for index in indices]))
        for index, own, reading in zip(indices, logits, data.read(logits, empty)):
            canvas, enlarged, corner = framed[index]
            digits = [(digit, share, box_of(found[index], (row, column), len(reading), cell, enlarged, corner))
                      for digit, row, column, share in reading]
            results[index] = canvas, own, digits
    return results


def box_of(piece, place, count, cell, scale, corner):
    """The box of a digit read in a cell, `place`, of a Piece's canvas: the piece's, unless it holds several digits."""
    box = [piece.top, piece.left, piece.top + piece.ink.shape[0], piece.left + piece.ink.shape[1]]
    if count > 1:
        y, x = ((cell * (index + 0.5) - start) / scale for index, start in zip(place, corner))
        half = HEIGHT / 2 / scale
        box = [max(box[0], piece.top + y - half), max(box[1], piece.left + x - half),
               min(box[2], piece.top + y + half), min(box[3], piece.left + x + half)]
    return box


class Reading(NamedTuple):
    """A picture that was read."""
    record: dict            # see `read_picture`
    picture: torch.Tensor   # float (H, W)
    shrunk: float           # px of the file for one of the picture
    canvases: list          # (canvas, logits) that the model read
    note: str               # why nothing is read


def find_digits(model, picture, height=None):
    """A picture, float (H, W) -> the height of its digits, px, a list of (digit, confidence, (top, left, bottom,
    right)), the canvases with the model's logits, and why nothing was found. The scale among SCALES at which the model
    is surest counts."""
    height = height or height_of(picture)
    if height is None:
        return None, [], [], "there is no ink in it"
    fine = min(RENDERED / height, math.sqrt(2 * WORKING / picture.numel()))      # px of ink for one of the picture
    ink = ink_of(resize(picture, *(max(1, round(side * fine)) for side in picture.shape)), fine * height)
    rule = round(2.25 * fine * height)
    found = pieces_of(without_rules(ink, rule, rule), fine * height)
    if not found:
        return height, [], [], "its ink is not of the size of digits of that height"

    def sure(results):
        shares = [share for _, _, digits in results for _, share, _ in digits]
        return sum(shares) / max(1, len(shares))

    results = max((read_pieces(model, found, fine * height, scale) for scale in SCALES), key=sure)
    digits = [(digit, share, [end / fine for end in box]) for _, _, own in results for digit, share, box in own]
    note = "its ink is too small to be read" if height < SMALLEST else "its ink looks like signs, not like digits"
    return height, digits, [(canvas, logits) for canvas, logits, own in results if own], note


def digits_in_grid(model, picture):
    """As `find_digits`, for a model that reads a digit in every cell."""
    grid = model.config.image_size // model.config.cell
    if min(picture.shape) < grid:
        raise ValueError(f"it is too small for a grid of {grid} x {grid} digits")
    bands = [band.tensor_split(grid, dim=1) for band in picture.tensor_split(grid)]
    cells = [[as_mnist(part) for part in parts] for parts in bands]
    canvas = torch.cat([torch.cat([frame for frame, _ in line], dim=1) for line in cells])
    logits, digits = logits_of(model, canvas[None])[0], []
    for digit, row, column, share in data.read(logits[None], None)[0]:
        top, left = sum(len(parts[0]) for parts in bands[:row]), sum(part.shape[1] for part in bands[row][:column])
        digits.append((digit, share, [end + start for end, start in zip(cells[row][column][1], 2 * (top, left))]))
    height = sum(bottom - top for _, _, (top, _, bottom, _) in digits) / len(digits)
    return height, digits, [(canvas, logits)], ""


def read_file(model, path, digit_height=None):
    """The Reading in a picture file. ValueError if it cannot be read."""
    picture, shrunk = load_picture(Path(path), digit_height)
    find = digits_in_grid if model.config.cell == data.FRAME else find_digits
    least = 0 if find is digits_in_grid else UNSURE                         # in a grid, there is a digit for sure
    given = (digit_height / shrunk,) if digit_height and find is find_digits else ()
    height, found, canvases, note = find(model, picture, *given)
    digits = [{"digit": digit, "confidence": round(share, 4), "box": [round(shrunk * side) for side in
               (left, top, right - left, bottom - top)]} for digit, share, (top, left, bottom, right) in found]
    lines = lines_of(digits, shrunk * height) if digits else []
    record = {"file": str(path), "text": "\n".join(text_of(line, shrunk * height, least) for line in lines),
              "digit_height": height and round(shrunk * height, 1), "digits": sum(lines, [])}
    return Reading(record, picture, shrunk, canvases, note)


def read_picture(model, path, digit_height=None):
    """What a model reads in a picture file: {"file", "text", "digit_height", "digits": [{"digit", "confidence",
    "box": [left, top, width, height]}]}, px of the picture, digits in reading order. `text` has a line for each line of
    the page, "?" for what is unsure. digit_height: px, where it is known. ValueError for a file that cannot be read."""
    return read_file(model, path, digit_height).record


def lines_of(digits, height):
    """Digits {"box": [left, top, width, height], ...} -> lists of them, one for each line of the page, as written. Each
    joins the line whose last digit is nearest in height, so a line may slope."""
    def middle(digit):
        return digit["box"][1] + digit["box"][3] / 2

    lines = []
    for digit in sorted(digits, key=lambda digit: digit["box"][0] + digit["box"][2] / 2):
        near = [line for line in lines if abs(middle(line[-1]) - middle(digit)) <= 0.65 * height]
        if near:
            min(near, key=lambda line: abs(middle(line[-1]) - middle(digit))).append(digit)
        else:
            lines.append([digit])
    return sorted(lines, key=lambda line: sum(map(middle, line)) / len(line))


def text_of(line, height, least):
    """A line of digits as text: "?" for those of less than the `least` confidence, a blank where a gap is far wider
    than most."""
    gaps = [after["box"][0] - before["box"][0] - before["box"][2] for before, after in zip(line, line[1:])]
    usual = sorted(gaps)[(len(gaps) - 1) // 2] if len(gaps) > 1 else 0.5 * height
    wide = max(0.6 * height, 2 * usual)
    text = ["?" if digit["confidence"] < least else str(digit["digit"]) for digit in line]
    return text[0] + "".join(" " * (gap > wide) + letter for gap, letter in zip(gaps, text[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# Training curves

PANELS = (("cross entropy of cells", "log"), ("learning rate", "linear"), ("accuracy, %", "linear"))
CURVES = (  # panel, event and key in metrics.jsonl, label, style
    (0, "train", "loss", "training", dict(linewidth=1)),
    (0, "eval", "loss", "evaluation", dict(linestyle="--", marker="o")),
    (1, "train", "lr", "training", dict(linewidth=1)),
    (2, "eval", "digit_accuracy", "digit accuracy", dict(marker="o")),
    (2, "eval", "exact_match", "exact match", dict(linestyle="--", marker="s")))


def curves(folders):
    """Plot the metrics of runs together, by steps and by seconds, into curves.png of the first folder."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--curves needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(12, 11), layout="constrained")
    panels = figure.subplots(len(PANELS), 2, sharex="col", sharey="row")
    for number, folder in enumerate(folders):
        metrics, drawn = metrics_of(Path(folder) / "metrics.jsonl")
        if not len(metrics["train", "loss"]):
            raise ValueError(f"{folder}: nothing was logged yet")
        plot_run(panels, folder + " (drawn digits)" * drawn, metrics, f"C{number}")
    for (title, scale), row in zip(PANELS, panels):
        row[0].set_ylabel(title)
        for panel in row:
            panel.set_yscale(scale)
            panel.grid(alpha=0.3)
    panels[2, 0].set_xlabel("step")
    panels[2, 1].set_xlabel("seconds, evaluation included")
    panels[0, 0].legend(fontsize=8)
    panels[2, 0].legend(fontsize=8)
    path, png = Path(folders[0]) / "curves.png", io.BytesIO()
    figure.savefig(png, dpi=110)
    data.write_whole(path, png.getbuffer())
    print(f"wrote {path}")


def metrics_of(path):
    """The CURVES of a metrics.jsonl, by event and key: float (n, 3), step, seconds and value, NaN where it is null. And
    whether the digits were drawn by the program. ValueError if it is not a metrics file."""
    data.check_regular(path)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        metrics = {(event, key): np.array([(line["step"], line["seconds"], line[key]) for line in lines
                                           if line["event"] == event], dtype=float).reshape(-1, 3)
                   for _, event, key, _, _ in CURVES}
        drawn = any("drawn" in line["data"] for line in lines if line["event"] == "eval")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not a metrics file of train.py: {type(error).__name__}: {error}") from None
    return metrics, drawn


def plot_run(panels, name, metrics, colour):
    """Add the CURVES of one run, as `metrics_of` has them."""
    for row, event, key, label, style in CURVES:
        *places, values = metrics[event, key].T
        for panel, place in zip(panels[row], places):                       # by steps and by seconds
            panel.plot(place, 100 * values if row == 2 else values, color=colour, label=f"{name}, {label}", **style)


def main(arguments=None):
    flags = parse(arguments)
    train.make_stdout_robust()
    try:
        run(flags)
    except BrokenPipeError:  # the reader has stopped, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        fail("stopped", 130)
    except (ValueError, OSError) as error:
        fail(error, 1)


def run(flags):
    folders = flags.out_dir or [f"out/phase{flags.phase or 3}"]
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
    if flags.json and not flags.image:
        raise ValueError("--json is for pictures: name them as --image")
    folder = Path(folders[0])
    checkpoint, model = train.load_checkpoint(folder / "ckpt.pt")
    if flags.phase not in (None, checkpoint["phase"]):
        raise ValueError(f"{folder / 'ckpt.pt'} is of phase {checkpoint['phase']}, not {flags.phase}")
    model.to(train.pick_device(flags.device))
    if not flags.image:
        test = read_test_set(flags, checkpoint, model)
        return write_page(flags, folder, checkpoint, model, test) if flags.page else present(flags, folder, model, test)
    read_pictures(flags, folder, model)


def read_pictures(flags, folder, model):
    """Read the pictures in --image, print what they say, and save image.png. What cannot be read is told at the end of
    the others by the exit code."""
    tiles, attention = [], []
    for file in flags.image:
        try:
            reading = read_file(model, file, flags.digit_height)
        except ValueError as error:
            print(f"sample.py: {error if file in str(error) else f'{file}: {error}'}", file=sys.stderr)
            continue
        tiles.append(reading_tile(reading, max(300, 1200 // min(4, len(flags.image)))))
        if flags.json:
            print(json.dumps(reading.record), flush=True)
            continue
        print("", *reading_report(reading, sys.stdout.isatty() and "NO_COLOR" not in os.environ), sep="\n", flush=True)
        if flags.attention:
            attention += attention_rows(model, reading.canvases[:MOST_ATTENTION])
    if tiles and not flags.json:
        save_png(folder / "image.png", tiles[0] if len(tiles) == 1 else sheet(in_rows(tiles)))
        save_attention(flags, folder, attention)
    if len(tiles) < len(flags.image):
        raise SystemExit(1)


def reading_report(reading, colour):
    """What a Reading says, how sure that is, and the canvas where there is one that fits a terminal: lines of text."""
    record, lines = reading.record, [reading.record["file"]]
    if len(reading.canvases) == 1 and reading.canvases[0][0].shape[1] <= 78:
        lines += draw(reading.canvases[0][0], colour)
    if not record["digits"]:                                                # say why
        return [*lines, f"  nothing: {reading.note}"]
    shares = [digit["confidence"] for digit in record["digits"]]
    unsure = [f"{digit['digit']} ({100 * digit['confidence']:.0f}%)" for digit in record["digits"]
              if digit["confidence"] < UNSURE]
    summary = f"{len(shares)} digit{'s' * (len(shares) > 1)} of about {record['digit_height']:.0f} px, "
    summary += f"{100 * sum(shares) / len(shares):.1f}% sure" + " on average" * (len(shares) > 1)
    if unsure:
        summary += f"; unsure: {', '.join(unsure)}"
    return [*lines, *(f"  {line}" for line in record["text"].split("\n")), f"  ({summary})"]


def attention_rows(model, canvases):
    """Rows of tiles for canvases with their logits: each canvas, and where each digit read on it looked."""
    empty, rows = None if model.config.cell == data.FRAME else model.config.num_classes - 1, []
    for canvas, logits in canvases:
        findings = compare(data.read(logits[None], empty)[0], None, empty)
        if details := attention_tiles(model, canvas, findings):
            rows.append([tile(canvas, findings, model.config.cell, "read"), *details])
    return rows


def in_rows(tiles):
    return [tiles[i:i + 4] for i in range(0, len(tiles), 4)]


def save_attention(flags, folder, attention):
    if attention:
        save_png(folder / "attention.png", sheet(attention))
    elif flags.attention:
        print("no attention.png: no digit was read")


class TestSet(NamedTuple):
    """Test canvases, and what a model reads on them."""
    layout: data.Layout
    canvases: torch.Tensor  # uint8 (n, H, W)
    truth: torch.Tensor     # classes of cells, int64 (n, gh, gw)
    logits: torch.Tensor    # float (n, gh, gw, classes)
    best: torch.Tensor      # the classes that are read in the cells, int64 (n, gh, gw)
    note: str               # a remark where the digits are not MNIST's

    def worst(self):
        """The canvases with mistakes, by number, worst first."""
        loss = F.cross_entropy(self.logits.flatten(0, 2), self.truth.flatten(), reduction="none")
        loss, wrong = loss.view(len(self.truth), -1).sum(1), (self.best != self.truth).flatten(1).any(1).nonzero()[:, 0]
        return wrong[loss[wrong].argsort(descending=True, stable=True)].tolist()

    def findings(self, i):
        """What is read on a canvas against the truth, as `compare` has it."""
        reading = data.read(self.logits[i:i + 1], self.layout.empty, self.layout.apart)[0]
        return compare(reading, self.truth[i], self.layout.empty)


def read_test_set(flags, checkpoint, model):
    """Read the test set: a TestSet."""
    kind = checkpoint["data"]
    given = {"size": flags.canvas_size, "max_digits": flags.max_digits, "min_distance": flags.min_distance}
    options = checkpoint["canvas"] | {name: value for name, value in given.items() if value is not None}
    images, labels, _ = data.load_digits(kind, flags.data_dir or checkpoint["settings"]["data_dir"], "test")
    layout = data.layout(checkpoint["phase"], images, labels, **options)
    canvases, truth = data.test_canvases(layout, images, labels, flags.test_canvases)
    note = "" if kind == "mnist" else f" ({kind} digits)"
    data.check_memory(12 * len(canvases) * layout.grid**2 * model.config.num_classes, "what the model reads on them")
    print(f"reading {len(canvases):,} test canvases of {canvases.shape[1]} x {canvases.shape[2]} px{note}", flush=True)
    logits = logits_of(model, canvases)
    best = torch.cat([data.decode(batch, layout.empty, layout.apart) for batch in logits.split(10_000)])
    return TestSet(layout, canvases, truth, logits, best, note)


def present(flags, folder, model, test):
    """Print test canvases and figures, and save the PNG files."""
    order = test.worst() if flags.mistakes else range(len(test.canvases))
    if flags.start >= len(order) > 0:
        raise ValueError(f"--start={flags.start}, but there are {len(order)} such canvases")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    tiles, attention = [], []
    for number, i in enumerate(order[flags.start:flags.start + (flags.count or 16)]):
        name, canvas, findings = f"test canvas {i}{test.note}", test.canvases[i], test.findings(i)
        tiles.append(tile(canvas, findings, model.config.cell, f"{name}: {verdict(findings)}"))
        if number < (flags.count or 4):
            print(f"\n{name}", *draw(canvas, colour), *describe(findings, colour), sep="\n")
            if flags.attention and (details := attention_tiles(model, canvas, findings)):
                attention.append([tiles[-1], *details])
    print(*figures(test.truth, test.best, test.layout.classes, test.note), "", sep="\n")
    if not tiles:
        return print("no sample.png: nothing is read wrong")
    save_png(folder / "sample.png", sheet(in_rows(tiles)))
    save_attention(flags, folder, attention)


# ---------------------------------------------------------------------------------------------------------------------
# The page: one HTML file that reads in a browser what is drawn on it. PAGE, below, is what it is made of.

SHOWN, CHECKED = 24, 8      # test canvases on the page, and those of them that bring torch's logits along
MOST_POINTS = 400           # of a curve
# What the arithmetic of the page knows: fields of ViTConfig, and parameters of ViT
PAGE_FIELDS = {"image_size", "patch_size", "overlap", "in_channels", "num_classes", "dim", "depth", "heads",
               "mlp_ratio", "dropout", "drop_path", "class_token", "cell", "positions", "window"}
PAGE_PARAMETERS = re.compile(r"cls_token|pos_embed|(patch_embed\.proj|norm|head"
                             r"|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)")


def write_page(flags, folder, checkpoint, model, test):
    """Save page.html: the model, what it reads on test canvases, and its run."""
    facts = {"model": model_facts(model, flags.page_dtype), **test_facts(test), **run_facts(folder, checkpoint, model)}
    page = page_of(facts).encode()
    data.write_whole(folder / "page.html", page)
    print(f"wrote {folder / 'page.html'} ({len(page) / 1e6:.1f} MB): open it in a browser and draw")


def page_of(facts):
    """The page as text. What the facts say can neither end their element nor run: <, > and & are escaped, and only the
    scripts and the style in PAGE have the hashes that the Content-Security-Policy names."""
    def hashes(tag):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    text = json.dumps(facts, allow_nan=False).translate({ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&"})
    return PAGE.replace("{{policy}}", policy).replace("{{facts}}", text)


def encode(tensor):
    """The values of a tensor, little-endian, as text in base64."""
    array = tensor.cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def model_facts(model, dtype):
    """A model for the page: its config, and its parameters' names, shapes and values, all in one order. ValueError
    for a model that the page would compute wrongly."""
    config, state = model.config, model.state_dict()
    strange = [f"{name}={value!r}" for name, value in asdict(config).items()
               if name not in PAGE_FIELDS and value != getattr(type(config), name, None)]
    strange += ["a class token with cells"] * (config.class_token and config.cell > 0)
    strange += [name for name in state if not PAGE_PARAMETERS.fullmatch(name)]
    if strange or config.in_channels != 1:
        raise ValueError(f"--page cannot compute this model: {', '.join(strange[:3]) or 'its images have colours'}")
    values = torch.cat([tensor.float().flatten() for tensor in state.values()]).to(getattr(torch, dtype))
    if not values.isfinite().all():
        raise ValueError(f"a weight is too large for {dtype}: try --page_dtype=float32")
    return {"config": asdict(config), "dtype": dtype, "weights": encode(values),
            "tensors": [(name, list(tensor.shape)) for name, tensor in state.items()]}


def test_facts(test):
    """What the page shows of a TestSet: figures, and some canvases, those with mistakes first."""
    worst = test.worst()[:3 * SHOWN // 4]
    right = (test.best == test.truth).flatten(1).all(1).nonzero()[:SHOWN - len(worst), 0].tolist()
    shown = worst + right
    findings = [test.findings(i) for i in shown]
    return {"size": test.layout.size, "empty": test.layout.empty, "apart": test.layout.apart, "note": test.note,
            "limits": {"HEIGHT": HEIGHT, "LOWEST": LOWEST, "UNSURE": UNSURE, "FAINT": FAINT},
            "figures": measure(test.truth, test.best, test.layout.classes),
            "canvases": [{"number": i, "verdict": verdict(found), "findings": found, "ink": encode(test.canvases[i])}
                         for i, found in zip(shown, findings)],
            "logits": [encode(test.logits[i].float()) for i in shown[:CHECKED]]}


def run_facts(folder, checkpoint, model):
    """What the page tells of a run: rows (title, text), and the points of its curves."""
    settings = checkpoint["settings"]
    rows = {"run": folder.resolve().name, "command": command_of(checkpoint), "seed": settings["seed"],
            "digits": checkpoint["data"], "device": str(checkpoint.get("device", settings["device"]))[:100],
            "training": f"{checkpoint['step']:,} steps of {settings['batch_size']:,} canvases in "
                        f"{checkpoint['train_seconds']:,.0f} s",
            "model": f"{model.config.num_parameters():,} parameters"}
    return {"run": [(title, str(text)) for title, text in rows.items()], "curves": points_of(folder / "metrics.jsonl")}


def command_of(checkpoint):
    """The command that trains as a checkpoint was trained. It names no folder: those are of another machine."""
    settings, kind = checkpoint["settings"], checkpoint["data"]
    usual = asdict(train.settle({"phase": checkpoint["phase"]}, {}))
    silent = {*train.NOT_OF_THE_RUN, "data_dir", "log_every", "save_every"}
    given = {name: value for name, value in settings.items() if name not in silent and value != usual[name]}
    given = {"phase": checkpoint["phase"], **({} if kind == "mnist" else {"data": kind}), **given}
    return " ".join(["python train.py", *(shlex.quote(f"--{name}={value}") for name, value in given.items())])


def points_of(path):
    """The points (step, value) of each of the CURVES in a metrics.jsonl, at most MOST_POINTS of each, which are means
    of those beside each other. Empty if the file does not exist."""
    curves = {}
    for (event, key), points in (metrics_of(path)[0] if path.exists() else {}).items():
        points = points[np.isfinite(points).all(1)][:, [0, 2]]
        each = -(-len(points) // MOST_POINTS) or 1
        parts = np.split(points, range(each, len(points), each))
        curves[f"{event} {key}"] = [part.mean(0).tolist() for part in parts if len(part)]
    return curves


PAGE = r'''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Draw digits and watch a small transformer read them</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ground: #f6f6f4; --paper: #fff; --text: #1c1d20; --quiet: #595d64; --line: #d6d7d3;
  --right: #1d5fbf; --wrong: #b3261e; --heat: 242, 107, 12; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #141517; --paper: #1e2023; --text: #ececea; --quiet: #a6abb2; --line: #383b40;
    --right: #8ab4ff; --wrong: #ff9d90; --heat: 255, 140, 40; }
  canvas.ink, #ink { filter: invert(1); }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: clamp(1.5rem, 5vw, 2.25rem); line-height: 1.2; letter-spacing: -0.02em; }
h2 { margin: 0 0 0.5rem; font-size: 1.125rem; }
p { margin: 0 0 0.75rem; }
header { margin-bottom: 1.5rem; }
section { margin-bottom: 3rem; }
.quiet, header p { color: var(--quiet); }
.quiet { font-size: 0.875rem; max-width: 44rem; }
.warning { border-left: 4px solid var(--wrong); padding-left: 0.75rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
:focus-visible, .button:focus-within { outline: 3px solid var(--right); outline-offset: 2px; }

.try { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: minmax(0, 1fr); }
.paper { position: relative; aspect-ratio: 1; background: var(--paper); border: 1px solid var(--line);
  border-radius: 0.75rem; overflow: hidden; cursor: crosshair; touch-action: none; user-select: none; }
.paper.lined { background-image: linear-gradient(var(--line) 1px, transparent 1px),
  linear-gradient(90deg, var(--line) 1px, transparent 1px); background-size: calc(100% / var(--cells))
  calc(100% / var(--cells)); background-position: -1px -1px; }
.paper.over { border-color: var(--right); box-shadow: 0 0 0 3px var(--right); }
.paper canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
#hint { position: absolute; inset: 0; display: grid; place-items: center; margin: 0; padding: 1rem; text-align: center;
  font-size: 1.25rem; color: var(--quiet); pointer-events: none; }
.frame { position: absolute; border: 2px solid var(--right); border-radius: 4px; pointer-events: none; }
.frame.wrong { border: 2px dashed var(--wrong); }
.frame.chosen { box-shadow: 0 0 0 2px var(--right); }
.frame span { position: absolute; left: -2px; bottom: 100%; padding: 0 0.3rem; font: 600 0.75rem/1.3 system-ui;
  white-space: nowrap; color: var(--paper); background: var(--right); border-radius: 4px; }
.frame.wrong span { background: var(--wrong); }
.frame.high span { bottom: auto; top: -2px; }
.tools { display: flex; flex-wrap: wrap; gap: 0.5rem 0.75rem; align-items: center; margin-top: 0.75rem;
  font-size: 0.875rem; }
.tools label { display: inline-flex; gap: 0.4rem; align-items: center; min-height: 2.5rem; }
.tools input[type=range] { width: 6rem; accent-color: var(--right); }
button, .button, select { min-height: 2.5rem; padding: 0 0.9rem; border: 1px solid var(--line); border-radius: 0.5rem;
  background: var(--paper); color: inherit; font: inherit; cursor: pointer; }
select { padding: 0 0.5rem; }
button:hover, .button:hover { border-color: var(--right); }

.answer { min-height: 19rem; }
#text { min-height: 2.6rem; margin: 0 0 0.5rem; font-size: 2.25rem; line-height: 1.15; font-weight: 600;
  letter-spacing: 0.06em; font-variant-numeric: tabular-nums; white-space: pre-wrap; overflow-wrap: anywhere; }
#digits { display: flex; flex-wrap: wrap; gap: 0.5rem; min-height: 2.5rem; margin: 0 0 0.75rem; padding: 0;
  list-style: none; }
#digits button { font-variant-numeric: tabular-nums; }
#digits button.wrong { border: 2px dashed var(--wrong); }
#told { min-height: 1.5em; }
#canvases { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
#canvases button { display: flex; flex-direction: column; align-items: stretch;
  padding: 0.4rem; text-align: left; font-size: 0.8125rem; line-height: 1.35; }
#canvases .paper { cursor: pointer; border-radius: 0.25rem; margin-bottom: 0.4rem; touch-action: auto; }
#canvases .frame span { font-size: 0.625rem; padding: 0 0.2rem; }
#canvases canvas { image-rendering: pixelated; }
#canvases .bad { color: var(--wrong); font-weight: 600; }
.pair { display: grid; gap: 2rem; grid-template-columns: minmax(0, 1fr); }
.pair > div { min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.8125rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding-bottom: 0.5rem; }
th, td { padding: 0.25rem 0.45rem; text-align: right; white-space: nowrap; }
thead th, tbody th { color: var(--quiet); font-weight: 600; }
td.same { background: color-mix(in srgb, var(--right) 22%, transparent); font-weight: 600; }
td.other { background: color-mix(in srgb, var(--wrong) calc(var(--share) * 40%), transparent); }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: 0.875rem; margin-bottom: 0.25rem; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--quiet); }
svg .axis { stroke: var(--line); }
svg .line { fill: none; stroke: var(--right); stroke-width: 1.75; stroke-linejoin: round; }
svg .line1 { stroke: var(--wrong); stroke-dasharray: 6 4; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.35rem 1.25rem; margin: 1.5rem 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
code, dd.code { font: 0.875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (min-width: 52rem) {
  body { padding: 3rem 2rem 5rem; }
  .try { grid-template-columns: minmax(0, 32rem) minmax(0, 1fr); }
  #curves { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
}
@media (min-width: 70rem) { section.pair { grid-template-columns: fit-content(70%) minmax(0, 1fr); } }
@media (prefers-reduced-motion: no-preference) { button, .button, .paper { transition: border-color 0.15s; } }
</style>
<header>
  <h1>Draw some digits</h1>
  <p>A small Vision Transformer reads them as you draw. It is all in this file: nothing is loaded, nothing is sent.</p>
</header>
<main>
  <section class="try" aria-label="Draw and read">
    <div>
      <div id="pad" class="paper">
        <canvas id="ink" width="960" height="960" role="img" aria-label="Drawing pad"></canvas>
        <canvas id="heat" width="960" height="960" aria-hidden="true"></canvas>
        <div id="frames" aria-hidden="true"></div>
        <p id="hint"></p>
      </div>
      <div class="tools">
        <button id="undo" title="Ctrl+Z">Undo</button>
        <button id="clear" title="Delete">Clear</button>
        <label class="button">Open a picture<input id="file" type="file" accept="image/*" class="unseen"></label>
        <label>Pen <input id="pen" type="range" min="1.5" max="4" step="0.1" value="2.3"></label>
        <label id="sizes">Pad <select id="size"></select></label>
        <label>Read <select id="way">
          <option value="">each digit by itself</option>
          <option value="whole">the pad as it is</option>
        </select></label>
      </div>
    </div>
    <div class="answer">
      <h2>What it reads</h2>
      <p id="text" aria-live="polite"></p>
      <ul id="digits" aria-label="Digits read, with confidence"></ul>
      <p id="told" class="quiet"></p>
      <p class="quiet">Point at a digit, or tap it, to see where the model looked. Each digit is first brought to the
        size of those it was trained on; <em>the pad as it is</em> skips that. You can also drop or paste a picture of
        digits. For photographs and whole pages, <code>sample.py --image</code> reads more.</p>
    </div>
  </section>
  <section>
    <h2>How well it reads</h2>
    <p id="score"></p>
    <p id="kind" class="warning" hidden></p>
    <p class="quiet">Some test canvases, mistakes first. Solid frames are right, dashed ones wrong.
      Choose a canvas to put it on the pad.</p>
    <div id="canvases"></div>
  </section>
  <section class="pair">
    <div>
      <h2>What it mistakes for what</h2>
      <div class="wide" tabindex="0" role="region" aria-label="Confusion matrix"><table id="confusion"></table></div>
    </div>
    <div>
      <h2>By number of digits</h2>
      <div class="wide" tabindex="0" role="region" aria-label="Accuracy by number of digits">
        <table id="counts"></table></div>
    </div>
  </section>
  <section>
    <h2>How it learned</h2>
    <div class="pair" id="curves"></div>
    <dl id="run"></dl>
    <p id="check" class="quiet">Checking the arithmetic of this page …</p>
  </section>
</main>
<script type="application/json" id="facts">{{facts}}</script>
<script>
"use strict";
// The model: vit.py, and to_input and read of data.py, in the same order and by the same names. A matrix is the
// Float64Array of its rows, one after the other; comments give its (rows, columns). A canvas is {ink, height, width}
// with a byte a px. Nothing here knows the page, so that it runs elsewhere too.

// Base64 text -> the numbers of that dtype
function numbers(text, dtype) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  if (dtype === "uint8") return bytes;
  if (dtype === "float32") return Float64Array.from(new Float32Array(bytes.buffer));
  const half = new Float64Array(65536);                 // the value of each pattern of 16 bits
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = bits >> 10 & 31, fraction = bits & 1023;
    half[bits] = (bits >> 15 ? -1 : 1) * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
  }
  return Float64Array.from(new Uint16Array(bytes.buffer), bits => half[bits]);
}

// Row by row the angles by which rotary positions turn the pairs of channels of a head: (prefix + N, headDim / 2)
function rotaryTable(rows, columns, headDim, prefix) {
  const half = headDim / 2, quarter = headDim / 4, angles = new Float64Array((prefix + rows * columns) * half);
  for (let i = 0; i < rows * columns; i++) {
    for (let f = 0; f < quarter; f++) {
      const frequency = 100 ** -(f / Math.max(quarter - 1, 1)), at = (prefix + i) * half + f;
      angles[at] = Math.floor(i / columns) * frequency;
      angles[at + quarter] = i % columns * frequency;
    }
  }
  return {cos: angles.map(Math.cos), sin: angles.map(Math.sin)};
}

// Turn the pairs of channels (i, i + half) of x (N, headDim)
function rotate(x, {cos, sin}, half) {
  for (let i = 0; i < cos.length; i++) {
    const at = 2 * i - i % half, first = x[at], second = x[at + half];
    x[at] = first * cos[i] - second * sin[i];
    x[at + half] = second * cos[i] + first * sin[i];
  }
}

// For each cell of a grid, the cells at most `window` rows and columns from it
function cellsAround(rows, columns, window) {
  const cells = Int32Array.from({length: rows * columns}, (_, i) => i), row = i => Math.floor(i / columns);
  const near = (i, j) => Math.abs(row(i) - row(j)) <= window && Math.abs(i % columns - j % columns) <= window;
  return Array.from(cells, i => cells.filter(j => near(i, j)));
}

// The tokens that each token attends to: what window_bias allows
function windowKeys(rows, columns, window, prefix) {
  const all = Int32Array.from({length: prefix + rows * columns}, (_, i) => i);
  if (!window) return Array.from(all, () => all);
  return [...all.subarray(0, prefix)].map(() => all).concat(cellsAround(rows, columns, window).map(cells =>
    Int32Array.of(...all.subarray(0, prefix), ...cells.map(i => prefix + i))));
}

// Bicubic and anti-aliased interpolation from `from` to `to` points, as torch has it (a = -0.5): weights (to, from)
function bicubic(from, to) {
  const weights = new Float64Array(to * from), scale = from / to, wide = Math.max(scale, 1);
  const cubic = x => x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  for (let i = 0; i < to; i++) {
    const row = weights.subarray(i * from, (i + 1) * from), centre = (i + 0.5) * scale;
    for (let j = 0; j < from; j++) row[j] = cubic(Math.abs(j + 0.5 - centre) / wide);
    const sum = row.reduce((a, b) => a + b);
    for (let j = 0; j < from; j++) row[j] /= sum;
  }
  return weights;
}

// Learned positions (prefix + grid * grid, dim) -> (prefix + rows * columns, dim)
function resamplePositions(positions, prefix, rows, columns, dim) {
  const grid = Math.round(Math.sqrt(positions.length / dim - prefix)), start = prefix * dim;
  if (rows === grid && columns === grid) return positions;
  const byRow = bicubic(grid, rows), byColumn = bicubic(grid, columns);
  const out = new Float64Array((prefix + rows * columns) * dim);
  out.set(positions.subarray(0, start));
  for (let r = 0; r < rows; r++) for (let g = 0; g < grid; g++) for (let c = 0; c < columns; c++) {
    for (let h = 0; h < grid; h++) {
      const weight = byRow[r * grid + g] * byColumn[c * grid + h];
      const to = start + (r * columns + c) * dim, from = start + (g * grid + h) * dim;
      for (let d = 0; weight && d < dim; d++) out[to + d] += weight * positions[from + d];
    }
  }
  return out;
}

// x (rows, inner), weight (outer, inner) -> (rows, outer). Two rows by four outputs share what they load; at the
// edges the last ones are computed again instead.
function linear(x, weight, bias) {
  const outer = bias.length, inner = weight.length / outer, rows = x.length / inner;
  const y = new Float64Array(rows * outer);
  for (let o = 0; o < outer; o += 4) {
    const o1 = Math.min(o + 1, outer - 1), o2 = Math.min(o + 2, outer - 1), o3 = Math.min(o + 3, outer - 1);
    const w0 = o * inner, w1 = o1 * inner, w2 = o2 * inner, w3 = o3 * inner;
    for (let r = 0; r < rows; r += 2) {
      const s = Math.min(r + 1, rows - 1), x0 = r * inner, x1 = s * inner, to = r * outer, next = s * outer;
      let a0 = bias[o], a1 = bias[o1], a2 = bias[o2], a3 = bias[o3], b0 = a0, b1 = a1, b2 = a2, b3 = a3;
      for (let i = 0; i < inner; i++) {
        const a = x[x0 + i], b = x[x1 + i];
        const k0 = weight[w0 + i], k1 = weight[w1 + i], k2 = weight[w2 + i], k3 = weight[w3 + i];
        a0 += a * k0; a1 += a * k1; a2 += a * k2; a3 += a * k3;
        b0 += b * k0; b1 += b * k1; b2 += b * k2; b3 += b * k3;
      }
      y[to + o] = a0; y[to + o1] = a1; y[to + o2] = a2; y[to + o3] = a3;
      y[next + o] = b0; y[next + o1] = b1; y[next + o2] = b2; y[next + o3] = b3;
    }
  }
  return y;
}

function layerNorm(x, weight, bias) {
  const dim = weight.length, y = new Float64Array(x.length);
  for (let start = 0; start < x.length; start += dim) {
    let sum = 0, squares = 0;
    for (let d = 0; d < dim; d++) sum += x[start + d];
    for (let d = 0; d < dim; d++) squares += (x[start + d] - sum / dim) ** 2;
    const scale = 1 / Math.sqrt(squares / dim + 1e-6);
    for (let d = 0; d < dim; d++) y[start + d] = (x[start + d] - sum / dim) * scale * weight[d] + bias[d];
  }
  return y;
}

// The normal distribution function from -8 to 8, 1,024 steps to 1: integrated once, by Simpson's rule. Linear
// interpolation between the steps is right to 3e-8.
const NORMAL = new Float64Array(16 * 1024 + 2);
for (let i = 1; i < NORMAL.length; i++) {
  const density = x => Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI), x = i / 1024 - 8, step = 1 / 1024;
  NORMAL[i] = NORMAL[i - 1] + step / 6 * (density(x - step) + 4 * density(x - step / 2) + density(x));
}

// In place
function gelu(x) {
  for (let i = 0; i < x.length; i++) {
    const place = (x[i] + 8) * 1024, step = Math.floor(place);
    if (place <= 0) x[i] = 0;
    else if (step < 16 * 1024) x[i] *= NORMAL[step] + (place - step) * (NORMAL[step + 1] - NORMAL[step]);
  }
  return x;
}

// x (rows, width) -> its columns from `from` on, `count` of them, times a factor: (rows, count)
function columnsOf(x, width, from, count, factor) {
  const y = new Float64Array(x.length / width * count);
  for (let start = from, to = 0; start < x.length; start += width) {
    for (let i = 0; i < count; i++) y[to++] = factor * x[start + i];
  }
  return y;
}

// One head: q, k, v (N, D) -> written into columns `column` on of y (N, dim). map (N, N) gets `share` of the weights.
// Four keys, and then four channels, share what they load; at the edges the last ones are computed again instead.
function attend(q, k, v, D, keysOf, y, dim, column, map, share) {
  const N = q.length / D, weights = new Float64Array(N);
  for (let i = 0; i < N; i++) {
    const keys = keysOf[i], last = keys.length - 1;
    let largest = -Infinity, sum = 0;
    for (let n = 0; n <= last; n += 4) {
      const n1 = Math.min(n + 1, last), n2 = Math.min(n + 2, last), n3 = Math.min(n + 3, last);
      const k0 = keys[n] * D, k1 = keys[n1] * D, k2 = keys[n2] * D, k3 = keys[n3] * D, from = i * D;
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let d = 0; d < D; d++) {
        const each = q[from + d];
        s0 += each * k[k0 + d]; s1 += each * k[k1 + d]; s2 += each * k[k2 + d]; s3 += each * k[k3 + d];
      }
      weights[n] = s0; weights[n1] = s1; weights[n2] = s2; weights[n3] = s3;
      largest = Math.max(largest, s0, s1, s2, s3);
    }
    for (let n = 0; n <= last; n++) sum += weights[n] = Math.exp(weights[n] - largest);
    for (let n = 0; map && n <= last; n++) map[i * N + keys[n]] += share * weights[n] / sum;
    for (let d = 0; d < D; d += 4) {
      const d1 = Math.min(d + 1, D - 1), d2 = Math.min(d + 2, D - 1), d3 = Math.min(d + 3, D - 1);
      let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (let n = 0; n <= last; n++) {
        const each = weights[n], from = keys[n] * D;
        s0 += each * v[from + d]; s1 += each * v[from + d1]; s2 += each * v[from + d2]; s3 += each * v[from + d3];
      }
      const to = i * dim + column;
      y[to + d] = s0 / sum; y[to + d1] = s1 / sum; y[to + d2] = s2 / sum; y[to + d3] = s3 / sum;
    }
  }
}

class ViT {
  constructor({config, dtype, tensors, weights}) {
    const values = numbers(weights, dtype);
    this.config = config;
    this.weights = {};
    this.side = config.cell || config.image_size;       // px of a canvas that get one label
    let start = 0;
    for (const [name, shape] of tensors) {
      this.weights[name] = values.subarray(start, start += shape.reduce((a, b) => a * b, 1));
    }
  }

  linear(x, name) { return linear(x, this.weights[name + ".weight"], this.weights[name + ".bias"]); }

  norm(x, name) { return layerNorm(x, this.weights[name + ".weight"], this.weights[name + ".bias"]); }

  // A canvas -> tokens (N, dim) in reading order: one linear projection of every patch
  patchEmbedding({ink, height, width}, rows, columns) {
    const {patch_size: stride, overlap} = this.config, side = stride + 2 * overlap;
    const patches = new Float64Array(rows * columns * side * side);
    for (let i = 0, to = 0; i < rows * columns; i++) {
      const top = Math.floor(i / columns) * stride - overlap, left = i % columns * stride - overlap;
      for (let y = top; y < top + side; y++) for (let x = left; x < left + side; x++, to++) {
        const value = y >= 0 && y < height && x >= 0 && x < width ? ink[y * width + x] : 0;
        patches[to] = (value / 255 + Math.sign(value)) / (2 * 0.34);    // to_input
      }
    }
    return this.linear(patches, "patch_embed.proj");
  }

  attention(x, name, rotary, keys, maps) {
    const {dim, heads} = this.config, D = dim / heads, N = x.length / dim, y = new Float64Array(x.length);
    const qkv = this.linear(x, name + ".qkv"), map = maps && new Float32Array(N * N);       // (N, 3 * dim)
    for (let head = 0; head < heads; head++) {
      const [q, k, v] = [D ** -0.5, 1, 1].map((factor, i) => columnsOf(qkv, 3 * dim, i * dim + head * D, D, factor));
      if (rotary) [q, k].forEach(each => rotate(each, rotary, D / 2));
      attend(q, k, v, D, keys, y, dim, head * D, map, 1 / heads);
    }
    if (maps) maps.push(map);
    return this.linear(y, name + ".proj");
  }

  mlp(x, name) { return this.linear(gelu(this.linear(x, name + ".fc1")), name + ".fc2"); }

  block(x, name, rotary, keys, maps) {
    const add = branch => branch.forEach((value, i) => { x[i] += value; });
    add(this.attention(this.norm(x, name + ".norm1"), name + ".attn", rotary, keys, maps));
    add(this.mlp(this.norm(x, name + ".norm2"), name + ".mlp"));
  }

  // A canvas -> logits (labels, classes), cell by cell in reading order
  forward(canvas) {
    const {dim} = this.config, x = this.forwardFeatures(canvas), labels = this.tokensOf(canvas);
    const means = new Float64Array(labels.length * dim);
    labels.forEach((tokens, label) => {
      for (const token of tokens) for (let d = 0; d < dim; d++) {
        means[label * dim + d] += x[token * dim + d] / tokens.length;
      }
    });
    return this.linear(means, "head");
  }

  // Normalised tokens (N, dim), the class token first. Blocks append their attention (N, N), the mean over heads.
  forwardFeatures(canvas, maps) {
    const {dim, depth, heads, patch_size, positions, window, class_token} = this.config, prefix = Number(class_token);
    const rows = canvas.height / patch_size, columns = canvas.width / patch_size;
    let x = this.patchEmbedding(canvas, rows, columns), rotary = null;
    if (class_token) x = Float64Array.of(...this.weights.cls_token, ...x);
    if (positions === "learned") {
      const table = resamplePositions(this.weights.pos_embed, prefix, rows, columns, dim);
      x.forEach((value, i) => { x[i] = value + table[i]; });
    } else rotary = rotaryTable(rows, columns, dim / heads, prefix);
    const keys = windowKeys(rows, columns, window, prefix);
    for (let i = 0; i < depth; i++) this.block(x, `blocks.${i}`, rotary, keys, maps);
    return this.norm(x, "norm");
  }

  // The tokens that each label is read from: those of its cell, the class token, or all
  tokensOf({height, width}) {
    const {cell, patch_size, class_token} = this.config, rows = height / patch_size, columns = width / patch_size;
    if (class_token) return [[0]];
    const across = cell ? width / cell : 1, labels = Array.from({length: cell ? across * height / cell : 1}, () => []);
    for (let i = 0; i < rows * columns; i++) {
      const row = Math.floor(i / columns), column = i % columns, k = cell ? cell / patch_size : Infinity;
      labels[Math.floor(row / k) * across + Math.floor(column / k)].push(i);
    }
    return labels;
  }

  // How much a label attends to each patch (rows * columns), relative to the largest: attention rollout (Abnar 2020).
  // Of the product of the blocks' maps only one row is needed, so a vector goes through them, last block first.
  rollout(canvas, label) {
    const maps = [], N = this.forwardFeatures(canvas, maps).length / this.config.dim;
    const tokens = this.tokensOf(canvas)[label];
    let row = new Float64Array(N);
    for (const token of tokens) row[token] = 1 / tokens.length;
    for (const map of maps.reverse()) {
      const next = row.map(value => value / 2);
      for (let i = 0; i < N; i++) for (let j = 0; row[i] && j < N; j++) next[j] += row[i] * map[i * N + j] / 2;
      row = next;
    }
    row = row.subarray(Number(this.config.class_token));
    const largest = row.reduce((a, b) => Math.max(a, b));
    return row.map(value => value / largest);
  }
}

function softmax(logits, classes) {
  const shares = new Float64Array(logits.length);
  for (let start = 0; start < logits.length; start += classes) {
    const row = logits.subarray(start, start + classes), largest = Math.max(...row);
    const sum = row.reduce((total, value) => total + Math.exp(value - largest), 0);
    row.forEach((value, i) => { shares[start + i] = Math.exp(value - largest) / sum; });
  }
  return shares;
}

// Shares (cells, k), summed for each cell over the cells near it
function around(share, near, k) {
  const sums = new Float64Array(share.length);
  near.forEach((cells, cell) => {
    for (const other of cells) for (let i = 0; i < k; i++) sums[cell * k + i] += share[other * k + i];
  });
  return sums;
}

// The place of the largest value in a row of a matrix
function argmax(x, row, width) {
  let best = row * width;
  for (let i = best + 1; i < (row + 1) * width; i++) if (x[i] > x[best]) best = i;
  return best - row * width;
}

// The class of each cell, decided jointly: see decode in data.py. near: the cells around each that one digit may give
// its share to; taken: those where there is no second digit.
function decode(share, near, taken, classes, empty) {
  const labels = near.map(() => empty);
  if (empty === null) return labels.map((_, cell) => argmax(share, cell, classes));
  const digits = share.filter((_, i) => i % classes < empty), best = around(digits, near, empty);
  const left = Float64Array.from(labels, (_, cell) =>
    digits.subarray(cell * empty, (cell + 1) * empty).reduce((a, b) => a + b));
  for (;;) {
    const sums = around(left, near, 1), sure = left.map((value, cell) => sums[cell] > 0.5 ? value : 0);
    const cell = argmax(sure, 0, labels.length);
    if (!(sure[cell] > 0)) return labels;
    labels[cell] = argmax(best, cell, empty);
    for (const done of taken[cell]) left[done] = 0;
  }
}

// A canvas -> [{digit, cell, row, column, confidence}, ...] in reading order
function read(model, canvas, empty, apart = 2) {
  const {cell: side, num_classes: classes} = model.config, columns = side ? canvas.width / side : 1;
  const [near, taken] = [Math.min(apart, 2), apart].map(n =>
    cellsAround(side ? canvas.height / side : 1, columns, n - 1));
  const shares = softmax(model.forward(canvas), classes), labels = decode(shares, near, taken, classes, empty);
  const sure = empty === null ? shares : around(shares, near, classes);
  return labels.map((digit, cell) => ({digit, cell, row: Math.floor(cell / columns), column: cell % columns,
    confidence: Math.min(sure[cell * classes + digit], 1)})).filter(({digit}) => digit !== empty);
}
</script>
<script>
"use strict";
// The page: a pad, what is read on it, and the figures of the run. Places and sizes on the pad are shares of its side.
// Ink is black, and its alpha says how much of it there is: so the style can turn it white.

const facts = JSON.parse(document.getElementById("facts").textContent), model = new ViT(facts.model);
const {HEIGHT, LOWEST, UNSURE, FAINT} = facts.limits, {empty} = facts;
const FINE = 512;                                   // px that the pad's ink is cut into pieces at
const INK = 77;                                     // of 255: what is less is not part of a piece
const by = id => document.getElementById(id);
const percent = share => `${(100 * share).toFixed(1)}%`;
const share = (part, whole) => whole ? `${(100 * part / whole).toFixed(2)}%` : "–";     // as in the terminal
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const median = values => values.sort((a, b) => a - b)[values.length >> 1];
const total = values => values.reduce((a, b) => a + b, 0);

function element(name, options = {}, ...children) {
  const made = Object.assign(document.createElement(name), options);
  made.append(...children);
  return made;
}

// ---- Ink

function context(width, height) {
  return element("canvas", {width, height}).getContext("2d", {willReadFrequently: true});
}

// The ink, a byte a px, of what is drawn into a context of that size, without what is fainter than `least`
function inkOf(width, height, draw, least = FAINT) {
  const into = context(width, height);
  draw(into);
  return into.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 === 3).map(a => a > least ? a : 0);
}

// The other way: a canvas with that ink
function pictureOf(ink, width, height) {
  const into = context(width, height), image = into.createImageData(width, height);
  ink.forEach((value, i) => { image.data[4 * i + 3] = value; });
  into.putImageData(image, 0, 0);
  return into.canvas;
}

// Half the size until a browser's interpolation, of 2 x 2 px, leaves nothing out
function drawShrunk(into, picture, left, top, side) {
  for (let half = picture.width / 2; half > side; half /= 2) {
    const smaller = context(half, half);
    smaller.drawImage(picture, 0, 0, half, half);
    picture = smaller.canvas;
  }
  into.drawImage(picture, left, top, side, side);
}

// Strokes are lists of points [x, y]; `side` px of the context are the pad's 1, and its corner is at (left, top)
function paint(into, strokes, side, width, left = 0, top = 0) {
  into.lineCap = into.lineJoin = "round";
  into.lineWidth = width;
  for (const stroke of strokes) {
    into.beginPath();
    for (const [x, y] of stroke) into.lineTo(left + x * side, top + y * side);
    into.stroke();
  }
}

function paintPad(into, side) {
  into.imageSmoothingEnabled = !pad.whole;          // a test canvas shows its px
  if (pad.picture) into.drawImage(pad.picture, 0, 0, side, side);
  paint(into, pad.strokes, side, pen() / pad.size * side);
}

// ---- Pieces: what touches is one, and so is what is drawn as one digit

// Ink of the pad -> its pieces, and for each px the number of its piece, from 1, or 0
function piecesOf(fine) {
  const label = new Uint32Array(fine.length), pieces = [], stack = [];
  for (let start = 0; start < fine.length; start++) {
    if (fine[start] < INK || label[start]) continue;
    const number = pieces.length + 1, visit = i => { label[i] = number; stack.push(i); };
    let left = FINE, top = FINE, right = 0, bottom = 0;
    for (visit(start); stack.length;) {
      const i = stack.pop(), x = i % FINE, y = Math.floor(i / FINE);
      left = Math.min(left, x); right = Math.max(right, x + 1);
      top = Math.min(top, y); bottom = Math.max(bottom, y + 1);
      for (let v = Math.max(0, y - 1); v < Math.min(FINE, y + 2); v++) {
        for (let u = Math.max(0, x - 1); u < Math.min(FINE, x + 2); u++) {
          if (fine[v * FINE + u] >= INK && !label[v * FINE + u]) visit(v * FINE + u);
        }
      }
    }
    pieces.push({numbers: [number], left: left / FINE, top: top / FINE, right: right / FINE, bottom: bottom / FINE});
  }
  return {fine, label, pieces};
}

const tall = box => box.bottom - box.top, wide = box => box.right - box.left;
const middle = box => [(box.left + box.right) / 2, (box.top + box.bottom) / 2];

function union(a, b) {
  return {numbers: [...a.numbers, ...b.numbers], left: Math.min(a.left, b.left), top: Math.min(a.top, b.top),
    right: Math.max(a.right, b.right), bottom: Math.max(a.bottom, b.bottom)};
}

// The height of digits among pieces: of those that are not much lower than the highest
function usualHeight(pieces) {
  const heights = pieces.map(tall), least = LOWEST * Math.max(...heights);
  return median(heights.filter(height => height >= least));
}

// Whether two pieces are one digit: the second stroke of a 4 beside the first, or the bar of a 5, which is low
function belong(a, b, usual) {
  const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top), low = Math.min(tall(a), tall(b));
  return across > 0.5 * Math.min(wide(a), wide(b)) && down > 0.2 * low ||
    low < LOWEST * usual && across > -0.1 * usual && down > -0.1 * usual;
}

function joined(pieces, usual) {
  return pieces.reduce((whole, piece) => {
    for (let i; (i = whole.findIndex(other => belong(piece, other, usual))) >= 0;) {
      piece = union(piece, whole.splice(i, 1)[0]);
    }
    return [...whole, piece];
  }, []);
}

// ---- From the pad to canvases, and what the model reads on them

// A piece on a canvas of its own, with the point (x, y) of the pad in the middle and `side` px to the pad's 1. Strokes
// are drawn anew, as wide as the pen is; a picture is resized.
function cut(piece, {fine, label}, width, height, side, [x, y]) {
  const left = width / 2 - x * side, top = height / 2 - y * side, mine = i => piece.numbers.includes(label[i]);
  const at = part => clamp(Math.floor(part * FINE), 0, FINE - 1);
  const ink = inkOf(width, height, into => {
    const picture = pad.picture && pictureOf(fine.map((value, i) => mine(i) ? value : 0), FINE, FINE);
    if (picture) drawShrunk(into, picture, left, top, side);
    paint(into, pad.strokes.filter(([[u, v]]) => mine(at(v) * FINE + at(u))), side, pen(), left, top);
  });
  return {canvas: {ink, width, height}, place: {left: -left / side, top: -top / side, side}};
}

// px of a canvas for the pad's 1, so that ink of that extent becomes `size` px. A pen stays as wide as it is.
function scaleTo(size, extent) {
  const own = pad.strokes.length ? pen() : 0;
  return (size - own) / Math.max(extent - own / pad.size, 1 / pad.size);
}

// In the middle of a cell, as canvas_of in sample.py
function canvasOf(piece, usual, inks) {
  const own = wide(piece) > 1.3 * tall(piece) ? tall(piece) : Math.max(tall(piece), wide(piece)), cell = model.side;
  const side = scaleTo(HEIGHT, clamp(own, 0.5 * usual, 1.7 * usual));
  const [width, height] = [wide(piece), tall(piece)].map(extent =>
    cell * Math.max(7, Math.ceil((extent * side + HEIGHT + cell) / cell) | 1));
  return cut(piece, inks, width, height, side, middle(piece));
}

// Fitted into 20 x 20 px of MNIST's 28, with its mass in the middle, as as_mnist in sample.py
function asMnist(piece, frame, inks) {
  const side = scaleTo(HEIGHT * frame / 28, Math.max(tall(piece), wide(piece))), [x, y] = middle(piece);
  const {ink} = cut(piece, inks, frame, frame, side, [x, y]).canvas, mass = total(ink) || 1;
  const off = step => Math.round(ink.reduce((sum, value, i) => sum + value * step(i), 0) / mass + 0.5 - frame / 2);
  return cut(piece, inks, frame, frame, side,
    [x + off(i => i % frame) / side, y + off(i => Math.floor(i / frame)) / side]);
}

const known = new Map();                            // readings of canvases: a stroke changes one of them

function reading(canvas, apart) {
  const key = `${apart} ${canvas.width} ${canvas.ink.join()}`;
  if (known.size > 100) known.clear();
  if (!known.has(key)) known.set(key, read(model, canvas, empty, apart));
  return known.get(key).map(found => ({...found, canvas}));
}

// A cell of a canvas that lies at a place of the pad, as a box
function cellBox({row, column}, {left, top, side}) {
  const each = model.side / side;
  return {left: left + column * each, top: top + row * each,
    right: left + (column + 1) * each, bottom: top + (row + 1) * each};
}

// The pad as one canvas. A test canvas on it comes px by px.
function readWhole() {
  const size = pad.size, place = {left: 0, top: 0, side: size};
  const ink = inkOf(size, size, into => paintPad(into, size), pad.picture ? 0 : FAINT);
  return reading({ink, width: size, height: size}, facts.apart)
    .map(found => ({...found, place, box: cellBox(found, place)}));
}

// Digits anywhere: each piece by itself
function readPieces(inks) {
  const pieces = joined(inks.pieces, usualHeight(inks.pieces)), usual = usualHeight(pieces);
  return pieces.filter(piece => tall(piece) >= LOWEST * usual).flatMap(piece => {
    const {canvas, place} = canvasOf(piece, usual, inks), found = reading(canvas, 2), half = HEIGHT / 2 / place.side;
    return found.map(digit => {
      const [x, y] = middle(cellBox(digit, place));
      const part = {left: Math.max(piece.left, x - half), top: Math.max(piece.top, y - half),
        right: Math.min(piece.right, x + half), bottom: Math.min(piece.bottom, y + half)};
      return {...digit, place, box: found.length > 1 ? part : piece};
    });
  });
}

// A digit in every cell of a grid: what lies in it is sized and centred
function readGrid(inks) {
  const frame = model.side, grid = pad.size / frame, ink = new Uint8Array(pad.size ** 2), cells = new Map();
  for (const piece of inks.pieces) {
    const [column, row] = middle(piece).map(part => Math.floor(part * grid)), cell = row * grid + column;
    cells.set(cell, [...cells.get(cell) ?? [], piece]);
  }
  for (const [cell, pieces] of cells) {
    const size = piece => Math.max(tall(piece), wide(piece)), largest = Math.max(...pieces.map(size));
    const box = pieces.filter(piece => size(piece) > 0.15 * largest).reduce(union);     // without specks
    const {canvas, place} = asMnist(box, frame, inks);
    const left = cell % grid * frame, top = Math.floor(cell / grid) * frame;
    for (let y = 0; y < frame; y++) {
      ink.set(canvas.ink.subarray(y * frame, (y + 1) * frame), (top + y) * pad.size + left);
    }
    cells.set(cell, {box, place: {...place, left: place.left - left / place.side, top: place.top - top / place.side}});
  }
  return reading({ink, width: pad.size, height: pad.size}, facts.apart).filter(({cell}) => cells.has(cell))
    .map(found => ({...found, ...cells.get(found.cell)}));
}

function readPad() {
  if (blank()) return [];
  if (pad.whole) return readWhole();
  const inks = piecesOf(inkOf(FINE, FINE, into => paintPad(into, FINE)));
  return !inks.pieces.length ? [] : empty === null ? readGrid(inks) : readPieces(inks);
}

// Digits -> lists of them, one for each line as written, as lines_of in sample.py
function linesOf(digits) {
  const height = median(digits.map(({box}) => tall(box))), lines = [];
  const x = ({box}) => middle(box)[0], y = ({box}) => middle(box)[1];
  for (const digit of [...digits].sort((a, b) => x(a) - x(b))) {
    const away = line => Math.abs(y(line[line.length - 1]) - y(digit));
    const line = lines.filter(each => away(each) <= 0.65 * height).sort((a, b) => away(a) - away(b))[0];
    if (line) line.push(digit); else lines.push([digit]);
  }
  return lines.sort((a, b) => y(a[0]) - y(b[0]));
}

// Lines of digits as text, as text_of in sample.py: "?" for what is unsure, a blank for a wide gap
function textOf(lines) {
  const height = median(lines.flat().map(({box}) => tall(box)));
  return lines.map(line => {
    const gaps = line.slice(1).map(({box}, i) => box.left - line[i].box.right);
    const usual = gaps.length > 1 ? [...gaps].sort((a, b) => a - b)[gaps.length - 1 >> 1] : 0.5 * height;
    const space = i => !pad.whole && gaps[i - 1] > Math.max(0.6 * height, 2 * usual) ? " " : "";
    return line.map(({digit, confidence}, i) => space(i) + (confidence < UNSURE ? "?" : digit)).join("");
  }).join("\n");
}

// ---- The pad

// picture: a canvas that is stretched over the pad; whole: the pad is read as one canvas, px by px
let pad = {size: model.config.image_size, strokes: [], picture: null, whole: false};
let past = [], digits = [], stroke = null, took = 0, waiting = 0;
const blank = () => !pad.strokes.length && !pad.picture;
const pen = () => Number(by("pen").value);          // px of a canvas

// Change the pad; the past keeps what was before
function change(changes) {
  past = [...past.slice(-99), pad];
  pad = {...pad, ...changes};
  changed();
}

// Draw the pad at once, and read it as soon as the browser has shown that
function changed() {
  const into = by("ink").getContext("2d"), side = into.canvas.width;
  into.clearRect(0, 0, side, side);
  paintPad(into, side);
  by("hint").hidden = !blank();
  by("size").value = pad.size;
  by("way").value = pad.whole ? "whole" : "";
  const lines = pad.whole || empty === null ? pad.size / model.side : 0;
  by("pad").classList.toggle("lined", lines > 1);
  by("pad").style.setProperty("--cells", lines);
  if (took > 80) {                                  // a large model waits for a pause
    clearTimeout(waiting);
    waiting = setTimeout(update, took);
  } else waiting ||= requestAnimationFrame(update);
}

function update() {
  const began = performance.now(), lines = linesOf(readPad());
  took = performance.now() - began;
  waiting = 0;
  digits = lines.flat();
  by("text").textContent = digits.length ? textOf(lines) : "";
  by("frames").replaceChildren(...digits.map(({box, digit, confidence}) =>
    frameOf(box, `${digit}  ${Math.round(100 * confidence)}%`, confidence < UNSURE)));
  by("digits").replaceChildren(...digits.map(({digit, confidence}, i) => {
    const unsure = confidence < UNSURE, button = element("button", {textContent: `${digit}  ${percent(confidence)}`,
      className: unsure ? "wrong" : "", ariaLabel:
      `${digit}, ${unsure ? "not sure" : "sure"}, ${percent(confidence)}. Show where the model looked`});
    button.onfocus = button.onclick = button.onpointerenter = () => choose(i);
    button.onblur = button.onpointerleave = () => choose(-1);
    return element("li", {}, button);
  }));
  choose(-1);
}

function frameOf({left, top, right, bottom}, text, wrong) {
  const frame = element("div", {className: "frame"}, element("span", {textContent: text}));
  frame.classList.toggle("wrong", wrong);
  frame.classList.toggle("high", top < 0.06);
  const sides = {left, top, width: right - left, height: bottom - top};
  for (const side in sides) frame.style[side] = `${100 * sides[side]}%`;
  return frame;
}

// Show where the model looked for a digit; -1: for none
function choose(i) {
  const into = by("heat").getContext("2d"), side = into.canvas.width, shown = digits[i];
  into.clearRect(0, 0, side, side);
  [...by("frames").children].forEach((frame, j) => frame.classList.toggle("chosen", i === j));
  by("told").textContent = digits.length ? `${plural(digits.length, "digit")}, read in ${took.toFixed(0)} ms.` :
    blank() ? "" : "No digits found.";
  if (!shown) return;
  by("told").textContent = `Orange shows where the model looked to read this ${shown.digit} (attention rollout).`;
  const {canvas, cell, place} = shown, patch = model.config.patch_size;
  const rows = canvas.height / patch, columns = canvas.width / patch, small = context(columns, rows);
  const image = small.createImageData(columns, rows), colour = getComputedStyle(by("heat")).getPropertyValue("--heat");
  shown.heat ||= model.rollout(canvas, cell);
  shown.heat.forEach((value, j) => image.data.set([...colour.split(","), 190 * value], 4 * j));
  small.putImageData(image, 0, 0);
  into.drawImage(small.canvas, place.left * side, place.top * side, canvas.width / place.side * side,
    canvas.height / place.side * side);
}

const focused = () => [...by("digits").querySelectorAll("button")].indexOf(document.activeElement);

const pointOf = event => {
  const {left, top, width, height} = by("ink").getBoundingClientRect();
  return [clamp((event.clientX - left) / width, 0, 1), clamp((event.clientY - top) / height, 0, 1)];
};

const digitAt = ([x, y]) => digits.findIndex(({box}) => x > box.left && x < box.right && y > box.top && y < box.bottom);

// A tap on a digit asks where the model looked; what moves is a stroke. A dot is a very short one.
by("pad").onpointerdown = event => {
  if (event.button || stroke) return;
  const [x, y] = pointOf(event);
  by("pad").setPointerCapture(event.pointerId);
  stroke = {pointer: event.pointerId, points: [[x, y], [x + 1e-4, y]], tapped: digitAt([x, y])};
  if (stroke.tapped < 0) change({strokes: [...pad.strokes, stroke.points]});
};

by("pad").onpointermove = event => {
  if (!stroke && event.pointerType === "mouse") {
    const i = digitAt(pointOf(event));
    choose(i < 0 ? focused() : i);
  } else if (event.pointerId === stroke?.pointer) {
    const events = event.getCoalescedEvents?.() ?? [], [[x, y]] = stroke.points;
    stroke.points.push(...(events.length ? events : [event]).map(pointOf));
    const [u, v] = stroke.points[stroke.points.length - 1];
    if (stroke.tapped < 0) changed();
    else if (Math.hypot(u - x, v - y) > 0.01) {
      stroke.tapped = -1;
      change({strokes: [...pad.strokes, stroke.points]});
    }
  }
};

by("pad").onpointerup = by("pad").onpointercancel = event => {
  if (event.pointerId !== stroke?.pointer) return;
  const {tapped} = stroke;
  stroke = null;
  if (tapped < 0) changed(); else choose(tapped);
};

// A finger leaves as it is lifted: what it asked for stays
by("pad").onpointerleave = event => { if (!stroke && event.pointerType === "mouse") choose(focused()); };

function undo() {
  pad = past.pop() ?? pad;
  changed();
}

// The next thing drawn on an empty pad is no test canvas
const clear = () => change({strokes: [], picture: null, whole: pad.whole && !pad.picture});

by("undo").onclick = undo;
by("clear").onclick = clear;
by("pen").oninput = changed;
by("size").onchange = event => change({size: Number(event.target.value)});
by("way").onchange = event => change({whole: event.target.value !== ""});
addEventListener("keydown", event => {
  if (event.target.matches("input, select")) return;
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  else if (event.key === "Delete" || event.key === "Backspace") clear();
  else return;
  event.preventDefault();
});

// ---- Pictures by other hands: grey, then ink against the paper around it

async function open({files: [file]}) {
  if (!file) return;
  const image = await createImageBitmap(file).catch(() => null);
  if (!image) {
    by("told").textContent = "This browser cannot open that file as a picture.";
    return;
  }
  const scale = FINE / Math.max(image.width, image.height), into = context(FINE, FINE);
  const [width, height] = [image.width, image.height].map(side => Math.max(1, Math.round(side * scale)));
  into.fillStyle = "white";
  into.fillRect(0, 0, width, height);
  into.imageSmoothingQuality = "high";
  into.drawImage(image, 0, 0, width, height);
  const {data} = into.getImageData(0, 0, width, height), grey = Float64Array.from({length: width * height}, (_, i) =>
    (0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2]) / 255);
  into.clearRect(0, 0, FINE, FINE);
  into.drawImage(pictureOf(inkIn(grey, width, height), width, height), FINE - width >> 1, FINE - height >> 1);
  change({strokes: [], picture: into.canvas, whole: false});
}

// Grey, 0 to 1 -> ink. The paper is what most px are in the blocks around; dark or light ink, whichever differs more.
function inkIn(grey, width, height) {
  const block = Math.ceil(Math.max(width, height) / 12), off = new Float64Array(grey.length);
  const within = (left, top, side, step, use) => {
    for (let y = Math.max(0, top); y < Math.min(height, top + side); y += step) {
      for (let x = Math.max(0, left); x < Math.min(width, left + side); x += step) use(y * width + x);
    }
  };
  within(0, 0, Math.max(width, height), block, at => {
    const left = at % width, top = Math.floor(at / width), near = [];
    within(left - block, top - block, 3 * block, 3, i => near.push(grey[i]));
    const paper = median(near);
    within(left, top, block, 1, i => { off[i] = grey[i] - paper; });
  });
  const weight = sign => total(off.map(value => Math.max(0, sign * value) ** 2));
  const sign = weight(-1) > weight(1) ? -1 : 1, strong = off.map(value => sign * value).sort();
  const full = Math.max(strong[Math.floor(0.995 * strong.length)], 0.1);
  return Uint8ClampedArray.from(off, value => 255 * (sign * value / full - 0.3) / 0.5);
}

by("file").onchange = ({target}) => { open(target); target.value = ""; };
addEventListener("paste", ({clipboardData}) => open(clipboardData));
for (const kind of ["dragover", "dragleave", "drop"]) addEventListener(kind, event => {
  event.preventDefault();
  by("pad").classList.toggle("over", kind === "dragover");
  if (kind === "drop") open(event.dataTransfer);
});

// ---- How well it reads

function canvasButton({number, verdict, findings, ink}) {
  const {size} = facts, picture = pictureOf(numbers(ink, "uint8"), size, size), place = {left: 0, top: 0, side: size};
  const wrong = findings.filter(([, , truth, digit]) => truth !== digit), name = digit => digit ?? "nothing";
  const frames = findings.map(([row, column, truth, digit]) =>
    frameOf(cellBox({row, column}, place), String(digit ?? "–"), truth !== digit));
  const told = wrong.map(([, , truth, digit]) => `${name(truth)} read as ${name(digit)}`).join(", ") ||
    findings.map(([, , truth]) => truth).join(" ") || "empty";
  picture.className = "ink";
  const button = element("button", {ariaLabel: `Test canvas ${number}, ${verdict}: ${told}. Put it on the pad`},
    element("div", {className: "paper"}, picture, ...frames),
    element("div", {textContent: verdict, className: wrong.length ? "bad" : ""}), element("div", {textContent: told}));
  button.onclick = () => {
    change({size, strokes: [], picture, whole: true});
    by("pad").scrollIntoView({block: "nearest"});
  };
  return button;
}

// Rows of texts and cells, each after its name
function fill(table, caption, head, rows) {
  const row = cells => element("tr", {}, ...cells), th = scope => textContent => element("th", {scope, textContent});
  const td = cell => cell instanceof Node ? cell : element("td", {textContent: cell});
  table.append(element("caption", {textContent: caption}), element("thead", {}, row(head.map(th("col")))),
    element("tbody", {}, ...rows.map(([name, ...cells]) => row([th("row")(name), ...cells.map(td)]))));
}

function showFigures() {
  const {names, confusion, by_count: counts} = facts.figures, column = i => total(confusion.map(row => row[i]));
  const sum = of => total(counts.map(of)), canvases = sum(row => row[1]), all = sum(row => row[0] * row[1]);
  by("score").textContent = `${share(sum(row => row[2]), canvases)} of ${plural(canvases, "test canvas")} of ` +
    `${facts.size} × ${facts.size} px${facts.note} are read without a mistake, and ` +
    `${share(sum(row => row[3]), all)} of the ${plural(all, "digit")} on them.`;
  by("kind").hidden = !facts.note;
  by("kind").textContent = facts.note.includes("drawn") ?
    "Trained and tested on digits that the program drew itself: these figures say nothing about handwriting." :
    "Trained and tested on another data set than MNIST.";
  const occur = names.map((_, i) => i).filter(i => total(confusion[i]) || column(i));
  fill(by("confusion"), `What is there (rows) and what is read (columns)${facts.note}`,
    ["", ...occur.map(i => names[i]), "recall", "precision"], occur.map(i => [names[i], ...occur.map(j => {
      const n = confusion[i][j], mistakes = total(confusion[i]) - confusion[i][i];
      const cell = element("td", {textContent: n ? n.toLocaleString("en") : "·"});
      cell.className = i === j ? "same" : n ? "other" : "";
      cell.style.setProperty("--share", Math.sqrt(n / mistakes));
      return cell;
    }), share(confusion[i][i], total(confusion[i])), share(confusion[i][i], column(i))]));
  fill(by("counts"), `Canvases by the number of digits on them${facts.note}`,
    ["digits", "canvases", "all right", "digits right"], counts.map(([n, each, whole, right]) =>
      [n, each.toLocaleString("en"), share(whole, each), share(right, n * each)]));
}

// A round number, of which a span has 2 to 6 (whole ones: fewer where the span is small)
function tickOf(span) {
  const power = 10 ** Math.floor(Math.log10(span || 1)), times = span / power;
  return Math.max(1, power * (times > 5 ? 2 : times > 2 ? 1 : 0.5));
}

// Curves, [name, points (step, height)] each, as SVG with axes; label: of a height
function plot(title, curves, label) {
  const svg = (name, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    made.textContent = text;
    return made;
  };
  const points = curves.flatMap(([, each]) => each), last = Math.max(...points.map(([step]) => step));
  const heights = points.map(([, height]) => height), lowest = Math.min(...heights), highest = Math.max(...heights);
  const tick = tickOf(highest - lowest), low = Math.floor(lowest / tick) * tick;
  const high = Math.max(Math.ceil(highest / tick) * tick, low + tick);
  const x = step => 52 + 400 * step / last, y = height => 220 - 200 * (height - low) / (high - low);
  const picture = svg("svg", {viewBox: "0 0 470 270", role: "img", "aria-label": `${title} over steps`});
  for (let height = low; height <= high; height += tick) {
    picture.append(svg("line", {x1: 52, x2: 452, y1: y(height), y2: y(height), class: "axis"}),
      svg("text", {x: 46, y: y(height) + 4, "text-anchor": "end"}, label(height)));
  }
  for (let step = 0; step <= last; step += tickOf(last)) {
    picture.append(svg("text", {x: x(step), y: 240, "text-anchor": "middle"}, step.toLocaleString("en")));
  }
  picture.append(svg("text", {x: 252, y: 262, "text-anchor": "middle"}, "step"));
  curves.forEach(([name, each], i) => {
    const line = each.map(([step, height]) => `${x(step)},${y(height)}`).join(" "), left = 190 + 130 * i;
    picture.append(svg("polyline", {class: `line line${i}`, points: line}), svg("text", {x: left + 30, y: 12}, name),
      svg("polyline", {class: `line line${i}`, points: `${left},8 ${left + 24},8`}));
  });
  by("curves").append(element("figure", {}, element("figcaption", {textContent: title + facts.note}), picture));
}

function showRun() {
  const curves = (names, height) => Object.keys(names).filter(key => facts.curves[key]?.length > 1)
    .map(key => [names[key], facts.curves[key].map(([step, value]) => [step, height(value)])]);
  const loss = curves({"train loss": "training", "eval loss": "evaluation"}, value => Math.log10(value + 1e-6));
  const right = curves({"eval digit_accuracy": "digits", "eval exact_match": "whole canvases"}, value => 100 * value);
  if (loss.length) plot("Loss: cross entropy of the cells, log scale", loss, height => +(10 ** height).toPrecision(1));
  if (right.length) plot("Right on evaluation canvases", right, height => `${height}%`);
  by("run").append(...facts.run.flatMap(([title, text]) => [element("dt", {textContent: title}),
    element("dd", {textContent: text, className: title === "command" ? "code" : ""})]));
}

// The largest difference between the logits here and torch's, on some of the test canvases
function check() {
  return Math.max(...facts.logits.map((text, i) => {
    const ink = numbers(facts.canvases[i].ink, "uint8"), expected = numbers(text, "float32");
    const logits = model.forward({ink, width: facts.size, height: facts.size});
    return logits.reduce((most, value, j) => Math.max(most, Math.abs(value - expected[j])), 0);
  }));
}

function start() {
  const {cell, patch_size: patch, image_size: own} = model.config;
  const sizes = [own, facts.size, ...(empty === null ? [] : [64, 96, 128])].filter((size, i, all) =>
    all.indexOf(size) === i && (size === own || cell && size % cell === 0 && (size / patch) ** 2 <= 4096));
  by("size").append(...sizes.sort((a, b) => a - b).map(size => new Option(`${size} px`, size)));
  by("sizes").hidden = sizes.length < 2;
  by("hint").textContent = empty !== null ? "Draw some digits here" : own === model.side ? "Draw one digit here" :
    "Draw a digit in each square";
  by("canvases").append(...facts.canvases.map(canvasButton));
  showFigures();
  showRun();
  changed();
  setTimeout(() => {
    by("check").textContent = `The largest difference between this page's logits and PyTorch's, on ` +
      `${facts.logits.length} of these canvases, is ${check().toExponential(0)}.`;
  }, 100);
}

start();
</script>
</html>
'''


if __name__ == "__main__":
    main()
