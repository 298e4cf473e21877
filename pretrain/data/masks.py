"""Attention masks and positions for packed sequences.

The transformers library masks documents by itself where position ids restart, but only if it gets no mask and uses no
cache. What a token attends to must not depend on that. Whenever positions restart, a mask is therefore passed: one that
only says "causal" if tokens may attend across documents.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask

from pretrain.model.attention import FLEX_BLOCK, AttentionMask, DocumentKernel


def attention_inputs(
    tokens: torch.Tensor,
    eos_id: int,
    *,
    document_mask: bool,
    reset_positions: bool,
    kernel: DocumentKernel = "dense",
    lengths: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[AttentionMask, torch.Tensor | None]:
    """Build `attention_mask` and `position_ids` for a model with SDPA and `use_cache=False`.

    A document begins after a separator, and the separator belongs to the document that it ends. If a row begins within
    a document, the part in the row is treated as a whole document.

    Args:
        tokens: the inputs, integers [B, T]; on the CPU, or the borders of documents are copied there and back.
        eos_id: id of the separator.
        document_mask: tokens attend to their own document only.
        reset_positions: positions count from 0 in each document.
        kernel: what the mask is for. All masks mean the same, except for the padding, whose outputs do not count.
        lengths: integers [B], the valid inputs of each row; the others are padding. None: all are valid.
        device: of what is returned; None: that of `tokens`.

    Returns:
        mask: for the kernel `dense` bool [B, 1, T, T], true where the query (third dimension) may attend to the key
            (fourth); for `flex` a block mask; for the others the borders of documents, int32 [1, 1, 1, N+1]. None for
            causal attention over the whole row, for which the model has a fast kernel.
        position_ids: int64 [B, T]; None for positions 0 to T-1.

    """
    if not document_mask and not reset_positions:
        return None, None
    device = device or tokens.device
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == eos_id
    if lengths is not None:  # the padding of a row, which consists of separators, is one document
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        ends = lengths.to(tokens.device)[:, None]
        begins = (begins & (columns < ends)) | (columns == ends)
    begins[:, 0] = False
    hidden = begins if document_mask else torch.zeros_like(begins)
    positions = torch.arange(tokens.shape[1], device=device)
    starts = _starts(begins.to(device), positions)
    reset = positions - starts if reset_positions else None
    if kernel == "dense":
        batch, length = tokens.shape
        mask = (positions[:, None] >= positions[None, :]).expand(batch, 1, length, length)
        if document_mask:
            mask = mask & (starts[:, None, :, None] == starts[:, None, None, :])
        return mask, reset
    if kernel == "flex":
        return _block_mask(_starts(hidden.to(device), positions)), reset
    return _borders(hidden).to(device, non_blocking=True), reset


def _starts(begins: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return where the document of each token begins, [B, T]."""
    return (begins * positions).cummax(dim=1).values


def _borders(begins: torch.Tensor) -> torch.Tensor:
    """Return the borders of the documents, int32 [1, 1, 1, N+1]; a row ends a document."""
    begins = begins.clone()
    begins[:, 0] = True
    found = begins.flatten().nonzero().flatten()
    return torch.cat([found, found.new_tensor([begins.numel()])]).to(torch.int32)[None, None, None]


def _block_mask(starts: torch.Tensor) -> BlockMask:
    """Return the block mask of documents, without the dense mask from which PyTorch would make it.

    The keys of a block of queries reach from the beginning of the document of its first query to the block itself.
    """
    length = starts.shape[1]
    blocks = torch.arange(-(-length // FLEX_BLOCK), device=starts.device)
    first = starts[:, ::FLEX_BLOCK] // FLEX_BLOCK  # [B, blocks]
    count = blocks - first + 1
    indices = (first[:, :, None] + blocks).clamp(max=len(blocks) - 1)

    def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (key >= starts[row, query])

    return BlockMask.from_kv_blocks(
        count[:, None].to(torch.int32),
        indices[:, None].to(torch.int32),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )
