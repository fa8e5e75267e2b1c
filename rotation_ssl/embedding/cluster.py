"""Shards -> parts on a Ray cluster: an actor for each device embeds one shard after another, as one machine does.

Ray Data streams rows between tasks and puts them into blocks of its own. A part needs all rows of its shard in one
place, and batches that do not depend on blocks; so actors get whole shards. The shard of an actor that dies, with its
machine or without, goes to another one.
"""

import contextlib
import functools
import itertools
import os
import platform
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rotation_ssl.embedding.local import Done, Extractor, embed_shards, make_extractor
from rotation_ssl.embedding.parts import Manifest
from rotation_ssl.embedding.sources import Shard
from rotation_ssl.messages import first_line
from rotation_ssl.models import load_model, weights_digest

RETRIES = 3  # of a shard whose actor dies


class Embedder:
    """The network on one device, of one process of the cluster.

    Args:
        folder: of the parts, the same on all machines.
        manifest: what decides the features.
        name: of the model, as :func:`rotation_ssl.models.load_model` takes it.
        device: 'cpu' or 'cuda'.
        workers: data-loading worker processes.
        threads: of PyTorch, as many as the driver has: sums may depend on them.
    """

    def __init__(self, folder: Path, manifest: Manifest, name: str, device: str, workers: int, threads: int) -> None:
        self.folder, self.manifest, self.name, self.device = folder, manifest, name, device
        self.workers, self.threads = workers, threads

    # not in the constructor, of whose errors Ray keeps the text alone
    @functools.cached_property
    def extract(self) -> Extractor:
        """The network's function from pixels to features.

        Raises:
            ValueError: no such model or device on this machine, or other weights than the driver's.
        """
        torch.set_num_threads(self.threads)
        model = load_model(self.name, self.device)
        if weights_digest(model) != self.manifest.weights_sha256:
            raise ValueError(f"{self.name} has other weights on {platform.node()} than where the command runs")
        return make_extractor(model, self.manifest)

    def embed(self, shard: Shard) -> Done:
        """Write the part of one shard."""
        return next(embed_shards([shard], self.folder, self.manifest, self.extract, self.workers))


def embed_on_cluster(
    shards: Iterable[Shard],
    folder: Path,
    manifest: Manifest,
    name: str,
    device: str,
    workers: int,
    address: str | None = None,
    progressed: Callable[[int], object] = lambda images: None,
) -> Iterator[Done]:
    """Write the part of each shard, in any order; arguments are those of :class:`Embedder`.

    Each actor takes a GPU, or as many CPUs as PyTorch has threads here, and at least one for each data-loading worker.
    The cluster is the one that Ray is connected to, else that of ``address``, else one of this machine alone, which
    ends with the work.

    Raises:
        ValueError: no machine of the cluster has room for an actor, and what :func:`embed_shards` raises.
        OSError: the cluster cannot be reached, an actor died several times at the same shard, and what
            :func:`embed_shards` raises.
    """
    import ray

    threads = torch.get_num_threads()
    room: dict[str, int] = {"num_cpus": max(workers, 1 if device.startswith("cuda") else threads)}
    if device.startswith("cuda"):
        room["num_gpus"] = 1
    waiting = iter(shards)
    with _connected(address), _plain_errors():
        # no more actors than there is work for
        first = list(itertools.islice(waiting, _count_actors(ray.nodes(), room)))
        remote = ray.remote(**room)(Embedder)
        start = functools.partial(remote.remote, folder, manifest, name, device, workers, threads)
        for done in _embed_by_actors([start() for _ in first], start, itertools.chain(first, waiting)):
            progressed(done.images + done.errors)
            yield done


def _embed_by_actors(actors: Sequence[Any], start: Callable[[], Any], shards: Iterator[Shard]) -> Iterator[Done]:
    """The parts as the actors write them.

    The shard of an actor that died goes to one that waits for work. The actor that takes its place may wait for room in
    the cluster, for ever if its machine is lost: it gets work when it has started.
    """
    import ray
    from ray import exceptions

    # for each task that Ray runs its actor and its shard, None while the actor starts
    tasks: dict[Any, tuple[Any, Shard | None]] = {actor.__ray_ready__.remote(): (actor, None) for actor in actors}
    idle: list[Any] = []
    again: list[Shard] = []  # of actors that died
    deaths: Counter[Shard | None] = Counter()  # by shard; None: during starts, since an actor last started
    while tasks or idle:
        while idle and (following := again.pop() if again else next(shards, None)):
            actor = idle.pop()
            tasks[actor.embed.remote(following)] = actor, following
        # no shard waits or is being worked on: actors that are still starting are not waited for
        if idle and not any(shard for _, shard in tasks.values()):
            return
        (task,), _ = ray.wait(list(tasks), num_returns=1)
        actor, shard = tasks.pop(task)
        try:
            done = ray.get(task)
        except exceptions.RayActorError:
            ray.kill(actor)  # one that cannot be reached may be alive
            deaths[shard] += 1
            if deaths[shard] > (RETRIES if shard else RETRIES * len(actors)):
                raise
            again += [shard] if shard else []
            replacement = start()
            tasks[replacement.__ray_ready__.remote()] = replacement, None
            continue
        idle.append(actor)
        if shard:
            yield done
        else:
            del deaths[None]


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connected to a cluster; one that was started for this, or the connection, is ended."""
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        _check_reachable(address)
    # Ray reports on its use over the network, and warns of its future defaults, unless it is told otherwise
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    alone: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", logging_level="ERROR", log_to_driver=False, **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise OSError(f"the Ray cluster {address or 'of this machine'} cannot be used ({first_line(error)})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing answers: Ray itself ends the process there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise OSError(f"the Ray cluster {address} cannot be reached ({first_line(error)})") from error


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in an actor, as it would have been here."""
    from ray import exceptions

    try:
        yield
    except exceptions.RayTaskError as error:
        raise error.cause from None
    except exceptions.RayError as error:
        raise OSError(f"a process of the cluster died ({first_line(error)}); go on with --resume") from error


def _count_actors(nodes: Iterable[dict[str, Any]], room: dict[str, int]) -> int:
    """How many actors there is room for.

    Raises:
        ValueError: for none.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    fits = [min(int(have.get(names[kind], 0) // number) for kind, number in room.items()) for have in resources]
    if not sum(fits):
        needed = " and ".join(f"{number} {names[kind]}s" for kind, number in room.items())
        raise ValueError(
            f"no machine of the cluster has {needed}, which an actor needs; "
            "give fewer --workers, or OMP_NUM_THREADS in the environment"
        )
    return sum(fits)
