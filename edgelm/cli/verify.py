"""``edgelm verify``: a bundle's files against its manifest, and its results against its certificate."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgelm.bundle.folder import Bundle
from edgelm.cli.interrupt import ends_at_once
from edgelm.cli.progress import percent, progress
from edgelm.cli.shared import bundle_options, json_option, print_json, print_table, print_wrapped, threads_option
from edgelm.cli.streams import note
from edgelm.errors import BundleError

if TYPE_CHECKING:
    from edgelm.engine.session import Session
    from edgelm.scoring.verification import Check


@click.command(name="verify")
@bundle_options
@click.option("--hashes-only", is_flag=True, help="Check the files only; measure nothing.")
@threads_option
@json_option("Print one JSON object instead of text.")
def command(place: str, hashes_only: bool, threads: int | None, as_json: bool) -> None:
    """Check a bundle's files and measure its quality again on this CPU; exit 1 if anything differs.

    The digest and each file's size and SHA-256 are checked first. Then the bundle computes its reference tokens. The
    results must match its certificate within the printed tolerances.
    """
    bundle = Bundle.read(place)
    files, size = bundle.file_count, bundle.size_bytes
    note(f"hashing {files} files ({size / 1e6:.1f} MB)")
    bundle.verify()
    digest = bundle.manifest.digest
    content: dict[str, object] = {"path": str(bundle.path), "digest": digest, "files": files, "size_bytes": size}
    if not as_json:
        print_wrapped(f"ok: {files} files, {size:,} bytes, digest {digest}")
    failed = [] if hashes_only else _measure(bundle, threads, content, as_json)
    if as_json:
        print_json(content)
    if failed:
        raise BundleError(
            f"the bundle {str(bundle.path)!r} does not compute what its certificate says ({', '.join(failed)}): "
            "its weights were altered, or this machine computes them differently; export or download it again"
        )


def _measure(bundle: Bundle, threads: int | None, content: dict[str, object], as_json: bool) -> list[str]:
    """Measure the bundle again, and print the results or add them to `content`; returns the failed checks in words."""
    with ends_at_once():
        from edgelm.bundle.reference import read_reference
        from edgelm.engine.graph import Graph
        from edgelm.engine.machine import cpu_name
        from edgelm.scoring.verification import checks, drift, figures, observe_session

        facts, data = read_reference(bundle)
        session = Graph.open(bundle, device="cpu", threads=threads).session()
    note(f"measuring on {facts.tokens:,} tokens")
    with progress("measured") as show:
        observed = observe_session(facts, data, session, progress=percent(show))
    measured = figures(facts, data, observed)
    all_checks = [*checks(facts, data, measured, drift(data, observed)), *_latent_checks(bundle, session)]
    machine = {"cpu": cpu_name(), "threads": session.threads, "tokens": facts.tokens}
    results = [{**asdict(check), "passed": check.passed} for check in all_checks]
    content["measured"] = {**machine, **asdict(measured), "checks": results}
    if not as_json:
        print_wrapped(f"measured on {facts.tokens:,} tokens, {cpu_name()}, {session.threads} threads:")
        kl, top1 = measured.mean_kl_divergence, measured.top1_agreement
        print_table(
            [
                ("", "measured", "stated", "tolerance", ""),
                *(
                    (c.name, *(f"{x:.6f}" for x in (c.measured, c.stated, c.tolerance)), "ok" if c.passed else "FAILED")
                    for c in all_checks
                ),
                ("KL divergence, nats per token", f"{kl:.6f}", f"{facts.mean_kl_divergence:.6f}", "", ""),
                ("same most likely token", f"{top1:.2%}", f"{facts.top1_agreement:.2%}", "", ""),
            ]
        )
    return _failed(all_checks)


def _latent_checks(bundle: Bundle, session: "Session") -> "list[Check]":
    """The comparisons of the latent part, measured again with `session`; none where the bundle has none."""
    if bundle.manifest.latent is None:
        return []
    from edgelm.bundle.latent_maps import read_latent_maps, read_latent_reference
    from edgelm.scoring.latent_scores import latent_checks, observe_latent

    reference, data = read_latent_reference(bundle)
    facts, maps = read_latent_maps(bundle)
    note(f"measuring the latent part on {reference.texts} texts")
    return latent_checks(reference, data, observe_latent(facts, maps, data, session))


def _failed(checks: "Sequence[Check]") -> list[str]:
    return [
        f"{check.name} {check.measured:.4g}, not {check.stated:.4g} ± {check.tolerance:.2g}"
        for check in checks
        if not check.passed
    ]
