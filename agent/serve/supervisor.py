"""Hearth's supervisor: runs ComfyUI on hosts without a usable systemd."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import ExitStack, suppress

from agent.journal import now
from agent.layout import Layout
from agent.locks import flock
from agent.processes import end_descendants, logged, take_orphans, wait_for
from agent.schema.manifest import ReleaseManifest
from agent.serve.health import free_if_idle
from agent.serve.supervised import Supervised
from agent.serve.watch import Watcher

GRACE = 30.0
"""Seconds between SIGINT and SIGKILL when ComfyUI is stopped."""

MOST, WITHIN = 5, 300
"""ComfyUI is not restarted after MOST exits within WITHIN seconds."""


def supervise(layout: Layout) -> None:
    """Run the current release until SIGTERM, and restart it when it ends. Its descendants are killed with it."""
    Supervisor(layout).run()


class Supervisor:
    """Runs ComfyUI. Also does what separate units do under systemd: restarts it when a node under development changes,
    and periodically frees its memory.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.manager = Supervised(layout)
        self.stopping = False
        self.child: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        self.ends: list[float] = []

    def run(self) -> None:
        """Run ComfyUI until SIGTERM or too many exits. Raises AgentError if another supervisor holds the lock."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which ComfyUI would inherit and never stop
        take_orphans()
        with flock(self.manager.lock), ExitStack() as stack:
            stack.callback(end_descendants, seconds=float("inf"))
            self.manager.note()
            while not self.stopping:
                if missing := self.layout.unmounted():
                    self.say(f"waiting for {' and '.join(missing)} to be mounted")
                    wait_for(lambda: self.stopping or not self.layout.unmounted(), 60)
                    continue
                release = self.layout.manifest(self.layout.release())
                watcher = Watcher(release.develop)
                if not self.run_once(release, watcher) and not self.may_restart(watcher):
                    break

    def stop(self, *_: object) -> None:
        """Stop ComfyUI and do not restart it (signal handler)."""
        self.stopping = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGINT)  # ComfyUI handles SIGINT, not SIGTERM

    def say(self, text: str) -> None:
        """Write a line to ComfyUI's log."""
        with suppress(OSError), self.manager.output.open("a") as output:  # a full disk must not end the supervisor
            output.write(f"{now()} {text}\n")

    def run_once(self, release: ReleaseManifest, watcher: Watcher) -> bool:
        """Run ComfyUI to its end; return whether the supervisor stopped it for an immediate restart."""
        self.manager.rotate()
        with self.manager.output.open("ab", buffering=0) as log:
            begin = log.tell()
            argv = [*release.confined, *release.argv]
            child, copying = logged(argv, release.environment, log)
            self.child = child
            self.manager.note(child.pid, self.restarts, begin)
            if self.stopping:  # SIGTERM arrived between the loop's test and the start
                child.send_signal(signal.SIGINT)
            again = self.attend(child, release, watcher)
            end_descendants(seconds=float("inf"))
            copying.join(5)
            if child.stdout:
                child.stdout.close()
        return again

    def attend(self, child: subprocess.Popen[bytes], release: ReleaseManifest, watcher: Watcher) -> bool:
        """Wait for ComfyUI to end; return whether it was stopped for an immediate restart."""
        patience, gone, anew = GRACE, False, False
        changed: list[str] = []
        period = release.free_memory or float("inf")
        due = time.monotonic() + period
        while child.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
            _reap(child.pid)
            self.manager.note_log_offset()
            if not gone and self.layout.unmounted():  # it must not write into the empty mount point
                gone = True
                child.send_signal(signal.SIGINT)
            changed += watcher.changed()
            if changed and not anew and not self.layout.pending.exists():  # not during a run, which may be proving it
                anew = True
                self.say(f"{changed[0]} changed: restarting ComfyUI")
                child.send_signal(signal.SIGINT)
            if time.monotonic() > due:
                due += period
                self.say(free_if_idle(self.layout))
            patience -= 0.5 if self.stopping or gone or anew else 0
            if patience < 0:
                child.kill()
        return gone or anew

    def may_restart(self, watcher: Watcher) -> bool:
        """Wait, then return whether to restart ComfyUI after it has ended.

        After too many exits, waits for a change of a node under development, which may have caused them.
        """
        self.ends = [each for each in self.ends if each > time.monotonic() - WITHIN] + [time.monotonic()]
        if len(self.ends) >= MOST:
            if not watcher.folders:
                return False
            while not (self.stopping or watcher.changed()):
                time.sleep(1)
            self.ends = []
        self.restarts += 1
        if not self.stopping:
            time.sleep(2)
        return True


def _reap(but: int) -> None:
    """Reap ended orphans, except the child `but`, for which another caller waits."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != but:
            os.waitpid(ended.si_pid, 0)
