"""What intervals over seeds cover: the initialisation and, if it was varied, the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.report.seeds import intervals_cover, seed_warnings, varied_keys
from pretrain.report.sweep import load
from pretrain.report.write import results
from tests.conftest import REPOSITORY
from tests.report.folders import CONFIG, job, records, write_run, write_sweep


def sweep_over(root: Path, *configs: dict[str, Any]) -> Path:
    """A sweep whose seeds have these configs, with two optimizers."""
    jobs = []
    for name in ("muon", "aurora"):
        for seed, config in enumerate(configs, start=1):
            write_run(root / f"{name}-{seed}", records(5), config={"optimizer": {"name": name}, **config})
            jobs.append(job(f"{name}-{seed}", {"optimizer": name, "seed": str(seed)}))
    seeds = [str(seed) for seed in range(1, len(configs) + 1)]
    return write_sweep(root, {"optimizer": ["muon", "aurora"], "seed": seeds}, jobs)


@pytest.mark.parametrize(
    ("of_seed", "keys", "said"),
    [
        (lambda s: {"run": {"seed": s}}, ["run.seed"], "cover the initialisation only: the runs of all seeds read"),
        (
            lambda s: {"run": {"seed": s}, "data": {"seed": s}},
            ["data.seed", "run.seed"],
            "Intervals over seeds cover the initialisation and the order of the data.",
        ),
        (lambda s: {"data": {"seed": s}}, ["data.seed"], "Intervals over seeds cover the order of the data."),
        # Two of three runs read the same.
        (lambda s: {"run": {"seed": s}, "data": {"seed": s // 2}}, ["run.seed"], "the initialisation only"),
        (lambda s: {"run": {"seed": s, "name": str(s)}}, ["run.seed"], "the initialisation only"),
        (lambda s: {"run": {"seed": 1}}, [], ""),
    ],
)
def test_what_differs_between_seeds_is_what_intervals_cover(
    of_seed: Any, keys: list[str], said: str, tmp_path: Path
) -> None:
    folder = sweep_over(tmp_path, *(of_seed(seed) for seed in (1, 2, 3)))
    found = results(folder)
    assert found["varied_keys"] == keys == varied_keys(load(folder))
    assert said in found["intervals_cover"]
    assert bool(said) == bool(found["intervals_cover"])


def test_a_default_differs_from_another_value(tmp_path: Path) -> None:
    """An absent data.seed is one value, so seeds 1 and 2 of three differ from the first only."""
    configs = [{"run": {"seed": 1}}, {"run": {"seed": 2}, "data": {"seed": 1}}, {"run": {"seed": 3}}]
    assert results(sweep_over(tmp_path, *configs))["varied_keys"] == ["run.seed"]


def test_a_single_run_covers_nothing(tmp_path: Path) -> None:
    found = results(write_run(tmp_path / "run", records(5)))
    assert (found["varied_keys"], found["intervals_cover"]) == ([], "")


def test_other_keys_are_named() -> None:
    assert "cover the initialisation and data.lanes only" in intervals_cover(["data.lanes", "run.seed"])
    assert CONFIG["run"]["seed"] == 1


def test_the_shipped_experiments_can_decide_claims_and_vary_the_order_of_the_data() -> None:
    files = [path for path in (REPOSITORY / "configs/experiments").glob("*.yaml") if path.name != "small.yaml"]
    assert len(files) >= 7
    for file in files:
        seeds = list(yaml.safe_load(file.read_text())["axes"]["seed"].values())
        assert len(seeds) >= 3, file
        for key in ("run.seed", "data.seed"):
            assert len({changes[key] for changes in seeds}) == len(seeds), file
        assert seed_warnings(yaml.safe_load(file.read_text())["axes"], "seed") == [], file


def test_a_check_says_beforehand_what_claims_will_not_say() -> None:
    def of(*labels: dict[str, int]) -> str:
        return "; ".join(seed_warnings({"seed": {str(n): label for n, label in enumerate(labels)}}, "seed"))

    both = [{"run.seed": seed, "data.seed": seed} for seed in (1, 2, 3)]
    assert of(*both) == ""
    assert of(*both[:2]).startswith("every claim will be undecided: the axis seed has 2 labels")
    assert of(both[0]).startswith("every claim will be undecided: the axis seed has 1 label,")
    assert seed_warnings({}, "seed")[0].startswith("every claim will be undecided: the axis seed has no labels")
    assert of(*both[:2], {"run.seed": 3}).startswith("intervals will cover the initialisation only")
    assert of(*({"data.seed": seed} for seed in (1, 2, 3))) == ""
