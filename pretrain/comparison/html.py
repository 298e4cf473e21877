"""The document as one self-contained HTML page: no library, no request, every text escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2

import pretrain.report
from pretrain.comparison.charts import draw
from pretrain.comparison.document import NOT_RUN, Document

_FOLDER = Path(__file__).parent
_REPORT = Path(pretrain.report.__file__).parent


def html(document: Document) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The report's style and script, and what only this page needs.
    styles = (_REPORT / "page.css", _FOLDER / "page.css")
    script = (_REPORT / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        document=document,
        style="".join(file.read_text(encoding="utf-8") for file in styles),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        draw=draw,
        NOT_RUN=NOT_RUN,
    )
