"""The calls to a Kubernetes API server. Every failure is one LaunchError, and no call blocks forever."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

from mikoshi.launch.backends.kubernetes.manifests import Object
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.trainer.errors import LaunchError

_GROUP, _VERSION, _PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
_TIMEOUT = (10, 30)  # seconds to connect, and to answer
_PAGE = 500
_NO_QUERY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Api:
    """A connection to an API server. Objects are in its JSON form.

    settings: the kubeconfig's, read by the package `kubernetes`, which supports every way to log in
    pool: its HTTP connections, with the configured certificates. Calls use them directly, since the package's own functions
        differ between versions.
    """

    settings: Any
    pool: Any

    def _call(self, method: str, path: str, body: Object | None = None, query: Mapping[str, str] = _NO_QUERY) -> Any:
        """Make one request, and return the answer's JSON. Raises LaunchError."""
        with self._request(method, path, body, query, _TIMEOUT) as answer:
            return json.loads(answer.read())

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: Object | None, query: Mapping[str, str], timeout: tuple[float, float | None]
    ) -> Iterator[Any]:
        """Make one request, and yield the unread answer. Raises LaunchError, also while it is read."""
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json, */*", "Content-Type": "application/json", "User-Agent": "mikoshi"}
        if token := self.settings.auth_settings().get("BearerToken"):
            headers["Authorization"] = token["value"]
        try:
            answer = self.pool.request(
                method, f"{self.settings.host}{path}?{urlencode(query)}", body=None if body is None else json.dumps(body),
                headers=headers, timeout=Timeout(*timeout), retries=False, redirect=False, preload_content=False,
            )  # fmt: skip
            with contextlib.closing(answer):
                if answer.status >= 300:
                    raise ApiError(self.settings.host, answer.status, _error_message(answer))
                yield answer
        except (HTTPError, OSError) as error:
            why = " ".join(str(error).rpartition(": ")[2].split())
            raise LaunchError(
                f"Kubernetes at {self.settings.host} does not answer: {why}; check the network and `context`"
            ) from None
        except json.JSONDecodeError:
            raise LaunchError(f"{self.settings.host}: what answers there is no Kubernetes: check `context`") from None

    def namespace(self, name: str) -> None:
        """Raise LaunchError if the namespace does not exist. If it may not be read, the next call reports that."""
        try:
            self._call("GET", f"/api/v1/namespaces/{name}")
        except ApiError as error:
            if error.status == 404:
                raise LaunchError(f"namespace = {name!r}: not there: kubectl create namespace {name}") from None
            if error.status != 403:
                raise

    def claim(self, namespace: str, name: str) -> None:
        """Raise LaunchError if this PersistentVolumeClaim does not exist."""
        self._require("claim", f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}", name, namespace)

    def secret(self, namespace: str, name: str) -> None:
        """Raise LaunchError if this Secret does not exist."""
        try:
            found = self._call(
                "GET", f"/api/v1/namespaces/{namespace}/secrets", query={"fieldSelector": f"metadata.name={name}", "limit": "1"}
            )
        except ApiError as error:
            if error.status == 403:  # the right to use a Secret does not include the right to read it
                return
            raise
        if not found.get("items"):
            raise LaunchError(f"secret_refs = {name!r}: not there in namespace {namespace}: make it, or take it out")

    def _require(self, key: str, path: str, name: str, namespace: str) -> None:
        try:
            self._call("GET", path)
        except ApiError as error:
            if error.status == 404:
                raise LaunchError(f"{key} = {name!r}: not there in namespace {namespace}: make it, or name another") from None
            if error.status != 403:
                raise

    def jobsets(self, namespace: str, selector: str, limit: int = _PAGE) -> list[Object]:
        """All JobSets with these labels; only the first `limit` if that is less than a page. Raises LaunchError."""
        try:
            return self._list(f"/apis/{_GROUP}/{_VERSION}/namespaces/{namespace}/{_PLURAL}", selector, limit)
        except ApiError as error:
            if error.status == 404:
                raise LaunchError(
                    f"{self.settings.host} does not know JobSets: they have to be installed there: https://jobset.sigs.k8s.io"
                ) from None
            raise

    def pods(self, namespace: str, selector: str) -> list[Object]:
        """All pods with these labels. Raises LaunchError."""
        return self._list(f"/api/v1/namespaces/{namespace}/pods", selector, _PAGE)

    def _list(self, path: str, selector: str, limit: int) -> list[Object]:
        items: list[Object] = []
        query = {"labelSelector": selector, "limit": str(limit)}
        while True:
            page = self._call("GET", path, query=query)
            items += page.get("items") or []
            following = page.get("metadata", {}).get("continue")
            if not following or limit < _PAGE:
                return items
            query["continue"] = following

    def create(self, thing: Object, dry_run: bool = False) -> Object:
        """Create an object. Unknown fields are refused.

        dry_run: the server checks it in full and keeps nothing
        """
        group, plural = thing["apiVersion"], f"{thing['kind'].lower()}s"
        root = "/api/v1" if group == "v1" else f"/apis/{group}"
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        made: Object = self._call("POST", f"{root}/namespaces/{thing['metadata']['namespace']}/{plural}", thing, query)
        return made

    def delete(self, namespace: str, name: str, order: str = "Foreground") -> dict[str, str]:
        """Delete a JobSet, and return its labels, or none if it did not exist.

        order: Foreground: after everything that it owns, whose pods may still save; Background: before
        """
        path = f"/apis/{_GROUP}/{_VERSION}/namespaces/{namespace}/{_PLURAL}/{name}"
        try:
            labels: dict[str, str] = self._call("GET", path)["metadata"].get("labels", {})
            self._call("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": order})
        except ApiError as error:
            if error.status == 404:
                return {}
            raise
        return labels

    def kill_pods(self, namespace: str, selector: str) -> None:
        """Delete pods without a grace period."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        self._call("DELETE", f"/api/v1/namespaces/{namespace}/pods", options, {"labelSelector": selector})

    def log(self, namespace: str, pod: str, follow: bool, last: int | None) -> Iterator[str]:
        """Yield the lines of a pod's container.

        follow: also lines to come
        last: only so many of the lines that exist
        """
        path, query = f"/api/v1/namespaces/{namespace}/pods/{pod}/log", {"container": "mikoshi", "follow": str(follow).lower()}
        query |= {} if last is None else {"tailLines": str(last)}
        with self._request("GET", path, None, query, (_TIMEOUT[0], None if follow else _TIMEOUT[1])) as answer:
            rest = b""
            for piece in answer.stream(1 << 16):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield line.decode("utf-8", "replace")
            if rest:
                yield rest.decode("utf-8", "replace")


class ApiError(LaunchError):
    """The server has refused a request. status: the HTTP status."""

    def __init__(self, server: str, status: int, text: str) -> None:
        self.status = status
        hint = {401: "log in again", 403: "ask for that right or quota, or ask for less", 409: "it is there already"}.get(
            status
        )
        super().__init__(f"Kubernetes at {server} refuses ({status}): {text}{f': {hint}' if hint else ''}")


def _error_message(answer: Any) -> str:
    """The message of an error answer, on one line."""
    try:
        text = json.loads(answer.read(1 << 16))["message"]
    except (TypeError, ValueError, KeyError):
        text = answer.reason or "without a reason"
    return " ".join(str(text).split())[:400]


def connect(cluster: KubernetesCluster) -> Api:
    """Connect to the cluster of a kubeconfig's context, or to the one that this pod is in. Raises LaunchError."""
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
    except ImportError:
        raise LaunchError('Kubernetes needs one more package: pip install "mikoshi[kubernetes]"') from None
    settings = client.Configuration()
    try:
        try:
            files = os.environ.get("KUBECONFIG") or None  # as kubectl does; the package reads it only at import
            config.load_kube_config(files, context=cluster.context or None, client_configuration=settings)
        except ConfigException:
            if cluster.context:
                raise
            config.load_incluster_config(client_configuration=settings)
    except ConfigException as error:
        raise LaunchError(
            f"context = {cluster.context!r}: no way to Kubernetes: {error}: see `kubectl config get-contexts`"
        ) from None
    return Api(settings, client.ApiClient(settings).rest_client.pool_manager)
