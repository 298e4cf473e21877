"""Documents are read while earlier ones are tokenized."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError, reading
from pretrain.data.tokenizer import DocumentEncoder
from tests.data.corpus import drain, make_setting, make_texts, rows, write_jsonl, write_parquet

PATIENCE = 20.0


def test_documents_are_read_while_the_tokenizer_works(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call but the first and those near the end returns only after the documents of the next have been read."""
    monkeypatch.setattr(reading, "REFILL_BYTES", 200)
    setting = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(3, 80), 20), lanes=3)
    expected = rows(drain(setting.open(), 4))
    changed = threading.Condition()
    reads = calls = 0
    overlapped = []
    read_documents, encode = reading._DocumentSource._read_documents, DocumentEncoder.encode

    def count(source: Any, lanes: Any) -> Any:
        nonlocal reads
        with changed:
            reads += 1
            changed.notify_all()
        return read_documents(source, lanes)

    def wait(encoder: DocumentEncoder, texts: Sequence[str]) -> Any:
        nonlocal calls
        calls += 1
        call = calls
        if 1 < call < 7:  # with the first documents nothing is read ahead: the first sequences should come at once
            with changed:
                overlapped.append(changed.wait_for(lambda: reads > call, PATIENCE))
        return encode(encoder, texts)

    monkeypatch.setattr(reading._DocumentSource, "_read_documents", count)
    monkeypatch.setattr(DocumentEncoder, "encode", wait)
    assert rows(drain(setting.open(), 4)) == expected
    assert overlapped == [True] * 5


@pytest.mark.parametrize("refill", [50, 1 << 20])
def test_what_was_read_before_an_error_is_used_first(
    refill: int, tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "REFILL_BYTES", refill)
    texts = make_texts(3, 40)
    good = make_setting(tokenizer, write_jsonl(tmp_path / "good.jsonl", texts), lanes=1, sequence_length=7, epochs=1)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_bytes(path.read_bytes() + b'{"text": 1}\n')
    found = []
    stream = make_setting(tokenizer, path, lanes=1, sequence_length=7, epochs=1).open()
    with pytest.raises(DataError, match=r"a\.jsonl"):
        found += (row for _ in texts * 99 for row in rows([stream.next_batch(1)]))
    # The last sequence is padded where the data ends.
    assert found == rows(drain(good.open(), 1))[: len(found)]
    assert len(found) == sum(batch.global_targets for batch in drain(good.open(), 1)) // 7
