#include "host_simt.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include <ucontext.h>

namespace moe::simt {
namespace {

// Of a kernel's thread. Arrays of kernels are in shared memory or in registers.
constexpr u64 STACK_BYTES = 64 << 10;

// Threads of the largest group that does an operation together: a warpgroup of Hopper.
constexpr u32 MAX_TOGETHER = 128;

// What shared memory holds before anyone writes: neither zero nor a finite number in f32, bf16 or FP8.
constexpr u8 POISON = 0xff;

enum class State { READY, AT_BARRIER, IN_EXCHANGE, TOGETHER, ENDED };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<u8[]> stack;
    u32 thread = 0;
    State state = State::ENDED;
    // What it does with others of its group, and gives to it.
    void (*run)(void *const *) = nullptr;
    void *given = nullptr;
    u32 lanes = 0;
    // Exchanges so far. Lanes are at most one apart, so two buffers are enough.
    u32 exchanges = 0;
};

struct Array {
    const void *key;
    std::vector<u8> memory;
};

struct Block {
    u32 index = 0;
    u32 running = 0;
    std::vector<Fiber> fibers;
    std::vector<u32> exchanged[2];
    std::vector<Array> arrays;
};

struct Machine {
    const Launch *launch;
    u32 warp;
    void (*body)(const void *);
    const void *params;
    u64 random;
    std::vector<Block> blocks;
    ucontext_t scheduler;
    Block *block = nullptr;
    Fiber *fiber = nullptr;
};

thread_local Machine *machine = nullptr;

// xorshift64*.
u32 draw(Machine &m, u32 below) {
    m.random ^= m.random >> 12;
    m.random ^= m.random << 25;
    m.random ^= m.random >> 27;
    return u32((m.random * 0x2545f4914f6cdd1dull >> 32) % below);
}

void to_scheduler() { swapcontext(&machine->fiber->context, &machine->scheduler); }

void start() {
    machine->body(machine->params);
    machine->fiber->state = State::ENDED;
    to_scheduler();
}

void load(Machine &m, Block &block, u32 index) {
    block.index = index;
    block.running = m.launch->block;
    block.arrays.clear();
    block.fibers.resize(m.launch->block);
    for (auto &buffer : block.exchanged) buffer.assign(m.launch->block, 0);
    u32 thread = 0;
    for (Fiber &fiber : block.fibers) {
        if (!fiber.stack) fiber.stack.reset(new u8[STACK_BYTES]);
        fiber.thread = thread++;
        fiber.exchanges = 0;
        fiber.state = State::READY;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, STACK_BYTES};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
    }
}

// Lets the fibers in [first, last) go on if all of them that have not ended are in `state`.
void release(Block &block, u32 first, u32 last, State state) {
    for (u32 i = first; i < last; i++) {
        const State at = block.fibers[i].state;
        if (at != state && at != State::ENDED) return;
    }
    for (u32 i = first; i < last; i++) {
        if (block.fibers[i].state == state) block.fibers[i].state = State::READY;
    }
}

// Does what the group of a fiber waits for, if all of it wait for the same.
void run_together(Block &block, const Fiber &fiber) {
    const u32 first = fiber.thread / fiber.lanes * fiber.lanes;
    if (first + fiber.lanes > block.fibers.size()) return;
    void *given[MAX_TOGETHER];
    for (u32 i = 0; i < fiber.lanes; i++) {
        const Fiber &other = block.fibers[first + i];
        if (other.state != State::TOGETHER || other.run != fiber.run || other.lanes != fiber.lanes) return;
        given[i] = other.given;
    }
    fiber.run(given);
    for (u32 i = 0; i < fiber.lanes; i++) block.fibers[first + i].state = State::READY;
}

// One fiber until it waits, yields or ends.
void step(Machine &m, Block &block, Fiber &fiber) {
    m.block = &block;
    m.fiber = &fiber;
    swapcontext(&m.scheduler, &fiber.context);
    const u32 first = fiber.thread / m.warp * m.warp;
    const u32 last = first + m.warp < m.launch->block ? first + m.warp : m.launch->block;
    if (fiber.state == State::ENDED) block.running--;
    if (fiber.state == State::TOGETHER) {
        run_together(block, fiber);
    } else if (fiber.state != State::READY) {
        release(block, first, last, State::IN_EXCHANGE);
        release(block, 0, m.launch->block, State::AT_BARRIER);
    }
}
} // namespace

int run(const Launch &launch, u32 warp, u32 max_threads, void (*body)(const void *), const void *params) {
    if (launch.block == 0 || launch.block > max_threads || launch.block % warp != 0 || launch.resident == 0) {
        return BAD_LAUNCH;
    }
    Machine m{&launch, warp, body, params, launch.seed | 1, {}, {}};
    m.blocks.resize(launch.resident < launch.grid ? launch.resident : launch.grid);
    // Blocks start in a random order, too.
    std::vector<u32> waiting(launch.grid);
    for (u32 i = 0; i < launch.grid; i++) {
        const u32 at = draw(m, i + 1);
        waiting[i] = waiting[at];
        waiting[at] = i;
    }
    machine = &m;
    int outcome = DONE;
    std::vector<std::pair<Block *, Fiber *>> ready;
    for (;;) {
        ready.clear();
        bool running = false;
        for (Block &block : m.blocks) {
            if (block.running == 0 && !waiting.empty()) {
                load(m, block, waiting.back());
                waiting.pop_back();
            }
            running |= block.running != 0;
            for (Fiber &fiber : block.fibers) {
                if (fiber.state == State::READY) ready.emplace_back(&block, &fiber);
            }
        }
        if (!running) break;
        if (ready.empty()) {
            outcome = STUCK;
            break;
        }
        // Everyone who is ready, in a random order: as fair as a GPU, and cheaper than a draw among all for each step.
        for (u32 left = u32(ready.size()); left > 0; left--) {
            std::swap(ready[draw(m, left)], ready[left - 1]);
            auto [block, fiber] = ready[left - 1];
            if (fiber->state == State::READY) step(m, *block, *fiber);
        }
    }
    machine = nullptr;
    return outcome;
}

u32 thread_index() { return machine->fiber->thread; }
u32 block_index() { return machine->block->index; }

void sync_block() {
    machine->fiber->state = State::AT_BARRIER;
    to_scheduler();
}

void yield() { to_scheduler(); }

namespace {
// Gives `value` to the other lanes of the warp, and returns what all of them gave, from lane 0 on.
const u32 *give(u32 value) {
    Machine &m = *machine;
    Fiber &fiber = *m.fiber;
    auto &buffer = m.block->exchanged[fiber.exchanges++ % 2];
    buffer[fiber.thread] = value;
    fiber.state = State::IN_EXCHANGE;
    to_scheduler();
    return &buffer[fiber.thread / m.warp * m.warp];
}
} // namespace

void together(u32 lanes, void (*run)(void *const *), void *mine) {
    Fiber &fiber = *machine->fiber;
    fiber.run = run;
    fiber.given = mine;
    fiber.lanes = lanes;
    fiber.state = State::TOGETHER;
    to_scheduler();
}

u32 exchange(u32 value, u32 from) { return give(value)[from]; }

u64 ballot(bool holds) {
    const u32 *given = give(holds);
    u64 bits = 0;
    for (u32 lane = 0; lane < machine->warp; lane++) bits |= u64(given[lane]) << lane;
    return bits;
}

u32 largest(u32 value) {
    const u32 *given = give(value);
    u32 result = 0;
    for (u32 lane = 0; lane < machine->warp; lane++) result = given[lane] > result ? given[lane] : result;
    return result;
}

u32 sum(u32 value) {
    const u32 *given = give(value);
    u32 result = 0;
    for (u32 lane = 0; lane < machine->warp; lane++) result += given[lane];
    return result;
}

void *shared(const void *key, u64 bytes) {
    auto &arrays = machine->block->arrays;
    for (Array &array : arrays) {
        if (array.key == key) return reinterpret_cast<void *>((uintptr_t(array.memory.data()) + 1023) & ~uintptr_t(1023));
    }
    // Aligned as the widest access of any device wants it.
    arrays.push_back({key, std::vector<u8>(bytes + 1024, POISON)});
    return shared(key, bytes);
}
} // namespace moe::simt
