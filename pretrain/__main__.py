"""``python -m pretrain``, which is what torchrun starts: ``torchrun ... -m pretrain train CONFIG``."""

import sys

from pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
