"""All targets by name."""

from tests.fuzz.bundle_targets import GraphTarget, ManifestTarget, OnnxHeaderTarget, VerifyTarget
from tests.fuzz.harness import Target

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (ManifestTarget, OnnxHeaderTarget, GraphTarget, VerifyTarget)
}
