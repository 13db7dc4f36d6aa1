"""Counts the functions and files of edgelm that one sampled text enters after loading.

python -m benchmarks.prompt_path
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import edgelm


def entered(prompt: str, new_tokens: int) -> Counter[CodeType]:
    """Calls of each function of edgelm for one text of the embedded model; comprehensions do not count."""
    package = str(Path(edgelm.__file__).parent)
    calls: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            calls[code] += 1

    with edgelm.load(threads=1) as model:
        sys.setprofile(note)
        model.generate(prompt, max_new_tokens=new_tokens, do_sample=True, top_p=0.95, temperature=0.8, seed=1)
        sys.setprofile(None)
    return calls


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description="Count the functions and files that one sampled text enters.")
    parser.add_argument("--prompt", default="Once upon a time", help="default %(default)r")
    parser.add_argument("--new-tokens", type=int, default=20, help="tokens to generate; default %(default)s")
    parser.add_argument("--list", action="store_true", help="list every function with its number of calls")
    options = parser.parse_args()
    calls = entered(options.prompt, options.new_tokens)
    files = {code.co_filename for code in calls}
    if options.list:
        for code, count in sorted(calls.items(), key=lambda item: (item[0].co_filename, item[0].co_firstlineno)):
            print(f"{count:6} {Path(code.co_filename).parent.name}/{Path(code.co_filename).name}: {code.co_qualname}")
    print(f"{len(calls)} functions in {len(files)} files")


if __name__ == "__main__":
    main()
