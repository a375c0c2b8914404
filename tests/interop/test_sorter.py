"""A model trained by minGPT to sort sequences sorts them."""

from pathlib import Path

import torch

from fastgpt import GPT

NANO = Path(__file__).parents[1] / "assets" / "gpt-nano-sort"


def test_it_sorts_every_one_of_a_thousand_inputs() -> None:
    """Six digits of three kinds give 729 inputs: all of them are tested, some twice."""
    digits = torch.cartesian_prod(*[torch.arange(3)] * 6)
    unsorted = torch.cat([digits, torch.randint(3, (1000 - len(digits), 6))])
    written = GPT.from_pretrained(NANO).generate(unsorted, 6, temperature=0)[:, 6:]
    assert torch.equal(written, unsorted.sort(-1).values)
