"""The parts of a result that say how far its scores can be trusted, key by key.

As in `eval.schema`, a key marked NotRequired is absent, never null, in the case that its comment describes.
"""

from typing import Literal, NotRequired, TypedDict


class DocumentBits(TypedDict):
    """What a model needs to encode one document."""

    # SHA-256 of the text in UTF-8.
    doc_hash: str
    # UTF-8 bytes of the original text, whatever the tokenizer makes of it.
    bytes: int
    # Tokens of the text; all of them are predicted, the first from the start token.
    tokens: int
    # Sum of -log2 p over these tokens.
    bits: float


class BitsPerByte(TypedDict):
    """Bits per byte on one held-out text: independent of the tokenizer, so that models can be compared."""

    # Sum of the documents' bits / sum of their bytes.
    bits_per_byte: float
    # Its standard error over documents (of a ratio of two sums). Null for a single document.
    stderr: float | None
    # Sums over the documents.
    bytes: int
    tokens: int
    # Number of documents scored, and in the whole text. Empty documents do not count.
    documents: int
    documents_in_text: int
    # Longest input in tokens, and how far the window advances over a longer document: every token after the first
    # window is predicted from at least `context` - `stride` tokens before it.
    context: int
    stride: int
    # The token that the first one is predicted from.
    first_token: str
    # Documents whose tokens decode to another text, because the tokenizer normalises it or does not know a character.
    # Their bits are those of what the tokenizer kept, so the figure is too low. Bytes are those of the original.
    documents_changed_by_tokenizer: int
    # SHA-256 over the doc_hash of every document, in order: the text that was scored.
    sha256: str
    # Where it comes from: the name and version of a package, "file", or "validation split of <run>".
    origin: str
    # One entry per document, in the order of the text.
    per_document: list[DocumentBits]


class Part(TypedDict):
    """The score on some of a task's items."""

    num_items: int
    # As those of the task, over these items only. Accuracies are null if there are none, standard errors below two.
    acc: float | None
    acc_stderr: float | None
    acc_norm: NotRequired[float | None]
    acc_norm_stderr: NotRequired[float | None]


class Overlap(TypedDict):
    """Which items of a task share text with the training data. Each item says so in `overlap`."""

    # SHA-256 of the report of `aurora data overlap`.
    report_sha256: str
    # Words of an n-gram, and whether the report covers all of the training text.
    ngram: int
    complete: bool
    # Bytes of training text that were read.
    text_bytes: int
    # Items of the task that the report could not judge, being shorter than an n-gram: over the whole split.
    too_short_in_split: int
    # Scores on the items that overlap, and on all others.
    overlapping: Part
    without: Part


class Subset(Part):
    """The score on a subset that somebody selected, such as GoldenSwag; computed from the items of the whole."""

    # Where the list of its items comes from: "file", or the Hub id of a data set.
    origin: Literal["file"] | str
    # Commit on the Hub. Absent for a file.
    revision: NotRequired[str]
    # SHA-256 of the list: of the doc_hash of its items in the split, sorted.
    sha256: str
    # Items of the subset in the whole split; more than num_items if a limit left some out.
    num_items_in_split: int
    # The doc_id of the scored ones, ascending.
    doc_ids: list[int]
