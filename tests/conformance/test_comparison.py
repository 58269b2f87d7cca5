"""Bitwise comparison: exhaustive over bf16 where that is possible."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch

from mxfp4ref.conformance.comparison import (
    FAR,
    assert_bits_equal,
    differing,
    first_difference,
    in_words,
    ulp_distance,
)
from tests.helpers.hostile_kernels import _Liar, _Wrapper

EVERY_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_every_bf16_equals_itself_and_nothing_else() -> None:
    assert not bool(differing(EVERY_BF16, EVERY_BF16).any())
    assert bool(differing(EVERY_BF16, EVERY_BF16.roll(1)).all())
    assert int(ulp_distance(EVERY_BF16, EVERY_BF16).max()) == 0


def test_ulp_distance_of_neighbours_over_all_finite_bf16() -> None:
    values = EVERY_BF16[torch.isfinite(EVERY_BF16)]
    ascending = values[values.to(torch.float64).argsort(stable=True)]
    # -0 and +0 are one number; everything else is one step from the next.
    steps = ulp_distance(ascending[1:], ascending[:-1])
    assert sorted(steps.unique().tolist()) == [0, 1]
    assert int((steps == 0).sum()) == 1


@pytest.mark.parametrize(
    ("got", "expected", "ulps"),
    [
        (1.0, 1.0078125, 1),
        (0.0, -0.0, 0),
        (-(2.0**-133), 2.0**-133, 2),
        (float("nan"), 1.0, FAR),
        (3e38, torch.inf, 30),
    ],
)
def test_ulp_distance(got: float, expected: float, ulps: int) -> None:
    one, other = torch.tensor([got]).to(torch.bfloat16), torch.tensor([expected]).to(torch.bfloat16)
    if ulps == 30:
        ulps = 0x7F80 - int(one.view(torch.int16))
    assert int(ulp_distance(one, other)) == ulps


def test_nan_payloads_count() -> None:
    quiet, canonical = (
        torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16) for bits in (0x7FC0, 0x7FFF)
    )
    assert bool(differing(quiet, canonical))
    difference = first_difference(quiet, canonical)
    assert difference is not None
    assert str(difference) == "at [0]: got 0x7FC0 (NaN), expected 0x7FFF (NaN), NaNs of other bits"


def test_far_apart_is_not_nan() -> None:
    """2^63 and more between two numbers are no NaN; neither is what is more than some small limit."""
    for dtype, most in ((torch.float64, FAR - 1), (torch.float32, 2 * 0x7F800000)):
        largest = torch.tensor([torch.inf], dtype=dtype)
        assert int(ulp_distance(largest, -largest)) == most
        with pytest.raises(AssertionError, match=r"got 0x3FF0|got 0x3F80") as error:
            assert_bits_equal(torch.ones(1, dtype=dtype), -torch.ones(1, dtype=dtype))
        assert "NaN" not in str(error.value)
    ends = torch.tensor([-(2**63), 2**63 - 1])
    assert ulp_distance(ends, ends.flip(0)).tolist() == [FAR - 1, FAR - 1]


@pytest.mark.parametrize(
    "dtype", sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
)
def test_every_dtype(dtype: torch.dtype) -> None:
    """A flipped bit is seen in all; what has no bits to compare is refused in words."""
    raw = torch.arange(64, dtype=torch.uint8)
    if "q" in str(dtype):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch._empty_affine_quantized([4], scale=1.0, zero_point=0, dtype=dtype)
        with pytest.raises(AssertionError, match="expected two tensors, got a quantized"):
            assert_bits_equal(quantized, quantized)
        return
    if dtype == torch.bool:
        raw = raw % 2
    other = raw.clone()
    other[20] ^= 1
    one, other = raw.view(dtype), other.view(dtype)
    assert_bits_equal(one, raw.clone().view(dtype))
    with pytest.raises(AssertionError, match=r"1 of [0-9]+ elements differ; first at") as error:
        assert_bits_equal(other, one)
    assert first_difference(other, one) is not None
    assert str(first_difference(other, one)) in str(error.value)


def test_other_dtypes() -> None:
    codes = torch.tensor([1, 255], dtype=torch.uint8)
    assert int(ulp_distance(codes, codes.flip(0)).max()) == 254
    assert not bool(differing(torch.tensor([True]), torch.tensor([True])).any())
    with pytest.raises(TypeError, match=r"expected dtype torch\.uint8, got torch\.int8"):
        differing(codes.view(torch.int8), codes)
    with pytest.raises(ValueError, match=r"expected shape \[2\], got \[1\]"):
        differing(codes[:1], codes)


def test_assert_bits_equal() -> None:
    zeros = torch.zeros(2, 3)
    assert_bits_equal(zeros, zeros.clone())
    with pytest.raises(
        AssertionError, match=r"x: 6 of 6 elements differ; first at \[0, 0\]: got 0x80000000 \(-0\)"
    ):
        assert_bits_equal(-zeros, zeros, "x")
    with pytest.raises(
        AssertionError, match=r"expected torch\.float32 \[2, 3\], got torch\.float32 \[3, 2\]"
    ):
        assert_bits_equal(zeros.T, zeros)
    with pytest.raises(AssertionError, match="expected two tensors, got list"):
        assert_bits_equal([0.0], zeros)  # type: ignore[arg-type]


def test_integers_have_no_ulp() -> None:
    ids = torch.tensor([1, 2, 250], dtype=torch.int32)
    assert in_words(ids, ids + torch.tensor([0, 3, 1], dtype=torch.int32)) == (
        "2 of 3 elements differ; first at [1]: got 2, expected 5"
    )
    assert ", at most 128 ulp; first" in in_words(
        torch.tensor([1.0]).bfloat16(), torch.tensor([2.0]).bfloat16()
    )


LARGEST = torch.finfo(torch.float64).max


@pytest.mark.parametrize(
    ("got", "expected", "dtype", "words"),
    [
        (1.0, -1.0, torch.float64, "0xBFF0000000000000 (-1), 9,214,364,837,600,034,816 ulp"),
        (
            LARGEST,
            -LARGEST,
            torch.float64,
            "(-1.7976931348623157e+308), 9,223,372,036,854,775,806 or more ulp",
        ),
        (1.0, float("nan"), torch.float64, "(NaN), a NaN on one side"),
        (1.0, 1 + 2.0**-52, torch.float64, "(1.0000000000000002), 1 ulp"),
        (1.0, -1.0, torch.float16, "(-1), 30,720 ulp"),
        (1.0, -1.0, torch.float8_e4m3fn, "0xB8 (-1), 112 ulp"),
        (1.0, float("nan"), torch.float8_e5m2, "a NaN on one side"),
        (1.0, 8.0, torch.float8_e8m0fnu, "0x82 (8), 3 ulp"),
        (1 + 1j, 1 - 1j, torch.complex128, "((1-1j)), 9,214,364,837,600,034,816 ulp"),
        (1 << 63, (1 << 63) - 1, torch.uint64, "(9223372036854775807), by 1"),
        (True, False, torch.bool, "0x00 (False), by 1"),
    ],
)
def test_values_and_distances(got: float, expected: float, dtype: torch.dtype, words: str) -> None:
    native = isinstance(got, int) or dtype in (torch.float64, torch.complex128)
    one, other = (
        torch.tensor([v], dtype=dtype) if native else torch.tensor([v]).to(dtype) for v in (got, expected)
    )
    assert str(first_difference(one, other)).endswith(words)
    assert str(first_difference(other, one)).endswith(words.split(", ", 1)[-1])
    assert first_difference(one, one.clone()) is None
    assert int(ulp_distance(one, one.clone())) == 0


def test_packed_float4() -> None:
    one, other = (
        torch.tensor([0x21, last], dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for last in (0xFF, 0xFE)
    )
    assert_bits_equal(one, one.clone())
    words = "output: 1 of 2 elements differ; first at [1]: got 0xFF (-6 -6), expected 0xFE (-4 -6), 1 ulp"
    with pytest.raises(AssertionError, match=f"^{re.escape(words)}$"):
        assert_bits_equal(one, other)


@pytest.mark.filterwarnings("ignore:.*(nested|quantized|quantize)")
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("quantized", lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)),
        ("meta", lambda: torch.ones(3, device="meta")),
        ("sparse_coo", lambda: torch.ones(3).to_sparse()),
        ("nested", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])),
    ],
)
def test_tensors_without_elements_of_their_own_are_refused(
    kind: str, make: Callable[[], torch.Tensor]
) -> None:
    for pair in ((make(), make()), (torch.ones(3), make()), (make(), torch.ones(3))):
        with pytest.raises(AssertionError, match=f"output: expected two tensors, got a {kind}"):
            assert_bits_equal(*pair)
        with pytest.raises(
            TypeError, match=f"expected a tensor with dense storage, got a (torch.)?{kind} tensor"
        ):
            differing(*pair)


def test_lazily_negated_and_conjugated_tensors_are_what_they_say() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    assert_bits_equal(z.conj(), z.conj().resolve_conj())
    assert_bits_equal(z.conj().imag, torch.tensor([-2.0, 4.0]))
    assert bool(differing(z.conj().imag, z.imag).all())


@pytest.mark.parametrize("compare", [differing, ulp_distance, first_difference, in_words])
def test_subclasses_are_compared_by_what_they_hold(compare: Callable[..., object]) -> None:
    held = torch.tensor([1.0, -0.0, torch.nan])
    for one, other in ((held, held.flip(0)), (held, held.clone())):
        honest = str(compare(one, other))
        assert str(compare(one.as_subclass(_Liar), other)) == honest
        assert str(compare(one, other.as_subclass(_Liar))) == honest
    for name, pair in (("got", (_Wrapper(held), held)), ("expected", (held, _Wrapper(held)))):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor with dense storage, got a"):
            compare(*pair)
