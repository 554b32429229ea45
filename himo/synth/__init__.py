"""Renders a synthetic data set: `himo synth --out DIR`.

It writes `DIR/images/{train,test}/*.png` and, last, `DIR/train.json` and `DIR/test.json` in the
form of ShareGPT4V. The same arguments give the same bytes on any number of processes.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from himo.errors import HimoError
from himo.files import os_reason, write_text
from himo.synth.drawing import render
from himo.synth.scenes import Scene, caption, draw_scene

_SPLITS = ("test", "train")  # test first: for a seed it is the same whatever the size of train
_RESOLUTIONS = (16, 1024)
_MAX_IMAGES = 10_000_000
_IMAGE_NAME = re.compile(r"\d{6,}\.png")
_REPORT_EVERY = 16  # images, from a worker to the progress bar


class DrawnScene(NamedTuple):
    """A scene of a data set, and the sentences of its caption."""

    split: str  # "test" or "train"
    number: int  # in its split
    scene: Scene
    sentences: list[str]
    seed: str  # of the exact positions and angles, which a caption does not tell

    @property
    def path(self) -> str:
        """The path of its picture below the data set's directory."""
        return f"images/{self.split}/{self.number:06}.png"


def synthesize(
    out: str | os.PathLike[str],
    num: int = 2000,
    seed: int = 0,
    resolution: int = 64,
    workers: int | None = None,
    held_out: int = 500,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a data set of rendered scenes, all of them different, in both splits together.

    Args:
        out: the directory, new or empty.
        num: scenes to train on.
        seed: of everything random.
        resolution: pixels of a side, 16 to 1024.
        workers: processes that render; by default one for each core that this one may use.
        held_out: further scenes, for evaluation.
        overwrite: replaces a data set in `out`; other files there stay.
        progress: shows a bar.

    Raises:
        HimoError: an argument out of range, a directory that is not empty, a full disk.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value, low, high in (
        ("num", num, 1, _MAX_IMAGES),
        ("held_out", held_out, 0, _MAX_IMAGES),
        ("seed", seed, 0, 2**63 - 1),
        ("resolution", resolution, *_RESOLUTIONS),
        ("workers", workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise HimoError(f"{name}: expected {low} to {high}, got {value}")
    folder = Path(out)
    _prepare(folder, overwrite)

    drawn = list(draw_scenes(num, seed, held_out))
    _render_all(drawn, folder, resolution, min(workers, len(drawn)), progress)
    for split in _SPLITS:
        lines = [_record(one, resolution) for one in drawn if one.split == split]
        text = ",\n".join(lines)
        write_text(folder / f"{split}.json", f"[\n{text}\n]\n" if lines else "[]\n")


def draw_scenes(num: int, seed: int = 0, held_out: int = 0) -> Iterator[DrawnScene]:
    """Yields the scenes of `synthesize`, those held out first, without their pictures."""
    seen: set[Scene] = set()
    for split, count in zip(_SPLITS, (held_out, num), strict=True):
        for number in range(count):
            attempt, scene = 0, None
            while scene is None or scene in seen:
                # A text as seed: its digest is the same in every process and version of Python.
                name = f"{seed}/{split}/{number}/{attempt}"
                rng = random.Random(name)
                scene = draw_scene(rng)
                attempt += 1
            seen.add(scene)
            yield DrawnScene(split, number, scene, caption(scene, rng), f"{name}/render")


def _prepare(folder: Path, overwrite: bool) -> None:
    """Makes the directories, and removes an earlier data set from them."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not overwrite:
                raise HimoError(f"{folder}: is not empty; --overwrite replaces the data set in it")
            # The lists of images first: without them there is no data set until the new one.
            for split in _SPLITS:
                (folder / f"{split}.json").unlink(missing_ok=True)
            for split in _SPLITS:
                for image in (folder / "images" / split).glob("*.png"):
                    if _IMAGE_NAME.fullmatch(image.name):
                        image.unlink()
        for split in _SPLITS:
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HimoError(f"{folder}: cannot be written: {os_reason(error)}") from error


def _record(drawn: DrawnScene, resolution: int) -> str:
    """A record of ShareGPT4V, as JSON."""
    record = {
        "id": f"{drawn.split}_{drawn.number:06}",
        "image": drawn.path,
        "width": resolution,
        "height": resolution,
        "conversations": [
            {"from": "human", "value": "Describe the picture, from general to detailed.\n<image>"},
            {"from": "gpt", "value": " ".join(drawn.sentences)},
        ],
        "caption_short": drawn.sentences[0],  # of `himo train --short-captions`
    }
    return json.dumps(record)


def _render_all(
    drawn: Sequence[DrawnScene], folder: Path, resolution: int, workers: int, progress: bool
) -> None:
    context = multiprocessing.get_context()
    running: dict[Connection, BaseProcess] = {}
    try:
        # Before the bar, which starts a thread: a process should fork without threads.
        for worker in range(workers if workers > 1 else 0):
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_work,
                args=(sender, drawn[worker::workers], folder, resolution),
                daemon=True,
            )
            process.start()
            running[receiver] = process
            sender.close()  # so that the pipe ends when the worker does
        with tqdm(total=len(drawn), desc="render", unit=" images", disable=not progress) as bar:
            if running:
                _follow(running, bar.update)
            else:
                for one in drawn:
                    _render(one, folder, resolution)
                    bar.update()
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _follow(running: dict[Connection, BaseProcess], advance: Callable[[int], object]) -> None:
    """Waits until every worker has finished; HimoError if one fails or dies."""
    open_pipes = set(running)
    while open_pipes:
        for pipe in multiprocessing.connection.wait(list(open_pipes)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError:
                running[pipe].join()
                if running[pipe].exitcode != 0:
                    raise HimoError(
                        f"a rendering process ended with status {running[pipe].exitcode}, "
                        "not 0: was it killed for memory?"
                    ) from None
                open_pipes.remove(pipe)
                continue
            if isinstance(message, str):
                raise HimoError(message)
            advance(message)


def _work(sender: Connection, drawn: Sequence[DrawnScene], folder: Path, resolution: int) -> None:
    """Renders the scenes of one process; sends how many more are done, or an error message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    parent = multiprocessing.parent_process()
    for done, one in enumerate(drawn, start=1):
        if parent is None or not parent.is_alive():
            return  # it was killed, so the rest is not needed
        try:
            _render(one, folder, resolution)
        except HimoError as error:
            sender.send(str(error))
            return
        if done % _REPORT_EVERY == 0:
            sender.send(_REPORT_EVERY)
    sender.send(len(drawn) % _REPORT_EVERY)


def _render(drawn: DrawnScene, folder: Path, resolution: int) -> None:
    image, path = render(drawn.scene, random.Random(drawn.seed), resolution), folder / drawn.path
    try:
        image.save(path, "PNG")
    except OSError as error:
        raise HimoError(f"{path}: cannot be written: {os_reason(error)}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `himo synth`."""
    parser.add_argument("--out", required=True, metavar="DIR", help="directory, new or empty")
    parser.add_argument("--num", type=int, default=2000, help="scenes to train on (%(default)s)")
    parser.add_argument(
        "--held-out", type=int, default=500, help="further scenes, for evaluation (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--resolution", type=int, default=64, help="pixels of a side (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes that render (one for each core)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a data set that is already there"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `himo synth`; the exit status."""
    start = time.perf_counter()
    synthesize(
        args.out,
        args.num,
        args.seed,
        args.resolution,
        args.workers,
        args.held_out,
        overwrite=args.overwrite,
    )
    seconds = time.perf_counter() - start
    print(
        f"{args.out}: {args.num} images in train.json and {args.held_out} in test.json, "
        f"{args.resolution} pixels square, in {seconds:.1f} s"
    )
    return 0
