//! An allocator that counts, for tests that a call allocates nothing.
//!
//! It is no stage and in no program; a test makes it the allocator of its binary.
//!
//! ```
//! #[global_allocator]
//! static ALLOCATOR: counting_alloc::Counting = counting_alloc::Counting;
//!
//! assert_eq!(counting_alloc::allocations(|| drop(String::new())), 0);
//! assert_eq!(counting_alloc::allocations(|| drop(std::hint::black_box(vec![7]))), 1);
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, counting per thread.
#[derive(Debug)]
pub struct Counting;

/// How often `work` allocates or reallocates on this thread.
///
/// # Panics
/// If [`Counting`] is not the allocator of the program.
pub fn allocations(work: impl FnOnce()) -> usize {
    let start = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(0u8)));
    let before = ALLOCATIONS.get();
    assert!(before > start, "the global allocator does not count");
    work();
    ALLOCATIONS.get() - before
}

// SAFETY: every call goes to the system's allocator unchanged; the counter is a plain thread-local without a
// destructor, so counting neither allocates nor fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}
