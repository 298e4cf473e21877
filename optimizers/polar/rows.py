"""Reductions over the rows of matrices, which may lie on several processes.

All that a direction has to know about a whole tall matrix is a sum or a maximum over its rows, or its Gram matrix,
which is also a sum over rows. So the same code serves rows that are spread over processes, with other reductions.
"""

import torch
from torch import Tensor


class Rows:
    """Reductions over the second to last dimension, if all rows are on this process."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all rows, [..., 1, n]."""
        return self.total(x.sum(dim=-2, keepdim=True))

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all rows, [..., 1, n]."""
        return x.amax(dim=-2, keepdim=True)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what the processes found for their rows."""
        return x

    def norm(self, x: Tensor) -> Tensor:
        """The Frobenius norm, [..., 1, 1]."""
        return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


HERE = Rows()
"""All rows on this process."""
