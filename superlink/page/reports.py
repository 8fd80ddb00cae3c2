"""report.html of every run that has ended: written without being asked for, and again when the run
has been evaluated.
"""

import time
from pathlib import Path
from threading import Lock

from superlink import run_files
from superlink.page.document import REPORT, write_standalone
from superlink.page.runs import changed, folders, taken_over

EVERY_S = 5


class Reports:
    """Those below ``results``, which must be writable."""

    def __init__(self, results: Path) -> None:
        self._results, self._one_at_a_time = results, Lock()
        self._tried: dict[str, int] = {}  # and for which state of the run's files

    def keep(self) -> None:
        """Write what is due, again and again."""
        while True:
            self.write()
            time.sleep(EVERY_S)

    def write(self) -> None:
        """What is due now; a line for each that cannot be written, once for a state of the run."""
        with self._one_at_a_time:
            for folder in folders(self._results):
                now = changed(folder)
                if now in (changed(folder, REPORT), self._tried.get(folder.name)):
                    continue
                if not self._ended(folder.name):
                    continue
                self._tried[folder.name] = now
                try:
                    write_standalone(self._results, folder.name)
                except Exception as err:  # its words may be the run's
                    why = getattr(err, "strerror", None) or type(err).__name__
                    print(f"page: cannot write {folder / REPORT}: {why}", flush=True)

    def _ended(self, run_id: str) -> bool:
        """As far as run.json, or that of a run which goes on from there, says."""
        status = run_files.facts(self._results, run_id).get("status")
        return status in ("completed", "failed") or run_id in taken_over(self._results)
