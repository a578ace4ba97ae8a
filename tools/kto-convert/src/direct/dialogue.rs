//! HH-RLHF dialogues as they stand between the quotes of JSON: "\n\nHuman:" with its line ends as escapes.

/// What begins a turn, behind its line ends.
const ROLES: [(&[u8], bool); 2] = [(b"Human:", false), (b"Assistant:", true)];
const LINES: &[u8] = br"\n\n";

/// The beginning of a turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Marker {
    /// Where it is.
    pub start: usize,
    /// What is behind it is said.
    pub end: usize,
    /// By the assistant, else by the user.
    pub assistant: bool,
}

impl Marker {
    /// The role's name.
    pub fn role(&self) -> &'static [u8] {
        if self.assistant { b"assistant" } else { b"user" }
    }
}

/// Where both sides of a pair are cut.
#[derive(Debug, PartialEq)]
pub struct Cut {
    /// The completions begin here.
    pub at: usize,
    /// Turns before: the number of the marker that ends the prompt.
    pub turns: usize,
}

/// True for a dialogue.
pub fn is_dialogue(text: &[u8]) -> bool {
    text.strip_prefix(LINES).is_some_and(|rest| rest.starts_with(ROLES[0].0))
}

/// Cuts a pair of dialogues behind the last assistant's marker that they share. `markers` will hold those of `chosen`. `None` when there is
/// no such marker, or when another turn follows: the general way knows what to do.
pub fn cut(chosen: &[u8], rejected: &[u8], markers: &mut Vec<Marker>) -> Option<Cut> {
    markers.clear();
    find(chosen, 0, |marker| markers.push(marker));
    let shared = common(chosen, rejected);
    let last = markers.last().filter(|marker| marker.assistant && marker.end <= shared)?;
    let (at, turns) = (last.end, markers.len() - 1);
    let mut follows = false;
    find(rejected, at, |_| follows = true);
    (!follows && is_dialogue(chosen)).then_some(Cut { at, turns })
}

/// Finds the markers from `from` on, which is no place inside an escape.
fn find(text: &[u8], from: usize, mut each: impl FnMut(Marker)) {
    let mut at = from;
    while let Some(found) = memchr::memchr(b'\\', &text[at..]) {
        let start = at + found;
        let behind = text[start..].strip_prefix(LINES);
        let marker = behind.and_then(|rest| ROLES.iter().find(|(words, _)| rest.starts_with(words)));
        match marker {
            Some((words, assistant)) => {
                at = start + LINES.len() + words.len();
                each(Marker { start, end: at, assistant: *assistant });
            }
            // Behind this escape only: the next one may begin a marker.
            None => at = (start + 2).min(text.len()),
        }
    }
}

/// Length of the common beginning.
fn common(a: &[u8], b: &[u8]) -> usize {
    const BLOCK: usize = 32;
    let blocks = a.chunks_exact(BLOCK).zip(b.chunks_exact(BLOCK)).take_while(|(x, y)| x == y).count();
    let at = blocks * BLOCK;
    at + a[at..].iter().zip(&b[at..]).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_no_part_of_other_escapes() {
        let found = |text: &str| {
            let mut ends = Vec::new();
            find(text.as_bytes(), 0, |m| ends.push((m.start, m.end, m.assistant)));
            ends
        };
        assert_eq!(found(r"\n\nHuman: a\n\nAssistant:"), [(0, 10, false), (12, 26, true)]);
        assert_eq!(found(r"\\n\nHuman: a"), [], "a backslash, an n and one line end");
        assert_eq!(found(r"\n\n\nHuman: a"), [(2, 12, false)]);
        assert_eq!(found(r#"\"\n\nHuman: \\"#), [(2, 12, false)]);
    }

    #[test]
    fn pairs_are_cut_behind_the_shared_marker() {
        let cut = |a: &str, b: &str| super::cut(a.as_bytes(), b.as_bytes(), &mut Vec::new());
        let p = r"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:";
        let of = |x: &str, y: &str| cut(&format!("{p}{x}"), &format!("{p}{y}"));
        let at = Some(Cut { at: p.len(), turns: 3 });
        assert_eq!(of(" I am", " I was"), at);
        assert_eq!(of("", r"\n"), at);
        assert_eq!(of(r" x\n\nAssistant: y", " z"), None);
        assert_eq!(of(" z", r" x\n\nHuman: y"), None);
        assert_eq!(cut(r"\n\nHuman: a\n\nAssistant: b", r"\n\nHuman: b\n\nAssistant: b"), None);
    }

    #[test]
    fn the_common_beginning_is_exact() {
        for at in [0, 1, 31, 32, 33, 64, 100] {
            let (a, mut b) = (vec![b'a'; 100], vec![b'a'; 120]);
            b[at] = b'b';
            assert_eq!(common(&a, &b), at);
        }
    }
}
