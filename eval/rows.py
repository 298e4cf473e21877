"""Arrange the texts of a call into rows of tokens, so that what several of them begin with is computed once.

The choices of a question begin with the same tokens, and questions of a task may begin with the same examples. Such
texts become one row: the tokens that all of them begin with, then what is left of each.

    texts              A B C x y    A B C z    A B C w x
    row                A B C x y z w x
    position           0 1 2 3 4 3 3 4        restarts behind the common part
    part               0 0 0 1 1 2 3 3        a token sees part 0 and its own part, up to itself

What is common is decided by tokens, never by characters: the tokens at the border may differ between choices.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

_MOST_TEXTS = 64  # in a row; bounds the search


@dataclass(frozen=True)
class Target:
    """Tokens that the last positions of an input predict."""

    request: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Text:
    """An input of the model, with everything that is predicted from it."""

    tokens: tuple[int, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Row:
    """Texts that are computed together."""

    texts: tuple[Text, ...]
    shared: int
    """Number of leading tokens that all of them have in common."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.shared + sum(len(text.tokens) - self.shared for text in self.texts)


@dataclass(frozen=True)
class BatchLimit:
    """The most that one forward pass takes: padded tokens, or texts."""

    kind: Literal["tokens", "texts"]
    most: int

    def halved(self) -> "BatchLimit":
        """Return half of it."""
        return replace(self, most=max(1, self.most // 2))

    def end(self, rows: Sequence[Row], start: int) -> int:
        """Return where the batch that begins at `start` ends: at least one row, and only rows of the same kind."""
        texts, longest, end = 0, 0, start
        while end < len(rows):
            row = rows[end]
            texts += len(row.texts)
            longest = max(longest, row.length)
            size = texts if self.kind == "texts" else longest * (end + 1 - start)
            if end > start and (size > self.most or is_packed(row) != is_packed(rows[start])):
                break
            end += 1
        return end


def is_packed(row: Row) -> bool:
    """Return whether the row holds several texts."""
    return len(row.texts) > 1


def windows(
    context: Sequence[int], continuation: Sequence[int], max_length: int
) -> Iterator[tuple[tuple[int, ...], Sequence[int]]]:
    """Yield inputs of at most `max_length` tokens that together predict each token of `continuation` once.

    Yields (input, targets): the last positions of the input predict the targets. One window is enough unless the
    continuation itself is longer than `max_length`. Each window has as much of the preceding text as fits.
    """
    assert context, "lm-eval puts a token before an empty context"
    text = [*context, *continuation]
    for start in range(len(context), len(text), max_length):
        end = min(start + max_length, len(text))
        yield tuple(text[max(0, end - 1 - max_length) : end - 1]), text[start:end]


def distinct_texts(requests: Iterable[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Text]:
    """Return the inputs that score these (context, continuation) pairs; equal ones, as of one-token choices, once."""
    targets: dict[tuple[int, ...], list[Target]] = {}
    for index, (context, continuation) in enumerate(requests):
        for inputs, predicted in windows(context, continuation, max_length):
            targets.setdefault(inputs, []).append(Target(index, predicted))
    return [Text(inputs, tuple(found)) for inputs, found in targets.items()]


def separate_rows(texts: Iterable[Text]) -> list[Row]:
    """Return a row for each text, the longest first."""
    return _longest_first([Row((text,), len(text.tokens)) for text in texts])


def shared_rows(
    texts: Iterable[Text], *, longest_text: int, longest_row: int, most_texts: int = _MOST_TEXTS, hidden_size: int
) -> list[Row]:
    """Return the texts in the rows that cost least; of each kind (several texts, one text) the longest first.

    In alphabetical order of tokens, texts with a common beginning are neighbours. The best division of that sequence
    into rows is found by dynamic programming. The price of a row of n tokens is n (1 + n / (6 hidden_size)): matrix
    products, and attention with a full mask (24 hidden_size^2 and 4 n hidden_size operations a token and layer).

    Args:
        texts: the texts.
        longest_text: texts of more tokens get a row of their own.
        longest_row: the most tokens of a row with several texts.
        most_texts: the most texts of a row.
        hidden_size: of the model.
    """
    ordered = sorted(texts, key=lambda text: text.tokens)
    common = [0, *(_common_length(one.tokens, other.tokens) for one, other in pairwise(ordered))]
    cost, starts = [0.0], list[int]()
    for end, text in enumerate(ordered):
        shared = total = len(text.tokens)
        best, start = cost[end] + _price(total, hidden_size), end
        for begin in range(end - 1, max(-1, end - min(most_texts, _MOST_TEXTS)), -1):
            tokens = len(ordered[begin].tokens)
            shared, total = min(shared, common[begin + 1]), total + tokens
            length = total - (end - begin) * shared
            if not shared or length > longest_row or max(tokens, len(text.tokens)) > longest_text:
                break
            price = cost[begin] + _price(length, hidden_size)
            if price < best:
                best, start = price, begin
        cost.append(best)
        starts.append(start)
    rows, end = list[Row](), len(ordered)
    while end:
        start = starts[end - 1]
        members = ordered[start:end]
        shared = min([len(members[0].tokens), *common[start + 1 : end]])
        rows.append(Row(tuple(members), shared))
        end = start
    return _longest_first(rows)


def _longest_first(rows: Iterable[Row]) -> list[Row]:
    # Rows of a batch then have similar lengths, and what does not fit in memory fails immediately.
    return sorted(rows, key=lambda row: (not is_packed(row), -row.length, row.texts[0].tokens))


def _price(length: int, hidden_size: int) -> float:
    return length * (1 + length / (6 * hidden_size))


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))
