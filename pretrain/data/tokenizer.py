"""From documents to token ids."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from struct import pack

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pretrain.config.data import TokenizerConfig
from pretrain.data.errors import DataError
from pretrain.data.hub_tokenizer import local_file
from pretrain.data.tokenizer_checks import gives_separator_for_unknown, ids_or_none, random_part
from pretrain.files import irregular

_MOST_BYTES = 1 << 30
Tokens = npt.NDArray[np.int32]


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load a `tokenizer.json` such that it reads every text as plain text: no padding, truncation or special tokens.

    Raises:
        DataError: the file is missing or damaged, or `eos_token` cannot serve as the separator of documents.

    """
    path = local_file(config.path)
    if not path.is_file():
        kind = "is a folder: name the tokenizer.json in it" if path.is_dir() else "no such file"
        raise DataError(f"tokenizer.path {config.path}: {kind}")
    if irregular(path) or path.stat().st_size > _MOST_BYTES:
        raise DataError(f"tokenizer.path {config.path}: is not a regular file, or larger than 1 GiB")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer.path {config.path}: cannot be read as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Without this, a text that spells out the separator would end its own document.
    tokenizer.encode_special_tokens = True
    _check_separator(tokenizer, config)
    if setting := random_part(tokenizer):
        raise DataError(
            f"tokenizer.path {config.path}: {setting} makes it divide the same text differently each time, and no run "
            "could be repeated or resumed: set it to null in the file"
        )
    return tokenizer


def separator_id(tokenizer: Tokenizer, config: TokenizerConfig) -> int:
    """Return the id of `eos_token`.

    Raises:
        DataError: the tokenizer has no such token.

    """
    found = tokenizer.token_to_id(config.eos_token)
    if found is None:
        raise DataError(f"tokenizer.eos_token {config.eos_token!r} is not in {config.path}")
    return int(found)


def _check_separator(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Refuse a separator that a text can contain."""
    separator = separator_id(tokenizer, config)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if others := [token for token, number in vocabulary.items() if number == separator and token != config.eos_token]:
        raise DataError(
            f"tokenizer.eos_token {config.eos_token!r} has the id {separator} in {config.path}, and so has "
            f"{others[0]!r}: a text that contains the latter would end its own document"
        )
    if gives_separator_for_unknown(tokenizer, separator):
        raise DataError(
            f"tokenizer.eos_token {config.eos_token!r} is also the token for unknown characters in {config.path}: each "
            "of them would end its document; choose another eos_token or another tokenizer"
        )
    # The characters around it decide how a text is divided into words.
    spellings = [form.format(config.eos_token) for form in ("{}", " {} ", "a{}b", "\n{}\n")]
    if not any(separator in (ids_or_none(tokenizer, text) or ()) for text in spellings):
        return
    added = tokenizer.get_added_tokens_decoder().get(separator)
    if added is None or not added.special:
        reason, cure = f"is not marked special in {config.path}", "mark it there, or choose another eos_token"
    else:
        reason = f"is marked special in {config.path}, but its model also produces this token from ordinary text"
        cure = "choose another eos_token, or remove it from the vocabulary of the model part"
    raise DataError(
        f"tokenizer.eos_token {config.eos_token!r} {reason}, so a text that contains it would end its own document: "
        f"{cure}"
    )


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """Return the rows that an embedding needs: the largest id plus 1, which exceeds the number of entries if ids have
    gaps. Includes added tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


@lru_cache(maxsize=4)
def token_bytes(tokenizer: Tokenizer, eos_id: int) -> npt.NDArray[np.uint32]:
    """Return the UTF-8 bytes that each token of a byte-level tokenizer stands for, uint32 [rows]; 0 for the separator.

    Such a vocabulary spells every byte as one character.
    """
    sizes = np.zeros(vocabulary_rows(tokenizer), np.uint32)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        sizes[number] = 0 if number == eos_id else len(token)
    return sizes


def encodes_in_parallel() -> bool:
    """Return whether `tokenizers` encodes the texts of one call in several threads, unless it is told not to."""
    told = os.environ.get("TOKENIZERS_PARALLELISM", "true").lower()
    return told not in {"", "off", "false", "f", "no", "n", "0"}


@dataclass(frozen=True)
class DocumentEncoder:
    """Encodes documents as token ids, each followed by the separator `eos_id`."""

    tokenizer: Tokenizer
    eos_id: int
    path: str
    """The file of the tokenizer, for messages."""

    @classmethod
    def load(cls, config: TokenizerConfig) -> "DocumentEncoder":
        """Load the tokenizer; raises the errors of `load_tokenizer`."""
        tokenizer = load_tokenizer(config)
        return cls(tokenizer, separator_id(tokenizer, config), config.path)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Return int32 arrays, one per text; a text without tokens gives only the separator.

        Raises:
            DataError: the tokenizer has no token for a part of a text, and no token for unknown parts either.

        """
        # Packing a list takes half of the time of `np.array`.
        return [
            np.frombuffer(pack(f"={len(ids) + 1}i", *ids, self.eos_id), dtype=np.int32)
            for ids in _encode(self.tokenizer, texts, self.path)
        ]


def _encode(tokenizer: Tokenizer, texts: Sequence[str], path: str) -> list[list[int]]:
    try:
        # The fast variant omits the offsets, which are not needed here.
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises plain Exception
        text = next((text for text in texts if ids_or_none(tokenizer, text) is None), "")
        raise DataError(f"tokenizer.path {path}: cannot encode the text {text[:80]!r}: {error}") from error
