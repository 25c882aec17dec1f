"""Train a ViT to read handwritten digits: one (phase 1), four in a grid (phase 2), any number anywhere (phase 3).

    python train.py --phase=3                       # MNIST from --data_dir, downloaded if it is not there
    python train.py --phase=1 --max_steps=1000      # every setting is a flag: python train.py --help
    python train.py --phase=3 --resume              # continue a run that was stopped
    python train.py --phase=3 --eval_only           # evaluate the checkpoint of a run
    python train.py --smoke                         # is the device all right? exit code 0 if so
    torchrun --standalone --nproc_per_node=8 train.py --phase=3      # 8 GPUs of one machine share each batch

From Python: figures, model = train.run(phase=1, max_steps=100).

A run leaves ckpt.pt (see CHECKPOINT) and metrics.jsonl (one JSON object a line) in --out_dir. Every random number of a
step is a function of (seed, step, purpose), and for dropout of the process as well. Which digits are drawn depends on
their losses so far too, and the checkpoint keeps those. So logging and evaluation do not affect training, and a resumed
run ends like one that was never interrupted.
"""
import argparse
import contextlib
import copy
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import reprlib
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, get_args

if __name__ == "__main__":      # Ctrl-C while torch is imported
    sys.excepthook = lambda kind, *rest: print("train.py: stopped", file=sys.stderr) \
        if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from vit import ViT, ViTConfig, read_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Settings: each field is a flag with its default, help, limits and choices. DEFAULTS has the defaults by phase.

def setting(default, help, low=None, high=None, choices=None):
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def phase_summary(phase):
    row = data.PHASES[phase]
    digits = "a digit in every cell" if row.max_digits is None else f"0 to {row.max_digits} digits anywhere"
    return f"{phase}: {digits}, {row.size} x {row.size} px"


@dataclass
class Settings:
    # The task, its data and its files
    phase: int = setting(3, "; ".join(map(phase_summary, data.PHASES)), choices=tuple(data.PHASES))
    data_dir: str = setting("data/mnist", "folder of the four IDX files")
    data: str = setting("auto", "mnist, custom (another data set), drawn (by the program), or auto: whichever there is",
                        choices=("auto", *data.KINDS))
    out_dir: str | None = setting(None, "folder for ckpt.pt and metrics.jsonl (default: out/phase<phase>)")
    resume: bool = setting(False, "continue from the checkpoint in out_dir, if there is one")
    eval_only: bool = setting(False, "evaluate the checkpoint in out_dir and stop")
    smoke: bool = setting(False, "check the device in a few seconds, without files or network, and stop")
    val_digits: int = setting(0, "training digits to hold back and evaluate on, in place of the test set", 0, 1e12)
    test_canvases: int | None = setting(None, "canvases to evaluate on (default: 10,000, or each test digit once where "
                                        "a canvas is one digit)", 1, 1e6)
    device: str = setting("auto", "cuda, mps, xpu, cpu, or auto: the accelerator if there is one")
    dtype: str = setting("auto", "float32, bfloat16 (autocast), or auto: bfloat16 where the hardware has it",
                         choices=("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "torch.compile the model, which takes up to a minute before training")
    seed: int = setting(0, "seed of every random draw", 0, 1e18)
    # The schedule
    epochs: float | None = setting(None, "length in epochs of 60,000 canvases, in place of max_steps", 1e-9, 1e9)
    max_steps: int | None = setting(None, "length in steps", 1, 1e12)
    batch_size: int | None = setting(None, "canvases per step", 1, 65_536)
    log_every: int = setting(10, "steps between lines of metrics", 1, 1e12)
    eval_every: int | None = setting(None, "steps between evaluations; 0: only at the end", 0, 1e12)
    save_every: float = setting(30.0, "seconds between checkpoints", 0, 1e12)
    wandb: bool = setting(False, "log to Weights & Biases too (needs the package wandb)")
    # AdamW
    lr: float | None = setting(None, "peak learning rate", 0, 1e12)
    warmup: float = setting(0.1, "share of the steps that the learning rate warms up for; then it falls to 0", 0, 1)
    weight_decay: float = setting(0.05, "decoupled weight decay, on matrices only", 0, 1e12)
    beta1: float = setting(0.9, "decay of the gradients' moving average", 0, 0.999999)
    beta2: float = setting(0.99, "decay of the squared gradients' moving average", 0, 0.999999)
    grad_clip: float = setting(1.0, "maximum norm of the gradient; 0: no limit", 0, 1e12)
    average: float = setting(0.995, "decay of the weights' moving average, which is what is evaluated", 0, 1)
    # The model: these are fields of ViTConfig, which checks them
    patch_size: int | None = setting(None, "side of a patch, px")
    overlap: int | None = setting(None, "px that the patch embedding sees beyond its patch, on each side")
    dim: int | None = setting(None, "width of a token")
    depth: int | None = setting(None, "number of blocks")
    heads: int | None = setting(None, "attention heads per block")
    mlp_ratio: float | None = setting(None, "hidden width of the MLP, in units of dim")
    positions: str | None = setting(None, "position embedding: learned or rotary")
    window: int | None = setting(None, "patches that attention reaches on each side; 0: all of the canvas")
    dropout: float = setting(0.0, "share of activations dropped in training")
    drop_path: float = setting(0.0, "drop path rate of the last block; it rises linearly from 0 at the first")
    # Canvases; max_digits to borders are for phases whose cells may be empty
    canvas_size: int | None = setting(None, "side of the canvas, px")
    max_digits: int | None = setting(None, "maximum number of digits on a canvas")
    min_distance: int | None = setting(None, "minimum distance of digits' centres, px (default: no ink overlaps)")
    train_digits: int | None = setting(None, "maximum number of digits on a training canvas: at least max_digits, "
                                       "capped by what fits", 0, 1e6)
    crowded: float | None = setting(None, "share of training canvases with the maximum number of digits", 0, 1)
    borders: float | None = setting(None, "share of training digits moved next to a cell's border", 0, 1)
    hard: float = setting(0.7, "share of training digits drawn in proportion to root loss; the rest uniformly", 0, 0.95)
    # Augmentation of training digits
    rotate: float | None = setting(None, "maximum rotation, degrees", 0, 180)
    scale: float | None = setting(None, "maximum change of scale, as a share", 0, 0.9)
    shear: float | None = setting(None, "maximum shear, as a share", 0, 2)
    shift: float | None = setting(None, "maximum shift within the frame, px", 0, 14)
    elastic: float | None = setting(None, "maximum elastic displacement, px", 0, 14)
    elastic_points: int = setting(3, "control points of the elastic displacement per side: fewer are smoother", 2, 28)


# What a phase trains with by default. Together with data.PHASES this is all that the program knows about phases; the
# README says what each choice is worth. Where digits are on a grid, large patches make steps cheap, so that more digits
# are seen per second. Where a digit may be anywhere, half a px decides which cell it is in. There, in a short run,
# overlapping patches make results worse, and so does augmentation.
DEFAULTS = {
    1: dict(max_steps=5_600, batch_size=256, eval_every=3_000, lr=7e-3,
            patch_size=14, overlap=0, dim=64, depth=4, heads=1, mlp_ratio=4.0, positions="learned", window=0,
            rotate=15.0, scale=0.15, shear=0.15, shift=1.0, elastic=1.5),
    2: dict(max_steps=8_400, batch_size=128, eval_every=3_000, lr=4e-3,
            patch_size=14, overlap=3, dim=64, depth=4, heads=2, mlp_ratio=2.0, positions="learned", window=1,
            rotate=15.0, scale=0.15, shear=0.15, shift=1.0, elastic=1.5),
    3: dict(max_steps=4_000, batch_size=32, eval_every=2_000, lr=8e-3, train_digits=9, crowded=0.5, borders=0.5,
            patch_size=8, overlap=0, dim=96, depth=4, heads=4, mlp_ratio=2.0, positions="rotary", window=3,
            rotate=0.0, scale=0.0, shear=0.0, shift=0.0, elastic=0.0),
}
FLAGS = {flag.name: flag for flag in fields(Settings)}
NOT_OF_THE_RUN = ("resume", "eval_only", "smoke", "device", "out_dir", "wandb", "data", "epochs")


def types_of(flag):
    """The types that a setting may have: (int,), (int, NoneType), ..."""
    return get_args(flag.type) or (flag.type,)


def parse(arguments):
    """The settings that a command line gives, a dict. Ends the program with one line where it makes no sense."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)", 2)
    for name, flag in FLAGS.items():
        text, kind = flag.metadata["help"], types_of(flag)[0]
        if by_phase := [f"{phase}: {row[name]}" for phase, row in DEFAULTS.items() if name in row]:
            text += f" (default by phase: {', '.join(by_phase)})"
        elif flag.default is not None:
            text += f" (default: {flag.default})"
        options = dict(type=truth, nargs="?", const=True, metavar="BOOL") if kind is bool else \
            dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), FLAGS, 1)
        fail(f"unknown argument {unknown[0]}" + (f", did you mean --{close[0]}?" if close else " (see --help)"), 2)
    return vars(given)


def truth(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def fail(message, code):
    """End the program with one clear line."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def make_stdout_robust():
    """Nothing to print to is no reason to fail, and characters that the terminal lacks become question marks."""
    if sys.stdout is None:              # closed
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def say(text="", end="\n"):
    """Print. Where stdout is full or its reader is gone, go on without a voice."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        silence = open(os.devnull, "w")
        if sys.stdout is sys.__stdout__:        # what it still holds would fail again at the program's end
            os.dup2(silence.fileno(), sys.stdout.fileno())
        sys.stdout = silence


def one_line(error):
    """What an exception says, in one line of bounded length."""
    return " ".join(str(error).split())[:200]


def settle(given, saved):
    """The settings of a run: defaults, overridden by those of its phase, those saved in its checkpoint and those given
    (dicts). Raises ValueError for a wrong value; ViTConfig and data.Layout check what depends on several settings."""
    if unknown := given.keys() - FLAGS:
        raise ValueError(f"unknown setting {', '.join(sorted(unknown))}")
    if "epochs" in given and "max_steps" in given:
        raise ValueError("give --epochs or --max_steps, not both")
    phase = given.get("phase", Settings.phase)
    saved = {name: value for name, value in saved.items()
             if name not in ("device", "out_dir", "wandb")}         # the checkpoint may be on another machine by now
    by_phase = DEFAULTS.get(phase, {}) if type(phase) is int else {}
    settings = Settings(**{**by_phase, **saved, **given})
    for name, flag in FLAGS.items():
        value, types = getattr(settings, name), types_of(flag)
        low, high, choices = (flag.metadata[key] for key in ("low", "high", "choices"))
        if type(value) not in types and not (float in types and type(value) is int):
            raise ValueError(f"--{name} must be of type {types[0].__name__}, not {reprlib.repr(value)}")
        if choices and value not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(map(str, choices))}, not {reprlib.repr(value)}")
        if None not in (value, low) and not low <= value <= high:
            raise ValueError(f"--{name} must be from {low:g} to {high:g}, not {value}")
    settings.out_dir = settings.out_dir or f"out/phase{phase}"
    if "epochs" in given:
        settings.max_steps = math.ceil(settings.epochs * 60_000 / settings.batch_size)
    return settings


def model_config(settings, layout):
    same_names = FLAGS.keys() & {each.name for each in fields(ViTConfig)}
    return ViTConfig(image_size=layout.size, num_classes=layout.classes + (layout.empty is not None), cell=layout.cell,
                     **{name: getattr(settings, name) for name in same_names})


def training_layout(settings, layout):
    """The layout of training canvases: more digits than are evaluated teach more per second, and so do harder ones."""
    if layout.empty is None:
        if settings.train_digits or settings.crowded or settings.borders:
            raise ValueError(f"phase {settings.phase} has a digit in every cell: "
                             "--train_digits, --crowded and --borders do not apply")
        return layout
    most = max(layout.max_digits, min(settings.train_digits or 0, layout.capacity))
    return replace(layout, max_digits=most, crowded=settings.crowded or 0.0, borders=settings.borders or 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW (Loshchilov 2019, arXiv:1711.05101) on flat buffers: a handful of vector operations, whatever the model

def flatten(model, extra=0):
    """Make all parameters of a model views of one flat tensor, and their gradients of another. Matrices come first.

    Returns the weights, the gradients with `extra` more elements at their end, and the number of elements of matrices:
    weight decay is for those, not for biases, norms and positions. `.to()` and `zero_grad()` would break the views.
    """
    parameters = sorted(model.named_parameters(), key=lambda item: not decays(*item))
    spans = [-(-parameter.numel() // 16) * 16 for _, parameter in parameters]  # 16 floats: 64 bytes, a cache line
    weights = torch.zeros(sum(spans), dtype=parameters[0][1].dtype, device=parameters[0][1].device)
    gradients = weights.new_zeros(len(weights) + extra)
    views = zip(weights.split(spans), gradients.split([*spans, extra]))
    for (_, parameter), (weight, gradient) in zip(parameters, views):
        weight[:parameter.numel()] = parameter.detach().flatten()
        parameter.data = weight[:parameter.numel()].view_as(parameter)
        parameter.grad = gradient[:parameter.numel()].view_as(parameter)
    return weights, gradients, sum(span for item, span in zip(parameters, spans) if decays(*item))


def decays(name, parameter):
    return name.endswith("weight") and parameter.ndim > 1


def still_flat(model, weights, gradients):
    """Whether the parameters and gradients of a model are views of these buffers."""
    def within(tensor, flat):
        return tensor is not None and tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    return all(within(p.data, weights) and within(p.grad, gradients) for p in model.parameters())


def adamw_rates(step, lr, weight_decay, beta1, beta2):
    """The five numbers that `adamw` needs for a step, counted from 1."""
    return [lr * weight_decay, 1 - beta1, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5]


def adamw(weights, gradients, mean, square, matrices, rates, eps=1e-8):
    """One step, in place. mean, square: moving averages of the gradients and of their squares. rates: a tensor of
    `adamw_rates`, so that a step needs no host synchronisation; where all are 0, nothing changes."""
    decay, new_mean, new_square, step_size, correction = rates.unbind()
    weights[:matrices].mul_(1 - decay)
    mean.lerp_(gradients, new_mean)
    square.lerp_(gradients.square(), new_square)
    scale = square.sqrt().mul_(correction).add_(eps)
    weights.sub_(torch.div(mean, scale, out=scale).mul_(step_size))


def learning_rate(step, settings):
    """Of step 0, 1, ...: a linear warm-up over a share `warmup` of the run, then a linear decay to 0 at its end."""
    warmup_steps = settings.warmup * settings.max_steps
    rising = (step + 1) / max(warmup_steps, 1)
    falling = (settings.max_steps - step) / max(settings.max_steps - warmup_steps, 1)
    return settings.lr * min(rising, falling)


# ---------------------------------------------------------------------------------------------------------------------
# Devices, and the processes that torchrun starts: each computes its part of every batch, and gradients are summed

TIMEOUT = timedelta(minutes=5)      # how long a process waits for the others


def pick_device(name):
    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.zeros(1, device=name).device
        torch.zeros(1, device=device).tolist()      # which a device without values ("meta") cannot
        if device.index:  # CUDA makes streams and graphs on the current device
            torch.accelerator.set_device_index(device.index)
        return device
    except Exception as error:  # each backend has its own exceptions for a device that is not there
        raise ValueError(f"--device={name} cannot be used here: {str(error).splitlines()[0]}") from None


def pick_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # older versions of torch cannot tell
        fast = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def join(device):
    """Join the processes that torchrun started, if it did. Returns this one's device, its rank and their number."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return device, 0, 1
    if device.type != "cpu":
        if local_rank >= torch.accelerator.device_count():
            raise ValueError(f"process {local_rank} has no device of its own: start at most "
                             f"{torch.accelerator.device_count()} on this machine (--nproc_per_node)")
        torch.accelerator.set_device_index(local_rank)
        device = torch.device(device.type, local_rank)
    try:
        # torchrun's store outlives a restart and would keep addresses of dead processes: each start has its own keys
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(dist.get_default_backend_for_device(device), timeout=TIMEOUT, store=store,
                                rank=rank, world_size=processes)
    except RuntimeError as error:
        raise ConnectionError(f"the processes did not find each other: {one_line(error)}") from None
    if rank:
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    return device, rank, processes


def reduce(tensor, how="SUM"):
    """Combine a tensor over all processes, in place. ConnectionError if one of them is gone."""
    if dist.is_available() and dist.is_initialized():
        try:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
        except RuntimeError as error:
            raise ConnectionError(f"another process is gone, so this one stops too ({one_line(error)})") from None
    return tensor


def check_agreement(device, *facts):
    """Raise ValueError unless the facts are the same in all processes."""
    digest = seed_of(*facts)
    highest, minus_lowest = reduce(torch.tensor([digest, -digest], device=device), "MAX").tolist()
    if highest != -minus_lowest:
        raise ValueError("the processes do not start alike: they need the same flags and data, and a shared --out_dir")


def seed_of(*key):
    """A non-negative integer that depends on nothing but the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# A training step

def predict(model, canvas, dtype):
    """uint8 canvases (B, H, W) -> logits (B, gh, gw, classes), computed in dtype, in float32 at least."""
    master = torch.promote_types(dtype, torch.float32)
    with torch.autocast(canvas.device.type, dtype, enabled=dtype == torch.bfloat16):
        return model(data.to_input(canvas).to(master)).to(master)


def sampling_weights(losses, hard):
    """The probability of drawing each of N digits, given their losses (N,). A share `hard` of it is proportional to the
    root of the loss, the rest uniform, so that no digit is forgotten (after Loshchilov 2016, arXiv:1511.06343)."""
    root = (losses + 1e-8).sqrt()           # where all losses are 0, the draws are uniform
    return hard * root / root.sum() + (1 - hard) / len(root)


class Trainer:
    """The model and all that a training step reads and writes, on one device.

    A step needs no host synchronisation: what changes from one to the next is in the generators and in `inputs`.
    images, labels: uint8 (N, 28, 28), int64 (N,), the training digits. dtype: of the forward pass, float64 included;
    weights, gradients and moments are in float32 at least. rank, processes: this process's part of each batch.
    """
    SAVED = ("mean", "square", "sums", "hardness")      # tensors that a checkpoint keeps, beside the weights

    def __init__(self, settings, config, layout, images, labels, device, dtype, rank=0, processes=1):
        self.settings, self.layout, self.device, self.dtype = settings, layout, device, dtype
        self.rank, self.processes, self.steps = rank, processes, 0
        self.part = slice(*(edge * settings.batch_size // processes for edge in (rank, rank + 1)))
        torch.manual_seed(settings.seed)
        self.model = ViT(config).to(device, torch.promote_types(dtype, torch.float32))
        self.averaged = copy.deepcopy(self.model).eval()
        self.forward = torch.compile(self.model) if settings.compile else self.model

        # `reduced` is all that processes exchange in a step, so that one `reduce` will do. It holds the gradients, four
        # totals of the batch (loss, digits, digits right, requests to stop), and for each cell of the batch the number
        # of its digit (exact up to 2**24 in float32) and its loss.
        self.cells = settings.batch_size * layout.grid**2
        self.weights, self.reduced, self.matrices = flatten(self.model, extra=4 + 2 * self.cells)
        self.gradients, self.totals, cells = self.reduced.split((len(self.weights), 4, 2 * self.cells))
        self.cell_numbers, self.cell_losses = cells.view(2, settings.batch_size, -1)
        self.average, _, _ = flatten(self.averaged)
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)

        zeros = self.weights.new_zeros
        self.inputs = zeros(7)                  # the rates of AdamW, the rate of averaging, the request to stop
        self.sums = zeros(4)                    # loss, digits, digits right and steps, since the last line of metrics
        self.flags = zeros(2)                   # steps that were not finite, requests to stop
        self.norm = zeros(())                   # of the last gradient
        # A running loss of each training digit: the mean of its last value and its losses in a step. It starts as the
        # loss of a uniform prediction, which caps it. The last element collects the losses of empty cells, unread.
        self.uniform_loss = math.log(config.num_classes)
        self.hardness = torch.full_like(zeros(len(images) + 1), self.uniform_loss)

        self.images = images.to(device)
        self.classes_of = data.class_table(labels, layout).to(device)
        self.generator = torch.Generator(device)
        strengths = {name: getattr(settings, name) for name in ("rotate", "scale", "shear", "shift", "elastic")}
        self.augmentation = strengths | {"elastic_points": settings.elastic_points} if any(strengths.values()) else None

    def prepare(self, step, stop=False):
        """Seed the generators and set the rates for step 0, 1, ...; returns its learning rate."""
        settings, self.steps = self.settings, step + 1
        self.generator.manual_seed(seed_of(settings.seed, step, "canvases"))
        torch.manual_seed(seed_of(settings.seed, step, "dropout", self.rank))
        lr = learning_rate(step, settings)
        rates = adamw_rates(self.steps, lr, settings.weight_decay, settings.beta1, settings.beta2)
        averaging = 1 - min(settings.average, self.steps / (self.steps + 10))       # over a shorter span early on
        inputs = torch.tensor([*rates, averaging, stop], dtype=self.inputs.dtype)
        self.inputs.copy_(inputs, non_blocking=self.device.type == "cuda")      # elsewhere it could be freed first
        return lr

    def draw(self):
        """This process's part of a batch: uint8 canvases (B, H, W) and the numbers (B, gh, gw) of their digits."""
        weights = sampling_weights(self.hardness[:-1], self.settings.hard) if self.settings.hard else None
        return data.canvases(self.layout, self.images, self.settings.batch_size, self.generator, self.augmentation,
                             self.part, weights)

    def backward(self, canvas, numbers):
        """Fill `reduced` with this part's gradients and losses. Returns the logits (B, gh, gw, classes)."""
        labels = self.classes_of[numbers]
        logits = predict(self.forward, canvas, self.dtype)
        # All cells count alike. With empty cells weighted 0.2, phase 3 found more digits (91.1% against 83.7% after 400
        # steps of 128) but saw so many where there are none that exact canvases fell from 62.0% to 51.2%. Training
        # canvases with more digits (train_digits) are the cure: 65.9%.
        losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
        loss = losses.sum() / self.cells
        self.reduced.zero_()
        loss.backward()
        digit = labels < self.layout.classes
        right = digit & (logits.argmax(-1) == labels)
        self.totals.copy_(torch.stack((loss.detach(), digit.sum(), right.sum(), self.inputs[-1])))
        self.cell_numbers[self.part] = numbers.flatten(1)
        self.cell_losses[self.part] = losses.detach().view(len(numbers), -1)
        return logits.detach()

    def update(self):
        """Clip the gradient, apply AdamW, update averages and hardness. A step that is not finite changes no weight."""
        self.norm.copy_(self.gradients.norm())
        finite = (self.norm + self.totals[0]).isfinite()
        if self.settings.grad_clip:
            self.gradients.mul_((self.settings.grad_clip / (self.norm + 1e-6)).clamp(max=1))
        self.gradients.masked_fill_(~finite, 0)
        rates = self.inputs[:6] * finite
        adamw(self.weights, self.gradients, self.mean, self.square, self.matrices, rates[:5])
        self.average.lerp_(self.weights, rates[5])
        self.sums[:3].add_(self.totals[:3])
        self.sums[3].add_(1)
        self.flags.add_(torch.stack((~finite, self.totals[3])))
        # The mean includes a digit's old value
        losses = self.cell_losses.flatten().nan_to_num(self.uniform_loss).clamp(0, self.uniform_loss)
        self.hardness.scatter_reduce_(0, self.cell_numbers.flatten().long(), losses, "mean")

    def step(self):
        self.backward(*self.draw())
        reduce(self.reduced)
        self.update()

    def state(self):
        """What a checkpoint keeps of the trainer."""
        if not still_flat(self.model, self.weights, self.gradients):
            raise RuntimeError("a parameter is no view of its buffer any more")
        return {"step": self.steps, "model": self.model.state_dict(), "average": self.averaged.state_dict(),
                **{name: getattr(self, name) for name in self.SAVED}}

    def load(self, path, checkpoint):
        """Continue from a checkpoint. Raises ValueError, with its path, where its state does not fit."""
        digits, expected = len(checkpoint["hardness"]) - 1, len(self.hardness) - 1
        if digits != expected:
            raise ValueError(f"{path} was trained on {digits:,} digits, these are {expected:,}")
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.averaged.load_state_dict(checkpoint["average"])
            for name in self.SAVED:
                saved, tensor = checkpoint[name], getattr(self, name)
                if saved.shape != tensor.shape:
                    raise ValueError(f"{name} has {saved.numel()} values, not {tensor.numel()}")
                tensor.copy_(saved)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be resumed: {one_line(error)}") from None
        self.steps = checkpoint["step"]


def capture(trainer):
    """Returns what to call in place of trainer.step. On a CUDA device that is a CUDA graph, which launches the step's
    hundreds of kernels at once; they draw from the generators as `prepare` last seeded them. Elsewhere, for several
    processes and where capture fails, it is the step itself. Capture takes steps at rates of 0: all that they change is
    `changed`, which is restored."""
    if trainer.device.type != "cuda":
        return trainer.step
    changed, advance = (trainer.sums, trainer.flags, trainer.hardness), trainer.step
    before = [tensor.clone() for tensor in changed]
    trainer.inputs.zero_()
    try:
        if trainer.processes > 1:
            raise RuntimeError("several processes train")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries initialise in their first calls, which cannot be captured
                trainer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(trainer.generator)
        with torch.cuda.graph(graph):
            trainer.step()
        advance = graph.replay
    except (RuntimeError, AttributeError) as error:
        say(f"no CUDA graph of the training step, so each kernel is launched by itself: {one_line(error)}")
    for tensor, value in zip(changed, before):
        tensor.copy_(value)
    return advance


@torch.no_grad()
def evaluate(model, canvases, labels, classes, device, dtype, rank=0, processes=1, apart=2):
    """Mean loss and accuracies (shares of 1, None where one does not apply) over canvases (n, H, W) and the labels
    (n, gh, gw) of their cells, where labels below `classes` are digits. Each process takes its share of them.
    apart: see `data.decode`."""
    model.eval()
    totals = torch.zeros(6, dtype=torch.float64)
    batch = data.at_once(canvases)
    for canvas, label in zip(canvases[rank::processes].split(batch), labels[rank::processes].split(batch)):
        label = label.to(device)
        logits = predict(model, canvas.to(device), dtype)
        loss = F.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="sum")
        empty = classes if logits.shape[-1] > classes else None
        score = data.score(data.decode(logits, empty, apart), label, classes)
        totals += torch.tensor([loss.item(), *(count.sum().item() for count in score)])
    if processes > 1:
        totals = reduce(totals.to(device))
    loss, digits, digits_right, empties, empties_right, exact = totals.tolist()
    return {"loss": loss / (digits + empties), "cell_accuracy": (digits_right + empties_right) / (digits + empties),
            "digit_accuracy": digits_right / digits if digits else None,
            "empty_accuracy": empties_right / empties if empties else None, "exact_match": exact / len(canvases)}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

CHECKPOINT = {  # its keys and their types
    "version": int, "phase": int, "data": str,          # kind of the digits, one of data.KINDS
    "canvas": dict,                                     # what data.layout was called with: size, max_digits, ...
    "config": dict, "settings": dict,                   # fields of ViTConfig and of Settings
    "seconds": float, "train_seconds": float,
    "step": int, "model": dict, "average": dict,        # see Trainer.state
    **dict.fromkeys(Trainer.SAVED, torch.Tensor),
}
VERSION = 3


def save(path, checkpoint):
    """Write a checkpoint whole, or not at all (OSError)."""
    content = io.BytesIO()
    torch.save(checkpoint, content)  # to memory, since torch.save does not raise OSError on a full disk
    data.write_whole(path, content.getbuffer())


def load_checkpoint(path):
    """A checkpoint as `save` wrote it, on the CPU, and its averaged model in eval mode. `read_checkpoint` says what a
    file cannot do. OSError where there is no such file, ValueError where it is not sound."""
    data.check_regular(path)
    if not path.exists():
        raise OSError(f"there is no checkpoint {path}: train one with train.py")
    try:
        checkpoint = read_checkpoint(path)
        version, settings = checkpoint["version"], dict(checkpoint["settings"])
        if version == 2:  # which kept the step of the last line of metrics, in place of the steps since
            steps = checkpoint["step"] - checkpoint["since"]
            checkpoint["sums"] = torch.cat((checkpoint["sums"], torch.tensor([steps])))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint of train.py: {one_line(error)}") from None
    if version not in (2, VERSION) or settings.keys() - FLAGS:
        raise ValueError(f"{path} was written by another version of train.py")
    wrong = [key for key, kind in CHECKPOINT.items() if not is_sound(key, checkpoint.get(key), kind)]
    wrong += [name for name, value in settings.items() if type(value) not in types_of(FLAGS[name])
              or value is None and name in DEFAULTS.get(settings.get("phase"), {})]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} cannot be right")
    model, phase, canvas = ViT.load(path), checkpoint["phase"], checkpoint["canvas"]
    if phase not in data.PHASES or checkpoint["data"] not in data.KINDS or \
            canvas.keys() != {"size", "max_digits", "min_distance", "classes"} or \
            canvas["size"] not in (None, model.config.image_size) or model.config.cell != data.PHASES[phase].cell or \
            type(canvas["classes"]) is not int or \
            model.config.num_classes != canvas["classes"] + data.has_empty_cells(phase):
        raise ValueError(f"{path} is not a checkpoint of train.py: what it says of its canvases does not fit its model")
    return checkpoint, model


def is_sound(key, value, kind):
    """Whether a value of a checkpoint can be right: a finite number or vector, of which only `mean` may be negative."""
    if kind is torch.Tensor:
        return isinstance(value, torch.Tensor) and value.ndim == 1 and \
            bool((value.isfinite() & ((value >= 0) | (key == "mean"))).all())
    return isinstance(value, kind) and (kind not in (int, float) or 0 <= value < math.inf)


def check_fits(path, checkpoint, kind, config, eval_only):
    """Raise ValueError where a checkpoint is of another kind of digits, or of a model that could not be the run's."""
    if checkpoint["data"] != kind:
        raise ValueError(f"{path} was trained on {checkpoint['data']} digits, these are {kind} ones")
    free = ("image_size", "dropout", "drop_path") if eval_only else ()
    saved = asdict(ViTConfig(**checkpoint["config"]))   # an older one does not know every field
    changed = [name for name, value in asdict(config).items() if name not in free and saved[name] != value]
    if changed:
        raise ValueError(f"{path} has another model: {', '.join(changed)} cannot change")


def make_room(path, checkpoint):
    """Make the folder of a checkpoint ready for its run. A resumed run drops the lines of metrics.jsonl that come after
    its checkpoint. A new run keeps the files of an earlier one, with the first number that is free for all of them."""
    metrics = path.with_name("metrics.jsonl")
    data.check_regular(metrics)
    if checkpoint:
        data.write_whole(metrics, lines_until(checkpoint["step"], metrics))
    elif path.exists():
        files = (metrics, path)
        number = next(n for n in itertools.count(1) if not any(Path(f"{file}.{n}").exists() for file in files))
        for file in files:
            if file.exists():
                os.replace(file, f"{file}.{number}")
                say(f"{file} is another run's: kept as {file}.{number}")
    else:
        metrics.unlink(missing_ok=True)             # of a run that never saved anything


def lines_until(step, metrics):
    """The lines of metrics.jsonl up to a step, in bytes. The last line may be cut off, as a killed run leaves it;
    others that are no metrics are a ValueError."""
    kept = b""
    *lines, cut_off = metrics.read_bytes().split(b"\n") if metrics.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            later = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{metrics} is not a metrics file of train.py: see its line {number}") from None
        if later:
            return kept
        kept += line + b"\n"
    if cut_off[:1] not in (b"", b"{"):
        raise ValueError(f"{metrics} is not a metrics file of train.py: see its end")
    return kept


@contextlib.contextmanager
def locked(folder):
    """The folder is this run's alone: OSError where another is at work. The lock ends with the process, in any case."""
    try:
        import fcntl            # which Windows lacks
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"a run is at work in {folder}: wait for its end, or name another --out_dir") from None
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# What a run reports: a line of progress, metrics.jsonl and, where asked for, Weights & Biases

def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def percent(share):
    return "-" if share is None else f"{100 * share:.2f}%"


def table(figures, more):
    """The figures of an evaluation, and more rows {title: text}, a line each."""
    kind = figures["data"]
    remark = "" if kind.startswith("mnist") else f"   ({kind} digits: this says nothing about MNIST)"
    rows = {title: percent(figures[key]) + remark for title, key in (
        ("digit accuracy", "digit_accuracy"), ("empty accuracy", "empty_accuracy"), ("cell accuracy", "cell_accuracy"),
        ("exact canvases", "exact_match"))}
    return "\n".join(f"{title:>16}  {value}" for title, value in (rows | more).items())


def start_wandb(settings, config):
    """Begin a run of Weights & Biases; returns its module, which is imported only here."""
    folder = Path(settings.out_dir)
    try:
        import wandb
        folder.mkdir(parents=True, exist_ok=True)
        wandb.init(project="vit-digits", name=folder.name, dir=settings.out_dir,
                   config={**asdict(settings), "model": asdict(config)})
    except ImportError:
        raise ValueError("--wandb needs the package wandb: pip install wandb") from None
    except wandb.errors.Error as error:
        raise ValueError(f"--wandb: {one_line(error)} (WANDB_MODE=offline needs no account)") from None
    return wandb


class Log:
    """Reports a run and keeps its two clocks: `seconds` since its start, and `train_seconds`, which leaves out start-up
    and evaluation. Those of a resumed run continue from its checkpoint."""

    def __init__(self, path, trainer, kind, started, checkpoint, wandb):
        self.file, self.settings, self.kind, self.wandb = open(path, "a"), trainer.settings, kind, wandb
        self.shown = time.perf_counter()        # when the last line of progress was printed
        self.clock_starts = {"seconds": started, "train_seconds": self.shown}
        for name in self.clock_starts if checkpoint else ():
            self.clock_starts[name] -= checkpoint[name]
        self.last_line = trainer.steps, self.clocks()["train_seconds"]

    def clocks(self):
        return {name: time.perf_counter() - start for name, start in self.clock_starts.items()}

    @contextlib.contextmanager
    def pause(self):
        """Stop the clock of the training meanwhile."""
        began = time.perf_counter()
        yield
        self.clock_starts["train_seconds"] += time.perf_counter() - began

    def training(self, trainer, lr):
        """Report the steps since the last line of metrics."""
        loss, digits, digits_right, steps = trainer.sums.tolist()
        trainer.sums.zero_()
        step, max_steps, (seconds, train_seconds) = trainer.steps, self.settings.max_steps, self.clocks().values()
        images_per_second = (step - self.last_line[0]) * self.settings.batch_size / (train_seconds - self.last_line[1])
        self.last_line = step, train_seconds
        line = {"event": "train", "step": step, "seconds": seconds, "loss": loss / steps, "lr": lr,
                "grad_norm": trainer.norm.item(), "images_per_second": images_per_second}
        accuracy = digits_right / max(digits, 1)
        print(json.dumps(line), file=self.file, flush=True)
        self.show(f"step {step:,}/{max_steps:,}  loss {line['loss']:.4f}  {self.kind} digits {percent(accuracy)}  "
                  f"{images_per_second:,.0f} images/s  ETA {clock(train_seconds / step * (max_steps - step))}")
        if self.wandb:
            self.wandb.log({**{f"train/{name}": value for name, value in line.items() if name != "event"},
                            "train/digit_accuracy": accuracy}, step=step)

    def evaluation(self, figures, trainer, canvases):
        """Report the figures of an evaluation, and to W&B what the model reads on some canvases."""
        print(json.dumps(figures), file=self.file, flush=True)
        self.show(f"step {figures['step']:,}  {clock(figures['train_seconds'])}  {figures['data']}: "
                  f"loss {figures['loss']:.4f}  digits {percent(figures['digit_accuracy'])}  "
                  f"empty {percent(figures['empty_accuracy'])}  exact canvases {percent(figures['exact_match'])}", True)
        if self.wandb:
            with torch.no_grad():
                logits = predict(trainer.averaged, canvases.to(trainer.device), trainer.dtype)
            readings = data.read(logits, trainer.layout.empty, trainer.layout.apart)
            samples = [self.wandb.Image(canvas, caption=", ".join(
                f"{digit} ({percent(confidence)})" for digit, _, _, confidence in reading) or "nothing")
                for canvas, reading in zip(canvases.numpy(), readings)]
            self.wandb.log({**{f"eval/{name}": value for name, value in figures.items() if isinstance(value, float)},
                            "samples": samples, "weights": self.wandb.Histogram(trainer.weights.tolist()),
                            "gradients": self.wandb.Histogram(trainer.gradients.tolist())}, step=figures["step"])

    def show(self, text, keep=False):
        """Print a line of progress: in place on a terminal, every 10 s elsewhere, and always where `keep`."""
        if sys.stdout.isatty():
            width = None if keep else shutil.get_terminal_size().columns - 1
            say("\r\033[K" + text[:width], end="\n" if keep else "")
        elif keep or time.perf_counter() - self.shown >= 10:
            say(text)
            self.shown = time.perf_counter()

    def finish(self, checkpoint):
        """End the run of W&B, which gets the checkpoint."""
        if self.wandb:
            artifact = self.wandb.Artifact(f"phase{self.settings.phase}", type="model")
            artifact.add_file(str(checkpoint))
            self.wandb.log_artifact(artifact)
            self.wandb.finish()


# ---------------------------------------------------------------------------------------------------------------------
# The smoke test of a device: the training step itself, on digits drawn by the program, against float64 on the CPU

SMOKE_STEPS, SMOKE_WARM_UP = 30, 10     # training steps, and those of them that only warm up
SMOKE_SAME = 0.98                       # of pixels and labels: rounding may tip the edge of an ink box and move a digit
SMOKE_FALL = 0.9                        # of the mean loss after the warm-up, as a share of that during it
UPDATE_TOLERANCE = 1e-3                 # relative L2 difference of a tensor's change, from the same gradients
# Relative L2 difference of the logits and of all gradients together, and of one parameter's gradient
TOLERANCE = {torch.float32: (1e-5, 3e-5), torch.bfloat16: (0.02, 0.05)}


def smoke(settings):
    """Prints a line for each check and the speed. Returns whether all checks passed."""
    device, passed = pick_device(settings.device), []
    settings = replace(settings, max_steps=SMOKE_STEPS, dropout=0.0, drop_path=0.0,  # so that both drop alike: nothing
                       rotate=10.0, scale=0.1, shear=0.1, shift=1.0, elastic=1.0)
    digits = data.drawn_digits(500, settings.seed)
    layout = data.layout(settings.phase, *digits, settings.canvas_size, settings.max_digits, settings.min_distance)
    config = model_config(settings, layout)
    cells = -(-data.FRAME // layout.cell) // 2 * 2 + 1          # an odd number a side, with room for a digit
    one_each = {} if layout.empty is None else {"max_digits": 1, "crowded": 1.0}    # empty ones would have no gradient
    odd = replace(layout, size=cells * layout.cell, **one_each)

    def pair(dtype, layout=training_layout(settings, layout), batch_size=settings.batch_size):
        """The trainer in float64 on the CPU and the one to check. Their digits differ in how hard they are."""
        for place in ((torch.device("cpu"), torch.float64), (device, dtype)):
            trainer = Trainer(replace(settings, batch_size=batch_size), config, layout, *digits, *place)
            trainer.hardness.mul_(torch.linspace(0, 1, len(trainer.hardness)).to(trainer.device))
            yield trainer

    def report(name, checks):
        for check, good, figure in checks:
            passed.append(bool(good))
            say(f"{'PASS' if good else 'FAIL'}  {name}{check}: {figure}")

    report("", check_drawing(*pair(torch.float32)))
    for dtype in dict.fromkeys((torch.float32, pick_dtype(settings.dtype, device))):
        name, (reference, trainer) = str(dtype).removeprefix("torch."), pair(dtype)
        report(f"{name} ", check_step(reference, trainer))
        report(f"{name} odd-sized ", check_step(*pair(dtype, odd, batch_size=5)))
        advance = capture(trainer)
        report(f"{name} ", check_training(trainer, advance))

        side, images = 1024 if device.type == "cpu" else 8192, settings.batch_size
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        peak = 2 * side**3 / seconds_of(lambda: matrix @ matrix, 5, device)
        seconds = seconds_of(advance, 20, device)
        reached = 3 * config.flops() * images / seconds         # a backward pass takes twice a forward pass
        say(f"      {name}: {1e3 * seconds:.1f} ms a step of {images}, {images / seconds:,.0f} images/s, "
            f"{reached / 1e12:.3g} TFLOP/s; a large matrix product reaches {peak / 1e12:.3g}")
    say(f"{device_summary(device)}, torch {torch.__version__}: "
        f"{'all right' if all(passed) else f'{passed.count(False)} of {len(passed)} checks FAILED'}")
    return all(passed)


def check_drawing(reference, trainer):
    """Canvases, from the CPU's random numbers and from the device's own. Like the checks below, it yields what is
    checked, whether it is right, and the evidence."""
    def draw(drawer, generator, step):
        drawer.generator = generator
        drawer.prepare(step)
        return [tensor.cpu() for tensor in drawer.draw()]

    own = trainer.generator
    expected, expected_numbers = draw(reference, reference.generator, 0)
    canvas, numbers = draw(trainer, reference.generator, 0)
    same = min(((canvas.int() - expected.int()).abs() <= 2).double().mean().item(),
               (numbers == expected_numbers).double().mean().item())
    yield ("canvases", same >= SMOKE_SAME,
           f"{percent(same)} as drawn on the CPU, at least {percent(SMOKE_SAME)} is right")
    once, again, other = (draw(trainer, own, step) for step in (0, 0, 1))
    repeated, differ = all(map(torch.equal, once, again)), not all(map(torch.equal, once, other))
    distinct = len(torch.rand(2**16, generator=own, device=trainer.device).cpu().unique()) / 2**16
    yield ("random numbers", repeated and differ and distinct > 0.99,
           f"one seed, {'one draw' if repeated else 'two draws'}; two seeds, {'two draws' if differ else 'one draw'}; "
           f"{percent(distinct)} of 65,536 are distinct, at least 99.00% is right")


def check_step(reference, trainer):
    """The logits, gradients and update of one batch."""
    tolerance, tolerance_of_one = TOLERANCE[trainer.dtype]
    reference.prepare(0)
    trainer.prepare(0)
    batch = reference.draw()
    expected = reference.backward(*batch)
    logits = trainer.backward(*(tensor.to(trainer.device) for tensor in batch))
    yield compare("logits", {"": logits}, {"": expected}, tolerance)
    gradients = [{name: parameter.grad for name, parameter in each.model.named_parameters()}
                 for each in (trainer, reference)]
    yield compare("gradients", *gradients, tolerance)
    yield compare("each gradient", *gradients, tolerance_of_one, each=True)

    reference.reduced.copy_(trainer.reduced)
    changes = []
    for each in (trainer, reference):
        before = {name: tensor.clone() for name, tensor in tensors_of(each.state()).items()}
        each.update()
        after = tensors_of(each.state())
        changes.append({"norm": each.norm, **{name: after[name] - before[name] for name in after}})
    yield compare("update", *changes, UPDATE_TOLERANCE, each=True)


def check_training(trainer, advance):
    """Steps as a run takes them, saved and loaded after the warm-up and at the end."""
    losses, loaded, intact = [], [], True
    for step in range(SMOKE_STEPS):
        trainer.prepare(step)
        advance()
        if step + 1 in (SMOKE_WARM_UP, SMOKE_STEPS):
            losses.append((trainer.sums[0] / trainer.sums[3]).item())
            trainer.sums.zero_()
            file = io.BytesIO()
            torch.save(trainer.state(), file)
            file.seek(0)
            tensors = tensors_of(trainer.state())
            loaded.append(tensors_of(torch.load(file, map_location="cpu", weights_only=True)))
            intact &= all(torch.equal(tensor.cpu().view(torch.uint8), loaded[-1][name].view(torch.uint8))   # NaN too
                          for name, tensor in tensors.items())
    yield ("training", losses[1] <= SMOKE_FALL * losses[0], f"loss {losses[0]:.3f}, and after {SMOKE_WARM_UP} steps "
           f"{losses[1]:.3f}, at most {SMOKE_FALL:g} of it is right")
    finite = not trainer.flags[0] and all(tensor.isfinite().all() for tensor in tensors.values())
    yield "finite", finite, "every number" if finite else "NaN or infinity in weights, gradients or moments"
    good = intact and not torch.equal(*(state["head.weight"] for state in loaded))
    yield "save and load", good, "bit-identical" if good else "what is loaded is not what was trained"


def tensors_of(state):
    """The tensors of a Trainer.state by name, save for the sums of a log line, which steps do not read."""
    average = {f"average of {name}": tensor for name, tensor in state["average"].items()}
    return {**state["model"], **average, **{name: state[name] for name in ("mean", "square", "hardness")}}


def compare(name, found, expected, limit, each=False):
    """A check of dicts of tensors: the relative L2 difference of all together, or the largest of `each`. NaN fails."""
    sizes = torch.stack([tensor.cpu().double().norm() for tensor in expected.values()])
    errors = torch.stack([(found[key].cpu().double() - expected[key].cpu().double()).norm() for key in expected])
    off, where = errors.norm() / sizes.norm().clamp(min=1e-300), ""         # a gradient may be 0
    if each:
        off, index = (errors / sizes.clamp(min=1e-300)).max(0)
        where = f" ({list(expected)[index]})"
    return name, off <= limit, f"{off:.1e} off{where}, at most {limit:g} is right"


def seconds_of(call, times, device):
    """Mean time of a call, over so many calls, after as many that warm up."""
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(times):
            call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    return (time.perf_counter() - began) / times


def device_summary(device):
    """The device, its driver and its peak memory."""
    if device.type == "cuda":
        driver = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        return f"{torch.cuda.get_device_name(device)}, {driver}, peak {peak:,.0f} MiB"
    if device.type == "cpu" and sys.platform == "linux":
        import resource             # not every system has it, and others count in other units
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return f"CPU {os.uname().machine}, {torch.get_num_threads()} threads, peak {peak:,.0f} MiB"
    return str(device)


# ---------------------------------------------------------------------------------------------------------------------
# A run

class Stopped(Exception):
    """A run that was asked to stop has saved and stopped: a message and the exit code of the signal."""


class Result(NamedTuple):
    figures: dict       # of the last evaluation, as in metrics.jsonl
    model: ViT          # with averaged weights, in eval mode


@contextlib.contextmanager
def stop_signals():
    """A list of the signals that ask the program to stop: SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is closed,
    unless nohup ignores it). A second one ends it at once."""
    received, numbers = [], [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def receive(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_data(settings):
    """Training images and labels, test canvases with labels, options of data.layout, and the kind of the digits."""
    images, labels, kind = data.load_digits(settings.data, settings.data_dir, "train")
    if settings.val_digits >= len(images):
        raise ValueError(f"--val_digits={settings.val_digits} leaves none of {len(images)} digits for training")
    if settings.val_digits:  # the last ones, which then train nothing
        sizes = len(images) - settings.val_digits, settings.val_digits
        (images, test_images), (labels, test_labels) = images.split(sizes), labels.split(sizes)
    else:
        test_images, test_labels, _ = data.load_digits(kind, settings.data_dir, "test")
    classes = int(max(labels.max(), test_labels.max())) + 1
    layout_options = {"size": settings.canvas_size, "max_digits": settings.max_digits,
                      "min_distance": settings.min_distance, "classes": classes}
    untrained = sorted(set(range(classes)) - set(labels.tolist()))
    if untrained:
        tested = sorted(set(untrained) & set(test_labels.tolist()))
        say(f"note: no training digit is of class {', '.join(map(str, untrained))}"
            + (f"; class {', '.join(map(str, tested))} is in the test set alone" if tested else ""))
    if len(set(labels.tolist())) < 2:
        say(f"note: all training digits are of class {labels[0]}")
    test_layout = data.layout(settings.phase, test_images, test_labels, **layout_options)
    test_set = data.test_canvases(test_layout, test_images, test_labels, settings.test_canvases)
    return images, labels, test_set, layout_options, kind


def check_memory(settings, config, device):
    """Raise ValueError where a model and a step of it surely take more memory than is free."""
    try:
        one, two = (replace(config, depth=depth).num_parameters() for depth in (1, 2))
        parameters = one + (config.depth - 1) * (two - one)
    except (RuntimeError, TypeError):       # more than a tensor can have
        parameters = math.inf
    tokens = (config.image_size // config.patch_size) ** 2
    activations = settings.batch_size * tokens * config.depth * (8 * config.dim + 2 * config.mlp_dim)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    # weights, their average, gradients and two moments
    data.check_memory(4 * (5 * parameters + activations), f"a model of {parameters:,} parameters and a step of "
                      f"{settings.batch_size:,} canvases of {config.image_size} x {config.image_size} px", free)


def run(signals=False, **given):
    """Train with the settings given. Returns a Result. Raises ValueError for settings or files that make no sense,
    OSError for what a file or the network denies, FloatingPointError where training diverges. signals: whether
    `stop_signals` make it save and raise Stopped, which only works in the main thread."""
    # Settings, and the checkpoint to continue from
    started, settings, checkpoint = time.perf_counter(), settle(given, {}), None
    path = Path(settings.out_dir) / "ckpt.pt"
    data.check_regular(path)
    if settings.eval_only or settings.resume and path.exists():
        checkpoint, model = load_checkpoint(path)
        if checkpoint["phase"] != settings.phase:
            raise ValueError(f"{path} is of phase {checkpoint['phase']}, not {settings.phase}")
        settings = settle(given, checkpoint["settings"])
        changed = [f"{name} {reprlib.repr(old)} -> {value}" for name, value in asdict(settings).items()
                   if (old := checkpoint["settings"].get(name, value)) != value and name not in NOT_OF_THE_RUN]
        if changed:
            say(f"note: other settings than before: {', '.join(changed)}")
    device, rank, processes = join(pick_device(settings.device))
    if settings.batch_size < processes:
        raise ValueError(f"--batch_size={settings.batch_size} is less than a canvas for each of {processes} processes")
    dtype = pick_dtype(settings.dtype, device)

    # Digits, canvases, model
    images, labels, test_set, layout_options, kind = load_data(settings)
    check_agreement(device, {**asdict(settings), "data_dir": None}, str(dtype), kind, checkpoint and checkpoint["step"],
                    torch.__version__)
    layout = data.layout(settings.phase, images, labels, **layout_options)
    harder_layout, config = training_layout(settings, layout), model_config(settings, layout)
    if checkpoint:
        check_fits(path, checkpoint, kind, config, settings.eval_only)

    def evaluation(model, **when):
        tested = kind + "-val" if settings.val_digits else kind
        return {"event": "eval", "phase": settings.phase, "data": tested, **when,
                **evaluate(model, *test_set, layout.classes, device, dtype, rank, processes, layout.apart)}

    if settings.eval_only or checkpoint and checkpoint["step"] >= settings.max_steps:
        figures = evaluation(model.to(device))
        say(table(figures, {"checkpoint": path}))
        return Result(figures, model)

    check_memory(settings, config, device)
    wandb = start_wandb(settings, config) if settings.wandb and rank == 0 else None
    trainer = Trainer(settings, config, harder_layout, images, labels, device, dtype, rank, processes)
    if checkpoint:
        trainer.load(path, checkpoint)
    say(f"phase {settings.phase}: {layout.size} x {layout.size} px, {len(images):,} {kind} digits for training\n"
        f"model: {config.num_parameters():,} parameters on {device}, {str(dtype).removeprefix('torch.')}, "
        f"{'compiled' if settings.compile else 'not compiled'}\n"
        f"run: step {trainer.steps:,} to {settings.max_steps:,}, {settings.batch_size} canvases each, "
        f"seed {settings.seed}, in {path.parent}" + (f", {processes} processes" if processes > 1 else ""))
    facts = {"version": VERSION, "phase": settings.phase, "data": kind, "canvas": layout_options,
             "config": asdict(config), "settings": asdict(settings),
             "device": f"{device}, {str(dtype).removeprefix('torch.')}"}

    if settings.compile:
        trainer.backward(*trainer.draw())           # compiles now, before the clock of the training starts
    # By default glibc returns the memory that a step frees, and the next step takes it anew, page by page: up to a
    # tenth of a step's time on a CPU. Freeing a block raises its threshold to the block's size, up to 32 MiB
    # (mallopt(3), M_MMAP_THRESHOLD).
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.parent))
            make_room(path, checkpoint)
        advance = capture(trainer)
        metrics = path.with_name("metrics.jsonl") if rank == 0 else os.devnull
        log = Log(metrics, trainer, kind, started, checkpoint, wandb)
        stack.enter_context(log.file)
        received = stack.enter_context(stop_signals()) if signals else []
        figures = fit(trainer, advance, evaluation, test_set[0], log, path, facts, received)
        log.finish(path)
    seconds = figures["train_seconds"]
    images_per_second = f"{trainer.steps * settings.batch_size / seconds:,.0f}"
    say(table(figures, {"training": f"{seconds:.1f} s", "images/s": images_per_second, "checkpoint": path,
                         "draw on it": f"python sample.py --page --out_dir={shlex.quote(str(path.parent))}"}))
    return Result(figures, trainer.averaged)


def fit(trainer, advance, evaluation, canvases, log, path, facts, received):
    """Train to the end, or until `received` is no longer empty. Returns the figures of the last evaluation."""
    settings, saved = trainer.settings, time.perf_counter()
    while trainer.steps < settings.max_steps:
        lr = trainer.prepare(trainer.steps, stop=bool(received))
        advance()

        step, final = trainer.steps, trainer.steps == settings.max_steps
        evaluate_now = final or settings.eval_every and step % settings.eval_every == 0
        log_now = evaluate_now or step % settings.log_every == 0
        if not (log_now or trainer.device.type == "cpu" or step % 10 == 0):
            continue                        # to read a number of an accelerator is a host synchronisation
        not_finite, stopping = trainer.flags.tolist()
        if not_finite:
            raise FloatingPointError(f"the loss or its gradient is not finite by step {step}, at learning rate {lr:.2g}"
                                     f": try a lower --lr; {path} is from an earlier step, if it is there")
        if log_now:
            log.training(trainer, lr)
        if evaluate_now:
            with log.pause():
                figures = evaluation(trainer.averaged, step=step, **log.clocks(), final=final)
                log.evaluation(figures, trainer, canvases[:8])
        if trainer.rank == 0 and (final or stopping or time.perf_counter() - saved > settings.save_every):
            save(path, {**facts, **trainer.state(), **log.clocks()})
            saved = time.perf_counter()
        if stopping and not final:
            reduce(trainer.flags)           # the others wait here until the first process has saved
            code = 128 + (received or [signal.SIGTERM])[0]
            if trainer.rank:
                raise SystemExit(code)
            raise Stopped(f"stopped at step {step:,} of {settings.max_steps:,} and saved: "
                          "the same command with --resume goes on", code)
    return figures


def main(arguments=None):
    given = parse(arguments)
    make_stdout_robust()
    try:
        if given.get("smoke"):
            raise SystemExit(0 if smoke(settle(given, {})) else 1)
        run(signals=True, **given)
    except ValueError as error:         # what was asked for makes no sense
        fail(error, 2)
    except OSError as error:            # it makes sense, but a file or the network is in the way
        fail(error, 1)
    except RuntimeError as error:
        if not given.get("smoke"):
            raise
        fail(f"FAIL, this device cannot run it: {str(error).splitlines()[0]}", 1)
    except FloatingPointError as error:
        say()                           # ends the line of progress, here and below
        fail(error, 1)
    except Stopped as stopped:
        say()
        fail(*stopped.args)
    except KeyboardInterrupt:
        say()
        fail("stopped", 130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
