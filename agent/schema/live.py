"""The current state of a host: GPUs, ComfyUI, memory, jobs."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from agent.schema.facts import Facts, Process
from agent.schema.record import Record


class GpuState(Record):
    """The current state of a GPU. None: listed in `unsupported` or explained in `errors`."""

    index: int
    name: str | None
    uuid: str | None
    capability: str | None  # compute capability, such as "8.9"
    driver: str | None
    cuda: str | None  # the newest CUDA version that the driver runs, such as "13.0"
    memory_total: int | None
    memory_used: int | None
    unified: bool  # it shares the machine's memory
    memory_source: str | None  # "nvml", or "meminfo" where it shares the machine's memory
    utilization: int | None  # percent
    memory_utilization: int | None  # percent
    temperature: int | None  # degrees Celsius
    power: float | None  # watts
    power_limit: float | None  # watts
    clock_sm: int | None  # MHz
    clock_memory: int | None  # MHz
    persistence: bool | None
    compute_mode: str | None  # "default", "prohibited" or "exclusive process"
    processes: tuple[Process, ...]
    unsupported: tuple[str, ...]  # values that this GPU does not support
    errors: tuple[str, ...]  # a line for each failed query or impossible value


class Sample(Record):
    """The GPUs of a host at one moment."""

    time: float
    gpus: tuple[GpuState, ...]
    job: str | None  # id of the job that ComfyUI runs


class RunningJob(Record):
    """A running job."""

    id: str
    nodes: int  # of its workflow
    since: float | None  # when it was queued


class Device(Record):
    """A device used by ComfyUI."""

    name: str
    type: str  # "cuda" or "cpu"


class ComfyUI(Record):
    """The state that ComfyUI reports."""

    state: str  # "answers", "silent" (accepts connections but does not answer) or "closed"
    reason: str = ""  # why it does not answer
    seconds: float = 0  # how long the answers took
    version: str = ""
    torch: str = ""
    devices: tuple[Device, ...] = ()
    running: tuple[RunningJob, ...] = ()
    pending: int = 0


class Disk(Record):
    """Free space of a file system."""

    free: int = 0
    total: int = 0
    files_free: int | None = None  # inodes; None: no fixed number
    files: int | None = None  # inodes; None: no fixed number
    error: str = ""  # why it cannot be queried


class Live(Record):
    """The current state of ComfyUI and its machine."""

    time: float  # the host's clock
    uptime: float | None  # seconds since ComfyUI was started; None: not running
    comfyui: ComfyUI
    memory: dict[str, int]  # bytes, by the names in /proc/meminfo
    disks: dict[str, Disk]  # by path: the prefix, the data, and folders elsewhere
    gpus: tuple[GpuState, ...] = ()


class Glance(Record):
    """Facts and current state, from one query of the driver."""

    facts: Facts
    live: Live


class Job(Record):
    """A job in ComfyUI's history or queue. None: not known yet."""

    id: str
    status: str  # "success", "error", "interrupted", "running" or "pending"
    nodes: int  # of its workflow
    queued: float | None = None
    started: float | None = None
    seconds: float | None = None  # how long it ran
    cached: int = 0  # nodes whose result came from the cache
    node: str = ""  # the node that failed
    node_type: str = ""
    error: str = ""
    workflow: str = ""  # hash of its workflow without seeds and texts; empty: not known, or of a health check


class LogLine(Record):
    """A line of ComfyUI's log, or a note on it. Without both: sent when it is quiet."""

    text: str | None = None
    at: float | None = None  # None: unknown
    note: str = ""


class Received(Record):
    """The answer to an upload."""

    size: int  # bytes received so far, by all uploads of this blob


class CommandLine(Record):
    """What the flags of the current release are read from."""

    release: str = ""  # its id; empty: nothing is deployed
    version: str = ""  # of its ComfyUI
    words: tuple[str, ...] = ()  # its flags, with their values
    text: str = ""  # ComfyUI's comfy/cli_args.py; empty: it cannot be read


class NodeTypes(Record):
    """What workflows need of the running ComfyUI, and the workflows that its users saved."""

    types: dict[str, Any]  # node types, as /object_info describes them
    workflows: dict[str, Any]  # by name; None: it is too large, or not JSON


class Stored(Record):
    """The answer to a change of a secret."""

    kept: str  # "encrypted" or "plain"; empty: removed


class GpuMemory(Record):
    """Memory in use on a GPU."""

    index: int
    used: int | None
    comfyui: int  # ComfyUI's part of that


class Held(Record):
    """Memory in use on a host."""

    gpus: tuple[GpuMemory, ...]
    resident: int | None  # resident memory of ComfyUI's process
    available: int  # MemAvailable of the machine


class Freed(Record):
    """The result of asking ComfyUI to free its memory."""

    freed: bool  # false: a job still runs; ComfyUI frees its memory when it ends
    job: str | None
    before: Held
    after: Held


class MpsClient(Record):
    """A process that computes through an MPS server."""

    pid: int
    name: str | None
    user: str | None


class MpsServer(Record):
    """An MPS server."""

    pid: int
    state: str  # in the daemon's words
    clients: tuple[MpsClient, ...]


class Mps(Record):
    """NVIDIA's Multi-Process Service for ComfyUI."""

    on: bool = False  # Hearth turned it on
    control: str = ""  # path of nvidia-cuda-mps-control; empty: not installed
    state: str = ""  # of the daemon's unit
    restarts: int = 0  # of the daemon's unit
    limits: dict[str, str] = field(default_factory=dict)  # variables in the daemon's unit
    percent: str = ""  # default thread percentage, as the daemon reports it
    servers: tuple[MpsServer, ...] = ()
    error: str = ""  # why the daemon did not answer
    service_pid: int = 0  # ComfyUI's; 0: not running
    service_knows: bool = False  # ComfyUI was started with the daemon's pipe directory


class Kernel(Record):
    """The kernel's messages of the past week about OOM kills and GPU errors (Xid)."""

    readable: bool
    lines: tuple[str, ...]


class Containers(Record):
    """Container engines, NVIDIA's toolkit, and the devices that CDI describes."""

    engines: tuple[str, ...]
    toolkit: str  # version; empty: not installed
    devices: tuple[str, ...]
    refresh: bool  # the unit that updates the CDI description exists
    lasting: bool = True  # a boot keeps the description, or that unit is enabled


class Torch(Record):
    """What torch reports about CUDA in the service's environment and sandbox."""

    version: str = ""
    available: bool = False  # it finds a device
    error: str = ""  # why it could not be asked


class Probe(Record):
    """Data for the doctor's checks beyond facts and current state."""

    result: str = ""  # how the service ended last, in systemd's words
    oom_kills: int = 0  # of the service's processes since it started
    synchronized: bool | None = None  # the clock is synchronised; None: not reported
    compiler: str = ""  # path of a C compiler; empty: none
    headers: str = ""  # path of Python.h for the release's Python; empty: none
    installed: dict[str, str] = field(default_factory=dict)  # versions of torch's packages in the environment
    torch: Torch | None = None  # None: not asked, because ComfyUI answers
    access: dict[str, str] = field(default_factory=dict)  # paths that the service must, but cannot "read" or "write"
    kernel: Kernel = Kernel(True, ())
    log: tuple[tuple[float | None, str], ...] = ()  # the service's last lines with their times, without colours
    containers: Containers = Containers((), "", (), False)
    mps: Mps = field(default_factory=Mps)


class Probed(Record):
    """Facts, current state and the doctor's data."""

    facts: Facts
    live: Live
    probe: Probe


class Sanitised(Record):
    """A file that was searched for metadata.

    `state` is clean, dirty (a dry run), written, copied (a clean copy existed), unknown (its format), or failed.
    """

    path: str
    state: str
    removed: tuple[str, ...] = ()  # what is removed
    copy: str = ""  # name of the clean copy; empty if the file itself is replaced
    error: str = ""
