"""Text that the model writes during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationMixin

from pretrain.config.samples import SamplesConfig
from pretrain.engine.base import Engine
from pretrain.run.json_lines import JsonLines
from pretrain.training.hooks import Hook, StepContext, is_due


class Sampler(Hook):
    """Generates continuations of the configured prompts, writes them to samples.jsonl and prints them.

    Args:
        settings: the `samples` section.
        tokenizer: encodes prompts and decodes samples.
        eos_id: the end-of-text token, which precedes every prompt.
        seed: the run's seed; each sample has a random generator of its own.
        file: samples.jsonl.
        show: prints a line on rank 0.
    """

    phase = "samples"

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
        """Return True every `samples.every_steps` steps and after the last step; never if that is null."""
        return self.settings.every_steps is not None and is_due(self.settings.every_steps, step, last)

    def run(self, context: StepContext) -> dict[str, Any]:
        """Generate the samples, on rank 0."""
        if context.engine.rank == 0:
            for index, prompt in enumerate(self.settings.prompts):
                text = self.sample(context.engine, prompt, context.step * 1000 + index)
                sample = {"step": context.step, "prompt": prompt, "text": text}
                context.write(lambda sample=sample: self.file.append(sample))  # type: ignore[misc]
                self.show(f"sample after step {context.step}: {prompt!r} -> {text!r}")
        return {}

    def rewind(self, step: int) -> None:
        """Move the samples of later steps aside."""
        self.file.discard_after(step)

    @torch.no_grad()
    def sample(self, engine: Engine, prompt: str, draw: int) -> str:
        """Return a continuation of `prompt`; leaves the global random generators unchanged."""
        model = engine.module.model
        ids = [self.eos_id, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        room = engine.config.model.context_length - len(ids)
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
