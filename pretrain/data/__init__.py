"""The text stream: files -> read units -> documents -> tokens -> packed sequences -> global batches.

From the bottom up: `sources` lists and opens files, `formats` reads their rows, `catalog` describes all of them once,
`order` deals the read units to lanes, `documents` selects the rows of a split, `tokenizer` encodes them, `packing`
or `best_fit` fills sequences, `workers` does all that in other processes, `mixture` says which source comes next, and
`stream` merges the lanes of all ranks and workers into one sequence of batches with one small state. `exchange` says
which rank trains on which row, and `prefetch` prepares the next batch behind the current step.
"""

from pretrain.data.batch import BatchShare, TokenBatch
from pretrain.data.catalog import Catalog, fingerprint, make_catalog, tokenizer_problems
from pretrain.data.check import check_sources, survey
from pretrain.data.documents import validation_text
from pretrain.data.errors import DamagedFileError, DataError
from pretrain.data.masks import attention_inputs
from pretrain.data.position import SourceProgress, StreamPosition
from pretrain.data.state import LaneState, StreamState, without_bytes
from pretrain.data.stream import TokenStream
from pretrain.data.tokenizer import DocumentEncoder, load_tokenizer, separator_id, vocabulary_rows

__all__ = [
    "BatchShare",
    "Catalog",
    "DamagedFileError",
    "DataError",
    "DocumentEncoder",
    "LaneState",
    "SourceProgress",
    "StreamPosition",
    "StreamState",
    "TokenBatch",
    "TokenStream",
    "attention_inputs",
    "check_sources",
    "fingerprint",
    "load_tokenizer",
    "make_catalog",
    "separator_id",
    "survey",
    "tokenizer_problems",
    "validation_text",
    "vocabulary_rows",
    "without_bytes",
]
