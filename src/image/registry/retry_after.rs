//! Parses Retry-After (RFC 9110, section 10.2.3): seconds, or one of the three forms of an HTTP date (section 5.6.7).

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// The seconds to wait, counted from `now`, in seconds since 1970. `None` for a date that is past and for what is neither a
/// number nor a date, as in containers/image: the usual pauses are made then.
pub fn seconds(text: &str, now: u64) -> Option<u64> {
    let text = text.trim();
    text.parse().ok().or_else(|| date(text)?.checked_sub(now).filter(|&seconds| seconds > 0))
}

/// Seconds since 1970: `Sun, 06 Nov 1994 08:49:37 GMT`, `Sunday, 06-Nov-94 08:49:37 GMT` or `Sun Nov  6 08:49:37 1994`.
fn date(text: &str) -> Option<u64> {
    let words: Vec<&str> = text.split([' ', ',', '-', ':']).filter(|word| !word.is_empty()).collect();
    let [_, fields @ ..] = &words[..] else { return None };
    let (day, month, year, time) = if let [day, month, year, hour, minute, second, "GMT"] = *fields {
        (day, month, year, [hour, minute, second])
    } else if let [month, day, hour, minute, second, year] = *fields {
        // asctime() names the month first, and the year last.
        (day, month, year, [hour, minute, second])
    } else {
        return None;
    };
    let number = |word: &str| word.parse::<u64>().ok().filter(|_| word.len() <= 4);
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year = match (number(year)?, year.len()) {
        (year, 2) if year < 69 => 2000 + year,
        (year, 2) => 1900 + year,
        (year, _) => year,
    };
    let [hour, minute, second] = time.map(number);
    let (hour, minute, second) = (hour?, minute?, second?);
    let day = number(day)?;
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days of a year that begins in March, so that the leap day is its last one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    (days.checked_sub(719_468)? * 86_400).checked_add(hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_the_three_forms_of_a_date_are_understood() {
        let now = 784_111_777;
        for (text, expected) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", Some(10)),
            ("Sunday, 06-Nov-94 08:49:47 GMT", Some(10)),
            ("Sun Nov  6 08:49:47 1994", Some(10)),
            ("Mon, 07 Nov 1994 08:49:37 GMT", Some(86_400)),
            ("Wed, 01 Mar 1995 08:49:37 GMT", Some(115 * 86_400)),
            ("Thu, 29 Feb 1996 08:49:37 GMT", Some(480 * 86_400)),
            // Past, or now.
            ("Sun, 06 Nov 1994 08:49:37 GMT", None),
            ("Sat, 05 Nov 1994 08:49:37 GMT", None),
            ("Thu, 01 Jan 1970 00:00:00 GMT", None),
            ("", None),
            ("-5", None),
            ("1.5", None),
            ("soon", None),
            ("99999999999999999999", None),
            ("Sun, 06 Nov 1994 08:49:47 CET", None),
            ("Sun, 06 Foo 1994 08:49:47 GMT", None),
            ("Sun, 99 Nov 1994 08:49:47 GMT", None),
            ("Sun, 06 Nov 99999 08:49:47 GMT", None),
            ("Sun, 06 Nov 1994 24:49:47 GMT", None),
        ] {
            assert_eq!(seconds(text, now), expected, "{text:?}");
        }
    }
}
