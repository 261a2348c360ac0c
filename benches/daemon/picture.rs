//! The pictures, as SVG written by hand: round trips against idle guests, and bars for booting,
//! from local disks and from a share, and for storms. All scales are logarithmic.

use std::fmt::Write as _;

use crate::options::Sizes;
use crate::results::Results;
use crate::subject::{SUBJECTS, Subject};
use crate::{boot, rtt, share, storm};

const WIDTH: f64 = 760.0;
const LEFT: f64 = 90.0;
const RIGHT: f64 = 130.0;

fn colour(subject: Subject) -> &'static str {
    match subject {
        Subject::C => "#b3541e",
        Subject::Ours => "#1f5fa8",
        Subject::Before => "#7a4fa3",
        Subject::Floor => "#6b7280",
    }
}

/// The decades that hold all values.
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    /// `from` and `to` are the places of the lowest and the highest decade.
    fn over(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| *value > 0.0) {
            // A third of a decade of room, so that the shortest bar can be seen.
            low = low.min((value.log10() - 0.3).floor());
            high = high.max(value.log10().ceil());
        }
        if low >= high {
            high = low + 1.0;
        }
        Self {
            low,
            high,
            from,
            to,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = (value.log10().max(self.low) - self.low) / (self.high - self.low);
        self.from + share * (self.to - self.from)
    }

    fn decades(&self) -> impl Iterator<Item = f64> {
        (self.low as i32..=self.high as i32).map(|power| 10_f64.powi(power))
    }
}

/// A number of microseconds as a person would write it.
fn time_label(us: f64) -> String {
    match us {
        us if us >= 60e6 => format!("{:.3} min", us / 60e6),
        us if us >= 1e6 => format!("{:.3} s", us / 1e6),
        us if us >= 1e3 => format!("{:.3} ms", us / 1e3),
        us => format!("{us:.3} us"),
    }
}

/// Cuts "1.500 ms" to "1.5 ms" and "42.613 ms" to "42.6 ms".
fn short_time(us: f64) -> String {
    let text = time_label(us);
    let (number, unit) = text.split_once(' ').unwrap_or((&text, ""));
    let kept = &number[..number.len().min(4)];
    let kept = if kept.contains('.') {
        kept.trim_end_matches('0').trim_end_matches('.')
    } else {
        number.split('.').next().unwrap_or(number)
    };
    format!("{kept} {unit}")
}

fn open(height: f64, title: &str, subtitle: &str, place: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">{title}</text>\n\
         <text x=\"{LEFT}\" y=\"42\" fill=\"#666\">{subtitle}</text>\n\
         <text x=\"{LEFT}\" y=\"58\" fill=\"#666\">{place}</text>\n"
    )
}

/// Pair latency against idle guests: p50 as a line, p99 dashed.
pub fn latency(results: &Results, sizes: &Sizes, place: &str) -> Option<String> {
    let value = |idle, metric, of| results.median(rtt::NAME, &rtt::case(idle), metric, of);
    let metrics = [rtt::PAIR_P50, rtt::PAIR_P99];
    let mut all = Vec::new();
    for &idle in &sizes.idle {
        for subject in SUBJECTS {
            all.extend(
                metrics
                    .iter()
                    .filter_map(|metric| value(idle, metric, subject)),
            );
        }
    }
    if all.is_empty() {
        return None;
    }
    let (top, bottom) = (76.0, 400.0);
    let vertical = Scale::over(all.into_iter(), bottom, top);
    // Zero has no place on a logarithmic axis: guests are counted in tens, plus one.
    let guests = |idle: u32| 1.0 + f64::from(idle) / 10.0;
    let most = guests(sizes.idle.iter().copied().max()?);
    let across =
        |idle| LEFT + guests(idle).log10() / most.log10().max(0.001) * (WIDTH - LEFT - RIGHT);
    let mut svg = open(
        460.0,
        "Acquire and release of one lock, beside idle guests",
        "p50, and p99 dashed; client and server on one CPU; logarithmic scales",
        place,
    );
    for decade in vertical.decades() {
        let y = vertical.place(decade);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            y + 4.0,
            short_time(decade)
        );
    }
    for &idle in &sizes.idle {
        let x = across(idle);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#eee\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{idle}</text>",
            bottom + 18.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">idle guests connected</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        bottom + 40.0
    );
    let mut label_places: Vec<f64> = Vec::new();
    for subject in SUBJECTS {
        let colour = colour(subject);
        for (metric, dash) in metrics.into_iter().zip(["", " stroke-dasharray=\"4 4\""]) {
            let points: Vec<(f64, f64)> = sizes
                .idle
                .iter()
                .filter_map(|&idle| Some((across(idle), value(idle, metric, subject)?)))
                .map(|(x, us)| (x, vertical.place(us)))
                .collect();
            let path: Vec<String> = points
                .iter()
                .map(|(x, y)| format!("{x:.1},{y:.1}"))
                .collect();
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" \
                 stroke-width=\"2\"{dash}/>",
                path.join(" ")
            );
            let (Some(&(x, y)), true) = (points.last(), dash.is_empty()) else {
                continue;
            };
            // Lines that end at one place still get a label each.
            let mut label = y + 4.0;
            while label_places
                .iter()
                .any(|taken| (taken - label).abs() < 14.0)
            {
                label += 14.0;
            }
            label_places.push(label);
            let title = subject.title();
            let x = x + 8.0;
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{label:.1}\" fill=\"{colour}\">{title}</text>"
            );
        }
    }
    svg.push_str("</svg>\n");
    Some(svg)
}

/// Booting and storms, a bar for each subject.
pub fn bars(results: &Results, place: &str) -> Option<String> {
    let wanted = |scenario: &str, metric: &str| {
        (scenario == boot::NAME && metric == boot::TIME)
            || (scenario == share::NAME && metric == share::TIME)
            || (scenario == storm::NAME && (metric == storm::FREE || metric == storm::WORST))
    };
    let rows: Vec<_> = results
        .rows
        .iter()
        .filter(|measured| wanted(measured.row.scenario, measured.row.metric))
        .collect();
    if rows.is_empty() {
        return None;
    }
    // The rows are in milliseconds.
    let value = |measured: &crate::results::Measured, of| measured.median(of).map(|ms| ms * 1e3);
    let all = rows
        .iter()
        .flat_map(|row| SUBJECTS.into_iter().filter_map(|of| value(row, of)));
    let scale = Scale::over(all.collect::<Vec<_>>().into_iter(), LEFT, WIDTH - RIGHT);
    let mut y = 88.0;
    let mut body = String::new();
    for measured in &rows {
        let row = &measured.row;
        let _ = writeln!(
            body,
            "<text x=\"{LEFT}\" y=\"{y:.1}\">{} {}: {}</text>",
            row.scenario, row.case, row.metric
        );
        y += 6.0;
        for subject in SUBJECTS {
            let Some(us) = value(measured, subject) else {
                continue;
            };
            let end = scale.place(us).max(LEFT + 1.0);
            let mark = if measured.is_extrapolated(subject) {
                " (extrapolated)"
            } else {
                ""
            };
            let _ = writeln!(
                body,
                "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"12\" fill=\"{}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" font-size=\"11\">{}</text>\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{}{mark}</text>",
                end - LEFT,
                colour(subject),
                LEFT - 6.0,
                y + 10.0,
                subject.title(),
                end + 4.0,
                y + 10.0,
                short_time(us)
            );
            y += 15.0;
        }
        y += 22.0;
    }
    let mut svg = open(
        y,
        "Booting many guests, and many deaths at once",
        "logarithmic scale, shorter is better",
        place,
    );
    svg.push_str(&body);
    svg.push_str("</svg>\n");
    Some(svg)
}
