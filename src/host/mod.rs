//! What a Unix daemon owes its host: the system calls, and the only place with `unsafe`.
#![allow(unsafe_code)]
