"""The text stream: files -> read units -> documents -> tokens -> packed sequences -> global batches.

`plan` orders the read units and deals them to lanes, `readers` reads their rows, `documents` picks the rows of a
split, `tokenizer` encodes them, `packing` fills sequences, `workers` runs that in other processes, and `stream` joins
the lanes of all ranks and workers to one sequence of batches with one small state.
"""

from pretrain.data.batch import TokenBatch
from pretrain.data.catalog import fingerprint
from pretrain.data.check import check_sources
from pretrain.data.documents import validation_text
from pretrain.data.errors import DataError
from pretrain.data.masks import attention_inputs
from pretrain.data.stream import LaneState, StreamState, TokenStream
from pretrain.data.tokenizer import load_tokenizer

__all__ = [
    "DataError",
    "LaneState",
    "StreamState",
    "TokenBatch",
    "TokenStream",
    "attention_inputs",
    "check_sources",
    "fingerprint",
    "load_tokenizer",
    "validation_text",
]
