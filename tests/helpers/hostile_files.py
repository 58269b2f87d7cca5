"""Files that may be anything: a folder with one of everything that the commands read, and ways to spoil each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from click.testing import CliRunner

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import read_layer, run_layer
from mxfp4ref.goldens import Goldens
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks, rank_calls
from tests.helpers import autotune_caches, layers, recorded
from tests.helpers.checkpoints import GPT_OSS_H, INDEX, make_checkpoint
from tests.helpers.drop_in import arguments_of
from tests.helpers.fuzzing import time_limit

CHECKOUT = Path(__file__).resolve().parents[2] / "goldens"
MOE, LAYOUT, STAGE, ROUTING = (
    "finalize/slot_order",
    "layout/fold_scales_0_6_16",
    "activation/stage_plain",
    "routing/mixtral",
)
CASES = (MOE, LAYOUT, STAGE, ROUTING)
MANIFEST, RECORD = "goldens/manifest.json", "goldens/hardware/h100.jsonl"
SHARD = "checkpoint/model-00001-of-00002.safetensors"
SECONDS = 30
_LOGICAL = layers.random_call(9, layers.random_experts(9, num_experts=2), tokens=2)
_CALLS = [
    replace(call, experts=layers.to_sm90(call.experts)) for call in rank_calls(_LOGICAL, Ranks(ep_size=2))
]
CALL = f"calls/rank0/{recorded.TIME}_pid0_cutlass_fused_moe_call0001"
FLUSH = f"calls/{recorded.TIME}_pid7_cutlass_fused_moe_call0002/graph_flushes/flush_0001"

# What reads them, all of which succeed as long as nothing is spoilt; and what of the folder they may write.
COMMANDS: dict[str, tuple[str, ...]] = {
    "verify": ("verify", "--goldens", "goldens"),
    "verify files": ("verify", "--goldens", "goldens", "--files-only"),
    "show": ("show", MOE, "--goldens", "goldens", "--values"),
    "show layout": ("show", LAYOUT, "--goldens", "goldens"),
    "explain": ("explain", "bf16_finalize", "--goldens", "goldens"),
    "conform": ("conform", "oracle", "--goldens", "goldens", "--no-repeat"),
    "export": ("export", "exported", "--goldens", "goldens"),
    "regenerate": ("regenerate", "--root", "goldens", "--only", LAYOUT, "--jobs", "1"),
    "regenerate check": ("regenerate", "--root", "goldens", "--only", LAYOUT, "--jobs", "1", "--check"),
    "compare": ("compare", "a.safetensors", "b.safetensors"),
    "layer": ("layer", "--checkpoint", "checkpoint", "--layer", "0", "--input", "hidden.safetensors"),
    "layer output": (
        *("layer", "--checkpoint", "checkpoint", "--layer", "0", "--input", "hidden.safetensors"),
        *("--output", "out.safetensors"),
    ),
    "layer served": (
        *("layer", "--checkpoint", "checkpoint", "--layer", "0", "--input", "hidden.safetensors"),
        *("--served", "served.safetensors", "--diagnosis", "none"),
    ),
    "replay": ("replay", "calls", "--diagnosis=none"),
    "replay cache": ("replay", "calls", "--autotune-cache", "autotune.json", "--any-tile"),
    "invariance": ("invariance", "calls"),
    "checkpoint": ("checkpoint", "checkpoint"),
}
WRITES = {"export": "exported", "regenerate": "goldens", "layer output": "out.safetensors"}


def copy_goldens(root: Path, cases: Sequence[str]) -> None:
    """Some cases in a new folder `goldens` there."""
    for name in cases:
        (root / "goldens" / name).parent.mkdir(parents=True, exist_ok=True)
        for kind in ("json", "safetensors"):
            shutil.copy(CHECKOUT / f"{name}.{kind}", root / "goldens" / f"{name}.{kind}")
    manifest = json.loads((CHECKOUT / "manifest.json").read_text())
    (root / MANIFEST).write_text(
        json.dumps(manifest | {"cases": {name: manifest["cases"][name] for name in cases}})
    )


def make_folder(root: Path) -> None:
    """One of everything, in a new folder."""
    copy_goldens(root, CASES)
    pair, digest = next(iter(Goldens(root / "goldens").load(MOE).output_hashes.items()))
    record = {"case": MOE, "tile_k": list(pair), "sha256": digest, "equal": True, "gpu": "NVIDIA H100"}
    (root / RECORD).parent.mkdir()
    (root / RECORD).write_text(json.dumps(record) + "\n")
    make_checkpoint(root / "checkpoint", "gpt_oss")
    hidden = torch.randn(3, GPT_OSS_H, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    safetensors.torch.save_file({"hidden": hidden}, root / "hidden.safetensors")
    served = run_layer(read_layer(root / "checkpoint", 0), {"hidden": hidden})
    names = ("output", "token_selected_experts", "token_final_scales")
    safetensors.torch.save_file({name: served[name] for name in names}, root / "served.safetensors")
    for name in "ab":
        safetensors.torch.save_file({"output": hidden}, root / f"{name}.safetensors")
    outputs = [forward(call) for call in _CALLS]
    for rank, call in enumerate(_CALLS):
        recorded.write_call(root / f"calls/rank{rank}", call, outputs[rank], pid=rank)
    recorded.write_flushes(root / "calls", [(_CALLS[0], outputs[0])], number=2)
    autotune_caches.write_json(root / "autotune.json", arguments_of(_CALLS[0]), {2: (-1, -1)})


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code (None, with the exception, if it did not end by itself), all it printed."""

    code: int | None
    output: str
    error: BaseException | None = None

    @property
    def problem(self) -> str:
        """What no file may bring about; "" if nothing of that happened."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        bad = {c for c in self.output if not c.isprintable() and c not in "\n\t"}
        if bad:
            return f"printed {bad!r}"
        if (
            self.code == 2
            and not self.output.startswith(("Error: ", "Usage: "))
            and "\nError: " not in self.output
        ):
            return "exit code 2 without a word"
        return "printed a traceback" if "Traceback" in self.output else ""


def run(folder: Path, arguments: tuple[str, ...]) -> Outcome:
    """A command in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with time_limit(SECONDS):
            result = CliRunner().invoke(commands, arguments)
    finally:
        os.chdir(before)
    error = result.exception if not isinstance(result.exception, SystemExit) else None
    return Outcome(None if error else result.exit_code, result.output, error)


def contents(folder: Path) -> dict[str, object]:
    """Everything in a folder, to see that it is as it was and nothing was written, be it the same bytes."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(folder):
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            is_there = os.lstat(path)
            is_file = stat.S_ISREG(is_there.st_mode)
            about_files = (is_there.st_ino, is_there.st_size, is_there.st_mtime_ns) if is_file else ()
            target = os.readlink(path) if stat.S_ISLNK(is_there.st_mode) else ""
            found[path[len(f"{folder}/") :]] = (is_there.st_mode, target, *about_files)
    return found


# Ways to spoil a file: functions of the folder.

Spoil = Callable[[Path], object]


def write(name: str, data: str | bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    return spoil


def _instead(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def fifo(name: str) -> Spoil:
    return _instead(name, os.mkfifo)


def directory(name: str) -> Spoil:
    return _instead(name, Path.mkdir)


def link(name: str, target: str) -> Spoil:
    return _instead(name, lambda path: path.symlink_to(target))


def sparse(name: str) -> Spoil:
    """A terabyte of zeros that takes no room on the disk."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, 1 << 40)

    return _instead(name, make)


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def edit(name: str, change: Callable[[Any], object]) -> Spoil:
    """Change the JSON in a file: in place, or by what `change` returns."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        write(name, json.dumps(value if changed is None else changed))(folder)

    return spoil


def forge(case: str, change: Callable[[Any], object]) -> Spoil:
    """Change a sidecar, and the manifest with it."""
    return both(edit(f"goldens/{case}.json", change), refresh(case))


def refresh(case: str) -> Spoil:
    """Make the manifest agree with a case's files."""

    def change(manifest: dict[str, Any]) -> None:
        for kind in ("json", "safetensors"):
            data = (place[0] / "goldens" / f"{case}.{kind}").read_bytes()
            manifest["cases"][case][kind] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    place: list[Path] = []

    def spoil(folder: Path) -> None:
        place[:] = [folder]
        edit(MANIFEST, change)(folder)

    return spoil


def forge_tensors(case: str, data: bytes) -> Spoil:
    return both(write(f"goldens/{case}.safetensors", data), refresh(case))


def tensor_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header: an object, or the text itself."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one_tensor(dtype: str, shape: list[int], size: int, name: str = "output") -> bytes:
    return tensor_file(
        {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(range(1, size + 1))
    )


def tensors(name: str, **values: torch.Tensor) -> Spoil:
    return write(name, safetensors.torch.save(values))


def without(name: str, tensor: str) -> Spoil:
    """A file that lacks one of its tensors."""

    def spoil(folder: Path) -> None:
        found = safetensors.torch.load((folder / name).read_bytes())
        tensors(name, **{key: value for key, value in found.items() if key != tensor})(folder)

    return spoil


DEEP = "[" * 100_000
PICKLE = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x07echo no\x85R."
__all__ = [
    "CALL",
    "CASES",
    "COMMANDS",
    "DEEP",
    "FLUSH",
    "INDEX",
    "PICKLE",
    "Outcome",
    "contents",
    "copy_goldens",
    "make_folder",
    "run",
]
