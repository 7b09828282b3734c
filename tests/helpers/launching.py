"""Launches of several ranks, each done once for all tests that ask what its ranks held."""

import fcntl
import os
import sys

from forking import run_ranks


class Launches:
    """
    What launches have left in a folder. Each happens when it is first asked for, by whichever worker that is.

    Args:
        script: The module that every rank runs, with the modes and the folder as its arguments.
        ranks: How many ranks, by modes that are launched together, joined by commas.
        folder: Where they write.
    """

    def __init__(self, script, ranks, folder):
        self.script, self.ranks, self.folder = script, ranks, folder
        folder.mkdir(exist_ok=True)

    def done(self, mode):
        """Launch what has this mode, unless that is done."""
        modes = next(modes for modes in self.ranks if mode in modes.split(","))
        said = self.folder / f"{modes}.txt"
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not said.exists():
                said.write_text(self.launch(modes))
        if complaint := said.read_text():
            raise AssertionError(complaint)

    def launch(self, modes):
        try:
            run_ranks(self.ranks[modes], [sys.executable, self.script.__file__, modes, self.folder])
        except AssertionError as error:
            return str(error)
        return ""


def shared_folder(tmp_path_factory, name):
    """One folder for all of a run's workers."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
