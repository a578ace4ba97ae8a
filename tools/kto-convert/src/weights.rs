//! Advice on class weights.

/// Returns what to tell the user about `desirable` and `undesirable` counts, or `None` when weights of 1 are right.
/// Formula: 1 <= wD nD / (wU nU) <= 4/3 (arXiv 2402.01306 eq. 8), bounds rounded to 2 digits as TRL 1.16 does.
pub fn advice(desirable: u64, undesirable: u64) -> Option<String> {
    let (good, bad) = (desirable as f64, undesirable as f64);
    if desirable == 0 || undesirable == 0 {
        let (all, none) =
            if undesirable == 0 { ("desirable", "undesirable") } else { ("undesirable", "desirable") };
        return (desirable != undesirable)
            .then(|| format!("every record is {all}: KTO needs {none} ones too"));
    }
    let round = |x: f64| (x * 100.0).round() / 100.0;
    let (low, high) = (round(bad / good), round(bad / good * 4.0 / 3.0));
    if (low..=high).contains(&1.0) {
        return None;
    }
    let (under, over) = (round(good / bad * 0.75), round(good / bad));
    Some(format!(
        "{desirable} desirable to {undesirable} undesirable records: train with --desirable-weight {low} to {high}, \
         or --undesirable-weight {under} to {over}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balanced_classes_need_no_weights() {
        for (good, bad) in [(1, 1), (150, 150), (2312, 2308), (2308, 2312), (4, 3), (0, 0)] {
            assert_eq!(advice(good, bad), None, "{good} {bad}");
        }
    }

    #[test]
    fn weights_put_the_ratio_into_the_papers_range() {
        let text = advice(100, 200).unwrap();
        assert!(
            text.ends_with("--desirable-weight 2 to 2.67, or --undesirable-weight 0.38 to 0.5"),
            "{text}"
        );
        let text = advice(300, 100).unwrap();
        assert!(
            text.ends_with("--desirable-weight 0.33 to 0.44, or --undesirable-weight 2.25 to 3"),
            "{text}"
        );
        assert_eq!(advice(3, 0).unwrap(), "every record is desirable: KTO needs undesirable ones too");
    }
}
