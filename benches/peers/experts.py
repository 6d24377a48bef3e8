"""Times the experts of one rank in torch and with SGLang's CPU kernels, on the calls of a routing file.

Prints one JSON object: for each kernel and number of tokens the median, minimum and maximum over the calls, in
milliseconds. One thread is measured by CPU time, several by wall time, as `fmoe bench experts` does it.

SGLang's kernels are built from vLLM's source distribution on PyPI, which vendors them; nothing of it is kept here.
All experts hold the same values, each in memory of its own: what is timed does not depend on them.
"""

import argparse
import json
import pathlib
import tarfile
import time
import tomllib
import urllib.request

import torch

VLLM_SDIST = (
    "https://files.pythonhosted.org/packages/f7/25/"
    "aa5684e9c59d6fc75f78926b7f15e8d9adc7de2d9e6e7575b80776ad8169/vllm-0.33.0.tar.gz"
)
SGL_FOLDER = "vllm-0.33.0/csrc/cpu/sgl-kernels"
SGL_SOURCES = [
    "moe", "moe_fp8", "moe_fp8_w8a8", "moe_int8", "moe_int4",
    "gemm", "gemm_fp8", "gemm_fp8_w8a8", "gemm_int8", "gemm_int4",
]
# SGLang's numbers of its schemes.
SGL_BF16, SGL_FP8_W8A16 = 0, 2
BINDING = """
#include <torch/extension.h>
at::Tensor convert_weight_packed(at::Tensor& weight);
void fused_experts_cpu(at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, int64_t,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<std::vector<int64_t>>,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<double>&,
    const std::optional<double>&, bool, int64_t);
// Defined in a source of vLLM's that is not taken here; asked by the kernels with FP8 activations only.
bool cpu_has_amx_fp8() { return false; }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("convert_weight_packed", &convert_weight_packed);
  m.def("fused_experts_cpu", &fused_experts_cpu);
}
"""


def build_sgl(folder):
    """SGLang's kernels as a module, built in `folder`."""
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "vllm.tar.gz"
    if not archive.exists():
        urllib.request.urlretrieve(VLLM_SDIST, archive)
    sources = folder / SGL_FOLDER
    if not sources.exists():
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(SGL_FOLDER)]
            tar.extractall(folder, members, filter="data")
    binding = folder / "binding.cpp"
    binding.write_text(BINDING)
    features = ["f", "vl", "bw", "dq", "bf16", "vnni"]
    flags = ["-O3", "-fopenmp"] + [f"-mavx512{feature}" for feature in features]
    # The sources compile their AVX-512 paths only where AMX is allowed; whether it is used is found out at run time.
    flags += ["-mamx-bf16", "-mamx-tile"]
    build = folder / "build"
    build.mkdir(exist_ok=True)
    return cpp_extension.load(
        name="sgl_peer",
        sources=[str(binding)] + [str(sources / f"{name}.cpp") for name in SGL_SOURCES],
        extra_cflags=flags,
        extra_ldflags=["-fopenmp"],
        build_directory=str(build),
    )


class Layer:
    """Weights and one way to run them. `w1` is gate over up, [E, 2I, H]; `w2` is [E, H, I]."""

    def __init__(self, shape, dtype):
        hidden, inter, experts = shape["hidden"], shape["intermediate"], shape["experts"]
        one = torch.randn(2 * inter, hidden, dtype=torch.float32).div_(hidden**0.5).to(dtype)
        two = torch.randn(hidden, inter, dtype=torch.float32).div_(inter**0.5).to(dtype)
        self.w1 = torch.empty(experts, 2 * inter, hidden, dtype=dtype)
        self.w2 = torch.empty(experts, hidden, inter, dtype=dtype)
        for expert in range(experts):
            self.w1[expert], self.w2[expert] = one, two


class TorchLoop(Layer):
    """The loop over experts that every engine starts with."""

    def __call__(self, x, weights, ids):
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[tokens] @ self.w1[expert].T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(gate) * up) @ self.w2[expert].T
            out.index_add_(0, tokens, y * weights[tokens, slots, None].to(y.dtype))
        return out


class TorchGrouped(Layer):
    """torch's grouped product over sorted rows."""

    def __call__(self, x, weights, ids):
        experts, top_k = self.w1.shape[0], ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=experts)
        offsets = counts.cumsum(0).to(torch.int32)
        rows = x[order // top_k]
        gate, up = torch._grouped_mm(rows, self.w1.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
        y = torch._grouped_mm(y, self.w2.transpose(1, 2), offs=offsets)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add_(0, order // top_k, y)


class Sgl(Layer):
    """SGLang's fused experts on packed weights, bf16 or FP8 with 128x128 scales."""

    def __init__(self, shape, module, method):
        dtype = torch.float8_e4m3fn if method == SGL_FP8_W8A16 else torch.bfloat16
        super().__init__(shape, dtype)
        self.module, self.method = module, method
        self.w1 = module.convert_weight_packed(self.w1)
        self.w2 = module.convert_weight_packed(self.w2)
        self.scales, self.block = (None, None), None
        if method == SGL_FP8_W8A16:
            blocks = lambda n: -(-n // 128)
            hidden, inter, experts = shape["hidden"], shape["intermediate"], shape["experts"]
            self.scales = (
                torch.ones(experts, blocks(2 * inter), blocks(hidden)),
                torch.ones(experts, blocks(hidden), blocks(inter)),
            )
            self.block = [128, 128]

    def __call__(self, x, weights, ids):
        out = torch.empty_like(x)
        self.module.fused_experts_cpu(
            out, x, self.w1, self.w2, weights, ids, self.method, *self.scales,
            None, None, None, self.block, None, None, None, None, True, 0,
        )
        return out


def calls_by_tokens(path, top_k):
    calls = {}
    for ids in json.loads(pathlib.Path(path).read_text())["calls"]:
        calls.setdefault(len(ids) // top_k, []).append(torch.tensor(ids, dtype=torch.int32).view(-1, top_k))
    return calls


def timed(clock, layer, x, weights, ids):
    start = clock()
    layer(x, weights, ids)
    return (clock() - start) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", required=True, help="a file of benches/definitions")
    parser.add_argument("--routing", required=True, help='{"calls": [[id, …], …]}')
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kernels", default="torch-loop,torch-grouped,sgl-bf16,sgl-fp8-w8a16")
    parser.add_argument("--sgl", type=pathlib.Path, help="where SGLang's kernels are built")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    shape = tomllib.loads(pathlib.Path(args.shape).read_text())
    clock = time.process_time if args.threads == 1 else time.perf_counter
    sgl = build_sgl(args.sgl) if "sgl" in args.kernels else None
    kernels = {
        "torch-loop": lambda: TorchLoop(shape, torch.bfloat16),
        "torch-loop-f32": lambda: TorchLoop(shape, torch.float32),
        "torch-grouped": lambda: TorchGrouped(shape, torch.bfloat16),
        "sgl-bf16": lambda: Sgl(shape, sgl, SGL_BF16),
        "sgl-fp8-w8a16": lambda: Sgl(shape, sgl, SGL_FP8_W8A16),
    }
    rows = []
    for name in args.kernels.split(","):
        layer = kernels[name]()
        dtype = torch.float32 if name.endswith("f32") else torch.bfloat16
        for tokens, calls in calls_by_tokens(args.routing, shape["top_k"]).items():
            x = torch.randn(tokens, shape["hidden"]).to(dtype)
            weights = torch.rand(tokens, shape["top_k"]) / shape["top_k"]
            timed(clock, layer, x, weights, calls[0])
            times = sorted(timed(clock, layer, x, weights, ids) for ids in calls)
            middle = times[len(times) // 2]
            rows.append(
                {"kernel": name, "tokens": tokens, "median_ms": middle, "min_ms": times[0], "max_ms": times[-1]}
            )
        del layer
    versions = {"torch": torch.__version__, "sgl": "vllm 0.33.0 sdist" if sgl else None}
    print(json.dumps({"shape": shape["name"], "threads": args.threads, "versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
