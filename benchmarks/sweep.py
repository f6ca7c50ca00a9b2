"""Serves a tiny base of every causal model class of the installed transformers and holds it against PEFT: `make sweep`.

    python benchmarks/sweep.py [--only llama,gemma3_text] [--processes 2] [--limit-s 60] [--page docs/bases.md]

Each base answers a mixed batch: itself and adapters on its attention, on all linear modules, on the embedding and on
the head; short prompts and long ones in chunks, and decoding. Every logprob must be transformers + PEFT's in fp32.
A base may be refused with a reason, and so may a target. Rows are kept in `build/sweep.jsonl` by the state of the code,
so a run that was cut goes on where it ended. The exit status says whether a row is wrong.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core

import fidelity
import tiny_bases
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from lorafleet.adapter_store.errors import AdapterRefused
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.errors import WorkerConfigError
from lorafleet.workers.model.geometry import read_geometry

HERE = Path(__file__).parent
ROOT = HERE.parent
BAR = 1e-4
"""Largest difference of any logprob."""
EXCUSED = 3e-3
"""The same where float32 takes the oracle itself half as far from its answer in float64: both sides round."""
TARGETS = ("attention", "all-linear", "embedding", "head", "experts")
LENGTHS = (3, 22, 45)
"""Of the prompts: the last is longer than every window, and takes several steps."""
NUM_TOKENS = 5
ENGINE = {"max_batch_tokens": 32, "kv_bytes": 8 << 20, "kv_page_tokens": 16, "max_running": 32}

Status = Literal["served", "refused", "wrong", "not tried"]


@dataclass(frozen=True, slots=True)
class Case:
    """A base to be tried."""

    name: str
    """The class, and what is special about it."""
    kind: str
    """Its `model_type`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its configuration."""


@dataclass(frozen=True, slots=True)
class Row:
    """Result of a case."""

    name: str
    kind: str
    status: Status
    reason: str = ""
    """Why it is refused, or how it is wrong."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Of `TARGETS`: "yes", or why an adapter on it is refused."""
    layers: str = "transformers'"
    """Whose layers compute it: `fused`, `in part` or `transformers'`."""
    difference: float = 0.0
    """The largest of any logprob."""
    seconds: float = 0.0


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_LONG = {"original_max_position_embeddings": 32, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
MULTIMODAL = {
    "Gemma3nForConditionalGeneration": "gemma3n",
    "InternVLForConditionalGeneration": "internvl",
    "Llama4ForConditionalGeneration": "llama4",
    "LlavaForConditionalGeneration": "llava",
    "Mistral3ForConditionalGeneration": "mistral3",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}
"""Classes whose text is served, beside those that transformers counts among the causal ones."""
VARIANTS = (
    Case(
        "LlamaForCausalLM, Llama 3's RoPE",
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    Case("LlamaForCausalLM, YaRN", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    Case("LlamaForCausalLM, dynamic RoPE", "llama", _rope("dynamic", factor=2.0)),
    Case("LlamaForCausalLM, tied", "llama", {"tie_word_embeddings": True}),
    Case(
        "MiniMaxM3VLForCausalLM, sparse",
        "minimax_m3_vl_text",
        {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    ),
    Case("Phi3ForCausalLM, longrope", "phi3", {**_rope("longrope", **_LONG), "original_max_position_embeddings": 32}),
    Case("Qwen2ForCausalLM, window", "qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("Qwen2MoeForCausalLM, window", "qwen2_moe", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("Qwen3_5ForCausalLM, text alone", "qwen3_5_text"),
    Case("Qwen3_5MoeForCausalLM, text alone", "qwen3_5_moe_text"),
    Case("Qwen3ForCausalLM, window", "qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    Case("FalconForCausalLM, ALiBi", "falcon", {"alibi": True}),
    Case("FalconForCausalLM, multi-query", "falcon", {"multi_query": True}),
    Case("FalconForCausalLM, new decoder", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Case("Llama4ForCausalLM, more tokens than a chunk", "llama4_text", {"attention_chunk_size": 64}),
)
"""Settings of bases that people use and that compute something else than the class's defaults."""


def cases() -> list[Case]:
    """Every class once, and the variants."""
    kinds = {**tiny_bases.kinds(), **MULTIMODAL}
    return sorted([*(Case(name, kind) for name, kind in kinds.items()), *VARIANTS], key=lambda case: case.name)


# --- one base ---


def try_base(case: Case) -> Row:
    """Serve the case's base and compare. Everything that goes wrong in it is in the row."""
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        row = _try_base(case, Path(folder))
    return replace(row, seconds=round(time.perf_counter() - started_s, 1))


def _try_base(case: Case, folder: Path) -> Row:
    try:
        model = tiny_bases.tiny_model(tiny_bases.tiny_config(case.kind, case.settings))
        tiny_bases.write_base(folder / "base", model)
        # As it is loaded: some tie their embeddings only then.
        model = type(model).from_pretrained(folder / "base", dtype=torch.float32).eval()
    except Exception as error:  # whatever transformers has against a tiny one
        return Row(case.name, case.kind, "not tried", _line(error))
    try:
        return _serve(case, model, folder)
    except WorkerConfigError as error:
        return Row(case.name, case.kind, "refused", _line(error))
    except Exception as error:  # a fault of ours
        logging.debug("%s", case.name, exc_info=True)
        at = traceback.extract_tb(error.__traceback__)[-1]
        return Row(case.name, case.kind, "wrong", f"{_line(error)} ({Path(at.filename).name}:{at.lineno})")


def _serve(case: Case, model: PreTrainedModel, folder: Path) -> Row:
    base = ModelConfig(id="base", source=str(folder / "base"))
    reader = AdapterReader(read_geometry(base, "cpu"), max_rank=64)
    targets: dict[str, str] = {}
    oracle, folders = Oracle(model, case.settings), {}
    for name, modules in _targets(model).items():
        targets[name] = "no such module"
        if modules:
            try:
                field = "target_parameters" if name == "experts" else "target_modules"
                settings = {field: modules, "exclude_modules": _odd_linears(model)}
                oracle.adapters[name] = _adapter(model, settings, folder / name)
                reader.read(folder / name)
            except AdapterRefused as error:
                targets[name] = _line(error)
            except Exception as error:  # whatever PEFT has against it
                targets[name] = f"PEFT makes none: {_line(error)}"
            else:
                targets[name] = "yes"
                folders[name] = folder / name
    ours = fidelity.Ours(folder / "base", folders, "cpu", "float32", **ENGINE)
    generator = torch.Generator().manual_seed(0)
    questions = [
        fidelity.Question(name, tuple(torch.randint(3, tiny_bases.VOCAB_SIZE, (length,), generator=generator).tolist()))
        for length in LENGTHS
        for name in (None, *folders)
    ]
    answers = ours.ask(questions, NUM_TOKENS)
    layers = ours.layers
    ours.close()
    worst, of = 0.0, ""
    for question, answer in zip(questions, answers, strict=True):
        report = fidelity.compare(oracle, [question], [answer])
        if BAR < report.largest <= EXCUSED and report.largest <= 2 * oracle.rounding(question, answer):
            continue  # float32 cannot tell more of it
        if not report.largest <= worst:
            worst, of = report.largest, f"{question.adapter or 'the base'}, a prompt of {len(question.prompt)} tokens"
    reason = f"a logprob is {worst:.2g} off: {of}" if not worst <= BAR else ""
    return Row(case.name, case.kind, "wrong" if reason else "served", reason, targets, layers, worst)


def _targets(model: PreTrainedModel) -> dict[str, list[str] | str]:
    """Modules, or parameters of experts, that adapters of each of `TARGETS` are put on, as PEFT's config names them."""
    names = {module: name for name, module in model.named_modules()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {
        "attention": [
            name
            for name in linear
            if ("att" in name.lower() or ".self." in name) and not re.search("vision|visual|audio|projector", name)
        ],
        "all-linear": "all-linear",
        "embedding": [names[embedding]] if embedding in names else [],
        "head": [names[head]] if head in names else [],
        "experts": [name for name, value in model.named_parameters() if value.dim() == 3 and ".experts." in name],
    }


def _odd_linears(model: PreTrainedModel) -> list[str]:
    """Names of linear modules, such as some routers, that give more than their product. PEFT does not compute those."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own = [(name, module) for name, module in linear if type(module).forward is not nn.Linear.forward]
    return [name for name, module in own if not isinstance(module(torch.zeros(1, module.in_features)), Tensor)]


def _adapter(model: PreTrainedModel, targets: Mapping[str, list[str] | str], folder: Path) -> PeftModel:
    """Let PEFT put an adapter with random weights on a copy of the model, and save it."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": [], **targets})
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5 if "embedding_" in name else parameter.shape[-1] ** -0.5)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.eval()
    return adapted


class _InFloat64(TorchFunctionMode):
    """Takes float64 where a model's code asks for float32 by its name, as norms and recurrences do."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with the other dtype."""
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **named)


@dataclass
class Oracle:
    """Transformers with PEFT, one request at a time, in one pass."""

    model: PreTrainedModel
    settings: Mapping[str, Any]
    adapters: dict[str | None, PeftModel] = field(default_factory=dict)

    def rounding(self, question: fidelity.Question, answer: fidelity.Answer) -> float:
        """Return how far float32 takes the oracle itself from its answer in float64."""
        model = copy.deepcopy(self.adapters.get(question.adapter, self.model)).double()
        own: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        own.set_experts_implementation("eager")  # torch has no others in float64
        with _InFloat64():
            exact = Oracle(own, self.settings, {question.adapter: model}).logprobs(question, answer)
        return float((exact - self.logprobs(question, answer)).abs().max())

    @torch.inference_mode()
    def logprobs(self, question: fidelity.Question, answer: fidelity.Answer) -> Tensor:
        """(tokens - 1, vocab): the distribution before each token of prompt and answer but the first."""
        ids = torch.tensor([question.prompt + answer.tokens[:-1]])
        model = self.adapters.get(question.adapter, self.model)
        if self.settings.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope"):
            # A worker chooses frequencies by the longest sequence that there can be: a second line stands there.
            positions = torch.arange(ids.shape[1])
            both = torch.stack([positions, positions + tiny_bases.MAX_LENGTH - ids.shape[1]])
            pair = ids.expand(2, -1)
            logits = model(input_ids=pair, attention_mask=torch.ones_like(pair), position_ids=both, use_cache=False)
        else:
            logits = model(input_ids=ids, use_cache=False)
        return logits.logits[0].log_softmax(-1)


def _line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(re.sub(r"model.source '.*?'", "model.source", str(error)).split())
    is_ours = isinstance(error, AdapterRefused | WorkerConfigError)
    return (text if is_ours else f"{type(error).__name__}: {text}")[:200]


# --- all of them ---


def sweep(todo: Sequence[Case], num_processes: int, limit_s: float) -> Iterable[Row]:
    """A row of each case, as they come; each in a process of its own, which is ended at the limit."""
    get_checkpoint_conversion_mapping("llama")  # a second's work, that processes are not to do again
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(todo)), {}
    while waiting or running:
        while waiting and len(running) < num_processes:
            case = waiting.pop()
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(case, writer))
            process.start()
            writer.close()
            running[reader] = case, process, time.monotonic() + limit_s
        first_end_s = min(end_s for _, _, end_s in running.values())
        ready = wait(list(running), max(0.0, first_end_s - time.monotonic()))
        for reader, (case, process, end_s) in list(running.items()):
            if reader not in ready and time.monotonic() < end_s:
                continue
            del running[reader]
            row = Row(case.name, case.kind, "wrong", f"its process ended, or took more than {limit_s:g} s")
            if reader in ready:
                with suppress(EOFError):
                    row = reader.recv()
            process.kill()
            process.join()
            yield row


def _child(case: Case, writer: Connection) -> None:
    writer.send(try_base(case))
    writer.close()
    os._exit(0)  # whatever threads there are


def state_of_the_code() -> str:
    """A digest of what a row depends on."""
    digest = hashlib.sha256()
    for folder in ("kernels", "workers", "adapter_store", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    digest.update("".join(version(name) for name in ("torch", "transformers", "peft")).encode())
    return digest.hexdigest()[:16]


def page(rows: Iterable[Row]) -> str:
    """The rows as a page of docs/."""
    groups: dict[Status, list[Row]] = {"served": [], "refused": [], "wrong": [], "not tried": []}
    for row in sorted(rows, key=lambda row: row.name.lower()):
        groups[row.status].append(row)
    counts = {status: len(rows) for status, rows in groups.items()}
    lines = [
        "# Bases",
        "",
        "`make sweep` writes this page. It serves every causal model class of transformers "
        f"{version('transformers')} as a tiny",
        "base with random weights, on a CPU. Each base answers a mixed batch of itself and adapters that PEFT made.",
        f"Every logprob of a served base is that of transformers + PEFT, to {BAR:g} in float32.",
        "Where float32 takes these themselves further from float64, they may differ by twice as much.",
        "",
        f"{counts['served']} are served, {counts['refused']} are refused, {counts['wrong']} are wrong, and "
        f"{counts['not tried']} could not be made tiny.",
        "",
        "## Served",
        "",
        "Fused layers are the fast ones; `in part`: some of their modules are transformers'.",
        "Targets are what an adapter may be put on. `all-linear` is without routers that give more than a product,",
        "as those of Llama 4 and PhiMoE do: PEFT does not compute with an adapter on them.",
        "",
        *_table(
            ("class", "model_type", "layers", *TARGETS),
            [(row.name, f"`{row.kind}`", row.layers, *_cells(row)) for row in groups["served"]],
        ),
        "",
        "### Targets that are refused",
        "",
        *_table(
            ("class", "target", "why"),
            [
                (row.name, target, why)
                for row in groups["served"]
                for target, why in row.targets.items()
                if why not in ("yes", "no such module")
            ],
        ),
    ]
    for status, found in groups.items():
        if status != "served" and found:
            cells = [(row.name, f"`{row.kind}`", row.reason) for row in found]
            lines += ["", f"## {status.capitalize()}", "", *_table(("class", "model_type", "why"), cells)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    return ["yes" if row.targets.get(name) == "yes" else "no" for name in TARGETS]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what is to be tried, print and write the page; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: set(text.split(",")), help="model types, with commas between")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--limit-s", type=float, default=60.0, help="of one base")
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "sweep.jsonl", help="where rows are kept")
    parser.add_argument("--page", type=Path, help="to be written, when all were tried")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)

    code = state_of_the_code()
    rows = {row.name: row for row in _kept(options.rows, code)}
    wanted = [case for case in cases() if options.only is None or case.kind in options.only]
    todo = [case for case in wanted if case.name not in rows]
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    with options.rows.open("a") as out:
        for row in sweep(todo, options.processes, options.limit_s):
            rows[row.name] = row
            out.write(json.dumps({"code": code, **asdict(row)}) + "\n")
            out.flush()
            print(f"{row.seconds:5.1f} s  {row.status:9}  {row.name:40} {row.reason}", flush=True)
    rows_wanted = [rows[case.name] for case in wanted]
    if options.page is not None and options.only is None:
        options.page.write_text(page(rows_wanted))
    wrong = [row.name for row in rows_wanted if row.status == "wrong"]
    print(f"{sum(row.status == 'served' for row in rows_wanted)} of {len(rows_wanted)} served, {len(wrong)} wrong")
    return 1 if wrong else 0


def _kept(path: Path, code: str) -> Iterable[Row]:
    if path.exists():
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            if fields.pop("code") == code:
                yield Row(**fields)


if __name__ == "__main__":
    sys.exit(main())
