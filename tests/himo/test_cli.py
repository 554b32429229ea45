"""The himo command itself: what it imports, sets, and says when something outside of it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from himo.cli import main

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_synth_do_not_wait_for_torch(tmp_path):
    code = f"""
import os, sys
from himo.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert main(["synth", "--out", {str(tmp_path / "s")!r}, "--num", "2", "--held-out", "1"]) == 0
assert "torch" not in sys.modules
print(os.environ["OMP_WAIT_POLICY"])
"""
    assert python(code).endswith("PASSIVE\n")


def test_a_wait_policy_of_the_user_stays():
    code = "import os; from himo.cli import main; main(['report', 'nothing']); "
    code += "print(os.environ['OMP_WAIT_POLICY'])"
    assert python(code, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE\n"


def test_the_package_gives_its_names_on_first_use():
    code = """
import himo
assert dir(himo) == sorted(himo.__all__) == ["HiMoCLIP", "__version__", "load", "save", "tokenize"]
print(himo.tokenize("a cat").shape, himo.HiMoCLIP.__name__, callable(himo.load), himo.__version__)
try:
    himo.nothing
except AttributeError as error:
    print(error)
"""
    first, second = python(code).splitlines()
    assert first.startswith("torch.Size([1, 248]) HiMoCLIP True 0.")
    assert second == "module 'himo' has no attribute 'nothing'"


def test_the_version_is_printed():
    code = """
import himo, torch
from himo.cli import main
try:
    main(["--version"])
except SystemExit as ended:
    print(ended.code)
print(f"himo {himo.__version__}, torch {torch.__version__}")
"""
    shown, status, expected = python(code).splitlines()
    assert shown == expected and status == "0"


SAYS = "; `himo {} --help` lists what it takes\n"
WRONG = {
    "unknown": (
        ["train", "--train-data", "x", "--learning-rate", "1"],
        "train: unknown argument --learning-rate" + SAYS.format("train"),
    ),
    "near": (
        ["encode", "x", "--pretraned=y", "--out", "z", "--pretrained", "y"],
        "encode: unknown argument --pretraned; the nearest flag is --pretrained"
        + SAYS.format("encode"),
    ),
    "start of another": (
        ["encode", "--data", "x", "--pretrained", "y", "--out", "z"],
        "encode: unknown argument --data; the nearest flag is --dataset-type"
        + SAYS.format("encode"),
    ),
    "of a command below another": (
        ["bench", "data", "--train-data", "x", "--worker", "1"],
        "bench data: unknown argument --worker; the nearest flag is --workers"
        + SAYS.format("bench data"),
    ),
    "missing": (
        ["encode", "x", "--pretrained", "y"],
        "the following arguments are required: --out" + SAYS.format("encode"),
    ),
    "no number": (
        ["train", "--seed", "1e3"],
        "argument --seed: invalid int value: '1e3'" + SAYS.format("train"),
    ),
    "not finite": (
        ["train", "--train-data", "x", "--lr", "inf"],
        "--lr: expected a finite number, at least 0.0, got inf\n",
    ),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_one_line(given, said, capsys):
    assert main(given) == 2
    assert capsys.readouterr().err == f"himo: error: {said}"


def test_an_unknown_command_is_one_line(capsys):
    assert main(["trian"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("himo: error: argument COMMAND: invalid choice: 'trian' (choose")
    assert message.count("\n") == 1


def test_one_of_several_processes_ends_with_its_status_though_stdout_is_closed():
    code = "import sys; sys.stdout = None; from himo import parallel; parallel."
    done = subprocess.run([sys.executable, "-c", f"{code}end_process(3)"], cwd=ROOT)
    assert done.returncode == 3
    command = [sys.executable, "-c", f"{code}_end('a reason', 2)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "himo: error: a reason\n")


def test_output_that_nobody_reads_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "himo", "synth", "--num", "1", "--held-out", "0", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "s")], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_output_that_is_closed_is_no_error(tmp_path):
    code = f"""
import sys
from himo.cli import main
out, sys.stdout = sys.stdout, None
print(main(["synth", "--out", {str(tmp_path / "s")!r}, "--num", "1", "--held-out", "0"]), file=out)
"""
    assert python(code) == "0\n"


def test_an_interrupt_while_torch_is_imported_is_one_line(capsys, monkeypatch):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("himo.cli.importlib.import_module", interrupted)
    assert main(["plan", "--gpu-mem", "1"]) == 130
    assert capsys.readouterr().err == "himo: interrupted\n"


@pytest.mark.parametrize("command", [["doctor"], ["train", "--help"], ["report", "."]], ids=str)
@pytest.mark.parametrize("package", ["PIL", "tqdm"])
def test_without_the_extra_each_command_names_it_in_one_line(command, package):
    code = f"""
import sys
from himo.cli import main
sys.modules[{package!r}] = None
sys.stderr = sys.stdout
print(main({command!r}))
"""
    message, status = python(code).splitlines()
    expected = 'is not installed; the extra [himo] has it: pip install "himo-kernels[himo]"'
    assert (message, status) == (f"himo: error: {package} {expected}", "2")


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / ("a" * 300))]) == 2
    message = capsys.readouterr().err
    assert message.startswith("himo: error: ") and message.count("\n") == 1
    assert "File name too long" in message
