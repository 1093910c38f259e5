"""The errors a user can meet and mend. Each carries the exit code the command line ends with.

Codes: 0 done, 1 a check asked for failed or an internal error, 2 bad command line, recipe or setting, 3 does not fit or
resources ran out, 4 bad data or checkpoint, 130/143 interrupted and resumable.
"""

import errno


class AlloyError(Exception):
    """Base of every error whose message tells the user what to change."""

    exit_code = 1


class RecipeError(AlloyError):
    """A recipe, setting or command line that cannot be run as written."""

    exit_code = 2


class RequestError(AlloyError):
    """A generation request that asks for something impossible."""

    exit_code = 2


class ResourceError(AlloyError):
    """Memory, disk or a device is missing or full."""

    exit_code = 3


class CheckpointError(AlloyError):
    """A checkpoint folder that is missing, damaged or of another shape."""

    exit_code = 4


class DataError(AlloyError):
    """Input data that cannot be read or is empty."""

    exit_code = 4


class InterruptedRun(AlloyError):  # noqa: N818  the word is what happened, not a fault
    """The run stopped on SIGINT (130) or SIGTERM (143) after saving; it can be resumed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# what a system call refused, by its number, and the mend
_MENDS = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "a file stands where a folder is wanted; choose another path",
    errno.ENOTDIR: "a file stands where a folder is wanted; choose another path",
    errno.EISDIR: "a folder stands where a file is wanted; choose another path",
    errno.EACCES: "change the permissions or choose another path",
    errno.EPERM: "change the permissions or choose another path",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter path",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def from_os_error(error: OSError) -> AlloyError | None:
    """A path that the system refuses, or a full disk, in the user's terms; None for every other error."""
    if error.errno in _FULL:
        where = f"{error.filename}: " if error.filename else ""
        return ResourceError(
            f"{where}the disk is full or the quota used up ({error.strerror}). Free space and run again."
        )
    if error.filename is None or error.errno not in _MENDS:
        return None
    # of a rename the target is what the user named
    path = error.filename if error.filename2 is None else error.filename2
    return RecipeError(f"{path}: {error.strerror}; {_MENDS[error.errno]}.")
