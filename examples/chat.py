"""A chat in the terminal: every line you type is a turn, and the model answers with the next. Ctrl-D ends it.

python chat.py [BUNDLE]
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
            try:
                turn = input("> ").strip()
            except EOFError:
                break
            if not turn:
                continue
            chat += turn + "\n"
            answer = ""
            # The chat so far is not computed again, and its oldest turns go once the context is full.
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
