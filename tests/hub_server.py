"""A small Hub on 127.0.0.1, for the real client in other processes: repos, branches, pull requests, large files by LFS.

Users are their tokens: "hf_alice" may write to alice/..., "hf_reader" may only read. `fail_next` breaks the next
request that fits, as a lost connection does or with a status.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USERS = {"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write"), "hf_reader": ("reader", "read")}
LARGE = 20_000  # bytes from which a file goes by LFS
TASKS = ("unconditional-image-generation", "time-series-forecasting", "image-to-image", "text-to-image")


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.commits = {}  # sha -> {path: sha256}
        self.messages = {}
        self.branches = {"main": self.add({}, "initial commit")}
        self.pull_requests, self.authors, self.titles = 0, {}, {}

    def add(self, tree: dict, message: str) -> str:
        sha = hashlib.sha1(json.dumps([tree, message, len(self.commits)]).encode()).hexdigest()
        self.commits[sha], self.messages[sha] = tree, message
        return sha

    def resolve(self, revision: str) -> str | None:
        revision = unquote(revision)
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The state; `requests` lists (method, path, status) of all that came."""

    def __init__(self):
        self.repos, self.blobs, self.requests, self.faults = {}, {}, [], []
        self.lock = threading.RLock()

    def fail_next(self, method: str, path: str, how="cut", times: int = 1) -> None:
        """Break the next `times` requests whose path matches: "cut" the connection, a status, or "lost": the request
        is done, but its answer does not arrive."""
        self.faults += [(method, path, how)] * times

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        repo = self.repos[kind, repo_id]
        return {path: self.blobs[oid] for path, oid in repo.commits[repo.resolve(revision)].items()}

    def put(self, repo_id: str, folder) -> None:
        """A model repo with the files of a folder, as if it had been uploaded."""
        repo = self.repos["models", repo_id] = Repo(private=False)
        tree = {}
        for file in folder.rglob("*"):
            if file.is_file():
                oid = hashlib.sha256(file.read_bytes()).hexdigest()
                self.blobs[oid] = file.read_bytes()
                tree[file.relative_to(folder).as_posix()] = oid
        repo.branches["main"] = repo.add(tree, "put")

    def environment(self, token: str | None, home) -> dict[str, str]:
        """For a process that is to use this Hub."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
               "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
        return {**env, "HF_TOKEN": token or ""}


class Answer(Exception):
    def __init__(self, status: int, body=b"", code: str | None = None, **headers):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if code:
            self.headers |= {"X-Error-Code": code, "X-Error-Message": code}


def validate_card(text: str) -> list[str]:
    """What is wrong with a card's metadata."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return ["no metadata"]
    data = yaml.safe_load(match[1])
    wrong = []
    for name in ("tags", "metrics", "datasets"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            wrong.append(f'"{name}" must be an array of strings')
    if "pipeline_tag" in data and data["pipeline_tag"] not in TASKS:
        wrong.append('"pipeline_tag" must be a known task')
    for entry in data.get("model-index", []):
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            wrong.append('"model-index[0].name" is required')
        for result in entry["results"]:
            if not isinstance(result.get("task", {}).get("type"), str):
                wrong.append('"results.task.type" is required')
            if not all(isinstance(result.get("dataset", {}).get(k), str) for k in ("type", "name")):
                wrong.append('"results.dataset" needs type and name')
            for metric in result["metrics"]:
                if not isinstance(metric["type"], str) or not isinstance(metric["value"], (int, float, str)):
                    wrong.append('"results.metrics" needs type and value')
    return wrong


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _serve(self):
        path = urlsplit(self.path).path
        body, fault = b"", None
        try:
            with self.hub.lock:
                fault = next((f for f in self.hub.faults if f[0] == self.command and re.search(f[1], path)), None)
                if fault:
                    self.hub.faults.remove(fault)
            length = int(self.headers.get("Content-Length") or 0)
            if fault and fault[2] == "cut":
                self.rfile.read(length // 2)
                self.hub.requests.append((self.command, path, "cut"))
                self.close_connection = True
                self.connection.close()
                return
            body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
            if fault and fault[2] != "lost":
                raise Answer(fault[2], {"error": "out of order"})
            with self.hub.lock:
                self._route(path, body)
            raise AssertionError(f"no answer to {self.command} {path}")
        except Answer as answer:
            if fault and fault[2] == "lost":
                self.hub.requests.append((self.command, path, "lost"))
                self.close_connection = True
                self.connection.close()
                return
            self.hub.requests.append((self.command, path, answer.status))
            self.send_response(answer.status)
            headers = {"Content-Length": str(len(answer.body)), "Content-Type": "application/json", **answer.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # -- who asks --------------------------------------------------------------------------------

    def _user(self) -> tuple | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Answer(401, {"error": "Invalid username or password."})
        return USERS.get(token)

    def _may_write(self, repo_id: str) -> None:
        user = self._user()
        if user is None:
            raise Answer(401, {"error": "Unauthorized"})
        if user[1] != "write" or repo_id.split("/")[0] != user[0]:
            raise Answer(403, {"error": f"Forbidden: {user[0]} has no write access to {repo_id}"})

    def _repo(self, kind: str, repo_id: str) -> Repo:
        repo, user = self.hub.repos.get((kind, repo_id)), self._user()
        if repo is None or (repo.private and (user is None or user[0] != repo_id.split("/")[0])):
            raise Answer(404 if user else 401, {"error": "Repository not found"}, code="RepoNotFound")
        return repo

    # -- routes ----------------------------------------------------------------------------------

    def _route(self, path: str, body: bytes) -> None:
        for method, pattern, handler in ROUTES:
            if (match := re.fullmatch(pattern, path)) and self.command in method:
                handler(
                    self,
                    *(unquote(group or "") for group in match.groups()),
                    *([body] if "POST" in method or "PUT" in method else []),
                )
        raise Answer(404, {"error": f"no such route: {path}"}, code="EntryNotFound")

    def _whoami(self):
        user = self._user()
        if user is None:
            raise Answer(401, {"error": "Invalid username or password."})
        raise Answer(200, {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": user[1]}}})

    def _create(self, body):
        given = json.loads(body)
        user, kind = self._user(), f"{given.get('type') or 'model'}s"
        repo_id = f"{given.get('organization') or (user and user[0])}/{given['name'].split('/')[-1]}"
        self._may_write(repo_id)
        url = {"url": f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"}
        if (kind, repo_id) in self.hub.repos:
            raise Answer(409, {"error": "You already created this repo", **url})
        self.hub.repos[kind, repo_id] = Repo(given.get("private") is True or given.get("visibility") == "private")
        raise Answer(200, url)

    def _validate(self, body):
        wrong = validate_card(json.loads(body)["content"])
        raise Answer(400 if wrong else 200, {"errors": [{"message": w} for w in wrong], "warnings": []})

    def _auth_check(self, kind, repo_id, write):
        self._repo(kind, repo_id)
        if write:
            self._may_write(repo_id)
        raise Answer(200, {})

    def _branch(self, kind, repo_id, branch, body):
        repo = self._repo(kind, repo_id)
        self._may_write(repo_id)
        if branch in repo.branches:
            raise Answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        raise Answer(200, {})

    def _preupload(self, kind, repo_id, revision, body):
        tree = self._tree_of(self._repo(kind, repo_id), revision)
        self._user()
        files = json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False,
                  "oid": self._git_oid(tree[f["path"]]) if f["path"] in tree else None} for f in files]  # fmt: skip
        raise Answer(200, {"files": modes})

    def _git_oid(self, oid: str) -> str:
        data = self.hub.blobs[oid]
        return oid if len(data) >= LARGE else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _tree_of(self, repo: Repo, revision: str) -> dict:
        sha = repo.resolve(revision)
        if sha is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, code="RevisionNotFound")
        return repo.commits[sha]

    def _batch(self, repo_id, body):
        if self._user() is None:  # a pull request of anyone may bring large files
            raise Answer(401, {"error": "Unauthorized"})
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}},
                       "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}}}  # fmt: skip
            present = item["oid"] in self.hub.blobs
            objects.append({**item, "authenticated": True, **({} if present else {"actions": actions})})
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, {"error": "content and name differ"})
        self.hub.blobs[oid] = body
        raise Answer(200)

    def _verify(self, body):
        item = json.loads(body)
        whole = len(self.hub.blobs.get(item["oid"], b"")) == item["size"]
        raise Answer(200 if whole else 404, {})

    def _commit(self, kind, repo_id, revision, body):
        repo = self._repo(kind, repo_id)
        as_pr = "create_pr=1" in urlsplit(self.path).query
        user = self._user()
        if not (as_pr and user) and repo.authors.get(unquote(revision)) != user:
            self._may_write(repo_id)
        tree = dict(self._tree_of(repo, revision))
        message = ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                data = base64.b64decode(value["content"])
                oid = hashlib.sha256(data).hexdigest()
                self.hub.blobs[oid] = data
                tree[value["path"]] = oid
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Answer(400, {"error": f"{value['path']} was not uploaded"})
                tree[value["path"]] = value["oid"]
            elif entry["key"] == "deletedFile":
                del tree[value["path"]]
        sha = repo.add(tree, message)
        done = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        if as_pr:
            repo.pull_requests += 1
            repo.branches[f"refs/pr/{repo.pull_requests}"] = sha
            repo.authors[f"refs/pr/{repo.pull_requests}"] = user
            repo.titles[repo.pull_requests] = message
            done["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{repo.pull_requests}"
        else:
            repo.branches[unquote(revision)] = sha
        raise Answer(200, done)

    def _discussions(self, kind, repo_id):
        repo = self._repo(kind, repo_id)
        found = [
            {"title": title, "num": number, "author": {"name": repo.authors[f"refs/pr/{number}"][0]}, "status": "open",
             "createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True,
             "repo": {"name": repo_id, "type": kind[:-1]}}
            for number, title in sorted(repo.titles.items(), reverse=True)
        ]  # fmt: skip
        raise Answer(200, {"discussions": found, "count": len(found), "start": 0})

    def _info(self, kind, repo_id, revision):
        repo = self._repo(kind, repo_id)
        tree = self._tree_of(repo, revision or "main")
        files = [{"rfilename": path} for path in sorted(tree)]
        sha = repo.resolve(revision or "main")
        raise Answer(200, {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "tags": [],
                           "siblings": files, "downloads": 0, "likes": 0})  # fmt: skip

    def _tree(self, kind, repo_id, revision, _under):
        tree = self._tree_of(self._repo(kind, repo_id), revision)
        entries = []
        for path, oid in sorted(tree.items()):
            size = len(self.hub.blobs[oid])
            lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if size >= LARGE else {}
            entries.append({"type": "file", "path": path, "size": size, "oid": self._git_oid(oid), **lfs})
        raise Answer(200, entries)

    def _resolve(self, prefix, repo_id, revision, path):
        repo = self._repo((prefix or "models/").rstrip("/"), repo_id)
        tree = self._tree_of(repo, revision)
        commit = {"X-Repo-Commit": repo.resolve(revision)}
        if path not in tree:
            raise Answer(404, b"Entry not found", code="EntryNotFound", **commit)
        data = self.hub.blobs[tree[path]]
        raise Answer(200, data, ETag=f'"{tree[path]}"', Accept_Ranges="bytes", **commit)


REPO, KIND = r"([^/]+/[^/]+)", r"/api/(models|spaces|datasets)/"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler._whoami),
    ("POST", r"/api/repos/create", Handler._create),
    ("POST", r"/api/validate-yaml", Handler._validate),
    ("GET", KIND + REPO + r"/auth-check(/write|)", Handler._auth_check),
    ("POST", KIND + REPO + r"/branch/(.+)", Handler._branch),
    ("POST", KIND + REPO + r"/preupload/(.+)", Handler._preupload),
    ("POST", KIND + REPO + r"/commit/(.+)", Handler._commit),
    ("GET", KIND + REPO + r"/tree/([^/]+)(/.*|)", Handler._tree),
    ("GET", KIND + REPO + r"/discussions", Handler._discussions),
    ("GET", KIND + REPO + r"(?:/revision/(.+)|)", Handler._info),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", Handler._batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler._put),
    ("POST", r"/lfs-verify", Handler._verify),
    ("HEAD GET", r"/(models/|spaces/|datasets/|)" + REPO + r"/resolve/([^/]+)/(.+)", Handler._resolve),
]


@contextlib.contextmanager
def serving():
    """A Hub that serves until the block ends."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
