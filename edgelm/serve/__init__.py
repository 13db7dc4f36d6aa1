"""HTTP: a bundle's texts, scores and vectors in the shape of OpenAI's API. ``docs/serve.md`` is for its users."""
