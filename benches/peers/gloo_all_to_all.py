"""Dispatch and combine of MoE tokens with torch.distributed's gloo all_to_all, to put beside `fmoe bench comm`.

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    python gloo_all_to_all.py --ranks 2 --tokens 1,8,64,512

One process per rank on this machine. A round does what a dispatch/combine backend does, metadata included: the counts,
then for every (token, rank) pair one row of hidden states, its k expert ids and its k weights; back come rows of
outputs, which are summed per token. Rows are bf16 and go as bytes. Which ranks a token goes to is found outside the timed
part, as are its rows' places. Prints one JSON object: medians of the slowest rank, in microseconds.
"""

import argparse
import json
import os
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HIDDEN, EXPERTS, TOP_K = 7168, 256, 8


def route(tokens, ranks, rank):
    """Ids and weights `[tokens, k]`, and the (token, rank) pairs ordered by rank."""
    random = torch.Generator().manual_seed(rank + 1)
    ids = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    weights = torch.rand(tokens, TOP_K, generator=random)
    owner = ids.to(torch.int64) * ranks // EXPERTS
    hit = torch.zeros(tokens, ranks, dtype=torch.bool).scatter_(1, owner, True)
    pairs = hit.t().nonzero()  # [pairs, (rank, token)], ranks ascending
    return ids, weights, pairs[:, 1].contiguous(), hit.sum(0).to(torch.int64)


def exchange(rows, send, receive):
    """The rows that all ranks have for this one."""
    width = rows.shape[1]
    arrived = torch.empty(sum(receive), width, dtype=rows.dtype)
    dist.all_to_all_single(arrived, rows, receive, send)
    return arrived


def round_trip(hidden, routing):
    """Seconds of dispatch and combine."""
    ids, weights, token_of_pair, counts = routing
    start = time.perf_counter()
    their_counts = torch.empty_like(counts)
    dist.all_to_all_single(their_counts, counts)
    send, receive = counts.tolist(), their_counts.tolist()
    arrived = exchange(hidden[token_of_pair].view(torch.uint8), send, receive)
    exchange(ids[token_of_pair], send, receive)
    exchange(weights[token_of_pair], send, receive)
    dispatched = time.perf_counter()
    outputs = exchange(arrived, receive, send).view(torch.bfloat16)  # identity experts
    combined = torch.zeros(hidden.shape, dtype=torch.float32).index_add_(0, token_of_pair, outputs.float())
    combined = combined.to(torch.bfloat16)
    end = time.perf_counter()
    return dispatched - start, end - dispatched, combined


def check(hidden, routing, combined):
    """With identity experts a token comes back once from every rank that it went to."""
    times = torch.bincount(routing[2], minlength=hidden.shape[0])[:, None]
    wanted = (hidden.float() * times).to(torch.bfloat16)
    assert torch.allclose(combined.float(), wanted.float(), rtol=1e-2, atol=1e-2), "a token came back wrong"


def run(rank, args, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks, timeout=timedelta(minutes=2))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    rows = []
    for tokens in args.tokens:
        hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
        routing = route(tokens, args.ranks, rank)
        times = []
        for sample in range(args.reps + 2):
            dist.barrier()
            dispatch, combine, combined = round_trip(hidden, routing)
            if sample >= 2:
                times.append([dispatch, combine, dispatch + combine])
        check(hidden, routing, combined)
        slowest = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dispatch, combine, both = (statistics.median(column.tolist()) * 1e6 for column in slowest.t())
        rows.append({"ep_size": args.ranks, "tokens_per_rank": tokens, "dispatch_us": dispatch,
                     "combine_us": combine, "round_us": both, "round_us_min": slowest[:, 2].min().item() * 1e6})
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in text.split(",")], default=[1, 8, 64, 128, 512])
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--port", type=int, default=29561)
    args = parser.parse_args()
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run, (args, results), nprocs=args.ranks)  # raises if a rank fails
    rows = results.get()
    print(json.dumps({"peer": "torch.distributed gloo all_to_all", "torch": torch.__version__, "hidden": HIDDEN,
                      "top_k": TOP_K, "experts": EXPERTS, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
