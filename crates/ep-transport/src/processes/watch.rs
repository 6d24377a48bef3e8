//! Noticing that a process has died: the kernel says so, at once, through a descriptor of the process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::shared::{Absence, Group};

/// A thread that sleeps until a process of the group dies, and then tells the group. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches the processes of `group`, which has a descriptor of each member among `pidfds`.
    pub(super) fn start(group: Arc<Group>, pidfds: Arc<[OwnedFd]>) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let stopped = Arc::clone(&stop);
        let builder = std::thread::Builder::new().name("fused-moe-watch".into());
        let thread = builder.spawn(move || watch(&group, &pidfds, &stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Adding 1 to a counter of 0 does not fail.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It does not panic, and if it did there would be nothing to clean up.
            let _ = thread.join();
        }
    }
}

fn watch(group: &Group, pidfds: &[OwnedFd], stop: &OwnedFd) {
    let mut alive: Vec<(usize, &OwnedFd)> =
        group.members().iter().enumerate().map(|(seat, &member)| (seat, &pidfds[member as usize])).collect();
    loop {
        let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(stop, PollFlags::IN)];
        polled.extend(alive.iter().map(|(_, pidfd)| PollFd::new(*pidfd, PollFlags::IN)));
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            // The kernel is out of memory; it may recover.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
        let (stopped, processes) = polled.split_first().expect("the first is the one to stop by");
        if !stopped.revents().is_empty() {
            return;
        }
        let has_died: Vec<bool> = processes.iter().map(|process| !process.revents().is_empty()).collect();
        drop(polled);
        let mut has_died = has_died.into_iter();
        alive.retain(|(seat, _)| {
            let died = has_died.next() == Some(true);
            if died {
                tracing::debug!(seat, "the process of a rank has ended");
                group.announce(*seat, Absence::Died);
            }
            !died
        });
    }
}
