//! What travels with a token.

use fused_moe_core::{MoeConfig, Plan};

/// One value for each part of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fields<T> {
    /// `[hidden]` in the wire's payload type.
    pub payload: T,
    /// `[scales_per_token]`; no bytes without scales.
    pub scales: T,
    /// `[top_k]` i32 global expert ids.
    pub ids: T,
    /// `[top_k]` f32.
    pub weights: T,
    /// u32: `source rank · max_tokens_per_rank + token`.
    pub source: T,
}

impl<T> Fields<T> {
    pub fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<Fields<U>, E> {
        Ok(Fields {
            payload: f(self.payload)?,
            scales: f(self.scales)?,
            ids: f(self.ids)?,
            weights: f(self.weights)?,
            source: f(self.source)?,
        })
    }

    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Fields<U> {
        Fields {
            payload: f(self.payload),
            scales: f(self.scales),
            ids: f(self.ids),
            weights: f(self.weights),
            source: f(self.source),
        }
    }

    pub fn into_array(self) -> [T; 5] {
        [self.payload, self.scales, self.ids, self.weights, self.source]
    }
}

/// A token as one run of bytes is its record: the fields one behind the other, without gaps.
impl Fields<usize> {
    /// Bytes of the fields.
    pub fn of_plan(config: &MoeConfig, plan: &Plan) -> Self {
        Self {
            payload: plan.wire().payload_bytes(config.hidden),
            scales: plan.wire().scale_bytes(config.hidden),
            ids: config.top_k * size_of::<i32>(),
            weights: config.top_k * size_of::<f32>(),
            source: size_of::<u32>(),
        }
    }

    /// Bytes of a record.
    pub fn record_bytes(&self) -> usize {
        self.into_array().iter().sum()
    }

    /// The fields of `record`.
    pub fn split<'a>(&self, mut record: &'a [u8]) -> Fields<&'a [u8]> {
        let mut next = |bytes| {
            let field;
            (field, record) = record.split_at(bytes);
            field
        };
        Fields {
            payload: next(self.payload),
            scales: next(self.scales),
            ids: next(self.ids),
            weights: next(self.weights),
            source: next(self.source),
        }
    }

    /// The fields of `record`, to write.
    pub fn split_mut<'a>(&self, mut record: &'a mut [u8]) -> Fields<&'a mut [u8]> {
        let mut next = |bytes| {
            let field;
            (field, record) = std::mem::take(&mut record).split_at_mut(bytes);
            field
        };
        Fields {
            payload: next(self.payload),
            scales: next(self.scales),
            ids: next(self.ids),
            weights: next(self.weights),
            source: next(self.source),
        }
    }
}

/// Writes `values` into `out`, which has their size.
pub(crate) fn copy_bytes<T: Copy, const N: usize>(out: &mut [u8], values: &[T], bytes: fn(T) -> [u8; N]) {
    for (out, &value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *out = bytes(value);
    }
}

/// Reads the ids of a record into `out`.
pub(crate) fn read_ids(ids: &[u8], out: &mut [i32]) {
    for (out, &id) in out.iter_mut().zip(ids.as_chunks::<4>().0) {
        *out = i32::from_ne_bytes(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_one_behind_the_other() {
        let sizes = Fields { payload: 6, scales: 0, ids: 8, weights: 8, source: 4 };
        let mut record = vec![0u8; sizes.record_bytes()];
        let fields = sizes.split_mut(&mut record);
        fields.payload.fill(1);
        copy_bytes(fields.ids, &[7, -1], i32::to_ne_bytes);
        copy_bytes(fields.weights, &[0.5, 2.0], f32::to_ne_bytes);
        copy_bytes(fields.source, &[9], u32::to_ne_bytes);
        let fields = sizes.split(&record);
        let mut ids = [0; 2];
        read_ids(fields.ids, &mut ids);
        assert_eq!((fields.payload, fields.scales, ids), (&[1; 6][..], &[][..], [7, -1]));
        assert_eq!(fields.source, 9u32.to_ne_bytes());
        assert_eq!(fields.into_array().map(<[u8]>::len), sizes.into_array());
    }
}
