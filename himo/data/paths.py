"""Image paths of an annotation file, confined to the image root.

An annotation file is untrusted: a path in it never leaves the image root, is never expanded or
fetched, and names nothing but a regular file. An absolute path has to be below the root too.
"""

import os
import re
import stat

from himo.data.records import RecordError
from himo.errors import HimoError, quoted
from himo.files import os_reason

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# A URL, or the drive of a Windows path. Other names may have a colon, such as File:A.jpg.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z]:|(?:data|file|blob):")
_MAX_NAME, _MAX_PATH = 255, 4095  # bytes, of Linux file systems


class MissingImage(RecordError):
    """The path is valid, but there is no such file."""


def check_form(path: str) -> None:
    """Refuses a path that by its form is not a file below the image root.

    Raises:
        RecordError: with reason "path".
    """
    has_scheme = _SCHEME.match(path)
    name = path.encode(errors="surrogatepass")
    too_long = len(name) > _MAX_PATH or max(map(len, name.split(b"/"))) > _MAX_NAME
    for wrong, problem in (
        (_CONTROL.search(path), "holds a control character"),
        (path.startswith("~"), "starts with ~, which is not expanded"),
        (has_scheme, "is a URL or has a drive letter, expected a path below the image root"),
        ("\\" in path, "has a backslash, expected / between folders"),
        (".." in path.split("/"), "goes up with .., expected one below the image root"),
        (too_long, "is too long for a file name"),
    ):
        if wrong:
            raise RecordError("path", f"image path {quoted(path)} {problem}")


class ImageRoot:
    """Finds images below one directory.

    Args:
        root: the directory of the images.
        follow_links: lets symbolic links below the root lead out of it, for a data set on several
            disks. The files linked to are then as trusted as the root.

    Raises:
        HimoError: `root` is not a directory.
    """

    def __init__(self, root: str | os.PathLike[str], follow_links: bool = False) -> None:
        if not os.path.isdir(root):
            raise HimoError(f"image root {os.fspath(root)!r}: expected an existing directory")
        self.root = os.path.realpath(root)
        self._spelled = (os.path.abspath(root), self.root)  # as absolute paths may begin
        self.follow_links = follow_links
        self._directories: dict[str, str | None] = {}

    def __reduce__(self) -> tuple[type["ImageRoot"], tuple[str, bool]]:
        return (ImageRoot, (self._spelled[0], self.follow_links))

    def relative(self, path: str) -> str:
        """`path` relative to the root; an absolute one has to be below the root.

        Raises:
            RecordError: with reason "path".
        """
        if not path.startswith("/"):
            return path
        for root in self._spelled:
            start = f"{root.rstrip('/')}/"
            if path.startswith(start):
                return path[len(start) :].lstrip("/")
        directory, name = os.path.split(path)  # perhaps below a link to the root
        real = os.path.realpath(directory)
        if not self._below(real):
            message = f"image path {quoted(path)} is absolute and not below {self.root}"
            raise RecordError("path", message)
        return os.path.relpath(os.path.join(real, name), self.root)

    def resolve(self, path: str) -> str:
        """The absolute path of the image `path`, a regular file inside the root.

        Raises:
            MissingImage: there is no such file.
            RecordError: with reason "path" (its form, or absolute and elsewhere), "outside" (a
                link leads out of the root) or "not_a_file" (a directory, a FIFO, a device, or not
                accessible).
        """
        check_form(path)
        try:
            return self._regular(path)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingImage("missing", f"image {quoted(path)} does not exist") from None
        except OSError as error:
            message = f"image {quoted(path)}: {os_reason(error)}"
            raise RecordError("not_a_file", message) from error
        except ValueError as error:  # lone surrogates, which no file name can hold
            raise RecordError("encoding", f"image path {quoted(path)}: {error}") from error

    def _regular(self, path: str) -> str:
        directory, name = os.path.split(self.relative(path))
        folder = self._directory(directory)
        if folder is None:
            raise self._outside(path)
        full = os.path.join(folder, name)
        mode = os.lstat(full).st_mode
        if stat.S_ISLNK(mode):
            full = os.path.realpath(full)
            if not self._inside(full):
                raise self._outside(path)
            mode = os.lstat(full).st_mode
        if not stat.S_ISREG(mode):
            raise RecordError("not_a_file", f"image {quoted(path)} is not a regular file")
        return full

    def _directory(self, directory: str) -> str | None:
        # Cached: a data set has many images in few directories.
        if directory not in self._directories:
            if len(self._directories) > 100_000:  # names of no directory must not fill the memory
                self._directories.clear()
            full = os.path.realpath(os.path.join(self.root, directory))
            self._directories[directory] = full if self._inside(full) else None
        return self._directories[directory]

    def _inside(self, full: str) -> bool:
        return self.follow_links or self._below(full)

    def _below(self, full: str) -> bool:
        return os.path.commonpath([self.root, full]) == self.root

    def _outside(self, path: str) -> RecordError:
        return RecordError("outside", f"image {quoted(path)} is a link that leaves {self.root}")
