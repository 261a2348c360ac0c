//! What is being done now: a line for the person who waits, and a watchdog for the case that it
//! never ends.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What runs, and until when it may.
static STEP: Mutex<Option<(String, Instant)>> = Mutex::new(None);

/// Says what begins now, and how long it may take. The previous step is over.
pub fn step(text: String, limit: Duration) {
    let mut stderr = std::io::stderr().lock();
    let _ = if stderr.is_terminal() {
        write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush())
    } else {
        writeln!(stderr, "{text}")
    };
    *STEP.lock().expect("nobody panics with the step") = Some((text, Instant::now() + limit));
}

/// The last step is over.
pub fn done() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
    *STEP.lock().expect("nobody panics with the step") = None;
}

/// Ends the program when a step is late. All servers and helpers have asked the kernel to die with
/// it.
pub fn watch() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let step = STEP.lock().expect("nobody panics with the step").clone();
            if let Some((text, deadline)) = step
                && Instant::now() > deadline
            {
                eprintln!("\nFAILED: '{text}' was not over at its deadline; giving up");
                std::process::exit(2);
            }
        }
    });
}
