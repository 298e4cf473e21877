"""The training loop, the periodic work around it, the schedule and the clock."""
