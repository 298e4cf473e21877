"""From documents to token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pretrain.config.data import TokenizerConfig
from pretrain.data.errors import DataError

Tokens = npt.NDArray[np.int32]


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load a `tokenizer.json` so that it reads any text as plain text: no padding, no cut, no special tokens.

    Raises:
        DataError: the file is missing or damaged, or `eos_token` is no special token of it.

    """
    path = Path(config.path)
    if not path.is_file():
        kind = "is a folder: name the tokenizer.json in it" if path.is_dir() else "no such file"
        raise DataError(f"tokenizer.path {config.path}: {kind}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer.path {config.path}: cannot be read as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # Without this, a text that spells out the separator would end its own document.
    tokenizer.encode_special_tokens = True
    eos_id = tokenizer.token_to_id(config.eos_token)
    if eos_id is None:
        raise DataError(f"tokenizer.eos_token {config.eos_token!r} is not in {config.path}")
    if eos_id in tokenizer.encode(config.eos_token, add_special_tokens=False).ids:
        raise DataError(
            f"tokenizer.eos_token {config.eos_token!r} is not marked special in {config.path}: "
            "a text that contains it would end its own document"
        )
    return tokenizer


@dataclass(frozen=True)
class DocumentEncoder:
    """Turns documents into token ids, each followed by the separator `eos_id`."""

    tokenizer: Tokenizer
    eos_id: int

    @classmethod
    def load(cls, config: TokenizerConfig) -> "DocumentEncoder":
        """Load the tokenizer; errors as `load_tokenizer`."""
        tokenizer = load_tokenizer(config)
        eos_id = tokenizer.token_to_id(config.eos_token)
        assert eos_id is not None
        return cls(tokenizer, eos_id)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Return int32 arrays, one per text; a text without tokens gives only the separator."""
        return [
            np.array([*encoding.ids, self.eos_id], dtype=np.int32)
            # The fast variant leaves out the offsets, which nobody reads here.
            for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
