"""Config sections `train` and `engine`: batch, length, precision, memory, and what runs it."""

from typing import Annotated, Literal

from pydantic import Field

from optimizers.sharded.exchange import WireDtype
from pretrain.config.base import Section
from pretrain.config.fields import PositiveFloat, PositiveInt


class TrainConfig(Section):
    """How much is trained on, in which batches, and how the step is computed."""

    total_tokens: PositiveInt
    """Tokens of the whole run, a multiple of `global_batch_tokens`; the schedule ends there."""

    global_batch_tokens: PositiveInt
    """Tokens of one optimizer step over all ranks, a multiple of the sequence length."""

    micro_batch_sequences: PositiveInt
    """Sequences (not tokens) of one forward and backward pass on one rank. Together with the
    number of ranks it gives the accumulation; it does not change what is computed."""

    sequence_length: PositiveInt | None = None
    """Tokens of a training sequence, at most `model.context_length`; null takes that."""

    grad_clip: PositiveFloat | None = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. null: no clipping."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The dtype of the matrix products. Under the plain engine `bf16` is autocast over fp32 weights, under DeepSpeed
    bf16 weights beside fp32 ones that are trained: not quite the same model. `auto` takes it where the processor has
    fast bf16, and fp32 elsewhere. The choice is printed."""

    activation_checkpointing: Literal["none", "full"] | PositiveInt = "none"
    """Recompute the activations of no layer, of every layer (`full`), or of every n-th layer in
    the backward pass: less memory, up to a third more FLOPs."""

    compile: bool = False
    """Compile the forward and backward pass with `torch.compile` (minutes at the start)."""

    loss_chunk_tokens: PositiveInt | None = None
    """Compute head and cross-entropy over this many tokens at a time, so that the logits of a
    whole micro-batch never exist at once. null: all at once."""

    max_skipped_steps: PositiveInt = 20
    """Stop with an error after this many steps *in a row* were skipped for non-finite gradients."""

    peak_tflops: PositiveFloat | None = None
    """Peak of one device at the precision used, in 1e12 FLOP/s, for the MFU. null: from a table of
    known GPUs; on a device that is not in it, no MFU is reported."""


class EngineConfig(Section):
    """What carries out the step."""

    kind: Literal["plain", "deepspeed"] = "plain"
    """`plain`: Accelerate; one process, or data parallel over several (torchrun), each with everything. `deepspeed`:
    ZeRO, which shares optimizer state, gradients and weights out between the processes."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shares out: 1 the optimizer state and fp32 weights, 2 also the gradients, 3 also the weights of the
    model; 0 nothing. A higher stage needs less memory and more communication."""

    wire_dtype: WireDtype = "bf16"
    """In which momenta go to the rank that computes a matrix's direction, and steps come back. bf16 moves half the
    bytes and turns directions by about 0.2 %."""

    accumulation_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which the gradients of micro-batches are summed, for `train.precision` bf16. bf16 loses the small ones."""

    communication_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over ranks, for `train.precision` bf16. bf16 moves half the bytes."""

    reduce_bucket_elements: PositiveInt = 50_000_000
    """Elements of gradients that are reduced at a time: larger is faster and takes that much more memory."""

    gather_bucket_elements: PositiveInt = 50_000_000
    """Elements of weights that are gathered at a time."""

    def precision_problems(self, precision: str) -> list[str]:
        """What cannot be at this precision ("auto" is said again where it is resolved)."""
        if self.kind == "plain":
            return []
        if precision == "bf16" and self.zero_stage == 0 and self.accumulation_dtype == "fp32":
            return [
                "accumulation_dtype: expected bf16 with zero_stage 0 and bf16 weights (DeepSpeed has no fp32 "
                "accumulation there), got fp32; or take zero_stage 1"
            ]
        low = [key for key in ("accumulation_dtype", "communication_dtype") if getattr(self, key) == "bf16"]
        return [f"{key}: expected fp32 with train.precision fp32, got bf16" for key in low if precision == "fp32"]

    def ineffective(self) -> dict[str, str]:
        """Everything of ZeRO under the plain engine, and what a stage has no use for."""
        if self.kind == "plain":
            return {key: "engine.kind is plain" for key in type(self).model_fields if key != "kind"}
        return {"wire_dtype": "with zero_stage 0 every rank holds whole matrices"} if self.zero_stage == 0 else {}


class SamplesConfig(Section):
    """Text written by the model during training."""

    every_steps: PositiveInt | None = None
    """Write samples every n steps and at the end; null: none."""

    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ("",)
    """What the samples continue; an empty prompt starts a document."""

    max_new_tokens: PositiveInt = 64
    """Tokens per sample."""

    temperature: PositiveFloat = 0.8
    """Sampling temperature."""

    def ineffective(self) -> dict[str, str]:
        """Everything, where no samples are written."""
        fields = ("prompts", "max_new_tokens", "temperature") if self.every_steps is None else ()
        return dict.fromkeys(fields, "samples.every_steps is null, so no samples are written")


class ValidationConfig(Section):
    """Loss and bits per byte on the validation split."""

    every_steps: PositiveInt | None = None
    """Validate every n steps and at the end; null: only at the end."""

    batch_sequences: PositiveInt | None = None
    """Sequences of one forward pass per rank; null: `train.micro_batch_sequences`."""

    max_tokens: PositiveInt = 10_000_000
    """Tokens of the validation split that are used, from its beginning: enough for a standard error far below
    any difference of interest, and small enough to be kept in memory (40 MB)."""


class CheckpointConfig(Section):
    """When checkpoints are saved and which are kept. The last step is always saved."""

    save_every_steps: PositiveInt = 1000
    """Save every n steps."""

    keep_last: PositiveInt = 2
    """Keep the newest n; with 1 a damaged newest checkpoint leaves nothing to fall back to."""

    keep_every_steps: PositiveInt | None = None
    """Besides, keep for good those whose step is a multiple of this."""


class LoggingConfig(Section):
    """What is shown while training; metrics.jsonl always gets every step."""

    every_steps: PositiveInt = 10
    """Print a line every n steps (a progress bar is updated every step)."""


class WandbConfig(Section):
    """Weights & Biases, optional."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """`offline` writes into the run folder, to be synchronised later; `online` falls back to
    `offline` with a warning when the server cannot be reached."""

    project: str = "aurora-pretrain"
    """The project under which the run appears."""

    def ineffective(self) -> dict[str, str]:
        """The project, where nothing is sent."""
        return {"project": "wandb.mode is disabled"} if self.mode == "disabled" else {}
