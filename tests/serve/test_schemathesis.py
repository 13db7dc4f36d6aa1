"""Schemathesis reads ``/openapi.json``, makes requests of it, right and wrong ones, and checks the answers.

`EDGELM_TEST_NETWORK=1 pytest -n 0 -s tests/serve/test_schemathesis.py` installs it and prints what it counted;
`EDGELM_SCHEMATHESIS_EXAMPLES=200` makes it try more on each route.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT
from tests.environments import INSTALLS, Environment
from tests.serve.chat_servers import chat_bundle
from tests.serve.conftest import server_process

__all__ = ["chat_bundle"]
pytestmark = INSTALLS

KEY = "a-key-for-these-tests"
EXAMPLES = os.environ.get("EDGELM_SCHEMATHESIS_EXAMPLES", "10")
# Bodies of too many items are often too large too, and then 413 is the answer.
SETTINGS = f"""
headers = {{ Authorization = "Bearer {KEY}" }}
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "404", "405", "408", "413", "415", "429", "431", "503"]
"""
# What a schema cannot say is refused with 400: options that contradict each other, or a text without its right length.
# And a POST without JSON is 415 before anyone looks for its route.
NOT_CHECKED = "positive_data_acceptance,unsupported_method"
UNAVAILABLE = 503


def test_schemathesis_finds_nothing(chat_bundle: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install("schemathesis")
    settings, report = tmp_path / "schemathesis.toml", tmp_path / "report.ndjson"
    settings.write_text(SETTINGS, encoding="utf-8")
    with server_process("--api-key", KEY, model=chat_bundle) as server:
        printed = environment.output(
            "schemathesis", "--config-file", str(settings), "run", f"{server.url}/openapi.json",
            "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", "1", "--workers", "2",
            "--exclude-checks", NOT_CHECKED, "--warnings", "off", "--no-color",
            "--report", "ndjson", "--report-ndjson-path", str(report),
            variables={"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(ROOT / "tests" / "serve")},
        )  # fmt: skip
        assert server.process.poll() is None
        server.process.terminate()
        assert "Traceback" not in server.read_stderr()
    assert "No issues found" in printed
    answers: Counter[tuple[str, int]] = Counter()
    with report.open(encoding="utf-8") as lines:
        for line in lines:
            recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {"interactions": {}})
            for interaction in recorder.get("interactions", {}).values():
                answers[recorder["label"], interaction["response"]["status_code"]] += 1
    sys.stdout.write(f"{sum(answers.values()):,} requests: {dict(sorted(answers.items()))}\n")
    assert {status for _, status in answers if status >= 500} <= {UNAVAILABLE}
    # Wrong requests alone would prove little: every route did its work as well, but one: this bundle has no task.
    working = {label for label, _ in answers if "POST" in label} - {"POST /v1/task"}
    assert {label for label, status in answers if status == 200} >= working
