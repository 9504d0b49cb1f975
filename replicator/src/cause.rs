//! Causes in an operator's words: joined without repeats, and bounded, since they are remembered and joined
//! again at each start.

/// Longest text that is kept of a cause.
pub(crate) const MAX_BYTES: usize = 320;
const BETWEEN: &str = "; ";

/// Several causes as one text: each once, the first first. What does not fit is counted.
pub(crate) fn join<'a>(causes: impl IntoIterator<Item = &'a str>) -> String {
    let mut seen: Vec<&str> = Vec::new();
    for cause in causes.into_iter().flat_map(|cause| cause.split(BETWEEN)) {
        if !cause.is_empty() && !seen.contains(&cause) && !is_count(cause) {
            seen.push(cause);
        }
    }
    // Room for the count.
    let most = MAX_BYTES - 24;
    let mut text = String::new();
    for (at, cause) in seen.iter().enumerate() {
        if at > 0 && text.len() + BETWEEN.len() + cause.len() > most {
            let left = seen.len() - at;
            return format!("{text}{BETWEEN}and {left} more");
        }
        if at > 0 {
            text += BETWEEN;
        }
        text += &cut(cause, most);
    }
    text
}

/// A text cut to [`MAX_BYTES`], with a sign that it was.
pub(crate) fn bounded(text: &str) -> String {
    cut(text, MAX_BYTES)
}

fn cut(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let most = most - "…".len();
    let end = (0..=most).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{}…", &text[..end])
}

/// What an earlier join left out is not a cause.
fn is_count(cause: &str) -> bool {
    cause
        .strip_prefix("and ")
        .and_then(|rest| rest.strip_suffix(" more"))
        .is_some_and(|count| !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once_and_stay_bounded_however_often_they_are_joined() {
        assert_eq!(join(["a; b", "b", "", "c; a"]), "a; b; c");
        let mut text = String::new();
        for start in 0..200 {
            let volume = format!("volume v{start:02}-{:028} was changed while it was not protected", 0);
            text = join([text.as_str(), &volume, "the machine or the agent did not stop cleanly"]);
            assert!(text.len() <= MAX_BYTES, "{start}: {}", text.len());
        }
        assert!(text.starts_with("volume v00") && text.ends_with(" more"), "{text}");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(bounded("short"), "short");
        let cut = bounded(&"ä".repeat(1000));
        assert!(cut.len() <= MAX_BYTES && cut.ends_with('…'), "{cut}");
        assert!(join([&"x".repeat(5000) as &str, "y"]).len() <= MAX_BYTES);
    }
}
