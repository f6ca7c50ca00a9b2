"""Adapters that replace norms, embeddings and heads, and add biases: against a model whose parameters are changed."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights, Array, BaseGeometry, ExtraManifest
from lorafleet.workers.config import ModelConfig, PoolConfig
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.step.forms import GraphForm
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind, make_base
from tests.support.oracle import load_with_peft
from tests.workers.harness import Answer, Shelf, ask, greedy, open_worker, random_prompt
from tests.workers.test_replayed_steps import BY_PROMPT, BY_ROW, replay

LENGTH = 12

Params = dict[str, Array]
Case = tuple[str | None, str | None, Params]
"""(version, its recipe of low-rank factors, its extras)."""


class Cases:
    """The base, plain adapters, and adapters with extras of every kind, for one base."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.shelf = Shelf(base)
        self.geometry: BaseGeometry = read_geometry(ModelConfig(id="base", source=str(base)), "cpu")
        self.folders: dict[str, Path] = {}
        is_gpt2 = "transformer.wte" in self.geometry.modules
        recipes = ("rank16", "rank4") if is_gpt2 else ("rank16", "embeddings_all", "rank4_qv")
        for recipe in recipes:
            self.folders[recipe] = make_adapter(folder / recipe, base, recipe)
        full, *_, light = recipes
        embedding = next(name for name, shape in self.geometry.modules.items() if shape.kind == "embedding")
        matrices, norms = (f"{embedding}.weight", "lm_head.weight"), tuple(self.geometry.vectors)
        linear = [name for name, shape in self.geometry.modules.items() if shape.kind == "linear"]
        sets: list[tuple[str | None, tuple[str, ...]]] = [
            (light, norms),
            (light, norms[-1:]),
            (full, matrices[:1]),
            (light, matrices[1:]),
            (recipes[1], matrices),
            (light, tuple(linear)),
            (full, (*matrices, *norms, *linear[1::2])),
            (None, (*norms[:1], linear[0])),
        ]
        self.all: list[Case] = [(None, None, {})]
        self.all += [(self.shelf.put(self.folders[recipe]), recipe, {}) for recipe in recipes]
        self.all += [self._put(number, recipe, names) for number, (recipe, names) in enumerate(sets)]

    def _put(self, number: int, recipe: str | None, names: Sequence[str]) -> Case:
        rng = np.random.default_rng(number)
        extras, arrays = [], {}
        for name in sorted(names):
            extras.append(self._extra(name))
            rows, width = extras[-1].num_rows, extras[-1].width
            size = 2.0 * width**-0.5 if rows > 1 else 0.4
            centre = 1.0 if name.endswith("weight") and rows == 1 else 0.0
            arrays[name] = (centre + size * rng.standard_normal((rows, width))).astype(np.float32)
        plain = self.shelf.weights[self.shelf.version_of(recipe)] if recipe else _nothing()
        num_bytes = plain.manifest.num_bytes + sum(array.nbytes for array in arrays.values())
        manifest = replace(plain.manifest, version=f"own{number}", extras=tuple(extras), num_bytes=num_bytes)
        self.shelf.weights[manifest.version] = AdapterWeights.of(manifest, plain.dtype, plain.tensors, arrays)
        return manifest.version, recipe, arrays

    def _extra(self, name: str) -> ExtraManifest:
        if name in self.geometry.modules:
            return ExtraManifest(name, "added", 1, self.geometry.modules[name].out_dim)
        if name in self.geometry.vectors:
            return ExtraManifest(name, "replaced", 1, self.geometry.vectors[name])
        shape = self.geometry.modules[name.removesuffix(".weight")]
        rows, width = (shape.out_dim, shape.in_dim) if shape.kind == "linear" else (shape.in_dim, shape.out_dim)
        return ExtraManifest(name, "replaced", rows, width)

    @torch.no_grad()
    def oracle(self, case: Case) -> nn.Module:
        """Transformers' model with PEFT's adapter on it, and the parameters that the extras replace or add to."""
        _, recipe, extras = case
        model: nn.Module = copy.deepcopy(load_with_peft(self.shelf.base, self.folders[recipe] if recipe else None))
        modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
        for name, array in extras.items():
            values = torch.from_numpy(array)
            path, _, last = name.rpartition(".")
            module = modules[name if name in self.geometry.modules else path]
            module = getattr(module, "base_layer", module)
            if name in self.geometry.modules:
                base = 0.0 if module.bias is None else module.bias
                module.bias = nn.Parameter(base + values[0])
            else:
                # A parameter of its own: what it was tied to stays.
                setattr(module, last, nn.Parameter(values[0] if len(values) == 1 else values))
        return model

    def check(self, case: Case, prompt: Sequence[int], answer: Answer, tolerance: float = 1e-4) -> None:
        """Greedy tokens are the oracle's likeliest, and every logprob, the prompt's too, is the oracle's."""
        tokens = torch.tensor([[*prompt, *answer.tokens]])
        with torch.no_grad():
            logprobs: Tensor = self.oracle(case)(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        assert len(answer.tokens) == LENGTH
        expected = logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0]
        assert (logprobs[:-1].max(-1).values - expected)[len(prompt) - 1 :].max() <= tolerance, case[:2]
        given = answer.deltas[0].prompt_logprobs
        assert given is not None
        got = torch.tensor([entry.logprob for entry in [*given[1:], *answer.logprobs]])
        assert (got - expected).abs().max() < tolerance, case[:2]


def _nothing() -> AdapterWeights:
    """An adapter without low-rank factors."""
    return AdapterWeights.of(AdapterManifest("nothing", 0, (), (), 0), "float32", {})


@pytest.fixture(scope="module")
def cases_of(
    base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[BaseKind], Cases]:
    made: dict[BaseKind, Cases] = {}

    def of(kind: BaseKind) -> Cases:
        if kind not in made:
            made[kind] = Cases(base_of(kind), tmp_path_factory.mktemp(f"extras-{kind}"))
        return made[kind]

    return of


async def ask_all(cases: Cases, tolerance: float = 1e-4, **settings: object) -> None:
    """Every case in one mixed batch, twice, and what the oracle says of it."""
    prompts = [random_prompt(3 + 4 * number, number) for number in range(len(cases.all))]
    sampling = greedy(LENGTH, logprobs=0, prompt_logprobs=True)
    asked = [(case, prompt) for number, case in enumerate(cases.all) for prompt in (prompts[number], prompts[-1])]
    async with open_worker(cases.shelf, **settings) as worker:  # type: ignore[arg-type]
        answers = await asyncio.gather(*(ask(worker, prompt, case[0], sampling) for case, prompt in asked))
    for (case, prompt), answer in zip(asked, answers, strict=True):
        cases.check(case, prompt, answer, tolerance)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3", "gpt2"])
@pytest.mark.slow
async def test_a_mixed_batch(kind: BaseKind, cases_of: Callable[[BaseKind], Cases]) -> None:
    await ask_all(cases_of(kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3", "gpt2"])
async def test_a_mixed_batch_on_a_gpu(kind: BaseKind, cases_of: Callable[[BaseKind], Cases]) -> None:
    cases = cases_of(kind)
    model = ModelConfig(id="base", source=str(cases.shelf.base), dtype="float32")
    await ask_all(cases, 0.1, model=model, device="cuda")


@pytest.mark.slow
async def test_in_chunks_beside_decodes(cases_of: Callable[[BaseKind], Cases]) -> None:
    await ask_all(cases_of("llama_tied"), max_batch_tokens=16, logits_chunk_tokens=8)


@pytest.mark.parametrize("forms", [BY_ROW, BY_PROMPT], ids=["by row", "by prompt"])
@pytest.mark.slow
async def test_in_graphs(
    cases_of: Callable[[BaseKind], Cases], monkeypatch: pytest.MonkeyPatch, forms: tuple[GraphForm, ...]
) -> None:
    replayed = replay(monkeypatch, forms)
    await ask_all(cases_of("llama"), max_running=40)
    assert {header.form.has_extras for header in replayed if header.form is not None} >= {True}
    assert all(header.has_extras == header.form.has_extras for header in replayed if header.form is not None)


async def test_norms_of_heads_and_of_other_layers_go_without_a_graph(cases_of: Callable[[BaseKind], Cases]) -> None:
    async with open_worker(cases_of("qwen3").shelf) as worker:
        untabled = worker._parts.pool.untabled
    assert {name.split(".")[-2] for name in untabled} == {"q_norm", "k_norm"}
    async with open_worker(cases_of("gpt2").shelf) as worker:
        assert worker._parts.pool.untabled == cases_of("gpt2").geometry.vectors.keys()


@pytest.mark.slow
async def test_transformers_own_layers(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3", hidden_act="gelu")
    await ask_all(Cases(base, tmp_path))


@pytest.mark.slow
async def test_after_eviction_and_reload(cases_of: Callable[[BaseKind], Cases]) -> None:
    """A pool that holds the largest adapter and little else, so that pages and slots change hands all the time."""
    cases = cases_of("llama")
    async with open_worker(cases.shelf) as worker:
        pool = worker._parts.pool
        largest = max(pool.num_pages(weights.manifest) for weights in cases.shelf.weights.values())
        small = PoolConfig(max_rank=64, pool_bytes=largest * pool.layout.page_bytes)
    prompt = random_prompt(9, 1)
    sampling = greedy(LENGTH, logprobs=0, prompt_logprobs=True)
    async with open_worker(cases.shelf, pool=small, prefix_cache=False) as worker:
        answers = [(case, await ask(worker, prompt, case[0], sampling)) for _ in range(2) for case in cases.all]
        residency = await worker.residency()
        assert residency.reloads_after_eviction >= len(cases.all) - 2
        assert residency.pages_used == sum(use.pages for use in residency.adapters)
        pool = worker._parts.pool
        await worker.reconcile({})
        assert (pool.num_pages_used, pool.ideal_bytes, dict(pool.extras)) == (0, 0, {})
    for case, answer in answers:
        cases.check(case, prompt, answer)


async def test_from_a_cached_prefix(cases_of: Callable[[BaseKind], Cases]) -> None:
    """What is cached of the low-rank factors alone is not what the adapter with a norm of its own would compute."""
    cases = cases_of("llama")
    case, prompt = cases.all[4], random_prompt(40, 3)
    async with open_worker(cases.shelf) as worker:
        plain = await ask(worker, prompt, cases.shelf.version_of("rank4_qv"), greedy(LENGTH))
        first = await ask(worker, prompt, case[0], greedy(LENGTH))
        again = await ask(worker, prompt, case[0], greedy(LENGTH))
    assert [answer.last.num_cached_tokens for answer in (plain, first, again)] == [0, 0, 32]
    assert first.tokens == again.tokens != plain.tokens
