//! What the fuzzer once found, found no more: each file in `tests/model/regressions/<target>/` is given
//! to the target of that name, here without the fuzzer. So is everything that the fuzzer starts
//! from. `fuzz/run` fuzzes; what it finds is copied here under a name that says what it was.

#[path = "../../fuzz/bodies/mod.rs"]
mod bodies;
#[path = "../../fuzz/seeds.rs"]
mod seeds;

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn what_the_fuzzer_once_found_is_found_no_more() {
    for (target, body) in bodies::ALL {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/regressions");
        let Ok(entries) = fs::read_dir(directory.join(target)) else {
            // Nothing was found with this target yet.
            continue;
        };
        for entry in entries {
            let path = entry.expect("list the regressions").path();
            // Shown if the body panics.
            println!("{}", path.display());
            body(&fs::read(&path).expect("read a regression"));
        }
    }
}

#[test]
fn the_fuzzers_seeds_break_no_rule() {
    for seed in seeds::all() {
        println!("{} {}", seed.target, seed.name);
        let (_, body) = bodies::ALL
            .into_iter()
            .find(|(target, _)| *target == seed.target)
            .expect("a seed's target");
        body(&seed.bytes);
    }
}

/// Not a test: `fuzz/run` has the seeds written in this way.
#[test]
#[ignore = "writes the fuzzer's seeds into $VIRTLOCKD_FUZZ_CORPUS"]
fn write_the_seeds() {
    let corpus: PathBuf = std::env::var_os("VIRTLOCKD_FUZZ_CORPUS")
        .expect("VIRTLOCKD_FUZZ_CORPUS names a directory")
        .into();
    for seed in seeds::all() {
        let directory = corpus.join(seed.target);
        fs::create_dir_all(&directory).expect("make a corpus directory");
        fs::write(directory.join(format!("seed-{}", seed.name)), seed.bytes).expect("write a seed");
    }
}
