"""Certificates in files: an authority's, a server's, a client's, and another authority's."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme


class Files:
    """Certificates in files: an authority's, a server's, a client's, and another authority's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ours, theirs = trustme.CA(), trustme.CA()
        self.authority = self._write("ca", ours.cert_pem)
        self.other_authority = self._write("other-ca", theirs.cert_pem)
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        self.server = self._issue("server", ours.issue_cert("127.0.0.1"))
        self.elsewhere = self._issue("elsewhere", ours.issue_cert("other.example"))
        self.expired = self._issue("expired", ours.issue_cert("127.0.0.1", not_after=past))
        self.client = self._issue("client", ours.issue_cert("ana@x.example", common_name="ana"))
        self.foreign = self._issue("foreign", theirs.issue_cert("eve@x.example"))

    def _write(self, name: str, blob: trustme.Blob) -> Path:
        path = self.folder / f"{name}.pem"
        blob.write_to_path(str(path))
        return path

    def _issue(self, name: str, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        chain = self.folder / f"{name}.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return chain, self._write(f"{name}-key", leaf.private_key_pem)
