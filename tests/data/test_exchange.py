"""Rows go to the ranks that train on them: as few as possible, whatever was read where."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.data import TokenizerConfig
from pretrain.data.exchange import assign, exchange
from tests.data.corpus import Setting, drain, make_setting, make_texts, on_ranks, ranks_of, write_parquet

WIDTH = 5


@settings(max_examples=200)
@given(st.integers(1, 9).flatmap(lambda ranks: st.tuples(st.just(ranks), st.lists(st.integers(0, ranks - 1)))))
def test_ranks_train_on_equal_parts_and_the_fewest_rows_move(case: tuple[int, list[int]]) -> None:
    ranks, owners = case
    trainers = assign(owners, ranks)
    parts = [trainers.count(rank) for rank in range(ranks)]
    assert sorted(parts) == sorted(len(owners) // ranks + (rank < len(owners) % ranks) for rank in range(ranks))
    moved = sum(owner != trainer for owner, trainer in zip(owners, trainers, strict=True))
    assert moved == sum(max(0, owners.count(rank) - parts[rank]) for rank in range(ranks))
    assert all(rank == trainers[row] for row, rank in enumerate(owners) if owners.count(rank) <= parts[rank])


def test_the_example_of_the_module() -> None:
    assert assign([0, 1] * 4, 2) == [0, 1] * 4
    assert assign([0, 1, 2] * 2 + [0, 1, 2], 3) == [0, 1, 2] * 3
    assert assign([0, 1] * 4, 4) == [0, 1, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_row_arrives_and_only_rows_that_move_are_sent(ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    owners = (ranks * rng.random(24) ** 2).astype(int).tolist()  # rank 0 reads most
    trainers = assign(owners, ranks)
    table = rng.integers(0, 1 << 30, (24, WIDTH), dtype=np.int32)
    sent: list[int] = []
    isend = dist.isend

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return isend(tensor, *arguments, **options)

    def work(group: Any) -> Any:
        own = table[[row for row, owner in enumerate(owners) if owner == group.rank()]]
        return exchange(own, owners, trainers, ranks_of(group))

    with mock.patch.object(dist, "isend", counted):
        found = on_ranks(ranks, work)
    for rank, got in enumerate(found):
        assert got.tolist() == table[[row for row, trainer in enumerate(trainers) if trainer == rank]].tolist()
    moving = [pair for pair in zip(owners, trainers, strict=True) if pair[0] != pair[1]]
    assert sum(sent) == len(moving) * WIDTH * 4 > 0
    assert len(sent) == len(set(moving))  # one message from a rank to another


def sends(setting: Setting, ranks: int, rows: int, batches: int) -> int:
    """Messages with rows in the first batches."""
    with mock.patch.object(dist, "isend", wraps=dist.isend) as counted:
        on_ranks(ranks, lambda group: drain(setting.open(group=group), rows, batches))
    return counted.call_count


def test_a_source_whose_lanes_divide_evenly_over_the_ranks_sends_no_row(
    tmp_path: Any, tokenizer: TokenizerConfig
) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_texts(3, 120, longest=60), 10)
    setting = make_setting(tokenizer, path, lanes=8, epochs=None)
    assert sends(setting, 2, 8, 5) == sends(setting, 4, 12, 3) == sends(setting.changed(workers=3), 2, 6, 4) == 0
    assert sends(setting.changed(lanes=3), 2, 6, 3) > 0


def test_what_is_sent_does_not_depend_on_workers_or_time(tmp_path: Any, tokenizer: TokenizerConfig) -> None:
    """Each rank trains on the same rows, though one of them is slow."""
    path = write_parquet(tmp_path / "a.parquet", make_texts(3, 60), 4)
    setting = make_setting(tokenizer, path, lanes=7, epochs=1)

    def rows(workers: int, slow: int) -> list[list[tuple[int, ...]]]:
        def work(group: Any) -> list[tuple[int, ...]]:
            stream = setting.open(group=group)
            if group.rank() == slow:
                torch.zeros(1 << 22).sort()
            return [batch.rows for batch in drain(stream, 6)]

        return on_ranks(3, work)

    assert rows(0, 0) == rows(0, 2) == rows(2, 1)
