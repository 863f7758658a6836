"""Whatever stands where a header, an index, a config or a manifest should: one of Rehead's errors, or a true answer.

A true answer never points outside the file, never counts a byte twice, and covers every byte of the data.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rehead.checkpoints.contents import gather, parse_config
from rehead.checkpoints.manifest import read_manifest, verify_files
from rehead.checkpoints.safetensors_io import (
    DTYPE_BITS,
    Header,
    header_bytes,
    nbytes_of,
    parse_header,
    parse_index,
    read_header,
)
from rehead.checkpoints.shards import OutputTensor, parse_size, plan_shards
from rehead.errors import ReheadError, UnsupportedError, UsageError

many = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=6), x, max_size=4), max_leaves=12
)
counts = st.integers(-2, 40) | st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F33", "", 3, None]),
        "shape": st.lists(counts, max_size=4) | anything,
        "data_offsets": st.lists(counts, min_size=2, max_size=2) | anything,
        "other": anything,
    },
)
tables = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | anything, max_size=5)


def one_line(err: ReheadError) -> None:
    assert "\n" not in str(err)
    assert len(str(err)) < 600


def check_true(header: Header, size: int) -> None:
    """What a parsed header must fulfil for a file of ``size`` bytes."""
    at = header.data_start
    for t in header.tensors:
        assert t.start == at
        assert t.nbytes == nbytes_of(t.dtype, t.shape)
        at = t.end
    assert at == size
    assert len({t.name for t in header.tensors}) == len(header.tensors)


def try_file(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(raw)
        try:
            header = read_header(path)
        except UnsupportedError as err:
            one_line(err)
        else:
            check_true(header, len(raw))


@many
@given(st.binary(max_size=200))
def test_random_files(raw):
    try_file(raw)


@many
@given(st.binary(max_size=120), st.integers(0, 300), st.binary(max_size=20))
@example(b"{}", 2, b"")
@example(b'{"a":1}' + b" " * 9, 16, b"")
def test_random_headers_of_any_claimed_length(header, length, data):
    try_file(length.to_bytes(8, "little") + header + data)


@many
@given(tables, st.integers(0, 64))
def test_tables_of_the_right_shape_with_wrong_numbers(table, data):
    raw = json.dumps(table).encode()
    try_file(len(raw).to_bytes(8, "little") + raw + b"\0" * data)


good = st.lists(
    st.tuples(st.sampled_from([d for d, b in DTYPE_BITS.items() if b >= 8]), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


@many
@given(good, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3), st.data())
def test_true_headers_are_read_back_and_one_changed_byte_never_misleads(shapes, metadata, data):
    """What is written is read; after any one byte of the header is changed it is refused or still true of the file."""
    listed = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    head = header_bytes(listed, metadata)
    assert len(head) % 8 == 0
    body = b"\0" * sum(nbytes_of(d, s) for _, d, s in listed)
    header = parse_header(head[8:], len(head) + len(body), "f")
    assert [(t.name, t.dtype, t.shape) for t in sorted(header.tensors, key=lambda t: int(t.name[1:]))] == listed
    assert header.metadata == metadata
    check_true(header, len(head) + len(body))
    at = data.draw(st.integers(0, len(head) - 1))
    changed = bytearray(head + body)
    changed[at] = data.draw(st.integers(0, 255))
    try_file(bytes(changed))
    cut = data.draw(st.integers(0, len(changed)))
    try_file(bytes((head + body)[:cut]))


@many
@given(st.binary(max_size=100) | anything.map(lambda x: json.dumps(x).encode()))
def test_random_indexes_and_configs(raw):
    for parse in (parse_index, parse_config):
        try:
            parse(raw, "model.safetensors.index.json")
        except UnsupportedError as err:
            one_line(err)


names = st.text(max_size=20) | st.sampled_from(
    ["../x.safetensors", "/x.safetensors", "a/../x.safetensors", "x.safetensors", "d/x.safetensors", ".safetensors",
     "..\\x.safetensors", "~/x.safetensors", "x.bin", "%2e%2e/x.safetensors"]
)  # fmt: skip


@many
@given(st.dictionaries(st.text(max_size=5), names | anything, max_size=4))
def test_no_index_leads_out_of_the_folder(weight_map):
    """Every shard name that passes stays below the folder it is joined to."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve() / "home"
        opened = []

        def header_of(shard: str) -> Header:
            opened.append(shard)
            return Header((), {}, 8)

        try:
            gather(json.dumps({"weight_map": weight_map}).encode(), "m", header_of)
        except UnsupportedError as err:
            one_line(err)
        for shard in opened:
            assert (home / shard).resolve().is_relative_to(home)
            assert (home / shard).resolve() != home


parts = anything | st.just(1) | st.dictionaries(names, anything, max_size=2)
manifests = st.dictionaries(st.text(max_size=6) | st.sampled_from(["format", "files"]), parts, max_size=4)


@many
@given(st.binary(max_size=60) | manifests.map(lambda x: json.dumps(x).encode()))
def test_random_manifests(raw):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rehead.json").write_bytes(raw)
        for check in (read_manifest, verify_files):
            try:
                check(folder)
            except ReheadError as err:
                one_line(err)


@many
@given(st.text(max_size=12) | st.integers() | st.sampled_from(["5GB", "5 gb", "1.5KiB", "0", "-1", "1e9", "9" * 400]))
def test_sizes(text):
    try:
        assert parse_size(text) > 0
    except UsageError as err:
        one_line(err)


def test_known_sizes():
    known = {"5GB": 5 * 10**9, "1.5 KiB": 1536, "2m": 2 * 10**6, "7": 7, 9: 9, "1TiB": 2**40}
    for text, size in known.items():
        assert parse_size(text) == size


@many
@given(good, st.integers(1, 200))
def test_every_layout_holds_each_tensor_once_aligned_and_within_the_limit(shapes, limit):
    listed = [OutputTensor(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    if not listed:
        return
    shards = plan_shards(listed, {}, limit)
    assert sorted(t.name for s in shards for t in s.tensors) == sorted(t.name for t in listed)
    for shard in shards:
        header = parse_header(shard.header[8:], shard.nbytes, shard.file)
        check_true(header, shard.nbytes)
        data = [t for t in header.tensors if t.nbytes]
        assert len(data) <= 1 or sum(t.nbytes for t in data) <= limit
        for t in data:
            assert (t.start - header.data_start) % (DTYPE_BITS[t.dtype] // 8) == 0
