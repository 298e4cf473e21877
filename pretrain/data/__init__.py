"""The text stream: files -> read units -> documents -> tokens -> packed sequences -> global batches.

From the bottom up: `sources` lists and opens files, `formats` reads their rows, `catalog` describes all of them once,
`order` deals the read units to lanes, `documents` selects the rows of a split, `tokenizer` encodes them, `packing`
fills sequences, `workers` does all that in other processes, `mixture` says which source comes next, and `stream` merges
the lanes of all ranks and workers into one sequence of batches with one small state.
"""

from pretrain.data.batch import BatchShare, TokenBatch
from pretrain.data.catalog import Catalog, fingerprint, make_catalog, tokenizer_problems
from pretrain.data.check import check_sources, survey
from pretrain.data.documents import validation_text
from pretrain.data.errors import BadRowsError, DataError
from pretrain.data.masks import attention_inputs
from pretrain.data.position import SourceProgress, StreamPosition
from pretrain.data.state import LaneState, StreamState, without_bytes
from pretrain.data.stream import TokenStream
from pretrain.data.tokenizer import DocumentEncoder, load_tokenizer, separator_id, vocabulary_rows

__all__ = [
    "BadRowsError",
    "BatchShare",
    "Catalog",
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
