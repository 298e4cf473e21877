"""What a token can see, in all four combinations of document mask and position reset."""

from itertools import product
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from pretrain.data import attention_inputs

EOS = 0
FIRST = [5, 6, 7, 8, EOS]
OTHER = [9, 3, 2, 4, EOS]
SECOND = [11, 12, 13, 14, 15, EOS]
COMBINATIONS = list(product([False, True], repeat=2))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that what is seen shows clearly in the logits
    return model


@torch.no_grad()
def logits(model: LlamaForCausalLM, rows: list[list[int]], **options: bool) -> torch.Tensor:
    tokens = torch.tensor(rows)
    mask, positions = attention_inputs(tokens, EOS, **options)
    output: torch.Tensor = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return output


@pytest.mark.parametrize(("document_mask", "reset_positions"), COMBINATIONS)
def test_the_document_before_shows_only_without_a_mask(
    model: LlamaForCausalLM, document_mask: bool, reset_positions: bool
) -> None:
    options = {"document_mask": document_mask, "reset_positions": reset_positions}
    first, other = logits(model, [FIRST + SECOND, OTHER + SECOND], **options)[:, len(FIRST) :]
    if document_mask:
        assert torch.equal(first, other)
    else:
        assert (first - other).abs().amax(dim=-1).min() > 1e-3  # at every token


@pytest.mark.parametrize(("document_mask", "reset_positions"), COMBINATIONS)
def test_a_masked_document_is_as_if_alone(model: LlamaForCausalLM, document_mask: bool, reset_positions: bool) -> None:
    """Rotary embeddings see differences of positions only, so a reset shows only where documents see each other."""
    options = {"document_mask": document_mask, "reset_positions": reset_positions}
    packed = logits(model, [FIRST + SECOND], **options)[0]
    alone = logits(model, [SECOND], document_mask=False, reset_positions=False)[0]
    torch.testing.assert_close(packed[: len(FIRST)], logits(model, [FIRST], **options)[0])
    if document_mask:
        torch.testing.assert_close(packed[len(FIRST) :], alone, atol=1e-4, rtol=1e-4)
    else:
        assert (packed[len(FIRST) :] - alone).abs().max() > 1e-3


def test_without_a_document_mask_a_reset_moves_documents_but_hides_nothing(model: LlamaForCausalLM) -> None:
    plain = logits(model, [FIRST + SECOND], document_mask=False, reset_positions=False)
    moved = logits(model, [FIRST + SECOND], document_mask=False, reset_positions=True)
    assert (plain - moved)[:, len(FIRST) :].abs().max() > 1e-3
    torch.testing.assert_close(plain[:, : len(FIRST)], moved[:, : len(FIRST)])


def test_masks_and_positions_are_those_of_the_definition() -> None:
    tokens = torch.tensor([[*FIRST, *SECOND], [3, EOS, EOS, 4, EOS, 5, 6, 7, 8, 9, 10], [EOS, *SECOND, 1, 2, 3, 4]])
    for document_mask, reset_positions in COMBINATIONS[1:]:
        mask, positions = attention_inputs(tokens, EOS, document_mask=document_mask, reset_positions=reset_positions)
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.shape == (3, 1, 11, 11)
        for row, line in enumerate(tokens.tolist()):
            documents = [line[:t].count(EOS) for t in range(len(line))]  # a separator ends its own document
            for query, key in product(range(len(line)), repeat=2):
                seen = key <= query and (documents[key] == documents[query] or not document_mask)
                assert mask[row, 0, query, key] == seen
            expected = [t - documents.index(documents[t]) for t in range(len(line))]
            assert (positions is not None) == reset_positions
            assert positions is None or positions[row].tolist() == expected


@pytest.mark.parametrize(("document_mask", "reset_positions"), COMBINATIONS)
def test_the_library_never_detects_documents_by_itself(
    model: LlamaForCausalLM, document_mask: bool, reset_positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its detection reads restarted positions as documents, if it gets to see them."""
    detected = []
    find = masking_utils.find_packed_sequence_indices

    def spy(position_ids: torch.Tensor) -> Any:
        detected.append(find(position_ids))
        return detected[-1]

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", spy)
    tokens = torch.tensor([FIRST + SECOND])
    logits(model, tokens.tolist(), document_mask=document_mask, reset_positions=reset_positions)
    assert all(found is None for found in detected)
    # The spy does stand where the library looks:
    _, positions = attention_inputs(tokens, EOS, document_mask=True, reset_positions=True)
    model(tokens, position_ids=positions, use_cache=False)
    assert detected[-1] is not None
