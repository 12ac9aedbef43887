"""A Ray cluster of two nodes on this machine, each with a process and an object store of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

small = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args=small | {"resources": {"n0": 1}, "include_dashboard": False})
others = [cluster.add_node(**small, resources={"n1": 1})]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "remove\\n":
        cluster.remove_node(others.pop(), allow_graceful=False)
    else:
        others.append(cluster.add_node(**small))
        cluster.wait_for_nodes()
    print("done", flush=True)
cluster.shutdown()
"""


class RayCluster:
    """A head and a node, in a process of their own, which ends them."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as err:
            self._process = subprocess.Popen([sys.executable, "-c", _CLUSTER], text=True, stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, stderr=err)  # fmt: skip
        self.address = self._line()

    def _line(self) -> str:
        for line in self._process.stdout:
            if line.strip() == "done" or line[:1].isdigit():
                return line.strip()
        pytest.skip("Ray's cluster does not start here")
        return ""

    def tell(self, word: str) -> None:
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._line()

    def stop(self) -> None:
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
