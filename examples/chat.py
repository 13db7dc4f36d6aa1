"""A chat in the terminal: every line you type is a turn, and the model answers with the next one.

    python examples/chat.py [BUNDLE]

Ctrl-D or Ctrl-C ends it.
"""

import sys
from pathlib import Path

import edgelm

DIALOGUE = Path(__file__).resolve().parent.parent / "models" / "dialogue-6m-int8"


def main(bundle: Path) -> None:
    chat = ""
    with edgelm.load(bundle) as model:
        end = model.generation_config.eos_token_id
        while True:
            turn = input("> ").strip()
            if not turn:
                continue
            chat += turn + "\n"
            answer = ""
            # The chat so far is not computed again. Once the context is full, its oldest turns are dropped.
            for chunk in model.stream(
                chat, stop_strings=["\n"], begin_suppress_tokens=end, context_overflow="truncate", max_new_tokens=60
            ):
                print(chunk, end="", flush=True)
                answer += chunk.text
            print()
            chat += answer.strip() + "\n"


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else DIALOGUE)
    except edgelm.EdgelmError as error:
        sys.exit(f"chat: {error}")
    except (EOFError, KeyboardInterrupt):
        print()
