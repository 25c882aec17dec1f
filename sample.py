"""Look at what a trained model sees and reads: test canvases drawn in the terminal, the reading beside the truth.

    python sample.py --phase=3                  # the first canvases of the test set, read by out/phase3/ckpt.pt
    python sample.py --phase=3 --start=100 --count=10
"""
import argparse
import os
import sys
from pathlib import Path

import torch

import data
from vit import ViT


def parse(arguments):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, default=3, help="whose checkpoint to take, out/phase<phase> (default: 3)")
    parser.add_argument("--out_dir", help="the folder of ckpt.pt, in place of out/phase<phase>")
    parser.add_argument("--data_dir", default="data/mnist", help="folder of the MNIST files (default: data/mnist)")
    parser.add_argument("--start", type=int, default=0, help="the first test canvas to show (default: 0)")
    parser.add_argument("--count", type=int, default=4, help="how many to show (default: 4)")
    return parser.parse_args(arguments)


def load(path):
    """The model of a checkpoint, and what the checkpoint says of its phase, canvases and digits."""
    if not path.exists():
        raise OSError(f"there is no checkpoint {path}: train one with train.py")
    model = ViT.load(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not {"phase", "canvas", "data"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py: it does not say what it was trained on")
    return model, checkpoint["phase"], checkpoint["canvas"], checkpoint["data"]


def draw(canvas, colour):
    """A canvas, uint8 (H, W), as lines of text in a frame: two pixels a character, the upper in front of the lower."""
    lines = ["┌" + "─" * canvas.shape[1] + "┐"]
    for upper, lower in zip(canvas[0::2].tolist(), canvas[1::2].tolist()):
        if colour:
            ink = "".join(f"\033[38;2;{u};{u};{u}m\033[48;2;{v};{v};{v}m▀" for u, v in zip(upper, lower)) + "\033[0m"
        else:
            ink = "".join(" ▄▀█"[2 * (u > 100) + (v > 100)] for u, v in zip(upper, lower))
        lines.append(f"│{ink}│")
    return lines + ["└" + "─" * canvas.shape[1] + "┘"]


def compare(reading, truth, empty):
    """A line for each cell that holds a digit or is read as holding one: place, truth, reading, confidence."""
    read = {(row, column): (digit, confidence) for digit, row, column, confidence in reading}
    there = {(row, column): digit for row, line in enumerate(truth.tolist()) for column, digit in enumerate(line)
             if digit != empty}
    lines = []
    for place in sorted(read.keys() | there.keys()):
        digit, confidence = read.get(place, (None, None))
        mark = "" if digit == there.get(place) else "   <-- wrong"
        lines.append(f"  row {place[0]} column {place[1]}: {there.get(place, 'nothing')}, read as "
                     + ("nothing" if digit is None else f"{digit} ({100 * confidence:.1f}%)") + mark)
    return lines or ["  nothing there, nothing read"]


def main(arguments=None):
    flags = parse(arguments)
    try:
        model, phase, options, kind = load(Path(flags.out_dir or f"out/phase{flags.phase}") / "ckpt.pt")
        canvases, cells = data.test_canvases(phase, *data.load_digits(kind, flags.data_dir, "test")[:2], **options)
        if flags.count < 1 or not 0 <= flags.start < len(canvases):
            raise ValueError(f"--start must be from 0 to {len(canvases) - 1} and --count above 0")
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        raise SystemExit(1)
    empty = options["classes"] if data.has_empty_cells(phase) else None
    shown = slice(flags.start, flags.start + flags.count)
    with torch.no_grad():
        readings = data.read(model(data.to_input(canvases[shown])), empty)
    sys.stdout.reconfigure(errors="replace")  # a terminal without half blocks gets question marks, not a traceback
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, (canvas, truth, reading) in enumerate(zip(canvases[shown], cells[shown], readings), flags.start):
        print(f"\ntest canvas {number}" + (f" ({kind} digits)" if kind != "mnist" else ""))
        print(*draw(canvas, colour), *compare(reading, truth, empty), sep="\n")


if __name__ == "__main__":
    main()
