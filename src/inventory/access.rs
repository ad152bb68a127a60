//! Which device nodes this process may open.
//!
//! The kernel answers access(2) with the permission bits, access control lists, security modules and the device cgroup
//! (`inode_permission`, fs/namei.c, which calls `devcgroup_inode_permission`), and calls no driver for it. Opening a node would
//! initialise a GPU that is not kept initialised, which takes seconds. The answer is this caller's own and is never recorded.

use super::types::{Denial, Inventory};
use rustix::{
    fs::{Access, access},
    io::Errno,
};

impl Inventory {
    /// Records the nodes of GPUs, MIG devices and the driver that this process may not open: one system call for each.
    pub fn find_closed(&mut self) {
        let both = Access::READ_OK | Access::WRITE_OK;
        let control = self.driver.control_nodes.iter().map(|node| (node, both));
        let gpus = self.gpus.iter().flat_map(|gpu| {
            // A process that may open a capability's node may use the capability; no write access is needed (driver README, "MIG").
            let capabilities = gpu.mig_devices.iter().flat_map(|mig| &mig.cap_nodes);
            std::iter::once((&gpu.node, both)).chain(capabilities.map(|node| (node, Access::READ_OK)))
        });
        let denied = control.chain(gpus).filter_map(|(node, wanted)| {
            let denial = match access(&node.path.0, wanted) {
                Err(Errno::PERM) => Denial::DeviceCgroup,
                Err(Errno::ACCESS) => Denial::Permissions,
                // A missing node is reported elsewhere.
                _ => return None,
            };
            Some((node.path.0.clone(), denial))
        });
        self.closed = denied.collect();
    }
}
