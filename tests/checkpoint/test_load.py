"""Tests of loading checkpoints and of detecting damaged ones."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import GPT, CharTokenizer, GPTConfig, Recipe
from fastgpt.checkpoint.load import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_run_tokenizer,
    open_checkpoint,
    resolve_run,
    verify,
)
from fastgpt.checkpoint.save import Checkpointer
from fastgpt.training.optimizer import make_optimizer
from fastgpt.utils.errors import UsageError
from tests.checkpoint.states import state_of

TOKENIZER = CharTokenizer("abcdefg")


def trained(seed: int = 0) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(7, 8, 1, 2, 8))
    optimizer = make_optimizer(model, Recipe())
    for _ in range(2):
        ids = torch.randint(7, (2, 8))
        model(ids, ids).backward()
        optimizer.step()
    return model, optimizer


def save(run: Path, step: int, val_loss: float | None, seed: int = 0, **more: Any) -> Path:
    more["tokenizer_hash"] = TOKENIZER.fingerprint
    with Checkpointer(run) as checkpointer:
        checkpointer.save(state_of(*trained(seed), step, val_loss, **more))
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved") / "run"
    save(run, 1, 2.0)
    save(run, 2, 2.5, seed=1)
    save(run, 3, 2.4, seed=2)
    save(run, 4, 2.3, seed=2)
    return run


@pytest.fixture
def run(saved_once: Path, tmp_path: Path) -> Path:
    """Return a run whose first checkpoint is the best one."""
    return shutil.copytree(saved_once, tmp_path / "run")


def steps(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path, 5, 1.5, seed=3)
    checkpoint = find_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.val_loss) == (5, 1.5)
    model, optimizer = trained(seed=3)
    other, other_optimizer = trained(seed=4)
    checkpoint.restore(other, other_optimizer)
    fresh = checkpoint.load_model()
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert torch.equal(fresh.state_dict()[name], value)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        state = optimizer.state[mine]
        assert state.keys() == other_optimizer.state[theirs].keys()
        for key, value in state.items():
            assert torch.equal(other_optimizer.state[theirs][key], value)
    assert all(p.requires_grad for p in fresh.parameters())
    before = {name: value.clone() for name, value in checkpoint.model_tensors().items()}
    torch.nn.utils.vector_to_parameters(torch.ones(10_000), other.parameters())
    assert all(torch.equal(t, before[n]) for n, t in checkpoint.model_tensors().items())


def test_averaged_weights_and_notes_come_back(tmp_path: Path) -> None:
    model, _ = trained(seed=1)
    notes = {"best": 1.5, "scaler": {"scale": 65536.0}, "tokens": 2**40}
    save(tmp_path, 1, 1.5, seed=2, ema=model.state_dict(), extra=notes)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.has_ema
    assert checkpoint.extra == notes
    for name, value in checkpoint.load_model(ema=True).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    weights = trained(seed=2)[0].state_dict()
    assert torch.equal(checkpoint.model_tensors()["wte.weight"], weights["wte.weight"])
    save(tmp_path, 2, 1.4)
    with pytest.raises(CheckpointError, match="step-00000002 has no averaged weights"):
        find_checkpoint(tmp_path).load_model(ema=True)


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """Load a checkpoint of the first release: no `extra`, files written by safetensors itself."""
    model, optimizer = trained(seed=6)
    folder = tmp_path / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    state = state_of(model, optimizer, 7, val_loss=2.5)
    files = {}
    for name, tensors in (("model", state.model), ("optimizer", state.optimizer)):
        path = folder / f"{name}.safetensors"
        save_file(dict(tensors), path)
        raw = path.read_bytes()
        files[path.name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    facts = {"step": 7, "val_loss": 2.5, "tokenizer_hash": "t", "data_sha256": "d"}
    manifest = {"format": 1, **facts, "config": asdict(model.config), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = find_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.extra, checkpoint.has_ema) == (7, {}, False)
    other, other_optimizer = trained(seed=8)
    checkpoint.restore(other, other_optimizer)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(other_optimizer.state[theirs][key], value)


def test_the_newest_two_and_the_best_are_kept(run: Path) -> None:
    assert steps(run) == [1, 3, 4]
    assert find_checkpoint(run).step == 4
    assert find_checkpoint(run, "best").step == 1


def test_what_was_just_saved_is_kept_though_damaged_steps_are_numbered_higher(run: Path) -> None:
    for step in (3, 4):
        (run / "checkpoints" / f"step-{step:08d}" / WEIGHTS).write_bytes(b"")
    save(run, 2, None, seed=5)
    assert steps(run) == [1, 2]
    assert find_checkpoint(run).step == 2


def test_what_a_crash_moved_aside_is_put_back(run: Path) -> None:
    folder = run / "checkpoints"
    (folder / "step-00000004").rename(folder / ".old-step-00000004")
    Checkpointer(run)
    assert find_checkpoint(run).step == 4


def test_a_checkpoint_between_evaluations_is_never_the_best(run: Path) -> None:
    save(run, 5, None)
    assert find_checkpoint(run, "best").step == 1
    assert find_checkpoint(run).val_loss is None


def test_the_same_step_can_be_saved_again(run: Path) -> None:
    save(run, 4, 1.0, seed=9)
    assert find_checkpoint(run, "best").val_loss == 1.0
    assert steps(run) == [3, 4]


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        changed = change(manifest)
        (path / "manifest.json").write_text(json.dumps(changed or manifest))

    return damage


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None


def replace_by_folder(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def replace_by_dangling_link(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "nowhere")


def flip_bit(raw: bytes) -> bytes:
    return raw[:-9] + bytes([raw[-9] ^ 16]) + raw[-8:]


WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
DAMAGES = {
    "1 a byte short": (rewrite(WEIGHTS, lambda r: r[:-1]), r"has [\d,]+ bytes instead of \d+"),
    "1 empty": (rewrite(WEIGHTS, lambda r: b""), "has 0 bytes instead of"),
    "1 grown": (rewrite("optimizer.safetensors", lambda r: r + b"x"), "bytes instead of"),
    "2 a bit flipped": (rewrite(WEIGHTS, flip_bit), "SHA-256 differs from the manifest"),
    "3 the tail zeroed": (rewrite(WEIGHTS, lambda r: r[:-64] + bytes(64)), "SHA-256"),
    "4 missing": (lambda path: (path / WEIGHTS).unlink(), "is missing"),
    "4 a directory": (replace_by_folder, "is missing"),
    "4 a dangling link": (replace_by_dangling_link, "is missing"),
    "5 manifest missing": (lambda path: (path / MANIFEST).unlink(), "cannot be read"),
    "5 manifest empty": (rewrite(MANIFEST, lambda r: b""), "cannot be read"),
    "5 manifest cut": (rewrite(MANIFEST, lambda r: r[: len(r) // 2]), "cannot be read"),
    "5 manifest not UTF-8": (rewrite(MANIFEST, lambda r: b"\xff\xfe{}"), "cannot be read"),
    "5 manifest a list": (rewrite(MANIFEST, lambda r: b"[]"), "must be an object"),
    "5 manifest null": (rewrite(MANIFEST, lambda r: b"null"), "must be an object, not None"),
    "5 manifest nested": (rewrite(MANIFEST, lambda r: b"[" * 100_000), "cannot be read"),
    "5 files not an object": (edit(lambda m: m.update(files=[])), "lists no files"),
    "5 a file not described": (edit(lambda m: m["files"].update({WEIGHTS: 3})), "no size and"),
    "5 a file not listed": (edit(lambda m: m["files"].pop(WEIGHTS) and None), "does not list"),
    "5 no step": (edit(lambda m: m.pop("step") and None), "not a manifest"),
    "5 a config that cannot work": (
        edit(lambda m: m["config"].update(n_head=3)),
        "not a manifest: .*multiple",
    ),
    "5 a step that is not an integer": (
        edit(lambda m: m.update(step="4")),
        "not a manifest: step must be an integer, not '4'",
    ),
    "5 a loss that is not a number": (
        edit(lambda m: m.update(val_loss=[1.5])),
        r"not a manifest: val_loss must be a number, not \[1.5\]",
    ),
    "5 a size too large for a tensor": (
        edit(lambda m: m["config"].update(vocab_size=10**30)),
        "not a manifest: vocab_size must be at most 16777216",
    ),
    "5 a flag that is a string": (
        edit(lambda m: m["config"].update(tie_weights="false")),
        "not a manifest: tie_weights must be true or false, not 'false'",
    ),
    "5 a setting missing": (
        edit(lambda m: m["config"].pop("layer_norm_eps") and None),
        "not a manifest: layer_norm_eps must be a number, not None",
    ),
    "5 a list as state": (edit(lambda m: m.update(extra=[])), "extra must be an object"),
    "5 another valid value": (
        edit(lambda m: m["config"].update(n_head=1)),
        "manifest.json is damaged: its SHA-256 differs",
    ),
    "6 a path out of the folder": (
        edit(lambda m: m["files"].update({"../x": m["files"][WEIGHTS]})),
        r"lists an unknown file '\.\./x'",
    ),
    "6 an absolute path": (
        edit(lambda m: m["files"].update({"/etc/passwd": m["files"][WEIGHTS]})),
        "lists an unknown file '/etc/passwd'",
    ),
    "7 a newer format": (edit(lambda m: m.update(format=3)), "written by a newer fastgpt"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_faults_1_to_7_damage_is_named_and_the_older_step_is_found(run: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    newest = run / "checkpoints" / "step-00000004"
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        verify(newest)
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint: .*step-00000004"):
        assert find_checkpoint(run).step == 3


def test_a_run_without_usable_checkpoints_is_reported(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*step-00000004.*00000001"):
        find_checkpoint(run)
    with pytest.raises(CheckpointError, match="it has none yet"):
        find_checkpoint(run.parent / "other")


def test_who_asks_is_told_of_damaged_checkpoints_and_nobody_is_warned(run: Path) -> None:
    (run / "checkpoints" / "step-00000004" / WEIGHTS).write_bytes(b"")
    told: list[str] = []
    assert find_checkpoint(run, report=told.append).step == 3
    assert len(told) == 1
    assert "step-00000004/model.safetensors has 0 bytes" in told[0]


def test_only_what_is_needed_is_checked(run: Path) -> None:
    """Check that worse checkpoints than the best, and the optimizer state, are not verified."""
    for step in (3, 4):
        (run / "checkpoints" / f"step-{step:08d}" / WEIGHTS).write_bytes(b"")
    (run / "checkpoints" / "step-00000001" / "optimizer.safetensors").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(run, "best", weights_only=True).step == 1
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_checkpoint(run, "best")


def test_a_damaged_best_is_reported_and_the_next_best_found(run: Path) -> None:
    (run / "checkpoints" / "step-00000001" / WEIGHTS).write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint: .*step-00000001"):
        assert find_checkpoint(run, "best").step == 4
    (run / "checkpoints" / "step-00000004" / MANIFEST).write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped") as warned:
        assert find_checkpoint(run, "best").step == 3
    assert len(warned) == 2  # the unreadable one may have been the best


def test_what_is_deleted_while_it_is_looked_at_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delete a checkpoint while it is verified, as a run that is still training does."""

    def delete_and_verify(path: Path, **_: Any) -> Checkpoint:
        if path.name.endswith("4"):
            path.rename(path.with_name(".deleting"))
        return verify(path)

    monkeypatch.setattr("fastgpt.checkpoint.load.verify", delete_and_verify)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(run).step == 3


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Checkpoint:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return open_checkpoint(path.parent)


def test_every_mismatched_weight_is_listed(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000004"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["ln_f.weight"]
        tensors["wpe.weight"] = torch.zeros(4, 8)
        tensors["lm_head.weight"] = torch.zeros(7, 8)

    checkpoint = change_weights(folder / WEIGHTS, damage)
    message = (
        r"model\.safetensors does not fit the model: ln_f\.weight is missing; "
        r"lm_head\.weight is not in the model; wpe\.weight is \[4, 8\] instead of \[8, 8\]$"
    )
    model, optimizer = trained(seed=5)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_model()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_mismatched_optimizer_state_is_listed_before_anything_changes(
    run: Path,
) -> None:
    folder = run / "checkpoints" / "step-00000004"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["ln_f.weight.step"], tensors["wte.weight.exp_avg_sq"]
        tensors["wpe.weight.exp_avg"] = torch.zeros(8)
        tensors["wpe.weight.max_exp_avg_sq"] = torch.zeros(8)

    checkpoint = change_weights(folder / "optimizer.safetensors", damage)
    model, optimizer = trained(seed=5)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError) as info:
        checkpoint.restore(model, optimizer)
    for part in ("ln_f.weight.step is missing", "wte.weight.exp_avg_sq is missing"):
        assert part in str(info.value)
    assert "wpe.weight.max_exp_avg_sq is not in the model" in str(info.value)
    assert "wpe.weight.exp_avg is [8] instead of [8, 8]" in str(info.value)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_what_is_restored_does_not_lean_on_the_file(run: Path) -> None:
    """Check that no file stays mapped, since that would keep the space of deleted checkpoints."""
    model, optimizer = trained(seed=5)
    find_checkpoint(run).restore(model, optimizer)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    assert str(run) not in maps.read_text()


def test_another_tokenizer_is_rejected(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    TOKENIZER.save(run / "tokenizer.json")
    assert load_run_tokenizer(run, checkpoint) == TOKENIZER
    CharTokenizer("abcdefh").save(run / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"its hash is [0-9a-f]{16}, not [0-9a-f]{16}"):
        load_run_tokenizer(run, checkpoint)
    (run / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_run_tokenizer(run, checkpoint)


def test_nothing_is_pickled(run: Path) -> None:
    names = {p.name for p in run.rglob("*") if p.is_file()}
    assert names == {"model.safetensors", "optimizer.safetensors", "manifest.json"}
    for path in run.rglob("*.safetensors"):
        assert b"torch" not in path.read_bytes()[:4000]


def test_latest_is_the_newest_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no runs in .*train one: python -m fastgpt\.train"):
        resolve_run(tmp_path / "latest")
    for age, name in enumerate(["b", "a"]):
        (tmp_path / name).mkdir()
        config = tmp_path / name / "config.json"
        config.write_text("{}")
        os.utime(config, (1_700_000_000 + age,) * 2)
    assert resolve_run(tmp_path / "latest") == tmp_path / "a"
    with pytest.raises(UsageError, match="c does not exist"):
        resolve_run(tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(UsageError, match=r"d is not a run folder \(it has no config.json\)"):
        resolve_run(tmp_path / "d")


def test_a_link_called_latest_decides(tmp_path: Path) -> None:
    """The run itself is returned, because the link can point to another one later."""
    for age, name in enumerate(["linked", "newest"]):
        (tmp_path / name).mkdir()
        config = tmp_path / name / "config.json"
        config.write_text("{}")
        os.utime(config, (1_700_000_000 + age,) * 2)
    link = tmp_path / "latest"
    link.symlink_to("linked", target_is_directory=True)
    assert resolve_run(link) == tmp_path / "linked"
    (tmp_path / "linked").rename(tmp_path / "moved")
    assert resolve_run(link) == tmp_path / "newest"


def test_a_good_run_warns_of_nothing(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(find_checkpoint(run), Checkpoint)
