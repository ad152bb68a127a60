//! Commands on a pseudo-terminal.

use crate::{Ended, run};
use std::process::Command;

/// Runs a command on a pseudo-terminal of 40 lines by 100 columns, types what the script says, and returns what it showed
/// and how it ended.
pub fn on_a_terminal(command: &Command, script: &str) -> Ended {
    // Words of the script: `wait TEXT`, `type TEXT`, `resize LINES COLUMNS`.
    const DRIVER: &str = r#"
import codecs, fcntl, json, os, pty, select, signal, struct, sys, termios, time
script, argv = json.loads(sys.argv[1]), sys.argv[2:]
pid, fd = pty.fork()
if pid == 0:
    os.execvp(argv[0], argv)
size = lambda l, c: fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", l, c, 0, 0))
size(40, 100)
seen, mark, deadline = b"", 0, time.time() + 60
def more():
    global seen
    if time.time() > deadline:
        os.kill(pid, signal.SIGKILL); print("TIMEOUT", seen); sys.exit(99)
    if select.select([fd], [], [], 1)[0]:
        try: data = os.read(fd, 4096)
        except OSError: data = b""
        if not data: return False
        seen += data
    return True
for step, value in script:
    if step == "wait":
        while value.encode() not in seen[mark:]:
            if not more(): print("ENDED", seen); sys.exit(98)
        mark = seen.index(value.encode(), mark) + len(value.encode())
    elif step == "type": os.write(fd, value.encode())
    elif step == "resize": size(*value)
while more(): pass
status = os.waitpid(pid, 0)[1]
sys.stdout.write(seen.decode(errors="replace"))
sys.exit(os.waitstatus_to_exitcode(status))
"#;
    let mut driver = Command::new("/usr/bin/env");
    driver.args(["python3", "-c", DRIVER, script]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        driver.env(name, value.unwrap_or_default());
    }
    driver.current_dir(command.get_current_dir().expect("a test host sets it"));
    run(&mut driver)
}
