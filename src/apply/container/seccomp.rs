//! The system call filter: `profile` turned into classic BPF for the kernel (`seccomp(2)`, SECCOMP_SET_MODE_FILTER).
//!
//! A call that the profile does not allow fails with EPERM. One newer than every call that the profile knows fails with
//! ENOSYS: the profile's authors could not judge it, and C libraries fall back to the older call on ENOSYS alone (runc
//! does the same).

mod profile;

use profile::{ARM_PRIVATE, PROFILE, Row, Verdict, Whom};
use rustix::io::Errno;
use std::collections::HashMap;

/// One of a machine's system call tables.
struct Abi {
    /// AUDIT_ARCH_*: `EM_*` of the ELF header, and bits for 64-bit and little-endian (kernel, linux/audit.h).
    audit_arch: u32,
    /// Number and name of each call, numbers ascending.
    calls: Vec<(u32, &'static str)>,
}

macro_rules! calls {
    ($arch:ident) => {
        (0..=syscalls::$arch::Sysno::last().id().unsigned_abs()).filter_map(|number| {
            syscalls::$arch::Sysno::new(number as usize).map(|call| (number, call.name()))
        })
    };
}

/// The tables of a machine, by `std::env::consts::ARCH`; its own first.
fn abis(machine: &str) -> Vec<Abi> {
    match machine {
        "x86_64" => vec![
            Abi { audit_arch: 0xc000_003e, calls: calls!(x86_64).collect() },
            Abi { audit_arch: 0x4000_0003, calls: calls!(x86).collect() },
        ],
        "aarch64" => vec![
            Abi { audit_arch: 0xc000_00b7, calls: calls!(aarch64).collect() },
            Abi { audit_arch: 0x4000_0028, calls: calls!(arm).chain(ARM_PRIVATE.iter().copied()).collect() },
        ],
        _ => Vec::new(),
    }
}

/// The filter for a container that keeps `capabilities` (bit n is capability n), as `struct sock_filter`s one after
/// the other; [`crate::sys::seccomp::install`] takes it.
pub fn filter(capabilities: u64) -> Vec<u8> {
    compile(&abis(std::env::consts::ARCH), capabilities).iter().flat_map(|i| i.to_bytes()).collect()
}

impl Row {
    fn applies(&self, capabilities: u64) -> bool {
        match self.whom {
            Whom::All => true,
            Whom::With(capability) => capabilities & capability.bitmask() != 0,
            Whom::Without(capability) => capabilities & capability.bitmask() == 0,
        }
    }
}

/// `verdict` holds from this value on, up to the next step.
#[derive(Debug, PartialEq)]
struct Step {
    from: u32,
    verdict: Verdict,
}

/// Appends a step, unless it says what the one before it says.
fn step(steps: &mut Vec<Step>, from: u32, verdict: Verdict) {
    if steps.last().is_some_and(|last| last.from == from) {
        steps.pop();
    }
    if steps.last().is_none_or(|last| last.verdict != verdict) {
        steps.push(Step { from, verdict });
    }
}

/// What happens on each number of a table.
fn steps(abi: &Abi, capabilities: u64) -> Vec<Step> {
    // For each call that the profile knows, what it says to this container, if anything.
    let mut verdicts: HashMap<&str, Option<Verdict>> = HashMap::with_capacity(512);
    for row in PROFILE {
        let verdict = row.applies(capabilities).then_some(row.verdict);
        for name in row.names.split(' ') {
            let known = verdicts.entry(name).or_default();
            *known = known.or(verdict);
        }
    }
    let mut steps = vec![Step { from: 0, verdict: Verdict::Fail(Errno::NOSYS) }];
    let known = abi.calls.iter().filter_map(|&(number, name)| Some((number, *verdicts.get(name)?)));
    // Where the gap to the next known call is judged: EPERM below the newest call of the common table.
    let mut next = 0;
    for (number, verdict) in known {
        let private = ARM_PRIVATE.iter().any(|&(private, _)| private == number);
        if !private && next < number {
            step(&mut steps, next, Verdict::Fail(Errno::PERM));
        }
        step(&mut steps, number, verdict.unwrap_or(Verdict::Fail(Errno::PERM)));
        next = number + 1;
        step(&mut steps, next, Verdict::Fail(Errno::NOSYS));
    }
    steps
}

/// One instruction, `struct sock_filter` of linux/filter.h.
#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    k: u32,
}

impl Instruction {
    fn to_bytes(self) -> [u8; 8] {
        let ([c0, c1], [k0, k1, k2, k3]) = (self.code.to_ne_bytes(), self.k.to_ne_bytes());
        [c0, c1, self.if_true, self.if_false, k0, k1, k2, k3]
    }
}

/// BPF_LD | BPF_W | BPF_ABS: a word of `struct seccomp_data`.
const LOAD: u16 = 0x20;
/// BPF_JMP | BPF_JA.
const JUMP: u16 = 0x05;
/// BPF_JMP | BPF_JEQ | BPF_K.
const JUMP_EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JGE | BPF_K, unsigned.
const JUMP_NOT_BELOW: u16 = 0x35;
/// BPF_JMP | BPF_JSET | BPF_K.
const JUMP_ANY_BIT: u16 = 0x45;
/// BPF_RET | BPF_K.
const RETURN: u16 = 0x06;

/// SECCOMP_RET_ALLOW.
const RETURN_ALLOW: u32 = 0x7fff_0000;
/// SECCOMP_RET_ERRNO; the errno is in the lower half.
const RETURN_ERRNO: u32 = 0x0005_0000;
/// SECCOMP_RET_KILL_PROCESS.
const RETURN_KILL: u32 = 0x8000_0000;

/// Offsets in `struct seccomp_data`; both machines are little-endian, so an argument's lower half comes first.
const NUMBER: u32 = 0;
const AUDIT_ARCH: u32 = 4;
const fn low_half(argument: u32) -> u32 {
    16 + 8 * argument
}
const fn high_half(argument: u32) -> u32 {
    low_half(argument) + 4
}

/// A program that is written from its end to its beginning: BPF jumps only forward, so every target exists already.
#[derive(Default)]
struct Backwards {
    instructions: Vec<Instruction>,
    /// The nearest `return` of each value.
    returns: HashMap<u32, Place>,
}

/// An instruction's distance from the program's end.
#[derive(Clone, Copy)]
struct Place(usize);

/// How far a conditional jump reaches, less room for the two [`JUMP`]s that may have to come between.
const REACH: usize = u8::MAX as usize - 2;

impl Backwards {
    fn put(&mut self, code: u16, if_true: u8, if_false: u8, k: u32) -> Place {
        self.instructions.push(Instruction { code, if_true, if_false, k });
        Place(self.instructions.len() - 1)
    }

    /// How many instructions lie between the next one to be put and `place`.
    fn distance(&self, place: Place) -> usize {
        self.instructions.len() - 1 - place.0
    }

    /// `place`, or a jump to it that is nearer.
    fn near(&mut self, place: Place) -> Place {
        match self.distance(place) {
            near if near <= REACH => place,
            far => self.put(JUMP, 0, 0, u32::try_from(far).unwrap_or(u32::MAX)),
        }
    }

    fn jump(&mut self, code: u16, k: u32, if_true: Place, if_false: Place) -> Place {
        let if_true = self.near(if_true);
        let if_false = self.near(if_false);
        let offset = |place| u8::try_from(self.distance(place)).unwrap_or(u8::MAX);
        let (if_true, if_false) = (offset(if_true), offset(if_false));
        self.put(code, if_true, if_false, k)
    }

    fn ret(&mut self, value: u32) -> Place {
        match self.returns.get(&value) {
            Some(&place) if self.distance(place) <= REACH => place,
            _ => {
                let place = self.put(RETURN, 0, 0, value);
                self.returns.insert(value, place);
                place
            }
        }
    }

    fn verdict(&mut self, verdict: Verdict) -> Place {
        match verdict {
            Verdict::Allow => self.ret(RETURN_ALLOW),
            Verdict::Fail(errno) => self.ret(RETURN_ERRNO | errno.raw_os_error().unsigned_abs()),
            Verdict::AllowIfClear(argument, bits) => {
                let (refuse, allow) = (self.verdict(Verdict::Fail(Errno::PERM)), self.ret(RETURN_ALLOW));
                self.jump(JUMP_ANY_BIT, bits, refuse, allow);
                self.put(LOAD, 0, 0, low_half(argument))
            }
            Verdict::AllowIfIn(argument, ranges) => {
                let refuse = Verdict::Fail(Errno::PERM);
                let mut steps = vec![Step { from: 0, verdict: refuse }];
                for &(first, last) in ranges {
                    step(&mut steps, first, Verdict::Allow);
                    if let Some(after) = last.checked_add(1) {
                        step(&mut steps, after, refuse);
                    }
                }
                self.search(&steps);
                let low = self.put(LOAD, 0, 0, low_half(argument));
                let refuse = self.verdict(refuse);
                self.jump(JUMP_EQUAL, 0, low, refuse);
                self.put(LOAD, 0, 0, high_half(argument))
            }
        }
    }

    /// Binary search for the step in which the loaded word lies.
    fn search(&mut self, steps: &[Step]) -> Place {
        match steps {
            [] => self.ret(RETURN_KILL),
            [one] => self.verdict(one.verdict),
            _ => {
                let (below, above) = steps.split_at(steps.len() / 2);
                let first_above = above.first().map_or(0, |step| step.from);
                let (above, below) = (self.search(above), self.search(below));
                self.jump(JUMP_NOT_BELOW, first_above, above, below)
            }
        }
    }
}

fn compile(abis: &[Abi], capabilities: u64) -> Vec<Instruction> {
    let mut program = Backwards::default();
    let sections: Vec<(u32, Place)> = abis
        .iter()
        .rev()
        .map(|abi| {
            program.search(&steps(abi, capabilities));
            (abi.audit_arch, program.put(LOAD, 0, 0, NUMBER))
        })
        .collect();
    // A table that this machine's kernel does not have.
    let mut otherwise = program.ret(RETURN_KILL);
    for (audit_arch, section) in sections {
        otherwise = program.jump(JUMP_EQUAL, audit_arch, section, otherwise);
    }
    program.put(LOAD, 0, 0, AUDIT_ARCH);
    program.instructions.reverse();
    program.instructions
}

#[cfg(test)]
mod tests {
    use super::*;
    use caps::Capability;
    use proptest::prelude::*;

    /// Runs classic BPF over a `struct seccomp_data`, refusing whatever the kernel would refuse.
    fn run(program: &[Instruction], number: u32, audit_arch: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(audit_arch.to_le_bytes());
        data.extend(0_u64.to_le_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        let (mut at, mut accumulator) = (0, 0_u32);
        loop {
            let Instruction { code, if_true, if_false, k } = program[at];
            let branch = |taken: bool| usize::from(if taken { if_true } else { if_false });
            at += 1 + match code {
                LOAD => {
                    let word = data[k as usize..][..4].try_into().unwrap();
                    accumulator = u32::from_le_bytes(word);
                    0
                }
                JUMP => k as usize,
                JUMP_EQUAL => branch(accumulator == k),
                JUMP_NOT_BELOW => branch(accumulator >= k),
                JUMP_ANY_BIT => branch(accumulator & k != 0),
                RETURN => return k,
                _ => panic!("no such instruction: {code:#x}"),
            };
        }
    }

    /// What the profile says, looked up row by row.
    struct Oracle {
        abi: Abi,
        rows: HashMap<&'static str, Vec<&'static Row>>,
        newest: u32,
    }

    impl Oracle {
        fn of(abi: Abi) -> Self {
            let mut rows: HashMap<_, Vec<_>> = HashMap::new();
            for row in PROFILE {
                row.names.split(' ').for_each(|name| rows.entry(name).or_default().push(row));
            }
            let common = abi.calls.iter().filter(|call| call.0 < 0xf_0000 && rows.contains_key(call.1));
            let newest = common.map(|call| call.0).max().unwrap();
            Self { abi, rows, newest }
        }

        fn expected(&self, capabilities: u64, number: u32, arguments: [u64; 6]) -> u32 {
            const EPERM: u32 = 0x0005_0001;
            const ENOSYS: u32 = 0x0005_0026;
            let name = self.abi.calls.iter().find(|call| call.0 == number).map_or("", |call| call.1);
            let Some(rows) = self.rows.get(name) else {
                return if number > self.newest { ENOSYS } else { EPERM };
            };
            match rows.iter().find(|row| row.applies(capabilities)).map(|row| row.verdict) {
                None => EPERM,
                Some(Verdict::Allow) => RETURN_ALLOW,
                Some(Verdict::Fail(errno)) => RETURN_ERRNO + errno.raw_os_error().unsigned_abs(),
                Some(Verdict::AllowIfClear(argument, bits)) => {
                    if arguments[argument as usize] & u64::from(bits) == 0 { RETURN_ALLOW } else { EPERM }
                }
                Some(Verdict::AllowIfIn(argument, ranges)) => {
                    let value = arguments[argument as usize];
                    let inside = |&(a, b): &(u32, u32)| u64::from(a) <= value && value <= u64::from(b);
                    if ranges.iter().any(inside) { RETURN_ALLOW } else { EPERM }
                }
            }
        }
    }

    const MACHINES: [&str; 2] = ["x86_64", "aarch64"];
    /// Docker's default set, none, all.
    const CAPABILITIES: [u64; 3] = [0xa804_25fb, 0, u64::MAX];

    #[test]
    fn every_number_gets_what_the_profile_says() {
        let first =
            [0, 1, 12, 17, 38, 39, 40, 46, 0x11, 0x1000_0000, 0x0002_0008, 0xffff_ffff, 1 << 32, u64::MAX];
        for machine in MACHINES {
            for capabilities in CAPABILITIES {
                let abis = abis(machine);
                let program = compile(&abis, capabilities);
                for oracle in abis.into_iter().map(Oracle::of) {
                    for number in (0..700).chain(0xf_0000..0xf_0008).chain([0x4000_0027, u32::MAX]) {
                        for argument in first {
                            let arguments = [argument, 0, 0, 0, 0, 0];
                            assert_eq!(
                                run(&program, number, oracle.abi.audit_arch, arguments),
                                oracle.expected(capabilities, number, arguments),
                                "{machine} {:#x} {number} {argument:#x} {capabilities:#x}",
                                oracle.abi.audit_arch
                            );
                        }
                    }
                }
                assert_eq!(run(&program, 0, 0x8000_0016, [0; 6]), RETURN_KILL);
            }
        }
    }

    proptest! {
        #[test]
        fn any_container_gets_what_the_profile_says(
            capabilities: u64, machine in 0..2_usize, table in 0..2_usize, number in 0..500_u32, arguments: [u64; 6],
            family in 0..64_u64,
        ) {
            let mut abis = abis(MACHINES[machine]);
            let program = compile(&abis, capabilities);
            let oracle = Oracle::of(abis.remove(table));
            for first in [arguments[0], arguments[0] & 0xffff_ffff, family] {
                let mut arguments = arguments;
                arguments[0] = first;
                for number in [number, 41, 56, 120, 359, 220, 198, 135, 136, 92] {
                    prop_assert_eq!(
                        run(&program, number, oracle.abi.audit_arch, arguments),
                        oracle.expected(capabilities, number, arguments)
                    );
                }
            }
        }
    }

    #[test]
    fn the_kernel_takes_programs_of_this_shape() {
        for machine in MACHINES {
            let program = compile(&abis(machine), 0);
            assert!(program.len() <= 4096, "BPF_MAXINSNS");
            for (at, instruction) in program.iter().enumerate() {
                let reach = match instruction.code {
                    JUMP => instruction.k as usize,
                    _ => usize::from(instruction.if_true.max(instruction.if_false)),
                };
                assert!(at + 1 + reach < program.len() || instruction.code == RETURN);
            }
        }
    }

    #[test]
    fn far_jumps_arrive() {
        // Every other number allowed, two thousand of them: no place is near another.
        let calls: Vec<Step> = (0..2000)
            .map(|from| Step {
                from,
                verdict: if from % 2 == 0 { Verdict::Allow } else { Verdict::Fail(Errno::PERM) },
            })
            .collect();
        let mut program = Backwards::default();
        program.search(&calls);
        program.put(LOAD, 0, 0, NUMBER);
        program.instructions.reverse();
        assert!(program.instructions.iter().any(|instruction| instruction.code == JUMP));
        for number in 0..2000 {
            let allowed = run(&program.instructions, number, 0, [0; 6]) == RETURN_ALLOW;
            assert_eq!(allowed, number % 2 == 0);
        }
    }

    #[test]
    fn every_name_of_the_profile_is_a_call_somewhere() {
        let all: Vec<Abi> = MACHINES.into_iter().flat_map(abis).collect();
        for name in PROFILE.iter().flat_map(|row| row.names.split(' ')) {
            assert!(all.iter().any(|abi| abi.calls.iter().any(|call| call.1 == name)), "{name:?}");
        }
    }

    #[test]
    fn dockers_words_on_well_known_calls() {
        let [x86_64, i386] = [0xc000_003e, 0x4000_0003];
        let of = |capabilities, number, audit_arch, first| {
            run(&compile(&abis("x86_64"), capabilities), number, audit_arch, [first, 0, 0, 0, 0, 0])
        };
        let docker = CAPABILITIES[0];
        let admin = docker | Capability::CAP_SYS_ADMIN.bitmask();
        for (number, audit_arch, first, expected) in [
            (0, x86_64, 0, RETURN_ALLOW),             // read
            (165, x86_64, 0, RETURN_ERRNO + 1),       // mount
            (272, x86_64, 0, RETURN_ERRNO + 1),       // unshare
            (250, x86_64, 0, RETURN_ERRNO + 1),       // keyctl
            (435, x86_64, 0, RETURN_ERRNO + 38),      // clone3
            (56, x86_64, 0x11, RETURN_ALLOW),         // clone(SIGCHLD)
            (56, x86_64, 0x1000_0000, 0x0005_0001),   // clone(CLONE_NEWUSER)
            (161, x86_64, 0, RETURN_ALLOW),           // chroot, with CAP_SYS_CHROOT
            (41, x86_64, 2, RETURN_ALLOW),            // socket(AF_INET)
            (41, x86_64, 38, RETURN_ERRNO + 1),       // socket(AF_ALG)
            (41, x86_64, 0x1_0000_0026, 0x0005_0001), // what the kernel takes for AF_ALG, too
            (359, i386, 40, RETURN_ERRNO + 1),        // socket(AF_VSOCK)
            (102, i386, 1, RETURN_ERRNO + 38),        // socketcall
            (21, i386, 0, RETURN_ERRNO + 1),          // mount
            (467, x86_64, 0, RETURN_ERRNO + 38),      // open_tree_attr, newer than the profile
            (0x4000_0000, x86_64, 0, 0x0005_0026),    // read, x32
        ] {
            assert_eq!(
                of(docker, number, audit_arch, first),
                expected,
                "{number} {audit_arch:#x} {first:#x}"
            );
        }
        assert_eq!(of(admin, 165, x86_64, 0), RETURN_ALLOW);
        assert_eq!(of(admin, 435, x86_64, 0), RETURN_ALLOW);
    }
}
