"""Templates: a row of named columns becomes the text of a prompt or of a completion."""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

from edgelm.errors import ConfigError

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class Template:
    """Text with the names of columns in braces, as Python's ``str.format`` has it; ``{{`` and ``}}`` are braces."""

    parts: tuple[tuple[str, str | None], ...]
    """Text, and the column whose value follows it."""

    @classmethod
    def parse(cls, text: str) -> "Template":
        r"""Read a template as it is typed in a shell: the two characters ``\n`` are a new line, ``\t`` is a tab.

        Raises:
            ConfigError: a brace has no partner, or holds something else than the name of a column.
        """
        try:
            parts = list(string.Formatter().parse(unescaped(text)))
        except ValueError as error:
            raise ConfigError(f"the template {text!r} cannot be read: {error}; write {{{{ for a brace") from None
        for _, name, spec, conversion in parts:
            if name == "" or spec or conversion:
                raise ConfigError(f"the template {text!r} must hold names of columns in braces, like {{text}}")
        return cls(tuple((before, name) for before, name, _, _ in parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names it holds, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, row: Mapping[str, str]) -> str:
        """The text for one row, which has all `columns`."""
        return "".join(before + ("" if name is None else row[name]) for before, name in self.parts)


def unescaped(text: str) -> str:
    r"""A text as it is typed in a shell: the characters ``\n`` are a new line, ``\t`` is a tab, ``\\`` a backslash."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)
