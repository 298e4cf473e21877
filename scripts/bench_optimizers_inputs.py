"""Inputs of the optimizer benchmark: the shapes of our models, and matrices that resemble momentum or are hard."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from optimizers import param_groups
from optimizers.blocks import blocks, row_blocks
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.config import Config, load_config
from pretrain.model.build import build_model

Shape = tuple[int, int]

CONDITION = 2000.0
ROW_SCALE_DEVIATION = 1.0  # of the logarithm of the row norms


def matrix_shapes(config: Config) -> Counter[Shape]:
    """Return the shapes of the matrices in a config's model, with their counts; no memory is allocated."""
    groups = param_groups(build_model(config.model, config.run.seed, "meta"), config.optimizer.settings())
    matrix = [group for group in groups if group["kind"] == "matrix"]
    return Counter(
        (block.shape[0], block.shape[1])
        for group in matrix
        for weight, split in zip(group["params"], row_blocks(group), strict=True)
        for block in blocks(weight, split)
    )


def parse_shapes(text: str) -> list[Shape]:
    """``8192x2048,256x256``.

    Raises:
        ValueError: anything else.
    """
    shapes = []
    for word in text.split(","):
        rows, cross, columns = word.strip().partition("x")
        if not (cross and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
            raise ValueError(f"shape {word!r}: expected rows x columns, such as 8192x2048")
        shapes.append((int(rows), int(columns)))
    return list(dict.fromkeys(shapes))


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """Independent normal entries, the rows scaled by log-normal factors: [1, m, n]."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.empty(m, 1).log_normal_(0.0, ROW_SCALE_DEVIATION, generator=generator)
    return (scale * torch.randn(m, n, generator=generator))[None]


def power_law(m: int, n: int, seed: int = 0) -> Tensor:
    """Singular values i^-a from 1 down to 1/2000 between random orthonormal factors: [1, m, n]."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    left = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q
    exponent = math.log(CONDITION) / math.log(rank) if rank > 1 else 0.0
    sigma = torch.arange(1, rank + 1, dtype=torch.float32) ** -exponent
    return ((left * sigma) @ right.T)[None]


def captured(source: Path) -> dict[Shape, Tensor]:
    """Return the momentum of every matrix in a checkpoint, as one stack [k, m, n] per shape.

    Args:
        source: a checkpoint, or a run folder, whose newest checkpoint is read.

    Raises:
        ValueError: the source is neither, or its checkpoint has no momentum.
    """
    checkpoints = list_checkpoints(source / "checkpoints")
    reader = CheckpointReader(checkpoints[-1] if checkpoints else source)
    found: dict[Shape, list[Tensor]] = {}
    for name, slots in reader.index["parameters"].items():
        if "momentum" in slots and len(slots["momentum"]["shape"]) == 2:
            momentum = reader.read(name, "momentum").float()
            found.setdefault((momentum.shape[0], momentum.shape[1]), []).append(momentum)
    if not found:
        raise ValueError(f"{source}: contains no momentum of a matrix; expected a run of aurora, muon or a relative")
    return {shape: torch.stack(members) for shape, members in found.items()}


def make_inputs(shape: Shape, names: Iterable[str], momenta: dict[Shape, Tensor]) -> dict[str, Tensor]:
    """Return the named inputs of a shape, each a stack; "captured" only if the run has matrices of that shape."""
    makers = {"gaussian": gaussian, "powerlaw": power_law}
    inputs = {name: makers[name](*shape) for name in names if name in makers}
    if "captured" in names and shape in momenta:
        inputs["captured"] = momenta[shape]
    return inputs


def default_shapes(large: str, small: str) -> list[Shape]:
    """Return the distinct shapes of two configs, and 5632 x 2048, the MLP of a typical Llama of that width."""
    both = [*matrix_shapes(load_config(large)), *matrix_shapes(load_config(small))]
    return sorted({*both, (5632, 2048)}, key=lambda shape: (-shape[0] * shape[1], -shape[0]))
