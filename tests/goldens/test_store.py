"""Reading, verifying and finding goldens. A damaged file must never come to a comparison."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxfp4ref.__main__ import commands
from mxfp4ref.conformance.results import CaseResult, Report
from mxfp4ref.goldens import (
    GoldenError,
    Goldens,
    open_goldens,
    store,
)
from mxfp4ref.goldens.manifest import manifest_bytes

MOE = "gemm/wide_exponents"
SMALL = "layout/fold_scales_0_6_16"


@pytest.fixture
def root(builtin_root: Path, tmp_path: Path) -> Path:
    """A copy of the built-in suite, to damage."""
    return Path(shutil.copytree(builtin_root, tmp_path / "goldens"))


def refresh_manifest(root: Path, name: str) -> None:
    """Make the manifest agree with the files again, as a careful forger would."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    for kind in ("json", "safetensors"):
        data = (root / f"{name}.{kind}").read_bytes()
        manifest["cases"][name][kind] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(manifest))


def edit_sidecar(root: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = root / f"{name}.json"
    sidecar = json.loads(path.read_bytes())
    edit(sidecar)
    path.write_text(json.dumps(sidecar))
    refresh_manifest(root, name)


# Damage.


def damage_flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "last bit flipped": damage_flip,
    "first bit flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle bit flipped": lambda data: (
        data[: len(data) // 2] + damage_flip(data[len(data) // 2 :][:1]) + data[len(data) // 2 + 1 :]
    ),
    "truncated": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [MOE, SMALL])
def test_damaged_file(root: Path, name: str, damage: str, kind: str) -> None:
    path = root / f"{name}.{kind}"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    goldens = Goldens(root)
    reason = "expected SHA-256" if "flipped" in damage else r"expected \d+ bytes, got \d+"
    with pytest.raises(GoldenError, match=f"{path.name}: {reason}"):
        goldens.load(name)
    assert len(goldens.verify()) == 1
    # And with a manifest that agrees: the sidecar's own record is left.
    refresh_manifest(root, name)
    if kind == "safetensors" or damage in ("cut in half", "empty", "longer"):
        with pytest.raises(GoldenError, match=name):
            Goldens(root).load(name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_single_flipped_bit_is_found(
    builtin_root: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["json", "safetensors"]))
    original = (builtin_root / f"{SMALL}.{kind}").read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = bytearray(original)
    flipped[position] ^= 1 << bit
    root = tmp_path_factory.mktemp("flipped")
    (root / "layout").mkdir()
    for other in ("json", "safetensors"):
        shutil.copy(builtin_root / f"{SMALL}.{other}", root / f"{SMALL}.{other}")
    shutil.copy(builtin_root / "manifest.json", root)
    (root / f"{SMALL}.{kind}").write_bytes(flipped)
    with pytest.raises(GoldenError):
        Goldens(root).load(SMALL)
    if kind == "safetensors":
        # Without the file's hash: blanks after the header are the only bytes that carry nothing.
        manifest = json.loads((root / "manifest.json").read_bytes())
        manifest["cases"] = {SMALL: manifest["cases"][SMALL]}
        (root / "manifest.json").write_text(json.dumps(manifest))
        refresh_manifest(root, SMALL)
        header = 8 + int.from_bytes(original[:8], "little")
        if not (position < header and original[position : position + 1] == b" "):
            with pytest.raises(GoldenError):
                Goldens(root).load(SMALL)


def test_missing_file(root: Path) -> None:
    (root / f"{MOE}.safetensors").unlink()
    with pytest.raises(GoldenError, match=r"wide_exponents.safetensors: cannot be read"):
        Goldens(root).load(MOE)


def test_renamed_case(root: Path) -> None:
    other = "gemm/mirrored_hidden_1536"
    manifest = json.loads((root / "manifest.json").read_bytes())
    for kind in ("json", "safetensors"):
        os.rename(root / f"{MOE}.{kind}", root / f"{other}.{kind}")
    manifest["cases"][other] = manifest["cases"].pop(MOE)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GoldenError, match=r"says that it is gemm/wide_exponents: renamed"):
        Goldens(root).load(other)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_files_of_two_cases_exchanged(root: Path, kind: str) -> None:
    first, second = root / f"{MOE}.{kind}", root / f"{SMALL}.{kind}"
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    refresh_manifest(root, MOE)
    refresh_manifest(root, SMALL)
    for name in (MOE, SMALL):
        with pytest.raises(GoldenError, match=name):
            Goldens(root).load(name)


def test_foreign_files_are_listed(root: Path) -> None:
    (root / "gemm" / "extra.safetensors").write_bytes(b"")
    (root / "notes.txt").write_text("x")
    (root / "hardware").mkdir()
    (root / "hardware" / "h100.json").write_text("{}")
    (root / "README.md").write_text("x")
    problems = Goldens(root).verify()
    assert len(problems) == 2
    assert all("not in the manifest" in line for line in problems)


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "format": lambda s: s.update(format="mxfp4ref-goldens-2"),
    "kind": lambda s: s.update(kind="attention"),
    "missing key": lambda s: s.pop("why"),
    "dtype": lambda s: s["tensors"]["before"].update(dtype="int8"),
    "shape": lambda s: s["tensors"]["before"].update(shape=[2, 1024]),
    "sha256": lambda s: s["tensors"]["before"].update(sha256="0" * 64),
    "tensor missing": lambda s: s["tensors"].pop("before"),
    "tensor added": lambda s: s["tensors"].update(more=s["tensors"]["before"]),
    "tensors no object": lambda s: s.update(tensors=3),
    "output of nothing": lambda s: s.update(outputs=[{"tensor": "nothing", "tile_k": [[128, 128]]}]),
    "no pair": lambda s: s.update(outputs=[{"tensor": "after", "tile_k": [128]}]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_sidecar_that_does_not_fit(root: Path, edit: str) -> None:
    edit_sidecar(root, SMALL, EDITS[edit])
    with pytest.raises(GoldenError, match=SMALL):
        Goldens(root).load(SMALL)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[]",
        "{}",
        '{"format": "mxfp4ref-goldens-2", "cases": {}}',
        '{"format": "mxfp4ref-goldens-1"}',
        '{"format": "mxfp4ref-goldens-1", "cases": []}',
        '{"format": "mxfp4ref-goldens-1", "cases": {"../x": {"json": {"bytes": 1, "sha256": ""}, '
        '"safetensors": {"bytes": 1, "sha256": ""}}}}',
        '{"format": "mxfp4ref-goldens-1", "cases": {"a/b": {"json": {}}}}',
        '{"format": "mxfp4ref-goldens-1", "cases": {"a/b": 1}}',
        '{"format": "mxfp4ref-goldens-1", "cases": {"a/b": {"json": 1, "safetensors": 1}}}',
    ],
)
def test_wrong_manifest(root: Path, text: str) -> None:
    (root / "manifest.json").write_text(text)
    with pytest.raises(GoldenError, match=r"manifest\.json"):
        open_goldens(root)


# Finding the goldens.


@pytest.fixture
def elsewhere(builtin_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without goldens above it, and an installed package: its goldens are the built-in ones."""
    monkeypatch.delenv("MXFP4REF_GOLDENS", raising=False)
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(store, "_PACKAGE_PARENT", tmp_path / "site-packages")
    monkeypatch.setattr(store, "BUILTIN_ROOT", builtin_root)
    return work


def test_builtin_suite_is_found_last(builtin_root: Path, elsewhere: Path) -> None:
    assert open_goldens().root == builtin_root


def test_folder_above_the_working_directory(builtin_root: Path, elsewhere: Path) -> None:
    shutil.copytree(builtin_root, elsewhere.parent / "goldens")
    assert open_goldens().root == elsewhere.parent / "goldens"


def test_goldens_of_another_project_are_passed_over(builtin_root: Path, elsewhere: Path) -> None:
    (elsewhere / "goldens").mkdir()
    (elsewhere / "goldens" / "manifest.json").write_text('{"format": "other"}')
    assert open_goldens().root == builtin_root


def test_beside_the_package(builtin_root: Path, elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(builtin_root, tmp_path / "site-packages" / "goldens")
    assert open_goldens().root == tmp_path / "site-packages" / "goldens"


def test_environment_comes_before_what_is_found(
    builtin_root: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(builtin_root, elsewhere / "goldens")
    shutil.copytree(builtin_root, tmp_path / "named")
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(tmp_path / "named"))
    assert open_goldens().root == tmp_path / "named"
    assert open_goldens(elsewhere / "goldens").root == elsewhere / "goldens"
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(tmp_path / "nowhere"))
    with pytest.raises(GoldenError, match="MXFP4REF_GOLDENS: expected a folder with a manifest"):
        open_goldens()


def test_nothing_found(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BUILTIN_ROOT", tmp_path / "none")
    with pytest.raises(GoldenError, match="no goldens found: set MXFP4REF_GOLDENS"):
        open_goldens()
    with pytest.raises(GoldenError, match="cannot be read"):
        open_goldens(tmp_path / "none")


def test_goldens_without_a_case_are_refused(tmp_path: Path) -> None:
    """As an interrupted `regenerate` leaves them: everything would agree with them."""
    (tmp_path / "manifest.json").write_bytes(manifest_bytes({}))
    with pytest.raises(GoldenError, match="expected goldens, got a manifest without a case"):
        open_goldens(tmp_path)
    for command in ("verify", "verify --files-only", "conform oracle", "goldens pack x.tar", "list"):
        result = CliRunner().invoke(commands, [*command.split(), "--goldens", str(tmp_path)])
        assert result.exit_code == 2
        assert "a manifest without a case" in result.output


def test_verify_needs_a_bit_that_was_checked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = CaseResult("a/x", "moe", "why", "equal")
    monkeypatch.setattr("mxfp4ref.conformance.suite.run", lambda *a, **k: Report("oracle", "exact", (empty,)))
    result = CliRunner().invoke(commands, ["verify", "--goldens", str(root)])
    assert result.exit_code == 1
    assert "oracle ran on 1 case without an element to compare: no verdict." in result.output
    assert "no bit of this machine was checked" in result.output


def test_ordinary_data_of_several_experts_is_run_first() -> None:
    goldens = open_goldens(Path(__file__).resolve().parents[2] / "goldens")
    first, *rest = goldens.in_order_to_run()
    assert first == "finalize/weights_with_a_routed_factor"
    assert sorted([first, *rest]) == goldens.names()
    assert goldens.load(first).call().experts.num_experts == 8
