"""The loop of a run, by transformers' Trainer: optimizer steps over a stream of batches, measured on held-out data."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from edgelm.errors import TrainingError
from edgelm_export.source.checkpoint import quiet_torch
from edgelm_train.run.callbacks import Clock, ProgressBar, Stop
from edgelm_train.run.checkpoints import follow_umask, is_whole, last_checkpoint, seal
from edgelm_train.run.folder import disk_is_full, write_json
from edgelm_train.run.machine import Precision
from edgelm_train.run.muon import MuonAdamW

OptimizerName = Literal["adamw", "muon"]
End = Literal["complete", "early", "time", "signal"]
Batch = Mapping[str, Any]
Objective = Callable[[Any, Mapping[str, torch.Tensor]], Iterator[torch.Tensor]]
"""Losses of a model on parts of a batch, whose sum is its loss; each part is learned before the next is computed."""
_MOST_LOGGED_STEPS = 2000
_ENDED_FILE = "ended.json"
"""How a run ended, so that a call that is stopped between the last step and the report can be repeated."""
_LOGGED = ("step", "loss", "learning_rate", "grad_norm", "eval_loss")


@dataclass(frozen=True)
class Schedule:
    """Length, learning rate, precision and measurements of a run."""

    steps: int
    batch_tokens: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    accumulate: int = 1
    """Micro-batches of an optimizer step."""
    final_learning_rate: float = 0.05
    """End of the cosine, as a part of the peak learning rate."""
    beta2: float = 0.95
    clip_norm: float = 1.0
    optimizer: OptimizerName = "adamw"
    precision: Precision = "fp32"
    seed: int = 0
    evaluate_every: int = 0
    """Steps between two measurements on held-out data; 0: only at the end."""
    patience: int | None = None
    """Stop after this number of measurements in a row that are not the best so far; None: never."""
    keep: Literal["best", "last"] = "best"
    """Weights of the trained model: those of the best measurement, or those of the last step."""
    save_seconds: float = 240.0
    """Time between two checkpoints."""
    limit_seconds: float | None = None

    @property
    def log_every(self) -> int:
        """Number of steps whose mean loss is one point of the curve."""
        return max(1, self.steps // _MOST_LOGGED_STEPS)


@dataclass(frozen=True)
class Outcome:
    """The end of a run. The model has the weights to keep then, unless a signal stopped the run."""

    log: tuple[dict[str, Any], ...]
    """Points of the curve: {"step", "loss", "learning_rate", "grad_norm"} or {"step", "eval_loss"}; losses in nats."""
    steps: int
    seconds: float
    """Time of the run, with its earlier parts where it was resumed."""
    best_step: int
    """Step with the least held-out loss."""
    ended: End
    signal: int | None = None
    """Number of the signal that came, even where the run ended for another reason."""


def train(
    model: Any,
    batches: Dataset[Batch],
    measure: Callable[[Any], float],
    folder: Path,
    schedule: Schedule,
    *,
    objective: Objective | None = None,
    device: str = "auto",
    tensorboard: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Train `model` in place, from the last checkpoint in `folder` if there is one.

    Args:
        model: a model of transformers.
        batches: ``schedule.steps * schedule.accumulate`` micro-batches with "input_ids" and "labels" (B, T); a label
            of -100 is ignored. The loss of a step is the mean over the labels of all its micro-batches.
        measure: returns the held-out loss of the model, in nats per token.
        folder: gets the checkpoints and the event files of `tensorboard`.
        objective: what is learned; None for the loss that the model computes from labels. Its batches may have other
            arrays, and a step has one of them.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        say: gets lines about the progress.

    Raises:
        TrainingError: the loss became NaN or infinite, the disk is full, or no checkpoint of the run is whole.
    """
    stop = Stop()
    clock = Clock(stop, schedule.log_every, schedule.save_seconds, schedule.limit_seconds, say)
    callbacks: list[Any] = [clock, ProgressBar(schedule.batch_tokens)]
    if schedule.patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(early_stopping_patience=schedule.patience))
    folder.mkdir(parents=True, exist_ok=True)
    ended_before = _read_ended(folder)
    checkpoint = None if ended_before else last_checkpoint(folder, with_best=schedule.keep == "best", say=say)
    if checkpoint is not None:
        say(f"resuming after step {checkpoint.name.removeprefix('checkpoint-')} of {schedule.steps}")
    with quiet_torch():
        trainer = _Trainer(
            model=model,
            args=_arguments(folder, schedule, device, tensorboard),
            train_dataset=batches,
            eval_dataset=batches,  # required, but not read: evaluate() calls measure()
            callbacks=callbacks,
        )
        trainer.measure, trainer.clock, trainer.objective = measure, clock, objective
        if schedule.optimizer == "muon":
            trainer.optimizer = MuonAdamW(model, schedule.learning_rate, schedule.weight_decay, schedule.beta2)
        trainer.remove_callback(transformers.PrinterCallback)
        if ended_before is not None:
            trainer._load_from_checkpoint(str(ended_before[1]), model)
            return ended_before[0]
        try:
            with stop.on_signals():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except (OSError, RuntimeError, SafetensorError) as error:
            if not disk_is_full(error):
                raise
            message = f"cannot write a checkpoint into {folder}: the disk is full"
            raise TrainingError(f"{message}; free some of it and give the same command again") from None
    state = trainer.state
    ended: End = "time" if stop.out_of_time else "complete"
    if ended == "complete" and state.global_step < schedule.steps:
        ended = "signal" if stop.signal is not None and not trainer.out_of_patience else "early"
    outcome = Outcome(
        log=tuple(
            {name: entry[name] for name in _LOGGED if name in entry}
            for entry in state.log_history
            if "loss" in entry or "eval_loss" in entry
        ),
        steps=state.global_step,
        seconds=clock.seconds,
        best_step=state.best_global_step or state.global_step,
        ended=ended,
        signal=stop.signal,
    )
    if ended != "signal":
        best = state.best_model_checkpoint if schedule.keep == "best" else None
        kept = Path(best or f"checkpoint-{state.global_step}").name
        write_json(folder / _ENDED_FILE, {"outcome": asdict(replace(outcome, signal=None)), "kept": kept})
    return outcome


def _read_ended(folder: Path) -> tuple[Outcome, Path] | None:
    """The end of the run in `folder` and the checkpoint with the weights to keep; None where the run has not ended."""
    try:
        content = json.loads((folder / _ENDED_FILE).read_text(encoding="utf-8"))
        outcome = Outcome(**{**content["outcome"], "log": tuple(content["outcome"]["log"])})
        return (outcome, folder / content["kept"]) if is_whole(folder / content["kept"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _arguments(folder: Path, schedule: Schedule, device: str, tensorboard: bool) -> Any:
    every = schedule.evaluate_every or schedule.steps
    # TrainingArguments with bf16 set this variable, and later ones of this process would obey it without bf16.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return transformers.TrainingArguments(
        output_dir=str(folder),
        logging_dir=str(folder / "tensorboard"),
        report_to=["tensorboard"] if tensorboard else [],
        max_steps=schedule.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": schedule.final_learning_rate},
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        adam_beta2=schedule.beta2,
        max_grad_norm=schedule.clip_norm,
        optim="adamw_torch_fused",
        bf16=schedule.precision == "bf16",
        use_cpu=device == "cpu" or (device == "auto" and not torch.cuda.is_available()),
        seed=schedule.seed,
        logging_steps=schedule.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=schedule.keep == "best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )


class _Trainer(transformers.Trainer):  # type: ignore[misc]
    """A Trainer that reads micro-batches by their index and measures with a function of edgelm."""

    measure: Callable[[Any], float]
    clock: Clock
    objective: Objective | None
    control: Any

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.objective is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        losses = self.objective(model, self._prepare_inputs(inputs))
        total = torch.zeros((), device=self.args.device)
        while True:
            with self.compute_loss_context_manager():
                loss = next(losses, None)
            if loss is None:
                return total
            self.accelerator.backward(loss)
            total += loss.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for loss in (logs.get("loss", 0.0), logs.get("eval_loss", 0.0)):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} at step {self.state.global_step}; start again with a smaller "
                    "--learning-rate, or more warm-up, and another --out"
                )
        # Checkpoints contain the log, and so the seconds too.
        super().log({**logs, "seconds": self.clock.seconds}, start_time)

    def _rotate_checkpoints(self, *arguments: Any, **named: Any) -> None:
        # The older checkpoints are removed here, so the new one must be whole before.
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        follow_umask(checkpoint)
        seal(checkpoint)
        super()._rotate_checkpoints(*arguments, **named)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        if self.state.best_model_checkpoint is not None:  # the path of a folder that may have been moved since
            best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(best)

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping has stopped the run, perhaps together with something else."""
        return any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, transformers.EarlyStoppingCallback)
        )

    def get_train_dataloader(self) -> Any:
        batches = self.train_dataset
        loader = DataLoader(batches, batch_size=1, sampler=SequentialSampler(batches), collate_fn=_only)
        return self.accelerator.prepare(loader)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": self.measure(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _only(items: list[Batch]) -> dict[str, torch.Tensor]:
    (item,) = items
    return {name: torch.as_tensor(values) for name, values in item.items()}
