"""Renders the Jinja template of a bundle within limits of work, because a bundle's template may be hostile.

jinja2's sandbox renders, as in transformers. Here it sees plain values only, reaches the listed attributes, methods and
filters only, and pays for each of its steps out of a budget. Needs jinja2, the extra `chat`.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial, update_wrapper
from typing import Any

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgelm.bundle.chat_template import MAX_TEMPLATE_CHARACTERS
from edgelm.errors import BundleError, PromptError, pass_interrupts_on

MAX_TEMPLATE_NODES = 10_000
"""The largest template after parsing, which bounds the time that compiling it takes."""
STEP_UNITS = 16
"""What an operator, a filter or a turn of a loop costs; a character or a node of the template costs one unit."""
LEAST_BUDGET_UNITS = 8_000_000
"""What a template may do without any messages: about half a second, and 8 million characters."""

_MAX_DEPTH = 32
_MAX_BITS = 128
_MAX_INDENT = 8
_MAX_TIME_FORMAT = 100
_ITEM_UNITS = 4
_CALL_UNITS = 64  # a macro takes about five microseconds

# What templates may use, by name.
_FILTERS = (
    "abs capitalize count d default dictsort first float int items last length list lower map max min reject "
    "rejectattr reverse select selectattr sort title trim unique upper"
)
_STR_METHODS = (
    "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join lower lstrip partition "
    "removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip title "
    "upper"
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset(["get", "items", "keys", "values"]),
    list: frozenset(["count", "index"]),
    tuple: frozenset(["count", "index"]),
}
_LOOP = "cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
# Filters and tests that look at no item of a value.
_SHALLOW_FILTERS = "count d default first last length list reverse"
_SHALLOW_TESTS = (
    "boolean callable defined false float integer iterable mapping none number sequence string true undefined"
)
_SCALARS = (bool, int, float, type(None))
_REFUSED_NODES = (
    nodes.Block,
    nodes.EvalContextModifier,
    nodes.Extends,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
    nodes.Pow,
)
# No template can call these: the names are no names in Jinja.
_MEASURED, _JOINED, _PAID = ":measured", ":joined", ":paid"


class JinjaTemplate:
    """One compiled template. Several threads may render it at the same time."""

    def __init__(self, source: str, name: str) -> None:
        """Compile `source`.

        Args:
            source: the template.
            name: what error messages call it.

        Raises:
            BundleError: the template is too long, is not a Jinja template, or uses what is not offered here.
        """
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise BundleError(f"{name} has {len(source):,} characters, more than {MAX_TEMPLATE_CHARACTERS:,}")
        self._name, self._environment = name, _Environment()
        self._environment.work.budget = LEAST_BUDGET_UNITS
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:
            pass_interrupts_on(error)
            raise BundleError(f"{name} cannot be used: {_reason(error)}") from None

    def render(self, variables: Mapping[str, Any], now: datetime, more_units: int = 0) -> str:
        """Render the template.

        Args:
            variables: str, numbers, None, and lists and dicts of them; never changed.
            now: what the template's `strftime_now` tells.
            more_units: work (`STEP_UNITS`) that the template may do, because the variables are large, on top of
                `LEAST_BUDGET_UNITS`.

        Raises:
            PromptError: the template refuses the variables, fails, or does more work.
        """
        budget = LEAST_BUDGET_UNITS + more_units
        self._environment.work.budget, self._environment.work.now = budget, now
        try:
            return self._template.render(variables)
        except _Refusal as error:
            raise PromptError(f"{self._name} refuses these messages: {_one_line(str(error))}") from None
        except _Exhausted:
            raise PromptError(
                f"{self._name} was stopped, because it does more work than {budget:,} units: shorten the messages, "
                "or use a bundle with another template"
            ) from None
        except Exception as error:
            pass_interrupts_on(error)
            raise PromptError(f"{self._name} cannot render these messages: {_reason(error)}") from None


class _Refusal(TemplateError):
    """The template called `raise_exception`."""


class _Exhausted(TemplateError):
    """The budget is spent."""


class _Method:
    """A method of a plain value, or a function, that templates may call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Generation(Extension):
    """The tag ``{% generation %}``, with which transformers finds what an assistant said. It changes no text."""

    tags = {"generation"}  # noqa: RUF012 jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the settings of transformers, lists of what may be reached, and a budget."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=pass_context(lambda context, value: self.text(value)),
            optimized=False,  # constants would be computed while compiling
            cache_size=0,
        )
        self.work = threading.local()  # `budget` and `now` of the rendering in this thread
        shallow = _SHALLOW_FILTERS.split()
        filters: dict[str, Callable[..., Any]] = {
            name: self._paid_function(FILTERS[name], shallow=name in shallow) for name in _FILTERS.split()
        }
        filters |= {"string": self.text, "safe": self.text, "join": self._join, "replace": self._replace}
        filters |= {"indent": self._indent, "tojson": self._tojson}
        filters |= {_MEASURED: self._measured, _JOINED: self._joined, _PAID: self._paid}
        self.filters = filters
        shallow = _SHALLOW_TESTS.split()
        tests: dict[str, Any] = TESTS
        self.tests = {name: self._paid_function(test, shallow=name in shallow) for name, test in tests.items()}
        given: dict[str, Callable[..., Any]] = {"dict": dict, "namespace": Namespace, "range": self._range}
        self.globals = {name: _Method(self._paid_function(function)) for name, function in given.items()}
        self.globals["raise_exception"] = _Method(self._raise_exception)
        self.globals["strftime_now"] = _Method(self._strftime_now)

    def spend(self, units: int) -> None:
        """Take `units` out of the budget; raises _Exhausted where it does not hold them."""
        self.work.budget -= abs(units)
        if self.work.budget < 0:
            raise _Exhausted

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if _size(tree) > MAX_TEMPLATE_NODES:
            raise SecurityError(f"it has more than {MAX_TEMPLATE_NODES:,} nodes")
        paid: nodes.Template = _Payments().visit(tree)
        return paid

    # What a template may reach.

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``: a listed method, then an item, as in Jinja."""
        if attribute in _METHODS.get(type(obj), ()):
            return _Method(partial(self._method, obj, attribute))
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        if isinstance(obj, LoopContext) and attribute in _LOOP.split():
            value = getattr(obj, attribute)
            return _Method(value) if attribute == "cycle" else value
        if isinstance(obj, Namespace) and not attribute.startswith("_"):
            return getattr(obj, attribute, self.undefined(obj=obj, name=attribute))
        if isinstance(obj, Undefined):
            return getattr(obj, attribute)  # says what is undefined
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``: an item, then a listed method, as in Jinja."""
        self.spend(STEP_UNITS)
        if type(obj) in _METHODS:
            try:
                found = obj[self._measured(argument)]
            except (TypeError, LookupError):
                pass
            else:
                if isinstance(argument, slice):
                    self._pay_for(found)
                return found
        if isinstance(obj, Undefined):
            return obj[argument]
        return self.getattr(obj, argument) if isinstance(argument, str) else self.undefined(obj=obj, name=argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """``obj(...)``: a macro, or what this environment offers."""
        __self.spend(_CALL_UNITS)
        if isinstance(__obj, (Macro, _Method)):
            return __context.call(__obj, *args, **kwargs)
        if isinstance(__obj, Undefined):
            return __obj(*args, **kwargs)  # says what is undefined
        raise SecurityError(f"a value of the type {type(__obj).__name__} cannot be called")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``, of which the size of the result is known before."""
        self.spend(STEP_UNITS)
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, (str, list, tuple)) and isinstance(times, int):
                self.spend(_ITEM_UNITS * len(value) * max(0, times))
        if operator == "+" and type(left) is type(right) and isinstance(left, (str, list, tuple)):
            self._pay_for(left, right)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the operator % is for numbers only")
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise SecurityError(f"a number has more than {_MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)

    # What it costs.

    def _pay_for(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, str):
                self.spend(len(value))
            elif isinstance(value, (list, tuple, dict)):
                self.spend(_ITEM_UNITS * len(value))

    def _measured(self, value: Any, depth: int = 0, node_units: int = STEP_UNITS) -> Any:
        """Return `value` after paying for all that is in it: shared parts count as often as they are reached."""
        if isinstance(value, str):
            self.spend(len(value) + 1)
        elif isinstance(value, (list, tuple, dict)):
            if depth >= _MAX_DEPTH:
                raise SecurityError(f"a value is nested more than {_MAX_DEPTH} levels deep")
            self.spend(node_units * (len(value) + 1))
            for item in value:
                self._measured(item, depth + 1, node_units)
                if isinstance(value, dict):
                    self._measured(value[item], depth + 1, node_units)
        elif isinstance(value, Namespace):
            raise SecurityError("a namespace is no value")
        return value

    def _paid(self, value: Any, units: int) -> Any:
        self.spend(units)
        return value

    def _paid_function(self, function: Callable[..., Any], *, shallow: bool = False) -> Callable[..., Any]:
        """`function` of templates, paid by what goes in and by what comes out; what it yields becomes a list.

        `shallow` says that it looks at no item of a value.
        """

        def paid(*args: Any, **kwargs: Any) -> Any:
            self.spend(STEP_UNITS)
            for value in (*args, *kwargs.values()):
                if shallow:
                    self._pay_for(value)
                elif not isinstance(value, (Context, _Environment, Namespace)):
                    self._measured(value)
            result = function(*args, **kwargs)
            if not isinstance(result, (str, list, tuple, dict, Undefined, Namespace, *_SCALARS)):
                result = list(result)
            self._pay_for(result)
            return result

        return update_wrapper(paid, function)

    def _method(self, value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "replace":
            return self._replace(value, *args, **kwargs)
        if name == "join":
            return self._join(args[0] if args else [], value)
        for argument in args:
            self._measured(argument)
        if isinstance(value, dict):
            result = getattr(value, name)(*args)
            return result if name == "get" else self._list(result)
        if isinstance(value, (list, tuple)):
            return getattr(self._measured(value), name)(*args)
        if name in ("split", "rsplit", "splitlines"):
            separator = args[0] if args and isinstance(args[0], str) else kwargs.get("sep")
            self.spend(STEP_UNITS * value.count(separator) if separator else _ITEM_UNITS * len(value))
        self.spend(0 if name in ("startswith", "endswith", "removeprefix") else len(value))
        return getattr(value, name)(*args, **kwargs)

    # What it calls.

    def text(self, value: Any) -> str:
        """`value` as the template writes it."""
        if isinstance(value, str):
            self.spend(len(value) + 1)
            return value
        if isinstance(value, Undefined):
            return str(value)
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise SecurityError(f"a number has more than {_MAX_BITS} bits")
        if not isinstance(value, (list, tuple, dict, *_SCALARS)):
            raise SecurityError(f"a value of the type {type(value).__name__} has no text")
        written = str(self._measured(value))
        self.spend(len(written))
        return written

    def _list(self, value: Iterable[Any]) -> list[Any]:
        result = list(value)
        self._pay_for(result)
        return result

    def _joined(self, values: list[Any]) -> str:
        """The operator ``~``."""
        return "".join(map(self.text, values))

    def _join(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        items = self._list(value)
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        separator = self.text(d)
        self.spend(len(separator) * len(items))
        return separator.join(map(self.text, items))

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self.text(s), self.text(old), self.text(new)
        times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        self.spend(len(text) + times * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self.text(s)
        space = width if isinstance(width, int) else len(width)
        if space > _MAX_INDENT:
            raise SecurityError(f"an indent is wider than {_MAX_INDENT}")
        self.spend(len(text) + (len(text.splitlines()) + 1) * space)
        indented: str = FILTERS["indent"](text, width, first, blank)
        return indented

    def _tojson(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not 0 <= indent <= _MAX_INDENT:
            raise SecurityError(f"the indent of tojson must be from 0 to {_MAX_INDENT}")
        if separators is not None and any(len(separator) > _MAX_INDENT for separator in separators):
            raise SecurityError(f"a separator of tojson is longer than {_MAX_INDENT}")
        self._measured(x, 0, STEP_UNITS + _MAX_DEPTH * (indent or 0))
        # As in transformers: Jinja's own filter writes <, > and & as escapes of HTML.
        text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.spend(len(text))
        return text

    def _range(self, *args: int) -> list[int]:
        numbers = range(*args)
        self.spend(STEP_UNITS * len(numbers))
        return list(numbers)

    def _strftime_now(self, format: str) -> str:
        if len(format) > _MAX_TIME_FORMAT:
            raise SecurityError(f"the format of strftime_now is longer than {_MAX_TIME_FORMAT} characters")
        now: datetime = self.work.now
        return now.strftime(re.sub(r"%[0-9_^#-]+", "%", format))  # widths: some systems write "%9999d" in full

    def _raise_exception(self, message: Any) -> None:
        raise _Refusal(self.text(message))


class _Payments(NodeTransformer):
    """Makes a parsed template pay for what jinja2 would do without asking the environment."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Replace `node` by its paid form."""
        if isinstance(node, _REFUSED_NODES):
            raise SecurityError(f"{type(node).__name__.lower()} is not offered to chat templates")
        if isinstance(node, nodes.For) and node.recursive:
            raise SecurityError("recursive loops are not offered to chat templates")
        size = _size(node) if isinstance(node, _REPEATED) else 0
        node = super().visit(node, *args, **kwargs)
        if isinstance(node, nodes.TemplateData):
            return nodes.Const(node.data, lineno=node.lineno)
        if isinstance(node, nodes.Concat):
            return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
        if isinstance(node, (nodes.Compare, nodes.Operand)):
            node.expr = _filter(node.expr, _MEASURED)
        elif isinstance(node, nodes.Pair):
            node.key = _filter(node.key, _MEASURED)
        elif isinstance(node, _REPEATED):
            turn = nodes.Const(STEP_UNITS + size)
            node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), _PAID, turn), lineno=node.lineno))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(_filter(nodes.Const(True), _PAID, turn), node.test, lineno=node.lineno)
        return node


_REPEATED = (nodes.For, nodes.Macro, nodes.CallBlock)
"""What may run many times for each time that it stands in a template."""


def _size(tree: nodes.Node) -> int:
    return sum(1 for _ in tree.find_all(nodes.Node))


def _filter(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _one_line(str(error) or type(error).__name__)


def _one_line(text: str) -> str:
    """`text`, which a bundle may have written, on one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:200]
