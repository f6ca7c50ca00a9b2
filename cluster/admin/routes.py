"""The admin plane's routes: adapters are loaded, replaced, pinned, tried and deleted here, and workers looked at.

Bodies in and out are the models of this file. Errors are raised; `http_app` gives them a status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import ConfigDict, Field

from lorafleet.adapter_store.manifest import AdapterChat, AdapterManifest
from lorafleet.cluster.admin.client import ControlPlane
from lorafleet.cluster.admin.peer_routes import add_peer_routes
from lorafleet.cluster.config import NAME_PATTERN, Warm
from lorafleet.cluster.errors import BadRequest
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.description import bearer, error_responses, replies
from lorafleet.cluster.wire import Placed, Validation
from lorafleet.workers.config import Settings
from lorafleet.workers.state import WorkerState

Name = Annotated[str, Path(description="The adapter's name.", json_schema_extra={"pattern": NAME_PATTERN})]


class PutAdapter(Settings):
    """Body of a load: the adapter that a name is to stand for."""

    model_config = ConfigDict(strict=True)

    source: str = Field(min_length=1, description="Name of a configured source.")
    key: str = Field(min_length=1, description="Where the source has the adapter.")
    revision: str | None = Field(
        default=None, min_length=1, description="Of a hub source: branch, tag or commit; the same as `key@revision`."
    )
    pinned: bool = Field(default=False, description="Resident on every worker and never evicted.")
    warm: Warm = Field(
        default=1,
        description="`all`, or on how many workers to make it resident before the reply, beside those that hold the "
        "version it replaces.",
    )


class ValidateAdapter(Settings):
    """Body of a dry run: the adapter to check without loading it."""

    model_config = ConfigDict(strict=True)

    source: str = Field(min_length=1, description="Name of a configured source.")
    key: str = Field(min_length=1, description="Where the source has the adapter.")


class ChatReply(Settings):
    """An adapter's own form of conversations, and its own tokens."""

    template: str | None = Field(description="Its chat template; null: the base's.")
    end_token_ids: tuple[int, ...] = Field(description="Tokens that end its answers, beside the base's own.")
    own_tokens: dict[str, int] = Field(description="Tokens that its tokenizer has beside the base's, and their ids.")


class AdapterReply(Settings):
    """An adapter that has a name."""

    name: str
    version: str = Field(description="Digest of what is served.")
    source: str
    key: str
    rank: int = Field(description="Largest rank of any module.")
    targets: tuple[str, ...] = Field(description="Modules that it changes, by the last part of their names.")
    bytes: int = Field(description="Size of its weights as they are served.")
    warnings: tuple[str, ...] = Field(
        description="What of the adapter changes nothing though its author may expect it."
    )
    chat: ChatReply | None = Field(description="What its folder says of conversations; null: nothing.")
    pages: int | None = Field(description="Pages of a worker's pool that it takes; null where that is not known.")
    pinned: bool
    state: Literal["resident", "loading", "stored"] = Field(description="The best that any worker has.")
    workers: dict[str, Literal["resident", "loading", "retired", "absent", "unknown"]] = Field(
        description="What each worker has of this version; `unknown` where it did not answer in time."
    )


class ProblemReply(Settings):
    """Something in the state folder that is not used, why it cannot be written, or a `user_config` that was refused."""

    code: Literal["store_damaged", "store_full", "store_not_writable", "user_config_refused"]
    kind: Literal["name", "version", "desired", "database", "folder", "user_config"]
    entry: str = Field(description="The name, the version or the file; empty for the folder and a `user_config`.")
    reason: str


class AdaptersReply(Settings):
    """Adapters that have a name, in order of their names."""

    adapters: tuple[AdapterReply, ...]
    problems: tuple[ProblemReply, ...] = Field(
        description="What is wrong with the store's state folder, and with the newest `user_config`."
    )


class DeletedReply(Settings):
    """An adapter that has lost its name; streams on it end as they began."""

    name: str
    deleted: Literal[True] = True


class EstimateReply(Settings):
    """Pages that an adapter would take on one worker now."""

    fits: bool
    pages: int | None
    evicts: tuple[str, ...] = Field(description="Versions that would leave the pool for it.")
    refusal: str | None = Field(description="Why it does not fit.")


class ValidationReply(Settings):
    """Result of a dry run: the adapter can be served, and takes these pages on each worker."""

    version: str
    rank: int
    targets: tuple[str, ...]
    bytes: int
    warnings: tuple[str, ...]
    chat: ChatReply | None
    pages: int | None
    fits: bool = Field(description="Whether every worker has room for it.")
    workers: dict[str, EstimateReply]


class WorkersReply(Settings):
    """All workers."""

    workers: tuple[WorkerState, ...] = Field(description="Those that answer.")
    silent: tuple[str, ...] = Field(description="Ids of those that live and did not answer within 3 seconds.")


def build_router(control: ControlPlane, keys: Keys, *, hubs: Collection[str] = ()) -> APIRouter:
    """All routes that need the admin token: ours, and the load and unload routes of vLLM and SGLang."""

    async def check_admin(request: Request) -> None:
        keys.check_admin(request.headers.get("authorization"))

    admin = APIRouter(
        prefix="/admin/v1",
        tags=["admin"],
        responses=error_responses(HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE),
    )
    is_absent = error_responses(HTTPStatus.NOT_FOUND)
    may_be_bad = error_responses(HTTPStatus.BAD_REQUEST)
    may_not_fit = error_responses(HTTPStatus.CONFLICT)
    may_be_refused = error_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)

    @admin.get("/adapters", summary="Adapters in order of their names", responses=replies(AdaptersReply) | may_be_bad)
    async def list_adapters(
        limit: Annotated[int | None, Query(ge=1, description="Most adapters to list; all without it.")] = None,
        after: Annotated[str, Query(description="Begin with the first name behind this one.")] = "",
    ) -> Response:
        page, problems = await asyncio.gather(control.adapters(after, limit), control.problems())

        def written() -> bytes:
            # One by one: thousands of them would else keep the interpreter for one long call.
            adapters = [adapter_reply(placed).model_dump_json().encode() for placed in page]
            found = [ProblemReply.model_validate(asdict(problem)).model_dump_json().encode() for problem in problems]
            return b'{"adapters":[%b],"problems":[%b]}' % (b",".join(adapters), b",".join(found))

        return Response(await asyncio.to_thread(written), media_type="application/json")

    @admin.get("/adapters/{name:path}", summary="One adapter", responses=is_absent)
    async def get_adapter(name: Name) -> AdapterReply:
        return adapter_reply(await control.adapter(name))

    @admin.put(
        "/adapters/{name:path}",
        summary="Load an adapter, or replace it everywhere at once",
        responses=may_be_refused | is_absent | may_not_fit,
    )
    async def put_adapter(name: Name, body: PutAdapter) -> AdapterReply:
        key = body.key
        if body.revision is not None:
            if body.source not in hubs:
                raise BadRequest(
                    f"revision={body.revision[:64]!a} is for hub sources only; {body.source[:128]!a} is not one",
                    "revision",
                )
            key = f"{key}@{body.revision}"
        return adapter_reply(await control.put(name, source=body.source, key=key, pinned=body.pinned, warm=body.warm))

    @admin.delete("/adapters/{name:path}", summary="Take an adapter's name away", responses=is_absent)
    async def delete_adapter(name: Name) -> DeletedReply:
        await control.delete(name)
        return DeletedReply(name=name)

    @admin.post(
        "/adapters/{name:path}/pin",
        summary="Keep an adapter resident on every worker",
        responses=is_absent | may_not_fit,
    )
    async def pin_adapter(name: Name) -> AdapterReply:
        return adapter_reply(await control.set_pinned(name, True))

    @admin.post("/adapters/{name:path}/unpin", summary="Let an adapter be evicted again", responses=is_absent)
    async def unpin_adapter(name: Name) -> AdapterReply:
        return adapter_reply(await control.set_pinned(name, False))

    @admin.post(
        "/adapters:validate",
        summary="Try an adapter: what it would take, what it would evict",
        responses=may_be_refused | is_absent,
    )
    async def validate_adapter(body: ValidateAdapter) -> ValidationReply:
        return validation_reply(await control.validate(body.source, body.key))

    @admin.get("/workers", summary="All workers")
    async def list_workers() -> WorkersReply:
        listed = await control.workers()
        return WorkersReply(workers=listed.states, silent=listed.silent)

    needs_token = keys.admin_token is not None or bool(keys.api_keys)
    router = APIRouter(
        dependencies=[Depends(check_admin), *bearer("admin_token", needs_token)],
        responses=error_responses(HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN),
    )
    router.include_router(admin)
    add_peer_routes(router, control)
    return router


def adapter_reply(placed: Placed) -> AdapterReply:
    """An adapter as the admin plane shows it."""
    adapter = placed.adapter
    best = next((state for state in ("resident", "loading") if state in placed.workers.values()), "stored")
    return AdapterReply(
        name=adapter.name,
        source=adapter.source,
        key=adapter.key,
        pages=placed.pages,
        pinned=adapter.pinned,
        state=best,
        workers=placed.workers,
        **_describe(adapter.manifest),
    )


def validation_reply(validation: Validation) -> ValidationReply:
    """A dry run as the admin plane shows it."""
    estimates = validation.estimates
    return ValidationReply(
        pages=next((estimate.pages for estimate in estimates if estimate.pages is not None), None),
        fits=all(estimate.refusal is None for estimate in estimates),
        workers={
            estimate.worker_id: EstimateReply(
                fits=estimate.refusal is None, pages=estimate.pages, evicts=estimate.evicts, refusal=estimate.refusal
            )
            for estimate in estimates
        },
        **_describe(validation.manifest),
    )


def _describe(manifest: AdapterManifest) -> dict[str, object]:
    return {
        "version": manifest.version,
        "rank": manifest.rank,
        "targets": manifest.targets,
        "bytes": manifest.num_bytes,
        "warnings": manifest.warnings,
        "chat": None if manifest.chat is None else _chat_reply(manifest.chat),
    }


def _chat_reply(chat: AdapterChat) -> ChatReply:
    own_tokens = {token.content: token.id for token in chat.own_tokens}
    return ChatReply(template=chat.template, end_token_ids=chat.end_token_ids, own_tokens=own_tokens)
