"""lm-evaluation-harness with a fastgpt model, compared to fastgpt's tasks and to Hugging Face."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fastgpt import lm_eval
from fastgpt.evaluation import hellaswag, lambada
from fastgpt.evaluation.log_likelihood import log_likelihoods
from fastgpt.evaluation.tasks import evaluate_task
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer
from fastgpt.utils import cli
from tests.evaluation.task_samples import hellaswag_items, lambada_items, taught_model, write_lines

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}{{text}}{{text}}",  # longer than the model's context
    "metric_list": [{"metric": "bits_per_byte"}],
}
WRITING = {
    "output_type": "generate_until",
    "doc_to_text": "{{text[:20]}}",
    "doc_to_target": "{{text[20:]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}


def test_without_the_harness_it_says_how_to_get_it(monkeypatch, capfd) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as info:
        cli.run(lm_eval.main, ["--help"])
    assert info.value.code == 2
    assert "pip install lm-eval" in capfd.readouterr().err


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, GPT, Tokenizer]]:
    """Return a folder with a model, questions and offline harness tasks for them."""
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "cache"))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        model, tokenizer = taught_model()
        model.save_pretrained(folder / "hf", tokenizer)
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        path = folder / "hf" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | special))
        write_lines(folder / "hellaswag.jsonl", hellaswag_items())
        write_lines(folder / "lambada.jsonl", lambada_items())
        write_tasks(folder)
        yield folder, model, tokenizer


def write_tasks(folder: Path) -> None:
    """Write harness tasks that read local files, and two tasks for the other request types."""
    from lm_eval import tasks

    theirs = Path(tasks.__file__).parent
    (folder / "tasks").mkdir()
    own = {
        "hellaswag": {"include": str(theirs / "hellaswag" / "hellaswag.yaml")},
        "lambada": {"include": str(theirs / "lambada" / "lambada_openai.yaml")},
        "rolling": ROLLING,
        "writing": WRITING,
    }
    for name, settings in own.items():
        questions = folder / ("hellaswag.jsonl" if name == "hellaswag" else "lambada.jsonl")
        split = "validation" if name == "hellaswag" else "test"
        task = {
            **settings,
            "task": f"our_{name}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(questions)}},
            "training_split": None,
            f"{split}_split": split,
        }
        text = json.dumps(task)  # JSON is valid YAML
        (folder / "tasks" / f"{name}.yaml").write_text(text)


def ask_harness(folder: Path, kind: str, **args: Any) -> dict[str, Any]:
    """Return the harness's metrics by task, and the model's answers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import fastgpt.evaluation.lm_eval_adapter  # noqa: F401

    done = simple_evaluate(
        model=kind,
        model_args={"pretrained": str(folder / "hf"), "dtype": "float32", **args},
        tasks=[f"our_{name}" for name in ("hellaswag", "lambada", "rolling", "writing")],
        task_manager=TaskManager(include_path=str(folder / "tasks")),
        device="cpu",
        bootstrap_iters=0,
    )
    samples = {name: [s["resps"] for s in rows] for name, rows in done["samples"].items()}
    return {"figures": done["results"], "answers": samples}


@pytest.mark.slow
@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_harness_finds_the_same_with_our_model_as_we_do(
    taught: tuple[Path, GPT, Tokenizer],
) -> None:
    folder, model, tokenizer = taught
    found = ask_harness(folder, "fastgpt", batch_size=3)
    for name, module in {"hellaswag": hellaswag, "lambada": lambada}.items():
        ours = evaluate_task(name, module.read(folder / f"{name}.jsonl"), model, tokenizer)
        theirs = found["figures"][f"our_{name}"]
        for figure, value in ours.items():
            if not figure.endswith("_stderr"):
                assert_close(theirs[f"{figure},none"], value, rtol=1e-6, atol=0)
    texts = [3 * item["text"] for item in lambada_items()]
    for text, (answer,) in zip(texts, found["answers"]["our_rolling"], strict=True):
        assert_close(answer[0], rolling(model, tokenizer, text), rtol=1e-5, atol=0)


def rolling(model: GPT, tokenizer: Tokenizer, text: str) -> float:
    """Return ln p of a text in disjoint windows, each with as much context as possible."""
    size, ids = model.config.block_size, tokenizer.encode(text)
    assert len(ids) > size
    row = [tokenizer.start_token, *ids]  # ids[i] is row[i + 1]
    total = 0.0
    for first in range(0, len(ids), size):
        stop = min(first + size, len(ids))
        before = row[max(0, stop - size) : first + 1]
        total += log_likelihoods(model, [(before, ids[first:stop])])[0].total
    return total


@pytest.mark.slow
@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_harness_finds_the_same_with_the_same_weights_in_transformers(
    taught: tuple[Path, GPT, Tokenizer],
) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    folder = taught[0]
    ours, theirs = ask_harness(folder, "fastgpt"), ask_harness(folder, "hf")
    assert ours["answers"]["our_writing"] == theirs["answers"]["our_writing"]
    for name in ("our_hellaswag", "our_lambada"):
        for our, their in zip(ours["answers"][name], theirs["answers"][name], strict=True):
            for ((total, greedy),), ((their_total, their_greedy),) in zip(our, their, strict=True):
                assert_close(total, their_total, rtol=1e-5, atol=1e-5)
                assert greedy == their_greedy
    for our, their in zip(
        ours["answers"]["our_rolling"], theirs["answers"]["our_rolling"], strict=True
    ):
        assert_close(our[0][0], their[0][0], rtol=1e-5, atol=0)
    for name, figures in ours["figures"].items():
        for figure, value in figures.items():
            if isinstance(value, float):
                assert_close(theirs["figures"][name][figure], value, rtol=1e-5, atol=0)


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_models_are_still_known() -> None:
    from lm_eval.api.registry import get_model

    from fastgpt.evaluation.lm_eval_adapter import FastGPT

    assert get_model("fastgpt") is FastGPT
    assert get_model("dummy").__name__ == "DummyLM"


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_default_device_of_the_harness_works_without_a_gpu(
    taught: tuple[Path, GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgpt.evaluation.lm_eval_adapter import FastGPT

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = FastGPT(str(taught[0] / "hf"), device="cuda:0")
    assert model.device.type in ("cpu", "mps")


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_settings_of_the_harness() -> None:
    from fastgpt.evaluation.lm_eval_adapter import _parse_settings

    assert _parse_settings({}) == ([], 256, {"temperature": 0.0})
    settings = {"until": ".", "max_gen_toks": 5, "temperature": 0.7, "do_sample": False}
    assert _parse_settings(settings) == (["."], 5, {"temperature": 0.0})
    assert _parse_settings({"until": ["\n\n", ""]})[0] == ["\n\n"]
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert _parse_settings(drawn)[2] == {"temperature": 0.7, "top_k": None, "top_p": 0.9}
