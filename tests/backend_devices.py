"""The devices on which the tests run a backend."""


def devices_of(backend: str) -> tuple[str, ...]:
    """Returns "cpu", "cuda" or both: only devices on which some machine can run the backend.

    Triton on a CPU is its interpreter, seconds a call: the test_*_triton.py files run it there.
    """
    return {"cpu": ("cpu",), "triton": ("cuda",)}.get(backend, ("cpu", "cuda"))
