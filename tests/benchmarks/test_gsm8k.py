"""benchmarks/gsm8k.py on a few made-up problems, against the service over workers that know some of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorafleet.cluster.errors import Overloaded
from lorafleet.workers.request import EngineRequest, GenerateDelta
from tests.cluster.fakes import VERSIONS, make_prompts
from tests.cluster.serving import BASE_ID, Service, serving

DATA = Path(__file__).with_name("problems.jsonl")
SAID = {
    "A shop sells": " 250 * 6 = 1,500 pens.\n#### 1,500",
    "It was 4": " That is -5.0 degrees, or so.",
    "A book costs": " 7 + 2 = 9 dollars.\n#### 10\nThat makes 9.",
    "Leo runs": " Far.",
    "There are 30": " 30 - 11 = 19 seats.\n#### $19.",
    "Mia reads": " 15 pages * 4 = 60\n",
}
"""Right, right without the mark, wrong, invalid, right, right."""


class Pupils:
    """Workers that say what `SAID` has, once the text of the prompt has been checked."""

    def __init__(self, service: Service) -> None:
        self._prompts = service.prompts
        self.asked: list[str] = []
        self.requests: list[EngineRequest] = []
        self.num_busy = 0
        """How many calls are refused before one is answered."""

    def generate(self, request: EngineRequest, excluded: frozenset[str], *, only_resident: bool = False) -> Pupil:
        tokenizer = self._prompts.tokenizer
        assert tokenizer is not None
        prompt = tokenizer.decode(list(request.prompt_token_ids))
        self.asked.append(prompt)
        self.requests.append(request)
        question = prompt.rpartition("Question: ")[2]
        text = next(said for start, said in SAID.items() if question.startswith(start))
        self.num_busy -= 1
        return Pupil(request, text, tuple(tokenizer(text)["input_ids"]), self.num_busy >= 0)


class Pupil:
    """Says it all at once."""

    worker_id: str | None = "w0"

    def __init__(self, request: EngineRequest, text: str, token_ids: tuple[int, ...], is_busy: bool) -> None:
        self._answer = (request, text, token_ids, is_busy)

    async def next(self) -> GenerateDelta:
        request, text, token_ids, is_busy = self._answer
        if is_busy:
            raise Overloaded("too many", None, 0.01)
        return GenerateDelta(
            index=0,
            token_ids=token_ids,
            text=text,
            logprobs=None,
            finish_reason="stop",
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=0,
            worker_id="w0",
            version=request.version,
        )

    def cancel(self) -> None:
        pass


@pytest.fixture(scope="module")
def gsm8k(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("gsm8k")


@pytest.fixture
def school() -> Iterator[Service]:
    service = Service(prompts=make_prompts(max_model_len=8192))
    service.workers = Pupils(service)
    with serving(service):
        yield service


def run(gsm8k: ModuleType, school: Service, out: Path, *options: str) -> dict[str, Any]:
    assert gsm8k.main(["--url", school.url, "--data", str(DATA), "--out", str(out), *options]) == 0
    line: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return line


def test_a_run(gsm8k: ModuleType, school: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = run(gsm8k, school, tmp_path / "out.jsonl", "--model", "shout", "--parallel", "3")
    assert (line["accuracy"], line["invalid"]) == (round(4 / 6, 4), round(1 / 6, 4))
    assert (line["questions"], line["shots"], line["model"]) == (6, 5, "shout")
    assert (line["base"], line["version"]) == (BASE_ID, VERSIONS["shout"])
    tokenizer = school.prompts.tokenizer
    assert tokenizer is not None
    assert line["output_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in SAID.values())
    assert line["output_tokens_per_s"] == pytest.approx(line["output_tokens"] / line["latency_s"], rel=0.05)
    assert {"commit", "python", "httpx"} <= line.keys()
    printed = capsys.readouterr()
    assert "6/6 answered: accuracy 0.667, invalid 0.167" in printed.err
    assert "accuracy" in printed.out
    # Nobody is shown the answer to what is asked.
    problems = gsm8k.read_problems(DATA)
    examples = "".join(f"Question: {each.question}\nAnswer: {each.answer}\n\n" for each in problems[:5])
    assert sorted(school.workers.asked) == sorted(
        f"{examples}Question: {each.question}\nAnswer:" for each in problems[5:]
    )
    sampling = school.workers.requests[0].sampling
    assert (sampling.temperature, sampling.stop, sampling.max_tokens) == (0.0, ("Question:",), 512)


def test_fewer_questions_and_shots_and_a_busy_server(gsm8k: ModuleType, school: Service, tmp_path: Path) -> None:
    school.workers.num_busy = 1
    options = ("--model", BASE_ID, "--num-shots", "7", "--num-questions", "2", "--parallel", "1")
    line = run(gsm8k, school, tmp_path / "out.jsonl", *options)
    assert (line["questions"], line["shots"], line["accuracy"], line["invalid"]) == (2, 7, 0.0, 0.5)
    assert line["base"] == BASE_ID


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--model", "nobody"), "model_not_found"),
        (("--model", BASE_ID, "--num-shots", "11"), "none is left"),
        (("--model", BASE_ID, "--max-tokens", "9000"), "context_length_exceeded"),
        (("--model", BASE_ID, "--data", __file__), "line 1"),
    ],
)
def test_what_is_wrong_is_said(
    gsm8k: ModuleType,
    school: Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    reason: str,
) -> None:
    out = tmp_path / "out.jsonl"
    assert gsm8k.main(["--url", school.url, "--data", str(DATA), "--out", str(out), *options]) == 1
    assert reason in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4 + 3 = 7\n#### 7", "7"),
        ("#### 1,234.50 dollars", "1234.5"),
        ("so 12 then #### -3", "-3"),
        ("The answer is $18.", "18"),
        ("first 3, then 4,", "4"),
        ("it is 7\n#### unknown", "7"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_numbers(gsm8k: ModuleType, text: str, number: str | None) -> None:
    assert gsm8k.number_in(text) == (None if number is None else Decimal(number))
