"""What token-level routing costs: steady decoding and throughput beside the base model's, over random gates.

Every token of a gated request weighs all adapters of the router anew, in every linear. Their rank is MeteoRA's.
"""

from dataclasses import replace
from typing import Any

from server.engine.bench_scenarios import steady_decode, throughput
from server.engine.bench_session import Session

Json = dict[str, Any]

RANK = 8


def gated(session: Session) -> Json:
    """Rows of decoding, and one of throughput for each kind of traffic: the base model, and `Options.gated`."""
    session.close()
    options = replace(session.options, traffic=("0", session.options.gated), rank=RANK)
    with Session(options, session.say, session.clock) as own:
        decoded, served = steady_decode(own), throughput(own)
    rows = [{"what": "decoding", **row} for row in decoded["rows"]]
    rows += [{"what": "throughput", **row} for row in served["rows"]]
    return {"scenario": "gated", "context": options.context, "rank": RANK, "rows": rows}
