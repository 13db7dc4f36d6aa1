"""Text over HTTP with FastAPI: the event loop never waits for a token, and a text ends when its client leaves.

pip install fastapi uvicorn
uvicorn fastapi_app:app
curl -N localhost:8000/stream --json '{"prompt": "Once upon a time"}'
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

import edgelm

# Limits how many texts are generated at once, because each has a cache of model.memory.cache_bytes.
slots = asyncio.Semaphore(4)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with edgelm.load(os.environ.get("EDGELM_MODEL")) as app.state.model:
        app.state.model.warmup()
        yield


app = FastAPI(lifespan=lifespan)


class Request(BaseModel):
    prompt: str = Field(min_length=1, max_length=4000)
    max_new_tokens: int = Field(40, ge=1, le=200)
    temperature: float = Field(0.8, gt=0.01, le=2)
    seed: int | None = Field(None, ge=0)

    def options(self) -> dict[str, object]:
        return self.model_dump(exclude={"prompt"}) | {"max_time": 20.0, "context_overflow": "truncate"}


@app.post("/generate")
async def generate(request: Request) -> dict[str, object]:
    try:
        async with slots:
            completion = await app.state.model.agenerate(request.prompt, **request.options())
    except (edgelm.PromptError, edgelm.ConfigError) as error:
        raise HTTPException(400, str(error)) from None
    return {"text": completion.text, "finish_reason": completion.choices[0].finish_reason}


@app.post("/stream")
async def stream(request: Request) -> StreamingResponse:
    async def texts() -> AsyncIterator[str]:
        async with slots, aclosing(app.state.model.astream(request.prompt, **request.options())) as chunks:
            async for chunk in chunks:
                yield chunk.text

    return StreamingResponse(texts(), media_type="text/plain")
