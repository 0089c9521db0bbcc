"""The command line of the soak."""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import loadtests.soak
from loadtests.random_adapter import LinearSizes, write_adapter
from loadtests.soak.places import open_place
from loadtests.soak.run import Plan, Soak

ADAPTERS = 4
LOG_CHARACTERS = 20_000
SCALE = 0.05
"""Of their factors: large enough that each of them answers in its own way."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: everything held."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak", description=(loadtests.soak.__doc__ or "").split(":")[0]
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--stores", choices=("auto", "local", "remote"), default="auto", help="SQLite and files, or PostgreSQL and S3"
    )
    parser.add_argument("--clients", type=int, default=3, help="of each of three tenants [3]")
    parser.add_argument("--fault-seconds", type=float, default=3.0, help="between two faults of a row, on average [3]")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    model = asked.model.resolve()
    with tempfile.TemporaryDirectory(prefix="loramux-soak-") as folder, open_place(asked.stores, Path(folder)) as place:
        sizes, names = LinearSizes.of(model), [f"fixed-{number}" for number in range(ADAPTERS)]
        adapters = {
            name: write_adapter(Path(folder) / name, sizes, 4, seed, scale=SCALE) for seed, name in enumerate(names)
        }
        _say(
            f"{place.name}, {asked.minutes:g} minutes, seed {asked.seed}, which gives the same faults in the same order"
        )
        for sentence in place.left_out:
            _say(f"left out: {sentence}")
        plan = Plan(asked.minutes, asked.clients, asked.fault_seconds, asked.seed)
        soak = Soak(place, model, adapters, plan, _say)
        document = asyncio.run(soak.run())
    if document["broken"]:
        for log in soak.logs:
            words = "\n".join(line for line in log.splitlines() if " INFO " not in line[:40])
            _say(f"a server's last words but for what went well:\n{words[-LOG_CHARACTERS:]}")
    for sentence in document["broken"][:20]:
        _say(f"broken: {sentence}")
    print(json.dumps(document))
    return 1 if document["broken"] else 0


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
