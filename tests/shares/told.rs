//! What the log says of a share that does not answer: which call of which guest waits for what, and when it is over.

use crate::scene::{STEPS, Scene, VARIANTS, for_each};
use crate::support::{DEADLINE, wait_until};
use std::time::{Duration, Instant};

impl Scene {
    /// The whole lines of the log that say all this, in any case.
    fn lines_with(&self, words: &[&str]) -> Vec<String> {
        let log = self.daemon.stderr();
        let whole = log
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        let lines = whole.map(str::to_lowercase);
        lines
            .filter(|line| words.iter().all(|word| line.contains(word)))
            .collect()
    }

    /// How many lines say that this call of the guest waits: the path, the mount, which is not only the beginning of
    /// the path, and the server.
    fn told(&self, call: &str) -> usize {
        const PATH: &str = "/run/share/x";
        let lines = self.lines_with(&["guest", PATH, &self.share.server(), call]);
        let names_mount = |line: &&String| line.replace(PATH, "").contains("/run/share");
        lines.iter().filter(names_mount).count()
    }
}

#[test]
fn a_call_that_hangs_is_told_after_5_s_and_once_more_when_the_share_answers_again() {
    let calls = [(STEPS[1], "acquire"), (STEPS[7], "release")];
    for_each(&calls, |(step, call)| {
        let Some(mut scene) = Scene::new(VARIANTS[0]) else {
            return;
        };
        let begun = Instant::now();
        scene.hang_in(step);
        wait_until(DEADLINE, "guest, call, path, mount and server", || {
            scene.told(call) > 0
        });
        let after = begun.elapsed();
        assert!(after > Duration::from_millis(4500), "after {after:?}");
        scene.others_are_served();
        let again = |scene: &Scene| scene.lines_with(&["again", "/run/share"]).len();
        assert_eq!(again(&scene), 0, "it hangs still");
        scene.share.mend_all();
        scene.guest_is_answered(step);
        wait_until(DEADLINE, "a line that it answers again", || {
            again(&scene) == 1
        });
        assert_eq!(scene.told(call), 1, "{}", scene.daemon.stderr());
    });
}
