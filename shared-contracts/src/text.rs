//! Texts that people type and read: which characters they may have, and when two of them look the same.
//!
//! A label, a section, a name and a title are one line. Characters that nobody sees would make two chairs out of one,
//! and characters that change the direction of a line would print a ticket wrongly.

use std::borrow::Cow;

use icu_properties::props::{DefaultIgnorableCodePoint, GeneralCategory};
use icu_properties::{CodePointMapData, CodePointSetData};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};
use unicode_security::confusable_detection::skeleton;

/// Between the parts of a [`folded_label`]. No label can contain it.
const SEPARATOR: char = '\u{1F}';
/// Braille's empty cell: a symbol by its category, and blank on paper.
const BRAILLE_BLANK: char = '\u{2800}';
/// They join and separate letters of some scripts, and join emoji.
const JOINERS: [char; 2] = ['\u{200C}', '\u{200D}'];

/// `text` without surrounding blanks, in Unicode's form NFC.
#[must_use]
pub fn normalized(text: &str) -> Cow<'_, str> {
    let text = text.trim();
    match is_nfc_quick(text.chars()) {
        IsNormalized::Yes => text.into(),
        _ => text.nfc().collect::<String>().into(),
    }
}

/// Why `text` can't be a label or a section; `None` if it can. It may have no character that is invisible.
#[must_use]
pub fn fault_in_label(text: &str) -> Option<String> {
    let invisible = CodePointSetData::new::<DefaultIgnorableCodePoint>();
    let is_refused = |character| invisible.contains(character) || character == BRAILLE_BLANK;
    text.chars().enumerate().find_map(|(index, character)| fault_of(index, character, is_refused))
}

/// Why `text` can't be a name or a title; `None` if it can. Beyond a label's characters it may have those that join
/// letters and emoji.
#[must_use]
pub fn fault_in_title(text: &str) -> Option<String> {
    fault_except(text, &JOINERS)
}

/// Why `text` can't be a description; `None` if it can. Beyond a title's characters it may have line breaks and tabs.
#[must_use]
pub fn fault_in_prose(text: &str) -> Option<String> {
    fault_except(text, &['\n', '\r', '\t', JOINERS[0], JOINERS[1]])
}

fn fault_except(text: &str, allowed: &[char]) -> Option<String> {
    let mut characters = text.chars().enumerate().filter(|(_, character)| !allowed.contains(character));
    characters.find_map(|(index, character)| fault_of(index, character, |_| false))
}

fn fault_of(index: usize, character: char, is_refused: impl Fn(char) -> bool) -> Option<String> {
    let kind = match CodePointMapData::<GeneralCategory>::new().get(character) {
        GeneralCategory::Control => "a control character",
        GeneralCategory::Format => "an invisible format character",
        GeneralCategory::LineSeparator | GeneralCategory::ParagraphSeparator => "a line break",
        GeneralCategory::PrivateUse => "a character of private use",
        GeneralCategory::Unassigned => "no character of Unicode",
        _ if is_refused(character) => "an invisible character",
        _ => return None,
    };
    Some(format!("character {} is U+{:04X}, {kind}; remove it", index + 1, u32::from(character)))
}

/// The key by which the seats of a hall are unique: two seats with the same key look the same on a ticket.
///
/// It is the skeleton of Unicode's UTS 39 of section, row and seat. ASCII letters and digits stay apart, because rows
/// `1` and `I` are different on every ticket; `A` in Cyrillic and in Latin are not. Sections fold case too.
#[must_use]
pub fn folded_label(section: Option<&str>, row_number: &str, seat_number: &str) -> String {
    let section = looks(&section.unwrap_or_default().to_lowercase());
    format!("{section}{SEPARATOR}{}{SEPARATOR}{}", looks(row_number), looks(seat_number))
}

/// The characters that `text` looks like. A run of blanks looks like one.
fn looks(text: &str) -> String {
    let mut looks = String::with_capacity(text.len());
    for character in normalized(text).chars() {
        if character.is_ascii() {
            looks.push(character);
        } else {
            let mut buffer = [0; 4];
            looks.extend(skeleton(character.encode_utf8(&mut buffer)).map(|like| ascii_twin(character, like)));
        }
    }
    looks.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// UTS 39 has one prototype for `1`, `I` and `l`, and one for `0` and `O`. As those are kept apart here, a letter or
/// digit of another script becomes the one of its own kind.
fn ascii_twin(character: char, like: char) -> char {
    match like {
        'l' if character.is_numeric() => '1',
        'l' if character.is_uppercase() => 'I',
        'O' if character.is_numeric() => '0',
        _ => like,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn key(row: &str) -> String {
        folded_label(None, row, "1")
    }

    #[test]
    fn ascii_labels_stay_apart() {
        let mut known = HashMap::new();
        for character in ('0'..='9').chain('a'..='z').chain('A'..='Z') {
            assert_eq!(known.insert(key(&character.to_string()), character), None);
        }
        assert_ne!(key("m"), key("rn"));
    }

    #[test]
    fn labels_that_look_the_same_have_one_key() {
        for (one, other) in [
            ("A", "\u{410}"),             // Cyrillic
            ("I", "\u{406}"),             // Cyrillic
            ("B 1", "B\u{A0}1"),          // a blank that does not break
            ("B 1", "B  1"),              // two blanks
            ("\u{E9}", "e\u{301}"),       // composed and not
            ("1", "\u{FF11}"),            // fullwidth
            ("0", "\u{FF10}"),            // fullwidth
            ("A", "\u{1D400}"),           // mathematical
            ("1\u{2013}2", "1\u{2010}2"), // two dashes
        ] {
            assert_eq!(key(one), key(other), "{one:?} and {other:?}");
        }
        assert_ne!(key("1"), key("I"));
        assert_ne!(key("\u{406}"), key("1"));
    }

    #[test]
    fn a_section_folds_case_and_a_missing_one_is_empty() {
        assert_eq!(folded_label(Some("Stalls"), "1", "1"), folded_label(Some("STALLS"), "1", "1"));
        assert_eq!(folded_label(None, "1", "1"), folded_label(Some(""), "1", "1"));
        assert_ne!(folded_label(Some("A"), "1", "1"), folded_label(None, "A1", "1"));
        assert_ne!(key("a"), key("A"));
    }

    #[test]
    fn what_nobody_sees_is_refused_with_its_place() {
        for (text, fault) in [
            ("1\u{200B}", "character 2 is U+200B, an invisible format character; remove it"),
            ("\u{AD}1", "character 1 is U+00AD, an invisible format character; remove it"),
            ("1\u{202E}2", "character 2 is U+202E, an invisible format character; remove it"),
            ("a\nb", "character 2 is U+000A, a control character; remove it"),
            ("a\u{1B}[31m", "character 2 is U+001B, a control character; remove it"),
            ("a\u{2028}b", "character 2 is U+2028, a line break; remove it"),
            ("\u{E000}", "character 1 is U+E000, a character of private use; remove it"),
            ("\u{378}", "character 1 is U+0378, no character of Unicode; remove it"),
            ("\u{3164}", "character 1 is U+3164, an invisible character; remove it"),
            ("\u{2800}", "character 1 is U+2800, an invisible character; remove it"),
            ("a\u{FE0F}", "character 2 is U+FE0F, an invisible character; remove it"),
        ] {
            assert_eq!(fault_in_label(text).as_deref(), Some(fault));
        }
        for good in [
            "1",
            "12b",
            "Loge 3 \u{2013} links",
            "\u{411}\u{430}\u{43B}\u{43A}\u{43E}\u{43D}",
            "\u{5EA}\u{5D0}",
            "\u{30A2}",
        ] {
            assert_eq!(fault_in_label(good), None, "{good:?}");
        }
    }

    #[test]
    fn a_title_may_join_and_a_description_may_break_lines() {
        let persian = "\u{645}\u{6CC}\u{200C}\u{62E}\u{648}\u{627}\u{647}\u{645}";
        assert_eq!(fault_in_title(persian), None);
        assert_eq!(fault_in_title("\u{1F469}\u{200D}\u{1F3A4} live"), None);
        assert_eq!(
            fault_in_title("\u{6CC}\u{200C}\u{202E}").as_deref(),
            Some("character 3 is U+202E, an invisible format character; remove it")
        );
        assert!(fault_in_title("a\nb").is_some());
        assert_eq!(fault_in_prose("a\r\n\tb"), None);
        assert!(fault_in_prose("a\u{1B}[31m").is_some());
    }

    proptest! {
        /// The reference: UTS 39's own skeleton of whatever is not ASCII, with blanks as one.
        #[test]
        fn labels_of_one_skeleton_have_one_key(a in "\\PC{1,4}", b in "\\PC{1,4}") {
            let reference = |text: &str| -> String {
                let spaced = skeleton(&normalized(text)).collect::<String>();
                spaced.split_whitespace().collect::<Vec<_>>().join(" ")
            };
            if key(&a) == key(&b) {
                prop_assert_eq!(reference(&a), reference(&b));
            }
        }

        #[test]
        fn a_key_is_the_same_for_every_form_of_a_text(text in "\\PC{0,8}") {
            prop_assert_eq!(key(&text), key(&text.nfd().collect::<String>()));
            prop_assert_eq!(key(&text), key(&normalized(&text)));
        }

        #[test]
        fn a_text_in_its_form_keeps_it(text in "\\PC{0,8}") {
            let once = normalized(&text).into_owned();
            prop_assert_eq!(normalized(&once), once.as_str());
        }
    }
}
