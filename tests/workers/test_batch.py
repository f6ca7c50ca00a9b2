"""The arrays of a step against a loop that looks every row up."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.kernels.segments import BASE_SLOT, plan_segments
from lorafleet.workers.detokenizer import Detokenizer
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.sequence import ScheduledRows, Sequence, pending_token
from lorafleet.workers.step import forms
from lorafleet.workers.step.batch import StepInputs
from lorafleet.workers.step.builder import BatchBuilder, BuiltStep
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.layout import GRAPH_CHUNK_LENGTH, blank_batch, chunk_bounds, most_chunks
from lorafleet.workers.step.message import StepMessage
from lorafleet.workers.step.sampling import SamplingBatch, uniforms
from lorafleet.workers.step.sampling_table import FORBIDDEN

PAGE_TOKENS = 4
MAX_PAGES = 12
NUM_SLOTS = 5
STOP_IDS = frozenset({2})


@dataclass
class FixedLease:
    slot: int
    has_extras: bool = False
    is_tabled: bool = True
    has_experts: bool = False

    @property
    def is_plain(self) -> bool:
        return not self.has_extras


def sequence_of(
    num_prompt: int, num_made: int, *, slot: int = BASE_SLOT, first: int = 100, sampling: SamplingParams | None = None
) -> Sequence:
    """Tokens count up from `first`."""
    tokens = list(range(first, first + num_prompt + num_made))
    request = EngineRequest(
        "r", None if slot == BASE_SLOT else "v", tuple(tokens[:num_prompt]), sampling or SamplingParams()
    )
    sequence = Sequence(
        request=request,
        arrival_s=0.0,
        max_tokens=100,
        seed=first,
        detokenizer=Detokenizer(None, (), ()),
        token_ids=tokens,
    )
    if slot != BASE_SLOT:
        sequence.lease = FixedLease(slot)  # type: ignore[assignment]
    return sequence


def builder(
    graph_forms: tuple[GraphForm, ...] = (),
    pass_rows: tuple[int, int] = (1, 1000),
    num_slots: int = NUM_SLOTS,
    *,
    has_experts: bool = False,
) -> BatchBuilder:
    return BatchBuilder(
        vocab_size=304,
        page_tokens=PAGE_TOKENS,
        max_pages=MAX_PAGES,
        stop_token_ids=STOP_IDS,
        num_slots=num_slots,
        pass_rows=pass_rows,
        graph_forms=graph_forms,
        extra_forms=forms.forms_with_extras(graph_forms),
        null_page=999,
        has_experts=has_experts,
    )


def by_row(*sizes: int) -> tuple[GraphForm, ...]:
    """Forms whose rows are sequences of their own."""
    return tuple(GraphForm(size, size, MAX_PAGES) for size in sizes)


def view(message: StepMessage) -> StepInputs:
    return message.view(torch.from_numpy(message.packed))


def assert_lays_out(built: BuiltStep, scheduled: list[ScheduledRows]) -> None:
    """Every row is its sequence's next token, and goes where its page table says."""
    header, sampling = built.message.header, built.message.sampling
    inputs = view(built.message)
    attention = inputs.attention
    assert set(map(id, (item.sequence for item in built.rows))) == set(map(id, (item.sequence for item in scheduled)))
    is_long = [item.num_rows > 1 for item in built.rows]
    assert is_long == sorted(is_long)
    row = 0
    sampled_rows: list[int] = []
    prompt_rows: list[int] = []
    targets: list[int] = []
    num_made: list[int] = []
    for index, item in enumerate(built.rows):
        seq = item.sequence
        slot = BASE_SLOT if seq.lease is None else seq.lease.slot
        assert attention.query_lengths[index] == item.num_rows
        assert int(attention.query_indptr[index]) == row
        assert (
            int(attention.context_lengths[index])
            == attention.host_context_lengths[index]
            == (seq.num_computed + item.num_rows)
        )
        num_pages = -(-(seq.num_computed + item.num_rows) // PAGE_TOKENS)
        assert attention.block_tables[index, :num_pages].tolist() == seq.kv_pages[:num_pages]
        for position in range(seq.num_computed, seq.num_computed + item.num_rows):
            assert int(inputs.token_ids[row]) == seq.token_ids[position]
            assert int(inputs.positions[row]) == position
            assert int(attention.row_pages[row]) == seq.kv_pages[position // PAGE_TOKENS]
            assert int(attention.row_offsets[row]) == position % PAGE_TOKENS
            assert int(inputs.segments.host_row_slots[row]) == slot
            if seq.wants_prompt_logprobs and position + 1 < seq.num_prompt:
                prompt_rows.append(row)
                targets.append(seq.token_ids[position + 1])
            row += 1
        assert header.num_sampled[index] == item.num_sampled
        sampled_rows += range(row - item.num_sampled, row)
        end = seq.num_computed + item.num_rows - seq.num_prompt
        num_made += range(end - item.num_sampled + 1, end + 1)
    assert row == header.num_rows == len(inputs.token_ids)
    assert attention.num_decodes == sum(item.num_rows == 1 for item in scheduled)
    assert [row for each in inputs.passes for row in each.rows[each.own].tolist()] == prompt_rows + sampled_rows
    for each in inputs.passes:
        assert each.segments.row_slots.tolist() == each.segments.host_row_slots.tolist()
        assert each.segments.host_row_slots.tolist() == inputs.segments.host_row_slots[each.rows.numpy()].tolist()
    assert sum(one.count for one in built.prompts) == header.num_prompt_rows == len(prompt_rows)
    assert inputs.targets.tolist() == targets + [0] * len(sampled_rows)
    seeds = [item.sequence.seed for item in built.rows for _ in range(item.num_sampled)]
    assert sampling.draws["uniform"].tolist() == uniforms(np.array(seeds, np.uint64), np.array(num_made)).tolist()


@st.composite
def some_rows(draw: st.DrawFn) -> list[ScheduledRows]:
    rows = []
    next_page = 0
    for number in range(draw(st.integers(1, 8))):
        num_prompt, num_made = draw(st.integers(1, 30)), draw(st.integers(0, 10))
        sampling = SamplingParams(
            prompt_logprobs=draw(st.booleans()),
            logprobs=draw(st.none() | st.integers(0, 5)),
            temperature=draw(st.sampled_from([0.0, 1e-9, 0.5])),
        )
        slot = draw(st.sampled_from([BASE_SLOT, 0, 3, 4]))
        sequence = sequence_of(num_prompt, num_made, slot=slot, first=1000 * number, sampling=sampling)
        sequence.num_computed = draw(st.integers(0, len(sequence.token_ids) - 1))
        num_pages = -(-len(sequence.token_ids) // PAGE_TOKENS)
        sequence.kv_pages = list(range(next_page, next_page + num_pages))[::-1]
        next_page += num_pages
        num_rows = draw(st.integers(1, sequence.num_uncomputed))
        most = min(num_rows, num_made + 1) if num_rows == sequence.num_uncomputed else 0
        rows.append(ScheduledRows(sequence, num_rows, draw(st.integers(min(1, most), min(3, most)))))
    return rows


@given(rows=some_rows(), fewest=st.sampled_from([1, 5, 16]), most=st.sampled_from([1, 4, 7, 1000]))
@settings(max_examples=200, deadline=None)
def test_every_row_is_where_it_belongs(rows: list[ScheduledRows], fewest: int, most: int) -> None:
    built = builder(pass_rows=(fewest, most)).build(rows)
    assert_lays_out(built, rows)
    header, sampling = built.message.header, built.message.sampling
    for one in header.passes:
        assert one.own_stop - one.own_start <= most
        assert min(fewest, header.num_logits) <= one.num_rows <= max(most, min(most, header.num_logits) + 2 * fewest)
        assert one.segments.is_exact == (fewest > 1)
    assert not header.has_pending
    wanted = [item.sequence.request.sampling for item in rows for _ in range(item.num_sampled)]
    assert sampling.num_logprobs == max((-1 if one.logprobs is None else one.logprobs for one in wanted), default=-1)
    assert sorted(sampling.draws["temperature"].tolist()) == sorted(
        0.5 if one.temperature == 0.5 else 0.0 for one in wanted
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_lines_follow_pages_that_come_and_change(data: st.DataObject) -> None:
    """Over many steps, as sequences grow, have a page replaced by a shared one, are preempted and end."""
    making = builder()
    live: list[Sequence] = []
    next_page = 0
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["new", "end", "swap", "preempt", "step", "step", "step"]))
        if what == "new" or not live:
            live.append(sequence_of(data.draw(st.integers(1, 9)), 0, first=1000 * len(live)))
            continue
        sequence = data.draw(st.sampled_from(live))
        if what == "end":
            making.release(sequence)
            live.remove(sequence)
        elif what == "swap" and sequence.kv_pages:
            sequence.kv_pages[data.draw(st.integers(0, len(sequence.kv_pages) - 1))] = (next_page := next_page + 1)
            sequence.num_tabled_pages = 0
        elif what == "preempt":
            sequence.kv_pages, sequence.num_tabled_pages, sequence.num_computed = [], 0, 0
        else:
            rows = [ScheduledRows.of(one, one.num_uncomputed) for one in live]
            for one in live:
                while len(one.kv_pages) * PAGE_TOKENS < len(one.token_ids):
                    one.kv_pages.append(next_page := next_page + 1)
            assert_lays_out(making.build(rows), rows)
            for one in live:
                one.num_computed = len(one.token_ids)
                one.token_ids.append(one.token_ids[-1] + 1)
            live = [one for one in live if len(one.token_ids) < MAX_PAGES * PAGE_TOKENS]


def test_rows_of_one_adapter_are_neighbours() -> None:
    rows = []
    for number, slot in enumerate([4, BASE_SLOT, 3, 4, BASE_SLOT, 3]):
        sequence = sequence_of(4, 0, slot=slot)
        sequence.num_computed = 3 if number < 4 else 0
        sequence.kv_pages = [number]
        rows.append(ScheduledRows.of(sequence, sequence.num_uncomputed))
    built = builder().build(rows)
    assert_lays_out(built, rows)
    inputs = view(built.message)
    assert inputs.segments.host_row_slots.tolist() == [-1, 3, 4, 4, *[-1] * 4, *[3] * 4]


def test_stop_tokens_are_forbidden_before_min_tokens() -> None:
    sampling = SamplingParams(min_tokens=2, stop_token_ids=(7, 9), logit_bias={7: 5, 8: -1})
    rows = []
    for num_made in range(4):
        sequence = sequence_of(3, num_made, sampling=sampling)
        sequence.num_computed, sequence.kv_pages = len(sequence.token_ids) - 1, [0, 1]
        rows.append(ScheduledRows.of(sequence, 1))
    making = builder()
    asked = [(row, token, bias) for row in range(4) for token, bias in ((7, 5.0), (8, -1.0))]
    forbidden = [(row, token, float(np.float32(FORBIDDEN))) for row in range(2) for token in (2, 7, 9)]
    assert sorted(making.build(rows).message.sampling.biases.tolist()) == sorted(asked + forbidden)
    assert len(making.build(rows[2:]).message.sampling.biases) == 4


def test_what_is_penalised_has_its_line_from_its_first_token_on() -> None:
    """Other rows stay out of it; a prompt is told of where its tokens count."""
    plain = sequence_of(3, 0)
    counted = sequence_of(4, 0, first=200, sampling=SamplingParams(frequency_penalty=0.5, presence_penalty=-1))
    repeated = sequence_of(5, 2, first=300, sampling=SamplingParams(repetition_penalty=2))
    making = builder()

    def build(*sequences: Sequence) -> SamplingBatch:
        for sequence in sequences:
            sequence.num_computed, sequence.kv_pages = len(sequence.token_ids) - 1, [0, 1]
        return making.build([ScheduledRows.of(sequence, 1) for sequence in sequences]).message.sampling

    first = build(plain, counted)
    assert first.penalties.tolist() == [(1, counted.batch_line, -1.0, 0.5, 1.0)]
    assert first.starts.tolist() == [(counted.batch_line,)]
    assert len(first.prompts) == 0
    assert len(build(plain).penalties) == 0
    counted.token_ids.append(pending_token(1))
    repeated.token_ids = repeated.token_ids[:5]
    second = build(repeated, plain, counted)
    assert second.penalties.tolist() == [
        (0, repeated.batch_line, 0.0, 0.0, 2.0),
        (2, counted.batch_line, -1.0, 0.5, 1.0),
    ]
    assert second.starts.tolist() == [(repeated.batch_line,)]
    assert second.prompts.tolist() == [(repeated.batch_line, token) for token in range(300, 305)]
    repeated.token_ids.append(7)
    assert len(build(repeated).starts) == 0


def test_a_token_in_flight_is_a_placeholder() -> None:
    sequence = sequence_of(3, 0)
    sequence.token_ids.append(pending_token(5))
    sequence.num_computed, sequence.kv_pages = 3, [0]
    message = builder().build([ScheduledRows.of(sequence, 1)]).message
    assert message.header.has_pending
    assert view(message).token_ids.tolist() == [-6]


def test_decodes_are_padded_to_a_captured_size() -> None:
    """Padding attends to nothing, has no adapter, and writes where nobody reads."""
    rows = []
    for number in range(3):
        sequence = sequence_of(6, 0, slot=number)
        sequence.num_computed, sequence.kv_pages = 5, [10 + number, 20 + number]
        rows.append(ScheduledRows.of(sequence, 1))
    making = builder(graph_forms=by_row(2, 4, 8))
    message = making.build(rows).message
    assert message.header.form == GraphForm(4, 4, MAX_PAGES)
    inputs = view(message)
    attention = inputs.attention
    assert attention.row_pages.tolist() == [20, 21, 22, 999]
    assert attention.context_lengths.tolist() == [6, 6, 6, 0]
    assert attention.block_tables.shape == (4, MAX_PAGES)
    assert inputs.segments.host_row_slots.tolist() == [0, 1, 2, BASE_SLOT]
    assert [each.rows.tolist() for each in inputs.passes] == [[0, 1, 2, 0]], "the padding's logits are of any row"
    assert message.header.num_sampled == (1, 1, 1)
    assert making.build(rows * 3).message.header.form is None, "more than the largest size"


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_graph_has_chunks_for_any_mix(data: st.DataObject) -> None:
    """Its bound is reached, and no mix of its slots and of the base goes beyond."""
    rows, num_slots = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 40))
    bound = most_chunks(rows, num_slots)
    slots = data.draw(st.lists(st.integers(BASE_SLOT, num_slots - 1), min_size=rows, max_size=rows))
    plan_segments(np.array(slots, np.int32), chunk_length=GRAPH_CHUNK_LENGTH, max_chunks=bound)
    worst = [*range(BASE_SLOT, num_slots)][:rows]
    worst += [BASE_SLOT] * (rows - len(worst))
    assert plan_segments(np.array(worst, np.int32), chunk_length=GRAPH_CHUNK_LENGTH).shape.num_chunks == bound


def test_few_adapters_take_a_graph_of_few_chunks() -> None:
    """However many rows they have: a launch is not made of programs for chunks that nobody has."""

    def graph_key(slots: list[int]) -> tuple[int, int]:
        rows = []
        for slot in slots:
            sequence = sequence_of(6, 0, slot=slot)
            sequence.num_computed, sequence.kv_pages = 5, [10, 20]
            rows.append(ScheduledRows.of(sequence, 1))
        form, num_chunks = builder(graph_forms=by_row(256), num_slots=256).build(rows).message.header.graph_key
        return form.num_rows, num_chunks

    assert chunk_bounds(256, 256) == (20, 76, 256)
    assert graph_key([BASE_SLOT] * 200) == (256, 0)
    assert graph_key([7] * 200) == (256, 20)
    assert graph_key([i % 4 for i in range(256)]) == (256, 20)
    assert graph_key([i % 64 for i in range(256)]) == (256, 76)
    assert graph_key([i % 64 for i in range(255)] + [64]) == (256, 256)


@given(rows=some_rows(), num_prompts=st.sampled_from([0, 8]))
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_a_batch_is_packed_as_its_graph_was_captured(rows: list[ScheduledRows], num_prompts: int) -> None:
    by_prompt = [GraphForm(n, 9, MAX_PAGES, num_prompts) for n in (32, 400)]
    kinds = by_row(8, 64, 400) if num_prompts == 0 else (*by_row(8), *by_prompt)
    with patch.object(forms, "FEW_KEYS", 0):
        message = builder(graph_forms=kinds).build(rows).message
    header = message.header
    assert header.form is not None
    has_lora = header.segments.num_lora_chunks > 0
    bounds = chunk_bounds(header.form.num_rows, NUM_SLOTS)
    (max_chunks,) = [n for n in bounds if (header.form, n) == header.graph_key] if has_lora else bounds[:1]
    captured = blank_batch(
        header.form,
        max_chunks=max_chunks,
        null_page=999,
        has_lora=has_lora,
        max_logits=1000,
    )
    assert captured.header.graph_key == header.graph_key
    inputs, captured_inputs = view(message), view(captured)
    (only,), (captured_only,) = inputs.passes, captured_inputs.passes
    for here, there in ((inputs.segments, captured_inputs.segments), (only.segments, captured_only.segments)):
        assert (here.max_chunks, here.chunk_length) == (there.max_chunks, there.chunk_length)
    assert inputs.attention.block_tables.shape == captured_inputs.attention.block_tables.shape
    assert inputs.attention.num_decodes == captured_inputs.attention.num_decodes
    assert message.packed.shape == captured.packed.shape


@given(rows=some_rows())
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_prompts_have_lines_behind_the_decodes(rows: list[ScheduledRows]) -> None:
    """Each row belongs to one line: its sequence's or, for padding, the last, which attends to nothing."""
    form = GraphForm(300, 9, MAX_PAGES, 8)
    with patch.object(forms, "FEW_KEYS", 0):
        making = builder(graph_forms=(form,))
        message = making.build(rows).message
    for item in rows:
        making.release(item.sequence)
    plain = builder().build(rows).message
    if all(item.num_rows == 1 for item in rows):
        assert message.header.form is None
        return
    assert message.header.form == form
    attention, eager = view(message).attention, view(plain).attention
    assert attention.num_decodes == form.num_decodes
    ends, num_lines = attention.query_indptr.tolist(), form.num_lines
    assert len(ends) == num_lines + 1
    assert (ends[0], ends[-1]) == (0, form.num_rows)
    lines = [*range(eager.num_decodes), *range(form.num_decodes, num_lines)][: len(rows)]
    for index, line in enumerate(lines):
        assert ends[line : line + 2] == eager.query_indptr[index : index + 2].tolist()
        assert attention.context_lengths[line] == eager.context_lengths[index]
        num_pages = eager.block_tables.shape[1]
        assert attention.block_tables[line, :num_pages].tolist() == eager.block_tables[index].tolist()
    assert ends[-2:] == [plain.header.num_rows, form.num_rows]
    empty = [line for line in range(num_lines) if line not in lines]
    assert attention.context_lengths[empty].tolist() == [0] * len(empty)
    assert all(ends[line] == ends[line + 1] for line in empty[:-1])


def test_rows_with_parameters_of_their_own_have_graphs_of_their_own() -> None:
    rows = []
    for number in range(3):
        sequence = sequence_of(6, 0, slot=number)
        sequence.num_computed, sequence.kv_pages = 5, [10 + number, 20 + number]
        rows.append(ScheduledRows.of(sequence, 1))
    making = builder(graph_forms=by_row(2, 3, 40, 48))
    assert making.build(rows).message.header.form == GraphForm(3, 3, MAX_PAGES)
    rows[1].sequence.lease = FixedLease(1, has_extras=True)  # type: ignore[assignment]
    built = making.build(rows)
    header = built.message.header
    assert header.has_extras
    assert header.graph_key == (GraphForm(48, 48, MAX_PAGES, has_extras=True), chunk_bounds(48, NUM_SLOTS)[-1])
    assert view(built.message).has_extras
    rows[2].sequence.lease = FixedLease(2, has_extras=True, is_tabled=False)  # type: ignore[assignment]
    built = making.build(rows)
    assert built.message.header.form is None
    assert built.message.header.has_extras
    assert_lays_out(built, rows)
    plain = making.build(rows[:1]).message.header
    assert (plain.form, plain.has_extras) == (GraphForm(2, 2, MAX_PAGES), False)


def test_batches_without_lora_on_experts_have_graphs_without_it() -> None:
    rows = []
    for number in range(3):
        sequence = sequence_of(6, 0, slot=number - 1)
        sequence.num_computed, sequence.kv_pages = 5, [10 + number, 20 + number]
        rows.append(ScheduledRows.of(sequence, 1))
    making, bounds = builder(by_row(1, 40), has_experts=True), chunk_bounds(40, NUM_SLOTS)
    header = making.build(rows).message.header
    assert header.skips_experts
    assert header.graph_key[0] == GraphForm(40, 40, MAX_PAGES, skips_experts=True)
    rows[2].sequence.lease = FixedLease(1, has_experts=True)  # type: ignore[assignment]
    built = making.build(rows)
    assert not view(built.message).skips_experts
    assert built.message.header.graph_key == (GraphForm(40, 40, MAX_PAGES), bounds[-1])
    of_base = making.build(rows[:1]).message.header
    assert of_base.graph_key == (GraphForm(1, 1, MAX_PAGES), 0)


def test_a_context_that_is_longer_than_a_graphs_tables_goes_without() -> None:
    form = GraphForm(8, 4, 2, 3)
    for num_tokens in (PAGE_TOKENS * 2, PAGE_TOKENS * 2 + 1):
        sequence = sequence_of(num_tokens, 0)
        sequence.kv_pages = [7, 5, 3]
        with patch.object(forms, "FEW_KEYS", 0):
            message = builder(graph_forms=(form,)).build([ScheduledRows.of(sequence, num_tokens)]).message
        assert message.header.form == (form if num_tokens == PAGE_TOKENS * 2 else None)
        tables = view(message).attention.block_tables
        assert tables.tolist()[4 if message.header.form else 0] == sequence.kv_pages[: tables.shape[1]]
        assert tables.shape[1] == -(-num_tokens // PAGE_TOKENS)


def test_a_prefill_that_goes_on_has_no_logits() -> None:
    sequence = sequence_of(9, 0)
    sequence.kv_pages = [0, 1, 2]
    message = builder().build([ScheduledRows.of(sequence, 4)]).message
    assert message.header.num_logits == 0
    assert message.header.num_sampled == (0,)
    (only,) = message.header.passes
    assert only.segments.num_lora_chunks == 0
    assert view(message).attention.query_lengths == [4]
