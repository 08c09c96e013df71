//! Redis's patterns: `*`, `?`, `[a-c]`, `[^a]`, and `\` before what is meant as it is.

/// Whether all of `text` matches. It takes no more than the product of the lengths.
pub(super) fn matches(mut pattern: &[u8], mut text: &[u8]) -> bool {
    // What comes after the last star, and the text that was tried with it.
    let mut last_star = None;
    loop {
        let next = match (pattern, text) {
            ([], []) => return true,
            ([b'*', after @ ..], _) => {
                last_star = Some((after, text));
                last_star
            }
            (_, [byte, rest @ ..]) => element(pattern, *byte).map(|after| (after, rest)),
            (_, []) => None,
        };
        (pattern, text) = match (next, last_star) {
            (Some(next), _) => next,
            // The star takes one byte more.
            (None, Some((after, [_, tried @ ..]))) => {
                last_star = Some((after, tried));
                (after, tried)
            }
            (None, _) => return false,
        };
    }
}

/// What follows the pattern's first element, if that matches the byte.
fn element(pattern: &[u8], byte: u8) -> Option<&[u8]> {
    match pattern {
        [b'?', after @ ..] => Some(after),
        [b'[', set @ ..] => after_set(set, byte),
        [b'\\', meant, after @ ..] | [meant, after @ ..] => (*meant == byte).then_some(after),
        [] => None,
    }
}

/// What follows a set and its bracket, if the set has the byte.
fn after_set(pattern: &[u8], byte: u8) -> Option<&[u8]> {
    let inverse = pattern.strip_prefix(b"^");
    let (mut rest, mut has) = (inverse.unwrap_or(pattern), false);
    loop {
        let (from, to);
        (from, to, rest) = match rest {
            [] | [b']', ..] => break,
            [b'\\', meant, after @ ..] => (meant, meant, after),
            [from, b'-', to, after @ ..] => (from.min(to), from.max(to), after),
            [meant, after @ ..] => (meant, meant, after),
        };
        has |= (from..=to).contains(&&byte);
    }
    (has != inverse.is_some()).then(|| rest.get(1..).unwrap_or_default())
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
