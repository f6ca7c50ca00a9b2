"""Pages, docstrings and comments have short sentences, and a docstring begins with its subject or its verb."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FLOORS = ("adapter_store", "benchmarks", "cluster", "deploy", "docs", "examples", "kernels", "workers")
MAX_MEAN_WORDS = 16
MAX_WORDS = 35

NOT_PROSE = re.compile(
    r"^```.*?^```$|<!-- generated: .*?<!-- end -->|<!--.*?-->|^#+ .*?$|^!\[.*?$", re.DOTALL | re.MULTILINE
)
LIST_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ", re.MULTILINE)
LABEL = re.compile(r"^\*\*[^*]+\.\*\*")
QUESTION = re.compile(r"(What|Whether|Which|Who|Whose|Whom|Where|When|Why|How)\b")
CODE_OR_TREE = re.compile(r"^ {4}.*$|[├└]", re.MULTILINE)
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


def modules_of(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def field_texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string that stands below an assignment and documents it."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for before, each in pairwise(body) if isinstance(body, list) else ():
            match before, each:
                case ast.Assign() | ast.AnnAssign(), ast.Expr(ast.Constant(str(text))):
                    yield each.lineno, inspect.cleandoc(text)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment. Comments on lines that follow one another are one text; linters' are left out."""
    first, last, parts = 0, -1, [""]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("#").strip()
        if re.match(r"(noqa|type|ruff|fmt|mypy)\b", text):
            continue
        stands_alone = not token.line[: token.start[1]].strip()
        if line == last + 1 and stands_alone:
            parts.append(text)
        else:
            yield first, " ".join(parts)
            first, parts = line, [text]
        last = line if stands_alone else -1
    yield first, " ".join(parts)


def code_sentences(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and words of each sentence in a module's docstrings, fields' texts and comments; code and trees apart."""
    source = path.read_text()
    for line, text in (*docstrings(source), *field_texts(source), *comments(source)):
        for block in re.split(r"\n\s*\n", text):
            if not CODE_OR_TREE.search(block):
                yield from ((line, words) for paragraph in paragraphs(block) for words in sentences(paragraph))


@pytest.mark.parametrize("floor", FLOORS)
def test_a_docstring_says_what_a_thing_is_or_does(floor: str) -> None:
    found = [
        f"{page_name(path)}:{line}: {text.splitlines()[0]}"
        for path in modules_of(floor)
        for line, text in docstrings(path.read_text())
        if QUESTION.match(text)
    ]
    assert not found, "begin these docstrings with the thing or with a verb:\n" + "\n".join(found)


@pytest.mark.parametrize("floor", FLOORS)
def test_sentences_in_code_are_short(floor: str) -> None:
    found = [(path, line, words) for path in modules_of(floor) for line, words in code_sentences(path)]
    too_long = [f"{page_name(path)}:{line}: {' '.join(words)}" for path, line, words in found if len(words) > MAX_WORDS]
    assert not too_long, f"split these sentences, which have more than {MAX_WORDS} words:\n" + "\n".join(too_long)
    mean = sum(len(words) for _, _, words in found) / len(found)
    assert mean <= MAX_MEAN_WORDS, f"the mean sentence has {mean:.1f} words; {MAX_MEAN_WORDS} are allowed"


def test_texts_of_code_are_found_where_they_stand() -> None:
    source = (
        '"""A module."""\n\nBOUND = 2\n"""A field."""\n\n\n'
        'def f():  # beside\n    """A function.\n\n        a drawing\n    """\n'
        '    # one\n    # two\n    return "# no comment"  # noqa: E501\n'
    )
    assert [text.splitlines()[0] for _, text in docstrings(source)] == ["A module.", "A function."]
    assert list(field_texts(source)) == [(4, "A field.")]
    assert [each for each in comments(source) if each[1]] == [(7, "beside"), (12, "one two")]
