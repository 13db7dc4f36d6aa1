"""``POST /v1/score`` and ``POST /v1/choose``, edgelm's own: how likely texts are after a prompt."""

from typing import Annotated

from pydantic import BaseModel, Field
from starlette.responses import Response

from edgelm.scoring.results import LengthNormalization, Option, Score
from edgelm.serve.call import Call
from edgelm.serve.fields import ModelField, OnePrompt
from edgelm.serve.limits import MAX_OPTIONS
from edgelm.serve.operation import Operation, json_answer


class ScoreRequest(ModelField):
    """A text to measure after a prompt."""

    prompt: OnePrompt = Field(description="A text or token ids.")
    continuation: OnePrompt = Field(description="A text or token ids that follow the prompt.")


class ScoredToken(BaseModel):
    """A token and its log-probability, in nats."""

    token_id: int
    text: str
    logprob: float


class ScoreAnswer(BaseModel):
    """The log-probability of a continuation, in nats: of all of it, and of each token."""

    model: str
    logprob: float
    tokens: list[ScoredToken]


class ChooseRequest(ModelField):
    """Texts to compare after a prompt."""

    prompt: OnePrompt = Field(description="A text or token ids.")
    options: Annotated[list[OnePrompt], Field(min_length=2, max_length=MAX_OPTIONS)] = Field(
        description="The texts, or the token ids, to compare; no two of them equal."
    )
    length_normalization: LengthNormalization | None = Field(
        default=None, description="What log-probabilities are divided by; nothing by default."
    )
    calibrate: OnePrompt | None = Field(
        default=None, description="A prompt without content; log-probabilities after it are subtracted."
    )


class JudgedOption(BaseModel):
    """A compared text."""

    text: str
    probability: float
    """Among the options: their probabilities sum to 1."""
    score: float
    """`logprob` after calibration and length normalization."""
    logprob: float
    tokens: int


class ChooseAnswer(BaseModel):
    """The likeliest option, and all of them in the order given."""

    model: str
    index: int
    best: JudgedOption
    options: list[JudgedOption]


async def score(call: Call, body: ScoreRequest) -> Response:
    """Answer a request for a score."""
    result: Score = await call.compute(lambda: call.model.score(body.prompt, body.continuation))
    tokens = [ScoredToken(token_id=t.token_id, text=t.text, logprob=t.logprob) for t in result.tokens]
    return json_answer(ScoreAnswer(model=call.name, logprob=result.logprob, tokens=tokens))


async def choose(call: Call, body: ChooseRequest) -> Response:
    """Answer a request for a choice."""
    normalization = body.length_normalization or "none"
    result = await call.compute(
        lambda: call.model.choose(
            body.prompt, body.options, length_normalization=normalization, calibrate=body.calibrate
        )
    )
    options = [_judged(option) for option in result.options]
    return json_answer(ChooseAnswer(model=call.name, index=result.index, best=options[result.index], options=options))


def _judged(option: Option) -> JudgedOption:
    return JudgedOption(
        text=option.text,
        probability=option.probability,
        score=option.score,
        logprob=option.logprob,
        tokens=option.tokens,
    )


SCORE = Operation("/v1/score", ScoreRequest, ScoreAnswer, score, "Measure how likely a text is after a prompt.")
CHOOSE = Operation("/v1/choose", ChooseRequest, ChooseAnswer, choose, "Choose the likeliest of several texts.")
