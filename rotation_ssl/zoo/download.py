"""Download a file completely or not at all; whatever goes wrong is an error of one line."""

import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import Any

from rotation_ssl.convert import MAX_BYTES
from rotation_ssl.messages import printable
from rotation_ssl.progress import progress

# how often a busy server is asked, the wait before the second time (doubled before each further one), and the limit for
# all of it
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
TOTAL_SECONDS = 3600.0
SECONDS_WITHOUT_DATA = 60.0
BLOCK = 1 << 20
_BUSY = (429, 502, 503, 504)


def download(url: str, file: Path, max_bytes: int = MAX_BYTES, what: str = "") -> None:
    """Download a URL into a file, with a progress bar; where an error is raised, there is no file.

    A server that is busy (429, 502, 503 or 504) or that resets the connection before the first byte is asked again,
    ``ATTEMPTS`` times in all: after as many seconds as its Retry-After says, or else after 1, 2, 4 and 8. Attempts,
    waits and the download itself end after ``TOTAL_SECONDS``.

    Raises:
        ConnectionError: no connection, an answer that is not HTTP, a status other than 200, a redirect from https to
            http, a connection cut before the end, or one that is too slow.
        ValueError: a URL that is invalid or not one of http or https, or more than ``max_bytes``.
        OSError: the file cannot be written.
    """
    until = time.monotonic() + TOTAL_SECONDS
    for attempt in range(ATTEMPTS):
        try:
            return _download_once(url, file, max_bytes, what or file.name, until)
        except _Passing as error:
            wait = error.wait or FIRST_WAIT_SECONDS * 2**attempt
            if attempt + 1 == ATTEMPTS or time.monotonic() + wait > until:
                raise
        time.sleep(wait)


class _Passing(ConnectionError):
    """A failure that may pass; ``wait``: seconds that the server asks to wait, 0 where it does not say."""

    def __init__(self, told: str, wait: int = 0) -> None:
        super().__init__(told)
        self.wait = wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects as urllib follows them, but never to less than the protocol that was asked for."""

    def http_error_302(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any) -> Any:
        # its body is of no use, and urllib would read it whole, however long it is
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in {"https", req.type}:
            raise urllib.error.URLError(f"it redirects from {req.type} to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download_once(url: str, file: Path, max_bytes: int, what: str, until: float) -> None:
    shown = printable(url)
    try:
        with _open(url) as response, file.open("wb") as target:
            total = _announced_bytes(response, shown)
            if total is not None and total > max_bytes:
                raise ValueError(f"{shown} has {total:,} bytes, more than the {max_bytes:,} allowed")
            with progress(what, total, "B", unit_scale=True) as bar:
                for block in _blocks(response, shown, total, until):
                    target.write(block)
                    bar.update(len(block))
                    if bar.n > max_bytes:
                        raise ValueError(f"{shown} has more than the {max_bytes:,} bytes allowed")
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _open(url: str) -> HTTPResponse:
    """The response of status 200 to a GET, its body still to be read; an error of one line for all else."""
    shown = printable(url)
    try:
        if urllib.parse.urlsplit(url).scheme not in {"http", "https"}:
            raise ValueError("not one of http or https")
        request = urllib.request.Request(url, headers={"User-Agent": "rotation_ssl"})
        response = urllib.request.build_opener(_Redirects).open(request, timeout=SECONDS_WITHOUT_DATA)
    except urllib.error.HTTPError as error:
        error.close()
        told = f"{shown} answers {error.code} {printable(error.reason)}"
        if error.code not in _BUSY:
            raise ConnectionError(told) from error
        # it may also be a date, which is ignored: clocks differ
        asked = re.fullmatch(r"[0-9]{1,9}", error.headers.get("Retry-After", "").strip())
        wait = int(asked[0]) if asked else 0
        asks = f" and asks to wait for {wait:,} seconds" if wait else ""
        raise _Passing(f"{told}{asks}: try again later", wait) from error
    except (InvalidURL, ValueError) as error:
        raise ValueError(f"{shown} is, or redirects to, an invalid URL: {printable(error)}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, HTTPException) and not isinstance(reason, ConnectionError):
            raise ConnectionError(f"{shown} gives an answer that is not HTTP ({printable(reason)})") from error
        is_reset = isinstance(reason, ConnectionError) and not isinstance(reason, ConnectionRefusedError)
        failure = _Passing if is_reset else ConnectionError
        raise failure(f"{shown} cannot be reached ({printable(reason)}): try again with a network") from error
    if response.status != 200:
        response.close()
        raise ConnectionError(f"{shown} answers {response.status} {printable(response.reason)}")
    return response


def _announced_bytes(response: HTTPResponse, shown: str) -> int | None:
    length = response.headers.get("Content-Length")
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", length.strip()):
        raise ConnectionError(f"{shown} answers with the Content-Length {printable(length)}, which is not a length")
    return int(length)


def _blocks(response: HTTPResponse, shown: str, total: int | None, until: float) -> Iterator[bytes]:
    """The body of a response as it comes; an error where it is cut off, or is still coming when the time is up."""
    received, of = 0, "" if total is None else f" of {total:,}"
    try:
        while True:
            if time.monotonic() > until:
                raise TimeoutError(f"not complete after {TOTAL_SECONDS:,.0f} seconds")
            # of a byte now and then, read() would wait for a whole block
            block = response.read1(BLOCK)
            if not block:
                break
            received += len(block)
            yield block
    except (OSError, HTTPException) as error:
        failure = _Passing if isinstance(error, ConnectionResetError) and not received else ConnectionError
        raise failure(f"{shown} broke off after {received:,}{of} bytes ({printable(error)}): try again") from error
    # to read1() a closed connection is an end like any other
    if total is not None and received != total:
        raise ConnectionError(f"{shown} broke off after {received:,}{of} bytes: try again")
