//! The status program: every call as in `admin_call`, every result and every message as a client reads them.
//!
//! Input: a byte that chooses the procedure, or from 64 on its result, or from 128 on the message; then the
//! payload.

use virtlockd::wire::frame::{Header, Kind};
use virtlockd::wire::status::{
    self, Counted, Cursor, Daemon, HAPPENED, Happened, Holder, Owner, PROGRAM, Procedure, Resource,
    STRING_LIMIT, VERSION,
};
use virtlockd::wire::xdr::{DecodeError, Decoder, Encoder};

use super::reference;

pub fn run(data: &[u8]) {
    let Some((choice, payload)) = data.split_first() else {
        return;
    };
    let number = i32::from(choice % 64);
    match (choice / 64, Procedure::from_number(number)) {
        (0, None) => assert!(!(1..=9).contains(&number)),
        (0, Some(procedure)) => call(procedure, payload),
        (1, Some(procedure)) => result(procedure, payload),
        (1, None) => (),
        _ => message(payload),
    }
}

fn call(procedure: Procedure, arguments: &[u8]) {
    let number = procedure as i32;
    let expected = reference::canonical(reference::status_arguments(number), arguments);
    let decoded = status::decode(procedure, arguments);
    assert_eq!(decoded.is_ok(), expected.is_some());
    let (Ok((call, flags)), Some(mut expected)) = (decoded, expected) else {
        return;
    };
    assert_eq!(call.procedure(), procedure);
    let place = expected.len() - 4;
    assert_eq!(expected[place..], flags.to_be_bytes());
    // A client has no flags to give.
    expected[place..].fill(0);
    let words = [PROGRAM, VERSION, number.cast_unsigned(), 0, 7, 0];
    let mut encoded = Vec::new();
    call.encode(&mut encoded, 7);
    assert_eq!(encoded, reference::frame(words, &expected));
    assert_eq!(status::decode(procedure, &expected), Ok((call, 0)));
    let cut = &expected[..expected.len() - 4 * (1 + arguments.len() % (expected.len() / 4))];
    assert!(status::decode(procedure, cut).is_err());
}

fn result(procedure: Procedure, payload: &[u8]) {
    let number = procedure as i32;
    let expected = reference::canonical(reference::status_result(number), payload);
    let mut encoded = Vec::new();
    let again = again(procedure, payload, &mut encoded);
    assert_eq!(again.is_ok(), expected.is_some(), "{again:?}");
    if let Some(expected) = expected {
        assert_eq!(encoded, expected);
    }
}

/// Reads a result and writes it.
fn again(procedure: Procedure, payload: &[u8], out: &mut Vec<u8>) -> Result<(), DecodeError> {
    let from = &mut Decoder::new(payload);
    match procedure {
        Procedure::Daemon => {
            let daemon = Daemon::decode(payload)?;
            let header = Header {
                program: PROGRAM,
                version: VERSION,
                procedure: 1,
                kind: Kind::Call,
                serial: 0,
                status: 0,
            };
            daemon.encode_reply(out, header);
            out.drain(..28);
        }
        Procedure::Counters => {
            let rows = status::decode_list(from, Counted::decode)?;
            list(out, &rows, Counted::encode);
        }
        Procedure::Lockspaces => {
            let rows = status::decode_list(from, |from| from.string(STRING_LIMIT))?;
            let more = from.u32()? != 0;
            list(out, &rows, |row, out| _ = out.string(row));
            Encoder::new(out).u32(u32::from(more));
        }
        Procedure::Resources => {
            let rows = status::decode_list(from, resource)?;
            let next = status::decode_next(from)?;
            resources(out, &rows);
            page_end(out, next);
        }
        Procedure::Owners => {
            let rows = status::decode_list(from, Owner::decode)?;
            let next = status::decode_next(from)?;
            list(out, &rows, Owner::encode);
            page_end(out, next);
        }
        Procedure::Holders => {
            let rows = status::decode_list(from, Holder::decode)?;
            let more = from.u32()? != 0;
            list(out, &rows, Holder::encode);
            Encoder::new(out).u32(u32::from(more));
        }
        Procedure::File | Procedure::Resource => {
            let rows = status::decode_list(from, resource)?;
            resources(out, &rows);
        }
        Procedure::Subscribe => (),
    }
    Ok(())
}

type Row<'a> = (Resource<'a>, Vec<Holder<'a>>);

fn resource<'a>(from: &mut Decoder<'a>) -> Result<Row<'a>, DecodeError> {
    let resource = Resource::decode(from)?;
    Ok((resource, status::decode_list(from, Holder::decode)?))
}

fn resources(out: &mut Vec<u8>, rows: &[Row<'_>]) {
    list(out, rows, |(row, holders), out| {
        row.encode(out, holders.iter().copied());
    });
}

fn list<T>(out: &mut Vec<u8>, rows: &[T], encode: impl Fn(&T, &mut Encoder<'_>)) {
    let mut out = Encoder::new(out);
    for row in rows {
        out.u32(1);
        encode(row, &mut out);
    }
    out.u32(0);
}

/// The end of a page ends its list, too.
fn page_end(out: &mut Vec<u8>, next: Option<Cursor>) {
    out.truncate(out.len() - 4);
    status::encode_next(&mut Encoder::new(out), next);
}

fn message(payload: &[u8]) {
    let kind = payload.first_chunk().map(|word| u32::from_be_bytes(*word));
    let expected = reference::canonical(reference::status_happened(), payload);
    let expected = expected.filter(|_| kind.is_some_and(|kind| kind < 10));
    let decoded = Happened::decode(payload);
    assert_eq!(decoded.is_ok(), expected.is_some());
    let (Ok(happened), Some(expected)) = (decoded, expected) else {
        return;
    };
    let words = [PROGRAM, VERSION, HAPPENED.cast_unsigned(), 2, 0, 0];
    let mut encoded = Vec::new();
    happened.encode(&mut encoded);
    assert_eq!(encoded, reference::frame(words, &expected));
}
