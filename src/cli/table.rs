//! Tables for a terminal: measures and truncates text, and fits columns to a width. Pure.

/// Separates columns. Two spaces, because a cell may contain one.
const SEPARATOR: &str = "  ";

/// Marks truncated text.
const ELLIPSIS: char = '…';

/// Characters that terminals show two columns wide: East Asian scripts and forms, symbols, emoji (Unicode's `EastAsianWidth`, W and F).
/// The ranges include some narrow characters, so a calculated width is never too small.
const WIDE: [std::ops::RangeInclusive<char>; 12] = [
    '\u{1100}'..='\u{115f}',
    '\u{231a}'..='\u{23ff}',
    '\u{25a0}'..='\u{27bf}',
    '\u{2b00}'..='\u{2bff}',
    '\u{2e80}'..='\u{a4cf}',
    '\u{a960}'..='\u{a97f}',
    '\u{ac00}'..='\u{d7ff}',
    '\u{f900}'..='\u{faff}',
    '\u{fe10}'..='\u{fe6f}',
    '\u{ff00}'..='\u{ffe6}',
    '\u{16fe0}'..='\u{18fff}',
    '\u{1b000}'..='\u{3ffff}',
];

fn width_of(c: char) -> usize {
    if WIDE.iter().any(|range| range.contains(&c)) { 2 } else { 1 }
}

/// The most terminal columns that a text takes.
pub(super) fn width(text: &str) -> usize {
    text.chars().map(width_of).sum()
}

/// A text as one line of at most `most` columns, truncated if longer.
pub(super) fn cut(text: &str, most: usize) -> String {
    let text = text.replace(['\t', '\n'], " ");
    if width(&text) <= most {
        return text;
    }
    let mut out = String::new();
    let mut left = most.saturating_sub(1);
    for c in text.chars() {
        let Some(rest) = left.checked_sub(width_of(c)) else { break };
        left = rest;
        out.push(c);
    }
    if most > 0 {
        out.push(ELLIPSIS);
    }
    out
}

/// Column widths that show all cells. If these exceed `most` in total, shrinks the columns of `shrink` in order, as little as needed
/// and never below the minimum given for each.
pub(super) fn fit<const N: usize>(rows: &[[String; N]], shrink: &[(usize, usize)], most: usize) -> [usize; N] {
    let mut widths = [0; N];
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            widths[column] = widths[column].max(width(cell));
        }
    }
    for (column, least) in shrink {
        let all = widths.iter().sum::<usize>() + SEPARATOR.len() * N.saturating_sub(1);
        let shrunk = widths[*column].saturating_sub(all.saturating_sub(most)).max(*least);
        widths[*column] = widths[*column].min(shrunk);
    }
    widths
}

/// A row: each cell truncated or padded to its column's width, and passed through `paint` with its column's number.
pub(super) fn row<const N: usize>(cells: &[String; N], widths: &[usize; N], paint: impl Fn(usize, String) -> String) -> String {
    let cells = cells.iter().zip(widths).enumerate().map(|(column, (cell, most))| {
        let cell = cut(cell, *most);
        let fill = if column + 1 == N { 0 } else { most.saturating_sub(width(&cell)) };
        paint(column, cell) + &" ".repeat(fill)
    });
    cells.collect::<Vec<_>>().join(SEPARATOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_cut_by_what_a_terminal_shows() {
        for (text, most, expected) in [
            ("abc", 3, "abc"),
            ("abcd", 3, "ab…"),
            ("", 0, ""),
            ("abc", 0, ""),
            ("abc", 1, "…"),
            ("a\tb\nc", 5, "a b c"),
            ("日本語", 6, "日本語"),
            ("日本語", 5, "日本…"),
            ("日本語", 4, "日…"),
            ("☕☕", 3, "☕…"),
            ("ü🚂é", 3, "ü…"),
        ] {
            let shown = cut(text, most);
            assert_eq!(shown, expected, "{text:?} {most}");
            assert!(width(&shown) <= most, "{text:?} {most}");
        }
    }

    #[test]
    fn columns_shrink_in_order_and_only_as_far_as_it_takes() {
        let rows = [["ID".to_owned(), "STATE".into(), "ROUTE".into()], ["a".repeat(20), "ready".into(), "/".repeat(30)]];
        let shrink = [(2, 10), (0, 8)];
        for (most, expected) in
            [(100, [20, 5, 30]), (59, [20, 5, 30]), (58, [20, 5, 29]), (39, [20, 5, 10]), (35, [16, 5, 10]), (10, [8, 5, 10])]
        {
            assert_eq!(fit(&rows, &shrink, most), expected, "{most}");
        }
        let widths = fit(&rows, &shrink, 35);
        let shown = row(&rows[1], &widths, |_, cell| cell);
        assert_eq!(shown, "aaaaaaaaaaaaaaa…  ready  /////////…");
        assert_eq!(row(&rows[0], &widths, |_, cell| cell), "ID                STATE  ROUTE");
    }
}
