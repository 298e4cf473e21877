"""The package works outside this project, with nothing but torch."""

import ast
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers import Aurora, Settings, param_groups

PACKAGE = Path(optimizers.__file__).parent


def test_the_package_needs_nothing_but_torch() -> None:
    # Itself it imports relatively, since it may be installed under another name.
    allowed = {"torch", *sys.stdlib_module_names}
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found = set() if node.level else {(node.module or "").split(".")[0]}
            else:
                continue
            assert found <= allowed, f"{file.name} imports {found - allowed}"


def test_the_readmes_example_trains() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    body = example.split("\n\n", 1)[1].strip().splitlines()
    assert len(body) <= 10
    names: dict[str, Any] = {}
    exec(
        example.replace("    loss.backward()", "    first = loss.item() if step == 0 else first\n    loss.backward()"),
        names,
    )
    assert names["loss"].item() < 0.5 * names["first"]
    kinds = {group["kind"] for group in names["optimizer"].param_groups}
    assert kinds == {"matrix", "adamw"}


class Regression(nn.Module):
    """A model as Hugging Face's Trainer wants it: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        prediction = self.layers(x)
        return {"loss": nn.functional.mse_loss(prediction, labels), "logits": prediction}


@pytest.mark.parametrize("direction", ["aurora", "normuon"])
def test_hugging_faces_trainer_trains_with_it_and_resumes(direction: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    x = torch.randn(64, 8)
    data = [{"x": row, "labels": row[:4] - row[4:]} for row in x]

    def trainer(folder: str, steps: int) -> Trainer:
        torch.manual_seed(0)
        model = Regression()
        optimizer = Aurora(param_groups(model, Settings(name=direction)))  # type: ignore[arg-type]
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=16,
            save_steps=15,
            logging_steps=5,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))  # type: ignore[arg-type]

    whole = trainer("whole", 30)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    resumed = trainer("resumed", 30)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-15"))
    for expected, found in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_hugging_faces_trainer_makes_it_from_class_and_options(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    x = torch.randn(32, 8)
    data = [{"x": row, "labels": row[:4] - row[4:]} for row in x]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=16,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
        weight_decay=0.01,
    )
    trainer = Trainer(Regression(), arguments, train_dataset=data, optimizer_cls_and_kwargs=(Aurora, {"lr": 0.02}))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="treated as matrices.*: 32 x 8, 4 x 32"):
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert {group["kind"] for group in trainer.optimizer.param_groups} == {"mixed"}


def test_accelerate_prepares_it_with_the_model() -> None:
    from accelerate import Accelerator

    torch.manual_seed(0)
    model, twin = Regression(), Regression()
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="perhaps an output head"):
        optimizer, other = Aurora(model, lr=0.02), Aurora(twin, lr=0.02)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    x = torch.randn(16, 8)
    for _ in range(3):
        wrapped.zero_grad()
        accelerator.backward(prepared(x, x[:, :4])["loss"])
        wrapped.step()
        other.zero_grad()
        twin(x, x[:, :4])["loss"].backward()
        other.step()
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_a_thousand_small_matrices_take_one_polar_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return polar(x, *args, **kwargs)

    # `directions.muon` is the function of that name.
    module = importlib.import_module("optimizers.directions.muon")
    polar = module.polar_factor
    monkeypatch.setattr(module, "polar_factor", counted)
    weights = [nn.Parameter(torch.randn(8, 4)) for _ in range(1000)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    before = [weight.detach().clone() for weight in weights]
    Aurora(weights).step()
    assert calls == [(1000, 8, 4)]
    assert all(not torch.equal(w, old) for w, old in zip(weights, before, strict=True))
