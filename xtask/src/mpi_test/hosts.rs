//! Two hosts made of network namespaces of this machine, joined by a virtual cable.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::repo::Repo;
use crate::sanitizer::Missing;

/// Namespace and host name, end of the cable, address.
const HOSTS: [(&str, &str, &str); 2] =
    [("fmoe-a", "fmoe-va", "10.77.0.1"), ("fmoe-b", "fmoe-vb", "10.77.0.2")];

const NETWORK: &str = "10.77.0.0/24";

/// Starts a command on a host: what `ssh` is to `mpirun` elsewhere.
const AGENT: &str = r#"#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
case $1 in
10.77.0.1) host=fmoe-a ;;
10.77.0.2) host=fmoe-b ;;
*) echo "no host $1" >&2; exit 1 ;;
esac
shift
exec ip netns exec "$host" unshare --uts --ipc bash -c "hostname $host; $*"
"#;

/// The hosts. They are gone when this is dropped.
pub struct TwoHosts {
    agent: PathBuf,
}

impl TwoHosts {
    /// Makes them; needs the rights of root.
    pub fn make(repo: &Repo) -> Result<Self> {
        let dir = repo.root().join("target/mpi-test");
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let agent = dir.join("agent.sh");
        std::fs::write(&agent, AGENT).with_context(|| format!("writing {}", agent.display()))?;
        std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755))?;
        // What an earlier run left behind because it was killed.
        remove();
        let hosts = Self { agent };
        let [(a, end_a, _), (b, end_b, _)] = HOSTS;
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        ip(&["link", "add", end_a, "type", "veth", "peer", "name", end_b])?;
        for (host, end, address) in HOSTS {
            ip(&["link", "set", end, "netns", host])?;
            ip(&["-n", host, "addr", "add", &format!("{address}/24"), "dev", end])?;
            ip(&["-n", host, "link", "set", "lo", "up"])?;
            ip(&["-n", host, "link", "set", end, "up"])?;
        }
        Ok(hosts)
    }

    /// What tells `mpirun` to spread `ranks` ranks over the hosts.
    pub fn options(&self, ranks: usize) -> Vec<String> {
        let [(_, _, a), (_, _, b)] = HOSTS;
        let slots = ranks.div_ceil(2);
        let hosts = format!("{a}:{slots},{b}:{slots}");
        let agent = self.agent.display().to_string();
        let mut options = vec!["--host".to_owned(), hosts, "--map-by".to_owned(), "node".to_owned()];
        for (name, value) in [
            ("plm_rsh_agent", agent.as_str()),
            ("oob_tcp_if_include", NETWORK),
            ("btl_tcp_if_include", NETWORK),
        ] {
            options.extend(["--mca", name, value].map(String::from));
        }
        options
    }

    /// A command that runs `line` on the first host.
    pub fn on_first(&self, line: &[String]) -> Command {
        let (host, _, _) = HOSTS[0];
        let mut command = Command::new("ip");
        // `mpirun` tells hosts apart by their names.
        command.args(["netns", "exec", host, "unshare", "--uts", "bash", "-c"]);
        command.arg(r#"hostname "$0"; exec "$@""#).arg(host).args(line);
        command
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        remove();
    }
}

/// Takes the hosts down; the cable goes with them.
fn remove() {
    for (host, _, _) in HOSTS {
        // There may be none.
        let _ = Command::new("ip").args(["netns", "del", host]).stderr(Stdio::null()).status();
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let missing = |why: String| {
        let command = arguments.join(" ");
        Missing::new(format!("two hosts need root and iproute2; `ip {command}`: {why}"))
    };
    let output = Command::new("ip").args(arguments).output().map_err(|error| missing(error.to_string()))?;
    if !output.status.success() {
        return Err(missing(String::from_utf8_lossy(&output.stderr).trim().to_owned()).into());
    }
    Ok(())
}
