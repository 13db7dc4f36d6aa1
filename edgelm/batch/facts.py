"""What a result is as an object of JSON: the same on standard output and in a file of rows."""

from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands import this module before they know whether they need numpy
    from edgelm.generation.results import Choice
    from edgelm.generation.task_format import TaskResult
    from edgelm.scoring.results import Perplexity, Selection
    from edgelm.scoring.token_scores import Vector

Facts = dict[str, object]


def text_facts(choice: "Choice", text: str | None = None) -> Facts:
    """A continuation; `text` replaces its own text."""
    facts: Facts = {"text": choice.text if text is None else text, "finish_reason": choice.finish_reason}
    if choice.logprobs is None:
        return facts
    end = None if choice.end_logprobs is None else asdict(choice.end_logprobs)
    return {**facts, "logprobs": [asdict(token) for token in choice.logprobs], "end_logprobs": end}


def task_facts(result: "TaskResult", *, whole: bool) -> Facts:
    """What a task made of an input; with `whole` the probabilities of all labels too."""
    from edgelm.generation.task_format import TaskLabel, TaskText

    if isinstance(result, TaskLabel):
        facts: Facts = {"label": result.label, "probability": result.probability}
        return {**facts, "probabilities": result.probabilities} if whole else facts
    if isinstance(result, TaskText):
        return text_facts(result.completion.choices[0], result.text)
    if result.similarity is not None:
        return {"similarity": result.similarity}
    return embedding_facts(result.vector)


def choice_facts(selection: "Selection") -> Facts:
    """The likeliest of several texts, and all of them."""
    options = [asdict(option) for option in selection.options]
    return {"best": selection.best.text, "index": selection.index, "options": options}


def perplexity_facts(result: "Perplexity") -> Facts:
    """A perplexity, and over how many tokens."""
    return {"perplexity": result.value, "tokens": result.tokens}


def embedding_facts(vector: "Vector") -> Facts:
    """A text's vector."""
    return {"embedding": rounded(vector)}


def rounded(vector: "Vector") -> list[float]:
    """The numbers of a vector in nine digits, which tell every float32 apart."""
    return [float(f"{value:.9g}") for value in vector.tolist()]
