//! When a program that should not end is started again.

use std::time::Duration;

/// How many seconds after its end: at once, and then less and less often. One that lived for the longest begins anew.
const AGAIN: [u64; 6] = [0, 5, 10, 30, 60, 120];

/// How long it is waited for.
#[derive(Debug, Default)]
pub struct BackOff {
    failures: usize,
}

impl BackOff {
    /// From now until the next start.
    pub fn wait(&self) -> Duration {
        Duration::from_secs(AGAIN[self.failures.min(AGAIN.len() - 1)])
    }

    /// It has ended after it lived for so long.
    pub fn ended(&mut self, lived: Duration) {
        self.failures = if lived.as_secs() > AGAIN[AGAIN.len() - 1] { 1 } else { self.failures + 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_waits_longer_each_time_and_begins_anew_after_a_long_life() {
        let mut back_off = BackOff::default();
        let mut waits = Vec::new();
        for lived in [0, 0, 1, 0, 0, 120, 121] {
            waits.push(back_off.wait().as_secs());
            back_off.ended(Duration::from_secs(lived));
        }
        assert_eq!(waits, [0, 5, 10, 30, 60, 120, 120]);
        assert_eq!(back_off.wait().as_secs(), 5);
    }
}
