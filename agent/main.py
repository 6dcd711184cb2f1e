"""Hearth's agent: reads facts, applies plans, exports metrics, and supervises ComfyUI on hosts without systemd.

The client sends this package as one file; it needs only Python 3.10. Every verb reads one JSON object from
standard input (`site` and the verb's own values) and prints JSON lines. State is stored in `<prefix>/state`:

    agents/<hash>/     this package, unpacked (`install`); `agent` links to the one that accepted the last plan
    pending.json       the plan in progress; deleted at its end
    cut-over.json      the phase of its cut-over (`cutover`); database-<run>/ is the previous database, deleted at the
                       run's end unless a revert failed to restore it
    databases/         the databases of releases from before a newer one migrated them, for a rollback
    reserve            reserved disk space for a run's final records, freed when the disk is full
    trial/             scratch data of a release's trial
    runs/<run>.jsonl   events of a run, one per line; read by `follow`
    history.jsonl      results of all runs
    adopted.jsonl      changes of an adoption; its units are in adopted/
    paused.json        who paused the service, and when; deleted on resume
    manager.json       the service's manager: systemd-system, systemd-user or process (Hearth's supervisor)
    comfyui.log        output of a supervised ComfyUI; comfyui.times records its size over time
    settings.jsonl     requested changes outside the prefix, each with the previous value
    exporter           link to the agent that exports metrics; exporter.json contains its settings
    lock               held (flock) by the applying process

These files survive a kill, a lost connection or a power loss, and the next `apply` resumes from them. Under systemd
the apply unit is restarted, also at boot.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from agent.files import AgentError, Json, os_error, read, read_text
from agent.install import keep
from agent.layout import Layout
from agent.processes import confine


def say(value: object) -> None:
    """Print a value as one line of JSON for the client."""
    print(json.dumps(value, default=vars), flush=True)  # vars: the fields of a dataclass


def main(argv: list[str]) -> int:
    """Run a verb. Return 0; 3 after an AgentError, printed as the last line; UNWRITABLE after an OSError."""
    verb = argv[0]
    if verb == "confine":  # keeps its environment, which is the command's
        from agent.serve import confine as confinement

        confinement.main(json.loads(argv[1]), argv[3:])
    if verb == "metrics":  # needs its unit's RUNTIME_DIRECTORY
        from agent.metrics.server import serve

        serve(Path(argv[1]))
    confine()
    try:
        if verb in ("apply", "supervise", "watch", "free"):  # started by a unit or detached: the layout is a file
            _stay(verb, Layout(read(Path(argv[1]))))
        else:
            line = sys.stdin.buffer.readline()
            # With sudo, the request passes a pipe that the login's other processes can write to.
            if argv[1:] and hashlib.sha256(line).hexdigest() != argv[1]:
                raise AgentError(
                    "usage",
                    "the request was replaced during its transfer",
                    "",
                    "check which other programs this login runs",
                )
            request = json.loads(line)
            layout = Layout(request["site"])
            _answer(verb, layout, request)
            keep(layout)
    except AgentError as error:
        say({"error": error.report})
        return 3
    except BrokenPipeError:
        return 3
    except OSError as error:  # the disk is full, read-only or broken
        say({"error": os_error(error, f"the agent could not {verb}").report})
        return UNWRITABLE
    return 0


UNWRITABLE = 4
"""Exit code after which systemd does not restart the apply unit (RestartPreventExitStatus= in `systemd`)."""


def _stay(verb: str, layout: Layout) -> None:
    """Run a verb of a unit. Import everything first: the agent may be pruned while it runs."""
    from agent.change import runs
    from agent.serve import health, supervisor, watch

    if verb == "apply":
        runs.apply(layout)
    elif verb == "supervise":
        supervisor.supervise(layout)
    elif verb == "watch":
        watch.watch(layout)
    else:
        print(health.free_if_idle(layout), flush=True)


VERBS: dict[str, tuple[str, str, tuple[str, ...] | str]] = {
    "status": ("agent.look.status", "status", "facts.Questions"),
    "probe": ("agent.look.probe", "probe", "facts.Questions"),
    "gpu": ("agent.look.samples", "samples", ("every", "seconds")),
    "mps": ("agent.look.mps", "mps", ()),
    "logs": ("agent.look.logs", "logs", "requests.LogQuery"),
    "jobs": ("agent.look.jobs", "jobs", ("count",)),
    "node-types": ("agent.look.node_types", "node_types", ("workflows",)),
    "survey": ("agent.look.survey", "survey", ("path",)),
    "history": ("agent.journal", "history", ()),
    "receive": ("agent.change.runs", "receive", ("sha256", "size", "offset")),
    "submit": ("agent.change.runs", "submit", ("plan",)),
    "follow": ("agent.change.runs", "follow", ("run",)),
    "free-memory": ("agent.change.memory", "free", ("wait",)),
    "settings": ("agent.change.settings", "look", "requests.SettingsQuery"),
    "access": ("agent.look.access", "access", ("users",)),
    "sanitise": ("agent.change.sanitise", "sanitise_outputs", ("paths", "write", "replace")),
    "secret": ("agent.serve.secret", "keep", "requests.SecretChange"),
    "gateway": ("agent.look.gateway", "gateway", ("port", "names", "certificate")),
    "gateway-audit": ("agent.look.gateway", "audit", ("lines", "since")),
    "gateway-server": ("agent.serve.balance", "set_state", ("host", "state", "seconds")),
    "gateway-secrets": ("agent.serve.gateway", "gateway", "requests.GatewaySecret"),
}
"""Module and function of each client verb, and its arguments: keys of the request, or the request as a dataclass of
`agent.schema`. A verb imports only its own modules, which keeps the others fast."""


def _answer(verb: str, layout: Layout, request: Json) -> None:
    """Run a client verb; print its result as one line of JSON, or one per value of an iterator. Raises AgentError."""
    if verb in OWN:
        say(OWN[verb](layout, request))
    elif verb in VERBS:
        module, name, asked = VERBS[verb]
        answer = getattr(import_module(module), name)(layout, *_given(asked, request))
        for value in answer if isinstance(answer, Iterator) else [answer]:
            say(value)
    else:
        raise AgentError("step", f"the agent does not support {verb!r}")


def _given(asked: tuple[str, ...] | str, request: Json) -> list[Any]:
    """The arguments that `VERBS` declares. Raises ValueError."""
    if isinstance(asked, tuple):
        return [request[key] for key in asked]
    from agent.schema.decode import decode

    module, _, kind = asked.partition(".")
    return [decode(getattr(import_module(f"agent.schema.{module}"), kind), request, lenient=True)]


def _facts(layout: Layout, request: Json) -> object:
    from agent.look.facts import PATIENT, check_folders_respond, facts
    from agent.look.gpu import gpus
    from agent.schema.decode import decode
    from agent.schema.facts import Questions
    from agent.serve.managers import ours

    ask = decode(Questions, request, lenient=True)
    check_folders_respond(layout, ask, PATIENT)
    return facts(layout, ask, ours(layout, gpus()))


def _contents(layout: Layout, request: Json) -> Json:
    from agent.parts import contents

    return {name: contents(layout.parts / name) for name in request["parts"]}


def _flags(layout: Layout, request: Json) -> object:
    from agent.schema.live import CommandLine

    if not (found := layout.manifest(layout.release())).id:
        return CommandLine()
    words = found.argv[found.argv.index(f"{found.code}/main.py") + 1 :]
    text = read_text(layout.releases / found.id / "app/comfy/cli_args.py")
    return CommandLine(found.id, found.version, words, text)


OWN: dict[str, Callable[[Layout, Json], object]] = {"facts": _facts, "contents": _contents, "flags": _flags}
