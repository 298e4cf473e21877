"""Config section `model`: the kind of model, its shape and how it is initialised."""

from collections.abc import Collection
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pretrain.config.base import RESULT, Section
from pretrain.config.fields import PositiveFloat, PositiveInt


class ModelConfig(Section):
    """Which model, and its shape."""

    key_class = RESULT

    architecture: Literal["llama", "speedrun"] = "llama"
    """`llama`: a `LlamaForCausalLM`: RMSNorm, rotary positions, grouped-query attention, SwiGLU MLP. `speedrun`: the
    model of the modded-nanoGPT optimization track (see pretrain.model.speedrun), which can be trained and validated
    but neither sampled nor exported."""

    vocab_size: PositiveInt
    """Rows of the embedding and of the head. May exceed the tokenizer's entries (padding to a
    multiple of 64 or 128 is faster on GPUs); fewer than the tokenizer's entries is refused."""

    hidden_size: PositiveInt
    """Width of the residual stream; a multiple of `num_heads`."""

    intermediate_size: PositiveInt
    """Width of the MLP (the number of its neurons); over `hidden_size` it is the expansion."""

    num_layers: PositiveInt
    """Transformer blocks."""

    num_heads: PositiveInt
    """Query heads; the head size `hidden_size / num_heads` must be even for rotary positions."""

    num_kv_heads: PositiveInt
    """Key and value heads, a divisor of `num_heads`; equal to it means full multi-head attention."""

    context_length: PositiveInt
    """Longest sequence, in tokens, that the model is built for."""

    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies; larger for longer contexts. The record of `speedrun` has 1024."""

    tie_embeddings: bool = False
    """Use the input embedding as the output head as well."""

    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""

    init_std: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of the normal initialisation of embeddings and matrices."""

    init_residual: Literal["same", "depth_scaled", "zero"] = "same"
    """The matrices that write into the residual stream (o_proj, down_proj): drawn as the others,
    drawn with `init_std / sqrt(2 * num_layers)` (GPT-2), or zero."""

    embedding_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which `speedrun` keeps the weight and the gradient of its input embedding; the optimizer's state of it
    stays fp32. With `bf16` (the record) steps below 1/512 of a weight are rounded away, and the sum of its gradients
    over micro-batches and ranks is rounded at each addition."""

    def implied(self) -> Collection[str]:
        """The architecture, where it is what it always was."""
        return ("architecture",) if self.architecture == "llama" else ()

    def ineffective(self) -> dict[str, str]:
        """What the architecture has settled."""
        if self.architecture == "llama":
            return {"embedding_dtype": "a llama's weights have one dtype, that of the engine"}
        return {
            "tie_embeddings": "the speedrun architecture has a head of its own",
            **dict.fromkeys(("init_std", "init_residual"), "the speedrun architecture has its own initialisation"),
        }

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        problems = []
        if self.hidden_size % self.num_heads:
            problems.append(f"hidden_size: expected a multiple of num_heads ({self.num_heads}), got {self.hidden_size}")
        elif (self.hidden_size // self.num_heads) % 2:
            problems.append(
                "num_heads: expected an even head size for rotary positions, "
                f"got {self.hidden_size} / {self.num_heads} = {self.hidden_size // self.num_heads}"
            )
        elif self.architecture == "speedrun" and self.hidden_size // self.num_heads % 4:
            problems.append(
                "num_heads: expected a head size that is a multiple of 4, half of whose pairs are rotated, "
                f"got {self.hidden_size} / {self.num_heads} = {self.hidden_size // self.num_heads}"
            )
        if self.architecture == "speedrun" and self.num_kv_heads != self.num_heads:
            problems.append(
                f"num_kv_heads: expected num_heads ({self.num_heads}), for the speedrun architecture has no "
                f"grouped-query attention, got {self.num_kv_heads}"
            )
        elif self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_kv_heads: expected a divisor of num_heads ({self.num_heads}), got {self.num_kv_heads}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
