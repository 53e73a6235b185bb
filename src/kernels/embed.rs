//! Rows of a table by number.

use super::autograd::{elements, record};
use super::linear::wanted;
use super::reduce::AddTo;
use super::simd::Isa;
use candle_core::{Result, Tensor, bail};

/// Rows `ids` of `table [vocab, d]`. The gradient is zero in rows that were not used.
pub fn embed(table: &Tensor, ids: &Tensor, isa: Isa) -> Result<Tensor> {
    let (vocab, d) = table.dims2()?;
    let ids = ids.flatten_all()?.to_vec1::<u32>()?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        bail!("row {id} of a table of {vocab}");
    }
    let table = table.contiguous()?;
    let mut out = Vec::with_capacity(ids.len() * d);
    {
        let rows = elements(&table)?;
        ids.iter().for_each(|&id| out.extend_from_slice(&rows[id as usize * d..][..d]));
    }
    let (saved, count) = (table.clone(), ids.len());
    record("embed", &[&table], out, (count, d), move |_, grad| {
        let grad = grad.contiguous()?;
        let dtable = wanted(&saved, || {
            let dy = elements(&grad)?;
            let mut dtable = vec![0.0; vocab * d];
            for (&id, row) in ids.iter().zip(dy.chunks_exact(d.max(1))) {
                isa.run(AddTo { sums: &mut dtable[id as usize * d..][..d], row });
            }
            Ok(dtable)
        })?;
        Ok(vec![dtable])
    })
}
