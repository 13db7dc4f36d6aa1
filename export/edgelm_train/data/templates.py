"""Templates that turn a row of a file, or the turns of a chat, into prompts and completions."""

import re
from dataclasses import dataclass
from typing import Self

from edgelm.bundle.template import Template as NamedTemplate
from edgelm.bundle.template import TemplateError
from edgelm.errors import ConfigError

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


class Template(NamedTemplate):
    """A template whose names are columns."""

    @classmethod
    def parse(cls, text: str) -> Self:
        r"""Read a template as it is typed in a shell, where ``\n`` is a new line, ``\t`` a tab and ``\\`` a backslash.

        Raises:
            ConfigError: a brace has no partner, or encloses something other than the name of a column.
        """
        try:
            return cls.read(unescaped(text))
        except TemplateError as error:
            raise ConfigError(f"the template {text!r} {error}") from None

    @property
    def columns(self) -> tuple[str, ...]:
        """The column names, each once."""
        return self.names


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


def escaped(text: str) -> str:
    """`text` as it would be typed in a shell, so that `unescaped` gives it back."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")


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
