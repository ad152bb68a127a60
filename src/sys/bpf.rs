//! Device rules of a cgroup v2, where no `devices.allow` exists: an eBPF program of type BPF_PROG_TYPE_CGROUP_DEVICE that
//! the kernel asks on every mknod and open of a device node (Documentation/admin-guide/cgroup-v2.rst, "Device controller").

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Which device nodes a rule means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Character devices.
    Char,
    /// Block devices.
    Block,
    /// Both.
    All,
}

/// What a cgroup's processes may do with some devices. Without a rule nothing is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRule {
    /// Which kind.
    pub kind: DeviceKind,
    /// Major number; `None` means any.
    pub major: Option<u32>,
    /// Minor number; `None` means any.
    pub minor: Option<u32>,
    /// May be opened for reading.
    pub read: bool,
    /// May be opened for writing.
    pub write: bool,
    /// A node may be made.
    pub mknod: bool,
}

impl DeviceRule {
    /// BPF_DEVCG_ACC_*.
    fn access(self) -> u32 {
        u32::from(self.mknod) | u32::from(self.read) << 1 | u32::from(self.write) << 2
    }
}

/// One instruction, `struct bpf_insn` of linux/bpf.h as a number: opcode, registers, offset, immediate, from the lowest
/// byte up (both machines are little-endian).
type Instruction = u64;

/// A register; the context comes in R1, the answer goes out in R0.
#[derive(Clone, Copy)]
enum Register {
    Answer,
    Context,
    /// BPF_DEVCG_DEV_*.
    Kind,
    /// The BPF_DEVCG_ACC_* that are asked for.
    Access,
    Major,
    Minor,
    Scratch,
}
use Register::{Access, Answer, Context, Kind, Major, Minor, Scratch};

/// BPF_LDX | BPF_MEM | BPF_W: `destination = *(u32 *)(source + offset)`.
const LOAD: u8 = 0x61;
/// BPF_ALU64 | BPF_MOV | BPF_X.
const COPY: u8 = 0xbf;
/// BPF_ALU64 | BPF_MOV | BPF_K.
const SET: u8 = 0xb7;
/// BPF_ALU | BPF_AND | BPF_K.
const AND: u8 = 0x54;
/// BPF_ALU | BPF_RSH | BPF_K.
const SHIFT_RIGHT: u8 = 0x74;
/// BPF_JMP32 | BPF_JNE | BPF_K: majors and minors are 32 bits wide.
const JUMP_UNEQUAL: u8 = 0x56;
/// BPF_JMP | BPF_EXIT.
const EXIT: u8 = 0x95;

/// An instruction on two registers.
fn between(opcode: u8, to: Register, from: Register, offset: u16) -> Instruction {
    with(opcode, to, offset, 0) | (from as u64) << 12
}

/// An instruction on a register and a number.
fn with(opcode: u8, to: Register, offset: u16, immediate: u32) -> Instruction {
    u64::from(opcode) | (to as u64) << 8 | u64::from(offset) << 16 | u64::from(immediate) << 32
}

/// The program that allows what `rules` allow, and nothing else.
fn device_program(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut program = allowed_first(rules);
    program.extend([with(SET, Answer, 0, 0), with(EXIT, Answer, 0, 0)]);
    program
}

/// What ends with "allowed" where `rules` allow it, and else goes on behind its last instruction, the context in R1 as it came.
/// Rules on the same devices add up, as those of `devices.allow` do.
fn allowed_first(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut merged: Vec<DeviceRule> = Vec::with_capacity(rules.len());
    for rule in rules {
        let same = |other: &&mut DeviceRule| {
            (other.kind, other.major, other.minor) == (rule.kind, rule.major, rule.minor)
        };
        match merged.iter_mut().find(same) {
            Some(other) => {
                other.read |= rule.read;
                other.write |= rule.write;
                other.mknod |= rule.mknod;
            }
            None => merged.push(*rule),
        }
    }
    // struct bpf_cgroup_dev_ctx { __u32 access_type; __u32 major; __u32 minor; }, access_type = access << 16 | kind.
    let mut program = vec![
        between(LOAD, Kind, Context, 0),
        between(COPY, Access, Kind, 0),
        with(SHIFT_RIGHT, Access, 0, 16),
        with(AND, Kind, 0, 0xffff),
        between(LOAD, Major, Context, 4),
        between(LOAD, Minor, Context, 8),
    ];
    for rule in merged {
        let mut tests: Vec<(Register, u32)> = Vec::new();
        match rule.kind {
            DeviceKind::Block => tests.push((Kind, 1)),
            DeviceKind::Char => tests.push((Kind, 2)),
            DeviceKind::All => {}
        }
        tests.extend(rule.major.map(|major| (Major, major)));
        tests.extend(rule.minor.map(|minor| (Minor, minor)));
        // After the tests: what is asked for beyond the rule, compared with nothing, and the answer.
        let mut left = u16::try_from(tests.len()).unwrap_or(0) + 5;
        for (register, value) in tests {
            left -= 1;
            program.push(with(JUMP_UNEQUAL, register, left, value));
        }
        program.extend([
            between(COPY, Scratch, Access, 0),
            with(AND, Scratch, 0, !rule.access()),
            with(JUMP_UNEQUAL, Scratch, 2, 0),
            with(SET, Answer, 0, 1),
            with(EXIT, Answer, 0, 0),
        ]);
    }
    program
}

/// The beginning of `union bpf_attr` as BPF_PROG_LOAD reads it.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// The beginning of `union bpf_attr` as BPF_PROG_ATTACH reads it.
#[repr(C)]
struct AttachAttributes {
    target: i32,
    program: i32,
    attach_type: u32,
    flags: u32,
    replaced: i32,
}

/// The same as BPF_PROG_QUERY reads it and fills it in.
#[repr(C)]
struct QueryAttributes {
    target: i32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

/// The same as BPF_PROG_GET_FD_BY_ID reads it.
#[repr(C)]
struct IdAttributes {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// The same as BPF_OBJ_GET_INFO_BY_FD reads it.
#[repr(C)]
struct InfoAttributes {
    program: i32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_prog_info`; the kernel fills in as much as there is room for.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    program_type: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    /// In bytes.
    instructions_length: u32,
    jited: u64,
    instructions: u64,
}

/// BPF_CGROUP_DEVICE
const DEVICE: u32 = 6;
/// BPF_F_ALLOW_MULTI: more than one program may be attached, and all of them must allow, as those of ancestors must.
const ALLOW_MULTI: u32 = 2;

/// bpf(2).
///
/// # Safety
/// Every pointer in `attributes` is valid for what `command` does with it, and no field makes the kernel close or take
/// a descriptor.
unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads and writes no more bytes of `attributes` than the third argument says; the rest is the
    // caller's word.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    match libc::c_int::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// BPF_PROG_LOAD; with a `log` the verifier writes into it.
fn load(program: &[Instruction], log: Option<&mut [u8]>) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: program.len().try_into().map_err(too_long)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        // Shown by `bpftool prog`.
        name: *b"gpurun_device\0\0\0",
        ..LoadAttributes::default()
    };
    if let Some(log) = log {
        attributes.log_level = 1;
        attributes.log_size = log.len().try_into().map_err(too_long)?;
        attributes.log = log.as_mut_ptr().addr() as u64;
    }
    // SAFETY: `program` holds as many instructions as said, the license ends in NUL, and `log` is as long as said and ours
    // alone; all live until the call returns. On success the kernel made a new descriptor (close-on-exec) for us.
    unsafe { bpf(BPF_PROG_LOAD, &mut attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Kernels before 5.11 count programs as locked memory of the user and answer EPERM where that is used up, root's mostly
/// by systemd's own programs. The limit is put back: the container has one of its own.
fn load_with_memory(program: &[Instruction]) -> io::Result<OwnedFd> {
    match load(program, None) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let before = getrlimit(Resource::Memlock);
            if setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }).is_err() {
                return Err(error);
            }
            let loaded = load(program, None);
            setrlimit(Resource::Memlock, before)?;
            loaded
        }
        // What the verifier says is worth a second try; EINVAL and EACCES are its answers.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)) => {
            let mut log = vec![0; 64 << 10];
            load(program, Some(&mut log)).map_err(|_| {
                let said = log.split(|&byte| byte == 0).next().unwrap_or_default();
                io::Error::new(error.kind(), format!("{error}: {}", String::from_utf8_lossy(said).trim()))
            })
        }
        result => result,
    }
}

/// Restricts the processes of the cgroup v2 directory `cgroup`, and of those below it, to the devices of `rules`. What
/// an ancestor forbids stays forbidden. The restriction ends with the cgroup.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN (or CAP_BPF and CAP_NET_ADMIN) in the first user namespace, or where an ancestor has a
/// program that allows none below it; EINVAL on a kernel without CONFIG_CGROUP_BPF, with what the verifier says.
pub fn restrict_devices(cgroup: BorrowedFd<'_>, rules: &[DeviceRule]) -> io::Result<()> {
    attach(cgroup, &load_with_memory(&device_program(rules))?, ALLOW_MULTI, None)
}

/// BPF_PROG_ATTACH, in one step: the cgroup is never without a program in between.
fn attach(
    cgroup: BorrowedFd<'_>,
    program: &OwnedFd,
    flags: u32,
    replaced: Option<&OwnedFd>,
) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    let mut attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: DEVICE,
        flags,
        replaced: replaced.map_or(0, AsRawFd::as_raw_fd),
    };
    // SAFETY: no pointers; the kernel takes references of its own to the descriptors.
    unsafe { bpf(BPF_PROG_ATTACH, &mut attributes) }.map(drop)
}

/// A device program that somebody else attached to a cgroup, and the same with rules of ours in front of it.
#[derive(Debug)]
pub struct Extended {
    attach_flags: u32,
    old: OwnedFd,
    new: OwnedFd,
}

impl Extended {
    /// Loads, for every device program that is attached to the cgroup v2 directory `cgroup` itself, one that allows what `rules`
    /// allow and leaves the rest to the old instructions. Nothing is attached yet; none where nothing is restricted.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN in the first user namespace; EACCES where the kernel hides a program's instructions
    /// (net.core.bpf_jit_harden=2); what the verifier says where it does not take them again.
    pub fn load_all(cgroup: BorrowedFd<'_>, rules: &[DeviceRule]) -> io::Result<Vec<Self>> {
        let (attach_flags, ids) = attached(cgroup)?;
        let extend = |id| {
            let old = by_id(id)?;
            let mut program = allowed_first(rules);
            // Jumps are relative and the registers that we use are unknown to the old program, so it runs as before.
            program.extend(instructions(&old)?);
            Ok(Self { attach_flags, new: load_with_memory(&program)?, old })
        };
        ids.into_iter().map(extend).collect()
    }

    /// Puts the new program in the place of the old one on the same cgroup.
    ///
    /// # Errors
    /// ENOENT where the old one is not attached any more.
    pub fn replace(self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        /// Linux 5.6.
        const BPF_F_REPLACE: u32 = 4;
        if self.attach_flags & ALLOW_MULTI == 0 {
            // There can be one alone, and the next takes its place.
            return attach(cgroup, &self.new, self.attach_flags, None);
        }
        attach(cgroup, &self.new, self.attach_flags | BPF_F_REPLACE, Some(&self.old))
    }
}

/// BPF_PROG_QUERY: how programs are attached to this very cgroup, and the ids of those for devices.
fn attached(cgroup: BorrowedFd<'_>) -> io::Result<(u32, Vec<u32>)> {
    const BPF_PROG_QUERY: libc::c_int = 16;
    /// BPF_CGROUP_MAX_PROGS
    const MOST: usize = 64;
    let mut ids = vec![0_u32; MOST];
    let mut attributes = QueryAttributes {
        target: cgroup.as_raw_fd(),
        attach_type: DEVICE,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr().addr() as u64,
        count: 64,
        padding: 0,
    };
    // SAFETY: `ids` has room for `count` numbers and is ours alone until the call returns, as is `attributes`, into which
    // the kernel writes the flags and the count.
    unsafe { bpf(BPF_PROG_QUERY, &mut attributes) }?;
    ids.truncate(attributes.count as usize);
    Ok((attributes.attach_flags, ids))
}

/// BPF_PROG_GET_FD_BY_ID
fn by_id(id: u32) -> io::Result<OwnedFd> {
    const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
    let mut attributes = IdAttributes { id, next_id: 0, open_flags: 0 };
    // SAFETY: no pointers. On success the kernel made a new descriptor (close-on-exec) for us.
    unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// A program's instructions by BPF_OBJ_GET_INFO_BY_FD. Those of device programs come back as they were loaded: the kernel
/// rewrites no access to their context (`cg_dev_verifier_ops` in kernel/bpf/cgroup.c).
fn instructions(program: &OwnedFd) -> io::Result<Vec<Instruction>> {
    let length = info(program, &mut [])?.instructions_length as usize;
    let mut instructions = vec![0; length / size_of::<Instruction>()];
    let info = info(program, &mut instructions)?;
    if info.instructions == 0 || info.instructions_length as usize != length || length == 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the kernel hides the program's instructions",
        ));
    }
    Ok(instructions)
}

fn info(program: &OwnedFd, instructions: &mut [Instruction]) -> io::Result<ProgramInfo> {
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut info = ProgramInfo {
        instructions_length: size_of_val(instructions).try_into().map_err(too_long)?,
        instructions: if instructions.is_empty() { 0 } else { instructions.as_mut_ptr().addr() as u64 },
        ..ProgramInfo::default()
    };
    let mut attributes = InfoAttributes {
        program: program.as_raw_fd(),
        length: size_of::<ProgramInfo>().try_into().map_err(too_long)?,
        info: (&raw mut info).addr() as u64,
    };
    // SAFETY: `info` and the instructions that it names are as long as said and ours alone until the call returns.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn allow(kind: DeviceKind, major: Option<u32>, minor: Option<u32>, access: &str) -> DeviceRule {
        let [read, write, mknod] = ['r', 'w', 'm'].map(|letter| access.contains(letter));
        DeviceRule { kind, major, minor, read, write, mknod }
    }

    /// Runs the few instructions that a device program is made of.
    fn run(program: &[Instruction], access_type: u32, major: u32, minor: u32) -> u64 {
        let (mut at, mut registers) = (0, [0_u64; 7]);
        loop {
            let [opcode, both, o0, o1, i0, i1, i2, i3] = program[at].to_le_bytes();
            let (to, from) = (usize::from(both & 15), usize::from(both >> 4));
            let offset = usize::from(u16::from_le_bytes([o0, o1]));
            let immediate = u32::from_le_bytes([i0, i1, i2, i3]);
            let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap();
            at += 1;
            match opcode {
                LOAD => registers[to] = [access_type, major, minor][offset / 4].into(),
                COPY => registers[to] = registers[from],
                SET => registers[to] = immediate.into(),
                AND => registers[to] = (low(registers[to]) & immediate).into(),
                SHIFT_RIGHT => registers[to] = (low(registers[to]) >> immediate).into(),
                JUMP_UNEQUAL if low(registers[to]) != immediate => at += offset,
                JUMP_UNEQUAL => {}
                EXIT => return registers[Answer as usize],
                _ => panic!("no such instruction: {opcode:#x}"),
            }
        }
    }

    fn rule() -> impl Strategy<Value = DeviceRule> {
        let kind = prop_oneof![Just(DeviceKind::Char), Just(DeviceKind::Block), Just(DeviceKind::All)];
        let number = || proptest::option::of(0..4_u32);
        (kind, number(), number(), any::<[bool; 3]>()).prop_map(
            |(kind, major, minor, [read, write, mknod])| DeviceRule {
                kind,
                major,
                minor,
                read,
                write,
                mknod,
            },
        )
    }

    proptest! {
        #[test]
        fn a_program_allows_what_its_rules_allow(
            rules in proptest::collection::vec(rule(), 0..12), block: bool, access in 1..8_u32, major in 0..4_u32, minor in 0..4_u32,
        ) {
            // What each rule on the same devices allows is taken together.
            let allowed = rules.iter().any(|rule| {
                let together = rules
                    .iter()
                    .filter(|r| (r.kind, r.major, r.minor) == (rule.kind, rule.major, rule.minor))
                    .fold(0, |access, r| access | r.access());
                let kind = rule.kind == DeviceKind::All || (rule.kind == DeviceKind::Block) == block;
                let numbers = rule.major.is_none_or(|n| n == major) && rule.minor.is_none_or(|n| n == minor);
                kind && numbers && access & !together == 0
            });
            let asked = access << 16 | if block { 1 } else { 2 };
            prop_assert_eq!(run(&device_program(&rules), asked, major, minor), u64::from(allowed));
        }

        #[test]
        fn the_verifier_takes_any_rules(rules in proptest::collection::vec(rule(), 0..12)) {
            match load_with_memory(&device_program(&rules)) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !rustix::process::geteuid().is_root() => {}
                result => { result.unwrap(); }
            }
        }
    }

    #[test]
    fn rules_in_front_of_a_program_leave_the_rest_to_it() {
        let null = [allow(DeviceKind::Char, Some(1), Some(3), "rw")];
        let mut program = allowed_first(&[allow(DeviceKind::Char, Some(195), Some(0), "rwm")]);
        program.extend(device_program(&null));
        for (access, kind, major, minor, allowed) in [
            (7, 2, 195, 0, 1),
            (7, 1, 195, 0, 0),
            (7, 2, 195, 1, 0),
            (6, 2, 1, 3, 1),
            (1, 2, 1, 3, 0),
            (2, 2, 1, 5, 0),
        ] {
            let asked = access << 16 | kind;
            assert_eq!(run(&program, asked, major, minor), allowed, "{access} {kind} {major}:{minor}");
        }
    }

    #[test]
    fn the_kernel_gives_a_program_back_as_it_was_loaded() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: loading a program needs root");
            return;
        }
        let program = device_program(&[allow(DeviceKind::All, None, Some(3), "rm")]);
        assert_eq!(instructions(&load(&program, None).unwrap()).unwrap(), program);
    }

    #[test]
    fn major_numbers_above_a_signed_immediate_are_compared_whole() {
        let program = device_program(&[allow(DeviceKind::Char, Some(u32::MAX), Some(1 << 31), "r")]);
        assert_eq!(run(&program, 2 << 16 | 2, u32::MAX, 1 << 31), 1);
        assert_eq!(run(&program, 2 << 16 | 2, u32::MAX, 0), 0);
    }

    #[test]
    fn a_refusal_says_what_the_verifier_says() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: loading a program needs root");
            return;
        }
        let error = load_with_memory(&[with(EXIT, Answer, 0, 0)]).unwrap_err();
        assert!(error.to_string().contains("R0"), "{error}");
    }
}
