"""A conversation of ten turns: the time to the first word of each answer, with and without reuse.

    python -m benchmarks.conversation path/to/smollm2-int4

Two copies of the model answer the same turns one after the other. One keeps the keys and values of earlier turns, as
`edgelm chat` does; the other one forgets them before each turn. Answers are greedy, so that rounds repeat each other.
Prints the conversation, a Markdown table of medians over the rounds, and one JSON object as its last line.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import edgelm
from edgelm.engine.machine import cpu_name
from edgelm.text.messages import ChatMessage

SYSTEM = "You are a friendly guide to nature. Answer in one or two sentences."
TURNS = (
    "Hello! Can you tell me why the sky is blue?",
    "And why is it red in the evening?",
    "What is a rainbow made of?",
    "Which animals can see more colours than we do?",
    "How do bees find flowers?",
    "Why do leaves turn yellow in autumn?",
    "What do squirrels eat in winter?",
    "How long do oak trees live?",
    "What is under the ground in a forest?",
    "Thank you. What should I look at on my next walk?",
)


def first_text_seconds(model: edgelm.Model, messages: list[ChatMessage], limit: int) -> tuple[float, str, edgelm.Stats]:
    """The seconds from the call to the first text of an answer, the whole answer, and its statistics."""
    started, first, text, stats = time.perf_counter(), 0.0, "", None
    for chunk in model.chat_stream(messages, max_new_tokens=limit, do_sample=False, repetition_penalty=1.2):
        first = first or time.perf_counter() - started
        text += chunk.text
        stats = chunk.stats or stats
    assert stats is not None
    return first, text, stats


def talk(keeps: edgelm.Model, forgets: edgelm.Model, max_new_tokens: int) -> list[dict[str, Any]]:
    """One conversation; the facts of each turn."""
    keeps.forget()
    messages, turns = [ChatMessage(role="system", content=SYSTEM)], []
    for user in TURNS:
        messages.append(ChatMessage(role="user", content=user))
        forgets.forget()
        without, _, _ = first_text_seconds(forgets, messages, 1)
        seconds, answer, stats = first_text_seconds(keeps, messages, max_new_tokens)
        turns.append(
            {
                "user": user,
                "assistant": answer,
                "prompt_tokens": stats.prompt_tokens,
                "reused_tokens": stats.reused_tokens,
                "first_text_ms": seconds * 1e3,
                "first_text_without_reuse_ms": without * 1e3,
            }
        )
        messages.append(ChatMessage(role="assistant", content=answer))
    return turns


def main() -> None:
    """Talk, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a chat bundle")
    parser.add_argument("--rounds", type=int, default=3, help="how often the conversation is repeated (default 3)")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="length of an answer (default 60)")
    parser.add_argument("--threads", type=int, help="threads of the model")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        keeps, forgets = (edgelm.load(arguments.bundle, threads=arguments.threads) for _ in range(2))
        forgets.warmup()
        keeps.warmup()
        rounds = [talk(keeps, forgets, arguments.max_new_tokens) for _ in range(arguments.rounds)]
    except edgelm.EdgelmError as error:
        sys.exit(f"conversation: {error}")
    turns = rounds[0]
    for number, turn in enumerate(turns):
        for name in ("first_text_ms", "first_text_without_reuse_ms"):
            turn[name] = round(median(talked[number][name] for talked in rounds), 1)
        print(f"> {turn['user']}\n{turn['assistant'].strip()}\n")
    print(
        "| turn | tokens of the prompt | of them reused | first text, ms | without reuse, ms |\n|---|---|---|---|---|"
    )
    for number, turn in enumerate(turns, 1):
        print(
            f"| {number} | {turn['prompt_tokens']} | {turn['reused_tokens']} | {turn['first_text_ms']:.0f} | "
            f"{turn['first_text_without_reuse_ms']:.0f} |"
        )
    print(json.dumps({"cpu": cpu_name(), "rounds": arguments.rounds, "turns": turns}))


if __name__ == "__main__":
    main()
