"""A conversation with a model: how a message becomes an answer, and how the answer is shown."""

import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgelm.cli.conversation import Conversation, Turn
from edgelm.cli.shared import print_json, stats_line
from edgelm.cli.streams import escaped_text, note
from edgelm.decoding.generation_config import OPTIONS
from edgelm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelm.decoding.generation_config import GenerationConfig
    from edgelm.generation.results import Stats, TextEnd
    from edgelm.model import Model
    from edgelm.text.messages import ChatMessage
    from edgelm.text.plain_chat import PlainChatFormat

_OWN_OPTIONS: dict[str, Any] = {
    "num_return_sequences": 1,
    "context_overflow": "stop",
    "pinned_tokens": 0,
    "logprobs": None,
    "token_healing": False,
}
OWN_OPTIONS = tuple(_OWN_OPTIONS)
"""Options that a conversation does not take: a message is whole and has one answer, and whole turns are dropped."""


class ChatSession:
    """A model, a conversation with it, and the options of its answers.

    Attributes:
        model: the model.
        conversation: what was said so far.
        cancel: set it to end an answer.
        stats: of the latest answer; None before the first.
        tokens: how much of the context the latest answer left taken.
        ended: whether the user has ended the conversation.
    """

    def __init__(
        self,
        model: "Model",
        conversation: Conversation,
        options: dict[str, Any],
        plain: "PlainChatFormat | None" = None,
        *,
        as_json: bool = False,
        show_stats: bool = False,
        interactive: bool = False,
    ) -> None:
        """Join finished parts.

        Args:
            model: see the class.
            conversation: see the class.
            options: generation options over the bundle's defaults.
            plain: how a model without a chat template is talked to; None for the bundle's template.
            as_json: whether each answer is printed as a JSON object.
            show_stats: whether each answer is followed by its times and memory, on standard error.
            interactive: whether a person types the messages, who can read advice more than once.

        Raises ConfigError if an option is out of range, or if a conversation does not take it.
        """
        self.model, self.conversation = model, conversation
        self.cancel = threading.Event()
        self.stats: Stats | None = None
        self.tokens = 0
        self.ended = False
        self._options = options
        self._plain, self._as_json, self._show_stats, self._interactive = plain, as_json, show_stats, interactive
        self._printed = 0
        self._told: set[str] = set()
        self._config(options)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the user gave, over the bundle's."""
        return dict(self._options)

    @property
    def context_tokens(self) -> int:
        """The longest conversation, in tokens."""
        context = self.model.bundle.manifest.architecture.context_length
        return context - (0 if self.model.prefix is None else self.model.prefix.tokens)

    @property
    def repeats(self) -> bool:
        """Whether the same message would get the same answer again."""
        config = self._config(self._options)
        return not config.do_sample or config.seed is not None

    def set(self, name: str, value: object) -> None:
        """Change an option; raises ConfigError, and changes nothing, if it is unknown or cannot be `value`."""
        changed = {**self._options, name: value}
        self._config(changed)
        self._options = changed

    def unset(self, name: str) -> None:
        """Give an option its default again; raises ConfigError if the other options need it."""
        changed = {key: value for key, value in self._options.items() if key != name}
        self._config(changed)
        self._options = changed

    def answer(self, user: str) -> bool:
        """Print the answer to `user` as it comes, and keep both; returns whether they are kept.

        Nothing is kept of an answer that was cancelled before its first word. Raises as `Model.chat_stream`.
        """
        config = self._config(self._options)
        context = min(self.context_tokens, config.max_length or self.context_tokens)
        dropped = self.conversation.dropped
        ids = self.conversation.prompt(
            user, self._encode, context_tokens=context, answer_tokens=config.new_token_limit(0)
        )
        if newly := self.conversation.dropped - dropped:
            turns = "turn is" if newly == 1 else f"{newly} turns are"
            self._tell(f"the oldest {turns} dropped, because the context of {context:,} tokens is full", always=True)
        chunks = self.model.stream(ids, **self._effective(self._options), cancel=self.cancel)
        text, reason = "", None
        with _Printer(quiet=self._as_json, first=self._printed == 0) as printer:
            for chunk in chunks:
                printer.write(chunk.text)
                text += chunk.text
                reason = chunk.finish_reason or reason
                self.stats = chunk.stats or self.stats
        assert reason is not None and self.stats is not None
        self._printed += 1
        self.tokens = self.stats.prompt_tokens + self.stats.new_tokens
        if self._as_json:
            print_json(
                {
                    "user": user,
                    "assistant": text,
                    "finish_reason": reason,
                    "dropped_turns": self.conversation.dropped,
                    "stats": asdict(self.stats),
                }
            )
        kept = bool(text) or reason != "cancelled"
        if kept:
            self.conversation.add(Turn(user, text))
        self._tell_reason(reason, kept)
        if self._show_stats:
            note(stats_line(self.stats, self.model))
        if self._interactive:
            note("")
        return kept

    def refuse(self, user: str, error: Exception) -> None:
        """Say why a message gets no answer; what reads the output still gets one block for each message."""
        note(f"edgelm: {error}")
        if self._as_json:
            print_json({"user": user, "error": str(error)})
        elif not self._interactive:
            with _Printer(quiet=False, first=self._printed == 0):
                self._printed += 1

    def _config(self, options: dict[str, Any]) -> "GenerationConfig":
        for name in options:
            if name in OWN_OPTIONS or (name in OPTIONS and OPTIONS[name].rule.kind == "python"):
                raise ConfigError(f"{name} is no option of a conversation")
        return self.model.generation_config.updated(self._effective(options))

    def _effective(self, options: dict[str, Any]) -> dict[str, Any]:
        effective = {**_OWN_OPTIONS, **options}
        if self._plain is not None:
            bundle = self.model.generation_config
            stop_strings = options.get("stop_strings", bundle.stop_strings)
            stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
            if isinstance(stop_strings, (list, tuple)):  # anything else is refused by the option's own check
                effective["stop_strings"] = [*self._plain.stop_strings, *stop_strings]
            effective.setdefault("begin_suppress_tokens", bundle.eos_token_id)  # an answer is not empty
        return effective

    def _encode(self, messages: "Sequence[ChatMessage]") -> list[int]:
        return self.model.chat_prompt(messages) if self._plain is None else self._plain.ids(messages)

    def _tell_reason(self, reason: "TextEnd", kept: bool) -> None:
        assert self.stats is not None
        if reason == "length":
            option = "/set max_new_tokens" if self._interactive else "-n"
            self._tell(f"the answer was cut after {self.stats.new_tokens} tokens: {option} allows more")
        elif reason == "context":
            self._tell("the answer was cut, because the context is full", always=True)
        elif reason == "time":
            self._tell("the answer was cut after max_time")
        elif reason == "cancelled":
            self._tell("stopped; the answer so far is kept" if kept else "stopped; nothing is kept", always=True)

    def _tell(self, words: str, *, always: bool = False) -> None:
        """A note; to a program only once, unless `always`."""
        if always or self._interactive or words not in self._told:
            self._told.add(words)
            note(f"edgelm: {words}")


class _Printer:
    """Writes an answer to standard output as it comes, without the blanks around it, and with controls escaped.

    An empty line stands between two answers, unless a terminal shows the messages between them.
    """

    def __init__(self, *, quiet: bool, first: bool) -> None:
        self._quiet = quiet
        self._before = "" if first or sys.stdout.isatty() else "\n"
        self._blanks = ""
        self._written = False

    def __enter__(self) -> "_Printer":
        self._write(self._before)
        return self

    def __exit__(self, *exception: object) -> None:
        self._write("\n")

    def write(self, text: str) -> None:
        """The next piece of the answer."""
        text = self._blanks + text if self._written else text.lstrip()
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if shown:
            self._written = True
            self._write(escaped_text(shown))

    def _write(self, text: str) -> None:
        if not self._quiet:
            sys.stdout.write(text)
            sys.stdout.flush()
