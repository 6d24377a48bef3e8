"""FP8 quantisation of weights and activations with torch, and the vectors of the codecs.

One formula throughout: s = max(amax, 1e-10) * (1/448) in f32, q = rne(clamp(x * (1/s))).
"""

import json

import ml_dtypes
import numpy as np
import torch

import fp4

E4M3FN_MAX = 448.0
BLOCK = 128


def scale_of(amax):
    """Scale s of values whose largest magnitude is `amax` (f32 tensor); x is about q * s."""
    return torch.clamp(amax, min=1e-10) * (torch.tensor(1.0) / torch.tensor(E4M3FN_MAX))


def codes_of(x, scale):
    """Codes of `x` (f32) under `scale` (f32, broadcast)."""
    scaled = x * (torch.tensor(1.0) / scale)
    return scaled.clamp(-E4M3FN_MAX, E4M3FN_MAX).to(torch.float8_e4m3fn)


def _stretch(scale, shape):
    """One scale per 128x128 block of `shape`, repeated to one per element."""
    rows = scale.repeat_interleave(BLOCK, 0)[: shape[0]]
    return rows.repeat_interleave(BLOCK, 1)[:, : shape[1]]


def quantise_weight(weight, quant, scale_dtype):
    """`(codes, scale as stored, dequantised f32)` of a weight [N, K] (f32)."""
    n, k = weight.shape
    if quant == "fp8-block":
        amax = torch.stack([
            torch.stack([weight[r : r + BLOCK, c : c + BLOCK].abs().max() for c in range(0, k, BLOCK)])
            for r in range(0, n, BLOCK)
        ])
    elif quant == "fp8-per-tensor-static":
        amax = weight.abs().max()
    else:
        amax = weight.abs().amax(dim=1, keepdim=True)
    stored = scale_of(amax).to(scale_dtype)
    scale = stored.float()
    full = _stretch(scale, weight.shape) if quant == "fp8-block" else scale
    codes = codes_of(weight, full)
    return codes, stored, codes.float() * full


def fake_quantise_activation(x, quant, scale=None):
    """`x` (f32, [T, K]) quantised and dequantised, as f64.

    One scale per token and group of 128 channels (the last group may be shorter) for
    "fp8-block", one per token for "fp8-ptpc"; `scale` for "fp8-per-tensor-static" and, beside
    one per group, for "nvfp4".
    """
    if quant == "nvfp4":
        return fp4.fake_quantise_activation(x, scale)
    if quant == "fp8-per-tensor-static":
        return codes_of(x, scale).double() * scale.double()
    group = BLOCK if quant == "fp8-block" else x.shape[1]
    parts = []
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        scale = scale_of(part.abs().amax(dim=1, keepdim=True))
        parts.append(codes_of(part, scale).double() * scale.double())
    return torch.cat(parts, dim=1)


def quantised_mlp(x, gate, up, down, quant, scales=(None, None)):
    """SwiGLU MLP in f64 whose activations are quantised before both matrix products.

    The output of the activation is rounded to bf16 before its quantisation. `scales` are those of
    the two activations, where they are static.
    """
    xq = fake_quantise_activation(x, quant, scales[0])
    act = torch.nn.functional.silu(xq @ gate.double().T) * (xq @ up.double().T)
    return fake_quantise_activation(act.bfloat16().float(), quant, scales[1]) @ down.double().T


def codec_vectors(seed):
    """Decoded values of all 256 codes and codes of about 2000 f32 values, per format."""
    rng = np.random.default_rng(seed)
    formats = {}
    for name, ml_type, torch_type in [
        ("e4m3fn", ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
        ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz, torch.float8_e4m3fnuz),
    ]:
        every_code = np.arange(256, dtype=np.uint8)
        decoded = every_code.view(ml_type).astype(np.float32)
        by_torch = torch.from_numpy(every_code).view(torch_type).float().numpy()
        assert np.array_equal(decoded, by_torch, equal_nan=True), name
        values = np.unique(decoded[np.isfinite(decoded) & (decoded > 0)])
        top = values[-1]
        # The tie between zero and the smallest subnormal counts as a midpoint too.
        steps = np.concatenate([[np.float32(0)], values])
        ties = ((steps[1:].astype(np.float64) + steps[:-1]) / 2).astype(np.float32)
        near = np.concatenate([ties, np.nextafter(ties, 0, dtype=np.float32),
                               np.nextafter(ties, np.float32(np.inf), dtype=np.float32)])
        log_uniform = np.exp2(rng.uniform(-13, 10, 1000)).astype(np.float32)
        log_uniform *= rng.choice(np.float32([-1, 1]), 1000)
        bits = rng.integers(0, 2**32, 200, dtype=np.uint64).astype(np.uint32).view(np.float32)
        special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, top, -top,
                              np.nextafter(top, np.float32(np.inf)), 1e-45, -1e-45, 1.1754944e-38,
                              3.4028235e38, -3.4028235e38, 464, 480, 248, 1, 17, 18, 240])
        x = np.concatenate([special, near, -near, log_uniform, bits]).astype(np.float32)
        clamped = np.where(np.isnan(x), x, np.clip(x, -top, top)).astype(np.float32)
        with np.errstate(invalid="ignore"):
            codes = clamped.astype(ml_type).view(np.uint8)
        torch_codes = torch.from_numpy(clamped).to(torch_type).view(torch.uint8).numpy()
        number = ~np.isnan(x)
        assert np.array_equal(codes[number], torch_codes[number]), name
        formats[name] = {
            "max": float(top),
            "decode_f32_bits": decoded.view(np.uint32).tolist(),
            "encode_f32_bits_to_code": [[int(b), int(c)] for b, c in zip(x.view(np.uint32), codes)],
        }
    return formats


def write_codec_vectors(path, seed):
    """Writes `codec_vectors` as JSON, one format's table per line."""
    formats = codec_vectors(seed)
    with open(path, "w") as file:
        file.write("{\n")
        file.write(",\n".join(
            f'"{name}": {json.dumps(table, separators=(",", ":"))}' for name, table in formats.items()
        ))
        file.write("\n}\n")
