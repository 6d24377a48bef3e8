//! The report as tables and as CSV.

use std::fmt::Write;

use super::{Report, Row};
use crate::report::print;

/// One line per row, with a header.
pub fn csv(rows: &[Row]) -> String {
    let mut text = String::from(
        "substrate,ep_size,ranks_per_node,all2all,wire,routing,tokens_per_rank,dispatch_us,combine_us,round_us,\
         round_us_min,round_us_max,dispatch_remote_bytes,combine_remote_bytes,dispatch_internode_bytes,\
         combine_internode_bytes,dispatch_local_bytes,combine_local_bytes,dispatch_algorithm_gb_s,\
         dispatch_physical_gb_s,combine_algorithm_gb_s,\
         combine_physical_gb_s,copy_gb_s\n",
    );
    for row in rows {
        let [min, max] = row.round_us_spread;
        let (dispatch, combine) = (&row.dispatch, &row.combine);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{},{},{},{},{},{},{},{:.3},{:.3},{:.3},{min:.3},{max:.3},{},{},{},{},{},{},{:.3},{:.3},{:.3},{:.3},{:.3}",
            row.substrate.name(),
            row.ep_size,
            row.ranks_per_node,
            row.all2all,
            row.wire,
            row.routing,
            row.tokens_per_rank,
            dispatch.us,
            combine.us,
            row.round_us,
            dispatch.remote_bytes,
            combine.remote_bytes,
            dispatch.internode_bytes,
            combine.internode_bytes,
            dispatch.local_bytes,
            combine.local_bytes,
            dispatch.algorithm_gb_s,
            dispatch.physical_gb_s,
            combine.algorithm_gb_s,
            combine.physical_gb_s,
            row.copy_gb_s
        );
    }
    text
}

/// Everything, for a person.
pub fn print_all(report: &Report) -> anyhow::Result<()> {
    let [hot, beyond, streamed] =
        [report.copy.hot_gb_s, report.copy.beyond_caches_gb_s, report.copy.beyond_caches_streamed_gb_s]
            .map(|[before, after]| format!("{before:.1} and {after:.1}"));
    print(format_args!(
        "hidden {}, top-{} of {} experts; {} cores\ncopies, GB/s before and after: {hot} in the caches, {beyond} beyond, \
         {streamed} beyond with non-temporal stores",
        report.layer.hidden, report.layer.top_k, report.layer.experts, report.cores
    ))?;
    let mut table = table(&[
        "ranks",
        "EP",
        "all2all",
        "wire",
        "routing",
        "tokens",
        "dispatch us",
        "combine us",
        "round us",
        "min to max",
        "dispatch GB/s algo, phys",
        "combine GB/s algo, phys",
        "of copy",
    ]);
    for row in &report.rows {
        let [min, max] = row.round_us_spread;
        table.add_row([
            row.substrate.name().to_string(),
            row.ep_size.to_string(),
            row.all2all.to_string(),
            row.wire.clone(),
            row.routing.to_string(),
            row.tokens_per_rank.to_string(),
            format!("{:.1}", row.dispatch.us),
            format!("{:.1}", row.combine.us),
            format!("{:.1}", row.round_us),
            format!("{min:.1} to {max:.1}"),
            format!("{:.1}, {:.1}", row.dispatch.algorithm_gb_s, row.dispatch.physical_gb_s),
            format!("{:.1}, {:.1}", row.combine.algorithm_gb_s, row.combine.physical_gb_s),
            format!("{:.2}", row.dispatch_of_copy),
        ]);
    }
    print(table)?;
    if !report.ratios.is_empty() {
        let mut table = self::table(&[
            "ranks",
            "EP",
            "wire",
            "routing",
            "tokens",
            "all2all",
            "against",
            "fewer bytes",
            "less time",
        ]);
        for ratio in &report.ratios {
            table.add_row([
                ratio.substrate.name().to_string(),
                ratio.ep_size.to_string(),
                ratio.wire.clone(),
                ratio.routing.to_string(),
                ratio.tokens_per_rank.to_string(),
                ratio.all2all.to_string(),
                ratio.against.to_string(),
                format!("{:.2} x", ratio.fewer_bytes),
                format!("{:.2} x", ratio.less_time),
            ]);
        }
        print(table)?;
    }
    for crowded in &report.crowding {
        print(format_args!(
            "{} {} take {:.2} x the time of {} for the same {} tokens: {}, {}, {}",
            crowded.ep_size,
            crowded.substrate.name(),
            crowded.times_the_time,
            crowded.against_ep_size,
            crowded.tokens,
            crowded.all2all,
            crowded.wire,
            crowded.routing
        ))?;
    }
    for refused in &report.refused {
        print(refused)?;
    }
    Ok(())
}

fn table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}
