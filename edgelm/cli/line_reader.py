"""Messages that a user types at a terminal, or that come line by line through a pipe."""

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import BinaryIO, Protocol

from edgelm.batch.lines import LineError, complaint, line_text, next_line
from edgelm.cli.interrupt import ends_at_once
from edgelm.errors import PromptError

MAX_LINE_BYTES = 4 * 2**20
FENCE = '"""'
"""A line of these characters begins and ends a message of several lines."""
_PROMPT, _NEXT_PROMPT = "> ", ". "


class LineCleared(Exception):
    """Ctrl-C, where a line had been typed."""


class LineReader(Protocol):
    """Where lines come from."""

    def read(self, prompt: str) -> str | None:
        """The next line without its end, after showing `prompt` at a terminal; None at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            LineCleared: Ctrl-C, where it is known that the line was not empty.
            PromptError: the line is not UTF-8 text, or too long; the next one can be read.
        """


class PlainLines:
    """Lines of standard input, without editing."""

    def __init__(self, stream: BinaryIO, *, at_terminal: bool) -> None:
        self._stream, self._at_terminal = stream, at_terminal
        self.number = 0
        """How many lines were read."""

    def read(self, prompt: str) -> str | None:
        """As `LineReader.read`."""
        if self._at_terminal:
            _show(prompt)
        line = self._line()
        if line is None and self._at_terminal:
            _show("\n")
        return line

    def _line(self) -> str | None:
        line = next_line(self._stream, MAX_LINE_BYTES)
        if line is None:
            return None
        self.number += 1
        try:
            return line_text(line, MAX_LINE_BYTES)
        except LineError as error:
            raise PromptError(complaint(f"line {self.number}", error)) from None


class EditedLines:
    """Lines that are typed at a terminal, with editing, a history of this session, and completion by Tab.

    Enter ends a line, Alt-Enter begins a new one inside it. What is shown goes to standard error.
    """

    def __init__(self, words: Mapping[str, Collection[str]]) -> None:
        """`words` are completed at the beginning of a line: each with the words that may follow it."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion
        from prompt_toolkit.document import Document
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("enter")
        def end(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def begin_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        class Words(Completer):
            def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
                first, space, second = document.text_before_cursor.partition(" ")
                begun = second if space else first
                for word in words.get(first, ()) if space else words:
                    if word.startswith(begun):
                        yield Completion(word, start_position=-len(begun))

        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=keys,
            completer=Words(),
            complete_while_typing=False,
            # A line that the terminal breaks is still one line.
            prompt_continuation=lambda width, line, breaks: " " * width if breaks else _NEXT_PROMPT,
            output=create_output(stdout=sys.stderr),
        )

    def read(self, prompt: str) -> str | None:
        """As `LineReader.read`."""
        try:
            return self._session.prompt(prompt)
        except KeyboardInterrupt:
            if self._session.default_buffer.text:
                raise LineCleared from None
            raise
        except EOFError:
            return None


def line_reader(words: Callable[[], Mapping[str, Collection[str]]]) -> LineReader:
    """A reader of standard input: with editing at a terminal, where prompt_toolkit is installed.

    `words` are completed, as in `EditedLines`. Raises PromptError if standard input is closed.
    """
    if sys.stdin is None:
        raise PromptError("standard input is closed: there is nobody to talk to")
    at_terminal = sys.stdin.isatty()
    if at_terminal and _can_edit():
        with ends_at_once():
            return EditedLines(words())
    return PlainLines(sys.stdin.buffer, at_terminal=at_terminal)


@dataclass(frozen=True, slots=True)
class Message:
    """What a user said."""

    text: str
    fenced: bool = False
    """Whether it stood between two lines of `FENCE`."""


def read_message(lines: LineReader) -> Message | None:
    """The next message: a line, or the lines between two lines of `FENCE`; None at the end of the input.

    Raises as `LineReader.read`; PromptError too if the input ends inside a message.
    """
    first = lines.read(_PROMPT)
    if first is None:
        return None
    if not first.startswith(FENCE):
        return Message(first)
    message, rest = [], first.removeprefix(FENCE)
    while not rest.endswith(FENCE):
        message.append(rest)
        line = lines.read(_NEXT_PROMPT)
        if line is None:
            raise PromptError(f"the input ends inside a message that began with {FENCE}: end it with {FENCE}")
        rest = line
    return Message("\n".join([*message, rest.removesuffix(FENCE)]).strip("\n"), fenced=True)


def _can_edit() -> bool:
    """Whether prompt_toolkit is installed and standard error, where it draws, is a terminal that it knows."""
    shown = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return shown and find_spec("prompt_toolkit") is not None


def _show(prompt: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(prompt)
        sys.stderr.flush()
