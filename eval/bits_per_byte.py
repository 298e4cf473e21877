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
from contextlib import contextmanager
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from eval.errors import EvalError
from eval.ratios import ratio_of_sums
from eval.scoring import ContinuationScorer, TokenRequest
from eval.sharing import Team
from eval.texts import HeldOutText
from eval.validity_schema import BitsPerByte, DocumentBits

_DOCUMENTS_AT_A_TIME = 512


class Window(NamedTuple):
    """Tokens `begin` to `end` of a document are scored; those from `context` on come before them."""

    context: int
    """-1 for the start token."""
    begin: int
    end: int


def measure_bits_per_byte(
    scorer: ContinuationScorer,
    text: HeldOutText,
    *,
    places: Sequence[int] | None = None,
    stride: int | None = None,
    team: Team | None = None,
) -> BitsPerByte:
    """Measure a model on a text.

    Args:
        scorer: the model.
        text: the documents.
        places: positions of the documents to score, ascending; None for all.
        stride: tokens that a window advances over a document longer than the context; None for half of the context.
        team: the processes that share the documents, each of which is scored once; None for this one alone.

    Raises:
        EvalError: the stride is out of range, the model has no token to start from, or it gives a text a probability
            that is not a number.
    """
    context = scorer.max_length
    step = window_step(context, stride)
    first_token = scorer.prefix_token_id
    if first_token is None:
        raise EvalError("bits per byte need a token before the text, but the tokenizer has neither BOS nor EOS")
    chosen = [text.documents[place] for place in (range(len(text.documents)) if places is None else places)]
    team = team or Team()
    own = _share(chosen, team.ranks.rank, team.ranks.world_size)

    def measure() -> dict[int, tuple[DocumentBits, bool]]:
        measured: dict[int, tuple[DocumentBits, bool]] = {}
        for start in range(0, len(own), _DOCUMENTS_AT_A_TIME):
            part = own[start : start + _DOCUMENTS_AT_A_TIME]
            measured |= zip(part, _score(scorer, [chosen[place] for place in part], first_token, step), strict=True)
        return measured

    found = {place: one for measured in team.shared(measure) for place, one in measured.items()}
    per_document = [found[place][0] for place in range(len(chosen))]
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
        "first_token": str(scorer.tokenizer.convert_ids_to_tokens(first_token)),
        "documents_changed_by_tokenizer": sum(changed for _, changed in found.values()),
        "sha256": hashlib.sha256("".join(one["doc_hash"] for one in per_document).encode()).hexdigest(),
        "origin": text.origin,
        "per_document": per_document,
    }


def window_step(context: int, stride: int | None) -> int:
    """Return how many tokens a window of `context` tokens advances: `stride`, or half of the context.

    Raises:
        EvalError: the stride is out of range.
    """
    step = max(1, context // 2) if stride is None else stride
    if not 1 <= step <= context:
        raise EvalError(f"stride is {step}; expected 1 to {context:,} tokens, the context of the model")
    return step


def document_windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows that score each of a document's `tokens` once, with at most `context` tokens of input."""
    end = min(tokens, context)
    if end:
        yield Window(-1, 0, end)
    while end < tokens:
        begin, end = end, min(end + stride, tokens)
        # The last target is not part of the input.
        yield Window(end - 1 - context, begin, end)


def _share(documents: Sequence[str], rank: int, size: int) -> list[int]:
    """The positions of the documents that a process scores: all have about as much text."""
    by_length = sorted(range(len(documents)), key=lambda place: (-len(documents[place]), place))
    return sorted(by_length[rank::size])


def _score(
    scorer: ContinuationScorer, texts: Sequence[str], first_token: int, stride: int
) -> Iterator[tuple[DocumentBits, bool]]:
    """Yield the bits of each document, and whether the tokenizer changed its text."""
    encoded = _encode(scorer.tokenizer, texts)
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    requests: list[TokenRequest] = []
    owners: list[int] = []
    for place, ids in enumerate(encoded):
        for window in document_windows(len(ids), scorer.max_length, stride):
            before = [first_token] if window.context < 0 else ids[window.context : window.begin]
            # Scores are kept by the text of a request, so this one says exactly what is scored.
            name = (f"{hashes[place]} from {window.context}", f"tokens {window.begin} to {window.end} of {len(ids)}")
            requests.append((name, before, ids[window.begin : window.end]))
            owners.append(place)
    bits = [0.0] * len(texts)
    with _separate_rows(scorer):
        scores = scorer._loglikelihood_tokens(requests)
    for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
        bits[owner] -= log_likelihood / math.log(2)
    for text, digest, ids, own in zip(texts, hashes, encoded, bits, strict=True):
        document: DocumentBits = {"doc_hash": digest, "bytes": len(text.encode()), "tokens": len(ids), "bits": own}
        yield document, _decode(scorer.tokenizer, ids) != text


@contextmanager
def _separate_rows(scorer: ContinuationScorer) -> Iterator[None]:
    """Documents have nothing but the start token in common, which is not worth a row with several of them."""
    before, scorer.shares = scorer.shares, False
    try:
        yield
    finally:
        scorer.shares = before


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return encoded


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
