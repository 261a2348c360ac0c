//! The goals of the daemon, each a ratio or a number with its limit, computed from the medians of
//! this run.

use crate::attacker::hostilities;
use crate::nursery::Funeral;
use crate::options::Sizes;
use crate::results::Results;
use crate::subject::Subject;
use crate::{
    boot, crash, fan, fence, hostile, idle, listing, pipeline, reexec, rtt, share, stop, storm,
};

/// Which side of the limit is good.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Good {
    AtMost,
    AtLeast,
}

pub struct Goal {
    /// What is compared, and with what.
    pub what: String,
    pub good: Good,
    pub limit: f64,
    pub unit: &'static str,
    pub ours: Option<f64>,
    /// The same computed for the C daemon.
    pub c: Option<f64>,
}

impl Goal {
    /// Nothing if it was not measured.
    pub fn is_met(&self) -> Option<bool> {
        self.ours.map(|value| match self.good {
            Good::AtMost => value <= self.limit,
            Good::AtLeast => value >= self.limit,
        })
    }

    pub fn limit_text(&self) -> String {
        let word = if self.good == Good::AtMost {
            "at most"
        } else {
            "at least"
        };
        format!("{word} {} {}", self.limit, self.unit)
    }
}

fn ratio(upper: Option<f64>, lower: Option<f64>) -> Option<f64> {
    Some(upper? / lower?)
}

/// The goals that these sizes allow to check; a quick run has other sizes and the same limits.
pub fn goals(results: &Results, sizes: &Sizes) -> Vec<Goal> {
    let mut goals = Vec::new();
    let mut goal = |what: String, good, limit, unit, value: &dyn Fn(Subject) -> Option<f64>| {
        let (ours, c) = (value(Subject::Ours), value(Subject::C));
        if ours.is_some() || c.is_some() {
            goals.push(Goal {
                what,
                good,
                limit,
                unit,
                ours,
                c,
            });
        }
    };
    let most = |sizes: &[u32]| sizes.iter().max().copied().unwrap_or(0);
    let rtt = |idle, metric, of| results.median(rtt::NAME, &rtt::case(idle), metric, of);
    goal(
        "rtt pair, 0 idle".into(),
        Good::AtMost,
        1.2,
        "x floor",
        &|of| {
            ratio(
                rtt(0, rtt::PAIR_P50, of),
                rtt(0, rtt::PAIR_P50, Subject::Floor),
            )
        },
    );
    goal(
        "CPU per request, 0 idle".into(),
        Good::AtMost,
        1.25,
        "x floor",
        &|of| ratio(rtt(0, rtt::CPU, of), rtt(0, rtt::CPU, Subject::Floor)),
    );
    let idle = most(&sizes.idle);
    goal(
        format!("rtt pair, {idle} idle"),
        Good::AtMost,
        1.05,
        "x own at 0",
        &|of| ratio(rtt(idle, rtt::PAIR_P50, of), rtt(0, rtt::PAIR_P50, of)),
    );
    let rate = |of| results.median(pipeline::NAME, pipeline::CASE, pipeline::RATE, of);
    goal(
        "pipeline, batches of 64".into(),
        Good::AtLeast,
        0.78,
        "x floor",
        &|of| ratio(rate(of), rate(Subject::Floor)),
    );
    let fan = |busy, of| results.median(fan::NAME, &fan::case(busy), fan::RATE, of);
    let (most_busy, least_busy) = (most(&sizes.busy), sizes.busy.first().copied().unwrap_or(0));
    goal(
        format!("fan {most_busy}"),
        Good::AtLeast,
        0.7,
        "x own at 64",
        &|of| ratio(fan(most_busy, of), fan(least_busy, of)),
    );
    let machines = most(&sizes.boot);
    goal(
        format!("boot {machines}"),
        Good::AtMost,
        300.0,
        "ms",
        &|of| results.median(boot::NAME, &boot::case(machines), boot::TIME, of),
    );
    let storms = [
        (&sizes.storm_reaped, Funeral::Reaped),
        (&sizes.storm_zombies, Funeral::Zombies),
    ];
    for (owners, funeral) in storms {
        for &owners in owners {
            let case = storm::case(owners, funeral);
            for (metric, limit) in [(storm::FREE, 50.0), (storm::WORST, 5.0)] {
                let what = format!("storm {case}: {metric}");
                goal(what, Good::AtMost, limit, "ms", &|of| {
                    results.median(storm::NAME, &case, metric, of)
                });
            }
        }
    }
    for (metric, limit, unit) in [
        (fence::WORST, 1.0, "ms"),
        (fence::FREE_WHILE_ALIVE, 0.0, "of 2"),
    ] {
        goal(
            format!("fence: {metric}"),
            Good::AtMost,
            limit,
            unit,
            &|of| results.median(fence::NAME, fence::CASE, metric, of),
        );
    }
    let machines = most(&sizes.reexec);
    for (metric, limit, unit) in [(reexec::SILENCE, 30.0, "ms"), (reexec::LOST, 0.0, "of 5")] {
        goal(
            format!("re-exec {machines} VMs: {metric}"),
            Good::AtMost,
            limit,
            unit,
            &|of| results.median(reexec::NAME, &reexec::case(machines), metric, of),
        );
    }
    let machines = most(&sizes.crash);
    for (metric, limit, unit) in [
        (crash::SILENCE, 30.0, "ms"),
        (crash::LOST, 0.0, "of 5"),
        (crash::DOUBLED, 0.0, "of 5"),
        (crash::COLD, 150.0, "ms"),
    ] {
        goal(
            format!("crash, {machines} VMs: {metric}"),
            Good::AtMost,
            limit,
            unit,
            &|of| results.median(crash::NAME, &crash::case(machines), metric, of),
        );
    }
    let machines = most(&sizes.reexec);
    for metric in [stop::GONE, stop::ANSWERED] {
        goal(
            format!("{metric}, {machines} VMs"),
            Good::AtMost,
            250.0,
            "ms",
            &|of| results.median(stop::NAME, &stop::case(machines), metric, of),
        );
    }
    let machines = most(&sizes.listed);
    goal(
        format!("bystander's p99, {machines} VMs listed"),
        Good::AtMost,
        2.0,
        "x before",
        &|of| {
            let case = listing::case(machines);
            results.median(listing::NAME, &case, listing::RATIO, of)
        },
    );
    let hung = share::hung_case(sizes.share_waiting);
    let metrics = [
        ("bystander's p99", share::RATIO, 1.5, "x before"),
        (share::WORST, share::WORST, 5.0, "ms"),
    ];
    for (what, metric, limit, unit) in metrics {
        goal(
            format!("share {hung}: {what}"),
            Good::AtMost,
            limit,
            unit,
            &|of| results.median(share::NAME, &hung, metric, of),
        );
    }
    // There is nothing to say of it where the C daemon was not measured.
    let booted = share::boot_case(most(&sizes.share_boot));
    let time = |of| results.median(share::NAME, &booted, share::TIME, of);
    goal(
        format!("share {booted}: faster"),
        Good::AtLeast,
        5.0,
        "x C daemon",
        &|of| ratio(time(Subject::C), time(of)),
    );
    let silent = idle::case(sizes.silent);
    let metrics = [
        (idle::WAKEUPS, 0.0, ""),
        (idle::RESIDENT, 4.0, "MiB"),
        (idle::PER_GUEST, 0.3, "KiB"),
    ];
    for (metric, limit, unit) in metrics {
        goal(
            format!("idle, {silent}: {metric}"),
            Good::AtMost,
            limit,
            unit,
            &|of| results.median(idle::NAME, &silent, metric, of),
        );
    }
    for hostility in hostilities() {
        let case = hostility.case();
        goal(
            format!("bystander's p99, {case}"),
            Good::AtMost,
            2.0,
            "x before",
            &|of| results.median(hostile::NAME, case, hostile::RATIO, of),
        );
    }
    goals
}
