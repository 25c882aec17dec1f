"""Train a ViT to read handwritten digits: one (phase 1), four in a grid (phase 2), any number anywhere (phase 3).

    python train.py --phase=3                       # MNIST from --data_dir, downloaded if it is not there
    python train.py --phase=1 --max_steps=1000      # every setting is a flag: python train.py --help
    python train.py --phase=3 --resume              # go on where a run was stopped
    python train.py --phase=3 --eval_only           # evaluate what a run has left
    python train.py --smoke                         # is the device all right? exit code 0 if so
    torchrun --standalone --nproc_per_node=8 train.py --phase=3      # 8 GPUs of one machine share each batch

A run leaves ckpt.pt (see `save`) and metrics.jsonl (one JSON object a line) in --out_dir. Every random number of a step
is a function of (seed, step, purpose) alone, for dropout of the process too; which digits it picks depends on the losses so
far as well, and these are saved. So logging and evaluating change nothing, and a resumed run is the run that was never stopped.
"""
import argparse
import contextlib
import copy
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Optional, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
from vit import ViT, ViTConfig


@dataclass
class Settings:
    # What to do, on what, and where
    phase: int = 3                          # 1: one digit. 2: four in a grid. 3: any number anywhere
    data_dir: str = "data/mnist"            # folder of the four MNIST files, or of others of the same names and form
    data: str = "auto"                      # mnist, custom (other files), drawn (by the program), or auto: what there is
    out_dir: Optional[str] = None           # folder for ckpt.pt and metrics.jsonl (default: out/phase<phase>)
    resume: bool = False                    # go on from the checkpoint in out_dir, if there is one
    eval_only: bool = False                 # evaluate the checkpoint in out_dir and stop
    smoke: bool = False                     # check the device in some seconds, without files or network, and stop
    val_digits: int = 0                     # hold so many training digits back and evaluate on them, not on the test set
    test_canvases: Optional[int] = None     # canvases to evaluate on (default: 10,000, or in phase 1 each test digit once)
    device: str = "auto"                    # cuda, mps, xpu, cpu, or auto: the accelerator if there is one
    dtype: str = "auto"                     # float32, bfloat16 (autocast), or auto: bfloat16 where it is the faster one
    compile: bool = False                   # torch.compile the model, which takes up to a minute before training
    seed: int = 0                           # of every random draw
    # How the run is laid out
    epochs: Optional[float] = None          # length of the run in epochs of 60,000 canvases, in place of max_steps
    max_steps: Optional[int] = None         # length of the run in steps
    batch_size: Optional[int] = None        # canvases a step
    log_every: int = 10                     # steps between lines of metrics
    eval_every: Optional[int] = None        # steps between evaluations; 0: at the end alone
    save_every: float = 30.0                # seconds between checkpoints
    wandb: bool = False                     # log to Weights & Biases too (needs the package wandb)
    # AdamW
    lr: Optional[float] = None              # peak learning rate
    warmup: float = 0.1                     # share of the steps in which the learning rate rises; then it falls to 0
    weight_decay: float = 0.05              # decoupled, on matrices only
    beta1: float = 0.9                      # decay of the gradients' mean
    beta2: float = 0.99                     # decay of the gradients' mean square
    grad_clip: float = 1.0                  # largest norm of the gradient; 0: no limit
    average: float = 0.995                  # decay of the moving average of the weights that is evaluated and saved
    # The model: see ViTConfig
    patch_size: Optional[int] = None        # px, side of a patch
    overlap: Optional[int] = None           # px that the patch projection sees beyond its patch, on each side
    dim: Optional[int] = None               # width of a token
    depth: Optional[int] = None             # number of blocks
    heads: Optional[int] = None             # attention heads in a block
    mlp_ratio: Optional[float] = None       # hidden width of the MLP, in units of dim
    positions: Optional[str] = None         # learned or rotary
    window: Optional[int] = None            # patches that attention reaches on each side; 0: all of the canvas
    dropout: float = 0.0                    # share of activations dropped in training
    drop_path: float = 0.0                  # share of images that skip a branch of the last block in training
    # Canvases and augmentation
    canvas_size: Optional[int] = None       # px, side of the canvas (default: the phase's)
    max_digits: Optional[int] = None        # phase 3: most digits on a canvas (default: 5)
    min_distance: Optional[int] = None      # px, phase 3: between digits' centres (default: so that ink never overlaps)
    train_digits: Optional[int] = None      # phase 3: most digits on a training canvas: max_digits at least, as far as they fit
    crowded: Optional[float] = None         # phase 3: share of training canvases that hold as many digits as they may
    borders: Optional[float] = None         # phase 3: share of training digits' rows, and of columns, moved beside a cell's border
    hard: float = 0.7                       # share of training digits drawn by how hard they have been; the others uniformly
    rotate: Optional[float] = None          # degrees, most that a training digit is turned
    scale: Optional[float] = None           # share, most that it is scaled up or down
    shear: Optional[float] = None           # share, most that it is sheared
    shift: Optional[float] = None           # px, most that it is moved within its frame
    elastic: Optional[float] = None         # px, most that it is bent
    elastic_points: int = 3                 # random points along a side, between which it is bent smoothly: fewer are smoother


# What a phase gets by default. Together with data.PHASES, this is all that the program knows of phases. Where digits are on a
# grid, few and large patches make steps fast, so that more digits are seen a second; as many steps with patches of 7 px read
# held-back digits better, but take twice as long. Overlap makes no difference in phase 1 and helps a little in phase 2, and so
# does attention to neighbouring patches alone, with two heads: on held-back digits, and no more than a little. An MLP of 4 times
# the width is worth its seconds in phase 1 alone. Phase 3 is about where a digit is, to half a px, rather than which: there, in a
# short run, patches that overlap are far worse, and so is augmentation.
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
LIMITS = {  # lowest and highest sensible values; ViTConfig and data.canvas_options check what is theirs
    "epochs": (1e-9, 1e9), "max_steps": (1, 1e12), "batch_size": (1, 65_536), "log_every": (1, 1e12), "eval_every": (0, 1e12),
    "save_every": (0, 1e12), "seed": (0, 1e18), "val_digits": (0, 1e12), "test_canvases": (1, 1e6), "lr": (0, 1e12), "warmup": (0, 1),
    "weight_decay": (0, 1e12), "beta1": (0, 0.999999), "beta2": (0, 0.999999), "grad_clip": (0, 1e12), "average": (0, 1),
    "train_digits": (0, 1e6), "crowded": (0, 1), "borders": (0, 1), "hard": (0, 0.95), "rotate": (0, 180), "scale": (0, 0.9),
    "shear": (0, 2), "shift": (0, 14), "elastic": (0, 14), "elastic_points": (2, 28),
}


def fail(message, code):
    """End the program with one clear line."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def parse(arguments):
    """Flags -> the settings that they give, a dict. The flags are the fields of Settings, and its comments the help."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(Settings), re.MULTILINE))
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(Settings)
    for field in fields(Settings):
        by_phase = [f"{phase}: {row[field.name]}" for phase, row in DEFAULTS.items() if field.name in row]
        default = f"default by phase: {', '.join(by_phase)}" if by_phase else f"default: {field.default}"
        note = "" if field.default is None and not by_phase else f" ({default})"
        kind = next(t for t in (*get_args(hints[field.name]), hints[field.name]) if t is not type(None))
        options = dict(type=truth, nargs="?", const=True, metavar="BOOL") if kind is bool else \
            dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                            help=(comments[field.name] + note).replace("%", "%%"), **options)
    parser.error = lambda message: fail(f"{message} (see --help)", 2)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), hints, 1)
        fail(f"unknown argument {unknown[0]}" + (f", did you mean --{close[0]}?" if close else " (see --help)"), 2)
    return vars(given)


def truth(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def settle(given, saved):
    """The settings of a run: defaults, those of its phase, those of the run it goes on from, those given as flags."""
    phase = given.get("phase", Settings.phase)
    if phase not in DEFAULTS:
        raise ValueError(f"--phase must be one of {', '.join(map(str, DEFAULTS))}, not {phase}")
    if "epochs" in given and "max_steps" in given:
        raise ValueError("give --epochs or --max_steps, not both")
    saved = {name: value for name, value in saved.items() if name not in ("device", "out_dir", "wandb")}  # it may have moved
    settings = Settings(**{**DEFAULTS[phase], **saved, **given})
    if settings.out_dir is None:
        settings.out_dir = f"out/phase{phase}"
    for name, allowed in (("data", ("auto", *data.KINDS)), ("dtype", ("auto", "float32", "bfloat16"))):
        if getattr(settings, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, not {getattr(settings, name)!r}")
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} must be from {low:g} to {high:g}, not {value}")
    if "epochs" in given:
        settings.max_steps = math.ceil(settings.epochs * 60_000 / settings.batch_size)
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# AdamW (Loshchilov 2019, arXiv:1711.05101) on flat buffers: a handful of vector operations, whatever the model


def flatten(model, notes=0):
    """Make all parameters of a model views of one flat tensor, and their gradients of another. Matrices come first.

    Returns the two tensors, the second with `notes` elements more at its end, and how many elements belong to the matrices,
    which are what weight decay is for: biases, norms and positions are left alone. `.to()` and `zero_grad()` would break
    the views: `still_flat` tells.
    """
    parameters = sorted(model.named_parameters(), key=lambda item: not decays(*item))
    spans = [-(-parameter.numel() // 16) * 16 for _, parameter in parameters]  # 16 floats: 64 bytes, a cache line
    weights = torch.zeros(sum(spans), dtype=parameters[0][1].dtype, device=parameters[0][1].device)
    gradients = weights.new_zeros(len(weights) + notes)
    start = 0
    for (_, parameter), span in zip(parameters, spans):
        part = slice(start, start + parameter.numel())
        weights[part] = parameter.detach().flatten()
        parameter.data = weights[part].view_as(parameter)
        parameter.grad = gradients[part].view_as(parameter)
        start += span
    return weights, gradients, sum(span for item, span in zip(parameters, spans) if decays(*item))


def decays(name, parameter):
    return name.endswith("weight") and parameter.ndim > 1


def still_flat(model, weights, gradients):
    def within(tensor, flat):
        return tensor is not None and tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    return all(within(p.data, weights) and within(p.grad, gradients) for p in model.parameters())


def adamw_rates(step, lr, weight_decay, beta1, beta2):
    """The five numbers that `adamw` needs for a step, of which the first is step 1."""
    return [lr * weight_decay, 1 - beta1, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5]


def adamw(weights, gradients, mean, square, matrices, rates, eps=1e-8):
    """One step, in place. mean and square are the moving averages of gradients and their squares. rates: a tensor of
    `adamw_rates`, so that no step waits for the device; where all are 0, nothing changes."""
    decay, new_mean, new_square, step_size, correction = rates.unbind()
    weights[:matrices].mul_(1 - decay)
    mean.lerp_(gradients, new_mean)
    square.lerp_(gradients.square(), new_square)
    scale = square.sqrt().mul_(correction).add_(eps)
    weights.sub_(torch.div(mean, scale, out=scale).mul_(step_size))


def learning_rate(step, settings):
    """Of step 0, 1, ...: a linear rise over the first `warmup` of the run, then a linear fall to 0 at its end."""
    rise = settings.warmup * settings.max_steps
    return settings.lr * min((step + 1) / max(rise, 1), (settings.max_steps - step) / max(settings.max_steps - rise, 1))


def sampling_weights(losses, hard):
    """How often to draw each of N digits of such losses (N,), as shares of 1: a share `hard` of the draws goes by the root
    of the loss, the others are uniform, so that every digit comes again (after Loshchilov 2016, arXiv:1511.06343)."""
    root = (losses + 1e-8).sqrt()           # where all losses are 0, all digits are drawn alike
    return hard * root / root.sum() + (1 - hard) / len(root)


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def pick_device(name):
    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.zeros(1, device=name).device
        if device.index:  # streams and graphs are made on the current device
            torch.accelerator.set_device_index(device.index)
        return device
    except Exception as error:  # each backend has exceptions of its own for a device that is not there
        raise ValueError(f"--device={name} cannot be used here: {str(error).splitlines()[0]}") from None


def pick_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # an old torch does not tell
        fast = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each computes its part of every batch, and the gradients are added up

TIME_OUT = timedelta(minutes=5)  # after which a process that is waited for is given up


def join(device):
    """Join the processes that torchrun started, if it did. Returns this one's device, its rank and their number."""
    rank, processes, local = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if processes == 1:
        return device, 0, 1
    if device.type != "cpu":
        if local >= torch.accelerator.device_count():
            raise ValueError(f"process {local} has no device of its own: start at most {torch.accelerator.device_count()} on "
                             "this machine (--nproc_per_node)")
        torch.accelerator.set_device_index(local)
        device = torch.device(device.type, local)
    try:
        # torchrun's store outlives a restart, and with it the addresses of processes that are gone: every start has its own keys
        store, _, _ = next(dist.rendezvous("env://", timeout=TIME_OUT))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(dist.get_default_backend_for_device(device), timeout=TIME_OUT, store=store,
                                rank=rank, world_size=processes)
    except RuntimeError as error:
        raise ConnectionError(f"the processes did not find each other: {str(error).splitlines()[0][:200]}") from None
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return device, rank, processes


def reduce(tensor, how="SUM"):
    """Add a tensor up over all processes, in place. ConnectionError if one of them is gone."""
    if dist.is_available() and dist.is_initialized():
        try:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
        except RuntimeError as error:
            raise ConnectionError(f"another process is gone, so this one stops too ({str(error).splitlines()[0][:100]})") from None
    return tensor


def check_agreement(device, *facts):
    """Raise ValueError unless the facts are the same in all processes."""
    digest = int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=7).digest(), "big")
    most, least = reduce(torch.tensor([digest, -digest], device=device), "MAX").tolist()
    if most != -least:
        raise ValueError("the processes do not start alike: they need the same flags and data, and an --out_dir that they share")


# ---------------------------------------------------------------------------------------------------------------------
# The loop and what surrounds it


def predict(model, canvas, device, dtype):
    """uint8 canvases (B, H, W) -> float32 logits (B, gh, gw, classes), computed in dtype."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model(data.to_input(canvas)).float()


@torch.no_grad()
def evaluate(model, canvases, labels, classes, device, dtype, rank=0, processes=1):
    """Mean loss and accuracies (shares of 1, None where one does not apply) over canvases (n, H, W) and the labels
    (n, gh, gw) of their cells, where labels below `classes` are digits. Each process takes its share of them."""
    model.eval()
    totals = torch.zeros(6, dtype=torch.float64)
    some = data.at_once(canvases)
    for canvas, label in zip(canvases[rank::processes].split(some), labels[rank::processes].split(some)):
        label = label.to(device)
        logits = predict(model, canvas.to(device), device, dtype)
        loss = F.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="sum")
        right, digit = logits.argmax(-1) == label, label < classes
        totals += torch.tensor([part.item() for part in (
            loss, digit.sum(), (right & digit).sum(), (~digit).sum(), (right & ~digit).sum(), right.flatten(1).all(1).sum())])
    if processes > 1:
        totals = reduce(totals.to(device))
    loss, digits, digits_right, empties, empties_right, exact = totals.tolist()
    return {"loss": loss / (digits + empties), "cell_accuracy": (digits_right + empties_right) / (digits + empties),
            "digit_accuracy": digits_right / digits if digits else None,
            "empty_accuracy": empties_right / empties if empties else None, "exact_match": exact / len(canvases)}


def save(path, checkpoint):
    """Write a checkpoint whole, or not at all (OSError)."""
    content = io.BytesIO()
    torch.save(checkpoint, content)  # to memory: on a full disk it would fail in ways of its own
    data.write_whole(path, content.getbuffer())


@contextlib.contextmanager
def signals_noted():
    """A list of the signals that ask the program to stop: SIGINT (Ctrl-C) and SIGTERM. A second one ends it at once."""
    noted = []

    def note(number, _):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_checkpoint(path, phase):
    """The checkpoint of a phase, as `save` wrote it. Nothing but tensors and plain values is unpickled."""
    if not path.exists():
        raise OSError(f"there is no checkpoint {path}: train first")
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            version, names = checkpoint["version"], set(checkpoint["settings"])
        except Exception as error:  # torch.load has many kinds of them for a file that it cannot make sense of
            raise ValueError(f"{path} is not a checkpoint of train.py: {' '.join(str(error).split())[:200]}") from None
    hints = get_type_hints(Settings)
    if version != 2 or names != set(hints):
        raise ValueError(f"{path} was written by another version of train.py")
    kinds = {"phase": int, "data": str, "canvas": dict, "config": dict, "step": int, "since": int, "seconds": float,
             "train_seconds": float, "model": dict, "average": dict, "mean": torch.Tensor, "square": torch.Tensor,
             "sums": torch.Tensor, "hardness": torch.Tensor}
    odd = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    odd += [name for name, value in checkpoint["settings"].items() if type(value) not in (get_args(hints[name]) or (hints[name],))]
    if odd or not 0 <= checkpoint["since"] <= checkpoint["step"]:
        raise ValueError(f"{path} is damaged: {', '.join(odd or ['step'])} cannot be right")
    if checkpoint["phase"] != phase:
        raise ValueError(f"{path} is of phase {checkpoint['phase']}, not {phase}")
    return checkpoint


def check_fits(path, checkpoint, kind, config, free):
    """Raise ValueError where a checkpoint is of another kind of digits, or of a model that differs in more than `free`."""
    if checkpoint["data"] != kind:
        raise ValueError(f"{path} was trained on {checkpoint['data']} digits, these are {kind} ones")
    changed = [name for name, value in asdict(config).items() if name not in free and checkpoint["config"].get(name) != value]
    if changed:
        raise ValueError(f"{path} has another model: {', '.join(changed)} cannot change")


def restore(path, checkpoint, model, averaged, **tensors):
    """Copy a checkpoint's weights and tensors into those of a run. ValueError where they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
        averaged.load_state_dict(checkpoint["average"])
        for name, tensor in tensors.items():
            if checkpoint[name].shape != tensor.shape:
                raise ValueError(f"{name} has {checkpoint[name].numel()} values, not {tensor.numel()}")
            tensor.copy_(checkpoint[name])
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be resumed: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def seed_of(*key):
    """A seed that depends on nothing but the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def capture(step, generator, processes, *changed):
    """On a CUDA device, a graph of `step` to call in its place: hundreds of kernels are launched as one, and draw from the
    generators as these are then seeded. Elsewhere, for several processes and where it fails, `step` itself.

    Trying it takes steps at learning rate 0, which change nothing but the tensors `changed`. Those are put back.
    """
    if generator.device.type != "cuda":
        return step
    before, replay = [tensor.clone() for tensor in changed], step
    try:
        if processes > 1:
            raise RuntimeError("several processes train")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries set themselves up, which cannot be captured
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    except (RuntimeError, AttributeError) as error:
        print(f"no CUDA graph of the training step, so each kernel is launched by itself: {' '.join(str(error).split())[:200]}")
    for tensor, value in zip(changed, before):
        tensor.copy_(value)
    return replay


def keep_beside(*paths):
    """Rename the files of another run, all with the same number, the first under which nothing is kept yet."""
    number = next(n for n in itertools.count(1) if not any(Path(f"{path}.{n}").exists() for path in paths))
    for path in paths:
        if path.exists():
            os.replace(path, f"{path}.{number}")
            print(f"{path} is another run's: kept as {path}.{number}")


def cut_back(path, step):
    """Drop the lines of a metrics file that come after a step, where a resumed run goes on."""
    if path.exists():
        lines = []
        for line in path.read_text().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:  # torn when the run was killed
                break
            lines.append(line)
        data.write_whole(path, "".join(lines).encode())


def show(text, shown, keep=False):
    """Print a line of progress: in place on a terminal, every 10 s elsewhere, for good where `keep`. `shown` is when
    the last line was; returns it anew."""
    terminal = sys.stdout.isatty()
    if not terminal and not keep and time.perf_counter() - shown < 10:
        return shown
    if terminal:
        text = "\r\033[K" + text[:shutil.get_terminal_size().columns - 1 if not keep else None]
    print(text, end="\n" if keep or not terminal else "", flush=True)
    return time.perf_counter()


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def percent(share):
    return "-" if share is None else f"{100 * share:.2f}%"


def table(result, rows):
    """The figures of an evaluation and some more, a line each."""
    mark = "" if result["data"].startswith("mnist") else f"   ({result['data']} digits: this says nothing about MNIST)"
    rows = {**{title: percent(result[key]) + mark for title, key in (
        ("digit accuracy", "digit_accuracy"), ("empty accuracy", "empty_accuracy"), ("cell accuracy", "cell_accuracy"),
        ("exact canvases", "exact_match"))}, **rows}
    return "\n".join(f"{title:>16}  {value}" for title, value in rows.items())


def start_wandb(settings, config):
    """Begin a run of Weights & Biases and return its module, imported here alone. WANDB_MODE=offline needs no network."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the package wandb: pip install wandb") from None
    Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
    try:
        wandb.init(project="vit-digits", name=Path(settings.out_dir).name, dir=settings.out_dir,
                   config={**asdict(settings), "model": asdict(config)})
    except wandb.errors.Error as error:
        raise ValueError(f"--wandb: {' '.join(str(error).split())} (WANDB_MODE=offline needs no account)") from None
    return wandb


def log_evaluation(wandb, result, canvases, readings, weights, gradients):
    captions = [", ".join(f"{digit} ({percent(share)})" for digit, _, _, share in reading) or "nothing" for reading in readings]
    wandb.log({**{f"eval/{name}": value for name, value in result.items() if isinstance(value, float)},
               "samples": [wandb.Image(canvas, caption=caption) for canvas, caption in zip(canvases.numpy(), captions)],
               "weights": wandb.Histogram(weights.tolist()), "gradients": wandb.Histogram(gradients.tolist())},
              step=result["step"])


def model_config(settings, options):
    return ViTConfig(image_size=options["size"], num_classes=options["classes"] + data.has_empty_cells(settings.phase),
                     cell=data.PHASES[settings.phase].cell, **{name: getattr(settings, name) for name in (
                         "patch_size", "overlap", "dim", "depth", "heads", "mlp_ratio", "positions", "window", "dropout",
                         "drop_path")})


def training_options(settings, options):
    """The options of training canvases: more digits than are evaluated teach more a second, and so do harder ones."""
    if not data.has_empty_cells(settings.phase):
        if settings.train_digits or settings.crowded or settings.borders:
            raise ValueError(f"phase {settings.phase} has a digit in every cell: --train_digits, --crowded and --borders do not apply")
        return options
    most = max(options["max_digits"], min(settings.train_digits or 0, data.most_digits(options)))
    return {**options, "max_digits": most, "crowded": settings.crowded or 0.0, "borders": settings.borders or 0.0}


def prepare(settings):
    """The digits to train on, the canvases to evaluate on, the options that both were asked for, the kind of the digits."""
    images, labels, kind = data.load_digits(settings.data, settings.data_dir, "train")
    if settings.val_digits >= len(images):
        raise ValueError(f"--val_digits={settings.val_digits} leaves none of {len(images)} digits for training")
    if settings.val_digits:  # the last ones, which then train nothing
        test_digits = images[-settings.val_digits:], labels[-settings.val_digits:]
        images, labels = images[:-settings.val_digits], labels[:-settings.val_digits]
    else:
        test_digits = data.load_digits(kind, settings.data_dir, "test")[:2]
    canvas = {"size": settings.canvas_size, "max_digits": settings.max_digits, "min_distance": settings.min_distance}
    canvas["classes"] = int(labels.max()) + 1
    if test_digits[1].max() >= canvas["classes"]:
        raise ValueError(f"test labels go up to {test_digits[1].max()}, training labels only to {labels.max()}")
    return (images, labels), data.test_canvases(settings.phase, *test_digits, settings.test_canvases, **canvas), canvas, kind


# ---------------------------------------------------------------------------------------------------------------------
# The device smoke test

# Largest relative L2 difference of the logits, of all gradients together and of one parameter's gradient
TOLERANCE = {torch.float32: (1e-5, 1e-5, 3e-5), torch.bfloat16: (0.03, 0.03, 0.05)}
SMOKE_STEPS, SMOKE_FALL = 30, 0.7   # training steps on one batch, after which its loss is to be below this share of the first
SMOKE_AUGMENTATION = dict(rotate=10.0, scale=0.1, shear=0.1, shift=1.0, elastic=1.0)
SMOKE_SAME = 0.98                   # least share of px and of labels: where rounding tips the edge of an ink box, a digit moves


def smoke(settings):
    """Check a device against float64 on the CPU, and measure its speed, with digits drawn by the program. Prints a line for
    each check; returns whether all passed."""
    device, passed = pick_device(settings.device), []

    def check(name, good, figure):
        passed.append(bool(good))
        print(f"{'PASS' if good else 'FAIL'}  {name}: {figure}", flush=True)

    def wait():
        if device.type != "cpu":
            torch.accelerator.synchronize()

    def difference(found, expected):
        """Relative L2 difference. NaN where any value is."""
        return ((found.cpu().double() - expected).norm() / expected.norm()).item()

    # Canvases, from the same random numbers and from the device's own
    digits = data.drawn_digits(500, seed=settings.seed)
    options = data.canvas_options(settings.phase, *digits, settings.canvas_size, settings.max_digits, settings.min_distance,
                                  crowded=settings.crowded or 0.0, borders=settings.borders or 0.0)

    def draw(place, source):
        return data.canvases(settings.phase, *(tensor.to(place) for tensor in digits), 32,
                             torch.Generator(source).manual_seed(settings.seed), SMOKE_AUGMENTATION,
                             weights=torch.arange(len(digits[0]), device=place).float(), **options)

    canvas, cells = draw("cpu", "cpu")
    found, labels = (tensor.cpu() for tensor in draw(device, "cpu"))
    same = min(((found.int() - canvas.int()).abs() <= 2).double().mean().item(), (labels == cells).double().mean().item())
    check("canvases", same >= SMOKE_SAME, f"{percent(same)} as drawn on the CPU, at least {percent(SMOKE_SAME)} is right")
    once, twice = draw(device, device), draw(device, device)
    same = all(torch.equal(*pair) for pair in zip(once, twice))
    check("random numbers", same, "one seed, one draw" if same else "one seed, two draws")

    torch.manual_seed(settings.seed)
    expected = ViT(model_config(settings, options)).double()
    right = expected(data.to_input(canvas).double())
    F.cross_entropy(right.flatten(0, 2), cells.flatten()).backward()
    right_gradients = {name: parameter.grad.flatten() for name, parameter in expected.named_parameters()}
    canvas, target = canvas.to(device), cells.to(device).flatten()

    # One dtype after the other: float32, and what training would take
    for dtype in dict.fromkeys((torch.float32, pick_dtype(settings.dtype, device))):
        name, (tolerance, gradient_tolerance, one_tolerance) = str(dtype).split(".")[1], TOLERANCE[dtype]
        model = ViT(expected.config)
        model.load_state_dict(expected.state_dict())
        model.to(device)
        weights, gradients, matrices = flatten(model)
        forward = torch.compile(model) if settings.compile else model

        def forward_backward():
            gradients.zero_()
            logits = predict(forward, canvas, device, dtype)
            loss = F.cross_entropy(logits.flatten(0, 2), target)
            loss.backward()
            return logits.detach(), loss.detach()

        logits, first_loss = forward_backward()
        off = difference(logits, right.detach())
        check(f"{name} logits", off <= tolerance, f"{off:.1e} off, at most {tolerance:g} is right")
        found = {key: parameter.grad.flatten() for key, parameter in model.named_parameters()}
        off = difference(torch.cat(list(found.values())), torch.cat(list(right_gradients.values())))
        check(f"{name} gradients", off <= gradient_tolerance, f"{off:.1e} off, at most {gradient_tolerance:g} is right")
        each = {key: difference(gradient, right_gradients[key]) for key, gradient in found.items()}
        key = max(each, key=lambda key: math.inf if math.isnan(each[key]) else each[key])
        check(f"{name} gradient of each parameter", each[key] <= one_tolerance,
              f"{each[key]:.1e} off ({key}), at most {one_tolerance:g} is right")

        # AdamW, the same step in float64 on the CPU
        mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
        rates = torch.tensor(adamw_rates(1, settings.lr, settings.weight_decay, settings.beta1, settings.beta2))
        wanted = weights.cpu().double()                                 # in this order: not every device has float64
        adamw(wanted, gradients.cpu().double(), wanted * 0, wanted * 0, matrices, rates.double())
        adamw(weights, gradients, mean, square, matrices, rates.to(device))
        off = difference(weights, wanted)
        check(f"{name} AdamW", off <= 1e-5, f"{off:.1e} off, at most 1e-05 is right")

        for step in range(2, SMOKE_STEPS + 1):
            if step == 11:                                              # what comes before warms up
                wait()
                began = time.perf_counter()
            loss = forward_backward()[1]
            rates = adamw_rates(step, settings.lr * min(1, step / 10), settings.weight_decay, settings.beta1, settings.beta2)
            gradients.mul_((1 / (gradients.norm() + 1e-6)).clamp(max=1))
            adamw(weights, gradients, mean, square, matrices, torch.tensor(rates).to(device))
        wait()
        seconds = (time.perf_counter() - began) / (SMOKE_STEPS - 10)
        fall = (loss / first_loss).item()
        check(f"{name} training", fall <= SMOKE_FALL, f"loss {first_loss.item():.3f} to {loss.item():.3f} in {SMOKE_STEPS} steps, "
              f"at most {SMOKE_FALL:g} of the first is right")
        finite = all(tensor.isfinite().all() for tensor in (weights, gradients, mean, square))
        check(f"{name} finite", finite, "weights, gradients and moments" if finite else "NaN or infinity in weights, gradients or moments")
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        again = torch.load(file, map_location="cpu", weights_only=True)
        same = all(torch.equal(tensor.cpu().view(torch.uint8), again[key].view(torch.uint8))  # NaN too
                   for key, tensor in model.state_dict().items())
        check(f"{name} save and load", same, "bit-identical" if same else "what is loaded is not what was saved")

        # Speed, and how near it comes to that of a large matrix product
        side = 1024 if device.type == "cpu" else 8192
        one = torch.randn(side, side, device=device, dtype=dtype)
        one @ one
        wait()
        began = time.perf_counter()
        for _ in range(5):
            one @ one
        wait()
        peak = 5 * 2 * side**3 / (time.perf_counter() - began)
        reached = 3 * expected.config.flops() * len(canvas) / seconds   # a backward pass takes twice a forward pass
        print(f"      {name}: {1e3 * seconds:.1f} ms a step of {len(canvas)}, {len(canvas) / seconds:,.0f} images/s, "
              f"{reached / 1e12:.3g} of {peak / 1e12:.3g} TFLOP/s ({percent(reached / peak)})")

    print(f"{device_name(device)}, torch {torch.__version__}: "
          f"{'all right' if all(passed) else f'{passed.count(False)} of {len(passed)} checks FAILED'}")
    return all(passed)


def device_name(device):
    """What a device is, its driver and the most memory that it has used."""
    if device.type == "cuda":
        driver = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        return f"{torch.cuda.get_device_name(device)}, {driver}, {peak:,.0f} MiB at most"
    if device.type == "cpu" and sys.platform == "linux":  # elsewhere the unit is another, or there is no such module
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {peak:,.0f} MiB at most"
    return f"{device}"


def main(arguments=None):
    given = parse(arguments)
    try:
        if given.get("smoke"):
            raise SystemExit(0 if smoke(settle(given, {})) else 1)
        run(given)
    except ValueError as error:         # what was asked for makes no sense
        fail(error, 2)
    except OSError as error:            # it makes sense, but a file or the network does not play along
        fail(error, 1)
    except (RuntimeError, NotImplementedError) as error:
        if not given.get("smoke"):
            raise
        fail(f"FAIL, this device cannot run it: {str(error).splitlines()[0]}", 1)
    except FloatingPointError as error:
        print()                         # the progress line ends here
        fail(error, 1)
    except KeyboardInterrupt:
        print()
        fail("stopped", 130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def run(given):
    # Settings, and the checkpoint to go on from
    started = time.perf_counter()
    settings, checkpoint = settle(given, {}), None
    path = Path(settings.out_dir) / "ckpt.pt"
    if settings.eval_only or settings.resume and path.exists():
        checkpoint = load_checkpoint(path, settings.phase)
        settings = settle(given, checkpoint["settings"])
    device, rank, processes = join(pick_device(settings.device))
    if settings.batch_size < processes:
        raise ValueError(f"--batch_size={settings.batch_size} is less than one canvas for each of {processes} processes")
    dtype = pick_dtype(settings.dtype, device)

    # Digits, canvases, model
    digits, test_set, canvas_asked, kind = prepare(settings)
    check_agreement(device, {**asdict(settings), "data_dir": None}, str(dtype), kind, checkpoint and checkpoint["step"], torch.__version__)
    options = data.canvas_options(settings.phase, *digits, **canvas_asked)
    train_options = training_options(settings, options)
    config = model_config(settings, options)
    if checkpoint:
        check_fits(path, checkpoint, kind, config, free=("image_size", "dropout", "drop_path") if settings.eval_only else ())
        trained = ViT.load(path)  # refuses tensors that do not fit, before a model of that size takes memory

    def evaluation(model, **when):
        result = evaluate(model, *test_set, options["classes"], device, dtype, rank, processes)
        return {"event": "eval", "phase": settings.phase, "data": kind + "-val" * bool(settings.val_digits), **when, **result}

    if settings.eval_only or checkpoint and checkpoint["step"] >= settings.max_steps:
        print(table(evaluation(trained.to(device)), {"checkpoint": path}))
        return

    wandb = start_wandb(settings, config) if settings.wandb and rank == 0 else None

    # The moving average of the weights is a second model; both are on flat buffers
    torch.manual_seed(settings.seed)
    model = ViT(config).to(device)
    averaged = copy.deepcopy(model).eval()
    cells_of_batch = settings.batch_size * test_set[1][0].numel()
    weights, reduced, matrices = flatten(model, notes=4 + 2 * cells_of_batch)
    # What one `reduce` adds up. notes: loss, digits, digits right, wish to stop. seen: the number of the digit in each cell of
    # the batch (in float32, exact up to 2**24), then the cells' losses; 0 where another process has that part of the batch
    gradients, notes, seen = reduced.split((len(weights), 4, 2 * cells_of_batch))
    seen = seen.view(2, settings.batch_size, -1)
    average, _, _ = flatten(averaged)
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    sums, since = torch.zeros(3, device=device), 0                     # of loss, digits and digits right, since the last log line
    alarms = torch.zeros(2, device=device)                             # steps that were not finite, wishes to stop
    # The loss of each training digit, a moving average over the times that it is drawn, in which the last one counts half;
    # at first, and at most, that of a guess. One more takes the losses of empty cells and is never read.
    guess = math.log(config.num_classes)
    hardness = torch.full((len(digits[0]) + 1,), guess, device=device)
    step, seconds_before, train_seconds = 0, 0.0, 0.0
    log_path = path.with_name("metrics.jsonl")
    if checkpoint:
        if len(checkpoint["hardness"]) != len(hardness):
            raise ValueError(f"{path} was trained on {len(checkpoint['hardness']) - 1:,} digits, these are {len(hardness) - 1:,}")
        restore(path, checkpoint, model, averaged, mean=mean, square=square, sums=sums, hardness=hardness)
        since, step, seconds_before, train_seconds = (checkpoint[key] for key in ("since", "step", "seconds", "train_seconds"))
        if rank == 0:
            cut_back(log_path, step)
    elif rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            keep_beside(log_path, path)
        log_path.unlink(missing_ok=True)  # of a run that never came to save anything

    # Train
    print(f"phase {settings.phase}: {options['size']} x {options['size']} px, {len(digits[0]):,} {kind} digits for training\n"
          f"model: {sum(p.numel() for p in model.parameters()):,} parameters on {device}, {str(dtype).split('.')[1]}, "
          f"{'compiled' if settings.compile else 'not compiled'}\n"
          f"run: step {step:,} to {settings.max_steps:,}, {settings.batch_size} canvases each, seed {settings.seed}, "
          f"in {path.parent}" + (f", {processes} processes" if processes > 1 else ""))
    part = slice(rank * settings.batch_size // processes, (rank + 1) * settings.batch_size // processes)
    images, labels = (tensor.to(device) for tensor in digits)
    # Training canvases are labelled with the digits' numbers, not their classes: so it is known whose a loss is
    numbers = torch.arange(len(images), device=device)
    train_options = {**train_options, "classes": len(images)}
    class_of = F.pad(labels, (0, 1), value=options["classes"])         # (N + 1,): the number after the last is of empty cells
    augmentation = {name: getattr(settings, name) for name in ("rotate", "scale", "shear", "shift", "elastic")}
    augmentation = {**augmentation, "elastic_points": settings.elastic_points} if any(augmentation.values()) else None
    forward = torch.compile(model) if settings.compile else model
    if settings.compile:  # now, so that the clock of the training does not count it
        blank = torch.zeros(part.stop - part.start, options["size"], options["size"], dtype=torch.uint8, device=device)
        predict(forward, blank, device, dtype).sum().backward()

    # glibc gives freed memory back to the system, and every step takes it anew, page by page: up to a tenth of its time on a
    # CPU. Once a block of nearly 32 MiB, the most that counts, was freed, it keeps smaller ones (mallopt(3), M_MMAP_THRESHOLD).
    torch.empty(2**25 - 2**16, dtype=torch.uint8)

    # A step is on the device as a whole and waits for nothing: what changes from one to the next is in the generators and
    # in `dials`, which are six rates and the wish to stop.
    model.train()
    generator = torch.Generator(device)
    dials, norm = torch.zeros(7, device=device), torch.zeros((), device=device)

    def take_step():
        # Draw, forward, backward: this process's part of the batch
        how_often = sampling_weights(hardness[:-1], settings.hard) if settings.hard else None
        canvas, which = data.canvases(settings.phase, images, numbers, settings.batch_size, generator, augmentation, part,
                                      how_often, **train_options)
        cells = class_of[which]
        logits = predict(forward, canvas, device, dtype)
        # Most cells of phase 3 are empty, and all count alike: empty ones weighted 0.2 found more digits (91.1% against
        # 83.7%, after 400 steps of 128) but saw so many where there are none that exact canvases fell from 62.0% to
        # 51.2%. Canvases with more digits (train_digits) are the cure: 65.9%.
        losses = F.cross_entropy(logits.flatten(0, 2), cells.flatten(), reduction="none")
        loss = losses.sum() / cells_of_batch
        reduced.zero_()
        loss.backward()
        digit = cells < options["classes"]
        right = digit & (logits.argmax(-1) == cells)
        notes.copy_(torch.stack((loss.detach(), digit.sum(), right.sum(), dials[6])))
        seen[0, part], seen[1, part] = which.flatten(1), losses.detach().view(len(which), -1)
        reduce(reduced)

        # Clip, AdamW, average, hardness. A step that is not finite changes no weight
        norm.copy_(gradients.norm())
        finite = (norm + notes[0]).isfinite()
        if settings.grad_clip:
            gradients.mul_((settings.grad_clip / (norm + 1e-6)).clamp(max=1))
        gradients.masked_fill_(~finite, 0)
        rates = dials[:6] * finite
        adamw(weights, gradients, mean, square, matrices, rates[:5])
        average.lerp_(weights, rates[5])
        sums.add_(notes[:3])
        alarms.add_(torch.stack((~finite, notes[3])))
        number, cell_loss = seen.flatten(1)
        hardness.scatter_reduce_(0, number.long(), cell_loss.nan_to_num(guess).clamp(0, guess), "mean")     # old and new ones

    advance = capture(take_step, generator, processes, sums, alarms, hardness)
    first, spent, mark = step, 0.0, time.perf_counter()
    shown = saved = mark
    with open(log_path if rank == 0 else os.devnull, "a") as log, signals_noted() as noted:
        while step < settings.max_steps:
            generator.manual_seed(seed_of(settings.seed, step, "canvases"))
            torch.manual_seed(seed_of(settings.seed, step, "dropout", rank))
            lr = learning_rate(step, settings)
            step += 1
            rates = adamw_rates(step, lr, settings.weight_decay, settings.beta1, settings.beta2)
            rates.append(1 - min(settings.average, step / (step + 10)))        # early on, a shorter average
            dials.copy_(torch.tensor([*rates, len(noted)]), non_blocking=device.type == "cuda")  # others may read it too late
            advance()

            # Log, evaluate, save
            final = step == settings.max_steps
            evaluate_now = final or settings.eval_every and step % settings.eval_every == 0
            log_now = evaluate_now or step % settings.log_every == 0
            if not (log_now or device.type == "cpu" or step % 10 == 0):
                continue  # to read a number makes an accelerator wait
            skipped, stopping = alarms.tolist()
            if skipped:
                raise FloatingPointError(f"the loss or its gradient is not finite by step {step}, at learning rate {lr:.2g}: try a "
                                         f"lower --lr; {path} is from an earlier step, if it is there")
            save_now = rank == 0 and (final or stopping or time.perf_counter() - saved > settings.save_every)
            if not (log_now or save_now or stopping):
                continue
            now = time.perf_counter()
            train_seconds, spent, mark = train_seconds + now - mark, spent + now - mark, now
            if log_now:
                loss_sum, digits_seen, digits_right = sums.tolist()
                line = {"event": "train", "step": step, "seconds": seconds_before + now - started,
                        "loss": loss_sum / (step - since), "lr": lr, "grad_norm": norm.item(),
                        "images_per_second": (step - max(since, first)) * settings.batch_size / spent}
                since, spent = step, 0.0
                sums.zero_()
                print(json.dumps(line), file=log, flush=True)
                if wandb:
                    wandb.log({**{f"train/{name}": value for name, value in line.items() if name != "event"},
                               "train/digit_accuracy": digits_right / max(digits_seen, 1)}, step=step)
                shown = show(f"step {step:,}/{settings.max_steps:,}  loss {line['loss']:.4f}  "
                             f"{kind} digits {percent(digits_right / max(digits_seen, 1))}  {line['images_per_second']:,.0f} images/s  "
                             f"ETA {clock(train_seconds / step * (settings.max_steps - step))}", shown)
            if evaluate_now:
                result = evaluation(averaged, step=step, seconds=seconds_before + time.perf_counter() - started,
                                    train_seconds=train_seconds, final=final)
                print(json.dumps(result), file=log, flush=True)
                show(f"step {step:,}  {clock(train_seconds)}  {result['data']}: loss {result['loss']:.4f}  "
                     f"digits {percent(result['digit_accuracy'])}  empty {percent(result['empty_accuracy'])}  "
                     f"exact canvases {percent(result['exact_match'])}", shown, keep=True)
                if wandb:
                    some = test_set[0][:8]
                    readings = data.read(predict(averaged, some.to(device), device, dtype).detach(),
                                         options["classes"] if data.has_empty_cells(settings.phase) else None)
                    log_evaluation(wandb, result, some, readings, weights, gradients)
                mark = time.perf_counter()
            if save_now:
                assert still_flat(model, weights, gradients), "a parameter is no longer a view of the flat buffer"
                save(path, {"version": 2, "phase": settings.phase, "canvas": canvas_asked, "data": kind,
                            "config": asdict(config), "settings": asdict(settings), "step": step,
                            "seconds": seconds_before + time.perf_counter() - started, "train_seconds": train_seconds,
                            "model": model.state_dict(), "average": averaged.state_dict(), "mean": mean, "square": square,
                            "sums": sums, "since": since, "hardness": hardness})
                saved = time.perf_counter()
            if stopping and not final:
                reduce(alarms)  # that is, wait until the first process has saved
                print()
                code = 128 + (noted or [signal.SIGTERM])[0]
                if rank:
                    raise SystemExit(code)
                fail(f"stopped at step {step:,} of {settings.max_steps:,} and saved: the same command with --resume goes on", code)
    if wandb:
        artifact = wandb.Artifact(f"phase{settings.phase}", type="model")
        artifact.add_file(str(path))
        wandb.log_artifact(artifact)
        wandb.finish()
    print(table(result, {"training": f"{train_seconds:.1f} s", "images/s": f"{step * settings.batch_size / train_seconds:,.0f}",
                         "checkpoint": path}))


if __name__ == "__main__":
    main()
