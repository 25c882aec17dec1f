"""The tests: python -m pytest -q. With MNIST_DIR=folder of the MNIST files they also train on real digits."""
import os

os.environ["OMP_NUM_THREADS"] = "1"     # of child processes too: on a busy machine threads wait for each other

import contextlib
import copy
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import importlib.util
import itertools
import json
import math
import re
import shlex
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
import zipfile
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

torch.set_num_threads(1)
HERE = Path(__file__).parent
needs_mnist = pytest.mark.skipif(not os.environ.get("MNIST_DIR"), reason="set MNIST_DIR to the folder of MNIST's files")
AUGMENTATION = dict(rotate=20, scale=0.2, shear=0.2, shift=2, elastic=2)
SMALL = ["--dim=16", "--depth=1", "--heads=1", "--batch_size=16", "--log_every=4", "--save_every=0",
         "--test_canvases=100", "--device=cpu"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randoms(n):
    generator = seeded()
    return lambda *shape: torch.rand(n, *shape, generator=generator)


def idx_bytes(array, code):
    """An IDX file, written independently of data.py."""
    kinds = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(kinds[code]).tobytes()


def write_mnist(folder, images, labels, split="train", spell=lambda name: name, pack=bytes):
    for name, array in zip(data.SPLITS[split], (images, labels)):
        (folder / spell(name)).write_bytes(pack(idx_bytes(array.numpy(), 0x08)))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoint_of(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def refusal(main, arguments, capsys):
    """The exit code and the one line of error with which a program ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return stopped.value.code, error


@pytest.fixture(scope="session")
def drawn():
    return data.drawn_digits(2000, seed=5)


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory, drawn):
    """A small data set of the program's own digits, under MNIST's names."""
    folder = tmp_path_factory.mktemp("digits")
    write_mnist(folder, drawn[0][:1500], drawn[1][:1500], "train")
    write_mnist(folder, drawn[0][1500:], drawn[1][1500:], "test")
    return folder


@pytest.fixture
def flags(digits_folder, tmp_path):
    """Of a run of a second, into tmp_path / "out"."""
    return [f"--data_dir={digits_folder}", f"--out_dir={tmp_path / 'out'}", *SMALL]


@pytest.fixture(scope="session")
def finished(digits_folder, tmp_path_factory):
    """phase -> the folder of a run of 12 steps that nobody disturbed. Tests copy it before they change anything."""
    folders = {}

    def folder(phase):
        if phase not in folders:
            out = tmp_path_factory.mktemp(f"finished{phase}") / "out"
            train.main([f"--data_dir={digits_folder}", f"--out_dir={out}", *SMALL, f"--phase={phase}", "--max_steps=12",
                        "--eval_every=6", "--dropout=0.1"])
            folders[phase] = out
        return folders[phase]

    return folder


@pytest.fixture(scope="session")
def learnt(tmp_path_factory):
    """The folder of a phase's run that learnt real digits, if for a short time."""
    @functools.cache
    def run(phase):
        out = tmp_path_factory.mktemp("learnt")
        flags = {1: ["--max_steps=200"], 2: ["--max_steps=150", "--batch_size=64"], 3: ["--max_steps=300"]}[phase]
        train.main([f"--data_dir={os.environ['MNIST_DIR']}", "--data=mnist", f"--phase={phase}", f"--out_dir={out}",
                    "--eval_every=0", "--test_canvases=2000", *flags])
        return out
    return run


def value_error_of(call, *arguments, **options):
    """The line with which a call refuses its arguments; "" if it takes them."""
    try:
        call(*arguments, **options)
    except ValueError as error:
        assert "\n" not in str(error), error
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# IDX files

GOOD_IDX = idx_bytes(np.arange(24).reshape(2, 3, 4), 0x0C)


def idx_of(path, content):
    path.write_bytes(content)
    return data.load_idx(path)


def test_idx_files_of_every_type_and_shape(tmp_path):
    for content, values in [    # written by hand
            (b"\0\0\x08\1\0\0\0\2\7\xfe", [7, 254]), (b"\0\0\x09\1\0\0\0\2\7\xfe", [7, -2]),
            (b"\0\0\x0b\1\0\0\0\2\0\7\xff\xfe", [7, -2]), (b"\0\0\x0c\1\0\0\0\2\0\0\0\7\xff\xff\xff\xfe", [7, -2]),
            (b"\0\0\x0d\1\0\0\0\1\x40\xe0\0\0", [7]), (b"\0\0\x0e\1\0\0\0\1\x40\x1c\0\0\0\0\0\0", [7]),
            (b"\0\0\x08\2\0\0\0\2\0\0\0\3\1\2\3\4\5\6", [[1, 2, 3], [4, 5, 6]])]:
        assert idx_of(tmp_path / "x", content).tolist() == values, content
    kinds = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}
    shapes = [(0,), (7,), (3, 0, 2), (2, 3, 4), (1,) * 20 + (5,)]
    for (code, kind), shape, pack in itertools.product(kinds.items(), shapes, (bytes, gzip.compress)):
        array = np.random.default_rng(0).integers(-100, 100, shape).astype(kind)
        loaded = idx_of(tmp_path / "x", pack(idx_bytes(array, code)))
        assert loaded.dtype == kind and loaded.shape == shape and (loaded == array).all(), (code, shape)


def test_idx_refuses(tmp_path):
    path, packed = tmp_path / "some-file", gzip.compress(GOOD_IDX)
    for words, *contents in [
            ("not an IDX file", b"", b"\0\0", b"<!DOCTYPE html><html>404</html>", gzip.compress(b"<html>")),
            ("unknown IDX type code 0x0a", b"\0\0\x0a\1" + bytes(8)),
            ("1 to 64 dimensions, not 0", b"\0\0\x08\0" + bytes(8)),
            ("1 to 64 dimensions, not 65", b"\0\0\x08\x41" + bytes(4 * 65)),
            ("within its header", GOOD_IDX[:9]), ("too short", GOOD_IDX[:-1]), ("too long", GOOD_IDX + b"\0"),
            ("max_bytes", b"\0\0\x0e\3" + b"\xff" * 12), ("corrupt gzip", packed[:-3], packed[:-8] + bytes(8)),
            ("corrupt gzip", packed[:12] + b"\xff\xff\xff\xff" + packed[16:], packed + b"rubbish")]:
        for content in contents:
            error = value_error_of(idx_of, path, content)
            assert words in error and str(path) in error, (content, error)
    # No values, but a shape that NumPy may be unable to hold: it is never read as another array
    error = value_error_of(idx_of, path, b"\0\0\x08\4" + bytes(4) + b"\xff" * 12)
    assert str(path) in error if error else data.load_idx(path).size == 0


def test_idx_files_that_lie_or_are_damaged(tmp_path):
    """They take little memory, and give an error or the array that their bytes spell."""
    rng, packed, read = np.random.default_rng(0), gzip.compress(GOOD_IDX, mtime=0), 0
    tracemalloc.start()
    for promised, megabytes, most, words in [(10**7, 10, 1000, "max_bytes=1,000"), (10, 10, 2**30, "too long"),
                                             (900_000_000, 0, 2**30, "too short")]:
        header = gzip.compress(b"\0\0\x08\1" + struct.pack(">I", promised))
        (tmp_path / "lie").write_bytes(header + megabytes * gzip.compress(bytes(10**6)))
        assert words in value_error_of(data.load_idx, tmp_path / "lie", most)
    for i in range(1000):
        content = bytearray(GOOD_IDX if i % 2 else packed)
        for _ in range(rng.integers(1, 4)):                                     # half of the damage is to headers
            content[rng.integers(16 if rng.random() < 0.5 else len(content))] = rng.integers(256)
        if i % 5 == 0:
            content = content[:rng.integers(len(content) + 1)] + rng.bytes(rng.integers(3))
        if error := value_error_of(idx_of, tmp_path / "x", content):
            assert "x: " in error
            continue
        array, spelt, read = data.load_idx(tmp_path / "x"), content if i % 2 else gzip.decompress(content), read + 1
        assert array.dtype.isnative and idx_bytes(array, spelt[2]) == spelt
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 100 < read < 500 and peak < 3e6                                      # some damage is to values alone


# ---------------------------------------------------------------------------------------------------------------------
# MNIST and its download

def test_load_mnist_spellings(tmp_path, drawn):
    for i, (split, dot, end) in enumerate(itertools.product(data.SPLITS, ("-idx", ".idx"), ("", ".gz"))):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_mnist(folder, drawn[0][:20], drawn[1][:20], split, lambda name: name.replace("-idx", dot) + end,
                    gzip.compress if end else bytes)
        images, labels = data.load_mnist(folder, split)
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images, drawn[0][:20]) and torch.equal(labels, drawn[1][:20]), (split, dot, end)


def test_load_mnist_refuses(tmp_path):
    images, labels = (np.zeros((3, 28, 28)), 0x08), (np.zeros(3), 0x08)
    not_images, not_labels = "expected uint8 images (N, 28, 28)", "class numbers from 0 to 255"
    for images, labels, words in [
            (images, (np.zeros(4), 0x08), "one label for each of 3 images"),
            ((np.zeros((3, 27, 28)), 0x08), labels, not_images), ((np.zeros((0, 28, 28)), 0x08), labels, not_images),
            ((np.zeros((3, 28)), 0x08), labels, not_images), ((np.zeros((3, 28, 28)), 0x09), labels, not_images),
            (images, (np.array([0, -1, 2]), 0x09), not_labels), (images, (np.array([0, 256, 2]), 0x0B), not_labels),
            (images, (np.zeros(3), 0x0D), not_labels)]:
        for name, file in zip(data.SPLITS["train"], (images, labels)):
            (tmp_path / name).write_bytes(idx_bytes(*file))
        error = value_error_of(data.load_mnist, tmp_path, "train")
        assert words in error, (error, images[0].shape, images[1], labels)


def reply(body):
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.fixture
def mirrors(monkeypatch, drawn):
    """Two mirrors on this machine, "a" and "b", of a data set of 20 digits. `answers` maps each to a function from the
    right file to what it sends; without one, it has no such file. `wait` is called before."""
    good = {name + ".gz": gzip.compress(idx_bytes(array[:20].numpy(), 0x08))
            for name, array in zip(data.SPLITS["train"], drawn)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.wait()
            _, mirror, name = self.path.split("/")
            answer = state.answers.get(mirror, lambda body: b"HTTP/1.0 404 -\r\n\r\n")
            with contextlib.suppress(ConnectionError):      # of a client that has given up
                self.wfile.write(answer(good[name]))

    state = types.SimpleNamespace(names=sorted(good), answers={}, wait=lambda: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "MIRRORS", [f"http://127.0.0.1:{server.server_port}/{mirror}/" for mirror in "ab"])
    monkeypatch.setattr(data, "MD5", {name: hashlib.md5(body).hexdigest() for name, body in good.items()})
    yield state
    server.shutdown()
    server.server_close()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download(mirrors, tmp_path, drawn, monkeypatch, capsys):
    """From the second mirror where the first is bad. Nothing wrong is kept, nothing asked for again that is there."""
    for i, (answer, words) in enumerate([
            (reply, None), (lambda body: reply(b"<html>"), "expected [0-9a-f]{32}.*404"),
            (lambda body: reply(body[:-9]), "expected"), (lambda body: reply(b"x" + body[1:]), "expected"),
            (lambda body: reply(body)[:-9], "no mirror gave it"), (None, "404.*404"), (None, "refused")]):
        folder, mirrors.answers = tmp_path / str(i) / "new", {"a": answer} if answer else {}
        if words == "refused":
            monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:9/", data.MIRRORS[1]])
        if words:
            with pytest.raises(ConnectionError, match=words):
                data.load_mnist(folder, "train")
            assert names_in(folder) == []
            mirrors.answers["b"] = reply
        for _ in range(2):
            images, labels = data.load_mnist(folder, "train")
            assert torch.equal(images, drawn[0][:20]) and torch.equal(labels, drawn[1][:20]), i
            mirrors.answers.clear()
        assert names_in(folder) == mirrors.names and "downloading" in capsys.readouterr().err
        assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())       # for all to read


def test_download_gives_up_on_what_is_silent_or_too_long(mirrors, tmp_path):
    enough, began = threading.Event(), time.perf_counter()
    mirrors.wait = lambda: enough.wait(5)
    with pytest.raises(ConnectionError, match="timed out"):
        data.download(tmp_path, "train-images-idx3-ubyte.gz", timeout=0.1)
    assert time.perf_counter() - began < 2 and names_in(tmp_path) == []
    enough.set()
    chunks = iter([bytes(2**20)] * 70)
    long = types.SimpleNamespace(headers={}, read=lambda most: next(chunks, b""))
    with open(os.devnull, "wb") as file:
        assert "longer than 64 MB" in value_error_of(data.copy_with_progress, long, file, "http://long")


def test_two_processes_download_into_one_folder(mirrors, tmp_path, drawn):
    asked, both = threading.Event(), threading.Barrier(2)
    mirrors.wait = lambda: (asked.set(), both.wait(60))         # no answer until both have asked
    mirrors.answers["a"] = reply
    code = f"import data, sys; data.MIRRORS, data.MD5 = {data.MIRRORS}, {data.MD5}\n" \
           "images, labels = data.load_mnist(sys.argv[1], 'train'); print(images.sum().item(), labels.sum().item())"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=HERE, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    assert asked.wait(60)
    images, labels = data.load_mnist(tmp_path, "train")
    printed, errors = other.communicate(timeout=60)
    assert torch.equal(images, drawn[0][:20]) and torch.equal(labels, drawn[1][:20])
    assert printed == f"{images.sum()} {labels.sum()}\n", errors
    assert names_in(tmp_path) == mirrors.names


def test_digits_are_called_what_they_are(mirrors, tmp_path, drawn, digits_folder, monkeypatch):
    """Other files under MNIST's names are never taken for MNIST, nor MNIST for them. MNIST never fills in for them."""
    def refusal_of(kind, folder, split):
        return value_error_of(data.load_digits, kind, folder, split)

    mirrors.answers["a"] = reply
    for kind, split in (("auto", "train"), ("custom", "test")):
        assert data.load_digits(kind, digits_folder, split)[2] == "custom"
    assert f"expected mnist digits, those of {digits_folder} are custom" in refusal_of("mnist", digits_folder, "test")
    images, labels = drawn[0][1500:], drawn[1][1500:]
    monkeypatch.setitem(data.CRC, "test", zlib.crc32(images.numpy().tobytes() + bytes(labels.tolist())))
    loaded = data.load_digits("mnist", digits_folder, "test")
    assert torch.equal(loaded[0], images) and torch.equal(loaded[1], labels) and loaded[2] == "mnist"
    assert f"expected custom digits, those of {digits_folder} are mnist" in refusal_of("custom", digits_folder, "test")
    nowhere = tmp_path / "nowhere"
    assert f"no data set in {nowhere}: name its folder as --data_dir" in refusal_of("custom", nowhere, "test")
    assert not nowhere.exists()
    nowhere.touch()
    assert f"{nowhere} is a file, not the folder of the digits' files" in refusal_of("auto", nowhere, "train")
    write_mnist(tmp_path, images, labels, "test")
    assert "name an empty folder" in refusal_of("auto", tmp_path, "train") and len(names_in(tmp_path)) == 3
    (tmp_path / "train-images-idx3-ubyte").touch()
    assert "but no train-labels-idx1-ubyte" in refusal_of("custom", tmp_path, "train")


def test_no_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:9/", "https://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ConnectionError, match="no mirror gave it"):
        data.load_digits("mnist", tmp_path, "train")
    monkeypatch.setattr(data, "drawn_digits", lambda n, seed: (n, seed))
    assert data.load_digits("auto", tmp_path, "test") == (10_000, 1, "drawn")
    assert "No MNIST" in capsys.readouterr().err
    for name in data.SPLITS["train"]:       # a broken file is an error, not a reason to draw
        (tmp_path / name).write_bytes(b"<html>")
    assert "not an IDX file" in value_error_of(data.load_digits, "auto", tmp_path, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Drawn digits and augmentation

def test_drawn_digits_are_laid_out_as_mnist_is(drawn):
    images, labels = drawn
    assert images.shape == (2000, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount(minlength=10).min() > 140
    longest = torch.maximum(*data.ink_box(images)[2:])
    assert longest.max() <= 20 and longest.min() >= 16
    share = images.float() / images.sum((1, 2), keepdim=True)
    off_centre = torch.stack([(share.sum(axis) * torch.arange(28)).sum(1) for axis in (1, 2)]) - 13.5
    assert off_centre.abs().max() < 1.5 and off_centre.abs().mean() < 0.3
    same, other = data.drawn_digits(2000, seed=5), data.drawn_digits(2000, seed=6)
    assert all(map(torch.equal, drawn, same)) and not torch.equal(images, other[0])
    # Most look more like the mean of their own class than like that of any other
    pixels = images.float().flatten(1)
    means = torch.stack([pixels[:1000][labels[:1000] == digit].mean(0) for digit in range(10)])
    assert (torch.cdist(pixels[1000:], means).argmin(1) == labels[1000:]).float().mean() > 0.8


def test_augment_moves_ink_but_keeps_it_whole_and_small(drawn):
    images, _ = drawn
    changed = data.augment(images, randoms(2000), **AUGMENTATION, side=20)
    assert torch.maximum(*data.ink_box(changed)[2:]).max() <= 20 and (changed != images).flatten(1).any(1).all()
    # No ink is lost over the edge of the frame, however far it is thrown
    far = data.augment(images, randoms(2000), shift=14)
    (_, _, *sides), (top, _, *far_sides) = data.ink_box(images), data.ink_box(far)
    assert all((side - far_side).abs().max() <= 1 for side, far_side in zip(sides, far_sides))
    assert top.min() == 0 and top.max() > 8
    # There is no faint fringe around digits, which a model would learn to expect
    assert 0.96 < (data.augment(images, randoms(2000), **AUGMENTATION) > 0).sum() / (images > 0).sum() < 1.04


def bars(height, width):
    """500 upright bars in the middle of their frames."""
    images = torch.zeros(500, 28, 28, dtype=torch.uint8)
    images[:, 14 - height // 2:14 + height // 2, 14 - width // 2:14 + width // 2] = 255
    return images


def middles(images):
    """Of the ink of each row of images (n, h, 28): (n, h), px."""
    return (images.float() * torch.arange(28)).sum(2) / images.float().sum(2)


def test_augment_turns_scales_and_leans():
    _, _, height, width = data.ink_box(data.augment(bars(14, 2), randoms(500), rotate=90))
    assert width.max() >= 14 and width.min() <= 4 and height.min() <= 4
    _, _, height, _ = data.ink_box(data.augment(bars(14, 2), randoms(500), scale=0.5))
    assert height.max() >= 20 and height.min() <= 9
    leaning = data.augment(bars(20, 2), randoms(500), shear=0.5)
    slope = middles(leaning[:, 6:22]).diff().mean(1)            # px to the right for each px down
    assert 0.45 < slope.max() < 0.55 and -0.55 < slope.min() < -0.45 and slope.mean().abs() < 0.05
    assert (data.ink_box(leaning)[2] == 20).all()               # what leans stays as high, what turns does not
    # What outgrows `side` shrinks: the bright ends of a bar are not cut off
    bar = bars(20, 8)
    bar[:, 7:21] = 100
    ends = (data.augment(bar, randoms(500), side=14) > 180).any(2)
    assert ends[:, :14].any(1).all() and ends[:, 14:].any(1).all()
    # Training digits are as large as test digits: MNIST's all fill 20 px
    changed = data.augment(bars(20, 10), randoms(500), rotate=10, scale=0.1, shear=0.1, shift=1, elastic=1, side=20)
    _, _, height, _ = data.ink_box((changed > 100).byte())
    assert height.float().mean() > 19 and height.max() == 20


def test_augment_bends():
    """The middle of a bar's rows wanders, but no farther than told. With fewer points it takes fewer turns."""
    middle = middles(data.augment(bars(20, 2), randoms(500), elastic=2)[:, 6:22])                   # (500, 16)
    wander = middle.amax(1) - middle.amin(1)
    assert wander.median() > 0.7 and wander.max() < 5 and (middle.mean() - 13.5).abs() < 0.1
    bent = [data.augment(bars(20, 2), randoms(500), elastic=1.5, elastic_points=points) for points in (2, 3, 5, 9)]
    turns = [middles(images[:, 8:20]).diff(n=2).abs().mean() for images in bent]
    assert turns[0] < 0.7 * turns[1] < 0.5 * turns[2] < 0.4 * turns[3]


def test_augment_of_nothing_is_nothing(drawn):
    for images, side in ((drawn[0], 20), (drawn[0], 28), (bars(20, 2), 28)):
        assert torch.equal(data.augment(images, randoms(len(images)), side=side), images)
    dots = torch.zeros(3, 28, 28, dtype=torch.uint8)
    assert torch.equal(data.augment(dots, randoms(3), **AUGMENTATION), dots)
    dots[:, 14, 14] = 1         # what would fade away altogether stays as it is
    assert data.augment(dots, randoms(3), **AUGMENTATION).flatten(1).any(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Canvases

def plates(n=200):
    """"Digits" that can be told apart anywhere: rectangles of random sides, image i of grey i + 1 and class i % 10."""
    images, sides = torch.zeros(n, 28, 28, dtype=torch.uint8), torch.randint(1, 21, (n, 2), generator=seeded(1))
    sides[0] = 20
    for i, (height, width) in enumerate(sides.tolist()):
        images[i, 14 - height // 2:14 - height // 2 + height, 14 - width // 2:14 - width // 2 + width] = i + 1
    return images, torch.arange(n) % 10, sides


def layout_of(phase, digits, crowded=0.0, borders=0.0, **options):
    return dataclasses.replace(data.layout(phase, *digits[:2], **options), crowded=crowded, borders=borders)


def drawn_canvases(phase, digits, n, seed=0, augmentation=None, part=slice(None), weights=None, **options):
    return data.canvases(layout_of(phase, digits, **options), digits[0], n, seeded(seed), augmentation, part, weights)


def test_scattered_digits_are_what_the_pixels_say():
    digits = _, labels, sides = plates()
    for distance, size, options in [(20, 64, {}), (20, 96, dict(max_digits=9)), (20, 128, dict(max_digits=36)),
                                    (20, 64, dict(max_digits=9)), (20, 64, dict(max_digits=9, borders=0.7)),
                                    (10, 80, dict(max_digits=12, min_distance=10))]:
        canvas, numbers = drawn_canvases(3, digits, 100, size=size, **options)
        assert canvas.shape == (100, size, size) and canvas.dtype == torch.uint8
        assert numbers.shape == (100, size // 8, size // 8) and numbers.dtype == torch.int64
        classes = data.class_table(labels, layout_of(3, digits))[numbers]
        assert torch.equal(classes, torch.where(numbers == 200, 10, numbers % 10))
        i, row, column = (numbers != 200).nonzero().unbind(1)                   # of each digit: (m,)
        number = numbers[i, row, column]
        ink = canvas[i] == (number + 1)[:, None, None]                          # (m, size, size)
        assert torch.equal(torch.zeros_like(canvas).index_add(0, i, ink.byte()) > 0, canvas > 0)
        spans = [ink.any(axis).byte() for axis in (2, 1)]
        corner = torch.stack([span.argmax(1) for span in spans], 1)
        box = torch.stack([span.sum(1) for span in spans], 1)
        _, inverse, count = (i * 200 + number).unique(return_inverse=True, return_counts=True)
        whole = (box == sides[number]).all(1) & (count[inverse] == 1)           # and not twice on its canvas
        if distance == 20:      # the longest side: no plate hides another, or is cut off
            assert torch.equal(whole, count[inverse] == 1)
            assert torch.equal(ink.sum((1, 2))[whole], box.prod(1)[whole])
        assert whole.sum() > 200, options
        i, centre = i[whole], (corner + box / 2)[whole]
        assert torch.equal((centre / 8).floor().long(), torch.stack((row, column), 1)[whole])
        gap = (centre[:, None] - centre).abs().amax(2)
        assert gap[(i[:, None] == i) & ~torch.eye(len(i), dtype=torch.bool)].min() >= distance


def test_borders_bring_that_share_of_centres_beside_the_border_of_a_cell():
    box = torch.randint(1, 21, (4000, 1, 2), generator=seeded())
    for share, least, most in ((0.0, 0.22, 0.28), (0.5, 0.58, 0.65), (1.0, 0.94, 1.0)):     # by chance, 4 of 16 half px
        layout = data.Layout(cell=8, size=96, classes=10, max_digits=1, min_distance=20, ink=20, borders=share)
        centre = data.place(layout, box, torch.ones(4000, 1, dtype=torch.bool), randoms(4000))
        assert ((centre - box) % 2 == 0).all() and (centre >= box).all() and (centre <= 2 * 96 - box).all()
        beside = torch.isin(centre % 16, torch.tensor([14, 15, 0, 1])).float().mean()
        assert least < beside < most, share


def test_counts_are_uniform_but_on_crowded_canvases():
    digits = _, labels, _ = plates()
    for most, crowded in ((5, 0.0), (9, 0.3)):
        _, numbers = drawn_canvases(3, digits, 6000, max_digits=most, crowded=crowded)
        counts = (numbers != 200).flatten(1).sum(1).bincount(minlength=most + 1)
        expected = torch.full((most + 1,), 6000 * (1 - crowded) / (most + 1))
        expected[most] += 6000 * crowded
        assert len(counts) == most + 1
        assert ((counts - expected) ** 2 / expected).sum() < 30     # chi-square: 1e-3 at 9 degrees of freedom is 27.9
        classes = labels[numbers[numbers != 200]].bincount(minlength=10)
        assert classes.min() > 0.9 * classes.float().mean()


def test_layouts_are_uniform_over_all_that_keep_the_distance():
    """Against drawing whole layouts blindly until one fits, which is uniform by definition and far too slow to use."""
    n, k, side, size, distance = 20_000, 4, 20, 64, 20
    layout = data.Layout(cell=8, size=size, classes=10, max_digits=k, min_distance=distance, ink=side)
    placed = data.place(layout, torch.full((n, k, 2), side), torch.ones(n, k, dtype=torch.bool), randoms(n))
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
        assert (mine - theirs).abs().sum() / 2 < 0.03   # total variation; two samples of this size differ by 0.02


def test_grid_phases_put_each_digit_on_its_cell(drawn):
    for phase, size, grid in ((1, 28, 1), (2, 56, 2), (2, 84, 3)):
        canvas, numbers = drawn_canvases(phase, drawn, 50, size=size)
        assert canvas.shape == (50, size, size) and numbers.shape == (50, grid, grid)
        for row, column in itertools.product(range(grid), repeat=2):
            frame = canvas[:, 28 * row:28 * row + 28, 28 * column:28 * column + 28]
            assert torch.equal(frame, drawn[0][numbers[:, row, column]]), (phase, size)


def test_canvases_depend_on_the_seed_and_the_weights_alone(drawn):
    weights = torch.tensor([0, 0.3, 0, 0.1, 0.2, 0, 0, 0.6, 0.3, 0])
    augmented, weighted = (drawn, 20, dict(augmentation=AUGMENTATION)), (plates(10), 4000, dict(weights=weights))
    for phase, (digits, n, options) in itertools.product(data.PHASES, (augmented, weighted)):
        part = slice(n // 4, n // 2)
        canvas, numbers = drawn_canvases(phase, digits, n, 3, **options)
        again, other = (drawn_canvases(phase, digits, n, seed, **options) for seed in (3, 4))
        some = drawn_canvases(phase, digits, n, 3, part=part, **options)
        assert all(map(torch.equal, again, (canvas, numbers))) and not torch.equal(canvas, other[0]), phase
        assert all(map(torch.equal, some, (canvas[part], numbers[part]))), phase
        if "weights" in options:
            assert torch.equal(drawn_canvases(phase, digits, n, 3, weights=1000 * weights)[1], numbers), phase
            counts = numbers.flatten().bincount(minlength=11)[:10]
            expected = counts.sum() * weights / weights.sum()
            assert (counts[weights == 0] == 0).all(), phase
            # chi-square: 1e-4 at 4 degrees of freedom
            assert ((counts - expected) ** 2 / expected)[weights > 0].sum() < 23, phase


def checksum(canvas, cells):
    return hashlib.sha256(canvas.contiguous().numpy().tobytes() + cells.numpy().tobytes()).hexdigest()[:16]


def test_test_canvases_are_the_same_everywhere(drawn, monkeypatch):
    def canvases(phase, digits, n=None, **options):
        return data.test_canvases(data.layout(phase, *digits[:2], **options), *digits[:2], n)

    digits = images, labels, _ = plates()
    for phase, digest in ((2, "de604e99c8ab7f82"), (3, "399f7040a28c232c")):
        torch.manual_seed(phase)    # the global generator has no say
        canvas, cells = canvases(phase, digits)
        assert len(canvas) == len(cells) == 10_000 and checksum(canvas, cells) == digest, phase
    for phase in data.PHASES:
        few, again = canvases(phase, digits, 7), canvases(phase, digits, 7)
        assert len(few[0]) == len(few[1]) == 7 and all(map(torch.equal, few, again))
    canvas, cells = canvases(1, digits)
    assert torch.equal(canvas, images) and torch.equal(cells.flatten(), labels)     # each digit once
    assert canvases(1, digits, size=56)[1].shape == (10_000, 2, 2)
    # In a phase that somebody adds, a canvas of one cell may be empty
    monkeypatch.setitem(data.PHASES, 4, data.Phase(size=28, cell=28, max_digits=1))
    canvas, cells = canvases(4, drawn, 400)
    assert 150 < (cells == 10).sum() < 250 and torch.equal(canvas.flatten(1).any(1), (cells != 10).flatten())


@needs_mnist
def test_real_test_canvases_are_the_same_everywhere():
    images, labels = data.load_mnist(os.environ["MNIST_DIR"], "test")
    for phase, digits, digest in ((2, 40_000, "ba02dc85a00f2c6b"), (3, 25_094, "11b35b86d21aca48")):
        canvas, cells = data.test_canvases(data.layout(phase, images, labels), images, labels)
        assert (cells != 10).sum() == digits and checksum(canvas, cells) == digest


def test_layouts_that_cannot_be_drawn_are_refused():
    digits = images, labels, _ = plates()
    most, in_every_cell = "max_digits must be from 1 to", "a digit in every cell"
    for phase, words, *refused in [
            (4, "phase must be one of 1, 2, 3, not 4", {}),
            (3, "canvas size 60 is not a multiple of the cell of 8 px", dict(size=60)),
            (2, "canvas size 64 is not a multiple of the cell of 28 px", dict(size=64)),
            (3, "up to 1024 px", dict(size=1032), dict(size=0)), (3, "size must be a whole number", dict(size=64.0)),
            (3, f"{most} 9", dict(max_digits=10), dict(max_digits=0)),
            (3, f"{most} 256", dict(size=1024, max_digits=257)), (3, "below the cell", dict(min_distance=7)),
            (3, "what surely fits on a canvas of 16 px", dict(size=16)),
            (3, "borders must be from 0 to 1", dict(borders=1.5), dict(borders=-0.1)),
            (3, "crowded must be from 0 to 1", dict(crowded=-0.1), dict(crowded=math.nan)),
            (2, in_every_cell, dict(borders=0.5), dict(crowded=0.5), dict(max_digits=3), dict(min_distance=30)),
            (1, in_every_cell, dict(borders=0.5), dict(crowded=0.5), dict(max_digits=1), dict(min_distance=30))]:
        for options in refused:
            error = value_error_of(layout_of, phase, digits, **options)
            assert words in error, (phase, options, error)
    assert "no ink" in value_error_of(data.layout, 3, torch.zeros_like(images), labels)


def test_classes_come_from_the_labels():
    digits = images, labels = plates()[0], torch.arange(200) % 26
    layout, (_, numbers) = data.layout(3, *digits), drawn_canvases(3, digits, 50)
    assert layout.classes == layout.empty == data.class_table(labels, layout)[numbers].max() == 26
    assert data.layout(2, *digits).empty is None


def test_digits_are_decoded_jointly():
    def logits(*cells):                     # of 6 x 7 cells: (row, column, digit, probability), the others empty
        share = torch.full((6, 7, 11), 1e-9)
        for row, column, digit, probability in cells:
            share[row, column, digit] = probability
        share[..., 10] = 1 - share[..., :10].sum(-1)
        return share.log()

    def digits(labels):
        return [(*cell, labels[tuple(cell)].item()) for cell in (labels != 10).nonzero().tolist()]

    split = [(2, 2, 3, 0.4), (2, 3, 3, 0.3)]
    for apart, cells, expected in [
            (2, split, [(2, 2, 3)]), (2, [(2, 2, 3, 0.3), (3, 3, 3, 0.4)], [(3, 3, 3)]),
            (1, split, []), (1, [(2, 2, 3, 0.9), (2, 3, 4, 0.8)], [(2, 2, 3), (2, 3, 4)]),
            (2, [(2, 2, 3, 0.3), (2, 3, 3, 0.15)], []),                             # in all, hardly half
            (2, [(2, 2, 4, 0.35), (2, 2, 3, 0.3), (2, 3, 3, 0.2)], [(2, 2, 3)]),    # the sum says which digit
            (2, [(2, 2, 3, 0.9), (2, 3, 4, 0.8)], [(2, 2, 3)]),
            (2, [(2, 2, 3, 0.8), (2, 4, 4, 0.9)], [(2, 2, 3), (2, 4, 4)]),
            (3, [(2, 2, 3, 0.8), (2, 4, 4, 0.9)], [(2, 4, 4)]), (3, [(0, 0, 3, 0.8), (2, 2, 4, 0.9)], [(2, 2, 4)]),
            (3, [(2, 2, 3, 0.8), (2, 5, 4, 0.9)], [(2, 2, 3), (2, 5, 4)]),
            (3, [(0, 0, 3, 0.8), (3, 0, 4, 0.9), (5, 6, 0, 0.7)], [(0, 0, 3), (3, 0, 4), (5, 6, 0)])]:
        assert digits(data.decode(logits(*cells)[None], 10, apart)[0]) == expected, (apart, cells)
        assert [found[:3] for found in data.read(logits(*cells)[None], 10, apart)[0]] == [
            (digit, row, column) for row, column, digit in expected]
    assert data.read(logits(*split)[None])[0][0][3] == pytest.approx(0.7)
    noise = 3 * torch.randn(20, 6, 7, 11, generator=seeded())
    assert torch.equal(data.decode(noise, None), noise.argmax(-1))
    for apart in (1, 2, 3):
        together = data.decode(noise, 10, apart)
        assert all(torch.equal(data.decode(one[None], 10, apart)[0], own) for one, own in zip(noise, together))
        for cells in ((own != 10).nonzero() for own in together):
            assert len(cells) < 2 or torch.pdist(cells.float(), math.inf).min() >= apart
    share = noise.softmax(-1)
    alone = share[..., :10].argmax(-1).where(share[..., :10].sum(-1) > 0.5, 10)
    assert torch.equal(data.decode(noise, 10, 1), alone)


def test_to_input_and_read():
    inputs = data.to_input(torch.tensor([[[0, 1, 51, 255]]], dtype=torch.uint8))
    assert inputs.shape == (1, 1, 1, 4) and inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.flatten(), torch.tensor([0, (1 + 1 / 255) / 2, 0.6, 1]) / 0.34)
    logits = torch.zeros(2, 2, 3, 11)
    logits[..., 10] = 9
    logits[0, 1, 0, 0], logits[0, 0, 2, 9] = 20, 10
    readings = data.read(logits)
    assert [reading[:3] for reading in readings[0]] == [(9, 0, 2), (0, 1, 0)] and readings[1] == []
    share = math.e / (math.e + 1 + 9 * math.exp(-9)) + 3 / (math.exp(9) + 10)          # three cells touch it
    assert readings[0][0][3] == pytest.approx(share, rel=1e-5)
    assert [len(reading) for reading in data.read(logits, empty=None)] == [6, 6]


def test_score():
    """Of canvases read right, with a digit misread, with one missed, and with one found where there is none."""
    truth = torch.tensor([[[3, 10], [10, 10]]] * 4)
    best = truth.clone()
    best[1, 0, 0], best[2, 0, 0], best[3, 1, 1] = 5, 10, 3
    assert torch.stack(data.score(best, truth, 10)).tolist() == [
        [1, 1, 1, 1], [1, 0, 0, 1], [3, 3, 3, 3], [3, 3, 3, 2], [1, 0, 0, 0]]   # digits, right, empties, right, exact


# ---------------------------------------------------------------------------------------------------------------------
# The model

KINDS = [dict(), dict(in_channels=3, dropout=0.1, drop_path=0.1), dict(class_token=True, positions="rotary", window=1),
         dict(image_size=64, patch_size=8, overlap=4, cell=8, num_classes=11, positions="rotary"),
         dict(image_size=64, patch_size=4, cell=8, num_classes=11), dict(class_token=True, overlap=2, registers=2),
         dict(image_size=56, cell=28), dict(positions="rotary"), dict(positions="rotary", window=1, cell=7),
         dict(layer_scale=True, registers=1, num_classes=0, window=2), dict(class_token=True, registers=3, cell=14),
         dict(image_size=46, patch_size=2, dim=16, heads=1, positions="rotary", window=2),    # makes blocks of -inf
         dict(image_size=30, patch_size=3, in_channels=2, dim=36, heads=1, mlp_ratio=1.3, class_token=True, window=4),
         dict(image_size=32, patch_size=16, num_classes=7, dim=96, heads=12, mlp_ratio=4, class_token=True, registers=4,
              class_position=False, layer_scale=True)]


def noise(config, n=2, height=None, width=None):
    """Images of a model's own size, or of another."""
    size = height or config.image_size, width or config.image_size
    return torch.randn(n, config.in_channels, *size, generator=seeded())


def shaken(depth=2, **fields):
    """A model in eval mode all of whose parameters matter: biases, norms and positions start where they do nothing."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(depth=depth, **fields)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(one, other, tolerance=1e-5, case=None):
    assert one.shape == other.shape and (one - other).norm() <= tolerance * other.norm(), case


def plain_forward(model, images):
    """What a model makes of images, written out plainly: tokens, attention of every block, logits."""
    def linear(t, name):
        return torch.einsum("...i,oi->...o", t, state[name + ".weight"]) + state[name + ".bias"]

    def norm(t, name):
        t = t - t.mean(-1, keepdim=True)
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name + ".weight"] + state[name + ".bias"]

    def scaled(t, name):
        return torch.einsum("bnd,d->bnd", t, state[name + ".gamma"]) if config.layer_scale else t

    def by_head(t):     # (B, N, dim) -> complex (B, heads, N, dim / heads / 2), turned by row and column
        t = t.unflatten(2, (config.heads, -1)).transpose(1, 2)
        return torch.complex(*t.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)

    config, state = model.config, model.state_dict()
    patch, side = config.patch_size, config.patch_size + 2 * config.overlap
    front = {name: state[name] for name in ("cls_token", "reg_token") if name in state}
    first = sum(t.shape[1] for t in front.values())
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))            # (rows * columns, 2)
    padded = F.pad(images, [config.overlap] * 4)
    x = torch.stack([padded[:, :, top:top + side, left:left + side] for top, left in (patch * places).tolist()], 1)
    x = torch.einsum("bncpq,dcpq->bnd", x, state["patch_embed.proj.weight"]) + state["patch_embed.proj.bias"]
    angle = torch.zeros(first + len(places), config.dim // config.heads // 2)
    if config.positions == "learned":
        x = x + state["pos_embed"][:, -len(places):]
        if config.class_token and config.class_position:
            front["cls_token"] = front["cls_token"] + state["pos_embed"][:, 0]
    else:               # from 1 radian a patch to 1/100, half of the pairs by row and half by column
        angle[first:] = (places[:, :, None] * 0.01 ** torch.linspace(0, 1, angle.shape[1] // 2)).flatten(1)
    x = torch.cat([t.expand(len(x), -1, -1) for t in front.values()] + [x], 1)
    apart, maps = torch.zeros(len(angle), len(angle), dtype=torch.bool), []
    apart[first:, first:] = (places[:, None] - places).abs().amax(-1) > (config.window or math.inf)
    for block in (f"blocks.{i}." for i in range(config.depth)):
        q, k, v = linear(norm(x, block + "norm1"), block + "attn.qkv").chunk(3, dim=-1)
        scores = (by_head(q) @ by_head(k).mH).real / (config.dim / config.heads) ** 0.5
        maps.append(scores.masked_fill(apart, -math.inf).softmax(-1))
        v = v.unflatten(2, (config.heads, -1))
        v = linear(torch.einsum("bhnm,bmhd->bnhd", maps[-1], v).flatten(2), block + "attn.proj")
        x = x + scaled(v, block + "ls1")
        h = linear(norm(x, block + "norm2"), block + "mlp.fc1")
        x = x + scaled(linear(h * (1 + torch.erf(h / 2**0.5)) / 2, block + "mlp.fc2"), block + "ls2")
    tokens = x = norm(x, "norm")
    if config.cell:
        x = F.avg_pool2d(x[:, first:].mT.unflatten(2, (rows, columns)), config.cell // patch).movedim(1, 3)
    else:
        x = x[:, 0] if config.class_token else x[:, first:].mean(1)
    return tokens, torch.stack(maps), linear(x, "head") if config.num_classes else x


@torch.no_grad()
def test_every_kind_of_model_is_what_a_plain_forward_says():
    """In few tokens and in many, of the model's size and of others: each form of attention is the same."""
    for fields in KINDS:
        model = shaken(**fields)
        config, side = model.config, model.config.cell or model.config.patch_size
        own = config.image_size, config.image_size
        for size in (own, (side, 3 * side), (config.image_size + side, config.image_size), (3 * side, 12 * side)):
            images = noise(config, 3, *size)
            logits, grid = model(images), (size[0] // side, size[1] // side) if config.cell else ()
            assert logits.shape == (3, *grid, config.num_classes or config.dim) and logits.isfinite().all(), fields
            assert_same(model.forward_features(images, []), model.forward_features(images), case=fields)
            if config.positions == "rotary" or size == own:
                tokens, maps, expected = plain_forward(model, images)
                assert_same(model.forward_features(images), tokens, case=fields)
                assert_same(model.attention_maps(images), maps, case=fields)
                assert_same(logits, expected, case=fields)
                with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                    model(images)
                assert config.flops(*size) == counter.get_total_flops() / 3, fields
        assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters()), fields
    for name, parameter in model.named_parameters():    # tokens that are nearly constant show the eps of each norm
        if re.search("patch_embed|_token|pos_embed|attn.proj|mlp.fc2", name):
            parameter *= 1e-3
    assert_same(model(noise(config)), plain_forward(model, noise(config))[2])


def test_gradients_copies_and_bfloat16_of_every_kind_of_model(tmp_path):
    for fields in KINDS:
        model = shaken(**fields)
        images, state = noise(model.config, 4), model.state_dict()
        logits = model(images)
        labels = torch.arange(logits.flatten(0, -2).shape[0]) % 7
        gradients = gradients_of(model, F.cross_entropy(logits.flatten(0, -2), labels))
        assert [name for name, grad in gradients.items() if grad is None or not grad.any()] == [], fields
        torch.save(state, tmp_path / "weights.pt")
        with torch.device("meta"):
            filled = ViT(model.config).eval()
        filled.to_empty(device="cpu").load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        for twin in (filled, copy.deepcopy(model)):
            assert torch.equal(twin(images), logits), fields
            assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in state.items()), fields
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
        assert half.dtype == (torch.bfloat16 if model.config.num_classes else torch.float32), fields
        assert_same(half.float(), logits, 0.03, fields)


def test_bfloat16_gradients_of_norms_are_near():
    """Where the input of a norm is bfloat16, torch sums over tokens in bfloat16 on a CPU: 2,048 tokens then lose up to
    half of the sum. So the residual stream has to be float32."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=64, patch_size=8, cell=8, dim=32, depth=2, positions="rotary"))
    images, labels, gradients = noise(model.config, 32), torch.randint(10, (2048,)), []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images).flatten(0, -2)
        gradients.append(gradients_of(model, F.cross_entropy(logits.float(), labels)))
    for name, exact in gradients[0].items():
        if "norm" in name:
            assert (gradients[1][name] - exact).norm() < 0.03 * exact.norm(), name


def test_model_and_config_refuse():
    model = ViT(ViTConfig())
    for shape in [(1, 28, 28), (1, 3, 28, 28), (1, 1, 29, 28), (1, 1, 28, 30), (1, 1, 0, 28)]:
        assert value_error_of(model, torch.zeros(shape)) == \
            f"expected float images (B, 1, H, W) with H and W multiples of 7 px, got torch.float32 {shape}"
    assert "got torch.uint8 (2, 1, 28, 28)" in value_error_of(model, torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    for words, fields in [
            ("image_size 30 is not a multiple of patch_size 7", dict(image_size=30)), ("mlp_ratio", dict(mlp_ratio=0)),
            ("dim 66 is not a multiple of heads 4", dict(dim=66)), ("dim must be a whole number", dict(dim=64.0)),
            ("cell 10 must be a multiple", dict(cell=10)), ("registers must be", dict(registers=-1)),
            ("depth must be a whole number from 1 up, not 0", dict(depth=0)), ("dropout must be", dict(dropout=1.0)),
            ("window must be a whole number from 0 up, not -1", dict(window=-1)), ("drop_path", dict(drop_path=-0.1)),
            ('positions must be "learned" or "rotary"', dict(positions="sine")),
            ("heads of a multiple of 4 wide", dict(positions="rotary", dim=24)),
            ("class_token must be a bool, not 'yes'", dict(class_token="yes")), ("num_classes", dict(num_classes=-1)),
            ("layer_scale must be a bool, not 1", dict(layer_scale=1)), ("heads must be a whole", dict(heads=True)),
            ("dropout must be a float, not '0.1'", dict(dropout="0.1")),
            ("mlp_ratio must be a float, not None", dict(mlp_ratio=None))]:
        error = value_error_of(ViTConfig, **fields)
        assert words in error, (fields, error)
    assert value_error_of(ViTConfig.preset, "H") == "the presets are Ti, S, B, L, not 'H'"


def test_parameters_have_the_names_that_public_weights_have():
    layers = {"patch_embed.proj": (48, 3, 8, 8), "norm": (48,), "head": (5, 48)}
    for block in ("blocks.0.", "blocks.1."):
        layers |= {block + "norm1": (48,), block + "attn.qkv": (144, 48), block + "attn.proj": (48, 48),
                   block + "norm2": (48,), block + "mlp.fc1": (192, 48), block + "mlp.fc2": (48, 192)}
    expected = {"cls_token": (1, 1, 48), "reg_token": (1, 4, 48), "pos_embed": (1, 16, 48),
                **{f"blocks.{i}.ls{j}.gamma": (48,) for i in (0, 1) for j in (1, 2)}}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    model = ViT(ViTConfig(image_size=32, patch_size=8, in_channels=3, num_classes=5, dim=48, mlp_ratio=4, depth=2,
                          class_token=True, registers=4, class_position=False, layer_scale=True))
    assert model.blocks[1].ls2.gamma.unique().tolist() == [torch.tensor(1e-5).item()]   # timm starts with as much
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert shaken(dim=36, mlp_ratio=1.3).blocks[0].mlp.fc1.out_features == 46   # of 46.8: rounded down as elsewhere


def test_presets_are_the_published_sizes():
    for name, parameters, gflops in [("Ti", 5_717_416, 2.507), ("S", 22_050_664, 9.198), ("B", 86_567_656, 35.13),
                                     ("L", 304_326_632, 123.11)]:
        config = ViTConfig.preset(name)
        assert config.num_parameters() == parameters and config.flops() / 1e9 == pytest.approx(gflops, rel=1e-3), name
        assert ViTConfig.preset(name, num_classes=10, image_size=384).num_classes == 10


def test_weights_of_another_resolution_load():
    from vit import resample_positions
    for first in (0, 1):
        small, large = (shaken(image_size=size, class_token=bool(first), registers=2 * first) for size in (28, 42))
        state, images = small.state_dict(), noise(large.config)
        large.load_state_dict(state)
        assert state["pos_embed"].shape[1] == first + 16            # what was loaded from stays as it was
        assert_same(large(images), small(images), 1e-6)             # the small model resamples on the fly
        grid = small.pos_embed[0, first:].view(1, 4, 4, -1).movedim(3, 1)
        for size in ((6, 6), (3, 7)):
            sampled = resample_positions(small.pos_embed, first, *size)[0]
            assert torch.equal(sampled[:first], small.pos_embed[0, :first])
            expected = F.interpolate(grid, size, mode="bicubic", antialias=True)[0].flatten(1).T
            torch.testing.assert_close(sampled[first:], expected)
        nested = torch.nn.ModuleDict({"eye": ViT(large.config)})    # a part of a larger model
        nested.load_state_dict({f"eye.{name}": tensor for name, tensor in state.items()})
        assert torch.equal(nested["eye"].pos_embed, large.pos_embed)
        for positions in (12, first):
            with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
                large.load_state_dict(state | {"pos_embed": torch.zeros(1, positions, 64)})
    bare = shaken(class_token=True, registers=2, class_position=False)      # its position can be in the class token
    positions = state["pos_embed"]
    bare.load_state_dict(state | {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]})
    assert_same(bare(images), small(images), 1e-6)


def test_weights_that_do_not_fit_say_what_they_are():
    state = shaken(class_token=True, registers=3, class_position=False, layer_scale=True).state_dict()
    model, head = shaken(class_token=True, num_classes=0), torch.zeros(5, 64)
    for clues, weights in [
            (["blocks.0.ls1.gamma (64,): layer_scale=True", "reg_token (1, 3, 64): registers=3",
              "pos_embed (1, 16, 64): n * n positions: class_token=False or class_position=False",
              "head.weight (10, 64): num_classes=10"],
             state),
            (['module.cls_token (1, 1, 64): of a wrapped model'], {f"module.{name}": state[name] for name in state}),
            (["model (): the state dict is one level down"], {"model": state}),
            (["mask_token (1, 64): DINOv2 by Meta"], model.state_dict() | {"mask_token": head[:1]}),
            (["head_dist.weight (5, 64): another model: distilled"], model.state_dict() | {"head_dist.weight": head})]:
        with pytest.raises(RuntimeError) as refused:
            model.load_state_dict(weights)
        told, _ = str(refused.value).split("Error(s) in loading state_dict for ViT:")
        assert all(f"the state dict has {clue}" in told for clue in clues) and told.count("\n") == len(clues), told
    model.load_state_dict(model.state_dict() | {"head.weight": head}, strict=False)     # no error here


@torch.no_grad()
def test_compiles_to_one_graph_for_any_batch():
    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for training, fields in [(True, dict(class_token=True)),
                             (False, dict(image_size=63, positions="rotary", overlap=2, cell=7, window=1, depth=1))]:
        torch._dynamo.reset()
        model, graphs = shaken(dropout=0.1, drop_path=0.1, **fields).train(training), []
        compiled = torch.compile(model, backend=count, fullgraph=True)
        for batch in (8, 8, 5, 1, 2, 12, 16, 1):
            logits = compiled(images := noise(model.config, batch))
            if not training:
                assert_same(logits, model(images))
        assert 1 <= len(graphs) <= 3, fields    # for the first size of a batch, for any other, and for one image


def test_compiled_gradients_are_the_same_at_any_size():
    for backend, fields in [("aot_eager", dict(class_token=True)),              # compiles the backward pass too
                            ("eager", dict(positions="rotary", overlap=3, window=2))]:
        torch._dynamo.reset()
        model = shaken(depth=1, **fields).train()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for size in ((28, 28), (42, 35), (21, 56)):
            logits = [forward(noise(model.config, 6, *size)) for forward in (model, compiled)]
            exact, gradients = (gradients_of(model, each.square().mean()).values() for each in logits)
            assert_same(logits[1], logits[0])
            assert_same(*(torch.cat([gradient.flatten() for gradient in each]) for each in (gradients, exact)))


@pytest.mark.filterwarnings("ignore")       # the exporter's, about its own insides
def test_exports_take_batches_and_images_of_any_size(tmp_path):
    """In 8 to 74 tokens: both forms of attention. Where ONNX is not installed, torch.export alone."""
    done, images = [], [torch.randn(n, 1, *size) for n, size in [(2, (28, 28)), (3, (56, 28)), (5, (42, 84))]]
    for fields in [dict(class_token=True, registers=2), dict(positions="rotary", cell=14, window=1, overlap=2)]:
        model, any_size = shaken(depth=1, **fields), {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
        program = torch.export.export(model, (images[0],), dynamic_shapes=(any_size,))
        done.append((program, [model(each).detach() for each in images]))
        for each, expected in zip(images, done[-1][1]):
            assert_same(program.module()(each), expected, case=fields)
    runtime = [pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    for program, expected in done:
        torch.onnx.export(program, f=tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        for each, logits in zip(images, expected):
            assert abs(session.run(None, {"images": each.numpy()})[0] - logits.numpy()).max() < 1e-5


def test_tools_around_a_model():
    """Hooks see a convolution of patches; activation checkpointing is what ViT says; gradients of each image alone."""
    model, seen = shaken(class_token=True, registers=2, layer_scale=True, dropout=0.1, drop_path=0.2).train(), []
    images, proj, parameters = noise(model.config, 5), model.patch_embed.proj, dict(model.named_parameters())
    proj.register_forward_hook(lambda module, given, output: seen.append(output))

    def loss(parameters, images):
        return torch.func.functional_call(model, parameters, (images,)).square().mean()

    def gradients(images, by=lambda images: gradients_of(model, loss(parameters, images))):
        torch.manual_seed(1)    # of dropout and drop path
        return by(images)

    alone, expected = [gradients(image[None]) for image in images], gradients(images)
    assert_same(seen[-1], F.conv2d(images, proj.weight, proj.bias, proj.stride))
    by_image = torch.vmap(torch.func.grad(loss), (None, 0), randomness="same")
    for name, each in gradients(images[:, None], lambda images: by_image(parameters, images)).items():
        assert_same(each, torch.stack([one[name] for one in alone]), case=name)
    for block in model.blocks:
        exec(re.search(r"block\.forward = .*\)", ViT.__doc__)[0], dict(block=block, torch=torch, functools=functools))
        block.norm1.register_forward_hook(lambda *_: seen.append("block"))
    assert all(torch.equal(each, expected[name]) for name, each in gradients(images).items())
    assert seen.count("block") == 4     # each of the two went forward twice


PARALLEL = """
import sys, torch
from torch.distributed.fsdp import fully_shard
from vit import ViT, ViTConfig
rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))

def sharded(model):
    return [fully_shard(part) for part in (model.patch_embed.proj, *model.blocks, model)][-1]
def compiled(model):
    return torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager")
def trained(wrap, images):
    torch.manual_seed(0)
    model = ViT(ViTConfig(depth=2, class_token=True, registers=2, layer_scale=True))
    wrapped, optimizer = wrap(model), torch.optim.SGD(model.parameters(), 0.1)
    wrapped(images).square().mean().backward()
    optimizer.step()
    return [t.full_tensor() if wrap is sharded else t.detach() for t in model.parameters()]
plain = trained(lambda model: model, images)
for wrap in (sharded, compiled):
    for one, other in zip(trained(wrap, images.chunk(2)[rank]), plain, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm(), wrap
"""


def test_one_step_of_fsdp_and_of_ddp_with_compile_is_a_plain_step(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", PARALLEL, tmp_path / "meet", rank], cwd=HERE) for rank in "01"]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_dropout_and_drop_path():
    for size, fields in itertools.product((28, 63), (dict(dropout=0.3), dict(drop_path=0.3))):
        plain, model = shaken(image_size=size), shaken(image_size=size, **fields)
        images = noise(plain.config)        # 16 or 81 tokens: two forms of attention
        assert torch.equal(model(images), plain(images)), (size, fields)    # they rest in eval mode
        assert not torch.equal(model.train()(images), model(images)), (size, fields)
    # A branch is left out for some images, more of them in later blocks, and scaled up for the others: its mean stays
    torch.manual_seed(0)
    kept = ViT(ViTConfig(drop_path=0.25)).blocks[-1].branch(torch.ones(4000, 3, 5))
    assert (kept == kept[:, :1, :1]).all() and set(kept.unique().tolist()) == {0, torch.tensor(4 / 3).item()}
    assert 0.96 < kept.mean() < 1.04
    assert [block.drop_path_rate for block in ViT(ViTConfig(depth=3, drop_path=0.5)).blocks] == [0, 0.25, 0.5]


def test_a_seed_decides_everything():
    def trained(seed):
        torch.manual_seed(seed)
        model = ViT(ViTConfig(depth=2, dropout=0.1, drop_path=0.1))
        gradients = gradients_of(model, model(torch.randn(4, 1, 28, 28)).square().mean())
        return torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert torch.equal(trained(3), trained(3)) and not torch.equal(trained(3), trained(4))


def test_snippets_of_the_readme_run_beside_vit_py_alone(tmp_path):
    shutil.copy(HERE / "vit.py", tmp_path)
    with torch.device("meta"):
        model = ViT(ViTConfig.preset("S", patch_size=14, image_size=518, num_classes=0, registers=4, layer_scale=True))
    weights = {name: torch.full((1,), 0.01).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    torch.save(weights | {"pos_embed": weights["pos_embed"][:, 1:]}, tmp_path / "pytorch_model.bin")
    weights |= {"register_tokens": weights.pop("reg_token"), "mask_token": torch.zeros(1, 384)}
    torch.save(weights, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(snippets) >= 2
    for i, snippet in enumerate(snippets):      # the shapes that comments promise are checked too
        snippets[i], promises = re.subn(r"^(\w+) = .*# (\(\d[\d, ]+\))", r"\g<0>\nassert \1.shape == \2, \1.shape  #",
                                        snippet, flags=re.MULTILINE)
        assert promises >= 1, snippet
    code = f"for snippet in {snippets}: exec(compile(snippet, snippet, 'exec'), {{}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_load_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    state = ViT(ViTConfig()).state_dict()
    unfit = [dict(dim=32), dict(dim=2**40), dict(depth=10**9), dict(depth=-1), dict(image_size=7 * 10**3),
             dict(image_size=7 * 10**9)]
    for i, content in enumerate([{"config": {}, "average": Bomb()}, {"config": {"wings": 2}, "average": {}}, [1, 2],
                                 *({"config": config, "average": state} for config in unfit)]):
        torch.save(content, tmp_path / f"{i}.pt")
    (tmp_path / "page.pt").write_bytes(b"<html>")
    (tmp_path / "empty.pt").touch()
    for path in tmp_path.glob("*.pt"):
        assert f"{path} is not a checkpoint of this model" in value_error_of(ViT.load, path)
    assert not (tmp_path / "boom").exists()


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


def test_adamw_is_torchs():
    """On flat buffers, of which the parameters are aligned views. At rates of 0, nothing changes."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        torch.manual_seed(0)
        model = ViT(ViTConfig(dim=32, depth=1, class_token=True)).to(dtype)
        theirs, groups = copy.deepcopy(model), {0.1: [], 0.0: []}
        for name, parameter in theirs.named_parameters():
            groups[0.1 if name.endswith("weight") and "norm" not in name else 0.0].append(parameter)
        optimizer = torch.optim.AdamW([{"params": group, "weight_decay": decay} for decay, group in groups.items()],
                                      betas=(0.9, 0.95), foreach=False)
        weights, gradients, matrices = train.flatten(model)
        moments = torch.zeros_like(weights), torch.zeros_like(weights)
        assert all(parameter.data_ptr() % 64 == weights.data_ptr() % 64 for parameter in model.parameters())
        for step in range(1, 31):
            gradients.copy_(torch.randn(len(gradients), generator=seeded(step)) / step)
            for parameter, other in zip(model.parameters(), theirs.parameters()):
                other.grad = parameter.grad.clone()
            optimizer.step()
            rates = torch.tensor(train.adamw_rates(step, 1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95), dtype=dtype)
            train.adamw(weights, gradients, *moments, matrices, rates)
            for (name, parameter), other in zip(model.named_parameters(), theirs.parameters()):
                assert torch.allclose(parameter, other, rtol=tolerance, atol=tolerance), (dtype, step, name)
        before = [tensor.clone() for tensor in (weights, *moments)]
        train.adamw(weights, gradients, *moments, matrices, torch.zeros(5, dtype=dtype))
        assert all(torch.equal(*pair) for pair in zip((weights, *moments), before))
        assert train.still_flat(model, weights, gradients)
        model.zero_grad()
        assert not train.still_flat(model, weights, gradients)


def test_rates_and_weights():
    """The learning rate rises, then falls to 0. Weights of the draws are in part those of the losses' roots."""
    settings = train.Settings(max_steps=100, lr=2.0, warmup=0.1)
    rates = [train.learning_rate(step, settings) for step in (0, 9, 10, 55, 100)]
    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.0])
    losses, shares = torch.tensor([0.01, 0.04, 0.36, 0.01]), torch.tensor([0.1, 0.2, 0.6, 0.1])
    torch.testing.assert_close(train.sampling_weights(losses, 0.6), 0.6 * shares + 0.4 / 4)
    for even in (train.sampling_weights(losses, 0.0), train.sampling_weights(torch.zeros(4), 1.0)):
        assert torch.equal(even, torch.full((4,), 0.25))


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_device_and_dtype(monkeypatch):
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    for accelerator in (None, mps):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
        assert train.pick_device("auto") == (accelerator or cpu) and train.pick_device("cpu") == cpu
    with pytest.raises(ValueError, match="--device=nonsense cannot be used here"):
        train.pick_device("nonsense")
    assert train.pick_dtype("auto", mps) == torch.float32 and train.pick_dtype("bfloat16", mps) == torch.bfloat16
    for fast, others in ((True, {}), (False, {}), (False, {"sve": True})):      # many only emulate bfloat16, slowly
        expected = torch.bfloat16 if fast else torch.float32
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: others or {"avx512_bf16": fast})
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast or including_emulation)
        assert train.pick_dtype("auto", cpu) == train.pick_dtype("auto", cuda) == expected
        assert train.pick_dtype("float32", cpu) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert train.pick_dtype("auto", cpu) == torch.float32
    current = []                            # a stream or graph on another device than the tensors computes nothing
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: types.SimpleNamespace(
        device=torch.device(device), tolist=list))
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    assert train.pick_device("cuda:1") == torch.device("cuda:1") and current == [1]


TINY = ["--device=cpu", "--dim=16", "--depth=1", "--heads=1", "--batch_size=16", "--dtype=float32"]


def smoke(capsys, *flags):
    """The exit code of the smoke test, what it prints, and the names of the checks that fail, dtype aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(["--smoke", *flags])
    printed = capsys.readouterr().out
    failing = set(re.findall(r"^FAIL  (?:float32 |bfloat16 )?(.*?): ", printed, re.MULTILINE))
    assert (" checks FAILED" if failing else "all right") in printed.splitlines()[-1]
    return stopped.value.code, printed, failing


def test_smoke_passes_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in (["--phase=1", "--dtype=float32"], ["--phase=2", "--dtype=bfloat16"]):
        code, printed, _ = smoke(capsys, *TINY, *flags)
        assert code == 0 and printed.count("PASS") == (24 if "bfloat16" in flags[1] else 13), printed
        assert "PASS  canvases: 100.00% as drawn on the CPU" in printed and not list(tmp_path.iterdir())
    monkeypatch.setattr(train, "seconds_of", lambda *_: 1.0, raising=False)     # measuring it would take longest
    code, printed, _ = smoke(capsys, "--device=cpu", "--phase=3", "--dtype=bfloat16")       # at the default sizes
    assert code == 0 and "      bfloat16: 1000.0 ms a step of 32, 32 images/s" in printed, printed


def one_head_too_large(linear, x, weight, bias=None, blocks=itertools.count()):
    """On its way into the projection: the second head of two, in the first block of two."""
    if x.dtype == torch.bfloat16 and weight.shape == (16, 16) and next(blocks) % 2 == 0:
        x = torch.cat((x[..., :8], 1.05 * x[..., 8:]), dim=-1)
    return linear(x, weight, bias)


def last_rows_forgotten(linear, x, *rest):
    """As by a kernel that computes eight rows at once."""
    y = linear(x, *rest)
    rows = y.numel() // y.shape[-1]
    return y * (torch.arange(rows) < rows // 8 * 8).view(*y.shape[:-1], 1)


ODD = {"odd-sized logits", "odd-sized gradients", "odd-sized each gradient"}
STEP = ODD | {"logits", "gradients", "each gradient"}
FAULTS = {  # name: where, what, how it goes wrong, flags, the checks that fail
    "GELU is 1% too large": (F, "gelu", lambda gelu, x, **_: 1.01 * gelu(x), "--phase=1", STEP),
    "GELU is approximate": (F, "gelu", lambda gelu, x, **_: gelu(x, approximate="tanh"), "--phase=2", STEP),
    "GELU is NaN": (F, "gelu", lambda gelu, x, **_: gelu(x) * math.nan, "--phase=1",
                    STEP | {"update", "odd-sized update", "training", "finite", "save and load"}),
    "a head is 5% too large": (F, "linear", one_head_too_large, "--phase=3 --depth=2 --heads=2 --dtype=bfloat16", STEP),
    "the last rows are forgotten": (F, "linear", last_rows_forgotten, "--phase=3", ODD),
    "AdamW forgets the last tensor": (train, "adamw", lambda adamw, *given: adamw(
        *(tensor[:-16] for tensor in given[:4]), *given[4:]), "--phase=2", {"update", "odd-sized update"}),
    "canvases are faint": (train.Trainer, "draw", lambda draw, trainer: [
        tensor // 2 if tensor.dtype == torch.uint8 else tensor for tensor in draw(trainer)], "--phase=3", {"canvases"}),
    "labels are of other canvases": (train.Trainer, "draw", lambda draw, trainer: (draw(trainer)[0], draw(trainer)[1]),
                                     "--phase=1", {"canvases", "training"}),
    "one seed, two draws": (data, "augment", lambda augment, *given, calls=itertools.count(1), **options: augment(
        *given, **options) // min(next(calls), 4), "--phase=2", {"canvases", "random numbers"}),
    "two seeds, one draw": (train, "seed_of", lambda seed_of, *key: 0, "--phase=2", {"random numbers"}),
    "all random numbers are one": (torch, "rand", lambda rand, *shape, **options: torch.full_like(
        rand(*shape, **options), 0.5), "--phase=1 --hard=0", {"random numbers"}),
    "what is saved is stale": (torch, "save", lambda save, state, file, first=[]: save(
        first.append(copy.deepcopy(state)) or first[0], file), "--phase=1", {"save and load"}),
    "a captured step does nothing": (train, "capture", lambda capture, trainer: lambda: None, "--phase=2",
                                     {"training", "save and load"})}


def test_smoke_notices_a_faulty_device(monkeypatch, capsys):
    """What is in float64 goes right: it is the reference, on the CPU."""
    monkeypatch.setattr(train, "seconds_of", lambda *_: 1.0, raising=False)
    for fault, (where, name, wrong, flags, expected) in FAULTS.items():
        def faulty(first, *rest, right=getattr(where, name), **options):
            is_reference = getattr(first, "dtype", None) == torch.float64
            return right(first, *rest, **options) if is_reference else wrong(right, first, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, faulty)
            code, printed, failing = smoke(capsys, *TINY, *flags.split())
        assert (code, failing) == (1, expected), f"{fault}\n{printed}"

    def refuse(*_, **__):
        raise NotImplementedError("no such kernel\nand a long story")

    monkeypatch.setattr(F, "gelu", refuse)
    error = refusal(train.main, ["--smoke", *TINY], capsys)
    assert error == (1, "train.py: FAIL, this device cannot run it: no such kernel\n")


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def trainer_of(digits, rank=0, processes=1, **given):
    """A Trainer of a tiny model in float32 on the CPU."""
    settings = train.settle({"dim": 16, "depth": 1, "heads": 1, "batch_size": 16, **given}, {})
    layout = data.layout(settings.phase, *digits)
    return train.Trainer(settings, train.model_config(settings, layout), train.training_layout(settings, layout),
                         *digits, torch.device("cpu"), torch.float32, rank, processes)


@pytest.mark.parametrize("phase", data.PHASES)
def test_overfits_32_canvases(drawn, phase):
    trainer = trainer_of(drawn, phase=phase, dim=64, heads=4, batch_size=32, max_steps=300, lr=1e-2)
    canvas, numbers = trainer.draw()
    for step in range(300):
        trainer.prepare(step)
        wrong = trainer.backward(canvas, numbers).argmax(-1) != trainer.classes_of[numbers]
        if not wrong.any():
            return
        trainer.update()
    pytest.fail(f"{wrong.sum()} of {wrong.numel()} cells still wrong after {step} steps")


@pytest.mark.parametrize("phase", data.PHASES)
def test_training_remembers_how_hard_a_digit_was(drawn, phase):
    """By its loss in the cell that holds it, averaged with what was known of it, at first the loss of a guess."""
    trainer, labels = trainer_of(drawn, phase=phase), drawn[1]
    guess = math.log(trainer.model.config.num_classes)
    expected = torch.full((len(labels),), guess)
    for step in range(2):
        trainer.prepare(step)
        canvas, numbers = trainer.draw()
        logits, losses = trainer.backward(canvas, numbers), {}
        trainer.update()
        for logit, number in zip(logits.flatten(0, 2), numbers.flatten().tolist()):
            if number < len(labels):            # not an empty cell
                loss = -logit.log_softmax(-1)[labels[number]].item()
                losses.setdefault(number, [expected[number].item()]).append(min(guess, loss))
        for number, known in losses.items():
            expected[number] = sum(known) / len(known)
        assert len(losses) > 10
        torch.testing.assert_close(trainer.hardness[:-1], expected)


def test_hard_digits_are_drawn_more_often(drawn):
    """Every tenth digit has 100 times the loss of the others, whose root is 10 times theirs."""
    for phase, hard, share in ((1, 0.0, 0.1), (1, 0.7, 0.7 * 10 / 19 + 0.3 / 10), (3, 0.7, 0.7 * 10 / 19 + 0.3 / 10)):
        trainer = trainer_of(drawn, phase=phase, hard=hard, batch_size=4000 if phase == 1 else 1000)
        trainer.hardness.fill_(0.01)[::10] = 1.0
        numbers = trainer.draw()[1]
        tenths = numbers[numbers < len(drawn[0])] % 10 == 0
        assert tenths.float().mean().item() == pytest.approx(share, abs=0.03), (phase, hard)


def test_training_digits_are_augmented_as_told(drawn, monkeypatch):
    told, augment = [], data.augment
    monkeypatch.setattr(data, "augment", lambda images, rand, **how: told.append(how) or augment(images, rand, **how))
    trainer_of(drawn, phase=3, rotate=7, elastic=1.5, elastic_points=4).step()
    trainer_of(drawn, phase=3).step()           # by default not at all
    assert len(told) == 1 and told[0].pop("side") <= 28
    assert told[0] == dict(rotate=7, scale=0, shear=0, shift=0, elastic=1.5, elastic_points=4)


def test_clipping_limits_large_gradients_and_leaves_small_ones_alone(drawn):
    for limit, norm, expected in ((1.0, 0.5, 0.5), (1.0, 4.0, 1.0), (0.0, 4.0, 4.0)):
        trainer = trainer_of(drawn, phase=1, grad_clip=limit)
        trainer.prepare(0)
        trainer.backward(*trainer.draw())
        direction = trainer.gradients / trainer.gradients.norm()
        trainer.gradients.copy_(norm * direction)
        trainer.update()
        torch.testing.assert_close(trainer.mean, 0.1 * expected * direction, rtol=1e-5, atol=1e-9)  # what AdamW takes
        assert trainer.norm.item() == pytest.approx(norm)       # what is logged


def test_the_average_of_weights_is_shorter_early_on(drawn):
    """Of step 1, 2, ... it keeps 1/11, 2/12, ... of what it was, up to the share asked for."""
    trainer = trainer_of(drawn, phase=1, average=0.2, lr=1e-2, warmup=0.0)
    expected = trainer.weights.clone()
    for step, kept in enumerate((1 / 11, 2 / 12, 0.2, 0.2)):
        trainer.prepare(step)
        trainer.step()
        expected = kept * expected + (1 - kept) * trainer.weights
        torch.testing.assert_close(trainer.average, expected)


def test_dropout_differs_from_step_to_step_and_between_processes(drawn):
    trainer, neighbour = (trainer_of(drawn, rank, 2, phase=1, dropout=0.5) for rank in (0, 1))
    batch, logits = trainer.draw(), []
    for each, step in ((trainer, 0), (trainer, 0), (trainer, 1), (neighbour, 0)):
        each.prepare(step)
        logits.append(each.backward(*batch))
    assert [torch.equal(logits[0], other) for other in logits[1:]] == [True, False, False]


def test_an_infinite_gradient_of_a_finite_loss_changes_no_weight(drawn, flags, tmp_path, monkeypatch, capsys):
    backward = train.Trainer.backward
    monkeypatch.setattr(train.Trainer, "backward", lambda trainer, *batch: (
        backward(trainer, *batch), trainer.gradients[:1].fill_(math.inf)))
    trainer = trainer_of(drawn, phase=1)
    changing = (trainer.weights, trainer.average, trainer.mean, trainer.square)
    before = [tensor.clone() for tensor in changing]
    trainer.prepare(0)
    trainer.step()
    assert trainer.totals[0].isfinite() and all(torch.equal(*pair) for pair in zip(changing, before))
    code, error = refusal(train.main, [*flags, "--phase=1", "--max_steps=4"], capsys)       # and stops the run
    assert code == 1 and "not finite by step 1" in error and not (tmp_path / "out" / "ckpt.pt").exists()


def test_evaluation_counts_every_cell():
    """A digit seen in an empty cell makes its canvas wrong, though all its digits are read right."""
    truth, reader = torch.full((4, 8, 8), 10), torch.nn.Module()
    truth[:3, 0, 0] = 3
    best = truth.clone()
    best[1, 5, 5], best[2, 0, 0] = 7, 4
    reader.forward = lambda images: 20.0 * F.one_hot(best, 11)
    figures = train.evaluate(reader, torch.zeros(4, 64, 64).byte(), truth, 10, torch.device("cpu"), torch.float32)
    assert figures == pytest.approx({"loss": F.cross_entropy(reader(None).flatten(0, 2), truth.flatten()).item(),
                                     "digit_accuracy": 2 / 3, "empty_accuracy": 252 / 253,
                                     "cell_accuracy": 254 / 256, "exact_match": 2 / 4})


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_every_setting_is_checked(flags, tmp_path, capsys):
    for field in train.fields(train.Settings):
        name, kind, limits = field.name, train.types_of(field)[0], field.metadata
        wrong = {bool: ["maybe"], str: ["nonsense"], int: ["fast", "nan", "2.5"], float: ["fast", "nan"]}[kind]
        if limits["low"] is not None:
            wrong += [kind(limits["low"] - 1), kind(limits["high"] * 2)]
        elif kind in (int, float):              # the model and the layout know the limits of their own fields
            wrong += [max(limits["choices"]) + 1 if limits["choices"] else -1]
        for value in wrong if name not in ("data_dir", "out_dir") else []:
            code, error = refusal(train.main, [*flags, "--positions=rotary", f"--{name}={value}"], capsys)
            named = re.search(rf"\b{name.replace('_', '[_ ]')}\b", error)
            assert code == 2 and error.startswith("train.py: ") and named, (name, value, error)
        for value in ([1], b"", 1 if kind in (bool, str) else "1", *([1.0, True] if kind is int else [])):
            with pytest.raises(ValueError, match=f"--{name} must be of type {kind.__name__}"):
                train.run(**{name: value})
    for given, words in (({"sped": 1}, "unknown setting sped"), ({"epochs": 1.0, "max_steps": 5}, "not both"),
                         ({"seed": None}, "--seed must be of type int, not None")):
        with pytest.raises(ValueError, match=words):
            train.run(**given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("phase", data.PHASES)
def test_a_run_and_what_it_leaves(finished, digits_folder, phase, capsys):
    out = finished(phase)
    lines, last = metrics(out), metrics(out)[-1]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 4), ("train", 6), ("eval", 6), ("train", 8), ("train", 12), ("eval", 12)]
    assert set(lines[0]) == {"event", "step", "seconds", "loss", "lr", "grad_norm", "images_per_second"}
    assert set(last) == {"event", "phase", "data", "step", "seconds", "train_seconds", "loss", "cell_accuracy",
                         "digit_accuracy", "empty_accuracy", "exact_match", "final"}
    assert last["final"] and not lines[2]["final"] and last["data"] == "custom" and last["phase"] == phase
    assert (last["empty_accuracy"] is None) == (phase != 3) and 0 <= last["exact_match"] <= last["cell_accuracy"] <= 1
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "metrics.jsonl"}
    model, cpu = ViT.load(out / "ckpt.pt"), torch.device("cpu")         # with averaged weights, which are evaluated
    assert not model.training and not torch.equal(model.head.weight, checkpoint_of(out)["model"]["head.weight"])
    images, labels = data.load_mnist(digits_folder, "test")
    test_set = data.test_canvases(data.layout(phase, images, labels), images, labels, 100)
    figures = train.evaluate(model, *test_set, 10, cpu, train.pick_dtype("auto", cpu))
    assert figures["loss"] == pytest.approx(last["loss"]) and figures["exact_match"] == last["exact_match"]
    for again in ("--eval_only", "--resume"):   # a finished run has nothing to go on with
        capsys.readouterr()
        train.main([f"--data_dir={digits_folder}", f"--out_dir={out}", *SMALL, f"--phase={phase}", again])
        printed = capsys.readouterr().out
        assert f"digit accuracy  {100 * last['digit_accuracy']:.2f}%" in printed and str(out / "ckpt.pt") in printed
        assert metrics(out) == lines


def test_a_run_from_python(digits_folder, tmp_path):
    """In a thread, where no signals can be caught."""
    results, given = [], dict(phase=1, max_steps=3, dim=16, depth=1, heads=1, device="cpu", out_dir=str(tmp_path))
    thread = threading.Thread(target=lambda: results.append(train.run(data_dir=str(digits_folder), **given)))
    thread.start()
    thread.join()
    figures, model = results[0].figures, results[0].model
    assert figures == metrics(tmp_path)[-1] and figures["final"] and not model.training
    torch.testing.assert_close(model.state_dict(), checkpoint_of(tmp_path)["average"], rtol=0, atol=0)


def assert_same_run(one, other, logged=True):
    """In two folders, times aside."""
    for key in ("step", "model", "average", "mean", "square", "hardness"):
        torch.testing.assert_close(checkpoint_of(one)[key], checkpoint_of(other)[key], rtol=0, atol=0)
    lines, others = ([{name: value for name, value in line.items() if name not in (
        "seconds", "train_seconds", "images_per_second")} for line in metrics(out)] for out in (one, other))
    assert lines == others or not logged


@pytest.mark.parametrize("phase", data.PHASES)
def test_a_seed_is_a_run(finished, flags, tmp_path, phase, monkeypatch, capsys):
    """Whatever is logged, evaluated and saved when, and whether anybody looks; another seed is another run."""
    out, flags = tmp_path / "out", [*flags, f"--phase={phase}", "--max_steps=12", "--dropout=0.1"]
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        patch.setattr(train, "capture", lambda trainer: print("captured") or trainer.step)
        train.main([*flags, "--log_every=1", "--eval_every=0", "--save_every=1000"])
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("captured", "\r\033[Kstep 12/12  loss ", "images/s", "exact canvases"))
    assert_same_run(out, finished(phase), logged=False)
    train.main([*flags, "--seed=1"])
    one, other = checkpoint_of(out), checkpoint_of(finished(phase))
    assert not any(torch.equal(one[key], other[key]) for key in ("mean", "square", "hardness"))
    assert not any(torch.equal(one[key]["head.weight"], other[key]["head.weight"]) for key in ("model", "average"))


@pytest.mark.parametrize("phase,stops", [
    (1, [(1, signal.SIGINT), (9, None)]), (2, [(0, signal.SIGTERM), (3, signal.SIGTERM), (9, None)]),
    (3, [(6, signal.SIGTERM), (9, None), (9, signal.SIGINT)])])
def test_a_stopped_run_goes_on_as_if_it_never_was(finished, flags, tmp_path, phase, stops, monkeypatch, capsys):
    """After any step, between lines of metrics too, by a signal or (None) an exception. A run knows its settings."""
    out, prepare = tmp_path / "out", train.Trainer.prepare
    start = [*flags, f"--phase={phase}", "--max_steps=12", "--eval_every=6", "--dropout=0.1"]
    resume = [*flags[:2], "--device=cpu", f"--phase={phase}", "--resume"]

    def interrupting(trainer, now, **options):
        if now == step and not how:
            raise RuntimeError("crash")
        if now == step:
            signal.raise_signal(how)
        return prepare(trainer, now, **options)

    for step, how in stops:
        with monkeypatch.context() as patch, pytest.raises((SystemExit, RuntimeError)) as stopped:
            patch.setattr(train.Trainer, "prepare", interrupting)
            train.main(resume if out.exists() else start)
        saved, error = checkpoint_of(out)["step"], capsys.readouterr().err
        if how:
            assert stopped.value.code == 128 + how and step < saved <= step + 2
            assert f"stopped at step {saved} of 12 and saved: the same command with --resume goes on" in error
        else:                                   # some lines were written that were not saved
            assert stopped.match("crash") and saved == step
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"event": "train", "step": 10}\n{"event": "tra')
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL           # as it was before
    if phase == 1:  # in checkpoints of version 2, `since` is the step of the last line of metrics
        checkpoint = checkpoint_of(out)
        checkpoint.update(version=2, since=8, sums=checkpoint["sums"][:3].clone())
        torch.save(checkpoint, out / "ckpt.pt")
    train.main(resume)
    assert_same_run(out, finished(phase))


def test_a_full_disk_keeps_what_was_there(tmp_path):
    resource = pytest.importorskip("resource", reason="needs limits on files, which Windows has not")
    noise, limits = torch.randint(256, (9999, 10, 3), generator=seeded()), resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, save in (("ckpt.pt", lambda path, n: train.save(path, {"weights": torch.ones(10 * n)})),
                       ("sample.png", lambda path, n: sample.save_png(path, noise[:n].byte().numpy()))):
        save(tmp_path / name, 1)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OSError, match=f"{name} cannot be saved: File too large; an earlier one is kept"):
                save(tmp_path / name, 9999)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


TRAP = type("Trap", (), {"__reduce__": lambda self: (Path.touch, (Path("trapped"),))})()    # to unpickle it runs code
DAMAGES = [  # how a checkpoint of phase 1 is damaged, and what is said of it
    (lambda c: c["mean"].resize_(3), "ckpt.pt cannot be resumed: mean has 3 values"),
    (lambda c: c["model"].pop("head.bias"), "cannot be resumed: Error(s) in loading state_dict for ViT: Missing key"),
    (lambda c: c["model"].update({"head.bias": torch.zeros(3)}), "size mismatch for head.bias"),
    (lambda c: c["average"].update(extra=torch.zeros(2)), "ckpt.pt is not a checkpoint of this model"),
    (lambda c: c.pop("square"), "ckpt.pt is damaged: square cannot be right"),
    (lambda c: c.update(model=[1, 2]), "ckpt.pt is damaged: model cannot be right"),
    (lambda c: c.update(step=-1), "ckpt.pt is damaged: step cannot be right"),
    (lambda c: c["settings"].update(lr="fast", dim=2.5), "ckpt.pt is damaged: lr, dim cannot be right"),
    (lambda c: c["settings"].update(batch_size=10**15), "--batch_size must be from 1 to 65536, not 1000000000000000"),
    (lambda c: c["settings"].update(canvas_size=28 * 10**9), "canvas size 28000000000 is not a multiple of the cell"),
    (lambda c: c["settings"].update(heads=-4), "heads must be a whole number from 1 up, not -4"),
    (lambda c: c["settings"].update(depth=10**9), "ckpt.pt has another model: depth cannot change"),
    (lambda c: [c[part].update(depth=10**9) for part in ("settings", "config")], "config asks for 12,000,000,007"),
    (lambda c: [c[part].update(dim=10**6) for part in ("settings", "config")], "its config asks for (1, "),
    (lambda c: c.update(hardness=c["hardness"][:1001]), "ckpt.pt was trained on 1,000 digits, these are 1,500"),
    (lambda c: c.update(data="drawn"), "ckpt.pt was trained on drawn digits, these are custom ones"),
    (lambda c: c.update(phase=2), "ckpt.pt is of phase 2, not 1"),
    (lambda c: c.update(version=1), "ckpt.pt was written by another version of train.py"),
    (lambda c: c["settings"].update(sped=1), "ckpt.pt was written by another version of train.py"),
    (lambda c: c.update(version=2), "ckpt.pt is not a checkpoint of train.py: "),       # one of version 2 has more
    (lambda c: c.pop("settings"), "ckpt.pt is not a checkpoint of train.py: "),
    (lambda c: c.clear(), "ckpt.pt is not a checkpoint of train.py: "),
    (lambda c: c.update(extra=TRAP), "ckpt.pt is not a checkpoint of train.py: ")]


def test_a_damaged_checkpoint_is_refused_and_kept(finished, flags, tmp_path, monkeypatch, capsys):
    """And runs no code."""
    path = tmp_path / "out" / "ckpt.pt"
    path.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    resume = [*flags[:2], "--device=cpu", "--phase=1", "--max_steps=16", "--resume"]
    for number, (damage, words) in enumerate(DAMAGES):
        checkpoint = checkpoint_of(finished(1))
        damage(checkpoint)
        torch.save(checkpoint, path)
        damaged = path.read_bytes()
        code, error = refusal(train.main, resume, capsys)
        assert code == 2 and words in error, (number, words, error)
        assert path.read_bytes() == damaged and list(path.parent.iterdir()) == [path], (number, words)
    with pytest.raises(ValueError, match="is not a checkpoint of train.py: "):
        train.load_checkpoint(path)
    assert not Path("trapped").exists()
    torch.load(path, weights_only=False)
    assert Path("trapped").exists()             # so it would have


def test_a_fresh_run_keeps_the_old_one_beside(flags, tmp_path, capsys):
    out, flags, kept = tmp_path / "out", [*flags, "--phase=1", "--max_steps=2"], {}
    for number in (1, 2):
        train.main([*flags, f"--seed={number}"])
        kept |= {f"{name}.{number}": (out / name).read_bytes() for name in ("ckpt.pt", "metrics.jsonl")}
    train.main([*flags, "--seed=3"])
    (out / "ckpt.pt").unlink()                  # as a run that is stopped before it saves leaves things
    train.main([*flags, "--seed=4"])
    assert kept == {path.name: path.read_bytes() for path in out.glob("*.*.*")} and len(set(kept.values())) == 4
    assert f"is another run's: kept as {out / 'ckpt.pt.2'}" in capsys.readouterr().out and len(metrics(out)) == 2


def test_a_captured_step_is_a_step(drawn, monkeypatch, capsys):
    """A CPU is taken for a CUDA device, whose graph replays the step that it captures. Steps that only warm up and are
    captured change nothing, whether capturing works out or not."""
    @contextlib.contextmanager
    def capturing(graph):
        if "operation" in words:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        yield

    stream, cpu = types.SimpleNamespace(wait_stream=lambda other: None), torch.device("cpu")
    for name, value in (("Stream", lambda: stream), ("current_stream", lambda: stream), ("graph", capturing),
                        ("stream", contextlib.nullcontext), ("CUDAGraph", lambda: graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    for processes, words in ((1, ""), (1, "operation not permitted when stream is capturing"),
                             (2, "several processes train")):
        plain, pretending = (trainer_of(drawn, 0, processes, phase=3, dropout=0.1, drop_path=0.1) for _ in range(2))
        generators, replays = [], []
        graph = types.SimpleNamespace(register_generator_state=generators.append,
                                      replay=lambda: replays.append(pretending.step()))
        assert train.capture(plain) == plain.step and not capsys.readouterr().out       # a CPU says nothing of it
        pretending.prepare(0)                   # as in the smoke test, so that rates are not 0
        pretending.device = torch.device("cuda")
        advance = train.capture(pretending)
        pretending.device = cpu
        line = f"no CUDA graph of the training step, so each kernel is launched by itself: {words}\n"
        assert capsys.readouterr().out == (line if words else "")
        for step in range(3):
            for trainer, take in ((plain, plain.step), (pretending, advance)):
                trainer.prepare(step)
                take()
        assert len(replays) == (0 if words else 3) and (words or generators == [pretending.generator])
        for name in ("weights", "average", "mean", "square", "hardness", "sums", "flags"):
            assert torch.equal(getattr(plain, name), getattr(pretending, name)), (name, words)


def test_what_may_change_where_a_run_goes_on(finished, flags, tmp_path):
    """Its length and all but its model; the folder; the device; settings that did not exist when it was saved."""
    train.main([*flags, "--phase=1", "--epochs=0.0015", "--resume"])    # there is nothing to go on with yet
    assert metrics(tmp_path / "out")[-1]["step"] == 6                   # of 16 canvases; an epoch is 60,000
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    checkpoint = checkpoint_of(moved)
    checkpoint["settings"].update(device="cuda:7", wandb=True)
    for part, name in [("settings", "hard"), ("settings", "lr"), ("settings", "log_every"),
                       ("config", "registers"), ("config", "layer_scale"), ("config", "class_position")]:
        del checkpoint[part][name]
    torch.save(checkpoint, moved / "ckpt.pt")
    train.main(["--phase=1", f"--out_dir={moved}", "--max_steps=8", "--batch_size=8", "--rotate=0", "--resume"])
    settings, lines = checkpoint_of(moved)["settings"], metrics(moved)
    assert [settings[name] for name in ("max_steps", "batch_size", "rotate", "shear", "hard", "lr", "log_every")] == [
        8, 8, 0, 0.15, 0.7, 7e-3, 10]
    assert [line["step"] for line in lines] == [4, 6, 6, 8, 8] and not (tmp_path / "out").exists()
    train.main(["--phase=1", f"--out_dir={moved}", "--eval_only"])


def test_eval_only_at_another_size(finished, flags, capsys):
    flags, printed = [*flags, f"--out_dir={finished(3)}", "--phase=3", "--eval_only"], []
    for more in ([], ["--canvas_size=96", "--max_digits=8"]):
        train.main([*flags, *more])
        printed.append(capsys.readouterr().out)
    assert "exact canvases" in printed[1] and printed[0] != printed[1]
    code, error = refusal(train.main, [*flags, "--depth=8", "--mlp_ratio=3"], capsys)
    assert code == 2 and "has another model: depth, mlp_ratio cannot change" in error


def test_what_is_trained_on_and_what_is_evaluated_on(flags, tmp_path, monkeypatch):
    """Training canvases are harder than evaluated ones. Validation digits train nothing and are no test digits."""
    made, canvases = [], data.canvases
    monkeypatch.setattr(data, "canvases", lambda layout, images, *rest: made.append((
        len(images), layout.max_digits, layout.crowded, layout.borders)) or canvases(layout, images, *rest))
    for more, expected, kind in (
            ("--val_digits=300", [(300, 5, 0, 0), (1200, 9, 0.5, 0.5)], "custom-val"),
            ("--train_digits=7 --crowded=0.4 --borders=0.3", [(500, 5, 0, 0), (1500, 7, 0.4, 0.3)], "custom")):
        made.clear()
        train.main([*flags, "--phase=3", "--max_steps=1", *more.split(), "--window=2"])
        assert made == expected and metrics(tmp_path / "out")[-1]["data"] == kind
    assert ViT.load(tmp_path / "out" / "ckpt.pt").config.window == 2


def test_digits_of_other_kinds(tmp_path, drawn, monkeypatch, capsys):
    """Drawn digits are called so everywhere. 26 classes in files of MNIST's names make a model of 27, with "empty"."""
    monkeypatch.setattr(data, "drawn_digits", lambda n, seed: drawn)
    train.main(["--data=drawn", "--phase=1", f"--out_dir={tmp_path}", *SMALL, "--max_steps=2"])
    sample.main([f"--out_dir={tmp_path}", "--count=2"])
    printed = capsys.readouterr().out
    for words in ("(drawn digits: this says nothing about MNIST)", "px (drawn digits)\n",
                  "test canvas 1 (drawn digits)", "Cells (drawn digits): "):
        assert words in printed, words
    assert metrics(tmp_path)[-1]["data"] == "drawn" == checkpoint_of(tmp_path)["data"]
    for split in ("train", "test"):
        write_mnist(tmp_path, drawn[0][:520], torch.arange(520) % 26, split)
    train.main([f"--data_dir={tmp_path}", f"--out_dir={tmp_path}", *SMALL, "--max_steps=2"])
    assert ViT.load(tmp_path / "ckpt.pt").config.num_classes == 27


def test_wandb_offline(flags, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main([*flags, "--phase=3", "--max_steps=8", "--eval_every=4", "--wandb"])
    wandb.teardown()    # finish() may return before its service has written the record; this waits until that has ended
    record, = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    for word in (b"train/loss", b"train/lr", b"train/grad_norm", b"train/digit_accuracy", b"eval/exact_match",
                 b"histogram", b"weight_decay", b"phase3", b"ckpt.pt"):
        assert word in record.read_bytes(), word
    assert len(list(record.parent.glob("files/media/images/*.png"))) == 16      # 8 at each evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files, and data sets as people have them


def nested(levels):
    """A list that says itself twice at every level: short in a file, endless in print."""
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def zip_with(path, replace, compression=zipfile.ZIP_STORED):
    """A file of torch.save with other records: {end of its name: content}."""
    whole = io.BytesIO()
    torch.save({"config": {}, "average": {}}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", compression) as target:
        for name in source.namelist():
            bodies = [body for end, body in replace.items() if name.endswith(end)]
            target.writestr(name, bodies[0] if bodies else source.read(name))
        for end, body in replace.items():
            target.writestr(f"archive/extra/{end}", body)


def test_a_hostile_checkpoint_is_refused_at_once(tmp_path):
    """Without an endless print, without code, and before it takes more memory than the file is large."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    config = train.asdict(ViTConfig(dim=16, depth=1))
    state = ViT(ViTConfig(dim=16, depth=1)).state_dict()
    wide = {name: torch.zeros(1).expand(10**9) for name in state}
    cases = {
        "a nested size": ({"config": config | {"image_size": nested(40)}, "average": state}, "image_size must be a"),
        "nested positions": ({"config": config | {"positions": nested(40)}, "average": state}, "positions must be"),
        "a nested name": ({"config": config, "average": state | {"x": nested(40)}}, "tensors, its config asks for"),
        "many blocks": ({"config": config | {"depth": 20_000}, "average": {str(i): torch.zeros(1) for i in range(500)}},
                        "it has 500 tensors, its config asks for 240,007"),
        "expanded": ({"config": config, "average": wide}, "its config asks for"),
        "meta": ({"config": config, "average": {"x": torch.zeros(3, device="meta")}}, "only tensors and plain values"),
        "code": ({"config": config, "average": Bomb()}, "only tensors and plain values are read"),
        "code in a newer pickle": ({"config": config, "average": Bomb()}, "plain values in pickle protocol 2"),
        "huge number": ({"config": config | {"dim": 10**5000}, "average": state}, "damaged, or no file of torch.save")}
    for name, (content, words) in cases.items():
        torch.save(content, tmp_path / "x.pt", pickle_protocol=4 if name == "code in a newer pickle" else 2)
        with pytest.raises(ValueError) as caught:
            ViT.load(tmp_path / "x.pt")
        error = str(caught.value)
        assert words in error and "is not a checkpoint of this model" in error, (name, error)
        assert "\n" not in error and len(error) < 500 and "weights_only" not in error, (name, error)
    assert not (tmp_path / "boom").exists()

    zip_with(tmp_path / "unpacks.pt", {"0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "unpacks.pt").stat().st_size < 10**5
    number = b"\x80\x02cbuiltins\nbytearray\n" + b"J" + struct.pack("<i", 2 * 10**9) + b"\x85R."
    zip_with(tmp_path / "allocates.pt", {"data.pkl": number})
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name, words in (("unpacks", "unpacks to more bytes than it has"), ("allocates", "it holds builtins.bytearray"),
                        ("pipe", "not a regular file"), ("folder", "not a regular file")):
        with pytest.raises(ValueError, match=words):
            ViT.load(tmp_path / f"{name}.pt")


def test_data_sets_are_found_as_people_have_them(tmp_path, drawn, monkeypatch, capsys):
    """Kaggle's folders, torchvision's layout, EMNIST's and QMNIST's names; several sets are listed, one is chosen."""
    images, labels = drawn[0][:20], drawn[1][:20]

    def put(path, array, code=0x08):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(idx_bytes(array, code)) if path.suffix == ".gz" else idx_bytes(array, code))

    for test in ("train", "t10k", "test"):
        for content, array in (("images-idx3-ubyte", images.numpy()), ("labels-idx1-ubyte", labels.numpy())):
            put(f"kaggle/{test}-{content}/{test}-{content}", array)
            put(f"torchvision/MNIST/raw/{test}-{content}", array)
            put(f"emnist/emnist-letters-{test}-{content}.gz", array)
            put(f"emnist/emnist-digits-{test}-{content}.gz", array)
        put(f"qmnist/qmnist-{test}-images-idx3-ubyte", images.numpy())
        put(f"qmnist/qmnist-{test}-labels-idx2-int", np.stack([labels.numpy(), *[np.arange(20)] * 7], 1), 0x0C)
    for folder in ("kaggle", "torchvision", "torchvision/MNIST", "torchvision/MNIST/raw", "emnist/emnist-letters",
                   "qmnist"):
        for split in data.SPLITS:
            found = data.load_mnist(tmp_path / folder, split)
            assert torch.equal(found[0], images) and torch.equal(found[1], labels), (folder, split)
    with pytest.raises(ValueError, match="emnist holds several data sets: choose one by --data_dir=.*emnist-digits"):
        data.load_mnist(tmp_path / "emnist", "train")

    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "mnist_train.csv").touch()
    for folder, words in (("tables", r"it holds mnist_train.csv\)"),
                          ("kaggle/mnist", "there are digits in .*kaggle: name it")):
        with pytest.raises(ConnectionError, match=words):
            data.load_mnist(tmp_path / folder, "train")
    os.mkfifo(tmp_path / "tables" / "train-images-idx3-ubyte")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a regular file but a device or a pipe"):
        data.load_mnist(tmp_path / "tables", "train")


def test_arrays_of_another_program_are_read():
    canvas = np.random.default_rng(0).integers(256, size=(2, 16, 16), dtype=np.uint8)
    assert torch.equal(data.to_input(canvas), data.to_input(torch.from_numpy(canvas)))
    assert [len(reading) for reading in data.read(torch.zeros(2, 1, 3, 10))] == [3, 3]         # no class is empty
    with pytest.raises(ValueError, match="which of 27 classes is that of empty cells. Say empty=26, or empty=None"):
        data.read(torch.zeros(1, 2, 2, 27))
    assert [len(data.read(torch.zeros(1, 2, 2, 27), 26, apart)[0]) for apart in (1, 2)] == [4, 1]


def test_a_test_set_beyond_memory_is_refused(drawn, monkeypatch):
    layout = data.layout(3, *drawn, size=1024, max_digits=9)
    with pytest.raises(ValueError, match=r"10,000,000 canvases of 1024 x 1024 px .* GB of memory, and .* GB are free"):
        data.test_canvases(layout, *drawn, 10_000_000)


def test_pieces_are_those_of_a_flood_fill():
    for seed in range(60):
        generator = seeded(seed)
        sides = torch.randint(1, 30, (2,), generator=generator).tolist()
        mask = torch.rand(*sides, generator=generator) < 0.2 + seed % 4 / 6
        flood = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
        for _ in range(mask.numel()):
            flood = F.max_pool2d(flood[None, None], 3, stride=1, padding=1)[0, 0] * mask
        labels = sample.pieces(mask)
        assert torch.equal(labels > 0, mask)
        pairs = torch.stack((labels, flood.long())).flatten(1).unique(dim=1)
        assert len(pairs[0]) == len(labels.unique()) == len(flood.unique())
    spiral = torch.zeros(301, 301, dtype=torch.bool)                    # one px wide: 45,000 rounds for a flood fill
    for i in range(0, 150, 2):
        spiral[i, i:301 - i] = spiral[i:301 - i, 300 - i] = spiral[300 - i, i:301 - i] = spiral[i + 2:301 - i, i] = True
        spiral[i + 2, i:i + 3] = True
    assert sample.pieces(spiral).unique().tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are disturbed


def test_a_checkpoint_that_says_what_cannot_be_is_damaged(finished, tmp_path, capsys):
    def flip_a_bit(path):
        content = bytearray(path.read_bytes())
        content[content.index(b"head.weight") + 5000] ^= 1
        path.write_bytes(content)

    cases = {"hardness": lambda c: c.update(hardness=torch.tensor(1.0)),
             "batch_size": lambda c: c["settings"].update(batch_size=None),
             "seconds": lambda c: c.update(seconds=math.nan), "mean": lambda c: c["mean"].fill_(math.nan),
             "square": lambda c: c["square"].fill_(-1.0)}
    for name, change in cases.items():
        checkpoint = checkpoint_of(finished(1))
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match=f"ckpt.pt is damaged: {name} cannot be right"):
            train.load_checkpoint(tmp_path / "ckpt.pt")
    shutil.copy(finished(1) / "ckpt.pt", tmp_path)
    flip_a_bit(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="do not match their checksums"):
        train.load_checkpoint(tmp_path / "ckpt.pt")


def test_resume_names_a_broken_metrics_file_and_changes_nothing(finished, flags, tmp_path, capsys):
    out, resume = tmp_path / "out", [*flags, "--phase=1", "--max_steps=14", "--resume"]
    shutil.copytree(finished(1), out)
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")
    for broken in (b"[]", b"1", b"null", b'{"step": "x"}', b"{}", b"[" * 100_000, b"\xff\xfe\x00"):
        (out / "metrics.jsonl").write_bytes(b"\n".join([lines[0], broken, *lines[1:]]))
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert "metrics.jsonl is not a metrics file of train.py: see its line 2" in refusal(
            train.main, resume, capsys)[1]
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for name in ("metrics.jsonl", "ckpt.pt"):
        for make, what in ((Path.mkdir, "a folder"), (os.mkfifo, "a device or a pipe"),
                           (lambda path: path.symlink_to(path), "a link")):
            (out / name).unlink()
            make(out / name)
            assert f"{name} is not a regular file but {what}" in refusal(train.main, resume, capsys)[1]
            (out / name).rmdir() if what == "a folder" else (out / name).unlink()
            shutil.copy(finished(1) / name, out)


def test_two_runs_never_share_a_folder(flags, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with train.locked(tmp_path / "out"):                                # as another run holds it, as long as it lives
        code, error = refusal(train.main, [*flags, "--phase=1", "--max_steps=2"], capsys)
    assert code == 1 and f"a run is at work in {tmp_path / 'out'}" in error and not list((tmp_path / "out").iterdir())
    train.main([*flags, "--phase=1", "--max_steps=2"])


def test_a_run_outlives_its_terminal(flags, tmp_path, monkeypatch, capsys):
    """Closing it is a SIGHUP, which saves and stops as SIGTERM does, unless nohup ignores it."""
    prepare = train.Trainer.prepare

    def hang_up(self, step, **more):
        if step == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        return prepare(self, step, **more)

    monkeypatch.setattr(train.Trainer, "prepare", hang_up)
    code, error = refusal(train.main, [*flags, "--phase=1", "--max_steps=9"], capsys)
    assert code == 129 and checkpoint_of(tmp_path / "out")["step"] in (3, 4, 5)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.main([*flags, "--phase=1", "--max_steps=9"])
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert checkpoint_of(tmp_path / "out")["step"] == 9


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_run_goes_on_without_a_voice(flags, tmp_path, monkeypatch):
    """With stdout closed, full, gone, or without the letters of a folder's name."""
    for number, stdout in enumerate((None, Full(), io.TextIOWrapper(io.BytesIO(), encoding="ascii"))):
        out = tmp_path / f"übung{number}"
        monkeypatch.setattr(sys, "stdout", stdout)
        train.main([*flags, "--phase=1", "--max_steps=4", f"--out_dir={out}"])
        assert metrics(out)[-1]["final"], number


def test_ctrl_c_while_it_starts(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")       # as if the key were hit while torch is imported
    for script in ("train.py", "sample.py"):
        done = subprocess.run([sys.executable, HERE / script], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert done.returncode and done.stderr == f"{script}: stopped\n"


def test_resume_says_which_settings_changed(finished, flags, tmp_path, capsys):
    shutil.copytree(finished(1), tmp_path / "out")
    train.main([*flags, "--phase=1", "--resume", "--max_steps=13", "--seed=4", "--lr=1e-4"])
    words = "note: other settings than before: seed 0 -> 4, max_steps 12 -> 13, lr 0.007 -> 0.0001\n"
    assert words in capsys.readouterr().out


def test_what_takes_too_much_memory_is_refused_before_it_does(flags, tmp_path, capsys):
    for more in ("--dim=1000000", "--mlp_ratio=1e9", "--overlap=100000", "--depth=100000000", "--mlp_ratio=1e18"):
        code, error = refusal(train.main, [*flags, "--phase=1", more], capsys)
        assert code == 2 and "GB of memory, and" in error and "GB are free" in error, more
    assert "--device=meta cannot be used here" in refusal(train.main, [*flags, "--device=meta"], capsys)[1]
    assert not (tmp_path / "out").exists()


def test_odd_labels_are_named(tmp_path, drawn, capsys):
    """None of class 0; class 5 in the test set alone. Figures leave out what never occurs."""
    labels = drawn[1][:400] % 3 + 1
    write_mnist(tmp_path, drawn[0][:400], labels, "train")
    write_mnist(tmp_path, drawn[0][:400], labels.where(torch.arange(400) > 2, 5), "test")
    train.main([f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}", *SMALL, "--phase=1", "--max_steps=2"])
    assert "note: no training digit is of class 0, 4, 5; class 5 is in the test set alone\n" in capsys.readouterr().out
    sample.main([f"--out_dir={tmp_path / 'out'}", "--count=1"])
    matrix = capsys.readouterr().out.split("recall precision\n")[1].split("\n\n")[0]
    assert not {"0", "4"} & {line.split()[0] for line in matrix.splitlines() if "-" in line}
    write_mnist(tmp_path, drawn[0][:400], 0 * labels, "train")
    write_mnist(tmp_path, drawn[0][:400], 0 * labels, "test")
    train.main([f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'other'}", *SMALL, "--phase=1", "--max_steps=2"])
    assert "note: all training digits are of class 0\n" in capsys.readouterr().out


def test_sample_in_other_hands(finished, tmp_path, capsys, monkeypatch, drawn):
    """A phase that is not the checkpoint's; one broken picture among others; a stdout that is no file."""
    out = tmp_path / "out"
    shutil.copytree(finished(3), out)
    assert "ckpt.pt is of phase 3, not 1" in refusal(sample.main, ["--phase=1", f"--out_dir={out}"], capsys)[1]
    code, error = refusal(sample.main, ["--count=x"], capsys)
    assert code == 2 and "argument --count: invalid int value: 'x'" in error
    (tmp_path / "broken.npy").write_bytes(b"nonsense")
    np.save(tmp_path / "infinite.npy", np.full((30, 30), 1e300))
    np.save(tmp_path / "good.npy", drawn[0][0].numpy())
    os.mkfifo(tmp_path / "pipe.npy")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--out_dir={out}", "--image", *(str(tmp_path / f"{name}.npy") for name in (
            "broken", "pipe", "infinite", "good"))])
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and f"\n{tmp_path / 'good.npy'}\n" in printed.out and (out / "image.png").exists()
    assert [line.split(": ")[1].split(" ")[0] for line in printed.err.splitlines()] == [
        str(tmp_path / f"{name}.npy") for name in ("broken", "pipe", "infinite")]
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    sample.main([f"--out_dir={out}", f"--image={tmp_path / 'good.npy'}", "--device=cpu"])
    assert "good.npy" in notebook.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


WORKER = """
import contextlib, hashlib, io, itertools, json, os, signal, sys, train
prepare, rank, trainer = train.Trainer.prepare, os.environ.get("RANK", "0"), None
first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

def watched(self, *given, **options):
    global trainer
    trainer = self
    if [rank, next(steps)] == task.get("at") and first_start:
        exec(task["action"])
    return prepare(self, *given, **options)

train.Trainer.prepare = watched
for task in json.loads(sys.argv[1]):
    os.environ.update(task.get("environment", {}))
    task.get("waits") and input()
    code, steps, out, err = 0, itertools.count(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main([flag.replace("RANK", rank) for flag in task["flags"]])
        except SystemExit as stopped:
            code = stopped.code
    weights = trainer and hashlib.md5(trainer.weights.numpy()).hexdigest()
    print(json.dumps([code, out.getvalue(), err.getvalue(), weights]), flush=True)
"""
FOLLOWED = ["--max_steps=20", "--log_every=1", "--save_every=30", "--batch_size=15", "--eval_every=0",
            "--dtype=float32", "--hard=0"]      # or rounding might tip which digit is drawn
RESUMED = ["--phase=3", "--max_steps=12", "--log_every=1", "--dropout=0.1", "--resume", "--test_canvases=1"]


def start(tasks, *launcher, **environment):
    """A process that does one task after another and says of each its exit code, what it printed, what as errors, and a
    digest of the weights. at: a rank, and after how many of its steps it does `action`. waits: for a line of input."""
    return subprocess.Popen([*launcher, sys.executable, "-c", WORKER, json.dumps(tasks)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(HERE), **environment})


@pytest.fixture(scope="module")
def shared(digits_folder, tmp_path_factory):
    """The folder of runs that two processes share, started as by torchrun; of each run, by name, what becomes of it in
    either process. The last one kills the second."""
    folder = tmp_path_factory.mktemp("shared")
    tasks = {f"phase{phase}": dict(flags=[f"--phase={phase}", *FOLLOWED]) for phase in data.PHASES}
    tasks |= {"undisturbed": dict(flags=RESUMED),
              "stopped": dict(flags=RESUMED, at=["1", 5], action="signal.raise_signal(signal.SIGTERM)"),
              "resumed": dict(flags=[*RESUMED, f"--out_dir={folder}/stopped"]),
              "diverging": dict(flags=["--phase=1", "--max_steps=40", "--lr=1e12", "--grad_clip=0"]),
              "unlike": dict(flags=["--phase=1", "--max_steps=4", "--seed=RANK"]),
              "dying": dict(flags=["--phase=1"], at=["1", 5], action="signal.raise_signal(signal.SIGKILL)")}
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in tasks]
    for (name, task), port in zip(tasks.items(), ports):
        task["flags"] = [f"--data_dir={digits_folder}", f"--out_dir={folder}/{name}", *SMALL, *task["flags"]]
        task["environment"] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": "2"}
        port.close()
    processes = [start(list(tasks.values()), RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    try:
        printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == -signal.SIGKILL and len(printed[0]) == len(tasks)
    return folder, {name: [json.loads(line) for line in lines if line] for name, *lines in zip(
        tasks, printed[0], [*printed[1], ""])}


def test_two_processes_follow_one(shared, digits_folder, tmp_path):
    folder, results = shared
    for phase in data.PHASES:
        one, two = tmp_path / str(phase), folder / f"phase{phase}"
        (code, printed, error, weights), others = results[two.name]
        assert "2 processes" in printed and [code, "", error, weights] == others and (code, error) == (0, "")
        train.main([f"--data_dir={digits_folder}", f"--out_dir={one}", *SMALL, f"--phase={phase}", *FOLLOWED])
        steps, losses = ([[line[key] for line in metrics(out)] for out in (one, two)] for key in ("step", "loss"))
        assert steps[0] == steps[1] == [*range(1, 21), 20] and losses[1] == pytest.approx(losses[0], rel=1e-4)
        for share in ("digit_accuracy", "exact_match"):
            assert metrics(two)[-1][share] == pytest.approx(metrics(one)[-1][share], abs=0.01)
        torch.testing.assert_close(checkpoint_of(two)["hardness"], checkpoint_of(one)["hardness"], rtol=1e-3, atol=1e-4)


def test_a_wish_to_stop_reaches_all_processes_at_the_same_step(shared):
    folder, results = shared
    (code, _, error, weights), (other_code, _, _, other_weights) = results["stopped"]
    assert code == other_code == 143 and re.search("stopped at step [67] of 12 and saved: the same command with", error)
    assert weights == other_weights and [result[0] for result in results["resumed"]] == [0, 0]
    assert_same_run(folder / "stopped", folder / "undisturbed")


def test_what_stops_one_process_stops_all(shared):
    """Another seed than the others' too, as a process without their folder would not see their checkpoint."""
    folder, results = shared
    assert all(code == 1 and "try a lower --lr" in error for code, _, error, _ in results["diverging"])
    assert all(weight.isfinite().all() for weight in checkpoint_of(folder / "diverging")["model"].values())
    assert all(code == 2 and "the processes do not start alike" in error for code, _, error, _ in results["unlike"])
    assert not (folder / "unlike").exists()
    (code, _, error, _), = results["dying"]
    assert code == 1 and "train.py: another process is gone, so this one stops too" in error
    train.load_checkpoint(folder / "dying" / "ckpt.pt")


def test_torchrun_restarts_and_resumes(shared, flags, tmp_path):
    task = dict(flags=[*flags, *RESUMED], at=["1", 5], action="signal.raise_signal(signal.SIGKILL)")
    run = start([task], sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "--max_restarts=1", "--no-python")
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and re.search("run: step [45] to 12", printed), printed
    assert_same_run(tmp_path / "out", shared[0] / "undisturbed")


def test_a_killed_run_goes_on_exactly(flags, tmp_path):
    """Twice, at random moments, saving among them: the checkpoint always loads, the end is the same."""
    out = tmp_path / "out"
    flags = [*flags, "--phase=1", "--max_steps=80", "--eval_every=0", "--log_every=2", "--resume"]
    task = dict(flags=flags, at=["0", 5], waits=True)           # at SIGALRM, a process ends as abruptly as at SIGKILL
    runs = [start([{**task, "action": f"signal.setitimer(signal.ITIMER_REAL, {moment})"}]) for moment in (0.013, 0.037)]
    train.main([*flags, f"--out_dir={tmp_path / 'undisturbed'}"])
    for run in runs:
        run.communicate("\n", timeout=120)
        assert run.returncode == -signal.SIGALRM
        train.load_checkpoint(out / "ckpt.pt")
    train.main(flags)
    assert_same_run(out, tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------------------------------
# Real digits


@needs_mnist
@pytest.mark.parametrize("phase,least", [(1, 0.9), (2, 0.5), (3, 0.3)])
def test_learns_real_digits(learnt, phase, least):
    assert metrics(learnt(phase))[-1]["digit_accuracy"] > least


# ---------------------------------------------------------------------------------------------------------------------
# The command line, as a user meets it


def assert_refuses(main, flags, words, code, capsys):
    ended_with, error = refusal(main, flags, capsys)
    assert ended_with == code and error.startswith(f"{main.__module__}.py: ") and words in error, (flags, error)


def test_errors_are_one_clear_line(flags, finished, tmp_path, monkeypatch, capsys):
    out = f"--out_dir={finished(1)}"
    for module in ("wandb", "matplotlib.figure", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)                      # as if it were not installed
    for wrong, words in (
            (["--phsae=3"], "unknown argument --phsae=3, did you mean --phase?"), (["more"], "unknown argument more"),
            (["--phase=4"], "--phase must be one of 1, 2, 3, not 4"), (["--dtype=float16"], "--dtype must be one of"),
            (["--lr=fast"], "argument --lr: invalid float value: 'fast'"), (["--lr=-1"], "--lr must be from 0"),
            (["--batch_size", "0"], "--batch_size must be from 1 to 65536, not 0"),
            (["--epochs=inf"], "--epochs must be from"), (["--beta2=1"], "--beta2 must be from 0"),
            (["--compile=maybe"], "expected true or false, not 'maybe'"), (["--epochs=1", "--max_steps=5"], "not both"),
            (["--device=abacus"], "--device=abacus cannot be used here"), (["--wandb"], "pip install wandb"),
            (["--heads=3"], "dim 16 is not a multiple of heads"), (["--val_digits=5000"], "leaves none of 1500"),
            (["--canvas_size=60"], "60 is not a multiple of the cell"), (["--max_digits=20"], "must be from 1 to 9"),
            (["--phase=2", "--train_digits=5"], "--train_digits, --crowded and --borders do not apply"),
            ([out, "--phase=1", "--resume", "--depth=2", "--mlp_ratio=3"], "another model: depth, mlp_ratio cannot")):
        assert_refuses(train.main, [*flags, *wrong], words, 2, capsys)
    assert_refuses(train.main, ["--eval_only", "--out_dir=nowhere"], "there is no checkpoint", 1, capsys)
    assert not (tmp_path / "out").exists()
    for wrong, words in (
            (["--start=10000"], "--start=10000, but there are"), (["--count=0"], "--count must be above 0"),
            (["--test_canvases=0"], "--test_canvases must be"), (["--digit_height=0"], "--digit_height must be"),
            (["--out_dir", "a", "b"], "--curves"), (["--data_dir=nowhere"], "no data set in"),
            (["--canvas_size=60"], "60 is not a multiple"), (["--image=x.npy"], "x.npy cannot be read: No such file"),
            (["--curves"], "pip install matplotlib"), (["--image=x.png"], "pip install pillow")):
        assert_refuses(sample.main, [out, *wrong], words, 1, capsys)


def test_help_explains_every_flag(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")                                   # each explanation on one line
    explained = []
    for main in (train.main, sample.main):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        explained.append(dict(re.findall(r"^  --(\w+)(?: \S+)*\s{2,}(\S.*)$", capsys.readouterr().out, re.MULTILINE)))
    settings = {field.name: field for field in train.fields(train.Settings)}
    assert explained[0].keys() == settings.keys() and explained[1].keys() == vars(sample.parse([])).keys()
    for name, text in explained[0].items():
        default = "" if settings[name].default is None else f" (default: {settings[name].default})"
        if by_phase := [f"{phase}: {row[name]}" for phase, row in train.DEFAULTS.items() if name in row]:
            default = f" (default by phase: {', '.join(by_phase)})"
        assert text == settings[name].metadata["help"] + default, name
    for name, text in explained[1].items():
        default = vars(sample.parse([]))[name]
        silent = ("mistakes", "attention", "curves", "page", "image", "json")
        assert ("(default: " in text) == (name not in silent), name
        assert default is None or default is False or f"(default: {default})" in text, name


def test_the_whole_way(digits_folder, tmp_path):
    """In processes of their own, flags in both spellings, output into a pipe."""
    def command(script, *flags):
        return subprocess.run([sys.executable, HERE / script, *flags], capture_output=True, text=True, timeout=300)
    out = f"--out_dir={tmp_path / 'out'}"
    ran = command("train.py", "--phase", "1", "--data_dir", digits_folder, out, *SMALL, "--max_steps=30")
    shown = command("sample.py", out, "--data_dir", digits_folder, "--count=3")
    assert ran.returncode == shown.returncode == 0, ran.stderr + shown.stderr
    assert "digit accuracy" in ran.stdout and "\033" not in ran.stdout + shown.stdout      # nor a line that is redrawn
    assert all(text in shown.stdout for text in ("test canvas 2", "read as", "█"))
    failed = command("sample.py", "--out_dir=nowhere")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "train one" in failed.stderr


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_drawing_and_mistakes_in_the_terminal(monkeypatch):
    canvas = torch.tensor([[0, 255, 0, 255], [0, 0, 255, 255]], dtype=torch.uint8)
    assert sample.draw(canvas, colour=False) == ["┌────┐", "│ ▀▄█│", "└────┘"]
    assert "\033[38;2;255;255;255m\033[48;2;0;0;0m▀" in sample.draw(canvas, colour=True)[1]
    assert sample.draw(canvas[:1], colour=False) == ["┌────┐", "│ ▀ ▀│", "└────┘"]
    truth = torch.full((8, 8), 10)
    truth[1, 2], truth[5, 5] = 3, 4
    reading = [(3, 1, 2, 0.99), (7, 6, 0, 0.5)]
    findings = sample.compare(reading, truth, 10)
    assert findings == [(1, 2, 3, 3, 0.99), (5, 5, 4, None, None), (6, 0, None, 7, 0.5)]
    right, *wrong = ["  row 1 column 2: 3, read as 3 (99.0%)", "  row 5 column 5: 4, read as nothing   <-- wrong",
                     "  row 6 column 0: nothing, read as 7 (50.0%)   <-- wrong"]
    assert sample.describe(findings, colour=False) == [right, *wrong]
    assert sample.describe(findings, colour=True) == [right, *(f"\033[1;31m{line}\033[0m" for line in wrong)]
    assert sample.describe([], colour=True) == ["  nothing there, nothing read"]
    unknown = sample.compare(reading, None, 10)                             # one's own picture: the truth is unknown
    assert unknown == [(1, 2, 3, 3, 0.99), (6, 0, 7, 7, 0.5)]
    monkeypatch.setattr(sample, "UNSURE", 0.6)
    record = {"file": "my.png", "text": "3\n?", "digit_height": 20.4, "digits": [
        {"digit": digit, "confidence": share} for digit, _, _, share in reading]}
    page = sample.Reading(record, canvas, 1, [(canvas, None)], "")
    assert sample.reading_report(page, colour=False) == [
        "my.png", "┌────┐", "│ ▀▄█│", "└────┘", "  3", "  ?",
        "  (2 digits of about 20 px, 74.5% sure on average; unsure: 7 (50%))"]
    page = page._replace(record=record | {"digits": []}, canvases=[], note="no ink")
    assert sample.reading_report(page, colour=False) == ["my.png", "  nothing: no ink"]


def test_figures():
    truth = torch.tensor([[[0, 2]], [[2, 2]], [[1, 1]]])                    # 2 is "empty"
    best = torch.tensor([[[0, 2]], [[2, 0]], [[1, 0]]])
    assert sample.figures(truth, best, 2) == [
        "", "Cells: what is there (rows) and what is read (columns)", "         0    1 empty   recall precision",
        "    0    1    .     .  100.00%    33.33%", "    1    1    1     .   50.00%   100.00%",
        "empty    1    .     2   66.67%   100.00%", "", "digits on a canvas  canvases  all right  digits right",
        "                 0         1      0.00%             -",
        "                 1         1    100.00%       100.00%",
        "                 2         1      0.00%        50.00%", "",
        "Digits, at most one cell off: recall 66.67%, precision 50.00%, F1 57.14%"]
    assert sample.figures(truth[2:], truth[2:], 2, " (drawn digits)")[1].startswith("Cells (drawn digits): what")
    many = torch.arange(640_000).remainder(11).view(10_000, 8, 8)
    assert all(len(line) <= 80 for classes in (10, 26) for line in sample.figures(many, many, classes))


def test_digits_found_nearby():
    for there, read, pairs in (
            ("3. ..", "3. ..", 1), ("3. ..", "4. ..", 0), ("3. ..", ".. .3", 1), ("3..", "..3", 0), ("3", ".", 0),
            (".33", "..3", 1), ("3. ..", "3. 3.", 1), ("3.. ..4", ".3. .4.", 2), ("3.. ... ..4", "..4 ... 3..", 0),
            (".33.", "..33", 1)):                                           # the nearest pair leaves two apart
        truth, best = (torch.tensor([[[".34".index(cell) for cell in row] for row in cells.split()]])
                       for cells in (there, read))
        assert sample.found_nearby(truth, best, 0) == sample.found_nearby(best, truth, 0) == pairs, (there, read)
    generator = seeded()
    for _ in range(50):             # where digits are two cells apart or more, no other way to pair them finds more
        truth, best = torch.full((2, 1, 8, 8), 2)
        truth[0, ::3, ::3] = torch.randint(3, (3, 3), generator=generator)
        best[0, torch.rand(8, 8, generator=generator) < 0.2] = torch.randint(2, (1,), generator=generator).item()
        near = sum((best[0, max(y - 1, 0):y + 2, max(x - 1, 0):x + 2] == truth[0, y, x]).any().item()
                   for y, x in (truth[0] != 2).nonzero().tolist())
        assert sample.found_nearby(truth, best, 2) == near


def pixels_of(path):
    """A PNG as save_png writes it -> (height, width, 3), checksums checked."""
    file, chunks = io.BytesIO(path.read_bytes()), {}
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    while head := file.read(8):
        length, kind = struct.unpack(">I4s", head)
        chunks[kind] = file.read(length)
        assert file.read(4) == struct.pack(">I", zlib.crc32(kind + chunks[kind]))
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert form == [8, 2, 0, 0, 0] and not lines[:, 0].any() and chunks[b"IEND"] == b""
    return lines[:, 1:].reshape(height, width, 3)


def test_png_round_trip(tmp_path):
    path, picture = tmp_path / "x.png", np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    sample.save_png(path, picture)
    assert np.array_equal(pixels_of(path), picture) and list(tmp_path.iterdir()) == [path]
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    assert np.array_equal(np.asarray(image.open(path)), picture)


def test_a_tile_tells_right_from_wrong_without_colour():
    blank = torch.zeros(512, 512, dtype=torch.uint8)
    right, wrong, missed = (sample.tile(blank[:64, :64], [(2, 3, 4, read, 1)], 8, "x").max(2) for read in (4, 9, None))
    edge = slice(3 * 32, 4 * 32)                                            # of the cell's frame, above, at scale 4
    assert (right[64, edge] > 0).all() and 12 <= (wrong[64, edge] > 0).sum() <= 20
    assert len(wrong) > len(right)                                          # the mistake in words, below
    assert not np.array_equal(wrong[:256], missed[:256])                    # what was read stands in the frame
    corners = [(0, 0, 25, 25, 0.9), (0, 63, 3, 3, 0.9), (63, 0, 3, 3, 0.9), (63, 63, 25, 25, 0.9)]
    large = sample.tile(blank, corners, 8, "x")
    assert large.shape[1] == 512
    for corner in (large[:30, :30], large[:30, 482:], large[482:512, :30], large[482:512, 482:]):
        assert 20 < (corner == 24).all(2).sum() < 200                       # the ground of what was read
    strip = sample.tile(blank[:8, :160], [(0, 5, 4, 4, 0.9)], 8, "x")
    assert (strip[:8] == sample.GREEN).all(2).sum() > 48                    # lower than a letter: what fits


def test_attention_rollout_of_one_block():
    """Half of what a cell sees is itself, half is what its tokens attend to."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=16, patch_size=4, cell=8, dim=32, depth=1)).eval()
    canvas = torch.randint(256, (16, 24), dtype=torch.uint8)
    attention = model.attention_maps(data.to_input(canvas[None]))[0, 0].mean(0).detach()    # (24, 24)
    tokens = [2, 3, 8, 9]                                                   # of the cell in row 0, column 1 of 2 x 3
    seen = (0.5 * attention[tokens].mean(0) + torch.isin(torch.arange(24), torch.tensor(tokens)) / 8).view(4, 6)
    rollout = sample.attention_rollout(model, canvas)
    assert rollout.shape == (2, 3, 4, 6)
    torch.testing.assert_close(rollout[0, 1], seen / seen.max())


def save_in_all_forms(folder, canvas, scale, seed, with_pillow):
    """A canvas as dark blue ink on yellowish paper, with grain and darker towards a corner, and as a drawing without
    paper, in the forms that pictures come in: a file of each."""
    ink = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    paper = torch.tensor([0.92, 0.89, 0.8]) + 0.02 * torch.randn(*ink.shape, 1, generator=seeded(seed))
    page = paper.lerp(torch.tensor([0.1, 0.12, 0.35]), ink[:, :, None] / 255)
    page = page * (1 - 0.25 * torch.outer(*(torch.linspace(0, 1, side) for side in ink.shape)))[:, :, None]
    page, ink, zeros = page.clamp(0, 1).numpy(), ink.numpy(), np.zeros_like(ink.numpy())
    grey, rgb = page.mean(2), (255 * page).round().astype(np.uint8)
    pen, chalk = (np.stack((*colour, ink), axis=2) for colour in ((zeros, zeros, zeros + 60), (zeros + 255,) * 3))
    if with_pillow:
        image = pytest.importorskip("PIL.Image", reason="needs Pillow")
        photo, turned = image.fromarray(rgb), image.fromarray(np.rot90(rgb))
        turned.getexif()[0x0112] = 6                                        # says to turn it back
        for name, picture in {"rgb.png": photo, "rgb.jpg": photo, "turned.jpg": turned, "grey.png": photo.convert("L"),
                              "palette.png": photo.quantize(32), "pen.png": image.fromarray(pen)}.items():
            picture.save(folder / name, exif=picture.getexif())
        if importlib.util.find_spec("pillow_heif"):
            importlib.import_module("pillow_heif").from_pillow(photo).save(folder / "rgb.heic", quality=90)
        return
    for name, array in {"rgb": rgb, "pen": pen, "chalk": chalk, "float": grey.astype(float), "int": ink.astype(int),
                        "12 bits": 16 * ink.astype(np.uint16), "1 bit": (ink > 127).astype(np.uint8)}.items():
        np.save(folder / f"{name}.npy", array)
    size = b"# a comment\n%d %d\n" % grey.shape[::-1]
    (folder / "8 bits.pgm").write_bytes(b"P5 " + size + b"255\n" + (grey * 255).round().astype("u1").tobytes())
    (folder / "16 bits.pgm").write_bytes(b"P5 " + size + b"65535\n" + (grey * 65535).round().astype(">u2").tobytes())
    (folder / "text.pgm").write_bytes(b"P2 " + size + b"100\n" + b" ".join(b"%.0f" % (100 * x) for x in grey.flatten()))


@pytest.mark.parametrize("with_pillow", [False, True])
def test_pages_become_the_canvases_they_show(tmp_path, drawn, with_pillow):
    """Of a larger scale and another shape than a canvas, in each form: what comes out is the canvas again, almost."""
    layout = data.layout(3, *drawn, size=96, max_digits=5)
    canvas = data.canvases(layout, drawn[0], 1, seeded(4))[0][0, :88]
    assert (canvas > 0).sum() > 200
    save_in_all_forms(tmp_path, canvas, 2, 0, with_pillow)
    for path in tmp_path.iterdir():
        picture, shrunk = sample.load_picture(path)
        assert picture.shape == (176, 192) and shrunk == 1 and 0 <= picture.min() <= picture.max() <= 1, path
        again = 255 * sample.resize(sample.ink_of(picture, 40), 88, 96)
        assert (again - canvas.float()).abs().mean() < 4 and again[canvas == 255].mean() > 200, path
        assert sample.height_of(picture) == pytest.approx(40, abs=6), path


@needs_mnist
def test_real_digits_on_pages_are_read(learnt, tmp_path):
    """Real handwriting on paper, twice as large and off the middle, of which a model is sure in MNIST's own frame."""
    model = ViT.load(learnt(1) / "ckpt.pt")
    images, labels = (tensor[:100] for tensor in data.load_mnist(os.environ["MNIST_DIR"], "test"))
    sure = model(data.to_input(images)).softmax(-1)[range(100), 0, 0, labels] > 0.9
    for with_pillow in (False, True):
        pages, right = tmp_path / f"{with_pillow}", 0
        pages.mkdir()
        for i, (digit, label) in enumerate(zip(images[sure][:20], labels[sure])):
            save_in_all_forms(pages, F.pad(digit, (15, 9, 6, 6)), 2, i, with_pillow)
            files = list(pages.iterdir())
            texts = [sample.read_picture(model, file)["text"] for file in files]
            right = right + torch.tensor([text == str(label.item()) for text in texts]).long()
        assert i == 19 and right.min() >= 19, {file.name: count for file, count in zip(files, right.tolist())}


def test_a_single_digit_is_normalised_as_mnist_is():
    """Its ink is 20 px high and its centre of mass is in the middle, wherever and however large it was."""
    for case in ((400, 300, 180, 0), (60, 90, 20, 0), (31, 40, 9, 0), (400, 300, 99, 100), (60, 90, 20, 30)):
        height, width, left, foot = case
        page = torch.full((height, width), 0.9)
        page[height // 4:-height // 4, left:left + width // 9] = 0.1
        page[-height // 4 - height // 12:-height // 4, left:left + foot] = 0.1     # of an L: its box has another middle
        frame, where = sample.as_mnist(page)
        edges = [height // 4, left, height - -(-height // 4), left + max(width // 9, foot)]
        assert all(abs(edge - true) <= max(1.5, height / 60) for edge, true in zip(where, edges)), (case, where)
        ink, box = frame.nonzero(), (frame > 100).nonzero()
        sides = box.amax(0) - box.amin(0) + 1
        middle = (ink * frame[frame > 0][:, None]).sum(0) / frame.sum()
        assert frame.shape == (28, 28) and frame.max() == 255 and 19 <= sides[0] <= 21, case
        assert 2 <= sides[1] <= (20 if foot else 12) and (middle - 13.5).abs().max() <= 0.75, case
        assert not foot or (middle - (box.amax(0) + box.amin(0)) / 2).abs().min() > 1, case
        page[3:5, 3:5] = 0.1                                                # a speck
        assert torch.equal(sample.as_mnist(page)[0], frame), case


def test_a_digit_cut_close_is_the_same_digit(drawn):
    """Dark on paper whose light falls off by half, and of which hardly any is left: as with paper all around."""
    def as_read(ink, margin, darkest):
        paper = 0.9 - 0.8 * F.pad(ink, [margin] * 4)
        return sample.as_mnist(paper * torch.linspace(1, darkest, paper.shape[1]))[0].float()
    for digit, scale in zip(drawn[0], [1] * 30 + [5] * 3):
        top, left, height, width = (int(edge) for edge in data.ink_box(digit[None]))
        ink = digit[top:top + height, left:left + width].repeat_interleave(scale, 0).repeat_interleave(scale, 1) / 255
        whole = as_read(ink, 20 * scale, 1)
        for margin in (0, 1, 2, 6):
            close = as_read(ink, margin * scale, 1 / 2)
            off = [(close.roll(step, (0, 1)) - whole).abs().mean() for step in itertools.product((-1, 0, 1), repeat=2)]
            assert min(off) < 25, (scale, margin)                           # another digit is 31 away


def page_of(digits, height, gap=0.5):
    """Ink, float (H, W), of drawn digits of a height, px, in a line on a page, and their boxes [left, top, w, h]."""
    page, left, boxes = torch.zeros(4 * height, round((2 + 1.3 * len(digits)) * height)), height, []
    for digit in digits:
        top, start, tall, wide = (int(edge) for edge in data.ink_box(digit[None]))
        ink = digit[top:top + tall, start:start + wide] / 255
        ink = sample.resize(ink, height, max(1, round(wide * height / tall)))
        page[height:2 * height, left:left + ink.shape[1]] = ink
        boxes.append([left, height, ink.shape[1], height])
        left += ink.shape[1] + round(gap * height)
    return page, boxes


def test_the_height_of_digits_on_a_page_is_found(drawn, tmp_path):
    """In any size, either polarity, in shadow, with a rule, squares or a box, with transparent
    margins."""
    cases = ("", "shadow", "rule", "box", "margins", "squares")
    for height, case in [*itertools.product((14, 40, 120), cases), (400, ""), (400, "rule")]:
        ink, _ = page_of(drawn[0][:3], height)
        thick, rows, columns = max(1, height // 20), *ink.shape
        if case == "squares":
            ink[::max(12, height // 2)] = ink[:, ::max(12, height // 2)] = 0.8
        if case in ("rule", "box"):
            ink[-height:-height + thick] = 1
        if case == "box":
            ink[height // 3:height // 3 + thick] = ink[height // 3:, 3:3 + thick] = ink[height // 3:, -3 - thick:-3] = 1
            ink[-height + thick:] = 0
        for light in (False, True):
            picture = 0.15 + 0.7 * ink if light else 0.85 - 0.7 * ink
            if case == "shadow":
                picture = picture * torch.linspace(1, 0.5, columns)
            if case == "margins":
                colour = torch.stack([picture] * 3 + [torch.ones_like(picture)], dim=2)
                np.save(tmp_path / "x.npy", F.pad(colour, (0, 0, *[height // 2] * 4)).numpy())      # transparent black
                picture, shrunk = sample.load_picture(tmp_path / "x.npy")
                assert shrunk == 1 and picture.shape == (rows + height // 2 * 2, columns + height // 2 * 2)
                margin = picture[:height // 2]
                assert (margin - (0.15 if light else 0.85)).abs().max() < 0.01, (height, light)        # as the paper is
            found = sample.height_of(picture)
            assert found == pytest.approx(height, rel=0.15), (height, case, light)
    strip = torch.full((60, 400), 0.9)
    strip[5:55, 50:54] = strip[5:55, 150:154] = strip[5:55, 300:304] = 0.1      # 1s as long as rules
    assert sample.height_of(strip) == 50


def test_rules_go_and_the_strokes_across_them_stay():
    ink = torch.zeros(120, 200)
    ink[90:92] = ink[10:12, 20:180] = ink[10:92, 20:22] = ink[10:92, 178:180] = 1           # a rule; with it, a box
    ink[60, 5:100] = ink[61, 100:195] = 1                                                   # a rule that slopes
    stroke = torch.zeros_like(ink)
    stroke[70:112, 60:64] = stroke[40:68, 120:124] = stroke[30:34, 60:80] = 1               # two cross, one is short
    left = sample.without_rules(torch.maximum(ink, stroke), 60, 60)
    assert torch.equal(left * stroke, stroke)
    box, _ = sample.boxes(sample.pieces(left * (1 - stroke) > 0))           # where lines cross, a speck may stay
    assert (box[:, 2:] - box[:, :2]).max() <= 2 and left.sum() - stroke.sum() <= 20


def test_lines_of_text():
    """Sloping, told apart, with blanks where gaps are wide and "?" where the model is unsure."""
    digits = [{"digit": digit, "confidence": share, "box": [left, top + left // 4, 12, 20]}
              for digit, left, top, share in ((5, 20, 35, 0.9), (3, 60, 10, 0.3), (1, 0, 10, 0.9), (4, 0, 35, 0.5),
                                              (2, 20, 10, 0.9))]
    for least, text in ((0, "12 3\n45"), (0.4, "12 ?\n45"), (0.6, "12 ?\n?5"), (1, "?? ?\n??")):
        lines = sample.lines_of(digits, 20)
        assert "\n".join(sample.text_of(line, 20, least) for line in lines) == text
    assert [[digit["digit"] for digit in line] for line in lines] == [[1, 2, 3], [4, 5]]


def test_pictures_as_json(finished, tmp_path, drawn, monkeypatch, capsys):
    """One object a picture, in px of the file, also of one that is shrunk. Signs are left out. A blank page says so."""
    out = shutil.copytree(finished(3), tmp_path / "out")

    def sevens(model, canvases):            # in the middle of every canvas
        share = torch.full((len(canvases), canvases.shape[1] // 8, canvases.shape[2] // 8, 11), -20.0)
        share[..., 10] = 0
        share[:, share.shape[1] // 2, share.shape[2] // 2, 7] = 20
        return share

    monkeypatch.setattr(sample, "logits_of", sevens)
    files, truth = [tmp_path / f"{name}.npy" for name in ("small", "large", "blank")], []
    for file, height in zip(files, (40, 560)):
        ink, boxes = page_of(drawn[0][:4], height)
        left, top = boxes[0][0] + boxes[0][2], 3 * height // 2              # a minus sign, and a decimal point
        ink[top:top + height // 8, left + height // 6:left + height // 3] = 1
        left = boxes[1][0] + boxes[1][2]
        ink[2 * height - height // 8:2 * height, left + height // 6:left + height // 4] = 1
        np.save(file, (230 - 200 * ink).byte().numpy())
        truth.append((height, boxes))
    np.save(files[2], np.full((60, 90), 230, dtype=np.uint8))
    arguments = [f"--out_dir={out}", "--image", *map(str, files)]
    monkeypatch.setattr(sample, "WORKING", 1_000_000)
    capsys.readouterr()
    sample.main([*arguments, "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["file"] for record in records] == list(map(str, files)) and not (out / "image.png").exists()
    assert records[2] == {"file": str(files[2]), "text": "", "digit_height": None, "digits": []}
    for record, (height, boxes) in zip(records, truth):
        assert record.keys() == records[2].keys() and record["text"] == "7777"
        assert record["digit_height"] == pytest.approx(height, rel=0.15)
        assert [digit.keys() for digit in record["digits"]] == [{"digit", "confidence", "box"}] * 4
        for digit, box in zip(record["digits"], boxes):
            assert digit["digit"] == 7 and digit["confidence"] == 1
            assert digit["box"] == pytest.approx(box, abs=0.1 * height), height
    _, model = train.load_checkpoint(out / "ckpt.pt")
    assert [sample.read_picture(model, file) for file in files] == records
    sample.main(arguments)
    printed = capsys.readouterr().out
    assert f"{files[2]}\n  nothing: there is no ink in it\n" in printed and printed.count("\n  7777\n") == 2
    assert "--json is for pictures" in refusal(sample.main, [f"--out_dir={out}", "--json"], capsys)[1]


def test_pictures_become_canvases_or_are_refused(tmp_path):
    for sides, shape in (((33, 50), (40, 40)), ((20, 20), (40, 40)), ((20, 90), (40, 104)), ((90, 20), (72, 40))):
        piece = sample.Piece(0, 0, torch.rand(sides))                                   # filled up to whole cells
        canvas, scale, corner = sample.canvas_of(piece, 20, 8, 40, 1)
        assert canvas.shape == shape and canvas.dtype == torch.uint8 and (canvas[canvas > 0] >= sample.FAINT).all()
        assert all(abs(2 * start + side * scale - whole) <= 2 for start, side, whole in zip(corner, sides, shape))
    four, blank = torch.full((30, 60), 0.9), torch.full((70, 60), 0.9)
    four[4:11, 10:14] = four[4:11, 40:44] = four[18:26, 12:16] = four[20:28, 50:55] = 0.2
    grid = ViT(ViTConfig(image_size=56, patch_size=4, cell=28, num_classes=10, dim=16, depth=1))
    _, digits, ((canvas, _),), _ = sample.digits_in_grid(grid, four)
    assert canvas.shape == (56, 56) and [[round(edge) for edge in box] for _, _, box in digits] == [
        [4, 10, 11, 14], [4, 40, 11, 44], [18, 12, 26, 16], [20, 50, 28, 55]]
    assert sample.ink_of(blank, 20).max() == 0                                      # paper is no ink
    assert sample.find_digits(None, blank) == (None, [], [], "there is no ink in it")
    assert "no ink was found" in value_error_of(sample.digits_in_grid, grid, blank)     # here every cell needs a digit
    assert "too small for a grid of 2 x 2" in value_error_of(sample.digits_in_grid, grid, blank[:1])
    model, blank = ViT(ViTConfig(image_size=64, patch_size=8, cell=8)), torch.zeros(1, 1024, 1032, dtype=torch.uint8)
    assert "up to 4,096 patches" in value_error_of(sample.attention_rollout, model, blank[0, :520, :520])
    assert "1032 x 1024 px has 16,512 patches, at most 16,384" in value_error_of(sample.logits_of, model, blank)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (90000, 90000)}\n"
    tracemalloc.start()             # which sees NumPy's memory, where files are unpacked, and not torch's
    for name, content, words in (
            ("a.npy", b"", "cannot be read"), ("a.npy", b"nonsense", "cannot be read"),
            ("a.npy", b"\x93NUMPY\1\0%c\0" % len(header) + header, "cannot be read"), ("a.npy", [{}], "cannot be read"),
            ("a.npy", np.zeros((0, 5)), "1 to 64,000,000"), ("a.npy", np.zeros((4, 4, 5)), "3 or 4 channels"),
            ("a.npy", [[np.nan] * 4] * 4, "not finite"), ("a.npy", [["x"]], "expected numbers"),
            ("a.npy", [0.0] * 3, "expected numbers"), ("a.pgm", b"", "does not begin like a PGM file"),
            ("a.pgm", b"P5 4 4 255\n123", "cannot be read"), ("a.pgm", b"P2 2 2 255\n1 2 x 4", "cannot be read"),
            ("a.pgm", b"P5 99999 99999 255\n", "99,999 x 99,999 px"), ("a.png", b"nonsense", "cannot be read"),
            ("a.heic", b"nonsense", "cannot be read")):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content)
        error = value_error_of(sample.read_picture, grid, tmp_path / name)
        assert words in error, (name, content[:200], error)
    (tmp_path / "a.pgm").write_bytes(b"P5 3000 3000 255\n" + bytes(9_000_000))
    for digit_height, side in ((None, 1500), (39, 3000), (40, 1500)):
        picture, shrunk = sample.load_picture(tmp_path / "a.pgm", digit_height)
        assert picture.shape == (side, side) and shrunk == 3000 / side
    assert tracemalloc.get_traced_memory()[1] < 400_000_000
    tracemalloc.stop()
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    image.new("1", (20_000, 10_000)).save(tmp_path / "x.png")
    assert "20,000 x 10,000 px, allowed are 1 to 64,000,000" in value_error_of(sample.load_picture, tmp_path / "x.png")


def test_a_damaged_or_strangers_checkpoint_is_refused_in_one_line(finished, tmp_path, capsys):
    path, content = tmp_path / "ckpt.pt", (finished(3) / "ckpt.pt").read_bytes()
    for damaged in (b"", b"nonsense", content[:-1000], content[:5000] + bytes(200) + content[5200:]):
        path.write_bytes(damaged)
        assert_refuses(sample.main, [f"--out_dir={tmp_path}"], "is not a checkpoint of train.py", 1, capsys)
    for change, words in (
            (dict(canvas=None), "is damaged: canvas cannot"), (dict(phase=[3]), "is damaged: phase cannot"),
            (dict(mean=None), "is damaged: mean cannot"), (dict(average=torch.zeros(3)), "is damaged: average cannot"),
            (dict(step=-1), "is damaged: step cannot"), (dict(settings={"lr": "high"}), "is damaged: lr cannot"),
            (dict(data="mine"), "does not fit"), (dict(average={"head.bias": torch.zeros(3)}), "is not a checkpoint"),
            (dict(canvas={"size": 10**9}), "does not fit"), (dict(canvas={"classes": 10**12}), "does not fit"),
            (dict(canvas={"wings": 2}), "does not fit"), (dict(canvas={"max_digits": "many"}), "max_digits must be"),
            (dict(canvas={"max_digits": nested(40)}), "max_digits must be"),
            (dict(canvas={"classes": nested(40)}), "does not fit"),
            (dict(canvas={"max_digits": 10**9}), "max_digits must be")):
        checkpoint = checkpoint_of(finished(3))
        for key, value in change.items():
            checkpoint[key] = {**checkpoint[key], **value} if isinstance(value, dict) else value
        torch.save(checkpoint, path)
        assert_refuses(sample.main, [f"--out_dir={tmp_path}"], words, 1, capsys)


@pytest.mark.parametrize("phase", data.PHASES)
def test_sample_shows_mistakes_and_attention(digits_folder, finished, tmp_path, phase, monkeypatch, capsys):
    out = shutil.copytree(finished(phase), tmp_path / "out")
    flags = [f"--out_dir={out}", "--test_canvases=100", "--count=3"]
    sample.main([*flags, "--mistakes", "--attention"])
    text = capsys.readouterr().out
    blocks = text.split("\ntest canvas ")[1:]
    assert len(blocks) == 3 and all("<-- wrong" in block for block in blocks)
    assert "recall" in text and "\033" not in text
    assert max(map(len, text.split("Cells")[1].splitlines()[1:-3])) <= 80
    assert pixels_of(out / "sample.png").shape[1] > 700
    assert (out / "attention.png").exists() != ("no attention.png: no digit was read" in text)

    images, labels = data.load_mnist(digits_folder, "test")
    canvases, truth = data.test_canvases(data.layout(phase, images, labels), images, labels, 100)
    logits, empty = ViT.load(out / "ckpt.pt")(data.to_input(canvases)), 10 if phase == 3 else None
    odds, best = logits.softmax(-1), data.decode(logits, empty, data.layout(phase, images, labels).apart)
    losses = -odds.gather(-1, truth[..., None]).log().sum((1, 2, 3))
    wrong = (best != truth).any(2).any(1).nonzero()[:, 0].tolist()
    assert [int(block.split()[0]) for block in blocks] == sorted(wrong, key=lambda i: -losses[i])[:3]   # worst first
    np.save(tmp_path / "own.npy", data.drawn_digits(1, 0)[0][0].numpy())
    sample.main([*flags, f"--image={tmp_path / 'own.npy'}", "--attention"])
    text = capsys.readouterr().out
    assert "own.npy" in text and (out / "image.png").exists()
    assert not any(word in text for word in ("recall", "read as", "wrong"))  # nobody knows what is there
    (out / "sample.png").unlink()
    monkeypatch.setattr(sample, "logits_of", lambda model, canvases: 20.0 * F.one_hot(truth))
    sample.main([*flags, "--mistakes"])
    text = capsys.readouterr().out
    assert "reading 100 test canvases" in text and "100.00%" in text
    assert text.endswith("no sample.png: nothing is read wrong\n") and not (out / "sample.png").exists()


def test_sample_reads_larger_canvases(finished, tmp_path, capsys):
    out = shutil.copytree(finished(3), tmp_path / "out")
    sample.main([f"--out_dir={out}", "--canvas_size=96", "--max_digits=9", "--min_distance=24", "--test_canvases=100"])
    text = capsys.readouterr().out
    assert "reading 100 test canvases of 96 x 96 px (custom digits)\n" in text
    assert "\n                 9 " in text and "\n│" + " " * 96 in text and text.count("\ntest canvas ") == 4


def test_curves(flags, finished, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    out, other = shutil.copytree(finished(3), tmp_path / "run"), tmp_path / "out"
    train.main([*flags, "--phase=3", "--max_steps=12", "--max_digits=1", "--test_canvases=1"])
    assert metrics(other)[-1]["digit_accuracy"] is None                     # the only test canvas is an empty one
    sample.main(["--curves", "--out_dir", str(out), str(other)])
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not (other / "curves.png").exists()
    (out / "metrics.jsonl").write_text('{"event": "train"}\n')
    assert_refuses(sample.main, ["--curves", f"--out_dir={out}"], "is not a metrics file of train.py", 1, capsys)


# ---------------------------------------------------------------------------------------------------------------------
# The page


IN_NODE = """
const {model: described, ink, size, empty} = JOB, model = new ViT(described);
const canvases = ink.map(text => ({ink: numbers(text, "uint8"), height: size, width: size}));
console.log(JSON.stringify(canvases.map(canvas => [[...model.forward(canvas)], read(model, canvas, empty),
  [...model.rollout(canvas, 0)]])));
"""


@torch.no_grad()
@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_page_computes_what_torch_does():
    """Every kind of model, at its own size and at larger ones: logits, readings and rollout, in both dtypes."""
    cells = dict(image_size=32, patch_size=8, cell=8, num_classes=11, dim=16, heads=2)
    for fields, sizes in ((cells, (24, 32, 64)), (cells | dict(positions="rotary", window=1, overlap=2), (32, 48)),
                          (cells | dict(patch_size=4, window=2, num_classes=27, mlp_ratio=1.3), (32, 40)),
                          (dict(image_size=28, patch_size=14, cell=28, dim=20, heads=1, overlap=3), (28, 56)),
                          (dict(image_size=28, patch_size=7, class_token=True, dim=16, window=1), (28,)),
                          (dict(image_size=20, patch_size=5, positions="rotary", dim=16), (20,))):
        model = shaken(**fields)
        empty = {11: 10, 27: 26}.get(model.config.num_classes)
        for size, (dtype, limit) in itertools.product(sizes, (("float16", 2e-2), ("float32", 1e-4))):
            canvases = torch.randint(0, 256, (3, size, size), generator=seeded(), dtype=torch.uint8)
            canvases[canvases < 128] = 0
            job = {"model": sample.model_facts(model, dtype), "ink": list(map(sample.encode, canvases)), "size": size,
                   "empty": empty}
            script = re.search("<script>(.*?)</script>", sample.PAGE, re.DOTALL)[1] + IN_NODE
            ran = subprocess.run(["node", "-"], input=script.replace("JOB", json.dumps(job)), capture_output=True,
                                 text=True, timeout=60)
            assert ran.returncode == 0, ran.stderr
            logits, grid = model(data.to_input(canvases)), size // (model.config.cell or size)
            own = logits.view(3, grid, grid, -1)
            for i, (found, reading, rollout) in enumerate(json.loads(ran.stdout)):
                found = torch.tensor(found).view_as(own[i])
                assert (found - own[i]).abs().max() < limit, (fields, size, dtype)
                expected = data.read(found[None], empty)[0]
                assert [(each["digit"], each["row"], each["column"]) for each in reading] == [
                    each[:3] for each in expected], (fields, size)
                assert np.allclose([each["confidence"] for each in reading], [each[3] for each in expected], atol=1e-5)
                if model.config.cell:
                    expected = sample.attention_rollout(model, canvases[i])[0, 0].flatten()
                    assert (torch.tensor(rollout) - expected).abs().max() < 2e-2, (fields, size)


@contextlib.contextmanager
def opened(path, **options):
    """A page in a browser, and the list of what it complains of and asks the network for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(**options)
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: complaints.append(request.url)
                if request.url != path.as_uri() and not request.url.startswith("data:") else None)
        page.goto(path.as_uri())
        yield page, complaints


def settled(page, when="!waiting"):
    for _ in range(500):
        page.wait_for_timeout(20)
        if page.evaluate(when):
            return page.evaluate("digits")
    raise AssertionError("the page is still reading")


def draw_with_the_mouse(page, digit, left, top, height):
    """The strokes of one of the program's own digits, in shares of the pad."""
    weights, controls = data.stroke_weights()
    points = (weights[digit] @ controls[digit]) * height + torch.tensor([left, top])
    pad, steps = page.locator("#ink").bounding_box(), points.diff(dim=0).norm(dim=1)
    jumps = (steps > 6 * steps.median()).nonzero()[:, 0] + 1
    for stroke in points.tensor_split(jumps):
        places = (stroke * pad["width"] + torch.tensor([pad["x"], pad["y"]])).tolist()
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:-1:3] + places[-1:]:                          # a browser takes a frame for each
            page.mouse.move(*place)
        page.mouse.up()


@pytest.mark.parametrize("phase", data.PHASES)
def test_the_page_in_a_browser(finished, tmp_path, phase, capsys):
    """From a folder whose name is markup: it is shown as text. The pad is drawn on, read, emptied and filled."""
    name = "<img src=x onerror=alert(1)>"
    out = shutil.copytree(finished(phase), tmp_path / name)
    sample.main(["--page", f"--out_dir={out}", "--test_canvases=100"])
    assert f"wrote {out / 'page.html'} (" in capsys.readouterr().out
    paper = np.full((40, 60, 3), 255, np.uint8)
    paper[8:30, 20:23] = paper[27:30, 20:35] = 0
    sample.save_png(tmp_path / "drawn.png", paper)
    with opened(out / "page.html", viewport={"width": 360, "height": 800}, has_touch=True) as (page, complaints):
        assert page.evaluate("check()") < 2e-2 and page.locator("#run dd").first.inner_text() == name
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.evaluate("model.weights['head.bias'][3] = 50")                 # a model that reads nothing but threes
        draw_with_the_mouse(page, 7, 0.1, 0.1, 0.3)
        found = settled(page)
        assert {each["digit"] for each in found} == {3} and all(each["canvas"]["ink"] for each in found)
        assert "3" in page.locator("#text").inner_text() and page.locator(".frame.wrong, .frame").count() >= len(found)
        page.locator("#digits button").first.focus()
        assert "looked to read this 3" in page.locator("#told").inner_text()
        page.keyboard.press("Delete")
        assert settled(page) == [] and page.locator("#hint").is_visible()
        page.locator("#canvases button").last.click()                       # a test canvas comes px by px
        number = len(page.locator("#canvases button").all()) - 1
        ink = page.evaluate(f"Array.from(numbers(facts.canvases[{number}].ink, 'uint8'))")
        assert settled(page)[0]["canvas"]["ink"] == ink
        page.locator("#file").set_input_files(tmp_path / "drawn.png")
        settled(page, "!pad.whole && !waiting && digits.length > 0")        # black strokes on white, as drawn elsewhere
        assert page.locator("#frames .frame").count() == len(page.evaluate("digits"))
        page.locator("#clear").click()
        pad = page.locator("#pad").bounding_box()
        page.touchscreen.tap(pad["x"] + 50, pad["y"] + 50)                  # a finger's dot, and it is taken back
        assert page.evaluate("pad.strokes.length") == 1
        page.locator("#undo").click()
        assert settled(page) == [] and page.locator("#hint").is_visible()
        draw_with_the_mouse(page, 7, 0.3, 0.3, 0.4)
        settled(page)
        page.mouse.move(0, 0)
        page.touchscreen.tap(pad["x"] + pad["width"] / 2, pad["y"] + pad["height"] / 2)
        assert "looked to read this 3" in page.locator("#told").inner_text() and complaints == []


@needs_mnist
def test_drawings_on_the_page_are_read(learnt):
    sample.main([f"--out_dir={learnt(3)}", "--page", "--test_canvases=200"])
    with opened(learnt(3) / "page.html") as (page, complaints):
        right = 0
        for digit, height in itertools.product((0, 1, 2, 3, 5, 7), (0.2, 0.6)):
            page.keyboard.press("Delete")
            draw_with_the_mouse(page, digit, 0.15, 0.15, height)
            right += [each["digit"] for each in settled(page)] == [digit]
        assert right >= 10 and complaints == []


def test_the_page_refuses_what_it_would_compute_wrongly(finished, tmp_path, capsys):
    model = shaken(image_size=8, patch_size=4, dim=16)
    for change, words in ((lambda: setattr(model, "scale", torch.nn.Parameter(torch.ones(1))), "this model: scale"),
                          (lambda: model.head.weight.data.fill_(1e9), "too large for float16")):
        copied = copy.deepcopy(model)
        change()
        assert words in value_error_of(sample.model_facts, model, "float16")
        model = copied
    settings = checkpoint_of(finished(3))
    command = sample.command_of(settings)
    assert command.startswith("python train.py --phase=3 --data=custom --test_canvases=100 --max_steps=12 ")
    again = train.asdict(train.settle(train.parse(shlex.split(command)[2:]), {}))
    other = {name for name, value in settings["settings"].items() if again[name] != value}
    assert other <= {"data", "data_dir", "out_dir", "device", "log_every", "save_every"}
    cells = shaken(image_size=8, patch_size=4, cell=4, dim=16, class_token=True)
    assert "a class token with cells" in value_error_of(sample.model_facts, cells, "float16")
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1, "seconds": 1, "loss": NaN, "lr": 1}\n')
    assert sample.points_of(tmp_path / "metrics.jsonl")["train loss"] == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert not any(sample.points_of(tmp_path / "metrics.jsonl").values())       # nothing was logged yet
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": {}, "seconds": 1, "loss": 1, "lr": 1}\n')
    assert "is not a metrics file" in value_error_of(sample.points_of, tmp_path / "metrics.jsonl")
