//! The task list of a call: group × span of panels × chunk of rows.
//!
//! The list is never stored. Workers take ascending numbers from one counter, and each walks the
//! groups alongside. Chunks of rows of one span follow each other, so that the weights of the span
//! are read from the shared cache after the first.

use std::ops::Range;

use crate::kernel::TILE_ROWS;
use crate::{Group, Tuning};

/// Most rows of a task.
pub(crate) const CHUNK_ROWS: usize = 96;
/// Panels whose sums a worker holds at once. Their results are a multiple of 128 columns, plain or
/// joined.
pub(crate) const SUM_PANELS: usize = 4;

/// One expert's rows times a run of its panels.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub(crate) group: usize,
    /// Sorted rows, at most as many as the tuning says.
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
}

/// How the work is cut. Results do not depend on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// Most rows of a task.
    chunk_rows: usize,
    panels: usize,
    /// Panels of a task, a multiple of [`SUM_PANELS`].
    span: usize,
}

impl Cut {
    pub(crate) fn new(
        tuning: &Tuning,
        groups: &[Group],
        panels: usize,
        panel_bytes: usize,
        workers: usize,
    ) -> Self {
        let mut cut = Cut { chunk_rows: tuning.chunk_rows, panels, span: SUM_PANELS };
        let finest = cut.count(groups);
        let by_count = finest / (tuning.tasks_per_thread * workers);
        let by_bytes = tuning.span_bytes / (SUM_PANELS * panel_bytes).max(1);
        let longest =
            if groups.iter().any(|group| cut.row_chunks(&group.rows) > 1) { by_bytes } else { usize::MAX };
        let span = by_count.min(longest).clamp(1, panels.div_ceil(SUM_PANELS).max(1));
        cut.span = span * SUM_PANELS;
        cut
    }

    fn row_chunks(&self, rows: &Range<usize>) -> usize {
        rows.len().div_ceil(self.chunk_rows)
    }

    fn spans(&self) -> usize {
        self.panels.div_ceil(self.span)
    }

    /// Number of tasks of all groups.
    pub(crate) fn count(&self, groups: &[Group]) -> usize {
        groups.iter().map(|group| self.row_chunks(&group.rows) * self.spans()).sum()
    }
}

/// A worker's position in the task list.
pub(crate) struct Cursor<'a> {
    cut: Cut,
    groups: &'a [Group],
    group: usize,
    /// Number of the first task of `group`.
    first: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(cut: Cut, groups: &'a [Group]) -> Self {
        Cursor { cut, groups, group: 0, first: 0 }
    }

    /// The task of that number, or `None` past the end. Numbers must ascend.
    pub(crate) fn seek(&mut self, number: usize) -> Option<Task> {
        loop {
            let rows = &self.groups.get(self.group)?.rows;
            let chunks = self.cut.row_chunks(rows);
            let at = number - self.first;
            if at < chunks * self.cut.spans() {
                let span = at / chunks * self.cut.span;
                let size = rows.len().div_ceil(chunks).next_multiple_of(TILE_ROWS);
                let start = rows.start + at % chunks * size;
                return Some(Task {
                    group: self.group,
                    rows: start.min(rows.end)..(start + size).min(rows.end),
                    panels: span..(span + self.cut.span).min(self.cut.panels),
                });
            }
            self.first += chunks * self.cut.spans();
            self.group += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_cover_every_row_and_panel_once() {
        let sizes = [0, 1, 95, 0, 96, 97, 193, 1000, 0];
        let groups: Vec<_> = sizes
            .iter()
            .scan(3, |start, &len| {
                let rows = *start..*start + len;
                *start = rows.end + 2;
                Some(Group { rows, expert: 0 })
            })
            .collect();
        let rows = groups.last().unwrap().rows.end;
        for panels in [1, 4, 5, 24, 33] {
            for (workers, chunk_rows) in [(1, 96), (2, 96), (64, 96), (2, 48), (1, 6)] {
                let tuning = Tuning { chunk_rows, ..Tuning::HEURISTIC };
                let cut = Cut::new(&tuning, &groups, panels, 64 * 2048 * 2, workers);
                let mut seen = vec![0; rows * panels];
                let mut cursor = Cursor::new(cut, &groups);
                let tasks: Vec<_> = (0..).map_while(|number| cursor.seek(number)).collect();
                assert_eq!(tasks.len(), cut.count(&groups));
                for task in tasks {
                    assert!(task.rows.len() <= chunk_rows);
                    assert!(task.panels.start.is_multiple_of(SUM_PANELS));
                    for row in task.rows {
                        assert!(groups[task.group].rows.contains(&row));
                        for panel in task.panels.clone() {
                            seen[row * panels + panel] += 1;
                        }
                    }
                }
                let wanted: usize = sizes.iter().sum::<usize>() * panels;
                assert_eq!(seen.iter().sum::<usize>(), wanted, "{cut:?}");
                assert!(seen.iter().all(|&times| times <= 1), "{cut:?}");
            }
        }
    }
}
