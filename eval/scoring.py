"""Log-likelihoods of continuations: lm-eval's Hugging Face model with our own scoring loop.

lm-eval's loop computes every choice of a question from its first token, and the logits and a log-softmax at every
position, then uses the few that predict the continuation. Here what choices have in common is computed once
(`eval.rows`), and the head is applied to these few only (`eval.forward`). Tokenization, prompts, truncation and metrics
are lm-eval's, and the numbers are the same up to rounding.

Worked example: a context of 5 tokens `c`, a continuation of 3 tokens `x`, and a model that takes 6 tokens:

    tokens      c0 c1 c2 c3 c4 x0 x1 x2
    input             c2 c3 c4 x0 x1 *     the last token is only a target; the oldest ones are cut
    head sees               c4 x0 x1
    targets                 x0 x1 x2
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.errors import EvalError
from eval.forward import TokenScores, score_rows, shares_exactly
from eval.items import say
from eval.rows import BatchLimit, Row, Text, distinct_texts, is_packed, separate_rows, shared_rows

Score = tuple[float, bool]
"""(log-likelihood, whether greedy decoding would produce the continuation)."""
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of lm-eval after tokenization: (context, continuation) as text, then the token ids of each."""
BatchSize = int | Literal["auto"]

_CPU_TOKENS, _GPU_TOKENS = 2_048, 16_384
_CHECKED_ROWS = 2


class ScoreStore(Protocol):
    """Keeps scores, so that an evaluation that was stopped does not compute them again."""

    def known(self, keys: Collection[str]) -> Mapping[str, Score]:
        """Return the scores of those requests that have one, by their `request_key`."""

    def add(self, scores: Mapping[str, Score]) -> None:
        """Keep the scores that a batch completed."""


class ContinuationScorer(HFLM):
    """An lm-eval model that scores continuations.

    Attributes:
        truncated_requests: number of truncated requests, by task.
        scored_requests: number of requests whose score was computed, not found in the store.
        shares: whether rows with several texts are used. None until the model has been tested for it.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        batch_size: number of texts per forward pass; "auto" for as many as fit into a number of tokens that suits the
            device, and into its memory.
        progress: whether to show a progress bar and notes on standard error.
        store: where scores are looked up, and added after each batch.
        share: whether what several texts begin with may be computed once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: BatchSize = "auto",
        progress: bool,
        store: ScoreStore | None = None,
        share: bool = True,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        self.progress, self.store = progress, store
        self.truncated_requests: Counter[str] = Counter()
        self.scored_requests = 0
        self.shares: bool | None = None if share else False
        self._checked_length = 0
        self._limit = _limit(batch_size, self.device)
        self._truncated: list[int] = []
        # Nothing is generated, so keys and values are not needed again.
        model.config.use_cache = False

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Return (log-likelihood, whether greedy decoding would produce it) for each request."""
        for request in requests:
            context, continuation = request.args
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise EvalError(f"the tokenizer produces no token for the continuation {continuation!r}")
        self._truncated.clear()
        results = super().loglikelihood(requests, disable_tqdm=True)
        truncated = Counter(str(requests[index].task_name) for index in self._truncated)
        self.truncated_requests.update(truncated)
        totals = Counter(str(request.task_name) for request in requests)
        for task, count in truncated.items():
            say(
                self.progress,
                f"{task}: {count:,} of {totals[task]:,} texts are longer than the model's context of"
                f" {self.max_length:,} tokens and lost their beginning; compare them only with models that have the"
                " same context, or use fewer shots",
            )
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows that follow each other, as lm-eval defines it."""
        pieces: list[TokenRequest] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                pieces.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[index] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        for index, (text, context, continuation) in enumerate(requests):
            if not continuation:
                shown = text[1] if text else ""
                raise EvalError(f"the tokenizer produces no token for the continuation {shown!r}")
            if text and len(context) + len(continuation) > self.max_length + 1:
                self._truncated.append(index)
        texts = distinct_texts([(context, continuation) for _, context, continuation in requests], self.max_length)
        found = _Scores(requests, texts, self.store)
        if found.remaining:
            # Batches are those of a call that knows no score, so that scores do not depend on where one was stopped.
            self._score_all(self._rows(texts), found)
        return found.results()

    def _rows(self, texts: Sequence[Text]) -> list[Row]:
        """Arrange the texts in rows of several texts if the model scores these exactly, or else of one."""
        if self.shares is False:
            return separate_rows(texts)
        by_texts = self._limit.kind == "texts"
        rows = shared_rows(
            texts,
            # The mask of a row knows nothing of windows.
            longest_text=min([self.max_length, *_windows(self.model.config.get_text_config())]),
            longest_row=self.max_length if by_texts else min(self.max_length, self._limit.most),
            most_texts=self._limit.most if by_texts else len(texts),
            hidden_size=self.model.get_input_embeddings().weight.shape[1],
        )
        packed = [row for row in rows if is_packed(row)]
        # Effects of the length show in the longest rows, so shorter ones need no test of their own.
        if packed and packed[0].length > self._checked_length:
            sample = packed[:: max(1, len(packed) // _CHECKED_ROWS)][:_CHECKED_ROWS]
            self.shares = shares_exactly(self.model, sample, self.device)
            self._checked_length = packed[0].length
            if not self.shares:
                say(self.progress, "this model cannot share the beginnings of texts exactly; each is scored by itself")
                return separate_rows(texts)
        return rows

    def _score_all(self, rows: Sequence[Row], found: "_Scores") -> None:
        # `None` shows the bar only on a terminal.
        hidden = None if self.progress else True
        limit, start = self._limit, 0
        with tqdm(total=sum(len(row.texts) for row in rows), desc="scoring", unit=" texts", disable=hidden) as bar:
            while start < len(rows):
                end = limit.end(rows, start)
                batch = [row for row in map(found.unfinished, rows[start:end]) if row.texts]
                scores = self._score(batch) if batch else None
                if batch and scores is None:
                    if end - start == 1 and is_packed(rows[start]):
                        rows = [*rows[:start], *separate_rows(rows[start].texts), *rows[start + 1 :]]
                        continue
                    if end - start == 1:
                        raise EvalError(
                            f"a text of {rows[start].length:,} tokens does not fit into the memory of {self.device};"
                            " use a narrower --dtype or another --device"
                        )
                    limit = self._limit = limit.halved()
                    continue
                if scores is not None:
                    self.scored_requests += found.add(scores)
                bar.update(sum(len(row.texts) for row in rows[start:end]))
                start = end

    def _score(self, batch: Sequence[Row]) -> TokenScores | None:
        """Score a batch; None if it does not fit into the memory of the device."""
        try:
            return score_rows(self.model, batch, self.device)
        except torch.OutOfMemoryError:
            pass
        # Behind the exception, whose traceback holds the tensors.
        torch.cuda.empty_cache()
        return None


class _Scores:
    """What is known so far of the scores of some requests."""

    def __init__(self, requests: Sequence[TokenRequest], texts: Sequence[Text], store: ScoreStore | None) -> None:
        self._store = store
        self._keys = [request_key(*text) if store and text else None for text, _, _ in requests]
        known = store.known({key for key in self._keys if key}) if store else {}
        self._log_likelihoods = torch.zeros(len(requests), dtype=torch.float64)
        self._greedy = torch.ones(len(requests), dtype=torch.bool)
        self._tokens = torch.tensor([len(continuation) for _, _, continuation in requests])
        """Number of tokens of each that are still to be scored."""
        for index, key in enumerate(self._keys):
            if key is not None and key in known:
                self._log_likelihoods[index], self._greedy[index] = known[key]
                self._tokens[index] = 0
        self._is_known = self._tokens == 0

    @property
    def remaining(self) -> int:
        """Number of requests without a score."""
        return int((self._tokens > 0).sum())

    def unfinished(self, row: Row) -> Row:
        """Return the row without texts that belong to known requests only."""
        texts = [text for text in row.texts if not all(self._is_known[target.request] for target in text.targets)]
        return row if len(texts) == len(row.texts) else replace(row, texts=tuple(texts))

    def add(self, scores: TokenScores) -> int:
        """Add what a batch found, to the store as well; return the number of requests that it completed.

        Raises:
            EvalError: a log-likelihood is not a finite number.
        """
        wanted = ~self._is_known[scores.requests]
        requests = scores.requests[wanted]
        self._log_likelihoods.index_add_(0, requests, scores.log_probabilities[wanted])
        self._greedy[requests[~scores.is_greedy[wanted]]] = False
        self._tokens.index_add_(0, requests, torch.full_like(requests, -1))
        touched = requests.unique()
        broken = int((~self._log_likelihoods[touched].isfinite()).sum())
        if broken:
            # Comparing them would score a broken model like a guessing one.
            raise EvalError(
                f"the model gives {broken:,} of {len(touched):,} texts a log-likelihood that is not a finite number;"
                " its weights may be damaged, or --dtype too narrow for it"
            )
        complete = touched[self._tokens[touched] == 0].tolist()
        if self._store:
            named = {self._keys[index]: self._score(index) for index in complete}
            self._store.add({key: score for key, score in named.items() if key})
        return len(complete)

    def results(self) -> list[Score]:
        """Return the score of each request."""
        return [self._score(index) for index in range(len(self._keys))]

    def _score(self, index: int) -> Score:
        return self._log_likelihoods[index].item(), bool(self._greedy[index])


def request_key(context: str, continuation: str) -> str:
    """Return the name of a request in a store: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps([context, continuation]).encode()).hexdigest()[:32]


def _limit(batch_size: BatchSize, device: torch.device) -> BatchLimit:
    if batch_size == "auto":
        return BatchLimit("tokens", _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS)
    return BatchLimit("texts", batch_size)


def _windows(config: PreTrainedConfig) -> list[int]:
    """The numbers of tokens that layers with a limited view see, if the model has such layers."""
    limits = [getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)]
    return [limit for limit in limits if isinstance(limit, int)]
