"""A game for the terminal: a story grows, and you guess which of three sentences the model likes best.

python examples/game.py [SEED]
"""

import sys

import edgelm

ROUNDS = 3


def sentences(model: edgelm.Model, story: str, seed: int) -> list[str]:
    """Three different continuations of the story."""
    texts: list[str] = []
    while len(texts) < 3:
        text = model.generate(story, max_new_tokens=30, temperature=0.9, seed=seed, stop_strings=[".", "\n"]).text
        seed += 1
        if text.strip() and text not in texts:
            texts.append(text)
    return texts


def main(seed: int) -> None:
    points, story = 0, "Once upon a time there was a"
    with edgelm.load() as model:
        for number in range(ROUNDS):
            options = sentences(model, story, seed + 100 * number)
            print(f"\n{story} ...")
            for place, text in enumerate(options, 1):
                print(f"  {place}. ...{text}.")
            guess = input("Which one does the model like best? ").strip()
            best = model.choose(story, options, length_normalization="token").index
            points += guess == str(best + 1)
            print("Yes!" if guess == str(best + 1) else f"No, number {best + 1}.")
            story += options[best] + "."
    print(f"\n{story}\n\n{points} of {ROUNDS} points")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    except (EOFError, KeyboardInterrupt):
        print()
