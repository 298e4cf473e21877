"""Config section `model`: the kind of model, its shape and its initialisation."""

from collections.abc import Collection
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pretrain.config.base import RESULT, Section
from pretrain.config.fields import PositiveFloat, PositiveInt

# Far beyond any model, and small enough that its parameters can be counted.
_LARGEST_SIZE, _MOST_LAYERS = 1 << 28, 4096


class ModelConfig(Section):
    """The kind of model, its shape and its initialisation."""

    key_class = RESULT

    architecture: Literal["llama", "speedrun"] = "llama"
    """`llama`: a `LlamaForCausalLM` with RMSNorm, rotary positions, grouped-query attention and a SwiGLU MLP.
    `speedrun`: the model of the modded-nanoGPT optimization track (see pretrain.model.speedrun), which can be trained
    and validated but neither sampled nor exported."""

    vocab_size: PositiveInt
    """Rows of the embedding and of the head: more than the largest token id of the tokenizer. Padding to a multiple
    of 64 or 128 is faster on GPUs."""

    hidden_size: PositiveInt
    """Width of the residual stream; a multiple of `num_heads`."""

    intermediate_size: PositiveInt
    """Width of the MLP, which is the number of its neurons. Divided by `hidden_size` it is the expansion."""

    num_layers: PositiveInt
    """Transformer blocks."""

    num_heads: PositiveInt
    """Query heads; the head size `hidden_size / num_heads` must be even for rotary positions."""

    num_kv_heads: PositiveInt
    """Key and value heads, a divisor of `num_heads`; as many as `num_heads` is full multi-head attention."""

    context_length: PositiveInt
    """Longest sequence, in tokens, that the model is built for."""

    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies; larger for longer contexts. The `speedrun` record uses 1024."""

    tie_embeddings: bool = False
    """Use the input embedding as the output head as well."""

    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""

    init_std: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Standard deviation of the normal initialisation of embeddings and matrices."""

    init_residual: Literal["same", "depth_scaled", "zero"] = "same"
    """Initialisation of the matrices that write into the residual stream (o_proj, down_proj): like the others, with
    `init_std / sqrt(2 * num_layers)` (GPT-2), or zero."""

    embedding_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the weight and the gradient of the input embedding of `speedrun`; its optimizer state is fp32. With
    `bf16`, which the record uses, steps below 1/512 of a weight are rounded away, and the sum of the gradients over
    micro-batches and ranks is rounded at each addition."""

    def implied(self) -> Collection[str]:
        """Return the architecture if it is llama, which was the only one at first."""
        return ("architecture",) if self.architecture == "llama" else ()

    def ineffective(self) -> dict[str, str]:
        """Return what the architecture determines."""
        if self.architecture == "llama":
            return {"embedding_dtype": "the weights of a llama have one dtype, that of the engine"}
        return {
            "tie_embeddings": "the speedrun architecture has a head of its own",
            **dict.fromkeys(("init_std", "init_residual"), "the speedrun architecture has its own initialisation"),
        }

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "context_length")
        problems = [
            f"{key}: expected at most {most:,}, got {getattr(self, key):,}"
            for key in sizes
            if getattr(self, key) > (most := _MOST_LAYERS if key == "num_layers" else _LARGEST_SIZE)
        ]
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
                f"num_kv_heads: expected num_heads ({self.num_heads}), since the speedrun architecture has no "
                f"grouped-query attention, got {self.num_kv_heads}"
            )
        elif self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_kv_heads: expected a divisor of num_heads ({self.num_heads}), got {self.num_kv_heads}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
