"""Attention masks and positions for packed sequences.

The transformers library masks documents by itself where position ids restart, but only if it gets no mask and uses no
cache. What a token attends to must not depend on that. Whenever positions restart, a mask is therefore passed: a plain
causal one if tokens may attend across documents.
"""

import torch


def attention_inputs(
    tokens: torch.Tensor, eos_id: int, *, document_mask: bool, reset_positions: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Build `attention_mask` and `position_ids` for a `LlamaForCausalLM` with SDPA and `use_cache=False`.

    A document begins after a separator, and the separator belongs to the document that it ends. If a row begins within
    a document, the part in the row is treated as a whole document.

    Args:
        tokens: the inputs, integers [B, T], on any device.
        eos_id: id of the separator.
        document_mask: tokens attend to their own document only.
        reset_positions: positions count from 0 in each document.

    Returns:
        mask: bool [B, 1, T, T], true where the query (third dimension) may attend to the key (fourth); None for causal
            attention over the whole row, for which the model has a fast kernel.
        position_ids: int64 [B, T]; None for positions 0 to T-1.

    """
    if not document_mask and not reset_positions:
        return None, None
    batch, length = tokens.shape
    positions = torch.arange(length, device=tokens.device)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == eos_id
    starts = (begins * positions).cummax(dim=1).values  # [B, T]: where the document of each token begins
    mask = (positions[:, None] >= positions[None, :]).expand(batch, 1, length, length)
    if document_mask:
        mask = mask & (starts[:, None, :, None] == starts[:, None, None, :])
    return mask, positions - starts if reset_positions else None
