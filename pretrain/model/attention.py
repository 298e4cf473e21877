"""Attention within documents without a dense mask.

A dense mask has T x T entries for each sequence, and with one the kernels compute the attention between all of its
tokens, of which they then drop most. The other kernels here compute it within each document only: their time and memory
grow with the sum of the squared lengths of the documents, and with the number of tokens.

Shapes: B sequences of T tokens, H heads of d dimensions, K key-value heads, N documents in the batch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

AttentionMask: TypeAlias = Tensor | BlockMask | None
"""None: causal over the whole sequence. Bool [B, 1, T, T]: true where a query (third dimension) may attend. Integers
[1, 1, 1, N+1]: where the documents begin if all sequences are joined to one of BT tokens, and BT at the end; attention
is causal within each document. A BlockMask: blocks that hold any attention, and what is masked within them."""

DocumentKernel: TypeAlias = Literal["varlen", "flex", "segments", "dense"]

FLEX_BLOCK = 128
"""The side of a block of a block mask, which FlexAttention's kernels expect by default. On sequences shorter than a
block they are wrong: on an H200, torch 2.11 returned gradients of the queries that were off by 90 %."""

TRANSFORMERS_NAME = "aurora_documents"
"""The name of `attend` among the attention functions of transformers."""


class KernelChoice(NamedTuple):
    """How attention within documents is computed."""

    kernel: DocumentKernel
    reason: str


def choose_kernel(
    wanted: Literal["auto", "dense"], device: torch.device, dtype: torch.dtype, head_size: int, length: int
) -> KernelChoice:
    """Choose the kernel for attention within documents.

    Args:
        wanted: `train.document_attention`.
        device: of the model.
        dtype: of queries, keys and values.
        head_size: d.
        length: T.

    """
    if wanted == "dense":
        return KernelChoice("dense", "a dense mask, as train.document_attention asks")
    if device.type == "cpu":
        return KernelChoice("segments", "one call for each document")
    if device.type != "cuda":
        return KernelChoice("dense", f"a dense mask: PyTorch has no other kernel for {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if dtype in (torch.bfloat16, torch.float16) and capability >= (8, 0) and head_size <= 256 and head_size % 8 == 0:
        return KernelChoice("varlen", "the variable-length FlashAttention kernel")
    why = f"FlashAttention does not support {dtype} with heads of {head_size} on this GPU"
    if importlib.util.find_spec("triton") and capability >= (7, 0) and head_size >= 16 and length >= FLEX_BLOCK:
        return KernelChoice("flex", f"compiled FlexAttention ({why})")
    needs = f"Triton, a newer GPU, heads of 16, or sequences of {FLEX_BLOCK} tokens"
    return KernelChoice("dense", f"a dense mask ({why}, and FlexAttention needs {needs})")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float | None = None) -> Tensor:
    """Return the attention of a packed batch.

    Args:
        query: [B, H, T, d].
        key: [B, K, T, d]; each serves H / K query heads.
        value: [B, K, T, d].
        mask: what may attend to what.
        scale: factor of the scores; None: 1 / sqrt(d).

    Returns:
        [B, H, T, d] in the dtype of autocast, or else of the query.

    """
    if torch.is_autocast_enabled(query.device.type):
        # Other attention is cast by autocast itself; the rotation may have left the queries and keys in fp32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        blockwise: Tensor = _flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
        return blockwise
    if mask is None or mask.dtype == torch.bool:
        causal = mask is None
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    batch, _, length, _ = query.shape
    if grouped and query.device.type == "cpu":
        key, value = (z.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for z in (key, value))
    query, key, value = (z.transpose(1, 2).flatten(0, 1) for z in (query, key, value))  # [BT, H or K, d]
    borders = mask.flatten()
    if query.device.type == "cpu":
        mixed = _attend_segments(query, key, value, borders, scale)[0]
    else:
        # No document is longer than a sequence. Its true maximum would have to be computed on the CPU.
        window = (-1, 0)  # causal
        mixed = varlen_attn(
            query, key, value, borders, borders, length, length, scale=scale, window_size=window, enable_gqa=grouped
        )
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)


@functools.cache
def _flex() -> Callable[..., Any]:
    """Compile FlexAttention: uncompiled, it computes all T x T scores."""
    return torch.compile(flex_attention)


@torch.library.custom_op("aurora::attend_segments", mutates_args=())
def _attend_segments(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of each document by itself, on a CPU; one operator, so that torch.compile need not unroll the loop.

    Args:
        query: [BT, H, d].
        key: [BT, H, d].
        value: [BT, H, d].
        borders: integers [N+1].
        scale: factor of the scores; None: 1 / sqrt(d).

    Returns:
        mixed: [BT, H, d].
        logsumexp: [BT, H] of the scores, for the backward pass.

    """
    mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for begin, end in _segments(borders):
        parts = (_alone(z[begin:end]) for z in (query, key, value))
        out, scores = forward(*parts, is_causal=True, scale=scale)
        mixed[begin:end] = out[0].transpose(0, 1)
        logsumexp[begin:end] = scores[0].transpose(0, 1)
    return mixed, logsumexp


@_attend_segments.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(query.shape[:2], dtype=dtype)


@torch.library.custom_op("aurora::attend_segments_backward", mutates_args=())
def _attend_segments_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    logsumexp: Tensor,
    borders: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    found = tuple(torch.empty_like(z, memory_format=torch.contiguous_format) for z in (query, key, value))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for begin, end in _segments(borders):
        parts = (_alone(z[begin:end]) for z in (grad, query, key, value, mixed, logsumexp))
        for whole, part in zip(found, backward(*parts, 0.0, True, scale=scale), strict=True):
            whole[begin:end] = part[0].transpose(0, 1)
    return found[0], found[1], found[2]


@_attend_segments_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    logsumexp: Tensor,
    borders: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (query, key, value))
    return query, key, value


def _segments(borders: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(borders.tolist()))


def _alone(rows: Tensor) -> Tensor:
    """[length, H, ...] to [1, H, length, ...]."""
    return rows.transpose(0, 1)[None]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, borders, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, borders)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, mixed, logsumexp, borders = ctx.saved_tensors
    grads = _attend_segments_backward(grad, query, key, value, mixed, logsumexp, borders, ctx.scale)
    return (*grads, None, None)


_attend_segments.register_autograd(_backward, setup_context=_keep_for_backward)


def _attend_in_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attend` as a model of transformers calls it. Dense masks go to the library's own function, as without this."""
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2), None


# Without a function for masks of that name, the library makes none: it would first read positions back from the
# device, in every forward pass, to see whether a row has several documents. `attention_inputs` gives what masks are
# needed.
AttentionInterface.register(TRANSFORMERS_NAME, _attend_in_transformers)
