"""A plain table for the terminal, which knows that an emoji is two cells wide."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence


def cells(text: str) -> int:
    """Width of `text` in the terminal's cells."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def shortened(text: str, width: int) -> str:
    """`text` on one line of at most `width` cells."""
    text = " ".join(text.split())
    if cells(text) <= width:
        return text
    while cells(text) > width - 1:
        text = text[:-1]
    return text + "…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[str] = frozenset()) -> list[str]:
    """The lines of a table; a row of one cell is a heading over the rows after it. `right`: columns of numbers."""
    full = [row for row in rows if len(row) == len(head)]
    widths = [max(cells(row[i]) for row in [head, *full]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = []
        for title, text, width in zip(head, row, widths, strict=True):
            padding = " " * (width - cells(text))
            padded.append(padding + text if title in right else text + padding)
        return "  ".join(padded).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(head), rule]
    for row in rows:
        lines += [line(row)] if len(row) == len(head) else ["", *row]
    return lines


def paragraph(text: str, width: int = 100, indent: str = "    ") -> str:
    """Text wrapped and indented."""
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
