"""Writing a safetensors file and its sha256 in one pass.

The library's own writer offers no access to the bytes as it writes, so a digest would cost a second read of the whole
file, and it creates files of mode 0600 whatever the umask. The bytes written here are those of the library.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 22
"""Hashed and then written while it is still in the processor's cache; both calls release Python's global lock."""

# By rising alignment, which is the library's order of dtypes. Tensors are stored by falling alignment, then by name.
_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = {dtype: order for order, dtype in enumerate(_DTYPES)}


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors as a safetensors file; return the hex sha256 of its contents.

    Tensors on a device are copied to the host one at a time. The file is not synced.

    Args:
        tensors: contiguous tensors by name, of any shape.
        path: the file, which must not exist.
        metadata: texts by name, for the header.

    Raises:
        OSError: it cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
    digest = hashlib.sha256()
    with path.open("xb", buffering=BLOCK_BYTES) as file:
        contents = itertools.chain.from_iterable(_blocks(tensors[name]) for name in names)
        for block in itertools.chain((_header(tensors, names, metadata),), contents):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], names: list[str], metadata: Mapping[str, str] | None) -> bytes:
    """Return the length of the JSON header, and the header, padded so that the data are aligned to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        values = tensors[name]
        start, end = end, end + values.nbytes
        entries[name] = {"dtype": _DTYPES[values.dtype], "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(values: Tensor) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor."""
    content = values.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(content), BLOCK_BYTES):
        yield content[start : start + BLOCK_BYTES]
