//! The state of the log: filters, levels and open outputs, and how they are exchanged while the
//! daemon runs. The new outputs are open before the old ones go, so no line falls between them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::level::Level;
use super::line::Record;
use super::output::{Output, Services};
use super::resolve::Settings;
use super::settings::{FilterSetting, OutputSetting, SettingError};
use crate::host::text;

/// Takes records, and decides which are wanted and where they go.
#[derive(Debug)]
pub struct Logger {
    services: Services,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    level: Level,
    filters: Vec<FilterSetting>,
    outputs: Vec<Output>,
    default_output: OutputSetting,
}

impl Logger {
    /// Opens the outputs of the settings.
    ///
    /// # Errors
    /// [`SettingError::Open`] for the first output that cannot be opened.
    pub fn open(settings: Settings, services: Services) -> Result<Logger, SettingError> {
        let state = Mutex::new(State {
            outputs: open_outputs(settings.outputs, &services)?,
            level: settings.level,
            filters: settings.filters,
            default_output: settings.default_output,
        });
        Ok(Logger { services, state })
    }

    /// Exchanges everything, or nothing.
    ///
    /// # Errors
    /// As [`Logger::open`]; the old settings stay.
    pub fn replace(&self, settings: Settings) -> Result<(), SettingError> {
        let outputs = open_outputs(settings.outputs, &self.services)?;
        let mut state = self.lock();
        state.level = settings.level;
        state.filters = settings.filters;
        state.default_output = settings.default_output;
        state.take_outputs(outputs);
        drop(state);
        tracing::callsite::rebuild_interest_cache();
        Ok(())
    }

    /// Exchanges the outputs; none at all means the default output.
    ///
    /// # Errors
    /// As [`Logger::open`]; the old outputs stay.
    pub fn set_outputs(&self, mut settings: Vec<OutputSetting>) -> Result<(), SettingError> {
        if settings.is_empty() {
            settings.push(self.lock().default_output.clone());
        }
        let outputs = open_outputs(settings, &self.services)?;
        self.lock().take_outputs(outputs);
        tracing::callsite::rebuild_interest_cache();
        Ok(())
    }

    /// Exchanges the filters.
    pub fn set_filters(&self, filters: Vec<FilterSetting>) {
        self.lock().filters = filters;
        tracing::callsite::rebuild_interest_cache();
    }

    /// Exchanges the level of categories that no filter matches.
    pub fn set_level(&self, level: Level) {
        self.lock().level = level;
        tracing::callsite::rebuild_interest_cache();
    }

    /// The settings as they are now.
    pub fn settings(&self) -> Settings {
        let state = self.lock();
        Settings {
            level: state.level,
            filters: state.filters.clone(),
            outputs: state
                .outputs
                .iter()
                .map(|output| output.setting().clone())
                .collect(),
            default_output: state.default_output.clone(),
        }
    }

    /// Descriptor 2 has become another file.
    pub fn reopen_stderr(&self) {
        for output in &mut self.lock().outputs {
            output.reopen_stderr();
        }
    }

    /// Forgets the outputs without closing anything: their descriptors have become somebody else's. Until
    /// others are opened nothing is written.
    pub fn forget_outputs(&self) {
        for output in self.lock().outputs.drain(..) {
            std::mem::forget(output);
        }
    }

    /// Whether any output would take a line of this level and category.
    pub fn wants(&self, level: Level, category: &str) -> bool {
        let state = self.lock();
        let wanted = state
            .filters
            .iter()
            .find(|filter| text::matches(&filter.pattern, category))
            .map_or(state.level, |filter| filter.level);
        level >= wanted && level >= state.least_output_level()
    }

    /// No line below this level is wanted in any category.
    pub fn least_level(&self) -> Level {
        let state = self.lock();
        state
            .filters
            .iter()
            .map(|filter| filter.level)
            .fold(state.level, Level::min)
            .max(state.least_output_level())
    }

    /// Passes a record to every output that takes its level.
    pub fn write(&self, record: &Record<'_>) {
        for output in &mut self.lock().outputs {
            output.write(record);
        }
    }

    /// A panic in the middle of a line leaves nothing half done that matters to the next line.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take_outputs(&mut self, mut outputs: Vec<Output>) {
        for output in &mut outputs {
            output.succeed(&mut self.outputs);
        }
        self.outputs = outputs;
    }

    fn least_output_level(&self) -> Level {
        self.outputs
            .iter()
            .map(|output| output.setting().level)
            .min()
            .unwrap_or(Level::Error)
    }
}

fn open_outputs(
    settings: Vec<OutputSetting>,
    services: &Services,
) -> Result<Vec<Output>, SettingError> {
    settings
        .into_iter()
        .map(|setting| Output::open(setting, services))
        .collect()
}
