"""Running kernels over goldens: what passes, what is reported and how it is named."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import kernels
from mxfp4ref.conformance import suite as conformance
from mxfp4ref.conformance.adapters import KernelError
from mxfp4ref.conformance.kernels import load_kernel
from mxfp4ref.conformance.results import CaseResult, Report, name_defects
from mxfp4ref.conformance.suite import run, run_case
from mxfp4ref.defects import DEFECTS
from mxfp4ref.formats.generations import BYTEWISE, NEWEST
from mxfp4ref.formats.layout import fold_scales_sm90, interleave_weights_sm90
from mxfp4ref.goldens import Case, open_goldens
from mxfp4ref.sm90.tactics import Sm90Kernel, runnable_tactics, tactics_of
from tests.helpers import kernels_under_test

GOLDENS = open_goldens()
WHOLE_SIZE = GOLDENS.names("models")
SMALL = "finalize/slot_order"


@pytest.fixture(scope="module")
def case() -> Case:
    return GOLDENS.load(SMALL)


def result_of(spec: str, case: Case, **options: Any) -> CaseResult:
    return run_case(load_kernel(spec), case, **options)


def test_oracle_conforms_on_all_small_cases() -> None:
    names = [name for name in GOLDENS.names() if name not in WHOLE_SIZE]
    report = run("oracle", (GOLDENS.load(name) for name in names))
    assert [r.case for r in report.results if r.status != "equal"] == []
    assert report.ok
    assert report.verdict == f"oracle conforms: it equals the expected bits in all {len(names)} cases."


@pytest.mark.parametrize("spec", ["good", "logical:good_logical", "plain:good_plain"])
def test_adapters_hand_everything_over(spec: str) -> None:
    """Biases, SwiGLU parameters, expert and tensor parallelism, repeated experts."""
    prefix, _, name = spec.rpartition(":")
    path = f"{prefix}:kernels_under_test:{name}" if prefix else f"kernels_under_test:{name}"
    names = [
        "activation/bias_before_clamp",
        "finalize/biases_inside_weight",
        "parallel/expert_and_tensor_rank_1",
    ]
    for name in [*names, "activation/gpt_oss_special_values"]:
        result = result_of(path, GOLDENS.load(name))
        assert result.status == "equal", result.message
        assert "128x128" in result.tiles


def test_report_tells_which_tiles_agree() -> None:
    case = GOLDENS.load("gemm/mirrored_hidden_1536")
    assert len(set(case.output_hashes.values())) == 3

    def other_tiles(**arguments: Any) -> Tensor:
        return kernels_under_test.good(**arguments, kernel=Sm90Kernel.of_tiles((512, 128)))

    assert run_case(load_kernel(other_tiles), case).tiles == ("512x128",)
    assert result_of("kernels_under_test:good", case).tiles == ("128x128",)


def test_a_kernel_told_its_tiles_has_to_use_them() -> None:
    case = GOLDENS.load("gemm/mirrored_hidden_1536")

    def always_128(kind: str, call: Any) -> Any:
        return case.outputs[128, 128]

    kernel = kernels.Kernel("always_128", ("moe",), lambda kind, call: ((kind, call), {}), always_128, True)
    result = run_case(kernel, case, diagnosed=False)
    assert result.status == "differs"
    assert result.tiles == ("128x128",)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("raises", "raised", "RuntimeError: no kernel image is available"),
        ("other_shape", "wrong output", "expected bfloat16 [8, 128], got bfloat16 [8, 127]"),
        ("other_dtype", "wrong output", "got float32"),
        ("no_tensor", "wrong output", "got str"),
        ("writes_nothing", "not written", "wrote nothing"),
        (
            "writes_half",
            "not written",
            "all but 64 of 1,024 elements; the first element not written is [7, 0]",
        ),
        ("modifies_input", "input modified", "quant_scales[1] at"),
        ("unstable", "unstable", "1 other elements in output; at [0, 7]"),
    ],
)
def test_misbehaviour_is_reported_as_what_it_is(case: Case, name: str, status: str, message: str) -> None:
    assert list(case.outputs[128, 128].shape) == [8, 128]
    result = result_of(f"kernels_under_test:{name}", case)
    assert (result.status, result.ok) == (status, False)
    assert message in result.message


def test_a_modified_input_does_not_spoil_the_next_case(case: Case) -> None:
    def spoiler(x: Tensor, *arguments: Any, **parameters: Any) -> Tensor:
        result = kernels_under_test.good_plain(x, *arguments, **parameters)
        x.zero_()
        return result

    plain = kernels.Kernel(
        "spoiler", ("moe",), load_kernel("plain:kernels_under_test:good_plain").prepare, spoiler
    )
    assert run_case(plain, case).status == "input modified"
    assert result_of("oracle", case).status == "equal"


def test_a_hang_is_reported_and_the_rest_runs(case: Case) -> None:
    def hangs_once(**arguments: Any) -> Tensor:
        if torch.equal(arguments["input"], case.tensors["input"]):
            return kernels_under_test.hangs()
        return kernels_under_test.good(**arguments)

    other = GOLDENS.load("formats/every_code_by_row")
    report = run(hangs_once, [case, other], timeout=0.5)
    assert [r.status for r in report.results] == ["timed out", "equal"]
    assert "no result within 0.5 s" in report.results[0].message


def test_isolation_survives_a_crash_and_a_hang(case: Case) -> None:
    report = run("kernels_under_test:hangs", [case], isolate=True, timeout=0.5)
    assert report.results[0].status == "timed out"
    assert "killed" in report.results[0].message
    other = GOLDENS.load("formats/every_code_by_row")
    report = run("kernels_under_test:dies_once", [case, other], isolate=True)
    assert [r.status for r in report.results] == ["crashed", "equal"]
    assert "SIGABRT" in report.results[0].message


def test_torch_reference_fails_exact_and_passes_bounded() -> None:
    names = ["gemm/mirrored_hidden_384", "gemm/ordinary", "gemm/wide_exponents", "finalize/biases_cancel"]
    cases = [GOLDENS.load(name) for name in names]
    exact = run("torch-bf16", cases, diagnosed=False)
    assert not exact.ok
    bounded = run("torch-bf16", cases, mode="bounded")
    assert bounded.ok
    assert "within bounds" in {r.status for r in bounded.results}
    assert all(r.outside == 0 for r in bounded.results)


def test_bounded_catches_a_mistake(case: Case) -> None:
    report = run("defect:last_slot_dropped", [case], mode="bounded")
    assert report.results[0].status == "outside bounds"
    assert report.defects == ("last_slot_dropped",)


NAMED = [
    *(
        "gate_up_swapped",
        "limit_ignored",
        "scale_off_by_one_group",
        "weights_not_interleaved",
        "bf16_finalize",
    ),
    *("ep_offset_dropped", "tie_highest_id", "act_kept_fp32"),
]


@pytest.mark.parametrize("name", NAMED)
def test_defects_are_named(name: str) -> None:
    """On the cases that are there for them; `tools/tables/confusion_table.py` does all defects on all cases."""
    names = [n for n in GOLDENS.names() if n not in WHOLE_SIZE and name in GOLDENS.load(n).catches]
    report = run(f"defect:{name}", [GOLDENS.load(n) for n in names], repeat=False)
    assert not report.ok
    assert name in report.defects


def test_a_defect_that_confuses_experts_is_named_although_few_are_kept() -> None:
    case = GOLDENS.load("gemm/uneven_experts")
    assert case.experts.num_experts > case.call().top_k
    assert run("defect:scales_of_next_expert", [case]).defects == ("scales_of_next_expert",)


def test_a_defect_in_one_token_only_is_not_named(case: Case) -> None:
    """It predicts that token exactly, and others too that are right."""
    dropped = DEFECTS["last_slot_dropped"].run(case.call())

    def in_token_2(kind: str, call: Any) -> Tensor:
        output = case.outputs[128, 128].clone()
        output[2] = dropped[2]
        return output

    kernel = kernels.Kernel("in_token_2", ("moe",), lambda kind, call: ((kind, call), {}), in_token_2, True)
    diagnosis = run_case(kernel, case).diagnosis
    assert diagnosis is not None
    assert diagnosis.exact == ()
    assert ("last_slot_dropped", False) in [(p.name, p.exact) for p in diagnosis.predictions]
    assert "only token 2 of 8 differs" in diagnosis.patterns


def test_an_unnamed_mistake_gets_places_and_a_stage() -> None:
    case = GOLDENS.load("gemm/ordinary")
    result = result_of("kernels_under_test:second_half_of_columns", case)
    assert result.diagnosis is not None
    assert "exactly every second 16-row block of fc2 differs, from 1 on" in result.diagnosis.patterns
    assert result.diagnosis.exact == ()
    assert result.diagnosis.first.index == (0, 16)
    assert result.diagnosis.stage.startswith("before finalize")
    assert int(result.diagnosis.mask.sum()) == result.differing == sum(n for _, n in result.diagnosis.ulps)


def test_exposed_stages_are_compared() -> None:
    result = result_of("kernels_under_test:with_trace", GOLDENS.load("gemm/ordinary"))
    assert result.diagnosis is not None
    assert result.diagnosis.stage.startswith("activation is the first stage that differs, in 1 of")
    assert "got 0x447A (1000)" in result.diagnosis.stage


def test_other_weights_in_finalize_are_recognised(case: Case) -> None:
    def scaled(**arguments: Any) -> Tensor:
        arguments["token_final_scales"] = arguments["token_final_scales"] * 0.9
        return kernels_under_test.good(**arguments)

    diagnosis = run_case(load_kernel(scaled), case).diagnosis
    assert diagnosis is not None
    assert diagnosis.stage.startswith("finalize: token 0 is the sum of the right expert outputs with weights")


def test_a_small_mistake_is_not_blamed_on_the_weights() -> None:
    """A few elements off leave the fitted weights nearly as they are."""

    def one_column(**arguments: Any) -> Tensor:
        result = kernels_under_test.good(**arguments).clone()
        result[:, 9] += 0.25
        return result

    diagnosis = run_case(load_kernel(one_column), GOLDENS.load("gemm/ordinary")).diagnosis
    assert diagnosis is not None
    assert diagnosis.stage.startswith("before finalize")


def test_stage_kernels() -> None:
    report = run("stage:dequantize:kernels_under_test:stage_dequantize", GOLDENS)
    assert report.ok
    assert {r.kind for r in report.results if r.status == "equal"} == {"dequantize"}
    moved = result_of(
        "stage:layout:kernels_under_test:stage_layout_identity", GOLDENS.load("layout/swap_halves")
    )
    assert moved.status == "differs"
    assert moved.diagnosis is not None
    assert "the same bytes in another order" in moved.diagnosis.patterns[0]


def test_nothing_run_does_not_conform() -> None:
    report = run("torch-bf16", [GOLDENS.load("layout/swap_halves")])
    assert not report.ok
    assert report.verdict == "torch-bf16 ran on no case."


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "expected package.module:function or one of"),
        ("no.such.module:f", "cannot import 'no.such.module'"),
        ("kernels_under_test:absent", "has no 'absent'"),
        ("kernels_under_test:GOLDENS", "has no"),
        ("defect:limit_ignord", "limit_ignored"),
        ("stage:moe:kernels_under_test:good", "KIND one of dequantize"),
        ("flashinfer", "flashinfer"),
    ],
)
def test_wrong_kernels_are_refused(spec: str, message: str) -> None:
    with pytest.raises(KernelError, match=r"^kernel: ") as error:
        load_kernel(spec)
    assert message in str(error.value)


def test_arguments_are_checked(case: Case) -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        run("oracle", [case], mode="loose")
    with pytest.raises(ValueError, match="isolate: expected a kernel given by its specification"):
        run(kernels_under_test.good, [case], isolate=True)


def test_name_defects_intersects() -> None:
    assert name_defects([("a", "b"), ("b", "c")]) == ("b",)
    assert name_defects([None, ("b", "c")]) == ("b", "c")
    assert name_defects([("a",), ()]) == ()
    assert name_defects([]) == ()


def test_verdict_without_an_exact_defect_gives_the_closest() -> None:
    report = run("kernels_under_test:second_half_of_columns", [GOLDENS.load("gemm/ordinary")])
    assert report.defects == ()
    assert "does not conform: 1 of 1 cases fail." in report.verdict
    assert isinstance(report, Report)
    assert report.closest is None or report.closest[0] in DEFECTS


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
        output = kernels_under_test.good(**arguments, kernel=forced)
        return [output, None, None, None]  # as flashinfer does

    def test_forces_every_pair_of_tiles(self) -> None:
        case = GOLDENS.load("gemm/mirrored_both_512")
        result = run_case(load_kernel("flashinfer", "cpu"), case, repeat=False)
        assert result.status == "equal", result.message
        assert len(self.seen) == len(case.outputs)
        assert [0, 116] in self.seen
        assert [8, 120] in self.seen

    def test_all_tactics(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each runnable tactic of either GEMM once; the model gives what to expect of another N tile."""
        asked: list[MoeCall] = []
        monkeypatch.setattr(conformance, "forward", lambda call: (asked.append(call), forward(call))[1])
        case = GOLDENS.load("gemm/first_group_overflows")
        experts = case.call().experts
        shapes = [(2 * experts.intermediate_size, experts.hidden_size)]
        shapes.append((experts.hidden_size, experts.intermediate_size))
        expected = {
            tuple((Sm90Kernel(gemm1=tactic) if gemm == 0 else Sm90Kernel(gemm2=tactic)).profile_ids)
            for gemm, shape in enumerate(shapes)
            for tactic in runnable_tactics(*shape)
        }
        report = run("flashinfer", [case], device="cpu", repeat=False, all_tactics=True)
        assert report.ok, report.verdict
        assert set(map(tuple, self.seen)) == expected
        assert len(report.results[0].tiles) == len(expected)
        assert {call.kernel.tile_n for call in asked} == {
            pair for n in (32, 64, 128, 256) for pair in ((n, 16), (16, n))
        }

    def test_all_tactics_of_another_kernel(self, case: Case) -> None:
        for isolate, kernel in ((False, "oracle"), (True, "flashinfer")):
            with pytest.raises(ValueError, match="all_tactics: expected a kernel"):
                run(kernel, [case], device="cpu", isolate=isolate, all_tactics=True)

    def test_generation_without_profile_ids(self, case: Case) -> None:
        def before_profile_ids(
            input: Tensor, quant_scales: list[Tensor], output: Tensor, enable_pdl: bool, **arguments: Any
        ) -> Tensor:
            assert quant_scales[0].dim() == 3
            return kernels_under_test.good(input=input, quant_scales=quant_scales, output=output, **arguments)

        before_profile_ids.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("input", "output", "enable_pdl")]
        )
        self.helpers.interleave_moe_scales_for_sm90_mixed_gemm = lambda s, group: fold_scales_sm90(
            s, BYTEWISE
        )
        self.helpers.interleave_moe_weights_for_sm90_mixed_gemm = lambda w, quant_type: (
            interleave_weights_sm90(w, BYTEWISE)
        )
        self.helpers.cutlass_fused_moe = before_profile_ids
        self.helpers.__version__ = "0.6.17"  # takes profile_ids and ignores it
        kernel = load_kernel("flashinfer", "cpu")
        assert not kernel.forces_tile_k
        result = run_case(kernel, case)
        assert (result.status, result.tiles) == ("equal", tuple("x".join(map(str, p)) for p in case.outputs))

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


def test_progress_sees_each_result(case: Case) -> None:
    seen: list[CaseResult] = []
    run("oracle", [case], progress=seen.append)
    assert [r.case for r in seen] == [SMALL]
    assert conformance.PASSING[0] == "equal"
