//! The handles that a process which lives on must not inherit, on Windows.

use std::os::windows::io::AsRawHandle;

use windows_sys::Win32::Foundation::{HANDLE_FLAG_INHERIT, SetHandleInformation};
use windows_sys::Win32::System::Threading::{CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW};

/// Flags of a process that gets neither Ctrl-C nor the close event of its starter's console.
pub(super) const OWN_GROUP_AND_CONSOLE: u32 = CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW;

/// Makes this process's standard handles its own: no child gets them unless it is given them.
///
/// Windows hands every inheritable handle to a child of the standard library's, even if the child has other
/// standard handles (rust-lang/rust#54760). A runner's step then goes on as long as that child does, since
/// the step's output pipes stay open.
pub(super) fn keep_standard_handles() {
    let handles = [
        std::io::stdin().as_raw_handle(),
        std::io::stdout().as_raw_handle(),
        std::io::stderr().as_raw_handle(),
    ];
    for handle in handles {
        // SAFETY: the call takes any value. It changes a flag of a handle that is open, or fails; a missing
        // or closed one hands nothing on.
        #[allow(unsafe_code, reason = "the standard library has no call for it")]
        unsafe {
            SetHandleInformation(handle, HANDLE_FLAG_INHERIT, 0);
        }
    }
}
