"""If one rank's arguments are wrong, all raise the same error at once, naming the rank (G8)."""

import pytest
from launch import found

# The exception's type, which rank reports it, and how it begins.
FIRST, ALL = "rank 1: ", ""  # from the wrong rank, or from the table on every rank
CASES = {
    "nan in a text": (ValueError, FIRST, "expected text_features to be finite, got nan at [2, 3]"),
    "inf in a text": (ValueError, FIRST, "expected text_features to be finite, got inf at [2, 3]"),
    "nan in an image": (
        ValueError,
        FIRST,
        "expected image_features to be finite, got nan at [2, 3]",
    ),
    "a text of zeros": (
        ValueError,
        FIRST,
        "expected text_features without rows of zeros, got one at [1]",
    ),
    "another width": (
        ValueError,
        ALL,
        "expected features of one width on every rank, got 5 on rank 1 and 6 on rank 0",
    ),
    "another dtype": (
        ValueError,
        ALL,
        "expected features of one dtype on every rank, got torch.float64 on rank 1",
    ),
    "another number of texts": (
        ValueError,
        FIRST,
        "expected text_features of shape [4, 6], got [3, 6]",
    ),
    "one dimension": (ValueError, FIRST, "expected image_features of shape [M, D] with at least"),
    "no tensor": (TypeError, FIRST, "expected image_features to be a torch.Tensor, got NoneType"),
    "another preset": (ValueError, ALL, "expected the same settings on every rank"),
    "another strategy": (ValueError, FIRST, "expected strategy to be one of ['gather', 'ring']"),
    "a frozen tower": (
        ValueError,
        ALL,
        "expected the same inputs to require a gradient on every rank, got 0b0 on rank 1 and 0b1",
    ),
    "no rows anywhere": (ValueError, ALL, "expected at least one row on some rank, got none"),
    "no rows, unchecked": (ValueError, ALL, "expected at least one row on some rank, got none"),
    "a wrong scale": (ValueError, FIRST, "expected logit_scale of shape [] or [1], got [2]"),
    "a wrong bias": (ValueError, FIRST, "expected logit_bias of shape [] or [1], got [2]"),
    "all_gather of another width": (
        ValueError,
        ALL,
        "expected features of one width on every rank",
    ),
    "pca of another tau": (ValueError, ALL, "expected the same settings on every rank"),
    "a backend without a kernel": (
        NotImplementedError,
        "rank 0: ",
        "backend 'numpy' cannot take [4, 6] torch.float32 on cpu",
    ),
    "pca by a backend without a kernel": (
        NotImplementedError,
        "rank 0: ",
        "backend 'numpy' cannot take [0, 6] torch.float32 on cpu",
    ),
    "pca by no backend": (ValueError, "rank 0: ", "expected backend to be one of ['auto', "),
}
_LABELS = "to be an int64 or int32 tensor, got"
_OF_LABELS = {
    "labels of another length": (ValueError, FIRST, "expected labels of shape [4], got [3]"),
    "labels of floats": (TypeError, FIRST, f"expected labels {_LABELS} torch.float32"),
    "labels in a list": (TypeError, FIRST, f"expected labels {_LABELS} list"),
    "labels on one rank": (ValueError, ALL, "expected the same settings on every rank"),
    "labels and the ring": (
        ValueError,
        "rank 0: ",
        "expected strategy to be 'gather' with labels, got 'ring'",
    ),
}
CASES |= _OF_LABELS | {f"{name}, head": case for name, case in _OF_LABELS.items()}
_DIRECTIONS = {
    "another direction": (ValueError, ALL, "expected the same settings on every rank"),
    "no direction": (
        ValueError,
        FIRST,
        "expected directions to be one of ['both', 'rows', 'columns'], got 'sideways'",
    ),
    "no string": (
        TypeError,
        FIRST,
        "expected directions to be one of ['both', 'rows', 'columns'], got NoneType",
    ),
    "another meaning of labels": (ValueError, ALL, "expected the same settings on every rank"),
    "no meaning of labels": (
        ValueError,
        FIRST,
        "expected same_label to be one of ['positive', 'exclude'], got 'none'",
    ),
}
CASES |= _DIRECTIONS
OPERATORS = {
    "a backend without a kernel": "info_nce_block",
    "another strategy": "info_nce",
    "all_gather of another width": "all_gather",
    "pca of another tau": "pca_reconstruct",
    "pca by a backend without a kernel": "pca_reconstruct",
    "pca by no backend": "pca_reconstruct",
    **dict.fromkeys([*_OF_LABELS, *_DIRECTIONS], "info_nce"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return found("agreement_worker.py", 3, tmp_path_factory.mktemp("agreement"))


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_raise_the_same_error(ranks, case):
    kind, speaker, words = CASES[case]
    message = f"{speaker}{OPERATORS.get(case, 'HiMoLoss')}: {words}"
    raised = [checks[case] for checks in ranks]
    assert {(name, text) for name, text, _ in raised} == {tuple(raised[0][:2])}
    assert raised[0][0] == kind.__name__ and raised[0][1].startswith(message), raised[0]
    assert max(seconds for *_, seconds in raised) < 2


def test_twenty_times_of_twenty(ranks):
    for repeat in range(20):
        for checks in ranks:
            kind, message, seconds = checks[f"nan again {repeat}"]
            assert [kind, message] == checks["nan in a text"][:2] and seconds < 2


def test_the_ranks_go_on_together_afterwards(ranks):
    assert all(checks["and then a good step"][0] == "nothing" for checks in ranks)
