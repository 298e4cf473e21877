"""The diff in CONTRIBUTING: an option of the optimizer is declared in one file, and everything else follows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

CHECK = """
import torch
from optimizers import Aurora
from pretrain.config import ConfigError, load_config

CONFIG = "configs/quickstart.yaml"
config = load_config(CONFIG, ["optimizer.name=muon", "optimizer.gain=0.5"])
assert config.optimizer.settings().matrix["gain"] == 0.5
assert "gain: 0.5" in config.to_yaml()
assert "A factor on the direction." in Aurora.__doc__
weight = torch.nn.Parameter(torch.zeros(4, 4))
torch.manual_seed(0)
weight.grad = torch.randn(4, 4)
Aurora([weight], direction="muon", gain=0.5, lr=1.0).step()
assert torch.allclose(torch.linalg.svdvals(weight.detach()), torch.tensor(0.5), atol=1e-3)
for wrong in (["optimizer.gain=0.5"], ["optimizer.name=muon", "optimizer.gain=5"]):
    try:
        load_config(CONFIG, wrong)
    except ConfigError as error:
        assert "optimizer.gain: " in str(error)
    else:
        raise SystemExit(f"accepted: {wrong}")
"""


def _apply(diff: str, root: Path) -> list[str]:
    """Apply the hunks of a diff without line numbers; each must match exactly once. Returns the files."""
    head, *hunks = re.split(r"^@@\n", diff, flags=re.MULTILINE)
    (name,) = re.findall(r"^\+\+\+ b/(.+)$", head, re.MULTILINE)
    text = (root / name).read_text()
    for hunk in hunks:
        lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
        old = "".join(line[1:] for line in lines if line[0] in " -")
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))
    (root / name).write_text(text)
    return [name]


def test_an_option_is_a_change_of_one_file(tmp_path: Path) -> None:
    for folder in ("optimizers", "pretrain", "configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = re.findall(r"```diff\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)

    def check() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", CHECK]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    assert "optimizer.gain: unknown key" in check().stderr
    assert _apply(diff, tmp_path) == ["optimizers/directions/muon.py"]
    done = check()
    assert done.returncode == 0, done.stderr
