"""``edgelm finetune --latent``: a checkpoint learns the lines of a text as a variational auto-encoder."""

import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from edgelm.errors import TrainingError
from edgelm_train.data.corpus import counted
from edgelm_train.data.end_of_text import EndOfText
from edgelm_train.models.base import Base
from edgelm_train.models.latent import LatentGPT2
from edgelm_train.models.result import save_result, set_settings_aside
from edgelm_train.options import FREE_BITS, KL_CYCLES, LATENT_SIZE, LATENT_TOKENS, ROWS_PER_STEP, FinetuneOptions
from edgelm_train.run.checkpoints import follow_umask
from edgelm_train.run.folder import RUN_FOLDER, begin_run, check_out, saving
from edgelm_train.run.latent_data import LatentData, Measured, read_lines
from edgelm_train.run.loop import Outcome, Schedule, train
from edgelm_train.run.machine import device_for, fast_to_train, fastest_precision
from edgelm_train.run.report import Finished, TuningReport
from edgelm_train.run.tuning_data import fingerprints

_LEARNING_RATE = 1e-3
_MEASURE_SEED = 0


def finetune_latent(
    base: Base, data: Path, out: Path, options: FinetuneOptions, say: Callable[[str], None]
) -> Finished[TuningReport]:
    """Train on the lines of `data`, or resume the unfinished run in `out`, which the caller has locked.

    The result in `out` is a GPT-2 folder with ``latent.safetensors`` beside the weights, for ``edgelm export``. Raises
    as `edgelm_train.finetune.finetune`.
    """
    check_out(out)
    options.task_for(data)
    checkpoint = base.load_gpt2("--latent")
    end = EndOfText.of(checkpoint)
    if end.token_id is None:
        raise TrainingError(f"--latent needs an end-of-text token, and {checkpoint.name!r} has none")
    size, tokens = options.latent_size or LATENT_SIZE, options.latent_tokens or LATENT_TOKENS
    longest = checkpoint.model.config.n_positions - tokens
    if longest < 4:
        raise TrainingError(f"--latent-tokens {tokens} leaves no room in the context of {longest + tokens}")
    texts = read_lines(data, options.held_out, checkpoint, end.token_id, longest)
    recorded = {**fingerprints(checkpoint, data, options.held_out, base.adapter), **options.recorded()}
    batch_size = min(options.batch_size or ROWS_PER_STEP, len(texts.training))
    notes = (*checkpoint.notes, *end.notes, *texts.notes)
    for note in notes:
        say(note)
    device = device_for(options.device)
    plain = fast_to_train(checkpoint.model).to(device)
    set_settings_aside(plain)
    plain.config.eos_token_id = end.token_id
    before = texts.plain_loss(plain)
    torch.manual_seed(options.seed)
    free_bits = FREE_BITS if options.free_bits is None else options.free_bits
    latent = LatentGPT2.of(plain, size, tokens, free_bits=free_bits, word_dropout=options.word_dropout or 0.0)
    latent = fast_to_train(latent).to(device)
    latent.config._attn_implementation = "eager"  # texts are short
    batch = batch_size * texts.tokens_per_row
    precision = begin_run(out, recorded, lambda: fastest_precision(latent, batch, texts.tokens_per_row)[0])
    steps = max(1, round(options.epochs * len(texts.training) / batch_size))
    schedule = Schedule(
        steps=steps,
        batch_tokens=batch,
        learning_rate=options.learning_rate or _LEARNING_RATE,
        warmup_steps=round(0.05 * steps),
        weight_decay=0.01,
        beta2=0.999,
        precision=precision,
        seed=options.seed,
        evaluate_every=max(1, steps // options.evaluations),
        patience=options.patience or None,
    )
    learned = sum(p.numel() for p in latent.parameters())
    maps = sum(p.numel() for p in latent.latent.parameters())
    say(
        f"{counted(learned, 'parameter')} to learn, {maps:,} of them in the latent maps, {counted(steps, 'step')} of "
        f"{counted(batch_size, 'text')}; held-out loss before training, without z: {before.per_token:.4f} nats per "
        "token"
    )
    cycles = KL_CYCLES if options.kl_cycles is None else options.kl_cycles

    def objective(model: LatentGPT2) -> float:
        return texts.measured(model, _MEASURE_SEED).objective

    folder = out / RUN_FOLDER
    stream = texts.batches(steps, batch_size, options.seed, cycles)
    outcome = train(latent, stream, objective, folder / "latent", schedule, device=options.device, say=say)
    # A signal during the last measurement ends this call too, unless only the report is left to do.
    if outcome.ended == "signal" or (options.alone and outcome.signal is not None):
        return Finished(None, outcome)
    measured, logs = texts.measured(latent, _MEASURE_SEED), {"latent": outcome.log}
    losses = {"the base, without z": before.per_token, **_losses(measured)}
    if options.alone:
        say("training the same model without z, to compare")
        plain.requires_grad_(True)
        stream = texts.batches(steps, batch_size, options.seed)
        alone = train(
            plain,
            stream,
            lambda model: texts.plain_loss(model).per_token,
            folder / "alone",
            schedule,
            device=options.device,
            say=say,
        )
        if alone.ended == "signal":
            return Finished(None, alone)
        losses["the same model, trained without z"] = texts.plain_loss(plain).per_token
        logs["alone"] = alone.log
    report = TuningReport(
        losses=losses,
        facts={
            "base": checkpoint.name,
            "parameters learned": learned,
            "parameters of the latent maps": maps,
            "latent dimensions": size,
            "active dimensions": measured.active_units,
            "divergence of the encoder from the prior, nats per text": measured.kl_nats,
            "free bits, nats per dimension": free_bits,
            "cycles of the weight of the divergence": cycles,
            "word dropout": options.word_dropout or 0.0,
            **_run_facts(texts, outcome, schedule),
            "precision": precision,
        },
        notes=notes,
        log=outcome.log,
        next_steps=[
            shlex.join(["edgelm", "export", str(out), "-o", f"{out}-int8"]),
            shlex.join(["edgelm", "latent", "sample", "-m", f"{out}-int8"]),
        ],
    )
    with saving(out):
        latent.cpu()
        save_result(latent.plain(), checkpoint, end, out)
        latent.latent.save(out)
        follow_umask(out)
    return Finished.with_report(report, outcome, logs, schedule.batch_tokens, out)


def _losses(measured: Measured) -> dict[str, float]:
    return {
        "reconstruction, z drawn by the encoder": measured.reconstruction.per_token,
        "reconstruction, z the encoder's mean": measured.of_means.per_token,
        "reconstruction, z of another text": measured.shuffled.per_token,
        "negative evidence lower bound": measured.bound,
    }


def _run_facts(texts: LatentData, outcome: Outcome, schedule: Schedule) -> dict[str, object]:
    return {
        "texts to train on": len(texts.training),
        "texts held out": len(texts.held_out),
        "ended": outcome.ended,
        "steps": outcome.steps,
        "best step, whose weights these are": outcome.best_step,
        "seconds": outcome.seconds,
        "peak learning rate": schedule.learning_rate,
    }
