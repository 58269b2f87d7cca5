"""The counter-based generator against a transcription in plain integers and published test vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxfp4ref.goldens import generator

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def fnv1a(name: str) -> int:
    h = 0xCBF29CE484222325
    for b in name.encode("ascii"):
        h = ((h ^ b) * 0x100000001B3) & MASK
    return h


def transcribed_key(seed: int, name: str) -> int:
    return mix(fnv1a(name) ^ mix((seed + GAMMA) & MASK))


def transcribed_byte(key: int, j: int) -> int:
    word = mix((key + (j // 8 + 1) * GAMMA) & MASK)
    return (word >> (8 * (j % 8))) & 255


def test_transcription_has_the_published_values() -> None:
    # FNV-1a of the empty string, "a" and "foobar", from the test suite of its authors.
    assert [fnv1a(name) for name in ("", "a", "foobar")] == [
        0xCBF29CE484222325,
        0xAF63DC4C8601EC8C,
        0x85944171F73967E8,
    ]
    # SplitMix64 from the state 1234567, as published with many implementations.
    assert [mix((1234567 + i * GAMMA) & MASK) for i in (1, 2, 3, 4, 5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_literal_vectors() -> None:
    assert generator.key(1, "fc1_weights") == 0x583412C85520A3AA
    assert generator.random_bytes(1, "fc1_weights", 0, 8).tolist() == [
        0x0F,
        0x5C,
        0xB9,
        0xC0,
        0xB9,
        0x40,
        0xBB,
        0xE5,
    ]
    assert generator.random_bytes(1, "fc1_weights", 5, 3).tolist() == [0x40, 0xBB, 0xE5]
    assert generator.random_bytes(1, "fc1_weights", 3, 0).tolist() == []


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
seeds = st.integers(0, MASK)


@given(seeds, names, st.integers(0, 1 << 50), st.integers(0, 40))
def test_equals_the_transcription(seed: int, name: str, start: int, count: int) -> None:
    key = transcribed_key(seed, name)
    assert generator.key(seed, name) == key
    expected = [transcribed_byte(key, j) for j in range(start, start + count)]
    assert generator.random_bytes(seed, name, start, count).tolist() == expected


def test_pieces_join_across_internal_chunks() -> None:
    length = (1 << 20) + (1 << 17)  # more than one chunk of words
    whole = generator.random_bytes(7, "x", 0, length)
    start = (1 << 20) - 13
    assert np.array_equal(generator.random_bytes(7, "x", start, 100), whole[start : start + 100])
    assert abs(float(whole.mean()) - 127.5) < 0.5


def test_element_rules() -> None:
    data = np.arange(256, dtype=np.uint8)
    assert generator.element_rule(data, "bytes").tolist() == list(range(256))
    scaled = generator.element_rule(data, "range", low=117, high=121)
    assert scaled.tolist() == [117 + (b * 5 >> 8) for b in range(256)]
    assert generator.element_rule(data, "range", low=0, high=255).tolist() == list(range(256))
    signed = generator.element_rule(data, "bf16", low=-6)
    assert signed.dtype == torch.bfloat16
    assert signed.tolist() == [(b if b < 128 else b - 256) / 64 for b in range(256)]


def test_generate_starts_anywhere() -> None:
    whole = generator.generate(3, "w", (4, 6), "bytes")
    assert generator.generate(3, "w", (2, 6), "bytes", start=12).equal(whole[2:])


def test_streams_differ_by_seed_and_name() -> None:
    streams = {
        generator.random_bytes(seed, name, 0, 16).tobytes() for seed in range(20) for name in ("a", "b", "ab")
    }
    assert len(streams) == 60


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"start": -1}, ValueError, "start"),
        ({"rule": "normal"}, ValueError, "rule"),
        ({"rule": "range", "low": 5, "high": 4}, ValueError, "high"),
        ({"rule": "range", "low": 0, "high": 256}, ValueError, "high"),
        ({"rule": "bf16", "low": -127}, ValueError, "low"),
    ],
)
def test_refuses(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    given_arguments = {"seed": 0, "name": "x", "shape": (2,), "rule": "bytes", **arguments}
    with pytest.raises(error, match=words):
        generator.generate(**given_arguments)  # type: ignore[arg-type]
