"""The frame of the lab's commands."""

from training import command


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
