//! Named values of several types, in lists.

use std::borrow::Cow;

use super::program::{PARAMETERS_LIMIT, STRING_LIMIT};
use crate::wire::xdr::{DecodeError, Decoder, Encoder};

/// A named value.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter<'a> {
    /// Its name.
    pub field: &'a [u8],
    /// Its value.
    pub value: Value<'a>,
}

impl Parameter<'static> {
    /// An unsigned number.
    pub fn uint(field: &'static str, value: u32) -> Parameter<'static> {
        Parameter {
            field: field.as_bytes(),
            value: Value::Uint(value),
        }
    }
}

/// A value and its type.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// 1
    Int(i32),
    /// 2
    Uint(u32),
    /// 3
    Llong(i64),
    /// 4
    Ullong(u64),
    /// 5
    Double(f64),
    /// 6
    Boolean(bool),
    /// 7
    String(Cow<'a, [u8]>),
}

impl Value<'_> {
    /// The type's name in error texts.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Int(_) => "int",
            Value::Uint(_) => "uint",
            Value::Llong(_) => "llong",
            Value::Ullong(_) => "ullong",
            Value::Double(_) => "double",
            Value::Boolean(_) => "boolean",
            Value::String(_) => "string",
        }
    }

    fn decode<'a>(decoder: &mut Decoder<'a>) -> Result<Value<'a>, DecodeError> {
        match decoder.i32()? {
            1 => decoder.i32().map(Value::Int),
            2 => decoder.u32().map(Value::Uint),
            3 => decoder.i64().map(Value::Llong),
            4 => decoder.u64().map(Value::Ullong),
            5 => decoder.f64().map(Value::Double),
            6 => decoder.i32().map(|word| Value::Boolean(word != 0)),
            7 => decoder
                .string(STRING_LIMIT)
                .map(|text| Value::String(Cow::Borrowed(text))),
            _ => Err(DecodeError::UnknownVariant),
        }
    }

    fn encode(&self, out: &mut Encoder<'_>) {
        match self {
            Value::Int(value) => out.i32(1).i32(*value),
            Value::Uint(value) => out.i32(2).u32(*value),
            Value::Llong(value) => out.i32(3).i64(*value),
            Value::Ullong(value) => out.i32(4).u64(*value),
            Value::Double(value) => out.i32(5).f64(*value),
            Value::Boolean(value) => out.i32(6).i32(i32::from(*value)),
            Value::String(value) => out.i32(7).string(value),
        };
    }
}

/// Decodes a list of at most [`PARAMETERS_LIMIT`].
pub fn decode<'a>(from: &mut Decoder<'a>) -> Result<Vec<Parameter<'a>>, DecodeError> {
    (0..from.count(PARAMETERS_LIMIT)?)
        .map(|_| {
            Ok(Parameter {
                field: from.string(STRING_LIMIT)?,
                value: Value::decode(from)?,
            })
        })
        .collect()
}

/// Appends a list.
pub fn encode(out: &mut Encoder<'_>, parameters: &[Parameter<'_>]) {
    out.count(parameters.len());
    for parameter in parameters {
        out.string(parameter.field);
        parameter.value.encode(out);
    }
}
