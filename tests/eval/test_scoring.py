"""Our scoring loop gives the log-likelihoods of lm-eval's own, and does better where that gives up."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaForCausalLM

from eval.errors import EvalError
from eval.rows import windows
from eval.scoring import ContinuationScorer
from tests.eval.conftest import sentence, small_llama

Pair = tuple[str, str]


def requests(pairs: list[Pair]) -> list[Instance]:
    return [
        Instance("loglikelihood", doc={}, arguments=pair, idx=0, metadata=("made", index, 1))
        for index, pair in enumerate(pairs)
    ]


def scorer(model: LlamaForCausalLM, folder: Path, batch_size: int = 4) -> ContinuationScorer:
    return ContinuationScorer(model, AutoTokenizer.from_pretrained(folder), batch_size=batch_size, progress=False)


def random_pairs(count: int) -> list[Pair]:
    rng = random.Random(3)
    pairs = [
        (sentence(rng, rng.randrange(1, 30)) or "a", f" {sentence(rng, rng.randrange(1, 12))}.") for _ in range(count)
    ]
    # Choices of one token after the same context, twins, and an empty context.
    same = [("Question: which?\nAnswer:", f" {letter}") for letter in "ABCDA"]
    return [*pairs, *same, pairs[0], ("", "the whale")]


@pytest.mark.parametrize("context_length", [128, 16], ids=["all fits", "most is cut"])
def test_log_likelihoods_are_those_of_lm_eval(model_folder: Path, context_length: int) -> None:
    model = small_llama(context_length)
    # lm-eval gives up on a continuation longer than the context; see below for those.
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    pairs = [pair for pair in random_pairs(40) if len(tokenizer.encode(pair[1])) <= 16]
    assert len(pairs) > 20
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = reference.loglikelihood(requests(pairs), disable_tqdm=True)
    ours = scorer(model, model_folder).loglikelihood(requests(pairs))
    torch.testing.assert_close(
        torch.tensor([value for value, _ in ours]),
        torch.tensor([value for value, _ in expected]),
        rtol=0,
        atol=2e-4,
    )
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


def test_greedy_tells_whether_the_model_would_have_said_it(model_folder: Path) -> None:
    model = small_llama()
    lm = scorer(model, model_folder)
    context = lm.tok_encode("the old captain said")
    said = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, use_cache=False)[0]
    said = said[len(context) :].tolist()
    other = [*said[:-1], (said[-1] + 1) % 8192]
    results = lm._loglikelihood_tokens([(("", ""), context, said), (("", ""), context, other)])
    assert [greedy for _, greedy in results] == [True, False]


def test_batch_size_does_not_matter(model_folder: Path) -> None:
    model, pairs = small_llama(), random_pairs(8)
    one, some, all_at_once = (
        [value for value, _ in scorer(model, model_folder, size).loglikelihood(requests(pairs))] for size in (1, 7, 64)
    )
    assert some == pytest.approx(one, abs=1e-4)
    assert all_at_once == pytest.approx(one, abs=1e-4)


def test_a_continuation_longer_than_the_context_is_scored_in_full(model_folder: Path) -> None:
    model = small_llama(context_length=8)
    lm = scorer(model, model_folder)
    text = sentence(random.Random(5), 40)
    context, continuation = [5, 6, 7], lm.tok_encode(text)
    assert len(continuation) > 16
    ((ours, _),) = lm._loglikelihood_tokens([((" ", text), context, continuation)])
    # One token at a time, with what precedes it in its window of 8.
    total, every = 0.0, [*context, *continuation]
    for first in range(len(context), len(every), 8):
        last = min(first + 8, len(every))
        seen = every[max(0, last - 9) : last - 1]
        with torch.no_grad():
            log_probs = model(torch.tensor([seen])).logits[0].double().log_softmax(-1)
        for back, token in enumerate(reversed(every[first:last]), start=1):
            total += log_probs[-back, token].item()
    assert ours == pytest.approx(total, abs=1e-3)


def test_what_was_cut_is_counted_by_task(model_folder: Path) -> None:
    lm = scorer(small_llama(context_length=8), model_folder)
    lm.loglikelihood(requests([("the whale", " and"), (sentence(random.Random(1), 30), " and")]))
    assert lm.truncated_requests == {"made": 1}


def test_a_continuation_without_tokens_is_refused(model_folder: Path) -> None:
    lm = scorer(small_llama(), model_folder)
    with pytest.raises(EvalError, match="no token for the continuation"):
        lm._loglikelihood_tokens([(("a", ""), [1], [])])
    with pytest.raises(EvalError, match="no token for the continuation ''"):
        lm.loglikelihood(requests([("", "")]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_not_finite_is_refused(model_folder: Path, value: float) -> None:
    """All choices would tie, and the first one win: a broken model would score like one that guesses."""
    model = small_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(EvalError, match="the model gives 3 of 3 texts a log-likelihood that is not a finite number"):
        scorer(model, model_folder).loglikelihood(requests(random_pairs(3)[:3]))


def test_models_that_change_their_logits_after_the_head_are_scored_right(model_folder: Path) -> None:
    """Only the head is cut short: a soft cap behind it still applies."""

    class SoftCapped(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.tanh(super().forward(*args, **kwargs).logits / 2) * 2)

    model = small_llama()
    capped = SoftCapped(model.config).eval()
    capped.load_state_dict(model.state_dict())
    lm = scorer(capped, model_folder)
    context, continuation = lm.tok_encode("the whale was"), lm.tok_encode(" great and white")
    ((ours, _),) = lm._loglikelihood_tokens([(("", ""), context, continuation)])
    with torch.no_grad():
        log_probs = capped(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    expected = sum(log_probs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))
    assert ours == pytest.approx(expected, abs=1e-3)


@given(
    context=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    continuation=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    max_length=st.integers(1, 12),
)
def test_windows_predict_each_token_once_with_all_the_context_that_fits(
    context: list[int], continuation: list[int], max_length: int
) -> None:
    pieces = list(windows(context, continuation, max_length))
    assert [token for _, targets in pieces for token in targets] == continuation
    text, end = context + continuation, len(context)
    for inputs, targets in pieces:
        end += len(targets)
        assert len(targets) <= len(inputs) == min(max_length, end - 1)
        assert list(inputs) == text[end - 1 - len(inputs) : end - 1]
    if len(continuation) <= max_length:
        assert len(pieces) == 1
