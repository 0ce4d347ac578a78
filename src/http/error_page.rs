//! The error page for browsers. Programs get JSON. Pure.

use super::errors::Audience;
use super::http_error::HttpError;
use crate::util::escape::html;

/// Headers of the page. Its policy allows its inline style, and no script.
pub(super) const HEADERS: [(&str, &str); 3] = [
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "same-origin"),
];

const STYLE: &str = ":root{color-scheme:light dark;font:1rem/1.5 system-ui,sans-serif}
body{max-width:34rem;margin:15vh auto 2rem;padding:0 1rem}
h1{font-size:1.6rem;line-height:1.25}
small{opacity:.75}";

/// The texts of the page for a status: the title, what happened, and what the visitor can do.
struct Words {
    title: &'static str,
    happened: &'static str,
    advice: &'static str,
}

/// The texts for an error. Without texts of its own, the error's sentence says what happened.
fn words(error: HttpError) -> Words {
    let (title, happened, advice) = match (error.status, error.code) {
        (400, "https_required") => (
            "Use HTTPS",
            "This address was opened without encryption, and the site is only available over HTTPS.",
            "Open it again with https:// at the beginning of the address.",
        ),
        (404, _) => (
            "Page not found",
            "There is nothing at this address.",
            "Check the address for typing errors, or begin at the start page.",
        ),
        (405, _) => ("Not possible here", "This page can only be read.", "Open it from a link, or begin at the start page."),
        (408, _) => (
            "The request took too long",
            "Your browser sent its request too slowly, so it was given up.",
            "Check your connection, and try again.",
        ),
        (413, _) => ("Too large", "What you sent is larger than this site accepts.", "Send something smaller."),
        (414, _) => ("The address is too long", "This site does not accept such a long address.", "Use a shorter address."),
        (431, _) => (
            "The request is too large",
            "Your browser sent more data about itself than this site accepts.",
            "Delete the cookies of this site, and try again.",
        ),
        (502, _) => (
            "This page is not working",
            "An error occurred while this page was prepared.",
            "Try again in a moment. If it happens again, tell the operator of this site.",
        ),
        (503, "overloaded") => ("Too busy", "Too many requests are being answered at the moment.", RETRY),
        (503, _) => ("Not available at the moment", "This page is being started, updated or repaired.", RETRY),
        (504, _) => (
            "No answer in time",
            "This page took too long to answer.",
            "Try again in a moment. If it happens again, tell the operator of this site.",
        ),
        (507, _) => (
            "No space left",
            "There is no space left to receive what you sent.",
            "Try again later, or tell the operator of this site.",
        ),
        _ => ("The request was refused", "", "Begin again at the start page."),
    };
    Words { title, happened, advice }
}

/// What the visitor can do if waiting helps.
const RETRY: &str = "Wait a moment, and try again.";

/// The page for an error. With a `retry_after`, the page itself repeats a safe request.
pub(super) fn render(error: HttpError, audience: Audience<'_>) -> String {
    let Words { title, happened, advice } = words(error);
    let (refresh, advice) = match error.retry_after.filter(|_| audience.is_safe).map(|seconds| seconds.max(1)) {
        Some(seconds) => {
            let unit = if seconds == 1 { "second" } else { "seconds" };
            let advice = format!("This page tries again by itself in {seconds} {unit}.");
            (format!("<meta http-equiv=\"refresh\" content=\"{seconds}\">\n"), advice)
        }
        None => (String::new(), advice.to_owned()),
    };
    let happened = if happened.is_empty() { sentence(error.message) } else { happened.to_owned() };
    let id = audience.id.map(|id| format!("; request {}", html(id))).unwrap_or_default();
    let status = error.status;
    format!(
        "<!doctype html>
<html lang=\"en\">
<meta charset=\"utf-8\">
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">
<meta name=\"robots\" content=\"noindex\">
{refresh}<title>{title}</title>
<style>
{STYLE}
</style>
<main>
<h1>{title}</h1>
<p>{happened}
<p>{advice}
<p><a href=\"/\">Start page</a>
<p><small>Error {status}{id}</small>
</main>
</html>
"
    )
}

/// A message as a sentence, with a capital and a full stop.
fn sentence(message: &str) -> String {
    let mut letters = message.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    let text: String = first.into_iter().chain(letters).chain(['.']).collect();
    html(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: u16) -> HttpError {
        HttpError::new(status, "a_code", "the value is < \"5\" & > 3")
    }

    const AUDIENCE: Audience<'_> = Audience { html: true, is_safe: true, id: None };

    #[test]
    fn a_page_is_small_and_whole_and_says_what_can_be_done() {
        for status in 400..=599 {
            let page =
                render(error(status).retry_after(3600), Audience { id: Some("0123456789ab-ffffffffffffffff"), ..AUDIENCE });
            assert!(page.len() < 4096 && page.ends_with("</html>\n"), "{page}");
            for part in ["<html lang=\"en\">", "<title>", "<a href=\"/\">", "color-scheme:light dark"] {
                assert_eq!(page.matches(part).count(), 1, "{part}: {page}");
            }
            assert!(page.contains(&format!("Error {status}; request 0123456789ab-")) && !page.contains("<script"), "{page}");
            assert!(!page.contains("< \""), "{page}");
        }
        let other = render(error(418), AUDIENCE);
        assert!(other.contains("<p>The value is &lt; &quot;5&quot; &amp; &gt; 3.\n"), "{other}");
    }

    #[test]
    fn a_page_is_loaded_again_only_where_that_does_no_harm() {
        let page = |retry_after, is_safe| render(HttpError { retry_after, ..error(503) }, Audience { is_safe, ..AUDIENCE });
        for (seconds, refresh, says) in [(0, 1, "in 1 second."), (1, 1, "in 1 second."), (30, 30, "in 30 seconds.")] {
            let page = page(Some(seconds), true);
            assert!(
                page.contains(&format!("<meta http-equiv=\"refresh\" content=\"{refresh}\">")) && page.contains(says),
                "{page}"
            );
        }
        for page in [page(None, true), page(Some(30), false)] {
            assert!(!page.contains("refresh") && page.contains(RETRY), "{page}");
        }
    }
}
