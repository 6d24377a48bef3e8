"""Writes tiny random checkpoints and what transformers' own MoE block answers on them.

Run `python make_golden.py` in an environment of requirements.txt. Everything beside the
scripts is written anew, then `check_golden.py` recomputes it without torch.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import check_golden
import fp8
from cases import CASES

HERE = Path(__file__).parent
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
EXPERT_PROJECTION = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def fill(model, case, generator):
    """Draws the asked layer's MoE weights, large enough that routing is not degenerate."""
    block = model.model.layers[case.layer].mlp
    for name, parameter in block.named_parameters():
        # Router logits get a standard deviation of 2; every projection keeps its input's size.
        gain = 2.0 if name == "gate.weight" else 1.0
        drawn = torch.randn(parameter.shape, generator=generator) * gain * parameter.shape[-1] ** -0.5
        parameter.data.copy_(drawn)
    if hasattr(block.gate, "e_score_correction_bias"):
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
            if name.startswith(f"model.layers.{case.layer}.") and (".mlp." in name or "_moe." in name)
        }
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink()


def quantization_config(case, router_names):
    """What FP8 checkpoints on the hub carry in config.json."""
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


def quantise_checkpoint(case, folder, dequantised_folder):
    """Replaces the projections by FP8 codes and scales; keeps a dequantised f32 twin.

    Returns the dequantised tensors by name.
    """
    tensors = load_file(folder / "model.safetensors")
    shutil.copytree(folder, dequantised_folder, dirs_exist_ok=True)
    suffix = "_scale_inv" if case.quant == "fp8-block" else "_scale"
    stored, dequantised = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(EXPERT_PROJECTION):
            codes, scale, value = fp8.quantise_weight(
                tensor.float(), case.quant, DTYPES[case.scale_dtype]
            )
            stored[name], stored[name + suffix], dequantised[name] = codes, scale, value
        else:
            stored[name] = tensor
            dequantised[name] = tensor.float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantised, dequantised_folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    routers = [name.removesuffix(".weight") for name in tensors if name.endswith("mlp.gate.weight")]
    config["quantization_config"] = quantization_config(case, routers)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return dequantised


def load_block(case, folder):
    """The asked MoE block in f32, as transformers reads it back from the checkpoint."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    ours = f"model.layers.{case.layer}.mlp."
    wrong = [name for name in report["missing_keys"] if name.startswith(ours)]
    assert not wrong and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model.eval().model.layers[case.layer].mlp


def draw_input(case, block, generator):
    """Random hidden states whose choice of experts does not hang on rounding.

    Tokens whose choice changes when the router weight changes by about one part in 500
    are drawn again. Sizes differ between tokens, so that a scale shared by mistake shows.
    """
    hidden = block.gate.weight.shape[1]
    candidates = torch.randn(8 * case.tokens, hidden, generator=generator)
    candidates *= torch.exp(0.4 * torch.randn(8 * case.tokens, 1, generator=generator))
    rounded = candidates.bfloat16().float()
    chosen = block.gate(rounded)[2].sort(dim=1).values
    stable = torch.ones(len(candidates), dtype=torch.bool)
    weight = block.gate.weight.data
    for _ in range(16):
        noise = torch.randn(weight.shape, generator=generator)
        block.gate.weight.data = weight * (1 + 2e-3 * noise)
        stable &= (block.gate(rounded)[2].sort(dim=1).values == chosen).all(dim=1)
    block.gate.weight.data = weight
    kept = candidates[stable][: case.tokens]
    assert len(kept) == case.tokens, case.name
    return kept.contiguous()


def answer(block, x):
    """What transformers' block gives for `x` (f32 [T, H]), with its router's choice."""
    seen = {}
    hooks = [
        block.gate.register_forward_hook(lambda _m, _i, out: seen.update(gate=out)),
        block.experts.register_forward_hook(lambda _m, _i, out: seen.update(routed=out)),
    ]
    output = block(x[None])[0]
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
    prefix = f"model.layers.{case.layer}.mlp."

    def mlp(module):
        matrices = [weights[f"{prefix}{module}.{name}"] for name in EXPERT_PROJECTION]
        return fp8.quantised_mlp(x, *matrices, case.quant)

    routed = torch.zeros(x.shape, dtype=torch.float64)
    experts = {}
    for token, ids in enumerate(expected["topk_ids"].tolist()):
        for slot, expert in enumerate(ids):
            if expert not in experts:
                experts[expert] = mlp(f"experts.{expert}")
            routed[token] += expected["topk_weights"][token, slot].double() * experts[expert][token]
    shared = mlp("shared_experts") if f"{prefix}shared_experts.{EXPERT_PROJECTION[0]}" in weights else 0
    return {"routed_quantised": routed.float(), "output_quantised": (routed + shared).float()}


@torch.no_grad()
def make(case):
    """Writes one case's folder."""
    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(case.seed)
    config = AutoConfig.for_model(case.family, **case.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fill(model, case, generator)
    save_model(model, case, folder)
    with tempfile.TemporaryDirectory() as scratch:
        if case.quant == "none":
            weights, source = None, folder
        else:
            source = Path(scratch)
            weights = quantise_checkpoint(case, folder, source)
        block = load_block(case, source)
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
    for case in CASES:
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
