"""The data set for flashinfer-bench: its structure, its bits, and that package's own checks of it."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.flashinfer_bench import export_flashinfer_bench
from tests.helpers import bits

CHECKOUT = Path(__file__).parents[2] / "goldens"
DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "int32": torch.int32, "float32": torch.float32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, str]]:
    folder = tmp_path_factory.mktemp("dataset")
    return folder, *export_flashinfer_bench(open_goldens(CHECKOUT), folder)


def definitions(folder: Path) -> dict[str, Any]:
    read = [json.loads(path.read_text()) for path in (folder / "definitions").rglob("*.json")]
    return {definition["name"]: definition for definition in read}


def workloads(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "workloads").rglob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def contents_of(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(commands, arguments)


def test_every_case_is_exported_or_left_out_for_a_reason(exported: Any) -> None:
    folder, names, left_out = exported
    goldens = open_goldens(CHECKOUT)
    kernel_calls = [name for name in goldens.names() if goldens.load(name).kind == "moe"]
    assert sorted([*names, *left_out]) == kernel_calls
    assert len(names) > 40
    assert all(goldens.load(name).derived for name, why in left_out.items() if "generated" in why)
    assert "gemm/overflow" in left_out
    uuids = [trace["workload"]["uuid"] for trace in workloads(folder)]
    assert sorted(uuids) == sorted(name.replace("/", "-") for name in names)


def test_structure(exported: Any) -> None:
    folder, _, _ = exported
    known = definitions(folder)
    used = set()
    for trace in workloads(folder):
        definition, workload = known[trace["definition"]], trace["workload"]
        used.add(trace["definition"])
        assert trace["solution"] is None
        assert trace["evaluation"] is None
        assert list(workload["inputs"]) == list(definition["inputs"])
        assert set(workload["axes"]) == set(definition["axes"])
        for constraint in definition["constraints"]:
            assert eval(constraint, {}, dict(workload["axes"])), (workload["uuid"], constraint)
        for name, source in workload["inputs"].items():
            spec = definition["inputs"][name]
            if spec["shape"] is None:
                assert type(source["value"]) is int
                continue
            assert not Path(source["path"]).is_absolute()
            tensor = safetensors.torch.load_file(folder / source["path"])[source["tensor_key"]]
            assert tensor.dtype == DTYPES[spec["dtype"]]
            assert list(tensor.shape) == [workload["axes"][axis] for axis in spec["shape"]]
    assert used == set(known)


def test_reference_takes_the_inputs_in_order(exported: Any) -> None:
    folder, _, _ = exported
    for definition in definitions(folder).values():
        (function,) = [
            node for node in ast.parse(definition["reference"]).body if isinstance(node, ast.FunctionDef)
        ]
        assert function.name == "run"
        assert [argument.arg for argument in function.args.args] == list(definition["inputs"])


def test_reference_gives_the_golden_bits(exported: Any) -> None:
    """One workload of each definition, and all of those on ranks, whose scalars matter."""
    folder, _, _ = exported
    goldens = open_goldens(CHECKOUT)
    known = definitions(folder)
    done: set[str] = set()
    for trace in workloads(folder):
        uuid = trace["workload"]["uuid"]
        if trace["definition"] in done and not uuid.startswith("parallel-"):
            continue
        done.add(trace["definition"])
        module: dict[str, Any] = {}
        exec(known[trace["definition"]]["reference"], module)
        inputs = []
        for source in trace["workload"]["inputs"].values():
            if source["type"] == "scalar":
                inputs.append(source["value"])
            else:
                stored = safetensors.torch.load_file(folder / source["path"])
                inputs.append(stored[source["tensor_key"]])
        got = module["run"](*inputs)
        bits.assert_same(got, goldens.load(uuid.replace("-", "/", 1)).outputs[128, 128])
        bits.assert_same(got, stored["output"])
    assert done == set(known)


def test_the_same_bytes_again(builtin_root: Path, tmp_path: Path) -> None:
    goldens = open_goldens(builtin_root)
    for _ in range(2):
        assert export_flashinfer_bench(goldens, tmp_path / "a") == export_flashinfer_bench(
            goldens, str(tmp_path / "b")
        )
    assert contents_of(tmp_path / "a") == contents_of(tmp_path / "b")
    assert len(contents_of(tmp_path / "a")) > 3


def test_wrong_arguments(builtin_root: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="goldens: expected Goldens"):
        export_flashinfer_bench(CHECKOUT, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="folder: expected a path, got NoneType"):
        export_flashinfer_bench(open_goldens(builtin_root), None)  # type: ignore[arg-type]


def test_command(builtin_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dataset"
    result = invoke("export", str(folder), "--goldens", str(builtin_root))
    assert result.exit_code == 0, result.output
    names, left_out = export_flashinfer_bench(open_goldens(builtin_root), tmp_path / "direct")
    *reasons, last = result.output.splitlines()
    assert last == f"{folder}: {len(names)} workloads written, {len(left_out)} cases left out"
    assert reasons == [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    assert contents_of(folder) == contents_of(tmp_path / "direct")


def test_command_refuses(builtin_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(builtin_root, tmp_path / "goldens")
    (tmp_path / "file").touch()
    manifest = json.loads((root / "manifest.json").read_text())
    layouts = {name: entry for name, entry in manifest["cases"].items() if name.startswith("layout/")}
    (root / "manifest.json").write_text(json.dumps(manifest | {"cases": layouts}))
    for arguments, message in (
        (["export"], "Missing argument 'DIR'"),
        (["export", str(tmp_path / "file")], "is a file"),
        (["export", str(tmp_path / "file" / "below"), "--goldens", str(builtin_root)], "Not a directory"),
        (["export", str(tmp_path / "a"), "--goldens", str(tmp_path)], "manifest.json: cannot be read"),
        (["export", str(tmp_path / "a"), "--goldens", str(root)], "no case can be exported"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert message in result.output
    assert not (tmp_path / "a").exists()


def test_nothing_of_others_is_replaced(builtin_root: Path, tmp_path: Path) -> None:
    goldens, folder = open_goldens(builtin_root), tmp_path / "a"
    export_flashinfer_bench(goldens, folder)
    name = sorted(contents_of(folder))[-1]
    shutil.rmtree(folder)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    result = invoke("export", str(folder), "--goldens", str(builtin_root))
    assert (result.exit_code, f"written: '{folder / name}'" in result.output) == (2, True), result.output
    assert contents_of(folder) == {name: b"mine"}


@pytest.mark.usefixtures("copied_processes")
def test_the_other_package_is_not_needed() -> None:
    script = (
        "import sys, mxfp4ref.goldens.flashinfer_bench\n"
        "assert not any(name.startswith('flashinfer') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_flashinfer_bench_reads_it(exported: Any) -> None:
    """By its own code: the schema, the tensors, and for each definition the reference on a workload."""
    pytest.importorskip("flashinfer_bench.data", reason="flashinfer-bench is not installed")
    data, bench, build = (
        importlib.import_module(f"flashinfer_bench.{name}") for name in ("data", "bench.utils", "compile")
    )
    folder, names, _ = exported
    read = data.TraceSet.from_path(str(folder))
    assert sum(map(len, read.workloads.values())) == len(names)
    assert set(read.definitions) == set(read.workloads) == set(definitions(folder))
    for name, traces in read.workloads.items():
        definition = read.definitions[name]
        for trace in traces:
            tensors = bench.load_safetensors(definition, trace.workload, folder)
            inputs = bench.gen_inputs(definition, trace.workload, "cpu", tensors)
            assert definition.get_axes_values_from_inputs(inputs) == trace.workload.axes
        got = build.BuilderRegistry.get_instance().build_reference(definition)(*inputs)
        stored = safetensors.torch.load_file(folder / trace.workload.inputs["input"].path)
        bits.assert_same(got, stored["output"])
