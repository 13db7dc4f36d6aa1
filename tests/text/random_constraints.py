"""Random regular expressions and JSON schemas, by seed, that llguidance, `re` and `jsonschema` all understand."""

import json
import random
import re
from typing import Any

import jsonschema

from edgelm import JsonSchema, Regex

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["cat", "dog", "big", "red", "sun", "été", "今天", "x-1"]


def random_regex(seed: int) -> Regex:
    """A regular expression of some depth."""
    return Regex(_expression(random.Random(seed), 3))


def random_schema(seed: int) -> dict[str, Any]:
    """A JSON schema of some depth; that of an object more often than not."""
    rng = random.Random(seed)
    schema = _object(rng, 3) if rng.random() < 0.7 else _schema(rng, 3)
    if rng.random() < 0.1:  # a list by recursion
        node = {
            "type": "object",
            "properties": {"v": _schema(rng, 1), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
        schema = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    return schema


def matches(constraint: Regex | JsonSchema, text: str) -> bool:
    """Whether `text` obeys, by `re` or `jsonschema`."""
    if isinstance(constraint, Regex):
        return re.fullmatch(constraint.pattern, text) is not None
    validator = jsonschema.Draft202012Validator(json.loads(str(constraint.schema)))
    return bool(validator.is_valid(json.loads(text)))


def _expression(rng: random.Random, depth: int) -> str:
    parts = [_part(rng, depth) for _ in range(rng.randint(1, 4))]
    return "".join(parts)


def _part(rng: random.Random, depth: int) -> str:
    kind = rng.choice(
        ["literal", "word", "class", "digit", "group", "group"] if depth else ["literal", "word", "class"]
    )
    match kind:
        case "literal":
            atom = re.escape(rng.choice(LETTERS + " .,!?-+*/"))
        case "word":
            return re.escape(rng.choice(WORDS))
        case "class":
            low, high = sorted(rng.sample(LETTERS, 2))
            atom = rng.choice([f"[{low}-{high}]", f"[{low}{high} ]", "[A-Z]", "[^a-z]", "."])
        case "digit":
            atom = r"\d"
        case _:
            atom = "(" + "|".join(_expression(rng, depth - 1) for _ in range(rng.randint(1, 3))) + ")"
    return atom + rng.choice(["", "", "", "?", "*", "+", "{2}", "{1,3}", "{0,2}"])


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice([*kinds, "array", "array", "object", "object", "anyOf"] if depth else kinds)
    match kind:
        case "string":
            low = rng.randint(0, 3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 8)}
        case "pattern":
            return {"type": "string", "pattern": f"^{_expression(rng, 1)}$"}
        case "integer":
            low = rng.randint(-50, 50)
            bounds = {"minimum": low, "maximum": low + rng.randint(0, 500)}
            return {"type": "integer", **(bounds if rng.random() < 0.7 else {"multipleOf": rng.choice([2, 5, 10])})}
        case "number":
            low = rng.randint(-5, 5)
            return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 9)}
        case "enum":
            return {"enum": rng.sample([*WORDS, 1, 2.5, None, True, [1], {"a": 1}], rng.randint(1, 5))}
        case "const":
            return {"const": rng.choice([*WORDS, 7, False])}
        case "array":
            low = rng.randint(0, 2)
            return {
                "type": "array",
                "items": _schema(rng, depth - 1),
                "minItems": low,
                "maxItems": low + rng.randint(0, 3),
            }
        case "object":
            return _object(rng, depth)
        case "anyOf":
            return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "age", "tags", "größe", "a b", 'q"', "kind"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": rng.random() < 0.1,
    }
