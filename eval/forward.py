"""One forward pass over rows of tokens, and the log-probabilities that are wanted of it.

The head is applied to the positions that predict something, and to no others. Log-probabilities are taken in float64
from the model's own logits, whatever their dtype.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.rows import Row, is_packed, separate_rows

EXACT_PER_TOKEN = 2e-5
"""The largest difference of log-likelihoods per token at which two ways of computing count as the same (float32)."""
_SOFTMAX_NUMBERS = 2**24  # in float64 at a time: 128 MiB


@dataclass(frozen=True)
class TokenScores:
    """What a forward pass says of each target token, on the CPU."""

    requests: Tensor
    """(tokens,) The request that each belongs to."""
    log_probabilities: Tensor
    """(tokens,) float64."""
    is_greedy: Tensor
    """(tokens,) Whether it is the most likely token."""


@torch.inference_mode()
def score_rows(model: PreTrainedModel, rows: Sequence[Row], device: torch.device) -> TokenScores:
    """Score every target token of `rows` in one forward pass."""
    length = max(row.length for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    parts = torch.full_like(tokens, -1)  # padding
    requests, places, expected = list[int](), list[int](), list[int]()
    for index, row in enumerate(rows):
        content, position, part = _lay_out(row)
        tokens[index, : len(content)] = torch.tensor(content)
        positions[index, : len(content)] = torch.tensor(position)
        parts[index, : len(content)] = torch.tensor(part)
        for place, request, token in _predictions(row):
            places.append(index * length + place)
            requests.append(request)
            expected.append(token)
    where = torch.tensor(places)
    scored = torch.zeros(len(rows) * length, dtype=torch.bool)
    scored[where] = True
    where = scored.cumsum(0)[where] - 1  # from places in the batch to places among the scored ones
    options: dict[str, Tensor] = {}
    # Attention is causal, so a row with one text needs no mask: padding on its right has no influence.
    if any(map(is_packed, rows)):
        options = {"attention_mask": _mask(parts.to(device), model.dtype), "position_ids": positions.to(device)}
    logits = _logits_at(model, tokens.to(device), scored.view(tokens.shape).to(device), options)
    log_probabilities, is_greedy = log_softmax_at(logits, where, torch.tensor(expected))
    return TokenScores(torch.tensor(requests), log_probabilities, is_greedy)


def log_softmax_at(logits: Tensor, where: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability (float64) of each expected token, and whether it is the most likely one; on the CPU.

    Args:
        logits: (positions, vocabulary), of any dtype.
        where: (tokens,) the position that predicts each token.
        expected: (tokens,) the token's id.
    """
    if logits.device.type == "mps":
        logits = logits.cpu()  # it has no float64
    size = max(1, _SOFTMAX_NUMBERS // logits.shape[-1])
    normalizers, likeliest = [], []
    for part in logits.split(size):
        wide = part.double()
        normalizers.append(wide.logsumexp(dim=-1))
        likeliest.append(wide.argmax(dim=-1))
    where, expected = where.to(logits.device), expected.to(logits.device)
    log_probabilities = logits[where, expected].double() - torch.cat(normalizers)[where]
    return log_probabilities.cpu(), (torch.cat(likeliest)[where] == expected).cpu()


def shares_exactly(model: PreTrainedModel, rows: Sequence[Row], device: torch.device) -> bool:
    """Return whether texts score in `rows` as they do alone, to `EXACT_PER_TOKEN`.

    Not every model takes masks of four dimensions and positions that restart: state-space models and some position
    biases cannot. A narrow model is compared in float32, since the order of sums alone changes its bf16 logits by more.
    """
    try:
        wide = model if model.dtype in (torch.float32, torch.float64) else _float32_copy(model, device)
        if wide is None:
            return False
        together = _per_request(score_rows(wide, rows, device))
        alone = _per_request(score_rows(wide, separate_rows([text for row in rows for text in row.texts]), device))
    except Exception:  # models raise anything
        return False
    return all(abs(value - alone[request][0]) <= EXACT_PER_TOKEN * n for request, (value, n) in together.items())


def _per_request(scores: TokenScores) -> dict[int, tuple[float, int]]:
    """The log-likelihood of each request and its number of tokens."""
    found: dict[int, tuple[float, int]] = {}
    for request, value in zip(scores.requests.tolist(), scores.log_probabilities.tolist(), strict=True):
        before, count = found.get(request, (0.0, 0))
        found[request] = (before + value, count + 1)
    return found


def _float32_copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel | None:
    """A copy of a narrow model for the comparison above; None if it takes more than a quarter of the memory."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None if 4 * model.num_parameters() > memory / 4 else copy.deepcopy(model).float()


def _lay_out(row: Row) -> tuple[list[int], list[int], list[int]]:
    """The tokens of a row, the position of each in its text, and its part (0: shared)."""
    tokens = list(row.texts[0].tokens[: row.shared])
    positions, parts = list(range(row.shared)), [0] * row.shared
    for part, text in enumerate(row.texts, start=1):
        own = text.tokens[row.shared :]
        tokens += own
        positions += range(row.shared, len(text.tokens))
        parts += [part] * len(own)
    return tokens, positions, parts


def _predictions(row: Row) -> Iterator[tuple[int, int, int]]:
    """Yield (place in the row, request, token that is predicted there)."""
    start = row.shared
    for text in row.texts:
        for target in text.targets:
            first = len(text.tokens) - len(target.tokens)
            for position, token in enumerate(target.tokens, start=first):
                yield (position if position < row.shared else start + position - row.shared), target.request, token
        start += len(text.tokens) - row.shared


def _mask(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to attention scores, (rows, 1, length, length), for the parts (rows, length) of tokens."""
    length = parts.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=parts.device).tril()
    seen = earlier & ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None]))
    mask = torch.zeros(seen.shape, dtype=dtype, device=parts.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def _logits_at(model: PreTrainedModel, tokens: Tensor, scored: Tensor, options: dict[str, Tensor]) -> Tensor:
    """Return logits of shape (scored positions in row order, vocabulary) for `tokens` (rows, length)."""
    with _head_sees_only(model.get_output_embeddings(), scored):
        logits: Tensor = model(tokens, **options).logits
    # A model without a separate head computes all of them.
    return logits[scored] if logits.shape[:2] == scored.shape else logits[0]


@contextmanager
def _head_sees_only(head: nn.Module | None, scored: Tensor) -> Iterator[None]:
    """Give `head` only the scored hidden states, of shape (1, scored positions, width).

    This is a hook and not a call of the head, so that what a model does to its logits afterwards (scaling, soft caps)
    still happens.
    """

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        return (hidden[scored].unsqueeze(0), *inputs[1:]) if hidden.shape[:2] == scored.shape else None

    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
