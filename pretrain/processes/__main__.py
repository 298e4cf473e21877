"""``python -m pretrain.processes``: torchrun with our exit codes, for one node of several."""

import sys

from pretrain.processes.output import drop_what_cannot_be_written, open_closed_streams
from pretrain.processes.torchrun import torchrun

if __name__ == "__main__":
    open_closed_streams()
    code = torchrun(sys.argv[1:])
    drop_what_cannot_be_written()
    sys.exit(code)
