"""The frame of the lab's commands."""

import os
import signal
import threading

import pytest

from training import command
from training.transfer.network import InOrder, batches


def test_what_the_help_says_of_glibc_holds_of_every_command(monkeypatch):
    done = []
    monkeypatch.setattr(command, "keep_large_blocks", lambda: done.append("blocks"))
    assert command.run(lambda: done.append("work")) == 0
    assert done == ["blocks", "work"]
    assert "makes glibc keep large memory blocks" in command.create_parser("page", None).format_help()


def test_the_status_says_how_a_command_ended(capsys):
    def fail():
        raise ValueError("no such thing")

    def stop():
        raise KeyboardInterrupt

    assert [command.run(work) for work in (lambda: None, lambda: 3, fail, stop)] == [0, 3, 2, 130]
    assert capsys.readouterr().err.splitlines() == [
        "error: no such thing",
        "stopped; run the same command again to continue",
    ]


def process_id(image):
    return os.getpid()


# Python 3.12 and later warn of every fork beside torch's threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_worker_that_is_killed_while_the_command_is_busy_is_told_in_one_line(capsys):
    def work():
        found = batches(InOrder(range(9), process_id), 1, workers=1)
        (worker,) = next(found)
        os.kill(worker, signal.SIGKILL)
        # as in a training step
        threading.Event().wait(60)

    assert command.run(work) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: a data-loading worker was killed (DataLoader worker (pid ") and error.count("\n") == 1
    )
    assert error.endswith("; run it again, or resume it\n") and "--" not in error


def test_other_errors_of_pytorch_are_no_killed_workers():
    def work():
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        command.run(work)
