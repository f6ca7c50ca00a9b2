"""POST /v1/embeddings through OpenAI's client, against transformers and PEFT."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
import torch

from lorafleet.workers.model.runner import ModelRunner
from tests.cluster.engines import engine_service
from tests.cluster.serving import BASE_ID, Service
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.oracle import load_with_peft
from tests.workers.harness import Shelf

TEXTS = ["Hello there", "The sky is blue, and the sea is calm.", "x"]
Vector = npt.NDArray[np.float64]


@pytest.fixture(scope="module", params=["llama", "llama-in-flight", "gpt2"])
def served(
    request: pytest.FixtureRequest, base_of: Callable[[BaseKind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Shelf, Service]]:
    """In a GPU's order of events too: a step is launched before the last one is collected."""
    kind: BaseKind = "gpt2" if request.param == "gpt2" else "llama"
    shelf = Shelf(base_of(kind))
    adapter = tmp_path_factory.mktemp("adapters") / "shout"
    shelf.put(make_adapter(adapter, shelf.base, "rank4_qv" if kind == "llama" else "rank4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "is_asynchronous", request.param == "llama-in-flight")
        with engine_service(shelf) as service:
            yield shelf, service


@pytest.fixture
def service(served: tuple[Shelf, Service]) -> Service:
    return served[1]


def by_peft(shelf: Shelf, model: str, token_ids: list[int], pooling: str) -> Vector:
    """What the body of the untouched model leaves, in float64."""
    folder = None if model == BASE_ID else shelf.folders[shelf.version_of(model)]
    loaded = load_with_peft(shelf.base, folder)
    with torch.no_grad():
        hidden = loaded(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[-1][0].double()
    found = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
    return np.asarray(found)


def asked(service: Service, **fields: Any) -> openai.types.CreateEmbeddingResponse:
    own = {name: fields.pop(name) for name in ("pooling", "normalize", "truncate_prompt_tokens") if name in fields}
    return service.client().embeddings.create(extra_body=own, **{"model": BASE_ID, "input": TEXTS, **fields})


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("model", [BASE_ID, "shout"])
def test_embeddings_are_those_of_peft(served: tuple[Shelf, Service], model: str, pooling: str) -> None:
    shelf, service = served
    tokenizer: Any = service.prompts.tokenizer
    prompts: list[list[int]] = [tokenizer(text)["input_ids"] for text in TEXTS]
    # Longer than a step takes at once (256), so that the sum is of several.
    prompts.append([7 + i % 200 for i in range(400)])
    plain = asked(service, model=model, input=prompts, pooling=pooling, normalize=False)
    assert [each.index for each in plain.data] == [0, 1, 2, 3]
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == sum(map(len, prompts))
    scaled = asked(service, model=model, input=prompts, pooling=pooling)
    for prompt, one, other in zip(prompts, plain.data, scaled.data, strict=True):
        wanted = by_peft(shelf, model, prompt, pooling)
        np.testing.assert_allclose(one.embedding, wanted, atol=1e-4)
        np.testing.assert_allclose(other.embedding, wanted / np.linalg.norm(wanted), atol=1e-4)
    # Again: the prefix cache now has the prompts.
    again = asked(service, model=model, input=prompts, pooling=pooling, normalize=False)
    for one, other in zip(plain.data, again.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)
    texts = asked(service, model=model, pooling=pooling, normalize=False)
    for one, other in zip(texts.data, plain.data, strict=False):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)


def test_dimensions_and_base64(service: Service) -> None:
    whole = np.array(asked(service, normalize=False).data[0].embedding)
    short = asked(service, dimensions=10).data[0].embedding
    np.testing.assert_allclose(short, whole[:10] / np.linalg.norm(whole[:10]), atol=1e-5)
    with service.http() as http:
        body = {"model": BASE_ID, "input": TEXTS[0], "encoding_format": "base64", "normalize": False}
        text = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(text), "<f4"), whole, atol=1e-5)
    width = len(whole)
    with pytest.raises(openai.BadRequestError, match=f"is over the base's {width}"):
        asked(service, dimensions=width + 1)


def test_beside_answers(service: Service) -> None:
    """Prompts are embedded in the same steps in which answers are made, and neither changes the other."""
    alone = service.client().completions.create(model="shout", prompt="Hello", max_tokens=40, temperature=0)
    plain = asked(service, pooling="mean").data
    stream = service.client().completions.create(
        model="shout", prompt="Hello", max_tokens=40, temperature=0, stream=True
    )
    text = next(iter(stream)).choices[0].text
    many = asked(service, input=TEXTS * 30, pooling="mean").data
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == alone.choices[0].text
    for index, one in enumerate(many):
        assert one.index == index
        np.testing.assert_allclose(one.embedding, plain[index % 3].embedding, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [[10**6]]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"wings": 2}, "wings"),
    ],
    ids=["empty", "empty-text", "token", "many", "dimensions", "encoding", "pooling", "unknown"],
)
def test_refusals_name_the_field(service: Service, fields: dict[str, Any], param: str) -> None:
    with service.http() as http:
        reply = http.post("/v1/embeddings", json={"model": BASE_ID, "input": "a", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert reply.json()["error"]["message"].strip()
