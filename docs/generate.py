"""Fills the generated blocks of docs/*.md from the code: `make docs`. With `--check` it only names old pages.

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`; what is around it is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ray.util.metrics import Metric

from lorafleet.adapter_store.peft_config import FIELDS
from lorafleet.adapter_store.validation import RULES
from lorafleet.cluster import errors, metrics
from lorafleet.cluster.admin import routes as admin_routes
from lorafleet.cluster.anthropic import routes as anthropic_routes
from lorafleet.cluster.config import AppConfig, UserConfig
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import NEUTRAL_DESCRIPTION
from lorafleet.cluster.http.probes import build_probes
from lorafleet.cluster.openai import embeddings
from lorafleet.cluster.openai import requests as openai_requests
from lorafleet.cluster.openai import routes as openai_routes
from lorafleet.cluster.openai.peer_routes import build_peer_router
from lorafleet.cluster.responses import routes as responses_routes
from lorafleet.workers.request import GenerateDelta, GenerateRequest, TokenLogprobs

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
import measured  # noqa: E402 (beside this file, in no package)

BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Schema = Mapping[str, Any]


# --- tables ---


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in cells) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def fields_table(schema: Schema, definitions: Schema) -> str:
    """The properties of a JSON schema object. A reply's have no defaults that matter; a body's do."""
    required = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        rows.append((f"`{name}`", kind_of(field, definitions), default, field.get("description", "")))
    return table(("field", "type", "default", "meaning"), rows)


def reply_table(schema: Schema, definitions: Schema) -> str:
    fields = schema.get("properties", {}).items()
    rows = [(f"`{name}`", kind_of(field, definitions), field.get("description", "")) for name, field in fields]
    return table(("field", "type", "meaning"), rows)


def kind_of(field: Schema, definitions: Schema) -> str:
    """A JSON schema in a few words: `integer, 1 to 512`, `"all" or integer, at least 0`, `list of DesiredAdapter`."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return kind_of(definitions[name], definitions) if "enum" in definitions[name] else name
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(kind_of(choice, definitions) for choice in field[key]))
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    kind = field.get("type", "any")
    if kind == "array":
        items = field.get("items", {})
        if not items and "prefixItems" in field:
            items = field["prefixItems"][0]
        most = f", at most {field['maxItems']}" if "maxItems" in field else ""
        return f"list of {kind_of(items, definitions) if items else 'any'}{most}"
    if kind == "object":
        if "properties" in field:
            return "object with " + ", ".join(f"`{name}`" for name in field["properties"])
        values = field.get("additionalProperties")
        return f"object of {kind_of(values, definitions)}" if isinstance(values, dict) and values else "object"
    return ("true or false" if kind == "boolean" else str(kind)) + _bounds(field)


def _plain(number: float) -> str:
    """A bound without an exponent: 65,536, but 0.1."""
    return f"{number:,.0f}" if number == int(number) else f"{number:g}"


def _bounds(field: Schema) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum", field.get("gt")), field.get("exclusiveMaximum", field.get("lt"))
    parts = []
    if low is not None and high is not None and abs(high) < 2**53:
        parts.append(f"{_plain(low)} to {_plain(high)}")
    else:
        parts += [f"at least {_plain(low)}"] if low is not None and abs(low) < 2**53 else []
        parts += [f"at most {_plain(high)}"] if high is not None and abs(high) < 2**53 else []
    parts += [f"over {_plain(above)}"] if above is not None else []
    parts += [f"below {_plain(below)}"] if below is not None else []
    parts += [f"`{field['pattern']}`"] if "pattern" in field else []
    return "".join(f", {part}" for part in parts)


def first_paragraph(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0]


# --- configuration ---


def config() -> str:
    shown: set[str] = set()
    arguments, user_config = AppConfig.model_json_schema(), UserConfig.model_json_schema()
    return "\n".join(
        [
            *_sections(arguments, "", arguments["$defs"], shown),
            _section("user_config", user_config, user_config["$defs"]),
            *_sections(user_config, "user_config.", user_config["$defs"], shown),
        ]
    )


def _sections(schema: Schema, path: str, definitions: Schema, shown: set[str]) -> list[str]:
    """A section for each model below `schema`, each model once, the outer before the inner."""
    sections: list[str] = []
    for name, field in schema["properties"].items():
        for model in _models_in(field, definitions):
            if model["title"] in shown:
                continue
            shown.add(model["title"])
            where = f"{path}{name}" + ("[]" if field.get("type") == "array" else "")
            kind = model["properties"].get("kind", {}).get("default")
            sections.append(_section(f"{where}, kind: {kind}" if kind else where, model, definitions))
            sections += _sections(model, f"{where}.", definitions, shown)
    return sections


def _models_in(field: Schema, definitions: Schema) -> Iterator[Schema]:
    items = field.get("items", field)
    for choice in items.get("oneOf", [items]):
        if "$ref" in choice:
            yield definitions[choice["$ref"].rpartition("/")[2]]


def _section(title: str, schema: Schema, definitions: Schema) -> str:
    return f"### `{title}`\n\n`{schema['title']}`: {schema['description']}\n\n{fields_table(schema, definitions)}"


# --- HTTP ---


def routes() -> str:
    app = build_http_app(
        [
            openai_routes.build_router(cast(Any, None), Keys(), started=0),
            build_probes(cast(Any, None)),
            embeddings.build_router(cast(Any, None), Keys()),
            responses_routes.build_router(cast(Any, None), Keys()),
            anthropic_routes.build_router(cast(Any, None), Keys()),
            build_peer_router(cast(Any, None), Keys(), cast(Any, None), cast(Any, None)),
            admin_routes.build_router(cast(Any, None), Keys()),
        ]
    )
    description = app.openapi()
    definitions = description["components"]["schemas"]
    by_tag: dict[str, list[str]] = {}
    shown: set[str] = set()
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            route = f"#### `{method.upper()} {path}`\n\n{operation['summary']}.\n"
            body = _content(operation.get("requestBody", {}), definitions)
            if body.get("properties"):
                route += f"\nBody:\n\n{fields_table(_with_effect(body), definitions)}"
            reply = _content(operation["responses"].get("200", {}), definitions)
            if reply.get("properties") and reply["title"] in shown:
                route += f"\nReply: `{reply['title']}`, as above.\n"
            elif reply.get("properties"):
                shown.add(reply["title"])
                route += f"\nReply, `{reply['title']}`:\n\n{reply_table(reply, definitions)}"
            pending = sorted(_references(reply) - shown)
            while pending:
                name, *pending = pending
                shown.add(name)
                route += f"\n`{name}`:\n\n{reply_table(definitions[name], definitions)}"
                pending += sorted(_references(definitions[name]) - shown - {*pending})
            by_tag.setdefault(_title(operation["tags"][0]), []).append(route)
    return "\n".join(f"### {tag}\n\n" + "\n".join(found) for tag, found in by_tag.items())


def _with_effect(body: Schema) -> Schema:
    """Without what counts as absent: null, and fields that have a table of their own."""
    fields = {}
    for name, field in body["properties"].items():
        if field.get("description") != NEUTRAL_DESCRIPTION:
            choices = [choice for choice in field.get("anyOf", ()) if choice != {"type": "null"}]
            fields[name] = field | {"anyOf": choices} if choices else field
    return {**body, "properties": fields}


def _title(tag: str) -> str:
    return tag.capitalize() if tag.islower() else tag


def _content(part: Schema, definitions: Schema) -> Schema:
    schema = part.get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        return cast(Schema, definitions[schema["$ref"].rpartition("/")[2]])
    return cast(Schema, schema)


def _references(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_references, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"].rpartition("/")[2]} if "$ref" in schema else set()
    return own.union(*map(_references, schema.values()))


def neutral_fields() -> str:
    rows = []
    for name, values in openai_requests.NEUTRAL.items():
        rows.append((f"`{name}`", " or ".join(f"`{json.dumps(value)}`" for value in values) or "`null`"))
    return table(("field", "accepted"), rows)


# --- errors ---


def service_errors() -> str:
    unique = {(error.status, error.codes): error for error in errors.known_errors()}
    rows = (
        (
            str(status),
            unique[status, codes].type,
            ", ".join(f"`{code}`" for code in codes),
            unique[status, codes].meaning[0].upper() + unique[status, codes].meaning[1:],
        )
        for status, codes in sorted(unique)
    )
    return table(("status", "type", "code", "meaning"), rows)


def bad_request_codes() -> str:
    """Every code that a `BadRequest(message, param, code)` of the cluster floor carries."""
    codes = {"invalid_value"}
    for path in sorted((DOCS.parent / "cluster").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BadRequest":
                given = [*node.args[2:3], *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
                codes |= {str(value.value) for value in given if isinstance(value, ast.Constant) and value.value}
    return ", ".join(f"`{code}`" for code in sorted(codes)) + "\n"


def adapter_rules() -> str:
    return table(("code", "rule that the adapter breaks"), ((f"`{code}`", rule) for code, rule in RULES.items()))


def peft_fields() -> str:
    rows = ((f"`{name}`", rule.verdict, rule.note) for name, rule in FIELDS.items())
    return table(("field", "", "what of it, or why"), rows)


# --- Python, metrics ---


def handle_request() -> str:
    schema = GenerateRequest.model_json_schema()
    return fields_table(schema, schema.get("$defs", {}))


def handle_delta() -> str:
    parts = [
        f"`{kind.__name__}`: {first_paragraph(kind)}\n\n{_attributes(kind)}" for kind in (GenerateDelta, TokenLogprobs)
    ]
    return "\n".join(parts)


def _attributes(kind: type) -> str:
    """The fields of a dataclass with the docstrings below them."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    rows: list[list[str]] = []
    for node in body.body:
        if isinstance(node, ast.AnnAssign):
            rows.append([f"`{ast.unparse(node.target)}`", f"`{ast.unparse(node.annotation)}`", ""])
        elif rows and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            rows[-1][2] = str(node.value.value)
    return table(("field", "type", "meaning"), rows)


def metric_names() -> dict[str, Metric]:
    """Every metric of the service by its name in Prometheus."""
    owners = (metrics.RequestMetrics(), metrics.QueueMetrics(), metrics.WorkerMetrics(""), metrics.StoreMetrics())
    found = {}
    for owner in owners:
        for metric in vars(owner).values():
            if isinstance(metric, Metric):
                ending = "_total" if type(metric).__name__ == "Counter" else ""
                found[f"ray_{metric.info['name']}{ending}"] = metric
    return found


def metrics_table() -> str:
    rows = []
    for name, metric in metric_names().items():
        labels = ", ".join(f"`{label}`" for label in metric.info["tag_keys"])
        rows.append((f"`{name}`", type(metric).__name__.lower(), labels, metric.info["description"]))
    return table(("metric", "type", "labels", "meaning"), rows)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "adapter-rules": adapter_rules,
    "bad-request-codes": bad_request_codes,
    "config": config,
    "decode-step": lambda: table(
        ("part", "bytes with 64 adapters, ms", "base, ms", "64 adapters before, ms", "64 adapters, ms"),
        measured.step_rows(),
    ),
    "chaos-run": lambda: measured.chaos_run() + "\n",
    "chaos-faults": lambda: table(measured.chaos.HEAD, measured.chaos_rows()),
    "chaos-soak": lambda: table(("process", "growth (MB an hour)"), measured.soak_rows()),
    "chaos-hostile": lambda: table(measured.chaos.HOSTILE_HEAD, measured.hostile_rows()),
    "engine-bars": lambda: table(("", "measured", "bar", ""), measured.engine_bars()),
    "engine-peers": lambda: table(
        ("", "base", "one adapter", "64 adapters", "decode step, base", "64 adapters", "start, s"), measured.peer_rows()
    ),
    "engine-speeds": lambda: table(("", "output tokens/s", "of the base"), measured.engine_rows()),
    "fidelity": lambda: table(
        ("dtype", "comparison", "prefill: max, mean", "decode: max, mean", "same text"), measured.fidelity_rows()
    ),
    "handle-delta": handle_delta,
    "handle-request": handle_request,
    "hot-by-threads": lambda: table(("loads", "tokens, ms", "device's steps, ms"), measured.hot_rows()),
    "prefill-step": lambda: table(("part", "base, ms", "64 adapters, ms"), measured.prefill_rows()),
    "prompt-attention": lambda: table(("", "floor, us", "Triton, us", "cuDNN, us", "gain"), measured.attention_rows()),
    "long-prompts": lambda: table(("", "prompt tokens/s", "output tokens/s, 128 each"), measured.long_rows()),
    "kernel-bars": lambda: table(("", "measured", "bar", ""), measured.kernel_bars()),
    "kernel-cases": lambda: table(measured.kernel_head(), measured.kernel_rows()),
    "metrics": metrics_table,
    "neutral-fields": neutral_fields,
    "peft-fields": peft_fields,
    "prompt-graphs": lambda: table(
        ("graphs", "40 a second: p99, ms", "60 a second: p99, ms", "60 a second: tokens/s"),
        measured.prompt_graph_rows(),
    ),
    "groups": lambda: table(
        ("", "sequences", "adapters", "step, ms", "bytes alone, ms", "over bytes and sums"), measured.group_rows()
    ),
    "geometries": lambda: table(("", "step, ms", "bytes alone, ms", "over bytes"), measured.geometry_rows()),
    "mixtures": lambda: table(("", "output tokens/s", "of the base"), measured.mixture_rows()),
    "routes": routes,
    "serve-gpu": lambda: table(
        ("", "output tokens/s", "first token, ms: p50, p99", "between tokens, ms: p50, p99"), measured.serve_rows()
    ),
    "service-errors": service_errors,
}


def filled(text: str) -> str:
    """A page with its blocks filled anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}", text)


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` name those that are behind the code; 1 if there are any."""
    behind = []
    logging.disable()  # of errors that are made here to be described
    try:
        for page in sorted(DOCS.glob("*.md")):
            text = page.read_text()
            if filled(text) != text:
                behind.append(page.name)
                if "--check" not in arguments:
                    page.write_text(filled(text))
    finally:
        logging.disable(logging.NOTSET)
    for name in behind:
        print(f"docs/{name} " + ("is behind the code: run `make docs`" if "--check" in arguments else "written"))
    return 1 if behind and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
