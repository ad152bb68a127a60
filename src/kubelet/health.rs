//! Which devices the kubelet may still give out. A state machine: what the driver reports and the time go in, the health of each
//! device comes out.
//!
//! ```text
//!            an error ┌──────────┐ no other error for the hold-off, which doubles with each error
//!   healthy ─────────►│ holds off├──────────────────────────────────────────────► healthy
//!      │              └──────────┘
//!      │ memory or bus ┌─────────────┐ lost, and answers again: it was reset
//!      ├──────────────►│ needs reset ├───────────────┐
//!      │ no answer     ├─────────────┤               ▼
//!      └──────────────►│    lost     ├─ answers ─► healthy, or holds off where it was lost before
//!                      └─────────────┘
//! ```

use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime},
};

/// The first hold-off. It is as long as the kubelet's own reaction.
const FIRST: Duration = Duration::from_secs(5);
/// The longest.
const LONGEST: Duration = Duration::from_secs(3600);
/// After so long without an error what was before is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(24 * 3600);

/// What an XID says of the device that it names (NVIDIA: "XID Errors").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A program's own fault, or something that the driver has set right: the device is as good as before.
    Harmless,
    /// The device has stopped what it did, and can go on: it holds off.
    Passing,
    /// Nothing but a reset helps.
    Reset,
}

/// Known XIDs. One that is not here is [`Class::Passing`].
const XIDS: &[(u64, Class, &str)] = &[
    (13, Class::Harmless, "graphics engine exception: a program's fault"),
    (31, Class::Harmless, "memory page fault: a program's fault"),
    (43, Class::Harmless, "a program's channel was stopped"),
    (45, Class::Harmless, "channels were cleaned up after a program"),
    (48, Class::Reset, "double bit ECC error"),
    (63, Class::Harmless, "a row was remapped, or a page retired"),
    (64, Class::Reset, "a row could not be remapped, or a page not be retired"),
    (68, Class::Harmless, "video decoder exception: a program's fault"),
    (74, Class::Reset, "NVLink error"),
    (79, Class::Reset, "the GPU has fallen off the bus"),
    (92, Class::Harmless, "many single bit ECC errors, which were corrected"),
    (94, Class::Passing, "contained ECC error"),
    (95, Class::Reset, "uncontained ECC error"),
    (109, Class::Harmless, "context switch timeout: a program's fault"),
    (119, Class::Reset, "the GPU's system processor does not answer"),
    (120, Class::Reset, "the GPU's system processor failed"),
    (140, Class::Reset, "unrecovered ECC error"),
];

/// What it says of a device.
pub fn class(xid: u64) -> Class {
    XIDS.iter().find(|(known, ..)| *known == xid).map_or(Class::Passing, |(_, class, _)| *class)
}

/// In words.
pub fn meaning(xid: u64) -> &'static str {
    XIDS.iter().find(|(known, ..)| *known == xid).map_or("unknown to gpurun", |(.., words)| words)
}

/// The relevant XIDs, by the two variables of NVIDIA's device plugin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watched {
    nothing: bool,
    ignored: BTreeSet<u64>,
    counted: BTreeSet<u64>,
    every: bool,
}

impl Watched {
    /// `DP_DISABLE_HEALTHCHECKS` is `all`, `xids` or a list of XIDs, and `DP_ENABLE_HEALTHCHECKS` is `all` or a list of those that
    /// count all the same.
    pub fn new(disable: &str, enable: &str) -> Self {
        let numbers = |text: &str| text.split(',').filter_map(|word| word.trim().parse().ok()).collect();
        let has = |text: &str, word: &str| text.split(',').any(|one| one.trim().eq_ignore_ascii_case(word));
        Self {
            nothing: has(disable, "all") || has(disable, "xids"),
            ignored: numbers(disable),
            counted: numbers(enable),
            every: has(enable, "all"),
        }
    }

    fn class(&self, xid: u64) -> Class {
        let by_table = class(xid);
        let wanted = self.every || self.counted.contains(&xid);
        if wanted {
            return if by_table == Class::Harmless { Class::Passing } else { by_table };
        }
        if self.nothing || self.ignored.contains(&xid) { Class::Harmless } else { by_table }
    }
}

/// What has happened to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The driver reported an error of it.
    Xid(u64),
    /// It does not answer.
    Lost,
    /// It answers.
    Answers,
    /// NVML cannot say what happens to it.
    Unwatched,
}

#[derive(Debug, Default)]
struct State {
    lost: bool,
    unwatched: bool,
    needs_reset: Option<u64>,
    /// Until when it holds off, and for what.
    holds: Option<(Instant, String)>,
    /// How long it was the last time.
    hold_off: Option<Duration>,
    last_error: Option<Instant>,
}

/// What is to be known of a device by who comes after this process. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Remembered {
    lost: bool,
    needs_reset: Option<u64>,
    holds: Option<(u64, String)>,
    hold_off: Option<u64>,
    last_error: Option<u64>,
}

/// The two clocks at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// This process' own.
    pub now: Instant,
    /// Everybody's.
    pub wall: SystemTime,
}

impl Clocks {
    /// Now.
    pub fn read() -> Self {
        Self { now: Instant::now(), wall: SystemTime::now() }
    }

    fn seconds(self, time: Instant) -> u64 {
        let wall = match time.checked_duration_since(self.now) {
            Some(ahead) => self.wall + ahead,
            None => self.wall - self.now.duration_since(time),
        };
        wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
    }

    /// A time before the machine's start is as if it had just been.
    fn instant(self, since_1970: u64) -> Instant {
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(since_1970)).unwrap_or(self.wall);
        match time.duration_since(self.wall) {
            Ok(ahead) => self.now + ahead.min(LONGEST),
            Err(behind) => self.now.checked_sub(behind.duration()).unwrap_or(self.now),
        }
    }
}

/// The health of all devices, by UUID. One that nothing has happened to is healthy.
#[derive(Debug, Default)]
pub struct Health {
    watched: Watched,
    devices: BTreeMap<String, State>,
}

impl Health {
    /// Which XIDs count from now on.
    pub fn watch(&mut self, watched: Watched) {
        self.watched = watched;
    }

    /// Whether it says nothing of the device: a program's own fault, or one that the administrator does not count.
    pub fn is_harmless(&self, event: &Event) -> bool {
        matches!(event, Event::Xid(xid) if self.watched.class(*xid) == Class::Harmless)
    }

    /// Takes in what has happened. True if the device's health may be another now.
    pub fn event(&mut self, now: Instant, uuid: &str, event: &Event) -> bool {
        let before = self.unhealthy(uuid);
        let class = match event {
            Event::Xid(xid) => self.watched.class(*xid),
            _ => Class::Passing,
        };
        if class == Class::Harmless || (self.watched.nothing && *event == Event::Unwatched) {
            return false;
        }
        let state = self.devices.entry(uuid.to_owned()).or_default();
        match event {
            Event::Xid(xid) if class == Class::Reset => {
                state.needs_reset = Some(*xid);
                state.last_error = Some(now);
            }
            Event::Xid(xid) => state.hold_off(now, format!("XID {xid}: {}", meaning(*xid))),
            Event::Answers if state.lost => {
                state.lost = false;
                state.needs_reset = None;
                state.unwatched = false;
                // The first time it is as good as new.
                if state.remembered(now).is_some() {
                    state.hold_off(now, "it was lost more than once".into());
                } else {
                    state.hold_off = Some(FIRST);
                    state.last_error = Some(now);
                }
            }
            Event::Answers => state.unwatched = false,
            Event::Unwatched => state.unwatched = true,
            Event::Lost => state.lost = true,
        }
        self.unhealthy(uuid) != before
    }

    /// What is to be known later of devices to which something has happened.
    pub fn remember(&self, clocks: Clocks) -> BTreeMap<String, Remembered> {
        let remembered = |state: &State| Remembered {
            lost: state.lost,
            needs_reset: state.needs_reset,
            holds: state.holds.as_ref().map(|(until, why)| (clocks.seconds(*until), why.clone())),
            hold_off: state.hold_off.map(|hold_off| hold_off.as_secs()),
            last_error: state.last_error.map(|last| clocks.seconds(last)),
        };
        self.devices.iter().map(|(uuid, state)| (uuid.clone(), remembered(state))).collect()
    }

    /// Takes over what another process has remembered. Whether devices can be watched, this one finds out itself.
    pub fn recall(&mut self, clocks: Clocks, devices: BTreeMap<String, Remembered>) {
        let recalled = |kept: Remembered| State {
            lost: kept.lost,
            unwatched: false,
            needs_reset: kept.needs_reset,
            holds: kept.holds.map(|(until, why)| (clocks.instant(until), why)),
            hold_off: kept.hold_off.map(|seconds| Duration::from_secs(seconds).min(LONGEST)),
            last_error: kept.last_error.map(|last| clocks.instant(last)),
        };
        self.devices = devices.into_iter().map(|(uuid, kept)| (uuid, recalled(kept))).collect();
    }

    /// Lets time pass. True if a device's health is another now.
    pub fn pass(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for state in self.devices.values_mut() {
            if state.holds.as_ref().is_some_and(|(until, _)| *until <= now) {
                state.holds = None;
                changed = true;
            }
        }
        changed
    }

    /// When that is due.
    pub fn next(&self) -> Option<Instant> {
        self.devices.values().filter_map(|state| state.holds.as_ref().map(|(until, _)| *until)).min()
    }

    /// Why it must not be given out; `None`: it may.
    pub fn unhealthy(&self, uuid: &str) -> Option<String> {
        let state = self.devices.get(uuid)?;
        if state.lost {
            return Some("it does not answer".into());
        }
        if let Some(xid) = state.needs_reset {
            return Some(format!("XID {xid}: {}; it needs a reset", meaning(xid)));
        }
        if state.unwatched {
            return Some("the driver cannot say how it is".into());
        }
        state.holds.as_ref().map(|(_, why)| why.clone())
    }

    /// The driver was reloaded, which reset every device.
    pub fn reset(&mut self) {
        self.devices.clear();
    }
}

impl State {
    /// The last hold-off, if it is not so long ago that it is forgotten.
    fn remembered(&self, now: Instant) -> Option<Duration> {
        self.hold_off.filter(|_| self.last_error.is_some_and(|last| now.duration_since(last) < FORGOTTEN))
    }

    fn hold_off(&mut self, now: Instant, why: String) {
        let hold_off = self.remembered(now).map_or(FIRST, |before| (before * 2).min(LONGEST));
        self.hold_off = Some(hold_off);
        self.last_error = Some(now);
        self.holds = Some((now + hold_off, why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: &str = "GPU-0";

    struct Case {
        health: Health,
        now: Instant,
    }

    impl Case {
        fn new(disable: &str, enable: &str) -> Self {
            let mut health = Health::default();
            health.watch(Watched::new(disable, enable));
            Self { health, now: Instant::now() }
        }
        fn event(&mut self, event: &Event) -> bool {
            self.health.event(self.now, GPU, event)
        }
        fn after(&mut self, seconds: u64) -> bool {
            self.now += Duration::from_secs(seconds);
            self.health.pass(self.now);
            self.healthy()
        }
        fn healthy(&self) -> bool {
            self.health.unhealthy(GPU).is_none()
        }
    }

    #[test]
    fn a_programs_fault_is_not_the_gpus() {
        let mut case = Case::new("", "");
        for xid in [13, 31, 43, 45, 68, 109, 63] {
            assert!(!case.event(&Event::Xid(xid)) && case.healthy(), "{xid}");
        }
    }

    #[test]
    fn an_error_that_passes_holds_off_twice_as_long_each_time_and_an_hour_at_most() {
        let mut case = Case::new("", "");
        let mut hold_off = 5;
        for _ in 0..14 {
            assert!(case.event(&Event::Xid(94)));
            assert_eq!(case.health.next(), Some(case.now + Duration::from_secs(hold_off)));
            assert!(!case.after(hold_off - 1), "{hold_off}");
            assert!(case.after(1), "{hold_off}");
            hold_off = (hold_off * 2).min(3600);
        }
        assert!(case.after(24 * 3600));
        case.event(&Event::Xid(94));
        assert!(case.after(5), "a day later it is forgotten");
    }

    #[test]
    fn an_error_during_the_hold_off_begins_a_longer_one() {
        let mut case = Case::new("", "");
        case.event(&Event::Xid(1000));
        assert!(!case.after(4));
        case.event(&Event::Xid(1000));
        assert!(!case.after(9) && case.after(1));
    }

    #[test]
    fn what_needs_a_reset_stays_until_the_gpu_was_away_and_is_back() {
        let mut case = Case::new("", "");
        assert!(case.event(&Event::Xid(48)));
        assert!(!case.after(100_000) && case.health.next().is_none());
        assert!(!case.event(&Event::Answers), "it has answered all the time");
        case.event(&Event::Lost);
        assert!(case.event(&Event::Answers) && case.healthy());
        case.event(&Event::Xid(95));
        case.health.reset();
        assert!(case.healthy());
    }

    #[test]
    fn a_gpu_that_comes_and_goes_is_taken_back_later_each_time() {
        let mut case = Case::new("", "");
        assert!(case.event(&Event::Lost) && !case.healthy());
        assert!(!case.event(&Event::Lost), "it is lost already");
        assert!(case.event(&Event::Answers) && case.healthy());
        for hold_off in [10, 20, 40] {
            case.event(&Event::Lost);
            case.event(&Event::Answers);
            assert!(!case.after(hold_off - 1) && case.after(1), "{hold_off}");
        }
    }

    #[test]
    fn whoever_comes_after_knows_what_has_happened() {
        let mut case = Case::new("", "");
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let now = Instant::now() + Duration::from_secs(100_000);
        case.now = now;
        case.event(&Event::Xid(94));
        case.health.event(now, "GPU-1", &Event::Xid(48));
        case.health.event(now, "GPU-2", &Event::Lost);
        let kept = case.health.remember(Clocks { now, wall });
        let kept = serde_json::from_str(&serde_json::to_string(&kept).unwrap()).unwrap();
        // Another process, two seconds later, whose clock is another.
        let mut next = Case::new("", "");
        next.now = Instant::now() + Duration::from_secs(200_000);
        next.health.recall(Clocks { now: next.now, wall: wall + Duration::from_secs(2) }, kept);
        assert!(next.health.unhealthy("GPU-1").unwrap().contains("needs a reset"));
        assert!(!next.after(2) && next.after(1), "three of five seconds are left");
        next.event(&Event::Xid(94));
        assert!(!next.after(9) && next.after(1), "it is the second error");
        assert!(next.health.event(next.now, "GPU-2", &Event::Answers), "it is back");
    }

    #[test]
    fn a_clock_that_was_set_keeps_nothing_for_ever() {
        let clocks = Clocks { now: Instant::now(), wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1000) };
        assert_eq!(clocks.instant(u64::from(u32::MAX)), clocks.now + LONGEST);
        assert!(clocks.instant(0) <= clocks.now);
        assert_eq!(clocks.instant(u64::MAX), clocks.now);
    }

    #[test]
    fn one_gpu_is_not_another() {
        let mut case = Case::new("", "");
        case.event(&Event::Xid(79));
        case.health.event(case.now, "GPU-1", &Event::Unwatched);
        assert!(case.health.unhealthy("GPU-2").is_none());
        assert!(case.health.unhealthy("GPU-1").is_some() && !case.healthy());
        assert!(case.health.event(case.now, "GPU-1", &Event::Answers));
    }

    #[test]
    fn the_peers_variables_say_what_counts() {
        let unhealthy = |disable: &str, enable: &str, xid| {
            let mut case = Case::new(disable, enable);
            case.event(&Event::Xid(xid));
            !case.healthy()
        };
        assert!(unhealthy("", "", 48));
        assert!(!unhealthy("all", "", 48) && !unhealthy("xids", "", 48) && !unhealthy("48, 79", "", 48));
        assert!(unhealthy("79,x", "", 48));
        assert!(unhealthy("all", "48", 48) && !unhealthy("all", "48", 79));
        assert!(unhealthy("", "13", 13) && unhealthy("", "all", 31));
        let mut case = Case::new("all", "");
        assert!(case.event(&Event::Lost), "a GPU that is gone is gone");
    }

    #[test]
    fn the_page_has_the_table() {
        for (class, and) in [(Class::Harmless, ""), (Class::Reset, ""), (Class::Passing, " and all others")] {
            let of_class = XIDS.iter().filter(|(_, own, _)| *own == class).map(|(xid, ..)| xid.to_string());
            let row = format!("\n| {}{and} |", of_class.collect::<Vec<_>>().join(" "));
            assert!(include_str!("../../packaging/doc/kubernetes.md").contains(&row), "the page lacks {row}");
        }
    }

    #[test]
    fn the_table_ascends() {
        assert!(XIDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
