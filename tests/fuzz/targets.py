"""All targets by name."""

from tests.fuzz.bundle_targets import GraphTarget, ManifestTarget, OnnxHeaderTarget, VerifyTarget
from tests.fuzz.harness import Target
from tests.fuzz.packed_target import PackedTarget
from tests.fuzz.reuse_targets import PrefixTarget, StateTarget
from tests.fuzz.text_targets import GenerationSettingsTarget, TokenizerTarget

_BUNDLE = (ManifestTarget, OnnxHeaderTarget, GraphTarget, VerifyTarget, PackedTarget)
_OTHERS = (TokenizerTarget, GenerationSettingsTarget, StateTarget, PrefixTarget)
TARGETS: dict[str, type[Target]] = {target.name: target for target in (*_BUNDLE, *_OTHERS)}
