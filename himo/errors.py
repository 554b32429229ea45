"""Messages for the user: himo's one exception, notes, and text that is safe on a terminal."""

import sys


class HimoError(ValueError):
    """A mistake of the user or a bad file, as one printable line.

    The line names the argument or file, the expected value and the value given. The command prints
    it after `himo: error: ` and exits with status 2. Any other exception is a bug in himo.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text as one line: a name from a file may hold line breaks or terminal escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


MAX_QUOTED = 80  # characters of a value from outside that a message holds
_MAX_VALUES = 4  # of a list or an object in it


def quoted(value: object) -> str:
    """An untrusted value for a message: at most 80 characters, in bounded time.

    Text, bytes and numbers are written as in Python and cut to that length; so is a list or an
    object of up to 4 of them. Of any other value only the type is written: a few bytes of a file
    can describe a tuple that holds itself twice, a hundred times over.
    """
    if isinstance(value, list | tuple) and len(value) <= _MAX_VALUES:
        return shortened(f"[{', '.join(map(_quoted_alone, value))}]")
    if isinstance(value, dict) and len(value) <= _MAX_VALUES:
        items = (f"{_quoted_alone(key)}: {_quoted_alone(item)}" for key, item in value.items())
        return shortened(f"{{{', '.join(items)}}}")
    return _quoted_alone(value)


def shortened(text: str, limit: int = MAX_QUOTED) -> str:
    """The text cut to `limit` characters, for names and causes, which need no quotes."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def note(message: str) -> None:
    """Prints something to stderr that a user should know and need not fix."""
    print(f"himo: note: {printable(message)}", file=sys.stderr)


def _quoted_alone(value: object) -> str:
    if isinstance(value, str | bytes):
        start = repr(value[:MAX_QUOTED])
        whole = len(value) <= MAX_QUOTED and len(start) <= MAX_QUOTED
        return start if whole else start[: MAX_QUOTED - 3] + "..."
    if isinstance(value, bool | float | None):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 256 else f"an integer of {value.bit_length()} bits"
    return f"a {type(value).__name__}"
