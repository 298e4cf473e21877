"""The optimizer benchmark: what it measures is what it says, and its result has the documented keys."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.writer import Snapshot, save_checkpoint
from pretrain.engine.ranks import Ranks

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))

import bench_optimizers as bench  # noqa: E402
from bench_optimizers_figures import all_figures  # noqa: E402
from bench_optimizers_inputs import captured, gaussian, matrix_shapes, parse_shapes, power_law  # noqa: E402
from bench_optimizers_measure import Quality  # noqa: E402
from bench_optimizers_report import Report, Result, table  # noqa: E402
from bench_optimizers_variants import AURORA, AURORA_3, MUON, RELEASED, VARIANTS  # noqa: E402


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The configs are named relative to the repository; one thread, and as many as before afterwards."""
    monkeypatch.chdir(REPOSITORY)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_checkpoint(root: Path, step: int, tensors: dict[tuple[str, str], Tensor]) -> Path:
    empty: dict[str, Any] = {key: {} for key in ("counters", "config", "identity", "data_state", "provenance")}
    snapshot = Snapshot(step=step, optimizer_groups=[], **empty)
    # Every parameter of a checkpoint has a weight.
    weights = {(name, "weight"): torch.zeros_like(t) for (name, _), t in tensors.items()}
    slots = (weights | tensors).items()
    fragments = [Fragment(name, slot, tuple(t.shape), 0, t.flatten()) for (name, slot), t in slots]
    return save_checkpoint(root, snapshot, fragments, {"torch": torch.zeros(1)}, Ranks())


# --- the whole script


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    run = folder / "run"
    momentum = {("a", "momentum"): torch.randn(48, 16), ("b", "momentum"): torch.randn(48, 16)}
    make_checkpoint(run / "checkpoints", 50, momentum)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        arguments = ["--quick", "--threads", "1", "--captured", str(run), "--shapes", "48x16,16x48"]
        code = bench.main([*arguments, "--json", str(folder / "b.json"), "--markdown", str(folder / "b.md")])
    assert code == 0
    report: dict[str, Any] = json.loads((folder / "b.json").read_text())
    return {"report": report, "markdown": (folder / "b.md").read_text()}


def check_keys(value: Any, kind: Any, where: str) -> None:
    """A JSON value has exactly the keys of its TypedDict, all the way down."""
    if hasattr(kind, "__required_keys__"):
        assert set(value) == set(kind.__annotations__), where
        for key, inner in get_type_hints(kind).items():
            check_keys(value[key], inner, f"{where}.{key}")
    elif get_origin(kind) is list:
        for number, entry in enumerate(value):
            check_keys(entry, get_args(kind)[0], f"{where}[{number}]")
    elif get_origin(kind) is dict and get_args(kind)[1] is Quality:
        for key, entry in value.items():
            check_keys(entry, Quality, f"{where}.{key}")


def test_the_json_has_the_documented_keys(quick: dict[str, Any]) -> None:
    check_keys(quick["report"], Report, "report")
    assert quick["report"]["results"]


def test_every_variant_is_measured_or_said_to_be_skipped(quick: dict[str, Any]) -> None:
    for shape in ([48, 16], [16, 48]):
        rows = [row["variant"] for row in quick["report"]["results"] if row["shape"] == shape]
        skipped = [row["variant"] for row in quick["report"]["skipped"] if row["shape"] == shape]
        assert sorted(rows + skipped) == sorted(variant.name for variant in VARIANTS)


def test_the_figures_name_all_numbers_and_every_row_is_in_the_tables(quick: dict[str, Any]) -> None:
    assert {figure["number"] for figure in quick["report"]["figures"]} == {"1", "2", "3", "4", "5", "6"}
    for row in quick["report"]["results"]:
        assert f"| {row['variant']} " in quick["markdown"]
    assert "Quality on *captured*" in quick["markdown"]
    assert quick["report"]["machine"]["command"] in quick["markdown"]


def test_every_judged_direction_is_near_its_exact_one(quick: dict[str, Any]) -> None:
    """That also checks that a step of others' optimizers is read as the direction that it is."""
    for row in quick["report"]["results"]:
        others = "optim" in row["variant"]
        error = row["quality"].get("gaussian", {}).get("direction_error")
        if error is not None:
            assert error < (0.35 if others else 0.03), row["variant"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "8192"],
        ["--shapes", "0x3"],
        ["--inputs", "gauss"],
        ["--inputs", "captured", "--captured", "nowhere"],
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_momentum_is_captured_from_a_run_in_the_cache_that_belongs_to_the_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 75 if len(commands) < 3 else 1)

    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    folder = bench.trained_run()
    assert bench.trained_run() == folder
    assert commands[0] == commands[1]
    assert folder.parent == tmp_path / "bench-optimizers"
    assert {f"run.root={folder.parent}", f"run.name={folder.name}", "--stop-at", "50"} <= set(commands[0])
    assert bench.main(["--quick", "--inputs", "captured"]) == 1
    assert "failed" in capsys.readouterr().err


@pytest.mark.long
def test_the_default_run_keeps_the_promises_that_do_not_depend_on_the_clock() -> None:
    """Writes build/bench_optimizers.json; its timings are not checked, because other tests run at the same time."""
    path = REPOSITORY / "build" / "bench_optimizers.json"
    assert bench.main(["--json", str(path), "--markdown", str(path.with_suffix(".md"))]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert all(figure["verdict"] != "not measured" for figure in figures)
    assert not [f for f in figures if f["verdict"] == "not met" and "time" not in f["what"]]


# --- inputs


def test_the_hard_inputs_are_what_they_are_called() -> None:
    assert parse_shapes("3x4, 5x6,3x4") == [(3, 4), (5, 6)]
    sigma = torch.linalg.svdvals(power_law(96, 32)[0].double())
    assert float(sigma[0] / sigma[-1]) == pytest.approx(2000, rel=1e-3)
    slopes = sigma.log().diff() / torch.arange(1, 33).double().log().diff()
    assert float(slopes.max() - slopes.min()) < 1e-3
    norms = gaussian(4096, 64)[0].norm(dim=1).log()
    assert float(norms.std()) == pytest.approx(1.0, rel=0.05)


def test_captured_momentum_comes_from_the_newest_checkpoint_by_shape(tmp_path: Path) -> None:
    old, new = torch.zeros(4, 2), torch.randn(4, 2)
    vector = {("norm", "exp_avg"): torch.ones(3)}
    make_checkpoint(tmp_path / "checkpoints", 1, {("w", "momentum"): old, **vector})
    make_checkpoint(tmp_path / "checkpoints", 2, {("w", "momentum"): new, ("w2", "momentum"): old, **vector})
    found = captured(tmp_path)
    assert list(found) == [(4, 2)]
    assert torch.equal(found[4, 2], torch.stack([new, old]))
    make_checkpoint(tmp_path / "adamw" / "checkpoints", 2, vector)
    with pytest.raises(ValueError, match="no momentum"):
        captured(tmp_path / "adamw")


# --- the numbers


def row(shape: tuple[int, int], variant: str, seconds: list[float], **quality: Quality) -> Result:
    return Result(
        shape=list(shape),
        variant=variant,
        timed="direction",
        options={},
        note="",
        flops=1,
        peak_bytes=1,
        seconds=seconds,
        median_seconds=sorted(seconds)[len(seconds) // 2],
        muon_ratio=None,
        released_speedup=5.5 if variant == AURORA else None,
        quality=quality,
    )


def quality(variation: float, error: float = 0.01, sigma: float = 1e-4, within: float = 1.0) -> Quality:
    return Quality(
        orthogonality_error=sigma,
        row_variation=variation,
        rows_within_1_percent=within,
        direction_error=error,
        alignment=0.9,
    )


def verdicts(results: list[Result], *, has_amx: bool) -> dict[str, Any]:
    shapes = matrix_shapes(bench.load_config(bench.LARGE_CONFIG))
    figures = all_figures(results, shapes, step_operations=4e15, device=torch.device("cpu"), has_amx=has_amx)
    return {figure["what"]: figure for figure in figures}


def test_the_numbers_follow_from_the_rows() -> None:
    wide, tall = (8192, 2048), (1024, 256)
    results = [
        row(wide, MUON, [1.0, 2.0, 4.0]),
        row(wide, AURORA, [1.4, 2.8, 9.0], gaussian=quality(0.004)),
        row(wide, AURORA_3, [2.0, 4.0, 9.0], powerlaw=quality(0.006)),
        row(wide, RELEASED, [9.0, 9.0, 9.0], gaussian=quality(0.01, error=0.004)),
        row(tall, AURORA, [1.0, 1.0, 1.0], captured=quality(0.002, sigma=2e-3)),
        row(tall, AURORA_3, [1.4, 1.5, 1.6], captured=quality(0.001, within=0.98)),
    ]
    found = verdicts(results, has_amx=True)
    expected = {
        "8192 x 2048: released time / Aurora's": (5.5, "met"),
        "5632 x 2048: released time / Aurora's": (None, "not measured"),
        "worst max |sigma - 1|": (2e-3, "not met"),
        "row-norm variation / the released one's, worst input": (0.4, "met"),
        "error to exact / the released one's, worst input": (2.5, "not met"),
        "8192 x 2048: time / Muon's": (1.4, "met"),
        "all matrices of the 1.1B: time / Muon's": (None, "not measured"),
        "K = 3, captured: row-norm variation": (0.001, "met"),
        "K = 3, captured: rows within 1 %": (0.98, "not met"),
        "K = 3 / K = 2 in time, captured": (1.5, "not met"),
        "K = 3, power law: row-norm variation": (0.006, "not met"),
    }
    for what, (value, verdict) in expected.items():
        assert (found[what]["value"], found[what]["verdict"]) == (pytest.approx(value), verdict), what
    assert all(figure["decided"] for figure in found.values())


def test_without_amx_the_first_number_is_not_decided() -> None:
    found = verdicts([], has_amx=False)
    assert {figure["number"] for figure in found.values() if not figure["decided"]} == {"1"}
    assert found["released, all matrices of the 1.1B: TFLOP"]["value"] == pytest.approx(224.74, rel=1e-4)


def test_the_time_of_the_whole_model_counts_each_shape_as_often_as_it_occurs() -> None:
    """Forms that aurora leaves to muon take muon's time."""
    shapes = matrix_shapes(bench.load_config(bench.LARGE_CONFIG))
    assert shapes == {(8192, 2048): 36, (2048, 8192): 18, (2048, 2048): 36, (512, 2048): 36}
    results = [row(shape, MUON, [1.0, 1.0, 1.0]) for shape in shapes] + [row((8192, 2048), AURORA, [2.0, 2.0, 2.0])]
    found = verdicts(results, has_amx=True)["all matrices of the 1.1B: time / Muon's"]
    assert found["value"] == pytest.approx((126 + 36) / 126)


def test_large_shapes_run_the_main_variants_and_slow_bf16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.empty(1, 8192, 2048, device="meta")
    by_name = {variant.name: variant for variant in VARIANTS}
    assert by_name[AURORA].skipped(large, everything=False) is None
    assert "--all-variants" in (by_name["muon, cans"].skipped(large, everything=False) or "")
    assert by_name["muon, cans"].skipped(large, everything=True) is None
    assert "native bf16" in (by_name["step of torch.optim.Muon"].skipped(large, everything=True) or "")
    assert by_name[AURORA].skipped(large.mT, everything=False) == "muon in this form"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    small = torch.empty(1, 8, 4)
    assert by_name["step of pytorch_optimizer.Muon"].skipped(small, everything=True) == (
        "pytorch_optimizer is not installed"
    )


def test_a_table_survives_a_bar_in_a_cell() -> None:
    assert table(["max |x|"], [["a|b"]]) == ["| max \\|x\\| |", "|-----------|", "| a\\|b      |"]
