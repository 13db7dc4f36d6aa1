"""``POST /v1/embeddings``: texts become vectors."""

import base64
from functools import partial
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from edgelm.scoring.results import Pooling
from edgelm.serve.call import Call
from edgelm.serve.fields import PLAIN_TEXTS, FilledText, ModelField, TokenIds, prompts_of
from edgelm.serve.limits import MAX_INPUTS
from edgelm.serve.operation import Operation, json_answer
from edgelm.serve.strict import NO_EFFECT, in_words, unsupported
from edgelm.text.prompts import Prompt

Inputs = Annotated[
    FilledText
    | TokenIds
    | Annotated[list[FilledText], Field(min_length=1, max_length=MAX_INPUTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)],
    in_words(f"{PLAIN_TEXTS}; at most {MAX_INPUTS:,} texts"),
]


class EmbeddingRequest(ModelField):
    """Texts to turn into vectors."""

    input: Inputs = Field(description="A text, token ids, or a list of texts or of lists of token ids.")
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="Numbers, or the bytes of little-endian float32 numbers in base64."
    )
    dimensions: None = unsupported("vectors have the model's own size")
    user: str | None = Field(default=None, max_length=1024, description=NO_EFFECT + "nothing is stored by user.")
    pooling: Pooling | None = Field(
        default=None, description="mean: the average over all tokens (default); last: the last token's."
    )
    normalize: bool | None = Field(default=None, description="Scale vectors to length 1, as OpenAI's are (default).")


class Embedding(BaseModel):
    """One text's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """Vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def embed(call: Call, body: EmbeddingRequest) -> Response:
    """Answer a request for embeddings. Other requests get their turn between two texts."""
    data, tokens = [], 0
    for index, text in enumerate(prompts_of(body.input)):
        vector, count = await call.compute(partial(_vector, call, body, text))
        data.append(Embedding(index=index, embedding=vector))
        tokens += count
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return json_answer(EmbeddingAnswer(data=data, model=call.name, usage=usage))


def _vector(call: Call, body: EmbeddingRequest, text: Prompt) -> tuple[list[float] | str, int]:
    """The vector of `text` in the asked format, and the number of its tokens."""
    model = call.model
    vector = model.embed(text, pooling=body.pooling or "mean", normalize=body.normalize is not False)
    count = len(model.tokenizer.encode_prompt(text)) if isinstance(text, str) else len(text)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii"), count
    return vector.tolist(), count


EMBEDDINGS = Operation(
    "/v1/embeddings", EmbeddingRequest, EmbeddingAnswer, embed, "Turn texts into vectors.", prompt_field="input"
)
