"""Downloads from servers that are busy, slow, broken or hostile: the whole file, or an error of one line.

The real clients against plain sockets and the Hub on loopback.
"""

import hashlib
import json
import shutil
import socket
import struct
from contextlib import suppress
from threading import Thread

import pytest
from conftest import ARCHIVE

from rotation_ssl.files import sha256_of
from rotation_ssl.zoo import download, sources

NAME = "rotnet_nin.gidaris_cifar10"
BODY = bytes(range(256)) * 4
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m"  # clears the screen, sets the window's title, turns the text red


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """A proxy would answer for the hosts that do not exist."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")


class Server:
    """Plain sockets on loopback: each connection gets the next of some answers, the last one again and again."""

    def __init__(self):
        self.answers, self.requests = [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/file"
        Thread(target=self.serve, daemon=True).start()

    def serve(self):
        # shutting the listener down ends it
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                Thread(target=self.answer, args=(connection,), daemon=True).start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def answer(self, connection):
        # the client may go at any time
        with connection, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            self.requests.append(request.split()[1].decode())
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)


class Clock:
    """In place of the module's ``time``: nobody waits, and each look at the clock takes ``step`` seconds."""

    def __init__(self):
        self.now, self.step, self.slept = 0.0, 0.0, []

    def monotonic(self):
        self.now += self.step
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def http(status="200 OK", body=b"", length=None, **headers):
    """A response as bytes; its Content-Length is that of the body unless told, '' for none."""
    length = str(len(body)) if length is None else length
    fields = {**({"Content-Length": length} if length else {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{key}: {value}" for key, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def reset_after(content):
    """An answer that sends this and then resets the connection."""

    def answer(connection):
        connection.sendall(content)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def then_wait(content):
    """An answer that sends this and then nothing until the client goes."""

    def answer(connection):
        connection.sendall(content)
        connection.recv(1)

    return answer


def trickle(start):
    """An answer that never ends."""

    def answer(connection):
        connection.sendall(start)
        while True:
            connection.sendall(b"x")

    return answer


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(download, "time", clock)
    return clock


@pytest.fixture
def file(tmp_path):
    return tmp_path / "archive"


def assert_fails(file, url, error, match, **arguments):
    """A download of this URL is an error of one printable line, and leaves no file."""
    with pytest.raises(error, match=match) as caught:
        download.download(url, file, **arguments)
    assert str(caught.value).isprintable()
    assert not file.exists()
    return str(caught.value)


def test_a_whole_file(server, file):
    server.answers = [http(body=BODY)]
    download.download(server.url, file)
    assert file.read_bytes() == BODY
    server.answers = [http(body=BODY, length="")]
    download.download(server.url, file)
    assert file.read_bytes() == BODY


def test_a_short_body(server, file):
    server.answers = [http(body=BODY[:300], length="1024")]
    told = assert_fails(file, server.url, ConnectionError, r"broke off after 300 of 1,024 bytes: try again")
    assert told.startswith(server.url) and str(file) not in told
    assert len(server.requests) == 1


def test_a_body_longer_than_announced_ends_there(server, file):
    server.answers = [http(body=BODY, length="300")]
    download.download(server.url, file)
    assert file.read_bytes() == BODY[:300]


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "0x10", "5, 5", "٣", "9" * 400, "9" * 5000, ESCAPES])
def test_a_length_that_is_none(server, file, length):
    server.answers = [http(body=BODY, length=length.encode().decode("latin-1"))]
    assert len(assert_fails(file, server.url, ConnectionError, "which is not a length")) < 500


def test_a_body_of_more_than_allowed(server, file):
    server.answers = [http(length=str(10**15))]
    assert_fails(file, server.url, ValueError, "has 1,000,000,000,000,000 bytes, more than the 1,073,741,824 allowed")
    server.answers = [trickle(http(length=""))]
    assert_fails(file, server.url, ValueError, "has more than the 1,000 bytes allowed", max_bytes=1000)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (reset_after(http(body=BODY[:300], length="1024")), r"broke off after 300 of 1,024 bytes .*reset"),
        (http(body=b"5\r\nabc", length="", Transfer_Encoding="chunked"), r"broke off after 3 bytes \(IncompleteRead"),
        (http(body=b"\x1b\r\nabc", length="", Transfer_Encoding="chunked"), r"broke off after 0 bytes \(Incomplete"),
        (b"HTTP/1.1 abc\r\n\r\n", r"an answer that is not HTTP \(HTTP/1.1 abc\)"),
        (b"SSH-2.0-OpenSSH \x1b[2J\r\n", r"an answer that is not HTTP \(SSH-2\.0-OpenSSH \?\[2J\)"),
        (b"\x16\x03\x01\x00\n", "an answer that is not HTTP"),
        (b"HTTP/1.1 200 " + b"a" * 70_000 + b"\r\n\r\n", "an answer that is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", r"not HTTP \(got more than 100 headers\)"),
        (http("204 No Content"), "answers 204 No Content"),
        (http("404 Not Found"), "answers 404 Not Found"),
        (http("500 Internal Error"), "answers 500 Internal Error"),
        (http(f"404 {ESCAPES}", body=ESCAPES.encode()), r"answers 404 \?\[2J\?\]0;title\?\?31m"),
        (http("302 Found", Location="/file"), "answers 302 .*infinite loop"),
        (http("302 Found"), "answers 302 Found"),
        (http("302 Found", Location="file:///etc/passwd"), "answers 302 .*not allowed"),
        (http("302 Found", Location="ftp://127.0.0.1/file"), "redirects from http to ftp:"),
        (http("302 Found", Location="gopher://\x1b"), r"answers 302 .*'gopher://\?' is not allowed"),
    ],
)
def test_answers_that_are_of_no_use(server, file, answer, match):
    server.answers = [answer]
    told = assert_fails(file, server.url, ConnectionError, match)
    assert server.url in told or "file:///etc/passwd" in told or "gopher" in told
    assert set(server.requests) == {"/file"}


@pytest.mark.parametrize("location", [f"http://[{ESCAPES}]/", "http://host:port/", "http://a..com/"])
def test_a_redirect_to_an_invalid_url(server, file, location):
    server.answers = [http("302 Found", Location=location)]
    assert_fails(file, server.url, ValueError, "is, or redirects to, an invalid URL")


def test_redirects_are_followed_without_their_bodies(server, file):
    # of a body without an end
    server.answers = [trickle(http("302 Found", length="", Location="/other")), http(body=BODY)]
    download.download(server.url, file)
    assert file.read_bytes() == BODY and server.requests == ["/file", "/other"]


@pytest.mark.parametrize(
    ("asked", "there", "follows"),
    [
        ("https", "https", True),
        ("http", "https", True),
        ("http", "http", True),
        ("https", "http", False),
        ("https", "ftp", False),
    ],
)
def test_redirects_from_https_stay_there(asked, there, follows):
    request = download.urllib.request.Request(f"{asked}://host/file")
    follow = (request, None, 302, "Found", {}, f"{there}://host/other")
    if follows:
        assert download._Redirects().redirect_request(*follow).full_url == f"{there}://host/other"
    else:
        with pytest.raises(OSError, match=f"it redirects from https to {there}://host/other"):
            download._Redirects().redirect_request(*follow)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/file",
        "data:,file",
        "/file",
        "",
        "http://127.0.0.1:port/file",
        "http://127.0.0.1/a file",
        "http://127.0.0.1/\x1b[2J",
        "http://127.0.0.1/ü",
        "http://[::1/file",
    ],
)
def test_what_is_no_url(file, url, offline):
    assert_fails(file, url, ValueError, "is, or redirects to, an invalid URL")


@pytest.mark.parametrize("host", ["a..com", f"{'a' * 70}.com"])
def test_what_is_no_name_of_a_host(file, host):
    # refused before it is looked up
    assert_fails(file, f"http://{host}/file", ValueError, "is, or redirects to, an invalid URL")


def test_a_server_that_does_not_speak_tls(server, file):
    server.answers = [b"HTTP/1.1 200 OK\r\n\r\n"]
    # the handshake is no HTTP request: the answer comes without one
    server.answer = lambda connection: (connection.sendall(server.answers[0]), connection.close())
    assert_fails(file, server.url.replace("http", "https"), ConnectionError, r"cannot be reached \(.*SSL")


def test_a_busy_server_is_asked_again(server, file, clock):
    for status in (429, 502, 503, 504):
        server.answers = [http(f"{status} Busy"), reset_after(b""), b"", http(f"{status} Busy"), http(body=BODY)]
        download.download(server.url, file)
        assert file.read_bytes() == BODY
    assert clock.slept == [1, 2, 4, 8] * 4 and len(server.requests) == 20


def test_a_connection_that_is_reset_before_the_first_byte_of_the_body(server, file, clock):
    server.answers = [reset_after(http(length="1024")), http(body=BODY)]
    download.download(server.url, file)
    assert file.read_bytes() == BODY and clock.slept == [1]


def test_a_server_that_stays_busy(server, file, clock):
    server.answers = [http("503 Service Unavailable")]
    assert_fails(file, server.url, ConnectionError, "answers 503 Service Unavailable: try again later")
    assert clock.slept == [1, 2, 4, 8] and len(server.requests) == 5
    server.answers = [reset_after(b"")]
    assert_fails(file, server.url, ConnectionError, r"cannot be reached \(.*reset.*try again")
    assert clock.slept == [1, 2, 4, 8] * 2


@pytest.mark.parametrize(
    ("asked", "slept"),
    [("7", [7]), ("0", [1]), ("-5", [1]), ("soon", [1]), ("Wed, 21 Oct 2015 07:28:00 GMT", [1]), ("9" * 5000, [1])],
)
def test_a_server_says_when_to_try_again(server, file, clock, asked, slept):
    server.answers = [http("503 Busy", Retry_After=asked), http(body=BODY)]
    download.download(server.url, file)
    assert clock.slept == slept


def test_waits_end_at_the_limit(server, file, clock):
    server.answers = [http("503 Busy", Retry_After="1000")]
    assert_fails(file, server.url, ConnectionError, "asks to wait for 1,000 seconds: try again later")
    assert clock.slept == [1000] * 3, "a fourth would end after 3,600 seconds"
    server.answers = [http("429 Busy", Retry_After="86400")]
    assert_fails(file, server.url, ConnectionError, "asks to wait for 86,400 seconds")
    assert clock.slept == [1000] * 3


def test_a_server_that_trickles(server, file, clock):
    clock.step = 100
    server.answers = [trickle(http(length=str(10**9)))]
    assert_fails(file, server.url, ConnectionError, r"broke off after .* \(not complete after 3,600 seconds\)")
    assert 3600 < clock.now <= 3800 and len(server.requests) == 1


def test_no_read_waits_for_a_whole_block(server, file, clock):
    # one byte is there when the second look at the clock finds the time up
    clock.step = 2000
    server.answers = [then_wait(http(body=b"x", length="1024"))]
    assert_fails(file, server.url, ConnectionError, r"broke off after 1 of 1,024 bytes \(not complete")


def test_nobody_listens(file, clock):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/file"
        assert_fails(file, url, ConnectionError, r"cannot be reached \(.*refused.*try again")
    assert clock.slept == []


def test_a_file_that_cannot_be_written(server, file):
    server.answers = [http(body=BODY)]
    with pytest.raises(OSError, match="No such file") as caught:
        download.download(server.url, file.parent / "nothing" / "archive")
    assert not isinstance(caught.value, ConnectionError)


@pytest.fixture
def entry(server):
    """A release of the authors' archive, as the manifest has it."""
    server.answers = [http(body=ARCHIVE.read_bytes())]
    return {"url": server.url, "archive_sha256": sha256_of(ARCHIVE)}


def test_a_read_only_cache_with_a_corrupt_release(entry, tmp_path):
    sources.read_release(NAME, entry, tmp_path)
    weights, lock = tmp_path / f"{NAME}.safetensors", tmp_path / f"{NAME}.lock"
    weights.write_bytes(b"corrupt")
    # nobody, not even root, can open a folder as the lock
    lock.unlink()
    lock.mkdir()
    with pytest.raises(OSError, match=rf"corrupt \({weights} has 7 bytes.*: the cache {tmp_path} cannot be written"):
        sources.read_release(NAME, entry, tmp_path)
    assert weights.read_bytes() == b"corrupt"


def test_a_corrupt_release_that_cannot_be_downloaded_is_called_corrupt(entry, tmp_path, monkeypatch):
    sources.read_release(NAME, entry, tmp_path)
    weights = tmp_path / f"{NAME}.safetensors"
    weights.write_bytes(b"corrupt")
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"{NAME} are corrupt \({weights} has 7 bytes.* failed: .* there is no network"):
        sources.read_release(NAME, entry, tmp_path)
    assert weights.read_bytes() == b"corrupt"


HEX = "0123456789abcdef" * 4
RECORD = {"url": "https://host/file", "archive_sha256": HEX, "sha256": HEX, "size": 7}


def test_a_record_is_read(tmp_path):
    (tmp_path / f"{NAME}.json").write_text(json.dumps(RECORD))
    assert sources.read_record(NAME, tmp_path) == RECORD
    assert sources.read_record("rotnet_nin.other", tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"url":' * 100_000,
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"1" * 5000,
        b"\xff\xfe{}",
        json.dumps(RECORD).encode("utf-16"),
        json.dumps(RECORD)[:-1].encode(),
        *(json.dumps(RECORD | {key: None}).encode() for key in RECORD),
        *(json.dumps(RECORD | {key: [RECORD[key]]}).encode() for key in RECORD),
        json.dumps(RECORD | {"size": "7"}).encode(),
        json.dumps(RECORD | {"size": True}).encode(),
        json.dumps(RECORD | {"size": 7.0}).encode(),
        json.dumps(RECORD | {"sha256": ESCAPES}).encode(),
        json.dumps(RECORD | {"archive_sha256": HEX + "\n"}).encode(),
    ],
    ids=lambda content: content[:20],
)
def test_a_record_that_is_none_counts_as_not_there(tmp_path, content):
    (tmp_path / f"{NAME}.json").write_bytes(content)
    assert sources.read_record(NAME, tmp_path) is None


def test_a_release_with_a_broken_record_is_downloaded_again(server, entry, tmp_path):
    sources.read_release(NAME, entry, tmp_path)
    (tmp_path / f"{NAME}.json").write_bytes(b"[" * 100_000)
    sources.read_release(NAME, entry, tmp_path)
    assert len(server.requests) == 2 and sources.read_record(NAME, tmp_path)["url"] == server.url


REPOSITORY = "ORG/model"
WEIGHTS = bytes(range(250)) * 80


@pytest.fixture
def served(hub, monkeypatch):
    """A repository of the Hub with one large file; its client does not sleep, and what makes it misbehave ends."""
    hub.create(REPOSITORY)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "short", set())
    monkeypatch.setattr(hub, "reason", None)
    return hub.commit(REPOSITORY, {"model.safetensors": WEIGHTS})


def assert_hub_fails(revision, error, match, **arguments):
    with pytest.raises(error, match=match) as caught:
        sources.download_from_hub(NAME, REPOSITORY, revision, "model.safetensors", **arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_short_body_of_the_hub(hub, served):
    hub.short.add("model.safetensors")
    told = assert_hub_fails(
        served,
        ConnectionError,
        rf"model\.safetensors of {REPOSITORY}@{served} broke off after 10,000 of 20,000 bytes: try again",
    )
    assert "incomplete" not in told
    assert sources.cached_hub_file(REPOSITORY, served, "model.safetensors") is None


@pytest.mark.parametrize("status", [403, 404, 500, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_control_bytes_of_the_hub(hub, served, method, status):
    hub.reason = ESCAPES
    hub.answer(method, "model.safetensors", status, 99)
    assert_hub_fails(served, OSError, rf"{NAME} could not be downloaded: model\.safetensors of {REPOSITORY}@{served}")


def test_a_forced_download_says_what_the_hub_answers(hub, served):
    sources.download_from_hub(NAME, REPOSITORY, served, "model.safetensors")
    hub.answer("HEAD", "model.safetensors", 500, 99)
    assert_hub_fails(served, ConnectionError, r"could not be downloaded: model\.safetensors of .*: .*500", force=True)


def test_a_hub_that_is_none(hub, served):
    """A server that answers anything with a page, as a proxy or a login page does."""
    hub.answer("HEAD", "model.safetensors", 200, 99)
    told = assert_hub_fails(
        served, OSError, rf"could not be downloaded: model\.safetensors of {REPOSITORY}@{served}: ."
    )
    assert "no network" not in told


def test_a_read_only_cache_with_a_corrupt_file_of_the_hub(hub, served, tmp_path):
    cache = tmp_path / "cache"
    entry = {"sha256": hashlib.sha256(WEIGHTS).hexdigest(), "size": len(WEIGHTS)}
    entry["hub"] = {"repository": REPOSITORY, "revision": served, "file": "model.safetensors"}
    sources.read_hub(NAME, entry, cache)
    sources.cached_hub_file(REPOSITORY, served, "model.safetensors", cache).resolve().write_bytes(b"corrupt")
    # nobody, not even root, can make a lock in what is a file
    shutil.rmtree(cache / ".locks")
    (cache / ".locks").write_text("")
    with pytest.raises(OSError, match=rf"has 7 bytes, not 20,000.* the cache {cache} cannot be written .*HF_HUB_CACHE"):
        sources.read_hub(NAME, entry, cache)
