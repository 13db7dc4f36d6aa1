"""From text to a model: training on the build side.

Needs ``pip install 'edgelm[cpu,train]'``. The result is a Hugging Face folder that ``edgelm export`` takes as it is.
"""
