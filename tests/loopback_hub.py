"""A Hugging Face Hub on loopback, as far as the real client needs one to publish and to download.

It keeps repositories in memory: commits with their files, tags, large files by sha256. Tests look at ``requests`` and
``uploads``, and make it misbehave: ``answer`` gives a status to the requests that match, ``corrupt`` serves wrong bytes
of the right size, ``cut`` breaks connections off, ``short`` serves half of a file as if it were the whole, ``reason``
stands beside the status and in the request id of errors.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse

LARGE = 10_000  # bytes from which a file is a large one


class Hub:
    def __init__(self):
        self.repositories, self.large = {}, {}
        self.requests, self.uploads = [], []
        self.answers, self.corrupt, self.cut = [], set(), set()
        self.short, self.reason = set(), None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method, pattern, status, times=1, code=""):
        """The next ``times`` requests that match get this status."""
        self.answers.append([method, re.compile(pattern), status, times, code])

    def commit(self, repository, changes, parent=None):
        """Files (None: deleted) on top of main; returns the new revision."""
        repo = self.repositories[repository]
        files = {**(repo["commits"][repo["main"]] if repo["main"] else {}), **changes}
        files = {path: content for path, content in files.items() if content is not None}
        listing = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items())
        revision = hashlib.sha1(repr((repo["main"], len(repo["commits"]), listing)).encode()).hexdigest()
        repo["commits"][revision] = files
        repo["main"] = revision
        return revision

    def create(self, repository):
        self.repositories[repository] = {"commits": {}, "main": None, "tags": {}}

    def resolve(self, repository, revision):
        repo = self.repositories[repository]
        revision = repo["main"] if revision == "main" else repo["tags"].get(revision, revision)
        return revision if revision in repo["commits"] else None


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", headers=None):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status, hub.reason if status >= 400 else None)
            if hub.reason and status >= 400:
                self.send_header("X-Request-Id", hub.reason)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            if "Content-Length" not in (headers or {}):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def handle_request(self):
            address = urlparse(self.path)
            path, query = unquote(address.path), parse_qs(address.query)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.chunks()
            hub.requests.append(f"{self.command} {path}")
            for answer in hub.answers:
                if answer[0] == self.command and answer[1].search(path) and answer[3] > 0:
                    answer[3] -= 1
                    return self.reply(answer[2], {"error": "as told"}, {"X-Error-Code": answer[4]} if answer[4] else {})
            for method, pattern, reply in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    return reply(self, body, query, **match.groupdict())
            return self.reply(404, {"error": f"no such route: {self.command} {path}"})

        def chunks(self):
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def create_repository(self, body, query):
            asked = json.loads(body)
            owner = asked.get("organization") or "someone"
            repository = f"{owner}/{asked['name']}"
            if repository in hub.repositories:
                return self.reply(409, {"error": "exists", "url": f"{hub.url}/{repository}"})
            hub.create(repository)
            hub.commit(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.reply(200, {"url": f"{hub.url}/{repository}"})

        def validate(self, body, query):
            return self.reply(200, {"errors": [], "warnings": []})

        def preupload(self, body, query, repo, revision):
            files = json.loads(body)["files"]
            there = hub.repositories[repo]["commits"][hub.resolve(repo, revision)]
            modes = []
            for file in files:
                large = file["size"] > LARGE
                mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                if file["path"] in there:
                    content = there[file["path"]]
                    mode["oid"] = hashlib.sha256(content).hexdigest() if large else blob_id(content)
                modes.append(mode)
            return self.reply(200, {"files": modes})

        def batch(self, body, query, repo):
            objects = []
            for wanted in json.loads(body)["objects"]:
                entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
                if wanted["oid"] not in hub.large:
                    entry["actions"] = {
                        "upload": {"href": f"{hub.url}/store/{wanted['oid']}"},
                        "verify": {"href": f"{hub.url}/check/{wanted['oid']}"},
                    }
                objects.append(entry)
            answer = {"transfer": "basic", "objects": objects}
            return self.reply(200, answer, {"Content-Type": "application/vnd.git-lfs+json"})

        def store(self, body, query, oid):
            if hashlib.sha256(body).hexdigest() != oid:
                return self.reply(400, {"error": "other bytes"})
            hub.large[oid] = body
            hub.uploads.append(oid)
            return self.reply(200)

        def check(self, body, query, oid):
            return self.reply(200 if oid in hub.large else 404)

        def commit(self, body, query, repo, revision):
            changes, parent = {}, None
            for line in body.decode().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "header":
                    parent = value.get("parentCommit")
                elif operation["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                    hub.uploads.append(value["path"])
                elif operation["key"] == "lfsFile":
                    changes[value["path"]] = hub.large[value["oid"]]
            if parent is not None and parent != hub.repositories[repo]["main"]:
                return self.reply(412, {"error": "a commit has happened since"})
            oid = hub.commit(repo, changes)
            url = f"{hub.url}/{repo}/commit/{oid}"
            return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

        def tag(self, body, query, repo, revision):
            name, tags = json.loads(body)["tag"], hub.repositories[repo]["tags"]
            if name in tags:
                return self.reply(409, {"error": "exists"})
            tags[name] = hub.resolve(repo, revision)
            return self.reply(200, {})

        def revision(self, body, query, repo, revision="main"):
            if repo not in hub.repositories:
                return self.reply(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
            found = hub.resolve(repo, revision)
            if found is None:
                return self.reply(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": path} for path in hub.repositories[repo]["commits"][found]]
            return self.reply(200, {"id": repo, "sha": found, "siblings": siblings, "tags": [], "private": False})

        def tree(self, body, query, repo, revision):
            found = hub.resolve(repo, revision)
            entries = []
            for path, content in hub.repositories[repo]["commits"][found].items():
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                if len(content) > LARGE:
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                entries.append(entry)
            return self.reply(200, entries)

        def file(self, body, query, repo, revision, path):
            if repo not in hub.repositories:
                return self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
            found = hub.resolve(repo, revision)
            if found is None:
                return self.reply(404, {}, {"X-Error-Code": "RevisionNotFound"})
            content = hub.repositories[repo]["commits"][found].get(path)
            if content is None:
                return self.reply(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found})
            large = len(content) > LARGE
            oid = hashlib.sha256(content).hexdigest() if large else blob_id(content)
            headers = {"X-Repo-Commit": found, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            if path in hub.corrupt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            asked, status = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""), 200
            if asked:
                first, last = int(asked[1]), int(asked[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            if path in hub.short and self.command == "GET":
                content = content[: len(content) // 2]
            headers["Content-Length"] = str(len(content))
            if path in hub.cut and self.command == "GET":
                content, self.close_connection = content[: len(content) // 2], True
            return self.reply(status, content, headers)

    repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = (
        ("POST", "/api/repos/create", Handler.create_repository),
        ("POST", "/api/validate-yaml", Handler.validate),
        ("POST", rf"/api/models/{repo}/preupload/(?P<revision>[^/]+)", Handler.preupload),
        ("POST", rf"/{repo}\.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", r"/store/(?P<oid>\w+)", Handler.store),
        ("POST", r"/check/(?P<oid>\w+)", Handler.check),
        ("POST", rf"/api/models/{repo}/commit/(?P<revision>[^/]+)", Handler.commit),
        ("POST", rf"/api/models/{repo}/tag/(?P<revision>[^/]+)", Handler.tag),
        ("GET", rf"/api/models/{repo}/revision/(?P<revision>[^/]+)", Handler.revision),
        ("GET", rf"/api/models/{repo}", Handler.revision),
        ("GET", rf"/api/models/{repo}/tree/(?P<revision>[^/]+)", Handler.tree),
        ("GET|HEAD", rf"/{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.file),
    )
    return Handler
