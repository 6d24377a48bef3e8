//! What compilers say about the registers and the memory of kernels.

use anyhow::{Context, Result};

/// Above the lines of [`Resources`].
pub const HEADER: &str = "arch     kernel                            registers  shared bytes  spilled bytes";

/// What a kernel uses.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub name: String,
    /// Vector registers of a lane, accumulation registers among them.
    pub registers: u64,
    /// Static shared memory of a block.
    pub shared_bytes: u64,
    /// Stack of a lane: what did not fit the registers.
    pub spilled_bytes: u64,
}

impl std::fmt::Display for Resources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, registers, shared_bytes, spilled_bytes } = self;
        write!(f, "{name:<33} {registers:>9} {shared_bytes:>13} {spilled_bytes:>14}")
    }
}

/// Of `ptxas -v`.
pub fn of_ptxas(said: &str) -> Result<Vec<Resources>> {
    let mut kernels: Vec<Resources> = Vec::new();
    for line in said.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(Resources { name, ..Resources::default() });
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            for what in [" bytes stack frame", " bytes spill stores", " bytes spill loads"] {
                kernel.spilled_bytes +=
                    before(line, what).with_context(|| format!("no{what} in {line:?}"))?;
            }
        }
        if line.contains("Used ") {
            kernel.registers =
                before(line, " registers").with_context(|| format!("no registers in {line:?}"))?;
            kernel.shared_bytes = before(line, " bytes smem").unwrap_or(0);
        }
    }
    Ok(kernels)
}

/// Of clang's `-Rpass-analysis=kernel-resource-usage`.
pub fn of_clang(said: &str) -> Result<Vec<Resources>> {
    let mut kernels: Vec<Resources> = Vec::new();
    for line in said.lines().filter(|line| line.contains("remark:")) {
        let (_, fact) = line.split_once("remark:").unwrap_or_default();
        let fact = fact.split(" [-R").next().unwrap_or_default();
        let Some((what, value)) = fact.trim().rsplit_once(": ") else { continue };
        if what == "Function Name" {
            kernels.push(Resources { name: value.to_owned(), ..Resources::default() });
            continue;
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        let number = || value.parse::<u64>().with_context(|| format!("no number in {line:?}"));
        match what {
            "VGPRs" | "AGPRs" => kernel.registers += number()?,
            "LDS Size [bytes/block]" => kernel.shared_bytes = number()?,
            // Registers of 4 bytes.
            "SGPRs Spill" | "VGPRs Spill" => kernel.spilled_bytes += 4 * number()?,
            "ScratchSize [bytes/lane]" => kernel.spilled_bytes += number()?,
            _ => {}
        }
    }
    Ok(kernels)
}

/// The number in front of `what`.
fn before(line: &str, what: &str) -> Option<u64> {
    line.split(what).next().filter(|rest| rest.len() < line.len())?.rsplit([' ', ',']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ptxas() {
        let said = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
ptxas info    : Compiling entry function 'two' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 1024 bytes smem";
        let kernel = |name: &str, registers, shared_bytes, spilled_bytes| Resources {
            name: name.to_owned(),
            registers,
            shared_bytes,
            spilled_bytes,
        };
        assert_eq!(of_ptxas(said).unwrap(), [kernel("one", 24, 0, 0), kernel("two", 168, 1024, 28)]);
    }

    #[test]
    fn clang() {
        let said = "k.hip:11:1: remark: Function Name: one [-Rpass-analysis=kernel-resource-usage]
k.hip:11:1: remark:     SGPRs: 22 [-Rpass-analysis=kernel-resource-usage]
k.hip:11:1: remark:     VGPRs: 21 [-Rpass-analysis=kernel-resource-usage]
k.hip:11:1: remark:     AGPRs: 3 [-Rpass-analysis=kernel-resource-usage]
k.hip:11:1: remark:     ScratchSize [bytes/lane]: 12 [-Rpass-analysis=kernel-resource-usage]
k.hip:11:1: remark:     Dynamic Stack: False [-Rpass-analysis=kernel-resource-usage]
k.hip:11:1: remark:     VGPRs Spill: 2 [-Rpass-analysis=kernel-resource-usage]
k.hip:11:1: remark:     LDS Size [bytes/block]: 512 [-Rpass-analysis=kernel-resource-usage]
";
        let [kernel] = of_clang(said).unwrap().try_into().unwrap();
        let Resources { name, registers, shared_bytes, spilled_bytes } = kernel;
        assert_eq!((name.as_str(), registers, shared_bytes, spilled_bytes), ("one", 24, 512, 20));
    }
}
