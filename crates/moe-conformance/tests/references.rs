//! The suite on the reference backends: what passes here passes everywhere it should.

use moe_conformance::reference::{
    BatchedComm, BatchedExperts, MonolithicExperts, ReferenceComm, ReferenceExperts,
};
use moe_conformance::{conformance_comm, conformance_experts, conformance_monolithic};

conformance_comm!(
    reference_comm,
    ReferenceComm,
    floor = 77,
    except = [
        traffic_none_ep2: "moves its rows in collectives, which transports do not count",
        traffic_block_ep8: "moves its rows in collectives, which transports do not count",
    ]
);
conformance_comm!(batched_comm, BatchedComm, floor = 18);
conformance_experts!(reference_experts, ReferenceExperts, floor = 56);
conformance_experts!(batched_experts, BatchedExperts, floor = 44);
conformance_monolithic!(MonolithicExperts, floor: 40);
