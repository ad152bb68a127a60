//! Whether the kernel runs programs of another machine's, through an emulator (kernel: admin-guide/binfmt-misc).

use super::{Host, procfs};

/// Whether there is an emulator for ELF files of this machine (elf.h, `EM_*`) that works in containers: one that the kernel has
/// open since it was registered (flag F), as its path means nothing in another root.
pub fn emulates(host: &Host, machine: u16) -> bool {
    let directory = host.proc.join("sys/fs/binfmt_misc");
    procfs::names(&directory)
        .iter()
        .filter_map(|name| procfs::read(&directory.join(name)))
        .any(|entry| handles(&entry, machine))
}

fn handles(entry: &str, machine: u16) -> bool {
    let field = |key: &str| entry.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let is_enabled = entry.lines().next() == Some("enabled");
    let is_open = field("flags:").is_some_and(|flags| flags.contains('F'));
    // The field e_machine of the header, least significant byte first.
    let magic = field("magic").filter(|magic| magic.starts_with("7f454c46"));
    let wanted = machine.to_le_bytes().map(|byte| format!("{byte:02x}")).concat();
    is_enabled && is_open && magic.and_then(|magic| magic.get(36..40)) == Some(wanted.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As qemu-user-static registers it.
    const ARM64: &str = "enabled\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: POCF\noffset 0\n\
         magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff";

    #[test]
    fn an_emulator_counts_if_it_is_enabled_open_and_for_that_machine() {
        assert!(handles(ARM64, 183));
        assert!(!handles(ARM64, 62));
        assert!(!handles(&ARM64.replace("enabled", "disabled"), 183));
        assert!(!handles(&ARM64.replace("POCF", "POC"), 183));
        for other in [
            "",
            "enabled",
            "enabled\nflags: F\nmagic 7f45",
            "enabled\ninterpreter /x\nflags: F\nextension .exe",
        ] {
            assert!(!handles(other, 183), "{other}");
        }
    }
}
