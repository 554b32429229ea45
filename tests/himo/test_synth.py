"""The synthetic data set: what it holds, that it is reproducible, and what becomes of failures."""

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise, permutations
from pathlib import Path

import numpy
import pytest
from PIL import Image

import himo
from himo import synth
from himo.data import open_dataset
from himo.errors import HimoError
from himo.synth import draw_scenes, synthesize
from himo.synth.drawing import render
from himo.synth.kinds import NOUNS, PARTS
from himo.synth.scenes import (
    FLOOR_ROW,
    GROUNDS,
    HUES,
    PATTERNS,
    PLACES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    caption,
    draw_scene,
    relation,
)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _captions(folder: Path, split: str) -> list[str]:
    records = json.loads((folder / f"{split}.json").read_text())
    return [record["conversations"][1]["value"] for record in records]


def _scenes(count: int) -> Iterator[tuple[Scene, random.Random]]:
    for number in range(count):
        rng = random.Random(f"test {number}")
        yield draw_scene(rng), rng


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "new" / "set"
    synthesize(out, num=70, held_out=30, workers=1, progress=False)
    return out


def test_it_is_read_as_sharegpt4v(data_set: Path) -> None:
    for split, count in (("train", 70), ("test", 30)):
        index = open_dataset(data_set / f"{split}.json", max_bad_fraction=0)
        assert index.report.kind == "sharegpt4v" and len(index) == count
        assert index[7].image == f"images/{split}/000007.png"
        for number in range(0, count, 10):
            image = index.open_image(number)
            assert image.size == (64, 64) and image.mode == "RGB"
    record = json.loads((data_set / "test.json").read_text())[3]
    assert record["id"] == "test_000003" and record["width"] == record["height"] == 64
    assert record["conversations"][1]["value"].startswith(f"{record['caption_short']} ")
    assert record["caption_short"].count(".") == 1
    index = open_dataset(data_set / "test.json")
    assert index[3].caption_short == record["caption_short"]


def test_captions_have_three_to_eight_sentences_and_differ(data_set: Path) -> None:
    captions = _captions(data_set, "train") + _captions(data_set, "test")
    sentences = [re.split(r"(?<=[.!?])\s+", text) for text in captions]
    assert {len(parts) for parts in sentences} == set(range(3, 9))
    assert all(part[0].isupper() and part.endswith(".") for parts in sentences for part in parts)
    assert len(set(captions)) == len(captions) == 100
    assert not re.search(r" {2}|\ba [aeiou]|\bAn? an? ", " ".join(captions))


def test_the_same_arguments_give_the_same_bytes_for_any_workers(
    data_set: Path, tmp_path: Path
) -> None:
    for workers in (2, 5):
        out = tmp_path / str(workers)
        synthesize(out, num=70, held_out=30, workers=workers, progress=False)
        assert _files(out) == {k: v for k, v in _files(data_set).items() if "index" not in k}


def test_it_is_the_same_where_processes_are_spawned(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: spawn)
    synthesize(tmp_path, num=5, held_out=30, workers=2, progress=False)
    assert (tmp_path / "test.json").read_bytes() == (data_set / "test.json").read_bytes()
    for image in (tmp_path / "images").rglob("*.png"):
        assert image.read_bytes() == (data_set / image.relative_to(tmp_path)).read_bytes()


def test_another_seed_gives_another_set_and_more_keeps_what_was(
    data_set: Path, tmp_path: Path
) -> None:
    synthesize(tmp_path / "more", num=75, held_out=30, resolution=16, workers=1, progress=False)
    assert _captions(tmp_path / "more", "test") == _captions(data_set, "test")
    assert _captions(tmp_path / "more", "train")[:70] == _captions(data_set, "train")
    synthesize(
        tmp_path / "seed", num=70, held_out=0, seed=1, resolution=16, workers=1, progress=False
    )
    assert not set(_captions(tmp_path / "seed", "train")) & set(_captions(data_set, "train"))
    assert json.loads((tmp_path / "seed" / "test.json").read_text()) == []


def test_no_scene_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list(draw_scenes(1000, held_out=1000))
    assert [one.split for one in drawn] == ["test"] * 1000 + ["train"] * 1000
    assert len({one.scene for one in drawn}) == 2000

    # The second draw is the scene of the first, so that it is drawn once more.
    first, second = (one.scene for one in drawn[:2])
    scenes = iter([first, first, second])
    monkeypatch.setattr(synth, "draw_scene", lambda rng: next(scenes))
    again = list(draw_scenes(2))
    assert [one.scene for one in again] == [first, second]
    assert [one.seed for one in again] == ["0/train/0/0/render", "0/train/1/1/render"]


def test_a_caption_tells_all_of_its_scene() -> None:
    # What a scene is can be read back from the words, so that no two scenes share a caption.
    for scene, rng in _scenes(500):
        sentences = [sentence.lower() for sentence in caption(scene, rng)]
        overview, largest, *others = sentences
        assert 3 <= len(sentences) <= 8
        assert f" {scene.wall} wall" in f" {overview}" and f"{scene.floor} floor" in overview
        named = [f"{scene.things[0].colour} {noun}" for noun in NOUNS[scene.things[0].kind]]
        assert any(name in overview for name in named)
        for thing, sentence in zip(scene.things, [largest, *others], strict=False):
            assert any(noun in sentence for noun in NOUNS[thing.kind])
            assert any(place in sentence for place in PLACES[thing.place])
            for texture, words in TEXTURES.items():
                said = any(f"{word} " in sentence for word in words)
                assert said == (texture == thing.texture != "plain")
            if thing != scene.things[0]:
                assert any(size in sentence for size in SIZES[thing.size][1])
                assert f"{thing.colour} " in sentence
        text = " ".join(sentences[1 + len(scene.things) :])
        for pattern, words in PATTERNS.items():
            assert any(word in text for word in words) == (pattern == scene.pattern != "plain")
        assert ("frame" in text or "border" in text) == (scene.frame is not None)
        assert ("rail" in text or "skirting" in text) == (scene.rail is not None)
        assert ("outline" in text) == (scene.things[0].outline is not None)


def test_a_scene_has_one_largest_object_and_places_of_their_own() -> None:
    counts, kinds = set(), set()
    for scene, _ in _scenes(500):
        sizes = [thing.size for thing in scene.things]
        assert sizes[0] == "large" and "large" not in sizes[1:]
        assert sizes[1:] == sorted(sizes[1:])  # medium before small
        assert len({thing.place for thing in scene.things}) == len(scene.things)
        assert len({thing.kind for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            behind = GROUNDS[scene.floor if thing.place // 3 == FLOOR_ROW else scene.wall]
            assert math.dist(HUES[thing.colour], behind) > 100
        assert math.dist(GROUNDS[scene.wall], GROUNDS[scene.floor]) > 50
        counts.add(len(scene.things))
        kinds |= {thing.kind for thing in scene.things}
    assert counts == {2, 3, 4, 5}
    assert kinds == set(NOUNS) == set(PARTS) and len(kinds) > 40


def _pixels(scene: Scene, seed: int = 0) -> numpy.ndarray:
    return numpy.asarray(render(scene, random.Random(seed), 64)).astype(int)


def _centre(mask: numpy.ndarray) -> tuple[float, float]:
    y, x = (axis.mean() / 64 for axis in numpy.nonzero(mask))
    return x, y


@pytest.mark.parametrize("kind", NOUNS)
def test_a_picture_shows_its_object_in_colour_size_and_place(kind: str) -> None:
    areas = []
    for size in ("small", "medium", "large"):
        for place in range(9):
            scene = Scene("cream", "peach", (Thing(kind, "blue", size, place),))
            pixels = _pixels(scene, place)
            blue = pixels[..., 2] - pixels[..., 0] > 60
            row, column = divmod(place, 3)
            x, y = _centre(blue)
            assert abs(x - (0.2 + 0.3 * column)) < 0.08 and abs(y - (0.2 + 0.3 * row)) < 0.08
            assert not blue[[0, -1]].any() and not blue[:, [0, -1]].any()  # nothing is cut off
        areas.append(int(blue.sum()))
    assert all(b > 1.4 * a for a, b in pairwise(areas)), areas


def test_kinds_look_different() -> None:
    # Large, in one place and colour: of two kinds, a twentieth of their area at least differs.
    shown = {}
    for kind in NOUNS:
        pixels = _pixels(Scene("cream", "peach", (Thing(kind, "blue", "large", 4),)))
        shown[kind] = pixels[..., 2] - pixels[..., 0] > 60
    for a, b in combinations(NOUNS, 2):
        differ = (shown[a] ^ shown[b]).sum() / (shown[a] | shown[b]).sum()
        assert differ > 1 / 20, (a, b, differ)


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_and_an_outline_change_the_object_alone(texture: str) -> None:
    def shown(**changes: str) -> numpy.ndarray:
        thing = Thing("square", "blue", "large", 4)._replace(**changes)
        return _pixels(Scene("cream", "peach", (thing,)))

    plain, textured = shown(), shown(texture=texture)
    differs = (plain != textured).any(-1)
    assert differs.sum() == 0 if texture == "plain" else differs.sum() > 50
    outlined = shown(texture=texture, outline="black")
    assert (outlined < 60).all(-1).sum() > 100  # the object keeps its place and size
    blue = plain[..., 2] - plain[..., 0] > 60
    for other in (textured, outlined):
        assert not ((plain != other).any(-1) & ~blue)[:, :18].any()


def test_a_relation_is_that_of_the_picture() -> None:
    for first, second in permutations(range(9), 2):
        things = Thing("circle", "red", "small", first), Thing("circle", "blue", "small", second)
        pixels = _pixels(Scene("cream", "cream", things))
        red, blue = pixels[..., 0] - pixels[..., 2] > 90, pixels[..., 2] - pixels[..., 0] > 60
        (x, y), (other_x, other_y) = _centre(red), _centre(blue)
        words = relation(things[0], things[1]).split()
        assert ("right" in words) == (x - other_x > 0.1)
        assert ("left" in words) == (other_x - x > 0.1)
        assert ("below" in words) == (y - other_y > 0.1)
        assert ("above" in words) == (other_y - y > 0.1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_a_frame_and_a_rail_change_wall_and_edges_alone(pattern: str) -> None:
    things = (Thing("square", "red", "medium", 4),)
    plain = _pixels(Scene("sand", "navy blue", things, pattern))
    framed = _pixels(Scene("sand", "navy blue", things, pattern, "blue"))
    railed = _pixels(Scene("sand", "navy blue", things, pattern, None, "red"))
    assert (plain == framed)[4:-4, 4:-4].all()
    assert (framed[0] == HUES["blue"]).all() and (framed[:, -1] == HUES["blue"]).all()
    corner = plain[:16, :16].reshape(-1, 3)
    assert (len(numpy.unique(corner, axis=0)) == 1) == (pattern == "plain")
    assert (plain[44:] == GROUNDS["navy blue"]).all()
    changed = (plain != railed).any(-1)
    assert changed[40:42].all() and not changed[:38].any() and not changed[44:].any()


def _effective_rank(vectors: numpy.ndarray) -> float:
    """exp of the entropy of the shares of variance (Roy and Vetterli, 2007)."""
    variances = numpy.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    shares = variances[variances > 1e-12 * variances[0]] / variances.sum()
    return float(numpy.exp(-(shares * numpy.log(shares)).sum()))


def test_texts_of_a_batch_have_many_directions() -> None:
    # Bags of words of 128 captions, and of their first sentences.
    assert _effective_rank(numpy.eye(5)) == pytest.approx(4)  # centring takes one direction
    drawn = list(draw_scenes(512))
    words = sorted({word for one in drawn for word in " ".join(one.sentences).lower().split()})
    for parts in (1, None):
        bags = [Counter(" ".join(one.sentences[:parts]).lower().split()) for one in drawn]
        counts = numpy.array([[bag[word] for word in words] for bag in bags], dtype=float)
        counts /= numpy.linalg.norm(counts, axis=1, keepdims=True)
        for batch in counts.reshape(4, 128, -1):
            assert _effective_rank(batch) > 30


BAD = {
    "num": ({"num": 0}, "num: expected 1 to 10000000, got 0"),
    "held_out": ({"held_out": -1}, "held_out: expected 0 to 10000000, got -1"),
    "seed": ({"seed": -1}, "seed: expected 0 to"),
    "resolution": ({"resolution": 8}, "resolution: expected 16 to 1024, got 8"),
    "workers": ({"workers": 0}, "workers: expected 1 to 1024, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    arguments, message = BAD[name]
    with pytest.raises(HimoError, match=message):
        synthesize(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    options = {"held_out": 2, "resolution": 16, "workers": 1, "progress": False}
    with pytest.raises(HimoError, match=r"is not empty; --overwrite replaces the data set in it"):
        synthesize(tmp_path, 4, **options)
    synthesize(tmp_path, 4, overwrite=True, **options)
    mine = tmp_path / "images" / "train" / "mine.png"
    mine.write_bytes(b"x")

    synthesize(tmp_path, 2, overwrite=True, **options)

    names = sorted(path.name for path in (tmp_path / "images" / "train").iterdir())
    assert names == ["000000.png", "000001.png", "mine.png"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(HimoError, match=r"notes.txt: cannot be written: "):
        synthesize(tmp_path / "notes.txt", 2, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_cannot_be_written_is_one_error_without_a_list(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)  # reaches the workers, which are forked
    with pytest.raises(HimoError, match=r"0.png: cannot be written: no space left on device"):
        synthesize(tmp_path, 4, held_out=0, workers=workers, progress=False)
    assert not list(tmp_path.glob("*.json"))


def _start(out: Path, num: int) -> "subprocess.Popen[bytes]":
    code = f"import himo.synth; himo.synth.synthesize({str(out)!r}, {num}, workers=2)"
    path = str(Path(himo.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_that_is_killed_leaves_no_list_and_no_process(tmp_path: Path) -> None:
    run = _start(tmp_path / "out", 4_000)
    _wait_for(lambda: len(list(tmp_path.glob("out/images/test/*.png"))) > 5)
    workers = _children(run.pid)
    run.kill()
    run.wait()

    assert len(workers) == 2
    _wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_worker_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    run = _start(tmp_path / "out", 4_000)
    _wait_for(lambda: len(list(tmp_path.glob("out/images/test/*.png"))) > 5)
    workers = _children(run.pid)
    os.kill(workers[1], signal.SIGKILL)

    assert run.wait(timeout=240) != 0
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in workers)
    assert not list((tmp_path / "out").glob("*.json"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    defaults = parser.parse_args(["--out", "x"])
    assert (defaults.num, defaults.held_out, defaults.seed, defaults.resolution) == (
        2000,
        500,
        0,
        64,
    )
    arguments = ["--out", str(tmp_path / "a"), "--num", "9", "--held-out", "3", "--workers", "1"]

    assert synth.run(parser.parse_args([*arguments, "--resolution", "32"])) == 0

    assert len(open_dataset(tmp_path / "a" / "train.json")) == 9
    output = capsys.readouterr()
    assert output.out.startswith(
        f"{tmp_path}/a: 9 images in train.json and 3 in test.json, 32 pixels square, in "
    )
    assert "render: 100%" in output.err
