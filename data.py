"""Digits and canvases: IDX files -> uint8 digits -> canvases with a label for every cell -> model input, and back.

    images, labels = data.load_mnist("data/mnist", "train")         # uint8 (60000, 28, 28), int64 (60000,)
    layout = data.layout(3, images, labels)
    generator = torch.Generator().manual_seed(0)
    canvas, numbers = data.canvases(layout, images, 256, generator)  # uint8 (256, 64, 64), int64 (256, 8, 8)
    cells = data.class_table(labels, layout)[numbers]               # the class of each cell, int64 (256, 8, 8)
    inputs = data.to_input(canvas)                                  # float (256, 1, 64, 64)
    readings = data.read(model(inputs), layout.empty)               # [[(digit, row, column, confidence), ...], ...]

All three phases share one idea: a canvas is a grid of cells, and each cell has one label. The table PHASES defines
the phases. Everything from the canvases on is tensor code that runs on the device of the digits.
"""
import gzip
import hashlib
import http.client
import math
import os
import re
import reprlib
import struct
import sys
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F

FRAME = 28  # px, side of a digit image

# ---------------------------------------------------------------------------------------------------------------------
# IDX files (http://yann.lecun.com/exdb/mnist/): two zero bytes, a type code, the number of dimensions, the dimensions
# as big-endian 32-bit integers, then the values, big-endian, in row-major order.

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def load_idx(path, max_bytes=2**30):
    """The array in an IDX file, raw or gzip (told apart by content), in native byte order.

    Memory grows with the data actually read, up to `max_bytes` of values: a forged header or a gzip bomb costs nothing.
    Raises ValueError, with the file's name and the reason, for anything that is not exactly one IDX array.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return parse_idx(gzip.GzipFile(fileobj=file) if is_gzip else file, max_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: corrupt gzip: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_idx(file, max_bytes):
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"not an IDX file: it starts with {magic!r}, not with two zero bytes, a type and a rank")
    if magic[2] not in IDX_TYPES:
        raise ValueError(f"unknown IDX type code 0x{magic[2]:02x}")
    if not 1 <= magic[3] <= 64:
        raise ValueError(f"an IDX array has 1 to 64 dimensions, not {magic[3]}")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError("too short: it ends within its header")
    shape = struct.unpack(f">{magic[3]}I", header)
    dtype = np.dtype(IDX_TYPES[magic[2]])
    expected, values = math.prod(shape) * dtype.itemsize, bytearray()
    if expected > max_bytes:
        raise ValueError(f"its header promises {expected:,} bytes, more than max_bytes={max_bytes:,}")
    while chunk := file.read(min(2**20, expected + 1 - len(values))):   # one byte extra reveals a file that is too long
        values += chunk
    if len(values) != expected:
        raise ValueError(f"too {'short' if len(values) < expected else 'long'}: "
                         f"its header promises {expected:,} bytes of values for shape {shape}")
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


# ---------------------------------------------------------------------------------------------------------------------
# MNIST, or any data set in files of the same four names

MIRRORS = ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"]
MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
       "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
       "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
       "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
CRC = {"train": 0xdf6dde61, "test": 0x190e897b}     # CRC-32 of MNIST's images followed by its labels, a byte each
SPLITS = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
          "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
KINDS = ("mnist", "custom", "drawn")    # of digits: MNIST's, another data set's under MNIST's file names, the program's


FILE = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[-.]idx\d-(?:ubyte|int)(?:\.gz)?")   # prefix, split, content


def load_mnist(data_dir, split):
    """Split "train" or "test" from the IDX files in a folder: uint8 (N, 28, 28) images, int64 (N,) labels.

    `find_set` says where they may be. Missing files of MNIST are downloaded. Of labels in several columns (QMNIST) the
    first counts. Raises ValueError for files that are not such a data set, ConnectionError if no mirror provides a
    missing file.
    """
    files = find_set(Path(data_dir))
    image_path, label_path = (files.get((split, content)) or fetch(Path(data_dir), files, name)
                              for content, name in zip(("images", "labels"), SPLITS[split]))
    images, labels = load_idx(image_path), load_idx(label_path)
    if images.dtype != np.uint8 or images.shape[1:] != (FRAME, FRAME) or len(images) == 0:
        raise ValueError(f"{image_path}: expected uint8 images (N, {FRAME}, {FRAME}), "
                         f"got {images.dtype} {images.shape}")
    if labels.ndim == 2 and labels.shape[1] > 0:
        labels = labels[:, 0]
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{label_path}: expected one label for each of {len(images)} images, got shape {labels.shape}")
    if labels.dtype.kind == "f" or labels.min() < 0 or labels.max() > 255:
        raise ValueError(f"{label_path}: expected class numbers from 0 to 255, "
                         f"got {labels.dtype} from {labels.min()} to {labels.max()}")
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def find_set(data_dir):
    """The files of the data set that a folder holds: {(split, "images" or "labels"): path}, empty where there is none.

    Names are MNIST's four, raw or .gz, with -idx or .idx, with test for t10k, and with any prefix, as EMNIST and QMNIST
    have them. A file may lie in a folder of its own name (Kaggle's archive), and the set in a folder below or in "raw"
    in that (torchvision). Where there are several sets, ValueError lists them; folder/prefix chooses one.
    """
    sets = sets_in(data_dir)
    if not sets and data_dir.is_dir():
        for folder in sorted(path for path in data_dir.iterdir() if path.is_dir()):
            sets |= sets_in(folder) or sets_in(folder / "raw")
    if not sets and not data_dir.exists():
        sets = {name: files for name, files in sets_in(data_dir.parent).items() if name == data_dir}
    if len(sets) > 1:
        names = " or ".join(f"--data_dir={name}" for name in sets)
        raise ValueError(f"{data_dir} holds several data sets: choose one by {names}")
    return next(iter(sets.values()), {})


def sets_in(folder):
    """The data sets whose files lie in a folder itself: {folder / prefix: {(split, content): path}}."""
    sets = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := FILE.fullmatch(path.name):
            path = path / path.name if (path / path.name).is_file() else path
            check_regular(path)
            prefix, split, content = match.groups()
            files = sets.setdefault(folder / prefix.rstrip("-_. "), {})
            files.setdefault(("train" if split == "train" else "test", content), path)      # a raw one before its .gz
    return sets


def fetch(data_dir, files, name):
    """Download a missing file of MNIST, unless the folder holds files of another data set. Returns its path."""
    if data_dir.exists() and not data_dir.is_dir():
        raise ValueError(f"{data_dir} is a file, not the folder of the digits' files")
    for other in files.values():
        if hashlib.md5(other.read_bytes()).hexdigest() != MD5.get(other.name):
            raise ValueError(f"{data_dir} has {other.name} but no {name}: if it is another data set, add the missing "
                             "file; to download MNIST, name an empty folder")
    return download(data_dir, name + ".gz")


def what_is_in(folder):
    """A folder's contents in a few words, and where there are digits nearby."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".part")) if folder.is_dir() else []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    words = f"it holds {', '.join(name[:60] for name in names[:5])}{more}" if names else "it is empty or not there"
    for name in sets_in(folder.parent):
        words += f"; there are digits in {name}: name it as --data_dir"
    return words


def download(data_dir, name, timeout=10):
    """Download a file of MNIST from the first mirror that delivers it intact. Returns its path.

    The file is written under a temporary name, checked and renamed, so one under its own name is always complete.
    `timeout` is in seconds, for each read. Raises ConnectionError if every mirror fails.
    """
    failures = []
    for mirror in MIRRORS:
        temporary = None
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=name + ".", suffix=".part", dir=data_dir)
            with os.fdopen(handle, "wb") as file, urllib.request.urlopen(mirror + name, timeout=timeout) as response:
                md5 = copy_with_progress(response, file, mirror + name)
            if md5 != MD5[name]:
                raise ValueError(f"{os.path.getsize(temporary)} bytes with MD5 {md5}, expected {MD5[name]}")
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner may read
            os.replace(temporary, data_dir / name)
            return data_dir / name
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            failures.append(f"{mirror + name}: {error}")
            print(f"download failed: {failures[-1]}", file=sys.stderr)
        finally:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
    raise ConnectionError(f"no {name.removesuffix('.gz')} in {data_dir} ({what_is_in(data_dir)}) "
                          f"and no mirror gave it ({'; '.join(failures)})")


def copy_with_progress(response, file, url):
    """Copy an HTTP response to a file, printing progress. Returns its MD5."""
    size, done, digest = int(response.headers.get("Content-Length") or 0), 0, hashlib.md5()
    while chunk := response.read(2**16):
        file.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        print(f"\rdownloading {url}: {done / 1e6:.1f} of {size / 1e6:.1f} MB", end="", file=sys.stderr)
        if done > 2**26:
            raise ValueError("it is longer than 64 MB")
    print(file=sys.stderr)
    return digest.hexdigest()


def load_digits(data, data_dir, split):
    """Split "train" or "test" of the digits asked for: uint8 (N, 28, 28) images, int64 (N,) labels, and one of KINDS.

    data: one of KINDS, or "auto" for the data set in the folder, else MNIST from a mirror, else, with a warning, digits
    drawn by the program. Raises ValueError for the wrong kind of digits, ConnectionError if MNIST is out of reach.
    """
    if data == "custom" and not find_set(Path(data_dir)):      # do not download MNIST instead
        raise ValueError(f"no data set in {data_dir}: name its folder as --data_dir ({what_is_in(Path(data_dir))})")
    if data != "drawn":
        try:
            images, labels = load_mnist(data_dir, split)
            crc = zlib.crc32(labels.byte().numpy(), zlib.crc32(images.numpy()))
            kind = "mnist" if crc == CRC[split] else "custom"
            if data not in ("auto", kind):
                raise ValueError(f"expected {data} digits, those of {data_dir} are {kind} ones: "
                                 "name their folder as --data_dir")
            return images, labels, kind
        except ConnectionError as error:
            if data != "auto":
                raise
            print(f"\n*** No MNIST: {error}\n*** Going on with digits drawn by the program itself. Every figure of "
                  'this run is marked "drawn" and says nothing about MNIST.\n', file=sys.stderr)
    n, seed = {"train": (60_000, 0), "test": (10_000, 1)}[split]
    return *drawn_digits(n, seed), "drawn"


# ---------------------------------------------------------------------------------------------------------------------
# Digits drawn by the program itself: strokes (x right, y down), each a smooth curve through its control points.
# A control point given twice makes a corner.

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
STROKE_POINTS = 80  # points along all strokes of a digit together, evenly spaced


def stroke_weights():
    """Weights (10, STROKE_POINTS, P) that map a digit's control points to points along its strokes, and the control
    points (10, P, 2), padded to P. The curves are linear in their control points, so one product draws all digits."""
    most = max(sum(map(len, strokes)) for strokes in STROKES.values())
    weights, controls = np.zeros((10, STROKE_POINTS, most)), np.zeros((10, most, 2))
    t = np.linspace(0, 1, 32)[None, :, None]
    for digit, strokes in STROKES.items():
        points = np.concatenate(strokes)
        curves, lengths, start = [], [], 0
        for stroke in strokes:
            # Catmull-Rom splines (1974): a cubic from each control point to the next
            basis = np.pad(np.eye(most)[start:start + len(stroke)], ((1, 1), (0, 0)), "edge")
            p0, p1, p2, p3 = (basis[i:i + len(stroke) - 1, None] for i in range(4))
            curve = (2*p1 + (p2 - p0)*t + (2*p0 - 5*p1 + 4*p2 - p3)*t**2 + (3*p1 - p0 - 3*p2 + p3)*t**3) / 2
            curve = curve.reshape(-1, most)                                 # (points, P)
            path = curve[:, :len(points)] @ points                          # (points, 2)
            curves.append(curve)
            lengths.append(np.concatenate(([0], np.hypot(*np.diff(path, axis=0).T))))  # the jump to a stroke counts 0
            start += len(stroke)
        curves, distance = np.concatenate(curves), np.cumsum(np.concatenate(lengths))
        even = np.linspace(0, distance[-1], STROKE_POINTS)
        weights[digit] = curves[np.searchsorted(distance, even).clip(0, len(curves) - 1)]
        controls[digit, :len(points)] = points
    return torch.from_numpy(weights).float(), torch.from_numpy(controls).float()


def drawn_digits(n, seed):
    """n digits of random class, shape, slant, size and pen: uint8 (n, 28, 28) images, int64 (n,) labels. As in MNIST,
    the ink fits in 20 x 20 px and its centre of mass is at the centre of the frame."""
    generator = torch.Generator().manual_seed(seed)
    weights, controls = stroke_weights()
    labels = torch.randint(10, (n,), generator=generator)
    images = torch.empty(n, FRAME, FRAME, dtype=torch.uint8)
    for batch in torch.arange(n).split(1000):  # small enough for the cache
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(len(batch), *shape, generator=generator)
        points = controls[labels[batch]]
        points = weights[labels[batch]] @ (points + uniform(-.05, .05, *points.shape[1:]))       # (n, points, 2)
        angle, slant, aspect = uniform(-.2, .2), uniform(-.1, .4), uniform(.6, 1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        x, y = (points - .5).unbind(-1)
        x = x * aspect[:, None] - y * slant[:, None]
        points = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1)
        # The pen is a Gaussian of width sigma; ink shows where it is above 0.15, up to 1.95 sigma from the stroke.
        sigma, side = uniform(.7, 1.15, 1, 1), uniform(18.5, 19.9, 1, 1)
        extent = (points.amax(1) - points.amin(1)).amax(1)[:, None, None]
        points = points * (side - 2 * 1.95 * sigma) / extent                                     # px
        points = points - points.mean(1, keepdim=True) + (FRAME - 1) / 2
        spacing = (points[:, 1:] - points[:, :-1]).norm(dim=-1).mean(1)[:, None, None]
        pixels = torch.arange(FRAME)
        x, y = (torch.exp(-((points[..., i, None] - pixels) / sigma) ** 2 / 2) for i in (0, 1))  # (n, points, 28)
        ink = y.mT @ x * spacing / (sigma * math.sqrt(2 * math.pi))  # 1 at the centre of a straight stroke
        images[batch] = ((ink - .15) / .45).clamp(0, 1).mul(255).round().byte()
    return images, labels


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation, for training only

def ink_span(images):
    """The start and the length of the ink (values above 0) in each line of uint8 images (..., n): int64 (...), px."""
    n, ink = images.shape[-1], images.clamp(max=1).short()                      # 0.7 times the CPU time of booleans
    position = torch.arange(1, n + 1, dtype=torch.int16, device=images.device)  # amax takes half the time of argmax
    end, from_end = ((ink * line).amax(-1).long() for line in (position, position.flip(0)))
    start = n - from_end                                                        # without ink: start is n, end is 0
    return start % n, (end - start).clamp(min=0)


def ink_box(images):
    """The bounding box of the ink in uint8 images (n, h, w): top, left, height, width, each int64 (n,), px."""
    top, height = ink_span(images.amax(2))
    left, width = ink_span(images.amax(1))
    return top, left, height, width


def ink_extent(images, matrix):
    """The lowest and highest (x, y), each (n, 2), px from the frame's centre, that the ink of images (n, 28, 28)
    reaches under linear maps (n, 2, 2). Measured at pixel centres; 0 without ink."""
    centre = (FRAME - 1) / 2
    start, length = ink_span(images)                                            # of each row: (n, 28)
    blank = length == 0
    y = torch.arange(FRAME, device=images.device) - centre                      # (28,)
    extents = []
    for by_x, by_y in (matrix[:, 0].unbind(-1), matrix[:, 1].unbind(-1)):       # the new x, the new y
        # The extremes lie on the outline: where the ink of a row starts and ends
        ends = [by_x[:, None] * (x - centre) + by_y[:, None] * y for x in (start, start + length - 1)]
        extents.append((torch.minimum(*ends).masked_fill(blank, math.inf).amin(1),
                        torch.maximum(*ends).masked_fill(blank, -math.inf).amax(1)))
    return tuple(torch.stack(extent, dim=-1).nan_to_num(posinf=0, neginf=0) for extent in zip(*extents))


def augment(images, rand, rotate=0.0, scale=0.0, shear=0.0, shift=0.0, elastic=0.0, elastic_points=3, side=FRAME):
    """Randomly rotate, scale, shear, shift and bend uint8 digits (n, 28, 28). Returns the same shape and type.

    rand: (*shape) -> uniform random numbers from 0 to 1, (n, *shape). rotate: maximum rotation, degrees. scale, shear:
    maximum change, as a fraction. shift, elastic: maximum displacement, px. Elastic displacements (Simard 2003) are
    random at elastic_points x elastic_points points and smooth between them. A digit whose ink would outgrow `side` px
    or leave the frame is shrunk or moved back; what elastic displacement pushes past `side` is cut off.
    """
    n, device = len(images), images.device

    def uniform(limit, *shape):
        return (rand(*shape) * 2 - 1) * limit

    angle, size, lean = uniform(math.radians(rotate)), 1 + uniform(scale, 2), uniform(shear)
    cos, sin = angle.cos(), angle.sin()
    # The matrix maps a source point (x, y), px from the frame's centre, to where it is drawn
    matrix = torch.stack((torch.stack((cos, lean * cos - sin), -1), torch.stack((sin, lean * sin + cos), -1)), 1)
    matrix = matrix * size[:, :, None]                                          # (n, 2, 2)
    low, high = ink_extent(images, matrix)                                      # (n, 2)
    shrink = ((side - 1) / (high - low).amax(1)).clamp(max=1)[:, None]
    matrix, low, high = matrix * shrink[:, None], low * shrink, high * shrink
    centre = (FRAME - 1) / 2
    move = torch.minimum(torch.maximum(uniform(shift, 2), -centre - low), centre - high)
    # grid_sample needs the inverse: the source of each target pixel, in half frames. It is linear in everything random,
    # so one matrix product computes it.
    (a, b), (c, d) = (row.unbind(-1) for row in matrix.unbind(1))               # linalg.inv synchronises with the host
    inverse = (torch.stack((d, -b, -c, a), dim=-1) / (a * d - b * c)[:, None] / (FRAME / 2)).view(n, 2, 2)
    weights = [inverse, -inverse @ move[:, :, None]]
    pixels = torch.arange(FRAME, device=device) - centre                        # (28,)
    basis = [pixels.repeat(FRAME, 1), pixels[:, None].repeat(1, FRAME), torch.ones(FRAME, FRAME, device=device)]
    if elastic:
        points = torch.eye(elastic_points, device=device)[None, :, :, None]
        bicubic = F.interpolate(points, (FRAME, 1), mode="bicubic")[0, :, :, 0]  # (points, 28), weights along each axis
        basis.extend((bicubic[:, None, :, None] * bicubic[None, :, None]).flatten(0, 1))
        weights.append(uniform(elastic / (FRAME / 2), 2, elastic_points**2))
    grid = torch.cat(weights, dim=2) @ torch.stack(basis).flatten(1)            # (n, 2, 28 * 28)
    grid = grid.unflatten(2, (FRAME, FRAME)).permute(0, 2, 3, 1)                # (n, 28, 28, 2)
    # Interpolation adds a faint fringe: a digit would have ink on 197 px on average, against 150 in MNIST. So a pixel
    # has ink only where most of its source does.
    source = torch.stack((images, images.clamp(max=1)), dim=1).float()          # (n, 2, 28, 28)
    drawn, inked = F.grid_sample(source, grid, align_corners=False).unbind(1)
    within_x, within_y = (((pixels - middle[:, None]).abs() < side / 2).float()  # faster than booleans
                          for middle in ((low + high) / 2 + move).unbind(1))
    drawn = (drawn * inked.round() * within_x[:, None] * within_y[:, :, None]).round().byte()
    vanished = drawn.amax((1, 2), keepdim=True) == 0
    return drawn + images * vanished                                            # a digit that vanished stays as it was


# ---------------------------------------------------------------------------------------------------------------------
# Canvases

class Phase(NamedTuple):
    size: int                   # px, side of the canvas
    cell: int                   # px, side of a cell; 28, like a digit's frame, where every cell holds a digit
    max_digits: Optional[int]   # 0 to max_digits digits anywhere, the other cells empty; None: a digit in every cell


PHASES = {1: Phase(size=28, cell=28, max_digits=None),
          2: Phase(size=56, cell=28, max_digits=None),
          3: Phase(size=64, cell=8, max_digits=5)}
LARGEST_CANVAS, MOST_DIGITS = 1024, 256  # px, digits on a canvas: limits that keep a whole test set in memory
TEST_CANVASES = 10_000  # in the test set of a phase, unless a canvas is one digit: then every test digit appears once


def has_empty_cells(phase):
    """Whether cells may be empty: "empty" is then the class after those of the digits."""
    return PHASES[phase].max_digits is not None


@dataclass(frozen=True)
class Layout:
    """How digits lie on a canvas: one in every cell, or a random number of them anywhere. In the second case, the cell
    that holds the centre of a digit's ink box has its label. Raises ValueError for a layout that cannot be drawn."""
    cell: int                           # px, side of a cell
    size: int                           # px, side of the canvas
    classes: int                        # digit classes; where cells may be empty, the class after them is "empty"
    max_digits: Optional[int] = None    # most digits on a canvas; None: one in every cell, and the rest does not apply
    min_distance: int = FRAME           # px between two centres along x or y, whichever is more (Chebyshev distance)
    ink: int = FRAME                    # px, largest side of a digit's ink box
    crowded: float = 0.0                # share of canvases that hold max_digits digits; the others hold 0 to max_digits
    borders: float = 0.0                # share of rows, and of columns, moved to within 1 px of the nearest cell border

    def __post_init__(self):
        integers = {"cell": self.cell, "canvas size": self.size, "classes": self.classes, "ink": self.ink,
                    "max_digits": 0 if self.max_digits is None else self.max_digits, "min_distance": self.min_distance}
        for name, value in integers.items():
            if type(value) is not int:
                raise ValueError(f"{name} must be a whole number, not {reprlib.repr(value)}")
        for name in ("crowded", "borders"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.size % self.cell or not 0 < self.size <= LARGEST_CANVAS:
            raise ValueError(f"canvas size {self.size} is not a multiple of the cell of {self.cell} px, "
                             f"up to {LARGEST_CANVAS} px")
        if self.max_digits is None:
            if self.crowded or self.borders:
                raise ValueError("this layout has a digit in every cell: crowded and borders do not apply")
            return
        if self.min_distance < self.cell:
            raise ValueError(f"min_distance {self.min_distance} is below the cell of {self.cell} px: "
                             "two digits could share a cell")
        if not 1 <= self.max_digits <= self.capacity:
            raise ValueError(f"max_digits must be from 1 to {self.capacity}, which is what surely fits on a canvas of "
                             f"{self.size} px with centres {self.min_distance} px apart and ink up to {self.ink} px "
                             f"wide, not {self.max_digits}")

    @property
    def empty(self):
        """The class of an empty cell, or None where every cell holds a digit."""
        return None if self.max_digits is None else self.classes

    @property
    def grid(self):
        """Cells along a side."""
        return self.size // self.cell

    @property
    def apart(self):
        """Fewest cells from one digit to the next, along rows or columns, whichever is more."""
        return self.min_distance // self.cell

    @property
    def lattice(self):
        """Lines along a side of a square lattice on which digits surely fit, whatever the sides of their ink. The lines
        are min_distance + 0.5 px apart: the centre of an odd side lies on a half px, that of an even side does not."""
        return 0 if self.size < self.ink else (2 * (self.size - self.ink)) // (2 * self.min_distance + 1) + 1

    @property
    def capacity(self):
        """Most digits that surely fit on a canvas where they lie anywhere."""
        return min(self.lattice**2, MOST_DIGITS)


def layout(phase, images, labels, size=None, max_digits=None, min_distance=None, classes=None):
    """The Layout of a phase; what is None gets its default from the phase and from uint8 (N, 28, 28) images and int64
    (N,) labels. By default, digits lie so far apart that their ink never overlaps. Raises ValueError as Layout does."""
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(map(str, PHASES))}, not {phase!r}")
    spec = PHASES[phase]
    size = spec.size if size is None else size
    classes = int(labels.max()) + 1 if classes is None else classes
    if not has_empty_cells(phase):
        if max_digits is not None or min_distance is not None:
            raise ValueError(f"phase {phase} has a digit in every cell: max_digits and min_distance do not apply")
        return Layout(spec.cell, size, classes)
    _, _, height, width = ink_box(images)
    if not height.all():
        raise ValueError("a digit image is all zero: it has no ink whose centre could be found")
    ink = max(int(height.max()), int(width.max()))
    max_digits = spec.max_digits if max_digits is None else max_digits
    min_distance = max(ink, spec.cell) if min_distance is None else min_distance
    return Layout(spec.cell, size, classes, max_digits, min_distance, ink)


def class_table(labels, layout):
    """The class of each digit by its number, and last that of an empty cell: int64 (N,) labels -> int64 (N + 1,)."""
    return F.pad(labels, (0, 1), value=layout.classes)


def canvases(layout, images, n, generator, augmentation=None, part=slice(None), weights=None):
    """n random canvases of uint8 (N, 28, 28) images: uint8 (n, H, W), on the device of the images, and the number of
    the digit in each cell, which is its index in images, or N where the cell is empty: int64 (n, gh, gw).

    generator: on any device; its random numbers are moved to the images. augmentation: keywords of `augment`, or None.
    part: which of the n canvases to return, so that processes can share a batch. weights: float (N,), on the device of
    the images, proportional to how often each digit is drawn; None: all equally often.
    """
    # The random numbers of all n canvases are drawn, so that a canvas does not depend on the part that it is in
    def rand(*shape):
        return torch.rand(n, *shape, generator=generator, device=generator.device)[part].to(images.device)

    def randint(limit, *shape):
        return torch.randint(limit, (n, *shape), generator=generator, device=generator.device)[part].to(images.device)

    k = layout.grid**2 if layout.max_digits is None else layout.max_digits
    numbers = draw_numbers(len(images), k, rand, randint, weights)              # (n, k)
    digits = images[numbers.flatten()]
    if augmentation is not None:
        digits = augment(digits, lambda *shape: rand(k, *shape).flatten(0, 1), side=layout.ink, **augmentation)
    digits = digits.view(*numbers.shape, FRAME, FRAME)
    if layout.max_digits is None:
        return in_every_cell(layout, digits, numbers)
    return scattered(layout, digits, numbers, rand, randint, empty=len(images))


def draw_numbers(limit, k, rand, randint, weights):
    """k numbers from 0 to limit - 1 for each canvas, uniform or in proportion to weights (limit,): int64 (n, k)."""
    if weights is None:
        return randint(limit, k)
    cumulative = weights.cumsum(0)
    numbers = torch.searchsorted(cumulative, rand(k) * cumulative[-1], right=True)
    return numbers.clamp_(max=limit - 1)                    # the product may be rounded up to the whole sum


def in_every_cell(layout, digits, numbers):
    """One of the digits (n, k, 28, 28) in every cell. Returns canvases and numbers as `canvases` does."""
    grid = (layout.grid, layout.grid)
    canvas = digits.unflatten(1, grid).transpose(2, 3).reshape(len(digits), layout.size, layout.size)
    return canvas, numbers.unflatten(1, grid)


def scattered(layout, digits, numbers, rand, randint, empty):
    """A random number, 0 to k, of the digits (n, k, 28, 28), anywhere. Returns canvases and numbers as `canvases` does,
    with the number `empty` for cells without a digit."""
    n, k = numbers.shape
    count = randint(k + 1, 1)                                                   # (n, 1)
    if layout.crowded:
        count = torch.where(rand(1) < layout.crowded, k, count)
    present = torch.arange(k, device=digits.device) < count                     # (n, k)
    top, left, height, width = (edge.view(n, k) for edge in ink_box(digits.flatten(0, 1)))
    box = torch.stack((height, width), dim=-1)                                  # (n, k, 2), px
    centre = place(layout, box, present, rand)                                  # (n, k, 2), half px
    corner = (centre - box) // 2 - torch.stack((top, left), dim=-1)             # (n, k, 2), px, of the frame
    digits = digits * present[..., None, None]
    batches = zip(digits.split(500), corner.split(500))                         # limits the memory that indices take
    canvas = torch.cat([paste(*batch, layout.size) for batch in batches])
    # Absent digits are written to one extra cell, which is cut off
    row, column = (centre // (2 * layout.cell)).unbind(-1)
    cell = torch.where(present, row * layout.grid + column, layout.grid**2)     # (n, k)
    cells = torch.full((n, layout.grid**2 + 1), empty, device=digits.device)
    cells.scatter_(1, cell, numbers)
    return canvas, cells[:, :-1].view(n, layout.grid, layout.grid)


def place(layout, box, present, rand, sweeps=3, tries=32):
    """Centres of ink boxes (n, k, 2), px: int64 (n, k, 2), half px, uniform over all placements that keep min_distance
    (with layout.borders = 0).

    Placing one digit after another gets stuck: with five digits on 64 px about half the time. Instead, every canvas
    starts from a jittered lattice, which always fits, and then each digit in turn moves to a random place among those
    that the others leave free. This is Gibbs sampling, whose limit is the uniform distribution. Three sweeps come
    close: the positions of five digits differ from it by 2% in total variation. A digit that finds no free place in
    `tries` draws stays where it is; the distribution stays uniform.
    """
    k, distance = box.shape[1], 2 * layout.min_distance                         # half px
    sides = box.int().mT                                                        # (n, 2, k); faster than int64
    absent = ~present[:, None]                                                  # (n, 1, k)
    centre = lattice_start(layout, sides, rand)                                 # (n, 2, k)
    centre.masked_fill_(absent, -2 * layout.size - distance)                    # too far away to block any place
    for _ in range(sweeps):
        new = torch.stack([candidates(layout, side, tries, rand) for side in sides.unbind(1)], dim=1)
        current = centre[..., None]                                             # always free, so the last candidate
        new = torch.cat((torch.where(absent[..., None], current, new), current), dim=3)     # (n, 2, k, tries + 1)
        for i in range(k):
            gap = torch.maximum(*(new[:, :, i, None] - centre[..., None]).abs_().unbind(1))  # (n, k, tries + 1)
            gap[:, i] = distance                                                # a digit does not block itself
            first_free = (gap.amin(1) >= distance).byte().argmax(1)             # (n,)
            centre[:, :, i] = new[:, :, i].gather(2, first_free[:, None, None].expand(-1, 2, 1)).squeeze(2)
    return centre.masked_fill_(absent, layout.ink).mT.long()


def lattice_start(layout, sides, rand):
    """Centres on a jittered lattice for ink boxes with sides (n, 2, k), px: int32 (n, 2, k), half px."""
    lines, pitch = layout.lattice, 2 * layout.min_distance + 1
    slack = 2 * (layout.size - layout.ink) - (lines - 1) * pitch
    site = rand(lines * lines).argsort(dim=1, stable=True)[:, :sides.shape[2]]  # (n, k)
    row, column = site // lines, site % lines
    row_jitter = (rand(lines) * (slack + 1)).int().sort(1).values               # (n, lines)
    column_jitter = (rand(lines, lines) * (slack + 1)).int().sort(2).values     # (n, lines, lines), one set a row
    row = layout.ink + row * pitch + row_jitter.gather(1, row)
    column = layout.ink + column * pitch + column_jitter.flatten(1).gather(1, site)
    centre = torch.stack((row, column), dim=1)
    return (centre - (centre - sides) % 2).int()                                # even sides have centres on whole px


def candidates(layout, side, tries, rand):
    """Random centres along one axis for ink boxes with sides (n, k), px: int32 (n, k, tries), half px. A share of them,
    `borders`, moves next to a cell border: there, half a px decides which cell a digit is in, and most mistakes happen.
    """
    side, shape, cell = side[:, :, None], (side.shape[1], tries), 2 * layout.cell
    centre = side + 2 * (rand(*shape) * (layout.size - side + 1)).int()
    if layout.borders:
        border = (centre + layout.cell) // cell * cell                          # the nearest one
        near = border - 2 + (centre & 1) + 2 * (rand(*shape) * 2).int()         # -2, -1, 0 or 1 half px from it
        fits = (near >= side) & (near <= 2 * layout.size - side)
        centre = torch.where((rand(*shape) < layout.borders) & fits, near, centre)
    return centre


def paste(digits, corner, size):
    """Digits (n, k, 28, 28) pasted with their frames' top left corners at corner (n, k, 2), px: uint8 (n, size, size).
    Where digits overlap, the brighter ink shows. A frame may extend past the edge of the canvas, its ink may not."""
    n, k = digits.shape[:2]
    padded = size + 2 * FRAME
    offset = torch.arange(FRAME, device=digits.device)
    row, column = (corner + FRAME).unbind(-1)                                   # (n, k)
    index = (row[..., None, None] + offset[:, None]) * padded + column[..., None, None] + offset    # (n, k, 28, 28)
    canvas = torch.zeros(n, padded * padded, dtype=torch.uint8, device=digits.device)
    canvas.scatter_reduce_(1, index.flatten(1), digits.flatten(1), "amax")
    return canvas.view(n, padded, padded)[:, FRAME:-FRAME, FRAME:-FRAME]


def test_canvases(layout, images, labels, n=None):
    """The test set of a layout: uint8 (n, H, W) canvases and int64 (n, gh, gw) classes of their cells, on the CPU.

    They are drawn from uint8 (N, 28, 28) images and int64 (N,) labels on the CPU with a fixed seed, so every machine
    has the same. n: default TEST_CANVASES, or each digit once where a canvas is one digit. Canvases depend on n.
    """
    if layout.max_digits is None and layout.size == layout.cell == FRAME:
        return images[:n], labels[:n].view(-1, 1, 1)
    # Twice the canvases, three times the digits' frames, and labels: what `canvases` takes at its height
    each = 2 * layout.size**2 + 3 * (layout.max_digits or layout.grid**2) * FRAME**2 + 24 * layout.grid**2
    check_memory(each * (n or TEST_CANVASES), f"a test set of {n or TEST_CANVASES:,} canvases of {layout.size} x "
                 f"{layout.size} px (--test_canvases)")
    canvas, numbers = canvases(layout, images, n or TEST_CANVASES, torch.Generator().manual_seed(2024))
    return canvas, class_table(labels, layout)[numbers]


# ---------------------------------------------------------------------------------------------------------------------
# Into the model and out of it

def to_input(canvases):
    """uint8 canvases (n, H, W), a tensor or a NumPy array -> float32 model input (n, 1, H, W).

    A value is the mean of intensity and ink mask, divided by its standard deviation in MNIST, 0.34. The mask shows the
    faintest ink, where a digit's box ends. Paper stays 0, so a model's zero padding looks like paper.
    """
    ink = torch.as_tensor(canvases)[:, None].float()
    return (ink / 255 + ink.sign()) / (2 * 0.34)


def at_once(canvases):
    """Batch size for reading canvases (n, H, W): about a million px."""
    return max(1, 2**20 // canvases[0].numel())


def decode(logits, empty, apart=2):
    """Logits (n, gh, gw, classes) -> the class of each cell, int64 (n, gh, gw), decided jointly.

    The model says for each cell how likely the centre of a digit is in it. Near a border of cells it is split between
    them: each cell alone would have the digit twice, or not at all. So, on each canvas again and again, the surest
    cell whose probability of any digit, summed over it and the cells that touch it, is above a half gets a digit, and
    the cells around it are done. The class is the most probable one in that sum.

    empty: the class of empty cells, which is the last; None: every cell holds a digit. apart: the fewest cells from one
    digit to the next along a row or a column, whichever is more, Layout.apart; with 1, each cell is on its own.
    """
    if empty is None:
        return logits.argmax(-1)
    digits = logits.float().softmax(-1)[..., :empty]
    best = around(digits, min(apart, 2)).argmax(-1)
    labels, left, active = torch.full_like(best, empty), digits.sum(-1), torch.arange(len(best), device=best.device)
    while len(active):
        sure = left.where(around(left[..., None], min(apart, 2))[..., 0] > 0.5, 0).flatten(1).max(1)
        going = sure.values > 0
        active, left, cell = active[going], left[going], sure.indices[going]
        labels[active] = labels[active].flatten(1).scatter(1, cell[:, None], best[active].flatten(1).gather(
            1, cell[:, None])).view_as(left)
        chosen = torch.zeros_like(left).flatten(1).scatter(1, cell[:, None], 1.0).view_as(left)
        left = left * (around(chosen[..., None], apart)[..., 0] < 0.5)
    return labels


def around(share, apart):
    """float (n, gh, gw, k), summed for each cell over the cells less than `apart` from it: the same shape."""
    side = 2 * apart - 1
    return F.avg_pool2d(share.movedim(-1, 1), side, 1, apart - 1, divisor_override=1).movedim(1, -1)


def read(logits, empty="auto", apart=2):
    """Logits (n, gh, gw, classes) -> for each canvas a list of (digit, row, column, confidence) in reading order, one
    for each digit that `decode` finds. The confidence is the probability of that digit in its cell or one that touches.

    empty: the class of empty cells, layout.empty; None: every cell holds a digit. By default None for 10 classes and 10
    for 11; for other numbers it has to be said (ValueError). apart: as for `decode`, layout.apart.
    """
    classes = logits.shape[-1]
    if empty == "auto":
        if classes not in (10, 11):
            raise ValueError(f"which of {classes} classes is that of empty cells? Say empty={classes - 1}, "
                             "or empty=None if every cell holds a digit")
        empty = 10 if classes == 11 else None
    best, share = decode(logits, empty, apart), logits.float().softmax(-1)
    if empty is not None:
        share = around(share, min(apart, 2)).clamp(max=1)
    confidence = share.gather(-1, best[..., None])[..., 0]                      # (n, gh, gw)
    found = torch.ones_like(best, dtype=torch.bool) if empty is None else best != empty
    readings = [[] for _ in range(len(logits))]
    cells = zip(found.nonzero().tolist(), best[found].tolist(), confidence[found].tolist())
    for (i, row, column), digit, share in cells:
        readings[i].append((digit, row, column, share))
    return readings


class Score(NamedTuple):
    """Counts of cells on each canvas, int64 (n,)."""
    digits: torch.Tensor            # cells that hold a digit
    digits_right: torch.Tensor      # those of them that are read right
    empties: torch.Tensor           # empty cells
    empties_right: torch.Tensor
    exact: torch.Tensor             # 1 where all cells of the canvas are read right, else 0


def score(best, truth, classes):
    """The Score of the classes read in cells, by `decode`, against the true ones, both int64 (n, gh, gw). Those below
    `classes` are digits."""
    right, digit = (best == truth).flatten(1), (truth < classes).flatten(1)     # (n, cells)
    counts = (mask.sum(1) for mask in (digit, digit & right, ~digit, ~digit & right))
    return Score(*counts, exact=right.all(1).long())


# ---------------------------------------------------------------------------------------------------------------------
# Files and memory

def write_whole(path, content):
    """Write bytes to a file atomically, by renaming a temporary one: a power failure or a full disk leaves the previous
    file intact. Raises OSError if the file cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be saved: {error.strerror}; an earlier one is kept, if there was one") from None


def check_regular(path):
    """Raise ValueError for what exists and is no regular file: a FIFO would be waited for, a device never ends."""
    path = Path(path)
    if not path.is_file() and (path.exists() or path.is_symlink()):
        what = "a folder" if path.is_dir() else "a device or a pipe" if path.exists() else "a link that leads nowhere"
        raise ValueError(f"{path} is not a regular file but {what}")


def check_memory(needed, what, free=None):
    """Raise ValueError for what needs more bytes than are free, by default of the system's memory if it tells."""
    try:
        free = free or 1024 * int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # not Linux
        return
    if needed > free:
        raise ValueError(f"{what} would take {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free")
