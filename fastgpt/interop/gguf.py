"""Import and export of GGUF files of architecture `gpt2`, for llama.cpp and tools based on it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The tensors and keys of a
GPT-2: https://github.com/ggml-org/llama.cpp, ``src/models/gpt2.cpp``; those of a vocabulary:
``src/llama-vocab.cpp``. Files are written with the package `gguf`, one tensor at a time.

Results differ slightly: llama.cpp rounds GELU, keys and values to half precision. All tensor types
that the package can dequantize are read, including some 4-bit types.

llama.cpp implements GPT-2's tokenizer, so token ids are equal. It has no character tokenizer, but
RWKV's tokenizer, which matches the longest token at each position, is equivalent for ASCII.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgpt.interop import external
from fastgpt.interop.external import ExternalModel, LazyTensor, NoTokenizerError
from fastgpt.model import GPT, GPTConfig, meta_weights
from fastgpt.tokenizer import BaseTokenizer, CharTokenizer, Tokenizer
from fastgpt.tokenizer.vocabulary_files import read_hugging_face, to_hugging_face
from fastgpt.utils.errors import UsageError
from fastgpt.utils.files import atomic_file

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Precision: TypeAlias = Literal["f32", "f16", "bf16", "q8_0"]

_BLOCK = 32  # values of a row that share a scale in q8_0
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types
_STRING, _ARRAY = 8, 9  # value types of variable size; below, the bytes of those of fixed size
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_NAMES = {  # fastgpt's name -> GGUF's name
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def recognizes(path: Path) -> bool:
    """Return whether a path is a GGUF file, judging by its first four bytes."""
    return external.starts_with(path, (b"GGUF",))


def read(path: Path) -> ExternalModel:
    """Open a GGUF file; UsageError if it has another architecture or is damaged."""
    gguf = _import_gguf(path)
    try:
        _check_lengths(path)
        reader = gguf.GGUFReader(path)
        keys = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # a damaged file may raise anything
        raise UsageError(f"{path} cannot be read: {error!r:.200}") from None
    if (architecture := keys.get("general.architecture")) != "gpt2":
        raise UsageError(f"{path} has a model of architecture {architecture!r:.40}, not 'gpt2'")
    tensors = {_from_gguf_name(path, tensor.name): _lazy(path, tensor) for tensor in reader.tensors}
    config = external.make_config(
        path,
        vocab_size=len(_list(path, keys, "tokens")),
        block_size=keys.get("gpt2.context_length"),
        n_layer=keys.get("gpt2.block_count"),
        n_head=keys.get("gpt2.attention.head_count"),
        n_embd=keys.get("gpt2.embedding_length"),
        tie_weights="lm_head.weight" not in tensors,
        layer_norm_eps=_shortest(keys.get("gpt2.attention.layer_norm_epsilon", 1e-5)),
    )
    return ExternalModel(path, config, tensors, partial(_read_tokenizer, path, keys))


def write(
    model: GPT, path: Path, tokenizer: BaseTokenizer | None, precision: Precision = "f32"
) -> None:
    """Write a model and its tokenizer to one file.

    precision: the type of the matrices; ``f32`` is exact, ``f16`` and ``bf16`` take half the space,
    and ``q8_0`` a quarter. Vectors and the position table are always fp32. A model without biases
    gets zero biases. Rows of the vocabulary without a token in the tokenizer get unused tokens.

    Raises: UsageError for a tokenizer that llama.cpp does not support, for a width that the
        precision does not support, if the package `gguf` is not installed, or if the file exists.
    """
    if path.exists():
        raise UsageError(f"{path} already exists; give another name")
    gguf = _import_gguf(path)
    if precision == "q8_0" and model.config.n_embd % _BLOCK:
        raise UsageError(
            f"{path}: q8_0 requires a width (n_embd) that is a multiple of {_BLOCK}, not "
            f"{model.config.n_embd}; f16 and bf16 support any width"
        )
    vocabulary = _vocabulary(tokenizer, model.config.vocab_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, closing(gguf.GGUFWriter(None, "gpt2")) as writer:
            _add_metadata(writer, model.config, vocabulary, precision)
            _write_file(writer, temporary, model, precision)
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"
        raise UsageError(f"{path} cannot be written: {reason}") from None


def _import_gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UsageError(f"{path}: reading and writing GGUF requires: pip install gguf") from None
    return gguf


# --- import ----------------------------------------------------------------------------------


def _check_lengths(path: Path) -> None:
    """Raise ValueError if the value of a key extends beyond the end of the file.

    Without this check, the package would loop over empty reads as often as a damaged length says.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:

        def number(at: int, form: str) -> int:
            return int(struct.unpack_from(form, content, at)[0])

        def end_of(at: int, kind: int) -> int:
            if kind == _ARRAY:
                inner, count, at = number(at, "<I"), number(at + 4, "<Q"), at + 12
                if inner in _SIZES:
                    return at + count * _SIZES[inner]
                for _ in range(count):
                    at = end_of(at, inner)
                return at
            return at + (8 + number(at, "<Q") if kind == _STRING else _SIZES[kind])

        at = 24  # after magic, version, and the numbers of tensors and of keys
        for _ in range(number(16, "<Q")):
            at = end_of(at, _STRING)
            at = end_of(at + 4, number(at, "<I"))
            if at > len(content):
                raise ValueError(f"it ends at byte {len(content):,}, inside its keys")


def _from_gguf_name(path: Path, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    ours = {theirs: ours for ours, theirs in _NAMES.items()}
    if match is None or match[2] not in ours:
        raise UsageError(f"{path}: {name!r:.80} is not a tensor of GPT-2")
    layer = f"h.{match[1]}." if match[1] else ""
    return f"{layer}{ours[match[2]]}.{match[3]}"


def _lazy(path: Path, tensor: Any) -> LazyTensor:
    """Return a lazily read tensor, mapped from the file, which stores shapes in reverse order."""
    from gguf import quants

    def read() -> Tensor:
        try:
            values = quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        except Exception as error:  # a type that the package cannot dequantize
            raise UsageError(f"{path}: {tensor.name} cannot be read: {error!r:.200}") from None
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    return LazyTensor(tuple(int(size) for size in reversed(tensor.shape)), read)


def _shortest(number: Any) -> float:
    """Return the shortest decimal that rounds to this number in fp32: the original value."""
    return float(str(np.float32(number))) if isinstance(number, float) else 1e-5


def _list(path: Path, keys: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(found := keys.get(f"tokenizer.ggml.{name}"), list):
        raise UsageError(f"{path} has no list tokenizer.ggml.{name}")
    return found


def _read_tokenizer(path: Path, keys: Mapping[str, Any]) -> BaseTokenizer:
    """Return the tokenizer without the unused tokens at its end.

    Raises: NoTokenizerError for a kind of tokenizer that is not supported.
    """
    tokens, types = _list(path, keys, "tokens"), _list(path, keys, "token_type")
    while types and types[-1] == _UNUSED:
        types.pop()
    ids = {token: token_id for token_id, token in enumerate(tokens[: len(types)])}
    kind = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    try:
        if kind == ("rwkv", None):
            return CharTokenizer([_unescape(token) for token in ids])
        if kind == ("gpt2", "gpt-2"):
            vocabulary, added = read_hugging_face(_as_hugging_face(path, keys, ids, types))
            return Tokenizer(*vocabulary, added)
    except ValueError as error:
        raise NoTokenizerError(f"{path}: {error}") from None
    raise NoTokenizerError(f"{path}: a tokenizer of the kind {kind} is not supported")


def _as_hugging_face(
    path: Path, keys: Mapping[str, Any], ids: Mapping[str, int], types: list[int]
) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` with the same vocabulary."""
    added = [
        {"id": ids[name], "content": name, "special": kind == _CONTROL, "normalized": False}
        for name, kind in zip(ids, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    return {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": added,
        "model": {"vocab": ids, "merges": _list(path, keys, "merges")},
    }


def _unescape(token: str) -> str:
    r"""Undo `_escape`; ValueError for a token that is not one character."""
    escaped = re.fullmatch(r"\\x([0-9a-f]{2})|\\?(.)", token, re.DOTALL)
    if escaped is None:
        raise ValueError(f"token {token!r:.40} is not one character")
    special = {"\\n": "\n", "\\t": "\t", "\\r": "\r"}.get(token, escaped[2])
    return chr(int(escaped[1], 16)) if escaped[1] else special


# --- metadata --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer in the form of GGUF's keys: without merges RWKV's, otherwise GPT-2's."""

    tokens: list[str]  # by id
    types: list[int]
    merges: list[str] | None
    end: int | None  # the id of the token that ends a text


def _vocabulary(tokenizer: BaseTokenizer | None, size: int) -> _Vocabulary:
    """Return the vocabulary, padded with unused tokens to `size`.

    Raises: UsageError if llama.cpp cannot represent it, or would produce other ids.
    """
    if tokenizer is None:
        raise UsageError("a GGUF file requires the model's tokenizer")
    if tokenizer.vocab_size > size:
        raise UsageError(f"the tokenizer has {tokenizer.vocab_size:,} ids, the model only {size:,}")
    if isinstance(tokenizer, CharTokenizer):
        vocabulary = _characters(tokenizer)
    elif isinstance(tokenizer, Tokenizer):
        vocabulary = _byte_pairs(tokenizer)
    else:
        raise UsageError(f"a GGUF file cannot hold a {type(tokenizer).__name__}")
    # Names that no text can match: with a space, which byte-level BPE encodes as another character,
    # or with a byte that never occurs in UTF-8.
    form = r"\xff{}" if vocabulary.merges is None else "<unused {}>"
    fill = [form.format(token_id) for token_id in range(len(vocabulary.tokens), size)]
    tokens, types = vocabulary.tokens + fill, vocabulary.types + [_UNUSED] * len(fill)
    if len(set(tokens)) != size:
        raise UsageError("a GGUF file cannot hold two tokens of the same name")
    return _Vocabulary(tokens, types, vocabulary.merges, vocabulary.end)


def _byte_pairs(tokenizer: Tokenizer) -> _Vocabulary:
    if tokenizer.eot_token is None:
        raise UsageError(
            "this tokenizer has no <|endoftext|>, and llama.cpp would end every text at token 11; "
            "train it with that special token"
        )
    if not len(tokenizer.vocabulary.merges):
        raise UsageError("llama.cpp does not support a byte-level vocabulary without merges")
    model = to_hugging_face(tokenizer.vocabulary, tokenizer.added_tokens)["model"]
    types = [_NORMAL] * tokenizer.vocab_size
    for ids, kind in (
        (tokenizer.special_tokens, _CONTROL),
        (tokenizer.added_tokens, _USER_DEFINED),
    ):
        for token_id in ids.values():
            types[token_id] = kind
    return _Vocabulary(list(model["vocab"]), types, model["merges"], tokenizer.eot_token)


def _characters(tokenizer: CharTokenizer) -> _Vocabulary:
    """Return the vocabulary for RWKV's tokenizer; UsageError unless all characters are ASCII.

    With multi-byte characters, its search would not stop at an unknown character that begins with
    the same byte as a known one.
    """
    characters = tokenizer.characters
    if not characters.isascii():
        other = next(character for character in characters if not character.isascii())
        raise UsageError(
            f"llama.cpp has no tokenizer for single characters such as {other!r}, only for ASCII; "
            "export to Hugging Face's format, or train with a byte-pair tokenizer"
        )
    escaped = [_escape(character) for character in characters]
    return _Vocabulary(escaped, [_NORMAL] * len(escaped), None, None)


def _escape(character: str) -> str:
    r"""Escape a character as in RWKV's vocabulary: unprintable ones become ``\x..``."""
    if character == "\\":
        return "\\\\"
    return character if character.isprintable() else f"\\x{ord(character):02x}"


def _add_metadata(
    writer: GGUFWriter, config: GPTConfig, vocabulary: _Vocabulary, precision: Precision
) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    kind = f"MOSTLY_{precision.upper()}" if precision != "f32" else "ALL_F32"
    writer.add_file_type(LlamaFileType[kind])
    if precision == "q8_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    _add_tokenizer(writer, vocabulary)


def _add_tokenizer(writer: GGUFWriter, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model("rwkv" if vocabulary.merges is None else "gpt2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_add_bos_token(False)
    if vocabulary.merges is not None:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.end is not None:
        writer.add_bos_token_id(vocabulary.end)
        writer.add_eos_token_id(vocabulary.end)
        writer.add_unk_token_id(vocabulary.end)


# --- tensors ---------------------------------------------------------------------------------


def _write_file(writer: GGUFWriter, path: Path, model: GPT, precision: Precision) -> None:
    """Write the file: first all metadata, then the data of one tensor at a time."""
    from gguf import GGML_QUANT_SIZES

    tensors = list(_tensors(model))
    for name, tensor in tensors:
        kind = _kind(name, tensor, precision)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        n_bytes = tensor.numel() // block * block_bytes
        shape = [*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes]
        # the writer expects a uint8 shape in bytes and divides it by the block size
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), n_bytes, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    for name, tensor in tensors:  # not write_tensor_data: its `tofile` ignores a full disk
        data = _encode(tensor, _kind(name, tensor, precision))
        writer.write_padding(file, file.tell())
        file.write(np.ascontiguousarray(data).data)
        writer.write_padding(file, data.nbytes)
    writer.flush()


def _tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by GGUF's names; a tied head is omitted, which marks it as tied."""
    tensors = model.state_dict() | external.zero_biases(model.config)
    for name in meta_weights(replace(model.config, bias=True)):  # each bias after its weight
        yield _gguf_name(name), tensors[name]


def _gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor: ``blk.3.attn_norm.bias`` for ``h.3.ln_1.bias``."""
    match = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert match is not None
    layer = f"blk.{match[1]}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _kind(name: str, tensor: Tensor, precision: Precision) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    exact = tensor.dim() == 1 or name.startswith("position_embd")
    return GGMLQuantizationType["F32" if exact else precision.upper()]


def _encode(tensor: Tensor, kind: GGMLQuantizationType) -> NDArray[Any]:
    from gguf import quants

    values = tensor.detach().float().cpu().contiguous().numpy()
    encoded: NDArray[Any] = quants.quantize(values, kind)
    return encoded
