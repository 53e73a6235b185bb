//! Weighted means of chosen rows: how the results of a row's experts come together again.

use super::autograd::elements;
use candle_core::{Device, Result, Tensor, bail};

/// Row `i` of the result is `Σ weights[j] · y[places[j]]` over the `per_row` entries `j` that begin at
/// `i * per_row`, whose weights add up to 1. It is computed as the first one's row and, one after the
/// other, what the rest differ from it: the mean of equal rows is exactly them. Not differentiable.
///
/// An error if there are not as many weights as places, if `per_row` does not divide them, or if a
/// place is outside `y [rows, d]`.
pub fn mix_rows(y: &Tensor, places: &[u32], weights: &[f32], per_row: usize) -> Result<Tensor> {
    let (rows, d) = y.dims2()?;
    if per_row == 0 || !places.len().is_multiple_of(per_row) || weights.len() != places.len() {
        bail!("{} places with {} weights, {per_row} to a row", places.len(), weights.len());
    }
    if let Some(place) = places.iter().find(|&&place| place as usize >= rows) {
        bail!("row {place} of {rows}");
    }
    let y = y.contiguous()?;
    let y = elements(&y)?;
    let mut out = Vec::with_capacity(places.len() / per_row * d);
    for (places, weights) in places.chunks_exact(per_row).zip(weights.chunks_exact(per_row)) {
        let row = |place: u32| &y[place as usize * d..][..d];
        let first = row(places[0]);
        let start = out.len();
        out.extend_from_slice(first);
        for (&place, weight) in places.iter().zip(weights).skip(1) {
            let sums = out[start..].iter_mut();
            sums.zip(row(place))
                .zip(first)
                .for_each(|((sum, y), first)| *sum += weight * (y - first));
        }
    }
    Tensor::from_vec(out, (places.len() / per_row, d), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Tensor {
        Tensor::new(&[[1.0f32, 2.0], [10.0, 20.0], [100.0, 200.0]], &Device::Cpu).unwrap()
    }

    #[test]
    fn rows_are_averaged_by_their_weights() {
        let weights = [0.5, 0.5, 0.25, 0.75];
        let mixed = mix_rows(&rows(), &[2, 0, 1, 0], &weights, 2).unwrap();
        assert_eq!(mixed.to_vec2::<f32>().unwrap(), [[50.5, 101.0], [3.25, 6.5]]);
        let moved = mix_rows(&rows(), &[1, 0], &[1.0, 1.0], 1).unwrap();
        assert_eq!(moved.to_vec2::<f32>().unwrap(), [[10.0, 20.0], [1.0, 2.0]]);
        let three = mix_rows(&rows(), &[0, 1, 2], &[0.5, 0.25, 0.25], 3).unwrap();
        assert_eq!(three.to_vec2::<f32>().unwrap(), [[28.0, 56.0]]);
    }

    #[test]
    fn equal_rows_stay_what_they_are() {
        let rows = Tensor::new(&[[0.1f32, -7.3], [0.1, -7.3]], &Device::Cpu).unwrap();
        let third = 1.0 / 3.0;
        let mixed = mix_rows(&rows, &[0, 1, 1], &[third; 3], 3).unwrap();
        assert_eq!(mixed.to_vec2::<f32>().unwrap(), [[0.1, -7.3]]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        assert!(mix_rows(&rows(), &[3], &[1.0], 1).is_err());
        assert!(mix_rows(&rows(), &[0, 1], &[1.0], 1).is_err());
        assert!(mix_rows(&rows(), &[0, 1, 2], &[1.0; 3], 2).is_err());
        assert!(mix_rows(&rows(), &[0], &[1.0], 0).is_err());
    }
}
