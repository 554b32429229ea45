"""himo_kernels.accelerate on other libraries' losses: their own values and gradients.

Each case runs the published loss, of the newest and the oldest version, before and after.
"""

import copy
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from upstream import open_clip_loss

import himo_kernels
from benchmarks.baselines import libraries
from benchmarks.baselines.libraries import VERSIONS
from himo_kernels.dispatch import OPERATORS
from himo_kernels.testing import assert_within_budget, relative_error

ROWS, FEATURES, WORDS, LENGTH = 24, 16, 60, 5
NEWEST = ("newest",)


@dataclass(frozen=True)
class Case:
    """A loss with settings, and its inputs."""

    name: str
    make: Callable[[str], Any]  # version -> a loss; None where its package is not installed
    inputs: Callable[[torch.Generator], list[Tensor]]  # [n, D] float64: what has a gradient
    call: Callable[..., Tensor]  # (loss, *inputs) -> value
    versions: Sequence[str] = VERSIONS
    operator: str = "info_nce_pairs"  # of this library, which computes it


def tables(*rows: int) -> Callable[[torch.Generator], list[Tensor]]:
    """One table for each number of rows; rows of a number are near each other."""

    def draw(generator: torch.Generator) -> list[Tensor]:
        options = {"generator": generator, "dtype": torch.float64}
        first = torch.randn(max(rows), FEATURES, **options)
        return [first[:n] + 0.7 * torch.randn(n, FEATURES, **options) for n in rows]

    return draw


def words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "defaults"


# sentence-transformers


class Encoder(nn.Module):
    """What these losses need of a SentenceTransformer: means of word vectors."""

    words: Tensor  # [WORDS, D]

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.words[features["input_ids"]].mean(1)}


def sentences(columns: int, cached: bool = False, versions=VERSIONS, **settings: Any) -> Case:
    name = "MultipleNegativesRankingLoss"
    name = f"Cached{name}" if cached else name

    def make(version: str) -> Any:
        package = libraries.sentence_transformers(version)
        if package is None:
            return None
        chosen = dict(settings)
        if "similarity_fct" in chosen:
            chosen["similarity_fct"] = getattr(package, chosen["similarity_fct"])
        if cached:
            chosen["mini_batch_size"] = 7  # which does not divide the number of rows
        return getattr(package, name)(Encoder(), **chosen)

    def call(loss: Any, table: Tensor) -> Tensor:
        loss.model.words = table
        drawn = torch.Generator().manual_seed(1)
        tokens = torch.randint(WORDS, (columns, ROWS, LENGTH), generator=drawn)
        tokens[:, :, 0] = tokens[0, :, 0]  # a query and its documents share a word
        mask = torch.ones_like(tokens[0])
        batches = [{"input_ids": ids, "attention_mask": mask} for ids in tokens]
        return loss(batches, torch.zeros(ROWS))

    # Both directions of a square batch are one operator.
    symmetric = settings.get("partition_mode") == "per_direction" and columns == 2
    operator = "info_nce" if symmetric else "info_nce_pairs"
    title = f"{name}, {columns} columns, {words(settings)}"
    return Case(title, make, tables(WORDS), call, versions, operator)


BOTH = ("query_to_doc", "doc_to_query")
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SENTENCES = [
    sentences(2),
    sentences(4),  # two hard negatives a query
    sentences(2, scale=0.3, similarity_fct="dot_score"),
    sentences(2, versions=NEWEST, directions=BOTH, partition_mode="per_direction"),
    sentences(3, versions=NEWEST, directions=BOTH, partition_mode="per_direction"),
    sentences(2, versions=NEWEST, directions=BOTH),
    sentences(3, versions=NEWEST, directions=("query_to_doc", "query_to_query")),
    sentences(2, versions=NEWEST, directions=GTE),
    sentences(3, versions=NEWEST, directions=GTE, scale=50),
    sentences(2, versions=NEWEST, hardness_mode="all_negatives"),  # of strength 0
    sentences(2, cached=True, versions=NEWEST),
    sentences(3, cached=True, versions=NEWEST, scale=50, directions=GTE),
    sentences(2, cached=True, versions=NEWEST, directions=BOTH, partition_mode="per_direction"),
    sentences(4, cached=True, versions=NEWEST, scale=0.3, similarity_fct="dot_score"),
]


# pytorch-metric-learning

PAIRS = torch.arange(ROWS) // 2  # every label twice
FEW = torch.arange(ROWS) % 5  # every label several times
SINGLES = torch.arange(ROWS) // 2 * (torch.arange(ROWS) % 3)  # 0 often, others twice or once


def metrics(
    name: str, labels: Tensor, refs: Tensor | None = None, versions=VERSIONS, **settings: Any
) -> Case:
    def make(version: str) -> Any:
        package = libraries.metric_learning(version)
        if package is None:
            return None
        chosen = {
            key: value(package) if callable(value) else value for key, value in settings.items()
        }
        return getattr(package.losses, name)(**chosen)

    def call(loss: Any, embeddings: Tensor, *of_refs: Tensor) -> Tensor:
        if refs is None:
            return loss(embeddings, labels)
        return loss(embeddings, labels, None, *of_refs, refs)

    rows = (ROWS,) if refs is None else (ROWS, len(refs))
    shown = {k: v(SimpleNames()) if callable(v) else v for k, v in settings.items()}
    counts = f"{labels.unique().numel()} labels, {'no' if refs is None else len(refs)} references"
    return Case(f"{name}, {counts}, {words(shown)}", make, tables(*rows), call, versions)


class SimpleNames:
    """Replaces a package; its attributes name the choices of a setting."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def __getattr__(self, name: str) -> "SimpleNames":
        return SimpleNames(name)

    def __call__(self, *arguments: Any, **settings: Any) -> str:
        return self.name


METRICS = [
    case
    for name in ("NTXentLoss", "SupConLoss")
    for case in (
        metrics(name, PAIRS),
        metrics(name, FEW, temperature=0.5),
        metrics(name, SINGLES),
        metrics(name, FEW, refs=torch.arange(7) % 4),  # label 4 has no reference
        metrics(name, FEW.int(), refs=FEW.int()),  # as many references as rows
        metrics(name, FEW, temperature=4.0, distance=lambda p: p.distances.DotProductSimilarity()),
        metrics(name, FEW, reducer=lambda p: p.reducers.ThresholdReducer(low=2.5)),
        metrics(name, SINGLES, reducer=lambda p: p.reducers.MeanReducer()),
        metrics(
            name,
            FEW,
            embedding_regularizer=lambda p: p.regularizers.LpRegularizer(),
            embedding_reg_weight=0.1,
        ),
    )
]


# lightly


def views(rows: int = ROWS, versions=VERSIONS, **settings: Any) -> Case:
    def make(version: str) -> Any:
        NTXentLoss = libraries.lightly(version)
        if NTXentLoss is None:
            return None
        loss = NTXentLoss(**settings)
        if version == "oldest" and settings:
            loss(*(x.float() for x in tables(8, 8)(torch.Generator())))  # draws its bank
        return loss

    def call(loss: Any, *outs: Tensor) -> Tensor:
        if isinstance(getattr(loss, "bank", None), Tensor):  # the oldest's is no buffer
            loss.bank = loss.bank.to(outs[0].dtype)
        return loss(*outs)

    title = f"lightly's NTXentLoss, {rows} rows, {words(settings)}"
    return Case(title, make, tables(rows, rows), call, versions)


VIEWS = [
    views(),
    views(temperature=0.07),
    views(rows=1),
    views(versions=NEWEST, memory_bank_size=(40, FEATURES)),
    views(versions=["oldest"], memory_bank_size=40),
    views(versions=NEWEST, memory_bank_size=(7, FEATURES), temperature=0.1),  # smaller than a batch
]


# GradCache


def queries(rows: int, keys: int, negatives: int = 0, **arguments: Any) -> Case:
    def make(version: str) -> Any:
        return libraries.grad_cache().SimpleContrastiveLoss(negatives)

    def call(loss: Any, x: Tensor, y: Tensor) -> Tensor:
        return loss(x, y, **arguments).sum()

    title = f"SimpleContrastiveLoss, {rows} x {keys}, {negatives} negatives, {list(arguments)}"
    return Case(title, make, tables(rows, keys), call, NEWEST)


QUERIES = [
    queries(ROWS, ROWS),
    queries(ROWS, 3 * ROWS, negatives=2),
    queries(ROWS, 10, target=torch.arange(ROWS) % 10),
    queries(ROWS, ROWS, reduction="sum"),
    queries(ROWS, 2 * ROWS, negatives=1, reduction="none"),
]


# open_clip


def captions(**settings: Any) -> Case:
    def make(version: str) -> Any:
        module = open_clip_loss()
        weights = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0} | settings
        return None if module is None else module.CoCaLoss(**weights)

    def call(loss: Any, image: Tensor, text: Tensor, of_tokens: Tensor) -> Tensor:
        labels = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % FEATURES
        logits = of_tokens.view(ROWS, LENGTH, FEATURES)
        named = loss(image, text, logits, labels, 3.0, output_dict=True)
        assert list(named) == ["contrastive_loss", "caption_loss"]
        both = loss(image, text, logits, labels, 3.0)
        assert both == tuple(named.values())
        return sum(both)

    operator = "" if settings.get("clip_loss_weight") == 0 else "info_nce"
    inputs = tables(ROWS, ROWS, ROWS * LENGTH)
    return Case(f"CoCaLoss, {words(settings)}", make, inputs, call, NEWEST, operator)


CAPTIONS = [
    captions(),
    captions(clip_loss_weight=0.5),
    captions(clip_loss_weight=0),
    captions(caption_loss_weight=0.0, pad_id=3),
]


def pairs(scale: float, bias: float | None, **settings: Any) -> Case:
    def make(version: str) -> Any:
        module = open_clip_loss()
        return None if module is None else module.SigLipLoss(**settings)

    def inputs(generator: torch.Generator) -> list[Tensor]:
        scalars = [torch.tensor(x, dtype=torch.float64) for x in (scale, bias) if x is not None]
        return [*tables(ROWS, ROWS)(generator), *scalars]

    def call(loss: Any, *given: Tensor) -> Tensor:
        given = given if bias is not None else (*given, None)
        named = loss(*given, output_dict=True)
        assert list(named) == ["contrastive_loss"] and named["contrastive_loss"] == loss(*given)
        return named["contrastive_loss"]

    title = f"SigLipLoss, scale {scale}, bias {bias}, {words(settings)}"
    return Case(title, make, inputs, call, NEWEST, "sigmoid_loss")


SIGMOIDS = [
    pairs(1.0, -5.0),
    pairs(0.1, 0.0, cache_labels=True),
    pairs(3.0, -10.0, dist_impl="gather"),
    pairs(1.0, None),
]

CASES = [*SENTENCES, *METRICS, *VIEWS, *QUERIES, *CAPTIONS, *SIGMOIDS]


@pytest.fixture(
    params=[(case, version) for case in CASES for version in case.versions],
    ids=lambda found: f"{found[0].name}, {found[1]}",
)
def case_and_loss(request: pytest.FixtureRequest) -> tuple[Case, Any]:
    case, version = request.param
    loss = case.make(version)
    if loss is None:
        pytest.skip(f"the {version} version of the package is not installed (make setup)")
    return case, loss


def step(case: Case, loss: Any, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients. The loss stays as it was: a memory bank changes at every call."""
    loss, leaves = copy.deepcopy(loss), [x.clone().requires_grad_() for x in inputs]
    if isinstance(loss, nn.Module):
        loss.to(inputs[0].dtype)
    value = case.call(loss, *leaves)
    value.backward()
    return value.detach(), [x.new_zeros(()) if x.grad is None else x.grad for x in leaves]


def test_values_and_gradients_in_float64(case_and_loss, generator, used):
    case, loss = case_and_loss
    inputs = case.inputs(generator)
    expected = step(case, loss, inputs)
    assert not used
    with himo_kernels.accelerate(loss):
        value, gradients = step(case, loss, inputs)
    assert set(used) == ({case.operator} if case.operator else set())
    assert relative_error(value, expected[0]) <= 1e-12
    for gradient, other in zip(gradients, expected[1], strict=True):
        assert relative_error(gradient, other) <= 1e-12
    again = step(case, loss, inputs)  # undone
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_values_and_gradients_in_float32(case_and_loss, generator):
    case, loss = case_and_loss
    inputs = [x.float() for x in case.inputs(generator)]
    exact = step(case, loss, [x.double() for x in inputs])
    eager = step(case, loss, inputs)
    himo_kernels.accelerate(loss)
    value, gradients = step(case, loss, inputs)
    assert value.dtype == torch.float32
    results = zip([value, *gradients], [eager[0], *eager[1]], [exact[0], *exact[1]], strict=True)
    for actual, of_eager, of_exact in results:
        assert_within_budget(case.name, actual, of_eager, of_exact, terms=4 * ROWS)


def test_the_named_backend_alone_computes(case_and_loss, generator, monkeypatch):
    case, loss = case_and_loss
    names = []
    for operator in OPERATORS.values():
        resolve = operator.resolve
        monkeypatch.setattr(
            operator,
            "resolve",
            lambda name, *tensors, resolve=resolve: names.append(name) or resolve(name, *tensors),
        )
    himo_kernels.accelerate(loss, backend="reference")
    step(case, loss, case.inputs(generator))
    assert set(names) == ({"reference"} if case.operator else set())


def test_twice_and_wrong_options_are_refused(case_and_loss):
    _, loss = case_and_loss
    before = dict(vars(loss))
    with pytest.raises(ValueError, match="accelerate: expected backend"):
        himo_kernels.accelerate(loss, backend="gpu")
    with pytest.raises(TypeError, match=r"expected options among .*, got \['preset'\]"):
        himo_kernels.accelerate(loss, preset="paper")
    assert vars(loss) == before
    handle = himo_kernels.accelerate(loss)
    with pytest.raises(ValueError, match="expected module with the .* of its class"):
        himo_kernels.accelerate(loss)
    handle.undo()
    handle.undo()
    assert vars(loss) == before


class TestRefused:
    """What a loss would compute otherwise, at once and, if changed later, at the call."""

    @pytest.mark.parametrize("name", ["", "Cached"])
    @pytest.mark.parametrize(
        "settings, words",
        [
            (
                {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
                "hardness_mode None, got 'all_negatives' of strength 5.0",
            ),
            (
                {"directions": ("query_to_doc", "doc_to_doc")},
                r"doc_to_query with doc_to_doc, got \['doc_to_doc', 'query_to_doc'\]",
            ),
            ({"similarity_fct": torch.cdist}, "cos_sim or dot_score, got cdist"),
        ],
    )
    def test_of_sentence_transformers(self, name, settings, words, generator):
        package = needed(libraries.sentence_transformers())
        make = getattr(package, f"{name}MultipleNegativesRankingLoss")
        refused(make(Encoder(), **settings), words)
        loss = make(Encoder())
        himo_kernels.accelerate(loss)
        for setting, value in settings.items():
            setattr(loss, setting, value)
        case = sentences(2, bool(name))
        with pytest.raises(NotImplementedError, match=f"MultipleNegativesRankingLoss: .*{words}"):
            case.call(loss, *case.inputs(generator))

    def test_a_cached_form_that_computes_its_loss_elsewhere(self):
        package = needed(libraries.sentence_transformers("oldest"))
        loss = package.CachedMultipleNegativesRankingLoss(Encoder())
        refused(loss, "calculate_loss with with_backward .*, got an earlier version")

    def test_one_column(self, generator):
        package = needed(libraries.sentence_transformers())
        loss = package.MultipleNegativesRankingLoss(Encoder())
        himo_kernels.accelerate(loss)
        with pytest.raises(ValueError, match="embeddings of two columns or more, got '1 of them'"):
            loss.compute_loss_from_embeddings([torch.ones(2, 3)], None)

    def test_losses_of_the_same_name_that_score_pairs_of_texts(self):
        # As sentence_transformers.cross_encoder.losses.
        CrossEncoderLoss = type(
            "MultipleNegativesRankingLoss",
            (nn.Module,),
            {
                "__module__": "sentence_transformers.cross_encoder.losses",
                "compute_loss_from_embeddings": None,
            },
        )
        with pytest.raises(TypeError, match="expected module to be"):
            himo_kernels.accelerate(CrossEncoderLoss())

    @pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
    def test_of_metric_learning(self, name, generator):
        package = needed(libraries.metric_learning())
        make, distances = getattr(package.losses, name), package.distances
        words = "expected distance CosineSimilarity or DotProductSimilarity, got LpDistance"
        refused(make(distance=distances.LpDistance()), words)
        refused(make(distance=distances.DotProductSimilarity(power=2)), "distance.power 1, got 2")
        loss = make()
        himo_kernels.accelerate(loss)
        (embeddings,) = tables(ROWS)(generator)
        loss.distance = distances.LpDistance()
        with pytest.raises(NotImplementedError, match=f"{name}: {words}"):
            loss(embeddings, PAIRS)

    @pytest.mark.parametrize("setting", ["temperature", "distance", "reducer"])
    def test_what_a_version_lacks_is_named(self, setting):
        loss = needed(libraries.metric_learning()).losses.SupConLoss()
        delattr(loss, setting)
        refused(loss, rf"got no \['{setting}'\]")

    def test_of_lightly(self):
        NTXentLoss = needed(libraries.lightly())
        loss = NTXentLoss()
        del loss.memory_bank
        refused(loss, "of lightly 1.1 or later")

    def test_of_grad_cache(self, generator):
        loss = libraries.grad_cache().SimpleContrastiveLoss(1)
        himo_kernels.accelerate(loss)
        with pytest.raises(ValueError, match=r"expected y of shape \[48, D\] .*, got \[24, 16\]"):
            loss(*tables(ROWS, ROWS)(generator))

    def test_a_subclass_that_computes_something_else(self):
        library = libraries.grad_cache()
        base = library.SimpleContrastiveLoss
        other = type("Closure", (base,), {"__call__": lambda self, *inputs: 0})
        refused(other(), "got Closure with a __call__ of its own")
        metric = needed(libraries.metric_learning()).losses.NTXentLoss
        refused(
            type("Hard", (metric,), {"_compute_loss": lambda self, *inputs: 0})(),
            "got Hard with a _compute_loss of its own",
        )


def needed(package: Any) -> Any:
    if package is None:
        pytest.skip("the package is not installed (make setup)")
    return package


def refused(loss: Any, words: str) -> None:
    before = dict(vars(loss))
    with pytest.raises(NotImplementedError, match=f"accelerate: .*{words}"):
        himo_kernels.accelerate(loss)
    assert vars(loss) == before


class TestCallable:
    """A loss that is no module: its class is replaced, and put back."""

    @pytest.fixture
    def loss(self) -> Any:
        return libraries.grad_cache().SimpleContrastiveLoss(1)

    def test_class_and_name(self, loss):
        kind = type(loss)
        with himo_kernels.accelerate(loss) as inside:
            assert inside is loss and isinstance(loss, kind)
            assert type(loss).__name__ == kind.__name__
        assert type(loss) is kind
        other = type(loss)(0)
        assert type(other) is kind

    def test_undo_leaves_what_is_not_its_own(self, loss):
        kind = type(loss)
        first = himo_kernels.accelerate(loss)
        first.undo()
        second = himo_kernels.accelerate(loss)
        first.undo()
        assert type(loss) is not kind
        second.undo()
        assert type(loss) is kind

    def test_a_deep_copy_is_accelerated_too_and_a_pickle_is_not(
        self, loss, used, generator, monkeypatch
    ):
        inputs, kind = tables(ROWS, 2 * ROWS)(generator), type(loss)
        expected = loss(*inputs)
        himo_kernels.accelerate(loss)
        twin = copy.deepcopy(loss)
        torch.testing.assert_close(twin(*inputs), expected, rtol=1e-12, atol=0)
        assert set(used) == {"info_nce_pairs"} and vars(twin) == vars(loss) is not vars(twin)
        monkeypatch.setitem(sys.modules, "grad_cache", types.ModuleType("grad_cache"))
        monkeypatch.setitem(sys.modules, "grad_cache.loss", libraries.grad_cache())
        opened = pickle.loads(pickle.dumps(loss))
        assert type(opened) is kind and opened(*inputs) == expected


@pytest.mark.parametrize("case", [SENTENCES[0], METRICS[0], VIEWS[0], QUERIES[0], SIGMOIDS[0]])
def test_under_autocast_features_are_multiplied_in_its_dtype(case, generator, monkeypatch):
    loss = needed(case.make("newest"))
    operator = OPERATORS[case.operator]
    resolve, dtypes = operator.resolve, []
    monkeypatch.setattr(
        operator, "resolve", lambda name, *x: dtypes.append(x[0].dtype) or resolve(name, *x)
    )
    himo_kernels.accelerate(loss)
    inputs = [x.float() for x in case.inputs(generator)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = step(case, loss, inputs)
    assert set(dtypes) == {torch.bfloat16} and value.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("labels", [torch.zeros(ROWS), torch.arange(ROWS), [0], [0, 0], [0, 1]])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_no_positive_pair_or_no_negative_pair_is_a_loss_of_zero(name, labels, generator):
    labels = torch.as_tensor(labels)
    case = metrics(name, labels)
    loss, inputs = needed(case.make("newest")), tables(len(labels))(generator)
    expected = step(case, loss, inputs)
    himo_kernels.accelerate(loss)
    torch.testing.assert_close(step(case, loss, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_the_pairs_of_a_miner_are_left_to_the_library(name, version, generator, used):
    package = needed(libraries.metric_learning(version))
    loss = getattr(package.losses, name)()
    (embeddings,) = tables(ROWS)(generator)

    def results() -> list[Tensor]:
        found = []
        triplets = package.miners.TripletMarginMiner(margin=0.5)(embeddings, FEW)
        listed = tuple(torch.tensor(x) for x in ([0, 1, 2], [5, 6, 7], [0, 1, 2], [8, 9, 10]))
        for arguments in ((FEW, triplets), (FEW, listed)):
            leaf = embeddings.clone().requires_grad_()
            value = loss(leaf, *arguments)
            found += [value.detach(), *torch.autograd.grad(value, [leaf])]
        return found

    expected = results()
    himo_kernels.accelerate(loss)
    torch.testing.assert_close(results(), expected, rtol=0, atol=0)
    assert not used
    loss(embeddings, FEW)  # all pairs
    assert set(used) == {"info_nce_pairs"}


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_without_labels_the_error_is_the_library_s(name, generator):
    loss = getattr(needed(libraries.metric_learning()).losses, name)()
    himo_kernels.accelerate(loss)
    with pytest.raises(ValueError, match="labels and indices_tuple cannot both be None"):
        loss(*tables(ROWS)(generator))


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_a_memory_of_earlier_batches(name, generator):
    package = needed(libraries.metric_learning())

    def losses(fast: bool) -> list[Tensor]:
        inner = getattr(package.losses, name)()
        memory = package.losses.CrossBatchMemory(inner, FEATURES, memory_size=3 * ROWS).double()
        if fast:
            himo_kernels.accelerate(inner)
        batches = [tables(ROWS)(generator.manual_seed(seed))[0] for seed in range(5)]
        return [memory(batch, FEW) for batch in batches]

    torch.testing.assert_close(losses(True), losses(False), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_records_of_a_distance(name, generator):
    package = needed(libraries.metric_learning())
    found = []
    for fast in (False, True):
        loss = getattr(package.losses, name)(distance=package.distances.CosineSimilarity())
        loss.distance.collect_stats = True
        if fast:
            himo_kernels.accelerate(loss)
        loss(*tables(ROWS)(generator.manual_seed(3)), PAIRS)
        found.append({key: x for key, x in vars(loss.distance).items() if key.endswith("norm")})
    assert found[0] == found[1] and len(found[0]) == 4
