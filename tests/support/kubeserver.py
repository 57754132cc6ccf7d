"""An API server for tests, as far as runs use Kubernetes': objects are kept, checked for quota and owners, and listed."""

import contextlib
import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import yaml

_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+/[^/]+))/namespaces/(?P<space>[^/]+)(?:/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?P<log>/log)?)?)?"
)
_RESOURCES = {
    "/api/v1": [("configmaps", "ConfigMap"), ("secrets", "Secret"), ("pods", "Pod"), ("namespaces", "Namespace")],
    "/apis/jobset.x-k8s.io/v1alpha2": [("jobsets", "JobSet")],
}


class KubeServer(ThreadingHTTPServer):
    """objects: by (namespace, plural, name). token: what one has to
    log in with; empty: nothing. refuse: by (method, plural), a status and message, for requests that are not
    rehearsals, or with "?" before the method for rehearsals. logs: lines by name of a pod. asked: every request so far."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.refuse, self.logs, self.asked = {}, {}, {}, []
        self.namespaces, self.token, self.jobsets_known = {"default"}, "s3cret", True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def kubeconfig(self, path):
        cluster, user = {"server": self.url}, {"token": self.token}
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}], "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }))  # fmt: skip
        return path

    def kinds(self):
        return sorted(plural for _, plural, _ in self.objects)

    def add_pod(self, jobset, role, index, phase, **status):
        """What the controllers would make of a JobSet; conditions, containerStatuses and reason are its status'."""
        labels = self.objects["default", "jobsets", jobset]["metadata"]["labels"] | {
            "jobset.sigs.k8s.io/jobset-name": jobset, "jobset.sigs.k8s.io/replicatedjob-name": role,
            "batch.kubernetes.io/job-completion-index": str(index),
        }  # fmt: skip
        name = f"{jobset}-{role}-0-{index}-{uuid.uuid4().hex[:5]}"
        node = {"nodeName": f"gpu-{role}-{index}"} if phase != "Pending" else {}
        meta = {"name": name, "labels": labels, "creationTimestamp": f"2026-01-01T00:00:{len(self.objects):02d}Z"}
        self.objects["default", "pods", name] = {"metadata": meta, "spec": node, "status": {"phase": phase, **status}}
        return name


@contextlib.contextmanager
def serving():
    server = KubeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: KubeServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_POST = do_DELETE = do_GET

    def answer(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.server.asked.append((self.command, url.path, query))
        status, said = self.decide(url.path, query, body)
        if status >= 300:
            said = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": said, "code": status}
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def decide(self, path, query, body):
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return 401, "Unauthorized"
        if found := self.discovery(path):
            return 200, found
        match = _PATH.fullmatch(path)
        if not match:
            return 404, f"no such path: {path}"
        space, plural, name = match["space"], match["plural"], match["name"]
        if plural == "jobsets" and not self.server.jobsets_known:
            return 404, "404 page not found"
        rule = self.server.refuse.get((("?" if "dryRun" in query else "") + self.command, plural or "namespaces"))
        if rule:
            return rule
        if space not in self.server.namespaces:
            return 404, f'namespaces "{space}" not found'
        if plural is None:
            return 200, {"metadata": {"name": space}}
        if self.command == "POST":
            return self.create(space, plural, query, body)
        if name and (space, plural, name) not in self.server.objects:
            return 404, f'{plural} "{name}" not found'
        if match["log"]:
            lines = self.server.logs[name]
            last = int(query.get("tailLines", len(lines)))
            return 200, "".join(f"{line}\n" for line in lines[len(lines) - last :]).encode()
        if self.command == "DELETE":
            return self.delete(space, plural, name, query)
        return (200, self.server.objects[space, plural, name]) if name else self.listed(space, plural, query)

    def discovery(self, path):
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            version = {"groupVersion": "jobset.x-k8s.io/v1alpha2", "version": "v1alpha2"}
            group = {"name": "jobset.x-k8s.io", "versions": [version], "preferredVersion": version}
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}
        if path in _RESOURCES:
            verbs = ["create", "delete", "get", "list"]
            made = [
                {"name": name, "singularName": "", "namespaced": name != "namespaces", "kind": kind, "verbs": verbs}
                for name, kind in _RESOURCES[path]
            ]
            version = path.removeprefix("/apis/").removeprefix("/api/")
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": made}
        return None

    def create(self, space, plural, query, body):
        key = space, plural, body["metadata"]["name"]
        if key in self.server.objects:
            return 409, f'{plural} "{key[2]}" already exists'
        if plural != "jobsets":
            try:
                kubernetes_validate.validate(body, "1.37", strict=query.get("fieldValidation") == "Strict")
            except kubernetes_validate.ValidationError as error:
                return 422, error.message
        made = {**body, "metadata": {**body["metadata"], "uid": str(uuid.uuid4())}}
        if "dryRun" not in query:
            self.server.objects[key] = made
        return 201, made

    def delete(self, space, plural, name, query):
        gone = [
            key
            for key in self.server.objects
            if key[:2] == (space, plural) and (key[2] == name or (not name and self.fits(key, query)))
        ]
        uids = {self.server.objects.pop(key).get("metadata", {}).get("uid") for key in gone}
        for key, thing in list(self.server.objects.items()):
            if any(owner["uid"] in uids for owner in thing["metadata"].get("ownerReferences", [])):
                del self.server.objects[key]
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def fits(self, key, query):
        labels = self.server.objects[key]["metadata"].get("labels", {})
        wanted = [pair.partition("=") for pair in query.get("labelSelector", "").split(",") if pair]
        field = query.get("fieldSelector", "metadata.name=").partition("=")[2]
        return all(labels.get(name) == value for name, _, value in wanted) and field in ("", key[2])

    def listed(self, space, plural, query):
        found = [
            self.server.objects[key]
            for key in sorted(self.server.objects)
            if key[:2] == (space, plural) and self.fits(key, query)
        ]
        start, limit = int(query.get("continue", 0)), int(query.get("limit", 0)) or len(found) or 1
        more = {"continue": str(start + limit)} if start + limit < len(found) else {}
        return 200, {"kind": "List", "metadata": more, "items": found[start : start + limit]}
