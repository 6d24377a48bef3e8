//! Communicators, and what ranks tell each other through them.

use std::ffi::c_int;
use std::ptr;
use std::time::Duration;

use fused_moe_core::Rank;
use mpi::ffi;

use super::session::{Session, check};
use super::watchdog::Wait;
use crate::error::Result;

/// Polls after which a rank that waits for others in a collective naps between them.
const EAGER_POLLS: u32 = 500;

const NAP: Duration = Duration::from_micros(100);

/// The name of a communicator whose errors are returned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comm {
    raw: ffi::MPI_Comm,
    rank: usize,
    size: usize,
}

// SAFETY: the handle is a name that any thread may use; the session makes the calls one at a time.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Comm {
    /// A copy of the communicator of all ranks.
    pub(super) fn world() -> Result<Self, c_int> {
        // SAFETY: MPI is initialised: there is a session. The handle is written before it is read.
        unsafe { Self::made(|raw| ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, raw)) }
    }

    /// The ranks that share a machine with this one. Collective.
    pub(super) fn machine(&self) -> Result<Self, c_int> {
        // SAFETY: the communicator is valid while `self` exists; the handle is written before it is read.
        unsafe {
            let (kind, key, info) = (ffi::RSMPI_COMM_TYPE_SHARED, self.rank as c_int, ffi::RSMPI_INFO_NULL);
            Self::made(|raw| ffi::MPI_Comm_split_type(self.raw, kind, key, info, raw))
        }
    }

    /// The ranks of the same `color`, by `key`; `None` without a color. Collective.
    pub(super) fn split(&self, color: Option<usize>, key: usize) -> Result<Option<Self>, c_int> {
        let split = |raw: *mut ffi::MPI_Comm| {
            // SAFETY: as in `machine`.
            unsafe {
                let color = color.map_or(ffi::RSMPI_UNDEFINED, |color| color as c_int);
                ffi::MPI_Comm_split(self.raw, color, key as c_int, raw)
            }
        };
        match color {
            // SAFETY: a rank with a color gets a communicator.
            Some(_) => unsafe { Self::made(split) }.map(Some),
            None => {
                let mut none = ffi::MPI_Comm(ptr::null_mut());
                check(split(&mut none)).map(|()| None)
            }
        }
    }

    /// # Safety
    /// `make` calls MPI and writes a communicator that is not null, unless it returns an error.
    unsafe fn made(make: impl FnOnce(*mut ffi::MPI_Comm) -> c_int) -> Result<Self, c_int> {
        let (mut raw, mut rank, mut size) = (ffi::MPI_Comm(ptr::null_mut()), 0, 0);
        check(make(&mut raw))?;
        // SAFETY: `raw` is a communicator, and the places are there to be written.
        unsafe {
            check(ffi::MPI_Comm_set_errhandler(raw, ffi::RSMPI_ERRORS_RETURN))?;
            check(ffi::MPI_Comm_rank(raw, &mut rank))?;
            check(ffi::MPI_Comm_size(raw, &mut size))?;
        }
        Ok(Self { raw, rank: rank as usize, size: size as usize })
    }

    /// Frees the communicator. Collective.
    pub(super) fn free(mut self) -> Result<(), c_int> {
        // SAFETY: the communicator is valid and not used again.
        check(unsafe { ffi::MPI_Comm_free(&mut self.raw) })
    }

    pub(super) fn raw(&self) -> ffi::MPI_Comm {
        self.raw
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Lets MPI work on what has arrived. Of a communicator on which nothing is ever sent: MPI does nothing when it finds
    /// a message for the probe.
    pub(super) fn progress(&self) -> Result<(), c_int> {
        let mut flag = 0;
        // SAFETY: the communicator is valid, the status is not wanted.
        check(unsafe {
            ffi::MPI_Iprobe(
                ffi::RSMPI_ANY_SOURCE,
                ffi::RSMPI_ANY_TAG,
                self.raw,
                &mut flag,
                ffi::RSMPI_STATUS_IGNORE,
            )
        })
    }

    /// Gives `mine` to every rank and returns what all gave, of the lengths that are known, in rank order. Collective.
    ///
    /// Point to point, so that the rank that does not come can be named; groups are set up once.
    pub(super) fn swap(&self, session: &Session, wait: Wait, mine: &[u8], lens: &[usize]) -> Vec<Vec<u8>> {
        let mut received: Vec<Vec<u8>> = lens.iter().map(|&len| vec![0; len]).collect();
        let mut requests = Vec::with_capacity(2 * self.size);
        session.call(wait, || {
            for peer in (0..self.size).filter(|&peer| peer != self.rank) {
                requests.push((peer, self.receive(peer, &mut received[peer])?));
                requests.push((peer, self.send(peer, mine)?));
            }
            Ok(())
        });
        let mut polls = 0..EAGER_POLLS;
        loop {
            session.call(wait, || {
                let mut failed = Ok(());
                requests.retain_mut(|(_, request)| {
                    let mut done = 0;
                    // SAFETY: the request is active: it is dropped from the list once it is done.
                    let code = unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
                    failed = failed.and(check(code));
                    done == 0
                });
                failed
            });
            let Some(&(peer, _)) = requests.first() else { break };
            if wait.deadline.remaining().is_none() {
                session.fail(Wait { on: Rank(peer as u32), ..wait });
            }
            // Groups are set up seldom, by ranks that may come minutes apart and need the cores meanwhile.
            match polls.next() {
                Some(_) => std::thread::yield_now(),
                None => std::thread::sleep(NAP),
            }
        }
        received[self.rank] = mine.to_vec();
        received
    }

    fn receive(&self, from: usize, into: &mut [u8]) -> Result<ffi::MPI_Request, c_int> {
        let mut request = ffi::MPI_Request(ptr::null_mut());
        // SAFETY: the buffer lives until the request is done: `swap` returns no sooner, and a job that fails before
        // is aborted with the buffer in place.
        check(unsafe {
            ffi::MPI_Irecv(
                into.as_mut_ptr().cast(),
                into.len() as c_int,
                ffi::RSMPI_UINT8_T,
                from as c_int,
                0,
                self.raw,
                &mut request,
            )
        })?;
        Ok(request)
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<ffi::MPI_Request, c_int> {
        let mut request = ffi::MPI_Request(ptr::null_mut());
        // SAFETY: as in `receive`; the bytes do not change while they are borrowed.
        check(unsafe {
            ffi::MPI_Isend(
                bytes.as_ptr().cast(),
                bytes.len() as c_int,
                ffi::RSMPI_UINT8_T,
                to as c_int,
                0,
                self.raw,
                &mut request,
            )
        })?;
        Ok(request)
    }
}
