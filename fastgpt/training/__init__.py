"""Training: recipes, trainer, optimizer, distributed processes, memory estimate and logging."""

from fastgpt.utils.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {}, ("optimizer", "recipes", "trainer"))
