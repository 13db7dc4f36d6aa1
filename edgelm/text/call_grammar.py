"""The grammar of a text that may call functions, in llguidance's variant of Lark's syntax."""

import json
import re
from collections.abc import Mapping

from edgelm.text.call_syntax import ID_PATTERN, ID_PLACE
from edgelm.text.constraints import JsonSchema, ToolUse

ANY_TEXT = r"(.|\n)*"


def call_grammar(use: ToolUse, token_ids: Mapping[str, int], free_tokens: Mapping[str, int]) -> str:
    """The grammar of `use`; its rule `start` begins.

    Free text holds no marker of a call. Where a call is the whole answer, free text does not begin like one.

    Args:
        use: the functions, and how they may be called.
        token_ids: tokens of which no text is made; in the syntax they stand for themselves.
        free_tokens: those of them that free text may hold.
    """
    syntax = use.syntax
    rules = dict[str, str]()
    if use.choice != "none":
        # In auto, the marker ends the free text.
        begin = syntax.begin_in_text.removeprefix(syntax.marker) if use.choice == "auto" else syntax.begin
        further = ""
        if use.parallel and syntax.between is not None:
            further = f"({_literal(syntax.between, token_ids)} call)*"
        rules["calls"] = f"{_literal(begin, token_ids)} call {further} {_literal(syntax.end, token_ids)}"
        rules["call"] = f"function {_literal(syntax.close, token_ids)}"
        rules["function"] = "\n  | ".join(
            f"{_literal(name + syntax.middle, token_ids)} %json {_schema(use, schema)}"
            for name, schema in use.functions
        )
    if use.choice == "required":
        rules["start"] = "calls"
        return _joined(rules)
    token = f"<[{','.join(map(str, sorted(free_tokens.values())))}]>" if free_tokens else ""
    before = f"(TEXT? {token})*" if token else ""
    rules["start"] = f"{before} TEXT?"
    if syntax.marker:
        rules["TEXT"] = f"/{ANY_TEXT}/ & ~/{ANY_TEXT}{_escaped(syntax.marker)}{ANY_TEXT}/"
    else:
        rules["TEXT"] = f"/{ANY_TEXT}/"
        rules["FIRST"] = f"/{ANY_TEXT}/ & ~/{_escaped(syntax.begin)}{ANY_TEXT}/"
        rules["start"] = f"FIRST? {token} {before} TEXT? | FIRST?" if token else "FIRST?"
    if use.choice == "auto" and not syntax.marker:
        rules["start"] += " | calls"
    elif use.choice == "auto" and syntax.marker in token_ids:
        rules["start"] += f" | {before} TEXT? <[{token_ids[syntax.marker]}]> calls"
    elif use.choice == "auto":
        rules["start"] += f" | {before} marked calls"
        rules["marked[lazy]"] = f"ANY {json.dumps(syntax.marker, ensure_ascii=False)}"
        rules["ANY"] = f"/{ANY_TEXT}/"
    return _joined(rules)


def _joined(rules: Mapping[str, str]) -> str:
    return "%llguidance {}\n" + "".join(f"{name}: {rule}\n" for name, rule in rules.items())


def _schema(use: ToolUse, schema: JsonSchema) -> str:
    """A schema with the separators of the syntax, without blanks elsewhere."""
    content = json.loads(str(schema.schema))
    content["x-guidance"] = {
        "whitespace_flexible": False,
        "item_separator": use.syntax.item_separator,
        "key_separator": use.syntax.key_separator,
    }
    return json.dumps(content)


def _literal(text: str, token_ids: Mapping[str, int]) -> str:
    """Exactly `text`, with an id at `ID_PLACE`."""
    tokens = [token for token in token_ids if token in text]
    pieces = re.split("(" + "|".join(map(re.escape, [*sorted(tokens, key=len, reverse=True), ID_PLACE])) + ")", text)
    written = []
    for piece in pieces:
        if piece in token_ids:
            written.append(f"<[{token_ids[piece]}]>")
        elif piece == ID_PLACE:
            written.append(f"/{ID_PATTERN}/")
        elif piece:
            written.append(json.dumps(piece, ensure_ascii=False))
    return " ".join(written)


def _escaped(text: str) -> str:
    """`text` in an expression between slashes."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text).replace("\n", r"\n")
