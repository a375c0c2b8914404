"""Training: recipes, the trainer, optimizer, processes, memory and logs."""

from fastgpt.utils.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {}, ("optimizer", "recipes", "trainer"))
