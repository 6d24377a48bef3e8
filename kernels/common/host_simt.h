// Fibers for platform_host.h: what a GPU's scheduler is to a kernel.
#pragma once

#include "types.h"

namespace moe::simt {
// As Rust has it: crates/moe-kernels/src/host_simt.rs.
struct Launch {
    u32 grid;         // blocks
    u32 block;        // threads of each
    u32 shared_bytes; // of dynamic shared memory
    u32 resident;     // blocks that run at the same time, at least 1
    u64 seed;         // of the order in which threads run
};
static_assert(sizeof(Launch) == 24, "mirrored in Rust");

enum Outcome {
    DONE = 0,
    // Threads wait for others that have ended or wait for something else: a barrier that not all reach, or an instruction of
    // a wave that some lanes are not at.
    STUCK = 1,
    // The launch asks for more threads than the kernel is made for, for none, or for a part of a warp.
    BAD_LAUNCH = 2,
};

// Runs `body` once per thread. The order in which threads run between two waits is random, so that a result that depends on
// it differs from seed to seed; shared memory is poisoned before each block.
int run(const Launch &launch, u32 warp, u32 max_threads, void (*body)(const void *), const void *params);

// Of the thread that calls.
u32 thread_index();
u32 block_index();
void sync_block();
// The value that lane `from` of the warp gives in the same call.
u32 exchange(u32 value, u32 from);
// A bit for each lane of the warp, by what it gives in the same call.
u64 ballot(bool holds);
// Of what all lanes of the warp give in the same call.
u32 largest(u32 value);
u32 sum(u32 value);
// One operation of all threads of an aligned group of `lanes`: `run` is called once, when all of them have come here with it,
// with what each gives, and then they go on.
void together(u32 lanes, void (*run)(void *const *given), void *mine);
// The block's array for `key`, of `bytes`; poisoned when the first thread asks for it.
void *shared(const void *key, u64 bytes);
// Lets other threads run, as a loop that waits for another block must.
void yield();
} // namespace moe::simt
