"""A client's connection for programs that run on an asyncio event loop.

``channels.py`` does on the loop what an exchange wants done, and ``websockets.py`` connects.
``threads.py`` keeps long computations off the loop.  What does not depend on how a client waits is
in the package ``channels`` itself.  Modules here may import that package and ``runtime.wire``.
"""
