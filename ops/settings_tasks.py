"""Settings of hosts: the system's, MPS, access to the GPU, and secrets."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Change, Confirmation, Output
from deploy.flags import Fleet, options


@command(
    help={
        "apply": "settings to apply, comma-separated",
        "undo": "restore the previous values of these settings, or of all",
        "force": "with --undo: also restore settings that were changed since",
    },
    optional=["undo"],
)
def tune(
    _: Context, apply: str = "", undo: str = "", force: bool = False, *, where: Fleet, how: Confirmation, out: Output
) -> int:
    """List recommended system settings: current and recommended value, benefit, and cost.

    Applies only the settings that `--apply` names. Records the previous values on the host first, keeps the settings
    across reboots, and restores the values with `--undo`, except where somebody changed them since. Needs root and
    systemd. How: docs/how-to/tune-a-host.md

        inv tune --host spark
        inv tune --host spark --apply swappiness,cpu-governor --dry-run
        inv tune --host spark --undo                  # or only: --undo swappiness
    """
    from ops import tuning

    return tuning.run(where.names(), apply, undo, options(where, how, force=force), as_json=out.json)


@command(
    positional=["action"],
    help={
        "action": "on, off, status or limit",
        "percent": "percentage of a GPU's threads that a process may use, with on and limit",
        "memory": "memory of a GPU that a process may use, with on and limit: GPU=SIZE, such as 0=8G or 0=8G,1=500M",
    },
)
def mps(_: Context, action: str, percent: str = "", memory: str = "", *, where: Fleet, how: Change, out: Output) -> int:
    """Run ComfyUI through NVIDIA's Multi-Process Service: on, off, status or limit. Exit code 1 if MPS has a problem.

    The control daemon is a separate unit that runs as the service's user. A change waits for running jobs and restarts
    ComfyUI; if ComfyUI does not come back, MPS is turned off again. `limit` replaces the previous limits, and
    `--percent 100` removes all. `status` lists servers and clients. `off --force` also removes edited files.
    How: docs/how-to/share-the-gpu-by-mps.md

        inv mps status --host spark
        inv mps on --host spark --percent 60 --memory 0=8G
        inv mps off --host spark
    """
    from ops import mps

    return mps.run(action, where.names(), percent, memory, options(where, how), as_json=out.json)


@command(
    positional=["action", "name"],
    help={
        "action": "set or remove",
        "name": "the environment variable for ComfyUI, such as HF_TOKEN",
        "command": "a program that prints the secret, such as a password manager",
        "keyring": "read it from the system's keyring (keyring set hearth-secret NAME)",
    },
)
def secret(
    _: Context, action: str, name: str, command: str = "", keyring: bool = False, *, where: Fleet, out: Output
) -> None:
    """Set or remove a secret on a host, for ComfyUI only.

    The secret is typed at the terminal or piped in, never an argument. The host encrypts it if its systemd can,
    otherwise stores it in a file that only root can read. ComfyUI gets it as an environment variable if the host's
    `secrets` name it; it is in no unit, release, log or history. How: docs/how-to/secrets.md

        inv secret set HF_TOKEN --host spark --command 'op read op://home/hf/token'
        inv secret remove HF_TOKEN --host spark
    """
    from ops import secret

    found = secret.run(action, name, where.names(), command=command, keyring=keyring, ask_sudo=where.ask_sudo)
    console.show(found, secret.rows(found), as_json=out.json)


@command()
def secrets(_: Context, *, where: Fleet, out: Output) -> None:
    """List the names of the secrets on a host, and how each is stored; never their values.

    A deploy is refused if a secret in the host's `secrets` is missing.

        inv secrets --host spark
    """
    from ops import secret

    found = secret.listed(where.names(), ask_sudo=where.ask_sudo)
    console.show(found, secret.rows(found), as_json=out.json)


@command(help={"apply": "restrict the GPU to the group gpu-users", "undo": "restore the previous access"})
def gpu_access(_: Context, apply: bool = False, undo: bool = False, *, where: Fleet, how: Change, out: Output) -> int:
    """Check who can use the GPU: devices, groups, udev rules. Exit code 1 if a required user cannot.

    Required are the service's user and its members. Most hosts let everybody use the GPU, and need no change. `--apply`
    restricts it to a group gpu-users with the required users, by the driver's options and a udev rule for render nodes,
    and restarts ComfyUI. How: docs/how-to/share-a-host.md

        inv gpu-access --host spark
        inv gpu-access --host spark --apply --dry-run
        inv gpu-access --host spark --undo
    """
    from ops import access

    return access.run(where.names(), options(where, how), apply=apply, undo=undo, as_json=out.json)
