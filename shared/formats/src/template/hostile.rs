//! Templates that want too much, and templates that are wrong: each ends soon, with one line and 65.

use super::*;
use kto_cli::Kind;
use serde_json::json;

fn compile(text: &str) -> Result<ChatTemplate> {
    let source = source::Source { name: "t.jinja".into(), text: text.into() };
    ChatTemplate::compile(source::Sources { default: source, tools: None }, &TokenizerConfig::default())
}

fn render(text: &str) -> Result<String> {
    compile(text)?.render(&[json!({"role": "user", "content": "x"})], None, None, false)
}

/// The message of the refusal.
fn refused(text: &str) -> String {
    let error = render(text).unwrap_err();
    assert_eq!(error.kind(), Kind::Data, "{error}");
    let line = error.to_string();
    assert!(!line.contains('\n') && line.len() < 500, "{line}");
    line
}

/// The length of a list that doubled 64 times is not among them: fuel does not stop it, the caller's watchdog does.
#[test]
fn work_and_memory_are_bounded() {
    for text in [
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'x' * 1000000000 }}",
        "{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}",
        "{{ '%1000000000s' | format('x') }}",
        "{{ '{:1000000000}'.format('x') }}",
        "{{ ('a\n' * 10000) | indent(1000000000) }}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% set ns = namespace(v=[]) %}{% for i in range(90000) %}{% set ns.v = [ns.v] %}{% endfor %}{{ ns.v | tojson }}",
        "{% set ns = namespace(v=[]) %}{% for i in range(90000) %}{% set ns.v = [ns.v] %}{% endfor %}{{ ns.v }}",
        "{{ range(100000000) | list | length }}",
        "{{ [1] | tojson(indent=2000000000) }}",
    ] {
        refused(text);
    }
}

#[test]
fn long_and_deep_sources_end() {
    assert!(refused(&"x".repeat(SOURCE_CAP + 1)).contains("the limit is 65536"));
    for text in [
        format!("{{{{ {}true }}}}", "not ".repeat(16_000)),
        format!("{{{{ a{} }}}}", ".b".repeat(30_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(30_000), ")".repeat(30_000)),
        format!("{{{{ {}{} }}}}", "[".repeat(30_000), "]".repeat(30_000)),
        "{% if x %}".repeat(6_000),
    ] {
        // Some render, some are refused; none may end the process.
        if let Err(error) = render(&text) {
            assert_eq!(error.kind(), Kind::Data);
        }
    }
}

#[test]
fn nothing_outside_can_be_reached() {
    for text in [
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as p %}",
        "{% extends 'chat_template.jinja' %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ open('/etc/passwd') }}",
    ] {
        refused(text);
    }
}

#[test]
fn refusals_say_what_the_template_said() {
    let text = refused("{{ raise_exception('roles must\n alternate \u{1b}[31m') }}");
    assert_eq!(text, "the chat template refuses: roles must\\n alternate \\u{1b}[31m");
    assert!(refused("a\n{{ no_such_function() }}").contains("line 2: unknown function: no_such_function"));
    assert!(refused("{{ messages | no_such_filter }}").contains("no_such_filter"));
    assert!(refused("{% if %}").starts_with("t.jinja: chat template line 1: syntax error"));
    assert!(refused("{{ messages.content.nothing.here }}").contains("undefined value"));
}

#[test]
fn model_directories_without_a_template_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = ChatTemplate::load(dir.path(), None).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("has no chat template"), "{error}");
    assert_eq!(error.hint(), Some("--chat-template FILE gives one"));
    let config = dir.path().join("tokenizer_config.json");
    std::fs::write(
        &config,
        r#"{"chat_template": [{"name": "a", "template": "x"}], "eos_token": {"content": "</s>"}}"#,
    )
    .unwrap();
    let error = ChatTemplate::load(dir.path(), None).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("none is named \"default\""), "{error}");
    std::fs::write(dir.path().join("chat_template.jinja"), "file wins{{ eos_token }}").unwrap();
    let template = ChatTemplate::load(dir.path(), None).unwrap();
    assert_eq!(template.render(&[], None, None, false).unwrap(), "file wins</s>");
    std::fs::write(&config, "{}").unwrap();
    let template = ChatTemplate::load(dir.path(), None).unwrap();
    assert_eq!(template.render(&[], None, None, false).unwrap(), "file wins");
}

#[test]
fn a_turn_is_left_open_where_its_text_ends() {
    let chat = [json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "so far: "})];
    let open = |text: &str| compile(text).unwrap().render_continued(&chat, None, None);
    let kept = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}";
    assert_eq!(open(kept).unwrap(), "<user>q</s><assistant>so far: ");
    let trimmed = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}";
    assert_eq!(open(trimmed).unwrap(), "<user>q</s><assistant>so far:");
    assert!(
        open("{{ messages[0].content }}").unwrap_err().to_string().contains("not in what the chat template")
    );
    let parts = [
        json!({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
    ];
    let template = compile("{% for p in messages[0].content %}{{ p.text }},{% endfor %}").unwrap();
    assert_eq!(template.render_continued(&parts, None, None).unwrap(), "a,b");
    let empty = [json!({"role": "assistant", "tool_calls": [1]})];
    assert!(template.render_continued(&empty, None, None).is_err());
}

#[test]
fn tools_pick_their_own_template_and_kwargs_are_variables() {
    let source = |text: &str| source::Source { name: "t".into(), text: text.into() };
    let sources = source::Sources {
        default: source("plain {{ flag }}"),
        tools: Some(source("{{ tools | length }} tools")),
    };
    let template = ChatTemplate::compile(sources, &TokenizerConfig::default()).unwrap();
    let kwargs = json!({"flag": true});
    assert_eq!(template.render(&[], None, Some(&kwargs), false).unwrap(), "plain True");
    assert_eq!(template.render(&[], Some(&json!([1, 2])), None, false).unwrap(), "2 tools");
    assert!(template.render(&[], None, Some(&json!([])), false).is_err());
}
