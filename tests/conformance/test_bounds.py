"""Bounds hold every correct evaluation: hundreds of them, in random orders and roundings, and the kernel's own."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mxfp4ref.conformance.bounds.call_bounds import Bounds, bound
from mxfp4ref.conformance.kernels.stand_ins import torch_bf16
from mxfp4ref.defects import get_defect
from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.mxfp4 import dequantize
from mxfp4ref.goldens import open_goldens
from mxfp4ref.goldens.runs import Run, runs
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.activation import GEGLU, SITU, SWIGLU, SWIGLU_BIAS, SWIGLU_STEP
from tests.helpers.usual import first

GOLDENS = open_goldens()
MOE = [
    n
    for n in GOLDENS.names()
    if not n.startswith(("models/", "sizes/", "gpt_oss/", "tile_n/"))
    and json.loads((GOLDENS.root / f"{n}.json").read_bytes())["kind"] == "moe"
]
BATCHES, EVALUATIONS = 4, 50  # at a time
HIDDEN, INNER, TOKENS, TOP_K = 128, 128, 2, 2
COLUMNS = 32  # of the output that are evaluated


def small_call(seed: int, *, cancelling: bool = False, parameters: bool = False) -> MoeCall:
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random)

    def scales(*shape: int) -> Tensor:
        return integers(112, 130, *shape).to(torch.uint8)

    w1, s1 = integers(0, 256, 2, 2 * INNER, HIDDEN // 2).to(torch.uint8), scales(2, 2 * INNER, HIDDEN // 32)
    # Wide enough that almost every addition rounds.
    x = torch.randn(TOKENS, HIDDEN, generator=random) * torch.exp2(integers(-9, 1, TOKENS, HIDDEN))
    if cancelling:  # the second half of K takes back what the first half gave
        x[:, HIDDEN // 2 :] = -x[:, : HIDDEN // 2]
        w1[..., HIDDEN // 4 :] = w1[..., : HIDDEN // 4]
        s1[..., HIDDEN // 64 :] = s1[..., : HIDDEN // 64]
    optional: dict[str, Any] = {}
    if parameters:
        optional = {
            "fc1_biases": torch.randn(2, 2 * INNER, generator=random).to(torch.bfloat16),
            "fc2_biases": torch.randn(2, HIDDEN, generator=random).to(torch.bfloat16),
            "swiglu_alpha": torch.tensor([1.702, 0.5]),
            "swiglu_beta": torch.tensor([1.0, -0.25]),
            "swiglu_limit": torch.tensor([2.0, 7.0]),
        }
    w2 = integers(0, 256, 2, HIDDEN, INNER // 2).to(torch.uint8)
    experts = Experts(w1, s1, w2, scales(2, HIDDEN, INNER // 32), **optional)
    ids = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    return MoeCall(x.to(torch.bfloat16), ids, torch.rand(TOKENS, TOP_K, generator=random), experts)


class Evaluator:
    """Correct evaluations, many at a time, each with an order of its own."""

    def __init__(self, seed: int, storage: str) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.storage = storage

    def choice(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.random))

    def round(self, exact: Tensor) -> Tensor:
        """A float64 result as float32 (to nearest, or toward zero) or as it is."""
        if self.rounding == "float64":
            return exact
        if self.rounding == "zero":
            return (exact.view(torch.int64) & -(1 << 29)).view(torch.float64)
        return exact.to(torch.float32).to(torch.float64)

    def store(self, value: Tensor) -> Tensor:
        if self.storage == "wider" and self.choice(2):
            return value
        return value.to(torch.float32).to(torch.bfloat16).to(torch.float64)

    def sum(self, terms: Tensor) -> Tensor:
        """`[S, N, K]` added up over K in S random orders: one by one, or pairs, pairs of pairs, ..."""
        order = torch.rand(terms.shape[0], 1, terms.shape[2], generator=self.random).argsort(-1)
        terms, order = terms.movedim(-1, 0), order.movedim(-1, 0)
        terms = terms.gather(0, order.expand(terms.shape))
        if self.choice(2):
            while len(terms) > 1:
                pairs = self.round(terms[0 : len(terms) // 2] + terms[len(terms) // 2 : len(terms) // 2 * 2])
                terms = torch.cat((pairs, terms[len(terms) // 2 * 2 :]))
            return terms[0]
        total = terms[0]
        for term in terms[1:]:
            total = self.round(total + term)
        return total

    def expert(self, call: MoeCall, token: int, slot: int) -> Tensor:
        """`[S, COLUMNS]` for one slot."""
        expert = int(call.token_selected_experts[token, slot])
        e = call.experts.select(torch.tensor([expert]))
        assert e.fc1_scales is not None
        assert e.fc2_scales is not None
        w1 = dequantize(e.fc1_weights[0], e.fc1_scales[0], dtype=torch.float32).to(torch.float64)
        w2 = dequantize(e.fc2_weights[0], e.fc2_scales[0], dtype=torch.float32).to(torch.float64)[:COLUMNS]
        terms = (fp32.bf16_to_fp64(call.input[token]) * w1).expand(EVALUATIONS, -1, -1)
        value = self.store(self.sum(terms))
        if e.fc1_biases is not None:
            value = self.round(value + fp32.bf16_to_fp64(e.fc1_biases[0]))
        up, gate = value.chunk(2, -1)
        given = zip(call.activation.defaults, call.activation.defaults.values(), strict=True)
        parameters = [
            default if getattr(e, name) is None else float(getattr(e, name)) for name, default in given
        ]
        activation = self.store(self.ACTIVATIONS[call.activation.id](self, up, gate, *parameters))
        value = self.store(self.sum(activation[:, None] * w2))
        if e.fc2_biases is None:
            return value
        return self.round(value + fp32.bf16_to_fp64(e.fc2_biases[0, :COLUMNS].contiguous()))

    def sigmoid(self, z: Tensor) -> Tensor:
        error = (2 * torch.rand(z.shape, generator=self.random, dtype=torch.float64) - 1) * 2.0**-22
        return torch.sigmoid(z) * (1 + error * (3 + z.abs() / 2))

    def tanh(self, x: Tensor, b: float) -> Tensor:
        z = self.round(x / b)
        return self.round(torch.tanh(z)) if self.choice(2) else self.round(2 * self.sigmoid(2 * z) - 1)

    def swiglu(
        self, up: Tensor, gate: Tensor, alpha: float = 1.0, beta: float = 0.0, limit: float = torch.inf
    ) -> Tensor:
        up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
        silu = self.round(gate * self.sigmoid(self.round(gate * alpha)))
        return self.round(silu * self.round(up + beta))

    def swiglu_step(self, up: Tensor, gate: Tensor, limit: float) -> Tensor:
        return self.round(self.round(gate * self.sigmoid(gate)).clamp(max=limit) * up.clamp(-limit, limit))

    def situ(self, up: Tensor, gate: Tensor, beta: float, linear_beta: float) -> Tensor:
        gated = self.round(self.round(self.tanh(gate, beta) * beta) * self.sigmoid(gate))
        return self.round(gated * self.round(self.tanh(up, linear_beta) * linear_beta))

    def geglu(self, up: Tensor, gate: Tensor) -> Tensor:
        erf = self.round(torch.erf(self.round(gate * 0.5**0.5)))
        return self.round(self.round(self.round(gate / 2) * self.round(1 + erf)) * up)

    ACTIVATIONS: ClassVar = {
        SWIGLU: swiglu,
        GEGLU: geglu,
        SWIGLU_BIAS: swiglu,
        SWIGLU_STEP: swiglu_step,
        SITU: situ,
    }

    def __call__(self, call: MoeCall) -> Tensor:
        """`[S, M, COLUMNS] bf16`."""
        self.rounding = ("nearest", "zero", "float64")[self.choice(3)]
        rows = []
        for token, ids in enumerate(call.token_selected_experts.tolist()):
            slots = [slot for slot, expert in enumerate(ids) if expert >= 0]
            parts = [float(call.token_final_scales[token, s]) * self.expert(call, token, s) for s in slots]
            rows.append(self.sum(torch.stack([self.round(part) for part in parts], -1)))
        return torch.stack(rows, 1).to(torch.float32).to(torch.bfloat16)


@cache
def of_case(name: str, storage: str) -> tuple[Run, Bounds]:
    one = runs(GOLDENS.load(name))[0]
    return one, bound(one.inputs, storage=storage)


def escapes(bounds: Bounds, output: Tensor) -> int:
    return int((~bounds.contains(output)).sum())


@pytest.mark.parametrize("storage", ["wider", "bf16"])
@pytest.mark.parametrize("options", [{}, {"cancelling": True}, {"parameters": True}], ids=str)
def test_random_correct_evaluations_stay_inside(storage: str, options: dict[str, bool]) -> None:
    check_evaluations(small_call(1, **options), storage, cancelling=options.get("cancelling", False))


@pytest.mark.parametrize(
    ("activation_type", "parameters"), [(GEGLU, False), (SWIGLU_STEP, False), (SITU, True)]
)
def test_random_correct_evaluations_of_other_activations(activation_type: int, parameters: bool) -> None:
    call = replace(small_call(1, parameters=parameters), activation_type=activation_type)
    situ = {"situ_beta": torch.tensor([3.0, 0.7]), "situ_linear_beta": torch.tensor([1.5, -6.0])}
    if parameters:
        call = replace(call, experts=replace(call.experts, **situ))
    check_evaluations(call, "wider", cancelling=False)


def check_evaluations(call: MoeCall, storage: str, *, cancelling: bool) -> None:
    bounds = bound(call, storage=storage)
    probable = bound(call, storage=storage, confidence=1 - 1e-9)
    evaluate = Evaluator(2, storage)
    outputs = torch.cat([evaluate(call) for _ in range(BATCHES)])
    for inside in (bounds, probable):
        part = Bounds(*(t[:, :COLUMNS] for t in (inside.lower, inside.upper, inside.overflows)))
        assert escapes(part, outputs) == 0
    # The evaluations do differ: in ordinary sums by their storage, in cancelling ones by order and rounding.
    spread = outputs.float().amax(0) - outputs.float().amin(0)
    if cancelling or storage == "wider":
        assert float((spread > 0).float().mean()) > (0.9 if cancelling else 0.3)


@pytest.mark.parametrize(
    "name", ["float64_gemm", "float32_gemm", "split_k", "finalize_float64", "sigmoid_exact"]
)
def test_permitted_arithmetic_stays_inside(name: str) -> None:
    for case in ("gemm/mirrored_hidden_384", "gemm/mirrored_inner_1536", "finalize/cancelling_experts"):
        one, bounds = of_case(case, "bf16")
        assert escapes(bounds, get_defect(name).run(one.inputs)) == 0


def test_wider_intermediates_need_the_wider_bounds() -> None:
    """GEMM1 kept in float32 is correct where wider intermediates are, and not where bf16 is asked for."""
    call = small_call(3)
    output = get_defect("gemm1_kept_fp32").run(call)
    assert escapes(bound(call), output) == 0
    assert escapes(bound(call, storage="bf16", confidence=1 - 1e-9), output) > 0


@pytest.mark.parametrize("name", ["gate_up_swapped", "scale_off_by_one_group", "last_slot_dropped"])
def test_mistakes_escape(name: str) -> None:
    call = small_call(4)
    assert escapes(bound(call), get_defect(name).run(call)) > 0


def test_width_is_ordered() -> None:
    call = small_call(5)
    rigorous, probable = bound(call), bound(call, confidence=1 - 1e-9)
    narrow = bound(call, storage="bf16")
    for inner in (probable, narrow):
        assert bool((inner.lower >= rigorous.lower).all())
        assert bool((inner.upper <= rigorous.upper).all())
    assert bool((narrow.upper - narrow.lower < rigorous.upper - rigorous.lower).any())


def test_nothing_may_be_off_where_nothing_is_rounded() -> None:
    call = small_call(6)
    silent = replace(call, token_selected_experts=torch.full_like(call.token_selected_experts, -1))
    for bounds in (bound(silent), bound(replace(call, input=torch.zeros_like(call.input)))):
        assert bool((bounds.lower == 0).all())
        assert bool((bounds.upper == 0).all())
        assert not bool(bounds.overflows.any())


def test_special_values_are_the_kernels_and_leave_other_tokens_alone() -> None:
    call = small_call(7)
    x = call.input.clone()
    x[1, 5] = torch.inf
    call = replace(call, input=x)
    bounds, expected = bound(call), forward(call)
    assert not bool(torch.isfinite(expected[1]).any())
    assert not bool(bounds.overflows.any())
    assert escapes(bounds, expected) == 0
    for other in (torch.nan, torch.inf, -torch.inf, 12345.0):
        wrong = torch.full_like(x, other)
        assert not bool((bounds.contains(wrong)[1] & ~same_class(wrong, expected)[1]).any())
        assert not bool(bounds.contains(wrong)[0].any())


def same_class(one: Tensor, other: Tensor) -> Tensor:
    return (torch.isnan(one) & torch.isnan(other)) | (one == other)


FINITE_MAX = float(torch.finfo(torch.bfloat16).max)


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        *((name, "wider") for name in MOE),
        *first(len(MOE[::4]), ((name, "bf16") for name in dict.fromkeys([*MOE[::4], *MOE]))),
    ],
)
def test_the_kernel_is_a_correct_evaluation_and_special_values_are_none_but_its_own(
    name: str, storage: str
) -> None:
    """No number for NaN, no NaN for a number or an infinity, no largest number for an infinity: in every element."""
    one, bounds = of_case(name, storage)
    expected = one.expected["output"]
    assert escapes(bounds, expected) == 0

    def accepted(output: Tensor) -> Tensor:
        return bounds.contains(output, expected)

    nan, infinite = torch.isnan(expected), torch.isinf(expected)
    assert bool(accepted(expected).all())
    for value in (12345.0, 0.0, torch.inf, -torch.inf):
        assert not bool((accepted(torch.full_like(expected, value)) & nan).any())
    assert not bool((accepted(torch.full_like(expected, torch.nan)) & ~nan).any())
    largest = torch.copysign(torch.full_like(expected, FINITE_MAX), expected)
    either = bounds.lower.abs().minimum(bounds.upper.abs()) <= FINITE_MAX  # by less than its rounding errors
    assert not bool((accepted(largest) & infinite & ~either).any())
    assert int((accepted(largest) & infinite).sum()) <= 10
    inside = ~bounds.overflows & ~nan & ~infinite
    for value in (torch.inf, -torch.inf):
        assert not bool((accepted(torch.full_like(expected, value)) & inside).any())


def test_torch_agrees_but_on_byte_255_the_clamp_of_nan_and_tiny_reciprocals() -> None:
    """It takes byte 255 for NaN, as OCP MX has it; its clamp keeps NaN, and its quotients do not flush 1 / 3e38."""
    outside = {}
    for name in MOE:
        one, bounds = of_case(name, "wider")
        expected = one.expected["output"]
        outside[name] = int((~bounds.contains(torch_bf16("moe", one.inputs), expected)).sum())
    assert {name for name, count in outside.items() if count} == {
        "activation/non_finite_before_clamp",
        "formats/scale_bytes_0_and_255",
        "formats/scale_bytes_0_and_255_before_activation",
        "step_and_situ/step_all_at_once",
        "step_and_situ/step_non_finite",
        "step_and_situ/situ_non_finite",
        "step_and_situ/situ_strange_parameters",
        "step_and_situ/swiglu_bias_alone",
        "step_and_situ/swiglu_bias_non_finite",
        "ungated/relu_non_finite",
        "ungated/relu2_non_finite",
    }


def test_arguments_are_checked() -> None:
    call = small_call(8)
    with pytest.raises(ValueError, match="storage: expected one of"):
        bound(call, storage="fp16")
    with pytest.raises(ValueError, match="confidence: expected a probability"):
        bound(call, confidence=1.0)
    dense = Experts(
        torch.zeros(2, 2 * INNER, HIDDEN, dtype=torch.bfloat16), None,
        torch.zeros(2, HIDDEN, INNER, dtype=torch.bfloat16), None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="call: expected MXFP4 weights beside bf16 activations"):
        bound(replace(call, experts=dense))
    expected = forward(call)
    for output, error, words in (
        (expected[:1], ValueError, r"output: expected .*, got bfloat16 \[1, "),
        (expected.view(torch.int16), TypeError, "output: expected a bfloat16 or"),
        (torch._neg_view(-expected), TypeError, "output: expected .* got a lazily negated"),
        (None, TypeError, "output: expected"),
    ):
        with pytest.raises(error, match=words):
            bound(call).contains(output)  # type: ignore[arg-type]
