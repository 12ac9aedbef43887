"""Xet storage for the Hub of `helpers/hub.py`, as far as hf_xet asks: tokens, reconstructions of one chunk, uploads.

What is uploaded is not looked at: a test puts into `Hub.stored` beforehand what it will be.
"""

import hashlib
from typing import Any

from hub_wire import Wire

_EXPIRES = 2**33  # seconds since 1970


def xet_hash(data: bytes) -> str:
    """Return what Xet knows content by, which is not its sha256."""
    return hashlib.blake2s(data).hexdigest()


class Xet(Wire):
    """Answers requests for tokens, and those below /xet."""

    def xet_route(self, path: str) -> None:
        last = path.rpartition("/")[2]
        if "-token/" in path:
            self._token()
        elif "/v1/reconstructions/" in path:
            self.send_json(self._reconstruction(last))
        elif "/chunk/" in path:
            data = self._content(last)
            size = len(data).to_bytes(3, "little")
            self.send(206, b"\0" + size + b"\0" + size + data, {})  # version, size, not compressed, size
        elif self.command == "POST" and "/v1/" in path:
            self.send_json({"was_inserted": True, "result": 1})
        else:  # later versions of these paths, which are asked for first
            self.refuse(404)

    def _token(self) -> None:
        url = f"{self.state.url}/xet"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(_EXPIRES)}
        self.send_json({"casUrl": url, "accessToken": "xet", "exp": _EXPIRES}, headers=headers)

    def _reconstruction(self, hash: str) -> dict[str, Any]:
        size, chunks = len(self._content(hash)), {"start": 0, "end": 1}
        url = f"{self.state.url}/xet/chunk/{hash}?X-Amz-Signature=s3cret"
        part = {"range": chunks, "url": url, "url_range": {"start": 0, "end": size + 7}}
        terms = [{"hash": hash, "unpacked_length": size, "range": chunks}]
        return {"offset_into_first_range": 0, "terms": terms, "fetch_info": {hash: [part]}}

    def _content(self, hash: str) -> bytes:
        commits = (files for repo in self.state.repos.values() for files in repo.commits.values())
        return next(data for files in commits for data in files.values() if xet_hash(data) == hash)
