"""The table of golden cases: one tiny random model per row.

Sizes are chosen so that all files together stay below 7 MB. `config` holds the
keyword arguments of the family's transformers config class; keys not given keep
the class's defaults.
"""

from dataclasses import dataclass, field

# Two narrow attention heads keep the layers that no test reads small.
_ATTENTION = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
_MLA = dict(
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
_COMMON = dict(vocab_size=32, num_hidden_layers=2)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    family: str
    config: dict
    notes: str
    layer: int = 0
    tokens: int = 13
    # "none", "fp8-block", "fp8-ptpc", "fp8-per-tensor-static", "mxfp4" or "nvfp4".
    quant: str = "none"
    # Data type of the weight scales on disk: "f32" or "bf16".
    scale_dtype: str = "f32"
    input_dtype: str = "bf16"
    # False writes the packed names which transformers 5 holds in memory.
    per_expert: bool = True
    # Set: every tensor of the model is kept and split by `save_pretrained`.
    max_shard_size: str | None = None
    # Range of the uniform e_score_correction_bias, and its type on disk.
    bias_range: tuple = (-0.3, 0.3)
    bias_dtype: str = "f32"
    seed: int = field(default=0)


def _mixtral(experts, top_k, hidden, inter):
    return dict(
        _COMMON, **_ATTENTION, hidden_size=hidden, intermediate_size=inter,
        num_local_experts=experts, num_experts_per_tok=top_k,
    )


def _qwen(experts, top_k, hidden, inter, **more):
    return dict(
        _COMMON, **_ATTENTION, hidden_size=hidden, intermediate_size=64, num_experts=experts,
        num_experts_per_tok=top_k, moe_intermediate_size=inter, **more,
    )


def _qwen2(experts, top_k, hidden, inter, **more):
    config = _qwen(experts, top_k, hidden, inter, **more)
    del config["head_dim"]
    return config


def _olmoe(experts, top_k, hidden, inter, **more):
    return dict(
        _COMMON, num_attention_heads=2, num_key_value_heads=2, hidden_size=hidden,
        intermediate_size=inter, num_experts=experts, num_experts_per_tok=top_k, **more,
    )


def _deepseek(experts, top_k, hidden, inter, **more):
    return dict(
        _COMMON, **_MLA, hidden_size=hidden, intermediate_size=64, n_routed_experts=experts,
        num_experts_per_tok=top_k, moe_intermediate_size=inter, first_k_dense_replace=1, **more,
    )


def _deepseek_v3(*sizes, **more):
    return _deepseek(
        *sizes, **dict(dict(n_group=4, topk_group=2, n_shared_experts=1, norm_topk_prob=True,
                            routed_scaling_factor=2.5, num_mtp_layers=0), **more),
    )


def _gpt_oss(experts, top_k, hidden, inter, **more):
    return dict(
        _COMMON, **_ATTENTION, hidden_size=hidden, intermediate_size=inter,
        num_local_experts=experts, num_experts_per_tok=top_k, **more,
    )


def _qwen3_5(experts, top_k, hidden, inter, **more):
    text = dict(
        _COMMON, **_ATTENTION, hidden_size=hidden, moe_intermediate_size=inter, num_experts=experts,
        num_experts_per_tok=top_k, layer_types=["full_attention"] * 2, **more,
    )
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=hidden,
        num_position_embeddings=16,
    )
    return dict(text_config=text, vision_config=vision)


_CASES = [
    Case("mixtral", "mixtral", _mixtral(8, 2, 128, 40), layer=1,
         notes="second layer asked for; the first is absent from the checkpoint"),
    Case("mixtral_packed", "mixtral", _mixtral(8, 2, 128, 32), per_expert=False,
         notes="packed names of transformers 5 (mlp.experts.gate_up_proj, mlp.gate)"),
    Case("qwen3_moe_norm", "qwen3_moe", _qwen(12, 4, 128, 32, norm_topk_prob=True), tokens=37,
         notes="weights renormalised; 37 tokens"),
    Case("qwen3_moe_no_norm", "qwen3_moe", _qwen(8, 3, 160, 32, norm_topk_prob=False),
         input_dtype="f32", notes="not renormalised; f32 input; hidden no multiple of 128"),
    Case("qwen3_moe_packed", "qwen3_moe",
         _qwen(8, 2, 128, 32, norm_topk_prob=True), per_expert=False,
         notes="packed names of transformers 5"),
    Case("qwen3_moe_sharded", "qwen3_moe",
         _qwen(8, 2, 128, 32, norm_topk_prob=True, decoder_sparse_step=2), layer=1,
         max_shard_size="100KB",
         notes="whole model in shards with an index; layer 0 is dense by decoder_sparse_step"),
    Case("qwen2_moe", "qwen2_moe",
         _qwen2(8, 4, 192, 32, shared_expert_intermediate_size=64, norm_topk_prob=False),
         notes="gated shared expert; not renormalised; hidden no multiple of 128"),
    Case("olmoe", "olmoe", _olmoe(8, 4, 128, 32, norm_topk_prob=False), tokens=14,
         notes="not renormalised"),
    Case("deepseek_v2_greedy", "deepseek_v2",
         _deepseek(8, 3, 128, 32, topk_method="greedy", n_shared_experts=2,
                   routed_scaling_factor=1.0), layer=1,
         notes="two shared experts in one matrix"),
    Case("deepseek_v2_group", "deepseek_v2",
         _deepseek(12, 3, 128, 32, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                   n_shared_experts=1, routed_scaling_factor=16.0), layer=1,
         notes="group score is the maximum of the group; weights times 16"),
    Case("deepseek_v3", "deepseek_v3", _deepseek_v3(12, 4, 128, 32), layer=1,
         bias_range=(-0.9, -0.4),
         notes="biased scores are often negative: masking groups with 0 chooses other experts"),
    Case("deepseek_v3_fp8_block", "deepseek_v3", _deepseek_v3(8, 3, 256, 128), layer=1,
         quant="fp8-block", notes="whole 128x128 blocks"),
    Case("deepseek_v3_fp8_block_ragged", "deepseek_v3",
         _deepseek_v3(8, 2, 160, 96, n_shared_experts=2, n_group=2, topk_group=1), layer=1,
         quant="fp8-block", notes="ragged last block in both directions"),
    Case("qwen3_moe_fp8_block_bf16_scale", "qwen3_moe",
         _qwen(8, 2, 160, 64, norm_topk_prob=True), quant="fp8-block", scale_dtype="bf16",
         notes="weight_scale_inv in bf16"),
    Case("deepseek_v3_fp8_ptpc_bf16", "deepseek_v3", _deepseek_v3(8, 2, 256, 48), layer=1,
         quant="fp8-ptpc", scale_dtype="bf16", bias_dtype="bf16",
         notes="weight_scale and e_score_correction_bias in bf16"),
    Case("deepseek_v3_fp8_ptpc_f32", "deepseek_v3",
         _deepseek_v3(8, 3, 160, 80, norm_topk_prob=False), layer=1, quant="fp8-ptpc",
         notes="weight_scale in f32; weights not renormalised"),
    Case("gpt_oss", "gpt_oss", _gpt_oss(8, 4, 64, 32, swiglu_limit=1.0), layer=1,
         notes="transposed, gate and up alternate, biases, hidden = 2 * intermediate, a limit that cuts"),
    Case("gpt_oss_mxfp4", "gpt_oss", _gpt_oss(8, 4, 128, 96), quant="mxfp4",
         notes="blocks, scales, biases; dequantised by transformers itself"),
    Case("qwen3_5_moe_packed", "qwen3_5_moe",
         _qwen3_5(8, 3, 128, 32, shared_expert_intermediate_size=48), per_expert=False,
         notes="packed, under model.language_model with a nested text_config; gated shared expert"),
    Case("qwen3_moe_nvfp4", "qwen3_moe", _qwen(8, 2, 128, 64, norm_topk_prob=True), quant="nvfp4",
         notes="as ModelOpt writes it; input scales differ between experts: the largest counts"),
    Case("mixtral_fp8_static", "mixtral", _mixtral(8, 2, 160, 48), layer=1,
         quant="fp8-per-tensor-static",
         notes="per-tensor weight_scale and input_scale, which differs between experts and projections"),
]

CASES = [Case(**{**case.__dict__, "seed": 1000 + i}) for i, case in enumerate(_CASES)]
