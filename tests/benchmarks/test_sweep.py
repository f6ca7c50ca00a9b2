"""`make sweep`: what it says of a base that is right, refused, wrong or never answers; and the page that it writes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

Script = Callable[[str], ModuleType]


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.mark.slow
def test_bases_that_are_served_and_one_that_is_refused(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window, a mixture of experts, learned positions; a state that is kept elsewhere than on pages."""
    out = tmp_path / "rows.jsonl"
    command = ["--only", "gemma3_text,mixtral,gpt2,mamba", "--processes", "2", "--rows", str(out)]
    assert script("sweep").main(command) == 0
    rows = rows_of(out)
    assert "3 of 4 served, 0 wrong" in capsys.readouterr().out
    for name in ("Gemma3ForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"):
        assert rows[name]["status"] == "served"
        assert rows[name]["targets"]["attention"] == rows[name]["targets"]["embedding"] == "yes"
        assert 0 < rows[name]["difference"] < 1e-4
    assert rows["MambaForCausalLM"]["status"] == "refused"
    # What was tried is not tried again.
    assert script("sweep").main(command) == 0
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_wrong_base_fails_and_so_does_one_that_never_answers(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = script("sweep")
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sweep, "BAR", 1e-9)
    monkeypatch.setattr(sweep, "EXCUSED", 1e-9)
    assert sweep.main(["--only", "qwen3", "--rows", str(out), "--processes", "1"]) == 1
    assert {row["status"] for row in rows_of(out).values()} == {"wrong"}
    assert "a logprob is " in capsys.readouterr().out

    monkeypatch.setattr(sweep, "try_base", lambda case: time.sleep(60))
    rows = list(sweep.sweep([sweep.Case("one", "one"), sweep.Case("two", "two")], 2, 0.2))
    assert {(row.name, row.status) for row in rows} == {("one", "wrong"), ("two", "wrong")}
    assert "took more than 0.2 s" in rows[0].reason


def test_the_page_shows_each_row(script: Script) -> None:
    sweep = script("sweep")
    yes = dict.fromkeys(sweep.TARGETS, "yes")
    text = sweep.page(
        [
            sweep.Row("B", "b", "refused", "it is | odd"),
            sweep.Row("A", "a", "served", targets={**yes, "head": "too large"}, layers="fused"),
        ]
    )
    assert "1 are served, 1 are refused, 0 are wrong" in text
    assert "| A | `a` | fused | yes | yes | yes | no |" in text
    assert "| A | head | too large |" in text
    assert r"| B | `b` | it is \| odd |" in text


def test_the_readme_claims_what_the_sweep_has_shown() -> None:
    page, readme = (ROOT / "docs" / "bases.md").read_text(), (ROOT / "README.md").read_text()
    fused = {row.partition(",")[0] for row in re.findall(r"^\| ([^|]+) \|[^|]+\| fused \|", page, re.MULTILINE)}
    (named,) = re.findall(r"^\| ([\w, ]+) \(dense\) \|.*fused", readme, re.MULTILINE)
    # The page lists more.
    assert {f"{name}ForCausalLM" for name in named.split(", ")} <= fused
    served, refused = re.findall(r"(\d+) are served, (\d+) are refused, 0 are wrong", page)[0]
    assert f"| {served} of {int(served) + int(refused)} model classes" in readme
