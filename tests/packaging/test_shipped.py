"""Configs, assets and the batch script are found from anywhere, in a checkout and in a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pretrain import shipped as shipped_module
from pretrain.config import load_config
from pretrain.config.loader import read_yaml
from pretrain.processes.errors import UserError
from pretrain.run.json_lines import JsonLines
from pretrain.shipped import FOLDERS, locate, main, shipped
from pretrain.sweep import load_sweep
from tests.conftest import REPOSITORY

CORPUS = "assets/corpus/moby_dick.parquet"
# Two steps of a narrow model: what is tested is that everything is found.
REDUCED = (
    "run.name=wheel",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "train.global_batch_tokens=1024",
    "train.micro_batch_sequences=4",
    "train.total_tokens=2048",
    "schedule.warmup_tokens=0",
    "validation.every_steps=2",
    "validation.max_tokens=1024",
    "telemetry.every_steps=1",
    "telemetry.reference_step=1",
    "samples.every_steps=2",
    "samples.max_new_tokens=2",
)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, with nothing noted yet."""
    monkeypatch.chdir(tmp_path)
    shipped_module._note.cache_clear()
    yield tmp_path
    shipped_module._note.cache_clear()


def test_shipped_files_are_found_from_anywhere(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("configs/quickstart.yaml", "slurm/pretrain.sbatch", "assets/corpus", CORPUS):
        assert shipped(name) == REPOSITORY / name
        assert main([name]) == 0
        assert capsys.readouterr().out == f"{REPOSITORY / name}\n"


@pytest.mark.parametrize("name", ["configs/none.yaml", "pyproject.toml", "configs/../pyproject.toml", "", "/etc/hosts"])
def test_other_files_are_not_shipped(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no such file in the package; it has assets, configs, slurm in /"):
        shipped(name)
    assert main([name]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_path_falls_back_to_the_shipped_file_and_this_is_said_once(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert locate(CORPUS) == str(REPOSITORY / CORPUS)
    assert capsys.readouterr().err == f"note: {CORPUS} does not exist here; using {REPOSITORY / CORPUS}\n"
    assert locate("assets/corpus/*.parquet") == str(REPOSITORY / "assets/corpus/*.parquet")
    for path in ("assets/none.parquet", "assets/none/*.parquet", "other/corpus", "/assets/corpus", "assets/../assets"):
        assert locate(path) == path


def test_a_path_that_exists_is_left_alone(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (CORPUS, "configs/quickstart.yaml"):
        file = elsewhere / path
        file.parent.mkdir(parents=True)
        file.touch()
        assert locate(path) == path
    assert locate("assets/corpus/*.parquet") == "assets/corpus/*.parquet"
    assert locate("quickstart.yaml", elsewhere / "configs") == str(elsewhere / "configs/quickstart.yaml")
    assert capsys.readouterr().err == ""


def test_other_processes_of_a_launch_say_nothing(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(shipped_module, "is_first_to_say", lambda text: asked.append(text) is not None)
    assert locate(CORPUS) == str(REPOSITORY / CORPUS)
    assert capsys.readouterr().err == ""
    assert asked == [f"note: {CORPUS} does not exist here; using {REPOSITORY / CORPUS}"]


def test_shipped_configs_and_what_they_name_are_found_from_anywhere(elsewhere: Path) -> None:
    config = load_config("configs/quickstart.yaml")
    assert config.tokenizer.path == str(REPOSITORY / "assets/tokenizer/tokenizer.json")
    assert [Path(source.path).parent for source in config.data.sources] == [REPOSITORY / "assets/corpus"] * 3
    assert read_yaml(Path("configs/experiments/loss.yaml"))["base"] == "small.yaml"
    sweep = load_sweep(Path("configs/experiments/loss.yaml"))
    assert sweep.config(sweep.cells[0], {}).model.hidden_size == 128
    # Shipped configs can be the base of a sweep in any folder.
    (elsewhere / "mine").mkdir()
    file = {"name": "s", "title": "t", "question": "q", "base": "configs/quickstart.yaml", "root": "runs"}
    file |= {"axes": {"seed": {"1": {"run.seed": 1}}}}
    (elsewhere / "mine/sweep.yaml").write_text(yaml.safe_dump(file))
    sweep = load_sweep(Path("mine/sweep.yaml"))
    assert sweep.config(sweep.cells[0], {}).model.hidden_size == 256


def test_an_installed_package_does_not_look_beside_itself(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_module, "_INSTALLED", elsewhere)
    with pytest.raises(UserError):
        shipped("configs/quickstart.yaml")
    assert locate("configs/quickstart.yaml") == "configs/quickstart.yaml"


def test_the_list_of_packages_equals_the_folders() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = settings["package-dir"]
    assert set(mapped.values()) == set(FOLDERS)
    assert set(mapped) == {f"pretrain.shipped_files.{folder}" for folder in FOLDERS}
    folders = {
        ".".join(file.parent.relative_to(REPOSITORY).parts)
        for package in ("eval", "optimizers", "pretrain")
        for file in (REPOSITORY / package).rglob("__init__.py")
    }
    assert settings["packages"] == sorted({*folders, *mapped})
    for package in ("eval", "optimizers", "pretrain"):
        assert (REPOSITORY / package / "py.typed").is_file()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an empty environment with our wheel and, by a .pth file, the packages installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy of the sources: setuptools leaves files behind, and a stale `build` would end up in the wheel.
    left_out = shutil.ignore_patterns(
        ".*", "build", "runs", "wandb", "logs", "tests", "docs", "*.egg-info", "__pycache__"
    )
    shutil.copytree(REPOSITORY, folder / "source", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run([*pip, *build], check=True, env=_environment())
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, env=_environment())
    # Packages only: .pth files in that folder, such as the one of an editable checkout, are not read.
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}


def _run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_trains_outside_the_checkout(installed: Path, elsewhere: Path) -> None:
    assert "train" in _run(installed / "aurora", "--help")
    code = (
        "import eval, optimizers, pretrain, sys; print(*(m.__file__ for m in (eval, optimizers, pretrain)), *sys.path)"
    )
    found = _run(installed / "python", "-c", code)
    assert str(REPOSITORY / "pretrain") not in found
    assert found.count(str(installed.parent)) >= 3

    script = Path(_run(installed / "python", "-m", "pretrain.shipped", "slurm/pretrain.sbatch").strip())
    assert script.is_relative_to(installed.parent)
    assert script.read_bytes() == (REPOSITORY / "slurm/pretrain.sbatch").read_bytes()

    said = _run(installed / "aurora", "train", "configs/quickstart.yaml", *REDUCED)
    assert "Traceback" not in said
    lines = JsonLines(elsewhere / "runs/wheel/metrics.jsonl").read()
    assert [line["step"] for line in lines] == [1, 2]
    assert "validation_loss" in lines[-1]
    # The report's template and style come from the package too.
    _run(installed / "aurora", "report", "runs/wheel")
    assert (elsewhere / "runs/wheel/report.html").stat().st_size > 10_000


def test_the_wheel_carries_every_shipped_file(installed: Path) -> None:
    (root,) = installed.parent.glob("lib/python*/site-packages/pretrain/shipped_files")
    for folder in FOLDERS:
        ours = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / folder).rglob("*") if file.is_file()}
        assert {str(file.relative_to(root)) for file in (root / folder).rglob("*") if file.is_file()} == ours
