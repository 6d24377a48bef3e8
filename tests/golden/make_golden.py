"""Writes tiny random checkpoints and what transformers' own MoE block answers on them.

Run `python make_golden.py` in an environment of requirements.txt. Everything beside the
scripts is written anew, or only the cases named as arguments; then `check_golden.py`
recomputes it without torch.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Mxfp4Config

import check_golden
import fp4
import fp8
from cases import CASES

HERE = Path(__file__).parent
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
EXPERT_PROJECTION = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
MIXTRAL_PROJECTION = ("w1.weight", "w3.weight", "w2.weight")


def auto_class(case):
    """The class that `case`'s checkpoints are of on the hub."""
    return AutoModelForImageTextToText if case.family == "qwen3_5_moe" else AutoModelForCausalLM


def prefix(case):
    """What the names of the asked layer's tensors start with."""
    root = "model.language_model." if case.family == "qwen3_5_moe" else "model."
    return f"{root}layers.{case.layer}."


def block_of(model, case):
    """The asked MoE block."""
    return model.get_submodule(prefix(case) + "mlp")


def router_of(block):
    """Its router, which gives `(logits, weights, ids)`."""
    return block.router if hasattr(block, "router") else block.gate


def fill(model, case, generator):
    """Draws the asked layer's MoE weights, large enough that routing is not degenerate."""
    block = block_of(model, case)
    for name, parameter in block.named_parameters():
        # Router logits get a standard deviation of 2; every projection keeps its input's size.
        gain = 2.0 if name in ("gate.weight", "router.weight") else 1.0
        # gpt-oss multiplies from the left.
        fan_in = parameter.shape[-2 if case.family == "gpt_oss" and name.startswith("experts.") else -1]
        if name.endswith("bias"):
            gain, fan_in = 0.3, 1
        drawn = torch.randn(parameter.shape, generator=generator) * gain * fan_in ** -0.5
        parameter.data.copy_(drawn)
    if hasattr(router_of(block), "e_score_correction_bias"):
        low, high = case.bias_range
        bias = torch.rand(block.gate.e_score_correction_bias.shape, generator=generator)
        block.gate.e_score_correction_bias = (bias * (high - low) + low).to(DTYPES[case.bias_dtype])


def save_model(model, case, folder):
    """`save_pretrained`, then drops what is not part of the asked MoE block."""
    if case.max_shard_size:
        model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    else:
        model.save_pretrained(folder, save_original_format=case.per_expert)
        tensors = load_file(folder / "model.safetensors")
        kept = {
            name: tensor for name, tensor in tensors.items()
            if name.startswith(prefix(case)) and (".mlp." in name or "_moe." in name)
        }
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink()


def quantization_config(case, router_names):
    """What quantised checkpoints on the hub carry in config.json."""
    if case.quant == "mxfp4":
        skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"modules_to_not_convert": skipped, "quant_method": "mxfp4"}
    if case.quant == "nvfp4":
        group = {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"}
        return {
            "config_groups": {
                "group_0": {"input_activations": group, "targets": ["Linear"], "weights": group}
            },
            "ignore": ["lm_head", *router_names],
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "quant_algo": "NVFP4",
            "quant_method": "modelopt",
        }
    if case.quant == "fp8-per-tensor-static":
        return {
            "activation_scheme": "static", "ignored_layers": ["lm_head", *router_names],
            "quant_method": "fp8",
        }
    if case.quant == "fp8-block":
        return {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    common = {
        "actorder": None, "block_structure": None, "group_size": None, "num_bits": 8,
        "observer_kwargs": {}, "symmetric": True, "type": "float",
    }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": {**common, "dynamic": True, "observer": None, "strategy": "token"},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**common, "dynamic": False, "observer": "minmax", "strategy": "channel"},
            }
        },
        "format": "float-quantized",
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head", *router_names],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def write_config(case, folder, tensors):
    """Says in config.json that the checkpoint is quantised."""
    config = json.loads((folder / "config.json").read_text())
    routers = [name.removesuffix(".weight") for name in tensors if name.endswith(".gate.weight")]
    config["quantization_config"] = quantization_config(case, routers)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# Largest magnitudes that a calibration saw before the two products.
CALIBRATED = (12.0, 40.0)


def input_scale(case, name, generator):
    """What a calibration found for the activations of one matrix: different for every expert."""
    second = name.endswith((EXPERT_PROJECTION[2], MIXTRAL_PROJECTION[2]))
    largest = 448.0 if case.quant == "fp8-per-tensor-static" else 6.0 * 448.0
    return CALIBRATED[second] * (0.5 + 0.5 * torch.rand((), generator=generator)) / largest


def quantise_weight(case, name, weight, generator):
    """`(tensors to store by name, dequantised f32)` of one projection (f32)."""
    base = name.removesuffix(".weight")
    if case.quant == "nvfp4":
        pairs, groups, scale, value = fp4.quantise_nvfp4(weight)
        stored = {name: pairs, f"{base}.weight_scale": groups, f"{base}.weight_scale_2": scale}
    else:
        codes, scale, value = fp8.quantise_weight(weight, case.quant, DTYPES[case.scale_dtype])
        suffix = "_scale_inv" if case.quant == "fp8-block" else "_scale"
        stored = {name: codes, name + suffix: scale}
    if case.quant in ("nvfp4", "fp8-per-tensor-static"):
        stored[f"{base}.input_scale"] = input_scale(case, name, generator)
    return stored, value


def quantise_checkpoint(case, folder, dequantised_folder, generator):
    """Replaces the projections by codes and scales; keeps a dequantised f32 twin.

    Returns the dequantised tensors by name, and the input scales that were stored.
    """
    tensors = load_file(folder / "model.safetensors")
    shutil.copytree(folder, dequantised_folder, dirs_exist_ok=True)
    stored, dequantised = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(EXPERT_PROJECTION + MIXTRAL_PROJECTION):
            codes, dequantised[name] = quantise_weight(case, name, tensor.float(), generator)
            stored |= codes
        else:
            stored[name] = tensor
            dequantised[name] = tensor.float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantised, dequantised_folder / "model.safetensors", metadata={"format": "pt"})
    write_config(case, folder, tensors)
    return dequantised | {name: t for name, t in stored.items() if name.endswith(".input_scale")}


def quantise_blocks(folder, case):
    """Replaces gpt-oss's expert matrices by MXFP4 blocks and scales.

    Returns the dequantised matrices by name, [experts, in, out] as transformers holds them.
    """
    tensors = load_file(folder / "model.safetensors")
    dequantised = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, value = fp4.quantise_mxfp4(tensors.pop(name).float().transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dequantised[name] = value.transpose(1, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(case, folder, tensors)
    return dequantised


def load_block(case, folder):
    """The asked MoE block in f32, as transformers reads it back from the checkpoint."""
    # transformers dequantises MXFP4 to bf16, which is exact.
    mxfp4 = dict(quantization_config=Mxfp4Config(dequantize=True)) if case.quant == "mxfp4" else {}
    model, report = auto_class(case).from_pretrained(
        folder, dtype=torch.bfloat16 if mxfp4 else torch.float32, experts_implementation="eager",
        output_loading_info=True, **mxfp4,
    )
    ours = prefix(case) + "mlp."
    wrong = [name for name in report["missing_keys"] if name.startswith(ours)]
    assert not wrong and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return block_of(model.eval().float(), case)


def draw_input(case, block, generator):
    """Random hidden states whose choice of experts does not hang on rounding.

    Tokens whose choice changes when the router weight changes by about one part in 500
    are drawn again. Sizes differ between tokens, so that a scale shared by mistake shows.
    """
    router = router_of(block)
    hidden = router.weight.shape[1]
    candidates = torch.randn(8 * case.tokens, hidden, generator=generator)
    candidates *= torch.exp(0.4 * torch.randn(8 * case.tokens, 1, generator=generator))
    rounded = candidates.bfloat16().float()
    chosen = router(rounded)[2].sort(dim=1).values
    stable = torch.ones(len(candidates), dtype=torch.bool)
    weight = router.weight.data
    for _ in range(16):
        noise = torch.randn(weight.shape, generator=generator)
        router.weight.data = weight * (1 + 2e-3 * noise)
        stable &= (router(rounded)[2].sort(dim=1).values == chosen).all(dim=1)
    router.weight.data = weight
    kept = candidates[stable][: case.tokens]
    assert len(kept) == case.tokens, case.name
    return kept.contiguous()


def answer(block, x):
    """What transformers' block gives for `x` (f32 [T, H]), with its router's choice."""
    seen = {}
    hooks = [
        router_of(block).register_forward_hook(lambda _m, _i, out: seen.update(gate=out)),
        block.experts.register_forward_hook(lambda _m, _i, out: seen.update(routed=out)),
    ]
    output = block(x[None])
    # gpt-oss gives its router's scores as well.
    output = (output[0] if isinstance(output, tuple) else output)[0]
    for hook in hooks:
        hook.remove()
    _logits, weights, ids = seen["gate"]
    return {
        "output": output,
        "routed": seen["routed"].reshape(output.shape),
        "topk_ids": ids.to(torch.int32),
        "topk_weights": weights.float(),
    }


def quantised_answer(case, expected, x, weights):
    """The same block with activations quantised at the two points, in f64."""
    mixtral = case.family == "mixtral"
    base = prefix(case) + ("block_sparse_moe." if mixtral else "mlp.")
    projections = MIXTRAL_PROJECTION if mixtral else EXPERT_PROJECTION

    def largest(*projections):
        # The layer's scale is the largest of all experts'.
        names = tuple(name.replace(".weight", ".input_scale") for name in projections)
        scales = [scale for name, scale in weights.items() if name.endswith(names)]
        return max(scales) if scales else None

    scales = (largest(*projections[:2]), largest(projections[2]))

    def mlp(module):
        matrices = [weights[f"{base}{module}.{name}"] for name in projections]
        return fp8.quantised_mlp(x, *matrices, case.quant, scales)

    routed = torch.zeros(x.shape, dtype=torch.float64)
    experts = {}
    for token, ids in enumerate(expected["topk_ids"].tolist()):
        for slot, expert in enumerate(ids):
            if expert not in experts:
                experts[expert] = mlp(f"experts.{expert}")
            routed[token] += expected["topk_weights"][token, slot].double() * experts[expert][token]
    shared = mlp("shared_experts") if f"{base}shared_experts.{EXPERT_PROJECTION[0]}" in weights else 0
    return {"routed_quantised": routed.float(), "output_quantised": (routed + shared).float()}


@torch.no_grad()
def make(case):
    """Writes one case's folder."""
    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(case.seed)
    config = AutoConfig.for_model(case.family, **case.config)
    model = auto_class(case).from_config(config, dtype=torch.bfloat16)
    fill(model, case, generator)
    save_model(model, case, folder)
    with tempfile.TemporaryDirectory() as scratch:
        weights, source = None, folder
        if case.quant == "mxfp4":
            dequantised = quantise_blocks(folder, case)
        elif case.quant != "none":
            source = Path(scratch)
            weights = quantise_checkpoint(case, folder, source, generator)
        block = load_block(case, source)
    if case.quant == "mxfp4":
        for name, value in dequantised.items():
            assert torch.equal(block.get_parameter(name.removeprefix(prefix(case) + "mlp.")), value), name
    hidden_states = draw_input(case, block, generator)
    rounded = hidden_states.bfloat16().float()
    expected = answer(block, rounded)
    if weights is not None:
        expected |= quantised_answer(case, expected, rounded, weights)
    save_file(
        {"hidden_states": hidden_states.to(DTYPES[case.input_dtype])}, folder / "input.safetensors"
    )
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in expected.items()},
        folder / "expected.safetensors",
    )


def main():
    """Makes every case, the codec vectors and the manifest, then checks them."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    named = sys.argv[1:]
    for case in CASES:
        if not named or case.name in named:
            make(case)
    fp8.write_codec_vectors(HERE / "fp8_codes.json", seed=7)
    manifest = [
        {key: getattr(case, key) for key in ("name", "family", "quant", "layer", "tokens", "notes")}
        for case in CASES
    ]
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    check_golden.main()


if __name__ == "__main__":
    main()
