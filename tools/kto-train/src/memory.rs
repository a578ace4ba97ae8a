//! From `--memory` to the memory plan: the limit, the batches of the run by size, the table, and the refusal.

use crate::{
    args::{Args, OptimizerKind},
    device::RunDevice,
    order::{Order, jobs},
    plan::{Inputs, Plan},
    resume::{self, Resume},
    stored::Stored,
};
use kto_cli::{Error, Kind, Result, Ui, memory, number::Size, units};
use kto_formats::{bnb, model_dir::ModelDir, tokens::TokenRow};
use kto_kernels::device::Device;
use kto_model::{
    memory::{
        self as planned, AdapterSize, BatchShape, Batches, Demand, GpuDemand, GpuWeights, Item, MemoryPlan,
        Moments, WeightSize,
    },
    reference::{self, Pair},
    rows::{Packing, groups},
};
use std::collections::BTreeSet;

/// Share of the available memory that a run takes when nobody says.
const DEFAULT_SHARE: f64 = 0.9;

/// Steps whose packs are counted, when an epoch has fewer; else one epoch.
const COUNTED_STEPS: u64 = 4096;

/// What a run may hold.
pub struct Limit {
    /// Resident bytes.
    pub bytes: u64,
    /// Where the number comes from, as a message says it.
    pub origin: String,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bytes {
            u64::MAX => f.write_str("what there is"),
            bytes => write!(f, "{} ({})", units::size(bytes), self.origin),
        }
    }
}

/// Returns the limit that `--memory` asks for, or most of what is available; no limit where the system does not say.
fn limit(asked: Option<Size>) -> Result<Limit> {
    // What this process holds already is part of the plan.
    let own = memory::resident().map_or(0, |r| r.anonymous);
    let share = |share: f64| memory::available().map(|free| ((free + own) as f64 * share) as u64);
    let percent = |share: f64| format!("{:.0} % of what is available", share * 100.0);
    match asked {
        Some(Size::Bytes(bytes)) => Ok(Limit { bytes, origin: "--memory".into() }),
        Some(Size::Share(part)) => match share(part) {
            Some(bytes) => Ok(Limit { bytes, origin: percent(part) }),
            None => Err(Error::usage("--memory: this system does not say how much memory is available")
                .with_hint("--memory with a size, such as 8GiB")),
        },
        None => Ok(match share(DEFAULT_SHARE) {
            Some(bytes) => Limit { bytes, origin: percent(DEFAULT_SHARE) },
            None => Limit { bytes: u64::MAX, origin: String::new() },
        }),
    }
}

/// The memory plan of a run, or the smallest one when none fits.
pub struct Fit {
    /// What the engine obeys.
    pub plan: MemoryPlan,
    /// What it was fitted to, of the host.
    pub limit: Limit,
    /// The same of a GPU.
    pub gpu_limit: Option<Limit>,
    /// The adapter.
    pub adapter: AdapterSize,
    /// Blocks through which gradients go.
    pub blocks: usize,
}

impl Fit {
    /// Plans the memory of a run. Nothing large is allocated.
    pub fn new(args: &Args, plan: &Plan, inputs: &Inputs, order: &Order, device: &RunDevice) -> Result<Self> {
        let gpu_limit = device.limit(args.memory).map(|(bytes, origin)| Limit { bytes, origin });
        let limit = limit(args.memory.filter(|_| gpu_limit.is_none()))?;
        let (a, tokens) = (inputs.architecture, inputs.tokens);
        let held_out = inputs.held_out.map(|h| &h.tokens);
        let rows = || tokens.rows().chain(held_out.into_iter().flat_map(|t| t.rows()));
        let ids = rows().flat_map(|row| row.prompt_ids.iter().chain(row.completion_ids).copied());
        let adapter = match (inputs.adapter, &plan.typed.layout) {
            (Some(adapter), _) => AdapterSize::given(a, adapter),
            (None, Some(layout)) => AdapterSize::fresh(a, layout),
            (None, None) => AdapterSize::default(),
        };
        // Ids are u32; offsets, label and hash of a row are 25 bytes; a pair of the reference pass is about 48.
        let ids_bytes = |row: TokenRow| 4 * (row.prompt_ids.len() + row.completion_ids.len()) as u64 + 25;
        let passes = plan.total_steps.div_ceil(plan.steps_per_epoch);
        let pairs = if plan.typed.loss.loss.needs_kl() { 1 + passes } else { 1 } * plan.rows as u64;
        let demand = Demand {
            architecture: a,
            weights: WeightSize::of(a, inputs.model, ids),
            adapter,
            moments: match plan.typed.optimizer.kind {
                OptimizerKind::Adamw => Moments::F32,
                OptimizerKind::Adamw8bit => Moments::Bits8,
            },
            adapter_copy: plan.typed.reference_is_adapter,
            positions: crate::data::positions(tokens).max(held_out.map_or(0, crate::data::positions)),
            threads: rayon::current_num_threads(),
            token_bytes: rows().map(ids_bytes).sum::<u64>() + 48 * pairs + held_out_pairs(inputs),
            pack_rows: settled(args)?,
            batches: &Counted { plan, inputs, order },
        };
        let memory = match (device, &gpu_limit) {
            (RunDevice::Gpu(_, element), Some(limit)) => {
                let gpu = GpuDemand {
                    element: *element,
                    weights: GpuWeights::of(a, inputs.model, *element),
                    dropout: plan.lora_dropout > 0.0,
                    longest: demand.positions,
                    held: kto_kernels::gpu::PRODUCTS as u64,
                    limit: limit.bytes,
                };
                planned::plan_on_gpu(&demand, &gpu)
            }
            _ => planned::plan(&demand, limit.bytes),
        };
        let plan = memory.unwrap_or_else(|smallest| *smallest);
        Ok(Self { plan, limit, gpu_limit, adapter, blocks: adapter.blocks(a) })
    }

    /// Returns the device for the engine; nothing is the processor.
    pub fn device(&self, device: &RunDevice) -> Option<Device> {
        device.for_engine(self.gpu_limit.as_ref()?.bytes)
    }

    /// Returns (items, peak, limit) of the GPU.
    pub fn on_gpu(&self) -> Option<(&[Item], u64, &Limit)> {
        let on_gpu = self.plan.on_gpu.as_ref()?;
        Some((&on_gpu.items, on_gpu.peak, self.gpu_limit.as_ref()?))
    }

    /// Returns whether the run may begin.
    pub fn fits(&self) -> bool {
        self.plan.peak <= self.limit.bytes && self.on_gpu().is_none_or(|(_, peak, limit)| peak <= limit.bytes)
    }

    /// Refuses (71) a run that does not fit, with the numbers.
    pub fn check(&self, model: &ModelDir) -> Result<()> {
        if self.fits() {
            return Ok(());
        }
        let (items, peak, limit, of) = match self.on_gpu() {
            Some((items, peak, limit)) if peak > limit.bytes => (items, peak, limit, " on the GPU"),
            _ => (&self.plan.items[..], self.plan.peak, &self.limit, ""),
        };
        let mut largest: Vec<&Item> = items.iter().collect();
        largest.sort_by_key(|item| std::cmp::Reverse(item.bytes));
        let shown: Vec<String> =
            largest.iter().take(4).map(|item| format!("{} {}", item.name, units::size(item.bytes))).collect();
        let quantized = if bnb::is_quantized(&model.tensors) { "" } else { ", or a base from kto-quantize" };
        let fewer = if self.adapter.whole > 0 { ", fewer --modules-to-save" } else { "" };
        let text = format!(
            "the run needs at least {}{of}, it may take {limit}; largest: {}",
            units::size(peak),
            shown.join(", ")
        );
        Err(Error::new(Kind::OutOfMemory, text).with_hint(format!(
            "--memory {} if the machine has it, or a lower --batch, kto-tokenize --max-length or --lora-r{fewer}{quantized}",
            units::flag(peak)
        )))
    }

    /// Says what the plan is, loudly when it gives up something that costs time.
    pub fn report(&self, ui: &Ui) {
        let (peak, limit) =
            self.on_gpu().map_or((self.plan.peak, &self.limit), |(_, peak, limit)| (peak, limit));
        let text = format!("memory: {} of {limit}: {}", units::size(peak), self.choices());
        let complete = self.plan.kept_layers == self.blocks && !self.plan.stream;
        if complete && self.gpu_limit.is_none() { ui.detail(text) } else { ui.note(text) }
    }

    /// Returns what the plan decides, in words.
    pub fn choices(&self) -> String {
        let MemoryPlan { kept_layers, pack_rows, stream, ref on_gpu, .. } = self.plan;
        let streamed = on_gpu.as_ref().map_or(stream, |g| g.placement.streamed);
        let weights = if streamed { "streamed" } else { "resident" };
        let mut text = format!(
            "{kept_layers} of {} blocks keep activations, packs of {pack_rows} rows, weights {weights}",
            self.blocks
        );
        if let Some(on_gpu) = on_gpu {
            let place = |away: bool| if away { "host" } else { "GPU" };
            let (head, inputs) = (place(on_gpu.placement.head_tile.is_some()), place(on_gpu.offload_inputs));
            text += &format!(", head on the {head}, inputs of blocks on the {inputs}");
        }
        text
    }
}

/// Returns the rows of a pack of the run that is gone on with.
fn settled(args: &Args) -> Result<Option<usize>> {
    Ok(match &args.resume {
        None => None,
        Some(Resume::From(path)) => Some(resume::peek(path)?.pack_rows).filter(|rows| *rows > 0),
        Some(Resume::Auto | Resume::Strict) => Stored::read(&args.out).and_then(|stored| stored.pack_rows()),
    })
}

/// Returns the bytes of what belongs to the held-out pairs: a pair in lists and references, and its scores in an evaluation.
fn held_out_pairs(inputs: &Inputs) -> u64 {
    inputs.held_out.map_or(0, |h| h.pairs().len() as u64 * (48 + 160))
}

/// Returns every pair that the first `steps` steps of the order will ask for.
pub fn pairs(plan: &Plan, order: &Order, steps: u64) -> Result<BTreeSet<Pair>> {
    let mut pairs = BTreeSet::new();
    each_step(plan, order, steps, |blocks| {
        for member in blocks.iter().flatten() {
            pairs.insert((member.row as u32, member.row as u32));
            if plan.typed.loss.loss.needs_kl() {
                pairs.insert((member.row as u32, member.partner as u32));
            }
        }
    })?;
    Ok(pairs)
}

fn each_step(
    plan: &Plan,
    order: &Order,
    steps: u64,
    mut f: impl FnMut(&[crate::order::Block]),
) -> Result<()> {
    let per_epoch = plan.steps_per_epoch;
    for epoch in 0..steps.div_ceil(per_epoch) {
        kto_cli::signal::check()?;
        let rows = order.epoch(epoch);
        for step in 0..per_epoch.min(steps - epoch * per_epoch) {
            f(&order.step(epoch, &rows, step));
        }
    }
    Ok(())
}

/// The batches of a run, counted from its order.
struct Counted<'a> {
    plan: &'a Plan,
    inputs: &'a Inputs<'a>,
    order: &'a Order,
}

impl Counted<'_> {
    fn steps_counted(&self) -> u64 {
        let Plan { total_steps, steps_per_epoch, .. } = *self.plan;
        if total_steps <= COUNTED_STEPS { total_steps } else { total_steps.min(steps_per_epoch) }
    }

    fn shape(&self, jobs: &[kto_model::rows::Job], packing: Packing) -> BatchShape {
        let limits = self.inputs.architecture.limits(self.plan.max_length);
        BatchShape::of(&groups(self.inputs.tokens, limits, jobs, packing).0, packing)
    }

    /// Returns the largest of every count over the sweeps of an evaluation, which are also those of its reference pass.
    fn evaluation(&self, pack_rows: usize, sweep_rows: usize) -> BatchShape {
        let mut most = BatchShape::default();
        let Some(held_out) = self.inputs.held_out else { return most };
        let (packing, limits) =
            (Packing::Shared(pack_rows), self.inputs.architecture.limits(held_out.max_length()));
        let pairs: Vec<Pair> = held_out.pairs().into_iter().collect();
        for cut in reference::sweeps(&held_out.tokens, &pairs, sweep_rows) {
            let jobs = reference::jobs(&pairs[cut]);
            let groups = groups(&held_out.tokens, limits, &jobs, packing).0;
            most = most.max(BatchShape::of(&groups, packing));
        }
        most
    }
}

impl Batches for Counted<'_> {
    fn steps(&self, pack_rows: usize) -> BatchShape {
        let mut most = BatchShape::default();
        let kl = self.plan.typed.loss.loss.needs_kl();
        let packing = self.plan.packing(pack_rows);
        // A signal ends the counting; the run asks for it again and stops.
        let _ = each_step(self.plan, self.order, self.steps_counted(), |blocks| {
            most = most.max(self.shape(&jobs(blocks, kl), packing));
        });
        most
    }

    fn reference(&self, pack_rows: usize, reference_rows: usize) -> BatchShape {
        let mut most = self.evaluation(pack_rows, reference_rows);
        if !self.plan.typed.loss.loss.needs_reference() {
            return most;
        }
        let pairs = pairs(self.plan, self.order, self.steps_counted()).unwrap_or_default();
        let pairs: Vec<Pair> = pairs.into_iter().collect();
        for cut in reference::sweeps(self.inputs.tokens, &pairs, reference_rows) {
            most = most.max(self.shape(&reference::jobs(&pairs[cut]), Packing::Shared(pack_rows)));
        }
        most
    }
}
