"""Training, on the build side: text becomes a model.

Needs ``pip install 'edgelm[cpu,train]'``. The result is a Hugging Face folder, which ``edgelm export`` takes as it is.
"""

import edgelm_export as _  # noqa: F401  # sets environment variables that torch reads when it is first imported
