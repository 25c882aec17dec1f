"""Show what a trained model reads, in the terminal and in PNG files.

    python sample.py --phase=3                       # test canvases, figures, and out/phase3/sample.png
    python sample.py --phase=3 --mistakes            # only canvases with mistakes, worst first
    python sample.py --phase=3 --canvas_size=128 --max_digits=16      # larger canvases than in training
    python sample.py --phase=3 --attention           # what each digit's cell attended to: out/phase3/attention.png
    python sample.py --phase=3 --image page.jpg       # your own pictures, as text and in out/phase3/image.png
    python sample.py --curves --out_dir out/a out/b  # training curves of runs: out/a/curves.png (needs matplotlib)
"""
import argparse
import io
import itertools
import json
import math
import os
import re
import struct
import sys
import zlib
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


def figures(truth, best, classes, note=""):
    """Confusion matrix, precision and recall, accuracy by number of digits: lines of at most 80 columns.

    truth, best: true and most probable classes of cells, int64 (n, gh, gw). classes: the number of digit classes; the
    class after them is "empty". note: a remark on the digits for the heading.
    """
    size = max(truth.max().item(), best.max().item(), classes - 1) + 1      # includes "empty" where it occurs
    confusion = torch.bincount((truth * size + best).flatten(), minlength=size * size).view(size, size)
    right, true, read = (counts.tolist() for counts in (confusion.diagonal(), confusion.sum(1), confusion.sum(0)))
    names = [str(i) for i in range(classes)] + ["empty"] * (size > classes)

    def count(n):  # in 5 columns
        return "." if n == 0 else f"{n}" if n < 10_000 else f"{n / 1000:.0f}k"

    def share(part, whole):
        return f"{100 * part / whole:.2f}%" if whole else "-"

    occur = [i for i in range(size) if true[i] or read[i]]
    columns = {i: 6 if i >= classes else 5 for i in occur} if len(occur) <= 11 else {}      # widths; 80 in all
    lines = ["", f"Cells{note}" + ": what is there (rows) and what is read (columns)" * bool(columns)]
    lines.append(" " * 5 + "".join(f"{names[i]:>{width}}" for i, width in columns.items()) + "   recall precision")
    for i in occur:
        cells = "".join(f"{count(confusion[i, j].item()):>{width}}" for j, width in columns.items())
        lines.append(f"{names[i]:>5}{cells}{share(right[i], true[i]):>9}{share(right[i], read[i]):>10}")

    score = data.score(best, truth, classes)
    lines += ["", f"{'digits on a canvas':>18}{'canvases':>10}{'all right':>11}{'digits right':>14}"]
    for n in score.digits.unique().tolist():
        exact, digits_right = score.exact[score.digits == n], score.digits_right[score.digits == n]
        lines.append(f"{n:>18}{len(exact):>10,}{share(exact.sum().item(), len(exact)):>11}"
                     f"{share(digits_right.sum().item(), n * len(exact)):>14}")
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


def page_tile(page, largest):
    """The picture of a Page, at most `largest` px a side: each digit with its reading in a frame, red and dashed where
    it is unsure."""
    height, width = page.picture.shape
    scale = min(1, largest / max(height, width))
    grey = resize(page.picture, max(1, round(height * scale)), max(1, round(width * scale)))
    picture = np.repeat((255 * grey).byte().numpy()[:, :, None], 3, axis=2)
    for digit in page.record["digits"]:
        left, top, width, height = (round(scale * side / page.shrunk) for side in digit["box"])
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
    rollout = rollout.view(rows // k, k, columns // k, k, rows, columns).mean((1, 3))
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
    begins and -1 one past its end; and of each run, in reading order, the row, where it begins, and one past its end."""
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
    """The height of the digits in a picture, float (H, W), px: the median of its pieces' that are at least 0.45 of the
    tallest. Shadows and the table beside the page reach the picture's edge: what does counts only if nothing else is
    there. None where there is no ink."""
    ink, height = ink_of(picture, max(max(picture.shape) / 8, 16)), None
    down, across = (round(0.75 * side) for side in picture.shape)
    for _ in range(2):                          # more rules are found once digits' height bounds their length
        _, box, _ = strokes(without_rules(ink, across, down))
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


class Page(NamedTuple):
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


def read_page(model, path, digit_height=None):
    """The Page in a picture file. ValueError if it cannot be read."""
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
    return Page(record, picture, shrunk, canvases, note)


def read_picture(model, path, digit_height=None):
    """What a model reads in a picture file: {"file", "text", "digit_height", "digits": [{"digit", "confidence",
    "box": [left, top, width, height]}]}, px of the picture, digits in reading order. `text` has a line for each line of
    the page, "?" for what is unsure. digit_height: px, where it is known. ValueError for a file that cannot be read."""
    return read_page(model, path, digit_height).record


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
        path = Path(folder) / "metrics.jsonl"
        data.check_regular(path)
        try:
            plot_run(panels, folder, [json.loads(line) for line in path.read_text().splitlines()], f"C{number}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a metrics file of train.py: {type(error).__name__}: {error}") from None
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


def plot_run(panels, name, metrics, colour):
    """Add the CURVES of one run. metrics: the objects in its metrics.jsonl."""
    if not any(line["event"] == "train" for line in metrics):
        raise ValueError("nothing was logged yet")
    if any("drawn" in line["data"] for line in metrics if line["event"] == "eval"):
        name = f"{name} (drawn digits)"
    for row, event, key, label, style in CURVES:
        lines = [line for line in metrics if line["event"] == event]
        values = np.array([line[key] for line in lines], dtype=float)       # None, for no digits, becomes NaN
        for panel, x in zip(panels[row], ("step", "seconds")):
            panel.plot([line[x] for line in lines], 100 * values if row == 2 else values, color=colour,
                       label=f"{name}, {label}", **style)


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
    empty = checkpoint["canvas"]["classes"] if data.has_empty_cells(checkpoint["phase"]) else None
    if not flags.image:
        return present(flags, folder, model, empty, *read_test_set(flags, checkpoint, model))
    read_pictures(flags, folder, model)


def read_pictures(flags, folder, model):
    """Read the pictures in --image, print what they say, and save image.png. What cannot be read is told at the end of
    the others by the exit code."""
    tiles, attention = [], []
    for file in flags.image:
        try:
            page = read_page(model, file, flags.digit_height)
        except ValueError as error:
            print(f"sample.py: {error if file in str(error) else f'{file}: {error}'}", file=sys.stderr)
            continue
        tiles.append(page_tile(page, max(300, 1200 // min(4, len(flags.image)))))
        if flags.json:
            print(json.dumps(page.record), flush=True)
            continue
        print("", *page_report(page, sys.stdout.isatty() and "NO_COLOR" not in os.environ), sep="\n", flush=True)
        if flags.attention:
            attention += attention_rows(model, page.canvases[:MOST_ATTENTION])
    if tiles and not flags.json:
        save_png(folder / "image.png", tiles[0] if len(tiles) == 1 else sheet(in_rows(tiles)))
        save_attention(flags, folder, attention)
    if len(tiles) < len(flags.image):
        raise SystemExit(1)


def page_report(page, colour):
    """What a Page says, how sure that is, and the canvas where there is one that fits a terminal: lines of text."""
    record, lines = page.record, [page.record["file"]]
    if len(page.canvases) == 1 and page.canvases[0][0].shape[1] <= 78:
        lines += draw(page.canvases[0][0], colour)
    if not record["digits"]:                                                # say why
        return [*lines, f"  nothing: {page.note}"]
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


def read_test_set(flags, checkpoint, model):
    """Read the test set. Returns the fewest cells between its digits, examples (name, canvas, truth, logits) of the
    canvases to show, and the figures."""
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
    order = torch.arange(len(canvases))
    if flags.mistakes:
        loss = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), reduction="none").view(len(truth), -1).sum(1)
        wrong = (best != truth).flatten(1).any(1)
        order = order[wrong][loss[wrong].argsort(descending=True, stable=True)]
    if flags.start >= len(order) > 0:
        raise ValueError(f"--start={flags.start}, but there are {len(order)} such canvases")
    examples = [(f"test canvas {i}{note}", canvases[i], truth[i], logits[i])
                for i in order[flags.start:flags.start + (flags.count or 16)].tolist()]
    return layout.apart, examples, figures(truth, best, layout.classes, note)


def present(flags, folder, model, empty, apart, examples, report):
    """Print examples (name, canvas, truth, logits) and the lines of a report, and save the PNG files."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    tiles, attention = [], []
    for number, (name, canvas, truth, logits) in enumerate(examples):
        findings = compare(data.read(logits[None], empty, apart)[0], truth, empty)
        tiles.append(tile(canvas, findings, model.config.cell, f"{name}: {verdict(findings)}"))
        if number < (flags.count or 4):
            print(f"\n{name}", *draw(canvas, colour), *describe(findings, colour), sep="\n")
            if flags.attention and (details := attention_tiles(model, canvas, findings)):
                attention.append([tiles[-1], *details])
    print(*report, "", sep="\n")
    if not examples:
        return print("no sample.png: nothing is read wrong")
    save_png(folder / "sample.png", sheet(in_rows(tiles)))
    save_attention(flags, folder, attention)


if __name__ == "__main__":
    main()
