"""The document as one self-contained HTML page: no library, no request, every text escaped."""

from __future__ import annotations

from pathlib import Path

import jinja2

import pretrain.report
from pretrain.comparison.charts import draw
from pretrain.comparison.document import NOT_RUN, Document

_FOLDER = Path(__file__).parent


def html(document: Document) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The report's style, and what only this page needs.
    styles = (Path(pretrain.report.__file__).parent / "page.css", _FOLDER / "page.css")
    return environment.get_template("page.html.j2").render(
        document=document,
        style="".join(file.read_text(encoding="utf-8") for file in styles),
        script=(_FOLDER / "page.js").read_text(encoding="utf-8"),
        draw=draw,
        NOT_RUN=NOT_RUN,
    )
