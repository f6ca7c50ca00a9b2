"""Collectives of ranks in processes of their own, over gloo."""

from __future__ import annotations

import pytest
import torch

from lorafleet.workers.ranks import Ranks
from tests.support.ranks import run_ranks


def _collect(ranks: Ranks) -> dict[str, list[float]]:
    own = torch.arange(6.0).view(2, 3) + 10 * ranks.rank
    partial = ranks.partial(2, 3, own).copy_(own)
    sent = own[0].clone()
    ranks.broadcast(sent)
    return {
        "summed": ranks.all_reduce(partial).flatten().tolist(),
        "gathered": ranks.gather_columns(own).flatten().tolist(),
        "sent": sent.tolist(),
    }


def test_collectives_of_two_ranks() -> None:
    first, second = run_ranks(2, _collect)
    assert (
        first
        == second
        == {
            "summed": [10.0, 12.0, 14.0, 16.0, 18.0, 20.0],
            "gathered": [0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 3.0, 4.0, 5.0, 13.0, 14.0, 15.0],
            "sent": [0.0, 1.0, 2.0],
        }
    )


def test_one_rank_has_what_it_gives() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    ranks = Ranks()
    assert ranks.is_first
    assert ranks.all_reduce(tensor) is tensor
    assert ranks.gather_columns(tensor) is tensor


def _fail_second(ranks: Ranks) -> None:
    ranks.broadcast(torch.zeros(1))  # all are up before one of them leaves
    if ranks.rank == 1:
        raise ValueError("the second rank cannot")


def test_error_of_a_rank_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1: .*the second rank cannot"):
        run_ranks(2, _fail_second)
