"""edgelm bundles for Simon Willison's `llm` command and library.

    llm install '.[cpu]' ./examples/llm-edgelm      # in a clone of the repository
    llm -m edgelm "Once upon a time" -o seed 7 -o max_new_tokens 40
    EDGELM_MODEL=gpt2-int8 llm -m edgelm "Once upon a time"

A bundle continues text. So a conversation (`llm -c`) is one text that grows, and a system prompt is put before it.
"""

import os
from collections.abc import Iterator
from functools import cache

import llm
from pydantic import Field

import edgelm


@llm.hookimpl
def register_models(register) -> None:
    register(EdgeLM())


@cache
def loaded(bundle: str | None, prefix: str | None) -> edgelm.Model:
    return edgelm.load(bundle, prefix=prefix)


class EdgeLM(llm.Model):
    model_id = "edgelm"
    can_stream = True

    class Options(llm.Options):
        max_new_tokens: int | None = Field(default=None, description="Maximum number of new tokens")
        temperature: float | None = Field(default=None, description="Below 1: more predictable; above 1: more varied")
        top_k: int | None = Field(default=None, description="Sample from the K likeliest tokens")
        top_p: float | None = Field(default=None, description="Sample from the likeliest tokens that sum to P")
        repetition_penalty: float | None = Field(default=None, description="Above 1: fewer repetitions")
        seed: int | None = Field(default=None, description="Makes sampling repeatable")
        stop: str | None = Field(default=None, description="Stop before this text")
        prefix: str | None = Field(default=None, description="A prefix file to put before every prompt")

    def execute(self, prompt, stream, response, conversation) -> Iterator[str]:
        options = prompt.options.model_dump(exclude_none=True)
        model = loaded(os.environ.get("EDGELM_MODEL"), options.pop("prefix", None))
        if "stop" in options:
            options["stop_strings"] = options.pop("stop")
        stats = None
        try:
            for chunk in model.stream(_text(prompt, conversation), **options):
                stats = chunk.stats or stats
                if chunk.text:
                    yield chunk.text
        except edgelm.EdgelmError as error:
            raise llm.ModelError(str(error)) from None
        if stats is not None:
            response.set_usage(input=stats.prompt_tokens, output=stats.new_tokens)


def _text(prompt, conversation) -> str:
    """The system prompt, all turns of the conversation in order, and the new prompt."""
    turns = [] if conversation is None else conversation.responses
    history = "".join(f"{turn.prompt.prompt}{turn.text()}" for turn in turns)
    system = next((p.system for p in [*(turn.prompt for turn in turns), prompt] if p.system), None)
    return (f"{system}\n\n" if system else "") + history + prompt.prompt
