"""A Vision Transformer in one file: torch and the standard library, nothing else. Copy it into your own project.

    model = ViT(ViTConfig(image_size=32, patch_size=4, in_channels=3, num_classes=10, dim=192, depth=12, heads=3))
    logits = model(images)                  # (B, 3, 32, 32) -> (B, 10)

With `cell` > 0 the same model labels every cell of a grid over the image, so it finds things as well as naming them:

    model = ViT(ViTConfig(image_size=64, patch_size=8, cell=8, num_classes=11))
    logits = model(images)                  # (B, 1, 64, 64) -> (B, 8, 8, 11)

An image goes through it as patches -> tokens -> `depth` blocks of attention and MLP -> norm -> head: `ViT.forward`.
Parameters have the names and shapes of timm's VisionTransformer, so that public weights load: DeiT, AugReg, DINOv2.
Sources: ViT (Dosovitskiy 2021, arXiv:2010.11929), pre-norm (Xiong 2020, arXiv:2002.04745), rotary positions (Su 2021,
arXiv:2104.09864; in 2D Heo 2024, arXiv:2403.13298), windows (Ramachandran 2019, arXiv:1906.05909), drop path (Huang
2016, arXiv:1603.09382), LayerScale (Touvron 2021, arXiv:2103.17239), registers (Darcet 2023, arXiv:2309.16588).
"""
import math
import os
import pickletools
import re
import reprlib
import zipfile
from collections import OrderedDict
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
    num_classes: int = 10       # 0: no head, features come out
    dim: int = 64               # width of a token
    depth: int = 4              # number of blocks
    heads: int = 4              # attention heads in a block, each dim / heads wide
    mlp_ratio: float = 2.0      # hidden width of the MLP, in units of dim
    layer_scale: bool = False   # each branch of a block times a learned vector, so that a deep model starts calmly
    dropout: float = 0.0        # share of activations dropped in training
    drop_path: float = 0.0      # drop path rate of the last block in training; it rises linearly from 0 at the first
    class_token: bool = False   # a token of its own for the whole image; without cells, the head reads it alone
    class_position: bool = True  # whether the class token has a learned position too; registers never have one
    registers: int = 0          # more tokens, where attention can keep what belongs to no patch
    cell: int = 0               # px, side of the cells that get a label each; 0: one label for the whole image
    positions: str = "learned"  # "learned": a vector a patch. "rotary": queries and keys turn with row and column
    window: int = 0             # patches that attention reaches on each side (dense mask: no speed-up); 0: everywhere

    @classmethod
    def preset(cls, name, **changes):
        """A standard model for ImageNet, "Ti", "S", "B" or "L" with patches of 16 px; other fields as given.
        Sources: Dosovitskiy 2021, table 1; for Ti and S Touvron 2021, arXiv:2012.12877, table 1."""
        sizes = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # dim, depth, heads
        if name not in sizes:
            raise ValueError(f"the presets are {', '.join(sizes)}, not {name!r}")
        standard = dict(zip(("dim", "depth", "heads"), sizes[name]), image_size=224, patch_size=16, in_channels=3,
                        num_classes=1000, mlp_ratio=4.0, class_token=True)
        return cls(**{**standard, **changes})

    def __post_init__(self):
        for field in fields(self):
            name, kind, value = field.name, type(field.default), getattr(self, field.name)
            least = 0 if name in ("overlap", "num_classes", "registers", "cell", "window") else 1
            if type(value) is not kind and (type(value), kind) != (int, float) or kind is int and value < least:
                wanted = f"whole number from {least} up" if kind is int else kind.__name__
                raise ValueError(f"{name} must be a {wanted}, not {reprlib.repr(value)}")
        size, patch, cell, dim, heads = self.image_size, self.patch_size, self.cell, self.dim, self.heads
        for message, wrong in {
            f"mlp_ratio {self.mlp_ratio} of dim {dim} is no width of an MLP": not 1 <= dim * self.mlp_ratio < math.inf,
            f"dropout must be at least 0 and below 1, not {self.dropout}": not 0 <= self.dropout < 1,
            f"drop_path must be at least 0 and below 1, not {self.drop_path}": not 0 <= self.drop_path < 1,
            f"image_size {size} is not a multiple of patch_size {patch}": size % patch,
            f"cell {cell} must be a multiple of patch_size {patch} and divide image_size {size}":
                cell and (cell % patch or size % cell),
            f"dim {dim} is not a multiple of heads {heads}": dim % heads,
            f'positions must be "learned" or "rotary", not {reprlib.repr(self.positions)}':
                self.positions not in ("learned", "rotary"),
            f"rotary positions need heads of a multiple of 4 wide, not {dim} / {heads}":
                self.positions == "rotary" and dim // heads % 4,
        }.items():
            if wrong:
                raise ValueError(message)

    @property
    def mlp_dim(self):
        return int(self.dim * self.mlp_ratio)

    def num_parameters(self):
        """Of the whole model, counted without building it in memory."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in ViT(self).parameters())

    def flops(self, height=None, width=None):
        """FLOPs of a forward pass of one image, by default of image_size: 2 for each multiply-add of matrix products
        (those that resample positions are left out)."""
        height, width = height or self.image_size, width or self.image_size
        patches = (height // self.patch_size) * (width // self.patch_size)
        tokens = patches + self.class_token + self.registers
        labels = (height // self.cell) * (width // self.cell) if self.cell else 1
        patch = self.in_channels * (self.patch_size + 2 * self.overlap) ** 2
        block = tokens * self.dim * (4 * self.dim + 2 * self.mlp_dim + 2 * tokens)  # qkv and proj, MLP, attention
        return 2 * (patches * patch * self.dim + self.depth * block + labels * self.dim * self.num_classes)


def read_checkpoint(path):
    """What torch.save wrote to a file, on the CPU. Only tensors and plain values are read, so a file cannot run code,
    and never more bytes than it has. ValueError in one line for all else, OSError where there is no such file."""
    plain = r"torch \w+Storage|torch Size|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"
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
                if opcode.name == "GLOBAL" and not re.fullmatch(plain, name):
                    raise ValueError(f"it holds {name.replace(' ', '.')[:100]}; only tensors and plain values are read")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except ValueError:
            raise
        except Exception as error:  # of many kinds, and torch's messages advise to let a file run code
            raise ValueError(f"it is damaged, or no file of torch.save ({type(error).__name__})") from None


def rotary_table(rows, columns, head_dim, prefix, device):
    """Cosines and sines, each (prefix + rows * columns, head_dim), that turn the heads of the patch at each row and
    column, and leave the prefix as it is. Half of a head's pairs of channels turn with the row, half with the column,
    at frequencies from 1 radian a patch down to 1/100: fast enough to tell neighbours apart, slow enough to tell the
    ends of a long image apart."""
    frequency = 100 ** -torch.linspace(0, 1, head_dim // 4, device=device)
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (rows, columns)))   # (N, 2)
    angle = F.pad((places[:, :, None] * frequency).flatten(1), (0, 0, prefix, 0))   # (prefix + N, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)   # the signs that `Attention` needs


def window_bias(rows, columns, window, prefix, device):
    """What is added to attention scores, (prefix + rows * columns) on either side: 0 between patches at most `window`
    rows and `window` columns apart, and from and to the prefix; -inf elsewhere."""
    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    near_rows, near_columns = ((line[:, None] - line).abs() <= window for line in (row, column))
    near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)      # (N, N)
    return torch.where(F.pad(near, (prefix, 0, prefix, 0), value=True), 0.0, -math.inf)


def resample_positions(positions, prefix, rows, columns):
    """Learned positions (1, prefix + grid * grid, dim) -> (1, prefix + rows * columns, dim), bicubic and anti-aliased.
    Interpolation is linear and separable, so it is a product with two matrices. Only these come from F.interpolate,
    whose backward pass torch.compile cannot do for varying sizes."""
    grid = math.isqrt(positions.shape[1] - prefix)
    # Where an export leaves a size open it is a symbol, no int, and must not be compared
    if isinstance(rows, int) and isinstance(columns, int) and (rows, columns) == (grid, grid):
        return positions
    one = torch.eye(grid, device=positions.device)[None, None]
    by_row, by_column = (F.interpolate(one, (n, grid), mode="bicubic", antialias=True)[0, 0] for n in (rows, columns))
    table = positions[0, prefix:].float().unflatten(0, (grid, grid))            # (grid, grid, dim)
    table = torch.einsum("rg,ch,ghd->rcd", by_row, by_column, table).flatten(0, 1).to(positions.dtype)
    return torch.cat((positions[:, :prefix], table[None]), dim=1)


class PatchEmbedding(nn.Conv2d):
    """Images (B, C, H, W) -> (B, dim, rows, columns). A Conv2d to tools and by name, but computed as one matrix product
    over all patches: its channels lie side by side, so tokens are a view, where a Conv2d's output would be copied (a
    training step takes x0.83 to x0.9)."""

    def forward(self, images):
        side, stride, overlap = self.kernel_size[0], self.stride[0], self.padding[0]
        x = F.pad(images, [overlap] * 4).unfold(2, side, stride).unfold(3, side, stride)
        patches = x.permute(0, 2, 3, 1, 4, 5).flatten(3)            # (B, rows, columns, C * side * side)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(3, 1)


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
            cos, sin = (t.to(q.dtype) for t in rotary)              # turns the channel pairs (i, i + D / heads / 2)
            q, k = (t * cos + t.roll(t.shape[-1] // 2, dims=-1) * sin for t in (q, k))
        bias = None if bias is None else bias.to(q.dtype)           # (N, N)
        # On a CPU the plain form beats torch's kernel where sequences are short: forward and backward it takes x0.5 to
        # x0.9 of the kernel's time at 64 tokens in float32; in bfloat16 x0.13 at 64, x0.45 at 256, x0.7 at 576
        few = isinstance(N, int) and N <= (512 if q.dtype == torch.bfloat16 else 64)    # in an export, N is a symbol
        if maps is not None or x.is_cpu and few:
            scores = q * q.shape[-1] ** -0.5 @ k.mT                 # (B, heads, N, N): from each token to all
            weights = (scores if bias is None else scores + bias).softmax(-1)
            if maps is not None:
                maps.append(weights)
            x = F.dropout(weights, self.dropout, self.training) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class LayerScale(nn.Module):
    """A branch (B, N, dim) times a learned vector. It starts at 1e-5, as in timm: each block starts as the identity."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm: the residual stream itself is never normalised, which trains stably without tricks (Xiong 2020)."""

    def __init__(self, config, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(config.dim, config.mlp_dim), act=nn.GELU(), fc2=nn.Linear(config.mlp_dim, config.dim)))
        self.ls2 = LayerScale(config.dim) if config.layer_scale else nn.Identity()
        self.dropout, self.drop_path_rate = config.dropout, drop_path_rate

    def forward(self, x, rotary=None, bias=None, maps=None):
        x = x + self.branch(self.ls1(self.attn(self.norm1(x), rotary, bias, maps)))
        return x + self.branch(self.ls2(self.mlp(self.norm2(x))))

    def branch(self, x):
        """A branch (B, N, dim). Drop path leaves it out for a share of the images, and scales it up for the others."""
        x = F.dropout(x, self.dropout, self.training)
        if self.training and self.drop_path_rate:
            keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path_rate
            x = x * keep.to(x.dtype) / (1 - self.drop_path_rate)
        return x


# Hints for a state dict that does not fit: what one of its names begins with, and advice. {0}, {1}: the tensor's shape
CLUES = {
    r"(module|_orig_mod)\.": 'of a wrapped model; rename to name.split("module.")[-1].split("_orig_mod.")[-1]',
    r"(model|state_dict|teacher)$": "the state dict is one level down",
    r"register_tokens|mask_token": "DINOv2 by Meta; rename register_tokens to reg_token, leave out mask_token",
    r"blocks\.0\.gamma_1": "DeiT III by Meta; rename gamma_1 and gamma_2 to ls1.gamma and ls2.gamma",
    r"blocks\.0\.ls1\.gamma": "layer_scale=True",
    r"cls_token": "class_token=True",
    r"reg_token": "registers={1}",
    r"pos_embed": "n * n positions: class_token=False or class_position=False; one more: both True; more: registers "
                  "have positions too, which can be added to reg_token",
    r"patch_embed\.proj\.weight": "dim={0}, in_channels={1}, patch_size + 2 * overlap={2}",
    r"head\.weight": "num_classes={0}; for other classes leave out head and pass strict=False",
    r"dist_token|head_dist|fc_norm|norm_pre|blocks\.0\.mlp\.w12":
        "another model: distilled (dist), with a norm after the mean (fc_norm), CLIP (norm_pre) or with SwiGLU (w12)",
}


class ViT(nn.Module):
    """The model. forward: float (B, C, H, W) -> logits, (B, num_classes) or (B, H / cell, W / cell, num_classes). With
    num_classes=0 there is no head: features come out, (B, dim) or (B, H / cell, W / cell, dim).

    H and W may be any multiples of patch_size and cell (ValueError otherwise). Learned positions are resampled, as they
    are by load_state_dict for weights of another resolution; rotary positions need no change. Tokens are in the order
    class, registers, patches. For activation checkpointing, do this with each block of `blocks`:
    block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.prefix = config.class_token + config.registers             # tokens before those of the patches
        self.placed = int(config.class_token and config.class_position)  # of these, how many have learned positions
        side, grid = config.patch_size + 2 * config.overlap, config.image_size // config.patch_size
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=PatchEmbedding(config.in_channels, config.dim, side, config.patch_size, config.overlap)))
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # a narrow model starts far slower from the usual std of 0.02
                nn.init.zeros_(module.bias)

        def learned(n):                                                 # (1, n, dim)
            return nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, n, config.dim), std=0.02)) if n else None
        self.cls_token, self.reg_token = learned(int(config.class_token)), learned(config.registers)
        self.pos_embed = learned(self.placed + grid * grid if config.positions == "learned" else 0)

    @classmethod
    def load(cls, path):
        """The model of a checkpoint, in eval mode, on the CPU. ValueError in one line if it is no such checkpoint.
        To save one: torch.save({"config": asdict(model.config), "average": model.state_dict()}, path)."""
        try:
            checkpoint = read_checkpoint(path)
            config, state = ViTConfig(**checkpoint["config"]), checkpoint["average"]
            # Before a model is built, the tensors have to fit. All blocks are alike, so one says what theirs have to be
            with torch.device("meta"):
                one = cls(replace(config, depth=1)).state_dict()
            count = len(one) + (config.depth - 1) * sum(name.startswith("blocks.") for name in one)
            if len(state) != count:
                raise ValueError(f"it has {len(state):,} tensors, its config asks for {count:,}")
            for name, tensor in one.items():
                for i in range(config.depth if name.startswith("blocks.") else 1):
                    own = name.replace("blocks.0.", f"blocks.{i}.")
                    if (found := state[own].shape) != tensor.shape:
                        raise ValueError(f"its {own} is {tuple(found)}, its config asks for {tuple(tensor.shape)}")
            if sum(tensor.nbytes for tensor in state.values()) > os.path.getsize(path):     # expanded ones
                raise ValueError("its tensors take more bytes than the file has")
            with torch.device("meta"):
                model = cls(config)
            model.load_state_dict(state, assign=True)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OverflowError) as error:  # other files
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{path} is not a checkpoint of this model: {reason}") from None
        return model.eval()

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As torch's. Where a state dict does not fit, the RuntimeError first says what it looks like."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            message = str(error)
            for start, advice in reversed(CLUES.items()):
                name = next((name for name in state_dict if re.match(start, name) and name in str(error)), None)
                if name:
                    shape = tuple(getattr(state_dict[name], "shape", ()))
                    message = f"the state dict has {name} {shape}: {advice.format(*shape, *'???')}\n{message}"
            raise RuntimeError(message) from None

    def _load_from_state_dict(self, state_dict, prefix, *args):  # what load_state_dict calls for every module
        positions, grid = state_dict.get(prefix + "pos_embed"), self.config.image_size // self.config.patch_size
        if self.pos_embed is not None and isinstance(positions, torch.Tensor) and positions.ndim == 3:
            patches = positions.shape[1] - self.placed
            if patches == math.isqrt(max(patches, 1)) ** 2:         # otherwise they do not fit, and torch says so
                state_dict[prefix + "pos_embed"] = resample_positions(positions, self.placed, grid, grid)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, images):
        x, k = self.forward_features(images), self.config.cell // self.config.patch_size    # (B, prefix + N, dim)
        if self.config.cell:                                        # the mean over each cell's k x k patches
            rows, columns = self.grid_of(images)
            x = x[:, self.prefix:].unflatten(1, (rows // k, k, columns // k, k)).mean((2, 4))
        else:                                                       # the class token, or the mean over all patches
            x = x[:, 0] if self.config.class_token else x[:, self.prefix:].mean(1)
        return self.head(x)

    def forward_features(self, images, maps=None):
        """Images (B, C, H, W) -> normalised tokens (B, prefix + N, dim). Blocks append their attention to `maps`."""
        rows, columns = self.grid_of(images)
        # The residual stream keeps the parameters' dtype under autocast too: torch's CPU kernel sums a LayerNorm's
        # gradients in the dtype of its input. In bfloat16, over 2,048 tokens, they came out at 0.2 to 0.4 of their size
        x = self.patch_embed(images).flatten(2).mT.to(self.norm.weight.dtype)   # (B, dim, rows, columns) -> (B, N, dim)
        first = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if first:
            x = torch.cat((*first, x), dim=1)                       # (B, prefix + N, dim)
        prefix, placed, rotary, bias = self.prefix, self.placed, None, None
        if self.config.positions == "learned":
            table = resample_positions(self.pos_embed, placed, rows, columns)
            if placed < prefix:                                     # zeros for the tokens that have no position
                table = torch.cat((F.pad(table[:, :placed], (0, 0, 0, prefix - placed)), table[:, placed:]), dim=1)
            x = x + table                                           # (B, prefix + N, dim)
        else:
            rotary = rotary_table(rows, columns, self.config.dim // self.config.heads, prefix, x.device)
        if self.config.window:
            bias = window_bias(rows, columns, self.config.window, prefix, x.device)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, rotary, bias, maps)
        return self.norm(x)

    def attention_maps(self, images):
        """Images -> (depth, B, heads, prefix + N, prefix + N): how much each token (row) attends to each (column)."""
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
