//! `fmoe launch`: a program once per rank, each told where to meet the others.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use fused_moe::Rank;
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, set_child_subreaper,
    set_parent_process_death_signal, waitpid,
};

use crate::args::{LaunchArgs, LaunchRankArgs};
use crate::exit::{Failure, OrFailure, refused};
use crate::processes::{Children, Group};

/// Runs the command.
pub fn run(args: &LaunchArgs) -> Result<(), Failure> {
    let world_size = args.ranks.get();
    let per_node = args.gpus_per_node.unwrap_or(args.ranks).get();
    if !world_size.is_multiple_of(per_node) {
        return refused(format!("--gpus-per-node {per_node} does not divide -n {world_size}"));
    }
    let timeout = Duration::from_secs(args.timeout_s.get());
    let group = Group { world_size, ranks_per_node: args.gpus_per_node, timeout };
    // What a rank has started and does not outlive comes to this process.
    set_child_subreaper(Some(getpid())).or_failed()?;
    let options = group.meet().or_failed()?;
    let mut children = Children::default();
    for rank in (0..world_size as u32).map(Rank) {
        children.start(&args.command, &options(rank), Stdio::inherit()).or_failed()?;
    }
    let Err(first) = children.wait(None) else { return Ok(()) };
    tracing::warn!(%first, "waiting for the other ranks");
    // The others find it gone and have something to say; what they cannot say in time is not waited for.
    let limit = Instant::now() + Duration::from_secs(args.grace_s);
    while children.wait(Some(limit)).is_err() {}
    drop(children);
    kill_orphans();
    Err(Failure::Failed(anyhow!("{first}")))
}

/// Kills what ranks have left behind.
fn kill_orphans() {
    loop {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let children = tasks.flat_map(|task| std::fs::read_to_string(task.path().join("children")));
        let children: Vec<Pid> = children
            .flat_map(|children| children.split_whitespace().map(str::parse).collect::<Vec<_>>())
            .filter_map(|pid| Pid::from_raw(pid.ok()?))
            .collect();
        if children.is_empty() {
            return;
        }
        for child in children {
            // Both fail if it has ended. Its own children come to this process then, and are next.
            let _ = kill_process(child, Signal::KILL);
            let _ = waitpid(Some(child), WaitOptions::empty());
        }
    }
}

/// Becomes the program of a rank, which ends with the process that launched it.
pub fn become_rank(args: &LaunchRankArgs) -> Result<(), Failure> {
    let become_it = || -> anyhow::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL)).context("cannot be tied to the launcher")?;
        // It may have ended before.
        if getppid().map(|parent| parent.as_raw_nonzero().get() as u32) != Some(args.launcher) {
            bail!("the launcher has ended");
        }
        let [program, rest @ ..] = args.command.as_slice() else { bail!("no program to run") };
        let error = Command::new(program).args(rest).exec();
        Err(error).with_context(|| format!("cannot run {}", program.display()))
    };
    become_it().or_refused()
}
