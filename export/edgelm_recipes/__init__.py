"""Recipes: from the files of a public data set to a bundle that knows its job, with its score.

Needs ``pip install 'edgelm[cpu,train,evaluate]'``. A recipe is a module of `edgelm_recipes.tasks`, and
``edgelm recipe`` follows it.
"""

import edgelm_export as _  # noqa: F401  # sets environment variables that torch reads when it is first imported
