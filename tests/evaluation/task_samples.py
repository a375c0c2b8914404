"""Synthetic questions in the published formats, and a model trained on some of them."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer

PEOPLE = ["A man", "A woman", "The boy", "Two girls", "The chef", "An old sailor", "She", "He"]
DEEDS = ["washes the car", "cuts the bread", "climbs the wall", "mends the net", "plays a drum"]
ENDS = ["and then goes home.", "until it is clean.", "[step] with a red rope  .", "très vite.", "!"]


def hellaswag_items(n: int = 40) -> list[dict[str, object]]:
    """Return questions with difficult input: brackets, titles, double spaces and empty ctx_b."""
    items = []
    for i in range(n):
        person, deed = PEOPLE[i % len(PEOPLE)], DEEDS[i % len(DEEDS)]
        first = [f"{person} {deed}.", f"[header] How one {deed} [title] Prepare.  Begin."][i % 2]
        second = ["", f"{PEOPLE[(3 * i) % len(PEOPLE)].lower()} and the dog"][(i // 2) % 2]
        endings = [f"{DEEDS[(i + j) % len(DEEDS)]} {ENDS[(i + 2 * j) % 5]}" for j in range(4)]
        items.append(
            {
                "ind": i,
                "activity_label": ["Washing", "Home and Garden"][i % 2],
                "ctx_a": first,
                "ctx_b": second,
                "ctx": f"{first} {second}",
                "split": "val",
                "split_type": "indomain",
                "label": (7 * i) % 4,
                "endings": endings,
                "source_id": f"made~{i}",
            }
        )
    return items


def lambada_items(n: int = 40) -> list[dict[str, str]]:
    """Return passages whose last word a model trained on the others can sometimes predict."""
    return [
        {
            "text": f'{PEOPLE[i % 8]} {DEEDS[i % 5]} and says: "I {DEEDS[i % 5]}".\nSo it was '
            f"{PEOPLE[i % 8]} who {DEEDS[(i + i // 13) % 5]}"
        }
        for i in range(n)
    ]


def write_lines(path: Path, items: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def taught_model(block_size: int = 64) -> tuple[GPT, Tokenizer]:
    """Return a tiny model trained briefly on the passages, so that its answers vary."""
    torch.manual_seed(0)
    texts = [item["text"] for item in lambada_items()]
    tokenizer = Tokenizer.train(texts, 330)
    config = GPTConfig(tokenizer.vocab_size, block_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config)
    ids = torch.tensor(tokenizer.encode("".join(texts)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        start = (step * 37) % (len(ids) - 8 * 33)
        rows = ids[start : start + 8 * 33].view(8, 33)
        model(rows[:, :-1], rows[:, 1:].contiguous()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer
