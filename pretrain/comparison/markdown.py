"""The document as Markdown. The charts are left out: their figures are in the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pretrain.comparison.document import Cell, Document, Table
from pretrain.text_tables import markdown_row

Escape = Callable[[str], str]
"""Returns text that Markdown shows as it is, on one line and inside a table."""


def markdown(document: Document, escape: Escape) -> str:
    """Return the page.

    Args:
        document: the page.
        escape: applied to every text.
    """
    return "\n".join(_lines(document, escape)).rstrip("\n") + "\n"


def _lines(document: Document, escape: Escape) -> Iterator[str]:
    yield f"# {escape(document.title)}"
    for text in filter(None, (document.question, f"{document.state}.", *document.notes)):
        yield from ("", _paragraph(text, escape))
    for part in document.parts:
        if not part.tables and not part.paragraphs:
            continue  # only charts
        yield from ("", f"## {escape(part.title)}")
        for paragraph in part.paragraphs:
            yield from ("", _paragraph(paragraph, escape))
        for table in part.tables:
            yield from _table(table, escape)
        if part.notes:
            yield ""
            yield from (f"- {escape(note)}" for note in part.notes)
    if document.sources:
        yield from ("", "## Sources", "")
        for number, source in enumerate(document.sources, 1):
            words = ", ".join(filter(None, (source.text, source.url)))
            read = "; ".join(filter(None, (f"read on {source.read}", source.how)))
            yield f"{number}. {escape(f'{words} ({read})')}"


def _paragraph(text: str, escape: Escape) -> str:
    """Escaped text that starts neither a list nor a heading, whose signs `escape` may leave alone."""
    safe = escape(text.strip())
    if safe[:1] in "-+=":
        return f"\\{safe}"
    digits = len(safe) - len(safe.lstrip("0123456789"))
    return f"{safe[:digits]}\\{safe[digits:]}" if digits and safe[digits : digits + 1] in (".", ")") else safe


def _table(table: Table, escape: Escape) -> Iterator[str]:
    yield ""
    if table.title:
        yield from (f"**{escape(table.title)}**", "")
    yield markdown_row(escape(head) for head in table.heads)
    yield markdown_row("---:" if column in table.numeric else "---" for column in range(len(table.heads)))
    yield from (markdown_row(_cell(cell, escape) for cell in row) for row in table.rows)


def _cell(cell: Cell, escape: Escape) -> str:
    cited = "".join(f" [{number}]" for number in cell.sources)
    small = f" ({cell.small})" if cell.small else ""
    return escape(f"{cell.text}{cited}{small}")
