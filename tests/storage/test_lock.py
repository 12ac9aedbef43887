"""The lock of a folder on a store: one owner, named with its age; what a killed run has left on this host is taken."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from surgery.errors import OutputError
from surgery.storage.lock import LOCK, _process, _started, lock_store, remove_stale_lock
from surgery.storage.store import Store
from surgery.storage.url import Url


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(Url("memory", tmp_path.name), OutputError)


def owner(**changed: object) -> bytes:
    """A lock of another process of this host that runs."""
    parent = {"token": "other", "since": time.time() - 200, **_process()}
    return json.dumps(parent | changed).encode()


def test_a_lock_is_there_while_it_is_held(store):
    with lock_store(store):
        assert json.loads(store.read(LOCK, 0, store.entry(LOCK).size))["pid"] == os.getpid()
    assert store.list() == {}


def test_a_lock_goes_with_an_error(store):
    with pytest.raises(ZeroDivisionError), lock_store(store):
        raise ZeroDivisionError
    assert store.list() == {}


def test_another_run_is_refused_with_the_owner_and_its_age(store, monkeypatch):
    monkeypatch.setenv("USER", "me")
    with lock_store(store), pytest.raises(OutputError) as refused, lock_store(store):
        pass
    host = os.uname().nodename
    assert str(refused.value) == (
        f"{store.url}: expected a folder for this run alone, got one that me@{host} (process {os.getpid()}) has been "
        f"writing to for 0 s. Wait for it, or choose another with `out`; if it has ended, remove {store.url / LOCK}."
    )


@pytest.mark.parametrize(
    ("changed", "age"),
    [({"host": "elsewhere"}, "3.3 min"), ({"namespace": "pid:[1]"}, "3.3 min"), ({"host": 7, "since": 0}, " d")],
    ids=["host", "container", "old"],
)
def test_an_owner_that_cannot_be_seen_is_not_taken_for_ended(store, changed, age):
    store.write(LOCK, owner(pid=1 << 30, **changed))
    with pytest.raises(OutputError, match=age), lock_store(store):
        pass
    assert store.list().keys() == {LOCK}


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b"{}"])
def test_a_damaged_lock_is_one(store, damaged):
    store.write(LOCK, damaged)
    with (
        pytest.raises(OutputError, match=r"an unknown host .process None. has been writing to. Wait"),
        lock_store(store),
    ):
        pass


def test_what_a_killed_process_left_is_taken_over(store):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    store.write(LOCK, owner(pid=child.pid, started="1@boot"))
    with lock_store(store):
        assert json.loads(store.read(LOCK, 0, store.entry(LOCK).size))["pid"] == os.getpid()
    assert store.list() == {}


def test_one_that_is_not_reaped_has_ended(store):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store.write(LOCK, owner(pid=child.pid, started=_started(child.pid)))
    with pytest.raises(OutputError, match="expected a folder for this run alone"), lock_store(store):
        pass
    child.kill()
    while _started(child.pid):
        time.sleep(0.01)
    with lock_store(store):
        pass
    child.communicate()


def test_a_later_process_of_the_same_number_is_not_the_owner(store):
    store.write(LOCK, owner(pid=os.getppid(), started="1@boot"))
    with lock_store(store):
        pass


def test_an_owner_that_runs_is_not_taken_for_ended(store):
    store.write(LOCK, owner())
    with pytest.raises(OutputError, match=r"for 3\.3 min"), lock_store(store):
        pass


def test_a_store_without_conditions_is_named(store, monkeypatch, caplog):
    monkeypatch.setattr(store, "create", lambda name, data: (store.write(name, data), True)[1])
    with caplog.at_level(logging.WARNING), lock_store(store):
        pass
    assert "its store cannot make an object only if there is none: let no other run write to it" in caplog.text


def test_only_the_lock_of_one_that_has_ended_is_removed(store):
    store.write(LOCK, owner())
    remove_stale_lock(store)
    assert store.list().keys() == {LOCK}
    store.write(LOCK, owner(started="1@boot"))
    remove_stale_lock(store)
    assert store.list() == {}
