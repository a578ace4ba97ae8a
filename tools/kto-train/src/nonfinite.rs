//! Steps whose loss or gradient is not finite: which rows they had, so that people can look at them.

use crate::{order::Block, step::RowScore};
use kto_formats::tokens::TokenSet;
use serde_json::{Value, json};

/// Rows that a message names.
const NAMED: usize = 20;

/// What was not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The loss, or the KL estimate that it is made with. The rows that brought it are known.
    Loss,
    /// The gradient: any of the step's rows.
    Gradient,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Loss => "loss",
            What::Gradient => "gradient",
        }
    }
}

/// A step that must not reach the adapter.
pub struct NonFinite {
    /// What it was.
    pub what: What,
    /// The rows under suspicion, with their scores.
    pub rows: Vec<RowScore>,
}

impl NonFinite {
    /// Picks the rows that have a score that is not finite; all rows when none has.
    pub fn new(what: What, blocks: &[Block], scores: &[RowScore]) -> Self {
        debug_assert_eq!(blocks.iter().map(Vec::len).sum::<usize>(), scores.len());
        let bad: Vec<RowScore> = scores.iter().filter(|s| !s.is_finite()).copied().collect();
        Self { what, rows: if bad.is_empty() { scores.to_vec() } else { bad } }
    }

    /// Says which rows it were, counted from 1.
    pub fn text(&self) -> String {
        let mut names: Vec<String> = self.rows.iter().take(NAMED).map(|r| (r.row + 1).to_string()).collect();
        if self.rows.len() > NAMED {
            names.push(format!("{} more", self.rows.len() - NAMED));
        }
        let plural = if self.rows.len() == 1 { "" } else { "s" };
        format!("the {} is not finite (row{plural} {})", self.what.name(), names.join(", "))
    }

    /// Returns the step's line of nonfinite.jsonl. A score that is not finite is null.
    pub fn line(&self, step: u64, tokens: &TokenSet) -> Value {
        let row = |r: &RowScore| {
            let ids = tokens.row(r.row);
            json!({
                "row": r.row + 1,
                "label": ids.label,
                "prompt_tokens": ids.prompt_ids.len(),
                "completion_tokens": ids.completion_ids.len(),
                "logps": r.policy,
                "reference_logps": r.reference,
                "kl_row": r.partner.map(|p| p + 1),
                "kl_logps": r.kl_policy,
                "kl_reference_logps": r.kl_reference,
            })
        };
        let rows: Vec<Value> = self.rows.iter().map(row).collect();
        json!({ "step": step, "what": self.what.name(), "rows": rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::Member;
    use kto_formats::tokens::{TokenMeta, TokenRow};

    fn score(row: usize, policy: f64) -> RowScore {
        RowScore { row, policy, reference: None, partner: Some(0), kl_policy: Some(-1.0), kl_reference: None }
    }

    #[test]
    fn the_rows_with_bad_scores_are_named_or_all() {
        let blocks = [(0..3).map(|row| Member { row, partner: 0 }).collect::<Block>()];
        let one = NonFinite::new(What::Loss, &blocks, &[score(0, -1.0), score(1, f64::NAN), score(2, -3.0)]);
        assert_eq!(one.text(), "the loss is not finite (row 2)");
        let all = NonFinite::new(What::Gradient, &blocks, &[score(0, -1.0), score(1, -2.0), score(2, -3.0)]);
        assert_eq!(all.text(), "the gradient is not finite (rows 1, 2, 3)");
        let mut tokens = TokenSet::new(TokenMeta::default());
        for n in 1..4 {
            let ids = vec![1; n];
            tokens.push(TokenRow {
                prompt_ids: &ids,
                completion_ids: &[1, 2],
                label: n == 2,
                prompt_hash: 0,
            });
        }
        let line = one.line(9, &tokens);
        assert_eq!((&line["step"], &line["what"]), (&json!(9), &json!("loss")));
        let row = &line["rows"][0];
        assert_eq!((&row["row"], &row["label"], &row["prompt_tokens"]), (&json!(2), &json!(true), &json!(2)));
        assert!(row["logps"].is_null() && row["reference_logps"].is_null() && row["kl_logps"] == -1.0);
    }

    #[test]
    fn a_long_list_is_cut_in_the_message() {
        let blocks = [(0..25).map(|row| Member { row, partner: 0 }).collect::<Block>()];
        let scores: Vec<RowScore> = (0..25).map(|row| score(row, -1.0)).collect();
        assert!(NonFinite::new(What::Gradient, &blocks, &scores).text().ends_with("19, 20, 5 more)"));
    }
}
