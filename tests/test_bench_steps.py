"""The benchmark of whole steps: lists are what they say, every optimizer steps as often, ratios are within a round."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_steps


def test_lists_are_shapes_with_counts_and_the_layers_of_a_config() -> None:
    given = bench_steps.parse(["--lists", "1000x512x128,configs/aurora-1.1b.yaml:2"]).lists
    assert given["1000x512x128"] == Counter({(512, 128): 1000})
    model = given["configs/aurora-1.1b.yaml:2"]
    whole = bench_steps.parse(["--lists", "configs/aurora-1.1b.yaml:18"]).lists["configs/aurora-1.1b.yaml:18"]
    assert whole == Counter({shape: 9 * count for shape, count in model.items()})


@pytest.mark.parametrize("text", ["12x", "0x3x4", "3x4", "configs/aurora-1.1b.yaml", "configs/aurora-1.1b.yaml:0"])
def test_other_lists_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        bench_steps.parse(["--lists", text])
    assert raised.value.code == 2
    assert "expected COUNTxROWSxCOLUMNS or CONFIG:LAYERS" in capsys.readouterr().err


def test_every_optimizer_steps_in_every_round_and_the_first_is_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Counting:
        def __init__(self, weights: list[Any]) -> None:
            assert [tuple(weight.grad.shape) for weight in weights] == [(6, 4)] * 3
            self.steps = 0
            made.append(self)

        def step(self) -> None:
            self.steps += 1

    took = {"torch.optim.Muon": [1.0, 4.0, 2.0], "Muon": [2.0, 4.0, 1.0]}
    timed = bench_steps.timed_rounds

    def planted(steps: Any, *args: Any, **options: Any) -> dict[str, list[float]]:
        timed(steps, *args, **options)
        return took

    monkeypatch.setattr(bench_steps, "timed_rounds", planted)
    monkeypatch.setattr(bench_steps, "OPTIMIZERS", dict.fromkeys(took, Counting))
    assert bench_steps.main(["--lists", "3x6x4", "--rounds", "3", "--threads", "1", "--json", str(tmp_path / "a")]) == 0
    assert [one.steps for one in made] == [4, 4]  # one of them to make the state
    base, muon = json.loads((tmp_path / "a").read_text())["rows"]
    assert (base["ratio"], base["ms"]) == (1.0, 2000.0)
    assert (muon["ratio"], muon["lowest"], muon["highest"], muon["ms"]) == (1.0, 0.5, 2.0, 2000.0)


@pytest.mark.filterwarnings("error::UserWarning")  # of parameters without names
def test_the_optimizers_that_are_compared_step() -> None:
    rows = bench_steps.measure("small", Counter({(12, 4): 2}), bench_steps.torch.device("cpu"), 1)
    assert [row["optimizer"] for row in rows] == list(bench_steps.OPTIMIZERS)
    assert all(row["ms"] > 0 for row in rows)
