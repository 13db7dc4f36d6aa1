"""What Schemathesis (`SCHEMATHESIS_HOOKS`) does to bodies that it makes, so that more of them reach a model.

No JSON Schema can say how large a vocabulary is, and JSON Schema takes 5.0 for a whole number, which edgelm refuses as
OpenAI does: so token ids go into the vocabulary, and whole numbers lose their point. What is wrong in another way stays
wrong.
"""

from typing import Any

import schemathesis

VOCABULARY = 300
"""Of the tiny bundle."""
TOKENS = ("prompt", "input", "tokens", "continuation", "options", "calibrate")
"""Fields that may hold token ids."""


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """A body of a request, changed as the file says."""
    if not isinstance(body, dict):
        return body
    body = {name: _without_point(value) for name, value in body.items()}
    return {name: _in_vocabulary(value) if name in TOKENS else value for name, value in body.items()}


def _without_point(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_point(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _in_vocabulary(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_vocabulary(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        return value
    return value % VOCABULARY
