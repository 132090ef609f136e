"""Code for both sides of a connection: protocol, fragments, buffers, close codes, TLS, validation.

The messages themselves, including greetings, are in ``splitonnx/messages.py``.  Code that only a
server or only a client needs belongs to the packages ``edge``, ``server`` or ``channels``.  Modules
here import none of the runtime's other packages.
"""
