"""What flashinfer 0.6.9 gave on an H100, for calls in which the order of the first two groups of K shows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mxfp4ref import Sm90Kernel, forward
from mxfp4ref.formats.generations import BYTEWISE
from tests.helpers import bits

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "hardware"))
import oldest_release  # noqa: E402

RECORDED = np.load(ROOT / "tests" / "recordings" / "flashinfer_0_6_9.npz")


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_the_oldest_kernel(name: str) -> None:
    call = oldest_release.plain_call(int(name.removeprefix("seed_")))
    recorded = torch.from_numpy(RECORDED[name].view(np.int16)).view(torch.bfloat16)
    bits.assert_same(forward(call), recorded)
    other = forward(replace(call, kernel=Sm90Kernel(generation=BYTEWISE)))
    assert not torch.equal(other.view(torch.int16), recorded.view(torch.int16))
