"""Builds the extension himo_kernels._C, which pyproject.toml cannot describe.

The extension is optional. Without torch or a C++ compiler, or with HIMO_KERNELS_NO_EXTENSION=1, it
is left out with a one-line reason, and the `reference` and `triton` backends remain. With a working
compiler, an error in our sources fails the build.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools

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
    """The one-line reason why the extension cannot be built on this machine."""


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
    """Returns the setup() arguments for the extension. Raises LeftOut if it cannot be built."""
    if switched_on(SWITCH):
        raise LeftOut(f"{SWITCH}={os.environ[SWITCH]}")
    compiler = find_compiler()
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        raise LeftOut(f"torch cannot be imported ({error}); use --no-build-isolation") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise LeftOut(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")

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
    macros = [("HIMO_CXX_FLAGS", f'"{" ".join(flags)}"')]
    folders = ("csrc", "csrc/common", "csrc/cpu")
    sources = [path for folder in folders for path in sorted(ROOT.glob(f"{folder}/*.cpp"))]
    # Depends on the toolkit, not on a visible GPU: machines that build wheels have none.
    has_toolkit = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    cuda = sorted(ROOT.glob("csrc/cuda/*.cu")) if has_toolkit else []
    if cuda:
        macros.append(("HIMO_WITH_CUDA", "1"))
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = make(
        "himo_kernels._C",
        [str(path.relative_to(ROOT)) for path in sources + cuda],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        extra_link_args=sanitizers,
        depends=[str(path) for path in sorted(ROOT.glob("csrc/**/*.h"))],
    )
    ninja = cpp_extension.is_ninja_available()
    build_ext = cpp_extension.BuildExtension.with_options(use_ninja=ninja)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build_ext}}


# Older versions fail on the license field of pyproject.toml with a misleading message.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"himo_kernels: needs setuptools >= 77, this is {setuptools.__version__}")
try:
    arguments = extension()
except LeftOut as reason:
    print(f"himo_kernels: the extension is left out: {reason}", file=sys.stderr)
    arguments = {}
setuptools.setup(**arguments)
