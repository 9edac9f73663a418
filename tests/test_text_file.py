"""Files that hold a table: what else stands in one is refused in one line that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lyra
from lyra.spec import AttentionSpec, SpecError, load_spec
from lyra.spec.errors import InputError
from lyra.spec.text_file import DEEPEST, parse_json, read_json, read_toml

DEEP = 100_000

BAD_TOML: dict[str, tuple[bytes, str]] = {
    "no UTF-8": (b"a = '\xff\xfe'", "is not UTF-8 text (byte 0xff at 5)"),
    "UTF-16": ("a = 1".encode("utf-16"), "is not UTF-8 text"),
    "deep lists": (b"a = " + b"[" * DEEP + b"]" * DEEP, f"nests more than {DEEPEST}"),
    "deep names": (b"a" + b".a" * 2000 + b" = 1", f"nests more than {DEEPEST}"),
    "empty": (b"", "is empty; expected TOML"),
    "blank": (b" \n\t\n", "is empty; expected TOML"),
    "JSON": (b'{"a": 1}', "is not TOML"),
    "a long number": (b"a = " + b"9" * 5000, "is not TOML"),
    "weights": (b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", "is not TOML"),
}
BAD_JSON: dict[str, tuple[bytes, str]] = {
    "no UTF-8": (b'{"a": "\xff"}', "is not UTF-8 text (byte 0xff at 7)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
    "deep lists": (b"[" * DEEP + b"]" * DEEP, f"nests more than {DEEPEST}"),
    "deep objects": (b'{"a":' * 200 + b"1" + b"}" * 200, f"nests more than {DEEPEST}"),
    "empty": (b"", "is empty; expected JSON"),
    "a list": (b"[1, 2]", "holds a list; expected JSON"),
    "a number": (b"17", "holds a number; expected JSON"),
    "null": (b"null", "holds null; expected JSON"),
    "TOML": (b"a = 1", "is not JSON"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "a name twice": (b'{"ok": false, "b": {"ok": 1}, "ok": true}', "'ok' stands twice"),
    "half a character": (rb'{"a": ["\ud800"]}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("refuse", [SpecError, InputError])
@pytest.mark.parametrize(
    ("read", "data", "words"),
    [
        *(pytest.param(read_toml, *bad, id=f"TOML: {name}") for name, bad in BAD_TOML.items()),
        *(pytest.param(read_json, *bad, id=f"JSON: {name}") for name, bad in BAD_JSON.items()),
    ],
)
def test_what_is_no_table_is_refused_in_a_line(
    read: Callable[..., Any], data: bytes, words: str, refuse: type[ValueError], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(refuse) as caught:
        read(path, refuse=refuse, what="a case")
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "a case" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is a folder; expected a file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(SpecError, match="is no name of a file"):
        read_json("a\0b")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device here")
def test_a_file_without_an_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra.spec.text_file.LARGEST", 1 << 20)
    with pytest.raises(SpecError, match="is larger than 1 MiB"):
        read_json("/dev/zero")


def test_what_is_a_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": {"σ": [1, "ok", null]}}'.encode())  # as some editors begin a file
    assert read_json(path) == {"a": {"σ": [1, "ok", None]}}
    path.write_text("[a]\nb = 'σ'", encoding="utf-8")
    assert read_toml(path) == {"a": {"b": "σ"}}
    assert parse_json('{"a": [[]]}') == {"a": [[]]}


def test_specs_are_read_through_this_door(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    for data, words in BAD_TOML.values():
        path.write_bytes(data)
        for read in (load_spec, AttentionSpec.from_toml, lyra.ModelSpec.from_toml):
            with pytest.raises(SpecError) as caught:
                read(path)
            assert words in str(caught.value)
    for data, words in BAD_JSON.values():
        text = data.decode("utf-8", "replace")
        if "UTF-8" not in words:
            with pytest.raises(SpecError) as caught:
                lyra.HeadSplit.from_json(text)
            assert words in str(caught.value)
    with pytest.raises(SpecError, match="named by a text or a path"):
        load_spec(5)  # type: ignore[arg-type]


def test_a_spec_that_is_wrong_everywhere_is_told_in_a_few_lines(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text("\n".join(f"surprise{i} = '{'x' * 5000}'" for i in range(300)))
    with pytest.raises(SpecError, match="more of the kind") as caught:
        load_spec(path)
    assert len(str(caught.value)) < 1000
    with pytest.raises(SpecError) as caught:
        AttentionSpec.from_dict(json.loads('{"hidden_size": "' + "x" * 5000 + '"}'))
    assert len(str(caught.value)) < 1000
