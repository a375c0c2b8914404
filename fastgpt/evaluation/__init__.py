"""Evaluation of models: perplexity, log-likelihoods and tasks."""

from typing import TYPE_CHECKING

from fastgpt.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastgpt.evaluation.log_likelihood import Scores as Scores
    from fastgpt.evaluation.log_likelihood import perplexity as perplexity
    from fastgpt.evaluation.texts import evaluate_text as evaluate_text

_HOMES = {
    "Scores": "log_likelihood",
    "perplexity": "log_likelihood",
    "evaluate_text": "texts",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
