"""Attention masks and positions for packed sequences.

The model library masks documents on its own accord where position ids start again, but only if no mask is given and
no cache is in use. What a token sees must not hang on that, so whenever positions start again a mask is passed, a
plain causal one if documents are to see each other.
"""

import torch


def attention_inputs(
    tokens: torch.Tensor, eos_id: int, *, document_mask: bool, reset_positions: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Build `attention_mask` and `position_ids` for a `LlamaForCausalLM` with SDPA and `use_cache=False`.

    A document begins after a separator, and the separator belongs to the document that it ends. A row that begins
    within a document treats what it holds of it as a whole one.

    Args:
        tokens: the inputs, integers [B, T], on any device.
        eos_id: the id of the separator.
        document_mask: let tokens attend to their own document only.
        reset_positions: count positions from 0 in each document.

    Returns:
        mask: bool [B, 1, T, T], true where query (third dimension) may attend to key (fourth); None where causal
            attention over the whole row is meant and the model's fast kernel for it can be used.
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
