"""One writer in a folder: the lock names its holder and ends with its process."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import SAFETY

from jemkit import ConfigError
from jemkit.runtime.lock import LOCK, in_use, locked

HOLDER = """
import sys, time
from pathlib import Path
from jemkit.runtime.lock import locked
with locked(Path(sys.argv[1]), "trains here"):
    print("held", flush=True)
    while True:
        time.sleep(60)
"""


def holder(path: Path) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_holder_is_refused_with_the_first_ones_process_host_and_time(
    tmp_path: Path,
) -> None:
    with locked(tmp_path / LOCK, "trains here"), pytest.raises(ConfigError) as caught:
        locked(tmp_path / LOCK, "also trains here").__enter__()
    message = str(caught.value)
    assert f"process {os.getpid()} on {socket.gethostname()} trains here since 2" in message
    assert str(tmp_path) in message


def test_a_lock_is_free_again_after_its_block_and_after_an_error_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / LOCK, "fails"):
            raise KeyError
    with locked(tmp_path / LOCK, "trains here"):
        pass


def test_a_lock_ends_with_the_process_that_took_it_however_it_ends(tmp_path: Path) -> None:
    child = holder(tmp_path / LOCK)
    try:
        with pytest.raises(ConfigError, match=rf"process {child.pid} on .* trains here since"):
            locked(tmp_path / LOCK, "waits").__enter__()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with locked(tmp_path / LOCK, "goes on"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_a_holder_that_has_not_signed_yet_is_another_process(tmp_path: Path, content: str) -> None:
    with locked(tmp_path / LOCK, "trains here"):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(ConfigError, match="in use: another process"):
            locked(tmp_path / LOCK, "waits").__enter__()


def test_a_lock_that_is_waited_for_comes_when_its_holder_ends(tmp_path: Path) -> None:
    child = holder(tmp_path / LOCK)
    threading.Timer(0.2, child.kill).start()
    with locked(tmp_path / LOCK, "waits", patience=SAFETY):
        assert child.wait() == -signal.SIGKILL


def test_a_lock_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    with locked(tmp_path / LOCK, "trains here"), pytest.raises(ConfigError, match="trains here"):
        locked(tmp_path / LOCK, "waits", patience=0.1).__enter__()


def test_a_folder_has_several_users_or_one_alone(tmp_path: Path) -> None:
    evaluated = pytest.raises(ConfigError, match="another process evaluates or deletes it")
    with in_use(tmp_path), in_use(tmp_path), evaluated:
        in_use(tmp_path, alone=True).__enter__()
    with in_use(tmp_path, alone=True), pytest.raises(ConfigError, match="deletes it"):
        in_use(tmp_path).__enter__()
    with in_use(tmp_path):
        pass
    assert [*tmp_path.iterdir()] == []
