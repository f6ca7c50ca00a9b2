"""Chooses the batches that are captured as CUDA graphs: their rows, and the sequences of their attention.

Pure logic. Forms are dense where padding would cost most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_ROWS = 2048
"""Of prompts beside decodes, for a base of MAX_ROWS_WEIGHTS. A larger step takes longer to compute than to launch."""
MAX_ROWS_WEIGHTS = 7_000_000_000
"""Weights of a base's linear layers: a smaller base computes more rows while they are launched."""
SMALL_CHUNKS_ROWS = 2048
"""A form of more rows has long chunks: most of its rows are of prompts."""
FEWEST_BESIDE_PROMPTS = 256
"""Rows of the smallest form with lines for prompts."""
PROMPT_LINES = 128
"""Prompts that such a form has lines for."""
MAX_TABLE_ENTRIES = 1 << 19
"""Of the block tables of such a form, which travel to the device with every step. A longer context goes without: the
more lines there are, the fewer programs read the keys of one."""
FEW_KEYS = 50_000
"""Keys of prompts, counted anew for every row that attends to them. So many are read faster row by row, as for decodes,
than by the launch a layer that lines for prompts cost."""
MOST_KEYS = 400_000
"""Beyond so many, reading them row by row takes longer than launching kernel by kernel."""


@dataclass(frozen=True, slots=True)
class GraphForm:
    """A captured batch: smaller ones are padded to it.

    Attention takes decodes, which are one row each, and then prompts, whose rows share their keys. Without lines for
    prompts every row is a sequence of its own. All keys of a layer are written before it attends, so a prompt's token
    finds earlier keys in the pages, as a decode does.
    """

    num_rows: int
    num_decodes: int
    """Lines for sequences of one row."""
    num_pages: int
    """Entries of a line's block table."""
    num_prompts: int = 0
    """Lines for sequences of several rows; one more has the padding."""
    has_extras: bool = False
    """Whether its layers look for what adapters have beside low-rank factors."""
    skips_experts: bool = False
    """Whether it has no LoRA work on experts, though on other modules."""

    @property
    def chunk_length(self) -> int:
        """Most rows of a chunk, whatever the batch's mix of adapters."""
        return 16 if self.num_rows <= SMALL_CHUNKS_ROWS else 128

    @property
    def num_lines(self) -> int:
        """Sequences that attention takes, empty ones and the padding's included."""
        return self.num_decodes + (self.num_prompts + 1 if self.num_prompts else 0)


def graph_forms(
    max_running: int,
    max_batch_tokens: int,
    max_pages: int,
    num_weights: int = MAX_ROWS_WEIGHTS,
    *,
    has_states: bool = False,
) -> tuple[GraphForm, ...]:
    """Rising forms for up to `max_running` sequences of up to `max_pages` KV pages. `num_weights`: of linear layers.
    `has_states`: the base has recurrent states; a graph then computes decodes alone.

    They go beyond `max_running` rows so that decodes with prompts beside them have one: below some 1,500 rows a step
    without a graph takes longer to launch than to compute.
    """
    most = max(max_running, max_batch_tokens)
    if has_states:
        return tuple(GraphForm(n, n, max_pages) for n in _sizes(min(max_running, max_batch_tokens)))
    forms = [GraphForm(n, n, max_pages) for n in _sizes(min(most, max(max_running, 512)))]
    max_rows = max(MAX_ROWS, MAX_ROWS * MAX_ROWS_WEIGHTS // max(1, num_weights))
    for num_rows in _sizes(min(most, max(max_running, max_rows))):
        if num_rows >= FEWEST_BESIDE_PROMPTS:
            form = GraphForm(num_rows, min(num_rows, max_running), max_pages, PROMPT_LINES)
            forms.append(replace(form, num_pages=min(max_pages, MAX_TABLE_ENTRIES // form.num_lines)))
    return tuple(sorted(forms, key=lambda form: (form.num_rows, form.num_prompts)))


def forms_with_extras(forms: Sequence[GraphForm]) -> tuple[GraphForm, ...]:
    """The forms of batches with extras, rising: fewer than `forms`, for few batches are padded to them."""
    kept = [
        form
        for form in forms
        if form.num_rows & (form.num_rows - 1) == 0
        or not any(other.num_rows > form.num_rows and other.num_prompts == form.num_prompts for other in forms)
    ]
    return tuple(replace(form, has_extras=True) for form in kept)


def choose_form(
    forms: Sequence[GraphForm], *, num_rows: int, num_prompts: int, num_keys: int, num_pages: int
) -> GraphForm | None:
    """The smallest for so many rows, of which some are of prompts; None when none is, or kernel by kernel is faster.

    `forms`: as `graph_forms` gives them. `num_keys`: that the prompts' rows attend to, counted for each row.
    `num_pages`: of the longest sequence.
    """
    large = [form for form in forms if form.num_rows >= num_rows and form.num_pages >= num_pages]
    by_row = next((form for form in large if form.num_prompts == 0), None)
    if num_prompts == 0 or (by_row is not None and num_keys <= FEW_KEYS):
        return by_row
    by_prompt = next((form for form in large if form.num_prompts >= num_prompts), None)
    if by_prompt is not None:
        return by_prompt
    return by_row if num_keys <= MOST_KEYS else None


def _sizes(largest: int) -> tuple[int, ...]:
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 64), *range(512, 1024, 128)]
    sizes += [*range(1024, 2048, 256), *(n << k for k in range(9, 18) for n in (4, 5, 6, 7))]
    return (*(size for size in sizes if size < largest), largest)
