"""Watching a run: who makes progress, who hangs, who is slow, and who is told.

progress    which phase this rank is in
heartbeat   the file in which each rank says so
verdict     which rank hangs, judged from all heartbeats
watchdog    writes the heartbeat, and ends this rank when the run hangs
stacks      where the threads of this process are
stragglers  ranks that are slower than the others, by the times of forward_clock
alerts      a webhook
profiling   torch's profiler for chosen steps
"""
