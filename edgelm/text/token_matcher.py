"""Constraints become token matchers, through llguidance (the extra `constrain`).

A constraint may come from a stranger. llguidance reads by recursion, which a chain of rules can make deep enough to
end the process, so it reads in a thread with a large stack. Its own limits bound the work of most constraints, and
`edgelm.text.constraints` refuses beforehand what they do not bound (docs/constraints.md).
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from edgelm.errors import ConfigError, EdgelmError, TokenizerError, install_hint, pass_interrupts_on
from edgelm.text.call_grammar import call_grammar
from edgelm.text.constraints import Choices, Constraint, Grammar, JsonSchema, Regex, ToolUse, place_of_key
from edgelm.text.rust import rust_errors
from edgelm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Result = TypeVar("Result")

READING_SECONDS = 10.0
"""How long reading a constraint may take, the wait for others included."""
_STACK_BYTES = 128 * 2**20
"""Reserved, not used, unless a constraint is nested deeply. A level of rules takes about 8 KB."""
_KEPT_CONSTRAINTS = 8
_turns: dict[int, threading.Lock] = {}
"""Held while a constraint is read, by process: a forked child must not wait for a thread of its parent."""

_NAMES = {
    Choices: "the choices",
    Regex: "the regular expression",
    JsonSchema: "the JSON schema",
    Grammar: "the grammar",
    ToolUse: "the calls of tools",
}
_SPECIAL = b"\xff"
"""Stands before the id of a special token in llguidance's bytes; it is in no text."""
_MEANS_SOMETHING = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")
_AT = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_REGEX_ERROR = re.compile(r"regex parse error:\n    .*\n    ( *)\^.*\nerror: (.*)")
_UNKNOWN_KEYS = re.compile(r'Unimplemented keys: \["([^"]*)"')


class Matcher:
    """A `TokenMatcher` of `edgelm.decoding.constraint`."""

    def __init__(self, reader: "LLMatcher", vocab_size: int, ends: npt.NDArray[np.int64], name: str) -> None:
        self._reader, self._vocab_size, self._ends, self._name = reader, vocab_size, ends, name

    @property
    def accepts(self) -> bool:
        """Whether the text may end here."""
        return self._reader.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the text must end here, because nothing can follow."""
        return self._reader.is_stopped() and self._reader.is_accepting()

    def mask(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, (V,), without those that end a text. Raises ConfigError as `take`."""
        bits = np.frombuffer(self._reader.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(self._vocab_size, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(known)] = known
        allowed[self._ends] = False
        if not (allowed.any() or self.accepts):
            raise ConfigError(f"{self._name} cannot go on: this model's vocabulary has no token that fits")
        return allowed

    def forced(self) -> list[int]:
        """The tokens that spell the only way on, as the tokenizer would; empty where there are several ways."""
        tokens = self._reader.compute_ff_tokens()
        return tokens if all(token < self._vocab_size for token in tokens) else []

    def take(self, token: int) -> None:
        """Append a token. Raises ConfigError if it is not allowed, or if the constraint takes too much work here."""
        if not self._reader.consume_token(token):
            self._check()

    def copy(self) -> "Matcher":
        """A matcher of the same text, which grows by itself."""
        return Matcher(self._reader.deep_copy(), self._vocab_size, self._ends, self._name)

    def _check(self) -> None:
        if self._reader.is_error():
            raise ConfigError(f"{self._name} cannot go on: {_reason(self._reader.get_error())}")


@dataclass(frozen=True, slots=True)
class ReadConstraint:
    """A constraint for one tokenizer."""

    matcher: Matcher
    """At the beginning of a text. It never grows: texts get copies."""
    beginnings: tuple[bytes, ...]
    """Every text begins with one of these."""
    are_whole: bool
    """Whether the beginnings are the whole texts."""
    words: "_Vocabulary"

    def least_tokens(self, limit: int) -> int:
        """A number of tokens that every text has at least; at most `limit` where that many may be enough.

        It is exact for choices that need more than `limit`.
        """
        shortest = min(map(len, self.beginnings))
        if shortest <= limit:  # a token has a byte at least
            return 0
        longest = max(map(len, self.beginnings))
        least = longest
        for text in sorted(self.beginnings, key=len):
            least = min(least, self.words.least(text, whole=self.are_whole, limit=least))
        return least


class ConstraintReader:
    """Reads constraints for one tokenizer, and keeps the latest ones. Several threads may call it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words: _Vocabulary | None = None
        self._kept: OrderedDict[Constraint, ReadConstraint] = OrderedDict()

    def read(self, constraint: Constraint, eos_token_id: Iterable[int]) -> ReadConstraint:
        """Read a constraint, or find what was read of it lately.

        Raises:
            ConfigError: the constraint cannot be read, would take too much work, or allows no text; llguidance is
                missing, or does not know this kind of tokenizer.
            EdgelmError: the system refuses a thread.
        """
        kept = self._kept.get(constraint)
        if kept is None:
            kept = _in_turn(lambda: self._read(constraint, tuple(eos_token_id)))
            self._kept[constraint] = kept
            while len(self._kept) > _KEPT_CONSTRAINTS:
                self._kept.popitem(last=False)
        return kept

    def _read(self, constraint: Constraint, eos_token_id: tuple[int, ...]) -> ReadConstraint:
        if self._words is None:
            self._words = _Vocabulary(self._tokenizer, eos_token_id)
        words, name = self._words, _NAMES[type(constraint)]
        with rust_errors(ConfigError, f"{name} cannot be read", "make it simpler"):
            try:
                source = _source(constraint, words)
            except ValueError as error:
                pass_interrupts_on(error)
                raise ConfigError(f"{name} cannot be read: {_reason(str(error))}") from None
            reader = words.matcher(source)
        if reader.is_error():
            self._blame_function(constraint, words)
            raise ConfigError(f"{name} cannot be read: {_reason(reader.get_error(), constraint)}")
        matcher = Matcher(reader, self._tokenizer.vocab_size, words.ends, name)
        probe = matcher.copy()
        if not probe.is_finished:
            probe.mask()  # an error if there is no text at all
        if isinstance(constraint, Choices):
            return ReadConstraint(matcher, tuple(text.encode() for text in constraint.texts), True, words)
        beginning, _, _ = reader.deep_copy().compute_ff_bytes().partition(_SPECIAL)
        return ReadConstraint(matcher, (beginning,), False, words)

    def _blame_function(self, constraint: Constraint, words: "_Vocabulary") -> None:
        """Raise ConfigError for the first function of a `ToolUse` whose schema cannot be read, if there is one."""
        for function, schema in constraint.functions if isinstance(constraint, ToolUse) else ():
            reader = words.matcher(_source(schema, words))
            if reader.is_error():
                reason = _reason(reader.get_error(), schema)
                raise ConfigError(f"the parameters of the function {function!r} cannot be read: {reason}")


class _Vocabulary:
    """A tokenizer as llguidance sees it: the bytes of every token."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: tuple[int, ...]) -> None:
        try:
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer
        except ModuleNotFoundError as error:
            if error.name != "llguidance":
                raise
            hint = install_hint("constrain")
            raise ConfigError(f"constraints need llguidance, which is missing; {hint}") from None
        # Its bit in a mask says whether a text may end. A special token, because no text contains these.
        special = tokenizer.special_tokens.values()
        end = next(iter([*(i for i in eos_token_id if i in special), *special, *eos_token_id]), None)
        if end is None:
            raise ConfigError("constraints need a token that ends a text, and this model has none: give eos_token_id")
        try:
            text = tokenizer.backend_json()
        except TokenizerError as error:
            raise ConfigError(f"constraints do not work with this model: {error}") from None
        with rust_errors(ConfigError, "constraints do not know this model's kind of tokenizer", "drop the constraint"):
            self._tokenizer = LLTokenizer(text, eos_token=[end])
        self.ends = np.array([end] if end < tokenizer.vocab_size else [], np.int64)
        self._limits = LLParserLimits(
            initial_lexer_fuel=300_000, max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False
        )
        self._new_matcher = LLMatcher
        self._vocab_size = min(tokenizer.vocab_size, self._tokenizer.vocab_size)
        self._spellings: frozenset[bytes] | None = None
        # llguidance makes no text of these, but of all others. The tokenizer need not call them special.
        self.special = {
            token: token_id
            for token, token_id in tokenizer.added_tokens.items()
            if token and token_id < self._vocab_size and self._tokenizer.is_special_token(token_id)
        }
        self._no_end = {token: i for token, i in self.special.items() if i not in (end, *eos_token_id)}

    def free_of(self, use: ToolUse) -> dict[str, int]:
        """Those of `special` that end no text and are no part of the syntax of calls."""
        around = "".join(use.syntax.parts)
        return {token: token_id for token, token_id in self._no_end.items() if token not in around}

    def matcher(self, source: str) -> "LLMatcher":
        """A matcher, which may be in an error state."""
        return self._new_matcher(self._tokenizer, source, log_level=0, limits=self._limits)

    def least(self, text: bytes, *, whole: bool, limit: int) -> int:
        """The fewest tokens that spell `text`, or, if not `whole`, a text that begins with it; at most `limit`."""
        if self._spellings is None:
            ids = (i for i in range(self._vocab_size) if not self._tokenizer.is_special_token(i))
            self._spellings = frozenset(self._tokenizer.decode_bytes([i]) for i in ids)
        longest = max(map(len, self._spellings), default=1)
        fewest = [0] + [limit] * len(text)
        for start in range(len(text)):
            if fewest[start] + 1 >= limit:  # no way through here is shorter
                continue
            for end in range(start + 1, min(len(text), start + longest) + 1):
                if fewest[start] + 1 < fewest[end] and text[start:end] in self._spellings:
                    fewest[end] = fewest[start] + 1
        if whole:
            return fewest[-1]
        # The last token may go on after the text.
        return min((fewest[start] + 1 for start in range(max(0, len(text) - longest), len(text))), default=0)


def _source(constraint: Constraint, words: _Vocabulary) -> str:
    """The constraint in llguidance's own form. Raises ValueError if a schema is nested too deeply for it."""
    from llguidance import LLMatcher

    match constraint:
        case Choices():
            return LLMatcher.grammar_from_regex("|".join(map(_escaped, constraint.texts)))
        case Regex():
            return LLMatcher.grammar_from_regex(constraint.pattern)
        case JsonSchema():
            # Where blanks are allowed, small models write nothing else.
            return LLMatcher.grammar_from_json_schema(str(constraint.schema), overrides={"whitespace_flexible": False})
        case Grammar():
            return LLMatcher.grammar_from_lark(constraint.text)
        case ToolUse():
            return LLMatcher.grammar_from_lark(call_grammar(constraint, words.special, words.free_of(constraint)))


def _escaped(text: str) -> str:
    return _MEANS_SOMETHING.sub(r"\\\g<0>", text)


def _in_turn(read: Callable[[], Result]) -> Result:
    """``read()`` in a thread with a large stack, one at a time in this process. Raises ConfigError if it takes long."""
    turn = _turns.setdefault(os.getpid(), threading.Lock())
    if not turn.acquire(timeout=READING_SECONDS):
        raise ConfigError(f"another constraint is being read for more than {READING_SECONDS:g} s: try again")
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(read())
        except BaseException as error:
            pass_interrupts_on(error)
            errors.append(error)
        finally:
            turn.release()

    thread = threading.Thread(target=work, name="edgelm-constraint", daemon=True)
    before = threading.stack_size(_STACK_BYTES)  # for all new threads, so only while this one starts
    try:
        thread.start()
    except BaseException as error:
        pass_interrupts_on(error)
        turn.release()
        if not isinstance(error, RuntimeError):
            raise
        raise EdgelmError(f"the system refuses a thread to read the constraint ({error})") from None
    finally:
        threading.stack_size(before)
    thread.join(READING_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise ConfigError(f"reading the constraint takes longer than {READING_SECONDS:g} s: make it simpler")
    return results[0]


def _reason(message: str, constraint: Constraint | None = None) -> str:
    """One line out of llguidance's message, with the place that it names."""
    message = message.replace("<non-verbose/>", "").strip()
    if wrong := _REGEX_ERROR.search(message):
        return f"{wrong[2]} (at character {len(wrong[1]) + 1})"
    if isinstance(constraint, JsonSchema) and (unknown := _UNKNOWN_KEYS.search(message)):
        place = place_of_key(str(constraint.schema), unknown[1])
        return f"the keyword {unknown[1][:60]!r} is not supported (at {place})"
    line = (message.splitlines() or ["no reason is known"])[0][:300]
    if at := _AT.match(line):
        line = at[3] if isinstance(constraint, (Regex, Choices)) else f"{at[3]} (line {at[1]}, column {at[2]})"
    if line.startswith("NoExtension"):
        line = "there is no text that it allows"
    return line
