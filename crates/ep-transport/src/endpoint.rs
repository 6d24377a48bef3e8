//! The group that backends of this crate's transports recognise.

use std::any::Any;
use std::sync::Arc;

use fused_moe_core::{ProcessGroup, Rank, Stage};

use crate::transport::Transport;

/// Name under which errors of the group itself are reported.
const BACKEND: &str = "ep-transport";

/// A rank's transport as the process group of the core.
#[derive(Clone)]
pub struct Endpoint {
    transport: Arc<dyn Transport>,
}

impl Endpoint {
    /// The group over `transport`.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport }
    }

    /// The transport.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Endpoint({} of {})", self.transport.rank(), self.transport.world_size())
    }
}

impl ProcessGroup for Endpoint {
    fn rank(&self) -> Rank {
        self.transport.rank()
    }

    fn world_size(&self) -> usize {
        self.transport.world_size()
    }

    fn all_gather(&self, mine: &[u8]) -> fused_moe_core::Result<Vec<Vec<u8>>> {
        // A group compares notes before there is a round, on behalf of the handle that will dispatch.
        let gathered = self.transport.all_gather(mine, self.transport.deadline());
        gathered.map_err(|error| error.into_core(Stage::QuantizeDispatch, BACKEND, 0))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The transport under `group`; `None` if the group is not an [`Endpoint`].
pub fn transport_of(group: &dyn ProcessGroup) -> Option<Arc<dyn Transport>> {
    group.as_any().downcast_ref::<Endpoint>().map(|endpoint| Arc::clone(&endpoint.transport))
}
