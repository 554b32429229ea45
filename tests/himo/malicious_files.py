"""Files that are no honest checkpoint, each made by a function of (path, canary).

A pickle that is executed creates the canary. Every function is registered under its name with a
piece of the message that refuses it.
"""

import collections
import io
import json
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clip_cases import TINIEST
from torch import nn

from himo.checkpoint.layouts import from_himo
from himo.checkpoint.safetensors_files import write_safetensors
from himo.model import HiMoCLIP

Maker = Callable[[Path, Path], None]
CORPUS: dict[str, tuple[Maker, str]] = {}

BOMB = 64 << 20  # bytes that a bomb unpacks to: enough to see, not to hurt


def file(message: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        CORPUS[maker.__name__.replace("_", " ").strip()] = (maker, message)
        return maker

    return register


class Touch:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch '{canary}'"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def good_state() -> dict[str, torch.Tensor]:
    return HiMoCLIP(TINIEST).state_dict()


def archive(path: Path, data_pickle: bytes, **records: bytes) -> None:
    """A zip archive as torch.save lays it out, with any pickle as its data.pkl."""
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", data_pickle)
        for name, content in {"byteorder": b"little", "data/0": bytes(64), **records}.items():
            target.writestr(f"archive/{name}", content)


def state_pickle(size: tuple[int, ...], stride: tuple[int, ...], numel: int = 16) -> bytes:
    """The pickle of {"w": a float32 tensor of these numbers over the storage "0"}."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)  # LONG1

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + b"X\x07\0\0\0storage" + b"ctorch\nFloatStorage\n" + b"X\x01\0\0\x000"
    storage += b"X\x03\0\0\0cpu" + number(numel) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + numbers(size)
    tensor += numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\0\0\0w" + tensor + b"s."


def safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int, end: int, shape: Any = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def hf_directory(path: Path, config: Any, index: Any = None) -> None:
    path.mkdir()
    name = "shard.safetensors" if index else "model.safetensors"
    write_safetensors(str(path / name), from_himo(good_state(), "hf"), {})
    (path / "config.json").write_text(json.dumps(config))
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def open_clip_directory(path: Path, config: Any) -> None:
    path.mkdir()
    weights = str(path / "open_clip_model.safetensors")
    write_safetensors(weights, from_himo(good_state(), "open_clip"), {})
    (path / "open_clip_config.json").write_text(json.dumps(config))


# Pickles that run code.


@file("posix.system")
def a_plain_pickle_with_reduce(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Touch(canary)))


@file("posix.system")
def a_state_dict_with_reduce(path: Path, canary: Path) -> None:
    torch.save({**good_state(), "extra": Touch(canary)}, path)


@file("posix.system")
def a_state_dict_with_reduce_in_the_flat_format(path: Path, canary: Path) -> None:
    torch.save({"extra": Touch(canary)}, path, _use_new_zipfile_serialization=False)


@file("posix.system")
def a_state_dict_with_STACK_GLOBAL(path: Path, canary: Path) -> None:
    torch.save({"extra": Touch(canary)}, path, pickle_protocol=4)
    content = zipfile.ZipFile(path).read(f"{path.stem}/data.pkl")
    assert any(op.name == "STACK_GLOBAL" for op, _, _ in pickletools.genops(content))


@file("posix.system")
def a_training_checkpoint_with_reduce_deep_inside(path: Path, canary: Path) -> None:
    optimizer = {"state": {0: {"step": [({"x": Touch(canary)},)]}}}
    torch.save({"epoch": 1, "state_dict": good_state(), "optimizer": optimizer}, path)


@file("builtins.eval")
def an_archive_that_calls_eval(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02cbuiltins\neval\n(X\x01\0\0\x001tR.")


@file("builtins.getattr")
def an_archive_that_calls_getattr(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02cbuiltins\ngetattr\n(ctorch\nfloat32\nX\x01\0\0\0atR.")


@file("torch.load")
def an_archive_that_calls_torch_load(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02ctorch\nload\n(X\x01\0\0\0atR.")


@file("os.system")
def an_archive_with_a_dotted_name(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x04\x8c\x09torch._ut\x8c\x09os.system\x93.")


@file("the instruction INST")
def an_archive_with_INST(path: Path, canary: Path) -> None:
    archive(path, f"(Vtouch '{canary}'\nios\nsystem\n.".encode())


@file("os.system")
def an_archive_with_OBJ(path: Path, canary: Path) -> None:
    archive(path, f"(cos\nsystem\nVtouch '{canary}'\no.".encode())


@file("the instruction EXT1")
def an_archive_with_EXT1(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02\x82\x01.")


@file("a torch.float32 without tensors by name")
def an_archive_that_calls_a_dtype(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02ctorch\nfloat32\n)R.")


@file("where a container belongs")
def an_archive_that_sets_attributes_of_a_function(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb.")


@file("the instruction PERSID")
def an_archive_with_a_textual_persistent_id(path: Path, canary: Path) -> None:
    archive(path, b"Pstorage\n.")


@file("posix.system")
def a_script_archive_with_reduce(path: Path, canary: Path) -> None:
    payload = pickle.dumps(Touch(canary), protocol=2)[2:-1]
    body = b"\x80\x02c__torch__\nM\n)\x81}X\x01\0\0\0a" + payload + b"sb."
    archive(path, body, **{"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"import os"})


@file("held twice")
def a_script_module_that_holds_itself(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02c__torch__\nM\n)\x81q\0}X\x01\0\0\0ah\0sb.")


@file("not a CLIP")
def a_script_archive_of_another_model_with_code(path: Path, canary: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


@file("a torch.export archive (.pt2)")
def an_exported_program(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as target:
        for name in ("archive_format", "models/model.json", "data/weights/weight_0"):
            target.writestr(f"x/{name}", b"pt2")


@file("a tar archive")
def a_legacy_tar(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as target:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Touch(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))


# Pickles of something else than dense tensors.


@file("not a CLIP")
def a_pickled_module(path: Path, canary: Path) -> None:
    torch.save(Opaque(), path)


@file("_rebuild_sparse_tensor")
def a_sparse_tensor(path: Path, canary: Path) -> None:
    torch.save({**good_state(), "visual.proj": torch.eye(8).to_sparse()}, path)


@file("_rebuild_sparse_tensor")
def a_sparse_CSR_tensor_with_bad_indices(path: Path, canary: Path) -> None:
    tensor = torch.sparse_csr_tensor(
        torch.tensor([0, 1 << 40, -5]),
        torch.tensor([1 << 40, -7]),
        torch.ones(2),
        size=(2, 2),
        check_invariants=False,
    )
    torch.save({**good_state(), "visual.proj": tensor}, path)


@file("_rebuild_meta_tensor_no_storage")
def a_tensor_without_values(path: Path, canary: Path) -> None:
    torch.save({**good_state(), "visual.proj": torch.zeros(8, 8, device="meta")}, path)


@file("a list without tensors by name, expected a state dict; torch.save(model.state_dict()")
def a_list(path: Path, canary: Path) -> None:
    torch.save([torch.zeros(2)], path)


@file("not a CLIP")
def a_state_dict_of_another_model(path: Path, canary: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path)


@file("a dict without tensors by name")
def an_empty_state_dict(path: Path, canary: Path) -> None:
    torch.save(collections.OrderedDict(), path)


@file("a ResNet, expected a ViT")
def a_CLIP_with_a_ResNet(path: Path, canary: Path) -> None:
    torch.save({**good_state(), "visual.layer1.0.conv1.weight": torch.zeros(1)}, path)


# Files that claim more than they hold.


@file("is compressed")
def a_zip_bomb(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", state_pickle((BOMB // 4,), (1,), BOMB // 4))
        target.writestr("archive/data/0", bytes(BOMB))


@file("is compressed")
def a_stored_pickle_with_a_compressed_storage(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", state_pickle((16,), (1,)))
        target.writestr("archive/data/0", bytes(64), zipfile.ZIP_DEFLATED)


@file("declared in a file of")
def a_tensor_larger_than_the_file(path: Path, canary: Path) -> None:
    archive(path, state_pickle((1 << 40,), (1,)))


@file("declared in a file of")
def a_tensor_of_one_value_repeated(path: Path, canary: Path) -> None:
    archive(path, state_pickle((1 << 40,), (0,)))


@file("reaches value 31 of a storage of 16")
def a_tensor_larger_than_its_storage(path: Path, canary: Path) -> None:
    archive(path, state_pickle((32,), (1,)))


@file("an impossible storage, shape or stride")
def a_tensor_of_negative_size(path: Path, canary: Path) -> None:
    archive(path, state_pickle((-1,), (1,)))


@file("an impossible storage, shape or stride")
def a_tensor_of_negative_stride(path: Path, canary: Path) -> None:
    archive(path, state_pickle((4,), (-1,)))


@file("tensors of 4,398,046,511,104 bytes declared in a file of")
def a_storage_larger_than_its_record(path: Path, canary: Path) -> None:
    archive(path, state_pickle((4,), (1,), 1 << 40))


@file("a dict without tensors by name")
def a_key_that_takes_forever_to_hash(path: Path, canary: Path) -> None:
    # (1, 2), then a hundred times a pair of what came before: 2**100 numbers to hash.
    pairs = [b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100)]
    archive(path, b"\x80\x02(K\x01K\x02tq\0" + b"".join(pairs) + b"}hdK\x01s.")


@file("more instructions than any checkpoint has")
def a_pickle_of_millions_of_instructions(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02" + b"N" * 1_100_000 + b".")


@file("more than 4,194,304")
def a_pickle_of_17_megabytes(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02X" + struct.pack("<I", 17 << 20) + bytes(17 << 20) + b".")


@file("expected a state dict")
def a_pickle_with_a_huge_memo(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02Nr\xff\xff\xff\xff.")


@file("a damaged pickle")
def a_pickle_with_a_text_longer_than_itself(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"abc.")


@file("two records of one name")
def a_zip_with_two_pickles(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", b"\x80\x02}.")
        target.fp.flush()  # type: ignore[union-attr]
        target.NameToInfo.clear()
        target.writestr("archive/data.pkl", pickle.dumps(Touch(canary)))


@file("byte order")
def a_big_endian_archive(path: Path, canary: Path) -> None:
    archive(path, b"\x80\x02}.", byteorder=b"big")


@file("not of torch.save or torch.jit.save")
def a_zip_of_something_else(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("readme.txt", b"hello")


@file("not a zip file")
def a_truncated_zip(path: Path, canary: Path) -> None:
    torch.save(good_state(), path)
    path.write_bytes(path.read_bytes()[:-100])


@file("Bad CRC-32")
def a_zip_with_a_flipped_bit(path: Path, canary: Path) -> None:
    torch.save(good_state(), path)
    with zipfile.ZipFile(path) as source:
        place = next(e for e in source.infolist() if e.filename.endswith("data/2")).header_offset
    content = bytearray(path.read_bytes())
    content[place + 30 + int.from_bytes(content[place + 26 : place + 28], "little") + 64] ^= 1
    path.write_bytes(content)


# safetensors.


@file("a safetensors header of 9,223,372,036,854,775,808 bytes")
def a_header_of_exabytes(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16)}, bytes(16), length=1 << 63)


@file("a safetensors header of")
def a_header_longer_than_the_file(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16)}, bytes(16), length=1000)


@file("'a' twice")
def a_header_with_one_name_twice(path: Path, canary: Path) -> None:
    one = json.dumps(entry(0, 16))
    safetensors(path, f'{{"a":{one},"a":{one}}}'.encode(), bytes(16))


@file("damaged: ")
def overlapping_tensors(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16), "b": entry(8, 24)}, bytes(24))


@file("damaged: ")
def a_gap_between_tensors(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16), "b": entry(24, 40)}, bytes(40))


@file("damaged: ")
def data_that_no_tensor_has(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16)}, bytes(24))


@file("damaged: ")
def a_shape_of_terabytes(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16, [1 << 20, 1 << 20])}, bytes(16))


@file("damaged: ")
def a_negative_shape(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16, [-4])}, bytes(16))


@file("damaged: ")
def a_fractional_shape(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 16, [4.0])}, bytes(16))


@file("damaged: ")
def a_shape_of_a_thousand_digits(path: Path, canary: Path) -> None:
    number = "9" * 5000
    text = f'{{"a":{{"dtype":"F32","shape":[{number}],"data_offsets":[0,16]}}}}'
    safetensors(path, text.encode(), bytes(16))


@file("has the dtype F8_E4M3")
def an_unknown_dtype(path: Path, canary: Path) -> None:
    safetensors(path, {"a": entry(0, 4, [4], "F8_E4M3")}, bytes(4))


@file("NaN in JSON")
def a_NaN_in_the_header(path: Path, canary: Path) -> None:
    safetensors(path, b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', bytes(16))


@file("JSON too deep")
def a_header_of_a_hundred_thousand_brackets(path: Path, canary: Path) -> None:
    safetensors(path, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@file("no UTF-8 at byte 2")
def a_header_that_is_no_text(path: Path, canary: Path) -> None:
    safetensors(path, b'{"\xff":1}')


@file("damaged: ")
def a_header_of_other_types(path: Path, canary: Path) -> None:
    safetensors(path, {"a": [1, 2], "b": entry(0, 4)})


@file("damaged: ")
def metadata_of_numbers(path: Path, canary: Path) -> None:
    safetensors(path, {"__metadata__": {"a": 1}})


@file("its himo_sha256 is gone")
def a_file_of_himo_without_its_digest(path: Path, canary: Path) -> None:
    safetensors(path, {"__metadata__": {"himo_version": "1"}})


@file("NaN in JSON")
def a_configuration_of_NaN(path: Path, canary: Path) -> None:
    config = TINIEST.to_dict() | {"embed_dim": float("nan")}
    write_safetensors(str(path), good_state(), {"himo_config": json.dumps(config)})


@file("its configuration has text_layers 200, its tensors have 1")
def a_configuration_larger_than_its_tensors(path: Path, canary: Path) -> None:
    config = TINIEST.to_dict() | {"text_layers": 200}
    write_safetensors(str(path), good_state(), {"himo_config": json.dumps(config)})


@file("text_layers to be an integer from 1 to 256, got 5001")
def thousands_of_layers(path: Path, canary: Path) -> None:
    layers = {f"transformer.resblocks.{i + 1}.ln_1.bias": torch.zeros(0) for i in range(5000)}
    torch.save({**good_state(), **layers}, path)


# Directories.


@file("vision_config.hidden_act to be quick_gelu or gelu")
def a_directory_with_another_activation(path: Path, canary: Path) -> None:
    tower = {"hidden_act": "gelu_new"}
    hf_directory(path, {"vision_config": tower, "text_config": tower})


@file("expected model_cfg.quick_gelu to be True or False, got 'yes'")
def a_directory_of_open_clip_with_its_activation_as_text(path: Path, canary: Path) -> None:
    config = {"quick_gelu": "yes", "vision_cfg": {}, "text_cfg": {}}
    open_clip_directory(path, {"model_cfg": config})


@file("not the configuration of a CLIP of open_clip")
def a_directory_of_open_clip_with_a_list_of_towers(path: Path, canary: Path) -> None:
    open_clip_directory(path, {"model_cfg": [{}]})


@file("expected vision_cfg.width and head_width to be positive integers, got 8 and 0")
def a_directory_of_open_clip_with_heads_of_no_channels(path: Path, canary: Path) -> None:
    vision = {"width": 8, "head_width": 0}
    config = {"quick_gelu": True, "vision_cfg": vision, "text_cfg": {"heads": 1}}
    open_clip_directory(path, {"model_cfg": config})


@file("expected text_heads to be an integer from 1 to 1048576, got '1'")
def a_directory_of_open_clip_with_heads_as_text(path: Path, canary: Path) -> None:
    vision = {"width": 8, "head_width": 8}
    config = {"quick_gelu": True, "vision_cfg": vision, "text_cfg": {"heads": "1"}}
    open_clip_directory(path, {"model_cfg": config})


@file("not the configuration of a CLIPModel")
def a_directory_with_another_configuration(path: Path, canary: Path) -> None:
    hf_directory(path, {"model_type": "bert"})


@file("expected weight_map to give each tensor a file beside it")
def an_index_that_leaves_its_directory(path: Path, canary: Path) -> None:
    hf_directory(path, {}, {"weight_map": {"a": "../shard.safetensors"}})


@file("holds other tensors than model.safetensors.index.json says")
def an_index_of_other_tensors(path: Path, canary: Path) -> None:
    hf_directory(path, {}, {"weight_map": {"a": "shard.safetensors"}})


@file("a directory without model.safetensors")
def an_empty_directory(path: Path, canary: Path) -> None:
    path.mkdir()


# Files that are none, or nothing known.


@file("no such file")
def a_missing_file(path: Path, canary: Path) -> None:
    assert not path.exists()


@file("empty")
def an_empty_file(path: Path, canary: Path) -> None:
    path.touch()


@file("not a regular file")
def a_FIFO(path: Path, canary: Path) -> None:
    os.mkfifo(path)


@file("not a regular file")
def a_link_to_a_device(path: Path, canary: Path) -> None:
    path.symlink_to("/dev/zero")


@file("too many levels of symbolic links")
def a_link_to_itself(path: Path, canary: Path) -> None:
    path.symlink_to(path)


@file("a pointer of Git LFS")
def a_pointer_of_Git_LFS(path: Path, canary: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@file(r"starts with b'\x1f\x8b")
def a_compressed_file(path: Path, canary: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08\0" + bytes(100))


@file("starts with b'import o'")
def a_python_program(path: Path, canary: Path) -> None:
    path.write_text(f"import os; os.system(\"touch '{canary}'\")")


@file("a pickle that torch.save did not write")
def a_pickle_of_a_number(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(1))


@file("truncated: storage")
def a_truncated_flat_file(path: Path, canary: Path) -> None:
    torch.save(good_state(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-40])
