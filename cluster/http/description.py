"""Completes GET /openapi.json with what FastAPI cannot see: bodies parsed by hand, errors, authentication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

from fastapi import Depends, FastAPI
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from lorafleet.cluster.errors import known_errors
from lorafleet.cluster.http.bodies import ErrorBody

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]

NULL: Schema = {"type": "null"}


def replies(model: object, *statuses: int, **more: Any) -> Responses:
    """For `responses=`: these statuses answer with this model."""
    return {status: {"model": model, **more} for status in statuses or (200,)}


def error_responses(*statuses: HTTPStatus, model: type[BaseModel] = ErrorBody) -> Responses:
    """For `responses=` of a route or router: each status with the codes that come with it, in a body of `model`."""
    codes: dict[int, set[str]] = {}
    for error in known_errors():
        codes.setdefault(error.status, set()).update(error.codes)
    return {
        status.value: {
            "model": model,
            "description": f"{status.phrase}: {', '.join(sorted(codes.get(status, ()))) or 'the code says why'}",
        }
        for status in statuses
    }


NEUTRAL_DESCRIPTION = "Accepted, without an effect."
"""Of fields that are accepted in values without one."""


def bearer(name: str, is_needed: bool) -> list[Dependency]:
    """For `dependencies=` of a router: says that its routes want a secret. What checks it is another dependency."""
    return [Depends(HTTPBearer(auto_error=False, scheme_name=name))] if is_needed else []


def body_of(kind: type[BaseModel], neutral: Mapping[str, Sequence[object]]) -> Schema:
    """For `openapi_extra=` of a route that hands its body to `parse_body(kind, ...)`.

    Null counts as absent. neutral: fields without an effect, and the values in which they are accepted.
    """
    schema = _schema_of(kind)
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = _or_null(field)
    for name, values in neutral.items():
        if values:
            schema["properties"][name] = {"enum": [*values, None], "description": NEUTRAL_DESCRIPTION}
    schema["additionalProperties"] = {"enum": [None, False, 0, "", [], {}]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def events_of(chunk: type[BaseModel], error: type[BaseModel] = ErrorBody, *, has_end: bool = True) -> Schema:
    """For `responses=` of a route that streams: an event is a chunk, an error in the end, or [DONE] with `has_end`."""
    told = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_schema_of(chunk), _schema_of(error)]},
    }
    data = {"anyOf": [told, {"const": "[DONE]"}]} if has_end else told
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {"text/event-stream": {"itemSchema": event}}


def _schema_of(kind: type[BaseModel]) -> Schema:
    """The model's schema, complete in itself."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(definitions[node["$ref"].rpartition("/")[2]])
        return {key: inlined(value) for key, value in node.items()}

    return cast(Schema, inlined(schema))


def _or_null(field: Schema) -> Schema:
    choices = field.get("anyOf")
    if choices is not None:
        return field if NULL in choices else field | {"anyOf": [*choices, NULL]}
    inner = {name: value for name, value in field.items() if name not in ("title", "description", "default")}
    outer = {name: value for name, value in field.items() if name not in inner}
    return {"anyOf": [inner, NULL]} | outer


class DescribedApp(FastAPI):
    """An application whose description is as true as its routes are."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            document = super().openapi()
            for operations in document["paths"].values():
                for operation in operations.values():
                    _without_what_fastapi_assumes(operation["responses"])
            for name in ("HTTPValidationError", "ValidationError"):
                document.get("components", {}).get("schemas", {}).pop(name, None)
        return super().openapi()


def _without_what_fastapi_assumes(responses: dict[str, dict[str, Any]]) -> None:
    """That it refuses bodies with 422, for which this service has 400, and that every reply may be any JSON."""
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    for response in responses.values():
        content = response.get("content", {})
        if len(content) > 1 and content.get("application/json") == {"schema": {}}:
            del content["application/json"]
