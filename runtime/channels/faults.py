"""The errors that a server reports, raised by the client as the server raised them."""

from __future__ import annotations

from splitonnx.errors import (
    BatchTooLarge,
    NotFinite,
    NotPermitted,
    RemoteFault,
    ServerBusy,
    SharingNotPermitted,
    SplitonnxError,
    StaleConnection,
    TaskTooLarge,
)
from splitonnx.messages import Fault


def translate_fault(fault: Fault, generation: int) -> SplitonnxError:
    """Return the error that a fault of the server reports.

    ``generation`` is the number of the connection that the fault came on.
    """
    if fault.code == StaleConnection.__name__:
        return StaleConnection(generation, fault.newest)
    if fault.code == ServerBusy.__name__:
        return ServerBusy(fault.reason)
    if fault.code == NotFinite.__name__:
        return NotFinite(fault.subject, f"{fault.reason}, at the server")
    if fault.code == BatchTooLarge.__name__:
        return BatchTooLarge(fault.subject, fault.needed, fault.limit)
    if fault.code == NotPermitted.__name__:
        return NotPermitted(fault.subject, fault.reason)
    if fault.code == SharingNotPermitted.__name__:
        return SharingNotPermitted(fault.subject)
    if fault.code == TaskTooLarge.__name__:
        return TaskTooLarge(fault.needed, fault.limit)
    return RemoteFault(fault.code, fault.reason)
