//! What the procedures return.

use super::parameter::{self, Parameter};
use super::program::TRANSPORT_UNIX;
use crate::wire::frame::{self, Header};
use crate::wire::xdr::Encoder;

/// A client as a reply describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// The server that it is a client of.
    pub server: &'static str,
    /// Its number there.
    pub id: u64,
    /// When it connected, seconds since the epoch.
    pub connected_at: i64,
}

/// What a procedure returns.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer<'a> {
    /// Nothing but that it was done.
    Done,
    /// [`super::LIBVIRT_VERSION`]
    Version(u64),
    /// The names of servers, if they were wanted, and how many there are.
    Servers(&'a [&'a str], u32),
    /// The name of a server.
    Server(&'a str),
    /// Clients, if they were wanted, at most [`super::LIST_LIMIT`]; and how many there are.
    Clients(Vec<Client>, u32),
    /// A client.
    Client(Client),
    /// Named values.
    Parameters(Vec<Parameter<'a>>),
    /// A text, and how many entries it has.
    Entries(String, u32),
    /// As [`Answer::Entries`]; the text is left out if it has no entries.
    PerhapsEntries(String, u32),
}

impl Answer<'_> {
    /// Appends the whole reply to the call with `header`.
    pub fn encode_reply(&self, out: &mut Vec<u8>, header: Header) {
        frame::encode(out, header.reply(frame::STATUS_OK), |payload| {
            self.encode(payload);
        });
    }

    fn encode(&self, out: &mut Encoder<'_>) {
        match self {
            Answer::Done => (),
            Answer::Version(version) => {
                out.u64(*version);
            }
            Answer::Servers(names, count) => {
                out.count(names.len());
                for name in *names {
                    out.string(name.as_bytes());
                }
                out.u32(*count);
            }
            Answer::Server(name) => {
                out.string(name.as_bytes());
            }
            Answer::Clients(clients, count) => {
                out.count(clients.len());
                for client in clients {
                    encode_client(out, client);
                }
                out.u32(*count);
            }
            Answer::Client(client) => encode_client(out, client),
            Answer::Parameters(parameters) => parameter::encode(out, parameters),
            Answer::Entries(text, count) => {
                out.string(text.as_bytes()).u32(*count);
            }
            Answer::PerhapsEntries(text, count) => {
                let text = (*count > 0).then_some(text.as_bytes());
                out.optional_string(text).u32(*count);
            }
        }
    }
}

fn encode_client(out: &mut Encoder<'_>, client: &Client) {
    out.string(client.server.as_bytes())
        .u64(client.id)
        .i64(client.connected_at)
        .u32(TRANSPORT_UNIX);
}
