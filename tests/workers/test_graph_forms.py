"""Which batches have a graph, and of which form."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.workers.step.forms import (
    FEW_KEYS,
    MAX_TABLE_ENTRIES,
    MOST_KEYS,
    PROMPT_LINES,
    GraphForm,
    choose_form,
    forms_with_extras,
    graph_forms,
)


@pytest.mark.parametrize(
    ("max_running", "max_batch_tokens", "max_pages", "by_row", "by_prompt"),
    [
        (256, 8192, 129, 512, 2048),
        (1, 2048, 129, 512, 2048),
        (1024, 8192, 129, 1024, 2048),
        (64, 64, 129, 64, None),
        (64, 300, 129, 300, 300),
        (256, 8192, 8193, 512, 2048),
    ],
)
def test_forms_reach_decodes_and_prompts(
    max_running: int, max_batch_tokens: int, max_pages: int, by_row: int, by_prompt: int | None
) -> None:
    forms = graph_forms(max_running, max_batch_tokens, max_pages)
    assert list(forms) == sorted(forms, key=lambda form: (form.num_rows, form.num_prompts))
    for num_prompts, largest in ((0, by_row), (PROMPT_LINES, by_prompt)):
        sizes = [form.num_rows for form in forms if form.num_prompts == num_prompts]
        assert (sizes[-1] if sizes else None) == largest
        assert len(set(sizes)) == len(sizes)
        padding = [size - before - 1 for before, size in pairwise(sizes)]
        assert all(rows <= max(7, size // 4) for rows, size in zip(padding, sizes[1:], strict=True))
    assert forms[0] == GraphForm(1, 1, max_pages)
    for form in forms:
        assert form.num_lines == form.num_decodes + (PROMPT_LINES + 1 if form.num_prompts else 0)
        # A long context's tables would be most of the step.
        widest = MAX_TABLE_ENTRIES // form.num_lines if form.num_prompts else max_pages
        assert form.num_pages == min(max_pages, widest)
    assert all(form.num_decodes == min(form.num_rows, max_running) for form in forms if form.num_prompts)
    assert all(form.num_decodes == form.num_rows for form in forms if not form.num_prompts)


def test_a_small_base_has_forms_for_whole_budgets() -> None:
    """Its steps take the host longer to launch than the GPU to compute, whatever their rows."""
    small = graph_forms(256, 8192, 129, 400_000_000)
    assert small[-1].num_rows == 8192
    assert set(graph_forms(256, 8192, 129)) < set(small)
    assert {form.chunk_length for form in small if form.num_rows <= 2048} == {16}
    assert {form.chunk_length for form in small if form.num_rows > 2048} == {128}
    sizes = [form.num_rows for form in small if form.num_prompts]
    assert all(size - before <= size // 4 for before, size in pairwise(sizes) if size > 512)


def test_fewer_forms_are_captured_for_extras() -> None:
    forms = graph_forms(256, 8192, 129)
    kept = forms_with_extras(forms)
    assert all(form.has_extras and replace(form, has_extras=False) in forms for form in kept)
    for num_prompts in (0, PROMPT_LINES):
        sizes, all_sizes = ([f.num_rows for f in some if f.num_prompts == num_prompts] for some in (kept, forms))
        assert sizes[-1] == all_sizes[-1]
        assert all(larger <= 2 * size for size, larger in pairwise(sizes))
    assert len(kept) < len(forms) / 2
    assert forms_with_extras(graph_forms(48, 48, 129))[-1].num_rows == 48


@given(
    num_decodes=st.integers(0, 256),
    prompts=st.lists(st.tuples(st.integers(2, 900), st.integers(0, 1100)), max_size=200),
)
@settings(max_examples=300, deadline=None)
def test_the_form_holds_the_batch(num_decodes: int, prompts: list[tuple[int, int]]) -> None:
    """`prompts`: rows of each, and tokens before them."""
    forms = graph_forms(256, 8192, 129)
    num_rows = num_decodes + sum(rows for rows, _ in prompts)
    num_keys = sum(rows * (rows + before) for rows, before in prompts)
    if num_rows == 0:
        return
    shape = {"num_rows": num_rows, "num_prompts": len(prompts), "num_keys": num_keys}
    form = choose_form(forms, **shape, num_pages=129)
    assert choose_form(forms, **shape, num_pages=130) is None
    if form is None:
        assert num_rows > 2048 or len(prompts) > PROMPT_LINES
        assert num_rows > 512 or num_keys > MOST_KEYS
        return
    assert num_decodes <= form.num_decodes
    assert num_rows <= form.num_rows
    assert not any(
        num_rows <= other.num_rows < form.num_rows for other in forms if other.num_prompts == form.num_prompts
    )
    if not prompts:
        assert form.num_prompts == 0
    elif form.num_prompts:
        assert len(prompts) <= form.num_prompts
        assert num_keys > FEW_KEYS or num_rows > 512
    else:
        assert num_keys <= FEW_KEYS or (len(prompts) > PROMPT_LINES and num_keys <= MOST_KEYS)
