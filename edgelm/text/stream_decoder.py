"""Token ids become text one at a time, and never half a character.

`tokenizers.decoders.DecodeStream` does not do this work (measured with tokenizers 0.22.2; the facts are asserted in
tests/text/test_id_streams.py):

- It holds text back while the text ends in U+FFFD, even if that is a character of its own or stands for bytes that no
  later byte can mend, and it decodes all held tokens again at every step. 4,000 tokens of such text take 0.9 s and
  yield nothing; the decoder below takes 5 ms and yields every character at once.
- A byte fallback decoder replaces a whole run of byte tokens when one byte of it is wrong. By then DecodeStream has
  handed out the beginning of the run, and raises InvalidPrefix.
- It cannot flush. The rest of a text needs a window of tokens that we keep, and that window suffices for each step.

On usual byte-level text a step of DecodeStream is faster (0.5 instead of 1.3 µs), but a token of the smallest model
takes hundreds of microseconds.
"""

import codecs
import re
from collections.abc import Callable
from typing import Any, Literal

# The replacements of transformers' clean_up_tokenization, applied to the whole text one after the other.
CLEAN_UP = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")]
CLEAN_UP += [(" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]

# Decoders that treat every token by itself, apart from knowing whether it is the first.
_PIECEWISE = {"WordPiece", "Metaspace", "Replace", "Strip"}
_KNOW_THE_FIRST_TOKEN = {"WordPiece", "Metaspace"}
# The only step before ByteFallback in the tokenizers of Llama, Mistral and Gemma; it makes no byte token.
_SPACE_STEP = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_BYTE_TOKEN = re.compile("<0x..>")

# GPT-2 writes a byte as one printable character: itself, or the next unused one from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)}

Kind = Literal["bytes", "pieces", "byte runs", "whole"]
"""How a stream follows a decoder: byte by byte, token by token, holding runs of byte tokens, or only at the end."""


class StreamDecoder:
    """Turns ids into text as they come; made by `Tokenizer.stream`, and reusable for one text after another.

    The texts of all `push` calls and of `flush` join to `Tokenizer.decode` of the same ids.
    """

    def __init__(
        self,
        token_of: Callable[[int], str | None],
        join: Callable[[list[str]], str],
        decoder: dict[str, Any],
        *,
        clean_up: bool,
    ) -> None:
        """Follow one decoder of the `tokenizers` library.

        Args:
            token_of: returns the token of an id, or None for an id without text; it raises PromptError for an id
                outside the vocabulary.
            join: the decoder itself, from tokens to text.
            decoder: the decoder's entry in tokenizer.json; {} where tokens are joined by spaces.
            clean_up: whether the text gets transformers' clean_up_tokenization.
        """
        self._token_of, self._join, self._clean_up = token_of, join, clean_up
        self._kind = _kind(decoder)
        self._restart()

    def _restart(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[str] = []  # the tokens of the last text handed out: what stands before the next token
        self._window_characters = 0
        self._held: list[str] = []  # tokens whose text is not certain yet
        self._unclean = [""] * len(CLEAN_UP)  # for each replacement, an ending that may begin its pattern

    def push(self, token_id: int) -> str:
        """Return the text that is now certain, never half a character.

        A run of byte tokens becomes certain with the token that ends it, because one wrong byte turns all of them
        into U+FFFD. A decoder of an unusual kind (CTC, BPE with word endings) makes nothing certain before `flush`.

        Raises:
            PromptError: the id is outside the vocabulary, or the tokenizer cannot decode its token.
        """
        token = self._token_of(token_id)
        return "" if token is None else self._clean(self._certain_text(token), last=False)

    def flush(self) -> str:
        """Return the rest, an unfinished character as U+FFFD; the next `push` begins a new text."""
        text = self._clean(self._utf8.decode(b"", final=True) + self._decode_held(), last=True)
        self._restart()
        return text

    def _certain_text(self, token: str) -> str:
        if self._kind == "bytes":
            # As in Rust: a token with any character from outside the byte alphabet stands for itself.
            known = all(char in _BYTE_OF for char in token)
            return self._utf8.decode(bytes(_BYTE_OF[char] for char in token) if known else token.encode())
        self._held.append(token)
        if self._kind == "whole" or (self._kind == "byte runs" and _BYTE_TOKEN.fullmatch(token)):
            return ""
        return self._decode_held()

    def _decode_held(self) -> str:
        """Text of the held tokens behind the window, whose own text was handed out before."""
        if not self._held:
            return ""
        text = self._join(self._window + self._held)[self._window_characters :]
        if text:
            self._window, self._held = self._held, []
            self._window_characters = len(self._join(self._window))
        elif self._window:
            self._held = []  # tokens without text; at the beginning they stay, because they may be what Strip removes
        return text

    def _clean(self, text: str, *, last: bool) -> str:
        if not self._clean_up:
            return text
        for i, (old, new) in enumerate(CLEAN_UP):
            *done, rest = (self._unclean[i] + text).split(old)
            keep = 0 if last else next(n for n in range(len(old) - 1, -1, -1) if rest.endswith(old[:n]))
            cut = len(rest) - keep
            self._unclean[i] = rest[cut:]
            text = new.join([*done, rest[:cut]])
        return text


def _kind(state: dict[str, Any]) -> Kind:
    steps = state["decoders"] if state.get("type") == "Sequence" else [state] if state else []
    kinds = [step["type"] for step in steps]
    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    pieces, after = kinds[:fuse], [step for step in steps[fuse:] if step["type"] != "Fuse"]
    if after:
        # Llama strips one space from the left of the joined text: settled as soon as there is any text.
        one = len(after) == 1 and after[0]["type"] == "Strip" and after[0]["start"] <= 1 and after[0]["stop"] == 0
        if not one or "ByteLevel" in pieces or _KNOW_THE_FIRST_TOKEN.intersection(pieces):
            return "whole"
    if pieces == ["ByteLevel"]:
        return "bytes"
    if _PIECEWISE.issuperset(pieces):
        return "pieces"
    if pieces[-1] == "ByteFallback" and all(step == _SPACE_STEP for step in steps[: fuse - 1]):
        return "byte runs"
    return "whole"
