//! What the kernel types do differently: the hops between nodes.

use std::marker::PhantomData;

use enum_dispatch::enum_dispatch;
use ep_transport::{Deadline, Result, StatusBoard};

use crate::node::{Node, RowOn};
use crate::nodes::{Destinations, Nodes};
use crate::rails::Rails;
use crate::record::Fields;
use crate::sum::OutputRow;

/// One of this rank's tokens.
#[derive(Clone, Copy)]
pub(crate) struct Token<'a> {
    pub index: usize,
    pub ids: &'a [i32],
    pub fields: Fields<&'a [u8]>,
}

/// The steps of a round that concern other nodes, in their order.
#[enum_dispatch]
pub(crate) trait Hops {
    /// Whether nodes get all tokens, even those that go to no expert at all.
    fn whole_windows(&self) -> bool;
    /// Begins a round.
    fn begin(&mut self, deadline: Deadline) -> Result<()>;
    /// Sends a token to other nodes.
    fn send(&mut self, destinations: &Destinations, token: Token<'_>, round: u64) -> Result<()>;
    /// Ends the sends of a round, in which this rank may have `failed`.
    fn end(&mut self, round: u64, failed: bool) -> Result<()>;
    /// Hands tokens of other nodes on to the ranks of this one.
    fn forward(
        &mut self,
        node: &mut Node,
        destinations: &Destinations,
        round: u64,
        deadline: Deadline,
    ) -> Result<()>;
    /// The statuses with which a rank says that its forwarding is done; `None` if there is none to do.
    fn forwarded(&self) -> Option<StatusBoard>;
    /// Sends what this node computed for tokens of others. The outputs of its ranks are ready.
    fn give_back(&mut self, node: &mut Node, round: u64) -> Result<()>;
    /// Waits for what other nodes computed. The outputs of all ranks are ready.
    fn collect(&self, round: u64, deadline: Deadline) -> Result<()>;
    /// Writes the sum of the outputs for one of this rank's tokens, which lies at `rows` on this node.
    fn sum(&mut self, node: &mut Node, token: usize, rows: &[RowOn], out: OutputRow<'_>) -> Result<()>;
    /// Bytes allocated.
    fn allocated_bytes(&self) -> usize;
}

/// The kernels, by [`crate::KernelType`].
#[enum_dispatch(Hops)]
pub(crate) enum Kernel {
    IntraNode(IntraNode),
    InterNodeV1(InterNode<Compacted>),
    InterNodeV1LL(InterNode<Whole>),
}

/// One node, no hops. A token's outputs are summed in slot order.
pub(crate) struct IntraNode;

/// Which tokens are in the windows that go to a node.
pub(crate) trait Windows {
    /// Whether it is all of them.
    const WHOLE: bool;
}

/// Those that visit the node: fewest bytes.
pub(crate) struct Compacted;

/// All: a token's slot is its index, whoever it visits.
pub(crate) struct Whole;

impl Windows for Compacted {
    const WHOLE: bool = false;
}

impl Windows for Whole {
    const WHOLE: bool = true;
}

/// Several nodes. The outputs for a token are summed over the ranks of each node in slot order, rounded to the type
/// that travels, and summed in node order.
pub(crate) struct InterNode<W> {
    nodes: Nodes,
    rails: Rails,
    windows: PhantomData<W>,
}

impl<W> InterNode<W> {
    pub fn new(nodes: Nodes, rails: Rails) -> Self {
        Self { nodes, rails, windows: PhantomData }
    }
}

impl Hops for IntraNode {
    fn whole_windows(&self) -> bool {
        false
    }

    fn begin(&mut self, _: Deadline) -> Result<()> {
        Ok(())
    }

    fn send(&mut self, _: &Destinations, _: Token<'_>, _: u64) -> Result<()> {
        Ok(())
    }

    fn end(&mut self, _: u64, _: bool) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, _: &mut Node, _: &Destinations, _: u64, _: Deadline) -> Result<()> {
        Ok(())
    }

    fn forwarded(&self) -> Option<StatusBoard> {
        None
    }

    fn give_back(&mut self, _: &mut Node, _: u64) -> Result<()> {
        Ok(())
    }

    fn collect(&self, _: u64, _: Deadline) -> Result<()> {
        Ok(())
    }

    fn sum(&mut self, node: &mut Node, _: usize, rows: &[RowOn], out: OutputRow<'_>) -> Result<()> {
        node.sum_outputs(rows, out);
        Ok(())
    }

    fn allocated_bytes(&self) -> usize {
        0
    }
}

impl<W: Windows> Hops for InterNode<W> {
    fn whole_windows(&self) -> bool {
        W::WHOLE
    }

    fn begin(&mut self, deadline: Deadline) -> Result<()> {
        self.rails.begin(deadline)
    }

    fn send(&mut self, destinations: &Destinations, token: Token<'_>, round: u64) -> Result<()> {
        self.rails.send(destinations, token, (round, W::WHOLE))
    }

    fn end(&mut self, round: u64, failed: bool) -> Result<()> {
        self.rails.end(round, failed)
    }

    fn forward(
        &mut self,
        node: &mut Node,
        destinations: &Destinations,
        round: u64,
        deadline: Deadline,
    ) -> Result<()> {
        self.rails.forward((node, destinations), round, deadline)
    }

    fn forwarded(&self) -> Option<StatusBoard> {
        Some(self.rails.buffers().forwarded)
    }

    fn give_back(&mut self, node: &mut Node, round: u64) -> Result<()> {
        self.rails.give_back(node, round)
    }

    fn collect(&self, round: u64, deadline: Deadline) -> Result<()> {
        self.rails.collect(round, deadline)
    }

    fn sum(&mut self, node: &mut Node, token: usize, rows: &[RowOn], out: OutputRow<'_>) -> Result<()> {
        self.rails.sum((node, self.nodes), (token, rows), out)
    }

    fn allocated_bytes(&self) -> usize {
        self.rails.allocated_bytes()
    }
}
