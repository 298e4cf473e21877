"""Config section `train`: tokens, batch, sequence length, precision, and memory."""

from typing import Annotated, Literal

from pydantic import Field

from pretrain.config.base import EXECUTION, LENGTH, NUMERICS, RESULT, Section
from pretrain.config.fields import PositiveFloat, PositiveInt


class TrainConfig(Section):
    """How many tokens are trained on, in which batches, and how a step is computed."""

    total_tokens: Annotated[PositiveInt, LENGTH]
    """Tokens of the whole run, a multiple of `global_batch_tokens`. The schedule ends there, so a run that is extended
    or shortened on resume continues with other learning rates, unless the schedule is `constant`."""

    global_batch_tokens: Annotated[PositiveInt, RESULT]
    """Tokens of one optimizer step over all ranks, a multiple of the sequence length."""

    micro_batch_sequences: Annotated[PositiveInt, NUMERICS]
    """Sequences (not tokens) of one forward and backward pass on one rank. With the number of ranks it determines how
    many passes are accumulated. It changes the order in which gradients are summed, and nothing else."""

    sequence_length: Annotated[PositiveInt | None, RESULT] = None
    """Tokens of a training sequence, at most `model.context_length`; null: `model.context_length`."""

    grad_clip: Annotated[PositiveFloat | None, RESULT] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. null: no clipping."""

    precision: Annotated[Literal["auto", "fp32", "bf16"], NUMERICS] = "auto"
    """The dtype of the matrix products. With the plain engine `bf16` is autocast over fp32 weights; with DeepSpeed it
    is bf16 weights alongside the fp32 weights that are trained, so the two models differ slightly. `auto` is bf16 if
    the processor has fast bf16, and fp32 otherwise. The run prints the choice."""

    activation_checkpointing: Annotated[Literal["none", "full"] | PositiveInt, EXECUTION] = "none"
    """Recompute the activations of no layer, of every layer (`full`), or of every n-th layer in the backward pass:
    less memory, up to a third more FLOPs. The recomputed activations are the same."""

    compile: Annotated[bool, NUMERICS] = False
    """Compile the forward and backward pass with `torch.compile`, which takes minutes at the start."""

    document_attention: Annotated[Literal["auto", "dense"], NUMERICS] = "auto"
    """How attention is computed with `data.document_mask` or `data.reset_positions`. `auto` computes each document by
    itself and never allocates the attention between all tokens of a sequence: on NVIDIA GPUs with PyTorch's
    variable-length FlashAttention in bf16 and compiled FlexAttention in fp32, on CPUs document by document. `dense`
    passes a mask of T x T entries for each sequence, as earlier versions did. Attention document by document takes 0.1
    to 0.4 of the time of dense masks with 2,048 tokens a sequence on a CPU, 0.4 to 1.1 with 512, where short documents
    gain most (docs/decisions/2026-11-26-packing.md); GPUs have not been measured. The results differ in rounding
    alone. The run prints the choice, and where it is `dense` for want of another, why."""

    loss_chunk_tokens: Annotated[PositiveInt | None, NUMERICS] = None
    """Compute head and cross-entropy over this many tokens at a time, so that the logits of a whole micro-batch never
    exist at the same time. null: all tokens together."""

    max_skipped_steps: Annotated[PositiveInt, EXECUTION] = 20
    """Stop with an error after this many steps *in a row* were skipped because of non-finite gradients."""

    peak_tflops: Annotated[PositiveFloat | None, EXECUTION] = Field(default=None)
    """Peak of one device at the precision used, in 1e12 FLOP/s, for the MFU. null: from a table of known GPUs; other
    devices report no MFU."""
