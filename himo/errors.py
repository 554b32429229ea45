"""The one exception of himo that a user is meant to read, and text fit for a terminal."""


class HimoError(ValueError):
    """A mistake of the user or a bad file, as one line that is ready to print.

    The line names the thing, what was expected and what came. The command line prints it after
    `himo: error: ` and exits with status 2; anything else that is raised is a fault of himo.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """One line: a name or a key read from a file may hold line breaks or terminal escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
