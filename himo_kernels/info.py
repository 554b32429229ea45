"""What runs here: versions, devices, and for every operator and backend whether it runs or why not.

python -m himo_kernels.info
"""

import importlib.metadata
import platform

import torch

import himo_kernels
from himo_kernels import dispatch, extension


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _status(operator: dispatch.Operator, backend: str, x: torch.Tensor) -> str:
    reason = operator.why_not(backend, x)
    if reason is not None:
        return f"no: {reason}"
    found = operator.backends[backend]
    if found.auto:
        return "yes"
    return f"by name only: {found.gate}" if found.gate else "by name only"


def _choice(operator: dispatch.Operator, x: torch.Tensor) -> str:
    # resolve, not preferred, because HIMO_KERNELS_BACKEND may name a backend.
    try:
        return operator.resolve("auto", x)
    except (NotImplementedError, ValueError) as error:
        return f"nothing: {str(error).splitlines()[0]}"


def _eigensolver() -> str:
    try:
        choose = extension.load().eigensolver
    except AttributeError as error:
        return f"unknown: the extension was built from other sources ({error})"
    ours = next((n for n in range(2, 1025) if choose(n) == "himo"), None)
    if ours is None:
        return "LAPACK's; ours has not been measured on this kind of processor"
    return f"ours for n >= {ours}, LAPACK's below; n = min(N, D)"


def report() -> str:
    """Returns the whole report as text."""
    extension.notice()  # it is in the report, so the calls below need not warn
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    lines = [
        f"himo_kernels {himo_kernels.__version__}",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton       {_version('triton')}",
        f"extension    {extension.why_not() or 'loaded'}",
        f"cpu          {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
    ]
    if extension.why_not() is None:
        lines.append(f"eigensolver  {_eigensolver()}")
    for name in devices[1:]:
        properties = torch.cuda.get_device_properties(name)
        capability = f"sm_{properties.major}{properties.minor}"
        memory_gib = properties.total_memory / 2**30
        lines.append(f"{name:<12} {properties.name}, {capability}, {memory_gib:.0f} GiB")
    lines.append(f"{dispatch.BACKEND_VARIABLE} = {dispatch.default_backend()}")
    for name in dict.fromkeys(device.split(":")[0] for device in devices):
        x = torch.empty(512, 512, device=name)  # for small ones "auto" may choose the reference
        lines += ["", f"operators on {name} (float32, 512 x 512)"]
        for operator in dispatch.OPERATORS.values():
            lines.append(f"  {operator.name}: auto takes {_choice(operator, x)}")
            lines += [f"    {b:<10} {_status(operator, b, x)}" for b in dispatch.backend_names()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
