"""Confining a command where no system's unit does: by Landlock and seccomp, which need neither root nor a package.

What is allowed: to read the system and the release, to write the data, to bind and connect to some TCP ports. Nothing
else in the home folder, no socket of the login's D-Bus, ssh-agent or containers, no signal or ptrace outwards. The
kernel enforces as much as it knows (landlock(7): files from 5.13, TCP from 6.7, signals and abstract sockets from
6.12).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from agent.files import Json

CREATE, ADD_RULE, RESTRICT = 444, 445, 446
"""System calls, by their numbers on every architecture."""

PATH_BENEATH, NET_PORT = 1, 2

# Rights by the ABI that brought them (include/uapi/linux/landlock.h).
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FIRST = (1 << 13) - 1  # those above, and making and removing entries
BIND, CONNECT = 1 << 0, 1 << 1
ABSTRACT_SOCKETS, SIGNALS = 1 << 0, 1 << 1

READ = EXECUTE | READ_FILE | READ_DIR
USE = READ_FILE | WRITE_FILE | READ_DIR | TRUNCATE | IOCTL_DEV
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that a rule for a file may name; the others are a folder's."""

SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/nix/store", "/gnu/store", "/proc", "/sys"),
    *(
        "/run/systemd/resolve",
        "/run/resolvconf",
        "/run/NetworkManager",
        "/run/netconfig",
        "/run/opengl-driver",
        "/var/cache/fontconfig",
    ),
)
"""What every program needs to read: itself, its libraries, how names are resolved, what the kernel tells."""

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The kernel's version of Landlock; 0 when it has none, or it is off."""
    return max(0, int(_libc.syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))))  # 1: tell the version


def _call(number: int, *words: object) -> int:
    done = int(_libc.syscall(number, *words))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def restrict(spec: Json) -> None:
    """Let this process, and what it starts, do what `spec` says and no more; raises OSError.

    `write` and `read` are paths, `bind` and `connect` TCP ports. What is not there, or is closed to this user, is left
    out.
    """
    version = abi()
    handled = FIRST | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    handled |= IOCTL_DEV if version >= 5 else 0
    attributes = struct.pack("<Q", handled)
    attributes += struct.pack("<Q", BIND | CONNECT) if version >= 4 else b""
    attributes += struct.pack("<Q", ABSTRACT_SOCKETS | SIGNALS) if version >= 6 else b""
    rules = _call(CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))

    def allow(paths: Iterable[str], rights: int) -> None:
        for path in paths:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                place = os.open(path, os.O_PATH)
                mine = rights & handled & (-1 if Path(path).is_dir() else OF_FILES)
                rule = struct.pack("<Qi", mine, place)
                _call(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint(0))
                os.close(place)

    home = Path(os.path.realpath(spec["program"])).parent.parent  # a Python of the login's, as pyenv and uv have them
    allow([*SYSTEM, *spec["read"], *(str(home / each) for each in ("bin", "lib", "include", "share"))], READ)
    allow([*spec["write"], "/dev/shm"], handled)  # noqa: S108  shared memory of torch's workers
    allow(["/dev"], USE)  # the GPU
    # The driver names its threads there, in processes to come as well, or CUDA does not start (error 304). Nothing of
    # other processes is opened by that but their priority when memory ends: the rest asks for ptrace(2). Root could set
    # the kernel there; where it is not mounted read-only, as containers have it, no other process gets CUDA.
    kernel = any(os.access(f"/proc/{each}", os.W_OK) for each in ("sys/kernel/core_pattern", "sysrq-trigger"))
    allow(["/proc/self" if kernel else "/proc"], WRITE_FILE | TRUNCATE)
    for right, ports in ((BIND, spec["bind"]), (CONNECT, spec["connect"])) if version >= 4 else ():
        for port in ports:
            rule = struct.pack("<QQ", right, port)
            _call(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(NET_PORT), rule, ctypes.c_uint(0))
    _call(RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


# What systemd's filter of a system's unit denies as well (recipes/comfyui/units/hardening.conf), by architecture:
# userfaultfd process_vm_readv process_vm_writev kcmp keyctl add_key request_key ptrace bpf perf_event_open
_DENIED = {
    "x86_64": (323, 310, 311, 312, 250, 248, 249, 101, 321, 298),
    "aarch64": (282, 270, 271, 272, 219, 217, 218, 117, 280, 241),
}
_EVERYWHERE = (
    425,
    426,
    427,
    438,
)  # io_uring_setup, _enter and _register, which open sockets by themselves; pidfd_getfd
_SOCKET = {"x86_64": 41, "aarch64": 198}
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # include/uapi/linux/audit.h

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06  # include/uapi/linux/bpf_common.h
_ALLOW, _DENY = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM


def filtered(*, udp: bool) -> bytes:
    """The seccomp filter: no sockets but Internet and netlink ones (without `udp`: TCP alone), none of the calls above.

    An AF_UNIX socket would reach the login's systemd, which starts anything, its ssh-agent and its containers; Landlock
    does not keep from connecting to those. They are streams and datagrams; CUDA's own socket is of the third type,
    which stays, as socketpair(2) does.
    """
    machine = platform.machine()
    allowed, denied = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _DENY)
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCH[machine]), denied, (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        lines += [(_AT_LEAST, 0, 1, 0x40000000), denied]  # x32 has other numbers
    for number in (*_DENIED[machine], *_EVERYWHERE):
        lines += [(_EQUAL, 0, 1, number), denied]
    lines += [(_EQUAL, 1, 0, _SOCKET[machine]), allowed, (_LOAD, 0, 0, 16)]
    lines += [(_EQUAL, 0, 1, 16), allowed]  # AF_NETLINK
    lines += [(_EQUAL, 8, 0, 2), (_EQUAL, 7, 0, 10)]  # AF_INET, AF_INET6: to the last block
    lines += [(_EQUAL, 1, 0, 1), denied]  # AF_UNIX: to the next one
    lines += [(_LOAD, 0, 0, 24), (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, 5), denied, allowed]  # SOCK_SEQPACKET
    if not udp:
        lines += [(_LOAD, 0, 0, 24), (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, 1), denied]  # SOCK_STREAM
    return b"".join(struct.pack("<HBBI", *line) for line in [*lines, allowed])


def _drop() -> None:
    """Give up root's capabilities but the one to pass over owners of files: its data may be another's volume."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for each in set(range(last + 1)) - {1}:  # CAP_DAC_OVERRIDE; what the bounding set lacks, exec does not give
        _libc.prctl(*map(ctypes.c_ulong, (24, each, 0, 0, 0)))  # PR_CAPBSET_DROP


def _filter(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    told = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    for words in ((38, 1, 0, 0, 0), (22, 2, told)):  # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP, a filter
        if _libc.prctl(*(ctypes.c_ulong(each) if isinstance(each, int) else each for each in words)):
            raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def main(spec: Json, argv: list[str]) -> None:
    """Become the command, confined, and with its secrets as variables. `write` is missing where a unit confines it.

    On a kernel that cannot, say so and run it all the same, as the plan has said.
    """
    folder = Path(spec.get("folder") or os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere"))
    for name in spec.get("secrets", ()):
        os.environ[name] = (folder / name).read_text()
    if "write" not in spec:
        os.execv(argv[0], argv)  # noqa: S606
    if scratch := os.environ.get("TMPDIR"):
        Path(scratch).mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        _drop()
    if platform.machine() in _ARCH:
        _filter(filtered(udp=spec["udp"]))
    if abi():
        restrict({"program": argv[0], **spec})
    else:
        print("this kernel has no Landlock: ComfyUI can read and write all that this login can", file=sys.stderr)
    os.execv(argv[0], argv)  # noqa: S606
