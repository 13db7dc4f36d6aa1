"""``edgelm doctor``: whether this machine and this installation can run models, and what to do where they cannot."""

import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgelm import __version__
from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.shared import given_place, json_option, model_option, print_json
from edgelm.cli.streams import print_line, shows_in_stdout
from edgelm.errors import EdgelmError, install_hint

if TYPE_CHECKING:
    from edgelm.engine.installation import OnnxRuntimeFacts

Status = Literal["ok", "warn", "fail"]

COLUMNS = 80
_INDENT = 20
_LOW_DISK_BYTES = 200_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    fact: str
    advice: str = ""
    """What to do, in a sentence; empty where all is well."""


@click.command(name="doctor")
@click.argument("bundle", metavar="[BUNDLE]", required=False)
@model_option
@json_option("Print one JSON object instead of text.")
def command(bundle: str | None, model: str | None, as_json: bool) -> None:
    """Check this machine, this installation and a bundle; exit 1 if anything keeps the bundle from running.

    Each line begins with ok, warn or fail; advice follows where there is some. Nothing is changed, and nothing is
    asked of the network.
    """
    findings: list[Finding] = []
    for check in _checks(given_place(bundle, model)):
        with ends_at_once():
            try:
                found = list(check())
            except Exception as error:  # a broken machine or installation breaks in ways that nobody has listed
                reason = f"{type(error).__name__}: {error}"
                found = [Finding(check.__name__.lstrip("_"), "warn", f"cannot be checked: {reason}")]
        findings += found
        if not as_json:
            for finding in found:
                _print(finding)
    healthy = all(finding.status != "fail" for finding in findings)
    if as_json:
        print_json({"healthy": healthy, "checks": [asdict(finding) for finding in findings]})
    if not healthy:
        click.get_current_context().exit(1)


def _checks(place: str | None) -> list[Callable[[], Iterator[Finding]]]:
    """The checks in their order, for the bundle at `place`, or for the embedded one."""
    from edgelm.engine.installation import ask_onnxruntime

    ask = cache(ask_onnxruntime)

    def onnxruntime() -> Iterator[Finding]:
        return _onnxruntime(ask())

    def bundle() -> Iterator[Finding]:
        return _bundle(place, works=ask().error is None)

    return [_python, _packages, onnxruntime, _processor, _threads, _memory, _huge_pages, _disk, _output, bundle]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    place = "a frozen program" if getattr(sys, "frozen", False) else sys.prefix
    yield Finding("edgelm", "ok", f"{__version__}, Python {version} of {place}")


def _packages() -> Iterator[Finding]:
    from edgelm.engine.installation import needed_packages

    for package in needed_packages():
        if package.version is None:
            yield Finding(package.name, "fail", "not installed", f"Run: pip install {package.name}")
        elif package.old:
            fact = f"{package.version} is older than {package.minimum}"
            yield Finding(package.name, "fail", fact, f"Run: pip install -U {package.name}")
        else:
            yield Finding(package.name, "ok", package.version)


def _onnxruntime(facts: "OnnxRuntimeFacts") -> Iterator[Finding]:
    from edgelm.engine.installation import onnxruntime_distributions

    distributions = onnxruntime_distributions()
    if len(distributions) > 1:
        names = " and ".join(distributions)
        uninstall = " ".join(name.split(" ")[0] for name in distributions)
        advice = f"Run: pip uninstall -y {uninstall}; then install the one that you need."
        yield Finding("packages", "fail", f"{names} overwrite each other's files", advice)
    if facts.error is not None:
        advice = install_hint("cpu").capitalize() + ", or [gpu] for CUDA."
        yield Finding("onnxruntime", "fail", facts.error, advice)
        return
    yield Finding("onnxruntime", "ok", f"{facts.version} of {facts.folder}")
    yield _telemetry()
    yield _cuda(facts.cuda, "CUDAExecutionProvider" in facts.providers)


def _telemetry() -> Finding:
    value = os.environ.get("ORT_DISABLE_TELEMETRY")
    if value in (None, "1"):
        return Finding("telemetry", "ok", "off: edgelm sets ORT_DISABLE_TELEMETRY=1 before ONNX Runtime loads")
    advice = "Unset ORT_DISABLE_TELEMETRY, or set it to 1."
    return Finding("telemetry", "warn", f"ORT_DISABLE_TELEMETRY={value} may let ONNX Runtime report its use", advice)


def _cuda(reason: str | None, has_provider: bool) -> Finding:
    gpu = any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/dxg"))
    if not has_provider:
        where = "there is an NVIDIA GPU, but this ONNX Runtime" if gpu else "this ONNX Runtime"
        return Finding("CUDA", "ok", f"{where} runs on the CPU only; only bundles of fp16 use CUDA")
    if not reason:
        return Finding("CUDA", "ok", "loads")
    missing = "" if gpu else "There is no NVIDIA GPU or driver here. "
    advice = f"{missing}CUDA needs a driver and the libraries of edgelm[gpu]; --device cpu needs neither."
    return Finding("CUDA", "warn", f"does not load: {reason}", advice)


def _processor() -> Iterator[Finding]:
    from edgelm.engine.machine import cpu_flags, cpu_name, is_x86, system_name

    yield Finding("processor", "ok", f"{cpu_name()}, {system_name()}")
    flags = cpu_flags()
    if flags is None:
        yield Finding("features", "ok", "this system does not list them")
        return
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
    known |= {"amx_int8": "AMX", "asimd": "NEON", "asimddp": "NEON dot product", "i8mm": "NEON int8 matrix product"}
    fact = ", ".join(name for flag, name in known.items() if flag in flags) or "none that speed up models"
    if is_x86() and "avx2" not in flags:
        yield Finding("features", "warn", fact, "Without AVX2 models are slow; use a newer processor if you can.")
    elif is_x86() and not {"avx512_vnni", "avx_vnni"} & flags:
        advice = "Without VNNI w8a8 bundles are slow: use int8 or int4, and check them with `edgelm verify`."
        yield Finding("features", "warn", fact, advice)
    elif not is_x86() and "asimddp" not in flags:
        yield Finding("features", "warn", fact, "Without the dot product of integers int8 and int4 models are slow.")
    else:
        yield Finding("features", "ok", fact)


def _threads() -> Iterator[Finding]:
    from edgelm.engine.cgroup import cpu_limits, thread_limits
    from edgelm.engine.machine import default_threads, usable_cpus
    from edgelm.engine.threads import startable_threads

    wanted, quotas = default_threads(), cpu_limits()
    fact = f"{wanted}: {usable_cpus()} of {os.cpu_count()} CPUs allowed"
    fact += "".join(f", {quota.limit:g} CPUs by {quota.file}" for quota in quotas) or ", no quota"
    possible = 1 + startable_threads(wanted - 1)
    if possible < wanted:
        fact += "".join(f"; {limit.used:g} of {limit.limit:g} used in {limit.file}" for limit in thread_limits())
        advice = "Raise the limit of processes (ulimit -u, pids.max), or models run on fewer threads."
        yield Finding("threads", "warn", f"only {possible} can start, not {fact}", advice)
        return
    yield Finding("threads", "ok", fact)


def _memory() -> Iterator[Finding]:
    from edgelm.engine.limits import rooms

    for room in rooms():
        yield Finding("memory", "ok", f"{max(0, room.free_bytes) / 1e6:,.0f} MB left by {room.limit}")


def _huge_pages() -> Iterator[Finding]:
    from edgelm.engine.huge_pages import huge_page_setting

    setting = huge_page_setting()
    if setting == "never":
        advice = "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; models then write faster."
        yield Finding("huge pages", "warn", "forbidden", advice)
    else:
        yield Finding("huge pages", "ok", "this system has none" if setting is None else f"allowed ({setting})")


def _disk() -> Iterator[Finding]:
    advice = "Running models needs no space; exports, training and kept states do."
    try:
        places = {"disk": str(Path.cwd()), "temporary": tempfile.gettempdir()}
    except OSError as error:  # the current folder is gone, or none for temporary files can be written
        yield Finding(
            "disk", "warn", f"the current folder is gone, or no temporary one can be written: {error.strerror}", advice
        )
        return
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        fact = f"{free / 1e6:,.0f} MB free in {place}"
        enough = free >= _LOW_DISK_BYTES
        yield Finding(name, "ok" if enough else "warn", fact, "" if enough else advice)


def _output() -> Iterator[Finding]:
    encoding = getattr(sys.stdout, "encoding", None) or "unknown"
    kind = "a terminal" if sys.stdout.isatty() else "a file or pipe"
    if shows_in_stdout("é☕"):
        yield Finding("output", "ok", f"{encoding}, to {kind}")
    else:
        advice = "Set the terminal to UTF-8 or unset PYTHONIOENCODING; missing characters are shown as ?."
        yield Finding("output", "warn", f"{encoding}, to {kind}", advice)


def _bundle(place: str | None, *, works: bool) -> Iterator[Finding]:
    """Check the bundle; run it if ONNX Runtime `works`."""
    from edgelm.bundle.folder import Bundle, default_bundle_path

    try:
        bundle = Bundle.read(place or default_bundle_path())
        bundle.verify()
    except EdgelmError as error:
        yield Finding("bundle", "fail", str(error))
        return
    manifest = bundle.manifest
    name = f"{manifest.source.name} {manifest.recipe.name}, {bundle.size_bytes / 1e6:.1f} MB"
    yield Finding("bundle", "ok", f"{name}, all hashes match, in {bundle.path}")
    from edgelm.engine.memory import ModelMemory

    yield Finding("forecast", "ok", f"{ModelMemory.of(bundle).forecast_bytes / 1e6:,.0f} MB for one text")
    if not works:
        yield Finding("model", "fail", "not tried, because ONNX Runtime cannot be used")
        return
    try:
        from edgelm.loading import load

        with load(bundle.path) as model:
            stats = model.generate([0], max_new_tokens=4, do_sample=False, eos_token_id=()).stats
            fact = f"loads in {model.load_seconds:.2f} s and writes {stats.new_tokens} tokens"
            place = f"{model.session.device}, {model.session.threads} threads"
    except EdgelmError as error:
        yield Finding("model", "fail", str(error))
        return
    yield Finding("model", "ok", f"{fact} on {place}; `edgelm verify` measures its quality")


def _print(finding: Finding) -> None:
    """Print a finding, and its advice below it, in lines of at most 80 columns."""
    head = f"{finding.status:<4}  {finding.name}"
    width = COLUMNS
    with suppress(OSError, ValueError):
        width = min(COLUMNS, shutil.get_terminal_size((COLUMNS, 0)).columns) or COLUMNS
    room = max(20, width - _INDENT)
    for number, line in enumerate(textwrap.wrap(finding.fact, room, break_on_hyphens=False) or [""]):
        print_line(f"{'' if number else head:<{_INDENT}}{line}".rstrip())
    for number, line in enumerate(textwrap.wrap(finding.advice, room - 3, break_on_hyphens=False)):
        print_line(f"{'':<{_INDENT}}{'   ' if number else '-> '}{line}")
