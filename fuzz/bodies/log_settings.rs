//! Log outputs and filters: what is read, written and read again is the same. A restart carries
//! the settings over in this way.

use std::path::Path;

use virtlockd::log::{
    filters_setting, format_outputs, outputs_setting, parse_filters, parse_outputs,
    restore_outputs, setting_text,
};

pub fn run(data: &[u8]) {
    let Ok(text) = setting_text("the setting", data) else {
        return;
    };
    let directory = Path::new("/directory");
    match parse_outputs(text, directory) {
        Ok(outputs) => {
            let written = format_outputs(&outputs);
            assert_eq!(
                parse_outputs(&written, directory).as_ref(),
                Ok(&outputs),
                "{written:?}"
            );
            let written = outputs_setting(&outputs);
            assert_eq!(
                restore_outputs(&written).as_ref(),
                Ok(&outputs),
                "{written:?}"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty() && !error.detail().is_empty()),
    }
    match parse_filters(text) {
        Ok(filters) => {
            let written = filters_setting(&filters);
            assert_eq!(
                parse_filters(&written).as_ref(),
                Ok(&filters),
                "{written:?}"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty() && !error.detail().is_empty()),
    }
}
