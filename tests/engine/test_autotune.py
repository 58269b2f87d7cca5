"""flashinfer's autotune caches: read, mapped to a call, held against the bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mxfp4ref.__main__ import commands
from mxfp4ref.engine.autotune import AutotuneCache, Prediction, read_autotune_cache, token_bucket
from mxfp4ref.engine.replaying import ReplayOptions, replay
from mxfp4ref.formats.generations import BYTEWISE
from mxfp4ref.goldens import open_goldens
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.flashinfer import torch_ref_cutlass_fused_moe
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import Sm90Kernel, tactics_of
from tests.helpers import autotune_caches, layers, recorded
from tests.helpers.drop_in import arguments_of

LOGICAL = open_goldens().load("gemm/mirrored_hidden_1536").call()  # every K tile of GEMM1 gives other bits
CALL = replace(LOGICAL, experts=layers.to_sm90(LOGICAL.experts))
ARGUMENTS = arguments_of(CALL)
BUCKET = token_bucket(CALL.num_tokens)
# Tactics 4 to 7 are tile (64, 16, 256), those of GEMM2 follow the 116 of GEMM1.
TILE_256 = (4, len(tactics_of(CALL.kernel.generation)))
Write = Callable[..., Path]


def defaults() -> dict[str, Any]:
    import inspect

    signature = inspect.signature(torch_ref_cutlass_fused_moe)
    return {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}


def predict(cache: AutotuneCache, call: MoeCall = CALL, **changes: Any) -> Prediction | None:
    return cache.predict(call, defaults() | arguments_of(call) | changes, "0.7.2.post1")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def written(tmp_path: Path, form: str, tactics: autotune_caches.Tactics, **options: Any) -> Path:
    if form == "json":
        return autotune_caches.write_json(tmp_path / "cache.json", ARGUMENTS, tactics, **options)
    return autotune_caches.write_v2(tmp_path / "cache", ARGUMENTS, tactics, **options)


def test_every_bucket_as_flashinfer_has_them() -> None:
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    buckets = [*powers, *range(512, 2049, 256), *range(2560, 4097, 512), 8192]
    for tokens in range(1, 8193):
        assert token_bucket(tokens) == next(b for b in buckets if b >= tokens)
    assert token_bucket(0) == 1
    assert token_bucket(20_000, 16_384) == 16_384
    assert token_bucket(5_000, 6_000) == 6_000
    assert token_bucket(300, 400) == 400
    with pytest.raises(ValueError, match="tokens: expected"):
        token_bucket(-1)


@pytest.mark.parametrize("form", ["json", "v2"])
def test_a_bucket_has_its_tactics(tmp_path: Path, form: str) -> None:
    tactics = {1: (0, 116), BUCKET: TILE_256, 2 * BUCKET: (8, 116)}
    prediction = predict(read_autotune_cache(written(tmp_path, form, tactics)))
    assert prediction is not None
    assert prediction.kernel.tile_k == (256, 128)
    assert prediction.source == f"the autotune cache for {BUCKET} tokens"


@pytest.mark.parametrize("form", ["json", "v2"])
def test_a_wrong_prediction_is_a_finding(tmp_path: Path, form: str) -> None:
    cache = written(tmp_path, form, {BUCKET: TILE_256})
    right = forward(replace(CALL, kernel=Sm90Kernel.of_tiles((256, 128))))
    recorded.write_call(tmp_path / "calls", CALL, right)
    result = invoke("replay", tmp_path / "calls", "--autotune-cache", cache)
    assert result.exit_code == 0, result.output
    recorded.write_call(tmp_path / "calls", CALL, forward(CALL), number=2)
    result = invoke("replay", tmp_path / "calls", "--autotune-cache", cache, "--json", tmp_path / "r.json")
    assert result.exit_code == 1
    assert f"expected 64x16x256/1x1, 64x16x128/1x1 by the autotune cache for {BUCKET} tokens" in result.output
    assert "the bits are those of K tiles 128x128" in result.output
    stored = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [r["status"] for r in stored] == ["equal", "wrong tactic"]
    assert stored[0]["predicted"] == "64x16x256/1x1, 64x16x128/1x1"
    assert "256x128" in result.output


def test_without_an_entry_for_the_bucket_the_default_runs(tmp_path: Path) -> None:
    cache = read_autotune_cache(written(tmp_path, "json", {4 * BUCKET: TILE_256}))
    prediction = predict(cache)
    assert prediction is not None
    assert prediction.kernel == Sm90Kernel()
    assert f"it has {4 * BUCKET} tokens only" in prediction.source


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 5}, {"tp_size": 2}, {"activation_type": 5}, {"enable_pdl": False}, {"weight_dtype": 3}],
)
def test_another_layer_is_not_this_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    cache = written(tmp_path, "json", {BUCKET: TILE_256}, **changes)
    assert predict(read_autotune_cache(cache)) is None
    recorded.write_call(tmp_path / "calls", CALL, forward(CALL))
    (result,) = replay(tmp_path / "calls", ReplayOptions(autotune_cache=cache, any_tile=True)).results
    assert result.status == "equal"
    assert result.message == "no prediction: the autotune cache has nothing for this layer"


def test_arguments_of_the_call_choose_the_entry(tmp_path: Path) -> None:
    cache = read_autotune_cache(written(tmp_path, "json", {BUCKET: TILE_256}, enable_pdl=False))
    assert predict(cache, enable_pdl=None) is None
    assert predict(cache, enable_pdl=False) is not None
    few = read_autotune_cache(written(tmp_path, "json", {3: TILE_256}))
    prediction = predict(few, tune_max_num_tokens=3)
    assert prediction is not None
    assert prediction.kernel.tile_k == (256, 128)


def test_keys_of_releases_that_had_no_further_arguments(tmp_path: Path) -> None:
    path = written(tmp_path, "json", {BUCKET: TILE_256})
    stored = json.loads(path.read_text())
    older = {k[: k.rindex(", (")] + ", ())" if k.startswith("('trt") else k: v for k, v in stored.items()}
    path.write_text(json.dumps(older))
    assert predict(read_autotune_cache(path)) is not None


def test_another_release_and_another_environment(tmp_path: Path) -> None:
    root = autotune_caches.write_v2(tmp_path, ARGUMENTS, {BUCKET: (0, 116)}, flashinfer_version="0.7.1")
    autotune_caches.write_v2(root, ARGUMENTS, {BUCKET: TILE_256})
    prediction = predict(read_autotune_cache(root))
    assert prediction is not None
    assert prediction.kernel.tile_k == (256, 128)
    autotune_caches.write_v2(root, ARGUMENTS, {BUCKET: (8, 116)}, measure_timer="cupti")
    with pytest.raises(ValueError, match="expected one tactic of trtllm::fused_moe::gemm1"):
        predict(read_autotune_cache(root))


def test_tactics_are_those_of_the_calls_generation(tmp_path: Path) -> None:
    call = replace(
        LOGICAL,
        experts=layers.to_sm90(LOGICAL.experts, BYTEWISE),
        kernel=Sm90Kernel(generation=BYTEWISE),
    )
    arguments = arguments_of(call)
    own = autotune_caches.write_json(tmp_path / "own.json", arguments, {BUCKET: (8, 28 + 27)})
    prediction = read_autotune_cache(own).predict(call, defaults() | arguments)
    assert prediction is not None
    assert prediction.kernel.tile_n == (64, 64)
    other = autotune_caches.write_json(tmp_path / "other.json", arguments, {BUCKET: TILE_256})
    with pytest.raises(ValueError, match="of the bytewise kernel"):
        read_autotune_cache(other).predict(call, defaults() | arguments)


@pytest.mark.parametrize(
    ("tactics", "words"),
    [
        ((116, 0), "tactics of the two GEMMs"),
        ((0, 4_000), "tactics of the two GEMMs"),
        (("fast", 116), "tactics of the two GEMMs"),
        (([1, 2], 116), "tactics of the two GEMMs"),
        ((0, 124), "expected a tactic that the wordwise kernel can run for 1536 weight rows and K = 128"),
    ],
)
def test_entries_that_are_no_tactic_of_the_kernel(tmp_path: Path, tactics: Any, words: str) -> None:
    cache = written(tmp_path, "json", {BUCKET: tactics})
    with pytest.raises(ValueError, match=words):
        predict(read_autotune_cache(cache))
    recorded.write_call(tmp_path / "calls", CALL, forward(CALL))
    (result,) = replay(tmp_path / "calls", ReplayOptions(autotune_cache=cache)).results
    assert result.status == "equal"
    assert result.message.startswith("no prediction: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found none"),
        ("[]", "expected a JSON object"),
        ("{}", "found none"),
        ("[" * 100_000, "found none"),
        ('{"key": 3, "runner": "MoERunner", "tactic": 1}', "found none"),
        ("""{"('trtllm::fused_moe::gemm1', __import__('os').abort())": ["MoERunner", 1]}""", "malformed"),
        ("""{"('trtllm::fused_moe::gemm1', 'MoERunner', 3)": ["MoERunner", 1]}""", "expected \\(operation"),
        ("""{"('trtllm::fused_moe::gemm1', ": ["MoERunner", 1]}""", "expected the text of a tuple"),
        ("""{"a": 7}""", "expected \\[runner, tactic\\]"),
    ],
)
def test_what_is_no_cache_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "cache.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_autotune_cache(path)
    recorded.write_call(tmp_path / "calls", CALL, forward(CALL))
    result = invoke("replay", tmp_path / "calls", "--autotune-cache", path)
    assert result.exit_code == 2
    assert "autotune cache: expected entries" in result.output
    assert "Traceback" not in result.output


def test_a_damaged_file_in_a_folder_is_passed_over_and_told(tmp_path: Path) -> None:
    root = written(tmp_path, "v2", {BUCKET: TILE_256})
    (root / "v2" / "torn.json").write_text('{"key": ')
    cache = read_autotune_cache(root)
    assert predict(cache) is not None
    assert len(cache.problems) == 1
    assert "torn.json" in cache.problems[0]
    recorded.write_call(
        tmp_path / "calls", CALL, forward(replace(CALL, kernel=Sm90Kernel.of_tiles((256, 128))))
    )
    result = invoke("replay", tmp_path / "calls", "--autotune-cache", root)
    assert result.exit_code == 0
    assert "not read of the autotune cache: " in result.output


def test_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="autotune cache: there is no"):
        read_autotune_cache(tmp_path / "absent")
