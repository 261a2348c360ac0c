//! The numbers of a server that the admin socket shows and sets: its workers and its client limits.

use std::fmt::Display;

use crate::host::errno::Errno;

use crate::custody::Custody;
use crate::custody::servers::{Server, Service};
use crate::wire::admin::{Answer, Parameter, Value};
use crate::wire::error::{Code, Domain, Error};

/// A field's name has fewer bytes than this (libvirt's VIR_TYPED_PARAM_FIELD_LENGTH).
const FIELD_LENGTH: usize = 80;
/// More priority workers are refused. The C daemon starts a thread for each, and was seen to fail
/// at 32,047 for want of memory maps; one that takes over from this daemon must not fail there.
const MOST_PRIORITY_WORKERS: u32 = 32_000;

/// The numbers of a server's thread pool, which has no thread: every call is carried out in the
/// daemon's only thread, at once. They are kept because they can be set and are shown, and because
/// the C daemon keeps them over a restart.
pub fn workers(custody: &Custody, service: Service) -> Answer<'static> {
    let [minimum, maximum, priority] = custody.state().server(service).workers;
    Answer::Parameters(vec![
        Parameter::uint("minWorkers", minimum),
        Parameter::uint("maxWorkers", maximum),
        Parameter::uint("nWorkers", 0),
        Parameter::uint("freeWorkers", 0),
        Parameter::uint("prioWorkers", priority),
        Parameter::uint("jobQueueDepth", 0),
    ])
}

/// Sets numbers of a server's thread pool.
pub fn set_workers(
    custody: &mut Custody,
    service: Service,
    parameters: &[Parameter<'_>],
    caller: &str,
) -> Result<(), Error> {
    let new = settings(parameters, ["minWorkers", "maxWorkers", "prioWorkers"])?;
    let server = *custody.state().server(service);
    let [old_minimum, old_maximum, old_priority] = server.workers;
    let [minimum, maximum, priority] = new;
    let minimum = minimum.unwrap_or(old_minimum);
    let maximum = maximum.unwrap_or(old_maximum);
    let priority = priority.unwrap_or(old_priority);
    if minimum > maximum {
        return Err(invalid("minWorkers cannot be larger than maxWorkers"));
    }
    if (maximum == 0) != (old_maximum == 0) {
        let detail = "maxWorkers must not be switched from zero to non-zero and vice versa";
        return Err(invalid(detail));
    }
    if priority > MOST_PRIORITY_WORKERS {
        let what = b"Failed to create thread";
        return Err(Error::system(Domain::None, what, Errno::EAGAIN));
    }
    let workers = [minimum, maximum, priority];
    custody.set_server(service, Server { workers, ..server });
    tracing::info!(
        target: "admin.admin_server",
        "The {} server shows {minimum} to {maximum} workers and {priority} priority workers from \
         now on, and goes on without any: {caller} asked for it", service.name()
    );
    Ok(())
}

/// How many clients a server has, and may have.
pub fn client_limits(custody: &Custody, service: Service) -> Answer<'static> {
    let state = custody.state();
    let server = state.server(service);
    let count = u32::try_from(state.served_count(service)).unwrap_or(u32::MAX);
    Answer::Parameters(vec![
        Parameter::uint("nclients_max", server.limit),
        Parameter::uint("nclients", count),
        Parameter::uint("nclients_unauth_max", server.unauthenticated_limit),
        Parameter::uint("nclients_unauth", 0),
    ])
}

/// Sets how many clients a server may have. Whoever calls this lets in those that were waiting
/// if there is room for them now; a limit below the number of clients closes none of them.
pub fn set_client_limits(
    custody: &mut Custody,
    service: Service,
    parameters: &[Parameter<'_>],
    caller: &str,
) -> Result<(), Error> {
    let [limit, unauthenticated] = settings(parameters, ["nclients_max", "nclients_unauth_max"])?;
    let server = *custody.state().server(service);
    let limit = limit.unwrap_or(server.limit);
    let unauthenticated = unauthenticated.unwrap_or(server.unauthenticated_limit);
    if limit < unauthenticated {
        let detail = "The overall maximum number of clients must not be less than the number of \
                      clients waiting for authentication";
        return Err(Error::new(Code::InvalidArgument, Domain::Rpc, detail));
    }
    let server = Server {
        limit,
        unauthenticated_limit: unauthenticated,
        ..server
    };
    custody.set_server(service, server);
    tracing::info!(
        target: "admin.admin_server",
        "The {} server takes up to {limit} clients from now on: {caller} asked for it",
        service.name()
    );
    Ok(())
}

/// Refuses field names that libvirt has no room for. This comes before every other check.
pub fn check_names(parameters: &[Parameter<'_>]) -> Result<(), Error> {
    match parameters
        .iter()
        .find(|parameter| parameter.field.len() >= FIELD_LENGTH)
    {
        None => Ok(()),
        Some(parameter) => {
            let detail = [b"parameter ", parameter.field, b" too big for destination"].concat();
            Err(Error::new(Code::InternalError, Domain::None, detail))
        }
    }
}

/// The values of `fields` among the parameters. As in the C daemon they are looked at in the order
/// of their names, which decides the error if there are several mistakes.
fn settings<const N: usize>(
    parameters: &[Parameter<'_>],
    fields: [&str; N],
) -> Result<[Option<u32>; N], Error> {
    let mut sorted: Vec<&Parameter<'_>> = parameters.iter().collect();
    sorted.sort_by_key(|parameter| parameter.field);
    let mut values = [None; N];
    for parameter in sorted {
        let name = String::from_utf8_lossy(parameter.field);
        let known = fields.iter().zip(&mut values);
        let Some((_, value)) = { known }.find(|(field, _)| field.as_bytes() == parameter.field)
        else {
            let detail = [b"parameter '", parameter.field, b"' not supported"].concat();
            return Err(Error::new(Code::ArgumentUnsupported, Domain::None, detail));
        };
        if value.is_some() {
            return Err(invalid(format_args!(
                "parameter '{name}' occurs multiple times"
            )));
        }
        let Value::Uint(number) = parameter.value else {
            return Err(invalid(format_args!(
                "invalid type '{}' for parameter '{name}', expected 'uint'",
                parameter.value.type_name()
            )));
        };
        *value = Some(number);
    }
    Ok(values)
}

fn invalid(detail: impl Display) -> Error {
    Error::new(Code::InvalidArgument, Domain::None, detail.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uint(field: &str, value: u32) -> Parameter<'_> {
        Parameter {
            field: field.as_bytes(),
            value: Value::Uint(value),
        }
    }

    fn refusal(parameters: &[Parameter<'_>]) -> String {
        let error = settings(parameters, ["nclients_max", "nclients_unauth_max"]).unwrap_err();
        String::from_utf8(error.message()).unwrap()
    }

    #[test]
    fn a_field_that_is_not_named_has_no_value() {
        let parameters = [uint("nclients_unauth_max", 7)];
        let values = settings(&parameters, ["nclients_max", "nclients_unauth_max"]);
        assert_eq!(values, Ok([None, Some(7)]));
    }

    // Each of these was seen on libvirt's daemon 11.3.
    #[test]
    fn of_several_mistakes_the_first_by_name_counts() {
        let twice = [uint("nclients_max", 1), uint("nclients_max", 1)];
        let [first, second] = twice.clone();
        for (parameters, message) in [
            (
                vec![uint("zz", 1), uint("aa", 1)],
                "argument unsupported: parameter 'aa' not supported",
            ),
            (
                vec![first.clone(), second.clone(), uint("zz", 1)],
                "invalid argument: parameter 'nclients_max' occurs multiple times",
            ),
            (
                vec![first.clone(), second, uint("aa", 1)],
                "argument unsupported: parameter 'aa' not supported",
            ),
            (
                vec![
                    first,
                    Parameter {
                        field: b"nclients_max",
                        value: Value::Int(1),
                    },
                ],
                "invalid argument: parameter 'nclients_max' occurs multiple times",
            ),
        ] {
            assert_eq!(refusal(&parameters), message);
        }
    }

    #[test]
    fn a_name_of_80_bytes_is_too_long_and_one_of_79_is_not() {
        let name = "f".repeat(80);
        assert!(check_names(&[uint(&name[1..], 1)]).is_ok());
        let error = check_names(&[uint("a", 1), uint(&name, 1)]).unwrap_err();
        let message = format!("internal error: parameter {name} too big for destination");
        assert_eq!(error.message(), message.as_bytes());
    }
}
