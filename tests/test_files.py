"""Files that are complete or absent, what their checksums notice, and where the project stores things."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softshare import files
from softshare.files import atomic_file, content_checksum, file_checksum, writable, write_json, write_together

# -------------------------------------------------------------------------------------------------------- complete files


def test_a_file_appears_once_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"first ")
        assert not path.exists()
        file.write(b"second")
    assert path.read_bytes() == b"first second" and os.listdir(path.parent) == ["a.bin"]
    with atomic_file(path) as file:
        file.write(b"other")
        file.flush()
        assert path.read_bytes() == b"first second", "the old file stays until the new one is complete"
    assert path.read_bytes() == b"other" and os.listdir(path.parent) == ["a.bin"]


def test_files_that_belong_together_are_all_new_or_all_old(tmp_path, monkeypatch):
    """No byte of either is lost if the disk fills up at the second."""
    both = [tmp_path / "plan.json", tmp_path / "weights.bin"]
    write_together([(path, b"old") for path in both])
    fsync = os.fsync

    def full(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith(".part") and "weights" in os.readlink(
            f"/proc/self/fd/{number}"
        ):
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{both[1]}'"):
        write_together([(path, b"new") for path in both])
    assert [path.read_bytes() for path in both] == [b"old", b"old"] and len(os.listdir(tmp_path)) == 2
    monkeypatch.setattr(os, "fsync", fsync)
    write_together([(path, b"new") for path in both])
    assert [path.read_bytes() for path in both] == [b"new", b"new"] and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [b"old", None])
def test_an_error_leaves_the_old_file(tmp_path, error, before):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(type(error)), atomic_file(path) as file:
        file.write(b"half of")
        raise error
    assert os.listdir(tmp_path) == ([] if before is None else ["a.bin"])
    assert before is None or path.read_bytes() == before


def test_a_kill_leaves_at_most_a_part_file_behind(tmp_path):
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
    assert sorted(os.listdir(tmp_path)) == ["a.bin", f"a.bin.{child}-{threading.get_ident()}.part"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """The order matters if the power fails: a name without bytes would be an empty file in place of a good one."""
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


def test_a_checksum_covers_the_content_but_not_its_order_or_itself():
    expected = hashlib.sha256(b'{"a": 1, "b": [1, 2]}').hexdigest()[:16]
    for fields in ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}, {"content": "x", "b": [1, 2], "a": 1}):
        assert content_checksum(fields) == expected


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
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


def test_a_checkout_keeps_its_data_next_to_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "softshare")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "softshare"\n')
    (tmp_path / "data" / "paper").mkdir(parents=True)
    assert files.checkout() == tmp_path
    assert files.data_folder("runs") == files.bundled_folder("runs") == tmp_path / "data" / "runs"
    assert files.cache_folder() == tmp_path / "data" / "cache"
    assert not (tmp_path / "data" / "cache").exists(), "asking creates nothing"


@pytest.mark.parametrize(
    "project", [None, "", '[project]\nname = "another"\n', b"\xff", '[project]\nname = "softshare"\n']
)
def test_an_installed_package_has_no_checkout(tmp_path, monkeypatch, project):
    """It includes what is committed, and writes where the user works."""
    if project is not None:  # some wheels leave theirs next to the packages; the last one is even our own
        (tmp_path / "pyproject.toml").write_bytes(project if isinstance(project, bytes) else project.encode())
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "softshare")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.checkout() is None
    assert files.data_folder("runs") == tmp_path / "here" / "runs"
    assert files.bundled_folder("runs") == tmp_path / "softshare" / "runs"
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "softshare"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "softshare"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "softshare"


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A process without HOME and without an entry in passwd, whose temporary files are in a folder of the test."""

    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(Path, "expanduser", lambda path: no_home() if str(path).startswith("~") else path)
    monkeypatch.setattr(files, "checkout", lambda: None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files._temporary_cache.cache_clear()
    yield tmp_path
    files._temporary_cache.cache_clear()


def test_without_a_home_the_cache_is_a_private_temporary_folder(homeless):
    folder = files.cache_folder()
    assert folder == files.cache_folder() and folder.parent == homeless
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files._temporary_cache.cache_clear()
    assert files.cache_folder() == folder, "the next process finds it again"


@pytest.mark.parametrize("trap", ["open to others", "a link", "a file"])
def test_a_place_that_somebody_else_prepared_is_not_trusted(homeless, trap):
    place = homeless / f"softshare-{os.getuid()}"
    if trap == "a link":
        (homeless / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(homeless / "elsewhere")
    elif trap == "a file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    folder = files.cache_folder()
    assert folder != place and folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_path_from_outside_expands_the_home_folder_or_reports_that_there_is_none(tmp_path, monkeypatch, request):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/x") == tmp_path / "x" and files.user_path(Path("~/x.y")) == tmp_path / "x.y"
    request.getfixturevalue("homeless")
    assert files.user_path("x") == Path("x")
    with pytest.raises(FileNotFoundError, match="'~/x' begins with ~, but .* is not known; set HOME"):
        files.user_path("~/x")


def test_every_path_given_by_a_user_expands_the_home_folder():
    """Path.expanduser is called in one place only, so that all options are treated the same."""
    package = Path(files.__file__).parent
    found = [path.name for path in package.rglob("*.py") if ".expanduser" in path.read_text(encoding="utf-8")]
    assert found == ["files.py"]


def test_the_tests_run_in_a_checkout():
    assert files.checkout() == Path(__file__).resolve().parents[1]


def test_a_folder_is_writable_or_named(tmp_path):
    assert writable(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert os.listdir(tmp_path / "new" / "folder") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"nothing can be written to the folder {tmp_path / 'file' / 'below'}"):
        writable(tmp_path / "file" / "below")


def test_a_folder_with_the_name_of_a_file_is_found_before_anything_is_replaced(tmp_path):
    (tmp_path / "plan.json").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"old")
    with pytest.raises(IsADirectoryError, match="plan.json"):
        write_together([(tmp_path / "plan.json", b"new"), (tmp_path / "weights.bin", b"new")])
    assert (tmp_path / "weights.bin").read_bytes() == b"old"


def test_threads_that_write_the_same_file_do_not_interfere(tmp_path):
    path, failed = tmp_path / "a.json", []

    def work(number):
        try:
            for _ in range(30):
                write_json(path, {"number": number, "text": "x" * 1000 * number})
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = json.loads(path.read_text())
    assert not failed and found["text"] == "x" * 1000 * found["number"] and os.listdir(tmp_path) == ["a.json"]
