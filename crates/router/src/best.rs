//! The best few of a stream of scores, in the lent output itself.

/// The best scores seen so far with their ids, best first.
///
/// Ids must be offered in ascending order: of two equal scores the one offered first stays ahead, which makes
/// ties go to the lower id.
pub(crate) struct Best<'a> {
    ids: &'a mut [i32],
    scores: &'a mut [f32],
    filled: usize,
}

impl<'a> Best<'a> {
    /// Keeps as many as `ids` and `scores` have room for; what they hold before does not matter.
    pub(crate) fn new(ids: &'a mut [i32], scores: &'a mut [f32]) -> Self {
        debug_assert_eq!(ids.len(), scores.len());
        Self { ids, scores, filled: 0 }
    }

    /// Offers one score, which is not NaN.
    #[inline]
    pub(crate) fn offer(&mut self, id: usize, score: f32) {
        let capacity = self.scores.len();
        if self.filled < capacity {
            self.filled += 1;
        } else if score <= self.scores[capacity - 1] {
            return;
        }
        let mut at = self.filled - 1;
        while at > 0 && score > self.scores[at - 1] {
            self.scores[at] = self.scores[at - 1];
            self.ids[at] = self.ids[at - 1];
            at -= 1;
        }
        self.scores[at] = score;
        self.ids[at] = id as i32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_best_and_gives_ties_to_the_lower_id() {
        let (mut ids, mut scores) = ([-7; 3], [f32::NAN; 3]);
        let mut best = Best::new(&mut ids, &mut scores);
        for (id, score) in [1.0, f32::NEG_INFINITY, 5.0, 1.0, 5.0, 0.5].into_iter().enumerate() {
            best.offer(id, score);
        }
        assert_eq!((ids, scores), ([2, 4, 0], [5.0, 5.0, 1.0]));
    }

    #[test]
    fn minus_infinity_fills_the_room_that_is_left() {
        let (mut ids, mut scores) = ([-7; 2], [f32::NAN; 2]);
        let mut best = Best::new(&mut ids, &mut scores);
        (0..4).for_each(|id| best.offer(id, f32::NEG_INFINITY));
        assert_eq!(ids, [0, 1]);
    }
}
