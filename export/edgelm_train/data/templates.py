"""Templates that turn a row of a file, or the turns of a chat, into prompts and completions."""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

from edgelm.errors import ConfigError

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class Template:
    """Text with column names in braces, as in Python's ``str.format``; ``{{`` and ``}}`` stand for braces."""

    parts: tuple[tuple[str, str | None], ...]
    """Pairs of a text and the column whose value follows it; None where no column follows."""

    @classmethod
    def parse(cls, text: str) -> "Template":
        r"""Read a template as it is typed in a shell, where ``\n`` is a new line, ``\t`` a tab and ``\\`` a backslash.

        Raises:
            ConfigError: a brace has no partner, or encloses something other than the name of a column.
        """
        try:
            parts = list(string.Formatter().parse(unescaped(text)))
        except ValueError as error:
            raise ConfigError(f"the template {text!r} cannot be read: {error}; write {{{{ for a brace") from None
        for _, name, spec, conversion in parts:
            if name == "" or spec or conversion:
                raise ConfigError(f"the template {text!r} must have names of columns in its braces, like {{text}}")
        return cls(tuple((literal, name) for literal, name, _, _ in parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, row: Mapping[str, str]) -> str:
        """The text for one row, which must have all `columns`."""
        return "".join(literal + ("" if name is None else row[name]) for literal, name in self.parts)

    def shown(self) -> str:
        """The text with each column as its name in braces."""
        return self.fill({name: f"{{{name}}}" for name in self.columns})


@dataclass(frozen=True)
class Task:
    """Templates that turn a row into a prompt and a completion.

    The space between the two belongs to the completion, because a byte-level vocabulary joins a space to the word after
    it, and the runtime encodes the prompt alone.
    """

    prompt: Template
    completion: Template

    @classmethod
    def parse(cls, prompt: str | None, completion: str | None) -> "Task":
        """Read both templates; if both are None, the columns ``prompt`` and ``completion`` are taken as they are.

        Raises:
            ConfigError: only one template is given, a template cannot be read, or the completion names no column.
        """
        if (prompt is None) != (completion is None):
            raise ConfigError("a template for the prompt needs one for the completion, and the other way round")
        if prompt is None or completion is None:
            prompt, completion = "{prompt}", "{completion}"
        task = cls(Template.parse(prompt), Template.parse(completion))
        if not task.completion.columns:
            raise ConfigError(f"the completion template {completion!r} names no column: there is nothing to learn")
        return task


def unescaped(text: str) -> str:
    r"""`text` as it is typed in a shell, with ``\n`` made a new line, ``\t`` a tab, and ``\\`` one backslash."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


@dataclass(frozen=True)
class ChatTask:
    """A template of one turn of a chat, which turns a chat into text; what an assistant says is learned."""

    turn: Template
    roles: tuple[str, str] = ("user", "assistant")
    """Who asks and who answers, in the words of the data."""

    @classmethod
    def parse(cls, turn: str) -> "ChatTask":
        """Read the template of a turn, which names ``{content}`` once, and may name ``{role}``.

        Raises:
            ConfigError: the template cannot be read, or names something else.
        """
        template = Template.parse(turn)
        names = [name for _, name in template.parts if name is not None]
        if names.count("content") != 1 or set(names) - {"role", "content"}:
            example = r"'{role}: {content}\n'"
            raise ConfigError(f"--turn takes {{content}} once, and {{role}}, as in {example}; got {turn!r}")
        return cls(template)

    @property
    def prompt(self) -> Template:
        """The prompt of a chat that has just begun: a first turn, and the beginning of the answer."""
        asks, answers = self.roles
        before, after = self._around(asks)
        return Template(((before, "content"), (after + self.opening(answers), None)))

    def said(self, role: str, content: str) -> str:
        """The text of one turn."""
        return self.turn.fill({"role": role, "content": content})

    def opening(self, role: str) -> str:
        """The text of a turn before its content, without the last blanks, which belong to the content.

        A byte-level vocabulary joins a blank to the word after it, as in `Task`.
        """
        return self._around(role)[0].rstrip(" ")

    def _around(self, role: str) -> tuple[str, str]:
        """The text of a turn before its content, and the text after it."""
        place = [name for _, name in self.turn.parts].index("content")
        before, literal = Template(self.turn.parts[:place]), self.turn.parts[place][0]
        return before.fill({"role": role}) + literal, Template(self.turn.parts[place + 1 :]).fill({"role": role})
