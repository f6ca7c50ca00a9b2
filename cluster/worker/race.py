"""Runs the sides of a connection beside each other until one of them ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def until_one_ends(*sides: Awaitable[Any]) -> None:
    """Run all until the first ends, and cancel the others. Raises what that one raises."""
    tasks = [asyncio.ensure_future(side) for side in sides]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
