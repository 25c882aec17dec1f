"""The tests: python -m pytest -q. With MNIST_DIR=folder of the MNIST files they also train on real digits."""
import contextlib
import copy
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
from vit import ViT, ViTConfig

HERE = Path(__file__).parent
needs_mnist = pytest.mark.skipif(not os.environ.get("MNIST_DIR"), reason="set MNIST_DIR to the folder of the MNIST files")
AUGMENTATION = dict(rotate=20, scale=0.2, shear=0.2, shift=2, elastic=2)


@pytest.fixture(scope="session")
def drawn():
    return data.drawn_digits(2000, seed=5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randoms(n):
    generator = seeded()
    return lambda *shape: torch.rand(n, *shape, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# IDX files


def idx_bytes(array, code):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.astype(data.IDX_TYPES[code]).tobytes()


@pytest.mark.parametrize("code", data.IDX_TYPES)
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 0, 2), (2, 3, 4), (1,) * 20 + (5,)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path, code, shape, pack):
    values = np.random.default_rng(0).integers(-100, 100, shape)
    array = values.astype(np.dtype(data.IDX_TYPES[code]).newbyteorder("="))
    (tmp_path / "x").write_bytes(pack(idx_bytes(array, code)))
    loaded = data.load_idx(tmp_path / "x")
    assert loaded.dtype == array.dtype and loaded.dtype.isnative and loaded.shape == shape
    np.testing.assert_array_equal(loaded, array)


GOOD = idx_bytes(np.arange(24).reshape(2, 3, 4), 0x0C)
REFUSED = {
    "empty": (b"", "not an IDX file"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an IDX file"),
    "two bytes": (b"\0\0", "not an IDX file"),
    "unknown type": (b"\0\0\x0a\1" + bytes(8), "unknown IDX type code 0x0a"),
    "no dimensions": (b"\0\0\x08\0" + bytes(8), "1 to 64 dimensions, not 0"),
    "too many dimensions": (b"\0\0\x08\x41" + bytes(4 * 65), "1 to 64 dimensions, not 65"),
    "cut header": (GOOD[:9], "within its header"),
    "cut values": (GOOD[:-1], "too short"),
    "a byte over": (GOOD + b"\0", "too long"),
    "absurd size": (b"\0\0\x0e\3" + b"\xff" * 12, "max_bytes"),
    "empty but huge": (b"\0\0\x08\4" + bytes(4) + b"\xff" * 12, ""),
    "cut gzip": (gzip.compress(GOOD)[:-3], "corrupt gzip"),
    "broken gzip": (gzip.compress(GOOD)[:12] + b"\xff\xff\xff\xff" + gzip.compress(GOOD)[16:], "corrupt gzip"),
    "wrong checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "corrupt gzip"),
    "gzip of a page": (gzip.compress(b"<html>"), "not an IDX file"),
    "gzip, then rubbish": (gzip.compress(GOOD) + b"rubbish", "corrupt gzip"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_idx_refuses(tmp_path, name):
    content, words = REFUSED[name]
    (tmp_path / "some-file").write_bytes(content)
    if name == "empty but huge":  # no values, so nothing to refuse but what numpy cannot hold: never another array
        try:
            assert data.load_idx(tmp_path / "some-file").size == 0
        except ValueError as error:
            assert "some-file" in str(error)
        return
    with pytest.raises(ValueError, match=words) as caught:
        data.load_idx(tmp_path / "some-file")
    assert "some-file" in str(caught.value)


def test_idx_gzip_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "bomb").write_bytes(gzip.compress(b"\0\0\x08\1" + struct.pack(">I", 10**7) + bytes(10**7)))
    with pytest.raises(ValueError, match="max_bytes=1,000"):
        data.load_idx(tmp_path / "bomb", max_bytes=1000)
    # One holds more than its header says, one much less: neither takes memory that it does not need.
    (tmp_path / "long").write_bytes(gzip.compress(b"\0\0\x08\1" + struct.pack(">I", 10) + bytes(10**8)))
    (tmp_path / "short").write_bytes(b"\0\0\x08\1" + struct.pack(">I", 900_000_000) + bytes(10))
    for name in ("long", "short"):
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"too {name}"):
            data.load_idx(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3e6


def damage(folder, count):
    """Read files with a few bytes changed, added or cut off, raw and gzip: the array that the bytes spell, or ValueError."""
    rng, packed, read = np.random.default_rng(0), gzip.compress(GOOD, mtime=0), 0
    for i in range(count):
        content = bytearray(GOOD if i % 2 else packed)
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(16) if rng.random() < 0.5 else rng.integers(len(content))     # headers half of the time
            content[place] = rng.integers(256)
        if i % 5 == 0:
            content = content[:rng.integers(len(content) + 1)] + rng.bytes(rng.integers(3))
        (folder / "x").write_bytes(content)
        try:
            array = data.load_idx(folder / "x")
        except ValueError as error:
            assert "x: " in str(error) and "\n" not in str(error)
            continue
        read += 1
        spelt = content if i % 2 else gzip.decompress(content)
        assert array.dtype.isnative and idx_bytes(array, spelt[2]) == spelt
    return read


def test_idx_survives_damage(tmp_path):
    tracemalloc.start()
    read = damage(tmp_path, 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 200 < read < 1000 and peak < 3e6  # some damage is to values alone


# ---------------------------------------------------------------------------------------------------------------------
# MNIST and its download


def write_mnist(folder, images, labels, split="train", spell=lambda name: name, pack=bytes):
    for name, array in zip(data.SPLITS[split], (images, labels)):
        (folder / spell(name)).write_bytes(pack(idx_bytes(array.numpy(), 0x08)))


@pytest.mark.parametrize("spell,pack", [(str, bytes), (lambda name: name + ".gz", gzip.compress),
                                        (lambda name: name.replace("-idx", ".idx"), bytes),
                                        (lambda name: name.replace("-idx", ".idx") + ".gz", gzip.compress)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_load_mnist_spellings(tmp_path, drawn, split, spell, pack):
    images, labels = drawn[0][:20], drawn[1][:20]
    write_mnist(tmp_path, images, labels, split, spell, pack)
    loaded = data.load_mnist(tmp_path, split)
    assert loaded[0].dtype == torch.uint8 and loaded[1].dtype == torch.int64
    assert torch.equal(loaded[0], images) and torch.equal(loaded[1], labels)


@pytest.mark.parametrize("images,labels,words", [
    (torch.zeros(3, 28, 28), torch.zeros(4), "one label for each of 3 images"),
    (torch.zeros(3, 27, 28), torch.zeros(3), r"expected uint8 images \(N, 28, 28\)"),
    (torch.zeros(0, 28, 28), torch.zeros(0), r"expected uint8 images \(N, 28, 28\)"),
    (torch.zeros(3, 28), torch.zeros(3), r"expected uint8 images \(N, 28, 28\)")])
def test_load_mnist_refuses(tmp_path, images, labels, words):
    write_mnist(tmp_path, images, labels)
    with pytest.raises(ValueError, match=words):
        data.load_mnist(tmp_path, "train")


def test_load_mnist_refuses_labels_that_are_no_classes(tmp_path):
    write_mnist(tmp_path, torch.zeros(3, 28, 28), torch.zeros(3))
    (tmp_path / data.SPLITS["train"][1]).write_bytes(idx_bytes(np.array([0, -1, 2]), 0x09))
    with pytest.raises(ValueError, match="class numbers from 0 to 255"):
        data.load_mnist(tmp_path, "train")


@pytest.fixture
def mirrors(monkeypatch, tmp_path, drawn):
    """Two mirrors on loopback; what they answer is in the dictionary that the fixture gives: path -> (status, body)."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(answers.get("sleep", 0))
            status, body = answers.get(self.path, (404, b"no such file"))
            self.send_response(status)
            self.send_header("Content-Length", answers.get("length " + self.path, len(body)))
            try:
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:
                pass

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "MIRRORS", [f"http://127.0.0.1:{server.server_port}/{mirror}/" for mirror in "ab"])
    good = {name + ".gz": gzip.compress(idx_bytes(array[:20].numpy(), 0x08)) for name, array in zip(data.SPLITS["train"], drawn)}
    monkeypatch.setattr(data, "MD5", {name: hashlib.md5(body).hexdigest() for name, body in good.items()})
    answers["good"] = good
    yield answers
    server.shutdown()
    server.server_close()


def serve(mirrors, mirror, status=200, change=lambda body: body):
    for name, body in mirrors["good"].items():
        mirrors[f"/{mirror}/{name}"] = (status, change(body))


def test_download(mirrors, tmp_path, drawn, capsys):
    serve(mirrors, "a")
    images, labels = data.load_mnist(tmp_path / "new" / "folder", "train")
    assert torch.equal(images, drawn[0][:20]) and torch.equal(labels, drawn[1][:20])
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(mirrors["good"])
    assert "downloading" in capsys.readouterr().err
    mirrors.clear()  # what is there is not asked for again
    assert torch.equal(data.load_mnist(tmp_path / "new" / "folder", "train")[0], images)


@pytest.mark.parametrize("fault", [dict(status=404), dict(change=lambda body: body[:-9]), dict(change=lambda body: b"x" + body[1:])],
                         ids=["404", "truncated", "wrong content"])
def test_download_takes_the_second_mirror(mirrors, tmp_path, drawn, fault):
    serve(mirrors, "a", **fault)
    serve(mirrors, "b")
    assert torch.equal(data.load_mnist(tmp_path, "train")[0], drawn[0][:20])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mirrors["good"])


def test_download_with_the_first_mirror_dead(mirrors, tmp_path, drawn, monkeypatch):
    serve(mirrors, "b")
    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:9/", data.MIRRORS[1]])
    assert torch.equal(data.load_mnist(tmp_path, "train")[1], drawn[1][:20])


def test_download_gives_up_on_a_silent_mirror(mirrors, tmp_path):
    mirrors["sleep"] = 2
    began = time.perf_counter()
    with pytest.raises(ConnectionError, match="timed out"):
        data.download(tmp_path, "train-images-idx3-ubyte.gz", timeout=0.2)
    assert time.perf_counter() - began < 2 and list(tmp_path.iterdir()) == []


def test_download_does_not_mix_data_sets(mirrors, tmp_path, drawn):
    serve(mirrors, "a")
    write_mnist(tmp_path, *drawn, "test")  # not MNIST's, and its training digits are missing
    with pytest.raises(ValueError, match="name an empty folder"):
        data.load_digits("auto", tmp_path, "train")
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_download_into_one_folder(mirrors, tmp_path, drawn):
    serve(mirrors, "a")
    mirrors["sleep"] = 0.5  # so that both are at it at once
    code = "import data, sys\n" + "\n".join(f"data.{name} = {getattr(data, name)!r}" for name in ("MIRRORS", "MD5")) + \
           "\nimages, labels = data.load_mnist(sys.argv[1], 'train')\nprint(images.sum().item(), labels.sum().item())"
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "mnist"], cwd=HERE, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for _ in range(2)]
    _, printed, errors = finish(both)
    assert printed == [f"{drawn[0][:20].sum()} {drawn[1][:20].sum()}\n"] * 2, errors
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(mirrors["good"])


def test_download_that_breaks_off(mirrors, tmp_path):
    serve(mirrors, "a", change=lambda body: body[:-9])
    mirrors.update({"length /a/" + name: len(body) for name, body in mirrors["good"].items()})
    with pytest.raises(OSError, match="no mirror gave it"):
        data.load_mnist(tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_download_keeps_nothing_wrong(mirrors, tmp_path):
    serve(mirrors, "a", change=lambda body: b"<html>")
    with pytest.raises(OSError, match="expected " + "[0-9a-f]{32}") as caught:
        data.load_mnist(tmp_path, "train")
    assert "404" in str(caught.value) and list(tmp_path.iterdir()) == []


def test_digits_are_called_what_they_are(tmp_path, drawn, monkeypatch):
    """Other files under MNIST's names are never taken for MNIST, nor the other way about, and MNIST's never fill in for them."""
    for split in data.SPLITS:
        write_mnist(tmp_path, *drawn, split)
    assert data.load_digits("auto", tmp_path, "train")[2] == data.load_digits("custom", tmp_path, "test")[2] == "custom"
    with pytest.raises(ValueError, match="expected mnist digits, those of .* are custom ones"):
        data.load_digits("mnist", tmp_path, "test")
    monkeypatch.setitem(data.CRC, "test", zlib.crc32(drawn[0].numpy().tobytes() + bytes(drawn[1].tolist())))
    assert data.load_digits("mnist", tmp_path, "test")[2] == "mnist"
    with pytest.raises(ValueError, match="expected custom digits, those of .* are mnist ones"):
        data.load_digits("custom", tmp_path, "test")
    with pytest.raises(ValueError, match="no data set in .*: name its folder as --data_dir"):
        data.load_digits("custom", tmp_path / "moved", "test")
    assert not (tmp_path / "moved").exists()
    (tmp_path / "page.txt").touch()
    with pytest.raises(ValueError, match="page.txt is a file, not the folder of the digits' files"):
        data.load_digits("auto", tmp_path / "page.txt", "train")
    (tmp_path / data.SPLITS["train"][1]).unlink()                           # what is there says which file is missing
    with pytest.raises(ValueError, match="but no train-labels-idx1-ubyte"):
        data.load_digits("custom", tmp_path, "train")


def test_no_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:9/", "https://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(OSError, match="no mirror gave it"):
        data.load_digits("mnist", tmp_path, "train")
    monkeypatch.setattr(data, "drawn_digits", lambda n, seed: (n, seed))
    assert data.load_digits("auto", tmp_path, "test") == (10_000, 1, "drawn")
    assert "No MNIST" in capsys.readouterr().err
    (tmp_path / data.SPLITS["train"][0]).write_bytes(b"<html>")  # a broken file is an error, not a reason to draw
    (tmp_path / data.SPLITS["train"][1]).write_bytes(b"<html>")
    with pytest.raises(ValueError, match="not an IDX file"):
        data.load_digits("auto", tmp_path, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Drawn digits and augmentation


def test_drawn_digits_are_laid_out_as_mnist_is(drawn):
    images, labels = drawn
    assert images.shape == (2000, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount(minlength=10).min() > 140
    _, _, height, width = data.ink_box(images)
    assert torch.maximum(height, width).max() <= 20 and torch.maximum(height, width).min() >= 16
    weight = images.float() / images.sum((1, 2), keepdim=True)
    centre = torch.stack(((weight.sum(2) * torch.arange(28)).sum(1), (weight.sum(1) * torch.arange(28)).sum(1)))
    assert (centre - 13.5).abs().max() < 1.5 and (centre - 13.5).abs().mean() < 0.3
    again = data.drawn_digits(2000, seed=5)
    assert torch.equal(images, again[0]) and not torch.equal(images, data.drawn_digits(2000, seed=6)[0])


def test_drawn_digits_differ_by_class(drawn):
    """Each looks more like the mean of its own class than like any other's, mostly."""
    images, labels = drawn[0].float().flatten(1), drawn[1]
    means = torch.stack([images[:1000][labels[:1000] == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(images[1000:], means).argmin(1) == labels[1000:]).float().mean() > 0.8


def test_augment_moves_ink_but_keeps_it_whole_and_small(drawn):
    images = drawn[0]
    changed = data.augment(images, randoms(len(images)), **AUGMENTATION, side=20)
    _, _, height, width = data.ink_box(changed)
    assert torch.maximum(height, width).max() <= 20
    assert (changed != images).flatten(1).any(1).all()
    # Frames wide open: no ink is lost over the edge, however far it is thrown.
    far = data.augment(images, randoms(len(images)), shift=14)
    (_, _, *sides), (top, _, *far_sides) = data.ink_box(images), data.ink_box(far)
    assert all((side - far_side).abs().max() <= 1 for side, far_side in zip(sides, far_sides))
    assert top.min() == 0 and top.max() > 8


def test_augmented_digits_have_as_much_ink_as_others(drawn):
    """No faint fringe around them, which a model would learn to expect."""
    inked, changed = ((images > 0).sum((1, 2)).float().mean() for images in (
        drawn[0], data.augment(drawn[0], randoms(len(drawn[0])), **AUGMENTATION)))
    assert 0.96 < changed / inked < 1.04


def test_augment_keeps_the_size_of_digits_that_fill_their_box():
    """Training digits are as large as test digits: MNIST's all fill 20 px."""
    box = torch.zeros(500, 28, 28, dtype=torch.uint8)
    box[:, 4:24, 9:19] = 255
    changed = data.augment(box, randoms(len(box)), rotate=10, scale=0.1, shear=0.1, shift=1, elastic=1, side=20)
    _, _, height, _ = data.ink_box((changed > 100).byte())
    assert height.float().mean() > 19 and height.max() == 20


def upright_bars():
    bar = torch.zeros(500, 28, 28, dtype=torch.uint8)
    bar[:, 4:24, 13:15] = 255
    return bar


def middles(images):
    """Of the ink of each row of images (n, h, 28): (n, h), px."""
    return (images.float() * torch.arange(28)).sum(2) / images.float().sum(2)


def test_augment_bends():
    """A straight bar no longer is one; the middle of its rows' ink wanders, but by no more than it was told to."""
    bar = upright_bars()
    assert torch.equal(data.augment(bar, randoms(len(bar))), bar)
    middle = middles(data.augment(bar, randoms(len(bar)), elastic=2)[:, 6:22])                      # (500, 16)
    wander = middle.amax(1) - middle.amin(1)
    assert wander.median() > 0.7 and wander.max() < 5 and (middle.mean() - 13.5).abs() < 0.1


def test_augment_bends_smoothly():
    """With fewer points a bar takes fewer turns."""
    bar, turns = upright_bars(), []
    for points in (2, 3, 5, 9):
        bent = data.augment(bar, randoms(len(bar)), elastic=1.5, elastic_points=points)
        turns.append(middles(bent[:, 8:20]).diff(n=2).abs().mean().item())
    assert turns[0] < 0.7 * turns[1] < 0.5 * turns[2] < 0.4 * turns[3]


def test_augment_of_nothing_is_nothing(drawn):
    for side in (20, 28):
        assert torch.equal(data.augment(drawn[0], randoms(len(drawn[0])), side=side), drawn[0])
    faint = torch.zeros(3, 28, 28, dtype=torch.uint8)
    faint[:, 14, 14] = 1  # what would fade away altogether stays as it is
    assert data.augment(faint, randoms(len(faint)), **AUGMENTATION).flatten(1).any(1).all()
    blank = torch.zeros(3, 28, 28, dtype=torch.uint8)
    assert torch.equal(data.augment(blank, randoms(len(blank)), **AUGMENTATION), blank)


def test_augment_turns_and_scales():
    bar = torch.zeros(500, 28, 28, dtype=torch.uint8)
    bar[:, 7:21, 13:15] = 255                                  # upright, 14 x 2 px
    _, _, height, width = data.ink_box(data.augment(bar, randoms(len(bar)), rotate=90))
    assert width.max() >= 14 and width.min() <= 4 and height.min() <= 4
    _, _, height, width = data.ink_box(data.augment(bar, randoms(len(bar)), scale=0.5))
    assert height.max() >= 20 and height.min() <= 9


# ---------------------------------------------------------------------------------------------------------------------
# Canvases


def plates(n=200):
    """"Digits" that can be told apart anywhere: solid rectangles of random sides, image i of grey i + 1, class i % 10."""
    images, sides = torch.zeros(n, 28, 28, dtype=torch.uint8), torch.randint(1, 21, (n, 2), generator=seeded(1))
    sides[0] = 20
    for i, (height, width) in enumerate(sides.tolist()):
        images[i, 14 - height // 2:14 - height // 2 + height, 14 - width // 2:14 - width // 2 + width] = i + 1
    return images, torch.arange(n) % 10, sides


@pytest.mark.parametrize("options", [{}, dict(size=96, max_digits=9), dict(size=128, max_digits=36), dict(max_digits=9),
                                     dict(size=80, max_digits=12, min_distance=10), dict(max_digits=9, borders=0.7)])
def test_scattered_labels_are_what_the_pixels_say(options):
    images, labels, sides = plates()
    canvas, cells = data.canvases(3, images, labels, 300, seeded(), **options)
    size, distance = options.get("size", 64), options.get("min_distance", 20)
    assert canvas.shape == (300, size, size) and canvas.dtype == torch.uint8
    assert cells.shape == (300, size // 8, size // 8) and cells.dtype == torch.int64
    looked_at = 0
    for picture, label in zip(canvas.numpy(), cells.numpy()):
        greys = np.unique(picture[picture > 0])
        if len(greys) != (label != 10).sum():
            continue  # the same plate twice, or one hidden by a brighter one
        centres = []
        for grey in greys:
            rows, columns = np.nonzero(picture == grey)
            height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
            if distance >= 20:  # all of it inside the canvas, nothing over it
                assert (height, width) == tuple(sides[grey - 1].tolist()) and len(rows) == height * width
            elif (height, width) != tuple(sides[grey - 1].tolist()):
                break
            centres.append((rows.min() + height / 2, columns.min() + width / 2))
            assert label[int(centres[-1][0] // 8), int(centres[-1][1] // 8)] == (grey - 1) % 10
        else:
            looked_at += 1
            for i, (row, column) in enumerate(centres):
                assert all(max(abs(row - r), abs(column - c)) >= distance for r, c in centres[:i])
    assert looked_at > 60


def test_borders_bring_that_share_of_centres_beside_the_border_of_a_cell():
    n, size = 4000, 96
    box = torch.randint(1, 21, (n, 1, 2), generator=seeded())
    for share, least, most in ((0.0, 0.22, 0.28), (0.5, 0.58, 0.65), (1.0, 0.94, 1.0)):  # without: 4 of 16 half px
        centre = data.place(box, torch.ones(n, 1, dtype=torch.bool), size, 20, 20, randoms(n), 8, share)
        assert ((centre - box) % 2 == 0).all() and (centre >= box).all() and (centre <= 2 * size - box).all()
        beside = torch.isin(centre % 16, torch.tensor([14, 15, 0, 1])).float().mean()
        assert least < beside < most, (share, beside)


@pytest.mark.parametrize("max_digits,crowded", [(5, 0.0), (9, 0.0), (9, 0.3)])
def test_counts_are_uniform_but_on_crowded_canvases(max_digits, crowded):
    images, labels, _ = plates()
    _, cells = data.canvases(3, images, labels, 6000, seeded(), max_digits=max_digits, crowded=crowded)
    counts = (cells != 10).flatten(1).sum(1).bincount(minlength=max_digits + 1)
    expected = torch.full((max_digits + 1,), 6000 * (1 - crowded) / (max_digits + 1))
    expected[max_digits] += 6000 * crowded
    assert len(counts) == max_digits + 1
    assert ((counts - expected) ** 2 / expected).sum() < 30  # chi-square: 1e-3 at 9 degrees of freedom is 27.9
    digits = cells[cells != 10].bincount(minlength=10)
    assert digits.min() > 0.9 * digits.float().mean()


def test_layouts_are_uniform_over_all_that_keep_the_distance():
    """Against drawing whole layouts blindly until one fits, which is uniform by definition and far too slow to use."""
    n, k, side, size, distance = 20_000, 4, 20, 64, 20
    box = torch.full((n, k, 2), side)
    placed = data.place(box, torch.ones(n, k, dtype=torch.bool), size, distance, side, randoms(n))
    blind = torch.randint(0, size - side + 1, (600_000, k, 2), generator=seeded(1)) * 2 + side
    gap = (blind[:, :, None] - blind[:, None]).abs().amax(-1) + 10**6 * torch.eye(k, dtype=torch.long)
    blind = blind[gap.flatten(1).amin(1) >= 2 * distance]
    assert len(blind) > 5000

    def histograms(centre):
        cells = (centre // 16).clamp(max=7)
        where = (cells[..., 0] * 8 + cells[..., 1]).flatten().bincount(minlength=64) / centre[:, :, 0].numel()
        gap = (centre[:, :, None] - centre[:, None]).abs().amax(-1)
        return where, gap[gap > 0].clamp(max=88).bincount(minlength=89) / (gap > 0).sum()

    for mine, theirs in zip(histograms(placed), histograms(blind)):
        assert (mine - theirs).abs().sum() / 2 < 0.03  # total variation; two samples of this size differ by 0.02


def test_grid_phases_put_each_digit_on_its_cell(drawn):
    images, labels = drawn
    lookup = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels)}
    for phase, options, grid in ((1, {}, 1), (2, {}, 2), (2, dict(size=84), 3)):
        canvas, cells = data.canvases(phase, images, labels, 50, seeded(), **options)
        assert canvas.shape == (50, 28 * grid, 28 * grid) and cells.shape == (50, grid, grid)
        for i in range(50):
            for row in range(grid):
                for column in range(grid):
                    frame = canvas[i, 28 * row:28 * row + 28, 28 * column:28 * column + 28].contiguous()
                    assert lookup[frame.numpy().tobytes()] == cells[i, row, column]


@pytest.mark.parametrize("phase", data.PHASES)
def test_same_seed_same_canvases(drawn, phase):
    first, again, other = (data.canvases(phase, *drawn, 20, seeded(seed), AUGMENTATION) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("phase", data.PHASES)
def test_digits_are_drawn_in_proportion_to_their_weights(phase):
    images, labels, _ = plates(10)
    weights = torch.tensor([0, 0.3, 0, 0.1, 0.2, 0, 0, 0.6, 0.3, 0])
    for part in (slice(None), slice(1000, 3000)):
        _, cells = data.canvases(phase, images, labels, 4000, seeded(), part=part, weights=weights)
        counts = cells.flatten().bincount(minlength=11)[:10]
        expected = counts.sum() * weights / weights.sum()
        assert (counts[weights == 0] == 0).all()
        assert ((counts - expected) ** 2 / expected)[weights > 0].sum() < 23        # chi-square: 1e-4 at 4 degrees of freedom
    whole = data.canvases(phase, images, labels, 4000, seeded(), weights=weights)
    assert torch.equal(whole[1][1000:3000], cells)
    scaled = data.canvases(phase, images, labels, 4000, seeded(), weights=1000 * weights)
    assert all(torch.equal(*pair) for pair in zip(whole, scaled))


def test_test_canvases_are_the_same_everywhere():
    images, labels, _ = plates()
    assert data.test_canvases(1, images, labels, size=56)[1].shape == (10_000, 2, 2)
    for phase in data.PHASES:
        few, again = data.test_canvases(phase, images, labels, 7), data.test_canvases(phase, images, labels, 7)
        assert len(few[0]) == len(few[1]) == 7 and all(torch.equal(*pair) for pair in zip(few, again))
    canvas, cells = data.test_canvases(1, images, labels)
    assert torch.equal(canvas, images) and torch.equal(cells.flatten(), labels)
    sums = {}
    for phase in (2, 3):
        torch.manual_seed(phase)  # the global generator has no say
        canvas, cells = data.test_canvases(phase, images, labels)
        assert len(canvas) == len(cells) == 10_000
        sums[phase] = checksum(canvas, cells)
    assert sums == {2: "de604e99c8ab7f82", 3: "399f7040a28c232c"}


def test_a_canvas_of_one_cell_may_be_empty(drawn, monkeypatch):
    """A phase that somebody adds: its test canvases are like those of its training."""
    monkeypatch.setitem(data.PHASES, 4, data.Phase(size=28, cell=28, max_digits=1))
    canvas, cells = data.test_canvases(4, *drawn, 400)
    assert 150 < (cells == 10).sum() < 250 and torch.equal(canvas.flatten(1).any(1), (cells != 10).flatten())


def checksum(canvas, cells):
    return hashlib.sha256(canvas.contiguous().numpy().tobytes() + cells.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("phase,options,words", [
    (4, {}, "phase must be one of 1, 2, 3, not 4"),
    (3, dict(size=60), "canvas size 60 is not a multiple of phase 3's cell of 8 px"),
    (2, dict(size=64), "canvas size 64 is not a multiple of phase 2's cell of 28 px"),
    (3, dict(max_digits=10), "max_digits must be from 1 to 9"),
    (3, dict(max_digits=0), "max_digits must be from 1 to 9"),
    (3, dict(min_distance=7), "min_distance 7 is below the cell"),
    (3, dict(size=16), "what surely fits on a canvas of 16 px"),
    (3, dict(borders=1.5), "borders must be from 0 to 1"),
    (3, dict(crowded=-0.1), "crowded must be from 0 to 1"),
    (2, dict(borders=0.5), "a digit in every cell"),
    (1, dict(crowded=0.5), "a digit in every cell"),
    (2, dict(max_digits=3), "a digit in every cell")])
def test_canvases_refuse(phase, options, words):
    with pytest.raises(ValueError, match=words):
        data.canvases(phase, *plates()[:2], 5, seeded(), **options)


def test_canvases_refuse_a_digit_without_ink():
    with pytest.raises(ValueError, match="no ink"):
        data.canvases(3, torch.zeros(3, 28, 28, dtype=torch.uint8), torch.arange(3), 5, seeded())


def test_classes_come_from_the_labels():
    images, _, _ = plates()
    _, cells = data.canvases(3, images, torch.arange(200) % 26, 50, seeded())
    assert cells.max() == 26 and data.canvas_options(3, images, torch.arange(200) % 26)["classes"] == 26


def test_to_input():
    inputs = data.to_input(torch.tensor([[[0, 1, 51, 255]]], dtype=torch.uint8))
    assert inputs.shape == (1, 1, 1, 4) and inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.flatten(), torch.tensor([0, (1 + 1 / 255) / 2, 0.6, 1]) / 0.34)


def test_read():
    logits = torch.zeros(2, 2, 3, 11)
    logits[..., 10] = 9
    logits[0, 1, 0, 4] = 20
    logits[0, 0, 2, 7] = 10
    readings = data.read(logits)
    assert [reading[:3] for reading in readings[0]] == [(7, 0, 2), (4, 1, 0)] and readings[1] == []
    assert readings[0][0][3] == pytest.approx(np.e / (np.e + 1 + 9 * np.exp(-9)), rel=1e-5)
    assert [len(reading) for reading in data.read(logits, empty=None)] == [6, 6]


# ---------------------------------------------------------------------------------------------------------------------
# The model

CONFIGS = [dict(), dict(overlap=2), dict(class_token=True), dict(image_size=56, cell=28), dict(positions="rotary"),
           dict(image_size=64, patch_size=8, overlap=4, cell=8, num_classes=11, positions="rotary"),
           dict(image_size=64, patch_size=4, cell=8, num_classes=11), dict(positions="rotary", window=1),
           dict(class_token=True, positions="rotary", window=1), dict(in_channels=3, dropout=0.1, drop_path=0.1)]


@pytest.mark.parametrize("fields", CONFIGS)
def test_shapes_other_sizes_and_gradients(fields):
    config = ViTConfig(dim=32, depth=2, **fields)
    model = ViT(config)
    side = config.cell or config.patch_size
    for height, width in ((config.image_size,) * 2, (config.image_size + side, config.image_size), (side, 3 * side)):
        logits = model(torch.randn(3, config.in_channels, height, width))
        grid = (height // side, width // side) if config.cell else ()
        assert logits.shape == (3, *grid, config.num_classes) and logits.isfinite().all()
    F.cross_entropy(model(torch.randn(8, config.in_channels, *(config.image_size,) * 2)).flatten(0, -2),
                    torch.arange(8).repeat_interleave((config.image_size // config.cell) ** 2 if config.cell else 1)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 3, 28, 28), (1, 1, 29, 28), (1, 1, 28, 30), (1, 1, 0, 28)])
def test_model_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected float images \(B, 1, H, W\) with H and W multiples of 7 px, got torch.float32 \("):
        ViT(ViTConfig())(torch.zeros(shape))


def test_model_refuses_bytes():
    with pytest.raises(ValueError, match=r"expected float images .* got torch.uint8 \(2, 1, 28, 28\)"):
        ViT(ViTConfig())(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize("fields,words", [
    (dict(image_size=30), "image_size 30 is not a multiple of patch_size 7"), (dict(dim=66), "dim 66 is not a multiple of heads 4"),
    (dict(cell=10), "cell 10 must be a multiple"), (dict(depth=0), "depth must be a whole number from 1 up, not 0"),
    (dict(dim=64.0), "dim must be a whole number"), (dict(dropout=1.0), "dropout must be"), (dict(mlp_ratio=0), "mlp_ratio"),
    (dict(positions="sine"), 'positions must be "learned" or "rotary"'), (dict(positions="rotary", dim=24), "multiple of 4"),
    (dict(window=-1), "window must be a whole number from 0 up, not -1"),
    (dict(class_token=True, cell=7), "class_token"), (dict(class_token="yes"), "class_token must be a bool, not 'yes'"),
    (dict(dropout="0.1"), "dropout must be a float, not '0.1'"), (dict(mlp_ratio=None), "mlp_ratio must be a float, not None")])
def test_config_refuses(fields, words):
    with pytest.raises(ValueError, match=words):
        ViTConfig(**fields)


def test_rotary_scores_depend_on_the_distance_alone():
    """Turning a query at (r, c) and a key at (r + i, c + j) leaves a product that depends on (i, j), not on (r, c)."""
    from vit import rotary_table, rotate
    cos, sin = rotary_table(6, 5, 16, 0, "cpu")
    query, key = torch.randn(16, generator=seeded()), torch.randn(16, generator=seeded(1))
    scores = (rotate(query.expand(30, 16), cos, sin) @ rotate(key.expand(30, 16), cos, sin).T).view(6, 5, 6, 5)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[3, 1, 5, 4])
    torch.testing.assert_close(scores[2, 2, 1, 0], scores[5, 4, 4, 2])
    assert (scores[0, 0, 2, 3] - scores[0, 0, 3, 2]).abs() > 1e-3
    with_prefix = rotate(query.expand(32, 16), *rotary_table(6, 5, 16, 2, "cpu"))    # a class token has no place to turn with
    assert torch.equal(with_prefix[:2], query.expand(2, 16)) and torch.equal(with_prefix[2:], rotate(query.expand(30, 16), cos, sin))


@pytest.mark.parametrize("rows,columns", [(6, 9), (9, 6), (8, 11)])   # 54 tokens and 88: two forms of attention
def test_a_window_bounds_what_a_cell_depends_on(rows, columns):
    """Two blocks whose attention reaches two patches see four patches far, and no farther."""
    fields = dict(image_size=4 * rows, patch_size=4, cell=4, depth=2, positions="rotary")
    model = shaken(ViTConfig(window=2, **fields))
    images = torch.randn(1, 1, 4 * rows, 4 * columns, generator=seeded())
    changed = images.clone()
    changed[..., :4, :4] += 1
    differ = (model(images) - model(changed)).abs().amax(-1)[0] > 1e-6
    reached = torch.zeros(rows, columns, dtype=torch.bool)
    reached[:5, :5] = True
    assert torch.equal(differ, reached)
    farthest = max(rows, columns) - 1
    for window, same in ((farthest, True), (farthest - 1, False)):
        wide, everywhere = (shaken(ViTConfig(window=w, **fields)) for w in (window, 0))
        assert torch.allclose(wide(images), everywhere(images), atol=1e-6) == same


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_window_on_a_large_image(dtype, tolerance):
    """Of 33 x 24 patches most are out of reach: torch's kernel, which then has whole blocks of -inf, equals the plain form."""
    model = shaken(ViTConfig(patch_size=4, depth=1, positions="rotary", window=2))
    images = torch.randn(2, 1, 132, 96, generator=seeded())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert_same(model.forward_features(images).float(), model.forward_features(images, []).float(), tolerance)


def test_a_cell_reads_its_own_tokens():
    """Without blocks in between, a cell's logits are the head of the mean of its own patches and nothing else."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=16, patch_size=4, cell=8, dim=32, depth=1))
    model.blocks = torch.nn.ModuleList()
    images = torch.randn(2, 1, 16, 16)
    tokens = model.norm(model.patch_embed(images) + model.pos_embed)    # (2, 16, 32), in reading order
    upper_right = model.head(tokens[:, [2, 3, 6, 7]].mean(1))
    torch.testing.assert_close(model(images)[:, 0, 1], upper_right)


def plain_forward(state, images, patch, heads, window=0):
    """The ViT of a state dict with a class token, written out plainly: logits, and the attention of every block."""
    def linear(t, name):
        return torch.einsum("bni,oi->bno", t, state[name + ".weight"]) + state[name + ".bias"]

    def norm(t, name):
        centred = t - t.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name + ".weight"] + state[name + ".bias"]

    B, C, H, W = images.shape
    patches = images.view(B, C, H // patch, patch, W // patch, patch)
    x = torch.einsum("bcrpsq,dcpq->brsd", patches, state["patch_embed.proj.weight"]) + state["patch_embed.proj.bias"]
    x = torch.cat((state["cls_token"].expand(B, -1, -1), x.flatten(1, 2)), 1) + state["pos_embed"]
    apart, maps = None, []
    if window:
        places = [(row, column) for row in range(H // patch) for column in range(W // patch)]
        apart = torch.zeros(1 + len(places), 1 + len(places), dtype=torch.bool)
        for (i, one), (j, other) in itertools.product(enumerate(places, 1), repeat=2):
            apart[i, j] = max(abs(one[0] - other[0]), abs(one[1] - other[1])) > window
    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").unflatten(2, (3, heads, -1)).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        maps.append((scores if apart is None else scores.masked_fill(apart, -torch.inf)).softmax(-1))
        x = x + linear(torch.einsum("bhnm,bmhd->bnhd", maps[-1], v).flatten(2), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(h * (1 + torch.erf(h / 2**0.5)) / 2, f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm"), "head")[:, 0], torch.stack(maps)


def shaken(config):
    """A model in eval mode all of whose parameters matter: biases, norms and positions start where they do nothing."""
    torch.manual_seed(0)
    model = ViT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same(one, other, tolerance=1e-5):
    assert one.shape == other.shape and (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("fields", [
    dict(image_size=16, patch_size=4, dim=24, depth=3, heads=3), dict(image_size=32, patch_size=16, in_channels=3, num_classes=7),
    dict(image_size=30, patch_size=3, in_channels=2, dim=36, depth=1, heads=1, mlp_ratio=1.3), dict(dim=96, depth=7, heads=12, mlp_ratio=4),
    dict(window=1), dict(image_size=30, patch_size=3, window=4)])
def test_logits_and_attention_are_those_of_a_plain_forward(fields):
    """Few tokens and many, eager and compiled: each form of attention is the same."""
    model = shaken(ViTConfig(class_token=True, **fields))
    images = torch.randn(5, model.config.in_channels, *(model.config.image_size,) * 2)
    logits, maps = plain_forward(model.state_dict(), images, model.config.patch_size, model.config.heads, model.config.window)
    assert_same(model(images), logits)
    assert_same(model.attention_maps(images), maps)
    assert_same(model.forward_features(images, []), model.forward_features(images))
    assert_same(model.head(model.forward_features(images)[:, 0]), logits)
    torch._dynamo.reset()
    assert_same(torch.compile(model, backend="eager", fullgraph=True)(images), logits)


def test_parameters_have_the_names_that_public_weights_have():
    block = {"norm1": (48,), "attn.qkv": (144, 48), "attn.proj": (48, 48), "norm2": (48,), "mlp.fc1": (192, 48), "mlp.fc2": (48, 192)}
    layers = {"patch_embed.proj": (48, 3, 8, 8), "norm": (48,), "head": (5, 48)}
    layers |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected = {"cls_token": (1, 1, 48), "pos_embed": (1, 17, 48)}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    model = ViT(ViTConfig(image_size=32, patch_size=8, in_channels=3, num_classes=5, dim=48, depth=2, mlp_ratio=4, class_token=True))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_a_fractional_mlp_is_rounded_down_as_elsewhere():
    assert ViT(ViTConfig(dim=36, mlp_ratio=1.3)).blocks[0].mlp.fc1.out_features == 46     # of 46.8


@pytest.mark.parametrize("class_token", [True, False])
def test_weights_of_another_resolution_load(class_token):
    small = shaken(ViTConfig(class_token=class_token))
    large = ViT(ViTConfig(image_size=42, class_token=class_token)).eval()
    state = small.state_dict()
    large.load_state_dict(state)
    assert state["pos_embed"].shape[1] == 16 + class_token              # what was loaded from stays as it was
    images = torch.randn(2, 1, 42, 42)
    assert_same(large(images), small(images), 1e-6)                     # the small model resamples on the fly
    assert torch.equal(large.pos_embed[:, :class_token], small.pos_embed[:, :class_token])
    grid = small.pos_embed[0, class_token:].view(4, 4, -1).permute(2, 0, 1)
    expected = F.interpolate(grid[None], (6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(large.pos_embed[0, class_token:], expected)
    nested = torch.nn.ModuleDict({"eye": ViT(large.config)})            # a part of a larger model
    nested.load_state_dict({f"eye.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(nested["eye"].pos_embed, large.pos_embed)
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        large.load_state_dict(state | {"pos_embed": torch.zeros(1, 12, 64)})


def test_positions_of_a_rectangle():
    """Rows stay rows and columns columns: positions that differ by row alone do so on every grid."""
    from vit import resample_positions
    by_row = torch.arange(5.0).repeat_interleave(5).view(1, 25, 1)
    stretched = resample_positions(by_row, False, 9, 3).view(9, 3)
    assert torch.allclose(stretched, stretched[:, :1].expand(9, 3)) and (stretched[:, 0].diff() > 0).all()
    assert torch.allclose(resample_positions(torch.ones(1, 26, 2), True, 3, 7), torch.ones(1, 22, 2))


@pytest.mark.parametrize("name,parameters,gflops", [("Ti", 5_717_416, 2.507), ("S", 22_050_664, 9.198), ("B", 86_567_656, 35.13),
                                                    ("L", 304_326_632, 123.11)])
def test_presets_are_the_published_sizes(name, parameters, gflops):
    config = ViTConfig.preset(name)
    assert config.num_parameters() == parameters and config.flops() / 1e9 == pytest.approx(gflops, rel=1e-3)
    assert ViTConfig.preset(name, num_classes=10, image_size=384).num_classes == 10


def test_unknown_preset():
    with pytest.raises(ValueError, match="the presets are Ti, S, B, L, not 'H'"):
        ViTConfig.preset("H")


@pytest.mark.parametrize("fields", CONFIGS)
def test_parameters_and_flops_are_what_torch_counts(fields):
    model = ViT(ViTConfig(**fields))
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())
    side = model.config.cell or model.config.patch_size
    other = [(2 * side, 3 * side)] if model.config.positions == "rotary" else []  # resampling is not a forward pass
    for height, width in [(model.config.image_size,) * 2, *other]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randn(3, model.config.in_channels, height, width))
        assert model.config.flops(height, width) == pytest.approx(counter.get_total_flops() / 3, rel=0.02)


@pytest.mark.parametrize("fields", [dict(), dict(positions="rotary", overlap=2, cell=7, window=1), dict(class_token=True, dropout=0.1, drop_path=0.1)])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph_for_any_batch(fields, training):
    torch._dynamo.reset()
    model, graphs = ViT(ViTConfig(depth=2, **fields)).train(training), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for batch in (64, 64, 37, 1, 2, 100, 128, 1):
        compiled(torch.randn(batch, 1, 28, 28))
    assert 1 <= len(graphs) <= 3


@pytest.mark.parametrize("fields", [dict(positions="rotary", overlap=3, window=2), dict(class_token=True)])
def test_compiled_gradients_are_the_same_at_any_size(fields):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = ViT(ViTConfig(depth=1, **fields))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((28, 28), (28, 35), (42, 56)):
        gradients, images = [], torch.randn(6, 1, *size)
        for forward in (model, compiled):
            model.zero_grad()
            forward(images).square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert_same(*gradients)


@pytest.mark.parametrize("fields", CONFIGS)
def test_exports(fields):
    model = shaken(ViTConfig(**fields))
    shape = model.config.in_channels, *(model.config.image_size,) * 2
    program = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    images = torch.randn(5, *shape)
    assert_same(program.module()(images), model(images))


def test_bfloat16_autocast_is_near():
    for fields in CONFIGS:
        model = shaken(ViTConfig(**fields))
        images = torch.randn(4, model.config.in_channels, *(model.config.image_size,) * 2)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
        assert half.dtype == torch.bfloat16
        assert_same(half.float(), model(images), 0.03)


@pytest.mark.parametrize("fields", CONFIGS)
def test_copies_are_exact(fields, tmp_path):
    model = shaken(ViTConfig(**fields))
    images = torch.randn(2, model.config.in_channels, *(model.config.image_size,) * 2)
    with torch.device("meta"):
        empty = ViT(model.config).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for twin in (filled, copy.deepcopy(model)):
        assert torch.equal(twin(images), model(images))
        assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_seed_decides_everything():
    def train_a_little(seed):
        torch.manual_seed(seed)
        model = ViT(ViTConfig(depth=2, dropout=0.1, drop_path=0.1))
        model(torch.randn(4, 1, 28, 28)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(train_a_little(3), train_a_little(3)) and not torch.equal(train_a_little(3), train_a_little(4))


def test_dropout_and_drop_path_rest_in_eval_mode():
    torch.manual_seed(0)
    images = torch.randn(4, 1, 28, 28)
    plain = ViT(ViTConfig()).eval()
    for fields in (dict(dropout=0.3), dict(drop_path=0.3)):
        model = ViT(ViTConfig(**fields))
        model.load_state_dict(plain.state_dict())
        assert not torch.equal(model(images), model(images))
        assert torch.equal(model.eval()(images), plain(images))


SNIPPETS = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", range(max(3, len(SNIPPETS))))  # three at least
def test_snippets_of_the_readme_run_beside_vit_py_alone(tmp_path, snippet):
    shutil.copy(HERE / "vit.py", tmp_path)
    torch.save({"model": ViT(ViTConfig.preset("Ti")).state_dict()}, tmp_path / "deit_tiny_patch16_224.pth")
    # The shapes that its comments promise are checked too
    code, promises = re.subn(r"^( *)(\w+) = .*# (\(\d[\d, ]+\))", r"\g<0>\n\1assert \2.shape == \3, \2.shape  #", SNIPPETS[snippet],
                             flags=re.MULTILINE)
    assert promises >= 1
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_load_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)
    torch.save({"config": {}, "average": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "page.pt").write_bytes(b"<html>")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"config": {"wings": 2}, "average": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for number, config in enumerate((dict(dim=32), dict(dim=2**40), dict(depth=10**9), dict(image_size=7 * 10**9), dict(image_size=7 * 1000),
                                      dict(depth=-1))):
        torch.save({"config": config, "average": ViT(ViTConfig()).state_dict()}, tmp_path / f"shapes{number}.pt")
    for path in tmp_path.glob("*.pt"):
        with pytest.raises(ValueError, match="is not a checkpoint of this model") as caught:
            ViT.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "boom").exists()


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


def test_flat_parameters_are_the_model():
    model = ViT(ViTConfig(dim=32, depth=2, class_token=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights, gradients, matrices = train.flatten(model)
    assert train.still_flat(model, weights, gradients)
    assert all(p.data_ptr() % 64 == weights.data_ptr() % 64 for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    weights[:matrices] = 1
    weights[matrices:] = 2
    ones = {name for name, p in model.named_parameters() if (p == 1).all()}
    assert ones == {name for name in before if name.endswith("weight") and "norm" not in name}
    assert all((p == 2).all() for name, p in model.named_parameters() if name not in ones)
    model.zero_grad()
    assert not train.still_flat(model, weights, gradients)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_adamw_is_torchs(drawn, dtype, tolerance):
    """The same 100 gradients of a real model into both."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(dim=32, depth=2)).to(dtype)
    theirs = ViT(model.config).to(dtype)
    theirs.load_state_dict(model.state_dict())
    groups = [{"params": [p for name, p in theirs.named_parameters() if train.decays(name, p)], "weight_decay": 0.1},
              {"params": [p for name, p in theirs.named_parameters() if not train.decays(name, p)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    weights, gradients, matrices = train.flatten(model)
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(1, 101):
        canvas, cells = data.canvases(1, *drawn, 32, seeded(step))
        gradients.zero_()
        F.cross_entropy(model(data.to_input(canvas).to(dtype)), cells.flatten()).backward()
        for (name, p), other in zip(model.named_parameters(), theirs.parameters()):
            other.grad = p.grad.clone()
        lr = 1e-3 * step / 100
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        rates = torch.tensor(train.adamw_rates(step, lr, weight_decay=0.1, beta1=0.9, beta2=0.95), dtype=dtype)
        train.adamw(weights, gradients, mean, square, matrices, rates)
        for (name, p), other in zip(model.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(p, other, rtol=tolerance, atol=tolerance, msg=lambda m: f"step {step}, {name}: {m}")


def test_adamw_of_zero_rates_changes_nothing():
    """So a step that is not finite is left out without asking the device."""
    before = [torch.randn(1000, generator=seeded(i)) for i in range(3)]
    weights, mean, square = (tensor.clone() for tensor in before)
    train.adamw(weights, torch.zeros(1000), mean, square.square_(), 500, torch.zeros(5))
    assert torch.equal(weights, before[0]) and torch.equal(mean, before[1]) and torch.equal(square, before[2].square())


def test_learning_rate_rises_then_falls_to_zero():
    settings = train.Settings(max_steps=100, lr=2.0, warmup=0.1)
    rates = [train.learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[100] == 0


def test_sampling_weights():
    losses = torch.tensor([0.01, 0.04, 0.36, 0.01])
    torch.testing.assert_close(train.sampling_weights(losses, 0.6), 0.6 * torch.tensor([0.1, 0.2, 0.6, 0.1]) + 0.4 / 4)
    assert torch.equal(train.sampling_weights(losses, 0.0), torch.full((4,), 0.25))
    assert torch.equal(train.sampling_weights(torch.zeros(4), 1.0), torch.full((4,), 0.25))


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert train.pick_device("auto") == torch.device("cpu") and train.pick_device("cpu") == torch.device("cpu")
    assert train.pick_dtype("auto", torch.device("mps")) == torch.float32
    assert train.pick_dtype("bfloat16", torch.device("mps")) == torch.bfloat16
    for real in (True, False):  # many CPUs compute in bfloat16, but more slowly than in float32
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": real})
        assert train.pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if real else torch.float32)
        assert train.pick_dtype("float32", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sve": True})
    assert train.pick_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert train.pick_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert train.pick_device("auto").type == "mps"
    for real in (True, False):  # a GPU that only emulates bfloat16 gets float32
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: real or including_emulation)
        assert train.pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if real else torch.float32)
    with pytest.raises(ValueError, match="--device=nonsense cannot be used here"):
        train.pick_device("nonsense")
    current = []                            # a stream or graph on another device than the tensors' would compute nothing
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: types.SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    assert train.pick_device("cuda:1") == torch.device("cuda:1") and current == [1]


SMALL = ["--smoke", "--device=cpu", "--dtype=float32", "--dim=16", "--depth=1", "--heads=1"]


@pytest.mark.parametrize("flags", [["--phase=1"], ["--phase=2", "--dtype=bfloat16"], ["--phase=3"]])
def test_smoke_passes_and_leaves_nothing(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, *flags])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "FAIL" not in printed and "all right" in printed and not list(tmp_path.iterdir())
    for name in ("float32", *(["bfloat16"] if len(flags) > 1 else [])):
        assert printed.count(f"PASS  {name} ") == 7 and f"      {name}: " in printed
    assert "PASS  canvases: 100.00% as drawn on the CPU" in printed and "PASS  random numbers: one seed" in printed


@pytest.mark.parametrize("fault,failing", [
    (lambda out: out * 1.01, {"logits", "gradients", "gradient"}),
    (lambda out: out * float("nan"), {"logits", "gradients", "gradient", "AdamW", "training", "finite"})])
def test_smoke_notices_a_faulty_device(fault, failing, monkeypatch, capsys):
    """GELU in float32 is wrong, as a kernel of a device would be; that of the reference is not."""
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x) if x.dtype == torch.float64 else fault(gelu(x)))
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, "--phase=3"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 1 and f"{len(failing)} of 9 checks FAILED" in printed
    assert {line.split()[2].rstrip(":") for line in printed.splitlines() if line.startswith("FAIL")} == failing


@pytest.mark.parametrize("phase", data.PHASES)
def test_smoke_notices_a_device_that_draws_wrong(phase, monkeypatch, capsys):
    """Each time canvases are drawn their ink is fainter, as kernels of a faulty device might have it."""
    augment, calls = data.augment, []

    def dark(images, *rest, **options):
        calls.append(0)
        return augment(images, *rest, **options) // len(calls)

    monkeypatch.setattr(data, "augment", dark)
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, f"--phase={phase}"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 1 and "FAIL  canvases: " in printed and "FAIL  random numbers: one seed, two draws" in printed


def test_smoke_of_a_device_that_cannot(monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("no such kernel\nand a long story")
    monkeypatch.setattr(F, "gelu", refuse)
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, "--phase=3"])
    assert stopped.value.code == 1 and capsys.readouterr().err == "train.py: FAIL, this device cannot run it: no such kernel\n"


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("phase", data.PHASES)
def test_overfits_64_canvases(drawn, phase):
    torch.manual_seed(0)
    spec = data.PHASES[phase]
    canvas, cells = data.canvases(phase, *drawn, 64, seeded())
    model = ViT(ViTConfig(image_size=spec.size, patch_size=spec.cell if spec.cell < 14 else 14, depth=2, cell=spec.cell, num_classes=11))
    weights, gradients, matrices = train.flatten(model)
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(1, 301):
        gradients.zero_()
        logits = model(data.to_input(canvas))
        if torch.equal(logits.argmax(-1), cells):
            return
        F.cross_entropy(logits.flatten(0, 2), cells.flatten()).backward()
        train.adamw(weights, gradients, mean, square, matrices, torch.tensor(train.adamw_rates(step, 2e-3, 0.0, 0.9, 0.99)))
    pytest.fail(f"{(logits.argmax(-1) != cells).sum()} of {cells.numel()} cells still wrong after {step} steps")


@pytest.fixture
def few_digits(tmp_path, monkeypatch, drawn):
    """A folder of a small data set, and flags for a run of seconds on it: on the CPU, where the same run has the same bits."""
    folder = tmp_path / "digits"
    folder.mkdir()
    write_mnist(folder, drawn[0][:1500], drawn[1][:1500], "train")
    write_mnist(folder, drawn[0][1500:], drawn[1][1500:], "test")
    monkeypatch.setattr(data, "TEST_CANVASES", 100)
    return [f"--data_dir={folder}", f"--out_dir={tmp_path / 'out'}", "--dim=16", "--depth=1", "--heads=1", "--batch_size=16",
            "--log_every=4", "--save_every=0", "--device=cpu"]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("phase", data.PHASES)
def test_a_run_and_what_it_leaves(few_digits, tmp_path, phase, capsys):
    train.main([*few_digits, f"--phase={phase}", "--max_steps=10", "--eval_every=5"])
    lines = metrics(tmp_path / "out")
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 4), ("train", 5), ("eval", 5), ("train", 8), ("train", 10), ("eval", 10)]
    assert set(lines[0]) == {"event", "step", "seconds", "loss", "lr", "grad_norm", "images_per_second"}
    last = lines[-1]
    assert set(last) == {"event", "phase", "data", "step", "seconds", "train_seconds", "loss", "cell_accuracy",
                         "digit_accuracy", "empty_accuracy", "exact_match", "final"}
    assert last["final"] and not lines[2]["final"] and last["data"] == "custom" and last["phase"] == phase
    assert (last["empty_accuracy"] is None) == (phase != 3) and 0 <= last["exact_match"] <= last["cell_accuracy"] <= 1
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("digit accuracy", "exact canvases", "images/s", str(tmp_path / "out" / "ckpt.pt")))
    assert not list((tmp_path / "out").glob("*.part"))

    model = ViT.load(tmp_path / "out" / "ckpt.pt")
    assert not model.training
    images, labels = data.load_mnist(few_digits[0].split("=")[1], "test")
    options = {"classes": 10}
    cpu = torch.device("cpu")
    result = train.evaluate(model, *data.test_canvases(phase, images, labels, **options), 10, cpu, train.pick_dtype("auto", cpu))
    assert result["loss"] == pytest.approx(last["loss"]) and result["exact_match"] == last["exact_match"]

    for again in ("--eval_only", "--resume"):  # a finished run has nothing to go on with
        train.main([*few_digits, f"--phase={phase}", again, "--max_steps=10"])
        assert f"{100 * last['digit_accuracy']:.2f}%" in capsys.readouterr().out and metrics(tmp_path / "out") == lines


def test_phase_3_trains_on_harder_canvases_than_it_is_evaluated_on(few_digits, tmp_path, monkeypatch):
    drawn_with, canvases = [], data.canvases
    monkeypatch.setattr(data, "canvases", lambda *given, **options: drawn_with.append(options) or canvases(*given, **options))
    train.main([*few_digits, "--phase=3", "--max_steps=1", "--train_digits=7", "--crowded=0.4", "--borders=0.3", "--window=2"])
    evaluated, trained = drawn_with
    assert (trained["max_digits"], trained["crowded"], trained["borders"]) == (7, 0.4, 0.3)
    assert (evaluated["max_digits"], evaluated["crowded"], evaluated["borders"]) == (5, 0.0, 0.0)
    assert ViT.load(tmp_path / "out" / "ckpt.pt").config.window == 2


def test_training_digits_are_augmented_as_told(few_digits, monkeypatch):
    told, augment = [], data.augment
    monkeypatch.setattr(data, "augment", lambda images, rand, **how: told.append(how) or augment(images, rand, **how))
    train.main([*few_digits, "--phase=3", "--max_steps=1", "--rotate=7", "--elastic=1.5", "--elastic_points=4"])
    train.main([*few_digits, "--phase=3", "--max_steps=1"])         # by default not at all
    assert len(told) == 1 and told[0].pop("side") <= 28
    assert told[0] == dict(rotate=7, scale=0, shear=0, shift=0, elastic=1.5, elastic_points=4)


def recorded_canvases(monkeypatch):
    """A list that fills with what `data.canvases` returns."""
    made, canvases = [], data.canvases
    monkeypatch.setattr(data, "canvases", lambda *given, **options: made.append(canvases(*given, **options)) or made[-1])
    return made


@pytest.mark.parametrize("phase", data.PHASES)
def test_training_remembers_how_hard_a_digit_was(few_digits, tmp_path, phase, monkeypatch):
    """Each digit's loss in the cell that holds it, averaged with what was known of it, which at first is that of a guess."""
    made = recorded_canvases(monkeypatch)
    train.main([*few_digits, f"--phase={phase}", "--max_steps=1", "--lr=0", "--dtype=float32"])     # so the model stays the same
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    images, labels = data.load_mnist(few_digits[0].split("=")[1], "train")
    canvas, which = made[-1]                                        # those before are evaluated
    logits = ViT.load(tmp_path / "out" / "ckpt.pt")(data.to_input(canvas)).detach()
    known, guess = {}, math.log(logits.shape[-1])
    for logit, number in zip(logits.flatten(0, 2), which.flatten().tolist()):
        if number < len(images):
            known.setdefault(number, [guess]).append(min(guess, -logit.log_softmax(-1)[labels[number]].item()))
    expected = torch.full((len(images),), guess)
    for number, losses in known.items():
        expected[number] = sum(losses) / len(losses)
    assert len(known) > 10 and len(checkpoint["hardness"]) == len(images) + 1
    torch.testing.assert_close(checkpoint["hardness"][:-1], expected)


def test_hard_digits_are_trained_on_more_often(few_digits, tmp_path, monkeypatch):
    """Here, those that say something else than what they show."""
    folder = Path(few_digits[0].split("=")[1])
    images, labels = data.load_mnist(folder, "train")
    labels[::15] = (labels[::15] + 1) % 10
    write_mnist(folder, images, labels, "train")
    made, drawn_of = recorded_canvases(monkeypatch), {}
    for hard in (0.0, 0.7):
        train.main([*few_digits, "--phase=1", "--max_steps=300", "--batch_size=64", "--dim=32", "--lr=1e-2", f"--hard={hard}"])
        late = torch.cat([which.flatten() for _, which in made[-100:]])
        drawn_of[hard] = (late % 15 == 0).float().mean().item()
    assert drawn_of[0.0] == pytest.approx(1 / 15, abs=0.02) and drawn_of[0.7] > 1.5 * drawn_of[0.0], drawn_of


@pytest.mark.parametrize("phase", data.PHASES)
def test_resume_is_the_run_that_was_never_stopped(few_digits, tmp_path, phase, monkeypatch):
    flags = [*few_digits, f"--phase={phase}", "--max_steps=12", "--eval_every=6", "--dropout=0.1"]
    train.main(flags)
    (tmp_path / "out").rename(tmp_path / "undisturbed")

    class Stopped(Exception):
        pass

    def stop_at_9(step, settings, rate=train.learning_rate):
        if step == 9:
            raise Stopped
        return rate(step, settings)

    with monkeypatch.context() as patch:  # the last checkpoint is then that of step 9, and one line too many is logged
        patch.setattr(train, "learning_rate", stop_at_9)
        with pytest.raises(Stopped):
            train.main(flags)
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 9
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 10}\n{"event": "tra')
    train.main([*few_digits, f"--phase={phase}", "--resume"])  # the rest of the flags is in the checkpoint
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def comparable(out):
    """What a run leaves, times aside."""
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    tensors = {f"{part} {name}": tensor for part in ("model", "average") for name, tensor in checkpoint[part].items()}
    tensors |= {name: torch.as_tensor(checkpoint[name]) for name in ("mean", "square", "hardness", "step")}
    timed = ("seconds", "train_seconds", "images_per_second")
    return tensors, [{k: v for k, v in line.items() if k not in timed} for line in metrics(out)]


def assert_same_run(one, other):
    (tensors, lines), (other_tensors, other_lines) = comparable(one), comparable(other)
    assert lines == other_lines and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("phase", data.PHASES)
def test_a_seed_is_a_run(few_digits, tmp_path, phase, monkeypatch):
    """Whatever is logged, evaluated and saved when, and whether anybody looks; another seed is another run."""
    def run(*flags):
        train.main([*few_digits, f"--phase={phase}", "--max_steps=12", "--dropout=0.1", *flags])
        return comparable(tmp_path / "out")[0]

    one = run("--log_every=1", "--eval_every=3", "--save_every=0")
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        other = run("--log_every=1000", "--eval_every=0", "--save_every=1000")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    other = run("--seed=1")
    assert not any(torch.equal(one[name], other[name]) for name in ("model head.weight", "average head.weight", "mean", "square"))


@pytest.mark.parametrize("phase,stops,number", [(1, [3], signal.SIGINT), (2, [1, 5], signal.SIGTERM), (3, [8, 9, 11], signal.SIGTERM)])
def test_a_stopped_run_saves_and_resumes_exactly(few_digits, tmp_path, phase, stops, number, monkeypatch, capsys):
    """Stopped by a signal at any step, between two lines of metrics too."""
    flags = [*few_digits, f"--phase={phase}", "--max_steps=12", "--eval_every=6", "--dropout=0.1"]
    train.main(flags)
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    seed_of = train.seed_of
    for stop in stops:
        def stop_here(seed, step, *purpose):
            if step == stop - 1 and purpose == ("canvases",):
                os.kill(os.getpid(), number)
            return seed_of(seed, step, *purpose)
        with monkeypatch.context() as patch:
            patch.setattr(train, "seed_of", stop_here)
            with pytest.raises(SystemExit) as stopped:
                train.main([*flags, "--resume"])
        assert stopped.value.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        assert f"stopped at step {stop} of 12 and saved: the same command with --resume goes on" in capsys.readouterr().err
        assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == stop
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL               # as it was before
    train.main([*flags, "--resume"])
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def test_a_killed_run_resumes_exactly(few_digits, tmp_path):
    """Killed three times at random moments, saving among them: the checkpoint always loads, the end is the same."""
    flags = [*few_digits, "--phase=1", "--max_steps=600", "--eval_every=0", "--log_every=2", "--resume"]
    train.main(flags)
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    moment = np.random.default_rng(0)
    for kill in range(3):
        process = subprocess.Popen([sys.executable, HERE / "train.py", *flags], stdout=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
        lines = len(metrics(tmp_path / "out")) if kill else 0
        path = tmp_path / "out" / "metrics.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines + 10):
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.3))
        assert process.poll() is None                                       # it was still at it
        process.kill()
        process.wait()
        ViT.load(tmp_path / "out" / "ckpt.pt")
    train.main(flags)
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def save_noise(path, n):
    sample.save_png(path, np.random.default_rng(0).integers(256, size=(n // 10, 10, 3), dtype=np.uint8))


@pytest.mark.parametrize("name,save", [
    ("ckpt.pt", lambda path, n: train.save(path, {"weights": torch.ones(n)})), ("sample.png", save_noise)])
def test_a_full_disk_keeps_the_last_checkpoint(name, save, tmp_path):
    resource = pytest.importorskip("resource", reason="needs limits on files, which Windows has not")
    path = tmp_path / name
    save(path, 10)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{name} cannot be saved: File too large; an earlier one is kept"):
            save(path, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change,words", [
    (lambda c: c["mean"].resize_(3), "cannot be resumed: ValueError: mean has 3 values"),
    (lambda c: c.pop("square"), "is damaged: square cannot be right"), (lambda c: c.pop("since"), "is damaged: since cannot"),
    (lambda c: c["model"].pop("head.bias"), 'cannot be resumed: RuntimeError: Error(s) in loading state_dict for ViT: Missing key'),
    (lambda c: c["model"].update({"head.bias": torch.zeros(3)}), "size mismatch for head.bias"),
    (lambda c: c["average"].update(extra=torch.zeros(2)), "is not a checkpoint of this model"),
    (lambda c: c.update(model=[1, 2]), "is damaged: model cannot be right"), (lambda c: c.update(step=-1), "is damaged: step cannot"),
    (lambda c: c["settings"].update(lr="fast", dim=2.5), "is damaged: lr, dim cannot be right"),
    (lambda c: c["settings"].update(batch_size=10**15), "--batch_size must be from 1 to 65536, not 1000000000000000"),
    (lambda c: c["settings"].update(canvas_size=28 * 10**9), "canvas size 28000000000 is not a multiple of phase 1's cell of 28 px, up to"),
    (lambda c: c["settings"].update(heads=-4), "heads must be a whole number from 1 up, not -4"),
    (lambda c: c["settings"].update(depth=10**9), "has another model: depth cannot change"),
    (lambda c: [c[part].update(depth=10**9) for part in ("settings", "config")], "1000000000 blocks, but 19 tensors"),
    (lambda c: [c[part].update(dim=10**6, heads=10) for part in ("settings", "config")], "weights, more than the file has bytes"),
    (lambda c: c.update(hardness=c["hardness"][:1001]), "was trained on 1,000 digits, these are 1,500"),
    (lambda c: c.update(version=1), "was written by another version"), (lambda c: c.update(phase=2), "is of phase 2, not 1"),
    (lambda c: c.pop("settings"), "is not a checkpoint of train.py"), (lambda c: c.clear(), "is not a checkpoint of train.py")])
def test_resume_refuses_what_does_not_fit(few_digits, tmp_path, change, words, capsys):
    train.main([*few_digits, "--phase=1", "--max_steps=4"])
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    damaged = path.read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main([*few_digits[:2], "--phase=1", "--max_steps=8", "--resume"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error
    assert path.read_bytes() == damaged


def test_a_fresh_run_keeps_the_old_one_beside(few_digits, tmp_path, capsys):
    train.main([*few_digits, "--phase=1", "--max_steps=2"])
    old = {name: (tmp_path / "out" / name).read_bytes() for name in ("ckpt.pt", "metrics.jsonl")}
    train.main([*few_digits, "--phase=1", "--max_steps=2", "--seed=1"])
    second = {name: (tmp_path / "out" / name).read_bytes() for name in old}
    assert all(second[name] != content for name, content in old.items())
    train.main([*few_digits, "--phase=1", "--max_steps=2", "--seed=2"])
    (tmp_path / "out" / "ckpt.pt").unlink()  # as a run that is stopped before it saves leaves things
    train.main([*few_digits, "--phase=1", "--max_steps=2", "--seed=3"])
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*.*")}
    assert kept == {f"{name}.{number}": content for number, run in ((1, old), (2, second)) for name, content in run.items()}
    printed = capsys.readouterr().out
    assert "kept as" in printed and "ckpt.pt.2" in printed


class PretendedGraph:
    """What capture needs of a CUDA graph, where there is no such device: a replay takes the step that was captured."""

    def __init__(self):
        self.generators, self.steps = [], []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.steps[0]()


def pretend_cuda(monkeypatch, broken=None):
    """Let `train.capture` take a CPU for a CUDA device, whose graphs it returns. broken: why none can be captured."""
    graphs, real = [], train.capture

    @contextlib.contextmanager
    def graph(captured):
        if broken:
            raise RuntimeError(broken)
        graphs.append(captured)
        yield

    def capture(step, generator, processes, *changed):
        def watched():
            step()
            if graphs:
                graphs[0].steps.append(step)
        generator = types.SimpleNamespace(device=torch.device("cuda"), real=generator)
        return real(watched, generator, processes, *changed)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (("Stream", lambda: stream), ("current_stream", lambda: stream), ("stream", contextlib.nullcontext),
                        ("CUDAGraph", PretendedGraph), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(train, "capture", capture)
    return graphs


@pytest.mark.parametrize("broken", [None, "operation not permitted\nwhen stream is capturing"])
def test_a_captured_step_is_the_same_run(few_digits, tmp_path, monkeypatch, capsys, broken):
    """Steps that only warm up and are captured change nothing, whether capturing works out or not."""
    flags = [*few_digits, "--phase=3", "--max_steps=6", "--log_every=2", "--dropout=0.1", "--drop_path=0.1"]
    train.main(flags)
    assert "CUDA graph" not in capsys.readouterr().out              # a CPU has none and says nothing of it
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    graphs = pretend_cuda(monkeypatch, broken)
    train.main(flags)
    line = "no CUDA graph of the training step, so each kernel is launched by itself: operation not permitted when stream"
    assert (line in capsys.readouterr().out) == bool(broken)
    if not broken:
        assert len(graphs[0].generators) == 1 and len(graphs[0].steps) == 1   # it was captured once; the rest are replays
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def test_several_processes_capture_nothing(capsys):
    step, counter = (lambda: counter.add_(1)), torch.zeros(1)
    assert train.capture(step, types.SimpleNamespace(device=torch.device("cuda")), 2, counter) is step
    assert counter == 0 and "by itself: several processes train" in capsys.readouterr().out


def test_epochs_are_60_000_canvases(few_digits, tmp_path):
    train.main([*few_digits, "--phase=1", "--epochs=0.001"])
    assert metrics(tmp_path / "out")[-1]["step"] == 4  # 60 canvases, 16 a step


def test_eval_only_at_another_size(few_digits, tmp_path, capsys):
    train.main([*few_digits, "--phase=3", "--max_steps=2"])
    train.main([*few_digits, "--phase=3", "--eval_only", "--canvas_size=96", "--max_digits=8"])
    with pytest.raises(SystemExit):
        train.main([*few_digits, "--phase=3", "--eval_only", "--depth=8"])
    assert "has another model: depth cannot change" in capsys.readouterr().err


def test_resume_with_other_flags(few_digits, tmp_path, capsys):
    """What does not change the model may change; a longer run is one."""
    train.main([*few_digits, "--phase=1", "--max_steps=4"])
    train.main([*few_digits, "--phase=1", "--max_steps=8", "--lr=1e-4", "--batch_size=8", "--rotate=0", "--resume"])
    settings = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["settings"]
    assert [settings[name] for name in ("max_steps", "lr", "batch_size", "rotate", "shear")] == [8, 1e-4, 8, 0, 0.15]
    assert metrics(tmp_path / "out")[-2]["step"] == 8 and metrics(tmp_path / "out")[-2]["lr"] < 1e-4


def test_a_run_goes_on_in_another_place(few_digits, tmp_path):
    """Where the folder was moved, and to a machine without the device that the run was given."""
    train.main([*few_digits, "--phase=1", "--max_steps=2"])
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    checkpoint["settings"].update(device="cuda:7", wandb=True)
    torch.save(checkpoint, tmp_path / "out" / "ckpt.pt")
    (tmp_path / "out").rename(tmp_path / "moved")
    train.main(["--phase=1", f"--out_dir={tmp_path / 'moved'}", "--max_steps=4", "--resume"])
    assert metrics(tmp_path / "moved")[-1]["step"] == 4 and not (tmp_path / "out").exists()
    train.main(["--phase=1", f"--out_dir={tmp_path / 'moved'}", "--eval_only"])


def test_resume_starts_where_there_is_nothing(few_digits, tmp_path):
    train.main([*few_digits, "--phase=1", "--max_steps=2", "--resume"])
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_val_digits_train_nothing_and_are_not_the_test_set(few_digits, tmp_path, monkeypatch):
    seen = []
    draw = data.canvases

    def spy(phase, images, labels, n, *rest, **options):
        seen.append((len(images), options["max_digits"]))
        return draw(phase, images, labels, n, *rest, **options)

    monkeypatch.setattr(data, "canvases", spy)
    train.main([*few_digits, "--phase=3", "--max_steps=2", "--val_digits=300"])  # and there are more digits in training
    assert seen == [(300, 5), (1200, 9), (1200, 9)] and metrics(tmp_path / "out")[-1]["data"] == "custom-val"


def test_another_data_set(tmp_path, drawn, monkeypatch, capsys):
    """26 classes in IDX files of the same names: the model has 27, the last of them "empty"."""
    monkeypatch.setattr(data, "TEST_CANVASES", 100)
    for split in ("train", "test"):
        write_mnist(tmp_path, drawn[0][:520], torch.arange(520) % 26, split)
    train.main([f"--data_dir={tmp_path}", f"--out_dir={tmp_path}", "--dim=16", "--heads=1", "--depth=1", "--max_steps=2"])
    assert ViT.load(tmp_path / "ckpt.pt").config.num_classes == 27


def test_drawn_runs_say_so(tmp_path, capsys, monkeypatch, drawn):
    monkeypatch.setattr(data, "drawn_digits", lambda n, seed: drawn)
    train.main(["--data=drawn", "--phase=1", f"--out_dir={tmp_path}", "--dim=16", "--heads=1", "--depth=1", "--max_steps=2"])
    assert "this says nothing about MNIST" in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["data"] == "drawn" == torch.load(tmp_path / "ckpt.pt", weights_only=True)["data"]
    sample.main([f"--out_dir={tmp_path}", "--count=2"])
    printed = capsys.readouterr().out
    assert "px (drawn digits)\n" in printed and "test canvas 1 (drawn digits)" in printed and "Cells (drawn digits): " in printed


def test_a_loss_that_is_not_finite_stops_the_run(few_digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*few_digits, "--phase=1", "--max_steps=40", "--lr=1e12", "--grad_clip=0"])
    assert stopped.value.code == 1 and "try a lower --lr" in capsys.readouterr().err
    saved = tmp_path / "out" / "ckpt.pt"
    assert not saved.exists() or all(t.isfinite().all() for t in torch.load(saved, weights_only=True)["model"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


SHARER = """
import data, hashlib, sys, train
data.TEST_CANVASES = 100
flatten, made = train.flatten, []
train.flatten = lambda *given, **more: made.append(flatten(*given, **more)) or made[-1]
try:
    train.main(sys.argv[1:])
finally:
    print("weights", *(hashlib.md5(weights.numpy()).hexdigest() for weights, _, _ in made), file=sys.stderr)
"""


def share(count, flags):
    """Start processes that share a training as torchrun would; each says at its end what its weights are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count)}
    return [subprocess.Popen([sys.executable, "-c", SHARER, *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**here, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def finish(processes):
    """Their exit codes, what they print, what they print as errors."""
    printed = [process.communicate(timeout=200) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in printed], [err for _, err in printed]


def wait_for_lines(out, lines, processes):
    path = out / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


@pytest.mark.parametrize("phase", data.PHASES)
def test_two_processes_follow_one(few_digits, tmp_path, phase):
    flags = [*few_digits, f"--phase={phase}", "--max_steps=50", "--log_every=1", "--save_every=30", "--batch_size=15", "--eval_every=0",
             "--dtype=float32", "--hard=0"]     # or rounding might tip which digit is drawn
    train.main(flags)
    (tmp_path / "out").rename(tmp_path / "one")
    codes, printed, errors = finish(share(2, flags))
    assert codes == [0, 0] and "2 processes" in printed[0] and not printed[1]
    assert len(set(errors)) == 1 and errors[0].startswith("weights ") and errors[0].count("\n") == 1     # the same weights
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "out")
    assert len(one) == len(two) == 51
    for line, other in zip(one, two):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4) and other["step"] == line["step"]
    assert two[-1]["digit_accuracy"] == pytest.approx(one[-1]["digit_accuracy"], abs=0.01)
    hardness = [torch.load(tmp_path / run / "ckpt.pt", weights_only=True)["hardness"] for run in ("one", "out")]
    torch.testing.assert_close(*hardness, rtol=1e-3, atol=1e-4)


def test_a_wish_to_stop_reaches_all_processes_at_the_same_step(few_digits, tmp_path):
    flags = [*few_digits, "--phase=3", "--max_steps=150", "--log_every=1", "--save_every=30", "--eval_every=0", "--resume"]
    assert finish(share(2, flags))[0] == [0, 0]
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    processes = share(2, flags)
    wait_for_lines(tmp_path / "out", 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = finish(processes)
    assert codes == [143, 143] and "saved: the same command with --resume goes on" in errors[0]
    assert errors[0].splitlines()[-1] == errors[1].splitlines()[-1]
    assert 5 <= torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] < 150
    assert finish(share(2, flags))[0] == [0, 0]
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def test_a_process_that_dies_takes_the_others_down(few_digits, tmp_path):
    processes = share(2, [*few_digits, "--phase=1", "--max_steps=100000", "--log_every=1", "--eval_every=0"])
    wait_for_lines(tmp_path / "out", 3, processes)
    processes[1].kill()
    codes, _, errors = finish(processes)
    assert codes == [1, -signal.SIGKILL] and "train.py: another process is gone, so this one stops too" in errors[0]
    ViT.load(tmp_path / "out" / "ckpt.pt")


def test_a_loss_that_is_not_finite_stops_all_processes(few_digits):
    codes, _, errors = finish(share(2, [*few_digits, "--phase=1", "--max_steps=40", "--lr=1e12", "--grad_clip=0"]))
    assert codes == [1, 1] and all("try a lower --lr" in error for error in errors)


def test_processes_that_do_not_start_alike(few_digits, tmp_path, monkeypatch):
    """One is told another seed, as one without the folder of the others would not see their checkpoint."""
    monkeypatch.setattr(sys.modules[__name__], "SHARER", SHARER.replace(
        "sys.argv[1:]", "sys.argv[1:] + ['--seed=' + __import__('os').environ['RANK']]"))
    codes, _, errors = finish(share(2, [*few_digits, "--phase=1", "--max_steps=4"]))
    assert codes == [2, 2] and all("the processes do not start alike" in error for error in errors)
    assert not (tmp_path / "out").exists()


def test_torchrun_restarts_and_resumes(few_digits, tmp_path):
    flags = [*few_digits, "--phase=1", "--max_steps=200", "--log_every=1", "--eval_every=0", "--resume"]
    assert finish(share(2, flags))[0] == [0, 0]
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1",
                            HERE / "train.py", *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for_lines(tmp_path / "out", 5, [run])
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------------------------------
# The command line, as a user meets it


def command(script, *flags, **environment):
    return subprocess.run([sys.executable, HERE / script, *flags], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "2", **environment})


@pytest.mark.parametrize("flags,words,code", [
    (["--phsae=3"], "unknown argument --phsae=3, did you mean --phase?", 2), (["--phase=4"], "--phase must be one of 1, 2, 3, not 4", 2),
    (["--lr=fast"], "argument --lr: invalid float value: 'fast'", 2), (["--lr=-1"], "--lr must be from 0", 2),
    (["--batch_size", "0"], "--batch_size must be from 1 to 65536, not 0", 2), (["--dtype=float16"], "--dtype must be one of", 2),
    (["--epochs=inf"], "--epochs must be from", 2), (["--beta2=1"], "--beta2 must be from 0", 2), (["--compile=maybe"], "expected true or false, not 'maybe'", 2), (["--epochs=1", "--max_steps=5"], "not both", 2),
    (["--device=abacus"], "--device=abacus cannot be used here", 2), (["more"], "unknown argument more", 2),
    (["--eval_only", "--out_dir=nowhere"], "there is no checkpoint", 1)])
def test_errors_are_one_clear_line(flags, words, code, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == code and words in error and error.count("\n") == 1 and error.startswith("train.py: ")


@pytest.mark.parametrize("flags,words", [(["--dim=30"], "dim 30 is not a multiple of heads"), (["--canvas_size=60"], "multiple of phase 3's cell"),
                                         (["--max_digits=20"], "max_digits must be from 1 to 9"), (["--val_digits=5000"], "leaves none of 1500"), (["--phase=2", "--train_digits=5"], "--train_digits, --crowded and --borders do not apply")])
def test_settings_that_do_not_go_together(few_digits, tmp_path, flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*few_digits, "--heads=4", "--phase=3", *flags])
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_resume_refuses_another_model(few_digits, capsys):
    train.main([*few_digits, "--phase=1", "--max_steps=2"])
    with pytest.raises(SystemExit) as stopped:
        train.main([*few_digits, "--phase=1", "--resume", "--depth=2", "--mlp_ratio=3"])
    assert stopped.value.code == 2 and "has another model: depth, mlp_ratio cannot change" in capsys.readouterr().err


def test_help_explains_every_setting():
    shown = command("train.py", "--help")
    assert shown.returncode == 0
    for field in train.fields(train.Settings):
        assert f"--{field.name} " in shown.stdout
    text = " ".join(shown.stdout.split())
    assert "peak learning rate (default by phase: 1: " in text and "default: 0.05" in text


def test_the_whole_way(tmp_path, drawn):
    """train.py, then sample.py, in processes of their own, flags in both spellings, output into a pipe."""
    write_mnist(tmp_path, *drawn, "train")
    write_mnist(tmp_path, *drawn, "test")
    ran = command("train.py", "--phase", "1", "--data_dir", tmp_path, f"--out_dir={tmp_path / 'out'}", "--max_steps=30", "--dim=32", "--depth=1")
    assert ran.returncode == 0, ran.stderr
    assert "\r" not in ran.stdout and "digit accuracy" in ran.stdout
    shown = command("sample.py", f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path}", "--count=3")
    assert shown.returncode == 0, shown.stderr
    assert "test canvas 2" in shown.stdout and "read as" in shown.stdout and "█" in shown.stdout and "\033" not in shown.stdout
    failed = command("sample.py", "--out_dir=nowhere")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "train one" in failed.stderr


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_sample_draws_two_pixels_a_character():
    canvas = torch.tensor([[0, 255, 0, 255], [0, 0, 255, 255]], dtype=torch.uint8)
    assert sample.draw(canvas, colour=False) == ["┌────┐", "│ ▀▄█│", "└────┘"]
    assert "\033[38;2;255;255;255m\033[48;2;0;0;0m▀" in sample.draw(canvas, colour=True)[1]
    assert sample.draw(canvas[:1], colour=False) == ["┌────┐", "│ ▀ ▀│", "└────┘"]


def test_sample_marks_what_is_wrong():
    truth = torch.full((8, 8), 10)
    truth[1, 2], truth[5, 5] = 3, 4
    reading = [(3, 1, 2, 0.99), (7, 6, 0, 0.5)]
    findings = sample.compare(reading, truth, 10)
    assert findings == [(1, 2, 3, 3, 0.99), (5, 5, 4, None, None), (6, 0, None, 7, 0.5)]
    lines = ["  row 1 column 2: 3, read as 3 (99.0%)", "  row 5 column 5: 4, read as nothing   <-- wrong",
             "  row 6 column 0: nothing, read as 7 (50.0%)   <-- wrong"]
    assert sample.describe(findings, True, colour=False) == lines
    assert sample.describe(findings, True, colour=True) == [lines[0], f"\033[1;31m{lines[1]}\033[0m", f"\033[1;31m{lines[2]}\033[0m"]
    unknown = sample.compare(reading, None, 10)                            # one's own picture: nobody knows what is there
    assert sample.describe(unknown, False, colour=True) == ["  row 1 column 2: 3 (99.0%)", "  row 6 column 0: 7 (50.0%)"]


def test_figures():
    truth = torch.tensor([[[0, 2]], [[2, 2]], [[1, 1]]])                    # 2 is "empty"
    best = torch.tensor([[[0, 2]], [[2, 0]], [[1, 0]]])
    assert sample.figures(truth, best, 2) == [
        "", "Cells: what is there (rows) and what is read (columns)", "         0    1 empty   recall precision",
        "    0    1    .     .  100.00%    33.33%", "    1    1    1     .   50.00%   100.00%", "empty    1    .     2   66.67%   100.00%",
        "", "digits on a canvas  canvases  all right  digits right", "                 0         1      0.00%             -",
        "                 1         1    100.00%       100.00%", "                 2         1      0.00%        50.00%",
        "", "Digits, at most one cell off: recall 66.67%, precision 50.00%, F1 57.14%"]
    assert sample.figures(truth[2:], truth[2:], 2, " (drawn digits)")[1].startswith("Cells (drawn digits): what")
    many = torch.arange(11).repeat(640_000 // 11 + 1)[:640_000].view(10_000, 8, 8)
    assert max(map(len, sample.figures(many, many, 10))) <= 80
    assert max(map(len, sample.figures(many, many, 26))) <= 80


@pytest.mark.parametrize("there,read,pairs", [
    ({(0, 0): 3}, {(0, 0): 3}, 1), ({(0, 0): 3}, {(0, 0): 4}, 0), ({(0, 0): 3}, {(1, 1): 3}, 1), ({(0, 0): 3}, {(0, 2): 3}, 0),
    ({(0, 0): 3}, {}, 0), ({}, {(0, 0): 3}, 0), ({(4, 4): 3}, {(4, 4): 3, (3, 4): 3}, 1), ({(4, 4): 3, (4, 5): 3}, {(4, 5): 3}, 1),
    ({(4, 4): 3, (4, 5): 3}, {(4, 5): 3, (4, 6): 3}, 1),                    # the nearest pair first leaves the other two apart
    ({(0, 0): 3, (7, 7): 4}, {(7, 0): 3, (0, 7): 4}, 0), ({(0, 7): 3}, {(0, 0): 3}, 0), ({(0, 0): 3, (7, 7): 4}, {(0, 1): 3, (6, 7): 4}, 2)])
def test_digits_found_nearby(there, read, pairs):
    truth, best = torch.full((2, 1, 8, 8), 10)
    for cells, digits in ((truth, there), (best, read)):
        for (row, column), digit in digits.items():
            cells[0, row, column] = digit
    assert sample.found_nearby(truth, best, 10) == sample.found_nearby(best, truth, 10) == pairs


def test_digits_found_nearby_are_as_many_as_can_be():
    """Where digits are two cells apart or more, whatever is read: no other way to pair them finds more."""
    generator = seeded()
    for _ in range(50):
        truth, best = torch.full((1, 8, 8), 2), torch.full((1, 8, 8), 2)
        truth[0, ::3, ::3] = torch.randint(3, (3, 3), generator=generator)
        best[0, torch.rand(8, 8, generator=generator) < 0.2] = torch.randint(2, (1,), generator=generator).item()
        near = sum((best[0, max(row - 1, 0):row + 2, max(column - 1, 0):column + 2] == truth[0, row, column]).any().item()
                   for row, column in (truth[0] != 2).nonzero().tolist())
        assert sample.found_nearby(truth, best, 2) == near


def pixels_of(path):
    """A PNG as save_png writes it -> (height, width, 3), checksums checked."""
    body, chunks = path.read_bytes(), {}
    assert body[:8] == b"\x89PNG\r\n\x1a\n"
    start = 8
    while start < len(body):
        length, kind = struct.unpack(">I4s", body[start:start + 8])
        content, crc = body[start + 8:start + 8 + length], body[start + 8 + length:start + 12 + length]
        assert struct.unpack(">I", crc)[0] == zlib.crc32(kind + content)
        chunks[kind] = content
        start += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert chunks[b"IHDR"][8:] == bytes([8, 2, 0, 0, 0]) and (lines[:, 0] == 0).all() and chunks[b"IEND"] == b""
    return lines[:, 1:].reshape(height, width, 3)


def test_png_round_trip(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    sample.save_png(tmp_path / "x.png", picture)
    assert np.array_equal(pixels_of(tmp_path / "x.png"), picture) and list(tmp_path.iterdir()) == [tmp_path / "x.png"]
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    assert np.array_equal(np.asarray(image.open(tmp_path / "x.png")), picture)


def test_tile_tells_right_from_wrong_without_colour():
    blank = torch.zeros(64, 64, dtype=torch.uint8)
    right, wrong, missed = (sample.tile(blank, [(2, 3, 4, digit, 0.9)], 8, "x").max(2) for digit in (4, 9, None))
    edge = slice(3 * 32, 4 * 32)                                            # the upper edge of the cell's frame, at scale 4
    assert (right[64, edge] > 0).all() and 12 <= (wrong[64, edge] > 0).sum() <= 20
    assert len(wrong) > len(right)                                          # the mistake in words, below
    assert not np.array_equal(wrong[:256], missed[:256])                    # what was read stands in the frame
    corners = [(row, column, digit, digit, 0.9) for row, column, digit in ((0, 0, 25), (0, 63, 3), (63, 0, 3), (63, 63, 25))]
    large = sample.tile(torch.zeros(512, 512, dtype=torch.uint8), corners, 8, "x")
    assert large.shape[1] == 512
    for corner in (large[:30, :30], large[:30, 482:], large[482:512, :30], large[482:512, 482:]):
        assert 20 < (corner == 24).all(2).sum() < 200                       # the ground of what was read
    strip = sample.tile(torch.zeros(8, 160, dtype=torch.uint8), [(0, 5, 4, 4, 0.9)], 8, "x")
    assert (strip[:8] == sample.GREEN).all(2).sum() > 48                    # lower than a letter: a frame, and as much as there is room for


def test_gaze_of_one_block():
    """Half of what a cell sees is itself, half is what its tokens attend to."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=16, patch_size=4, cell=8, dim=32, depth=1)).eval()
    canvas = torch.randint(256, (16, 24), dtype=torch.uint8)
    attention = model.attention_maps(data.to_input(canvas[None]))[0, 0].mean(0).detach()    # (24, 24)
    tokens = [2, 3, 8, 9]                                                   # of the cell in row 0, column 1 of 2 x 3
    seen = (0.5 * attention[tokens].mean(0) + torch.isin(torch.arange(24), torch.tensor(tokens)) / 8).view(4, 6)
    looked = sample.gaze(model, canvas)
    assert looked.shape == (2, 3, 4, 6)
    torch.testing.assert_close(looked[0, 1], seen / seen.max())


def page_of(canvas, scale, generator):
    """A canvas as a page: dark blue ink on yellowish paper with grain, light falling off to a corner. (H, W, 3), 0 to 1."""
    ink = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[:, :, None] / 255
    paper = torch.tensor([0.92, 0.89, 0.8]) + 0.02 * torch.randn(*ink.shape[:2], 1, generator=generator)
    light = 1 - 0.25 * torch.linspace(0, 1, ink.shape[0])[:, None, None] * torch.linspace(0, 1, ink.shape[1])[:, None]
    return ((paper * (1 - ink) + torch.tensor([0.1, 0.12, 0.35]) * ink) * light).clamp(0, 1)


def save_pgm(path, grey, most):
    kind = ">u2" if most > 255 else "u1"
    body = (grey * most).round().numpy().astype(kind)
    path.write_bytes(b"P5 # a comment\n%d %d\n%d\n" % (*reversed(grey.shape), most) + body.tobytes())


def save_page(path, form, page, canvas, scale):
    """A page in one of the forms that pictures come in."""
    grey, rgb = page.mean(2), (255 * page).round().byte().numpy()
    ink = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
    drawing = np.stack((0 * ink, 0 * ink, 60 + 0 * ink, ink), axis=2)       # a pen on a transparent ground
    if form == "npy rgb":
        np.save(path, rgb)
    elif form == "npy rgba":
        np.save(path, drawing)
    elif form == "npy float":
        np.save(path, grey.double().numpy())
    elif form == "npy canvas":
        np.save(path, ink.astype(np.int64))
    elif form == "pgm":
        save_pgm(path, grey, 255)
    elif form == "pgm 16 bits":
        save_pgm(path, grey, 65535)
    elif form == "pgm text":
        path.write_text(f"P2\n{grey.shape[1]} {grey.shape[0]}\n100\n" + " ".join(str(round(100 * x)) for x in grey.flatten().tolist()))
    else:
        image = pytest.importorskip("PIL.Image", reason="needs Pillow")
        {"png grey": lambda: image.fromarray(rgb).convert("L"), "png rgb": lambda: image.fromarray(rgb),
         "png rgba": lambda: image.fromarray(drawing), "jpg": lambda: image.fromarray(rgb),
         "png palette": lambda: image.fromarray(rgb).convert("P", palette=image.Palette.ADAPTIVE, colors=32)}[form]().save(path)


FORMS = ["npy rgb", "npy rgba", "npy float", "npy canvas", "pgm", "pgm 16 bits", "pgm text", "png grey", "png rgb", "png rgba",
         "png palette", "jpg"]


@pytest.mark.parametrize("form", FORMS)
def test_pages_become_the_canvases_they_show(tmp_path, drawn, form):
    """Of a larger scale and another shape than a canvas, in each form: what comes out is the canvas again, almost."""
    canvas = data.canvases(3, *drawn, 1, seeded(4), size=96, max_digits=5)[0][0, :88, :]
    path = tmp_path / f"page.{form.split()[0]}"
    save_page(path, form, page_of(canvas, 2, seeded()), canvas, 2)
    again = sample.as_canvas(sample.load_picture(path), 3, 64, digit_height=40)
    assert again.shape == (88, 96) and again.dtype == torch.uint8
    assert (again.float() - canvas.float()).abs().mean() < 4 and (canvas > 0).sum() > 200
    assert again[canvas == 255].float().mean() > 200


def test_canvases_are_filled_up_to_whole_cells():
    assert sample.as_canvas(torch.rand(33, 50), 3, 64, None).shape == (40, 56)
    four = torch.full((30, 60), 0.9)
    four[4:11, 10:14] = four[4:11, 40:44] = four[18:26, 12:16] = four[20:28, 50:55] = 0.2
    assert sample.as_canvas(four, 2, 56, None).shape == (56, 56)
    assert sample.as_canvas(torch.full((70, 60), 0.9), 3, 64, None).max() == 0     # blank paper is no ink
    with pytest.raises(ValueError, match="no ink was found"):                # but the other phases need a digit
        sample.as_canvas(torch.full((70, 60), 0.9), 2, 56, None)
    model = ViT(ViTConfig(image_size=64, patch_size=8, cell=8))
    with pytest.raises(ValueError, match="up to 4,096 patches"):
        sample.gaze(model, torch.zeros(520, 520, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a canvas of 1032 x 1024 px has 16,512 patches, at most 16,384 will do"):
        sample.logits_of(model, torch.zeros(1, 1024, 1032, dtype=torch.uint8))


def test_a_speck_moves_nothing():
    page = torch.full((200, 200), 0.9)
    page[60:140, 90:105] = 0.1
    speck = page.clone()
    speck[5:8, 5:8] = 0.1
    assert torch.equal(sample.as_canvas(page, 1, 28, None), sample.as_canvas(speck, 1, 28, None))


def test_light_ink_and_few_bits(tmp_path, drawn):
    """White on a transparent ground, 12 bits of 16, and zeros and ones are pictures too."""
    ink = drawn[0][0].numpy()
    for number, picture in enumerate((np.stack((255 + 0 * ink,) * 3 + (ink,), axis=2), ink.astype(np.uint16) * 16, (ink > 127).astype(np.uint8))):
        np.save(tmp_path / f"{number}.npy", picture)
        canvas = sample.as_canvas(sample.load_picture(tmp_path / f"{number}.npy"), 3, 64, None)[:28, :28]
        assert (canvas.float() - torch.from_numpy(ink).float()).abs().mean() < 8


@pytest.mark.parametrize("height,width,left", [(400, 300, 180), (60, 90, 20), (31, 40, 9)])
def test_a_single_digit_is_normalised_as_mnist_is(height, width, left):
    """Ink 20 px high, its mass in the middle, wherever and however large it was: NIST's box, MNIST's centre."""
    page = torch.full((height, width), 0.9)
    page[height // 4:-height // 4, left:left + width // 9] = 0.1
    frame = sample.as_canvas(page, 1, 28, None).float() / 255
    rows, columns = (frame > 0.4).any(1).nonzero(), (frame > 0.4).any(0).nonzero()
    assert frame.shape == (28, 28) and 19 <= rows[-1] - rows[0] + 1 <= 21 and frame.max() == 1
    middle = [((torch.arange(28) + 0.5) * frame.sum(axis)).sum() / frame.sum() for axis in (0, 1)]
    assert all(abs(m - 14) <= 0.75 for m in middle) and 2 <= columns[-1] - columns[0] + 1 <= 12


@pytest.mark.parametrize("scale", [1, 5])
def test_a_digit_cut_close_is_the_same_digit(drawn, scale):
    """Dark on paper whose light falls off by a third, and of which hardly any is left: as it is with paper all around."""
    for digit in drawn[0][:30]:
        top, left, height, width = (int(edge) for edge in data.ink_box(digit[None]))
        ink = F.interpolate(digit[None, None, top:top + height, left:left + width].float() / 255, scale_factor=scale)[0, 0]

        def as_read(margin, darkest):
            paper = 0.9 - 0.8 * F.pad(ink, [margin * scale] * 4)
            return sample.as_canvas(paper * torch.linspace(1, darkest, paper.shape[1]), 1, 28, None).float()

        whole = as_read(20, 1)
        for margin in (0, 1, 2, 6):
            close = as_read(margin, 2 / 3)
            moved = [(close.roll(step, (0, 1)) - whole).abs().mean() for step in itertools.product((-1, 0, 1), repeat=2)]
            assert min(moved) < 18, margin                      # another digit is 31 away


def npy_header(shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def saved(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("name,body,words", [
    ("a.npy", b"", "cannot be read"), ("a.npy", b"nonsense", "cannot be read"), ("a.npy", npy_header((90_000, 90_000)), "cannot be read"),
    ("a.npy", saved(np.zeros((0, 5))), "1 to 64,000,000"), ("a.npy", saved(np.array([[{}]])), "cannot be read"),
    ("a.npy", saved(np.zeros((4, 4, 5))), "3 or 4 channels"), ("a.npy", saved(np.full((4, 4), np.nan)), "not finite"),
    ("a.npy", saved(np.array([["x"]])), "expected numbers"), ("a.npy", saved(np.zeros(3)), "expected numbers"),
    ("a.pgm", b"", "does not begin like a PGM file"), ("a.pgm", b"P5 4 4 255\n123", "cannot be read"),
    ("a.pgm", b"P5 99999 99999 255\n", "99,999 x 99,999 px"), ("a.pgm", b"P2 2 2 255\n1 2 x 4", "cannot be read"),
    ("a.pgm", b"P5 3000 3000 255\n" + bytes(9_000_000), "--digit_height"), ("a.png", b"nonsense", "cannot be read"),
    ("missing.npy", None, "No such file")])
def test_pictures_refused(tmp_path, name, body, words):
    path = tmp_path / name
    if body is not None:
        path.write_bytes(body)
    tracemalloc.start()  # which sees NumPy's memory, where files are unpacked, and not torch's
    with pytest.raises(ValueError, match=words):
        sample.as_canvas(sample.load_picture(path), 3, 64, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000_000


def test_enormous_pictures_are_refused_by_their_header(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    image.new("1", (20_000, 10_000)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="20,000 x 10,000 px, allowed are 1 to 64,000,000"):
        sample.load_picture(tmp_path / "x.png")


@pytest.mark.parametrize("package,flags,file", [("matplotlib", ["--curves"], None), ("PIL", [], "x.png"), ("wandb", None, None)])
def test_optional_packages_are_missed_in_one_line(few_digits, tmp_path, capsys, monkeypatch, package, flags, file):
    monkeypatch.setitem(sys.modules, package, None)                         # as if it were not installed
    if package == "wandb":
        main, flags = train.main, [*few_digits, "--phase=1", "--max_steps=4", "--wandb"]
    else:
        train.main([*few_digits, "--phase=1", "--max_steps=4"])
        main, flags = sample.main, [*flags, f"--out_dir={tmp_path / 'out'}"] + ([f"--image={tmp_path / file}"] if file else [])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and error.count("\n") == 1 and f"pip install {package.replace('PIL', 'pillow')}" in error
    assert package != "wandb" or not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [
    lambda c: c.pop("canvas"), lambda c: c.update(canvas=7), lambda c: c.update(phase=[3]), lambda c: c.update(data="mine"),
    lambda c: c["canvas"].update(size=10**9), lambda c: c["canvas"].update(classes=10**12), lambda c: c["canvas"].update(wings=2),
    lambda c: c["canvas"].update(max_digits="many"), lambda c: c["canvas"].update(max_digits=10**9),
    lambda c: c.update(average=torch.zeros(3))])
def test_sample_refuses_a_strangers_checkpoint(few_digits, tmp_path, change, capsys):
    train.main([*few_digits, "--phase=3", "--max_steps=1"])
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--phase=3", *few_digits[:1], f"--out_dir={path.parent}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("sample.py: ") and error.count("\n") == 1
    assert "is not a checkpoint" in error or "max_digits must be" in error


@pytest.mark.parametrize("phase", data.PHASES)
def test_sample_shows_mistakes_and_attention(few_digits, tmp_path, phase, capsys):
    train.main([*few_digits, f"--phase={phase}", "--max_steps=8"])
    out = tmp_path / "out"
    flags = [few_digits[0], f"--out_dir={out}", "--count=3"]
    capsys.readouterr()
    sample.main([*flags, "--mistakes", "--attention"])
    printed = capsys.readouterr().out
    blocks = printed.split("\ntest canvas ")[1:]
    assert len(blocks) == 3 and all("<-- wrong" in block for block in blocks) and "recall" in printed and "\033" not in printed
    assert max(map(len, printed.split("Cells")[1].splitlines()[1:-3])) <= 80
    assert pixels_of(out / "sample.png").shape[1] > 700
    sample.main(flags[1:])                                                  # the digits that it was trained on, unless others are named
    assert "\ntest canvas 0 (custom digits)\n" in capsys.readouterr().out
    np.save(tmp_path / "own.npy", data.drawn_digits(1, 0)[0][0].numpy())
    sample.main([*flags, f"--image={tmp_path / 'own.npy'}", "--attention"])
    printed = capsys.readouterr().out
    assert "own.npy" in printed and "recall" not in printed and "wrong" not in printed and (out / "image.png").exists()
    for wrong, words in ((["--start=10000"], "--start=10000, but there are"), (["--count=0"], "--count must be above 0"), (["--out_dir", "a", "b"], "--curves"),
                         (["--digit_height=0"], "--digit_height must be"), (["--test_canvases=0"], "--test_canvases must be"),
                         ([f"--data_dir={tmp_path / 'nowhere'}"], "no data set in")):
        with pytest.raises(SystemExit):
            sample.main([*flags, *wrong])
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_sample_without_a_mistake(few_digits, tmp_path, monkeypatch, capsys):
    train.main([*few_digits, "--phase=2", "--max_steps=2", "--test_canvases=30"])
    images, labels, _ = data.load_digits("custom", few_digits[0].split("=")[1], "test")
    _, truth = data.test_canvases(2, images, labels, 30)
    monkeypatch.setattr(sample, "logits_of", lambda model, canvases: F.one_hot(truth, 10).float())
    capsys.readouterr()
    sample.main([f"--out_dir={tmp_path / 'out'}", "--mistakes", "--test_canvases=30"])
    printed = capsys.readouterr().out
    assert "reading 30 test canvases" in printed and "100.00%" in printed and printed.endswith("no sample.png: nothing is read wrong\n")
    assert not (tmp_path / "out" / "sample.png").exists()


def test_sample_reads_larger_canvases(few_digits, tmp_path, capsys):
    train.main([*few_digits, "--phase=3", "--max_steps=2"])
    flags = [f"--out_dir={tmp_path / 'out'}", "--canvas_size=96", "--max_digits=9", "--min_distance=24", "--count=1"]
    capsys.readouterr()
    sample.main(flags)
    printed = capsys.readouterr().out
    assert "reading 100 test canvases of 96 x 96 px (custom digits)\n" in printed and "\n                 9 " in printed and "\n│" + " " * 96 in printed
    with pytest.raises(SystemExit) as stopped:
        sample.main([*flags, "--canvas_size=60"])
    assert stopped.value.code == 1 and "canvas size 60 is not a multiple" in capsys.readouterr().err


def test_curves(few_digits, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    train.main([*few_digits, "--phase=3", "--max_steps=12", "--eval_every=4"])
    out = tmp_path / "out"
    train.main([*few_digits, f"--out_dir={tmp_path / 'other'}", "--phase=3", "--max_steps=12", "--max_digits=1", "--test_canvases=1"])
    assert metrics(tmp_path / "other")[-1]["digit_accuracy"] is None       # the only test canvas is an empty one
    sample.main(["--curves", "--out_dir", str(out), str(tmp_path / "other")])
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not (tmp_path / "other/curves.png").exists()
    (out / "metrics.jsonl").write_text('{"event": "train"}\n')
    with pytest.raises(SystemExit):
        sample.main(["--curves", f"--out_dir={out}"])
    assert "is not a metrics file of train.py" in capsys.readouterr().err


def test_wandb_offline(few_digits, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main([*few_digits, "--phase=3", "--max_steps=8", "--eval_every=4", "--wandb"])
    wandb.teardown()  # finish() may return before its service has written the record; this waits until the service has ended
    (record,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    logged = record.read_bytes()
    for word in (b"train/loss", b"train/lr", b"train/grad_norm", b"train/digit_accuracy", b"eval/exact_match", b"histogram",
                 b"weight_decay", b"phase3", b"ckpt.pt"):
        assert word in logged, word
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*/files/media/images/*.png"))) == 16   # 8 at each evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Real digits


@needs_mnist
@pytest.mark.parametrize("phase,flags,least", [(1, ["--max_steps=200"], 0.9), (2, ["--max_steps=150", "--batch_size=64"], 0.5),
                                               (3, ["--max_steps=200", "--dim=64", "--batch_size=64"], 0.3)])
def test_learns_real_digits(tmp_path, phase, flags, least):
    train.main([f"--data_dir={os.environ['MNIST_DIR']}", "--data=mnist", f"--phase={phase}", f"--out_dir={tmp_path}", "--eval_every=0",
                "--test_canvases=2000", *flags])
    assert metrics(tmp_path)[-1]["digit_accuracy"] > least


@needs_mnist
@pytest.mark.parametrize("form", FORMS)
def test_real_digits_on_pages_are_read(trained, tmp_path, form):
    """Real handwriting on paper, three times as large, off the middle: read as on its canvas."""
    model, images, labels = trained
    right = 0
    for i in range(20):
        page = torch.zeros(40, 52, dtype=torch.uint8)
        page[6:34, 15:43] = images[i]
        path = tmp_path / f"page.{form.split()[0]}"
        save_page(path, form, page_of(page, 3, seeded(i)), page, 3)
        canvas = sample.as_canvas(sample.load_picture(path), 1, 28, None)
        right += (model(data.to_input(canvas[None])).argmax(-1).item() == labels[i]).item()
    assert right >= 19


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model of phase 1 after some seconds, and test digits that it reads right."""
    out = tmp_path_factory.mktemp("trained")
    train.main([f"--data_dir={os.environ['MNIST_DIR']}", "--data=mnist", "--phase=1", f"--out_dir={out}", "--eval_every=0", "--max_steps=400"])
    model = ViT.load(out / "ckpt.pt").requires_grad_(False)
    images, labels = data.load_mnist(os.environ["MNIST_DIR"], "test")
    right = model(data.to_input(images[:200])).argmax(-1).flatten() == labels[:200]
    return model, images[:200][right], labels[:200][right]


@needs_mnist
@pytest.mark.parametrize("phase,digits,digest", [(2, 40_000, "ba02dc85a00f2c6b"), (3, 25_094, "11b35b86d21aca48")])
def test_real_test_canvases_are_the_same_everywhere(phase, digits, digest):
    canvas, cells = data.test_canvases(phase, *data.load_mnist(os.environ["MNIST_DIR"], "test"))
    assert (cells != 10).sum() == digits and checksum(canvas, cells) == digest
