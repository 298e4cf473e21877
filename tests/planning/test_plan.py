"""`aurora plan`: owners, traffic, memory and time of a run on a cluster, from a laptop."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from optimizers import Aurora, blocks, param_groups
from optimizers.sharded import LayoutError, chunked_layout, exchange, flat_layout, plan_group
from optimizers.sharded.owners import Rectangle, Unit, rectangles
from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.model.build import build_model
from pretrain.model.cost import flops_per_token
from pretrain.planning import cluster
from pretrain.planning.cluster import Cluster, check_cover, layout_of, plan_run
from pretrain.planning.devices import DEVICES
from pretrain.planning.report import answer
from pretrain.planning.traffic import Collective
from tests.conftest import REPOSITORY

H100 = DEVICES["h100"]
MakeConfig = Callable[..., Config]
BIG = str(REPOSITORY / "configs/aurora-1.1b.yaml")


@pytest.fixture(scope="module")
def big() -> dict[str, Any]:
    """The matrix group of the 1.1B, and the shapes of all groups."""
    config = load_config(BIG)
    groups = param_groups(build_model(config.model, 0, device="meta"), config.optimizer.settings())
    shapes = [dict(zip(g["param_names"], (tuple(p.shape) for p in g["params"]), strict=True)) for g in groups]
    return {"config": config, "groups": groups, "shapes": shapes, "matrix": groups[0]}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("ranks", "limit"), [(8, 1.15), (16, 1.15), (32, 1.15), (64, 1.3), (128, 1.53)])
def test_the_work_of_the_1b_is_shared_out_evenly(big: dict[str, Any], stage: int, ranks: int, limit: float) -> None:
    # 1.53 rather than 1.5 at 128 ranks, and why: docs/decisions/2026-11-24-zero.md.
    layout = (chunked_layout if stage == 3 else flat_layout)(big["shapes"], ranks)
    leverage = {**big["matrix"], "row_balance": "leverage"}
    assert plan_group(layout, leverage).imbalance <= limit


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_owners_by_locality_move_little_of_the_1b(big: dict[str, Any], ranks: int) -> None:
    plan = plan_group(flat_layout(big["shapes"], ranks), big["matrix"])
    elements = sum(unit.elements for unit in plan.units)
    assert max(plan.received_elements) * 2 <= 0.1 * 4 * elements / ranks  # bf16
    assert plan.imbalance <= 1.15


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_stage_3_moves_what_it_has_to(big: dict[str, Any], ranks: int) -> None:
    plan = plan_group(chunked_layout(big["shapes"], ranks), big["matrix"])
    elements = sum(unit.elements for unit in plan.units)
    padding = 4 * len(plan.units)
    assert 2 * sum(plan.received_elements) / ranks <= 4 * elements * (ranks - 1) / ranks**2 + padding


def test_the_plan_of_the_1b_on_64_ranks_answers_in_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BIG, "--ranks", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert [line.split()[0] for line in lines] == [
        "run",
        "cluster",
        "fits",
        "step",
        "total",
        "compute",
        "network",
        "memory",
        "slowest",
        "storage",
    ]
    assert "64 ranks on 8 nodes of 8 H100 (80 GB, 989 TFLOP/s in bf16)" in lines[1]
    assert lines[2].startswith("fits      yes: ")
    assert "no overlap is assumed" in lines[3]
    assert "450 GB/s within a node, 50 GB/s between nodes" in lines[6]


@pytest.mark.parametrize(
    ("share", "verdict", "part"),
    [(0.005, "yes", "less than 1%"), (0.89, "yes", "89%"), (0.92, "TIGHT", "92%"), (1.02, "NO", "102%")],
)
def test_a_device_holds_the_peak_or_does_not(share: float, verdict: str, part: str) -> None:
    config = load_config(BIG)
    peak = plan_run(config, Cluster(8, H100)).memory.peak
    line = answer(plan_run(config, Cluster(8, replace(H100, memory=round(peak / share)))))[2]
    assert line.startswith(f"fits      {verdict}: {peak / 1e9:.1f} GB at the peak of a step, {part} of the device")


def test_a_cpu_is_told_its_resident_memory(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", BIG, "--ranks", "8", "--device", "cpu"]
    assert main([*plan, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    resident = f"{memory['peak_on_cpu'] / 1e9:.1f}"
    assert resident != f"{memory['peak'] / 1e9:.1f}"
    assert main(plan) == 0
    assert f"fits      about {resident} GB resident at the peak of a step" in capsys.readouterr().out


def test_details_name_every_collective_and_owner(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BIG, "--ranks", "64", "--details"]) == 0
    said = capsys.readouterr().out
    assert "126 matrices, each covered exactly once" in said
    assert said.count("\nrank ") == 64
    assert "reduce gradients: reduce of 5,203,337,216 bytes in fp32 over 64 ranks, 5.122 GB received" in said


def test_json_holds_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BIG, "--ranks", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["peak"] < 80e9
    assert found["memory"]["weights"] == pytest.approx(2 * found["parameters"], rel=1e-3)
    assert found["gpu_hours"] == pytest.approx(found["step_seconds"] * found["steps"] * 64 / 3600)
    assert found["step_seconds"] == pytest.approx(found["compute_seconds"] + found["network_seconds"])
    assert found["network_seconds"] == pytest.approx(sum(c["seconds"] for c in found["collectives"]))
    config = load_config(BIG)
    assert found["model_flops"] == flops_per_token(config.model, 2048) * 524_288
    matrices = 1_094_713_344  # of these a weight and a momentum, of the rest a weight and two moments, in fp32
    assert found["checkpoint_bytes"] == 8 * matrices + 12 * (found["parameters"] - matrices)
    flops = found["model_flops"] / 64 + found["optimizer_flops"]
    assert found["compute_seconds"] == pytest.approx(flops / (0.4 * 989e12))


def test_settings_are_compared_in_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", BIG, "--ranks", "64", "--compare", "engine.zero_stage=1, 2,3"]
    assert main(arguments) == 0
    header, first, second, refused = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "setting"
    assert first.startswith("engine.zero_stage=1 ")
    assert second.startswith("engine.zero_stage=2 ")
    assert refused.startswith("engine.zero_stage=3 is not possible: samples.every_steps: expected null")
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine.zero_stage=2"]["received_bytes"] < found["engine.zero_stage=1"]["received_bytes"]
    assert "samples.every_steps" in found["engine.zero_stage=3"]["error"]


def test_the_1b_takes_the_stage_that_moves_least(big: dict[str, Any]) -> None:
    """Among the settings that sum gradients in fp32, on the number of ranks that its batch is made for."""

    def received(stage: int) -> float:
        engine = big["config"].engine.model_copy(update={"zero_stage": stage})
        return plan_run(big["config"].model_copy(update={"engine": engine}), Cluster(64, H100)).received_bytes

    own = big["config"].engine
    assert (own.accumulation_dtype, own.communication_dtype) == ("fp32", "fp32")
    assert min((1, 2, 3), key=received) == own.zero_stage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_plan_does_not_build_what_every_rank_holds(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """A thousand ranks are planned in seconds: matrices are assigned, not a thousand optimizers built."""
    calls = Counter[str]()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return call(*arguments, **named)

        return counted

    monkeypatch.setattr(Aurora, "__init__", counting("optimizers", Aurora.__init__))
    monkeypatch.setattr(exchange, "make_rounds", counting("rounds", exchange.make_rounds))
    monkeypatch.setattr(cluster, "build_model", counting("models", cluster.build_model))
    monkeypatch.setattr(Unit, "run", counting("runs", Unit.run))
    changes = {"engine.kind": "deepspeed", "engine.zero_stage": stage, "train.micro_batch_sequences": 1}
    config = tiny_config({**changes, "train.global_batch_tokens": 1024 * 32, "train.total_tokens": 1024 * 32})
    plan = plan_run(config, Cluster(1024, H100))
    fragments = sum(map(len, plan.matrices.fragments.values()))  # type: ignore[union-attr]
    assert calls["models"] == 1
    assert calls["runs"] <= 6 * fragments  # each a few times, not once for every rank
    assert set(calls) == {"models", "runs"}


@pytest.mark.parametrize(("stage", "ranks"), [(1, 3), (2, 5), (3, 7)])
def test_the_cover_is_that_of_the_rounds_of_all_ranks(tiny_config: MakeConfig, stage: int, ranks: int) -> None:
    config = tiny_config(
        {
            "engine.kind": "deepspeed",
            "engine.zero_stage": stage,
            "optimizer.row_blocks": {"q_proj": 2},
            "optimizer.name": "normuon",
        }
    )
    groups = param_groups(build_model(config.model, 0, device="meta"), config.optimizer.settings())
    layout = layout_of(config, groups, ranks)
    assert layout is not None
    assert layout.world_size == ranks
    plan = plan_group(layout, groups[0])
    arriving: Counter[str] = Counter()
    for rank in range(ranks):
        for turn in exchange.make_rounds(plan, rank):
            for links in (turn.local, *turn.inward.values()):
                for link in links:
                    arriving[plan.units[turn.parts[link.part].unit].name] += link.area.elements
    whole = {n: p.numel() for n, p in zip(groups[0]["param_names"], groups[0]["params"], strict=True)}
    assert check_cover(plan) == arriving == whole


def test_a_matrix_that_does_not_arrive_whole_is_an_error(tiny_config: MakeConfig) -> None:
    config = tiny_config({"engine.kind": "deepspeed", "engine.zero_stage": 1})
    groups = param_groups(build_model(config.model, 0, device="meta"), config.optimizer.settings())
    layout = layout_of(config, groups, 3)
    assert layout is not None
    plan = plan_group(layout, groups[0])
    name = plan.units[0].name
    twice = replace(plan, units=(*plan.units, plan.units[0]), teams=(*plan.teams, plan.teams[0]))
    with pytest.raises(LayoutError, match=f"{name}: .* elements are worked on, expected"):
        check_cover(twice)
    cut = tuple(tuple(f for f in own if f.name != name) for own in layout.fragments)
    torn = replace(plan)
    object.__setattr__(torn, "layout", SimpleNamespace(shapes=layout.shapes, fragments=cut, world_size=3))
    with pytest.raises(LayoutError, match=f"{name}: 0 elements arrive at rank"):
        check_cover(torn)


def test_more_ranks_share_out_more_memory(tiny_config: MakeConfig) -> None:
    def need(stage: int, ranks: int, kind: str = "deepspeed") -> int:
        zero = {"engine.zero_stage": stage, "engine.reduce_bucket_elements": 1000} if kind == "deepspeed" else {}
        config = tiny_config({"engine.kind": kind, "train.micro_batch_sequences": 1, **zero})
        return plan_run(config, Cluster(ranks, H100)).memory.lasting

    assert need(3, 4) < need(1, 4) < need(1, 2)
    assert need(0, 4, "plain") == need(0, 2, "plain")


@pytest.mark.parametrize("hidden", [64, 512, 2304])
def test_a_step_is_planned_with_the_stacks_that_it_makes(hidden: int, tiny_config: MakeConfig) -> None:
    """Of small matrices fewer than a bucket holds, of larger ones a bucket full, and one that exceeds it."""
    config = tiny_config({"model.hidden_size": hidden, "model.intermediate_size": 4 * hidden, "model.num_layers": 5})
    groups = config.optimizer.param_groups(build_model(config.model, 0, device="meta"))
    matrices = next(group for group in groups if group["kind"] == "matrix")
    shapes = [p.shape for p in matrices["params"]]
    # Of the real device, which decides how many are stacked, but without memory.
    real = [SimpleNamespace(shape=shape, param=SimpleNamespace(device=torch.device("cpu"))) for shape in shapes]
    most = max(sum(math.prod(block.shape) for block in stack) for stack in blocks.buckets(cast(Any, real)))
    assert plan_run(config, Cluster(1, DEVICES["cpu"])).memory.stepping == 6 * 4 * most
    if hidden == 512:
        assert most == blocks.CPU_BUCKET_ELEMENTS
        assert plan_run(config, Cluster(1, H100)).memory.stepping == 6 * 4 * 10 * 2**20  # gate and up of five layers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "7"], "cannot be divided over 7 ranks"),
        (["--ranks", "8", "--device", "abacus"], "--device: expected one of b200"),
        (["--ranks", "8", "--compare", "engine.zero_stage"], "--compare: expected section.key=value"),
    ],
)
def test_what_cannot_be_planned_is_bad_input(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", BIG, *arguments]) == 2
    assert words in capsys.readouterr().err


# What a rank receives of a payload of 1,000 bytes: by hand, for 4 ranks.
@pytest.mark.parametrize(
    ("operation", "received"),
    [("all_reduce", 1500), ("reduce", 750), ("reduce_scatter", 750), ("all_gather", 750), ("all_to_all", 1000)],
)
def test_bytes_on_the_wire_are_those_of_rings(operation: Any, received: float) -> None:
    assert Collective("x", operation, "fp32", 250, 4).received == received


def test_the_network_takes_the_time_of_the_given_links() -> None:
    one = Collective("x", "all_gather", "fp32", 16 * 10**9, 16)  # 60 GB received
    some = Collective("x", "all_to_all", "bf16", 10**9, 16)  # 2 GB received
    team = Collective("x", "all_reduce", "fp32", 10**9, 2)  # 4 GB received
    spread = Cluster(16, H100, per_node=8, within=300e9, between=20e9)
    assert spread.nodes == 2
    assert spread.seconds(one) == 60 / (8 * 20)  # all adapters of a node are slower than a device's own link
    assert spread.seconds(some) == 2 / 20
    assert spread.seconds(team) == 4 / 20
    fast = replace(spread, between=100e9)
    assert fast.seconds(one) == 60 / 300
    together = replace(spread, per_node=16)
    assert [together.seconds(c) for c in (one, some, team)] == [60 / 300, 2 / 300, 4 / 300]
    assert replace(spread, within=None, between=None).links == (450e9, 50e9)
    assert Cluster(16, DEVICES["l40s"]).seconds(one) is None


def test_links_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(*options: str) -> float:
        assert main(["plan", BIG, "--ranks", "64", "--json", *options]) == 0
        return float(json.loads(capsys.readouterr().out)["network_seconds"])

    assert seconds("--link-gbytes", "50", "--node-link-gbytes", "450") == seconds()
    assert seconds("--link-gbytes", "5", "--node-link-gbytes", "45") == pytest.approx(10 * seconds())


def test_an_unknown_link_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BIG, "--ranks", "64", "--device", "l40s"]) == 0
    said = capsys.readouterr().out
    assert "network time not known: the link speeds of this device are not known; give --link-gbytes" in said
    assert "not known without the time of a step" in said


def test_rectangles_are_the_elements_of_a_run_inside_an_area() -> None:
    rows, columns = 4, 5
    for low in range(rows * columns):
        for high in range(low + 1, rows * columns + 1):
            for area in (Rectangle(0, 4, 0, 5), Rectangle(1, 3, 0, 5), Rectangle(0, 4, 2, 4), Rectangle(2, 3, 1, 2)):
                wanted = [
                    (r, c)
                    for r in range(area.row, area.row_stop)
                    for c in range(area.column, area.column_stop)
                    if low <= r * columns + c < high
                ]
                found = [
                    (r, c)
                    for piece in rectangles(low, high, columns, area)
                    for r in range(piece.row, piece.row_stop)
                    for c in range(piece.column, piece.column_stop)
                ]
                assert found == wanted


def test_the_parts_of_a_team_make_up_the_matrix() -> None:
    for shape in ((7, 3), (3, 7), (5, 5)):
        unit = Unit("w", 0, *shape, cost=1)
        for members in (1, 2, 3):
            parts = [unit.part(member, members) for member in range(members)]
            assert sum(part.elements for part in parts) == unit.elements
