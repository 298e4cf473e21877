"""Write the comparison page.

read_facts() -> Facts, Measured -> contents() -> Document -> html()     -> comparison.html
                                                          -> markdown() -> comparison.md
"""

from __future__ import annotations

from pathlib import Path

from pretrain.comparison.contents import contents
from pretrain.comparison.errors import ComparisonError
from pretrain.comparison.facts import Facts
from pretrain.comparison.html import html
from pretrain.comparison.markdown import Escape, markdown
from pretrain.comparison.measured import Measured
from pretrain.files import replace_text

HTML_FILE = "comparison.html"
MARKDOWN_FILE = "comparison.md"


def write_comparison(facts: Facts, measured: Measured, out_dir: Path, escape: Escape) -> list[Path]:
    """Write both pages into a folder, replacing earlier ones; the same input gives the same bytes.

    Args:
        facts: the published figures.
        measured: our own results.
        out_dir: the folder; it is created.
        escape: returns text that Markdown shows as it is.

    Returns:
        The files.

    Raises:
        ComparisonError: the folder is not writable.
    """
    document = contents(facts, measured)
    pages = {out_dir / HTML_FILE: html(document), out_dir / MARKDOWN_FILE: markdown(document, escape)}
    for target, text in pages.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_text(target, text)
        except OSError as error:
            raise ComparisonError(f"cannot write the page to {target}: {error}") from error
    return list(pages)
