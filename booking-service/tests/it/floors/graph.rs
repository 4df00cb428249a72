//! Which source file of a crate names which: read from the tokens, so that comments and strings do not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The arrows between the files of one crate. A file goes by its module path, such as `reservations::insert`; the root is `lib`.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    /// From a file to the files that it names.
    pub(crate) arrows: BTreeMap<String, BTreeSet<String>>,
}

const ROOT: &str = "lib";
const MAIN: &str = "main";

impl Graph {
    /// Reads all of `folder/src`. Modules for tests, `#[cfg(test)]` or with such a condition among others, do not count.
    pub(crate) fn of_crate(folder: &Path) -> Self {
        let source = folder.join("src");
        let mut files = Vec::new();
        rust_files(&source, &mut files);
        let texts: BTreeMap<String, String> = files
            .iter()
            .map(|file| (module_of(file.strip_prefix(&source).unwrap()), fs::read_to_string(file).unwrap()))
            .filter(|(module, _)| !module.split("::").any(|part| part == "tests"))
            .collect();
        let own_name = folder.file_name().unwrap().to_str().unwrap().replace('-', "_");
        Self::of_texts(&texts, &own_name)
    }

    /// The graph of these files, by module path; `own_name` is how the crate's binary names its library.
    pub(crate) fn of_texts(texts: &BTreeMap<String, String>, own_name: &str) -> Self {
        let mut graph = Self::default();
        for (module, text) in texts {
            let tokens: TokenStream = text.parse().unwrap_or_else(|error| panic!("{module}: {error}"));
            let mut paths = Vec::new();
            named_paths(tokens, &mut paths);
            let here: Vec<&str> =
                if [ROOT, MAIN].contains(&module.as_str()) { Vec::new() } else { module.split("::").collect() };
            let targets =
                paths.iter().filter_map(|path| resolve(path, &here, own_name, texts)).filter(|target| target != module);
            graph.arrows.insert(module.clone(), targets.collect());
        }
        graph
    }

    /// Sets of files that reach each other, the largest first.
    pub(crate) fn circles(&self) -> Vec<Vec<&str>> {
        let reached: BTreeMap<&str, BTreeSet<&str>> =
            self.arrows.keys().map(|from| (from.as_str(), self.reached(from))).collect();
        let mut circles: BTreeSet<Vec<&str>> = BTreeSet::new();
        for (from, all) in &reached {
            let circle: Vec<&str> = all.iter().copied().filter(|other| reached[other].contains(from)).collect();
            if circle.len() > 1 {
                circles.insert(circle);
            }
        }
        let mut circles: Vec<_> = circles.into_iter().collect();
        circles.sort_by_key(|circle| std::cmp::Reverse(circle.len()));
        circles
    }

    fn reached(&self, from: &str) -> BTreeSet<&str> {
        let mut reached = BTreeSet::new();
        let mut waiting: Vec<&str> = self.arrows[from].iter().map(String::as_str).collect();
        while let Some(next) = waiting.pop() {
            if reached.insert(next) {
                waiting.extend(self.arrows[next].iter().map(String::as_str));
            }
        }
        reached
    }
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// `reservations/insert.rs` is `reservations::insert`, `auth/mod.rs` is `auth`.
fn module_of(file: &Path) -> String {
    let parts: Vec<&str> = file.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs")).collect();
    match parts.as_slice() {
        [folder @ .., "mod"] => folder.join("::"),
        all => all.join("::"),
    }
}

/// Every path in the code, with braces expanded.
fn named_paths(tokens: TokenStream, found: &mut Vec<Vec<String>>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        if is_test_condition(&tokens, at) {
            // The condition, then everything up to the end of what it applies to.
            at += 2;
            while at < tokens.len() && !ends_item(&tokens[at]) {
                at += 1;
            }
            at += 1;
        } else if let TokenTree::Ident(_) = &tokens[at] {
            at = read_path(&tokens, at, &[], found);
        } else {
            if let TokenTree::Group(group) = &tokens[at] {
                named_paths(group.stream(), found);
            }
            at += 1;
        }
    }
}

/// `#[cfg(test)]`, `#[cfg(all(test, …))]`.
fn is_test_condition(tokens: &[TokenTree], at: usize) -> bool {
    let (TokenTree::Punct(hash), Some(TokenTree::Group(group))) = (&tokens[at], tokens.get(at + 1)) else {
        return false;
    };
    let text: String = group.stream().to_string().split_whitespace().collect();
    hash.as_char() == '#' && (text.starts_with("cfg(test") || text.starts_with("cfg(all(test"))
}

fn ends_item(token: &TokenTree) -> bool {
    match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        TokenTree::Punct(punct) => punct.as_char() == ';',
        _ => false,
    }
}

/// Reads the path that begins at `at`, as the continuation of `before`; where it goes on in braces, each of those. Returns what is behind it.
fn read_path(tokens: &[TokenTree], mut at: usize, before: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let mut path = before.to_vec();
    loop {
        match tokens.get(at) {
            Some(TokenTree::Ident(name)) => path.push(name.to_string()),
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                let mut next = 0;
                while next < inner.len() {
                    next = match &inner[next] {
                        TokenTree::Ident(_) | TokenTree::Group(_) => read_path(&inner, next, &path, found),
                        _ => next + 1,
                    };
                }
                return at + 1;
            }
            _ => break,
        }
        at += 1;
        match (tokens.get(at), tokens.get(at + 1)) {
            (Some(TokenTree::Punct(first)), Some(TokenTree::Punct(second)))
                if first.as_char() == ':' && second.as_char() == ':' =>
            {
                at += 2
            }
            _ => break,
        }
    }
    found.push(path);
    at
}

/// The file in which a path of the file `here` ends, if that is one of this crate.
fn resolve(path: &[String], here: &[&str], own_name: &str, files: &BTreeMap<String, String>) -> Option<String> {
    // `pub(crate)` and `pub(super)` name nothing.
    if path.len() < 2 {
        return None;
    }
    let mut place: Vec<&str> = here.to_vec();
    let mut rest = path.iter().map(String::as_str).peekable();
    match *rest.peek()? {
        "crate" => {
            rest.next();
            place.clear();
        }
        name if name == own_name => {
            rest.next();
            place.clear();
        }
        "self" => {
            rest.next();
        }
        "super" => {
            while rest.next_if_eq(&"super").is_some() {
                place.pop();
            }
        }
        // A child of this module, or a name from elsewhere.
        first if files.contains_key(&[here, &[first]].concat().join("::")) => {}
        _ => return None,
    }
    // `super` alone, before anything is named, is only a way to get at what follows.
    for part in rest {
        place.push(part);
        if !is_module(&place.join("::"), files) {
            place.pop();
            break;
        }
    }
    let module = place.join("::");
    let module = if module.is_empty() { ROOT.to_owned() } else { module };
    files.contains_key(&module).then_some(module)
}

/// A file, or a folder of files without one of its own.
fn is_module(module: &str, files: &BTreeMap<String, String>) -> bool {
    files.contains_key(module) || files.keys().any(|file| file.starts_with(&format!("{module}::")))
}
