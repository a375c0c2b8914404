"""Tests of the loggers and of `metrics.jsonl`."""

import json
import math
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from fastgpt.training.loggers import Logger, Loggers, MetricsFile, check_loggers, open_loggers
from fastgpt.training.metrics import read_metrics, truncate_metrics
from fastgpt.utils.errors import UsageError


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.finished = options, [], False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A fake wandb module that records runs; if `error` is set, the next `init` raises it."""
    usage, comm = (type(name, (Exception,), {}) for name in ("UsageError", "CommError"))
    authentication = type("AuthenticationError", (comm,), {})
    errors = types.SimpleNamespace(
        UsageError=usage, CommError=comm, AuthenticationError=authentication
    )
    module = types.SimpleNamespace(runs=[], error=None, errors=errors, Settings=dict)
    module.Table = lambda columns, data: data

    def init(**options: Any) -> FakeRun:
        error, module.error = module.error, None
        if error:
            raise error
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    monkeypatch.setattr("fastgpt.training.loggers.find_spec", lambda name: True)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    loggers = open_loggers((), tmp_path, {})
    loggers.log(3, {"loss": 1.5, "lr": 1e-3})
    path = tmp_path / "metrics.jsonl"
    assert path.read_text() == '{"step": 3, "loss": 1.5, "lr": 0.001}\n'
    loggers.text(3, "a sample\n")
    loggers.close()
    assert read_metrics(path)[1] == {"step": 3, "text": "a sample\n"}


def test_what_is_not_finite_is_strict_json(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    file.close()
    path.write_text(path.read_text() + '{"step": 1, "loss": NaN}\n')  # as written by old versions
    truncate_metrics(path, 1)
    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None
    first = read_metrics(path)[0]
    assert math.isnan(first["loss"])
    assert math.isnan(first["grad_norm"])
    assert first["lr"] == 0.5


def test_a_torn_line_does_not_take_the_next_with_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    file = MetricsFile(path)
    file.log(3, {"loss": 1.0})
    file.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_cutting_keeps_what_is_before_and_returns_the_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 5)
    assert not path.exists()
    path.write_text("".join(f'{{"step": {s}, "seconds": {s}.5}}\n' for s in (1, 2, 3)) + "[1]\n")
    truncate_metrics(path, 2)
    assert read_metrics(path) == [{"step": s, "seconds": s + 0.5} for s in (1, 2)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_one_that_fails_warns_once_and_the_others_go_on(tmp_path: Path) -> None:
    class Broken(Logger):
        def log(self, step: int, values: Any) -> None:
            raise OSError("no space\nleft")

        text = close = lambda self, *args: None

    whole = MetricsFile(tmp_path / "metrics.jsonl")
    loggers = Loggers([Broken(), whole])
    with pytest.warns(UserWarning, match=r"Broken failed to log a record .*: no space left"):
        loggers.log(1, {"loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.log(2, {"loss": 1.0})
    loggers.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_one_that_cannot_be_opened_is_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()  # a file instead of its folder
    with pytest.warns(
        UserWarning, match=r"TensorBoard is not available .*: this run is logged without"
    ):
        loggers = open_loggers(["tensorboard"], tmp_path, {})
    loggers.log(1, {"loss": 1.0})
    loggers.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wrong_names_and_missing_packages_are_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="unknown logger 'tb': choose from tensorboard and wandb"):
        check_loggers(["tb"])
    monkeypatch.setattr("fastgpt.training.loggers.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"Weights & Biases needs .*: pip install wandb"):
        open_loggers(["wandb"], tmp_path, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="pip install tensorboard"):
        check_loggers(["tensorboard"])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.metrics\.jsonl cannot be written: No such file"):
        open_loggers((), tmp_path / "none", {})


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, fake_wandb: types.SimpleNamespace) -> None:
    for step in (0, 10):
        loggers = open_loggers(["wandb"], tmp_path, {"lr": 0.1}, step)
        loggers.log(step + 1, {"loss": 2.0})
        loggers.text(step + 1, "sample")
        loggers.close()
    first, second = fake_wandb.runs
    assert first.options["id"] == second.options["id"]
    assert len(first.options["id"]) == 8
    expected = {"project": "fastgpt", "name": tmp_path.name, "resume": "allow"}
    assert expected.items() <= first.options.items()
    assert first.options["config"] == {"lr": 0.1}
    assert first.logged == [(1, {"loss": 2.0}), (1, {"sample": [[1, "sample"]]})]
    assert first.finished


def test_wandb_without_a_network_goes_on_offline(
    tmp_path: Path, fake_wandb: types.SimpleNamespace
) -> None:
    fake_wandb.error = fake_wandb.errors.CommError("no such host\nsorry")
    with pytest.warns(UserWarning, match=r"cannot be reached \(no such host sorry\).*wandb sync"):
        open_loggers(["wandb"], tmp_path, {}).close()
    assert fake_wandb.runs[0].options["mode"] == "offline"


@pytest.mark.parametrize("kind", ["UsageError", "AuthenticationError"])
def test_wandb_without_a_key_is_a_mistake_to_mend(
    tmp_path: Path, fake_wandb: types.SimpleNamespace, kind: str
) -> None:
    fake_wandb.error = getattr(fake_wandb.errors, kind)("No API key configured.")
    with pytest.raises(UsageError, match=r"W&B: No API key configured\. .*WANDB_MODE=offline"):
        open_loggers(["wandb"], tmp_path, {})


def test_the_real_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first in (0, 2):  # the run stopped at step 3 and is resumed from its checkpoint at step 2
        loggers = open_loggers(["tensorboard"], tmp_path, {}, first)
        for step in range(first + 1, first + 4):
            loggers.log(step, {"loss": 10.0 * first + step})
        loggers.text(first + 3, "*as it is*")
        loggers.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {event.step: event.tensor_proto.float_val[0] for event in events.Tensors("loss")}
    assert points == {1: 1.0, 2: 2.0, 3: 23.0, 4: 24.0, 5: 25.0}
    text = events.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0]
    assert text == b"    *as it is*"


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 1):
        loggers = open_loggers(["wandb"], tmp_path, {"lr": 0.1}, step)
        loggers.log(step + 1, {"loss": 1.0})
        loggers.text(step + 1, "sample")
        loggers.close()
    identity = (tmp_path / "wandb-id.txt").read_text().strip()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 1, 2, 2]
