//! Plain English, as far as a test can see it: no doc comment without content, no sentence with "Who" as its subject, and
//! no overlong line of Markdown prose.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

const LINE_CHARS_MAX: usize = 120;
/// The words before a name that add nothing to it.
const EMPTY_WORDS: [&str; 6] = ["a", "an", "its", "of", "the", "this"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `///`, which describes the next item.
    Doc,
    Comment,
    Text,
}

/// The content of one line of a comment or of a string literal. `line` counts from 1.
#[derive(Debug)]
struct Piece {
    line: usize,
    kind: Kind,
    text: String,
}

impl Piece {
    fn follows(&self, before: &Self) -> bool {
        self.kind == before.kind && self.line == before.line + 1
    }
}

/// The comments and string literals of Rust source text, line by line.
fn pieces_of_rust(source: &str) -> Vec<Piece> {
    let (mut pieces, mut rest, mut line) = (Vec::new(), source, 1);
    while let Some(first) = rest.chars().next() {
        let (kind, start, length) = match first {
            '/' if rest.starts_with("//") => {
                let kind = if rest.starts_with("///") && !rest.starts_with("////") { Kind::Doc } else { Kind::Comment };
                let length = rest.find('\n').unwrap_or(rest.len());
                (kind, length - rest[..length].trim_start_matches(['/', '!']).len(), length)
            }
            '/' if rest.starts_with("/*") => (Kind::Comment, 2, rest.find("*/").map_or(rest.len(), |end| end + 2)),
            '"' => (Kind::Text, 1, length_of_string(rest)),
            'r' if rest[1..].trim_start_matches('#').starts_with('"') => {
                let hashes = rest[1..].find('"').unwrap();
                let end = format!("\"{}", "#".repeat(hashes));
                let start = hashes + 2;
                (Kind::Text, start, rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len()))
            }
            // A character literal; a lifetime has no second quote so soon.
            '\'' if rest.starts_with("'\\") => (Kind::Text, 0, rest[3..].find('\'').map_or(1, |at| at + 4)),
            '\'' if rest.chars().nth(2) == Some('\'') => {
                (Kind::Text, 0, rest.chars().take(3).map(char::len_utf8).sum())
            }
            letter if letter.is_alphanumeric() || letter == '_' => {
                rest = rest.trim_start_matches(|next: char| next.is_alphanumeric() || next == '_');
                continue;
            }
            other => {
                line += usize::from(other == '\n');
                rest = &rest[other.len_utf8()..];
                continue;
            }
        };
        for (offset, text) in rest[start..length].split('\n').enumerate() {
            pieces.push(Piece { line: line + offset, kind, text: text.trim().to_owned() });
        }
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    pieces
}

/// The bytes of a string literal with its quotes.
fn length_of_string(text: &str) -> usize {
    let mut is_escaped = false;
    for (at, letter) in text.char_indices().skip(1) {
        match letter {
            '"' if !is_escaped => return at + 1,
            '\\' => is_escaped = !is_escaped,
            _ => is_escaped = false,
        }
    }
    text.len()
}

/// The comments of a script or settings file: whole lines that begin with `#`.
fn pieces_of_script(source: &str) -> Vec<Piece> {
    let comment = |(at, text): (usize, &str)| {
        let text = text.trim_start().strip_prefix('#')?;
        Some(Piece { line: at + 1, kind: Kind::Comment, text: text.trim().to_owned() })
    };
    source.lines().enumerate().filter_map(comment).collect()
}

/// The lines of Markdown that are prose: not code, tables, headings or link definitions.
fn prose_of_markdown(source: &str) -> Vec<Piece> {
    let (mut prose, mut fence) = (Vec::new(), None);
    for (at, text) in source.lines().enumerate() {
        let bare = text.trim_start();
        if let Some(mark) = ["```", "~~~"].into_iter().find(|mark| bare.starts_with(mark)) {
            match fence {
                Some(open) if open == mark => fence = None,
                Some(_) => {}
                None => fence = Some(mark),
            }
            continue;
        }
        let is_definition = bare.starts_with('[') && bare.contains("]: ");
        if fence.is_none() && !bare.starts_with(['|', '#']) && !is_definition {
            prose.push(Piece { line: at + 1, kind: Kind::Text, text: text.to_owned() });
        }
    }
    prose
}

/// The lines with a sentence that has "Who" as its subject. Questions may begin so.
fn lines_with_who(pieces: &[Piece]) -> Vec<usize> {
    let mut lines = Vec::new();
    for (at, piece) in pieces.iter().enumerate() {
        for (start, _) in piece.text.match_indices("Who ") {
            let is_word = piece.text[..start].chars().next_back().is_none_or(|before| !before.is_alphanumeric());
            let next = piece.text[start + 4..].chars().next();
            if is_word && next.is_some_and(char::is_lowercase) && !is_question(&pieces[at..], start) {
                lines.push(piece.line);
            }
        }
    }
    lines
}

/// Whether the sentence at `start` of the first piece ends with a question mark, there or on a later line.
fn is_question(pieces: &[Piece], start: usize) -> bool {
    let mut text = &pieces[0].text[start..];
    for (at, piece) in pieces.iter().enumerate() {
        if let Some(end) = text.find(['.', '!', '?']) {
            return text[end..].starts_with('?');
        }
        match pieces.get(at + 1) {
            Some(next) if next.follows(piece) => text = &next.text,
            _ => return false,
        }
    }
    false
}

fn words_of(text: &str) -> Vec<String> {
    text.split(|letter: char| !letter.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect()
}

/// The words of the item that a doc comment before `lines` describes; none if no name is found.
fn item_words(lines: &[&str]) -> HashSet<String> {
    let mut depth = 0;
    for line in lines.iter().map(|line| line.trim()) {
        if depth > 0 || line.starts_with("#[") {
            depth += line.matches('[').count() as i64 - line.matches(']').count() as i64;
            continue;
        }
        let keywords = ["pub", "pub(crate)", "pub(super)", "async", "const", "static", "fn", "struct", "enum", "trait"];
        let others = ["type", "mod", "union", "unsafe", "extern"];
        let name = line.split_whitespace().find(|word| !keywords.contains(word) && !others.contains(word));
        let name = name.unwrap_or_default().trim_start_matches("r#");
        let name: String = name.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
        // `SeatStatus` and `seat_status` have the same words.
        let camel = name.chars().any(char::is_lowercase);
        let spaced = name.chars().flat_map(|letter| [(camel && letter.is_uppercase()).then_some(' '), Some(letter)]);
        return words_of(&spaced.flatten().collect::<String>().replace('_', " ")).into_iter().collect();
    }
    HashSet::new()
}

/// Whether a doc comment says nothing: it has at most two words, or it is an article and the words of the item's own name.
///
/// A name in backquotes says something: the setting that a field is read from, for example.
fn is_empty_doc(text: &str, item: &HashSet<String>) -> bool {
    let words = words_of(text);
    let says_nothing = |word: &String| EMPTY_WORDS.contains(&word.as_str()) || item.contains(word);
    let repeats = words.first().is_some_and(|first| EMPTY_WORDS.contains(&first.as_str()));
    !text.contains('`') && (text.split_whitespace().count() <= 2 || repeats && words.iter().all(says_nothing))
}

/// The lines of doc comments that say nothing. Summaries of API operations are titles and may be short.
fn lines_of_empty_docs(source: &str) -> Vec<usize> {
    let (pieces, lines) = (pieces_of_rust(source), source.lines().collect::<Vec<_>>());
    let docs: Vec<&Piece> = pieces.iter().filter(|piece| piece.kind == Kind::Doc).collect();
    let is_empty = |block: &&[&Piece]| {
        let text: Vec<&str> = block.iter().map(|piece| piece.text.as_str()).collect();
        let below = &lines[block[block.len() - 1].line..];
        let is_operation = below.first().is_some_and(|line| line.trim().starts_with("#[utoipa::path"));
        !is_operation && is_empty_doc(&text.join(" "), &item_words(below))
    };
    docs.chunk_by(|before, after| after.follows(before)).filter(is_empty).map(|block| block[0].line).collect()
}

fn overlong_lines(source: &str) -> Vec<usize> {
    // A line without a space, such as an address, can't be broken.
    let is_overlong = |piece: &Piece| piece.text.chars().count() > LINE_CHARS_MAX && piece.text.trim().contains(' ');
    prose_of_markdown(source).iter().filter(|piece| is_overlong(piece)).map(|piece| piece.line).collect()
}

/// Every file that is under version control, with its path from the top.
fn tracked_files(endings: &[&str]) -> Vec<(String, String)> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(top).output().unwrap();
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout).unwrap();
    let paths = listed.split('\0').filter(|path| endings.iter().any(|ending| path.ends_with(ending)));
    // A file that is moved or deleted and not committed yet is still listed.
    let files: Vec<_> =
        paths.filter_map(|path| Some((path.to_owned(), fs::read_to_string(top.join(path)).ok()?))).collect();
    assert!(!files.is_empty(), "no file ends with {endings:?}");
    files
}

#[track_caller]
fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}; {} places:\n{}", found.len(), found.join("\n"));
}

fn places(files: &[(String, String)], lines: impl Fn(&str, &str) -> Vec<usize>) -> Vec<String> {
    files
        .iter()
        .flat_map(|(path, text)| lines(path, text).into_iter().map(move |line| format!("{path}:{line}")))
        .collect()
}

#[test]
fn every_doc_comment_says_something() {
    let found = places(&tracked_files(&[".rs"]), |_, text| lines_of_empty_docs(text));
    assert_none(&found, "a doc comment says more than the name: a unit, a limit, who sets it, when it is absent");
}

#[test]
fn no_sentence_has_who_as_its_subject() {
    // Not the migrations: a database that has run one accepts no other text of it.
    let files = tracked_files(&[".rs", ".md", ".sh", ".toml", ".yml", ".py"]);
    let found = places(&files, |path, text| {
        lines_with_who(&match path.rsplit_once('.').map(|(_, ending)| ending) {
            Some("rs") => pieces_of_rust(text),
            Some("md") => prose_of_markdown(text),
            _ => pieces_of_script(text),
        })
    });
    assert_none(&found, "name the actor, such as \"A caller that\"");
}

#[test]
fn no_line_of_markdown_prose_is_overlong() {
    let found = places(&tracked_files(&[".md"]), |_, text| overlong_lines(text));
    assert_none(&found, &format!("break lines after {LINE_CHARS_MAX} characters"));
}

#[test]
fn docs_without_content_are_found_and_others_are_not() {
    for bad in [
        "/// Its id.\npub id: Uuid,",
        "/// The session.\npub session_id: Uuid,",
        "/// How.\n#[serde(rename = \"x\")]\nKind,",
        "/// It does.\nYes,",
        "    /// Made\n    Created,",
        "/// The seat status.\npub enum SeatStatus {",
        "/// The status of the seat.\n#[derive(\n    Debug,\n)]\npub enum SeatStatus {",
        "/// Its waiting room.\npub(crate) async fn waiting_room(&self) {",
    ] {
        assert_eq!(lines_of_empty_docs(bad), [1], "{bad}");
    }
    for good in [
        "/// The reservation's id; null until it is paid.\npub reservation_id: Option<Uuid>,",
        "/// The most seats in a session.\npub const SEATS_MAX: usize = 9;",
        "// Two words.\nfn other() {}",
        "//! A module\n",
        "const TEXT: &str = \"/// Its id.\";",
        "/// List events\n#[utoipa::path(get)]\nasync fn list() {",
        "/// `EXPIRY_SECONDS`.\npub expiry: Duration,",
        "/// Get a session by id\npub fn get_session_by_id() {",
        "/// The id.\n///\n/// Clients read it from `Location`.\npub id: Uuid,",
    ] {
        assert!(lines_of_empty_docs(good).is_empty(), "{good}");
    }
}

#[test]
fn who_as_a_subject_is_found_and_questions_are_not() {
    // Put together, so that this file does not break the rule itself.
    let who = concat!("Wh", "o");
    for bad in [
        format!("// {who} asks too often waits.\n"),
        format!("fn a() {{}} // It waits. {who} comes later waits, too.\n"),
        format!("/// {who} reads\n/// this waits.\n"),
        format!("//! {who} sells\n"),
        format!("let (a, b): (&'static str, char) = (\"{who} pays gets tickets\", '\"');\n"),
        format!("let raw = r#\"{who} pays \"now\" gets tickets.\"#;\n"),
        format!("/* {who} pays gets tickets. */\n"),
    ] {
        assert_eq!(lines_with_who(&pieces_of_rust(&bad)), [1], "{bad}");
    }
    for good in [
        format!("// {who} is that?\n"),
        format!("/// {who} may call\n/// this?\n"),
        "// The caller who asks waits.\n".to_owned(),
        format!("let column = \"{who} | What\";\n"),
        format!("let quote = '\"'; // {who}ever asks waits.\n"),
    ] {
        assert!(lines_with_who(&pieces_of_rust(&good)).is_empty(), "{good}");
    }
    let script = format!("echo \"{who} asks\"\n  # {who} asks waits.\n");
    assert_eq!(lines_with_who(&pieces_of_script(&script)), [2]);
    let markdown = format!("# {who} may call\n\n- **Fair use.** {who} asks waits.\n```\n{who} asks\n```\n");
    assert_eq!(lines_with_who(&prose_of_markdown(&markdown)), [3]);
}

#[test]
fn overlong_prose_is_found_and_code_tables_and_links_are_not() {
    let long = "word ".repeat(30);
    let short = "ü".repeat(LINE_CHARS_MAX - 2);
    for good in [
        format!("| {long} |"),
        format!("```text\n{long}\n```"),
        format!("[guide]: {long}"),
        format!("# {long}"),
        format!("{short} x"),
        format!("https://example.com/{}", "x".repeat(200)),
    ] {
        assert!(overlong_lines(&good).is_empty(), "{good}");
    }
    assert_eq!(overlong_lines(&format!("short\n{long}\n  - {long}\n```\n{long}\n```\n{long}\n")), [2, 3, 7]);
}
