"""Periodic work during training. A hook changes nothing in the run: same weights with it or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationMixin

from pretrain.config import Config
from pretrain.config.samples import SamplesConfig
from pretrain.config.validation import ValidationConfig
from pretrain.data import TokenBatch, TokenStream
from pretrain.run.json_lines import JsonLines
from pretrain.training.trainer import Hook, Trainer


def is_due(every_steps: int | None, step: int, last: bool) -> bool:
    """Whether work of every n steps, and after the last, is due; null is after the last only."""
    return last or (every_steps is not None and step % every_steps == 0)


class Validator(Hook):
    """Loss and bits per byte on the validation split, read once and kept in memory.

    Args:
        config: the run's config.
        open_stream: opens the validation stream (a collective where there are several ranks).
    """

    def __init__(self, config: Config, open_stream: Callable[[], TokenStream]) -> None:
        self.settings: ValidationConfig = config.validation
        self.rows = self.settings.batch_sequences or config.train.micro_batch_sequences
        self.max_sequences = max(1, self.settings.max_tokens // config.sequence_length)
        self._open_stream = open_stream
        self._batches: list[TokenBatch] | None = None
        self.text_bytes = 0

    def due(self, step: int, last: bool) -> bool:
        """Every `validation.every_steps` steps and after the last."""
        return is_due(self.settings.every_steps, step, last)

    def batches(self) -> list[TokenBatch]:
        """The whole validation split, `rows` sequences at a time."""
        if self._batches is None:
            stream = self._open_stream()
            try:
                self._batches = list(_drain(stream, self.rows, self.max_sequences))
                self.text_bytes = stream.text_bytes
            finally:
                stream.close()
        return self._batches

    @torch.no_grad()
    def run(self, trainer: Trainer) -> dict[str, Any]:
        """Validate; the ranks share the batches out."""
        engine = trainer.engine
        batches = self.batches()
        engine.module.eval()
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(batches), engine.world_size):
            # Every rank runs in every round: under ZeRO 3 a forward pass is a collective.
            index = first + engine.rank
            loss = trainer.loss_sum(batches[min(index, len(batches) - 1)], engine.module)
            if index < len(batches):
                total += loss.double().cpu()
        engine.module.train()
        nats = sum(engine.gather(total.item()))
        loss = nats / sum(batch.num_targets for batch in batches)
        trainer.state.validation_loss = loss
        trainer.state.bits_per_byte = nats / math.log(2) / self.text_bytes
        return {"validation_loss": loss, "validation_bits_per_byte": trainer.state.bits_per_byte}


def _drain(stream: TokenStream, rows: int, max_sequences: int) -> Iterator[TokenBatch]:
    """Batches of at most `rows` sequences until the stream ends or `max_sequences` are read."""
    left = max_sequences
    while left > 0:
        try:
            batch = stream.next_batch(min(rows, left))
        except StopIteration:
            return
        left -= len(batch.lengths)
        yield batch


class Sampler(Hook):
    """Lets the model continue the configured prompts; the texts go to samples.jsonl and the screen.

    Args:
        settings: the `samples` section.
        tokenizer: to encode prompts and decode samples.
        eos_id: end-of-text token; every sample starts after one.
        seed: of the run; each step draws from a generator of its own.
        file: samples.jsonl.
        show: prints a line on rank 0.
    """

    def __init__(
        self,
        settings: SamplesConfig,
        tokenizer: Tokenizer,
        eos_id: int,
        seed: int,
        file: JsonLines,
        show: Callable[[str], None],
    ) -> None:
        self.settings, self.tokenizer, self.eos_id = settings, tokenizer, eos_id
        self.seed, self.file, self.show = seed, file, show

    def due(self, step: int, last: bool) -> bool:
        """Every `samples.every_steps` steps and after the last; never if that is null."""
        return self.settings.every_steps is not None and is_due(self.settings.every_steps, step, last)

    def run(self, trainer: Trainer) -> dict[str, Any]:
        """Write the samples, on rank 0."""
        if trainer.engine.rank == 0:
            for index, prompt in enumerate(self.settings.prompts):
                text = self.sample(trainer, prompt, trainer.state.step * 1000 + index)
                self.file.append({"step": trainer.state.step, "prompt": prompt, "text": text})
                self.show(f"sample after step {trainer.state.step}: {prompt!r} -> {text!r}")
        return {}

    @torch.no_grad()
    def sample(self, trainer: Trainer, prompt: str, draw: int) -> str:
        """One continuation of `prompt`; the global random generators are left as they were."""
        engine, model = trainer.engine, trainer.engine.module.model
        ids = [self.eos_id, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        room = trainer.config.model.context_length - len(ids)
        if room < 1:
            return ""
        devices = [engine.device] if engine.device.type == "cuda" else []
        assert isinstance(model, GenerationMixin), "the config refuses samples of a model that cannot write any"
        model.eval()
        with torch.random.fork_rng(devices=devices), engine.autocast():
            torch.manual_seed(self.seed + draw)
            inputs = torch.tensor([ids], device=engine.device)
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                temperature=self.settings.temperature,
                max_new_tokens=min(room, self.settings.max_new_tokens),
                eos_token_id=self.eos_id,
                pad_token_id=self.eos_id,
                use_cache=True,
            )
        model.train()
        return self.tokenizer.decode(output[0, len(ids) :].tolist())
