//! The three programs that clients call. A service sees what lasts, who waits, and its call, never sockets
//! or other connections: it appends its reply, and says what else is to be done as an order.

pub mod admin;
pub mod dispatch;
pub mod lock;
pub mod status;
