"""Texts with named fields in braces, such as ``{sentence}``, and plain substitution: nothing is computed."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from edgelm.errors import pass_interrupts_on


class TemplateError(ValueError):
    """The text is no template. The message completes a sentence that begins with its name."""


@dataclass(frozen=True)
class Template:
    """Text with names in braces, as in Python's ``str.format``; ``{{`` and ``}}`` stand for braces."""

    parts: tuple[tuple[str, str | None], ...]
    """Pairs of a text and the name whose value follows it; None where no value follows."""

    @classmethod
    def read(cls, text: str) -> Self:
        """Read a template; raises TemplateError if a brace has no partner, or encloses something other than a name."""
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            pass_interrupts_on(error)
            raise TemplateError(f"cannot be read: {error}; write {{{{ for a brace") from None
        if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise TemplateError("must have names in its braces, like {text}")
        return cls(tuple((literal, name) for literal, name, _, _ in parts))

    @property
    def names(self) -> tuple[str, ...]:
        """The names, each once, in their order."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with `values` in the places of all `names`. Braces in a value stay as they are."""
        return "".join(literal + ("" if name is None else values[name]) for literal, name in self.parts)

    def shown(self) -> str:
        """The text with each name in braces."""
        return self.fill({name: f"{{{name}}}" for name in self.names})
