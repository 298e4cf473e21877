"""The scripts that record momenta and measure directions on them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from optimizers import Aurora

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import record_momenta
from measure_carried import measured, phases
from record_momenta import Recorder, momenta

SCRIPTS = Path(record_momenta.__file__).parent
RATES = [0.01, 0.02, 0.02, 0.02, 0.01]


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, list[torch.Tensor]]:
    """A recording of a gate beside other weights, and what the optimizer took its directions of."""
    recorder, blended = Recorder(tmp_path, "gate"), []
    weights = {name: nn.Parameter(torch.randn(24, 6)) for name in ("gate", "other")}
    optimizer = Aurora([{"params": list(weights.items()), "kind": "matrix"}], direction="muon", polar="svd")
    hook = register_optimizer_step_pre_hook(recorder)
    for rate in RATES * 10:
        optimizer.param_groups[0]["lr"] = rate
        for p in weights.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
        b = optimizer.state[weights["gate"]]["momentum"]
        assert weights["gate"].grad is not None
        blended.append(torch.lerp(weights["gate"].grad, b, 0.95))
    hook.remove()
    about = {"config": "c", "overrides": [], "lr": sorted(recorder.rates[:10]) + recorder.rates[10:]}
    (tmp_path / "recording.json").write_text(json.dumps(about))
    return tmp_path, blended


def test_momenta_are_those_of_the_optimizer(recorded: tuple[Path, list[torch.Tensor]]) -> None:
    folder, blended = recorded
    found = list(momenta(folder, "gate"))
    assert len(found) == len(blended) == 50
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, blended, strict=True))
    spiked = list(momenta(folder, "gate", spike=(25, 30.0)))
    assert torch.equal(spiked[23], found[23])
    assert float(spiked[24].norm()) > 5 * float(found[24].norm())


def test_what_is_measured(recorded: tuple[Path, list[torch.Tensor]]) -> None:
    found = measured(recorded[0])
    assert found["shapes"] == {"gate": [24, 6]}
    assert found["settled"]["muon"]["n"] == 30
    medians = {name: q["median"] for name, q in found["settled"].items()}
    assert medians["polished"] < medians["carried"] < medians["muon"]
    for event in ("spike", "restart"):
        assert all(len(values) == 21 for values in found[event].values())
    assert found["restart"]["carried"][0] == pytest.approx(found["restart"]["muon"][0])


def test_phases_follow_the_rate() -> None:
    assert phases(RATES) == ["warm-up", "plateau", "plateau", "plateau", "decay"]


def test_the_recipe_of_the_recorded_momenta_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (SCRIPTS.parent / "docs/decisions/2026-11-26-carried-balance.md").read_text().replace("\\\n", "")
    (line,) = re.findall(r"^python scripts/record_momenta\.py .*", page, re.MULTILINE)
    _, script, _, *given = shlex.split(line)
    configs = []
    monkeypatch.setattr(record_momenta, "train", lambda config, resume: configs.append(config) or 0)
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "out"), *given])
    assert record_momenta.main() == 0
    assert configs[0].train.total_tokens == 150 * configs[0].train.global_batch_tokens
    about = json.loads((tmp_path / "out" / "recording.json").read_text())
    assert about == {"config": given[0], "overrides": given[3:], "lr": []}


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_takes_overrides_after_its_options(script: Path) -> None:
    # parse_args gives an empty list to `overrides` if an option stands before them, and then refuses them.
    if 'add_argument("overrides"' in (source := script.read_text()):
        assert "parse_intermixed_args(" in source
        assert "parse_args(" not in source
