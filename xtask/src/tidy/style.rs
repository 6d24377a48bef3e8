//! Rules about the text of Rust files.

use super::Finding;
use super::source::Source;

const MAX_LINES: usize = 500;

/// One idea per file.
pub fn file_size(text: &str) -> Vec<Finding> {
    let lines = text.lines().count();
    if lines <= MAX_LINES {
        return Vec::new();
    }
    vec![Finding::at(0, format!("{lines} lines, at most {MAX_LINES} are allowed: split it by idea"))]
}

/// A crate starts with what it is.
pub fn crate_docs(text: &str) -> Vec<Finding> {
    if text.starts_with("//! ") {
        return Vec::new();
    }
    vec![Finding::at(1, "a crate starts with documentation: `//! …`")]
}

/// Every `unsafe` block and impl says why it is sound. Clippy checks this too, but only in code that this machine
/// compiles.
pub fn safety_comments(source: &Source) -> Vec<Finding> {
    let (code, comments) = (source.code(), source.comments());
    let opens = |line: &str| words_follow(line, "unsafe", &["{", "impl"]);
    let missing = (0..code.len()).filter(|&line| opens(code[line]) && !is_argued(line, &code, &comments));
    missing.map(|line| Finding::at(line + 1, "`unsafe` without a `// SAFETY:` comment above it")).collect()
}

/// Whether a SAFETY comment stands on `line` or above the statement that `line` belongs to.
fn is_argued(line: usize, code: &[&str], comments: &[&str]) -> bool {
    if comments[line].contains("SAFETY:") {
        return true;
    }
    let mut above = line;
    let mut in_comment = false;
    while above > 0 {
        above -= 1;
        let (code, comment) = (code[above].trim(), comments[above].trim());
        if comment.contains("SAFETY:") {
            return true;
        }
        let is_comment = code.is_empty() && !comment.is_empty();
        let is_attribute = code.starts_with("#[");
        // Another statement begins where the one above ended, and a comment belongs to what follows it.
        let other_statement = code.is_empty() && !is_comment || code.ends_with([';', '{', '}']) || in_comment;
        if !is_comment && !is_attribute && other_statement {
            return false;
        }
        in_comment |= is_comment;
    }
    false
}

/// Whether `word` is in `line`, as a word, with one of `next` behind it.
fn words_follow(line: &str, word: &str, next: &[&str]) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let behind = line[at + word.len()..].trim_start();
        !before.is_some_and(is_word) && next.iter().any(|n| behind.starts_with(n))
    })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// What must not be left in the code.
pub fn forbidden_code(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(source.code()) {
        for name in ["todo", "unimplemented", "dbg"] {
            if words_follow(line, name, &["!"]) {
                findings.push(Finding::at(number, format!("`{name}!` in code")));
            }
        }
        if words_follow(line, "#[ignore", &["]", "="]) {
            findings.push(Finding::at(number, "an ignored test: fix it or delete it"));
        }
    }
    findings
}

/// A note that something is unfinished belongs in an issue.
pub fn unfinished_comments(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(source.comments()) {
        let mut words = line.split(|c| !is_word(c));
        if let Some(word) = words.find(|word| matches!(*word, "FIXME" | "XXX")) {
            findings.push(Finding::at(number, format!("{word} in a comment: fix it or open an issue")));
        }
    }
    findings
}

/// What a library does depends on its arguments alone.
pub fn environment_reads(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(source.code()) {
        if words_follow(line, "env", &["::var"]) || words_follow(line, "option_env", &["!"]) {
            findings.push(Finding::at(number, "a library reads the environment"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(rule: fn(&Source) -> Vec<Finding>, text: &str) -> Vec<usize> {
        rule(&Source::parse(text)).into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn unsafe_without_a_reason_is_found() {
        for bad in [
            "fn f() {\n    unsafe { g() }\n}",
            "// SAFETY: of the first.\nlet a = unsafe { f() };\nlet b = unsafe { g() };",
            "// SAFETY: too far away.\n\nlet a = 1;\nunsafe { f() }",
            "unsafe impl Send for X {}",
            "// SAFETY: the first type.\nunsafe impl Send for X {}\nunsafe impl Sync for X {}",
            "let s = \"// SAFETY: in a string\"; unsafe { f() }",
        ] {
            assert_eq!(lines(safety_comments, bad), [bad.lines().count().min(bad_line(bad))], "{bad}");
        }
    }

    /// The last line of a snippet with `unsafe` in it.
    fn bad_line(text: &str) -> usize {
        text.lines().count() - text.lines().rev().position(|line| line.contains("unsafe")).unwrap()
    }

    #[test]
    fn unsafe_with_a_reason_is_not() {
        for good in [
            "// SAFETY: it is.\nunsafe { f() }",
            "unsafe { f() } // SAFETY: it is.",
            "// SAFETY: it is,\n// in two lines.\n#[allow(x)]\nunsafe impl Send for X {}",
            "// SAFETY: of the statement.\nlet a = f(\n    b,\n    unsafe { c() },\n);",
            "/// # Safety\n/// None.\npub unsafe fn f() {}",
            "#![deny(unsafe_code)]\nlet not_unsafe = 1;",
            "// unsafe { in a comment }",
        ] {
            assert_eq!(lines(safety_comments, good), [0; 0], "{good}");
        }
    }

    #[test]
    fn leftovers_are_found_in_code_only() {
        let bad =
            "fn f() {\n    todo!()\n}\n#[ignore]\n#[ignore = \"slow\"]\nlet x = dbg!(1);\nunimplemented!();";
        assert_eq!(lines(forbidden_code, bad), [2, 4, 5, 6, 7]);
        assert_eq!(lines(forbidden_code, "/// ..todo!()\nlet s = \"dbg!(x)\"; my_todo!();"), [0; 0]);
    }

    #[test]
    fn unfinished_comments_are_found() {
        assert_eq!(
            lines(unfinished_comments, "a // FIXME: later\nb /* XXX */\nc // XXXL\n\"FIXME\""),
            [1, 2]
        );
    }

    #[test]
    fn environment_reads_are_found() {
        let bad =
            "let a = std::env::var(\"A\");\nuse std::env::vars;\nenv::var_os(\"B\");\noption_env!(\"C\");";
        assert_eq!(lines(environment_reads, bad), [1, 2, 3, 4]);
        assert_eq!(lines(environment_reads, "env!(\"CARGO_PKG_VERSION\"); // std::env::var"), [0; 0]);
    }

    #[test]
    fn long_files_and_undocumented_crates_are_found() {
        assert!(file_size(&"x\n".repeat(MAX_LINES)).is_empty());
        assert_eq!(file_size(&"x\n".repeat(MAX_LINES + 1)).len(), 1);
        assert!(crate_docs("//! What it is.\n").is_empty());
        assert_eq!(crate_docs("mod a;\n//! Late.\n").len(), 1);
    }
}
