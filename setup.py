"""Builds the extension himo_kernels._C, which pyproject.toml cannot describe.

The extension is optional. Without a C++ compiler, or with HIMO_KERNELS_NO_EXTENSION=1, it is left
out with a one-line reason, and the `reference` and `triton` backends remain. Without torch, or with
an error in our sources, the build fails: pip hides the output of a build that succeeds.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SWITCH = "HIMO_KERNELS_NO_EXTENSION"
SANITIZE = "HIMO_KERNELS_SANITIZE"  # 1: build with sanitizers, for `make sanitize`
OLDEST_TORCH = (2, 11)  # as in pyproject.toml

# Uses the same headers and libraries as the extension, so a failure here is not our sources' fault.
PROBE = """
#include <Python.h>
#include <vector>
int main_threads() { std::vector<int> threads(1); return static_cast<int>(threads.size()); }
"""


# No vptr, which needs the type information that torch hides. A finding aborts the process, so that
# no test can ignore it.
SANITIZERS = [
    *("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
    *("-fno-omit-frame-pointer", "-g1", "-O1"),
]


def switched_on(variable: str) -> bool:
    """Returns whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "0") not in ("", "0")


class LeftOut(Exception):
    """The one-line reason why the package is built without the extension."""


class NoTorch(Exception):
    """The one-line reason why the package is not built."""


def version_here() -> str:
    """Returns the version of the package, without importing it."""
    text = (ROOT / "himo_kernels" / "_version.py").read_text()
    return re.findall(r'__version__ = "(.+)"', text)[0]


def find_compiler() -> str:
    """Returns the C++ compiler: $CXX if set, otherwise the first of the usual names found."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise LeftOut(f"no C++ compiler: {f'CXX={named}' if named else 'c++, g++, clang++'} not found")


def probe(compiler: str, flags: list[str]) -> str | None:
    """Builds a small Python extension; returns the first error, or None."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [*shlex.split(compiler), "-std=c++17", "-shared", "-fPIC", include, *flags]
        run = subprocess.run(
            [*command, str(source), "-o", f"{source}.so"],
            check=False,
            capture_output=True,
            text=True,
        )
    if run.returncode == 0:
        return None
    lines = [line.strip() for line in run.stderr.splitlines()]
    return next((line for line in lines if "error" in line), f"exit status {run.returncode}")


def extension() -> dict[str, object]:
    """Returns the setup() arguments for the extension. Raises LeftOut or NoTorch without one."""
    if switched_on(SWITCH):
        raise LeftOut(f"{SWITCH}={os.environ[SWITCH]}")
    compiler = find_compiler()
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        raise NoTorch(f"torch cannot be imported ({error})") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise NoTorch(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")

    # at::parallel_for is a header template and runs on one thread unless we compile with OpenMP. Do
    # not link with it: a second OpenMP runtime next to torch's would make idle threads of each spin
    # while the other works.
    openmp = [] if probe(compiler, ["-fopenmp"]) else ["-fopenmp"]
    if not openmp and (error := probe(compiler, [])):
        raise LeftOut(f"{compiler} cannot build a Python extension: {error}")
    os.environ["CXX"] = compiler  # the same for torch's ninja file and setuptools' link step

    # torch's BuildExtension adds the C++ standard that torch's headers need.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    flags += openmp
    sanitizers = SANITIZERS if switched_on(SANITIZE) else []
    flags += sanitizers
    texts = {"HIMO_CXX_FLAGS": " ".join(flags), "HIMO_VERSION": version_here()}
    macros = [(name, f'"{text}"') for name, text in texts.items()]
    folders = ("csrc", "csrc/common", "csrc/cpu")
    sources = [path for folder in folders for path in sorted(ROOT.glob(f"{folder}/*.cpp"))]
    # csrc/cuda is not built: no backend calls it yet.
    module = cpp_extension.CppExtension(
        "himo_kernels._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": flags},
        extra_link_args=sanitizers,
        depends=[
            str(path.relative_to(ROOT)) for f in folders for path in sorted(ROOT.glob(f"{f}/*.h"))
        ],
    )

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            with one_line_per_source(len(module.sources)):
                super().build_extensions()

    build = Build.with_options(use_ninja=cpp_extension.is_ninja_available())
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}}


@contextmanager
def one_line_per_source(total: int) -> Iterator[None]:
    """Shortens each compiler command on file descriptor 1 to `[3/24] csrc/cpu/dense.cpp`.

    ninja writes to the descriptor itself, so replacing sys.stdout would not do.
    """
    root = re.escape(f"{ROOT}/")
    command = re.compile(rf"(\[\d+/\d+\] )?.* -c (?:{root})?(\S+\.(?:cpp|cu)) -o .*")
    read, write = os.pipe()
    sys.stdout.flush()
    printed = os.dup(1)
    os.dup2(write, 1)
    os.close(write)

    def shorten() -> None:
        done = 0
        with open(read, errors="replace") as lines, open(printed, "w") as out:
            for line in lines:
                if found := command.fullmatch(line.rstrip("\n")):
                    done += 1
                    line = f"{found[1] or f'[{done}/{total}] '}{found[2]}\n"
                out.write("linking the extension\n" if " -shared " in line else line)
                out.flush()

    thread = threading.Thread(target=shorten)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(printed, 1)  # closes the pipe, which ends the thread
        thread.join()


class Refuse(build_ext):
    """Ends the build; the metadata and a source distribution need no torch."""

    reason: NoTorch

    def run(self) -> None:
        sys.exit(
            f"himo_kernels: to build the extension, {self.reason}: install torch and setuptools, "
            f"then this package with pip's --no-build-isolation; or set {SWITCH}=1 to install it "
            "without the extension"
        )


# Older versions fail on the license field of pyproject.toml with a misleading message.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"himo_kernels: needs setuptools >= 77, this is {setuptools.__version__}")
try:
    arguments = extension()
except LeftOut as reason:
    print(f"himo_kernels: the extension is left out: {reason}", file=sys.stderr)
    arguments = {}
except NoTorch as reason:
    Refuse.reason = reason
    module = setuptools.Extension("himo_kernels._C", [])
    arguments = {"ext_modules": [module], "cmdclass": {"build_ext": Refuse}}
setuptools.setup(**arguments)
