"""The build side of edgelm: a checkpoint becomes a verified bundle.

Needs ``pip install 'edgelm[cpu,export]'``. It imports edgelm; edgelm never imports it.
"""

import os

# Read by onnxruntime, which optimum imports before edgelm has a chance to: its wheels report usage by default.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Read by torch's OpenMP at import: threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
