"""`pip install ./optimizers` gives a package of its own, in an environment that has torch and nothing else."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

import optimizers

PACKAGE = Path(optimizers.__file__).parent

STEP = """
import sys
import torch
import aurora_optimizers as package

model = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.LayerNorm(12))
before = [p.detach().clone() for p in model.parameters()]
optimizer = package.Aurora(package.param_groups(model, package.Settings(name="aurora")))
model(torch.randn(8, 4)).square().mul(torch.arange(12)).mean().backward()
optimizer.step()
assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))
from aurora_optimizers.sharded import flat_layout, shard
own = package.Aurora([{"params": [torch.zeros(4, 2)], "param_names": ["w"], "lr": 1.0, "momentum": 0.0}])
own.param_groups[0]["params"] = [torch.zeros(8)]
shard(own, flat_layout([{"w": (4, 2)}], 1), 0)
own.param_groups[0]["params"][0].grad = torch.eye(4, 2).flatten()
own.step()
assert own.param_groups[0]["params"][0].abs().sum() > 1
print(package.__file__)
"""


def closure(name: str) -> set[str]:
    """The distributions that one needs, itself among them: those of them that are installed."""
    found: set[str] = set()
    missing = [name]
    while missing:
        current = re.sub(r"[-_.]+", "-", missing.pop()).lower()
        if current in found:
            continue
        try:
            needed = importlib.metadata.requires(current) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(current)
        missing += [re.split(r"[ ;<>=!~\[(]", item)[0] for item in needed if "extra ==" not in item]
    return found


def environment(folder: Path, *distributions: str) -> Path:
    """The interpreter of a fresh environment that sees these distributions and what they need, by links."""
    links = folder / "linked"
    links.mkdir()
    for name in set().union(*map(closure, distributions)):
        for file in importlib.metadata.files(name) or ():
            top = Path(file.parts[0])
            if str(top) not in ("..", "__pycache__") and not (links / top).exists():
                (links / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "linked.pth").write_text(f"{links}\n")
    return folder / "venv" / "bin" / "python"


def run(*command: object, variables: Mapping[str, str] | None = None) -> str:
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, text=True, cwd="/", env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(folder: Path, python: Path, extra: str = "") -> None:
    """Build the wheel and install it, with what the extra needs from the registry."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # A copy: setuptools leaves a build folder in the source.
    source = shutil.copytree(PACKAGE, folder / "optimizers", ignore=shutil.ignore_patterns("__pycache__", "build"))
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "wheels", source)
    (wheel,) = (folder / "wheels").glob("aurora_optimizers-*.whl")
    if extra:
        run(*pip, "--python", python, "install", f"{wheel}[{extra}]")
    else:
        run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)


@pytest.mark.long
def test_the_wheel_takes_a_step_where_there_is_only_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = environment(tmp_path, "torch")
    install(tmp_path, python)
    installed = Path(run(python, "-W", "error::ImportWarning", "-c", STEP).split()[-1])
    assert installed.is_relative_to(tmp_path / "venv")
    assert (installed.parent / "py.typed").exists()
    for module in ("numpy", "transformers", "deepspeed", "pretrain", "optimizers"):
        assert run(python, "-c", f"import importlib.util; print(importlib.util.find_spec({module!r}))") == "None\n"
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "build" not in path.parts}
    assert {str(path.relative_to(installed.parent)) for path in installed.parent.rglob("*.py")} == modules


def test_both_package_lists_are_the_folders() -> None:
    folders = {".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.rglob("__init__.py")}
    for file, name in (
        (PACKAGE / "pyproject.toml", "aurora_optimizers"),
        (PACKAGE.parent / "pyproject.toml", "optimizers"),
    ):
        listed = tomllib.loads(file.read_text())["tool"]["setuptools"]["packages"]
        own = {entry for entry in listed if entry.split(".")[0] == name}
        assert own == {f"{name}.{folder}".rstrip(".") for folder in folders}


def test_importing_it_loads_nothing_beyond_torch() -> None:
    def loaded(modules: str) -> set[str]:
        code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import {modules}; print(*sys.modules)"
        return {name.split(".")[0] for name in run(sys.executable, "-c", code).split()}

    more = loaded("optimizers, optimizers.sharded") - loaded("torch, torch.distributed, torch.utils.flop_counter")
    assert more - sys.stdlib_module_names == {"optimizers"}
