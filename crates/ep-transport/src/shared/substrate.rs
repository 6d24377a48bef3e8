//! What threads and processes do differently.

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use super::group::Group;
use crate::segment::Segment;
use crate::symmetric::HeapSize;

/// A segment of this rank that peers may take as long as the offer lives.
pub(crate) struct Offer {
    /// The segment.
    pub(crate) segment: Arc<Segment>,
    /// Where peers find it, in the words of the substrate.
    pub(crate) address: Vec<u8>,
    /// What keeps the address valid.
    pub(crate) _keep: Box<dyn Any + Send>,
}

/// How segments get from one rank to another, and how a death is noticed.
pub(crate) trait Substrate: Debug + Send + Sync {
    /// Allocates a zeroed segment for the peers to take; `None` if the memory cannot be had.
    fn offer(&self, size: HeapSize) -> Option<Offer>;

    /// The segment that a peer has offered.
    fn take(&self, address: &[u8], size: HeapSize) -> io::Result<Arc<Segment>>;

    /// The control segment of a group, the same for all who ask; zeroed when the first one does.
    fn control(&self, generation: u32, size: HeapSize) -> io::Result<Arc<Segment>>;

    /// Starts to tell `group` about ranks that die without a word, until the returned guard is dropped.
    fn watch(&self, group: &Arc<Group>) -> io::Result<Box<dyn Any + Send + Sync>>;
}
