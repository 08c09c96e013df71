//! Redis's patterns: `*`, `?`, `[a-c]`, `[^a]`, and `\` before what is meant as it is.

/// Whether all of `text` matches. It takes no more than the product of the lengths.
pub(super) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern_at, mut text_at) = (0, 0);
    // After the last star, and where the text was tried from there.
    let mut retry = None;
    loop {
        if pattern.get(pattern_at) == Some(&b'*') {
            pattern_at += 1;
            retry = Some((pattern_at, text_at));
            continue;
        }
        match (element(&pattern[pattern_at..], text.get(text_at)), retry) {
            (Some(0), _) => return true,
            (Some(len), _) => {
                pattern_at += len;
                text_at += 1;
            }
            (None, Some((after_star, from))) if from < text.len() => {
                (pattern_at, text_at) = (after_star, from + 1);
                retry = Some((after_star, from + 1));
            }
            (None, _) => return false,
        }
    }
}

/// The length of the pattern's first element if it matches the byte; 0 at the end of both.
fn element(pattern: &[u8], byte: Option<&u8>) -> Option<usize> {
    let (Some(first), Some(byte)) = (pattern.first(), byte) else {
        return (pattern.is_empty() && byte.is_none()).then_some(0);
    };
    match first {
        b'?' => Some(1),
        b'\\' if pattern.len() > 1 => (pattern[1] == *byte).then_some(2),
        b'[' => set(&pattern[1..], *byte).map(|len| len + 1),
        _ => (first == byte).then_some(1),
    }
}

/// The length of a set, with its bracket, if it has the byte.
fn set(pattern: &[u8], byte: u8) -> Option<usize> {
    let is_inverse = pattern.first() == Some(&b'^');
    let (mut at, mut has) = (usize::from(is_inverse), false);
    while at < pattern.len() && pattern[at] != b']' {
        match &pattern[at..] {
            [b'\\', meant, ..] => {
                has |= *meant == byte;
                at += 2;
            }
            [from, b'-', to, ..] => {
                has |= (*from.min(to)..=*from.max(to)).contains(&byte);
                at += 3;
            }
            rest => {
                has |= rest[0] == byte;
                at += 1;
            }
        }
    }
    (has != is_inverse).then_some((at + 1).min(pattern.len()))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("", "a", false),
            ("a*c", "abbc", true),
            ("a*c", "abbcd", false),
            ("*ab*ab", "abaab", true),
            ("a?c", "abc", true),
            ("a?", "a", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("[\\]]", "]", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("[ab", "a", true),
            ("a**", "a", true),
        ] {
            let found = matches(pattern.as_bytes(), text.as_bytes());
            assert_eq!(found, expected, "{pattern} {text}");
        }
        let (pattern, text) = ("*a".repeat(100) + "b", "a".repeat(1000));
        assert!(!matches(pattern.as_bytes(), text.as_bytes()));
    }
}
