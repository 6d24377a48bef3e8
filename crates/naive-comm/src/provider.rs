//! The three backends by name: what each can do, how much memory it needs, and how it is built.

use ep_transport::transport_of;
use fused_moe_core::{
    Axis, CommTraffic, DType, Error, KernelKind, MoeConfig, Plan, PrepareCaps, PrepareFinalize,
    PrepareFinalizeProvider, ProcessGroup, Protocol, Result, Stage, Support, Unsupported, WireBytes,
    WireFormat, copies_to_all,
};

use crate::all_gather::{AllGather, Reduction};
use crate::exchange::Exchange;
use crate::handle::Engine;
use crate::local::OneRank;
use crate::row::{Column, columns};

/// `local`: one rank, no transport. Rows are quantised (or copied) into the handle's buffer, and the combine
/// casts the experts' output. Any process group of one rank will do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Local;

/// `allgather_reducescatter`: every rank gets the rows of all ranks and runs its own experts on them; each
/// rank then sums the partial sums of its own rows. Works on every transport.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllGatherReduceScatter;

/// `naive`: as [`AllGatherReduceScatter`], but every rank ends with the sums of all rows (in the
/// configuration's element type), of which it uses its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naive;

/// The set of backends in this crate.
#[derive(Clone, Copy)]
enum Backend {
    Local,
    Gather(Reduction),
}

const REDUCE_SCATTER: Backend = Backend::Gather(Reduction::ReduceScatter);
const ALL_REDUCE: Backend = Backend::Gather(Reduction::AllReduce);

impl Backend {
    const fn name(self) -> &'static str {
        match self {
            Backend::Local => "local",
            Backend::Gather(Reduction::ReduceScatter) => "allgather_reducescatter",
            Backend::Gather(Reduction::AllReduce) => "naive",
        }
    }

    fn caps(self, config: &MoeConfig, kind: KernelKind) -> PrepareCaps {
        let mut wires = vec![WireFormat::unquantized(config.in_dtype)];
        if config.quant.fp8().is_some() {
            wires.push(config.quant.quantized_wire(config.in_dtype));
        }
        let max_rows = config.ep_size() * config.max_tokens_per_rank;
        let mut caps = PrepareCaps::host(self.name(), kind, wires, max_rows);
        // Where experts route by themselves, no weight is known before they run.
        caps.weight_on_input = kind == KernelKind::Modular;
        caps.in_place_output = true;
        caps
    }

    fn supports(self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
        let mut why = Vec::new();
        if config.in_dtype != DType::Bf16 {
            why.push(Unsupported::new(
                Axis::DType,
                format!("{} hidden states", config.in_dtype),
                DType::Bf16.to_string(),
            ));
        }
        if let (Backend::Local, ranks @ 2..) = (self, config.ep_size()) {
            why.push(Unsupported::new(Axis::Parallel, format!("{ranks} ranks"), "1 rank"));
        }
        Support::unless(why, self.caps(config, kind))
    }

    fn required_bytes(self, config: &MoeConfig, plan: &Plan) -> usize {
        match self {
            Backend::Local => OneRank::required_bytes(config, plan),
            Backend::Gather(reduction) => AllGather::required_bytes(config, plan, reduction),
        }
    }

    fn wire_bytes_per_token(self, config: &MoeConfig, plan: &Plan) -> WireBytes {
        let row = columns(config, plan).iter().map(|column| column.bytes(1)).sum();
        self.traffic_of_rows(config, row).into()
    }

    /// That of a modular round.
    fn traffic(self, config: &MoeConfig, wire: &WireFormat) -> Option<CommTraffic> {
        if let (Backend::Local, 2..) = (self, config.ep_size()) {
            return None;
        }
        let routing = config.top_k * (size_of::<i32>() + size_of::<f32>());
        let row = wire.payload_bytes(config.hidden) + wire.scale_bytes(config.hidden) + routing;
        Some(self.traffic_of_rows(config, row))
    }

    /// Wherever its experts are, a token goes to every other rank and a partial sum comes back from each. Between nodes
    /// as a vendor's collectives would do it, over rails.
    fn traffic_of_rows(self, config: &MoeConfig, row: usize) -> CommTraffic {
        let copies = copies_to_all(config);
        let output = Column::outputs(config).bytes(1);
        let outputs = match self {
            // And the sum goes out again.
            Backend::Gather(Reduction::AllReduce) => 2 * output,
            _ => output,
        };
        CommTraffic { protocol: Protocol::COLLECTIVE, dispatch: copies * row, combine: copies * outputs }
    }

    fn build(self, config: &MoeConfig, plan: &Plan, group: &dyn ProcessGroup) -> Result<PrepareFinalize> {
        let (name, ranks) = (self.name(), config.ep_size());
        let refused = |why: String| Err(Error::contract(Stage::QuantizeDispatch, name, why));
        if plan.comm() != name {
            return refused(format!("the plan is for {}", plan.comm()));
        }
        if group.world_size() != ranks {
            let found = group.world_size();
            return refused(format!("the placement is for {ranks} ranks, the group has {found}"));
        }
        match self {
            Backend::Local if ranks != 1 => refused(format!("the group has {ranks} ranks, needs 1")),
            Backend::Local => {
                let exchange = OneRank::new(config, plan)
                    .map_err(|error| Error::new(error.kind, Stage::QuantizeDispatch, name))?;
                self.handle(config, plan, group, exchange)
            }
            Backend::Gather(reduction) => {
                let Some(transport) = transport_of(group) else {
                    return refused("the group has no transport".into());
                };
                let exchange = AllGather::new(config, plan, reduction, &*transport)
                    .map_err(|error| error.into_core(Stage::QuantizeDispatch, name, 0))?;
                self.handle(config, plan, group, exchange)
            }
        }
    }

    fn handle(
        self,
        config: &MoeConfig,
        plan: &Plan,
        group: &dyn ProcessGroup,
        exchange: impl Exchange + 'static,
    ) -> Result<PrepareFinalize> {
        let caps = self.caps(config, plan.kind());
        let engine = Engine::new(caps, config, plan, group.rank(), exchange)?;
        Ok(match plan.kind() {
            KernelKind::Modular => PrepareFinalize::Modular(Box::new(engine)),
            KernelKind::Monolithic => PrepareFinalize::Monolithic(Box::new(engine)),
        })
    }
}

macro_rules! provider {
    ($provider:ty: $backend:expr) => {
        impl PrepareFinalizeProvider for $provider {
            fn name(&self) -> &'static str {
                $backend.name()
            }

            fn supports(&self, config: &MoeConfig, kind: KernelKind) -> Support<PrepareCaps> {
                $backend.supports(config, kind)
            }

            fn required_bytes(&self, config: &MoeConfig, plan: &Plan) -> usize {
                $backend.required_bytes(config, plan)
            }

            fn wire_bytes_per_token(&self, config: &MoeConfig, plan: &Plan) -> WireBytes {
                $backend.wire_bytes_per_token(config, plan)
            }

            fn traffic(&self, config: &MoeConfig, wire: &WireFormat) -> Option<CommTraffic> {
                $backend.traffic(config, wire)
            }

            fn build(
                &self,
                config: &MoeConfig,
                plan: &Plan,
                group: &dyn ProcessGroup,
            ) -> Result<PrepareFinalize> {
                $backend.build(config, plan, group)
            }
        }
    };
}

provider!(Local: Backend::Local);
provider!(AllGatherReduceScatter: REDUCE_SCATTER);
provider!(Naive: ALL_REDUCE);
