"""Muon: the polar factor of the momentum."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..fields import takes_options
from ..polar import polar as polar_factor
from .base import Direction, MatrixOptions


@dataclass(frozen=True)
class MuonOptions(MatrixOptions):
    """Muon has no options of its own."""

    direction: ClassVar[str] = "muon"

    def find(self, u: Tensor, row_state: Tensor | None) -> Direction:
        """`muon`."""
        return Direction.uncounted(orthogonal(u, self))


@takes_options(MuonOptions)
def muon(u: Tensor, options: MuonOptions) -> Tensor:
    """polar(u) of a stack [..., m, n], in fp32: the direction of Muon."""
    return orthogonal(u, options)


def orthogonal(u: Tensor, options: MatrixOptions, even: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """polar(u) by the backend, in the precision and to the accuracy that any direction's options name."""
    return polar_factor(u, options.polar, dtype=options.polar_dtype, accuracy=options.polar_accuracy, even=even)
