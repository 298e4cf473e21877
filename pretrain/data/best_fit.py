"""Best-fit packing: whole documents in each sequence wherever they fit, and padding in what remains.

Source: Ding et al., "Fewer Truncations Improve Language Modeling" (2024). A lane reads its documents in windows. The
documents of a window, each followed by its separator, are packed into sequences of T targets:

    documents  | a a a | b | c c c c c c |        (| = separator, T = 4)
    sequence 0 [| a a a |]
    sequence 1 [| c c c c]                        a document of more than T tokens is cut into pieces of T
    sequence 2           [c c c | b |]            its rest is packed like a document; . would be padding

A sequence begins with one more token, from which its first target is predicted: the token before the cut if the
sequence begins within a document, and else a separator. At most one rest can be first in a sequence; the first token of
a further rest is predicted from the separator before it. So every token of every document is a target exactly once in
an epoch, nothing is dropped, and only documents that are longer than a sequence are cut.

A window never crosses the end of an epoch, and depends on the text from its beginning on and on nothing else. The
position of a lane is therefore the beginning of its window and the number of its sequences that have been taken: after
a resume, the window is read and packed again.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pretrain.data.bad_rows import BadRow
from pretrain.data.documents import Cursor
from pretrain.data.packing import EpochEnd, Item, Lane, PackedSequence, Part, ReaderTask
from pretrain.data.prepared.runs import TokenRun
from pretrain.data.tokenizer import DocumentEncoder, Tokens

# Sequences of text that are read before a window is packed. More leave less padding, but each lane must read so many
# before its first sequence, also after a resume, and keeps them in memory. A window ends early, but not before its
# half, where that leaves less padding; the rest begins the next one.
WINDOW_SEQUENCES = 16
# The ends of a window that are tried.
_TRIED_ENDS = 16


class Piece(NamedTuple):
    """Part of a document that is in one sequence."""

    document: int
    """Index in the window."""
    begin: int
    """Index of its first token in the document."""
    end: int
    """Index after its last token; the separator counts as the last token of the document."""


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Pack documents by best fit, the largest first.

    Args:
        sizes: tokens of each document with its separator, at least 1.
        capacity: T, targets of a sequence.

    Returns:
        The pieces of each sequence, at most `capacity` tokens. Sequences are in the order of the first document that
        was put into each, so that their order says nothing about the lengths of the documents. A rest comes first in
        its sequence; the other pieces are in the order of the documents.

    """
    sequences: list[list[Piece]] = []
    rests: list[Piece] = []
    for document, size in enumerate(sizes):
        whole = range(0, size - size % capacity, capacity)
        sequences += [[Piece(document, begin, begin + capacity)] for begin in whole]
        if size % capacity:
            rests.append(Piece(document, whole.stop, size))
    rests.sort(key=lambda piece: piece.begin - piece.end)  # stable: equal sizes stay in order
    room: list[tuple[int, int]] = []  # free targets and index of each sequence with any, ascending
    for piece in rests:
        size = piece.end - piece.begin
        fit = bisect_left(room, (size, 0))
        if fit == len(room):
            left, index = capacity, len(sequences)
            sequences.append([])
        else:
            left, index = room.pop(fit)
        sequences[index].append(piece)
        if left > size:
            insort(room, (left - size, index))
    sequences.sort(key=lambda pieces: pieces[0])
    for pieces in sequences:
        pieces.sort(key=lambda piece: (not piece.begin, piece))
    return sequences


def pack_window(sizes: Sequence[int], capacity: int, *, whole: bool) -> tuple[int, list[list[Piece]]]:
    """Pack a window, or as many of its documents as leave the smallest share of padding.

    Args:
        sizes: tokens of each document with its separator; none is empty.
        capacity: T, targets of a sequence.
        whole: take all documents, because the epoch ends with them.

    Returns:
        The number of documents taken, from the first one, and their sequences, see `best_fit`.

    """
    if whole:
        return len(sizes), best_fit(sizes, capacity)
    totals = np.cumsum(sizes)
    candidates = np.flatnonzero(2 * totals >= totals[-1]) + 1
    # A packing cannot leave less padding than its total leaves to the next multiple of a sequence.
    least = (-totals[candidates - 1] % capacity) / totals[candidates - 1]
    padding, taken, best = float("inf"), 0, list[list[Piece]]()
    for place in np.argsort(least, kind="stable")[:_TRIED_ENDS].tolist():
        if padding <= least[place]:
            break
        count = int(candidates[place])
        packed, total = best_fit(sizes[:count], capacity), int(totals[count - 1])
        if (len(packed) * capacity - total) / total < padding:
            padding, taken, best = (len(packed) * capacity - total) / total, count, packed
    return taken, best


class _Document(NamedTuple):
    """A document that has been read but not packed."""

    run: TokenRun
    begin: int
    """Index of its first token in the run."""
    end: int
    """Index after its separator."""
    skipped: tuple[BadRow, ...]
    """Bad rows before it."""
    after: Cursor
    """The position that follows it, in the same unit."""


class BestFitLane(Lane):
    """A lane that packs by best fit; its cursors count the sequences that have been taken instead of tokens."""

    def __init__(self, task: ReaderTask, lane: int, cursor: Cursor, encoder: DocumentEncoder) -> None:
        super().__init__(task, lane, cursor._replace(token=0), encoder)
        self._window_begin = self._cursor
        self._taken = cursor.token
        """Sequences of the window that have been taken."""
        self._packed = 0  # documents of the first waiting run that have been packed
        self._documents_of_window: list[_Document] = []
        self._sequences: list[list[Piece]] = []

    @property
    def _window_tokens(self) -> int:
        return WINDOW_SEQUENCES * self._task.sequence_length

    def push(self, position: Cursor, end: Cursor, run: TokenRun, skipped: tuple[BadRow, ...] = ()) -> None:
        """Append a document, or a run of them, that begins and ends at positions and follows the skipped bad rows."""
        self._waiting.append((position, end, run, self._unattached + skipped))
        self._unattached = ()
        self._documents_read += len(run.ends)
        self.pending += len(run.tokens)

    def pack(self, *, pad: bool) -> Item | None:
        """Return the next sequence, or the lane's `EpochEnd`; None if more must be read before either is known.

        Sequences are padded in every epoch, whatever `pad`.
        """
        if not self._sequences:
            if self.pending < self._window_tokens and not self.exhausted:
                return None
            if not self.pending and not self._taken:
                return EpochEnd(self._lane, self._documents_read)
            self._pack_window()
        sequence = self._build(self._sequences[self._taken])
        self._taken += 1
        if self._taken == len(self._sequences):
            self._window_begin, self._taken = self._documents_of_window[-1].after, 0
            self._sequences, self._documents_of_window = [], []
        return sequence._replace(cursor=self._window_begin._replace(token=self._taken))

    def _pack_window(self) -> None:
        """Read the documents of the next window and pack them.

        Raises:
            DataError: more of its sequences have been taken than it has.

        """
        whole = self.pending < self._window_tokens
        documents = self._look_ahead()
        count, self._sequences = pack_window(
            [document.end - document.begin for document in documents], self._task.sequence_length, whole=whole
        )
        self._documents_of_window = documents[:count]
        self._remove(count)
        if self._taken >= len(self._sequences):
            raise self._wrong_data(self._window_begin._replace(token=self._taken))

    def _look_ahead(self) -> list[_Document]:
        """Return the waiting documents, up to the one with which they are enough for a window."""
        documents: list[_Document] = []
        tokens, first = 0, self._packed
        for position, run_end, run, skipped in self._waiting:
            begin = run.ends[first - 1] if first else 0
            for index in range(first, len(run.ends)):
                end = run.ends[index]
                last = index + 1 == len(run.ends)
                after = run_end if last else position._replace(row=position.row + index + 1)
                documents.append(_Document(run, begin, end, () if index else skipped, after))
                tokens += end - begin
                begin = end
                if tokens >= self._window_tokens:
                    return documents
            first = 0
        return documents

    def _remove(self, count: int) -> None:
        """Remove documents from those that wait."""
        self.pending -= sum(document.end - document.begin for document in self._documents_of_window)
        while count:
            left = len(self._waiting[0][2].ends) - self._packed
            if count < left:
                self._packed += count
                return
            self._waiting.popleft()
            self._packed = 0
            count -= left

    def _build(self, pieces: list[Piece]) -> PackedSequence:
        """Put a sequence together."""
        tokens: Tokens = np.full(self._task.sequence_length + 1, self._encoder.eos_id, dtype=np.int32)
        length, documents, text_bytes, cut = 0, 0, 0, 0
        bad_rows: tuple[BadRow, ...] = ()
        parts: list[Part] = []
        for piece in pieces:
            document = self._documents_of_window[piece.document]
            run, begin, end = document.run, document.begin + piece.begin, document.begin + piece.end
            if not piece.begin:
                bad_rows += document.skipped
                cut += end < document.end
            elif not length:
                tokens[0] = run.tokens[begin - 1]
            tokens[length + 1 : length + 1 + end - begin] = run.tokens[begin:end]
            length += end - begin
            before, after = run.before(begin), run.before(end)
            documents += after[0] - before[0]
            text_bytes += after[1] - before[1]
            if self._several:
                parts.append(self._part(document.after, end - begin, after[0] - before[0], after[1] - before[1]))
        cursor = self._cursor
        return PackedSequence(self._lane, tokens, length, text_bytes, documents, bad_rows, cursor, cut, tuple(parts))
