"""A loaded model, through which every program reaches the rooms; `edgelm.loading.load` makes one."""

import os
import time
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from contextvars import copy_context
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol, Self, Unpack

import numpy.typing as npt

from edgelm.bundle.chat_template import read_chat_template
from edgelm.bundle.small_files import check_path
from edgelm.decoding.generation_config import GenerationConfig, GenerationOptions, bos_token_id
from edgelm.decoding.scheduler import DEFAULT_MAX_ROWS
from edgelm.engine.graph import Graph
from edgelm.engine.memory import ModelMemory
from edgelm.engine.session import Session
from edgelm.errors import PromptError
from edgelm.generation.asynchronous import EitherCancel, Workers, call_in_thread, stream_in_thread
from edgelm.generation.results import Chunk, Completion
from edgelm.generation.run import TextRun
from edgelm.generation.text_generation import TextGeneration
from edgelm.generation.text_scheduler import DEFAULT_MAX_WAITING, TextScheduler
from edgelm.reuse.kv_file import KvDtype, file_type
from edgelm.reuse.pool import SessionPool, check_limit_bytes
from edgelm.reuse.prefix import Prefix, PromptEncoder, bake, learned_sha256, read_prefix
from edgelm.reuse.state import PromptState, read_state, write_state
from edgelm.scoring import explanation, text_scores
from edgelm.scoring.explanation import MAX_ATTENTION_BYTES, Explanation
from edgelm.scoring.results import LengthNormalization, Perplexity, Pooling, Score, Selection, TokenLogprobs
from edgelm.scoring.token_scores import Progress, Vector
from edgelm.text.chat import ChatFormat
from edgelm.text.constraints import ToolUse
from edgelm.text.messages import ChatMessage
from edgelm.text.prompts import Prompt
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tools import Tool, ToolChoice

if TYPE_CHECKING:  # few bundles have a task or a latent part, and importing these would slow every start
    from edgelm.generation.task_format import TaskFormat, TaskInput, TaskResult
    from edgelm.latent import Latent


class LoadedAs(Protocol):
    """The arguments with which a model was loaded. A pickle of the model is a pickle of them."""

    def again(self, digest: str, config: GenerationConfig) -> "Model":
        """Load the bundle of this `digest` once more, with the defaults `config`; raises the errors of `load`."""

    def behind(self, prefix: Prefix, prefix_cache_bytes: int, task: str | os.PathLike[str] | None) -> "LoadedAs":
        """The arguments of the model that `Model.with_prefix` makes; `task` None leaves the task to the prefix."""


class Model:
    """Text in, text out.

    Every generation runs in a cache of its own, so one model serves several threads, open streams and tasks. A model is
    pickled as the arguments of `load`, and still works in a forked child. ``with`` closes it.

    Attributes:
        bundle: the bundle that was loaded.
        graph: the loaded graph, which `close` closes too, unless `with_prefix` made the model.
        tokenizer: the bundle's tokenizer.
        prefix: keys and values that stand before every prompt; None for no prefix.
        generation_config: defaults of every generation, from the bundle's ``generation_config.json``.
        draft: the loaded graph of the small model that drafts; None without one.
        task_format: what `task` does; None where neither `load`, the prefix nor the bundle names a task.
        load_seconds: how long loading took; the statistics of every generation repeat it.
    """

    def __init__(
        self,
        graph: Graph,
        tokenizer: Tokenizer,
        generation_config: GenerationConfig | None = None,
        *,
        load_seconds: float = 0.0,
        prefix_cache_bytes: int = 0,
        prefix: Prefix | None = None,
        task_format: "TaskFormat | None" = None,
        draft: Graph | None = None,
        loaded_as: LoadedAs | None = None,
        owns_graph: bool = True,
    ) -> None:
        """Join finished parts; `load` builds them, and explains `prefix_cache_bytes`, `prefix`, the task and `draft`.

        `loaded_as` are the arguments of `load` that make an equal model; without them the model is not pickled.
        `owns_graph` says whether `close` closes the graphs too.
        """
        self._loaded_as = loaded_as
        self.bundle, self.graph, self.tokenizer, self.prefix = graph.bundle, graph, tokenizer, prefix
        self.generation_config = generation_config or GenerationConfig()
        self.task_format = task_format
        self.load_seconds = load_seconds
        self._encoder = PromptEncoder(tokenizer, prefix, bos_token_id(self.bundle))
        learned, text_state = None, None
        if prefix is not None and prefix.text is None:
            learned = prefix.content
        elif prefix is not None:  # prompts begin with the prefix's own ids, so sessions begin with nothing
            text_state = PromptState(prefix.ids, prefix.content)
        self._sessions = SessionPool(
            graph, learned, limit_bytes=prefix_cache_bytes, permanent=text_state, owns_graph=owns_graph
        )
        context_length = self.bundle.manifest.architecture.context_length - self._encoder.learned_tokens
        self.draft = draft
        self._draft_sessions = None if draft is None else SessionPool(draft, owns_graph=owns_graph)
        self._texts = TextGeneration(
            self._encoder, self._sessions, context_length, load_seconds, draft_sessions=self._draft_sessions
        )
        self._workers = Workers()
        self._schedulers: list[weakref.ref[TextScheduler]] = []

    @cached_property
    def session(self) -> Session:
        """The caller's own session, behind the prefix, for stepping by hand in one thread at a time."""
        return self.graph.session(None if self.prefix is None else self.prefix.content)

    def __enter__(self) -> Self:
        self._sessions.check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        """A pickle has the arguments of `load`, without earlier prompts and states.

        What was left to edgelm (the embedded model, threads, the device "auto") is chosen anew where it is loaded.
        """
        if self._loaded_as is None:
            raise TypeError("a model made of parts cannot be pickled: make it with edgelm.load")
        return self._loaded_as.again, (self.bundle.manifest.digest, self.generation_config)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sessions.closed

    def close(self) -> None:
        """Free the model's memory. Generations that are open in other threads or tasks end with ClosedError.

        Waits for the token, or the piece of a prompt, that another thread is computing. Closing twice is allowed.
        """
        self._workers.release()
        for scheduler in self._open_schedulers():
            scheduler.release()
        self._sessions.close()
        if self._draft_sessions is not None:
            self._draft_sessions.close()

    @cached_property
    def latent(self) -> "Latent":
        """The model's latent space; raises BundleError if the bundle has none."""
        from edgelm.latent import Latent

        return Latent(self.bundle, self.tokenizer, self._sessions, has_prefix=self.prefix is not None)

    def generate(
        self, prompt: Prompt, *, latent: npt.ArrayLike | None = None, **options: Unpack[GenerationOptions]
    ) -> Completion:
        """Continue `prompt`, a text or token ids, with `options` of `GenerationConfig` over the bundle's defaults.

        A `latent` vector (Z,), of a bundle that has a latent part, decides what is written; see `Model.latent`. The
        prompt behind it may be empty.

        Raises:
            PromptError: the prompt is empty, is neither text nor token ids, or has an unknown token id; or `latent` is
                no vector of Z numbers.
            BundleError: `latent` is given, and the bundle has no latent part.
            PrefixError: `latent` is given, and the model has a prefix.
            ContextError: the prompt is longer than the context.
            ConfigError: an option is unknown or out of range, or it contradicts another option.
            ClosedError: the model is closed, or was closed meanwhile.
        """
        run = self._run(prompt, options, latent)
        return run.completion(self._texts.stream(run))

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        each: Sequence[GenerationOptions] | None = None,
        max_rows: int = DEFAULT_MAX_ROWS,
        latent: npt.ArrayLike | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Completion]:
        """Continue many prompts of any lengths side by side: each as `generate` would, several times faster in all.

        A prompt's result does not depend on the other prompts, bit for bit. With fp32 it has the ids that `generate`
        gives. With other recipes, unless the model was loaded with ``batch_invariant=True``, the last bits of logits
        differ from `generate`, which matters where the two likeliest tokens are nearly tied.
        Searches, prompt lookup and a window work on one prompt at a time; they are refused here.

        Args:
            prompts: texts or token ids.
            each: options of each prompt, over `options`.
            max_rows: maximum number of texts that decode at a time; each takes the memory of one more context.
            latent: a vector (Z,) before all prompts, or a vector before each of them, (prompts, Z).

        Raises: as `generate`.
        """
        latents = None if latent is None else self.latent.prefixes(latent, len(prompts))
        return self._texts.batch(prompts, self.generation_config.updated(dict(options)), each, max_rows, latents)

    def scheduler(
        self,
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        max_waiting: int = DEFAULT_MAX_WAITING,
        prefix_cache_bytes: int = 0,
        drafts: bool = False,
    ) -> TextScheduler:
        """A scheduler that decodes the texts of many callers side by side, for servers; see `TextScheduler`.

        Args:
            max_rows: maximum number of texts that decode at a time; each takes the memory of one more context.
            max_waiting: how many generations may wait for a row; further ones are refused with QueueFullError.
            prefix_cache_bytes: memory for the keys and values of earlier prompts, as in `load`. They are the
                scheduler's own, and a prompt of one `key` never continues from one of another.
            drafts: whether the small model, if there is one, drafts for a text that decodes alone (docs/batches.md).
                With quantized weights, a text may then go on in another way beside others, where two tokens are nearly
                tied. CPU only, and not with `batch_invariant`.

        Raises ConfigError if an argument is out of range.
        """
        scheduler = TextScheduler(
            self._texts,
            self._sessions,
            self.generation_config,
            max_rows=max_rows,
            max_waiting=max_waiting,
            prefix_cache_bytes=prefix_cache_bytes,
            drafts=drafts,
        )
        self._schedulers = [*map(weakref.ref, self._open_schedulers()), weakref.ref(scheduler)]
        return scheduler

    def save_state(self, path: str | os.PathLike[str], prompt: Prompt, *, dtype: KvDtype | None = None) -> None:
        """Write the keys and values of `prompt` to the file `path`, for `load_state`.

        Without `dtype` the file has the type of the cache, and results are the same to the last bit. With "float16" it
        is half as large as in float32, and they are not.

        Raises:
            PromptError, ContextError: as `generate`.
            ConfigError: `dtype` is unknown, or given for a cache of integers.
            StateError: a key or value does not fit into float16.
            OSError: the file cannot be written.
        """
        file_type(dtype, self.bundle.manifest.graph.kv_dtype)
        check_path("path", path)
        ids = self._encoder.ids_to_continue(prompt)
        with self._sessions.borrowed(ids) as (session, reused):
            session.step(ids[reused:])
            state = PromptState(tuple(ids), session.remembered(len(ids)))
        write_state(path, self.bundle.manifest, state, dtype, learned_sha256(self.prefix))

    def load_state(self, path: str | os.PathLike[str]) -> PromptState:
        """Read what `save_state` wrote: until `forget`, prompts that begin with its tokens continue from them.

        Raises StateError if the file is missing, damaged, or of another bundle or learned prefix.
        """
        check_path("path", path)
        state = read_state(path, self.bundle.manifest, learned_sha256(self.prefix))
        self._sessions.add(state)
        return state

    def save_prefix(
        self,
        path: str | os.PathLike[str],
        text: str,
        *,
        dtype: KvDtype | None = None,
        task: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write `text` with its keys and values to the file `path`, for `load(..., prefix=path)`; see `bake`.

        With the task in the file `task` (docs/tasks.md) the prefix says what it is for. Raises ConfigError too if this
        model cannot do the task.
        """
        check_path("path", path)
        given = None
        if task is not None:
            from edgelm.generation.prefix_task import read_usable_task

            check_path("task", task)
            given = read_usable_task(task, self.bundle, self.tokenizer, self.generation_config)
        with self._sessions.borrowed() as (session, _):
            bake(session, self.tokenizer, text, path, dtype, given)

    def with_prefix(
        self, path: str | os.PathLike[str], *, prefix_cache_bytes: int = 0, task: str | os.PathLike[str] | None = None
    ) -> "Model":
        """This model with another prefix before every prompt, in place of its own; both share the weights in memory.

        The new model works as long as this one is open, and closing it frees its own caches only. It does the task of
        the file `task`, or else the prefix's, or else this model's, unless that came with this model's prefix: then
        the bundle's. `load` explains the arguments.

        Raises:
            PrefixError: the prefix cannot be read, was made for another model, or has a task that cannot be used.
            ConfigError: an argument is out of range, or the task cannot be read.
            ClosedError: this model is closed.
        """
        self._sessions.check_open()
        check_limit_bytes("prefix_cache_bytes", prefix_cache_bytes)
        check_path("path", path)
        kept, task_format, loaded_as = read_prefix(path, self.bundle), self.task_format, self._loaded_as
        of_own_prefix = task_format is not None and self.prefix is not None and task_format.task is self.prefix.task
        if task is not None or kept.task is not None or of_own_prefix:
            from edgelm.generation.task_format import TaskFormat

            if task is not None:
                check_path("task", task)
            task_format = TaskFormat.of_bundle(self.bundle, self.tokenizer, self.generation_config, task, kept)
        return Model(
            self.graph,
            self.tokenizer,
            self.generation_config,
            load_seconds=self.load_seconds,
            prefix_cache_bytes=prefix_cache_bytes,
            prefix=kept,
            task_format=task_format,
            draft=self.draft,
            loaded_as=None if loaded_as is None else loaded_as.behind(kept, prefix_cache_bytes, task),
            owns_graph=False,
        )

    def forget(self) -> None:
        """Forget prompts of earlier calls and loaded states: the next prompt is computed from its first token."""
        self._sessions.forget()
        for scheduler in self._open_schedulers():
            scheduler.forget()

    def stream(
        self, prompt: Prompt, *, latent: npt.ArrayLike | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Chunk]:
        """Continue `prompt` piece by piece; the last chunk has the finish reason and the stats.

        With `num_return_sequences` the rows follow one another, numbered by `Chunk.index`. Raises the errors of
        `generate` before the first chunk.
        """
        return self._texts.stream(self._run(prompt, options, latent))

    def chat_prompt(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Tool] | None = None, now: datetime | None = None
    ) -> list[int]:
        """The token ids of a conversation, up to where the assistant's answer begins, for any method that continues.

        The bundle's chat template writes them, as transformers' ``apply_chat_template(add_generation_prompt=True)``
        does. Special tokens come from the template alone: a message that says "<|im_end|>" stays text.

        Args:
            messages: who said what, such as ``[{"role": "user", "content": "Hello"}]``.
            tools: functions that the model may call, in OpenAI's shape; see `tool_use`.
            now: the date and time for templates that write the date; None for the present.

        Raises:
            PromptError: the bundle has no chat template, the messages are no conversation, or the template refuses
                them; or it has no tools.
            BundleError: the template cannot be read.
            EdgelmError: jinja2 is missing, the extra `chat`.
        """
        return self._chat_format.ids(messages, tools=tools, now=now)

    def tool_use(
        self, tools: Sequence[Tool], *, tool_choice: ToolChoice = "auto", parallel_tool_calls: bool = True
    ) -> ToolUse:
        """The constraint of an answer that may call `tools`, for any method that takes `chat_prompt`.

        Args:
            tools: functions in OpenAI's shape. Arguments are what `parameters` allow.
            tool_choice: "auto" for a text or calls, "required" for calls, a named function for one call of it, and
                "none" for a text without calls.
            parallel_tool_calls: whether an answer may have several calls, where the template can write them.

        Raises:
            PromptError: the bundle has no chat template with tools, or `tools` are no tools.
            ConfigError: `tool_choice` is unknown, or parameters are no usable schema.
        """
        return self._chat_format.tool_use(tools, tool_choice, parallel_tool_calls)

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """The assistant's answer to a conversation, perhaps in calls of `tools`, which are in `Choice.tool_calls`.

        Args and errors are those of `chat_prompt`, `tool_use` and `generate`; ConfigError also where there is a
        `constraint` beside tools that may be called.
        """
        given = options.get("constraint")
        constraint = self._chat_format.constraint(given, tools, tool_choice, parallel_tool_calls)
        ids = self.chat_prompt(messages, tools=tools)
        return self.generate(ids, **(options | {"constraint": constraint}))

    def chat_stream(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Chunk]:
        """The assistant's answer piece by piece, as `stream`; a call comes in one piece. Otherwise as `chat`."""
        given = options.get("constraint")
        constraint = self._chat_format.constraint(given, tools, tool_choice, parallel_tool_calls)
        return self.stream(self.chat_prompt(messages, tools=tools), **(options | {"constraint": constraint}))

    def task(
        self, given: "TaskInput | None" = None, options: GenerationOptions | None = None, /, **fields: str
    ) -> "TaskResult":
        """Do the task that the model has (docs/tasks.md): ``task("a text")``, or ``task(premise=..., ...)``.

        Args:
            given: the text of the only field, or a dict of all fields.
            options: generation options over the task's, where the task generates.
            fields: the fields by name, in place of `given`.

        Returns a `TaskLabel`, a `TaskText` or a `TaskVector`, as the task's kind is.

        Raises:
            PromptError: a field is missing, unknown or empty; or there is no task.
            ContextError, ConfigError, ClosedError: as `generate`.
        """
        task = self.task_format
        if task is None:
            raise PromptError(
                "this bundle has no task: load it with a task's file or a prefix that has one, or export it with --task"
            )
        config = task.config(self.generation_config, options)
        prompts = task.prompts(task.values(given, fields))
        if task.writes_text:
            run = self._texts.run(prompts[0], config)
            return task.written(run.completion(self._texts.stream(run)))
        with self._sessions.borrowed() as (session, _):
            return task.judged(session, self._encoder, prompts)

    async def agenerate(
        self, prompt: Prompt, *, latent: npt.ArrayLike | None = None, **options: Unpack[GenerationOptions]
    ) -> Completion:
        """As `generate`, without holding up the event loop; cancelling the task stops it within one token."""
        cancel = self._either_cancel(options)
        pool, context = self._workers.pool(), copy_context()
        run = await call_in_thread(pool, context, partial(self._run, prompt, options | {"cancel": cancel}, latent))
        async with aclosing(stream_in_thread(partial(self._texts.stream, run), cancel, pool, context)) as stream:
            chunks = [chunk async for chunk in stream]
        return run.completion(chunks)

    def astream(
        self, prompt: Prompt, *, latent: npt.ArrayLike | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """As `stream`, for ``async for``; cancelling the task, or ``aclose()``, stops it within one token.

        A ConfigError for the options is raised at once, the remaining errors of `generate` before the first chunk.
        """
        cancel = self._either_cancel(options)
        begin = partial(self.stream, prompt, latent=latent, **(options | {"cancel": cancel}))
        return stream_in_thread(begin, cancel, self._workers.pool(), copy_context())

    def warmup(self) -> float:
        """Compute three tokens, so that the first request finds the weights in memory; returns the seconds it took."""
        started = time.perf_counter()
        for sessions in (self._sessions, self._draft_sessions):
            if sessions is not None:
                with sessions.borrowed() as (session, _):
                    session.step([0, 0])
                    session.step([0])
        return time.perf_counter() - started

    @property
    def memory(self) -> ModelMemory:
        """The memory that this model and its small one are expected to take, and that this process takes now."""
        prefix_bytes = 0 if self.prefix is None else self.prefix.size_bytes
        own = ModelMemory.of(self.bundle, prefix_bytes, self.graph.piece_tokens)
        if self.draft is None:
            return own
        return own.with_another(ModelMemory.of(self.draft.bundle, 0, self.draft.piece_tokens))

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """How likely `continuation` is after `prompt`, in all and token by token; see `text_scores.score`."""
        with self._sessions.borrowed() as (session, _):
            return text_scores.score(session, self._encoder, prompt, continuation)

    def token_logprobs(self, text: Prompt, *, top: int = 0) -> tuple[TokenLogprobs, ...]:
        """How likely each token of `text` but the first is, and the `top` likeliest tokens there; see `text_scores`."""
        with self._sessions.borrowed() as (session, _):
            return text_scores.token_logprobs(session, self._encoder, text, top)

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[Prompt],
        *,
        length_normalization: LengthNormalization = "none",
        calibrate: Prompt | None = None,
    ) -> Selection:
        """Which of `options` is likeliest after `prompt`, with probabilities; see `text_scores.choose`."""
        with self._sessions.borrowed() as (session, _):
            return text_scores.choose(session, self._encoder, prompt, options, length_normalization, calibrate)

    def perplexity(
        self, text: Prompt, *, stride: int | None = None, progress: Progress = lambda share: None
    ) -> Perplexity:
        """How surprised the model is by `text`, of any length; see `edgelm.scoring.token_scores.perplexity`."""
        with self._sessions.borrowed() as (session, _):
            return text_scores.perplexity(session, self._encoder, text, stride, progress)

    def embed(self, text: Prompt, *, pooling: Pooling = "mean", normalize: bool = False) -> Vector:
        """`text` as a vector, float32 (D,), its last hidden states pooled; see `edgelm.scoring.token_scores.embed`."""
        with self._sessions.borrowed() as (session, _):
            return text_scores.embed(session, self._encoder, text, pooling, normalize=normalize)

    def explain(self, text: Prompt, *, top: int = 5, max_attention_bytes: int = MAX_ATTENTION_BYTES) -> Explanation:
        """How likely each token of `text` was, what else could have come, and where each head of attention looked.

        It reads the text with a copy of the graph, which takes the memory of another model meanwhile, on the CPU only.
        See `edgelm.scoring.explanation.explain`.
        """
        self._sessions.check_open()
        prefix = None if self.prefix is None else self.prefix.content
        return explanation.explain(self.graph, prefix, self._encoder, text, top, max_attention_bytes)

    @cached_property
    def _chat_format(self) -> ChatFormat:
        template = read_chat_template(self.bundle)
        if template is None:
            raise PromptError(
                "this bundle has no chat template, so it knows no conversations: let it continue a text, or export a "
                "chat model"
            )
        return ChatFormat(template, self.tokenizer)

    def _run(self, prompt: Prompt, options: GenerationOptions, latent: npt.ArrayLike | None = None) -> TextRun:
        before = None if latent is None else self.latent.prefixes(latent, 1)[0]
        return self._texts.run(prompt, self.generation_config.updated(dict(options)), before)

    def _open_schedulers(self) -> list[TextScheduler]:
        alive = (reference() for reference in self._schedulers)
        return [scheduler for scheduler in alive if scheduler is not None]

    def _either_cancel(self, options: GenerationOptions) -> EitherCancel:
        return EitherCancel(self.generation_config.updated(dict(options)).cancel)
