"""What carries out a training step: placement, precision, the backward pass and its reduction over ranks."""
