//! While a guest's call hangs in a share, everybody else is served: clients, admin clients, `virtlockctl`.

use crate::scene::{LOCAL, Scene, for_each_step};
use std::process::Output;

impl Scene {
    /// What `virtlockctl` says, soon.
    #[track_caller]
    fn ctl(&self, words: &[&str]) -> Output {
        let program = env!("CARGO_BIN_EXE_virtlockctl");
        let mut command = self.host.namespace.command("timeout");
        let output = command.args(["5", program]).args(words).output();
        output.expect("run virtlockctl")
    }
}

#[test]
fn nobody_else_waits_for_a_call_that_hangs_in_a_share() {
    for_each_step(0, |step, habits| {
        let Some(mut scene) = Scene::new(habits) else {
            return;
        };
        scene.hang_in(step);
        scene.others_are_served();
        let said = scene.ctl(&["status"]);
        assert_eq!(said.status.code(), Some(0), "{said:?}");
        let said = scene.ctl(&["who", LOCAL]);
        // It is free.
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        assert!(scene.share.hanging(step.operation) > 0, "it hangs still");
        scene.share.mend_all();
        scene.guest_is_answered(step);
        scene.nothing_is_left(step, "the share is well again");
        scene.is_had_by_another(step);
    });
}

/// Whatever the daemon may want to know of a share to find out that it is one: it finds out without it.
#[test]
fn nobody_else_waits_for_a_share_that_answers_nothing_at_all() {
    let Some(mut scene) = Scene::new(crate::scene::VARIANTS[0]) else {
        return;
    };
    let step = crate::scene::STEPS[0];
    scene.share.put("x");
    scene.share.hang_all();
    scene.guest.post(&step.take(&scene.share));
    scene.share.wait_hanging(step.operation);
    scene.others_are_served();
    scene.share.mend_all();
    scene.guest_is_answered(&step);
    scene.nothing_is_left(&step, "the share is well again");
}
