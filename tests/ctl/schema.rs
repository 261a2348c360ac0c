//! The schema of what the program prints, and as much of JSON Schema as it uses. That a word of it is not
//! understood here is a failure.

use serde_json::Value;

fn schema() -> Value {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/src/dist/virtlockctl.schema.json"
    );
    let text = std::fs::read_to_string(path).expect("read the schema");
    serde_json::from_str(&text).expect("the schema is JSON")
}

/// A document, if it is one and as the schema says.
#[track_caller]
pub fn check(text: &str) -> Value {
    let value: Value =
        serde_json::from_str(text).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"));
    let schema = schema();
    if let Err(reason) = fits(&value, &schema, &schema) {
        panic!("{reason}: {value:#}");
    }
    value
}

fn fits(value: &Value, rule: &Value, schema: &Value) -> Result<(), String> {
    for (word, said) in rule.as_object().expect("a rule is an object") {
        match word.as_str() {
            "$schema" | "$defs" | "title" | "description" => (),
            "$ref" => {
                let path = said.as_str().and_then(|path| path.strip_prefix('#'));
                let rule = path.and_then(|path| schema.pointer(path));
                fits(value, rule.expect("what is referred to"), schema)?;
            }
            "anyOf" => {
                let rules = said.as_array().expect("rules");
                let failed: Result<Vec<String>, ()> = rules
                    .iter()
                    .map(|rule| fits(value, rule, schema).err().ok_or(()))
                    .collect();
                if let Ok(reasons) = failed {
                    return Err(format!("none fits: {reasons:#?}"));
                }
            }
            "type" => {
                let one = [said.clone()];
                let types = said.as_array().map_or(&one[..], Vec::as_slice);
                let is = |kind: &Value| match kind.as_str().expect("a type") {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "null" => value.is_null(),
                    other => panic!("the type {other}"),
                };
                if !types.iter().any(is) {
                    return Err(format!("{value} is no {said}"));
                }
            }
            "enum" => {
                if !said.as_array().expect("values").contains(value) {
                    return Err(format!("{value} is none of {said}"));
                }
            }
            "required" => {
                for name in said.as_array().expect("names") {
                    let name = name.as_str().expect("a name");
                    if value.get(name).is_none() {
                        return Err(format!("'{name}' is missing"));
                    }
                }
            }
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    fits(item, said, schema)?;
                }
            }
            "properties" => {
                for (name, item) in value.as_object().into_iter().flatten() {
                    match said.get(name) {
                        Some(rule) => fits(item, rule, schema)
                            .map_err(|reason| format!("{name}: {reason}"))?,
                        None => return Err(format!("'{name}' is not in the schema")),
                    }
                }
            }
            // What no name of these is not to be there was seen above.
            "additionalProperties" if said == false => assert!(rule.get("properties").is_some()),
            "additionalProperties" => {
                for (_, item) in value.as_object().into_iter().flatten() {
                    fits(item, said, schema)?;
                }
            }
            other => panic!("this test does not know the schema's word '{other}'"),
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_the_schema_is_seen() {
    let schema = schema();
    let fits = |text: &str| fits(&serde_json::from_str(text).unwrap(), &schema, &schema).is_ok();
    assert!(fits(r#"{"time": null, "event": "upgraded"}"#));
    for wrong in [
        r#"{"time": null}"#,
        r#"{"time": 5, "event": "upgraded"}"#,
        r#"{"time": null, "event": "else"}"#,
        r#"{"time": null, "event": "upgraded", "more": 1}"#,
        "[]",
    ] {
        assert!(!fits(wrong), "{wrong}");
    }
}
