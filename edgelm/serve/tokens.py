"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, with the fields of vLLM's routes of these names."""

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from edgelm.bundle.chat_template import read_chat_template
from edgelm.decoding.generation_config import bos_token_id
from edgelm.serve.call import Call
from edgelm.serve.fields import ModelField, Text, TokenIds
from edgelm.serve.operation import Operation, Site, json_answer


class TokenizeRequest(ModelField):
    """A text to cut into tokens."""

    prompt: Text
    add_special_tokens: bool | None = Field(
        default=None, description="Add the tokens that the model expects before a text (default)."
    )
    return_token_strs: bool | None = Field(default=None, description="Return the tokens' texts too.")


class TokenizeAnswer(BaseModel):
    """A text's tokens."""

    count: int
    max_model_len: int
    """The model's context, in tokens."""
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(ModelField):
    """Tokens to join."""

    tokens: TokenIds


class DetokenizeAnswer(BaseModel):
    """The tokens' text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What lm-eval asks of a tokenizer that it does not have."""

    eos_token: str | None
    """The text of the token that ends a text."""
    bos_token: str | None
    """The text of the token that begins one, where the model has one."""
    pad_token: None = None
    chat_template: str | None


async def tokenizer_info(request: Request) -> Response:
    """``GET /tokenizer_info``: the special tokens and the chat template of the default model."""
    site: Site = request.app.state.site
    async with site.shelf.lend() as served:
        model = served.model
        ends, begin = model.generation_config.eos_token_id, bos_token_id(model.bundle)
        chat = read_chat_template(model.bundle)
        info = TokenizerInfo(
            eos_token=model.tokenizer.decode(ends[:1]) if ends else None,
            bos_token=None if begin is None else model.tokenizer.decode([begin]),
            chat_template=None if chat is None else chat.templates.get("default"),
        )
    return json_answer(info)


async def tokenize(call: Call, body: TokenizeRequest) -> Response:
    """Answer a request for tokens."""
    tokenizer = call.model.tokenizer

    def cut() -> TokenizeAnswer:
        whole = body.add_special_tokens is not False
        ids = tokenizer.encode_prompt(body.prompt) if whole else tokenizer.encode(body.prompt, add_special_tokens=False)
        return TokenizeAnswer(
            count=len(ids),
            max_model_len=call.model.bundle.manifest.architecture.context_length,
            tokens=ids,
            token_strs=[tokenizer.decode([token]) for token in ids] if body.return_token_strs else None,
        )

    return json_answer(await call.compute(cut))


async def detokenize(call: Call, body: DetokenizeRequest) -> Response:
    """Answer a request for a text."""
    return json_answer(DetokenizeAnswer(prompt=await call.compute(lambda: call.model.tokenizer.decode(body.tokens))))


TOKENIZE = Operation("/tokenize", TokenizeRequest, TokenizeAnswer, tokenize, "Cut a text into tokens.")
DETOKENIZE = Operation(
    "/detokenize", DetokenizeRequest, DetokenizeAnswer, detokenize, "Join tokens to a text.", prompt_field="tokens"
)
