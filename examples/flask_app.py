"""Text over HTTP with Flask: one model for all of the server's threads.

pip install flask gunicorn
gunicorn --threads 4 flask_app:app        # no --preload: each worker loads its own model
curl localhost:8000/generate --json '{"prompt": "Once upon a time", "max_new_tokens": 40}'
"""

import os

from flask import Flask, Response, request, stream_with_context

import edgelm

app = Flask(__name__)
model = edgelm.load(os.environ.get("EDGELM_MODEL"))
LIMITS = {"max_new_tokens": 40, "max_time": 20.0}
ALLOWED = {"max_new_tokens", "temperature", "top_p", "seed", "stop_strings"}


def requested() -> tuple[str, dict[str, object]]:
    """The prompt and the options of a request: allowed names only, and always with limits."""
    body = request.get_json()
    return body.get("prompt", ""), LIMITS | {name: value for name, value in body.items() if name in ALLOWED}


@app.post("/generate")
def generate() -> dict[str, object]:
    prompt, options = requested()
    choice = model.generate(prompt, **options).choices[0]
    return {"text": choice.text, "finish_reason": choice.finish_reason}


@app.post("/stream")
def stream() -> Response:
    prompt, options = requested()
    chunks = model.stream(prompt, **options)  # a client that goes away closes this, and the computation ends
    return Response(stream_with_context(chunk.text for chunk in chunks), mimetype="text/plain")


@app.errorhandler(ValueError)  # the base class of PromptError, ContextError and ConfigError
def refused(error: ValueError) -> tuple[dict[str, str], int]:
    return {"error": str(error)}, 400
