"""The task of a bundle or a prefix at work: an input becomes a prompt, and the model's answer becomes a result."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import cast

from edgelm.bundle.chat_template import read_chat_template
from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import TASK_FILE
from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.bundle.task import (
    ChatTask,
    ChooseTask,
    EmbedTask,
    GenerateTask,
    Task,
    TaskConstraint,
    fields_of,
    read_task,
    read_task_file,
)
from edgelm.bundle.template import Template
from edgelm.decoding.generation_config import OPTIONS, GenerationConfig, GenerationOptions
from edgelm.engine.session import Session
from edgelm.errors import BundleError, ConfigError, EdgelmError, PrefixError, PromptError, shown
from edgelm.generation.results import Chunk, Completion, TextEnd
from edgelm.reuse.prefix import Prefix, PromptEncoder
from edgelm.scoring import text_scores
from edgelm.scoring.token_scores import Vector
from edgelm.text.chat import ChatFormat
from edgelm.text.constraints import Choices, Constraint, Grammar, JsonSchema, Regex
from edgelm.text.messages import ChatMessage
from edgelm.text.plain_chat import PlainChatFormat
from edgelm.text.prompts import Prompt
from edgelm.text.tokenizer import Tokenizer, check_text

_UNUSED_CHARACTER = "\U000ffffd"  # for private use, so no vocabulary has it

TaskInput = str | Mapping[str, str]
"""The text of the only field, or the text of each field by its name."""


@dataclass(frozen=True, slots=True)
class TaskLabel:
    """The label that a task chose; ``str()`` is the label."""

    label: str
    """The label that the task chose; `str()` is the same."""
    probability: float
    """The label's probability."""
    probabilities: dict[str, float]
    """Of all labels, in the task's order; their sum is 1."""

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True)
class TaskText:
    """The text that a task wrote; ``str()`` is the text."""

    text: str
    """Without the blanks around it."""
    finish_reason: TextEnd
    """Why the text ended, as of a `Choice`."""
    completion: Completion
    """The whole result, as `Model.generate` returns it."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, eq=False)
class TaskVector:
    """The vector of an input, or how alike its two texts are."""

    vectors: tuple[Vector, ...]
    """One for each template of the task, float32 (D,), of length 1."""

    @property
    def vector(self) -> Vector:
        """The first vector."""
        return self.vectors[0]

    @property
    def similarity(self) -> float | None:
        """The cosine of both vectors, from -1 to 1; None where the task has one template."""
        return float(self.vectors[0] @ self.vectors[1]) if len(self.vectors) > 1 else None


TaskResult = TaskLabel | TaskText | TaskVector


class TaskFormat:
    """A task, and the parts of a model that turn an input into a prompt. Several threads may call it.

    Attributes:
        task: the task as the bundle or the file states it.
        fields: the names of the texts of an input.
        options: generation options that the task lays over the bundle's defaults.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, chat: ChatFormat | None, config: GenerationConfig) -> None:
        """Join finished parts.

        Args:
            task: what to do.
            tokenizer: the model's.
            chat: how the bundle writes conversations; None where it has no chat template.
            config: the bundle's defaults, over which the task's options are checked.

        Raises ConfigError if an option of the task is unknown or out of range, its constraint cannot be used, or a
        chat has no form or two of them.
        """
        self.task, self.fields = task, fields_of(task)
        self._tokenizer, self._chat = tokenizer, chat
        self._templates: tuple[Template, ...] = ()
        if isinstance(task, ChatTask):
            if (task.plain is None) == (chat is None):
                raise ConfigError(
                    "a chat needs a bundle with a chat template, or the field 'plain' in its task"
                    if chat is None
                    else "the task has the field 'plain', but the bundle has a chat template: leave it out"
                )
            if task.plain is not None:
                self._chat = PlainChatFormat(task.plain, tokenizer)
        elif isinstance(task, EmbedTask) and task.second_template is not None:
            self._templates = Template.read(task.template), Template.read(task.second_template)
        else:
            self._templates = (Template.read(task.template),)
        self.options = self._generation_options(config)

    @classmethod
    def of_bundle(
        cls,
        bundle: Bundle,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        file: str | os.PathLike[str] | None = None,
        prefix: Prefix | None = None,
    ) -> "TaskFormat | None":
        """The task in `file`, or else that of `prefix`, or else that of `bundle`; None where none has one.

        Raises ConfigError if the task of `file` cannot be used, PrefixError if that of `prefix` cannot, and BundleError
        if that of `bundle` cannot.
        """
        error: type[EdgelmError]
        if file is not None:
            task, error, name = read_task_file(file).task, ConfigError, f"the task {os.fspath(file)!r}"
        elif prefix is not None and prefix.task is not None:
            task, error, name = prefix.task, PrefixError, f"the task of the prefix {os.fspath(prefix.path)!r}"
        elif (own := read_task(bundle)) is not None:
            task, error, name = own, BundleError, f"{TASK_FILE} of {os.fspath(bundle.path)!r}"
        else:
            return None
        return cls.of_task(task, bundle, tokenizer, config, name, error)

    @classmethod
    def of_task(
        cls,
        task: Task,
        bundle: Bundle,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        name: str,
        error: type[EdgelmError] = ConfigError,
    ) -> "TaskFormat":
        """`task`, which messages call `name`, for a model with these parts; raises `error` if they cannot do it."""
        template = read_chat_template(bundle) if isinstance(task, ChatTask) else None
        try:
            return cls(task, tokenizer, None if template is None else ChatFormat(template, tokenizer), config)
        except (ConfigError, PromptError) as reason:  # PromptError: no template is the default
            raise error(f"{name}: {reason}") from None

    @property
    def writes_text(self) -> bool:
        """Whether the task generates; only then it takes generation options."""
        return isinstance(self.task, (GenerateTask, ChatTask))

    @property
    def plain_chat(self) -> PlainChatFormat | None:
        """How a chat without a chat template is written."""
        return self._chat if isinstance(self._chat, PlainChatFormat) else None

    def config(self, base: GenerationConfig, options: GenerationOptions | None = None) -> GenerationConfig:
        """The bundle's defaults `base`, under the task's, under the caller's `options`.

        Raises ConfigError if an option cannot be used, or if the task does not generate and there are options.
        """
        if options and not self.writes_text:
            raise ConfigError(
                f"{shown(next(iter(options)))} has no effect, because this task ({self.task.kind}) generates no text"
            )
        return base.updated(dict(self.options)).updated(dict(options or {}))

    def read_input(self, text: str) -> dict[str, str]:
        """An input as it is typed: the text of the only field, or a JSON object with every field.

        Raises PromptError if it cannot be read; `values` checks the fields.
        """
        if len(self.fields) == 1:
            return {self.fields[0]: text}
        try:
            content = parse_json(text.encode("utf-8", "surrogatepass"))
        except StrictJsonError as error:
            raise PromptError(f"the input {error}; it has several fields, so give {self._example}") from None
        if not isinstance(content, dict):
            raise PromptError(f"the input must be a JSON object, got {shown(content)}; give {self._example}")
        return cast("dict[str, str]", content)

    def values(self, given: TaskInput | None, named: Mapping[str, str] | None = None) -> dict[str, str]:
        """The fields of an input, given as one text or by their names.

        Raises PromptError if a field is missing, unknown, no text or empty.
        """
        if given is not None and named:
            raise PromptError("the input is given twice, as one value and by names: give it once")
        if isinstance(given, str):
            if len(self.fields) > 1:
                raise PromptError(f"one text is given, but the task has several fields: give {self._names}")
            values = {self.fields[0]: given}
        elif isinstance(given, Mapping):
            values = dict(given)
        elif given is None:
            values = dict(named or {})
        else:
            raise PromptError(f"the input must be a text, or a dict of texts, got {shown(given)}")
        for name in values:
            if name not in self.fields:
                raise PromptError(f"the task has no field {shown(name)}: it has {self._names}")
        for name in self.fields:
            if name not in values:
                raise PromptError(f"the field {name!r} is missing: the task has {self._names}")
            self._check_value(name, values[name])
        return {name: values[name] for name in self.fields}

    def prompts(self, values: Mapping[str, str], *, now: datetime | None = None) -> tuple[Prompt, ...]:
        """The prompt of an input whose fields were checked; two where the task compares two texts.

        `now` is the date and time for chat templates that write the date; None for the present.

        Raises as `ChatFormat.ids` in a chat; elsewhere PromptError if the input spells a special token of the model.
        """
        if isinstance(self.task, ChatTask):
            assert self._chat is not None
            messages: list[ChatMessage] = [{"role": "user", "content": values[self.fields[0]]}]
            if self.task.system is not None:
                messages.insert(0, {"role": "system", "content": self.task.system})
            return (self._chat.ids(messages, now=now),)
        prompts = tuple(template.fill(values) for template in self._templates)
        for prompt, own in zip(prompts, self._own_special_tokens, strict=True):
            if self._special_tokens_of(prompt) != own:
                raise PromptError("the input has text that this tokenizer reads as a special token: leave it out")
        return prompts

    def judged(self, session: Session, encoder: PromptEncoder, prompts: Sequence[Prompt]) -> TaskLabel | TaskVector:
        """The result of a task that generates nothing. Raises as `text_scores.choose` and `embed`."""
        task = self.task
        if isinstance(task, ChooseTask):
            options, normalization = list(task.choices.values()), task.length_normalization or "none"
            selection = text_scores.choose(session, encoder, prompts[0], options, normalization, task.calibrate)
            labels = list(task.choices)
            probabilities = {label: option.probability for label, option in zip(labels, selection.options, strict=True)}
            return TaskLabel(labels[selection.index], selection.best.probability, probabilities)
        assert isinstance(task, EmbedTask)
        pooling = task.pooling or "mean"
        return TaskVector(
            tuple(text_scores.embed(session, encoder, prompt, pooling, normalize=True) for prompt in prompts)
        )

    def written(self, completion: Completion) -> TaskText:
        """The result of a task that generates."""
        return TaskText(completion.text.strip(), completion.choices[0].finish_reason, completion)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Without the token for characters that the tokenizer does not know."""
        unknown = self._tokenizer.encode(_UNUSED_CHARACTER, add_special_tokens=False)
        return frozenset(self._tokenizer.special_tokens.values()).difference(unknown)

    @cached_property
    def _own_special_tokens(self) -> tuple[list[int], ...]:
        """The special tokens that each template writes."""
        plain = dict.fromkeys(self.fields, "a")
        return tuple(self._special_tokens_of(template.fill(plain)) for template in self._templates)

    def _special_tokens_of(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return [token_id for token_id in ids if token_id in self._special_ids]

    @property
    def _names(self) -> str:
        return ", ".join(self.fields)

    @property
    def _example(self) -> str:
        return json.dumps(dict.fromkeys(self.fields, "..."))

    def _check_value(self, name: str, value: object) -> None:
        if not isinstance(value, str):
            raise PromptError(f"the field {name!r} must be a text, got {shown(value)}")
        check_text(value, f"the field {name!r}")
        if not value.strip():
            raise PromptError(f"the field {name!r} is empty: give some text")

    def _generation_options(self, config: GenerationConfig) -> GenerationOptions:
        """The task's options over `config`. Raises ConfigError if one cannot be used."""
        options: dict[str, object] = {}
        if isinstance(self.task, (GenerateTask, ChatTask)):
            options |= self.task.generation or {}
            for name in options:
                if name in OPTIONS and OPTIONS[name].rule.kind == "python":  # not JSON
                    raise ConfigError(f"generation cannot have {name!r}")
            if self.task.constraint is not None:
                options["constraint"] = constraint_of(self.task.constraint)
        config = config.updated(options)
        if self.plain_chat is not None:
            if config.constraint is None:
                options["stop_strings"] = [*self.plain_chat.stop_strings, *config.stop_strings]
            if not config.begin_suppress_tokens:  # an answer is not empty
                options["begin_suppress_tokens"] = config.eos_token_id
            config.updated(options)
        return cast(GenerationOptions, options)


def stripped(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks of a stream without the blanks around each row's text."""
    blanks: dict[int, str | None] = {}  # those that may turn out to be the last; None before the first word
    for chunk in chunks:
        kept = blanks.get(chunk.index)
        text = chunk.text.lstrip() if kept is None else kept + chunk.text
        words = text.rstrip()
        blanks[chunk.index] = text[len(words) :] if words or kept is not None else None
        yield replace(chunk, text=words)


def constraint_of(given: TaskConstraint) -> Constraint:
    """The constraint that a task's file, or a row of many, states."""
    if given.choices is not None:
        return Choices(given.choices)
    if given.regex is not None:
        return Regex(given.regex)
    if given.json_schema is not None:
        return JsonSchema(given.json_schema)
    return Grammar(given.grammar or "")
