//! The numbers of all runs: one row for each thing measured, one value a run and subject.

use crate::measure::median;
use crate::subject::{SUBJECTS, Subject};

/// What one number is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    pub scenario: &'static str,
    /// The size, and whatever else tells the rows of a scenario apart.
    pub case: String,
    pub metric: &'static str,
    pub unit: &'static str,
}

/// A row with the values of each subject, in the order of the runs.
pub struct Measured {
    pub row: Row,
    values: [Vec<f64>; SUBJECTS.len()],
    /// Numbers that were computed from a smaller case, by subject.
    extrapolated: [bool; SUBJECTS.len()],
}

impl Measured {
    pub fn values(&self, subject: Subject) -> &[f64] {
        &self.values[subject as usize]
    }

    pub fn median(&self, subject: Subject) -> Option<f64> {
        median(self.values(subject))
    }

    pub fn is_extrapolated(&self, subject: Subject) -> bool {
        self.extrapolated[subject as usize]
    }
}

#[derive(Default)]
pub struct Results {
    pub rows: Vec<Measured>,
    /// What went wrong, in sentences.
    pub failures: Vec<String>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

impl Results {
    fn row(&mut self, row: Row) -> &mut Measured {
        let found = self.rows.iter().position(|measured| measured.row == row);
        let place = found.unwrap_or_else(|| {
            self.rows.push(Measured {
                row,
                values: Default::default(),
                extrapolated: [false; SUBJECTS.len()],
            });
            self.rows.len() - 1
        });
        &mut self.rows[place]
    }

    pub fn record(&mut self, row: Row, subject: Subject, value: f64) {
        self.row(row).values[subject as usize].push(value);
    }

    /// Records one subject's values of one case: each with its metric and its unit.
    pub fn recorder(
        &mut self,
        scenario: &'static str,
        case: impl Into<String>,
        subject: Subject,
    ) -> impl FnMut(&'static str, &'static str, f64) {
        let case = case.into();
        move |metric, unit, value| {
            let row = Row {
                scenario,
                case: case.clone(),
                metric,
                unit,
            };
            self.record(row, subject, value);
        }
    }

    /// A value computed from a smaller case than the row says.
    pub fn record_extrapolated(&mut self, row: Row, subject: Subject, value: f64) {
        let measured = self.row(row);
        measured.values[subject as usize].push(value);
        measured.extrapolated[subject as usize] = true;
    }

    pub fn note(&mut self, text: String) {
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// The median of a row; nothing if it was not measured.
    pub fn median(&self, scenario: &str, case: &str, metric: &str, of: Subject) -> Option<f64> {
        let same =
            |row: &Row| (row.scenario, row.case.as_str(), row.metric) == (scenario, case, metric);
        self.rows
            .iter()
            .find(|measured| same(&measured.row))?
            .median(of)
    }
}
