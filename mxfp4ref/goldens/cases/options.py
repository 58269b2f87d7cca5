"""Suite `options`: no routing weights, all-to-all, W4A8 with other activations and in fp16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.formats.experts import Experts
from mxfp4ref.formats.humming_experts import HummingExperts
from mxfp4ref.goldens.cases.definition import Content, define, moe_content
from mxfp4ref.goldens.cases.source import Source, float32
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.model.humming import inputs_of
from mxfp4ref.sm90.activation import RELU2, SITU, SWIGLU_STEP

_SIZE, _TOKENS = 128, 16


def _call(source: Source, experts: Experts, **options: Any) -> MoeCall:
    ids = source.distinct("ids", _TOKENS, 2, experts.num_experts * options.get("ep_size", 1))
    weights = source.weights(_TOKENS, 2)
    if options.get("unscaled"):
        weights = torch.ones_like(weights)
    return MoeCall(source.normal("input", _TOKENS, _SIZE), ids, weights, experts, **options)


def _prepared(call: MoeCall, x: Tensor | None = None) -> MoeCall:
    """The call with its experts prepared for W4A8, and with another input, whose dtype biases then get."""
    x = call.input if x is None else x
    experts = HummingExperts.prepare(call.experts)
    names = ("fc1_biases", "fc2_biases")
    cast = {name: bias.to(x.dtype) for name in names if (bias := getattr(experts, name)) is not None}
    return replace(call, input=x, experts=replace(experts, **cast))


def _w4a8(call: MoeCall) -> Content:
    defaults = {"ep_size": 1, "ep_rank": 0, "activation_type": 3, "unscaled": False, "enable_alltoall": False}
    options = {name: value for name, default in defaults.items() if (value := getattr(call, name)) != default}
    return Content({**inputs_of(call), "output": forward(call)}, options)


def _experts(source: Source, **options: Any) -> Experts:
    return source.experts(2, _SIZE, _SIZE, fc2_scales=(114, 119), **options)


@define(unique_for="no routing weights")
def no_routing_weights(source: Source) -> Content:
    """A call without routing weights: the experts' outputs and biases are summed up as they are."""
    return moe_content(_call(source, _experts(source, biases=True), unscaled=True), compact=True)


def _foreign(source: Source, experts: Experts) -> MoeCall:
    """The second of two ranks, some of whose tokens have no expert there, and one no expert at all."""
    call = _call(source, experts, ep_size=2, ep_rank=1, enable_alltoall=True)
    call.token_selected_experts[::3] = torch.tensor([0, 1], dtype=torch.int32)
    call.token_selected_experts[1, 0], call.token_selected_experts[2] = -1, -1
    return call


@define(unique_for="rows that all-to-all leaves")
def alltoall_foreign_tokens(source: Source) -> Content:
    """A rank with `enable_alltoall`: tokens without an expert of its own get no output, which is stored as zeros."""
    return moe_content(_foreign(source, _experts(source, biases=True)), compact=True)


@define("w4a8", unique_for="W4A8 without routing weights")
def w4a8_no_routing_weights(source: Source) -> Content:
    """A W4A8 call without routing weights."""
    return _w4a8(_prepared(_call(source, _experts(source, biases=True), unscaled=True)))


@define("w4a8", unique_for="rows that all-to-all leaves with W4A8")
def w4a8_alltoall_foreign_tokens(source: Source) -> Content:
    """A W4A8 rank with `enable_alltoall`, some of whose tokens have no expert there."""
    return _w4a8(_prepared(_foreign(source, _experts(source))))


@define("w4a8", catches="fp8_activation_bf16", unique_for="SwigluStep with W4A8")
def w4a8_step(source: Source) -> Content:
    """SwigluStep with W4A8, limits of 0.2 and 3: the activation is quantised from float32."""
    experts = replace(_experts(source), swiglu_limit=float32([0.2, 3.0]))
    return _w4a8(_prepared(_call(source, experts, activation_type=SWIGLU_STEP)))


@define("w4a8", catches="fp8_activation_bf16", unique_for="SiTU with W4A8")
def w4a8_situ(source: Source) -> Content:
    """SiTU with W4A8 and biases, a beta by expert and the linear beta that is compiled in."""
    experts = replace(_experts(source, biases=True), situ_beta=float32([1.32, 4.0]))
    return _w4a8(_prepared(_call(source, experts, activation_type=SITU)))


@define("w4a8", catches="fp8_activation_bf16", unique_for="Relu2 with W4A8")
def w4a8_relu2(source: Source) -> Content:
    """Relu2, which has no gate, with W4A8 and biases: squares of a wide range within a row."""
    experts = _experts(source, biases=True, gated=False)
    return _w4a8(_prepared(_call(source, experts, activation_type=RELU2)))


@define("w4a8", catches="fp8_output_through_bf16", unique_for="W4A8 in fp16")
def w4a8_fp16(source: Source) -> Content:
    """An ordinary W4A8 call in fp16: input, biases and output, and the outputs of both GEMMs."""
    call = _call(source, _experts(source, biases=True))
    return _w4a8(_prepared(call, call.input.to(torch.float16)))


@define("w4a8", catches="fp8_output_through_bf16", unique_for="special values of W4A8 in fp16")
def w4a8_fp16_special(source: Source) -> Content:
    """A W4A8 call in fp16 with rows of zeros, subnormals, NaN, Inf and the largest numbers, so that outputs of the
    GEMMs are subnormal or overflow to Inf, and rows of any bits.
    """
    call = _call(source, _experts(source))
    x = call.input.to(torch.float16)
    x[0], x[1, 7], x[2, 9], x[3, 11] = 0.0, torch.nan, torch.inf, -torch.inf
    x[4:6] = (x[4:6].float() * 2.0**-22).to(torch.float16)
    x[6:8] = (x[6:8].float() * 2.0**13).clamp(-65504, 65504).to(torch.float16)
    x[8] = (x[8].float() * 2.0**-14).to(torch.float16)
    x[9:12] = source.spread("bits", -14, 15, 3, _SIZE).to(torch.float16)
    return _w4a8(_prepared(call, x))
