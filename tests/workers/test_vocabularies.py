"""Adapters with tokens added to the base's, or taken away: transformers' resized model with PEFT's adapter on it."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import InvalidTokenId
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.worker import Worker
from tests.support.adapters import make_adapter
from tests.support.bases import VOCAB_SIZE, BaseKind
from tests.support.fields import make_resized
from tests.workers.harness import Answer, Shelf, greedy, open_worker, random_prompt

NUM_NEW = 10
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "copies": (2, {}),
    "one": (1, {}),
    "both": (5, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head": (3, {"modules_to_save": ["lm_head", "norm"]}),
    "dora": (2, {"use_dora": True}),
    "tokens": (2, {"trainable_token_indices": [VOCAB_SIZE + 1, 7, VOCAB_SIZE]}),
    "some-tokens": (3, {"trainable_token_indices": [VOCAB_SIZE + 1]}),
    "fewer": (-4, {}),
    "fewer-both": (-7, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}
"""Tokens more or less, and options of LoraConfig."""


@dataclass
class Bench:
    shelf: Shelf
    versions: dict[str, str | None]
    sizes: dict[str, int]

    def manifest(self, name: str) -> AdapterManifest:
        version = self.versions[name]
        assert version is not None
        return self.shelf.weights[version].manifest

    @torch.no_grad()
    def expected(self, name: str, tokens: tuple[int, ...]) -> Tensor:
        """(len(tokens), vocabulary) logprobs."""
        model = AutoModelForCausalLM.from_pretrained(self.shelf.base, dtype=torch.float32)
        version = self.versions[name]
        if version is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.sizes[name] != VOCAB_SIZE:
                    model.resize_token_embeddings(self.sizes[name], mean_resizing=False)
                model = PeftModel.from_pretrained(model, self.shelf.folders[version])
        logits: Tensor = model.eval()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.log_softmax(-1)

    def check(self, name: str, prompt: tuple[int, ...], answer: Answer, tolerance: float = 1e-4) -> None:
        tokens = (*prompt, *answer.tokens)
        expected = self.expected(name, tokens)
        assert expected.shape[1] == self.sizes[name]
        chosen = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        given = answer.deltas[0].prompt_logprobs
        assert given is not None
        found = torch.tensor([entry.logprob for entry in (*given[1:], *answer.logprobs)])
        assert (found - chosen).abs().max() < tolerance, name
        assert (expected[:-1].max(-1).values - chosen)[len(prompt) - 1 :].max() <= tolerance, name
        for place, entry in enumerate(answer.logprobs):
            best = expected[len(prompt) - 1 + place].topk(5)
            assert torch.allclose(best.values, torch.tensor([logprob for _, logprob in entry.top]), atol=tolerance)

    async def ask(self, worker: Worker, name: str, prompt: tuple[int, ...], sampling: SamplingParams) -> Answer:
        size = None if self.sizes[name] == VOCAB_SIZE else self.sizes[name]
        request = EngineRequest(f"{name} {prompt} {sampling}", self.versions[name], prompt, sampling, vocabulary=size)
        answer = Answer()
        async for delta in worker.generate(request):
            answer.add(delta)
        return answer

    def prompt(self, name: str, seed: int) -> tuple[int, ...]:
        """With all tokens that are added, the last ones of all others, and some that all know."""
        known = [token for token in random_prompt(40, seed) if token < min(self.sizes.values())][:9]
        last = range(min(VOCAB_SIZE, self.sizes[name]) - 2, self.sizes[name])
        return (*known[:4], *last, *known[4:])


@pytest.fixture(scope="module")
def bench_of(
    base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[BaseKind], Bench]:
    made: dict[BaseKind, Bench] = {}

    def of(kind: BaseKind) -> Bench:
        if kind not in made:
            shelf, folder = Shelf(base_of(kind)), tmp_path_factory.mktemp(f"vocabularies-{kind}")
            bench = made[kind] = Bench(shelf, {"base": None}, {"base": VOCAB_SIZE})
            bench.versions["plain"] = shelf.put(make_adapter(folder / "plain", shelf.base, "rank4_qv"))
            bench.sizes["plain"] = VOCAB_SIZE
            for name, (number, options) in CASES.items():
                made_folder = make_resized(folder / name, shelf.base, number, **options)
                bench.versions[name] = shelf.put(made_folder)
                bench.sizes[name] = VOCAB_SIZE + number
        return made[kind]

    return of


async def ask_all(bench: Bench, tolerance: float = 1e-4, **settings: Any) -> None:
    asked = [(name, bench.prompt(name, seed)) for name in bench.versions for seed in (1, 2)]
    sampling = greedy(NUM_NEW, logprobs=5, prompt_logprobs=True)
    async with open_worker(bench.shelf, **settings) as worker:
        answers = await asyncio.gather(*(bench.ask(worker, *one, sampling) for one in asked))
    for (name, prompt), answer in zip(asked, answers, strict=True):
        bench.check(name, prompt, answer, tolerance)


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 16, "logits_chunk_tokens": 4}],
    ids=["at-once", "in-chunks"],
)
@pytest.mark.slow
async def test_a_mixed_batch(bench_of: Callable[[BaseKind], Bench], kind: BaseKind, settings: dict[str, Any]) -> None:
    await ask_all(bench_of(kind), **settings)


@pytest.mark.gpu
async def test_a_mixed_batch_on_a_gpu(bench_of: Callable[[BaseKind], Bench]) -> None:
    bench = bench_of("llama")
    model = ModelConfig(id="base", source=str(bench.shelf.base), dtype="float32")
    await ask_all(bench, 0.1, model=model, device="cuda")


async def test_added_tokens_are_sampled_biased_and_penalised(bench_of: Callable[[BaseKind], Bench]) -> None:
    """Added tokens come, and are counted; beside them a request of the base has its own logits."""
    bench = bench_of("llama")
    added = VOCAB_SIZE + 4
    prompt = bench.prompt("both", 3)
    wanted = greedy(6, logit_bias={added: 90.0}, logprobs=0)
    never_twice = greedy(6, logit_bias={added: 90.0}, frequency_penalty=2.0, presence_penalty=2.0, logprobs=0)
    plain = greedy(6, frequency_penalty=1.0, repetition_penalty=1.3, logprobs=0)
    async with open_worker(bench.shelf) as worker:
        (alone,) = [await bench.ask(worker, "base", random_prompt(9, 1), plain)]
        answers = await asyncio.gather(
            bench.ask(worker, "both", prompt, wanted),
            bench.ask(worker, "both", prompt, never_twice),
            bench.ask(worker, "base", random_prompt(9, 1), plain.model_copy(update={"seed": 1})),
        )
    assert answers[0].tokens == (added,) * 6
    assert answers[1].tokens[0] == added
    assert answers[2].tokens == alone.tokens
    found = torch.tensor([entry.logprob for entry in answers[0].logprobs])
    expected = bench.expected("both", (*prompt, *answers[0].tokens))[len(prompt) - 1 : -1, added]
    assert (found - expected).abs().max() < 1e-4


async def test_nobody_else_may_use_them(bench_of: Callable[[BaseKind], Bench]) -> None:
    bench = bench_of("llama")
    async with open_worker(bench.shelf) as worker:
        for name in ("base", "plain", "copies", "fewer"):
            wrong = (3, bench.sizes[name])
            with pytest.raises(InvalidTokenId):
                await bench.ask(worker, name, wrong, greedy(2))


def test_only_what_is_new_is_kept(bench_of: Callable[[BaseKind], Bench]) -> None:
    bench = bench_of("llama")
    for name, (number, _) in CASES.items():
        manifest = bench.manifest(name)
        assert manifest.vocabulary == VOCAB_SIZE + number
        rows = {extra.name: extra.num_rows for extra in manifest.extras if extra.kind == "appended"}
        modules = ("lm_head", "model.embed_tokens") if number > 0 else ()
        assert rows == {f"{module}.weight.appended": number for module in modules}
        replaced = {extra.name for extra in manifest.extras if extra.kind == "replaced" and extra.num_rows > 1}
        assert ("lm_head.weight" in replaced) == (name in ("both", "head", "fewer-both"))
        assert ("model.embed_tokens.weight" in replaced) == (name in ("both", "fewer-both"))


def test_what_contradicts_itself_or_the_base_is_refused(bench_of: Callable[[BaseKind], Bench], tmp_path: Path) -> None:
    bench = bench_of("llama")
    folder = make_resized(tmp_path / "a", bench.shelf.base, 2)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    head, embedding = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    reader = bench.shelf._reader
    changed = tensors[head].clone()
    changed[7] += 1
    wrong: list[tuple[dict[str, Tensor | None], str]] = [
        ({head: None}, "vocabulary_resized"),
        ({head: tensors[head][:-1].clone()}, "vocabulary_resized"),
        ({head: changed}, "base_weights_changed"),
        ({head: torch.zeros(VOCAB_SIZE + 5000, 64)}, "vocabulary_resized"),
        ({embedding: torch.zeros(0, 64)}, "vocabulary_resized"),
        ({embedding: tensors[embedding].fill_(np.nan)}, "base_weights_changed"),
    ]
    for change, code in wrong:
        changed_tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed_tensors, path)
        with pytest.raises(AdapterRefused) as caught:
            reader.read(folder)
        assert caught.value.code == code, change.keys()
    save_file(tensors, path)
    with pytest.raises(AdapterRefused) as caught:
        AdapterReader(reader.geometry, 64).read(folder)
    assert caught.value.code == "base_weights_unverified"
