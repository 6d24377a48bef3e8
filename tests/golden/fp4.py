"""FP4 quantisation with torch: MXFP4 as gpt-oss stores it, NVFP4 as ModelOpt stores it.

E2M1 codes are rounded to nearest, ties to the even code, and saturate at 6; the even column of
a pair lies in the low half of its byte.
"""

import torch

MX_GROUP = 32
NV_GROUP = 16
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / 2


def codes_of(x):
    """Codes 0..15 of `x` (f32)."""
    magnitude = x.abs().contiguous()
    below = torch.searchsorted(_MIDPOINTS, magnitude, right=False)
    above = torch.searchsorted(_MIDPOINTS, magnitude, right=True)
    # They differ at a midpoint only, where one of the two neighbours is even.
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * torch.signbit(x)).to(torch.uint8)


def values_of(codes):
    """Values (f32) of codes 0..15."""
    return torch.cat([VALUES, -VALUES])[codes.long()]


def pack(codes):
    """Pairs of codes along the last dimension as bytes."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def quantise_mxfp4(weight):
    """`(blocks [..., K/32, 16], scales [..., K/32], dequantised)` of a weight [..., K] (f32).

    The scale is the smallest power of two under which nothing exceeds 6.
    """
    groups = weight.unflatten(-1, (-1, MX_GROUP))
    amax = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10)
    exponent = torch.ceil(torch.log2(amax.double() / 6)).to(torch.int32)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    assert (amax <= 6 * scale).all() and (amax > 3 * scale).all()
    codes = codes_of(groups / scale)
    dequantised = (values_of(codes) * scale).flatten(-2)
    return pack(codes), (exponent + 127).to(torch.uint8).squeeze(-1), dequantised


def _nvfp4(x, scale):
    """`(codes, group scales e4m3)` of `x` [N, K] (f32) under the global scale `scale` (f32)."""
    groups = x.unflatten(-1, (-1, NV_GROUP))
    one = torch.tensor(1.0)
    amax = groups.abs().amax(dim=-1, keepdim=True)
    stored = (amax * (one / 6) * (one / scale)).clamp(max=448.0).to(torch.float8_e4m3fn)
    inverse = one / (stored.float() * scale)
    codes = codes_of(torch.where(stored.float() > 0, groups * inverse, torch.zeros(())))
    return codes, stored


def quantise_nvfp4(weight):
    """`(pairs [N, K/2], group scales [N, K/16], global scale [], dequantised)` of a weight [N, K] (f32)."""
    scale = weight.abs().max() / (6.0 * 448.0)
    codes, stored = _nvfp4(weight, scale)
    dequantised = (values_of(codes) * stored.float() * scale).flatten(-2)
    return pack(codes.flatten(-2)), stored.squeeze(-1), scale, dequantised


def fake_quantise_activation(x, scale):
    """`x` (f32, [T, K]) quantised under the global scale `scale` and dequantised, as f64."""
    codes, stored = _nvfp4(x, scale)
    return (values_of(codes).double() * stored.double() * scale.double()).flatten(-2)
