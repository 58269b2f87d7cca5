"""The command line: what it prints, what it writes, how it exits."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from os import environ
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref._validate import check_tensor
from mxfp4ref.checkpoint import CheckpointLayer, read_layer, run_layer, write_layer
from mxfp4ref.conformance import comparison
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.conformance.findings.finding import STAGES
from mxfp4ref.conformance.reports.report import FORMAT
from mxfp4ref.conformance.reports.reproducer import load_reproducer, reproduce, write_reproducer
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats.generations import GENERATIONS
from mxfp4ref.goldens import GoldenError, Goldens, open_goldens, tensor_bytes
from mxfp4ref.goldens.hardware_record import compare
from mxfp4ref.goldens.runs import runs
from mxfp4ref.goldens.store import FETCH
from mxfp4ref.model.forward import forward
from mxfp4ref.model.parallel import Ranks
from mxfp4ref.sm90.activation import ACTIVATIONS
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import layers, usual

SMALL = "finalize/slot_order"
OVERFLOWING = "gemm/first_group_overflows"  # not the same in both generations of the kernel
COPIED = (SMALL, "layout/swap_halves", OVERFLOWING)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Goldens that may be damaged: one small suite."""
    source = open_goldens()
    root = tmp_path / "goldens"
    for name in COPIED:
        for kind in ("json", "safetensors"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.root / f"{name}.{kind}", root / f"{name}.{kind}")
    manifest = json.loads((source.root / "manifest.json").read_text())
    manifest["cases"] = {n: manifest["cases"][n] for n in COPIED}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_help_teaches() -> None:
    for arguments, words in (
        (["--help"], ["conform oracle", "Exit codes: 0"]),
        (["conform", "--help"], ["defect:NAME", "package.module:function", "--isolate", "Exit codes"]),
        (["verify", "-h"], ["--files-only", "real GPUs"]),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert all(word in result.output for word in words)
    listed = invoke("--help").output
    assert all(name in listed for name in ("compare", "defects", "explain", "regenerate", "show"))


def test_conform_passes(tmp_path: Path) -> None:
    result = invoke("conform", "oracle", "--case", SMALL, "-v", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert f"{SMALL}: equal (K tiles 128x128" in result.output
    words = (
        f"equals the expected bits in the one case that ran, of the goldens' {len(open_goldens().names())}.\n"
    )
    assert result.output.endswith(words)
    assert "\x1b" not in result.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["format"], written["ok"], written["results"][0]["differing"]) == (FORMAT, True, 0)


def test_a_verdict_on_the_built_in_cases_says_of_how_many_they_are_and_how_to_get_all(
    builtin_root: Path, tmp_path: Path
) -> None:
    """A wrong kernel may pass these few: nobody takes them for all, on a terminal or in a report."""
    few, every = len(Goldens(builtin_root).entries), len(open_goldens().entries)
    files = [word for kind in ("json", "junit", "html") for word in (f"--{kind}", tmp_path / f"r.{kind}")]
    result = invoke("conform", "oracle", "--goldens", builtin_root, "--case", "finalize", *files)
    assert result.exit_code == 0, result.output
    verdict = result.output.split("\n")[-2]
    assert verdict.startswith("oracle conforms on a few cases only: it equals ")
    assert (
        f"ran, of the goldens' {every}, of which {few} are built in. What only the other {every - few} "
        in verdict
    )
    assert verdict.endswith(f": {FETCH}")
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["verdict"], written["cases"]["ran"]) == (verdict, 1)
    assert (written["goldens"]["cases"], written["goldens"]["of"]) == (few, every)
    assert f'"goldens.of" value="{every}"' in (tmp_path / "r.junit").read_text()
    assert "conforms on a few cases only" in (tmp_path / "r.html").read_text()
    assert (
        f"{few} of {every} cases, 0 problems"
        in invoke("verify", "--files-only", "--goldens", builtin_root).output
    )
    wrong = ("defect:bf16_finalize", "--diagnosis", "none", "--case", "finalize", "--goldens", builtin_root)
    assert f"of the goldens' {every}, of which {few} are built in." in invoke("conform", *wrong).output
    unknown = invoke("show", "gemm/ordinary", "--goldens", builtin_root)
    assert (unknown.exit_code, FETCH in unknown.output) == (2, True)
    assert FETCH in invoke("show", "gemm/ordinary", "--goldens", tmp_path).output


@pytest.mark.usefixtures("patient")
def test_conform_fails_names_the_defect_and_writes_everything(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "junit", "html")}
    options = [x for kind, path in files.items() for x in (f"--{kind}", path)]
    cases = ("--case", SMALL, "--case", "finalize/cancelling_experts", "--case", "layout/swap*")
    options += ["--diagnosis", "quick"]
    result = invoke("conform", "defect:bf16_finalize", *cases, "--dump", tmp_path / "d", *options)
    assert result.exit_code == 1
    assert "finalize/slot_order: differs in" in result.output
    assert "first: output at [" in result.output
    assert "finding (every wrong bit): bf16_finalize: " in result.output
    assert "Every wrong bit is that of bf16_finalize" in result.output

    written = json.loads(files["json"].read_text())
    counts = {"every_wrong_bit_of": 2, "failing_cases": 2, "named_defects_of_all": ["bf16_finalize"]}
    assert written["finding"]["predicts"] == counts
    failed = [r for r in written["results"] if not r["ok"]]
    assert failed[0]["diagnosis"]["predictions"][0]["every_wrong_bit_of_this_output"] is True
    ulps = failed[0]["diagnosis"]["ulps"]
    assert sum(b["elements"] for b in ulps) > 0
    assert [(b["up_to"], b["nan"]) for b in ulps[3:]] == [
        (16, False),
        (256, False),
        (None, False),
        (None, True),
    ]

    suite = ElementTree.parse(files["junit"]).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["failures"]) == len(failed)
    assert (suite.attrib["errors"], suite.attrib["skipped"]) == ("0", "1")
    failure = suite.find(f"testcase[@name='{failed[0]['case'].split('/')[1]}']/failure")
    assert failure is not None
    assert "bf16_finalize" in (failure.text or "")

    html = files["html"].read_text()
    assert html.count("data:image/png;base64,") == 2 * len(failed)  # a map by token and one by expert
    assert "Every wrong bit is that of bf16_finalize" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html.replace("https://github.com/", "")

    script = tmp_path / "d" / "finalize-slot_order.py"
    assert script.is_file()
    stored = safetensors.torch.load_file(script.with_suffix(".safetensors"))
    assert stored["input"].shape[0] == 1


@pytest.mark.parametrize("name", ["gemm-ordinary.py", "gemm-ordinary.safetensors"])
def test_no_reproducer_replaces_what_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    arguments = ("conform", "defect:gate_up_swapped", "--case", "gemm/ordinary", "--diagnosis=none")
    result = invoke(*arguments, "--dump", tmp_path)
    assert result.exit_code == 1
    assert "its reproducer was not written: [Errno 17] expected a reproducer or none" in result.output
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    for _ in range(2):  # one of an earlier run is replaced
        assert "not written" not in invoke(*arguments, "--dump", tmp_path).output


@pytest.mark.parametrize(
    ("only_if", "kept"),
    [
        ("len(output) > 0", 1),
        ("len(output) > 2", 3),
        ("len(output) > 3", 16),
        ("not output[min(2, len(output) - 1)].mul_(2 if len(output) > 2 else 3).any()", 3),
    ],
    ids=["one token", "those before it too", "all", "wrong otherwise alone"],
)
def test_a_reproducer_is_cut_to_what_was_seen_to_fail(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only_if: str,
    kept: int,
) -> None:
    """A mistake in the third token, which needs none or some of the others."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kernel_by_place.py").write_text(
        "from mxfp4ref import torch_ref_cutlass_fused_moe\n\n\ndef f(**named):\n"
        "    output = torch_ref_cutlass_fused_moe(**named)[0]\n"
        f"    if {only_if}:\n        output[min(2, len(output) - 1)] *= 2\n    return output\n"
    )
    arguments = ("--case", "gemm/ordinary", "--no-repeat", "--no-isolate", "--diagnosis", "none")
    result = invoke("conform", "kernel_by_place:f", *arguments, "--dump", tmp_path / "d")
    assert result.exit_code == 1, result.output
    path = tmp_path / "d" / "gemm-ordinary.safetensors"
    _, call, expected = load_reproducer(path)
    assert len(call.input) == len(expected["output"]) == kept
    assert reproduce(path, "kernel_by_place:f") == 1
    assert ("[0, 0] here is [2, 0] of the whole call" in capsys.readouterr().out) == (kept == 1)
    sys.modules.pop("kernel_by_place")


@pytest.mark.usefixtures("copied_processes")
def test_a_reproducer_of_what_is_raised(tmp_path: Path) -> None:
    """Isolated; alone, the first token is computed."""
    (tmp_path / "raises_for_two.py").write_text(
        "from mxfp4ref import torch_ref_cutlass_fused_moe\n\n\ndef f(**named):\n"
        "    if len(named['input']) > 1:\n        raise RuntimeError('two')\n"
        "    return torch_ref_cutlass_fused_moe(**named)\n"
    )
    kernel = f"{tmp_path / 'raises_for_two.py'}:f"
    result = invoke("conform", kernel, "--case", "gemm/ordinary", "--dump", tmp_path / "d")
    assert "raised: RuntimeError: two" in result.output
    assert len(load_reproducer(tmp_path / "d" / "gemm-ordinary.safetensors")[1].input) == 16


def test_reproducer_reproduces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any working directory, and moved: also a kernel that was found in another one."""
    for name in ("here", "there", "moved"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)  # puts the path back that the script adds to
    monkeypatch.chdir(tmp_path / "here")
    imports = "from mxfp4ref.conformance.kernels.stand_ins import defect_kernel\n"
    source = imports + "wrong = defect_kernel('{}', 'cpu').function\n"
    Path("kernel_of_this_test.py").write_text(source.format("gate_up_swapped"))
    case, one = open_goldens().load("gemm/ordinary"), runs(open_goldens().load("gemm/ordinary"))[0]
    wrong = {"output": DEFECTS["gate_up_swapped"].run(one.inputs)}
    for number, kernel in enumerate(
        ("kernel_of_this_test:wrong", "kernel_of_this_test.py:wrong", "defect:gate_up_swapped")
    ):
        write_reproducer(tmp_path / "there", replace(case, name=f"case{number}"), one, kernel, wrong)
    for path in (tmp_path / "there").iterdir():
        path.rename(tmp_path / "moved" / path.name)
    monkeypatch.chdir("/")

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        script = str(tmp_path / "moved" / f"gemm-{name}.py")
        monkeypatch.setattr("sys.argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script)
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    code, said, _ = run("case2")
    assert code == 1
    assert said.startswith("gemm/case2: defect:gate_up_swapped on cpu\noutput: ")
    assert "elements differ, at most" in said
    assert said.endswith("the same bits that were recorded\n")
    assert run("case2", "oracle")[:2] == (
        0,
        "gemm/case2: oracle on cpu\noutput: equal\n    other bits than those that were recorded\n"
        "The mistake does not show here: this kernel passes the case as it is stored.\n",
    )
    for name in ("case0", "case1"):  # found, and not of flashinfer's signature
        assert "cannot import" not in run(name)[2]
    (tmp_path / "here" / "kernel_of_this_test.py").unlink()
    sys.modules.pop("kernel_of_this_test", None)
    for name in ("case0", "case1"):
        code, _, said = run(name)
        assert code == 2
        assert "cannot import" in said
        assert said.endswith(f"Another kernel or device: python gemm-{name}.py KERNEL DEVICE\n")


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conform"], "expected one KERNEL, as the argument or as --kernel"),
        (["conform", "nonsense"], "expected package.module:function"),
        (["conform", "limit_ignored"], "did you mean defect:limit_ignored?"),
        (["conform", "oracle", "--case", "nosuch/*"], "matches none of the"),
        (["conform", "oracle", "--goldens", "no_such_folder"], "no_such_folder"),
        (["conform", "oracle", "--mode", "loose"], "'loose' is not one of"),
        (["conform", "oracle", "--timeout", "0"], "0.0 is not in the range"),
        (["conform", "oracle", "--case", SMALL, "--json", "no/folder/r.json"], "there is no folder"),
        (
            ["conform", "torch-bf16", "--case", "layout/swap_halves"],
            "none of the 1 cases ran: 1 skipped, of kinds that it does not run",
        ),
        (["show", "gemm/ordinry"], "did you mean gemm/ordinary"),
        (
            ["explain", "ep_double"],
            "there is no defect, family or stage 'ep_double'; did you mean ep_double_mapping",
        ),
        (["compare", "absent", "absent"], "does not exist"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


_WITHOUT_TORCH = """\
import sys
from click.testing import CliRunner
from mxfp4ref.__main__ import commands

for line in sys.stdin.read().splitlines():
    result = CliRunner().invoke(commands, ["conform", *line.split()])
    print(result.exit_code, "torch" in sys.modules, result.output.splitlines()[-1])
"""


def test_what_can_be_told_before_torch_is_imported_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which takes seconds, as does importing a kernel: what is wrong with a name, and that nothing was run yet."""
    (tmp_path / "adapter.py").write_text("import torch\n\ndef fused_moe(x):\n    return x\n")
    wrong = {
        "plain:absent.py:f": "there is no file 'absent.py'",
        "plain:adapter.py:fused_mo": "'adapter.py' has no 'fused_mo'; did you mean fused_moe?",
        "adapter:f": "'adapter' has no 'f'; it has fused_moe",
        "adapter.py": "did you mean adapter.py:fused_moe?",
        "no_such_package.module:f": "No module named 'no_such_package'",
        "pln:adapter.py:fused_moe": "got 'pln:' in 'pln:adapter.py:fused_moe'; did you mean plain:?",
        "stage:gem:adapter.py:fused_moe": "did you mean gemm?",
        "defect:limit_ignord": "did you mean limit_ignored?",
        "plain:adapter.py:fused_moe --case gem": "--case: 'gem' matches none of the",
        "plain:adapter.py:fused_moe --exclude gemm/*x": "--exclude: 'gemm/*x' matches none of the",
    }
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH],
        input="\n".join(wrong),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stderr == ""
    for line, words in zip(done.stdout.splitlines(), wrong.values(), strict=True):
        assert line.startswith("2 False Error: ")
        assert words in line

    def interrupted(*arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mxfp4ref.conformance.cli.conform"], "_conform", interrupted)
    result = invoke("conform", "oracle")
    said = "oracle: interrupted before any case was run: no verdict\n"
    assert (result.exit_code, result.output) == (130, said)


def test_damaged_goldens_are_no_verdict(copy: Path) -> None:
    path = copy / f"{SMALL}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    result = invoke("conform", "oracle", "--goldens", copy)
    assert result.exit_code == 2
    assert "damaged" in result.output
    result = invoke("verify", "--goldens", copy)
    assert result.exit_code == 1
    assert "1 problems with files" in result.output


def test_verify(copy: Path) -> None:
    result = invoke("verify", "--goldens", copy)
    assert result.exit_code == 0, result.output
    assert "hardware record: none" in result.output
    assert "oracle conforms" in result.output


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("goldens.store._verify", GoldenError("truncated?"), "Error: truncated?"),
        ("conformance.suite.compare_case", TypeError("ours"), "an error of mxfp4ref itself, no verdict"),
    ],
)
def test_what_ends_a_run_costs_no_result_before_it(
    copy: Path, where: str, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, name = f"mxfp4ref.{where}".rpartition(".")
    function = getattr(importlib.import_module(path), name)

    def broken(*arguments: Any) -> Any:
        if any("layout/swap_halves" in str(getattr(one, "id", one)) for one in arguments):
            raise error
        return function(*arguments)

    monkeypatch.setattr(f"mxfp4ref.{where}", broken)
    written = copy.parent / "report.json"
    result = invoke("conform", "oracle", "--goldens", copy, "--json", written)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    report = json.loads(written.read_text())
    assert [(one["case"], one["status"]) for one in report["results"]] == [
        (SMALL, "equal"),
        (OVERFLOWING, "equal"),
    ]
    assert (report["interrupted"], report["left"]) == (True, 1)
    assert "interrupted, no verdict; 0 of 2 cases failed" in result.output


def test_verify_holds_the_hardware_record_against_the_goldens(copy: Path) -> None:
    goldens = Goldens(copy)
    pair, digest = next(iter(goldens.load(SMALL).output_hashes.items()))
    record = {"case": SMALL, "tile_k": list(pair), "sha256": digest, "equal": True, "gpu": "NVIDIA H100"}
    folder = copy / "hardware"
    folder.mkdir()
    path = folder / "h100.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert compare(goldens) == ([record], [])
    said = "hardware record: 1 runs of golden calls on NVIDIA H100: 1 equal, 0 differ\n"
    assert said in invoke("verify", "--goldens", copy, "--files-only").output
    race = {
        "sha256": "0" * 64,
        "equal": False,
        "repeatable": False,
        "generation": "0.6.9",
        "flashinfer": "0.6.17",
    }
    path.write_text("".join(json.dumps(one) + "\n" for one in (record, {**record, **race})))
    result = invoke("verify", "--goldens", copy, "--files-only")
    assert result.exit_code == 0
    assert "1 equal, 1 differ (flashinfer: 1 of 0.6.17; a known race of these releases" in result.output

    for change, message in (
        ({"sha256": "0" * 64}, "recorded SHA-256 000"),
        ({"tile_k": [64, 64]}, "no output for these tiles"),
        ({"case": "gone/case"}, "there is no such case"),
        ({"equal": False}, "recorded as different"),
    ):
        path.write_text(json.dumps({**record, **change}) + "\n")
        result = invoke("verify", "--goldens", copy, "--files-only")
        assert result.exit_code == 1
        assert message in result.output
        assert "; 1 contradict the goldens\n" in result.output
        assert "a known race" not in result.output
    path.write_text("{}\n")
    assert invoke("verify", "--goldens", copy).exit_code == 2


def test_records_of_older_kernels_are_held_against_the_model_of_their_generation(copy: Path) -> None:
    goldens = Goldens(copy)
    call = goldens.load(OVERFLOWING).call()
    old, new = (forward(replace(call, kernel=Sm90Kernel(generation=g))) for g in GENERATIONS)
    assert bool(differing(old, new).any())
    (copy / "hardware").mkdir()
    for output, generation, problems in ((old, "0.6.9", 0), (old, "0.6.16", 1), (new, "0.6.16", 0)):
        digest = hashlib.sha256(tensor_bytes(output)).hexdigest()
        record = {"case": OVERFLOWING, "tile_k": [128, 128], "sha256": digest, "equal": True, "gpu": "H100"}
        line = json.dumps({**record, "generation": generation})
        (copy / "hardware" / "h100.jsonl").write_text(f"{line}\n")
        assert len(compare(goldens)[1]) == problems


def test_show() -> None:
    result = invoke("show", SMALL, "--values")
    assert result.exit_code == 0
    for words in (SMALL, "kind: moe", "why: ", "token_final_scales", "float32 [", "SHA-256", "tp_size = 1"):
        assert words in result.output


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_mistake_of_the_kit_is_no_wrong_usage(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody wrote a message for is told with its traceback; what was is one line."""
    for name in "ab":
        safetensors.torch.save_file({"output": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    wrong: Any = {
        TypeError: lambda *tensors: None + 1,
        RuntimeError: lambda *tensors: torch.ones(2) + torch.ones(3),
    }
    monkeypatch.setattr(comparison, "in_words", wrong[error])
    result = invoke("compare", *files)
    assert result.exit_code == 2
    assert "Traceback" in result.output
    assert "an error of mxfp4ref itself, no verdict; please report what stands above" in result.output
    monkeypatch.setattr(comparison, "in_words", lambda *tensors: check_tensor("got", 3, dtype=None, shape=()))
    result = invoke("compare", *files)
    assert (result.exit_code, result.output) == (2, "Error: got: expected a tensor of shape [], got int\n")


def test_compare(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3).to(torch.bfloat16)
    other = values.clone()
    other[1, 2] = 5.03125
    nan = other.clone()
    nan[0] = torch.tensor([torch.nan, torch.inf, torch.nan])
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    safetensors.torch.save_file({"output": values}, a)
    safetensors.torch.save_file({"output": other}, b)
    safetensors.torch.save_file({"output": values, "more": other}, c)
    alias = tmp_path / "alias.safetensors"
    alias.hardlink_to(a)
    for same in (a, alias):  # that a file equals itself is no verdict
        result = invoke("compare", a, same)
        assert result.exit_code == 2
        assert f"{same}: expected another file than {a}" in " ".join(result.output.split())
    alias.unlink()
    alias.write_bytes(a.read_bytes())
    assert invoke("compare", a, alias).exit_code == 0
    result = invoke("compare", b, a)
    assert result.exit_code == 1
    assert "1 of 6 elements differ, at most 1 ulp; first at [1, 2]: got 0x40A1 (5.03125)" in result.output
    assert result.output.splitlines()[-1] == "different: 1 of 1 tensor"
    safetensors.torch.save_file({"output": nan}, b)
    assert (
        " 4 of 6 elements differ, at most 16,384 ulp, 2 of them with a NaN; "
        in invoke("compare", b, a).output
    )
    result = invoke("compare", a, c)  # of an output alone, with what `layer` writes
    assert result.exit_code == 0
    assert f"more: only in {c}, not compared" in result.output
    assert result.output.splitlines()[-1] == "equal: 1 tensor; 1 in one file only, not compared"
    safetensors.torch.save_file({"routed_output": values, "ids": values[:1].clone()}, b)
    result = invoke("compare", a, b)
    assert result.exit_code == 2
    assert f"got output in {a} and ids, routed_output in {b}" in " ".join(result.output.split())
    assert "output and routed_output are both bfloat16 [2, 3]" in " ".join(result.output.split())
    for empty in (b, c):
        safetensors.torch.save_file({}, empty)
    result = invoke("compare", b, c)
    assert result.exit_code == 2
    assert "expected tensors to compare, got none" in result.output
    b.write_bytes(b"nonsense")
    result = invoke("compare", a, b)
    assert result.exit_code == 2
    assert "expected a safetensors file" in result.output


def test_layer_runs_from_disk(tmp_path: Path) -> None:
    experts = layers.random_experts(0)
    checkpoint, hidden, written = (tmp_path / f"{name}.safetensors" for name in ("model", "hidden", "out"))
    bias = torch.full((4,), 8.08)
    write_layer(
        checkpoint,
        CheckpointLayer(
            "deepseek_v4", "layers.3.ffn.", experts, 128, 128, torch.randn(4, 128).bfloat16(), bias
        ),
    )
    safetensors.torch.save_file({"hidden": torch.randn(5, 128).to(torch.bfloat16)}, hidden)
    arguments = ["layer", "--checkpoint", checkpoint, "--layer", 3, "--input", hidden, "--output", written]
    options = ["--top-k", 2, "--routed-scaling-factor", 1.5, "--limit", 10]
    result = invoke(*arguments, *options)
    assert result.exit_code == 0, result.output
    assert f"written: {written}" in result.output
    found = safetensors.torch.load_file(written)
    stored = replace(read_layer(checkpoint, 3, limit=10.0), top_k=2, routed_scaling_factor=1.5)
    expected = run_layer(stored, hidden)
    assert torch.equal(found["output"].view(torch.int16), expected["output"].view(torch.int16))
    result = invoke(*arguments, *options, "--ep-size", 3, "--expert-placement", "round_robin")
    assert result.exit_code == 0, result.output
    found = safetensors.torch.load_file(written)
    dealt = run_layer(stored, hidden, ranks=Ranks(ep_size=3, expert_map=[[0, 3], [1], [2]]))
    assert torch.equal(found["output"].view(torch.int16), dealt["output"].view(torch.int16))
    assert not torch.equal(dealt["output"], expected["output"])
    result = invoke(*arguments, *options, "--tp-size", 2, "--tp-rank", 1)
    assert result.exit_code == 0, result.output
    found = safetensors.torch.load_file(written)
    of_rank = run_layer(stored, hidden, ranks=Ranks(tp_size=2, tp_rank=1))
    assert torch.equal(found["rank_output"].view(torch.int16), of_rank["rank_output"].view(torch.int16))
    for more, message in (
        (["--tp-rank", 1], "--tp-rank: expected --tp-size with it, the number of ranks, got 1"),
        (["--tp-size", 2, "--tp-rank", 0, "--ep-size", 2], "--tp-rank: expected --ep-rank, too"),
        (["--tp-size", 3], "tp_size: expected a divisor of the intermediate size 128, such as 1, 2, 4"),
    ):
        refused = invoke(*arguments, *options, *more)
        assert (refused.exit_code, message in refused.output) == (2, True)
    many = invoke(*arguments, *options, "--ep-size", 5)
    assert many.exit_code == 2
    assert "ep_size: expected an int from 1 to 4, got 5" in many.output
    wrong = invoke("layer", "--checkpoint", checkpoint, "--layer", 4, "--input", hidden, *options)
    assert wrong.exit_code == 2
    assert "layer" in wrong.output


def test_kernel_as_an_option() -> None:
    result = invoke("conform", "--kernel", "oracle", "--case", "finalize/slot_order")
    assert result.exit_code == 0
    assert invoke("conform", "oracle", "--kernel", "oracle").exit_code == 2


def test_stages_and_families_are_explained() -> None:
    slots = invoke("explain", "slots")
    assert slots.exit_code == 0
    assert "stage slots\nWhat is in it: which expert" in slots.output
    assert "ep_offset_dropped" in slots.output
    both = invoke("explain", "input").output
    assert "stage input\n" in both
    assert "family input\nIts changes: rows or columns of the input at another place" in both
    assert invoke("explain", "K", "groups").output == invoke("explain", "K groups").output
    for name in STAGES:
        assert invoke("explain", name).exit_code == 0
    unknown = invoke("explain", "slot")
    assert unknown.exit_code == 2
    assert "did you mean slots" in unknown.output
    assert "a family (another expert's, rows" in invoke("explain", "xyzzy").output


def test_defects_and_explain() -> None:
    listed = invoke("defects").output
    assert all(f"  {name} " in listed for name in DEFECTS)
    assert len(json.loads(invoke("defects", "--json").output)) == len(DEFECTS)
    limits = invoke("defects", "limit_*").output
    assert "  limit_ignored " in limits
    assert "  nibble_order " not in limits + invoke("defects", "finalize").output
    groups = invoke("defects", "K groups", "--json", "scale_off*", "routing").output
    chosen = {row["name"]: row["target"] for row in json.loads(groups)}
    assert {"nibble_order", "scale_off_by_one_group"} < set(chosen)
    assert set(chosen.values()) == {"moe", "routing"}
    kinds = json.loads(invoke("defects", "arithmetic", "--json").output)
    assert {row["kind"] for row in kinds} == {"arithmetic"}
    assert invoke("defects", "some rows").output.startswith("some rows\n")  # a family without named members
    wrong = invoke("defects", "limit_ignord")
    assert (wrong.exit_code, "did you mean limit_ignored" in wrong.output) == (2, True)
    result = invoke("explain", "limit_one_sided")
    assert result.exit_code == 0
    for words in (
        "up clamped from above only",
        "vllm#47392",
        "activation/up_clamp_saturates",
        "conform defect:",
    ):
        assert words in result.output


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize(("like", "prefix"), [("plain", "plain:"), ("flashinfer", "")])
def test_init_writes_an_adapter_that_conforms_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like: str, prefix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written = invoke("init", "adapter", "--like", like)
    assert written.exit_code == 0, written.output
    assert f"conform {prefix}adapter.py:fused_moe" in written.output
    text = Path("adapter.py").read_text()
    assert f"mxfp4ref conform {prefix}adapter.py:fused_moe" in text
    for number, activation in ACTIVATIONS.items():
        assert f" {number} {activation.name}" in text
    assert max(map(len, text.splitlines())) <= 120
    result = invoke("conform", f"{prefix}adapter.py:fused_moe", "--case", SMALL, "--no-repeat")
    assert result.exit_code == 0, result.output
    Path("adapter.py").write_text("mine")
    for name, message in (("adapter.py", "nothing is written over it"), ("my-kernel.txt", "a Python module")):
        refused = invoke("init", "adapter", name)
        assert refused.exit_code == 2
        assert message in refused.output
    assert Path("adapter.py").read_text() == "mine"
    odd = Path('a"""\\\n', "adapter.py")
    odd.parent.mkdir()
    assert invoke("init", "adapter", odd).exit_code == 0
    compile(odd.read_text(), "adapter.py", "exec")


@pytest.mark.usefixtures("copied_processes")
def test_init_writes_a_router_that_conforms_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "stage:routing:router.py:route --mode bounded" in invoke("init", "router").output
    text = Path("router.py").read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert "deepseek_v3, deepseek_v4, gpt_oss, mixtral" in text
    result = invoke("conform", "stage:routing:router.py:route", "--no-repeat")
    assert result.exit_code == 0, result.output
    assert "14 passed" in result.output
    told = [line for line in result.output.splitlines() if line.endswith("passed")]
    assert len(told) == 1  # nothing of suites that are not a router's


def test_a_pattern_that_matches_nothing_names_what_is_near(copy: Path) -> None:
    result = invoke("conform", "oracle", "--goldens", copy, "--case", "finlize")
    assert result.exit_code == 2
    assert "did you mean finalize?" in result.output


@pytest.mark.parametrize("spec", ["plain:adapter:fused_moe", "plain:adapter.py:fused_moe"])
def test_no_report_replaces_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("init", "adapter")
    text = Path("adapter.py").read_text()
    refused = invoke("conform", spec, "--case", SMALL, "--json", tmp_path / "adapter.py")
    assert refused.exit_code == 2
    assert "adapter.py" in refused.output
    assert Path("adapter.py").read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [("| limit_ignored |  |", "| limit_ignored |", 2), ("42.7 %", "\0\x1b[2J", 0), ("## activation", "", 0)],
)
def test_a_damaged_matrix_is_told(tmp_path: Path, old: str, new: str, code: int) -> None:
    """It is no golden: what else it may say of cases that there are is believed."""
    goldens = open_goldens()
    shutil.copy(goldens.root / "manifest.json", tmp_path)
    for name in goldens.names():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").symlink_to(goldens.root / f"{name}.json")
    text = (goldens.root / "defect_matrix.md").read_text()
    assert old in text
    (tmp_path / "defect_matrix.md").write_text(text.replace(old, new))
    result = invoke("list", "limit_ignored", "--goldens", tmp_path)
    assert (result.exit_code, "\x1b" in result.output) == (code, False)
    assert ("defect_matrix.md: expected a share of " in result.output) == (code == 2)


def test_list_names_cases_as_other_commands_take_them(
    monkeypatch: pytest.MonkeyPatch, builtin_root: Path
) -> None:
    shown = invoke("list", "finalize", "gemm/ord*")
    assert shown.exit_code == 0
    assert SMALL in shown.output
    assert "gemm/ordinary" in shown.output
    assert "gemm/overflow" not in shown.output
    rows = json.loads(invoke("list", "--json").output)
    assert [row["case"] for row in rows] == open_goldens().names()
    (row,) = (row for row in rows if row["case"] == SMALL)
    assert row["catches"] == list(open_goldens().load(SMALL).catches)
    assert "..." not in invoke("list").output
    goldens = open_goldens()
    made = [case for case in goldens.names() if "limit_ignored" in goldens.load(case).catches]
    table = (goldens.root / "defect_matrix.md").read_text()
    count = int(re.search(r"^\| limit_ignored \| defect \| (\d+) \|", table, re.MULTILINE)[1])  # type: ignore[index]
    caught = invoke("list", "limit_ignored").output
    assert f"{count} of " in caught
    listed = [line.split()[0] for line in caught.splitlines()[1:-2]]
    assert {"activation/bias_before_clamp", *made} < {*listed}
    assert len(listed) == count
    assert caught.endswith(
        f"\nlimit_ignored: {len(made)} of these are made for it; the others catch it too\n"
    )
    few = invoke("list", "ep_sentinel_aliases", "--goldens", builtin_root)
    assert "; goldens/defect_matrix.md of a checkout has those that catch it besides\n" in few.output
    monkeypatch.setattr(Goldens, "_load", None)  # no tensor is read for it
    assert json.loads(invoke("list", "--json", SMALL).output)[0]["bytes"] > 0
    refused = invoke("list", "finlize")
    assert refused.exit_code == 2
    assert "did you mean finalize?" in refused.output


def test_doctor(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in environ if name.startswith(("MXFP4REF", "FLASHINFER"))]:
        monkeypatch.delenv(name)
    well = invoke("doctor", "--goldens", copy, "--json")
    found = json.loads(well.stdout)
    assert (well.exit_code, found["problems"]) == (0, {})
    assert well.stderr.splitlines() == [f"checking {what} ..." for what in ("goldens", "bits")]
    assert found["facts"]["vllm"] == "not installed"
    assert found["facts"]["environment"] == "no MXFP4REF* and no FLASHINFER*"
    assert found["facts"]["torch"] == torch.__version__
    assert found["facts"]["self-test"].startswith(
        "oracle conforms: 1 of 3 cases, every fourth of activation, "
    )
    (copy / f"{SMALL}.safetensors").write_bytes(b"")
    ill = invoke("doctor", "--goldens", copy)
    assert ill.exit_code == 1
    assert "! goldens: 1 files are not those of the manifest" in ill.output


@pytest.mark.parametrize(("option", "failures"), usual.first(1, [(("-x",), 1), (("--maxfail", "2"), 2)]))
def test_a_run_stops_when_enough_has_failed(option: tuple[str, ...], failures: int) -> None:
    arguments = ("conform", "defect:limit_ignored", "--case", "activation", "--diagnosis=none")
    result = invoke(*arguments, *option)
    assert result.exit_code == 1
    assert f"does not conform: {failures} of " in result.output
    few = "the one case" if failures == 1 else f"the {failures} cases"
    *before, last = result.output.splitlines()
    digest = open_goldens().sha256
    assert sum(f"SHA-256 {digest[:12]}...)" in line for line in before) == 1
    assert digest not in result.output  # which -v tells, as JSON does
    assert last.startswith(f"Judged from {few} that failed; without {option[0]}, ")
    assert last.endswith(
        "may tell more: mxfp4ref conform defect:limit_ignored --diagnosis none --case activation"
    )
    assert "may tell more" not in invoke(*arguments).output
    others = (
        "--case",
        "activation/bias_before_clamp",
        "--case",
        "sizes/eight_slots",
        "--case",
        "layout/swap_halves",
    )
    more = invoke(*arguments[:2], *others, "--diagnosis=none", "-x").output
    assert "without -x, 1 other case may tell more: " in more  # which no layout is
    assert invoke(*arguments, "--maxfail", "0").exit_code == 2


@pytest.mark.usefixtures("copied_processes")
def test_an_empty_kernel_is_wrong_usage() -> None:
    result = invoke("conform", "", "--case", SMALL)
    assert (result.exit_code, "kernel: expected package.module:function" in result.output) == (2, True)


def test_reproducers_that_were_not_written_are_not_announced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke(
        *("conform", "defect:bf16_finalize", "--case", SMALL, "--diagnosis", "none"),
        *("--dump", tmp_path / "file" / "folder"),
    )
    assert result.exit_code == 1
    assert "its reproducer was not written" in result.output
    assert "Reproducers: " not in result.output


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "Error: there is not enough memory"),
        (
            ImportError("libtorch.so: failed to map", name="torch"),
            "Error: what is installed cannot be imported",
        ),
        (ImportError("no such name", name="mxfp4ref.formats"), "Error: an error of mxfp4ref itself"),
    ],
)
def test_faults_of_the_machine_are_no_verdict(
    error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["mxfp4ref.conformance.cli.conform"], "check_no_swap", fails)
    result = invoke("conform", "oracle", "--case", SMALL)
    assert result.exit_code == 2
    assert words in result.output
