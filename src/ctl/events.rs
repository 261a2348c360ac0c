//! `virtlockctl events`: what happens, as it happens.

use std::time::Duration;

use serde_json::{Map, Value};

use super::ask::{Link, Trouble};
use super::exit::{Exit, complain};
use super::options::Common;
use super::show::{self, Out};
use super::text::{self, safe, time};
use super::view;
use crate::wire::status::{Call, Happened, Kind};

/// When nothing has happened for so long it is asked whether the daemon still knows of us: one that is replaced
/// by libvirt's keeps the connection and forgets the subscription.
const SILENCE: Duration = Duration::from_secs(30);

/// Runs the command.
pub fn run(common: &Common, kinds: u32, out: &mut Out) -> Exit {
    let told = Link::open(&common.socket).and_then(|mut link| {
        link.call(&Call::Subscribe(kinds))?;
        tell(common, &mut link, out)
    });
    match told {
        Ok(()) => Exit::Yes,
        Err(trouble) => {
            complain(&trouble.to_string());
            Exit::Unknown
        }
    }
}

/// Until nobody reads any more.
fn tell(common: &Common, link: &mut Link, out: &mut Out) -> Result<(), Trouble> {
    while !out.is_closed() {
        match link.message(SILENCE)? {
            Some(payload) => {
                // A kind of a later version is nobody's here.
                let Ok(happened) = Happened::decode(&payload) else {
                    continue;
                };
                if common.json {
                    out.json_line(&json(&happened));
                } else {
                    out.line(&line(&happened));
                }
            }
            None => _ = view::about(link)?,
        }
    }
    Ok(())
}

fn mode(number: u32) -> Option<&'static str> {
    match number {
        1 => Some("exclusive"),
        2 => Some("shared"),
        _ => None,
    }
}

fn line(happened: &Happened<'_>) -> String {
    let mut line = format!(
        "{} {}",
        time(happened.at).unwrap_or_default(),
        happened.kind.word()
    );
    if happened.kind == Kind::Missed {
        line.push_str(&format!(
            " {} events: too slow to read them",
            happened.count
        ));
    }
    if let Some((key, _, name)) = &happened.owner {
        match &key.uuid {
            Some(uuid) => line.push_str(&format!(
                " domain '{}' (uuid {}, pid {})",
                safe(name),
                text::uuid(uuid),
                key.pid
            )),
            None => line.push_str(&format!(" a domain of process {}", key.pid)),
        }
    }
    if let Some(mode) = mode(happened.mode) {
        line.push_str(&format!(" {mode}"));
    }
    if !happened.name.is_empty() {
        let path = path(happened);
        line.push_str(&format!(" {}", safe(&path)));
    }
    if !happened.text.is_empty() {
        line.push_str(&format!(": {}", safe(happened.text)));
    }
    line
}

fn path(happened: &Happened<'_>) -> Vec<u8> {
    if happened.lockspace.is_empty() {
        happened.name.to_vec()
    } else {
        [happened.lockspace, b"/", happened.name].concat()
    }
}

fn json(happened: &Happened<'_>) -> Value {
    let mut json = Map::new();
    json.insert("time".into(), time(happened.at).into());
    json.insert("event".into(), happened.kind.word().into());
    if happened.kind == Kind::Missed {
        json.insert("count".into(), happened.count.into());
    }
    if let Some((key, id, name)) = &happened.owner {
        let mut owner = Map::new();
        owner.insert("pid".into(), key.pid.into());
        owner.insert("uuid".into(), key.uuid.as_ref().map(text::uuid).into());
        owner.insert("id".into(), (*id).into());
        show::put_bytes(&mut owner, "domain", name);
        json.insert("owner".into(), Value::Object(owner));
    }
    if let Some(mode) = mode(happened.mode) {
        json.insert("mode".into(), mode.into());
    }
    if !happened.name.is_empty() {
        show::put_bytes(&mut json, "lockspace", happened.lockspace);
        show::put_bytes(&mut json, "name", happened.name);
        show::put_bytes(&mut json, "path", &path(happened));
    }
    if !happened.text.is_empty() {
        show::put_bytes(&mut json, "text", happened.text);
    }
    Value::Object(json)
}
