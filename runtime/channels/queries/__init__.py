"""Questions to a server over plain HTTP on its websocket port, which change nothing there.

``http_queries.py`` asks one question, and says what a refusal means; the other modules ask for the
list of sessions, and for the trained state of the server's part.  No answer is trusted: each is
bounded in size and time, redirects are not followed, and what is written is the caller's choice.
"""
