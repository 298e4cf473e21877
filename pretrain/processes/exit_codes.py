"""The exit codes of the `aurora` command."""

DONE = 0
FAILED = 1
BAD_INPUT = 2  # one message per problem, nothing trained or overwritten
UNAVAILABLE = 69  # something outside, such as a data server, did not answer for too long: a scheduler may requeue
STOPPED = 75  # on request, with a checkpoint saved: a scheduler may requeue
INTERRUPTED = 130  # by Ctrl-C, where there was nothing to save
