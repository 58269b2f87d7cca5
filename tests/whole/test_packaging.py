"""The wheel: small, complete, without tests; its types reach a client."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mxfp4ref

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 3_000_000
CLIENT = """\
import torch
from mxfp4ref import Experts, MoeCall, forward

def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    return forward(MoeCall(x, ids, weights, experts))
"""
TORCH = """\
from typing import Any
class Tensor: ...
def __getattr__(name: str) -> Any: ...
"""
NOT_READ = """\
[mypy]
[mypy-torch.*]
follow_imports = skip
[mypy-numpy.*]
follow_imports = skip
follow_imports_for_stubs = True
"""


def _missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def _build(what: str, source: Path, target: Path) -> Path:
    """Call one of hatchling's functions in a folder of sources; the file it made."""
    command = [sys.executable, "-c", f"import hatchling.build as b; print(b.{what}({str(target)!r}))"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (made,) = target.glob("*.tar.gz" if what == "build_sdist" else "*.whl")
    return made


@pytest.mark.skipif(_missing("hatchling"), reason="needs hatchling")
def test_wheel(tmp_path: Path, builtin_root: Path) -> None:
    wheel = _build("build_wheel", ROOT, tmp_path)
    assert wheel.stat().st_size < MOST_BYTES
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert "mxfp4ref/py.typed" in names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"mxfp4ref"}
    here = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "mxfp4ref").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert here <= set(names)
    folder = "mxfp4ref/goldens/builtin/"
    builtin = {name.removeprefix(folder): archive.read(name) for name in names if name.startswith(folder)}
    paths = (path for path in builtin_root.rglob("*") if path.is_file())
    assert builtin == {path.relative_to(builtin_root).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.skipif(_missing("hatchling"), reason="needs hatchling")
def test_wheel_from_the_source_distribution_is_the_same(tmp_path: Path) -> None:
    source = _build("build_sdist", ROOT, tmp_path)
    assert source.stat().st_size < MOST_BYTES
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in ("direct", "from_sdist"):
        (tmp_path / name).mkdir()
    wheels = (
        _build("build_wheel", ROOT, tmp_path / "direct"),
        _build("build_wheel", unpacked, tmp_path / "from_sdist"),
    )
    direct, from_sdist = (
        {name: archive.read(name) for name in archive.namelist()} for archive in map(zipfile.ZipFile, wheels)
    )
    assert direct == from_sdist
    metadata = next(data for name, data in direct.items() if name.endswith("/METADATA")).decode()
    assert f"\nVersion: {mxfp4ref.__version__}\n" in metadata


def test_the_version_has_a_section_and_stands_nowhere_else() -> None:
    newest = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert re.fullmatch(re.escape(mxfp4ref.__version__) + r" \(\d{4}-\d\d-\d\d\)", newest)
    for name in ("pyproject.toml", "CITATION.cff"):
        assert not re.search(r"^version\b", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.skipif(_missing("hatchling"), reason="needs hatchling")
def test_an_editable_wheel_has_no_goldens(tmp_path: Path) -> None:
    """A checkout has all of them, and the package finds those."""
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["BuiltinGoldens"]
    build_data: dict[str, dict[str, str]] = {"force_include": {}}
    building = hook(str(ROOT), {}, None, None, str(tmp_path), "wheel")
    building.initialize("editable", build_data)
    building.finalize("editable", build_data, "")
    assert build_data == {"force_include": {}}


@pytest.mark.skipif(_missing("mypy"), reason="needs mypy")
def test_types_reach_a_client(tmp_path: Path) -> None:
    # In place of torch's and numpy's, which take 10 s to read; `make check` reads those.
    (tmp_path / "stubs" / "torch").mkdir(parents=True)
    (tmp_path / "stubs" / "torch" / "__init__.pyi").write_text(TORCH)
    (tmp_path / "mypy.ini").write_text(NOT_READ)
    (tmp_path / "right.py").write_text(CLIENT)
    (tmp_path / "wrong.py").write_text(CLIENT + "layer(1, 2, 3, 4)\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file=mypy.ini",
        "right.py",
        "wrong.py",
    ]
    environment = {**os.environ, "MYPYPATH": "stubs"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    *problems, _ = done.stdout.splitlines()
    last_line = CLIENT.count("\n") + 1
    assert problems, done.stdout
    assert all(line.startswith(f"wrong.py:{last_line}: ") for line in problems), done.stdout
