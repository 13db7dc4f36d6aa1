"""An explanation as one HTML page that needs nothing else: no other file, no network, and no JavaScript to be read.

With JavaScript a person can explore every layer and head (``explanation.js``). The page's policy lets it load nothing.
"""

import base64
import hashlib
import re
from html import escape
from importlib import resources

import numpy as np

from edgelm.pictures.explanation_data import explanation_data, script_json
from edgelm.pictures.explanation_svg import svg_picture
from edgelm.pictures.shares import percent, visible
from edgelm.scoring.explanation import Explanation
from edgelm.scoring.results import TokenLogprob

_START = """
const data = JSON.parse(document.getElementById("data").textContent);
document.getElementById("view").replaceChildren(explanationView(data));
document.getElementById("every").open = false;
"""


def html_page(explanation: Explanation, model: str) -> str:
    """The page of an explanation by `model`: text of an HTML file."""
    script = _script() + _START
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    css = "\n".join(map(_file, ("palette.css", "explanation_page.css", "explanation.css")))
    text = "".join(token.text for token in explanation.tokens)
    title = escape(" ".join(visible(text).replace("␣", " ").split())[:60])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title} · edgelm explain</title>
<style>
{css}</style>
</head>
<body>
<main>
<header>
<h1>What the model saw</h1>
<p>{_facts(explanation, model)}</p>
{_legend()}
</header>
<div class="sheet" id="view">
<div class="picture">{svg_picture(explanation, model)}</div>
</div>
<details class="sheet" id="every" open>
<summary>Every token, and what else could have come</summary>
<div class="scroll">{_table(explanation)}</div>
</details>
</main>
<script type="application/json" id="data">{script_json(explanation_data(explanation, model))}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def _facts(explanation: Explanation, model: str) -> str:
    layers, heads = explanation.attentions.shape[:2]
    facts = [model, f"{len(explanation.tokens)} tokens", f"{layers} layers of {heads} heads"]
    if explanation.prefix_tokens:
        facts.insert(1, f"behind a prefix of {explanation.prefix_tokens}")
    if explanation.perplexity is not None:
        facts.append(f"perplexity {explanation.perplexity:,.2f}")
    return escape(" · ".join(facts))


def _legend() -> str:
    colours = "".join(f'<i data-level="{level}"></i>' for level in range(6))
    return f'<div class="legend"><span>likely</span>{colours}<span>unlikely</span></div>'


def _table(explanation: Explanation) -> str:
    rows = [
        _row(str(number), token.text, token.logprob, token.top) for number, token in enumerate(explanation.tokens, 1)
    ]
    rows.append(_row("", None, None, explanation.following))
    names = ("#", "Token", "Probability", "Likeliest there")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(number: str, text: str | None, logprob: float | None, top: tuple[TokenLogprob, ...]) -> str:
    name = "what comes next" if text is None else f"<code>{escape(visible(text))}</code>"
    chance = "" if logprob is None else percent(float(np.exp(logprob)))
    likeliest = ", ".join(
        f"<code>{escape(visible(one.text))}</code> {escape(percent(float(np.exp(one.logprob))))}" for one in top
    )
    return f"<tr><td>{number}</td><td>{name}</td><td>{escape(chance)}</td><td>{likeliest}</td></tr>"


def _script() -> str:
    """The modules as one: without imports, because what they name stands in the same script."""
    modules = "\n".join(_file(name) for name in ("elements.js", "shares.js", "explanation.js"))
    return re.sub(r"^import .*\n", "", modules, flags=re.MULTILINE)


def _file(name: str) -> str:
    return (resources.files("edgelm.pictures") / name).read_text(encoding="utf-8")
