"""Write the checkpoints in tests/assets/tf-checkpoints with TensorFlow.

    pip install tensorflow-cpu==2.21.0
    python tests/interop/write_tf_checkpoint.py tests/assets/tf-checkpoints

The tests recompute the values from the same seeds; `values` only needs NumPy.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

HPARAMS = {"n_vocab": 61, "n_ctx": 17, "n_embd": 12, "n_head": 3, "n_layer": 2}
DTYPES = (
    *("float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128"),
)
SHAPES = ((), (1,), (5,), (0, 3), (2, 3, 4), (33, 7))
# An index block has 256 KB; long names with short common prefixes fill several blocks.
N_MANY, LONG = 1100, "/of/a/scope/in/a/scope/in/a/scope" * 8


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """Return the variables of OpenAI's model and their shapes."""
    n_embd = HPARAMS["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "model/wte": (HPARAMS["n_vocab"], n_embd),
        "model/wpe": (HPARAMS["n_ctx"], n_embd),
    }
    widths = {
        "attn/c_attn": (n_embd, 3 * n_embd),
        "attn/c_proj": (n_embd, n_embd),
        "mlp/c_fc": (n_embd, 4 * n_embd),
        "mlp/c_proj": (4 * n_embd, n_embd),
    }
    for layer in range(HPARAMS["n_layer"]):
        for name, (n_in, n_out) in widths.items():
            shapes[f"model/h{layer}/{name}/w"] = (1, n_in, n_out)
            shapes[f"model/h{layer}/{name}/b"] = (n_out,)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"model/h{layer}/{norm}/{kind}": (n_embd,) for kind in "gb"}
    return shapes | {f"model/ln_f/{kind}": (n_embd,) for kind in "gb"}


def gpt2_values(seed: int) -> dict[str, np.ndarray]:
    """Return values for these variables, scaled to give logits of moderate size."""
    random = np.random.RandomState(seed)
    return {
        name: (random.standard_normal(shape) * 0.3 + name.endswith("/g")).astype(np.float32)
        for name, shape in gpt2_shapes().items()
    }


def values(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Return an array of any dtype; bfloat16 is the upper half of float32 as uint16."""
    random = np.random.RandomState(seed)
    if dtype.startswith("complex"):
        real = random.standard_normal((*shape, 2))
        return np.asarray(real[..., 0] + 1j * real[..., 1]).astype(dtype)
    if dtype == "bfloat16":
        floats = np.asarray(random.standard_normal(shape), np.float32)
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    if dtype.startswith("float"):
        return np.asarray(random.standard_normal(shape)).astype(dtype)
    size = int(np.prod(shape, dtype=np.int64))
    itemsize = np.dtype(dtype).itemsize
    if dtype == "bool":
        return np.frombuffer(random.bytes(size), np.uint8).reshape(shape) % 2 == 1
    return np.frombuffer(random.bytes(size * itemsize), dtype).reshape(shape)


def typed_values() -> dict[str, tuple[str, np.ndarray]]:
    """Return one tensor of each dtype and shape: its dtype and value by name."""
    pairs = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
    return {
        f"{dtype}/{'x'.join(map(str, shape)) or 'scalar'}": (dtype, values(shape, dtype, seed))
        for seed, (dtype, shape) in enumerate(pairs)
    }


def many_values() -> dict[str, np.ndarray]:
    """Return enough small tensors for an index of several data blocks."""
    return {f"{i * 7919 % N_MANY:04}{LONG}": np.int32([i, i * i]) for i in range(N_MANY)}


def main(folder: Path) -> None:
    """Write all checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)  # relative paths keep this machine's path out of `checkpoint`
    as_openai(Path("openai"))
    as_gpt2_simple(Path("gpt-2-simple"))
    with_optimizer(Path("with-optimizer"))
    save(Path("dtypes/model.ckpt"), typed_variables)
    save(Path("many/model.ckpt"), lambda: variables(many_values()))
    save(Path("sharded/model.ckpt"), variables_on_two_devices, sharded=True)
    save(Path("sliced/model.ckpt"), sliced_variable)
    save(Path("string/model.ckpt"), string_variable)


def as_openai(folder: Path) -> None:
    """Write the content of OpenAI's folders, except for the tokenizer, which is in the package."""
    save(folder / "model.ckpt", lambda: variables(gpt2_values(0)), write_state=True)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))


def as_gpt2_simple(folder: Path) -> None:
    """Write two checkpoints of a run; the `checkpoint` file names the second."""
    session, saver = start(lambda: variables(gpt2_values(1)))
    for step, seed in ((100, 1), (1000, 2)):
        values = gpt2_values(seed)
        for variable in tf.global_variables():
            variable.load(values[variable.op.name], session)
        saver.save(session, str(folder / "model"), global_step=step, write_meta_graph=False)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))


def with_optimizer(folder: Path) -> None:
    """Write all variables of a run, including Adam's, as a Saver does by default."""

    def training() -> None:
        trained = variables(gpt2_values(3))
        loss = tf.add_n([tf.reduce_sum(variable * variable) for variable in trained])
        tf.train.AdamOptimizer().minimize(loss, tf.train.get_or_create_global_step())

    save(folder / "model.ckpt", training, write_state=True)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))


def variables(values: dict[str, np.ndarray]) -> list[object]:
    """Create a variable for each value."""
    return [tf.get_variable(name, initializer=value) for name, value in values.items()]


def typed_variables() -> None:
    """Create a variable of each dtype and shape."""
    for name, (dtype, value) in typed_values().items():
        if dtype == "bfloat16":
            tf.get_variable(name, initializer=tf.bitcast(value, tf.bfloat16))
        else:
            tf.get_variable(name, initializer=value)


def variables_on_two_devices() -> None:
    """Create the model's variables alternately on two devices."""
    for i, (name, value) in enumerate(gpt2_values(4).items()):
        with tf.device(f"/cpu:{i % 2}"):
            tf.get_variable(name, initializer=value)


def sliced_variable() -> None:
    """Create a variable in three slices."""
    tf.get_variable(
        "table",
        (9, 2),
        initializer=tf.ones_initializer(),
        partitioner=tf.fixed_size_partitioner(3),
    )


def string_variable() -> None:
    """Create a string variable and a numeric one."""
    tf.get_variable("words", initializer=np.array([b"a", b"bc"], object), dtype=tf.string)
    tf.get_variable("number", initializer=np.float32(1))


def start(make: object, **options: object) -> tuple[object, object]:
    """Return a session with initialized variables, and a Saver for them."""
    tf.reset_default_graph()
    make()
    session = tf.Session(config=tf.ConfigProto(device_count={"CPU": 2}))
    session.run(tf.global_variables_initializer())
    return session, tf.train.Saver(tf.global_variables(), **options)


def save(prefix: Path, make: object, write_state: bool = False, **options: object) -> None:
    """Save a checkpoint of the variables created by `make`, and its name in `checkpoint`."""
    session, saver = start(make, **options)
    prefix.parent.mkdir(parents=True)
    saver.save(session, str(prefix), write_meta_graph=False, write_state=write_state)


if __name__ == "__main__":
    import tensorflow

    tf = tensorflow.compat.v1
    tf.disable_eager_execution()
    main(Path(sys.argv[1]))
