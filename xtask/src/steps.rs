//! Named, timed steps that stop at the first failure.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

/// Runs steps in order and remembers how long each took.
pub struct Steps {
    task: &'static str,
    done: Vec<(String, Duration)>,
}

impl Steps {
    /// Steps of `task`, which is named in the last line.
    pub fn new(task: &'static str) -> Self {
        Self { task, done: Vec::new() }
    }

    /// Runs a program as one step.
    pub fn command(&mut self, name: impl Into<String>, command: &mut Command) -> Result<()> {
        self.step(name, || {
            let status = command.status().with_context(|| format!("starting {command:?}"))?;
            ensure!(status.success(), "{command:?} ended with {status}");
            Ok(())
        })
    }

    /// Runs a function as one step.
    pub fn step(&mut self, name: impl Into<String>, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let name = name.into();
        eprintln!("==> {name}");
        let start = Instant::now();
        let outcome = run();
        let took = start.elapsed();
        self.done.push((name.clone(), took));
        outcome.map_err(|error| {
            let (task, seconds) = (self.task, took.as_secs_f64());
            anyhow!("{error:#}\n{task} FAILED in step {name} after {seconds:.1} s")
        })
    }

    /// Prints the time of each step, and the sum as the last line.
    pub fn finish(self) {
        for (name, took) in &self.done {
            eprintln!("{name:>16} {:7.1} s", took.as_secs_f64());
        }
        let total: Duration = self.done.iter().map(|(_, took)| *took).sum();
        eprintln!("{} ok: {} steps in {:.1} s", self.task, self.done.len(), total.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_failing_step_is_named_in_the_last_line() {
        let mut steps = Steps::new("check");
        steps.step("first", || Ok(())).unwrap();
        let error = steps.step("second", || bail!("broken")).unwrap_err().to_string();
        assert!(error.starts_with("broken\n"), "{error}");
        assert!(error.lines().last().unwrap().starts_with("check FAILED in step second"), "{error}");
    }
}
