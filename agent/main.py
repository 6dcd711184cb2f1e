"""Hearth on the host: reads facts, applies plans, and keeps ComfyUI running where there is no systemd.

The client sends this package as one file; it needs nothing but Python 3.10. Every verb reads one JSON object from
standard input (`site`, and what the verb takes) and answers in JSON lines. What is under way lies in `<prefix>/state`:

    agent.pyz          that file, as it submitted the plan under way
    pending.json       the plan under way; gone when it has ended
    cut-over.json      the phase of its cut-over (`cutover`), and database-<run>/ the database as it was before,
                       deleted with the run's end unless a revert could not restore it
    reserve            room for the records that end a run, given up when the disk is full
    trial/             scratch data of a release on trial
    runs/<run>.jsonl   what happened, line by line; `follow` reads it
    history.jsonl      how every run ended
    adopted.jsonl      what was taken over from another installation, and its units in adopted/
    paused.json        who paused the service, and when; gone when it is resumed
    manager.json       who runs the service: systemd-system, systemd-user or process (Hearth's own supervisor)
    comfyui.log        what a supervised ComfyUI said, and comfyui.times how long that was when
    settings.jsonl     what was changed outside the prefix on request, each with what was there before
    lock               held (flock) by the process that applies

A killed process, a closed connection or a power cut leaves these, and the next `apply` goes on from them: under
systemd the apply unit is restarted, also at boot.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from agent.files import Fault, Json, os_fault, read
from agent.layout import Layout
from agent.processes import confine


def say(value: object) -> None:
    """One line of JSON to whoever asked."""
    print(json.dumps(value, default=vars), flush=True)  # vars: the fields of a dataclass


def main(argv: list[str]) -> int:
    """Do what the verb says; 0, or 3 after a Fault, which is then the last line."""
    verb = argv[0]
    if verb == "confine":  # its environment is the command's
        from agent.serve import confine as confinement

        confinement.main(json.loads(argv[1]), argv[3:])
    confine()
    try:
        if verb in ("apply", "supervise", "watch", "free"):  # started by a unit or detached: the layout is a file
            _stay(verb, Layout(read(Path(argv[1]))))
        else:
            line = sys.stdin.buffer.readline()
            if argv[1:] and hashlib.sha256(line).hexdigest() != argv[1]:  # it came by a pipe that others may write into
                raise Fault("usage", "the request was replaced on its way", "", "look what else this login runs")
            request = json.loads(line)
            _answer(verb, Layout(request["site"]), request)
    except Fault as fault:
        say({"fault": fault.report})
        return 3
    except BrokenPipeError:
        return 3
    except OSError as error:  # a disk that is full, read-only or broken
        say({"fault": os_fault(error, f"the agent could not {verb}").report})
        return UNWRITABLE
    return 0


UNWRITABLE = 4
"""The apply unit is not started again at once after this exit code (RestartPreventExitStatus= in `systemd`)."""


def _stay(verb: str, layout: Layout) -> None:
    """Verbs that units run. All that they need is imported now: their file may be replaced meanwhile."""
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


def _answer(verb: str, layout: Layout, request: Json) -> None:
    """Verbs that are asked, each importing what it needs: nothing is compiled in advance there."""
    if verb == "facts":
        from agent.look.facts import PATIENT, answering, facts
        from agent.look.gpu import gpus
        from agent.serve.managers import ours

        answering(layout, request, PATIENT)
        say(facts(layout, request, ours(layout, gpus())))
    elif verb == "status":
        from agent.look.status import status

        say(status(layout, request))
    elif verb == "probe":
        from agent.look.probe import probe

        say(probe(layout, request))
    elif verb == "gpu":
        from agent.look.samples import samples

        for sample in samples(layout, request["every"], request["seconds"]):
            say(sample)
    elif verb == "free-memory":
        from agent.change.memory import free

        say(free(layout, request["wait"]))
    elif verb == "contents":
        from agent.parts import contents

        say({name: contents(layout.parts / name) for name in request["parts"]})
    elif verb == "receive":
        from agent.change.runs import receive

        say(receive(layout, request["sha256"], request["size"], request["offset"]))
    elif verb == "submit":
        from agent.change.runs import submit

        say(submit(layout, request["plan"]))
    elif verb == "follow":
        from agent.change.runs import follow

        for event in follow(layout, request["run"]):
            say(event)
    elif verb == "secret":
        from agent.serve.secret import keep

        say(keep(layout, request))
    elif verb == "settings":
        from agent.change.settings import look

        say(look(layout, request))
    elif verb == "access":
        from agent.change.settings import access

        say(access(layout, request))
    elif verb == "mps":
        from agent.look.mps import mps

        say(mps(layout))
    elif verb == "history":
        from agent.journal import history

        say(history(layout))
    elif verb == "flags":
        from agent.files import read_text

        release = layout.release()
        say(
            {
                "release": layout.manifest(release),
                "text": read_text(layout.releases / release / "app/comfy/cli_args.py"),
            }
        )
    elif verb == "logs":
        from agent.look.logs import logs

        for line in logs(layout, request):
            say(line)
    elif verb == "jobs":
        from agent.look.jobs import jobs

        say(jobs(layout, request["count"]))
    elif verb == "survey":
        from agent.look.survey import survey

        say(survey(layout, request["path"]))
    else:
        raise Fault("step", f"the agent has no verb {verb!r}")
