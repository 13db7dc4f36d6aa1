"""From text to a model: training on the build side.

Needs ``pip install 'edgelm[cpu,train]'``. The result is a Hugging Face folder that ``edgelm export`` takes as it is.
"""

import edgelm_export as _  # noqa: F401  # its environment settings must come before the first import of torch
