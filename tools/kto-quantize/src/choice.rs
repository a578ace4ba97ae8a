//! Which form each matrix gets: from form, recipe, overrides, and what was asked of embedding and head.

use crate::args::{self, Args, FormName, Treatment};
use kto_cli::{Error, Result, escape};
use kto_formats::{
    bnb::FourBitKind,
    mlx::{self, Setting},
};
use kto_weights::{
    Form,
    roles::{Role, matches},
};
use safetensors::Dtype;
use std::cell::RefCell;

/// The user's choices for safetensors forms, checked.
pub struct Choice {
    form: FormName,
    block: usize,
    nested: bool,
    /// Of most layers.
    pub common: Setting,
    /// The higher number of bits of a recipe, and the number of blocks.
    recipe: Option<(usize, usize)>,
    embeddings: Treatment,
    head: Treatment,
    skip: Vec<String>,
    overrides: Vec<(String, Setting)>,
    /// Names of skip and overrides that have matched.
    used: RefCell<Vec<bool>>,
}

impl Choice {
    /// Returns the choices of arguments whose forms and flags fit. Errors (2): an override that cannot be read.
    pub fn new(args: &Args, blocks: usize) -> Result<Self> {
        let form = args.form();
        let bnb = matches!(form, FormName::Nf4 | FormName::Fp4 | FormName::Int8);
        let default = if bnb { Treatment::Keep } else { Treatment::Quantize };
        let recipe = args.recipe.map(args::Recipe::bits);
        let group = args.group_size.unwrap_or(64);
        let common = Setting { bits: recipe.map_or(args.bits.unwrap_or(4), |r| r.0), group };
        let overrides: Vec<_> = if form == FormName::Mlx {
            args.overrides.iter().map(|text| parse_override(text, group)).collect::<Result<_>>()?
        } else {
            Vec::new()
        };
        let skip: Vec<String> = args.skip.iter().filter(|s| !s.is_empty()).cloned().collect();
        let used = RefCell::new(vec![false; skip.len() + overrides.len()]);
        Ok(Self {
            form,
            block: args.block_size.unwrap_or(64),
            nested: !args.no_double_quant,
            common,
            recipe: recipe.map(|r| (r.1, blocks)),
            embeddings: args.embeddings.unwrap_or(default),
            head: args.head.unwrap_or(default),
            skip,
            overrides,
            used,
        })
    }

    /// Returns the form of a module, or `None` when it is to stay as it is. `dtype` is that of its weight.
    pub fn form(&self, module: &str, role: Role, dtype: Dtype) -> Option<Form> {
        let skipped = self.skip.iter().position(|name| matches(module, name));
        if let Some(i) = skipped {
            self.used.borrow_mut()[i] = true;
            return None;
        }
        let setting = self.setting(module, role);
        let treatment = match role {
            Role::Embedding => self.embeddings,
            Role::Head => self.head,
            Role::Linear(_) => Treatment::Quantize,
        };
        if treatment == Treatment::Keep {
            return None;
        }
        let four = |kind| Form::FourBit { kind, block: self.block, nested: self.nested, dtype };
        Some(match self.form {
            FormName::Nf4 => four(FourBitKind::Nf4),
            FormName::Fp4 => four(FourBitKind::Fp4),
            FormName::Int8 => Form::Int8,
            FormName::Mlx | FormName::Gguf => {
                Form::Affine { bits: setting.bits, group: setting.group, dtype }
            }
        })
    }

    /// Returns bits and group of a module in MLX's form.
    fn setting(&self, module: &str, role: Role) -> Setting {
        let mut setting = self.common;
        if let Some((high, blocks)) = self.recipe
            && mlx::takes_more_bits(module, if let Role::Linear(block) = role { block } else { 0 }, blocks)
        {
            setting.bits = high;
        }
        for (i, (name, other)) in self.overrides.iter().enumerate() {
            if matches(module, name) {
                self.used.borrow_mut()[self.skip.len() + i] = true;
                setting = *other;
            }
        }
        setting
    }

    /// Fails (2) when a name has matched nothing. `lm_head` may be named without being there: it may be tied.
    pub fn check_used(&self) -> Result<()> {
        let names = self.skip.iter().map(|n| ("--skip", n));
        let names = names.chain(self.overrides.iter().map(|(n, _)| ("--override", n)));
        let used = self.used.borrow();
        let unused = names.zip(&*used).find(|((_, name), used)| !**used && *name != "lm_head");
        match unused {
            Some(((flag, name), _)) => {
                Err(Error::usage(format!("{flag} {}: no linear layer has this name", escape(name))))
            }
            None => Ok(()),
        }
    }
}

/// `NAME=BITS` or `NAME=BITS:GROUP`.
fn parse_override(text: &str, group: usize) -> Result<(String, Setting)> {
    let bad = |what: &str| Error::usage(format!("--override {}: {what}", escape(text)));
    let (name, setting) = text.split_once('=').ok_or_else(|| bad("must be NAME=BITS or NAME=BITS:GROUP"))?;
    let (bits, own) = setting.split_once(':').map_or((setting, None), |(b, g)| (b, Some(g)));
    let bits = args::bits(bits).map_err(|e| bad(&format!("bits {e}")))?;
    let group = match own {
        Some(own) => args::group_size(own).map_err(|e| bad(&format!("group {e}")))?,
        None => group,
    };
    Ok((name.to_string(), Setting { bits, group }))
}
