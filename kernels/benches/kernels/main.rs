//! Every kernel against its floor: `cargo bench -p kto-kernels --bench kernels -- [--threads N] [--seconds X] [--json] [--peaks] [FILTER]`.
//!
//! A kernel that multiplies matrices is compared with multiply-adds in registers, every other one with a copy that moves
//! as many bytes as the kernel must read and write (of the same size, so that both find the same cache). The shapes are
//! those of a SmolLM2-135M step. `--peaks` prints the measured peaks alone. The floors are measured first; a share above
//! 100 % of a copy means that part of the operands stayed in a nearer cache than the copy's.

#![allow(clippy::print_stdout, clippy::unwrap_used)] // a program for people at a terminal

mod cases;
mod peaks;

use cases::{Case, Work};
use std::time::Duration;

struct Options {
    threads: usize,
    time: Duration,
    json: bool,
    peaks: bool,
    filter: Option<String>,
}

impl Options {
    fn parse() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut options = Self {
            threads: cores,
            time: Duration::from_millis(300),
            json: false,
            peaks: false,
            filter: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {} // cargo adds it
                "--threads" => options.threads = args.next().unwrap().parse().unwrap(),
                "--seconds" => options.time = Duration::from_secs_f64(args.next().unwrap().parse().unwrap()),
                "--json" => options.json = true,
                "--peaks" => options.peaks = true,
                _ => options.filter = Some(arg),
            }
        }
        options
    }
}

fn main() {
    let options = Options::parse();
    rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global().unwrap();
    let flops = peaks::multiply_adds(options.time);
    if options.peaks {
        return print_peaks(&options, flops);
    }
    if !options.json {
        println!("multiply-adds in registers: {flops:.0} GFLOP/s on {} threads\n", options.threads);
        println!("{:<34} {:<22} {:>10} {:>9} {:<7} {:>7}", "kernel", "shape", "ms", "rate", "", "share");
    }
    for mut case in cases::all() {
        if options.filter.as_ref().is_none_or(|f| case.name.contains(f.as_str())) {
            measure(&mut case, &options, flops);
        }
    }
}

/// Prints the peaks and the largest product of ours: 1024³, and the copy of 256 MiB.
fn print_peaks(options: &Options, flops: f64) {
    let mut square = cases::square(1024);
    let product = 2.0 * 1024f64.powi(3) / peaks::best(options.time, || (square.run)()) / 1e9;
    let bytes = 256 << 20;
    let copy = bytes as f64 / peaks::Copier::new(bytes).seconds(bytes, options.time) / 1e9;
    if options.json {
        println!(
            "{{\"threads\": {}, \"multiply_add_gflops\": {flops:.1}, \"matmul_gflops\": {product:.1}, \"copy_gb_per_s\": {copy:.2}}}",
            options.threads
        );
    } else {
        println!(
            "multiply-adds in registers  {flops:8.1} GFLOP/s\nmatmul 1024×1024×1024       {product:8.1} GFLOP/s"
        );
        println!("copy of 256 MiB             {copy:8.2} GB/s (read + written)");
    }
}

fn measure(case: &mut Case, options: &Options, flops: f64) {
    let seconds = peaks::median(options.time, || (case.run)());
    let (rate, unit, floor) = match case.work {
        Work::Flops(n) => (n / seconds / 1e9, "GFLOP/s", n / flops / 1e9),
        Work::Bytes(n) => (n as f64 / seconds / 1e9, "GB/s", peaks::Copier::new(n).seconds(n, options.time)),
    };
    let share = 100.0 * floor / seconds;
    if options.json {
        println!(
            "{{\"kernel\": \"{}\", \"shape\": \"{}\", \"seconds\": {seconds:.3e}, \"rate\": {rate:.2}, \"unit\": \"{unit}\", \"floor_seconds\": {floor:.3e}, \"threads\": {}}}",
            case.name, case.shape, options.threads
        );
    } else {
        println!(
            "{:<34} {:<22} {:>10.3} {rate:>9.1} {unit:<7} {share:>6.0}%",
            case.name,
            case.shape,
            seconds * 1e3
        );
    }
}
