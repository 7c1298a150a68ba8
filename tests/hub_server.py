"""A stand-in for the HTTP interface of the Hugging Face hub, as far as ``huggingface_hub`` uses it for models.

Not the real hub: it was written by what the library asks and what its documentation says of the answers. Accounts by
token, repositories with branches and commits, regular and LFS files, the codes and headers of refusals. ``requests``
has what was asked: ("GET", path). ``answers``: (regular expression of "GET path", status) of requests to refuse.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field

WRITE, READ, OTHERS = "hf_write", "hf_read", "hf_others"
ACCOUNTS = {
    WRITE: {"name": "ada", "orgs": [{"name": "engines"}], "role": "write"},
    READ: {"name": "ada", "orgs": [], "role": "read"},
    OTHERS: {"name": "bob", "orgs": [], "role": "write"},
}
LFS_FROM = 10_000  # bytes; smaller files are in the commit itself


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict = field(default_factory=dict)  # name -> commits, the newest last
    commits: dict = field(default_factory=dict)  # commit -> {path: content}
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message="more"):
        """A commit with all of ``files`` (path -> content) upon what the branch has."""
        before = self.branches.setdefault(branch, [])
        content = {**(self.commits[before[-1]] if before else {}), **files}
        name = hashlib.sha1(repr((branch, len(self.messages), message)).encode()).hexdigest()
        self.commits[name] = content
        before.append(name)
        self.messages.append(message)
        return name

    def find(self, revision):
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None


class HubServer:
    """``with HubServer() as hub``: at ``hub.url``; ``hub.repositories``: "user/name" -> :class:`Repository`."""

    def __init__(self):
        self.repositories, self.blobs, self.requests, self.answers = {}, {}, [], []

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.elsewhere = (
            f"http://127.0.0.1:{port}",
            f"http://localhost:{port}",
        )  # where large files are
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, files, branch="main", **facts):
        """A repository with one commit -> that commit."""
        repository = self.repositories.setdefault(name, Repository(**facts))
        return repository.commit(branch, files)

    def asked(self, pattern):
        """How many requests were like that."""
        return sum(re.search(pattern, " ".join(request)) is not None for request in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        path, _, query = self.path.partition("?")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        self.hub.requests.append((self.command, urllib.parse.unquote(path)))
        for pattern, status in self.hub.answers:
            if re.search(pattern, f"{self.command} {path}"):
                return self._say(status, {"error": "as the test wants it"})
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return getattr(self, method)(*map(urllib.parse.unquote, found.groups()))
        raise AssertionError(f"the stand-in knows nothing of {self.command} {path}?{query}")

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _chunks(self):
        data = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            data += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return data

    def _say(self, status, content=None, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status, code="", message=""):
        codes = {"X_Error_Code": code} if code else {}
        self._say(status, {"error": message or code}, **codes, X_Error_Message=message or code)

    def _account(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token, ACCOUNTS.get(token)

    def _repository(self, name):
        """The repository if this request may read it; else None, and it was refused as the hub does."""
        repository, (token, account) = self.hub.repositories.get(name), self._account()
        if token and account is None:
            self._error(401, message="Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not self._owns(name)):
            self._error(404 if account else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and not account:
            self._error(401, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return repository
        return None

    def _commit(self, name, revision):
        """The repository and its commit of a revision; else two None, and it was refused as the hub does."""
        repository = self._repository(name)
        commit = repository.find(revision) if repository else None
        if repository and commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return (repository, commit) if commit else (None, None)

    def _owns(self, name):
        _, account = self._account()
        return account and name.split("/")[0] in (account["name"], *(o["name"] for o in account["orgs"]))

    def _may_write(self, name):
        _, account = self._account()
        if not account:
            self._error(401, message="Invalid username or password.")
        elif account["role"] != "write" or not self._owns(name):
            self._error(403, message="You don't have the rights to create a model under this namespace")
        else:
            return True
        return False

    def whoami(self):
        _, account = self._account()
        if not account:
            return self._error(401, message="Invalid credentials in Authorization header")
        token = {"displayName": "laptop", "role": account["role"]}
        facts = {"type": "user", "name": account["name"], "orgs": account["orgs"]}
        return self._say(200, {**facts, "auth": {"type": "access_token", "accessToken": token}})

    def nothing(self):
        self._error(404, message="Not found")

    def validate_yaml(self):
        self._say(200, {"errors": [], "warnings": []})

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self._account()[1]['name']}/{asked['name']}"
        if not self._may_write(name):
            return None
        if name in self.hub.repositories:
            return self._error(409, message="You already created this model repo")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
        return self._say(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def info(self, name, revision="main"):
        repository, commit = self._commit(name, revision)
        if commit is None:
            return None
        files = [{"rfilename": path} for path in repository.commits[commit]]
        facts = {"id": name, "modelId": name, "sha": commit, "private": repository.private}
        return self._say(200, {**facts, "siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def branch(self, name, branch):
        if not self._may_write(name):
            return None
        repository = self.hub.repositories[name]
        if branch in repository.branches:
            return self._error(409, message="Reference already exists")
        repository.branches[branch] = [repository.find("main")]
        return self._say(200, {})

    def preupload(self, name, revision):
        if not self._may_write(name):
            return None
        files = json.loads(self.body)["files"]
        mode = lambda file: "lfs" if file["size"] > LFS_FROM else "regular"
        said = [{"path": file["path"], "uploadMode": mode(file), "shouldIgnore": False} for file in files]
        return self._say(200, {"files": said, "commitOid": self.hub.repositories[name].find(revision)})

    def lfs_batch(self, name):
        if not self._may_write(name):
            return None
        objects = json.loads(self.body)["objects"]
        link = lambda oid: {"upload": {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}}
        said = [
            {"oid": o["oid"], "size": o["size"]}
            | ({} if o["oid"] in self.hub.blobs else {"actions": link(o["oid"])})
            for o in objects
        ]
        return self._say(200, {"transfer": "basic", "objects": said}, Content_Type="application/json")

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._say(200, {})

    def lfs_get(self, oid):
        content = self.hub.blobs[oid]
        self._say(200, content, ETag=f'"{oid}"')

    def commit(self, name, branch):
        if not self._may_write(name):
            return None
        repository = self.hub.repositories[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if branch not in repository.branches:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        if header.get("parentCommit") not in (None, repository.find(branch)):
            return self._error(412, message="A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = repository.commit(branch, files, header["summary"])
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self._say(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, name, revision, path):
        repository, commit = self._commit(name, revision)
        if commit is None:
            return None
        content = repository.commits[commit].get(path)
        known = {"X_Repo_Commit": commit}
        if content is None:
            return self._say(
                404,
                {"error": "Entry not found"},
                **known,
                X_Error_Code="EntryNotFound",
                X_Error_Message="Entry not found",
            )
        if len(content) <= LFS_FROM:
            return self._say(200, content, **known, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        oid = hashlib.sha256(content).hexdigest()
        self.hub.blobs[oid] = content
        known |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
        return self._say(302, b"", **known, Location=f"{self.hub.elsewhere}/lfs/{oid}")


NAME = r"([^/ ]+/[^/ ]+)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"GET /api/agent-harnesses", "nothing"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (r"POST /api/repos/create", "create"),
    (rf"GET /api/models/{NAME}", "info"),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", "info"),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", "branch"),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", "preupload"),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", "commit"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(\w+)", "lfs_put"),
    (r"(?:GET|HEAD) /lfs/(\w+)", "lfs_get"),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", "resolve"),
]
