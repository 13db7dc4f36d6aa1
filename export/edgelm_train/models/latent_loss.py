"""The two losses of a variational auto-encoder, and what keeps the second from making the first forget its input.

Notation: x is a text of T tokens, z a vector of Z numbers, q(z|x) what the encoder says, p(x|z) what the decoder says,
p(z) the prior, a standard normal distribution. The negative of the evidence lower bound (Kingma and Welling,
arXiv 1312.6114) is ``-E_q[log p(x|z)] + KL(q(z|x) || p(z))``: `reconstruction_loss` and `kl_divergence`.
"""

import torch
from torch.nn import functional

from edgelm_train.data.packing import IGNORED


def sample(mean: torch.Tensor, log_variance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A draw of z from q(z|x), (B, Z), that gradients pass: z = mean + sigma * noise (the reparameterization trick).

    `mean` and `log_variance` (log sigma²) are (B, Z); `noise` (B, Z) is drawn from a standard normal distribution.
    """
    return mean + torch.exp(0.5 * log_variance) * noise


def reconstruction_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-E_q[log p(x|z)], in nats for each text, (B,), estimated with the one z behind which `logits` were computed.

    Logits are (B, T, V). The logits of a position predict the label (B, T) of the next position; a label of -100 is
    left out.
    """
    predicted, wanted = logits[:, :-1].transpose(1, 2).float(), labels[:, 1:]
    return functional.cross_entropy(predicted, wanted, ignore_index=IGNORED, reduction="none").sum(dim=1)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(q(z|x) || p(z)), in nats for each text and dimension, (B, Z), of a normal q from the standard normal prior.

    In closed form it is ½ (μ² + σ² - log σ² - 1) for each dimension (Kingma and Welling, appendix B).
    """
    return 0.5 * (mean**2 + log_variance.exp() - log_variance - 1)


def with_free_bits(divergence: torch.Tensor, free_bits: float) -> torch.Tensor:
    """The sum over dimensions of max(free_bits, mean divergence), in nats, of `divergence` (B, Z).

    A dimension whose mean over the batch is below `free_bits` has no gradient, so nothing pulls it on towards the
    prior, where it would say nothing about x (Kingma et al., arXiv 1606.04934, appendix C.8).
    """
    return divergence.mean(dim=0).clamp(min=free_bits).sum()


def kl_weight(step: int, steps: int, cycles: int) -> float:
    """The weight of the divergence in the loss at `step`, counted from 0, of a run of `steps`: it rises in `cycles`.

    In the first half of each cycle the weight rises from 0 to 1; in the second half it is 1. While it is small, the
    decoder learns to read z; with each rise that knowledge is kept and compressed (cyclical annealing: Fu et al.,
    arXiv 1903.10145, with R = 0.5). 0 cycles: the weight is always 1.
    """
    if cycles == 0:
        return 1.0
    length = steps / cycles
    return min(1.0, 2 * (step % length) / length)


def active_units(means: torch.Tensor) -> int:
    """How many dimensions of `means` (N, Z), of N texts, have a variance over the texts of more than 0.01.

    A dimension with less says nothing about the text (Burda, Grosse and Salakhutdinov, arXiv 1509.00519, section 5.2).
    """
    return int((means.var(dim=0) > 0.01).sum())
