"""Log-likelihoods of continuations: lm-eval's Hugging Face model with our own scoring loop.

lm-eval's loop computes the logits and a log-softmax at every position, then uses the few that predict the continuation.
Here the head is applied to these few only. Tokenization, prompts, truncation and metrics are lm-eval's, and the numbers
are the same up to rounding.

Worked example: a context of 5 tokens `c`, a continuation of 3 tokens `x`, and a model that takes 6 tokens:

    tokens      c0 c1 c2 c3 c4 x0 x1 x2
    input             c2 c3 c4 x0 x1 *     the last token is only a target; the oldest ones are cut
    head sees               c4 x0 x1
    targets                 x0 x1 x2
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.errors import EvalError

TokenRequest = tuple[tuple[str, str], list[int], list[int]]
"""A request of lm-eval after tokenization: (context, continuation) as text, then the token ids of each."""


@dataclass(frozen=True)
class _Target:
    """Tokens that the last positions of an input predict."""

    request: int
    tokens: Sequence[int]


class ContinuationScorer(HFLM):
    """An lm-eval model that scores continuations; `truncated_requests` counts the truncated requests of each task."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        progress: bool,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.progress = progress
        self.truncated_requests: Counter[str] = Counter()
        self._truncated: list[int] = []
        # Nothing is generated, so keys and values are not needed again.
        model.config.use_cache = False

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding would produce it) for each request."""
        self._truncated.clear()
        results = super().loglikelihood(requests, disable_tqdm=True)
        self.truncated_requests.update(str(requests[index].task_name) for index in self._truncated)
        return results

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Requests with the same input (choices of a single token) share one row of a batch.
        rows: dict[tuple[int, ...], list[_Target]] = {}
        for index, (text, context, continuation) in enumerate(requests):
            if not continuation:
                raise EvalError(f"the tokenizer produces no token for the continuation {text[1]!r}")
            if len(context) + len(continuation) > self.max_length + 1:
                self._truncated.append(index)
            for inputs, targets in windows(context, continuation, self.max_length):
                rows.setdefault(inputs, []).append(_Target(index, targets))

        log_likelihoods = torch.zeros(len(requests), dtype=torch.float64)
        greedy = torch.ones(len(requests), dtype=torch.bool)
        # Longest first: rows of a batch have similar lengths, and what does not fit in memory fails immediately.
        ordered = sorted(rows.items(), key=lambda row: (-len(row[0]), row[0]))
        size = override_bs or self.batch_size
        # `None` shows the bar only on a terminal.
        hidden = None if self.progress else True
        with tqdm(total=len(ordered), desc="scoring", unit=" texts", disable=hidden) as bar:
            for start in range(0, len(ordered), size):
                batch = ordered[start : start + size]
                owners, log_probs, hits = self._score(batch)
                log_likelihoods.index_add_(0, owners, log_probs)
                greedy[owners[~hits]] = False
                bar.update(len(batch))
        broken = int((~log_likelihoods.isfinite()).sum())
        if broken:
            # Comparing them would score a broken model like a guessing one.
            raise EvalError(
                f"the model gives {broken:,} of {len(requests):,} texts a log-likelihood that is not a finite number;"
                " its weights may be damaged, or --dtype too narrow for it"
            )
        return list(zip(log_likelihoods.tolist(), greedy.tolist(), strict=True))

    @torch.inference_mode()
    def _score(self, batch: Sequence[tuple[tuple[int, ...], list[_Target]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Score every target token of a batch in one forward pass.

        Returns three vectors over the target tokens, on the CPU: the request of each token, its log-probability
        (float64), and whether it is the most likely token.
        """
        lengths = [len(inputs) for inputs, _ in batch]
        counts = [max(len(target.tokens) for target in targets) for _, targets in batch]
        tokens = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (inputs, _) in enumerate(batch):
            # Attention is causal, so padding on the right has no influence.
            tokens[row, : lengths[row]] = torch.tensor(inputs)
            scored[row, lengths[row] - counts[row] : lengths[row]] = True

        owners: list[int] = []
        positions: list[int] = []  # among the scored positions, in row order
        expected: list[int] = []
        end = 0
        for (_, targets), count in zip(batch, counts, strict=True):
            end += count
            for target in targets:
                owners += [target.request] * len(target.tokens)
                positions += range(end - len(target.tokens), end)
                expected += target.tokens

        logits = self._logits_at(tokens.to(self.device), scored.to(self.device))
        where = torch.tensor(positions, device=logits.device)
        wanted = torch.tensor(expected, device=logits.device)
        log_probs = logits[where, wanted] - logits.logsumexp(dim=-1)[where]
        hits = logits.argmax(dim=-1)[where] == wanted
        return torch.tensor(owners), log_probs.double().cpu(), hits.cpu()

    def _logits_at(self, tokens: Tensor, scored: Tensor) -> Tensor:
        """Return float32 logits of shape (scored positions in row order, vocabulary) for `tokens` (rows, length)."""
        with _head_sees_only(self.model.get_output_embeddings(), scored):
            logits = self.model(tokens).logits
        # A model without a separate head computes all of them.
        return (logits[scored] if logits.shape[:2] == scored.shape else logits[0]).float()


def windows(
    context: Sequence[int], continuation: Sequence[int], max_length: int
) -> Iterator[tuple[tuple[int, ...], Sequence[int]]]:
    """Yield inputs of at most `max_length` tokens that together predict each token of `continuation` once.

    Yields (input, targets): the last positions of the input predict the targets. One window is enough unless the
    continuation itself is longer than `max_length`. Each window has as much of the preceding text as fits.
    """
    assert context, "lm-eval puts a token before an empty context"
    text = [*context, *continuation]
    for start in range(len(context), len(text), max_length):
        end = min(start + max_length, len(text))
        yield tuple(text[max(0, end - 1 - max_length) : end - 1]), text[start:end]


@contextmanager
def _head_sees_only(head: nn.Module | None, scored: Tensor) -> Iterator[None]:
    """Give `head` only the scored hidden states, of shape (1, scored positions, width).

    This is a hook and not a call of the head, so that what a model does to its logits afterwards (scaling, soft caps)
    still happens.
    """

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        return (hidden[scored].unsqueeze(0), *inputs[1:]) if hidden.shape[:2] == scored.shape else None

    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
