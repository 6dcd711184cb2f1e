"""Operations: watching, diagnosing and controlling ComfyUI on hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Change, Confirmation, Output, number
from deploy.flags import Fleet, options


@command(help={"watch": "refresh every 2 seconds, or every N seconds, until Ctrl-C"}, optional=["watch"])
def status(_: Context, watch: str = "", *, where: Fleet, out: Output) -> int:
    """Show the status of hosts at a glance. Exit code 0 only if there are no problems.

    Asks all hosts of a group at the same time.

        inv status --host spark
        inv status --group home --watch     # refresh until Ctrl-C
    """
    from ops import status

    names = where.names()
    if watch:
        status.watch(names, watch, ask_sudo=where.ask_sudo)
    found = status.look(names, ask_sudo=where.ask_sudo)
    console.show(status.summary(found), status.rows(found), as_json=out.json)
    return status.code(found)


@command()
def doctor(_: Context, *, where: Fleet, out: Output) -> int:
    """Diagnose hosts, or this machine, and print how to fix each problem. Exit code 1: warnings, 2: errors.

    Without `--host` and `--group`, reports what this machine can do (deploy, build kernels), and checks its ComfyUI if
    one is deployed. An unreachable host is an error. How: docs/troubleshooting.md

        inv doctor                # this machine
        inv doctor --host spark
    """
    from ops import doctor

    names, found = doctor.examine(where.host, where.group, ask_sudo=where.ask_sudo)
    console.show(doctor.summary(found), doctor.rows(names, found), as_json=out.json)
    return doctor.code(found)


@command(
    help={
        "watch": "refresh every second, or every N seconds, until Ctrl-C",
        "record": "write samples to this new file, one JSON line each; one host only",
        "seconds": "duration of the recording",
        "every": "seconds between the samples of a recording (default: 1)",
    },
    optional=["watch"],
)
def gpu(
    _: Context, watch: str = "", record: str = "", seconds: str = "", every: str = "", *, where: Fleet, out: Output
) -> int:
    """Show the GPUs of hosts: utilisation, memory, power, clocks, temperature, and processes.

    For a GPU that shares the machine's memory (GB10), the memory is the machine's. A dash is a value that the driver
    does not report. Hearth's ComfyUI is marked. A recording has the id of the job that was running at each sample;
    `inv gpu-plot` plots it. How: docs/how-to/watch-the-gpu.md

        inv gpu --group home --watch
        inv gpu --host spark --record run.jsonl --seconds 600 --every 0.5
    """
    from deploy import fleet
    from ops import gpu

    names = where.names()
    gpu.check(names, watch=watch, record=record, seconds=seconds, every=every, as_json=out.json)
    if record:
        length, pause = number("seconds", seconds, 1), number("every", every or "1", 0.1)
        return gpu.record(names[0], Path(record), length, pause, ask_sudo=where.ask_sudo)
    if watch:
        gpu.watch(names, watch, ask_sudo=where.ask_sudo)
    answers = gpu.look(names, ask_sudo=where.ask_sudo)
    seen = fleet.collect(answers)
    console.show(gpu.summary(seen), gpu.rows(seen), as_json=out.json)
    return fleet.code(answers)


@command(
    help={
        "recording": "a file of `inv gpu --record`",
        "output": "the file to write, .svg or .png (default: the recording's name with .svg)",
    }
)
def gpu_plot(_: Context, recording: str, output: str = "") -> None:
    """Plot a recording of GPUs: utilisation, memory and power over time, with the jobs.

    Needs matplotlib: `uv sync --group plot`.

        inv gpu-plot run.jsonl
        inv gpu-plot run.jsonl --output run.png
    """
    from ops import plot

    console.data(str(plot.plot(recording, output)))


@command(help={"wait": "seconds to wait for the running job (default: 60)"})
def free_memory(_: Context, wait: str = "60", *, where: Fleet, out: Output) -> int:
    """Unload ComfyUI's models and cached results, and report the memory freed. Exit code 1 if a job delays it.

    ComfyUI frees the memory at once, or when the running job ends; no job is interrupted. The next job loads its models
    again.

        inv free-memory --host spark
        inv free-memory --host spark --wait 0   # do not wait for the job
    """
    from deploy import fleet
    from ops import memory

    answers = memory.free(where.names(), wait, ask_sudo=where.ask_sudo)
    found = fleet.collect(answers)
    console.show(memory.summary(found), memory.rows(found), as_json=out.json)
    return fleet.code(answers) or int(not all(each.freed for each in found.values()))


@command(help={"force": "also on hosts without a GPU that shares the machine's memory"})
def drop_caches(_: Context, force: bool = False, *, where: Fleet, how: Confirmation, out: Output) -> int:
    """Drop the page cache of a host whose GPU shares the machine's memory, and report the memory freed.

    Cached files stay in memory until it is needed, so CUDA on a GB10 may find too little free memory. Runs once and
    never automatically: files are read from disk again afterwards. Needs root.

        inv drop-caches --host spark
    """
    from ops import memory

    results = memory.drop(where.names(), options(where, how, force=force))
    console.show(results, memory.dropped_rows(results), as_json=out.json)
    return how.code(changes=True)


@command()
def profiles(_: Context, *, out: Output) -> None:
    """List the profiles (kinds of machines) and modes (kinds of use).

    A host in config/hosts.toml names one `profile` and any number of `modes`. `inv hosts` shows the merged result.

        inv profiles
    """
    from ops import profiles

    found = profiles.every()
    console.show(found, profiles.list_rows(found), as_json=out.json)


@command(positional=["name"], help={"name": "a profile or mode", "explain": "show the reasons", "host": "a host"})
def profile(_: Context, name: str, explain: bool = False, host: str = "", *, out: Output) -> None:
    """Show the settings of a profile or mode, with the versions and stacks that each applies to.

    It is for the pinned ComfyUI, or with `--host` for that of a host. `--explain` adds the reason for each setting.

        inv profile low-memory --explain --host spark
    """
    from ops import profiles

    found = profiles.one(name, host)
    console.show(found, profiles.rows(found, explain=explain), as_json=out.json)


@command()
def flags(_: Context, *, where: Fleet, out: Output) -> int:
    """Show the flags of ComfyUI on a host: values, origins, and mutually exclusive flags.

    Also shows where the configuration differs from the active release.

        inv flags --host spark
    """
    from deploy import fleet
    from ops import flags

    answers = flags.look(where.names(), ask_sudo=where.ask_sudo)
    seen = list(fleet.collect(answers).values())
    console.show(seen, flags.rows(seen), as_json=out.json)
    return fleet.code(answers)


def _change(action: str, where: Fleet, how: Confirmation, out: Output, **more: Any) -> int:
    from ops import lifecycle

    results = lifecycle.carry_out(action, where.names(), options(where, how), **more)
    return lifecycle.show(results, as_json=out.json, dry_run=how.dry_run)


@command()
def start(_: Context, *, where: Fleet, how: Confirmation, out: Output) -> int:
    """Start ComfyUI, and wait until it answers.

    Refused if it is paused, if a file system that it needs is not mounted, or if another process uses its port.

        inv start --host spark
    """
    return _change("start", where, how, out)


@command()
def stop(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Wait for running jobs, then stop ComfyUI until the next boot, deploy or `inv start`.

    If jobs still run after `--drain` seconds, ComfyUI keeps running; `--force` interrupts them.

        inv stop --group home --drain 600
    """
    return _change("stop", where, how, out)


@command()
def restart(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Wait for running jobs, restart ComfyUI, and wait until it answers.

    If it does not answer within the start time-out of its profile, shows its log and leaves it running.

        inv restart --host spark
        inv restart --host spark --force   # do not wait for jobs
    """
    return _change("restart", where, how, out)


@command()
def pause(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Stop ComfyUI until `inv resume`; no boot and no deploy starts it.

    Until then, `inv deploy`, `rollback` and `start` are refused, and say who paused it and when.

        inv pause --host spark
    """
    return _change("pause", where, how, out)


@command()
def resume(_: Context, *, where: Fleet, how: Confirmation, out: Output) -> int:
    """Start ComfyUI after a pause, now and at boot.

    Refused for the same reasons as `inv start`, except the pause.

        inv resume --host spark
    """
    return _change("resume", where, how, out)


@command(help={"undo": "restore the network; ComfyUI stays paused until `inv resume`"})
def quarantine(_: Context, undo: bool = False, *, where: Fleet, how: Confirmation, out: Output) -> int:
    """Stop ComfyUI at once, cut it off from the network, and list what to inspect. Deletes nothing.

    For a custom node that misbehaves. Interrupts jobs. No boot and no deploy starts ComfyUI again; started by hand, its
    unit has no network. How: SECURITY.md

        inv quarantine --host spark
        inv quarantine --host spark --undo
    """
    from ops import lifecycle

    code = _change("end quarantine" if undo else "quarantine", where, how, out)
    if not (undo or out.json or how.dry_run):
        lifecycle.show_evidence(where.names())
    return code


@command()
def remove(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Remove the service; releases and data stay, and a deploy restores it.

    Removes its units and their links in systemd's folder, the sudo rights of members, and the linger that a deploy
    enabled. How: docs/how-to/stop-and-take-away.md

        inv remove --host spark --dry-run
        inv remove --host spark
    """
    return _change("remove", where, how, out)


@command(
    help={
        "data": "also delete the data; asks to type the host's name",
        "yes-delete-data-of": "the host's name, instead of typing it",
    }
)
def nuke(
    _: Context, data: bool = False, yes_delete_data_of: str = "", *, where: Fleet, how: Change, out: Output
) -> int:
    """Delete all of Hearth on a host except the data; with `--data`, also the data. Never follows mounts or links.

    The data is models, inputs, outputs, workflows and settings. It is deleted only if the host's name is typed at the
    terminal or given by `--yes-delete-data-of`, and cannot be restored. The output lists what remains.
    How: docs/how-to/stop-and-take-away.md

        inv nuke --host spark --dry-run
        inv nuke --host spark --data
        inv nuke --host spark --data --yes-delete-data-of spark   # in a script
    """
    return _change("nuke", where, how, out, data=data, yes_delete_data_of=yes_delete_data_of)


@command(
    help={
        "follow": "print new lines until Ctrl-C",
        "lines": "number of lines (default: 100, or with --since all)",
        "since": "start time: '2026-11-23 14:00', 14:00, '10 min ago', yesterday",
        "grep": "only lines that match this regular expression",
    }
)
def logs(
    _: Context, follow: bool = False, lines: str = "", since: str = "", grep: str = "", *, where: Fleet, out: Output
) -> int:
    """Show ComfyUI's log, from systemd's journal or from Hearth's supervisor.

    Times are printed in your time zone. `--since` is read in the host's time zone, in journalctl's format. The
    supervisor's log has no times: `--since` is accurate to five seconds there. Colours are kept on a terminal only.

        inv logs --host spark --follow
        inv logs --host spark --since '10 min ago' --grep 'error|warning'
        inv logs --group home --follow   # each line starts with its host's name
    """
    from ops import logs

    request = logs.query(lines, since, grep, follow=follow)
    return logs.show(where.names(), request, ask_sudo=where.ask_sudo, as_json=out.json)


@command(help={"number": "number of finished jobs (default: 20)"})
def jobs(_: Context, number: str = "20", *, where: Fleet, out: Output) -> int:
    """List ComfyUI's recent, running and waiting jobs, with durations and errors.

    ComfyUI forgets its jobs when it restarts. `--json` has full ids and messages.

        inv jobs --host spark
        inv jobs --group home --number 100 --json
    """
    from deploy import fleet
    from ops import jobs

    answers = jobs.recent(where.names(), number, ask_sudo=where.ask_sudo)
    seen = fleet.collect(answers)
    console.show(jobs.summary(seen), jobs.rows(seen), as_json=out.json)
    return fleet.code(answers)
