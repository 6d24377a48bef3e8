//! A group of threads that can only compare notes.

use std::any::Any;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use fused_moe_core::{Error, ErrorKind, ProcessGroup, Rank, Result, Stage};

struct Board {
    notes: Mutex<Vec<Option<Vec<u8>>>>,
    complete: Condvar,
}

/// One rank of the group; its notes can be gathered once.
pub struct Member {
    rank: usize,
    world: usize,
    board: Arc<Board>,
}

impl ProcessGroup for Member {
    fn rank(&self) -> Rank {
        Rank(self.rank as u32)
    }

    fn world_size(&self) -> usize {
        self.world
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut notes = self.board.notes.lock().unwrap();
        assert!(notes[self.rank].replace(mine.to_vec()).is_none(), "one collective per group");
        self.board.complete.notify_all();
        let missing = |notes: &mut Vec<Option<Vec<u8>>>| notes.iter().any(Option::is_none);
        let (notes, _) =
            self.board.complete.wait_timeout_while(notes, Duration::from_secs(20), missing).unwrap();
        match notes.iter().position(Option::is_none) {
            None => Ok(notes.iter().flatten().cloned().collect()),
            Some(rank) => {
                let kind = ErrorKind::PeerLost { rank: Rank(rank as u32), round: 0 };
                Err(Error::new(kind, Stage::QuantizeDispatch, "threads"))
            }
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Runs `body` on every rank of a group of `world` threads.
pub fn run<T: Send>(world: usize, body: impl Fn(&Member) -> T + Sync) -> Vec<T> {
    let board = Arc::new(Board { notes: Mutex::new(vec![None; world]), complete: Condvar::new() });
    std::thread::scope(|scope| {
        let spawn = |rank| {
            let member = Member { rank, world, board: board.clone() };
            let body = &body;
            scope.spawn(move || body(&member))
        };
        let threads: Vec<_> = (0..world).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
