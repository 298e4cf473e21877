"""The scripts that record momenta and measure directions on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from optimizers import Aurora

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from measure_carried import measured, phases
from record_momenta import Recorder, momenta

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
