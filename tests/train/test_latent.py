"""``edgelm finetune --latent``: what is saved computes what training measured, and mistakes get one sentence."""

from pathlib import Path

import pytest
import torch

from edgelm.errors import TrainingError
from edgelm_export.model.latent import encode, token_logprobs
from edgelm_export.source.checkpoint import load_checkpoint
from edgelm_train.data.examples import Example
from edgelm_train.finetune import finetune
from edgelm_train.models.latent import LatentGPT2, encoder_reads
from edgelm_train.models.latent_loss import kl_divergence, reconstruction_loss
from edgelm_train.options import FinetuneOptions
from edgelm_train.run.latent_data import LatentData, read_lines
from tests.train.conftest import Playground

pytestmark = pytest.mark.export

QUICK = FinetuneOptions(latent=True, latent_size=8, latent_tokens=2, epochs=2, evaluations=2, batch_size=8)


@pytest.fixture(scope="module")
def trained(playground: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latent") / "out"
    done = finetune(str(playground.base), playground.text, out, FinetuneOptions(**{**vars(QUICK), "alone": True}))
    assert done.report is not None
    losses = done.report.losses
    assert losses["reconstruction, z drawn by the encoder"] < losses["the base, without z"] - 0.05
    assert losses["the same model, trained without z"] < losses["the base, without z"] - 0.05
    assert losses["negative evidence lower bound"] > losses["reconstruction, z drawn by the encoder"]
    return out


def test_the_saved_checkpoint_computes_what_was_measured(trained: Path, playground: Playground) -> None:
    checkpoint = load_checkpoint(str(trained))
    maps = checkpoint.latent
    assert maps is not None and (maps.size, maps.tokens) == (8, 2)
    data = read_lines(playground.text, None, load_checkpoint(str(playground.base)), 0, 60)
    latent = LatentGPT2.of(checkpoint.model, 8, 2, free_bits=0.5)
    latent.latent.load_state_dict(maps.state_dict())
    measured = data.measured(latent.eval(), 0)
    report = (trained / "report.md").read_text(encoding="utf-8")
    assert f"| reconstruction, z drawn by the encoder | {measured.reconstruction.per_token:.4f} |" in report
    example = data.held_out[0]
    ids, labels = torch.tensor([example.ids]), torch.tensor([example.labels])
    mean, log_variance = encode(checkpoint.model, maps, list(example.ids[:-1]))  # the end token is not read
    theirs = latent.posterior(ids, labels)
    torch.testing.assert_close(mean, theirs[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_variance, theirs[1][0], atol=1e-5, rtol=1e-5)
    logprobs = token_logprobs(checkpoint.model, maps, list(example.ids), mean)
    loss = reconstruction_loss(latent.decode(ids, mean[None]), labels)
    assert -float(logprobs.sum()) == pytest.approx(float(loss), rel=1e-4)


def test_the_loss_is_both_losses_per_token(playground: Playground) -> None:
    model = load_checkpoint(str(playground.base)).model
    latent = LatentGPT2.of(model, 4, 2, free_bits=0.0).eval()
    ids = torch.tensor([[0, 5, 6, 7, 0], [0, 8, 9, 0, 0]])
    labels = torch.tensor([[-100, 5, 6, 7, 0], [-100, 8, 9, 0, -100]])
    torch.manual_seed(3)
    noise = torch.randn(2, 4)
    mean, log_variance = latent.posterior(ids, labels)
    z = mean + (0.5 * log_variance).exp() * noise
    reconstruction = reconstruction_loss(latent.decode(ids, z), labels).sum()
    divergence = kl_divergence(mean, log_variance).sum()
    torch.manual_seed(3)
    loss = latent(input_ids=ids, labels=labels, kl_weight=torch.tensor(0.25)).loss
    torch.testing.assert_close(loss, (reconstruction + 0.25 * divergence) / 7)


def test_padding_changes_nothing(playground: Playground) -> None:
    latent = LatentGPT2.of(load_checkpoint(str(playground.base)).model, 4, 2).eval()
    ids, labels = torch.tensor([[0, 5, 6, 0]]), torch.tensor([[-100, 5, 6, 0]])
    padded = torch.tensor([[0, 5, 6, 0, 9, 9]]), torch.tensor([[-100, 5, 6, 0, -100, -100]])
    torch.testing.assert_close(latent.posterior(ids, labels), latent.posterior(*padded))


def test_the_encoder_reads_all_but_the_end_token() -> None:
    labels = torch.tensor([[-100, 5, 6, 0], [-100, 0, -100, -100]])
    assert encoder_reads(labels).tolist() == [[True, True, True, False], [True, False, False, False]]


def test_a_batch_has_the_weight_of_its_step() -> None:
    examples = tuple(Example((0, token, 0), 1) for token in range(1, 9))
    stream = LatentData(examples, examples, 0).batches(8, 4, 0, 2)
    assert [float(stream[step]["kl_weight"]) for step in range(8)] == [0, 0.5, 1, 1, 0, 0.5, 1, 1]
    assert "kl_weight" not in LatentData(examples, examples, 0).batches(8, 4, 0)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora"}, "--latent trains all weights; leave out --method lora"),
        ({"window": 8}, "--latent learns the lines of a plain text; leave out --window"),
        ({"free_bits": float("nan")}, "--free-bits must be at least 0"),
        ({"word_dropout": 1.0}, "--word-dropout must be at least 0 and less than 1"),
        ({"latent_size": 0}, "--latent-size must be at least 1"),
        ({"latent": False, "kl_cycles": 2}, "--kl-cycles belongs to --latent"),
        ({"latent": False, "alone": True}, "--alone belongs to --latent"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        FinetuneOptions(**{"latent": True, **options})  # type: ignore[arg-type]


def test_data_that_cannot_be_used(playground: Playground, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is a file of rows"):
        finetune(str(playground.base), playground.reversals, tmp_path / "a", QUICK)
    short = tmp_path / "short.txt"
    short.write_text("one line\n\n", encoding="utf-8")
    with pytest.raises(TrainingError, match="has 0 usable texts to train on: give more lines of text"):
        finetune(str(playground.base), short, tmp_path / "b", QUICK)
    with pytest.raises(TrainingError, match="--latent-tokens 62 leaves no room in the context of 64"):
        finetune(str(playground.base), playground.text, tmp_path / "c", FinetuneOptions(latent=True, latent_tokens=62))
