//! What a file of `src/` names, read from its text as far as the rules of the house need it: the words
//! of the code without comments, strings and tests, its modules, its imports, and the paths in it. It is
//! no parser of Rust. What it would misread it refuses.

/// A word, number or sign of the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

/// A path as it is written, with what it is called in this file if it is an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    pub segments: Vec<String>,
    pub alias: Option<String>,
    pub line: usize,
}

/// One file, without its tests.
#[derive(Debug, Default)]
pub struct Source {
    pub tokens: Vec<Token>,
    /// The modules that it declares.
    pub modules: Vec<String>,
    /// Those of them that are for tests alone.
    pub test_modules: Vec<String>,
    /// What it imports.
    pub imports: Vec<Path>,
    /// The other paths in its code, those of one word left out.
    pub paths: Vec<Path>,
}

/// Reads a file.
pub fn read(text: &str) -> Result<Source, String> {
    let mut source = Source::default();
    source.tokens = without_tests(tokens(text), &mut source.test_modules);
    let tokens = &source.tokens;
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            "mod" if is(tokens, at + 2, ";") => {
                source.modules.push(tokens[at + 1].text.clone());
                at += 3;
            }
            "mod" if is(tokens, at + 2, "{") => {
                return Err(format!(
                    "line {}: a module that is no test is a file of its own",
                    token.line
                ));
            }
            // Who may see something is no import.
            "pub" if is(tokens, at + 1, "(") && !is(tokens, at + 2, "(") => {
                at = behind_group(tokens, at + 1);
            }
            "use" if !is(tokens, at + 1, "<") => {
                at = tree(tokens, at + 1, &[], &mut source.imports)?;
                if !is(tokens, at, ";") {
                    return Err(format!(
                        "line {}: this import is not understood",
                        token.line
                    ));
                }
            }
            _ if is_word(&token.text) && is(tokens, at + 1, "::") => {
                let is_rest = at > 0 && is(tokens, at - 1, "::");
                let (segments, behind) = path(tokens, at);
                if !is_rest && segments.len() > 1 {
                    source.paths.push(Path {
                        segments,
                        alias: None,
                        line: token.line,
                    });
                }
                at = behind;
            }
            _ => at += 1,
        }
    }
    Ok(source)
}

/// Whether a sign stands at a place.
pub fn is(tokens: &[Token], at: usize, text: &str) -> bool {
    tokens.get(at).is_some_and(|token| token.text == text)
}

/// Whether this is a name or a keyword.
pub fn is_word(text: &str) -> bool {
    text.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// The words of a path that begins here, and the place behind it.
pub fn path(tokens: &[Token], mut at: usize) -> (Vec<String>, usize) {
    let mut segments = vec![tokens[at].text.clone()];
    while is(tokens, at + 1, "::") && tokens.get(at + 2).is_some_and(|next| is_word(&next.text)) {
        segments.push(tokens[at + 2].text.clone());
        at += 2;
    }
    (segments, at + 1)
}

/// Reads `a::{b, c as d, self}` behind a `use`, and gives the place behind it.
fn tree(
    tokens: &[Token],
    mut at: usize,
    before: &[String],
    imports: &mut Vec<Path>,
) -> Result<usize, String> {
    let mut segments = before.to_vec();
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            "{" => {
                at += 1;
                while !is(tokens, at, "}") {
                    at = tree(tokens, at, &segments, imports)?;
                    if is(tokens, at, ",") {
                        at += 1;
                    } else if !is(tokens, at, "}") {
                        return Err(format!(
                            "line {}: this import is not understood",
                            token.line
                        ));
                    }
                }
                return Ok(at + 1);
            }
            "::" => at += 1,
            "*" => {
                segments.push("*".into());
                at += 1;
            }
            // `self` behind something is that itself.
            "self" if !segments.is_empty() => at += 1,
            word if is_word(word) && word != "as" => {
                segments.push(word.to_owned());
                at += 1;
            }
            _ => break,
        }
    }
    let mut alias = segments.last().cloned();
    let line = tokens
        .get(at.saturating_sub(1))
        .map_or(0, |token| token.line);
    if is(tokens, at, "as") {
        alias = tokens.get(at + 1).map(|token| token.text.clone());
        at += 2;
    }
    imports.push(Path {
        segments,
        alias,
        line,
    });
    Ok(at)
}

/// Takes away whatever `#[cfg(test)]` stands before.
fn without_tests(tokens: Vec<Token>, test_modules: &mut Vec<String>) -> Vec<Token> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if (0..MARK.len()).all(|step| is(&tokens, at + step, MARK[step])) {
            let start = at + MARK.len();
            at = behind_item(&tokens, start);
            if is(&tokens, at - 1, ";") && is(&tokens, at - 3, "mod") {
                test_modules.push(tokens[at - 2].text.clone());
            }
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// The place behind an item: behind its block, or its semicolon if it has none before that.
fn behind_item(tokens: &[Token], mut at: usize) -> usize {
    let mut is_import = false;
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            ";" => return at + 1,
            "use" => {
                is_import = true;
                at += 1;
            }
            "{" if !is_import => return behind_group(tokens, at),
            "{" | "(" | "[" => at = behind_group(tokens, at),
            _ => at += 1,
        }
    }
    at
}

/// The place behind the bracket that closes the one here.
pub fn behind_group(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0usize;
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => (),
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The code of a text: without comments, and of strings and characters only that they are there.
pub fn tokens(text: &str) -> Vec<Token> {
    let bytes: Vec<char> = text.chars().collect();
    let at = |place: usize| bytes.get(place).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let (mut place, mut line) = (0, 1);
    while place < bytes.len() {
        let start = place;
        let first = at(place);
        if first == '/' && at(place + 1) == '/' {
            while place < bytes.len() && at(place) != '\n' {
                place += 1;
            }
        } else if first == '/' && at(place + 1) == '*' {
            let mut depth = 0;
            loop {
                match (at(place), at(place + 1)) {
                    ('/', '*') => {
                        depth += 1;
                        place += 2;
                    }
                    ('*', '/') => {
                        depth -= 1;
                        place += 2;
                    }
                    _ => place += 1,
                }
                if depth == 0 || place >= bytes.len() {
                    break;
                }
            }
        } else if let Some(behind) = behind_string(&bytes, place) {
            place = behind;
            push(&mut tokens, "\"\"".into(), line);
        } else if first == '\'' && at(place + 1) != '\\' && at(place + 2) != '\'' {
            place += 1;
            while at(place).is_alphanumeric() || at(place) == '_' {
                place += 1;
            }
            push(&mut tokens, bytes[start..place].iter().collect(), line);
        } else if first == '\'' {
            // A character; an escaped one may itself be a quotation mark.
            place += if at(place + 1) == '\\' { 3 } else { 2 };
            while place < bytes.len() && at(place) != '\'' {
                place += 1;
            }
            place += 1;
            push(&mut tokens, "''".into(), line);
        } else if first.is_alphanumeric() || first == '_' {
            while at(place).is_alphanumeric() || at(place) == '_' {
                place += 1;
            }
            push(&mut tokens, bytes[start..place].iter().collect(), line);
        } else if first == ':' && at(place + 1) == ':' {
            place += 2;
            push(&mut tokens, "::".into(), line);
        } else {
            place += 1;
            if !first.is_whitespace() {
                push(&mut tokens, first.to_string(), line);
            }
        }
        line += bytes[start..place.min(bytes.len())]
            .iter()
            .filter(|sign| **sign == '\n')
            .count();
    }
    tokens
}

fn push(tokens: &mut Vec<Token>, text: String, line: usize) {
    tokens.push(Token { text, line });
}

/// The place behind a string that begins here, if one does.
fn behind_string(bytes: &[char], start: usize) -> Option<usize> {
    let at = |place: usize| bytes.get(place).copied().unwrap_or('\0');
    let mut place = start;
    while matches!(at(place), 'b' | 'c' | 'r') && place < start + 2 {
        place += 1;
    }
    let is_raw = place > start && at(place - 1) == 'r';
    let mut marks = 0;
    while is_raw && at(place) == '#' {
        marks += 1;
        place += 1;
    }
    if at(place) != '"' {
        return None;
    }
    place += 1;
    while place < bytes.len() {
        match at(place) {
            '\\' if !is_raw => place += 2,
            '"' if (1..=marks).all(|mark| at(place + mark) == '#') => {
                return Some(place + 1 + marks);
            }
            _ => place += 1,
        }
    }
    Some(place)
}
