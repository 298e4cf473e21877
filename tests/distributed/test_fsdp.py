"""An optimizer of DTensors (fully_shard) is the dense one: same weights and states, and exactly the planned bytes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.fsdp import compare
from tests.distributed.ranks import run_ranks
from tests.distributed.test_sharded import DIRECTIONS, SVD, TEAMS

VARIANTS = {name: {**SVD, **options} for name, options in DIRECTIONS.items()}
# Not bit for bit, as under ZeRO: norms of weights are sums over ranks, and products of a stack round by its size.
ROUNDED = {"contra_floor", "riemannian", "polished"}
SOME = [
    ((1,), ("normuon",), 3),
    ((2,), ("aurora",), 20),
    ((3,), ("normuon", "u_normuon_running", "contra_floor"), 3),
    ((2, 2), ("blocks", "carried"), 3),
]


def _compare(mesh_shape: tuple[int, ...], variants: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return compare(mesh_shape, variants, **more)


def ranks_of(mesh_shape: tuple[int, ...], variants: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """What each rank found, by variant."""
    world_size = mesh_shape[0] * (mesh_shape[1] if len(mesh_shape) > 1 else 1)
    return run_ranks(world_size, _compare, mesh_shape, variants, more)


def check(mesh_shape: tuple[int, ...], names: tuple[str, ...], steps: int) -> None:
    for found in ranks_of(mesh_shape, {name: VARIANTS[name] for name in names}, steps=steps):
        for name, result in found.items():
            assert result["worst"][0] <= (1e-6 if name in ROUNDED else 0.0), (name, result["worst"])
            assert result["received"] == result["planned"]
            assert result["fallbacks"][0] == result["fallbacks"][1]
            assert (result["received"] > 0) == (mesh_shape[-1] > 1)
            if mesh_shape[-1] > 1:
                assert result["straddling"] >= 6, "every matrix but the one of a single row is cut"


@pytest.mark.parametrize(("mesh_shape", "names", "steps"), SOME)
def test_dtensors_are_stepped_as_whole_parameters_are(
    mesh_shape: tuple[int, ...], names: tuple[str, ...], steps: int
) -> None:
    check(mesh_shape, names, steps)


@pytest.mark.long
@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (3,), (4,), (1, 3), (3, 1), (2, 2)])
def test_dtensors_are_stepped_as_whole_parameters_are_everywhere(mesh_shape: tuple[int, ...]) -> None:
    check(mesh_shape, tuple(VARIANTS), 20)


@pytest.mark.long
def test_one_dimension_of_a_larger_mesh() -> None:
    for found in ranks_of((2, 2), {"blocks": VARIANTS["blocks"]}, part_of_mesh=True, steps=3):
        assert found["blocks"]["worst"][0] == 0
        assert found["blocks"]["received"] == found["blocks"]["planned"] > 0


def test_fewer_rows_than_ranks_and_stacks_and_convolutions() -> None:
    shapes: dict[str, Any] = {
        "matrix": {"up": (3, 2), "down": (2, 7), "experts": (3, 7, 4), "conv": (6, 2, 2)},
        "vector": {"gain": (1,)},
    }
    options = {
        **VARIANTS["normuon"],
        "views": {"experts": "stack", "conv": "flat"},
        "row_blocks": {"experts": (5, 2), "conv": (4, 2)},
    }
    results = ranks_of((4,), {"normuon": options}, shapes=shapes, steps=3)
    assert [found["normuon"]["empty"] == 0 for found in results] == [False, True, True, True]
    assert all(found["normuon"]["worst"][0] == 0 for found in results)


@pytest.mark.parametrize(("fault", "name"), [("rows", "aurora"), ("ranks", "blocks")])
def test_a_planted_fault_is_seen(fault: str, name: str) -> None:
    """The rows of a shard permuted, and a layout in which each of two ranks has the other's rows.

    The direction of a matrix with permuted rows has them permuted in the same way, so that the second fault shows only
    where blocks of rows have directions of their own.
    """
    results = ranks_of((2,), {name: VARIANTS[name]}, fault=fault, steps=5)
    assert min(found[name]["worst"][0] for found in results) > 1e-3


def test_a_bf16_wire_moves_two_bytes_for_a_value() -> None:
    for found in ranks_of((2,), {"aurora": VARIANTS["aurora"]}, wire="bf16", steps=5):
        result = found["aurora"]
        assert result["received"] == result["planned"] == 4 * 2 * result["elements"]
        assert 1e-6 < result["worst"][0] < 2e-2


@pytest.mark.parametrize(
    ("mesh_shape", "names"), [((2, 2), ("normuon",)), pytest.param((2,), tuple(TEAMS), marks=pytest.mark.long)]
)
def test_teams_of_every_replica_share_a_matrix(mesh_shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    gram = {"polar": "gram", "polar_dtype": "fp32"}
    shapes = {"matrix": {"up": (61, 9)}, "vector": {"gain": (5,)}}
    variants = {name: {**gram, **TEAMS[name], "row_blocks": {}} for name in names}
    for found in ranks_of(mesh_shape, variants, shapes=shapes, steps=3):
        for result in found.values():
            assert result["team"] == 2
            assert result["worst"][0] < 1e-4
            assert result["received"] == result["planned"]
