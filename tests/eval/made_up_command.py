"""`aurora` with made-up items, for processes of a launcher: ``-m tests.eval.made_up_command ARGUMENTS``.

$MADE_UP_PACKAGE is a file with the pickled package of items. The rank in $FAULTY_RANK fails at its second batch.
"""

from __future__ import annotations

import os
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

from eval.scoring import ContinuationScorer
from pretrain.cli import evaluation_run, main


def fail_at_second_batch() -> None:
    real, batches = ContinuationScorer._score, []

    def score(self: ContinuationScorer, batch: Any) -> Any:
        batches.append(batch)
        if len(batches) == 2:
            raise MemoryError("no room on this rank")
        return real(self, batch)

    ContinuationScorer._score = score  # type: ignore[method-assign]


if __name__ == "__main__":
    package = pickle.loads(Path(os.environ["MADE_UP_PACKAGE"]).read_bytes())
    evaluation_run.evaluation = partial(evaluation_run.evaluation, package=package)  # type: ignore[assignment]
    if os.environ.get("FAULTY_RANK") == os.environ["RANK"]:
        fail_at_second_batch()
    sys.exit(main())
