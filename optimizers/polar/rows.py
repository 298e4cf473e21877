"""Sums over the rows of matrices, which may lie on several processes.

Whatever a direction has to know of a whole tall matrix is a sum or a maximum over its rows, or its Gram matrix, which
is a sum over rows too. So a direction of rows that are spread over processes is the same code with these reductions.
"""

import torch
from torch import Tensor


class Rows:
    """Reductions over the second to last dimension, where all rows are here."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all rows, [..., 1, n]."""
        return self.total(x.sum(dim=-2, keepdim=True))

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all rows, [..., 1, n]."""
        return x.amax(dim=-2, keepdim=True)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what every process has found for its rows."""
        return x

    def norm(self, x: Tensor) -> Tensor:
        """The Frobenius norm, [..., 1, 1]."""
        return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


HERE = Rows()
"""All rows on this process."""
