"""Hosts that run: seen, understood and cared for."""

from __future__ import annotations

from typing import Any

from invoke.context import Context  # `command` evaluates annotations

from core.command import command
from core.flags import Agreed, Change, Output
from deploy.flags import Fleet, options


@command(
    help={"watch": "show it again and again, every 2 seconds or as many as given, until Ctrl-C"}, optional=["watch"]
)
def status(_: Context, watch: str = "", *, where: Fleet, out: Output) -> int:
    """Show hosts at a glance; exit code 0 only when all is well.

    All hosts of a group are asked at once.

        inv status --host spark
        inv status --group home --watch     # again and again, until Ctrl-C
        inv status --group home --watch 10
    """
    from ops import status

    names = where.names()
    if watch:
        status.watch(names, watch, ask_sudo=where.ask_sudo)
    return status.show(status.look(names, ask_sudo=where.ask_sudo), as_json=out.json)


@command()
def doctor(_: Context, *, where: Fleet, out: Output) -> int:
    """Look for what is wrong, here or on hosts, and name the command that mends it; 1: warnings, 2: errors.

    Without `--host` and `--group`: where kernels are built, and the ComfyUI of this machine where there is one. A host
    that cannot be reached is a finding, too.

        inv doctor                # here
        inv doctor --host spark
    """
    from ops import doctor

    return doctor.show(*doctor.examine(where.host, where.group, ask_sudo=where.ask_sudo), as_json=out.json)


@command(
    help={
        "watch": "show them every second, or every so many seconds, until Ctrl-C",
        "record": "write a sample a line, as JSON, to this new file; one host only",
        "seconds": "how long to record",
        "every": "seconds from sample to sample of a recording (default: 1)",
    },
    optional=["watch"],
)
def gpu(
    _: Context,
    watch: str = "",
    record: str = "",
    seconds: str = "",
    every: str = "",
    *,
    where: Fleet,
    out: Output,
) -> int:
    """Show the GPUs of hosts: use, memory, power, clocks, temperature, and the processes that are on them.

    A GPU that shares the machine's memory (GB10) has the machine's numbers there. A dash is what its driver does not
    tell. The ComfyUI of Hearth is marked. A recording has the id of the job that ran at each sample; `inv gpu-plot`
    draws it. How: docs/how-to/watch-the-gpu.md

        inv gpu --host spark
        inv gpu --group home --watch
        inv gpu --host spark --record run.jsonl --seconds 600 --every 0.5
    """
    from ops import gpu

    return gpu.run(
        where.names(),
        watch=watch,
        record=record,
        seconds=seconds,
        every=every,
        ask_sudo=where.ask_sudo,
        as_json=out.json,
    )


@command(
    help={
        "recording": "a file of `inv gpu --record`",
        "output": "the file to draw to, .svg or .png (default: the recording's name with .svg)",
    }
)
def gpu_plot(_: Context, recording: str, output: str = "") -> None:
    """Draw a recording of GPUs: utilisation, memory and power over time, and when which job ran.

    A PNG needs the program rsvg-convert (Debian: librsvg2-bin).

        inv gpu-plot run.jsonl
        inv gpu-plot run.jsonl --output run.png
    """
    from ops import plot

    plot.plot(recording, output)


@command(help={"wait": "seconds to wait for the job that runs (default: 60)"})
def free_memory(_: Context, wait: str = "60", *, where: Fleet, out: Output) -> int:
    """Have ComfyUI unload its models and forget its results, and show what that gained; 1 when it is still to come.

    ComfyUI does so at once, or when the job that runs has ended; no job is cut short. The next job loads its models
    again.

        inv free-memory --host spark
        inv free-memory --host spark --wait 0   # say it, and do not wait for the job
    """
    from ops import memory

    return memory.free(where.names(), wait, ask_sudo=where.ask_sudo, as_json=out.json)


@command(help={"force": "also where no GPU shares the machine's memory"})
def drop_caches(_: Context, force: bool = False, *, where: Fleet, how: Agreed, out: Output) -> int:
    """Drop the page cache of a host whose GPU shares the machine's memory, and show what that gained.

    What was read from disks stays in memory until that is needed; on a GB10, CUDA may find less than there is. Once
    only, and never by itself: afterwards all is read from the disk again. Needs root.

        inv drop-caches --host spark
    """
    from ops import memory

    return memory.drop(where.names(), options(where, how, force=force), as_json=out.json)


@command()
def profiles(_: Context, *, out: Output) -> None:
    """List profiles (kinds of machines) and modes (what a machine is used for).

    A host of config/hosts.toml names one `profile`, and any `modes`. `inv hosts` shows what becomes of them.

        inv profiles
    """
    from ops import profiles

    profiles.listed(profiles.every(), as_json=out.json)


@command(positional=["name"], help={"name": "a profile or mode", "explain": "say why of each"})
def profile(_: Context, name: str, explain: bool = False, *, out: Output) -> None:
    """Show what a profile or mode sets, for which versions of torch and ComfyUI, and with which stacks it has effect.

    `--explain` says why of each.

        inv profile low-memory --explain
        inv profile dgx-spark --json
    """
    from ops import profiles

    profiles.shown(profiles.one(name), explain=explain, as_json=out.json)


@command()
def flags(_: Context, *, where: Fleet, out: Output) -> int:
    """Show the flags of the ComfyUI that a host runs: which are set and by what, and which exclude each other.

    Says so where the configuration would set others than the release in service has.

        inv flags --host spark
    """
    from ops import flags

    return flags.show(flags.look(where.names(), ask_sudo=where.ask_sudo), as_json=out.json)


def _change(action: str, where: Fleet, how: Agreed, out: Output, **more: Any) -> int:
    from ops import lifecycle

    results = lifecycle.carry_out(action, where.names(), options(where, how), **more)
    return lifecycle.show(results, as_json=out.json, dry_run=how.dry_run)


@command()
def start(_: Context, *, where: Fleet, how: Agreed, out: Output) -> int:
    """Start ComfyUI, and wait until it answers.

    Refused where it was paused, where something that it needs is not mounted, or where another program has its port.
    At boot it starts by itself where systemd runs it.

        inv start --host spark
    """
    return _change("start", where, how, out)


@command()
def stop(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Stop ComfyUI when its jobs are done, until the next boot or `inv start`.

    Jobs that are not done after `--drain` seconds keep it running, unless `--force` cuts them short. A deploy starts
    it, too, and says so before.

        inv stop --host spark
        inv stop --group home --drain 600
    """
    return _change("stop", where, how, out)


@command()
def restart(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Stop ComfyUI when its jobs are done, start it again, and wait until it answers.

    When it does not answer in the time that its profile gives a start, its log is shown; it is left as it is.

        inv restart --host spark
        inv restart --host spark --force   # it hangs, or its jobs do not matter
    """
    return _change("restart", where, how, out)


@command()
def pause(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Stop ComfyUI until `inv resume`: no boot and no deploy starts it.

    `inv deploy`, `rollback` and `start` are refused meanwhile, and say who paused it and when.

        inv pause --host spark
    """
    return _change("pause", where, how, out)


@command()
def resume(_: Context, *, where: Fleet, how: Agreed, out: Output) -> int:
    """Start ComfyUI after a pause, from now on also at boot.

    Refused where `inv start` is refused for another reason than the pause.

        inv resume --host spark
    """
    return _change("resume", where, how, out)


@command(help={"undo": "give it the network again; it stays paused until `inv resume`"})
def quarantine(_: Context, undo: bool = False, *, where: Fleet, how: Agreed, out: Output) -> int:
    """Stop ComfyUI without asking it anything, keep it from the network, delete nothing, and say what to look at.

    For a custom node that does what it should not. Jobs are cut short. It stays stopped: no boot and no deploy starts
    it, and whoever starts its unit by hand starts it without a network. How: SECURITY.md

        inv quarantine --host spark
        inv quarantine --host spark --undo
    """
    from ops import lifecycle

    names, chosen = where.names(), options(where, how)
    results = lifecycle.carry_out("end quarantine" if undo else "quarantine", names, chosen)
    code = lifecycle.show(results, as_json=out.json, dry_run=how.dry_run)
    if not (undo or out.json or how.dry_run):
        lifecycle.show_evidence(names)
    return code


@command()
def remove(_: Context, *, where: Fleet, how: Change, out: Output) -> int:
    """Take the service away; its releases and data stay, and a deploy brings it back.

    Units, their links in systemd's folder, members' rights by sudo, and the linger that a deploy enabled. How:
    docs/how-to/stop-and-take-away.md

        inv remove --host spark --dry-run
        inv remove --host spark
    """
    return _change("remove", where, how, out)


@command(
    help={
        "data": "delete the data, too; the host's name must be typed",
        "yes-delete-data-of": "the host's name, instead of typing it",
    }
)
def nuke(
    _: Context, data: bool = False, yes_delete_data_of: str = "", *, where: Fleet, how: Change, out: Output
) -> int:
    """Delete all of Hearth's on a host but the data, and with `--data` that too; never what is mounted or linked.

    Models, inputs, outputs, workflows and settings are the data. They go only when the host's name is typed at the
    terminal, or given by `--yes-delete-data-of`; nothing brings them back. What stays is named. How:
    docs/how-to/stop-and-take-away.md

        inv nuke --host spark --dry-run
        inv nuke --host spark
        inv nuke --host spark --data
        inv nuke --host spark --data --yes-delete-data-of spark   # in a script
    """
    return _change("nuke", where, how, out, data=data, yes_delete_data_of=yes_delete_data_of)


@command(
    help={
        "follow": "go on as it grows, until Ctrl-C",
        "lines": "the last lines, so many (default: 100, or all since the time given)",
        "since": "from this time on: '2026-11-23 14:00', 14:00, '10 min ago', yesterday",
        "grep": "only lines that match this regular expression",
    }
)
def logs(
    _: Context,
    follow: bool = False,
    lines: str = "",
    since: str = "",
    grep: str = "",
    *,
    where: Fleet,
    out: Output,
) -> int:
    """Show ComfyUI's log: the journal's where systemd runs it, else that of Hearth's supervisor.

    Times are shown in your zone, and read in the host's; they are what journalctl takes. The supervisor's log has no
    times in it: `--since` finds its place to five seconds. Colours are kept on a terminal only.

        inv logs --host spark
        inv logs --host spark --follow
        inv logs --host spark --since '10 min ago' --grep 'error|warning'
        inv logs --group home --follow   # each line with its host's name
    """
    from ops import logs

    asked = logs.question(lines, since, grep, follow=follow)
    return logs.show(where.names(), asked, ask_sudo=where.ask_sudo, as_json=out.json)


@command(help={"number": "so many of those that are over (default: 20)"})
def jobs(_: Context, number: str = "20", *, where: Fleet, out: Output) -> int:
    """List ComfyUI's recent jobs, how long they took and why they failed, and those that run and wait.

    They are what ComfyUI remembers: none from before its last start. `--json` has whole ids and messages.

        inv jobs --host spark
        inv jobs --host spark --number 100 --json
        inv jobs --group home
    """
    from ops import jobs

    return jobs.show(jobs.recent(where.names(), number, ask_sudo=where.ask_sudo), as_json=out.json)


@command(
    help={
        "apply": "settings to apply, commas between",
        "undo": "put back what was there before: these settings, or all",
        "force": "with --undo: also what somebody changed since",
    },
    optional=["undo"],
)
def tune(
    _: Context, apply: str = "", undo: str = "", force: bool = False, *, where: Fleet, how: Agreed, out: Output
) -> int:
    """List settings of the machine that may help: what each is now and would be, what it does and costs.

    Nothing is set that is not named. What is set is recorded on the host before, with what was there, stays over a
    boot, and is put back by `--undo`; what somebody changed since is told, and left. Needs root and systemd.
    How: docs/how-to/tune-a-host.md

        inv tune --host spark
        inv tune --host spark --apply swappiness,cpu-governor --dry-run
        inv tune --host spark --undo                  # all of them
        inv tune --host spark --undo swappiness
    """
    from ops import tuning

    return tuning.run(where.names(), apply, undo, options(where, how, force=force), as_json=out.json)


@command(
    positional=["action"],
    help={
        "action": "on, off, status or limit",
        "percent": "of a GPU's threads that a process may use, with on and limit",
        "memory": "of a GPU that a process may take, with on and limit: GPU=SIZE, as 0=8G or 0=8G,1=500M",
    },
)
def mps(_: Context, action: str, percent: str = "", memory: str = "", *, where: Fleet, how: Change, out: Output) -> int:
    """Have ComfyUI compute through NVIDIA's Multi-Process Service: on, off, status or limit.

    The control daemon becomes a unit of its own, as the service's user. Around a change ComfyUI is stopped when its
    jobs are done, and started again; should it not come back, MPS is off again. `limit` takes the place of the limits
    before; `--percent 100` lifts all. `status` lists servers and clients; 1 when MPS is on and not well. `off --force`
    also removes what somebody edited since.
    How: docs/how-to/share-the-gpu-by-mps.md

        inv mps status --host spark
        inv mps on --host spark --percent 60 --memory 0=8G
        inv mps limit --host spark --percent 30
        inv mps off --host spark
    """
    from ops import mps

    return mps.run(action, where.names(), percent, memory, options(where, how), as_json=out.json)


@command(
    positional=["action", "name"],
    help={
        "action": "set or remove",
        "name": "the variable that ComfyUI gets, such as HF_TOKEN",
        "command": "a program that prints the secret, as of a password manager",
        "keyring": "read it from the system's keyring (keyring set hearth-secret NAME)",
    },
)
def secret(
    _: Context,
    action: str,
    name: str,
    command: str = "",
    keyring: bool = False,
    *,
    where: Fleet,
    out: Output,
) -> int:
    """Keep a secret on a host for ComfyUI alone, or forget it: set or remove.

    It is asked for here, or piped in, and never an argument. There it is encrypted where systemd can, else a file that
    root alone may read; ComfyUI gets it as a variable once the host's `secrets` name it, and nobody else does: it is in
    no unit, release, log or history. How: docs/how-to/secrets.md

        inv secret set HF_TOKEN --host spark
        inv secret set HF_TOKEN --host spark --command 'op read op://home/hf/token'
        inv secret remove HF_TOKEN --host spark
    """
    from ops import secret

    return secret.run(
        action,
        name,
        where.names(),
        command=command,
        keyring=keyring,
        ask_sudo=where.ask_sudo,
        as_json=out.json,
    )


@command()
def secrets(_: Context, *, where: Fleet, out: Output) -> int:
    """List the secrets that hosts keep for ComfyUI, and how; never their values.

    A deploy is refused where one is missing that the host's `secrets` name.

        inv secrets --host spark
    """
    from ops import secret

    return secret.listed(where.names(), ask_sudo=where.ask_sudo, as_json=out.json)


@command(help={"apply": "keep the GPU to the group gpu-users", "undo": "put back what was there before"})
def gpu_access(_: Context, apply: bool = False, undo: bool = False, *, where: Fleet, how: Change, out: Output) -> int:
    """Check who may use the GPU: devices, groups, udev rules; 1 when somebody who must may not.

    Who must: the service's user and its members. Mostly everybody may, and there is nothing to do. `--apply` keeps the
    GPU to a group gpu-users with these: by the driver's own option, which makes the nodes, and a udev rule for render
    nodes. Around it ComfyUI is started anew. How: docs/how-to/share-a-host.md

        inv gpu-access --host spark
        inv gpu-access --host spark --apply --dry-run
        inv gpu-access --host spark --undo
    """
    from ops import access

    return access.run(where.names(), options(where, how), apply=apply, undo=undo, as_json=out.json)
