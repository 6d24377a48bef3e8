//! A comm of one rank and experts that can be told to fail, for the composition.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use fused_moe_core::{
    Arrived, DType, Dispatched, Error, ErrorKind, ExecCx, ExpertOut, ExpertWeights, ExpertsCaps,
    ExpertsModular, Fault, MoeConfig, PrepareAndFinalize, PrepareAndFinalizeModular, PrepareCaps,
    PrepareInput, Rank, ReceivedRows, Result, Routed, Sent, Stage, TensorView, TensorViewMut, TicketLedger,
    TopK, phase,
};
use half::bf16;

/// What a test scripts, and what the comm saw.
#[derive(Debug, Default)]
pub struct Script {
    /// A peer that fails in the dispatch half.
    pub dispatch: Option<(Rank, Fault)>,
    /// A peer that fails in the combine half.
    pub combine: Option<(Rank, Fault)>,
    /// A peer that is gone when `prepare_send` wants it.
    pub lost: Option<Rank>,
    /// What happened, in order.
    pub log: Vec<&'static str>,
    /// The fault that was sent to the peers.
    pub sent_fault: Option<Fault>,
}

/// One rank; rows wait in its own buffers.
pub struct ToyComm {
    pub caps: PrepareCaps,
    pub config: MoeConfig,
    pub rank: Rank,
    pub ledger: TicketLedger,
    pub script: Arc<Mutex<Script>>,
    hidden: Vec<bf16>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    rows: [i32; 1],
    output: Vec<bf16>,
    fault: Option<Fault>,
}

impl ToyComm {
    /// `caps.in_place_output` says whether it offers its buffer, whatever the plan is.
    pub fn new(caps: PrepareCaps, config: &MoeConfig, rank: Rank, script: Arc<Mutex<Script>>) -> Self {
        let rows = caps.max_rows;
        Self {
            ledger: TicketLedger::new(caps.name, rank, config),
            hidden: vec![bf16::NAN; rows * config.hidden],
            ids: vec![i32::MIN; rows * config.top_k],
            weights: vec![f32::NAN; rows * config.top_k],
            rows: [0],
            output: vec![bf16::NAN; rows * config.hidden],
            fault: None,
            config: config.clone(),
            caps,
            rank,
            script,
        }
    }

    pub fn bytes(config: &MoeConfig, max_rows: usize) -> usize {
        max_rows * (config.hidden * 4 + config.top_k * 8)
    }

    /// The lowest rank that failed.
    fn verdict(&self, scripted: Option<(Rank, Fault)>) -> Option<(Rank, Fault)> {
        scripted.into_iter().chain(self.fault.map(|fault| (self.rank, fault))).min_by_key(|&(rank, _)| rank)
    }
}

impl PrepareAndFinalize for ToyComm {
    fn caps(&self) -> &PrepareCaps {
        &self.caps
    }

    fn allocated_bytes(&self) -> usize {
        size_of_val(&self.hidden[..])
            + size_of_val(&self.ids[..])
            + size_of_val(&self.weights[..])
            + size_of_val(&self.output[..])
    }

    fn ledger(&mut self) -> &mut TicketLedger {
        &mut self.ledger
    }

    fn finalize_send<'a>(
        &mut self,
        _cx: &mut ExecCx<'_>,
        routed: Routed,
        out: ExpertOut<'a>,
    ) -> Result<Sent<'a, phase::Finalize>> {
        let sent = self.ledger.send_finalize(routed)?;
        let mut script = self.script.lock().unwrap();
        match out {
            ExpertOut::InPlace => script.log.push("in place"),
            ExpertOut::Lent(rows) => {
                script.log.push("lent");
                assert_eq!(rows.dims(), [self.caps.max_rows, self.config.hidden]);
                self.output.copy_from_slice(rows.as_slice().unwrap());
            }
            ExpertOut::Failed(fault) => {
                script.log.push("failed");
                (self.fault, script.sent_fault) = (Some(fault), Some(fault));
            }
        }
        Ok(sent)
    }

    fn finalize_recv(
        &mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Finalize>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let routing = self.ledger.receive_finalize(sent)?;
        self.script.lock().unwrap().log.push("finalize_recv");
        let scripted = self.script.lock().unwrap().combine.take();
        if let Some((rank, fault)) = self.verdict(scripted) {
            self.fault = None;
            return Err(self.ledger.fail_finalize(routing, rank, fault));
        }
        for (row, sums) in self.output.chunks_exact(self.config.hidden).take(routing.num_tokens()).enumerate()
        {
            let out = out.row_mut::<f32>(row).unwrap();
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum.to_f32());
        }
        self.ledger.close(routing);
        Ok(())
    }
}

impl PrepareAndFinalizeModular for ToyComm {
    fn prepare_send<'a>(
        &mut self,
        cx: &mut ExecCx<'_>,
        input: PrepareInput<'a>,
    ) -> Result<Sent<'a, phase::Prepare>> {
        self.settle(cx)?;
        let (sent, fault) = self.ledger.open(&self.config, &input)?;
        if let Some(rank) = self.script.lock().unwrap().lost {
            return Err(self.ledger.lost(rank, Stage::QuantizeDispatch));
        }
        // Greedy on purpose: what a comm takes of the workspace must not be missing at the experts.
        cx.workspace.take::<u8>(cx.workspace.remaining()).unwrap();
        self.fault = fault;
        let tokens = sent.routing().num_tokens();
        self.rows = [tokens as i32];
        for (token, row) in self.hidden.chunks_exact_mut(self.config.hidden).take(tokens).enumerate() {
            row.copy_from_slice(input.hidden.row(token).unwrap());
        }
        self.ids[..tokens * self.config.top_k].copy_from_slice(sent.routing().ids());
        self.weights[..tokens * self.config.top_k].copy_from_slice(sent.routing().weights());
        let mut script = self.script.lock().unwrap();
        script.log.push("prepare_send");
        script.sent_fault = fault;
        Ok(sent)
    }

    fn prepare_recv<'p>(
        &'p mut self,
        _cx: &mut ExecCx<'_>,
        sent: Sent<'_, phase::Prepare>,
    ) -> Result<(Dispatched<'p>, Routed)> {
        let routed = self.ledger.receive_prepare(sent)?;
        self.script.lock().unwrap().log.push("prepare_recv");
        let scripted = self.script.lock().unwrap().dispatch.take();
        if let Some((rank, fault)) = self.verdict(scripted) {
            self.fault = None;
            return Err(self.ledger.fail_prepare(routed, rank, fault));
        }
        self.output.fill(bf16::NAN);
        let (max, top_k, hidden) = (self.caps.max_rows, self.config.top_k, self.config.hidden);
        let output = TensorViewMut::from_slice(&mut self.output, DType::Bf16, &[max, hidden]).unwrap();
        let dispatched = Dispatched {
            hidden: TensorView::from_slice(&self.hidden, DType::Bf16, &[max, hidden]).unwrap(),
            scale: None,
            arrived: Arrived::Standard {
                topk: TopK {
                    ids: TensorView::from_slice(&self.ids, DType::I32, &[max, top_k]).unwrap(),
                    weights: TensorView::from_slice(&self.weights, DType::F32, &[max, top_k]).unwrap(),
                },
                rows: ReceivedRows(TensorView::from_slice(&self.rows, DType::I32, &[1]).unwrap()),
            },
            output: self.caps.in_place_output.then_some(output),
        };
        Ok((dispatched, routed))
    }
}

/// Expert `e` multiplies by `e + 1`. Rows behind the valid ones become NaN.
pub struct ToyExperts {
    pub caps: ExpertsCaps,
    pub config: MoeConfig,
    pub fail: Arc<AtomicBool>,
}

pub const WORKSPACE: usize = 300;

#[derive(Debug)]
pub struct OutOfLuck;

impl std::fmt::Display for OutOfLuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("out of luck")
    }
}

impl std::error::Error for OutOfLuck {}

impl ExpertsModular for ToyExperts {
    fn caps(&self) -> &ExpertsCaps {
        &self.caps
    }

    fn workspace_bytes(&self) -> usize {
        WORKSPACE
    }

    fn apply(
        &self,
        cx: &mut ExecCx<'_>,
        weights: &ExpertWeights,
        input: &Dispatched<'_>,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        if self.fail.load(Ordering::Relaxed) {
            return Err(Error::other(Stage::Experts, self.caps.name, OutOfLuck));
        }
        assert!(weights.packed::<()>().is_some());
        let error = |e: fused_moe_core::ViewError| Error::contract(Stage::Experts, self.caps.name, e);
        cx.workspace.take::<u8>(WORKSPACE).map_err(error)?.fill(0xFF);
        let Arrived::Standard { topk, rows } = input.arrived else {
            return Err(Error::new(ErrorKind::Contract, Stage::Experts, self.caps.name));
        };
        let (hidden, top_k) = (self.config.hidden, self.config.top_k);
        let out = out.as_mut_slice::<bf16>().map_err(error)?;
        out.fill(bf16::NAN);
        for row in 0..rows.on_host().map_err(error)? {
            let x = input.hidden.row::<bf16>(row).map_err(error)?;
            let ids = topk.ids.row::<i32>(row).map_err(error)?;
            let weights = topk.weights.row::<f32>(row).map_err(error)?;
            if self.caps.weight_and_reduce.is_no_op() {
                let factor: f32 = ids.iter().zip(weights).map(|(&id, w)| w * (id + 1) as f32).sum();
                let out = &mut out[row * hidden..][..hidden];
                out.iter_mut().zip(x).for_each(|(out, x)| *out = bf16::from_f32(x.to_f32() * factor));
            } else {
                // Slots of padding are left NaN: the reduction must not read them.
                for (slot, &id) in ids.iter().enumerate().filter(|&(_, &id)| id >= 0) {
                    let out = &mut out[(row * top_k + slot) * hidden..][..hidden];
                    out.iter_mut()
                        .zip(x)
                        .for_each(|(out, x)| *out = bf16::from_f32(x.to_f32() * (id + 1) as f32));
                }
            }
        }
        Ok(())
    }
}
