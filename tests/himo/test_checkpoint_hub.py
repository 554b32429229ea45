"""Names of the hub: found in the local cache, never downloaded; a miss is one line that helps."""

from pathlib import Path

import pytest
import torch

from himo.checkpoint import convert, load, save
from himo.checkpoint.hub import located
from himo.cli import main
from himo.errors import HimoError
from himo.model import CONFIGS, HiMoCLIP

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a working directory without files."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home" / "hub"


def fetched(cache: Path, repository: str, revision: str = "main") -> Path:
    """The folder of a snapshot, as the hub's client lays it out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    reference = folder / "refs" / revision
    reference.parent.mkdir()
    reference.write_text(COMMIT)
    return snapshot


def test_a_name_in_the_cache_loads_as_its_directory(cache: Path) -> None:
    model = HiMoCLIP(CONFIGS["tiny"])
    save(model, "model.safetensors")
    convert("model.safetensors", "hf", "hf")
    snapshot, blobs = fetched(cache, "some-one/clip_1.0"), cache / "blobs"
    blobs.mkdir()
    for file in Path("hf").iterdir():  # the client links from a snapshot to its blobs
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    for name in ("some-one/clip_1.0", "hf-hub:some-one/clip_1.0", f"some-one/clip_1.0@{COMMIT}"):
        assert located(name) == str(snapshot)
    found, _ = load("some-one/clip_1.0")
    torch.testing.assert_close(dict(found.named_parameters()), dict(model.named_parameters()))
    assert located("some-one/clip_1.0/config.json") == str(snapshot / "config.json")
    # A path that is there is a path.
    (Path("some-one") / "clip_1.0").mkdir(parents=True)
    assert located("some-one/clip_1.0") == "some-one/clip_1.0"
    assert located("hf-hub:some-one/clip_1.0") == str(snapshot)


def test_the_hubs_client_finds_the_same_file(cache: Path) -> None:
    client = pytest.importorskip("huggingface_hub", reason="the oracle of the cache's layout")
    (fetched(cache, "a/b") / "config.json").write_text("{}")
    theirs = client.try_to_load_from_cache("a/b", "config.json", cache_dir=cache)
    assert located("a/b/config.json") == theirs


def test_a_revision_is_looked_for_under_its_name(cache: Path) -> None:
    snapshot = fetched(cache, "a/b", "v2")
    assert located("a/b@v2") == str(snapshot)
    with pytest.raises(HimoError, match=r"refs/main\); .* `hf download a/b` fetches it"):
        located("a/b")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_the_hubs_client_has_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv(variable, str(tmp_path / "x"))
    below = {"HF_HUB_CACHE": "", "XDG_CACHE_HOME": "huggingface/hub"}
    snapshot = fetched(tmp_path / "x" / below.get(variable, ".cache/huggingface/hub"), "a/b")
    assert located("a/b") == str(snapshot)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openai/clip", "refs/main); nothing is downloaded here: `hf download openai/clip` fetch"),
        ("hf-hub:a/b/c.pt", "`hf download a/b c.pt` fetches it"),
        ("a/b@v1", "`hf download a/b --revision v1` fetches it"),
        ("hf-hub:clip", "hf-hub:clip: expected hf-hub:OWNER/NAME"),
        ("hf-hub:a/../b", "expected hf-hub:OWNER/NAME"),
        ("logs/mine/checkpoints/epoch_1.safetensors", "cannot be read: no such file"),
        ("clip.pt", "clip.pt: cannot be read: no such file"),
    ],
)
def test_a_miss_is_one_line_that_helps(
    cache: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main(["convert", name, "out.safetensors"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"himo: error: {name}: ") and printed.count("\n") == 1
    assert message in printed and not Path("out.safetensors").exists()


def test_a_file_that_was_not_fetched_or_a_damaged_reference_is_a_miss(cache: Path) -> None:
    snapshot = fetched(cache, "a/b")
    with pytest.raises(HimoError, match=r"/c\.pt\); .* `hf download a/b c\.pt` fetches it"):
        located("a/b/c.pt")
    (snapshot.parents[1] / "refs" / "main").write_text("../../../elsewhere")
    with pytest.raises(HimoError, match=r"refs/main\)"):
        located("a/b")
