"""The training loop, its hooks, the learning-rate schedule and the timing of steps."""
