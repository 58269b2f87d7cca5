"""Reading, verifying and writing goldens. A damaged file must never come to a comparison."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxfp4ref.goldens import Case, GoldenError, derive, generator, tensor_bytes
from mxfp4ref.goldens import store as golden
from mxfp4ref.goldens import writing as regenerate
from mxfp4ref.goldens.cases import DEFINITIONS, SUITES
from mxfp4ref.goldens.manifest import BUILTIN
from mxfp4ref.goldens.runs import run_stage, runs
from mxfp4ref.goldens.store import BUILTIN_ROOT, Goldens, open_goldens
from mxfp4ref.sm90.tactics import Sm90Kernel

CHECKOUT = Path(__file__).resolve().parents[2] / "goldens"
MOE = "gemm/wide_exponents"
SMALL = "layout/fold_scales_0_6_16"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the built-in suite, to damage."""
    return Path(shutil.copytree(BUILTIN_ROOT, tmp_path / "goldens"))


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


# Every golden case, in the checkout and in the package.


@pytest.mark.parametrize("folder", [CHECKOUT, BUILTIN_ROOT], ids=["checkout", "builtin"])
def test_everything_stored_is_sound(folder: Path) -> None:
    assert open_goldens(folder).verify() == []


def test_checkout_holds_all_definitions_and_the_package_its_share() -> None:
    assert open_goldens(CHECKOUT).names() == sorted(DEFINITIONS)
    assert open_goldens(BUILTIN_ROOT).names() == sorted(BUILTIN)
    for path in BUILTIN_ROOT.glob("*/*"):
        assert path.read_bytes() == (CHECKOUT / path.relative_to(BUILTIN_ROOT)).read_bytes()


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in CHECKOUT.rglob("*") if path.is_file()) < 32 << 20
    assert sum(path.stat().st_size for path in BUILTIN_ROOT.rglob("*") if path.is_file()) < 1_500_000


def test_every_key_is_explained() -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    words = set()
    for name in open_goldens(CHECKOUT).names():
        sidecar = json.loads((CHECKOUT / f"{name}.json").read_bytes())
        words |= {*sidecar, *sidecar["parameters"], sidecar["kind"], sidecar["suite"]}
        words |= {key for recipe in sidecar["derived"].values() for key in recipe}
        words |= {tensor for tensor in sidecar["tensors"] if ".tile_k_" not in tensor}
    assert {word for word in words if f"`{word}`" not in readme} == set()


def test_names_say_why() -> None:
    for definition in DEFINITIONS.values():
        assert len(definition.why) > 20, definition.id
        assert definition.kind in golden.KINDS
    assert {definition.suite for definition in DEFINITIONS.values()} == {
        (module.__doc__ or "").split("`")[1] for module in SUITES
    }


FAST = [name for name in sorted(DEFINITIONS) if not name.startswith("models/")][::6]


@pytest.mark.parametrize("name", FAST)
def test_definitions_give_the_stored_bytes(name: str) -> None:
    for kind, data in regenerate.build_case(name).items():
        assert data == (CHECKOUT / f"{name}.{kind}").read_bytes()


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_package_gives_the_stored_outputs(name: str) -> None:
    for run in runs(open_goldens(BUILTIN_ROOT).load(name)):
        output = run_stage(open_goldens(BUILTIN_ROOT).load(name).kind, run.inputs)
        got = {"output": output, **dict.fromkeys(run.expected, output)} if torch.is_tensor(output) else output
        for key, expected in run.expected.items():
            assert tensor_bytes(got[key]) == tensor_bytes(expected)


# Cases.


def test_case_has_what_the_sidecar_says() -> None:
    case = open_goldens(CHECKOUT).load("gemm/mirrored_both_512")
    assert (case.id, case.kind) == ("gemm/mirrored_both_512", "moe")
    assert sorted(case.outputs) == [(a, b) for a in (128, 256, 512) for b in (128, 256, 512)]
    # With K = 512 only tile_k 128 has a tile in the middle.
    assert tensor_bytes(case.outputs[256, 512]) == tensor_bytes(case.outputs[512, 256])
    assert tensor_bytes(case.outputs[128, 256]) != tensor_bytes(case.outputs[256, 256])
    hashes = case.output_hashes
    assert hashes[256, 512] == hashlib.sha256(tensor_bytes(case.outputs[256, 512])).hexdigest()
    call = case.call(Sm90Kernel.of_tiles((256, 128)))
    assert call.kernel.tile_k == (256, 128)
    assert call.experts.fc1_weights.equal(case.tensors["fc1_weights"])


def test_call_of_another_kind() -> None:
    with pytest.raises(ValueError, match=r"layout/fold_scales_0_6_16.*expected.*'moe', got.*'layout'"):
        open_goldens(BUILTIN_ROOT).load(SMALL).call()


def test_tile_k_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="kernel: expected a K tile"):
        open_goldens(BUILTIN_ROOT).load(MOE).call(Sm90Kernel.of_tiles((512, 128)))


def test_parallel_case_keeps_its_rank() -> None:
    call = open_goldens(BUILTIN_ROOT).load("parallel/sentinels_on_rank_3_of_4").call()
    assert (call.ep_size, call.ep_rank, call.tp_size, call.tp_rank, call.strict) == (4, 3, 1, 0, True)
    assert call.experts.num_experts == 2


def test_case_of_a_caller_that_errs_is_not_strict() -> None:
    case = open_goldens(CHECKOUT).load("parallel/ids_of_no_rank")
    assert not case.call().strict
    assert case.outputs[128, 128].shape == case.tensors["input"].shape


def test_names_and_suites() -> None:
    goldens = open_goldens(BUILTIN_ROOT)
    assert goldens.suites == sorted({name.split("/")[0] for name in BUILTIN})
    assert goldens.names("gemm") == ["gemm/underflow_in_gemm1", MOE]
    with pytest.raises(GoldenError, match=r"suite: expected one of .*gemm.*, got 'gem'"):
        goldens.names("gem")
    with pytest.raises(GoldenError, match=f"no such case.*did you mean {MOE}.*a checkout has all"):
        goldens.load("gemm/wide_exponent")
    with pytest.raises(GoldenError, match=r"goldens; did you mean gemm/ordinary\?$"):
        open_goldens(CHECKOUT).load("gemm/nothing")


# Derived tensors.


def test_derived_blocks_padding_and_offset() -> None:
    recipe = {
        "seed": 9,
        "rule": "bytes",
        "shape": [4, 8, 5],
        "content": [2, 3, 4],
        "first_expert": 10,
        "experts": [1, 3],
    }
    tensor, digest = derive("w", recipe)
    stream = generator.random_bytes(9, "w", 0, 14 * 24)
    for expert in range(4):
        for block in range(2):
            for row in range(4):
                for column in range(5):
                    inside = expert in (1, 3) and row < 3 and column < 4
                    index = ((10 + expert) * 2 + block) * 12 + row * 4 + column
                    expected = int(stream[index]) if inside else 0
                    assert int(tensor[expert, 4 * block + row, column]) == expected
    assert digest == hashlib.sha256(tensor_bytes(tensor[[1, 3]])).hexdigest()


def test_model_case_derives_only_what_it_uses() -> None:
    case = open_goldens(CHECKOUT).load("models/deepseek_v4_flash")
    small = {name: recipe for name, recipe in case.derived.items() if name == "fc2_scales"}
    recipe = small["fc2_scales"]
    assert recipe["shape"] == [256, 4096, 64]
    tensor, digest = derive("fc2_scales", recipe)
    assert digest == recipe["sha256"]
    used = tensor.flatten(1).ne(0).any(1).nonzero().flatten().tolist()
    assert used == recipe["experts"]
    assert set(case.tensors["token_selected_experts"].flatten().tolist()) == set(used)


def test_derived_tensor_with_another_hash() -> None:
    case = open_goldens(CHECKOUT).load("models/gpt_oss_20b")
    wrong = {"fc2_scales": {**case.derived["fc2_scales"], "seed": 1}}
    forged = Case(**{**vars(case), "derived": wrong})
    with pytest.raises(GoldenError, match=r"models/gpt_oss_20b: derived tensor fc2_scales: expected SHA-256"):
        forged.call()


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
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["json", "safetensors"]))
    original = (BUILTIN_ROOT / f"{SMALL}.{kind}").read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = bytearray(original)
    flipped[position] ^= 1 << bit
    root = tmp_path_factory.mktemp("flipped")
    (root / "layout").mkdir()
    for other in ("json", "safetensors"):
        shutil.copy(BUILTIN_ROOT / f"{SMALL}.{other}", root / f"{SMALL}.{other}")
    shutil.copy(BUILTIN_ROOT / "manifest.json", root)
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
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without goldens above it, and a package without goldens beside it."""
    monkeypatch.delenv("MXFP4REF_GOLDENS", raising=False)
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(golden, "_PACKAGE_PARENT", tmp_path / "site-packages")
    return work


def test_builtin_suite_is_found_last(elsewhere: Path) -> None:
    assert open_goldens().root == BUILTIN_ROOT


def test_folder_above_the_working_directory(elsewhere: Path) -> None:
    shutil.copytree(BUILTIN_ROOT, elsewhere.parent / "goldens")
    assert open_goldens().root == elsewhere.parent / "goldens"


def test_goldens_of_another_project_are_passed_over(elsewhere: Path) -> None:
    (elsewhere / "goldens").mkdir()
    (elsewhere / "goldens" / "manifest.json").write_text('{"format": "other"}')
    assert open_goldens().root == BUILTIN_ROOT


def test_beside_the_package(elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(BUILTIN_ROOT, tmp_path / "site-packages" / "goldens")
    assert open_goldens().root == tmp_path / "site-packages" / "goldens"


def test_environment_comes_before_what_is_found(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(BUILTIN_ROOT, elsewhere / "goldens")
    shutil.copytree(BUILTIN_ROOT, tmp_path / "named")
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(tmp_path / "named"))
    assert open_goldens().root == tmp_path / "named"
    assert open_goldens(elsewhere / "goldens").root == elsewhere / "goldens"
    monkeypatch.setenv("MXFP4REF_GOLDENS", str(tmp_path / "nowhere"))
    with pytest.raises(GoldenError, match="MXFP4REF_GOLDENS: expected a folder with a manifest"):
        open_goldens()


def test_nothing_found(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "BUILTIN_ROOT", tmp_path / "none")
    with pytest.raises(GoldenError, match="no goldens found: set MXFP4REF_GOLDENS"):
        open_goldens()
    with pytest.raises(GoldenError, match="cannot be read"):
        open_goldens(tmp_path / "none")


# Writing.


def test_safetensors_bytes_are_read_by_the_library_and_aligned() -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.tensor([1.5, -0.0, torch.nan]).to(torch.bfloat16),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.tensor([True, False]),
        "e": torch.zeros(0, 4),
        "f": torch.arange(4, dtype=torch.int32)[::2],
    }
    data = regenerate.safetensors_bytes(tensors)
    assert data == regenerate.safetensors_bytes(dict(reversed(tensors.items())))
    read = safetensors.torch.load(data)
    assert {name: t.dtype for name, t in read.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(tensor_bytes(read[name]) == tensor_bytes(tensor) for name, tensor in tensors.items())
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        assert (8 + size + entry["data_offsets"][0]) % tensors[name].element_size() == 0


def run_tool(*arguments: str) -> int:
    return regenerate.main([*arguments, "--jobs", "1"])


def test_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "new"
    assert run_tool("--root", str(root), "--only", "layout/f*") == 0
    assert Goldens(root).names() == ["layout/fold_scales_0_6_16", "layout/fold_scales_0_6_9"]
    assert Goldens(root).verify() == []
    assert run_tool("--root", str(root), "--only", "layout/fold*", "--check") == 0
    assert "2 cases, equal byte for byte" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    assert run_tool("--root", str(root), "--only", "layout/swap_halves") == 0
    assert len(Goldens(root).names()) == 3
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.name for path in before if before[path] != after[path]] == ["manifest.json"]

    path = root / "layout" / "swap_halves.json"
    path.write_bytes(path.read_bytes() + b" ")
    (root / "layout" / "fold_scales_0_6_9.safetensors").unlink()
    assert run_tool("--root", str(root), "--only", "layout/[fs]*", "--check") == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{path}: differs" in lines
    assert f"{root / 'layout' / 'fold_scales_0_6_9.safetensors'}: missing" in lines


def test_complete_check_finds_extra_files_and_a_wrong_manifest(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = {name: definition for name, definition in DEFINITIONS.items() if name == SMALL}
    monkeypatch.setattr(regenerate, "DEFINITIONS", only)
    assert run_tool("--root", str(root), "--check") == 1
    out = capsys.readouterr().out
    assert f"{root / 'manifest.json'}: differs" in out
    assert out.count("not a file of any case") == 2 * (len(BUILTIN) - 1)
    assert run_tool("--root", str(root)) == 0  # removes what is no case any more
    assert run_tool("--root", str(root), "--check") == 0
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [
        "fold_scales_0_6_16.json",
        "fold_scales_0_6_16.safetensors",
        "manifest.json",
    ]


def test_interrupted_run_leaves_old_files_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / f"{SMALL}.json"
    path.write_bytes(b"old")

    def interrupted(source: str, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tool("--root", str(root), "--only", SMALL)
    assert path.read_bytes() == b"old"
    assert not list(root.rglob(".writing-*"))


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("--only", "nothing/*") == 2
    assert "no case matches 'nothing/*'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        regenerate.main(["--jobs", "0"])


def test_installed_package_can_check_but_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = tmp_path / "site-packages" / "mxfp4ref" / "goldens" / "builtin"
    shutil.copytree(BUILTIN_ROOT, installed)
    monkeypatch.setattr(regenerate, "BUILTIN_ROOT", installed)
    monkeypatch.setattr(regenerate, "find_root", lambda: installed)
    assert run_tool("--check") == 0
    assert f"{installed}: {len(BUILTIN)} cases, equal byte for byte" in capsys.readouterr().out
    assert run_tool() == 2
    assert "--root: expected a folder to write to" in capsys.readouterr().err
    (installed / "gemm" / "more.json").write_text("{}")
    assert run_tool("--check") == 1


def test_processes_and_threads_do_not_matter() -> None:
    name = "finalize/stage_cancelling"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = regenerate.build_case(name)
        torch.set_num_threads(2)
        assert regenerate.build_case(name) == one
    finally:
        torch.set_num_threads(threads)


def test_no_golden_depends_on_tile_n() -> None:
    definition = DEFINITIONS["gemm/first_groups_underflow"]
    case = open_goldens(CHECKOUT).load(definition.id)
    even = case.call()
    # The same tokens in even positions do depend on it, which the definitions' check would refuse.
    from mxfp4ref.goldens.cases.definition import moe_content

    with pytest.raises(ValueError, match="depends on tile_n"):
        moe_content(even.select(slice(1, None)))


def test_normal_inputs_are_normal() -> None:
    from mxfp4ref.goldens.cases.source import Source

    values = Source("test/normal").normal("x", 1 << 14).to(torch.float64).numpy()
    assert abs(float(np.mean(values))) < 0.05
    assert 1.0 < float(np.std(values)) < 1.3
