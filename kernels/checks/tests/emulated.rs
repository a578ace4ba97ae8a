//! The GPU kernels on the emulator, and defects that it must notice.

#![allow(clippy::unwrap_used)] // a test may

#[cfg(not(emulated))]
#[test]
#[ignore = "no C++ compiler: the GPU kernels were not emulated"]
fn gpu_kernels_are_what_the_cpu_computes() {}

#[cfg(emulated)]
mod checks {
    use kto_kernel_checks::{CHECKS, Emulator};

    fn run(name: &str) {
        let (_, check) = CHECKS.iter().find(|(known, _)| *known == name).unwrap();
        if let Err(e) = check(&Emulator) {
            panic!("{e}");
        }
    }

    /// One test a check, and proof that none is left out.
    macro_rules! checks {
        ($($name:ident),*) => {
            $(#[test]
            fn $name() {
                run(stringify!($name));
            })*
            #[test]
            fn all_checks_are_run() {
                let names: Vec<&str> = CHECKS.iter().map(|(name, _)| *name).collect();
                assert_eq!(names, [$(stringify!($name)),*]);
            }
        };
    }
    checks!(
        attention,
        casts,
        dequantize,
        dropout,
        elementwise,
        gains,
        gated,
        layer_norm,
        logprob,
        rms_norm,
        rope,
        rows,
        scatter,
        softmax
    );
}

#[cfg(emulated)]
mod defects {
    use kto_kernel_checks::{Arg, Buffer, Emulator, launch};
    use kto_kernels::gpu::{Gated, Grid, RmsNorm};

    const P: Gated = Gated { elements: 33 };

    /// Runs a broken kernel on `n` floats and an input, if it takes one, and returns what the emulator says.
    fn fault(kernel: &str, element: &str, grid: Grid, input: Option<&Buffer>) -> String {
        let mut y = Buffer::new(&[0; 4 * 33]);
        let mut args = vec![Arg::Out(&mut y)];
        args.extend(input.map(Arg::In));
        match launch(&Emulator, &format!("{kernel}_{element}"), grid, &mut args, &P) {
            Ok(()) => panic!("{kernel}: nothing noticed"),
            Err(e) => e.to_string(),
        }
    }

    const BLOCK: Grid = Grid { blocks: 1, threads: 33 };

    #[test]
    fn a_missing_barrier_is_noticed() {
        assert!(fault("broken_race", "f32", BLOCK, None).contains("depends on the order"));
    }

    #[test]
    fn blocks_that_share_an_element_are_noticed() {
        let grid = Grid { blocks: 3, threads: 1 };
        assert!(fault("broken_blocks", "f32", grid, None).contains("depends on the order"));
    }

    #[test]
    fn a_barrier_for_some_threads_is_noticed() {
        assert!(fault("broken_barrier", "f32", BLOCK, None).contains("wait at a barrier"));
    }

    #[test]
    fn a_write_outside_is_noticed() {
        assert!(fault("broken_bounds", "f32", BLOCK, None).contains("outside of argument 0"));
    }

    #[test]
    fn a_changed_input_is_noticed() {
        let x = Buffer::new(&[0; 4 * 33]);
        assert!(fault("broken_input", "f32", BLOCK, Some(&x)).contains("changed argument 1"));
    }

    #[test]
    fn too_much_shared_memory_is_noticed() {
        assert!(fault("broken_memory", "f32", BLOCK, None).contains("more shared memory"));
    }

    #[test]
    fn a_pair_that_is_not_aligned_is_noticed() {
        assert!(fault("broken_pair", "bf16", BLOCK, None).contains("not aligned"));
    }

    #[test]
    fn shared_memory_begins_as_nan() {
        let mut y = Buffer::new(&[0; 4 * 33]);
        launch(&Emulator, "broken_poison_f32", BLOCK, &mut [Arg::Out(&mut y)], &P).unwrap();
        assert!(y.content().as_chunks::<4>().0.iter().all(|b| f32::from_le_bytes(*b).is_nan()));
    }

    #[test]
    fn wrong_calls_are_refused() {
        assert!(fault("no_such_kernel", "f32", BLOCK, None).contains("no such kernel"));
        let x = Buffer::new(&[0; 4 * 33]);
        assert!(fault("broken_race", "f32", BLOCK, Some(&x)).contains("other arguments"));
        let mut y = Buffer::new(&[0; 4 * 33]);
        let p = RmsNorm { rows: 1, columns: 1, eps: 0.0 };
        let other = launch(&Emulator, "broken_race_f32", BLOCK, &mut [Arg::Out(&mut y)], &p).unwrap_err();
        assert!(other.to_string().contains("another size"));
        for threads in [0, 1025] {
            let grid = Grid { blocks: 1, threads };
            assert!(fault("broken_race", "f32", grid, None).contains("threads in a block"));
        }
    }
}

#[cfg(emulated)]
mod products {
    use kto_kernel_checks::{SMALL, check_products, emulated_gpu, rates};
    use kto_kernels::gpu::Stream;

    #[test]
    fn the_emulated_products_are_right() {
        check_products(&*emulated_gpu(1 << 30, Stream::Copy).unwrap(), &SMALL).unwrap();
    }

    #[test]
    fn every_rate_is_measured() {
        let found = rates(&*emulated_gpu(1 << 30, Stream::Copy).unwrap(), 1024).unwrap();
        assert_eq!(found.len(), 14);
        assert!(found.iter().all(|r| r.per_second.is_finite() && r.per_second > 0.0));
    }
}
