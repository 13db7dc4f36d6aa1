"""``POST /v1/explain``, edgelm's own: how likely each token of a text was, and where attention looked."""

from pydantic import BaseModel, Field
from starlette.responses import Response

from edgelm.pictures.explanation_data import explanation_data
from edgelm.serve.call import Call
from edgelm.serve.errors import ApiError
from edgelm.serve.fields import ModelField, OnePrompt
from edgelm.serve.limits import MAX_ATTENTION_BYTES, MAX_TOP_LOGPROBS
from edgelm.serve.operation import Operation, json_answer
from edgelm.serve.scores import ScoredToken


class ExplainRequest(ModelField):
    """A text to explain."""

    text: OnePrompt = Field(description="A text or token ids.")
    top: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="How many of the likeliest tokens to tell at each place; 5.",
    )


class ExplainedToken(BaseModel):
    """A token of the text, and the likeliest tokens in its place."""

    token_id: int
    text: str
    logprob: float | None
    """Null where nothing precedes it."""
    top: list[ScoredToken]


class ExplainAnswer(BaseModel):
    """A text as the model saw it."""

    model: str
    tokens: list[ExplainedToken]
    following: list[ScoredToken]
    """The likeliest tokens after the text."""
    prefix_tokens: int
    """Of the prefix that stands before the text; 0 without one."""
    layers: int
    heads: int
    attentions: str
    """Base64 of a byte for each share, 255 for all of it: by layer, then head, then token. Token t (from 0) has t + 1
    shares, those of the tokens up to itself; where there is a prefix, that of the whole prefix stands before them."""


async def explain(call: Call, body: ExplainRequest) -> Response:
    """Answer a request for an explanation."""
    model, top = call.model, 5 if body.top is None else body.top
    if model.graph.device.kind != "cpu":
        raise ApiError(400, f"texts are explained on the CPU only, and this model runs on {model.graph.device}")

    def read() -> ExplainAnswer:
        found = model.explain(body.text, top=top, max_attention_bytes=MAX_ATTENTION_BYTES)
        return ExplainAnswer(**explanation_data(found, call.name))

    return json_answer(await call.compute(read))


EXPLAIN = Operation(
    "/v1/explain",
    ExplainRequest,
    ExplainAnswer,
    explain,
    "Tell how likely each token of a text was, and where attention looked.",
    prompt_field="text",
)
