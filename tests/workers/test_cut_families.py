"""Families of bases whose plan of transformers is served: a base in parts computes what it computes as a whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.workers.config import ModelConfig
from lorafleet.workers.model.geometry import empty_model, geometry_of
from lorafleet.workers.model.part_loader import load_part
from lorafleet.workers.model.sharding import computing_together, shares_of
from lorafleet.workers.ranks import Ranks
from tests.workers.test_refusals import SHAPE, save_base

SIZE = 2
LIMIT_S = 60.0
QUICK = ("cohere", "gemma3_text", "gpt_neox", "granite")
MORE = (
    "apertus",
    "arcee",
    "cohere2",
    "cwm",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma4_text",
)


class Meeting:
    """The place where ranks in threads of one process exchange tensors."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(SIZE, timeout=LIMIT_S)
        self._tensors = [torch.empty(0)] * SIZE

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """All ranks' tensors."""
        self._tensors[rank] = tensor.clone()
        self._barrier.wait()
        found = list(self._tensors)
        self._barrier.wait()
        return found


class ThreadRanks(Ranks):
    """A rank in a thread."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, SIZE)
        self._meeting = meeting

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(self.rank, tensor)).sum(0)

    def gather_columns(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._meeting.exchange(self.rank, tensor), -1)


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)])
def test_parts_compute_what_the_whole_does(kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path, kind, {**SHAPE, "pad_token_id": 0})
    config = AutoConfig.from_pretrained(base)
    empty = empty_model(config, torch.float32)
    geometry, meeting = geometry_of(empty, "float32"), Meeting()
    ranks = [ThreadRanks(rank, meeting) for rank in range(SIZE)]
    shares = [shares_of(empty, geometry, each) for each in ranks]
    model = ModelConfig(id="base", source=str(base))
    parts = [load_part(model, config, torch.float32, torch.device("cpu"), own).eval() for own in shares]
    tokens = torch.arange(1, 24)[None]
    answers: list[Tensor | None] = [None] * SIZE

    @torch.inference_mode()
    def compute(rank: int) -> None:
        with computing_together(parts[rank], geometry, shares[rank], ranks[rank]):
            answers[rank] = parts[rank](input_ids=tokens, use_cache=False).logits

    threads = [threading.Thread(target=compute, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        expected = whole(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    for answer in answers:
        assert answer is not None
        torch.testing.assert_close(answer.log_softmax(-1), expected, atol=5e-5, rtol=0)
