"""Test vectors for every runtime, whatever its language: bytes with their meaning.

``python -m tests.vectors`` writes them anew, beside this file::

    messages.json      messages of every kind: bytes, fields, tensors
    refusals.json      bytes that must be refused: tensors, messages, manifests, graphs
    replies.json       what a server may not send to a client of ``tiny``, and as what it is refused
    sample_axes.json   the axis of an output along which its batches are joined
    schedules.json     factors of the learning rate, step after step
    shuffles.json      orders of rows by seed and epoch
    tiny/              a client's part, cut by hand
    dropout/           a bundle, U-shaped and portable, with BatchNormalization and Dropout
    stages.safetensors what every stage of ``dropout`` gives for given inputs

Bytes stand in base64.  Hostile bytes are those that the Python tests refuse.
"""
