"""Checkpoints made to cost their reader time or memory: each refused, or loaded, within bounds."""

import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_cases import TINIEST
from fuzz_corpus import bounded, corpus
from safetensors.torch import save_file

from himo import checkpoint
from himo.checkpoint.layouts import from_himo
from himo.errors import HimoError
from himo.model import HiMoCLIP

SECONDS, MEBIBYTES = 2.0, 64.0  # the memory above the size of the file
INPUTS: dict[str, Callable[[Path], None]] = {}


def add(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        assert name not in INPUTS
        INPUTS[name] = make
        return make

    return register


def archive(path: Path, data_pickle: bytes, **records: bytes) -> None:
    """A zip archive as torch.save lays it out."""
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", data_pickle)
        for name, content in {"data/0": bytes(64), **records}.items():
            target.writestr(f"archive/{name}", content)


def state() -> dict[str, Any]:
    return dict(HiMoCLIP(TINIEST).state_dict())


# Pieces of pickles. PAIR_2_TO_THE_100 leaves a tuple on the stack that holds itself, as two, a
# hundred times over: to hash, compare or show it takes forever.
PAIR = b"h%ch%c\x86q%c"
PAIR_2_TO_THE_100 = b"K\x01K\x02\x86q\0" + b"".join(PAIR % (i, i, i + 1) for i in range(100))


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(key: bytes = b"0", numel: bytes = number(16), kind: bytes = b"FloatStorage") -> bytes:
    return b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + key + text(b"cpu") + numel + b"tQ"


def tensor(of: bytes, offset: bytes, size: bytes, stride: bytes) -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + of + offset + size + stride + b"\x89}tR"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(*values: bytes) -> bytes:
    """A pickle of {"w0": value, ...}."""
    items = b"".join(text(b"w%d" % i) + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


FOUR = numbers(4), numbers(1)
TUPLES = {
    "as the whole": b"\x80\x02" + PAIR_2_TO_THE_100 + b".",
    "as a value": named(PAIR_2_TO_THE_100),
    "as a key": b"\x80\x02}" + PAIR_2_TO_THE_100 + b"K\x01s.",
    "in a set": b"\x80\x04\x8f(" + PAIR_2_TO_THE_100 + b"\x90.",
    "as a frozen set": b"\x80\x04(" + PAIR_2_TO_THE_100 + b"\x91.",
    "as a state": b"\x80\x02}" + PAIR_2_TO_THE_100 + b"b.",
    "as a name": b"\x80\x04" + PAIR_2_TO_THE_100 + text(b"a") + b"\x93.",
    "as a storage": named(tensor(PAIR_2_TO_THE_100, number(0), *FOUR)),
    "as a key of a storage": named(tensor(storage(PAIR_2_TO_THE_100), number(0), *FOUR)),
    "as a number of values": named(
        tensor(storage(text(b"0"), PAIR_2_TO_THE_100), number(0), *FOUR)
    ),
    "as an offset": named(tensor(storage(text(b"0")), PAIR_2_TO_THE_100, *FOUR)),
    "as a shape": named(tensor(storage(text(b"0")), number(0), PAIR_2_TO_THE_100, FOUR[1])),
    "as a stride": named(tensor(storage(text(b"0")), number(0), FOUR[0], PAIR_2_TO_THE_100)),
    "as arguments": b"\x80\x02ctorch\nSize\n" + PAIR_2_TO_THE_100 + b"R.",
    "as an ordered dict": b"\x80\x02ccollections\nOrderedDict\n" + PAIR_2_TO_THE_100 + b"\x85R.",
    "as a persistent id": b"\x80\x02" + PAIR_2_TO_THE_100 + b"Q.",
    "as an object": b"\x80\x02" + PAIR_2_TO_THE_100 + b")\x81.",
}
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
FLAT = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
EMPTY_LIST = b"\x80\x02]."
for place, content in TUPLES.items():
    add(f"a doubled tuple {place}")(lambda path, content=content: archive(path, content))
    add(f"a doubled tuple {place} in the flat format")(
        lambda path, content=content: path.write_bytes(FLAT + content + EMPTY_LIST)
    )

FLAT_FILES = {
    "a doubled tuple as the version": MAGIC + b"\x80\x02" + PAIR_2_TO_THE_100 + b"." * 4,
    "a doubled tuple as the keys": FLAT + b"\x80\x02}.\x80\x02" + PAIR_2_TO_THE_100 + b".",
    "a doubled tuple among the keys": FLAT + b"\x80\x02}.\x80\x02](" + PAIR_2_TO_THE_100 + b"e.",
    "five pickles of 200,000 lists": (b"\x80\x02" + b"]" * 200_000 + b".") * 5,
    "two pickles of 200,000 lists": FLAT + (b"\x80\x02" + b"]" * 200_000 + b".") * 2,
    "100,000 names": FLAT + b"\x80\x02" + b"ca\nb\n" * 100_000 + b"." + EMPTY_LIST,
    "a storage of 2^62 values": FLAT
    + named(tensor(storage(text(b"0"), number(1 << 46)), number(0), *FOUR))
    + pickle.dumps(["0"], 2)
    + struct.pack("<q", 1 << 46),
    "a storage of minus one value": FLAT
    + named(tensor(storage(text(b"0")), number(0), *FOUR))
    + pickle.dumps(["0"], 2)
    + struct.pack("<q", -1),
}
for name, content in FLAT_FILES.items():
    add(name + " in the flat format")(lambda path, content=content: path.write_bytes(content))

PICKLES = {
    "120,000 lists in lists": b"\x80\x02" + b"]" * 120_000 + b"a" * 119_999 + b".",
    "240,000 marks": b"\x80\x02" + b"(" * 240_000 + b".",
    "240,000 dictionaries": b"\x80\x02" + b"}" * 240_000 + b".",
    "a million dictionaries": b"\x80\x02" + b"}" * 1_000_000 + b".",
    "80,000 objects": b"\x80\x02ca\nb\nq\0" + b"h\0)\x81" * 80_000 + b".",
    "80,000 ordered dictionaries": b"\x80\x02ccollections\nOrderedDict\nq\0"
    + b"h\0)R" * 80_000
    + b".",
    "a memo of 240,000": b"\x80\x04N" + b"\x94" * 240_000 + b".",
    "a number of a million digits": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
    "an integer of a megabyte": b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x7f" * (1 << 20)
    + b".",
    "a text of three megabytes": b"\x80\x02" + text("\N{GRINNING FACE}".encode() + b"x" * 3_000_000)
    + b".",
    "a name of three megabytes": b"\x80\x02c" + b"x" * 3_000_000 + b"\nf\n.",
    "a key of three megabytes twice": b"\x80\x02}(" + (text(b"k" * 1_500_000) + b"N") * 2 + b"u.",
    "a number of a million digits as a key": b"\x80\x02}\x8b" + struct.pack("<I", 1 << 20)
    + b"\x7f" * (1 << 20) + b"Ns.",
    "a text that ends beyond the file": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a shape of nine dimensions": named(
        tensor(storage(text(b"0")), number(0), numbers(*[1] * 9), numbers(*[1] * 9))
    ),
    "a shape of a million dimensions": named(
        tensor(storage(text(b"0")), number(0), b"(" + b"K\0" * 250_000 + b"t", FOUR[1])
    ),
    "a shape of NaN": named(
        tensor(
            storage(text(b"0")), number(0), b"(G" + struct.pack(">d", float("nan")) + b"t", FOUR[1]
        )
    ),
    "no values of terabytes": named(
        tensor(
            storage(text(b"0")), number(0), numbers(0, 1 << 40, 1 << 40), numbers(1 << 47, 1, 1)
        )
    ),
    "one value a trillion times": named(
        tensor(storage(text(b"0")), number(0), numbers(1 << 40), numbers(0))
    ),
    "an offset beyond the storage": named(
        tensor(storage(text(b"0")), number(1 << 40), *FOUR)
    ),
    "a storage of a dtype that there is not": named(
        tensor(storage(text(b"0"), kind=b"Float7Storage"), number(0), *FOUR)
    ),
    "one storage as two dtypes": named(
        tensor(storage(text(b"0")), number(0), *FOUR),
        tensor(storage(text(b"0"), kind=b"LongStorage"), number(0), *FOUR),
    ),
    "a storage whose name leads out": named(
        tensor(storage(text(b"../../data.pkl")), number(0), *FOUR)
    ),
    "wrappers in wrappers": b"\x80\x02" + (b"}" + text(b"model")) * 80_000 + b"N" + b"s" * 80_000
    + b".",
    "a wrapper that holds itself": b"\x80\x02}q\0" + text(b"model") + b"h\0s.",
    "2,000 modules in one of a long name": b"\x80\x02c__torch__\nM\nq\0)\x81}"
    + text(b"n" * 1_000_000) + b"h\0)\x81}("
    + b"".join(text(b"%d" % i) + b"h\0)\x81" for i in range(2_000)) + b"ubsb.",
    "modules that share their modules": b"\x80\x02ca\nM\nq\0"
    + b"h\0)\x81}" + text(b"_modules") + b"}q\x01sb0"
    + b"h\0)\x81}" + text(b"_modules") + b"h\x01sb.",
}  # fmt: skip
for name, content in PICKLES.items():
    add(name)(lambda path, content=content: archive(path, content))


@add("7,000 views of one storage")
def views(path: Path) -> None:
    values = torch.zeros(1 << 20)
    torch.save({f"visual.conv1.weight{i}": values[i : i + 4] for i in range(7_000)}, path)


@add("7,000 views of one storage in the flat format")
def flat_views(path: Path) -> None:
    values = torch.zeros(1 << 20)
    named = {f"w{i}": values[i : i + 4] for i in range(7_000)}
    torch.save(named, path, _use_new_zipfile_serialization=False)


@add("2,000 storages that are one record")
def storages(path: Path) -> None:
    # Each key has an entry of its own in the list of records, all of the same two megabytes.
    parts = [tensor(storage(text(b"0"), number(1 << 19)), number(0), *FOUR)] * 2_000
    data = b"\x80\x02}(" + b"".join(
        text(b"w%d" % i) + part.replace(text(b"0"), text(b"%d" % i)) for i, part in enumerate(parts)
    )
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", data + b"u.")
        target.writestr("archive/data/0", bytes(2 << 20))
        entry = target.NameToInfo["archive/data/0"]
        for i in range(1, 2_000):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            for field in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(copy, field, getattr(entry, field))
            target.filelist.append(copy)


@add("a zip archive of 60,000 records")
def records(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as target:
        for i in range(60_000):
            target.writestr(f"archive/{i}", b"")


@add("a zip archive that starts as one")
def zip_start(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(4 << 20) + b"PK\x05\x06" + b"\xff" * 18)


@add("20,001 tensors of nothing")
def many(path: Path) -> None:
    torch.save({str(i): torch.zeros(0) for i in range(20_001)}, path)


@add("a sparse tensor as a weight")
def sparse(path: Path) -> None:
    torch.save({**state(), "visual.proj": torch.eye(8).to_sparse()}, path)


for layout in ("himo", "open_clip", "hf"):

    @add(f"a CLIP of scalars, as of {layout}")
    def scalars(path: Path, layout: str = layout) -> None:
        names = from_himo(state(), layout)
        torch.save(dict.fromkeys(names, torch.tensor(1.0)), path)


@add("a CLIP of a million channels in a small file")
def wide(path: Path) -> None:
    weight = torch.zeros(1 << 20, 3, 1, 1, dtype=torch.uint8)
    positions = torch.zeros(2, 1, dtype=torch.uint8)
    torch.save(
        {**state(), "visual.conv1.weight": weight, "visual.positional_embedding": positions}, path
    )


@add("a CLIP of 256 blocks of nothing")
def deep(path: Path) -> None:
    blocks = {
        f"{tower}transformer.resblocks.{i}.ln_1.bias": torch.zeros(0)
        for tower in ("", "visual.")
        for i in range(128)
    }
    torch.save({**state(), **blocks}, path)


@add("9,000 models in one")
def models(path: Path) -> None:
    torch.save({f"{i}.visual.conv1.weight": torch.zeros(0) for i in range(9_000)}, path)


def safetensors(path: Path, header: Any, data: bytes = b"") -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)


def entry(start: int, end: int, shape: Any = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = json.dumps(entry(0, 16))
HEADERS: dict[str, tuple[Any, bytes]] = {
    "of 75,000 tensors": ({str(i): entry(0, 0, [0]) for i in range(72_000)}, b""),
    "of 300,000 tensors": ({str(i): entry(0, 0, [0]) for i in range(300_000)}, b""),
    "of a million dimensions": ({"a": entry(0, 0, [0] * 1_000_000)}, b""),
    "of a thousand dimensions": ({"a": entry(0, 4, [1] * 1_000)}, bytes(4)),
    "of 2^63 times nothing": ({"a": entry(0, 0, [0, 1 << 63])}, b""),
    "of 2^62 times nothing": ({"a": entry(0, 0, [1 << 62, 0, 4])}, b""),
    "of more values than numbers": ({"a": entry(0, 16, [1 << 62, 1 << 62])}, bytes(16)),
    "of four bits": ({"a": entry(0, 2, [4], "F4")}, bytes(2)),
    "of six bits": ({"a": entry(0, 3, [4], "F6_E2M3")}, bytes(3)),
    "of a dtype of a megabyte": ({"a": entry(0, 16, [4], "F" * 1_000_000)}, bytes(16)),
    "of a dtype that is a number": ({"a": {**entry(0, 16), "dtype": 1}}, bytes(16)),
    "of metadata that is null": ({"__metadata__": None, "a": entry(0, 16)}, bytes(16)),
    "of metadata of 200,000 keys": ({"__metadata__": {str(i): "" for i in range(200_000)}}, b""),
    "of a key of a megabyte": ({"a" * 1_000_000: entry(0, 15)}, bytes(16)),
    "of a key of a megabyte twice": (
        f'{{"{"a" * 1_000_000}":{ONE},"{"a" * 1_000_000}":{ONE}}}'.encode(),
        bytes(16),
    ),
    "of one offset": ({"a": {**entry(0, 16), "data_offsets": [0]}}, bytes(16)),
    "of offsets from 16 to 0": ({"a": entry(16, 0)}, bytes(16)),
    "of offsets that are lists": ({"a": {**entry(0, 16), "data_offsets": [[0], [16]]}}, bytes(16)),
    "of overlapping tensors": ({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
    "of a gap": ({"a": entry(0, 16), "b": entry(24, 40)}, bytes(40)),
    "of a million brackets": (b'{"a":' + b"[" * 1_000_000, b""),
    "of half a million objects": (b'{"a":' + b'{"a":' * 500_000, b""),
    "that is a list": (b"[" + b"1," * 100_000 + b"1]", b""),
    "of a number of a million digits": (b'{"a":' + b"9" * 1_000_000 + b"}", b""),
    "of NaN": (b'{"a":NaN}', b""),
    "of nothing": (b"{}", b""),
    "of himo without a digest": ({"__metadata__": {"himo_config": "{}"}}, b""),
    "of a digest of a megabyte": ({"__metadata__": {"himo_sha256": "0" * 1_000_000}}, b""),
}
for name, (header, data) in HEADERS.items():
    add(f"a header {name}")(lambda path, header=header, data=data: safetensors(path, header, data))


@add("a configuration as deep as it is long")
def deep_configuration(path: Path) -> None:
    config = '{"a":' * 100_000
    save_file(state(), path, {"himo_config": config, "himo_sha256": "0" * 64})


def mutated(path: Path, seed: int, kind: str) -> None:
    """A good file with bytes of its pickles changed, and the checksum right again."""
    draw = random.Random(seed)
    torch.save(state(), path, _use_new_zipfile_serialization=kind != "flat")
    if kind == "flat":
        content, records = bytearray(path.read_bytes()), {}
    else:
        with zipfile.ZipFile(path) as saved:
            read = {name.partition("/")[2]: saved.read(name) for name in saved.namelist()}
        content = bytearray(read.pop("data.pkl"))
        records = {name: value for name, value in read.items() if name.startswith("data/")}
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(1500)] = draw.randrange(256)
    if kind == "flat":
        path.write_bytes(content)
    else:
        archive(path, bytes(content), **records)


for seed in range(30):
    for kind in ("zip", "flat"):
        add(f"a changed {kind} file {seed}")(
            lambda path, seed=seed, kind=kind: mutated(path, seed, kind)
        )


@pytest.fixture(scope="module", autouse=True)
def _first_use(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports what a first load imports, which is no cost of the files below."""
    path = tmp_path_factory.mktemp("first") / "model.pt"
    torch.save(state(), path)
    checkpoint.load(path)
    path.write_bytes(b"\x80\x02.")
    with pytest.raises(HimoError):
        checkpoint.load(path)


def test_the_corpus_is_large() -> None:
    assert len(INPUTS) >= 30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", corpus(INPUTS, sample=6))
def test_a_refusal_costs_nothing(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    make(path)
    size = path.stat().st_size / (1 << 20)
    for strict in (True, False):
        with bounded(SECONDS, MEBIBYTES + size):
            try:
                model, _ = checkpoint.load(path, strict=strict)
            except HimoError as error:
                message = str(error).replace(str(path), "")
                assert message.isprintable()
                assert len(message) < 3000  # 24 names and shapes, and 80 characters of any value
            else:
                assert isinstance(model, HiMoCLIP)
