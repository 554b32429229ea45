"""An extension that is damaged, foreign or of another version is one notice, and no crash."""

import shutil
import sysconfig
from pathlib import Path

import numpy
import pytest
from fresh_process import run_python

import himo_kernels
from himo_kernels import extension

ROOT = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# A user without the extension: the warning of a first call, and the result.
USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(himo_kernels.info_nce(torch.eye(128), torch.eye(128), 1.0).item() > 0)
print(*(w.message for w in caught), sep="\\n")
"""
FAKE = """
import sys, types, torch
fake = types.ModuleType("himo_kernels._C")
fake.__file__ = "_C.so"
{change}
sys.modules["himo_kernels._C"] = fake
import himo_kernels
"""
INFO = f"""
version = {himo_kernels.__version__!r}
fake.build_info = lambda: dict(torch=torch.__version__, version=version)
"""
UNFIT = {
    "no build_info": (
        "",
        "the extension is not of himo_kernels: it has no build_info (_C.so)",
    ),
    "build_info of something else": (
        "fake.build_info = lambda: 3",
        "the extension is not of himo_kernels: it has no build_info (_C.so)",
    ),
    "another version": (
        'fake.build_info = lambda: {"torch": torch.__version__, "version": "0.1.0"}',
        f"the extension is of himo_kernels 0.1.0, this is {himo_kernels.__version__}",
    ),
}


@pytest.mark.parametrize(("change", "reason"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_extension_is_one_notice(change: str, reason: str) -> None:
    used, notice = _use(FAKE.format(change=change)).splitlines()
    assert used == "True"
    assert notice.startswith(f"himo_kernels: operators on a CPU run in plain PyTorch: {reason}; ")
    assert extension.BUILD in notice


def test_a_file_that_is_no_extension_of_ours_is_one_notice(tmp_path: Path) -> None:
    package = tmp_path / "himo_kernels"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "himo_kernels", package, ignore=ignored)
    file = package / f"_C{SUFFIX}"
    foreign = Path(numpy.random.bit_generator.__file__).read_bytes()
    for content in (foreign, b""):
        file.write_bytes(content)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport torch, himo_kernels\n"
        used, notice = _use(code).splitlines()
        assert used == "True"
        assert "run in plain PyTorch: the extension cannot be loaded by torch " in notice
        assert extension.BUILD in notice


OTHER = {
    "no such function": ("", "module 'himo_kernels._C' has no attribute 'normalize_fwd'"),
    "other arguments": (
        """
def normalize_fwd(*given):
    raise TypeError("normalize_fwd(): incompatible function arguments. The ...\\n 1.")
fake.normalize_fwd = normalize_fwd
""",
        "normalize_fwd(): incompatible function arguments. The ...",
    ),
}


@pytest.mark.parametrize(("change", "found"), OTHER.values(), ids=OTHER)
def test_functions_of_other_sources_are_one_error(change: str, found: str) -> None:
    code = """
try:
    himo_kernels.normalize(torch.eye(4), backend="cpu")
except ImportError as error:
    print(error)
"""
    (error,) = run_python("-c", FAKE.format(change=INFO + change) + code, **SETTINGS).splitlines()
    assert error == (
        f"the extension was built from other sources ({found}); {extension.BUILD}; "
        f"{extension.SWITCH}=1 does without it"
    )


def test_errors_of_other_functions_keep_their_words() -> None:
    text = "other(): incompatible function arguments. The ..."
    extension.explain(TypeError(text))  # raises nothing
    extension.explain(AttributeError("'int' object has no attribute 'normalize_fwd'"))
    with pytest.raises(ImportError, match="built from other sources"):
        extension.explain(TypeError(f"normalize_fwd{text[5:]}"))


def test_info_says_that_the_extension_is_of_other_sources() -> None:
    code = "from himo_kernels import info; print(info.report())"
    report = run_python("-c", FAKE.format(change=INFO) + code, **SETTINGS)
    assert "unknown: the extension was built from other sources" in report


SETTINGS = {"HIMO_KERNELS_BACKEND": "auto", "HIMO_KERNELS_NO_EXTENSION": "0"}


def _use(code: str) -> str:
    return run_python("-c", code + USE, **SETTINGS)
