//! Links in Markdown files.

use super::Finding;

/// Links to files for which `exists` is false. Addresses and anchors on the same page are not looked at.
pub fn broken_links(text: &str, exists: impl Fn(&str) -> bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut in_fence = false;
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim_start().starts_with("```") {
            in_fence = !in_fence;
            continue;
        }
        if in_fence {
            continue;
        }
        for target in targets(&without_code(line)) {
            let file = target.split('#').next().unwrap_or("");
            if !file.is_empty() && !is_address(file) && !exists(file) {
                findings.push(Finding::at(number, format!("link to {file}, which does not exist")));
            }
        }
    }
    findings
}

fn is_address(target: &str) -> bool {
    target.contains("://") || target.starts_with("mailto:")
}

/// `line` without its `code` spans.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("``")
}

/// Targets of `[text](target)`, `[text](target "title")` and `[name]: target`.
fn targets(line: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(at) = rest.find("](") {
        rest = &rest[at + 2..];
        if let Some(end) = rest.find(')') {
            found.extend(rest[..end].split_whitespace().next().map(str::to_string));
        }
    }
    let definition = line.trim_start().strip_prefix('[').and_then(|l| l.split_once("]: "));
    found.extend(definition.and_then(|(_, target)| target.split_whitespace().next()).map(str::to_string));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(text: &str) -> Vec<usize> {
        broken_links(text, |file| file == "there.md").into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn links_to_missing_files_are_found() {
        assert_eq!(
            broken("[a](gone.md)\n[b](there.md) [c](gone.md#part \"title\")\n\n[d]: gone.md"),
            [1, 2, 4]
        );
    }

    #[test]
    fn other_links_are_left_alone() {
        let good = "[a](there.md#x) [b](https://example.org) [c](#part)\n```\n[d](gone.md)\n```\n`[e](gone.md)` x[0](1";
        assert_eq!(broken(good), [0; 0]);
    }
}
