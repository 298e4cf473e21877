"""``python -m pretrain.processes``: torchrun with our exit codes, for one node of several."""

import sys

from pretrain.processes.torchrun import torchrun

if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
