"""The package against what an H100 gave: no bit may differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mxfp4ref.goldens.cases.activation import _one_hot, _probe
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.activation import GEGLU, GEGLU_TANH
from tests.helpers import bits
from tools.hardware import recorded


@pytest.mark.parametrize("case", [*recorded.MOE_CASES, *recorded.FIRST_PAIR_CASES])
def test_moe_forward(case: str) -> None:
    folder = recorded.RECORDINGS / ("moe" if case in recorded.MOE_CASES else ".")
    compared, differing = recorded.moe_differences(recorded.load(folder / f"{case}.npz"))
    assert compared > 0
    assert differing == 0


def test_every_tactic_is_recorded() -> None:
    tiles = set()
    for case in recorded.FIRST_PAIR_CASES:
        arrays = recorded.load(recorded.RECORDINGS / f"{case}.npz")
        tiles |= {tuple(tile) for tile in arrays["tile"].tolist()}
        assert len(arrays["out"]) > 1, "tiles that all agree would not test the exception"
    assert len(tiles) == 25


@pytest.mark.parametrize(("activation_type", "recorded_as"), [(GEGLU, "out"), (GEGLU_TANH, "tanh")])
@pytest.mark.parametrize("name", ["significands", "gates", "bias"])
def test_geglu(name: str, activation_type: int, recorded_as: str) -> None:
    arrays = recorded.load(recorded.RECORDINGS / "geglu.npz")
    gate, up, out = (recorded.bf16(arrays[f"{name}_{part}"]) for part in ("gate", "up", recorded_as))
    experts = _one_hot(1)
    if f"{name}_bias" in arrays:
        experts = replace(experts, fc1_biases=recorded.bf16(arrays[f"{name}_bias"])[None])
    call = replace(_probe(gate.flatten(), up.flatten(), experts), activation_type=activation_type)
    bits.assert_same(forward(call)[:, :128], out)


SCALAR = recorded.load(recorded.RECORDINGS / "scalar.npz")
TENSOR_CORE = recorded.load(recorded.RECORDINGS / "wgmma.npz")
FP8_TENSOR_CORE = recorded.load(recorded.RECORDINGS / "fp8_wgmma.npz")


@pytest.mark.parametrize("name", recorded.scalar_names(SCALAR))
def test_scalar_operation(name: str) -> None:
    compared, differing = recorded.scalar_differences(SCALAR, name)
    assert compared > 0
    assert differing == 0


@pytest.mark.parametrize("name", recorded.tensor_core_names(TENSOR_CORE))
def test_tensor_core_step(name: str) -> None:
    compared, differing = recorded.tensor_core_differences(TENSOR_CORE, name)
    assert compared > 0
    assert differing == 0


@pytest.mark.parametrize("name", recorded.tensor_core_names(FP8_TENSOR_CORE))
def test_fp8_tensor_core_step(name: str) -> None:
    compared, differing = recorded.fp8_differences(FP8_TENSOR_CORE, name)
    assert compared > 0
    assert differing == 0
