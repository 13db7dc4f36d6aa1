"""The playground, as a browser shows it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgelm.serve.playground import PATHS
from edgelm.serve.settings import ServeSettings
from tests.conftest import DATA, ROOT
from tests.serve.browsers import CHATTY, PLAIN, SLOW, Visit, browser, chat_bundle, server, visit
from tests.serve.conftest import Running, running_server

__all__ = ["browser", "chat_bundle", "server", "visit"]  # fixtures

SAMPLED = {"seed": 7, "temperature": 1.2, "max_tokens": 20}
KEY = "a-key-of-the-office-01"


def answer(server: Running, **body: Any) -> Any:
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def test_the_page_loads(visit: Visit) -> None:
    page = visit.page
    assert page.title() == "edgelm playground"
    assert page.locator("#model option").all_text_contents() == [PLAIN, CHATTY, SLOW]
    assert page.text_content("#model-facts") == "fp32 · 64 tokens of context"
    assert page.get_by_role("tab", name="Complete").get_attribute("aria-selected") == "true"
    assert page.locator("#options-reset").is_hidden()


def test_the_files_have_a_strict_policy(server: Running) -> None:
    for path in PATHS:
        reply = httpx.get(server.url + path)
        assert reply.status_code == 200
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", reply.text)
    assert httpx.get(f"{server.url}/playground/__init__.py").status_code == 404
    assert httpx.get(f"{server.url}/playground/").status_code == 404


def test_a_text_streams(visit: Visit, server: Running) -> None:
    page = visit.page
    page.select_option("#model", SLOW)
    visit.set(**SAMPLED)
    page.fill("#prompt", "Hello")
    page.keyboard.press("Control+Enter")
    visit.begun()
    assert page.locator("#results .result").get_attribute("aria-busy") == "true"
    assert page.text_content("#status") == "Running"
    early = page.text_content("#results .text") or ""
    text = visit.finished()
    assert len(text) > len(early)
    assert text.startswith(early)
    assert text == answer(server, prompt="Hello", **SAMPLED)["text"]
    numbers = page.inner_text("#results .numbers")
    assert re.search(r"First token\s+\d+(\.\d+)? m?s", numbers)
    assert re.search(r"Speed\s+\d+(\.\d)? tokens/s", numbers)
    assert re.search(r"Tokens\s+20, prompt \d+", numbers)
    assert re.search(r"Ended\s+token limit", numbers)
    assert (page.text_content("#status") or "").startswith("Done: 20 tokens")


def test_stop_and_retry(visit: Visit, server: Running) -> None:
    page = visit.page
    page.select_option("#model", SLOW)
    visit.set(max_tokens=40, temperature=1.2, seed=7)
    page.fill("#prompt", "Hello")
    page.click("#run")
    visit.begun()
    page.keyboard.press("Escape")
    stopped = visit.finished()
    assert "you stopped it" in page.inner_text("#results .numbers")
    assert page.locator("#stop").is_hidden()
    page.get_by_role("button", name="Retry").click()
    page.click("#stop")
    visit.finished()
    visit.set(max_tokens=15)
    assert visit.run("Hello").startswith(stopped[:3])
    page.get_by_role("button", name="Add to prompt").click()
    assert page.input_value("#prompt") == "Hello" + (page.text_content("#results .text") or "")


def test_every_option_has_a_control_with_the_servers_limits(visit: Visit, server: Running) -> None:
    schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    without = {"model", "prompt", "stream", "stream_options", "user", "suffix", "echo", "best_of", "logprobs"}
    without |= {"constraint"}  # an object of its own
    controls = visit.page.locator("[id^=option-]:is(input, select, textarea)").evaluate_all("all => all.map(e => e.id)")
    assert {name.removeprefix("option-") for name in controls} == set(fields) - without
    ranges = {
        "temperature": "0 to 2",
        "top_p": "0 to 1",
        "top_k": "1 or more",
        "n": "1 to 8",
        "typical_p": "above 0 to 1",
        "epsilon_cutoff": "0 to below 1",
        "frequency_penalty": "-2 to 2",
        "repetition_penalty": "above 0 to 1,000",
        "max_time": "above 0",
        "seed": "",
        "max_tokens": "0 to 64",  # the context
    }
    for name, words in ranges.items():
        assert visit.page.text_content(f"#option-{name}-range") == words


OUT_OF_RANGE = [
    ("temperature", "3", "Must be 0 to 2, not 3."),
    ("temperature", "warm", "Give a number, not “warm”."),
    ("top_k", "0", "Must be 1 or more, not 0."),
    ("top_k", "1.5", "Give a whole number, not “1.5”."),
    ("max_tokens", "65", "Must be 0 to 64, not 65."),
    ("typical_p", "0", "Must be above 0 to 1, not 0."),
    ("stop", "\n".join("abcdefghijklmnopq"), "17 texts are more than 16."),
    ("logit_bias", "11=-200", "Must be -100 to 100, not -200."),
    ("logit_bias", "the=1", "“the=1” is not like 11=-2: a token id and a number."),
    ("bad_words_ids", "1 2; x", "“x” is not a token id."),
    ("seed", "9007199254740993", "This page can send whole numbers up to 9,007,199,254,740,991."),
]


def test_an_option_out_of_range(visit: Visit) -> None:
    page = visit.page
    page.fill("#prompt", "Hello")
    for name, value, words in OUT_OF_RANGE:
        visit.set(**{name: value})
        page.click("#run")
        control = page.locator(f"#option-{name}")
        assert page.text_content(f"#option-{name}-error") == words
        assert control.get_attribute("aria-invalid") == "true"
        assert control.evaluate("e => e === document.activeElement")
        assert not any("/v1/completions" in url for url in visit.requests)
        control.fill("")
        assert page.locator(f"#option-{name}-error").is_hidden()
    assert visit.run("Hello", max_tokens=3)


def test_all_kinds_of_options_reach_the_server(visit: Visit) -> None:
    visit.set(
        max_tokens=5, seed=-3, stop="\\n\\n\nEND", logit_bias="11=-2.5, 42=5", bad_words_ids="1 2; 3", min_p="0,05",
        suppress_tokens="4, 5", max_time=9,
    )  # fmt: skip
    visit.set(context_overflow="truncate", do_sample="yes")
    with visit.page.expect_request("**/v1/completions") as sent:
        visit.run("Hello")
    body = json.loads(sent.value.post_data or "")
    assert body == {
        "model": PLAIN, "prompt": "Hello", "max_tokens": 5, "seed": -3, "stop": ["\n\n", "END"],
        "logit_bias": {"11": -2.5, "42": 5}, "bad_words_ids": [[1, 2], [3]], "suppress_tokens": [4, 5], "min_p": 0.05,
        "max_time": 9, "context_overflow": "truncate", "do_sample": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_errors_of_the_server_show_where_they_belong(visit: Visit) -> None:
    page = visit.page
    page.fill("#prompt", "Hello there " * 60)
    page.click("#run")
    page.wait_for_selector("#prompt-error:not([hidden])")
    assert "context" in (page.text_content("#prompt-error") or "")
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    assert page.locator("#results .result").is_hidden()
    page.fill("#prompt", "Hello")
    assert page.locator("#prompt-error").is_hidden()
    visit.set(suppress_tokens=99999)
    page.click("#run")
    alert = page.locator("#results [role=alert], #option-suppress_tokens-error").locator("visible=true")
    alert.wait_for()
    assert "99999" in (alert.text_content() or "")
    page.click("#options-reset")
    page.context.set_offline(True)
    page.click("#run")
    page.wait_for_selector("#results [role=alert]:not([hidden])")
    assert "cannot be reached" in (page.text_content("#results [role=alert]") or "")
    page.context.set_offline(False)
    assert visit.run("Hello", max_tokens=3)
    assert all(error.startswith("Failed to load resource") for error in visit.errors)
    assert len(visit.errors) == 3
    visit.errors.clear()


def test_tokens_with_their_alternatives(visit: Visit, server: Running) -> None:
    page = visit.page
    page.click("#complete [data-view=tokens]")
    visit.run("Hello", **SAMPLED)
    expected = answer(server, prompt="Hello", logprobs=8, **SAMPLED)["logprobs"]
    tokens = page.locator("#results .token")
    assert tokens.count() == len(expected["tokens"]) == 20
    for place in (0, 7, 19):
        probability = math.exp(expected["token_logprobs"][place])
        levels = sum(probability < least for least in (0.9, 0.5, 0.2, 0.05, 0.01))
        assert tokens.nth(place).get_attribute("data-level") == str(levels)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    tokens.nth(3).hover()
    shares = {f"{100 * math.exp(value):.3g}%" for value in expected["top_logprobs"][3].values()}
    assert tip.locator(".share-row").count() == len(expected["top_logprobs"][3])
    assert len(shares & set(tip.locator(".share-number").all_text_contents())) > 0
    assert tip.locator(".chosen").count() == 1
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")
    page.focus("#complete .view-row [data-view=tokens]")
    page.keyboard.press("Tab")
    assert tokens.nth(0).evaluate("e => e === document.activeElement")
    assert tip.is_visible()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("e => e === document.activeElement")
    assert tokens.nth(1).get_attribute("aria-describedby") == "tip"
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.keyboard.press("End")
    assert tokens.nth(19).evaluate("e => e === document.activeElement")
    page.click("#complete [data-view=text]")
    assert page.text_content("#results .text") == "".join(expected["tokens"])


def test_text_is_never_read_as_html(visit: Visit) -> None:
    text = "<img src=x onerror=document.title='broken'><b>bold</b>"
    logprobs = {"tokens": [text], "token_logprobs": [-0.1], "top_logprobs": [{text: -0.1}], "text_offset": [0]}
    events = [
        {"choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]},
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page = visit.page
    page.route("**/v1/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    page.click("#complete [data-view=tokens]")
    assert visit.run(text) == text
    page.locator("#results .token").hover()
    assert text.replace(" ", "␣") in page.locator("#tip .share-text").all_text_contents()
    page.click("#complete [data-view=text]")
    assert page.text_content("#results .text") == text
    assert page.locator("#results img, #results b, #tip img, #tip b").count() == 0
    assert page.title() == "edgelm playground"


def test_chat(visit: Visit, server: Running) -> None:
    page = visit.page
    page.get_by_role("tab", name="Chat").click()
    assert page.locator("#model option").all_text_contents() == [CHATTY]
    assert page.locator("#option-n").is_hidden()
    visit.set(max_tokens=6, seed=5, temperature=1.1)
    page.click(".system summary")
    page.fill("#system", "s")
    page.fill("#message", "Hi")
    page.keyboard.press("Control+Enter")
    first = visit.finished("#messages")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]
    body = {"model": CHATTY, "messages": messages, "max_completion_tokens": 6, "seed": 5, "temperature": 1.1}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert first == reply["choices"][0]["message"]["content"]
    assert page.input_value("#message") == ""
    page.fill("#message", "And?")
    page.click("#send")
    page.locator("#messages .message").nth(3).wait_for()
    second = visit.finished("#messages")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Retry").click()
    assert [one["role"] for one in json.loads(sent.value.post_data or "")["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert visit.finished("#messages") == second
    page.click("#chat [data-view=tokens]")
    page.get_by_role("button", name="Retry").click()
    visit.finished("#messages")
    assert page.locator("#messages .token").count() == 6
    visit.open()
    assert page.get_by_role("tab", name="Chat").get_attribute("aria-selected") == "true"
    assert page.locator("#messages .text").all_text_contents() == ["Hi", first, "And?", second]
    page.click("#chat-clear")
    assert page.locator("#messages .message").count() == 0


def test_two_models_side_by_side(visit: Visit, server: Running) -> None:
    page = visit.page
    page.click("#compare")
    page.select_option("#model-b", CHATTY)
    visit.set(**SAMPLED)
    page.fill("#prompt", "Hello")
    page.click("#run")
    page.locator("#results .result[aria-busy=false]").nth(1).wait_for()
    assert page.locator("#results h2").all_text_contents() == [PLAIN, CHATTY]
    texts = page.locator("#results .text").all_text_contents()
    assert texts == [answer(server, model=model, prompt="Hello", **SAMPLED)["text"] for model in (PLAIN, CHATTY)]
    left, right = (page.locator("#results .result").nth(place).bounding_box() for place in (0, 1))
    assert left and right and left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]


def test_several_texts(visit: Visit) -> None:
    visit.run("Hello", n=3, max_tokens=5, min_new_tokens=5, temperature=1.5, seed=7)
    assert visit.page.locator("#results h3").all_text_contents() == ["Text 1", "Text 2", "Text 3"]
    assert len(set(visit.page.locator("#results .text").all_text_contents())) > 1
    assert "15, prompt" in visit.page.inner_text("#results .numbers")


def test_a_reload_loses_nothing(visit: Visit) -> None:
    page = visit.page
    page.select_option("#model", CHATTY)
    visit.set(temperature=1.5, stop="END")
    page.fill("#prompt", "Once\nupon")
    visit.open()
    assert page.input_value("#prompt") == "Once\nupon"
    assert page.input_value("#option-temperature") == "1.5"
    assert page.input_value("#model") == CHATTY
    page.click("#options-reset")
    visit.open()
    assert page.input_value("#option-temperature") == ""


PROMPTS = [
    'It\'s "quoted", $HOME `ls` \\n !x\na\tb',
    "é “中” \U0001f600 \\' \\\"",
    "--help",
    "-",
]


@pytest.mark.skipif(os.name == "nt", reason="the commands are for a POSIX shell")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_copied_commands_run(visit: Visit, tmp_path: Path, prompt: str) -> None:
    """curl, Python and the command line write what the page wrote."""
    pytest.importorskip("openai")
    page = visit.page
    visit.set(stop="'\\n\\n\n\"x y", logit_bias="11=-2", bad_words_ids="1 2", min_p=0.01, **SAMPLED)
    text = visit.run(prompt)
    page.click("#code-button")
    codes = {}
    for name in ("curl", "python", "cli"):
        page.click(f"[data-code={name}]")
        codes[name] = page.text_content("#code") or ""
    (tmp_path / "edgelm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgelm "$@"\n')
    (tmp_path / "edgelm").chmod(0o755)
    (tmp_path / "code.py").write_text(codes["python"], encoding="utf-8")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(places), "HOME": "/nowhere"}

    def output(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, timeout=120, cwd=DATA, env=environment, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    assert output(sys.executable, str(tmp_path / "code.py")) == f"{text}\n"
    assert output("sh", "-c", codes["cli"]).rstrip("\n") == text.rstrip("\n")
    if shutil.which("curl"):
        assert json.loads(output("sh", "-c", codes["curl"]))["choices"][0]["text"] == text


def test_a_copied_chat_runs(visit: Visit, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    page = visit.page
    page.get_by_role("tab", name="Chat").click()
    visit.set(max_tokens=6, temperature=1.1, seed=3)
    page.fill("#message", "It's")
    page.click("#chat-code-button")
    assert page.locator("[data-code=cli]").is_hidden()
    page.click("[data-code=python]")
    (tmp_path / "code.py").write_text(page.text_content("#code") or "", encoding="utf-8")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#code-copy")
    page.locator("#code-copied").filter(has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.text_content("#code")
    page.keyboard.press("Escape")
    page.click("#send")
    text = visit.finished("#messages")
    done = subprocess.run([sys.executable, str(tmp_path / "code.py")], capture_output=True, timeout=120, check=True)
    assert done.stdout.decode() == f"{text}\n"


def test_a_server_with_keys(browser: Any) -> None:
    with running_server(ServeSettings(port=0, keys=(KEY,))) as server:
        context = browser.new_context()
        visit = Visit(context.new_page(), f"{server.url}/")
        page = visit.page
        page.goto(visit.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "not-the-key-of-the-office")
        page.keyboard.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#page-error").is_hidden()
        assert visit.run("Hello", max_tokens=4)
        page.click("#code-button")
        for name in ("curl", "python"):
            page.click(f"[data-code={name}]")
            code = page.text_content("#code") or ""
            assert KEY not in code
            assert "EDGELM_API_KEY" in code
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        page.goto(visit.url)  # the tab remembers
        page.wait_for_selector("body[data-ready]")
        other = context.new_page()  # another one does not
        other.goto(visit.url)
        other.wait_for_selector("#key-dialog[open]")
        context.close()


def test_a_server_without_templates_has_no_chat(browser: Any) -> None:
    with running_server(ServeSettings(port=0)) as server:
        context = browser.new_context()
        visit = Visit(context.new_page(), f"{server.url}/")
        visit.open()
        assert visit.page.locator("#tab-chat").is_hidden()
        assert visit.page.locator("#compare").is_hidden()
        assert visit.page.locator("#key-button").is_hidden()
        context.close()
