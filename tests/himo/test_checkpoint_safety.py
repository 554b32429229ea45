"""Checkpoints of an attacker, of a failing disk and of a process that dies while it saves."""

import ast
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clip_cases import TINIEST, random_model
from fresh_process import PACKAGE, run_python
from malicious_files import CORPUS

from himo import checkpoint
from himo.checkpoint.configurations import hf_config
from himo.checkpoint.layouts import from_himo
from himo.checkpoint.safetensors_files import write_safetensors
from himo.errors import HimoError
from himo.model import HiMoCLIP

ROOT = PACKAGE.parent


def test_the_corpus_is_large_and_its_payload_works(tmp_path: Path) -> None:
    assert len(CORPUS) >= 25
    canary, path = tmp_path / "canary", tmp_path / "file"
    CORPUS["a plain pickle with reduce"][0](path, canary)
    subprocess.run(
        [sys.executable, "-c", f"import pickle; pickle.load(open({str(path)!r}, 'rb'))"], check=True
    )
    assert canary.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("name", CORPUS)
def test_nothing_runs_and_one_line_says_why(name: str, tmp_path: Path) -> None:
    make, message = CORPUS[name]
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    make(path, canary)
    start = time.perf_counter()
    for strict in (True, False):
        with pytest.raises(HimoError) as error:
            checkpoint.load(path, strict=strict)
        text = str(error.value)
        assert text.startswith(str(path))
        assert message in text
        assert text.isprintable()
        assert len(text) < 1000
        assert not canary.exists()
    assert time.perf_counter() - start < 10


def test_devices_and_paths_are_refused() -> None:
    for path in ("/dev/zero", "/dev/stdin", "/proc/self/mem", "", "nul\0", "~", "x" * 5000):
        with pytest.raises(HimoError):
            checkpoint.load(path)
    with pytest.raises(HimoError, match="a model's name and no file"):
        checkpoint.load("ViT-B-16")


# What could run code that a file brings, by the source that would do it.
BANNED = {
    "torch.load(path)": "torch.load without weights_only=True",
    "torch.load(path, weights_only=False)": "torch.load without weights_only=True",
    "torch.load(path, weights_only=flag)": "torch.load without weights_only=True",
    "f(weights_only=False)": "weights_only=False",
    "torch.jit.load(path)": "torch.jit.load",
    "from torch.jit import load": "torch.jit.load",
    "torch.hub.load(a, b)": "torch.hub.load",
    "torch.export.load(path)": "torch.export.load",
    "torch.package.PackageImporter(path)": "torch.package.PackageImporter",
    "import pickle": "pickle",
    "from pickle import loads as f": "pickle",
    "import cloudpickle as p": "cloudpickle",
    "import marshal": "marshal",
    "import shelve": "shelve",
    "eval(text)": "eval",
    "exec(text)": "exec",
    "builtins.eval(text)": "eval",
    "os.system(text)": "os.system",
    "os.popen(text)": "os.popen",
    "subprocess.run(text, shell=True)": "shell=True",
    "np.load(path, allow_pickle=True)": "allow_pickle=True",
}
_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_CALLS = {
    "torch.jit.load",
    "torch.hub.load",
    "torch.export.load",
    "torch.package.PackageImporter",
    "os.system",
    "os.popen",
}


def dangers(source: str) -> list[str]:
    """What in a Python source could run code that a file brings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [n.name for n in node.names if n.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in _MODULES else []
            names = [f"{node.module}.{n.name}" for n in node.names]
            found += [name for name in names if name in _CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in _CALLS:
                found.append(name)
            if name.removeprefix("builtins.") in ("eval", "exec"):
                found.append(name.removeprefix("builtins."))
            if name == "torch.load" and flags.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            for flag in ("weights_only=False", "shell=True", "allow_pickle=True"):
                key, value = flag.split("=")
                if flags.get(key) == value and (name, key) != ("torch.load", "weights_only"):
                    found.append(flag)
    return found


@pytest.mark.parametrize("source", BANNED)
def test_the_search_finds_what_is_banned(source: str) -> None:
    assert dangers(source) == [BANNED[source]]


def test_the_search_lets_the_rest_pass() -> None:
    for source in ("model.eval()", "torch.load(p, weights_only=True)", "import pickletools"):
        assert dangers(source) == []


def test_no_source_can_run_what_a_file_brings() -> None:
    files = [
        f for part in ("himo", "himo_kernels", "benchmarks") for f in (ROOT / part).rglob("*.py")
    ]
    assert ROOT / "himo" / "checkpoint" / "pickles.py" in files
    found = {str(f.relative_to(ROOT)): dangers(f.read_text()) for f in files}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.fixture
def saved(tmp_path: Path, generator: torch.Generator) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint.save(random_model(TINIEST, generator), path, metadata={"tau": 0.9})
    return path


def refused(path: Path, content: bytes | bytearray) -> bool:
    """Whether himo refuses a file of this content, in a line that names it."""
    path.write_bytes(content)
    try:
        checkpoint.read_state_dict(path)
    except HimoError as error:
        return str(path) in str(error) and str(error).isprintable()
    return False


def test_500_flipped_bits_are_found(saved: Path, generator: torch.Generator) -> None:
    content = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) > header
    # Half of them in the header, which is a part of the file in any model but this one.
    places = torch.cat([
        torch.randint(0, 8 * header, (250,), generator=generator),
        torch.randint(8 * header, 8 * len(content), (250,), generator=generator),
    ]).tolist()  # fmt: skip
    missed = []
    for place in places:
        content[place // 8] ^= 1 << place % 8
        if not refused(saved, content):
            missed.append(place)
        content[place // 8] ^= 1 << place % 8
    assert missed == []
    saved.write_bytes(content)
    assert checkpoint.read_state_dict(saved)[1]["checksum"] == "sha256"


def test_every_bit_of_the_digest_and_its_name_counts(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    start = content.index(b'"himo_sha256"')
    for place in range(8 * start, 8 * (start + len('"himo_sha256":""') + 64)):
        content[place // 8] ^= 1 << place % 8
        assert refused(saved, content), place
        content[place // 8] ^= 1 << place % 8


def test_200_truncations_are_found(saved: Path, generator: torch.Generator) -> None:
    content = saved.read_bytes()
    lengths = torch.randint(0, len(content), (196,), generator=generator).tolist()
    for length in [0, 7, 8, len(content) - 1, *lengths]:
        assert refused(saved, content[:length]), length
    assert refused(saved, content + b"\0")


def test_swapped_parts_are_found(saved: Path) -> None:
    content = saved.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    data = 8 + int.from_bytes(content[:8], "little")
    one, other = (
        slice(*(data + x for x in header[name]["data_offsets"]))
        for name in ("ln_final.weight", "ln_final.bias")
    )
    swapped = bytearray(content)
    swapped[one], swapped[other] = content[other], content[one]
    assert swapped != content
    assert refused(saved, swapped)


def test_swapped_shards_and_configurations_are_found(
    tmp_path: Path, generator: torch.Generator
) -> None:
    # As Hugging Face shards a model: an index, and files that it names.
    state = from_himo(random_model(TINIEST, generator).state_dict(), "hf")
    names, sharded = sorted(state), tmp_path / "sharded"
    sharded.mkdir()
    files = {n: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        part = {name: state[name] for name in names if files[name] == file}
        write_safetensors(str(sharded / file), part, {})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (sharded / "config.json").write_text(json.dumps(hf_config(TINIEST)))
    checkpoint.load(sharded, stretch=False)
    one, other, _ = sorted(sharded.glob("*.safetensors"))
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(HimoError, match="holds other tensors than") as error:
        checkpoint.load(sharded)
    assert str(one) in str(error.value)

    # As himo writes it: the configuration belongs to the weights.
    checkpoint.save(random_model(TINIEST, generator), tmp_path / "a.safetensors")
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "hf", "hf")
    checkpoint.load(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(
        config.read_text().replace('"num_attention_heads": 1', '"num_attention_heads": 2')
    )
    with pytest.raises(HimoError, match="config.json is not the configuration of the weights"):
        checkpoint.load(tmp_path / "hf")


# Saves versions of a checkpoint in a child until it is killed: 180 times at a random moment, 20
# times where it is about to rename. After each kill the file is read. Prints for both how often
# it was whole, and how many versions it was seen in. In one process, because what takes long is
# to import torch.
_KILL = """
import os, random, signal, sys, time
import torch
from himo import checkpoint
from himo.checkpoint.layouts import from_himo
from himo.model import CLIPConfig, HiMoCLIP

path = sys.argv[1]
torch.set_num_threads(1)
model = HiMoCLIP(CLIPConfig(32, 16, 1, 32, 8, 24, 64, 32, 1))
start = time.perf_counter()
checkpoint.save(model, path, metadata={"version": 0})
longest = time.perf_counter() - start  # seconds from a child's start until it is killed
expected = from_himo(model.state_dict(), "himo")

def save_forever(version, kill_before_rename):
    if kill_before_rename:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    while True:
        version += 1
        checkpoint.save(model, path, metadata={"version": version})

for count, before_rename in ((180, False), (20, True)):
    whole, versions = 0, set()
    for turn in range(count):
        child = os.fork()
        if child == 0:
            save_forever(1000 * turn, before_rename)
        if not before_rename:
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        state, metadata = checkpoint.read_state_dict(path)
        whole += all(torch.equal(state[name], value) for name, value in expected.items())
        version = metadata["provenance"]["version"]
        # Until about half of the children end after a save, half before, however fast the disk is.
        longest *= 1 / 1.1 if version not in versions else 1.1
        versions.add(version)
    print(whole, len(versions))
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "latest.safetensors"
    anywhere, before_the_rename = run_python("-c", _KILL, str(path)).splitlines()
    whole, versions = (int(x) for x in anywhere.split())
    assert whole == 180
    assert versions > 10  # saves did succeed in between, and
    assert before_the_rename == "20 1"  # the version from before: no later one was renamed
    assert len(list(tmp_path.glob(".himo-*.tmp"))) > 20 + 10  # kills did hit others half-way
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".himo-")} == {path.name}


# Writes checkpoints where there is no space for them, and prints the errors.
_NO_SPACE = """
import resource, sys
from himo import checkpoint
from himo.errors import HimoError

source, limit, targets = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for target, to in zip(targets[::2], targets[1::2]):
    try:
        checkpoint.convert(source, target, to)
    except HimoError as error:
        print(error)
"""


@pytest.mark.parametrize("limit", ["disk", "file size"])
def test_no_space_is_an_error_and_leaves_what_was_there(
    limit: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    full_disk = limit == "disk"
    directory = request.getfixturevalue("small_disk") if full_disk else tmp_path / "directory"
    directory.mkdir(exist_ok=True)
    source = tmp_path / "source.safetensors"
    checkpoint.save(HiMoCLIP(TINIEST), source)
    size = source.stat().st_size
    targets = {"a.safetensors": "himo", "a.pt": "open_clip", "directory": "hf"}
    for name in ("a.safetensors", "a.pt"):
        (directory / name).write_text("what was there")
    if full_disk:
        free = shutil.disk_usage(directory).free
        (directory / "filler").write_bytes(bytes(free - size // 2 - 8192))
    before = sorted(directory.iterdir())
    arguments = [x for name, to in targets.items() for x in (str(directory / name), to)]
    bytes_allowed = 0 if full_disk else size // 2
    messages = run_python("-c", _NO_SPACE, str(source), str(bytes_allowed), *arguments)
    assert len(messages.splitlines()) == len(targets)
    for name, message in zip(targets, messages.splitlines(), strict=True):
        assert message.startswith(str(directory / name))
        reason = "no space left on device" if full_disk else "file too large"
        assert f": not written, {reason}: needs " in message
        assert "bytes free" in message
    assert sorted(directory.iterdir()) == before
    for name in ("a.safetensors", "a.pt"):
        assert (directory / name).read_text() == "what was there"
