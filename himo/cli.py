"""The `himo` command: one subcommand for each thing a user does."""

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from himo.errors import HimoError
from himo.printing import printable_output

# Subcommand: (module with add_arguments and run, help). A module is imported when its subcommand
# runs: --help and `himo synth` should not wait for torch.
_COMMANDS = {
    "synth": ("himo.synth", "render a synthetic set of captioned scenes"),
    "train": ("himo.train", "train or fine-tune on captioned images"),
    "eval": ("himo.evaluate", "retrieval and HiMo@K of a checkpoint"),
    "datasets": ("himo.evaluate.datasets", "the data sets that have a name, and where they are"),
    "doctor": ("himo.tools.doctor", "what is installed, and what would stop a training run"),
    "pack": ("himo.tools.pack", "training data as shards of small images, which read faster"),
    "plan": ("himo.tools.plan", "whether a training step fits the memory of a GPU"),
    "bench": ("himo.tools.bench", "how fast the training data are read, and the kernels"),
    "ablate": ("himo.ablate", "the paper's tables 4 to 6 on any data, as runs and one page"),
    "report": ("himo.report", "one HTML page of one or several runs"),
    "explain": ("himo.report.explain", "similarity of images to their growing captions"),
    "context": ("himo.report.context", "what HiDe keeps of one caption in two batches"),
    "encode": ("himo.apply.encode", "features of images, in a file"),
    "search": ("himo.apply.search", "the images that fit a text best"),
    "classify": ("himo.apply.classify", "the label that fits an image best"),
    "convert": ("himo.checkpoint.conversion", "a checkpoint in another format"),
}
# Modules of torch and of the extra `himo`; `pip install .` without the extra installs torch alone.
_NEEDED = ("PIL", "ftfy", "jinja2", "numpy", "regex", "safetensors", "torch", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status: 2 after a HimoError, 1 after a traceback.

    Output is escaped, whatever names and captions hold.
    """
    # Read when torch is imported. Threads that spin while they wait make steps up to ten times
    # slower on busy cores: a step of the demo took 5.8 s instead of 0.61 s with two threads on two
    # cores and one busy process. On idle cores, not spinning costs 7 %.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    with printable_output():
        return _status(given)


def entry() -> NoReturn:
    """Runs the command and ends the process."""
    status = main()
    parallel = sys.modules.get("himo.parallel")
    if parallel is not None and parallel.joined:
        parallel.end_process(status)
    sys.exit(status)


def _status(given: list[str]) -> int:
    try:
        status = _run(given)
        sys.stdout.flush()  # here, so that a closed pipe is handled below
    except BrokenPipeError:  # the reader has closed the pipe, as in `himo eval ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141  # the status of a program that SIGPIPE ends
    except (HimoError, OSError) as error:  # an OSError names its file, disk or device
        print(f"himo: error: {HimoError(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("himo: interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()  # here, where the output is escaped
        return 1
    return status


def _run(given: list[str]) -> int:
    parser = _Parser(prog="himo", description="CLIP with semantic hierarchy and monotonicity.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name in given[:1]:
            _check_extra()
            importlib.import_module(module).add_arguments(command)
    parsed, unknown = parser.parse_known_args(given)
    if unknown:
        _refuse(unknown, parser, parsed)
    module, _ = _COMMANDS[parsed.command]
    status: int = importlib.import_module(module).run(parsed)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and to which --data is never --dataset-type."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise HimoError(f"{message}; `{self.prog} --help` lists what it takes")


def _refuse(unknown: list[str], parser: argparse.ArgumentParser, parsed: Any) -> NoReturn:
    # Of the command, or of the one below it, as in `himo bench data`.
    while parser._subparsers is not None:
        for action in parser._subparsers._group_actions:
            parser = action.choices[getattr(parsed, action.dest)]  # type: ignore[index]
    name = unknown[0].partition("=")[0]
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    near = difflib.get_close_matches(name, flags, 1) if name[2:] else []
    nearest = f"; the nearest flag is {near[0]}" if near else ""
    parser.error(f"{parser.prog.removeprefix('himo ')}: unknown argument {name}{nearest}")


def _check_extra() -> None:
    # Before torch is imported, which warns on several lines if numpy is missing.
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        # This needs no sources: pip adds to the installed package what its extra lacks.
        install = 'the extra [himo] has it: pip install "himo-kernels[himo]"'
        raise HimoError(f"{missing[0]} is not installed; {install}")


class _Version(argparse.Action):
    """Prints the versions of himo and torch, which are imported only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the versions, and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(importlib.import_module("himo.report").versions())
        parser.exit()
