"""`python -m fastgpt.lm_eval --model fastgpt --model_args pretrained=RUN --tasks ...`.

Runs EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) with
fastgpt models as an additional model type, ``--model fastgpt``. All arguments are those of the
harness. The harness has no plugin mechanism: a model must be registered in the process that runs
it, so this command registers the model and then runs the harness.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError


def main(args: Sequence[str]) -> None:
    """Run the harness's command line with these arguments."""
    if find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed: pip install lm-eval")
    from lm_eval.__main__ import cli_evaluate

    import fastgpt.evaluation.lm_eval_adapter  # noqa: F401  # registers the model

    sys.argv = ["python -m fastgpt.lm_eval", *args]  # the harness parses sys.argv
    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
