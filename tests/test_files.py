"""Files that are whole or not there, what their checksums notice, and where the project keeps things."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softshare import files
from softshare.files import atomic_file, content_checksum, file_checksum, writable, write_json

# ----------------------------------------------------------------------------------------------------------- whole files


def test_a_file_stands_there_once_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"first ")
        assert not path.exists()
        file.write(b"second")
    assert path.read_bytes() == b"first second" and os.listdir(path.parent) == ["a.bin"]
    with atomic_file(path) as file:
        file.write(b"other")
        file.flush()
        assert path.read_bytes() == b"first second", "what was there stays until the new one is whole"
    assert path.read_bytes() == b"other" and os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [b"old", None])
def test_after_an_error_what_was_there_is_there(tmp_path, error, before):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(type(error)), atomic_file(path) as file:
        file.write(b"half of")
        raise error
    assert os.listdir(tmp_path) == ([] if before is None else ["a.bin"])
    assert before is None or path.read_bytes() == before


def test_after_a_kill_at_most_a_part_is_left_beside_it(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with atomic_file(path) as file:
            file.write(b"half of")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.bin", f"a.bin.{child}.part"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """The order matters when the power goes: a name without bytes would be an empty file in place of a good one."""
    done = []
    fsync, replace = os.fsync, Path.replace

    def synced(number):
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def renamed(self, target):
        done.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert done == ["file", "name", "folder"]


# ------------------------------------------------------------------------------------------------------------- checksums


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.text(), values, max_size=4), name=st.text(), value=values)
def test_json_is_read_as_written_and_any_change_is_noticed(tmp_path_factory, fields, name, value):
    fields.pop("content", None)
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, fields)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found.pop("content") == content_checksum(fields) == content_checksum(found)
    assert found == fields
    changed = {**fields, name: value}
    if name != "content" and json.dumps(changed, sort_keys=True) != json.dumps(fields, sort_keys=True):
        assert content_checksum(changed) != content_checksum(fields)


def test_a_checksum_is_of_the_content_and_not_of_its_order_or_of_itself():
    expected = hashlib.sha256(b'{"a": 1, "b": [1, 2]}').hexdigest()[:16]
    for fields in ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}, {"content": "x", "b": [1, 2], "a": 1}):
        assert content_checksum(fields) == expected


def test_json_that_cannot_be_written_costs_nothing(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_bytes() == before and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_checksums_of_files(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert file_checksum(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert file_checksum(tmp_path / "a", "md5") == hashlib.md5(data).hexdigest()


# --------------------------------------------------------------------------------------------------------------- folders


def test_a_checkout_keeps_its_data_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "softshare")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "softshare"\n')
    assert files.checkout() == tmp_path
    assert files.data_folder("runs") == files.bundled_folder("runs") == tmp_path / "data" / "runs"
    assert files.cache_folder() == tmp_path / "data" / "cache"
    assert not (tmp_path / "data").exists(), "asking makes nothing"


@pytest.mark.parametrize("project", [None, '[project]\nname = "another"\n'])
def test_an_installed_package_has_no_checkout(tmp_path, monkeypatch, project):
    """It brings what is committed, and writes where the user works."""
    if project:
        (tmp_path / "pyproject.toml").write_text(project)
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "softshare")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.checkout() is None
    assert files.data_folder("runs") == tmp_path / "here" / "runs"
    assert files.bundled_folder("runs") == tmp_path / "softshare" / "runs"
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "softshare"


def test_the_tests_run_in_a_checkout():
    assert files.checkout() == Path(__file__).resolve().parents[1]


def test_a_folder_is_writable_or_named(tmp_path):
    assert writable(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert os.listdir(tmp_path / "new" / "folder") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"nothing can be written to the folder {tmp_path / 'file' / 'below'}"):
        writable(tmp_path / "file" / "below")
