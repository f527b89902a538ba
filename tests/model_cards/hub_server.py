"""A server on this machine that speaks the Hub's endpoints, for the real `huggingface_hub` client.

It keeps repositories, branches, commits and large files in memory, checks tokens, and can be told to drop connections.
Every request is recorded with its body, so that a test can search everything that ever left the client.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PART_BYTES = 64 * 1024  # small, so that a test's weights go up in several parts


@dataclass
class Repository:
    private: bool
    # branch -> list of commits, oldest first; a commit is (oid, message, {path: bytes or ("lfs", oid)})
    branches: dict[str, list] = field(default_factory=dict)


@dataclass
class Hub:
    """The server's memory, and what it was asked."""

    tokens: dict[str, str] = field(default_factory=lambda: {"hf_goodtoken": "someone"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    # How often the next requests whose "METHOD path" matches lose their connection.
    drops: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch's last commit, large ones resolved."""
        _, _, tree = self.repositories[repo_id].branches[branch][-1]
        return {path: self.large_files[c[1]] if isinstance(c, tuple) else c for path, c in tree.items()}

    def commits(self, repo_id: str, branch: str = "main") -> list[str]:
        """The messages of a branch's commits, oldest first."""
        return [message for _, message, _ in self.repositories[repo_id].branches[branch]]

    def should_drop(self, line: str) -> bool:
        with self.lock:
            for pattern, left in self.drops.items():
                if left > 0 and re.search(pattern, line):
                    self.drops[pattern] = left - 1
                    return True
        return False


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.path_only, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        line = f"{self.command} {self.path_only}"
        self.hub.requests.append((self.command, self.path, body))
        if self.hub.should_drop(line):
            self.close_connection = True
            self.connection.close()  # no answer at all: the client sees a broken connection
            return
        try:
            for method, pattern, action in ROUTES:
                # Before unquoting: a slash inside a branch's name comes as %2F and ends no part of the path.
                match = re.fullmatch(pattern, self.path_only)
                if method == self.command and match:
                    action(self, body, **{key: value and unquote(value) for key, value in match.groupdict().items()})
                    return
            raise Refusal(404, f"no such endpoint: {line}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            self.answer({"error": refusal.message}, refusal.status, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, value=None, status=200, headers=None, content: bytes | None = None):
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self) -> str | None:
        """The token's owner, None without a token."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[given]

    def repository(self, repo_id: str, *, to_write=False) -> Repository:
        found = self.hub.repositories.get(repo_id)
        owner = repo_id.split("/")[0]
        if found is None or (found.private and self.user != owner):
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if to_write and self.user != owner:
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return found

    def commit_of(self, repo_id: str, revision: str):
        commits = self.repository(repo_id).branches
        if revision in commits:
            return commits[revision][-1]
        by_oid = {commit[0]: commit for branch in commits.values() for commit in branch}
        if revision not in by_oid:
            raise Refusal(404, "Revision not found", "RevisionNotFound")
        return by_oid[revision]


def whoami(handler: Handler, body: bytes):
    if handler.user is None:
        raise Refusal(401, "Invalid username or password.")
    handler.answer({"type": "user", "name": handler.user, "orgs": [], "auth": {"type": "access_token"}})


def create_repository(handler: Handler, body: bytes):
    wanted = json.loads(body)
    user = handler.user
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    owner = wanted.get("organization") or user
    repo_id = f"{owner}/{wanted['name']}"
    url = f"{handler.server.url}/{repo_id}"
    if repo_id in handler.hub.repositories:
        handler.answer({"url": url, "error": "You already created this model repo"}, 409)
        return
    if owner != user:
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    first = ("0" * 40, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
    handler.hub.repositories[repo_id] = Repository(private, {"main": [first]})
    handler.answer({"url": url, "name": repo_id})


def create_branch(handler: Handler, body: bytes, repo: str, branch: str):
    branches = handler.repository(repo, to_write=True).branches
    if branch in branches:
        raise Refusal(409, f"Reference already exists: {branch}")
    branches[branch] = list(branches["main"])
    handler.answer({}, 201)


def describe(handler: Handler, body: bytes, repo: str, revision: str = "main"):
    oid, _, tree = handler.commit_of(repo, revision)
    siblings = [{"rfilename": path} for path in tree]
    private = handler.hub.repositories[repo].private
    handler.answer({"id": repo, "modelId": repo, "sha": oid, "private": private, "siblings": siblings, "tags": []})


def validate_yaml(handler: Handler, body: bytes):
    content = json.loads(body)["content"]
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    problems = []
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
        if metadata.get("license") not in (None, "apache-2.0", "mit", "cc-by-4.0"):
            problems.append(f'"license" must be one of a list, is {metadata["license"]}')
    except yaml.YAMLError as error:
        problems.append(f"not YAML: {error}")
    messages = [{"message": problem} for problem in problems]
    handler.answer({"errors": messages, "warnings": []}, 400 if problems else 200)


def preupload(handler: Handler, body: bytes, repo: str, revision: str):
    handler.repository(repo, to_write=True)
    _, _, tree = handler.commit_of(repo, revision)
    answers = []
    for file in json.loads(body)["files"]:
        is_binary = b"\x00" in base64.b64decode(file["sample"])
        held = tree.get(file["path"])
        oid = None
        if isinstance(held, tuple):
            oid = held[1]
        elif held is not None:
            oid = hashlib.sha1(b"blob %d\x00" % len(held) + held).hexdigest()
        mode = "lfs" if is_binary or file["path"].endswith(".safetensors") else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    handler.answer({"files": answers})


def lfs_batch(handler: Handler, body: bytes, repo: str):
    handler.repository(repo, to_write=True)
    objects = []
    for wanted in json.loads(body)["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        base = f"{handler.server.url}/large/{oid}"
        if oid in handler.hub.large_files:
            objects.append({"oid": oid, "size": size})
            continue
        upload = {"href": base}
        if size > PART_BYTES:
            count = -(-size // PART_BYTES)
            urls = {f"{i + 1:05d}": f"{base}/{i + 1}" for i in range(count)}
            upload = {"href": f"{base}/complete", "header": {"chunk_size": str(PART_BYTES), **urls}}
        verify = {"href": f"{handler.server.url}/large/{oid}/verify"}
        objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    handler.answer({"transfer": "basic", "objects": objects})


def _store(handler: Handler, oid: str, content: bytes):
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, "content does not match its hash")
    handler.hub.large_files[oid] = content
    handler.answer({})


def put_large(handler: Handler, body: bytes, oid: str, part: str | None = None):
    if part is None:
        _store(handler, oid, body)
        return
    handler.hub.parts.setdefault(oid, {})[int(part)] = body
    handler.answer({}, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})


def complete_large(handler: Handler, body: bytes, oid: str):
    parts = handler.hub.parts[oid]
    told = [part["partNumber"] for part in json.loads(body)["parts"]]
    _store(handler, oid, b"".join(parts[number] for number in told))


def verify_large(handler: Handler, body: bytes, oid: str):
    if len(handler.hub.large_files.get(oid, b"")) != json.loads(body)["size"]:
        raise Refusal(400, "large file is not whole")
    handler.answer({})


def commit(handler: Handler, body: bytes, repo: str, revision: str):
    branches = handler.repository(repo, to_write=True).branches
    if revision not in branches:
        raise Refusal(404, "Revision not found", "RevisionNotFound")
    lines = [json.loads(line) for line in body.splitlines()]
    message = lines[0]["value"]["summary"]
    tree = dict(branches[revision][-1][2])
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            tree[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in handler.hub.large_files:
                raise Refusal(400, f"large file {value['path']} was never uploaded")
            tree[value["path"]] = ("lfs", value["oid"])
        elif line["key"] == "deletedFile":
            del tree[value["path"]]
        else:
            raise Refusal(400, f"unknown operation {line['key']}")
    oid = hashlib.sha1(body + str(len(branches[revision])).encode()).hexdigest()
    branches[revision].append((oid, message, tree))
    handler.answer({"success": True, "commitOid": oid, "commitUrl": f"{handler.server.url}/{repo}/commit/{oid}"})


def resolve(handler: Handler, body: bytes, repo: str, revision: str, path: str):
    oid, _, tree = handler.commit_of(repo, revision)
    if path not in tree:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    held = tree[path]
    content = handler.hub.large_files[held[1]] if isinstance(held, tuple) else held
    etag = held[1] if isinstance(held, tuple) else hashlib.sha1(content).hexdigest()
    handler.answer(headers={"ETag": f'"{etag}"', "X-Repo-Commit": oid}, content=content)


def list_tree(handler: Handler, body: bytes, repo: str, revision: str, folder: str = ""):
    _, _, tree = handler.commit_of(repo, revision)
    inside = [path for path in tree if not folder or path.startswith(folder + "/")]
    if folder and not inside:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    handler.answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in inside])


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repository),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", create_branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", commit),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", list_tree),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", describe),
    ("GET", f"/api/models/{REPO}", describe),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/large/(?P<oid>\w{64})(/(?P<part>\d+))?", put_large),
    ("POST", r"/large/(?P<oid>\w{64})/complete", complete_large),
    ("POST", r"/large/(?P<oid>\w{64})/verify", verify_large),
    ("HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
)


def start_hub() -> tuple[Hub, ThreadingHTTPServer]:
    """Start a server on a free port of this machine; its `url` is the endpoint."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert urlsplit(server.url).hostname == "127.0.0.1"
    return hub, server
