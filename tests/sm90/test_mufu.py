"""EX2 and RCP against recorded H100 results, and the rules at the ends (`docs/arithmetic.md`, section 4)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mxfp4ref.sm90 import mufu
from tests.helpers import bits

RECORDING = Path(__file__).parents[1] / "recordings" / "mufu.npz"

Unit = Callable[[Tensor], Tensor]
IN_CACHE = 1 << 15  # numbers at a time, which takes half of the time


def of_bits(bits: np.ndarray | list[int]) -> Tensor:
    """The float32 tensor of these bits, given as unsigned numbers."""
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.int32)).view(torch.float32)


def bits_of(x: Tensor) -> np.ndarray:
    """The bits of a float32 tensor as unsigned numbers."""
    assert x.dtype == torch.float32
    return x.cpu().view(torch.int32).numpy().view(np.uint32)


def assert_bits(unit: Unit, arguments: np.ndarray, expected: np.ndarray) -> None:
    """The unit gives exactly the expected bits for the arguments' bits."""
    got = bits_of(unit(of_bits(arguments)))
    wrong = np.flatnonzero(got != expected)
    if wrong.size:
        i = wrong[0]
        raise AssertionError(
            f"{wrong.size} of {got.size} differ, first {arguments[i]:#010x}: {got[i]:#x} not {expected[i]:#x}"
        )


@pytest.fixture(scope="module")
def recording() -> Iterator[np.lib.npyio.NpzFile]:
    with np.load(RECORDING) as file:
        yield file


@pytest.mark.parametrize(
    ("table", "first_argument"),
    [("ex2_1_2", 0x3F800000), ("ex2_h_1", 0x3F000000), ("ex2_n1_n2", 0xBF800000), ("rcp_1_2", 0x3F800000)],
)
def test_recorded_table(recording: np.lib.npyio.NpzFile, table: str, first_argument: int) -> None:
    first, differences = recording[f"{table}_first"], recording[f"{table}_diff"]
    results = np.cumsum(np.concatenate([first, differences]), dtype=np.int32).view(np.uint32)
    assert results.size == 1 << 23
    unit = mufu.ex2 if table.startswith("ex2") else mufu.rcp
    arguments = np.arange(first_argument, first_argument + (1 << 23), dtype=np.uint32)
    for start in range(0, 1 << 23, IN_CACHE):
        assert_bits(unit, arguments[start : start + IN_CACHE], results[start : start + IN_CACHE])


def test_recorded_random_arguments(recording: np.lib.npyio.NpzFile) -> None:
    arguments = recording["ex2_rand_x"].astype(np.int64)
    assert arguments.size == 786_432
    assert_bits(mufu.ex2, arguments, recording["ex2_rand_y"].astype(np.int64))


EX2_ENDS = {
    0x00000000: 0x3F800000,  # 2^0
    0x80000000: 0x3F800000,
    0x007FFFFF: 0x3F800000,  # a subnormal is 0
    0x807FFFFF: 0x3F800000,
    0x33FFFFFF: 0x3F800000,  # below 2^-23 nothing is left of the fraction, of either sign
    0xB3FFFFFF: 0x3F800000,
    0x42FE0000: 0x7F000000,  # 2^127
    0x43000000: 0x7F800000,  # 2^128
    0x437FFFFF: 0x7F800000,
    0x43800000: 0x7F800000,  # 2^256
    0x7F7FFFFF: 0x7F800000,
    0x7F800000: 0x7F800000,
    0xC2FC0000: 0x00800000,  # 2^-126
    0xC2FC0001: 0x00000000,  # a little less: the integer part is -127
    0xC2FE0000: 0x00000000,  # 2^-127
    0xC3800000: 0x00000000,
    0xFF7FFFFF: 0x00000000,
    0xFF800000: 0x00000000,
    0x7F800001: 0x7FFFFFFF,
    0x7FC00000: 0x7FFFFFFF,
    0xFF800001: 0x7FFFFFFF,
    0xFFFFFFFF: 0x7FFFFFFF,
}

RCP_ENDS = {
    0x00000000: 0x7F800000,
    0x80000000: 0xFF800000,
    0x007FFFFF: 0x7F800000,  # a subnormal is 0 of its sign
    0x807FFFFF: 0xFF800000,
    0x00800000: 0x7E800000,  # 2^-126 -> 2^126
    0x80800000: 0xFE800000,
    0x3F800000: 0x3F800000,
    0xBF800000: 0xBF800000,
    0x7E800000: 0x00800000,  # 2^126 -> 2^-126
    0x7E800001: 0x00000000,  # a subnormal result
    0xFE800001: 0x80000000,
    0x7F000000: 0x00000000,  # 2^127
    0x7F7FFFFF: 0x00000000,
    0xFF7FFFFF: 0x80000000,
    0x7F800000: 0x00000000,
    0xFF800000: 0x80000000,
    0x7F800001: 0x7FFFFFFF,
    0xFF800001: 0x7FFFFFFF,
    0xFFFFFFFF: 0x7FFFFFFF,
}


@pytest.mark.parametrize(("unit", "ends"), [(mufu.ex2, EX2_ENDS), (mufu.rcp, RCP_ENDS)])
def test_ends(unit: Unit, ends: dict[int, int]) -> None:
    assert_bits(unit, np.array(list(ends)), np.array(list(ends.values())))


def by_the_rules(name: str, table: np.ndarray, argument: int) -> int:
    """Section 4 word for word, for one finite argument; table [2^23] is that of [1, 2)."""
    negative, exponent, fraction = argument >> 31, argument >> 23 & 0xFF, argument & 0x7FFFFF
    if name == "rcp":
        sign = negative << 31
        if exponent == 0:
            return sign | 0x7F800000
        shifted = int(table[fraction]) + ((127 - exponent) << 23)
        return sign | (shifted if shifted >> 23 > 0 else 0)
    value = 0 if exponent == 0 else ((fraction | 0x800000) << exponent) >> 127
    n, f = value >> 23, value & 0x7FFFFF
    if not negative or f == 0:
        power, mantissa = (-n if negative else n), int(table[f]) & 0x7FFFFF
    else:
        power, mantissa = -(n + 1), int(table[0x7FFFFF - f]) & 0x7FFFFF
    if power > 127:
        return 0x7F800000
    return (power + 127) << 23 | mantissa if power >= -126 else 0


@pytest.mark.parametrize("name", ["ex2", "rcp"])
def test_every_exponent(recording: np.lib.npyio.NpzFile, name: str) -> None:
    table = np.cumsum(
        np.concatenate([recording[f"{name}_1_2_first"], recording[f"{name}_1_2_diff"].astype(np.int64)])
    )
    generator = np.random.default_rng(0)
    fractions = np.concatenate([[0, 1, 0x400000, 0x7FFFFE, 0x7FFFFF], generator.integers(0, 1 << 23, 11)])
    arguments = ((np.arange(2) << 31)[:, None, None] | (np.arange(255) << 23)[:, None] | fractions).ravel()
    expected = np.array([by_the_rules(name, table, int(argument)) for argument in arguments])
    assert_bits(getattr(mufu, name), arguments, expected)


@given(bits=st.integers(0, 0xFFFFFFFF))
def test_any_argument_gives_a_normal_number_or_an_end(bits: int) -> None:
    for unit in (mufu.ex2, mufu.rcp):
        (result,) = bits_of(unit(of_bits([bits])))
        magnitude = result & 0x7FFFFFFF
        assert magnitude in (0, 0x7F800000) or 0x00800000 <= magnitude < 0x7F800000 or result == 0x7FFFFFFF


@given(bits=st.integers(0x00800000, 0x7E800000))
def test_rcp_shifts_with_the_exponent_and_keeps_the_sign(bits: int) -> None:
    (result,) = bits_of(mufu.rcp(of_bits([bits])))
    (mirrored,) = bits_of(mufu.rcp(of_bits([bits | 1 << 31])))
    assert mirrored == result | 1 << 31
    unit_result = bits_of(mufu.rcp(of_bits([bits & 0x7FFFFF | 0x3F800000]))).item()
    shifted = unit_result + (127 - (bits >> 23) << 23)
    assert result == (shifted if shifted >= 0x00800000 else 0)


@pytest.mark.parametrize("unit", [mufu.ex2, mufu.rcp])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)])
def test_shapes(unit: Unit, shape: tuple[int, ...]) -> None:
    x = torch.linspace(-3, 3, 24)[: int(np.prod(shape))].reshape(shape)
    result = unit(x)
    assert result.shape == shape
    assert np.array_equal(bits_of(result).ravel(), bits_of(unit(x.reshape(-1))))


@pytest.mark.parametrize("unit", [mufu.ex2, mufu.rcp])
def test_strided_arguments_are_read_in_order_and_left_alone(unit: Unit) -> None:
    x = torch.linspace(-3, 3, 24).reshape(4, 6)
    before = bits_of(x)
    view = x.T[::2, 1:]
    assert np.array_equal(bits_of(unit(view)), bits_of(unit(view.contiguous())))
    assert np.array_equal(bits_of(unit(x[:1].expand(5, 6))), bits_of(unit(x[:1])).repeat(5, axis=0))
    assert np.array_equal(bits_of(x), before)


@pytest.mark.parametrize("unit", [mufu.ex2, mufu.rcp])
def test_global_modes_do_not_matter(unit: Unit) -> None:
    # Arguments whose results lie near the flush, subnormals among them.
    x = of_bits([*range(0x7E7FFFF0, 0x7E800010), *range(0xC2FBFFF0, 0xC2FC0010), 0x007FFFFF, 0x807FFFFF])
    expected = bits_of(unit(x))
    default = torch.get_default_dtype()
    mufu.constants.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_flush_denormal(True)
        with torch.device("meta"), torch.inference_mode():
            result = bits_of(unit(x))
    finally:
        torch.set_flush_denormal(False)
        torch.set_default_dtype(default)
    assert np.array_equal(result, expected)
    assert np.array_equal(bits_of(unit(x)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ex2", "rcp"])
def test_cuda_gives_the_same_bits(name: str) -> None:
    unit = getattr(mufu, name)
    x = of_bits(np.random.default_rng(1).integers(0, 1 << 32, 1 << 20))
    result = unit(x.cuda())
    assert result.is_cuda
    assert np.array_equal(bits_of(result), bits_of(unit(x)))


@pytest.mark.parametrize("unit", [mufu.ex2, mufu.rcp])
def test_refuses_what_is_not_float32(unit: Unit) -> None:
    for wrong in (torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.bfloat16)):
        with pytest.raises(
            TypeError, match=r"^x: expected a float32 tensor .*, got (float64|bfloat16) \[4\]"
        ):
            unit(wrong)
    with pytest.raises(TypeError, match=r"^x: expected a float32 tensor .*, got float$"):
        unit(1.0)  # type: ignore[arg-type]


def test_the_tool_derives_the_constants_and_sees_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "tools" / "tables" / "fit_mufu.py"
    spec = importlib.util.spec_from_file_location("fit_mufu", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rows = list(mufu._RCP_ROWS)
    rows[77] = (rows[77][0], rows[77][1], rows[77][2] + 1)
    monkeypatch.setattr(mufu, "_RCP_ROWS", tuple(rows))
    assert tool.main(["--check"]) == 1
    ex2, rcp = capsys.readouterr().out.splitlines()
    assert ex2.endswith(", as in the package")
    assert rcp.endswith(", DIFFERENT from the package")


def test_square_is_the_exact_one_less_the_low_columns() -> None:
    x = np.arange(1 << 17, dtype=np.int64)
    squares = mufu._squares(17).numpy()
    # With all bits set every product below column 19 is missing, and nothing else.
    dropped = (x * x) - (squares << 19)
    assert dropped.min() == 0
    assert dropped[-1] == dropped.max() == sum(len(pairs(column)) << column for column in range(19))
    # A 16-bit argument is the same squarer with the operand to the left.
    assert np.array_equal(mufu._squares(16).numpy(), squares[::2])


def pairs(column: int) -> list[tuple[int, int]]:
    """The bit pairs i <= j of a 17-bit operand whose product has the weight 2^column in its square."""
    return [(i, j) for i in range(17) for j in range(i, 17) if i + j + (i != j) == column]


@pytest.mark.parametrize("binade", range(119, 130))
def test_tanh_is_the_recorded_one(binade: int) -> None:
    """Every 256th argument of a binade, of either sign."""
    with np.load(Path(__file__).parents[1] / "recordings" / "tanh.npz") as file:
        first, steps = file[f"{binade}_first"], file[f"{binade}_diff"].astype(np.int64)
    recorded = np.cumsum(np.concatenate([[first], steps]))
    arguments = (binade << 23) + np.arange(0, 1 << 23, 256)
    for sign in (0, 1 << 31):
        bits.assert_same(mufu.tanh(bits.fp32(arguments | sign)), bits.fp32(recorded | sign))


def test_tanh_outside_of_its_table() -> None:
    """Below 2^-8 it is its argument, subnormals too; from 8 on it is 1."""
    itself = [0, 1, 0x007FFFFF, 0x00800000, 0x3B7FFFFF]
    one = [0x41000000, 0x7F7FFFFF, 0x7F800000]
    for sign in (0, 1 << 31):
        bits.assert_same(
            mufu.tanh(bits.fp32([x | sign for x in itself])), bits.fp32([x | sign for x in itself])
        )
        expected = bits.fp32([0x3F800000 | sign] * len(one))
        bits.assert_same(mufu.tanh(bits.fp32([x | sign for x in one])), expected)
    bits.assert_same(mufu.tanh(bits.fp32([0x7F800001, 0xFFC00000])), bits.fp32([0x7FFFFFFF] * 2))
