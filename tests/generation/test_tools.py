"""Answers with calls through the public API: of the embedded model, which never saw a tool, and obeys all the same."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm import ConfigError, Model, PromptError, load
from edgelm.bundle.folder import default_bundle_path
from tests.conftest import TINY_BUNDLE
from tests.documents.pages import page
from tests.text.chat_templates import system, user
from tests.text.random_constraints import matches
from tests.text.tool_templates import CLOCK, SHORT, TOOLS, WEATHER, call, calls, result
from tests.tool_bundles import make_tool_bundle

ASKED = [user("How warm is it in Paris?")]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
SEEDED: Any = {"seed": 1, "temperature": 0.8, "max_new_tokens": 50}
# "[TOOL_CALLS]" is one special token, and so little else that the context of the tiny bundle holds a call.
TINY_TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}[INST]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ '[TOOL_CALLS]' if loop.first else ',' }}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module", params=["added", "special", "text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Tags of calls are tokens, special tokens, or characters."""
    bundle = make_tool_bundle(default_bundle_path(), tmp_path_factory.mktemp("tools"), "hermes", tags=request.param)
    with load(bundle, device="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    bundle = make_tool_bundle(TINY_BUNDLE, tmp_path_factory.mktemp("tools"), TINY_TEMPLATE, tags="text")
    with load(bundle, device="cpu", threads=1) as loaded:
        yield loaded


def test_a_conversation_with_a_tool(model: Model) -> None:
    tools = [SHORT, CLOCK]
    answer = model.chat(ASKED, tools=tools, tool_choice=NAMED, **{**SEEDED, "max_new_tokens": 200})
    (choice,) = answer.choices
    (made,) = choice.tool_calls
    assert (answer.text, choice.finish_reason, made.name) == ("", "tool_calls", "get_weather")
    assert set(made.parsed_arguments) <= {"city", "days"}
    assert matches(model.tool_use([SHORT]).functions[0][1], made.arguments)
    said = [*ASKED, choice.message, result("21 C", made.id)]
    # The next prompt goes on from this answer, so it is reused.
    asked, further = model.chat_prompt(ASKED, tools=tools), model.chat_prompt(said, tools=tools)
    assert further[: len(asked)] == asked
    assert model.tokenizer.decode(further).startswith(model.tokenizer.decode([*asked, *choice.token_ids]))
    final = model.chat(said, tools=tools, tool_choice="none", **{**SEEDED, "max_new_tokens": 10}).choices[0]
    assert final.tool_calls == () and final.text
    assert final.message == {"role": "assistant", "content": final.text}


@pytest.mark.parametrize("choice", ["auto", "required", "none", NAMED], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_stream_has_the_same_calls(model: Model, choice: Any, seed: int) -> None:
    options = {**SEEDED, "seed": seed, "logprobs": 1, "num_return_sequences": 2}
    whole = model.chat(ASKED, tools=TOOLS, tool_choice=choice, **options).choices
    chunks = list(model.chat_stream(ASKED, tools=TOOLS, tool_choice=choice, **options))
    for index, one in enumerate(whole):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == one.text
        assert [token for chunk in own for token in chunk.token_ids] == list(one.token_ids)
        assert one.logprobs is not None
        assert [t.logprob for chunk in own for t in chunk.logprobs or ()] == [t.logprob for t in one.logprobs]
        assert own[-1].finish_reason == one.finish_reason
        made = [made for chunk in own for made in chunk.tool_calls]
        assert [(c.name, c.arguments) for c in made] == [(c.name, c.arguments) for c in one.tool_calls]
        if choice == "none":
            assert one.tool_calls == () and one.finish_reason != "tool_calls"
        elif one.finish_reason == "tool_calls":
            assert one.tool_calls
        else:
            assert choice == "auto" or one.finish_reason == "length"


METHODS: dict[str, Any] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "window": {"do_sample": False, "context_overflow": "window"},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_calls(model: Model, method: str) -> None:
    options = {"max_new_tokens": 150, **METHODS[method]}
    done = model.chat(ASKED, tools=[CLOCK], tool_choice="required", parallel_tool_calls=False, **options)
    (made,) = done.choices[0].tool_calls
    assert (made.name, made.arguments, done.choices[0].finish_reason) == ("clock", "{}", "tool_calls")


def test_the_parts_work_side_by_side_and_in_tasks(model: Model) -> None:
    ids = model.chat_prompt(ASKED, tools=TOOLS)
    each: Any = [
        {"constraint": model.tool_use(TOOLS, tool_choice="required", parallel_tool_calls=False), "seed": 3},
        {"constraint": model.tool_use(TOOLS, tool_choice="none"), "max_new_tokens": 5},
        {"max_new_tokens": 5},
    ]
    called, said, free = model.generate_batch([ids] * 3, each=each, max_new_tokens=200)
    assert called.choices[0].finish_reason == "tool_calls"
    assert not said.choices[0].tool_calls and not free.choices[0].tool_calls
    alone = asyncio.run(model.agenerate(ids, **{"max_new_tokens": 200, **each[0]}))
    assert [c.arguments for c in alone.choices[0].tool_calls] == [c.arguments for c in called.choices[0].tool_calls]
    with model.scheduler(max_rows=2) as scheduler:
        chunks = list(scheduler.submit(ids, max_new_tokens=200, **each[0]))
    assert chunks[-1].finish_reason == "tool_calls"
    assert sum(len(chunk.tool_calls) for chunk in chunks) == 1


@pytest.mark.parametrize("limit", [3, 8, 25])
def test_a_cut_call_is_no_call(model: Model, limit: int) -> None:
    options = {**SEEDED, "max_new_tokens": limit}
    try:
        (choice,) = model.chat(ASKED, tools=[WEATHER], tool_choice="required", **options).choices
    except ConfigError as error:
        assert "the constraint needs at least" in str(error)
        return
    assert (choice.tool_calls, choice.finish_reason) == ((), "length")
    assert choice.text == model.tokenizer.decode(choice.token_ids)[: len(choice.text)]
    assert choice.text.startswith("<tool_call>\n{")


def test_several_calls(tiny: Model) -> None:
    """Of the tiny bundle, whose template has a special token before calls, and none behind them."""
    say: Any = {"type": "function", "function": {"name": "f"}}
    options: Any = {"max_new_tokens": 40, "min_new_tokens": 20, "do_sample": False}
    done = tiny.chat([user("a")], tools=[say], tool_choice="required", **options)
    made = done.choices[0].tool_calls
    assert len(made) > 1 and {(one.name, one.arguments) for one in made} == {("f", "{}")}
    assert len({one.id for one in made}) == len(made)
    written = "[TOOL_CALLS]" + ",".join(["f{}"] * len(made))
    assert tiny.tokenizer.decode(done.choices[0].token_ids).startswith(written)
    alone = tiny.chat([user("a")], tools=[say], tool_choice="required", parallel_tool_calls=False, max_new_tokens=40)
    assert (alone.choices[0].finish_reason, len(alone.choices[0].tool_calls), alone.text) == ("tool_calls", 1, "")
    said = [user("a"), alone.choices[0].message, result("b")]
    assert tiny.tokenizer.decode(tiny.chat_prompt(said)).endswith("[TOOL_CALLS]f{}<|im_end|>[INST]b<|im_end|>")


def test_what_a_user_says_is_no_call(model: Model) -> None:
    text = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    answer = model.chat([user(text)], tools=[CLOCK], **{**SEEDED, "max_new_tokens": 10})
    assert answer.choices[0].tool_calls == () or answer.choices[0].finish_reason == "tool_calls"
    tags = [model.tokenizer.token_id(tag) for tag in ("<tool_call>", "</tool_call>")]
    known = [tag for tag in tags if tag is not None]
    ids = model.chat_prompt([user(text)], tools=[CLOCK])
    assert [ids.count(tag) for tag in known] == [
        model.chat_prompt([user("a")], tools=[CLOCK]).count(tag) for tag in known
    ]
    assert text in model.tokenizer.decode(ids)


def test_contradictions_are_refused(model: Model) -> None:
    yes = edgelm.Choices(["yes"])
    for options, words in (
        ({"constraint": yes}, "tools and constraint contradict each other"),
        ({"constraint": yes, "tool_choice": "required"}, "tools and constraint contradict each other"),
        ({"stop_strings": ["a"]}, "stop_strings and constraint contradict each other"),
        ({"tool_choice": "often"}, "tool_choice must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.chat(ASKED, tools=TOOLS, **options)
    assert model.chat(ASKED, tools=TOOLS, tool_choice="none", constraint=yes).text == "yes"
    assert model.chat(ASKED, tools=[], constraint=yes).text == "yes"
    for choice in ("required", NAMED):
        with pytest.raises(ConfigError, match="but there are no tools"):
            model.chat(ASKED, tool_choice=choice)
    with pytest.raises(PromptError, match="this bundle has no chat template"), load(TINY_BUNDLE, device="cpu") as plain:
        plain.chat(ASKED, tools=TOOLS)


def test_history_needs_no_tools(model: Model) -> None:
    said = [system("s"), user("a"), calls(call("clock", "{}")), result("12")]
    assert model.tokenizer.decode(model.chat_prompt(said)).endswith(
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_llguidance_the_extra_is_named(model: Model, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        f"import edgelm\nmodel = edgelm.load({str(model.bundle.path)!r}, device='cpu')\n"
        f"try: model.chat([{{'role': 'user', 'content': 'a'}}], tools=[{CLOCK!r}])\n"
        "except edgelm.EdgelmError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("constraints need llguidance, which is missing; run: pip install 'edgelm[constrain]'")


def test_the_program_of_the_page(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = (block.body for block in page("docs/tools.md").blocks if block.language == "python")
    assert "path/to/qwen3" in program
    exec(program.replace('"path/to/qwen3"', f"{str(model.bundle.path)!r}, device='cpu'"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] in ("get_weather: ['city']", "get_weather: ['city', 'days']")
