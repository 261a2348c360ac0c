//! Placeholder for the admin program.
