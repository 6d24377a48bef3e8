//! What a dispatch delivered, copied out of the backend's buffers, and whether it is what routing demands.

use std::collections::HashMap;

use fused_moe_core::{
    Arrived, DType, Dispatched, DispatchedMonolithic, ExpertPlacement, KernelKind, Plan, Rank, ReceivedRows,
    TensorView,
};

use crate::outcome::{Check, fail};
use crate::wire::WireRow;

/// A copy of the valid rows.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Arrivals {
    /// Of the standard format.
    Rows(Vec<WireRow>),
    /// Of the batched format, by local expert.
    OfExperts(Vec<Vec<WireRow>>),
}

fn floats(view: TensorView<'_>, row: usize) -> Check<Vec<u32>> {
    let row = view.row::<f32>(row).or_else(|e| fail(format!("received floats: {e}")))?;
    Ok(row.iter().map(|x| x.to_bits()).collect())
}

fn bytes(view: TensorView<'_>, row: usize) -> Check<Vec<u8>> {
    let row = view.row_bytes(row).or_else(|e| fail(format!("received rows: {e}")))?;
    Ok(row.to_vec())
}

fn check_view(what: &str, view: TensorView<'_>, dtype: DType, dims: &[usize]) -> Check {
    if view.dtype() == dtype && view.dims() == dims {
        return Ok(());
    }
    fail(format!("{what} is {:?} of {}, needs {dims:?} of {dtype}", view.dims(), view.dtype()))
}

/// Checks the tensors against the plan. `front` are the dimensions before the last.
fn check_payload(
    plan: &Plan,
    (hidden, scale): (TensorView<'_>, Option<TensorView<'_>>),
    front: &[usize],
) -> Check {
    let width = hidden.dims().last().copied().unwrap_or(0);
    let with = |last: usize| [front, &[last]].concat();
    check_view("payload", hidden, plan.wire().payload, &with(width))?;
    match (plan.wire().scale, scale) {
        (None, None) => Ok(()),
        (Some(layout), Some(scale)) => {
            check_view("scale", scale, layout.dtype, &with(plan.wire().scales_per_token(width)))
        }
        (layout, scale) => fail(format!(
            "the plan's scales are {layout:?}, what came is {:?}",
            scale.map(|s| s.dims().to_vec())
        )),
    }
}

fn count(rows: ReceivedRows<'_>, max_rows: usize) -> Check<usize> {
    let count = rows.on_host().or_else(|e| fail(format!("received-row count: {e}")))?;
    match count <= max_rows {
        true => Ok(count),
        false => fail(format!("{count} rows are valid of {max_rows}")),
    }
}

pub(super) fn standard(plan: &Plan, dispatched: &Dispatched<'_>) -> Check<Arrivals> {
    let Arrived::Standard { topk, rows } = dispatched.arrived else {
        return fail("the plan says standard format, what came is batched");
    };
    check_payload(plan, (dispatched.hidden, dispatched.scale), &[plan.max_rows()])?;
    let slots = topk.ids.dims().last().copied().unwrap_or(0);
    check_view("received ids", topk.ids, DType::I32, &[plan.max_rows(), slots])?;
    check_view("received weights", topk.weights, DType::F32, &[plan.max_rows(), slots])?;
    let row = |row| {
        Ok(WireRow {
            payload: bytes(dispatched.hidden, row)?,
            scales: dispatched.scale.map_or(Ok(Vec::new()), |scale| bytes(scale, row))?,
            ids: topk.ids.row::<i32>(row).or_else(|e| fail(format!("received ids: {e}")))?.to_vec(),
            weights: floats(topk.weights, row)?,
            logits: Vec::new(),
        })
    };
    Ok(Arrivals::Rows((0..count(rows, plan.max_rows())?).map(row).collect::<Check<_>>()?))
}

pub(super) fn monolithic(plan: &Plan, dispatched: &DispatchedMonolithic<'_>) -> Check<Arrivals> {
    check_payload(plan, (dispatched.hidden, dispatched.scale), &[plan.max_rows()])?;
    let experts = dispatched.logits.dims().last().copied().unwrap_or(0);
    check_view("received logits", dispatched.logits, DType::F32, &[plan.max_rows(), experts])?;
    let row = |row| {
        Ok(WireRow {
            payload: bytes(dispatched.hidden, row)?,
            scales: dispatched.scale.map_or(Ok(Vec::new()), |scale| bytes(scale, row))?,
            logits: floats(dispatched.logits, row)?,
            ..WireRow::default()
        })
    };
    let count = count(dispatched.rows, plan.max_rows())?;
    Ok(Arrivals::Rows((0..count).map(row).collect::<Check<_>>()?))
}

pub(super) fn batched(plan: &Plan, dispatched: &Dispatched<'_>) -> Check<Arrivals> {
    let Arrived::Batched { tokens } = dispatched.arrived else {
        return fail("the plan says batched format, what came is standard");
    };
    let counts = tokens.0.as_slice::<i32>().or_else(|e| fail(format!("tokens per expert: {e}")))?;
    check_payload(plan, (dispatched.hidden, dispatched.scale), &[counts.len(), plan.max_rows()])?;
    let flat = |view: TensorView<'_>| -> Check<Vec<u8>> {
        let bytes = match view.dtype() {
            DType::Bf16 => {
                view.as_slice::<half::bf16>().map(|s| s.iter().flat_map(|x| x.to_ne_bytes()).collect())
            }
            DType::F32 => view.as_slice::<f32>().map(|s| s.iter().flat_map(|x| x.to_ne_bytes()).collect()),
            _ => view.as_slice::<u8>().map(<[u8]>::to_vec),
        };
        bytes.or_else(|e| fail(format!("received rows: {e}")))
    };
    let payload = flat(dispatched.hidden)?;
    let scales = dispatched.scale.map_or(Ok(Vec::new()), flat)?;
    let all_rows = counts.len() * plan.max_rows();
    let (width, per_row) = (payload.len() / all_rows.max(1), scales.len() / all_rows.max(1));
    let mut experts = Vec::new();
    for (expert, &count) in counts.iter().enumerate() {
        if count < 0 || count as usize > plan.max_rows() {
            return fail(format!("{count} rows of expert {expert} are valid of {}", plan.max_rows()));
        }
        let row = |row: usize| {
            let at = expert * plan.max_rows() + row;
            WireRow {
                payload: payload[at * width..][..width].to_vec(),
                scales: scales[at * per_row..][..per_row].to_vec(),
                ..WireRow::default()
            }
        };
        experts.push((0..count as usize).map(row).collect());
    }
    Ok(Arrivals::OfExperts(experts))
}

/// Checks what `rank` received of the rows that all ranks sent: every row that it needs, once, whole, and
/// nothing that nobody sent.
pub(super) fn conserved(
    arrivals: &Arrivals,
    (sent, placement): (&[Vec<WireRow>], &ExpertPlacement),
    (rank, kind): (Rank, KernelKind),
) -> Check {
    match arrivals {
        Arrivals::Rows(rows) => {
            let sources = sent.iter().flatten();
            let needs = |row: &WireRow| {
                kind == KernelKind::Monolithic
                    || row.ids.iter().any(|&id| placement.rank_of_slot(id) == Some(rank))
            };
            matched(rows, sources.map(|row| (row.clone(), needs(row))).collect(), rank)
        }
        Arrivals::OfExperts(experts) => {
            let ids: Vec<_> = placement.experts_of(rank).collect();
            if ids.len() != experts.len() {
                return fail(format!("{rank} holds {} experts, {} came", ids.len(), experts.len()));
            }
            for (id, rows) in ids.iter().zip(experts) {
                let hits = sent.iter().flatten().filter(|row| row.ids.contains(&(id.0 as i32)));
                let bare = hits.map(|row| WireRow {
                    payload: row.payload.clone(),
                    scales: row.scales.clone(),
                    ..WireRow::default()
                });
                matched(rows, bare.map(|row| (row, true)).collect(), rank)
                    .map_err(|e| e.within(format!("expert {}", id.0)))?;
            }
            Ok(())
        }
    }
}

/// Matches received rows with sent ones; the flag says that a sent row must arrive.
fn matched(received: &[WireRow], sent: Vec<(WireRow, bool)>, rank: Rank) -> Check {
    let mut open: HashMap<&WireRow, (usize, bool)> = HashMap::new();
    for (row, needed) in &sent {
        let entry = open.entry(row).or_insert((0, *needed));
        entry.0 += 1;
    }
    for (index, row) in received.iter().enumerate() {
        match open.get_mut(row) {
            Some((left, _)) if *left > 0 => *left -= 1,
            Some(_) => return fail(format!("row {index} on {rank} arrived more often than it was sent")),
            None => {
                let nearest = sent.iter().map(|(sent, _)| row.difference(sent));
                let nearest = nearest.min_by_key(String::len).unwrap_or_else(|| "nothing was sent".into());
                return fail(format!(
                    "row {index} on {rank} is no row that was sent; the nearest: {nearest}"
                ));
            }
        }
    }
    let missing = open.values().filter(|(_, needed)| *needed).map(|(left, _)| left).sum::<usize>();
    match missing {
        0 => Ok(()),
        _ => fail(format!("{missing} rows that {rank} needs did not arrive, {} did", received.len())),
    }
}
