"""Every direction trains by a one-key override, and what it applied is what the reference says."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from optimizers import reference
from optimizers.options import DEFAULTS, DirectionName
from pretrain.checkpoint.store import CheckpointReader
from pretrain.config import parse_config
from pretrain.launch import train
from pretrain.processes.exit_codes import STOPPED
from tests.conftest import REPOSITORY, TINY, merged

NAMES = get_args(DirectionName)
STEP = 50
# Largest distance of an applied direction from the reference's: the stated error at condition numbers up to 700. The
# Riemannian ascent carries its rounding errors through three rounds of conjugate gradients.
BOUNDS = dict.fromkeys(NAMES, 8e-4) | {"riemannian_aurora": 5e-3}


def reader(run: Path, step: int) -> CheckpointReader:
    return CheckpointReader(run / "checkpoints" / f"step-{step:08d}")


def differences(run: Path) -> dict[str, float]:
    """How far what step 50 applied to each matrix, from the weights on both sides of it, is from the reference's.

    The gradient follows from the momentum on both sides. Square and wide matrices take muon's direction and often
    have singular values below the backends' cut: they are compared between the singular vectors above it.
    """
    before, after = reader(run, STEP - 1), reader(run, STEP)
    (group,) = (g for g in after.index["optimizer_groups"] if g["kind"] == "matrix")
    options = DEFAULTS["matrix"] | group
    found = {}
    for name in options["param_names"]:
        w, b = (before.read(name, slot).double() for slot in ("weight", "momentum"))
        w_after, b_after = (after.read(name, slot).double() for slot in ("weight", "momentum"))
        g = (b_after - options["momentum"] * b) / (1 - options["momentum"])
        _, u = reference.blend(g, b, options["momentum"], options["nesterov"])
        v = before.read(name, "second_moment") if "second_moment" in before.index["parameters"][name] else None
        d, _ = reference.direction(u, options, v)
        scale = options["lr"] * reference.lr_scale(options["lr_scale"], *w.shape)
        difference, size = (w - w_after) / scale - d, d.norm()
        if len(w) <= w.shape[1]:
            left, sigma, right = torch.linalg.svd(u, full_matrices=False)
            above = sigma > 2.0**-10 * sigma.norm()
            difference, size = left[:, above].T @ difference @ right[above].T, above.sum().sqrt()
        found[name] = float(difference.norm() / size)
    return found


def check(runs: dict[str, Path]) -> None:
    weights = {}
    for direction, run in runs.items():
        found = differences(run)
        assert len(found) >= 14
        assert max(found.values()) < BOUNDS[direction], (direction, found)
        weights[direction] = {name: reader(run, STEP).read(name, "weight") for name in found}
    for one, other in itertools.combinations(runs, 2):
        assert all(not torch.equal(weights[one][name], weights[other][name]) for name in weights[one]), (one, other)


def test_every_direction_trains_and_applies_what_the_reference_says(tmp_path: Path) -> None:
    changes = {"train.total_tokens": 100 * 768, "run.root": str(tmp_path)}
    changes |= {"optimizer.polar": "gram", "optimizer.polar_dtype": "fp32"}
    runs = {}
    for name in NAMES:
        config = parse_config(merged(TINY, {**changes, "optimizer.name": name, "run.name": name}))
        for stop in (STEP - 1, STEP):
            assert train(config, "auto", stop) == STOPPED
        runs[name] = tmp_path / name
    check(runs)


@pytest.mark.long
def test_every_direction_trains_the_quickstart(tmp_path: Path) -> None:
    runs = {}
    for name in NAMES:
        command = [sys.executable, "-m", "pretrain", "train", "configs/quickstart.yaml", f"optimizer.name={name}"]
        command += [f"run.root={tmp_path}", f"run.name={name}", "optimizer.polar_dtype=fp32", "validation={}"]
        for stop in (STEP - 1, STEP):
            done = subprocess.run([*command, "--stop-at", str(stop)], cwd=REPOSITORY, check=False)
            assert done.returncode == STOPPED
        runs[name] = tmp_path / name
    check(runs)
