//! One KTO step over the rows of a golden file, for what is held against transformers and PEFT.

use kto_formats::{
    tensors::TensorStore,
    tokens::{TokenMeta, TokenRow, TokenSet, prompt_hash},
};
use kto_model::{
    base::BaseModel,
    buffers::{Workspace, WorkspaceSpec},
    lora::Lora,
    rows::{Batch, Job, Packing},
    sweep::{BranchStats, Sweep},
};

/// Longest sequence.
pub const POSITIONS: usize = 28;
const BETA: f64 = 0.3;

pub fn ids(store: &TensorStore, name: &str) -> Vec<u32> {
    let view = store.require(name).unwrap();
    view.data.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

pub fn floats(store: &TensorStore, name: &str) -> Vec<f32> {
    store.require(name).unwrap().to_f32().unwrap()
}

/// Returns |a − b| / |b| of whole tensors.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b)))
}

/// The trained rows of a golden step as tokens.
fn tokens(store: &TensorStore, vocabulary: usize) -> TokenSet {
    let meta =
        TokenMeta { vocab_size: vocabulary as u32, max_length: POSITIONS as u32, ..Default::default() };
    let mut set = TokenSet::new(meta);
    for i in 0..2 {
        let [prompt, completion] = ["prompt", "completion"].map(|part| ids(store, &format!("{i}.{part}")));
        set.push(TokenRow {
            prompt_ids: &prompt,
            completion_ids: &completion,
            label: i == 0,
            prompt_hash: prompt_hash(&prompt),
        });
    }
    set
}

/// What one step says.
pub struct Step {
    /// By the name of a number: of the loss, or of the two rows.
    pub numbers: Vec<(&'static str, Vec<f64>)>,
    /// Of everything that is trained.
    pub gradients: Vec<(String, Vec<f32>)>,
}

/// One step of TRL's KTO over two rows, the first desirable. The KL completion of a row is the other row's.
pub fn step(
    store: &TensorStore,
    base: &BaseModel,
    lora: &Lora,
    packing: Packing,
    kept_layers: usize,
) -> Step {
    let tokens = tokens(store, base.architecture.vocab_size);
    let spec = WorkspaceSpec { kept_layers, head_rows: 5, ..Default::default() };
    let workspace = Workspace::new(&base.architecture, Some(lora), spec, base.device());
    let job = |prompt, completion, gradient| Job { prompt, completion, gradient };
    let jobs = [job(0, 0, true), job(1, 1, true), job(0, 1, false), job(1, 0, false)];
    let batch = Batch::new(&tokens, base.architecture.limits(POSITIONS), &jobs, packing);
    let sweep = Sweep { base, lora: None, dropout: None, workspace: &workspace, watch: None };
    let reference = batch.by_job(&sweep.forward(&batch.packs, false).unwrap().branches);
    let sweep = Sweep { lora: Some(lora), ..sweep };
    let forward = sweep.forward(&batch.packs, true).unwrap();
    let policy = batch.by_job(&forward.branches);
    let rewards: Vec<f64> = policy.iter().zip(&reference).map(|(p, r)| p.logps - r.logps).collect();
    let kl = ((rewards[2] + rewards[3]) / 2.0).max(0.0);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let arguments = [BETA * (rewards[0] - kl), BETA * (kl - rewards[1])];
    let loss = arguments.iter().map(|x| 1.0 - sigmoid(*x)).sum::<f64>() / 2.0;
    let slopes = arguments.map(|x| BETA / 2.0 * sigmoid(x) * (1.0 - sigmoid(x)));
    let weights = [-slopes[0], slopes[1]];
    let weight = |b: &BranchStats| if b.gradient { weights[b.tag] } else { 0.0 };
    let coefficients: Vec<Vec<f64>> =
        forward.branches.iter().map(|p| p.iter().map(weight).collect()).collect();
    let gradients = lora.zeros_like().unwrap();
    sweep.backward(&batch.packs, forward, &coefficients, &gradients).unwrap();
    let rows = |stats: &[BranchStats]| stats[..2].iter().map(|s| s.logps).collect();
    Step {
        numbers: vec![
            ("kl", vec![kl]),
            ("loss", vec![loss]),
            ("logps", rows(&policy)),
            ("reference_logps", rows(&reference)),
        ],
        gradients: gradients
            .named_tensors()
            .map(|(name, tensor)| (name, tensor.flatten_all().unwrap().to_vec1().unwrap()))
            .collect(),
    }
}
