//! The conformance suite on both names.

use moe_conformance::conformance_comm;
use mori_comm::MoriBackend;

conformance_comm!(mori_high_throughput, MoriBackend::HighThroughput, floor = 131);
conformance_comm!(mori_low_latency, MoriBackend::LowLatency, floor = 131);
