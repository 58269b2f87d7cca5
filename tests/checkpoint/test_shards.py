"""Files that are missing, damaged, foreign or hostile."""

from __future__ import annotations

import json
import pickle
import random
import re
import struct
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mxfp4ref.checkpoint import CheckpointError, read_layer
from tests.helpers.checkpoints import (
    INDEX,
    assert_same_experts,
    layer_tensors,
    make_checkpoint,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON file, got JSONDecodeError"),
        ("\x00\xff", "expected a JSON file"),
        ("[" * 100_000, "expected a JSON file, got ValueError: nested too deeply"),
        ("[]", "expected a JSON object, got list"),
        ("{}", 'expected an object "weight_map"'),
        ('{"weight_map": []}', 'expected an object "weight_map"'),
        ('{"weight_map": {"a": 3}}', "a: expected the name of a .safetensors file beside it, got 3"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "got 'pytorch_model.bin'"),
        (
            '{"weight_map": {"a": "x.safetensors"}}',
            "expected experts in the naming of deepseek_v4, .*gpt_oss",
        ),
        ('{"version": 1, "cells": []}', 'expected an object "weight_map"'),
    ],
)
def test_foreign_index(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        read_layer(tmp_path, 0)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
    ],
)
def test_index_cannot_leave_its_folder(tmp_path: Path, path: str) -> None:
    save_file(layer_tensors("gpt_oss", 0), tmp_path / "secret.safetensors")
    folder = tmp_path / "checkpoint"
    make_checkpoint(folder, "gpt_oss")
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.0.mlp.router.bias"
    index["weight_map"][name] = path
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=f"{re.escape(name)}: expected the name .* got {re.escape(repr(path))}"
    ):
        read_layer(folder, 0)


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    """Download caches keep the shards elsewhere under their hashes."""
    make_checkpoint(tmp_path / "a", "gpt_oss")
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "b" / file.name).symlink_to(f"../a/{file.name}")
    assert_same_experts(read_layer(tmp_path / "b", 1).experts, read_layer(tmp_path / "a", 1).experts)


def test_missing_truncated_and_swapped_shards(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    for damaged in (b"", whole[:5], whole[:1000], whole[:-1], b"\xff" * 64, whole + b"\0"):
        second.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"layers\.1\..*00002-of-00002.*cannot be read"):
            read_layer(tmp_path, 1)
    second.unlink()
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.ffn\..*expected in .*model-00002-of-00002.*No such file"
    ):
        read_layer(tmp_path, 1)
    read_layer(tmp_path, 0)  # in the other shard
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.2\..*where the index puts it, not there"):
        read_layer(tmp_path, 2)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    payload = pickle.dumps(Payload())
    assert pickle.loads(payload) is None
    assert marker.exists()  # it would work
    marker.unlink()
    (tmp_path / "model.safetensors").write_bytes(payload)
    (tmp_path / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        read_layer(tmp_path, 0)
    (tmp_path / INDEX).write_text(
        '{"weight_map": {"model.layers.0.mlp.experts.down_proj_bias": "model.safetensors"}}'
    )
    with pytest.raises(CheckpointError):
        read_layer(tmp_path, 0)
    assert not marker.exists()


def test_flipped_bytes_never_surprise(tmp_path: Path) -> None:
    """Headers, index and config with one byte changed: the layer, or a CheckpointError; nothing else."""
    folder = tmp_path / "c"
    make_checkpoint(folder, "gpt_oss")
    generator = random.Random(7)
    outcomes = {"read": 0, "refused": 0}
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        header = 8 + struct.unpack("<Q", whole[:8])[0] if file.suffix == ".safetensors" else len(whole)
        for _ in range(60):
            changed = bytearray(whole)
            changed[generator.randrange(header)] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            try:
                read_layer(folder, 1)
                outcomes["read"] += 1
            except CheckpointError:
                outcomes["refused"] += 1
        file.write_bytes(whole)
    assert outcomes["read"] + outcomes["refused"] == 240
    assert outcomes["refused"] > 60
