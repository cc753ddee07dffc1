"""A command's process: ^C, a closed terminal, lost readers."""

import errno
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_tools import SHORT, TINY, environment, jemkit
from forked import Forked, processes
from waiting import until

from jemkit.errors import DataError, memory_ran_out
from jemkit.runtime import checkpoint
from jemkit_cli.process import Output

LONG = ("train", *TINY, "--epochs=500", "--set=objective.adv_steps=1", "--out=here")
AMID = """
import os, runpy, signal, sys
wanted, times, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv = ["jemkit", *sys.argv[4:]]
signal.signal(signal.SIGINT, signal.default_int_handler)

class At:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, At())
if how == "module":
    runpy.run_module("jemkit", run_name="__main__", alter_sys=True)
from jemkit_cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("module", "times", "how"),
    [
        ("jemkit_cli.process", 1, "script"), ("jemkit_cli.process", 2, "module"),
        ("typer", 2, "script"), ("typer", 1, "module"), ("torch", 1, "script"),
        ("torch", 2, "module"), ("numpy", 1, "script"), ("jemkit.config.registry", 1, "script"),
    ],
)  # fmt: skip
def test_an_interrupt_amid_an_import_ends_with_one_line_and_130(
    tmp_path: Path, module: str, times: int, how: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AMID, module, str(times), how, "evaluate", "x"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


WORKING = """
import os, signal, sys, time
from jemkit_cli import commands
from jemkit_cli.app import main
from jemkit_cli.terminal import guarded

@commands.app.command("work")
@guarded
def work(how: str) -> None:
    if how == "turned":  # as C code does with an exception that it did not expect
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise AttributeError("half a module")
    if how == "swallowed":
        class Gone:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
        Gone()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        if how == "twice":
            os.kill(os.getpid(), signal.SIGINT)

main()
"""


@pytest.mark.parametrize("how", ["plain", "turned", "swallowed", "twice"])
def test_an_interrupt_of_work_ends_with_one_line_and_130(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKING, "work", how],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


UMLAUT = ("train", *SHORT, "--dry-run", "--out=lauf ü")
C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def test_a_character_that_the_terminal_lacks_is_replaced(tmp_path: Path) -> None:
    for encoding in ("ascii", "iso8859-5"):
        running = Forked(*UMLAUT, cwd=tmp_path, encoding=encoding)
        assert running.outcome()[::2] == (0, "")
        assert "lauf \\" in running.text("stdout")
    done = subprocess.run(
        [sys.executable, "-m", "jemkit", *UMLAUT], cwd=tmp_path, env=environment(**C_LOCALE),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "lauf \\" in done.stdout


COMMANDS = """
import sys
from jemkit_cli.app import main
for words in sys.argv[1].split(";"):
    try:
        main(words.split("|"))
    except SystemExit as ended:
        assert not ended.code, words
"""


def test_a_run_whose_name_the_locale_lacks_trains_and_is_evaluated(tmp_path: Path) -> None:
    commands = (
        ("train", *SHORT, "--out=lauf ü"),
        ("evaluate", "lauf ü", "--only=accuracy", "--json"),
        ("report", "lauf ü"),
    )
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, ";".join(map("|".join, commands))],
        cwd=tmp_path, env=environment(**C_LOCALE), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lauf ü" / "config.json").exists()
    assert (tmp_path / "lauf ü" / "report.html").exists()


def test_a_reader_that_ends_does_not_end_the_work(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    running = Forked(
        "train", *SHORT, "--out=here", cwd=tmp_path, streams={"stdout": str(pipe)},
        before=partial(wait_for, tmp_path / "closed"),
    )  # fmt: skip
    until((tmp_path / "opened").exists, "the start")
    os.close(reader)
    (tmp_path / "closed").touch()
    assert running.outcome() == (0, "", "")
    assert (tmp_path / "here" / "checkpoints" / "best").exists()


def wait_for(path: Path) -> None:
    """Say that the streams are open, and wait until the file is there."""
    (path.parent / "opened").touch()
    until(path.exists, path.name)


def test_silent_work_shows_its_time_on_a_terminal_and_the_next_word_takes_it_away() -> None:
    script = (
        "import os, sys, time\n"
        "from jemkit_cli import process\n"
        "process.open_streams()\n"
        "now = time.monotonic()\n"
        "process.PULSE.beat(now)\n"  # nothing: it has just begun
        "process.PULSE.beat(now + 3600)\n"
        "print('a word', flush=True)\n"
    )
    leader, follower = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", script], stdout=follower, stderr=follower, env=environment()
    )
    os.close(follower)
    shown = b""
    with suppress(OSError):  # how Linux tells the end of a terminal
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert running.wait() == 0
    assert shown == b"\r\x1b[Kworking, 3600 s\r\x1b[Ka word\r\n"
    piped = (
        "import threading\n"
        "from jemkit_cli import process\n"
        "process.open_streams()\n"
        "process.PULSE.start()\n"
        "print(threading.active_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", piped], env=environment(), capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"1\n", b"")


def own_terminal() -> None:
    """The process leads a session, and its standard input is the session's terminal."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def steps(cwd: Path) -> int:
    log = cwd / "here" / "metrics.csv"
    return len(log.read_text().splitlines()) if log.exists() else 0


def sound(run: Path) -> int:
    """The step of the newest checkpoint, which is whole."""
    return int(checkpoint.sound(run / "checkpoints").path.name.removeprefix("step-"))


def test_a_closed_terminal_saves_the_run(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), os.ttyname(follower))
    running = Forked(
        *LONG, cwd=tmp_path, streams=terminal, before=own_terminal, TERM="xterm-256color"
    )
    os.set_blocking(leader, False)

    def shown() -> int:
        with suppress(BlockingIOError):
            while os.read(leader, 1 << 16):
                pass
        return steps(tmp_path)

    until(lambda: shown() > 3, "the third step")
    os.close(follower)
    os.close(leader)
    assert running.wait() == 5
    assert sound(tmp_path / "here") >= 3


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_is_a_termination_but_for_who_ignores_it(tmp_path: Path, ignored: bool) -> None:
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    running = Forked(*LONG, cwd=tmp_path, before=partial(signal.signal, signal.SIGHUP, handler))
    until(lambda: steps(tmp_path) > 3, "the third step")
    running.send_signal(signal.SIGHUP)
    if ignored:
        now = steps(tmp_path)
        until(lambda: steps(tmp_path) > now + 20, "twenty steps more")
        running.send_signal(signal.SIGTERM)
    assert running.wait() == 5
    assert "continue with --resume --out here" in running.text("stderr")
    assert sound(tmp_path / "here") >= 3


def test_a_hangup_of_all_processes_saves_the_run(tmp_path: Path) -> None:
    running = processes(*LONG, "--set=run.batch_size=8", cwd=tmp_path)
    until(lambda: steps(tmp_path) > 3, "the third step")
    for process in running:
        process.send_signal(signal.SIGHUP)
    assert [process.wait() for process in running] == [5, 5]
    assert any("continue with --resume" in process.text("stderr") for process in running)
    assert sound(tmp_path / "here") >= 3


VERIFYING = ("verify-resume", "recipe.toml", "--steps=400")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_proof_of_resume_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    shown = jemkit("config", "show", *TINY, "--set=run.max_train=40", "--set=backbone.steps=3")
    (tmp_path / "recipe.toml").write_text(shown.out)
    (tmp_path / "temporary").mkdir()
    running = Forked(*VERIFYING, cwd=tmp_path, TMPDIR=str(tmp_path / "temporary"))
    until(lambda: running.text("stdout") == "training whole\n", "the start", running.outcome)
    running.send_signal(number)
    _, _, err = outcome = running.outcome()
    assert outcome.code == 5, err
    began = "interrupted" if number == signal.SIGINT else "stopped"
    assert err.splitlines()[-1].startswith(f"{began} before everything was compared")
    assert list((tmp_path / "temporary").glob("jemkit-*")) == []


WORDS = {
    MemoryError(): "MemoryError",
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried "
        "to allocate 8 bytes."
    ): "not enough memory: you tried to allocate",
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"): "CUDA out of",
    OSError(errno.ENOMEM, "Cannot allocate memory"): "Cannot allocate memory",
    RuntimeError("can't start new thread"): "can't start new thread",
    ImportError("libx.so: failed to map segment from shared object"): "failed to map segment",
}


@pytest.mark.parametrize("error", WORDS, ids=lambda error: type(error).__name__)
def test_memory_that_ran_out_is_known_behind_whatever_was_made_of_it(error: Exception) -> None:
    def read() -> None:
        try:
            raise error
        except Exception:
            raise DataError("the file is damaged") from None

    assert WORDS[error] in memory_ran_out(error)
    with pytest.raises(DataError) as made:
        read()
    assert WORDS[error] in memory_ran_out(made.value)


@pytest.mark.parametrize(
    "error",
    [ValueError("out of memory"), RuntimeError("shapes"), OSError(errno.ENOENT, "no"), DataError()],
    ids=repr,
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert memory_ran_out(error) == ""


def test_output_whose_reader_is_gone_keeps_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        read, write = os.pipe()
        os.close(read)
        stream = Output(write, "w")
        assert stream.write(b"lost") == stream.write(b"more") == 4
        stream.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
