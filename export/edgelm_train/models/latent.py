"""A GPT-2 that learns as a variational auto-encoder of texts: its encoder and its decoder are the same weights.

Shapes: B texts, T tokens, Z latent dimensions, V vocabulary.
"""

from typing import Any

import torch
import transformers

from edgelm_export.model.latent import LatentMaps
from edgelm_train.data.packing import IGNORED
from edgelm_train.models.latent_loss import kl_divergence, reconstruction_loss, sample, with_free_bits

_MAPS = "latent."


class LatentGPT2(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """A GPT-2 whose loss is that of a variational auto-encoder, where labels are given.

    Its state has the two maps of `edgelm_export.model.latent.LatentMaps` more than a GPT-2's.
    """

    @classmethod
    def of(cls, model: Any, size: int, tokens: int, *, free_bits: float = 0.0, word_dropout: float = 0.0) -> Any:
        """A latent model with a copy of the weights of `model`, a ``transformers.GPT2LMHeadModel``.

        Args:
            model: the base.
            size: Z, dimensions of z.
            tokens: N, positions of the prefix in every layer.
            free_bits: nats of each dimension that cost nothing; see `with_free_bits`.
            word_dropout: part of the decoder's input tokens that training replaces by the token `eos_token_id`, so that
                the decoder has to read z (Bowman et al., arXiv 1511.06349, section 3.1).
        """
        config = transformers.GPT2Config.from_dict(model.config.to_dict())
        # Texts are short: torch's fused attention takes longer than plain products of matrices.
        latent: LatentGPT2 = cls._from_config(config, attn_implementation="eager")
        latent.load_state_dict(model.state_dict())
        latent.latent = LatentMaps(config, size, tokens)
        latent.free_bits, latent.word_dropout = free_bits, word_dropout
        return latent

    def posterior(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of q(z|x), (B, Z) each, of texts with `input_ids` and `labels` (B, T).

        Texts are padded on the right, where causal attention never looks.
        """
        hidden = self.transformer(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
        found: tuple[torch.Tensor, torch.Tensor] = self.latent.of_hidden(hidden, encoder_reads(labels))
        return found

    def decode(self, input_ids: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) for `input_ids` (B, T) behind the prefix of `z` (B, Z)."""
        past = self.latent.cache(z)
        logits: torch.Tensor = super().forward(input_ids=input_ids, past_key_values=past, use_cache=True).logits
        return logits

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        kl_weight: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """Logits of the plain model without labels. With `labels` (B, T), the loss of training in nats per token.

        `kl_weight` () is the weight of the divergence; None for 1. A text begins with a token that has no label,
        because no token precedes it; its last label is the end of text.
        """
        if labels is None:
            return super().forward(input_ids=input_ids, use_cache=use_cache)
        learned = labels != IGNORED
        mean, log_variance = self.posterior(input_ids, labels)
        z = sample(mean, log_variance, torch.randn_like(mean))
        shown = input_ids
        if self.training and self.word_dropout:
            dropped = (torch.rand(input_ids.shape, device=input_ids.device) < self.word_dropout) & learned
            shown = input_ids.masked_fill(dropped, self.config.eos_token_id)
        reconstruction = reconstruction_loss(self.decode(shown, z), labels).mean()  # -E_q[log p(x|z)]
        divergence = with_free_bits(kl_divergence(mean, log_variance), self.free_bits)  # KL(q(z|x) || p(z))
        loss = reconstruction + (1.0 if kl_weight is None else kl_weight) * divergence
        return transformers.modeling_outputs.CausalLMOutput(loss=loss * len(labels) / learned.sum())

    def plain(self) -> Any:
        """A plain GPT-2 with the learned weights; `latent` has the maps."""
        plain = transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config.from_dict(self.config.to_dict()))
        plain.load_state_dict({n: value for n, value in self.state_dict().items() if not n.startswith(_MAPS)})
        return plain


def encoder_reads(labels: torch.Tensor) -> torch.Tensor:
    """The positions (B, T) that the encoder reads: all of a text but its end-of-text token, which is its last label."""
    learned = labels != IGNORED
    return torch.cat([learned[:, 1:], torch.zeros_like(learned[:, :1])], dim=1)
