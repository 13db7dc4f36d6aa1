"""Tokenizers and generation settings as targets."""

import json
import os
import random
import tempfile
from collections.abc import Sequence

from edgelm.bundle.strict_json import StrictJsonError, parse_json
from edgelm.decoding.generation_config import DEFAULTS, MAX_SETTINGS_BYTES, OPTIONS, GenerationConfig, config_from_file
from edgelm.errors import ConfigError, PromptError, TokenizerError
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tokenizer_file import MAX_FILE_BYTES
from tests.fuzz.harness import Target
from tests.fuzz.mutations import BYTE_MUTATORS, change_json
from tests.text.tokenizer_kinds import KINDS, text_of

TEXTS = (
    "Hello, the 123 world's aa aaaa!  \n\n x",
    "今天天气 é e\u0301 ﷺ 🎉👩‍👧 İ \u00a0\u200b\r\n\t",
    "<|endoftext|><s></s><mask> [SEP]" + "a" * 300 + " " * 300 + "!" * 300,
    "",
)


_SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def swap_parts(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Put parts of another tokenizer in, in place of this one's parts or in a sequence with them."""
    try:
        own, other = json.loads(data), json.loads(rng.choice(others))
        for place, inner in (
            ("normalizer", "normalizers"),
            ("pre_tokenizer", "pretokenizers"),
            ("decoder", "decoders"),
        ):
            mine, theirs = own.get(place), other.get(place)
            if theirs and rng.random() < 0.5:
                several = [mine, theirs] if mine else [theirs] * rng.choice([1, 2, 30])
                own[place] = {"type": "Sequence", inner: several} if rng.random() < 0.5 else theirs
        return json.dumps(own).encode()
    except (ValueError, AttributeError, RecursionError):
        return data


class TokenizerTarget(Target):
    """``tokenizer.json``: read, and used on fixed texts and ids. Nothing may be written to stderr, as panics are."""

    name = "tokenizer"
    mutators = (*BYTE_MUTATORS, *[change_json] * 12, *[swap_parts] * 4)
    refusals = (TokenizerError,)

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        os.dup2(self._stderr.fileno(), 2)

    def close(self) -> None:
        self._stderr.close()

    def seeds(self) -> list[bytes]:
        return [text_of(kind).encode() for kind in KINDS]

    def read(self, data: bytes) -> object:
        if len(data) > MAX_FILE_BYTES:
            raise TokenizerError("refused by its size, before it is read")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        try:
            tokenizer = Tokenizer.from_json(text)
            for use in (self._encode_and_decode, self._stream):
                try:
                    use(tokenizer)
                except PromptError as error:
                    if "\n" in str(error) or not str(error):
                        raise
        finally:
            written = os.pread(self._stderr.fileno(), 200, 0)
            self._stderr.truncate(0)
            self._stderr.seek(0)
        if written:
            raise RuntimeError(f"stderr: {written!r}")
        return None

    def _encode_and_decode(self, tokenizer: Tokenizer) -> None:
        tokenizer.limit_vocabulary(1000)
        for text in TEXTS:
            ids = tokenizer.encode_prompt(text)
            tokenizer.decode(ids)
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True)

    def _stream(self, tokenizer: Tokenizer) -> None:
        rng = random.Random(0)
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(50)] if tokenizer.vocab_size else []
        stream = tokenizer.stream(ids[:10])
        for token in ids[10:]:
            stream.push(token)
        stream.flush()


_BIASES = {"11": -2.0, "12": 3.5}
SETTINGS: dict[str, object] = {
    "eos_token_id": [50256],
    "logit_bias": _BIASES,
    "sequence_bias": [[[11, 12], -2.0], [[13], 0.5]],
    "bad_words_ids": [[11, 42], [5]],
    "suppress_tokens": [1, 2, 3],
    "stop_strings": ["\n", "end"],
    "exponential_decay_length_penalty": [10, 1.05],
    "early_stopping": "never",
    "max_new_tokens": 20,
    "seed": 7,
    "max_time": 2.5,
    "transformers_version": "4.57.0",
    "bos_token_id": 50256,
}


class GenerationSettingsTarget(Target):
    """``generation_config.json``, and the same values as a caller's options."""

    name = "generation_settings"
    mutators = (*BYTE_MUTATORS, *[change_json] * 12)
    refusals = (ConfigError, StrictJsonError)

    def seeds(self) -> list[bytes]:
        sampling = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "logprobs": 3}
        dry = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_sequence_breakers": ["\n", 5]}
        beams = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 1.2}
        every = {name: value for name, value in DEFAULTS.items() if OPTIONS[name].rule.kind != "python"}
        return [
            json.dumps(settings).encode()
            for settings in (
                {},
                {name: value for name, value in SETTINGS.items() if name != "early_stopping"},
                sampling,
                dry,
                beams | {"early_stopping": "never"},
                {"do_sample": True, "mirostat_tau": 5.0, "mirostat_eta": 0.1},
                {"penalty_alpha": 0.6, "top_k": 4},
                {name: value for name, value in every.items() if name != "max_length"},
            )
        ]

    def read(self, data: bytes) -> object:
        if len(data) > MAX_SETTINGS_BYTES:
            raise StrictJsonError("refused by its size, before it is read")
        content = parse_json(data)
        if not isinstance(content, dict):
            raise StrictJsonError("must be an object")
        config = config_from_file(content)
        return GenerationConfig().updated({name: getattr(config, name) for name in content if name in OPTIONS})
