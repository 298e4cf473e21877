"""What a batch says about itself."""

import torch

from pretrain.data import TokenBatch

TOKENS = torch.arange(12, dtype=torch.int32).reshape(3, 4)
BATCH = TokenBatch(TOKENS, torch.tensor([3, 3, 1], dtype=torch.int32))


def test_targets_are_counted_without_padding() -> None:
    assert BATCH.num_targets == 7


def test_a_slice_holds_the_rows_of_a_rank() -> None:
    part = BATCH.slice(slice(1, 3))
    assert part.tokens.tolist() == TOKENS[1:].tolist()
    assert part.lengths.tolist() == [3, 1]
    assert part.num_targets == 4


def test_the_hash_sees_tokens_lengths_and_shape() -> None:
    other_token = TOKENS.clone()
    other_token[2, 3] += 1
    batches = [
        BATCH,
        TokenBatch(other_token, BATCH.lengths),
        TokenBatch(TOKENS, torch.tensor([3, 3, 2], dtype=torch.int32)),
        TokenBatch(TOKENS.reshape(3, 2, 2), BATCH.lengths),
    ]
    assert len({batch.sha256() for batch in batches}) == 4
    assert TokenBatch(TOKENS.clone(), BATCH.lengths.clone()).sha256() == BATCH.sha256()
    assert TokenBatch(TOKENS.t().contiguous().t(), BATCH.lengths).sha256() == BATCH.sha256()
