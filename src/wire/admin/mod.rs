//! The admin program: twenty procedures, what they are called with ([`Call`]) and what they return
//! ([`Answer`]).

mod answer;
mod call;
mod parameter;
mod program;

pub use answer::{Answer, Client};
pub use call::{Call, ClientName, decode};
pub use parameter::{Parameter, Value};
pub use program::{
    LIBVIRT_VERSION, LIST_LIMIT, PARAMETERS_LIMIT, PRESERVE, PROGRAM, Procedure, STRING_LIMIT,
    VERSION,
};
