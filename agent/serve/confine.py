"""Confining a command where no system's unit does: by Landlock and seccomp, which need neither root nor a package.

What is allowed: to read the system and the release, to write the data, to bind and connect to some TCP ports. Nothing
else in the home folder, no socket of the login's D-Bus, ssh-agent or containers, no signal or ptrace outwards. The
kernel enforces as much as it knows (landlock(7): files from 5.13, TCP from 6.7, signals and abstract sockets from
6.12).
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
"""System calls, by their numbers on every architecture."""

PATH_BENEATH, NET_PORT = 1, 2

# Rights by the ABI that brought them (include/uapi/linux/landlock.h).
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FIRST = (1 << 13) - 1  # those above, and making and removing entries
BIND, CONNECT = 1 << 0, 1 << 1
ABSTRACT_SOCKETS, SIGNALS = 1 << 0, 1 << 1

READ = EXECUTE | READ_FILE | READ_DIR
USE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
SHARE = READ_FILE | WRITE_FILE | TRUNCATE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # removing and making files and folders
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that a rule for a file may name; the others are a folder's."""

SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/nix/store", "/gnu/store", "/proc", "/sys"),
    *("/opt/nvidia", "/opt/cuda", "/opt/rocm"),  # not /opt: people install there, too
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

DEVICES = ("null", "zero", "full", "random", "urandom", "nvidia*", "dri/renderD*", "dxg")
"""The devices that it may use, the GPU's above all: others are terminals, disks, cameras and microphones."""

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The kernel's version of Landlock; 0 when it has none, or it is off."""
    return max(0, int(_libc.syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))))  # 1: tell the version


def _call(number: int, *words: object) -> int:
    done = int(_libc.syscall(number, *words))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


class Closed(OSError):
    """A path that no rule may open."""


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def opened(path: str, writable: Collection[tuple[int, int]], *, make: bool = False) -> int:
    """A descriptor of a path's, the folders of which `make` makes; raises OSError.

    Links are followed, such as one to a larger disk, but for those below the `writable` folders: what was confined
    before may have put them there, to be let to where they lead now.
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
                raise Closed(f"{path}: {name} is a link in what ComfyUI may write")
            names += target.split("/")[::-1]
            while target.startswith("/") and len(way) > 1:
                os.close(way.pop()[0])
        return os.dup(way[-1][0])
    finally:
        for each, _ in way:
            os.close(each)


def _written(paths: Iterable[str]) -> list[str]:
    """The paths that may be written; of a folder with `*`, those of the data's folders in it that are no links."""
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
    """Make the folders that must be there: of the data, whose own folder will be closed, and for what is temporary."""
    for folder in (each[:-2] for each in spec["write"] if each.endswith("/*")):
        for name in DATA:
            with suppress(FileExistsError, FileNotFoundError):
                Path(folder, name).mkdir()
    if scratch := os.environ.get("TMPDIR"):
        try:
            os.close(opened(scratch, _identities(_written(spec["write"])), make=True))
        except Closed as error:
            print(f"not made: {error}", file=sys.stderr)


def _around(path: str, closed: Collection[Path]) -> Iterator[str]:
    """A folder, or of one that holds what is closed all else that is in it."""
    real = Path(os.path.realpath(path))
    if not any(each.is_relative_to(real) for each in closed):
        yield path
    elif real not in closed:
        with suppress(OSError):
            for each in os.listdir(real):  # noqa: PTH208
                yield from _around(f"{real}/{each}", closed)


def _closed(spec: Json) -> set[Path]:
    """What no rule may open, nor what holds it: the home folder, and Hearth's own state and secrets."""
    found = {Path(spec["folder"]), Path(spec["folder"]).parent / "state"} if "folder" in spec else set()
    with suppress(KeyError):  # in some containers the login has no name
        home = Path(os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir))
        # accounts of the system's have a folder of everybody's, such as /usr/sbin
        found |= set() if any(Path(os.path.realpath(each)).is_relative_to(home) for each in SYSTEM) else {home}
    return {Path(os.path.realpath(each)) for each in found}


def _python(program: str) -> list[str]:
    """What a Python of the login's needs of where it lies, as pyenv, uv and conda have one; ~/.local may be that."""
    real = Path(os.path.realpath(program))
    home, found = real.parent.parent, re.match(r"python\d\.\d+", real.name)
    if home == Path("/usr"):
        return []
    name = found[0] if found else "python3.*"
    forms = (f"lib*/{name}", "lib*/*.so*", f"include/{name}", "share/zoneinfo")
    return [str(real), *(str(each) for form in forms for each in sorted(home.glob(form)))]


def restrict(spec: Json, version: int) -> None:
    """Let this process, and what it starts, do what `spec` says and no more; raises OSError.

    `write` and `read` are paths, `bind` and `connect` TCP ports. What is not there, or is closed to this user, is left
    out. `*` stands for a folder's folders: they cannot be replaced then, by links above all. `version` is Landlock's.
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
                    raise Closed(f"{path}: the home folder, or what Hearth keeps for itself, is in it")
            except Closed as error:
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
    allow(["/dev/shm"], SHARE)  # noqa: S108  of torch's workers, and everybody else's, whose names it cannot list
    allow(["/dev/dri"], READ_DIR)
    allow((path for name in DEVICES for path in glob.glob(f"/dev/{name}")), USE | READ_DIR)  # noqa: PTH207
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


# Tests of a call's arguments: which one, of it these bits (_WHOLE: all), the value that they must have. A list of tests
# holds when all of them do, a rule when one of its lists does; an empty list always does.
_Tests = tuple[tuple[int, int, int], ...]
_Rules = tuple[tuple[int, int, tuple[_Tests, ...]], ...]
_WHOLE, _FAST_OPEN, _NAMESPACES = 0xFFFFFFFF, 0x20000000, 0x7E020000  # MSG_FASTOPEN; CLONE_NEWNS and the other seven
_SELF: tuple[_Tests, ...] = (((0, _WHOLE, 0),),)
_SELF_ALONE: tuple[_Tests, ...] = (((0, _WHOLE, 0), (1, _WHOLE, 0)),)
_PERM, _NO_CALL = 1, 38  # EPERM, ENOSYS

# Numbers on x86_64 and aarch64, -1 where there is no such call. First those of which nothing is allowed: what systemd's
# filter of a system's unit denies as well (recipes/comfyui/units/hardening.conf), new namespaces, processes by pidfd,
# and System V's and POSIX' shared memory, queues and semaphores by key or name, which Landlock does not know.
_DENIED = (
    *((323, 282), (310, 270), (311, 271), (312, 272)),  # userfaultfd process_vm_readv process_vm_writev kcmp
    *((250, 219), (248, 217), (249, 218), (101, 117)),  # keyctl add_key request_key ptrace
    *((321, 280), (298, 241), (272, 97), (308, 268)),  # bpf perf_event_open unshare setns
    *((each, each) for each in (425, 426, 427)),  # io_uring_setup, _enter and _register, which open sockets themselves
    *((each, each) for each in (424, 434, 438, 440, 448)),  # pidfd_send_signal _open _getfd process_madvise _mrelease
    *((29, 194), (30, 196), (31, 195), (64, 190), (65, 193), (66, 191)),  # shmget shmat shmctl semget semop semctl
    *((220, 192), (68, 186), (69, 189), (70, 188), (71, 187)),  # semtimedop msgget msgsnd msgrcv msgctl
    *((240, 180), (241, 181)),  # mq_open mq_unlink
)
_ALLOWED_IF: _Rules = (
    (53, 199, tuple(((0, _WHOLE, 1), (1, 0xF, kind)) for kind in (1, 5))),  # socketpair: streams; packets in order
    (44, 206, (((3, _FAST_OPEN, 0),),)),  # sendto, which would connect
    (46, 211, (((2, _FAST_OPEN, 0),),)),  # sendmsg
    (307, 269, (((3, _FAST_OPEN, 0),),)),  # sendmmsg
    (56, 220, (((0, _NAMESPACES, 0),),)),  # clone
    *((302, 261, _SELF), (142, 118, _SELF), (144, 119, _SELF)),  # prlimit64 sched_setparam sched_setscheduler
    *((203, 122, _SELF), (314, 274, _SELF)),  # sched_setaffinity sched_setattr
    *((256, 238, _SELF), (279, 239, _SELF)),  # migrate_pages move_pages
    (141, 140, _SELF_ALONE),  # setpriority, of a process
    (251, 30, (((0, _WHOLE, 1), (1, _WHOLE, 0)),)),  # ioprio_set, of a process
)
_DENIED_IF: _Rules = (
    (62, 129, (((0, _WHOLE, _WHOLE),),)),  # kill: -1 is every process of the login
    # setsockopt of TCP: TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, and TCP_ULP, which makes another protocol's socket of one
    (54, 208, tuple(((1, _WHOLE, 6), (2, _WHOLE, option)) for option in (23, 30, 31))),
)
_EMPTYING: _Rules = (
    (76, 45, ((),)),  # truncate
    *(
        (*numbers, tuple(((at, 0x203, 0x200 | mode),) for mode in (0, 3)))
        for at, numbers in ((1, (2, -1)), (2, (257, 56)))
    ),
)
"""Emptying a file that may not be written: truncate(2), and open(2) and openat(2) with O_TRUNC alone."""

_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # include/uapi/linux/audit.h

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06  # include/uapi/linux/bpf_common.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
_Line = tuple[int, int, int, int]


def _sockets(*, udp: bool) -> tuple[_Tests, ...]:
    """The sockets that may be made: of the Internet TCP, and UDP; routes of netlink, which tell the own addresses.

    An AF_UNIX socket would reach the login's systemd, which starts anything, its ssh-agent and its containers; Landlock
    keeps nobody from connecting to those. They are streams and datagrams; CUDA's own is of the third type, which stays.
    Landlock knows TCP alone, not MPTCP (262), SCTP (132) and SMC (256), which are streams, too.
    """
    kinds = [(1, 0), (1, 6), *([(2, 0), (2, 17)] if udp else [])]
    internet = (((0, _WHOLE, each), (1, 0xF, kind), (2, _WHOLE, of)) for each in (2, 10) for kind, of in kinds)
    return (((0, _WHOLE, 16), (2, _WHOLE, 0)), ((0, _WHOLE, 1), (1, 0xF, 5)), *internet)


def _rule(number: int, lists: tuple[_Tests, ...], held: int, other: int) -> list[_Line]:
    """What is answered to a call when one of the lists of tests holds, and when none does."""
    lines: list[_Line] = []
    for tests in lists:
        for left, (argument, bits, value) in zip(range(len(tests) - 1, -1, -1), tests, strict=True):
            lines += [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, bits), (_EQUAL, 0, 3 * left + 1, value)]
        lines.append((_RETURN, 0, 0, held))
    lines.append((_RETURN, 0, 0, other))
    return [(_EQUAL, 0, len(lines), number), *lines]


def filtered(*, udp: bool, version: int) -> bytes:
    """The seccomp filter: what the tables above say, and sockets; `version` is Landlock's."""
    machine, deny, missing = platform.machine(), _ERRNO | _PERM, _ERRNO | _NO_CALL
    old = 0 < version < 3
    allowed, denied = (*_ALLOWED_IF, (41, 198, _sockets(udp=udp))), (*_DENIED_IF, *(_EMPTYING if old else ()))
    rules: list[tuple[int, int, tuple[_Tests, ...], int, int]] = [(*each, (), deny, deny) for each in _DENIED]
    rules += [(*each, _ALLOW, deny) for each in allowed] + [(*each, deny, _ALLOW) for each in denied]
    # clone3 and openat2, whose flags no filter sees: the C library takes clone then, and never the other
    rules += [(each, each, (), missing, missing) for each in ((435, 437) if old else (435,))]
    lines: list[_Line] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCH[machine]), (_RETURN, 0, 0, deny), (_LOAD, 0, 0, 0)]
    lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, deny)]  # x32, which has other numbers
    for x86, arm, lists, held, other in rules:
        number = x86 if machine == "x86_64" else arm
        lines += _rule(number, lists, held, other) if number >= 0 else []
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


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
    _make(spec)
    # No queues are to be had anyhow; nobody without rights takes that limit off, and so it marks what is confined.
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # nothing collects its crashes, in which its secrets are
    version = abi()
    if os.geteuid() == 0:
        _drop()
    if platform.machine() in _ARCH:
        _filter(filtered(udp=spec["udp"], version=version))
    if version:
        restrict({"program": argv[0], **spec}, version)
    else:
        print("this kernel has no Landlock: ComfyUI can read and write all that this login can", file=sys.stderr)
    os.execv(argv[0], argv)  # noqa: S606
