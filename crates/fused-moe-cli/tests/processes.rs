//! Ranks that are processes: the same file as threads write, one report, and nothing left behind when one is killed.

#![cfg(target_os = "linux")]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{COMMS, Copied, Run, Tensor, fmoe, listing};
use rstest::rstest;

/// Any golden case does here.
const CASE: &str = "qwen3_moe_norm";

/// How long a run whose rank was killed may take.
const SOON: Duration = Duration::from_secs(20);

fn program() -> &'static str {
    env!("CARGO_BIN_EXE_fmoe")
}

/// The processes that `parent` has started.
fn children_of(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state is the first field behind the name in brackets.
    stat.rsplit(") ").next().is_some_and(|state| !state.is_empty() && !state.starts_with('Z'))
}

/// Waits until `what` holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < SOON, "not in {SOON:?}: {what}");
        std::thread::yield_now();
    }
}

fn signal(signal: &str, pid: u32) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

fn started(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[rstest]
#[case::shared_experts("deepseek_v3_fp8_block")]
#[case::no_shared_experts(CASE)]
fn processes_write_what_threads_write(#[case] case: &str) {
    let folder = tempfile::tempdir().unwrap();
    for (comm, size) in
        COMMS.into_iter().flat_map(|comm| [(comm, "1"), (comm, "3"), (comm, "8 --gpus-per-node 4")])
    {
        let files = ["threads", "processes"].map(|ranks| {
            let output = folder.path().join(ranks);
            let options = format!("--all2all {comm} --ep-size {size} --ranks {ranks} --json");
            let run = Run { output: output.clone(), ..Run::golden(case, Path::new("unset")).with(&options) };
            let finished = run.run().succeeded();
            let wire = finished.json()["wire"].clone();
            (std::fs::read(output).unwrap(), wire)
        });
        assert!(files[0].0 == files[1].0, "{comm}, {size}");
        assert_eq!(files[0].1, files[1].1, "{comm}, {size}");
        assert_eq!(listing(folder.path()), ["processes", "threads"]);
    }
}

#[test]
fn fewer_tokens_than_ranks_leave_idle_processes() {
    let copy = Copied::of(CASE);
    for tokens in [3, 0] {
        copy.edit_hidden(|x| {
            let hidden = x.shape[1];
            let values: Vec<f32> = x.values().into_iter().cycle().take(tokens * hidden).collect();
            *x = Tensor::bf16(&[tokens, hidden], values);
        });
        copy.run().with("--ep-size 5 --ranks processes --verify").run().succeeded();
    }
}

#[test]
fn a_bad_weight_is_refused_once() {
    let copy = Copied::of(CASE);
    copy.edit_tensors(|tensors| {
        let name = tensors.keys().find(|name| name.contains("experts.5.down_proj")).unwrap().clone();
        tensors.get_mut(&name).unwrap().shape.reverse();
    });
    let run = copy.run().with("--ep-size 4 --ranks processes");
    let finished = run.run().failed(2, &["experts.5"]);
    assert_eq!(finished.stderr.matches("fmoe:").count(), 1, "{finished:?}");
    run.refused(2, &["experts.5"]);
}

#[test]
fn weights_that_are_not_finite_fail_once() {
    let copy = Copied::of(CASE);
    copy.edit_tensors(|tensors| {
        let name = tensors.keys().find(|name| name.contains("experts.5.down_proj")).unwrap().clone();
        tensors.get_mut(&name).unwrap().bytes.fill(0xff);
    });
    let run = copy.run().with("--ep-size 4 --ranks processes");
    let finished = run.run().failed(1, &["token", "NaN"]);
    assert_eq!(finished.stderr.matches("fmoe:").count(), 1, "{finished:?}");
    run.refused(1, &["token", "NaN"]);
}

/// Kills a rank at some time of the run: before it has joined, while it loads, in a phase.
#[test]
fn a_killed_rank_is_named_and_nothing_is_left() {
    let copy = Copied::of(CASE);
    copy.edit_hidden(|x| {
        let (hidden, tokens) = (x.shape[1], 60_000);
        let values: Vec<f32> = x.values().into_iter().cycle().take(tokens * hidden).collect();
        *x = Tensor::bf16(&[tokens, hidden], values);
    });
    let mut failed = 0;
    for wait_ms in [0, 30, 60, 120, 240] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out.safetensors");
        let mut command = Command::new(program());
        command.args(["run", "--ep-size", "4", "--ranks", "processes"]);
        command.arg("--checkpoint").arg(&copy.run().checkpoint).arg("--input").arg(&copy.run().input);
        command.arg("--output").arg(&output).args(&copy.run().options).env_remove("RUST_LOG");
        let run = started(&mut command);
        let mut ranks = Vec::new();
        until("three ranks are started", || {
            ranks = children_of(run.id());
            ranks.len() == 3
        });
        let killing = Instant::now() + Duration::from_millis(wait_ms);
        until("it is time", || Instant::now() >= killing);
        // It is gone if the run is over already.
        let _ = Command::new("kill").args(["-KILL", &ranks[1].to_string()]).stderr(Stdio::null()).status();
        let start = Instant::now();
        let ended = run.wait_with_output().unwrap();
        assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
        until("all ranks have ended", || !ranks.iter().any(|&rank| is_running(rank)));
        let stderr = String::from_utf8_lossy(&ended.stderr);
        if ended.status.success() {
            continue;
        }
        failed += 1;
        assert_eq!(ended.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("rank 2"), "{stderr}");
        assert_eq!(listing(folder.path()), Vec::<String>::new(), "{stderr}");
    }
    assert!(failed > 0, "no rank was killed in time");
}

#[rstest]
#[case::by_force("-KILL")]
#[case::from_the_keyboard("-INT")]
#[case::politely("-TERM")]
fn ranks_end_with_their_launcher(#[case] how: &str) {
    let mut launch = started(Command::new(program()).args(["launch", "-n", "3", "--", "sleep", "60"]));
    let mut ranks = Vec::new();
    until("three ranks run their program", || {
        ranks = children_of(launch.id());
        let runs = |rank: &u32| {
            std::fs::read_to_string(format!("/proc/{rank}/comm")).is_ok_and(|name| name == "sleep\n")
        };
        ranks.len() == 3 && ranks.iter().all(runs)
    });
    signal(how, launch.id());
    assert!(!launch.wait().unwrap().success());
    until("all ranks have ended", || !ranks.iter().any(|&rank| is_running(rank)));
}

#[test]
fn a_rank_that_fails_ends_the_others_and_what_they_started() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().to_str().unwrap();
    // Ranks 0 and 2 wait for something that they have started; the shell is a process of its own.
    let script = "if [ $FMOE_RANK = 1 ]; then
            while [ $(ls $1 | wc -l) -lt 2 ]; do sleep 0.01; done
            kill -9 $$
        fi
        sleep 60 & echo $! > $1/.$FMOE_RANK; mv $1/.$FMOE_RANK $1/$FMOE_RANK; wait; exit 0";
    let start = Instant::now();
    fmoe(["launch", "-n", "3", "--grace-s", "0", "--", "sh", "-c", script, "sh", pids])
        .failed(1, &["rank 1", "signal: 9"]);
    assert!(start.elapsed() < SOON);
    for rank in ["0", "2"] {
        let pid = std::fs::read_to_string(folder.path().join(rank)).unwrap().trim().parse().unwrap();
        until("what a rank started has ended", || !is_running(pid));
    }
}

#[test]
fn survivors_of_a_launch_name_the_lost_rank() {
    // Rank 1 never joins; the run of the others ends when the launcher's grace does, or before.
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.safetensors");
    let copy = Copied::of(CASE);
    let script = "if [ $FMOE_RANK = 1 ]; then exit 7; fi; exec \"$@\"";
    let mut args =
        vec!["launch", "-n", "2", "--grace-s", "1", "--", "sh", "-c", script, "sh", program(), "run"];
    let (run, ranks) = (copy.run(), ["--ep-size", "2", "--ranks", "processes"]);
    args.extend(ranks);
    let paths = [("--checkpoint", &run.checkpoint), ("--input", &run.input), ("--output", &output)];
    args.extend(paths.iter().flat_map(|(option, path)| [*option, path.to_str().unwrap()]));
    args.extend(run.options.iter().map(String::as_str));
    fmoe(args).failed(1, &["rank 1"]);
    assert_eq!(listing(folder.path()), Vec::<String>::new());
}

#[test]
fn a_launched_run_is_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let outputs = ["alone", "launched"].map(|how| {
        let run = Run { output: folder.path().join(how), ..Run::golden(CASE, Path::new("unset")) };
        let mut args: Vec<String> = match how {
            "alone" => vec![],
            _ => ["launch", "-n", "4", "--", program()].map(str::to_string).into(),
        };
        args.extend(["run", "--ep-size", "4", "--ranks", "processes", "--json"].map(str::to_string));
        let paths = [("--checkpoint", &run.checkpoint), ("--input", &run.input), ("--output", &run.output)];
        args.extend(
            paths.iter().flat_map(|(option, path)| [option.to_string(), path.to_str().unwrap().into()]),
        );
        args.extend(run.options);
        fmoe(args).succeeded().json();
        std::fs::read(run.output).unwrap()
    });
    assert!(outputs[0] == outputs[1]);
}

#[rstest]
#[case::another_size("-n 3", &["--ep-size 4", "3 ranks"])]
#[case::another_node("-n 4 --gpus-per-node 2", &["--gpus-per-node 4", "2 per node"])]
fn a_run_in_a_group_of_another_shape_is_refused(#[case] shape: &str, #[case] words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let run = Run { output: folder.path().join("out"), ..Run::golden(CASE, Path::new("unset")) };
    let mut args: Vec<String> = vec!["launch".into()];
    args.extend(shape.split(' ').map(str::to_string));
    args.extend(["--", program(), "run", "--ep-size", "4", "--ranks", "processes"].map(str::to_string));
    let paths = [("--checkpoint", &run.checkpoint), ("--input", &run.input), ("--output", &run.output)];
    args.extend(paths.iter().flat_map(|(option, path)| [option.to_string(), path.to_str().unwrap().into()]));
    args.extend(run.options);
    fmoe(args).failed(1, words);
    assert_eq!(listing(folder.path()), Vec::<String>::new());
}

#[rstest]
#[case::no_ranks(&["-n", "0", "--", "true"], 2, "--ranks")]
#[case::no_program(&["-n", "2"], 2, "CMD")]
#[case::nodes_that_do_not_divide(&["-n", "4", "--gpus-per-node", "3", "--", "true"], 2, "--gpus-per-node 3")]
#[case::unknown_program(&["-n", "2", "--", "/nowhere/program"], 1, "/nowhere/program")]
#[case::success(&["-n", "3", "--", "true"], 0, "")]
fn launch_ends_as_it_should(#[case] args: &[&str], #[case] code: i32, #[case] word: &str) {
    fmoe([&["launch"], args].concat()).failed(code, &[word]);
}

#[test]
fn ranks_are_told_who_they_are() {
    let script = "echo $FMOE_RANK/$FMOE_WORLD_SIZE/$FMOE_RANKS_PER_NODE";
    let finished = fmoe(["launch", "-n", "4", "--gpus-per-node", "2", "--", "sh", "-c", script]).succeeded();
    let mut lines: Vec<&str> = finished.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["0/4/2", "1/4/2", "2/4/2", "3/4/2"]);
}
