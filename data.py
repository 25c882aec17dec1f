"""Digits and canvases: IDX files -> uint8 digits -> canvases with a label for every cell -> model input, and back.

    images, labels = load_mnist("data/mnist", "train")          # uint8 (60000, 28, 28), int64 (60000,)
    generator = torch.Generator().manual_seed(0)
    canvas, label = canvases(3, images, labels, 256, generator)  # uint8 (256, 64, 64), int64 (256, 8, 8)
    inputs = to_input(canvas)                                    # float (256, 1, 64, 64)
    readings = read(model(inputs), empty=10)                     # [[(digit, row, column, confidence), ...], ...]

One idea carries all three phases: a canvas is a grid of cells, and each cell has one label. The table PHASES says
what a phase is. Everything is tensor code, on whatever device the digits are on.
"""
import gzip
import hashlib
import http.client
import math
import os
import struct
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F

FRAME = 28  # px, side of a digit image

# ---------------------------------------------------------------------------------------------------------------------
# IDX files (http://yann.lecun.com/exdb/mnist/): 0, 0, type code, number of dimensions, the dimensions as big-endian
# 32-bit numbers, then the values, big-endian, last dimension fastest.

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def load_idx(path, max_bytes=2**30):
    """The array in an IDX file, raw or gzip (told apart by content), in native byte order.

    No more than `max_bytes` of values are unpacked, and never more memory is taken than the file really fills.
    Raises ValueError, with the file's name and what is wrong, for anything that is not exactly one IDX array.
    """
    def wrong(what):
        return ValueError(f"{path}: {what}")

    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0":
                raise wrong(f"not an IDX file: it starts with {magic!r}, not with two zero bytes, a type and a rank")
            if magic[2] not in IDX_TYPES:
                raise wrong(f"unknown IDX type code 0x{magic[2]:02x}")
            if not 1 <= magic[3] <= 64:
                raise wrong(f"an IDX array has 1 to 64 dimensions, not {magic[3]}")
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise wrong("too short: it ends within its header")
            shape = struct.unpack(f">{magic[3]}I", header)
            dtype = np.dtype(IDX_TYPES[magic[2]])
            expected = math.prod(shape) * dtype.itemsize
            if expected > max_bytes:
                raise wrong(f"its header promises {expected:,} bytes, more than max_bytes={max_bytes:,}")
            values = bytearray()
            while chunk := file.read(min(2**20, expected + 1 - len(values))):  # one byte more, to notice what is over
                values += chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise wrong(f"corrupt gzip: {error}") from None
    if len(values) != expected:
        raise wrong(f"too {'short' if len(values) < expected else 'long'}: "
                    f"its header promises {expected:,} bytes of values for shape {shape}")
    try:
        return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
    except ValueError as error:  # more dimensions, or larger ones, than this numpy has
        raise wrong(error) from None


# ---------------------------------------------------------------------------------------------------------------------
# MNIST, or any data set of the same four names

MIRRORS = ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"]
MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
       "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
       "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
       "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
CRC = {"train": 0xdf6dde61, "test": 0x190e897b}        # of the images and then the labels, a byte each
SPLITS = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
          "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
KINDS = ("mnist", "custom", "drawn")    # of digits: custom is another data set under MNIST's names


def load_mnist(data_dir, split):
    """Split "train" or "test" from the IDX files in a folder: uint8 (N, 28, 28) images, int64 (N,) labels.

    Each file may be raw or .gz, and be spelt with .idx in place of -idx. Files that are absent are downloaded.
    Raises ValueError for files that are not such a data set, ConnectionError where there is none and no mirror gives it.
    """
    image_path, label_path = (find_file(Path(data_dir), name) or fetch(Path(data_dir), name) for name in SPLITS[split])
    images, labels = load_idx(image_path), load_idx(label_path)
    if images.dtype != np.uint8 or images.shape[1:] != (FRAME, FRAME) or len(images) == 0:
        raise ValueError(f"{image_path}: expected uint8 images (N, {FRAME}, {FRAME}), got {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{label_path}: expected one label for each of {len(images)} images, got shape {labels.shape}")
    if labels.dtype.kind == "f" or labels.min() < 0 or labels.max() > 255:
        raise ValueError(f"{label_path}: expected class numbers from 0 to 255, "
                         f"got {labels.dtype} from {labels.min()} to {labels.max()}")
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def find_file(data_dir, name):
    spellings = [name, name + ".gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"]
    return next((data_dir / spelling for spelling in spellings if (data_dir / spelling).exists()), None)


def files_there(data_dir):
    return [file for names in SPLITS.values() for name in names if (file := find_file(data_dir, name))]


def fetch(data_dir, name):
    """Download a file that is missing, unless the folder holds a data set that it does not belong to."""
    if data_dir.exists() and not data_dir.is_dir():
        raise ValueError(f"{data_dir} is a file, not the folder of the digits' files")
    for other in files_there(data_dir):
        if hashlib.md5(other.read_bytes()).hexdigest() != MD5.get(other.name):
            raise ValueError(f"{data_dir} has {other.name} but no {name}: if it is not MNIST's, add the file that is missing; "
                             "to download MNIST, name an empty folder")
    return download(data_dir, name + ".gz")


def download(data_dir, name, timeout=10):
    """A file of MNIST from the first mirror that has the right one; its path. Raises ConnectionError if none has.

    It is written beside, checked and renamed: a file under its own name is always whole and right.
    """
    failures = []
    for mirror in MIRRORS:
        part = None
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=name + ".", suffix=".part", dir=data_dir)
            with os.fdopen(handle, "wb") as file, urllib.request.urlopen(mirror + name, timeout=timeout) as response:
                size, done, digest = int(response.headers.get("Content-Length") or 0), 0, hashlib.md5()
                while chunk := response.read(2**16):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    print(f"\rdownloading {mirror + name}: {done / 1e6:.1f} of {size / 1e6:.1f} MB", end="", file=sys.stderr)
                    if done > 2**26:
                        raise ValueError("it goes on past 64 MB")
                print(file=sys.stderr)
            if digest.hexdigest() != MD5[name]:
                raise ValueError(f"{done} bytes with MD5 {digest.hexdigest()}, expected {MD5[name]}")
            os.chmod(part, 0o644)  # mkstemp makes files that only their owner may read
            os.replace(part, data_dir / name)
            return data_dir / name
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            failures.append(f"{mirror + name}: {error}")
            print(f"download failed: {failures[-1]}", file=sys.stderr)
        finally:
            if part:
                Path(part).unlink(missing_ok=True)
    raise ConnectionError(f"no {name.removesuffix('.gz')} in {data_dir} and no mirror gave it ({'; '.join(failures)})")


def load_digits(data, data_dir, split):
    """Images, labels and their kind, one of KINDS. `data` is a kind, or "auto": what is in the folder or can be downloaded,
    else digits that the program draws itself, and says so."""
    if data == "custom" and not files_there(Path(data_dir)):
        raise ValueError(f"no data set in {data_dir}: name its folder as --data_dir")       # MNIST would not be what is asked for
    if data != "drawn":
        try:
            images, labels = load_mnist(data_dir, split)
            kind = "mnist" if zlib.crc32(labels.byte().numpy(), zlib.crc32(images.numpy())) == CRC[split] else "custom"
            if data not in ("auto", kind):
                raise ValueError(f"expected {data} digits, those of {data_dir} are {kind} ones: name their folder as --data_dir")
            return images, labels, kind
        except ConnectionError as error:
            if data != "auto":
                raise
            print(f"\n*** No MNIST: {error}\n*** Going on with digits drawn by the program itself. Every figure of this run"
                  ' is marked "drawn" and says nothing about MNIST.\n', file=sys.stderr)
    n, seed = {"train": (60_000, 0), "test": (10_000, 1)}[split]
    return *drawn_digits(n, seed), "drawn"


# ---------------------------------------------------------------------------------------------------------------------
# Digits drawn by the program itself: strokes (x right, y down), each a smooth curve through its control points.
# A point given twice makes a corner.

STROKES = {
    0: [[(.55, 0), (.2, .12), (.08, .5), (.22, .9), (.5, 1), (.8, .88), (.92, .5), (.8, .12), (.5, 0)]],
    1: [[(.5, 0), (.5, .33), (.5, .67), (.5, 1)]],
    2: [[(.1, .25), (.25, .05), (.55, 0), (.82, .15), (.8, .4), (.5, .7), (.1, 1), (.1, 1), (.5, .98), (.95, 1)]],
    3: [[(.12, .12), (.4, 0), (.75, .08), (.8, .28), (.6, .45), (.35, .48), (.35, .48), (.7, .54), (.88, .75),
         (.7, .96), (.4, 1), (.08, .88)]],
    4: [[(.3, 0), (.2, .3), (.1, .6), (.1, .6), (.5, .6), (.95, .57)], [(.75, .05), (.72, .4), (.7, .7), (.68, 1)]],
    5: [[(.85, 0), (.5, .01), (.2, .02), (.2, .02), (.15, .25), (.13, .45), (.13, .45), (.5, .38), (.85, .55),
         (.85, .82), (.5, 1), (.1, .93)]],
    6: [[(.7, 0), (.4, .2), (.18, .5), (.15, .8), (.4, 1), (.7, .95), (.82, .75), (.65, .55), (.4, .57), (.18, .75)]],
    7: [[(.08, .03), (.5, .03), (.9, 0), (.9, 0), (.7, .35), (.5, .7), (.4, 1)]],
    8: [[(.6, .48), (.25, .3), (.3, .05), (.6, 0), (.82, .15), (.7, .38), (.4, .55), (.15, .78), (.3, .97),
         (.6, 1), (.83, .82), (.75, .6), (.5, .45)]],
    9: [[(.82, .22), (.6, .02), (.3, .05), (.15, .28), (.3, .48), (.6, .45), (.82, .22), (.82, .22), (.8, .5),
         (.72, .75), (.62, 1)]],
}
STROKE_POINTS = 80  # points along the strokes of a digit, evenly spread


def stroke_weights():
    """Weights (10, STROKE_POINTS, P) that carry a digit's control points to points along its strokes, and the control
    points (10, P, 2), padded to P. The curves are linear in their control points, so all digits are one product."""
    most = max(sum(map(len, strokes)) for strokes in STROKES.values())
    weights, controls = np.zeros((10, STROKE_POINTS, most)), np.zeros((10, most, 2))
    for digit, strokes in STROKES.items():
        points = np.concatenate(strokes)
        dense, pieces, first = [], [], 0
        for stroke in strokes:
            ends = np.eye(most)[first:first + len(stroke)]
            p0, p1, p2, p3 = (np.pad(ends, ((1, 1), (0, 0)), "edge")[i:i + len(stroke) - 1, None] for i in range(4))
            t = np.linspace(0, 1, 32)[None, :, None]  # Catmull-Rom: a cubic from each control point to the next
            curve = (2*p1 + (p2 - p0)*t + (2*p0 - 5*p1 + 4*p2 - p3)*t**2 + (3*p1 - p0 - 3*p2 + p3)*t**3) / 2
            curve = curve.reshape(-1, most)
            path = curve[:, :len(points)] @ points
            dense.append(curve)
            pieces.append(np.concatenate(([0], np.hypot(*np.diff(path, axis=0).T))))  # the pen jumps between strokes
            first += len(stroke)
        dense, length = np.concatenate(dense), np.cumsum(np.concatenate(pieces))
        even = np.linspace(0, length[-1], STROKE_POINTS)
        weights[digit] = dense[np.searchsorted(length, even).clip(0, len(dense) - 1)]
        controls[digit, :len(points)] = points
    return torch.from_numpy(weights).float(), torch.from_numpy(controls).float()


def drawn_digits(n, seed):
    """n digits drawn by the program itself, of random class, shape, slant, size and pen, laid out as MNIST's are (ink
    in 20 x 20 px, its centre of mass in the middle of the frame): uint8 (n, 28, 28), int64 (n,)."""
    generator = torch.Generator().manual_seed(seed)
    weights, controls = stroke_weights()
    labels = torch.randint(10, (n,), generator=generator)
    images = torch.empty(n, FRAME, FRAME, dtype=torch.uint8)
    for part in torch.arange(n).split(1000):  # small enough for the cache
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(len(part), *shape, generator=generator)
        points = controls[labels[part]]
        points = weights[labels[part]] @ (points + uniform(-.05, .05, *points.shape[1:]))        # (n, points, 2)
        turn, slant, aspect = uniform(-.2, .2), uniform(-.1, .4), uniform(.6, 1)
        x, y = (points - .5).unbind(-1)
        x = x * aspect[:, None] - y * slant[:, None]
        x, y = x * turn.cos()[:, None] - y * turn.sin()[:, None], x * turn.sin()[:, None] + y * turn.cos()[:, None]
        points = torch.stack((x, y), dim=-1)
        # The pen is a Gaussian of width sigma; ink shows where it is above 0.15, which is 1.95 sigma from the stroke.
        sigma, side = uniform(.7, 1.15, 1, 1), uniform(18.5, 19.9, 1, 1)
        extent = (points.amax(1) - points.amin(1)).amax(1)[:, None, None]
        points = points * (side - 2 * 1.95 * sigma) / extent                                     # px
        points = points - points.mean(1, keepdim=True) + (FRAME - 1) / 2
        step = (points[:, 1:] - points[:, :-1]).norm(dim=-1).mean(1)[:, None, None]
        pixels = torch.arange(FRAME)
        x, y = (torch.exp(-((points[..., i, None] - pixels) / sigma) ** 2 / 2) for i in (0, 1))  # (n, points, 28)
        pen = y.mT @ x * step / (sigma * math.sqrt(2 * math.pi))  # a straight stroke's middle is 1
        images[part] = ((pen - .15) / .45).clamp(0, 1).mul(255).round().byte()
    return images, labels


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation, for training only

def ink_span(images):
    """uint8 (..., n): where the ink (values above 0) of each line of n px begins, and how long it is to its end."""
    n, ink = images.shape[-1], images.clamp(max=1).short()                      # on a CPU x0.7 of the time of booleans
    count = torch.arange(1, n + 1, dtype=torch.int16, device=images.device)     # amax takes half the time of argmax
    end, back = ((ink * line).amax(-1).long() for line in (count, count.flip(0)))
    begin = n - back                                                            # n, and end is 0, where there is no ink
    return begin % n, (end - begin).clamp(min=0)


def ink_box(images):
    """The box around the ink of uint8 images (n, h, w): top, left, height, width, each (n,), px."""
    top, height = ink_span(images.amax(2))
    left, width = ink_span(images.amax(1))
    return top, left, height, width


def augment(images, rand, rotate=0.0, scale=0.0, shear=0.0, shift=0.0, elastic=0.0, elastic_points=3, side=FRAME):
    """Each digit turned by up to `rotate` degrees, scaled and sheared by up to those shares, moved by up to `shift` px
    and bent by up to `elastic` px (Simard 2003: displacements that change smoothly over the image, here between random ones
    at `elastic_points` x `elastic_points` points: the fewer, the smoother).

    images: uint8 (n, 28, 28), and the same comes back. rand: gives random numbers from 0 to 1, (n, *shape). A digit whose ink
    would grow past `side` px, or leave the frame, is scaled down or moved back until it does not; what bending still carries
    past `side` is cut off.
    """
    n, device = len(images), images.device

    def uniform(limit, *shape):
        return (rand(*shape) * 2 - 1) * limit

    angle, size, lean = uniform(math.radians(rotate)), 1 + uniform(scale, 2), uniform(shear)
    cos, sin = angle.cos(), angle.sin()
    # Rows of the matrix that carries a source point (x, y), px from the middle of the frame, to where it is drawn.
    matrix = torch.stack((torch.stack((cos, lean * cos - sin), -1), torch.stack((sin, lean * sin + cos), -1)), 1)
    matrix = matrix * size[:, :, None]                                          # (n, 2, 2)
    # How far the ink will reach: its outline is where each row's ink begins and ends. It is reckoned between the middles
    # of pixels; what interpolation adds around them is cut off below.
    middle = (FRAME - 1) / 2
    begin, length = ink_span(images)                                            # of each row: (n, 28)
    blank = length == 0
    y = torch.arange(FRAME, device=device) - middle                             # (28,)
    reach = []
    for across, down in (matrix[:, 0].unbind(-1), matrix[:, 1].unbind(-1)):     # along x, along y
        ends = [across[:, None] * (x - middle) + down[:, None] * y for x in (begin, begin + length - 1)]
        reach.append((torch.minimum(*ends).masked_fill(blank, math.inf).amin(1),
                      torch.maximum(*ends).masked_fill(blank, -math.inf).amax(1)))
    low, high = (torch.stack(ends, dim=-1).nan_to_num(posinf=0, neginf=0) for ends in zip(*reach))  # (n, 2); 0: no ink
    shrink = ((side - 1) / (high - low).amax(1)).clamp(max=1)[:, None]
    matrix, low, high = matrix * shrink[:, None], low * shrink, high * shrink
    move = torch.minimum(torch.maximum(uniform(shift, 2), -middle - low), middle - high)
    # grid_sample asks the other way about: where in the source each pixel drawn comes from, in half frames. That is linear
    # in all that is random, so it is one matrix product.
    (a, b), (c, d) = (row.unbind(-1) for row in matrix.unbind(1))               # by hand: linalg.inv waits for a GPU
    inverse = (torch.stack((d, -b, -c, a), dim=-1) / (a * d - b * c)[:, None] / (FRAME / 2)).view(n, 2, 2)
    weights = [inverse, -inverse @ move[:, :, None]]
    basis = [y.repeat(FRAME, 1), y[:, None].repeat(1, FRAME), torch.ones(FRAME, FRAME, device=device)]
    if elastic:
        points = torch.eye(elastic_points, device=device)[None, :, :, None]     # bicubic between them:
        smooth = F.interpolate(points, (FRAME, 1), mode="bicubic")[0, :, :, 0]  # (points, 28), the weights along each axis
        basis.extend((smooth[:, None, :, None] * smooth[None, :, None]).flatten(0, 1))
        weights.append(uniform(elastic / (FRAME / 2), 2, elastic_points**2))
    grid = torch.cat(weights, dim=2) @ torch.stack(basis).flatten(1)            # (n, 2, 28 * 28)
    grid = grid.unflatten(2, (FRAME, FRAME)).permute(0, 2, 3, 1)
    # Interpolation leaves a faint fringe: 197 px of a digit would have ink, on average, and not 150 as in MNIST. So there is
    # ink only where most of what a px comes from is ink.
    source = torch.stack((images, images.clamp(max=1)), dim=1).float()          # (n, 2, 28, 28)
    drawn, inked = F.grid_sample(source, grid, align_corners=False).unbind(1)
    within_x, within_y = (((y - centre[:, None]).abs() < side / 2).float() for centre in ((low + high) / 2 + move).unbind(1))
    drawn = (drawn * inked.round() * within_x[:, None] * within_y[:, :, None]).round().byte()   # masks of floats: faster than booleans
    faded = drawn.amax((1, 2), keepdim=True) == 0
    return drawn + images * faded                                               # what faded away altogether: as it was


# ---------------------------------------------------------------------------------------------------------------------
# Canvases

class Phase(NamedTuple):
    size: int                   # px, side of the canvas
    cell: int                   # px, side of a cell; 28, as a digit's frame, where every cell holds a digit
    max_digits: Optional[int]   # 0 to so many digits anywhere, the other cells empty; None: a digit in every cell


PHASES = {1: Phase(size=28, cell=28, max_digits=None),
          2: Phase(size=56, cell=28, max_digits=None),
          3: Phase(size=64, cell=8, max_digits=5)}
LARGEST_CANVAS, MOST_DIGITS = 1024, 256  # px, and on a canvas: a test set is in memory as a whole
TEST_CANVASES = 10_000  # in the test set of a phase, but for canvases of one digit: there, every test digit once


def has_empty_cells(phase):
    """Whether cells may be empty: "empty" is then the class after those of the digits."""
    return PHASES[phase].max_digits is not None


def canvas_options(phase, images, labels, size=None, max_digits=None, min_distance=None, classes=None, ink=None, crowded=0.0,
                   borders=0.0):
    """The options of `canvases` with their defaults filled in from the phase and the digits, and checked.

    size: px, side of the canvas. classes: number of digit classes. Where a phase has empty cells also max_digits,
    min_distance: px between two digits' centres along x or y, whichever is more, ink: px, the largest side of a digit's
    ink box, and, for training, crowded: the share of canvases that hold max_digits digits whatever their number would be,
    and borders: the share of rows, and of columns, that are moved to within 1 px of the nearest border of a cell.
    Raises ValueError for what cannot be drawn.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(map(str, PHASES))}, not {phase!r}")
    spec = PHASES[phase]
    size = spec.size if size is None else size
    for name, value in (("canvas size", size), ("max_digits", max_digits), ("min_distance", min_distance), ("classes", classes)):
        if value is not None and type(value) is not int:
            raise ValueError(f"{name} must be a whole number, not {value!r}")
    if size % spec.cell or not 0 < size <= LARGEST_CANVAS:
        raise ValueError(f"canvas size {size} is not a multiple of phase {phase}'s cell of {spec.cell} px, up to {LARGEST_CANVAS} px")
    classes = int(labels.max()) + 1 if classes is None else classes
    if not has_empty_cells(phase):
        if max_digits is not None or min_distance is not None or crowded or borders:
            raise ValueError(f"phase {phase} has a digit in every cell: max_digits, min_distance, crowded and borders do not apply")
        return {"size": size, "classes": classes}
    if ink is None:
        _, _, height, width = ink_box(images)
        if not images.flatten(1).any(1).all():
            raise ValueError("a digit image is all zero: it has no ink whose centre could be found")
        ink = max(int(height.max()), int(width.max()))
    max_digits = spec.max_digits if max_digits is None else max_digits
    min_distance = max(ink, spec.cell) if min_distance is None else min_distance
    if min_distance < spec.cell:
        raise ValueError(f"min_distance {min_distance} is below the cell of {spec.cell} px: two digits could share a cell")
    most = most_digits({"size": size, "ink": ink, "min_distance": min_distance})
    if not 1 <= max_digits <= most:
        raise ValueError(f"max_digits must be from 1 to {most}, which is what surely fits on a canvas of {size} px "
                         f"with centres {min_distance} px apart and ink up to {ink} px wide, not {max_digits}")
    for name, share in (("crowded", crowded), ("borders", borders)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {share}")
    return {"size": size, "classes": classes, "max_digits": max_digits, "min_distance": min_distance, "ink": ink,
            "crowded": crowded, "borders": borders}


def canvases(phase, images, labels, n, generator, augmentation=None, part=slice(None), weights=None, **options):
    """n canvases of a phase, with digits drawn from uint8 (N, 28, 28) images and int64 (N,) labels.

    generator: on the device of the images, or on another, whose random numbers are then carried over. augmentation:
    keywords of `augment`, or None. part: which of the n to return, the same as they are among all n: processes share a
    batch so. weights: float (N,), on the device of the images: how often each digit is drawn, in proportion; None: all
    alike. options: see `canvas_options`; pass its result to leave nothing to be worked out (and, on a GPU, waited for) at
    each call.
    Returns uint8 (n, H, W) canvases and int64 (n, gh, gw) cell labels, where the class after the last is "empty".
    """
    options = canvas_options(phase, images, labels, **options)
    layout = scattered if has_empty_cells(phase) else in_every_cell

    # The random numbers of all n are drawn, whatever the part
    def rand(*shape):
        return torch.rand(n, *shape, generator=generator, device=generator.device)[part].to(images.device)

    def randint(below, *shape):
        return torch.randint(below, (n, *shape), generator=generator, device=generator.device)[part].to(images.device)

    return layout(PHASES[phase].cell, images, labels, weights, rand, randint, augmentation, **options)


def pick(images, labels, k, weights, rand, randint, augmentation, side=FRAME):
    """k digits for each of n canvases, augmented: (n, k, 28, 28), (n, k)."""
    if weights is None:
        chosen = randint(len(images), k)                                    # (n, k)
    else:
        sums = weights.cumsum(0)
        chosen = torch.searchsorted(sums, rand(k) * sums[-1], right=True)
        chosen.clamp_(max=len(images) - 1)                                  # where the product is rounded up to all of the sum
    digits = images[chosen.flatten()]
    if augmentation is not None:
        digits = augment(digits, lambda *shape: rand(k, *shape).flatten(0, 1), side=side, **augmentation)
    return digits.view(*chosen.shape, FRAME, FRAME), labels[chosen]


def in_every_cell(cell, images, labels, weights, rand, randint, augmentation, size, classes):
    """A digit in every cell, its frame on the cell."""
    grid = size // cell
    digits, digit_labels = pick(images, labels, grid * grid, weights, rand, randint, augmentation)
    canvas = digits.unflatten(1, (grid, grid)).transpose(2, 3).reshape(len(digits), size, size)
    return canvas, digit_labels.unflatten(1, (grid, grid))


def scattered(cell, images, labels, weights, rand, randint, augmentation, size, classes, max_digits, min_distance, ink,
              crowded, borders):
    """0 to max_digits digits anywhere; the cell that holds the centre of a digit's ink box has its label."""
    device, grid = images.device, size // cell
    digits, digit_labels = pick(images, labels, max_digits, weights, rand, randint, augmentation, side=ink)
    n = len(digits)
    count = randint(max_digits + 1, 1)                                                     # (n, 1)
    if crowded:
        count = torch.where(rand(1) < crowded, max_digits, count)
    present = torch.arange(max_digits, device=device) < count                              # (n, max_digits)
    top, left, height, width = (edge.view(n, max_digits) for edge in ink_box(digits.flatten(0, 1)))
    box = torch.stack((height, width), dim=-1)                                             # (n, max_digits, 2)
    centre = place(box, present, size, min_distance, ink, rand, cell, borders)       # the same, in half px
    corner = (centre - box) // 2 - torch.stack((top, left), dim=-1)                        # px, of the frame
    digits = digits * present[..., None, None]
    canvas = torch.cat([paste(*some, size) for some in zip(digits.split(500), corner.split(500))])  # indices take memory
    # What is not there is written to one cell too many, which is cut off.
    row, column = (centre // (2 * cell)).unbind(-1)
    where = torch.where(present, row * grid + column, grid * grid)
    cells = torch.full((n, grid * grid + 1), classes, device=device)
    cells.scatter_(1, where, digit_labels)
    return canvas, cells[:, :-1].view(n, grid, grid)


def lattice_lines(size, ink, min_distance):
    """Lines of a square lattice that fit along a side of the canvas, whatever the sides of the digits' ink. Half a px
    more than min_distance, because the centre of an odd side lies on a half px and of an even one does not."""
    return 0 if size < ink else (2 * (size - ink)) // (2 * min_distance + 1) + 1


def most_digits(options):
    """How many digits surely fit on a canvas of such options, and into the memory for a test set of them."""
    return min(lattice_lines(options["size"], options["ink"], options["min_distance"]) ** 2, MOST_DIGITS)


def place(box, present, size, min_distance, ink, rand, cell=1, borders=0.0, sweeps=3, tries=32):
    """Centres (n, k, 2) for ink boxes (n, k, 2), in half px, uniform over all layouts that keep min_distance.

    Placing digits one after the other gets stuck: at five on 64 px about half the time. So every canvas starts from a
    jittered lattice, which always fits, and then each digit in turn moves to a new place, uniform among those that the
    others leave free (Gibbs sampling, whose limit is the uniform distribution; three sweeps come close: where five
    digits lie differs from it by 2% in total variation). A digit that finds no free place in `tries` draws stays where
    it is, which changes nothing about that. A share `borders` of the places tried are moved beside the border of a cell
    along y, and as many along x: there, half a px decides which cell a digit belongs to, and most mistakes are made.
    """
    k, apart, lines = box.shape[1], 2 * min_distance, lattice_lines(size, ink, min_distance)

    def below(limit, *shape):  # whole numbers from 0 to limit - 1
        return (rand(*shape) * limit).int()

    def anywhere(side):        # centres of boxes of such sides: (n, k, 1) -> (n, k, tries)
        centre = side + 2 * below(size - side + 1, k, tries)
        if borders:
            border = (centre + cell) // (2 * cell) * 2 * cell
            beside = border - 2 + (centre & 1) + 2 * below(2, k, tries)     # 1 or half a px before it, on it or half a px past
            moved = (rand(k, tries) < borders) & (beside >= side) & (beside <= 2 * size - side)
            centre = torch.where(moved, beside, centre)
        return centre

    slack = 2 * (size - ink) - (lines - 1) * (apart + 1)
    site = rand(lines * lines).argsort(dim=1, stable=True)[:, :k]
    row, column = site // lines, site % lines
    row_jitter = below(slack + 1, lines).sort(1).values                     # (n, lines)
    column_jitter = below(slack + 1, lines, lines).sort(2).values           # (n, lines, lines): its own in every row
    row = ink + row * (apart + 1) + row_jitter.gather(1, row)
    column = ink + column * (apart + 1) + column_jitter.flatten(1).gather(1, site)
    height, width = box.int().unbind(-1)                                    # faster than int64
    row, column = row - (row - height) % 2, column - (column - width) % 2   # an even box has its centre on whole px
    # A digit that is not there stays far off, where it is in nobody's way
    absent = ~present[:, None]
    centre = torch.stack((row, column), dim=1).masked_fill_(absent, -2 * size - apart).int()  # (n, 2, k)
    for _ in range(sweeps):
        new = torch.stack((anywhere(height[:, :, None]), anywhere(width[:, :, None])), dim=1)     # (n, 2, k, tries)
        here = centre[..., None]                                            # the last place to try: where it is, which is free
        new = torch.cat((torch.where(absent[..., None], here, new), here), dim=3)
        for i in range(k):
            gap = torch.maximum(*(new[:, :, i, None] - centre[..., None]).abs_().unbind(1))       # (n, k, tries + 1)
            gap[:, i] = apart                                                                     # to itself
            first = (gap.amin(1) >= apart).byte().argmax(1)                                       # (n,), the first free one
            centre[:, :, i] = new[:, :, i].gather(2, first[:, None, None].expand(-1, 2, 1)).squeeze(2)
    return centre.masked_fill_(absent, ink).mT.long()


def paste(digits, corner, size):
    """Digits (n, k, 28, 28) with their frames' corners (n, k, 2) at those px, the brighter ink on top: (n, size, size).
    A frame may stand out over the edge of the canvas, its ink may not."""
    n, k = digits.shape[:2]
    wide = size + 2 * FRAME
    frame = torch.arange(FRAME, device=digits.device)
    row, column = (corner + FRAME).unbind(-1)                               # (n, k)
    where = (row[..., None, None] + frame[:, None]) * wide + column[..., None, None] + frame
    canvas = torch.zeros(n, wide * wide, dtype=torch.uint8, device=digits.device)
    canvas.scatter_reduce_(1, where.flatten(1), digits.flatten(1), "amax")
    return canvas.view(n, wide, wide)[:, FRAME:-FRAME, FRAME:-FRAME]


def test_canvases(phase, images, labels, n=None, **options):
    """The test set of a phase, from the test digits: the same on every machine and device, since it is drawn on the
    CPU with a seed of its own; n canvases, which are others for another n (default: TEST_CANVASES, or every digit once
    where a canvas is one digit). Returns canvases and cell labels as `canvases` does, on the CPU."""
    options = canvas_options(phase, images, labels, **options)
    if options["size"] == FRAME == PHASES[phase].cell and not has_empty_cells(phase):
        return images[:n], labels[:n].view(-1, 1, 1)
    return canvases(phase, images, labels, n or TEST_CANVASES, torch.Generator().manual_seed(2024), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Into the model and out of it

def to_input(canvases):
    """uint8 (n, H, W) -> float (n, 1, H, W). Half of a value says how dark the ink is, half that there is any, because a
    digit's box ends where its faintest ink does; the sum is in units of its standard deviation in MNIST, 0.34 of black.
    Paper stays 0, so that what a model pads an image with looks like paper."""
    ink = canvases[:, None].float()
    return (ink / 255 + ink.sign()) / (2 * 0.34)


def at_once(canvases):
    """How many of the canvases (n, H, W) a model is to read at once: about a million px."""
    return max(1, 2**20 // canvases[0].numel())


def read(logits, empty=10):
    """Logits (n, gh, gw, classes) -> for each canvas a list of (digit, row, column, confidence) in reading order, one
    for each cell whose most probable class is not `empty` (None: every cell holds a digit)."""
    confidence, best = logits.float().softmax(-1).max(-1)
    found = torch.ones_like(best, dtype=torch.bool) if empty is None else best != empty
    readings = [[] for _ in range(len(logits))]
    for (i, row, column), digit, share in zip(found.nonzero().tolist(), best[found].tolist(), confidence[found].tolist()):
        readings[i].append((digit, row, column, share))
    return readings


# ---------------------------------------------------------------------------------------------------------------------
# Files that a run leaves

def write_whole(path, content):
    """Write a file beside, then rename it: under its own name it is always whole, even where the power fails or the disk is
    full (OSError, and what was there before stays)."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be saved: {error.strerror}; an earlier one is kept, if there was one") from None
