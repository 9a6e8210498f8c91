"""The system calls that sandboxed programs are refused, as a filter for the kernel (seccomp(2), in classic BPF).

Namespaces and limits leave gaps, which this closes. RLIMIT_NPROC does not hold for root, so a fork bomb needs more; and
memory that belongs to no process is under no limit. OpenAI's scorer of HumanEval takes os.fork, os.kill and
subprocess.Popen from programs as well, where they can get them back: here they cannot.
"""

import errno
import struct

from foundry_jax.errors import UserError

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
# Numbers from the kernel's unistd.h, None where a machine does not have the call; from 424 on they are all the same.
REFUSED = {
    # processes; clone is refused where it makes no thread, and clone3 is said not to exist, so that glibc uses clone
    "fork": (57, None), "vfork": (58, None),
    # signals to others
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    # memory that no limit of a process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    # sockets: those to a hypervisor (AF_VSOCK) know no namespaces
    "socket": (41, 198),
    # further namespaces, and keys, which all processes of a user share
    "unshare": (272, 97), "setns": (308, 268), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # what programs do not need and holes were found in
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
}  # fmt: skip
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
CLONE_THREAD = 0x00010000
X32 = 0x40000000  # system calls of x86_64's other ABI have this bit

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h
LOAD, RETURN, EQUAL, AT_LEAST, ANY_BIT = 0x20, 0x06, 0x15, 0x35, 0x45  # linux/bpf_common.h
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # where they lie in struct seccomp_data


def filter_program(machine: str) -> bytes:
    """Returns the filter for a processor as platform.machine() names it: struct sock_filter, one after another.

    Raises:
        UserError: its system calls are not known here.
    """
    if machine not in AUDIT_ARCH:
        raise UserError(f"The sandbox knows the system calls of {' and '.join(AUDIT_ARCH)}, not of {machine}.")
    column = list(AUDIT_ARCH).index(machine)
    numbers = [row[column] for row in REFUSED.values() if row[column] is not None]
    return b"".join(
        [
            _step(LOAD, ARCHITECTURE),
            *_when(EQUAL, AUDIT_ARCH[machine], skip=1),
            _step(RETURN, KILL),
            _step(LOAD, NUMBER),
            *(_returns(AT_LEAST, X32, KILL) if machine == "x86_64" else []),
            *(step for number in numbers for step in _returns(EQUAL, number, ERRNO | errno.EPERM)),
            *_returns(EQUAL, CLONE3, ERRNO | errno.ENOSYS),
            *_when(EQUAL, CLONE[machine], skip=1),
            _step(RETURN, ALLOW),
            _step(LOAD, FIRST_ARGUMENT),
            *_returns(ANY_BIT, CLONE_THREAD, ALLOW),
            _step(RETURN, ERRNO | errno.EPERM),
        ]
    )


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """Returns one instruction; a jump passes over so many of the next ones."""
    return struct.pack("<HBBI", code, then, otherwise, value)


def _when(test: int, value: int, *, skip: int) -> list[bytes]:
    """Returns the jump over some instructions where the test holds."""
    return [_step(test, value, skip, 0)]


def _returns(test: int, value: int, answer: int) -> list[bytes]:
    """Returns what ends the filter with an answer where the test holds."""
    return [_step(test, value, 0, 1), _step(RETURN, answer)]
