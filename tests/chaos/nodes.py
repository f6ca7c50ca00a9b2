"""A Ray of several nodes on this machine, and the faults of a node that leaves with its worker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client

from tests.chaos.faults import Fault
from tests.cluster.live.service import APP, OBJECT_STORE_BYTES, LiveService, serve_environment

WORKER_CPUS = 1
"""A node has room for one worker; the first one for the other processes, too."""
DRAIN_S = 600
"""Time that a drained node is given. It leaves as soon as it is empty."""


class Nodes:
    """The nodes beside the first one: the one that has a worker."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments(2 * WORKER_CPUS))
        self._node = self._next = self._add()

    @property
    def address(self) -> str:
        """Where Ray is joined."""
        return str(self._cluster.address)

    def prepare(self, service: LiveService) -> None:
        """Have another node ready."""
        self._next = self._add()

    def kill(self, service: LiveService) -> frozenset[int]:
        """Kill all processes of the node. Returns the ids of replicas on it."""
        gone = self._replicas(self._node)
        old, self._node = self._node, self._next
        for info in old.all_processes.values():
            for each in info:
                psutil.Process(each.process.pid).kill()
        self._cluster.remove_node(old, allow_graceful=False)
        return gone

    def drain(self, service: LiveService) -> frozenset[int]:
        """Drain the node, as an autoscaler does; it ends itself once it is empty. Returns the ids of replicas on it."""
        gone = self._replicas(self._node)
        old, self._node = self._node, self._next
        options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "it leaves"]
        options += ["--deadline-remaining-seconds", str(DRAIN_S), "--node-id", old.node_id]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address, *options]
        subprocess.run(command, check=True, capture_output=True)
        return gone

    def close(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()

    def _add(self) -> Any:
        return self._cluster.add_node(**self._arguments(WORKER_CPUS))

    def _arguments(self, num_cpus: int) -> dict[str, Any]:
        return {
            "num_cpus": num_cpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }

    def _replicas(self, node: Any) -> frozenset[int]:
        client = _get_global_client()
        assert client is not None
        deployments = client.get_serve_details()["applications"][APP]["deployments"].values()
        return frozenset(
            replica["pid"]
            for deployment in deployments
            for replica in deployment["replicas"]
            if replica["node_id"] == node.node_id
        )


@contextmanager
def ray_nodes(**environment: str) -> Iterator[Nodes]:
    """Two nodes on this machine; `environment` reaches every process of them."""
    with serve_environment(**environment):
        nodes = Nodes()
        try:
            ray.init(address=nodes.address, namespace="serve", log_to_driver=False)
            yield nodes
        finally:
            serve.shutdown()
            ray.shutdown()
            nodes.close()


def node_faults(nodes: Nodes) -> tuple[Fault, ...]:
    """The faults of a node that leaves."""
    return (
        Fault("a node is killed", nodes.kill, prepare=nodes.prepare),
        Fault("a node is drained", nodes.drain, prepare=nodes.prepare, is_harmless=True),
    )
