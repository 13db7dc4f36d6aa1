"""A bundle's latent space: texts become normal distributions of vectors, and vectors become texts.

A latent part makes a model a variational auto-encoder (Kingma and Welling, arXiv 1312.6114): q(z|x) is what the encoder
makes of a text x, p(x|z) what the decoder writes behind a vector z, and the prior p(z) is a standard normal
distribution.

Shapes: Z latent dimensions.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelm.bundle.folder import Bundle
from edgelm.bundle.latent_maps import Vector, read_latent_maps
from edgelm.errors import ConfigError, PrefixError, PromptError, pass_interrupts_on, shown
from edgelm.generation.latent_prefix import LatentPrefix
from edgelm.reuse.pool import SessionPool
from edgelm.scoring.latent_scores import posterior, reconstruction_logprobs, vector_prefix
from edgelm.scoring.results import Score
from edgelm.scoring.text_scores import named
from edgelm.text.prompts import Prompt, prompt_ids
from edgelm.text.tokenizer import Tokenizer

MAX_STEPS = 10_000
_MAX_NUMBER = 1000
"""Of a vector: texts lie within about 10 of the origin, and far beyond it the decoder computes infinite numbers."""
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """q(z|x) of a text x: a normal distribution with independent dimensions."""

    mean: Vector
    """float32 (Z,)"""
    log_variance: Vector
    """log sigma², float32 (Z,)"""

    def sample(self, seed: int | None = None) -> Vector:
        """A vector drawn from the distribution, float32 (Z,): mean + sigma * noise; raises ConfigError."""
        noise = _noise(len(self.mean), seed)
        with np.errstate(over="ignore"):
            drawn: Vector = (self.mean + np.exp(0.5 * self.log_variance) * noise).astype(np.float32)
        return drawn

    @property
    def kl_divergence(self) -> float:
        """KL(q(z|x) || p(z)) from the standard normal prior, in nats."""
        mean, log_variance = self.mean.astype(np.float64), self.log_variance.astype(np.float64)
        with np.errstate(over="ignore"):
            return float(0.5 * (mean**2 + np.exp(log_variance) - log_variance - 1).sum())


class Latent:
    """The latent space of a model; `edgelm.model.Model.latent` is one. Several threads may use it at the same time.

    Attributes:
        size: Z, the number of dimensions.
        prefix_tokens: how many tokens of the context a vector takes.
    """

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, sessions: SessionPool, *, has_prefix: bool) -> None:
        """Read the latent part of `bundle`; raises BundleError if it has none, or if it is damaged.

        `has_prefix` says that the model has a prefix of its own, where no vector can stand.
        """
        self._has_prefix = has_prefix
        self._facts, self._maps = read_latent_maps(bundle)
        self._tokenizer, self._sessions = tokenizer, sessions
        self._kv_dtype = bundle.manifest.graph.kv_dtype
        self.size, self.prefix_tokens = self._facts.size, self._facts.prefix_tokens

    def encode(self, text: Prompt) -> Posterior:
        """q(z|x) of a text x. A prefix of the model has no effect on it.

        Raises:
            PromptError: the text is empty, is neither text nor token ids, or has an unknown token id.
            ContextError: the text is longer than the context.
            ClosedError: the model is closed.
        """
        ids = self._ids(text)
        with self._sessions.borrowed() as (session, _):
            return Posterior(*posterior(session, self._maps, ids))

    def sample(self, seed: int | None = None) -> Vector:
        """A vector drawn from the prior, float32 (Z,); None for a random seed. Raises ConfigError."""
        return _noise(self.size, seed)

    def interpolate(self, a: Prompt | npt.ArrayLike, b: Prompt | npt.ArrayLike, steps: int) -> npt.NDArray[np.float32]:
        """`steps` vectors on the straight line from `a` to `b`, both ends included, float32 (steps, Z).

        An end is a vector, or a text, which stands for the mean of its distribution.

        Raises:
            ConfigError: `steps` is no whole number from 2 to 10,000.
            PromptError: an end is no vector of Z finite numbers, or an empty text.
            ContextError, ClosedError: as `encode`.
        """
        if isinstance(steps, bool) or not (isinstance(steps, int) and 2 <= steps <= MAX_STEPS):
            raise ConfigError(f"steps must be a whole number from 2 to {MAX_STEPS:,}, got {shown(steps)}")
        first, last = (self.encode(end).mean if isinstance(end, str) else self.vector(end) for end in (a, b))
        shares = np.linspace(0, 1, steps, dtype=np.float32)[:, None]
        return (1 - shares) * first + shares * last

    def score(self, text: Prompt, z: npt.ArrayLike) -> Score:
        """log p(x|z) of a text x behind the vector `z` (Z,), with its end token, in nats; raises as `encode`."""
        ids, prefix = self._ids(text), self._keys_values(self.vector(z))
        with self._sessions.borrowed() as (session, _):
            logprobs = reconstruction_logprobs(session, prefix, ids, self._facts.end_token_id)
        following = [*ids[1:], self._facts.end_token_id]
        tokens = [named(self._tokenizer, pair) for pair in zip(following, logprobs.tolist(), strict=True)]
        return Score(float(logprobs.sum()), tuple(tokens))

    def vector(self, z: object) -> Vector:
        """`z` as a latent vector, float32 (Z,); raises PromptError if it is no flat list of Z finite numbers."""
        expected = f"a latent vector of this model has {self.size} numbers"
        try:
            array = np.asarray(z)
        except (ValueError, OverflowError, TypeError) as error:
            pass_interrupts_on(error)
            raise PromptError(f"{expected}, got {shown(z)}") from None
        if array.dtype.kind not in "fiu" or array.shape != (self.size,):
            what = f"{array.dtype} of shape {array.shape}" if array.dtype.kind in "fiu" else shown(z)
            raise PromptError(f"{expected}, got {what}")
        wrong = array[~(np.abs(array.astype(np.float64)) <= _MAX_NUMBER)]
        if len(wrong):
            raise PromptError(f"{expected} from -{_MAX_NUMBER} to {_MAX_NUMBER}, got {wrong[0]}")
        return array.astype(np.float32)

    def prefixes(self, latent: object, count: int) -> list[LatentPrefix]:
        """What stands before each of `count` texts: one vector (Z,) before all of them, or one for each, (count, Z).

        Raises:
            PromptError: `latent` has another shape, or a number that is NaN, infinite or too large.
            PrefixError: the model has a prefix of its own.
        """
        if self._has_prefix:
            raise PrefixError(
                "a latent vector stands where this model's prefix stands: load the model without a prefix to use it"
            )
        is_several = isinstance(latent, np.ndarray) and latent.ndim == 2
        if isinstance(latent, (list, tuple)) and latent:
            is_several = isinstance(latent[0], (list, tuple, np.ndarray))
        vectors = list(latent) if is_several else [latent]  # type: ignore[call-overload]
        if is_several and len(vectors) != count:
            raise PromptError(f"latent must be one vector, or one for each of {count} prompts: got {len(vectors)}")
        begin = self._facts.begin_token_id
        made = [LatentPrefix(self._keys_values(self.vector(z)), begin) for z in vectors]
        return made if is_several else made * count

    def _keys_values(self, z: Vector) -> npt.NDArray[np.float32]:
        return vector_prefix(self._kv_dtype, self._maps, z)

    def _ids(self, text: Prompt) -> list[int]:
        return [self._facts.begin_token_id, *prompt_ids(self._tokenizer, text, "text", begins_text=False)]


def _noise(size: int, seed: int | None) -> Vector:
    if seed is not None and (isinstance(seed, bool) or not (isinstance(seed, int) and 0 <= seed <= _MAX_SEED)):
        raise ConfigError(f"seed must be a whole number from 0 to {_MAX_SEED}, got {shown(seed)}")
    return np.random.Generator(np.random.Philox(seed)).standard_normal(size, dtype=np.float32)
