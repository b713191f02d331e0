"""How long `order_report` takes on a whole ResNet56: the limit is a minute on two cores.

Three pruners × two formats, on weights alone and with calibration images (random ones cost as
much), two threads. Seconds of wall time, and of the processor.

Run:      python experiments/bench_order_report.py
Results:  experiments/results/bench_order_report.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, origin, write
from networks import network
from order_grid import PRUNERS

from lc_compress import number_format
from lc_compress.interplay import order_report

LIMIT = 60.0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="ResNet8, in seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_order_report.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    name, images = ("resnet8", 1) if options.smoke else ("resnet56", options.images)
    model, batch = network(name).eval(), torch.randn(images, 3, 32, 32)
    source, began = origin(__file__), time.perf_counter()
    rows: list[dict[str, Any]] = []
    for data in (None, [batch]):
        for form in ("MXFP4", "INT4"):
            for pruning, pruner in PRUNERS.items():
                wall, cpu = time.perf_counter(), time.process_time()
                report = order_report(model, pruner, number_format(form), data)
                row = {"format": form, "pruning": pruning, "images": images if data else 0}
                row |= {"layers": len(report.layers), "seconds": time.perf_counter() - wall}
                rows.append(row | {"cpu_seconds": time.process_time() - cpu})
                print(row)
    worst = max(row["seconds"] for row in rows)
    result = {"network": name, "rows": rows, "worst_seconds": worst, "limit": LIMIT}
    result |= {"met": worst < LIMIT, "wall_seconds": time.perf_counter() - began}
    smoke = " --smoke" if options.smoke else ""
    command = f"python experiments/bench_order_report.py{smoke}"
    config = {"images": images, "smoke": options.smoke}
    write(options.out, {"command": command, "config": config, "result": result, **source})


if __name__ == "__main__":
    main(sys.argv[1:])
