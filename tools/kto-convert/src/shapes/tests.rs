//! Rows of every shape, and what becomes of them.

use super::*;
use crate::labels::Labels;
use serde_json::json;

fn try_convert(row: Value, keep_differing: bool) -> Result<(Unit, Fields), Problem> {
    let Value::Object(mut row) = row else { panic!("an object") };
    let labels = Labels::default();
    let rules = rules(&labels, keep_differing);
    find(&row, &rules, None)?.convert(&mut row, &rules).map(|unit| (unit, row))
}

fn rules(labels: &Labels, keep_differing: bool) -> Rules<'_> {
    Rules {
        labels,
        table: false,
        keep_differing,
        split_after: None,
        dialogue_as_text: false,
        both_bad: false,
        min_margin: None,
        min_ratio: None,
        score: None,
    }
}

/// (shape, [(prompt, completion, label)])
fn sides(row: Value) -> (&'static str, Vec<(Value, Value, bool)>) {
    let (unit, _) = try_convert(row, true).unwrap_or_else(|p| panic!("{}", p.error));
    let value = |content| match content {
        Content::Text(text) => Value::String(text),
        Content::Chat(turns) => {
            turns.iter().map(|m| json!([m["role"].as_str().unwrap(), m["content"]])).collect()
        }
    };
    (unit.shape, unit.sides.into_iter().map(|s| (value(s.prompt), value(s.completion), s.label)).collect())
}

fn refused(row: Value) -> (Reason, String) {
    let problem = try_convert(row, false).map(|(unit, _)| unit).unwrap_err();
    (problem.reason, problem.error.to_string())
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn bot(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

#[test]
fn unpaired_rows_pass_through() {
    let (shape, s) = sides(json!({"prompt": "p", "completion": " c", "label": true}));
    assert_eq!((shape, s), ("unpaired text", vec![(json!("p"), json!(" c"), true)]));
    let (shape, s) = sides(json!({"prompt": [user("p")], "completion": [bot("c")], "label": false}));
    let expected = vec![(json!([["user", "p"]]), json!([["assistant", "c"]]), false)];
    assert_eq!((shape, s), ("unpaired conversational", expected));
}

#[test]
fn text_beside_messages_becomes_a_message() {
    let both = vec![(json!([["user", "p"]]), json!([["assistant", "c"]]), true)];
    assert_eq!(sides(json!({"prompt": "p", "completion": [bot("c")], "label": true})).1, both);
    assert_eq!(sides(json!({"prompt": [user("p")], "completion": "c", "label": true})).1, both);
    assert_eq!(sides(json!({"prompt": "p", "completion": [user("p"), bot("c")], "label": true})).1, both);
    assert_eq!(
        sides(json!({"prompt": [user("p")], "completion": [user("p"), bot("c")], "label": true})).1,
        both
    );
    let (reason, what) = refused(json!({"prompt": "p", "completion": [user("q"), bot("c")], "label": true}));
    assert_eq!(reason, Reason::Content);
    assert!(
        what.starts_with("field \"completion\": message 1: a turn of \"user\" in a completion"),
        "{what}"
    );
}

#[test]
fn pairs_give_chosen_then_rejected() {
    let (shape, s) = sides(json!({"prompt": "p", "chosen": "c", "rejected": "r", "label": null}));
    let expected = vec![(json!("p"), json!("c"), true), (json!("p"), json!("r"), false)];
    assert_eq!((shape, s), ("paired text", expected));
    let whole = |text| json!([{"role": "system", "content": "s"}, user("p"), bot(text)]);
    let (shape, s) = sides(json!({"prompt": "p", "chosen": whole("c"), "rejected": whole("r")}));
    let prompt = json!([["system", "s"], ["user", "p"]]);
    let expected = vec![
        (prompt.clone(), json!([["assistant", "c"]]), true),
        (prompt, json!([["assistant", "r"]]), false),
    ];
    assert_eq!((shape, s), ("paired conversational", expected));
}

#[test]
fn implicit_dialogues_share_turns_but_keep_their_last() {
    let (_, s) = sides(json!({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("b")]}));
    assert_eq!(s[0].0, json!([["user", "a"]]), "equal sides still have a completion");
    let (_, s) = sides(
        json!({"chosen": [user("a"), bot("x"), bot("y")], "rejected": [user("a"), bot("x"), bot("z")]}),
    );
    assert_eq!(s[1].1, json!([["assistant", "z"]]));
    let row =
        json!({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c"), user("d"), bot("e")]});
    assert_eq!(refused(row.clone()).0, Reason::PromptsDiffer);
    let (_, s) = sides(row);
    assert_eq!(s[1].0, json!([["user", "a"], ["assistant", "c"], ["user", "d"]]));
    assert_eq!(refused(json!({"chosen": [bot("a")], "rejected": [bot("b")]})).0, Reason::NoPrompt);
    assert_eq!(refused(json!({"chosen": [user("a")], "rejected": [user("b")]})).0, Reason::LastTurn);
}

#[test]
fn messages_are_split_before_the_last_assistant_turns() {
    let (shape, s) =
        sides(json!({"messages": [user("a"), bot("b"), user("c"), bot("d"), bot("e")], "kto_tag": false}));
    let prompt = json!([["user", "a"], ["assistant", "b"], ["user", "c"]]);
    assert_eq!(
        (shape, s),
        ("messages", vec![(prompt, json!([["assistant", "d"], ["assistant", "e"]]), false)])
    );
    assert_eq!(refused(json!({"messages": [user("a")], "label": true})).0, Reason::LastTurn);
    assert_eq!(refused(json!({"messages": [bot("a")], "label": true})).0, Reason::NoPrompt);
    assert_eq!(refused(json!({"messages": [], "label": true})).0, Reason::Content);
    assert_eq!(refused(json!({"messages": "hi", "label": true})).0, Reason::Content);
}

#[test]
fn tool_calls_stay_in_the_dialogue() {
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]});
    let tool = json!({"role": "tool", "content": "42"});
    let (_, s) = sides(json!({"messages": [user("a"), call, tool, bot("b")], "label": true}));
    assert_eq!(s[0].1, json!([["assistant", "b"]]));
    let (_, s) = sides(json!({"prompt": [user("a")], "completion": [call, tool, bot("b")], "label": true}));
    assert_eq!(s[0].1, json!([["assistant", null], ["tool", "42"], ["assistant", "b"]]));
}

#[test]
fn text_parts_are_joined_and_other_parts_refused() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let (_, s) = sides(json!({"messages": [{"role": "user", "content": parts}, bot("c")], "label": true}));
    assert_eq!(s[0].0, json!([["user", "ab"]]));
    let image = json!([{"type": "image_url", "image_url": {}}]);
    let row = json!({"messages": [{"role": "user", "content": image}, bot("c")], "label": true});
    assert_eq!(refused(row).0, Reason::Multimodal);
}

#[test]
fn what_is_missing_is_named() {
    for (row, reason, what) in [
        (
            json!({"prompt": "p", "completion": "c"}),
            Reason::MissingField,
            "field \"label\" is missing (found \"prompt\", \"completion\")",
        ),
        (
            json!({"chosen": "c", "prompt": "p"}),
            Reason::MissingField,
            "field \"rejected\" is missing (found \"chosen\", \"prompt\")",
        ),
        (
            json!({"prompt": "p", "label": true}),
            Reason::MissingField,
            "field \"completion\" is missing (found \"prompt\", \"label\")",
        ),
        (json!({"q": 1, "a": 2}), Reason::UnknownShape, "no known shape (found \"q\", \"a\")"),
        (json!({}), Reason::UnknownShape, "no known shape (the row has no fields)"),
        (
            json!({"prompt": null, "completion": "c", "label": true}),
            Reason::Content,
            "field \"prompt\" must be text or a message list, found null",
        ),
        (
            json!({"prompt": "", "completion": "c", "label": true}),
            Reason::NoPrompt,
            "field \"prompt\" is empty",
        ),
        (
            json!({"chosen": "c", "rejected": [bot("r")]}),
            Reason::Content,
            "\"chosen\" is text and \"rejected\" a message list: both must be alike",
        ),
    ] {
        assert_eq!(refused(row), (reason, what.to_owned()));
    }
}

#[test]
fn other_columns_are_left_alone() {
    let (_, rest) =
        try_convert(json!({"id": 7, "prompt": "p", "chosen": "c", "rejected": "r", "tools": []}), false)
            .unwrap();
    assert_eq!(Value::Object(rest), json!({"id": 7, "tools": []}));
}
