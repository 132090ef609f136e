"""Put changed phases, graphs and parties in the place of those of a finished bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from splitonnx.bundles import Bundle, PartyBundle, compute_digest
from splitonnx.manifests import Phase
from splitonnx.recipes import Recipe


def replace_phase(party: PartyBundle, phase: Phase, graphs: Mapping[str, bytes]) -> PartyBundle:
    """Return a party with another phase of the same name, and with new or changed graphs."""
    manifest = party.manifest
    files = {file: hashlib.sha256(graph).hexdigest() for file, graph in graphs.items()}
    return replace(
        party,
        manifest=msgspec.structs.replace(
            manifest,
            phases=tuple(phase if p.name == phase.name else p for p in manifest.phases),
            files={**manifest.files, **files},
        ),
        graphs={**party.graphs, **graphs},
    )


def replace_parties(bundle: Bundle, parties: Mapping[str, PartyBundle], recipe: Recipe) -> Bundle:
    """Return a bundle with other parties and another recipe, and with the digest of the parties."""
    unsigned = {
        name: replace(party, manifest=msgspec.structs.replace(party.manifest, digest=""))
        for name, party in parties.items()
    }
    digest = compute_digest(unsigned)
    return replace(
        bundle,
        manifest=msgspec.structs.replace(bundle.manifest, digest=digest, recipe=recipe),
        parties={
            name: replace(party, manifest=msgspec.structs.replace(party.manifest, digest=digest))
            for name, party in unsigned.items()
        },
    )
