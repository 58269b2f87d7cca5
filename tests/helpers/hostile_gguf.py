"""GGUF files that lie: written by hand, since a library would refuse."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_UINT8, _UINT32, _STRING, _ARRAY, _UINT64 = 0, 4, 8, 9, 10  # types of values
_MXFP4 = 39  # of a tensor
_EXPERTS = [f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
_BYTES = 2 * 32 * 17  # of two experts, each 32 rows of a block


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(key: str, kind: int, data: bytes) -> bytes:
    return _text(key.encode()) + struct.pack("<I", kind) + data


def _file(values: Sequence[bytes], tensors: Sequence[bytes] = (), count: int | None = None) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors) if count is None else count, len(values))
    whole = head + b"".join(values) + b"".join(tensors)
    return whole + bytes(-len(whole) % 32)


def _array(kind: int, count: int, data: bytes = b"") -> bytes:
    return _value("tokenizer.ggml.tokens", _ARRAY, struct.pack("<IQ", kind, count) + data)


def _tensors(*offsets: int, rows: int = 32) -> list[bytes]:
    return [
        _text(name.encode()) + struct.pack("<IQQQIQ", 3, 32, rows, 2, _MXFP4, offset)
        for name, offset in zip(_EXPERTS, offsets, strict=True)
    ]


_ARCHITECTURE = _value("general.architecture", _STRING, _text(b"deepseek4"))
_ODD_TEXT = _value("deepseek4.expert_weights_scale", _STRING, _text(b"\xff\xfe"))
_BESIDE = (0, _BYTES, 2 * _BYTES)

# What the file is: its bytes; what has to be said.
LYING = {
    "an array of 2^60 numbers": (_file([_array(_UINT8, 1 << 60)]), "it ends before what it says"),
    "an array of 2^60 texts": (
        _file([_array(_STRING, 1 << 60, _text(b"a"))]),
        "z.gguf: expected a GGUF file, got",
    ),
    "a text of 2^63 bytes": (
        _file([_value("a", _STRING, struct.pack("<Q", 1 << 63))]),
        "it ends before what it says",
    ),
    "2^60 tensors": (_file([_ARCHITECTURE], count=1 << 60), "expected a GGUF file, got"),
    "2^60 rows": (
        _file([_ARCHITECTURE], _tensors(*_BESIDE, rows=1 << 60)) + bytes(3 * _BYTES),
        "z.gguf: expected a GGUF file, got",
    ),
    "truncated": (_file([_ARCHITECTURE], _tensors(*_BESIDE)) + bytes(_BYTES), "it ends before what it says"),
    "tensors at the end of 64 bits": (
        _file([_ARCHITECTURE], _tensors(0, _BYTES, (1 << 64) - 32)) + bytes(3 * _BYTES),
        "expected a GGUF file, got FloatingPointError: overflow",
    ),
    "one tensor in another": (
        _file([_ARCHITECTURE], _tensors(0, _BYTES, _BYTES - 32)) + bytes(3 * _BYTES),
        "expected tensors beside each other, blk.0.ffn_down_exps.weight lies in blk.0.ffn_gate_exps.weight",
    ),
    "text that is none": (
        _file([_ARCHITECTURE, _ODD_TEXT], _tensors(*_BESIDE)) + bytes(3 * _BYTES),
        "z.gguf: deepseek4.expert_weights_scale: expected a value that can be read, got: .utf-8. codec",
    ),
    "no alignment": (
        _file([_value("general.alignment", _UINT32, bytes(4))]),
        "Invalid alignment",
    ),
    "an alignment of 64 bits": (
        _file([_value("general.alignment", _UINT64, bytes(8))]),
        "Bad type for general.alignment",
    ),
}
