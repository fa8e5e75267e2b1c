"""SIGKILL at random moments, twenty times: nothing is lost and nothing is there twice."""

import multiprocessing
import os
import random
import signal

import pytest
from many_images import contents, part_bytes, rows_of, write_folder

from rotation_ssl import files
from rotation_ssl.embedding import embed
from rotation_ssl.embedding import local as local_engine

SMALL = {"model": "rotnet_nin", "shard_size": 5, "batch_size": 5, "precision": "fp32"}
DRIVER, WRITING, WORKER = "driver", "writing", "worker"


def run(source, out, events, victim, moment):
    """Embed; the victim is killed at its ``moment``-th event: by the test, or by itself."""
    decode, sync, seen, written = local_engine.decode, files.sync, [0], [0]

    def counted_decode(*args):
        seen[0] += 1
        if victim == WORKER and seen[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if victim == DRIVER:
            events.send_bytes(b".")
        return decode(*args)

    def counted_sync(path):
        # all is written, and not yet renamed
        written[0] += 1
        if victim == WRITING and written[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    local_engine.decode, files.sync = counted_decode, counted_sync
    # the data-loading workers count too
    multiprocessing.set_start_method("fork", force=True)
    embed(source, out, resume=True, workers=2 if victim == WORKER else 0, **SMALL)


def killed(context, source, out, victim, moment):
    """Whether the run did not come to its end."""
    events, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(source, out, theirs, victim, moment))
    process.start()
    theirs.close()
    if victim == DRIVER:
        try:
            for _ in range(moment):
                events.recv_bytes()
            os.kill(process.pid, signal.SIGKILL)
        except EOFError:
            pass
    process.join()
    code = process.exitcode
    process.close()
    events.close()
    return code != 0


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    source = write_folder(tmp_path / "images", contents(600, 100))
    embed(source, tmp_path / "whole", workers=0, **SMALL)
    expected, out = part_bytes(tmp_path / "whole"), tmp_path / "out"
    # it has imported all when the first one is started
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rotation_ssl.embedding", "many_images"])
    chance, kills = random.Random(0), 0
    while kills < 20:
        victim = (DRIVER, WRITING, WORKER)[kills % 3]
        moment = chance.randint(1, 6 if victim == WRITING else 20)
        assert killed(context, source, out, victim, moment), "the images were enough for twenty kills"
        kills += 1
        there = part_bytes(out) if out.exists() else {}
        for name, content in there.items():
            assert name.endswith(".tmp") or content == expected[name], f"{name} after {kills} kills"
    embed(source, out, resume=True, workers=0, **SMALL)
    assert part_bytes(out) == expected
    assert len(rows_of(out)) == 594
