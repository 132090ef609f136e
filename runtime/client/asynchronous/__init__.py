"""The public ``AsyncClient``, for programs that run on an asyncio event loop.

What a client plans, checks and computes is in the package ``client``; modules here only wait in
another way.  They may import that package, ``channels.asynchronous``, and what those may import.
"""
