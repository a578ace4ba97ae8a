//! `strftime_now`: the one thing templates know about the world outside.
//!
//! A template that prints today's date makes token files differ from day to day; [`Clock::Fixed`] is for those who
//! want them equal. Times are UTC; transformers uses local time, which no two machines agree on.

use minijinja::{Error, ErrorKind};
use std::{
    fmt::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

/// Where the time comes from.
#[derive(Clone, Copy, Debug)]
pub enum Clock {
    /// The system's clock.
    System,
    /// Seconds since 1970-01-01 00:00 UTC.
    Fixed(i64),
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

struct Date {
    year: i64,
    /// 1–12.
    month: usize,
    /// 1–31.
    day: i64,
    /// Days since the first of January, from 1.
    day_of_year: i64,
    /// 0 = Sunday.
    weekday: usize,
    /// Seconds since midnight.
    seconds: i64,
}

impl Clock {
    /// Formats the time as Python's `strftime` in the C locale.
    pub fn strftime(self, format: &str) -> Result<String, Error> {
        let seconds = match self {
            Clock::Fixed(seconds) => seconds,
            Clock::System => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64),
        };
        let date = Date::at(seconds);
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            match c {
                '%' => match chars.next() {
                    Some('-') => date.field(&mut out, chars.next(), true)?,
                    other => date.field(&mut out, other, false)?,
                },
                other => out.push(other),
            }
        }
        Ok(out)
    }
}

impl Date {
    /// Days to civil date by eras of 400 years, counted from 1 March 0000.
    fn at(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400);
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let since_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * since_march + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        Self {
            year,
            month: month as usize,
            day: since_march - (153 * from_march + 2) / 5 + 1,
            day_of_year: if month > 2 { since_march + 60 + i64::from(leap) } else { since_march - 305 },
            weekday: (days + 4).rem_euclid(7) as usize,
            seconds: seconds.rem_euclid(86_400),
        }
    }

    fn field(&self, out: &mut String, code: Option<char>, bare: bool) -> Result<(), Error> {
        let hour = self.seconds / 3_600;
        let hour12 = (hour + 11) % 12 + 1;
        let (value, width) = match code {
            Some('d') => (self.day, 2),
            Some('m') => (self.month as i64, 2),
            Some('H') => (hour, 2),
            Some('I') => (hour12, 2),
            Some('M') => (self.seconds / 60 % 60, 2),
            Some('S') => (self.seconds % 60, 2),
            Some('y') => (self.year.rem_euclid(100), 2),
            Some('j') => (self.day_of_year, 3),
            Some('Y') => (self.year, 1),
            Some('w') => (self.weekday as i64, 1),
            other => return self.name(out, other),
        };
        let width = if bare { 1 } else { width };
        let _ = write!(out, "{value:0width$}");
        Ok(())
    }

    fn name(&self, out: &mut String, code: Option<char>) -> Result<(), Error> {
        let (month, day) = (MONTHS[self.month - 1], DAYS[self.weekday]);
        match code {
            Some('B') => out.push_str(month),
            Some('b' | 'h') => out.push_str(&month[..3]),
            Some('A') => out.push_str(day),
            Some('a') => out.push_str(&day[..3]),
            Some('p') => out.push_str(if self.seconds < 43_200 { "AM" } else { "PM" }),
            Some('%') => out.push('%'),
            Some('Z') => out.push_str("UTC"),
            Some('F') => out.push_str(&self.joined(&['Y', '-', 'm', '-', 'd'])?),
            Some('T' | 'X') => out.push_str(&self.joined(&['H', ':', 'M', ':', 'S'])?),
            Some('R') => out.push_str(&self.joined(&['H', ':', 'M'])?),
            Some('D' | 'x') => out.push_str(&self.joined(&['m', '/', 'd', '/', 'y'])?),
            other => {
                let text = other.map_or(String::new(), String::from);
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: unknown code %{text}"),
                ));
            }
        }
        Ok(())
    }

    fn joined(&self, parts: &[char]) -> Result<String, Error> {
        let mut out = String::new();
        for part in parts {
            match part {
                '-' | ':' | '/' => out.push(*part),
                code => self.field(&mut out, Some(*code), false)?,
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let at = |seconds, format| Clock::Fixed(seconds).strftime(format).unwrap();
        // `date -u -d @N`
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S %j"), "Thursday 01 January 1970 00:00:00 001");
        assert_eq!(at(1_748_779_200, "%d %b %Y %I %p %-d/%-m %y"), "01 Jun 2025 12 PM 1/6 25");
        assert_eq!(at(951_782_400, "%F %T %j %a %%"), "2000-02-29 00:00:00 060 Tue %");
        assert_eq!(at(951_868_799, "%F %X"), "2000-02-29 23:59:59");
        assert_eq!(at(1_735_603_200, "%F %j"), "2024-12-31 366");
        assert_eq!(at(-1, "%F %T"), "1969-12-31 23:59:59");
        assert!(Clock::Fixed(0).strftime("%Q").is_err());
        assert!(Clock::Fixed(0).strftime("%").is_err());
    }
}
