"""The next batch is prepared behind the step, and nothing of it shows before it is asked for."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError, TokenStream
from pretrain.data.prefetch import Prefetcher
from pretrain.engine.ranks import Ranks
from tests.data.corpus import Setting, drain, make_setting, make_texts, rows, write_jsonl, write_parquet
from tests.distributed.ranks import run_ranks


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    return make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(5, 60), 4), lanes=4, epochs=None)


def prefetcher(stream: TokenStream, num_sequences: int = 4, batches: int = 100) -> Prefetcher:
    return Prefetcher(stream, num_sequences, batches, Ranks(), Ranks())


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_batches_and_states_are_those_of_the_stream(setting: Setting) -> None:
    stream = setting.open()
    batches = prefetcher(setting.open())
    assert batches.state() == stream.state()
    for _ in range(12):
        [expected] = drain(stream, 4, limit=1)
        found = batches.next_batch()
        assert rows([found.share]) == rows([expected])
        assert found.sha256 == expected.sha256()
        assert found.position is batches.position
        assert batches.state() == stream.state()
        assert batches.position.progress() == stream.progress()
    batches.close()


def test_one_batch_is_prepared_during_the_step_and_not_more(setting: Setting) -> None:
    stream = setting.open()
    batches = prefetcher(stream)
    batches.next_batch()
    wait_for(lambda: stream.position.sequences == 8)  # nobody has asked for the second one
    time.sleep(0.1)
    assert stream.position.sequences == 8
    assert batches.state()["sequences_emitted"] == 4
    rest = rows(drain(setting.open(state=json.loads(json.dumps(batches.state()))), 4, limit=3))
    assert rows([batches.next_batch().share for _ in range(3)]) == rest
    batches.close()


def test_nothing_is_read_for_a_batch_after_the_last(setting: Setting) -> None:
    stream = setting.open()
    batches = prefetcher(stream, batches=2)
    for _ in range(2):
        batches.next_batch()
    wait_for(lambda: not any(thread.name == "prefetch" for thread in threading.enumerate()))
    assert stream.position.sequences == 8
    batches.close()


def test_an_error_comes_with_the_batch_that_it_belongs_to(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["the sea " * 800] * 300)  # more than is read at once
    path.write_bytes(path.read_bytes() + b'{"text": \n')
    setting = make_setting(tokenizer, path, lanes=1, epochs=None, sequence_length=4096)
    stream, batches = setting.open(), prefetcher(setting.open(), 1, batches=1000)
    with pytest.raises(DataError):
        drain(stream, 1)
    found = [batches.next_batch() for _ in range(stream.position.sequences)]
    for _ in range(2):
        with pytest.raises(DataError, match="line 301 is not valid JSON"):
            batches.next_batch()
        assert batches.position is found[-1].position
        assert batches.state() == stream.state()
    batches.close()


def test_close_ends_the_thread_and_may_be_called_twice(setting: Setting) -> None:
    batches = prefetcher(setting.open())
    batches.next_batch()
    for _ in range(2):
        batches.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        batches.next_batch()


def test_the_trainer_communicates_while_a_batch_is_prepared(setting: Setting) -> None:
    expected = drain(setting.open(), 6, limit=8)
    found = run_ranks(2, beside_collectives, setting)
    assert [one[0] for one in found] == [[batch.sha256() for batch in expected]] * 2
    assert found[0][1] == found[1][1] == setting.open().state() | found[0][1]
    assert {one[2] for one in found} == {8.0 * 100}


def beside_collectives(setting: Setting) -> tuple[list[str], Any, float]:
    dist.init_process_group("gloo")
    own = Ranks(dist.get_rank(), 2, dist.new_group(backend="gloo"))
    batches = Prefetcher(setting.open(group=own.group), 6, 8, own, Ranks(own.rank, 2, dist.group.WORLD))
    hashes, total = [], torch.zeros(1)
    for _ in range(8):
        hashes.append(batches.next_batch().sha256)
        for _ in range(100):
            one = torch.full((1,), 0.5)
            dist.all_reduce(one)
            total += one
        state = batches.state()
    batches.close()
    return hashes, state, total.item()
