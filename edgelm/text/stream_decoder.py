"""Token ids become text one at a time, and never half a character.

`tokenizers.decoders.DecodeStream` does not do this work (measured with tokenizers 0.22.2; the facts are asserted in
tests/text/test_id_streams.py):

- It holds text back while the text ends in U+FFFD, even if that is a character of its own or stands for bytes that no
  later byte can mend, and it decodes all held tokens again at every step. 4,000 tokens of such text take 0.9 s and
  yield nothing; the decoder below takes 10 ms and yields every character at once.
- A byte fallback decoder replaces a whole run of byte tokens when one byte of it is wrong. By then DecodeStream has
  handed out the beginning of the run, and raises InvalidPrefix.
- It cannot flush.

On usual byte-level text a step of DecodeStream is faster (1.2 instead of 1.9 µs), but a token of the smallest model
takes hundreds of microseconds.
"""

from collections.abc import Callable, Sequence
from copy import copy

from edgelm.text.decoder_steps import DecoderStep, Piece


class StreamDecoder:
    """Turns ids into text as they come; made by `Tokenizer.stream`, and reusable for one text after another.

    The texts of all `push` calls and of `flush` join to `decode(after + ids)[len(decode(after)):]`, where `after` are
    the ids before them, e.g. those of a prompt. The rule counts characters, also where the ids change the end of
    `decode(after)`. If `after` ends inside a character, `decode(after)` ends in U+FFFD, and the character that takes
    its place is not new text. Likewise, the clean-up that removes a blank at the end of a prompt takes one character
    from the new text.
    """

    def __init__(
        self, token_of: Callable[[int], str | None], steps: Sequence[DecoderStep], after: Sequence[int] = ()
    ) -> None:
        """Begin a text.

        Args:
            token_of: returns the token of an id, or None for an id without text; it raises PromptError for an id
                outside the vocabulary.
            steps: the decoder, at the beginning of a text; it is copied, not used.
            after: the ids of the text so far.

        Raises:
            PromptError: an id of `after` is outside the vocabulary, or the tokenizer cannot decode `after`.
        """
        self._token_of = token_of
        self._first_steps, self._first_skip = [copy(step) for step in steps], 0
        self._restart()
        if after:
            self._text([(token, True) for token in map(token_of, after) if token is not None])
            self._first_steps = self._steps
            self._restart()
            self._first_skip = len(self._rest())
            self._restart()

    def _restart(self) -> None:
        """Go back to the end of `after`: the next `push` begins a new text."""
        self._steps = [copy(step) for step in self._first_steps]
        self._skip = self._first_skip  # of decode(after), what its own ids did not make certain; and what to leave out

    def leave_out(self, characters: int) -> None:
        """Leave out so many further characters at the beginning of each text."""
        self._first_skip += characters
        self._restart()

    def copy(self) -> "StreamDecoder":
        """Return a decoder that has read the same ids, and goes on by itself."""
        other = copy(self)
        other._steps = [copy(step) for step in self._steps]
        return other

    def push(self, token_id: int) -> str:
        """Return the text that is now certain, never half a character.

        A run of byte tokens becomes certain with the token that ends it, because one wrong byte turns all of them
        into U+FFFD. `edgelm.text.decoder_steps` names the two other decoders that wait.

        Raises:
            PromptError: the id is outside the vocabulary, or the tokenizer cannot decode its token.
        """
        token = self._token_of(token_id)
        return "" if token is None else self._new(self._text([(token, True)]))

    def flush(self) -> str:
        """Return the rest, an unfinished character as U+FFFD; the next `push` begins a new text.

        Raises:
            PromptError: the tokenizer cannot decode the ids.
        """
        text = self._new(self._rest())
        self._restart()
        return text

    def _text(self, pieces: list[Piece], first: int = 0) -> str:
        """Send `pieces` through the steps from number `first` on."""
        for step in self._steps[first:]:
            if not pieces:
                break
            pieces = [piece for text, ends in pieces for piece in step.push(text, ends)]
        return "".join(text for text, _ in pieces)

    def _rest(self) -> str:
        return "".join(self._text(step.close(), i + 1) for i, step in enumerate(self._steps))

    def _new(self, text: str) -> str:
        """Leave out the characters that count as those of `decode(after)`."""
        if not self._skip:
            return text
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        return text[skipped:]
