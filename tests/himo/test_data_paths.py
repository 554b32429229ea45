"""Image paths out of an annotation file never leave the image root (promise G21)."""

import os
from pathlib import Path

import pytest
from captioned_files import image_bytes, write_images, write_jsonl

from himo.data import open_dataset
from himo.data.paths import ImageRoot, MissingImage
from himo.data.records import RecordError
from himo.errors import HimoError
from himo.transforms import ImageError

REFUSED = {
    "up": ("../secret.png", "path"),
    "up inside": ("images/../images/000.png", "path"),
    "up at the end": ("images/..", "path"),
    "absolute": ("/etc/passwd", "path"),
    "two slashes": ("//server/share/a.png", "path"),
    "home": ("~/a.png", "path"),
    "home of another": ("~root/a.png", "path"),
    "UNC": ("\\\\server\\share\\a.png", "path"),
    "backslash": ("images\\000.png", "path"),
    "drive": ("C:/a.png", "path"),
    "http": ("http://example.org/a.png", "path"),
    "https": ("https://example.org/a.png", "path"),
    "file": ("file:///etc/passwd", "path"),
    "data": ("data:image/png;base64,AAAA", "path"),
    "NUL": ("images/000.png\0.jpg", "encoding"),
    "line break": ("images/\r000.png", "path"),
    "escape": ("\x1b[2J.png", "path"),
    "5000 characters": ("a" * 5000, "path"),
    "5000 characters in folders": ("a/" * 2500 + "b.png", "path"),
    "256 bytes": ("ü" * 128, "path"),
    "lone surrogate": ("\ud800.png", "encoding"),
    "directory": ("images", "not_a_file"),
    "root": (".", "not_a_file"),
    "slash": ("images/", "not_a_file"),
    "FIFO": ("pipe.png", "not_a_file"),
    "device": ("device.png", "outside"),
    "socket directory": ("loop/a.png", "outside"),
    "link out": ("link.png", "outside"),
    "link to a link out": ("link2.png", "outside"),
    "below a link out": ("linked/a.png", "outside"),
    "link to a FIFO": ("link-to-pipe.png", "not_a_file"),
    "not text": (3, "type"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    write_images(root, 2)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.png").write_bytes(image_bytes())
    (tmp_path / "secret.png").write_bytes(image_bytes())
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink("link.png", root / "link2.png")
    os.symlink(outside, root / "linked")
    os.symlink("/dev/zero", root / "device.png")
    os.mkfifo(root / "pipe.png")
    os.symlink("pipe.png", root / "link-to-pipe.png")
    os.symlink("images", root / "inside")
    os.symlink("images/000.png", root / "inside.png")
    os.symlink("/proc/self", root / "loop")
    return root


@pytest.mark.timeout(30)  # a FIFO that is opened waits for ever
@pytest.mark.parametrize("name", REFUSED)
def test_a_path_is_refused_with_its_line(name: str, root: Path) -> None:
    path, reason = REFUSED[name]
    rows = [("images/000.png", "c"), (path, "c"), ("images/001.png", "c")]
    source = write_jsonl(root / "a.jsonl", rows)

    index = open_dataset(source, max_bad_fraction=0.5)

    assert [record.image for record in index] == ["images/000.png", "images/001.png"]
    assert index.report.bad == {reason: 1}
    (message,) = index.report.bad_examples
    assert message.startswith(f"{source}:2: ") and message.isprintable()
    assert len(message) < len(str(source)) + len(str(root)) + 300


@pytest.mark.parametrize(
    "path", ["images/000.png", "./images//000.png", "inside/000.png", "inside.png"]
)
def test_a_path_inside_the_root_is_found(path: str, root: Path) -> None:
    assert os.path.samefile(ImageRoot(root).resolve(path), root / "images/000.png")


def test_links_may_lead_out_where_that_is_asked_for(root: Path) -> None:
    source = write_jsonl(root / "a.jsonl", [("linked/a.png", "c"), ("link.png", "c")])
    with pytest.raises(HimoError, match=r"2 of 2 records are bad .* is a link that leaves"):
        open_dataset(source)

    index = open_dataset(source, follow_links=True)

    assert [index.open_image(number).size for number in range(2)] == [(12, 12)] * 2
    assert open_dataset(
        write_jsonl(root / "a.jsonl", [(str(root / "linked/a.png"), "c")]), follow_links=True
    ).open_image(0).size == (12, 12)
    outside = str(root.parent / "outside/a.png")
    for refused in ("../secret.png", "device.png", "pipe.png", "/etc/passwd", outside):
        with pytest.raises(RecordError):
            ImageRoot(root, follow_links=True).resolve(refused)


def test_an_absolute_path_below_the_root_is_that_file(root: Path, tmp_path: Path) -> None:
    os.symlink(root, tmp_path / "alias")
    os.symlink(tmp_path / "alias", tmp_path / "other alias")
    found = ImageRoot(tmp_path / "alias")

    for folder in (root, tmp_path / "alias", tmp_path / "other alias"):
        for path in ("images/000.png", "/images//000.png", "inside/000.png", "inside.png"):
            assert found.resolve(f"{folder}/{path}") == f"{os.path.realpath(root)}/images/000.png"
    assert ImageRoot("/").resolve(str(root / "images/000.png")) == str(root / "images/000.png")
    with pytest.raises(MissingImage):
        found.resolve(f"{root}/images/9.png")
    for path, reason in (
        (f"{root}", "path"),
        (f"{root}/", "not_a_file"),
        (f"{root}/images", "not_a_file"),
        (f"{root}/../secret.png", "path"),
        (f"{root}-other/a.png", "path"),
        (f"{root}/linked/a.png", "outside"),
        (f"{root}/link.png", "outside"),
        (f"{tmp_path}/outside/a.png", "path"),
        (f"{root}/{'a' * 300}.png", "path"),
        (f"{root}/\ud800.png", "encoding"),
    ):
        with pytest.raises(RecordError) as error:
            found.resolve(path)
        assert error.value.reason == reason, path

    csv = root / "a.csv"
    csv.write_text(f"filepath,title\n{root}/images/000.png,one\nimages/001.png,two\n")
    index = open_dataset(csv)
    assert [index.open_image(row).size for row in range(2)] == [(12, 12)] * 2
    assert index.report.missing == {"images": [0, 2]}


@pytest.mark.parametrize("name", ["File:A.png", "shot-2026-01-02T12:30:00.png", "a:b.png"])
def test_a_colon_in_a_name_makes_no_url(name: str, root: Path) -> None:
    (root / name).write_bytes(image_bytes())
    if name == "a:b.png":  # a drive, by its form
        with pytest.raises(RecordError, match="is a URL or has a drive letter"):
            ImageRoot(root).resolve(name)
    else:
        assert ImageRoot(root).resolve(name) == f"{os.path.realpath(root)}/{name}"


def test_a_root_that_is_a_link_is_followed(root: Path, tmp_path: Path) -> None:
    os.symlink(root, tmp_path / "elsewhere")
    assert ImageRoot(tmp_path / "elsewhere").resolve("images/000.png").startswith(str(root))


@pytest.mark.parametrize("path", ["images/9.png", "nothing/9.png", "images/000.png/9.png"])
def test_a_missing_image_is_told_from_a_refused_path(path: str, root: Path) -> None:
    with pytest.raises(MissingImage):
        ImageRoot(root).resolve(path)


def test_a_path_is_checked_again_when_it_is_read(root: Path) -> None:
    index = open_dataset(write_jsonl(root / "a.jsonl", [("images/000.png", "c")] * 2))
    image = root / "images/000.png"
    image.unlink()
    with pytest.raises(ImageError, match="does not exist") as error:
        index.open_image(0)
    assert error.value.reason == "missing"

    os.symlink("/etc/passwd", image)
    with pytest.raises(ImageError, match="is a link that leaves") as error:
        index.open_image(0)
    assert error.value.reason == "not_a_file"

    image.unlink()
    os.mkfifo(image)
    with pytest.raises(ImageError, match="is not a regular file") as error:
        index.open_image(0)
    assert error.value.reason == "not_a_file"
