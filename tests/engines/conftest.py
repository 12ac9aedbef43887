"""A Ray cluster for all tests of engines: starting one takes seconds."""

from collections.abc import Iterator

import pytest
from ray_cluster import RayCluster


@pytest.fixture(scope="session")
def cluster_of_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    started = RayCluster(tmp_path_factory.mktemp("ray") / "cluster.log")
    yield started
    started.stop()
