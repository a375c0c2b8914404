"""The command-line interface: its output and its error messages."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import fastgpt
from fastgpt import GPT, CharTokenizer, GPTConfig, generate, train
from fastgpt import __main__ as fastgpt_main
from fastgpt.inference.engine import Engine
from fastgpt.inference.text import generate_texts
from fastgpt.utils import cli

SMALL = [
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"),
    *("--batch-size", "4", "--max-steps", "4", "--warmup-steps", "1", "--eval-interval", "2"),
    *("--sample-tokens", "20", "--device", "cpu"),
]


def run(command, *args: str) -> int:
    """Run a command in this process; return its exit code."""
    with pytest.raises(SystemExit) as info:
        cli.run(command, args)
    return int(info.value.code or 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert run(train.main, *SMALL, "--out", str(folder), "--eval-tokens", "500") == 0
    return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_then_generate_as_printed(workplace: Path, capfd) -> None:
    assert run(train.main, *SMALL, "--eval-tokens", "500") == 0
    out = capfd.readouterr().out
    assert "validation loss" in out
    next_command = out.strip().splitlines()[-1]
    assert next_command.startswith("generate more:  python -m fastgpt.generate runs/shakespeare-")
    folder = next_command.split()[-1]
    assert run(generate.main, folder, "--max-new-tokens", "7", "--seed", "1") == 0
    first = capfd.readouterr().out
    assert run(generate.main, "runs/latest", "--max-new-tokens", "7", "--seed", "1") == 0
    assert capfd.readouterr().out == first
    assert len(first) == 8


def test_kernels_for_a_gpu_are_refused_without_one(workplace: Path, capfd, monkeypatch) -> None:
    common = pytest.importorskip("fastgpt.kernels.common")
    monkeypatch.setattr(common, "INTERPRETED", False)
    assert run(train.main, *SMALL, "--ops", "triton") == 2
    error = capfd.readouterr().err
    assert "run on CUDA, not on cpu; use a CUDA device, PyTorch's own operators (ops=" in error
    assert not list(workplace.glob("runs/*"))


def test_a_prompt_is_continued(trained: Path, capfd) -> None:
    options = ["--prompt", "ROMEO:", "--max-new-tokens", "10", "--top-k", "5", "--top-p", "0.9"]
    assert run(generate.main, str(trained), *options) == 0
    out = capfd.readouterr().out
    assert out.startswith("ROMEO:")
    assert len(out) == 6 + 10 + 1


def test_prompts_from_a_file_as_lines_of_json(trained: Path, workplace: Path, capfd) -> None:
    (workplace / "prompts.txt").write_bytes(b"JULIET:\r\nNight\n")
    batch = ["--prompt", "ROMEO:", "Day", "--prompts", "prompts.txt", "--n", "2", "--seed", "7"]
    short = ["--max-new-tokens", "12", "--stop", "e", "--batch-size", "3"]
    assert run(generate.main, str(trained), *batch, *short, "--json") == 0
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    prompts = ["ROMEO:", "Day", "JULIET:", "Night"]
    assert [line["prompt"] for line in lines] == [name for name in prompts for _ in range(2)]
    for row, line in enumerate(lines):
        assert "e" not in line["text"]
        assert line["logprob"] < 0 < line["tokens"] <= 12
        assert (
            run(
                generate.main,
                str(trained),
                "--prompt",
                line["prompt"],
                *short,
                "--seed",
                str(7 + row),
            )
            == 0
        )
        assert capfd.readouterr().out == line["prompt"] + line["text"] + "\n"
    total = sum(line["tokens"] for line in lines)
    assert err.startswith(f"{total} tokens, ")


def test_several_texts_of_a_prompt_are_labelled(trained: Path, capfd) -> None:
    options = [*("--n", "2", "--seed", "7", "--max-new-tokens", "9", "--batch-size", "1")]
    texts = []
    for prompts in (["ROMEO:"], ["ROMEO:", "Day"]):
        command = [str(trained), "--prompt", *prompts, *options]
        assert run(generate.main, *command, "--json") == 0
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        texts.append([line["prompt"] + line["text"] for line in lines])
        assert run(generate.main, *command) == 0
        out = capfd.readouterr().out
        labels = [
            (f"prompt {prompt} of 2, " if len(prompts) == 2 else "") + f"sample {sample} of 2"
            for prompt in range(1, len(prompts) + 1)
            for sample in (1, 2)
        ]
        expected = zip(labels, texts[-1], strict=True)
        assert out == "".join(f"=== {label} ===\n{text}\n\n" for label, text in expected)
    assert texts[1][:2] == texts[0]


@pytest.fixture(scope="module")
def accents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of characters most of which are neither in ASCII nor in cp1252."""
    folder = tmp_path_factory.mktemp("accents") / "model"
    GPT(GPTConfig(6, 16, 1, 1, 16)).save_pretrained(folder, CharTokenizer("aé嚷🙂?\n"))
    (folder / "prompts.txt").write_text("é嚷", encoding="utf-8")
    return folder


HAS = {"cp1252": "aé?\n", "ascii": "a?\n"}  # the model's characters in these encodings
TEXT_ENCODINGS = {  # the environment, and the encoding of the text that is printed to a pipe
    "utf-8": ({"PYTHONUTF8": "1"}, "utf-8"),
    "c locale": ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "utf-8"),
    "cp1252": ({"PYTHONIOENCODING": "cp1252"}, "cp1252"),
    "ascii": ({"PYTHONIOENCODING": "ascii"}, "ascii"),
    "utf-16": ({"PYTHONIOENCODING": "utf-16"}, "utf-16"),
}


@pytest.mark.parametrize("name", TEXT_ENCODINGS)
def test_no_character_is_lost_in_an_encoding_without_notice(accents: Path, name: str) -> None:
    environment, encoding = TEXT_ENCODINGS[name]

    def generated(*options: str) -> tuple[str, str]:
        prompts = ["--prompts", str(accents / "prompts.txt"), "--n", "2"]
        command = [sys.executable, "-m", "fastgpt.generate", str(accents), *prompts]
        options = (*options, "--seed", "1", "--max-new-tokens", "40")
        unset = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")
        kept = {key: value for key, value in os.environ.items() if key not in unset}
        done = subprocess.run(
            [*command, *options], capture_output=True, env=kept | environment, check=True
        )
        return done.stdout.decode(encoding), done.stderr.decode("ascii")

    engine, tokenizer = Engine.from_pretrained(accents)
    (found,) = generate_texts(engine, tokenizer, ["é嚷"], 40, n=2, seed=1, temperature=0.8)
    texts = [text.prompt + text.text for text in found]
    printed, error = generated("--json")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == texts
    assert "warning" not in error
    printed, error = generated()
    for text in texts:
        assert text.encode(encoding, "replace").decode(encoding) in printed
    n_lost = sum(c not in HAS.get(encoding, c) for text in texts for c in text)
    warning = f"warning: {n_lost} characters are printed as ?, because standard output is in"
    assert (warning in error) == (n_lost > 0)


def test_both_engines_write_the_same_and_small_weights_write(trained: Path, capfd) -> None:
    texts = []
    for engine in (["--engine", "native", "--threads", "1"], ["--engine", "torch"], []):
        assert (
            run(generate.main, str(trained), *engine, "--seed", "5", "--max-new-tokens", "60") == 0
        )
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    for dtype in ("bfloat16", "int8", "int4"):
        assert run(generate.main, str(trained), "--dtype", dtype, "--max-new-tokens", "9") == 0
        assert len(capfd.readouterr().out) == 10
    assert run(generate.main, str(trained), "--dtype", "int8", "--engine", "torch") == 2
    assert "dtype int8 requires --engine native" in capfd.readouterr().err
    assert run(generate.main, str(trained), "--threads", "-1") == 2
    assert "threads must be" in capfd.readouterr().err


def test_prompts_from_standard_input(trained: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"A\nB\n")))
    assert run(generate.main, str(trained), "--prompts", "-", "--max-new-tokens", "3") == 0
    out = capfd.readouterr().out  # generated text may contain blank lines too
    assert out.startswith("A")
    assert "\n\nB" in out


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_a_plain_text_file_just_works(verse: Path, workplace: Path, tokenizer: str, capfd) -> None:
    data = ["--data", str(verse), "--tokenizer", tokenizer]
    assert run(train.main, "shakespeare-char", *data, *SMALL) == 0
    assert run(generate.main, "runs/latest", "--prompt", "First", "--max-new-tokens", "5") == 0
    assert "First" in capfd.readouterr().out


def test_a_run_on_my_text_is_named_after_it(verse: Path, workplace: Path, capfd) -> None:
    assert run(train.main, "--data", str(verse), "--tokenizer", "gpt2", *SMALL) == 0
    folder = (workplace / "runs" / "latest").resolve()
    assert folder.name.startswith("verse-2")
    recipe = json.loads((folder / "config.json").read_text())["recipe"]
    small = fastgpt.RECIPES["small"]
    assert (recipe["dropout"], recipe["lr"]) == (small.dropout, small.lr)
    assert (recipe["tokenizer"], recipe["n_layer"]) == ("gpt2", 1)  # as given


def test_warnings_are_one_line(checkout: Path) -> None:
    """In a process of its own: pytest records warnings before they are printed."""
    code = """
import warnings
from fastgpt.utils import cli
def command(args):
    warnings.warn("the text is short")
    warnings.warn("old", FutureWarning)
cli.run(command)
"""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    arguments = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True)
    first, second = done.stderr.splitlines()
    assert first == "warning: the text is short"
    assert second.endswith("FutureWarning: old")


def test_values_of_options_are_not_taken_for_options() -> None:
    args = ["--data=seed", "--out", "block_size", "--val_data", "lr", "--max-steps=3", "--no-bias"]
    given = train._given(fastgpt.RECIPES["finetune"], args)
    assert set(given) == {"data", "out", "val_data", "max_steps", "bias"}


@pytest.mark.parametrize(
    ("args", "name", "recipe"),
    [
        ([], "shakespeare-char", "shakespeare-char"),
        (["--data", "shakespeare"], "shakespeare-char", "shakespeare-char"),
        (["--data", "my.txt"], "my", "small"),
        (["--data", "my.txt", "--init", "mine"], "my", "finetune"),
        (["--lr", "1e-3", "--data=data/C4 (en).json.gz"], "C4-en", "small"),
        (["--data", "data/my/"], "my", "small"),
        (["--data", "Текст.txt"], "Текст", "small"),
        (["--data", "-"], "run", "small"),
        (["--data", ".hidden"], "run", "small"),
        (["gpt2", "--data", "my.txt"], "gpt2", "gpt2"),
    ],
)
def test_the_names_of_runs(args: list[str], name: str, recipe: str, monkeypatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(train, "_fit", seen.update)
    train.main([*args, "--seed", "7"])
    expected = fastgpt.RECIPES[recipe]
    if "--lr" in args:
        expected = replace(expected, lr=1e-3)
    if "--init" in args:
        expected = replace(expected, init="mine")
    assert seen["name"] == name
    assert seen["recipe"] == replace(expected, data=seen["recipe"].data, seed=7)


def test_resume_with_a_change(verse: Path, workplace: Path, capfd) -> None:
    assert run(train.main, "--data", str(verse), *SMALL, "--out", "mine") == 0
    assert run(train.main, "--resume", "mine", "--max-steps", "6") == 0
    assert "step      6/6" in capfd.readouterr().out
    assert run(train.main, "--resume=mine", "--n-layer", "2") == 2
    assert "cannot resume with changes: n_layer 1 → 2" in capfd.readouterr().err


def test_max_steps_is_the_length_of_a_recipe_of_epochs_too(
    verse: Path, workplace: Path, capfd
) -> None:
    small = ["--vocab-size", "300", *SMALL, "--val-fraction", "0.1"]
    assert run(train.main, "tinystories", "--data", str(verse), *small, "--out", "x") == 0
    recipe = json.loads((workplace / "x" / "config.json").read_text())["recipe"]
    assert (recipe["max_steps"], recipe["epochs"]) == (4, None)


def wrong_uses() -> dict[str, tuple[object, list[str], str]]:
    return {
        "unknown recipe": (train.main, ["shakspeare-char"], "did you mean shakespeare-char"),
        "unknown recipe, nothing near": (
            train.main,
            ["zzz"],
            "available: shakespeare-char, small, tinystories",
        ),
        "missing data": (train.main, ["--data", "no.txt"], "no.txt does not exist"),
        "no data": (train.main, ["gpt2"], "add --data my.txt"),
        "short text": (train.main, ["--data", "short.txt"], "9 tokens, but block_size="),
        "n_embd": (train.main, ["--n-embd", "30"], "n_embd must be a multiple of n_head, but 30"),
        "batch": (train.main, ["--batch-size", "0"], "batch_size must be at least 1, not 0"),
        "resume of nothing": (train.main, ["--resume", "none"], "none does not exist"),
        "resume without a folder": (train.main, ["--resume"], "--resume needs the run folder"),
        "no runs yet": (generate.main, ["runs/latest"], "no runs in runs/ yet"),
        "not a run": (generate.main, ["."], ". has no supported format; give a run folder"),
        "no prompts": (generate.main, ["x", "--prompts", "none.txt"], "none.txt cannot be read"),
        "two lengths": (
            train.main,
            ["--max-steps", "3", "--epochs=1"],
            "give --max-steps or --epochs",
        ),
        "an empty batch": (
            generate.main,
            ["x", "--batch-size", "0"],
            "batch_size must be at least",
        ),
        "no run": (generate.main, ["none"], "none is not a local file or folder"),
        "unknown command": (fastgpt_main.dispatch, ["trian"], "choose one of train, prepare"),
    }


@pytest.mark.parametrize("name", wrong_uses())
def test_wrong_use_is_one_line_and_exit_code_2(name: str, workplace: Path, capfd) -> None:
    (workplace / "short.txt").write_text("short text")
    command, args, message = wrong_uses()[name]
    assert run(command, *args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "café"], "character 'é' (U+00E9) at position 3"),
        (["--temperature", "-1"], "temperature must be 0 or more, not -1.0"),
        (["--top-p", "0"], "top_p must be in (0, 1], not 0.0"),
        (["--max-new-tokens", "-5"], "max_new_tokens must be at least 0, not -5"),
        (["--device", "warp"], "device 'warp' cannot be used"),
    ],
)
def test_wrong_use_of_a_good_run(trained: Path, options: list[str], message: str, capfd) -> None:
    """Invalid options of a usable run end with a one-line error."""
    assert run(generate.main, str(trained), *options) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_skip_unknown_drops_unknown_characters_of_the_prompt(trained: Path, capfd) -> None:
    options = ["--prompt", "café", "--skip-unknown", "--max-new-tokens", "3"]
    assert run(generate.main, str(trained), *options) == 0
    out = capfd.readouterr().out
    assert out.startswith("caf")
    assert "é" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "torch", "--threads", "2"], "threads is for --engine native"),
        (["--threads", "5000"], "threads must be from 1 to 1024, not 5000"),
        (["--repetition-penalty", "1e39"], "repetition_penalty must be from 1e-9 to 1e9"),
    ],
)
def test_settings_that_cannot_be_kept(
    trained: Path, capfd, options: list[str], message: str
) -> None:
    assert run(generate.main, str(trained), *options) == 2
    assert message in capfd.readouterr().err


def test_a_checkpoint_with_missing_files(trained: Path, tmp_path: Path, capfd) -> None:
    broken = shutil.copytree(trained, tmp_path / "broken")
    for file in broken.glob("checkpoints/*/model.safetensors"):
        file.unlink()
    assert run(generate.main, str(broken)) == 2
    err = capfd.readouterr().err
    assert "no usable checkpoint" in err
    assert "model.safetensors is missing" in err


def test_an_empty_prompt_is_accepted(trained: Path, capfd) -> None:
    assert run(generate.main, str(trained), "--max-new-tokens", "0") == 0
    assert capfd.readouterr().out == "\n"


def test_the_list_of_commands(capfd) -> None:
    assert run(fastgpt_main.dispatch) == 0
    out = capfd.readouterr().out
    for command in ("train", "prepare", "generate"):
        assert command in out


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_recipe_and_setting(option: str, capfd) -> None:
    assert run(train.main, option) == 0
    out = capfd.readouterr().out
    for word in ("shakespeare-char", "gpt2-xl", "--n-embd", "--resume", "--weight-decay"):
        assert word in out


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, checkout: Path) -> None:
    """Also for SIGTERM, with exit code 143."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        folder = tmp_path / str(code)
        args = [*SMALL, "--max-steps", "1000000", "--eval-interval", "50", "--eval-tokens", "500"]
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt.train", *args, "--out", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(train.__file__).parents[1]),
            },
        )
        deadline = time.monotonic() + 60
        while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert err == ""
        assert f"saved; resume with: python -m fastgpt.train --resume {folder}" in out
        assert len(list(folder.glob("checkpoints/step-*"))) >= 1
        assert not list(folder.glob("checkpoints/.*"))


SWALLOWS = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
"""

COMMAND = """
import signal
from fastgpt.utils import cli

def command(args):
    print("begun")
    import swallows
    print("went on")

signal.signal(signal.SIGINT, signal.{handler})
cli.run(command, [])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers Ctrl-C to the whole console")
@pytest.mark.parametrize(
    ("handler", "code", "out"),
    [("default_int_handler", 130, "begun\n"), ("SIG_IGN", 0, "begun\nwent on\n")],
)
def test_ctrl_c_is_not_lost_in_an_import(
    tmp_path: Path, checkout: Path, handler: str, code: int, out: str
) -> None:
    """Even if a package swallows the interrupt; a process that ignores SIGINT keeps ignoring it."""
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(handler=handler)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1])},
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, "")


def test_a_command_leaves_no_handler_of_ctrl_c_behind() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(lambda _: signal.raise_signal(signal.SIGINT)) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_the_user_has_set_for_libraries_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "bfloat16_units", lambda: None)
    assert cli.environment() == {"GOMP_SPINCOUNT": "10000"}
    monkeypatch.setattr(cli, "bfloat16_units", lambda: "AVX512-BF16")
    assert cli.environment() == {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert cli.environment() == {}
