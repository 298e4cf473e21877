"""What a run amounts to before it is started: memory, traffic, time."""
