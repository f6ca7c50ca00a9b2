"""The pages are written in short sentences: a bound on each page's mean sentence and on every sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAX_MEAN_WORDS = 16
MAX_WORDS = 35

NOT_PROSE = re.compile(
    r"^```.*?^```$|<!-- generated: .*?<!-- end -->|<!--.*?-->|^#+ .*?$|^!\[.*?$", re.DOTALL | re.MULTILINE
)
LIST_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ", re.MULTILINE)
LABEL = re.compile(r"^\*\*[^*]+\.\*\*")
SENTENCE_END = re.compile(r"(?<=[.!?])[*)\"]*\s+(?=[^a-z])")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items of a page. Code, headings, images and generated tables are left out."""
    for block in re.split(r"\n\s*\n", NOT_PROSE.sub("\n\n", text)):
        if not block.lstrip().startswith("|"):
            yield from filter(None, (" ".join(item.split()) for item in LIST_ITEM.split(block)))


def table_cells(text: str) -> Iterator[str]:
    for line in NOT_PROSE.sub("", text).splitlines():
        if line.startswith("|"):
            yield from filter(None, (cell.strip() for cell in line.strip("|").split("|")))


def sentences(paragraph: str) -> list[list[str]]:
    """The words of each sentence. A link counts as its text, and a paragraph's bold label does not count."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", LABEL.sub("", paragraph))
    return [words for part in SENTENCE_END.split(shown) if (words := re.findall(r"\S*\w\S*", part))]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_sentence_is_long(page: Path) -> None:
    text = page.read_text()
    found = [words for part in (*paragraphs(text), *table_cells(text)) for words in sentences(part)]
    too_long = [" ".join(words) for words in found if len(words) > MAX_WORDS]
    assert not too_long, f"split these sentences, which have more than {MAX_WORDS} words: {too_long}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_mean_sentence_is_short(page: Path) -> None:
    lengths = [len(words) for part in paragraphs(page.read_text()) for words in sentences(part)]
    mean = sum(lengths) / len(lengths)
    assert mean <= MAX_MEAN_WORDS, f"the mean sentence has {mean:.1f} words; {MAX_MEAN_WORDS} are allowed"


def test_sentences_are_counted_as_a_reader_counts() -> None:
    page = (
        "# A heading. \n\n**Label.** One two. Three `x.y` four!\n\n"
        "- Five\n  six.\n- [Seven eight](a.md) nine.\n\n```\nnot this\n```\n"
    )
    counted = [len(words) for part in paragraphs(page) for words in sentences(part)]
    assert counted == [2, 3, 2, 3]
    assert list(table_cells("| a b | c |\n| --- | --- |\n")) == ["a b", "c", "---", "---"]
