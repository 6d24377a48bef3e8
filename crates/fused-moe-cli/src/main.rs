//! `fmoe`: run, plan, verify and measure expert-parallel MoE layers.

#![deny(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

use crate::args::{BenchCommand, Cli, Command};

mod args;
mod bench;
#[cfg(target_os = "linux")]
mod chaos;
mod demo;
mod doctor;
mod ep;
mod eplb;
mod exit;
mod geometry;
mod lane;
#[cfg(target_os = "linux")]
mod launcher;
mod layer;
mod matrix;
#[cfg(feature = "mpi")]
mod mpi;
mod part;
mod plan;
#[cfg(target_os = "linux")]
mod processes;
mod projection;
mod published;
mod report;
mod run;
mod spmd;
mod synthetic;
mod tokens;
mod tune;
mod verify;
mod weights;

fn main() -> ExitCode {
    // Usage errors exit with 2 inside `parse`.
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    let done = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Demo(args) => demo::run(args),
        #[cfg(target_os = "linux")]
        Command::Launch(args) => launcher::run(args),
        #[cfg(target_os = "linux")]
        Command::LaunchRank(args) => launcher::become_rank(args),
        Command::Plan(args) => plan::run(args),
        Command::Doctor(args) => doctor::run(*args),
        Command::Matrix(args) => matrix::run(*args),
        Command::Eplb(args) => eplb::run(args),
        Command::Tune(args) => tune::run(args),
        #[cfg(target_os = "linux")]
        Command::Chaos(args) => chaos::run(args),
        #[cfg(target_os = "linux")]
        Command::ChaosRank(args) => chaos::rank::run(args),
        Command::Bench(BenchCommand::Comm(args)) => bench::comm::run(args),
        Command::Bench(BenchCommand::Experts(args)) => bench::experts::run(args),
        Command::Bench(BenchCommand::Quant(args)) => bench::quant::run(args),
        Command::Bench(BenchCommand::Router(args)) => bench::router::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
