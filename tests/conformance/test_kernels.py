"""Kernels under test: how they are loaded and called; flashinfer's own."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import (
    CaseResult,
    KernelError,
    Options,
    assert_bits_equal,
    load_kernel,
    run,
    run_case,
    running,
)
from mxfp4ref.conformance.kernel_names import wrong_name
from mxfp4ref.conformance.kernels.adapters import logical_arguments, plain_arguments, sm90_arguments
from mxfp4ref.conformance.kernels.loading import runnable
from mxfp4ref.formats import humming
from mxfp4ref.formats.generations import BYTEWISE, NEWEST
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.goldens import Case, open_goldens
from mxfp4ref.goldens.store import KINDS
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.sm90.tactics import Sm90Kernel, runnable_tactics, tactics_of
from tests.helpers import kernels_under_test
from tools.hardware import hardware

GOLDENS = open_goldens()
SMALL = "finalize/slot_order"


@pytest.fixture(scope="module")
def case() -> Case:
    return GOLDENS.load(SMALL)


def result_of(spec: str, case: Case) -> CaseResult:
    return run_case(load_kernel(spec), case)


def test_readme_names_the_arguments_that_a_kernel_is_called_with() -> None:
    """All of them, those of every call and those of some, by either prefix; by plain: the adapter's own."""
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    text = page.partition("All arguments come by name")[2].partition("Weights come interleaved")[0]
    parts = re.split("in some cases|for a kernel that takes it", text)
    every, sometimes, asked = (set(re.findall(r"`([a-z_0-9]+)`", part)) for part in parts)
    always = every | asked

    def kernel(*, output: Tensor | None = None, **others: Any) -> Any: ...

    cases = [GOLDENS.load(name) for name in GOLDENS.names() if not name.startswith("models/")]
    calls = [case.call() for case in cases if case.kind == "moe"]
    for spec in ("", "logical:"):
        prepare = logical_arguments(kernel) if spec else sm90_arguments(kernel, torch.clone, torch.clone)
        handed = [set(prepare("moe", call)[1]) for call in calls if spec or call.experts.quantized]
        assert set.intersection(*handed) == always
        assert set.union(*handed) == always | sometimes
    adapter = (files("mxfp4ref.conformance") / "templates" / "adapter.py.txt").read_text(encoding="utf-8")
    names = re.findall(r"^    (\w+): .* = ", adapter.partition(") -> Tensor")[0], re.MULTILINE)
    assert set().union(*(plain_arguments("moe", call)[1] for call in calls)) == set(names)


@pytest.mark.parametrize("spec", ["good", "logical:good_logical", "plain:good_plain"])
def test_adapters_hand_everything_over(spec: str) -> None:
    """Biases, SwiGLU parameters, expert and tensor parallelism, repeated experts."""
    prefix, _, name = spec.rpartition(":")
    path = ":".join(filter(None, (prefix, "tests.helpers.kernels_under_test", name)))
    names = [
        "activation/bias_before_clamp",
        "finalize/biases_inside_weight",
        "parallel/expert_and_tensor_rank_1",
    ]
    for name in [*names, "activation/gpt_oss_special_values"]:
        result = result_of(path, GOLDENS.load(name))
        assert result.status == "equal", result.message
        assert "128x128" in result.tiles


def test_a_prefix_that_is_one_too_many_is_told_first_and_without_our_frames(case: Case) -> None:
    found = result_of("logical:tests.helpers.kernels_under_test:good", case)
    assert found.status == "raised"
    assert found.message.startswith(
        "did you mean tests.helpers.kernels_under_test:good? ValueError: quant_scales[0]"
    )
    assert len(found.message) < 350
    assert re.findall(r"\.py:\d+ in (\w+)", found.message) == ["good"]


@pytest.mark.usefixtures("copied_processes")
def test_stage_kernels() -> None:
    report = run("stage:dequantize:tests.helpers.kernels_under_test:stage_dequantize", GOLDENS)
    assert report.ok
    assert {r.kind for r in report.results if r.status == "equal"} == {"dequantize"}
    moved = result_of(
        "stage:layout:tests.helpers.kernels_under_test:stage_layout_identity",
        GOLDENS.load("layout/swap_halves"),
    )
    assert moved.status == "differs"
    assert moved.diagnosis is not None
    assert "the same bytes in another order" in moved.diagnosis.patterns[0]


@pytest.mark.usefixtures("copied_processes")
def test_a_quantiser_may_return_a_tuple() -> None:
    report = run("stage:quantize:tests.helpers.kernels_under_test:stage_quantize", GOLDENS)
    assert report.ok
    ran = [r.case for r in report.results if r.status == "equal"]
    assert ran == [name for name in GOLDENS.names() if "/quantize_" in name]


@pytest.mark.parametrize(
    "spec", ["oracle", "defect:limit_ignored", "plain:absent:f", "stage:layout:absent:f"]
)
def test_a_name_tells_which_cases_are_run(spec: str) -> None:
    kinds = {"oracle": set(KINDS), "stage:layout:absent:f": {"layout"}}.get(spec, {"moe"})
    chooses = spec == "plain:absent:f"
    wanted = [
        n for n in GOLDENS.names() if GOLDENS.about(n)["kind"] in kinds and not (chooses and "tile_n/" in n)
    ]
    assert runnable(spec, GOLDENS, GOLDENS.names()) == wanted


def test_a_kernel_that_chooses_its_tiles_is_not_held_against_an_n_tile() -> None:
    names = GOLDENS.names("tile_n")
    skipped = run(kernels_under_test.good, (GOLDENS.load(name) for name in names))
    assert {r.status for r in skipped.results} == {"skipped"}
    assert skipped.results[0].message == "the output depends on the N tile, and good chooses its own"
    told = run("oracle", (GOLDENS.load(name) for name in names))
    assert {r.status for r in told.results} == {"equal"}
    outputs = {GOLDENS.load(name).output_hashes[128, 256] for name in names}
    assert len(outputs) == 3  # that of 64 and 128 is one


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "nonsense",
            "expected package.module:function, file.py:function, one of these two after logical:, plain: or",
        ),
        ("no.such.module:f", "cannot import 'no.such.module'"),
        ("tests.helpers.kernels_under_test:absent", "has no 'absent'"),
        ("tests.helpers.kernels_under_test:GOLDENS", "has no"),
        ("defect:limit_ignord", "limit_ignored"),
        ("defect:limit", "got 'limit'; did you mean limit_"),
        ("stage:moe:tests.helpers.kernels_under_test:good", "KIND one of quantize, dequantize"),
        ("flashinfer", "flashinfer"),
    ],
)
def test_wrong_kernels_are_refused(spec: str, message: str) -> None:
    with pytest.raises(KernelError, match=r"^kernel: ") as error:
        load_kernel(spec)
    assert message in str(error.value)


class TestFiles:
    """Kernels in a file of the working directory, where no package is installed."""

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
        monkeypatch.setattr(sys, "modules", sys.modules.copy())
        Path("neighbour.py").write_text(
            "def f(x, ids, scales, w1, s1, w2, s2, **others):\n    return x * 0\n\n"
            "def like_flashinfer(*, input, quant_scales, **others):\n    return input\n"
        )
        Path("own_kernel.py").write_text("from neighbour import f\n\ndef few(x):\n    return x\n")
        Path("broken.py").write_text("import math\n\nx = 1 / 0\nf = math.sqrt\n")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("own_kernel.py", "got 'own_kernel.py'; did you mean own_kernel.py:few?"),
            ("plain:own_kernel.py:nosuch", "'own_kernel.py' has no 'nosuch'; it has few"),
            ("absent.py:f", "there is no file 'absent.py'"),
            ("neighbor.py:f", "there is no file 'neighbor.py'; did you mean neighbour.py?"),
            ("absent.py", "got 'absent.py'; absent.py is no file of Python here"),
            (
                "own_kernel.py:few",
                "flashinfer's arguments by name: input, token_selected_experts, token_final_scales",
            ),
        ],
    )
    def test_what_is_wrong_with_a_file_is_told(self, spec: str, message: str) -> None:
        with pytest.raises(KernelError) as error:
            load_kernel(spec)
        assert message in str(error.value)
        assert str(error.value).count("did you mean") <= 1
        if spec == "absent.py:f":
            assert "did you mean" not in str(error.value)

    @pytest.mark.parametrize(
        "spec", ["plain:own_kernel:f", "plain:own_kernel.py:f", "plain:./own_kernel.py:f"]
    )
    def test_by_module_and_by_file(self, spec: str, case: Case) -> None:
        assert run_case(load_kernel(spec), case, Options(diagnosis="none")).status == "differs"

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("own_kernel", "package.module:function, file.py:function"),
            ("own_kernel.f", "did you mean own_kernel:f?"),
            ("plain:own_kernel.py", "did you mean plain:own_kernel.py:few?"),
            ("own_kernl.py:f", "there is no file 'own_kernl.py'; did you mean own_kernel.py"),
            ("own_kernel:fw", "has no 'fw'; did you mean few"),
            (
                "plain:own_kernel:few",
                "cannot be called: too many positional arguments. Its parameters are (x)",
            ),
            (
                "own_kernel:f",
                "kernel: did you mean plain:own_kernel:f? own_kernel:f is called with flashinfer's",
            ),
            ("logical:own_kernel.py:f", "kernel: did you mean plain:own_kernel.py:f?"),
            ("plain:neighbour:like_flashinfer", "kernel: did you mean neighbour:like_flashinfer?"),
            ("logical:own_kernel:few", "cannot be called"),
            ("stage:layuot:own_kernel:f", "did you mean layout?"),
            ("orcale", "did you mean oracle?"),
            ("plan:own_kernel:few", "got 'plan:' in 'plan:own_kernel:few'; did you mean plain:?"),
            ("own_kernel:few", "with plain: before it, f(x, ids, scales, w1, s1, w2, s2, **parameters)"),
            ("plain:own_kernel:few", "without plain:, or with logical: in its place, with flashinfer's"),
        ],
    )
    def test_what_is_meant_is_said(self, spec: str, message: str) -> None:
        with pytest.raises(KernelError) as error:
            load_kernel(spec)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        "text",
        [
            "from neighbour import *",
            "from neighbour import f as g",
            "globals().update(g=lambda **named: 0)",
            "def __getattr__(name):\n    return lambda **named: 0",
            "import sys\nsys.modules[__name__].g = len",
            "if 1:\n    class g: pass",
            "g = len",
            "def broken(",
        ],
    )
    def test_a_name_is_refused_unread_only_where_the_file_cannot_have_it(self, text: str) -> None:
        Path("dynamic.py").write_text(text)
        assert wrong_name("dynamic.py:g") == wrong_name("logical:dynamic:g") == ""

    @pytest.mark.parametrize("spec", ["broken:f", "broken.py:f"])
    def test_an_error_while_importing_is_where_it_was_raised(self, spec: str) -> None:
        with pytest.raises(
            KernelError, match=r"ZeroDivisionError: division by zero \(\S*broken\.py:3 in"
        ) as error:
            load_kernel(spec)
        assert "importlib" not in str(error.value)
        assert "broken" not in sys.modules


class TestFlashinfer:
    """The adapter, against a module that has flashinfer's names and the oracle inside."""

    @pytest.fixture(autouse=True)
    def _fake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[list[int]] = []
        self.helpers = SimpleNamespace(
            __version__="0.7.2.post1",
            cutlass_fused_moe=self.cutlass_fused_moe,
            interleave_moe_weights_for_sm90_mixed_gemm=lambda weight, quant_type: interleave_weights_sm90(
                weight
            ),
            interleave_moe_scales_for_sm90_mixed_gemm=lambda scales, group_size: fold_scales_sm90(scales),
        )
        for name in ("flashinfer", "flashinfer.fused_moe"):
            monkeypatch.setitem(sys.modules, name, self.helpers)

    def cutlass_fused_moe(self, *, profile_ids: list[int], enable_pdl: bool, **arguments: Any) -> list[Any]:
        self.seen.append(profile_ids)
        forced = Sm90Kernel(*(tactics_of(NEWEST)[number % 116] for number in profile_ids))
        return [*kernels_under_test.good(**arguments, kernel=forced), None, None, None]  # as flashinfer does

    def test_forces_every_pair_of_tiles(self) -> None:
        case = GOLDENS.load("gemm/mirrored_both_512")
        result = run_case(load_kernel("flashinfer", "cpu"), case, Options(repeat=False))
        assert result.status == "equal", result.message
        assert len(self.seen) == len(case.outputs)
        assert [0, 116] in self.seen
        assert [8, 120] in self.seen

    def test_all_tactics(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each runnable tactic of either GEMM once; the model gives what to expect of another N tile."""
        asked: list[MoeCall] = []
        monkeypatch.setattr(running, "forward", lambda call: (asked.append(call), forward(call))[1])
        case = GOLDENS.load("gemm/first_group_overflows")
        experts = case.call().experts
        shapes = [(2 * experts.intermediate_size, experts.hidden_size)]
        shapes.append((experts.hidden_size, experts.intermediate_size))
        expected = {
            tuple((Sm90Kernel(gemm1=tactic) if gemm == 0 else Sm90Kernel(gemm2=tactic)).profile_ids)
            for gemm, shape in enumerate(shapes)
            for tactic in runnable_tactics(*shape)
        }
        options = Options(repeat=False, all_tactics=True)
        report = run("flashinfer", [case], options, device="cpu", isolate=False)
        assert report.ok, report.verdict
        assert set(map(tuple, self.seen)) == expected
        assert len(report.results[0].tiles) == len(expected)
        assert {call.kernel.tile_n for call in asked} == {
            pair for n in (32, 64, 128, 256) for pair in ((n, 16), (16, n))
        }

    def test_all_tactics_of_another_kernel(self, case: Case) -> None:
        with pytest.raises(ValueError, match="all_tactics: expected a kernel"):
            run("oracle", [case], Options(all_tactics=True))

    def test_the_recording_tools_launch_the_same_kernel(self) -> None:
        case = GOLDENS.load("gemm/mirrored_hidden_1536")
        kernel = load_kernel("flashinfer", "cpu")
        for tile_k, expected in case.outputs.items():
            launch = hardware.launcher(kernel, case.call(Sm90Kernel.of_tiles(tile_k)), enable_pdl=True)
            for _ in range(2):
                assert_bits_equal(launch(), expected)
        assert len(self.seen) == 2 * len(case.outputs)

    @pytest.mark.parametrize("name", ["gemm/ordinary", "gemm/first_group_overflows"])
    def test_the_older_kernel_is_held_against_its_own_arithmetic(self, name: str) -> None:
        """0.6.17 takes profile_ids and ignores it, and differs from the goldens where the first groups overflow."""

        def older(input: Tensor, enable_pdl: bool, profile_ids: Any = None, **arguments: Any) -> list[Tensor]:
            assert profile_ids is None
            assert arguments["quant_scales"][0].dim() == 3
            kernel = Sm90Kernel(generation=BYTEWISE)
            return kernels_under_test.good(input=input, kernel=kernel, **arguments)  # type: ignore[no-any-return]

        self.helpers.interleave_moe_scales_for_sm90_mixed_gemm = lambda s, size: fold_scales_sm90(s, BYTEWISE)
        self.helpers.interleave_moe_weights_for_sm90_mixed_gemm = lambda w, kind: interleave_weights_sm90(
            w, BYTEWISE
        )
        self.helpers.cutlass_fused_moe = older
        self.helpers.__version__ = "0.6.17"
        kernel = load_kernel("flashinfer", "cpu")
        assert not kernel.forces_tile_k
        assert not kernel.forces_tactics
        case = GOLDENS.load(name)
        result = run_case(kernel, case)
        assert (result.status, result.tiles) == ("equal", ("128x128",)), result.message
        expected = case.outputs[128, 128]
        assert torch.equal(forward(case.call(Sm90Kernel(generation=BYTEWISE))), expected) == (
            name == "gemm/ordinary"
        )

    def test_an_unknown_release_is_refused(self) -> None:
        self.helpers.__version__ = "0.6.9"
        with pytest.raises(KernelError, match=r"flashinfer 0.6.9 has an older mainloop .*CONTRIBUTING"):
            load_kernel("flashinfer", "cpu")

    def test_other_bytes_from_a_helper_are_reported(self, case: Case) -> None:
        self.helpers.interleave_moe_weights_for_sm90_mixed_gemm = lambda weight, quant_type: weight
        result = run_case(load_kernel("flashinfer", "cpu"), case)
        assert result.status == "layout differs"
        assert "interleave_moe_weights_for_sm90_mixed_gemm gave other bytes" in result.message

    def test_needs_cuda(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
        with pytest.raises(KernelError, match="needs a CUDA device"):
            load_kernel("flashinfer")

    @pytest.mark.usefixtures("patient")
    @pytest.mark.parametrize("wrong", [False, True])
    def test_fp8_activations(self, wrong: bool) -> None:
        def w4a8(*, enable_pdl: bool, use_wfp4afp8_humming: bool, **arguments: Any) -> list[Any]:
            assert use_wfp4afp8_humming
            arguments |= {"strict": False, "use_wfp4afp8_humming": True}
            if wrong:
                scales = list(arguments["quant_scales"])
                arguments["quant_scales"] = [scales[0], scales[1] / 64, scales[2], scales[3], scales[4] / 64]
            return [*torch_ref_cutlass_fused_moe(**arguments), None]

        self.helpers.cutlass_fused_moe = w4a8
        self.helpers.interleave_moe_weights_for_sm90_mixed_gemm = lambda weight, quant_type: (
            humming.interleave(weight) if quant_type == "fp4_fp8" else None
        )
        cases = [GOLDENS.load(name) for name in GOLDENS.names() if "w4a8" in name]
        cases = [case for case in cases if case.kind == "w4a8"]
        assert len(cases) >= 14
        cases = cases[:2] if wrong else cases
        options = Options(diagnosis="quick")
        cases = cases[:3] if wrong else cases
        report = run("flashinfer-w4a8", cases, options, device="cpu", isolate=False)
        assert report.ok != wrong
        assert {result.status for result in report.results} == ({"differs"} if wrong else {"equal"})
        if wrong:
            assert "fp8_residual_uncompensated" in str(report.verdict)


def test_a_file_called_like_a_module_takes_nobodys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torch.py").write_text("import torch\ndef f(*a, **k): return torch.zeros(1)\n")
    kernel = load_kernel("plain:torch.py:f")
    assert sys.modules["torch"] is torch
    assert isinstance(kernel.function(), Tensor)
