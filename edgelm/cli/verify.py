"""``edgelm verify``: every file of a bundle against its manifest, and what it computes against its certificate."""

from dataclasses import asdict

import click

from edgelm.bundle.folder import Bundle, default_bundle_path
from edgelm.cli.options import bundle_argument, model_option, one_bundle, print_json
from edgelm.errors import BundleError


@click.command(name="verify")
@bundle_argument
@model_option
@click.option("--hashes-only", is_flag=True, help="Check the files alone; measure nothing.")
@click.option("--threads", type=int, metavar="N", help="CPU threads; all allowed CPUs when not given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(bundle: str | None, model: str | None, hashes_only: bool, threads: int | None, as_json: bool) -> None:
    """Check every file of a bundle, and measure again on this CPU what it lost; exit 1 if anything differs.

    The digest, the size and the SHA-256 of every file come first. Then the bundle computes its reference tokens, and
    the results must be those of its certificate, within tolerances that are printed.
    """
    folder = one_bundle(bundle, model)
    opened = Bundle.read(default_bundle_path() if folder is None else folder)
    total = opened.verify(lambda name, size: click.echo(f"hashing {name} ({size / 1e6:.1f} MB)", err=True))
    content: dict[str, object] = {
        "path": str(opened.path),
        "digest": opened.manifest.digest,
        "files": len(opened.manifest.files),
        "size_bytes": total,
    }
    if not as_json:
        click.echo(f"ok: {len(opened.manifest.files)} files, {total:,} bytes, digest {opened.manifest.digest}")
    failed = [] if hashes_only else _measure(opened, threads, content, as_json)
    if as_json:
        print_json(content)
    if failed:
        raise BundleError(
            f"the bundle {str(opened.path)!r} does not compute what its certificate says ({', '.join(failed)}): "
            "its weights were altered, or this machine computes them differently; export or download it again"
        )


def _measure(opened: Bundle, threads: int | None, content: dict[str, object], as_json: bool) -> list[str]:
    """Measure the bundle again, print or add to `content` what was found; returns what failed, in words."""
    from edgelm.bundle.reference import read_reference
    from edgelm.engine.graph import Graph
    from edgelm.engine.machine import cpu_name
    from edgelm.scoring.verification import checks, drift, figures, observe_session

    facts, data = read_reference(opened)
    session = Graph.open(opened, device="cpu", threads=threads).session()
    click.echo(f"measuring on {facts.tokens:,} tokens", err=True)
    observed = observe_session(facts, data, session)
    found = figures(facts, data, observed)
    made = checks(facts, data, found, drift(data, observed))
    content["measured"] = {
        "cpu": cpu_name(),
        "threads": session.threads,
        "tokens": facts.tokens,
        **asdict(found),
        "checks": [{**asdict(check), "passed": check.passed} for check in made],
    }
    if not as_json:
        click.echo(f"measured on {facts.tokens:,} tokens, {cpu_name()}, {session.threads} threads:")
        for check in made:
            click.echo(
                f"{check.name:<34}{check.measured:10.6f}  stated {check.stated:.6f}, tolerance {check.tolerance:.6f}: "
                f"{'ok' if check.passed else 'FAILED'}"
            )
        kl = found.mean_kl_divergence
        click.echo(f"{'KL divergence, nats a token':<34}{kl:10.6f}  stated {facts.mean_kl_divergence:.6f}")
        click.echo(f"{'same most likely token':<34}{found.top1_agreement:10.2%}  stated {facts.top1_agreement:.2%}")
    return [
        f"{check.name} {check.measured:.4g}, not {check.stated:.4g} ± {check.tolerance:.2g}"
        for check in made
        if not check.passed
    ]
