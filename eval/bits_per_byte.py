"""Bits per byte of a model on a held-out text.

The sum of -log2 p over all tokens of a document, divided by the UTF-8 bytes of its original text. It does not depend on
the tokenizer, so that models with different ones can be compared (Gao et al., "The Pile", 2020, section 3.1).

A document longer than the model's context is scored in windows. With a context of 4 tokens and a stride of 2, where `s`
is the start token (BOS, or EOS if the model has none) and the others are the document's tokens 0 to 7:

    input     targets
    s 0 1 2   0 1 2 3     the first window scores all that fits
    1 2 3 4       4 5     the next ones score 2 tokens, and see at least 2 tokens before each
    3 4 5 6       6 7

Text that looks like a special token is read as plain text, as in training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from eval.errors import EvalError
from eval.ratios import ratio_of_sums
from eval.texts import HeldOutText
from eval.validity_schema import BitsPerByte, DocumentBits

_LOGITS_BYTES = 512 << 20  # of one forward pass: every position is scored, so all logits are needed
_DOCUMENTS_AT_A_TIME = 512


class Window(NamedTuple):
    """Tokens `begin` to `end` of a document are scored; those from `context` on come before them."""

    context: int
    """-1 for the start token."""
    begin: int
    end: int


def measure_bits_per_byte(
    scorer: HFLM, text: HeldOutText, *, places: Sequence[int] | None = None, stride: int | None = None
) -> BitsPerByte:
    """Measure a model on a text.

    Args:
        scorer: the model.
        text: the documents.
        places: positions of the documents to score, ascending; None for all.
        stride: tokens that a window advances over a document longer than the context; None for half of the context.

    Raises:
        EvalError: the stride is out of range, the model has no token to start from, or it gives a text a probability
            that is not a number.
    """
    context = scorer.max_length
    step = max(1, context // 2) if stride is None else stride
    if not 1 <= step <= context:
        raise EvalError(f"stride is {step}; expected 1 to {context:,} tokens, the context of the model")
    start = scorer.prefix_token_id
    if start is None:
        raise EvalError("bits per byte need a token before the text, but the tokenizer has neither BOS nor EOS")
    chosen = [text.documents[place] for place in (range(len(text.documents)) if places is None else places)]
    per_document: list[DocumentBits] = []
    changed = 0
    for first in range(0, len(chosen), _DOCUMENTS_AT_A_TIME):
        part = chosen[first : first + _DOCUMENTS_AT_A_TIME]
        encoded = _encode(scorer.tokenizer, part)
        changed += sum(_decode(scorer.tokenizer, ids) != one for one, ids in zip(part, encoded, strict=True))
        per_document += _score(scorer, part, encoded, start, step)
    ratio, stderr = ratio_of_sums([one["bits"] for one in per_document], [one["bytes"] for one in per_document])
    return {
        "bits_per_byte": ratio,
        "stderr": stderr,
        "bytes": sum(one["bytes"] for one in per_document),
        "tokens": sum(one["tokens"] for one in per_document),
        "documents": len(per_document),
        "documents_in_text": len(text.documents),
        "context": context,
        "stride": step,
        "first_token": str(scorer.tokenizer.convert_ids_to_tokens(start)),
        "documents_changed_by_tokenizer": changed,
        "sha256": hashlib.sha256("".join(one["doc_hash"] for one in per_document).encode()).hexdigest(),
        "origin": text.origin,
        "per_document": per_document,
    }


def document_windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows that score each of a document's `tokens` once, with at most `context` tokens of input."""
    end = min(tokens, context)
    if end:
        yield Window(-1, 0, end)
    while end < tokens:
        begin, end = end, min(end + stride, tokens)
        # The last target is not part of the input.
        yield Window(end - 1 - context, begin, end)


def _score(
    scorer: HFLM, texts: Sequence[str], encoded: Sequence[list[int]], start: int, stride: int
) -> Iterator[DocumentBits]:
    context = scorer.max_length
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    requests: list[tuple[tuple[str, str], list[int], list[int]]] = []
    owners: list[int] = []
    for place, ids in enumerate(encoded):
        for window in document_windows(len(ids), context, stride):
            before = [start] if window.context < 0 else ids[window.context : window.begin]
            # A scorer may remember scores by the text of a request, so the name says exactly what is scored.
            name = (f"{hashes[place]} from {window.context}", f"tokens {window.begin} to {window.end} of {len(ids)}")
            requests.append((name, before, ids[window.begin : window.end]))
            owners.append(place)
    longest = max((len(before) + len(own) - 1 for _, before, own in requests), default=1)
    rows = max(1, _LOGITS_BYTES // (4 * longest * scorer.vocab_size))
    bits = [0.0] * len(texts)
    scores = scorer._loglikelihood_tokens(requests, override_bs=rows)
    for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
        bits[owner] -= log_likelihood / math.log(2)
    for text, digest, ids, own in zip(texts, hashes, encoded, bits, strict=True):
        yield {"doc_hash": digest, "bytes": len(text.encode()), "tokens": len(ids), "bits": own}


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return encoded


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
