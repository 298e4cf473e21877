"""Config section `tokenizer`: how text becomes tokens."""

from typing import Annotated

from pydantic import Field

from pretrain.config.base import CONTENTS, RESULT, Section
from pretrain.config.fields import InputPath


class TokenizerConfig(Section):
    """The tokenizer, a `tokenizer.json` of the tokenizers library."""

    key_class = RESULT

    path: Annotated[InputPath, CONTENTS]
    """The `tokenizer.json` file, relative to the working directory, or one on the Hugging Face Hub:
    `hf://ORG/NAME@REVISION`, where a file other than its `tokenizer.json` may follow (`/FILE.json`). A branch, or no
    revision, is pinned to its commit by the lock (`aurora data resolve`) or else at the first start; the manifest says
    which. The run folder keeps a copy, with which a run resumes without network."""

    eos_token: str = Field(default="<|endoftext|>", min_length=1)
    """The special token that separates documents. The tokenizer must have it and mark it as special. The same
    characters inside a text are read as ordinary text."""
