"""Runs edgelm on an emulated processor: `python -m benchmarks.emulated aarch64`, or `haswell`, or `nehalem`.

apt downloads QEMU's user mode emulator and a Python of Debian 13 into the folder build/emulated, without installing
them; pip puts the wheels of that system beside them. Nothing needs root, and the emulated Python sees this machine's
files. It shows whether edgelm computes the same, and nothing about speed. Needs apt, pip, and the keys of Debian 13
(package debian-archive-keyring); the Debian 12 emulator is too old, because it crashes in `import onnxruntime`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import ROOT

SUITE = "trixie"
PYTHON = "3.13"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR = "http://deb.debian.org/debian"
PROMPT = ("--greedy", "-n", "32", "Once upon a time")
BUNDLES = (None, "tests/data/tiny-gpt2")
"""None is the embedded model."""


@dataclass(frozen=True)
class Machine:
    """An emulated machine."""

    emulator: str
    debian: str
    """Debian's name of its architecture."""
    libraries: str
    """Debian's name of the folder of its libraries."""
    wheels: str
    """What its wheels end with."""
    cpu: str | None = None
    """The processor, in QEMU's words."""


MACHINES = {
    "aarch64": Machine("qemu-aarch64", "arm64", "aarch64-linux-gnu", "aarch64"),
    "haswell": Machine("qemu-x86_64", "amd64", "x86_64-linux-gnu", "x86_64", "Haswell"),  # AVX2, no AVX-512, no VNNI
    "nehalem": Machine("qemu-x86_64", "amd64", "x86_64-linux-gnu", "x86_64", "Nehalem"),  # SSE 4.2, no AVX
}


def main() -> None:
    """Build the machine, then run and verify bundles on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=MACHINES)
    parser.add_argument("bundles", nargs="*", help="instead of the embedded and the committed ones")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "emulated", help="where to build")
    chosen = parser.parse_args()
    machine = MACHINES[chosen.machine]
    emulated = build(machine, chosen.folder.absolute())
    about = "import sys, platform, numpy, onnxruntime; print(platform.machine(), sys.version.split()[0], end=' ')"
    about += "; print('numpy', numpy.__version__, 'onnxruntime', onnxruntime.__version__)"
    print(run([*emulated, "-c", about]).stdout, end="")
    failed = False
    for bundle in chosen.bundles or BUNDLES:
        failed |= not compare(emulated, bundle)
    sys.exit(failed)


def build(machine: Machine, folder: Path) -> list[str]:
    """The command that starts the emulated Python, built in `folder` where it is not there yet."""
    host = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()
    qemu = unpacked(folder / f"qemu-{host}", host, "qemu-user")
    system = unpacked(folder / f"system-{machine.debian}", machine.debian, "python3", "libstdc++6")
    link = system / "lib"  # these packages leave it to the package base-files
    if not link.is_symlink():
        link.symlink_to("usr/lib")
        if machine.debian == "amd64":
            (system / "lib64").symlink_to("usr/lib64")
    site = folder / f"site-{machine.debian}"
    if not site.is_dir():
        glibcs = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
        platforms = [word for glibc in glibcs for word in ("--platform", f"{glibc}_{machine.wheels}")]
        wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "wheels"), str(ROOT)]
        run(wheel)
        edgelm = max((folder / "wheels").glob("edgelm-*.whl"))
        install = ["install", "-q", "--target", str(site), "--only-binary=:all:", "--python-version", PYTHON]
        run([sys.executable, "-m", "pip", *install, *platforms, f"{edgelm}[cpu]"])
    cpu = [] if machine.cpu is None else ["-cpu", machine.cpu]
    emulator = [str(qemu / "usr" / "bin" / machine.emulator), *cpu, "-L", str(system), "-E", f"PYTHONPATH={site}"]
    return [*emulator, str(system / "usr" / "bin" / f"python{PYTHON}")]


def unpacked(folder: Path, architecture: str, *packages: str) -> Path:
    """The content of Debian packages and of all that they depend on, in `folder`."""
    if not folder.is_dir():
        apt = folder.with_name(f"apt-{architecture}")
        for name in ("etc", "state/lists/partial", "cache/archives/partial"):
            (apt / name).mkdir(parents=True, exist_ok=True)
        (apt / "state" / "status").touch()  # nothing is installed there, so every dependency is downloaded
        source = f"deb [signed-by={KEYS}] {MIRROR} {SUITE} main\n"
        (apt / "etc" / "sources.list").write_text(source, encoding="utf-8")
        options = {
            "Dir::Etc::sourcelist": apt / "etc" / "sources.list", "Dir::Etc::sourceparts": "-",
            "Dir::State": apt / "state", "Dir::State::status": apt / "state" / "status", "Dir::Cache": apt / "cache",
            "APT::Architecture": architecture, "APT::Architectures": architecture,
            "APT::Install-Recommends": "false", "Acquire::Languages": "none",
        }  # fmt: skip
        get = ["apt-get", "-q", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        run([*get, "update"])
        for archive in (apt / "cache" / "archives").glob("*.deb"):
            archive.unlink()
        run([*get, "install", "-y", "--download-only", *packages])
        draft = folder.with_name(f"{folder.name}-draft")
        for archive in sorted((apt / "cache" / "archives").glob("*.deb")):
            run(["dpkg", "-x", str(archive), str(draft)])
        draft.rename(folder)
    return folder


def compare(emulated: list[str], bundle: str | None) -> bool:
    """Whether a bundle verifies on the emulated machine, and what it writes there and here."""
    named = [] if bundle is None else ["-m", str(Path(bundle).absolute())]
    here = run([sys.executable, "-m", "edgelm", "run", *named, *PROMPT], cwd=ROOT, check=False)
    began = time.monotonic()
    there = run([*emulated, "-m", "edgelm", "run", *named, *PROMPT], check=False)
    if there.returncode:
        print(f"{bundle or 'embedded'}: status {there.returncode}: {there.stderr.strip()[-600:]}")
        return False
    verified = run([*emulated, "-m", "edgelm", "verify", *named, "--json"], check=False)
    same = "the same text as here" if there.stdout == here.stdout else "another text than here"
    print(f"{bundle or 'embedded'}: {same}; verify ends with {verified.returncode}; {time.monotonic() - began:.0f} s")
    if not verified.stdout:
        print(f"  {verified.stderr.strip()[-600:]}")
        return False
    measured = json.loads(verified.stdout)["measured"]
    print(f"  mean KL divergence {measured['mean_kl_divergence']:.5f} nats, top-1 {measured['top1_agreement']:.2%}")
    for check in measured["checks"]:
        values = f"{check['measured']:.5g}, stated {check['stated']:.5g}, tolerance {check['tolerance']:.2g}"
        print(f"  {'passed' if check['passed'] else 'FAILED'}: {check['name']} {values}")
    return verified.returncode == 0


def run(command: list[str], cwd: Path | None = None, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command without this clone on Python's path; one that fails ends the program, unless `check` is false."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if cwd is not None:
        variables["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(command, cwd=cwd or Path("/"), env=variables, capture_output=True, text=True)
    if check and done.returncode:
        sys.exit(f"{' '.join(command[:3])} ... failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done


if __name__ == "__main__":
    main()
