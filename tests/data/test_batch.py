"""What a batch says about itself."""

from typing import Any

import torch

from pretrain.data import BatchShare, TokenBatch
from tests.data.corpus import on_ranks, ranks_of

TOKENS = torch.arange(12, dtype=torch.int32).reshape(3, 4)
BATCH = TokenBatch(TOKENS, torch.tensor([3, 3, 1], dtype=torch.int32))


def share(tokens: torch.Tensor, lengths: list[int], rows: tuple[int, ...] = (0, 1, 2), total: int = 3) -> BatchShare:
    chosen = torch.tensor(lengths, dtype=torch.int32)
    return BatchShare(tokens, chosen, rows=rows, global_rows=total, global_targets=7)


def test_targets_are_counted_without_padding() -> None:
    assert BATCH.num_targets == 7


def test_a_slice_holds_some_of_the_rows() -> None:
    part = BATCH.slice(slice(1, 3))
    assert part.tokens.tolist() == TOKENS[1:].tolist()
    assert part.lengths.tolist() == [3, 1]
    assert part.num_targets == 4


def test_the_hash_sees_tokens_lengths_and_the_order_of_rows() -> None:
    other_token = TOKENS.clone()
    other_token[2, 3] += 1
    whole = share(TOKENS, [3, 3, 1])
    others = [
        share(other_token, [3, 3, 1]),
        share(TOKENS, [3, 3, 2]),
        share(TOKENS[[1, 0, 2]], [3, 3, 1]),
        share(TOKENS, [3, 3, 1], (0, 1, 2), 4),
    ]
    assert len({batch.sha256() for batch in [whole, *others]}) == 5
    assert share(TOKENS.t().contiguous().t(), [3, 3, 1]).sha256() == whole.sha256()


def test_the_hash_does_not_depend_on_who_has_which_rows() -> None:
    parts = [((0, 2), [3, 1]), ((1,), [3])]

    def hashed(group: Any) -> str:
        rows, lengths = parts[group.rank()]
        return share(TOKENS[list(rows)], lengths, rows).sha256(ranks_of(group))

    assert on_ranks(2, hashed) == [share(TOKENS, [3, 3, 1]).sha256()] * 2
