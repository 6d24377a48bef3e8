"""Recomputes every golden case from its files with plain loops in numpy, and compares.

Shares no code with `make_golden.py`: safetensors is parsed here, the router is written
from each family's rule, FP8 goes through ml_dtypes. Exits non-zero on a difference.
"""

import json
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

HERE = Path(__file__).parent
TYPES = {
    "F32": np.float32, "I32": np.int32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "U8": np.uint8,
}
FP8_MAX = np.float32(448)
# Schemes whose `expected` holds answers with quantised activations.
QUANTISED_ACTIVATIONS = ("fp8-block", "fp8-ptpc", "fp8-per-tensor-static", "nvfp4")


def read_file(path):
    """Tensors of one safetensors file by name."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    body = raw[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_checkpoint(folder):
    """All tensors of a checkpoint of one or several files."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_file(folder / "model.safetensors")
    names = set(json.loads(index.read_text())["weight_map"].values())
    assert len(names) > 1, f"{folder}: an index over {len(names)} shard"
    return {name: tensor for shard in sorted(names) for name, tensor in read_file(folder / shard).items()}


def fp4_values(pairs):
    """Values of the codes of `pairs` (u8), the low half of a byte first."""
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def dequantised(tensors, name):
    """A weight as f64, multiplied by its scale where it has one."""
    if name + "_scale_2" in tensors:
        groups = tensors[name + "_scale"].astype(np.float32) * tensors[name + "_scale_2"]
        return fp4_values(tensors[name]).astype(np.float64) * np.repeat(groups.astype(np.float64), 16, axis=1)
    weight = tensors[name].astype(np.float32)
    if name + "_scale" in tensors:
        weight = weight * tensors[name + "_scale"].astype(np.float32)
    elif name + "_scale_inv" in tensors:
        scale = tensors[name + "_scale_inv"].astype(np.float32)
        rows, columns = np.arange(weight.shape[0]) // 128, np.arange(weight.shape[1]) // 128
        weight = weight * scale[rows[:, None], columns[None, :]]
    return weight.astype(np.float64)


def prefix(config, layer):
    """What the names of a layer's tensors start with."""
    root = "model.language_model." if config["model_type"] == "qwen3_5_moe" else "model."
    return f"{root}layers.{layer}."


def gpt_oss_expert(tensors, base, expert):
    """Matrices and biases of one gpt-oss expert, whose gate and up alternate."""
    found = []
    for name in ("gate_up_proj", "down_proj"):
        full = f"{base}mlp.experts.{name}"
        if full + "_blocks" in tensors:
            blocks = tensors[full + "_blocks"][expert]
            scale = np.exp2(tensors[full + "_scales"][expert].astype(np.float64) - 127)
            matrix = (fp4_values(blocks) * scale[..., None]).reshape(blocks.shape[0], -1)
        else:
            matrix = tensors[full][expert].astype(np.float64).T
        found.append((matrix, tensors[full + "_bias"][expert].astype(np.float64)))
    (gate_up, bias), (down, down_bias) = found
    return (gate_up[::2], gate_up[1::2], down), (bias[::2], bias[1::2], down_bias)


def expert_matrices(tensors, base, expert):
    """`(gate, up, down)` of one expert, whichever layout the checkpoint has."""
    if base + "mlp.experts.gate_up_proj" in tensors:
        gate_up = tensors[base + "mlp.experts.gate_up_proj"][expert].astype(np.float64)
        half = gate_up.shape[0] // 2
        return gate_up[:half], gate_up[half:], tensors[base + "mlp.experts.down_proj"][expert].astype(np.float64)
    if base + "block_sparse_moe.gate.weight" in tensors:
        names = [f"{base}block_sparse_moe.experts.{expert}.{w}.weight" for w in ("w1", "w3", "w2")]
    else:
        names = [f"{base}mlp.experts.{expert}.{w}_proj.weight" for w in ("gate", "up", "down")]
    return [dequantised(tensors, name) for name in names]


def static_scales(tensors):
    """Input scales of the two products: the largest of all experts of the layer."""
    def largest(*ends):
        found = [t for name, t in tensors.items() if name.endswith(tuple(f"{e}.input_scale" for e in ends))]
        return np.float32(max(found)) if found else None

    return largest("gate_proj", "up_proj", "w1", "w3"), largest("down_proj", "w2")


def softmax(logits):
    """Softmax of one row."""
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


def keep_groups(scores, group_scores, config, masked):
    """Scores with everything outside the best groups replaced by `masked`."""
    best = np.argsort(-group_scores, kind="stable")[: config["topk_group"]]
    size = len(scores) // config["n_group"]
    return np.where(np.isin(np.arange(len(scores)) // size, best), scores, masked)


def route(config, logits, bias, masked=-np.inf):
    """`(ids, weights)` of one token; ties go to the lower id."""
    family, top_k = config["model_type"], config["num_experts_per_tok"]
    if family == "gpt_oss":
        ids = np.argsort(-logits, kind="stable")[:top_k]
        return ids, softmax(logits[ids])
    if family == "deepseek_v3":
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + bias
        group_scores = np.sort(choice.reshape(config["n_group"], -1), axis=1)[:, -2:].sum(axis=1)
        choice = keep_groups(choice, group_scores, config, masked)
    else:
        scores = choice = softmax(logits)
        if config.get("topk_method") == "group_limited_greedy":
            group_scores = choice.reshape(config["n_group"], -1).max(axis=1)
            choice = keep_groups(choice, group_scores, config, masked)
    ids = np.argsort(-choice, kind="stable")[:top_k]
    weights = scores[ids]
    # transformers never renormalises deepseek_v2, whatever norm_topk_prob says.
    if family in ("mixtral", "qwen3_5_moe_text") or (config.get("norm_topk_prob") and family != "deepseek_v2"):
        weights = weights / (weights.sum() + (1e-20 if family == "deepseek_v3" else 0))
    if family in ("deepseek_v2", "deepseek_v3"):
        weights = weights * config["routed_scaling_factor"]
    return ids, weights


def fake_quantise(x, group):
    """One row quantised to e4m3fn in groups of `group` and dequantised."""
    out = []
    for start in range(0, len(x), group):
        part = x[start : start + group].astype(np.float32)
        scale = np.maximum(np.abs(part).max(), np.float32(1e-10)) * (np.float32(1) / FP8_MAX)
        scaled = np.clip(part * (np.float32(1) / scale), -FP8_MAX, FP8_MAX)
        out.append(scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(scale))
    return np.concatenate(out)


def fake_quantise_static(x, scale):
    """One row quantised to e4m3fn under a given scale and dequantised."""
    scaled = np.clip(x.astype(np.float32) * (np.float32(1) / scale), -FP8_MAX, FP8_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(scale)


def fake_quantise_nvfp4(x, scale):
    """One row quantised to e2m1 in groups of 16 under a given global scale and dequantised."""
    one, out = np.float32(1), []
    for start in range(0, len(x), 16):
        part = x[start : start + 16].astype(np.float32)
        group = np.minimum(np.abs(part).max() * (one / np.float32(6)) * (one / scale), FP8_MAX)
        group = group.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scaled = part * (one / (group * scale)) if group > 0 else np.zeros_like(part)
        codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        out.append(codes.astype(np.float64) * np.float64(group) * np.float64(scale))
    return np.concatenate(out)


def activations(x, scheme, scale):
    """One row as the experts see it."""
    if scheme is None:
        return x
    if scheme == "nvfp4":
        return fake_quantise_nvfp4(x, scale)
    if scheme == "fp8-per-tensor-static":
        return fake_quantise_static(x, scale)
    return fake_quantise(x, 128 if scheme == "fp8-block" else len(x))


def mlp(x, gate, up, down, scheme=None, scales=(None, None)):
    """SwiGLU MLP of one row in f64; `scheme` quantises the activations at both points."""
    x = activations(x, scheme, scales[0])
    g, u = gate @ x, up @ x
    act = g / (1 + np.exp(-g)) * u
    if scheme:
        act = act.astype(np.float32).astype(ml_dtypes.bfloat16)
    return down @ activations(act, scheme, scales[1])


def gpt_oss_mlp(x, matrices, biases, config):
    """gpt-oss's MLP of one row in f64, and how many of its gate and up values the limit cuts."""
    (gate, up, down), (gate_bias, up_bias, down_bias) = matrices, biases
    limit = config["swiglu_limit"]
    g, u = gate @ x + gate_bias, up @ x + up_bias
    cut = (g > limit).sum() + (np.abs(u) > limit).sum()
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return down @ ((u + 1) * g / (1 + np.exp(-config["swiglu_alpha"] * g))) + down_bias, cut


def shared_output(tensors, base, x, scheme):
    """Output of the shared experts for one row, zero without any."""
    base += "mlp."
    for module in ("shared_experts", "shared_expert"):
        if f"{base}{module}.gate_proj.weight" in tensors:
            names = [f"{base}{module}.{w}_proj.weight" for w in ("gate", "up", "down")]
            out = mlp(x, *(dequantised(tensors, name) for name in names), scheme)
            if module == "shared_expert":
                gate = tensors[base + "shared_expert_gate.weight"].astype(np.float64)[0] @ x
                out = out / (1 + np.exp(-gate))
            return out
    return np.zeros(len(x))


def relative(found, wanted):
    """Relative L2 error."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def recompute(case, tensors, config, hidden, expected, scheme=None, swap=False):
    """`(routed, output)` of one case with the expected routing."""
    base, scales = prefix(config, case["layer"]), static_scales(tensors)
    text = config.get("text_config", config)
    routed, output = np.zeros(hidden.shape), np.zeros(hidden.shape)
    for token, x in enumerate(hidden):
        for expert, weight in zip(expected["topk_ids"][token], expected["topk_weights"][token]):
            if text["model_type"] == "gpt_oss":
                (gate, up, down), (gate_bias, up_bias, down_bias) = gpt_oss_expert(tensors, base, expert)
                if swap:
                    gate, up, gate_bias, up_bias = up, gate, up_bias, gate_bias
                out, _ = gpt_oss_mlp(x, (gate, up, down), (gate_bias, up_bias, down_bias), text)
            else:
                gate, up, down = expert_matrices(tensors, base, expert)
                if swap:
                    gate, up = up, gate
                out = mlp(x, gate, up, down, scheme, scales)
            routed[token] += np.float64(weight) * out
        output[token] = routed[token] + shared_output(tensors, base, x, scheme)
    return routed, output


def check(case):
    """Errors of one case by name; those after the bar are controls that must be large."""
    folder = HERE / case["name"]
    config = json.loads((folder / "config.json").read_text())
    tensors = read_checkpoint(folder)
    expected = read_file(folder / "expected.safetensors")
    hidden = read_file(folder / "input.safetensors")["hidden_states"]
    hidden = hidden.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert hidden.shape[0] == case["tokens"] and all(np.isfinite(t).all() for t in expected.values())
    base, text = prefix(config, case["layer"]), config.get("text_config", config)
    gates = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.router.weight")
    router = next(tensors[base + name] for name in gates if base + name in tensors)
    router_bias = tensors.get(base + "mlp.router.bias", np.zeros(1)).astype(np.float64)
    bias = tensors.get(base + "mlp.gate.e_score_correction_bias", np.zeros(1)).astype(np.float64)
    weight_error, zero_masked = 0.0, 0
    for token, x in enumerate(hidden):
        logits = router.astype(np.float64) @ x + router_bias
        ids, weights = route(text, logits, bias)
        wanted = dict(zip(expected["topk_ids"][token].tolist(), expected["topk_weights"][token]))
        assert set(ids.tolist()) == set(wanted), f"{case['name']}: token {token} chose {ids}, not {wanted}"
        weight_error = max(weight_error, *(abs(w / wanted[i] - 1) for i, w in zip(ids.tolist(), weights)))
        zero_masked += set(route(text, logits, bias, masked=0.0)[0].tolist()) != set(wanted)
    routed, output = recompute(case, tensors, config, hidden, expected)
    errors = {
        "weights": weight_error,
        "routed": relative(routed, expected["routed"]),
        "output": relative(output, expected["output"]),
    }
    assert max(errors.values()) < 1e-5, (case["name"], errors)
    controls = {"swapped": relative(recompute(case, tensors, config, hidden, expected, swap=True)[1], output)}
    if case["quant"] in QUANTISED_ACTIVATIONS:
        routed_q, output_q = recompute(case, tensors, config, hidden, expected, case["quant"])
        quantised = {
            "routed_quantised": relative(routed_q, expected["routed_quantised"]),
            "output_quantised": relative(output_q, expected["output_quantised"]),
        }
        # An activation next to a rounding boundary may take the neighbouring code, which in FP4 is far.
        bound = 1e-2 if case["quant"] == "nvfp4" else 1e-3
        assert max(quantised.values()) < bound, (case["name"], quantised)
        errors |= quantised
        controls["dequantised"] = relative(routed, routed_q)
        other = "fp8-ptpc" if case["quant"] == "fp8-block" else "fp8-block"
        controls["other scheme"] = relative(
            recompute(case, tensors, config, hidden, expected, other)[0], routed_q
        )
        assert relative(output, output_q) < (2e-1 if case["quant"] == "nvfp4" else 6e-2), case["name"]
    if config["model_type"] == "gpt_oss":
        experts = [gpt_oss_expert(tensors, base, expert) for expert in range(router.shape[0])]
        controls["values that the limit cuts"] = sum(
            gpt_oss_mlp(x, *experts[i], config)[1] for x, ids in zip(hidden, expected["topk_ids"]) for i in ids
        )
    if config["model_type"] == "deepseek_v3":
        controls["tokens that masking with 0 changes"] = zero_masked
    used = len(set(expected["topk_ids"].ravel().tolist()))
    return errors, controls | {"experts used": f"{used}/{router.shape[0]}"}


def main():
    """Checks every case of the manifest and prints its errors."""
    total = 0
    for case in json.loads((HERE / "manifest.json").read_text()):
        size = sum(path.stat().st_size for path in (HERE / case["name"]).iterdir())
        total += size
        errors, controls = check(case)
        left = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        right = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in controls.items())
        print(f"{case['name']} ({size // 1024} KiB): {left} | {right}")
    total += (HERE / "fp8_codes.json").stat().st_size
    print(f"{total / 1e6:.2f} MB in all")
    if total > 7e6:
        sys.exit("the golden files are larger than 7 MB")


if __name__ == "__main__":
    main()
