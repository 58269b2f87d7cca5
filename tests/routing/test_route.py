"""Routers that no published function has: other fields of the record, images, tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxfp4ref.routing import Gate, Tokens, deepseek_v3, deepseek_v4, route, routing_weights
from mxfp4ref.routing.models import DEEPSEEK_V3, DEEPSEEK_V4, PRESETS
from mxfp4ref.routing.scoring import sqrt_softplus
from tests.helpers import mpmath_router as exact

V4 = replace(DEEPSEEK_V4, top_k=3, factor=1.5)
torch.manual_seed(0)
LOGITS, BIAS, IMAGE_BIAS = torch.randn(12, 16), torch.randn(16) / 8, torch.randn(16) / 8
IMAGES = torch.arange(12) % 3 == 1


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_the_functions_are_their_records() -> None:
    routing = route(V4, LOGITS, Gate(BIAS))
    function = deepseek_v4(LOGITS, BIAS, top_k=3, routed_scaling_factor=1.5)
    assert same(routing.scales, function.scales)
    assert torch.equal(routing.ids, function.ids)
    groups = replace(DEEPSEEK_V3, top_k=3, n_group=4, topk_group=2)
    by_function = deepseek_v3(LOGITS, BIAS, top_k=3, n_group=4, topk_group=2)
    assert same(route(groups, LOGITS, Gate(BIAS)).scales, by_function.scales)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("normalize", ["none", "sum"])
def test_normalisation_is_the_record_s(preset: object, normalize: str) -> None:
    preset = replace(preset, normalize=normalize, top_k=3, n_group=1, topk_group=1, factor=0.37)
    logits = LOGITS.abs()  # the raw logits are the scores of one of them, and their sum must not be 0
    routing = route(preset, logits)
    wanted = routing_weights(
        preset.score(logits), routing.ids, normalize=normalize, epsilon=preset.epsilon, factor=0.37
    )
    assert same(routing.scales, wanted)


def test_temperature_divides_the_logits_once() -> None:
    warm = route(replace(V4, temperature=0.3), LOGITS, Gate(BIAS))
    by_hand = route(V4, LOGITS / torch.tensor(0.3), Gate(BIAS))
    assert same(warm.scales, by_hand.scales)
    assert torch.equal(warm.ids, by_hand.ids)
    assert not same(warm.scales, route(V4, LOGITS, Gate(BIAS)).scales)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        route(replace(V4, temperature=0.0), LOGITS, Gate(BIAS))


def test_tokens_of_images_have_a_bias_of_their_own() -> None:
    routing = route(V4, LOGITS, Gate(BIAS, IMAGE_BIAS), Tokens(image_mask=IMAGES))
    for row, image in enumerate(IMAGES.tolist()):
        bias = (IMAGE_BIAS if image else BIAS).tolist()
        ids, weights = exact.deepseek_v4(LOGITS[row].tolist(), bias, 3, 1.5)[:2]
        assert routing.ids[row].tolist() == list(ids)
        assert routing.scales[row].tolist() == [float(w) for w in weights]
    assert not torch.equal(routing.ids, route(V4, LOGITS, Gate(BIAS)).ids)
    assert torch.equal(route(V4, LOGITS, Gate(BIAS, IMAGE_BIAS)).ids, route(V4, LOGITS, Gate(BIAS)).ids)


def test_tokens_of_images_pass_the_table_by() -> None:
    """Their ids are beyond the vocabulary, and the table is not asked."""
    table = torch.stack([torch.randperm(16)[:3] for _ in range(5)])
    token_ids = torch.where(IMAGES, 10**6, torch.arange(12) % 5)
    gate = Gate(BIAS, IMAGE_BIAS, table)
    routing = route(V4, LOGITS, gate, Tokens(token_ids=token_ids, image_mask=IMAGES))
    assert torch.equal(routing.ids[~IMAGES].long(), table[token_ids[~IMAGES]])
    of_images = route(V4, LOGITS, Gate(IMAGE_BIAS))
    assert torch.equal(routing.ids[IMAGES], of_images.ids[IMAGES])
    scores = sqrt_softplus(LOGITS)
    assert same(routing.scales, routing_weights(scores, routing.ids, normalize="sum", factor=1.5))


def test_padding_is_neither_text_nor_image() -> None:
    padded = torch.arange(12) % 4 == 1
    tokens = Tokens(padded=padded, image_mask=IMAGES)
    routing = route(V4, LOGITS, Gate(BIAS, IMAGE_BIAS), tokens)
    assert (routing.ids[padded] == -1).all()
    assert not routing.scales[padded].any()
    # A mask on padded rows alone needs no bias.
    route(V4, LOGITS, Gate(BIAS), Tokens(padded=padded, image_mask=padded))


@pytest.mark.parametrize(
    ("gate", "tokens", "message"),
    [
        (Gate(BIAS), Tokens(image_mask=IMAGES), "image_bias: expected a bias for the tokens of images"),
        (Gate(BIAS, IMAGE_BIAS), Tokens(image_mask=IMAGES[1:]), "image_mask: expected"),
        (Gate(BIAS, IMAGE_BIAS), Tokens(image_mask=IMAGES.int()), "image_mask: expected a bool"),
        (Gate(tid2eid=torch.zeros(4, 3).long()), Tokens(), "token_ids: expected"),
        (Gate(BIAS[1:]), Tokens(), "correction_bias: expected"),
    ],
)
def test_refusals(gate: Gate, tokens: Tokens, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        route(V4, LOGITS, gate, tokens)
