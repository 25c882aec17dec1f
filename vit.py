"""A Vision Transformer in one file: torch and the standard library, nothing else. Copy it into your own project.

    model = ViT(ViTConfig(image_size=32, patch_size=4, in_channels=3, num_classes=10, dim=192, depth=12, heads=3))
    logits = model(images)                  # (B, 3, 32, 32) -> (B, 10)

With `cell` > 0 the same model labels every cell of a grid over the image, so it finds things as well as naming them:

    model = ViT(ViTConfig(image_size=64, patch_size=8, cell=8, num_classes=11))
    logits = model(images)                  # (B, 1, 64, 64) -> (B, 8, 8, 11)

An image goes through it as patches -> tokens -> `depth` blocks of attention and MLP -> norm -> head: `ViT.forward`.
With a class token, parameters have the names and shapes of timm's VisionTransformer, so that public weights load.
Sources: ViT (Dosovitskiy 2021, arXiv:2010.11929), pre-norm blocks (Xiong 2020, arXiv:2002.04745), rotary positions (Su
2021, arXiv:2104.09864) along both axes (Heo 2024, arXiv:2403.13298), attention within a window (Ramachandran 2019,
arXiv:1906.05909), drop path (Huang 2016, arXiv:1603.09382).
"""
import math
import os
import pickletools
import re
import reprlib
import zipfile
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ViTConfig:
    image_size: int = 28        # px, side of the square image that the learned positions are laid out for
    patch_size: int = 7         # px, side of a patch: one token each
    overlap: int = 0            # px that the patch projection sees beyond its patch, on each side
    in_channels: int = 1
    num_classes: int = 10
    dim: int = 64               # width of a token
    depth: int = 4              # number of blocks
    heads: int = 4              # attention heads in a block, each dim / heads wide
    mlp_ratio: float = 2.0      # hidden width of the MLP, in units of dim
    dropout: float = 0.0        # share of activations dropped in training
    drop_path: float = 0.0      # drop path rate of the last block in training; it rises linearly from 0
    class_token: bool = False   # a token of its own for the whole image, read by the head; else the mean over tokens
    cell: int = 0               # px, side of the cells that get a label each; 0: one label for the whole image
    positions: str = "learned"  # "learned": a vector a patch. "rotary": queries and keys turn with row and column
    window: int = 0             # patches that attention reaches on each side (dense mask: no speed-up); 0: everywhere

    @classmethod
    def preset(cls, name, **changes):
        """A standard model for ImageNet, "Ti", "S", "B" or "L" with patches of 16 px; other fields as given."""
        if name not in PRESETS:
            raise ValueError(f"the presets are {', '.join(PRESETS)}, not {name!r}")
        dim, depth, heads = PRESETS[name]
        standard = dict(image_size=224, patch_size=16, in_channels=3, num_classes=1000, dim=dim, depth=depth,
                        heads=heads, mlp_ratio=4.0, class_token=True)
        return cls(**{**standard, **changes})

    def __post_init__(self):
        for name in (f.name for f in fields(self) if f.type in (int, "int")):
            value, least = getattr(self, name), 0 if name in ("overlap", "cell", "window") else 1
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number from {least} up, not {reprlib.repr(value)}")
        for name, kinds in (("mlp_ratio", (int, float)), ("dropout", (int, float)), ("drop_path", (int, float)),
                            ("class_token", (bool,))):
            if type(getattr(self, name)) not in kinds:
                raise ValueError(f"{name} must be a {kinds[-1].__name__}, not {reprlib.repr(getattr(self, name))}")
        if not (self.mlp_ratio < math.inf and self.dim * self.mlp_ratio >= 1):
            raise ValueError(f"mlp_ratio must give the MLP at least one channel, not be {reprlib.repr(self.mlp_ratio)}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {reprlib.repr(getattr(self, name))}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.cell and (self.cell % self.patch_size or self.image_size % self.cell):
            raise ValueError(f"cell {self.cell} must be a multiple of patch_size {self.patch_size} "
                             f"and divide image_size {self.image_size}")
        if self.cell and self.class_token:
            raise ValueError("class_token is for one label per image: with cell > 0 every cell reads its own tokens")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f'positions must be "learned" or "rotary", not {reprlib.repr(self.positions)}')
        if self.positions == "rotary" and self.dim // self.heads % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4 wide, not {self.dim} / {self.heads}")

    @property
    def mlp_dim(self):
        return int(self.dim * self.mlp_ratio)

    def num_parameters(self):
        """Of the whole model, counted without building it in memory."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in ViT(self).parameters())

    def flops(self, height=None, width=None):
        """FLOPs of a forward pass of one image of height x width px (default: image_size). A multiply-add counts as 2,
        and only matrix products count."""
        height, width = height or self.image_size, width or self.image_size
        patches = (height // self.patch_size) * (width // self.patch_size)
        tokens = patches + self.class_token
        labels = (height // self.cell) * (width // self.cell) if self.cell else 1
        patch = self.in_channels * (self.patch_size + 2 * self.overlap) ** 2
        block = tokens * self.dim * (4 * self.dim + 2 * self.mlp_dim + 2 * tokens)  # qkv and proj, MLP, attention
        return 2 * (patches * patch * self.dim + self.depth * block + labels * self.dim * self.num_classes)


# Width, blocks and heads (Dosovitskiy 2021, table 1; Ti and S: Touvron 2021, arXiv:2012.12877, table 1)
PRESETS = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def read_checkpoint(path):
    """What torch.save wrote to a file, on the CPU. Only tensors and plain values are read, so a file cannot run code,
    and never more bytes than it has. ValueError in one line for all else, OSError where there is no such file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a regular file")            # a pipe would be waited for
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            if sum(record.file_size for record in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise ValueError("it unpacks to more bytes than it has")
            if archive.testzip():
                raise ValueError("it is damaged: its contents do not match their checksums")
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            for opcode, name, _ in pickletools.genops(archive.read(pickled)):
                if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                    raise ValueError("it is not of tensors and plain values in pickle protocol 2")
                if opcode.name == "GLOBAL" and name not in PLAIN and not re.fullmatch(r"torch \w+Storage", name):
                    raise ValueError(f"it holds {name.replace(' ', '.')[:100]}; only tensors and plain values are read")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except ValueError:
            raise
        except Exception as error:  # of many kinds, and torch's messages advise to let a file run code
            raise ValueError(f"it is damaged, or no file of torch.save ({type(error).__name__})") from None


# What a pickle of tensors and plain values calls
PLAIN = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size"}


def drop_path(branch, rate, training):
    """A residual branch (B, N, dim), left out for a share `rate` of the images and scaled up for the others."""
    if not training or rate == 0:
        return branch
    keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= rate
    return branch * keep.to(branch.dtype) / (1 - rate)


def rotary_table(rows, columns, head_dim, prefix, device):
    """Cosines and sines, each (prefix + rows * columns, head_dim), that turn the heads of the patch at each row and
    column, and leave the prefix as it is.

    Half of a head's pairs of channels turn with the row, half with the column, at frequencies from 1 radian a patch
    down to 1/100: fast enough to tell neighbours apart, slow enough to tell the ends of a long image apart.
    """
    frequency = 100 ** -torch.linspace(0, 1, head_dim // 4, device=device)
    by_row = torch.arange(rows, device=device)[:, None] * frequency        # (rows, head_dim / 4)
    by_column = torch.arange(columns, device=device)[:, None] * frequency  # (columns, head_dim / 4)
    angle = torch.cat((by_row[:, None].expand(-1, columns, -1), by_column.expand(rows, -1, -1)), dim=-1).flatten(0, 1)
    angle = F.pad(angle, (0, 0, prefix, 0))                                # (prefix + N, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)   # the signs that `rotate` needs


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + head_dim / 2) of x (..., N, head_dim) by the angles of `rotary_table`."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


def window_bias(rows, columns, window, prefix, device):
    """What is added to attention scores, (prefix + rows * columns) on either side: 0 between patches at most `window`
    rows and `window` columns apart, and from and to the prefix; -inf elsewhere."""
    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    near_rows, near_columns = ((line[:, None] - line).abs() <= window for line in (row, column))
    near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)      # (N, N)
    near = F.pad(near, (prefix, 0, prefix, 0), value=True)
    return torch.where(near, 0.0, -math.inf)


def resample_positions(positions, prefix, rows, columns):
    """Learned positions (1, prefix + grid * grid, dim) -> (1, prefix + rows * columns, dim), bicubic and anti-aliased.

    Interpolation is linear and separable, so it is a product with two matrices. Only these come from F.interpolate,
    whose backward pass torch.compile cannot do for varying sizes.
    """
    grid = math.isqrt(positions.shape[1] - prefix)
    if (rows, columns) == (grid, grid):
        return positions
    one = torch.eye(grid, device=positions.device)[None, None]
    by_row, by_column = (F.interpolate(one, (n, grid), mode="bicubic", antialias=True)[0, 0] for n in (rows, columns))
    table = positions[0, prefix:].float().unflatten(0, (grid, grid))            # (grid, grid, dim)
    table = torch.einsum("rg,ch,ghd->rcd", by_row, by_column, table).flatten(0, 1).to(positions.dtype)
    return torch.cat((positions[:, :prefix], table[None]), dim=1)


class PatchEmbedding(nn.Module):
    """Images (B, C, H, W) -> tokens (B, N, dim) in reading order: one linear projection of every patch.

    The weights are a convolution's, as in other ViTs, but used in one matrix product: it returns contiguous tokens,
    where a convolution's have channels first, which all that follows has to copy (a training step takes x0.83 to x0.9).
    """

    def __init__(self, config):
        super().__init__()
        self.stride, self.overlap, self.side = config.patch_size, config.overlap, config.patch_size + 2 * config.overlap
        self.proj = nn.Conv2d(config.in_channels, config.dim, self.side, self.stride, self.overlap)

    def forward(self, images):
        x = F.pad(images, [self.overlap] * 4).unfold(2, self.side, self.stride).unfold(3, self.side, self.stride)
        patches = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)          # (B, N, C * side * side)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x, rotary=None, bias=None, maps=None):
        B, N, D = x.shape
        q, k, v = (t.view(B, N, self.heads, D // self.heads).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if rotary is not None:                                      # q, k, v: (B, heads, N, D / heads)
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if bias is not None:
            bias = bias.to(q.dtype)                                 # (N, N)
        # On a CPU the plain form beats torch's kernel where sequences are short: forward and backward it takes x0.5 to
        # x0.9 of the kernel's time at 64 tokens in float32; in bfloat16 x0.13 at 64, x0.45 at 256, x0.7 at 576
        if maps is not None or x.is_cpu and N <= (512 if q.dtype == torch.bfloat16 else 64):
            scores = q * q.shape[-1] ** -0.5 @ k.mT                 # (B, heads, N, N): from each token to all
            weights = (scores if bias is None else scores + bias).softmax(-1)
            if maps is not None:
                maps.append(weights)
            x = F.dropout(weights, self.dropout, self.training) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm: the residual stream itself is never normalised, which trains stably without tricks (Xiong 2020)."""

    def __init__(self, config, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        self.dropout, self.drop_path_rate = config.dropout, drop_path_rate

    def forward(self, x, rotary=None, bias=None, maps=None):
        x = x + self.branch(self.attn(self.norm1(x), rotary, bias, maps))
        return x + self.branch(self.mlp(self.norm2(x)))

    def branch(self, x):
        return drop_path(F.dropout(x, self.dropout, self.training), self.drop_path_rate, self.training)


class ViT(nn.Module):
    """The model. forward: float (B, C, H, W) -> logits, (B, num_classes) or (B, H / cell, W / cell, num_classes).

    H and W may be any multiples of patch_size and cell (ValueError otherwise). Learned positions are resampled, as they
    are by load_state_dict for weights of another resolution; rotary positions need no change.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        grid = config.image_size // config.patch_size
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim)) if config.class_token else None
        self.pos_embed = None
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.class_token + grid * grid, config.dim))
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes)
        self.apply(self.init_weights)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    @staticmethod
    def init_weights(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # a narrow model starts far slower from the usual std of 0.02
            nn.init.zeros_(module.bias)

    @classmethod
    def load(cls, path):
        """The model of a checkpoint {"config": fields of ViTConfig, "average": state dict}, in eval mode, on the CPU.

        ValueError in one line if it is no such checkpoint. Nothing is built before the tensors are known to fit.
        """
        try:
            checkpoint = read_checkpoint(path)
            config, state = ViTConfig(**checkpoint["config"]), checkpoint["average"]
            with torch.device("meta"):  # all blocks are alike, so one says what the tensors of all have to be
                one = cls(replace(config, depth=1)).state_dict()
            count = len(one) + (config.depth - 1) * sum(name.startswith("blocks.") for name in one)
            if len(state) != count:
                raise ValueError(f"it has {len(state):,} tensors, its config asks for {count:,}")
            for name, tensor in one.items():
                for i in range(config.depth if name.startswith("blocks.") else 1):
                    found = state[name.replace("blocks.0.", f"blocks.{i}.")].shape
                    if found != tensor.shape:
                        raise ValueError(f"its {name} is {tuple(found)}, its config asks for {tuple(tensor.shape)}")
            if sum(tensor.nbytes for tensor in state.values()) > os.path.getsize(path):     # expanded ones
                raise ValueError("its tensors take more bytes than the file has")
            with torch.device("meta"):
                model = cls(config)
            model.load_state_dict(state, assign=True)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:    # for other dictionaries
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{path} is not a checkpoint of this model: {reason}") from None
        return model.eval()

    def _load_from_state_dict(self, state_dict, prefix, *args):  # what load_state_dict calls for every module
        positions, grid = state_dict.get(prefix + "pos_embed"), self.config.image_size // self.config.patch_size
        if self.pos_embed is not None and isinstance(positions, torch.Tensor) and positions.ndim == 3:
            first = int(self.config.class_token)
            patches = positions.shape[1] - first
            if math.isqrt(max(patches, 0)) ** 2 == patches:         # otherwise torch's own message is clear
                state_dict[prefix + "pos_embed"] = resample_positions(positions, first, grid, grid)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, images):
        x = self.forward_features(images)                           # (B, N, dim)
        if self.config.cell:                                        # the mean over each cell's k x k tokens
            rows, columns = self.grid_of(images)
            k = self.config.cell // self.config.patch_size
            x = x.unflatten(1, (rows // k, k, columns // k, k)).mean((2, 4))
        else:                                                       # the class token, or the mean over all tokens
            x = x[:, 0] if self.config.class_token else x.mean(1)
        return self.head(x)

    def forward_features(self, images, maps=None):
        """Images (B, C, H, W) -> normalised tokens (B, N, dim), the class token first. Blocks append their attention
        (B, heads, N, N) to the list `maps`, if there is one."""
        rows, columns = self.grid_of(images)
        # The residual stream keeps the parameters' dtype under autocast too: torch's CPU kernel sums a LayerNorm's
        # gradients in the dtype of its input. In bfloat16, over 2,048 tokens, they came out at 0.2 to 0.4 of their size
        x = self.patch_embed(images).to(self.norm.weight.dtype)     # (B, N, dim)
        if self.config.class_token:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        prefix, rotary, bias = int(self.config.class_token), None, None
        if self.config.positions == "learned":
            x = x + resample_positions(self.pos_embed, prefix, rows, columns)
        else:
            rotary = rotary_table(rows, columns, self.config.dim // self.config.heads, prefix, x.device)
        if self.config.window:
            bias = window_bias(rows, columns, self.config.window, prefix, x.device)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, rotary, bias, maps)
        return self.norm(x)

    def attention_maps(self, images):
        """Images (B, C, H, W) -> (depth, B, heads, N, N): how much each token (row) takes from each (column)."""
        maps = []
        self.forward_features(images, maps)
        return torch.stack(maps)

    def grid_of(self, images):
        """Rows and columns of patches in the images, which are checked here and nowhere else."""
        side = self.config.cell or self.config.patch_size           # a cell is a whole number of patches
        if images.ndim != 4 or images.shape[1] != self.config.in_channels or images.shape[2] % side or \
                images.shape[3] % side or 0 in images.shape[2:] or not images.is_floating_point():
            raise ValueError(f"expected float images (B, {self.config.in_channels}, H, W) with H and W multiples of "
                             f"{side} px, got {images.dtype} {tuple(images.shape)}")
        return images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size
