//! The order of rows, the mixtures and the tokenizer's keys; whole files are read back by scripts/oracle/gguf_peers.py.

use super::{rows::Reordered, *};
use safetensors::Dtype;
use serde_json::json;

struct Rows(usize, usize);

impl Values for Rows {
    fn len(&self) -> usize {
        self.0 * self.1
    }
    fn columns(&self) -> usize {
        self.1
    }
    fn read(&self, start: usize, out: &mut [f32]) {
        out.iter_mut().enumerate().for_each(|(i, o)| *o = ((start + i) / self.1) as f32);
    }
}

#[test]
fn halves_of_a_head_take_turns() {
    let values = Reordered::new(Box::new(Rows(12, 2)), 2, Way::Into);
    let mut out = vec![0.0; 24];
    values.read(0, &mut out);
    let rows: Vec<f32> = out.chunks(2).map(|r| r[0]).collect();
    assert_eq!(rows, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 6.0, 9.0, 7.0, 10.0, 8.0, 11.0]);
    values.read(8, &mut out[..4]);
    assert_eq!(out[..4], [2.0, 2.0, 5.0, 5.0]);
    // A bias, whose only row is as long as it is.
    let bias = Reordered::new(Box::new(Rows(1, 12)), 2, Way::Into);
    assert_eq!((bias.columns, bias.rows), (1, 6));
    // There and back.
    let there = Box::new(Reordered::new(Box::new(Rows(12, 2)), 2, Way::Into));
    Reordered::new(there, 2, Way::OutOf).read(0, &mut out);
    assert!(out.chunks(2).enumerate().all(|(i, row)| row[0] == i as f32));
}

#[test]
fn mixtures_are_those_of_llama_cpp() {
    let config =
        json!({"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 24, "vocab_size": 10});
    let family = Family::of(&config).unwrap();
    let of = |name: &str, file, tied| {
        types::label(types::form(name, &[512, 512], Dtype::BF16, file, &family, tied))
    };
    let more: Vec<usize> = (0..24)
        .filter(|b| of(&format!("blk.{b}.ffn_down.weight"), FileType::Q4KM, false) == "Q6_K")
        .collect();
    assert_eq!(more, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]);
    assert_eq!(of("blk.0.attn_q.weight", FileType::Q4KM, false), "Q4_K");
    assert_eq!(of("token_embd.weight", FileType::Q4KM, false), "Q4_K");
    assert_eq!(of("token_embd.weight", FileType::Q5KM, true), "Q6_K");
    assert_eq!(of("output.weight", FileType::Q4_0, false), "Q6_K");
    assert_eq!(of("output.weight", FileType::Q8_0, false), "Q8_0");
    assert_eq!(types::label(types::instead(Form::Ggml(kto_kernels::quant::Ggml::Q4K), &[4, 64])), "Q5_0");
    assert_eq!(types::label(types::instead(Form::Ggml(kto_kernels::quant::Ggml::Q6K), &[4, 20])), "F16");
}

#[test]
fn names_that_llama_cpp_does_not_have_are_refused() {
    let config =
        json!({"model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 10});
    let family = Family::of(&config).unwrap();
    assert_eq!(
        family.tensor("model.layers.1.self_attn.q_proj.bias").unwrap(),
        ("blk.1.attn_q.bias".into(), Change::None)
    );
    for name in [
        "model.layers.1.mlp.router.weight",
        "model.layers.x.mlp.up_proj.weight",
        "other.weight",
        "lm_head.scales",
    ] {
        assert!(family.tensor(name).is_err(), "{name}");
    }
    assert!(Family::of(&json!({"model_type": "mamba"})).is_err());
}
