"""``python -m tests.attacks``: run every attack, print what was seen; exit 1 where one succeeds.

    python -m tests.attacks [--checkout FOLDER] [--only WORD ...] [--messages N] [--seed N]

``--checkout`` names the code under attack, this one's by default.  For Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the attacks; 1 where one succeeded."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the code under attack")
    parser.add_argument("--only", nargs="*", default=(), help="faults by number or part of a name")
    parser.add_argument("--messages", type=int, default=20_000, help="random ones")
    parser.add_argument("--seed", type=int, help="of the random messages; drawn unless given")
    options = parser.parse_args()
    root = options.checkout.resolve()
    sys.path.insert(0, str(root))  # what is imported from here on is the code under attack
    from tests.attacks.catalogue import list_attacks
    from tests.attacks.processes import Checkout
    from tests.attacks.tables import Row, print_row, print_table
    from tests.attacks.verdicts import Ground, Outcome

    os.environ["PYTHONPATH"] = str(root)
    folder = Path(tempfile.mkdtemp(prefix="splitonnx-attacks-"))
    ground = Ground(Checkout(root), folder)
    rows: list[Row] = []
    for attack in list_attacks(messages=options.messages, seed=options.seed):
        if options.only and not any(
            word in (attack.fault, attack.name) or (len(word) > 3 and word in attack.name)
            for word in options.only
        ):
            continue
        begun = time.monotonic()
        try:
            outcome = attack.run(ground)
        except Exception as error:  # noqa: BLE001 - one attack that fails hides no other
            outcome = Outcome(seen=f"not carried out: {type(error).__name__}: {error}", held=False)
        rows.append(Row(attack=attack, outcome=outcome, seconds=time.monotonic() - begun))
        print_row(rows[-1])
    print_table(rows)
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if rows and all(row.outcome.held for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
