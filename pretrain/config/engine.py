"""Config section `engine`: what carries out the step."""

from typing import Literal

from optimizers.sharded.exchange import WireDtype
from pretrain.config.base import NUMERICS, Section
from pretrain.config.fields import PositiveInt


class EngineConfig(Section):
    """What carries out the step."""

    # Bucket sizes too: a ring adds up the ranks in an order that depends on the position within the bucket.
    key_class = NUMERICS

    kind: Literal["plain", "deepspeed"] = "plain"
    """`plain`: Accelerate; one process, or data parallel over several (torchrun), each with the whole model.
    `deepspeed`: ZeRO, which divides optimizer state, gradients and weights among the processes."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO divides: 1 the optimizer state and fp32 weights, 2 also the gradients, 3 also the weights of the
    model; 0 nothing. A higher stage needs less memory and more communication."""

    wire_dtype: WireDtype = "bf16"
    """Dtype in which momenta travel to the rank that computes a matrix's direction, and steps travel back. bf16 moves
    half the bytes and turns directions by about 0.2 %."""

    accumulation_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which the gradients of micro-batches are summed, for `train.precision` bf16. bf16 loses small
    gradients."""

    communication_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are summed over ranks, for `train.precision` bf16. bf16 moves half the bytes."""

    reduce_bucket_elements: PositiveInt = 50_000_000
    """Elements of gradients that are reduced at a time. A larger bucket is faster and takes more memory."""

    gather_bucket_elements: PositiveInt = 50_000_000
    """Elements of weights that are gathered at a time."""

    def precision_problems(self, precision: str) -> list[str]:
        """Return what does not work at this precision ("auto" is checked again once it is resolved)."""
        if self.kind == "plain":
            return []
        if precision == "bf16" and self.zero_stage == 0 and self.accumulation_dtype == "fp32":
            return [
                "accumulation_dtype: expected bf16 with zero_stage 0 and bf16 weights, where DeepSpeed has no fp32 "
                "accumulation, got fp32; or use zero_stage 1"
            ]
        low = [key for key in ("accumulation_dtype", "communication_dtype") if getattr(self, key) == "bf16"]
        return [f"{key}: expected fp32 with train.precision fp32, got bf16" for key in low if precision == "fp32"]

    def ineffective(self) -> dict[str, str]:
        """Return everything about ZeRO with the plain engine, and what a stage does not use."""
        if self.kind == "plain":
            return {key: "engine.kind is plain" for key in type(self).model_fields if key != "kind"}
        if self.zero_stage == 0:
            return {
                "wire_dtype": "with zero_stage 0 every rank holds whole matrices",
                "gather_bucket_elements": "with zero_stage 0 every rank holds all weights",
                "reduce_bucket_elements": "with zero_stage 0 DeepSpeed reduces in buckets of its own",
            }
        return {}
