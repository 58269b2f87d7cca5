"""config.json: flat or nested, each key honoured, refused, or known not to matter."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from mxfp4ref.__main__ import commands
from mxfp4ref.checkpoint import CheckpointError, ReadOptions, open_layer, read_layer, run_layer
from mxfp4ref.checkpoint.config import HONOURED, NOT_MATTERING, Config, read_config, router_of
from mxfp4ref.checkpoint.router import router_to_run
from mxfp4ref.routing import Gate, route, routing_weights, scoring, select_experts
from mxfp4ref.routing.models import DEEPSEEK_V4
from tests.helpers.checkpoints import (
    CONFIGS,
    DEEPSEEK_H,
    EXPERTS,
    TOP_K,
    make_checkpoint,
    same_bits,
    write_config,
)

# The keys of published models, as far as they concern a text model: DeepSeek-V4-Flash, DeepSeek-V4.1-Flash, Kimi-K3,
# Kimi-K2, gpt-oss-120b, Qwen3-235B-A22B, Mixtral. Values of the routing and the experts; of the rest a stand-in.
_V4 = (
    "architectures attention_bias attention_dropout bos_token_id eos_token_id hc_eps hc_mult hc_sinkhorn_iters "
    "head_dim "
    "hidden_act hidden_size index_head_dim index_n_heads index_topk initializer_range max_position_embeddings "
    "model_type "
    "moe_intermediate_size n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok "
    "num_hidden_layers num_hash_layers num_key_value_heads num_nextn_predict_layers o_groups o_lora_rank q_lora_rank "
    "qk_rope_head_dim quantization_config rms_norm_eps rope_scaling rope_theta routed_scaling_factor scoring_func "
    "sliding_window swiglu_limit tie_word_embeddings topk_method torch_dtype transformers_version use_cache "
    "vocab_size "
    "compress_rope_theta compress_ratios expert_dtype"
)
_V41 = (
    f"{_V4} kv_source_layer_ids index_source_layer_ids candidate_source_layer_id candidate_topk_blocks "
    "candidate_block_size engram_layer_ids engram_num_embeddings engram_max_ngram_size engram_vocab_size "
    "engram_n_heads "
    "engram_head_dim engram_pad_token_id engram_compressed_vocab_size dspark_block_size dspark_noise_token_id "
    "dspark_target_layer_ids dspark_markov_rank dspark_n_routed_experts dspark_num_experts_per_tok image_token_id"
)
_K3 = (
    "activation_situ_beta activation_situ_linear_beta architectures attn_res_block_size auto_map bos_token_id dtype "
    "eos_token_id first_k_dense_replace hidden_act hidden_size initializer_range intermediate_size kv_lora_rank "
    "latent_moe_use_norm linear_attn_config max_position_embeddings mla_use_nope mla_use_output_gate model_type "
    "moe_intermediate_size moe_layer_freq moe_renormalize moe_router_activation_func num_attention_heads "
    "num_expert_group num_experts num_experts_per_token num_hidden_layers num_key_value_heads "
    "num_nextn_predict_layers "
    "num_shared_experts pad_token_id q_lora_rank qk_nope_head_dim qk_rope_head_dim quantization_config rms_norm_eps "
    "routed_expert_hidden_size routed_scaling_factor tie_word_embeddings topk_group topk_method use_cache "
    "use_grouped_topk v_head_dim vocab_size"
)
_K2 = (
    "architectures attention_bias attention_dropout aux_loss_alpha bos_token_id eos_token_id ep_size "
    "first_k_dense_replace hidden_act hidden_size initializer_range intermediate_size kv_lora_rank "
    "max_position_embeddings model_type moe_intermediate_size moe_layer_freq n_group n_routed_experts "
    "n_shared_experts "
    "norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads pretraining_tp "
    "qk_nope_head_dim rope_scaling routed_scaling_factor scoring_func seq_aux topk_group topk_method use_cache"
)
_GPT_OSS = (
    "architectures attention_bias attention_dropout eos_token_id experts_per_token head_dim hidden_act hidden_size "
    "initial_context_length initializer_range intermediate_size layer_types max_position_embeddings model_type "
    "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts "
    "output_router_logits quantization_config rms_norm_eps rope_scaling rope_theta router_aux_loss_coef "
    "sliding_window "
    "swiglu_limit tie_word_embeddings use_cache vocab_size"
)
_QWEN3 = "decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts router_aux_loss_coef"
_QWEN3_NEXT = (
    "full_attention_interval layer_types linear_num_value_heads partial_rotary_factor attn_output_gate "
    "shared_expert_intermediate_size rope_parameters mtp_num_hidden_layers qkv_bias chat_template"
)
_MIXTRAL = (
    "num_local_experts num_experts_per_tok router_aux_loss_coef router_jitter_noise output_router_logits"
)


@pytest.mark.parametrize("keys", [_V4, _V41, _K3, _K2, _GPT_OSS, _QWEN3, _QWEN3_NEXT, _MIXTRAL], ids=range(8))
def test_every_key_of_published_models_is_known(keys: str) -> None:
    Config(dict.fromkeys(keys.split(), 1), "config.json").refuse_unknown()


def test_each_name_that_does_not_matter_is_one_expression() -> None:
    known = {key for keys in HONOURED.values() for key in keys}
    for names in NOT_MATTERING.values():
        for name in names:
            assert re.compile(name)
            assert name not in known


@pytest.fixture
def v41(tmp_path: Path) -> Path:
    """DeepSeek-V4.1's shape: the text model's keys nested, the factor 1.5, and as many experts as V4-Pro has."""
    make_checkpoint(tmp_path, "deepseek_v4")
    text = CONFIGS["deepseek_v4"] | {"routed_scaling_factor": 1.5, "model_type": "deepseek_v41_text"}
    top = {"model_type": "deepseek_v41", "dtype": "bfloat16", "vision_config": {"hidden_size": 1024}}
    (tmp_path / "config.json").write_text(json.dumps({**top, "text_config": text}))
    return tmp_path


def test_a_nested_configuration_is_read(v41: Path) -> None:
    layer = read_layer(v41, 1)
    assert (layer.top_k, layer.routed_scaling_factor) == (TOP_K, 1.5)
    assert layer.experts.swiglu_limit.tolist() == [10.0] * EXPERTS


def test_the_factor_is_never_guessed_from_the_number_of_experts() -> None:
    """DeepSeek-V4.1-Flash has V4-Pro's 384 experts and V4-Flash's factor."""
    logits, gate = torch.randn(2, 384), Gate(torch.zeros(384))
    with pytest.raises(
        ValueError, match=r"routed_scaling_factor: expected a number in preset\.factor, got None"
    ):
        route(DEEPSEEK_V4, logits, gate)


def write_input(path: Path, **more: torch.Tensor) -> Path:
    torch.manual_seed(5)
    save_file({"hidden": torch.randn(5, DEEPSEEK_H).to(torch.bfloat16), **more}, path / "x")
    return path / "x"


def test_a_nested_configuration_that_disagrees_is_refused(v41: Path) -> None:
    config = json.loads((v41 / "config.json").read_text())
    (v41 / "config.json").write_text(json.dumps(config | {"swiglu_limit": 7.0}))
    with pytest.raises(
        CheckpointError, match=r"swiglu_limit: expected one value, got 7\.0 and, in text_config, 10\.0"
    ):
        read_layer(v41, 1)
    (v41 / "config.json").write_text(json.dumps(config | {"swiglu_limit": 10.0}))
    assert read_layer(v41, 1).top_k == TOP_K


@pytest.mark.parametrize(
    ("missing", "option"),
    [
        ("swiglu_limit", "--limit"),
        ("num_experts_per_tok", "--top-k"),
        ("routed_scaling_factor", "--routed-scaling-factor"),
    ],
)
def test_a_missing_key_is_named_with_its_option(tmp_path: Path, missing: str, option: str) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    write_config(tmp_path, "deepseek_v4", **{missing: None})
    arguments = [
        "layer",
        "--checkpoint",
        str(tmp_path),
        "--layer",
        "1",
        "--input",
        str(write_input(tmp_path)),
    ]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 2
    assert re.search(rf"config\.json: expected .*{missing}.*{option}", result.output), result.output
    given = CliRunner().invoke(commands, [*arguments, option, "2"])
    assert given.exit_code == 0, given.output
    by_key = CliRunner().invoke(commands, [*arguments, "--set", f"{missing}=2"])
    assert by_key.output == given.output


Changes = dict[str, Any]
ROUTERS: list[tuple[Changes, Changes]] = [
    ({}, {"score": scoring.sqrt_softplus, "normalize": "sum", "n_group": 1, "temperature": 1.0}),
    ({"norm_topk_prob": False}, {"normalize": "none"}),
    ({"scoring_func": "sigmoid"}, {"score": scoring.sigmoid, "normalize": "sum", "epsilon": 1e-20}),
    ({"scoring_func": "softmax", "norm_topk_prob": False}, {"score": scoring.softmax, "normalize": "none"}),
    ({"moe_router_activation_func": "sigmoid", "moe_renormalize": False}, {"normalize": "none"}),
    ({"gate_temp": 2.0}, {"temperature": 2.0}),
    ({"n_group": 2, "topk_group": 1}, {"n_group": 2, "topk_group": 1}),
    ({"num_expert_group": 2, "topk_group": 1, "use_grouped_topk": True}, {"n_group": 2}),
    ({"num_expert_group": 2, "topk_group": 1, "use_grouped_topk": False}, {"n_group": 1, "topk_group": 1}),
    ({"routed_scaling_factor": 2.5}, {"factor": 2.5}),
    ({"num_experts_per_tok": 3}, {"top_k": 3}),
]


@pytest.mark.parametrize(("changes", "fields"), ROUTERS, ids=[",".join(c) or "none" for c, _ in ROUTERS])
def test_each_key_of_the_router_is_honoured(tmp_path: Path, changes: Changes, fields: Changes) -> None:
    """As a field of the router's record, and in the bits of the weights, by a second formula."""
    make_checkpoint(tmp_path, "deepseek_v4")
    write_config(tmp_path, "deepseek_v4", **changes)
    layer = open_layer(tmp_path, 1)
    preset = router_to_run(layer, None)
    assert {name: getattr(preset, name) for name in fields} == fields
    result = run_layer(layer, write_input(tmp_path))
    scores = preset.score(result["logits"] / preset.temperature)
    ids = select_experts(
        scores,
        preset.top_k,
        correction_bias=layer.router_bias,
        n_group=preset.n_group,
        topk_group=preset.topk_group,
    ).ids
    assert torch.equal(result["token_selected_experts"], ids)
    wanted = routing_weights(
        scores, ids, normalize=preset.normalize, epsilon=preset.epsilon, factor=preset.factor or 1.0
    )
    assert same_bits(result["token_final_scales"], wanted)


def test_keys_that_change_the_router_change_its_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    seen = {}
    for changes, _ in ROUTERS:
        write_config(tmp_path, "deepseek_v4", **changes)
        result = run_layer(open_layer(tmp_path, 1), write_input(tmp_path))
        bits = (result["token_selected_experts"].tolist(), result["token_final_scales"].tolist())
        seen[json.dumps(changes)] = json.dumps(bits)
    same = {first for first in seen for second in seen if first != second and seen[first] == seen[second]}
    # Without use_grouped_topk the groups count for nothing; with it they are those of n_group.
    assert {s for s in same if "use_grouped_topk" not in s} <= {"{}", '{"n_group": 2, "topk_group": 1}'}


REFUSED: list[tuple[Changes, str]] = [
    ({"scoring_func": "relu"}, "scoring_func: expected one of sqrtsoftplus, sigmoid, softmax, got 'relu'"),
    ({"topk_method": "group_limited_greedy"}, "topk_method: expected noaux_tc or greedy"),
    ({"topk_method": "greedy"}, "topk_method=greedy: expected no correction bias in layer 1"),
    ({"norm_topk_prob": 1}, "norm_topk_prob: expected bool, got 1"),
    ({"gate_temp": 0.0}, "gate_temp: expected a positive number"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu': expected silu"),
    ({"text_config": {"llm_config": {"n_group": 2}}}, "text_config: expected no further llm_config in it"),
    (
        {"n_routed_experts": 4, "num_experts": 8},
        "for n_routed_experts and num_experts, got 4 and 8",
    ),
    ({"num_hash_layers": 2}, "num_hash_layers=2: expected a table tid2eid in layer 1"),
    ({"mlp_layer_types": ["hash_moe", "hash_moe"]}, "mlp_layer_types: expected a table tid2eid in layer 1"),
    ({"n_shared_experts": 0}, "n_shared_experts=0: expected no tensors of shared experts in layer 1"),
    ({"expert_dtype": "fp8"}, "expert_dtype: expected 'fp4', got 'fp8'"),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        r"n_config\.quant_method: .*got 'gptq'",
    ),
    (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "format: expected 'mxfp4-pack-quantized', got 'pack-quantized'",
    ),
    (
        {
            "quantization_config": {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "int4"}},
            }
        },
        r"global_quant_config\.weight\.dtype: expected 'fp4'",
    ),
    (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        "quant_algo: expected MXFP4",
    ),
    (
        {"expert_capacity": 4},
        r"expert_capacity=4: .*may change the result; config=\{'expert_capacity': None\}",
    ),
    *[
        ({key: 1}, f"{key}=1: expected keys whose effect is known")
        for key in (
            "gating_func",
            "capacity_factor",
            "use_softmax",
            "use_correction_bias",
            "normalize_weights",
        )
    ],
    ({"apply_weight_on_input": True}, "apply_weight_on_input=True: expected keys whose effect is known"),
    ({"moe_router_use_sigmoid": True}, "moe_router_use_sigmoid=True: expected keys whose effect is known"),
    (
        {"num_experts_per_tok": 1},
        "expected norm_topk_prob or moe_renormalize to be false with one expert a token",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_is_not_modelled_is_refused(tmp_path: Path, changes: Changes, message: str) -> None:
    make_checkpoint(tmp_path, "deepseek_v4")
    write_config(tmp_path, "deepseek_v4", **changes)
    with pytest.raises(CheckpointError, match=message):
        run_layer(open_layer(tmp_path, 1), write_input(tmp_path))


def test_a_bias_that_a_model_s_code_has_is_missed(tmp_path: Path) -> None:
    """GLM's config.json has no topk_method."""
    make_checkpoint(
        tmp_path, "weight_scale", lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    )
    write_config(tmp_path, "weight_scale", topk_method=None, model_type="glm4_moe")
    assert open_layer(tmp_path, 0).router_bias is not None
    with pytest.raises(CheckpointError, match="topk_method=noaux_tc: expected a correction bias in layer 1"):
        open_layer(tmp_path, 1)


def test_groups_without_a_correction_bias_are_refused(tmp_path: Path) -> None:
    """Models without one take each group's best expert for its score, those with one the sum of two."""
    make_checkpoint(
        tmp_path, "weight_scale", lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    )
    groups: Changes = {"n_group": 2, "topk_group": 1, "topk_method": None}
    write_config(tmp_path, "weight_scale", **groups)
    with pytest.raises(
        CheckpointError, match="n_group=2: expected a correction bias in layer 1: without one"
    ):
        open_layer(tmp_path, 1)
    for harmless in (
        {"topk_group": 2},
        {"n_group": 1},
        {"topk_method": "greedy"},
        {"use_grouped_topk": False},
    ):
        write_config(tmp_path, "weight_scale", **groups | harmless)
        open_layer(tmp_path, 1)


@pytest.mark.parametrize(
    ("location", "refused"), [("input", True), ("output", True), ("weight_input", False)]
)
def test_rotations_of_activations_are_refused(location: str, refused: bool) -> None:
    """compressed-tensors' transforms; those of weights are in the weights already."""
    transform = {"R4": {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj"], "location": location}]}}
    scheme = CONFIGS["compressed_tensors"]["text_config"]["quantization_config"]
    config = Config({"quantization_config": scheme | {"transform_config": {"config_groups": transform}}}, "x")
    with pytest.raises(CheckpointError, match="transform_config: expected no") if refused else nullcontext():
        config.check_scheme()


@pytest.mark.parametrize(
    ("name", "normalize"),
    [("qwen3_vl_moe_text", "sum"), ("qwen3_5_moe_text", "sum"), ("qwen3moe", "sum"), ("qwen3_next", None)],
)
def test_routers_that_a_model_s_code_fixes(name: str, normalize: str | None) -> None:
    router = router_of(Config({"model_type": name}, "config.json"), {})
    assert (None if router is None else router.normalize) == normalize
    router = router_of(Config({"model_type": name, "norm_topk_prob": True}, "config.json"), {})
    assert router is not None
    assert (router.score, router.normalize) == (scoring.softmax, "sum")


@pytest.mark.parametrize("key", ["scoring_func", "norm_topk_prob", "n_group", "gate_temp", "topk_method"])
def test_the_router_of_gpt_oss_is_its_own(tmp_path: Path, key: str) -> None:
    make_checkpoint(tmp_path, "gpt_oss")
    write_config(tmp_path, "gpt_oss", **{key: "noaux_tc" if key == "topk_method" else 1})
    with pytest.raises(CheckpointError, match=f"{key}: expected no such key in gpt_oss"):
        read_layer(tmp_path, 1)
    assert read_layer(tmp_path, 1, options=ReadOptions(config={key: None})).top_k == TOP_K


def test_given_keys_go_before_those_of_the_file(tmp_path: Path) -> None:
    write_config(tmp_path, "gpt_oss", expert_capacity=3, swiglu_alpha=1.5)
    config = read_config(tmp_path, {"expert_capacity": None, "swiglu_limit": 3.0})
    config.refuse_unknown()
    assert (config.get("limit"), config.get("alpha"), config.get("beta")) == (3.0, 1.5, None)
    assert config.get("top_k", int) == TOP_K


def test_a_generic_checkpoint_has_to_say_its_router(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "weight_scale")
    write_config(tmp_path, "weight_scale", scoring_func=None)
    layer = open_layer(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"expected scoring_func or .* and norm_topk_prob or .*--set KEY=VALUE"
    ):
        run_layer(layer, write_input(tmp_path))
    options = ReadOptions(config={"model_type": "qwen3_moe", "topk_method": None})  # whose code has softmax
    assert router_to_run(open_layer(tmp_path, 1, options=options), None).score is scoring.softmax
