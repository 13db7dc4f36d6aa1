"""A flag for every generation option, in groups: the ten that people use most come first in ``--help``.

Values are checked where they are defined (GenerationConfig), so that Python, JSON and the shell say the same.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

COMMON = "Common options"
LENGTH = "Length and end"
SAMPLING = "More ways to sample"
REPETITION = "Against repetition"
TOKENS = "Single tokens"
SEARCH = "Beam search and contrastive search"
SPEED = "Speed"


class GroupedOption(click.Option):
    """An option that stands under its group's heading."""

    def __init__(self, *args: Any, group: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """Writes its options group by group; the others come under "Output and machine"."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group, in the order of the options."""
        sections: dict[str, list[tuple[str, str]]] = {COMMON: [], "Output and machine": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                group = COMMON if parameter.name == "model" else getattr(parameter, "group", "Output and machine")
                sections.setdefault(group, []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


Values = tuple[str, ...]


def _id_lists(ctx: click.Context, param: click.Parameter, values: Values) -> list[list[int]]:
    """Token ids with commas between, each time: ``11,42``."""
    try:
        return [[int(part) for part in value.split(",")] for value in values]
    except ValueError:
        raise click.BadParameter("token ids go like 11 or 11,42", ctx, param) from None


def _flat_ids(ctx: click.Context, param: click.Parameter, values: Values) -> list[int]:
    """The ids of all lists together."""
    return [token for ids in _id_lists(ctx, param, values) for token in ids]


def _biases(ctx: click.Context, param: click.Parameter, values: Values) -> list[tuple[list[int], float]]:
    """Token ids and a number, each time: ``11,42=-3.5``."""
    parts = [value.rpartition("=") for value in values]
    try:
        numbers = [float(number) for _, _, number in parts]
    except ValueError:
        raise click.BadParameter("a bias goes like 11=-3.5", ctx, param) from None
    return list(zip(_id_lists(ctx, param, tuple(ids for ids, _, _ in parts)), numbers, strict=True))


def _token_biases(ctx: click.Context, param: click.Parameter, values: Values) -> list[tuple[int, float]]:
    """The same for one token each."""
    found = _biases(ctx, param, values)
    if any(len(ids) != 1 for ids, _ in found):
        raise click.BadParameter("one token each, like 11=-3.5", ctx, param)
    return [(ids[0], bias) for ids, bias in found]


def _start_and_factor(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    return None if value is None else (int(value[0]), value[1])


def _early_stopping(ctx: click.Context, param: click.Parameter, value: str | None) -> bool | str | None:
    return {"true": True, "false": False}.get(value or "", value)


def _number(group: str, name: str, metavar: str, text: str, kind: Any = float) -> Any:
    return click.option(name, type=kind, metavar=metavar, help=text, cls=GroupedOption, group=group)


def _listed(group: str, name: str, metavar: str, text: str, read: Callable[..., Any]) -> Any:
    return click.option(name, multiple=True, metavar=metavar, help=text, callback=read, cls=GroupedOption, group=group)


_FLAGS = (
    click.option(
        "-n",
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="Most tokens to add.  [default: what the bundle says, or 128]",
        cls=GroupedOption,
        group=COMMON,
    ),
    click.option(
        "--do-sample/--greedy",
        default=None,
        help="Draw tokens at random, or always take the likeliest.  [default: what the bundle says]",
        cls=GroupedOption,
        group=COMMON,
    ),
    _number(COMMON, "--temperature", "T", "Below 1 is more predictable, above 1 less."),
    _number(COMMON, "--top-k", "K", "Sample among the K likeliest tokens.", int),
    _number(COMMON, "--top-p", "P", "Sample among the likeliest tokens that sum to P."),
    _number(COMMON, "--min-p", "P", "Sample among tokens P times as likely as the likeliest."),
    _number(COMMON, "--repetition-penalty", "F", "Above 1: repeat less."),
    click.option(
        "--stop-strings",
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End at this text; repeatable.",
        cls=GroupedOption,
        group=COMMON,
    ),
    _number(COMMON, "--num-return-sequences", "N", "How many continuations to return.", int),
    _number(COMMON, "--seed", "N", "Makes sampling repeatable.", int),
    _number(SPEED, "--prompt-lookup-num-tokens", "N", "Draft up to N tokens from the text so far.", int),
    _number(LENGTH, "--max-length", "N", "Most tokens in all, prompt included.", int),
    _number(LENGTH, "--min-new-tokens", "N", "No end-of-text token before N new tokens.", int),
    _number(LENGTH, "--min-length", "N", "No end-of-text token before N tokens in all.", int),
    _number(LENGTH, "--max-time", "SECONDS", "Stop after this time with what is there."),
    click.option(
        "--context-overflow",
        type=click.Choice(["stop", "truncate", "window"]),
        help="At the context's end stop; drop the start of a long prompt; or forget and go on.  [default: stop]",
        cls=GroupedOption,
        group=LENGTH,
    ),
    _number(LENGTH, "--pinned-tokens", "N", "The prompt's first N tokens are never dropped.", int),
    _listed(LENGTH, "--eos-token-id", "ID,...", "End at these tokens; repeatable.", _flat_ids),
    _listed(LENGTH, "--forced-eos-token-id", "ID,...", "What fills the last place.", _flat_ids),
    click.option(
        "--exponential-decay-length-penalty",
        type=float,
        nargs=2,
        metavar="N FACTOR",
        callback=_start_and_factor,
        help="After N new tokens, make the end likelier by FACTOR with each.",
        cls=GroupedOption,
        group=LENGTH,
    ),
    _number(SAMPLING, "--typical-p", "P", "Sample among the most typical tokens that sum to P."),
    _number(SAMPLING, "--epsilon-cutoff", "P", "Sample among tokens at least this likely."),
    _number(SAMPLING, "--eta-cutoff", "P", "The same, but lower where the model is unsure."),
    _number(SAMPLING, "--top-n-sigma", "N", "Sample among logits within N standard deviations of the largest."),
    _number(SAMPLING, "--xtc-probability", "P", "How often to exclude the likeliest choices."),
    _number(SAMPLING, "--xtc-threshold", "P", "Exclude all tokens this likely but the least.  [default: 0.1]"),
    _number(SAMPLING, "--mirostat-tau", "BITS", "Mirostat 2: aim at this surprise of each token."),
    _number(SAMPLING, "--mirostat-eta", "RATE", "How fast mirostat corrects itself.  [default: 0.1]"),
    _number(REPETITION, "--presence-penalty", "F", "Taken off every token the new text has."),
    _number(REPETITION, "--frequency-penalty", "F", "Taken off each time the new text has the token."),
    _number(REPETITION, "--no-repeat-ngram-size", "N", "No run of N tokens appears twice.", int),
    _number(REPETITION, "--dry-multiplier", "F", "Penalty for lengthening a repeated run of tokens."),
    _number(REPETITION, "--dry-base", "F", "Its growth with each token of the run.  [default: 1.75]"),
    _number(REPETITION, "--dry-allowed-length", "N", "Shorter runs go unpunished.  [default: 2]", int),
    click.option(
        "--dry-sequence-breakers",
        multiple=True,
        metavar="TEXT",
        help='Runs end here; repeatable.  [default: newline, : " *]',
        cls=GroupedOption,
        group=REPETITION,
    ),
    _listed(TOKENS, "--logit-bias", "ID=X", "Add X to the token's logit; repeatable, as all of these.", _token_biases),
    _listed(TOKENS, "--sequence-bias", "ID,...=X", "Add X where these tokens would follow each other.", _biases),
    _listed(TOKENS, "--bad-words-ids", "ID,...", "Tokens that never follow each other.", _id_lists),
    _listed(TOKENS, "--suppress-tokens", "ID,...", "Tokens that never appear.", _flat_ids),
    _listed(TOKENS, "--begin-suppress-tokens", "ID,...", "Tokens that do not come first.", _flat_ids),
    _number(TOKENS, "--forced-bos-token-id", "ID", "What follows a prompt of one token.", int),
    _number(SEARCH, "--num-beams", "N", "Beam search: follow N continuations at once.", int),
    _number(SEARCH, "--num-beam-groups", "N", "Beams in N groups that avoid each other's tokens.", int),
    _number(SEARCH, "--diversity-penalty", "F", "How much the groups avoid each other."),
    _number(SEARCH, "--length-penalty", "F", "Above 0 favours long beams, below 0 short ones.  [default: 1]"),
    click.option(
        "--early-stopping",
        type=click.Choice(["true", "false", "never"]),
        callback=_early_stopping,
        help="Stop at N finished beams (true), when better ones are unlikely, or impossible.",
        cls=GroupedOption,
        group=SEARCH,
    ),
    click.option(
        "--renormalize-logits",
        is_flag=True,
        default=None,
        help="Make beams' scores log-probabilities again after all filters.",
        cls=GroupedOption,
        group=SEARCH,
    ),
    _number(SEARCH, "--penalty-alpha", "A", "Contrastive search among --top-k candidates."),
)


def generation_options(function: Function) -> Function:
    """All the flags; their values come in as ``**options``, see `given_options`."""
    for option in reversed(_FLAGS):
        function = option(function)
    return function


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value != () and value != []}
