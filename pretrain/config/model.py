"""Config section `model`: the shape of the Llama-style model and how it is initialised."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pretrain.config.base import Section
from pretrain.config.fields import PositiveFloat, PositiveInt


class ModelConfig(Section):
    """A `LlamaForCausalLM`: RMSNorm, rotary positions, grouped-query attention, SwiGLU MLP."""

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
    """Base of the rotary frequencies; larger for longer contexts."""

    tie_embeddings: bool = False
    """Use the input embedding as the output head as well."""

    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""

    init_std: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of the normal initialisation of embeddings and matrices."""

    init_residual: Literal["same", "depth_scaled", "zero"] = "same"
    """The matrices that write into the residual stream (o_proj, down_proj): drawn as the others,
    drawn with `init_std / sqrt(2 * num_layers)` (GPT-2), or zero."""

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
        if self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_kv_heads: expected a divisor of num_heads ({self.num_heads}), got {self.num_kv_heads}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
