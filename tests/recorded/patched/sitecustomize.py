"""Makes every Python process that has this folder in PYTHONPATH compute as before; see `tests.recorded.before`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.recorded.before import apply

_CHANGES = apply()  # kept: the changes are undone when it is deleted
_CHANGES.__enter__()
