"""`python -m fastgpt.lm_eval --model fastgpt --model_args pretrained=RUN --tasks ...`.

EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), with
fastgpt's models as one more kind, ``--model fastgpt``. All arguments are the harness's own. It has
no way to learn of a model but that a program which knows one starts it, so that is what this does.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from fastgpt.utils import cli
from fastgpt.utils.errors import UsageError


def main(args: Sequence[str]) -> None:
    """Run the harness's command with these arguments."""
    if find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not there: pip install lm-eval")
    from lm_eval.__main__ import cli_evaluate

    import fastgpt.evaluation.lm_eval_adapter  # noqa: F401  # that makes it known

    sys.argv = ["python -m fastgpt.lm_eval", *args]  # where the harness looks for them
    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
