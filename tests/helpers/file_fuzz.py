"""Random damage to files, and what the commands make of it: for `test_hostile_files.py` and `tools/fuzz_files.py`."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import hostile_files
from tests.helpers.hostile_files import CASES, COMMANDS, WRITES

# What comes in the place of a value in JSON, as text.
_VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2", "31", "128", "1e-50", "1e999", "-0.0", "NaN", "4.5"),
    *(
        "2147483648",
        "9223372036854775808",
        "1" + "0" * 400,
        "9" * 5000,
        '""',
        '"a"',
        '"U8"',
        '"F4"',
        '"BF16"',
        '"moe"',
    ),
    *(
        "[]",
        "{}",
        "[[]]",
        "[0]",
        "[1, 2, 3]",
        '{"a": 1}',
        "[" * 5000 + "]" * 5000,
        '"\\ud800"',
        '"\\u001b[2J"',
    ),
    *('"../../x"', '"' + "x" * 70_000 + '"', '"\\u0000"', '"\\u202e"'),
)
_BYTES = (
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\\",
    b"\n",
    b"\xed\xa0\x80",
    b"9",
    b"-",
)


@dataclass(frozen=True)
class Found:
    """One run: what was done to which files, the command, its exit code, and what is wrong with that, if anything."""

    damage: str
    command: str
    code: int | None
    problem: str


def one(seed: int, whole: Path, place: Path) -> Found:
    """Damage a copy of a folder of `hostile_files.make_folder`, and run a command on it; the seed says all."""
    chosen = random.Random(seed)
    folder = place / "folder"
    shutil.copytree(whole, folder, copy_function=os.link)  # whatever is damaged or written gets another file
    try:
        damage = "; ".join(_damage(chosen, folder) for _ in range(chosen.choice((1, 1, 1, 2, 3))))
        if chosen.random() < 0.8:
            _make_the_manifest_agree(folder)
        command = chosen.choice(list(COMMANDS))
        before = hostile_files.contents(folder)
        outcome = hostile_files.run(folder, COMMANDS[command])
        after = hostile_files.contents(folder)
        changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        elsewhere = [path for path in changed if not path.startswith(WRITES.get(command, "nothing"))]
        problem = outcome.problem or (f"changed {elsewhere}" if elsewhere else "")
        return Found(damage, command, outcome.code, problem)
    finally:
        shutil.rmtree(folder)


def _damage(chosen: random.Random, folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = chosen.choice(files)
    data = path.read_bytes()
    ways: list[Callable[[random.Random, bytes], bytes]] = [_flip, _cut, _insert, _repeat, _remove]
    if path.suffix == ".safetensors":
        ways += [_change_header] * 5
    else:
        ways += [_change_value] * 5
    way = chosen.choice(ways)
    changed = way(chosen, data)
    if chosen.random() < 0.05:
        way, changed = _exchange, chosen.choice(files).read_bytes()
    path.unlink()
    path.write_bytes(changed)
    return f"{path.relative_to(folder)}: {way.__name__.strip('_')}"


def _flip(chosen: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chosen.choice((1, 1, 2, 8))):
        if changed:
            changed[_place(chosen, data)] ^= 1 << chosen.randrange(8)
    return bytes(changed)


def _cut(chosen: random.Random, data: bytes) -> bytes:
    return data[: _place(chosen, data)]


def _insert(chosen: random.Random, data: bytes) -> bytes:
    at = _place(chosen, data)
    return data[:at] + chosen.choice(_BYTES) * chosen.choice((1, 1, 8, 2000)) + data[at:]


def _repeat(chosen: random.Random, data: bytes) -> bytes:
    at = _place(chosen, data)
    return data[:at] + data[at : at + chosen.randrange(1, 400)] + data[at:]


def _remove(chosen: random.Random, data: bytes) -> bytes:
    at = _place(chosen, data)
    return data[:at] + data[at + chosen.randrange(1, 40) :]


def _exchange(chosen: random.Random, data: bytes) -> bytes:
    return data


def _place(chosen: random.Random, data: bytes) -> int:
    """Half of all places are in the first kilobyte, where headers are."""
    return chosen.randrange(min(len(data), 1024) if chosen.random() < 0.5 else len(data)) if data else 0


def _change_value(chosen: random.Random, data: bytes) -> bytes:
    """Another value, or another key, somewhere in a JSON text."""
    try:
        value = json.loads(data.splitlines()[0] if data.startswith(b'{"case"') else data)
        marked = _mark(chosen, value)
        return json.dumps(marked).replace('"<here>"', chosen.choice(_VALUES)).encode()
    except (ValueError, IndexError, RecursionError):
        return _flip(chosen, data)


def _mark(chosen: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and chosen.random() < 0.9:
        key = chosen.choice(list(value))
        way = chosen.random()
        if way < 0.05:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.1:
            return {
                chosen.choice(("", "\ud800", "a/b", "\x1b[2J", "__metadata__")) if k == key else k: value[k]
                for k in value
            }
        return value | {key: _mark(chosen, value[key])}
    if isinstance(value, list) and value and chosen.random() < 0.9:
        at = chosen.randrange(len(value))
        return [*value[:at], _mark(chosen, value[at]), *value[at + 1 :]]
    return "<here>"


def _change_header(chosen: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    if size > len(data):
        return _flip(chosen, data)
    header = _change_value(chosen, data[8 : 8 + size])
    length = len(header) if chosen.random() < 0.9 else chosen.choice((0, 1, 1 << 20, 1 << 63, (1 << 64) - 1))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def _make_the_manifest_agree(folder: Path) -> None:
    for case in CASES:
        try:
            hostile_files.refresh(case)(folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return
