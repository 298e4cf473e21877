"""Token shards of the NanoGPT speedruns: FineWeb as `.bin` files, tokenized with GPT-2's tokenizer.

A file is a header of 256 int32 (magic number, version 1, number of tokens), followed by the tokens as uint16, all
little-endian (https://github.com/KellerJordan/modded-nanogpt, data/fineweb.py). A separator precedes each document.
Documents are cut at the borders of files; both pieces are read as documents of their own.

A unit is a window of 2^20 tokens: its documents are those that begin in the window.
"""

from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pretrain.data.errors import DataError
from pretrain.data.prepared.layout import DocumentTable, TokenizerNeeds, map_open
from pretrain.data.sources import size_of
from pretrain.data.split import Hashes, text_hash

SUFFIX = ".bin"
SEPARATOR = 50256
VOCABULARY = 50257
NEEDS = TokenizerNeeds(None, SEPARATOR, VOCABULARY)
UNIT_TOKENS = 1 << 20
_MAGIC, _VERSION = 20240520, 1
_LLAMA3_MAGIC = 20240801  # https://github.com/karpathy/llm.c, dev/data/data_common.py
_HEADER_BYTES = 1024


def unit_tokens(file: BinaryIO, path: str) -> tuple[int, ...]:
    """Return the number of tokens of each unit of an open file; see `count_tokens`."""
    tokens = count_tokens(file, path)
    return tuple(min(UNIT_TOKENS, tokens - start) for start in range(0, tokens, UNIT_TOKENS))


def count_tokens(file: BinaryIO, path: str) -> int:
    """Return the number of tokens of an open file, from its header.

    Raises:
        DataError: it cannot be read, or is not such a file.

    """
    try:
        size = size_of(file)
        header = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if header[0] == _LLAMA3_MAGIC:
        raise DataError(f"{path}: holds tokens of 32 bits (Llama 3's): only shards with GPT-2's tokens can be read")
    if header[0] != _MAGIC:
        raise DataError(f"{path}: is not a token shard of the speedrun: it does not begin with {_MAGIC}")
    if header[1] != _VERSION:
        raise DataError(f"{path}: is a token shard of version {header[1]}, expected {_VERSION}")
    tokens = int(header[2])
    if tokens < 0 or size != _HEADER_BYTES + 2 * tokens:
        raise DataError(f"{path}: has {size} bytes, but its header announces {tokens} tokens: the file is damaged")
    return tokens


def read_window(file: BinaryIO, path: str, window: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64]]:
    """Return the tokens of a unit, and the index of the first token after each of its documents and its separator.

    Documents may be empty: of those there is only the separator.

    Args:
        file: open, on this machine.
        path: its path, for messages.
        window: the number of the unit.

    Raises:
        DataError: see `count_tokens`; or a token is not GPT-2's.

    """
    total = count_tokens(file, path)
    tokens = map_open(file, path, "<u2", total, _HEADER_BYTES // 2)
    low, high = window * UNIT_TOKENS, min((window + 1) * UNIT_TOKENS, total)
    first = low and _next_separator(tokens, low - 1) + 1  # where the first document of the window begins
    if first >= high:
        return tokens[:0], np.empty(0, np.uint64)
    ends = np.flatnonzero(tokens[first : high - 1] == SEPARATOR) + 1  # relative to `first`
    last = first + (int(ends[-1]) if len(ends) else 0)  # where the last document begins
    end = _next_separator(tokens, last) + 1
    own = tokens[first : min(end, total)]
    if (largest := int(own.max())) >= VOCABULARY:
        raise DataError(
            f"{path}: holds the token {largest}, but GPT-2's last one is {VOCABULARY - 1}: the file is damaged, or was "
            "made with another tokenizer"
        )
    if end > total:  # the last document of a file has no separator behind it
        own = np.append(own, tokens.dtype.type(SEPARATOR))
    return own, np.append(ends, end - first).astype(np.uint64)


def _next_separator(tokens: npt.NDArray[Any], begin: int) -> int:
    """Return the index of the first separator from `begin` on; the number of tokens if there is none."""
    for low in range(begin, len(tokens), 1 << 16):
        found = np.flatnonzero(tokens[low : low + (1 << 16)] == SEPARATOR)
        if len(found):
            return low + int(found[0])
    return len(tokens)


def document_table(
    tokens: npt.NDArray[Any], ends: npt.NDArray[np.uint64], token_bytes: npt.NDArray[np.uint32]
) -> DocumentTable:
    """Describe the documents of a unit, whose hashes are left at 0.

    Args:
        tokens: of the unit.
        ends: of its documents.
        token_bytes: UTF-8 bytes of each token.

    """
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    sizes = np.add.reduceat(token_bytes[tokens], begins, dtype=np.uint64)
    return DocumentTable(ends, np.cumsum(sizes, dtype=np.uint64), np.zeros(len(ends), np.uint64))


def token_hashes(tokens: npt.NDArray[Any], ends: npt.NDArray[np.uint64]) -> Hashes:
    """Return the hashes that decide the split: there is no text, so they are taken of the token ids (uint16)."""
    borders = [0, *ends.tolist()]
    pieces = (tokens[begin : end - 1].tobytes() for begin, end in pairwise(borders))
    return np.array([text_hash(piece) for piece in pieces], np.uint64)
