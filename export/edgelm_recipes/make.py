"""The steps of a recipe, from the folder of a data set to a measured bundle; a step that is done is not done again."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgelm.bundle.folder import Bundle
from edgelm.bundle.manifest import FixedPrecision
from edgelm.bundle.task import Measured, Task, fields_of, parse_task
from edgelm.engine.machine import cpu_name, default_threads, system_name
from edgelm.generation.prefix_task import give_task
from edgelm_export.pipeline import export
from edgelm_export.publish.added_task import copy_with_task
from edgelm_export.source.generation_settings import FILE as SETTINGS_FILE
from edgelm_recipes.back_translation import back_translated
from edgelm_recipes.chats import PLAIN, ChatForm
from edgelm_recipes.data import TRAIN, DataFacts, read_facts, spread, write_data
from edgelm_recipes.measure import Scores, dev_records, measure, measure_answers, name_of
from edgelm_recipes.order import DATA, Order
from edgelm_recipes.recipe import Recipe, Row
from edgelm_recipes.report import Report
from edgelm_recipes.speed import SPEED_INPUTS, Runnable, Speed, measure_speed
from edgelm_train.data.records import Records
from edgelm_train.evaluate import check_packages
from edgelm_train.finetune import PREFIX_FILE, finetune
from edgelm_train.models.base import Base, find_base
from edgelm_train.run.folder import RunRecord, saving, write_json
from edgelm_train.run.lock import locked

TUNED, BUNDLES, SCORES, BUNDLE, TASK = "tuned", "bundles", "scores", "bundle", "task.json"
BACK_TRANSLATED = "back_translated.jsonl"

Watch = Callable[[str], AbstractContextManager[Callable[[float], None]]]


@dataclass(frozen=True)
class Made:
    """The end of a call: with a report, or with the number of the signal that stopped a run that can go on."""

    report: Report | None
    signal: int = 0


def make(order: Order, say: Callable[[str], None], watch: Watch) -> Made:
    """Follow a recipe, or go on with it in a folder where it was stopped.

    Args:
        say: gets a line for each step.
        watch: gives a function that is called with the share of a step that is done.

    Raises:
        TrainingError: data or options cannot be used, the folder has something else in it, another process is at work
            there, or training diverged.
        ExportError: the base cannot be loaded, or a bundle cannot be made.
        BundleError: a bundle of `order.bundles` cannot be read.
    """
    with locked(order.out, "edgelm recipe"):
        order.check_out()
        RunRecord(order.recorded(), {}).write(order.out)
        return _Steps(order, say, watch).make()


def task_content(recipe: Recipe, form: str | None, measured: tuple[Measured, ...] = ()) -> bytes:
    """The file of a recipe's task. `form` is how chats are written; None where the task is no chat."""
    content = dict(recipe.task)
    if form == PLAIN:
        content["plain"] = form
    if measured:
        content["measured"] = [
            {name: value for name, value in asdict(one).items() if value is not None} for one in measured
        ]
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


class _Steps:
    """The steps in one folder."""

    def __init__(self, order: Order, say: Callable[[str], None], watch: Watch) -> None:
        self._order, self._say, self._watch = order, say, watch
        self._recipe, self._out = order.recipe, order.out
        self._base: Base = find_base(order.base, None)
        self._given = order.given_bundles()

    def make(self) -> Made:
        facts = self._data()
        task = parse_task(task_content(self._recipe, facts.form))
        check_packages(task)  # before hours of training
        if (signal := self._tune()) is not None:
            return Made(None, signal)
        (self._out / SCORES).mkdir(exist_ok=True)
        plain_task = self._out / SCORES / TASK
        plain_task.write_bytes(task_content(self._recipe, facts.form))
        runs = {"float": self._tuned("fp32"), "quantized": self._tuned(self._order.precision)}
        records = dev_records(self._out / DATA, self._order.limit)
        name = name_of(self._recipe, records, facts.dev)
        scores = {"baseline": self._baseline(plain_task, task, records, name)}
        scores |= {what: self._scores(what, run, plain_task, records, name) for what, run in runs.items()}
        speed = self._speed(runs["quantized"], plain_task, task, records)
        use = self._publish(runs["quantized"], task_content(self._recipe, facts.form, _side_by_side(scores)))
        manifest = Bundle.read(runs["quantized"].bundle).manifest
        certificate = manifest.certificate
        report = Report(
            recipe=self._recipe,
            facts=facts,
            scores=scores,
            precision=manifest.recipe.name,
            perplexity_ratio=certificate.drawn.perplexity_ratio if certificate and not certificate.passed else None,
            speed=speed,
            tuning=json.loads((self._out / TUNED / "report.json").read_text(encoding="utf-8")),
            machine=f"{cpu_name()}, {system_name()}, {default_threads()} CPUs",
            base=self._order.base,
            method=self._order.method,
            augment=self._order.augment,
            commands=(self._order.command, *use),
        )
        with saving(self._out):
            report.write(self._out)
        return Made(report)

    def _data(self) -> DataFacts:
        folder = self._out / DATA
        if folder.is_dir():
            return read_facts(folder)
        self._say(f"reading {self._order.data}")
        form = None
        if self._recipe.is_chat:
            self._say(f"loading {self._order.base}, because chats are written in its form")
            form = ChatForm.of(self._base.load())
        facts = write_data(
            self._recipe,
            self._order.data,
            folder,
            rows=self._order.rows,
            augment=self._order.augment,
            seed=self._order.options.seed,
            form=form,
            back_translate=None if self._order.back_translation is None else self._back_translated,
        )
        for note in facts.notes:
            self._say(note)
        return facts

    def _back_translated(self, known: Sequence[Row]) -> tuple[list[Row], tuple[str, ...]]:
        asked = self._order.back_translation
        assert asked is not None
        self._say(f"translating {asked.texts} back with {asked.bundle}")
        with self._watch("translated back") as show:
            return back_translated(self._recipe, asked, known, self._out / BACK_TRANSLATED, self._order.threads, show)

    def _tune(self) -> int | None:
        """Tune the base; the number of the signal that stopped this, if any."""
        out = self._out / TUNED
        if (out / "report.json").is_file():
            return None
        self._say(f"tuning {self._order.base} ({self._order.method})")
        done = finetune(self._order.base, self._out / DATA / TRAIN, out, self._order.options, say=self._say)
        return None if done.report is not None else done.outcome.signal or 1

    def _tuned(self, precision: FixedPrecision) -> Runnable:
        """The tuned model as a bundle of this precision; with a prefix, a bundle of the base and the prefix."""
        if self._order.method == "prefix":
            return replace(self._untuned(precision), prefix=self._out / TUNED / PREFIX_FILE)
        return Runnable(self._exported(self._out / BUNDLES / f"tuned-{precision}", precision, tuned=True))

    def _untuned(self, precision: FixedPrecision) -> Runnable:
        given = self._given.get("fp32" if precision == "fp32" else "quantized")
        if given is not None:
            return Runnable(given)
        published = self._order.method == "prefix" and precision != "fp32"
        place = self._out / BUNDLE if published else self._out / BUNDLES / f"base-{precision}"
        return Runnable(self._exported(place, precision, tuned=False))

    def _exported(self, place: Path, precision: FixedPrecision, *, tuned: bool) -> Path:
        if place.is_dir():
            if Bundle.read(place).manifest.recipe.name == precision:
                return place
            shutil.rmtree(place)
        self._say(f"making the bundle {place}")
        source, adapter, settings = self._base.source, self._base.adapter, self._out / TUNED / SETTINGS_FILE
        if tuned and self._order.method == "full":
            source, adapter = str(self._out / TUNED), None
        elif tuned:
            adapter = self._out / TUNED
        done = export(
            source,
            place,
            precision,
            adapter=None if adapter is None else str(adapter),
            generation_config=settings if self._order.method != "full" and settings.is_file() else None,
            accept_quality_loss=True,  # the report has what counts: the score
            report=self._say,
        )
        for note in done.notes:
            self._say(note)
        return place

    def _baseline(self, task_file: Path, task: Task, records: Records, name: str) -> Scores:
        if self._recipe.baseline.answers is None:
            return self._scores("baseline", self._untuned("fp32"), task_file, records, name)
        return measure_answers(self._recipe, task, self._out / DATA, records, name)

    def _scores(self, what: str, run: Runnable, task: Path, records: Records, name: str) -> Scores:
        def work() -> dict[str, Any]:
            with self._watch(f"measured {what}") as show:
                return measure(self._recipe, run, task, records, name, self._order.threads, show).as_json()

        return Scores.from_json(
            self._once(what, {**_facts(run), "task": task.read_text(encoding="utf-8"), "data": name}, work)
        )

    def _speed(self, run: Runnable, task_file: Path, task: Task, records: Records) -> Speed:
        fields = fields_of(task)
        inputs = [{field: row[field] for field in fields} for row in spread(records.rows, SPEED_INPUTS)]

        def work() -> dict[str, Any]:
            return asdict(measure_speed(run, task_file, inputs, self._order.threads))

        key = {
            **_facts(run),
            "task": task_file.read_text(encoding="utf-8"),
            "inputs": len(inputs),
            "threads": self._order.threads,
        }
        return Speed(**self._once("speed", key, work))

    def _once(self, what: str, key: Mapping[str, object], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, or gave earlier for an equal `key`."""
        file = self._out / SCORES / f"{what}.json"
        if file.is_file():
            known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if known["of"] == key:
                done: dict[str, Any] = known["done"]
                return done
        self._say(f"measuring: {what}")
        done = work()
        write_json(file, {"of": key, "done": done})
        return done

    def _publish(self, run: Runnable, task: bytes) -> list[str]:
        """Put the result into its place; the commands that use it."""
        out, place = self._out, self._out / BUNDLE
        use = [f"edgelm {'chat' if self._recipe.is_chat else 'run'} -m {place} ..."]
        with saving(out):
            (out / TASK).write_bytes(task)
            if run.prefix is not None:
                give_task(run.prefix, out / TASK, out / PREFIX_FILE, Bundle.read(run.bundle))
                return [f"edgelm run -m {run.bundle} --prefix {out / PREFIX_FILE} ..."]
            if place.is_dir():
                digest = Bundle.read(run.bundle).manifest.files["model.onnx"]
                same = Bundle.read(place)
                if same.manifest.files["model.onnx"] == digest and (place / TASK).read_bytes() == task:
                    return use
                shutil.rmtree(place)
        copy_with_task(Bundle.read(run.bundle), out / TASK, place)
        return use


def _facts(run: Runnable) -> dict[str, object]:
    return {
        "bundle": Bundle.read(run.bundle).manifest.digest,
        "prefix": None if run.prefix is None else str(run.prefix),
    }


def _side_by_side(scores: Mapping[str, Scores]) -> tuple[Measured, ...]:
    """The scores of the quantized bundle, with those of the float one beside them."""
    floats = scores["float"]
    return tuple(replace(one, float_value=floats.value(one.metric)) for one in scores["quantized"].measured)
