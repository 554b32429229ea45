"""The data set and its loader: bad images, workers, random state, resume (promises G19 and G13)."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from captioned_files import write_images, write_jsonl
from torch import Tensor

import himo.data
import himo.tokenizer
from himo.data import (
    BadSamples,
    CaptionedImages,
    EpochSampler,
    Sample,
    make_loader,
    open_dataset,
    worker_deaths,
)
from himo.data.dataset import REASONS
from himo.errors import HimoError
from himo.tokenizer import TextError
from himo.transforms import ImageError, Preprocess

COUNT, RESOLUTION = 48, 8


def _tokenize(text: str) -> Tensor:
    """The number in a caption, as the only token: tells which caption a sample has."""
    return torch.tensor([[int(text.split()[-1])]], dtype=torch.int32)


def _tokenize_slowly(text: str) -> Tensor:
    time.sleep(0.6)
    return _tokenize(text)


def _tokenize_and_die(text: str) -> Tensor:
    os._exit(3)


BROKEN = {3: "truncated", 17: "missing", 18: "corrupt", 31: "unknown_format", 40: "not_a_file"}


def _data_set(folder: Path, broken: bool = False, **options: object) -> CaptionedImages:
    names = write_images(folder, COUNT)
    rows = [(name, f"caption {number}") for number, name in enumerate(names)]
    index = open_dataset(write_jsonl(folder / "a.jsonl", rows))
    if broken:
        paths = [folder / name for name in names]
        data = paths[3].read_bytes()
        paths[3].write_bytes(data[:50])
        paths[17].unlink()
        paths[18].write_bytes(data[:40] + b"\xff" * 30 + data[70:])
        paths[31].write_text("no image")
        paths[40].unlink()
        os.mkfifo(paths[40])
    options = {"tokenize": _tokenize, **options}
    return CaptionedImages(index, Preprocess(RESOLUTION), **options)  # type: ignore[arg-type]


def _epoch(data: CaptionedImages, workers: int = 0, **options: object) -> list[Sample]:
    sampler = EpochSampler(len(data), 4, seed=1)
    options = {"max_bad_fraction": 0.2, **options}
    return list(make_loader(data, sampler, workers=workers, **options))  # type: ignore[arg-type]


def _equal(a: list[Sample], b: list[Sample]) -> bool:
    pairs = zip(chain(*a), chain(*b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


def test_a_batch_holds_images_tokens_and_where_they_come_from(tmp_path: Path) -> None:
    data = _data_set(tmp_path, tokenize=himo.tokenizer.tokenize)
    batches = _epoch(data)

    assert len(batches) == COUNT // 4
    for batch in batches:
        assert batch.image.dtype == torch.uint8 and batch.image.shape == (4, 3, 8, 8)
        assert batch.tokens.shape == (4, 248)
        assert batch.reason.tolist() == [0, 0, 0, 0]  # type: ignore[union-attr]
    rows = list(chain(*(batch.row.tolist() for batch in batches)))  # type: ignore[union-attr]
    assert sorted(rows) == list(range(COUNT))
    number = rows[5]
    expected = [number * 37 % 256, number * 91 % 256, number * 53 % 256]
    assert batches[1].image[1, :, 4, 4].tolist() == expected


def test_bad_images_are_replaced_and_counted_the_same_for_any_workers(tmp_path: Path) -> None:
    data = _data_set(tmp_path, broken=True)
    alone = _epoch(data)
    assert _equal(alone, _epoch(data, workers=2))
    assert _equal(alone, _epoch(pickle.loads(pickle.dumps(data))))

    bad = BadSamples(data.index, max_bad_fraction=0.2)
    for batch in [*alone, *alone]:  # a second epoch counts nothing again
        bad.update(batch)
        for image, tokens, row, reason in zip(*batch, strict=True):
            used = int(tokens)
            pixel = [used * 37 % 256, used * 91 % 256, used * 53 % 256]
            assert image[:, 4, 4].tolist() == pixel  # image and caption belong together
            assert (used == int(row)) == (int(reason) == 0)
            assert REASONS[int(reason)] == BROKEN.get(int(row), "good")
    assert bad.reasons == BROKEN
    assert bad.counts() == dict.fromkeys(BROKEN.values(), 1)
    assert bad.summary().startswith("5 of 48 samples could not be read (1 missing, 1 not_a_file,")
    assert f"{tmp_path}/a.jsonl:4: images/003.png" in bad.summary()

    again = BadSamples(data.index, max_bad_fraction=0.2)
    again.load_state_dict(bad.state_dict())
    assert again.reasons == bad.reasons


def _tokenize_but_7(text: str) -> Tensor:
    if text == "caption 7":
        raise TextError("text 'caption 7' cannot be read")
    return _tokenize(text)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_caption_that_cannot_be_read_is_counted_and_replaced(
    workers: int, tmp_path: Path
) -> None:
    data = _data_set(tmp_path, tokenize=_tokenize_but_7)
    bad = BadSamples(data.index, max_bad_fraction=0.05)
    for batch in _epoch(data, workers, max_bad_fraction=0.05):
        bad.update(batch)
        assert 7 not in batch.tokens
    assert bad.reasons == {7: "text"}
    with pytest.raises(HimoError, match=r"1 of 48 samples could not be read \(1 text\)"):
        _epoch(data, workers, max_bad_fraction=0)


def test_a_replacement_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    data = _data_set(tmp_path)
    drawn = [data.replacement(i, attempt) for i in range(COUNT) for attempt in range(8)]
    assert drawn == [data.replacement(i, attempt) for i in range(COUNT) for attempt in range(8)]
    assert all(0 <= x < COUNT for x in drawn) and len(set(drawn)) == COUNT
    assert all(data.replacement(i, 0) != i for i in range(COUNT))
    data.seed = 1
    assert drawn != [data.replacement(i, attempt) for i in range(COUNT) for attempt in range(8)]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run_with_one_line(workers: int, tmp_path: Path) -> None:
    data = _data_set(tmp_path, broken=True)
    with pytest.raises(HimoError) as error:
        _epoch(data, workers, max_bad_fraction=0.05)
    message = str(error.value)
    assert message.startswith(
        "too many bad samples, the limit is 5 % (--max-bad-fraction): 3 of 48 samples could not be"
    )
    assert "\n" not in message and "Traceback" not in message


def test_workers_stay_for_the_next_epoch_and_end_with_a_failure(tmp_path: Path) -> None:
    data = _data_set(tmp_path, broken=True)
    sampler = EpochSampler(COUNT, 4, seed=1)
    loader = make_loader(data, sampler, workers=2, max_bad_fraction=0.2)
    list(loader)
    workers = {child.pid for child in multiprocessing.active_children()}
    assert len(workers) == 2
    sampler.set_epoch(1)
    list(loader)
    assert {child.pid for child in multiprocessing.active_children()} == workers

    # Stopped half-way: the old ones end at once, although the frame of the failure is kept alive.
    sampler.set_epoch(2)
    start = time.monotonic()
    with pytest.raises(KeyError) as failure:
        for _ in loader:
            raise KeyError
    batches = iter(loader)
    next(batches)
    loader.bad.max_bad_fraction = 0
    with pytest.raises(HimoError) as bad:
        list(batches)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - start < 20  # a worker that must be killed takes 5 s and more
    assert failure.traceback and bad.traceback

    # And the loader can be used again.
    loader.bad.max_bad_fraction = 0.2
    sampler.set_epoch(3)
    assert len(list(loader)) == COUNT // 4


def test_a_process_with_workers_ends_at_once_and_quietly(tmp_path: Path) -> None:
    _data_set(tmp_path)
    code = f"""
from himo.data import CaptionedImages, EpochSampler, make_loader, open_dataset
from himo.tokenizer import tokenize
from himo.transforms import Preprocess
data = CaptionedImages(open_dataset({str(tmp_path / "a.jsonl")!r}), Preprocess(8), tokenize)
loader = make_loader(data, EpochSampler(len(data), 4), workers=2)
print(len(list(loader)), flush=True)
"""
    path = str(Path(himo.data.__file__).parents[2])
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == f"{COUNT // 4}\n"
    start = time.monotonic()
    _, errors = run.communicate(timeout=240)
    assert (run.returncode, errors) == (0, "")
    assert time.monotonic() - start < 8  # a worker that must be killed takes 10 s


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_gone_stops_the_run_at_once(workers: int, tmp_path: Path) -> None:
    data = _data_set(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(HimoError) as error:
        _epoch(data, workers, max_bad_fraction=1)
    message = str(error.value)
    assert message.startswith(
        "17 samples tried one after the other cannot be read, the last: image"
    )
    assert message.endswith("does not exist")


def test_reading_one_sample_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    data = _data_set(tmp_path, broken=True)
    for row, reason in BROKEN.items():
        with pytest.raises(ImageError) as error:
            data.image(row)
        assert error.value.reason == reason
    assert data.image(0).shape == (3, RESOLUTION, RESOLUTION)


def test_short_captions_are_taken_where_there_are_some(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    path = tmp_path / "a.csv"
    path.write_text("image,caption,caption_short\nimages/000.png,a 1,b 2\nimages/001.png,a 3,\n")
    for short, expected in ((False, [1, 3]), (True, [2, 3])):
        data = CaptionedImages(open_dataset(path), Preprocess(8), _tokenize, short_captions=short)
        assert [int(data.tokens(row)) for row in range(2)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_untouched(workers: int, tmp_path: Path) -> None:
    data = _data_set(tmp_path, broken=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _epoch(data, workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_within_an_epoch_goes_on_with_the_next_batch(
    workers: int, tmp_path: Path
) -> None:
    data = _data_set(tmp_path)
    expected = _epoch(data)
    sampler = EpochSampler(COUNT, 4, seed=1)
    batches = iter(make_loader(data, sampler, workers=workers))
    first = [next(batches) for _ in range(5)]
    state = sampler.state_dict()
    assert state["position"] == 20  # what the workers have ready is not counted

    resumed = EpochSampler(COUNT, 4, seed=1)
    resumed.load_state_dict(state)
    loader = make_loader(data, resumed, workers=workers)
    assert _equal(first + list(loader), expected)

    # The epoch is through; the next one has all its batches, in another order.
    assert list(loader) == []
    resumed.set_epoch(1)
    assert len(list(loader)) == len(loader) == COUNT // 4


def test_a_worker_that_hangs_or_dies_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HimoError, match=r"^loading stopped: DataLoader timed out after 0.5 sec"):
        _epoch(_data_set(tmp_path, tokenize=_tokenize_slowly), workers=1, timeout_s=0.5)
    with pytest.raises(HimoError, match=r"^loading stopped: DataLoader worker .* exited unexpec"):
        _epoch(_data_set(tmp_path, tokenize=_tokenize_and_die), workers=1)


def test_a_worker_killed_during_a_step_is_one_line(tmp_path: Path) -> None:
    data = _data_set(tmp_path)
    loader = make_loader(data, EpochSampler(COUNT, 4), workers=2)
    expected = (
        r"^loading stopped: DataLoader worker \(pid \d+\) is killed by signal: Killed; "
        r"where memory ran out, fewer --workers need less$"
    )
    with pytest.raises(HimoError, match=expected), worker_deaths():
        for _ in loader:
            multiprocessing.active_children()[0].kill()
            time.sleep(20)  # a step, which the death of the worker ends
    with pytest.raises(RuntimeError, match="another"), worker_deaths():
        raise RuntimeError("another")


def test_a_damaged_index_is_one_line_from_a_worker_too(tmp_path: Path) -> None:
    data = _data_set(tmp_path)
    path = Path(data.index.path)
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"#")
    for workers in (0, 1):
        with pytest.raises(HimoError) as error:
            _epoch(data, workers)
        assert str(error.value) == (
            f"{path}: is damaged at sample 0; remove it to have the index built again"
        )


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    data = _data_set(tmp_path)
    with pytest.raises(HimoError, match="workers: expected at least 0, got -1"):
        make_loader(data, EpochSampler(COUNT, 4), workers=-1)
    with pytest.raises(HimoError, match="sampler has 40 samples, the data set has 48"):
        make_loader(data, EpochSampler(40, 4))
    with pytest.raises(HimoError, match="max_bad_fraction: expected 0 to 1, got -1"):
        make_loader(data, EpochSampler(COUNT, 4), max_bad_fraction=-1)
