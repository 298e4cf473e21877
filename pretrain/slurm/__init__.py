"""Jobs under Slurm: what happens around the training that a batch script starts.

controller  what Slurm knows of a job, and requests to it, through `scontrol`
attempts    the starts of a job, and whether it may be requeued
supervisor  the batch step: checks the nodes, starts the work, passes on signals, requeues
health      what is tested on every node before the start, and which nodes are bad
submission  the command with which `aurora slurm` submits a config
"""
