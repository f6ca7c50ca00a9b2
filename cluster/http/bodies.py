"""The body of an error, which every route shares."""

from __future__ import annotations

from pydantic import Field

from lorafleet.workers.config import Settings


class ErrorDetail(Settings):
    """The error."""

    message: str = Field(description="For people; carries no paths of the server.")
    type: str
    param: str | None = Field(description="The field at fault, where there is one.")
    code: str = Field(description="For programs, and stable.")


class ErrorBody(Settings):
    """Any error."""

    error: ErrorDetail
