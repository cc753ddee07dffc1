"""Files that anybody may have sent: regular ones are read, and written through no link."""

import os
import socket
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jemkit import DataError
from jemkit.config.layers import read_layer
from jemkit.runtime.files import (
    append_text,
    file_hash,
    load_tensors,
    read_json,
    write_json,
)
from jemkit.runtime.lock import locked
from jemkit.runtime.opening import decoded, make_folder, read_file, read_text, refuse_links
from jemkit.training.pretrained.reading import read_checkpoint

READERS: dict[str, Callable[[Path], Any]] = {
    "file": read_file,
    "text": read_text,
    "json": read_json,
    "tensors": load_tensors,
    "hash": file_hash,
    "recipe": read_layer,
    "weights": read_checkpoint,
}
KINDS = ("fifo", "socket", "device", "folder", "link to a device")


@contextmanager
def strange(path: Path, kind: str) -> Iterator[None]:
    """Something at `path` that is no regular file."""
    if kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
                yield
        finally:
            os.chdir(here)
        return
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    tmp_path: Path, reader: str, kind: str
) -> None:
    with strange(tmp_path / "x.json", kind), pytest.raises(DataError) as caught:
        READERS[reader](tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(caught.value)


def test_a_file_larger_than_any_of_its_kind_is_not_read(tmp_path: Path) -> None:
    for name in ("x.json", "x.toml"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(DataError, match=r"1,099,511,627,776 bytes; expected .* at most"):
            read_layer(tmp_path / name)
    with pytest.raises(DataError, match="at most"):
        read_json(tmp_path / "x.json")


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\ufeff\0")),
    coding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_a_text_is_the_same_in_every_coding_that_its_mark_names(text: str, coding: str) -> None:
    assert decoded(text.encode(coding)) == text


def test_text_of_another_coding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes("[run] # gr\u00fcn".encode("cp1252"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        read_layer(tmp_path / "x.toml")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "append": lambda path: append_text(path, "mine\n"),
    "lock": lambda path: locked(path, "writes").__enter__(),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path: Path, writer: str) -> None:
    victim, link = tmp_path / "victim", tmp_path / "run"
    victim.write_text("theirs")
    link.symlink_to(victim)
    with pytest.raises(DataError, match="is a link"):
        WRITERS[writer](link)
    assert victim.read_text() == "theirs"
    link.unlink()
    link.symlink_to(tmp_path / "new")
    with pytest.raises(DataError, match="is a link"):
        WRITERS[writer](link)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_of_two_names_changes_under_the_one_alone_that_is_written(
    tmp_path: Path, writer: str
) -> None:
    victim, name = tmp_path / "victim", tmp_path / "name"
    victim.write_text("one\ntwo")
    os.link(victim, name)
    WRITERS[writer](name)
    assert victim.read_text() == "one\ntwo"
    written = {"append": "one\ntwomine\n", "lock": "one\ntwo"}[writer]
    assert name.read_text() == written


def test_a_file_replaced_as_a_whole_takes_the_place_of_a_link(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "evaluation.json"
    victim.write_text("theirs")
    link.symlink_to(victim)
    write_json(link, {"a": 1})
    assert victim.read_text() == "theirs"
    assert read_json(link) == {"a": 1}


def test_a_lock_file_that_holds_something_else_is_locked_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("a poem")
    with locked(tmp_path / ".lock", "writes"):
        assert (tmp_path / ".lock").read_text() == "a poem"


def test_a_folder_inside_a_run_is_no_link_though_the_run_may_be(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    make_folder(tmp_path / "run" / "samples")
    make_folder(tmp_path / "run" / "samples")
    assert (tmp_path / "real" / "samples").is_dir()
    (tmp_path / "real" / "other").symlink_to(tmp_path)
    with pytest.raises(DataError, match="is a link"):
        make_folder(tmp_path / "run" / "other")
    with pytest.raises(DataError, match="is a link"):
        refuse_links(tmp_path / "run", ("samples", "other"))


def test_toml_is_read_as_it_stands() -> None:
    assert tomllib.loads(decoded(b"\xef\xbb\xbf[run]\r\nepochs = 3\r\n")) == {"run": {"epochs": 3}}
