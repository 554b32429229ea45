"""What is measured: one Case per cell, and the cells of a full run on each kind of device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

SPECTRA = ("power-law", "flat", "duplicates")  # duplicates: every caption occurs twice
PRESETS = ("paper", "official")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MODES = ("fwd", "fwd+bwd")
# Of info_nce_pairs: one direction; with a hard negative a row; four rows a label, which are
# positives, or neither positive nor negative; and SimCLR's two views of each sample, which the loss
# normalises.
FORMS = ("rows", "negatives", "labels", "exclude", "simclr")

# The fields that identify a cell of an operator, in addition to sizes and dtype.
OPTIONS = {
    "covariance": ("spectrum",),
    "gram": ("spectrum",),
    "pca_reconstruct": ("spectrum", "tau"),
    "normalize": ("spectrum",),
    "info_nce": ("preset",),
    "dual_info_nce": ("preset",),
    "dual_info_nce_low_rank": ("preset", "share"),
    "info_nce_pairs": ("form",),
    "sigmoid_loss": ("spectrum",),
    "himo_loss": ("preset", "spectrum"),
}


@dataclass(frozen=True)
class Case:
    """One cell: an operator on one shape, dtype and configuration. Every candidate runs on it."""

    op: str
    N: int  # samples
    D: int = 768  # features
    B: int = 1  # independent problems
    dtype: str = "float32"
    spectrum: str = "power-law"  # of the text features
    tau: float = 0.9  # variance threshold of the PCA, as in the paper
    preset: str = "paper"  # smoothing 0, gradients to both sides; official: 0.1, one side
    form: str = "rows"  # of info_nce_pairs
    share: float = 0.25  # inner dimension of the low-rank form, as a share of D
    modes: tuple[str, ...] = MODES
    memory: bool = False  # measure peak extra memory (always done on a GPU, where it is free)
    compile: bool = True  # also torch.compile the baselines, 5 to 20 s each
    timed: bool = True  # False: one run for its memory, no repetition
    only: tuple[str, ...] = ()  # names of candidates; empty: all
    priority: int = 1  # 0 is measured first; cells beyond the budget are left out

    @property
    def config(self) -> str:
        """The options that matter for this operator, as the rows spell them."""
        return " ".join(f"{name}={getattr(self, name)}" for name in OPTIONS[self.op])

    @property
    def size(self) -> str:
        """B x N x D for display, without B if it is 1."""
        return " x ".join(str(n) for n in (self.B, self.N, self.D) if (n, self.B) != (1, 1))

    @property
    def inner(self) -> int:
        """Inner dimension of the component features of the losses."""
        return max(1, round(self.share * self.D))


def full_run(device: str) -> list[Case]:
    """The cells of `--all`, the most important first."""
    cases = list(_cpu() if device == "cpu" else _cuda())
    return sorted(cases, key=lambda case: case.priority)  # stable: keeps the order within one


def _cpu() -> Iterator[Case]:
    for n, d in ((128, 768), (1024, 768), (1024, 512), (4096, 768)):
        yield Case("pca_reconstruct", n, d, memory=n >= 1024, priority=0)
    for n in (128, 1024, 4096):
        yield Case("himo_loss", n, memory=n >= 1024, priority=0)
        yield Case("dual_info_nce", n, memory=n >= 1024, priority=0)
        yield Case("dual_info_nce", n, dtype="bfloat16", memory=n >= 1024, priority=0)
    once = {"modes": ("fwd+bwd",), "memory": True, "timed": False, "compile": False}
    yield Case("dual_info_nce", 16384, **once)
    # N x N logits do not fit, as the released row shows; other libraries' losses take minutes.
    large = {"dtype": "bfloat16", "only": ("cpu", "released"), "priority": 3}
    yield Case("dual_info_nce", 65536, **once, **large)
    for n in (256, 512, 2048, 8192):
        yield Case("pca_reconstruct", n, modes=("fwd+bwd",))
    for n in (256, 512, 2048):
        yield Case("dual_info_nce", n)
        yield Case("dual_info_nce", n, dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        yield Case("dual_info_nce", 8192, dtype=dtype, modes=("fwd+bwd",), memory=True)
        yield Case("info_nce", 1024, dtype=dtype)
        yield Case("himo_loss", 1024, dtype=dtype, preset="official")
        yield Case("dual_info_nce", 1024, dtype=dtype, preset="official")
    for spectrum in ("flat", "duplicates"):
        yield Case("pca_reconstruct", 1024, spectrum=spectrum, priority=2)
    for share in (0.1, 0.5):
        yield Case("dual_info_nce_low_rank", 1024, share=share, priority=2)
    for dtype in ("float32", "bfloat16"):
        yield Case("sigmoid_loss", 1024, dtype=dtype, memory=True)
        yield Case("sigmoid_loss", 8192, dtype=dtype, modes=("fwd+bwd",), memory=True)
        for form in FORMS:
            yield Case("info_nce_pairs", 1024, dtype=dtype, form=form, memory=True)
            options = {"modes": ("fwd+bwd",), "memory": True, "priority": 2}
            yield Case("info_nce_pairs", 8192, dtype=dtype, form=form, **options)
    yield Case("covariance", 1024, memory=True)
    yield Case("covariance", 4096, memory=True)
    yield Case("covariance", 128, B=8)
    yield Case("covariance", 1024, dtype="bfloat16")
    yield Case("gram", 128)
    yield Case("gram", 512, memory=True)
    yield Case("pca_reconstruct", 128, B=8)
    yield Case("normalize", 128)
    yield Case("normalize", 4096, memory=True)
    yield Case("normalize", 4096, dtype="bfloat16", memory=True)


def _cuda() -> Iterator[Case]:
    # Compiling the baselines of every cell would use up the ten minutes: only of these.
    compiled = {("himo_loss", 128), ("dual_info_nce", 4096), ("covariance", 4096)}
    for case in _cuda_cells():
        yield replace(case, compile=(case.op, case.N) in compiled and case.preset == "paper")


def _cuda_cells() -> Iterator[Case]:
    bf16 = {"dtype": "bfloat16"}
    yield Case("himo_loss", 128, **bf16, priority=0)
    yield Case("himo_loss", 1024, **bf16, priority=0)
    yield Case("pca_reconstruct", 128, priority=0)
    yield Case("pca_reconstruct", 1024, priority=0)
    yield Case("dual_info_nce", 32768, **bf16, priority=0)
    yield Case("dual_info_nce_low_rank", 32768, share=1 / 3, **bf16, priority=0)  # R = 256
    yield Case("covariance", 32768, **bf16, priority=0)
    for n in (1024, 4096, 16384, 32768 + 37):
        yield Case("dual_info_nce", n, **bf16)
    yield Case("dual_info_nce", 4096)
    yield Case("dual_info_nce", 65536, modes=("fwd+bwd",), **bf16)
    yield Case("dual_info_nce", 4096, preset="official", **bf16)
    yield Case("info_nce", 4096, **bf16)
    yield Case("info_nce", 32768, **bf16)
    yield Case("sigmoid_loss", 4096, **bf16)
    yield Case("sigmoid_loss", 32768, **bf16)
    for form in FORMS:
        yield Case("info_nce_pairs", 8192, form=form, **bf16)
    yield Case("himo_loss", 128, preset="official", **bf16)
    yield Case("himo_loss", 4096, **bf16)
    for n, d in ((256, 768), (512, 512), (4096, 768), (4096, 1024), (32768, 768)):
        yield Case("pca_reconstruct", n, d)
    for b in (8, 64):
        yield Case("pca_reconstruct", 128, B=b)
    for spectrum in ("flat", "duplicates"):
        yield Case("pca_reconstruct", 1024, spectrum=spectrum)
    for share in (0.1, 0.5, 1.0):
        yield Case("dual_info_nce_low_rank", 16384, share=share, **bf16)
    yield Case("covariance", 128, B=64)
    yield Case("covariance", 4096)
    yield Case("gram", 128, B=64)
    yield Case("gram", 1024)
    yield Case("normalize", 128)
    yield Case("normalize", 4096, **bf16)
    yield Case("normalize", 32768, **bf16)
    for tau in (0.85, 0.95):
        yield Case("pca_reconstruct", 1024, tau=tau, priority=2)
    for d in (512, 640, 1024, 1152):
        yield Case("dual_info_nce", 8192, d, modes=("fwd+bwd",), priority=2, **bf16)
    yield Case("dual_info_nce", 131072, modes=("fwd+bwd",), priority=2, **bf16)


def product(op: str, **choices: list) -> list[Case]:
    """Every combination of the given values of a Case's fields, e.g. N=[128, 256]."""
    cases = [Case(op, N=0)]
    for name, values in choices.items():
        cases = [replace(case, **{name: value}) for case in cases for value in values]
    return cases
