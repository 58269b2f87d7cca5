"""What swap and shadow do with a call: who answers, what is compared, counted, logged and written."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mxfp4ref import engine
from mxfp4ref.defects import get_defect
from mxfp4ref.engine import Counts, modes, shadowing, swapping
from mxfp4ref.engine.counting import Counting
from mxfp4ref.formats.generations import BYTEWISE, PLAIN
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import drop_in, torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import forward
from mxfp4ref.model.skipped import reset_skipped_slots
from mxfp4ref.sm90.tactics import Sm90Kernel
from tests.helpers import bits, flashinfer_package, layers
from tests.helpers.drop_in import CALL, DENSE_CALL, EXPECTED, EXPERTS, SM90_CALL, arguments_of

Call = Callable[..., Any]
ARGUMENTS = arguments_of(SM90_CALL)
OTHER_LAYER = replace(SM90_CALL, experts=layers.to_sm90(layers.random_experts(2, hidden=256, inner=128)))
REAL = drop_in(strict=False)  # a kernel without defects


def cancelling() -> MoeCall:
    """The halves of K cancel, so that GEMM1 gives its rounding errors alone, and K tiles show."""
    generator = torch.Generator().manual_seed(1)
    experts = layers.random_experts(3, hidden=512, inner=128)
    scales = torch.randint(112, 128, (4, 256, 8), generator=generator).to(torch.uint8)
    weights = experts.fc1_weights[:, :, :128]
    experts = replace(experts, fc1_weights=weights.repeat(1, 1, 2), fc1_scales=scales.repeat(1, 1, 2))
    half = torch.randn(3, 256, generator=generator).to(torch.bfloat16)
    call = layers.random_call(3, layers.to_sm90(experts), tokens=3)
    return replace(call, input=torch.cat((half, -half), 1))


CANCELLING = cancelling()


def served_by(kernel: Call) -> Call:
    """What an engine calls, with this function as flashinfer's kernel."""
    importlib.import_module("flashinfer.fused_moe.core").kernel = kernel
    served: Call = importlib.import_module("engine_of_names").call
    return served


def flipped(*arguments: Any, **named: Any) -> list[Tensor]:
    """A kernel that gets one bit wrong."""
    result = REAL(*arguments, **named)
    result[0].view(torch.int16)[3, 17] ^= 1
    return result


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mxfp4ref.engine" and r.levelno >= level]


pytestmark = pytest.mark.usefixtures("flashinfer")

# --- swap -------------------------------------------------------------------------------------------------


def test_what_is_not_modelled_falls_through(caplog: pytest.LogCaptureFixture) -> None:
    call = served_by(lambda *arguments, **named: ("real", arguments, named))
    engine.swap()
    for changes in ({"min_latency_mode": True}, {"min_latency_mode": True}, {"of_a_newer_release": 1}):
        assert call(**ARGUMENTS, **changes)[0] == "real"
    bits.assert_same(call(**ARGUMENTS)[0], EXPECTED)
    assert engine.counts() == Counts(answered=1, not_modelled=3)
    assert [line.partition(",")[0] for line in lines(caplog)] == [
        "swap: left to the real kernel: min_latency_mode: not modelled",
        "swap: left to the real kernel: arguments: not modelled",
    ]


def test_nothing_falls_through_unless_it_may() -> None:
    call = served_by(lambda *arguments, **named: "real")
    engine.swap(fall_through=False)
    with pytest.raises(NotImplementedError, match="min_latency_mode: not modelled"):
        call(**ARGUMENTS, min_latency_mode=True)
    with pytest.raises(TypeError, match=r"token_selected_experts: .*int32"):
        call(**{**ARGUMENTS, "token_selected_experts": CALL.token_selected_experts.long()})


def test_swap_writes_the_output_and_takes_what_the_kernel_accepts() -> None:
    call = served_by(lambda *arguments, **named: "real")
    ids = SM90_CALL.token_selected_experts.clone()
    ids[0] = 99
    output = torch.empty_like(EXPECTED)
    engine.swap()
    assert call(**{**ARGUMENTS, "token_selected_experts": ids}, output=output)[0] is output
    bits.assert_same(output, forward(replace(SM90_CALL, token_selected_experts=ids, strict=False)))
    engine.swap(strict=True)
    with pytest.raises(ValueError, match="token_selected_experts: expected global ids"):
        call(**{**ARGUMENTS, "token_selected_experts": ids})


def test_a_capture_that_cannot_be_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_captured(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("make the same call once before the capture")

    call = served_by(lambda *arguments, **named: "real")
    monkeypatch.setattr(swapping, "torch_ref_cutlass_fused_moe", not_captured)
    engine.swap()
    with pytest.raises(RuntimeError, match=r"^make the same call once before the capture$"):
        call(**ARGUMENTS)
    monkeypatch.setattr(swapping, "capturing", lambda arguments, named: True)
    with pytest.raises(RuntimeError, match=r"once before the capture .*--enforce-eager"):
        call(**ARGUMENTS)


@pytest.mark.parametrize(
    ("release", "layout"),
    [("0.6.9", "logical_weights_folded_scales"), ("0.6.17", "sm90"), ("0.7.2.post1", "sm90"), ("9.9", None)],
)
def test_the_release_names_the_layout(release: str, layout: str | None) -> None:
    """Three-dimensional scales alone would be taken for another layout, with a warning."""
    importlib.import_module("flashinfer").__version__ = release
    given: dict[str, Any] = ARGUMENTS
    if release != "0.7.2.post1" and layout is not None:
        given = arguments_of(replace(CALL, experts=layers.to_sm90(EXPERTS, BYTEWISE, torch.uint8)))
    call = served_by(lambda *arguments, **named: "real")
    engine.swap()
    expected = torch_ref_cutlass_fused_moe(**given, weight_layout=layout)[0]
    bits.assert_same(call(**given)[0], expected)
    if release == "0.6.9":
        assert PLAIN.releases[-1] == release
        assert not torch.equal(expected, torch_ref_cutlass_fused_moe(**given, weight_layout="sm90")[0])


# --- shadow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_k", [(128, 128), (256, 128)])
@pytest.mark.parametrize("forced", [False, True])
def test_any_legitimate_tiles_are_equal(
    tile_k: tuple[int, int], forced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Sm90Kernel.of_tiles(tile_k)
    expected = forward(replace(CANCELLING, kernel=kernel))
    assert torch.equal(forward(CANCELLING), expected) == (tile_k == (128, 128))
    call = served_by(drop_in(kernel=kernel))
    engine.shadow()
    named = {"profile_ids": kernel.profile_ids} if forced else {}
    for _ in range(2):
        bits.assert_same(call(**arguments_of(CANCELLING), **named)[0], expected)
    assert engine.counts() == Counts(equal=2)
    assert not lines(caplog)


def test_other_tiles_than_the_forced_ones_are_different(caplog: pytest.LogCaptureFixture) -> None:
    call = served_by(
        lambda *a, profile_ids=None, **k: drop_in(kernel=Sm90Kernel.of_tiles((256, 128)))(*a, **k)
    )
    engine.shadow()
    call(**arguments_of(CANCELLING))
    call(**arguments_of(CANCELLING), profile_ids=[-1, -1])
    assert engine.counts() == Counts(equal=1, different=1)
    assert "with the forced tiles" in lines(caplog)[0]


def test_the_first_difference_of_each_layer_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    call = served_by(REAL)
    engine.shadow()
    call(**ARGUMENTS)
    call(**arguments_of(OTHER_LAYER))
    importlib.import_module("flashinfer.fused_moe.core").kernel = flipped
    for _ in range(3):
        result = call(**arguments_of(OTHER_LAYER))[0]
    right = forward(OTHER_LAYER)
    assert (result != right).nonzero().tolist() == [[3, 17]]  # the server gets what the kernel gave
    (line,) = lines(caplog)
    assert line.startswith(
        "shadow: layer 2 differs from the reference (wordwise kernel) with any tiles, first in its call 2: "
        "1 of 1,792 elements "
    )
    assert "at [3, 17]: got 0x" in line
    assert "1 ulp" in line
    assert "M=7 H=256 I=128 E=4 k=2 ep=0/1 tp=0/1. Name a folder (MXFP4REF_DUMP)" in line
    assert engine.counts() == Counts(equal=2, different=3)
    call(**ARGUMENTS)
    assert len(lines(caplog)) == 2
    assert lines(caplog)[1].startswith("shadow: layer 1 differs")


def test_a_named_defect(caplog: pytest.LogCaptureFixture) -> None:
    wrong = get_defect("limit_ignored").run(CALL)
    call = served_by(lambda *arguments, **named: [wrong])
    engine.shadow()
    assert call(**ARGUMENTS)[0] is wrong
    assert engine.counts() == Counts(different=1)
    token, column = (wrong.view(torch.int16) != EXPECTED.view(torch.int16)).nonzero()[0].tolist()
    assert f"at [{token}, {column}]" in lines(caplog)[0]


def test_a_kernel_that_writes_over_its_input() -> None:
    given = ARGUMENTS | {
        name: ARGUMENTS[name].clone() for name in ("input", "token_selected_experts", "token_final_scales")
    }

    def in_place(*arguments: Any, output: Tensor, **named: Any) -> Tensor:
        output.copy_(REAL(*arguments, **named)[0])
        given["token_selected_experts"].fill_(-7)
        given["token_final_scales"].fill_(float("nan"))
        return output

    call = served_by(in_place)
    engine.shadow()
    assert call(**given, output=given["input"]) is given["input"]
    bits.assert_same(given["input"], EXPECTED)
    assert engine.counts() == Counts(equal=1)


def test_every_nth_call_of_each_layer() -> None:
    call = served_by(REAL)
    engine.shadow(every=3)
    for _ in range(4):
        call(**ARGUMENTS)
        call(**arguments_of(OTHER_LAYER))
    assert engine.counts() == Counts(equal=4, not_due=4)
    assert str(engine.counts()) == "8 calls: 4 equal, 4 not due"


def test_an_exception_of_the_oracle_stays_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(call: MoeCall) -> Tensor:
        raise RuntimeError("out of memory")

    call = served_by(REAL)
    engine.shadow()
    with monkeypatch.context() as patched:
        patched.setattr(shadowing, "forward", broken)
        for _ in range(2):
            bits.assert_same(call(**ARGUMENTS)[0], EXPECTED)
    # Also what goes wrong before the kernel runs.
    assert served_by(lambda *a, **k: 5)(**{**ARGUMENTS, "input": None}) == 5
    assert engine.counts() == Counts(failed=3)
    assert len(lines(caplog)) == 2
    assert lines(caplog)[0] == "shadow: the oracle failed, the server did not: RuntimeError: out of memory"
    assert "in broken" in caplog.text


def test_an_exception_of_the_kernel_is_the_servers() -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise FloatingPointError("of the kernel")

    call = served_by(broken)
    engine.shadow()
    with pytest.raises(FloatingPointError, match="of the kernel"):
        call(**ARGUMENTS)
    assert engine.counts().calls == 0


def test_a_call_that_neither_takes_is_one_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise TypeError("input: none")

    call = served_by(broken)
    engine.shadow()
    with pytest.raises(TypeError, match="input: none"):
        call(**{**ARGUMENTS, "input": None})
    assert engine.counts() == Counts(failed=1)
    assert lines(caplog)[0].startswith("shadow: the oracle failed, and then the kernel: ")
    assert "did not" not in caplog.text


def test_what_is_not_compared(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    call = served_by(lambda *arguments, **named: "real")
    engine.shadow()
    assert call(**arguments_of(DENSE_CALL)) == call(**ARGUMENTS, min_latency_mode=True) == "real"
    monkeypatch.setattr(shadowing, "capturing", lambda arguments, named: True)
    assert call(**ARGUMENTS) == call(**ARGUMENTS) == "real"
    assert engine.counts() == Counts(not_modelled=2, in_graphs=2)
    told = lines(caplog)
    assert len(told) == 3
    for line, words in zip(told, ("bf16 weights", "min_latency_mode", "--enforce-eager"), strict=True):
        assert words in line


def test_tokens_that_name_an_expert_twice_are_left_out() -> None:
    ids = SM90_CALL.token_selected_experts.clone()
    ids[2] = 1

    def leftovers(*arguments: Any, **named: Any) -> list[Tensor]:
        result = REAL(*arguments, **named)
        result[0][2] += 1
        return result

    call = served_by(leftovers)
    engine.shadow()
    call(**{**ARGUMENTS, "token_selected_experts": ids})
    assert engine.counts() == Counts(equal=1)
    ids[3] = 99  # which no rank owns: the kernel skips it
    served_by(flipped)(**{**ARGUMENTS, "token_selected_experts": ids})
    assert engine.counts() == Counts(equal=1, different=1)


def test_zeros_are_said_to_prove_nothing(caplog: pytest.LogCaptureFixture) -> None:
    call = served_by(REAL)
    engine.shadow()
    elsewhere = torch.full_like(CALL.token_selected_experts, -1)
    for _ in range(2):
        call(**{**ARGUMENTS, "token_selected_experts": elsewhere})
    assert engine.counts() == Counts(equal=2)
    said = "layer 1, call 1: no id lies in 0 to 3, which the rank owns: all of the output is zero, so that this call"
    assert [said in line for line in lines(caplog)] == [True]


def test_ids_that_look_local_are_told_again_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Hours after the warning, "2 equal" is what is read."""
    call = served_by(REAL)
    engine.shadow()
    for _ in range(2):
        call(**{**ARGUMENTS, "ep_size": 2, "ep_rank": 1})
    modes._at_exit()
    assert "are these local ids already?" in lines(caplog)[0]
    end = "at exit, 2 calls: 2 equal; in 1 layer the ids look local already, and the kernel takes global ones"
    assert lines(caplog)[-1].endswith(end)


def test_swap_tells_the_slots_that_it_skipped(caplog: pytest.LogCaptureFixture) -> None:
    call = served_by(REAL)
    reset_skipped_slots()
    engine.swap()
    ids = CALL.token_selected_experts.clone()
    ids[3] = 99
    call(**{**ARGUMENTS, "token_selected_experts": ids})
    modes._at_exit()
    words = f"slots skipped in 1 of them: {ids.shape[1]} with an id that no rank owns, 0 that name an expert a second"
    assert words in lines(caplog, logging.INFO)[-1]


def test_nothing_compared_is_not_equal() -> None:
    """Every token names one expert twice, as in a warm-up with constant ids; the kernel returns anything."""
    call = served_by(lambda *arguments, **named: [torch.full_like(EXPECTED, 123.0)])
    engine.shadow()
    call(**{**ARGUMENTS, "token_selected_experts": torch.zeros_like(CALL.token_selected_experts)})
    assert engine.counts() == Counts(not_modelled=1)


@pytest.mark.parametrize("changes", [{"tokens": 0}, {"alltoall": True}])
def test_no_row_compared_is_not_equal(changes: dict[str, Any]) -> None:
    call = served_by(lambda *arguments, **named: [torch.full_like(arguments[0], 123.0)])
    engine.shadow()
    if "tokens" in changes:
        call(**arguments_of(SM90_CALL.select(slice(0))))
    else:
        ids = torch.full_like(CALL.token_selected_experts, 5)
        call(**{**ARGUMENTS, "token_selected_experts": ids, "ep_size": 2, "enable_alltoall": True})
    assert engine.counts() == Counts(empty=1)


def test_the_output_that_the_engine_looks_at_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that returns the right bits, and writes none, or wrong ones, into what it was given for them."""
    call = served_by(lambda *arguments, output, **named: REAL(*arguments, **named))
    engine.shadow()
    right = EXPECTED.clone()
    for output in (right, torch.zeros_like(EXPECTED), EXPECTED.float()):
        call(**ARGUMENTS, output=output)
    assert engine.counts() == Counts(equal=1, different=2)
    assert "another tensor than the output that it was given" in lines(caplog)[0]


@pytest.mark.parametrize("result", [[EXPECTED.float()], [EXPECTED[:4]], [], None, [EXPECTED.to("meta")]])
def test_another_kind_of_output_is_the_kernels_fault(result: Any, caplog: pytest.LogCaptureFixture) -> None:
    call = served_by(lambda *arguments, **named: result)
    engine.shadow()
    assert call(**ARGUMENTS) is result
    assert engine.counts() == Counts(different=1)
    assert "expected the output first, torch.bfloat16" in lines(caplog)[0]


def test_threads() -> None:
    call = served_by(REAL)
    engine.shadow()
    threads = [threading.Thread(target=lambda: [call(**ARGUMENTS) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.counts() == Counts(equal=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every: expected an int at least 1, got 0"),
        ({"every": True}, r"every: expected an int, got bool"),
        ({"dumps": -1}, r"dumps: expected an int at least 0, got -1"),
    ],
)
def test_options_of_shadow(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        engine.shadow(**options)


def test_options_of_swap() -> None:
    with pytest.raises(TypeError, match="fall_through: expected a bool, got int 1"):
        engine.swap(fall_through=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strict: expected one of True, False, 'count', got 'yes'"):
        engine.swap(strict="yes")  # type: ignore[arg-type]


# --- dumps ------------------------------------------------------------------------------------------------


def test_the_dump_is_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "5")
    folder = tmp_path / "dumps"
    call = served_by(flipped)
    monkeypatch.chdir(tmp_path)
    engine.shadow(dump="dumps", dumps=1)
    monkeypatch.chdir("..")
    output = call(**ARGUMENTS, output=torch.empty_like(EXPECTED), workspace_buffer=torch.empty(8))[0]
    call(**arguments_of(OTHER_LAYER))
    told, not_recorded = lines(caplog)
    assert not_recorded.endswith("Not recorded: as many calls as wanted were")
    (found,) = (folder / "rank5").iterdir()
    assert told.startswith("shadow, rank 5: layer 1 differs")
    assert told.endswith(f"Recorded in {found}")

    inputs, outputs, expected = (
        safetensors.torch.load_file(found / f"{name}.safetensors")
        for name in ("inputs", "outputs", "expected")
    )
    metadata = json.loads((found / "metadata.jsonl").read_text().splitlines()[-1])
    assert metadata["execution_status"] == "completed"
    assert metadata["versions"]["flashinfer"] == "0.7.2.post1"
    bits.assert_same(outputs["result__0"], output)
    bits.assert_same(expected["result__0"], EXPECTED)
    # Once more the call, from the files alone.
    given: dict[str, Any] = {key.removeprefix("kwarg_"): t for key, t in inputs.items() if "__" not in key}
    for key, value in metadata["input_metadata"].items():
        if isinstance(value, dict) and value["type"] == "list":
            value = [inputs[item["tensor_key"]] for item in value["items"]]
        elif isinstance(value, dict):
            assert value["type"] == "torch.dtype"
            value = getattr(torch, value["value"].removeprefix("torch."))
        given[key.removeprefix("kwarg_")] = value
    assert given.keys() == ARGUMENTS.keys()
    bits.assert_same(torch_ref_cutlass_fused_moe(**given)[0], EXPECTED)


def test_a_dump_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    call = served_by(flipped)
    engine.shadow(dump=tmp_path / "file")
    assert call(**ARGUMENTS)[0].shape == EXPECTED.shape
    assert "at [3, 17]" in lines(caplog)[0]
    assert "Not recorded: NotADirectoryError" in lines(caplog)[0]

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    engine.shadow(dump=tmp_path / "dumps")
    call(**ARGUMENTS)
    assert lines(caplog)[1].endswith("Not recorded: OSError: no space left on device")
    assert list((tmp_path / "dumps").iterdir()) == []
    assert engine.counts() == Counts(different=1)


# --- the log ----------------------------------------------------------------------------------------------


def test_counts_are_told_at_powers_of_ten(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mxfp4ref.engine")
    counting = Counting("shadow")
    for number in range(1, 201):
        counting.add("equal" if number % 2 else "not_due")
    assert lines(caplog, logging.INFO) == [
        "shadow: 1 call: 1 equal",
        "shadow: 10 calls: 5 equal, 5 not due",
        "shadow: 100 calls: 50 equal, 50 not due",
    ]


SERVER = """
import multiprocessing, sys
import engine_of_names
import torch
sys.path.insert(0, sys.argv[1])
from tests.engine.test_swap_shadow import ARGUMENTS, REAL, flipped
from flashinfer.fused_moe import core
def serve(kernel):
    core.kernel = kernel
    engine_of_names.call(**ARGUMENTS)
serve(REAL)
worker = multiprocessing.get_context("fork").Process(target=serve, args=(flipped,))
worker.start()
worker.join()
"""


def test_by_the_environment_alone(flashinfer: Path) -> None:
    """A server whose code knows nothing of this package, its worker, and the counts when they end."""
    flashinfer_package.write(flashinfer / "site")
    (flashinfer / "site/sitecustomize.py").write_text(
        "import sys, mxfp4ref.engine; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(root)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(flashinfer / "site"), str(root)]),
            "MXFP4REF": "shadow",
            "MXFP4REF_DUMP": str(flashinfer / "dumps"),
            "RANK": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("INFO mxfp4ref.engine ") for line in done.stderr.splitlines()]
    assert said.count("shadow, rank 1: at exit, 1 call: 1 equal") == 1
    assert said.count("shadow, rank 1: at exit, 1 call: 1 different") == 1
    assert any(line.startswith("WARNING mxfp4ref.engine shadow, rank 1: layer 1 differs") for line in said)
    assert len(list((flashinfer / "dumps/rank1").iterdir())) == 1


def test_a_misspelt_mode_is_told_again_at_the_end(tmp_path: Path) -> None:
    """Python passes over what is raised in sitecustomize, so that a server runs on."""
    (tmp_path / "sitecustomize.py").write_text("import mxfp4ref.engine")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", "print('served')"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)]), "MXFP4REF": "shado"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "served\n"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "ERROR mxfp4ref.engine nothing was observed in this process: MXFP4REF: expected 'swap'"
    )
    assert last.endswith("got 'shado'; did you mean shadow?")
