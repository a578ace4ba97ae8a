//! The order in which records leave while they come: as they are, or as TRL unpairs.
//!
//! Memory: `interleave` holds nothing, `trl` a block of 1000 rows. Everything else needs all records: [`crate::whole`].

use crate::{args::Order, sink::Sink, work::Done};
use kto_cli::Result;

/// Rows in one batch of `datasets.map`, within which TRL puts all chosen before all rejected.
const TRL_BLOCK: u32 = 1000;

/// Puts records in order.
pub struct Ordered {
    order: Order,
    /// First records of the block's rows.
    first: Vec<u8>,
    /// Second records of the block's rows.
    second: Vec<u8>,
    /// Rows in the block.
    rows: u32,
}

impl Ordered {
    pub fn new(order: Order) -> Self {
        Self { order, first: Vec::new(), second: Vec::new(), rows: 0 }
    }

    /// Writes the records of a chunk, or holds them back.
    pub fn write(&mut self, done: &Done, sink: &mut Sink) -> Result<()> {
        if self.order != Order::Trl {
            return sink.write(&done.bytes, 0);
        }
        let mut start = 0;
        for meta in &done.metas {
            let line = &done.bytes[start..meta.end];
            start = meta.end;
            if meta.second { &mut self.second } else { &mut self.first }.extend_from_slice(line);
            if meta.ends_row {
                self.rows += 1;
                if self.rows == TRL_BLOCK {
                    self.end_block(sink)?;
                }
            }
        }
        Ok(())
    }

    /// Writes what is held.
    pub fn finish(&mut self, sink: &mut Sink) -> Result<()> {
        self.end_block(sink)
    }

    fn end_block(&mut self, sink: &mut Sink) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        sink.write(&self.first, 0)?;
        sink.write(&self.second, 0)?;
        self.first.clear();
        self.second.clear();
        self.rows = 0;
        Ok(())
    }
}
