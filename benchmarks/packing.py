"""One packed pass against its naive expansion (one forward per block): supervised units per second.

    python -m benchmarks.packing [--tokens 256] [--repeats 5]

Same document, same model, same run, alternating. Refuses to time anything unless both give the same
log-probabilities (law 4).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks import record
from tidal.blocks import BlockTable, Passage, passage, windows
from tidal.config import Shape
from tidal.model import TidalTransformer
from tidal.streams import pack
from tidal.tokenizer import MixedTokenizer

TEXT = Path(__file__).parent.parent / "README.md"


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="reader tokens of the document (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    text = TEXT.read_text()
    tokenizer = MixedTokenizer.train([text], vocab_size=1024)
    table = BlockTable(tokenizer)
    document = windows(passage(table, "", text), table, args.tokens, 1 << 30)[0]
    model = TidalTransformer.of(tokenizer, Shape()).eval()
    packed = [pack([[document]], table)]
    naive = [pack([[Passage(document.blocks[: i + 1], i)]], table) for i in range(1, len(document.blocks))]
    n_units = packed[0].n_units

    with torch.no_grad():
        one, other = (torch.cat([model.double().log_probs(b) for b in batches]) for batches in (packed, naive))
    difference = (one - other).abs().max().item()
    if len(one) != n_units or not difference < 1e-9:
        raise SystemExit(f"packed and naive disagree by {difference}; not timing a wrong result")
    model.float()

    seconds: dict[str, list[float]] = {"packed": [], "naive": []}
    for repeat in range(args.repeats + 1):
        for name, batches in (("packed", packed), ("naive", naive)):
            start = time.perf_counter()
            for batch in batches:  # forward and backward, as in training
                losses = model(batch)
                losses.units.backward()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    rates = {name: n_units / statistics.median(times) for name, times in seconds.items()}
    ratio = rates["packed"] / rates["naive"]
    for name, rate in rates.items():
        print(f"{name:<8} {rate:>12,.0f} supervised units/s   ({len(packed if name == 'packed' else naive)} passes)")
    print(f"ratio    {ratio:>12.1f}")
    print(json.dumps({
        "benchmark": "packing", "ratio": round(ratio, 2), "tokens": args.tokens, "units": n_units,
        "units_per_second": {name: round(rate, 1) for name, rate in rates.items()}, "max_difference": difference,
        **record.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
