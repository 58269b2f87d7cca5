"""The data set for flashinfer-bench: its structure, its bits, and that package's own checks of it."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bits
import pytest
import safetensors.torch
import torch

from mxfp4ref.export import export_flashinfer_bench
from mxfp4ref.golden import BUILTIN_ROOT, open_goldens

CHECKOUT = Path(__file__).parent.parent / "goldens"
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


def test_the_same_bytes_again(tmp_path: Path) -> None:
    goldens = open_goldens(BUILTIN_ROOT)
    for _ in range(2):
        assert export_flashinfer_bench(goldens, tmp_path / "a") == export_flashinfer_bench(
            goldens, str(tmp_path / "b")
        )
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) > 3


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="goldens: expected Goldens"):
        export_flashinfer_bench(CHECKOUT, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="folder: expected a path, got NoneType"):
        export_flashinfer_bench(open_goldens(BUILTIN_ROOT), None)  # type: ignore[arg-type]


def test_the_other_package_is_not_needed() -> None:
    script = "import sys, mxfp4ref.export; assert not any('flashinfer' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_flashinfer_bench_reads_it(exported: Any) -> None:
    pytest.importorskip("flashinfer_bench.data", reason="flashinfer-bench is not installed")
    data = importlib.import_module("flashinfer_bench.data")
    folder, names, _ = exported
    read = data.TraceSet.from_path(str(folder))
    traces = [trace for of_one in read.workloads.values() for trace in of_one]
    assert len(traces) == len(names)
    assert set(read.definitions) == set(read.workloads) == set(definitions(folder))
    for trace in traces:
        definition = read.definitions[trace.definition]
        inputs = []
        for name, source in trace.workload.inputs.items():
            if source.type == "scalar":
                inputs.append(source.value)
            else:
                tensor = safetensors.torch.load_file(folder / source.path)[source.tensor_key]
                assert tensor.dtype == definition.torch_input_dtypes[list(definition.inputs).index(name)]
                inputs.append(tensor)
        assert definition.get_axes_values_from_inputs(inputs) == trace.workload.axes
