"""edgelm as a LangChain model: invoke, stream, batch and their async forms, stop sequences and seeds.

pip install langchain-core

    llm = EdgeLM(bundle="gpt2-int8", options={"max_new_tokens": 40})
    chain = PromptTemplate.from_template("Once upon a time there was a {animal}") | llm
    chain.invoke({"animal": "dog"}, stop=["."], seed=7)
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.language_models.llms import LLM
from langchain_core.outputs import GenerationChunk
from pydantic import Field, PrivateAttr

import edgelm


class EdgeLM(LLM):
    """A bundle as a LangChain model. A call's keyword arguments (``seed=7``) override `options`; names are edgelm's."""

    bundle: str | None = None
    """Folder of the bundle; None for the embedded model."""
    prefix: str | None = None
    """A prefix file. One bundle with several prefix files serves several tasks."""
    options: dict[str, Any] = Field(default_factory=dict)

    _model: edgelm.Model = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        self._model = edgelm.load(self.bundle, prefix=self.prefix)

    @property
    def _llm_type(self) -> str:
        return "edgelm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """The key of LangChain's cache: the bundle's content, not its path."""
        prefix = self._model.prefix
        return {
            "model_name": self._model.bundle.manifest.source.name,
            "digest": self._model.bundle.manifest.digest,
            "prefix": None if prefix is None else prefix.sha256,
            "options": self.options,
        }

    def _call(self, prompt: str, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> str:
        return self._model.generate(prompt, **self._merged_options(stop, kwargs)).text

    async def _acall(self, prompt: str, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> str:
        return (await self._model.agenerate(prompt, **self._merged_options(stop, kwargs))).text

    def _stream(
        self, prompt: str, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[GenerationChunk]:
        for piece in self._model.stream(prompt, **self._merged_options(stop, kwargs)):
            chunk = _chunk(piece)
            if run_manager is not None and chunk.text:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self, prompt: str, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[GenerationChunk]:
        async for piece in self._model.astream(prompt, **self._merged_options(stop, kwargs)):
            chunk = _chunk(piece)
            if run_manager is not None and chunk.text:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _merged_options(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        return self.options | kwargs | ({} if stop is None else {"stop_strings": stop})


def _chunk(piece: edgelm.Chunk) -> GenerationChunk:
    info = None if piece.finish_reason is None else {"finish_reason": piece.finish_reason}
    return GenerationChunk(text=piece.text, generation_info=info)


if __name__ == "__main__":
    for text in EdgeLM(options={"max_new_tokens": 40}).stream("Once upon a time", seed=7):
        print(text, end="", flush=True)
    print()
