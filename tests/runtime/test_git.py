"""The commit of a run is asked of git without running what the folder's own config names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jemkit.runtime.git import git_state


def git(folder: Path, *arguments: str) -> str:
    about = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, **about, "GIT_COMMITTER_EMAIL": "a@b"},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.txt").write_text("one\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    return folder


def test_the_commit_and_whether_files_were_changed(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert git_state() == {"commit": head, "dirty": False}
    (repository / "a.txt").write_text("two\n")
    assert git_state() == {"commit": head, "dirty": True}


def test_outside_of_a_repository_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None


def test_a_repository_without_a_commit_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.chdir(tmp_path)
    assert git_state() is None


def test_nothing_that_a_hostile_repository_names_is_run(repository: Path, tmp_path: Path) -> None:
    """File system monitor, hooks, filters, pager, and those of a submodule."""
    ran = tmp_path / "ran"
    script = tmp_path / "evil.sh"
    script.write_text(f"#!/bin/sh\ntouch {ran}\ncat\n")
    script.chmod(0o755)
    (repository / "b.txt").write_text("one\n")
    (repository / "c.txt").write_text("one\n")
    (repository / ".gitattributes").write_text(
        "*.txt filter=evil diff=evil\nb.txt filter=e=v.il\nc.txt filter=Long\n"
    )
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "second")
    for hook in ("post-index-change", "fsmonitor-watchman", "pre-commit"):
        (repository / ".git" / "hooks" / hook).write_text(script.read_text())
        (repository / ".git" / "hooks" / hook).chmod(0o755)
    with (repository / ".git" / "config").open("a") as config:
        config.write(
            f"[core]\n\tfsmonitor = {script}\n\tpager = {script}\n\tsshCommand = {script}\n"
            f'[filter "evil"]\n\tclean = {script}\n\tsmudge = {script}\n\trequired = true\n'
            f'[filter "e=v.il"]\n\tclean = {script}\n[FILTER "Long"]\n\tPROCESS = {script}\n'
            f'[diff "evil"]\n\ttextconv = {script}\n\tcommand = {script}\n'
            f"[pager]\n\tstatus = {script}\n[credential]\n\thelper = !{script}\n"
        )
    for name in ("a.txt", "b.txt", "c.txt"):
        (repository / name).write_text("two\n")
    git_state_run = subprocess.run(
        [sys.executable, "-c", "from jemkit.runtime.git import git_state; print(git_state())"],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not ran.exists()
    assert "'dirty': None" in git_state_run.stdout  # a filter would have to tell
    subprocess.run(["git", "status"], cwd=repository, capture_output=True, check=False)
    assert ran.exists()  # it would have been


def test_a_filter_alone_does_not_make_a_clean_folder_unknown(repository: Path) -> None:
    git(repository, "config", "filter.lfs.clean", "false")
    assert git_state() == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
