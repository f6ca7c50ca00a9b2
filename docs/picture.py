"""Draws the demo's output as a picture: `make -s demo | .venv/bin/python docs/picture.py > docs/demo.svg`."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from xml.sax.saxutils import escape

CELL_WIDTH, LINE_HEIGHT, MARGIN, BAR = 7.82, 18, 16, 28
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }
.text { fill: #c9d1d9 } .good { fill: #56d364 } .bad { fill: #ff7b72 } .faint { fill: #6e7681 }
.command { fill: #79c0ff }
"""


def cells(char: str) -> int:
    """Width of a character in the terminal's cells."""
    return 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1


def runs(line: str) -> Iterator[tuple[int, int, str]]:
    """Column, width in cells and text of pieces that any font keeps in line: no wide character and no gap inside."""
    column = 0
    for piece in re.findall(r" +|[^ ]+(?: [^ ]+)*", line):
        words = "".join(f"\0{char}\0" if cells(char) == 2 else char for char in piece).split("\0")
        for word in words:
            width = sum(map(cells, word))
            if word.strip():
                lead = len(word) - len(word.lstrip())
                yield column + lead, width - lead - len(word) + len(word.rstrip()), word.strip()
            column += width


def kind_of(line: str) -> str:
    """The line's class in `STYLE`."""
    for lead, kind in (("$", "command"), ("✓", "good"), ("✗", "bad"), ("─", "faint")):
        if line.startswith(lead):
            return kind
    return "text"


def picture(lines: list[str]) -> str:
    """The lines as SVG."""
    width = MARGIN * 2 + CELL_WIDTH * max(sum(map(cells, line)) for line in lines)
    height = BAR + MARGIN + LINE_HEIGHT * len(lines)
    texts = []
    for number, line in enumerate(lines):
        y = BAR + LINE_HEIGHT * (number + 1)
        for column, num_cells, piece in runs(line):
            x, length = MARGIN + CELL_WIDTH * column, CELL_WIDTH * num_cells
            texts.append(
                f'<text class="{kind_of(line)}" x="{x:.1f}" y="{y}" textLength="{length:.1f}">{escape(piece)}</text>'
            )
    dots = "".join(
        f'<circle cx="{MARGIN + 16 * i}" cy="16" r="5" fill="{fill}"/>'
        for i, fill in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" width="{width:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" rx="8" fill="#0d1117"/>{dots}\n'
        + "\n".join(texts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    said = sys.stdin.read().rstrip().splitlines()
    # A terminal shows progress on one line that the next takes the place of.
    sys.stdout.write(picture(["$ make demo", *(line for line in said if not line.startswith("  starting"))]))
