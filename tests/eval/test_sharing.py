"""Rows with several texts, low precision, stores and memory: the scores stay those of each text alone."""

import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from eval import scoring
from eval.errors import EvalError
from eval.forward import log_softmax_at
from eval.scoring import ContinuationScorer, Score, request_key
from tests.eval.conftest import sentence, small_llama
from tests.eval.test_scoring import Pair, requests

SHAPE = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"intermediate_size": 64, "max_position_embeddings": 128, "num_key_value_heads": 1, "initializer_range": 0.3}
# Whether rows of several texts are exact for the architecture.
ARCHITECTURES: dict[str, tuple[Any, bool]] = {
    "absolute positions": (
        GPT2Config(vocab_size=8192, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3),
        True,
    ),
    "partly rotated": (GPTNeoXConfig(**SHAPE, **WIDE), True),
    "biases": (Qwen2Config(**SHAPE, **WIDE), True),
    "a window wider than the texts": (MistralConfig(**SHAPE, **WIDE, sliding_window=100), True),
    "a window": (MistralConfig(**SHAPE, **WIDE, sliding_window=8), False),
    "soft caps": (Gemma2Config(**SHAPE, **WIDE, head_dim=16, sliding_window=8), False),
    "positions with an offset": (
        OPTConfig(**SHAPE, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.3),
        True,
    ),
    "distances as biases": (BloomConfig(vocab_size=8192, hidden_size=32, n_layer=2, n_head=2), False),
    "a state": (MambaConfig(vocab_size=8192, hidden_size=32, state_size=4, num_hidden_layers=2), False),
}


def questions(count: int, choices: int = 4, seed: int = 3) -> list[Pair]:
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        context = sentence(rng, rng.randrange(8, 20)) or "a"
        # Endings without a blank may merge with the last token of the context.
        pairs += [(context, rng.choice(("", " ", "s ")) + (sentence(rng, 5) or "x")) for _ in range(choices)]
    return pairs


def per_token(lm: HFLM, pairs: list[Pair], ours: list[Score], theirs: list[Score]) -> float:
    """The largest difference of log-likelihoods per token."""
    counts = [len(lm.tok_encode(continuation, add_special_tokens=False)) for _, continuation in pairs]
    return max(abs(a - b) / max(1, n) for (a, _), (b, _), n in zip(ours, theirs, counts, strict=True))


def assert_close(ours: list[Score], theirs: list[Score]) -> None:
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def scorer(model: PreTrainedModel, folder: Path, **options: Any) -> ContinuationScorer:
    options = {"progress": False, **options}
    return ContinuationScorer(model, AutoTokenizer.from_pretrained(folder), **options)


@contextmanager
def tokens_computed(model: PreTrainedModel) -> Iterator[list[int]]:
    """The number of tokens of each forward pass."""
    counts: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].numel()))
    yield counts
    handle.remove()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_scores_as_in_lm_eval(model_folder: Path, kind: str) -> None:
    config, shares = ARCHITECTURES[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    pairs = questions(6)
    reference = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_folder), batch_size=4)
    expected = reference.loglikelihood(requests(pairs), disable_tqdm=True)
    lm = scorer(model, model_folder)
    ours = lm.loglikelihood(requests(pairs))
    assert per_token(lm, pairs, ours, expected) < 2e-5
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert bool(lm.shares) == shares


def test_texts_longer_than_a_window_stay_alone_whatever_the_comparison_says(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's mask has no window, and a text that just exceeds it may hide what that does."""
    monkeypatch.setattr(scoring, "shares_exactly", lambda *_: True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, **WIDE, sliding_window=16)).eval()
    pairs = questions(8)
    lm = scorer(model, model_folder)
    lengths = [len(lm.tok_encode(context + continuation)) for context, continuation in pairs]
    assert min(lengths) < 16 < max(lengths)
    with tokens_computed(model) as shared:
        found = lm.loglikelihood(requests(pairs))
    with tokens_computed(model) as alone:
        expected = scorer(model, model_folder, share=False).loglikelihood(requests(pairs))
    assert_close(found, expected)
    assert sum(shared) < sum(alone)  # the short ones do share


def test_what_choices_begin_with_is_computed_once(model_folder: Path) -> None:
    model, pairs = small_llama(), questions(8)
    with tokens_computed(model) as alone:
        expected = scorer(model, model_folder, share=False).loglikelihood(requests(pairs))
    with tokens_computed(model) as shared:
        lm = scorer(model, model_folder)
        found = lm.loglikelihood(requests(pairs))
    assert lm.shares
    assert per_token(lm, pairs, found, expected) < 2e-5
    check = 2 * max(shared)  # rows are compared with texts once
    assert sum(shared) - check < sum(alone) / 1.5


def test_what_cannot_share_is_said_and_scored_alone(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model that does not heed masks gives other scores to texts in a row; nothing of them is used."""

    class Deaf(LlamaForCausalLM):
        def forward(self, *args: Any, attention_mask: object = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = small_llama()
    deaf = Deaf(model.config).eval()
    deaf.load_state_dict(model.state_dict())
    pairs = questions(4)
    expected = scorer(model, model_folder, share=False).loglikelihood(requests(pairs))
    lm = scorer(deaf, model_folder, progress=True)
    assert_close(lm.loglikelihood(requests(pairs)), expected)
    assert lm.shares is False
    assert "each is scored by itself" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_share_and_stay_narrow(model_folder: Path, dtype: torch.dtype) -> None:
    model, pairs = small_llama().to(dtype), questions(5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    lm = scorer(model, model_folder)
    found = lm.loglikelihood(requests(pairs))
    assert lm.shares
    assert model.dtype == dtype
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    expected = scorer(model, model_folder, share=False).loglikelihood(requests(pairs))
    assert per_token(lm, pairs, found, expected) < (0.2 if dtype == torch.bfloat16 else 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_are_those_of_a_float64_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(40, 5000) * 30).to(dtype)
    where, expected = torch.randint(40, (90,)), torch.randint(5000, (90,))
    monkeypatch.setattr("eval.forward._SOFTMAX_NUMBERS", 7 * 5000)  # several pieces
    found, greedy = log_softmax_at(logits, where, expected)
    exact = logits.double().log_softmax(-1)[where, expected]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    assert torch.equal(greedy, logits.argmax(-1)[where] == expected)


def test_whole_texts_are_scored_as_in_lm_eval(model_folder: Path) -> None:
    model = small_llama(context_length=16)
    reference = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_folder), batch_size=3)
    rng = random.Random(2)
    texts = [(sentence(rng, words),) for words in (1, 5, 40, 90)]
    expected = reference.loglikelihood_rolling(requests(texts), disable_tqdm=True)  # type: ignore[arg-type]
    lm = scorer(model, model_folder)
    found = lm.loglikelihood_rolling(requests([*texts, ("",)]))  # type: ignore[arg-type]
    assert found == pytest.approx([*expected, 0.0], abs=2e-3)
    assert lm.truncated_requests == {}


class Shelf:
    """A store in memory that breaks off after some batches."""

    def __init__(self, batches: int = 10**9) -> None:
        self.scores: dict[str, Score] = {}
        self.batches = batches

    def known(self, keys: Collection[str]) -> Mapping[str, Score]:
        return {key: self.scores[key] for key in keys if key in self.scores}

    def add(self, scores: Mapping[str, Score]) -> None:
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        assert not self.scores.keys() & scores.keys()
        self.scores.update(scores)


@pytest.mark.parametrize("batch_size", ["auto", 3])
def test_an_interrupted_call_resumes_to_the_last_bit(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, batch_size: Any
) -> None:
    monkeypatch.setattr(scoring, "_CPU_TOKENS", 150)
    model, pairs = small_llama(context_length=32), questions(12)
    whole = scorer(model, model_folder, batch_size=batch_size).loglikelihood(requests(pairs))
    shelf, computed = Shelf(batches=2), 0
    for _ in range(30):
        lm = scorer(model, model_folder, batch_size=batch_size, store=shelf)
        try:
            assert lm.loglikelihood(requests(pairs)) == whole
            break
        except KeyboardInterrupt:
            shelf.batches = 2
        finally:
            computed += lm.scored_requests
    else:
        pytest.fail("it never ended")
    assert set(shelf.scores) == {request_key(*pair) for pair in pairs}
    # A batch that the store refused is not counted, and no other is computed twice.
    assert computed == len(pairs)
    again = scorer(model, model_folder, store=shelf)
    with tokens_computed(model) as counts:
        assert again.loglikelihood(requests(pairs)) == whole
    assert (again.scored_requests, counts) == (0, [])


def test_other_requests_of_a_batch_are_computed_without_known_ones(model_folder: Path) -> None:
    model, pairs, shelf = small_llama(), questions(6), Shelf()
    expected = scorer(model, model_folder).loglikelihood(requests(pairs))
    scorer(model, model_folder, store=shelf).loglikelihood(requests(pairs[::3]))
    lm = scorer(model, model_folder, store=shelf)
    assert_close(lm.loglikelihood(requests(pairs)), expected)
    assert lm.scored_requests == len(pairs) - len(pairs[::3])


def test_scores_that_are_not_finite_are_not_kept(model_folder: Path) -> None:
    model, shelf = small_llama(), Shelf()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(EvalError, match="not a finite number"):
        scorer(model, model_folder, store=shelf).loglikelihood(requests(questions(2)))
    assert shelf.scores == {}


class Cramped(LlamaForCausalLM):
    """A model on a device with room for a number of tokens."""

    room = 200

    def forward(self, tokens: torch.Tensor, **kwargs: Any) -> Any:
        if tokens.numel() > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(tokens, **kwargs)


@pytest.mark.parametrize("batch_size", ["auto", 64])
def test_batches_that_do_not_fit_are_halved(model_folder: Path, batch_size: Any) -> None:
    model, pairs = small_llama(), questions(10)
    cramped = Cramped(model.config).eval()
    cramped.load_state_dict(model.state_dict())
    expected = scorer(model, model_folder).loglikelihood(requests(pairs))
    lm = scorer(cramped, model_folder, batch_size=batch_size)
    with tokens_computed(cramped) as counts:
        assert_close(lm.loglikelihood(requests(pairs)), expected)
    refused = [count for count in counts if count > cramped.room]
    assert refused
    assert len(refused) < 8  # and then it is known what fits
    with tokens_computed(cramped) as counts:
        lm.loglikelihood(requests(pairs))
    assert max(counts) <= cramped.room
    cramped.room = 3
    with pytest.raises(EvalError, match="does not fit into the memory of cpu"):
        scorer(cramped, model_folder).loglikelihood(requests(pairs))


def test_a_row_that_does_not_fit_is_scored_text_by_text(model_folder: Path) -> None:
    model, pairs = small_llama(), questions(6)
    cramped = Cramped(model.config).eval()
    cramped.load_state_dict(model.state_dict())
    expected = scorer(model, model_folder).loglikelihood(requests(pairs))
    lm = scorer(cramped, model_folder)
    lm.shares, lm._checked_length = True, 128  # the comparison would not fit either
    cramped.room = max(len(lm.tok_encode(context + continuation)) for context, continuation in pairs)
    assert_close(lm.loglikelihood(requests(pairs)), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_number_of_texts_is_the_most_of_a_forward_pass(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    model, pairs = small_llama(), questions(5)
    sizes: list[int] = []
    real = scoring.score_rows
    monkeypatch.setattr(
        scoring,
        "score_rows",
        lambda model, rows, device: sizes.append(sum(len(row.texts) for row in rows)) or real(model, rows, device),
    )
    scorer(model, model_folder, batch_size=size).loglikelihood(requests(pairs))
    assert max(sizes) <= size
    assert len(sizes) < len(pairs) or size == 1


def test_what_was_cut_is_on_the_screen(model_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lm = scorer(small_llama(context_length=16), model_folder, progress=True)
    pairs = [("the whale", " and"), (sentence(random.Random(1), 30), " and")]
    lm.loglikelihood(requests(pairs))
    assert "made: 1 of 2 texts are longer than the model's context of 16 tokens" in capfd.readouterr().err
