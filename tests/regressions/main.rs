//! Bugs that users of other projects met, each as a test that this one passes.
//!
//! A test is named after the thread where the bug was reported. Many are silent: the model answers, and answers wrong.
//! So most tests here compare a whole layer with the f64 oracle, in the situation in which the bug showed.
//!
//! Where types rule a bug out, the test is that a program does not compile: `moe_tests::uncompilable`.
//!
//! What cannot be expressed on the host, so far:
//!
//! | thread | what went wrong | why it has no test |
//! |---|---|---|
//! | aiter #4783 (out of bounds), #2946, #3471, #822, #3811 | GPU memory faults of untuned tile shapes | needs the device kernels; their shapes run in `experts`, on the host |
//! | aiter #4055, #3566, #2797, #1641, sglang #34586 | minutes of JIT compilation, watchdogs | nothing is compiled at run time; there are no device kernels yet |
//! | aiter #5595, tuning tables | wrong key, silent default | there are no tuning tables |
//! | mori #507, #625 (`blockId`), #464, #647 | launch geometry | a host backend has none |
//! | mori #366, #342, DeepEP #137, UCCL #734 | staging and fences of network hardware | no network transport yet |
//! | mori #588, #610, DeepEP #38, #74, #137, #303 | NICs, firmware, NVSHMEM versions | no network transport yet |
//! | mori #505 | the AsyncLL kernel | it is not here; top-6 and top-9 run in `layouts` |
//! | mori #625 (fp8 cast between nodes) | half of the elements off | cases `fp8back` of the conformance suite, which judges every element |
//! | vllm-plugin-FL #346 | graph capture | no device streams; `capturable` is a capability |
//! | vLLM #39942, #43637, sglang #8961, DeepEP #370 | going on without a lost rank | the loss is reported (`failures`); a group does not shrink yet |
//! | vLLM #39177 | the environment was read for every call | a rule of `cargo xtask tidy`: no library reads it |
//! | vLLM, stale tables of backends | documentation | `cargo xtask tidy` compares the README's table with the capabilities |

mod common;

mod experts;
mod failures;
mod formats;
mod layouts;
mod memory;
mod padding;
mod routing;
