//! Rust source split into code and comments, so that a rule about one is not fooled by the other.

/// A source file as two texts of the same lines: in `code`, comments and the contents of literals are blanks; in
/// `comments`, everything else is.
pub struct Source {
    code: String,
    comments: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Code,
    Comment,
    Literal,
}

impl Source {
    /// Splits `text`.
    pub fn parse(text: &str) -> Self {
        let mut source = Self { code: String::with_capacity(text.len()), comments: String::new() };
        let mut rest = text;
        let mut previous = ' ';
        while let Some(first) = rest.chars().next() {
            let (part, len) = next_piece(rest, first, previous);
            let (piece, tail) = rest.split_at(len);
            source.push(part, piece);
            previous = piece.chars().next_back().unwrap_or(' ');
            rest = tail;
        }
        source
    }

    fn push(&mut self, part: Part, piece: &str) {
        let blank = |c: char| if c == '\n' { '\n' } else { ' ' };
        match part {
            Part::Code => {
                self.code.push_str(piece);
                self.comments.extend(piece.chars().map(blank));
            }
            Part::Comment => {
                self.code.extend(piece.chars().map(blank));
                self.comments.push_str(piece);
            }
            Part::Literal => {
                // The quotes stay, so that a literal still separates what is around it.
                let last = piece.chars().count() - 1;
                let quoted =
                    piece.chars().enumerate().map(|(i, c)| if i == 0 || i == last { c } else { blank(c) });
                self.code.extend(quoted);
                self.comments.extend(piece.chars().map(blank));
            }
        }
    }

    /// Lines of code.
    pub fn code(&self) -> Vec<&str> {
        self.code.lines().collect()
    }

    /// Lines of comments.
    pub fn comments(&self) -> Vec<&str> {
        self.comments.lines().collect()
    }
}

/// Kind and length in bytes of the piece that `rest` starts with.
fn next_piece(rest: &str, first: char, previous: char) -> (Part, usize) {
    let in_word = previous.is_alphanumeric() || previous == '_';
    if rest.starts_with("//") {
        return (Part::Comment, rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return (Part::Comment, block_comment(rest));
    }
    match first {
        '"' => (Part::Literal, quoted(rest, '"')),
        'r' if !in_word || previous == 'b' => match raw_string(rest) {
            Some(len) => (Part::Literal, len),
            None => (Part::Code, 1),
        },
        '\'' => match char_literal(rest) {
            Some(len) => (Part::Literal, len),
            None => (Part::Code, 1),
        },
        _ => (Part::Code, first.len_utf8()),
    }
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        let tail = &rest.as_bytes()[at..];
        if tail.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if tail.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// Length of a literal between `quote`s, escapes respected.
fn quoted(rest: &str, quote: char) -> usize {
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        if c == '\\' {
            chars.next();
        } else if c == quote {
            return at + c.len_utf8();
        }
    }
    rest.len()
}

fn raw_string(rest: &str) -> Option<usize> {
    let hashes = rest[1..].bytes().take_while(|&b| b == b'#').count();
    let body = rest[1 + hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let start = rest.len() - body.len();
    Some(body.find(&close).map_or(rest.len(), |at| start + at + close.len()))
}

/// A lifetime has no closing quote after one character.
fn char_literal(rest: &str) -> Option<usize> {
    let mut chars = rest.chars().skip(1);
    let (value, next) = (chars.next()?, chars.next()?);
    (value == '\\' || next == '\'').then(|| quoted(rest, '\''))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> String {
        Source::parse(text).code
    }

    #[test]
    fn comments_and_literals_are_not_code() {
        assert_eq!(code("a // b\nc"), "a     \nc");
        assert_eq!(code("a /* b /* c */ d */ e"), "a                   e");
        assert_eq!(code(r#"f("x // \" y") // z"#), r#"f("         ")     "#);
        assert_eq!(code("r#\"a \" b\"# c"), "r        # c");
        assert_eq!(code("b\"a\" c"), "b\" \" c");
    }

    #[test]
    fn lifetimes_are_not_literals() {
        assert_eq!(
            code("fn f<'a>(x: &'a str) { g('\"', '\\'', 'b') }"),
            "fn f<'a>(x: &'a str) { g(' ', '  ', ' ') }"
        );
        assert_eq!(code("var\"x\""), "var\" \"", "an r inside a word opens no raw string");
    }

    #[test]
    fn lines_stay_lines() {
        let source = Source::parse("a\n/* b\nc */ d\n\"e\nf\" // g\n");
        assert_eq!(source.code(), ["a", "    ", "     d", "\" ", " \"     "]);
        assert_eq!(source.comments()[1..3], ["/* b", "c */  "]);
        assert_eq!(source.comments()[4], "   // g");
    }
}
