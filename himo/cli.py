"""The `himo` command: one subcommand for each thing a user does."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from himo.errors import HimoError
from himo.printing import printable_output

# Subcommand: (module with add_arguments and run, help). Imported when it is asked for: reading
# --help or making a data set should not wait for torch.
_COMMANDS = {
    "synth": ("himo.synth", "render a synthetic set of captioned scenes"),
    "train": ("himo.train", "train or fine-tune on captioned images"),
    "eval": ("himo.evaluate", "retrieval and HiMo@K of a checkpoint"),
    "doctor": ("himo.tools.doctor", "what is installed, and what would stop a training run"),
    "plan": ("himo.tools.plan", "whether a training step fits the memory of a GPU"),
    "bench": ("himo.tools.bench", "how fast the training data are read, and the kernels"),
    "report": ("himo.report", "one HTML page of one or several runs"),
    "explain": ("himo.report.explain", "similarity of one image to a growing caption"),
    "convert": ("himo.checkpoint.conversion", "a checkpoint in another format"),
}
# Modules of torch and of the extra `himo`, of which `pip install .` without it brings torch alone.
_NEEDED = ("PIL", "ftfy", "numpy", "regex", "safetensors", "torch", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status: 2 for what HimoError says, 1 after a traceback.

    What it prints is printable, whatever names and captions hold.
    """
    # Read when torch is imported. Threads that spin while they wait make steps up to ten times
    # slower where something else runs on the cores: 5.8 s instead of 0.61 s for one of the demo,
    # with two threads on two cores beside one busy process. Alone, not spinning costs it 7 %.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    with printable_output():
        return _status(given)


def _status(given: list[str]) -> int:
    try:
        status = _run(given)
        sys.stdout.flush()  # here, where it is known what to do if nobody reads
    except HimoError as error:
        print(f"himo: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as with `himo eval ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at exit
        return 141  # the status of a program that SIGPIPE ends
    except OSError as error:  # of a file, a disk or a device: its text says which and why
        print(f"himo: error: {HimoError(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("himo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in _NEEDED:
            install = 'pip install --no-build-isolation -e ".[himo]"'
            print(f"himo: error: {error.name} is not installed: {install} has it", file=sys.stderr)
            return 2
        traceback.print_exc()  # here: what a traceback quotes must be printable too
        return 1
    return status


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="himo", description="CLIP with semantic hierarchy and monotonicity."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name in given[:1]:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(given)
    module, _ = _COMMANDS[parsed.command]
    status: int = importlib.import_module(module).run(parsed)
    return status
