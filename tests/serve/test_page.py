"""docs/serve.md tells the truth about limits, routes and flags."""

import re

from edgelm.serve import limits
from edgelm.serve.app import OPERATIONS
from edgelm.serve.settings import ServeSettings
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
SETTINGS = ServeSettings()
ROWS = {
    "body": f"{SETTINGS.max_body_bytes:,} bytes",
    "bodies of all requests together": f"{SETTINGS.max_bodies_bytes:,} bytes",
    "headers": f"{SETTINGS.max_header_bytes:,} bytes, {SETTINGS.max_headers} lines",
    "depth of JSON": str(SETTINGS.max_json_depth),
    "a text": f"{limits.MAX_PROMPT_CHARACTERS:,} characters or token ids",
    "prompts of a completion, times texts of each": str(limits.MAX_PROMPTS),
    "texts of an embedding": f"{limits.MAX_INPUTS:,}",
    "options of a choice": str(limits.MAX_OPTIONS),
    "`n`, `best_of`": str(limits.MAX_CHOICES),
    "`stop`": f"{limits.MAX_STOPS} of {limits.MAX_STOP_CHARACTERS} characters",
    "`logit_bias`": f"{limits.MAX_BIASES:,} entries, -100 to 100",
    "`logprobs`, `top_logprobs`": str(limits.MAX_TOP_LOGPROBS),
    "other lists": f"{limits.MAX_LIST_ITEMS:,} items",
    "time of a text, waiting included": f"{SETTINGS.max_seconds:g} s (`--max-seconds`)",
    "texts that wait for a model": f"{SETTINGS.max_waiting} (`--max-waiting`)",
    "connections": str(SETTINGS.max_connections),
    "time to send a request's head": f"{SETTINGS.idle_seconds:g} s",
    "time to send a body": f"{SETTINGS.body_seconds:g} s",
    "time without reading the answer": f"{SETTINGS.send_seconds:g} s",
}


def test_the_table_of_limits_is_the_code() -> None:
    assert limits.MAX_IDS == limits.MAX_PROMPT_CHARACTERS
    table = dict(re.findall(r"^\| (.+?) \| (.+?) \|", PAGE, re.M))
    for name, value in ROWS.items():
        assert table[name] == value


def test_every_route_has_a_row() -> None:
    for operation in OPERATIONS:
        assert f"`POST {operation.path}`" in PAGE
