"""The lock of a run folder: two runs that write into one folder would spoil each other's files.

The lock is that of the operating system (flock, through the library filelock), so it ends with the process that holds
it, also after SIGKILL. A file system without such locks gets none: a marker file in its place would outlive a process
that is killed. Evaluating and publishing only read a run, and do not take the lock.
"""

import contextlib
import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from ddpm_hf.run import checkpoint

LOCK, HOLDER = ".lock", ".lock-holder"


class RunLock:
    """The lock of one run folder; the main process of a run holds it.

    Args:
        folder: the run folder, which exists.
    """

    def __init__(self, folder: Path):
        self.folder, self.holder = folder, folder / HOLDER
        self._lock = FileLock(str(folder / LOCK), fallback_to_soft=False)

    def take(self) -> str | None:
        """Take the lock, and return None; or return a message if another run has it.

        On a file system without locks the run goes on without one, and says so.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return f"output_dir {self.folder} must not be in use, but another run{self._who()} is training in it"
        except (OSError, NotImplementedError) as error:
            print(f"note: {self.folder} cannot be locked against a second run (do not start one there): {error}")
            return None
        with contextlib.suppress(OSError):  # it is for messages only
            checkpoint.write_text(self.holder, f"process {os.getpid()} on {platform.node()}")
        return None

    def _who(self) -> str:
        """Return " (process 12 on host)", or an empty text where that is not known."""
        with contextlib.suppress(OSError, ValueError):
            return f" ({self.holder.read_text()})"
        return ""

    def release(self) -> None:
        """Release the lock, if it is held; a folder that has nothing else then is left empty."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self.holder.unlink(missing_ok=True)
                if [path.name for path in self.folder.iterdir()] == [LOCK]:  # the run was refused before it wrote
                    (self.folder / LOCK).unlink()
            self._lock.release()
