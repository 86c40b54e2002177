//! Shares an eviction among the repositories. Functions of values.

/// The bytes to evict from each of `sizes` (a name and its bytes) so that at least `too_much` bytes
/// go: the largest are brought down to one level, and smaller ones lose nothing.
pub fn to_evict(sizes: &[(String, u64)], too_much: u64) -> Vec<(String, u64)> {
    let above = |level: u64| {
        let parts = sizes.iter().map(|(_, size)| size.saturating_sub(level));
        parts.fold(0u64, u64::saturating_add)
    };
    // The highest level at which it is enough.
    let (mut low, mut high) = (0, sizes.iter().map(|(_, size)| *size).max().unwrap_or(0));
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if above(middle) >= too_much {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    sizes
        .iter()
        .filter(|(_, size)| *size > low)
        .map(|(name, size)| (name.clone(), size - low))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sizes(sizes: &[u64]) -> Vec<(String, u64)> {
        let named = (0..).zip(sizes);
        named
            .map(|(number, size): (u32, &u64)| (number.to_string(), *size))
            .collect()
    }

    #[test]
    fn the_largest_give_first() {
        assert_eq!(to_evict(&sizes(&[100, 10]), 50), sizes(&[50]));
        assert_eq!(to_evict(&sizes(&[100, 90, 10]), 50), sizes(&[30, 20]));
        assert_eq!(to_evict(&sizes(&[5, 5]), 100), sizes(&[5, 5]));
        assert_eq!(to_evict(&[], 100), []);
    }

    proptest! {
        #[test]
        fn enough_goes_and_nobody_loses_who_has_less_than_what_another_keeps(
            own in prop::collection::vec(0u64..1000, 0..8),
            too_much in 1u64..5000,
        ) {
            let own = sizes(&own);
            let all: u64 = own.iter().map(|(_, size)| size).sum();
            let gone = to_evict(&own, too_much);
            let total: u64 = gone.iter().map(|(_, size)| size).sum();
            prop_assert!(total >= too_much.min(all));
            prop_assert!(total < too_much + own.len() as u64 || total == all);
            let left = |name: &str, size: u64| {
                let lost = gone.iter().find(|(loser, _)| loser == name);
                size - lost.map_or(0, |(_, lost)| *lost)
            };
            let kept = own.iter().map(|(name, size)| left(name, *size)).max().unwrap_or(0);
            for (name, _) in &gone {
                let (_, size) = own.iter().find(|(other, _)| other == name).unwrap();
                prop_assert!(left(name, *size) == kept);
            }
        }
    }
}
