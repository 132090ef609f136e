"""Who can reach a server, and what must hold before the network can."""

from __future__ import annotations

import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.wire.exposure import check_exposure
from splitonnx.runtime.wire.tls import make_server_tls
from tests.support.certificates import Files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "lab.example"])
def test_beyond_this_machine_a_server_wants_locks(files: Files, host: str) -> None:
    with pytest.raises(UsageError, match=r"--token-file.*--insecure"):
        check_exposure(host, None, None)
    with pytest.raises(UsageError, match="anyone"):
        check_exposure(host, None, make_server_tls(*files.server))
    check_exposure(host, object(), None)
    check_exposure(host, None, None, insecure=True)
    check_exposure(host, None, make_server_tls(*files.server, client_authority=files.authority))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_this_machine_it_wants_none(host: str) -> None:
    check_exposure(host, None, None)


def test_tokens_without_tls_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_exposure("0.0.0.0", object(), None)
    assert "no TLS" in caplog.text
