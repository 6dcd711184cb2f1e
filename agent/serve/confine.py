"""Confine a command with Landlock and seccomp where no system unit does; needs neither root nor packages.

Allowed: reading the system and the release, writing the data, binding and connecting to listed TCP ports. Denied: the
rest of the home folder, the login's D-Bus, ssh-agent and container sockets, signals and ptrace to outside processes.
Enforcement depends on the kernel (landlock(7): files from 5.13, TCP from 6.7, signals and abstract sockets from 6.12).
"""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import pwd
import re
import resource
import stat
import struct
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from agent.files import Json
from agent.layout import DATA, UNUSED

CREATE, ADD_RULE, RESTRICT = 444, 445, 446
"""Landlock system call numbers, the same on every architecture."""

PATH_BENEATH, NET_PORT = 1, 2

# Access rights, grouped by the ABI version that introduced them (include/uapi/linux/landlock.h).
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FIRST = (1 << 13) - 1  # the rights above, and creating and removing entries
BIND, CONNECT = 1 << 0, 1 << 1
ABSTRACT_SOCKETS, SIGNALS = 1 << 0, 1 << 1

READ = EXECUTE | READ_FILE | READ_DIR
USE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
SHARE = READ_FILE | WRITE_FILE | TRUNCATE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # create and remove files and folders
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that a rule for a file may grant; the others apply to folders only."""

SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/nix/store", "/gnu/store", "/proc", "/sys"),
    *("/opt/nvidia", "/opt/cuda", "/opt/rocm"),  # not /opt: users install software there
    *(
        "/run/systemd/resolve",
        "/run/resolvconf",
        "/run/NetworkManager",
        "/run/netconfig",
        "/run/opengl-driver",
        "/var/cache/fontconfig",
    ),
)
"""Paths that every program needs to read: programs, libraries, name resolution, kernel information."""

DEVICES = ("null", "zero", "full", "random", "urandom", "nvidia*", "dri/renderD*", "dxg")
"""Allowed devices, mainly the GPU's. Terminals, disks, cameras and microphones stay inaccessible."""

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Return the kernel's Landlock ABI version; 0 if unsupported or disabled."""
    return max(0, int(_libc.syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))))  # 1: query the version


def _call(number: int, *words: object) -> int:
    done = int(_libc.syscall(number, *words))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


class ClosedError(OSError):
    """No rule may grant access to this path."""


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def opened(path: str, writable: Collection[tuple[int, int]], *, make: bool = False) -> int:
    """Open a path component by component and return its descriptor; `make` creates missing folders. Raises OSError.

    Follows symlinks, such as one to a larger disk, except below the `writable` folders: an earlier confined process
    may have created those to gain access to their targets.
    """
    way = [(os.open("/", os.O_PATH), False)]
    names, links = path.split("/")[::-1], 0
    try:
        while names:
            name, (here, below) = names.pop(), way[-1]
            if name in ("", "."):
                continue
            if name == "..":
                os.close(way.pop()[0] if len(way) > 1 else os.dup(here))
                continue
            try:
                inner = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
            except FileNotFoundError:
                if not make:
                    raise
                os.mkdir(name, dir_fd=here)
                inner = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
            status = os.fstat(inner)
            if not stat.S_ISLNK(status.st_mode):
                way.append((inner, below or _identity(status) in writable))
                continue
            target, links = os.readlink("", dir_fd=inner), links + 1
            os.close(inner)
            if below or links > 40:
                raise ClosedError(f"{path}: {name} is a link in a folder that ComfyUI can write to")
            names += target.split("/")[::-1]
            while target.startswith("/") and len(way) > 1:
                os.close(way.pop()[0])
        return os.dup(way[-1][0])
    finally:
        for each, _ in way:
            os.close(each)


def _written(paths: Iterable[str]) -> list[str]:
    """Return the writable paths; expand `folder/*` to the data folders in it that are not symlinks."""
    found: list[str] = []
    for path in paths:
        if not path.endswith("/*"):
            found.append(path)
            continue
        with suppress(OSError), os.scandir(path[:-2]) as entries:
            found += [each.path for each in entries if each.is_dir(follow_symlinks=False) and each.name != UNUSED]
    return found


def _identities(paths: Iterable[str]) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for path in paths:
        with suppress(OSError):
            found.add(_identity(Path(path).stat()))
    return found


def _make(spec: Json) -> None:
    """Create the data folders, whose parent will not be writable, and the folder for temporary files."""
    for folder in (each[:-2] for each in spec["write"] if each.endswith("/*")):
        for name in DATA:
            with suppress(FileExistsError, FileNotFoundError):
                Path(folder, name).mkdir()
    if scratch := os.environ.get("TMPDIR"):
        try:
            os.close(opened(scratch, _identities(_written(spec["write"])), make=True))
        except ClosedError as error:
            print(f"not created: {error}", file=sys.stderr)


def _around(path: str, closed: Collection[Path]) -> Iterator[str]:
    """Yield the path, or its entries outside `closed` if the folder contains a closed path."""
    real = Path(os.path.realpath(path))
    if not any(each.is_relative_to(real) for each in closed):
        yield path
    elif real not in closed:
        with suppress(OSError):
            for each in os.listdir(real):  # noqa: PTH208
                yield from _around(f"{real}/{each}", closed)


def _closed(spec: Json) -> set[Path]:
    """Return the paths that no rule may grant, nor their parents: the home folder, Hearth's state and secrets."""
    found = {Path(spec["folder"]), Path(spec["folder"]).parent / "state"} if "folder" in spec else set()
    with suppress(KeyError):  # in some containers the login has no passwd entry
        home = Path(os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir))
        # System accounts use a shared folder such as /usr/sbin as their home.
        found |= set() if any(Path(os.path.realpath(each)).is_relative_to(home) for each in SYSTEM) else {home}
    return {Path(os.path.realpath(each)) for each in found}


def _python(program: str) -> list[str]:
    """Return the paths that a user-installed Python (pyenv, uv, conda) reads; its prefix may be ~/.local."""
    real = Path(os.path.realpath(program))
    home, found = real.parent.parent, re.match(r"python\d\.\d+", real.name)
    if home == Path("/usr"):
        return []
    name = found[0] if found else "python3.*"
    forms = (f"lib*/{name}", "lib*/*.so*", f"include/{name}", "share/zoneinfo")
    return [str(real), *(str(each) for form in forms for each in sorted(home.glob(form)))]


def restrict(spec: Json, version: int) -> None:
    """Apply a Landlock ruleset to this process and its children. Raises OSError.

    `spec` lists paths (`write`, `read`) and TCP ports (`bind`, `connect`). Missing and inaccessible paths are skipped.
    `folder/*` grants the folders inside, which then cannot be replaced, for example by symlinks. `version` is the
    Landlock ABI.
    """
    handled = FIRST | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    handled |= IOCTL_DEV if version >= 5 else 0
    attributes = struct.pack("<Q", handled)
    attributes += struct.pack("<Q", BIND | CONNECT) if version >= 4 else b""
    attributes += struct.pack("<Q", ABSTRACT_SOCKETS | SIGNALS) if version >= 6 else b""
    rules = _call(CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    written = _written(spec["write"])
    closed, writable = _closed(spec), _identities(written)

    def allow(paths: Iterable[str], rights: int) -> None:
        for path in paths:
            try:
                place = opened(path, writable)
                real = Path(f"/proc/self/fd/{place}").readlink()
                if any(each.is_relative_to(real) for each in closed):
                    raise ClosedError(f"{path}: it contains the home folder or Hearth's own files")
            except ClosedError as error:
                print(f"not opened to ComfyUI: {error}", file=sys.stderr)
                continue
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            mine = rights & handled & (-1 if stat.S_ISDIR(os.fstat(place).st_mode) else OF_FILES)
            rule = struct.pack("<Qi", mine, place)
            _call(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint(0))
            os.close(place)

    allow((each for path in SYSTEM for each in _around(path, closed)), READ)
    allow([*spec["read"], *_python(spec["program"])], READ)
    allow(written, handled)
    allow(["/dev/shm"], SHARE)  # noqa: S108  for torch's workers; other users' names cannot be listed
    allow(["/dev/dri"], READ_DIR)
    allow((path for name in DEVICES for path in glob.glob(f"/dev/{name}")), USE | READ_DIR)  # noqa: PTH207
    # CUDA's driver writes thread names in /proc, also for child processes; otherwise CUDA fails with error 304. Of
    # other processes this exposes only oom_score_adj: the rest requires ptrace(2). Root could change kernel settings
    # in /proc; unless those are read-only, as in containers, only /proc/self is granted and child processes lack CUDA.
    kernel = any(os.access(f"/proc/{each}", os.W_OK) for each in ("sys/kernel/core_pattern", "sysrq-trigger"))
    allow(["/proc/self" if kernel else "/proc"], WRITE_FILE | TRUNCATE)
    for right, ports in ((BIND, spec["bind"]), (CONNECT, spec["connect"])) if version >= 4 else ():
        for port in ports:
            rule = struct.pack("<QQ", right, port)
            _call(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(NET_PORT), rule, ctypes.c_uint(0))
    _call(RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


# A test of a call's argument: its index, a bit mask (_WHOLE: all bits), the required value. A list of tests matches if
# all of them match, a rule if one of its lists matches; an empty list always matches.
_Tests = tuple[tuple[int, int, int], ...]
_Rules = tuple[tuple[int, int, tuple[_Tests, ...]], ...]
_WHOLE, _FAST_OPEN, _NAMESPACES = 0xFFFFFFFF, 0x20000000, 0x7E020000  # MSG_FASTOPEN; the CLONE_NEW* flags of clone(2)
_SELF: tuple[_Tests, ...] = (((0, _WHOLE, 0),),)
_SELF_ALONE: tuple[_Tests, ...] = (((0, _WHOLE, 0), (1, _WHOLE, 0)),)
_PERM, _NO_CALL = 1, 38  # EPERM, ENOSYS

# Call numbers on x86_64 and aarch64 (-1: no such call). Always denied: the calls that the system unit's filter denies
# (recipes/comfyui/units/hardening.conf), new namespaces, pidfd access to processes, and System V and POSIX IPC by key
# or name, which Landlock does not cover.
_DENIED = (
    *((323, 282), (310, 270), (311, 271), (312, 272)),  # userfaultfd process_vm_readv process_vm_writev kcmp
    *((250, 219), (248, 217), (249, 218), (101, 117)),  # keyctl add_key request_key ptrace
    *((321, 280), (298, 241), (272, 97), (308, 268)),  # bpf perf_event_open unshare setns
    *((each, each) for each in (425, 426, 427)),  # io_uring_setup, _enter, _register: they bypass the socket rules
    *((each, each) for each in (424, 434, 438, 440, 448)),  # pidfd_send_signal _open _getfd process_madvise _mrelease
    *((29, 194), (30, 196), (31, 195), (64, 190), (65, 193), (66, 191)),  # shmget shmat shmctl semget semop semctl
    *((220, 192), (68, 186), (69, 189), (70, 188), (71, 187)),  # semtimedop msgget msgsnd msgrcv msgctl
    *((240, 180), (241, 181)),  # mq_open mq_unlink
)
_ALLOWED_IF: _Rules = (
    (53, 199, tuple(((0, _WHOLE, 1), (1, 0xF, kind)) for kind in (1, 5))),  # socketpair: SOCK_STREAM, SOCK_SEQPACKET
    (44, 206, (((3, _FAST_OPEN, 0),),)),  # sendto: MSG_FASTOPEN connects
    (46, 211, (((2, _FAST_OPEN, 0),),)),  # sendmsg
    (307, 269, (((3, _FAST_OPEN, 0),),)),  # sendmmsg
    (56, 220, (((0, _NAMESPACES, 0),),)),  # clone
    *((302, 261, _SELF), (142, 118, _SELF), (144, 119, _SELF)),  # prlimit64 sched_setparam sched_setscheduler
    *((203, 122, _SELF), (314, 274, _SELF)),  # sched_setaffinity sched_setattr
    *((256, 238, _SELF), (279, 239, _SELF)),  # migrate_pages move_pages
    (141, 140, _SELF_ALONE),  # setpriority of this process
    (251, 30, (((0, _WHOLE, 1), (1, _WHOLE, 0)),)),  # ioprio_set of this process
)
_DENIED_IF: _Rules = (
    (62, 129, (((0, _WHOLE, _WHOLE),),)),  # kill: -1 signals every process of the login
    # setsockopt for TCP: TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, and TCP_ULP, which switches the socket's protocol
    (54, 208, tuple(((1, _WHOLE, 6), (2, _WHOLE, option)) for option in (23, 30, 31))),
)
_EMPTYING: _Rules = (
    (76, 45, ((),)),  # truncate
    *(
        (*numbers, tuple(((at, 0x203, 0x200 | mode),) for mode in (0, 3)))
        for at, numbers in ((1, (2, -1)), (2, (257, 56)))
    ),
)
"""Calls that truncate a file without write access: truncate(2); open(2) and openat(2) with O_TRUNC alone."""

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # include/uapi/linux/audit.h

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06  # include/uapi/linux/bpf_common.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
_Line = tuple[int, int, int, int]


def _sockets(*, udp: bool) -> tuple[_Tests, ...]:
    """Return the allowed sockets: TCP, UDP if `udp`, NETLINK_ROUTE for the own addresses, and AF_UNIX SOCK_SEQPACKET.

    Other AF_UNIX sockets would reach the login's systemd, ssh-agent and containers, and Landlock does not restrict
    connecting to them. Those use streams and datagrams; CUDA uses SOCK_SEQPACKET. Landlock restricts only TCP, so other
    stream protocols are denied: MPTCP (262), SCTP (132) and SMC (256).
    """
    kinds = [(1, 0), (1, 6), *([(2, 0), (2, 17)] if udp else [])]
    internet = (((0, _WHOLE, each), (1, 0xF, kind), (2, _WHOLE, of)) for each in (2, 10) for kind, of in kinds)
    return (((0, _WHOLE, 16), (2, _WHOLE, 0)), ((0, _WHOLE, 1), (1, 0xF, 5)), *internet)


def _rule(number: int, lists: tuple[_Tests, ...], held: int, other: int) -> list[_Line]:
    """Compile one call's rule: return `held` if one of the lists matches, else `other`."""
    lines: list[_Line] = []
    for tests in lists:
        for left, (argument, bits, value) in zip(range(len(tests) - 1, -1, -1), tests, strict=True):
            lines += [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, bits), (_EQUAL, 0, 3 * left + 1, value)]
        lines.append((_RETURN, 0, 0, held))
    lines.append((_RETURN, 0, 0, other))
    return [(_EQUAL, 0, len(lines), number), *lines]


def filtered(*, udp: bool, version: int) -> bytes:
    """Build the seccomp filter from the tables above and the socket rules; `version` is the Landlock ABI."""
    machine, deny, missing = platform.machine(), _ERRNO | _PERM, _ERRNO | _NO_CALL
    old = 0 < version < 3
    allowed, denied = (*_ALLOWED_IF, (41, 198, _sockets(udp=udp))), (*_DENIED_IF, *(_EMPTYING if old else ()))
    rules: list[tuple[int, int, tuple[_Tests, ...], int, int]] = [(*each, (), deny, deny) for each in _DENIED]
    rules += [(*each, _ALLOW, deny) for each in allowed] + [(*each, deny, _ALLOW) for each in denied]
    # A filter cannot read the flags of clone3 and openat2. The C library falls back to clone and never uses openat2.
    rules += [(each, each, (), missing, missing) for each in ((435, 437) if old else (435,))]
    lines: list[_Line] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCH[machine]), (_RETURN, 0, 0, deny), (_LOAD, 0, 0, 0)]
    lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, deny)]  # x32 numbers its calls differently
    for x86, arm, lists, held, other in rules:
        number = x86 if machine == "x86_64" else arm
        lines += _rule(number, lists, held, other) if number >= 0 else []
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def _drop() -> None:
    """Drop root's capabilities except CAP_DAC_OVERRIDE: the data may be on a volume with another owner."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for each in set(range(last + 1)) - {1}:  # 1: CAP_DAC_OVERRIDE; exec grants nothing outside the bounding set
        _libc.prctl(*map(ctypes.c_ulong, (24, each, 0, 0, 0)))  # PR_CAPBSET_DROP


def _filter(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    program_header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    for words in ((38, 1, 0, 0, 0), (22, 2, program_header)):  # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP, a filter
        if _libc.prctl(*(ctypes.c_ulong(each) if isinstance(each, int) else each for each in words)):
            raise OSError(ctypes.get_errno(), "the kernel does not accept the seccomp filter")


def main(spec: Json, argv: list[str]) -> None:
    """Exec the command, confined, with its secrets as environment variables. `write` is absent if a unit confines it.

    First make the folders `make`.

    On a kernel without Landlock, print a warning and run the command anyway, as the plan announced.
    """
    folder = Path(spec.get("folder") or os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere"))
    for name in spec.get("secrets", ()):
        os.environ[name] = (folder / name).read_text()
    for each in spec.get("make", ()):
        with suppress(OSError):  # what is in the way may be a node's doing
            Path(each).mkdir(parents=True, exist_ok=True)
    if "write" not in spec:
        os.execv(argv[0], argv)  # noqa: S606
    _make(spec)
    # Marks confined processes: message queues are denied anyway, and raising this limit requires privileges.
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # no core dumps, nor to a pipe: they contain secrets
    version = abi()
    if os.geteuid() == 0:
        _drop()
    if platform.machine() in _ARCH:
        _filter(filtered(udp=spec["udp"], version=version))
    if version:
        restrict({"program": argv[0], **spec}, version)
    else:
        print("this kernel has no Landlock: ComfyUI can read and write everything that this login can", file=sys.stderr)
    os.execv(argv[0], argv)  # noqa: S606
