//! What a failure is: a stable code, what happened, why, and what to do about it.
//!
//! There is one error type, because callers do not branch on kinds: they add what they know and pass it
//! on, and `main` prints it once. The code is looked up by users, in the README's table and in scripts.
#![forbid(unsafe_code)]

use std::fmt;

/// `Result` with gpurun's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! codes {
    ($($name:ident = $number:literal, $exit:literal, $meaning:literal, $fix:literal;)*) => {
        /// The stable code of a failure, printed as `GPU-NNNN`. A number is never used for something else.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code { $(#[doc = $meaning] $name = $number,)* }

        impl Code {
            /// Every code, in ascending order.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];
            /// What the code means in general, as the README's table says it.
            pub fn meaning(self) -> &'static str { match self { $(Code::$name => $meaning,)* } }
            /// gpurun's exit code for it: 125 gpurun failed, 126 the command cannot be run, 127 it was not found
            /// (Docker's numbers); 141 as of a program that SIGPIPE ended.
            pub fn exit_code(self) -> u8 { match self { $(Code::$name => $exit,)* } }
            /// The general fix of this code.
            pub fn fix(self) -> &'static str { match self { $(Code::$name => $fix,)* } }
        }
    };
}

codes! {
    Usage = 1, 125, "the command line cannot be understood",
        "`gpurun run --help` lists the options of `run`; `gpurun --help` lists the commands";
    Config = 2, 125, "the configuration file cannot be used",
        "correct the file that is named above; `gpurun config` prints every key with its meaning";
    Output = 3, 125, "the answer cannot be written to standard output",
        "make room on the disk that standard output goes to (`df -h .`), or name another file: `gpurun … > FILE`";
    OutputClosed = 4, 141, "the reader of standard output is gone; no message is printed",
        "let the reader read to the end: `gpurun … | cat`";
    NoDriver = 10, 125, "no NVIDIA driver is loaded on this host",
        "install NVIDIA's driver and load it with `modprobe nvidia`; `gpurun doctor` checks the host";
    NvmlMissing = 11, 125, "the driver's libnvidia-ml.so.1 was not found",
        "install the driver's libraries (Debian: apt-get install libnvidia-ml1), or name their root with --driver-root";
    NvmlFailed = 12, 125, "the driver's library was found but does not answer",
        "`nvidia-smi` shows what the driver says; `gpurun doctor` checks the host";
    VersionMismatch = 13, 125, "the driver's libraries and its kernel module have different versions",
        "reboot, or load the new module: `modprobe -r nvidia_uvm nvidia && modprobe nvidia`";
    DeviceNodeMissing = 14, 125, "a device node under /dev is missing or is not what it should be",
        "`nvidia-modprobe -c0 -u` makes the device nodes; `gpurun doctor` checks them";
    GpuLost = 15, 125, "the GPU that was asked for does not answer",
        "`gpurun ls` shows the GPUs that answer; reset the GPU with `nvidia-smi --gpu-reset -i INDEX` or reboot";
    Inventory = 16, 125, "the host's facts cannot be read or recorded",
        "`gpurun doctor` checks the host; `GPURUN_LOG=debug gpurun inventory` shows what was read";
    StateDir = 17, 125, "the directory in which gpurun keeps what it knows of the host cannot be used",
        "name a directory that you own in GPURUN_STATE_DIR";
    BadRequest = 20, 125, "the request for GPUs cannot be understood",
        "`--gpus all`, `--gpus 2` or `--gpus device=0,1`; `gpurun ls` shows the GPUs";
    UnknownGpu = 21, 125, "the GPU that was asked for does not exist",
        "`gpurun ls` shows the GPUs of this host and their names";
    BadCapability = 22, 125, "the driver capability does not exist or is not allowed",
        "`--gpus all,capabilities=compute,utility`; other capabilities are graphics, video, display, ngx and compat32";
    BadRequirement = 23, 125, "a requirement of the image cannot be understood",
        "correct the image's NVIDIA_REQUIRE_… variable, or start it with `-e NVIDIA_DISABLE_REQUIRE=1`";
    NotAllowed = 24, 125, "the administrator's policy does not allow this request",
        "ask the administrator of this host; `gpurun config` prints the policy and the file that sets it";
    Unsatisfied = 30, 125, "the host does not satisfy what the image requires",
        "use an image for this host, or start this one with `-e NVIDIA_DISABLE_REQUIRE=1`";
    CudaTooNew = 31, 125, "the image's CUDA is newer than the driver can run",
        "use an image for an older CUDA, or a newer driver; `gpurun ls` shows the driver's CUDA version";
    DriverIncomplete = 32, 125, "the driver lacks a file that the requested capability needs",
        "install the rest of the driver's packages; `gpurun doctor` lists what is missing";
    ImageReference = 40, 125, "the image's name cannot be understood",
        "NAME[:TAG][@DIGEST], oci:DIR, oci-archive:FILE, docker-archive:FILE or rootfs:DIR; see `gpurun run --help`";
    ImageNotFound = 41, 125, "the image does not exist",
        "`gpurun images` lists the images of the store; `gpurun pull NAME` fetches one";
    ImageBroken = 42, 125, "the image is damaged or not an image",
        "fetch or save the image again: `gpurun pull NAME`, `docker save -o FILE NAME`";
    DigestMismatch = 43, 125, "the image's bytes are not those that its digest promises",
        "fetch the image again with `gpurun pull NAME`; if that fails as well, push it to the registry again";
    LayerRefused = 44, 125, "a layer holds an entry that must not be unpacked",
        "build the image again without that entry: `docker build --no-cache .`";
    WrongPlatform = 45, 125, "the image is for another platform",
        "`gpurun pull --platform linux/amd64 NAME` fetches an image for another platform";
    Store = 46, 125, "the image store cannot be used",
        "name a directory that you own in GPURUN_STORE, or repair the one that is named above";
    Registry = 47, 125, "the registry cannot be reached or does not answer as it should",
        "check the name and the network, then try again: `gpurun pull NAME`";
    NotAuthorised = 48, 125, "the registry wants credentials, or refuses those that it got",
        "`docker login HOST` or `podman login HOST`, then try again";
    NoSpace = 49, 125, "there is no room for the image",
        "`gpurun prune` removes layers that no image needs; or name a larger disk in GPURUN_STORE";
    Namespace = 50, 125, "the kernel refuses to make the container's namespaces",
        "run gpurun as root, or allow user namespaces: `sysctl kernel.unprivileged_userns_clone=1`";
    Mount = 51, 125, "a mount of the container failed",
        "`GPURUN_LOG=debug gpurun …` shows each mount; `gpurun doctor` checks the host";
    Cgroup = 52, 125, "the container's cgroup cannot be set up",
        "leave out -m, --cpus and --pids-limit; `gpurun doctor` says which cgroups can be used";
    Seccomp = 53, 125, "the system call filter cannot be installed",
        "use a kernel with seccomp (CONFIG_SECCOMP_FILTER), or start with `--security-opt seccomp=unconfined`";
    User = 54, 125, "the container's user or group is unknown or cannot be used",
        "name a user by number: `-u UID:GID`";
    Volume = 55, 125, "a volume or its source cannot be used",
        "`-v /HOST/PATH:/CONTAINER/PATH[:ro]` with a source that exists";
    Limit = 56, 125, "a resource limit cannot be set",
        "leave out --ulimit, or raise the caller's own limit in /etc/security/limits.conf";
    Rootfs = 57, 125, "the container's root holds something that stands in the way",
        "correct the path in the image, or mount over it with `-v` or `--tmpfs`";
    Bundle = 58, 125, "the container's bundle, made by the engine, cannot be used",
        "the engine makes this directory: start the container again, and look at the engine's own log with `journalctl -u docker` (containerd, crio)";
    NoRuntime = 59, 125, "no low-level OCI runtime can be run",
        "apt-get install runc, or name another runtime in `runtimes` in /etc/gpurun/config.toml";
    CannotRun = 60, 126, "the command cannot be run",
        "`--entrypoint sh` starts a shell in the image to look at the file";
    CommandNotFound = 61, 127, "the command was not found in the container",
        "`--entrypoint sh` starts a shell in the image; name the command with its path";
    Confinement = 62, 125, "the container cannot be confined on this kernel",
        "`--network none` or `-u 1000`; or boot Linux 5.19 or newer with landlock in the kernel's option lsm=";
    Cdi = 70, 125, "a CDI document cannot be made, read or written",
        "`gpurun cdi generate --output /etc/cdi/nvidia.yaml` writes a new CDI spec; `gpurun cdi validate` checks those that exist";
    Cluster = 71, 125, "the cluster's API server cannot be reached, or refuses",
        "`kubectl auth can-i --list` in the plugin's pod shows its rights; check the plugin's service account";
    Mps = 72, 125, "a GPU cannot be shared by MPS",
        "`kubectl logs` of the plugin's pod shows the MPS daemon's messages; or take `sharing.mps` out of the plugin's configuration";
    Internal = 90, 125, "a system call failed that should not have",
        "run it again with GPURUN_LOG=debug, and report the output together with that of `gpurun inventory`";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU-{:04}", *self as u16)
    }
}

/// One failure. Displayed it is a paragraph: what happened, `cause:` where one is known, and `fix:`, one line each.
#[derive(Debug, Clone)]
pub struct Error(Box<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    code: Code,
    what: String,
    causes: Vec<String>,
    fix: Option<String>,
}

impl Error {
    /// A failure with its code and a sentence without a full stop.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self(Box::new(Inner { code, what: what.into(), causes: Vec::new(), fix: None }))
    }

    /// Adds a cause. Causes are printed in the order in which they were added.
    #[must_use]
    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.0.causes.push(cause.to_string());
        self
    }

    /// Says what the user should do. The first fix stays: the place nearest to the failure knows best.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.0.fix.get_or_insert_with(|| fix.into());
        self
    }

    /// Puts what the caller was doing in front; what was said before becomes the first cause.
    #[must_use]
    pub fn context(mut self, what: impl Into<String>) -> Self {
        let before = std::mem::replace(&mut self.0.what, what.into());
        self.0.causes.insert(0, before);
        self
    }

    /// The stable code.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// What happened, in one sentence.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// Why, outermost first, in one line; empty when `what` says it all.
    pub fn cause_line(&self) -> String {
        self.0.causes.join(": ")
    }

    /// The specific fix of the failure, or else the general fix of its code. Never empty. If the cause is that the process or the
    /// machine has no descriptor left, neither would help.
    pub fn fix_line(&self) -> &str {
        const SHORTAGES: [(&str, &str); 2] = [
            (
                "(os error 24)",
                "raise the limit of open files: `ulimit -n 4096`, or LimitNOFILE= of the service",
            ),
            ("(os error 23)", "raise the system's limit of open files: `sysctl -w fs.file-max=1000000`"),
        ];
        let fix = self.0.fix.as_deref().unwrap_or_else(|| self.code().fix());
        let is_cause = |errno: &str| self.0.causes.iter().any(|cause| cause.ends_with(errno));
        let shortage = SHORTAGES.iter().find(|(errno, _)| is_cause(errno) && !fix.contains("ulimit -n"));
        shortage.map_or(fix, |(_, fix)| fix)
    }

    /// The failure for an engine: one line, without phrases that engines interpret.
    ///
    /// Podman shows only the line that has such a phrase, and exits with 127 or 126 as if the container's command were the
    /// problem (libpod's getOCIRuntimeError and ExitCode, 4.3 to 5.8). Docker exits with 126 on "permission denied" and adds a
    /// question about mounts to "not a directory" (moby's setExitCodeFromError). An errno is therefore given by its name.
    pub fn for_engine(&self) -> String {
        const PHRASES: [(&str, &str); 7] = [
            ("No such file or directory (os error 2)", "ENOENT (does not exist)"),
            ("Permission denied (os error 13)", "EACCES (access denied)"),
            ("Operation not permitted (os error 1)", "EPERM (not allowed)"),
            ("Not a directory (os error 20)", "ENOTDIR (a part of the path is a file)"),
            ("Is a directory (os error 21)", "EISDIR"),
            ("was not found", "is missing"),
            ("were not found", "are missing"),
        ];
        // Display has line feeds only before `cause:` and `fix:`.
        let line = self.to_string().replace("\n  ", "; ");
        PHRASES.iter().fold(line, |line, (phrase, name)| line.replace(phrase, name))
    }

    /// The same as an object, for `--json`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "error": self.code().to_string(), "what": self.what(), "cause": self.cause_line(), "fix": self.fix_line()
        })
    }

    /// Reads back what [`Error::to_json`] wrote: failures cross from a child process to its parent this way.
    pub fn from_json(value: &serde_json::Value) -> Option<Self> {
        let text = |key| value.get(key).and_then(serde_json::Value::as_str);
        let code = *Code::ALL.iter().find(|code| Some(code.to_string().as_str()) == text("error"))?;
        let mut error = Self::new(code, text("what")?);
        if let Some(cause) = text("cause").filter(|cause| !cause.is_empty()) {
            error = error.cause(cause);
        }
        // The general fix is not stored, so that the parent's context can add a specific one.
        if let Some(fix) = text("fix").filter(|fix| !fix.is_empty() && *fix != code.fix()) {
            error = error.fix(fix);
        }
        Some(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A message may quote what an image or a user wrote: no control character of theirs reaches the terminal.
        let clean = |text: &str| -> String {
            text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
        };
        write!(f, "error[{}]: {}", self.code(), clean(self.what()))?;
        if !self.0.causes.is_empty() {
            write!(f, "\n  cause: {}", clean(&self.cause_line()))?;
        }
        write!(f, "\n  fix: {}", clean(self.fix_line()))
    }
}

impl std::error::Error for Error {}

/// Turns any failure into an [`Error`] where it is met: `read(path).or_fail(Code::Store, || …)?`.
pub trait OrFail<T> {
    /// On failure, an [`Error`] with this code and sentence and the failure itself as its cause.
    fn or_fail<S: Into<String>>(self, code: Code, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: fmt::Display> OrFail<T> for std::result::Result<T, E> {
    fn or_fail<S: Into<String>>(self, code: Code, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error::new(code, what()).cause(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_paragraph_and_survives_the_way_to_the_parent() {
        let error = Error::new(Code::UnknownGpu, "there is no GPU \x1b[31m99")
            .cause("the host has 0..7")
            .fix("ask for 0");
        let shown = error.to_string();
        assert_eq!(
            shown,
            "error[GPU-0021]: there is no GPU \u{fffd}[31m99\n  cause: the host has 0..7\n  fix: ask for 0"
        );
        assert_eq!(Error::from_json(&error.to_json()).unwrap().to_string(), shown);
    }

    #[test]
    fn the_fix_for_too_many_open_files_is_their_limit() {
        use rustix::io::Errno;
        let of =
            |errno: Errno, fix| Error::new(Code::Store, "no").cause(errno).fix(fix).fix_line().to_owned();
        assert!(of(Errno::MFILE, "make room").starts_with("raise the limit of open files: `ulimit -n"));
        assert!(of(Errno::NFILE, "make room").contains("fs.file-max"));
        assert_eq!(of(Errno::MFILE, "ulimit -n 99"), "ulimit -n 99");
        assert_eq!(of(Errno::NOSPC, "make room"), "make room");
    }

    #[test]
    fn an_engine_gets_one_line_that_it_does_not_cut() {
        use rustix::io::Errno;
        let of = |errno: Errno| {
            let error = std::io::Error::from(errno);
            Error::new(Code::Rootfs, "/usr/bin cannot be made").cause("openat").cause(error).fix("do this")
        };
        for errno in [Errno::NOENT, Errno::ACCESS, Errno::PERM, Errno::NOTDIR, Errno::ISDIR] {
            let line = of(errno).for_engine();
            assert!(line.starts_with("error[GPU-0057]: /usr/bin cannot be made; cause: openat: E"), "{line}");
            assert!(line.ends_with("; fix: do this") && !line.contains('\n'), "{line}");
            let lower = line.to_lowercase();
            for phrase in [
                "permission denied",
                "operation not permitted",
                "no such file",
                "not found",
                "not a directory",
                "is a directory",
            ] {
                assert!(!lower.contains(phrase), "{line}");
            }
        }
        let error = Error::new(Code::NvmlMissing, "the driver's libnvidia-ml.so.1 was not found");
        let line = error.for_engine();
        assert!(
            line.starts_with("error[GPU-0011]: the driver's libnvidia-ml.so.1 is missing; fix: "),
            "{line}"
        );
    }

    #[test]
    fn codes_ascend_and_never_repeat() {
        assert!(Code::ALL.windows(2).all(|pair| (pair[0] as u16) < pair[1] as u16));
    }
}
