//! All-pairs covering: few rows in which every two values of two factors meet.

use rand::Rng;

use crate::seed::Seed;

/// Rows of level indices, one per factor, such that every pair of levels of every two factors is in some row.
///
/// Greedy: each row starts with a pair that is not covered and fills the other factors with what covers most.
pub(crate) fn covering(levels: &[usize], seed: Seed) -> Vec<Vec<usize>> {
    let mut rng = seed.rng();
    let mut open: Vec<[(usize, usize); 2]> = Vec::new();
    for a in 0..levels.len() {
        for b in a + 1..levels.len() {
            for x in 0..levels[a] {
                open.extend((0..levels[b]).map(|y| [(a, x), (b, y)]));
            }
        }
    }
    let mut rows = Vec::new();
    while !open.is_empty() {
        let start = open[rng.random_range(0..open.len())];
        let mut row: Vec<Option<usize>> = vec![None; levels.len()];
        for (factor, level) in start {
            row[factor] = Some(level);
        }
        for factor in 0..levels.len() {
            if row[factor].is_some() {
                continue;
            }
            let offset = rng.random_range(0..levels[factor]);
            let candidates = (0..levels[factor]).map(|level| (level + offset) % levels[factor]);
            let gain = |level: usize| {
                let newly = |pair: &&[(usize, usize); 2]| {
                    let holds = |&(f, l): &(usize, usize)| row[f] == Some(l) || (f, l) == (factor, level);
                    pair.contains(&(factor, level)) && pair.iter().all(holds)
                };
                open.iter().filter(newly).count()
            };
            row[factor] = candidates.max_by_key(|&level| gain(level));
        }
        let row: Vec<usize> = row.into_iter().flatten().collect();
        open.retain(|pair| !pair.iter().all(|&(factor, level)| row[factor] == level));
        rows.push(row);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_covered_in_few_rows() {
        let levels = [6, 3, 6, 4, 2];
        let rows = covering(&levels, Seed::fresh());
        assert!(rows.len() < 60, "{} rows", rows.len());
        for a in 0..levels.len() {
            for b in a + 1..levels.len() {
                for (x, y) in (0..levels[a]).flat_map(|x| (0..levels[b]).map(move |y| (x, y))) {
                    assert!(rows.iter().any(|row| row[a] == x && row[b] == y), "{a}={x} {b}={y}");
                }
            }
        }
    }
}
