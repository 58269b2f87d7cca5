"""The wheel: small, complete, without tests; its types reach a client."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = """\
import torch
from mxfp4ref import Experts, MoeCall, forward

def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    return forward(MoeCall(x, ids, weights, experts))
"""


def _missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


@pytest.mark.skipif(_missing("hatchling"), reason="needs hatchling")
def test_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 5_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert "mxfp4ref/py.typed" in names
    assert "mxfp4ref/goldens/builtin/manifest.json" in names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"mxfp4ref"}
    here = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "mxfp4ref").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert here <= set(names)


@pytest.mark.skipif(_missing("mypy"), reason="needs mypy")
def test_types_reach_a_client(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(CLIENT)
    (tmp_path / "wrong.py").write_text(CLIENT + "layer(1, 2, 3, 4)\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
        "right.py",
        "wrong.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    *problems, _ = done.stdout.splitlines()
    last_line = CLIENT.count("\n") + 1
    assert problems, done.stdout
    assert all(line.startswith(f"wrong.py:{last_line}: ") for line in problems), done.stdout
