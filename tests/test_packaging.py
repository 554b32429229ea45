"""Installation without the extension, in real processes, and its messages. No network."""

import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from himo_kernels._version import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = [
    name for name in ("himo_kernels", "himo_charts", "himo", "csrc") if (ROOT / name).is_dir()
]
FILES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"]
SWITCH = "HIMO_KERNELS_NO_EXTENSION"
BUILD = "pip install --no-build-isolation --no-deps --force-reinstall SOURCES"

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or int(setuptools.__version__.split(".")[0]) < 77,
    reason="needs the source tree, and setuptools >= 77 for the license field",
)


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside this tree, without environment variables that would affect it."""
    steering = ("HIMO_KERNELS_", "PYTHONPATH", "CXX", "CC")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def python(script: str, path: Path, **environment: str) -> str:
    """Returns what the script prints in a fresh process that sees the packages in path first.

    With -S, because an editable install of this tree hooks into the import of himo_kernels._C
    wherever himo_kernels itself comes from.
    """
    site = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    places = os.pathsep.join([str(path), *site])
    done = run(sys.executable, "-S", "-c", script, cwd=path, PYTHONPATH=places, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def copy_sources(target: Path) -> Path:
    target.mkdir()
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=leave_out)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


NO_EXTENSION = {
    "switch": ({SWITCH: "1"}, f"{SWITCH}=1"),
    "no-compiler": ({"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}, "CXX=/nowhere/c++ not found"),
    "empty-path": ({"PATH": "/nowhere"}, "c++, g++, clang++ not found"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it on a machine without a compiler."""
    folder = tmp_path_factory.mktemp("installed")
    sources = copy_sources(folder / "sources")
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps"]
    target = folder / "site"
    done = run(
        *[*pip, "--no-build-isolation", "--target", target, sources],
        cwd=folder,
        **NO_EXTENSION["no-compiler"][0],
    )
    assert done.returncode == 0, done.stderr
    line = "himo_kernels: the extension is left out: no C++ compiler: "
    assert line + NO_EXTENSION["no-compiler"][1] in done.stdout + done.stderr
    return target


@pytest.mark.parametrize(("environment", "reason"), NO_EXTENSION.values(), ids=NO_EXTENSION)
def test_a_build_without_the_extension_succeeds_and_says_why(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    sources = copy_sources(tmp_path / "sources")
    done = run(sys.executable, "setup.py", "build", cwd=sources, **environment)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "the extension is left out" in line]
    assert len(told) == 1 and told[0].endswith(reason), done.stderr
    assert not list(sources.rglob("_C*.so"))


def test_without_the_extension_the_package_works_and_says_why(installed: Path) -> None:
    script = """if True:
        import torch, himo_kernels
        from himo_kernels import extension
        print(himo_kernels.__file__)
        print(extension.why_not())
        x = torch.arange(12.0).view(4, 3)
        print(himo_kernels.covariance(x)[1].shape)
        try:
            himo_kernels.covariance(x, backend="cpu")
        except NotImplementedError as error:
            print(str(error).replace("\\n", " "))
        try:
            extension.load()
        except ImportError as error:
            print(type(error.__cause__).__name__)
    """
    place, reason, shape, refusal, cause = python(script, installed).splitlines()
    assert Path(place).is_relative_to(installed)
    assert reason.startswith("the extension is not built (No module named 'himo_kernels._C')")
    assert reason.endswith(BUILD)
    assert shape == "torch.Size([3, 3])"
    assert reason in refusal
    assert cause == "ModuleNotFoundError"


PRINT_REASON = "from himo_kernels import extension; print(extension.why_not())"


def test_a_report_is_written_by_the_installed_package(installed: Path) -> None:
    # Its templates and style sheets are data files next to the code.
    script = """if True:
        import json, pathlib
        from himo.report import write_report
        import himo_charts
        print(himo_charts.__file__)
        run = pathlib.Path("run")
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"loss": "<b>himo</b>"}))
        page = write_report([run], "report.html").read_text()
        shown = ("<code>loss</code></th><td>&lt;b&gt;himo", "--page:", ".tiles {")
        print(all(part in page for part in shown))
    """
    place, shown = python(script, installed).splitlines()
    assert Path(place).is_relative_to(installed)
    assert shown == "True"


def test_the_switch_works_at_run_time_too(installed: Path) -> None:
    reason = python(PRINT_REASON, installed, **{SWITCH: "1"})
    assert reason == f"the extension is switched off by {SWITCH}=1"


@pytest.mark.slow
def test_a_file_that_cannot_be_loaded_is_a_reason(installed: Path) -> None:
    broken = installed / "himo_kernels" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    broken.write_bytes(b"no shared library")
    try:
        reason = python(PRINT_REASON, installed)
    finally:
        broken.unlink()
    assert reason.startswith(f"the extension cannot be loaded by torch {torch.__version__} (")
    assert "; it needs the minor version of torch that it was built for; " in reason
    assert reason.endswith(BUILD)


@pytest.mark.parametrize(
    ("built", "usable"),
    [("1.13.1", False), ("this.minor.99+cpu", True)],
    ids=["other-minor", "other-patch"],
)
@pytest.mark.slow
def test_an_extension_of_another_torch_is_refused(
    built: str, usable: bool, installed: Path
) -> None:
    script = f"""if True:
        import sys, types, torch
        fake = types.ModuleType("himo_kernels._C")
        this_minor = ".".join(torch.__version__.split(".")[:2])
        torch_version = "{built}".replace("this.minor", this_minor)
        fake.build_info = lambda: {{"torch": torch_version, "version": "{__version__}"}}
        fake.__getattr__ = lambda name: None  # it has every operator
        sys.modules["himo_kernels._C"] = fake
        from himo_kernels import extension
        print(torch.__version__)
        print(extension.why_not())
        try:
            print(extension.load() is fake)
        except ImportError as error:
            print(error)
    """
    running, reason, loaded = python(script, installed).splitlines()
    if usable:
        assert (reason, loaded) == ("None", "True")
    else:
        expected = f"the extension is built for torch {built}, this is torch {running}"
        assert reason == loaded and reason.startswith(expected) and reason.endswith(BUILD)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no-ninja"])
def test_the_build_prints_one_line_for_each_source(ninja: bool, tmp_path: Path) -> None:
    if ninja and shutil.which("ninja") is None:
        pytest.skip("needs ninja")
    sources = copy_sources(tmp_path / "sources")
    shutil.rmtree(sources / "csrc")
    for name in ("csrc/one.cpp", "csrc/cpu/two.cpp"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text("#warning seen\n")
    environment = {"MAX_JOBS": "1"}
    if not ninja:  # a program of that name that fails
        broken = tmp_path / "ninja"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=sources, **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    compiled = [line.split() for line in lines if line.startswith("[")]
    assert [count for count, _ in compiled] == ["[1/2]", "[2/2]"]
    assert {source for _, source in compiled} == {"csrc/one.cpp", "csrc/cpu/two.cpp"}
    assert "linking the extension" in lines
    assert "#warning seen" in done.stdout + done.stderr  # what the compiler says stays
    assert not [line for line in lines if " -c " in line or " -shared " in line]


# What `import torch` finds where torch is not installed, and where it is too old.
NO_TORCH = {
    "none": ("raise ModuleNotFoundError('No module named torch')", "torch cannot be imported"),
    "old": ("__version__ = '2.3.1'", "torch 2.3.1 is older than 2.11"),
}


@needs_compiler
@pytest.mark.parametrize(("module", "reason"), NO_TORCH.values(), ids=NO_TORCH)
def test_a_build_without_torch_fails_and_says_how_to_install(
    module: str, reason: str, tmp_path: Path
) -> None:
    sources = copy_sources(tmp_path / "sources")
    torch = tmp_path / "site" / "torch"
    (torch / "utils").mkdir(parents=True)
    (torch / "__init__.py").write_text(module)
    for name in ("utils/__init__.py", "utils/cpp_extension.py"):
        (torch / name).touch()

    def setup(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = str(tmp_path / "site")
        return run(
            sys.executable, "setup.py", *command, cwd=sources, PYTHONPATH=path, **environment
        )

    refused = setup("build")
    assert refused.returncode == 1
    (told,) = [line for line in refused.stderr.splitlines() if line.startswith("himo_kernels: ")]
    assert reason in told and "--no-build-isolation" in told and f"{SWITCH}=1" in told
    assert setup("egg_info").returncode == 0  # the metadata need no torch
    assert setup("build", **{SWITCH: "1"}).returncode == 0


@needs_compiler
@pytest.mark.slow
def test_an_error_in_our_sources_fails_the_build(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    for source in sources.glob("csrc/**/*.cpp"):
        source.unlink()
    (sources / "csrc" / "bindings.cpp").write_text("#error broken on purpose\n")
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=sources)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert "left out" not in done.stderr


def test_metadata(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    metadata = distribution.metadata
    assert metadata["Name"] == "himo-kernels"
    assert distribution.version == __version__
    assert metadata["License-Expression"].split(" AND ")[0] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    requirements = distribution.requires or []
    assert [r for r in requirements if "extra ==" not in r] == ["torch>=2.11"]
    # An extra that lists torch could replace the installed one.
    assert not [r for r in requirements if "extra ==" in r and re.match(r"torch\b", r)]
    assert {"dev", "triton"} <= set(metadata.get_all("Provides-Extra") or [])
