"""Damaged and hostile files as such: each ends in exit code 1, nothing on stdout, and one error message that
names the file, the tensor where there is one, what was expected and what was found. No crash, no hang,
bounded memory.

`command.run` sees to signals, sanitizer reports, time and address space in every run here. What well-formed
files may say wrongly of a model stands in test_hostile_checkpoints.py and test_hostile_configs.py.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints as ck
from checkpoints import BF16, CAST, MXFP4, NVFP4
from command import (
    ERROR,
    FINDING,
    FINE,
    MOST_MESSAGE_BYTES,
    Result,
    assert_fine,
    assert_refused,
    layertest,
    obey_permissions,
    printable,
)

UP = "model.layers.0.mlp.experts.1.up_proj"  # neither first nor last of anything
MEGABYTE = 1_000_000
MANY = 100_000
QUICK_S = 3  # for files of a few megabytes, which take a fraction of a second


# ---- every way in which a safetensors file reaches the command ----


@dataclass(frozen=True)
class Victim:
    """A file that the command is going to read, still sound."""

    path: Path
    run: Callable[[], Result]


def nvfp4_victim(root: Path) -> Victim:
    directory = ck.write_model(root / "nvfp4", NVFP4)
    return Victim(directory / ck.SINGLE_NAME, lambda: layertest(directory))


def direct_victim(root: Path) -> Victim:
    file = ck.write_model(root / "nvfp4", NVFP4) / ck.SINGLE_NAME
    return Victim(file, lambda: layertest(file))


def shard_victim(root: Path) -> Victim:
    directory = ck.write_shards(root / "nvfp4", NVFP4.tensors, NVFP4.config)
    return Victim(directory / ck.shard_name(1, 2), lambda: layertest(directory))


def original_victim(root: Path) -> Victim:
    nvfp4 = ck.write_model(root / "nvfp4", NVFP4)
    original = ck.write_model(root / "original", BF16)
    return Victim(original / ck.SINGLE_NAME, lambda: layertest(nvfp4, "--original", original))


def input_victim(root: Path) -> Victim:
    nvfp4 = ck.write_model(root / "nvfp4", NVFP4)
    file = ck.write_inputs(root / "inputs.safetensors")
    return Victim(file, lambda: layertest(nvfp4, "--input", file))


VICTIMS = {
    "nvfp4": nvfp4_victim,
    "nvfp4-file": direct_victim,
    "shard": shard_victim,
    "original": original_victim,
    "input": input_victim,
}


@pytest.fixture(params=VICTIMS)
def victim(request: pytest.FixtureRequest, tmp_path: Path) -> Victim:
    return VICTIMS[request.param](tmp_path)


def test_victims_are_sound(victim: Victim) -> None:
    """Without damage all of them run: what the other tests refuse, they refuse for its damage."""
    assert_fine(victim.run())


CONTENTS = {
    "empty": b"",
    "one-byte": b"\x02",
    "seven-bytes": b"\x02\0\0\0\0\0\0",
    "length-alone": (2).to_bytes(8, "little"),
    "length-0": bytes(8),
    "length-0-with-data": bytes(64),
    "length-beyond-file": (3).to_bytes(8, "little") + b"{}",
    "length-2^31": (1 << 31).to_bytes(8, "little") + b"{}",
    "length-2^63-1": ((1 << 63) - 1).to_bytes(8, "little") + b"{}",
    "length-2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "length-2^64-8": ((1 << 64) - 8).to_bytes(8, "little") + b"{}",
    "length-2^64-1": b"\xff" * 8 + b"{}",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4997504\n",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_no_safetensors_at_all(victim: Victim, content: bytes) -> None:
    """Files whose first bytes already make no sense, among them what failed downloads leave."""
    victim.path.write_bytes(content)
    assert_refused(victim.run(), victim.path, "expected", "found")


def test_header_above_the_limit(victim: Victim) -> None:
    """A header longer than the format's 100 MB is refused for its length, not read (the file is sparse)."""
    with victim.path.open("wb") as file:
        file.write((100 * MEGABYTE + 1).to_bytes(8, "little"))
        file.truncate(101 * MEGABYTE)
    assert_refused(victim.run(), victim.path, "100000000", "100000001")


def test_truncated_everywhere(victim: Victim) -> None:
    """Downloads break off anywhere: within the length, within the header, within the data."""
    content = victim.path.read_bytes()
    data_begin = 8 + int.from_bytes(content[:8], "little")
    for size in (5, 9, data_begin // 2, data_begin - 1, data_begin, data_begin + 1, len(content) - 1):
        victim.path.write_bytes(content[:size])
        assert_refused(victim.run(), victim.path, "expected", "found")


def test_trailing_data(victim: Victim) -> None:
    """A byte that belongs to no tensor means that the header is not this file's."""
    victim.path.write_bytes(victim.path.read_bytes() + b"\0")
    assert_refused(victim.run(), victim.path, "expected", "found")


# ---- things that are no regular files ----


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_nothing(path: Path) -> None:
    del path


def make_symlink_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_long_symlink_loop(path: Path) -> None:
    path.with_name("other").symlink_to(path.name)
    path.symlink_to("other")


def make_dangling_symlink(path: Path) -> None:
    path.symlink_to("gone")


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


STAND_INS = {
    "directory": make_directory,
    "fifo": make_fifo,
    "symlink-loop": make_symlink_loop,
    "long-symlink-loop": make_long_symlink_loop,
    "dangling-symlink": make_dangling_symlink,
    "device": make_device,
}


@pytest.mark.parametrize("stand_in", [make_nothing, *STAND_INS.values()], ids=["nothing", *STAND_INS.keys()])
def test_no_regular_file(victim: Victim, stand_in: Callable[[Path], None]) -> None:
    """A directory, a pipe (which must not be waited for), links that lead nowhere, a device, or nothing."""
    victim.path.unlink()
    stand_in(victim.path)
    assert_refused(victim.run(), victim.path.name)


def without_quantization() -> ck.Config:
    """hf_quant_config.json is read where config.json does not tell the quantization."""
    return {key: value for key, value in NVFP4.config.items() if key != "quantization_config"}


@pytest.mark.parametrize("stand_in", STAND_INS.values(), ids=STAND_INS.keys())
@pytest.mark.parametrize("name", [ck.INDEX_NAME, "config.json", "hf_quant_config.json"])
def test_json_that_is_no_regular_file(tmp_path: Path, name: str, stand_in: Callable[[Path], None]) -> None:
    """The same in the place of a model's JSON files. A config that is there and can't be read is an error,
    not the absence of a config: it may hold the activation's clamp.
    """
    directory = ck.write_shards(tmp_path / "nvfp4", NVFP4.tensors, without_quantization())
    (directory / name).unlink(missing_ok=True)
    stand_in(directory / name)
    assert_refused(layertest(directory), directory / name)


@pytest.mark.parametrize("name", [ck.INDEX_NAME, ck.shard_name(1, 2), "config.json"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    """A file that this user may not read: the system's reason is passed on."""
    directory = ck.write_shards(tmp_path / "nvfp4", NVFP4.tensors, NVFP4.config)
    (directory / name).chmod(0)
    result = layertest(directory, in_child=obey_permissions())
    assert_refused(result, directory / name, "Permission denied")


def test_unreadable_directory(tmp_path: Path) -> None:
    """A model directory that may not be entered is refused for that, not for lacking files."""
    directory = ck.write_shards(tmp_path / "nvfp4", NVFP4.tensors, NVFP4.config)
    directory.chmod(0)
    try:
        result = layertest(directory, in_child=obey_permissions())
    finally:
        directory.chmod(0o755)
    assert_refused(result, directory, "Permission denied")


@pytest.mark.parametrize("stand_in", STAND_INS.values(), ids=STAND_INS.keys())
@pytest.mark.parametrize("option", ["--nvfp4", "--original"])
def test_no_model_directory(tmp_path: Path, option: str, stand_in: Callable[[Path], None]) -> None:
    """The model directory itself is empty, a pipe, a link that leads nowhere, or a device."""
    path = tmp_path / "model"
    stand_in(path)
    sound = ck.write_model(tmp_path / "sound", NVFP4)
    result = layertest(path) if option == "--nvfp4" else layertest(sound, option, path)
    assert_refused(result, path, "expected", "found")


# ---- JSON ----

BAD_JSON = {
    "empty": b"",
    "blank": b"   ",
    "no-json": b"tensor",
    "open-object": b"{",
    "open-string": b'{"a',
    "trailing-comma": b'{"a": {},}',
    "comment": b'{} // "a"',
    "two-values": b"{}{}",
    "nul": b"{}\0",
    "array": b"[]",
    "string": b'"a"',
    "number": b"7",
    "null": b"null",
    "invalid-utf8": b'{"\xff\xfe": {}}',
    "overlong-utf8": b'{"\xc0\xaf": {}}',
    "lone-surrogate": b'{"\\ud800": {}}',
    "utf16": '{"a": {}}'.encode("utf-16"),
    "number-1e400": b'{"a": 1e400}',
    "not-a-number": b'{"a": NaN}',
    "duplicate-key": b'{"a": {}, "a": {}}',
    "escaped-duplicate-key": b'{"a": {}, "\\u0061": {}}',
    "deep-arrays": b"[" * MANY + b"]" * MANY,
    "deep-open-arrays": b"[" * MANY,
    "deep-objects": b'{"a":' * MANY + b"{}" + b"}" * MANY,
    "deep-mixed": b'[{"a":' * MANY,
    "deep-in-metadata": b'{"__metadata__":' + b"[" * MANY + b"]" * MANY + b"}",
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_header_that_is_no_json_object(victim: Victim, text: bytes) -> None:
    victim.path.write_bytes(ck.file_bytes(text))
    assert_refused(victim.run(), victim.path, "expected", "found")


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.parametrize("name", [ck.INDEX_NAME, "config.json", "hf_quant_config.json"])
def test_damaged_json_file(tmp_path: Path, name: str, text: bytes) -> None:
    directory = ck.write_shards(tmp_path / "nvfp4", NVFP4.tensors, without_quantization())
    (directory / name).write_bytes(text)
    assert_refused(layertest(directory), directory / name, "expected", "found")


HOARDS = {
    "objects": b'{"a": {"shape": [' + b"{}," * 2_000_000 + b"0]}}",
    "arrays": b'{"a": {"shape": [' + b"[]," * 2_000_000 + b"0]}}",
    "numbers": b'{"a": {"shape": [' + b"1," * 3_000_000 + b"0]}}",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(500_000)) + b"}",
}


@pytest.mark.parametrize("text", HOARDS.values(), ids=HOARDS.keys())
def test_header_of_many_small_things(tmp_path: Path, text: bytes) -> None:
    """Six megabytes of header that parse into as many values as possible: memory and time stay bounded."""
    directory = ck.write_model(tmp_path / "nvfp4", NVFP4)
    file = directory / ck.SINGLE_NAME
    file.write_bytes(ck.file_bytes(text))
    assert_refused(layertest(directory, time_limit_s=QUICK_S), file, "expected", "found")


def test_many_tensors(tmp_path: Path) -> None:
    """A sound file of 40,000 tensors opens in no time. Real ones hold as many: a layer of 256 experts has
    3072, and Qwen3-30B-A3B in four shards 18,000 a shard.
    """
    empty = ck.Tensor("U8", (0,), b"")
    tensors = NVFP4.tensors | {f"model.layers.9.tensor.{i}": empty for i in range(40_000)}
    directory = ck.write_single(tmp_path / "nvfp4", tensors, NVFP4.config)
    assert_fine(layertest(directory, time_limit_s=QUICK_S))


# ---- entries of the header ----

Damage = Callable[[dict[str, Any], bytes], bytes]
"""From a sound header and sound data to the bytes of a damaged file."""


def with_entry(**members: Any) -> Damage:
    """One tensor's entry with other members; a member of None is left out."""

    def damage(header: dict[str, Any], data: bytes) -> bytes:
        entry = header[f"{UP}.weight"] | members
        header[f"{UP}.weight"] = {key: value for key, value in entry.items() if value is not None}
        return ck.file_bytes(header, data)

    return damage


def with_raw(text: str, **members: Any) -> Damage:
    """The same where "@" stands for text that no JSON writer would write."""

    def damage(header: dict[str, Any], data: bytes) -> bytes:
        header[f"{UP}.weight"] |= members
        return ck.file_bytes(json.dumps(header).replace('"@"', text).encode(), data)

    return damage


def check_header_damage(tmp_path: Path, damage: Damage, *parts: str) -> None:
    directory = ck.write_model(tmp_path / "nvfp4", NVFP4)
    file = directory / ck.SINGLE_NAME
    file.write_bytes(damage(*ck.read_header(file)))
    assert_refused(layertest(directory), file, "expected", "found", *parts)


NO_NUMBERS = ["-1", "1.5", "96.0", "1e99", "18446744073709551616", '"96"', '""', "true", "null", "[]", "{}"]
NO_JSON_NUMBERS = ["1e400", "-1e400", "NaN", "Infinity", "0x60", "096", "+96", ".5", "1_0", "9e"]


@pytest.mark.parametrize("text", [*NO_NUMBERS, "9223372036854775808", "18446744073709551615"])
@pytest.mark.parametrize("shape", [["@", 32], [96, "@"], ["@"]], ids=["rows", "columns", "alone"])
def test_extents_that_are_no_numbers(tmp_path: Path, shape: list, text: str) -> None:
    """Extents are whole numbers from 0 that fit 63 bits, and nothing else."""
    check_header_damage(tmp_path, with_raw(text, shape=shape), f"'{UP}.weight'")


@pytest.mark.parametrize("text", [*NO_NUMBERS, "9223372036854775807", "18446744073709551615"])
@pytest.mark.parametrize("offsets", [["@", 3072], [0, "@"], ["@", "@"]], ids=["begin", "end", "both"])
def test_offsets_that_are_no_numbers(tmp_path: Path, offsets: list, text: str) -> None:
    """Offsets are whole numbers from 0 within the data."""
    check_header_damage(tmp_path, with_raw(text, data_offsets=offsets), f"'{UP}.weight'", "data_offsets")


@pytest.mark.parametrize("text", NO_JSON_NUMBERS)
@pytest.mark.parametrize("member", ["shape", "data_offsets"])
def test_numbers_that_are_no_json(tmp_path: Path, member: str, text: str) -> None:
    check_header_damage(tmp_path, with_raw(text, **{member: ["@", 32]}), "JSON")


ABSURD_SHAPES = {
    "overflow-64": [1 << 62, 4],
    "overflow-to-true-size": [1 << 33, 1 << 33, 3072],
    "overflow-in-bits": [1 << 60, 1],
    "largest-extent": [(1 << 63) - 1],
    "overflow-then-zero": [1 << 62, 1 << 62, 0],
    "rank-1000": [1] * 1000,
    "rank-1000-zeros": [0] * 1000,
    "rank-1000000": [1] * MEGABYTE,
    "zero-rows": [0, 32],
    "zero-columns": [96, 0],
    "one-row-more": [97, 32],
    "one-row-less": [95, 32],
    "scalar": [],
}


@pytest.mark.parametrize("shape", ABSURD_SHAPES.values(), ids=ABSURD_SHAPES.keys())
def test_absurd_shape(tmp_path: Path, shape: list[int]) -> None:
    """Shapes that overflow, have a thousand dimensions, or do not fit the tensor's bytes."""
    check_header_damage(tmp_path, with_entry(shape=shape), f"'{UP}.weight'")


def test_shape_of_deep_brackets(tmp_path: Path) -> None:
    brackets = "[" * MANY + "]" * MANY
    check_header_damage(tmp_path, with_raw(brackets, shape="@"), "nested")


@pytest.mark.parametrize("value", [None, "96", 96, {}, True], ids=repr)
@pytest.mark.parametrize("member", ["shape", "data_offsets"])
def test_member_that_is_no_array(tmp_path: Path, member: str, value: Any) -> None:
    """A missing shape (None) is an error as well as one of another type."""
    check_header_damage(tmp_path, with_entry(**{member: value}), f"'{UP}.weight'", member)


@pytest.mark.parametrize(
    "offsets", [[], [0], [0, 3072, 3072], [[0, 3072]], [0] * MANY], ids=lambda o: str(o)[:9]
)
def test_offsets_that_are_no_pair(tmp_path: Path, offsets: list) -> None:
    check_header_damage(tmp_path, with_entry(data_offsets=offsets), f"'{UP}.weight'", "data_offsets")


@pytest.mark.parametrize(
    "dtype",
    [None, "", "F8", "F8_E4M4", "f8_e4m3", "U8 ", "U8\0", "float32", 8, True, [], {}],
    ids=repr,
)
def test_unknown_dtype(tmp_path: Path, dtype: Any) -> None:
    """The format spells its types one way. None leaves the member out."""
    check_header_damage(tmp_path, with_entry(dtype=dtype), f"'{UP}.weight'", "dtype")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("BF16", 6144), ("F32", 12288), ("F64", 24576), ("F4", 1536), ("F6_E2M3", 2304), ("C64", 24576)],
)
def test_bytes_that_do_not_match_the_dtype(tmp_path: Path, dtype: str, expected: int) -> None:
    """[96, 32] of these types does not take the 3072 bytes that are there."""
    check_header_damage(tmp_path, with_entry(dtype=dtype), f"'{UP}.weight'", str(expected), "3072")


def test_bits_that_fill_no_bytes(tmp_path: Path) -> None:
    """Three 4-bit values take 12 bits: no number of bytes is right."""
    check_header_damage(tmp_path, with_entry(dtype="F4", shape=[3]), f"'{UP}.weight'")


@pytest.mark.parametrize("entry", [[], "x", 7, None, True, {}], ids=repr)
def test_entry_that_is_no_object(tmp_path: Path, entry: Any) -> None:
    """What stands under a tensor's name is not a dtype, a shape and offsets."""

    def damage(header: dict[str, Any], data: bytes) -> bytes:
        return ck.file_bytes(header | {f"{UP}.weight": entry}, data)

    check_header_damage(tmp_path, damage, f"'{UP}.weight'")


def repeat_tensor(header: dict[str, Any], data: bytes) -> bytes:
    """The same tensor name twice, with different entries."""
    text = json.dumps(header)
    return ck.file_bytes(f'{{"{UP}.weight": {{}}, {text[1:]}'.encode(), data)


def repeat_member(header: dict[str, Any], data: bytes) -> bytes:
    """The same key twice within an entry: readers disagree on which one counts."""
    entry = json.dumps(header[f"{UP}.weight"])
    text = json.dumps(header).replace(entry, '{"shape": [1], ' + entry[1:])
    return ck.file_bytes(text.encode(), data)


@pytest.mark.parametrize(("damage", "key"), [(repeat_tensor, f"{UP}.weight"), (repeat_member, "shape")])
def test_duplicate_keys(tmp_path: Path, damage: Damage, key: str) -> None:
    check_header_damage(tmp_path, damage, f"'{key}'")


# ---- offsets of the header ----


def shift_offsets(header: dict[str, Any], first: int, by: int) -> dict[str, Any]:
    """Moves every tensor that begins at `first` or later."""
    moved = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        far = by if begin >= first else 0
        moved[name] = entry | {"data_offsets": [begin + far, end + far]}
    return moved


def hole_in_the_middle(header: dict[str, Any], data: bytes) -> bytes:
    begin = header[f"{UP}.weight"]["data_offsets"][0]
    return ck.file_bytes(shift_offsets(header, begin, 8), data[:begin] + bytes(8) + data[begin:])


def hole_at_the_start(header: dict[str, Any], data: bytes) -> bytes:
    return ck.file_bytes(shift_offsets(header, 0, 8), bytes(8) + data)


def overlap_by_a_byte(header: dict[str, Any], data: bytes) -> bytes:
    begin = header[f"{UP}.weight"]["data_offsets"][0]
    return ck.file_bytes(shift_offsets(header, begin, -1), data[:begin] + data[begin + 1 :])


def two_names_for_one_place(header: dict[str, Any], data: bytes) -> bytes:
    return ck.file_bytes(header | {"alias": header[f"{UP}.weight"]}, data)


def empty_tensor_inside_another(header: dict[str, Any], data: bytes) -> bytes:
    begin = header[f"{UP}.weight"]["data_offsets"][0]
    inside = {"dtype": "U8", "shape": [0], "data_offsets": [begin + 1, begin + 1]}
    return ck.file_bytes(header | {"inside": inside}, data)


def reversed_offsets(header: dict[str, Any], data: bytes) -> bytes:
    header[f"{UP}.weight"]["data_offsets"].reverse()
    return ck.file_bytes(header, data)


def offsets_beyond_the_data(header: dict[str, Any], data: bytes) -> bytes:
    return with_entry(data_offsets=[len(data), len(data) + 3072])(header, data)


def end_wraps_around(header: dict[str, Any], data: bytes) -> bytes:
    return with_entry(data_offsets=[(1 << 64) - 3072, 0])(header, data)


BAD_OFFSETS: list[tuple[Damage, str]] = [
    (hole_in_the_middle, f"'{UP}.weight'"),
    (hole_at_the_start, f"'{next(iter(NVFP4.tensors))}'"),
    (overlap_by_a_byte, f"'{UP}.weight'"),
    (two_names_for_one_place, "'"),
    (empty_tensor_inside_another, "'"),
    (reversed_offsets, f"'{UP}.weight'"),
    (offsets_beyond_the_data, f"'{UP}.weight'"),
    (end_wraps_around, f"'{UP}.weight'"),
]


@pytest.mark.parametrize(("damage", "tensor"), BAD_OFFSETS, ids=lambda value: getattr(value, "__name__", ""))
def test_offsets_that_do_not_tile(tmp_path: Path, damage: Damage, tensor: str) -> None:
    """Tensors must cover the data: no byte in two of them, none in none."""
    check_header_damage(tmp_path, damage, tensor)


# ---- names chosen to hurt whoever reads the message ----

NASTY_TEXTS = {
    "escape-sequence": "\x1b[2J\x1b[31mverdict: fine",
    "newline": "a\nfourfold: all is well",
    "carriage-return": "a\rfourfold: all is well",
    "nul": "a\0b",
    "delete": "a\x7f",
    "c1-control": "a\x9b31m",
    "megabyte": "a" * MEGABYTE,
}


def entry_with(**members: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} | members


NASTY_PLACES: dict[str, Callable[[str], bytes]] = {
    "tensor": lambda text: ck.file_bytes({text: 7}),
    "dtype": lambda text: ck.file_bytes({"a": entry_with(dtype=text)}),
    "extent": lambda text: ck.file_bytes({"a": entry_with(shape=[text])}),
    "offset": lambda text: ck.file_bytes({"a": entry_with(data_offsets=[0, text])}),
    "duplicate-key": lambda text: ck.file_bytes("{{{0}: 1, {0}: 2}}".format(json.dumps(text)).encode()),
}


@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS.keys())
@pytest.mark.parametrize("content", NASTY_PLACES.values(), ids=NASTY_PLACES.keys())
def test_nasty_text_in_a_header(tmp_path: Path, content: Callable[[str], bytes], text: str) -> None:
    """Text out of a file reaches the terminal harmless and cut to a bearable length: assert_refused looks."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(content(text))
    assert_refused(layertest(file), file)


@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS.keys())
def test_nasty_text_in_an_index(tmp_path: Path, text: str) -> None:
    """The same for tensor names and shard names of an index."""
    for weight_map in ({text: 7}, {"a": text}):
        ck.write_json(tmp_path / ck.INDEX_NAME, {"weight_map": weight_map})
        assert_refused(layertest(tmp_path), tmp_path / ck.INDEX_NAME)


@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS.keys())
def test_nasty_text_in_a_report(tmp_path: Path, text: str) -> None:
    """What a config says of a model goes into the report, on stdout: no escapes and no lines of its own. Nor in
    the message that refuses a model_type which nobody knows.
    """
    rules = ("--activation", "swiglu", "--input", ck.write_inputs(tmp_path / "inputs.safetensors"))
    plain = layertest(ck.write_model(tmp_path / "nvfp4", NVFP4), *rules)
    quantization = {"quant_method": text, "quant_algo": text}
    config = NVFP4.config | {"model_type": text, "quantization_config": quantization}
    directory = ck.write_single(tmp_path / "nvfp4", NVFP4.tensors, config)
    assert_refused(layertest(directory), directory, "model_type")
    result = layertest(directory, *rules)
    assert_fine(result)
    assert printable(result.stdout), repr(result.stdout[:1000])
    assert len(result.stdout) < len(plain.stdout) + MOST_MESSAGE_BYTES
    assert len(result.stdout.splitlines()) == len(plain.stdout.splitlines()) + 1, "one note"


# ---- fuzz ----

FUZZ_VARIANTS = 60


def flip_bits(rng: np.random.Generator, content: bytearray) -> None:
    for position in rng.integers(0, len(content), rng.integers(1, 4)):
        content[position] ^= 1 << int(rng.integers(0, 8))


def flip_in_front(rng: np.random.Generator, content: bytearray) -> None:
    """Lengths, names, shapes and offsets stand in front; data are most of the file and forgive more."""
    content[int(rng.integers(0, min(2000, len(content))))] = int(rng.integers(0, 256))


def change_a_digit(rng: np.random.Generator, content: bytearray) -> None:
    """A header that still parses, with another number in it."""
    digits = [i for i, byte in enumerate(content[:4000]) if chr(byte).isdigit()]
    content[int(rng.choice(digits))] = ord(str(rng.integers(0, 10)))


def truncate(rng: np.random.Generator, content: bytearray) -> None:
    del content[int(rng.integers(0, len(content))) :]


def cut_out(rng: np.random.Generator, content: bytearray) -> None:
    begin = int(rng.integers(0, len(content)))
    del content[begin : begin + int(rng.integers(1, 64))]


def repeat_a_part(rng: np.random.Generator, content: bytearray) -> None:
    begin = int(rng.integers(0, len(content)))
    content[begin:begin] = content[begin : begin + int(rng.integers(1, 64))]


DAMAGES = (flip_bits, flip_in_front, change_a_digit, truncate, cut_out, repeat_a_part)


@pytest.fixture(scope="module")
def fuzz_ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with index and config, an original, and an input: every reader of the command."""
    root = tmp_path_factory.mktemp("fuzz")
    ck.write_shards(root / "nvfp4", CAST.tensors, CAST.config, misalign=3)
    ck.write_single(root / "original", MXFP4.tensors, MXFP4.config)
    ck.write_inputs(root / "inputs.safetensors")
    return root


@pytest.mark.parametrize("seed", range(FUZZ_VARIANTS))
def test_random_damage(fuzz_ground: Path, seed: int) -> None:
    """Random damage to a random file: the command refuses, or runs and judges; it never crashes or hangs."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in fuzz_ground.rglob("*") if path.is_file())
    victim = files[seed % len(files)]
    sound = victim.read_bytes()
    content = bytearray(sound)
    DAMAGES[int(rng.integers(len(DAMAGES)))](rng, content)
    victim.write_bytes(content)
    try:
        result = layertest(
            fuzz_ground / "nvfp4",
            *("--original", fuzz_ground / "original", "--input", fuzz_ground / "inputs.safetensors"),
        )
    finally:
        victim.write_bytes(sound)
    assert result.code in (FINE, ERROR, FINDING), str(result)
    if result.code == ERROR:
        assert_refused(result)
    else:
        assert result.stdout and not result.stderr, str(result)
