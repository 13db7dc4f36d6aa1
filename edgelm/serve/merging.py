"""Several streams at once."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merged(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """The items of all `streams` as they come, each with its stream's number.

    An error of one stream is raised here, and closing this generator closes them all.
    """
    items: asyncio.Queue[tuple[int, Item] | None] = asyncio.Queue()

    async def read(number: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream) as opened:
                async for item in opened:
                    items.put_nowait((number, item))
        finally:
            items.put_nowait(None)

    tasks = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    try:
        for _ in tasks:
            while (item := await items.get()) is not None:
                yield item
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
