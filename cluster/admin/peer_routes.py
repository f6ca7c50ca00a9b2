"""Load and unload routes of vLLM (`/v1/load_lora_adapter`) and SGLang (`/load_lora_adapter`), for drop-in use.

Requests, status codes and replies are theirs. The effect is ours: a path must lie in a configured source, and a load is
a roll-out over all workers.
"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lorafleet.adapter_store.errors import UnknownAdapter, UnknownKey
from lorafleet.cluster.admin.client import ControlPlane
from lorafleet.cluster.admin.peer_bodies import LoadAdapter, SglangReply, UnloadAdapter, VllmErrorBody
from lorafleet.cluster.errors import NameTaken, describe
from lorafleet.cluster.http.bodies import ErrorBody
from lorafleet.cluster.http.description import replies


def add_peer_routes(router: APIRouter, control: ControlPlane) -> None:
    """Add all four routes."""
    router.include_router(_vllm_router(control))
    router.include_router(_sglang_router(control))


def _vllm_router(control: ControlPlane) -> APIRouter:
    """200 with a sentence; 404 for what is not there and 400 for all else that the caller got wrong, as vLLM does."""
    router = APIRouter(
        prefix="/v1",
        tags=["vLLM"],
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
        | replies(VllmErrorBody, 404, 500, 503)
        | replies(VllmErrorBody | ErrorBody, 400, description="What was asked failed, or the body is none."),
    )

    @router.post("/load_lora_adapter", summary="vLLM's: load an adapter")
    async def load(body: LoadAdapter) -> Response:
        if not body.lora_name or not body.lora_path:
            return _vllm_error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        try:
            if not body.load_inplace and await control.has(body.lora_name):
                return _vllm_taken(body.lora_name)
            source, key = await control.locate(body.lora_path)
            await control.put(body.lora_name, source=source, key=key, replace=body.load_inplace)
        except NameTaken:
            return _vllm_taken(body.lora_name)
        except Exception as error:
            return _vllm_failure(error)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter", summary="vLLM's: unload an adapter")
    async def unload(body: UnloadAdapter) -> Response:
        if not body.lora_name:
            return _vllm_error(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await control.delete(body.lora_name)
        except UnknownAdapter:
            return _vllm_error(404, "NotFoundError", f"The lora adapter '{body.lora_name}' cannot be found.")
        except Exception as error:
            return _vllm_failure(error)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _vllm_error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _vllm_taken(name: str) -> Response:
    message = f"The lora adapter '{name}' has already been loaded. To replace it, set 'load_inplace'."
    return _vllm_error(400, "InvalidUserInput", message)


def _vllm_failure(error: Exception) -> Response:
    reply = describe(error)
    if isinstance(error, UnknownKey):
        return _vllm_error(404, "NotFoundError", reply.message)
    if reply.status >= 500:
        kind = "ServiceUnavailableError" if reply.status == 503 else "InternalServerError"
        response = _vllm_error(reply.status, kind, reply.message)
        response.headers.update(reply.headers)
        return response
    return _vllm_error(400, "BadRequestError", reply.message)


def _sglang_router(control: ControlPlane) -> APIRouter:
    """200, or 400 for whatever goes wrong, always with the adapters that are loaded then, as SGLang does."""
    router = APIRouter(
        tags=["SGLang"],
        responses=replies(SglangReply)
        | replies(SglangReply | ErrorBody, 400, description="What was asked failed, or the body is none."),
    )

    @router.post("/load_lora_adapter", summary="SGLang's: load an adapter")
    async def load(body: LoadAdapter) -> Response:
        for field in ("lora_name", "lora_path"):
            if not getattr(body, field):
                return await _sglang_reply(control, f"Failed to load LoRA adapter: {field} is missing.")
        try:
            if await control.has(body.lora_name):
                raise NameTaken(
                    f"an adapter is named {body.lora_name!r} already; unload it first, or replace it", "lora_name"
                )
            source, key = await control.locate(body.lora_path)
            await control.put(body.lora_name, source=source, key=key, pinned=body.pinned, replace=False)
        except NameTaken:
            message = f"Failed to load LoRA adapter {body.lora_name}: an adapter of this name is loaded already."
            return await _sglang_reply(control, message)
        except Exception as error:
            return await _sglang_reply(
                control, f"Failed to load LoRA adapter {body.lora_name}: {describe(error).message}"
            )
        return await _sglang_reply(control, None)

    @router.post("/unload_lora_adapter", summary="SGLang's: unload an adapter")
    async def unload(body: UnloadAdapter) -> Response:
        try:
            await control.delete(body.lora_name)
        except Exception as error:
            message = f"Failed to unload LoRA adapter {body.lora_name}: {describe(error).message}"
            return await _sglang_reply(control, message)
        return await _sglang_reply(control, None)

    return router


async def _sglang_reply(control: ControlPlane, error_message: str | None) -> Response:
    try:
        loaded = {adapter.name: f"{adapter.source}/{adapter.key}" for adapter in await control.records()}
    except Exception:
        loaded = {}
    body = {"success": error_message is None, "error_message": error_message, "loaded_adapters": loaded}
    return JSONResponse(body, 200 if error_message is None else 400)
