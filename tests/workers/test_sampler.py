"""The sampler against transformers' own filters, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorafleet.workers.model.sampler import Chosen, Sampler, with_logprobs
from lorafleet.workers.step.sampling import BIAS, DRAW, NO_SAMPLING, SamplingBatch, uniforms

VOCAB = 40
DRAWS = 20_000


def batch_of(rows: int, **settings: Any) -> SamplingBatch:
    """Rows of equal settings; `seeds` count up. `biases`: (row, token id, bias)."""
    draws = np.zeros(rows, dtype=DRAW)
    draws["temperature"] = settings.get("temperature", 1.0)
    draws["top_p"] = settings.get("top_p", 1.0)
    draws["top_k"] = settings.get("top_k", 0)
    draws["min_p"] = settings.get("min_p", 0.0)
    seeds = np.array([seed % 2**64 for seed in settings.get("seeds", range(rows))], dtype=np.uint64)
    draws["uniform"] = uniforms(seeds, np.array(settings.get("positions", [0] * rows)))
    return replace(
        NO_SAMPLING,
        draws=draws,
        biases=np.array(settings.get("biases", []), dtype=BIAS),
        num_logprobs=settings.get("num_logprobs", -1),
    )


def sample(logits: Tensor, batch: SamplingBatch) -> Chosen:
    return Sampler().sample(logits, batch)


def logits_of(rows: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def reference(logits: Tensor, temperature: float, top_p: float, top_k: int, min_p: float) -> npt.NDArray[np.float64]:
    """The distribution that transformers draws from."""
    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores = LogitsProcessorList(warpers)(torch.zeros((1, 1), dtype=torch.long), logits[None].double())
    distribution: npt.NDArray[np.float64] = scores[0].softmax(-1).numpy()
    return distribution


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.5, 1.0, 0, 0.0),
        (1.7, 1.0, 0, 0.0),
        (1.0, 0.8, 0, 0.0),
        (1.0, 1.0, 5, 0.0),
        (0.8, 0.6, 12, 0.0),
        (1.0, 0.01, 0, 0.0),
        (2, 1, 1, 0.0),
        (1.0, 1.0, 0, 0.1),
        (1.5, 0.9, 30, 0.03),
        (1.0, 1.0, 0, 1.0),
    ],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    logits = logits_of(1)[0]
    drawn = sample(
        logits.expand(DRAWS, VOCAB),
        batch_of(DRAWS, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
    ).token_ids
    expected = reference(logits, temperature, top_p, top_k, min_p)
    counts = np.bincount(drawn.numpy(), minlength=VOCAB)
    assert not counts[expected == 0].any(), "a token that was filtered out"
    likely = expected * DRAWS >= 5
    chi_square = ((counts - expected * DRAWS)[likely] ** 2 / (expected * DRAWS)[likely]).sum()
    freedom = max(int(likely.sum()) - 1, 1)
    # Far in the tail of the chi-square distribution: mean + 5 deviations.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_successive_positions_are_independent_draws() -> None:
    logits = logits_of(1)[0]
    tokens = sample(
        logits.expand(DRAWS, VOCAB), batch_of(DRAWS, seeds=[7] * DRAWS, positions=list(range(DRAWS)))
    ).token_ids.numpy()
    expected = reference(logits, 1.0, 1.0, 0, 0.0)
    likeliest = int(expected.argmax())
    is_likeliest = tokens == likeliest
    p = expected[likeliest]
    assert abs(is_likeliest.mean() - p) < 5 * (p * (1 - p) / DRAWS) ** 0.5
    both = (is_likeliest[1:] & is_likeliest[:-1]).mean()
    assert abs(both - p * p) < 5 * (p * p / DRAWS) ** 0.5


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 2.0]),
            st.sampled_from([0.1, 0.9, 1.0]),
            st.sampled_from([0, 1, 7, VOCAB, 10 * VOCAB]),
            st.sampled_from([0.0, 0.2, 1.0]),
            st.integers(-(2**63), 2**63 - 1),
            st.integers(0, 5000),
        ),
        min_size=1,
        max_size=9,
    ),
    which=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_a_row_does_not_depend_on_its_batch(rows: list[tuple[float, float, int, float, int, int]], which: Any) -> None:
    logits = logits_of(len(rows), seed=3)

    def run(indices: list[int]) -> list[int]:
        temperatures, top_ps, top_ks, min_ps, seeds, positions = zip(*(rows[index] for index in indices), strict=True)
        batch = batch_of(
            len(indices),
            temperature=temperatures,
            top_p=top_ps,
            top_k=top_ks,
            min_p=min_ps,
            seeds=seeds,
            positions=positions,
        )
        tokens: list[int] = sample(logits[indices], batch).token_ids.tolist()
        return tokens

    order = list(range(len(rows)))
    together = run(order)
    which.shuffle(order)
    assert run(order) == [together[index] for index in order]
    assert [run([index])[0] for index in range(len(rows))] == together
    for index, (temperature, _, top_k, _, _, _) in enumerate(rows):
        if temperature == 0 or top_k == 1:
            assert together[index] == int(logits[index].argmax())


def test_greedy_takes_the_likeliest_beside_rows_that_draw() -> None:
    logits = logits_of(6)
    batch = batch_of(6)
    batch.draws["temperature"][::2] = 0.0
    assert sample(logits, batch).token_ids[::2].tolist() == logits.argmax(-1)[::2].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_do_not_come(temperature: float) -> None:
    logits = logits_of(1).expand(500, VOCAB).clone()
    best = logits[0].topk(3).indices.tolist()
    biases = [(row, token, -1e30) for row in range(1, 500, 2) for token in best[:2]]
    chosen = sample(logits, batch_of(500, temperature=temperature, biases=biases, num_logprobs=2))
    assert not set(chosen.token_ids[1::2].tolist()) & set(best[:2])
    assert set(chosen.token_ids[0::2].tolist()) & set(best[:2])
    # They are no choice, but the model's opinion of them stands.
    assert [token for token, _ in chosen.top(1, 2)] == best[:2]
    assert_logprobs(chosen, logits, 2)


def test_biases_are_added_to_their_own_logits() -> None:
    """The same as logits that have them, and twice the same entry twice; the logits and their logprobs stay."""
    logits = logits_of(60)
    rng = np.random.default_rng(0)
    biases = [
        (int(row), int(token), float(rng.uniform(-9, 9))) for row, token in rng.integers(0, (60, VOCAB), (200, 2))
    ]
    biased, before = logits.clone(), logits.clone()
    for row, token, bias in biases:
        biased[row, token] += bias
    for temperature in (0.0, 1.0):
        chosen = sample(logits, batch_of(60, temperature=temperature, biases=biases, num_logprobs=3))
        assert chosen.token_ids.tolist() == sample(biased, batch_of(60, temperature=temperature)).token_ids.tolist()
        assert torch.equal(logits, before)
        assert_logprobs(chosen, logits, 3)


def assert_logprobs(chosen: Chosen, logits: Tensor, num_top: int) -> None:
    expected = logits.double().log_softmax(-1)
    assert chosen.logprobs is not None
    of_chosen = expected.gather(1, chosen.token_ids[:, None])[:, 0]
    torch.testing.assert_close(chosen.logprobs.double(), of_chosen, atol=2e-6, rtol=0)
    for row in range(len(logits)):
        ids = [token for token, _ in chosen.top(row, num_top)]
        assert len(ids) == num_top
        values, _ = expected[row].topk(num_top)
        torch.testing.assert_close(expected[row, ids], values, atol=2e-6, rtol=0)
        reported = torch.tensor([value for _, value in chosen.top(row, num_top)], dtype=torch.float64)
        torch.testing.assert_close(reported, values, atol=2e-6, rtol=0)


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_are_the_models_own(num_top: int, dtype: torch.dtype) -> None:
    """Before temperature and filters, whatever was chosen."""
    logits = logits_of(7, scale=5.0).to(dtype)
    chosen = sample(logits, batch_of(7, temperature=1.5, top_k=4, num_logprobs=num_top))
    assert_logprobs(chosen, logits.float(), num_top)


def test_logprobs_of_given_tokens() -> None:
    logits = logits_of(5)
    token_ids = torch.tensor([0, 39, 7, 7, 1])
    chosen = with_logprobs(logits, token_ids, 3)
    assert chosen.token_ids.tolist() == token_ids.tolist()
    assert_logprobs(chosen, logits, 3)


def test_logits_that_are_no_numbers_are_marked_and_harm_no_other_row() -> None:
    logits = logits_of(5)
    clean = sample(logits, batch_of(5, num_logprobs=1))
    logits[1] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    chosen = sample(logits, batch_of(5, num_logprobs=1))
    assert chosen.peaks.isfinite().tolist() == [True, False, False, False, True]
    assert clean.peaks.isfinite().all()
    assert ((chosen.token_ids >= 0) & (chosen.token_ids < VOCAB)).all()
    for row in (0, 4):
        assert chosen.token_ids[row] == clean.token_ids[row]
        assert chosen.top(row, 1) == clean.top(row, 1)
