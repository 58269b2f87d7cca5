"""flashinfer's own tests of this kernel, on a CPU with the drop-in in the kernel's place.

    git clone https://github.com/flashinfer-ai/flashinfer
    MXFP4REF_FLASHINFER_CHECKOUT=flashinfer python -m pytest -m flashinfer_checkout

They compare within a tolerance, so that they say little about bits, but they are the contract as its authors call it.
Needs 16 GB of memory and several minutes. The sdist has no tests, or not these.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKOUT = os.environ.get("MXFP4REF_FLASHINFER_CHECKOUT")
THEIR_TESTS = Path("tests/moe/test_trtllm_cutlass_fused_moe.py")
HERE = Path(__file__).resolve().parent


def run(checkout: Path, junit: Path) -> dict[str, str]:
    """Run the tests of a checkout that have MXFP4 weights and bf16 activations: their names and outcomes."""
    options = [
        "-p",
        "flashinfer_on_cpu",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-c",
        os.devnull,
        "-W",
        "ignore",
    ]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={checkout}", f"--junit-xml={junit}"]
    paths = [str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, "-k", "bf16_mxfp4", str(THEIR_TESTS)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert junit.exists(), done.stdout + done.stderr
    cases = ElementTree.parse(junit).iter("testcase")
    return {case.attrib["name"]: next((child.tag for child in case), "passed") for case in cases}


@pytest.mark.flashinfer_checkout
@pytest.mark.skipif(CHECKOUT is None, reason="MXFP4REF_FLASHINFER_CHECKOUT is not set")
def test_theirs(tmp_path: Path) -> None:
    assert CHECKOUT is not None
    outcomes = run(Path(CHECKOUT).resolve(), tmp_path / "junit.xml")
    assert len(outcomes) >= 16
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "passed"} == {}


LIKE_THEIRS = """
import pytest
import torch
import flashinfer.fused_moe as fused_moe
from flashinfer import autotune
from flashinfer.fused_moe.core import ActivationType
from flashinfer.utils import is_sm90a_supported
from . import utils
from tests.test_helpers.utils_fp4 import helper

@pytest.mark.skipif(not is_sm90a_supported(torch.device("cuda")), reason="not on this GPU")
@pytest.mark.parametrize("byte, expected", [(0x22, 128.0), (0x12, 128.0)], ids=["right", "wrong"])
def test_bf16_mxfp4(byte, expected):
    device = torch.device("cuda")
    w1 = torch.full((1, 256, 64), byte, device=device, dtype=torch.uint8)
    w2 = torch.full((1, 128, 64), 0x22, device="cuda", dtype=torch.uint8)
    scales = [torch.full((1, rows, 4), 127, dtype=torch.uint8).cuda() for rows in (256, 128)]
    folded = [fused_moe.interleave_moe_scales_for_sm90_mixed_gemm(s).view(torch.int32) for s in scales]
    w1, w2 = (fused_moe.interleave_moe_weights_for_sm90_mixed_gemm(w, "fp4") for w in (w1, w2))
    x = torch.zeros(1, 128, dtype=torch.bfloat16, device=device)
    x[0, :2] = 0.5
    ones = torch.ones(1, 1, device=device)
    out = torch.zeros_like(x)
    ids = torch.zeros(1, 1, dtype=torch.int, device=device)
    fused_moe.cutlass_fused_moe(x, ids, ones, w1, w2, torch.bfloat16, quant_scales=folded, output=out,
                                use_w4_group_scaling=True)
    # gate and up are 1, silu(1) is 0.7310...
    torch.testing.assert_close(out.float(), torch.full((1, 128), expected * 0.731), rtol=1e-2, atol=0)

@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="not on this GPU")
def test_another():
    raise NotImplementedError("not chosen by -k")
"""


@pytest.mark.usefixtures("copied_processes")
def test_the_harness_tells_right_from_wrong(tmp_path: Path) -> None:
    file = tmp_path / THEIR_TESTS
    file.parent.mkdir(parents=True)
    file.write_text(LIKE_THEIRS)
    for module in ("__init__.py", "utils.py"):
        (file.parent / module).touch()
    outcomes = run(tmp_path, tmp_path / "junit.xml")
    assert outcomes == {"test_bf16_mxfp4[right]": "passed", "test_bf16_mxfp4[wrong]": "failure"}
