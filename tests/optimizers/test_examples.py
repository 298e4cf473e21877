"""Each of examples/optimizers trains, and its wrong use gets a message that says what to do."""

import importlib.util
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import optimizers
from optimizers import Aurora, OptionError
from pretrain.processes.torchrun import free_port
from tests.conftest import REPOSITORY
from tests.distributed.ranks import run_ranks
from tests.optimizers.test_package import environment, install, run

EXAMPLES = REPOSITORY / "examples" / "optimizers"
SCRIPTS = ("nanogpt", "hf_trainer", "with_accelerate", "fsdp2", "with_deepspeed", "with_lightning")
RANKS = {"fsdp2": 2, "with_deepspeed": 2}

Load = Callable[[str], ModuleType]


def imported(name: str) -> ModuleType:
    """An example as a module."""
    sys.modules["aurora_optimizers"] = optimizers  # the package of the checkout, under the name of its wheel
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports an example for one test."""
    monkeypatch.setitem(sys.modules, "aurora_optimizers", optimizers)
    return imported


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


def test_nanogpt_trains_and_its_own_groups_get_a_warning(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("nanogpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = example.main(steps=12)
    assert losses[-1] < losses[0] - 0.5
    assert "embedding, tied to the output head" in capsys.readouterr().out
    model = example.GPT()
    decay, rest = [[p for p in model.parameters() if (p.ndim > 1) is two] for two in (True, False)]
    with pytest.warns(UserWarning, match=r"256 x 64.*Embeddings and output heads should go to AdamW.*Aurora\(model\)"):
        Aurora([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])


def test_the_trainer_gives_the_model_to_the_factory(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("hf_trainer")
    made: list[Aurora] = []

    class Noted(Aurora):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(example, "Aurora", Noted)
    losses = example.main(steps=12)
    assert losses[-1] < losses[0] - 0.5
    (optimizer,) = made
    assert "stored as inputs x outputs" in optimizer.table
    rates = {group["kind"]: group["base_lr"] for group in optimizer.param_groups}
    assert rates == {"matrix": 0.02, "adamw": pytest.approx(0.003)}


def test_the_trainer_that_gets_the_class_warns_of_conv1d(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("hf_trainer")

    trainer = example.Trainer

    def with_the_class(*args: Any, optimizer_cls_and_kwargs: Any, **kwargs: Any) -> Any:
        # The Trainer gives each group a weight decay of its own.
        return trainer(*args, optimizer_cls_and_kwargs=(Aurora, {"lr": 0.02}), **kwargs)

    monkeypatch.setattr(example, "Trainer", with_the_class)
    with pytest.warns(UserWarning, match=r"256 x 32.*GPT-2's Conv1D\) are transposed: Aurora\(model\)"):
        example.main(steps=1)


def test_accelerates_example_trains(load: Load) -> None:
    example = load("with_accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = example.main(steps=24)
    assert min(losses[-5:]) < losses[0]


def test_a_frozen_backbone_leaves_no_matrix(load: Load) -> None:
    example = load("with_accelerate")
    config = example.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with torch.device("meta"):
        model = example.BertForSequenceClassification(config)
    model.bert.requires_grad_(False)
    with pytest.raises(OptionError, match="found no matrix among 25 parameters, 23 of them frozen, so it would step"):
        Aurora(model)


def _fsdp2() -> tuple[list[float], str]:
    """The losses of the example, and what an optimizer of bare parameters says that was made before fully_shard."""
    example = imported("fsdp2")
    losses = example.main(steps=15)
    model = example.Transformer(dim=16, n_layers=1)
    optimizer = Aurora(model.parameters())
    example.fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    try:
        optimizer.step()
    except OptionError as error:
        return losses, str(error)
    finally:
        dist.destroy_process_group()
    return losses, ""


def test_the_loop_over_fully_shard_trains_and_parameters_of_before_are_refused() -> None:
    (losses, refused), (others, _) = run_ranks(2, _fsdp2)
    assert losses == others
    assert losses[-1] < losses[0] - 0.5
    assert re.search(r"sharded by fully_shard.*Make the optimizer after the model is wrapped", refused)


def _deepspeed() -> tuple[list[float], dict[int, str]]:
    """The losses of the example, and what the stages of ZeRO say of the plain class."""
    example = imported("with_deepspeed")
    losses = example.main(steps=20)
    config = json.loads(example.CONFIG.read_text())
    config["zero_allow_untested_optimizer"] = True  # DeepSpeed itself refuses without it
    refused = {}
    for stage in (1, 2, 3):
        config["zero_optimization"]["stage"] = stage
        try:
            example.main(steps=1, config=config)
        except OptionError as error:
            refused[stage] = str(error)
    dist.destroy_process_group()
    return losses, refused


def test_deepspeed_runs_at_stage_0_and_is_refused_where_parameters_are_cut() -> None:
    for losses, refused in run_ranks(2, _deepspeed):
        assert sum(losses[-4:]) / 4 < losses[0] - 0.3
        assert set(refused) == {1, 2, 3}
        for message in refused.values():
            assert re.search(r"flattened or split.*DeepSpeed leaves parameters whole at stage 0", message)


def test_lightning_trains_and_a_module_without_layers_is_refused(load: Load) -> None:
    pytest.importorskip("lightning")
    example = load("with_lightning")
    losses = example.main(steps=20)
    assert losses[-1] < losses[0] - 0.5


def test_a_module_whose_layers_are_made_later_is_refused() -> None:
    class Late(nn.Module):
        """As a LightningModule that makes its layers in `configure_model`."""

        def __init__(self) -> None:
            super().__init__()
            self.optimizer = Aurora(self)
            self.layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))

    with pytest.raises(OptionError, match=r"has no parameter yet.*after its layers"):
        Late()


SCRIPT = """
import runpy, sys
try:
    import deepspeed
except ImportError:
    pass
else:  # saves the compilation of an operation that only several machines use
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.long
def test_the_examples_run_from_the_wheel_in_an_environment_of_their_own(tmp_path: Path) -> None:
    python = environment(tmp_path, "torch", "transformers", "accelerate", "deepspeed")
    install(tmp_path, python, extra="examples")
    folder = shutil.copytree(EXAMPLES, tmp_path / "examples")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "TMPDIR")}
    variables = kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    for name in SCRIPTS:
        ranks = RANKS.get(name, 1)
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-addr", "127.0.0.1"]
        launch += ["--master-port", free_port()]
        command = [python, *(launch if ranks > 1 else ()), script if "deepspeed" in name else folder / f"{name}.py"]
        printed = run(*command, *([folder / f"{name}.py"] if "deepspeed" in name else ()), variables=variables)
        assert "loss" in printed, name
