//! Taking turns, and what is said of the rounds.

use fastrand::Rng;

/// Measures each of `beds` once in each round, in an order that differs from round to round. Returns
/// what was found by bed, and for each bed by round.
pub(crate) fn alternate<B, T>(
    rounds: u32,
    beds: &mut [&mut B],
    mut measure: impl FnMut(&mut B) -> T,
) -> Vec<Vec<T>> {
    let mut found: Vec<Vec<T>> = beds.iter().map(|_| Vec::new()).collect();
    let mut order: Vec<_> = (0..beds.len()).collect();
    for round in 0..rounds {
        Rng::with_seed(round.into()).shuffle(&mut order);
        for &index in &order {
            found[index].push(measure(beds[index]));
        }
    }
    found
}

/// The one in the middle, or the mean of the two that are; not a number if there is none.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[half],
        _ => (values[half - 1] + values[half]) / 2.0,
    }
}

/// The median of what was found in each round by that of the reference in the same round.
pub(crate) fn ratio<T>(found: &[T], reference: &[T], value: impl Fn(&T) -> f64) -> f64 {
    let pairs = found.iter().zip(reference);
    median(pairs.map(|(found, reference)| value(found) / value(reference)))
}
