"""Another rounding mode of the CPU: every public computation refuses it, or gives the same bits."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mxfp4ref._rounding import check_rounding
from mxfp4ref.conformance.bounds.call_bounds import bound
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens import open_goldens, run_stage
from mxfp4ref.goldens.runs import runs
from mxfp4ref.model.forward import forward
from tests.helpers import fuzz_targets, layers
from tests.helpers.fuzzing import fingerprints

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sets the mode by glibc's fesetround"
)
# glibc's names for x86 and for ARM.
_ARM = {"upwards": 1 << 22, "downwards": 2 << 22, "to zero": 3 << 22}
MODES = {"downwards": 0x400, "upwards": 0x800, "to zero": 0xC00}
if torch.backends.cpu.get_cpu_capability() in ("NEON", "SVE256", "SVE128"):
    MODES = _ARM
CALL = layers.random_call(3, layers.random_experts(3, hidden=256, inner=128), tokens=5)


@contextmanager
def rounding(mode: str) -> Iterator[None]:
    library = ctypes.CDLL("libm.so.6")
    assert library.fesetround(MODES[mode]) == 0
    try:
        yield
    finally:
        assert library.fesetround(0) == 0


@pytest.mark.parametrize("mode", MODES)
def test_it_is_seen_in_the_calling_thread_and_in_threads_it_starts(mode: str) -> None:
    seen = []

    def look() -> None:
        try:
            check_rounding()
        except RuntimeError as error:
            seen.append(str(error))

    with rounding(mode):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert len(seen) == 2
    assert "expected the CPU to round to nearest" in seen[0]
    check_rounding()


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
@pytest.mark.parametrize("mode", ["upwards", "to zero"])
def test_every_public_function_refuses_or_gives_the_same_bits(name: str, mode: str) -> None:
    target = fuzz_targets.TARGETS[name]
    expected = fingerprints(target.function(**target.arguments()))
    arguments, refusal, got = target.arguments(), "", []
    with rounding(mode):
        try:
            got = fingerprints(target.function(**arguments))
        except RuntimeError as error:
            refusal = str(error)
    assert got == expected or "expected the CPU to round to nearest" in refusal


def test_what_computes_refuses() -> None:
    """And not only by giving the same bits on these inputs."""
    case = open_goldens().load("activation/stage_plain")
    for compute in (
        lambda: forward(CALL),
        lambda: bound(CALL),
        lambda: run_stage(case.kind, runs(case)[0].inputs),
        lambda: dequantize(CALL.experts.fc1_weights[0], CALL.experts.fc1_scales[0]),
    ):
        compute()
        with rounding("upwards"), pytest.raises(RuntimeError, match="rounding mode"):
            compute()


@pytest.mark.usefixtures("copied_processes")
def test_torch_threads_that_were_started_in_another_mode() -> None:
    code = (
        "import ctypes, torch; from mxfp4ref.routing.scoring import softmax\n"
        "torch.set_num_threads(2); library = ctypes.CDLL('libm.so.6')\n"
        f"library.fesetround({MODES['upwards']}); torch.ones(1 << 17) + 1; library.fesetround(0)\n"
        "softmax(torch.zeros(1, 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected torch's threads to round to nearest" in done.stderr
