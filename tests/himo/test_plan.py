"""`himo plan`, and the memory that it counts against the memory of real steps on this CPU."""

import dataclasses
import json
import sys
from pathlib import Path

import measured_step
import pytest
from fresh_process import run_python

import himo
from himo.cli import main
from himo.model import CONFIGS, HiMoCLIP
from himo.tools.footprint import (
    BUCKETS,
    EXCHANGE,
    GRADIENTS,
    IMAGE,
    LOSS,
    PARAMETERS,
    STATE,
    TEXT,
    UPDATE,
    Memory,
    Rehearsal,
)
from himo.tools.plan import largest_batch

# Of the measured peak. Missing are what an operation of the CPU takes inside, as with bfloat16, the
# outputs of the step before, and the states of random generators, which a GPU has on the host.
BOUND = 0.01
GIB = 2**30
FLAGS = ["--model", "dot", "--batch-size", "64"]


@pytest.fixture(scope="module")
def steps() -> dict[str, dict]:
    output = run_python(str(Path(measured_step.__file__)), OMP_NUM_THREADS="1")
    return json.loads(output.splitlines()[-1])


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(CONFIGS, "dot", measured_step.DOT)


def rehearsal(ranks: int = 1, **changes) -> Rehearsal:
    return Rehearsal(dataclasses.replace(measured_step.SETTINGS, **changes), ranks)


def planned(capsys, *flags: str, status: int) -> dict:
    assert main(["plan", "--json", *FLAGS, *flags]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_counted_peak_is_that_of_real_steps(steps):
    errors = {n: sum(s["parts"].values()) / s["measured"] - 1 for n, s in steps.items()}
    print({name: f"{error:+.3%}" for name, error in errors.items()})
    assert list(errors) == list(measured_step.CASES)
    assert all(abs(error) < BOUND for error in errors.values()), errors


@pytest.mark.slow
def test_parts_are_what_they_are_called(steps):
    model = HiMoCLIP(CONFIGS["tiny"])
    trained = [p for p in model.parameters() if p.requires_grad]
    few = steps["tiny, few pairs"]
    assert few["phase"] == UPDATE
    assert few["parts"][PARAMETERS] == sum(p.nbytes for p in model.parameters())
    assert few["parts"][GRADIENTS] == sum(p.nbytes for p in trained)
    # Of AdamW: two moments, and its count of steps.
    assert few["parts"][STATE] == sum(2 * p.nbytes + 4 for p in trained)
    large = steps["large loss"]
    assert large["phase"] == LOSS
    # Logits of 1024 pairs are 4 MiB; two losses hold several of them.
    assert 8 * 2**20 < large["parts"][LOSS] < 40 * 2**20
    assert IMAGE not in few["parts"] and TEXT in large["parts"]


@pytest.mark.slow
def test_many_ranks_have_buckets_and_exchange():
    many = rehearsal(ranks=8, batch_size=512)
    gathered, ring = many.step(), many.step(exchange="ring")
    trained = sum(p.nbytes for p in HiMoCLIP(measured_step.DOT).parameters() if p.requires_grad)
    for memory in (gathered, ring):
        assert memory.phase in (LOSS, EXCHANGE)
        assert memory.parts[BUCKETS] == trained and memory.parts[EXCHANGE] > 0
    # 4096 joined pairs, texts and components of 16 float32: the ring never has all of them.
    assert gathered.total - ring.total > 4096 * 2 * 16 * 4
    assert BUCKETS not in rehearsal().step().parts


@pytest.mark.slow
def test_settings_change_in_one_rehearsal():
    steps = rehearsal()
    plain = steps.step().total
    assert steps.step(precision="amp_bf16").total < plain
    assert steps.step(batch_size=32, accum_freq=2).total < plain
    assert steps.step(batch_size=128).total > 1.5 * plain
    assert steps.step().total == plain  # and nothing of the others is left


@pytest.mark.slow
def test_sharing_out_the_weights_is_a_change_too():
    steps = rehearsal(ranks=8, batch_size=2)
    plain, sharded = steps.step(), steps.step(fsdp=True)
    assert sharded.total < plain.total and BUCKETS not in sharded.parts
    assert steps.step(fsdp=True) == sharded and steps.step() == plain


def test_a_checkpoint_is_planned_as_its_model(tmp_path):
    path = tmp_path / "tiny.safetensors"
    himo.save(HiMoCLIP(CONFIGS["tiny"]), path)
    assert rehearsal(pretrained=str(path)).fixed == rehearsal(model="tiny").fixed


@pytest.mark.parametrize("start", [2, 100, 4000])
@pytest.mark.parametrize("limit", [999, 1000, 12_345, 10**6, 10**9])
def test_the_largest_batch_is_found(start, limit):
    tried = []

    def total(batch: int) -> int:
        tried.append(batch)
        return 980 + 7 * batch + batch * batch // 50 + 300 * (batch < 20)  # not quite monotone

    found = largest_batch(total, (start, total(start)), 980, limit, 4000)
    if found:
        assert total(found) <= limit
        assert found == 4000 or total(found + 1) > limit
    else:
        assert total(2) > limit
    assert len(tried) < 40
    assert all(2 <= batch <= 4001 for batch in tried)


@pytest.mark.slow
def test_it_fits(capsys):
    plan = planned(capsys, "--gpu-mem", "0.01", status=0)
    assert plan["fits"] and plan["alternatives"] == []
    assert plan["total"] == sum(plan["parts"].values()) <= plan["gpu_mem"] == int(0.01 * GIB)
    steps = rehearsal()
    assert steps.step(batch_size=plan["largest_batch_size"]).total <= plan["gpu_mem"]
    assert steps.step(batch_size=plan["largest_batch_size"] + 1).total > plan["gpu_mem"]


class Formula:
    """A rehearsal that takes no time: 1 MiB, and a little more than 1 MiB for a pair at once."""

    fixed = 2**20

    def __init__(self, settings, ranks):
        self.settings = settings

    def step(self, **changes) -> Memory:
        now = dataclasses.replace(self.settings, **changes)
        pair = (
            2**20 // (8 if now.grad_checkpointing else 1) // (2 if now.precision != "fp32" else 1)
        )
        joined = now.batch_size * now.accum_freq * 2**10
        return Memory({PARAMETERS: self.fixed, TEXT: now.batch_size * pair, LOSS: joined}, LOSS)


@pytest.mark.parametrize(
    ("mib", "found"),
    [
        (
            50,  # one flag is enough, for most
            {
                "--grad-checkpointing": True,
                "--precision amp_bf16": True,
                "--exchange ring": False,
                "--fsdp": False,
                "--batch-size 32 --accum-freq 2": True,
            },
        ),
        (
            6,
            {
                "--grad-checkpointing": False,
                "--precision amp_bf16": False,
                "--exchange ring": False,
                "--fsdp": False,
                "--batch-size 4 --accum-freq 16": True,
            },
        ),
        (
            3,  # not even two pairs: all together, and then in smaller batches
            {
                "--grad-checkpointing": False,
                "--precision amp_bf16": False,
                "--exchange ring": False,
                "--fsdp": False,
                "--grad-checkpointing --precision amp_bf16 --exchange ring --fsdp "
                "--batch-size 16 --accum-freq 4": True,
            },
        ),
    ],
    ids=["one flag", "smaller batches", "together"],
)
def test_what_would_fit(capsys, monkeypatch, mib, found):
    monkeypatch.setattr("himo.tools.plan.Rehearsal", Formula)
    plan = planned(capsys, "--gpu-mem", str(mib / 1024), "--ranks", "2", status=1)
    assert {other["flags"]: other["fits"] for other in plan["alternatives"]} == found
    assert all(o["fits"] == (o["total"] <= mib * 2**20) for o in plan["alternatives"])
    assert plan["largest_batch_size"] == {50: 48, 6: 4, 3: 0}[mib]


def test_the_largest_batch_that_is_counted_is_not_said_to_be_the_largest(capsys, monkeypatch):
    monkeypatch.setattr("himo.tools.plan.Rehearsal", Formula)
    for gib, more in (("0.05", False), ("10", True)):
        many = ["--ranks", "4096", "--accum-freq", "4", "--batch-size", "2"]
        assert main(["plan", "--gpu-mem", gib, "--model", "dot", *many]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = next(line for line in lines if line.startswith("largest --batch-size that fits"))
        assert found.endswith("64 pairs a process, larger ones are not counted") == more


def test_a_bar_is_there_before_the_first_step(capsys, monkeypatch):
    class Slow(Formula):
        def step(self, **changes) -> Memory:
            shown.append(capsys.readouterr().err)
            return super().step(**changes)

    shown: list[str] = []
    monkeypatch.setattr("himo.tools.plan.Rehearsal", Slow)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["plan", "--gpu-mem", "1", *FLAGS]) == 0
    assert "counting: 0step" in shown[0]


def test_where_nothing_fits_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("himo.tools.plan.Rehearsal", Formula)
    assert main(["plan", "--gpu-mem", "0.0001", *FLAGS]) == 1
    text = capsys.readouterr().out
    assert "no --batch-size fits" in text and "no flag is enough" in text
    assert max(map(len, text.splitlines())) < 80
    assert "no GPU was asked" in text.replace("\n", " ") and "CUDA context" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu-mem", "0"], "--gpu-mem: expected GiB above 0 and up to 100000, got 0.0"),
        (["--gpu-mem", "-1"], "--gpu-mem: expected GiB above 0 and up to 100000, got -1.0"),
        (["--gpu-mem", "nan"], "--gpu-mem: expected GiB above 0 and up to 100000, got nan"),
        (["--gpu-mem", "inf"], "--gpu-mem: expected GiB above 0 and up to 100000, got inf"),
        (["--ranks", "0"], "--ranks: expected 1 to 4096, got 0"),
        (["--ranks", "99999"], "--ranks: expected 1 to 4096, got 99999"),
        (["--fsdp"], "--fsdp: expected --ranks 2 or more beside it, got 1"),
        (["--batch-size", "1"], "--batch-size: expected at least 2, got 1"),
        (["--batch-size", "9" * 30], "--batch-size: expected at most 1048576 pairs"),
        (["--accum-freq", "0"], "--accum-freq: expected at least 1, got 0"),
        (["--model", "ViT-Z"], "--model: expected one of ViT-B-32"),
        (["--pretrained", "nothing.pt"], "nothing.pt: cannot be read: no such file"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_named(capsys, flags, said):
    assert main(["plan", "--gpu-mem", "1", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"himo: error: {said}") and message.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--gpu-mem", "much"], ["--precision", "int3"]])
def test_flags_that_do_not_parse(flags, capsys):
    assert main(["plan", *flags]) == 2
    message = capsys.readouterr().err
    assert message.endswith("; `himo plan --help` lists what it takes\n")
    assert message.startswith("himo: error: ") and message.count("\n") == 1
