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
from collections.abc import Iterable
from pathlib import Path

from tnt_func.errors import CheckpointError, UsageError

try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None


class Lines:
    """Such a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    def read(self) -> list[bytes]:
        """The whole lines that are there; a torn last one, of a killed process, is none."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines

    def begin(self, lines: Iterable[bytes]) -> None:
        """Let the file hold these lines, and be ready for more.

        Raises:
            UsageError: another process has it open for more.
        """
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = b"".join(lines)
        self._file = owned(self.path)
        if os.fstat(self._file).st_size != len(content) or os.pread(self._file, len(content), 0) != content:
            overwrite(self.path, content)
            self.close()
            self._file = owned(self.path)

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


def owned(path: Path) -> int:
    """Open a file to add to, which no other process may have open so until this one closes it, or ends.

    Raises:
        UsageError: another process has.
    """
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
                    f"{path} is being written by another process; a file belongs to one run at a time. Of several "
                    "ranks let one write it, rank_zero(recorder(...)), or give each a file of its own, "
                    'jsonl_writer(f"rank-{world.rank}.jsonl").'
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
