"""A file of lines that outlives its process: each is one write at its end, and what is rewritten appears whole.

Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = Lines(Path(directory) / "rows.txt")
    ...     file.begin([b"one\\n"])
    ...     file.append(b"two\\n")
    ...     file.close()
    ...     file.read()
    [b'one\\n', b'two\\n']
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tnt_func.errors import CheckpointError, UsageError

try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None

LOCK = ".tnt_func.lock"
OF_RANKS = (
    "Of several ranks let one write, rank_zero(recorder(...)), or give each a place of its own: "
    'jsonl_writer(f"rank-{world.rank}.jsonl").'
)


class Lines:
    """Such a file.

    Args:
        path: of the file.
        head: what its first line begins with.
    """

    def __init__(self, path: Path, head: bytes = b""):
        self.path, self._head = path, head
        self._file: int | None = None

    def read(self) -> list[bytes]:
        """The whole lines that are there; a torn last one, of a killed process, is none.

        Raises:
            UsageError: it begins otherwise.
            CheckpointError: it cannot be read.
        """
        with writable(self.path):
            if not self.path.exists():
                return []
            lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not (lines[0].startswith(self._head) or self._head.startswith(lines[0])):
            raise self.refused(1, lines[0])
        return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines

    def refused(self, number: int, line: bytes) -> UsageError:
        """What to raise of a line that no writer wrote."""
        return UsageError(
            f"line {number} of {self.path} is {line[:80]!r}, which is no row of a run as it is written there; the file "
            "is left as it is. Write to another path."
        )

    def begin(self, lines: Iterable[bytes]) -> None:
        """Let the file hold these lines, and be ready for more.

        Raises:
            UsageError: another process has it open for more.
            CheckpointError: it cannot be written.
        """
        self.close()
        content = b"".join(lines)
        with writable(self.path):
            self._file = owned(self.path, self.path, OF_RANKS)
            if os.fstat(self._file).st_size != len(content) or os.pread(self._file, len(content), 0) != content:
                overwrite(self.path, content)
                self.close()
                self._file = owned(self.path, self.path, OF_RANKS)

    def append(self, line: bytes) -> None:
        """Add a line.

        Raises:
            CheckpointError: it could not be written; nothing of it is left.
        """
        assert self._file is not None
        append(self._file, line, self.path)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Hold:
    """A place that one process at a time writes to: a file beside it says so while it does, and is locked.

    Args:
        place: a file or a directory.
        lock: that file.
        instead: what to write instead, where another process has it.
    """

    def __init__(self, place: Path, lock: Path, instead: str = OF_RANKS):
        self._place, self._path, self._instead = place, lock, instead
        self._file: int | None = None

    def take(self) -> None:
        """Have it until `leave`, or until the process ends; its directory is made.

        Raises:
            UsageError: another process has it.
            CheckpointError: nothing can be written there.
        """
        if self._file is None:
            with writable(self._place):
                self._file = owned(self._path, self._place, self._instead)

    def leave(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Say of an error of the system's what could not be written, and what to write instead.

    Raises:
        CheckpointError: instead of an OSError.

    Example:
        >>> with writable(Path("runs")):
        ...     raise IsADirectoryError(errno.EISDIR, "Is a directory")
        Traceback (most recent call last):
        tnt_func.errors.CheckpointError: runs cannot be written to: Is a directory. Give ...
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written to: {error.strerror or error}. Give a path that can be: of a file where a file "
            "is written, of a directory where a directory is."
        ) from error


def owned(path: Path, place: Path, instead: str) -> int:
    """Open a file to add to, which no other process may have open so until this one closes it, or ends.

    Args:
        path: of the file; its directory is made.
        place: what belongs to whom it belongs to.
        instead: what to write instead, where another process has it.

    Raises:
        UsageError: another process has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            # Of the process alone: a worker that outlives a killed run does not keep the file from the next one.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(file)
                raise UsageError(
                    f"{place} is being written by another process; it belongs to one run at a time. {instead}"
                ) from error
            # Some file systems have no locks.
        if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
            return file
        os.close(file)  # Another process has put a new file in its place meanwhile.


def append(file: int, content: bytes, path: Path) -> None:
    """Add to an open file in one write.

    Raises:
        CheckpointError: it could not be written; nothing of it is left.
    """
    try:
        written, reason = os.write(file, content), "the disk is full"
    except OSError as error:
        written, reason = 0, error
    if written != len(content):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise CheckpointError(
            f"a row of {path} could not be written: {reason}. Make room and resume the run, or train without this "
            "writer."
        )


def overwrite(path: Path, content: bytes) -> None:
    """Put a file in the place of another at once: whoever is killed meanwhile leaves the one or the other."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
