"""Config section `engine`: what carries out the step."""

from typing import Literal

from optimizers.sharded.exchange import WireDtype
from pretrain.config.base import NUMERICS, Section
from pretrain.config.errors import ConfigError
from pretrain.config.fields import PositiveInt

OF_DEEPSPEED = ("zero_stage", "accumulation_dtype", "reduce_bucket_elements", "gather_bucket_elements")
OF_FSDP2 = ("reshard_after_forward", "shard_ranks")
OF_PLAIN = ("divide_matrices",)


class EngineConfig(Section):
    """What carries out the step."""

    # Bucket sizes too: a ring adds up the ranks in an order that depends on the position within the bucket.
    key_class = NUMERICS

    kind: Literal["plain", "deepspeed", "fsdp2"] = "plain"
    """`plain`: Accelerate; one process, or data parallel over several (torchrun), each with the whole model.
    `deepspeed`: ZeRO, which divides optimizer state, gradients and weights among the processes. `fsdp2`: torch's
    fully_shard, which divides all of them by the rows of each weight."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO divides: 1 the optimizer state and fp32 weights, 2 also the gradients, 3 also the weights of the
    model; 0 nothing. A higher stage needs less memory and more communication."""

    divide_matrices: bool = True
    """For `engine.kind` plain on several processes: each finds the directions of its share of the matrices and sends
    them to the others, in fp32. false: each finds all of them, and nothing is sent."""

    wire_dtype: WireDtype = "bf16"
    """Dtype in which momenta travel to the rank that computes a matrix's direction, and steps travel back. bf16 moves
    half the bytes and turns directions by about 0.2 %."""

    accumulation_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which the gradients of micro-batches are summed, for `train.precision` bf16. bf16 loses small
    gradients."""

    reshard_after_forward: bool = True
    """For `engine.kind` fsdp2: drop the gathered weights of a block after its forward pass and gather them again for
    the backward pass. false moves less and takes the memory of all weights."""

    shard_ranks: PositiveInt | None = None
    """For `engine.kind` fsdp2: over how many ranks weights are sharded, such as those of a node; a divisor of their
    number. The others hold replicas (HSDP). null: over all."""

    communication_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are summed over ranks, for `train.precision` bf16. bf16 moves half the bytes."""

    reduce_bucket_elements: PositiveInt = 50_000_000
    """Elements of gradients that are reduced at a time. A larger bucket is faster and takes more memory."""

    gather_bucket_elements: PositiveInt = 50_000_000
    """Elements of weights that are gathered at a time."""

    @property
    def shards_weights(self) -> bool:
        """Whether no rank has the whole model."""
        return self.kind == "fsdp2" or (self.kind == "deepspeed" and self.zero_stage == 3)

    def divides_matrices(self, ranks: int) -> bool:
        """Return whether ranks that have the whole model divide the matrix work."""
        return self.kind == "plain" and self.divide_matrices and ranks > 1

    def sharding_ranks(self, ranks: int) -> int:
        """Return over how many of `ranks` ranks each weight is sharded under FSDP2.

        Raises:
            ConfigError: `shard_ranks` does not divide them.
        """
        asked = self.shard_ranks or ranks
        if ranks % asked:
            raise ConfigError([f"engine.shard_ranks: expected a divisor of the {ranks} ranks, got {asked}"])
        return asked

    def precision_problems(self, precision: str) -> list[str]:
        """Return what does not work at this precision ("auto" is checked again once it is resolved)."""
        if self.kind == "plain":
            return []
        if self.kind == "fsdp2":
            if precision == "fp32" and self.communication_dtype == "bf16":
                return ["communication_dtype: expected fp32 with train.precision fp32, got bf16"]
            return []
        if precision == "bf16" and self.zero_stage == 0 and self.accumulation_dtype == "fp32":
            return [
                "accumulation_dtype: expected bf16 with zero_stage 0 and bf16 weights, where DeepSpeed has no fp32 "
                "accumulation, got fp32; or use zero_stage 1"
            ]
        low = [key for key in ("accumulation_dtype", "communication_dtype") if getattr(self, key) == "bf16"]
        return [f"{key}: expected fp32 with train.precision fp32, got bf16" for key in low if precision == "fp32"]

    def ineffective(self) -> dict[str, str]:
        """Return the keys of other engines, and what a stage does not use."""
        if self.kind == "plain":
            return dict.fromkeys(type(self).model_fields.keys() - {"kind", *OF_PLAIN}, "engine.kind is plain")
        if self.kind == "fsdp2":
            return dict.fromkeys((*OF_DEEPSPEED, *OF_PLAIN), "engine.kind is fsdp2")
        found = dict.fromkeys((*OF_FSDP2, *OF_PLAIN), "engine.kind is deepspeed")
        if self.zero_stage == 0:
            found |= {
                "wire_dtype": "with zero_stage 0 every rank holds whole matrices",
                "gather_bucket_elements": "with zero_stage 0 every rank holds all weights",
                "reduce_bucket_elements": "with zero_stage 0 DeepSpeed reduces in buckets of its own",
            }
        return found
