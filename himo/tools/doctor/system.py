"""The machine of a training run: packages, devices, threads, memory, files and disk."""

import importlib.metadata
import math
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from himo.config import TrainConfig
from himo.device import usable_device
from himo.errors import HimoError
from himo.files import free_bytes
from himo.model import CLIPConfig, HiMoCLIP
from himo.precision import resolve
from himo.tools.doctor.check import Check, size
from himo_kernels.extension import why_not as why_no_extension

_DISTRIBUTION = "himo-kernels"
_SHARED = Path("/dev/shm")
# DataLoader prefetches two batches for each worker; one more is in use.
_PREFETCHED = 2
_TENSORS = 4  # of a batch, each in a file of its own between processes
_OTHER_FILES = 128  # 64 open shards, and the files of Python, torch and the log


def packages() -> Iterator[Check]:
    """The packages of the extra `himo`, against the versions that it asks for."""
    names = ("numpy", "pillow", "ftfy", "regex", "safetensors", "tqdm")
    needed = dict.fromkeys(names, "") | _least_versions()
    for name, least in needed.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "problem", f'is not installed: pip install "{name}>={least or 0}"')
            continue
        if _numbers(version) < _numbers(least):
            found = f'{version}, expected {least} or later: pip install -U "{name}>={least}"'
            yield Check(name, "problem", found)
        else:
            yield Check(name, "ok", version)


def extension() -> Check:
    """Whether the compiled operators are there."""
    reason = why_no_extension()
    if reason is None:
        return Check("extension", "ok", "loaded, operators on a CPU are compiled ones")
    return Check("extension", "warning", f"operators run in plain PyTorch: {reason}")


def device(settings: TrainConfig) -> Check:
    """The device that --device means."""
    try:
        target = usable_device(settings.device)
    except HimoError as error:
        return Check("device", "problem", f"--device: {error}; --device auto takes what there is")
    if target.type == "cuda":
        properties = torch.cuda.get_device_properties(target)
        free, total = torch.cuda.mem_get_info(target)
        memory = f"{size(free)} of {size(total)} free"
        if free < total / 2:
            advice = "another process holds the rest: end it, or choose --device cuda:N"
            return Check("device", "warning", f"{target}, {properties.name}, {memory}; {advice}")
        return Check("device", "ok", f"{target}, {properties.name}, {memory}")
    if settings.device == "auto":
        why = "this torch is built without CUDA: with a GPU here, install torch for CUDA"
        if built := torch.version.cuda:
            advice = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
            why = f"torch is built for CUDA {built} and sees no GPU: {advice}"
        return Check("device", "warning", f"cpu; {why}")
    return Check("device", "ok", str(target))


def threads(settings: TrainConfig) -> Check:
    """The threads of torch and the workers, against the cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    count = settings.threads or torch.get_num_threads()
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
    given = [f"{name}={os.environ[name]}" for name in variables if name in os.environ]
    found = f"{count} of torch and {settings.workers} workers on {cores} cores"
    if given:
        found += f"; {', '.join(given)}"
    if count > cores:
        return Check("threads", "warning", f"{found}: more than the cores, try --threads {cores}")
    if settings.workers > cores:
        return Check("threads", "warning", f"{found}: try --workers {cores}")
    return Check("threads", "ok", found)


def precision(settings: TrainConfig) -> Check:
    """The precision that --precision means on the device."""
    try:
        target = usable_device(settings.device)
    except HimoError:
        return Check("precision", "ok", f"{settings.precision}, not tried: no such device")
    chosen, said = resolve(settings.precision, target)
    if chosen == "fp32" and settings.precision == "amp_bf16":
        return Check("precision", "warning", f"--precision amp_bf16: {said}")
    return Check("precision", "ok", said or chosen)


def shared_memory(settings: TrainConfig, config: CLIPConfig) -> Check:
    """/dev/shm, through which workers pass their batches."""
    if not settings.workers:
        return Check("shared memory", "ok", "no workers need it")
    rows = settings.batch_size * settings.accum_freq
    # uint8 pixels, int32 tokens, and two int64: row and reason.
    batch = rows * (3 * config.image_resolution**2 + 4 * config.context_length + 2 * 8)
    needed = (_PREFETCHED * settings.workers + 1) * batch
    wanted = f"{settings.workers} workers hold up to {size(needed)} of batches"
    if not _SHARED.is_dir():
        return Check("shared memory", "problem", f"no {_SHARED}, {wanted}: --workers 0 needs none")
    free = free_bytes(_SHARED)
    found = f"{size(free)} free in {_SHARED}, {wanted}"
    if free < needed:
        advice = "fewer --workers, or more of it (docker run --shm-size=8g, or --ipc=host)"
        return Check("shared memory", "problem", f"{found}: {advice}")
    return Check("shared memory", "ok", found)


def open_files(settings: TrainConfig) -> Check:
    """The limit on open files; each tensor between processes is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OTHER_FILES + _TENSORS * (_PREFETCHED * settings.workers + 1)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"a limit of {soft}"
    found = f"{limit}, a run with {settings.workers} workers opens about {needed}"
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = "unlimited" if hard == resource.RLIM_INFINITY else hard
        return Check("open files", "problem", f"{found}: ulimit -n {most}, or fewer --workers")
    return Check("open files", "ok", found)


def disk(settings: TrainConfig, config: CLIPConfig) -> Check:
    """Room at --logs for the checkpoints of the run, float32."""
    place = Path(settings.logs).absolute()
    try:
        while not _exists(place):
            place = place.parent
    except OSError as error:
        return Check("disk", "problem", f"--logs {settings.logs}: {error.strerror}")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = f"--logs {settings.logs}: {place} is no directory that can be written to"
        return Check("disk", "problem", found)
    with torch.device("meta"):
        model = sum(parameter.nbytes for parameter in HiMoCLIP(config).parameters())
    saves = math.ceil(settings.epochs / settings.save_frequency)
    if settings.keep_checkpoints:  # and one more, before the oldest goes
        saves = min(saves, settings.keep_checkpoints) + 1
    # Each is the model, and a state with it and AdamW's two moments; and there is a best model.
    needed = (4 * saves + 1) * model
    free = free_bytes(place)
    found = f"{size(free)} free at --logs {settings.logs}, checkpoints take up to {size(needed)}"
    if free < needed:
        advice = "another --logs, a larger --save-frequency or --keep-checkpoints 1"
        return Check("disk", "problem", f"{found}: {advice}")
    return Check("disk", "ok", found)


def _exists(path: Path) -> bool:
    # Path.exists returns False or raises, depending on Python's version, for a name too long or a
    # directory that may not be searched.
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _least_versions() -> dict[str, str]:
    # As in pyproject.toml: 'pillow>=13.0.0; extra == "himo"'.
    try:
        required = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return {}
    pattern = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)\s*;\s*extra\s*==\s*['\"]himo['\"]")
    return {m[1].lower(): m[2] for m in map(pattern.match, required) if m is not None}


def _numbers(version: str) -> list[int]:
    # Without trailing zeros: 13.0 is 13.0.0.
    return [int(part) for part in re.findall(r"\d+", re.sub(r"(\.0+)+$", "", version))]
