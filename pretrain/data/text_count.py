"""The text of a source, counted while something else reads all of it, with pieces for the number of its tokens."""

import math

from tokenizers import Tokenizer

from pretrain.data.quantity import Quantity, spread

_KEPT_BYTES = 128 << 10
"""A source with at most this much text is tokenized in full."""
_PIECE = 4096
"""Characters of a piece at most; a shorter text is a piece as a whole."""
_MOST_CHARACTERS = 256 << 10
_MOST_PIECES = 2048
"""Pieces are dropped beyond either: tokenizing what is left takes 0.1 to 0.2 seconds."""


class TextCount:
    """Counts documents and bytes, and keeps pieces of the text at equal distances, whatever its size.

    A piece is kept at every n-th byte of the text; n doubles, and every other piece is dropped, whenever there are too
    many.
    """

    def __init__(self) -> None:
        self.documents = 0
        """Texts that are not empty."""
        self.text_bytes = 0
        """Of these, in UTF-8."""
        self._texts: list[str] | None = []
        """All of them, while they are few."""
        self._pieces: list[str] = []
        self._characters = 0  # of the pieces
        self._step = 256
        self._next = 0

    def add(self, text: str, size: int) -> None:
        """Count a text of `size` bytes in UTF-8, at least 1."""
        begin, self.documents, self.text_bytes = self.text_bytes, self.documents + 1, self.text_bytes + size
        if self._texts is not None:
            self._texts.append(text)
            if self.text_bytes > _KEPT_BYTES:
                self._texts = None
        while self._next < self.text_bytes:
            place = (self._next - begin) * len(text) // size
            start = max(0, min(place, len(text) - _PIECE))
            self._pieces.append(text[start : start + _PIECE])
            self._characters += len(self._pieces[-1])
            self._next += self._step
            while len(self._pieces) > _MOST_PIECES or (self._characters > _MOST_CHARACTERS and len(self._pieces) > 2):
                self._pieces = self._pieces[::2]
                self._characters = sum(map(len, self._pieces))
                self._step *= 2
                self._next = len(self._pieces) * self._step

    def tokens(self, tokenizer: Tokenizer) -> Quantity:
        """Return the tokens of all texts, with a separator for each document.

        Texts are hit in proportion to their size, so the mean over the pieces of tokens per byte is that of all text
        (Hansen and Hurwitz, 1943). Cutting pieces out of words adds about 0.1 %.
        """
        if self._texts is not None:
            return Quantity(float(sum(_lengths(tokenizer, self._texts)) + self.documents))
        sizes = [len(piece.encode()) for piece in self._pieces]
        rates = [length / size for length, size in zip(_lengths(tokenizer, self._pieces), sizes, strict=True)]
        rate = sum(rates) / len(rates)
        error = spread([(one - rate) / len(rates) for one in rates])
        value = rate * self.text_bytes + self.documents
        # Where all pieces agree, the error of a mean says nothing about the words that were cut.
        return Quantity(value, max(error * self.text_bytes, 1e-3 * math.fabs(value)))


def _lengths(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [len(one.ids) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)] if texts else []
