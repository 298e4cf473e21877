"""Record the gradients of some matrices in every step of a training run, from which their momenta follow.

    python scripts/record_momenta.py FOLDER configs/experiments/small.yaml optimizer.lr=0.02 train.total_tokens=307200

trains a config from its first step and writes what the optimizer got: a file `step-00000001.safetensors` for each step,
with the gradient (fp32, after clipping) of each matrix whose name the expression finds, and `recording.json` with the
config and the learning rate of every step. The run itself is in the same folder. Momentum and Nesterov blend of any
strength follow from consecutive gradients (`momenta`). One process, whole parameters.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from optimizers import Aurora
from pretrain.config import load_config
from pretrain.launch import train
from pretrain.processes.errors import UserError

MLP = r"layers\.\d+\.mlp\.(gate|up)_proj"


class Recorder:
    """Called before each step of an optimizer; writes the gradients of its matrices."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder, self.pattern = folder, re.compile(pattern)
        self.rates: list[float] = []

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Write one step."""
        if not isinstance(optimizer, Aurora):
            return  # a wrapper; it steps the one that it holds
        found: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            if group["kind"] != "matrix":
                continue
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None and self.pattern.search(name):
                    found[name] = p.grad.detach().float().contiguous()
            self.rates.append(float(group["lr"]))
        save_file(found, step_file(self.folder, len(self.rates)))


def step_file(folder: Path, step: int) -> Path:
    """The file of a step, counted from 1."""
    return folder / f"step-{step:08d}.safetensors"


def momenta(
    folder: Path, name: str, *, momentum: float = 0.95, spike: tuple[int, float] | None = None
) -> Iterator[Tensor]:
    """What the direction of a matrix was taken of in each recorded step: u [m, n] fp32, with Nesterov's blend.

    Args:
        folder: of a recording.
        name: of the parameter.
        momentum: share of the average that each step keeps.
        spike: a step, and the factor on its gradient.
    """
    steps = len(json.loads((folder / "recording.json").read_text())["lr"])
    average: Tensor | None = None
    for step in range(1, steps + 1):
        g = load_file(step_file(folder, step))[name]
        if spike is not None and step == spike[0]:
            g = g * spike[1]
        average = torch.lerp(torch.zeros_like(g) if average is None else average, g, 1 - momentum)
        yield torch.lerp(g, average, momentum)


def main() -> int:
    """Run one training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the recording goes; made, and must be empty")
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--matrices", default=MLP, help="expression for names of parameters (default: %(default)s)")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    recorder = Recorder(options.folder, options.matrices)
    overrides = [*options.overrides, f"run.root={options.folder}", "run.name=run"]
    hook = register_optimizer_step_pre_hook(recorder)
    try:
        code = train(load_config(options.config, overrides), "never")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        hook.remove()
    about = {"config": options.config, "overrides": options.overrides, "lr": recorder.rates}
    (options.folder / "recording.json").write_text(json.dumps(about, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
