"""Variables that would change a run without its config, and those that others leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config import Config
from pretrain.launch import train
from pretrain.processes.environment import LaunchError, World, settled, world
from pretrain.run.folder import RunFolder
from tests.conftest import REPOSITORY
from tests.processes.launching import launch, write_config

TORCHRUN = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"},
}
# What `accelerate launch` sets on its own.
ACCELERATE = {
    **{"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_DYNAMO_MODE": "default"},
    **{"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False"},
    **{"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False", "ACCELERATE_USE_CPU": "False"},
    **{"ACCELERATE_DEBUG_MODE": "false", "ACCELERATE_CPU_AFFINITY": "1"},
}
TOUCHED = ("ACCELERATE_", "PMI_", "OMPI_", "MV2_", "FSDP_", *TORCHRUN)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(TOUCHED)]:
        monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that trained with DeepSpeed in this process has left one."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


def said(engine: str = "plain", *, on_gpu: bool = False) -> tuple[set[str], list[str]]:
    """What is left of the variables that are looked after, and the warnings."""
    before = dict(os.environ)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with settled(engine, on_gpu):
            left = {name for name in os.environ if name.startswith(TOUCHED)}
    assert dict(os.environ) == before
    return left, [str(warning.message) for warning in caught]


def test_what_changes_training_is_unset_with_a_reason_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    loud = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "it would divide every gradient"),
        "ACCELERATE_GRADIENT_CLIPPING": ("0.5", "train.grad_clip decides"),
        "ACCELERATE_MIXED_PRECISION": ("bf16", "train.precision decides"),
        "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "train.compile decides"),
        "ACCELERATE_TORCH_DEVICE": ("cuda:3", "CUDA_VISIBLE_DEVICES"),
        "ACCELERATE_OF_TOMORROW": ("1", "does not know it"),
    }
    put(monkeypatch, {name: value for name, (value, _) in loud.items()} | {"ACCELERATE_DYNAMO_MODE": "max-autotune"})
    left, lines = said()
    assert left == set()
    assert len(lines) == len(loud)
    for name, (value, why) in loud.items():
        assert [line for line in lines if line.startswith(f"{name}={value} in the environment is ignored: ")]
        assert any(why in line for line in lines)


def test_what_launchers_set_on_their_own_is_accepted_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, ACCELERATE)
    assert said() == ({"ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"}, [])
    put(monkeypatch, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    assert said("deepspeed") == ({"ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"}, [])
    put(monkeypatch, {"ACCELERATE_USE_CPU": "True"})
    assert said("deepspeed")[1] == []
    assert len(said("deepspeed", on_gpu=True)[1]) == 1


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true in the environment: it asks for FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "model parallelism"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "engine.kind is plain"),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, "TF32"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "not MASTER_ADDR and MASTER_PORT"),
        (TORCHRUN | {"RANK": "2"}, "expected a number below WORLD_SIZE=2"),
    ],
)
def test_what_contradicts_every_config_is_refused(
    variables: dict[str, str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    with pytest.raises(LaunchError, match=part), settled("plain", False):
        pass
    put(monkeypatch, dict.fromkeys(variables, "0"))
    with settled("plain", False):
        pass


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_rounding_on_cpus_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "BF16")
    with pytest.raises(LaunchError, match=f"{name}=BF16 in the environment: it may round"), settled("plain", False):
        pass
    monkeypatch.setenv(name, "STRICT")
    with settled("plain", False):
        pass


def test_another_accelerator_of_deepspeed_is_refused_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(LaunchError, match="DS_ACCELERATOR=xpu in the environment: expected cpu"):
        said("deepspeed")
    assert said("plain")[1] == []
    for device, on_gpu in (("cuda", True), ("cpu", False)):
        monkeypatch.setenv("DS_ACCELERATOR", device)
        assert said("deepspeed", on_gpu=on_gpu)[1] == []


def test_a_warning_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {"ACCELERATE_NEW_SETTING": "https://user:hunter2hunter2@host"})
    (line,) = said()[1]
    assert "hunter2" not in line


def test_several_processes_keep_what_their_launcher_says_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, TORCHRUN | {"PMI_SIZE": "4", "PMI_RANK": "2"})
    assert world() == World(1, 1, 2)
    assert said() == (set(TORCHRUN), [])


def test_one_process_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert world() == World()
    assert said() == (set(), [])


@pytest.mark.parametrize(
    ("variables", "lines"),
    [
        ({"RANK": "3", "LOCAL_RANK": "3"}, 1),
        ({"LOCAL_RANK": "3"}, 0),
        ({"WORLD_SIZE": "4"}, 1),
        ({"PMI_SIZE": "4", "PMI_RANK": "1", "PMI_FD": "7"}, 1),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 1),
        ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1"}, 1),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, 1),
    ],
)
def test_left_over_ranks_are_ignored_and_said(
    variables: dict[str, str], lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    assert world() == World()
    left, found = said()
    assert left == set()
    assert len(found) == lines
    assert all("trains alone" in line for line in found)


def test_gradients_are_those_of_the_config_whatever_accelerate_is_told(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train.total_tokens": 2 * 768, "schedule.warmup_tokens": 0}

    def run(name: str) -> list[tuple[float, float]]:
        config = tiny_config({**changes, "run.name": name})
        assert train(config) == 0
        return [(record["loss"], record["grad_norm"]) for record in RunFolder(config.run_folder).metrics.read()]

    alone = run("alone")
    put(monkeypatch, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.warns(UserWarning, match="in the environment is ignored"):
        assert run("told") == alone

    # Without the protection the gradients differ: otherwise this test would show nothing.
    import contextlib

    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    monkeypatch.setattr("pretrain.launch.settled", lambda *_, **__: contextlib.nullcontext())
    assert run("unprotected") != alone


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = launch("train", write_config(tmp_path), ACCELERATE_USE_FSDP="true")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ACCELERATE_USE_FSDP=true in the environment")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_processes_package_loads_no_torch() -> None:
    modules = "pretrain.processes.environment, pretrain.processes.failures, pretrain.processes.torchrun, pretrain"
    code = f"import sys; import {modules}, pretrain.processes.signals; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "False\n"
