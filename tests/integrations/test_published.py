"""Other libraries' own tests of their losses, with every loss that they construct accelerated.

PUBLISHED names a folder of checkouts, under the names of their repositories: any of
pytorch-metric-learning, lightly, sentence-transformers, GradCache and open_clip. None is here.
himo_kernels/integrations/README.md has the commits and the counts.
"""

import importlib.util
import json
import os
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

PUBLISHED = os.environ.get("PUBLISHED")
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # two runs of another suite
    pytest.mark.skipif(PUBLISHED is None, reason="PUBLISHED does not name a folder of checkouts"),
]


@dataclass(frozen=True)
class Library:
    """What a checkout has."""

    source: str  # the folder that is imported from
    needs: tuple[str, ...]  # packages that its tests import
    losses: tuple[str, ...]  # module:class
    tests: tuple[str, ...]
    at_least: int  # tests that compute with this library's operators
    different: frozenset[str] = frozenset()  # of what README.md says differs


LIBRARIES = {
    "pytorch-metric-learning": Library(
        source="src",
        needs=("scipy", "sklearn"),
        losses=(
            "pytorch_metric_learning.losses:NTXentLoss",
            "pytorch_metric_learning.losses:SupConLoss",
        ),
        tests=("tests/losses/test_ntxent_loss.py", "tests/losses/test_self_supervised_loss.py"),
        at_least=4,
    ),
    "lightly": Library(
        source=".",
        needs=("pytest_mock",),
        losses=("lightly.loss:NTXentLoss",),
        tests=("tests/loss/test_ntx_ent_loss.py",),
        at_least=200,
    ),
    "sentence-transformers": Library(
        source=".",
        needs=("scipy", "sklearn"),
        losses=tuple(
            f"sentence_transformers.sentence_transformer.losses:{name}RankingLoss"
            for name in (
                "MultipleNegatives",
                "CachedMultipleNegatives",
                "MultipleNegativesSymmetric",
                "CachedMultipleNegativesSymmetric",
            )
        ),
        tests=tuple(
            f"tests/sentence_transformer/losses/test_{name}.py"
            for name in ("cmnrl", "gradcache", "cached_mnsrl")
        ),
        at_least=10,
        different=frozenset(
            {"tests/sentence_transformer/losses/test_gradcache.py::test_gradcache_under_autocast"}
        ),
    ),
}
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TEST_DEVICE": "cpu",  # of pytorch-metric-learning, whose default is cuda
    "TEST_DTYPES": "float32,float64",
}


def checkout(name: str) -> Path:
    found = Path(PUBLISHED or "").resolve() / name
    if not found.is_dir():
        pytest.skip(f"PUBLISHED has no {name}")
    return found


def run(command: list[str], source: Path, folder: Path, **settings: str) -> tuple[int, str]:
    """Runs Python in `folder`, with packages of `source` before the installed ones."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE, source)))
    environment = os.environ | SETTINGS | settings | {"PYTHONPATH": paths}
    command = [sys.executable, *command]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def report_of(library: Library, place: Path, folder: Path, losses: tuple[str, ...]) -> dict:
    tests = [str(place / test) for test in library.tests]
    report = folder / f"{len(losses)}.json"
    settings = {"PUBLISHED_LOSSES": " ".join(losses), "PUBLISHED_REPORT": str(report)}
    command = [*PYTEST, "-p", "published_plugin", *tests]
    code, output = run(command, place / library.source, folder, **settings)
    assert code in (0, 1), output[-3000:]  # 1: tests failed, and the report says which
    return json.loads(report.read_text())


def write_models(folder: Path) -> None:
    """The models that sentence-transformers' tests name: small, of random weights, not downloaded.

    They lie where the hub's name is also a path, so the library opens them as it opens any folder.
    """
    transformers = pytest.importorskip("transformers")
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = {word: number for number, word in enumerate((*marks, *letters))}
    size = {"vocab_size": len(words)}
    bert = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    distilled = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    torch.manual_seed(0)
    models = {
        "sentence-transformers-testing/stsb-bert-tiny-safetensors": transformers.BertModel(
            transformers.BertConfig(**size, **bert, intermediate_size=512)
        ),
        "distilbert/distilbert-base-uncased": transformers.DistilBertModel(
            transformers.DistilBertConfig(**size, **distilled)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer = transformers.BertTokenizerFast(vocab=words, model_max_length=64)
        tokenizer.save_pretrained(folder / name)


@pytest.mark.parametrize("name", LIBRARIES)
def test_its_own_tests_pass_with_accelerated_losses(name, tmp_path):
    library, place = LIBRARIES[name], checkout(name)
    for package in library.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name}'s tests need {package}, which is not installed")
    if name == "sentence-transformers":
        write_models(tmp_path)
    plain = report_of(library, place, tmp_path, losses=())
    ours = report_of(library, place, tmp_path, losses=library.losses)
    before, after = plain["outcomes"], ours["outcomes"]
    print(name, {outcome: list(before.values()).count(outcome) for outcome in before.values()})
    print({key: ours[key] for key in ("accelerated", "refused")}, len(ours["computed"]), "computed")
    assert not [test for test, outcome in before.items() if outcome == "failed"]
    assert not plain["accelerated"] and not plain["computed"]
    assert set(ours["accelerated"]) == {loss.split(":")[1] for loss in library.losses}
    assert len(ours["computed"]) >= library.at_least
    assert before.keys() == after.keys()
    assert {test for test in before if before[test] != after[test]} == library.different


@pytest.mark.parametrize(
    "name, tests, choice, file",
    [
        (
            "GradCache",
            ("integrations/test_accelerated_losses.py", "distributed/test_accelerated_ranks.py"),
            "SimpleContrastiveLoss or TestCallable or grad_cache",
            "from benchmarks.baselines import libraries; print(libraries.grad_cache().__file__)",
        ),
        (
            "open_clip",
            ("integrations/test_accelerated_losses.py",),
            "CoCaLoss or SigLipLoss",
            "from upstream import open_clip_loss; print(open_clip_loss().__file__)",
        ),
    ],
    ids=["GradCache", "open_clip"],
)
def test_parity_with_the_file_of(name, tests, choice, file, tmp_path):
    """GradCache has no tests, and open_clip's compute no value of an accelerated method."""
    source = checkout(name) / "src"
    code, output = run(["-c", file], source, tmp_path)
    assert code == 0 and source in Path(output.splitlines()[-1]).parents, output
    files = [str(ROOT / "tests" / test) for test in tests]
    code, output = run([*PYTEST, *files, "-k", choice], source, tmp_path)
    print(name, output.splitlines()[-1])
    assert code == 0 and "skipped" not in output.splitlines()[-1], output[-3000:]
