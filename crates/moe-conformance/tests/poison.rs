//! Heaps are poisoned in the suite: a backend that reads one byte that no rank has written fails.

use std::sync::Arc;

use ep_transport::{Heap, HeapLayout, SymOffset, transport_of};
use fused_moe_core::{
    DType, Dispatched, ExecCx, ExpertOut, KernelKind, MoeConfig, Plan, PrepareAndFinalize,
    PrepareAndFinalizeModular, PrepareCaps, PrepareFinalize, PrepareFinalizeProvider, PrepareInput,
    ProcessGroup, Result, Routed, Sent, Support, TensorViewMut, TicketLedger, WireBytes, phase,
};
use half::bf16;
use moe_conformance::reference::ReferenceComm;
use moe_conformance::{Outcome, Suite};

/// The reference, but that combine takes the upper half of a bf16 from memory that no rank has written. With memory
/// of zeros it is right by luck.
#[derive(Debug)]
struct ReadsUnwritten;

impl PrepareFinalizeProvider for ReadsUnwritten {
    fn name(&self) -> &'static str {
        ReferenceComm.name()
    }

    fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        ReferenceComm.supports(config, kind)
    }

    fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
        ReferenceComm.required_bytes(config, plan)
    }

    fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        ReferenceComm.wire_bytes_per_token(config, plan)
    }

    fn build(&self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let transport = transport_of(group).expect("the suite's groups have transports");
        let mut layout = HeapLayout::default();
        let unwritten = layout.region(1);
        let heap = transport.allocate(layout.size(), transport.deadline()).expect("a byte is to be had");
        Ok(match ReferenceComm.build(config, plan, group)? {
            PrepareFinalize::Modular(inner) => {
                PrepareFinalize::Modular(Box::new(Reading { inner, heap, unwritten }))
            }
            other => other,
        })
    }
}

struct Reading {
    inner: Box<dyn PrepareAndFinalizeModular>,
    heap: Arc<dyn Heap>,
    unwritten: SymOffset,
}

impl PrepareAndFinalize for Reading {
    fn caps(&self) -> &PrepareCaps {
        self.inner.caps()
    }

    fn allocated_bytes(&self) -> usize {
        self.inner.allocated_bytes()
    }

    fn ledger(&mut self) -> &mut TicketLedger {
        self.inner.ledger()
    }

    fn finalize_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        routed: Routed,
        out: ExpertOut<'a>,
    ) -> Result<Sent<'a, phase::Finalize>> {
        self.inner.finalize_send(cx, routed, out)
    }

    fn finalize_recv(
        &mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let tokens = sent.routing().num_tokens();
        self.inner.finalize_recv(cx, sent, out.reborrow())?;
        // SAFETY: no rank ever writes the byte, and it is initialised.
        let byte = unsafe { self.heap.local(self.unwritten, 1) }.expect("the byte is in the heap")[0];
        let unwritten = bf16::from_bits(u16::from_ne_bytes([0, byte])).to_f32();
        if tokens > 0 {
            match out.dtype() {
                DType::F32 => out.row_mut::<f32>(0).expect("a row of the output")[0] += unwritten,
                _ => out.row_mut::<bf16>(0).expect("a row of the output")[0] += bf16::from_f32(unwritten),
            }
        }
        Ok(())
    }
}

impl PrepareAndFinalizeModular for Reading {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.inner.prepare_send(cx, input)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        self.inner.prepare_recv(cx, sent)
    }
}

#[test]
fn one_byte_that_no_one_wrote_fails_the_suite() {
    for case in ["rows_none_ep2", "rows_block_ep3", "layer_none_ep2"] {
        match Suite::comm(ReadsUnwritten).outcome(case) {
            Outcome::Fail(why) => println!("{case}: {why}"),
            other => panic!("{case}: {other}"),
        }
        let control = Suite::comm(ReferenceComm).outcome(case);
        assert!(control.is_pass(), "{case} of the control: {control}");
    }
}
